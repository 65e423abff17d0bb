"""A generative adversarial network for series: a GRU against a GRU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import GRU
from .adversarial import AdversarialModel
from .config import check_sizes


@dataclass(frozen=True)
class RecurrentGANConfig:
    """Sizes of a `RecurrentGAN`: at most 1,000,000, and at most 1,000 layers.

    length: of a series (T).
    channels: numbers at each time (C).
    num_classes: None for a model without classes.
    latent_dim: of the noise at each time, and of a class's embedding.

    Raises:
        ValueError: a size that is no int or out of range.
    """

    length: int
    channels: int = 1
    num_classes: int | None = None
    latent_dim: int = 8
    hidden_size: int = 64
    num_layers: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, "length", "channels", "latent_dim", "hidden_size", "num_layers")
        if self.num_classes is not None:
            check_sizes(self, "num_classes")


class _Recurrent(nn.Module):
    """Linear(GRU([input, embedding of the class])), the class the same at each time."""

    def __init__(
        self, config: RecurrentGANConfig, inputs: int, outputs: int, gru: type[nn.Module]
    ) -> None:
        super().__init__()
        self.embedding = None
        if config.num_classes is not None:
            self.embedding = nn.Embedding(config.num_classes, config.latent_dim)
            inputs += config.latent_dim
        self.inputs = inputs
        self.gru = gru(inputs, config.hidden_size, config.num_layers, batch_first=True)
        self.output = nn.Linear(config.hidden_size, outputs)

    def with_class(self, input: Tensor, classes: Tensor | None) -> Tensor:
        if self.embedding is None:
            return input
        embedded = self.embedding(classes)[:, None].expand(-1, input.shape[1], -1)
        return torch.cat([input, embedded], 2)


class SeriesGenerator(_Recurrent):
    """Noise [B, T, Z] and classes int64 [B] to series [B, T, C].

    The first state is a map of the first noise: from zeros, the first numbers of a series would
    have a distribution of their own.
    """

    def __init__(self, config: RecurrentGANConfig, gru: type[nn.Module]) -> None:
        super().__init__(config, config.latent_dim, config.channels, gru)
        self.num_layers = config.num_layers
        self.start = nn.Linear(self.inputs, config.num_layers * config.hidden_size)

    def forward(self, noise: Tensor, classes: Tensor | None = None) -> Tensor:
        input = self.with_class(noise, classes)  # [B, T, I]
        hx = torch.tanh(self.start(input[:, 0]))  # [B, layers * H]
        hx = hx.unflatten(1, (self.num_layers, -1)).transpose(0, 1).contiguous()
        output, _ = self.gru(input, hx)  # [B, T, H]
        return self.output(output)


class SeriesDiscriminator(_Recurrent):
    """Series [B, T, C] and classes int64 [B] to scores [B]: the mean of the scores at each time,
    each of which is of what came up to then (Esteban et al. 2017, section 3)."""

    def __init__(self, config: RecurrentGANConfig, gru: type[nn.Module]) -> None:
        super().__init__(config, config.channels, 1, gru)

    def forward(self, series: Tensor, classes: Tensor | None = None) -> Tensor:
        output, _ = self.gru(self.with_class(series, classes))  # [B, T, H]
        return self.output(output).mean((1, 2))


class RecurrentGAN(AdversarialModel):
    """Draws series, of a class where there are classes.

    Generator and discriminator are `Linear(GRU(input))`, with the embedding of the class in the
    input at each time (Esteban et al. 2017, https://arxiv.org/abs/1706.02633, section 3).

    `fused` chooses the recurrent layers: `genkernels.nn.GRU`, or for False `torch.nn.GRU`. Both
    have one `state_dict` and, for a seed, the same initial values. `generate` returns [N, T, C].
    """

    name = "recurrent-gan"

    def __init__(self, config: RecurrentGANConfig, fused: bool = True) -> None:
        gru = GRU if fused else nn.GRU
        super().__init__(
            config,
            SeriesGenerator(config, gru),
            SeriesDiscriminator(config, gru),
            noise_shape=(config.length, config.latent_dim),
        )
