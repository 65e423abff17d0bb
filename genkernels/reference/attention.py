"""Scaled dot-product attention, its gradient, and the gradient of that.

Everywhere query is [B, H, L, D], key [B, Hk, S, D] and value [B, Hk, S, Dv]; H is a multiple of Hk,
and query head h meets key head h // (H // Hk). attn_mask has four dimensions, each 1 or that of
[B, H, L, S]. `causal` is 0 (not), 1 (key j takes part for query i where j <= i, "upper left") or 2
(where j <= i + S - L, "lower right"). What few calls have follows the other arguments, in the order
of `Features`. Of 16-bit arguments everything is computed in float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dropout import dropout_factors

# Scores that the double backward holds at once: enough for a product, and what is computed of them
# stays in the cache from one operation to the next.
BLOCK = 2**18


class Features(NamedTuple):
    """With n the number of a batch's keys, S or of key_lengths, and o = 0 beside the upper left
    diagonal, n - L otherwise (which the lower right one ends at, too), key j takes part for query i
    where j < n and i + o - window_left <= j <= i + o + window_right."""

    key_lengths: Tensor | None = None  # int64 [B]
    alibi_slopes: Tensor | None = None  # [1 or B, H]: -slope |i + o - j| is added to scores
    window_left: int = -1  # -1: no limit
    window_right: int = -1
    softcap: float = (
        0.0  # scores become softcap tanh(score / softcap), first of all; 0: as they are
    )


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: int = 0,
    scale: float = 1.0,
    *features: Any,
) -> tuple[Tensor, Tensor]:
    """The output, [B, H, L, Dv], and statistics of the scores, [2, B, H, L]: a number near their
    logsumexp, and the rest of it, for which large scores would leave no digits. A query without
    keys gets zeros, and -inf and 0."""
    (B, H, L, _), S, dtype, options = *_sizes(query, key), Features(*features)
    q, k, v = query.to(dtype), *(_key_rows(t, H, dtype, options) for t in (key, value))
    products = _capped(scale * q @ k.mT, options.softcap)  # [B, H, L, S]
    scores = _masked(products, attn_mask, causal, (L, S), options)
    p, *statistics = _softmax(scores)
    if seed is not None:
        p = p * dropout_factors(seed, dropout_p, dtype, (0, B * H), (0, L), S).view(p.shape)
    return (p @ v).to(query.dtype), torch.stack(statistics).squeeze(-1)


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
    dropout_p: float = 0.0,
    causal: int = 0,
    scale: float = 1.0,
    needs_mask: bool = False,
    *features: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and attn_mask, of which the last has no elements if it is
    not needed.

    Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B.2.
    """
    (B, H, L, _), S, dtype, options = *_sizes(query, key), Features(*features)
    Hk = key.size(1)
    q, k, v = query.to(dtype), *(_key_rows(t, H, dtype, options) for t in (key, value))
    g = grad_output.to(dtype)
    products = _capped(scale * q @ k.mT, options.softcap)
    scores = _masked(products, attn_mask, causal, (L, S), options)
    p = _exp(scores, *statistics.unsqueeze(-1))
    dp, kept = g @ v.mT, p
    if seed is not None:
        z = dropout_factors(seed, dropout_p, dtype, (0, B * H), (0, L), S).view(p.shape)
        dp, kept = z * dp, z * p
    delta = (g * output.to(dtype)).sum(-1)
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp
    ds = p * (dp - delta.unsqueeze(-1))
    grad_mask = query.new_empty(0)
    if needs_mask and attn_mask is not None:
        grad_mask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if options.softcap:
        ds = ds * (1 - (products / options.softcap).square())
    return (
        (scale * ds @ k).to(query.dtype),
        _of_shared_heads(scale * ds.mT @ q, Hk).to(key.dtype),
        _of_shared_heads(kept.mT @ g, Hk).to(value.dtype),
        grad_mask,
    )


