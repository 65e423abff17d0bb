"""genkernels.linear_cross_entropy, linear_log_prob and nn.LinearCrossEntropyLoss against
torch.nn.functional.cross_entropy of torch.nn.functional.linear."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from parity import assert_op_parity
from test_gru import DTYPES, assert_bitwise_equal, dtype_id, each_dtype, relaid
from torch import Tensor
from torch.nn import functional as F

import genkernels

module = sys.modules["genkernels.ops.linear_cross_entropy"]
COMPILED = {("linear_cross_entropy_pass", "cpp"): 1}
SETTINGS = ("reduction", "ignore_index", "label_smoothing")
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])

# N, K, V: sizes at the edges of tiles, registers, chains of products and blocks of rows.
SHAPES = [
    (0, 3, 4), (1, 1, 1), (1, 7, 2), (2, 1, 17), (3, 16, 15), (7, 5, 1), (8, 33, 49), (9, 0, 5),
    (17, 31, 48), (31, 48, 47), (33, 17, 129), (63, 65, 16), (129, 8, 97), (257, 19, 33),
    (300, 40, 70), (5, 300, 11), (6, 20, 700), (515, 3, 5),
]  # fmt: skip


def plain(**values: Any) -> Tensor:
    settings = {name: values.pop(name) for name in SETTINGS if name in values}
    logits = F.linear(values["input"], values["linear_weight"], values.get("linear_bias"))
    return F.cross_entropy(logits, values["target"], values.get("weight"), **settings)


def plain_log_prob(**values: Any) -> tuple[Tensor, Tensor]:
    logits = F.linear(values["input"], values["linear_weight"], values.get("linear_bias"))
    log_prob = -F.cross_entropy(logits, values["target"], reduction="none")
    return log_prob, logits.argmax(-1)


def arguments(
    N: int,
    K: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    ignored: bool = False,
    weighted: bool = False,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "input": torch.randn(N, K, generator=generator),
        "linear_weight": scale * torch.randn(V, K, generator=generator) / max(K, 1) ** 0.5,
        "target": torch.randint(V, (N,), generator=generator),
    }
    if bias:
        values["linear_bias"] = torch.randn(V, generator=generator)
    if weighted:
        values["weight"] = torch.rand(V, generator=generator)
    if ignored:
        values["target"][torch.rand(N, generator=generator) < 0.3] = -100
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}


def check(draws: list[dict[str, Any]], **settings: Any) -> None:
    """The one rule for the loss and the gradients of input, linear_weight and linear_bias."""
    fixed = {"weight"}

    def run(function: Any) -> Any:
        def call(**values: Any) -> tuple[Tensor]:
            kept = {k: v.detach() if k in fixed else v for k, v in values.items()}
            loss = function(**kept, **settings)
            # So that every argument has a gradient, the weight's being zero in all three.
            zero = sum(values[name].sum() * 0 for name in fixed if name in values)
            return (loss + zero,)

        return call

    assert_op_parity(
        run(genkernels.linear_cross_entropy), run(plain), run(plain), ("loss",), *draws
    )


def shape_id(shape: tuple[int, ...]) -> str:
    return "N{}-K{}-V{}".format(*shape)


@pytest.fixture(autouse=True)
def counts_from_zero() -> None:
    genkernels.stats(reset=True)


@pytest.fixture(autouse=True)
def small_sizes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel would hand over for speed alone, it computes here."""
    monkeypatch.setattr(module, "LEAST_ROWS", 0)
    monkeypatch.setattr(module, "LEAST_PRODUCTS", 0)


