"""genkernels.nn.RNN, a drop-in for torch.nn.RNN: what it doesn't have from the GRU's base.

PyTorch's own samples of it, its copies and its errors are among those of test_nn_gru.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from parity import run_module
from test_nn_gru import OPTIONS, assert_same, options_id, pair
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import genkernels

pair = functools.partial(pair, module=nn.RNN)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.usefixtures("one_thread")
class TestArguments:
    @pytest.mark.parametrize("options", OPTIONS[::3], ids=options_id)
    def test_batched(self, options: dict[str, Any]) -> None:
        theirs, ours = pair(7, 18, **options)
        state = torch.randn(options["num_layers"] * (1 + options["bidirectional"]), 5, 18)
        shape = (5, 4, 7) if options["batch_first"] else (4, 5, 7)
        assert_same(theirs, ours, torch.randn(shape), state)

    @pytest.mark.parametrize("options", OPTIONS[1::5], ids=options_id)
    def test_packed(self, options: dict[str, Any]) -> None:
        theirs, ours = pair(7, 18, **options)
        packed = pack_sequence([torch.randn(n, 7) for n in (2, 5, 1, 6, 5)], enforce_sorted=False)
        assert_same(theirs, ours, packed)

    def test_positional(self) -> None:
        """nonlinearity stands before bias, where nn.GRU has bias."""
        theirs, ours = pair(7, 18, 2, "tanh", False, True, 0.0, True)
        assert_same(theirs, ours, torch.randn(5, 4, 7))

    def test_dropout_masks_are_torch_s(self) -> None:
        theirs, ours = pair(7, 18, 3, dropout=0.4, bidirectional=True)
        input = torch.randn(4, 3, 7)
        torch.manual_seed(3)
        expected = theirs(input)
        torch.manual_seed(3)
        torch.testing.assert_close(ours(input), expected)

    @pytest.mark.parametrize(
        ("nonlinearity", "error"), [("relu", NotImplementedError), ("sin", ValueError)]
    )
    def test_nonlinearity(self, nonlinearity: str, error: type[Exception]) -> None:
        with pytest.raises(error, match=f"nonlinearity.*{nonlinearity}"):
            genkernels.nn.RNN(7, 18, nonlinearity=nonlinearity)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=options_id)
def test_parameters(options: dict[str, Any]) -> None:
    """The names, shapes, order and, from one seed, initial values of torch's."""
    torch.manual_seed(0)
    theirs = nn.RNN(7, 18, **options)
    torch.manual_seed(0)
    ours = genkernels.nn.RNN(7, 18, **options)
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert (repr(ours), ours.mode, ours.nonlinearity) == (repr(theirs), "RNN_TANH", "tanh")


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=options_id)
def test_compile(options: dict[str, Any]) -> None:
    """One graph for all T and B, forward and backward."""
    torch._dynamo.reset()
    _, ours = pair(6, 8, **options)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    run_module(compiled, [torch.randn(5, 3, 6)], {}, torch.float32)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((7, 4, 6), (2, 9, 6)):
            input = torch.randn(shape)
            actual, expected = (
                run_module(module, [input], {}, torch.float32) for module in (compiled, ours)
            )
            assert all(map(torch.equal, actual.values(), expected.values()))


def test_export() -> None:
    _, ours = pair(6, 8, 2, bidirectional=True)
    dims = {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}
    program = torch.export.export(ours, (torch.randn(5, 3, 6),), dynamic_shapes=(dims,))
    input = torch.randn(9, 4, 6)
    assert all(map(torch.equal, program.module()(input), ours(input)))
