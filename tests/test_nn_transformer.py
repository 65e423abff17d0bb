"""genkernels.nn.TransformerEncoderLayer and TransformerDecoderLayer: drop-ins for torch.nn's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from parity import assert_module_parity, assert_parity, run_module
from test_gru import each_dtype
from test_nn_attention import assert_equal, call, mask, module_samples, options_id, pair
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import genkernels

E, H, FF, L, S, B = 12, 3, 20, 5, 7, 2
ENCODER, DECODER = "TransformerEncoderLayer", "TransformerDecoderLayer"
NAMES = ("batch_first", "norm_first", "bias")
OPTIONS = [dict(zip(NAMES, values, strict=True)) for values in product((True, False), repeat=3)]
ACTIVATIONS = ["relu", "gelu", F.relu, F.gelu, F.silu, torch.tanh, nn.GELU(approximate="tanh")]
KERNELS = {"linear_forward", "linear_backward", "attention_forward", "attention_backward"}
pytestmark = pytest.mark.usefixtures("one_thread")
each_layer = pytest.mark.parametrize("layer", [ENCODER, DECODER], ids=["encoder", "decoder"])


def layers(layer: str, dropout: float = 0.0, **options: Any) -> tuple[nn.Module, nn.Module]:
    return pair(layer, E, H, FF, dropout, **options)


def inputs(layer: str, batch_first: bool = False, is_batched: bool = True) -> list[Tensor]:
    """src, or tgt and memory."""
    tensors = [torch.randn(B, rows, E) for rows in (L, S)]
    if not is_batched:
        tensors = [tensor[0] for tensor in tensors]
    elif not batch_first:
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    return tensors[: 1 if layer == ENCODER else 2]


def masks(layer: str, boolean: bool = True, is_batched: bool = True) -> dict[str, Tensor]:
    batch = (B,) if is_batched else ()
    names = {"src": L} if layer == ENCODER else {"tgt": L, "memory": S}
    return {f"{name}_mask": mask(L, keys, boolean=boolean) for name, keys in names.items()} | {
        f"{name}_key_padding_mask": mask(*batch, keys, boolean=boolean)
        for name, keys in names.items()
    }


def causal(layer: str, hint: bool) -> dict[str, Any]:
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    name, other = ("src", "is_causal") if layer == ENCODER else ("tgt", "tgt_is_causal")
    return {f"{name}_mask": hidden, other: hint}


def assert_same(
    theirs: nn.Module, ours: nn.Module, *args: Any, draws: int = 8, **kwargs: Any
) -> None:
    """Outputs and every gradient under the one rule, and the compiled kernels computed them."""
    genkernels.stats(reset=True)
    assert_module_parity(theirs, ours, args, kwargs, draws)
    calls = genkernels.stats(reset=True)
    assert {backend for _, backend in calls} == {"cpp"}
    assert {name for name, _ in calls} - {"dropout", "linear_forward_saving"} == KERNELS


def activation_id(activation: Any) -> str:
    return activation if isinstance(activation, str) else getattr(activation, "__name__", "module")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@each_layer
@pytest.mark.usefixtures("nothing_handed_over", "poisoned_memory")
class TestParity:
    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    def test_options(self, layer: str, options: dict[str, Any]) -> None:
        theirs, ours = layers(layer, **options, layer_norm_eps=1e-3)
        for training in (True, False):
            theirs.train(training)
            ours.train(training)
            arguments = inputs(layer, options["batch_first"])
            assert_same(theirs, ours, *arguments, draws=4)
            assert_same(theirs, ours, *arguments, draws=4, **masks(layer))

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=activation_id)
    def test_activations(self, layer: str, activation: Any) -> None:
        assert_same(*layers(layer, activation=activation), *inputs(layer))

    @pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "added"])
    def test_masks(self, layer: str, boolean: bool) -> None:
        theirs, ours = layers(layer)
        assert_same(theirs, ours, *inputs(layer), **masks(layer, boolean))
        unbatched = inputs(layer, is_batched=False)
        assert_same(theirs, ours, *unbatched, **masks(layer, boolean, is_batched=False))

    @pytest.mark.parametrize("hint", [True, False], ids=["hint", "no_hint"])
    def test_causal(self, layer: str, hint: bool) -> None:
        theirs, ours = layers(layer, norm_first=True)
        assert_same(theirs, ours, *inputs(layer), **causal(layer, hint))
        padding = masks(layer)
        padding = {name: value for name, value in padding.items() if "padding" in name}
        assert_same(theirs, ours, *inputs(layer), **causal(layer, hint), **padding)

    @each_dtype
    @pytest.mark.usefixtures("simd")
    def test_dtypes(self, layer: str, dtype: torch.dtype) -> None:
        theirs, ours = (module.to(dtype) for module in layers(layer, activation="gelu"))
        assert_same(theirs, ours, *(tensor.to(dtype) for tensor in inputs(layer)))

    def test_dropout_of_everything(self, layer: str) -> None:
        theirs, ours = layers(layer, dropout=1.0)
        assert_same(theirs, ours, *inputs(layer))

    def test_dropout_in_evaluation(self, layer: str) -> None:
        theirs, ours = layers(layer, dropout=0.5)
        assert not torch.equal(*(ours(*inputs(layer)) for _ in range(2)))
        assert_same(theirs.eval(), ours.eval(), *inputs(layer))


@each_layer
class TestKernels:
    def test_dropout_is_fused(self, layer: str) -> None:
        _, ours = layers(layer, dropout=0.5)
        genkernels.stats(reset=True)
        ours(*inputs(layer))
        assert genkernels.stats()["dropout", "cpp"] == (3 if layer == ENCODER else 4)

    @pytest.mark.usefixtures("nothing_handed_over")
    @pytest.mark.parametrize("activation", ["relu", "gelu", F.silu], ids=activation_id)
    def test_activation_is_fused(self, layer: str, activation: Any) -> None:
        _, ours = layers(layer, activation=activation)
        with torch.profiler.profile() as profile:
            ours(*inputs(layer)).sum().backward()
        seen = {event.key.removeprefix("aten::") for event in profile.key_averages()}
        assert not {"relu", "gelu", "silu", "threshold_backward", "gelu_backward"} & seen

    def test_evaluation_runs_the_kernels(self, layer: str) -> None:
        """torch's layer leaves its modules out there."""
        theirs, ours = (module.eval() for module in layers(layer, batch_first=True))
        arguments = inputs(layer, batch_first=True)
        genkernels.stats(reset=True)
        with torch.no_grad():
            torch.testing.assert_close(ours(*arguments), theirs(*arguments))
        calls = genkernels.stats(reset=True)
        assert calls["attention_forward", "cpp"] == (1 if layer == ENCODER else 2)
        assert calls["linear_forward", "cpp"] == (4 if layer == ENCODER else 7)

    def test_hooks_see_what_torchs_do(self, layer: str) -> None:
        """Forward hooks of linear1 see what the activation is taken of; pruning is one."""
        seen: list[Tensor] = []
        theirs, ours = layers(layer)
        arguments = inputs(layer)
        for module in (theirs, ours):
            prune.random_unstructured(module.linear1, "weight", 0.5)
            module.linear1.register_forward_hook(lambda _, __, output: seen.append(output))
        ours.linear1.weight_mask.copy_(theirs.linear1.weight_mask)
        for module in (theirs, ours):
            with torch.no_grad():
                module.linear1.weight_orig.mul_(2)
        torch.testing.assert_close(ours(*arguments), theirs(*arguments))
        torch.testing.assert_close(seen[0], seen[1])
        assert (seen[0] < 0).any()

    def test_backward_hooks(self, layer: str) -> None:
        _, ours = layers(layer)
        seen: list[Any] = []
        ours.linear1.register_full_backward_hook(lambda *given: seen.append(given))
        ours(*inputs(layer)).sum().backward()
        assert len(seen) == 1

    def test_another_linear1(self, layer: str) -> None:
        """What takes its place has no activation of its own."""
        results = []
        for module in layers(layer):
            module.linear1 = nn.Sequential(module.linear1, nn.Identity())
            torch.manual_seed(1)
            results.append(module(*inputs(layer)))
        torch.testing.assert_close(*results)

    def test_overridden_block(self, layer: str) -> None:
        """The methods that people override are torch's."""
        _, ours = layers(layer)

        class Doubled(type(ours)):  # type: ignore[misc]
            def _sa_block(self, *args: Any, **kwargs: Any) -> Tensor:
                return 2 * super()._sa_block(*args, **kwargs)

        arguments = inputs(layer)
        before = ours(*arguments)
        ours.__class__ = Doubled
        assert not torch.allclose(ours(*arguments), before)


