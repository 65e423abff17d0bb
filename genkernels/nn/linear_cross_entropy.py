"""The last linear layer of a language model with its loss."""

from typing import Any

import torch
from torch import Tensor

from ..ops import linear_cross_entropy
from ..ops.linear_cross_entropy import REDUCTIONS


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear layer and the softmax cross-entropy of its output, without its output.

    Equivalent to: ``torch.nn.LinearCrossEntropyLoss`` of torch 2.13, with the same arguments but
    for ``out_features`` and ``options``, the same parameters (``linear.weight``, ``linear.bias``)
    and, for the same seed, the same initial values; a state_dict of one loads into the other.
    It runs :func:`genkernels.linear_cross_entropy`, on torch 2.10 too.

    Args:
        in_features: size of each input row (K).
        num_classes: number of classes (V).
        bias: whether ``linear`` has a ``bias``. Default False, as in PyTorch.
        reduction: "none", "mean" or "sum". Default "mean".
        weight: of each class in the loss, [V]; a buffer. Default None: all 1.
        ignore_index: target of rows that count for nothing. Default None: -100.
        label_smoothing: in [0, 1]. Default 0.

    Shapes of ``forward(input, target)``: input [N, K] or [K], target int64 [N] or []; the loss is
    [N] (or []) with reduction "none", else [].

    Raises:
        ValueError: a weight of another shape, an unknown reduction or a label_smoothing outside
            [0, 1].
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight: expected shape {[num_classes]}, got {list(weight.shape)}")
        if reduction not in REDUCTIONS:
            expected = ", ".join(REDUCTIONS)
            raise ValueError(f"reduction: expected one of {expected}, got {reduction!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        self.reduction = reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing = label_smoothing
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
