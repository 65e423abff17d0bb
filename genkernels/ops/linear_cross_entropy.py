"""The softmax cross-entropy of a linear map: the last layer of a language model with its loss."""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

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

REDUCTIONS = ("none", "mean", "sum")

# Fewer rows, or fewer products of elements, are as fast with logits in memory: the compiled kernel
# packs its weight at each call.
LEAST_ROWS = 256
LEAST_PRODUCTS = 2**24


class LinearLogProb(NamedTuple):
    """`log_prob` [N] is ln P(target) of each row in nats, `prediction` int64 [N] the most likely
    class."""

    log_prob: Tensor
    prediction: Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy between ``softmax(input @ linear_weight.T + linear_bias)`` and target.

    Equivalent to: ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight,
    ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)``, and with the
    signature of torch 2.13's ``F.linear_cross_entropy`` but for its options.

    The compiled kernel never holds more logits than those of 256 rows, of 512 where linear_weight
    is large. With the reductions "mean" and "sum" it forms the gradients while the logits are at
    hand, so that the backward pass computes nothing; with "none" the backward pass computes the
    logits again. The Triton kernels hold no logits, but a part of their gradients: 256 MiB, or as
    many bytes as input has; those of float16 are formed in the backward pass with every reduction,
    since they depend on the loss's scale. Nothing is formed that no argument's ``requires_grad``
    asks for. Class probabilities as target, a linear_weight of more than two dimensions and
    torch.func transforms are handed over to the plain PyTorch expression, and from the compiled
    kernel fewer than 256 rows or 2^24 products of elements, too; ``explain`` says so.

    Args:
        input: [N, K] or [K]. float32, bfloat16 or float64 in the compiled CPU kernel, float32,
            bfloat16 or float16 in the Triton kernels; what is narrower is summed in float32.
        linear_weight: [V, K].
        target: int64 [N] (or []), each in [0, V) or ignore_index.
        linear_bias: [V]. Default None.
        weight: of each class in the loss, [V], at least 0. Default None: all 1.
        reduction: "none", "mean" (over the targets, by their classes' weight) or "sum".
        ignore_index: target of rows that count for nothing. Default -100.
        label_smoothing: in [0, 1], the part of each target that is spread over all classes
            (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7). Default 0.

    Returns:
        The loss in nats: [N] with reduction "none", else a scalar; in input's dtype. "mean" over no
        target is NaN, as in PyTorch, and its gradients are zero.

    The loss can be differentiated twice; the second time runs the plain PyTorch expression.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.
        IndexError: a target that is neither a class nor ignore_index. The Triton kernels, for which
            a look would wait for the device, make its loss and gradients NaN instead.
        ValueError: an unknown reduction, or a label_smoothing outside [0, 1].
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    settings = (reduction, ignore_index, label_smoothing)
    tensors = _checked(input, linear_weight, target, linear_bias, weight)
    target = tensors[2]
    handover = _handover(input, linear_weight, target, linear_bias=linear_bias, weight=weight)
    chosen = backend.select("linear_cross_entropy", input.device, autocast_dtype(input), handover)
    if chosen == "reference":
        backend.count("linear_cross_entropy", "reference")
        if weight is not None and not is_autocast_enabled(input.device.type):
            tensors = (*tensors[:4], weight.to(input.dtype))
        arguments: tuple[Any, ...] = (*tensors, *settings)
        return reference.linear_cross_entropy(*arguments)
    return _loss_and_prediction(tensors, settings, predicts=False)[0]


def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None
) -> LinearLogProb:
    """The log-probability of each target, and the most likely class, in one pass.

    Equivalent to: ``-F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)`` with
    ``logits = F.linear(input, linear_weight, linear_bias)``.

    What evaluating a language model needs. Arguments, gradients, errors and what is handed over
    are those of :func:`linear_cross_entropy`.

    Returns:
        ``LinearLogProb(log_prob [N], prediction int64 [N])``.
    """
    tensors = _checked(input, linear_weight, target, linear_bias, None)
    target = tensors[2]
    handover = _handover(input, linear_weight, target, linear_bias=linear_bias)
    chosen = backend.select("linear_log_prob", input.device, autocast_dtype(input), handover)
    if chosen == "reference":
        backend.count("linear_log_prob", "reference")
        return LinearLogProb(*reference.linear_log_prob(input, linear_weight, target, linear_bias))
    loss, prediction = _loss_and_prediction(tensors, ("none", -100, 0.0), predicts=True)
    return LinearLogProb(-loss, prediction)


