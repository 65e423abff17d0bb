"""genkernels.linear and genkernels.nn.Linear against torch.nn.functional.linear and
torch.nn.Linear."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import ExactSums, assert_parity
from test_gru import DTYPES, assert_bitwise_equal, dtype_id, each_dtype, relaid, with_gradients
from torch import Tensor
from torch.nn import functional as F

import genkernels
from genkernels import backend
from genkernels.ops.linear import MOST_ROWS

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


@pytest.fixture(autouse=True)
def counts_from_zero() -> None:
    genkernels.stats(reset=True)


@pytest.mark.usefixtures("poisoned_memory", "compiled_only", "simd", "one_thread")
class TestParity:
    """The one rule, at every SIMD level, in memory full of NaN, in the compiled kernel alone."""

    @each_dtype
    @pytest.mark.parametrize("shape", [*SHAPES, *LONG_SHAPES], ids=shape_id)
    def test_shapes(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        check(lambda seed: arguments(*shape, dtype, seed=seed))

    @each_dtype
    def test_rows(self, dtype: torch.dtype) -> None:
        for rows in range(MOST_ROWS + 1):
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


@pytest.mark.usefixtures("simd", "two_threads", "compiled_only")
@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 32])
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

    def test_many_rows(self) -> None:
        self.check(arguments(MOST_ROWS + 1, 5, 6), f"{MOST_ROWS + 1} rows")
        self.check(arguments((3, 11), 5, 6), "33 rows")

    @pytest.mark.parametrize("needs", TENSORS)
    def test_gradients(self, needs: str) -> None:
        values = arguments(4, 5, 6)
        values[needs].requires_grad_()
        self.check(values, "gradients")
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

    def test_weight_of_one_dimension(self) -> None:
        values = arguments(4, 5, 6, bias=False)
        values["weight"] = values["weight"][0]
        self.check(values, "one dimension")

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
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_opcheck(leading: tuple[int, ...], bias: bool) -> None:
    values = arguments(leading, 5, 6, bias=bias)
    raw = torch.ops.genkernels.linear_forward.default
    torch.library.opcheck(raw, tuple(values.get(name) for name in TENSORS))


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
            torch.ops.genkernels.linear_forward(*values.values())

    def test_raw_op_takes_any_number_of_rows(self) -> None:
        values = arguments(101, 37, 19)
        torch.testing.assert_close(
            torch.ops.genkernels.linear_forward(*values.values()), F.linear(**values)
        )


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
