"""The GRU in Triton: a step's product with weight_hh and its gates in one kernel, forward and
backward. The input's projection and the weights' gradients are products of all steps at once, which
are PyTorch's.

The formulas are those of genkernels.reference.gru. A step is one launch, whose programs each have
BLOCK_B rows and BLOCK_H units: they read the whole entering state, so that a step starts where the
one before has ended, and no atomics are needed. Nothing waits for the host, so a sequence can be
captured in a CUDA graph; batch_sizes lies on the CPU. Products are summed in float32, those of
float32 in full ("ieee") and not in TF32. Every H and batch is served; the second derivative is
plain PyTorch's.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ..reference.gru import _entering, _nrz, _rzn, _steps, _times, each_backward, each_forward
from . import DTYPES, Config


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


# Near zero the odd polynomial of least relative error, 3e-9, up to 0.6 (Lawson's algorithm), where
# the quotient cancels.
@triton.jit
def _tanh(x):
    z = x * x
    p = -5.895156752e-3 * z + 2.079597063e-2
    p = p * z - 5.378383000e-2
    p = p * z + 1.333192412e-1
    p = p * z - 3.333329800e-1
    near = x + x * z * p
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


# What rows enter a step with: the state of the step before, of which there are `known` rows, and
# behind those hx; zero where a row is reset.
@triton.jit
def _entering_state(before, hx, resets, rows, units, known, B, H, HAS_RESETS: tl.constexpr):
    is_there = (rows < B)[:, None] & (units < H)[None, :]
    at = rows.to(tl.int64)[:, None] * H + units[None, :]
    is_known = (rows < known)[:, None]
    h = tl.load(before + at, mask=is_there & is_known, other=0.0)
    h = tl.where(is_known, h, tl.load(hx + at, mask=is_there & (rows >= known)[:, None], other=0.0))
    if HAS_RESETS:
        is_reset = tl.load(resets + rows, mask=rows < B, other=0)
        h = tl.where(is_reset[:, None] != 0, 0.0, h)
    return h


@triton.jit
def _forward_step(
    projected,  # [B, 3H]: W_i x + b_i
    before,  # [known, H]
    hx,  # [.., H]
    weight_hh,  # [3H, H]
    bias_hh,  # [3H]
    resets,  # [B]
    output,  # [B, H]
    gates,  # [B, 4H]
    B,
    H,
    known,
    HAS_BIAS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVES_GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    of_r = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    of_z = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    of_n = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate = H.to(tl.int64) * H  # elements of a gate's rows of the weight
    for first in range(0, H, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        h = _entering_state(before, hx, resets, rows, ks, known, B, H, HAS_RESETS)
        at = weight_hh + units.to(tl.int64)[None, :] * H + ks[:, None]
        is_weight = (units < H)[None, :] & (ks < H)[:, None]
        w = tl.load(at, mask=is_weight, other=0.0)
        of_r = tl.dot(h, w, of_r, input_precision=PRECISION)
        w = tl.load(at + gate, mask=is_weight, other=0.0)
        of_z = tl.dot(h, w, of_z, input_precision=PRECISION)
        w = tl.load(at + 2 * gate, mask=is_weight, other=0.0)
        of_n = tl.dot(h, w, of_n, input_precision=PRECISION)
    if HAS_BIAS:
        of_r += tl.load(bias_hh + units, mask=units < H, other=0.0).to(tl.float32)[None, :]
        of_z += tl.load(bias_hh + H + units, mask=units < H, other=0.0).to(tl.float32)[None, :]
        of_n += tl.load(bias_hh + 2 * H + units, mask=units < H, other=0.0).to(tl.float32)[None, :]
    is_there = (rows < B)[:, None] & (units < H)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    x = projected + long_rows * (3 * H) + units[None, :]
    r = _sigmoid(tl.load(x, mask=is_there, other=0.0).to(tl.float32) + of_r)
    z = _sigmoid(tl.load(x + H, mask=is_there, other=0.0).to(tl.float32) + of_z)
    n = _tanh(tl.load(x + 2 * H, mask=is_there, other=0.0).to(tl.float32) + r * of_n)
    h = _entering_state(before, hx, resets, rows, units, known, B, H, HAS_RESETS).to(tl.float32)
    dtype = output.dtype.element_ty
    tl.store(output + long_rows * H + units[None, :], ((h - n) * z + n).to(dtype), mask=is_there)
    if SAVES_GATES:
        to = gates + long_rows * (4 * H) + units[None, :]
        tl.store(to, r.to(dtype), mask=is_there)
        tl.store(to + H, z.to(dtype), mask=is_there)
        tl.store(to + 2 * H, n.to(dtype), mask=is_there)
        tl.store(to + 3 * H, of_n.to(dtype), mask=is_there)


# The gradients of n, r, z and W_hn h + b_hn, and that of the state after the step, in which they
# are linear.
@triton.jit
def _deltas(
    carry, grad_output, gates, before, hx, resets, rows, units, known, B, H,
    HAS_GRAD: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    is_there = (rows < B)[:, None] & (units < H)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    dh = tl.load(carry + long_rows * H + units[None, :], mask=is_there, other=0.0)
    if HAS_GRAD:
        at = grad_output + long_rows * H + units[None, :]
        dh += tl.load(at, mask=is_there, other=0.0).to(tl.float32)
    at = gates + long_rows * (4 * H) + units[None, :]
    r = tl.load(at, mask=is_there, other=0.0).to(tl.float32)
    z = tl.load(at + H, mask=is_there, other=0.0).to(tl.float32)
    n = tl.load(at + 2 * H, mask=is_there, other=0.0).to(tl.float32)
    q = tl.load(at + 3 * H, mask=is_there, other=0.0).to(tl.float32)
    h = _entering_state(before, hx, resets, rows, units, known, B, H, HAS_RESETS).to(tl.float32)
    of_n = dh * (1.0 - z) * (1.0 - n * n)
    of_r = of_n * q * r * (1.0 - r)
    of_z = dh * (h - n) * z * (1.0 - z)
    return of_n, of_r, of_z, of_n * r, dh, z


@triton.jit
def _backward_step(
    carry,  # float32 [all, H]: the gradient that the step after hands on
    grad_output,  # [B, H]
    gates,  # [B, 4H]
    before,  # [known, H]
    hx,  # [all, H]
    weight_hh,  # [3H, H]
    resets,  # [B]
    to_carry,  # float32 [all, H]
    deltas,  # [B, 4H]: of n, r, z and W_hn h + b_hn
    states,  # [B, H]: the gradient of the state after the step
    B,
    all_rows,
    H,
    known,
    HAS_GRAD: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVES_STATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dtype = deltas.dtype.element_ty
    passed = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate = H.to(tl.int64) * H
    for first in range(0, H, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        _, of_r, of_z, of_q, _, _ = _deltas(
            carry, grad_output, gates, before, hx, resets, rows, ks, known, B, H,
            HAS_GRAD, HAS_RESETS,
        )  # fmt: skip
        at = weight_hh + ks.to(tl.int64)[:, None] * H + units[None, :]
        is_weight = (ks < H)[:, None] & (units < H)[None, :]
        w = tl.load(at, mask=is_weight, other=0.0)
        passed = tl.dot(of_r.to(dtype), w, passed, input_precision=PRECISION)
        w = tl.load(at + gate, mask=is_weight, other=0.0)
        passed = tl.dot(of_z.to(dtype), w, passed, input_precision=PRECISION)
        w = tl.load(at + 2 * gate, mask=is_weight, other=0.0)
        passed = tl.dot(of_q.to(dtype), w, passed, input_precision=PRECISION)
    of_n, of_r, of_z, of_q, dh, z = _deltas(
        carry, grad_output, gates, before, hx, resets, rows, units, known, B, H,
        HAS_GRAD, HAS_RESETS,
    )  # fmt: skip
    is_there = (rows < B)[:, None] & (units < H)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    to = deltas + long_rows * (4 * H) + units[None, :]
    tl.store(to, of_n.to(dtype), mask=is_there)
    tl.store(to + H, of_r.to(dtype), mask=is_there)
    tl.store(to + 2 * H, of_z.to(dtype), mask=is_there)
    tl.store(to + 3 * H, of_q.to(dtype), mask=is_there)
    if SAVES_STATES:
        tl.store(states + long_rows * H + units[None, :], dh.to(dtype), mask=is_there)
    passed += dh * z
    if HAS_RESETS:
        is_reset = tl.load(resets + rows, mask=rows < B, other=0)
        passed = tl.where(is_reset[:, None] != 0, 0.0, passed)
    # Rows that a packed sequence's step lacks wait as they are.
    is_row = (rows < all_rows)[:, None] & (units < H)[None, :]
    at = long_rows * H + units[None, :]
    waiting = tl.load(carry + at, mask=is_row, other=0.0)
    tl.store(to_carry + at, tl.where((rows < B)[:, None], passed, waiting), mask=is_row)


def config(dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """Block sizes, warps and stages of a step, for every H, batch and architecture: what keeps
    its sums and operands in registers on sm_80, sm_90, sm_100 and gfx942. Products of float32 have
    no tensor cores, and the backward pass holds five tensors of a block at once: half the K."""
    return {
        "BLOCK_B": 16,
        "BLOCK_H": 32,
        "BLOCK_K": 32 if backward or dtype == torch.float32 else 64,
        "num_warps": 4,
        "num_stages": 2,
    }


_FORWARD = ("projected", "before", "hx", "weight_hh", "bias_hh", "resets", "output", "gates")
_BACKWARD = (
    *("carry", "grad_output", "gates", "before", "hx", "weight_hh", "resets"),
    *("to_carry", "deltas", "states"),
)


def configs() -> Iterator[Config]:
    """Every kernel as the launchers run it, for compiling ahead of time."""
    for dtype, has_resets in itertools.product(DTYPES, (False, True)):
        for kernel, names in ((_forward_step, _FORWARD), (_backward_step, _BACKWARD)):
            is_backward = kernel is _backward_step
            dtypes = dict.fromkeys(names, dtype)
            dtypes |= {name: torch.float32 for name in names if "carry" in name}
            if has_resets:
                dtypes["resets"] = torch.bool
            numbers = ["B", "all_rows", "H", "known"] if is_backward else ["B", "H", "known"]
            settings = config(dtype, is_backward)
            options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
            flags = ("HAS_GRAD", "SAVES_STATES") if is_backward else ("HAS_BIAS", "SAVES_GATES")
            constants = settings | dict.fromkeys(flags, True)
            constants |= {"HAS_RESETS": has_resets, "PRECISION": "ieee"}
            name = f"gru {'backward' if is_backward else 'forward'} step"
            name += ", resets" if has_resets else ""
            yield Config(name, dtype, kernel, dtypes, numbers, constants, options)


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
    packed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the raw op of that name; `packed` is the CPU kernel's, and not read."""
    H = hx.size(1)
    hx, weight_hh = hx.contiguous(), weight_hh.contiguous()
    rows = input.shape[:-1]
    output = input.new_empty((*rows, H))
    gates = input.new_empty((*rows, 4 * H)) if save_gates else input.new_empty(0)
    h_n = hx.clone()
    if output.numel() == 0:
        return output, h_n, gates
    projected = _steps(linear(input, weight_ih, bias_ih).contiguous(), batch_sizes)
    outputs = _steps(output, batch_sizes)
    saved = _steps(gates, batch_sizes) if save_gates else outputs
    resets = None if resets is None else resets.contiguous()
    settings = config(input.dtype, False)
    before, known = hx, 0
    for t in _times(len(outputs), reverse):
        B = len(outputs[t])
        grid = (triton.cdiv(B, settings["BLOCK_B"]), triton.cdiv(H, settings["BLOCK_H"]))
        _forward_step[grid](
            projected[t], before, hx, weight_hh, hx if bias_hh is None else bias_hh,
            hx if resets is None else resets[t], outputs[t], saved[t], B, H, min(known, B),
            HAS_BIAS=bias_hh is not None, HAS_RESETS=resets is not None, SAVES_GATES=save_gates,
            PRECISION="ieee", **settings,
        )  # fmt: skip
        before, known = outputs[t], B
        h_n[:B] = outputs[t]
    return output, h_n, gates


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
) -> tuple[Tensor, ...]:
    """As the raw op of that name."""
    H = hx.size(1)
    if gates.numel() == 0:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        gates = gru_forward(input, hx, *weights, batch_sizes, resets, reverse, True, None)[2]
    hx, output, weight = hx.contiguous(), output.contiguous(), weight_hh.contiguous()
    resets = None if resets is None else resets.contiguous()
    outputs, saved = _steps(output, batch_sizes), _steps(gates.contiguous(), batch_sizes)
    delta = gates.new_empty(gates.shape)
    states = output.new_empty(output.shape if states_grad else 0)
    deltas = _steps(delta, batch_sizes)
    of_states = _steps(states, batch_sizes) if states_grad else deltas
    grads = deltas if grad_output is None else _steps(grad_output.contiguous(), batch_sizes)
    carry = torch.zeros_like(hx, dtype=torch.float32)
    if grad_h_n is not None:
        carry.copy_(grad_h_n)
    other = torch.empty_like(carry)
    settings = config(input.dtype, True)
    grid = (triton.cdiv(len(hx), settings["BLOCK_B"]), triton.cdiv(H, settings["BLOCK_H"]))
    for t in _times(len(outputs), not reverse) if output.numel() else ():
        B = len(outputs[t])
        last = t + 1 if reverse else t - 1
        before = outputs[last] if 0 <= last < len(outputs) else hx[:0]
        _backward_step[grid](
            carry, grads[t], saved[t], before if len(before) else hx, hx, weight,
            hx if resets is None else resets[t], other, deltas[t], of_states[t],
            B, len(hx), H, min(len(before), B),
            HAS_GRAD=grad_output is not None, HAS_RESETS=resets is not None,
            SAVES_STATES=states_grad, PRECISION="ieee", **settings,
        )  # fmt: skip
        carry, other = other, carry
    delta, x = delta.view(-1, 4 * H), input.reshape(-1, input.size(-1))

    def gradient(needed: bool, compute: Callable[[], Tensor]) -> Tensor:
        return compute() if needed else input.new_empty(0)

    def entering() -> Tensor:
        steps = _entering(output, hx, batch_sizes, resets, reverse)
        return torch.cat([steps[t] for t in range(len(steps))]) if steps else hx[:0]

    bias_grad = weight_grad and bias_ih is not None
    return (
        gradient(input_grad, lambda: (delta[:, : 3 * H] @ _nrz(weight_ih)).view(input.shape)),
        carry.to(hx.dtype),
        gradient(weight_grad, lambda: _rzn(delta[:, : 3 * H].t() @ x)),
        gradient(weight_grad, lambda: delta[:, H:].t() @ entering()),
        gradient(bias_grad, lambda: _rzn(delta[:, : 3 * H].sum(0))),
        gradient(bias_grad, lambda: delta[:, H:].sum(0)),
        states,
    )


