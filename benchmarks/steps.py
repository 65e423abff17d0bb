"""What is timed: a step, which returns its tensors, and what it is held to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Sequence[Tensor]]


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