@each_layer
class TestState:
    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    def test_parameters(self, layer: str, options: dict[str, Any]) -> None:
        """The names, shapes, order and, from one seed, initial values of torch's."""
        torch.manual_seed(0)
        theirs = getattr(nn, layer)(E, H, FF, **options)
        torch.manual_seed(0)
        ours = getattr(genkernels.nn, layer)(E, H, FF, **options)
        expected, actual = theirs.state_dict(), ours.state_dict()
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        theirs.load_state_dict(actual, strict=True)
        ours.load_state_dict(expected, strict=True)
        assert repr(ours) == repr(theirs)
        assert isinstance(ours, getattr(nn, layer))

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies(self, layer: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        _, ours = layers(layer)
        arguments = inputs(layer)
        expected = ours(*arguments)
        other = duplicate(ours)
        assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
        assert type(other.self_attn) is genkernels.nn.MultiheadAttention
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        assert torch.equal(other(*arguments), expected)

    def test_freeze_passes_over(self, layer: str) -> None:
        _, ours = layers(layer)
        model = nn.ModuleList([ours, genkernels.nn.GRU(E, 4)])
        arguments = inputs(layer)
        expected = ours(*arguments)
        genkernels.freeze(model)
        assert torch.equal(ours(*arguments), expected)
        genkernels.unfreeze(model)

    def test_meta_device(self, layer: str) -> None:
        _, ours = layers(layer)
        ours.to("meta")
        assert ours(*(tensor.to("meta") for tensor in inputs(layer))).shape == (L, B, E)

    def test_autocast(self, layer: str) -> None:
        theirs, ours = layers(layer)
        arguments = inputs(layer)
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = theirs(*arguments), ours(*arguments)
        exact = theirs.double()(*(tensor.double() for tensor in arguments))
        assert_parity("output", actual, expected, exact)

    def test_learns_the_same(self, layer: str) -> None:
        arguments, target = inputs(layer), torch.randn(L, B, E)
        losses = []
        for module in layers(layer):
            optimizer = torch.optim.SGD(module.parameters(), 0.1)
            losses.append([])
            for _ in range(20):
                loss = (module(*arguments) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.detach())
        assert losses[0][-1] < 0.8 * losses[0][0]
        torch.testing.assert_close(losses[1], losses[0])


class TestContainers:
    """torch's own stack the layers, in training and in evaluation."""

    @pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "batch_second"])
    @pytest.mark.filterwarnings("error")
    def test_encoder(self, batch_first: bool) -> None:
        theirs, ours = (
            nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False)
            for layer in layers(ENCODER, batch_first=batch_first)
        )
        x = inputs(ENCODER, batch_first)
        padding = {"src_key_padding_mask": mask(B, L)}
        hidden = {"mask": torch.ones(L, L, dtype=torch.bool).triu(1)}
        for training, given in product((True, False), ({}, padding, hidden)):
            results = [
                run_module(module.train(training), x, given, torch.float32)
                for module in (theirs, ours)
            ]
            torch.testing.assert_close(results[1], results[0])
            with torch.no_grad():
                torch.testing.assert_close(ours(*x, **given), theirs(*x, **given))

    def test_no_nested_tensors(self) -> None:
        """Of padded batches torch makes them in evaluation, where the layer takes them; rows that
        are padding are then zeros. Of ours it says that it does not, and they are computed."""
        theirs, ours = pair(ENCODER, E, 2, FF, batch_first=True)
        with pytest.warns(UserWarning, match="enable_nested_tensor is True, but"):
            stacked = nn.TransformerEncoder(ours, 2).eval()
        expected = nn.TransformerEncoder(theirs, 2, enable_nested_tensor=False).eval()
        padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
        x = torch.randn(B, L, E)
        with torch.no_grad():
            actual = stacked(x, src_key_padding_mask=padding)
            torch.testing.assert_close(actual, expected(x, src_key_padding_mask=padding))

    def test_decoder(self) -> None:
        theirs, ours = (nn.TransformerDecoder(layer, 2) for layer in layers(DECODER))
        x = inputs(DECODER)
        hidden = {"tgt_mask": torch.ones(L, L, dtype=torch.bool).triu(1)}
        for training, given in product((True, False), ({}, hidden)):
            results = [
                run_module(module.train(training), x, given, torch.float32)
                for module in (theirs, ours)
            ]
            torch.testing.assert_close(results[1], results[0])

    def test_transformer(self) -> None:
        models = []
        for i in range(2):
            encoder = nn.TransformerEncoder(layers(ENCODER)[i], 2, enable_nested_tensor=False)
            decoder = nn.TransformerDecoder(layers(DECODER)[i], 2)
            torch.manual_seed(0)
            models.append(nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder))
        src, tgt = torch.randn(S, B, E), torch.randn(L, B, E)
        hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
        given = {"tgt_mask": hidden, "memory_key_padding_mask": mask(B, S)}
        results = [run_module(model, [src, tgt], given, torch.float32) for model in models]
        torch.testing.assert_close(results[1], results[0])

    def test_ours_inside_of_torchs_layer(self) -> None:
        """In evaluation, torch's layer reads the parameters alone."""
        theirs, _ = pair(ENCODER, E, 2, FF, batch_first=True)
        attention = genkernels.nn.MultiheadAttention(E, 2, batch_first=True)
        attention.load_state_dict(theirs.self_attn.state_dict())
        x, hidden = torch.randn(B, L, E), mask(B, L)
        with torch.no_grad():
            expected = theirs.eval()(x, src_key_padding_mask=hidden)
            theirs.self_attn = attention.eval()
            torch.testing.assert_close(theirs(x, src_key_padding_mask=hidden), expected)


