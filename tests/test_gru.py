"""genkernels.gru: outputs and gradients against PyTorch's, and all that PyTorch does with an op."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_op_parity, assert_parity
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import genkernels
from genkernels import reference

OUTPUTS = ("output", "h_n")
TENSORS = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129)

# Every size once in each of B, I and H per round, the rounds shifted against each other so that
# sizes meet in new pairs; T goes round in short steps, because each is one pass of a Python loop.
EDGE_SHAPES = [
    (
        (1, 2, 3, 5, 8)[(i + shift) % 5],
        SIZES[(3 * i + shift) % 14],
        SIZES[(5 * i + 4 * shift) % 14],
        SIZES[i],
    )
    for shift in (0, 1, 2)
    for i in range(14)
]
LONG_SHAPES = [
    (129, 1, 3, 7),
    (127, 2, 17, 16),
    (65, 9, 8, 33),
    (33, 65, 1, 2),  # more rows than one block of the backward pass holds
    (3, 5, 300, 270),  # more columns than one chain of sums
    (6, 1, 260, 513),
    (4, 100, 64, 128),
]
# Of whole registers, and of more rows than a block of the backward pass or a chain of sums has.
WHOLE_SHAPES = [
    (9, 70, 32, 48),
    (3, 130, 16, 16),
    (2, 600, 48, 32),
    (40, 40, 80, 128),
    (1, 40, 32, 16),
]


def plain_gru(
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
    """The same computed by torch.gru, and by torch.gru_cell where hidden states are reset."""
    if resets is not None:
        h, outputs = hx, {}
        for t in reversed(range(len(input))) if reverse else range(len(input)):
            h = torch.where(resets[t, :, None], 0, h)
            h = torch.gru_cell(input[t], h, weight_ih, weight_hh, bias_ih, bias_hh)
            outputs[t] = h
        return torch.stack([outputs[t] for t in range(len(input))]), h.clone()
    has_biases = bias_ih is not None
    weights = [weight_ih, weight_hh, *((bias_ih, bias_hh) if has_biases else ())]
    if batch_sizes is None:
        x = input.flip(0) if reverse else input
        output, h_n = torch.gru(x, hx[None], weights, has_biases, 1, 0.0, False, False, False)
        return output.flip(0) if reverse else output, h_n[0]
    # torch.gru runs a packed sequence backwards only as the second direction of two.
    both = 1 + reverse
    output, h_n = torch.gru(
        input,
        batch_sizes,
        hx.expand(both, -1, -1),
        weights * both,
        has_biases,
        1,
        0.0,
        False,
        reverse,
    )
    return output.chunk(both, -1)[-1], h_n[-1]


def arguments(
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    seed: int = 0,
    gates: int = 3,
) -> dict[str, Any]:
    """Arguments of gru, or of a cell of other gates, at the scale that nn.GRU starts from."""
    generator = torch.Generator().manual_seed(seed)
    bound = hidden_size**-0.5 if hidden_size else 0.0

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)

    values = {
        "input": torch.randn(steps, batch, input_size, generator=generator).to(dtype),
        "hx": torch.randn(batch, hidden_size, generator=generator).to(dtype),
        "weight_ih": uniform(gates * hidden_size, input_size),
        "weight_hh": uniform(gates * hidden_size, hidden_size),
    }
    if bias:
        values |= {"bias_ih": uniform(gates * hidden_size), "bias_hh": uniform(gates * hidden_size)}
    return values


def packed_arguments(
    batch_sizes: list[int],
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    seed: int = 0,
    gates: int = 3,
) -> dict[str, Any]:
    """The same for a packed sequence."""
    values = arguments(1, batch_sizes[0], input_size, hidden_size, dtype, seed=seed, gates=gates)
    generator = torch.Generator().manual_seed(seed + 1)
    values["input"] = torch.randn(sum(batch_sizes), input_size, generator=generator).to(dtype)
    return {**values, "batch_sizes": torch.tensor(batch_sizes)}


def check(
    draw: Callable[[int], dict[str, Any]], draws: int = 4, op: Callable[..., Any] = genkernels.gru
) -> None:
    assert_op_parity(op, plain_gru, reference.gru, OUTPUTS, *map(draw, range(draws)))


def with_gradients(function: Callable[..., Any], values: dict[str, Any]) -> list[Tensor]:
    """Outputs and all gradients along fixed cotangents."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = function(**{**values, **leaves})
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def assert_bitwise_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"result {index} of {len(expected)} differs"


def shape_id(shape: tuple[int, ...]) -> str:
    return "T{}-B{}-I{}-H{}".format(*shape)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
