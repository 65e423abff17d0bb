"""genkernels.varlen_attn against attention of each sequence: plain PyTorch's by the one rule, and
genkernels' own to the last bit."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from parity import assert_op_parity
from test_attention import (
    LOWER_RIGHT,
    OUTPUTS,
    TENSORS,
    attention,
    each_of_four,
    exact,
    exact_float64,
    lower_right,
    plain,
)
from test_gru import DTYPES, assert_bitwise_equal, dtype_id, with_gradients
from torch import Tensor
from torch.nn import functional as F

import genkernels

varlen_attn = genkernels.varlen_attn
module = sys.modules["genkernels.ops.varlen_attn"]
raw_forward = torch.ops.genkernels.varlen_attn_forward.default
raw_backward = torch.ops.genkernels.varlen_attn_backward.default
raw_double_backward = torch.ops.genkernels.varlen_attn_double_backward.default
REFERENCE = {("varlen_attn", "reference"): 1}

# Queries and keys of each sequence.
LENGTHS: dict[str, tuple[tuple[int, int], ...]] = {
    "one": ((37, 37),),
    "same": ((5, 5), (1, 1), (0, 0), (33, 33), (17, 17), (1, 1)),
    "differ": ((3, 70), (40, 7), (0, 5), (6, 0), (1, 1), (65, 64)),
    "decoding": ((1, 9), (1, 130), (1, 1), (2, 600)),
    "long": ((200, 210), (100, 401)),
    "none": (),
    "empty": ((0, 0), (0, 0)),
}
MOST = 2**63 - 1
each_window = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@pytest.fixture(autouse=True)
def counts_from_zero() -> None:
    genkernels.stats(reset=True)
    torch.manual_seed(0)


def arguments(
    lengths: tuple[tuple[int, int], ...],
    dtype: torch.dtype = torch.float32,
    *,
    H: int = 2,
    Hk: int | None = None,
    D: int = 16,
    Dv: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    Hk, Dv = Hk or H, D if Dv is None else Dv
    values: dict[str, Any] = {}
    columns = torch.tensor(lengths, dtype=torch.int32).view(-1, 2).cumsum(0, dtype=torch.int32)
    cu_seq_q, cu_seq_k = F.pad(columns.T, (1, 0)).unbind()
    shapes = ((cu_seq_q, H, D), (cu_seq_k, Hk, D), (cu_seq_k, Hk, Dv))
    for name, (cu_seq, heads, size) in zip(TENSORS, shapes, strict=True):
        shape = (int(cu_seq[-1]), heads, size)
        values[name] = torch.randn(shape, generator=generator).to(dtype)
    return values | {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k} | settings


def op(
    causal: bool = False, window: tuple[int, int] | None = None, **values: Any
) -> tuple[Tensor, ...]:
    most = [max([0, *values[name].diff().tolist()]) for name in ("cu_seq_q", "cu_seq_k")]
    window = window or (-1, 0 if causal else -1)
    return varlen_attn(**values, max_q=most[0], max_k=most[1], window_size=window, return_lse=True)


def each_sequence(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The same by a function of [1, H, L, D]."""

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        def heads(tensor: Tensor, begins: list[int], n: int) -> Tensor:
            return tensor[begins[n] : begins[n + 1]].transpose(0, 1).unsqueeze(0)

        rows, columns = cu_seq_q.tolist(), cu_seq_k.tolist()
        outputs, logsumexps = [], []
        for n in range(len(rows) - 1):
            if window is not None:
                sizes = (rows[n + 1] - rows[n], columns[n + 1] - columns[n])
                options["attn_mask"] = in_window(*sizes, *window)
            output, logsumexp = function(
                causal=LOWER_RIGHT * causal,
                query=heads(query, rows, n),
                key=heads(key, columns, n),
                value=heads(value, columns, n),
                **options,
            )
            outputs.append(output.squeeze(0).transpose(0, 1))
            logsumexps.append(logsumexp.squeeze(0))
        return torch.cat(outputs), torch.cat(logsumexps, -1)

    return call


def in_window(L: int, S: int, left: int, right: int) -> Tensor:
    place = torch.arange(S) - torch.arange(S - L, S)[:, None]  # [L, S]
    return (place >= (-left if left >= 0 else -L - S)) & (place <= (right if right >= 0 else L + S))


