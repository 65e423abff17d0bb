"""genkernels.gru_cell: one fused step against torch.gru_cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_op_parity, assert_parity
from test_gru import (
    DTYPES,
    TENSORS,
    arguments,
    assert_bitwise_equal,
    dtype_id,
    each_dtype,
    relaid,
    with_gradients,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import genkernels
from genkernels import reference

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129)
SHAPES = [(SIZES[(3 * i + 1) % 14], SIZES[(5 * i + 4) % 14], SIZES[i]) for i in range(14)]


def cell_arguments(
    batch: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    values = arguments(1, batch, input_size, hidden_size, dtype, **options)
    return {**values, "input": values["input"][0]}


def as_tuple(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *tensors, **named: (function(*tensors, **named),)


def plain_gru_cell(**values: Tensor) -> Tensor:
    return torch.gru_cell(*values.values())  # its keywords are w_ih, b_ih, ...


def check(dtype: torch.dtype, draw: Callable[[int], dict[str, Any]]) -> None:
    assert_op_parity(
        as_tuple(genkernels.gru_cell),
        as_tuple(plain_gru_cell),
        as_tuple(reference.gru_cell),
        ("h",),
        *map(draw, range(4 if dtype == torch.float64 else 1)),
    )


def shape_id(shape: tuple[int, ...]) -> str:
    return "B{}-I{}-H{}".format(*shape)


@pytest.mark.usefixtures("poisoned_memory", "compiled_only", "simd", "one_thread")
class TestParity:
    @each_dtype
    @pytest.mark.parametrize("shape", [*SHAPES, (5, 300, 270), (300, 64, 96)], ids=shape_id)
    def test_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check(dtype, lambda seed: cell_arguments(*shape, dtype, seed=seed))

    @each_dtype
    def test_no_bias(self, dtype: torch.dtype) -> None:
        check(dtype, lambda seed: cell_arguments(19, 17, 33, dtype, bias=False, seed=seed))

    @each_dtype
    @pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided", "scalar"])
    def test_strides(self, layout: str, dtype: torch.dtype) -> None:
        check(
            dtype,
            lambda seed: {
                name: relaid(value, layout)
                for name, value in cell_arguments(6, 16, 24, dtype, seed=seed).items()
            },
        )

    @each_dtype
    @pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=shape_id)
    def test_zero_sizes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check(dtype, lambda seed: cell_arguments(*shape, dtype, seed=seed))

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("place", TENSORS)
    def test_special_values_spread(self, place: str, value: float, dtype: torch.dtype) -> None:
        values = cell_arguments(10, 9, 18, dtype)
        index = (2, 5) if place in ("input", "hx") else (20, 3)
        values[place][index[: values[place].dim()]] = value
        check(dtype, lambda seed: values)


def test_is_one_step_of_gru() -> None:
    """Both ops run the same kernel: a sequence of cells is the sequence, bit for bit, where a cell
    has more rows than it multiplies without packing."""
    values = arguments(4, 35, 17, 33)
    h = values["hx"]
    for x in values["input"]:
        h = genkernels.gru_cell(x, h, *list(values.values())[2:])
    assert torch.equal(h, genkernels.gru(**values)[1])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradcheck(bias: bool) -> None:
    values = cell_arguments(2, 3, 2, torch.float64, bias=bias)
    leaves = tuple(value.requires_grad_() for value in values.values())
    assert gradcheck(genkernels.gru_cell, leaves, check_batched_grad=True)
    assert gradgradcheck(genkernels.gru_cell, leaves)


@pytest.mark.parametrize("needs", TENSORS)
def test_one_gradient_alone(needs: str) -> None:
    values = cell_arguments(9, 7, 18)
    expected = with_gradients(as_tuple(genkernels.gru_cell), values)[1 + TENSORS.index(needs)]

    def only(**leaf: Tensor) -> tuple[Tensor]:
        others = {name: value for name, value in values.items() if name != needs}
        return (genkernels.gru_cell(**others, **leaf),)

    assert torch.equal(with_gradients(only, {needs: values[needs]})[1], expected)


def test_per_sample_gradients() -> None:
    input, hx, *weights = cell_arguments(4, 5, 6).values()

    def loss(input: Tensor, hx: Tensor, weight_ih: Tensor) -> Tensor:
        return genkernels.gru_cell(input[None], hx[None], weight_ih, *weights[1:]).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss, argnums=2), (0, 0, None))(input, hx, weights[0])
    expected = []
    for b in range(4):
        leaf = weights[0].clone().requires_grad_()
        expected += torch.autograd.grad(loss(input[b], hx[b], leaf), leaf)
    assert_bitwise_equal([actual], [torch.stack(expected)])


def test_vmap() -> None:
    draws = [cell_arguments(4, 5, 6, seed=seed) for seed in range(3)]
    actual = torch.func.vmap(genkernels.gru_cell)(
        *(torch.stack([draw[name] for draw in draws]) for name in TENSORS)
    )
    expected = torch.stack([plain_gru_cell(**draw) for draw in draws])
    exact = torch.stack(
        [reference.gru_cell(**{k: v.double() for k, v in draw.items()}) for draw in draws]
    )
    assert_parity("h", actual, expected, exact)


def test_jvp_raises() -> None:
    values = tuple(cell_arguments(4, 5, 6).values())
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(genkernels.gru_cell, values, tuple(map(torch.ones_like, values)))


def test_autocast() -> None:
    values = cell_arguments(7, 17, 33)
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(as_tuple(genkernels.gru_cell), values)
    narrow = {name: value.bfloat16() for name, value in values.items()}
    expected = with_gradients(as_tuple(genkernels.gru_cell), narrow)
    assert {tensor.dtype for tensor in actual} == {torch.float32}
    assert_bitwise_equal(actual, [tensor.float() for tensor in expected])


def test_compile() -> None:
    torch._dynamo.reset()
    function = as_tuple(genkernels.gru_cell)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 4, 9):
        values = cell_arguments(batch, 6, 8)
        assert_bitwise_equal(with_gradients(compiled, values), with_gradients(function, values))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("input", lambda t: t[None], [r"\[1, 4, 5\]"]),
        ("input", lambda t: t[:3], [r"\[3, 5\]", r"\[4, 5\]"]),
        ("hx", lambda t: t[0], [r"\[6\]"]),
        ("weight_ih", lambda t: t[:, :4], [r"\[18, 4\]", r"\[18, 5\]"]),
        ("weight_hh", lambda t: t.t(), [r"\[6, 18\]", r"\[18, 6\]"]),
        ("bias_ih", lambda t: t[:-1], [r"\[17\]", r"\[18\]"]),
        ("hx", lambda t: t.double(), ["float64", "float32"]),
    ],
    ids=["input_3d", "batch", "hx_1d", "weight_ih", "weight_hh", "bias_ih", "hx_dtype"],
)
def test_errors(name: str, change: Callable[[Tensor], Any], words: list[str]) -> None:
    """As torch.gru_cell a RuntimeError, and it says which argument and what shapes."""
    values = cell_arguments(4, 5, 6)
    values[name] = change(values[name])
    with pytest.raises(RuntimeError):
        plain_gru_cell(**values)
    with pytest.raises(RuntimeError, match=name) as caught:
        genkernels.gru_cell(**values)
    for word in words:
        assert caught.match(word)