each_of_whole_registers = pytest.mark.parametrize(
    ("shape", "dtype"),
    list(itertools.product(WHOLE_SHAPES, [torch.float32, torch.float64])),
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else dtype_id(value),
)
each_dtype_and_direction = pytest.mark.parametrize(
    ("reverse", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16), (False, torch.float64)],
    ids=lambda value: ("reverse" if value else "forward") if value in (0, 1) else dtype_id(value),
)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_reference_is_torch_gru(bias: bool) -> None:
    """The definition that kernels are held to is held to torch's, bit for bit over one step."""
    values = arguments(1, 3, 5, 4, torch.float64, bias=bias)
    assert_bitwise_equal(list(reference.gru(**values)), list(plain_gru(**values)))


@pytest.mark.usefixtures("poisoned_memory", "compiled_only", "simd", "one_thread")
class TestParity:
    """The one rule, at every SIMD level, in memory full of NaN, in the compiled kernel alone."""

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [(shape, dtype) for shape in EDGE_SHAPES for dtype in DTYPES[:2]]
        + [(shape, torch.float64) for shape in EDGE_SHAPES[::3]]
        + [(shape, dtype) for shape in LONG_SHAPES for dtype in DTYPES],
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
    @pytest.mark.parametrize("shape", [(5, 7, 17, 33), (4, 19, 33, 16)], ids=shape_id)
    @pytest.mark.parametrize(
        ("bias", "reverse"),
        [(False, False), (True, True), (False, True)],
        ids=["no_bias", "reverse", "no_bias_reverse"],
    )
    def test_options(
        self, shape: tuple[int, ...], dtype: torch.dtype, bias: bool, reverse: bool
    ) -> None:
        check(
            lambda seed: {**arguments(*shape, dtype, bias=bias, seed=seed), "reverse": reverse},
        )

    @each_dtype_and_direction
    @pytest.mark.parametrize(
        "batch_sizes",
        [[4], [1, 1, 1], [9, 9, 5, 5, 1], [17, 16, 15, 8, 7, 3, 2, 1], [130, 129, 66, 64, 1]],
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
    @pytest.mark.parametrize("share", [0.0, 0.2, 1.0], ids=["never", "some", "always"])
    def test_resets(self, share: float, dtype: torch.dtype, reverse: bool) -> None:
        draws = torch.rand(6, 19, generator=torch.Generator().manual_seed(2))
        check(
            lambda seed: {
                **arguments(6, 19, 17, 33, dtype, seed=seed),
                "resets": draws < share,
                "reverse": reverse,
            },
        )

    @each_dtype_and_direction
    @pytest.mark.parametrize(
        "options",
        [
            {"shape": (1, 1, 5, 18)},
            {"shape": (1, 40, 17, 33)},
            {"shape": (3, 5, 7, 18)},
            {"shape": (33, 40, 17, 33)},  # gates of several blocks of rows
            {"shape": (6, 19, 17, 33), "resets": torch.arange(6 * 19).view(6, 19) % 5 == 0},
            {"batch_sizes": [130, 129, 129, 129, 66, 64, 1]},
        ],
        ids=["one_row", "one_step", "few_rows", "blocks", "resets", "batch_sizes"],
    )
    def test_recompute(self, options: dict[str, Any], dtype: torch.dtype, reverse: bool) -> None:
        def draw(seed: int) -> dict[str, Any]:
            if "batch_sizes" in options:
                return packed_arguments(options["batch_sizes"], 17, 33, dtype, seed)
            values = arguments(*options["shape"], dtype, seed=seed)
            return {**values, "resets": options["resets"]} if "resets" in options else values

        check(
            lambda seed: {**draw(seed), "reverse": reverse},
            op=functools.partial(genkernels.gru, recompute=True),
        )

    def test_reset_stops_nan(self) -> None:
        """A state that is dropped does not reach the next episode, not even as 0 * NaN."""
        values = arguments(4, 3, 5, 18)
        values["hx"].fill_(float("nan"))
        resets = torch.zeros(4, 3, dtype=torch.bool)
        resets[0] = True
        output, _ = genkernels.gru(**values, resets=resets)
        assert torch.equal(output, genkernels.gru(**{**values, "hx": torch.zeros(3, 18)})[0])

    @each_dtype
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

    def test_no_rows_of_an_expanded_input(self) -> None:
        """Its steps lie as far apart as no rows take."""

        def draw(seed: int) -> dict[str, Any]:
            values = arguments(5, 0, 32, 16, seed=seed)
            return values | {"input": values["input"][:1].expand(5, 0, 32)}

        check(draw, draws=1)

    @each_dtype
    @pytest.mark.parametrize(
        "shape", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (1, 0, 0, 0)], ids=shape_id
    )
    def test_zero_sizes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check(lambda seed: arguments(*shape, dtype, seed=seed))

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("place", TENSORS)
    def test_special_values_spread(self, place: str, value: float, dtype: torch.dtype) -> None:
        values = arguments(4, 10, 9, 18, dtype)
        index = {"input": (1, 2, 3), "hx": (2, 5)}.get(place, (20, 3))
        values[place][index[: values[place].dim()]] = value
        check(lambda seed: values, draws=1)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("scale", [1e2, 1e4], ids=str)
    def test_saturated_gates(self, scale: float, dtype: torch.dtype) -> None:
        def draw(seed: int) -> dict[str, Any]:
            values = arguments(4, 10, 9, 18, dtype, seed=seed)
            return {**values, "input": values["input"] * scale}

        # Few gates are not saturated, so that it takes more draws to see PyTorch's largest error.
        check(draw, draws=16)

    @pytest.mark.parametrize("index", [0, 1], ids=OUTPUTS)
    def test_gradient_of_one_output(self, index: int) -> None:
        """The other output unused, and an expanded cotangent, as sum() makes it."""

        def only(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor]]:
            return lambda **values: (function(**values)[index].sum(),)

        assert_op_parity(
            only(genkernels.gru),
            only(plain_gru),
            only(reference.gru),
            (OUTPUTS[index],),
            # A sum is a single element: it takes more draws to see PyTorch's largest error.
            *(arguments(3, 9, 7, 18, seed=seed) for seed in range(16)),
        )


