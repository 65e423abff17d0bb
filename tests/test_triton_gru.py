"""The Triton kernels of the GRU in Triton's interpreter, through the public ops. Those of
`make triton-check`, of which test_triton.py runs a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_op_parity
from test_gru import arguments as gru_arguments
from test_gru import dtype_id, packed_arguments, plain_gru, relaid
from torch import Tensor

import genkernels
from genkernels import triton

pytestmark = pytest.mark.skipif(
    not triton.IS_INTERPRETED, reason="TRITON_INTERPRET=1: not set (make triton-check sets it)"
)

# The interpreter multiplies bfloat16's bit patterns.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
OUTPUTS = ("output", "h_n")
# T, B, I, H: at the edges of tiles of 16 rows, of which float32 has a quarter, and of 16, 32 and 64
# units.
SHAPES = [
    (1, 1, 1, 1),
    (3, 15, 2, 15),
    (2, 16, 5, 16),
    (2, 17, 1, 17),
    (4, 1, 4, 31),
    (2, 2, 3, 32),
    (1, 33, 1, 33),
    (2, 4, 3, 48),
    (2, 5, 2, 63),
    (1, 3, 3, 64),
    (2, 2, 3, 65),
    (1, 3, 2, 100),
    (1, 2, 3, 127),
    (1, 1, 3, 128),
]
# At the edges of blocks of 16 and 32 rows, 32 units, 32 and 64 products.
STEP_SHAPES = [(1, 1, 1, 1), (2, 16, 3, 31), (1, 17, 2, 32), (1, 33, 3, 33), (2, 3, 2, 65)]


@pytest.fixture(autouse=True)
def triton_only():
    genkernels.stats(reset=True)
    yield
    calls = genkernels.stats(reset=True)
    if ("gru_backward", "triton") in calls:
        calls.pop(("gru_backward", "reference"), None)  # the double backward
    assert {backend for _, backend in calls} == {"triton"}


@pytest.fixture(params=["sequence", "steps"])
def launches(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """One launch for all steps, where sizes are as on sm_90, or one for each."""
    launch_by(request.param, monkeypatch)
    return request.param


def launch_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from genkernels.triton import gru as kernels

    monkeypatch.setattr(kernels, "architecture_of", lambda _: "sm_90")
    if way == "steps":
        monkeypatch.setattr(kernels, "resident_limit", lambda *_: 0)
    other = "_forward_step" if way == "sequence" else "_forward_sequence"
    monkeypatch.setattr(kernels, other, None)


def check(*draws, **options) -> None:
    def plain(**v: Tensor) -> tuple[Tensor, ...]:
        return plain_gru(**v, **options)

    assert_op_parity(
        lambda **v: tuple(genkernels.gru(**v, **options)), plain, plain, OUTPUTS, *draws
    )


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch) -> None:
    launch_by("sequence", monkeypatch)
    T, B, I, H = shape
    rows = -(-B // 4) if dtype == torch.float32 else B
    check(*(gru_arguments(T, rows, I, H, dtype, seed=seed) for seed in range(2 if H < 15 else 1)))


@each_dtype
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
def test_parity_of_steps(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch) -> None:
    launch_by("steps", monkeypatch)
    check(*(gru_arguments(*shape, dtype, seed=seed) for seed in range(2 if shape[3] < 15 else 1)))


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize(
    ("B", "H"),
    [(B, 33) for B in (1, 4, 15, 16, 17, 33)]
    + [(5, H) for H in (1, 15, 16, 17, 31, 32, 48, 63, 64, 65, 96, 97, 128, 129, 191, 192, 193)],
)
def test_every_size(B: int, H: int, dtype: torch.dtype) -> None:
    resets = torch.rand(3, B, generator=torch.Generator().manual_seed(0)) < 0.4
    check(gru_arguments(3, B, 2, H, dtype), resets=resets, reverse=bool(B % 2))


@pytest.mark.slow
@pytest.mark.parametrize("H", [130, 192])
def test_largest_weights_on_the_chip(H: int, monkeypatch) -> None:
    """Those that an H100 holds in 16 bits and smaller GPUs do not."""
    launch_by("sequence", monkeypatch)
    check(gru_arguments(2, 17, 3, H, torch.float16))


@each_dtype
def test_both_ways_of_launching_agree(dtype: torch.dtype, monkeypatch) -> None:
    resets = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) < 0.4

    def by(way: str) -> Any:
        def run(**values: Tensor) -> tuple[Tensor, ...]:
            with monkeypatch.context() as patch:
                launch_by(way, patch)
                return tuple(genkernels.gru(**values, resets=resets))

        return run

    def exact(**values: Tensor) -> tuple[Tensor, ...]:
        return plain_gru(**values, resets=resets)

    draw = gru_arguments(3, 3, 4, 33, dtype)
    assert_op_parity(by("sequence"), by("steps"), exact, OUTPUTS, draw)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_without_biases(reverse: bool, launches: str) -> None:
    check(gru_arguments(2, 3, 4, 5, bias=False), reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_resets(reverse: bool, launches: str) -> None:
    resets = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    check(gru_arguments(4, 5, 3, 5), resets=resets, reverse=reverse)


@each_dtype
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed(reverse: bool, dtype: torch.dtype) -> None:
    values = packed_arguments([17, 16, 16, 1], 4, 20, dtype)
    sizes = values.pop("batch_sizes")
    check(values, batch_sizes=sizes, reverse=reverse)


@each_dtype
def test_cell(dtype: torch.dtype) -> None:
    values = gru_arguments(1, 5, 5, 34, dtype)
    values["input"] = values["input"][0]
    assert_op_parity(
        lambda **v: (genkernels.gru_cell(**v),),
        lambda **v: (torch.gru_cell(*v.values()),),
        lambda **v: (torch.gru_cell(*v.values()),),
        ("h",),
        values,
    )


@pytest.mark.parametrize("loss", ["output", "h_n"])
def test_double_backward(loss: str, launches: str) -> None:
    """Which needs the states' gradients; of the last state alone, there is none of the output."""

    def gradients(op: Any) -> Any:
        def run(**leaves: Tensor) -> tuple[Tensor, ...]:
            result = dict(zip(OUTPUTS, op(**leaves), strict=True))[loss].sin().sum()
            return torch.autograd.grad(result, tuple(leaves.values()), create_graph=True)

        return run

    draw = gru_arguments(2, 2, 3, 5)
    names = tuple(f"grad of {name}" for name in draw)
    plain = gradients(plain_gru)
    assert_op_parity(gradients(genkernels.gru), plain, plain, names, draw)


