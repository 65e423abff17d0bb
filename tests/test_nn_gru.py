"""genkernels.nn.GRU and GRUCell: drop-ins for torch.nn's."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from parity import assert_module_parity, assert_parity, run_module, tensors_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import genkernels

MODULES = {
    nn.GRU: genkernels.nn.GRU,
    nn.GRUCell: genkernels.nn.GRUCell,
    nn.RNN: genkernels.nn.RNN,  # see test_nn_rnn.py, too
}
OPTIONS = [
    dict(zip(("num_layers", "bias", "batch_first", "bidirectional"), values, strict=True))
    for values in product((1, 3), (True, False), (False, True), (False, True))
]


def pair(*args: Any, module: type[nn.Module] = nn.GRU, **options: Any) -> tuple[nn.Module, ...]:
    """A torch module and ours with the same parameters."""
    torch.manual_seed(0)
    theirs = module(*args, **options)
    ours = MODULES[module](*args, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same(theirs: nn.Module, ours: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs and every gradient under the one rule, and the compiled kernel computed them."""
    genkernels.stats(reset=True)
    assert_module_parity(theirs, ours, args, kwargs, draws=16)
    assert {backend for _, backend in genkernels.stats(reset=True)} == {"cpp"}


def options_id(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.usefixtures("one_thread")
class TestArguments:
    @pytest.mark.parametrize("with_state", [False, True], ids=["no_h_0", "h_0"])
    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    def test_batched(self, options: dict[str, Any], with_state: bool) -> None:
        theirs, ours = pair(7, 18, **options)
        state = torch.randn(options["num_layers"] * (1 + options["bidirectional"]), 5, 18)
        shape = (5, 4, 7) if options["batch_first"] else (4, 5, 7)
        assert_same(theirs, ours, torch.randn(shape), *([state] if with_state else []))

    @pytest.mark.parametrize("with_state", [False, True], ids=["no_h_0", "h_0"])
    @pytest.mark.parametrize("options", OPTIONS[::3], ids=options_id)
    def test_unbatched(self, options: dict[str, Any], with_state: bool) -> None:
        theirs, ours = pair(7, 18, **options)
        state = torch.randn(options["num_layers"] * (1 + options["bidirectional"]), 18)
        assert_same(theirs, ours, torch.randn(4, 7), *([state] if with_state else []))

    @pytest.mark.parametrize("with_state", [False, True], ids=["no_h_0", "h_0"])
    @pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
    @pytest.mark.parametrize("options", OPTIONS[::3], ids=options_id)
    def test_packed(self, options: dict[str, Any], enforce_sorted: bool, with_state: bool) -> None:
        theirs, ours = pair(7, 18, **options)
        lengths = (6, 5, 5, 2, 1) if enforce_sorted else (2, 5, 1, 6, 5)
        packed = pack_sequence([torch.randn(n, 7) for n in lengths], enforce_sorted)
        state = torch.randn(options["num_layers"] * (1 + options["bidirectional"]), 5, 18)
        args = [packed, *([state] if with_state else [])]
        assert_same(theirs, ours, *args)
        expected, actual = theirs(*args)[0], ours(*args)[0]
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            one, other = getattr(actual, field), getattr(expected, field)
            assert one is other is None or torch.equal(one, other)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_dtype(self, dtype: torch.dtype) -> None:
        theirs, ours = pair(7, 18, 2, bidirectional=True, dtype=dtype)
        assert_same(theirs, ours, torch.randn(4, 5, 7).to(dtype))

    @pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
    def test_dropout_masks_are_torch_s(self, packed: bool) -> None:
        """The same seed zeroes the same elements, whose gradients are then zero as well."""
        theirs, ours = pair(7, 18, 3, dropout=0.4, bidirectional=True)
        input = pack_sequence([torch.randn(n, 7) for n in (4, 3, 1)])
        if not packed:
            input = torch.randn(4, 3, 7)

        class Seeded(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, input: Any) -> Any:
                torch.manual_seed(3)
                return self.module(input)

        assert_same(Seeded(theirs), Seeded(ours), input)

    def test_dropout_only_in_training(self) -> None:
        theirs, ours = pair(7, 18, 2, dropout=0.5)
        input = torch.randn(4, 3, 7)
        assert not torch.equal(ours(input)[0], ours(input)[0])
        theirs.eval()
        ours.eval()
        assert torch.equal(ours(input)[0], ours(input)[0])
        assert_same(theirs, ours, input)

    def test_dropout_of_everything(self) -> None:
        theirs, ours = pair(7, 18, 2, dropout=1.0)
        assert_same(theirs, ours, torch.randn(4, 3, 7))

    def test_dropout_of_one_layer_warns(self) -> None:
        with pytest.warns(UserWarning, match="dropout"):
            genkernels.nn.GRU(7, 18, 1, dropout=0.5)

    def test_proj_size(self) -> None:
        for module in MODULES[nn.GRU], nn.GRU:
            with pytest.raises((TypeError, ValueError), match="proj_size"):
                module(7, 18, proj_size=3)

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("shape", [(5,), ()], ids=["batched", "unbatched"])
    @pytest.mark.parametrize("with_state", [False, True], ids=["no_hx", "hx"])
    def test_cell(self, bias: bool, shape: tuple[int, ...], with_state: bool) -> None:
        theirs, ours = pair(7, 18, bias, module=nn.GRUCell)
        state = [torch.randn(*shape, 18)] if with_state else []
        assert_same(theirs, ours, torch.randn(*shape, 7), *state)


class TestState:
    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    def test_parameters(self, options: dict[str, Any]) -> None:
        """The names, shapes, order and, from one seed, initial values of torch's."""
        torch.manual_seed(0)
        theirs = nn.GRU(7, 18, **options)
        torch.manual_seed(0)
        ours = genkernels.nn.GRU(7, 18, **options)
        expected, actual = theirs.state_dict(), ours.state_dict()
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        theirs.load_state_dict(actual, strict=True)
        ours.load_state_dict(expected, strict=True)
        assert repr(ours) == repr(theirs)

    def test_cell_parameters(self) -> None:
        theirs, ours = pair(7, 18, module=nn.GRUCell)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert repr(ours) == repr(theirs)

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), "torch.save"],
        ids=["deepcopy", "pickle", "torch_save"],
    )
    @pytest.mark.parametrize("module", list(MODULES), ids=lambda module: module.__name__)
    def test_copies(self, module: type[nn.Module], duplicate: Any) -> None:
        """A copy computes the same and shares no memory."""
        _, ours = pair(7, 18, module=module)
        input = torch.randn(5, 7)
        expected = tensors_of(ours(input))
        if duplicate == "torch.save":
            file = io.BytesIO()
            torch.save(ours, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = duplicate(ours)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        assert all(map(torch.equal, tensors_of(other(input)), expected))

    def test_functional_call(self) -> None:
        theirs, ours = pair(7, 18, 2, bidirectional=True)
        input = torch.randn(4, 5, 7)
        values = {name: value + 0.1 for name, value in theirs.state_dict().items()}
        before = ours(input)[0]
        actual = torch.func.functional_call(ours, values, (input,))
        theirs.load_state_dict(values)
        ours.load_state_dict(values)
        assert all(map(torch.equal, actual, ours(input)))
        assert not torch.equal(actual[0], before)

    def test_functional_grad(self) -> None:
        """Per-sample gradients with vmap over grad over functional_call."""
        _, ours = pair(7, 6)
        input = torch.randn(4, 3, 7)
        parameters = dict(ours.named_parameters())

        def loss(parameters: dict[str, Tensor], input: Tensor) -> Tensor:
            return torch.func.functional_call(ours, parameters, (input,))[0].square().sum()

        actual = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, input)
        for b in range(3):
            expected = torch.autograd.grad(loss(parameters, input[:, b]), parameters.values())
            for name, gradient in zip(parameters, expected, strict=True):
                assert torch.equal(actual[name][b], gradient)

    def test_written_weights_are_seen(self) -> None:
        """Nothing packed outlives a call: writes through .data change no version counter."""
        theirs, ours = pair(7, 18)
        input = torch.randn(4, 5, 7)
        ours(input)
        for module in (theirs, ours):
            module.weight_hh_l0.data.mul_(0.5)
            module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0 * 2)
        assert_same(theirs, ours, input)

    def test_conversion(self) -> None:
        theirs, ours = pair(7, 18)
        theirs.to(torch.bfloat16)
        ours.to(torch.bfloat16)
        assert_same(theirs, ours, torch.randn(4, 5, 7).bfloat16())

    def test_meta_device(self) -> None:
        module = genkernels.nn.GRU(7, 18, device="meta")
        output, h_n = module(torch.empty(4, 5, 7, device="meta"))
        assert (output.shape, h_n.shape) == ((4, 5, 18), (1, 5, 18))

    def test_autocast(self) -> None:
        """As torch.nn.GRU on the CPU, float32 comes back."""
        theirs, ours = pair(7, 18, 2)
        input = torch.randn(4, 5, 7)
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = theirs(input), ours(input)
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        exact = theirs.double()(input.double())
        for name, *tensors in zip(("output", "h_n"), actual, expected, exact, strict=True):
            assert_parity(name, *tensors)


