"""genkernels.scaled_dot_product_attention against torch.nn.functional's: its errors against those
that PyTorch makes itself, and where NaN spreads against its math path."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from conftest import LEVELS
from parity import assert_op_parity, assert_parity
from test_gru import DTYPES, assert_bitwise_equal, dtype_id, each_dtype, relaid, with_gradients
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.common_methods_invocations import op_db

import genkernels
from genkernels import backend
from genkernels.reference import attention as reference
from genkernels.reference.dropout import philox

attention = genkernels.scaled_dot_product_attention
module = sys.modules["genkernels.ops.attention"]
raw_forward = torch.ops.genkernels.attention_forward.default
raw_backward = torch.ops.genkernels.attention_backward.default
raw_double_backward = torch.ops.genkernels.attention_double_backward.default

OUTPUTS = ("output", "logsumexp")
TENSORS = ("query", "key", "value")
UPPER_LEFT, LOWER_RIGHT = 1, 2
REFERENCE = {("scaled_dot_product_attention", "reference"): 1}

SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 48, 49, 63, 65, 127, 129, 193, 300)
HEAD_SIZES = (1, 3, 8, 16, 33, 64, 80, 128, 129, 256)
# B, H, L, S, D: every length once as L and once as S per round, the rounds shifted against each
# other; one round of each kind of causal mask.
SHAPES = [
    (
        (1, 2)[i % 2],
        (3, 1, 2)[(i + shift) % 3],
        SIZES[(7 * i + 3 * shift) % 20],
        SIZES[i],
        (5, 16, 33, 8, 64)[(i + shift) % 5],
        shift,
    )
    for shift in (0, 1, 2)
    for i in range(20)
]
FAST_DTYPES = (*DTYPES[:2], torch.float16)  # in which a test of float64 would repeat one of float32
each_of_four = pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=dtype_id)
# What is read of an additive mask is of its dtype, of a boolean one it is not.
each_kind_of_mask = pytest.mark.parametrize(
    ("boolean", "dtype"),
    [*((False, dtype) for dtype in DTYPES), (True, torch.float32)],
    ids=lambda value: {False: "additive", True: "boolean"}.get(value) or dtype_id(value),
)
each_causal = pytest.mark.parametrize(
    "causal", [0, UPPER_LEFT, LOWER_RIGHT], ids=["full", "upper_left", "lower_right"]
)


def arguments(
    B: int,
    H: int,
    L: int,
    S: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    Hk: int | None = None,
    Dv: int | None = None,
    mask: tuple[int, ...] | None = None,
    boolean: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Arguments of scaled_dot_product_attention; `scale` is that of query's elements."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = {
        "query": scale * normal(B, H, L, D),
        "key": normal(B, H if Hk is None else Hk, S, D),
        "value": normal(B, H if Hk is None else Hk, S, D if Dv is None else Dv),
    }
    if mask is not None:
        values["attn_mask"] = normal(*mask)
        if boolean:
            values["attn_mask"] = values["attn_mask"] > -0.7  # three of four
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()} | settings


def op(causal: int = 0, **values: Any) -> tuple[Tensor, ...]:
    if causal == LOWER_RIGHT:
        values["attn_mask"] = lower_right(values["query"].size(-2), values["key"].size(-2))
    return attention(**values, is_causal=causal == UPPER_LEFT, return_lse=True)


def lower_right(L: int, S: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about queries without keys, which get zeros
        return causal_lower_right(L, S)


def plain(causal: int = 0, **values: Any) -> tuple[Tensor, Tensor]:
    scores, mask = scores_of(causal, **values)
    output = F.scaled_dot_product_attention(**values | {"attn_mask": mask})
    return output, logsumexp_of(scores).expand(output.shape[:-1])


def exact(causal: int = 0, **values: Any) -> tuple[Tensor, Tensor]:
    """In float64, with products that ExactSums knows; PyTorch rounds query and key to scale them,
    as the reference of its error must not."""
    scores, _ = scores_of(causal, **values)
    is_empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(is_empty, 0).softmax(-1).masked_fill(is_empty, 0)
    value, H = values["value"], values["query"].size(-3) if values.get("enable_gqa") else 1
    output = weights @ (value.repeat_interleave(H // value.size(-3), -3) if H > 1 else value)
    return output, logsumexp_of(scores).expand(output.shape[:-1])


def in_float64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))


class InLongDouble(torch.autograd.Function):
    """softmax(capped(factor * query @ key.mT) + mask) @ value, and the logsumexp. In float64, the
    scores of a reference would be rounded as PyTorch's own are, and its error would not be seen."""

    @staticmethod
    def forward(ctx, query, key, value, mask, factor, softcap=0.0):
        q, k, v, m = (t.detach().numpy().astype(np.longdouble) for t in (query, key, value, mask))
        scores, slope = np.longdouble(factor) * (q @ k.swapaxes(-1, -2)), np.longdouble(1)
        if softcap:
            capped = np.tanh(scores / np.longdouble(softcap))
            scores, slope = softcap * capped, 1 - capped**2
        scores = scores + m
        is_empty = np.all(scores == -np.inf, -1, keepdims=True)
        most = np.where(is_empty, 0, scores.max(-1, keepdims=True, initial=-np.inf))
        exponentials = np.exp(scores - most)
        total = exponentials.sum(-1, keepdims=True)
        weights = exponentials / np.where(is_empty, 1, total)
        with np.errstate(divide="ignore"):
            logsumexp = (most + np.log(total))[..., 0]
        ctx.arrays = q, k, v, weights, factor * slope
        return in_float64(weights @ v), in_float64(logsumexp)

    @staticmethod
    def backward(ctx, *gradients):
        q, k, v, weights, slope = ctx.arrays
        grad_output, grad_logsumexp = (g.numpy().astype(np.longdouble) for g in gradients)
        grad = grad_output @ v.swapaxes(-1, -2)
        grad += grad_logsumexp[..., None] - (weights * grad).sum(-1, keepdims=True)
        grad = weights * grad
        of_products = slope * grad
        products = (
            of_products @ k,
            of_products.swapaxes(-1, -2) @ q,
            weights.swapaxes(-1, -2) @ grad_output,
            grad,
        )
        return *map(in_float64, products), None, None


def exact_float64(causal: int = 0, **values: Any) -> tuple[Tensor, Tensor]:
    query, key, value = (values[name] for name in ("query", "key", "value"))
    _, mask = scores_of(causal, **values)
    if values.get("enable_gqa"):
        repeats = query.size(-3) // key.size(-3)
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    L, S, D = query.size(-2), key.size(-2), query.size(-1)
    if mask is None:
        mask = query.new_zeros(L, S)
    elif mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    leading = torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    tensors = (t.expand(*leading, *t.shape[-2:]) for t in (query, key, value))
    scale = values.get("scale")
    factor = scale if scale is not None else D**-0.5 if D else 1.0
    return InLongDouble.apply(*tensors, mask.expand(*leading, L, S), factor)


def scores_of(
    causal: int, attn_mask: Tensor | None = None, scale: float | None = None, **values: Any
) -> tuple[Tensor, Tensor | None]:
    """The scores, of 16 bits in float32, and the mask with all that hides keys."""
    query, key = values["query"], values["key"]
    (L, D), S = query.shape[-2:], key.size(-2)
    # PyTorch's own asks for two dimensions.
    mask = None if attn_mask is None else torch.atleast_2d(attn_mask)
    if causal:
        triangle = torch.ones(L, S, dtype=torch.bool).tril(S - L if causal == LOWER_RIGHT else 0)
        if mask is None:
            mask = triangle
        elif mask.dtype == torch.bool:
            mask = mask & triangle
        else:
            mask = mask.masked_fill(~triangle, -torch.inf)
    if values.get("enable_gqa"):
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    dtype = reference.sum_dtype(query)
    factor = scale if scale is not None else D**-0.5 if D else 1.0
    scores = factor * (query.to(dtype) @ key.to(dtype).mT)
    if mask is not None and mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf), mask
    return scores if mask is None else scores + mask, mask


def logsumexp_of(scores: Tensor) -> Tensor:
    """Its gradient is NaN where all are -inf, which is taken out here."""
    is_empty = (scores == -torch.inf).all(-1)
    logsumexp = scores.masked_fill(is_empty.unsqueeze(-1), 0).logsumexp(-1)
    return logsumexp.masked_fill(is_empty, -torch.inf)


