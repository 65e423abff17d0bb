"""The fused gated recurrent unit: a whole sequence (`gru`), both directions of one
(`bidirectional_gru`), and one step (`gru_cell`)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..reference.gru import (
    PLAIN,
    Step,
    each_backward,
    each_forward,
    gru_double_backward,
    gru_gates_backward,
    gru_gates_forward,
)
from ..reference.gru import gru_backward as reference_backward
from ..reference.gru import gru_forward as reference_forward
from .library import _library, apply, autocast, define, is_transformed, map_slices, needs_autograd
from .recurrent import GRADIENTS, INPUTS, check_layer, fake_gradients, new_rows, or_none

_REVERSE = (
    "Tensor hx_reverse, Tensor weight_ih_reverse, Tensor weight_hh_reverse, "
    "Tensor? bias_ih_reverse, Tensor? bias_hh_reverse"
)


def gru(
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
    recompute: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of one layer of a gated recurrent unit over a whole sequence.

    Equivalent to: ``torch.nn.GRU(I, H)(input, hx[None])`` with these weights, ``h_n[0]`` for
        ``h_n``.

    Args:
        input: [T, B, I], any strides; with ``batch_sizes`` [sum(batch_sizes), I], as
            ``PackedSequence.data``. float32, bfloat16 or float64 in the compiled CPU kernel; every
            dtype of PyTorch in the reference.
        hx: [B, H], the state before the first step.
        weight_ih, weight_hh: [3H, I] and [3H, H], the gates r, z, n one below the other.
        bias_ih, bias_hh: [3H], both or none.
        batch_sizes: int64 CPU tensor [T], as ``PackedSequence.batch_sizes``: rows that take part in
            each step, hx's B first and never more than the step before.
        resets: bool [T, B]; where true, the state is zero before the step (a new episode begins).
            Not with ``batch_sizes``.
        reverse: run from the last step to the first.
        recompute: save less for the backward pass, which then computes the gates of all steps anew:
            the output alone, where otherwise output and gates take five times its memory. The
            backward pass takes about 1.4 times as long. Default False, which is faster. The
            reference ignores it.
        packed: what :func:`gru_pack` made of these weights and biases, for calls that record no
            gradients; otherwise each call packs them.

    Returns:
        output: [T, B, H], or [sum(batch_sizes), H], the state after each step.
        h_n: [B, H], each row's state after its last step.

        Both in input's dtype. Under autocast the inside runs in autocast's dtype and, as with
        ``torch.nn.GRU`` on the CPU, the results come back in the dtype that input has.

    Gradients reach input, hx, the weights and the biases, and can be differentiated again, to any
    order (in plain PyTorch, counted as ``("gru_backward", "reference")`` in ``stats()``). Forward
    mode raises; ``use_backend("reference")`` has it.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument and
            both shapes. Gradients through packed weights.

    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in the variant of ``torch.nn.GRU``.
    """
    dtype, device = input.dtype, input.device
    tensors: Any = autocast(device.type, input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    if backend.select("gru", device, tensors[0].dtype) == "reference":
        _check("gru", *tensors, batch_sizes=batch_sizes, resets=resets)
        backend.count("gru", "reference")
        output, h_n = reference.gru(
            *tensors, batch_sizes=batch_sizes, resets=resets, reverse=reverse
        )
    else:
        try:
            if needs_autograd(*tensors) or is_transformed():
                _reject_packed("gru", packed, *tensors)
                output, h_n, _ = apply(_Gru, *tensors, batch_sizes, resets, reverse, recompute)
            else:
                output, h_n, _ = _gru_forward(*tensors, batch_sizes, resets, reverse, False, packed)
        except RuntimeError:  # the compiled op checks faster, and the check says it better
            _check("gru", *tensors, batch_sizes=batch_sizes, resets=resets)
            raise
    return (output, h_n) if output.dtype == dtype else (output.to(dtype), h_n.to(dtype))


def bidirectional_gru(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    weights_reverse: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    packed: Tensor | None = None,
    packed_reverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both directions of one layer of a gated recurrent unit over a whole sequence.

    The same as two calls of :func:`gru`, to the last bit. Where steps are short (a few rows, and
    weights that stay in a core's cache) both run at the same time, each on half of the threads, of
    which fewer then have to meet after every step.

    Equivalent to: ``torch.nn.GRU(I, H, bidirectional=True)(input, hx)`` with these weights.

    Args:
        input: as of :func:`gru`.
        hx: [2, B, H], the states before each direction's first step, forward first.
        weights, weights_reverse: weight_ih, weight_hh and perhaps bias_ih and bias_hh of each
            direction, as of :func:`gru`.
        batch_sizes, recompute: as of :func:`gru`.
        packed, packed_reverse: what :func:`gru_pack` made of each direction's weights.

    Returns:
        output: [T, B, 2H], or [sum(batch_sizes), 2H], forward's features first.
        h_n: [2, B, H].

        Dtypes as of :func:`gru`.

    Gradients as of :func:`gru`, to any order.

    Raises:
        RuntimeError: as :func:`gru`.

    Source: Schuster and Paliwal 1997, https://doi.org/10.1109/78.650093.
    """
    if hx.dim() != 3 or hx.size(0) != 2:
        raise RuntimeError(
            f"genkernels.bidirectional_gru: hx: expected shape [2, B, H], got {list(hx.shape)}"
        )
    dtype, device = input.dtype, input.device
    (input,) = autocast(device.type, input)  # type: ignore[assignment]
    both: list[Any] = []
    for name, h, w in (
        ("weights", hx[0], weights),
        ("weights_reverse", hx[1], weights_reverse),
    ):
        if len(w) not in (2, 4):
            raise RuntimeError(
                f"genkernels.bidirectional_gru: {name}: expected 2 or 4 tensors, got {len(w)}"
            )
        both.append((input, *autocast(device.type, h, *w, *(None,) * (4 - len(w)))))

    def check() -> None:
        _check("bidirectional_gru", *both[0], batch_sizes=batch_sizes)
        _check("bidirectional_gru: weights_reverse", *both[1], batch_sizes=batch_sizes)

    if backend.select("bidirectional_gru", device, both[0][0].dtype) == "reference":
        check()
        backend.count("bidirectional_gru", "reference")
        results = [
            reference.gru(*each, batch_sizes=batch_sizes, reverse=reverse)
            for each, reverse in zip(both, (False, True), strict=True)
        ]
    else:
        tensors = (*both[0], *both[1][1:])
        try:
            if needs_autograd(*tensors) or is_transformed():
                _reject_packed("bidirectional_gru", packed, *tensors)
                _reject_packed("bidirectional_gru", packed_reverse, *tensors)
                raw = apply(_BidirectionalGru, *tensors, batch_sizes, recompute)
            else:
                raw = _bidirectional_gru_forward(
                    *tensors, batch_sizes, False, packed, packed_reverse
                )
        except RuntimeError:
            check()
            raise
        results = [raw[:2], raw[3:5]]
    output = torch.cat([output for output, _ in results], -1)
    h_n = torch.stack([h for _, h in results])
    return (output, h_n) if output.dtype == dtype else (output.to(dtype), h_n.to(dtype))


def gru_cell(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> Tensor:
    """One step of a gated recurrent unit.

    Equivalent to: ``torch.gru_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)``.

    Args:
        input: [B, I]; dtypes as in :func:`gru`.
        hx: [B, H].
        weight_ih, weight_hh: [3H, I] and [3H, H], the gates r, z, n one below the other.
        bias_ih, bias_hh: [3H], both or none.
        packed: as of :func:`gru`. Few rows do not use it: they read the weights as they lie.

    Returns:
        The next state, [B, H], in input's dtype.

    Gradients as of :func:`gru`, to any order.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument and
            both shapes. Gradients through packed weights.

    Source: as :func:`gru`.
    """
    dtype, device = input.dtype, input.device
    tensors: Any = autocast(device.type, input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    if backend.select("gru_cell", device, tensors[0].dtype) == "reference":
        _check("gru_cell", *tensors)
        backend.count("gru_cell", "reference")
        h = reference.gru_cell(*tensors)
    else:
        try:
            if needs_autograd(*tensors) or is_transformed():
                _reject_packed("gru_cell", packed, *tensors)
                h, _ = apply(_GruCell, *tensors)
            else:
                h, _ = _gru_cell_forward(*tensors, False, packed)
        except RuntimeError:
            _check("gru_cell", *tensors)
            raise
    return h if h.dtype == dtype else h.to(dtype)


def gru_pack(
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """The weights and biases as the compiled CPU kernel reads them, for ``packed`` of :func:`gru`.

    They are a copy: what is written to the weights later does not reach it. How they lie depends
    on the SIMD level. :func:`genkernels.freeze` is this for whole modules. torch.compile cannot
    trace it.

    Args:
        weight_ih, weight_hh: [3H, I] and [3H, H], the gates r, z, n one below the other.
        bias_ih, bias_hh: [3H], both or none.

    Returns:
        uint8, as many bytes as the weights have, and a few more.

    Raises:
        RuntimeError: a shape or dtype that does not fit, or no compiled kernel for these weights.
    """
    if backend.select("gru", weight_ih.device, weight_ih.dtype) != "cpp":
        raise RuntimeError("genkernels.gru_pack: only the compiled CPU kernel takes packed weights")
    return torch.ops.genkernels.gru_pack(
        *(w if w is None else w.detach() for w in (weight_ih, weight_hh, bias_ih, bias_hh))
    )


def _reject_packed(op: str, packed: Tensor | None, *tensors: Tensor | None) -> None:
    if packed is not None and needs_autograd(*tensors):
        raise RuntimeError(
            f"genkernels.{op}: packed weights have no gradients; call it under torch.no_grad(), or "
            "unfreeze() the module"
        )


_check = functools.partial(check_layer, 3)


def _fake_gates_forward(
    projected: Tensor, recurrent: Tensor, hx: Tensor, save_gates: bool
) -> tuple[Tensor, Tensor]:
    return hx.new_empty(hx.shape), new_rows(hx, 4 * hx.size(1)) if save_gates else hx.new_empty(0)


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
    save_gates: bool,
    packed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    _check("gru", input, hx, *weights, batch_sizes=batch_sizes, resets=resets)
    H = hx.size(1)
    return (
        new_rows(input, H),
        hx.new_empty(hx.shape),
        new_rows(input, 4 * H) if save_gates else input.new_empty(0),
    )


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
    gates: Tensor,
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


def _reference_forward(*args: Any, step: Step = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    return reference_forward(*(*args[:-1], step))  # packed is for the compiled CPU kernel


def _reference_bidirectional_forward(*args: Any, step: Step = PLAIN) -> tuple[Tensor, ...]:
    return sum((_reference_forward(*each, step=step) for each in each_forward(args)), ())


def _fake_bidirectional_forward(*args: Any) -> tuple[Tensor, ...]:
    return sum((_fake_forward(*each) for each in each_forward(args)), ())


def _reference_bidirectional_backward(*args: Any, step: Step = PLAIN) -> tuple[Tensor, ...]:
    first, second = (reference_backward(*(*each, step)) for each in each_backward(args))
    return *first[:6], *second[:6]


def _fake_bidirectional_backward(*args: Any) -> tuple[Tensor, ...]:
    first, second = (_fake_backward(*each) for each in each_backward(args))
    return *first[:6], *second[:6]


def _reference_cell_forward(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    save_gates: bool,
    packed: Tensor | None,
    step: Step = PLAIN,
) -> tuple[Tensor, Tensor]:
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    sequence = (input.unsqueeze(0), hx, *weights, None, None, False, save_gates)
    _, h, gates = reference_forward(*sequence, step=step)
    return h, gates.squeeze(0)


def _fake_cell_forward(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    save_gates: bool,
    packed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check("gru_cell", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    return hx.new_empty(hx.shape), new_rows(
        input, 4 * hx.size(1)
    ) if save_gates else input.new_empty(0)


def _reference_cell_backward(
    grad_h: Tensor,
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    gates: Tensor,
    input_grad: bool,
    weight_grad: bool,
    step: Step = PLAIN,
) -> tuple[Tensor, ...]:
    sequence = (input.unsqueeze(0), hx, weight_ih, weight_hh, bias_ih, bias_hh)
    # One step enters with hx alone: what stands for the output is not read.
    gradients = reference_backward(
        None,
        grad_h,
        *sequence,
        hx.unsqueeze(0),
        gates.unsqueeze(0),
        None,
        None,
        False,
        input_grad,
        weight_grad,
        False,
        step,
    )
    return gradients[0].view(input.shape if input_grad else 0), *gradients[1:6]


def _fake_cell_backward(
    grad_h: Tensor,
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    gates: Tensor,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, ...]:
    return fake_gradients(
        input, hx, weight_ih, weight_hh, bias_ih, bias_hh, input_grad, weight_grad
    )


# gates: what the backward pass needs of every step, [.., 4H] beside output's [.., H]: r, z, n and
# W_hn h + b_hn. They cost four times the memory of the output; without save_gates they have no
# elements, and the backward pass computes them anew. packed: of gru_pack. grad_states: the gradient
# of the state after each step, which the double backward needs. Gradients that input_grad and
# weight_grad do not ask for (or that a missing bias cannot have) have none either: a raw op returns
# tensors, not None.
_library.define(
    "gru_pack(Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh) -> Tensor"
)
# A step without its products, which are PyTorch's: what the extension has for CUDA tensors.
# projected: W_i x + b_i; recurrent: W_h h + b_h; deltas: the gradients of n, r, z, W_hn h + b_hn;
# grad_hx: without what the product with W_h adds.
_gru_gates_forward = define(
    "gru_gates_forward(Tensor projected, Tensor recurrent, Tensor hx, bool save_gates) "
    "-> (Tensor output, Tensor gates)",
    gru_gates_forward,
    _fake_gates_forward,
)
_gru_gates_backward = define(
    "gru_gates_backward(Tensor grad_output, Tensor gates, Tensor hx) "
    "-> (Tensor deltas, Tensor grad_hx)",
    gru_gates_backward,
    lambda _, gates, hx: (gates.new_empty(gates.shape), hx.new_empty(hx.shape)),
)


def _with_gates(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, with the two ops above for what is not a product."""
    return functools.partial(reference, step=Step(_gru_gates_forward, _gru_gates_backward))


_gru_forward = define(
    f"gru_forward({INPUTS}, Tensor? batch_sizes, Tensor? resets, bool reverse, bool save_gates, "
    "Tensor? packed) -> (Tensor output, Tensor h_n, Tensor gates)",
    _reference_forward,
    _fake_forward,
    on_cuda=_with_gates(_reference_forward),
)
_gru_backward = define(
    f"gru_backward(Tensor? grad_output, Tensor? grad_h_n, {INPUTS}, Tensor output, Tensor gates, "
    "Tensor? batch_sizes, Tensor? resets, bool reverse, bool input_grad, bool weight_grad, "
    f"bool states_grad) -> ({GRADIENTS}, Tensor grad_states)",
    reference_backward,
    _fake_backward,
    on_cuda=_with_gates(reference_backward),
)
_bidirectional_gru_forward = define(
    f"bidirectional_gru_forward({INPUTS}, {_REVERSE}, Tensor? batch_sizes, bool save_gates, "
    "Tensor? packed, Tensor? packed_reverse) -> (Tensor output, Tensor h_n, Tensor gates, "
    "Tensor output_reverse, Tensor h_n_reverse, Tensor gates_reverse)",
    _reference_bidirectional_forward,
    _fake_bidirectional_forward,
    on_cuda=_with_gates(_reference_bidirectional_forward),
)
_bidirectional_gru_backward = define(
    "bidirectional_gru_backward(Tensor? grad_output, Tensor? grad_h_n, "
    f"Tensor? grad_output_reverse, Tensor? grad_h_n_reverse, {INPUTS}, {_REVERSE}, "
    "Tensor output, Tensor gates, Tensor output_reverse, Tensor gates_reverse, "
    f"Tensor? batch_sizes, bool input_grad, bool weight_grad) -> ({GRADIENTS}, "
    f"{GRADIENTS.replace(',', '_reverse,')}_reverse)",
    _reference_bidirectional_backward,
    _fake_bidirectional_backward,
    on_cuda=_with_gates(_reference_bidirectional_backward),
)
_gru_cell_forward = define(
    f"gru_cell_forward({INPUTS}, bool save_gates, Tensor? packed) -> (Tensor h, Tensor gates)",
    _reference_cell_forward,
    _fake_cell_forward,
    on_cuda=_with_gates(_reference_cell_forward),
)
_gru_cell_backward = define(
    f"gru_cell_backward(Tensor grad_h, {INPUTS}, Tensor gates, bool input_grad, bool weight_grad) "
    f"-> ({GRADIENTS})",
    _reference_cell_backward,
    _fake_cell_backward,
    on_cuda=_with_gates(_reference_cell_backward),
)


class _Gru(torch.autograd.Function):
    @staticmethod
    def forward(
        input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, recompute
    ):
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        return _gru_forward(input, hx, *weights, batch_sizes, resets, reverse, not recompute, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        output, _, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8], output, gates)
        ctx.reverse = inputs[8]

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, _):
        *inputs, batch_sizes, resets, output, gates = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:6])
        if grad_output is None and grad_h_n is None:
            return (None,) * 10
        args = (grad_output, grad_h_n, *inputs, output, gates, batch_sizes, resets, ctx.reverse)
        wanted = (needed[0], any(needed[2:]))
        if needs_autograd(grad_output, grad_h_n, *inputs):
            *gradients, _ = apply(_GruBackward, *args, *wanted)
        else:
            *gradients, _ = _gru_backward(*args, *wanted, False)
        return *or_none(gradients, tuple(inputs), needed), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_Gru, info, in_dims, args)


