"""The gated recurrent unit in plain PyTorch: the definition that every kernel is held to.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r (W_hn h + b_hn))       h' = (1 - z) n + z h

(Cho et al. 2014, https://arxiv.org/abs/1406.1078, with the reset gate after the product, as
torch.nn.GRU has it.)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def gru_cell(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    return _step(linear(input, weight_ih, bias_ih), hx, weight_hh, bias_hh)[0]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and what the backward formula needs of each step: r, z, n, W_hn h + b_hn."""
    gates_of_input = linear(input, weight_ih, bias_ih).flatten(0, -2)  # [N, 3H]
    projected = _steps(gates_of_input, batch_sizes, input)
    outputs: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}
    h = hx
    for t in _times(len(projected), reverse):
        rows = projected[t].size(0)
        entering = h[:rows]
        if resets is not None:
            entering = entering.masked_fill(resets[t].unsqueeze(1), 0)
        outputs[t], *parts = _step(projected[t], entering, weight_hh, bias_hh)
        if save_gates:
            gates[t] = torch.cat(parts, -1)
        # Rows of a packed sequence that are over, or run backwards have not begun, come last.
        h = outputs[t] if rows == h.size(0) else torch.cat([outputs[t], h[rows:]])
    join = torch.stack if batch_sizes is None else torch.cat
    times = range(len(projected))
    saved = join([gates[t] for t in times]) if save_gates else input.new_empty(0)
    return join([outputs[t] for t in times]), h.clone(), saved


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backpropagation through time. Gradients that are not asked for have no elements."""
    sequence = (batch_sizes, resets, reverse)
    state = _entering(output, hx, *sequence)  # [N, H], N the rows of all steps
    z, slopes = _slopes(gates, state)
    _, delta, grad_hx = _back_through(grad_output, grad_h_n, hx, weight_hh, z, slopes, *sequence)
    from_input, from_state = delta[:, :3].flatten(1), delta[:, 1:].flatten(1)  # [N, 3H]
    rzn = _reorder(weight_ih)

    def gradient(needed: bool, compute: Callable[[], Tensor]) -> Tensor:
        return compute() if needed else input.new_empty(0)

    bias_grad = weight_grad and bias_ih is not None
    return (
        gradient(input_grad, lambda: (from_input @ rzn).view(input.shape)),
        grad_hx.clone(),
        gradient(weight_grad, lambda: _restore(from_input.t() @ input.reshape(-1, input.size(-1)))),
        gradient(weight_grad, lambda: from_state.t() @ state),
        gradient(bias_grad, lambda: _restore(from_input.sum(0))),
        gradient(bias_grad, lambda: from_state.sum(0)),
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
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of <cotangents, gru_backward(...)> with respect to its first eight arguments.

    That product is <grad_output, d output> + <grad_h_n, d h_n>, with d the derivative in the
    direction of the cotangents. So its gradient in grad_output is the sequence's tangent, and in
    the other arguments the tangent of the backward pass (Pearlmutter 1994,
    https://doi.org/10.1162/neco.1994.6.1.147). Everything that does not depend on the step before
    is one operation over all steps; three short loops are left.
    """
    sequence = (batch_sizes, resets, reverse)
    x = input.reshape(-1, input.size(-1))  # [N, I]
    d_input, d_hx, d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh = cotangents
    d_x = None if d_input is None else d_input.reshape(x.shape)
    state = _entering(output, hx, *sequence)
    r, z, n, q = gates.reshape(-1, 4 * hx.size(1)).chunk(4, -1)

    d_projected = _sum(_product(d_x, weight_ih.t()), _product(x, d_weight_ih, True), d_bias_ih)
    d_recurrent = _sum(_product(state, d_weight_hh, True), d_bias_hh)
    zeros = gates.new_zeros(len(x), 3 * hx.size(1))
    from_input = _steps(zeros if d_projected is None else zeros + d_projected, batch_sizes, input)
    from_weight = _steps(zeros if d_recurrent is None else zeros + d_recurrent, batch_sizes, input)
    slope = torch.cat([r * (1 - r), z * (1 - z), 1 - n * n], -1)
    parts = _steps(torch.cat([slope, r, z, q, state - n], -1), batch_sizes, input)
    h = hx.new_zeros(hx.shape) if d_hx is None else d_hx
    d_gates: dict[int, Tensor] = {}
    d_states: dict[int, Tensor] = {}
    d_outputs: dict[int, Tensor] = {}
    for t in _times(len(parts), reverse):
        slope_r, slope_z, slope_n, r_t, z_t, q_t, h_less_n = parts[t].chunk(7, -1)
        rows = r_t.size(0)
        entering = h[:rows]
        if resets is not None:
            entering = entering.masked_fill(resets[t].unsqueeze(1), 0)
        x_r, x_z, x_n = from_input[t].chunk(3, -1)
        h_r, h_z, d_q = torch.addmm(from_weight[t], entering, weight_hh.t()).chunk(3, -1)
        d_r = slope_r * (x_r + h_r)
        d_z = slope_z * (x_z + h_z)
        d_n = slope_n * (x_n + d_r * q_t + r_t * d_q)
        d_states[t], d_gates[t] = entering, torch.cat([d_r, d_z, d_n, d_q], -1)
        d_outputs[t] = d_n + d_z * h_less_n + z_t * (entering - d_n)
        h = d_outputs[t] if rows == h.size(0) else torch.cat([d_outputs[t], h[rows:]])
    times = range(len(parts))
    d_r, d_z, d_n, d_q = torch.cat([d_gates[t] for t in times]).chunk(4, -1)
    d_state = torch.cat([d_states[t] for t in times])

    z, slopes = _slopes(gates, state)
    dh, delta, _ = _back_through(grad_output, grad_h_n, hx, weight_hh, z, slopes, *sequence)
    # The tangents of the four slopes of _slopes, times dh.
    rest, tanh_slope = 1 - z, 1 - n * n
    d_slope_n = -d_z * tanh_slope - 2 * rest * n * d_n
    d_slope_q = d_slope_n * r + slopes[:, 0] * d_r
    d_slope_r = (d_slope_n * q + slopes[:, 0] * d_q) * r * (1 - r)
    d_slope_r = d_slope_r + slopes[:, 0] * q * (1 - 2 * r) * d_r
    d_slope_z = (d_state - d_n) * z * rest + (state - n) * (1 - 2 * z) * d_z
    d_slopes = torch.stack([d_slope_n, d_slope_r, d_slope_z, d_slope_q], 1)
    added = _sum(dh * d_z, _product(delta[:, 1:].flatten(1), d_weight_hh))
    _, d_delta, d_grad_hx = _back_through(
        None, None, hx, weight_hh, z, slopes, *sequence, dh.unsqueeze(1) * d_slopes, added
    )

    to_input, to_state = delta[:, :3].flatten(1), delta[:, 1:].flatten(1)
    d_to_input, d_to_state = d_delta[:, :3].flatten(1), d_delta[:, 1:].flatten(1)
    rzn = _reorder(weight_ih)
    through = None if d_weight_ih is None else _reorder(d_weight_ih)
    grad_input = _sum(d_to_input @ rzn, _product(to_input, through))
    grad_weight_ih = _sum(d_to_input.t() @ x, _product(to_input.t(), d_x))
    grad_weight_hh = d_to_state.t() @ state + to_state.t() @ d_state
    join = torch.stack if batch_sizes is None else torch.cat
    return [
        None if grad_output is None else join([d_outputs[t] for t in times]),
        None if grad_h_n is None else h,
        None if grad_input is None else grad_input.view(input.shape),
        d_grad_hx,
        None if grad_weight_ih is None else _restore(grad_weight_ih),
        grad_weight_hh,
        None if bias_ih is None else _restore(d_to_input.sum(0)),
        None if bias_hh is None else d_to_state.sum(0),
    ]


