"""The Triton kernels of the GRU in Triton's interpreter, through the public ops. Those of
`make triton-check`, of which test_triton.py runs a part."""

from __future__ import annotations

import pytest
import torch
from parity import assert_op_parity
from test_gru import arguments as gru_arguments
from test_gru import dtype_id, packed_arguments, plain_gru
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


@pytest.mark.parametrize("shape", [(0, 3, 5, 18), (2, 0, 5, 18)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    values = gru_arguments(*shape)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    output, h_n = genkernels.gru(**leaves)
    assert output.shape == (*shape[:2], shape[3])
    assert torch.equal(h_n, values["hx"])
    gradients = torch.autograd.grad(output.sum() + h_n.sum(), tuple(leaves.values()))
    assert torch.equal(gradients[1], torch.ones_like(values["hx"]))
    for index in (0, 2, 3, 4, 5):
        assert not gradients[index].any()