def own(causal: int, **values: Any) -> tuple[Tensor, ...]:
    if causal:
        values["attn_mask"] = lower_right(values["query"].size(-2), values["key"].size(-2))
    return attention(**values, return_lse=True)


@pytest.mark.usefixtures("simd", "poisoned_memory", "one_thread", "compiled_only")
class TestParity:
    def check(self, *draws: dict[str, Any]) -> None:
        is_double = draws[0]["query"].dtype == torch.float64
        reference = exact_float64 if is_double else exact
        functions = map(each_sequence, (plain, reference))
        assert_op_parity(op, *functions, OUTPUTS, *draws)

    @each_of_four
    @each_window
    @pytest.mark.parametrize("case", [*LENGTHS][:5])
    def test_lengths(self, case: str, causal: bool, dtype: torch.dtype) -> None:
        self.check(
            *(arguments(LENGTHS[case], dtype, causal=causal, seed=seed) for seed in range(2))
        )

    @each_of_four
    @each_window
    def test_shared_heads_and_sizes(self, causal: bool, dtype: torch.dtype) -> None:
        options = {"H": 6, "Hk": 2, "D": 33, "Dv": 8, "enable_gqa": True, "scale": 0.4}
        self.check(
            *(
                arguments(LENGTHS["differ"], dtype, causal=causal, seed=seed, **options)
                for seed in range(2)
            )
        )

    @pytest.mark.parametrize(
        "window", [(5, 0), (0, 3), (-1, 2), (40, -1), (MOST, 7), (3, MOST)], ids=str
    )
    def test_windows(self, window: tuple[int, int]) -> None:
        for dtype in (torch.float32, torch.float16):
            self.check(
                *(
                    arguments((*LENGTHS["differ"], (2, 300)), dtype, window=window, seed=seed)
                    for seed in range(2)
                )
            )


MANY = ((230, 200), *((i % 41, i * 7 % 38) for i in range(0, 60, 4)), (150, 233), (2, 900), (1, 0))


@pytest.mark.usefixtures("simd", "poisoned_memory", "two_threads", "compiled_only")
class TestBitwise:
    """What the op of one sequence gives, for any number of threads: long sequences are shared out,
    short ones are a thread's own."""

    @pytest.mark.parametrize(
        ("dtype", "causal"),
        [(torch.float32, False), *((dtype, True) for dtype in (*DTYPES, torch.float16))],
        ids=str,
    )
    def test_first_order(self, causal: bool, dtype: torch.dtype) -> None:
        values = arguments(MANY, dtype, H=4, Hk=2, D=24, causal=causal, enable_gqa=True)
        first = with_gradients(op, values)
        assert_bitwise_equal(first, with_gradients(each_sequence(own), values))
        torch.set_num_threads(1)
        assert_bitwise_equal(with_gradients(op, values), first)

    @each_of_four
    def test_second_order(self, dtype: torch.dtype) -> None:
        values = arguments(MANY[:9] + MANY[-3:], dtype, H=4, Hk=2, causal=True, enable_gqa=True)

        def second(function: Callable[..., Any]) -> list[Tensor]:
            def gradients(**values: Any) -> tuple[Tensor, ...]:
                leaves = [values[name] for name in TENSORS]
                outputs = function(**values)
                torch.manual_seed(0)
                grads = [torch.randn(o.shape).to(o.dtype) for o in outputs]
                return torch.autograd.grad(outputs, leaves, grads, create_graph=True)

            return with_gradients(gradients, values)

        first = second(op)
        assert_bitwise_equal(first, second(each_sequence(own)))
        torch.set_num_threads(1)
        assert_bitwise_equal(second(op), first)
        assert genkernels.stats()["varlen_attn_double_backward", "cpp"] == 2

    @pytest.mark.parametrize("layout", ["packed", "heads_first", "columns", "every_other"])
    def test_strides(self, layout: str) -> None:
        """Of the arguments and of the output's cotangent."""
        values = arguments(LENGTHS["differ"], H=2, D=16)

        def relaid(tensor: Tensor) -> Tensor:
            if layout == "packed":  # as one projection gives them
                return torch.cat([tensor, tensor], 1)[:, : tensor.size(1)]
            if layout == "heads_first":
                return tensor.transpose(0, 1).contiguous().transpose(0, 1)
            if layout == "columns":
                return tensor.transpose(1, 2).contiguous().transpose(1, 2)
            return tensor.repeat_interleave(2, 0)[::2]

        def results(relaid: Callable[[Tensor], Tensor]) -> list[Tensor]:
            leaves = [relaid(values[name]).requires_grad_() for name in TENSORS]
            given = {**values, **dict(zip(TENSORS, leaves, strict=True))}
            given["cu_seq_q"] = given["cu_seq_q"].long().repeat_interleave(3)[::3]
            outputs = op(**given)
            grads = [relaid(torch.ones_like(outputs[0])), torch.ones_like(outputs[1])]
            return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

        assert_bitwise_equal(results(relaid), results(lambda tensor: tensor))


