"""What is timed: a step, which returns its tensors, and what it is held to."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Sequence[Tensor]]

CHECKED_STEPS = 3  # of training
# Of the losses of the first steps, to those in float64. The second and third depend on gradients
# (but for a factor of a whole tensor, which Adam takes out) and optimizer; bfloat16 has 8 bits.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}


@functools.lru_cache(maxsize=1)
def expected(
    make_step: Callable[..., Step],
    plain: Callable[..., Any],
    shape: tuple[int, ...],
    direction: str,
    dtype: torch.dtype,
) -> tuple[Step, Sequence[Tensor]]:
    """What the contestants of a group are held to: plain PyTorch's step, its float64 results."""
    baseline = make_step(plain, shape, direction, dtype)
    return baseline, make_step(plain, shape, direction, dtype, torch.float64)()


def medians_of_turns(
    functions: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, float]:
    """Median seconds of a call of each: they take turns, so that a drift of the machine meets all
    alike, for about so long, from 5 to 1000 times."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds
    for turn in range(1000):
        if turn >= 5 and time.perf_counter() > deadline:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(kept) for name, kept in times.items()}
