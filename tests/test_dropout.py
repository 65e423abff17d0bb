"""genkernels.dropout and nn.Dropout against torch.nn.functional.dropout, with the mask of the
reference in place of PyTorch's."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from parity import assert_op_parity
from test_gru import DTYPES as OTHERS
from test_gru import assert_bitwise_equal, dtype_id, relaid, with_gradients
from torch import Tensor
from torch.nn import functional as F

import genkernels
from genkernels import reference
from genkernels.ops.library import draw_seed
from genkernels.reference.dropout import philox

CPU = torch.device("cpu")
COMPILED = {("dropout", "cpp"): 1}
DTYPES = (*OTHERS, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
raw = torch.ops.genkernels.dropout.default
SHAPES = [
    (), (0,), (3, 0, 2), (1,), (7,), (8,), (15, 1), (16,), (3, 11), (7, 9), (64,), (5, 13), (127,),
    (2, 3, 43), (4, 5, 6, 7), (1003,),
]  # fmt: skip


@pytest.fixture(autouse=True)
def counts_from_zero() -> None:
    genkernels.stats(reset=True)


def is_kept(seed: Tensor, p: float, shape: tuple[int, ...]) -> Tensor:
    return reference.dropout(torch.ones(shape, dtype=torch.float64), seed, p) > 0


def torch_dropout(input: Tensor, mask: Tensor, p: float) -> Tensor:
    """F.dropout as PyTorch computes it of a mask."""
    noise = mask.to(input)
    return input * (noise.div_(1 - p) if p < 1 else noise)


def plain(input: Tensor, p: float, number: int = 0, residual: Tensor | None = None) -> Tensor:
    torch.manual_seed(number)
    output = torch_dropout(input, is_kept(draw_seed(CPU), p, tuple(input.shape)), p)
    return output if residual is None else residual + output


def dropout(input: Tensor, p: float, number: int = 0, residual: Tensor | None = None) -> Tensor:
    torch.manual_seed(number)
    return genkernels.dropout(input, p, residual=residual)


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = ("input", "residual")[: 2 if residual else 1]
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in names}


def check(p: float, *draws: dict[str, Any]) -> None:
    ours, theirs = (
        lambda function=function, **values: (function(p=p, **values),)
        for function in (dropout, plain)
    )
    draws = tuple(draw | {"number": number} for number, draw in enumerate(draws))
    assert_op_parity(ours, theirs, theirs, ("output",), *draws)


each_residual = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])


@pytest.mark.usefixtures("poisoned_memory", "compiled_only", "simd", "one_thread")
class TestParity:
    """The one rule, at every SIMD level, in memory full of NaN, in the compiled kernel alone."""

    @each_dtype
    @each_residual
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape: tuple[int, ...], residual: bool, dtype: torch.dtype) -> None:
        check(0.3, *(arguments(shape, dtype, residual=residual, seed=s) for s in range(4)))

    @each_dtype
    @each_residual
    @pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0, 1])
    def test_probabilities(self, p: float, residual: bool, dtype: torch.dtype) -> None:
        check(p, *(arguments((7, 43), dtype, residual=residual, seed=s) for s in range(4)))

    @each_dtype
    @pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided", "scalar"])
    def test_strides(self, layout: str, dtype: torch.dtype) -> None:
        values = arguments((5, 7, 12), dtype, residual=True)
        check(0.4, {name: relaid(value, layout) for name, value in values.items()})

    @each_dtype
    def test_same_bits_as_the_reference(self, dtype: torch.dtype) -> None:
        """And so at every SIMD level, with a residual too."""
        for residual in (False, True):
            values = arguments((1, 40_005), dtype, residual=residual)
            torch.manual_seed(1)
            expected = reference.dropout(values.pop("input"), draw_seed(CPU), 0.3, *values.values())
            values = arguments((1, 40_005), dtype, residual=residual)
            assert torch.equal(dropout(**values, p=0.3, number=1), expected)

    @each_dtype
    @pytest.mark.parametrize("p", [0.5, 1.0])
    def test_special_values(self, p: float, dtype: torch.dtype) -> None:
        """NaN, infinities and signed zeros, kept and dropped."""
        values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
        input = values.repeat(31)
        actual, expected = dropout(input, p), plain(input, p)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        is_number = ~expected.isnan()
        assert torch.equal(actual[is_number].signbit(), expected[is_number].signbit())


def test_plain_is_torch_s() -> None:
    for dtype in DTYPES:
        input = arguments((5, 7), dtype)["input"]
        torch.manual_seed(0)
        mask = torch.empty_like(input).bernoulli_(1 - 0.3)
        torch.manual_seed(0)
        assert torch.equal(torch_dropout(input, mask, 0.3), F.dropout(input, 0.3))
    assert not plain(input, 1.0).any()
    assert torch.equal(plain(input, 1.0), F.dropout(input, 1.0))


class TestNumbers:
    @pytest.mark.parametrize(
        ("key", "counter", "numbers"),
        [
            ((0,) * 2, (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            (
                (0xFFFFFFFF,) * 2,
                (0xFFFFFFFF,) * 4,
                (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
            ),
            (
                (0xA4093822, 0x299F31D0),
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
        ids=["zeros", "ones", "pi"],
    )
    def test_known_answers(self, key: Any, counter: Any, numbers: Any) -> None:
        """Those that the authors of Philox publish with Random123."""
        seed = torch.tensor([key[1] << 32 | key[0]], dtype=torch.uint64).view(torch.int64)
        results = philox(seed, tuple(torch.tensor([c]) for c in counter))
        assert tuple(map(int, results)) == numbers

    def test_which_number_of_which_counter(self) -> None:
        seed = torch.tensor([0x123456789ABCDEF])
        actual = reference.dropout(torch.ones(3, 50, dtype=torch.float64), seed, 0.4).flatten()
        for i in range(150):
            counter = (i // 64 * 16 + i % 16, 0, 0, 0)
            numbers = philox(seed, tuple(torch.tensor([c]) for c in counter))
            is_kept = int(numbers[i // 16 % 4]) >= int(0.4 * 2**32)
            assert actual[i] == (1 / 0.6 if is_kept else 0)

    @pytest.mark.parametrize("p", [0.1, 0.25, 0.8])
    def test_rate_and_independence(self, p: float) -> None:
        """Each element is kept with probability 1 - p, whatever its place, its neighbours, and the
        call before."""
        x = torch.ones(512, 384)
        kept, others = dropout(x, p) > 0, genkernels.dropout(x, p) > 0
        for dims in ((), (0,), (1,)):
            rates = kept.double().mean(dims or None)
            deviation = (p * (1 - p) * rates.numel() / kept.numel()) ** 0.5
            assert (rates - (1 - p)).abs().max() < 5.5 * deviation
        pairs = [kept.roll(shift, dim) for shift in (1, 16, 32, 64) for dim in (0, 1)]
        for other in (*pairs, others, others.roll(1, 1)):
            both = (kept & other).double().mean()
            assert abs(both - (1 - p) ** 2) < 6 * ((1 - p) ** 2 / kept.numel()) ** 0.5

    def test_reproducible(self) -> None:
        values = arguments((5, 100))
        first, second = dropout(**values, p=0.5), genkernels.dropout(**values, p=0.5)
        assert not torch.equal(first, second)
        assert torch.equal(dropout(**values, p=0.5), first)
        assert torch.equal(genkernels.dropout(**values, p=0.5), second)

    @each_dtype
    @pytest.mark.usefixtures("simd", "two_threads")
    def test_number_of_threads(self, dtype: torch.dtype) -> None:
        values = arguments((3, 30_007), dtype, residual=True)
        function = functools.partial(dropout, p=0.3)
        expected = with_gradients(lambda **v: (function(**v),), values)
        torch.set_num_threads(1)
        assert_bitwise_equal(with_gradients(lambda **v: (function(**v),), values), expected)

    @pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0}, {"p": 0.5, "training": False}])
    def test_nothing_is_dropped(self, options: dict[str, Any]) -> None:
        values, state = arguments((3, 5), residual=True), torch.get_rng_state()
        assert genkernels.dropout(values["input"], **options) is values["input"]
        total = genkernels.dropout(**values, **options)
        assert torch.equal(total, values["residual"] + values["input"])
        assert torch.equal(torch.get_rng_state(), state)
        assert genkernels.stats() == {}


class TestResidual:
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((5, 7), torch.float32), ((7,), torch.bfloat16), ((2, 1, 1), torch.bfloat16)],
        ids=["dtype", "broadcast", "broadcasts"],
    )
    def test_of_another_kind(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Is broadcast and promoted, as by PyTorch; gradients are like the arguments."""
        values = arguments((5, 7), torch.bfloat16) | {"residual": torch.ones(shape, dtype=dtype)}
        actual, *gradients = with_gradients(lambda **v: (dropout(**v, p=0.5),), values)
        expected = values["residual"] + dropout(values["input"], 0.5)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
        assert [(g.shape, g.dtype) for g in gradients] == [
            (value.shape, value.dtype) for value in values.values()
        ]

    def test_does_not_fit(self) -> None:
        with pytest.raises(RuntimeError, match="size of tensor"):
            genkernels.dropout(torch.ones(3), residual=torch.ones(2))