@backend.hands_over("linear_cross_entropy")
def _handover(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **settings: Any,
) -> str | None:
    if is_transformed():
        return "a torch.func transform or forward-mode differentiation is under way"
    if target.is_floating_point():
        return "target holds probabilities"
    if linear_weight.dim() != 2:
        return f"linear_weight has {linear_weight.dim()} dimensions"
    if linear_weight.size(0) == 0:
        return "there are no classes"
    if needs_autograd(weight):
        return "the gradient of the classes' weight is asked for"
    rows, products = target.numel(), target.numel() * linear_weight.numel()
    is_small = rows < LEAST_ROWS or products < LEAST_PRODUCTS
    if is_small and backend.prefers_compiled(input.device):
        return described(
            lambda: (
                f"there are {rows} rows and {products} products of elements, and below "
                f"{LEAST_ROWS} and {LEAST_PRODUCTS} PyTorch's own is as fast"
            )
        )
    return None


backend.hands_over("linear_log_prob")(_handover)


def _sum_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _loss_and_prediction(
    tensors: tuple[Any, ...], settings: tuple[str, int, float], predicts: bool
) -> tuple[Tensor, Tensor]:
    input, linear_weight, target, linear_bias, weight = tensors
    sum_dtype = _sum_dtype(input)
    # As torch's own, whose cross_entropy runs in float32 under autocast.
    dtype = torch.float32 if is_autocast_enabled(input.device.type) else input.dtype
    dtype = input.dtype if input.dtype == torch.float64 else dtype
    input, linear_weight, linear_bias = autocast(
        input.device.type, input, linear_weight, linear_bias
    )
    if weight is not None:
        weight = weight.to(sum_dtype)
    rows = torch.atleast_2d(input), linear_weight, torch.atleast_1d(target)
    differentiable = (input, linear_weight, linear_bias)
    needs = [needs_autograd(tensor) for tensor in differentiable]
    if any(needs):
        loss, prediction, *_ = apply(
            _LinearCrossEntropy, *rows, linear_bias, weight, *settings, predicts, *needs
        )
    else:
        loss, prediction, *_ = _pass(*rows, linear_bias, weight, None, *settings, predicts)
    if settings[0] == "none":
        loss = loss.reshape(target.shape)
    return loss.to(dtype), prediction.reshape(target.shape) if predicts else prediction


def _checked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
) -> tuple[Any, ...]:
    """The tensors, checked whichever way they go, but for forms that only the reference knows."""
    if target.dtype == torch.uint8:
        target = target.long()
    if not target.is_floating_point() and linear_weight.dim() == 2:
        _check(input, linear_weight, target, linear_bias, weight)
    return input, linear_weight, target, linear_bias, weight


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
) -> None:
    def reject(name: str, expected: str, got: object) -> NoReturn:
        raise RuntimeError(
            f"genkernels.linear_cross_entropy: {name}: expected {expected}, got {got}"
        )

    if input.dim() not in (1, 2):
        reject("input", "1 or 2 dimensions", f"shape {list(input.shape)}")
    V, K = linear_weight.shape
    if input.size(-1) != K:
        expected = f"shape {[*input.shape[:-1], K]} beside linear_weight of shape {[V, K]}"
        reject("input", expected, f"{list(input.shape)}")
    if target.shape != input.shape[:-1]:
        reject("target", f"shape {list(input.shape[:-1])}", f"{list(target.shape)}")
    if target.dtype != torch.int64:
        reject("target", "int64", target.dtype)
    for name, tensor in (("linear_bias", linear_bias), ("weight", weight)):
        if tensor is not None and tensor.shape != (V,):
            reject(name, f"shape {[V]}", f"{list(tensor.shape)}")
    others = {"linear_weight": linear_weight, "linear_bias": linear_bias, "weight": weight}
    for name, tensor in {**others, "target": target}.items():
        if tensor is not None and tensor.device != input.device:
            reject(name, f"input's device {input.device}", tensor.device)
    if is_autocast_enabled(input.device.type):
        return
    for name, tensor in others.items():
        dtypes = (input.dtype, _sum_dtype(input)) if name == "weight" else (input.dtype,)
        if tensor is not None and tensor.dtype not in dtypes:
            reject(name, f"input's dtype {input.dtype}", tensor.dtype)


