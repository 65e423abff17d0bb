"""genkernels.nn.RNN beside torch.nn.RNN: `pytest benchmarks/bench_rnn.py -k "B16 and float32"`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import genkernels

from . import bench_gru
from .bench_gru import DIRECTIONS, DTYPES, GRADIENTS, OUTPUTS

SHAPES = (  # T, B, I, H
    (128, 1, 256, 256),
    (128, 16, 256, 256),
    (128, 64, 512, 512),
    (128, 128, 128, 128),
    (32, 64, 1024, 1024),
    (64, 32, 128, 384),  # what `genkernels train rnn` runs, if it is not told otherwise
)
CONTESTANTS: dict[str, Callable[..., Any]] = {
    "genkernels": genkernels.nn.RNN,
    "torch": torch.nn.RNN,
    "torch.compile": lambda *sizes, **options: torch.compile(torch.nn.RNN(*sizes, **options)),
}
make_step = functools.partial(bench_gru.make_step, gates=1)


def label(shape: tuple[int, int, int, int]) -> str:
    return "RNN T={} B={} I={} H={}".format(*shape)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
def test_rnn(
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
        flops=bench_gru.flops(shape, direction, gates=1),
        names=OUTPUTS + gradients,
    )