class _GruBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _gru_backward(*args, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_states = output[6]
        ctx.mark_non_differentiable(grad_states)
        ctx.set_materialize_grads(False)
        *tensors, batch_sizes, resets = inputs[:12]
        ctx.save_for_backward(*tensors, grad_states, batch_sizes, resets)
        ctx.reverse = inputs[12]

    @staticmethod
    def backward(ctx, *cotangents):
        backend.count("gru_backward", "reference")
        args: Any = (cotangents[:6], *ctx.saved_tensors, ctx.reverse)
        gradients = gru_double_backward(*args)
        return *gradients, *(None,) * 7

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_GruBackward, info, in_dims, args)


class _BidirectionalGru(torch.autograd.Function):
    @staticmethod
    def forward(
        input,
        hx,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        hx_reverse,
        weight_ih_reverse,
        weight_hh_reverse,
        bias_ih_reverse,
        bias_hh_reverse,
        batch_sizes,
        recompute,
    ):
        forward = (input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
        reverse = (hx_reverse, weight_ih_reverse, weight_hh_reverse)
        biases = (bias_ih_reverse, bias_hh_reverse)
        args = (*forward, *reverse, *biases, batch_sizes, not recompute, None, None)
        return _bidirectional_gru_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        output, _, gates, output_reverse, _, gates_reverse = output
        ctx.mark_non_differentiable(gates, gates_reverse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:12], output, gates, output_reverse, gates_reverse)

    @staticmethod
    def backward(ctx, *grads):
        *inputs, batch_sizes, output, gates, output_reverse, gates_reverse = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:11])
        grads = (*grads[:2], *grads[3:5])
        if all(grad is None for grad in grads):
            return (None,) * 13
        saved = (output, gates, output_reverse, gates_reverse)
        wanted = (needed[0], any(needed[2:6] + needed[7:]))
        args = (*grads, *inputs, *saved, batch_sizes, *wanted)
        if needs_autograd(*grads, *inputs):
            first, second = (apply(_GruBackward, *each[:-1])[:6] for each in each_backward(args))
        else:
            gradients = _bidirectional_gru_backward(*args)
            first, second = gradients[:6], gradients[6:]
        grad_input = first[0] + second[0] if needed[0] else None
        others = or_none((*first[1:], *second[1:]), tuple(inputs[1:]), needed[1:])
        return grad_input, *others, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_BidirectionalGru, info, in_dims, args)


