"""The gated recurrent unit in Triton.

Where a program can hold weight_hh (`resident_limit` says where), one launch does all steps, forward
or back, of 16 rows of the batch in each program, or of 4 in float32 on NVIDIA's GPUs. Else, and for
packed sequences, each step has a launch, which forms the state's product and the gates, or the
gates' gradients and their product. The input's projection and the gradients of weights are products
over all steps at once, and PyTorch's.

What a program reads of others' an earlier launch has written: there is no atomic and no barrier
between programs, and results are the same in each run. Nothing waits for the device
(``batch_sizes`` lies on the CPU), so a sequence can be captured in a CUDA graph. Every H and batch
is served, and neither a kernel nor its blocks depend on the batch: with few rows, most of a GPU has
no program of a sequence to run. float64 and the double backward are left to the reference.
Formulas: genkernels.reference.gru.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ..reference.gru import _nrz, _rzn, each_backward, each_forward
from ..reference.recurrent import entering_states, handed_on, join, order_of, steps_of
from . import DTYPES, Config, architecture_of, check_like
from .launch import launch, launch_each
from .math import tanh


# r, z, n and the state after a step, of the input's part, the state's and the state before.
@triton.jit
def _step(x_r, x_z, x_n, r, z, q, h):
    r = tl.sigmoid(r + x_r.to(tl.float32))
    z = tl.sigmoid(z + x_z.to(tl.float32))
    n = tanh(x_n.to(tl.float32) + r * q)
    return r, z, n, (h.to(tl.float32) - n) * z + n


# The gradients of n, r, z and W_hn h + b_hn before their functions, of that of the state after.
@triton.jit
def _step_back(dh, r, z, n, q, h):
    r, z, n, q = r.to(tl.float32), z.to(tl.float32), n.to(tl.float32), q.to(tl.float32)
    of_n = dh * (1.0 - z) * (1.0 - n * n)
    of_z = dh * (h.to(tl.float32) - n) * z * (1.0 - z)
    return of_n, of_n * q * r * (1.0 - r), of_z, of_n * r


# The kernels of a sequence hold H units as a tuple of tiles of BLOCK_H, and weight_hh as one of
# tiles [BLOCK_H, BLOCK_H]: those of rows i and columns k stand at i * (tiles of H) + k, where i
# counts through the gates. Offsets within a program's rows of a step have 32 bits.
@triton.jit
def _load_weight(weight_hh, H: tl.constexpr, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    units = tl.arange(0, BLOCK_H)
    COUNT: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    tiles: tl.tuple = ()
    for i in tl.static_range(3 * COUNT):
        for k in tl.static_range(COUNT):
            row, column = i % COUNT * BLOCK_H + units, k * BLOCK_H + units
            if TRANSPOSED:
                at, inside = row[None, :] * H + column[:, None], (row < H)[None, :]
                inside = inside & (column < H)[:, None]
            else:
                at, inside = row[:, None] * H + column[None, :], (row < H)[:, None]
                inside = inside & (column < H)[None, :]
            tiles += (tl.load(weight_hh + i // COUNT * H * H + at, mask=inside, other=0.0),)
    return tiles


# The tiles of rows [PARTS * H], which begin at `start`, part by part.
@triton.jit
def _load_rows(
    start, is_row, H: tl.constexpr, PARTS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_H)
    tiles: tl.tuple = ()
    for part in tl.static_range(PARTS):
        for first in tl.static_range(0, H, BLOCK_H):
            at = rows[:, None] * (PARTS * H) + (part * H + first + columns)[None, :]
            inside = is_row[:, None] & (first + columns < H)[None, :]
            tiles += (tl.load(start + at, mask=inside, other=0.0),)
    return tiles


@triton.jit
def _store_rows(
    start, tile, is_row, part: tl.constexpr, index: tl.constexpr, H: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    units = index * BLOCK_H + tl.arange(0, BLOCK_H)
    at = tl.arange(0, BLOCK_B)[:, None] * (PARTS * H) + (part * H + units)[None, :]
    inside = is_row[:, None] & (units < H)[None, :]
    tl.store(start + at, tile.to(start.dtype.element_ty), mask=inside)


# All steps of BLOCK_B rows. What a step reads of the input is loaded before its product, so that it
# is there when that is done.
@triton.jit(do_not_specialize=["T", "B"])
def _forward_sequence(
    projected,  # [T, B, 3H]: W_i x + b_i
    hx,  # [B, H]
    weight_hh,  # [3H, H]
    bias_hh,  # [3H]
    resets,  # [T, B]
    output,  # [T, B, H]
    gates,  # [T, B, 4H]
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    COUNT: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    dtype = output.dtype.element_ty
    rows, units = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_H)
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    is_row = rows < B - first
    states = _load_rows(hx + first * H, is_row, H, 1, BLOCK_B, BLOCK_H)
    weight = _load_weight(weight_hh, H, BLOCK_H, True)
    row = tl.cast(T - 1, tl.int64) * B + first if REVERSE else first
    for _ in range(T):
        x = _load_rows(projected + row * (3 * H), is_row, H, 3, BLOCK_B, BLOCK_H)
        if HAS_RESETS:
            is_dropped = (tl.load(resets + row + rows, mask=is_row, other=0) != 0)[:, None]
        sums: tl.tuple = ()
        entering: tl.tuple = ()
        for i in tl.static_range(3 * COUNT):
            bias = tl.zeros((BLOCK_H,), tl.float32)
            if HAS_BIAS:
                unit = i % COUNT * BLOCK_H + units
                at = bias_hh + i // COUNT * H + unit
                bias = tl.load(at, mask=unit < H, other=0.0).to(tl.float32)
            sums += (tl.broadcast_to(bias[None, :], (BLOCK_B, BLOCK_H)),)
        for k in tl.static_range(COUNT):
            h = states[k]
            if HAS_RESETS:  # not a product, since 0 * NaN would spread
                h = tl.where(is_dropped, 0.0, h).to(dtype)
            entering += (h,)
            added: tl.tuple = ()
            for i in tl.static_range(3 * COUNT):
                added += (tl.dot(h, weight[i * COUNT + k], sums[i], input_precision="ieee"),)
            sums = added
        states = ()
        for k in tl.static_range(COUNT):
            q = sums[2 * COUNT + k]
            r, z, n, h = _step(
                x[k], x[COUNT + k], x[2 * COUNT + k], sums[k], sums[COUNT + k], q, entering[k]
            )
            states += (h.to(dtype),)
            _store_rows(output + row * H, h, is_row, 0, k, H, 1, BLOCK_B, BLOCK_H)
            if SAVE_GATES:
                to = gates + row * (4 * H)
                _store_rows(to, r, is_row, 0, k, H, 4, BLOCK_B, BLOCK_H)
                _store_rows(to, z, is_row, 1, k, H, 4, BLOCK_B, BLOCK_H)
                _store_rows(to, n, is_row, 2, k, H, 4, BLOCK_B, BLOCK_H)
                _store_rows(to, q, is_row, 3, k, H, 4, BLOCK_B, BLOCK_H)
        row = row - B if REVERSE else row + B


# What a step back reads, part by part: r, z, n, W_hn h + b_hn, the state before and the gradient of
# the state after.
@triton.jit
def _load_step(
    gates, hx, grad_output, row, is_row, H: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tiles = _load_rows(gates + row * (4 * H), is_row, H, 4, BLOCK_B, BLOCK_H)
    tiles += _load_rows(hx + row * H, is_row, H, 1, BLOCK_B, BLOCK_H)
    if HAS_GRAD_OUTPUT:
        tiles += _load_rows(grad_output + row * H, is_row, H, 1, BLOCK_B, BLOCK_H)
    return tiles


# The way back, with the state's gradient in registers. AHEAD: what a step reads is loaded before
# the product of the step after it. Gradients are rounded right before their product: one such tile
# at a time then lies in shared memory.
@triton.jit(do_not_specialize=["T", "B"])
def _backward_sequence(
    carry,  # float32 [B, H]: the gradient of the last state, and then of the first
    weight_hh,  # [3H, H]
    resets,  # [T, B]
    grad_output,  # [T, B, H]
    hx,  # [T, B, H], the state before each step, zero where it was reset
    gates,  # [T, B, 4H]
    deltas,  # [T, B, 4H]: the gradients of n, r, z and W_hn h + b_hn before their functions
    grad_states,  # [T, B, H]
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_GRAD_OUTPUT: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    COUNT: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    # float32's products are added up gate by gate, where registers hold three sums: one of 3 H, one
    # after the other, has twice the rounding errors.
    SUMS: tl.constexpr = 3 if deltas.dtype.element_ty == tl.float32 and BLOCK_H < 64 else 1
    rows = tl.arange(0, BLOCK_B)
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    is_row = rows < B - first
    dh = _load_rows(carry + first * H, is_row, H, 1, BLOCK_B, BLOCK_H)
    weight = _load_weight(weight_hh, H, BLOCK_H, False)
    row = first if REVERSE else tl.cast(T - 1, tl.int64) * B + first
    if AHEAD:
        read = _load_step(gates, hx, grad_output, row, is_row, H, HAS_GRAD_OUTPUT, BLOCK_B, BLOCK_H)
    for step in range(T):
        if not AHEAD:
            read = _load_step(
                gates, hx, grad_output, row, is_row, H, HAS_GRAD_OUTPUT, BLOCK_B, BLOCK_H
            )
        to = deltas + row * (4 * H)
        sums: tl.tuple = ()
        gradients: tl.tuple = ()
        for k in tl.static_range(COUNT):
            own = dh[k]
            if HAS_GRAD_OUTPUT:
                own += read[5 * COUNT + k].to(tl.float32)
            if SAVE_STATES:
                _store_rows(grad_states + row * H, own, is_row, 0, k, H, 1, BLOCK_B, BLOCK_H)
            z = read[COUNT + k].to(tl.float32)
            of_n, of_r, of_z, of_q = _step_back(
                own, read[k], z, read[2 * COUNT + k], read[3 * COUNT + k], read[4 * COUNT + k]
            )
            _store_rows(to, of_n, is_row, 0, k, H, 4, BLOCK_B, BLOCK_H)
            sums += (own * z,)
            gradients += (of_r, of_z, of_q)
        if HAS_RESETS:
            is_dropped = (tl.load(resets + row + rows, mask=is_row, other=0) != 0)[:, None]
        before = row + B if REVERSE else row - B
        row = tl.where(step + 1 < T, before, row)
        if AHEAD:
            read = _load_step(
                gates, hx, grad_output, row, is_row, H, HAS_GRAD_OUTPUT, BLOCK_B, BLOCK_H
            )
        for _ in tl.static_range((SUMS - 1) * COUNT):
            sums += (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
        for k in tl.static_range(COUNT):
            for gate in tl.static_range(3):
                delta = gradients[3 * k + gate].to(deltas.dtype.element_ty)
                added: tl.tuple = ()
                for j in tl.static_range(SUMS * COUNT):
                    if j // COUNT == gate % SUMS:
                        part = weight[(gate * COUNT + k) * COUNT + j % COUNT]
                        added += (tl.dot(delta, part, sums[j], input_precision="ieee"),)
                    else:
                        added += (sums[j],)
                sums = added
                _store_rows(to, delta, is_row, 1 + gate, k, H, 4, BLOCK_B, BLOCK_H)
        dh = ()
        for k in tl.static_range(COUNT):
            own = sums[k]
            if SUMS == 3:
                own += sums[COUNT + k] + sums[2 * COUNT + k]
            dh += (tl.where(is_dropped, 0.0, own) if HAS_RESETS else own,)
    for k in tl.static_range(COUNT):
        _store_rows(carry + first * H, dh[k], is_row, 0, k, H, 1, BLOCK_B, BLOCK_H)


@triton.jit(do_not_specialize=["B"])
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
    gate = tl.cast(H, tl.int64) * H  # from one gate's rows of weight_hh to the next's
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
    at = rows[:, None] * H + units[None, :]
    r, z, n, h = _step(
        tl.load(x, mask=inside, other=0.0),
        tl.load(x + H, mask=inside, other=0.0),
        tl.load(x + 2 * H, mask=inside, other=0.0),
        r,
        z,
        q,
        tl.load(hx + at, mask=inside & enters[:, None], other=0.0),
    )
    dtype = output.dtype.element_ty
    tl.store(output + at, h.to(dtype), mask=inside)
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
@triton.jit(do_not_specialize=["B", "known"])
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
    z = tl.load(saved + H, mask=inside, other=0.0).to(tl.float32)
    of_n, of_r, of_z, of_q = _step_back(
        dh,
        tl.load(saved, mask=inside, other=0.0),
        z,
        tl.load(saved + 2 * H, mask=inside, other=0.0),
        tl.load(saved + 3 * H, mask=inside, other=0.0),
        tl.load(hx + at, mask=inside, other=0.0),
    )
    to = deltas + rows[:, None] * (4 * H) + units[None, :]
    tl.store(to, of_n.to(dtype), mask=inside)
    tl.store(to + H, of_r.to(dtype), mask=inside)
    tl.store(to + 2 * H, of_z.to(dtype), mask=inside)
    tl.store(to + 3 * H, of_q.to(dtype), mask=inside)
    if SAVE_STATES:
        tl.store(grad_states + at, dh.to(dtype), mask=inside)
    tl.store(carry + at, tl.where((rows < B)[:, None], dh * z, dh), mask=carried)


# The largest H of which a program holds weight_hh, in float32 and in 16 bits.
_LARGEST = {"sm_80": (64, 128), "sm_90": (128, 192), "sm_100": (128, 192), "gfx942": (128, 192)}


def resident_limit(architecture: str, dtype: torch.dtype) -> int:
    """The largest H for which one launch does all steps, each program with the whole of weight_hh.

    NVIDIA's have it in shared memory: 6 H^2 bytes in 16 bits and 12 H^2 in float32, of the 227 KB
    of sm_90 and sm_100, and of the 99 KB that smaller GPUs have which are taken for sm_80. gfx942
    has it in registers, 512 KB of them.
    """
    return _LARGEST[architecture][dtype != torch.float32]


def _sequence(kernel: Any, architecture: str, dtype: torch.dtype, H: int) -> dict[str, int]:
    """Constants and options of a kernel of a sequence, for every batch and number of steps.

    A tile's columns are those of one tensor-core instruction for each warp, 8 or 16 of them, so
    that no warp holds what another one has. Less than a block of H is idle. Fewer rows would leave
    tensor cores idle, more would leave more multiprocessors idle, of which a batch of 1024 rows
    keeps 64 busy. Where there is no such instruction, a weight that is read serves 4 rows.
    """
    is_amd, is_wide = architecture.startswith("gfx"), dtype == torch.float32
    middle = 64 if is_amd else 96
    block = 16 if H <= 16 else 32 if middle >= H else 64
    given = {
        "H": H,
        "BLOCK_B": 4 if is_wide and not is_amd else 16,
        "BLOCK_H": block,
        "num_warps": block // (16 if is_amd else 8),
        "num_stages": 1,
    }
    if kernel is _backward_sequence:
        given["AHEAD"] = block < 64  # with more, it would be too much to hold
    # Told how many registers there are, the compiler does not rather spill a few for one more
    # program beside this; with the largest tiles, it holds more than there are.
    is_told = not is_amd and (is_wide or block < 64)
    return given | {"maxnreg": 255} if is_told else given


def _step_of(kernel: Any, architecture: str, dtype: torch.dtype, H: int) -> dict[str, int]:
    """Constants and options of the kernels of a step, for every batch.

    64 rows are what the tensor cores of sm_90 and sm_100 multiply at once, elsewhere 16 for each
    warp: of fewer, two would multiply the same. Few units make many programs, since a step waits
    for what it reads: of 64 rows and 1024 units there are 64, where an H100 has 132
    multiprocessors. There, steps of 16 units take 0.84 of the time of those of 32, in float32 0.6.
    Where H is a multiple of 16, Triton makes wide loads; else each load has an address of its own,
    and with a larger BLOCK_K they would spill. float32 has no tensor cores on NVIDIA's.
    """
    is_amd, is_even = architecture.startswith("gfx"), H % 16 == 0
    if dtype == torch.float32:
        blocks = {"BLOCK_B": 16, "BLOCK_H": 16, "BLOCK_K": 64, "num_stages": 2}
        if is_amd or not is_even:
            blocks |= {"BLOCK_H": 32, "BLOCK_K": 32}
    else:
        blocks = {"BLOCK_B": 64, "BLOCK_H": 16, "BLOCK_K": 64, "num_stages": 3}
        if is_amd or not is_even:
            blocks |= {"BLOCK_H": 32, "BLOCK_K": 64 if is_even else 32}
        elif kernel is _backward_step:
            blocks |= {"BLOCK_K": 128, "num_stages": 4}
    if is_amd:  # instructions of 16 rows, where the compiler takes 32
        blocks["matrix_instr_nonkdim"] = 16
    return blocks | {"num_warps": 4}


def configs(architecture: str) -> Iterator[Config]:
    """Every kernel as the launchers run it there, with all that it may read and write, for
    compiling ahead of time."""
    for dtype in DTYPES:
        largest = resident_limit(architecture, dtype)
        for H in sorted({64, min(128, largest), largest - 1}):  # and one that is no multiple of 2
            for kernel, way in ((_forward_sequence, "forward"), (_backward_sequence, "backward")):
                given = _sequence(kernel, architecture, dtype, H) | {"REVERSE": False}
                yield _config(kernel, f"gru {way}, H {H}", dtype, given)
        for H in (256, 257):
            for kernel, way in ((_forward_step, "forward"), (_backward_step, "backward")):
                given = _step_of(kernel, architecture, dtype, H)
                config = _config(kernel, f"gru {way} step, H {H}", dtype, given)
                yield config._replace(divisible=("H",) if H % 16 == 0 else ())


_OPTIONS = ("num_warps", "num_stages", "maxnreg", "matrix_instr_nonkdim")


def _config(kernel: Any, name: str, dtype: torch.dtype, given: dict[str, int]) -> Config:
    names = [n for n in kernel.arg_names if n not in given]
    flags = [n for n in names if n.startswith(("HAS_", "SAVE_"))]
    tensors = {n: dtype for n in names if n not in ("T", "B", "H", "known", *flags)}
    for part, of_part in (("carry", torch.float32), ("resets", torch.bool)):
        tensors |= {n: of_part for n in tensors if part in n}
    options = {n: value for n, value in given.items() if n in _OPTIONS}
    constants: dict[str, Any] = {n: value for n, value in given.items() if n not in options}
    return Config(name, dtype, kernel, tensors, constants | dict.fromkeys(flags, True), options)


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
        check_like("gru", "input", input, (steps, B, I), input)
    else:
        sizes = batch_sizes.tolist()
        falls = all(0 < size <= before for before, size in itertools.pairwise([B, *sizes]))
        if not falls or sizes[0] != B or sum(sizes) != len(input) or resets is not None:
            raise RuntimeError(
                f"genkernels.gru: batch_sizes: expected hx's {B} first, then positive, never "
                f"larger sizes, {len(input)} rows in all, and no resets, got {sizes}"
            )
    check_like("gru", "hx", hx, (B, H), input)
    check_like("gru", "weight_ih", weight_ih, (3 * H, I), input)
    check_like("gru", "weight_hh", weight_hh, (3 * H, H), input)
    check_like("gru", "bias_ih", bias_ih, (3 * H,), input)
    check_like("gru", "bias_hh", bias_hh, (3 * H,), input)
    check_like("gru", "resets", resets, (steps, B), input, torch.bool)


def _is_resident(hx: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether one launch does all steps, or each step has its own."""
    limit = resident_limit(architecture_of(hx.device), hx.dtype)
    return batch_sizes is None and hx.size(1) <= limit


