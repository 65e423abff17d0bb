"""Queries, keys and values that are views of one product, whose gradient attention forms in one
piece."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_gru import assert_bitwise_equal, dtype_id, each_dtype
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import genkernels
from genkernels.ops.attention import unbind_heads

module = sys.modules["genkernels.ops.attention"]
raw_forward = torch.ops.genkernels.attention_forward.default
raw_backward = torch.ops.genkernels.attention_backward.default
plain_unbind = functools.partial(torch.unbind, dim=-3)

B, H, L, D = 2, 3, 7, 16
each_count = pytest.mark.parametrize("count", [2, 3])


def heads(unbind: Callable[[Tensor], tuple[Tensor, ...]], *tensors: Tensor) -> list[Tensor]:
    """Query, key and value [B, H, L, D] of a tensor of all three, or of the query's and theirs."""
    *first, packed = tensors
    return [t.transpose(1, 2) for t in (*first, *unbind(packed))]


def draw(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    query = [torch.randn(B, 5, H, D)] if count == 2 else []
    tensors = [*query, torch.randn(B, L, count, H, D)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def gradients(
    unbind: Callable[..., Any], leaves: list[Tensor], **options: Any
) -> tuple[Tensor, ...]:
    output = genkernels.scaled_dot_product_attention(*heads(unbind, *leaves), **options)
    return torch.autograd.grad(output.float().square().sum(), leaves)


@each_dtype
@each_count
def test_gradients(count: int, dtype: torch.dtype) -> None:
    leaves = draw(count, dtype)
    for options in ({}, {"is_causal": True, "window_size": (3, -1)}):
        actual, expected = (gradients(f, leaves, **options) for f in (unbind_heads, plain_unbind))
        assert_bitwise_equal(actual, expected)


@each_count
def test_nothing_is_copied(count: int) -> None:
    leaves = draw(count)

    def calls(unbind: Callable[..., Any]) -> set[str]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            gradients(unbind, leaves)
        return {event.key for event in profile.key_averages()} & {"aten::cat", "aten::stack"}

    assert calls(plain_unbind) == {"aten::cat", "aten::stack"}
    assert calls(unbind_heads) == set()


def uses(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """What leaves gradients somewhere else than side by side."""
    attention = genkernels.scaled_dot_product_attention
    return [
        query.square().sum(),
        attention(query, key, value).sum() + key.square().sum(),
        attention(query, value, key).sum(),
        attention(query, key[:, :1], value[:, :1], enable_gqa=True).sum(),
        attention(query, key.contiguous(), value).sum(),
        attention(2 * query, key, value).sum(),
    ]


@pytest.mark.parametrize("index", range(6))
def test_gradients_that_lie_elsewhere(index: int) -> None:
    leaves = draw(3)
    actual, expected = (
        torch.autograd.grad(uses(*heads(unbind, *leaves))[index], leaves)
        for unbind in (unbind_heads, plain_unbind)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@each_count
def test_second_order(count: int) -> None:
    leaves = draw(count, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda *t: genkernels.scaled_dot_product_attention(*heads(unbind_heads, *t)), leaves
    )


def test_transforms_and_compile() -> None:
    (packed,) = draw(3)

    def loss(unbind: Callable[..., Any], packed: Tensor) -> Tensor:
        query, key, value = heads(unbind, packed)
        return genkernels.scaled_dot_product_attention(query, key, value).square().sum()

    actual, expected = (
        torch.func.grad(functools.partial(loss, unbind))(packed.detach())
        for unbind in (unbind_heads, plain_unbind)
    )
    assert_bitwise_equal([actual], [expected])
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(loss, unbind_heads), backend="aot_eager")
    assert_bitwise_equal(torch.autograd.grad(compiled(packed), packed), [expected])


def raw_call(count: int, dtype: torch.dtype) -> tuple[Any, ...]:
    query, key, value = (t.detach() for t in heads(plain_unbind, *draw(count, dtype)))
    inputs = (query, key, value, None, None)
    output, statistics = raw_forward(*inputs, 0.0, 0, 0.25)
    grad_output = torch.randn(output.shape).to(dtype)
    return (grad_output, None, *inputs, output, statistics, 0.0, 0, 0.25, False)


FEATURES = (None, None, -1, -1, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@each_count
def test_raw_op(count: int, dtype: torch.dtype) -> None:
    call = raw_call(count, dtype)
    torch.library.opcheck(raw_backward, (*call, *FEATURES, count))
    actual, apart = raw_backward(*call, side_by_side=count), raw_backward(*call)
    side_by_side = torch.stack(apart[3 - count : 3], 2).transpose(1, 3)
    assert_bitwise_equal(actual[: 4 - count], [*apart[: 3 - count], side_by_side])
    of_reference = module._reference_backward(*call, *FEATURES, count)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(of_reference, actual, **tolerance)
    assert [t.stride() for t in of_reference] == [t.stride() for t in actual]


@pytest.mark.parametrize("count", [-1, 1, 4])
def test_raw_op_of_another_count(count: int) -> None:
    call = raw_call(3, torch.float32)
    with pytest.raises(RuntimeError, match="side_by_side: expected 0, 2 or 3"):
        raw_backward(*call, side_by_side=count)


def test_raw_op_of_several_shapes() -> None:
    """A query of 5 rows beside keys of 7."""
    call = raw_call(2, torch.float32)
    with pytest.raises(RuntimeError, match="side_by_side: expected"):
        raw_backward(*call, side_by_side=3)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in call]
        with pytest.raises(RuntimeError, match="side_by_side: expected"):
            raw_backward(*fakes, side_by_side=3)
