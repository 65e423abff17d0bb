"""genkernels.bidirectional_gru: what two calls of genkernels.gru give, which test_gru.py holds to
PyTorch, side by side as in turn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_gru import (
    DTYPES,
    arguments,
    assert_bitwise_equal,
    dtype_id,
    packed_arguments,
    shape_id,
    with_gradients,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import genkernels
from genkernels import reference
from genkernels.ops.gru import (
    _reference_bidirectional_backward,
    _reference_bidirectional_forward,
    gru_pack,
)

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def both(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of one direction as those of two, with other weights and states in the second."""
    reverse = {
        f"{name}_reverse": value.flip(0) * 0.75
        for name, value in values.items()
        if name in WEIGHTS or name == "hx"
    }
    return {**values, **reverse}


def split(values: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [values[name] for name in WEIGHTS if name in values]
    weights_reverse = [values[f"{name}_reverse"] for name in WEIGHTS if name in values]
    return weights, weights_reverse


def together(**values: Any) -> tuple[Tensor, ...]:
    options = {k: v for k, v in values.items() if k in ("batch_sizes", "recompute")}
    hx = torch.stack([values["hx"], values["hx_reverse"]])
    return genkernels.bidirectional_gru(values["input"], hx, *split(values), **options)


def in_turn(**values: Any) -> tuple[Tensor, ...]:
    options = {k: v for k, v in values.items() if k in ("batch_sizes", "recompute")}
    weights, weights_reverse = split(values)
    output, h = genkernels.gru(values["input"], values["hx"], *weights, **options)
    output_reverse, h_reverse = genkernels.gru(
        values["input"], values["hx_reverse"], *weights_reverse, reverse=True, **options
    )
    return torch.cat([output, output_reverse], -1), torch.stack([h, h_reverse])


@pytest.mark.usefixtures("poisoned_memory", "simd", "two_threads", "compiled_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "values",
    [
        arguments(40, 1, 33, 65),
        arguments(150, 7, 17, 96),  # two blocks of the backward pass
        arguments(9, 3, 16, 130, bias=False),
        {**arguments(20, 5, 40, 72), "recompute": True},
        arguments(200, 3, 17, 96),  # two blocks, of fewer rows than any level's tile has
        packed_arguments([7] * 60 + [5] * 30 + [1] * 40, 9, 48, torch.float32),
        packed_arguments([3] * 160 + [2] * 90 + [1] * 40, 9, 48, torch.float32),
        arguments(9, 20, 33, 65),
        arguments(5, 2, 9, 18),
        arguments(1, 3, 9, 18),
        arguments(20, 0, 9, 18),
        arguments(20, 3, 9, 0),
        {**arguments(6, 4, 9, 400), "hx": torch.ones(4, 400)},  # weights beyond a small L2 cache
    ],
    ids=[
        "one_row",
        "blocks",
        "no_bias",
        "recompute",
        "few_rows_of_blocks",
        "batch_sizes",
        "few_batch_sizes",
        "many_rows",
        "few_steps",
        "one_step",
        "no_rows",
        "no_units",
        "many_units",
    ],
)
def test_is_two_directions(values: dict[str, Any], dtype: torch.dtype) -> None:
    """Outputs and all gradients, to the last bit, on one thread and on two."""
    values = {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "batch_sizes" else value
        for name, value in both(values).items()
    }
    expected = with_gradients(in_turn, values)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_bitwise_equal(with_gradients(together, values), expected)


def test_is_torch_gru() -> None:
    """Which direction's features and states come first, held to torch."""
    values = both(arguments(5, 3, 6, 8, torch.float64))
    module = torch.nn.GRU(6, 8, bidirectional=True, dtype=torch.float64)
    for parameter, value in zip(module.parameters(), itertools.chain(*split(values)), strict=True):
        parameter.data.copy_(value)
    hx = torch.stack([values["hx"], values["hx_reverse"]])
    for actual, expected in zip(together(**values), module(values["input"], hx), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_calls_are_counted() -> None:
    values = both(arguments(5, 3, 6, 8))
    genkernels.stats(reset=True)
    with_gradients(together, values)
    assert genkernels.stats(reset=True) == {
        ("bidirectional_gru_forward", "cpp"): 1,
        ("bidirectional_gru_backward", "cpp"): 1,
    }


@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([2, 2, 1])], ids=["dense", "packed"])
def test_reference(batch_sizes: Tensor | None) -> None:
    values = arguments(3, 2, 3, 2, torch.float64)
    if batch_sizes is not None:
        values = {**values, "input": values["input"].flatten(0, 1)[:5], "batch_sizes": batch_sizes}
    values = both(values)
    expected = with_gradients(together, values)
    with genkernels.use_backend("reference"):
        actual = with_gradients(together, values)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([2, 2, 1])], ids=["dense", "packed"])
