"""FlashAttention-2 as the paper has it, for the instructions of genkernels' kernels to be compared
with: plain Triton, heads that are multiples of 16, no features but the causal mask.

Compiled only, and never launched (`benchmarks.triton_roofline`).

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2, the latter in a kernel for
the gradients of keys and values and one for that of queries, as there are no atomics. Tiles and
stages are among those that Triton's tutorial "Fused Attention" tries.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from genkernels.triton import Config


@triton.jit
def _load(matrix, stride, first, count, D: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    rows = first + tl.arange(0, ROWS)
    at = matrix + rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(at) if WHOLE else tl.load(at, mask=(rows < count)[:, None], other=0.0)


@triton.jit
def _store(matrix, stride, first, count, tile, D: tl.constexpr, ROWS: tl.constexpr):
    rows = first + tl.arange(0, ROWS)
    at = matrix + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(at, tile.to(matrix.dtype.element_ty), mask=(rows < count)[:, None])


@triton.jit
def _forward(
    query, key, value, output, logsumexp, head_stride, row_stride, L, S, scale: tl.float32,
    HEAD_SIZE: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) * BLOCK_L, tl.program_id(1)
    query += head * head_stride
    key += head * head_stride
    value += head * head_stride
    output += head * head_stride
    i = row + tl.arange(0, BLOCK_L)
    q = _load(query, row_stride, row, L, HEAD_SIZE, BLOCK_L, False)
    most = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    sums = tl.zeros((BLOCK_L, HEAD_SIZE), tl.float32)
    seen = tl.minimum(row + BLOCK_L, S) if HAS_RIGHT else S
    whole = (row if HAS_RIGHT else S) // BLOCK_S * BLOCK_S
    for edge in tl.static_range(2):
        for first in range(whole if edge else 0, seen if edge else whole, BLOCK_S):
            k = _load(key, row_stride, first, S, HEAD_SIZE, BLOCK_S, not edge)
            scores = tl.dot(q, tl.trans(k))
            if edge:
                j = first + tl.arange(0, BLOCK_S)
                is_seen = (j < S)[None, :]
                if HAS_RIGHT:
                    is_seen = is_seen & (j[None, :] <= i[:, None])
                scores = tl.where(is_seen, scores, float("-inf"))
            now = tl.maximum(most, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - now[:, None])
            kept = tl.exp2(most - now)
            total = total * kept + tl.sum(weights, 1)
            v = _load(value, row_stride, first, S, HEAD_SIZE, BLOCK_S, not edge)
            sums = tl.dot(weights.to(v.dtype), v, sums * kept[:, None])
            most = now
    _store(output, row_stride, row, L, sums / total[:, None], HEAD_SIZE, BLOCK_L)
    tl.store(logsumexp + head * L + i, most + tl.log2(total), mask=i < L)


@triton.jit
def _backward_keys(
    query, key, value, grad_output, logsumexp, delta, grad_key, grad_value,
    head_stride, row_stride, L, S, scale: tl.float32, factor: tl.float32,
    HEAD_SIZE: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_S, tl.program_id(1)
    query += head * head_stride
    key += head * head_stride
    value += head * head_stride
    grad_output += head * head_stride
    grad_key += head * head_stride
    grad_value += head * head_stride
    logsumexp += head * L
    delta += head * L
    j = first + tl.arange(0, BLOCK_S)
    k = _load(key, row_stride, first, S, HEAD_SIZE, BLOCK_S, False)
    v = _load(value, row_stride, first, S, HEAD_SIZE, BLOCK_S, False)
    grad_k = tl.zeros((BLOCK_S, HEAD_SIZE), tl.float32)
    grad_v = tl.zeros((BLOCK_S, HEAD_SIZE), tl.float32)
    # Of a causal mask the diagonal comes first, then the rows that see all of these keys; what
    # is no whole tile is at the end.
    start = first // BLOCK_L * BLOCK_L if HAS_RIGHT else 0
    below = tl.cdiv(first + BLOCK_S, BLOCK_L) * BLOCK_L if HAS_RIGHT else 0
    last = tl.maximum(L // BLOCK_L * BLOCK_L, below)
    for part in tl.static_range(3):
        begin = start if part == 0 else below if part == 1 else last
        end = below if part == 0 else last if part == 1 else L
        if HAS_RIGHT or part > 0:
            for row in range(begin, end, BLOCK_L):
                i = row + tl.arange(0, BLOCK_L)
                q = _load(query, row_stride, row, L, HEAD_SIZE, BLOCK_L, part == 1)
                if part == 1:
                    near, sums = tl.load(logsumexp + i), tl.load(delta + i)
                else:
                    near = tl.load(logsumexp + i, mask=i < L, other=float("inf"))
                    sums = tl.load(delta + i, mask=i < L, other=0.0)
                weights = tl.exp2(tl.dot(k, tl.trans(q)) * factor - near[None, :])
                if part == 0:
                    weights = tl.where(j[:, None] <= i[None, :], weights, 0.0)
                g = _load(grad_output, row_stride, row, L, HEAD_SIZE, BLOCK_L, part == 1)
                grad_v = tl.dot(weights.to(g.dtype), g, grad_v)
                of_scores = weights * (tl.dot(v, tl.trans(g)) - sums[None, :])
                grad_k = tl.dot(of_scores.to(q.dtype), q, grad_k)
    _store(grad_key, row_stride, first, S, grad_k * scale, HEAD_SIZE, BLOCK_S)
    _store(grad_value, row_stride, first, S, grad_v, HEAD_SIZE, BLOCK_S)


@triton.jit
def _backward_queries(
    query, key, value, grad_output, logsumexp, delta, grad_query,
    head_stride, row_stride, L, S, scale: tl.float32, factor: tl.float32,
    HEAD_SIZE: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) * BLOCK_L, tl.program_id(1)
    query += head * head_stride
    key += head * head_stride
    value += head * head_stride
    grad_output += head * head_stride
    grad_query += head * head_stride
    i = row + tl.arange(0, BLOCK_L)
    q = _load(query, row_stride, row, L, HEAD_SIZE, BLOCK_L, False)
    g = _load(grad_output, row_stride, row, L, HEAD_SIZE, BLOCK_L, False)
    near = tl.load(logsumexp + head * L + i, mask=i < L, other=0.0)
    sums = tl.load(delta + head * L + i, mask=i < L, other=0.0)
    grad_q = tl.zeros((BLOCK_L, HEAD_SIZE), tl.float32)
    seen = tl.minimum(row + BLOCK_L, S) if HAS_RIGHT else S
    whole = (row if HAS_RIGHT else S) // BLOCK_S * BLOCK_S
    for edge in tl.static_range(2):
        for first in range(whole if edge else 0, seen if edge else whole, BLOCK_S):
            k = _load(key, row_stride, first, S, HEAD_SIZE, BLOCK_S, not edge)
            weights = tl.exp2(tl.dot(q, tl.trans(k)) * factor - near[:, None])
            if edge:
                j = first + tl.arange(0, BLOCK_S)
                is_seen = (j < S)[None, :]
                if HAS_RIGHT:
                    is_seen = is_seen & (j[None, :] <= i[:, None])
                weights = tl.where(is_seen, weights, 0.0)
            v = _load(value, row_stride, first, S, HEAD_SIZE, BLOCK_S, not edge)
            of_scores = weights * (tl.dot(g, tl.trans(v)) - sums[:, None])
            grad_q = tl.dot(of_scores.to(k.dtype), k, grad_q)
    _store(grad_query, row_stride, row, L, grad_q * scale, HEAD_SIZE, BLOCK_L)


KERNELS = (_forward, _backward_keys, _backward_queries)
# By heads' sizes, each kernel's tile (queries x keys) and warps of the largest issue share: of
# tiles of 128 x 64 and 128 x 32, with 128 rows of what stays in registers, and of 64 x 64, by 4 or
# 8 warps, those that spill nothing. On sm_80 they take at most 99 KB of shared memory.
TILES = {
    "sm_80": {
        32: ((128, 64, 4), (32, 128, 4), (128, 64, 4)),
        64: ((128, 64, 4), (32, 128, 4), (128, 32, 4)),
        128: ((128, 64, 8), (64, 64, 8), (128, 32, 8)),
    },
    "sm_90": {
        32: ((128, 64, 4), (32, 128, 4), (128, 64, 4)),
        64: ((128, 64, 4), (64, 64, 4), (64, 64, 4)),
        128: ((128, 64, 8), (32, 128, 8), (128, 64, 8)),
    },
    "sm_100": {
        32: ((128, 64, 4), (64, 128, 4), (128, 64, 4)),
        64: ((128, 64, 4), (64, 128, 4), (128, 64, 4)),
        128: ((128, 64, 8), (32, 128, 4), (128, 64, 4)),
    },
    "gfx942": {
        32: ((128, 64, 4), (64, 128, 4), (128, 64, 4)),
        64: ((128, 64, 4), (64, 128, 4), (128, 64, 4)),
        128: ((128, 64, 4), (32, 128, 4), (128, 32, 4)),
    },
}
# Those of a causal call, where they would spill: by heads' sizes and the kernel's place above.
CAUSAL_TILES = {
    "sm_80": {(32, 2): (128, 32, 4), (64, 1): (64, 128, 8), (128, 0): (128, 32, 8)},
}


def configs(architecture: str, dtype: torch.dtype, is_causal: bool) -> Iterator[Config]:
    types = {"logsumexp": torch.float32, "delta": torch.float32}
    for D, tiles in TILES[architecture].items():
        for n, (kernel, tile) in enumerate(zip(KERNELS, tiles, strict=True)):
            if is_causal:
                tile = CAUSAL_TILES.get(architecture, {}).get((D, n), tile)
            rows, columns, warps = tile
            sizes = {"HEAD_SIZE": D, "HAS_RIGHT": is_causal, "BLOCK_L": rows, "BLOCK_S": columns}
            tensors = [n for n in kernel.arg_names if n in _TENSORS]
            yield Config(
                f"textbook {kernel.__name__}, D {D}{', causal' if is_causal else ''}",
                dtype,
                kernel,
                {name: types.get(name, dtype) for name in tensors},
                sizes,
                {"num_warps": warps, "num_stages": 1 if architecture.startswith("gfx") else 2},
                ("head_stride", "row_stride"),
            )


_TENSORS = {
    *("query", "key", "value", "output", "logsumexp", "delta", "grad_output"),
    *("grad_query", "grad_key", "grad_value"),
}
