"""The linear map, with the activation that follows it."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter

from .. import backend, reference
from .library import (
    apply,
    autocast,
    autocast_dtype,
    define,
    described,
    is_autocast_enabled,
    is_transformed,
    needs_autograd,
)

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")

# Up to here, without gradients, the kernel is at least as fast whatever the size.
MOST_FEW_ROWS = 32
# From here on the kernel is at least as fast, packing included; measured.
LEAST_ROWS = 64  # with gradients
LEAST_PRODUCTS = 2**22
LEAST_PRODUCTS_BESIDE_MKL = 2**30

# Other subclasses (quantised or distributed weights, for example) have a product of their own.
_PLAIN = (Tensor, Parameter, FakeTensor)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """The linear map of the last dimension and the activation that follows it.

    Equivalent to: ``activate(torch.nn.functional.linear(input, weight, bias))``, where activate is
    ``F.relu`` for "relu", ``F.gelu`` for "gelu", ``F.gelu(.., approximate="tanh")`` for
    "gelu_tanh", ``F.silu`` for "silu", and nothing for None.

    The compiled CPU kernel reads the weight as it lies, shared out over the threads, where input
    has few rows: at most 32, and 6 of bfloat16 that has to be widened. Larger products pack the
    weight at each call and take the activation while its argument is in registers; the backward
    pass takes its derivative while it reads grad_output. bfloat16 is summed in float32, and rounded
    once, after the activation. Under autocast to bfloat16 float32 parameters that are trained are
    narrowed as they are packed, and their gradients are not rounded to bfloat16.

    What PyTorch does as fast is handed over to it, without a warning: gradients of fewer than 64
    rows; products of fewer than 2^22 elements of more than 32 rows; in float32 and float64 of fewer
    than 2^30, with gradients or without an activation, where PyTorch multiplies with MKL on an
    Intel CPU. So are torch.func, other devices and dtypes, and tensor subclasses.
    ``explain("linear", input, weight)`` says so, and ``stats()`` counts it as
    ``("linear", "reference")``.

    Args:
        input: [.., K], any strides and any number of leading dimensions, whose product is the
            number of rows. float32, bfloat16 or float64 in the compiled CPU kernel.
        weight: [N, K]. One that is not contiguous is copied by the kernel at every call.
        bias: [N]. Default None.
        activation: None, "relu", "gelu" (Hendrycks and Gimpel 2016,
            https://arxiv.org/abs/1606.08415, x times the normal distribution's integral up to x),
            "gelu_tanh" (the approximation of its section 2), or "silu" (x sigmoid(x)). Default
            None.

    Returns:
        [.., N], in input's dtype; under autocast in autocast's dtype. From 1 MiB on its storage
        cannot be resized.

    The result can be differentiated to any order, from the second on by plain PyTorch. Forward-mode
    differentiation is PyTorch's own. Of the arguments, those are kept for the backward pass that
    PyTorch's own keeps: input for weight's gradient, weight for input's.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; where the kernel was to run, the
            message names the argument and both shapes.
        ValueError: an unknown activation.
    """
    tensors: Any = (input, weight, bias)
    handover = _handover(*tensors, activation=activation)
    if handover is None:
        device = "cpu" if input.is_cpu else input.device.type  # whose text has to be made
        tensors = _autocast(device, *tensors)
    if backend.select("linear", input.device, tensors[0].dtype, handover) == "reference":
        backend.count("linear", "reference")
        return reference.linear(input, weight, bias, activation)
    try:
        if needs_autograd(*tensors):
            return apply(_Linear, *tensors, activation, *map(needs_autograd, tensors))[0]
        return _linear_forward(*tensors, ACTIVATIONS.index(activation))
    except RuntimeError:  # the compiled op checks faster, and the check says it better
        _check(*tensors)
        raise


def _autocast(device: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """Where gradients are recorded, float32 parameters stay beside a bfloat16 input: the kernel
    narrows them as it packs them, and does not round their gradients. That spares two copies of
    each in a step."""
    if not is_autocast_enabled(device):
        if weight.dtype != input.dtype:
            _check(input, weight, bias, takes_wider=False)
        return input, weight, bias
    if needs_autograd(input, weight, bias) and autocast_dtype(input) == torch.bfloat16:
        parameters = (weight,) if bias is None else (weight, bias)
        if all(parameter.dtype == torch.float32 for parameter in parameters):
            return *autocast(device, input), weight, bias
    return autocast(device, input, weight, bias)


def check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")


@backend.hands_over("linear")
def _handover(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> str | None:
    check_activation(activation)
    tensors = [t for t in (input, weight, bias) if t is not None]
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return "an argument is of a tensor subclass"
        if tensor.layout is not torch.strided:
            return "an argument is sparse"
    if is_transformed():
        return "a torch.func transform or forward-mode differentiation is under way"
    if weight is not None and weight.dim() < 2:
        return f"weight has {weight.dim()} dimensions"
    if bias is not None and (
        bias.dim() != 1 or (bias.numel() == 1 and weight is not None and weight.size(0) != 1)
    ):
        return f"bias has shape {list(bias.shape)}, which is broadcast"
    rows = input.size(0) if input.dim() == 2 else math.prod(input.shape[:-1])
    if not isinstance(rows, int) and torch.compiler.is_exporting():
        return "the number of rows is not known yet: an exported program is for any"
    is_recorded = needs_autograd(*tensors)
    if weight is None or (rows <= MOST_FEW_ROWS and not is_recorded):
        return None
    if is_recorded and rows < LEAST_ROWS:
        return described(
            lambda: (
                f"gradients are recorded and input has {rows} rows, and below {LEAST_ROWS} "
                "PyTorch's own are as fast"
            )
        )
    least = LEAST_PRODUCTS
    if (is_recorded or activation is None) and autocast_dtype(input) != torch.bfloat16:
        least = LEAST_PRODUCTS_BESIDE_MKL if backend.MKL_IS_AT_ITS_BEST else least
    products = rows * weight.size(0) * weight.size(1)
    if products < least:
        return described(
            lambda: (
                f"there are {products} products of elements of {rows} rows, and below {least} "
                "PyTorch's own are as fast"
            )
        )
    return None


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, *, takes_wider: bool = True) -> None:
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
    is_wider = takes_wider and (input.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    whose, like = ("weight", weight) if is_wider else ("input", input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != like.dtype:
            reject(name, f"{whose}'s dtype {like.dtype}", tensor.dtype)
        if tensor.device != input.device:
            reject(name, f"input's device {input.device}", tensor.device)


class _Linear(torch.autograd.Function):
    """Arguments of `linear`, and whether each tensor's gradient is wanted; nothing else is saved
    than what those need. The second output is what the activation was taken of: an output, so that
    the backward pass is a function of it that can be differentiated."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *needs: bool
    ) -> tuple[Tensor, Tensor | None]:
        index = ACTIVATIONS.index(activation)
        if activation in (None, "relu"):
            return _linear_forward(input, weight, bias, index), None
        return _linear_forward_saving(input, weight, bias, index)

    @staticmethod
    def setup_context(
        ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]
    ) -> None:
        input, weight, _, ctx.activation, needs_input, needs_weight, ctx.needs_bias = args
        ctx.set_materialize_grads(False)  # zeros as large as what is saved
        ctx.save_for_backward(
            input if needs_weight else None,
            weight if needs_input else None,
            output[0] if ctx.activation == "relu" else output[1],
        )
        ctx.is_wider = args[1].dtype != input.dtype

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, weight, saved = ctx.saved_tensors
        activation = ctx.activation
        # Given where a backward pass was differentiated; torch.compile, which can't, gives zeros.
        if grad_saved is not None and not torch.compiler.is_compiling():
            if grad_output is not None:
                through = reference.through_activation(grad_output, saved, activation)
                grad_saved = grad_saved + through
            grad_output, saved, activation = grad_saved, None, None
        if grad_output is None:
            return (None,) * 7
        gradients: tuple[Tensor | None, ...]
        if torch.is_grad_enabled() or is_transformed():
            gradients = _reference_gradients(
                grad_output, input, weight, saved, activation, ctx.is_wider
            )
        else:
            index = ACTIVATIONS.index(activation)
            gradients = _linear_backward(
                grad_output, input, weight, saved, index, ctx.needs_bias, ctx.is_wider
            )
        grad_input, grad_weight, grad_bias = gradients
        return (
            None if weight is None else grad_input,
            None if input is None else grad_weight,
            grad_bias if ctx.needs_bias else None,
            *(None,) * 4,
        )