def _run_sequence(
    kernel: Any, tensors: Sequence[Tensor], output: Tensor, flags: dict[str, bool], reverse: bool
) -> None:
    T, B, H = output.shape
    given = _sequence(kernel, architecture_of(output.device), output.dtype, H)
    constants, options = _constants(kernel, given | flags | {"REVERSE": reverse})
    launch(kernel, (triton.cdiv(B, given["BLOCK_B"]),), (*tensors, T, B, *constants), options)


def _run_forward_steps(
    tensors: Sequence[Tensor], sizes: Tensor | None, flags: dict[str, bool], reverse: bool
) -> Tensor:
    projected, h, weight_hh, bias_hh, resets, *results = tensors
    rows_of, (outputs, gates) = steps_of(projected, sizes), (steps_of(t, sizes) for t in results)
    H = h.size(1)
    given = _step_of(_forward_step, architecture_of(h.device), h.dtype, H)
    constants, options = _constants(_forward_step, given | flags)
    counts = [h.size(0)] * len(outputs) if sizes is None else sizes.tolist()
    unit_blocks = triton.cdiv(H, given["BLOCK_H"])

    def steps() -> Iterator[tuple[tuple[int, int], Sequence[Any]]]:
        nonlocal h
        for t in order_of(len(outputs), reverse):
            rows = counts[t]
            values = (rows_of[t], h, weight_hh, bias_hh, resets[t], outputs[t], gates[t], rows, H)
            yield (triton.cdiv(rows, given["BLOCK_B"]), unit_blocks), (*values, *constants)
            h = outputs[t] if sizes is None else handed_on(outputs[t], h, t, None)

    launch_each(_forward_step, steps(), options, _regular(h, sizes, flags, len(outputs)))
    return h if sizes is not None else outputs[0 if reverse else -1]


