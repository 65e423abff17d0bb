"""genkernels.nn.GRU beside torch.nn.GRU: `pytest benchmarks`, with `-k "T512 and float32"` less."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import genkernels

SHAPES = (  # T, B, I, H
    (128, 1, 256, 256),
    (128, 16, 256, 256),
    (128, 64, 256, 512),
    (100, 64, 512, 512),
    (128, 128, 128, 128),
    (32, 64, 1024, 1024),
    (512, 8, 64, 64),
)
DIRECTIONS = ("forward", "forward+backward")
DTYPES = (torch.float32, torch.bfloat16)
CONTESTANTS: dict[str, Callable[..., Any]] = {
    "genkernels": genkernels.nn.GRU,
    "torch": torch.nn.GRU,
    "torch.compile": lambda *sizes, **options: torch.compile(torch.nn.GRU(*sizes, **options)),
}
OUTPUTS = ("output", "h_n")
GRADIENTS = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


def label(shape: tuple[int, int, int, int]) -> str:
    return "GRU T={} B={} I={} H={}".format(*shape)


def flops(shape: tuple[int, int, int, int], direction: str) -> float:
    """Multiplications and additions of the matrix products; a backward pass has twice as many."""
    T, B, I, H = shape
    return 2.0 * T * B * 3 * H * (I + H) * (1 if direction == "forward" else 3)


def make_step(
    make_module: Callable[..., Any],
    shape: tuple[int, int, int, int],
    direction: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
) -> Callable[[], Sequence[Tensor]]:
    """One call of a module, from the same values whatever the module.

    Returns (output, h_n), and with the backward pass also the gradients of the input, of hx and of
    the parameters. `compute_dtype` computes with the values of `dtype` in another one.
    """
    T, B, I, H = shape
    generator = torch.Generator().manual_seed(0)
    module = make_module(I, H, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-(H**-0.5), H**-0.5, generator=generator)
    x, hx, cotangent, cotangent_h = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((T, B, I), (1, B, H), (T, B, H), (1, B, H))
    )
    if compute_dtype is not None:
        module = copy.deepcopy(module).to(compute_dtype)
        x, hx, cotangent, cotangent_h = (
            t.to(compute_dtype) for t in (x, hx, cotangent, cotangent_h)
        )
    if direction == "forward":
        return torch.no_grad()(functools.partial(module, x, hx))
    leaves = (x.requires_grad_(), hx.requires_grad_(), *module.parameters())

    def step() -> Sequence[Tensor]:
        outputs = module(x, hx)
        return *outputs, *torch.autograd.grad(outputs, leaves, (cotangent, cotangent_h))

    return step


@functools.lru_cache(maxsize=1)
def expected(
    shape: tuple[int, int, int, int], direction: str, dtype: torch.dtype
) -> tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor]]:
    """What the contestants of a group are held to: plain PyTorch's step, its float64 results."""
    baseline = make_step(torch.nn.GRU, shape, direction, dtype)
    return baseline, make_step(torch.nn.GRU, shape, direction, dtype, torch.float64)()


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
def test_gru(
    contest: Callable[..., None],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    direction: str,
    contestant: str,
) -> None:
    baseline, exact = expected(shape, direction, dtype)
    contest(
        make_step(CONTESTANTS[contestant], shape, direction, dtype),
        contestant=contestant,
        shape=label(shape),
        direction=direction,
        dtype=dtype,
        flops=flops(shape, direction),
        names=OUTPUTS
        + (() if direction == "forward" else tuple(f"grad of {n}" for n in GRADIENTS)),
        baseline=baseline,
        exact=exact,
    )


def cases(contestant: str) -> dict[str, Callable[[], Callable[[], Sequence[Tensor]]]]:
    """Every benchmark of one contestant by name, for benchmarks.compare; call one to set it up."""
    return {
        f"{label(shape)}, {direction}, {str(dtype).removeprefix('torch.')}": functools.partial(
            make_step, CONTESTANTS[contestant], shape, direction, dtype
        )
        for shape in SHAPES
        for dtype in DTYPES
        for direction in DIRECTIONS
    }
