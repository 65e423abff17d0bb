"""The linear map of few rows, as a model that generates token by token applies it."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter

from .. import backend, reference
from .library import autocast, define, is_transformed, needs_autograd

# Up to here reading the weight is most of what a call costs; from here on a product that packs its
# operands is faster.
MOST_ROWS = 32

# Other subclasses (quantised or distributed weights, for example) have a product of their own.
_PLAIN = (Tensor, Parameter, FakeTensor)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear map of the last dimension, ``input @ weight.T + bias``.

    Equivalent to: ``torch.nn.functional.linear(input, weight, bias)``.

    The compiled CPU kernel runs where no gradient is recorded and input has at most 32 rows: there
    a call is the reading of the weight, which the kernel shares out over the threads. Everything
    else (gradients, more rows, torch.func, other devices and dtypes, tensor subclasses) is handed
    over to PyTorch's own, without a warning; ``explain("linear", input, weight)`` says so, and
    ``stats()`` counts it as ``("linear", "reference")``.

    Args:
        input: [.., K], any strides and any number of leading dimensions, whose product is the
            number of rows. float32, bfloat16 or float64 in the compiled CPU kernel.
        weight: [N, K]. One that is not contiguous is copied by the kernel at every call.
        bias: [N]. Default None.

    Returns:
        [.., N], in input's dtype; under autocast in autocast's dtype.

    Gradients are PyTorch's own, to any order and in forward mode too.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; where the kernel was to run, the
            message names the argument and both shapes.
    """
    tensors: Any = (input, weight, bias)
    handover = _handover(*tensors)
    if handover is None:
        tensors = autocast(input.device.type, *tensors)
    if backend.select("linear", input.device, tensors[0].dtype, handover) == "reference":
        backend.count("linear", "reference")
        return reference.linear(input, weight, bias)
    try:
        return _linear_forward(*tensors)
    except RuntimeError:  # the compiled op checks faster, and the check says it better
        _check(*tensors)
        raise


@backend.hands_over("linear")
def _handover(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    tensors = [t for t in (input, weight, bias) if t is not None]
    if any(type(t) not in _PLAIN for t in tensors):
        return "an argument is of a tensor subclass"
    if needs_autograd(*tensors):
        return "gradients are recorded, and PyTorch's own products are as fast there"
    if is_transformed():
        return "a torch.func transform or forward-mode differentiation is under way"
    if any(t.layout is not torch.strided for t in tensors):
        return "an argument is sparse"
    if weight is not None and weight.dim() == 1:
        return "weight has one dimension"
    rows = math.prod(input.shape[:-1])
    if not isinstance(rows, int) and torch.compiler.is_exporting():
        return "the number of rows is not known yet: an exported program is for any"
    if rows > MOST_ROWS:
        return (
            f"input has {rows} rows, and from {MOST_ROWS + 1} on PyTorch's own product is as fast"
        )
    return None


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    def reject(name: str, expected: str, got: object) -> NoReturn:
        raise RuntimeError(f"genkernels.linear: {name}: expected {expected}, got {got}")

    if input.dim() == 0:
        reject("input", "at least 1 dimension", "shape []")
    if weight.dim() != 2:
        reject("weight", "2 dimensions", f"shape {list(weight.shape)}")
    N, K = weight.shape
    if input.size(-1) != K:
        expected = f"shape {[*input.shape[:-1], K]} beside weight of shape {list(weight.shape)}"
        reject("input", expected, f"{list(input.shape)}")
    if bias is not None and bias.shape != (N,):
        reject("bias", f"shape {[N]}", f"{list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            reject(name, f"input's dtype {input.dtype}", tensor.dtype)
        if tensor.device != input.device:
            reject(name, f"input's device {input.device}", tensor.device)


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.size(0)))


_linear_forward = define(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    reference.linear,
    _fake_forward,
)
