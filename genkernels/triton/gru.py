"""The gated recurrent unit in Triton: one launch for each step, which forms the state's product and
the gates, or the gates' gradients and their product. The input's projection and the gradients of
weights are products over all steps at once, and PyTorch's.

What a launch reads of other programs an earlier launch has written, so there is no barrier and no
atomic: results are the same in each run. Nothing waits for the device (``batch_sizes`` lies on the
CPU), so a sequence can be captured in a CUDA graph. Every H and batch is served; float64 and the
double backward are left to the reference. Formulas: genkernels.reference.gru.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ..reference.gru import (
    _carry,
    _entering,
    _join,
    _nrz,
    _rzn,
    _steps,
    _times,
    each_backward,
    each_forward,
)
from . import Config
from .math import tanh


@triton.jit
def _forward_step(
    projected,  # [B, 3H]: W_i x + b_i
    hx,  # [B, H], the state before the step
    weight_hh,  # [3H, H]
    bias_hh,  # [3H]
    resets,  # [B]
    output,  # [B, H]
    gates,  # [B, 4H]
    B,
    H,
    HAS_BIAS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    # A state that is dropped is not read: 0 * NaN would spread.
    enters = rows < B
    if HAS_RESETS:
        enters = enters & (tl.load(resets + rows, mask=rows < B, other=0) == 0)
    r = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    z = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    q = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    gate = H.to(tl.int64) * H  # from one gate's rows of weight_hh to the next's
    for first in range(0, H, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        h = tl.load(
            hx + rows[:, None] * H + k[None, :],
            mask=enters[:, None] & (k < H)[None, :],
            other=0.0,
        )  # [BLOCK_B, BLOCK_K]
        at = weight_hh + units.to(tl.int64)[None, :] * H + k[:, None]
        inside = (k < H)[:, None] & (units < H)[None, :]
        r = tl.dot(h, tl.load(at, mask=inside, other=0.0), r, input_precision="ieee")
        z = tl.dot(h, tl.load(at + gate, mask=inside, other=0.0), z, input_precision="ieee")
        q = tl.dot(h, tl.load(at + 2 * gate, mask=inside, other=0.0), q, input_precision="ieee")
    if HAS_BIAS:
        bias = bias_hh + units
        r += tl.load(bias, mask=units < H, other=0.0).to(tl.float32)[None, :]
        z += tl.load(bias + H, mask=units < H, other=0.0).to(tl.float32)[None, :]
        q += tl.load(bias + 2 * H, mask=units < H, other=0.0).to(tl.float32)[None, :]
    inside = (rows < B)[:, None] & (units < H)[None, :]
    x = projected + rows[:, None] * (3 * H) + units[None, :]
    r = tl.sigmoid(r + tl.load(x, mask=inside, other=0.0).to(tl.float32))
    z = tl.sigmoid(z + tl.load(x + H, mask=inside, other=0.0).to(tl.float32))
    n = tanh(tl.load(x + 2 * H, mask=inside, other=0.0).to(tl.float32) + r * q)
    at = rows[:, None] * H + units[None, :]
    h = tl.load(hx + at, mask=inside & enters[:, None], other=0.0).to(tl.float32)
    dtype = output.dtype.element_ty
    tl.store(output + at, ((h - n) * z + n).to(dtype), mask=inside)
    if SAVE_GATES:
        to = gates + rows[:, None] * (4 * H) + units[None, :]
        tl.store(to, r.to(dtype), mask=inside)
        tl.store(to + H, z.to(dtype), mask=inside)
        tl.store(to + 2 * H, n.to(dtype), mask=inside)
        tl.store(to + 3 * H, q.to(dtype), mask=inside)


# One step back. First what the step after it (in time; `known` rows) hands on: carry, of which each
# program reads and writes its own part alone, plus the product of that step's gradients, which the
# launch before has stored. Then this step's own gradients, of B rows. Rows behind those are done:
# carry is then the gradient of their first state.
@triton.jit
def _backward_step(
    carry,  # [max(B, known), H], float32
    later,  # [known, 4H], deltas of the step after
    later_resets,  # [known]
    weight_hh,  # [3H, H]
    grad_output,  # [B, H]
    hx,  # [B, H], the state before the step, zero where it was reset
    gates,  # [B, 4H]
    deltas,  # [B, 4H]: the gradients of n, r, z and W_hn h + b_hn before their functions
    grad_states,  # [B, H]
    B,
    known,
    H,
    HAS_GRAD_OUTPUT: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dtype = deltas.dtype.element_ty
    dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for first in range(0, 3 * H, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        delta = tl.load(
            later + rows[:, None] * (4 * H) + (H + k)[None, :],
            mask=(rows < known)[:, None] & (k < 3 * H)[None, :],
            other=0.0,
        )  # [BLOCK_B, BLOCK_K]
        weight = tl.load(
            weight_hh + k.to(tl.int64)[:, None] * H + units[None, :],
            mask=(k < 3 * H)[:, None] & (units < H)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_H]
        dh = tl.dot(delta, weight, dh, input_precision="ieee")
    carried = ((rows < B) | (rows < known))[:, None] & (units < H)[None, :]
    at = rows[:, None] * H + units[None, :]
    dh += tl.load(carry + at, mask=carried, other=0.0)
    if HAS_RESETS:
        dropped = tl.load(later_resets + rows, mask=rows < known, other=0) != 0
        dh = tl.where(dropped[:, None], 0.0, dh)
    inside = (rows < B)[:, None] & (units < H)[None, :]
    if HAS_GRAD_OUTPUT:
        dh += tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
    saved = gates + rows[:, None] * (4 * H) + units[None, :]
    r = tl.load(saved, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(saved + H, mask=inside, other=0.0).to(tl.float32)
    n = tl.load(saved + 2 * H, mask=inside, other=0.0).to(tl.float32)
    q = tl.load(saved + 3 * H, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(hx + at, mask=inside, other=0.0).to(tl.float32)
    of_n = dh * (1.0 - z) * (1.0 - n * n)
    to = deltas + rows[:, None] * (4 * H) + units[None, :]
    tl.store(to, of_n.to(dtype), mask=inside)
    tl.store(to + H, (of_n * q * r * (1.0 - r)).to(dtype), mask=inside)
    tl.store(to + 2 * H, (dh * (h - n) * z * (1.0 - z)).to(dtype), mask=inside)
    tl.store(to + 3 * H, (of_n * r).to(dtype), mask=inside)
    if SAVE_STATES:
        tl.store(grad_states + at, dh.to(dtype), mask=inside)
    tl.store(carry + at, tl.where((rows < B)[:, None], dh * z, dh), mask=carried)


# Blocks of a step by dtype, for every H and architecture: sums and operands stay in registers on
# sm_80, sm_90, sm_100 and gfx942, even where H is no multiple of 16 and each load has an address of
# its own: with a BLOCK_K of 64 the forward step then spills. float32 has no tensor cores.
_CONFIGS: dict[torch.dtype, dict[str, int]] = {
    torch.float32: {"BLOCK_B": 16, "BLOCK_H": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    torch.bfloat16: {"BLOCK_B": 32, "BLOCK_H": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    torch.float16: {"BLOCK_B": 32, "BLOCK_H": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
}


def configs(architecture: str) -> Iterator[Config]:
    """Every kernel as the launchers run it there, with all that it may read and write, for
    compiling ahead of time."""
    for dtype, has_resets in itertools.product(_CONFIGS, (False, True)):
        blocks = dict(_CONFIGS[dtype])
        options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
        for kernel, way in ((_forward_step, "forward"), (_backward_step, "backward")):
            names = kernel.arg_names
            numbers = [name for name in names if name in ("B", "known", "H")]
            flags = [name for name in names if name.startswith(("HAS_", "SAVE_"))]
            tensors = {name: dtype for name in names if name.islower() and name not in numbers}
            if "carry" in tensors:
                tensors["carry"] = torch.float32
            if has_resets:
                tensors |= {name: torch.bool for name in names if "resets" in name}
            constants = blocks | dict.fromkeys(flags, True) | {"HAS_RESETS": has_resets}
            name = f"gru {way} step{', resets' if has_resets else ''}"
            yield Config(name, dtype, kernel, tensors, constants, options)


def _grid(rows: int, H: int, dtype: torch.dtype) -> tuple[int, int]:
    blocks = _CONFIGS[dtype]
    return triton.cdiv(rows, blocks["BLOCK_B"]), triton.cdiv(H, blocks["BLOCK_H"])


def _check(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
) -> None:
    """Kernels trust what they are given: a size that does not fit would be a read out of bounds."""
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims or hx.dim() != 2:
        raise RuntimeError(
            f"genkernels.gru: expected input of {dims} dimensions and hx of 2, got "
            f"{list(input.shape)} and {list(hx.shape)}"
        )
    (B, H), I = hx.shape, input.size(-1)
    steps = len(input) if batch_sizes is None else len(batch_sizes)
    if steps == 0:
        raise RuntimeError("genkernels.gru: input: expected a sequence length larger than 0")
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError("genkernels.gru: bias_ih, bias_hh: expected both or none")
    if batch_sizes is None:
        _check_like("input", input, (steps, B, I), input)
    else:
        sizes = batch_sizes.tolist()
        falls = all(0 < size <= before for before, size in itertools.pairwise([B, *sizes]))
        if not falls or sizes[0] != B or sum(sizes) != len(input) or resets is not None:
            raise RuntimeError(
                f"genkernels.gru: batch_sizes: expected hx's {B} first, then positive, never "
                f"larger sizes, {len(input)} rows in all, and no resets, got {sizes}"
            )
    _check_like("hx", hx, (B, H), input)
    _check_like("weight_ih", weight_ih, (3 * H, I), input)
    _check_like("weight_hh", weight_hh, (3 * H, H), input)
    _check_like("bias_ih", bias_ih, (3 * H,), input)
    _check_like("bias_hh", bias_hh, (3 * H,), input)
    _check_like("resets", resets, (steps, B), input, torch.bool)


def _check_like(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    input: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    if tensor is None:
        return
    expected = (list(shape), dtype or input.dtype, input.device)
    got = (list(tensor.shape), tensor.dtype, tensor.device)
    if got != expected:
        raise RuntimeError(
            f"genkernels.gru: {name}: expected {' '.join(map(str, expected))}, got "
            f"{' '.join(map(str, got))}"
        )


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
    """The raw op of that name. `packed` is for the compiled CPU kernel, and is not read."""
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    _check(input, hx, *weights, batch_sizes, resets)
    H, dtype = hx.size(1), input.dtype
    hx, weight_hh = hx.contiguous(), weight_hh.contiguous()
    bias_hh = None if bias_hh is None else bias_hh.contiguous()
    resets = None if resets is None else resets.contiguous()
    output = input.new_empty((*input.shape[:-1], H))
    gates = input.new_empty((*input.shape[:-1], 4 * H) if save_gates else 0)
    if output.numel() == 0:
        return output, hx.clone(), gates
    projected = _steps(linear(input, weight_ih, bias_ih).contiguous(), batch_sizes)
    outputs = _steps(output, batch_sizes)
    saved = _steps(gates, batch_sizes) if save_gates else outputs
    h = hx
    with torch.cuda.device_of(input):
        for t in _times(len(outputs), reverse):
            rows = len(outputs[t])
            _forward_step[_grid(rows, H, dtype)](
                projected[t],
                h,
                weight_hh,
                weight_hh if bias_hh is None else bias_hh,
                weight_hh if resets is None else resets[t],
                outputs[t],
                saved[t],
                rows,
                H,
                HAS_BIAS=bias_hh is not None,
                HAS_RESETS=resets is not None,
                SAVE_GATES=save_gates,
                **_CONFIGS[dtype],
            )
            h = _carry(outputs[t], h, t, None)
    return output, h.clone(), gates


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
    """The raw op of that name."""
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    _check(input, hx, *weights, batch_sizes, resets)
    H, dtype = hx.size(1), input.dtype
    rows_shape = input.shape[:-1]
    _check_like("output", output, (*rows_shape, H), input)
    _check_like("grad_output", grad_output, (*rows_shape, H), input)
    _check_like("grad_h_n", grad_h_n, hx.shape, input)
    if gates.numel() == 0:
        gates = gru_forward(input, hx, *weights, batch_sizes, resets, reverse, True, None)[2]
    _check_like("gates", gates, (*rows_shape, 4 * H), input)
    entering = _join(_entering(output, hx, batch_sizes, resets, reverse))  # [N, H]
    if batch_sizes is None:
        entering = entering.view(output.shape)
    weight = weight_hh.contiguous()
    resets = None if resets is None else resets.contiguous()
    states = input.new_empty((*rows_shape, H) if states_grad else 0)
    delta = torch.empty_like(gates, memory_format=torch.contiguous_format)
    carry = torch.zeros_like(hx, dtype=torch.float32, memory_format=torch.contiguous_format)
    if grad_h_n is not None:
        carry.copy_(grad_h_n)
    deltas, saved = _steps(delta, batch_sizes), _steps(gates.contiguous(), batch_sizes)
    entered = _steps(entering, batch_sizes)
    grads = None if grad_output is None else _steps(grad_output.contiguous(), batch_sizes)
    of_states = _steps(states, batch_sizes) if states_grad else None

    def launch(t: int, rows: int, later: int, known: int) -> None:
        _backward_step[_grid(max(rows, known), H, dtype)](
            carry,
            deltas[later],
            weight if resets is None else resets[later],
            weight,
            entered[t] if grads is None else grads[t],
            entered[t],
            saved[t],
            deltas[t],
            entered[t] if of_states is None else of_states[t],
            rows,
            known,
            H,
            HAS_GRAD_OUTPUT=grads is not None,
            HAS_RESETS=resets is not None,
            SAVE_STATES=states_grad,
            **_CONFIGS[dtype],
        )

    if output.numel() > 0:
        with torch.cuda.device_of(input):
            later, known = 0, 0
            for t in _times(len(deltas), not reverse):
                launch(t, len(deltas[t]), later, known)
                later, known = t, len(deltas[t])
            launch(later, 0, later, known)  # what the first step hands on to hx
    delta, entering, x = (rows.flatten(0, -2) for rows in (delta, entering, input))

    def gradient(needed: bool, compute: Callable[[], Tensor]) -> Tensor:
        return compute() if needed else input.new_empty(0)

    bias_grad = weight_grad and bias_ih is not None
    return (
        gradient(input_grad, lambda: (delta[:, : 3 * H] @ _nrz(weight_ih)).view(input.shape)),
        carry.to(dtype, copy=True),
        gradient(weight_grad, lambda: _rzn(delta[:, : 3 * H].t() @ x)),
        gradient(weight_grad, lambda: delta[:, H:].t() @ entering),
        gradient(bias_grad, lambda: _rzn(delta[:, : 3 * H].sum(0))),
        gradient(bias_grad, lambda: delta[:, H:].sum(0)),
        states,
    )


def gru_cell_forward(input: Tensor, hx: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The raw op of that name, a sequence of one step."""
    weights, (save_gates, packed) = args[:4], args[4:]
    rest: Any = (None, None, False, save_gates, packed)
    _, h, gates = gru_forward(input.unsqueeze(0), hx, *weights, *rest)
    return h, gates.squeeze(0) if save_gates else gates


def gru_cell_backward(grad_h: Tensor, input: Tensor, hx: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The raw op of that name. What stands for the output is not read."""
    weights, (gates, *wanted) = args[:4], args[4:]
    saved = (hx.unsqueeze(0), gates.unsqueeze(0), None, None, False)
    rest: Any = (*saved, *wanted, False)
    gradients = gru_backward(None, grad_h, input.unsqueeze(0), hx, *weights, *rest)
    return gradients[0].view(input.shape if wanted[0] else 0), *gradients[1:6]


def bidirectional_gru_forward(*args: Any) -> tuple[Tensor, ...]:
    """The raw op of that name, one direction after the other."""
    first, second = each_forward(args)
    return *gru_forward(*first), *gru_forward(*second)


def bidirectional_gru_backward(*args: Any) -> tuple[Tensor, ...]:
    """The raw op of that name, one direction after the other."""
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
