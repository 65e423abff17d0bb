"""The gated recurrent unit in plain PyTorch: the definition that every kernel is held to.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r (W_hn h + b_hn))       h' = (1 - z) n + z h

(Cho et al. 2014, https://arxiv.org/abs/1406.1078, with the reset gate after the product, as
torch.nn.GRU has it.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .recurrent import (
    entering_states,
    handed_on,
    join,
    joined,
    of_tanh,
    order_of,
    steps_of,
)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    projected, recurrent = linear(input, weight_ih, bias_ih), linear(hx, weight_hh, bias_hh)
    return gru_gates_forward(projected, recurrent, hx, False)[0]


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
) -> tuple[Tensor, Tensor]:
    output, h_n, _ = gru_forward(
        input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, False
    )
    return output, h_n


def gru_gates_forward(
    projected: Tensor, recurrent: Tensor, hx: Tensor, save_gates: bool
) -> tuple[Tensor, Tensor]:
    """A step from W_i x + b_i and W_h h + b_h on: the next state [B, H], and where they are asked
    for r, z, n and W_hn h + b_hn [B, 4H]."""
    x_r, x_z, x_n = projected.chunk(3, -1)
    h_r, h_z, h_n = recurrent.chunk(3, -1)
    r = (x_r + h_r).sigmoid()
    z = (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    gates = torch.cat([r, z, n, h_n], -1) if save_gates else hx.new_empty(0)
    return (hx - n) * z + n, gates


def gru_gates_backward(grad_output: Tensor, gates: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of n, r, z (before their functions) and W_hn h + b_hn [B, 4H], and that of hx
    [B, H] without what the product adds."""
    _, z, *_ = gates.chunk(4, -1)
    return (grad_output.unsqueeze(1) * _slopes(gates, hx)).flatten(1), grad_output * z


class Step(NamedTuple):
    """What computes the gates of a step, and their gradients."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]


PLAIN = Step(gru_gates_forward, gru_gates_backward)


def gru_forward(
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
    step: Step = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and what the backward formula needs of each step: r, z, n, W_hn h + b_hn."""
    projected = steps_of(linear(input, weight_ih, bias_ih), batch_sizes)  # T of [B_t, 3H]
    outputs: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}
    h = hx
    for t in order_of(len(projected), reverse):
        rows = projected[t].size(0)
        entering = h[:rows]
        if resets is not None:
            entering = entering.masked_fill(resets[t].unsqueeze(1), 0)
        recurrent = linear(entering, weight_hh, bias_hh)
        outputs[t], gates[t] = step.forward(projected[t], recurrent, entering, save_gates)
        h = handed_on(outputs[t], h, t, None)
    saved = joined(gates, batch_sizes) if save_gates else input.new_empty(0)
    return joined(outputs, batch_sizes), h.clone(), saved


def gru_backward(
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
    step: Step = PLAIN,
) -> tuple[Tensor, ...]:
    """Backpropagation through time. Gradients that are not asked for have no elements.

    The last one is that of the state after each step, as output. Gates without elements were not
    saved: they are computed anew.
    """
    H = hx.size(1)
    if gates.numel() == 0:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        _, _, gates = gru_forward(input, hx, *weights, batch_sizes, resets, reverse, True, step)
    saved = steps_of(gates, batch_sizes)
    grads = None if grad_output is None else steps_of(grad_output, batch_sizes)
    entering = entering_states(output, hx, batch_sizes, resets, reverse)
    carry = hx.new_zeros(hx.shape) if grad_h_n is None else grad_h_n
    deltas: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    for t in order_of(len(saved), not reverse):
        passed = carry[: len(saved[t])]
        states[t] = passed if grads is None else passed + grads[t]
        deltas[t], passed = step.backward(states[t], saved[t], entering[t])
        carry = handed_on(passed + deltas[t][:, H:] @ weight_hh, carry, t, resets)
    delta = join(deltas)  # [N, 4H], N the rows of all steps
    x, state = input.reshape(-1, input.size(-1)), join(entering)

    def gradient(needed: bool, compute: Callable[[], Tensor]) -> Tensor:
        return compute() if needed else input.new_empty(0)

    bias_grad = weight_grad and bias_ih is not None
    return (
        gradient(input_grad, lambda: (delta[:, : 3 * H] @ _nrz(weight_ih)).view(input.shape)),
        carry.clone(),
        gradient(weight_grad, lambda: _rzn(delta[:, : 3 * H].t() @ x)),
        gradient(weight_grad, lambda: delta[:, H:].t() @ state),
        gradient(bias_grad, lambda: _rzn(delta[:, : 3 * H].sum(0))),
        gradient(bias_grad, lambda: delta[:, H:].sum(0)),
        gradient(states_grad, lambda: join(states).view(output.shape)),
    )


