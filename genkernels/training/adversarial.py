"""Training of a generator and a discriminator against each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..data import Batches
from ..models.adversarial import AdversarialModel
from .adversarial_losses import ADVERSARIAL_LOSSES, gradient_penalty
from .loop import OptimizerName, Run, ScheduleName, TrainingConfig, make_optimizer

AdversarialLossName = Literal["minimax", "non-saturating", "hinge", "wgan-gp"]


@dataclass(frozen=True)
class AdversarialConfig(TrainingConfig):
    """How to train an `AdversarialModel`; what `TrainingConfig` has, and

    loss: a key of `ADVERSARIAL_LOSSES`.
    penalty: factor on the gradient penalty of "wgan-gp".
    discriminator_steps: those of the discriminator before each one of the generator.
    discriminator_learning_rate: None for `learning_rate` (Heusel et al. 2017,
        https://arxiv.org/abs/1706.08500, have one for each).
    beta1, beta2: Adam's.

    Raises:
        ValueError: neither steps nor minutes, an unknown loss, discriminator_steps below 1, or a
            batch_size "full".
    """

    optimizer: OptimizerName = "adam"
    learning_rate: float = 2e-4
    schedule: ScheduleName = "constant"
    warmup: float = 0.0
    max_grad_norm: float = 0.0
    sequence_length: int | None = None
    loss: AdversarialLossName = "hinge"
    penalty: float = 10.0
    discriminator_steps: int = 1
    discriminator_learning_rate: float | None = None
    beta1: float = 0.0
    beta2: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ADVERSARIAL_LOSSES:
            known = ", ".join(ADVERSARIAL_LOSSES)
            raise ValueError(f"loss must be one of {known}, got {self.loss!r}")
        if type(self.discriminator_steps) is not int or self.discriminator_steps < 1:
            got = repr(self.discriminator_steps)
            raise ValueError(f"discriminator_steps must be an int of at least 1, got {got}")
        if self.batch_size == "full":
            raise ValueError("batch_size must be an int, got 'full'")


class AdversarialTraining(Run):
    """A `Run` of a discriminator and a generator in turn.

    Step i trains the discriminator on `batches.batch(k * i)` to `batch(k * i + k - 1)`, each
    (examples, classes) or (examples,), and on as many generated ones of the same classes; then the
    generator, for the classes of the last. A `Step`'s loss is the discriminator's on the last
    batch, `generator_loss` the other, and its tokens are the real examples.
    """

    model: AdversarialModel
    config: AdversarialConfig

    def __init__(
        self, model: AdversarialModel, batches: Batches, config: AdversarialConfig
    ) -> None:
        options = {}
        if config.optimizer != "sgd":
            options["betas"] = (config.beta1, config.beta2)
        self.discriminator_optimizer = make_optimizer(
            model.discriminator,
            config,
            lr=config.discriminator_learning_rate or config.learning_rate,
            **options,
        )
        self.generator_optimizer = make_optimizer(model.generator, config, **options)
        super().__init__(
            model, batches, config, self.discriminator_optimizer, self.generator_optimizer
        )
        self.generator_loss = 0.0

    def _step(self) -> tuple[float, int]:
        generator, discriminator = self.model.generator, self.model.discriminator
        losses = ADVERSARIAL_LOSSES[self.config.loss]
        steps, examples = self.config.discriminator_steps, 0
        for step in range(steps):
            real, classes, *_ = (*self.batches.batch(steps * self.number + step), None)
            with torch.no_grad():
                fake = generator(self.model.noise(len(real)), classes)
            # At once, so that weights are normalised once.
            twice = None if classes is None else torch.cat([classes, classes])
            scores = discriminator(torch.cat([real, fake]), twice)
            loss = losses.discriminator(*scores.chunk(2))
            if losses.has_penalty and self.config.penalty:
                penalty = gradient_penalty(discriminator, real, fake, classes)
                loss = loss + self.config.penalty * penalty
            self._descend(discriminator, self.discriminator_optimizer, loss)
            examples += len(real)
        with _frozen(discriminator):
            fake = generator(self.model.noise(len(real)), classes)
            generator_loss = losses.generator(discriminator(fake, classes))
            self._descend(generator, self.generator_optimizer, generator_loss)
        self.model.average.update_parameters(generator)
        self.generator_loss = generator_loss.item()
        return loss.item(), examples

    def _descend(self, module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(module.parameters(), self.config.max_grad_norm)
        optimizer.step()


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Record no gradients of the module's parameters, which cost as much as those of its input."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
