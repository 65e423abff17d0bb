"""Attention's kernels in Triton. A program has a block of queries (output, gradient of query) or of
keys (gradients of key and value) and goes through what these see: first the tiles that are seen
whole, then those at an edge of what is seen, whose scores are masked. Exponentials are powers of 2,
with the factor that makes them so folded into the scale, and exponents are rounded once, after the
largest is subtracted.

What a kernel has not is None, or a constant that is False, and takes no time. Of a program's rows
(queries) and keys, [rows, keys] is what the forward pass has of scores, and [keys, rows] what the
gradients of key and value have.
"""

import math

import triton
import triton.language as tl

from .math import tanh

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


# Which block of rows, head and batch a program has. Sequences that lie one after another have
# blocks of their own, whose places are given; one that is not there begins behind the last row.
@triton.jit
def _place(places, blocks, H, BLOCK: tl.constexpr, FROM_LAST: tl.constexpr):
    index = tl.program_id(0)
    of_heads = index // blocks
    block = index % blocks
    if FROM_LAST:  # the blocks that see most keys of a causal call begin
        block = blocks - 1 - block
    h, b = (of_heads % H).to(tl.int64), (of_heads // H).to(tl.int64)
    first = block * BLOCK
    if places is not None:
        b = tl.load(places + 2 * block).to(tl.int64)
        first = tl.load(places + 2 * block + 1).to(tl.int32)
    return first, h, b


# Where a batch's queries and keys begin, how many there are, and the offset of queries' own keys.
@triton.jit
def _sizes(b, L, S, cu_seq_q, cu_seq_k, key_lengths, IS_UPPER_LEFT: tl.constexpr):
    first_q = tl.zeros((), tl.int64)
    first_k = tl.zeros((), tl.int64)
    n = S
    if cu_seq_q is not None:
        first_q = tl.load(cu_seq_q + b).to(tl.int64)
        first_k = tl.load(cu_seq_k + b).to(tl.int64)
        L = (tl.load(cu_seq_q + b + 1) - first_q).to(tl.int32)
        n = (tl.load(cu_seq_k + b + 1) - first_k).to(tl.int32)
    if key_lengths is not None:
        n = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), S).to(tl.int32)
    offset = 0 if IS_UPPER_LEFT else n - L
    return first_q, L, first_k, n, offset


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
    last = tl.where(start < stop, tl.cdiv(tl.maximum(last, 0), BLOCK), 0)
    whole = tl.minimum(whole, last)
    whole_last = tl.minimum(tl.maximum(whole_last, 0) // BLOCK, last)
    return first, whole, tl.maximum(whole_last, whole), last


# The tile at an edge of what is seen that comes n-th: those before the whole ones, then the others.
@triton.jit
def _edge(n, first, whole, whole_last):
    before = tl.maximum(whole - first, 0)
    return tl.where(n < before, first + n, whole_last + n - before)


@triton.jit
def _edges(first, whole, whole_last, last):
    return tl.maximum(whole - first, 0) + tl.maximum(last - whole_last, 0)


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
    if SIZE % BLOCK == 0:
        tile = tl.load(at) if IS_WHOLE else tl.load(at, mask=is_row, other=0.0)
    else:
        tile = tl.load(at, mask=is_column if IS_WHOLE else is_row & is_column, other=0.0)
    return tile


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
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[0]
    sums = tl.zeros((M, N), tl.float32)
    if CHUNK >= BLOCK:
        sums = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        for c in range(0, SIZE, CHUNK):
            x = _load_rows(a_matrix, a_stride, a_first, a_count, c, SIZE, M, CHUNK, False)
            y = _load_rows(b_matrix, b_stride, b_first, b_count, c, SIZE, N, CHUNK, False)
            sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
    return sums


# Scores of queries i and keys j, which lie as the products: -inf where a key takes no part. IS_RAW:
# as yet without their scale. And what a softcap's derivative is made of, the tanh.
@triton.jit
def _scores(
    products, i, j, L, n, offset, left, right, inner, softcap, mask, mask_row, slope,
    MASK_KEY: tl.constexpr, IS_RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, AT_EDGE: tl.constexpr,
):  # fmt: skip
    scores = products
    if HAS_SOFTCAP:
        products = tanh(products * inner)
        scores = softcap * products
    elif not IS_RAW:
        scores *= inner
    if mask is not None:
        at, is_there = mask + i.to(tl.int64) * mask_row, i < L
        if MASK_KEY:
            at, is_there = at + j, is_there & (j < n)
        given = tl.load(at, mask=is_there, other=0)
        if mask.dtype.element_ty == tl.int1:
            scores = tl.where(given != 0, scores, float("-inf"))
        else:
            scores += given.to(tl.float32)
    own = i + offset
    if slope is not None:
        scores -= slope * tl.abs(own - j).to(tl.float32)
    if AT_EDGE:
        is_seen = j < n
        if HAS_RIGHT:
            is_seen = is_seen & (j <= own + right)
        if HAS_LEFT:
            is_seen = is_seen & (j >= own - left)
        scores = tl.where(is_seen, scores, float("-inf"))
    return scores, products


@triton.jit
def _slope(slopes, slopes_batch, slopes_head, b, h):
    if slopes is not None:  # Triton 3.5 and 3.6 return nothing as None, and None not at all
        return tl.load(slopes + b * slopes_batch + h * slopes_head)


@triton.jit
def _mask(mask, mask_batch, mask_head, b, h):
    if mask is not None:
        return mask + b * mask_batch + h * mask_head


# Whether dropout keeps weights: of rows i and the KEYS from key_of on, multiples of 64. Of the four
# numbers that Philox makes of a counter the n-th is that of the n-th 16 of 64 keys.
@triton.jit
def _is_kept(
    seed, threshold, i, key_of, head, ROWS: tl.constexpr, KEYS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    counter = key_of // 4 + tl.arange(0, KEYS // 4)
    if KEYS_FIRST:
        c0, c1 = tl.broadcast(counter[:, None], i[None, :])
    else:
        c0, c1 = tl.broadcast(counter[None, :], i[:, None])
    c2, c3 = tl.zeros_like(c0) + head.to(tl.int32), tl.zeros_like(c0)
    a, b, c, d = tl.philox(tl.load(seed), c0, c1, c2, c3)
    ac = tl.join((a >= threshold).to(tl.int8), (c >= threshold).to(tl.int8))
    bd = tl.join((b >= threshold).to(tl.int8), (d >= threshold).to(tl.int8))
    kept = tl.join(ac, bd)  # the last two dimensions are the numbers' index
    if KEYS_FIRST:
        kept = tl.reshape(kept, (KEYS // 64, 16, ROWS, 2, 2))
        kept = tl.reshape(tl.permute(kept, (0, 3, 4, 1, 2)), (KEYS, ROWS))
    else:
        kept = tl.reshape(kept, (ROWS, KEYS // 64, 16, 2, 2))
        kept = tl.reshape(tl.permute(kept, (0, 1, 3, 4, 2)), (ROWS, KEYS))
    return kept != 0


@triton.jit
def forward(
    query,  # [B, H, L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv], with rows as far apart as key's: one set of offsets serves both
    attn_mask,  # [B, H, L, S], with strides of 0 where it has one element
    seed,  # int64 [1]
    key_lengths,  # int64 [B]
    alibi_slopes,  # float32 [B, H], with a stride of 0
    cu_seq_q,  # [N + 1]; then B is 1
    cu_seq_k,
    places,  # int32 [blocks, 2], beside these: each block's sequence and first row
    output,  # [B, H, L, Dv]
    near,  # float32 [B, H, L]: the statistics
    rest,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head,
    mask_batch, mask_head, mask_row,
    slopes_batch, slopes_head,
    output_batch, output_head, output_row,
    H, L, S,
    blocks,  # of a head's queries
    heads,  # H / Hk
    left, right,  # how many keys before and behind its own that a query sees
    inner: tl.float32,  # what products are multiplied with, before the softcap
    softcap: tl.float32,
    factor: tl.float32,  # that makes powers of 2 of scores
    threshold: tl.uint32,  # a weight is kept if its number is not below
    keep: tl.float32,  # what weights that are kept are multiplied with
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    MASK_KEY: tl.constexpr,
    IS_RAW: tl.constexpr,
    IS_UPPER_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, h, b = _place(places, blocks, H, BLOCK_L, HAS_RIGHT)
    all_rows = L
    first_q, L, first_k, n, offset = _sizes(b, L, S, cu_seq_q, cu_seq_k, key_lengths, IS_UPPER_LEFT)
    mask = _mask(attn_mask, mask_batch, mask_head, b, h)
    slope = _slope(alibi_slopes, slopes_batch, slopes_head, b, h)
    of_batch = b
    if places is not None:
        of_batch = tl.zeros_like(b)
    query += of_batch * query_batch + h * query_head + first_q * query_row
    key += of_batch * key_batch + h // heads * key_head + first_k * key_row
    value += of_batch * value_batch + h // heads * value_head + first_k * key_row
    output += of_batch * output_batch + h * output_head + first_q * output_row
    i = row + tl.arange(0, BLOCK_L)
    q = _load_rows(query, query_row, row, L, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, False)
    most = tl.full((BLOCK_L,), float("-inf"), tl.float32)  # of the exponents
    total = tl.zeros((BLOCK_L,), tl.float32)  # of the exponentials, beside the largest
    sums = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)  # of the values that they weigh
    first, whole, whole_last, last = _seen(
        row, tl.minimum(row + BLOCK_L, L), n, left - offset, right + offset, HAS_LEFT, HAS_RIGHT,
        BLOCK_S,
    )  # fmt: skip
    for at_edge in tl.static_range(2):
        count = _edges(first, whole, whole_last, last) if at_edge else whole_last - whole
        for tile in range(count):
            key_of = (_edge(tile, first, whole, whole_last) if at_edge else whole + tile) * BLOCK_S
            k = _load_rows(key, key_row, key_of, n, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, not at_edge)
            products = _product(
                q, k, query, query_row, row, L, key, key_row, key_of, n, HEAD_SIZE, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
            j = key_of + tl.arange(0, BLOCK_S)
            scores, _tanh = _scores(
                products, i[:, None], j[None, :], L, n, offset, left, right, inner, softcap, mask,
                mask_row, slope, MASK_KEY, IS_RAW, HAS_SOFTCAP, HAS_LEFT, HAS_RIGHT, at_edge,
            )  # fmt: skip
            now = tl.maximum(most, tl.max(scores, 1) * factor)
            shift = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
            kept = tl.exp2(most - shift)
            most, total = now, total * kept + tl.sum(weights, 1)
            if seed is not None:
                is_kept = _is_kept(seed, threshold, i, key_of, b * H + h, BLOCK_L, BLOCK_S, False)
                weights = tl.where(is_kept, weights, 0.0)
            v = _load_rows(value, key_row, key_of, n, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, not at_edge)
            sums = tl.dot(weights.to(v.dtype), v, sums * kept[:, None], input_precision=PRECISION)
    is_empty = total == 0
    sums = sums / tl.where(is_empty, 1.0, total)[:, None]
    if seed is not None:
        sums *= keep
    _store_rows(output, output_row, row, L, sums, VALUE_SIZE, BLOCK_L, BLOCK_V)
    number, remainder = _statistics(most, total)
    at = (of_batch * H + h) * all_rows + first_q + i
    tl.store(near + at, number, mask=i < L)
    tl.store(rest + at, remainder, mask=i < L)


# A number near the logsumexp, rounded, and the rest beside what the backward pass makes of it.
@triton.jit
def _statistics(most, total):
    is_empty = total == 0
    finite = tl.where(is_empty, 0.0, most)
    number = finite * LN_2
    remainder = tl.log(tl.where(is_empty, 1.0, total)) + (finite - number * LOG2_E) * LN_2
    return tl.where(is_empty, float("-inf"), number), remainder


# The output and statistics of so few rows that the keys are shared out, SPLIT to a program: rows
# are the queries of all heads that share a key head, [heads, L]. `merge` puts the parts together.
@triton.jit
def decode(
    query,  # [B, Hk, heads * L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv], with rows as far apart as key's: one set of offsets serves both
    attn_mask,  # [B, H, L, S], with strides of 0 where it has one element
    key_lengths,  # int64 [B]
    alibi_slopes,  # float32 [B, H], with a stride of 0
    sums,  # float32 [splits, B, Hk, heads * L, Dv]
    most,  # float32 [splits, B, Hk, heads * L]
    total,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head,
    mask_batch, mask_head, mask_row,
    slopes_batch, slopes_head,
    Hk, L, S,
    rows,  # heads * L
    splits,
    left, right,
    inner: tl.float32,
    softcap: tl.float32,
    factor: tl.float32,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    MASK_KEY: tl.constexpr,
    IS_RAW: tl.constexpr,
    IS_UPPER_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    split, of_heads = index % splits, (index // splits).to(tl.int64)
    hk, b = of_heads % Hk, of_heads // Hk
    _q, L, _k, n, offset = _sizes(b, L, S, None, None, key_lengths, IS_UPPER_LEFT)
    query += b * query_batch + hk * query_head
    key += b * key_batch + hk * key_head
    value += b * value_batch + hk * value_head
    r = tl.arange(0, BLOCK_L)
    i, h = r % L, hk * (rows // L) + tl.minimum(r, rows - 1) // L
    mask, slope = None, None
    if attn_mask is not None:
        mask = (attn_mask + b * mask_batch + h * mask_head)[:, None]
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * slopes_batch + h * slopes_head)[:, None]
    zero = tl.zeros((), tl.int32)
    q = _load_rows(query, query_row, zero, rows, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, False)
    largest = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    exponentials = tl.zeros((BLOCK_L,), tl.float32)
    weighed = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
    first, _whole, _whole_last, last = _seen(
        0, L, n, left - offset, right + offset, HAS_LEFT, HAS_RIGHT, BLOCK_S
    )
    first = tl.maximum(first, split * (SPLIT // BLOCK_S))
    last = tl.minimum(last, (split + 1) * (SPLIT // BLOCK_S))
    for tile in range(first, last):
        key_of = tile * BLOCK_S
        k = _load_rows(key, key_row, key_of, n, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, False)
        products = _product(
            q, k, query, query_row, zero, rows, key, key_row, key_of, n, HEAD_SIZE, BLOCK_D, CHUNK,
            PRECISION,
        )  # fmt: skip
        j = key_of + tl.arange(0, BLOCK_S)
        scores, _tanh = _scores(
            products, i[:, None], j[None, :], L, n, offset, left, right, inner, softcap, mask,
            mask_row, slope, MASK_KEY, IS_RAW, HAS_SOFTCAP, HAS_LEFT, HAS_RIGHT, True,
        )  # fmt: skip
        now = tl.maximum(largest, tl.max(scores, 1) * factor)
        shift = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
        kept = tl.exp2(largest - shift)
        largest, exponentials = now, exponentials * kept + tl.sum(weights, 1)
        v = _load_rows(value, key_row, key_of, n, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, False)
        weighed = tl.dot(weights.to(v.dtype), v, weighed * kept[:, None], input_precision=PRECISION)
    batches = tl.num_programs(0) // splits
    to = (split * batches.to(tl.int64) + of_heads) * rows
    tl.store(most + to + r, largest, mask=r < rows)
    tl.store(total + to + r, exponentials, mask=r < rows)
    _store_rows(
        sums + to * VALUE_SIZE, VALUE_SIZE, zero, rows, weighed, VALUE_SIZE, BLOCK_L, BLOCK_V
    )


# A program has one row.
@triton.jit
def merge(
    sums,  # float32 [splits, B, Hk, heads * L, Dv]
    most,  # float32 [splits, B, Hk, heads * L]
    total,
    output,  # [B, H, L, Dv]
    near,  # float32 [B, H, L]
    rest,
    output_batch, output_head, output_row,
    H, L, splits,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # splits
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK):
        s = first + tl.arange(0, BLOCK)
        of_split = tl.load(most + s * rows + row, mask=s < splits, other=float("-inf"))
        largest = tl.maximum(largest, of_split)
    all_most = tl.max(largest, 0)
    shift = tl.where(all_most == float("-inf"), 0.0, all_most)
    exponentials = tl.zeros((BLOCK,), tl.float32)
    weighed = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for first in range(0, splits, BLOCK):
        s = first + tl.arange(0, BLOCK)
        is_there = s < splits
        at = s * rows + row
        factor = tl.exp2(tl.load(most + at, mask=is_there, other=float("-inf")) - shift)
        exponentials += factor * tl.load(total + at, mask=is_there, other=0.0)
        tile = tl.load(
            sums + at[:, None] * VALUE_SIZE + columns[None, :],
            mask=is_there[:, None] & (columns < VALUE_SIZE)[None, :],
            other=0.0,
        )
        weighed += factor[:, None] * tile
    all_total = tl.sum(exponentials, 0)
    results = tl.sum(weighed, 0) / tl.where(all_total == 0, 1.0, all_total)
    i, of_heads = row % L, row // L
    output += of_heads // H * output_batch + of_heads % H * output_head + i * output_row
    tl.store(output + columns, results.to(output.dtype.element_ty), mask=columns < VALUE_SIZE)
    number, remainder = _statistics(all_most, all_total)
    tl.store(near + row, number)
    tl.store(rest + row, remainder)


# What the backward pass has of each row: its logsumexp in units of log 2, and the sum over the keys
# of the weights' gradients, which its scores' gradients lack.
@triton.jit
def backward_rows(
    grad_output,  # [B, H, L, Dv]
    output,  # [B, H, L, Dv]
    grad_logsumexp,  # float32 [B, H, L]
    near,  # float32 [B, H, L]: the statistics
    rest,
    shift,  # float32 [B, H, L]: what is added to exponents
    remainder,  # and then this, if the two are not one number
    delta,
    grad_batch, grad_head, grad_row,
    output_batch, output_head, output_row,
    H, L, blocks,
    VALUE_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first, h, b = _place(None, blocks, H, BLOCK_L, False)
    grad_output += b * grad_batch + h * grad_head
    output += b * output_batch + h * output_head
    g = _load_rows(grad_output, grad_row, first, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, False)
    o = _load_rows(output, output_row, first, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, False)
    rows = tl.arange(0, BLOCK_L)
    if remainder is None:
        sums = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    else:
        # Added up in the order in which the weights' gradients are: of one key that has all of the
        # weight, that is this sum, and the difference is zero. It takes one tile more than keys do.
        products = _product(
            g, o, grad_output, grad_row, first, L, output, output_row, first, L, VALUE_SIZE,
            BLOCK_V, CHUNK, PRECISION,
        )  # fmt: skip
        sums = tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), 1)
    i = first + rows
    at = (b * H + h) * L + i
    if grad_logsumexp is not None:
        sums -= tl.load(grad_logsumexp + at, mask=i < L, other=0.0)
    tl.store(delta + at, sums, mask=i < L)
    number = tl.load(near + at, mask=i < L, other=0.0)
    number = tl.where(number == float("-inf"), 0.0, number * LOG2_E)
    small = tl.load(rest + at, mask=i < L, other=0.0) * LOG2_E
    if remainder is None:
        number += small
    else:
        tl.store(remainder + at, small, mask=i < L)
    tl.store(shift + at, -number, mask=i < L)


# Of rows, what `backward_rows` has stored. Those that are not there get `other`.
@triton.jit
def _load_of_rows(of_rows, head, first, L, other, ROWS: tl.constexpr, IS_WHOLE: tl.constexpr):
    i = first + tl.arange(0, ROWS)
    return (
        tl.load(of_rows + head + i)
        if IS_WHOLE
        else tl.load(of_rows + head + i, mask=i < L, other=other)
    )


@triton.jit
def backward_keys(
    query,  # [B, H, L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv], with rows as far apart as key's: one set of offsets serves both
    attn_mask,  # [B, H, L, S], with strides of 0 where it has one element
    seed,  # int64 [1]
    key_lengths,  # int64 [B]
    alibi_slopes,  # float32 [B, H], with a stride of 0
    cu_seq_q,  # [N + 1]; then B is 1
    cu_seq_k,
    places,  # int32 [blocks, 2], beside these: each block's sequence and first key
    grad_output,  # [B, H, L, Dv]
    shift,  # float32 [B, H, L]: what `backward_rows` has stored
    remainder,
    delta,
    grad_key,  # [B, Hk, S, D]
    grad_value,  # [B, Hk, S, Dv]
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head,
    mask_batch, mask_head, mask_row,
    slopes_batch, slopes_head,
    grad_batch, grad_head, grad_row,
    grad_key_batch, grad_key_head, grad_key_row,
    grad_value_batch, grad_value_head, grad_value_row,
    H, L, S,
    blocks,  # of a head's keys
    heads,
    left, right,
    scale: tl.float32,
    inner: tl.float32,
    softcap: tl.float32,
    factor: tl.float32,
    threshold: tl.uint32,
    keep: tl.float32,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,  # heads > 1
    OF_KEY: tl.constexpr,
    OF_VALUE: tl.constexpr,
    MASK_KEY: tl.constexpr,
    IS_RAW: tl.constexpr,
    IS_UPPER_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    key_of, hk, b = _place(places, blocks, H // heads, BLOCK_S, False)
    all_rows = L
    first_q, L, first_k, n, offset = _sizes(b, L, S, cu_seq_q, cu_seq_k, key_lengths, IS_UPPER_LEFT)
    of_batch = b
    if places is not None:
        of_batch = tl.zeros_like(b)
        S = n
    query += of_batch * query_batch + first_q * query_row
    key += of_batch * key_batch + hk * key_head + first_k * key_row
    value += of_batch * value_batch + hk * value_head + first_k * key_row
    grad_output += of_batch * grad_batch + first_q * grad_row
    grad_key += of_batch * grad_key_batch + hk * grad_key_head + first_k * grad_key_row
    grad_value += of_batch * grad_value_batch + hk * grad_value_head + first_k * grad_value_row
    j = key_of + tl.arange(0, BLOCK_S)
    k = _load_rows(key, key_row, key_of, n, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, False)
    v = _load_rows(value, key_row, key_of, n, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, False)
    grad_k = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    first, whole, whole_last, last = _seen(
        key_of, tl.minimum(key_of + BLOCK_S, n), L, right + offset, left - offset, HAS_RIGHT,
        HAS_LEFT, BLOCK_L,
    )  # fmt: skip
    for at_edge in tl.static_range(2):
        count = _edges(first, whole, whole_last, last) if at_edge else whole_last - whole
        # Heads that share keys come one after another in one loop: it takes less. Divisions of the
        # step would be a tenth of it, and where each head has its own keys, addresses stay outside.
        h, head_of, tile = hk, (hk * heads).to(tl.int32), 0
        for step in range(heads * count if HAS_GROUPS else count):
            if HAS_GROUPS:
                h = head_of.to(tl.int64)
            else:
                tile = step
            row = (_edge(tile, first, whole, whole_last) if at_edge else whole + tile) * BLOCK_L
            to_q, to_g = query + h * query_head, grad_output + h * grad_head
            q = _load_rows(to_q, query_row, row, L, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, not at_edge)
            products = _product(
                k, q, key, key_row, key_of, n, to_q, query_row, row, L, HEAD_SIZE, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
            i = row + tl.arange(0, BLOCK_L)
            scores, capped = _scores(
                products, i[None, :], j[:, None], L, n, offset, left, right, inner, softcap,
                _mask(attn_mask, mask_batch, mask_head, b, h), mask_row,
                _slope(alibi_slopes, slopes_batch, slopes_head, b, h), MASK_KEY, IS_RAW,
                HAS_SOFTCAP, HAS_LEFT, HAS_RIGHT, at_edge,
            )  # fmt: skip
            head = (of_batch * H + h) * all_rows + first_q
            near = _load_of_rows(shift, head, row, L, float("-inf"), BLOCK_L, not at_edge)
            exponents = tl.fma(scores, factor, near[None, :])
            if remainder is not None:
                rest = _load_of_rows(remainder, head, row, L, 0.0, BLOCK_L, not at_edge)
                exponents -= rest[None, :]
            weights = tl.exp2(exponents)
            g = _load_rows(to_g, grad_row, row, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, not at_edge)
            kept = weights
            if seed is not None:
                is_kept = _is_kept(seed, threshold, i, key_of, b * H + h, BLOCK_L, BLOCK_S, True)
                kept = tl.where(is_kept, weights, 0.0)
            if OF_VALUE:
                grad_v = tl.dot(kept.to(g.dtype), g, grad_v, input_precision=PRECISION)
            if OF_KEY:
                of_weights = _product(
                    v, g, value, key_row, key_of, n, to_g, grad_row, row, L, VALUE_SIZE, BLOCK_V,
                    CHUNK, PRECISION,
                )  # fmt: skip
                if seed is not None:
                    of_weights = tl.where(is_kept, of_weights * keep, 0.0)
                sums = _load_of_rows(delta, head, row, L, 0.0, BLOCK_L, not at_edge)
                of_scores = weights * (of_weights - sums[None, :])
                if HAS_SOFTCAP:
                    of_scores *= 1.0 - capped * capped
                grad_k = tl.dot(of_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
            if HAS_GROUPS:
                is_last = tile == count - 1
                head_of += is_last.to(tl.int32)
                tile = tl.where(is_last, 0, tile + 1)
    is_there = (j < n)[:, None]
    if OF_KEY:
        grad_k = tl.where(is_there, grad_k * scale, 0.0)
        _store_rows(grad_key, grad_key_row, key_of, S, grad_k, HEAD_SIZE, BLOCK_S, BLOCK_D)
    if OF_VALUE:
        if seed is not None:
            grad_v *= keep
        grad_v = tl.where(is_there, grad_v, 0.0)
        _store_rows(grad_value, grad_value_row, key_of, S, grad_v, VALUE_SIZE, BLOCK_S, BLOCK_V)


@triton.jit
def backward_queries(
    query,  # [B, H, L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv], with rows as far apart as key's: one set of offsets serves both
    attn_mask,  # [B, H, L, S], with strides of 0 where it has one element
    seed,  # int64 [1]
    key_lengths,  # int64 [B]
    alibi_slopes,  # float32 [B, H], with a stride of 0
    cu_seq_q,  # [N + 1]; then B is 1
    cu_seq_k,
    places,  # int32 [blocks, 2], beside these: each block's sequence and first row
    grad_output,  # [B, H, L, Dv]
    shift,  # float32 [B, H, L]: what `backward_rows` has stored
    remainder,
    delta,
    grad_query,  # [B, H, L, D]
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head,
    mask_batch, mask_head, mask_row,
    slopes_batch, slopes_head,
    grad_batch, grad_head, grad_row,
    grad_query_batch, grad_query_head, grad_query_row,
    H, L, S,
    blocks,
    heads,
    left, right,
    scale: tl.float32,
    inner: tl.float32,
    softcap: tl.float32,
    factor: tl.float32,
    threshold: tl.uint32,
    keep: tl.float32,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    MASK_KEY: tl.constexpr,
    IS_RAW: tl.constexpr,
    IS_UPPER_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, h, b = _place(places, blocks, H, BLOCK_L, HAS_RIGHT)
    all_rows = L
    first_q, L, first_k, n, offset = _sizes(b, L, S, cu_seq_q, cu_seq_k, key_lengths, IS_UPPER_LEFT)
    mask = _mask(attn_mask, mask_batch, mask_head, b, h)
    slope = _slope(alibi_slopes, slopes_batch, slopes_head, b, h)
    of_batch = b
    if places is not None:
        of_batch = tl.zeros_like(b)
    query += of_batch * query_batch + h * query_head + first_q * query_row
    key += of_batch * key_batch + h // heads * key_head + first_k * key_row
    value += of_batch * value_batch + h // heads * value_head + first_k * key_row
    grad_output += of_batch * grad_batch + h * grad_head + first_q * grad_row
    grad_query += of_batch * grad_query_batch + h * grad_query_head + first_q * grad_query_row
    i = row + tl.arange(0, BLOCK_L)
    q = _load_rows(query, query_row, row, L, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, False)
    g = _load_rows(grad_output, grad_row, row, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, False)
    head = (of_batch * H + h) * all_rows + first_q
    near = _load_of_rows(shift, head, row, L, float("-inf"), BLOCK_L, False)
    if remainder is not None:
        rest = _load_of_rows(remainder, head, row, L, 0.0, BLOCK_L, False)[:, None]
    sums = _load_of_rows(delta, head, row, L, 0.0, BLOCK_L, False)
    grad_q = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    first, whole, whole_last, last = _seen(
        row, tl.minimum(row + BLOCK_L, L), n, left - offset, right + offset, HAS_LEFT, HAS_RIGHT,
        BLOCK_S,
    )  # fmt: skip
    for at_edge in tl.static_range(2):
        count = _edges(first, whole, whole_last, last) if at_edge else whole_last - whole
        for tile in range(count):
            key_of = (_edge(tile, first, whole, whole_last) if at_edge else whole + tile) * BLOCK_S
            k = _load_rows(key, key_row, key_of, n, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, not at_edge)
            products = _product(
                q, k, query, query_row, row, L, key, key_row, key_of, n, HEAD_SIZE, BLOCK_D, CHUNK,
                PRECISION,
            )  # fmt: skip
            j = key_of + tl.arange(0, BLOCK_S)
            scores, capped = _scores(
                products, i[:, None], j[None, :], L, n, offset, left, right, inner, softcap, mask,
                mask_row, slope, MASK_KEY, IS_RAW, HAS_SOFTCAP, HAS_LEFT, HAS_RIGHT, at_edge,
            )  # fmt: skip
            exponents = tl.fma(scores, factor, near[:, None])
            if remainder is not None:
                exponents -= rest
            weights = tl.exp2(exponents)
            v = _load_rows(value, key_row, key_of, n, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, not at_edge)
            of_weights = _product(
                g, v, grad_output, grad_row, row, L, value, key_row, key_of, n, VALUE_SIZE,
                BLOCK_V, CHUNK, PRECISION,
            )  # fmt: skip
            if seed is not None:
                is_kept = _is_kept(seed, threshold, i, key_of, b * H + h, BLOCK_L, BLOCK_S, False)
                of_weights = tl.where(is_kept, of_weights * keep, 0.0)
            of_scores = weights * (of_weights - sums[:, None])
            if HAS_SOFTCAP:
                of_scores *= 1.0 - capped * capped
            grad_q = tl.dot(of_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    _store_rows(grad_query, grad_query_row, row, L, grad_q * scale, HEAD_SIZE, BLOCK_L, BLOCK_D)


# A program has a tile of the mask and goes through all rows, keys, heads and batches that share it.
@triton.jit
def backward_mask(
    query,  # [B, H, L, D]
    key,  # [B, Hk, S, D]
    value,  # [B, Hk, S, Dv], with rows as far apart as key's: one set of offsets serves both
    attn_mask,  # [B, H, L, S], with strides of 0 where it has one element
    seed,  # int64 [1]
    key_lengths,  # int64 [B]
    alibi_slopes,  # float32 [B, H], with a stride of 0
    grad_output,  # [B, H, L, Dv]
    shift,  # float32 [B, H, L]: what `backward_rows` has stored
    remainder,
    delta,
    grad_mask,  # [mask's own shape]
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head,
    mask_batch, mask_head, mask_row,
    slopes_batch, slopes_head,
    grad_batch, grad_head, grad_row,
    B, H, L, S,
    mask_heads, mask_rows, mask_keys,  # of the mask's own shape
    batches, shared_heads,  # that share each of its elements
    heads,
    left, right,
    inner: tl.float32,
    softcap: tl.float32,
    factor: tl.float32,
    threshold: tl.uint32,
    keep: tl.float32,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    MASK_KEY: tl.constexpr,
    IS_RAW: tl.constexpr,
    IS_UPPER_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_l, blocks_s = tl.cdiv(mask_rows, BLOCK_L), tl.cdiv(mask_keys, BLOCK_S)
    index = tl.program_id(0)
    block_s, index = index % blocks_s, index // blocks_s
    block_l, index = index % blocks_l, index // blocks_l
    mask_h, mask_b = index % mask_heads, index // mask_heads
    # Where a dimension is shared, all its blocks are this program's.
    steps_l = tl.cdiv(L, BLOCK_L) if mask_rows < L else 1
    steps_s = tl.cdiv(S, BLOCK_S) if mask_keys < S else 1
    grad = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
    for step in range(batches * shared_heads * steps_l * steps_s):
        of_s, outer = step % steps_s, step // steps_s
        of_l, outer = outer % steps_l, outer // steps_l
        h = (mask_h + outer % shared_heads).to(tl.int64)
        b = (mask_b + outer // shared_heads).to(tl.int64)
        row, key_of = (block_l + of_l) * BLOCK_L, (block_s + of_s) * BLOCK_S
        _q, _rows, _k, n, offset = _sizes(b, L, S, None, None, key_lengths, IS_UPPER_LEFT)
        to_q = query + b * query_batch + h * query_head
        to_k = key + b * key_batch + h // heads * key_head
        to_v = value + b * value_batch + h // heads * value_head
        to_g = grad_output + b * grad_batch + h * grad_head
        i, j = row + tl.arange(0, BLOCK_L), key_of + tl.arange(0, BLOCK_S)
        q = _load_rows(to_q, query_row, row, L, 0, HEAD_SIZE, BLOCK_L, BLOCK_D, False)
        k = _load_rows(to_k, key_row, key_of, n, 0, HEAD_SIZE, BLOCK_S, BLOCK_D, False)
        products = _product(
            q, k, to_q, query_row, row, L, to_k, key_row, key_of, n, HEAD_SIZE, BLOCK_D, CHUNK,
            PRECISION,
        )  # fmt: skip
        scores, _tanh = _scores(
            products, i[:, None], j[None, :], L, n, offset, left, right, inner, softcap,
            _mask(attn_mask, mask_batch, mask_head, b, h), mask_row,
            _slope(alibi_slopes, slopes_batch, slopes_head, b, h), MASK_KEY, IS_RAW, HAS_SOFTCAP,
            HAS_LEFT, HAS_RIGHT, True,
        )  # fmt: skip
        head = (b * H + h) * L
        near = _load_of_rows(shift, head, row, L, float("-inf"), BLOCK_L, False)
        sums = _load_of_rows(delta, head, row, L, 0.0, BLOCK_L, False)
        exponents = tl.fma(scores, factor, near[:, None])
        if remainder is not None:
            exponents -= _load_of_rows(remainder, head, row, L, 0.0, BLOCK_L, False)[:, None]
        weights = tl.exp2(exponents)
        g = _load_rows(to_g, grad_row, row, L, 0, VALUE_SIZE, BLOCK_L, BLOCK_V, False)
        v = _load_rows(to_v, key_row, key_of, n, 0, VALUE_SIZE, BLOCK_S, BLOCK_V, False)
        of_weights = _product(
            g, v, to_g, grad_row, row, L, to_v, key_row, key_of, n, VALUE_SIZE, BLOCK_V, CHUNK,
            PRECISION,
        )  # fmt: skip
        if seed is not None:
            is_kept = _is_kept(seed, threshold, i, key_of, b * H + h, BLOCK_L, BLOCK_S, False)
            of_weights = tl.where(is_kept, of_weights * keep, 0.0)
        grad += weights * (of_weights - sums[:, None])
    rows, keys = (
        block_l * BLOCK_L + tl.arange(0, BLOCK_L),
        block_s * BLOCK_S + tl.arange(0, BLOCK_S),
    )
    if mask_rows < L:
        grad = tl.broadcast_to(tl.sum(grad, 0)[None, :], (BLOCK_L, BLOCK_S))
    if mask_keys < S:
        grad = tl.broadcast_to(tl.sum(grad, 1)[:, None], (BLOCK_L, BLOCK_S))
    of_heads = (mask_b * mask_heads + mask_h).to(tl.int64)
    at = grad_mask + of_heads * mask_rows * mask_keys + rows.to(tl.int64)[:, None] * mask_keys
    is_there = (rows < mask_rows)[:, None] & (keys < mask_keys)[None, :]
    tl.store(at + keys[None, :], grad.to(grad_mask.dtype.element_ty), mask=is_there)
