"""Synthetic series, whose distribution is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """A stationary process of mean 0 and variance 1."""

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Return independent series, float32 [count, length]."""

    def autocorrelation(self, lag: int) -> float:
        """The correlation of two values that are `lag` steps apart."""


@dataclass(frozen=True)
class AutoRegression(Process):
    """x[t] = first * x[t - 1] + second * x[t - 2] + normal noise; its values are normal.

    Its autocorrelation follows the Yule-Walker equations (Box and Jenkins, "Time series analysis",
    section 3.2).
    """

    first: float
    second: float = 0.0

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, length, generator=generator)
        one, two = self.autocorrelation(1), self.autocorrelation(2)
        deviation = math.sqrt(1 - self.first * one - self.second * two)
        values = [noise[:, 0], one * noise[:, 0] + math.sqrt(1 - one**2) * noise[:, 1 % length]]
        for t in range(2, length):
            known = self.first * values[-1] + self.second * values[-2]
            values.append(known + deviation * noise[:, t])
        return torch.stack(values[:length], 1)

    def autocorrelation(self, lag: int) -> float:
        before, now = 1.0, self.first / (1 - self.second)
        for _ in range(lag):
            before, now = now, self.first * now + self.second * before
        return before


@dataclass(frozen=True)
class Sinusoid(Process):
    """A sine of a random phase and of `period` steps, with normal noise; `share` is the sine's of
    the variance."""

    period: float
    share: float

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        phases = torch.rand(count, 1, generator=generator)
        waves = torch.sin(2 * math.pi * (phases + torch.arange(length) / self.period))
        noise = torch.randn(count, length, generator=generator)
        return math.sqrt(2 * self.share) * waves + math.sqrt(1 - self.share) * noise

    def autocorrelation(self, lag: int) -> float:
        return self.share * math.cos(2 * math.pi * lag / self.period) if lag else 1.0


# The classes of `synthetic_series`, in their order.
PROCESSES: dict[str, Process] = {
    "AR(2)": AutoRegression(1.2, -0.6),
    "alternating": AutoRegression(-0.7),
    "sine": Sinusoid(period=8, share=0.9),
}


def synthetic_series(count: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw series of `PROCESSES`, as many of each.

    Returns:
        series, float32 [count, length, 1], and classes, int64 [count]; the same ones for the same
        seed.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % len(PROCESSES)
    series = torch.empty(count, length)
    for index, process in enumerate(PROCESSES.values()):
        rows = classes == index
        series[rows] = process.draw(int(rows.sum()), length, generator)
    return series.unsqueeze(2), classes