@pytest.mark.usefixtures("poisoned_memory", "compiled_only", "simd", "one_thread")
class TestParity:
    """The one rule, at every SIMD level, in memory full of NaN, in the compiled kernel alone."""

    @each_dtype
    @pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
    def test_shapes(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        for reduction in ("none", "mean", "sum"):
            check([arguments(*shape, dtype, seed=s) for s in range(4)], reduction=reduction)

    @each_dtype
    @each_reduction
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
    def test_settings(
        self, weighted: bool, smoothing: float, reduction: str, dtype: torch.dtype
    ) -> None:
        draws = [
            arguments(37, 21, 53, dtype, ignored=True, weighted=weighted, seed=s) for s in range(4)
        ]
        check(draws, reduction=reduction, label_smoothing=smoothing)

    @each_dtype
    def test_no_bias(self, dtype: torch.dtype) -> None:
        check([arguments(19, 23, 29, dtype, bias=False, seed=s) for s in range(4)])

    @each_dtype
    def test_ignore_index(self, dtype: torch.dtype) -> None:
        check([arguments(19, 23, 29, dtype, seed=s) for s in range(4)], ignore_index=3)

    @each_dtype
    @pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided"])
    def test_strides(self, layout: str, dtype: torch.dtype) -> None:
        draws = [arguments(16, 16, 16, dtype, seed=s) for s in range(4)]
        for draw in draws:
            for name in ("input", "linear_weight", "linear_bias"):
                draw[name] = relaid(draw[name], layout)
        check(draws)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    def test_huge_logits(self, dtype: torch.dtype) -> None:
        draws = [arguments(33, 40, 90, dtype, scale=1e4, seed=s) for s in range(4)]
        check(draws)
        for draw in draws:
            assert genkernels.linear_cross_entropy(**draw).isfinite()

    @each_dtype
    def test_vocabulary(self, dtype: torch.dtype) -> None:
        """Rows so long that they take many chains, and several blocks of them."""
        check([arguments(70, 12, 8011, dtype, seed=s) for s in range(2)])

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("place", ["input", "linear_weight", "linear_bias"])
    def test_nan_spreads(self, place: str, dtype: torch.dtype) -> None:
        values = arguments(11, 9, 30, dtype)
        values[place].view(-1)[3] = float("nan")
        check([values])
        assert genkernels.linear_cross_entropy(**values).isnan()

    @each_dtype
    def test_log_prob(self, dtype: torch.dtype) -> None:
        for shape in ((5, 8, 3), (40, 30, 700), (1, 3, 1), (0, 3, 5)):
            values = arguments(*shape, dtype, scale=5)
            log_prob, prediction = genkernels.linear_log_prob(**values)
            expected = genkernels.linear_cross_entropy(**values, reduction="none")
            assert torch.equal(log_prob, -expected)
            if (
                dtype != torch.bfloat16
            ):  # PyTorch rounds the logits, so that several are the largest
                assert torch.equal(prediction, plain_log_prob(**values)[1])
            assert prediction.dtype == torch.int64


@pytest.mark.usefixtures("simd", "two_threads", "compiled_only")
@each_dtype
@pytest.mark.parametrize("shape", [(600, 70, 900), (40, 130, 2051)], ids=shape_id)
def test_bitwise_reproducible(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """From run to run, and with one thread as with two."""
    values = arguments(*shape, dtype)
    leaves = {k: v.requires_grad_() for k, v in values.items() if v.is_floating_point()}

    def results() -> list[Tensor]:
        loss = genkernels.linear_cross_entropy(**values)
        return [loss, *torch.autograd.grad(loss, list(leaves.values()))]

    first = results()
    for _ in range(3):
        assert_bitwise_equal(results(), first)
    torch.set_num_threads(1)
    assert_bitwise_equal(results(), first)


class TestEdges:
    @each_reduction
    def test_all_ignored(self, reduction: str) -> None:
        values = arguments(6, 5, 7)
        values["target"].fill_(-100)
        values["input"].requires_grad_()
        values["linear_weight"].requires_grad_()
        actual = genkernels.linear_cross_entropy(**values, reduction=reduction)
        torch.testing.assert_close(actual, plain(**values, reduction=reduction), equal_nan=True)
        actual.sum().backward()
        assert not values["input"].grad.any()
        assert not values["linear_weight"].grad.any()
        assert genkernels.stats()["linear_cross_entropy_pass", "cpp"] >= 1

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_targets_that_weigh_nothing(self, smoothing: float) -> None:
        """No ignored ones: their mean is no number, as in PyTorch, and so is its gradient."""
        values = arguments(6, 5, 7, weighted=True)
        values["weight"][values["target"]] = 0
        values["input"].requires_grad_()
        for function in (genkernels.linear_cross_entropy, plain):
            loss = function(**values, label_smoothing=smoothing)
            assert loss.isnan()
            assert not torch.autograd.grad(loss, values["input"])[0].isfinite().any()

    def test_prediction_among_nan(self) -> None:
        values = arguments(2, 5, 33)
        values["linear_bias"][5] = 100
        values["linear_bias"][20:] = float("nan")
        log_prob, prediction = genkernels.linear_log_prob(**values)
        assert log_prob.isnan().all()
        assert prediction.tolist() == plain_log_prob(**values)[1].tolist() == [20, 20]

    def test_one_row_without_a_batch(self) -> None:
        values = arguments(1, 5, 7)
        values |= {"input": values["input"][0], "target": values["target"][0]}
        for reduction in ("none", "mean", "sum"):
            actual = genkernels.linear_cross_entropy(**values, reduction=reduction)
            expected = plain(**values, reduction=reduction)
            assert actual.shape == expected.shape == ()
            torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("target", [7, -1, 2**40])
    def test_target_out_of_range(self, target: int) -> None:
        values = arguments(6, 5, 7)
        values["target"][4] = target
        with pytest.raises(
            IndexError, match=rf"\[0, 7\) or ignore_index \(-100\), got {target} at 4"
        ):
            genkernels.linear_cross_entropy(**values)
        with pytest.raises(IndexError):
            plain(**values)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("linear_weight", torch.ones(7, 4), "input: expected shape"),
            ("target", torch.zeros(5, dtype=torch.int64), "target: expected shape"),
            ("target", torch.zeros(6, dtype=torch.int32), "target: expected int64"),
            ("linear_bias", torch.ones(6), "linear_bias: expected shape"),
            ("weight", torch.ones(8), "weight: expected shape"),
            ("linear_weight", torch.ones(7, 5).double(), "linear_weight: expected input's dtype"),
            ("input", torch.ones(2, 3, 5), "input: expected 1 or 2 dimensions"),
        ],
    )
    def test_wrong_arguments(self, name: str, value: Tensor, message: str) -> None:
        values = arguments(6, 5, 7) | {name: value}
        with pytest.raises(RuntimeError, match=message):
            genkernels.linear_cross_entropy(**values)

    def test_wrong_settings(self) -> None:
        for settings, name in (
            ({"reduction": "max"}, "reduction"),
            ({"label_smoothing": 2}, "label"),
        ):
            with pytest.raises(ValueError, match=name):
                genkernels.linear_cross_entropy(**arguments(6, 5, 7), **settings)


