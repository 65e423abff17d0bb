"""genkernels.rnn: outputs and gradients against PyTorch's, and all that PyTorch does with an op.

What it shares with the GRU (the threads' barrier, processes that fork) is tested in test_gru.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import test_gru
import torch
from parity import assert_op_parity
from test_gru import (
    DTYPES,
    EDGE_SHAPES,
    LONG_SHAPES,
    OUTPUTS,
    TENSORS,
    assert_bitwise_equal,
    dtype_id,
    each_direction,
    each_dtype,
    each_dtype_and_direction,
    each_of_whole_registers,
    relaid,
    shape_id,
    with_gradients,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import genkernels
from genkernels import reference
from genkernels.reference.rnn import rnn_backward

arguments = functools.partial(test_gru.arguments, gates=1)
packed_arguments = functools.partial(test_gru.packed_arguments, gates=1)


def plain_rnn(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same computed by torch.rnn_tanh, and by its cell where hidden states are reset."""
    if resets is not None:
        h, outputs = hx, {}
        for t in reversed(range(len(input))) if reverse else range(len(input)):
            h = torch.where(resets[t, :, None], 0, h)
            h = torch.rnn_tanh_cell(input[t], h, weight_ih, weight_hh, bias_ih, bias_hh)
            outputs[t] = h
        return torch.stack([outputs[t] for t in range(len(input))]), h.clone()
    has_biases = bias_ih is not None
    weights = [weight_ih, weight_hh, *((bias_ih, bias_hh) if has_biases else ())]
    if batch_sizes is None:
        x = input.flip(0) if reverse else input
        output, h_n = torch.rnn_tanh(x, hx[None], weights, has_biases, 1, 0.0, False, False, False)
        return output.flip(0) if reverse else output, h_n[0]
    # torch.rnn_tanh runs a packed sequence backwards only as the second direction of two.
    both = 1 + reverse
    states = hx.expand(both, -1, -1)
    output, h_n = torch.rnn_tanh(
        input, batch_sizes, states, weights * both, has_biases, 1, 0.0, False, reverse
    )
    return output.chunk(both, -1)[-1], h_n[-1]


