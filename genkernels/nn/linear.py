"""torch.nn.Linear on the op for few rows."""

import torch
from torch import Tensor

from ..ops import linear


class Linear(torch.nn.Linear):
    """The linear map of :func:`genkernels.linear`.

    Equivalent to: ``torch.nn.Linear(in_features, out_features, bias=True)``, with the same
    arguments, the same parameters and, for the same seed, the same initial values. A state_dict of
    one loads into the other.

    The compiled kernel runs under ``torch.no_grad()`` or ``torch.inference_mode()`` (or where no
    parameter requires a gradient), for inputs of few rows: what generates token by token. Training
    runs PyTorch's own.

    Args:
        in_features, out_features: columns of the input (K) and of the output (N).
        bias: whether there is a ``bias``. Default True.

    Shapes of ``forward(input)``: input [.., K], result [.., N].

    Raises:
        RuntimeError: a shape or dtype that does not fit.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
