"""A generative adversarial network for images: convolutions and fused self-attention."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .adversarial import AdversarialModel
from .config import MAX_SIZE, check_sizes
from .transformer import FUSED, PLAIN, Functions, SelfAttention

_LARGEST_START = 7


@dataclass(frozen=True)
class GANConfig:
    """Sizes of a `GAN`.

    image_size: height and width: 4, 5, 6 or 7 times a power of two above one (8, 28, 32, 64).
    channels: 1 (grey) or 3 (RGB).
    num_classes: None for a model without classes.
    latent_dim: of the noise, and of a class's embedding.
    width: channels at the full image size, a multiple of `num_heads`; each halving doubles them.
    num_heads: of attention.
    spectral_norm: whether the discriminator's weights are divided by their largest singular value
        (Miyato et al. 2018, https://arxiv.org/abs/1802.05957): for every loss but "wgan-gp".

    Raises:
        ValueError: a size that is no int or out of range, or one that does not fit another.
    """

    image_size: int
    channels: int = 1
    num_classes: int | None = 10
    latent_dim: int = 64
    width: int = 32
    num_heads: int = 4
    spectral_norm: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "latent_dim", "width", "num_heads")
        if self.num_classes is not None:
            check_sizes(self, "num_classes")
        start, halvings = self.levels
        if not (4 <= start <= _LARGEST_START and halvings):
            raise ValueError(
                "image_size must be 4, 5, 6 or 7 times a power of two above one, "
                f"got {self.image_size}"
            )
        if self.width << halvings > MAX_SIZE:
            raise ValueError(
                f"width, times {1 << halvings} by image_size {self.image_size}, must be at most "
                f"{MAX_SIZE:,}, got {self.width}"
            )
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels!r}")
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads {self.num_heads}, got {self.width}"
            )
        if type(self.spectral_norm) is not bool:
            raise ValueError(f"spectral_norm must be True or False, got {self.spectral_norm!r}")

    @property
    def levels(self) -> tuple[int, int]:
        """The image size that generation starts from, and how often it is doubled."""
        size, halvings = self.image_size, 0
        while size > _LARGEST_START and size % 2 == 0:
            size, halvings = size // 2, halvings + 1
        return size, halvings


class ImageAttention(nn.Module):
    """x + gate * attention(x), of the pixels of an image to one another.

    Zhang et al. 2018, https://arxiv.org/abs/1805.08318, equation 3, with heads and the scale of
    Vaswani et al.; the gate is zero at first, so that a network learns what is near before what is
    far.
    """

    def __init__(self, channels: int, num_heads: int, functions: Functions) -> None:
        super().__init__()
        self.attention = SelfAttention(channels, num_heads, 0.0, True, functions)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # [B, H * W, C]
        attended = self.attention(pixels).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.gate * attended


class _Modulated(nn.Module):
    """BatchNorm whose gain and bias depend on the condition, then ReLU."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.modulation = nn.Linear(condition_dim, 2 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = self.modulation(condition)[:, :, None, None].chunk(2, 1)  # [B, C, 1, 1]
        return F.relu(torch.addcmul(bias, self.norm(x), 1 + gain))


class Generator(nn.Module):
    """Noise [B, Z] and classes int64 [B] to images [B, C, H, W] in [-1, 1].

    A Linear gives the smallest image, and each level a modulated BatchNorm (de Vries et al. 2017,
    https://arxiv.org/abs/1707.00683), ReLU, twice the size and a convolution; attention follows
    the first of them.
    """

    def __init__(self, config: GANConfig, functions: Functions) -> None:
        super().__init__()
        self.size, halvings = config.levels
        condition_dim = config.latent_dim
        self.embedding = None
        if config.num_classes is not None:
            self.embedding = nn.Embedding(config.num_classes, config.latent_dim)
            condition_dim += config.latent_dim
        widths = [config.width << level for level in range(halvings, -1, -1)]
        self.start = nn.Linear(condition_dim, widths[0] * self.size**2)
        self.norms = nn.ModuleList(_Modulated(width, condition_dim) for width in widths)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, 3, padding=1, bias=False) for pair in itertools.pairwise(widths)
        )
        self.attention = ImageAttention(widths[1], config.num_heads, functions)
        self.output = nn.Conv2d(config.width, config.channels, 3, padding=1)

    def forward(self, noise: Tensor, classes: Tensor | None = None) -> Tensor:
        condition = noise
        if self.embedding is not None:
            condition = torch.cat([noise, self.embedding(classes)], 1)
        x = self.start(condition).unflatten(1, (-1, self.size, self.size))  # [B, C, h, w]
        *norms, last = self.norms
        for level, (norm, convolution) in enumerate(zip(norms, self.convolutions, strict=True)):
            x = convolution(F.interpolate(norm(x, condition), scale_factor=2))
            if level == 0:
                x = self.attention(x)
        return torch.tanh(self.output(last(x, condition)))


class Discriminator(nn.Module):
    """Images [B, C, H, W] and classes int64 [B] to scores [B].

    What the generator does, backwards, without normalisation of batches: a gradient penalty is of
    each image alone. The class's embedding is projected onto the features (Miyato and Koyama 2018,
    https://arxiv.org/abs/1802.05637, equation 3).
    """

    def __init__(self, config: GANConfig, functions: Functions) -> None:
        super().__init__()
        _, halvings = config.levels
        widths = [config.width << level for level in range(halvings + 1)]
        self.input = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in itertools.pairwise(widths)
        )
        self.attention = ImageAttention(widths[-2], config.num_heads, functions)
        self.output = nn.Linear(widths[-1], 1)
        self.embedding = None
        if config.num_classes is not None:
            self.embedding = nn.Embedding(config.num_classes, widths[-1])
        if config.spectral_norm:
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                    spectral_norm(module)

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        x = self.input(images)
        for level, convolution in enumerate(self.convolutions):
            if level == len(self.convolutions) - 1:
                x = self.attention(x)
            x = convolution(F.leaky_relu(x, 0.2))
        features = F.leaky_relu(x, 0.2).sum((2, 3))  # [B, C]
        score = self.output(features).squeeze(1)
        if self.embedding is not None:
            score = score + (self.embedding(classes) * features).sum(1)
        return score


class GAN(AdversarialModel):
    """Draws images, of a class where there are classes.

    A `Generator` and a `Discriminator` of convolutions, each with self-attention where the image is
    twice its smallest size (Zhang et al. 2018, https://arxiv.org/abs/1805.08318).

    `fused` chooses what computes attention: the ops of genkernels, or for False the very same model
    in plain PyTorch. Both have one `state_dict` and, for a seed, the same initial values.
    `generate` returns [N, C, H, W] in [-1, 1].
    """

    name = "gan"

    def __init__(self, config: GANConfig, fused: bool = True) -> None:
        functions = FUSED if fused else PLAIN
        super().__init__(
            config,
            Generator(config, functions),
            Discriminator(config, functions),
            noise_shape=(config.latent_dim,),
        )
