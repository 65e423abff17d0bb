"""torch.nn.Dropout on the fused op."""

import torch
from torch import Tensor

from ..ops import dropout


class Dropout(torch.nn.Dropout):
    """The dropout of :func:`genkernels.dropout` in training, nothing in evaluation.

    Equivalent to: ``torch.nn.Dropout(p=0.5, inplace=False)``, with the same arguments. What is
    dropped differs from PyTorch's for the same seed.

    Args:
        p: the probability with which an element is dropped. Default 0.5.
        inplace: whether the result is written into input, too, which saves no memory: the gradient
            needs neither. Default False.

    Shapes of ``forward(input, residual=None)``: any; the result is input's shape, or that of the
    sum.

    Raises:
        ValueError: a p outside [0, 1].
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = dropout(input, self.p, self.training, residual=residual)
        return input.copy_(output) if self.inplace else output
