"""Attention in Triton, forward and backward, that never holds a matrix of scores.

The formulas are those of genkernels.reference.attention, the kernels those of attention_kernels.
Each sum belongs to one program, so there are no atomics, and results are the same from run to run;
keys that several heads share add up their heads in the program. Nothing waits for the device, so a
call can be captured in a CUDA graph: what lengths and beginnings of sequences are is not looked at,
and those that do not fit are cut to what does. Double backward, float64 and heads of more than
`LARGEST` elements are left to the reference.

Products are summed in float32, those of float32 in full ("ieee") and not in TF32.

Source: Dao 2023, https://arxiv.org/abs/2307.08691; of few queries Dao et al. 2023,
https://pytorch.org/blog/flash-decoding/.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..reference import attention as reference
from ..reference import varlen_attn as varlen_reference
from ..reference.attention import Features
from . import DTYPES, Config, architecture_of
from . import attention_kernels as kernels
from .launch import launch

# The largest head size that is served.
LARGEST = 128
# Of at most this many queries that share a key head, keys are shared out, SPLIT to a program. Not
# by the batch: a sequence's output does not depend on what else is in it.
DECODE_ROWS, SPLIT = 16, 512


# Rows and keys of a tile, and the warps that share it, in 16 bits: for heads of up to 32, 64 and
# 128 elements where nothing is computed beside products and exponentials, and for those of up to 64
# and 128 with features. A warp has 16 rows of what is summed (32 on AMD's), which are keys in the
# kernel that sums over queries: with more warps than rows take, several would multiply the same;
# with fewer, each has more rows and takes fewer instructions for them, as long as registers hold
# the sums (and the operands, on sm_80). Where they do not hold those of a kernel with two sums, its
# tiles have 32 queries.
_Tile = tuple[int, int, int]
_TILES: dict[str, dict[Any, tuple[_Tile, ...]]] = {
    "sm_80": {
        kernels.forward: (
            *((128, 64, 4), (128, 64, 4), (64, 128, 4)),
            *((128, 64, 8), (64, 64, 8)),
        ),
        kernels.backward_keys: (
            *((64, 128, 8), (64, 64, 4), (64, 64, 8)),
            *((32, 64, 4), (32, 64, 4)),
        ),
        kernels.backward_queries: (
            *((128, 64, 8), (128, 64, 8), (64, 64, 4)),
            *((128, 64, 8), (64, 64, 8)),
        ),
    },
    "sm_90": {
        kernels.forward: (
            *((128, 64, 4), (128, 64, 4), (128, 64, 8)),
            *((128, 64, 8), (128, 64, 8)),
        ),
        kernels.backward_keys: (
            *((64, 128, 8), (64, 128, 8), (32, 128, 8)),
            *((32, 128, 8), (32, 128, 8)),
        ),
        kernels.backward_queries: (
            *((128, 64, 4), (128, 64, 8), (128, 64, 8)),
            *((128, 64, 8), (128, 64, 8)),
        ),
    },
    "sm_100": {
        kernels.forward: (
            *((128, 64, 4), (128, 64, 4), (128, 64, 8)),
            *((128, 64, 8), (128, 64, 8)),
        ),
        kernels.backward_keys: (
            *((64, 128, 4), (64, 128, 4), (64, 128, 8)),
            *((32, 128, 8), (32, 128, 8)),
        ),
        kernels.backward_queries: (
            *((128, 64, 4), (128, 64, 4), (128, 64, 4)),
            *((128, 64, 8), (128, 64, 8)),
        ),
    },
    "gfx942": {
        kernels.forward: ((128, 64, 4),) * 5,
        kernels.backward_keys: (
            *((64, 128, 4), (64, 128, 4), (32, 128, 4)),
            *((64, 128, 4), (32, 128, 4)),
        ),
        kernels.backward_queries: ((128, 64, 4),) * 5,
    },
}


def _tile(
    kernel: Any, architecture: str, dtype: torch.dtype, size: int, is_plain: bool, is_shared: bool
) -> _Tile:
    """Rows, keys and warps."""
    is_amd, is_wide = architecture.startswith("gfx"), dtype == torch.float32
    if kernel in (kernels.backward_rows, kernels.merge):
        return 64, 64, 4
    if kernel is kernels.decode:
        return DECODE_ROWS, 64, 8 if is_wide and not is_amd else 4
    if is_wide or kernel is kernels.backward_mask:
        is_tight = architecture == "sm_80" and kernel is kernels.backward_keys and size > 64
        return 32 if is_tight else 64, 64, 4 if is_amd else 8
    beyond = (32, 64) if is_plain else (0, 0, 0, 64)
    rows, keys, warps = _TILES[architecture][kernel][sum(size > least for least in beyond)]
    # Four would spill what counts the heads.
    return rows, keys, 8 if architecture == "sm_100" and is_shared else warps


@functools.cache
def config(
    kernel: Any,
    architecture: str,
    dtype: torch.dtype,
    D: int,
    Dv: int,
    is_plain: bool = True,
    is_shared: bool = False,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and the compiler's options, for every batch, length and number of heads. Plain is
    what adds nothing to scores and drops none; shared are keys of several heads, whose gradients
    one program adds up.

    On sm_80 a program takes at most 99 KB of shared memory, which is what the smaller GPUs of its
    kind have. gfx942 has twice as many registers, but not for loads ahead of time. Told how many
    there are, the compiler does not rather spill a few of them for a second program beside the
    first. Fused are those operations alone that say so: the backward pass sees the forward pass's
    very exponents.
    """
    rows, keys, warps = _tile(kernel, architecture, dtype, max(D, Dv), is_plain, is_shared)
    is_amd, is_wide = architecture.startswith("gfx"), dtype == torch.float32
    is_tight = architecture == "sm_80" and kernel is kernels.backward_queries and not is_plain
    # Loads two blocks ahead, where they were measured: an H100 takes a quarter less time for the
    # backward pass.
    products = (kernels.forward, kernels.backward_keys, kernels.backward_queries)
    is_ahead = (
        architecture == "sm_90" and kernel in products and is_plain
        and max(D, Dv) > (64 if kernel is kernels.forward else 32)
    )  # fmt: skip
    constants = {
        "HEAD_SIZE": D,
        "VALUE_SIZE": Dv,
        "SPLIT": SPLIT,
        "BLOCK": 16,
        "BLOCK_L": rows,
        "BLOCK_S": keys,  # a multiple of 64: dropout's numbers come in as many
        "BLOCK_D": max(32, triton.next_power_of_2(D)),
        "BLOCK_V": max(32, triton.next_power_of_2(Dv)),
        "CHUNK": 16 if is_wide else LARGEST,
        "PRECISION": "ieee",
    }
    options = {
        "num_warps": warps,
        "num_stages": 1 if is_amd or is_wide or is_tight else 3 if is_ahead else 2,
        "enable_fp_fusion": False,
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return constants, options if is_amd else options | {"maxnreg": min(255, 2048 // warps)}


@functools.cache
def _parts(
    kernel: Any, architecture: str, dtype: torch.dtype, D: int, is_plain: bool
) -> list[dict[str, bool]]:
    """The launches of a kernel. Where both sums, and what else there is, are more than a thread's
    registers hold, the gradients of key and value have one each: one product more beside four."""
    if kernel is not kernels.backward_keys:
        return [{}]
    both = {"OF_KEY": True, "OF_VALUE": True}
    is_tight = architecture == "sm_80" or (architecture == "sm_90" and D > 64)
    if dtype == torch.float32 or (is_tight and not is_plain):
        return [both | {"OF_VALUE": False}, both | {"OF_KEY": False}]
    return [both]


def _launch(
    kernel: Any,
    arguments: dict[str, Any],
    groups: int,
    rows: int,
    block: str = "BLOCK_L",
    cu_seq: Tensor | None = None,
) -> None:
    """Runs a kernel with those of the arguments that it names, for each block of so many rows, and
    for each batch and head."""
    query, value, is_plain = (arguments[name] for name in ("query", "value", "is_plain"))
    architecture, dtype = architecture_of(query.device), query.dtype
    D, Dv = query.size(3), value.size(3)
    is_shared = arguments["HAS_GROUPS"] and kernel is kernels.backward_keys
    constants, options = config(kernel, architecture, dtype, D, Dv, is_plain, is_shared)
    parts = _parts(kernel, architecture, dtype, max(D, Dv), is_plain)
    places, blocks = None, rows
    if block in constants:
        blocks = triton.cdiv(rows, constants[block])
        if cu_seq is not None:
            places = _places(cu_seq, rows, constants[block])
            blocks = len(places)
    for part in parts if groups * blocks else ():
        given = arguments | {"blocks": blocks, "places": places} | constants | part
        with torch.cuda.device_of(query):
            launch(kernel, (groups * blocks,), [given[n] for n in kernel.arg_names], options)


def _places(cu_seq: Tensor, rows: int, block: int) -> Tensor:
    """The sequence of each block, and where in it the block begins: int32 [blocks, 2], as many as
    there can be. Those that are not there begin behind the last sequence's end."""
    counts = (cu_seq.diff() + (block - 1)) // block
    ends = counts.cumsum(0)
    index = torch.arange(rows // block + len(counts), device=cu_seq.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp_(max=len(counts) - 1)
    first = (index - (ends - counts)[sequence]) * block
    return torch.stack([sequence, first], 1).to(torch.int32)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Those of [B, H, rows, columns], named as the kernels name them."""
    return {
        f"{name}_{dimension}": 0 if tensor.size(n) == 1 else tensor.stride(n)
        for name, tensor in tensors.items()
        for n, dimension in enumerate(("batch", "head", "row"))
    }


def _padded(columns: int) -> int:
    return max(16, (columns + 15) // 16 * 16)


def _aligned(tensor: Tensor) -> Tensor:
    """[B, H, rows, columns], if need be copied, with zeros behind each row: what the kernels are
    given can be read 16 bytes at a time, as the compiler sees by strides that are multiples of 16,
    and its rows are so near each other that offsets within a tile have 32 bits. The copy takes less
    than it gains: a product reads each row many times."""
    *strides, one = tensor.stride()
    *sizes, columns = tensor.shape
    if (
        one == 1
        and columns == _padded(columns)
        and all(stride % 16 == 0 or n == 1 for stride, n in zip(strides, sizes, strict=True))
        and strides[2] < 2**23
        and tensor.data_ptr() % 16 == 0
    ):
        return tensor
    return _copied(tensor, _padded(columns))


def _copied(tensor: Tensor, columns: int) -> Tensor:
    rows = _new_rows(tensor, columns)
    rows[..., : tensor.size(3)] = tensor
    rows[..., tensor.size(3) :] = 0
    return rows


def _as_far_apart(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Whose rows are as far apart as each other's, as those of most models are: a thread then holds
    one set of their offsets. Otherwise they are copied, behind each row what the wider one takes.
    """
    if key.size(2) == 1 or key.stride(2) == value.stride(2):
        return key, value
    columns = max(key.size(3), value.size(3))
    key, value = (
        tensor if tensor.stride(2) == tensor.size(1) * columns
        else _copied(tensor, columns)[..., : tensor.size(3)]
        for tensor in (key, value)
    )  # fmt: skip
    return key, value


def _copy_back(written: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    for rows, result in zip(written, results, strict=True):
        if rows is not result:
            result.copy_(rows[..., : result.size(3)])


def _as_padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Results as the kernels write them."""
    sizes = [_padded(tensor.size(3)) for tensor in tensors]
    return [
        tensor if tensor.size(3) == size else _new_rows(tensor, size)
        for tensor, size in zip(tensors, sizes, strict=True)
    ]


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: int,
    scale: float,
    features: Features,
    cu_seqs: tuple[Tensor | None, Tensor | None] = (None, None),
) -> dict[str, Any]:
    """What all kernels of a call are given, of [B, H, L, D], [B, Hk, S, D] and [B, Hk, S, Dv]."""
    query, key, value = map(_aligned, (query, key, value))
    key, value = _as_far_apart(key, value)
    (B, H, L, _), S = query.shape, key.size(2)
    lengths, slopes, left, right, softcap = features
    if causal:
        right = 0  # a window that ends at the own key
    reach = L + S  # a wider window has no edge
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        if attn_mask.size(3) != 1 and attn_mask.stride(3) != 1:
            attn_mask = attn_mask.contiguous()
        mask_strides = attn_mask.expand(B, H, L, S).stride()
    # Then the largest product has the largest score.
    has_bias = attn_mask is not None and attn_mask.dtype != torch.bool
    is_raw = scale > 0 and not softcap and not has_bias and slopes is None
    return {
        "is_plain": _is_plain(attn_mask, seed, features),
        **{"query": query, "key": key, "value": value, "attn_mask": attn_mask, "seed": seed},
        **{"key_lengths": lengths, "alibi_slopes": slopes},
        **dict(zip(("cu_seq_q", "cu_seq_k"), cu_seqs, strict=True)),
        **{"B": B, "H": H, "Hk": key.size(1), "L": L, "S": S},
        **_strides(query=query, key=key, value=value),
        **dict(zip(("mask_batch", "mask_head", "mask_row", "MASK_KEY"), mask_strides, strict=True)),
        "slopes_batch": 0 if slopes is None or len(slopes) == 1 else slopes.stride(0),
        "slopes_head": 0 if slopes is None else slopes.stride(1),
        "heads": H // max(1, key.size(1)),
        "HAS_GROUPS": key.size(1) < H,
        "left": min(left, reach),
        "right": min(right, reach),
        "scale": scale,
        "inner": scale / softcap if softcap else scale,
        "softcap": softcap,
        "factor": math.log2(math.e) * (scale if is_raw else 1.0),
        "threshold": min(int(dropout_p * 2**32), 2**32 - 1),
        "keep": 0.0 if dropout_p == 1 else 1 / (1 - dropout_p),
        "IS_RAW": is_raw,
        "IS_UPPER_LEFT": causal == 1,
        "HAS_SOFTCAP": softcap > 0,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
    }


def _serves(architecture: str, dtype: torch.dtype, is_plain: bool) -> bool:
    """Whether there are kernels. With 4 or 8 warps Triton 3.7 makes TF32 of some "ieee" products of
    float32 on sm_100, beside what computes more than these; with 16, registers do not suffice."""
    return is_plain or architecture != "sm_100" or dtype != torch.float32


def _is_left(op: str, query: Tensor, value: Tensor, is_plain: bool = True) -> bool:
    """Whether a call is left to the reference, which is said."""
    size = max(query.size(-1), value.size(-1))
    if size > LARGEST:
        reason = f"heads have at most {LARGEST} elements, and these {size}"
    elif not _serves(architecture_of(query.device), query.dtype, is_plain):
        reason = "nothing is added to float32's scores on this GPU, and no weight dropped"
    else:
        return False
    warnings.warn(
        f"genkernels.{op} runs the plain PyTorch reference: in the Triton kernel {reason}",
        stacklevel=2,
    )
    return True


def _is_plain(attn_mask: Tensor | None, seed: Tensor | None, features: Features) -> bool:
    """Whether nothing is added to scores, and no weight dropped."""
    is_given = attn_mask is not None or seed is not None or features.alibi_slopes is not None
    return not is_given and not features.softcap


def _new_rows(like: Tensor, columns: int) -> Tensor:
    """[B, H, rows, columns] that lies in memory as [B, rows, H, columns]."""
    B, H, rows, _ = like.shape
    return like.new_empty((B, rows, H, columns)).transpose(1, 2)


def _forward(arguments: dict[str, Any], output: Tensor, statistics: Tensor) -> None:
    """Writes [B, H, L, Dv] and [2, B, H, L]."""
    near, rest = statistics
    [written] = _as_padded([output])
    B, H, L, S, heads = (arguments[name] for name in ("B", "H", "L", "S", "heads"))
    arguments |= {"output": written, "near": near, "rest": rest, **_strides(output=written)}
    is_batch = arguments["seed"] is None and arguments["cu_seq_q"] is None
    if is_batch and 0 < L * heads <= DECODE_ROWS and S > SPLIT and H > 0:
        _decode(arguments)
    else:
        _launch(kernels.forward, arguments, B * H, L, cu_seq=arguments["cu_seq_q"])
    _copy_back([written], [output])


def _decode(arguments: dict[str, Any]) -> None:
    query, value = arguments["query"], arguments["value"]
    B, H, Hk, L, S = (arguments[name] for name in ("B", "H", "Hk", "L", "S"))
    rows, splits = L * H // Hk, triton.cdiv(S, SPLIT)
    query = _aligned(query.reshape(B, Hk, rows, query.size(3)))
    sums = query.new_empty((splits, B, Hk, rows, value.size(3)), dtype=torch.float32)
    most, total = query.new_empty((2, *sums.shape[:-1]), dtype=torch.float32)
    arguments |= {"query": query, "rows": rows, "splits": splits, **_strides(query=query)}
    arguments |= {"sums": sums, "most": most, "total": total}
    _launch(kernels.decode, arguments, B * Hk * splits, 1, "")
    _launch(kernels.merge, arguments, B * H, L, "")


def _backward(
    arguments: dict[str, Any],
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    grads: tuple[Tensor, ...],
    grad_mask: Tensor | None = None,
) -> None:
    """Writes the gradients of query, key, value, [B, H, rows, columns], and mask."""
    grad_output, output = _aligned(grad_output), _aligned(output)
    written = _as_padded(grads)
    near, rest = statistics.contiguous()
    B, H, Hk, L, S = (arguments[name] for name in ("B", "H", "Hk", "L", "S"))
    arguments |= {
        **{"grad_output": grad_output, "output": output, "near": near, "rest": rest},
        "grad_logsumexp": None if grad_logsumexp is None else grad_logsumexp.contiguous(),
        "shift": torch.empty_like(near),
        # Of 16 bits the logsumexp is one number, the rounding of which is as large as the weights'
        # own beyond scores of some 30,000.
        "remainder": torch.empty_like(near) if grad_output.dtype == torch.float32 else None,
        "delta": torch.empty_like(near),
        **dict(zip(("grad_query", "grad_key", "grad_value"), written, strict=True)),
        **_strides(grad=grad_output, output=output),
        **_strides(grad_query=written[0], grad_key=written[1], grad_value=written[2]),
    }
    cu_seq_q, cu_seq_k = arguments["cu_seq_q"], arguments["cu_seq_k"]
    _launch(kernels.backward_rows, arguments, B * H, L)
    _launch(kernels.backward_keys, arguments, B * Hk, S, "BLOCK_S", cu_seq_k)
    _launch(kernels.backward_queries, arguments, B * H, L, cu_seq=cu_seq_q)
    _copy_back(written, grads)
    if grad_mask is None:
        return
    batches, mask_heads, rows, keys = grad_mask.shape
    shared = {"batches": B // max(1, batches), "shared_heads": H // max(1, mask_heads)}
    sizes = {"mask_heads": mask_heads, "mask_rows": rows, "mask_keys": keys}
    arguments |= {"grad_mask": grad_mask, **shared, **sizes}
    columns = triton.cdiv(keys, 64)
    _launch(kernels.backward_mask, arguments, batches * mask_heads * columns, rows)


def _check(op: str, *are_fit: bool) -> None:
    """Kernels trust what they are given: a size that does not fit would be a read out of bounds.
    Which it is, the public op says."""
    if not all(are_fit):
        raise RuntimeError(f"genkernels.{op}: the arguments' shapes, dtypes or devices do not fit")


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: int,
    features: Features,
) -> None:
    op, device, dtype = "scaled_dot_product_attention", query.device, query.dtype
    _check(op, query.dim() == key.dim() == value.dim() == 4)
    (B, H, L, D), (Bk, Hk, S, Dk) = query.shape, key.shape
    _check(
        op,
        (Bk, Dk) == (B, D) and value.shape[:3] == key.shape[:3],
        Hk == H or (Hk != 0 and H % Hk == 0),
        all(t.dtype == dtype and t.device == device for t in (key, value)),
        causal in (0, 1, 2) and (seed is not None) == (dropout_p > 0) and 0 <= dropout_p <= 1,
        min(features.window_left, features.window_right) >= -1,
        0 <= features.softcap < math.inf,
    )
    if attn_mask is not None:
        scores = zip(attn_mask.shape, (B, H, L, S), strict=False)
        _check(
            op,
            attn_mask.dim() == 4 and all(size in (1, whole) for size, whole in scores),
            attn_mask.dtype in (torch.bool, torch.float32, dtype) and attn_mask.device == device,
        )
    for tensor, of, shapes in (
        (seed, torch.int64, [(1,)]),
        (features.key_lengths, torch.int64, [(B,)]),
        (features.alibi_slopes, torch.float32, [(1, H), (B, H)]),
    ):
        if tensor is not None:
            fits = tensor.dtype == of and tuple(tensor.shape) in shapes
            _check(op, fits, tensor.device == device)


def _check_like(op: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is not None:
        fits = (tensor.dtype, tensor.device) == (like.dtype, like.device)
        _check(op, fits, tuple(tensor.shape) == shape)


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
    """The raw op of that name."""
    given = Features(*features)
    _check_attention(query, key, value, attn_mask, seed, dropout_p, causal, given)
    tensors = (query, key, value, attn_mask, seed)
    output = _new_rows(query, value.size(3))
    if _is_left("scaled_dot_product_attention", query, value, _is_plain(attn_mask, seed, given)):
        results = reference.attention_forward(*tensors, dropout_p, causal, scale, *features)
        return output.copy_(results[0]), results[1]
    statistics = query.new_empty((2, *query.shape[:3]), dtype=torch.float32)
    _forward(_arguments(*tensors, dropout_p, causal, scale, given), output, statistics)
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
    """The raw op of that name."""
    op = "scaled_dot_product_attention"
    features = Features(key_lengths, alibi_slopes, window_left, window_right, softcap)
    _check_attention(query, key, value, attn_mask, seed, dropout_p, causal, features)
    shape = (*query.shape[:3], value.size(3))
    _check_like(op, grad_output, shape, query)
    _check_like(op, output, shape, query)
    _check(op, tuple(statistics.shape) == (2, *shape[:3]), statistics.dtype == torch.float32)
    _check_like(op, grad_logsumexp, shape[:3], statistics)
    is_bias = attn_mask is not None and attn_mask.dtype != torch.bool
    is_alike = all(t.shape == value.shape for t in (query, key, value)[3 - side_by_side :])
    _check(op, is_bias or not needs_mask, side_by_side in (0, 2, 3) and is_alike)
    results, grads = _new_gradients((query, key, value), side_by_side)
    tensors = (query, key, value, attn_mask, seed)
    if _is_left(op, query, value, _is_plain(attn_mask, seed, features)):
        settings: Any = (output, statistics, dropout_p, causal, scale, needs_mask)
        given = reference.attention_backward(
            grad_output, grad_logsumexp, *tensors, *settings, *features
        )
        for grad, tensor in zip(grads, given[:3], strict=True):
            grad.copy_(tensor)
        return *results, given[3]
    grad_mask = None
    if needs_mask and attn_mask is not None:
        grad_mask = attn_mask.new_empty(attn_mask.shape)
    arguments = _arguments(*tensors, dropout_p, causal, scale, features)
    saved = (grad_output, grad_logsumexp, output, statistics)
    _backward(arguments, *saved, tuple(grads), grad_mask)
    return *results, query.new_empty(0) if grad_mask is None else grad_mask


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


def _check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    window_left: int,
    window_right: int,
    scale: float,
) -> None:
    op, device = "varlen_attn", query.device
    _check(op, query.dim() == key.dim() == value.dim() == 3)
    (_, H, D), (_, Hk, Dk) = query.shape, key.shape
    cu_seqs = (cu_seq_q, cu_seq_k)
    _check(
        op,
        Dk == D and value.shape[:2] == key.shape[:2] and (Hk == H or (Hk != 0 and H % Hk == 0)),
        all(t.dtype == query.dtype and t.device == device for t in (key, value)),
        all(t.dtype in (torch.int32, torch.int64) and t.device == device for t in cu_seqs),
        cu_seq_q.dim() == 1 and cu_seq_q.shape == cu_seq_k.shape and len(cu_seq_q) > 0,
        min(window_left, window_right) >= -1,
    )


def _begins(cu_seq: Tensor, rows: int) -> Tensor:
    """cu_seq in int64, if need be made to rise from 0 to the number of rows."""
    begins = cu_seq.to(torch.int64).clamp(0, rows).cummax(0).values
    begins[:1] = 0
    begins[1:][-1:] = rows
    return begins


def _as_batch(*tensors: Tensor) -> Iterator[Tensor]:
    """[T, H, D] as [1, H, T, D]."""
    return (tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors)


def _varlen_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    window_left: int,
    window_right: int,
    scale: float,
) -> dict[str, Any]:
    features = Features(window_left=window_left, window_right=window_right)
    cu_seqs = (_begins(cu_seq_q, len(query)), _begins(cu_seq_k, len(key)))
    q, k, v = _as_batch(query, key, value)
    return _arguments(q, k, v, None, None, 0.0, 0, scale, features, cu_seqs)


def varlen_attn_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The raw op of that name."""
    args: Any = (query, key, value, cu_seq_q, cu_seq_k, window_left, window_right, scale)
    _check_varlen(*args)
    if _is_left("varlen_attn", query, value):
        return varlen_reference.varlen_attn_forward(*args)
    T, H, _ = query.shape
    output = query.new_empty((T, H, value.size(2)))
    statistics = query.new_empty((2, H, T), dtype=torch.float32)
    if len(cu_seq_q) > 1:
        _forward(_varlen_arguments(*args), next(_as_batch(output)), statistics.unsqueeze(1))
    return output, statistics


def varlen_attn_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    output: Tensor,
    statistics: Tensor,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """The raw op of that name."""
    op = "varlen_attn"
    args: Any = (query, key, value, cu_seq_q, cu_seq_k, window_left, window_right, scale)
    _check_varlen(*args)
    shape = (*query.shape[:2], value.size(2))
    _check_like(op, grad_output, shape, query)
    _check_like(op, output, shape, query)
    _check(op, tuple(statistics.shape) == (2, *shape[1::-1]), statistics.dtype == torch.float32)
    _check_like(op, grad_logsumexp, shape[1::-1], statistics)
    if _is_left(op, query, value):
        saved: Any = (*args[:5], output, statistics, *args[5:])
        return varlen_reference.varlen_attn_backward(grad_output, grad_logsumexp, *saved)
    grads = tuple(t.new_empty(t.shape) for t in (query, key, value))
    if len(cu_seq_q) > 1:
        grad_output, output = _as_batch(grad_output, output)
        grad_logsumexp = None if grad_logsumexp is None else grad_logsumexp.unsqueeze(0)
        of_rows = (grad_output, grad_logsumexp, output, statistics.unsqueeze(1))
        _backward(_varlen_arguments(*args), *of_rows, tuple(_as_batch(*grads)))
    return grads


def configs(architecture: str) -> Iterator[Config]:
    """Every kernel as the launchers run it there, for compiling ahead of time: by head size, causal
    and not; with every feature at once; and of sequences."""
    per_size = (
        kernels.forward,
        kernels.backward_rows,
        kernels.backward_keys,
        kernels.backward_queries,
    )
    for dtype, D, kernel in itertools.product(DTYPES, (32, 64, 128), per_size):
        for causal in (False, True) if kernel is not kernels.backward_rows else (False,):
            note = ", causal" if causal else ""
            yield from _configs(kernel, architecture, dtype, D, note, HAS_RIGHT=causal)
    every = dict.fromkeys(("HAS_SOFTCAP", "HAS_LEFT", "HAS_RIGHT", "HAS_GROUPS"), True)
    every["IS_RAW"] = False
    features = ("attn_mask", "seed", "key_lengths", "alibi_slopes")
    few = (torch.float32, torch.bfloat16)
    others = (kernels.decode, kernels.merge, kernels.backward_mask)
    for dtype, D, kernel in itertools.product(few, (32, 64, 128), (*per_size, *others)):
        is_served = _serves(architecture, dtype, False)
        if kernel in others and (is_served or kernel is not kernels.backward_mask):
            yield from _configs(kernel, architecture, dtype, D, "")
        if kernel is kernels.backward_keys:
            yield from _configs(kernel, architecture, dtype, D, ", shared heads", HAS_GROUPS=True)
        if is_served and kernel not in (kernels.backward_rows, kernels.merge):
            yield from _configs(
                kernel, architecture, dtype, D, ", every feature", *features, **every
            )
    sequences = ("cu_seq_q", "cu_seq_k", "places")
    for dtype, kernel in itertools.product(few, (per_size[0], *per_size[2:])):
        yield from _configs(kernel, architecture, dtype, 128, ", sequences", *sequences)
        yield from _configs(kernel, architecture, dtype, 112, "")


_FLAGS = ("IS_RAW", "IS_UPPER_LEFT", "HAS_SOFTCAP", "HAS_LEFT", "HAS_RIGHT", "HAS_GROUPS")
_OF_ROWS = ("shift", "remainder", "delta")
_TENSORS = {
    "forward": ("query", "key", "value", "output", "near", "rest"),
    "decode": ("query", "key", "value", "sums", "most", "total"),
    "merge": ("sums", "most", "total", "output", "near", "rest"),
    "backward_rows": ("grad_output", "output", "grad_logsumexp", "near", "rest", *_OF_ROWS),
}
_BACKWARD = ("query", "key", "value", "grad_output", *_OF_ROWS)
_TYPES = {
    **dict.fromkeys(("near", "rest", "grad_logsumexp", *_OF_ROWS), torch.float32),
    **dict.fromkeys(("sums", "most", "total", "alibi_slopes"), torch.float32),
    **dict.fromkeys(("seed", "key_lengths", "cu_seq_q", "cu_seq_k"), torch.int64),
    "places": torch.int32,
}
_OPTIONAL = (
    *("attn_mask", "seed", "key_lengths", "alibi_slopes", "cu_seq_q", "cu_seq_k", "places"),
    *("grad_logsumexp", "remainder"),
)


def _configs(
    kernel: Any,
    architecture: str,
    dtype: torch.dtype,
    D: int,
    note: str,
    *given: str,
    **flags: bool,
) -> Iterator[Config]:
    name, names = kernel.__name__, kernel.arg_names
    is_plain = "attn_mask" not in given and kernel is not kernels.backward_mask
    is_shared = flags.get("HAS_GROUPS", False) and kernel is kernels.backward_keys
    constants, options = config(kernel, architecture, dtype, D, D, is_plain, is_shared)
    constants = constants | {  # not in place: what config() returned it returns again
        flag: flags.get(flag, flag in ("IS_RAW", "IS_UPPER_LEFT"))
        for flag in _FLAGS
        if flag in names
    }
    own = {"backward_mask": ("grad_mask", "attn_mask"), "backward_queries": ("grad_query",)}
    tensors = _TENSORS.get(name) or (
        *_BACKWARD, *own.get(name, ("grad_key", "grad_value"))
    )  # fmt: skip
    if dtype != torch.float32:
        tensors = tuple(n for n in tensors if n != "remainder")
    tensors = tuple(n for n in names if n in (*tensors, *given))
    constants |= {n: None for n in names if n in _OPTIONAL and n not in tensors}
    if "MASK_KEY" in names:
        constants["MASK_KEY"] = int("attn_mask" in tensors)
    if name == "backward_mask":
        constants["IS_RAW"] = False
    strides = tuple(n for n in names if n.rpartition("_")[2] in ("batch", "head", "row"))
    for part in _parts(kernel, architecture, dtype, D, is_plain):
        of = " and ".join(n.removeprefix("OF_").lower() for n, on in part.items() if on)
        title = name.replace("_", " ") + (f", {of}" if part and not all(part.values()) else "")
        yield Config(
            f"attention {title}, D {D}{note}",
            dtype,
            kernel,
            {n: _TYPES.get(n, dtype) for n in tensors},
            constants | part,
            options,
            strides,
            has_products=kernel not in (kernels.backward_rows, kernels.merge),
            reason=_reason(kernel, constants),
        )


def _reason(kernel: Any, constants: dict[str, Any]) -> str:
    """Why a tile is smaller than 64 x 64."""
    if kernel is kernels.decode:
        return "there are no more queries"
    is_small = kernel is kernels.backward_keys and constants["BLOCK_L"] < 64
    return "registers hold two sums" if is_small else ""


KERNELS: dict[str, Callable[..., Any]] = {
    launcher.__name__: launcher
    for launcher in (
        attention_forward,
        attention_backward,
        varlen_attn_forward,
        varlen_attn_backward,
    )
}