def relaid(value: Tensor, layout: str) -> Tensor:
    """A tensor in another memory layout; its values are repeated where elements share memory."""
    if layout == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded_t":
        return value[:1].expand_as(value)
    if layout == "expanded_b":
        return value[..., :1, :].expand_as(value) if value.dim() > 1 else value
    if layout == "scalar":
        return value.flatten()[0].expand_as(value)
    if layout == "offset":
        larger = value.new_full([size + 3 for size in value.shape], float("nan"))
        return larger[(slice(1, -2),) * value.dim()].copy_(value)
    assert layout == "strided"
    return torch.stack([value, torch.full_like(value, float("nan"))], -1)[..., 0]


class TestGradients:
    @pytest.mark.parametrize("needs", TENSORS)
    def test_one_alone(self, needs: str) -> None:
        """An argument that alone needs its gradient gets the one that it gets beside others."""
        values = arguments(3, 9, 7, 18)
        expected = with_gradients(genkernels.gru, values)[2 + TENSORS.index(needs)]

        def only(**leaf: Tensor) -> tuple[Tensor, ...]:
            others = {name: value for name, value in values.items() if name != needs}
            return genkernels.gru(**others, **leaf)

        assert torch.equal(with_gradients(only, {needs: values[needs]})[2], expected)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"reverse": True},
            {"bias": False},
            {"resets": torch.tensor([[False, True], [True, False], [False, False]])},
            {"batch_sizes": torch.tensor([2, 2, 1])},
            {"batch_sizes": torch.tensor([2, 2, 1]), "reverse": True},
            {"recompute": True},
            {"recompute": True, "batch_sizes": torch.tensor([2, 2, 1])},
        ],
        ids=lambda options: "-".join(options) or "plain",
    )
    def test_gradcheck(self, options: dict[str, Any]) -> None:
        options = dict(options)
        values = arguments(3, 2, 3, 2, torch.float64, bias=options.pop("bias", True))
        if "batch_sizes" in options:
            values["input"] = values["input"].flatten(0, 1)[:5]
        leaves = tuple(value.requires_grad_() for value in values.values())

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return genkernels.gru(*tensors, **options)

        assert gradcheck(function, leaves, check_batched_grad=True)
        assert gradgradcheck(function, leaves)

    @pytest.mark.parametrize("op", ["gru", "gru_cell"])
    def test_third_derivative(self, op: str) -> None:
        values = arguments(3, 2, 3, 2, torch.float64)
        if op == "gru_cell":
            values["input"] = values["input"][0]
        leaves = [value.requires_grad_() for value in values.values()]

        def third(function: Callable[..., Any]) -> tuple[Tensor, ...]:
            result = function(*leaves)
            loss = (result if op == "gru_cell" else result[0]).pow(3).sum()
            for _ in range(2):
                gradients = torch.autograd.grad(loss, leaves, create_graph=True)
                loss = sum((g.sin().sum() for g in gradients), loss.new_zeros(()))
            return torch.autograd.grad(loss, leaves)

        actual, expected = third(getattr(genkernels, op)), third(getattr(reference, op))
        for got, exact in zip(actual, expected, strict=True):
            assert exact.abs().max() > 1e-3
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("recompute", "most"), [(True, 1.2), (False, 5.0)])
    @pytest.mark.parametrize("shape", [(40, 7, 33, 65), (5, 1, 9, 300)], ids=shape_id)
    def test_memory_saved(self, shape: tuple[int, ...], recompute: bool, most: float) -> None:
        """Beside what the op is given anyway, as a multiple of the output."""
        values = {name: value.requires_grad_() for name, value in arguments(*shape).items()}
        given = {value.data_ptr() for value in values.values()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in given:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, _ = genkernels.gru(**values, recompute=recompute)
        assert 0 < sum(kept.values()) <= most * output.nbytes

    def test_double_backward_is_counted(self) -> None:
        """It runs the reference, and says so."""
        values = {k: v.requires_grad_() for k, v in arguments(3, 2, 4, 5).items()}
        genkernels.stats(reset=True)
        output, _ = genkernels.gru(**values)
        (gradient,) = torch.autograd.grad(output.sum(), values["input"], create_graph=True)
        assert genkernels.stats() == {("gru_forward", "cpp"): 1, ("gru_backward", "cpp"): 1}
        gradient.square().sum().backward()
        assert ("gru_backward", "reference") in genkernels.stats(reset=True)

    def test_gradient_penalty(self) -> None:
        """Second derivatives as WGAN-GP takes them, in float32."""

        def penalty(function: Callable[..., Any]) -> Callable[..., tuple[Tensor]]:
            def of(**values: Tensor) -> tuple[Tensor]:
                score = function(**values)[0].square().sum()
                (gradient,) = torch.autograd.grad(score, values["input"], create_graph=True)
                return ((gradient.norm(dim=-1) - 1).square().mean(),)

            return of

        assert_op_parity(
            penalty(genkernels.gru),
            penalty(plain_gru),
            penalty(reference.gru),
            ("penalty",),
            arguments(4, 6, 9, 18),
        )


def raw_arguments(op: str, **options: Any) -> tuple[Any, ...]:
    """Arguments of a raw op as the autograd formulas pass them."""
    bias = options.pop("bias", True)
    grads = options.pop("grads", (True, True))
    if op.startswith("gru_cell"):
        values = arguments(1, 4, 5, 6, bias=bias)
        values["input"] = values["input"][0]
    elif "batch_sizes" in options:
        values = packed_arguments(options["batch_sizes"].tolist(), 5, 6, torch.float32)
        del values["batch_sizes"]
    else:
        values = arguments(3, 4, 5, 6, bias=bias)
    inputs = tuple(values.get(name) for name in TENSORS)
    if op == "gru_cell_forward":
        return *inputs, True, None
    if op == "gru_cell_backward":
        h, gates = torch.ops.genkernels.gru_cell_forward(*inputs, True, None)
        return torch.randn_like(h), *inputs, gates, *grads
    sequence = (options.get("batch_sizes"), options.get("resets"), options.get("reverse", False))
    if op == "gru_forward":
        packed = torch.ops.genkernels.gru_pack(*inputs[2:]) if options.get("packs") else None
        return *inputs, *sequence, options.get("save_gates", True), packed
    save_gates = options.get("save_gates", True)
    output, h_n, gates = torch.ops.genkernels.gru_forward(*inputs, *sequence, save_gates, None)
    cotangents = torch.randn_like(output), torch.randn_like(h_n)
    return *cotangents, *inputs, output, gates, *sequence, *grads, options.get("states_grad", False)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("gru_forward", {}),
        ("gru_forward", {"save_gates": False}),
        ("gru_forward", {"packs": True}),
        ("gru_forward", {"bias": False, "reverse": True}),
        ("gru_forward", {"resets": torch.eye(3, 4, dtype=torch.bool)}),
        ("gru_forward", {"batch_sizes": torch.tensor([4, 3, 1])}),
        ("gru_backward", {}),
        ("gru_backward", {"states_grad": True}),
        ("gru_backward", {"save_gates": False}),
        ("gru_backward", {"grads": (False, True)}),
        ("gru_backward", {"grads": (True, False)}),
        ("gru_backward", {"grads": (False, False)}),
        ("gru_backward", {"bias": False, "reverse": True}),
        ("gru_backward", {"resets": torch.eye(3, 4, dtype=torch.bool)}),
        ("gru_backward", {"batch_sizes": torch.tensor([4, 3, 1])}),
        ("gru_cell_forward", {}),
        ("gru_cell_forward", {"bias": False}),
        ("gru_cell_backward", {}),
        ("gru_cell_backward", {"bias": False, "grads": (False, True)}),
        ("gru_cell_backward", {"grads": (True, False)}),
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
        {**arguments(20, 5, 40, 72), "recompute": True},
        {**arguments(20, 50, 40, 72), "recompute": True},
        arguments(1, 9, 130, 257),
    ],
    ids=[
        "one_row",
        "three_rows",
        "many_rows",
        "many_steps",
        "resets",
        "batch_sizes",
        "recompute_few",
        "recompute",
        "one_step",
    ],
)
def test_bitwise_reproducible(values: dict[str, Any], dtype: torch.dtype) -> None:
    """From run to run, and with one thread as with two."""
    values = {name: value.to(dtype) if name in TENSORS else value for name, value in values.items()}
    first = with_gradients(genkernels.gru, values)
    for _ in range(3):
        assert_bitwise_equal(with_gradients(genkernels.gru, values), first)
    torch.set_num_threads(1)
    assert_bitwise_equal(with_gradients(genkernels.gru, values), first)


