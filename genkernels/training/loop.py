"""The training loop of the language models."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine"]


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    `batch_size` and `sequence_length` are those of `genkernels.data.sequence_batches`; "full" with
    SGD is plain gradient descent. The run ends after `steps` steps or `minutes` minutes, whichever
    comes first. `max_grad_norm` 0 does not clip. The learning rate rises linearly over the first
    `warmup` share of the run; then it stays ("constant") or falls to zero along a cosine.

    Raises:
        ValueError: neither steps nor minutes.
    """

    optimizer: OptimizerName = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    schedule: ScheduleName = "cosine"
    warmup: float = 0.02
    max_grad_norm: float = 1.0
    batch_size: int | Literal["full"] = 64
    sequence_length: int = 128
    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes are both None; expected at least one")


class Step(NamedTuple):
    """What one step did: `loss` in nats per token, `progress` the share of the run that is done."""

    number: int
    loss: float
    tokens: int
    seconds: float
    progress: float


def train(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], config: TrainingConfig
) -> Iterator[Step]:
    """Train `model` on batches of (input, target), int64 [B, T], and yield each `Step` when done.

    `model.loss(input, target, hx) -> (loss, hx)` is trained in place, so that a caller who stops
    listening (or is interrupted) keeps the weights of the last step. The hidden state goes from
    each batch to the next (the gradient does not), and is zero again when the batches start over.
    The time the caller takes between two steps counts towards `minutes`.

    Raises:
        FloatingPointError: the loss is no longer a finite number.
    """
    optimizer = make_optimizer(model, config)
    start = time.perf_counter()
    progress = 0.0
    hx: Any = None
    for number in itertools.count(1):
        step_start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(progress, config)
        index = (number - 1) % len(batches)
        input, target = batches[index]
        model.train()
        loss, hx = training_step(
            model, optimizer, input, target, hx if index else None, config.max_grad_norm
        )
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {number}; expected a finite number "
                f"(a learning rate below {config.learning_rate:g} may help)"
            )
        now = time.perf_counter()
        by_steps = number / config.steps if config.steps else 0.0
        by_time = (now - start) / (60 * config.minutes) if config.minutes else 0.0
        progress = min(max(by_steps, by_time), 1.0)
        yield Step(number, loss, input.numel(), now - step_start, progress)
        if progress == 1:
            return


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    input: Tensor,
    target: Tensor,
    hx: Any,
    max_grad_norm: float,
) -> tuple[float, Any]:
    """Do one step on input and target, int64 [B, T]; returns the mean loss and the hidden state."""
    optimizer.zero_grad()
    loss, hx = cast(Any, model).loss(input, target, hx)
    loss.backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss.item(), hx.detach()


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, over all parameters of `model`."""
    optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizers[config.optimizer](
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _schedule(progress: float, config: TrainingConfig) -> float:
    """Return the factor on the learning rate."""
    factor = 1.0
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    if progress < config.warmup:
        factor *= progress / config.warmup
    return factor