def random_function(**values: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A nonlinear function of the tensors that drops the same at each call, and those."""

    def function(*tensors: Tensor) -> Tensor:
        return dropout(tensors[0].sin(), 0.4, 0, *tensors[1:])

    return function, tuple(value.requires_grad_() for value in values.values())


class TestGradients:
    @each_residual
    def test_gradcheck(self, residual: bool) -> None:
        values = arguments((3, 4), torch.float64, residual=residual)
        function, leaves = random_function(**values)
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
        assert set(genkernels.stats()) == set(COMPILED)

    def test_third_derivative(self) -> None:
        function, (x,) = random_function(**arguments((3, 4), torch.float64))
        first = function(x)
        gradient = first.sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(gradient.sum(), x, create_graph=True)
        torch.testing.assert_close(gradient, torch.where(first == 0, 0.0, -x.cos() / 0.6))

    def test_only_what_is_asked_for(self) -> None:
        """A residual's gradient is grad_output itself, and takes no kernel."""
        values = arguments((3, 5), residual=True)
        values["residual"].requires_grad_()
        dropout(**values, p=0.5).sum().backward()
        assert torch.equal(values["residual"].grad, torch.ones(3, 5))
        assert genkernels.stats(reset=True) == COMPILED
        values = arguments((3, 5), residual=True)
        values["input"].requires_grad_()
        dropout(**values, p=0.5).sum().backward()
        assert torch.equal(values["input"].grad, dropout(torch.ones(3, 5), 0.5))

    def test_saves_the_seed_alone(self) -> None:
        values = arguments((300, 50), residual=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            dropout(values["input"].requires_grad_(), 0.5, 0, values["residual"].requires_grad_())
        assert [(t.shape, t.dtype) for t in saved] == [((1,), torch.int64)]

    def test_batched_gradients(self) -> None:
        x = torch.ones(3, 5, requires_grad=True)
        output, cotangents = dropout(x, 0.5), arguments((4, 3, 5))["input"]
        (actual,) = torch.autograd.grad(output, x, cotangents, is_grads_batched=True)
        assert torch.equal(actual, cotangents * output)

    def test_checkpoint(self) -> None:
        x = torch.randn(3, 50, requires_grad=True)
        function = functools.partial(genkernels.dropout, p=0.3)
        torch.manual_seed(0)
        output = torch.utils.checkpoint.checkpoint(
            lambda x: function(function(x).sin()), x, use_reentrant=False
        )
        (actual,) = torch.autograd.grad(output.sum(), x)
        torch.manual_seed(0)
        (expected,) = torch.autograd.grad(function(function(x).sin()).sum(), x)
        assert torch.equal(actual, expected)


class TestTransforms:
    def test_vmap(self) -> None:
        """Under the rule of torch.func that its caller names."""
        x = torch.ones(2, 100)
        with pytest.raises(RuntimeError, match="random"):
            torch.func.vmap(genkernels.dropout)(x)
        same = torch.func.vmap(genkernels.dropout, randomness="same")(x)
        assert torch.equal(same[0], same[1])
        different = torch.func.vmap(genkernels.dropout, randomness="different")(x)
        assert not torch.equal(different[0], different[1])

    def test_vmap_of_one_argument(self) -> None:
        values = arguments((3, 5), residual=True)
        rows, one = values["input"], values["residual"][0]
        actual = torch.func.vmap(
            lambda row: dropout(row, 0.5, 0, one), in_dims=1, randomness="same"
        )(rows.T)
        assert torch.equal(actual, torch.stack([dropout(row, 0.5, 0, one) for row in rows]))

    def test_gradients(self) -> None:
        x = torch.randn(2, 50, dtype=torch.float64)

        def loss(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: function(x.sin(), 0.4).square().sum()

        for transform in (
            torch.func.grad,
            lambda f: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum()),
            lambda f: torch.func.vmap(torch.func.grad(f), randomness="same"),
        ):
            if transform is not torch.func.grad:
                x = x[:, :7]
            actual = transform(loss(dropout))(x)
            with genkernels.use_backend("reference"):
                expected = transform(loss(dropout))(x)
            torch.testing.assert_close(actual, expected)
            assert actual.any()

    def test_forward_mode(self) -> None:
        x, tangent = torch.randn(2, 2, 50)
        with pytest.raises(NotImplementedError):
            torch.func.jvp(lambda x: dropout(x, 0.5), (x,), (tangent,))
        with genkernels.use_backend("reference"):
            _, actual = torch.func.jvp(lambda x: dropout(x, 0.5), (x,), (tangent,))
        assert torch.equal(actual, dropout(tangent, 0.5))


class TestCompile:
    @each_residual
    def test_dynamic(self, residual: bool) -> None:
        """One graph for any sizes, and the numbers of eager mode."""
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        def function(**values: Tensor) -> tuple[Tensor]:
            return (genkernels.dropout(**values, p=0.3),)

        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        graphs = set()
        for shape in ((5, 7), (9, 6), (40, 33)):
            values = arguments(shape, residual=residual)
            torch.manual_seed(0)
            actual = with_gradients(compiled, values)
            torch.manual_seed(0)
            assert_bitwise_equal(actual, with_gradients(function, values))
            graphs.add(counter.frame_count)
        assert len(graphs) == 1

    def test_inductor(self) -> None:
        """It has random numbers of its own: the gradient drops what its forward pass dropped."""
        torch._dynamo.reset()
        module = torch.compile(genkernels.nn.Dropout(0.5), fullgraph=True)
        x, y = (value.requires_grad_() for value in arguments((20, 30), residual=True).values())
        output = module(x, y)
        kept = torch.autograd.grad(output.sum(), x)[0]
        assert 0.3 < (kept == 2).float().mean() < 0.7
        torch.testing.assert_close(output, y + kept * x)

    def test_export(self) -> None:
        length = torch.export.Dim("length", min=2)
        x, longer = torch.ones(3, 5), torch.ones(3, 90)
        for training in (True, False):
            module = genkernels.nn.Dropout(0.5).train(training)
            program = torch.export.export(module, (x,), dynamic_shapes={"input": {1: length}})
            targets = {str(node.target) for node in program.graph.nodes}
            assert ("genkernels.dropout.default" in targets) == training
            torch.manual_seed(0)
            actual = program.module()(longer)
            torch.manual_seed(0)
            assert torch.equal(actual, module(longer))

    @each_dtype
    @each_residual
    def test_opcheck(self, residual: bool, dtype: torch.dtype) -> None:
        tensors = list(arguments((3, 5), dtype, residual=residual).values())
        for input in (tensors[0], relaid(tensors[0], "transposed")):
            torch.library.opcheck(raw, (input, torch.tensor([1]), 0.3, *(tensors[1:] or [None])))


class TestDtypes:
    def test_autocast_changes_none(self) -> None:
        """Nor does that of F.dropout."""
        for dtype in DTYPES:
            input = arguments((3, 5), dtype)["input"]
            with torch.autocast("cpu", torch.bfloat16):
                assert F.dropout(input).dtype == genkernels.dropout(input).dtype == dtype

    @pytest.mark.filterwarnings("ignore:genkernels.dropout runs the plain PyTorch reference")
    def test_without_a_kernel(self) -> None:
        actual = dropout(torch.ones(3, 50, dtype=torch.complex64), 0.5)
        assert actual.dtype == torch.complex64
        assert torch.equal(actual, dropout(torch.ones(3, 50), 0.5).to(torch.complex64))
        assert genkernels.stats() == COMPILED | {("dropout", "reference"): 1}

    def test_meta(self) -> None:
        assert genkernels.dropout(torch.ones(3, 5, device="meta")).shape == (3, 5)


class TestErrors:
    @pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
    def test_probability(self, p: float) -> None:
        for training in (True, False):
            with pytest.raises(ValueError, match=r"genkernels.dropout: p: expected .* \[0, 1\]"):
                genkernels.dropout(torch.ones(3), p, training)

    def test_probability_of_the_module(self) -> None:
        for module in (torch.nn.Dropout, genkernels.nn.Dropout):
            with pytest.raises(ValueError, match="between 0 and 1"):
                module(1.1)

    @pytest.mark.filterwarnings("ignore:genkernels.dropout runs the plain PyTorch reference")
    def test_integers(self) -> None:
        for function in (F.dropout, genkernels.dropout):
            with pytest.raises(RuntimeError):
                function(torch.ones(3, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"p": 1.5}, "p: expected a number"),
            ({"seed": torch.ones(1)}, "seed: expected"),
            ({"seed": torch.ones(2, dtype=torch.int64)}, "seed: expected"),
            ({"residual": torch.ones(5)}, "residual: expected"),
            ({"residual": torch.ones(3, 5).double()}, "residual: expected"),
            ({"input": torch.ones(3, 5).cfloat(), "residual": None}, "input: expected dtype"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_raw(self, changed: dict[str, Any], message: str) -> None:
        values = arguments((3, 5), residual=True) | {"seed": torch.tensor([1]), "p": 0.5} | changed
        with pytest.raises(RuntimeError, match=message):
            raw(**values)
        if "input" not in changed:
            meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in values.items()}
            with pytest.raises(RuntimeError, match=message):
                raw(**meta)


class TestModule:
    def test_is_a_drop_in(self) -> None:
        module, theirs = genkernels.nn.Dropout(0.3, True), torch.nn.Dropout(0.3, True)
        assert repr(module) == repr(theirs)
        assert module.state_dict() == theirs.state_dict() == {}
        assert isinstance(module, torch.nn.Dropout)
        assert genkernels.nn.Dropout().p == torch.nn.Dropout().p
        assert copy.deepcopy(module).p == 0.3

    def test_computes_the_op(self) -> None:
        module, values = genkernels.nn.Dropout(0.3), arguments((3, 5), residual=True)
        torch.manual_seed(0)
        assert torch.equal(module(*values.values()), dropout(**values, p=0.3))
        assert module.eval()(values["input"]) is values["input"]

    def test_inplace(self) -> None:
        input = arguments((3, 5))["input"]
        expected = dropout(input, 0.5)
        torch.manual_seed(0)
        assert genkernels.nn.Dropout(0.5, inplace=True)(input) is input
        assert torch.equal(input, expected)
        leaf = torch.ones(3, 5, requires_grad=True)
        torch.manual_seed(0)
        genkernels.nn.Dropout(0.5, inplace=True)(leaf * 2).sum().backward()
        assert torch.equal(leaf.grad, 2 * dropout(torch.ones(3, 5), 0.5))
        with pytest.raises(RuntimeError, match="in-place"):
            genkernels.nn.Dropout(0.5, inplace=True)(leaf)


def test_explain() -> None:
    explanation = genkernels.explain(genkernels.dropout, torch.ones(3))
    assert explanation.backend == "cpp"