def _run_backward_steps(
    tensors: Sequence[Tensor], sizes: Tensor | None, flags: dict[str, bool], reverse: bool
) -> None:
    carry, weight_hh, resets, *of_steps = tensors
    grads, states, gates, deltas, grad_states = (steps_of(t, sizes) for t in of_steps)
    H = weight_hh.size(1)
    architecture, dtype = architecture_of(weight_hh.device), weight_hh.dtype
    given = _step_of(_backward_step, architecture, dtype, H)
    constants, options = _constants(_backward_step, given | flags)
    counts = [carry.size(0)] * len(deltas) if sizes is None else sizes.tolist()
    unit_blocks = triton.cdiv(H, given["BLOCK_H"])

    def step(t: int, rows: int, later: int, known: int) -> tuple[tuple[int, int], Sequence[Any]]:
        states_of = (grads[t], states[t], gates[t], deltas[t], grad_states[t])
        values = (carry, deltas[later], resets[later], weight_hh, *states_of, rows, known, H)
        grid = triton.cdiv(max(rows, known), given["BLOCK_B"]), unit_blocks
        return grid, (*values, *constants)

    order = order_of(len(deltas), not reverse)

    def steps() -> Iterator[tuple[tuple[int, int], Sequence[Any]]]:
        later, known = 0, 0
        for t in order:
            yield step(t, counts[t], later, known)
            later, known = t, counts[t]

    launch_each(_backward_step, steps(), options, _regular(carry, sizes, flags, len(order)))
    first = order[-1]
    launch(_backward_step, *step(first, 0, first, counts[first]), options)  # what it hands on to hx


