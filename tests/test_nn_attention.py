"""genkernels.nn.MultiheadAttention: a drop-in for torch.nn's."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from parity import assert_module_parity, assert_parity, run_module, tensors_of
from test_gru import each_dtype
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing._internal.common_modules import module_db

import genkernels

E, H, L, S, B = 12, 3, 5, 7, 2
NAMES = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
OPTIONS = [dict(zip(NAMES, values, strict=True)) for values in product((True, False), repeat=4)]
LINEAR = {("linear_forward", "cpp"), ("linear_backward", "cpp")}
ATTENTION = {("attention_forward", "cpp"), ("attention_backward", "cpp")}
pytestmark = pytest.mark.usefixtures("one_thread")


def pair(module: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A torch module and ours with the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(nn, module)(*args, **options)
    ours = getattr(genkernels.nn, module)(*args, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def attention(**options: Any) -> tuple[nn.Module, nn.Module]:
    return pair("MultiheadAttention", E, H, **options)


def assert_same(
    theirs: nn.Module, ours: nn.Module, *args: Any, draws: int = 8, **kwargs: Any
) -> None:
    """Outputs and every gradient under the one rule, and the compiled kernels computed them."""
    genkernels.stats(reset=True)
    assert_module_parity(theirs, ours, args, kwargs, draws)
    kernels = LINEAR if kwargs.get("need_weights", True) else LINEAR | ATTENTION
    assert set(genkernels.stats(reset=True)) == kernels


def inputs(
    kind: str = "self", batch_first: bool = False, features: tuple[int, int] = (E, E)
) -> list[Tensor]:
    """Query, key and value: one tensor, key and value one, three, or three without a batch."""
    lead = (B,) if kind != "unbatched" else ()
    query = torch.randn(*lead, L, E)
    key = query if kind == "self" else torch.randn(*lead, S, features[0])
    value = key if kind in ("self", "cross") else torch.randn(*lead, S, features[1])
    if lead and not batch_first:
        by_name = {id(tensor): tensor.transpose(0, 1) for tensor in (query, key, value)}
        query, key, value = (by_name[id(tensor)] for tensor in (query, key, value))
    return [query, key, value]


def mask(*shape: int, boolean: bool = True) -> Tensor:
    """No query loses every key: the first one stays."""
    hidden = torch.rand(shape) > 0.6
    hidden[..., 0] = False
    return hidden if boolean else torch.randn(shape).masked_fill(hidden, -torch.inf)


def options_id(options: dict[str, Any]) -> str:
    return "-".join(name for name, value in options.items() if value) or "none"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.usefixtures("nothing_handed_over", "poisoned_memory")
class TestParity:
    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    def test_options(self, options: dict[str, Any], need_weights: bool) -> None:
        """Each beside inputs of every kind, and with masks in every second case."""
        theirs, ours = attention(**options)
        for i, kind in enumerate(("self", "cross", "three", "unbatched")):
            query, key, value = inputs(kind, options["batch_first"])
            masks = {}
            if (i + need_weights) % 2:
                keys = L if kind == "self" else S
                masks["attn_mask"] = mask(L, keys)
                masks["key_padding_mask"] = mask(*((B,) if kind != "unbatched" else ()), keys)
            arguments = {"need_weights": need_weights, "average_attn_weights": i < 2, **masks}
            assert_same(theirs, ours, query, key, value, draws=4, **arguments)

    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    @pytest.mark.parametrize("padding", [None, True, False], ids=["", "padding", "added_padding"])
    @pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "added"])
    @pytest.mark.parametrize("shape", [(L, S), (B * H, L, S)], ids=["2d", "3d"])
    @pytest.mark.filterwarnings("ignore:Support for mismatched")
    def test_masks(
        self, shape: tuple[int, ...], boolean: bool, padding: bool | None, need_weights: bool
    ) -> None:
        more = {"add_bias_kv": len(shape) == 2, "add_zero_attn": boolean}
        for options in ({}, more):
            theirs, ours = attention(**options)
            masks = {"attn_mask": mask(*shape, boolean=boolean)}
            if padding is not None:
                masks["key_padding_mask"] = mask(B, S, boolean=padding)
            assert_same(theirs, ours, *inputs("cross"), need_weights=need_weights, **masks)

    @pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "added"])
    def test_masks_without_a_batch(self, boolean: bool) -> None:
        theirs, ours = attention()
        arguments = {
            "attn_mask": mask(H, L, S, boolean=boolean),
            "key_padding_mask": mask(S, boolean=boolean),
        }
        for need_weights in (True, False):
            assert_same(theirs, ours, *inputs("unbatched"), need_weights=need_weights, **arguments)

    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    @pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
    @pytest.mark.parametrize("more", [False, True], ids=["", "more_keys"])
    @pytest.mark.parametrize("kind", ["self", "cross"])
    def test_is_causal(self, kind: str, more: bool, padding: bool, need_weights: bool) -> None:
        theirs, ours = attention(add_bias_kv=more, add_zero_attn=more)
        keys = L if kind == "self" else S
        arguments: dict[str, Any] = {"attn_mask": torch.ones(L, keys, dtype=torch.bool).triu(1)}
        if padding:
            arguments["key_padding_mask"] = mask(B, keys)
        arguments |= {"is_causal": True, "need_weights": need_weights}
        assert_same(theirs, ours, *inputs(kind), **arguments)

    @pytest.mark.parametrize("options", OPTIONS[::3], ids=options_id)
    @pytest.mark.parametrize("features", [(4, E), (E, 9), (5, 5)], ids=str)
    def test_other_features(self, features: tuple[int, int], options: dict[str, Any]) -> None:
        theirs, ours = attention(kdim=features[0], vdim=features[1], **options)
        query, key, value = inputs("three", options["batch_first"], features)
        assert_same(theirs, ours, query, key, value)
        assert_same(theirs, ours, query, key, value, need_weights=False)
        if features == (5, 5):
            assert_same(theirs, ours, query, key, key)

    @each_dtype
    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    @pytest.mark.usefixtures("simd")
    def test_dtypes(self, need_weights: bool, dtype: torch.dtype) -> None:
        theirs, ours = (module.to(dtype) for module in attention(batch_first=True))
        query, key, value = (tensor.to(dtype) for tensor in inputs("three", True))
        hidden = mask(L, S)
        options = {"need_weights": need_weights, "attn_mask": hidden}
        assert_same(theirs, ours, query, key, value, **options)

    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    def test_larger(self, need_weights: bool) -> None:
        theirs, ours = pair("MultiheadAttention", 96, 4, batch_first=True)
        x = torch.randn(3, 70, 96)
        assert_same(theirs, ours, x, x, x, need_weights=need_weights, draws=3)

    @pytest.mark.parametrize("sizes", [(0, B, S), (L, 0, S), (L, B, 0), (1, 1, 1)], ids=str)
    def test_small_and_empty(self, sizes: tuple[int, int, int]) -> None:
        rows, batch, keys = sizes
        theirs, ours = attention()
        query, key = torch.randn(rows, batch, E), torch.randn(keys, batch, E)
        for need_weights in (True, False):
            arguments = {"need_weights": need_weights}
            results = [
                run_module(m, [query, key, key], arguments, torch.float32) for m in (theirs, ours)
            ]
            torch.testing.assert_close(results[1], results[0])


class TestKernels:
    @pytest.mark.usefixtures("nothing_handed_over")
    def test_products(self) -> None:
        """As few as there are tensors, and the heads are read and joined without a copy."""
        _, ours = pair("MultiheadAttention", 64, 4, batch_first=True)
        query, key, value = (torch.randn(2, 40, 64) for _ in range(3))
        for arguments, products in (
            ((query, query, query), 2),
            ((query, key, key), 3),
            ((query, key, value), 4),
        ):
            genkernels.stats(reset=True)
            with torch.no_grad(), torch.profiler.profile() as profile:
                ours(*arguments, need_weights=False)
            assert sum(n for (op, _), n in genkernels.stats().items() if "linear" in op) == products
            assert genkernels.stats()["attention_forward", "cpp"] == 1
            copies = {"aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::bmm"}
            assert not copies & {event.key for event in profile.key_averages()}

    def test_hint_spares_the_mask(self) -> None:
        """Beside a key_padding_mask, too: no mask of all queries and keys is made."""
        _, ours = attention()
        x, hidden = torch.randn(50, B, E), mask(B, 50)
        causal = nn.Transformer.generate_square_subsequent_mask(50) == -torch.inf
        arguments = {"attn_mask": causal, "key_padding_mask": hidden, "need_weights": False}
        expected = ours(x, x, x, **arguments)[0]
        with torch.profiler.profile(record_shapes=True) as profile:
            actual = ours(x, x, x, is_causal=True, **arguments)[0]
        torch.testing.assert_close(actual, expected)
        assert not any(shape[-2:] == [50, 50] for e in profile.events() for shape in e.input_shapes)

    def test_reference(self) -> None:
        theirs, ours = attention()
        with genkernels.use_backend("reference"):
            assert_module_parity(theirs, ours, inputs("cross"), {"need_weights": False}, 8)


class TestHiddenKeys:
    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    @pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "added"])
    def test_query_without_keys(self, boolean: bool, need_weights: bool) -> None:
        """Zeros, also where torch's gives NaN beside the weights; other queries' are torch's."""
        theirs, ours = attention(batch_first=True)
        hidden = mask(B, S)
        hidden[0] = True
        if not boolean:
            hidden = torch.zeros(B, S).masked_fill(hidden, -torch.inf)
        query, key, value = inputs("three", True)
        arguments = {"key_padding_mask": hidden, "need_weights": need_weights}
        expected = theirs(query, key, value, **arguments)
        assert expected[0][0].isnan().all() == need_weights
        result = run_module(ours, [query, key, value], arguments, torch.float32)
        output = result["output 0"]
        assert torch.equal(output[0], ours.out_proj.bias.expand(L, E))
        torch.testing.assert_close(output[1], expected[0][1])
        if need_weights:
            assert torch.equal(result["output 1"][0], torch.zeros(L, S))
            torch.testing.assert_close(result["output 1"][1], expected[1][1])
        assert all(tensor.isfinite().all() for tensor in result.values())
        assert not result["grad of argument 0"][0].any()

    def test_large_scores(self) -> None:
        """Weights of scores whose exponentials are no numbers any more."""
        theirs, ours = attention()
        query, key, value = inputs("three")
        exact = copy.deepcopy(theirs).double()(
            30 * query.double(), 30 * key.double(), value.double()
        )
        plain, actual = (module(30 * query, 30 * key, value) for module in (theirs, ours))
        for i, name in enumerate(("output", "weights")):
            assert_parity(name, actual[i], plain[i], exact[i])


