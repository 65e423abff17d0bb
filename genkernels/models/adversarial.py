"""What the generative adversarial networks share: noise, classes, and the average that draws."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .evaluating import evaluating

_AT_ONCE = 256
_DECAY = 0.995


def _moving_average(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """The exponential moving average, which forgets faster while little was seen."""
    decay = min(_DECAY, (1 + int(count)) / (10 + int(count)))
    return average + (1 - decay) * (current - average)


class AdversarialModel(nn.Module):
    """A generator and a discriminator, which are trained against each other
    (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661).

    `generator(noise, classes)` returns as many examples as there are rows of noise, and
    `discriminator(examples, classes)` how real each is, [B]: above zero more real than not.
    `average` is the moving average of the generator's weights, which generates better than those
    of any one step (Yazici et al. 2018, https://arxiv.org/abs/1806.04498); its training updates it.
    """

    name: ClassVar[str]
    config: Any
    generator: nn.Module
    discriminator: nn.Module
    average: AveragedModel

    def __init__(
        self,
        config: Any,
        generator: nn.Module,
        discriminator: nn.Module,
        noise_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.config = config
        self._noise_shape = noise_shape
        self.generator = generator
        self.discriminator = discriminator
        self.average = AveragedModel(generator, avg_fn=_moving_average, use_buffers=True)
        self.average.requires_grad_(False)

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """What `count` examples are made of: standard normal numbers."""
        like = next(self.parameters())
        return torch.randn(
            count, *self._noise_shape, generator=generator, dtype=like.dtype, device=like.device
        )

    @torch.no_grad()
    def generate(
        self,
        count: int,
        classes: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw examples, in evaluation mode and without gradients.

        Args:
            count: how many (N).
            classes: of each, int64 [N], or of all; by default each is drawn, all alike. None for a
                model without classes.
            generator: of the random numbers; by default torch's own.

        Returns:
            [N, ..], the same ones for the same state of `generator`.

        Raises:
            ValueError: a count below 1, or classes that the model does not have.
        """
        if type(count) is not int or count < 1:
            raise ValueError(f"count must be an int of at least 1, got {count!r}")
        labels = self._classes(count, classes, generator)
        noise = self.noise(count, generator)
        with evaluating(self):
            parts = [
                self.average(noise[rows], None if labels is None else labels[rows])
                for rows in torch.arange(count, device=noise.device).split(_AT_ONCE)
            ]
        return torch.cat(parts)

    def _classes(
        self, count: int, classes: int | Tensor | None, generator: torch.Generator | None
    ) -> Tensor | None:
        known = self.config.num_classes
        if known is None:
            if classes is not None:
                raise ValueError("classes must be None for a model without classes")
            return None
        device = next(self.parameters()).device
        if classes is None:
            return torch.randint(known, (count,), generator=generator, device=device)
        labels = torch.as_tensor(classes, device=device)
        if labels.dtype != torch.int64 or labels.shape not in [(), (count,)]:
            raise ValueError(
                f"classes must be an int or int64 [{count}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= known:
            raise ValueError(
                f"classes must be from 0 to {known - 1}, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.expand(count)
