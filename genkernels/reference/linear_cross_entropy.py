"""The softmax cross-entropy of a linear map, its gradients, and the gradients of those."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    shape = linear_weight.shape[:-1]  # [V], or of several losses for each row [V, ..]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, shape)
    return _cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing)


def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits = F.linear(input, linear_weight, linear_bias)  # [.., V]
    return -F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)


def linear_cross_entropy_pass(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    *,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the most likely class of each row, and the gradients of input, linear_weight and
    linear_bias along grad_loss (1 by default). Loss and grad_loss of bfloat16 and float16 are
    float32."""
    logits = F.linear(input, linear_weight, linear_bias)  # [N, V]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
        weight = None if weight is None else weight.float()
    loss = _cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing)
    kept = target != ignore_index  # [N]
    classes = torch.where(kept, target, 0)
    weights = logits.new_ones(logits.size(1)) if weight is None else weight  # [V]
    of_target = weights[classes] * kept  # [N]
    scale = kept.to(logits.dtype)
    if reduction == "mean":
        scale = scale / of_target.sum()
    if grad_loss is not None:
        scale = scale * grad_loss
    V, rest = logits.size(1), 1 - label_smoothing
    total = rest * of_target + label_smoothing / V * weights.sum()  # [N]
    gradient = total[:, None] * logits.softmax(-1) - label_smoothing / V * weights  # [N, V]
    gradient = gradient.scatter_add(1, classes[:, None], -rest * of_target[:, None])
    gradient = torch.where(kept[:, None], gradient * scale[:, None], 0).to(input.dtype)
    return (
        loss,
        logits.argmax(-1),
        gradient @ linear_weight,
        gradient.mT @ input,
        gradient.sum(0),
    )


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
