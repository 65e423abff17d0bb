"""Every op on CUDA tensors: in Triton where it has kernels there, else in plain PyTorch. With what
Triton's interpreter cannot tell: bfloat16, streams, graphs, several devices, tensors of more than
2^31 elements, and whether runs agree where programs run side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from parity import assert_op_parity, assert_parity
from test_backend import CALL, python
from test_bidirectional_gru import split, together
from test_dropout import dropout
from test_dropout import plain as plain_dropout
from test_gru import dtype_id, plain_gru
from test_linear import plain as plain_linear
from test_linear_cross_entropy import plain as plain_loss
from test_linear_cross_entropy import plain_log_prob
from test_rnn_op import plain_rnn
from test_triton_attention import SHAPES as ATTENTION_EDGES
from test_triton_gru import SHAPES as GRU_EDGES
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence

import genkernels
from benchmarks import gpu
from genkernels import backend, triton

DEVICE = "cuda"
HALF = (torch.bfloat16, torch.float16)
ATTENTION = "scaled_dot_product_attention"
# The others' reference is PyTorch's own op, which is no fall back.
WARNING = ("dropout", "gru", "gru_cell", "bidirectional_gru", "rnn", ATTENTION, "varlen_attn")
RECURRENT = ("gru", "gru_cell", "bidirectional_gru", "rnn")
RAW_OPS = {
    ATTENTION: "attention_forward",
    "linear_cross_entropy": "linear_cross_entropy_pass",
    "linear_log_prob": "linear_cross_entropy_pass",
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA device: PyTorch sees none here"),
    pytest.mark.filterwarnings("ignore:genkernels", "ignore:RNN module weights"),
]


class Case(NamedTuple):
    op: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]  # of random tensors
    settings: dict[str, Any] = {}  # noqa: RUF012

    def draw(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        values = {name: torch.randn(s, generator=generator) for name, s in self.shapes.items()}
        return {name: (0.4 * v).to(dtype) for name, v in values.items()} | self.settings


def torch_bidirectional_gru(**values: Tensor) -> tuple[Tensor, ...]:
    (weights, weights_reverse), x = split(values), values["input"]
    hx = torch.stack([values["hx"], values["hx_reverse"]])
    return torch.gru(x, hx, weights + weights_reverse, True, 1, 0.0, False, True, False)


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor
) -> Tensor:
    outputs = []
    sizes = (cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist(), cu_seq_k.diff().tolist())
    parts = (t.split(n) for t, n in zip((query, key, value), sizes, strict=True))
    for rows in zip(*parts, strict=True):
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in rows)
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
        mask = mask.tril(k.size(2) - q.size(2))
        output = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        outputs.append(output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


GRU = {
    "input": (6, 19, 17), "hx": (19, 33),
    "weight_ih": (99, 17), "weight_hh": (99, 33), "bias_ih": (99,), "bias_hh": (99,),
}  # fmt: skip
CELL = GRU | {"input": (19, 17)}
RNN = {
    "input": (6, 19, 17), "hx": (19, 33),
    "weight_ih": (33, 17), "weight_hh": (33, 33), "bias_ih": (33,), "bias_hh": (33,),
}  # fmt: skip
BOTH = GRU | {f"{name}_reverse": shape for name, shape in GRU.items() if name != "input"}
PACKED = GRU | {"input": (29, 17), "hx": (9, 33)}
SUM = {"input": (5, 7, 17), "residual": (5, 7, 17)}
LINEAR = {"input": (5, 17), "weight": (33, 17), "bias": (33,)}
LARGE = {"input": (300, 130), "weight": (140, 130), "bias": (140,)}
LOSS = {"input": (40, 33), "linear_weight": (65, 33), "linear_bias": (65,)}
TARGET = {"target": torch.where(torch.arange(40) % 3 == 0, -100, torch.arange(40) * 7 % 65)}
QKV = {"query": (2, 4, 33, 24), "key": (2, 4, 40, 24), "value": (2, 4, 40, 16)}
GROUPED = QKV | {"key": (2, 2, 40, 24), "value": (2, 2, 40, 16)}
ROWS = {"query": (26, 4, 24), "key": (33, 2, 24), "value": (33, 2, 16)}
SEQUENCES = {"cu_seq_q": torch.tensor([0, 9, 9, 26]), "cu_seq_k": torch.tensor([0, 12, 13, 33])}
MASK = {"attn_mask": torch.arange(33 * 40).view(33, 40) % 7 < 5}

varlen = partial(genkernels.varlen_attn, max_q=17, max_k=20, window_size=(-1, 0), enable_gqa=True)
gru, loss, log_prob = genkernels.gru, genkernels.linear_cross_entropy, genkernels.linear_log_prob
# What follows a dash in a name tells the cases of one op apart.
CASES = {
    "gru": Case(gru, plain_gru, GRU),
    "gru-reverse": Case(gru, plain_gru, GRU, {"reverse": True}),
    "gru-packed": Case(gru, plain_gru, PACKED, {"batch_sizes": torch.tensor([9, 9, 5, 5, 1])}),
    "gru-resets": Case(gru, plain_gru, GRU, {"resets": torch.arange(114).view(6, 19) % 5 == 0}),
    "gru_cell": Case(genkernels.gru_cell, lambda **v: torch.gru_cell(*v.values()), CELL),
    "bidirectional_gru": Case(together, torch_bidirectional_gru, BOTH),
    "rnn": Case(genkernels.rnn, plain_rnn, RNN),
    "dropout": Case(partial(dropout, p=0.4), partial(plain_dropout, p=0.4), SUM),
    "linear": Case(partial(genkernels.linear, activation="gelu"), plain_linear("gelu"), LINEAR),
    "linear-large": Case(genkernels.linear, plain_linear(None), LARGE),
    "linear_cross_entropy": Case(loss, plain_loss, LOSS, TARGET | {"label_smoothing": 0.1}),
    "linear_cross_entropy-none": Case(loss, plain_loss, LOSS, TARGET | {"reduction": "none"}),
    "linear_log_prob": Case(log_prob, plain_log_prob, LOSS, TARGET),
    "varlen_attn": Case(varlen, plain_varlen, ROWS, SEQUENCES),
}
if hasattr(genkernels, ATTENTION):
    attention = getattr(genkernels, ATTENTION)
    sdpa = partial(Case, attention, F.scaled_dot_product_attention)
    CASES |= {
        ATTENTION: sdpa(QKV),
        f"{ATTENTION}-causal": sdpa(QKV, {"is_causal": True, "scale": 1.5}),
        f"{ATTENTION}-added": sdpa(QKV | {"attn_mask": (2, 1, 33, 40)}),
        f"{ATTENTION}-grouped": sdpa(GROUPED, MASK | {"enable_gqa": True, "scale": 1.5}),
    }
EDGES = {
    f"gru-{T, B, I, H}": Case(
        gru,
        plain_gru,
        {"input": (T, B, I), "hx": (B, H), "weight_ih": (3 * H, I), "weight_hh": (3 * H, H)}
        | {"bias_ih": (3 * H,), "bias_hh": (3 * H,)},
    )
    for T, B, I, H in GRU_EDGES
} | {
    f"attention-{B, H, L, S, D}": Case(
        genkernels.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
        {"query": (B, H, L, D), "key": (B, H, S, D), "value": (B, H, S, D)},
        {"is_causal": index % 2 == 0},  # a kernel is compiled for each, and for each head size
    )
    for index, (B, H, L, S, D) in enumerate(ATTENTION_EDGES)
}
# Whose kernels run side by side: many programs of several blocks.
LONG = {
    "gru": CASES["gru"]._replace(
        shapes={"input": (20, 150, 40), "hx": (150, 200), "weight_ih": (600, 40)}
        | {"weight_hh": (600, 200), "bias_ih": (600,), "bias_hh": (600,)}
    ),
    ATTENTION: sdpa(
        {"query": (2, 8, 700, 64), "key": (2, 2, 900, 64), "value": (2, 2, 900, 64)},
        {"is_causal": True, "enable_gqa": True},
    ),
    "linear_cross_entropy": CASES["linear_cross_entropy"]._replace(
        shapes={"input": (500, 200), "linear_weight": (3000, 200), "linear_bias": (3000,)},
        settings={"target": torch.arange(500) * 7 % 3000},
    ),
}
each_op = pytest.mark.parametrize("name", genkernels.ops.__all__)


@pytest.fixture(autouse=True)
def set_up() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    genkernels.stats(reset=True)
    genkernels.backend._warned.clear()
    # PyTorch's own tests, of which ours import a module, forbid to set what is cuDNN's otherwise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    matmul.allow_tf32 = before


def on_device(values: dict[str, Any]) -> dict[str, Any]:
    moved = {name for name, v in values.items() if isinstance(v, Tensor)} - {"batch_sizes"}
    return {name: v.to(DEVICE) if name in moved else v for name, v in values.items()}


def run(function: Callable[..., Any], values: dict[str, Any]) -> tuple[Tensor, ...]:
    """What can be differentiated of the results, which are all where the arguments are."""
    results = function(**values)
    results = (results,) if isinstance(results, Tensor) else results
    assert {result.device.type for result in results} == {DEVICE}
    return tuple(result for result in results if result.is_floating_point())


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The one rule, of three draws. They and the cotangents are made on the CPU. cuDNN's GRU has no
    second derivative, and in evaluation no first."""
    op, plain = (
        lambda function=function, **values: tuple(r.cpu() for r in run(function, on_device(values)))
        for function in (case.op, case.plain)
    )
    draws = [case.draw(dtype, seed) for seed in range(3)]
    # PyTorch's one attention with every gradient
    with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        names = [f"output {i}" for i, _ in enumerate(plain(**draws[0]))]
        assert_op_parity(op, plain, plain, names, *draws)


