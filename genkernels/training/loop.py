"""The training loop."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..data import Batches

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine"]


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    `batch_size` and `sequence_length` are those of `genkernels.data.sequence_batches`; "full" with
    SGD is plain gradient descent. Models with a context_length have no other length. The run ends
    after `steps` steps or `minutes` minutes, whichever comes first. `max_grad_norm` 0 does not
    clip. The learning rate rises linearly over the first `warmup` share of the run; then it stays
    ("constant") or falls along a cosine, to its `min_learning_rate` share at the end.

    Raises:
        ValueError: neither steps nor minutes.
    """

    optimizer: OptimizerName = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    schedule: ScheduleName = "cosine"
    warmup: float = 0.02
    min_learning_rate: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int | Literal["full"] = 64
    sequence_length: int | None = 128
    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes are both None; expected at least one")


class Step(NamedTuple):
    """What one step did; `loss` is in nats per target, `progress` the share of the run done."""

    number: int
    loss: float
    tokens: int
    seconds: float
    progress: float
    learning_rate: float


class Training:
    """A run of training that can be saved between two steps and continued, to the last bit.

    Iterating trains `model` in place on `batches.batch(0)`, `batch(1)`, ... and yields each `Step`
    when done, from the step after the last one on. `model.loss(*batch, state=state)` returns the
    loss and the state that goes on to the next batch, without its gradient, where that
    `continues()` the text. The time the caller takes between two steps counts towards `minutes`.

    Raises:
        FloatingPointError: the loss is no longer a finite number.
    """

    def __init__(self, model: nn.Module, batches: Batches, config: TrainingConfig) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        self.optimizer = make_optimizer(model, config)
        self.number = 0
        self.seconds = 0.0
        self._state: Tensor | None = None

    @property
    def progress(self) -> float:
        """The share of the run that is done."""
        return share_done(self.number, self.seconds, self.config)

    def __iter__(self) -> Iterator[Step]:
        start = time.perf_counter() - self.seconds
        while self.progress < 1:
            step_start = time.perf_counter()
            rate = self.config.learning_rate * _schedule(self.progress, self.config)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = self.batches.batch(self.number)
            state = self._state if self.batches.continues(self.number) else None
            self.model.train()
            loss, self._state = training_step(
                self.model, self.optimizer, batch, state, self.config.max_grad_norm
            )
            self.number += 1
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {self.number}; expected a finite number "
                    f"(a learning rate below {self.config.learning_rate:g} may help)"
                )
            now = time.perf_counter()
            self.seconds = now - start
            yield Step(self.number, loss, batch[0].numel(), now - step_start, self.progress, rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next step depends on but the weights, as tensors.

        That is what the optimizer knows of each parameter, by the parameter's name, the state of
        the random numbers, the model's state, and how far the run is.
        """
        tensors = {
            "number": torch.tensor(self.number),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "random": torch.get_rng_state(),
        }
        if self._state is not None:
            tensors["state"] = self._state.contiguous()  # as safetensors wants it
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken; the weights are the caller's to load.

        Raises:
            KeyError: a tensor is missing.
        """
        self.number = int(tensors["number"])
        self.seconds = float(tensors["seconds"])
        self._state = tensors.get("state")
        torch.set_rng_state(tensors["random"])
        known = [re.fullmatch(r"optimizer\.(\w+)\.(.+)", name) for name in tensors]
        names = [name for name, _ in self.model.named_parameters()]
        state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
        for match in filter(None, known):
            state[names.index(match[2])][match[1]] = tensors[match[0]]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def share_done(number: int, seconds: float, config: Any) -> float:
    """Return the share of a run that is done, whose `config` has `steps` and `minutes`."""
    by_steps = number / config.steps if config.steps else 0.0
    by_time = seconds / (60 * config.minutes) if config.minutes else 0.0
    return min(max(by_steps, by_time), 1.0)


def train(model: nn.Module, batches: Batches, config: TrainingConfig) -> Iterator[Step]:
    """Iterate over a new `Training`: a caller who stops listening keeps the weights of then."""
    return iter(Training(model, batches, config))


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Tensor],
    state: Tensor | None,
    max_grad_norm: float,
) -> tuple[float, Tensor | None]:
    """Do one step on what `model.loss` takes; returns the mean loss and the model's state."""
    optimizer.zero_grad()
    loss, state = cast(Any, model).loss(*batch, state=state)
    loss.backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss.item(), None if state is None else state.detach()


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
        low = config.min_learning_rate
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if progress < config.warmup:
        factor *= progress / config.warmup
    return factor