class TestGradients:
    def losses(self) -> Any:
        for reduction, smoothing in itertools.product(("none", "mean", "sum"), (0.0, 0.2)):
            values = arguments(5, 3, 4, torch.float64, ignored=True, weighted=True)
            fixed = {"target": values["target"], "weight": values["weight"]}
            names = ("input", "linear_weight", "linear_bias")

            def loss(*tensors: Tensor, s: Any = (fixed, names, reduction, smoothing)) -> Tensor:
                fixed, names, reduction, smoothing = s
                return genkernels.linear_cross_entropy(
                    **dict(zip(names, tensors, strict=True)),
                    **fixed,
                    reduction=reduction,
                    label_smoothing=smoothing,
                )

            yield loss, [values[name].requires_grad_() for name in names]

    @pytest.mark.usefixtures("simd")
    def test_gradcheck(self) -> None:
        for loss, tensors in self.losses():
            assert torch.autograd.gradcheck(loss, tensors)

    def test_gradgradcheck(self) -> None:
        for loss, tensors in self.losses():
            assert torch.autograd.gradgradcheck(loss, tensors)

    @pytest.mark.parametrize("needs", ["input", "linear_weight", "linear_bias"])
    def test_of_one_argument(self, needs: str) -> None:
        values = arguments(20, 9, 30)
        values[needs].requires_grad_()
        genkernels.linear_cross_entropy(**values).backward()
        actual, values[needs].grad = values[needs].grad, None
        plain(**values).backward()
        torch.testing.assert_close(actual, values[needs].grad)

    def test_factor_and_accumulation(self) -> None:
        """A loss that is multiplied, differentiated twice and added to gradients that are there."""
        values = arguments(20, 9, 30)
        leaves = [v.requires_grad_() for v in values.values() if v.is_floating_point()]
        for function in (genkernels.linear_cross_entropy, plain):
            loss = function(**values)
            loss.backward(retain_graph=True)
            kept = [leaf.grad for leaf in leaves]
            (3 * loss).backward()
            assert all(k is leaf.grad for k, leaf in zip(kept, leaves, strict=True))
            results = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
            if function is plain:
                torch.testing.assert_close(expected, results)  # noqa: F821
            expected = results  # noqa: F841

    def test_retained_gradients_are_the_caller_s(self) -> None:
        values = arguments(20, 9, 30)
        values["linear_weight"].requires_grad_()
        loss = genkernels.linear_cross_entropy(**values)
        (first,) = torch.autograd.grad(loss, values["linear_weight"], retain_graph=True)
        (second,) = torch.autograd.grad(loss, values["linear_weight"])
        assert torch.equal(first, second)
        first.zero_()
        assert second.any()

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_under_checkpointing(self, reduction: str) -> None:
        values = arguments(20, 9, 30)
        weight = values.pop("linear_weight").requires_grad_()

        def loss(weight: Tensor) -> Tensor:
            return genkernels.linear_cross_entropy(
                linear_weight=weight, **values, reduction=reduction
            ).sum()

        kept = torch.utils.checkpoint.checkpoint(loss, weight, use_reentrant=False)
        assert torch.equal(*(torch.autograd.grad(x, weight)[0] for x in (kept, loss(weight))))

    def test_batched(self) -> None:
        values = arguments(20, 9, 30)
        weight = values["linear_weight"].requires_grad_()
        loss = genkernels.linear_cross_entropy(**values)
        factors = torch.tensor([1.0, 2.0])
        (both,) = torch.autograd.grad(
            loss, weight, factors, is_grads_batched=True, retain_graph=True
        )
        (single,) = torch.autograd.grad(loss, weight)
        assert_bitwise_equal(list(both), [single, 2 * single])

    def test_factor_of_bfloat16_gradients(self) -> None:
        """It is not rounded to bfloat16 first."""
        values = arguments(20, 9, 30, torch.bfloat16)
        weight = values["linear_weight"].requires_grad_()
        (plain_gradient,) = torch.autograd.grad(genkernels.linear_cross_entropy(**values), weight)
        values["input"] = values["input"].detach()
        with torch.autocast("cpu", torch.bfloat16):
            loss = genkernels.linear_cross_entropy(**values) * 1.0039
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.equal(gradient, (plain_gradient.float() * 1.0039).bfloat16())

    def test_nothing_without_grad(self) -> None:
        values = arguments(20, 9, 30)
        values["input"].requires_grad_()
        with torch.no_grad():
            assert not genkernels.linear_cross_entropy(**values).requires_grad
        assert genkernels.stats() == COMPILED

    def test_forms_gradients_in_one_pass(self) -> None:
        values = arguments(20, 9, 30)
        values["input"].requires_grad_()
        genkernels.linear_cross_entropy(**values).backward()
        assert genkernels.stats() == COMPILED

    def test_nothing_as_large_as_the_gradients_is_filled(self) -> None:
        """Autograd would hand the backward pass zeros for the gradients' own gradients."""
        values = arguments(20, 9, 30)
        values["linear_weight"].requires_grad_()
        loss = genkernels.linear_cross_entropy(**values)
        with torch.profiler.profile() as profile:
            loss.backward()
        assert not {"aten::zeros", "aten::zero_"} & {event.key for event in profile.key_averages()}

    def test_no_stale_weight(self) -> None:
        module = genkernels.nn.LinearCrossEntropyLoss(9, 30)
        values = arguments(20, 9, 30)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(3):
            loss = module(values["input"], values["target"])
            expected = plain(
                input=values["input"], linear_weight=module.linear.weight, target=values["target"]
            )
            torch.testing.assert_close(loss, expected)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.linear.weight.data.mul_(1.5)


