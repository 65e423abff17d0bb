"""Key lengths, windows, ALiBi, softcap and sinks of genkernels.scaled_dot_product_attention against
their definitions in plain PyTorch, each alone, with each other and beside all that was there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from parity import assert_op_parity, once_for_all_levels
from test_attention import (
    LOWER_RIGHT,
    OUTPUTS,
    TENSORS,
    UPPER_LEFT,
    InLongDouble,
    arguments,
    counts_from_zero,  # noqa: F401
    first_order,
    kernel,  # noqa: F401
    logsumexp_of,
    lower_right,
    raw_backward,
    raw_double_backward,
    raw_forward,
)
from test_gru import DTYPES, assert_bitwise_equal, dtype_id, each_dtype, with_gradients
from torch import Tensor

import genkernels
from genkernels.reference import attention as reference

attention = genkernels.scaled_dot_product_attention
module = sys.modules["genkernels.ops.attention"]

SLOPES = (0.25, 0.0625, 0.5, 0.125, 0.03125, 0.7)


def op(causal: int = 0, **values: Any) -> tuple[Tensor, ...]:
    """Slopes are numbers here: what is a tensor is differentiated."""
    if causal == LOWER_RIGHT:
        values["attn_mask"] = lower_right(values["query"].size(-2), values["key"].size(-2))
    if "alibi_slopes" in values:
        values["alibi_slopes"] = torch.tensor(values["alibi_slopes"])
    torch.manual_seed(0)
    return attention(**values, is_causal=causal == UPPER_LEFT, return_lse=True)


def definition(causal: int = 0, **values: Any) -> tuple[Tensor, Tensor]:
    """In plain PyTorch; weights of bfloat16 are rounded to it, as PyTorch's own."""
    query, key, value, mask, factor = operands(causal, **values)
    scores = factor * (query @ key.mT)
    cap, dropout_p = values.get("softcap"), values.get("dropout_p")
    scores = (cap * torch.tanh(scores / cap) if cap else scores) + mask
    *leading, H, L, S = scores.shape
    if "sinks" in values:
        sinks = values["sinks"].to(scores.dtype).view(-1, 1, 1).expand(*leading, H, L, 1)
        scores = torch.cat([scores, sinks], -1)
    is_empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(is_empty, 0).softmax(-1).masked_fill(is_empty, 0)[..., :S]
    if dropout_p:
        torch.manual_seed(0)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        heads = (0, weights[..., 0, 0].numel())
        factors = reference.dropout_factors(seed, dropout_p, weights.dtype, heads, (0, L), S)
        weights = weights * factors.view(weights.shape)
    dtype = values["query"].dtype
    output = weights.to(dtype).to(weights.dtype) @ value
    return output.to(dtype), logsumexp_of(scores)


def exact(causal: int = 0, **values: Any) -> tuple[Tensor, Tensor]:
    """The same of float64, with what float64 rounds."""
    if values.get("dropout_p"):
        return definition(causal, **values)
    query, key, value, mask, factor = operands(causal, **values)
    output, logsumexp = InLongDouble.apply(
        query, key, value, mask, factor, values.get("softcap", 0.0)
    )
    if "sinks" not in values:
        return output, logsumexp
    sinks = values["sinks"].unsqueeze(-1).expand(logsumexp.shape)
    total = logsumexp_of(torch.stack([logsumexp, sinks], -1))
    is_empty = logsumexp == -torch.inf
    return output * (logsumexp.masked_fill(is_empty, 0) - total).exp().unsqueeze(-1), total


