"""genkernels.linear and genkernels.nn.Linear against torch.nn.functional.linear, the activations of
torch.nn.functional and torch.nn.Linear."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from parity import ExactSums, assert_op_parity, assert_parity
from test_gru import DTYPES, assert_bitwise_equal, dtype_id, each_dtype, relaid, with_gradients
from torch import Tensor
from torch.nn import functional as F

import genkernels
from genkernels import backend
from genkernels.ops.linear import ACTIVATIONS, LEAST_ROWS, MOST_FEW_ROWS

TENSORS = ("input", "weight", "bias")
COMPILED = {("linear_forward", "cpp"): 1}
HANDED_OVER = {("linear", "reference"): 1}

SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129)
# Rows, K and N: every size once as K and as N per round, the rounds shifted against each other.
SHAPES = [
    ((1, 2, 3, 4, 5, 8, 32)[(i + shift) % 7], SIZES[(4 * i + 7 * shift) % 15], SIZES[i])
    for shift in (0, 1, 2)
    for i in range(15)
]
LONG_SHAPES = [(1, 8003, 18), (3, 5003, 7), (32, 1100, 5), (1, 512, 1000)]
# Of many rows: sizes at the edges of tiles, registers, panels, chains of products, blocks of rows.
MANY_ROWS = [
    (33, 1, 1), (34, 7, 16), (40, 16, 15), (41, 17, 48), (63, 0, 5), (64, 31, 49), (65, 33, 3),
    (100, 1024, 7), (129, 300, 20), (255, 5, 97), (257, 49, 130), (300, 2, 257), (515, 20, 1),
    (1030, 9, 33), (48, 2050, 2),
]  # fmt: skip
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)


def arguments(
    rows: int | tuple[int, ...],
    K: int,
    N: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of linear at the scale that nn.Linear starts from."""
    generator = torch.Generator().manual_seed(seed)
    bound = K**-0.5 if K else 1.0
    leading = (rows,) if isinstance(rows, int) else rows

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)

    values = {
        "input": torch.randn(*leading, K, generator=generator).to(dtype),
        "weight": uniform(N, K),
    }
    return {**values, "bias": uniform(N)} if bias else values


def exact_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.double().reshape(input.shape[:-1].numel(), input.size(-1))
    with ExactSums():
        output = F.linear(rows, weight.double(), None if bias is None else bias.double())
    return output.view(*input.shape[:-1], len(weight))


def check(draw: Callable[[int], dict[str, Any]], draws: int = 4) -> None:
    values = [draw(seed) for seed in range(draws)]
    assert_parity(
        "output",
        *(
            torch.stack([function(**each) for each in values])
            for function in (genkernels.linear, F.linear, exact_linear)
        ),
    )


def shape_id(shape: tuple[int, ...]) -> str:
    return "M{}-K{}-N{}".format(*shape)


def plain(activation: str | None) -> Callable[..., Tensor]:
    """The same in plain PyTorch, written out here: the package's own reference is under test."""
    activate: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda x: x,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
    }
    return lambda input, weight, bias=None: activate[activation](F.linear(input, weight, bias))


def check_gradients(
    draw: Callable[[int], dict[str, Any]], activation: str | None = None, draws: int = 3
) -> None:
    assert_op_parity(
        lambda **v: (genkernels.linear(**v, activation=activation),),
        lambda **v: (plain(activation)(**v),),
        lambda **v: (plain(activation)(**{k: rows(t) for k, t in v.items()}).view(shape(v)),),
        ("output",),
        *map(draw, range(draws)),
    )


def rows(tensor: Tensor) -> Tensor:
    """As a matrix, whose products ExactSums knows."""
    return tensor.reshape(tensor.shape[:-1].numel(), -1) if tensor.dim() != 1 else tensor


def shape(values: dict[str, Any]) -> tuple[int, ...]:
    return (*values["input"].shape[:-1], len(values["weight"]))


@pytest.fixture(autouse=True)
def counts_from_zero() -> None:
    genkernels.stats(reset=True)