def test_gradcheck(batch_sizes: Tensor | None) -> None:
    values = arguments(3, 2, 3, 2, torch.float64)
    if batch_sizes is not None:
        values["input"] = values["input"].flatten(0, 1)[:5]
    names, leaves = zip(*both(values).items(), strict=True)
    options = {} if batch_sizes is None else {"batch_sizes": batch_sizes}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return together(**dict(zip(names, tensors, strict=True)), **options)

    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert gradcheck(function, leaves, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("needs", ["input", "hx_reverse", "weight_hh", "bias_ih_reverse"])
def test_one_gradient_alone(needs: str) -> None:
    values = both(arguments(3, 9, 7, 18))
    expected = dict(zip(values, with_gradients(together, values)[2:], strict=True))[needs]

    def only(**leaf: Tensor) -> tuple[Tensor, ...]:
        return together(**{**values, **leaf})

    assert torch.equal(with_gradients(only, {needs: values[needs]})[2], expected)


def raw_arguments(batch_sizes: Tensor | None, bias: bool, backward: bool) -> tuple[Any, ...]:
    if batch_sizes is None:
        values = arguments(3, 4, 5, 6, bias=bias)
    else:
        values = packed_arguments(batch_sizes.tolist(), 5, 6, torch.float32)
    values = both(values)
    names = ("hx", *WEIGHTS)
    tensors = [values["input"], *(values.get(name) for name in names)]
    tensors += [values.get(f"{name}_reverse") for name in names]
    if not backward:
        return *tensors, batch_sizes, True, None, None
    raw = torch.ops.genkernels.bidirectional_gru_forward
    output, h_n, gates, output_reverse, _, gates_reverse = raw(
        *tensors, batch_sizes, True, None, None
    )
    grads = (torch.ones_like(output), None, None, torch.ones_like(h_n))
    saved = (output, gates, output_reverse, gates_reverse)
    return *grads, *tensors, *saved, batch_sizes, True, True


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([4, 3, 1])], ids=["dense", "packed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck(batch_sizes: Tensor | None, bias: bool, backward: bool) -> None:
    name = f"bidirectional_gru_{'backward' if backward else 'forward'}"
    raw = getattr(torch.ops.genkernels, name).default
    torch.library.opcheck(raw, raw_arguments(batch_sizes, bias, backward))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([4, 3, 1])], ids=["dense", "packed"])