def check(draw: Callable[[int], dict[str, Any]], draws: int = 4) -> None:
    assert_op_parity(genkernels.rnn, plain_rnn, reference.rnn, OUTPUTS, *map(draw, range(draws)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_reference_is_torch_rnn(bias: bool) -> None:
    """The definition that kernels are held to is held to torch's, bit for bit over one step."""
    values = arguments(1, 3, 5, 4, torch.float64, bias=bias)
    assert_bitwise_equal(list(reference.rnn(**values)), list(plain_rnn(**values)))


@pytest.mark.usefixtures("poisoned_memory", "compiled_only", "simd", "one_thread")
class TestParity:
    """The one rule, at every SIMD level, in memory full of NaN, in the compiled kernel alone."""

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [(shape, dtype) for shape in EDGE_SHAPES[::2] for dtype in DTYPES[:2]]
        + [(shape, torch.float64) for shape in EDGE_SHAPES[::6]]
        + [(shape, dtype) for shape in LONG_SHAPES for dtype in DTYPES[:2]],
        ids=lambda value: shape_id(value) if isinstance(value, tuple) else dtype_id(value),
    )
    def test_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        # Of many elements alone, PyTorch's error is not small by luck.
        T, B, _, H = shape
        check(lambda seed: arguments(*shape, dtype, seed=seed), draws=2 if T * B * H > 800 else 4)

    @each_direction
    @each_of_whole_registers
    def test_reads_in_place(
        self, shape: tuple[int, ...], dtype: torch.dtype, reverse: bool
    ) -> None:
        check(lambda seed: arguments(*shape, dtype, seed=seed) | {"reverse": reverse}, draws=2)

    @each_dtype
    @pytest.mark.parametrize("shape", [(3, 40, 20, 250), (3, 9, 20, 275)], ids=shape_id)
    def test_last_block_of_fewer_registers(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        check(lambda seed: arguments(*shape, dtype, seed=seed), draws=2)

    @each_dtype
    @pytest.mark.parametrize(
        ("bias", "reverse"),
        [(False, False), (True, True), (False, True)],
        ids=["no_bias", "reverse", "no_bias_reverse"],
    )
    def test_options(self, dtype: torch.dtype, bias: bool, reverse: bool) -> None:
        check(
            lambda seed: {
                **arguments(5, 7, 17, 33, dtype, bias=bias, seed=seed),
                "reverse": reverse,
            },
        )

    @each_dtype_and_direction
    @pytest.mark.parametrize(
        "batch_sizes",
        [[4], [9, 9, 5, 5, 1], [17, 16, 15, 8, 7, 3, 2, 1], [130, 129, 66, 64, 1]],
        ids=lambda sizes: "-".join(map(str, sizes)),
    )
    def test_batch_sizes(self, batch_sizes: list[int], dtype: torch.dtype, reverse: bool) -> None:
        check(
            lambda seed: {
                **packed_arguments(batch_sizes, 17, 33, dtype, seed),
                "reverse": reverse,
            },
        )

    @each_dtype_and_direction
    @pytest.mark.parametrize("share", [0.2, 1.0], ids=["some", "always"])
    def test_resets(self, share: float, dtype: torch.dtype, reverse: bool) -> None:
        draws = torch.rand(6, 19, generator=torch.Generator().manual_seed(2))
        check(
            lambda seed: {
                **arguments(6, 19, 17, 33, dtype, seed=seed),
                "resets": draws < share,
                "reverse": reverse,
            },
        )

    def test_reset_stops_nan(self) -> None:
        """A state that is dropped does not reach the next episode, not even as 0 * NaN."""
        values = arguments(4, 3, 5, 18)
        values["hx"].fill_(float("nan"))
        resets = torch.zeros(4, 3, dtype=torch.bool)
        resets[0] = True
        output, _ = genkernels.rnn(**values, resets=resets)
        assert torch.equal(output, genkernels.rnn(**{**values, "hx": torch.zeros(3, 18)})[0])

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize(
        "layout", ["transposed", "expanded_t", "expanded_b", "offset", "strided", "scalar"]
    )
    def test_strides(self, layout: str, dtype: torch.dtype) -> None:
        check(
            lambda seed: {
                name: relaid(value, layout)
                for name, value in arguments(5, 6, 16, 24, dtype, seed=seed).items()
            },
        )

    @pytest.mark.parametrize(
        "shape", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (1, 0, 0, 0)], ids=shape_id
    )
    def test_zero_sizes(self, shape: tuple[int, ...]) -> None:
        check(lambda seed: arguments(*shape, seed=seed))

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("place", TENSORS)
    def test_special_values_spread(self, place: str, value: float, dtype: torch.dtype) -> None:
        values = arguments(4, 10, 9, 22, dtype)
        index = {"input": (1, 2, 3), "hx": (2, 5)}.get(place, (20, 3))
        values[place][index[: values[place].dim()]] = value
        check(lambda seed: values, draws=1)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("scale", [1e2, 1e4], ids=str)
    def test_saturated(self, scale: float, dtype: torch.dtype) -> None:
        def draw(seed: int) -> dict[str, Any]:
            values = arguments(4, 10, 9, 18, dtype, seed=seed)
            return {**values, "input": values["input"] * scale}

        # Few states are not saturated, so that it takes more draws to see PyTorch's largest error.
        check(draw, draws=16)

    @pytest.mark.parametrize("index", [0, 1], ids=OUTPUTS)
    def test_gradient_of_one_output(self, index: int) -> None:
        """The other output unused, and an expanded cotangent, as sum() makes it."""

        def only(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor]]:
            return lambda **values: (function(**values)[index].sum(),)

        assert_op_parity(
            only(genkernels.rnn),
            only(plain_rnn),
            only(reference.rnn),
            (OUTPUTS[index],),
            # A sum is a single element: it takes more draws to see PyTorch's largest error.
            *(arguments(3, 9, 7, 18, seed=seed) for seed in range(16)),
        )