@each_layer
class TestTransforms:
    def test_functional_grad(self, layer: str) -> None:
        _, ours = layers(layer, activation="gelu")
        arguments = [torch.randn(3, *x.shape) for x in inputs(layer, is_batched=False)]
        parameters = dict(ours.named_parameters())

        def loss(parameters: dict[str, Tensor], *arguments: Tensor) -> Tensor:
            return torch.func.functional_call(ours, parameters, arguments).square().sum()

        dims = (None, *(0 for _ in arguments))
        gradients = torch.func.vmap(torch.func.grad(loss), dims)(parameters, *arguments)
        for b in range(3):
            each = [argument[b] for argument in arguments]
            expected = torch.autograd.grad(loss(parameters, *each), list(parameters.values()))
            for name, gradient in zip(parameters, expected, strict=True):
                torch.testing.assert_close(gradients[name][b], gradient)

    def test_export(self, layer: str) -> None:
        _, ours = layers(layer, batch_first=True)
        ours.eval().requires_grad_(False)
        batch, rows, keys = (torch.export.Dim(name, min=2) for name in ("batch", "rows", "keys"))
        arguments = inputs(layer, batch_first=True)
        dims = tuple({0: batch, 1: size} for size in (rows, keys)[: len(arguments)])
        program = torch.export.export(ours, tuple(arguments), dynamic_shapes=dims)
        targets = {str(node.target) for node in program.graph.nodes}
        assert "genkernels.attention_forward.default" in targets
        other = [torch.randn(6, n, E) for n in (3, 4)][: len(arguments)]
        torch.testing.assert_close(program.module()(*other), ours(*other))