class TestTransforms:
    """torch.func: what it returns is what autograd and loops return."""

    values = arguments(3, 4, 5, 6)

    def loss(self, *tensors: Tensor) -> Tensor:
        output, h_n = genkernels.gru(*tensors)
        return output.square().sum() + h_n.sum()

    def test_grad(self) -> None:
        leaves = [value.clone().requires_grad_() for value in self.values.values()]
        expected = torch.autograd.grad(self.loss(*leaves), leaves)
        actual = torch.func.grad(self.loss, argnums=tuple(range(6)))(*self.values.values())
        assert_bitwise_equal(list(actual), list(expected))

    def test_nested_grad(self) -> None:
        leaves = [value.clone().requires_grad_() for value in self.values.values()]
        (first,) = torch.autograd.grad(self.loss(*leaves), leaves[0], create_graph=True)
        # torch.func records its second derivatives too, so that a third could be taken.
        (expected,) = torch.autograd.grad(first.square().sum(), leaves[0], create_graph=True)

        def outer(input: Tensor) -> Tensor:
            others = list(self.values.values())[1:]
            return torch.func.grad(self.loss)(input, *others).square().sum()

        actual = torch.func.grad(outer)(self.values["input"])
        assert_bitwise_equal([actual], [expected])

    @pytest.mark.parametrize("mapped", ["inputs", "everything"])
    def test_vmap(self, mapped: str) -> None:
        draws = [arguments(3, 4, 5, 6, seed=seed) for seed in range(3)]
        if mapped == "inputs":
            draws = [{**draws[0], "input": d["input"], "hx": d["hx"]} for d in draws]
        in_dims = tuple(0 if mapped == "everything" or i < 2 else None for i in range(6))
        stacked = [
            torch.stack([d[name] for d in draws]) if dim == 0 else draws[0][name]
            for name, dim in zip(TENSORS, in_dims, strict=True)
        ]
        expected = [torch.stack(o) for o in zip(*(plain_gru(**d) for d in draws), strict=True)]
        exact = [
            torch.stack(o)
            for o in zip(
                *(reference.gru(**{k: v.double() for k, v in d.items()}) for d in draws),
                strict=True,
            )
        ]
        actual = torch.func.vmap(genkernels.gru, in_dims)(*stacked)
        for name, *tensors in zip(OUTPUTS, actual, expected, exact, strict=True):
            assert_parity(name, *tensors)

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

    def test_grad_of_vmap(self) -> None:
        input, hx, *weights = self.values.values()

        def loss(weight_ih: Tensor) -> Tensor:
            def one(input: Tensor, hx: Tensor) -> Tensor:
                return genkernels.gru(input[:, None], hx[None], weight_ih, *weights[1:])[0]

            return torch.func.vmap(one, (1, 0))(input, hx).square().sum()

        def looped(weight_ih: Tensor) -> Tensor:
            return sum(
                genkernels.gru(input[:, b, None], hx[b, None], weight_ih, *weights[1:])[0]
                .square()
                .sum()
                for b in range(4)
            )

        def in_dtype(function: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.func.grad(function)(weights[0])

        def plain(weight_ih: Tensor) -> Tensor:
            return plain_gru(input, hx, weight_ih, *weights[1:])[0].square().sum()

        def exact(weight_ih: Tensor) -> Tensor:
            tensors = [t.double() for t in (input, hx, *weights[1:])]
            return reference.gru(*tensors[:2], weight_ih, *tensors[2:])[0].square().sum()

        assert_parity(
            "grad of weight_ih",
            in_dtype(loss),
            in_dtype(plain),
            torch.func.grad(exact)(weights[0].double()),
        )
        assert_parity(
            "grad of weight_ih, looped",
            in_dtype(looped),
            in_dtype(plain),
            torch.func.grad(exact)(weights[0].double()),
        )

    def test_jvp_raises(self) -> None:
        values = tuple(self.values.values())
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(genkernels.gru, values, tuple(map(torch.ones_like, values)))

    def test_forward_ad_raises(self) -> None:
        """A dual tensor that needs no gradient: an op without a rule would drop its tangent."""
        input, *others = self.values.values()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
            with pytest.raises(NotImplementedError, match="forward mode"):
                genkernels.gru(dual, *others)


class TestAutocast:
    def test_bfloat16(self) -> None:
        """The kernel computes in bfloat16; results and gradients come back in float32."""
        values = arguments(5, 7, 17, 33)
        genkernels.stats(reset=True)
        with torch.autocast("cpu", torch.bfloat16):
            actual = with_gradients(genkernels.gru, values)
        assert genkernels.stats(reset=True) == {
            ("gru_forward", "cpp"): 1,
            ("gru_backward", "cpp"): 1,
        }
        narrow = {name: value.bfloat16() for name, value in values.items()}
        expected = with_gradients(genkernels.gru, narrow)
        assert {tensor.dtype for tensor in actual} == {torch.float32}
        # The cotangents of `expected` are rounded to bfloat16 by the caller, of `actual` by the op.
        assert_bitwise_equal(actual, [tensor.float() for tensor in expected])

    def test_float16_is_not_bfloat16(self) -> None:
        """The dtype is autocast's, not one fixed at registration."""
        values = arguments(5, 7, 17, 33)
        with genkernels.use_backend("reference"), torch.autocast("cpu", torch.float16):
            output, _ = genkernels.gru(**values)
        narrow = {name: value.half() for name, value in values.items()}
        assert torch.equal(output, reference.gru(**narrow)[0].float())

    def test_float64_stays(self) -> None:
        values = arguments(5, 7, 17, 33, torch.float64)
        expected = genkernels.gru(**values)
        with torch.autocast("cpu", torch.bfloat16):
            actual = genkernels.gru(**values)
        assert_bitwise_equal(list(actual), list(expected))


class TestCompile:
    @each_direction
    def test_dynamic_without_recompiling(self, reverse: bool) -> None:
        """One graph for all T and B, forward and backward."""

        def function(**values: Tensor) -> tuple[Tensor, ...]:
            output, h_n = genkernels.gru(**values, reverse=reverse)
            return output * 2, h_n

        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        with_gradients(compiled, arguments(5, 3, 6, 8))
        with torch.compiler.set_stance("fail_on_recompile"):
            for steps, batch in ((7, 4), (2, 9), (11, 2)):
                values = arguments(steps, batch, 6, 8)
                assert_bitwise_equal(
                    with_gradients(compiled, values), with_gradients(function, values)
                )

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        values = arguments(5, 3, 6, 8)
        compiled = torch.compile(genkernels.gru, fullgraph=True)
        assert_bitwise_equal(
            with_gradients(compiled, values), with_gradients(genkernels.gru, values)
        )

    def test_batch_sizes(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(genkernels.gru, backend="aot_eager", fullgraph=True)
        values = packed_arguments([4, 3, 3, 1], 6, 8, torch.float32)
        assert_bitwise_equal(
            with_gradients(compiled, values), with_gradients(genkernels.gru, values)
        )

    def test_export(self) -> None:
        class Model(torch.nn.Module):
            def forward(self, input: Tensor, hx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
                return genkernels.gru(input, hx, *weights)

        steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
        program = torch.export.export(
            Model(),
            tuple(arguments(3, 4, 5, 6).values()),
            dynamic_shapes=({0: steps, 1: batch}, {0: batch}, (None,) * 4),
        )
        values = arguments(7, 2, 5, 6)
        actual = program.module()(*values.values())
        assert_bitwise_equal(list(actual), list(genkernels.gru(**values)))


class TestErrors:
    """Wrong arguments raise what torch.nn.GRU raises, and say which argument and what shapes."""

    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("input", lambda t: t[0, 0], [r"\[5\]"]),
            ("input", lambda t: t[:0], [r"\[0, 4, 5\]"]),
            ("input", lambda t: t[:, :3], [r"\[3, 3, 5\]", r"\[3, 4, 5\]"]),
            ("hx", lambda t: t[None], [r"\[1, 4, 6\]"]),
            ("weight_ih", lambda t: t[:, :4], [r"\[18, 4\]", r"\[18, 5\]"]),
            ("weight_ih", lambda t: t[:-1], [r"\[17, 5\]", r"\[18, 5\]"]),
            ("weight_hh", lambda t: t.t(), [r"\[6, 18\]", r"\[18, 6\]"]),
            ("bias_ih", lambda t: t[:-1], [r"\[17\]", r"\[18\]"]),
            ("bias_hh", lambda t: t[None], [r"\[1, 18\]", r"\[18\]"]),
            ("bias_hh", lambda t: None, ["bias_ih"]),
            ("hx", lambda t: t.double(), ["float64", "float32"]),
            ("weight_hh", lambda t: t.bfloat16(), ["bfloat16", "float32"]),
        ],
        ids=[
            "input_1d",
            "no_steps",
            "input_batch",
            "hx_3d",
            "weight_ih_columns",
            "weight_ih_rows",
            "weight_hh",
            "bias_ih",
            "bias_hh",
            "one_bias",
            "hx_dtype",
            "weight_dtype",
        ],
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
            genkernels.gru(**values)
        for word in words:
            assert caught.match(word)

    @pytest.mark.parametrize(
        "sizes",
        [[], [3, 4], [4, 3], [4, 4, 1], [4, 0, 4], [4, -1, 5], [5, 3], [4, 3, 2]],
        ids=str,
    )
    def test_batch_sizes(self, sizes: list[int]) -> None:
        values = packed_arguments([4, 3, 1], 5, 6, torch.float32)
        values["batch_sizes"] = torch.tensor(sizes, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="batch_sizes"):
            genkernels.gru(**values)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("batch_sizes", torch.tensor([4, 3, 1], dtype=torch.int32)),
            ("batch_sizes", torch.tensor([[4, 3, 1]])),
            ("resets", torch.zeros(3, 4)),
            ("resets", torch.zeros(4, 3, dtype=torch.bool)),
            ("resets", torch.zeros(3, 4, dtype=torch.bool, device="meta")),
        ],
        ids=[
            "batch_sizes_dtype",
            "batch_sizes_2d",
            "resets_dtype",
            "resets_shape",
            "resets_device",
        ],
    )
    def test_option(self, name: str, value: Tensor) -> None:
        values = (
            packed_arguments([4, 3, 1], 5, 6, torch.float32)
            if name == "batch_sizes"
            else arguments(3, 4, 5, 6)
        )
        with pytest.raises(RuntimeError, match=name):
            genkernels.gru(**{**values, name: value})

    @pytest.mark.parametrize("backend", ["cpp", "reference"])
    def test_no_steps_of_a_packed_sequence(self, backend: str) -> None:
        values = packed_arguments([4, 3, 1], 5, 6, torch.float32)
        values["input"], values["batch_sizes"] = values["input"][:0], values["batch_sizes"][:0]
        with (
            genkernels.use_backend(backend),
            pytest.raises(RuntimeError, match="batch_sizes: expected a sequence length"),
        ):
            genkernels.gru(**values)

    @pytest.mark.parametrize("op", ["gru_forward", "gru_backward"])
    def test_raw_op_without_steps(self, op: str) -> None:
        full = list(raw_arguments(op))
        # T of 0 in every tensor that has the steps first.
        cut = [a[:0] if isinstance(a, Tensor) and a.dim() == 3 else a for a in full]
        with pytest.raises(RuntimeError, match="sequence length"):
            getattr(torch.ops.genkernels, op)(*cut)

    @pytest.mark.parametrize("op", ["gru_forward", "gru_backward"])
    def test_raw_op_reads_within_bounds(self, op: str) -> None:
        """A raw call has no Python check in front: each tensor cut short must still raise."""
        raw = getattr(torch.ops.genkernels, op)
        full = raw_arguments(op)
        for index, value in enumerate(full):
            if isinstance(value, Tensor):
                cut = [*full[:index], value[..., :-1], *full[index + 1 :]]
                with pytest.raises(RuntimeError, match=r"expected"):
                    raw(*cut)