class TestGradients:
    @pytest.mark.parametrize("needs", TENSORS)
    def test_one_alone(self, needs: str) -> None:
        """An argument that alone needs its gradient gets the one that it gets beside others."""
        values = arguments(3, 9, 7, 18)
        expected = with_gradients(genkernels.rnn, values)[2 + TENSORS.index(needs)]

        def only(**leaf: Tensor) -> tuple[Tensor, ...]:
            others = {name: value for name, value in values.items() if name != needs}
            return genkernels.rnn(**others, **leaf)

        assert torch.equal(with_gradients(only, {needs: values[needs]})[2], expected)

    @pytest.mark.parametrize("backend", ["cpp", "reference"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"reverse": True},
            {"bias": False},
            {"resets": torch.tensor([[False, True], [True, False], [False, False]])},
            {"batch_sizes": torch.tensor([2, 2, 1])},
            {"batch_sizes": torch.tensor([2, 2, 1]), "reverse": True},
        ],
        ids=lambda options: "-".join(options) or "plain",
    )
    def test_gradcheck(self, options: dict[str, Any], backend: str) -> None:
        options = dict(options)
        values = arguments(3, 2, 3, 2, torch.float64, bias=options.pop("bias", True))
        if "batch_sizes" in options:
            values["input"] = values["input"].flatten(0, 1)[:5]
        leaves = tuple(value.requires_grad_() for value in values.values())

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return genkernels.rnn(*tensors, **options)

        with genkernels.use_backend(backend):
            assert gradcheck(function, leaves, check_batched_grad=backend == "cpp")
            assert gradgradcheck(function, leaves)

    @pytest.mark.parametrize(
        "options",
        [
            {"reverse": True},
            {"resets": torch.eye(3, 2, dtype=torch.bool)},
            {"batch_sizes": torch.tensor([2, 2, 1])},
        ],
        ids="-".join,
    )
    def test_raw_backward_of_the_reference(self, options: dict[str, Any]) -> None:
        """What other devices run is what PyTorch derives from the definition."""
        values = arguments(3, 2, 3, 4, torch.float64)
        if "batch_sizes" in options:
            values["input"] = values["input"].flatten(0, 1)[:5]
        args = raw_arguments("rnn_backward", values=values, states_grad=True, **options)
        actual = rnn_backward(*args)
        expected = torch.ops.genkernels.rnn_backward(*args)
        leaves = [value.requires_grad_() for value in values.values()]
        derived = torch.autograd.grad(reference.rnn(*leaves, **options), leaves, args[:2])
        for index, gradient in enumerate(derived):
            torch.testing.assert_close(actual[index], gradient)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_third_derivative(self) -> None:
        leaves = [v.requires_grad_() for v in arguments(3, 2, 3, 2, torch.float64).values()]

        def third(function: Callable[..., Any]) -> tuple[Tensor, ...]:
            loss = function(*leaves)[0].pow(3).sum()
            for _ in range(2):
                gradients = torch.autograd.grad(loss, leaves, create_graph=True)
                loss = sum((g.sin().sum() for g in gradients), loss.new_zeros(()))
            return torch.autograd.grad(loss, leaves)

        for got, exact in zip(third(genkernels.rnn), third(reference.rnn), strict=True):
            assert exact.abs().max() > 1e-3
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)

    def test_memory_saved(self) -> None:
        """Beside what the op is given anyway, the output alone."""
        values = {name: value.requires_grad_() for name, value in arguments(40, 7, 33, 65).items()}
        given = {value.data_ptr() for value in values.values()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in given:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, _ = genkernels.rnn(**values)
        assert kept == {output.data_ptr(): output.nbytes}

    def test_double_backward_is_counted(self) -> None:
        """It runs the reference, and says so."""
        values = {k: v.requires_grad_() for k, v in arguments(3, 2, 4, 5).items()}
        genkernels.stats(reset=True)
        output, _ = genkernels.rnn(**values)
        (gradient,) = torch.autograd.grad(output.sum(), values["input"], create_graph=True)
        assert genkernels.stats() == {("rnn_forward", "cpp"): 1, ("rnn_backward", "cpp"): 1}
        gradient.square().sum().backward()
        assert ("rnn_backward", "reference") in genkernels.stats(reset=True)


def raw_arguments(op: str, **options: Any) -> tuple[Any, ...]:
    """Arguments of a raw op as the autograd formulas pass them."""
    if "values" in options:
        values = options["values"]
    elif "batch_sizes" in options:
        values = packed_arguments(options["batch_sizes"].tolist(), 5, 6, torch.float32)
    else:
        values = arguments(3, 4, 5, 6, bias=options.get("bias", True))
    inputs = tuple(values.get(name) for name in TENSORS)
    sequence = (options.get("batch_sizes"), options.get("resets"), options.get("reverse", False))
    if op == "rnn_forward":
        return *inputs, *sequence
    output, h_n = torch.ops.genkernels.rnn_forward(*inputs, *sequence)
    cotangents = torch.randn_like(output), torch.randn_like(h_n)
    grads = options.get("grads", (True, True))
    return *cotangents, *inputs, output, *sequence, *grads, options.get("states_grad", False)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("rnn_forward", {}),
        ("rnn_forward", {"bias": False, "reverse": True}),
        ("rnn_forward", {"resets": torch.eye(3, 4, dtype=torch.bool)}),
        ("rnn_forward", {"batch_sizes": torch.tensor([4, 3, 1])}),
        ("rnn_backward", {}),
        ("rnn_backward", {"states_grad": True}),
        ("rnn_backward", {"grads": (False, True)}),
        ("rnn_backward", {"grads": (True, False)}),
        ("rnn_backward", {"bias": False, "reverse": True}),
        ("rnn_backward", {"batch_sizes": torch.tensor([4, 3, 1])}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_opcheck(op: str, options: dict[str, Any]) -> None:
    raw = getattr(torch.ops.genkernels, op).default
    torch.library.opcheck(raw, raw_arguments(op, **options))


@pytest.mark.usefixtures("simd", "two_threads", "compiled_only")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize(
    "values",
    [
        arguments(40, 1, 130, 257),
        arguments(16, 3, 64, 130),
        arguments(9, 65, 96, 160),
        {**arguments(150, 8, 33, 48), "reverse": True},
        {**arguments(30, 20, 40, 72), "resets": torch.arange(600).view(30, 20) % 7 == 0},
        packed_arguments([40, 40, 39, 20, 20, 7, 3, 1, 1], 64, 96, torch.float32),
        arguments(4, 3, 600, 700),
        arguments(1, 9, 130, 257),
    ],
    ids=[
        "one_row",
        "three_rows",
        "many_rows",
        "many_steps",
        "resets",
        "batch_sizes",
        "few_steps",
        "one_step",
    ],
)
def test_bitwise_reproducible(values: dict[str, Any], dtype: torch.dtype) -> None:
    """From run to run, and with one thread as with two."""
    values = {name: value.to(dtype) if name in TENSORS else value for name, value in values.items()}
    first = with_gradients(genkernels.rnn, values)
    for _ in range(2):
        assert_bitwise_equal(with_gradients(genkernels.rnn, values), first)
    torch.set_num_threads(1)
    assert_bitwise_equal(with_gradients(genkernels.rnn, values), first)


class TestTransforms:
    """torch.func: what it returns is what autograd and loops return."""

    values = arguments(3, 4, 5, 6)

    def loss(self, *tensors: Tensor) -> Tensor:
        output, h_n = genkernels.rnn(*tensors)
        return output.square().sum() + h_n.sum()

    def test_grad(self) -> None:
        leaves = [value.clone().requires_grad_() for value in self.values.values()]
        expected = torch.autograd.grad(self.loss(*leaves), leaves)
        actual = torch.func.grad(self.loss, argnums=tuple(range(6)))(*self.values.values())
        assert_bitwise_equal(list(actual), list(expected))

    def test_per_sample_gradients(self) -> None:
        """vmap over grad, the batch of one sample each."""
        input, hx, *weights = self.values.values()

        def loss(input: Tensor, hx: Tensor, weight_ih: Tensor) -> Tensor:
            return self.loss(input[:, None], hx[None], weight_ih, *weights[1:])

        actual = torch.func.vmap(torch.func.grad(loss, argnums=2), (1, 0, None))(
            input, hx, weights[0]
        )
        expected = []
        for b in range(4):
            leaf = weights[0].clone().requires_grad_()
            expected += torch.autograd.grad(loss(input[:, b], hx[b], leaf), leaf)
        assert_bitwise_equal([actual], [torch.stack(expected)])

    def test_jvp(self) -> None:
        """Forward mode raises in the kernel, and runs in the reference."""
        values = tuple(value.double() for value in self.values.values())
        tangents = tuple(map(torch.ones_like, values))
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(genkernels.rnn, values, tangents)
        with genkernels.use_backend("reference"):
            _, (tangent, _) = torch.func.jvp(genkernels.rnn, values, tangents)
        moved = [
            reference.rnn(*(v + e * t for v, t in zip(values, tangents, strict=True)))[0]
            for e in (1e-5, -1e-5)
        ]
        torch.testing.assert_close(tangent, (moved[0] - moved[1]) / 2e-5)


class TestAutocast:
    def test_bfloat16(self) -> None:
        """The kernel computes in bfloat16; results and gradients come back in float32."""
        values = arguments(5, 7, 17, 33)
        genkernels.stats(reset=True)
        with torch.autocast("cpu", torch.bfloat16):
            actual = with_gradients(genkernels.rnn, values)
        assert genkernels.stats(reset=True) == {
            ("rnn_forward", "cpp"): 1,
            ("rnn_backward", "cpp"): 1,
        }
        narrow = {name: value.bfloat16() for name, value in values.items()}
        expected = with_gradients(genkernels.rnn, narrow)
        assert {tensor.dtype for tensor in actual} == {torch.float32}
        # The cotangents of `expected` are rounded to bfloat16 by the caller, of `actual` by the op.
        assert_bitwise_equal(actual, [tensor.float() for tensor in expected])


class TestCompile:
    @each_direction
    def test_dynamic_without_recompiling(self, reverse: bool) -> None:
        """One graph for all T and B, forward and backward."""

        def function(**values: Tensor) -> tuple[Tensor, ...]:
            output, h_n = genkernels.rnn(**values, reverse=reverse)
            return output * 2, h_n

        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        with_gradients(compiled, arguments(5, 3, 6, 8))
        with torch.compiler.set_stance("fail_on_recompile"):
            for steps, batch in ((7, 4), (2, 9)):
                values = arguments(steps, batch, 6, 8)
                assert_bitwise_equal(
                    with_gradients(compiled, values), with_gradients(function, values)
                )

    def test_batch_sizes(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(genkernels.rnn, backend="aot_eager", fullgraph=True)
        values = packed_arguments([4, 3, 3, 1], 6, 8, torch.float32)
        assert_bitwise_equal(
            with_gradients(compiled, values), with_gradients(genkernels.rnn, values)
        )


class TestErrors:
    """Wrong arguments raise, and say which argument and what shapes."""

    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("input", lambda t: t[:0], [r"\[0, 4, 5\]"]),
            ("input", lambda t: t[:, :3], [r"\[3, 3, 5\]", r"\[3, 4, 5\]"]),
            ("hx", lambda t: t[None], [r"\[1, 4, 6\]"]),
            ("weight_ih", lambda t: t[:, :4], [r"\[6, 4\]", r"\[6, 5\]"]),
            ("weight_hh", lambda t: t[:-1], [r"\[5, 6\]", r"\[6, 6\]"]),
            ("bias_ih", lambda t: t[:-1], [r"\[5\]", r"\[6\]"]),
            ("bias_hh", lambda t: None, ["bias_ih"]),
            ("hx", lambda t: t.double(), ["float64", "float32"]),
        ],
        ids=["no_steps", "batch", "hx", "columns", "rows", "bias_ih", "one_bias", "dtype"],
    )
    @pytest.mark.parametrize("mode", ["eager", "fake"])
    def test_argument(
        self, name: str, change: Callable[[Tensor], Any], words: list[str], mode: str
    ) -> None:
        values = arguments(3, 4, 5, 6)
        values[name] = change(values[name])
        if mode == "fake":
            fake = torch._subclasses.FakeTensorMode()
            values = {k: v if v is None else fake.from_tensor(v) for k, v in values.items()}
        with pytest.raises(RuntimeError, match=name) as caught:
            genkernels.rnn(**values)
        for word in ("genkernels.rnn", *words):
            assert caught.match(word)

    @pytest.mark.parametrize("op", ["rnn_forward", "rnn_backward"])
    def test_raw_op_reads_within_bounds(self, op: str) -> None:
        """A raw call has no Python check in front: each tensor cut short must still raise."""
        raw = getattr(torch.ops.genkernels, op)
        full = raw_arguments(op)
        for index, value in enumerate(full):
            if isinstance(value, Tensor):
                cut = [*full[:index], value[..., :-1], *full[index + 1 :]]
                with pytest.raises(RuntimeError, match=r"expected"):
                    raw(*cut)


def test_explain() -> None:
    """On a GPU there is no kernel for it, and explain says so."""
    values = arguments(3, 4, 5, 6)
    assert genkernels.explain(genkernels.rnn, **values).backend == "cpp"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(3, 4, 5, device="cuda")
    explanation = genkernels.explain("rnn", on_gpu)
    assert explanation.backend == "reference"
    assert "no Triton kernel" in explanation.reasons["triton"]
    assert "on cuda" in explanation.reasons["cpp"]
