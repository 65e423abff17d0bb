"""The time of a training step: against the same model in plain PyTorch, and that of kernels."""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .loop import TrainingConfig, make_optimizer, training_step


class Comparison(NamedTuple):
    """Median seconds of one training step."""

    model: float
    baseline: float

    @property
    def speed_up(self) -> float:
        return self.baseline / self.model


def compare_step_time(
    model: nn.Module,
    baseline: nn.Module,
    batch: Sequence[Tensor],
    config: TrainingConfig,
    seconds: float = 8.0,
) -> Comparison:
    """Time training steps on a batch, what `model.loss` takes, of copies of both models.

    The steps alternate, so that a drift of the machine's speed meets both alike; the first pair
    warms up and is not counted. As many pairs as start within `seconds`, from 3 to 15. The models
    and the random state are left as they are.
    """
    contestants: list[tuple[nn.Module, Any, list[float]]] = []
    for contestant in (model, baseline):
        clone = copy.deepcopy(contestant).train()
        contestants.append((clone, make_optimizer(clone, config), []))
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        for pair in range(16):
            if pair > 3 and time.perf_counter() - begin > seconds:
                break
            for clone, optimizer, times in contestants:
                start = time.perf_counter()
                training_step(clone, optimizer, batch, None, config.max_grad_norm)
                times.append(time.perf_counter() - start)
    return Comparison(*(statistics.median(times[1:]) for _, _, times in contestants))


def kernel_share(steps: Iterable[Any]) -> float:
    """Return the share of the CPU's time, while one iterates, that is spent in genkernels' ops; the
    first step, which makes ready what the others have, is not counted."""
    iterator = iter(steps)
    next(iterator)
    with _without_stderr(), torch.autograd.profiler.profile() as profile:
        for _ in iterator:
            pass
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    fused = sum(time for key, time in times.items() if key.startswith("genkernels::"))
    return fused / sum(times.values())


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Throw away what goes to stderr: torch 2.13 profiles with words."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
