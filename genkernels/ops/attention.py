"""Scaled dot-product attention that never holds a matrix of scores."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from .. import backend, reference
from ..reference.attention import Features, sum_dtype
from .library import (
    apply,
    autocast,
    define,
    draw_seed,
    is_autocast_enabled,
    is_transformed,
    map_slices,
    needed,
    needs_autograd,
)


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[False] = False,
    key_lengths: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[True],
    key_lengths: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
    key_lengths: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries to keys, and the mean of the values that it weighs.

    Equivalent to: ``dropout(torch.softmax(scale * query @ key.mT + attn_mask, -1)) @ value``, and
    with the signature of ``torch.nn.functional.scaled_dot_product_attention`` up to enable_gqa.

    The compiled CPU kernel holds a block of scores at a time, forward and backward, whatever
    attn_mask, dropout and gradients are asked for: memory grows with L + S, not with L x S. It
    reads every argument as it lies: in any order of dimensions, expanded, key and value shared by
    heads. The backward pass computes the scores again, and so does dropout its random numbers.

    Args:
        query: [.., H, L, D]; any number of leading dimensions, also none. float32, float64,
            bfloat16 or float16 in the compiled CPU kernel; the last two are summed in float32.
        key: [.., H, S, D], in query's dtype.
        value: [.., H, S, Dv], in query's dtype. Leading dimensions of the three are broadcast; keys
            and values that heads or batches share are not copied.
        attn_mask: of any shape that can be broadcast to the scores' [.., H, L, S]. bool (a key
            takes part where true), or added to the scores: in query's dtype or float32. Or a
            ``torch.nn.attention.bias.CausalBias``. Default None.
        dropout_p: the probability with which a weight is dropped; those kept are divided by
            1 - dropout_p. Whoever calls this in evaluation passes 0. Default 0.
        is_causal: query i sees keys 0 to i alone, as with ``causal_upper_left``; beside attn_mask
            those of them that the mask leaves. Default False.
        scale: Default None: 1 / sqrt(D).
        enable_gqa: query may have several times as many heads (dimension -3) as key and value;
            neighbouring heads share one. Default False.
        return_lse: return the log-sum-exp of the scores as well. Default False.
        key_lengths: [B], int64 or int32: how many keys of each batch, the first, take part (n in
            what follows; S without it). Of several leading dimensions before the heads', of a shape
            that can be broadcast to them. Keys and values beyond are never read, and get zeros for
            gradients. A lower right diagonal ends at the last of the n keys. Default None.
        window_size: (left, right), each -1 for no limit: key j takes part for query i where
            i + o - left <= j <= i + o + right, with o = 0 beside an upper left diagonal
            (``is_causal``) and o = n - L otherwise, as in FlashAttention; beside a diagonal both
            count. What no query of a block sees is not computed: time grows with L times the
            window (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150). Default (-1, -1).
        alibi_slopes: [H], or [B, H] (broadcast as key_lengths), float32 or narrower (float64 beside
            float64): -slope * |i + o - j| is added to the scores, with the o of window_size
            (Press et al. 2022, https://arxiv.org/abs/2108.12409). Constants. Default None.
        softcap: scores, once scaled, become softcap * tanh(score / softcap) before anything is
            added to them (Gemma 2, https://arxiv.org/abs/2408.00118). Default 0: they do not.
        sinks: [H], in the dtypes of alibi_slopes: of each head one more score, of a key without a
            value, in the softmax and in the log-sum-exp (gpt-oss, https://arxiv.org/abs/2508.10925;
            Xiao et al. 2023, https://arxiv.org/abs/2309.17453). Default None.

    Returns:
        output: [.., H, L, Dv], in query's dtype; under autocast in autocast's dtype. A query
            without any key gets zeros. It lies in memory as [.., L, H, Dv], so that heads are
            joined without a copy.
        logsumexp: with return_lse [.., H, L], the natural logarithm of the sum over the keys of
            the scores' exponentials, before dropout, in float32 (float64 beside float64); -inf for
            a query without any key, where there is no sink.

    Both can be differentiated to any order, with respect to all floating-point tensors but
    alibi_slopes. From the third order on that is plain PyTorch (counted as
    ``("attention_double_backward", "reference")`` in ``stats()``), in blocks of scores too. Forward
    mode raises; ``use_backend("reference")`` has it.

    What is dropped follows from torch's default generator (one number of it at each call with
    dropout_p > 0; under torch.compile the number drawn is another) and from an element's place, not
    from the number of threads, nor from the device: of one seed the CPU and a GPU drop the same.

    On a GPU the Triton kernels take heads of at most 128 elements, of float32, bfloat16 and
    float16. Lengths are not looked at there, which would wait for the device: those outside [0, S]
    are taken for 0 or S.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, a dropout_p outside [0, 1], lengths
            outside [0, S], a window below -1, a softcap below 0, and alibi_slopes that require
            gradients; the message names the argument and the shapes.
        ValueError: is_causal beside a ``CausalBias``.

    Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135, and Dao 2023,
    https://arxiv.org/abs/2307.08691; dropout's numbers from Salmon et al. 2011,
    https://doi.org/10.1145/2063384.2063405.
    """
    causal = 1 if is_causal else 0
    if isinstance(attn_mask, CausalBias):
        causal = _causal(attn_mask, is_causal, query, key)
        attn_mask = None
    device = query.device.type
    if is_autocast_enabled(device):
        cast: Any = autocast(device, query, key, value, attn_mask)
        query, key, value, attn_mask = cast
    dtype = query.dtype
    is_wider = (
        attn_mask is not None and attn_mask.dtype == torch.float32 == sum_dtype(query) != dtype
    )
    if is_wider and needs_autograd(attn_mask):
        # Its gradient has more digits than what an output and gradient of 16 bits are rounded to.
        query, key, value = query.float(), key.float(), value.float()
    leading: tuple[int, ...] | None = None  # of the result, where the raw op's are not the same
    features: tuple[Any, ...] = ()
    needs_lse = return_lse or sinks is not None
    is_plain = key_lengths is None and alibi_slopes is None and sinks is None
    if not (is_plain and softcap == 0.0 and window_size == (-1, -1)):
        _check(query, key, value, attn_mask, enable_gqa)
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value))) or (1,)
        query, key, value, attn_mask, leading = _as_raw(query, key, value, attn_mask)
        if sinks is not None:
            _check_of_heads("sinks", sinks, query, [query.size(1)])
        features = _features(batch, query, key_lengths, alibi_slopes, tuple(window_size), softcap)
    elif not _is_raw(query, key, value, attn_mask, enable_gqa):
        _check(query, key, value, attn_mask, enable_gqa)
        query, key, value, attn_mask, leading = _as_raw(query, key, value, attn_mask)
    if scale is None:
        D = query.size(-1)
        scale = 1 / math.sqrt(D) if D else 1.0
    seed = None
    if dropout_p:
        _check_dropout(dropout_p)
        seed = draw_seed(query.device)
    tensors = (query, key, value, attn_mask)
    arguments: Any = (*tensors, seed, dropout_p, causal, scale)
    if backend.select("scaled_dot_product_attention", query.device, query.dtype) == "reference":
        _check(*tensors, enable_gqa=True)
        _check_lengths(key.size(2), *features[:1])
        backend.count("scaled_dot_product_attention", "reference")
        output, statistics = reference.attention_forward(*arguments, *features)
        logsumexps = [statistics.sum(0)]
    else:
        try:
            if needs_autograd(*tensors) or is_transformed():
                results = apply(_Attention, *arguments, needs_lse, *features)
                output, statistics, *logsumexps = results
            else:
                output, statistics = _attention_forward(*arguments, *features)
                logsumexps = [statistics.sum(0)] if needs_lse else []
        except RuntimeError:  # the compiled op checks faster, and the check says it better
            _check(*tensors, enable_gqa=True)
            _check_lengths(key.size(2), *features[:1])
            raise
    if sinks is not None:
        output, logsumexps[0] = _with_sinks(output, logsumexps[0], sinks.unsqueeze(-1))
    if leading is not None:
        output = output.reshape(*leading, *output.shape[-2:])
    if output.dtype != dtype:
        output = output.to(dtype)
    if not return_lse:
        return output
    [logsumexp] = logsumexps
    if leading is not None:
        logsumexp = logsumexp.reshape(*leading, logsumexp.size(-1))
    return output, logsumexp