@pytest.mark.usefixtures(
    "poisoned_memory", "compiled_only", "simd", "one_thread", "nothing_handed_over"
)
class TestParity:
    """The one rule, at every SIMD level, in memory full of NaN, in the compiled kernel alone."""

    @each_dtype
    @pytest.mark.parametrize("shape", [*SHAPES, *LONG_SHAPES], ids=shape_id)
    def test_shapes(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        check(lambda seed: arguments(*shape, dtype, seed=seed))

    @each_dtype
    def test_rows(self, dtype: torch.dtype) -> None:
        for rows in (*range(35), 47, 48, 49, 64):
            check(lambda seed, rows=rows: arguments(rows, 37, 19, dtype, seed=seed))

    @each_dtype
    @pytest.mark.parametrize("shape", [(3, 17, 33), (1, 0, 9), (0, 5, 4), (2, 4, 0)], ids=shape_id)
    def test_no_bias(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        check(lambda seed: arguments(*shape, dtype, bias=False, seed=seed))

    @each_dtype
    @pytest.mark.parametrize(
        "leading", [(), (1,), (2, 3), (4, 1, 2), (0, 3), (1, 2, 1, 3, 2)], ids=str
    )
    def test_leading_dimensions(self, leading: tuple[int, ...], dtype: torch.dtype) -> None:
        check(lambda seed: arguments(leading, 17, 33, dtype, seed=seed))

    @each_dtype
    @pytest.mark.parametrize("rows", [6, (2, 3)], ids=str)
    @pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided", "scalar"])
    def test_strides(self, layout: str, rows: int | tuple[int, ...], dtype: torch.dtype) -> None:
        check(
            lambda seed: {
                name: relaid(value, layout)
                for name, value in arguments(rows, 16, 24, dtype, seed=seed).items()
            }
        )

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("place", TENSORS)
    def test_special_values_spread(self, place: str, value: float, dtype: torch.dtype) -> None:
        values = arguments(7, 37, 21, dtype)
        values[place][(4, 36)[: values[place].dim()]] = value
        check(lambda seed: values, draws=1)
        assert not genkernels.linear(**values).isfinite().all()

    @each_dtype
    @pytest.mark.parametrize("shape", MANY_ROWS, ids=shape_id)
    def test_many_rows(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        check_gradients(lambda seed: arguments(*shape, dtype, seed=seed))

    @each_dtype
    @each_activation
    @pytest.mark.parametrize("shape", [(3, 9, 21), (70, 33, 50), (260, 20, 97)], ids=shape_id)
    def test_activations(
        self, shape: tuple[int, int, int], activation: str | None, dtype: torch.dtype
    ) -> None:
        check_gradients(lambda seed: arguments(*shape, dtype, seed=seed), activation)

    @each_dtype
    @pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided", "scalar"])
    def test_strides_of_many_rows(self, layout: str, dtype: torch.dtype) -> None:
        def draw(seed: int) -> dict[str, Any]:
            values = arguments((6, 11), 16, 24, dtype, seed=seed)
            return {name: relaid(value, layout) for name, value in values.items()}

        check_gradients(draw, "silu")

    @each_dtype
    def test_no_bias_of_many_rows(self, dtype: torch.dtype) -> None:
        check_gradients(lambda seed: arguments(70, 21, 33, dtype, bias=False, seed=seed), "gelu")

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
    @pytest.mark.parametrize("activation", ACTIVATIONS[1:])
    def test_activation_everywhere(self, activation: str, dtype: torch.dtype) -> None:
        """From where an activation is zero to where it is its argument, and where it is no
        number."""
        special = torch.tensor([float("nan"), float("-inf"), 0.0, -0.0, 1e30, -1e30])
        if activation != "gelu":  # of Inf PyTorch's is Inf in its scalar loop and NaN in registers
            special = torch.cat([special, torch.tensor([float("inf")])])
        x = torch.cat([torch.linspace(-120, 120, 4801), torch.linspace(-6, 6, 4801), special])
        values = {"input": x.to(dtype)[:, None], "weight": torch.ones(1, 1, dtype=dtype)}
        check_gradients(lambda seed: values, activation, draws=1)


@pytest.mark.usefixtures("simd", "compiled_only", "one_thread", "nothing_handed_over")
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activation_to_units_in_the_last_place(activation: str) -> None:
    """Each value for itself: the rule of parity sees the largest error alone."""
    x = torch.linspace(-4, 12, 100_000)[:, None]
    actual = genkernels.linear(x, torch.ones(1, 1), activation=activation).double()
    exact = plain(activation)(x.double(), torch.ones(1, 1).double())
    relative = ((actual - exact).abs() / exact.abs().clamp(min=1e-30))[exact != 0]
    # At -4 one unit in the last place of gelu's x^2 / 2 is 8 of e^(-x^2/2).
    assert relative.max() < (2e-6 if "gelu" in activation else 6e-7)


@pytest.mark.usefixtures(
    "simd", "two_threads", "compiled_only", "nothing_handed_over", "poisoned_memory"
)
@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(300, 130, 515), (64, 700, 90), (40, 40, 900), (3000, 200, 2), (9000, 3, 37)],
    ids=shape_id,
)
def test_gradients_are_bitwise_reproducible(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """From run to run, and with one thread as with two."""
    values = arguments(*shape, dtype)

    def step() -> list[Tensor]:
        return with_gradients(lambda **v: (genkernels.linear(**v, activation="gelu"),), values)

    first = step()
    for _ in range(3):
        assert_bitwise_equal(step(), first)
    torch.set_num_threads(1)
    assert_bitwise_equal(step(), first)


@pytest.mark.usefixtures("compiled_only")
def test_no_stale_weight() -> None:
    """Nothing packed outlives a call: neither a step nor a write past autograd goes unseen."""
    torch.manual_seed(0)
    layer = genkernels.nn.Linear(256, 300, dtype=torch.bfloat16)
    input = torch.randn(128, 256, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer(input)
    before.sum().backward()
    optimizer.step()
    after = layer(input)
    torch.testing.assert_close(after, F.linear(input, layer.weight, layer.bias))
    assert not torch.equal(after, before)
    layer.weight.data.zero_()
    assert torch.equal(layer(input), layer.bias.expand(128, 300))


@pytest.mark.usefixtures("simd", "two_threads", "compiled_only", "nothing_handed_over")
@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 32, 33, 300])
def test_bitwise_reproducible(rows: int, dtype: torch.dtype) -> None:
    """From run to run, and with one thread as with two."""
    values = arguments(rows, 512, 2051, dtype)
    first = genkernels.linear(**values)
    for _ in range(3):
        assert torch.equal(genkernels.linear(**values), first)
    torch.set_num_threads(1)
    assert torch.equal(genkernels.linear(**values), first)


class TestHandover:
    """What the kernel is not for is PyTorch's, bit for bit, without a warning; and explain and
    stats say so."""

    def check(self, values: dict[str, Any], reason: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explanation = genkernels.explain("linear", **values)
            assert explanation.backend == "reference"
            assert reason in explanation.reasons["cpp"]
            assert genkernels.stats() == {}
            assert torch.equal(genkernels.linear(**values), F.linear(**values))
        assert genkernels.stats(reset=True) == HANDED_OVER
        with genkernels.use_backend("cpp"):
            if "no kernel" in reason:
                assert genkernels.explain("linear", **values).backend is None
                with pytest.raises(RuntimeError, match="'cpp' was asked for, but"):
                    genkernels.linear(**values)
                assert genkernels.stats() == {}
            else:  # what the kernel is not for is no fall back
                assert genkernels.explain("linear", **values) == explanation
                genkernels.linear(**values)
                assert genkernels.stats(reset=True) == HANDED_OVER

    def test_small_products_of_many_rows(self) -> None:
        self.check(arguments(MOST_FEW_ROWS + 1, 5, 6), f"{MOST_FEW_ROWS + 1} rows")
        self.check(arguments((3, 11), 5, 6), "33 rows")

    @pytest.mark.parametrize("is_at_its_best", [False, True])
    def test_beside_mkl(self, is_at_its_best: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where PyTorch's products are as fast, the kernel is for what it saves elsewhere."""
        monkeypatch.setattr(backend, "MKL_IS_AT_ITS_BEST", is_at_its_best)
        values = arguments(200, 150, 160)
        if is_at_its_best:
            self.check(values, "4800000 products")
        else:
            genkernels.linear(**values)
        for compiled in (
            lambda: genkernels.linear(**values, activation="relu"),
            lambda: genkernels.linear(**arguments(200, 150, 160, torch.bfloat16)),
        ):
            genkernels.stats(reset=True)
            compiled()
            assert genkernels.stats(reset=True) == COMPILED

    def test_large(self) -> None:
        values = {"input": torch.randn(1024, 1024), "weight": torch.randn(1024, 1024)}
        genkernels.linear(**values)
        genkernels.linear(values["input"], values["weight"].requires_grad_()).sum().backward()
        expected = {("linear_forward", "cpp"): 2, ("linear_backward", "cpp"): 1}
        assert genkernels.stats(reset=True) == expected

    @pytest.mark.parametrize("needs", TENSORS)
    def test_gradients_of_few_rows(self, needs: str) -> None:
        values = arguments(LEAST_ROWS - 1, 5, 6)
        values[needs].requires_grad_()
        self.check(values, "gradients")
        values["input"] = values["input"][:32]
        with torch.no_grad():
            genkernels.linear(**values)
        with torch.inference_mode():
            genkernels.linear(**values)
        assert genkernels.stats() == {("linear_forward", "cpp"): 2}

    def test_gradients_are_pytorch_s(self) -> None:
        actual, expected = (
            with_gradients(lambda **v: (function(**v),), arguments(4, 5, 6))  # noqa: B023
            for function in (genkernels.linear, F.linear)
        )
        assert_bitwise_equal(actual, expected)

    def test_dtype(self) -> None:
        self.check(arguments(4, 5, 6, torch.float16), "no kernel for torch.float16")

    def test_subclass(self) -> None:
        """A quantised weight, for example, multiplies itself."""

        class Named(Tensor):
            pass

        values = arguments(4, 5, 6)
        values["weight"] = values["weight"].as_subclass(Named)
        self.check(values, "subclass")

    def test_sparse(self) -> None:
        values = arguments(4, 5, 6, bias=False)
        values["weight"] = values["weight"].to_sparse_csr()
        self.check(values, "sparse")

    def test_activation(self) -> None:
        """What is handed over has its activation."""
        values = arguments(40, 5, 6)
        for activation in ACTIVATIONS:
            actual = genkernels.linear(**values, activation=activation)
            assert torch.equal(actual, plain(activation)(**values))
        assert set(genkernels.stats()) == set(HANDED_OVER)

    @pytest.mark.parametrize("shape", [(), (1,), (4, 6), (1, 6)], ids=str)
    def test_bias_of_another_shape(self, shape: tuple[int, ...]) -> None:
        """Which torch.nn.functional.linear adds all the same."""
        self.check({**arguments(4, 5, 6, bias=False), "bias": torch.randn(shape)}, "bias")

    def test_weight_of_one_dimension(self) -> None:
        values = arguments(4, 5, 6, bias=False)
        values["weight"] = values["weight"][0]
        self.check(values, "1 dimensions")

    def test_meta(self) -> None:
        values = {name: value.to("meta") for name, value in arguments(4, 5, 6).items()}
        assert genkernels.linear(**values).shape == (4, 6)

    def test_reference(self) -> None:
        values = arguments(4, 5, 6)
        with genkernels.use_backend("reference"):
            assert genkernels.explain("linear", **values).backend == "reference"
            assert torch.equal(genkernels.linear(**values), F.linear(**values))
        assert genkernels.stats() == HANDED_OVER

    def test_is_no_fall_back(self) -> None:
        """GENKERNELS_STRICT is about kernels that are missed."""
        code = (
            "import torch, genkernels\n"
            "for x, w in ((torch.ones(99, 5), torch.ones(6, 5)),\n"
            "             (torch.ones(4, 5).half(), torch.ones(6, 5).half())):\n"
            "    assert genkernels.explain('linear', x, w).backend == 'reference'\n"
            "    assert torch.equal(genkernels.linear(x, w), torch.full((len(x), 6), 5.0).to(x))\n"
        )
        environment = {**os.environ, "GENKERNELS_STRICT": "1", "GENKERNELS_BACKEND": ""}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_explain_compiled() -> None:
    explanation = genkernels.explain(genkernels.linear, **arguments(4, 5, 6))
    assert explanation.backend == "cpp"
    assert str(backend.simd_level()) in explanation.reasons["cpp"]
    assert genkernels.explain("linear", torch.ones(4, 5)).backend == "cpp"
    with genkernels.use_backend("cpp"):
        genkernels.linear(**arguments(4, 5, 6))
    assert genkernels.stats() == COMPILED


def test_export_for_any_number_of_rows() -> None:
    module = genkernels.nn.Linear(5, 6)
    rows = torch.export.Dim("rows", min=2, max=1000)
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(4, 5),), dynamic_shapes={"input": {0: rows}}
        )
        for count in (2, 40):
            input = torch.randn(count, 5)
            torch.testing.assert_close(
                program.module()(input), F.linear(input, *module.parameters())
            )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (40,)], ids=str)