def attention_double_backward(
    cotangents: Sequence[Tensor | None],
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    dropout_p: float = 0.0,
    causal: int = 0,
    scale: float = 1.0,
    needs_mask: bool = False,
    *features: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of <cotangents, attention_backward(...)> with respect to its first six arguments.

    Output and statistics are functions of those. With S the scores, P their softmax, Z the factors
    of dropout, G = grad_output, E = Z (G V^T) - rowsum(P Z (G V^T)) + grad_logsumexp, and with the
    cotangents A, B, C and M of the gradients of query, key, value and attn_mask, the product is
    <P E, W> + <P Z, G C^T>, where W = scale (A K^T + Q B^T) + M. So, with U = W - rowsum(P W),

        grad of G = (Z P U) V + (Z P) C          grad of V = (Z P U)^T G
        grad of grad_logsumexp = rowsum(P W)
        grad of S = P (T - rowsum(P T)), where T = U E + Z (G C^T)

    which reaches Q, K and attn_mask. Through W, Q gets scale (P E) B, and K gets scale (P E)^T A.
    Of S the code has P T = (P U) E + P Z (G C^T). A softcap's derivative D, and that of D, D', are
    factors of W but for M, and of P E, which Q and K get; and Q and K get D (grad of S) + D' W P E.

    Several heads at a time, or some rows of one: no more than `BLOCK` scores are held, and nothing
    of size L x S. Differentiable to any order; what records gradients reads neither output nor
    statistics.
    """
    (B, H, L, _), S, dtype, options = *_sizes(query, key), Features(*features)
    softcap = options.softcap

    def rows_of(tensor: Tensor, factor: float = 1.0) -> Tensor:  # [B * H, L, D]
        tensor = tensor.to(dtype).flatten(0, 1).contiguous()
        return tensor if factor == 1 else factor * tensor

    def key_rows_of(tensor: Tensor) -> Tensor:  # [B * H, S, D]
        return rows_of(_key_rows(tensor, H, dtype, options))

    d_query, d_key, d_value, d_mask = cotangents
    G, Q, K, V = rows_of(grad_output), rows_of(query, scale), key_rows_of(key), key_rows_of(value)
    A = None if d_query is None else rows_of(d_query, scale)
    of_K, of_V = (None if d is None else key_rows_of(d) for d in (d_key, d_value))
    # Written in place, by what torch.func may have mapped: then zeros have to be mapped, too.
    given = (*cotangents, grad_output, grad_logsumexp, query, key, value, attn_mask, *options[:2])
    zero = sum((t.new_zeros((), dtype=dtype) for t in given if t is not None), G.new_zeros(()))
    grad_G, grad_Q, grad_K, grad_V = (zero.new_zeros(t.shape) for t in (G, Q, K, V))
    grad_lse = zero.new_zeros(B, H, L, 1)
    # The sum over the keys, from two vectors; of an output that is rounded it is not exact enough.
    is_recorded, delta = torch.is_grad_enabled(), None
    if not is_recorded and output.dtype == dtype:
        delta = (grad_output * output).sum(-1, keepdim=True)
    grad_mask = zero.new_zeros(attn_mask.shape) if needs_mask and attn_mask is not None else None

    for batches, heads, rows, columns in _blocks(B, H, L, S, _diagonal(causal, L, S)):
        block = (batches, heads, rows, columns)
        first, last = batches.start * H + heads.start, (batches.stop - 1) * H + heads.stop
        of_rows, of_keys = (slice(first, last), rows), (slice(first, last), columns)
        shape = [each.stop - each.start for each in block]
        q, k, g, v = Q[of_rows], K[of_keys], G[of_rows], V[of_keys]

        def per_row(of_row: Tensor, block: tuple[slice, ...] = block) -> Tensor:
            return of_row[block[:3]].flatten(0, 1)  # [heads, rows, 1]

        products = _capped(torch.bmm(q, k.mT), softcap)  # [heads, rows, columns], as all below
        mask = None if attn_mask is None else attn_mask[_within(attn_mask, block)]
        scores = _masked(products.view(shape), mask, causal, (L, S), options, block).flatten(0, 1)
        if is_recorded:
            p = _softmax(scores)[0]
        else:
            p = _exp(scores, *(per_row(each.unsqueeze(-1)) for each in statistics))
        z = None
        if seed is not None:
            span = (rows.start, rows.stop)
            z = dropout_factors(seed, dropout_p, dtype, (first, last), span, columns.stop)

        w = pt = None
        if A is not None:
            w = torch.bmm(A[of_rows], k.mT)
        if of_K is not None:
            b = of_K[of_keys].mT
            w = torch.bmm(q, b) if w is None else torch.baddbmm(w, q, b)
        slope = bent = None
        if softcap:
            slope = 1 - (products / softcap).square()
            if w is not None:
                w = slope * w
                bent = w * products * (-2 / softcap**2)
        if d_mask is not None:
            m = d_mask[_within(d_mask, block)].to(dtype).expand(shape).flatten(0, 1)
            w = m if w is None else w + m
        if w is not None:
            e = torch.bmm(g, v.mT)
            if z is not None:
                e = z * e
            mean = (p * e).sum(-1, keepdim=True) if delta is None else per_row(delta)
            if grad_logsumexp is not None:
                mean = mean - per_row(grad_logsumexp.unsqueeze(-1))
                grad_lse[block[:3]] = (p * w).sum(-1).view(*shape[:3], 1)
            e = e - mean
            pe, pu = p * e, _softmax_backward(w, p)
            pt = pu * e
            zpu = pu if z is None else z * pu
            grad_G[of_rows].baddbmm_(zpu, v)
            grad_V[of_keys].baddbmm_(zpu.mT, g)
            if slope is not None:
                bent = None if bent is None else bent * pe
                pe = slope * pe
            if of_K is not None:
                grad_Q[of_rows].baddbmm_(pe, of_K[of_keys])
            if A is not None:
                grad_K[of_keys].baddbmm_(pe.mT, A[of_rows])
        if of_V is not None:
            c = of_V[of_keys]
            zp = p if z is None else z * p
            gc = torch.bmm(g, c.mT)
            grad_G[of_rows].baddbmm_(zp, c)
            pt = zp * gc if pt is None else torch.addcmul(pt, zp, gc)
        if pt is None:
            continue
        grad_s = torch.addcmul(pt, p, pt.sum(-1, keepdim=True), value=-1)
        if grad_mask is not None:
            here = grad_mask[_within(grad_mask, block)]
            here += grad_s.view(shape).sum_to_size(here.shape)
        if slope is not None:
            grad_s = slope * grad_s if bent is None else torch.addcmul(bent, slope, grad_s)
        grad_Q[of_rows].baddbmm_(grad_s, k)
        grad_K[of_keys].baddbmm_(grad_s.mT, q)

    def of_heads(grad: Tensor, like: Tensor, factor: float = 1.0) -> Tensor:
        grad = grad if factor == 1 else factor * grad
        return _of_shared_heads(grad.view(B, H, *grad.shape[1:]), like.size(1)).to(like.dtype)

    return (
        of_heads(grad_G, grad_output),
        None if grad_logsumexp is None else grad_lse.squeeze(-1),
        of_heads(grad_Q, query, scale),
        of_heads(grad_K, key),
        of_heads(grad_V, value),
        None if grad_mask is None or attn_mask is None else grad_mask.to(attn_mask.dtype),
    )


def sum_dtype(query: Tensor) -> torch.dtype:
    return torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype


def _sizes(query: Tensor, key: Tensor) -> tuple[torch.Size, int, torch.dtype]:
    return query.shape, key.size(2), sum_dtype(query)


def _diagonal(causal: int, L: int, S: int) -> int | None:
    """Key j takes part for query i where j <= i + this."""
    return (None, 0, S - L)[causal]


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _masked(
    scores: Tensor,
    attn_mask: Tensor | None,
    causal: int,
    sizes: tuple[int, int],
    options: Features,
    block: tuple[slice, ...] | None = None,
) -> Tensor:
    """What is added to scores, [B, H, L, S] or a block of them as the mask, and -inf for keys that
    take no part."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    lengths, slopes, left, right, _ = options
    if not causal and lengths is None and slopes is None and left < 0 and right < 0:
        return scores
    (L, S), device = sizes, scores.device
    batches, heads, rows, columns = block or (slice(None), slice(None), slice(0, L), slice(0, S))
    i = torch.arange(rows.start, rows.stop, device=device).unsqueeze(-1)
    j = torch.arange(columns.start, columns.stop, device=device)
    length = S if lengths is None else lengths[batches].view(-1, 1, 1, 1)
    distance = i - j + (0 if causal == 1 else length - L)  # to the left of query i's own key
    if slopes is not None:
        of_heads = slopes[_within(slopes, (batches, heads))][..., None, None]
        scores = scores - of_heads * distance.abs()
    hidden = []
    if lengths is not None:
        hidden.append(j >= length)
    if causal:
        hidden.append(distance < 0)
    if left >= 0:
        hidden.append(distance > left)
    if right >= 0:
        hidden.append(distance < -right)
    for each in hidden:
        scores = scores.masked_fill(each, -torch.inf)
    return scores


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last dimension, zeros where all scores are -inf; and their statistics, [.., 1]."""
    shift = scores.detach().logsumexp(-1, keepdim=True)
    exps = _exp(scores, shift)
    total = exps.sum(-1, keepdim=True)  # about 1, and 0 without a key
    total = total.masked_fill(total == 0, 1)
    return exps / total, shift, total.log()


def _softmax_backward(gradient: Tensor, p: Tensor) -> Tensor:
    """p (gradient - rowsum(p gradient)), in one operation."""
    return torch.ops.aten._softmax_backward_data(gradient, p, -1, p.dtype)


def _exp(scores: Tensor, shift: Tensor, log_sum: Tensor | None = None) -> Tensor:
    difference = scores - shift.masked_fill(shift == -torch.inf, 0)
    return (difference if log_sum is None else difference - log_sum).exp()


def _key_rows(tensor: Tensor, H: int, dtype: torch.dtype, options: Features) -> Tensor:
    """[B, Hk, S, D] as [B, H, S, D]; zeros beyond the keys of a batch, whatever is there."""
    if options.key_lengths is not None:
        j = torch.arange(tensor.size(2), device=tensor.device).view(1, 1, -1, 1)
        tensor = tensor.masked_fill(j >= options.key_lengths.view(-1, 1, 1, 1), 0)
    tensor = tensor if tensor.size(1) == H else tensor.repeat_interleave(H // tensor.size(1), 1)
    return tensor.to(dtype)


def _of_shared_heads(gradient: Tensor, Hk: int) -> Tensor:
    return gradient if gradient.size(1) == Hk else gradient.unflatten(1, (Hk, -1)).sum(2)


def _blocks(
    B: int, H: int, L: int, S: int, diagonal: int | None
) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Batches, heads, rows and columns: all heads where there are several batches."""
    R = min(L, BLOCK // max(1, S)) if diagonal is None else min(L, BLOCK // max(1, S), 128)
    R = max(1, R)
    several = max(1, BLOCK // max(1, R * S))
    for b in _steps(0, B, max(1, several // max(1, H))):
        for h in _steps(0, H, several):
            for r in _steps(0, L, R):
                last = S if diagonal is None else min(S, max(0, r.stop + diagonal))
                yield b, h, r, slice(0, last)


def _steps(first: int, last: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, last)) for i in range(first, last, step))


def _within(mask: Tensor, block: tuple[slice, ...]) -> tuple[slice, ...]:
    """Where the part of a mask lies that belongs to a block of scores."""
    return tuple(s if n > 1 else slice(None) for s, n in zip(block, mask.shape, strict=True))