def gru_cell_forward(input: Tensor, hx: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weights, (save_gates, packed) = args[:4], args[4:]
    rest: Any = (None, None, False, save_gates, packed)
    _, h, gates = gru_forward(input.unsqueeze(0), hx, *weights, *rest)
    return h, gates.squeeze(0)


def gru_cell_backward(grad_h: Tensor, input: Tensor, hx: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weights, (gates, input_grad, weight_grad) = args[:4], args[4:]
    if gates.numel() > 0:
        gates = gates.unsqueeze(0)
    rest: Any = (hx.unsqueeze(0), gates, None, None, False, input_grad, weight_grad, False)
    gradients = gru_backward(None, grad_h, input.unsqueeze(0), hx, *weights, *rest)
    return gradients[0].view(input.shape if input_grad else 0), *gradients[1:6]


def bidirectional_gru_forward(*args: Any) -> tuple[Tensor, ...]:
    first, second = each_forward(args)
    return *gru_forward(*first), *gru_forward(*second)


def bidirectional_gru_backward(*args: Any) -> tuple[Tensor, ...]:
    first, second = each_backward(args)
    return *gru_backward(*first)[:6], *gru_backward(*second)[:6]


KERNELS: dict[str, Callable[..., Any]] = {
    launcher.__name__: launcher
    for launcher in (
        gru_forward,
        gru_backward,
        gru_cell_forward,
        gru_cell_backward,
        bidirectional_gru_forward,
        bidirectional_gru_backward,
    )
}
