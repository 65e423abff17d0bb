"""The fused recurrent unit of Elman: a whole sequence (`rnn`)."""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..reference.rnn import rnn_backward, rnn_double_backward, rnn_forward
from .library import apply, autocast, define, is_transformed, map_slices, needs_autograd
from .recurrent import GRADIENTS, INPUTS, check_layer, fake_gradients, new_rows, or_none


def rnn(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One direction of one layer of a recurrent unit with tanh over a whole sequence.

    Equivalent to: ``torch.nn.RNN(I, H)(input, hx[None])`` with these weights, ``h_n[0]`` for
        ``h_n``.

    Args:
        input: [T, B, I], any strides; with ``batch_sizes`` [sum(batch_sizes), I], as
            ``PackedSequence.data``. float32, bfloat16 or float64 in the compiled CPU kernel; every
            dtype of PyTorch in the reference.
        hx: [B, H], the state before the first step.
        weight_ih, weight_hh: [H, I] and [H, H].
        bias_ih, bias_hh: [H], both or none.
        batch_sizes: int64 CPU tensor [T], as ``PackedSequence.batch_sizes``: rows that take part in
            each step, hx's B first and never more than the step before.
        resets: bool [T, B]; where true, the state is zero before the step (a new episode begins).
            Not with ``batch_sizes``.
        reverse: run from the last step to the first.

    Returns:
        output: [T, B, H], or [sum(batch_sizes), H], the state after each step. The backward pass
            needs nothing else to be saved.
        h_n: [B, H], each row's state after its last step.

        Both in input's dtype. Under autocast the inside runs in autocast's dtype and, as with
        ``torch.nn.RNN`` on the CPU, the results come back in the dtype that input has.

    Gradients reach input, hx, the weights and the biases, and can be differentiated again, to any
    order (in plain PyTorch, counted as ``("rnn_backward", "reference")`` in ``stats()``). Forward
    mode raises; ``use_backend("reference")`` has it.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument and
            both shapes.

    Source: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1, as ``torch.nn.RNN`` has it.
    """
    dtype, device = input.dtype, input.device
    tensors: Any = autocast(device.type, input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    if backend.select("rnn", device, tensors[0].dtype) == "reference":
        _check("rnn", *tensors, batch_sizes=batch_sizes, resets=resets)
        backend.count("rnn", "reference")
        output, h_n = reference.rnn(
            *tensors, batch_sizes=batch_sizes, resets=resets, reverse=reverse
        )
    else:
        try:
            if needs_autograd(*tensors) or is_transformed():
                output, h_n = apply(_Rnn, *tensors, batch_sizes, resets, reverse)
            else:
                output, h_n = _rnn_forward(*tensors, batch_sizes, resets, reverse)
        except RuntimeError:  # the compiled op checks faster, and the check says it better
            _check("rnn", *tensors, batch_sizes=batch_sizes, resets=resets)
            raise
    return (output, h_n) if output.dtype == dtype else (output.to(dtype), h_n.to(dtype))


_check = functools.partial(check_layer, 1)


def _fake_forward(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    _check("rnn", input, hx, *weights, batch_sizes=batch_sizes, resets=resets)
    return new_rows(input, hx.size(1)), hx.new_empty(hx.shape)


def _fake_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    output: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    input_grad: bool,
    weight_grad: bool,
    states_grad: bool,
) -> tuple[Tensor, ...]:
    gradients = fake_gradients(
        input, hx, weight_ih, weight_hh, bias_ih, bias_hh, input_grad, weight_grad
    )
    return *gradients, new_rows(input, hx.size(1)) if states_grad else input.new_empty(0)


# grad_states: the gradient of the state after each step, which the double backward needs. Gradients
# that input_grad and weight_grad do not ask for (or that a missing bias cannot have) have no
# elements: a raw op returns tensors, not None.
_rnn_forward = define(
    f"rnn_forward({INPUTS}, Tensor? batch_sizes, Tensor? resets, bool reverse) "
    "-> (Tensor output, Tensor h_n)",
    rnn_forward,
    _fake_forward,
)
_rnn_backward = define(
    f"rnn_backward(Tensor? grad_output, Tensor? grad_h_n, {INPUTS}, Tensor output, "
    "Tensor? batch_sizes, Tensor? resets, bool reverse, bool input_grad, bool weight_grad, "
    f"bool states_grad) -> ({GRADIENTS}, Tensor grad_states)",
    rnn_backward,
    _fake_backward,
)


class _Rnn(torch.autograd.Function):
    @staticmethod
    def forward(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse):
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        return _rnn_forward(input, hx, *weights, batch_sizes, resets, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8], output[0])
        ctx.reverse = inputs[8]

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        *inputs, batch_sizes, resets, output = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:6])
        if grad_output is None and grad_h_n is None:
            return (None,) * 9
        args = (grad_output, grad_h_n, *inputs, output, batch_sizes, resets, ctx.reverse)
        wanted = (needed[0], any(needed[2:]))
        if needs_autograd(grad_output, grad_h_n, *inputs):
            *gradients, _ = apply(_RnnBackward, *args, *wanted)
        else:
            *gradients, _ = _rnn_backward(*args, *wanted, False)
        return *or_none(gradients, tuple(inputs), needed), None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_Rnn, info, in_dims, args)


class _RnnBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _rnn_backward(*args, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_states = output[6]
        ctx.mark_non_differentiable(grad_states)
        ctx.set_materialize_grads(False)
        *tensors, batch_sizes, resets = inputs[:11]
        ctx.save_for_backward(*tensors, grad_states, batch_sizes, resets)
        ctx.reverse = inputs[11]

    @staticmethod
    def backward(ctx, *cotangents):
        backend.count("rnn_backward", "reference")
        args: Any = (cotangents[:6], *ctx.saved_tensors, ctx.reverse)
        gradients = rnn_double_backward(*args)
        return *gradients, *(None,) * 6

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_RnnBackward, info, in_dims, args)
