"""The linear map with an activation, and its gradient."""

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    return activate(F.linear(input, weight, bias), activation)


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    return x


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    activation: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of input (where weight is given), weight (where input is given) and bias, as
    functions that can be differentiated themselves.

    `saved` is what the activation was taken of, of "relu" what it gave; None without activation.
    """
    delta = grad_output if saved is None else through_activation(grad_output, saved, activation)
    rows = delta.reshape(delta.shape[:-1].numel(), delta.size(-1))  # [M, N]
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = delta @ weight
    if input is not None:
        grad_weight = rows.T @ input.reshape(len(rows), input.size(-1))
    return grad_input, grad_weight, rows.sum(0)


def through_activation(grad_output: Tensor, saved: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return aten.threshold_backward(grad_output, saved, 0)
    if activation == "silu":  # aten.silu_backward has no derivative
        sigmoid = torch.sigmoid(saved)
        return grad_output * (sigmoid * (1 + saved * (1 - sigmoid)))
    approximate = "none" if activation == "gelu" else "tanh"
    return aten.gelu_backward(grad_output, saved, approximate=approximate)