def test_compile_without_recompiling() -> None:
    """One graph for all sizes, forward and backward."""
    torch._dynamo.reset()
    _, ours = layers(ENCODER, norm_first=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)

    def check(rows: int, batch: int) -> None:
        x, hidden = torch.randn(rows, batch, E), torch.ones(rows, rows, dtype=torch.bool).triu(1)
        arguments = [[x], {"src_mask": hidden, "is_causal": True}, torch.float32]
        actual, expected = (run_module(module, *arguments) for module in (compiled, ours))
        torch.testing.assert_close(dict(zip(expected, actual.values(), strict=True)), expected)

    check(9, 4)  # `linear` has other kernels for up to 32 rows, and from 64 on
    with torch.compiler.set_stance("fail_on_recompile"):
        check(7, 5)


@pytest.mark.usefixtures("nothing_handed_over")
@pytest.mark.parametrize(
    ("layer", "sample"),
    module_samples(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
def test_module_info(layer: str, sample: Any) -> None:
    assert_equal(layer, sample)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        call("query", lambda m, x, _: m(x[0, 0], *inputs_after(m, x)), "[12]"),
        call("query", lambda m, x, _: m(x[..., :9], *inputs_after(m, x)), "[5, 2, 9]"),
        call("attn_mask", lambda m, x, _: m(x, *inputs_after(m, x), torch.ones(5, 6)), "[5, 5]"),
    ],
)
@each_layer
def test_errors(
    layer: str, function: Callable[[nn.Module, Tensor, Tensor], Any], words: tuple[str, ...]
) -> None:
    """Of the kind of torch's, and the message names the argument and what was expected."""
    theirs, ours = layers(layer, norm_first=False)
    x = torch.randn(L, B, E)
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        function(theirs, x, x)
    with pytest.raises(expected.type) as actual:
        function(ours, x, x)
    for word in words:
        assert word in str(actual.value)


def inputs_after(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [x] if isinstance(module, nn.TransformerDecoderLayer) else []


@each_layer
def test_other_errors(layer: str) -> None:
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
        layers(layer, activation="swish")
    hint = "is_causal" if layer == ENCODER else "tgt_is_causal"
    for module in layers(layer):
        with pytest.raises(RuntimeError, match="is_causal"):
            module(*inputs(layer), **{hint: True})


def test_nested_tensors_raise() -> None:
    _, ours = layers(ENCODER, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with torch.no_grad(), pytest.raises(AssertionError, match="query: expected a padded tensor"):
        ours.eval()(nested)
