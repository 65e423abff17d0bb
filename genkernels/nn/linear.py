"""torch.nn.Linear on the fused op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import linear
from ..ops.linear import check_activation


class Linear(torch.nn.Linear):
    """The linear map of :func:`genkernels.linear`, and the activation that follows it.

    Equivalent to: ``torch.nn.Linear(in_features, out_features, bias=True)``, with the same
    arguments, the same parameters and, for the same seed, the same initial values; followed by
    ``torch.nn.GELU()`` with ``activation="gelu"``, and so on. A state_dict of one loads into the
    other.

    Args:
        in_features, out_features: columns of the input (K) and of the output (N).
        bias: whether there is a ``bias``. Default True.
        device, dtype: of the parameters. Default: PyTorch's.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu". Default None.

    Shapes of ``forward(input)``: input [.., K], result [.., N].

    Raises:
        ValueError: an unknown activation.
        RuntimeError: a shape or dtype that does not fit.
    """

    activation: str | None = None  # of instances that were made without __init__ as well

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + activation
