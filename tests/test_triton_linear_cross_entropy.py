"""The Triton kernels of linear_cross_entropy in Triton's interpreter, through the public ops."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parity import assert_op_parity
from test_gru import assert_bitwise_equal, dtype_id, relaid, with_gradients
from test_linear_cross_entropy import arguments, check, module, plain, plain_log_prob, shape_id
from torch import Tensor

import genkernels
from genkernels import triton

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not triton.IS_INTERPRETED, reason="TRITON_INTERPRET=1: not set (make triton-check sets it)"
    ),
]
if triton.IS_INTERPRETED:
    kernels = importlib.import_module("genkernels.triton.linear_cross_entropy")

# The interpreter multiplies bfloat16's bit patterns.
DTYPES = (torch.float32, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
# N, K, V: at the edges of blocks of 64 and 128 rows and classes, and of 16 to 64 features.
SHAPES = [
    (1, 1, 1), (2, 3, 7), (7, 16, 2), (15, 33, 17), (17, 15, 31), (33, 64, 65), (64, 2, 127),
    (65, 129, 64), (129, 31, 3), (3, 65, 129),
]  # fmt: skip
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
PASS = ("linear_cross_entropy_pass", "triton")


@pytest.fixture(autouse=True)
def triton_only() -> Iterator[None]:
    genkernels.stats(reset=True)
    with genkernels.use_backend("triton"):
        yield
    assert {backend for _, backend in genkernels.stats(reset=True)} == {"triton"}


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one tile of classes, and programs that have several."""
    monkeypatch.setattr(kernels, "SCRATCH", 1)
    monkeypatch.setattr(kernels, "LEAST_PROGRAMS", 1)
    monkeypatch.setattr(kernels, "LEAST_SPLITS", 2)