@pytest.mark.usefixtures("simd", "poisoned_memory", "compiled_only")
class TestEdges:
    @pytest.mark.parametrize("case", ["none", "empty"])
    def test_nothing(self, case: str) -> None:
        output, logsumexp, *gradients = with_gradients(op, arguments(LENGTHS[case], Dv=8))
        assert output.shape == (0, 2, 8)
        assert logsumexp.shape == (2, 0)
        assert [g.shape for g in gradients] == [(0, 2, 16), (0, 2, 16), (0, 2, 8)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
    @each_window
    def test_queries_without_keys_and_keys_without_queries(
        self, causal: bool, dtype: torch.dtype
    ) -> None:
        values = arguments(((3, 0), (0, 4), (9, 2), (12, 0)), dtype, causal=causal)
        output, logsumexp, grad_query, grad_key, grad_value = with_gradients(op, values)
        is_empty = torch.ones(24, dtype=torch.bool)
        is_empty[3 + 7 * causal : 12] = False
        assert not output[is_empty].any()
        assert not grad_query[is_empty].any()
        assert (logsumexp == -torch.inf).equal(is_empty.expand(2, 24))
        assert output[~is_empty].all()
        for gradient in (grad_key, grad_value):
            assert not gradient[:4].any()
            assert gradient.isfinite().all()
        assert grad_value[4:].all()

    @pytest.mark.parametrize("n", [0, 2, 5])
    def test_a_sequence_s_nan_is_its_own(self, n: int) -> None:
        values = arguments(LENGTHS["long"] + LENGTHS["same"], H=3)
        clean = with_gradients(op, values)
        begins = values["cu_seq_k"].tolist()
        others = torch.ones(begins[-1], dtype=torch.bool)
        values["value"][begins[n]] = torch.nan
        values["key"][begins[n]] = torch.nan
        others[begins[n] : begins[n + 1]] = False
        results = with_gradients(op, values)
        begins = values["cu_seq_q"].tolist()
        queries = torch.ones(begins[-1], dtype=torch.bool)
        queries[begins[n] : begins[n + 1]] = False
        for index, kept in ((0, queries), (2, queries), (3, others), (4, others)):
            assert torch.equal(results[index][kept], clean[index][kept])
        assert results[0][~queries].isnan().all()


def leaves_of(causal: bool, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    lengths = ((3, 4), (0, 2), (2, 2), (1, 3), (3, 0), (2, 1))
    values = arguments(lengths, torch.float64, D=3, Dv=2, **options)
    values |= {"window": (1, 0)} if causal else {}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        output, logsumexp = op(**values | dict(zip(TENSORS, tensors, strict=True)))
        return output, logsumexp.masked_fill(logsumexp == -torch.inf, 0)

    return function, tuple(values[name].requires_grad_() for name in TENSORS)


class TestGradients:
    @each_window
    def test_gradcheck(self, causal: bool) -> None:
        function, leaves = leaves_of(causal, H=4, Hk=2, enable_gqa=True)
        assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, leaves)
        assert {name for _, name in genkernels.stats()} == {"cpp"}

    def test_third_derivative(self) -> None:
        function, leaves = leaves_of(True)

        def third() -> tuple[Tensor, ...]:
            loss = sum(output.pow(3).sum() for output in function(*leaves))
            for _ in range(2):
                gradients = torch.autograd.grad(loss, leaves, create_graph=True)
                loss = sum(g.sin().sum() for g in gradients)
            return torch.autograd.grad(loss, leaves)

        actual = third()
        assert genkernels.stats()["varlen_attn_double_backward", "reference"] >= 1
        with genkernels.use_backend("reference"):
            expected = third()
        for got, exact_value in zip(actual, expected, strict=True):
            assert exact_value.abs().max() > 1e-3
            torch.testing.assert_close(got, exact_value, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
    def test_only_what_is_asked_for(self, needs: tuple[bool, ...]) -> None:
        function, leaves = leaves_of(False)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        given = [leaf if need else leaf.detach() for leaf, need in zip(leaves, needs, strict=True)]
        results = []
        for tensors in (given, leaves):
            gradients = torch.autograd.grad(
                function(*tensors)[0].sin().sum(), wanted, create_graph=True
            )
            loss = sum(gradient.sin().sum() for gradient in gradients)
            results.append([*gradients, *torch.autograd.grad(loss, wanted, allow_unused=True)])
        for got, expected in zip(*results, strict=True):
            if got is not None or expected.any():
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class TestTransforms:
    values = arguments(LENGTHS["differ"], D=4)
    tensors = (values["query"], values["key"], values["value"])

    def function(self, *tensors: Tensor) -> Tensor:
        return op(**self.values | dict(zip(TENSORS, tensors, strict=True)))[0]

    def sequences(self, *tensors: Tensor) -> Tensor:
        return each_sequence(plain)(**self.values | dict(zip(TENSORS, tensors, strict=True)))[0]

    def test_vmap(self) -> None:
        stacked = [torch.stack([t, -t, 2 * t]) for t in self.tensors]
        actual = torch.func.vmap(self.function)(*stacked)
        for i in range(3):
            assert torch.equal(actual[i], self.function(*(t[i] for t in stacked)))
        mixed = torch.func.vmap(self.function, (None, 0, None))(
            self.tensors[0], stacked[1], self.tensors[2]
        )
        assert torch.equal(mixed[1], self.function(self.tensors[0], stacked[1][1], self.tensors[2]))

    def test_sequences_may_differ(self) -> None:
        cu_seq = torch.tensor([[0, 3, 5], [0, 1, 5]])
        x = torch.randn(5, 2, 8)
        actual = torch.func.vmap(lambda c: varlen_attn(x, x, x, c, c, 5, 5))(cu_seq)
        for i in range(2):
            assert torch.equal(actual[i], varlen_attn(x, x, x, cu_seq[i], cu_seq[i], 5, 5))

    def test_gradients(self) -> None:
        stacked = [torch.stack([t, -t]) for t in self.tensors]
        for argument in range(3):
            actual, expected = (
                torch.func.vmap(
                    torch.func.grad(lambda *t, f=function: f(*t).square().sum(), argument)
                )(*stacked)
                for function in (self.function, self.sequences)
            )
            torch.testing.assert_close(actual, expected)

    def test_nested(self) -> None:
        double = [t.double() for t in self.tensors]

        def twice(function: Callable[..., Tensor]) -> Tensor:
            def inner(key: Tensor) -> Tensor:
                gradient = torch.func.grad(
                    lambda k: function(double[0], k, double[2]).square().sum()
                )
                return gradient(key).square().sum()

            return torch.func.grad(inner)(double[1])

        actual = twice(self.function)
        with genkernels.use_backend("reference"):
            torch.testing.assert_close(actual, twice(self.function))

    def test_forward_mode(self) -> None:
        tangents = tuple(map(torch.ones_like, self.tensors))
        with pytest.raises(NotImplementedError):
            torch.func.jvp(self.function, self.tensors, tangents)
        with genkernels.use_backend("reference"):
            output, tangent = torch.func.jvp(self.function, self.tensors, tangents)
        assert torch.equal(output.isfinite(), torch.ones_like(output, dtype=torch.bool))
        assert tangent.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast(dtype: torch.dtype) -> None:
    values = arguments(LENGTHS["differ"])
    with torch.autocast("cpu", dtype):
        output, logsumexp = op(**values)
    assert output.dtype == dtype
    assert logsumexp.dtype == torch.float32
    narrow = {name: values[name].to(dtype) for name in TENSORS}
    assert torch.equal(output, op(**values | narrow)[0])
    assert {name for _, name in genkernels.stats()} == {"cpp"}


class TestCompile:
    @each_window
    def test_dynamic(self, causal: bool) -> None:
        """One graph for any number of sequences of any lengths, and the numbers of eager mode."""
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        def function(**values: Any) -> tuple[Tensor, ...]:
            window = (-1, 0 if causal else -1)
            return varlen_attn(**values, max_q=99, max_k=99, window_size=window, return_lse=True)

        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        for lengths in (LENGTHS["differ"], LENGTHS["same"], LENGTHS["decoding"][:3]):
            values = arguments(lengths)
            assert_bitwise_equal(with_gradients(compiled, values), with_gradients(function, values))
        assert counter.frame_count == 1

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        values = arguments(LENGTHS["differ"])
        compiled = torch.compile(varlen_attn, fullgraph=True)
        actual = compiled(**values, max_q=65, max_k=70)
        torch.testing.assert_close(actual, op(**values)[0])


def raw_calls(causal: bool, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    values = arguments(((3, 4), (1, 2), (0, 3), (2, 0)), dtype, Dv=8, Hk=1)
    tensors = tuple(values.values())
    settings = (2 if causal else -1, 0 if causal else -1, 0.3)
    output, statistics = raw_forward(*tensors, *settings)
    grads = torch.randn(output.shape).to(dtype), torch.randn_like(statistics[0])
    saved = (*tensors, output, statistics, *settings)
    cotangents = [torch.randn(t.shape).to(dtype) for t in tensors[:3]]
    return [
        (raw_forward, (*tensors, *settings)),
        (raw_backward, (*grads, *saved)),
        (raw_backward, (grads[0], None, *saved)),
        (raw_double_backward, (*cotangents, *grads, *saved, *(True,) * 4)),
        (
            raw_double_backward,
            (None, cotangents[1], None, grads[0], None, *saved, *(False, True) * 2),
        ),
    ]


@each_window
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_opcheck(causal: bool, dtype: torch.dtype) -> None:
    for call in raw_calls(causal, dtype):
        torch.library.opcheck(*call)


@each_window
@each_of_four
def test_reference_of_the_raw_ops(causal: bool, dtype: torch.dtype) -> None:
    """What devices without a kernel run, by the kernel; and how the results lie in memory."""
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}.get(dtype)
    for raw, call in raw_calls(causal, dtype):
        plain_op = getattr(module, f"_reference_{raw.name().split('attn_')[1]}")
        actual, expected = raw(*call), plain_op(*call)
        fake_op = getattr(module, f"_fake_{raw.name().split('attn_')[1]}")
        for got, want, fake in zip(actual, expected, fake_op(*call), strict=True):
            if raw is raw_forward and got is actual[1]:  # statistics: their sum alone is defined
                got, want = got.sum(0), want.sum(0)
                fake = fake[0]
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            assert got.is_contiguous()
            assert want.is_contiguous()
            assert (fake.shape, fake.dtype, fake.stride()) == (got.shape, got.dtype, got.stride())


class TestErrors:
    CHANGES = (
        ("query", lambda t: t[0], [r"3 dimensions", r"\[4, 8\]"]),
        ("key", lambda t: t[:, :3], [r"\[9, 4, 8\]", r"\[11, 3, 8\]"]),
        ("key", lambda t: t[..., :7], ["head size 8", r"\[11, 4, 7\]"]),
        ("key", lambda t: t.double(), ["float64", "float32"]),
        ("key", lambda t: t.to("meta"), ["meta", "cpu"]),
        ("value", lambda t: t[:10], [r"11 rows of 4 heads", r"\[10, 4, 7\]"]),
        ("value", lambda t: t[:, :2], [r"11 rows of 4 heads", r"\[11, 2, 7\]"]),
        ("value", lambda t: t.bfloat16(), ["bfloat16", "float32"]),
        ("cu_seq_q", lambda t: t.float(), ["int32 or int64", "float32"]),
        ("cu_seq_q", lambda t: t[:0], ["one more element", r"\[0\]"]),
        ("cu_seq_q", lambda t: t[None], ["one dimension", r"\[1, 4\]"]),
        ("cu_seq_q", lambda t: t.to("meta"), ["meta", "cpu"]),
        ("cu_seq_k", lambda t: t[:-1], ["as many elements", "4", "3"]),
        ("cu_seq_k", lambda t: t.double(), ["int32 or int64", "float64"]),
        ("cu_seq_q", lambda t: t + 1, ["from 0 to the 9 rows", r"\[1, 5, 6, 10\]"]),
        ("cu_seq_q", lambda t: t - (t == 9).int(), ["from 0 to the 9 rows", r"\[0, 4, 5, 8\]"]),
        ("cu_seq_q", lambda t: t[[0, 2, 1, 3]], ["do not fall", r"\[0, 5, 4, 9\]"]),
        ("cu_seq_k", lambda t: -t, ["from 0 to the 11 rows", r"-11"]),
        ("window_size", lambda _: (-2, 0), [r"\(-2, 0\)"]),
        ("window_size", lambda _: (-1, 0, 1), ["two numbers", r"\(-1, 0, 1\)"]),
    )

    @pytest.mark.parametrize(("name", "change", "words"), CHANGES)
    @pytest.mark.parametrize("mode", ["cpp", "reference", "fake"])
    def test_argument(
        self, name: str, change: Callable[[Any], Any], words: list[str], mode: str
    ) -> None:
        values = arguments(((4, 5), (1, 2), (4, 4)), H=4, D=8, Dv=7) | {"max_q": 4, "max_k": 5}
        values |= {"window_size": (-1, 0)}
        values[name] = change(values[name])
        fake = torch._subclasses.FakeTensorMode()
        if mode == "fake":
            is_meta = isinstance(values[name], Tensor) and values[name].is_meta
            if is_meta or words[0].startswith(("from 0", "do not fall")):  # it has no values
                return
            values = {k: fake.from_tensor(v) if type(v) is Tensor else v for k, v in values.items()}
        with (
            genkernels.use_backend(None if mode == "fake" else mode),
            fake if mode == "fake" else contextlib.nullcontext(),
            pytest.raises(RuntimeError, match=f"varlen_attn: {name}: expected") as caught,
        ):
            varlen_attn(**values)
        for word in words:
            assert caught.match(word)

    def test_integers(self) -> None:
        x, cu_seq = torch.ones(5, 2, 8, dtype=torch.int32), torch.tensor([0, 5])
        with (
            genkernels.use_backend("reference"),
            pytest.raises(RuntimeError, match="query: expect"),
        ):
            varlen_attn(x, x, x, cu_seq, cu_seq, 5, 5)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("query", lambda t: t[0]),
            ("query", lambda t: t[:8]),
            ("query", lambda t: t.double()),
            ("key", lambda t: t[..., :7]),
            ("key", lambda t: t[:10]),
            ("key", lambda t: t.double()),
            ("value", lambda t: t[:10]),
            ("value", lambda t: t[:, :1]),
            ("cu_seq_q", lambda t: t.float()),
            ("cu_seq_q", lambda t: t[:0]),
            ("cu_seq_q", lambda t: t.flip(0)),
            ("cu_seq_q", lambda t: t.clamp(max=8)),
            ("cu_seq_k", lambda t: t[:-1]),
            ("cu_seq_k", lambda t: t - 1),
            ("cu_seq_k", lambda t: t[[0, 2, 1, 3]]),
            ("window_left", lambda _: -2),
            ("window_right", lambda _: -2),
            ("grad_output", lambda t: t[:8]),
            ("grad_output", lambda t: t.double()),
            ("grad_logsumexp", lambda t: t[:3]),
            ("grad_logsumexp", lambda t: t.double()),
            ("output", lambda t: t[..., :6]),
            ("statistics", lambda t: t[..., :4]),
            ("statistics", lambda t: t.double()),
            ("grad_grad_query", lambda t: t[:, :3]),
            ("grad_grad_key", lambda t: t.double()),
            ("grad_grad_value", lambda t: t[..., :6]),
        ],
    )
    def test_raw_op(self, name: str, change: Callable[[Any], Any]) -> None:
        """They check for themselves: nothing is read out of bounds."""
        tensors = arguments(((4, 5), (1, 2), (4, 4)), H=4, Hk=2, D=8, Dv=7)
        values: dict[str, Any] = {
            **{f"grad_grad_{key}": torch.randn(tensors[key].shape) for key in TENSORS},
            "grad_output": torch.randn(9, 4, 7),
            "grad_logsumexp": torch.randn(4, 9),
            **tensors,
            "output": torch.randn(9, 4, 7),
            "statistics": torch.randn(2, 4, 9),
            "window_left": -1,
            "window_right": 0,
            "scale": 0.4,
        }
        forward = [*tensors, "window_left", "window_right", "scale"]
        calls = (
            (raw_double_backward, list(values), (True,) * 4),
            (raw_backward, list(values)[3:], ()),
            (raw_forward, forward, ()),
        )
        for raw, names, more in calls:
            raw(*(values[key] for key in names), *more)
        values[name] = change(values[name])
        for raw, names, more in calls:
            if name in names:
                with pytest.raises(RuntimeError, match=": expected "):
                    raw(*(values[key] for key in names), *more)