def _slopes(gates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """z, and what dh is multiplied with to give the gradients of n, r, z and W_hn h: [N, 4, H]."""
    r, z, n, q = gates.reshape(len(state), -1).chunk(4, -1)
    of_n = (1 - z) * (1 - n * n)
    of_z = (state - n) * z * (1 - z)
    return z, torch.stack([of_n, of_n * q * r * (1 - r), of_z, of_n * r], 1)


def _back_through(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    hx: Tensor,
    weight_hh: Tensor,
    z: Tensor,
    slopes: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    added_delta: Tensor | None = None,
    added_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [N, H], the gates' gradients [N, 4, H] and the gradient of hx, from the last step back.

    added_delta and added_state come on top of each step's gates' and state's gradient.
    """
    B, H = hx.shape
    like = z.view(-1, B, H) if batch_sizes is None else z
    zs, slope_steps = _steps(z, batch_sizes, like), _steps(slopes, batch_sizes, like)
    grads = None if grad_output is None else _steps(grad_output.reshape(z.shape), batch_sizes, like)
    deltas = None if added_delta is None else _steps(added_delta, batch_sizes, like)
    states = None if added_state is None else _steps(added_state, batch_sizes, like)
    carry = hx.new_zeros(hx.shape) if grad_h_n is None else grad_h_n
    all_dh: dict[int, Tensor] = {}
    all_delta: dict[int, Tensor] = {}
    for t in _times(len(zs), not reverse):
        rows = zs[t].size(0)
        dh = carry[:rows] if grads is None else carry[:rows] + grads[t]
        delta = dh.unsqueeze(1) * slope_steps[t]
        if deltas is not None:
            delta = delta + deltas[t]
        direct = dh * zs[t] if states is None else torch.addcmul(states[t], dh, zs[t])
        passed = torch.addmm(direct, delta[:, 1:].flatten(1), weight_hh)
        if resets is not None:
            passed = passed.masked_fill(resets[t].unsqueeze(1), 0)
        carry = passed if rows == carry.size(0) else torch.cat([passed, carry[rows:]])
        all_dh[t], all_delta[t] = dh, delta
    times = range(len(zs))
    return torch.cat([all_dh[t] for t in times]), torch.cat([all_delta[t] for t in times]), carry


def _reorder(rows: Tensor) -> Tensor:
    """From the weights' order r, z, n to n, r, z, in which the gates' gradients stand."""
    return rows.roll(len(rows) // 3, 0)


def _restore(rows: Tensor) -> Tensor:
    return rows.roll(-(len(rows) // 3), 0)


def _product(a: Tensor | None, b: Tensor | None, transposed: bool = False) -> Tensor | None:
    return None if a is None or b is None else a @ (b.t() if transposed else b)


def _sum(*terms: Tensor | None) -> Any:
    present = [term for term in terms if term is not None]
    return functools.reduce(torch.add, present) if present else None


def _step(
    projected: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_r, x_z, x_n = projected.chunk(3, -1)
    h_r, h_z, h_n = linear(h, weight_hh, bias_hh).chunk(3, -1)
    r = (x_r + h_r).sigmoid()
    z = (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (h - n) * z + n, r, z, n, h_n


def _steps(rows: Tensor, batch_sizes: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """Rows of all steps, [N, ...], as one tensor for each step; `like` has the steps' sizes."""
    if batch_sizes is None:
        return rows.view(*like.shape[:2], *rows.shape[1:]).unbind(0)
    return rows.split(batch_sizes.tolist())


def _times(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _entering(
    output: Tensor, hx: Tensor, batch_sizes: Tensor | None, resets: Tensor | None, reverse: bool
) -> Tensor:
    """The states that the rows of all steps start from, [N, H]."""
    outputs = output.unbind(0) if batch_sizes is None else output.split(batch_sizes.tolist())
    states: dict[int, Tensor] = {}
    h = hx
    for t in _times(len(outputs), reverse):
        rows = outputs[t].size(0)
        states[t] = h[:rows]
        if resets is not None:
            states[t] = states[t].masked_fill(resets[t].unsqueeze(1), 0)
        h = outputs[t] if rows == h.size(0) else torch.cat([outputs[t], h[rows:]])
    return torch.cat([states[t] for t in range(len(outputs))])