def operands(causal: int, **values: Any) -> tuple[Any, ...]:
    """Query, key, value and all that is added to their scores, in the same leading dimensions."""
    query, key, value = (values[name] for name in TENSORS)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    (*batch, H, L, D), S = query.shape, key.size(-2)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    key, value = (t.repeat_interleave(H // t.size(-3), -3) for t in (key, value))
    lengths = values.get("key_lengths")
    n = torch.full((*batch, 1, 1, 1), S)
    if lengths is not None:
        n = lengths.expand(batch)[..., None, None, None]
        is_padding = torch.arange(S).unsqueeze(-1) >= n
        key, value = (t.masked_fill(is_padding, 0) for t in (key, value))
    i, j = torch.arange(L).unsqueeze(-1), torch.arange(S)
    own = i + (0 if causal == UPPER_LEFT else n - L)  # [.., 1, L, 1]
    left, right = values.get("window_size", (-1, -1))
    is_seen = j < n
    if causal:
        is_seen = is_seen & (j <= own)
    if left >= 0:
        is_seen = is_seen & (j >= own - left)
    if right >= 0:
        is_seen = is_seen & (j <= own + right)
    mask = values.get("attn_mask", query.new_zeros(1))
    if mask.dtype == torch.bool:
        mask = query.new_zeros(1).masked_fill(~mask, -torch.inf)
    if "alibi_slopes" in values:
        slopes = torch.tensor(values["alibi_slopes"], dtype=torch.float32).to(dtype)
        mask = mask - slopes[..., None, None] * (own - j).abs()
    mask = mask.to(dtype).expand(*batch, H, L, S).masked_fill(~is_seen, -torch.inf)
    return query, key, value, mask, values.get("scale", D**-0.5 if D else 1.0)


def check(draw: Callable[[int], dict[str, Any]], draws: int = 2) -> None:
    # A sink's gradient is one number, of which PyTorch's error may be small by luck.
    values = [draw(seed) for seed in range(8 if "sinks" in draw(0) else draws)]
    is_double = values[0]["query"].dtype == torch.float64
    assert_op_parity(op, definition, exact if is_double else definition, OUTPUTS, *values)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int, **options: Any) -> dict[str, Any]:
    """Arguments of a case; its lengths are shares of S."""
    B, H, L, S, D = shape
    options = dict(options)
    lengths, sinks = options.pop("lengths", None), options.pop("sinks", False)
    values = arguments(B, H, L, S, D, dtype, seed=seed, **options)
    if lengths is not None:
        values["key_lengths"] = torch.tensor([round(share * S) for share in lengths[:B]])
    if sinks:
        generator = torch.Generator().manual_seed(seed)
        values["sinks"] = torch.randn(H, generator=generator).to(dtype)
    return values


ALL: dict[str, Any] = {
    "lengths": (0.7, 1.0),
    "window_size": (20, 9),
    "alibi_slopes": SLOPES[:2],
    "softcap": 2.0,
}
FEATURES: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": (0.5, 1.0)},
    "no_keys": {"lengths": (1.0, 0.0)},
    "window": {"window_size": (5, 3)},
    "one_key": {"window_size": (0, 0)},
    "left": {"window_size": (12, -1)},
    "right": {"window_size": (-1, 2)},
    "wide": {"window_size": (1000, 2**62)},
    "alibi": {"alibi_slopes": SLOPES[:2]},
    "alibi_of_batches": {"alibi_slopes": (SLOPES[:2], SLOPES[2:4])},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "causal_window": {"window_size": (9, 4), "causal": UPPER_LEFT},
    "causal_lengths": {"lengths": (0.4, 0.9), "causal": UPPER_LEFT},
    "lower_right_window": {"window_size": (9, 4), "causal": LOWER_RIGHT},
    "lower_right_lengths": {"lengths": (0.4, 0.9), "causal": LOWER_RIGHT},
    "causal_alibi": {"alibi_slopes": SLOPES[:2], "causal": UPPER_LEFT},
    "mask": {"mask": (2, 2, 35, 70), "boolean": True, **ALL},
    "bias": {"mask": (2, 2, 35, 70), **ALL},
    "bias_of_keys": {"mask": (2, 1, 1, 70), **ALL},
    "bias_of_queries": {"mask": (1, 2, 35, 1), **ALL},
    "gqa": {"Hk": 1, "enable_gqa": True, **ALL},
    "dropout": {"dropout_p": 0.3, **ALL},
    "all": {"sinks": True, **ALL},
    "all_causal": {"causal": UPPER_LEFT, **ALL},
    "all_lower_right": {"causal": LOWER_RIGHT, **ALL},
}
# Of several blocks of queries and keys, and more queries than keys, whose last ones see none.
LARGE: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": (0.6,)},
    "window": {"window_size": (100, 20)},
    "all": {**ALL, "lengths": (0.9,)},
    "bias": {**ALL, "mask": (1, 2, 209, 401), "lengths": (0.9,)},
    "causal_window": {"window_size": (150, -1), "causal": UPPER_LEFT, "softcap": 3.0},
    "dropout": {"dropout_p": 0.2, "window_size": (150, 30), "causal": LOWER_RIGHT},
}