class TestBackends:
    def test_signature_is_pytorch_s(self) -> None:
        torch_varlen = pytest.importorskip("torch.nn.attention.varlen")
        functions = (varlen_attn, torch_varlen.varlen_attn)
        own, theirs = (inspect.signature(function).parameters for function in functions)
        if "enable_gqa" not in theirs:
            pytest.skip(f"the signature of torch {torch.__version__}, an older one")
        left_out = {"return_aux", "seqused_k", "block_table", "num_splits"}
        assert [*own][:-1] == [name for name in theirs if name not in left_out]
        assert [*own][-1] == "return_lse"
        for name in set(own) & set(theirs):
            assert (own[name].kind, own[name].default) == (theirs[name].kind, theirs[name].default)

    def test_explain_and_counts(self) -> None:
        values = arguments(LENGTHS["differ"], torch.float16)
        assert genkernels.explain(varlen_attn, **values, max_q=1, max_k=1).backend == "cpp"
        with_gradients(op, values)
        assert genkernels.stats(reset=True) == {
            ("varlen_attn_forward", "cpp"): 1,
            ("varlen_attn_backward", "cpp"): 1,
        }
        with genkernels.use_backend("reference"):
            op(**values)
        assert genkernels.stats() == REFERENCE

    @each_window
    def test_reference(self, causal: bool) -> None:
        values = arguments(LENGTHS["differ"], H=4, Hk=2, causal=causal, enable_gqa=True)
        actual = with_gradients(op, values)
        with genkernels.use_backend("reference"):
            torch.testing.assert_close(with_gradients(op, values), actual)

    def test_meta(self) -> None:
        values = arguments(LENGTHS["differ"], Dv=7)
        values = {name: value.to("meta") for name, value in values.items()}
        output, logsumexp = varlen_attn(**values, max_q=65, max_k=70, return_lse=True)
        assert output.shape == (115, 2, 7)
        assert logsumexp.shape == (2, 115)