class TestCompile:
    @pytest.mark.parametrize(
        "options",
        [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}],
        ids=options_id,
    )
    def test_dynamic_without_recompiling(self, options: dict[str, Any]) -> None:
        """One graph for all T and B, forward and backward."""
        torch._dynamo.reset()
        _, ours = pair(6, 8, **options)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
        run_module(compiled, [torch.randn(5, 3, 6)], {}, torch.float32)
        with torch.compiler.set_stance("fail_on_recompile"):
            for shape in ((7, 4, 6), (2, 9, 6), (11, 2, 6)):
                input = torch.randn(shape)
                actual, expected = (
                    run_module(module, [input], {}, torch.float32) for module in (compiled, ours)
                )
                assert all(map(torch.equal, actual.values(), expected.values()))

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        _, ours = pair(6, 8)
        compiled = torch.compile(ours, fullgraph=True)
        input = torch.randn(5, 3, 6)
        actual, expected = (
            run_module(module, [input], {}, torch.float32) for module in (compiled, ours)
        )
        assert all(map(torch.equal, actual.values(), expected.values()))

    def test_packed(self) -> None:
        torch._dynamo.reset()
        _, ours = pair(6, 8)
        compiled = torch.compile(ours, backend="aot_eager")
        packed = pack_sequence([torch.randn(n, 6) for n in (4, 3, 1)])
        assert all(map(torch.equal, tensors_of(compiled(packed)), tensors_of(ours(packed))))

    def test_cell(self) -> None:
        torch._dynamo.reset()
        _, ours = pair(6, 8, module=nn.GRUCell)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
        for batch in (3, 5):
            input = torch.randn(batch, 6)
            assert torch.equal(compiled(input), ours(input))

    def test_export(self) -> None:
        _, ours = pair(6, 8, 2, bidirectional=True)
        dims = {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}
        program = torch.export.export(ours, (torch.randn(5, 3, 6),), dynamic_shapes=(dims,))
        input = torch.randn(9, 4, 6)
        assert all(map(torch.equal, program.module()(input), ours(input)))