def draws(*shape: int, count: int = 2, **options: Any) -> list[dict[str, Any]]:
    return [arguments(*shape, **options, seed=seed) for seed in range(count)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    reduction = ("none", "mean", "sum")[sum(shape) % 3]
    check(draws(*shape, dtype=dtype), reduction=reduction)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("sizes", [(2, 3, 17), (17, 2, 3), (3, 17, 2)], ids=str)
def test_every_size(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """In each of the three places."""
    for place, size in itertools.product(range(3), SIZES):
        shape = [size if i == place else other for i, other in enumerate(sizes)]
        for reduction in ("none", "mean", "sum"):
            check(draws(*shape, count=4, dtype=dtype), reduction=reduction)


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_settings(weighted: bool, smoothing: float, dtype: torch.dtype) -> None:
    for reduction in ("none", "mean", "sum"):
        drawn = draws(17, 11, 33, dtype=dtype, ignored=True, weighted=weighted)
        check(drawn, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.usefixtures("few_at_a_time", "poisoned_memory")
@each_dtype
@each_reduction
def test_chunks(reduction: str, dtype: torch.dtype) -> None:
    drawn = draws(9, 20, 300, dtype=dtype, ignored=True, weighted=True)
    check(drawn, reduction=reduction, label_smoothing=0.1)


@each_dtype
def test_no_bias_and_ignore_index(dtype: torch.dtype) -> None:
    check(draws(19, 23, 29, dtype=dtype, bias=False), ignore_index=3)


@pytest.mark.usefixtures("few_at_a_time")
@each_dtype
def test_log_prob(dtype: torch.dtype) -> None:
    def op(**values: Tensor) -> tuple[Tensor]:
        return (genkernels.linear_log_prob(**values).log_prob,)

    def expected(**values: Tensor) -> tuple[Tensor]:
        return plain_log_prob(**values)[:1]

    drawn = draws(20, 30, 300, dtype=dtype, scale=5)
    assert_op_parity(op, expected, expected, ("log_prob",), *drawn)
    for values in drawn:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
        actual = genkernels.linear_log_prob(**values)
        assert torch.equal(actual.prediction, plain_log_prob(**wide)[1])
        loss = genkernels.linear_cross_entropy(**values, reduction="none")
        assert torch.equal(actual.log_prob, -loss)


@pytest.mark.usefixtures("few_at_a_time")
def test_prediction_among_equals_and_nan() -> None:
    values = arguments(3, 5, 700)
    values["linear_weight"].zero_()
    values["linear_bias"].fill_(-torch.inf)
    assert genkernels.linear_log_prob(**values).prediction.tolist() == [0, 0, 0]
    values["linear_bias"][[150, 151, *range(200, 700, 50)]] = 2.0  # of one range, and of several
    assert genkernels.linear_log_prob(**values).prediction.tolist() == [150, 150, 150]
    values["linear_bias"][[333, 699]] = torch.nan
    log_prob, prediction = genkernels.linear_log_prob(**values)
    assert log_prob.isnan().all()
    assert prediction.tolist() == plain_log_prob(**values)[1].tolist() == [333, 333, 333]


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_huge_logits(smoothing: float) -> None:
    drawn = draws(33, 40, 300, scale=1e4)
    check(drawn, label_smoothing=smoothing)
    for draw in drawn:
        assert genkernels.linear_cross_entropy(**draw, label_smoothing=smoothing).isfinite()


@pytest.mark.usefixtures("few_at_a_time")
def test_classes_that_cannot_be() -> None:
    """Whole tiles whose logits are all -inf."""
    drawn = draws(5, 6, 300)
    for draw in drawn:
        draw["linear_bias"][:130] = -torch.inf
        draw["target"].fill_(140)
    check(drawn, reduction="none")


@each_reduction
def test_all_ignored(reduction: str) -> None:
    values = arguments(6, 5, 7)
    values["target"].fill_(-100)
    loss, *gradients = with_gradients(
        lambda **v: (genkernels.linear_cross_entropy(**v, reduction=reduction),), values
    )
    torch.testing.assert_close(loss, plain(**values, reduction=reduction), equal_nan=True)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_that_weigh_nothing(smoothing: float) -> None:
    values = arguments(6, 5, 7, weighted=True)
    values["weight"][values["target"]] = 0
    values["input"].requires_grad_()
    loss = genkernels.linear_cross_entropy(**values, label_smoothing=smoothing)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, values["input"])[0].isfinite().any()


@pytest.mark.parametrize("target", [7, -1, 2**40])
def test_target_out_of_range(target: int) -> None:
    """Nothing waits for the device to find it: its row is no number."""
    values = arguments(6, 5, 7, weighted=True)
    values["target"][4] = target
    values["input"].requires_grad_()
    assert genkernels.linear_cross_entropy(**values).isnan()
    losses = genkernels.linear_cross_entropy(**values, reduction="none")
    [gradient] = torch.autograd.grad(losses, values["input"], torch.ones(6))
    for rows in (losses, *gradient.unbind(1)):
        assert rows.isnan().tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided"])
def test_strides(layout: str) -> None:
    drawn = draws(16, 16, 16)
    for draw in drawn:
        for name in ("input", "linear_weight", "linear_bias"):
            draw[name] = relaid(draw[name], layout)
    check(drawn)


@pytest.mark.slow
def test_rows_past_2_to_the_31() -> None:
    """Of each row but a page is touched."""
    values = arguments(5, 3, 600)
    far = torch.empty(600 << 22).as_strided((600, 3), (1 << 22, 1))
    far.copy_(values["linear_weight"])
    expected = genkernels.linear_log_prob(**values)
    actual = genkernels.linear_log_prob(**(values | {"linear_weight": far}))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("place", ["input", "linear_weight", "linear_bias"])
def test_nan_spreads(place: str) -> None:
    values = arguments(11, 9, 140)
    values[place].view(-1)[3] = torch.nan
    check([values], reduction="none")


@each_reduction
@pytest.mark.parametrize("shape", [(0, 3, 4), (9, 0, 5)], ids=shape_id)
def test_nothing_to_multiply(shape: tuple[int, int, int], reduction: str) -> None:
    check([arguments(*shape)], reduction=reduction)


def test_one_row_without_a_batch() -> None:
    values = arguments(1, 5, 7)
    values |= {"input": values["input"][0], "target": values["target"][0]}
    check([values])


@each_dtype
def test_runs_agree(dtype: torch.dtype) -> None:
    values = arguments(70, 20, 300, dtype)

    def op(**v: Tensor) -> tuple[Tensor]:
        return (genkernels.linear_cross_entropy(**v),)

    assert_bitwise_equal(with_gradients(op, values), with_gradients(op, values))


def test_double_backward() -> None:
    def gradients(function: Any) -> Any:
        def call(**values: Tensor) -> tuple[Tensor, ...]:
            loss = function(**values).square()
            leaves = [values[n] for n in ("input", "linear_weight", "linear_bias")]
            return torch.autograd.grad(loss, leaves, create_graph=True)

        return call

    op, expected = gradients(genkernels.linear_cross_entropy), gradients(plain)
    names = ("grad_input", "grad_linear_weight", "grad_linear_bias")
    assert_op_parity(op, expected, expected, names, *draws(5, 6, 7))


def test_small_gradients_of_float16_are_kept() -> None:
    """Where the loss is scaled, as by a GradScaler: formed without the scale most are zero."""
    values = arguments(20, 5, 60, torch.float16)
    values["input"] *= 2.0**-14
    wide = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    gradients = []
    for function, given in ((genkernels.linear_cross_entropy, values), (plain, wide)):
        weight = given["linear_weight"].requires_grad_()
        gradients.append(torch.autograd.grad(function(**given) * 2.0**14, weight)[0].double())
    torch.testing.assert_close(*gradients, rtol=0.01, atol=1e-4)


def test_one_gradient() -> None:
    for needed in ("input", "linear_weight", "linear_bias"):
        values = arguments(20, 9, 30)
        leaf = values[needed].requires_grad_()
        [actual] = torch.autograd.grad(genkernels.linear_cross_entropy(**values), leaf)
        torch.testing.assert_close(actual, torch.autograd.grad(plain(**values), leaf)[0])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("settings", [(0, 0.0), (1, 0.1), (2, 0.5)], ids=str)
@each_dtype
def test_raw_op(settings: tuple[int, float], dtype: torch.dtype) -> None:
    """All results are those of the reference, and as the fake says."""
    values = arguments(20, 9, 30, dtype, ignored=True, weighted=True)
    values["weight"] = values["weight"].float()
    names = ("input", "linear_weight", "target", "linear_bias", "weight")
    grad_loss = torch.rand(20 if settings[0] == 0 else ())
    call = (*(values[n] for n in names), grad_loss, settings[0], -100, settings[1])
    tolerance = {"rtol": 0.01, "atol": 0.01} if dtype == torch.float16 else {}
    for flags in ([True] * 4, *(torch.eye(4) > 0).tolist()):
        actual = torch.ops.genkernels.linear_cross_entropy_pass(*call, *flags)
        expected, fake = (f(*call, *flags) for f in (module._reference, module._fake))
        for one, other, like in zip(actual, expected, fake, strict=True):
            assert (one.shape, one.dtype) == (like.shape, like.dtype)
            torch.testing.assert_close(one, other, **tolerance)


def test_raw_op_reads_within_bounds() -> None:
    """A raw call has no check in front: each tensor cut short, or of another dtype, must raise."""
    tensors: list[Any] = [*arguments(6, 5, 7, weighted=True).values()]
    names = ("input", "linear_weight", "target", "linear_bias", "weight")
    assert list(arguments(6, 5, 7, weighted=True)) == list(names)
    rest = (0, -100, 0.0, False, False, False, False)
    full = [*tensors, torch.ones(6)]
    torch.ops.genkernels.linear_cross_entropy_pass(*full, *rest)
    for index, value in enumerate(full):
        for wrong in (value[..., :-1], value.bfloat16()):
            given = (*full[:index], wrong, *full[index + 1 :], *rest)
            with pytest.raises(RuntimeError, match="expected"):
                torch.ops.genkernels.linear_cross_entropy_pass(*given)
    with pytest.raises(RuntimeError, match="a class"):
        torch.ops.genkernels.linear_cross_entropy_pass(full[0], full[1][:0], *full[2:], *rest)


class TestBackend:
    """Of this op, where Triton's kernel stands beside a handover."""

    def test_few_rows_are_not_handed_over(self) -> None:
        values = arguments(2, 5, 7)
        for requested in ("triton", None):
            with genkernels.use_backend(requested):
                for op in ("linear_cross_entropy", "linear_log_prob"):
                    getattr(genkernels, op)(**values)
                    assert genkernels.explain(op, **values).backend == "triton"
        assert genkernels.stats() == {PASS: 4}

    @pytest.mark.parametrize("handed", ["probabilities", "dimensions", "weight"])
    def test_what_the_kernel_does_not_serve_is(self, handed: str) -> None:
        values = arguments(6, 5, 7, weighted=handed == "weight")
        if handed == "probabilities":
            values["target"] = torch.rand(6, 7).softmax(-1)
        elif handed == "dimensions":
            del values["linear_bias"]
            values |= {"linear_weight": torch.rand(7, 2, 5), "target": torch.ones(6, 2).long()}
        else:
            values["weight"].requires_grad_()
        explanation = genkernels.explain("linear_cross_entropy", **values)
        assert explanation.backend == "reference"
        assert explanation.reasons["triton"] == module._handover(**values)
        if handed != "weight":  # which PyTorch's own does not differentiate, and says so
            genkernels.linear_cross_entropy(**values)
            assert genkernels.stats(reset=True) == {("linear_cross_entropy", "reference"): 1}
        genkernels.linear_cross_entropy(**arguments(6, 5, 7))

    def test_other_dtypes(self) -> None:
        values = arguments(6, 5, 7, torch.float64)
        with pytest.raises(RuntimeError, match="'triton' was asked for, but it has no kernel"):
            genkernels.linear_cross_entropy(**values)
        genkernels.linear_cross_entropy(**arguments(6, 5, 7))