MEMORY = """
import sys, torch, genkernels
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":")) / 1024
def run(lengths, order):
    T = sum(lengths)
    leaves = [torch.randn(T, 1, 64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(T, 1, 64)
    cu_seq = torch.tensor([0, *lengths]).cumsum(0)
    before = status("VmRSS")
    output = genkernels.varlen_attn(*leaves, cu_seq, cu_seq, T, T, window_size=(-1, 0))
    gradients = torch.autograd.grad(output, leaves, grad, create_graph=order == 2)
    if order == 2:
        torch.autograd.grad(gradients, leaves, [torch.ones_like(g) for g in gradients])
    return status("VmHWM") - before
order = int(sys.argv[1])
run([64], order)
extra = run([8192, *[1, 2, 3] * 1000, 2000], order)
assert extra < 64, f"{extra:.0f} MiB"
assert {name for _, name in genkernels.stats()} == {"cpp"}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("order", [1, 2])
def test_memory(order: int) -> None:
    """Of 16192 queries and keys in 3002 sequences, the longest of 8192: padded, queries alone would
    take 6 GiB, and all scores 1 GiB."""
    command = [sys.executable, "-c", MEMORY, str(order)]
    subprocess.run(command, env={**os.environ, "GENKERNELS_STRICT": "1"}, check=True, timeout=100)
