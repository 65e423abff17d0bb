"""Dropout without a mask in memory, and its sum with a residual."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import backend, reference
from .library import apply, define, draw_seed, is_transformed, map_slices, needs_autograd


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, *, residual: Tensor | None = None
) -> Tensor:
    """Zeros in place of a random part of the elements, and the others divided by 1 - p.

    Equivalent to: ``F.dropout(input, p, training)``, and ``residual + F.dropout(input, p,
    training)`` with a residual.

    The compiled CPU kernel saves one number for the backward pass, which makes the mask anew; it
    uses all threads, and forms the sum with residual in the same pass. What is dropped follows from
    torch's default generator (one number of it at each call that drops anything) and from an
    element's place, in the order of a contiguous tensor: not from the number of threads, and not
    from the memory layout. It differs from what PyTorch's own drops for the same seed.

    Args:
        input: any shape. float32, float64, bfloat16 or float16 in the compiled CPU kernel; the last
            two are computed in float32 and rounded once, also with residual. One that is not
            contiguous is copied.
        p: the probability with which an element is dropped: multiplied with zero, so that NaN and
            infinity become NaN as in PyTorch. Default 0.5.
        training: whether anything is dropped. Default True.
        residual: what is added. Of another shape or dtype than input it is added by PyTorch, which
            broadcasts and promotes the two. Default None.

    Returns:
        Of input's shape and dtype, contiguous; input itself where nothing is dropped or added. From
        1 MiB on its storage cannot be resized.

    It can be differentiated to any order: the gradient is an op of the same kind. Forward mode
    raises; ``use_backend("reference")`` has it.

    Raises:
        ValueError: a p outside [0, 1].

    Source: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html, scaled in
    training; random numbers from Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"genkernels.dropout: p: expected a number in [0, 1], got {p}")
    if p == 0 or not training:
        return input if residual is None else residual + input
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        return residual + dropout(input, p)
    seed = draw_seed(input.device)
    if backend.select("dropout", input.device, input.dtype) == "reference":
        if not (input.is_floating_point() or input.is_complex()):
            raise RuntimeError(
                f"genkernels.dropout: input: expected a floating-point dtype, got {input.dtype}"
            )
        backend.count("dropout", "reference")
        return reference.dropout(input, seed, p, residual)
    return _run(input, seed, p, residual)


def _run(input: Tensor, seed: Tensor, p: float, residual: Tensor | None) -> Tensor:
    if needs_autograd(input, residual) or is_transformed():
        return apply(_Dropout, input, seed, p, residual)[0]
    return _dropout(input, seed, p, residual)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, seed: Tensor, p: float, residual: Tensor | None
    ) -> tuple[Tensor]:  # of which map_slices makes as many
        return (_dropout(input, seed, p, residual),)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor]) -> None:
        _, seed, ctx.p, _ = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_input = None
        if grad_output is not None and ctx.needs_input_grad[0]:
            (seed,) = ctx.saved_tensors
            grad_input = _run(grad_output, seed, ctx.p, None)
        return grad_input, None, None, grad_output if ctx.needs_input_grad[3] else None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return map_slices(_Dropout, info, in_dims, args)


def _fake(input: Tensor, seed: Tensor, p: float, residual: Tensor | None) -> Tensor:
    def reject(name: str, expected: object, got: object) -> NoReturn:
        raise RuntimeError(f"genkernels.dropout: {name}: expected {expected}, got {got}")

    if not 0 <= p <= 1:
        reject("p", "a number in [0, 1]", p)
    if seed.dtype != torch.int64 or seed.shape != (1,):
        reject("seed", "int64 of shape [1]", f"{seed.dtype} of shape {list(seed.shape)}")
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        expected = f"{input.dtype} of shape {list(input.shape)}"
        reject("residual", expected, f"{residual.dtype} of shape {list(residual.shape)}")
    return input.new_empty(input.shape)


def _reference(input: Tensor, seed: Tensor, p: float, residual: Tensor | None) -> Tensor:
    return reference.dropout(input, seed, p, residual).contiguous()


# seed is int64 [1], residual of input's shape and dtype.
_dropout = define(
    "dropout(Tensor input, Tensor seed, float p, Tensor? residual) -> Tensor", _reference, _fake
)