def _with_sinks(output: Tensor, logsumexp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, L, Dv] and [B, H, L] with one more score in each head's softmax."""
    sinks = sinks.to(logsumexp.dtype).expand(logsumexp.shape)
    finite = logsumexp.masked_fill(logsumexp == -torch.inf, 0)  # beside an output of zeros
    # Not the sigmoid of the difference, whose derivative loses a small sink's digits.
    weights = torch.stack([finite, sinks], -1).softmax(-1)
    output = (output * weights[..., :1]).to(output.dtype)
    return output, torch.stack([logsumexp, sinks], -1).logsumexp(-1)


def _causal(bias: CausalBias, is_causal: bool, query: Tensor, key: Tensor) -> int:
    if is_causal:
        raise ValueError(
            f"{_NAME}: is_causal: expected False beside attn_mask, a CausalBias, got True"
        )
    got = (bias.seq_len_q, bias.seq_len_kv)
    if min(query.dim(), key.dim()) >= 2 and got != (query.size(-2), key.size(-2)):
        expected = f"a CausalBias of shape {[query.size(-2), key.size(-2)]}"
        _reject("attn_mask", expected, f"{list(got)}")
    return 1 if bias.variant == CausalVariant.UPPER_LEFT else 2


_NAME = "genkernels.scaled_dot_product_attention"


