"""The training loop."""

from __future__ import annotations

import abc
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


class Run(abc.ABC):
    """A run of training that can be saved between two steps and continued, to the last bit.

    Iterating trains `model` in place and yields each `Step` when done, from the step after the last
    one on. The time the caller takes between two steps counts towards `minutes`.

    Args:
        optimizers: of parameters of the model, each with the learning rate that the schedule is of.

    Raises:
        FloatingPointError: the loss is no longer a finite number.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainingConfig,
        *optimizers: torch.optim.Optimizer,
    ) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        self.optimizers = optimizers
        self.number = 0
        self.seconds = 0.0
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    @abc.abstractmethod
    def _step(self) -> tuple[float, int]:
        """Do step `number`; returns its loss, and how many tokens it was of."""

    @property
    def progress(self) -> float:
        """The share of the run that is done."""
        return share_done(self.number, self.seconds, self.config)

    def __iter__(self) -> Iterator[Step]:
        start = time.perf_counter() - self.seconds
        while self.progress < 1:
            step_start = time.perf_counter()
            factor = _schedule(self.progress, self.config)
            for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
            self.model.train()
            loss, tokens = self._step()
            self.number += 1
            rate = self.config.learning_rate
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {self.number}; expected a finite number "
                    f"(a learning rate below {rate:g} may help)"
                )
            now = time.perf_counter()
            self.seconds = now - start
            yield Step(self.number, loss, tokens, now - step_start, self.progress, rate * factor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next step depends on but the weights, as tensors.

        That is what the optimizers know of each parameter, by the parameter's name, the state of
        the random numbers, and how far the run is.
        """
        tensors = {
            "number": torch.tensor(self.number),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "random": torch.get_rng_state(),
        }
        for optimizer, names in self._names():
            for index, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    tensors[f"optimizer.{key}.{names[index]}"] = value
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken; the weights are the caller's to load.

        Raises:
            KeyError: a tensor is missing.
        """
        self.number = int(tensors["number"])
        self.seconds = float(tensors["seconds"])
        torch.set_rng_state(tensors["random"])
        known = [re.fullmatch(r"optimizer\.(\w+)\.(.+)", name) for name in tensors]
        of_parameters: dict[str, dict[str, Tensor]] = {}
        for match in filter(None, known):
            of_parameters.setdefault(match[2], {})[match[1]] = tensors[match[0]]
        for optimizer, names in self._names():
            state = {index: of_parameters.get(name, {}) for index, name in enumerate(names)}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _names(self) -> Iterator[tuple[torch.optim.Optimizer, list[str]]]:
        """Yield each optimizer with the names of its parameters, in its order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            groups = optimizer.param_groups
            yield optimizer, [names[each] for group in groups for each in group["params"]]


class Training(Run):
    """A `Run` on one loss.

    It trains on `batches.batch(0)`, `batch(1)`, ...; `model.loss(*batch, state=state)` returns the
    loss and the state that goes on to the next batch, without its gradient, where that
    `continues()` the text.
    """

    def __init__(self, model: nn.Module, batches: Batches, config: TrainingConfig) -> None:
        self.optimizer = make_optimizer(model, config)
        super().__init__(model, batches, config, self.optimizer)
        self._state: Tensor | None = None

    def _step(self) -> tuple[float, int]:
        batch = self.batches.batch(self.number)
        state = self._state if self.batches.continues(self.number) else None
        loss, self._state = training_step(
            self.model, self.optimizer, batch, state, self.config.max_grad_norm
        )
        return loss, batch[0].numel()

    def state_dict(self) -> dict[str, Tensor]:
        """As `Run` has it, with the model's state."""
        tensors = super().state_dict()
        if self._state is not None:
            tensors["state"] = self._state.contiguous()  # as safetensors wants it
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state_dict(tensors)
        self._state = tensors.get("state")


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


def make_optimizer(
    model: nn.Module, config: TrainingConfig, **options: Any
) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, over all parameters of `model`; `options` are
    further ones of its class, or others than the config has."""
    optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    return optimizers[config.optimizer](model.parameters(), **settings | options)


def _schedule(progress: float, config: TrainingConfig) -> float:
    """Return the factor on the learning rate."""
    factor = 1.0
    if config.schedule == "cosine":
        low = config.min_learning_rate
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if progress < config.warmup:
        factor *= progress / config.warmup
    return factor