def check(draw: Callable[[int], dict[str, Any]], draws: int = 3, outputs: Any = OUTPUTS) -> None:
    def some(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def call(**values: Any) -> tuple[Tensor, ...]:
            output, logsumexp = function(**values)
            if outputs == ("logsumexp",):  # so that value has a gradient, of zero in all three
                return (logsumexp + 0 * values["value"].sum(),)
            return (output, logsumexp)[: len(outputs)]

        return call

    values = [draw(seed) for seed in range(draws)]
    reference = exact_float64 if values[0]["query"].dtype == torch.float64 else exact
    assert_op_parity(some(op), some(plain), some(reference), outputs, *values)


def shape_id(value: Any) -> str | None:
    return "-".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.fixture(autouse=True)
def counts_from_zero() -> None:
    genkernels.stats(reset=True)
    torch.manual_seed(0)  # what a test draws does not depend on those before it


@pytest.fixture(params=(*LEVELS, "reference"))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at every SIMD level, asserting that the compiled kernel alone ran, and with the
    reference."""
    if request.param == "reference":
        with genkernels.use_backend("reference"):
            yield request.param
        assert set(genkernels.stats()) == set(REFERENCE)
        return
    if request.param not in backend.simd_levels():
        pytest.skip(f"SIMD level {request.param}: not on this CPU or not in this build")
    with backend.use_simd(request.param):
        yield request.param
    calls = genkernels.stats()
    assert {name for _, name in calls} == {"cpp"}, f"not only the compiled kernel ran: {calls}"


@pytest.mark.usefixtures("poisoned_memory", "kernel", "one_thread")
class TestParity:
    """The one rule, at every SIMD level, in memory full of NaN, in the compiled kernel alone."""

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [(shape, dtype) for shape in SHAPES for dtype in DTYPES[:2]]
        + [(shape, torch.float64) for shape in SHAPES[::3]]
        + [(shape, torch.float16) for shape in SHAPES[1::6]],
        ids=lambda value: shape_id(value) or dtype_id(value),
    )
    def test_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        *sizes, causal = shape
        check(lambda seed: arguments(*sizes, dtype, causal=causal, seed=seed))

    @each_dtype
    @pytest.mark.parametrize(
        ("shape", "causal"),
        [((1, 1, 530, 700, 24), UPPER_LEFT), ((1, 2, 300, 1040, 64), LOWER_RIGHT)],
        ids=["many_queries", "many_keys"],
    )
    def test_long(self, shape: tuple[int, ...], causal: int, dtype: torch.dtype) -> None:
        if dtype == torch.float64:  # whose reference, in long double, is slow
            shape = (1, 1, *shape[2:4], 16)
        for mask in (0, causal):
            check(lambda seed, mask=mask: arguments(*shape, dtype, causal=mask, seed=seed), 1)

    @each_of_four
    @pytest.mark.parametrize("D", HEAD_SIZES)
    def test_head_sizes(self, D: int, dtype: torch.dtype) -> None:
        Dv = HEAD_SIZES[-1 - HEAD_SIZES.index(D)]
        for value_size, causal in ((D, UPPER_LEFT), (Dv, 0)):
            check(
                lambda seed, Dv=value_size, causal=causal: arguments(
                    1, 2, 19, 37, D, dtype, Dv=Dv, causal=causal, seed=seed
                ),
                2,
            )

    @each_kind_of_mask
    @pytest.mark.parametrize(
        "mask",
        [
            (70,), (35, 70), (1, 70), (35, 1), (3, 35, 70), (1, 35, 70), (2, 3, 35, 70),
            (2, 1, 1, 70), (1, 3, 35, 1), (1, 1, 35, 70), (2, 1, 35, 70), (1, 3, 1, 70),
            (2, 3, 1, 1), (1, 1, 1, 1),
        ],
        ids=shape_id,
    )  # fmt: skip
    def test_masks(self, mask: tuple[int, ...], boolean: bool, dtype: torch.dtype) -> None:
        causal = UPPER_LEFT * ((sum(mask) + boolean) % 2)  # each beside every kind of mask
        check(
            lambda seed: arguments(
                2, 3, 35, 70, 16, dtype, mask=mask, boolean=boolean, causal=causal, seed=seed
            ),
            2,
        )

    @each_kind_of_mask
    @pytest.mark.parametrize("mask", [(209, 401), (1, 401), (209, 1)], ids=shape_id)
    def test_masks_of_blocks(
        self, mask: tuple[int, ...], boolean: bool, dtype: torch.dtype
    ) -> None:
        """Of several blocks of queries and of keys, whose last ones are not full."""
        causal = UPPER_LEFT * (mask[0] == 1)
        check(
            lambda seed: arguments(
                1, 2, 209, 401, 8, dtype, mask=mask, boolean=boolean, causal=causal, seed=seed
            ),
            2,
        )

    @each_kind_of_mask
    @pytest.mark.parametrize(
        "layout", ["transposed", "expanded_t", "expanded_b", "offset", "strided", "scalar"]
    )
    def test_mask_strides(self, layout: str, boolean: bool, dtype: torch.dtype) -> None:
        def draw(seed: int) -> dict[str, Any]:
            values = arguments(
                2, 3, 33, 50, 8, dtype, mask=(2, 3, 33, 50), boolean=boolean, seed=seed
            )
            if boolean and layout == "offset":
                larger = torch.ones(4, 5, 40, 60, dtype=torch.bool)[1:3, 2:, 3:36, 5:55]
                return values | {"attn_mask": larger.copy_(values["attn_mask"])}
            return values | {"attn_mask": relaid(values["attn_mask"], layout)}

        check(draw, 2)

    @pytest.mark.parametrize("dtype", FAST_DTYPES[1:], ids=dtype_id)
    def test_float32_mask_beside_16_bits(self, dtype: torch.dtype) -> None:
        for mask in ((2, 3, 35, 70), (1, 3, 1, 70), (35, 70)):
            check(
                lambda seed, mask=mask: (
                    arguments(2, 3, 35, 70, 16, dtype, seed=seed)
                    | {"attn_mask": arguments(1, 1, 1, 1, 1, mask=mask, seed=seed)["attn_mask"]}
                )
            )

    @each_of_four
    @pytest.mark.parametrize("boolean", [False, True], ids=["additive", "boolean"])
    def test_queries_without_keys(self, boolean: bool, dtype: torch.dtype) -> None:
        """Zeros, -inf and no gradients, as PyTorch has it; and no NaN from exp(-inf - -inf)."""

        def draw(seed: int) -> dict[str, Any]:
            values = arguments(2, 3, 35, 70, 16, dtype, mask=(2, 1, 35, 70), seed=seed)
            is_left = values["attn_mask"] > -0.7
            is_left[:, :, 3::7], is_left[1] = False, False
            is_left[0, :, 9] = torch.arange(70) == 66  # one key, far from the first ones
            mask = is_left if boolean else values["attn_mask"].masked_fill(~is_left, -torch.inf)
            return values | {"attn_mask": mask}

        check(draw)
        values = draw(0)
        is_empty = (values["attn_mask"] == (False if boolean else -torch.inf)).all(-1)  # [2, 1, L]
        results = with_gradients(op, values)
        assert not results[0][is_empty.expand(2, 3, 35)].any()
        assert (results[1] == -torch.inf).equal(is_empty.expand(2, 3, 35))
        assert not results[2][is_empty.expand(2, 3, 35)].any()
        assert not any(result.isnan().any() for result in results)
        assert not any(result[1].any() for result in (results[0], *results[2:]))

    @each_dtype
    @each_causal
    @pytest.mark.parametrize(("H", "Hk"), [(6, 2), (6, 3), (5, 1)], ids=str)
    def test_shared_heads(self, H: int, Hk: int, causal: int, dtype: torch.dtype) -> None:
        check(
            lambda seed: arguments(
                2, H, 35, 40, 16, dtype, Hk=Hk, Dv=24, causal=causal, enable_gqa=True, seed=seed
            ),
            2,
        )

    @each_of_four
    def test_shared_heads_and_masks(self, dtype: torch.dtype) -> None:
        for mask in ((6, 35, 40), (2, 1, 35, 40), (2, 6, 1, 40)):
            check(
                lambda seed, mask=mask: arguments(
                    2, 6, 35, 40, 16, dtype, Hk=2, mask=mask, enable_gqa=True, seed=seed
                ),
                2,
            )

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    def test_heads_of_key_and_value_differ(self, dtype: torch.dtype) -> None:
        def draw(seed: int) -> dict[str, Any]:
            values = arguments(2, 6, 9, 20, 8, dtype, Hk=2, enable_gqa=True, seed=seed)
            return values | {"value": arguments(2, 3, 9, 20, 8, dtype, seed=seed + 9)["value"]}

        check(draw)

    @each_dtype
    @pytest.mark.parametrize(
        "layout",
        ["transposed", "expanded_t", "expanded_b", "offset", "strided", "scalar", "heads_last"],
    )
    def test_strides(self, layout: str, dtype: torch.dtype) -> None:
        def draw(seed: int) -> dict[str, Any]:
            values = arguments(2, 3, 20, 37, 24, dtype, causal=seed % 2, seed=seed)
            for name in TENSORS:
                if layout == "heads_last":  # [B, L, H, D] in memory
                    values[name] = values[name].transpose(1, 2).contiguous().transpose(1, 2)
                else:
                    values[name] = relaid(values[name], layout)
            return values

        check(draw)

    @each_of_four
    @pytest.mark.parametrize("Hk", [4, 2])
    def test_packed(self, Hk: int, dtype: torch.dtype) -> None:
        """query, key and value as one projection gives them, and the gradient of that."""
        B, L, H, D = 2, 37, 4, 16

        def split(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(packed: Tensor) -> tuple[Tensor, ...]:
                heads = packed.unflatten(-1, (H + 2 * Hk, D)).transpose(1, 2)
                query, key, value = heads.split([H, Hk, Hk], 1)
                both = function(
                    query=query, key=key, value=value, causal=UPPER_LEFT, enable_gqa=True
                )
                return both[0].transpose(1, 2).flatten(2), both[1]

            return call

        draws = [{"packed": torch.randn(B, L, (H + 2 * Hk) * D).to(dtype)} for _ in range(3)]
        assert_op_parity(split(op), split(plain), split(exact), OUTPUTS, *draws)

    @each_dtype
    @pytest.mark.parametrize(
        ("query", "key", "value", "mask"),
        [
            ((5, 8), (6, 8), (6, 7), (5, 6)),
            ((3, 5, 8), (3, 6, 8), (3, 6, 8), (3, 5, 6)),
            ((3, 5, 8), (6, 8), (1, 6, 7), (1, 6)),
            ((2, 3, 5, 8), (6, 8), (2, 1, 6, 7), None),
            ((5, 8), (2, 3, 6, 8), (2, 3, 6, 8), (2, 1, 1, 6)),
            ((2, 3, 5, 8), (1, 1, 6, 8), (1, 1, 6, 8), (3, 1, 1)),
            ((2, 1, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8), None),
            ((3, 2, 4, 5, 8), (3, 1, 4, 6, 8), (2, 4, 6, 8), (2, 1, 5, 6)),
            ((3, 2, 4, 5, 8), (3, 2, 1, 6, 8), (3, 2, 1, 6, 8), (3, 1, 1, 5, 1)),
            ((1, 2, 2, 3, 5, 8), (1, 2, 1, 3, 6, 8), (3, 6, 8), (1, 1, 1, 3, 1, 6)),
            ((0, 3, 5, 8), (0, 3, 6, 8), (0, 3, 6, 8), None),
            ((2, 0, 5, 8), (2, 0, 6, 8), (2, 0, 6, 8), None),
            ((2, 3, 5, 0), (2, 3, 6, 0), (2, 3, 6, 8), None),
            ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 0), (5, 6)),
        ],
        ids=shape_id,
    )
    def test_leading_dimensions(
        self, query: Any, key: Any, value: Any, mask: Any, dtype: torch.dtype
    ) -> None:
        def draw(seed: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(seed)
            shapes = {"query": query, "key": key, "value": value, "attn_mask": mask}
            return {
                name: torch.randn(shape, generator=generator).to(dtype)
                for name, shape in shapes.items()
                if shape is not None
            } | {"scale": 0.4}

        check(draw)

    @pytest.mark.parametrize(
        ("L", "dtype"),
        [
            *itertools.product((1, 2, 3, 4), DTYPES[:2]),
            *((1, torch.float64), (3, torch.float64), (2, torch.float16), (4, torch.float16)),
        ],
        ids=lambda value: str(value) if isinstance(value, int) else dtype_id(value),
    )
    def test_few_queries(self, L: int, dtype: torch.dtype) -> None:
        """Decoding: the last queries of a sequence whose keys and values are kept."""
        for S, H, Hk, D in ((5, 2, 2, 16), (64, 8, 2, 32), (257, 3, 1, 128), (1025, 4, 2, 64)):
            check(
                lambda seed, S=S, H=H, Hk=Hk, D=D: arguments(
                    2, H, L, S, D, dtype, Hk=Hk, causal=LOWER_RIGHT, enable_gqa=True, seed=seed
                ),
                1 if S > 100 else 2,
            )
        for boolean in (False, True):
            check(
                lambda seed, boolean=boolean: arguments(
                    2, 3, L, 519, 40, dtype, mask=(2, 1, 1, 519), boolean=boolean, seed=seed
                ),
                3,
            )

    @each_dtype
    @pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
    def test_scale(self, scale: float, dtype: torch.dtype) -> None:
        check(
            lambda seed: (
                arguments(1, 2, 35, 40, 16, dtype, mask=(35, 40), seed=seed) | {"scale": scale}
            )
        )

    @each_dtype
    @pytest.mark.parametrize("scale", [-0.7, 0.0])
    def test_hidden_keys_beside_any_scale(self, scale: float, dtype: torch.dtype) -> None:
        check(
            lambda seed: (
                arguments(1, 2, 35, 40, 16, dtype, causal=UPPER_LEFT, seed=seed) | {"scale": scale}
            )
        )

    @each_dtype
    @pytest.mark.parametrize("L", [3, 35])
    @pytest.mark.parametrize("ends", [(0.05, 3.0), (3.0, 0.05)], ids=["growing", "falling"])
    def test_order_of_scores(self, ends: tuple[float, float], L: int, dtype: torch.dtype) -> None:
        """What was added up follows a maximum that later keys exceed, in a tile or a block."""

        def draw(seed: int) -> dict[str, Any]:
            values = arguments(1, 2, L, 600, 16, dtype, seed=seed)
            return values | {"key": values["key"] * torch.linspace(*ends, 600)[:, None].to(dtype)}

        check(draw, 2)

    @each_dtype
    @pytest.mark.parametrize("L", [3, 35])
    @pytest.mark.parametrize("boolean", [False, True], ids=["additive", "boolean"])
    def test_huge_scores(
        self, kernel: str, boolean: bool, L: int, dtype: torch.dtype, request: pytest.FixtureRequest
    ) -> None:
        """Of 1e4 and more, in pairs about 1 apart, so that no row is a single one."""
        if kernel == "baseline" and boolean and L == 35 and dtype != torch.bfloat16:
            reason = "without a fused multiply-add scores err by 3 times PyTorch's error, not 2"
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=False))

        def draw(seed: int) -> dict[str, Any]:
            values = arguments(
                1, 2, L, 70, 16, dtype, mask=(L, 70), boolean=boolean, scale=1e4, seed=seed
            )
            generator = torch.Generator().manual_seed(seed)
            apart = 1e-4 * torch.randn(2, 35, 1, generator=generator)
            near = values["key"][:, :, :35] * (1 + apart)
            values["key"][:, :, 35:] = near.to(dtype)
            return values

        check(draw, 16)
        assert all(result.isfinite().all() for result in with_gradients(op, draw(0)))

    @pytest.mark.parametrize("dtype", FAST_DTYPES, ids=dtype_id)
    def test_large_negative_mask(self, dtype: torch.dtype) -> None:
        """What stands for -inf in many programs; a row of nothing else is no empty one."""

        def draw(seed: int) -> dict[str, Any]:
            values = arguments(2, 3, 35, 70, 16, dtype, mask=(2, 1, 35, 70), seed=seed)
            mask = torch.where(values["attn_mask"] > 0, 0, torch.finfo(dtype).min)
            mask[:, :, 5] = max(-1e9, torch.finfo(dtype).min)
            mask[:, :, 6] = torch.finfo(dtype).min
            return values | {"attn_mask": mask.to(dtype)}

        # Of a row of -1e9 the scores themselves are rounded away.
        check(draw, outputs=("output",))

    @each_of_four
    @pytest.mark.parametrize("L", [2, 35])
    @pytest.mark.parametrize("value", [-1e9, -1e4, -40.0])
    def test_padding_on_the_left(self, value: float, L: int, dtype: torch.dtype) -> None:
        """The first keys, more than a tile of them, are far below those that count."""

        def draw(seed: int) -> dict[str, Any]:
            values = arguments(1, 2, L, 260, 16, dtype, mask=(260,), seed=seed)
            mask = torch.where(torch.arange(260) < 200, value, 0.0)
            return values | {"attn_mask": mask.to(dtype)}

        check(draw, 2)

    @pytest.mark.parametrize("dtype", FAST_DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("place", [*TENSORS, "attn_mask"])
    def test_special_values_spread(self, place: str, value: float, dtype: torch.dtype) -> None:
        """As on PyTorch's math path; the sum of exponentials with Inf among them is NaN here."""
        values = arguments(2, 3, 35, 70, 16, dtype, mask=(2, 3, 35, 70))
        values[place][1, 2, 20, 5] = value

        def outputs(function: Callable[..., Any]) -> list[Tensor]:
            results = with_gradients(lambda **v: function(**v)[:1], values)
            return [result.isfinite() for result in results]

        def math_path(**values: Any) -> tuple[Tensor, ...]:
            with sdpa_kernel(SDPBackend.MATH):
                return (F.scaled_dot_product_attention(**values),)

        assert_bitwise_equal(outputs(op), outputs(math_path))
        double = {name: tensor.double() for name, tensor in values.items()}
        actual, expected = (f(**values)[0] for f in (op, math_path))
        assert_parity("output", actual, expected, math_path(**double)[0])
        if (place, value) != ("attn_mask", float("-inf")):
            assert not actual.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("causal", [0, UPPER_LEFT], ids=["full", "causal"])
    def test_one_head_s_nan_is_its_own(self, causal: int, dtype: torch.dtype) -> None:
        values = arguments(2, 3, 70, 70, 16, dtype)
        clean = op(causal, **values)[0]
        values["key"][1, 2, 0, 3] = float("nan")  # which every query sees
        output = op(causal, **values)[0]
        assert output[1, 2].isnan().all()
        is_other = torch.ones(2, 3, dtype=torch.bool)
        is_other[1, 2] = False
        assert torch.equal(output[is_other], clean[is_other])

    @each_dtype
    @pytest.mark.parametrize("name", OUTPUTS)
    def test_gradient_of_one_output(self, name: str, dtype: torch.dtype) -> None:
        for mask in (None, (35, 40)):
            check(
                lambda seed, mask=mask: arguments(
                    2, 3, 35, 40, 16, dtype, mask=mask, causal=seed % 2, seed=seed
                ),
                outputs=(name,),
            )

    @each_dtype
    def test_expanded_cotangent(self, dtype: torch.dtype) -> None:
        """As sum() makes it."""

        def total(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda **values: (function(**values)[0].sum(),)

        draws = [arguments(2, 3, 35, 40, 16, dtype, seed=seed) for seed in range(16)]
        assert_op_parity(total(op), total(plain), total(exact), ("sum",), *draws)


@pytest.mark.usefixtures("poisoned_memory", "simd", "one_thread", "compiled_only")
class TestFloat16:
    """Its conversions, of few queries and of more."""

    every = torch.arange(2**16).to(torch.int16).view(torch.float16)

    @staticmethod
    def of_one_key(grad_output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The output, which is the value, and the value's gradient, the sum of those of L queries:
        grad_output is [L, Dv], value [Dv]."""
        query, key = (torch.zeros(1, 1, len(t), 8, dtype=torch.float16) for t in (grad_output, [0]))
        value = value.clone().view(1, 1, 1, -1).requires_grad_()
        output = attention(query, key, value)
        (gradient,) = torch.autograd.grad(output, value, grad_output.view(output.shape))
        return output[0, 0], gradient.flatten()

    @pytest.mark.parametrize("L", [1, 9])
    def test_there_and_back(self, L: int) -> None:
        """Each of its numbers comes out as it went in; any NaN as a NaN."""
        grads = torch.zeros(L, 2**16, dtype=torch.float16)
        grads[L // 2] = self.every
        output, gradient = self.of_one_key(grads, self.every)
        for row in (*output, gradient):
            torch.testing.assert_close(row, self.every, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("L", [4, 9])
    def test_rounds_to_nearest(self, L: int) -> None:
        """Sums that float32 holds exactly: halfway between neighbours, up to the first infinity,
        and just beside that."""
        x = self.every[self.every.isfinite()].float()
        half_unit = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent.clamp(min=-13) - 12)
        for part in (0.0, 0.5, -0.5):
            grads = torch.zeros(L, len(x))
            grads[0], grads[1], grads[L - 1] = x, half_unit, part * half_unit
            is_there = (grads == grads.half()).all(0)  # half of the least number is not
            grads, expected = grads[:, is_there], grads.double().sum(0).half()[is_there]
            assert len(expected) > 55000
            _, gradient = self.of_one_key(grads.half(), torch.zeros(len(expected)).half())
            assert torch.equal(gradient, expected)

    @pytest.mark.parametrize("L", [1, 9])
    def test_halves_of_subnormal_numbers(self, L: int) -> None:
        """The mean of two neighbours is halfway between them: of numbers below 2^-14, too."""
        low, high = self.every[:0x7BFF], self.every[1:0x7C00]
        value = torch.stack([torch.cat([low, -low]), torch.cat([high, -high])]).view(1, 1, 2, -1)
        query, key = (torch.zeros(1, 1, n, 8, dtype=torch.float16) for n in (L, 2))
        output = attention(query, key, value)[0, 0]
        for row in output:
            assert torch.equal(row, value[0, 0].double().mean(0).half())

    @pytest.mark.parametrize("L", [2, 12])
    def test_scores_and_probabilities_are_in_float32(self, L: int) -> None:
        """Probabilities of 3e-5 have few digits in it, and scores of 1e5 are beyond its largest
        number."""
        for factor, S in ((0.01, 30000), (10.0, 600)):
            check(
                lambda seed, factor=factor, S=S: (
                    arguments(1, 2, L, S, 16, torch.float16, scale=300 * factor, seed=seed)
                    | {"scale": factor}
                ),
                2,
            )


def dropped(seed: Tensor, dropout_p: float, **values: Any) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, with the factors of the reference."""
    query, key, value = (values[name] for name in TENSORS)
    dtype = reference.sum_dtype(query)
    (B, H, L, D), S = query.shape, key.size(2)
    if key.size(1) != H:
        key, value = (t.repeat_interleave(H // t.size(1), 1) for t in (key, value))
    scores = query.to(dtype) @ key.to(dtype).mT * D**-0.5
    if "attn_mask" in values:
        scores = scores + values["attn_mask"]
    if values.get("causal"):
        scores = scores.masked_fill(~torch.ones(L, S).tril().bool(), -torch.inf)
    factors = reference.dropout_factors(seed, dropout_p, dtype, (0, B * H), (0, L), S)
    weights = scores.softmax(-1) * factors.view(B, H, L, S)
    # As PyTorch's own, which rounds what it multiplies.
    weights = weights.to(query.dtype).to(dtype)
    return (weights @ value.to(dtype)).to(query.dtype), scores.logsumexp(-1)


class TestDropout:
    @pytest.mark.usefixtures("poisoned_memory", "kernel", "one_thread")
    @each_of_four
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"causal": UPPER_LEFT},
            {"mask": (2, 1, 35, 150)},
            {"Hk": 2, "enable_gqa": True},
            {"L": 1},
            {"L": 3, "S": 700},
            {"S": 17, "L": 130, "causal": UPPER_LEFT},
        ],
        ids=lambda options: "-".join(options) or "plain",
    )
    def test_parity(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        """What is dropped is what the reference drops, forward and backward."""
        dropout_p = 0.5 if "mask" in options or "S" in options else 0.1
        options = {"L": 35, "S": 150} | options
        draws = [
            arguments(2, 4, options["L"], options["S"], 16, dtype, seed=seed)
            | {"number": seed}
            | {k: v for k, v in options.items() if k in ("causal", "enable_gqa")}
            for seed in range(2)
        ]
        for index, draw in enumerate(draws):
            if "Hk" in options:
                for name in TENSORS[1:]:
                    draw[name] = draw[name][:, : options["Hk"]]
            if "mask" in options:
                draw |= {"attn_mask": arguments(1, 1, 1, 1, 1, dtype, mask=options["mask"],
                                                seed=index)["attn_mask"]}  # fmt: skip

        def ours(number: int, **values: Any) -> tuple[Tensor, ...]:
            torch.manual_seed(number)
            return op(**values, dropout_p=dropout_p)

        def theirs(number: int, **values: Any) -> tuple[Tensor, ...]:
            torch.manual_seed(number)
            seed = torch.randint(-(2**63), 2**63 - 1, (1,))
            return dropped(seed, dropout_p, **values)

        assert_op_parity(ours, theirs, theirs, OUTPUTS, *draws)

    @pytest.mark.usefixtures("kernel")
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_all_are_dropped(self, dtype: torch.dtype) -> None:
        values = arguments(2, 3, 20, 30, 8, dtype)
        output, logsumexp, *gradients = with_gradients(
            lambda **v: op(**v, dropout_p=1.0), {**values}
        )
        assert not output.any()
        torch.testing.assert_close(logsumexp, plain(**values)[1])
        assert not gradients[2].any()
        assert all(gradient.isfinite().all() for gradient in gradients)

    @each_dtype
    @pytest.mark.parametrize("L", [3, 35])
    def test_none_is_dropped(self, kernel: str, L: int, dtype: torch.dtype) -> None:
        """None of the 32-bit numbers is below 1e-12 * 2^32. Nor is anything scaled, except by the
        reference, where float64 shows it."""
        values = arguments(2, 3, L, 70, 8, dtype)
        actual = with_gradients(lambda **v: op(**v, dropout_p=1e-12), values)
        expected = with_gradients(op, values)
        if kernel == "reference" and dtype == torch.float64:
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        else:
            assert_bitwise_equal(actual, expected)

    @pytest.mark.usefixtures("kernel")
    @pytest.mark.parametrize("dropout_p", [0.1, 0.25, 0.8])
    def test_rate_and_mean(self, dropout_p: float) -> None:
        """Each weight is kept with probability 1 - dropout_p, whatever its place; and outputs are
        right in the mean."""
        torch.manual_seed(0)
        B, H, L, S = 2, 4, 128, 192
        values = {"query": torch.zeros(B, H, L, 4), "key": torch.zeros(B, H, S, 4)}
        values["value"] = torch.eye(S).expand(B, H, S, S)
        kept = attention(**values, dropout_p=dropout_p) * S * (1 - dropout_p)  # [B, H, L, S]
        is_kept = kept > 0.5
        torch.testing.assert_close(kept, is_kept.float())
        for dims in ((), (2, 3), (0, 1, 2), (0, 1, 3)):
            rates = is_kept.double().mean(dims or None)
            deviation = (dropout_p * (1 - dropout_p) * rates.numel() / kept.numel()) ** 0.5
            assert (rates - (1 - dropout_p)).abs().max() < 5.5 * deviation
        for shift, dim in itertools.product((1, 16, 32, 64), (2, 3)):  # neighbours are independent
            both = (is_kept & is_kept.roll(shift, dim)).double().mean()
            assert abs(both - (1 - dropout_p) ** 2) < 6 / kept.numel() ** 0.5
        noise = (
            sum(attention(**values, dropout_p=dropout_p).mean((0, 1, 2)) for _ in range(20)) / 20
            - 1 / S
        )
        assert noise.abs().max() < 6 / S * (dropout_p / (1 - dropout_p) / (20 * B * H * L)) ** 0.5

    @pytest.mark.usefixtures("kernel")
    def test_reproducible(self) -> None:
        values = arguments(2, 3, 35, 70, 16)

        def results() -> list[Tensor]:
            return with_gradients(lambda **v: op(**v, dropout_p=0.3), values)

        torch.manual_seed(5)
        first, second = results(), results()
        assert not torch.equal(first[0], second[0])
        torch.manual_seed(5)
        assert_bitwise_equal(results(), first)
        assert_bitwise_equal(results(), second)

    @pytest.mark.usefixtures("kernel")
    def test_no_dropout_draws_no_numbers(self) -> None:
        state = torch.get_rng_state()
        attention(**arguments(1, 2, 3, 4, 5), dropout_p=0.0)
        assert torch.equal(torch.get_rng_state(), state)

    def test_which_number_of_which_counter(self) -> None:
        seed, S = torch.tensor([0x123456789ABCDEF]), 150
        every = reference.dropout_factors(seed, 0.4, torch.float64, (0, 6), (0, 5), S)
        some = reference.dropout_factors(seed, 0.4, torch.float64, (2, 5), (1, 4), 70)
        assert torch.equal(some, every[2:5, 1:4, :70])
        for head, i, j in itertools.product((0, 5), (0, 4), (0, 15, 16, 31, 63, 64, 70, 112, 149)):
            counter = (j // 64 * 16 + j % 16, i, head, 0)
            numbers = philox(seed, tuple(torch.tensor([c]) for c in counter))
            is_kept = int(numbers[j // 16 % 4]) >= int(0.4 * 2**32)
            assert every[head, i, j] == (1 / 0.6 if is_kept else 0)


@pytest.mark.usefixtures("simd", "two_threads")
class TestReproducible:
    @each_of_four
    @pytest.mark.parametrize(
        "options",
        [
            {"shape": (2, 3, 130, 200, 40)},
            {"shape": (1, 1, 700, 700, 64), "causal": UPPER_LEFT},
            {"shape": (1, 2, 64, 71, 64), "causal": LOWER_RIGHT},
            {"shape": (2, 4, 65, 129, 33), "mask": (1, 4, 1, 129), "dropout_p": 0.2},
            {"shape": (1, 8, 1, 1500, 64), "Hk": 2, "enable_gqa": True},
        ],
        ids=["full", "causal", "lower_right", "mask_dropout", "decoding"],
    )
    def test_bitwise(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        """From run to run, and with one thread as with two."""
        options = dict(options)
        values = arguments(*options.pop("shape"), dtype, **options)

        def results() -> list[Tensor]:
            torch.manual_seed(0)
            return with_gradients(op, values)

        first = results()
        for _ in range(3):
            assert_bitwise_equal(results(), first)
        torch.set_num_threads(1)
        assert_bitwise_equal(results(), first)


@pytest.mark.usefixtures("two_threads")
def test_fifty_runs() -> None:
    values = arguments(2, 4, 150, 150, 32, mask=(1, 4, 1, 150), causal=UPPER_LEFT)
    first = with_gradients(op, values)
    for _ in range(50):
        assert_bitwise_equal(with_gradients(op, values), first)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": UPPER_LEFT},
    "lower_right": {"causal": LOWER_RIGHT},
    "bool": {"mask": (2, 1, 3, 4), "boolean": True},
    "bias": {"mask": (2, 2, 3, 4)},
    "shared_bias": {"mask": (2, 1, 4), "causal": UPPER_LEFT},
    "gqa": {"Hk": 1, "enable_gqa": True},
    "dropout": {"dropout_p": 0.4, "mask": (1, 4)},
}
each_case = pytest.mark.parametrize("case", CASES)


def leaves_of(case: str, dtype: torch.dtype = torch.float64) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of all floating-point tensors of a case, and those."""
    values = arguments(2, 2, 3, 4, 2, dtype, Dv=3, **CASES[case])
    names = [k for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return op(**values | dict(zip(names, tensors, strict=True)))

    return function, tuple(values[name].requires_grad_() for name in names)


class TestGradients:
    @each_case
    def test_gradcheck(self, case: str) -> None:
        function, leaves = leaves_of(case)
        assert torch.autograd.gradcheck(function, leaves, check_batched_grad=case != "dropout")
        assert "attention_backward" in {op for op, _ in genkernels.stats()}

    @each_case
    def test_gradgradcheck(self, case: str) -> None:
        assert torch.autograd.gradgradcheck(*leaves_of(case))

    @each_case
    @pytest.mark.parametrize(
        ("ran", "block"),
        [("cpp", 0), *itertools.product(("reference", "recorded"), (1, 7, 2**18))],
    )
    def test_double_backward(
        self, ran: str, block: int, case: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel and the closed form against what autograd makes of the definition, to 1e-12;
        the latter in blocks of several heads, of one, and of rows, and differentiable."""
        monkeypatch.setattr(reference, "BLOCK", block)
        if ran == "reference":
            slow = functools.partial(backend.count, "attention_double_backward", "reference")
            monkeypatch.setattr(
                module,
                "_attention_double_backward",
                lambda *args: (slow(), module._reference_double_backward(*args))[1],
            )
        function, leaves = leaves_of(case)

        def second() -> tuple[Tensor, ...]:
            outputs = function(*leaves)
            loss = sum(output.square().sum() for output in outputs if output.isfinite().all())
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            loss = sum(gradient.sin().sum() for gradient in gradients)
            return torch.autograd.grad(loss, leaves, create_graph=ran == "recorded")

        actual = second()
        counted = "cpp" if ran == "cpp" else "reference"
        assert genkernels.stats()["attention_double_backward", counted] >= 1
        assert ("attention_double_backward", "cpp") not in genkernels.stats() or ran == "cpp"
        with genkernels.use_backend("reference"):
            expected = second()
        for got, exact in zip(actual, expected, strict=True):
            assert exact.abs().max() > 1e-3
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("cotangents", list(itertools.product((False, True), repeat=4))[1:])
    def test_double_backward_of_some(self, cotangents: tuple[bool, ...]) -> None:
        function, leaves = leaves_of("shared_bias")
        results = []
        for backend_name in ("cpp", "reference"):
            with genkernels.use_backend(backend_name):
                output = function(*leaves)[0].pow(2).sum()
                gradients = torch.autograd.grad(output, leaves, create_graph=True)
                loss = sum(
                    gradient.pow(3).sum()
                    for gradient, is_used in zip(gradients, cotangents, strict=True)
                    if is_used
                )
                results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for got, exact in zip(*results, strict=True):
            exact = torch.zeros_like(got) if exact is None else exact
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("case", ["lower_right", "shared_bias", "dropout"])
    def test_third_derivative(self, case: str) -> None:
        function, leaves = leaves_of(case)

        def third() -> tuple[Tensor, ...]:
            loss = function(*leaves)[0].pow(3).sum()
            for _ in range(2):
                gradients = torch.autograd.grad(loss, leaves, create_graph=True)
                loss = sum((g.sin().sum() for g in gradients), loss.new_zeros(()))
            return torch.autograd.grad(loss, leaves)

        actual = third()
        with genkernels.use_backend("reference"):
            expected = third()
        for got, exact in zip(actual, expected, strict=True):
            assert exact.abs().max() > 1e-3
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_second_derivative_of_empty_rows(self, dtype: torch.dtype) -> None:
        values = arguments(1, 2, 5, 3, 4, dtype, causal=LOWER_RIGHT)
        leaves = [values[name].requires_grad_() for name in TENSORS]
        output, _ = op(**values)
        gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        assert all(g.dtype == dtype and g.isfinite().all() for g in second)
        assert not second[0][:, :, :2].any()

    @pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4))[1:], ids=str)
    def test_only_what_is_asked_for(self, needs: tuple[bool, ...]) -> None:
        values = arguments(2, 3, 20, 30, 8, mask=(20, 30))
        results = []
        for function in (op, plain):
            leaves = [
                v.detach().requires_grad_()
                for v, n in zip(values.values(), needs, strict=True)
                if n
            ]
            found = iter(leaves)
            given = {
                name: next(found) if needed else value
                for (name, value), needed in zip(values.items(), needs, strict=True)
            }
            results.append(torch.autograd.grad(function(**given)[0].sum(), leaves))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_batched_gradients(self) -> None:
        values = arguments(2, 3, 20, 30, 8)
        leaves = [values[name].requires_grad_() for name in TENSORS]
        cotangents = torch.randn(3, 2, 3, 20, 8)
        actual, expected = (
            torch.autograd.grad(function(**values)[0], leaves, cotangents, is_grads_batched=True)
            for function in (op, plain)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_checkpoint(self, dropout_p: float) -> None:
        values = arguments(2, 3, 20, 30, 8)
        leaves = [values[name].requires_grad_() for name in TENSORS]
        function = functools.partial(attention, dropout_p=dropout_p)
        torch.manual_seed(0)
        output = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
        gradients = torch.autograd.grad(output.sum(), leaves)
        torch.manual_seed(0)
        assert_bitwise_equal(
            list(torch.autograd.grad(function(*leaves).sum(), leaves)), list(gradients)
        )

    def test_gradient_of_an_expanded_key_is_a_sum(self) -> None:
        values = arguments(2, 3, 20, 30, 8)
        leaf = values["key"][:1, :1].clone().requires_grad_()
        outcomes = []
        for function in (op, plain):
            output, _ = function(**values | {"key": leaf.expand(2, 3, 30, 8)})
            outcomes.append(torch.autograd.grad(output.square().sum(), leaf)[0])
        torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)

    def test_nothing_as_large_as_the_output_is_filled(self) -> None:
        values = arguments(2, 3, 40, 40, 16)
        leaves = [values[name].requires_grad_() for name in TENSORS]
        output = attention(**values)
        with torch.profiler.profile() as profile:
            torch.autograd.grad(output, leaves, torch.ones_like(output))
        assert not {"aten::zeros", "aten::zero_"} & {event.key for event in profile.key_averages()}

    def test_saves_no_scores(self) -> None:
        values = arguments(2, 3, 40, 50, 4, mask=(2, 1, 1, 50), causal=UPPER_LEFT, dropout_p=0.1)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        for name in (*TENSORS, "attn_mask"):
            values[name].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op(**values)
        assert max(kept.values()) <= 2 * 3 * 50 * 4


# Options of a double backward: two blocks of queries and two of keys, but for the last ones.
DOUBLE: dict[str, dict[str, Any]] = {
    "plain": {"Dv": 24},
    "causal": {"causal": UPPER_LEFT},
    "lower_right": {"causal": LOWER_RIGHT, "S": 70},
    "bool": {"mask": (2, 1, 150, 200), "boolean": True, "causal": UPPER_LEFT},
    "bias": {"mask": (2, 2, 150, 200), "causal": UPPER_LEFT},
    "bias_of_keys": {"mask": (1, 2, 1, 200)},
    "bias_of_queries": {"mask": (2, 1, 150, 1)},
    "gqa": {"Hk": 1, "enable_gqa": True, "D": 33},
    "dropout": {"dropout_p": 0.3, "causal": UPPER_LEFT},
    "small": {"L": 3, "S": 5, "D": 64},
    "two_keys": {"L": 9, "S": 2},
}


def some_of_four(*counts: int) -> list[tuple[bool, ...]]:
    """All choices of so many."""
    return [some for some in itertools.product((False, True), repeat=4) if sum(some) in counts]


def first_order(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of a function, as a function of their cotangents too."""

    def call(
        grad_output: Tensor, grad_logsumexp: Tensor, number: int, **values: Any
    ) -> tuple[Tensor, ...]:
        torch.manual_seed(number)
        leaves = [v for v in values.values() if isinstance(v, Tensor) and v.is_floating_point()]
        outputs = function(**values)
        grads = (grad_output, grad_logsumexp.to(outputs[1].dtype))
        return torch.autograd.grad(outputs, leaves, grads, create_graph=True)

    return call


def math_path(**values: Any) -> tuple[Tensor, Tensor]:
    if values.get("dropout_p"):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        return dropped(seed, **values)
    with sdpa_kernel(SDPBackend.MATH):
        return plain(**values)


def exact_path(**values: Any) -> tuple[Tensor, Tensor]:
    return math_path(**values) if values.get("dropout_p") else exact(**values)


@pytest.mark.usefixtures("simd", "poisoned_memory", "two_threads", "compiled_only")
class TestDoubleBackward:
    @pytest.mark.parametrize(
        ("dtype", "case"),
        [
            *((torch.float32, case) for case in DOUBLE),
            *((torch.bfloat16, case) for case in ("plain", "bias", "gqa", "dropout", "small")),
            *((torch.float16, case) for case in ("bias", "gqa")),
        ],
        ids=lambda value: value if isinstance(value, str) else dtype_id(value),
    )
    def test_parity(self, case: str, dtype: torch.dtype) -> None:
        """Of the gradients of both cotangents and of all arguments."""
        options = {"L": 150, "S": 200, "D": 16, **DOUBLE[case]}
        sizes = [options.pop(name) for name in "LSD"]

        def draw(seed: int) -> dict[str, Any]:
            values = arguments(2, 2, *sizes, dtype, **options, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            shape = (2, 2, sizes[0], values["value"].size(-1))
            given = torch.randn(shape, generator=generator).to(dtype)
            given_lse = torch.randn(shape[:3], generator=generator)
            return {"grad_output": given, "grad_logsumexp": given_lse, "number": seed} | values

        names = [f"first order {name}" for name in (*TENSORS, "attn_mask")]
        assert_op_parity(
            first_order(op),
            first_order(math_path),
            first_order(exact_path),
            names[: 4 if "mask" in options and not options.get("boolean") else 3],
            draw(0),
            draw(1),
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("case", ["causal", "bias_of_keys", "dropout"])
    def test_bitwise(self, case: str, dtype: torch.dtype) -> None:
        """From run to run, and with one thread as with two, of which one head is left over."""
        values = arguments(1, 3, 150, 200, 8, dtype, **DOUBLE[case] | {"mask": (1, 3, 1, 200)})
        grads = {
            "grad_output": torch.randn(1, 3, 150, 8).to(dtype),
            "grad_logsumexp": torch.randn(1, 3, 150),
        }

        def results() -> list[Tensor]:
            return with_gradients(first_order(op), {**grads, "number": 0, **values})

        first = results()
        assert_bitwise_equal(results(), first)
        torch.set_num_threads(1)
        assert_bitwise_equal(results(), first)

    @pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided", "scalar"])
    def test_strides(self, layout: str) -> None:
        """Of the cotangents and of all arguments."""
        call = raw_calls("bias", torch.float32)[-2][1]
        laid = [relaid(v, layout) if isinstance(v, Tensor) else v for v in call]
        packed = [v.contiguous() if isinstance(v, Tensor) else v for v in laid]
        assert_bitwise_equal(raw_double_backward(*laid), raw_double_backward(*packed))

    @pytest.mark.parametrize("needs", some_of_four(0, 1, 3), ids=str)
    @pytest.mark.parametrize("case", ["causal", "gqa", "dropout"])
    def test_what_is_needed(self, case: str, needs: tuple[bool, ...]) -> None:
        """The rest has no elements, and the results do not depend on that."""
        *call, _, _, _, _ = raw_calls(case, torch.float32, 150, 200)[-2][1]
        full = raw_double_backward(*call, *(True,) * 4)
        some = raw_double_backward(*call, *needs)
        for got, all_of_it, is_needed in zip(
            some, full, (needs[0], True, *needs[1:], True), strict=True
        ):
            assert_bitwise_equal([got], [all_of_it if is_needed else all_of_it.new_empty(0)])

    @pytest.mark.parametrize("given", some_of_four(1, 3, 4), ids=str)
    @pytest.mark.parametrize("case", ["bias", "gqa"])
    def test_absent_cotangents(self, case: str, given: tuple[bool, ...]) -> None:
        """Of several blocks of queries and keys, beside the definition."""
        call = list(raw_calls(case, torch.float64, 150, 200)[-2][1])
        call[:4] = [c if is_given else None for c, is_given in zip(call[:4], given, strict=True)]
        expected = module._reference_double_backward(*call)
        torch.testing.assert_close(raw_double_backward(*call), expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    def test_probabilities_of_few_queries(self, dtype: torch.dtype) -> None:
        """They add up to one, of scores of 1e4 too, which the forward pass has in another order."""
        query, key, value = arguments(1, 2, 3, 300, 48, dtype, scale=1e4).values()
        settings = (None, None, 0.0, 0, 48**-0.5)
        output, statistics = raw_forward(query, key, value, *settings)
        saved = (query, key, value, None, None, output, statistics, *settings[2:])
        cotangents = (None, None, torch.ones_like(value), None, torch.randn_like(output), None)
        sums = raw_double_backward(*cotangents, *saved, False, True, False, False, False)[0]
        atol = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=atol)


class TestTransforms:
    values = tuple(arguments(2, 2, 5, 6, 4)[name] for name in TENSORS)

    def test_vmap(self) -> None:
        draws = [arguments(2, 2, 5, 6, 4, seed=seed) for seed in range(3)]
        stacked = [torch.stack([draw[name] for draw in draws]) for name in TENSORS]
        actual = torch.func.vmap(attention)(*stacked)
        assert torch.equal(actual, torch.stack([attention(**draw) for draw in draws]))
        actual = torch.func.vmap(attention, (0, None, 1))(
            stacked[0], stacked[1][0], stacked[2].transpose(0, 1)
        )
        for i in range(3):
            expected = attention(stacked[0][i], stacked[1][0], stacked[2][i])
            assert torch.equal(actual[i], expected)

    def test_vmap_dropout(self) -> None:
        """Under the rule of torch.func that its caller names."""
        stacked = [torch.stack([t, t]) for t in self.values]
        function = functools.partial(attention, dropout_p=0.5)
        with pytest.raises(RuntimeError, match="random"):
            torch.func.vmap(function)(*stacked)
        same = torch.func.vmap(function, randomness="same")(*stacked)
        assert torch.equal(same[0], same[1])
        different = torch.func.vmap(function, randomness="different")(*stacked)
        assert not torch.equal(different[0], different[1])

    @pytest.mark.parametrize("argument", [0, 1, 2])
    def test_gradients(self, argument: int) -> None:
        def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *tensors: function(*tensors).square().sum()

        actual, expected = (
            torch.func.grad(loss(function), argument)(*self.values)
            for function in (attention, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(actual, expected)
        stacked = [torch.stack([t, -t]) for t in self.values]
        actual, expected = (
            torch.func.vmap(torch.func.grad(loss(function), argument))(*stacked)
            for function in (attention, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(actual, expected)

    def test_nested(self) -> None:
        double = [t.double() for t in self.values]

        def twice(function: Callable[..., Tensor]) -> Tensor:
            def inner(query: Tensor) -> Tensor:
                gradient = torch.func.grad(lambda q: function(q, *double[1:]).square().sum())
                return gradient(query).square().sum()

            return torch.func.grad(inner)(double[0])

        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(twice(attention), twice(F.scaled_dot_product_attention))

    def test_jacobian_of_a_jacobian(self) -> None:
        q, k, v = (t[0, 0, :3].double() for t in self.values)

        def hessian(function: Callable[..., Tensor]) -> Tensor:
            return torch.func.jacrev(torch.func.jacrev(lambda q: function(q, k, v)))(q)

        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(hessian(attention), hessian(F.scaled_dot_product_attention))

    def test_forward_mode(self) -> None:
        tangents = tuple(map(torch.ones_like, self.values))
        with pytest.raises(NotImplementedError):
            torch.func.jvp(attention, self.values, tangents)
        with genkernels.use_backend("reference"):
            actual = torch.func.jvp(attention, self.values, tangents)
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.func.jvp(F.scaled_dot_product_attention, self.values, tangents)
        torch.testing.assert_close(actual, expected)


class TestAutocast:
    @pytest.mark.parametrize("dtype", FAST_DTYPES[1:], ids=dtype_id)
    def test_outputs(self, dtype: torch.dtype) -> None:
        values = arguments(2, 3, 20, 30, 8, mask=(20, 30))
        with torch.autocast("cpu", dtype):
            actual, logsumexp = op(**values)
            assert F.scaled_dot_product_attention(**values).dtype == dtype
        assert actual.dtype == dtype
        assert logsumexp.dtype == torch.float32
        narrow = {k: v.to(dtype) for k, v in values.items()}
        assert torch.equal(actual, attention(**narrow))
        assert {name for _, name in genkernels.stats()} == {"cpp"}

    @pytest.mark.parametrize(
        ("dtype", "mask_dtype"),
        [
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float32),
        ],
        ids=dtype_id,
    )
    def test_gradients(self, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
        """Of float32 leaves float32, as autocast's casts are differentiated."""
        values = arguments(2, 3, 20, 30, 8, mask=(20, 30))
        values["attn_mask"] = values["attn_mask"].to(mask_dtype)
        with torch.autocast("cpu", dtype):
            actual, expected = (
                with_gradients(lambda **v: function(**v)[:1], values)  # noqa: B023
                for function in (op, plain)
            )
        double = {name: value.double() for name, value in values.items()}
        exact = with_gradients(lambda **v: (plain(**v)[0].to(dtype),), double)
        for name, *three in zip(("output", *values), actual, expected, exact, strict=True):
            assert three[0].dtype == three[1].dtype
            assert_parity(name, *(tensor.to(dtype) for tensor in three[:2]), three[2].double())

    def test_mixed_dtypes(self) -> None:
        values = arguments(2, 3, 20, 30, 8)
        values["key"] = values["key"].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(**values).dtype == torch.bfloat16

    def test_float64_stays(self) -> None:
        values = arguments(2, 3, 20, 30, 8, torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(**values).dtype == torch.float64
            assert F.scaled_dot_product_attention(**values).dtype == torch.float64


class TestCompile:
    @pytest.mark.parametrize("case", ["plain", "causal", "bool", "bias", "gqa", "dropout"])
    def test_dynamic(self, case: str) -> None:
        """One graph for any sizes, and the numbers of eager mode."""
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        options = {k: v for k, v in CASES[case].items() if k in ("enable_gqa", "dropout_p")}
        options["is_causal"] = CASES[case].get("causal") == UPPER_LEFT
        function = functools.partial(attention, **options, return_lse=True)
        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        graphs = set()
        for L, S in ((5, 7), (9, 6), (40, 33)):
            settings = {k: v for k, v in CASES[case].items() if k in ("boolean", "Hk")}
            mask = (2, 1, L, S) if "mask" in CASES[case] else None
            values = arguments(2, 2, L, S, 8, mask=mask, **settings)
            torch.manual_seed(0)
            actual = with_gradients(compiled, values)
            torch.manual_seed(0)
            assert_bitwise_equal(actual, with_gradients(function, values))
            graphs.add(counter.frame_count)
        assert len(graphs) == 1

    @pytest.mark.parametrize("bias", [causal_upper_left, lower_right])
    def test_causal_bias(self, bias: Callable[..., Tensor]) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        values = arguments(2, 2, 5, 7, 8)
        mask = bias(5, 7)
        assert torch.equal(compiled(**values, attn_mask=mask), attention(**values, attn_mask=mask))

    @pytest.mark.parametrize("dropout_p", [0.0, 0.5])
    def test_inductor(self, dropout_p: float) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(attention, fullgraph=True)
        values = arguments(2, 2, 20, 30, 8)
        with torch.no_grad():
            actual = compiled(**values, dropout_p=dropout_p)
        if not dropout_p:  # inductor has random numbers of its own
            torch.testing.assert_close(actual, attention(**values))
        torch.manual_seed(0)
        first = compiled(**values, dropout_p=dropout_p)
        torch.manual_seed(0)
        assert torch.equal(compiled(**values, dropout_p=dropout_p), first)

    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_export(self, is_causal: bool, requires_grad: bool) -> None:
        class Module(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.projection = torch.nn.Linear(12, 36).requires_grad_(requires_grad)

            def forward(self, x: Tensor, mask: Tensor) -> Tensor:
                heads = self.projection(x).unflatten(-1, (9, 4)).transpose(1, 2)
                return attention(*heads.split(3, 1), mask, is_causal=is_causal)

        model = Module()
        batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
        mask_sizes = {0: batch, 3: length}
        program = torch.export.export(
            model,
            (torch.randn(3, 5, 12), torch.randn(3, 1, 1, 5)),
            dynamic_shapes=({0: batch, 1: length}, mask_sizes),
        )
        targets = {str(node.target) for node in program.graph.nodes}
        assert "genkernels.attention_forward.default" in targets
        x, mask = torch.randn(4, 9, 12), torch.randn(4, 1, 1, 9)
        torch.testing.assert_close(program.module()(x, mask), model(x, mask))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in ("lower_right", "bool", "bias", "shared_bias", "gqa")),
        ("dropout", torch.float64),
        ("bias", torch.bfloat16),
    ],
    ids=lambda value: value if isinstance(value, str) else dtype_id(value),
)
def test_opcheck(case: str, dtype: torch.dtype) -> None:
    for call in raw_calls(case, dtype)[:-1]:
        torch.library.opcheck(*call)


def raw_calls(
    case: str, dtype: torch.dtype, L: int = 3, S: int = 4
) -> list[tuple[Any, tuple[Any, ...]]]:
    options = dict(CASES[case])
    if "mask" in options:
        mask = (1,) * (4 - len(options["mask"])) + options["mask"]
        options["mask"] = tuple({3: L, 4: S}.get(size, size) for size in mask)
    values = arguments(2, 2, L, S, 8, dtype, Dv=6, **options)
    tensors = [values.get(name) for name in (*TENSORS, "attn_mask")]
    dropout_p, causal = options.get("dropout_p", 0.0), options.get("causal", 0)
    seed = torch.tensor([2**40 + 17]) if dropout_p else None
    settings = (dropout_p, causal, 0.3)
    output, statistics = raw_forward(*tensors, seed, *settings)
    grads = torch.randn(output.shape).to(dtype), torch.randn_like(statistics[0])
    needs_mask = tensors[3] is not None and tensors[3].is_floating_point()
    saved = (*tensors, seed, output, statistics, *settings)
    cotangents = [
        None if t is None or t.dtype == torch.bool else torch.randn(t.shape).to(dtype)
        for t in tensors
    ]
    return [
        (raw_forward, (*tensors, seed, *settings)),
        (raw_backward, (*grads, *saved, needs_mask)),
        (raw_backward, (grads[0], None, *saved, False)),
        (raw_double_backward, (*cotangents, *grads, *saved, needs_mask, *(True,) * 4)),
        (
            raw_double_backward,
            (None, *cotangents[1:3], None, grads[0], None, *saved, False, *(False, True) * 2),
        ),
    ]


@each_case
@each_of_four
def test_reference_of_the_raw_ops(case: str, dtype: torch.dtype) -> None:
    """What devices without a kernel run, by the kernel; and how the results lie in memory."""
    fake_mode = torch._subclasses.FakeTensorMode()
    for raw, call in raw_calls(case, dtype):
        plain_op = getattr(module, f"_reference_{raw.name().split('attention_')[1]}")
        tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
        if dtype == torch.float16:
            tolerance = {"rtol": 0.004, "atol": 0.004}
        actual, expected = raw(*call), plain_op(*call)
        with fake_mode:
            fakes = raw(*(fake_mode.from_tensor(v) if isinstance(v, Tensor) else v for v in call))
        for got, want, fake in zip(actual, expected, fakes, strict=True):
            if raw is raw_forward and got is actual[1]:  # statistics: their sum alone is defined
                got, want, fake = got.sum(0), want.sum(0), fake.sum(0)
            torch.testing.assert_close(got, want, **tolerance)
            assert got.stride() == want.stride() == fake.stride()
            assert got.dtype == fake.dtype


@each_case
def test_reference_backward(case: str) -> None:
    """The formulas against what autograd makes of the reference's forward pass."""
    _, (_, call), *_ = raw_calls(case, torch.float64)
    grads, tensors, rest = call[:2], call[2:6], call[9:]
    leaves = [
        t.detach().requires_grad_() for t in tensors if t is not None and t.dtype.is_floating_point
    ]
    found = iter(leaves)
    given = [t if t is None or not t.is_floating_point() else next(found) for t in tensors]
    output, statistics = reference.attention_forward(*given, call[6], *rest[:3])
    lse = statistics.sum(0)
    lse = torch.where(lse.isfinite(), lse, 0)
    expected = torch.autograd.grad((output, lse), leaves, grads)
    actual = reference.attention_backward(*call)
    for got, want in zip(actual, expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_output_lies_with_its_heads_together() -> None:
    for shape in ((2, 3, 5, 6, 8), (1, 3, 40, 40, 16)):
        output = attention(**arguments(*shape))
        assert output.transpose(1, 2).is_contiguous()


class TestErrors:
    """As torch.nn.functional's a RuntimeError, which says which argument, and what shapes."""

    CHANGES = (
        ("query", lambda t: t[0, 0, 0], [r"\[8\]"]),
        ("key", lambda t: t[0, 0, 0], [r"\[8\]"]),
        ("key", lambda t: t[..., :7], [r"\[2, 4, 5, 8\]", r"\[2, 4, 6, 7\]"]),
        ("key", lambda t: t[:, :3], [r"\[2, 4\]", r"\[2, 3, 6, 8\]"]),
        ("key", lambda t: t[:, :2], [r"\[2, 4\]", r"\[2, 2, 6, 8\]"]),
        ("key", lambda t: torch.cat([t, t[:1]]), [r"\[2, 4\]", r"\[3, 4, 6, 8\]"]),
        ("key", lambda t: t.double(), ["float64", "float32"]),
        ("key", lambda t: t.to("meta"), ["meta", "cpu"]),
        ("value", lambda t: t[:, :, :5], [r"\[2, 4, 6, 8\]", r"\[2, 4, 5, 7\]"]),
        ("value", lambda t: t[:, :3], [r"\[2, 4\]", r"\[2, 3, 6, 7\]"]),
        ("value", lambda t: t.bfloat16(), ["bfloat16", "float32"]),
        ("attn_mask", lambda t: t[:4], [r"\[2, 4, 5, 6\]", r"\[4, 6\]"]),
        ("attn_mask", lambda t: t.expand(3, 1, 5, 6), [r"\[2, 4, 5, 6\]", r"\[3, 1, 5, 6\]"]),
        ("attn_mask", lambda t: t.expand(1, 1, 1, 5, 6), [r"\[1, 1, 1, 5, 6\]"]),
        ("attn_mask", lambda t: t.double(), ["float64", "float32"]),
        ("attn_mask", lambda t: t.bfloat16(), ["bfloat16", "float32"]),
        ("attn_mask", lambda t: t.int(), ["int32", "float32"]),
        ("attn_mask", lambda t: causal_upper_left(4, 6), [r"\[5, 6\]", r"\[4, 6\]"]),
        ("dropout_p", lambda _: 1.5, [r"\[0, 1\]", "1.5"]),
        ("dropout_p", lambda _: -0.1, [r"\[0, 1\]", "-0.1"]),
        ("dropout_p", lambda _: float("nan"), [r"\[0, 1\]", "nan"]),
    )

    @pytest.mark.parametrize(("name", "change", "words"), CHANGES)
    @pytest.mark.parametrize("mode", ["cpp", "reference", "fake"])
    def test_argument(
        self, name: str, change: Callable[[Any], Any], words: list[str], mode: str
    ) -> None:
        values = arguments(2, 4, 5, 6, 8, Dv=7, mask=(5, 6), dropout_p=0.1)
        values[name] = change(values[name])
        if mode == "fake":
            if not isinstance(values[name], Tensor) or values[name].is_meta:
                return
            fake = torch._subclasses.FakeTensorMode()
            values = {k: fake.from_tensor(v) if type(v) is Tensor else v for k, v in values.items()}
        with (
            genkernels.use_backend(None if mode == "fake" else mode),
            fake if mode == "fake" else contextlib.nullcontext(),
            pytest.raises(RuntimeError, match=f"attention: {name}: expected") as caught,
        ):
            attention(**values)
        for word in words:
            assert caught.match(word)

    def test_heads_that_do_not_divide(self) -> None:
        values = arguments(2, 4, 5, 6, 8, Hk=3)
        for enable_gqa in (False, True):
            with pytest.raises(RuntimeError, match=r"key: expected .*\[2, 3, 6, 8\]"):
                attention(**values, enable_gqa=enable_gqa)

    def test_causal_twice(self) -> None:
        values = arguments(2, 4, 5, 6, 8, attn_mask=causal_upper_left(5, 6))
        for function in (attention, F.scaled_dot_product_attention):
            with pytest.raises(ValueError, match="ausal"):
                function(**values, is_causal=True)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("query", lambda t: t[0]),
            ("query", lambda t: t[:, :3]),
            ("query", lambda t: t[:1]),
            ("query", lambda t: t.double()),
            ("key", lambda t: t[..., :7]),
            ("key", lambda t: t[:, :1]),
            ("key", lambda t: t.double()),
            ("value", lambda t: t[:, :, :5]),
            ("value", lambda t: t[:, :1]),
            ("value", lambda t: t[:1]),
            ("attn_mask", lambda t: t[0]),
            ("attn_mask", lambda t: t[:, :, :4]),
            ("attn_mask", lambda t: t.double()),
            ("attn_mask", lambda t: t.int()),
            ("seed", lambda _: None),
            ("seed", lambda t: t.int()),
            ("seed", lambda t: t.expand(2)),
            ("dropout_p", lambda _: 0.0),
            ("dropout_p", lambda _: 1.5),
            ("causal", lambda _: 3),
            ("causal", lambda _: -1),
            ("grad_output", lambda t: t[:, :, :4]),
            ("grad_output", lambda t: t.double()),
            ("grad_logsumexp", lambda t: t[:, :3]),
            ("grad_logsumexp", lambda t: t.double()),
            ("output", lambda t: t[..., :6]),
            ("statistics", lambda t: t[..., :4]),
            ("statistics", lambda t: t.double()),
            ("grad_grad_query", lambda t: t[:, :3]),
            ("grad_grad_query", lambda t: t.double()),
            ("grad_grad_key", lambda t: t[:, :, :5]),
            ("grad_grad_value", lambda t: t[..., :6]),
            ("grad_grad_mask", lambda t: t.expand(2, 4, 5, 6)),
            ("grad_grad_mask", lambda t: t.double()),
        ],
    )
    def test_raw_op(self, name: str, change: Callable[[Any], Any]) -> None:
        """They check for themselves: nothing is read out of bounds."""
        cotangents: dict[str, Any] = {
            "grad_grad_query": torch.randn(2, 4, 5, 8),
            "grad_grad_key": torch.randn(2, 2, 6, 8),
            "grad_grad_value": torch.randn(2, 2, 6, 7),
            "grad_grad_mask": torch.randn(2, 1, 5, 6),
        }
        values: dict[str, Any] = {
            "grad_output": torch.randn(2, 4, 5, 7),
            "grad_logsumexp": torch.randn(2, 4, 5),
            **arguments(2, 4, 5, 6, 8, Hk=2, Dv=7, mask=(2, 1, 5, 6)),
            "seed": torch.tensor([5]),
            "output": torch.randn(2, 4, 5, 7),
            "statistics": torch.randn(2, 2, 4, 5),
            "dropout_p": 0.2,
            "causal": 1,
            "scale": 0.4,
        }
        forward = [*TENSORS, "attn_mask", "seed", "dropout_p", "causal", "scale"]
        raw_backward(*values.values(), True)
        needs = (True,) * 5
        raw_double_backward(*cotangents.values(), *values.values(), *needs)
        raw_forward(*(values[key] for key in forward))
        of = cotangents if name in cotangents else values
        of[name] = change(of[name])
        own = name if name in cotangents else ""
        with pytest.raises(RuntimeError, match=rf"{own}: expected "):
            raw_double_backward(*cotangents.values(), *values.values(), *needs)
        if name in cotangents:
            return
        with pytest.raises(RuntimeError, match=r": expected "):
            raw_backward(*values.values(), True)
        if name in forward:
            with pytest.raises(RuntimeError, match=r": expected "):
                raw_forward(*(values[key] for key in forward))

    def test_device_of_a_cotangent(self) -> None:
        """Of tensors of two devices PyTorch itself picks one's kernel; here it is the CPU's."""
        call = list(raw_calls("bias", torch.float32)[-2][1])
        call[3] = call[3].to("meta")
        cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        with pytest.raises(RuntimeError, match="grad_grad_mask: expected a CPU tensor"):
            raw_double_backward.redispatch(cpu, *call)


class TestBackends:
    def test_explain(self) -> None:
        values = arguments(2, 3, 5, 6, 8)
        explanation = genkernels.explain(attention, **values)
        assert explanation.backend == "cpp"
        assert str(backend.simd_level()) in explanation.reasons["cpp"]
        half = {name: value.half() for name, value in values.items()}
        assert genkernels.explain("scaled_dot_product_attention", **half).backend == "cpp"

    def test_counts(self) -> None:
        values = arguments(2, 3, 5, 6, 8)
        attention(**values)
        attention(**{k: v.requires_grad_() for k, v in values.items()}).sum().backward()
        assert genkernels.stats(reset=True) == {
            ("attention_forward", "cpp"): 2,
            ("attention_backward", "cpp"): 1,
        }
        with genkernels.use_backend("reference"):
            attention(**values)
        assert genkernels.stats() == REFERENCE

    def test_meta(self) -> None:
        values = arguments(2, 3, 5, 6, 8, Dv=7, mask=(5, 6))
        values = {name: value.to("meta") for name, value in values.items()}
        output, logsumexp = op(**values, causal=UPPER_LEFT)
        assert output.shape == (2, 3, 5, 7)
        assert logsumexp.shape == (2, 3, 5)


OP_INFO = next(info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention")


def op_samples(dtype: torch.dtype, seed: int) -> list[Any]:
    """PyTorch's own samples, as its test suite runs them."""
    torch.manual_seed(seed)
    return list(OP_INFO.sample_inputs("cpu", dtype, requires_grad=True))


@each_dtype
@pytest.mark.parametrize("index", range(len(op_samples(torch.float32, 0))))
def test_op_info_sample(index: int, dtype: torch.dtype) -> None:
    def draw(seed: int) -> dict[str, Any]:
        sample = op_samples(dtype, seed)[index]
        values = dict(zip(TENSORS, (sample.input, *sample.args), strict=True)) | sample.kwargs
        return values | {"causal": UPPER_LEFT * values.pop("is_causal")}

    values = draw(0)
    results = with_gradients(op, values)
    if values["dropout_p"] == 0:
        # At scores of hundreds PyTorch's math path, which keeps all weights, is more exact than
        # what computes them again from logsumexp. So this is the tolerance of its test suite.
        tolerance = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {}
        if dtype == torch.float32:
            tolerance = {"rtol": 5e-6, "atol": 5e-5}
        for got, expected in zip(results, with_gradients(plain, values), strict=True):
            unit = expected.abs().max().clamp(min=1)
            torch.testing.assert_close(got / unit, expected / unit, **tolerance)
    assert results[0].shape == F.scaled_dot_product_attention(*map(values.get, TENSORS)).shape
    assert all(result.isfinite().all() for result in results)


# Peak memory is the process's own, so each feature runs in a fresh one; the small call before it
# loads code and starts threads. VmRSS of the time before counts query, key, value and cotangents.
MEMORY = """
import sys, torch, genkernels
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":")) / 1024
def run(L, feature, order):
    query, key, value, grad = (torch.randn(1, 1, L, 64) for _ in range(4))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    options = {}
    if feature == "causal":
        options = {"is_causal": True}
    if feature == "dropout":
        options = {"dropout_p": 0.1}
    if feature == "mask":
        options = {"attn_mask": (torch.rand(1, L) > 0.2).expand(L, L)}
    if feature == "bias":
        options = {"attn_mask": torch.randn(1, 1, 1, L, requires_grad=True)}
        leaves.append(options["attn_mask"])
    if feature == "features":
        options = {"key_lengths": torch.tensor([L - 5]), "window_size": (2000, 2000)}
        options |= {"alibi_slopes": torch.tensor([0.1]), "softcap": 5.0}
        if order == 1:  # what autograd keeps of an output times its factors is several outputs
            options["sinks"] = torch.zeros(1)
    before = status("VmRSS")
    output = genkernels.scaled_dot_product_attention(query, key, value, **options)
    gradients = torch.autograd.grad(output, leaves, grad, create_graph=order == 2)
    if order == 2:
        torch.autograd.grad(gradients, leaves, [torch.ones_like(g) for g in gradients])
    return status("VmHWM") - before
L, feature, order = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
run(64, feature, order)
extra = run(L, feature, order)
assert extra < 48, f"{extra:.0f} MiB"
expected = {("attention_forward", "cpp"), ("attention_backward", "cpp")}
if order == 2:
    expected.add(("attention_double_backward", "cpp"))
assert set(genkernels.stats()) == expected
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("feature", ["plain", "causal", "dropout", "mask", "bias", "features"])
def test_memory(feature: str) -> None:
    """Of 8192 queries and keys, whose scores would take 256 MiB, and a mask of them 64 MiB."""
    command = [sys.executable, "-c", MEMORY, "8192", feature, "1"]
    subprocess.run(command, env={**os.environ, "GENKERNELS_STRICT": "1"}, check=True, timeout=100)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("feature", ["causal", "bias", "features"])
def test_memory_of_the_double_backward(feature: str) -> None:
    command = [sys.executable, "-c", MEMORY, "8192", feature, "2"]
    subprocess.run(command, env={**os.environ, "GENKERNELS_STRICT": "1"}, check=True, timeout=100)