def gru_double_backward(
    cotangents: Sequence[Tensor | None],
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
    grad_states: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of <cotangents, gru_backward(...)> with respect to its first eight arguments.

    That product is <grad_output, d output> + <grad_h_n, d h_n>, where d is the derivative in the
    direction of the cotangents. So its gradient in grad_output is the tangent of the sequence, and
    its gradient in the inputs the tangent of the backward pass (Pearlmutter 1994, "Fast exact
    multiplication by the Hessian"). A step's tensors stay in the cache from one operation to the
    next; only what the last products need is kept of all steps.

    Differentiable to any order: where gradients are recorded, what was saved is computed anew, so
    that it depends on the inputs. So it is where the gates were not saved.
    """
    if torch.is_grad_enabled() or gates.numel() == 0:
        leaves = (input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
        output, _, gates = gru_forward(*leaves, batch_sizes, resets, reverse, True)
        computed = (output, gates, batch_sizes, resets, reverse)
        *_, grad_states = gru_backward(
            grad_output, grad_h_n, *leaves, *computed, False, False, True
        )
    H = hx.size(1)
    d_input, d_hx, d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh = cotangents
    x = input.reshape(-1, input.size(-1))  # [N, I]
    d_x = None if d_input is None else d_input.reshape(x.shape)
    saved = steps_of(gates, batch_sizes)
    states = steps_of(grad_states, batch_sizes)
    entering = entering_states(output, hx, batch_sizes, resets, reverse)

    projected = linear(x.new_zeros(x.shape) if d_x is None else d_x, weight_ih, d_bias_ih)
    if d_weight_ih is not None:
        projected = torch.addmm(projected, x, d_weight_ih.t())
    if batch_sizes is None:
        projected = projected.view(*input.shape[:-1], 3 * H)
    from_input = steps_of(projected, batch_sizes)
    d_entering: dict[int, Tensor] = {}
    d_gates: dict[int, Tensor] = {}
    d_outputs: dict[int, Tensor] = {}
    d_h = hx.new_zeros(hx.shape) if d_hx is None else d_hx
    for t in order_of(len(saved), reverse):
        r, z, n, q = saved[t].chunk(4, -1)
        d_state = d_h[: len(z)]
        if resets is not None:
            d_state = d_state.masked_fill(resets[t].unsqueeze(1), 0)
        recurrent = linear(d_state, weight_hh, d_bias_hh)
        if d_weight_hh is not None:
            recurrent = torch.addmm(recurrent, entering[t], d_weight_hh.t())
        d_rz = _of_sigmoid(from_input[t][:, : 2 * H] + recurrent[:, : 2 * H], saved[t][:, : 2 * H])
        (d_r, d_z), d_q = d_rz.chunk(2, -1), recurrent[:, 2 * H :]
        d_n = torch.addcmul(torch.addcmul(from_input[t][:, 2 * H :], d_r, q), r, d_q)
        d_n = of_tanh(d_n, n)
        d_outputs[t] = torch.addcmul(torch.addcmul(d_n, d_z, entering[t] - n), z, d_state - d_n)
        d_entering[t], d_gates[t] = d_state, torch.cat([d_rz, d_n, d_q], -1)
        d_h = handed_on(d_outputs[t], d_h, t, None)

    inputs = steps_of(input, batch_sizes)
    d_inputs = None if d_input is None else steps_of(d_input, batch_sizes)
    grad_inputs: dict[int, Tensor] = {}
    grad_weight_ih, grad_weight_hh = hx.new_zeros(3 * H, x.size(1)), hx.new_zeros(3 * H, H)
    grad_bias = hx.new_zeros(4 * H)
    d_carry = hx.new_zeros(hx.shape)
    for times in _blocks(order_of(len(saved), not reverse), len(hx)):
        deltas: list[Tensor] = []
        d_deltas: list[Tensor] = []
        for t in times:
            _, z, *_ = saved[t].chunk(4, -1)
            _, d_z, *_ = d_gates[t].chunk(4, -1)
            slopes = _slopes(saved[t], entering[t])
            d_slopes = _d_slopes(saved[t], entering[t], slopes, d_gates[t], d_entering[t])
            dh, d_dh = states[t], d_carry[: len(z)]
            delta = (dh.unsqueeze(1) * slopes).flatten(1)
            d_delta = torch.addcmul(dh.unsqueeze(1) * d_slopes, d_dh.unsqueeze(1), slopes)
            d_delta = d_delta.flatten(1)
            d_passed = torch.addmm(dh * d_z, d_delta[:, H:], weight_hh)
            d_passed = torch.addcmul(d_passed, d_dh, z)
            if d_weight_hh is not None:
                d_passed = torch.addmm(d_passed, delta[:, H:], d_weight_hh)
            d_carry = handed_on(d_passed, d_carry, t, resets)
            deltas.append(delta)
            d_deltas.append(d_delta)
        delta, d_delta = torch.cat(deltas), torch.cat(d_deltas)  # [rows of the block, 4H]
        of_input, d_of_input = delta[:, : 3 * H], d_delta[:, : 3 * H]
        grad_rows = d_of_input @ _nrz(weight_ih)
        if d_weight_ih is not None:
            grad_rows = torch.addmm(grad_rows, of_input, _nrz(d_weight_ih))
        sizes = [len(rows) for rows in deltas]
        grad_inputs.update(zip(times, grad_rows.split(sizes), strict=True))

        def rows(steps: Mapping[int, Tensor] | Sequence[Tensor], times: range = times) -> Tensor:
            return torch.cat([steps[t] for t in times])

        grad_weight_ih = torch.addmm(grad_weight_ih, d_of_input.t(), rows(inputs))
        if d_inputs is not None:
            grad_weight_ih = torch.addmm(grad_weight_ih, of_input.t(), rows(d_inputs))
        grad_weight_hh = torch.addmm(grad_weight_hh, d_delta[:, H:].t(), rows(entering))
        grad_weight_hh = torch.addmm(grad_weight_hh, delta[:, H:].t(), rows(d_entering))
        grad_bias = grad_bias + d_delta.sum(0)
    return [
        None if grad_output is None else join(d_outputs).view(grad_output.shape),
        None if grad_h_n is None else d_h,
        join(grad_inputs).view(input.shape),
        d_carry,
        _rzn(grad_weight_ih),
        grad_weight_hh,
        None if bias_ih is None else _rzn(grad_bias[: 3 * H]),
        None if bias_hh is None else grad_bias[H:].clone(),
    ]


def each_forward(args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The arguments of a raw op of both directions as those of gru_forward of each."""
    input, hx, *weights, hx_reverse = args[:7]
    weights_reverse, (batch_sizes, save_gates, packed, packed_reverse) = args[7:11], args[11:]
    return (
        (input, hx, *weights, batch_sizes, None, False, save_gates, packed),
        (input, hx_reverse, *weights_reverse, batch_sizes, None, True, save_gates, packed_reverse),
    )


def each_backward(args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The same as those of gru_backward of each, without the states' gradients."""
    grads, (input, hx, *weights, hx_reverse), weights_reverse = args[:4], args[4:11], args[11:15]
    saved, (batch_sizes, *wanted) = args[15:19], args[19:]
    sizes = (batch_sizes, None)
    return (
        (*grads[:2], input, hx, *weights, *saved[:2], *sizes, False, *wanted, False),
        (*grads[2:], input, hx_reverse, *weights_reverse, *saved[2:], *sizes, True, *wanted, False),
    )


def _blocks(times: range, batch: int) -> list[range]:
    """Steps in runs of about 512 rows: enough for a product, few enough to stay in the cache."""
    steps = max(1, 512 // max(1, batch))
    return [times[first : first + steps] for first in range(0, len(times), steps)]


def _slopes(gates: Tensor, state: Tensor) -> Tensor:
    """What dh is multiplied with to give the gradients of n, r, z and W_hn h + b_hn: [B, 4, H]."""
    r, z, n, q = gates.chunk(4, -1)
    of_n = of_tanh(1 - z, n)
    return torch.stack([of_n, _of_sigmoid(of_n * q, r), _of_sigmoid(state - n, z), of_n * r], 1)


def _d_slopes(
    gates: Tensor, state: Tensor, slopes: Tensor, d_gates: Tensor, d_state: Tensor
) -> Tensor:
    r, z, n, q = gates.chunk(4, -1)
    d_r, d_z, d_n, d_q = d_gates.chunk(4, -1)
    of_n = slopes[:, 0]
    d_of_n = torch.addcmul(of_tanh(-d_z, n), (1 - z) * n, d_n, value=-2)
    d_of_r = _of_sigmoid(torch.addcmul(d_of_n * q, of_n, d_q), r)
    d_of_r = torch.addcmul(d_of_r, of_n * q * d_r, 1 - 2 * r)
    d_of_z = torch.addcmul(_of_sigmoid(d_state - d_n, z), (state - n) * d_z, 1 - 2 * z)
    return torch.stack([d_of_n, d_of_r, d_of_z, torch.addcmul(d_of_n * r, of_n, d_r)], 1)


def _of_sigmoid(grad: Tensor, y: Tensor) -> Tensor:
    """grad y (1 - y), in one operation."""
    return torch.ops.aten.sigmoid_backward(grad, y)


def _nrz(rows: Tensor) -> Tensor:
    """From the weights' order r, z, n to n, r, z, in which the gates' gradients stand."""
    return rows.roll(len(rows) // 3, 0)


def _rzn(rows: Tensor) -> Tensor:
    return rows.roll(-(len(rows) // 3), 0)
