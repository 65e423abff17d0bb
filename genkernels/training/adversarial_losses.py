"""What generators and discriminators are trained for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class AdversarialLoss(NamedTuple):
    """Two losses, of scores [B].

    discriminator: (scores of real examples, scores of generated ones) -> mean loss.
    generator: scores of generated examples -> mean loss.
    has_penalty: whether the discriminator's has `gradient_penalty` beside it.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    has_penalty: bool = False


def _minimax(real: Tensor, fake: Tensor) -> Tensor:
    """-E[ln D(x)] - E[ln(1 - D(G(z)))], where D is the sigmoid of a score."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


# By name.
#   minimax, non-saturating: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661, equation 1; in
#     the second the generator maximises ln D(G(z)), which still has a gradient where D is sure.
#   hinge: Lim and Ye 2017, https://arxiv.org/abs/1705.02894; Zhang et al. 2018, equation 4.
#   wgan-gp: Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, equation 3.
ADVERSARIAL_LOSSES = {
    "minimax": AdversarialLoss(_minimax, lambda fake: -F.softplus(fake).mean()),
    "non-saturating": AdversarialLoss(_minimax, lambda fake: F.softplus(-fake).mean()),
    "hinge": AdversarialLoss(_hinge, lambda fake: -fake.mean()),
    "wgan-gp": AdversarialLoss(
        lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean(), has_penalty=True
    ),
}


def gradient_penalty(
    discriminator: nn.Module, real: Tensor, fake: Tensor, classes: Tensor | None = None
) -> Tensor:
    """The mean of (||gradient of the score|| - 1)^2 between real and generated examples.

    Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, equation 3 without its factor: at
    `u * real + (1 - u) * fake`, one u from [0, 1) for each example, of torch's default generator.
    Its gradient is one of a gradient, which the fused ops have.

    Args:
        real, fake: [B, ..]; no gradient reaches them.
        classes: int64 [B] or None, as `discriminator(examples, classes)` takes them.
    """
    u = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device)
    between = torch.lerp(fake.detach(), real.detach(), u).requires_grad_()
    # For models in plain PyTorch: its own fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        score = discriminator(between, classes).sum()
    (gradient,) = torch.autograd.grad(score, between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