@pytest.mark.usefixtures("simd", "one_thread", "compiled_only")
class TestMath:
    """Sigmoid and tanh, seen through a cell whose other parts are 0 or 1: 2.1 units in the last
    place at most over all of float32, sampled."""

    every = torch.arange(0, 0x7F800000, 1009, dtype=torch.int32).view(torch.float32)  # 0 to 3e38

    @staticmethod
    def cell(x: Tensor, gate: int, hx: float, bias_z: float) -> Tensor:
        weight_ih = torch.zeros(3, 1)
        weight_ih[gate] = 1
        bias = torch.tensor([0.0, bias_z, 0.0])
        state = torch.full((len(x), 1), hx)
        none = torch.zeros(3)
        return genkernels.gru_cell(x[:, None], state.float(), weight_ih, none[:, None], bias, none)[
            :, 0
        ]

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("function", ["sigmoid", "tanh"])
    def test_units_in_the_last_place(self, function: str, sign: int) -> None:
        x = sign * self.every
        # With n = 0 and h = 1 the new state is z, with z = 0 it is n.
        actual = self.cell(x, 1, 1, 0) if function == "sigmoid" else self.cell(x, 2, 0, -1e4)
        exact = getattr(torch, function)(x.double())
        normal = exact.abs().clamp_min(torch.finfo(torch.float32).tiny)
        unit = torch.exp2(normal.log2().floor() - 23)
        errors = (actual.double() - exact).abs() / unit
        errors[exact.abs() < torch.finfo(torch.float32).tiny] -= 2**23  # may be 0 there
        assert errors.max() < 2.1
        assert (actual[x.abs() > 105] == exact[x.abs() > 105].float()).all()