def test_opcheck(leading: tuple[int, ...], bias: bool) -> None:
    """An activation is a number to the schema; of each number once."""
    values = arguments(leading, 5, 6, bias=bias)
    tensors = tuple(values.get(name) for name in TENSORS)
    ops = torch.ops.genkernels
    is_one_of_many = leading != (4,) or not bias
    for index, activation in enumerate(ACTIVATIONS[: 2 if is_one_of_many else None]):
        torch.library.opcheck(ops.linear_forward.default, (*tensors, index))
        torch.library.opcheck(ops.linear_forward_saving.default, (*tensors, index))
        saved = None if activation is None else torch.randn(*leading, 6)
        for given in ((True, True), (False, True), (True, False)):
            operands = (
                t if is_given else None for t, is_given in zip(tensors, given, strict=False)
            )
            gradient = (torch.randn(*leading, 6), *operands, saved, index, given[0], False)
            torch.library.opcheck(ops.linear_backward.default, gradient)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck_of_wider_parameters(bias: bool) -> None:
    values = arguments(4, 5, 6, bias=bias)
    input, weight = values.pop("input").bfloat16(), values["weight"]
    ops = torch.ops.genkernels
    parameters = (weight, values.get("bias"))
    for index, activation in enumerate(ACTIVATIONS):
        torch.library.opcheck(ops.linear_forward.default, (input, *parameters, index))
        torch.library.opcheck(ops.linear_forward_saving.default, (input, *parameters, index))
        grad_output = torch.randn(4, 6).bfloat16()
        saved = None if activation is None else torch.randn_like(grad_output)
        for operands in ((input, weight), (None, weight), (input, None)):
            gradient = (grad_output, *operands, saved, index, bias, True)
            torch.library.opcheck(ops.linear_backward.default, gradient)