def module_samples() -> list[Any]:
    """PyTorch's own samples for the modules, as its test suite runs them."""
    torch.manual_seed(0)
    samples = []
    for info in module_db:
        if info.module_cls in MODULES:
            packed = {} if info.module_cls is nn.GRUCell else {"with_packed_sequence": True}
            for training in (True, False):
                inputs = info.module_inputs_func(
                    info,
                    device="cpu",
                    dtype=torch.float32,
                    requires_grad=True,
                    training=training,
                    **packed,
                )
                samples += [
                    pytest.param(
                        info, sample, training, id=f"{info.name}-{training=}-{i}".replace("=", "_")
                    )
                    for i, sample in enumerate(inputs)
                    if sample.constructor_input.kwargs.get("nonlinearity") != "relu"
                ]
    return samples


def module_error_samples() -> list[Any]:
    return [
        pytest.param(info.module_cls, sample, id=f"{info.name}-{i}")
        for info in module_db
        if info.module_cls in MODULES
        for i, sample in enumerate(
            info.module_error_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
            )
        )
    ]


@pytest.mark.usefixtures("one_thread")
class TestModuleInfo:
    @pytest.mark.parametrize(("info", "sample", "training"), module_samples())
    def test_sample(self, info: Any, sample: Any, training: bool) -> None:
        constructor, forward = sample.constructor_input, sample.forward_input
        theirs, ours = pair(*constructor.args, module=info.module_cls, **constructor.kwargs)
        theirs.train(training)
        ours.train(training)
        assert_same(theirs, ours, *forward.args, **forward.kwargs)

    @pytest.mark.parametrize(("module", "sample"), module_error_samples())
    def test_error(self, module: type[nn.Module], sample: Any) -> None:
        """The same class of exception. A message of the constructor is torch's, word for word; one
        of a call names the argument and both sizes.
        """
        inputs = sample.module_error_input
        constructor, forward = inputs.constructor_input, inputs.forward_input
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                MODULES[module](*constructor.args, **constructor.kwargs)
            return
        ours = MODULES[module](*constructor.args, **constructor.kwargs)
        with pytest.raises(sample.error_type) as caught:
            ours(*forward.args, **forward.kwargs)
        assert re.search(r"\b(input|hx)\b", str(caught.value))
        for size in re.findall(r"\b\d+\b", sample.error_regex.replace("0", "0 ")):
            assert size.strip() in str(caught.value)