@pytest.mark.parametrize("handed", ["probabilities", "dimensions", "transform"])
def test_handover(handed: str) -> None:
    values = arguments(6, 5, 7, weighted=True)
    if handed == "probabilities":
        values["target"] = torch.rand(6, 7).softmax(-1)
    if handed == "dimensions":
        del values["linear_bias"]
        values["linear_weight"] = torch.randn(7, 2, 5)
        values["target"] = torch.randint(7, (6, 2))
        logits = torch.einsum("nk,vdk->nvd", values["input"], values["linear_weight"])
        expected = F.cross_entropy(logits, values["target"], values["weight"])
    elif handed == "transform":
        rest = {k: v for k, v in values.items() if k != "input"}
        actual, expected = (
            torch.func.grad(lambda x, f=f: f(input=x, **rest))(values["input"])
            for f in (genkernels.linear_cross_entropy, plain)
        )
        torch.testing.assert_close(actual, expected)
        return
    else:
        expected = plain(**values)
    torch.testing.assert_close(genkernels.linear_cross_entropy(**values), expected)
    assert genkernels.stats() == {("linear_cross_entropy", "reference"): 1}
    assert genkernels.explain("linear_cross_entropy", **values).backend == "reference"


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_prob"])
def test_small_sizes_are_handed_over(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for N, K, V, backend in (
        (255, 300, 300, "reference"),
        (256, 16, 16, "reference"),
        (256, 256, 256, "cpp"),
    ):
        values = arguments(N, K, V)
        explanation = genkernels.explain(op, **values)
        assert explanation.backend == backend
        assert f"{N} rows" in explanation.reasons["cpp"] or backend == "cpp"
        genkernels.stats(reset=True)
        getattr(genkernels, op)(**values)
        name = op if backend == "reference" else "linear_cross_entropy_pass"
        assert genkernels.stats() == {(name, backend): 1}


def test_no_gradient_of_the_classes_weight() -> None:
    """As in PyTorch, an error, not a gradient of zero."""
    values = arguments(6, 5, 7, weighted=True)
    values["weight"].requires_grad_()
    for function in (genkernels.linear_cross_entropy, plain):
        with pytest.raises(
            RuntimeError, match="not differentiable with respect to argument 'weight'"
        ):
            function(**values)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("settings", [(0, 0.0), (1, 0.1), (2, 0.5)], ids=str)
def test_reference_of_the_raw_op(settings: tuple[int, float], dtype: torch.dtype) -> None:
    """What devices without a kernel run, by the kernel."""
    values = arguments(20, 9, 30, dtype, ignored=True, weighted=True)
    if dtype == torch.bfloat16:
        values["weight"] = values["weight"].float()
    names = ("input", "linear_weight", "target", "linear_bias", "weight")
    raw = torch.ops.genkernels.linear_cross_entropy_pass.default
    reduction, smoothing = settings
    loss_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    grad_loss = torch.rand(20 if reduction == 0 else (), dtype=loss_dtype)
    call = (
        *(values[n] for n in names),
        grad_loss,
        reduction,
        -100,
        smoothing,
        True,
        True,
        True,
        True,
    )
    actual = raw(*call)
    expected = module._reference(*call)
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    for index in (0, 2, 3, 4):
        torch.testing.assert_close(actual[index], expected[index], **tolerance)
    torch.library.opcheck(raw, call)


def test_autocast() -> None:
    values = arguments(20, 9, 30)
    values["linear_weight"].requires_grad_()
    results = []
    for function in (genkernels.linear_cross_entropy, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(**values)
        loss.backward()
        results.append((loss, values["linear_weight"].grad))
        values["linear_weight"].grad = None
    (actual, gradient), (expected, expected_gradient) = results
    ones = torch.full((30,), 1.0039)  # which bfloat16 does not have
    values["linear_weight"] = torch.zeros(30, 9)
    with torch.autocast("cpu", torch.bfloat16):
        weighted = [
            function(**values, weight=ones, reduction="sum")
            for function in (genkernels.linear_cross_entropy, plain)
        ]
    torch.testing.assert_close(*weighted, rtol=1e-3, atol=0)
    assert actual.dtype == expected.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0.05, atol=0.005)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(genkernels.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    values = arguments(20, 9, 30)
    leaves = [v.requires_grad_() for v in values.values() if v.is_floating_point()]
    results = []
    for function in (compiled, genkernels.linear_cross_entropy):
        loss = function(**values, reduction=reduction)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_graphs_are_for_any_number_of_rows() -> None:
    """Of those that are handed over too: the reason must not write the number down."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(genkernels.linear_cross_entropy, backend=counter, fullgraph=True)
    for rows in range(20, 32):
        compiled(**arguments(rows, 9, 30))
    assert counter.frame_count <= 2


class TestModule:
    @pytest.mark.skipif(
        not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch < 2.13 has no such module"
    )
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    def test_is_torch_s(self, bias: bool) -> None:
        weight = torch.rand(30)
        modules = []
        for kind in (genkernels.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss):
            torch.manual_seed(0)
            modules.append(kind(9, 30, bias=bias, weight=weight, label_smoothing=0.1))
        ours, theirs = modules
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        values = arguments(20, 9, 30, ignored=True)
        torch.testing.assert_close(
            ours(values["input"], values["target"]), theirs(values["input"], values["target"])
        )

    def test_wrong_arguments(self) -> None:
        for settings in ({"weight": torch.ones(3)}, {"reduction": "?"}, {"label_smoothing": -1}):
            with pytest.raises(ValueError, match=next(iter(settings))):
                genkernels.nn.LinearCrossEntropyLoss(9, 30, **settings)