def _reject(name: str, expected: str, got: object) -> NoReturn:
    raise RuntimeError(f"{_NAME}: {name}: expected {expected}, got {got}")


def _is_raw(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> bool:
    """Whether the raw op takes the arguments as they are; what else can be wrong, it sees."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    (B, H, *_), (Bk, Hk, *_), (Bv, Hv, *_) = query.shape, key.shape, value.shape
    return (
        B == Bk == Bv
        and Hk == Hv
        and (Hk in (1, H) or (enable_gqa and Hk != 0 and H % Hk == 0))
        and (attn_mask is None or attn_mask.dim() == 4)
        and (attn_mask is None or attn_mask.dtype in (torch.bool, query.dtype))
    )


def _as_raw(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...] | None]:
    """Checked arguments with the four dimensions of the raw op, as views where there are any, and
    the result's leading dimensions if they are others."""
    n = max(query.dim(), key.dim(), value.dim())
    query, key, value = (_padded(t, max(n, 4)) for t in (query, key, value))
    batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    heads = [t.size(-3) for t in (query, key, value)]
    H = heads[0] if heads[0] != 1 else max(heads[1:])
    shared = heads[1] if heads[1] == heads[2] else H

    def four(tensor: Tensor, heads: int) -> Tensor:
        if tensor.size(-3) not in (1, heads):
            tensor = tensor.repeat_interleave(heads // tensor.size(-3), -3)
        return tensor.expand(*batch, heads, -1, -1).flatten(0, -4)

    query, key, value = four(query, H), four(key, shared), four(value, shared)
    if attn_mask is not None:
        attn_mask = _padded(attn_mask, max(n, 4))
        if attn_mask.dtype == torch.float32 and query.dtype == torch.float64:
            attn_mask = attn_mask.double()
        if n > 4:
            is_shared = all(size == 1 for size in attn_mask.shape[:-3])
            whole = attn_mask.shape[:-3] if is_shared else batch
            attn_mask = attn_mask.expand(*whole, -1, -1, -1).flatten(0, -4)
    return query, key, value, attn_mask, (None if n == 4 else (*batch, H)[max(n, 4) - n :])


def _padded(tensor: Tensor, n: int) -> Tensor:
    return tensor[(None,) * (n - tensor.dim())] if tensor.dim() < n else tensor


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
) -> None:
    others = {"key": key, "value": value}
    for name, tensor in {"query": query, **others}.items():
        if tensor.dim() < 2:
            _reject(name, "2 or more dimensions", f"shape {list(tensor.shape)}")
    if not query.is_floating_point():
        _reject("query", "a floating-point dtype", query.dtype)
    for name, tensor in others.items():
        if tensor.dtype != query.dtype:
            _reject(name, f"query's dtype {query.dtype}", tensor.dtype)
        if tensor.device != query.device:
            _reject(name, f"query's device {query.device}", tensor.device)
    if key.size(-1) != query.size(-1):
        beside = f"beside query of shape {list(query.shape)}"
        _reject("key", f"head size {query.size(-1)} {beside}", f"shape {list(key.shape)}")
    if value.size(-2) != key.size(-2):
        beside = f"beside key of shape {list(key.shape)}"
        _reject("value", f"length {key.size(-2)} {beside}", f"shape {list(value.shape)}")
    shapes = [[1] * (3 - t.dim()) + list(t.shape) for t in (query, key, value)]
    H = shapes[0][-3]
    leading: list[int] = []
    for name, tensor, shape in zip(("query", *others), (query, key, value), shapes, strict=True):
        heads = shape[-3]
        beside = f"beside query of shape {list(query.shape)}"
        if enable_gqa and not (heads == H or (heads != 0 and H % heads == 0)):
            _reject(name, f"a number of heads that divides {H} {beside}", list(tensor.shape))
        wanted = [*shape[:-3], 1] if enable_gqa else shape[:-2]
        merged = _merged(leading, wanted)
        if merged is None:
            expected = f"leading dimensions that broadcast with {leading} {beside}"
            _reject(name, expected, f"shape {list(tensor.shape)}")
        leading = merged
    if enable_gqa:
        leading[-1] = H
    if attn_mask is None:
        return
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        _reject("attn_mask", f"bool, float32 or query's dtype {query.dtype}", attn_mask.dtype)
    if attn_mask.device != query.device:
        _reject("attn_mask", f"query's device {query.device}", attn_mask.device)
    n = max(query.dim(), key.dim(), value.dim())
    scores = [*leading, query.size(-2), key.size(-2)][-n:]
    mask = [1] * (n - attn_mask.dim()) + list(attn_mask.shape)
    if len(mask) != n or any(m not in (1, size) for m, size in zip(mask, scores, strict=True)):
        expected = f"a shape that can be broadcast to the scores' {scores}"
        _reject("attn_mask", expected, f"{list(attn_mask.shape)}")


def _merged(a: list[int], b: list[int]) -> list[int] | None:
    """Two shapes broadcast; None if they cannot be."""
    n = max(len(a), len(b))
    pairs = zip([1] * (n - len(a)) + a, [1] * (n - len(b)) + b, strict=True)
    merged = [y if x == 1 else x if y in (1, x) else None for x, y in pairs]
    return None if None in merged else merged  # type: ignore[return-value]


def _features(
    batch: tuple[int, ...],
    query: Tensor,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    window_size: tuple[int, ...],
    softcap: float,
) -> Features:
    """What the raw op is given of these, beside a checked query that has its four dimensions."""
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int64, torch.int32):
            _reject("key_lengths", "int64 or int32", key_lengths.dtype)
        _check_place("key_lengths", key_lengths, query, batch)
        key_lengths = key_lengths.expand(batch).flatten().to(torch.int64)
    if alibi_slopes is not None:
        if alibi_slopes.requires_grad:
            _reject("alibi_slopes", "constants", "a tensor that requires gradients")
        of_heads = (*batch, query.size(1))
        if alibi_slopes.dim() == 1:
            _check_of_heads("alibi_slopes", alibi_slopes, query, of_heads[-1:])
            alibi_slopes = alibi_slopes.expand(1, query.size(1))
        else:
            _check_of_heads("alibi_slopes", alibi_slopes, query, of_heads)
            alibi_slopes = alibi_slopes.expand(of_heads).flatten(0, -2)
        alibi_slopes = alibi_slopes.to(sum_dtype(query))
    if len(window_size) != 2 or min(window_size) < -1:
        _reject("window_size", "two numbers of keys, each -1 or more", window_size)
    _check_softcap(softcap)
    return Features(key_lengths, alibi_slopes, *window_size, softcap)