def gru_error(call: Callable[[nn.Module], Any], *words: str) -> Any:
    return pytest.param(call, words)


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "words"),
        [
            gru_error(lambda m: m(torch.randn(2, 3, 5)), "input", "[2, 3, 5]", "[2, 3, 7]"),
            gru_error(lambda m: m(torch.randn(2)), "input", "[2]"),
            gru_error(lambda m: m(torch.randn(1, 2, 3, 7)), "input", "[1, 2, 3, 7]"),
            gru_error(lambda m: m(torch.randn(0, 3, 7)), "input", "[0, 3, 7]"),
            gru_error(lambda m: m(torch.randn(0, 7)), "input"),
            gru_error(lambda m: m(torch.randn(2, 3, 7).double()), "input", "float64", "float32"),
            gru_error(
                lambda m: m(torch.randn(2, 3, 7), torch.randn(1, 4, 18)),
                "hx",
                "[1, 4, 18]",
                "[1, 3, 18]",
            ),
            gru_error(
                lambda m: m(torch.randn(2, 3, 7), torch.randn(2, 3, 18)),
                "hx",
                "[2, 3, 18]",
                "[1, 3, 18]",
            ),
            gru_error(
                lambda m: m(torch.randn(2, 3, 7), torch.randn(3, 18)), "hx", "[3, 18]", "[2, 3, 7]"
            ),
            gru_error(
                lambda m: m(torch.randn(2, 7), torch.randn(1, 3, 18)), "hx", "[1, 3, 18]", "[2, 7]"
            ),
            gru_error(
                lambda m: m(torch.randn(2, 3, 7), torch.randn(1, 3, 18).double()),
                "hx",
                "float64",
                "float32",
            ),
            gru_error(lambda m: m(pack_sequence([torch.randn(2, 5)])), "input", "[2, 5]", "[2, 7]"),
            gru_error(
                lambda m: m(pack_sequence([torch.randn(2, 7)]), torch.randn(1, 2, 18)),
                "hx",
                "[1, 2, 18]",
                "[1, 1, 18]",
            ),
        ],
    )
    def test_gru(self, call: Callable[[nn.Module], Any], words: tuple[str, ...]) -> None:
        theirs, ours = pair(7, 18)
        with pytest.raises((RuntimeError, ValueError)) as expected:
            call(theirs)
        with pytest.raises(expected.type) as actual:
            call(ours)
        for word in words:
            assert word in str(actual.value)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            gru_error(lambda m: m(torch.randn(2, 5)), "input", "5", "7"),
            gru_error(lambda m: m(torch.randn(1, 2, 7)), "input", "[1, 2, 7]"),
            gru_error(lambda m: m(torch.randn(2, 7), torch.randn(1, 2, 18)), "hx", "[1, 2, 18]"),
            gru_error(lambda m: m(torch.randn(2, 7), torch.randn(2, 5)), "hx", "5", "18"),
            gru_error(
                lambda m: m(torch.randn(2, 7), torch.randn(3, 18)), "hx", "[3, 18]", "[2, 18]"
            ),
            gru_error(lambda m: m(torch.randn(7), torch.randn(3, 18)), "hx", "[3, 18]", "[18]"),
            gru_error(lambda m: m(torch.randn(2, 7), torch.randn(18)), "hx", "[18]"),
            gru_error(lambda m: m(torch.randn(2, 7).double()), "float64", "float32"),
        ],
    )
    def test_cell(self, call: Callable[[nn.Module], Any], words: tuple[str, ...]) -> None:
        theirs, ours = pair(7, 18, module=nn.GRUCell)
        with pytest.raises((RuntimeError, ValueError)) as expected:
            call(theirs)
        with pytest.raises(expected.type) as actual:
            call(ours)
        for word in words:
            assert word in str(actual.value)