def _pass(*arguments: Any) -> tuple[Any, ...]:
    """The raw op, with the reduction's name."""
    *tensors, reduction, ignore_index, label_smoothing, predicts = arguments[:10]
    needs = arguments[10:] or (False, False, False)
    settings = (REDUCTIONS.index(reduction), ignore_index, label_smoothing, predicts)
    try:
        return _linear_cross_entropy_pass(*tensors, *settings, *needs)
    except RuntimeError as error:
        # PyTorch's own kind of error for it. Looked for here because no other call needs to know.
        _, found, message = str(error).partition("target: expected classes")
        if found:
            raise IndexError(found + message.splitlines()[0]) from None
        raise


class _LinearCrossEntropy(torch.autograd.Function):
    """Arguments of `_pass` but for grad_loss."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        tensors, settings, needs = args[:5], args[5:9], args[9:]
        if not _forms_gradients(tensors[0], settings[0]):
            needs = (False, False, False)
        return _pass(*tensors, None, *settings, *needs)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, prediction, *gradients = output
        ctx.settings, ctx.needs, ctx.has_given = args[5:9], args[9:], False
        ctx.mark_non_differentiable(prediction, *gradients)
        ctx.set_materialize_grads(False)  # zeros as large as the gradients
        ctx.save_for_backward(*args[:5], *gradients)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 12
        saved = ctx.saved_tensors  # once: under checkpointing each time computes them anew
        tensors: tuple[Any, ...] = saved[:5]
        gradients: Any = saved[5:]
        reduction = ctx.settings[0]
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(tensors, grad_loss, ctx.settings, ctx.needs)
        elif not _forms_gradients(tensors[0], reduction):
            _, _, *gradients = _pass(
                *tensors, grad_loss, reduction, *ctx.settings[1:3], False, *ctx.needs
            )
        elif ctx.has_given or not _is_one(grad_loss):
            gradients = [(gradient * grad_loss).to(gradient.dtype) for gradient in gradients]
        else:  # as they are, but not a second time: the caller may have changed them
            ctx.has_given = True
        input, linear_weight, linear_bias = (
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs, strict=True)
        )
        return input, linear_weight, None, linear_bias, *(None,) * 8


def _forms_gradients(input: Tensor, reduction: str) -> bool:
    """Whether the forward pass does, before the factor of a row's loss is known. Of a mean, float16
    would lose what the factor of a GradScaler is to keep."""
    return reduction != "none" and input.dtype != torch.float16


def _is_one(grad_loss: Tensor) -> bool:
    if torch.compiler.is_compiling() or grad_loss.device.type != "cpu":
        return False  # elsewhere a product takes less than to wait for the device
    try:
        return grad_loss.item() == 1
    except RuntimeError:  # batched gradients have no one value
        return False


def _differentiable_gradients(
    tensors: tuple[Any, ...], grad_loss: Tensor, settings: tuple[Any, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients as functions of all arguments and of grad_loss: those of the reference."""
    input, linear_weight, target, linear_bias, weight = tensors
    weight = None if weight is None else weight.to(input.dtype)
    arguments = (input, linear_weight, target, linear_bias, weight, *settings[:3])
    loss = reference.linear_cross_entropy(*arguments)
    chosen = [
        tensor
        for tensor, needed in zip((input, linear_weight, linear_bias), needs, strict=True)
        if needed
    ]
    found = iter(torch.autograd.grad(loss, chosen, grad_loss.to(loss.dtype), create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    predicts: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    _check(input, linear_weight, target, linear_bias, weight)
    dtype = _sum_dtype(input)
    (N, K), V = input.shape, linear_weight.size(0)
    return (
        input.new_empty((N,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype),
        target.new_empty(N if predicts else 0),
        input.new_empty(N if needs_input else 0, K),
        input.new_empty(V if needs_weight else 0, K),
        input.new_empty(V if needs_bias else 0),
    )


def _reference(*args: Any) -> tuple[Tensor, ...]:
    tensors: Any = args[:6]
    reduction, ignore_index, label_smoothing, predicts = args[6:10]
    outputs = reference.linear_cross_entropy_pass(
        *tensors,
        reduction=REDUCTIONS[reduction],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    needs = (True, predicts, *args[10:])
    return tuple(
        output if needed else output.new_empty(0, *output.shape[1:])
        for output, needed in zip(outputs, needs, strict=True)
    )


_linear_cross_entropy_pass = define(
    "linear_cross_entropy_pass(Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor? linear_bias, Tensor? weight, Tensor? grad_loss, int reduction, int ignore_index, "
    "float label_smoothing, bool predicts, bool needs_input, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
