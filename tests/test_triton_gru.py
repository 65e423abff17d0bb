"""The Triton kernels of the GRU in Triton's interpreter, through the public ops. Those of
`make triton-check`, of which test_triton.py runs a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_op_parity
from test_gru import arguments as gru_arguments
from test_gru import dtype_id, packed_arguments, plain_gru, relaid
from torch import Tensor

import genkernels
from genkernels import triton

pytestmark = pytest.mark.skipif(
    not triton.IS_INTERPRETED, reason="TRITON_INTERPRET=1: not set (make triton-check sets it)"
)

# The interpreter multiplies bfloat16's bit patterns.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
OUTPUTS = ("output", "h_n")
# T, B, I, H: at the edges of blocks of 16 rows, 32 units, 32 and 64 products.
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 3, 2),
    (3, 3, 2, 7),
    (2, 15, 5, 16),
    (2, 16, 7, 17),
    (3, 17, 16, 15),
    (2, 1, 4, 31),
    (3, 2, 3, 32),
    (2, 3, 1, 33),
    (2, 5, 2, 63),
    (2, 7, 3, 64),
    (2, 33, 3, 65),
]


@pytest.fixture(autouse=True)
def triton_only():
    genkernels.stats(reset=True)
    yield
    assert {backend for _, backend in genkernels.stats(reset=True)} == {"triton"}


def check(*draws, **options) -> None:
    def plain(**v: Tensor) -> tuple[Tensor, ...]:
        return plain_gru(**v, **options)

    assert_op_parity(
        lambda **v: tuple(genkernels.gru(**v, **options)), plain, plain, OUTPUTS, *draws
    )


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*(gru_arguments(*shape, dtype, seed=seed) for seed in range(2)))


@each_dtype
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_without_biases(reverse: bool, dtype: torch.dtype) -> None:
    check(gru_arguments(3, 5, 4, 18, dtype, bias=False), reverse=reverse)


@each_dtype
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_resets(reverse: bool, dtype: torch.dtype) -> None:
    resets = torch.rand(4, 17, generator=torch.Generator().manual_seed(0)) < 0.4
    check(gru_arguments(4, 17, 3, 33, dtype), resets=resets, reverse=reverse)


@each_dtype
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed(reverse: bool, dtype: torch.dtype) -> None:
    values = packed_arguments([18, 17, 17, 3, 1], 4, 20, dtype)
    sizes = values.pop("batch_sizes")
    check(values, batch_sizes=sizes, reverse=reverse)


@each_dtype
def test_cell(dtype: torch.dtype) -> None:
    values = gru_arguments(1, 17, 5, 34, dtype)
    values["input"] = values["input"][0]
    assert_op_parity(
        lambda **v: (genkernels.gru_cell(**v),),
        lambda **v: (torch.gru_cell(*v.values()),),
        lambda **v: (torch.gru_cell(*v.values()),),
        ("h",),
        values,
    )


def test_saved_and_recomputed_gates_give_the_same() -> None:
    values = gru_arguments(4, 3, 5, 18)
    gradients = []
    for recompute in (False, True):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        output, h_n = genkernels.gru(**leaves, recompute=recompute)
        loss = output.square().sum() + h_n.sum()
        gradients.append(torch.autograd.grad(loss, tuple(leaves.values())))
    assert all(map(torch.equal, *gradients))


def test_both_directions() -> None:
    module, twin = (cls(5, 18, 2, bidirectional=True) for cls in (genkernels.nn.GRU, torch.nn.GRU))
    twin.load_state_dict(module.state_dict())
    input = torch.randn(4, 3, 5)
    for actual, expected in zip(module(input), twin(input), strict=True):
        torch.testing.assert_close(actual, expected)
    module(input)[0].square().sum().backward()
    twin(input)[0].square().sum().backward()
    for actual, expected in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_nan_spreads_in_its_row_alone() -> None:
    values = gru_arguments(3, 4, 5, 18)
    values["input"][1, 2, 0] = torch.nan
    output, h_n = genkernels.gru(**values)
    assert output[1:, 2].isnan().all()
    assert h_n[2].isnan().all()
    is_other = torch.arange(4) != 2
    assert output[:, is_other].isfinite().all()
    assert output[0].isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "expanded_b", "offset", "strided"])
def test_strides(layout: str) -> None:
    """Biases too, which a kernel reads as they lie."""
    check({name: relaid(value, layout) for name, value in gru_arguments(3, 6, 8, 17).items()})


def test_reset_stops_nan() -> None:
    values = gru_arguments(3, 3, 5, 18)
    values["hx"].fill_(torch.nan)
    resets = torch.zeros(3, 3, dtype=torch.bool)
    resets[0] = True
    output, _ = genkernels.gru(**values, resets=resets)
    assert torch.equal(output, genkernels.gru(**{**values, "hx": torch.zeros(3, 18)})[0])


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_zero_sizes(shape: tuple[int, ...]) -> None:
    check(gru_arguments(*shape))


@pytest.mark.parametrize("op", ["gru_forward", "gru_backward"])
def test_raw_op_reads_within_bounds(op: str) -> None:
    """A raw call has no check in front: each tensor cut short, or of another dtype, must raise."""
    saved, options = (torch.zeros(3, 4, 6), torch.zeros(3, 4, 24)), (None, None, False, True)
    full: list[Any] = [*gru_arguments(3, 4, 5, 6).values(), *options, None]
    if op == "gru_backward":
        full = [*saved[:1], torch.zeros(4, 6), *full[:6], *saved, *options, True, True]
    raw = getattr(torch.ops.genkernels, op)
    raw(*full)
    for index, value in enumerate(full):
        if isinstance(value, torch.Tensor):
            for wrong in (value[..., :-1], value.half()):
                with pytest.raises(RuntimeError, match="expected"):
                    raw(*full[:index], wrong, *full[index + 1 :])


@pytest.mark.parametrize("sizes", [[4, 2, 4], [3, 3, 3], [5, 4, 1], [4, 4, 1]], ids=str)
def test_rejects_batch_sizes(sizes: list[int]) -> None:
    """Sizes that rise, do not begin with hx's, or do not add up to input's rows."""
    values = packed_arguments([4, 3, 3], 5, 6, torch.float32)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        genkernels.gru(**{**values, "batch_sizes": torch.tensor(sizes)})


def test_no_steps() -> None:
    with pytest.raises(RuntimeError, match="sequence length"):
        genkernels.gru(**gru_arguments(0, 3, 5, 18))


def test_no_rows() -> None:
    shape = (2, 0, 5, 18)
    values = gru_arguments(*shape)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    output, h_n = genkernels.gru(**leaves)
    assert output.shape == (*shape[:2], shape[3])
    assert torch.equal(h_n, values["hx"])
    gradients = torch.autograd.grad(output.sum() + h_n.sum(), tuple(leaves.values()))
    assert torch.equal(gradients[1], torch.ones_like(values["hx"]))
    for index in (0, 2, 3, 4, 5):
        assert not gradients[index].any()