def test_reference_of_raw_op(batch_sizes: Tensor | None, backward: bool) -> None:
    """What devices without a kernel run, against the kernel."""
    name = f"bidirectional_gru_{'backward' if backward else 'forward'}"
    args = raw_arguments(batch_sizes, True, backward)
    references = {True: _reference_bidirectional_backward, False: _reference_bidirectional_forward}
    expected = references[backward](*args)
    for got, wanted in zip(getattr(torch.ops.genkernels, name)(*args), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    values = both(arguments(5, 3, 6, 8))
    assert_bitwise_equal(with_gradients(compiled, values), with_gradients(together, values))


def test_per_sample_gradients() -> None:
    values = both(arguments(5, 3, 6, 8))

    def loss(weight_hh: Tensor, input: Tensor, hx: Tensor) -> Tensor:
        one = {**values, "weight_hh": weight_hh, "input": input[:, None]}
        output, h_n = together(**{**one, "hx": hx[None], "hx_reverse": hx[None]})
        return output.square().sum() + h_n.sum()

    weight, input, hx = values["weight_hh"], values["input"], values["hx"]
    actual = torch.func.vmap(torch.func.grad(loss), (None, 1, 0))(weight, input, hx)
    for b in range(3):
        leaf = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, input[:, b], hx[b]), leaf)
        assert torch.equal(actual[b], expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("shape", [(9, 3, 6, 40), (9, 30, 6, 40)], ids=shape_id)
def test_packed_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = both(arguments(*shape, dtype))
    weights, weights_reverse = split(values)
    hx = torch.stack([values["hx"], values["hx_reverse"]])
    packed = {
        "packed": gru_pack(*weights),
        "packed_reverse": gru_pack(*weights_reverse),
    }
    actual = genkernels.bidirectional_gru(values["input"], hx, weights, weights_reverse, **packed)
    assert_bitwise_equal(list(actual), list(together(**values)))
    leaf = values["input"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights have no gradients"):
        genkernels.bidirectional_gru(leaf, hx, weights, weights_reverse, **packed)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"input": torch.ones(2, 4, 5)},
            ["bidirectional_gru: input", r"\[2, 3, 5\]", r"\[2, 4, 5\]"],
        ),
        ({"hx": torch.ones(3, 6)}, ["hx", r"\[2, B, H\]", r"\[3, 6\]"]),
        ({"weights_reverse": [torch.ones(18, 5)]}, ["weights_reverse", "2 or 4", "got 1"]),
        (
            {"weights_reverse": [torch.ones(18, 4), torch.ones(18, 6)]},
            ["weights_reverse: weight_ih", r"\[18, 5\]", r"\[18, 4\]"],
        ),
        (
            {"weights": [torch.ones(18, 5), torch.ones(18, 6).double()]},
            ["bidirectional_gru: weight_hh", "float32", "float64"],
        ),
    ],
    ids=["input", "hx", "count", "shape", "dtype"],
)
def test_errors(backend: str, change: dict[str, Any], words: list[str]) -> None:
    weights = [torch.ones(18, 5), torch.ones(18, 6)]
    values: dict[str, Any] = {
        "input": torch.ones(2, 3, 5),
        "hx": torch.ones(2, 3, 6),
        "weights": weights,
        "weights_reverse": weights,
    }
    with genkernels.use_backend(backend):
        genkernels.bidirectional_gru(**values)
        with pytest.raises(RuntimeError, match=".*".join(words)):
            genkernels.bidirectional_gru(**{**values, **change})


def test_double_backward_is_the_reference() -> None:
    """A gradient penalty through both directions, against plain PyTorch in float64."""
    values = both(arguments(4, 3, 5, 6, torch.float64))

    def penalty(function: Any) -> Tensor:
        leaf = values["input"].clone().requires_grad_()
        score = function(**{**values, "input": leaf})[0].square().sum()
        (gradient,) = torch.autograd.grad(score, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    def plain(**values: Any) -> tuple[Tensor, ...]:
        weights, weights_reverse = split(values)
        output, h = reference.gru(values["input"], values["hx"], *weights)
        reversed_output, h_reverse = reference.gru(
            values["input"], values["hx_reverse"], *weights_reverse, reverse=True
        )
        return torch.cat([output, reversed_output], -1), torch.stack([h, h_reverse])

    torch.testing.assert_close(penalty(together), penalty(plain), rtol=1e-9, atol=1e-9)
