"""Elman's recurrent unit in plain PyTorch: the definition that every kernel is held to.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

(Elman 1990, https://doi.org/10.1207/s15516709cog1402_1, as torch.nn.RNN has it.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .recurrent import entering_states, handed_on, join, joined, of_tanh, order_of, steps_of


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
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    return rnn_forward(input, hx, *weights, batch_sizes, resets, reverse)


def rnn_forward(
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
    projected = steps_of(linear(input, weight_ih, bias_ih), batch_sizes)  # T of [B_t, H]
    outputs: dict[int, Tensor] = {}
    h = hx
    for t in order_of(len(projected), reverse):
        entering = h[: len(projected[t])]
        if resets is not None:
            entering = entering.masked_fill(resets[t].unsqueeze(1), 0)
        outputs[t] = (projected[t] + linear(entering, weight_hh, bias_hh)).tanh()
        h = handed_on(outputs[t], h, t, None)
    return joined(outputs, batch_sizes), h.clone()


def rnn_backward(
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
    """Backpropagation through time. Gradients that are not asked for have no elements; the last one
    is that of the state after each step, as output."""
    outputs = steps_of(output, batch_sizes)
    grads = None if grad_output is None else steps_of(grad_output, batch_sizes)
    carry = hx.new_zeros(hx.shape) if grad_h_n is None else grad_h_n
    deltas: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    for t in order_of(len(outputs), not reverse):
        passed = carry[: len(outputs[t])]
        states[t] = passed if grads is None else passed + grads[t]
        deltas[t] = of_tanh(states[t], outputs[t])
        carry = handed_on(deltas[t] @ weight_hh, carry, t, resets)
    delta = join(deltas)  # [N, H], N the rows of all steps
    x = input.reshape(-1, input.size(-1))
    state = join(entering_states(output, hx, batch_sizes, resets, reverse))

    def gradient(needed: bool, compute: Callable[[], Tensor]) -> Tensor:
        return compute() if needed else input.new_empty(0)

    bias_grad = weight_grad and bias_ih is not None
    return (
        gradient(input_grad, lambda: (delta @ weight_ih).view(input.shape)),
        carry.clone(),
        gradient(weight_grad, lambda: delta.t() @ x),
        gradient(weight_grad, lambda: delta.t() @ state),
        gradient(bias_grad, lambda: delta.sum(0)),
        gradient(bias_grad, lambda: delta.sum(0)),
        gradient(states_grad, lambda: join(states).view(output.shape)),
    )


def rnn_double_backward(
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
    grad_states: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of <cotangents, rnn_backward(...)> with respect to its first eight arguments: the
    tangents of the sequence and of its backward pass in the direction of the cotangents, as in
    `gru_double_backward`.

    Differentiable to any order: where gradients are recorded, what was saved is computed anew, so
    that it depends on the inputs.
    """
    if torch.is_grad_enabled():
        leaves = (input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
        sizes = (batch_sizes, resets, reverse)
        output, _ = rnn_forward(*leaves, *sizes)
        *_, grad_states = rnn_backward(
            grad_output, grad_h_n, *leaves, output, *sizes, False, False, True
        )
    d_input, d_hx, d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh = cotangents
    x = input.reshape(-1, input.size(-1))  # [N, I]
    d_x = x.new_zeros(x.shape) if d_input is None else d_input.reshape(x.shape)
    outputs, states = steps_of(output, batch_sizes), steps_of(grad_states, batch_sizes)
    entering = entering_states(output, hx, batch_sizes, resets, reverse)

    projected = linear(d_x, weight_ih, d_bias_ih)
    if d_weight_ih is not None:
        projected = torch.addmm(projected, x, d_weight_ih.t())
    from_input = steps_of(projected.view(output.shape), batch_sizes)
    d_entering: dict[int, Tensor] = {}
    d_outputs: dict[int, Tensor] = {}
    d_h = hx.new_zeros(hx.shape) if d_hx is None else d_hx
    for t in order_of(len(outputs), reverse):
        d_state = d_h[: len(outputs[t])]
        if resets is not None:
            d_state = d_state.masked_fill(resets[t].unsqueeze(1), 0)
        d_sum = from_input[t] + linear(d_state, weight_hh, d_bias_hh)
        if d_weight_hh is not None:
            d_sum = torch.addmm(d_sum, entering[t], d_weight_hh.t())
        d_entering[t], d_outputs[t] = d_state, of_tanh(d_sum, outputs[t])
        d_h = handed_on(d_outputs[t], d_h, t, None)

    deltas: dict[int, Tensor] = {}
    d_deltas: dict[int, Tensor] = {}
    d_carry = hx.new_zeros(hx.shape)
    for t in order_of(len(outputs), not reverse):
        deltas[t] = of_tanh(states[t], outputs[t])
        of_slope = torch.mul(states[t] * outputs[t], d_outputs[t])  # of 1 - h^2, by -2
        d_deltas[t] = of_tanh(d_carry[: len(outputs[t])], outputs[t]) - 2 * of_slope
        d_passed = d_deltas[t] @ weight_hh
        if d_weight_hh is not None:
            d_passed = torch.addmm(d_passed, deltas[t], d_weight_hh)
        d_carry = handed_on(d_passed, d_carry, t, resets)
    delta, d_delta = join(deltas), join(d_deltas)  # [N, H]
    grad_rows = d_delta @ weight_ih
    if d_weight_ih is not None:
        grad_rows = torch.addmm(grad_rows, delta, d_weight_ih)
    grad_bias = d_delta.sum(0)
    return [
        None if grad_output is None else join(d_outputs).view(grad_output.shape),
        None if grad_h_n is None else d_h,
        grad_rows.view(input.shape),
        d_carry,
        torch.addmm(d_delta.t() @ x, delta.t(), d_x),
        torch.addmm(d_delta.t() @ join(entering), delta.t(), join(d_entering)),
        None if bias_ih is None else grad_bias,
        None if bias_hh is None else grad_bias.clone(),
    ]