@pytest.mark.usefixtures("nothing_handed_over", "one_thread")
class TestDifferentiation:
    @each_activation
    @pytest.mark.parametrize("leading", [(), (2, 3), (40,)], ids=str)
    def test_gradcheck(self, leading: tuple[int, ...], activation: str | None) -> None:
        function = functools.partial(genkernels.linear, activation=activation)
        values = arguments(leading, 3, 4, torch.float64)
        leaves = tuple(value.requires_grad_() for value in values.values())
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
        assert ("linear_backward", "cpp") in genkernels.stats()

    @pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
    def test_only_what_is_asked_for(self, needs: tuple[bool, ...]) -> None:
        gradients = []
        for function in (genkernels.linear, plain("gelu")):
            values = arguments(70, 17, 33)
            leaves = [v.requires_grad_() for v, n in zip(values.values(), needs, strict=True) if n]
            options = {"activation": "gelu"} if function is genkernels.linear else {}
            gradients.append(torch.autograd.grad(function(**values, **options).sum(), leaves))
        torch.testing.assert_close(*gradients)

    def test_batched_gradients(self) -> None:
        values = arguments(70, 17, 33)
        leaves = [value.requires_grad_() for value in values.values()]
        cotangents = torch.randn(3, 70, 33)
        actual, expected = (
            torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True)
            for output in (
                genkernels.linear(**values, activation="silu"),
                plain("silu")(**values),
            )
        )
        torch.testing.assert_close(actual, expected)

    def test_output_changed_in_place(self) -> None:
        """As PyTorch's relu, whose gradient is found from what it gave."""
        values = arguments(70, 17, 33)
        output = genkernels.linear(**values, activation="relu")
        values["weight"].requires_grad_()
        output = genkernels.linear(**values, activation="relu")
        output.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        output = genkernels.linear(**values, activation="gelu")
        output.add_(1)
        output.sum().backward()

    def test_nothing_as_large_as_the_output_is_filled(self) -> None:
        """Autograd would hand the backward pass zeros for the gradient of what is saved."""
        values = arguments(70, 17, 33)
        leaves = [value.requires_grad_() for value in values.values()]
        output = genkernels.linear(**values, activation="gelu")
        with torch.profiler.profile() as profile:
            torch.autograd.grad(output, leaves, torch.ones(70, 33))
        assert not {"aten::zeros", "aten::zero_"} & {event.key for event in profile.key_averages()}

    @each_activation
    @pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
    def test_changed_in_place(self, needs: tuple[bool, ...], activation: str | None) -> None:
        """What no gradient needs may change before the backward pass, as with PyTorch's own."""
        values = arguments(70, 17, 33)
        leaves = [v.requires_grad_() for v, n in zip(values.values(), needs, strict=True) if n]
        for name, tensor in values.items():
            outcomes = []
            for function in (
                functools.partial(genkernels.linear, activation=activation),
                plain(activation),
            ):
                output = function(**values).sum()
                with torch.no_grad():
                    tensor.add_(0)
                try:
                    torch.autograd.grad(output, leaves)
                    outcomes.append(None)
                except RuntimeError as error:
                    outcomes.append("modified by an inplace operation" in str(error))
            assert outcomes[0] == outcomes[1], f"{name}: {outcomes}"

    def test_checkpoint(self) -> None:
        values = arguments(70, 17, 33)
        leaves = [value.requires_grad_() for value in values.values()]
        function = functools.partial(genkernels.linear, activation="gelu_tanh")
        output = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
        plain_gradients = torch.autograd.grad(function(*leaves).sum(), leaves)
        assert_bitwise_equal(torch.autograd.grad(output.sum(), leaves), plain_gradients)


