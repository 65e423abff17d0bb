"""Training of models that learn from all of the data at once, without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .loop import Step, share_done


@dataclass(frozen=True)
class FittingConfig:
    """How long to fit: `steps` times, or for `minutes` minutes, whichever comes first.

    Raises:
        ValueError: neither steps nor minutes.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes are both None; expected at least one")


@dataclass(frozen=True)
class EMConfig(FittingConfig):
    """How to run EM; what `FittingConfig` has, and

    sequence_length: of the pieces that the text is cut into.
    pseudo_count: that of `HMM.maximize`.
    """

    sequence_length: int = 128
    pseudo_count: float = 0.01


@dataclass(frozen=True)
class CountingConfig(FittingConfig):
    """How to count; what `FittingConfig` has, and

    pseudo_count: that of `BayesianNetwork.fit`.
    """

    pseudo_count: float = 1.0


class Fitting:
    """A run of `fit` that can be saved between two steps and continued, as a `Training` can.

    Args:
        fit: changes the model for the better by all of the data, and returns the loss in nats per
            target.
        targets: how many there are.
    """

    def __init__(
        self, model: nn.Module, config: FittingConfig, fit: Callable[[], float], targets: int
    ) -> None:
        self.model = model
        self.config = config
        self.number = 0
        self.seconds = 0.0
        self._fit = fit
        self._targets = targets

    @property
    def progress(self) -> float:
        """The share of the run that is done."""
        return share_done(self.number, self.seconds, self.config)

    def __iter__(self) -> Iterator[Step]:
        start = time.perf_counter() - self.seconds
        while self.progress < 1:
            step_start = time.perf_counter()
            loss = self._fit()
            self.number += 1
            now = time.perf_counter()
            self.seconds = now - start
            seconds = now - step_start
            yield Step(self.number, loss, self._targets, seconds, self.progress, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return how far the run is; all else is in the weights."""
        return {
            "number": torch.tensor(self.number),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken; the weights are the caller's to load.

        Raises:
            KeyError: a tensor is missing.
        """
        self.number = int(tensors["number"])
        self.seconds = float(tensors["seconds"])