BARRIER = """
import torch, genkernels
torch.set_num_threads({threads})
leaves = [torch.randn(s, requires_grad=True) for s in ((50, 3, 64), (3, 96), (288, 64), (288, 96))]
def run():
    outputs = genkernels.gru(*leaves)
    return [*outputs, *torch.autograd.grad(outputs[0].sum(), leaves)]
actual = run()
torch.set_num_threads(1)
assert all(torch.equal(a, b) for a, b in zip(actual, run(), strict=True))
"""


@pytest.mark.parametrize(
    ("threads", "environment"),
    [(2, {"OMP_THREAD_LIMIT": "1"}), (3, {"OMP_THREAD_LIMIT": "2"}), (6, {})],
    ids=["limit_1", "limit_2", "more_than_cores"],
)
def test_threads_that_wait_for_each_other(threads: int, environment: dict[str, str]) -> None:
    """So few rows are shared out by units, and threads meet at every step: also those that are not
    there, or have no core."""
    code = BARRIER.format(threads=threads)
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, timeout=60, check=True
    )


# In the child only genkernels may open a parallel region, so results are compared as bytes.
FORK = """
import os, sys, torch, genkernels
torch.set_num_threads(2)
leaves = [
    torch.randn(s, requires_grad=True)
    for s in ((16, 32, 64), (32, 96), (288, 64), (288, 96), (288,), (288,))
]
cotangents = torch.randn(16, 32, 96), torch.randn(32, 96)
short_steps = torch.randn(40, 3, 64)
bidirectional = genkernels.nn.GRU(64, 96, bidirectional=True)
def run():
    outputs = genkernels.gru(*leaves)
    results = [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]
    output, _ = bidirectional(short_steps)
    results += [output, *torch.autograd.grad(output.sum(), list(bidirectional.parameters()))]
    return [bytes(result.detach().numpy()) for result in results]
if sys.argv[1] == "torch":
    torch.randn(512, 512) @ torch.randn(512, 512)
    torch.randn(1 << 20).exp()
    torch.set_num_threads(1)
expected = run()
torch.set_num_threads(2)
child = os.fork()
if child == 0:
    os._exit(0 if run() == expected else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

DATA_LOADER = """
import torch, genkernels
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(2)
values = [torch.randn(s) for s in ((16, 32, 64), (32, 96), (288, 64), (288, 96), (288,), (288,))]
class Outputs(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return genkernels.gru(*values)[1] + index
if __name__ == "__main__":
    h_n = genkernels.gru(*values)[1]
    batches = DataLoader(Outputs(), num_workers=2, multiprocessing_context="fork", timeout=60)
    for index, batch in enumerate(batches):
        assert torch.equal(batch[0], h_n + index)
    assert index == 3
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")
@pytest.mark.parametrize(
    ("script", "parent"),
    [(FORK, "genkernels"), (FORK, "torch"), (DATA_LOADER, "DataLoader")],
    ids=["after_genkernels", "after_torch", "data_loader"],
)
def test_forked_child(script: str, parent: str) -> None:
    """A child computes the same and ends, whatever used the thread pool before the fork."""
    subprocess.run([sys.executable, "-c", script, parent], check=True, timeout=60)
