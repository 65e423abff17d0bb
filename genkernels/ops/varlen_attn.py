"""Attention of sequences of any lengths that lie one after another, without padding."""

import math
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from .. import backend, reference
from ..reference.attention import sum_dtype
from .library import (
    apply,
    autocast,
    define,
    is_transformed,
    map_slices,
    needed,
    needs_autograd,
)


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several sequences, which lie one after another without padding.

    Equivalent to: ``torch.cat([scaled_dot_product_attention(q, k, v) for q, k, v in sequences])``,
    each sequence's queries, keys and values being rows cu_seq[n] to cu_seq[n + 1], as [H, L, D].
    With the signature of ``torch.nn.attention.varlen.varlen_attn`` of torch 2.13, of which it
    leaves out what pages keys and values; return_lse stands for return_aux.

    The compiled CPU kernels are those of ``scaled_dot_product_attention``: the time is that of the
    sequences, nothing is padded, and no matrix of scores is held. Long sequences are shared out
    over threads one after another, each of the others is one thread's.

    Args:
        query: [T_q, H, D]; T_q is the number of queries of all sequences. float32, float64,
            bfloat16 or float16 in the compiled CPU kernel; the last two are summed in float32.
        key: [T_k, H, D], in query's dtype.
        value: [T_k, H, Dv], in query's dtype.
        cu_seq_q: int32 or int64 [N + 1], where each sequence's queries begin, and then T_q. The
            first is 0, and none is below the one before; a sequence may be empty.
        cu_seq_k: the same of keys and values. A sequence may have other lengths of the two.
        max_q: the length of the longest sequence's queries. Not used: PyTorch's signature has it.
        max_k: the same of keys.
        scale: what products are multiplied with. Default None: 1 / sqrt(D).
        window_size: (left, right), each -1 for no limit: query i of a sequence of L sees key j of S
            where i + S - L - left <= j <= i + S - L + right. So (-1, 0) is causal, as
            ``causal_lower_right``. Keys outside of the windows of a block of queries take no time.
            Default (-1, -1): each query sees all keys of its sequence.
        enable_gqa: query may have several times as many heads as key and value; neighbouring heads
            share one. Default False.
        return_lse: return the log-sum-exp of the scores as well. Default False.

    Returns:
        output: [T_q, H, Dv], in query's dtype; under autocast in autocast's dtype. A query without
            any key gets zeros.
        logsumexp: with return_lse [H, T_q], the natural logarithm of the sum over the keys of the
            scores' exponentials, in float32 (float64 beside float64); -inf for a query without any
            key.

    Both can be differentiated to any order, with respect to query, key and value. From the third
    order on that is plain PyTorch (counted as ``("varlen_attn_double_backward", "reference")`` in
    ``stats()``). Forward mode raises; ``use_backend("reference")`` has it.

    On a GPU, in Triton, the beginnings of sequences are not looked at, which would wait for the
    device: those that do not fit are cut to what does.

    Raises:
        RuntimeError: shapes, dtypes, devices or beginnings of sequences that do not fit, and a
            window below -1; the message names the argument.

    Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135, and Dao 2023,
    https://arxiv.org/abs/2307.08691.
    """
    cast: Any = autocast(query.device.type, query, key, value)
    query, key, value = cast
    if len(window_size) != 2 or min(window_size) < -1:
        _reject("window_size", "two numbers of keys, each -1 or more", window_size)
    if not enable_gqa and query.dim() == key.dim() == 3 and query.size(1) != key.size(1):
        beside = f"beside query of shape {list(query.shape)} without enable_gqa"
        _reject("key", f"{query.size(1)} heads {beside}", f"shape {list(key.shape)}")
    if scale is None:
        D = query.size(-1) if query.dim() else 0
        scale = 1 / math.sqrt(D) if D else 1.0
    tensors = (query, key, value, cu_seq_q, cu_seq_k)
    arguments: Any = (*tensors, *window_size, scale)
    chosen = backend.select("varlen_attn", query.device, query.dtype)
    # The raw op of a device without a kernel is the reference, too, and one that can be traced.
    is_traced = query.is_meta or (torch.compiler.is_compiling() and not query.is_cpu)
    if chosen == "reference" and not is_traced:
        _check(*tensors)
        _check_values(*tensors)
        backend.count("varlen_attn", "reference")
        output, statistics = reference.varlen_attn_forward(*arguments)
        logsumexps = [statistics.sum(0)]
    else:
        try:
            if needs_autograd(query, key, value) or is_transformed():
                output, statistics, *logsumexps = apply(_VarlenAttn, *arguments, return_lse)
            else:
                output, statistics = _varlen_attn_forward(*arguments)
                logsumexps = [statistics.sum(0)] if return_lse else []
        except RuntimeError:  # the compiled op checks faster, and the check says it better
            _check(*tensors)
            _check_values(*tensors)
            raise
    return (output, logsumexps[0]) if return_lse else output


_NAME = "genkernels.varlen_attn"


def _reject(name: str, expected: str, got: object) -> NoReturn:
    raise RuntimeError(f"{_NAME}: {name}: expected {expected}, got {got}")


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor) -> None:
    others = {"key": key, "value": value}
    for name, tensor in {"query": query, **others}.items():
        if tensor.dim() != 3:
            _reject(name, "3 dimensions", f"shape {list(tensor.shape)}")
    if not query.is_floating_point():
        _reject("query", "a floating-point dtype", query.dtype)
    for name, tensor in others.items():
        if tensor.dtype != query.dtype:
            _reject(name, f"query's dtype {query.dtype}", tensor.dtype)
        if tensor.device != query.device:
            _reject(name, f"query's device {query.device}", tensor.device)
    (_, H, D), (S, Hk, _) = query.shape, key.shape
    if not (Hk == H or (Hk != 0 and H % Hk == 0)) or key.size(2) != D:
        expected = f"head size {D} and a number of heads that divides {H}"
        _reject("key", f"{expected} beside query of shape {list(query.shape)}", list(key.shape))
    if value.shape[:2] != (S, Hk):
        _reject("value", f"{S} rows of {Hk} heads as key has", f"shape {list(value.shape)}")
    for name, tensor in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if tensor.dtype not in (torch.int32, torch.int64):
            _reject(name, "int32 or int64", tensor.dtype)
        if tensor.device != query.device:
            _reject(name, f"query's device {query.device}", tensor.device)
        if tensor.dim() != 1 or tensor.size(0) == 0:
            _reject(name, "one dimension, and one more element than sequences", list(tensor.shape))
    if cu_seq_k.shape != cu_seq_q.shape:
        _reject("cu_seq_k", f"as many elements as cu_seq_q, {cu_seq_q.size(0)}", cu_seq_k.size(0))


def _check_values(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor
) -> None:
    """What fake tensors do not have."""
    for name, tensor, rows in (("cu_seq_q", cu_seq_q, query), ("cu_seq_k", cu_seq_k, key)):
        begins = tensor.tolist()
        if begins[0] != 0 or begins[-1] != rows.size(0) or begins != sorted(begins):
            expected = (
                f"numbers that do not fall, from 0 to the {rows.size(0)} rows of all sequences"
            )
            _reject(name, expected, begins)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, cu_seq_q, cu_seq_k)
    T, H, _ = query.shape
    statistics = query.new_empty((2, H, T), dtype=sum_dtype(query))
    return query.new_empty((T, H, value.size(2))), statistics


def _fake_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    output: Tensor,
    statistics: Tensor,
    *window_and_scale: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, value, cu_seq_q, cu_seq_k)
    (T, H, _), dtype = query.shape, sum_dtype(query)
    shape = (T, H, value.size(2))
    _check_tensor("grad_output", grad_output, shape, query.dtype)
    _check_tensor("grad_logsumexp", grad_logsumexp, (H, T), dtype)
    _check_tensor("output", output, shape, query.dtype)
    _check_tensor("statistics", statistics, (2, H, T), dtype)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _check_tensor(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
        got = f"{tensor.dtype} of shape {list(tensor.shape)}"
        _reject(name, f"{dtype} of shape {list(shape)}", got)


def _fake_double_backward(
    grad_grad_query: Tensor | None,
    grad_grad_key: Tensor | None,
    grad_grad_value: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    grad_output, grad_logsumexp, query, key, value = args[:5]
    gradients: Any = _fake_backward(*args[:12])
    for name, tensor, like in (
        ("grad_grad_query", grad_grad_query, query),
        ("grad_grad_key", grad_grad_key, key),
        ("grad_grad_value", grad_grad_value, value),
    ):
        _check_tensor(name, tensor, like.shape, query.dtype)
    rows = (0,) if grad_logsumexp is None else grad_logsumexp.shape
    grad_grad_output, *gradients = (
        gradient if is_needed else query.new_empty(0)
        for gradient, is_needed in zip(
            (query.new_empty(grad_output.shape), *gradients), args[12:], strict=True
        )
    )
    return grad_grad_output, query.new_empty(rows, dtype=sum_dtype(query)), *gradients


def _reference_forward(*args: Any) -> tuple[Tensor, ...]:
    _check_values(*args[:5])
    return reference.varlen_attn_forward(*args)


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    _check_values(*args[2:7])
    return reference.varlen_attn_backward(*args)


def _reference_double_backward(*args: Any) -> tuple[Tensor, ...]:
    _check_values(*args[5:10])
    results = reference.varlen_attn_double_backward(args[:3], *args[3:15])
    empty = _fake_double_backward(*args)
    return tuple(
        e if result is None or e.dim() == 1 else result
        for e, result in zip(empty, results, strict=True)
    )


# Beside query [T_q, H, D], key [T_k, Hk, D] and value [T_k, Hk, Dv], of which H is a multiple of
# Hk, logsumexps are [H, T_q] and statistics [2, H, T_q], of 16-bit tensors in float32. All results
# are contiguous. What the double backward gives for a tensor that is not there, or is not needed,
# has no elements.
_varlen_attn_forward = define(
    "varlen_attn_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, "
    "Tensor cu_seq_k, int window_left, int window_right, float scale) "
    "-> (Tensor output, Tensor statistics)",
    _reference_forward,
    _fake_forward,
)
_varlen_attn_backward = define(
    "varlen_attn_backward(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, "
    "Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, Tensor output, Tensor statistics, "
    "int window_left, int window_right, float scale) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _reference_backward,
    _fake_backward,
)
_varlen_attn_double_backward = define(
    "varlen_attn_double_backward(Tensor? grad_grad_query, Tensor? grad_grad_key, "
    "Tensor? grad_grad_value, Tensor grad_output, Tensor? grad_logsumexp, Tensor query, "
    "Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, Tensor output, "
    "Tensor statistics, int window_left, int window_right, float scale, bool needs_grad_output, "
    "bool needs_query, bool needs_key, bool needs_value) "
    "-> (Tensor grad_grad_output, Tensor grad_grad_logsumexp, Tensor grad_query, "
    "Tensor grad_key, Tensor grad_value)",
    _reference_double_backward,
    _fake_double_backward,
)


class _VarlenAttn(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        *tensors_and_settings, return_lse = args
        output, statistics = _varlen_attn_forward(*tensors_and_settings)
        return (output, statistics, statistics.sum(0)) if return_lse else (output, statistics)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*inputs[:5], *outputs[:2])
        ctx.settings = inputs[5:8]

    @staticmethod
    def backward(ctx, grad_output, _, grad_logsumexp=None):
        if grad_output is None and grad_logsumexp is None:
            return (None,) * 9
        *inputs, output, statistics = ctx.saved_tensors
        if grad_output is None:
            grad_output = output.new_zeros(output.shape)
        args = (grad_output, grad_logsumexp, *inputs, output, statistics, *ctx.settings)
        if needs_autograd(*args[:5]):
            gradients = apply(_VarlenAttnBackward, *args)
        else:
            gradients = _varlen_attn_backward(*args)
        return *needed(gradients, ctx.needs_input_grad[:3]), *(None,) * 6

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_VarlenAttn, info, in_dims, args)


class _VarlenAttnBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _varlen_attn_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:9])
        ctx.settings = inputs[9:]

    @staticmethod
    def backward(ctx, *cotangents):
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * 12
        needs = ctx.needs_input_grad[:5]
        args: Any = (*ctx.saved_tensors, *ctx.settings)
        if needs_autograd(*cotangents, *args[:5]) or is_transformed():
            backend.count("varlen_attn_double_backward", "reference")
            gradients = reference.varlen_attn_double_backward(cotangents, *args)
        else:
            gradients = _varlen_attn_double_backward(*cotangents, *args, needs[0], *needs[2:])
        return *needed(gradients, needs), *(None,) * 7

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_slices(_VarlenAttnBackward, info, in_dims, args)