def test_saved_and_recomputed_gates_give_the_same(launches: str) -> None:
    values = gru_arguments(4, 3, 5, 18)
    gradients = []
    for recompute in (False, True):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        output, h_n = genkernels.gru(**leaves, recompute=recompute)
        loss = output.square().sum() + h_n.sum()
        gradients.append(torch.autograd.grad(loss, tuple(leaves.values())))
    assert all(map(torch.equal, *gradients))


def test_both_directions() -> None:
    module, twin = (cls(3, 5, 2, bidirectional=True) for cls in (genkernels.nn.GRU, torch.nn.GRU))
    twin.load_state_dict(module.state_dict())
    input = torch.randn(3, 2, 3)
    results = module(input), twin(input)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    for output, _ in results:
        output.square().sum().backward()
    for actual, expected in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_nan_spreads_in_its_row_alone(launches: str) -> None:
    values = gru_arguments(3, 4, 5, 18)
    values["input"][1, 2, 0] = torch.nan
    output, h_n = genkernels.gru(**values)
    assert output[1:, 2].isnan().all()
    assert h_n[2].isnan().all()
    is_other = torch.arange(4) != 2
    assert output[:, is_other].isfinite().all()
    assert output[0].isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided"])
def test_strides(layout: str, launches: str) -> None:
    """Biases too, which a kernel reads as they lie."""
    check({name: relaid(value, layout) for name, value in gru_arguments(2, 3, 8, 5).items()})


def test_reset_stops_nan(launches: str) -> None:
    values = gru_arguments(3, 3, 5, 18)
    values["hx"].fill_(torch.nan)
    resets = torch.zeros(3, 3, dtype=torch.bool)
    resets[0] = True
    output, _ = genkernels.gru(**values, resets=resets)
    assert torch.equal(output, genkernels.gru(**{**values, "hx": torch.zeros(3, 18)})[0])


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_zero_sizes(shape: tuple[int, ...], launches: str) -> None:
    check(gru_arguments(*shape))


@pytest.mark.parametrize("op", ["gru_forward", "gru_backward"])
def test_raw_op_reads_within_bounds(op: str) -> None:
    """A raw call has no check in front: each tensor cut short, or of another dtype, must raise."""
    saved, options = (torch.zeros(3, 4, 6), torch.zeros(3, 4, 24)), (None, None, False, True)
    full: list[Any] = [*gru_arguments(3, 4, 5, 6).values(), *options, None]
    if op == "gru_backward":
        full = [*saved[:1], torch.zeros(4, 6), *full[:6], *saved, *options, True, True]
    raw = getattr(torch.ops.genkernels, op)
    raw(*full)
    for index, value in enumerate(full):
        if isinstance(value, torch.Tensor):
            for wrong in (value[..., :-1], value.half()):
                with pytest.raises(RuntimeError, match="expected"):
                    raw(*full[:index], wrong, *full[index + 1 :])


@pytest.mark.parametrize("sizes", [[4, 2, 4], [3, 3, 3], [5, 4, 1], [4, 4, 1]], ids=str)
def test_rejects_batch_sizes(sizes: list[int]) -> None:
    """Sizes that rise, do not begin with hx's, or do not add up to input's rows."""
    values = packed_arguments([4, 3, 3], 5, 6, torch.float32)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        genkernels.gru(**{**values, "batch_sizes": torch.tensor(sizes)})


def test_no_steps() -> None:
    with pytest.raises(RuntimeError, match="sequence length"):
        genkernels.gru(**gru_arguments(0, 3, 5, 18))


def test_no_rows() -> None:
    shape = (2, 0, 5, 18)
    values = gru_arguments(*shape)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    output, h_n = genkernels.gru(**leaves)
    assert output.shape == (*shape[:2], shape[3])
    assert torch.equal(h_n, values["hx"])
    gradients = torch.autograd.grad(output.sum() + h_n.sum(), tuple(leaves.values()))
    assert torch.equal(gradients[1], torch.ones_like(values["hx"]))
    for index in (0, 2, 3, 4, 5):
        assert not gradients[index].any()