def _check_of_heads(name: str, tensor: Tensor, query: Tensor, shape: Sequence[int]) -> None:
    dtype = sum_dtype(query)
    if not tensor.is_floating_point() or torch.promote_types(tensor.dtype, dtype) != dtype:
        _reject(name, f"{dtype} or a narrower floating-point dtype", tensor.dtype)
    _check_place(name, tensor, query, shape)


def _check_place(name: str, tensor: Tensor, query: Tensor, shape: Sequence[int]) -> None:
    if tensor.device != query.device:
        _reject(name, f"query's device {query.device}", tensor.device)
    if tensor.dim() > len(shape) or _merged(list(tensor.shape), list(shape)) != list(shape):
        _reject(name, f"shape {list(shape)}, or one that is broadcast to it", list(tensor.shape))


def _check_lengths(S: int, key_lengths: Tensor | None = None) -> None:
    is_known = not torch.compiler.is_compiling() and not is_transformed()
    if key_lengths is None or type(key_lengths) is not Tensor or not is_known:
        return
    for length in [] if key_lengths.is_meta else key_lengths.tolist():
        if not 0 <= length <= S:
            _reject("key_lengths", f"numbers in [0, {S}]", length)


def _check_softcap(softcap: float) -> None:
    if not 0 <= softcap < math.inf:
        _reject("softcap", "a finite number, 0 or more", softcap)