def _regular(states: Tensor, sizes: Tensor | None, flags: dict[str, bool], steps: int) -> int:
    """`steps` if the addresses of each follow from those of the last by a multiple of 16 bytes,
    else 0."""
    is_even = states.size(1) % 8 == 0 and sizes is None and not flags["HAS_RESETS"]
    return steps if is_even else 0


def _constants(kernel: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A kernel's constants, which are its last arguments, and the compiler's options."""
    options = {name: value for name, value in given.items() if name in _OPTIONS}
    return [given[name] for name in kernel.arg_names if name in given], options


def _states_before(
    output: Tensor, hx: Tensor, batch_sizes: Tensor | None, resets: Tensor | None, reverse: bool
) -> Tensor:
    """The states that the rows of each step start from, as output; a few operations for all steps
    where these are of one length."""
    if batch_sizes is not None:
        return join(entering_states(output, hx, batch_sizes, resets, reverse))
    first = hx.unsqueeze(0)
    states = torch.cat([output[1:], first] if reverse else [first, output[:-1]])
    return states if resets is None else states.masked_fill(resets.unsqueeze(2), 0)


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
    H = hx.size(1)
    hx, weight_hh = hx.contiguous(), weight_hh.contiguous()
    bias_hh = None if bias_hh is None else bias_hh.contiguous()
    resets = None if resets is None else resets.contiguous()
    output = input.new_empty((*input.shape[:-1], H))
    gates = input.new_empty((*input.shape[:-1], 4 * H) if save_gates else 0)
    if output.numel() == 0:
        return output, hx.clone(), gates
    flags = {
        "HAS_BIAS": bias_hh is not None,
        "HAS_RESETS": resets is not None,
        "SAVE_GATES": save_gates,
    }
    tensors = (  # what there is none of is not touched
        linear(input, weight_ih, bias_ih).contiguous(),
        hx,
        weight_hh,
        weight_hh if bias_hh is None else bias_hh,
        output if resets is None else resets,
        output,
        gates if save_gates else output,
    )
    with torch.cuda.device_of(input):
        if _is_resident(hx, batch_sizes):
            _run_sequence(_forward_sequence, tensors, output, flags, reverse)
            h = output[0 if reverse else -1]
        else:
            h = _run_forward_steps(tensors, batch_sizes, flags, reverse)
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
    check_like("gru", "output", output, (*rows_shape, H), input)
    check_like("gru", "grad_output", grad_output, (*rows_shape, H), input)
    check_like("gru", "grad_h_n", grad_h_n, hx.shape, input)
    if gates.numel() == 0:
        gates = gru_forward(input, hx, *weights, batch_sizes, resets, reverse, True, None)[2]
    check_like("gru", "gates", gates, (*rows_shape, 4 * H), input)
    entering = _states_before(output, hx, batch_sizes, resets, reverse)
    gates = gates.contiguous()
    states = input.new_empty((*rows_shape, H) if states_grad else 0)
    delta = torch.empty_like(gates)
    carry = torch.zeros_like(hx, dtype=torch.float32, memory_format=torch.contiguous_format)
    if grad_h_n is not None:
        carry.copy_(grad_h_n)
    flags = {
        "HAS_GRAD_OUTPUT": grad_output is not None,
        "HAS_RESETS": resets is not None,
        "SAVE_STATES": states_grad,
    }
    tensors = (
        carry,
        weight_hh.contiguous(),
        delta if resets is None else resets.contiguous(),
        delta if grad_output is None else grad_output.contiguous(),
        entering,
        gates,
        delta,
        states if states_grad else delta,
    )
    with torch.cuda.device_of(input):
        if output.numel() > 0 and _is_resident(hx, batch_sizes):
            _run_sequence(_backward_sequence, tensors, output, flags, reverse)
        elif output.numel() > 0:
            _run_backward_steps(tensors, batch_sizes, flags, reverse)
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
