"""genkernels.dropout beside PyTorch's: `pytest benchmarks/bench_dropout.py -k residual`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import genkernels

from .bench_gru import DIRECTIONS, DTYPES

P = 0.1


class Shape(NamedTuple):
    """Sizes, and whether a residual is added."""

    B: int
    T: int
    E: int
    residual: bool


SHAPES = tuple(
    Shape(*sizes, residual)
    for sizes in ((1, 8, 64), (8, 256, 384), (8, 512, 1024))
    for residual in (False, True)
)


def plain(input: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    output = F.dropout(input, p)
    return output if residual is None else residual + output


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"genkernels": genkernels.dropout, "torch": plain}


def label(shape: Shape) -> str:
    return "dropout B={} T={} E={}".format(*shape) + " residual" * shape.residual


def flops(shape: Shape, direction: str) -> float:
    """A multiplication of each element, and of its gradient; an addition of its residual."""
    B, T, E, residual = shape
    return float(B * T * E) * ((1 if direction == "forward" else 2) + residual)


def make_step(
    function: Callable[..., Tensor],
    shape: Shape,
    direction: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
) -> Callable[[], Sequence[Tensor]]:
    """One call, and with the backward pass the gradients. It returns nothing that could be
    compared: each contestant drops others."""
    generator = torch.Generator().manual_seed(0)
    input, residual, cotangent = (
        torch.randn(shape[:3], generator=generator).to(dtype).to(compute_dtype or dtype)
        for _ in range(3)
    )
    leaves = (input, residual) if shape.residual else (input,)
    call = functools.partial(function, input, P, residual=residual if shape.residual else None)

    def forward() -> Sequence[Tensor]:
        call()
        return ()

    def training() -> Sequence[Tensor]:
        torch.autograd.grad(call(), leaves, cotangent)
        return ()

    if direction == "forward":
        return torch.no_grad()(forward)
    for leaf in leaves:
        leaf.requires_grad_()
    return training


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: label(shape).replace("=", "").replace(" ", "-")
)
def test_dropout(
    contest: Callable[..., None],
    shape: Shape,
    dtype: torch.dtype,
    direction: str,
    contestant: str,
) -> None:
    contest(
        make_step,
        CONTESTANTS,
        contestant,
        shape,
        direction,
        dtype,
        label=label(shape),
        flops=flops(shape, direction),
        names=(),
    )