def _check_dropout(dropout_p: float) -> None:
    if not 0 <= dropout_p <= 1:
        _reject("dropout_p", "a probability in [0, 1]", dropout_p)


def _check_raw(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: int,
    *features: Any,
) -> None:
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() != 4:
            _reject(name, "4 dimensions", f"shape {list(tensor.shape)}")
    _check(query, key, value, attn_mask, enable_gqa=True)
    B, Hk = query.size(0), key.size(1)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[:2] != (B, Hk):
            _reject(name, f"{[B, Hk]} batches and heads", f"shape {list(tensor.shape)}")
    _check_dropout(dropout_p)
    if (seed is not None) != (dropout_p > 0):
        _reject("seed", "one beside dropout_p > 0 alone", "one" if dropout_p == 0 else None)
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (1,)):
        _reject("seed", "int64 of shape [1]", f"{seed.dtype} of shape {list(seed.shape)}")
    if causal not in (0, 1, 2):
        _reject("causal", "0, 1 or 2", causal)
    lengths, slopes, *window, softcap = Features(*features)
    _check_tensor("key_lengths", lengths, [B], torch.int64)
    if slopes is not None:
        batches = 1 if slopes.dim() == 2 and slopes.size(0) == 1 else B
        _check_tensor("alibi_slopes", slopes, [batches, query.size(1)], sum_dtype(query))
    for name, constants in (("key_lengths", lengths), ("alibi_slopes", slopes)):
        if constants is not None and constants.device != query.device:
            _reject(name, f"query's device {query.device}", constants.device)
    if min(window) < -1:
        _reject("window_size", "numbers of keys, each -1 or more", window)
    _check_softcap(softcap)


