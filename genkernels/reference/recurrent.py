"""What the references of every recurrent cell share: the steps of a sequence, dense or packed."""

import torch
from torch import Tensor


def of_tanh(grad: Tensor, y: Tensor) -> Tensor:
    """grad (1 - y^2), in one operation."""
    return torch.ops.aten.tanh_backward(grad, y)


def handed_on(rows: Tensor, carry: Tensor, t: int, resets: Tensor | None) -> Tensor:
    """The rows of a step handed on; those of a packed sequence that it lacks wait as they are."""
    if resets is not None:
        rows = rows.masked_fill(resets[t].unsqueeze(1), 0)
    return rows if len(rows) == len(carry) else torch.cat([rows, carry[len(rows) :]])


def join(steps: dict[int, Tensor]) -> Tensor:
    return torch.cat([steps[t] for t in range(len(steps))])


def joined(steps: dict[int, Tensor], batch_sizes: Tensor | None) -> Tensor:
    """Steps as an op returns them: [T, B, ..], or [sum(batch_sizes), ..]."""
    return (
        torch.stack([steps[t] for t in range(len(steps))]) if batch_sizes is None else join(steps)
    )


def steps_of(rows: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
    return rows.unbind(0) if batch_sizes is None else rows.split(batch_sizes.tolist())


def order_of(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def entering_states(
    output: Tensor, hx: Tensor, batch_sizes: Tensor | None, resets: Tensor | None, reverse: bool
) -> dict[int, Tensor]:
    """The states that the rows of each step start from."""
    outputs = steps_of(output, batch_sizes)
    states: dict[int, Tensor] = {}
    h = hx
    for t in order_of(len(outputs), reverse):
        states[t] = h[: len(outputs[t])]
        if resets is not None:
            states[t] = states[t].masked_fill(resets[t].unsqueeze(1), 0)
        h = handed_on(outputs[t], h, t, None)
    return states