def runs_triton(op: str, dtype: torch.dtype) -> bool:
    return triton.obstacle(op, torch.device(DEVICE), dtype) is None


def runs_compiled(op: str, dtype: torch.dtype) -> bool:
    return backend._obstacle(op, "cpp", torch.device(DEVICE), dtype) is None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_parity(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype)
    op = name.partition("-")[0]
    if runs_triton(op, dtype):
        assert {backend for _, backend in genkernels.stats()} == {"triton"}
    elif runs_compiled(op, dtype):
        assert {backend for _, backend in genkernels.stats()} == {"cpp"}
    else:
        assert genkernels.stats() == {(op, "reference"): 3}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_edges(name: str, dtype: torch.dtype) -> None:
    check(EDGES[name], dtype)


def with_gradients(case: Case, values: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [values[name].requires_grad_() for name in case.shapes]
    outputs = run(case.op, values)
    total = sum(output.float().square().sum() for output in outputs)
    return *(output.detach() for output in outputs), *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_runs_agree(name: str, dtype: torch.dtype) -> None:
    """Bit by bit: what depends on the order in which programs run is a race."""
    if not runs_triton(name, dtype):
        pytest.skip(f"a Triton kernel of {name}: not in this version")
    first = with_gradients(LONG[name], on_device(LONG[name].draw(dtype)))
    for _ in range(10):
        again = with_gradients(LONG[name], on_device(LONG[name].draw(dtype)))
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("name", LONG)
def test_stream(name: str) -> None:
    """Kernels wait for what was queued on the stream that they are called on, and for no other."""
    case = LONG[name]
    expected = with_gradients(case, on_device(case.draw()))
    source = on_device(case.draw())
    values = {
        name: torch.full_like(value, torch.nan) if name in case.shapes else value
        for name, value in source.items()
    }
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # a twentieth of a second
        for key in case.shapes:
            values[key].copy_(source[key])
        actual = with_gradients(case, values)
        torch.cuda.current_stream().synchronize()
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", ["gru", "gru-packed", ATTENTION])
def test_graph(name: str) -> None:
    """Forward and backward, captured: nothing waits for the device. What it computes again is of
    the values that its arguments have then."""
    case = CASES[name]
    values = on_device(case.draw())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        with_gradients(case, values)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = with_gradients(case, values)
    other = on_device(case.draw(seed=1))
    with torch.no_grad():
        for key in case.shapes:
            values[key].copy_(other[key])
    graph.replay()
    for actual, expected in zip(results, with_gradients(case, other), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", LONG)
def test_second_device(name: str) -> None:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("a second CUDA device: PyTorch sees one")
    case = CASES[name]
    expected = with_gradients(case, on_device(case.draw()))
    values = on_device(case.draw())
    second = {
        name: value.to("cuda:1") if isinstance(value, Tensor) and value.is_cuda else value
        for name, value in values.items()
    }
    actual = with_gradients(case, second)
    assert {tensor.device.index for tensor in actual} == {1}
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def need_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 10**9:
        pytest.skip(f"{gigabytes} GB of GPU memory: {free / 1e9:.0f} are free")


def test_attention_of_many_queries() -> None:
    """More than 2^31 elements: the last queries are as they are alone."""
    need_memory(60)
    last, few = 192, {"key": (1, 1, 4, 128), "value": (1, 1, 4, 128)}
    case = sdpa({"query": (1, 1, last, 128)} | few)
    values = on_device(case.draw(torch.bfloat16))
    query = torch.zeros(1, 1, 2**24 + last, 128, dtype=torch.bfloat16, device=DEVICE)
    query[..., -last:, :] = values["query"]
    output, grad, *_ = with_gradients(case, values | {"query": query})
    expected, expected_grad, *_ = with_gradients(case, values)
    torch.testing.assert_close(output[..., -last:, :], expected)
    torch.testing.assert_close(grad[..., -last:, :], expected_grad)


def test_attention_of_many_keys() -> None:
    """More than 2^31 elements, of which a window has the last alone."""
    need_memory(40)
    last, few = 192, {"query": (1, 1, 4, 128)}
    case = sdpa(few | {"key": (1, 1, last, 128), "value": (1, 1, last, 128)})
    values = on_device(case.draw(torch.bfloat16)) | {"window_size": (last - 5, 0)}
    rows = torch.zeros(2, 1, 1, 2**24 + last, 128, dtype=torch.bfloat16, device=DEVICE)
    rows[..., -last:, :] = torch.stack([values["key"], values["value"]])
    long = dict(zip(("key", "value"), rows.unbind(), strict=True))
    output, *gradients = with_gradients(case, values | long)
    # Programs share out other keys of few: weights are rounded beside another largest score.
    few_results = with_gradients(case, values)
    exact = with_gradients(
        case, {n: v.double() if n in case.shapes else v for n, v in values.items()}
    )
    results = (output, gradients[0], *(g[..., -last:, :] for g in gradients[1:]))
    names = ("output", *(f"grad of {name}" for name in case.shapes))
    for name, *each in zip(names, results, few_results, exact, strict=True):
        assert_parity(name, *(tensor.detach().cpu() for tensor in each))


def test_gru_of_many_elements() -> None:
    """More than 2^31 of a step's gates: the last rows are as those of a small batch."""
    need_memory(40)
    B, H, last = 2**20 + 17, 512, 33
    shapes = {"input": (1, B, 8), "hx": (B, H), "weight_ih": (3 * H, 8), "weight_hh": (3 * H, H)}
    values = {
        name: 0.1 * torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    case = Case(gru, plain_gru, shapes)
    output, _, *gradients = with_gradients(case, dict(values))
    few = {name: value.detach().clone() for name, value in values.items()}
    few |= {"input": few["input"][:, -last:].clone(), "hx": few["hx"][-last:].clone()}
    expected, _, *few_gradients = with_gradients(case, few)
    torch.testing.assert_close(output[:, -last:], expected)
    torch.testing.assert_close(gradients[0][:, -last:], few_gradients[0])
    torch.testing.assert_close(gradients[1][-last:], few_gradients[1])


def test_benchmark_says_where_it_ran() -> None:
    settings = gpu.machine_with(DEVICE)
    for name in ("device", "driver", "revision", "torch", "triton", "cudnn"):
        assert settings[name], name
    assert settings["device"] == torch.cuda.get_device_name()


@each_op
def test_says_what_runs(name: str) -> None:
    op, values = CASES[name].op, on_device(CASES[name].draw())
    explanation = genkernels.explain(name, **values)
    if runs_compiled(name, torch.float32):
        assert (explanation.backend, explanation.reasons["cpp"]) == ("cpp", "runs")
        op(**values)
        assert {each for each, _ in genkernels.stats()} == {"gru_gates_forward"}
        return
    if backend._extension is not None or name not in backend._CUDA_OPS:
        stands = "CUDA kernels" if "gru" in name else f"these are on {DEVICE}"
        assert stands in explanation.reasons["cpp"]
    if runs_triton(name, torch.float32):
        assert explanation.backend == "triton"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            op(**values)
        assert genkernels.stats() == {(RAW_OPS.get(name, f"{name}_forward"), "triton"): 1}
        return
    assert explanation.backend == "reference"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        op(**values)
        op(**values)
    messages = [m for m in (str(w.message) for w in caught) if m.startswith("genkernels.")]
    said = f"genkernels.{name} runs the plain PyTorch reference: {explanation.reasons['triton']}"
    is_said = name in WARNING or backend._extension is None  # that it was not built is said of all
    assert messages == [said] * is_said
    assert genkernels.stats() == {(name, "reference"): 2}
    for other in ("cpp", "triton"):
        refusal = f"genkernels.{name}: backend '{other}' was asked for, but"
        with genkernels.use_backend(other), pytest.raises(RuntimeError, match=refusal):
            op(**values)


@pytest.mark.skipif(
    runs_compiled("gru", torch.float64), reason="a dtype without a kernel: the GRU has all here"
)
@pytest.mark.skipif(backend._extension is None, reason="the extension: not built")
def test_strict() -> None:
    """It is about kernels that are missed, not about PyTorch's own op."""
    made = f"torch.ones(s, device='{DEVICE}', dtype=torch.float64)"  # which Triton does not take
    code = CALL.replace("torch.ones(s)", made)
    code = code.replace("output", "print(genkernels.linear(values[0], values[2]).size())\noutput")
    result = python(code, GENKERNELS_STRICT="1", GENKERNELS_BACKEND="")
    assert "[3, 4, 18]" in result.stdout, result.stderr
    assert "genkernels.gru: GENKERNELS_STRICT is set, and backend 'triton'" in result.stderr


def test_prediction() -> None:
    values = on_device(CASES["linear_log_prob"].draw())
    assert torch.equal(log_prob(**values).prediction, plain_log_prob(**values)[1])


@pytest.mark.skipif(ATTENTION not in CASES, reason=f"{ATTENTION}: not in this version")
def test_dropout() -> None:
    """What is dropped follows from the default generator, wherever the tensors are."""
    values = CASES[ATTENTION].draw(torch.float64)
    torch.manual_seed(0)
    expected = attention(**values, dropout_p=0.4)
    torch.manual_seed(0)
    actual = attention(**on_device(values), dropout_p=0.4)
    torch.testing.assert_close(actual.cpu(), expected)


@each_op
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Dtypes as PyTorch's own op has them; the GRU's are its input's, as on the CPU."""
    case = CASES[name]
    values = on_device(case.draw())
    leaves = [values[name].requires_grad_() for name in case.shapes]
    with torch.autocast(DEVICE, dtype):
        outputs = run(case.op, values)
        expected = values["input"] if name in RECURRENT else run(case.plain, values)[0]
        wide = run(case.op, on_device(case.draw(torch.float64)))
    assert {output.dtype for output in outputs} == {expected.dtype}
    assert {output.dtype for output in wide} == {torch.float64}
    gradients = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), leaves)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_modules_train_as_torch_s() -> None:
    torch.manual_seed(0)
    models = []
    for nn in (torch.nn, genkernels.nn):
        parts = (nn.GRU(5, 8, 2, bidirectional=True), nn.GRUCell(16, 8), nn.Linear(8, 6))
        models.append(torch.nn.Sequential(*parts, torch.nn.Linear(6, 7)).to(DEVICE))
    models[1].load_state_dict(models[0].state_dict())
    fused = genkernels.nn.LinearCrossEntropyLoss(6, 7, bias=True)
    fused.linear = models[1][3]
    criteria = (lambda rows, classes: F.cross_entropy(models[0][3](rows), classes), fused)
    x, target = torch.randn(6, 4, 5).to(DEVICE), torch.tensor([1, 6, -100, 0] * 6).to(DEVICE)
    packed = pack_padded_sequence(x, torch.tensor([3, 6, 1, 4]), enforce_sorted=False)
    losses = []
    for model, criterion in zip(models, criteria, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for input in (x, packed, x):
            output = model[0](input)[0]
            rows = model[2](model[1](output.flatten(0, 1) if input is x else output.data))
            losses.append(criterion(rows, target[: len(rows)]))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert losses[5] < losses[3]
    torch.testing.assert_close(losses[3:], losses[:3])
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize(
    "name", ["gru-reverse", "linear", f"{ATTENTION}-causal", "linear_cross_entropy"]
)
def test_compile(name: str) -> None:
    pytest.importorskip("triton", reason="triton: not installed")
    torch._dynamo.reset()
    check(CASES[name]._replace(op=torch.compile(CASES[name].op, fullgraph=True)))


@pytest.mark.parametrize("name", ["gru", "linear"])
def test_double_backward(name: str) -> None:
    def gradients(function: Callable[..., Any], **values: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.requires_grad_() for value in values.values()]
        total = sum(output.square().sum() for output in run(function, values))
        return torch.autograd.grad(total, leaves, create_graph=True)

    op, plain, *_ = CASES[name]
    check(CASES[name]._replace(op=partial(gradients, op), plain=partial(gradients, plain)))