def _rows(like: Tensor, columns: int) -> Tensor:
    """[B, H, L, columns] that lies in memory as [B, L, H, columns]."""
    B, H, L, _ = like.shape
    return like.new_empty((B, L, H, columns)).transpose(1, 2)


def _fake_gradients(tensors: tuple[Tensor, Tensor, Tensor], side_by_side: int = 0) -> list[Tensor]:
    gradients = [_rows(tensor, tensor.size(-1)) for tensor in tensors]
    if side_by_side not in (0, 2, 3):
        _reject("side_by_side", "0, 2 or 3", side_by_side)
    if side_by_side:
        B, H, L, D = tensors[-1].shape
        for tensor in tensors[-side_by_side:]:
            _check_tensor("side_by_side", tensor, (B, H, L, D), tensor.dtype)
        packed = tensors[0].new_empty((B, L, side_by_side, H, D))
        empty = [tensors[0].new_empty(0) for _ in range(side_by_side - 1)]
        gradients[-side_by_side:] = [packed, *empty]
    return gradients


def _fake_forward(
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
    _check_raw(query, key, value, attn_mask, seed, dropout_p, causal, *features)
    dtype = sum_dtype(query)
    return _rows(query, value.size(-1)), query.new_empty((2, *query.shape[:3]), dtype=dtype)


def _check_tensor(
    name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> None:
    if tensor is not None and (tensor.shape != tuple(shape) or tensor.dtype != dtype):
        got = f"{tensor.dtype} of shape {list(tensor.shape)}"
        _reject(name, f"{dtype} of shape {list(shape)}", got)


def _fake_backward(
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
    *others: Any,
) -> tuple[Tensor, ...]:
    features, side_by_side = others[:5], others[5:]
    _check_raw(query, key, value, attn_mask, seed, dropout_p, causal, *features)
    shape = (*query.shape[:3], value.size(-1))
    dtype = sum_dtype(query)
    _check_tensor("grad_output", grad_output, shape, query.dtype)
    _check_tensor("grad_logsumexp", grad_logsumexp, shape[:3], dtype)
    _check_tensor("output", output, shape, query.dtype)
    _check_tensor("statistics", statistics, (2, *shape[:3]), dtype)
    if needs_mask and (attn_mask is None or attn_mask.dtype == torch.bool):
        _reject("attn_mask", "a floating-point mask beside needs_mask", "none")
    grad_mask = query.new_empty(0)
    if needs_mask and attn_mask is not None:
        grad_mask = attn_mask.new_empty(attn_mask.shape)
    return *_fake_gradients((query, key, value), *side_by_side), grad_mask


def _fake_double_backward(
    grad_grad_query: Tensor | None,
    grad_grad_key: Tensor | None,
    grad_grad_value: Tensor | None,
    grad_grad_mask: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    *_, grad_mask = _fake_backward(*args[:13], *args[17:])
    grad_output, grad_logsumexp, query, key, value, attn_mask = args[:6]
    for name, tensor, like in (
        ("grad_grad_query", grad_grad_query, query),
        ("grad_grad_key", grad_grad_key, key),
        ("grad_grad_value", grad_grad_value, value),
    ):
        _check_tensor(name, tensor, like.shape, query.dtype)
    if grad_grad_mask is not None:
        if attn_mask is None or attn_mask.dtype == torch.bool:
            _reject("grad_grad_mask", "none without a floating-point attn_mask", "one")
        _check_tensor("grad_grad_mask", grad_grad_mask, attn_mask.shape, attn_mask.dtype)
    rows = (0,) if grad_logsumexp is None else grad_logsumexp.shape
    grad_grad_logsumexp = query.new_empty(rows, dtype=sum_dtype(query))
    gradients = [_rows(query, grad_output.size(-1)), *_fake_gradients((query, key, value))]
    grad_grad_output, *gradients = (
        gradient if is_needed else query.new_empty(0)
        for gradient, is_needed in zip(gradients, args[13:17], strict=True)
    )
    return grad_grad_output, grad_grad_logsumexp, *gradients, grad_mask


def _reference_forward(*args: Any) -> tuple[Tensor, ...]:
    return _laid(reference.attention_forward(*args), _fake_forward(*args))


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    gradients = list(reference.attention_backward(*args[:18]))
    if side_by_side := args[18] if len(args) > 18 else 0:
        parts = gradients[3 - side_by_side : 3]
        empty = [parts[0].new_empty(0) for _ in parts[1:]]
        gradients[3 - side_by_side : 3] = [torch.stack(parts, 2).transpose(1, 3), *empty]
    return _laid(tuple(gradients), _fake_backward(*args))


def _reference_double_backward(*args: Any) -> tuple[Tensor, ...]:
    empty = _fake_double_backward(*args)
    results = reference.attention_double_backward(args[:4], *args[4:17], *args[21:])
    given = (
        e if result is None or e.dim() == 1 else result
        for e, result in zip(empty, results, strict=True)
    )
    return _laid(tuple(given), empty)


def _laid(results: tuple[Tensor, ...], empty: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results in memory as the schema promises it."""
    return tuple(e.copy_(result) for e, result in zip(empty, results, strict=True))


# H is a multiple of Hk, and query head h meets key head h // (H // Hk). attn_mask is not expanded:
# each of its dimensions is 1 or that of [B, H, L, S], and grad_mask has its shape, or no elements
# without needs_mask. seed is int64 [1], given where dropout_p > 0. causal: 0 not, 1 upper left,
# 2 lower right. Of 16-bit tensors statistics, [2, B, H, L], are float32. Output and gradients but
# for the mask's lie in memory as [B, L, H, D]. side_by_side 3 asks for the gradients of query, key
# and value as one tensor [B, L, 3, H, D] in query's place, 2 for those of key and value in key's;
# the places after it have no elements. The double backward is given the gradients of the backward
# pass's results; what it gives for a tensor that is not there, or is not needed, has no elements.
# Few calls have the last arguments: those of `Features`.
_FEATURES = (
    "Tensor? key_lengths=None, Tensor? alibi_slopes=None, int window_left=-1, int window_right=-1, "
    "float softcap=0.0"
)
_attention_forward = define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, "
    f"float dropout_p, int causal, float scale, {_FEATURES}) "
    "-> (Tensor output, Tensor statistics)",
    _reference_forward,
    _fake_forward,
)
_attention_backward = define(
    "attention_backward(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, "
    "Tensor value, Tensor? attn_mask, Tensor? seed, Tensor output, Tensor statistics, "
    f"float dropout_p, int causal, float scale, bool needs_mask, {_FEATURES}, "
    "int side_by_side=0) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
    _reference_backward,
    _fake_backward,
)
_attention_double_backward = define(
    "attention_double_backward(Tensor? grad_grad_query, Tensor? grad_grad_key, "
    "Tensor? grad_grad_value, Tensor? grad_grad_mask, Tensor grad_output, Tensor? grad_logsumexp, "
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, Tensor output, "
    "Tensor statistics, float dropout_p, int causal, float scale, bool needs_mask, "
    f"bool needs_grad_output, bool needs_query, bool needs_key, bool needs_value, {_FEATURES}) "
    "-> (Tensor grad_grad_output, Tensor grad_grad_logsumexp, Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_mask)",
    _reference_double_backward,
    _fake_double_backward,
)


def _side_by_side(query: Tensor, key: Tensor, value: Tensor) -> int:
    """How many of the last tensors are parts of a product, [B, L, n, H, D]: 0, 2 or 3."""
    if not query.is_cpu or torch.compiler.is_compiling() or key.shape != value.shape:
        return 0
    _, H, S, D = key.shape
    for count, tensors in ((3, (query, key, value)), (2, (key, value))):
        row = count * H * D
        strides = (S * row, D, row, 1)
        if all(t.stride() == strides and t.shape == key.shape for t in tensors):
            return count
    return 0


def unbind_heads(packed: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, or keys and values, as views of the product that they come from.

    Equivalent to: ``packed.unbind(-3)``, of [.., n, H, D].

    Where attention formed the gradients side by side, which it does for such views, they are the
    product's gradient as they lie. PyTorch's own backward pass copies them twice, which takes 5% of
    a GPT's training step.
    """
    if torch.compiler.is_compiling() or is_transformed() or not needs_autograd(packed):
        return packed.unbind(-3)
    return _UnbindHeads.apply(packed)


class _UnbindHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed):
        return packed.unbind(-3)

    @staticmethod
    def backward(ctx, *parts):
        first = parts[0]
        shape = (*first.shape[:-2], len(parts), *first.shape[-2:])
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if not torch.is_grad_enabled() and all(
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.storage_offset() == first.storage_offset() + i * strides[-3]
            and part.stride() == (*strides[:-3], *strides[-2:])
            for i, part in enumerate(parts)
        ):
            return first.as_strided(shape, strides)
        return torch.stack(parts, -3)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        query, key, value, attn_mask, seed, dropout_p, causal, scale, return_lse, *features
    ):
        args = (query, key, value, attn_mask, seed, dropout_p, causal, scale, *features)
        output, statistics = _attention_forward(*args)
        return (output, statistics, statistics.sum(0)) if return_lse else (output, statistics)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*inputs[:5], *outputs[:2], *inputs[9:11])
        ctx.settings, ctx.features = inputs[5:8], inputs[11:]

    @staticmethod
    def backward(ctx, grad_output, _, grad_logsumexp=None):
        if grad_output is None and grad_logsumexp is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors
        *inputs, seed, output, statistics = tensors[:7]
        features = (*tensors[7:], *ctx.features)
        if grad_output is None:
            grad_output = output.new_zeros(output.shape)
        saved = (seed, output, statistics, *ctx.settings, ctx.needs_input_grad[3])
        args = (grad_output, grad_logsumexp, *inputs, *saved, *features)
        if needs_autograd(grad_output, grad_logsumexp, *inputs):
            gradients = apply(_AttentionBackward, *args)
        else:
            side_by_side = _side_by_side(*inputs[:3])
            if side_by_side:
                gradients = list(_attention_backward(*args, side_by_side=side_by_side))
                packed = gradients[3 - side_by_side].transpose(1, 3)  # [B, H, n, L, D]
                gradients[3 - side_by_side : 3] = packed.unbind(2)
            else:
                gradients = _attention_backward(*args)
        return *needed(gradients, ctx.needs_input_grad[:4]), *(None,) * (5 + len(features))

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_Attention, info, in_dims, args)


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _attention_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:9], *inputs[13:15])
        ctx.settings, ctx.features = inputs[9:12], inputs[15:]
        if not inputs[12]:
            ctx.mark_non_differentiable(output[3])

    @staticmethod
    def backward(ctx, *cotangents):
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[:6]
        tensors = ctx.saved_tensors
        args: Any = (*tensors[:9], *ctx.settings, needs[5])
        features = (*tensors[9:], *ctx.features)
        if needs_autograd(*cotangents, *args[:6]) or is_transformed():
            backend.count("attention_double_backward", "reference")
            gradients = reference.attention_double_backward(cotangents, *args, *features)
        else:
            args += (needs[0], *needs[2:5])
            gradients = _attention_double_backward(*cotangents, *args, *features)
        return *needed(gradients, needs), *(None,) * (7 + len(features))

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_AttentionBackward, info, in_dims, args)