class TestDropout:
    @pytest.mark.parametrize("options", OPTIONS[::5], ids=options_id)
    def test_returned_weights(self, options: dict[str, Any]) -> None:
        """From one seed torch's own: what is returned is what was dropped."""
        theirs, ours = attention(dropout=0.4, **options)
        arguments = inputs("three", options["batch_first"])
        expected, actual = (
            [torch.manual_seed(3), module(*arguments, average_attn_weights=False)][1]
            for module in (theirs, ours)
        )
        torch.testing.assert_close(actual, expected)
        assert 0.2 < (actual[1] == 0).float().mean() < 0.6

    def test_rate(self) -> None:
        """Without weights: each is zero or divided by what is kept, in training alone."""
        n, p = 256, 0.3
        _, ours = pair("MultiheadAttention", n, 1, dropout=p, bias=False)
        with torch.no_grad():  # all scores are 0, and the output is the weights
            ours.in_proj_weight.copy_(torch.cat([torch.zeros(2 * n, n), torch.eye(n)]))
            ours.out_proj.weight.copy_(torch.eye(n))
            x = torch.eye(n).unsqueeze(1)
            first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
            ours.eval()
            kept = ours(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(kept, torch.full((n, 1, n), 1 / n))
        for dropped in (first, second):
            is_zero = dropped == 0
            torch.testing.assert_close(
                dropped[~is_zero], torch.full_like(dropped[~is_zero], 1 / n / (1 - p))
            )
            deviation = (p * (1 - p) / n**2) ** 0.5
            assert abs(is_zero.double().mean() - p) < 4 * deviation
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    @pytest.mark.usefixtures("nothing_handed_over")
    def test_of_everything_and_in_evaluation(self, need_weights: bool) -> None:
        arguments = {"need_weights": need_weights}
        assert_module_parity(*attention(dropout=1.0), inputs("cross"), arguments, 8)
        theirs, ours = attention(dropout=0.5)
        assert_same(theirs.eval(), ours.eval(), *inputs("cross"), **arguments)


class TestState:
    @pytest.mark.parametrize("kdim", [None, 5])
    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    def test_parameters(self, options: dict[str, Any], kdim: int | None) -> None:
        """The names, shapes, order and, from one seed, initial values of torch's."""
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(E, H, kdim=kdim, **options)
        torch.manual_seed(0)
        ours = genkernels.nn.MultiheadAttention(E, H, kdim=kdim, **options)
        expected, actual = theirs.state_dict(), ours.state_dict()
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        theirs.load_state_dict(actual, strict=True)
        ours.load_state_dict(expected, strict=True)
        assert repr(ours) == repr(theirs)
        assert isinstance(ours, nn.MultiheadAttention)

    @pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch_save"])
    def test_copies(self, duplicate: str) -> None:
        """A copy computes the same and shares no memory."""
        _, ours = attention(add_bias_kv=True)
        arguments = inputs("cross")
        expected = ours(*arguments)
        if duplicate == "torch_save":
            file = io.BytesIO()
            torch.save(ours, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = (
                copy.deepcopy(ours) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(ours))
            )
        assert type(other) is genkernels.nn.MultiheadAttention
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        assert all(map(torch.equal, other(*arguments), expected))

    def test_written_weights_are_seen(self) -> None:
        theirs, ours = attention()
        arguments = inputs("cross")
        ours(*arguments)
        for module in (theirs, ours):
            module.in_proj_weight.data.mul_(0.5)
            module.out_proj.weight = nn.Parameter(module.out_proj.weight * 2)
        torch.testing.assert_close(ours(*arguments), theirs(*arguments))

    @pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
    def test_parametrized(self, name: str) -> None:
        class Doubled(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return 2 * weight

        theirs, ours = attention()
        arguments = inputs("cross")
        before = ours(*arguments)[0]
        for module in (theirs, ours):
            owner, _, weight = name.rpartition(".")
            parametrize.register_parametrization(module.get_submodule(owner), weight, Doubled())
        torch.testing.assert_close(ours(*arguments), theirs(*arguments))
        assert not torch.equal(ours(*arguments)[0], before)

    def test_freeze_passes_over(self) -> None:
        _, ours = attention()
        model = nn.ModuleList([ours, genkernels.nn.GRU(E, 4)])
        x = inputs()
        with torch.no_grad():
            expected = ours(*x)
            genkernels.freeze(model)
            assert all(map(torch.equal, ours(*x), expected))
        genkernels.unfreeze(model)

    def test_meta_device(self) -> None:
        module = genkernels.nn.MultiheadAttention(E, H, device="meta")
        output, weights = module(*(t.to("meta") for t in inputs("cross")))
        assert (output.shape, weights.shape) == ((L, B, E), (B, L, S))

    @pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=options_id)
    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    def test_autocast(self, need_weights: bool, options: dict[str, Any]) -> None:
        theirs, ours = attention(**options)
        arguments, settings = inputs("cross"), {"need_weights": need_weights}
        hidden = mask(L, S)
        settings["attn_mask"] = hidden
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = (tensors_of(m(*arguments, **settings)) for m in (theirs, ours))
        exact = tensors_of(theirs.double()(*(t.double() for t in arguments), **settings))
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        for *tensors, name in zip(actual, expected, exact, ("output", "weights"), strict=False):
            assert_parity(name, *tensors)


class TestTransforms:
    @pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
    def test_functional_grad(self, need_weights: bool) -> None:
        """Per-sample gradients with vmap over grad over functional_call."""
        _, ours = attention()
        query, hidden = torch.randn(3, L, E), mask(3, L)
        parameters = dict(ours.named_parameters())

        def loss(parameters: dict[str, Tensor], x: Tensor, hidden: Tensor) -> Tensor:
            arguments = {"key_padding_mask": hidden, "need_weights": need_weights}
            results = torch.func.functional_call(ours, parameters, (x, x, x), arguments)
            return sum(tensor.square().sum() for tensor in tensors_of(results))

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, query, hidden)
        for b in range(3):
            expected = torch.autograd.grad(
                loss(parameters, query[b], hidden[b]), list(parameters.values())
            )
            for name, gradient in zip(parameters, expected, strict=True):
                torch.testing.assert_close(gradients[name][b], gradient)

    def test_second_derivative(self) -> None:
        _, ours = attention(add_bias_kv=True)
        ours.double()
        leaves = [torch.randn(2, E, dtype=torch.float64, requires_grad=True) for _ in range(3)]

        def function(*arguments: Tensor) -> Tensor:
            return ours(*arguments, need_weights=False)[0]

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)

    def test_compile_without_recompiling(self) -> None:
        """One graph for all sizes, forward and backward."""
        torch._dynamo.reset()
        _, ours = attention(batch_first=True, add_bias_kv=True, add_zero_attn=True, kdim=5)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)

        def check(sizes: tuple[int, int, int]) -> None:
            rows, batch, keys = sizes
            query = torch.randn(batch, rows, E)
            key, value = (torch.randn(batch, keys, n) for n in (5, E))
            arguments = [
                [query, key, value],
                {"key_padding_mask": mask(batch, keys)},
                torch.float32,
            ]
            actual, expected = (run_module(module, *arguments) for module in (compiled, ours))
            torch.testing.assert_close(dict(zip(expected, actual.values(), strict=True)), expected)

        check((9, 4, 11))  # `linear` has other kernels for up to 32 rows, and from 64 on
        with torch.compiler.set_stance("fail_on_recompile"):
            for sizes in ((12, 5, 7), (4, 10, 6)):
                check(sizes)

    @pytest.mark.parametrize("kind", ["self", "cross", "unbatched"])
    def test_compile(self, kind: str) -> None:
        torch._dynamo.reset()
        _, ours = attention()
        keys = L if kind == "self" else S
        causal = torch.ones(L, keys, dtype=torch.bool).triu(1)
        arguments = {"attn_mask": causal, "is_causal": True, "need_weights": False}
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        x = inputs(kind)
        torch.testing.assert_close(compiled(*x, **arguments), ours(*x, **arguments))

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        _, ours = attention()
        compiled = torch.compile(ours, fullgraph=True)
        query, key, _ = inputs("cross")
        settings = {"key_padding_mask": mask(B, S), "need_weights": False}
        with torch.no_grad():
            actual, expected = (m(query, key, key, **settings)[0] for m in (compiled, ours))
        torch.testing.assert_close(actual, expected)

    def test_export(self) -> None:
        _, ours = attention(batch_first=True)
        ours.eval().requires_grad_(False)
        rows, batch = torch.export.Dim("rows", min=2), torch.export.Dim("batch", min=2)
        dims = ({0: batch, 1: rows}, {0: batch, 1: rows}, {0: batch, 1: rows}, None, None)
        x = torch.randn(3, 5, E)
        program = torch.export.export(ours, (x, x, x, None, False), dynamic_shapes=dims)
        targets = {str(node.target) for node in program.graph.nodes}
        assert "genkernels.attention_forward.default" in targets
        x = torch.randn(4, 9, E)
        actual, expected = (m(x, x, x, None, False) for m in (program.module(), ours))
        torch.testing.assert_close(actual, expected)