class TestTransforms:
    values = tuple(arguments(4, 5, 6).values())

    def test_vmap(self) -> None:
        draws = [arguments(4, 5, 6, seed=seed) for seed in range(3)]
        stacked = [torch.stack([draw[name] for draw in draws]) for name in TENSORS]
        actual = torch.func.vmap(genkernels.linear)(*stacked)
        assert torch.equal(actual, torch.func.vmap(F.linear)(*stacked))

    def test_per_sample_gradients(self) -> None:
        def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda input, weight: function(input, weight, self.values[2]).square().sum()

        actual, expected = (
            torch.func.vmap(torch.func.grad(loss(function), argnums=1), (0, None))(*self.values[:2])
            for function in (genkernels.linear, F.linear)
        )
        assert torch.equal(actual, expected)

    def test_forward_mode(self) -> None:
        tangents = tuple(map(torch.ones_like, self.values))
        assert_bitwise_equal(
            list(torch.func.jvp(genkernels.linear, self.values, tangents)),
            list(torch.func.jvp(F.linear, self.values, tangents)),
        )


class TestAutocast:
    @pytest.mark.parametrize("rows", [4, 99])
    def test_bfloat16(self, rows: int) -> None:
        values = arguments(rows, 17, 33)
        with torch.autocast("cpu", torch.bfloat16):
            actual, plain = genkernels.linear(**values), F.linear(**values)
        assert actual.dtype == plain.dtype == torch.bfloat16
        narrow = {name: value.bfloat16() for name, value in values.items()}
        assert torch.equal(actual, genkernels.linear(**narrow))

    @pytest.mark.usefixtures("nothing_handed_over")
    @each_activation
    def test_gradients(self, activation: str | None) -> None:
        """Of float32 leaves float32, as autocast's casts are differentiated."""
        values = arguments(70, 17, 33)
        with torch.autocast("cpu", torch.bfloat16):
            actual = with_gradients(
                lambda **v: (genkernels.linear(**v, activation=activation),), values
            )
            expected = with_gradients(lambda **v: (plain(activation)(**v),), values)
        double = {name: value.double() for name, value in values.items()}
        exact = with_gradients(lambda **v: (plain(activation)(**v).bfloat16(),), double)
        for name, *three in zip(("output", *TENSORS), actual, expected, exact, strict=True):
            assert three[0].dtype == three[1].dtype
            assert_parity(name, *(tensor.bfloat16() for tensor in three[:2]), three[2].double())
        assert genkernels.stats()["linear_backward", "cpp"] == 1

    @pytest.mark.usefixtures(
        "poisoned_memory", "compiled_only", "simd", "one_thread", "nothing_handed_over"
    )
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("shape", [(1, 5, 3), (70, 17, 33), (530, 160, 97)], ids=shape_id)
    def test_float32_parameters(self, shape: tuple[int, int, int], bias: bool) -> None:
        """They are narrowed as they are packed, and their gradients are not: the same bits as of
        bfloat16 parameters, before these gradients are rounded."""
        narrow = arguments(*shape, torch.bfloat16, bias=bias)
        wide = narrow | {n: t.float() for n, t in narrow.items() if n != "input"}

        def outputs(**v: Tensor) -> tuple[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return (genkernels.linear(**v, activation="silu"),)

        if shape[0] == 1:  # of so few rows bfloat16 weights are read as they lie
            narrow, wide = (v | {"input": v["input"].expand(65, -1)} for v in (narrow, wide))
        actual, expected = (with_gradients(outputs, v) for v in (wide, narrow))
        for name, *both in zip(("output", *wide), actual, expected, strict=True):
            is_parameter = name in ("weight", "bias")
            assert both[0].dtype == (torch.float32 if is_parameter else torch.bfloat16)
            assert torch.equal(both[0].bfloat16(), both[1]), name
            assert torch.equal(both[0], both[1].to(both[0].dtype)) is not is_parameter, name

    @pytest.mark.usefixtures("nothing_handed_over")
    def test_parameters_are_rounded_as_autocast_rounds_them(self) -> None:
        values = arguments(70, 17, 33)
        narrow = {name: value.bfloat16() for name, value in values.items()}
        for value in values.values():
            value.requires_grad_()
        if "avx512_bf16" not in backend.simd_levels():
            pytest.skip("SIMD level avx512_bf16: elsewhere they are not rounded at all")
        with torch.autocast("cpu", torch.bfloat16), backend.use_simd("avx512_bf16"):
            actual = genkernels.linear(values["input"], values["weight"])
            expected = genkernels.linear(narrow["input"], narrow["weight"])
        assert torch.equal(actual, expected)

    @pytest.mark.usefixtures("nothing_handed_over")
    def test_second_order(self) -> None:
        values = arguments(70, 5, 6)

        def second(function: Callable[..., Tensor]) -> list[Tensor]:
            leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
            with torch.autocast("cpu", torch.bfloat16):
                loss = function(**leaves).float().square().sum()
            gradients = torch.autograd.grad(loss, tuple(leaves.values()), create_graph=True)
            assert all(g.dtype == torch.float32 for g in gradients)
            of_gradients = sum(g.square().sum() for g in gradients)
            return list(torch.autograd.grad(of_gradients, tuple(leaves.values())))

        for actual, expected in zip(
            second(functools.partial(genkernels.linear, activation="gelu")),
            second(plain("gelu")),
            strict=True,
        ):
            scale = expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.01 * scale)

    @pytest.mark.usefixtures("nothing_handed_over")
    def test_compiled(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(genkernels.linear, backend="aot_eager", fullgraph=True)
        values = arguments(70, 17, 33)
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = (
                with_gradients(lambda **v: (function(**v),), values)  # noqa: B023
                for function in (compiled, genkernels.linear)
            )
        assert_bitwise_equal(actual, expected)

    def test_float16(self) -> None:
        values = arguments(4, 17, 33)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(genkernels.linear(**values), F.linear(**values))
            assert genkernels.stats() == HANDED_OVER
            assert genkernels.explain("linear", **values).backend == "reference"

    def test_float64_stays(self) -> None:
        values = arguments(4, 17, 33, torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(genkernels.linear(**values), genkernels.linear(**values))
            assert genkernels.linear(**values).dtype == F.linear(**values).dtype == torch.float64


class TestCompile:
    def test_dynamic(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(
            genkernels.linear, backend="aot_eager", fullgraph=True, dynamic=True
        )
        for rows in (3, 4, 32):
            values = arguments(rows, 6, 8)
            assert torch.equal(compiled(**values), genkernels.linear(**values))
        assert genkernels.stats(reset=True) == {("linear_forward", "cpp"): 6}
        values = arguments(33, 6, 8)
        assert torch.equal(compiled(**values), F.linear(**values))
        assert genkernels.stats() == {}

    def test_gradients(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(genkernels.linear, backend="aot_eager", fullgraph=True)
        values = arguments(4, 6, 8)
        actual, expected = (
            with_gradients(lambda **v: (function(**v),), values)  # noqa: B023
            for function in (compiled, F.linear)
        )
        assert_bitwise_equal(actual, expected)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_graphs_are_for_any_number_of_rows(self, requires_grad: bool) -> None:
        """Of those that are handed over too: the reason must not write the number down."""
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(genkernels.linear, backend=counter, fullgraph=True)
        weight = torch.randn(16, 16, requires_grad=requires_grad)
        for rows in range(33, 45):
            compiled(torch.randn(rows, 16), weight)
        assert counter.frame_count <= 2

    @pytest.mark.usefixtures("nothing_handed_over")
    @each_activation
    def test_compiled_gradients(self, activation: str | None) -> None:
        torch._dynamo.reset()
        function = functools.partial(genkernels.linear, activation=activation)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        values = arguments(70, 6, 8)
        actual, expected = (
            with_gradients(lambda **v: (function(**v),), values)  # noqa: B023
            for function in (compiled, function)
        )
        assert_bitwise_equal(actual, expected)
        assert genkernels.stats()["linear_backward", "cpp"] == 2

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        module = genkernels.nn.Linear(6, 8)
        compiled = torch.compile(module, fullgraph=True)
        input = torch.randn(2, 3, 6)
        with torch.no_grad():
            assert torch.equal(compiled(input), module(input))
        assert genkernels.stats() == {("linear_forward", "cpp"): 2}
        torch.testing.assert_close(compiled(input), module(input))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_export(self, requires_grad: bool) -> None:
        module = genkernels.nn.Linear(6, 8).requires_grad_(requires_grad)
        program = torch.export.export(module, (torch.randn(4, 6),))
        targets = {str(node.target) for node in program.graph.nodes}
        assert ("genkernels.linear_forward.default" in targets) is not requires_grad
        input = torch.randn(4, 6)
        assert torch.equal(program.module()(input), module(input))


class TestErrors:
    """As torch.nn.functional.linear a RuntimeError, and it says which argument and what shapes."""

    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("input", lambda t: t[0, 0], [r"\[\]"]),
            ("input", lambda t: t[:, :4], [r"\[4, 4\]", r"\[4, 5\]", r"\[6, 5\]"]),
            ("input", lambda t: t[None, :, :4], [r"\[1, 4, 4\]", r"\[1, 4, 5\]"]),
            ("weight", lambda t: t[None], [r"\[1, 6, 5\]"]),
            ("bias", lambda t: t[:-1], [r"\[5\]", r"\[6\]"]),
            ("weight", lambda t: t.double(), ["float64", "float32"]),
            ("bias", lambda t: t.bfloat16(), ["bfloat16", "float32"]),
        ],
        ids=[
            "input_0d",
            "columns",
            "columns_3d",
            "weight_3d",
            "bias",
            "weight_dtype",
            "bias_dtype",
        ],
    )
    @pytest.mark.parametrize("mode", ["eager", "fake"])
    def test_argument(
        self, name: str, change: Callable[[Tensor], Any], words: list[str], mode: str
    ) -> None:
        values = arguments(4, 5, 6)
        values[name] = change(values[name])
        with pytest.raises(RuntimeError):
            F.linear(**values)
        if mode == "fake":
            fake = torch._subclasses.FakeTensorMode()
            values = {k: fake.from_tensor(v) for k, v in values.items()}
        with pytest.raises(RuntimeError, match=name) as caught:
            genkernels.linear(**values)
        for word in words:
            assert caught.match(word)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("input", lambda t: t[0, 0]),
            ("input", lambda t: t[:, :4]),
            ("weight", lambda t: t[0]),
            ("weight", lambda t: t.double()),
            ("bias", lambda t: t[:-1]),
            ("bias", lambda t: t.double()),
        ],
    )
    def test_raw_op(self, name: str, change: Callable[[Tensor], Any]) -> None:
        """It checks for itself: nothing is read out of bounds."""
        values = arguments(4, 5, 6)
        values[name] = change(values[name])
        with pytest.raises(RuntimeError, match=name):
            torch.ops.genkernels.linear_forward(*values.values(), 0)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("grad_output", lambda t: t[:3]),
            ("grad_output", lambda t: t[:, :5]),
            ("grad_output", lambda t: t.double()),
            ("input", lambda t: t[:3]),
            ("input", lambda t: t[:, :4]),
            ("input", lambda t: t.double()),
            ("weight", lambda t: t[0]),
            ("weight", lambda t: t[:5]),
            ("weight", lambda t: t.double()),
            ("saved", lambda t: t[:3]),
            ("saved", lambda t: t[:, :5]),
            ("saved", lambda t: t.double()),
            ("saved", lambda t: None),
            ("activation", lambda t: 5),
            ("activation", lambda t: -1),
            ("activation", lambda t: 0),
        ],
    )
    def test_raw_backward(self, name: str, change: Callable[[Any], Any]) -> None:
        values: dict[str, Any] = {
            "grad_output": torch.randn(4, 6),
            **arguments(4, 5, 6, bias=False),
        }
        values |= {"saved": torch.randn(4, 6), "activation": 2}
        torch.ops.genkernels.linear_backward(*values.values(), True, False)
        values[name] = change(values[name])
        with pytest.raises(RuntimeError, match=r": expected "):
            torch.ops.genkernels.linear_backward(*values.values(), True, False)

    @pytest.mark.parametrize(
        ("dtype", "weight_dtype", "is_wider"),
        [
            (torch.bfloat16, torch.float32, False),
            (torch.bfloat16, torch.bfloat16, True),
            (torch.bfloat16, torch.float64, True),
            (torch.float32, torch.float32, True),
            (torch.float32, torch.bfloat16, True),
            (torch.float32, None, True),
        ],
    )
    def test_raw_backward_of_wider_parameters(
        self, dtype: torch.dtype, weight_dtype: torch.dtype | None, is_wider: bool
    ) -> None:
        grad_output, input = torch.randn(4, 6, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        weight = None if weight_dtype is None else torch.randn(6, 5, dtype=weight_dtype)
        with pytest.raises(RuntimeError, match=r"(weight|is_wider): expected "):
            torch.ops.genkernels.linear_backward(
                grad_output, input, weight, None, 0, True, is_wider
            )

    def test_activation(self) -> None:
        with pytest.raises(
            ValueError, match=r"activation: expected one of None, 'relu', .*'swish'"
        ):
            genkernels.linear(**arguments(4, 5, 6), activation="swish")
        with pytest.raises(ValueError, match="activation"):
            genkernels.nn.Linear(5, 6, activation="swish")


class TestModule:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @each_dtype
    def test_is_torch_nn_linear(self, dtype: torch.dtype, bias: bool) -> None:
        torch.manual_seed(0)
        module = genkernels.nn.Linear(17, 33, bias=bias, dtype=dtype)
        torch.manual_seed(0)
        twin = torch.nn.Linear(17, 33, bias=bias, dtype=dtype)
        assert isinstance(module, torch.nn.Linear)
        assert repr(module) == repr(twin)
        assert module.state_dict().keys() == twin.state_dict().keys()
        assert_bitwise_equal(list(module.parameters()), list(twin.parameters()))
        twin.load_state_dict(module.state_dict())
        input = torch.randn(4, 17, dtype=dtype)
        assert torch.equal(module(input), twin(input))
        with torch.no_grad():
            torch.testing.assert_close(module(input), twin(input))
        assert genkernels.stats() == HANDED_OVER | COMPILED

    def test_made_without_init(self) -> None:
        """A module that was made torch's own, or saved before there were activations."""
        layer = torch.nn.Linear(17, 33)
        layer.__class__ = genkernels.nn.Linear
        assert repr(layer) == repr(torch.nn.Linear(17, 33))
        assert layer(torch.randn(4, 17)).shape == (4, 33)

    @each_activation
    def test_activation(self, activation: str | None) -> None:
        layer = genkernels.nn.Linear(17, 33, activation=activation)
        assert ("activation" in repr(layer)) is (activation is not None)
        input = torch.randn(4, 17)
        with torch.no_grad():
            torch.testing.assert_close(
                layer(input), plain(activation)(input, layer.weight, layer.bias)
            )
        assert genkernels.stats() == COMPILED
