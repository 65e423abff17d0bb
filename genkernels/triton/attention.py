"""Attention in Triton, forward and backward, that never holds a matrix of scores.

The formulas are those of genkernels.reference.attention. A program has a block of queries (output,
gradient of query) or of keys (gradients of key and value) and goes through what these see: first
the tiles that are seen whole, then those at an edge of what is seen, whose scores are masked. Each
sum belongs to one program, so there are no atomics, and results are the same from run to run; keys
that several heads share add up their heads in the program. Exponentials are powers of 2, with the
factor that makes them so folded into the scale, and exponents are rounded once, after the largest
is subtracted.

Products are summed in float32, those of float32 in full ("ieee") and not in TF32. The second
derivative is plain PyTorch's, and so is float64.

Source: Dao 2023, https://arxiv.org/abs/2307.08691.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import attention as reference
from ..reference.attention import Features
from . import DTYPES, Config

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))


# Which block, head and batch a program has.
@triton.jit
def _place(blocks, H):
    index = tl.program_id(0)
    of_heads = index // blocks
    return index % blocks, (of_heads % H).to(tl.int64), (of_heads // H).to(tl.int64)


# Where y is seen by x if x - before <= y <= x + after and y < count: of the tiles that x in
# [start, stop) sees, the first; the first and the end of those that all x see whole; and the end.
@triton.jit
def _seen(
    start, stop, count, before, after, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, whole, last, whole_last = 0, 0, count, count
    if HAS_AFTER:
        last = tl.minimum(count, stop + after)
        whole_last = tl.minimum(count, start + after + 1)
    if HAS_BEFORE:
        first = tl.maximum(start - before, 0) // BLOCK
        whole = tl.cdiv(tl.maximum(stop - 1 - before, 0), BLOCK)
    last = tl.cdiv(tl.maximum(last, 0), BLOCK)
    whole = tl.minimum(whole, last)
    return first, whole, tl.maximum(tl.maximum(whole_last, 0) // BLOCK, whole), last


# Of a head's matrix, a tile [ROWS, BLOCK] that begins at row `first` and this column; zeros beyond
# row `count`, unless IS_WHOLE, and beyond column SIZE. Within a tile offsets have 32 bits.
@triton.jit
def _load_rows(
    matrix, stride, first, count, column,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = matrix + (first.to(tl.int64) * stride + column)
    at += rows[:, None] * stride + columns[None, :]
    is_row, is_column = (rows < count - first)[:, None], (column + columns < SIZE)[None, :]
    if SIZE % BLOCK == 0 and SIZE > 0:
        if IS_WHOLE:
            return tl.load(at)
        return tl.load(at, mask=is_row, other=0.0)
    return tl.load(at, mask=is_column if IS_WHOLE else is_row & is_column, other=0.0)


@triton.jit
def _store_rows(
    matrix, stride, first, count, tile, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = matrix + first.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    is_there = (rows < count - first)[:, None] & (columns < SIZE)[None, :]
    tl.store(at, tile.to(matrix.dtype.element_ty), mask=is_there)


# a b^T of two tiles of rows, which are given as they were loaded and as where they lie. A thread of
# a GPU without tensor cores for them holds whole rows of what it multiplies: these are loaded and
# multiplied CHUNK columns at a time.
@triton.jit
def _product(
    a, b, a_matrix, a_stride, a_first, a_count, b_matrix, b_stride, b_first, b_count,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if CHUNK >= BLOCK:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[0]
    sums = tl.zeros((M, N), tl.float32)
    for c in range(0, SIZE, CHUNK):
        x = _load_rows(a_matrix, a_stride, a_first, a_count, c, SIZE, M, CHUNK, False)
        y = _load_rows(b_matrix, b_stride, b_first, b_count, c, SIZE, N, CHUNK, False)
        sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
    return sums


# The tile at an edge of what is seen that comes n-th: those before the whole ones, then the others.
@triton.jit
def _edge(n, first, whole, whole_last):
    before = tl.maximum(whole - first, 0)
    return tl.where(n < before, first + n, whole_last + n - before)


@triton.jit
def _edges(first, whole, whole_last, last):
    return tl.maximum(whole - first, 0) + tl.maximum(last - whole_last, 0)


# Scores, -inf where key j takes no part for the query whose own key is `own`; [queries, keys], or
# the other way round, as own and j lie. IS_RAW: as yet without their scale.
@triton.jit
def _scores(
    products, scale, own, j, S, left, right,
    IS_RAW: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, AT_EDGE: tl.constexpr,
):  # fmt: skip
    scores = products
    if not IS_RAW:
        scores *= scale
    if AT_EDGE:
        is_seen = j < S
        if HAS_RIGHT:
            is_seen = is_seen & (j <= own + right)
        if HAS_LEFT:
            is_seen = is_seen & (j >= own - left)
        scores = tl.where(is_seen, scores, float("-inf"))
    return scores


@triton.jit
def _forward(
    query,  # [B, H, L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv]
    output,  # [B, H, L, Dv]
    near,  # float32 [B, H, L]: the statistics
    rest,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    output_batch, output_head, output_row,
    H, L, S,
    heads,  # H / Hk
    offset,  # query i's own key is i + offset
    left, right,  # how many keys before and behind that it sees
    scale: tl.float32,
    factor: tl.float32,  # that makes powers of 2 of scores
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    IS_RAW: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_L)
    block, h, b = _place(blocks, H)
    row = (blocks - 1 - block) * BLOCK_L  # the blocks that see most keys begin
    query += b * query_batch + h * query_head
    key += b * key_batch + h // heads * key_head
    value += b * value_batch + h // heads * value_head
    output += b * output_batch + h * output_head
    i = row + tl.arange(0, BLOCK_L)
    own = i + offset
    q = _load_rows(query, query_row, row, L, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, False)
    most = tl.full((BLOCK_L,), float("-inf"), tl.float32)  # of the exponents
    total = tl.zeros((BLOCK_L,), tl.float32)  # of the exponentials, beside the largest
    sums = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)  # of the values that they weigh
    first, whole, whole_last, last = _seen(
        row, tl.minimum(row + BLOCK_L, L), S, left - offset, right + offset, HAS_LEFT, HAS_RIGHT,
        BLOCK_S,
    )  # fmt: skip
    for at_edge in tl.static_range(2):
        count = _edges(first, whole, whole_last, last) if at_edge else whole_last - whole
        for n in range(count):
            key_of = (_edge(n, first, whole, whole_last) if at_edge else whole + n) * BLOCK_S
            k = _load_rows(key, key_row, key_of, S, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, not at_edge)
            products = _product(
                q, k, query, query_row, row, L, key, key_row, key_of, S, HEAD_SIZE, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
            j = key_of + tl.arange(0, BLOCK_S)
            scores = _scores(
                products, scale, own[:, None], j[None, :], S, left, right, IS_RAW,
                HAS_LEFT, HAS_RIGHT, at_edge,
            )  # fmt: skip
            now = tl.maximum(most, tl.max(scores, 1) * factor)
            shift = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
            kept = tl.exp2(most - shift)
            most, total = now, total * kept + tl.sum(weights, 1)
            v = _load_rows(
                value, value_row, key_of, S, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, not at_edge
            )
            sums = tl.dot(weights.to(v.dtype), v, sums * kept[:, None], input_precision=PRECISION)
    is_empty = total == 0
    sums = sums / tl.where(is_empty, 1.0, total)[:, None]
    _store_rows(output, output_row, row, L, sums, VALUE_SIZE, BLOCK_L, BLOCK_V)
    # A number near the logsumexp, rounded, and the rest beside what the backward pass makes of it.
    finite = tl.where(is_empty, 0.0, most)
    number = finite * _LN_2
    remainder = tl.log(tl.where(is_empty, 1.0, total)) + (finite - number * _LOG2_E) * _LN_2
    at = (b * H + h) * L + i
    tl.store(near + at, tl.where(is_empty, float("-inf"), number), mask=i < L)
    tl.store(rest + at, remainder, mask=i < L)


# Of each row, what its scores' gradients lack: the sum over the keys of the weights' gradients.
@triton.jit
def _backward_delta(
    grad_output,  # [B, H, L, Dv]
    output,  # [B, H, L, Dv]
    grad_logsumexp,  # float32 [B, H, L]
    delta,  # float32 [B, H, L]
    grad_batch, grad_head, grad_row,
    output_batch, output_head, output_row,
    H, L,
    VALUE_SIZE: tl.constexpr,
    HAS_GRAD_LOGSUMEXP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    block, h, b = _place(tl.cdiv(L, BLOCK_L), H)
    grad_output += b * grad_batch + h * grad_head
    output += b * output_batch + h * output_head
    first = block * BLOCK_L
    g = _load_rows(grad_output, grad_row, first, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, False)
    o = _load_rows(output, output_row, first, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, False)
    sums = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    i = first + tl.arange(0, BLOCK_L)
    at = (b * H + h) * L + i
    if HAS_GRAD_LOGSUMEXP:
        sums -= tl.load(grad_logsumexp + at, mask=i < L, other=0.0)
    tl.store(delta + at, sums, mask=i < L)


# Of rows, their statistics as they are subtracted from scores, in units of log 2, and delta. Rows
# that are not there have no weights.
@triton.jit
def _load_statistics(near, rest, delta, head, first, L, ROWS: tl.constexpr, IS_WHOLE: tl.constexpr):
    i = head + first + tl.arange(0, ROWS)
    if IS_WHOLE:
        number, remainder, sums = tl.load(near + i), tl.load(rest + i), tl.load(delta + i)
    else:
        is_there = first + tl.arange(0, ROWS) < L
        number = tl.load(near + i, mask=is_there, other=float("inf"))
        remainder = tl.load(rest + i, mask=is_there, other=0.0)
        sums = tl.load(delta + i, mask=is_there, other=0.0)
    number = tl.where(number == float("-inf"), 0.0, number * _LOG2_E)
    return number, remainder * _LOG2_E, sums


# The exponentials of scores are [BLOCK_S, BLOCK_L] here.
@triton.jit
def _backward_keys(
    query,  # [B, H, L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv]
    grad_output,  # [B, H, L, Dv]
    near,  # float32 [B, H, L]: the statistics
    rest,
    delta,  # float32 [B, H, L]
    grad_key,  # [B, Hk, S, D]
    grad_value,  # [B, Hk, S, Dv]
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row,
    grad_key_batch, grad_key_head, grad_key_row,
    grad_value_batch, grad_value_head, grad_value_row,
    H, L, S, heads, offset, left, right,
    scale: tl.float32,
    factor: tl.float32,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    OF_KEY: tl.constexpr,
    OF_VALUE: tl.constexpr,
    IS_RAW: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, of_keys, b = _place(tl.cdiv(S, BLOCK_S), H // heads)
    key_of = block * BLOCK_S
    query += b * query_batch
    key += b * key_batch + of_keys * key_head
    value += b * value_batch + of_keys * value_head
    grad_output += b * grad_batch
    grad_key += b * grad_key_batch + of_keys * grad_key_head
    grad_value += b * grad_value_batch + of_keys * grad_value_head
    j = key_of + tl.arange(0, BLOCK_S)
    k = _load_rows(key, key_row, key_of, S, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, False)
    v = _load_rows(value, value_row, key_of, S, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, False)
    grad_k = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    first, whole, whole_last, last = _seen(
        key_of, tl.minimum(key_of + BLOCK_S, S), L, right + offset, left - offset, HAS_RIGHT,
        HAS_LEFT, BLOCK_L,
    )  # fmt: skip
    for at_edge in tl.static_range(2):
        count = _edges(first, whole, whole_last, last) if at_edge else whole_last - whole
        for n in range(heads * count):  # one head after another, in one loop: it takes less
            h = of_keys * heads + n // count
            tile = n % count
            row = (_edge(tile, first, whole, whole_last) if at_edge else whole + tile) * BLOCK_L
            to_q, to_g = query + h * query_head, grad_output + h * grad_head
            q = _load_rows(to_q, query_row, row, L, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, not at_edge)
            products = _product(
                k, q, key, key_row, key_of, S, to_q, query_row, row, L, HEAD_SIZE, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
            i = row + tl.arange(0, BLOCK_L)
            scores = _scores(
                products, scale, (i + offset)[None, :], j[:, None], S, left, right, IS_RAW,
                HAS_LEFT, HAS_RIGHT, at_edge,
            )  # fmt: skip
            number, remainder, sums = _load_statistics(
                near, rest, delta, (b * H + h) * L, row, L, BLOCK_L, not at_edge
            )
            exponents = tl.fma(scores, factor, -number[None, :])
            weights = tl.exp2(exponents - remainder[None, :])
            g = _load_rows(to_g, grad_row, row, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, not at_edge)
            if OF_VALUE:
                grad_v = tl.dot(weights.to(g.dtype), g, grad_v, input_precision=PRECISION)
            if OF_KEY:
                of_weights = _product(
                    v, g, value, value_row, key_of, S, to_g, grad_row, row, L, VALUE_SIZE, BLOCK_V,
                    CHUNK, PRECISION,
                )  # fmt: skip
                of_scores = weights * (of_weights - sums[None, :])
                grad_k = tl.dot(of_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    if OF_KEY:
        _store_rows(grad_key, grad_key_row, key_of, S, grad_k * scale, HEAD_SIZE, BLOCK_S, BLOCK_D)
    if OF_VALUE:
        _store_rows(grad_value, grad_value_row, key_of, S, grad_v, VALUE_SIZE, BLOCK_S, BLOCK_V)


@triton.jit
def _backward_queries(
    query,  # [B, H, L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv]
    grad_output,  # [B, H, L, Dv]
    near,  # float32 [B, H, L]: the statistics
    rest,
    delta,  # float32 [B, H, L]
    grad_query,  # [B, H, L, D]
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row,
    grad_query_batch, grad_query_head, grad_query_row,
    H, L, S, heads, offset, left, right,
    scale: tl.float32,
    factor: tl.float32,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    IS_RAW: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_L)
    block, h, b = _place(blocks, H)
    row = (blocks - 1 - block) * BLOCK_L  # the blocks that see most keys begin
    query += b * query_batch + h * query_head
    key += b * key_batch + h // heads * key_head
    value += b * value_batch + h // heads * value_head
    grad_output += b * grad_batch + h * grad_head
    grad_query += b * grad_query_batch + h * grad_query_head
    own = row + tl.arange(0, BLOCK_L) + offset
    q = _load_rows(query, query_row, row, L, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, False)
    g = _load_rows(grad_output, grad_row, row, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, False)
    number, remainder, sums = _load_statistics(
        near, rest, delta, (b * H + h) * L, row, L, BLOCK_L, False
    )
    grad_q = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    first, whole, whole_last, last = _seen(
        row, tl.minimum(row + BLOCK_L, L), S, left - offset, right + offset, HAS_LEFT, HAS_RIGHT,
        BLOCK_S,
    )  # fmt: skip
    for at_edge in tl.static_range(2):
        count = _edges(first, whole, whole_last, last) if at_edge else whole_last - whole
        for n in range(count):
            key_of = (_edge(n, first, whole, whole_last) if at_edge else whole + n) * BLOCK_S
            k = _load_rows(key, key_row, key_of, S, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, not at_edge)
            products = _product(
                q, k, query, query_row, row, L, key, key_row, key_of, S, HEAD_SIZE, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
            j = key_of + tl.arange(0, BLOCK_S)
            scores = _scores(
                products, scale, own[:, None], j[None, :], S, left, right, IS_RAW,
                HAS_LEFT, HAS_RIGHT, at_edge,
            )  # fmt: skip
            exponents = tl.fma(scores, factor, -number[:, None])
            weights = tl.exp2(exponents - remainder[:, None])
            v = _load_rows(
                value, value_row, key_of, S, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, not at_edge
            )
            of_weights = _product(
                g, v, grad_output, grad_row, row, L, value, value_row, key_of, S, VALUE_SIZE,
                BLOCK_V, CHUNK, PRECISION,
            )  # fmt: skip
            of_scores = weights * (of_weights - sums[:, None])
            grad_q = tl.dot(of_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    _store_rows(grad_query, grad_query_row, row, L, grad_q * scale, HEAD_SIZE, BLOCK_L, BLOCK_D)


# The largest head size that is served.
LARGEST = 128


def config(
    kernel: Any, architecture: str, dtype: torch.dtype, D: int, Dv: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and the compiler's options, for every batch, length and number of heads.

    They are what keeps sums and operands in registers. On sm_80 a program takes at most 99 KB of
    shared memory, which is what the smaller GPUs of its kind have. gfx942 has twice as many
    registers, but not for loads ahead of time. Told how many there are, the compiler does not
    rather spill a few of them for a second program beside the first. Fused are those operations
    alone that say so: the backward pass sees the forward pass's very exponents.
    """
    is_amd, is_wide = architecture.startswith("gfx"), dtype == torch.float32
    is_small = is_amd or is_wide or (architecture == "sm_80" and max(D, Dv) > 64)
    constants = {
        "HEAD_SIZE": D,
        "VALUE_SIZE": Dv,
        "BLOCK_L": 128 if kernel is _forward and not is_small else 64,
        "BLOCK_S": 64,
        "BLOCK_D": max(32, triton.next_power_of_2(D)),
        "BLOCK_V": max(32, triton.next_power_of_2(Dv)),
        "CHUNK": 16 if is_wide else LARGEST,
        "PRECISION": "ieee",
    }
    warps = 4 if is_amd or kernel is _backward_delta else 16 if is_wide else 8
    options = {
        "num_warps": warps,
        "num_stages": 1 if is_amd or is_wide else 2,
        "enable_fp_fusion": False,
    }
    return constants, options if is_amd else options | {"maxnreg": min(255, 2048 // warps)}


def _architecture(device: torch.device) -> str:
    """That of `config`; what is interpreted runs as on the first."""
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _parts(kernel: Any, dtype: torch.dtype) -> list[dict[str, bool]]:
    """The launches of a kernel: with float32 the gradients of key and value have one each, since
    both sums, and what a thread multiplies, are more than its registers hold."""
    if kernel is not _backward_keys:
        return [{}]
    is_wide = dtype == torch.float32
    both = {"OF_KEY": True, "OF_VALUE": True}
    return [both | {"OF_VALUE": False}, both | {"OF_KEY": False}] if is_wide else [both]


def configs(architecture: str) -> Iterator[Config]:
    """Every kernel as the launchers run it there, for compiling ahead of time."""
    types = dict.fromkeys(("near", "rest", "delta", "grad_logsumexp"), torch.float32)
    for dtype, D, kernel in itertools.product(DTYPES, (32, 64, 128), _NAMES):
        constants, options = config(kernel, architecture, dtype, D, D)
        constants |= {"IS_RAW": True, "HAS_LEFT": False, "HAS_GRAD_LOGSUMEXP": True}
        for part, causal in itertools.product(_parts(kernel, dtype), (False, True)):
            if kernel is _backward_delta and causal:
                continue
            given = constants | part | {"HAS_RIGHT": causal}
            given = {name: given[name] for name in kernel.arg_names if name in given}
            names = [name for name in kernel.arg_names if name not in given]
            tensors = {name: types.get(name, dtype) for name in names if name in _TENSORS}
            numbers = [name for name in names if name not in tensors]
            name = f"attention {_name_of(kernel, part)}, D {D}" + (", causal" if causal else "")
            yield Config(name, dtype, kernel, tensors, numbers, given, options)


_NAMES = {
    _forward: "forward",
    _backward_delta: "backward, delta",
    _backward_keys: "backward",
    _backward_queries: "backward, query",
}
_TENSORS = {
    *("query", "key", "value", "output", "near", "rest", "delta", "grad_output"),
    *("grad_logsumexp", "grad_query", "grad_key", "grad_value"),
}


def _name_of(kernel: Any, part: dict[str, bool]) -> str:
    of = [name[3:].lower() for name, is_formed in part.items() if is_formed]
    return ", ".join([_NAMES[kernel], " and ".join(of)]) if of else _NAMES[kernel]


def _launch(kernel: Any, arguments: dict[str, Any]) -> None:
    """Runs a kernel with those of the arguments that it names."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    architecture = _architecture(query.device)
    constants, options = config(kernel, architecture, query.dtype, query.size(3), value.size(3))
    if kernel is _backward_keys:
        programs = key.size(0) * key.size(1) * triton.cdiv(key.size(2), constants["BLOCK_S"])
    else:
        programs = query.size(0) * query.size(1) * triton.cdiv(query.size(2), constants["BLOCK_L"])
    for part in _parts(kernel, query.dtype) if programs else ():
        given = arguments | constants | part
        kernel[(programs,)](**{name: given[name] for name in kernel.arg_names}, **options)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Those of [B, H, rows, columns], named as the kernels name them."""
    return {
        f"{name}_{dimension}": stride
        for name, tensor in tensors.items()
        for dimension, stride in zip(("batch", "head", "row"), tensor.stride()[:3], strict=True)
    }


def _with_rows(tensor: Tensor) -> Tensor:
    """With contiguous rows, so near each other that offsets within a tile have 32 bits."""
    is_fit = tensor.stride(3) == 1 and tensor.stride(2) < 2**23
    return tensor if is_fit else tensor.contiguous()


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, causal: int, scale: float, left: int, right: int
) -> dict[str, Any]:
    """What all kernels of a call are given."""
    query, key, value = (_with_rows(t) for t in (query, key, value))
    L, S = query.size(2), key.size(2)
    if causal:
        right = 0  # a window that ends at the own key
    reach = L + S  # a wider window has no edge
    is_raw = scale > 0  # then the largest product has the largest score
    return {
        **{"query": query, "key": key, "value": value, "H": query.size(1), "L": L, "S": S},
        **_strides(query=query, key=key, value=value),
        "heads": query.size(1) // max(1, key.size(1)),
        "offset": 0 if causal == 1 else S - L,
        "left": min(left, reach),
        "right": min(right, reach),
        "scale": scale,
        "factor": math.log2(math.e) * (scale if is_raw else 1.0),
        "IS_RAW": is_raw,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
    }


def _is_left(query: Tensor, value: Tensor, is_plain: bool) -> bool:
    """Whether a call is left to the reference, which is said."""
    largest = max(query.size(3), value.size(3))
    if largest > LARGEST:
        obstacle = f"heads have at most {LARGEST} elements, and these {largest}"
    elif not is_plain:
        obstacle = "there are no masks, windows, dropout and softcap"
    else:
        return False
    warnings.warn(
        "genkernels.scaled_dot_product_attention runs the plain PyTorch reference: "
        f"in the Triton kernel {obstacle}",
        stacklevel=2,
    )
    return True


def _copy(results: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    for result, tensor in zip(results, given, strict=True):
        result.copy_(tensor)


def _new_rows(like: Tensor, columns: int) -> Tensor:
    """[B, H, rows, columns] that lies in memory as [B, rows, H, columns]."""
    B, H, rows, _ = like.shape
    return like.new_empty((B, rows, H, columns)).transpose(1, 2)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: int,
    scale: float,
    *features: Any,
) -> tuple[Tensor, Tensor]:
    """As the raw op of that name."""
    output = _new_rows(query, value.size(3))
    statistics = query.new_empty((2, *query.shape[:3]), dtype=torch.float32)
    is_plain = attn_mask is None and seed is None and Features(*features) == Features()
    if _is_left(query, value, is_plain):
        tensors = (query, key, value, attn_mask, seed)
        given = reference.attention_forward(*tensors, dropout_p, causal, scale, *features)
        _copy((output, statistics), given)
        return output, statistics
    arguments = _arguments(query, key, value, causal, scale, -1, -1)
    near, rest = statistics
    results = {"output": output, "near": near, "rest": rest, **_strides(output=output)}
    _launch(_forward, arguments | results)
    return output, statistics


def attention_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    dropout_p: float,
    causal: int,
    scale: float,
    needs_mask: bool,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    side_by_side: int = 0,
) -> tuple[Tensor, ...]:
    """As the raw op of that name."""
    results, grads = _new_gradients((query, key, value), side_by_side)
    features = Features(key_lengths, alibi_slopes, window_left, window_right, softcap)
    is_plain = attn_mask is None and seed is None and features == Features()
    if _is_left(query, value, is_plain):
        tensors = (query, key, value, attn_mask, seed, output, statistics)
        settings: Any = (dropout_p, causal, scale, needs_mask, *features)
        *given, grad_mask = reference.attention_backward(
            grad_output, grad_logsumexp, *tensors, *settings
        )
        _copy(grads, given)
        return *results, grad_mask
    arguments = _arguments(query, key, value, causal, scale, -1, -1)
    grad_output, output = _with_rows(grad_output), _with_rows(output)
    near, rest = statistics.contiguous()
    arguments |= {
        **{"grad_output": grad_output, "output": output, "near": near, "rest": rest},
        "grad_logsumexp": near if grad_logsumexp is None else grad_logsumexp.contiguous(),
        "HAS_GRAD_LOGSUMEXP": grad_logsumexp is not None,
        "delta": torch.empty_like(near),
        **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True)),
        **_strides(grad=grad_output, output=output),
        **_strides(grad_query=grads[0], grad_key=grads[1], grad_value=grads[2]),
    }
    for kernel in (_backward_delta, _backward_keys, _backward_queries):
        _launch(kernel, arguments)
    return *results, query.new_empty(0)


def _new_gradients(
    tensors: tuple[Tensor, Tensor, Tensor], side_by_side: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients as the raw op returns them, and each as [B, H, rows, columns]."""
    grads = [_new_rows(tensor, tensor.size(3)) for tensor in tensors[: 3 - side_by_side]]
    if not side_by_side:
        return grads, grads
    B, H, rows, columns = tensors[2].shape
    packed = tensors[2].new_empty((B, rows, side_by_side, H, columns))
    empty = [packed.new_empty(0) for _ in range(side_by_side - 1)]
    return [*grads, packed, *empty], [*grads, *packed.transpose(1, 3).unbind(2)]


KERNELS: dict[str, Callable[..., Any]] = {
    launcher.__name__: launcher for launcher in (attention_forward, attention_backward)
}