def module_samples(*modules: type[nn.Module]) -> list[Any]:
    """PyTorch's own samples, as its test suite runs them."""
    torch.manual_seed(0)
    return [
        pytest.param(info.module_cls.__name__, sample, id=f"{info.name}-{i}")
        for info in module_db
        if info.module_cls in modules
        for i, sample in enumerate(
            info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
            )
        )
    ]


def assert_equal(module: str, sample: Any, **arguments: Any) -> None:
    """Outputs and every gradient of a sample in float64."""
    constructor, forward = sample.constructor_input, sample.forward_input
    modules = pair(module, *constructor.args, **constructor.kwargs, dtype=torch.float64)
    arguments = {**forward.kwargs, **arguments}
    expected, actual = (run_module(m, forward.args, arguments, torch.float64) for m in modules)
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("nothing_handed_over")
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize(("module", "sample"), module_samples(nn.MultiheadAttention))
def test_module_info(module: str, sample: Any, need_weights: bool) -> None:
    assert_equal(module, sample, need_weights=need_weights)


def call(name: str, function: Callable[[nn.Module, Tensor, Tensor], Any], *words: str) -> Any:
    return pytest.param(function, (name, *words), id=f"{name}-{'-'.join(words)}")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        call("query", lambda m, q, k: m(q[0, 0], k, k), "[12]"),
        call("query", lambda m, q, k: m(q[None], k, k), "[1, 5, 2, 12]"),
        call("query", lambda m, q, k: m(q[..., :9], k, k), "[5, 2, 9]", "[5, 2, 12]"),
        call("key", lambda m, q, k: m(q, k[0], k), "[2, 12]"),
        call("value", lambda m, q, k: m(q, k, k[0]), "[2, 12]"),
        call("key", lambda m, q, k: m(q[0], k, k[0]), "[7, 2, 12]"),
        call("key", lambda m, q, k: m(q, k[..., :9], k[..., :9]), "[7, 2, 9]", "[7, 2, 12]"),
        call("value", lambda m, q, k: m(q, k, k[..., :9]), "[7, 2, 9]", "[7, 2, 12]"),
        call("value", lambda m, q, k: m(q, k, k[:6]), "[6, 2, 12]", "[7, 2, 12]"),
        call("key", lambda m, q, k: m(q, k[:, :1], k[:, :1]), "[7, 1, 12]", "2"),
        call("attn_mask", lambda m, q, k: m(q, k, k, attn_mask=torch.ones(5)), "[5]"),
        call(
            "attn_mask", lambda m, q, k: m(q, k, k, attn_mask=torch.ones(5, 6)), "[5, 6]", "[5, 7]"
        ),
        call(
            "attn_mask",
            lambda m, q, k: m(q, k, k, attn_mask=torch.ones(3, 5, 7)),
            "[3, 5, 7]",
            "[6, 5, 7]",
        ),
        call(
            "attn_mask",
            lambda m, q, k: m(q[:, 0], k[:, 0], k[:, 0], attn_mask=torch.ones(2, 5, 7)),
            "[2, 5, 7]",
            "[3, 5, 7]",
        ),
        call("attn_mask", lambda m, q, k: m(q, k, k, attn_mask=torch.ones(5, 7).int()), "int32"),
        call(
            "attn_mask",
            lambda m, q, k: m(
                q, k, k, attn_mask=torch.ones(5, 7).half().double(), need_weights=False
            ),
            "float64",
        ),
        call(
            "key_padding_mask",
            lambda m, q, k: m(q, k, k, key_padding_mask=torch.ones(2, 6)),
            "[2, 6]",
            "[2, 7]",
        ),
        call(
            "key_padding_mask",
            lambda m, q, k: m(q, k, k, key_padding_mask=torch.ones(7)),
            "[7]",
            "[2, 7]",
        ),
        call(
            "key_padding_mask",
            lambda m, q, k: m(q, k, k, key_padding_mask=torch.ones(2, 7).int()),
            "int32",
        ),
        call("attn_mask", lambda m, q, k: m(q, k, k, is_causal=True), "is_causal"),
        call("", lambda m, q, k: m(q.double(), k.double(), k.double())),
    ],
)
def test_errors(
    function: Callable[[nn.Module, Tensor, Tensor], Any], words: tuple[str, ...]
) -> None:
    """Of the kind of torch's, and the message names the argument and what was expected."""
    theirs, ours = attention()
    query, key, _ = inputs("cross")
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        function(theirs, query, key)
    with pytest.raises(expected.type) as actual:
        function(ours, query, key)
    for word in words:
        assert word in str(actual.value)


def test_nested_tensors_raise() -> None:
    _, ours = attention(batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with torch.no_grad(), pytest.raises(AssertionError, match="query: expected a padded tensor"):
        ours.eval()(nested, nested, nested)


@pytest.mark.parametrize("sizes", [(12, 5), (0, 1), (12, 0)], ids=str)
def test_constructor_errors(sizes: tuple[int, int]) -> None:
    with pytest.raises((AssertionError, ValueError)) as expected:
        nn.MultiheadAttention(*sizes)
    with pytest.raises(expected.type):
        genkernels.nn.MultiheadAttention(*sizes)
