"""genkernels.nn.GRU beside torch.nn.GRU: `pytest benchmarks`, with `-k "T512 and float32"` less."""

from __future__ import annotations

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


def flops(shape: tuple[int, int, int, int], direction: str, gates: int = 3) -> float:
    """Multiplications and additions of the matrix products; a backward pass has twice as many."""
    T, B, I, H = shape
    return 2.0 * T * B * gates * H * (I + H) * (1 if direction == "forward" else 3)


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype, gates: int = 3) -> dict[str, Tensor]:
    """What every contestant computes with, rounded to `dtype`, under torch.nn.GRU's names."""
    T, B, I, H = shape
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.empty(size).uniform_(-(H**-0.5), H**-0.5, generator=generator)
        for name, size in (
            ("weight_ih", (gates * H, I)),
            ("weight_hh", (gates * H, H)),
            ("bias_ih", (gates * H,)),
            ("bias_hh", (gates * H,)),
        )
    } | {
        name: torch.randn(size, generator=generator)
        for name, size in (
            ("input", (T, B, I)),
            ("hx", (1, B, H)),
            ("cotangent", (T, B, H)),
            ("cotangent_h", (1, B, H)),
        )
    }
    return {name: value.to(dtype) for name, value in values.items()}


def make_step(
    make_module: Callable[..., Any],
    shape: tuple[int, int, int, int],
    direction: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    device: str = "cpu",
    gates: int = 3,
) -> Callable[[], Sequence[Tensor]]:
    """One call of a module, from the same values whatever the module.

    Returns (output, h_n), and with the backward pass also the gradients of the input, of hx and of
    the parameters. `compute_dtype` computes with the values of `dtype` in another one. `gates`:
    how many blocks of rows the module's weights have.
    """
    _, _, I, H = shape
    compute_dtype = compute_dtype or dtype
    drawn = draw(shape, dtype, gates)
    values = {name: value.to(device, compute_dtype) for name, value in drawn.items()}
    module = make_module(I, H, dtype=compute_dtype, device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name.removeprefix("_orig_mod.").removesuffix("_l0")])
    x, hx = values["input"], values["hx"]
    if direction == "forward":
        return torch.no_grad()(functools.partial(module, x, hx))
    leaves = (x.requires_grad_(), hx.requires_grad_(), *module.parameters())

    def step() -> Sequence[Tensor]:
        outputs = module(x, hx)
        cotangents = values["cotangent"], values["cotangent_h"]
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return step


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
        names=OUTPUTS + gradients,
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
