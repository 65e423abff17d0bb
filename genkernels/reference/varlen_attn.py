"""Attention of packed sequences, its gradient and the gradient of that: one sequence after another.

Everywhere query is [T_q, H, D], key [T_k, Hk, D] and value [T_k, Hk, Dv]; sequence n has the rows
cu_seq[n] to cu_seq[n + 1]. Logsumexps and their gradients are [H, T_q], statistics [2, H, T_q].
Query i of a sequence of L sees those of its S keys between i + S - L - window_left and
i + S - L + window_right; -1 is no limit.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import (
    Features,
    attention_backward,
    attention_double_backward,
    attention_forward,
    sum_dtype,
)


def varlen_attn_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    window_left: int = -1,
    window_right: int = -1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The output, [T_q, H, Dv], and statistics as those of `attention_forward`."""
    features = Features(None, None, window_left, window_right)
    outputs = [query.new_empty(0, query.size(1), value.size(2))]
    statistics = [query.new_empty(2, query.size(1), 0, dtype=sum_dtype(query))]
    for q, k in _sequences(cu_seq_q, cu_seq_k):
        heads = (_heads(query, q), _heads(key, k), _heads(value, k))
        output, statistic = attention_forward(*heads, None, None, 0.0, 0, scale, *features)
        outputs.append(_rows(output))
        statistics.append(statistic.squeeze(1))
    return torch.cat(outputs), torch.cat(statistics, -1)


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
    window_left: int = -1,
    window_right: int = -1,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value."""
    settings: Any = (0.0, 0, scale, False, *Features(None, None, window_left, window_right))
    gradients = [[t[:0]] for t in (query, key, value)]
    for q, k in _sequences(cu_seq_q, cu_seq_k):
        results = attention_backward(
            _heads(grad_output, q),
            None if grad_logsumexp is None else grad_logsumexp[None, :, q],
            *(_heads(query, q), _heads(key, k), _heads(value, k), None, None),
            *(_heads(output, q), statistics[:, None, :, q]),
            *settings,
        )
        for of_sequences, gradient in zip(gradients, results, strict=False):
            of_sequences.append(_rows(gradient))
    return tuple(map(torch.cat, gradients))


def varlen_attn_double_backward(
    cotangents: Sequence[Tensor | None],
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    output: Tensor,
    statistics: Tensor,
    window_left: int = -1,
    window_right: int = -1,
    scale: float = 1.0,
) -> tuple[Tensor | None, ...]:
    """Gradients of <cotangents, varlen_attn_backward(...)> with respect to its first five
    arguments. Differentiable to any order, as `attention_double_backward` is."""
    settings: Any = (0.0, 0, scale, False, *Features(None, None, window_left, window_right))
    gradients = [[t[:0]] for t in (grad_output, query, key, value)]
    of_logsumexp = [] if grad_logsumexp is None else [grad_logsumexp[:, :0]]
    for q, k in _sequences(cu_seq_q, cu_seq_k):
        d_query, d_key, d_value = (
            None if d is None else _heads(d, rows)
            for d, rows in zip(cotangents, (q, k, k), strict=True)
        )
        grad_G, grad_lse, *others, _ = attention_double_backward(
            (d_query, d_key, d_value, None),
            _heads(grad_output, q),
            None if grad_logsumexp is None else grad_logsumexp[None, :, q],
            *(_heads(query, q), _heads(key, k), _heads(value, k), None, None),
            *(_heads(output, q), statistics[:, None, :, q]),
            *settings,
        )
        for of_sequences, gradient in zip(gradients, (grad_G, *others), strict=True):
            assert gradient is not None
            of_sequences.append(_rows(gradient))
        if grad_lse is not None:
            of_logsumexp.append(grad_lse[0])
    grad_output, *of_inputs = map(torch.cat, gradients)
    return grad_output, torch.cat(of_logsumexp, -1) if of_logsumexp else None, *of_inputs


def _sequences(cu_seq_q: Tensor, cu_seq_k: Tensor) -> Iterator[tuple[slice, slice]]:
    of_queries, of_keys = cu_seq_q.tolist(), cu_seq_k.tolist()
    for n in range(len(of_queries) - 1):
        yield slice(*of_queries[n : n + 2]), slice(*of_keys[n : n + 2])


def _heads(tensor: Tensor, rows: slice) -> Tensor:
    """[T, H, D] as [1, H, L, D]."""
    return tensor[rows].transpose(0, 1).unsqueeze(0)


def _rows(heads: Tensor) -> Tensor:
    return heads.squeeze(0).transpose(0, 1)
