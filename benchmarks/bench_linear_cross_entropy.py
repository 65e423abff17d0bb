"""genkernels.linear_cross_entropy beside PyTorch's two calls, and its one: `pytest benchmarks -k
V10000`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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


def torch_fused(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor
) -> Tensor:
    return F.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"genkernels": fused, "torch": plain}
if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
    CONTESTANTS["torch linear_cross_entropy"] = torch_fused
GRADIENTS = ("input", "linear_weight", "linear_bias")


def make_step(
    function: Callable[..., Tensor],
    shape: tuple[int, int, int],
    direction: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Callable[[], Sequence[Tensor]]:
    """One call, from the same values whatever the function: the loss, and with the backward pass
    the gradients. `compute_dtype` computes with the values of `dtype` in another one."""
    N, K, V = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, bound: float) -> Tensor:
        values = torch.empty(size).uniform_(-bound, bound, generator=generator)
        return values.to(dtype).to(device, compute_dtype or dtype)

    input, weight, bias = draw(N, K, bound=1.7), draw(V, K, bound=K**-0.5), draw(V, bound=K**-0.5)
    target = torch.randint(V, (N,), generator=generator).to(device)
    call = functools.partial(function, input, weight, target)
    if direction == "forward":
        return torch.no_grad()(lambda: (call(bias),))
    leaves = [leaf.requires_grad_() for leaf in (input, weight, bias)]

    def step() -> Sequence[Tensor]:
        loss = call(bias)
        return loss, *torch.autograd.grad(loss, leaves)

    return step


def label(shape: tuple[int, int, int]) -> str:
    return "linear_cross_entropy N={} K={} V={}".format(*shape)


def flops(shape: tuple[int, int, int], direction: str) -> float:
    """Multiply-adds of the products, each two; the backward pass has two products as large."""
    N, K, V = shape
    return 2.0 * N * K * V * (1 if direction == "forward" else 3)


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
    gradients = () if direction == "forward" else tuple(f"grad of {n}" for n in GRADIENTS)
    contest(
        make_step,
        CONTESTANTS,
        contestant,
        shape,
        direction,
        dtype,
        label=label(shape),
        flops=flops(shape, direction),
        names=("loss", *gradients),
    )