class _GruCell(torch.autograd.Function):
    @staticmethod
    def forward(input, hx, weight_ih, weight_hh, bias_ih, bias_hh):
        return _gru_cell_forward(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, True, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, gates)

    @staticmethod
    def backward(ctx, grad_h, _):
        *inputs, gates = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        if grad_h is None:
            return (None,) * 6
        args = (grad_h, *inputs, gates, needed[0], any(needed[2:]))
        if needs_autograd(grad_h, *inputs):
            gradients = apply(_GruCellBackward, *args)
        else:
            gradients = _gru_cell_backward(*args)
        return tuple(or_none(gradients, tuple(inputs), needed))

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_GruCell, info, in_dims, args)


class _GruCellBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _gru_cell_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])

    @staticmethod
    def backward(ctx, *cotangents):
        grad_h, input, hx, *weights, gates = ctx.saved_tensors
        d_input, *d_others = cotangents
        backend.count("gru_cell_backward", "reference")
        d_sequence = [None if d_input is None else d_input.unsqueeze(0), *d_others]
        sequence = (None, grad_h, input.unsqueeze(0), hx, *weights)
        # One step enters with hx alone: what stands for its output is not read.
        saved = (*(t.unsqueeze(0) for t in (hx, gates, grad_h)), None, None, False)
        args: Any = (d_sequence, *sequence, *saved)
        _, grad_grad_h, grad_input, *gradients = gru_double_backward(*args)
        assert grad_input is not None
        return grad_grad_h, grad_input.squeeze(0), *gradients, *(None,) * 3

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_GruCellBackward, info, in_dims, args)