def _narrowed(parameter: Tensor | None, like: Tensor) -> Any:
    return None if parameter is None else parameter.to(like.dtype)


def _reference_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    activation: str | None,
    is_wider: bool,
) -> tuple[Tensor | None, ...]:
    weight = _narrowed(weight, grad_output)
    gradients = reference.linear_backward(grad_output, input, weight, saved, activation)
    if not is_wider:
        return gradients
    grad_input, grad_weight, grad_bias = gradients
    return grad_input, None if grad_weight is None else grad_weight.float(), grad_bias.float()


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    _check(input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.size(0)))


def _fake_forward_saving(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(*args), _fake_forward(*args)


def _reference_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: int
) -> Tensor:
    weight, bias = _narrowed(weight, input), _narrowed(bias, input)
    return reference.linear(input, weight, bias, ACTIVATIONS[activation])


def _reference_forward_saving(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    x = _reference_forward(input, weight, bias, ACTIVATIONS.index(None))
    return reference.activate(x, ACTIVATIONS[activation]), x


def _fake_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    activation: int,
    needs_bias: bool,
    is_wider: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N = grad_output.size(-1)
    K = weight.size(1) if weight is not None else input.size(-1) if input is not None else 0
    leading = grad_output.shape[:-1] if weight is not None else (0,)
    dtype = torch.float32 if is_wider else grad_output.dtype
    return (
        grad_output.new_empty((*leading, K)),
        grad_output.new_empty((0 if input is None else N, K), dtype=dtype),
        grad_output.new_empty(N if needs_bias else 0, dtype=dtype),
    )


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_output, input, weight, saved, activation, _, is_wider = args
    gradients = _reference_gradients(
        grad_output, input, weight, saved, ACTIVATIONS[activation], is_wider
    )
    return tuple(
        empty if empty.numel() == 0 or gradient is None else gradient.contiguous()
        for gradient, empty in zip(gradients, _fake_backward(*args), strict=True)
    )


_linear_forward = define(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, int activation) -> Tensor",
    _reference_forward,
    _fake_forward,
)
_linear_forward_saving = define(
    "linear_forward_saving(Tensor input, Tensor weight, Tensor? bias, int activation) "
    "-> (Tensor, Tensor)",
    _reference_forward_saving,
    _fake_forward_saving,
)
_linear_backward = define(
    "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? saved, "
    "int activation, bool needs_bias, bool is_wider) -> (Tensor, Tensor, Tensor)",
    _reference_backward,
    _fake_backward,
)
