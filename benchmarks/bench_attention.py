"""Fused attention beside PyTorch's: `pytest benchmarks/bench_attention.py -k L512`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import genkernels

from .bench_gru import DIRECTIONS, DTYPES


class Shape(NamedTuple):
    """Sizes, whether the mask is causal, and whether a bias [B, H, L, S] is added to the scores."""

    B: int
    H: int
    L: int
    S: int
    D: int
    causal: bool = False
    bias: bool = False


SHAPES = (
    Shape(1, 8, 512, 512, 64),
    Shape(4, 8, 1024, 1024, 64),
    Shape(2, 8, 1024, 1024, 128),
    Shape(1, 8, 512, 512, 64, causal=True),
    Shape(1, 8, 2048, 2048, 64, causal=True),
    Shape(4, 8, 1024, 1024, 64, causal=True),
    Shape(2, 8, 1024, 1024, 128, causal=True),
    Shape(16, 4, 128, 128, 32, causal=True),
    Shape(64, 4, 64, 64, 32, causal=True),
)
FLEX = "FlexAttention"  # has no gradients on the CPU


def compiled_flex(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, **options: None
) -> Tensor:
    L, S = query.size(-2), key.size(-2)
    function = _compiled(tuple(query.shape), tuple(key.shape), query.dtype, is_causal)
    return function(query, key, value, block_mask=_causal_blocks(L, S) if is_causal else None)


@functools.lru_cache(maxsize=1)
def _compiled(*case: object) -> Callable[..., Tensor]:
    """FlexAttention for one case, forgotten with the next: torch.compile gives up after eight."""
    torch._dynamo.reset()
    # A pool of compiling processes would start beside what is being timed.
    return torch.compile(flex_attention, dynamic=False, options={"compile_threads": 1})


@functools.cache
def _causal_blocks(L: int, S: int) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, L, S, device="cpu")


CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "genkernels": genkernels.scaled_dot_product_attention,
    "torch": F.scaled_dot_product_attention,
    FLEX: compiled_flex,
}


def label(shape: Shape) -> str:
    sizes = {name: getattr(shape, name) for name in "BHLSD"}
    if shape.S == shape.L:
        del sizes["S"]
    words = [f"{name}={size}" for name, size in sizes.items()]
    words += [name for name in ("causal", "bias") if getattr(shape, name)]
    return " ".join(["attention", *words])


def flops(shape: Shape, direction: str) -> float:
    """Of the matrix products: two forward, five more backward; half of them where causal."""
    B, H, L, S, D = shape[:5]
    products = 4.0 * B * H * L * S * D * (0.5 if shape.causal else 1.0)
    return products * (1.0 if direction == "forward" else 3.5)


def arguments(shape: Shape) -> tuple[str, ...]:
    return ("query", "key", "value", "attn_mask")[: 4 if shape.bias else 3]


def result_names(shape: Shape, direction: str) -> tuple[str, ...]:
    """What a step returns."""
    gradients = () if direction == "forward" else arguments(shape)
    return "output", *(f"grad of {name}" for name in gradients)


def draw(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """What every contestant computes with, rounded to `dtype`, under PyTorch's names."""
    B, H, L, S, D = shape[:5]
    sizes = {"query": L, "key": S, "value": S, "cotangent": L}
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(B, H, rows, D, generator=generator) for name, rows in sizes.items()}
    if shape.bias:
        values["attn_mask"] = torch.randn(B, H, L, S, generator=generator)
    return {name: value.to(dtype) for name, value in values.items()}


def make_step(
    function: Callable[..., Tensor],
    shape: Shape,
    direction: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Callable[[], Sequence[Tensor]]:
    """One call, from the same values whatever the function: the output, and with the backward pass
    the gradients. `compute_dtype` computes with the values of `dtype` in another one."""
    compute_dtype = compute_dtype or dtype
    values = {name: v.to(device, compute_dtype) for name, v in draw(shape, dtype).items()}
    cotangent = values.pop("cotangent")
    call = functools.partial(function, **values, is_causal=shape.causal)
    if direction == "forward":
        return torch.no_grad()(lambda: (call(),))
    leaves = [values[name].requires_grad_() for name in arguments(shape)]

    def step() -> Sequence[Tensor]:
        output = call()
        return output, *torch.autograd.grad(output, leaves, cotangent)

    return step


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: label(shape).replace("=", "").replace(" ", "-")
)
def test_attention(
    contest: Callable[..., None],
    shape: Shape,
    dtype: torch.dtype,
    direction: str,
    contestant: str,
) -> None:
    if contestant == FLEX and direction != "forward":
        pytest.skip("FlexAttention has no gradients on the CPU")
    contest(
        make_step,
        CONTESTANTS,
        contestant,
        shape,
        direction,
        dtype,
        label=label(shape),
        flops=flops(shape, direction),
        names=result_names(shape, direction),
    )
