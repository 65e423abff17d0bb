"""genkernels.linear beside PyTorch's: `pytest benchmarks/bench_linear.py -k K512`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import genkernels

from .bench_gru import DIRECTIONS, DTYPES

SHAPES = ((6400, 512, 1536), (4096, 256, 1024), (2048, 2048, 2048))  # M, K, N
GRADIENTS = ("input", "weight", "bias")


def plain_gelu(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(input, weight, bias))


fused_gelu = functools.partial(genkernels.linear, activation="gelu")
CONTESTANTS: dict[str | None, dict[str, Callable[..., Tensor]]] = {
    None: {"genkernels": genkernels.linear, "torch": F.linear},
    "gelu": {"genkernels": fused_gelu, "torch": plain_gelu},
}


def make_step(
    function: Callable[..., Tensor],
    shape: tuple[int, int, int],
    direction: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
) -> Callable[[], Sequence[Tensor]]:
    """One call, from the same values whatever the function: the output, and with the backward pass
    the gradients. `compute_dtype` computes with the values of `dtype` in another one."""
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, bound: float = 1.7) -> Tensor:
        values = torch.empty(size).uniform_(-bound, bound, generator=generator)
        return values.to(dtype).to(compute_dtype or dtype)

    input, weight, bias = draw(M, K), draw(N, K, bound=K**-0.5), draw(N, bound=K**-0.5)
    if direction == "forward":
        return torch.no_grad()(lambda: (function(input, weight, bias),))
    cotangent = draw(M, N)
    leaves = [leaf.requires_grad_() for leaf in (input, weight, bias)]

    def step() -> Sequence[Tensor]:
        output = function(input, weight, bias)
        return output, *torch.autograd.grad(output, leaves, cotangent)

    return step


def label(shape: tuple[int, int, int], activation: str | None) -> str:
    return "linear{} M={} K={} N={}".format(f" {activation}" if activation else "", *shape)


def flops(shape: tuple[int, int, int], direction: str) -> float:
    """Multiply-adds of the products, each two; the backward pass has two products as large."""
    M, K, N = shape
    return 2.0 * M * K * N * (1 if direction == "forward" else 3)


@pytest.mark.parametrize("contestant", ["genkernels", "torch"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", CONTESTANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-K{0[1]}-N{0[2]}".format)
def test_linear(
    contest: Callable[..., None],
    shape: tuple[int, int, int],
    activation: str | None,
    dtype: torch.dtype,
    direction: str,
    contestant: str,
) -> None:
    gradients = () if direction == "forward" else tuple(f"grad of {n}" for n in GRADIENTS)
    contest(
        make_step,
        CONTESTANTS[activation],
        contestant,
        shape,
        direction,
        dtype,
        label=label(shape, activation),
        flops=flops(shape, direction),
        names=("output", *gradients),
    )
