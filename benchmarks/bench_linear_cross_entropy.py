"""genkernels.linear_cross_entropy beside PyTorch's two calls: `pytest benchmarks -k V10000`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import genkernels

from .bench_gru import DIRECTIONS, DTYPES

SHAPES = ((6400, 512, 10000), (2048, 768, 50257))  # N, K, V


def plain(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)


def fused(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
    return genkernels.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"genkernels": fused, "torch": plain}
GRADIENTS = ("input", "linear_weight", "linear_bias")


def make_step(
    function: Callable[..., Tensor],
    shape: tuple[int, int, int],
    direction: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
) -> Callable[[], Sequence[Tensor]]:
    """One call, from the same values whatever the function: the loss, and with the backward pass
    the gradients. `compute_dtype` computes with the values of `dtype` in another one."""
    N, K, V = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, bound: float) -> Tensor:
        values = torch.empty(size).uniform_(-bound, bound, generator=generator)
        return values.to(dtype).to(compute_dtype or dtype)

    input, weight, bias = draw(N, K, bound=1.7), draw(V, K, bound=K**-0.5), draw(V, bound=K**-0.5)
    call = functools.partial(function, input, weight, torch.randint(V, (N,), generator=generator))
    if direction == "forward":
        return torch.no_grad()(lambda: (call(bias),))
    leaves = [leaf.requires_grad_() for leaf in (input, weight, bias)]

    def step() -> Sequence[Tensor]:
        loss = call(bias)
        return loss, *torch.autograd.grad(loss, leaves)

    return step


@functools.lru_cache(maxsize=1)
def expected(shape: tuple[int, int, int], direction: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """What the contestants of a group are held to: plain PyTorch's step, its float64 results."""
    baseline = make_step(plain, shape, direction, dtype)
    return baseline, make_step(plain, shape, direction, dtype, torch.float64)()


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}-K{0[1]}-V{0[2]}".format)
def test_linear_cross_entropy(
    contest: Callable[..., None],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    direction: str,
    contestant: str,
) -> None:
    N, K, V = shape
    baseline, exact = expected(shape, direction, dtype)
    contest(
        make_step(CONTESTANTS[contestant], shape, direction, dtype),
        contestant=contestant,
        shape=f"linear_cross_entropy N={N} K={K} V={V}",
        direction=direction,
        dtype=dtype,
        flops=2.0 * N * K * V * (1 if direction == "forward" else 3),
        names=("loss", *(f"grad of {n}" for n in GRADIENTS))[: 1 if direction == "forward" else 4],
        baseline=baseline,
        exact=exact,
    )