@pytest.mark.usefixtures("poisoned_memory", "kernel", "one_thread")
class TestParity:
    @each_dtype
    @pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
    def test_features(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        check(lambda seed: drawn((2, 2, 35, 70, 16), dtype, seed, **options))

    @each_dtype
    @pytest.mark.parametrize("options", LARGE.values(), ids=LARGE)
    def test_blocks(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        check(lambda seed: drawn((1, 2, 209, 401, 8), dtype, seed, **options), 1)
        if "mask" not in options:
            check(lambda seed: drawn((1, 2, 230, 40, 8), dtype, seed, **options))

    @each_dtype
    @pytest.mark.parametrize("L", [1, 3])
    def test_few_queries(self, L: int, dtype: torch.dtype) -> None:
        """Decoding, in chunks of keys of which batches have different numbers."""
        names = ("lengths", "no_keys", "window", "left", "alibi", "softcap", "lower_right_window")
        for name in (*names, "dropout", "all", "gqa"):
            check(lambda seed, name=name: drawn((2, 2, L, 519, 16), dtype, seed, **FEATURES[name]))
        options = {**ALL, "mask": (2, 2, L, 519)}  # whose gradient the other backward pass forms
        check(lambda seed: drawn((2, 2, L, 519, 16), dtype, seed, **options))

    @each_dtype
    @pytest.mark.parametrize(
        ("L", "S"), [(0, 5), (5, 0), (1, 1), (2, 1), (17, 1), (9, 16), (16, 9), (48, 193)], ids=str
    )
    def test_sizes(self, L: int, S: int, dtype: torch.dtype) -> None:
        for causal, options in ((0, ALL), (UPPER_LEFT, ALL), (LOWER_RIGHT, {})):
            small = {**options, "window_size": (2, 1), "lengths": (0.5, 1.0)}
            check(
                lambda seed, causal=causal, small=small: drawn(
                    (2, 2, L, S, 8), dtype, seed, **small, causal=causal
                )
            )

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("L", [3, 20])
    @pytest.mark.parametrize(
        "options",
        [
            {"key_lengths": torch.tensor([[4, 37, 20], [0, 1, 30]])},
            {"key_lengths": torch.tensor([[31], [12]])},
            {"key_lengths": torch.tensor([37, 5, 20])},
            {"window_size": (4, 2)},
            {"alibi_slopes": SLOPES[:2]},
            {"alibi_slopes": ((SLOPES[:2],), (SLOPES[2:4],))},
            {"softcap": 1.0},
            {"sinks": torch.tensor([0.3, -1.0])},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_five_dimensions(self, options: dict[str, Any], L: int, dtype: torch.dtype) -> None:
        def draw(seed: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(seed)
            shapes = {"query": (2, 3, 2, L, 8), "key": (2, 3, 2, 37, 8), "value": (2, 3, 2, 37, 6)}
            given = {k: torch.randn(v, generator=generator).to(dtype) for k, v in shapes.items()}
            return given | options

        check(draw)

    @each_dtype
    @pytest.mark.parametrize("L", [3, 60])
    @pytest.mark.parametrize("causal", [0, UPPER_LEFT])
    def test_padding_is_not_read(self, causal: int, L: int, dtype: torch.dtype) -> None:
        """NaN in it spreads nowhere, and it gets zeros for gradients."""
        values = drawn((2, 2, L, 90, 16), dtype, 0, lengths=(0.31, 0.8), causal=causal)
        is_padding = (torch.arange(90) >= values["key_lengths"].unsqueeze(-1))[:, None, :, None]
        results = []
        for padding in (0.0, float("nan")):
            for name in TENSORS[1:]:
                values[name] = values[name].masked_fill(is_padding, padding)
            results.append(with_gradients(op, values))
        assert_bitwise_equal(*results)
        for gradient in results[0][3:]:
            assert gradient.isfinite().all()
            assert not gradient[is_padding.expand(gradient.shape)].any()

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    def test_sinks_of_queries_without_keys(self, dtype: torch.dtype) -> None:
        values = drawn((2, 2, 5, 6, 8), dtype, 0, lengths=(0.0, 1.0), sinks=True)
        output, logsumexp, *gradients = with_gradients(op, values)
        assert not output[0].any()
        assert torch.equal(logsumexp[0], values["sinks"].to(logsumexp.dtype)[:, None].expand(2, 5))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("simd", "one_thread", "compiled_only")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("causal", [0, UPPER_LEFT])
def test_what_is_outside_of_a_window_is_not_computed(causal: int, dtype: torch.dtype) -> None:
    """Beside NaN a weight of zero would be NaN: on the left, on the right, and of gradients."""
    values = drawn((1, 1, 900, 900, 16), dtype, 0, window_size=(30, 30), causal=causal)
    clean = with_gradients(op, values)
    for name in TENSORS:
        values[name][:, :, 440:460] = float("nan")
    results = with_gradients(op, values)
    is_far = (torch.arange(900) - 450).abs() > 250  # blocks of 192 at most
    for got, expected in zip(results, clean, strict=True):
        assert torch.equal(got[:, :, is_far], expected[:, :, is_far])
        assert got.isnan().any()


@pytest.mark.usefixtures("simd", "poisoned_memory", "two_threads")
class TestDoubleBackward:
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("case", ["lengths", "bias", "gqa"])
    def test_parity(self, case: str, dtype: torch.dtype) -> None:
        """Of the gradients of both cotangents and of all arguments."""

        def draw(seed: int) -> dict[str, Any]:
            values = drawn((2, 2, 35, 70, 16), dtype, seed, **FEATURES[case])
            generator = torch.Generator().manual_seed(seed)
            given = torch.randn(values["query"].shape, generator=generator).to(dtype)
            given_lse = torch.randn(given.shape[:3], generator=generator)
            return {"grad_output": given, "grad_logsumexp": given_lse, "number": seed} | values

        names = [f"first order {name}" for name in (*TENSORS, "attn_mask")]
        functions = map(first_order, (op, definition, definition))
        assert_op_parity(*functions, names[: 4 if case == "bias" else 3], draw(0), draw(1))
        assert {name for _, name in genkernels.stats()} == {"cpp"}

    @pytest.mark.parametrize(
        ("case", "sizes"),
        [
            *((case, (35, 70)) for case in FEATURES if case not in ("mask", "one_key", "wide")),
            *((case, (3, 40)) for case in ("lengths", "window", "softcap", "bias", "gqa")),
            *((case, (230, 20)) for case in ("causal_window", "lower_right_window", "all")),
            *((case, (230, 300)) for case in ("window", "bias", "bias_of_keys")),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float64], ids=dtype_id)
    def test_against_the_reference(
        self, case: str, sizes: tuple[int, int], dtype: torch.dtype
    ) -> None:
        """Whose own derivatives are autograd's."""
        options = dict(FEATURES[case])
        L, S = sizes
        if "mask" in options:
            options["mask"] = tuple({35: L, 70: S}.get(size, size) for size in options["mask"])
        values = drawn((2, 2, L, S, 8), dtype, 0, **options)
        generator = torch.Generator().manual_seed(0)

        def second() -> list[Tensor]:
            leaves = {
                k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()
            }
            leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
            output, logsumexp = op(**{**values, **leaves})
            loss = output.sin().sum() + logsumexp[logsumexp.isfinite()].cos().sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            generator.manual_seed(1)
            along = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in grads]
            return list(torch.autograd.grad(grads, list(leaves.values()), along))

        actual = second()
        assert genkernels.stats()["attention_double_backward", "cpp"] == 1
        with genkernels.use_backend("reference"):
            expected = once_for_all_levels(second, values)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


SMALL: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": (0.5, 1.0), "causal": LOWER_RIGHT},
    "window": {"window_size": (1, 1)},
    "alibi": {"alibi_slopes": SLOPES[:2], "causal": UPPER_LEFT},
    "softcap": {"softcap": 0.9, "mask": (2, 2, 3, 4)},
    "sinks": {"sinks": True},
    "all": {**ALL, "window_size": (1, 2), "mask": (1, 4)},
}
each_small = pytest.mark.parametrize("case", SMALL)


class TestGradients:
    @staticmethod
    def leaves_of(case: str) -> tuple[Any, tuple[Tensor, ...]]:
        values = drawn((2, 2, 3, 4, 2), torch.float64, 0, **SMALL[case])
        names = [k for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            output, logsumexp = op(**values | dict(zip(names, tensors, strict=True)))
            return output, logsumexp.masked_fill(logsumexp == -torch.inf, 0)

        return function, tuple(values[name].requires_grad_() for name in names)

    @each_small
    def test_gradgradcheck(self, case: str) -> None:
        function, leaves = self.leaves_of(case)
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=case == "sinks")
        assert {name for _, name in genkernels.stats()} == {"cpp"}

    @pytest.mark.parametrize(
        ("case", "block"), [*((case, 2**18) for case in SMALL if case != "sinks"), ("all", 7)]
    )
    def test_reference_in_blocks(
        self, case: str, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The closed forms of the reference, for devices without a kernel and for third orders."""
        monkeypatch.setattr(reference, "BLOCK", block)
        for name in ("backward", "double_backward"):
            plain = getattr(module, f"_reference_{name}")
            monkeypatch.setattr(module, f"_attention_{name}", plain)
        function, leaves = self.leaves_of(case)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)

    @each_small
    def test_third_derivative(self, case: str) -> None:
        function, leaves = self.leaves_of(case)

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
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("simd", "two_threads")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((1, 1, 700, 700, 32), "all"),
        ((2, 2, 130, 200, 40), "dropout"),
        ((2, 2, 2, 1500, 64), "gqa"),
    ],
    ids=["one_head", "dropout", "decoding"],
)
def test_bitwise(shape: tuple[int, ...], case: str, dtype: torch.dtype) -> None:
    """From run to run, and with one thread as with two."""
    options = {**FEATURES[case], "window_size": (150, 90), "alibi_slopes": SLOPES[: shape[1]]}
    values = drawn(shape, dtype, 0, **options)
    first = with_gradients(op, values)
    for _ in range(3):
        assert_bitwise_equal(with_gradients(op, values), first)
    torch.set_num_threads(1)
    assert_bitwise_equal(with_gradients(op, values), first)


def test_lengths_of_int32() -> None:
    values = drawn((2, 2, 5, 9, 8), torch.float32, 0, lengths=(0.4, 0.8))
    expected = op(**values)
    assert_bitwise_equal(op(**values | {"key_lengths": values["key_lengths"].int()}), expected)


def test_options_that_are_off() -> None:
    """Are the plain op, bit for bit, and slopes of zero add nothing."""
    values = arguments(2, 2, 20, 30, 8)
    expected = with_gradients(op, values)
    off = {"key_lengths": None, "window_size": [-1, -1], "softcap": 0, "sinks": None}
    assert_bitwise_equal(with_gradients(op, values | off), expected)
    full = {"key_lengths": torch.tensor([30, 30]), "window_size": (50, 50)}
    assert_bitwise_equal(with_gradients(op, values | full), expected)
    torch.testing.assert_close(with_gradients(op, values | {"alibi_slopes": (0.0, 0.0)}), expected)


def raw_calls(dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    values = drawn((2, 2, 5, 9, 8), dtype, 0, mask=(2, 1, 5, 9), lengths=(0.5, 1.0))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    features = (values.pop("key_lengths"), torch.tensor([SLOPES[:2]], dtype=wide), 3, 2, 1.5)
    given = (*values.values(), None, 0.0, LOWER_RIGHT, 0.3)
    output, statistics = raw_forward(*given, *features)
    grads = (torch.randn(output.shape).to(dtype), torch.randn_like(statistics[0]))
    saved = (*given[:5], output, statistics, *given[5:], True)
    cotangents = [torch.randn(t.shape).to(dtype) for t in values.values()]
    return [
        (raw_forward, (*given, *features)),
        (raw_backward, (*grads, *saved, *features)),
        (raw_double_backward, (*cotangents, *grads, *saved, *(True,) * 4, *features)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_raw_ops(dtype: torch.dtype) -> None:
    """Schemas, fakes and what devices without a kernel run."""
    for raw, call in raw_calls(dtype):
        torch.library.opcheck(raw, call)
        plain_op = getattr(module, f"_reference_{raw.name().split('attention_')[1]}")
        actual, expected = list(raw(*call)), list(plain_op(*call))
        if raw is raw_forward:  # statistics: their sum alone is defined
            actual[1], expected[1] = actual[1].sum(0), expected[1].sum(0)
        tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(actual, expected, **tolerance)


def test_compiled() -> None:
    """One graph for any sizes, and the numbers of eager mode."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    slopes = torch.tensor(SLOPES[:2])

    def function(**values: Any) -> tuple[Tensor, ...]:
        return attention(
            **values, window_size=(4, 1), alibi_slopes=slopes, softcap=2.0, return_lse=True
        )

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = set()
    for L, S in ((5, 7), (40, 33)):
        values = drawn((2, 2, L, S, 8), torch.float32, 0, lengths=(0.5, 1.0), sinks=True)
        actual = with_gradients(compiled, values)
        torch.testing.assert_close(actual, with_gradients(function, values), rtol=0, atol=0)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_vmap() -> None:
    """Of lengths and slopes, too."""
    draws = [drawn((2, 2, 5, 9, 8), torch.float32, seed) for seed in range(3)]
    stacked = [torch.stack([draw[name] for draw in draws]) for name in TENSORS]
    lengths, slopes = torch.tensor([[3, 9], [0, 5], [7, 1]]), torch.rand(3, 2)

    def function(query: Tensor, key: Tensor, value: Tensor, n: Tensor, slope: Tensor) -> Tensor:
        return attention(query, key, value, key_lengths=n, alibi_slopes=slope, softcap=2.0)

    actual = torch.func.vmap(function)(*stacked, lengths, slopes)
    for i, draw in enumerate(draws):
        assert torch.equal(actual[i], function(*(draw[n] for n in TENSORS), lengths[i], slopes[i]))
    loss = functools.partial(lambda *tensors: function(*tensors).square().sum())
    actual = torch.func.vmap(torch.func.grad(loss))(*stacked, lengths, slopes)
    with genkernels.use_backend("reference"):
        expected = torch.func.vmap(torch.func.grad(loss))(*stacked, lengths, slopes)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "given", "words"),
        [
            ("key_lengths", torch.tensor([5.0, 6.0]), "float32"),
            ("key_lengths", torch.tensor([5, 6, 6]), r"\[2\].*\[3\]"),
            ("key_lengths", torch.tensor([[5, 6], [5, 6]]), r"\[2, 2\]"),
            ("key_lengths", torch.tensor([5, 7]), r"\[0, 6\].*7"),
            ("key_lengths", torch.tensor([-1, 5]), r"\[0, 6\].*-1"),
            ("key_lengths", torch.ones(2, dtype=torch.int64, device="meta"), "meta"),
            ("window_size", (3,), r"\(3,\)"),
            ("window_size", (3, -2), r"\(3, -2\)"),
            ("alibi_slopes", torch.ones(3), r"\[4\].*\[3\]"),
            ("alibi_slopes", torch.ones(3, 4), r"\[2, 4\].*\[3, 4\]"),
            ("alibi_slopes", torch.ones(4).double(), "float64"),
            ("alibi_slopes", torch.ones(4).long(), "int64"),
            ("alibi_slopes", torch.ones(4, device="meta"), "meta"),
            ("alibi_slopes", torch.ones(4, requires_grad=True), "gradients"),
            ("softcap", -1.0, "-1.0"),
            ("softcap", float("nan"), "nan"),
            ("softcap", float("inf"), "inf"),
            ("sinks", torch.ones(3), r"\[4\].*\[3\]"),
            ("sinks", torch.ones(2, 4), r"\[2, 4\]"),
            ("sinks", torch.ones(4).long(), "int64"),
            ("sinks", torch.ones(4).double(), "float64"),
        ],
    )
    @pytest.mark.parametrize("backend", ["cpp", "reference"])
    def test_argument(self, name: str, given: Any, words: str, backend: str) -> None:
        values = arguments(2, 4, 5, 6, 8)
        with (
            genkernels.use_backend(backend),
            pytest.raises(RuntimeError, match=rf"attention: {name}: expected .*{words}"),
        ):
            attention(**values, **{name: given})

    @pytest.mark.parametrize(
        ("place", "change", "name"),
        [
            (0, lambda t: t.int(), "key_lengths"),
            (0, lambda t: t[:1], "key_lengths"),
            (0, lambda t: t + 5, "key_lengths"),
            (0, lambda t: t - 5, "key_lengths"),
            (1, lambda t: t.double(), "alibi_slopes"),
            (1, lambda t: t[0], "alibi_slopes"),
            (1, lambda t: t.expand(3, 2), "alibi_slopes"),
            (1, lambda t: t[:, :1], "alibi_slopes"),
            (2, lambda _: -2, "window_size"),
            (3, lambda _: -2, "window_size"),
            (4, lambda _: -1.0, "softcap"),
            (4, lambda _: float("inf"), "softcap"),
        ],
    )
    def test_raw_op(self, place: int, change: Callable[[Any], Any], name: str) -> None:
        """They check for themselves: nothing is read out of bounds."""
        for raw, call in raw_calls(torch.float32):
            given = list(call)
            given[len(given) - 5 + place] = change(given[len(given) - 5 + place])
            with pytest.raises(RuntimeError, match=f"{name}: expected "):
                raw(*given)
