"""The Triton kernels of attention in Triton's interpreter, through the public op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_op_parity
from test_attention import LOWER_RIGHT, OUTPUTS, TENSORS, arguments, each_causal, op, plain
from test_gru import assert_bitwise_equal, dtype_id, with_gradients

import genkernels
from genkernels import backend, triton
from genkernels.ops.attention import unbind_heads

pytestmark = pytest.mark.skipif(
    not triton.IS_INTERPRETED, reason="TRITON_INTERPRET=1: not set (make triton-check sets it)"
)
if triton.IS_INTERPRETED:
    from genkernels.triton.attention import KERNELS

    library = torch.library.Library("genkernels", "IMPL")

    def register(name: str) -> None:
        def launch(*args: Any) -> Any:
            backend.count(name, "triton")
            return KERNELS[name](*args)

        library.impl(name, launch, "CPU", allow_override=True)

    for name in KERNELS:
        register(name)

# The interpreter multiplies bfloat16's bit patterns.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
# B, H, L, S, D: at the edges of blocks of 64 and 128 rows, and of 32 and 64 columns.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 2, 3, 7),
    (1, 3, 15, 16, 16),
    (1, 1, 17, 33, 31),
    (2, 1, 63, 65, 33),
    (1, 1, 129, 64, 64),
    (1, 1, 64, 130, 20),
    (1, 1, 150, 200, 8),
]


@pytest.fixture(autouse=True)
def triton_only():
    genkernels.stats(reset=True)
    yield
    calls = genkernels.stats(reset=True)
    assert {backend for _, backend in calls} == {"triton"}


def check(*shape: int, dtype: torch.dtype, draws: int = 1, **options: Any) -> None:
    drawn = (arguments(*shape, dtype, seed=seed, **options) for seed in range(draws))
    assert_op_parity(op, plain, plain, OUTPUTS, *drawn)


@each_dtype
@each_causal
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, ...], causal: int, dtype: torch.dtype) -> None:
    check(*shape, dtype=dtype, causal=causal)


@each_dtype
@pytest.mark.parametrize("Hk", [1, 2], ids=["one_head", "two_heads"])
def test_shared_heads(Hk: int, dtype: torch.dtype) -> None:
    check(1, 4, 17, 70, 5, dtype=dtype, Hk=Hk, enable_gqa=True, causal=LOWER_RIGHT)


@each_dtype
@pytest.mark.parametrize(("D", "Dv"), [(8, 40), (65, 3), (128, 100)])
def test_head_sizes(D: int, Dv: int, dtype: torch.dtype) -> None:
    check(1, 1, 18, 67, D, dtype=dtype, Dv=Dv)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 40.0])
def test_scale(scale: float) -> None:
    draws = [arguments(1, 2, 40, 70, 16, seed=seed) | {"scale": scale} for seed in range(2)]
    assert_op_parity(op, plain, plain, OUTPUTS, *draws)


def test_weights_of_large_scores_add_up_to_one() -> None:
    """In the backward pass, too, where of thousands one number near the logsumexp has too few
    digits."""
    values = arguments(1, 1, 500, 8, 5, scale=2000.0) | {"value": torch.ones(1, 1, 8, 1)}
    value = values["value"].requires_grad_()
    output = genkernels.scaled_dot_product_attention(**values)
    [gradient] = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close(gradient.sum(), torch.tensor(500.0), rtol=1e-6, atol=0)


@each_dtype
def test_strides(dtype: torch.dtype) -> None:
    values = arguments(2, 3, 20, 70, 8, dtype)
    values["query"] = values["query"].transpose(1, 2).contiguous().transpose(1, 2)
    values["key"] = values["key"].mT.contiguous().mT
    values["value"] = values["value"][:, :1].expand(-1, 3, -1, -1)
    assert_op_parity(op, plain, plain, OUTPUTS, values)


@pytest.mark.parametrize("parts", [2, 3])
def test_side_by_side(parts: int) -> None:
    """The gradients of queries, keys and values of one product are the product's as they lie."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 35, parts, 3, 8, generator=generator).requires_grad_()
    query = torch.randn(2, 3, 35, 8, generator=generator)

    def gradient(*tensors: torch.Tensor) -> torch.Tensor:
        heads = [tensor.transpose(1, 2) for tensor in tensors]
        output = genkernels.scaled_dot_product_attention(*[query, *heads][-3:])
        return torch.autograd.grad(output.square().sum(), packed)[0]

    assert torch.equal(
        gradient(*unbind_heads(packed)), gradient(*map(torch.clone, packed.unbind(2)))
    )


def test_runs_agree() -> None:
    values = arguments(1, 2, 70, 130, 8, torch.float16, Hk=1, enable_gqa=True)
    assert_bitwise_equal(with_gradients(op, values), with_gradients(op, values))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)], ids=str
)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    check(*shape, dtype=torch.float32, draws=1)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_spreads_as_it_does_in_pytorch() -> None:
    for name in TENSORS:
        values = arguments(1, 2, 70, 80, 8)
        values[name][0, 1, 66, 3] = torch.nan
        assert_op_parity(op, plain, plain, OUTPUTS, values)


def test_large_heads_are_left_to_the_reference() -> None:
    values = arguments(1, 1, 3, 4, 129)
    with pytest.warns(UserWarning, match="heads have at most 128 elements, and these 129"):
        actual = with_gradients(op, values)
    for tensor, expected in zip(actual, with_gradients(plain, values), strict=True):
        torch.testing.assert_close(tensor, expected)
