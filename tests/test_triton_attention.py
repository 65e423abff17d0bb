"""The Triton kernels of attention in Triton's interpreter, through the public op."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import test_attention_features as features
import test_varlen_attn as varlen
import torch
from parity import assert_op_parity
from test_attention import LOWER_RIGHT, OUTPUTS, TENSORS, arguments, each_causal, op, plain
from test_gru import assert_bitwise_equal, dtype_id, with_gradients

import genkernels
from genkernels import triton
from genkernels.ops.attention import unbind_heads
from genkernels.reference.attention import Features

pytestmark = pytest.mark.skipif(
    not triton.IS_INTERPRETED, reason="TRITON_INTERPRET=1: not set (make triton-check sets it)"
)
# The interpreter multiplies bfloat16's bit patterns.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
# B, H, L, S, D: at the edges of blocks of 64 and 128 rows, and of 32 and 64 columns.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 2, 3, 7),
    (1, 3, 15, 16, 16),
    (1, 1, 17, 33, 31),
    (2, 1, 63, 65, 33),
    (1, 1, 129, 64, 64),
    (1, 1, 64, 130, 20),
    (1, 1, 150, 200, 8),
]


@pytest.fixture(autouse=True)
def triton_only():
    genkernels.stats(reset=True)
    yield
    calls = genkernels.stats(reset=True)
    assert {kind for _, kind in calls} == {"triton"}


def check(*shape: int, dtype: torch.dtype, draws: int = 1, **options: Any) -> None:
    drawn = (arguments(*shape, dtype, seed=seed, **options) for seed in range(draws))
    assert_op_parity(op, plain, plain, OUTPUTS, *drawn)


@each_dtype
@each_causal
@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=[pytest.mark.slow] * (s != SHAPES[3])) for s in SHAPES], ids=str
)
def test_parity(shape: tuple[int, ...], causal: int, dtype: torch.dtype) -> None:
    check(*shape, dtype=dtype, causal=causal)


@each_dtype
@pytest.mark.parametrize("Hk", [1, 2], ids=["one_head", "two_heads"])
def test_shared_heads(Hk: int, dtype: torch.dtype) -> None:
    check(1, 4, 17, 70, 5, dtype=dtype, Hk=Hk, enable_gqa=True, causal=LOWER_RIGHT)


@each_dtype
@pytest.mark.parametrize(("D", "Dv"), [(8, 40), (65, 3), (128, 100)])
def test_head_sizes(D: int, Dv: int, dtype: torch.dtype) -> None:
    check(1, 1, 18, 67, D, dtype=dtype, Dv=Dv)


@pytest.mark.parametrize(
    "scale", [-0.3, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.0, 40.0))]
)
def test_scale(scale: float) -> None:
    draws = [arguments(1, 2, 40, 70, 16, seed=seed) | {"scale": scale} for seed in range(2)]
    assert_op_parity(op, plain, plain, OUTPUTS, *draws)


def test_weights_of_large_scores_add_up_to_one() -> None:
    """In the backward pass, too, where of thousands one number near the logsumexp has too few
    digits."""
    values = arguments(1, 1, 500, 8, 5, scale=2000.0) | {"value": torch.ones(1, 1, 8, 1)}
    value = values["value"].requires_grad_()
    output = genkernels.scaled_dot_product_attention(**values)
    [gradient] = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close(gradient.sum(), torch.tensor(500.0), rtol=1e-6, atol=0)


@each_dtype
def test_strides(dtype: torch.dtype) -> None:
    values = arguments(2, 3, 20, 70, 8, dtype)
    values["query"] = values["query"].transpose(1, 2).contiguous().transpose(1, 2)
    values["key"] = values["key"].mT.contiguous().mT
    values["value"] = values["value"][:, :1].expand(-1, 3, -1, -1)
    assert_op_parity(op, plain, plain, OUTPUTS, values)


@pytest.mark.parametrize("parts", [2, 3])
def test_side_by_side(parts: int) -> None:
    """The gradients of queries, keys and values of one product are the product's as they lie."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 35, parts, 3, 8, generator=generator).requires_grad_()
    query = torch.randn(2, 3, 35, 8, generator=generator)

    def gradient(*tensors: torch.Tensor) -> torch.Tensor:
        heads = [tensor.transpose(1, 2) for tensor in tensors]
        output = genkernels.scaled_dot_product_attention(*[query, *heads][-3:])
        return torch.autograd.grad(output.square().sum(), packed)[0]

    assert torch.equal(
        gradient(*unbind_heads(packed)), gradient(*map(torch.clone, packed.unbind(2)))
    )


def test_runs_agree() -> None:
    values = arguments(1, 2, 70, 130, 8, torch.float16, Hk=1, enable_gqa=True)
    assert_bitwise_equal(with_gradients(op, values), with_gradients(op, values))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)], ids=str
)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    check(*shape, dtype=torch.float32, draws=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_spreads_as_it_does_in_pytorch() -> None:
    for name in TENSORS:
        values = arguments(1, 2, 70, 80, 8)
        values[name][0, 1, 66, 3] = torch.nan
        assert_op_parity(op, plain, plain, OUTPUTS, values)


QUICK = ("bias", "dropout", "lower_right_window")


@each_dtype
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in features.FEATURES],
)
def test_features(case: str, dtype: torch.dtype) -> None:
    """Alone and with each other; the gradient of a mask, too, whatever it is broadcast along."""
    options = features.FEATURES[case]
    features.check(lambda seed: features.drawn((2, 2, 35, 70, 16), dtype, seed, **options), 1)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("case", features.LARGE)
def test_blocks(case: str, dtype: torch.dtype) -> None:
    options = features.LARGE[case]
    features.check(lambda seed: features.drawn((1, 2, 209, 401, 8), dtype, seed, **options), 1)


@pytest.mark.slow
@pytest.mark.parametrize("window_size", [(1, 1), (62, -1), (-1, 62)], ids=str)
def test_windows_that_end_beside_a_tile(window_size: tuple[int, int]) -> None:
    """With its first key, and before its last."""
    values = features.drawn((1, 1, 130, 130, 8), torch.float16, 0, window_size=window_size)
    features.check(lambda seed: values, 1)


@pytest.mark.slow
def test_what_is_outside_of_a_window_is_not_computed() -> None:
    """Beside NaN a weight of zero would be NaN: in the forward pass in tiles of up to 128 rows, and
    in the backward pass beside these."""
    values = features.drawn((1, 1, 640, 640, 8), torch.float16, 0, window_size=(5, 5))
    for name in TENSORS:
        values[name][:, :, [0, -1]] = torch.nan
    for result in with_gradients(features.op, values):
        assert result[:, :, 256:384].isfinite().all()
        assert result[:, :, 0].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask", [(1, 1, 150, 200), (2, 1, 1, 200), (1, 2, 150, 1), (1, 1, 1, 1)], ids=str
)
def test_gradient_of_a_shared_mask(mask: tuple[int, ...]) -> None:
    """Of several tiles, and of several for one element."""
    check(2, 2, 150, 200, 8, dtype=torch.float32, mask=mask)


@pytest.mark.parametrize("L", [3, 60])
def test_padding_is_not_read(L: int) -> None:
    features.TestParity().test_padding_is_not_read(0, L, torch.float16)


def test_gradients_of_padding_are_zeros_beside_nan() -> None:
    values = features.drawn((2, 1, 5, 70, 8), torch.float16, 0, lengths=(0.9, 0.3))
    values["query"][:, :, 2] = torch.nan
    for gradient in with_gradients(features.op, values)[3:]:
        assert gradient[0, :, :63].isnan().all()
        assert not gradient[0, :, 63:].any()
        assert not gradient[1, :, 21:].any()


def test_lengths_that_do_not_fit_are_cut() -> None:
    """As those of sequences are."""
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 70, 8)
    results = []
    for lengths in ([0, 70], [-3, 1000]):
        rest = (torch.tensor(lengths), None, -1, -1, 0.0)
        forward = torch.ops.genkernels.attention_forward(q, k, k, None, None, 0.0, 0, 1.0, *rest)
        saved = (q, None, q, k, k, None, None, *forward, 0.0, 0, 1.0, False, *rest)
        results.append([*forward, *torch.ops.genkernels.attention_backward(*saved)])
    assert_bitwise_equal(*results)


# B, L, and how far apart batches and rows are.
FAR = {
    "rows": (1, 400, 0, 2**23 - 16),
    "rows_of_a_tile": (1, 70, 0, 2**25),
    "batches": (5, 2, 2**29, 512),
}


@pytest.mark.slow
@pytest.mark.parametrize(("B", "L", "batch", "row"), FAR.values(), ids=FAR)
def test_past_2_to_the_31(B: int, L: int, batch: int, row: int) -> None:
    """Of what lies between, a page is touched at most."""
    from genkernels.triton import attention as kernels

    memory = torch.empty(B * batch + L * row, dtype=torch.float16)

    def place(index: int, rows: int, columns: int) -> torch.Tensor:
        return memory.as_strided((B, 1, rows, columns), (batch, row, row, 1), 16 * index)

    sizes = ((L, 16), (20, 16), (20, 16), (L, 16), (L, 20))
    near = [torch.randn(B, 1, *size).half() for size in sizes]
    q, k, v, g, mask = (place(n, *size).copy_(near[n]) for n, size in enumerate(sizes))
    # Results of a tile's rows are never that far apart: launchers make them.
    are_near = row >= 2**23
    written = (torch.empty_like(near[n]) if are_near else place(6 + n, *sizes[n]) for n in range(4))
    *grads, output = written
    statistics, of_mask = torch.empty(2, B, 1, L), torch.empty_like(near[4])
    call: Any = (q, k, v, mask, None, 0.0, 0, 0.25, Features())
    kernels._forward(kernels._arguments(*call), output, statistics)
    saved = (g, None, output, statistics, tuple(grads), of_mask)
    kernels._backward(kernels._arguments(*call), *saved)
    q, k, v, g, mask = near
    settings, rest = (mask, None, 0.0, 0, 0.25), (None, None, -1, -1, 0.0)
    forward = torch.ops.genkernels.attention_forward(q, k, v, *settings, *rest)
    call = (g, None, q, k, v, *settings[:2], *forward, *settings[2:], True, *rest)
    expected = [*torch.ops.genkernels.attention_backward(*call), *forward]
    assert_bitwise_equal([*grads, of_mask, output, statistics], expected)


def test_mask_of_any_strides() -> None:
    values = arguments(2, 2, 20, 70, 8, mask=(2, 2, 70, 20))
    values["attn_mask"] = values["attn_mask"].mT
    assert_op_parity(op, plain, plain, OUTPUTS, values)


DECODED = (
    *("lengths", "no_keys", "left", "alibi", "softcap", "lower_right_window", "gqa", "all"),
    "dropout",  # which is not
)
QUICKLY_DECODED = (("no_keys", 1, torch.float32), ("no_keys", 3, torch.float16))


@pytest.mark.parametrize(
    ("case", "L", "dtype"),
    [
        pytest.param(*values, marks=[pytest.mark.slow] * (values not in QUICKLY_DECODED))
        for values in itertools.product(DECODED, (1, 3), (torch.float32, torch.float16))
    ],
    ids=lambda value: dtype_id(value) if isinstance(value, torch.dtype) else str(value),
)
def test_few_queries(case: str, L: int, dtype: torch.dtype) -> None:
    """Of which the keys are shared out, in three parts."""
    options = features.FEATURES[case]
    features.check(lambda seed: features.drawn((2, 2, L, 1100, 16), dtype, seed, **options), 1)


@pytest.mark.slow
def test_many_parts_of_keys() -> None:
    """More than are put together at once; and what part a batch's keys end in does not matter."""
    values = arguments(1, 4, 1, 17 * 512 + 5, 8, Hk=1, enable_gqa=True)
    query, key, value = (values[name] for name in TENSORS)
    attention = genkernels.scaled_dot_product_attention
    output = attention(query, key, value, enable_gqa=True)
    expected = plain(**values)[0]
    torch.testing.assert_close(output, expected)
    several = attention(*(t.repeat(3, 1, 1, 1) for t in (query, key, value)), enable_gqa=True)
    assert torch.equal(several, output.expand(3, -1, -1, -1))


@each_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        pytest.param(
            {"window": (30, 10), "H": 4, "Hk": 2, "enable_gqa": True}, marks=pytest.mark.slow
        ),
        pytest.param({"D": 9, "Dv": 20}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sequences(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Empty ones, longer than a block, with more queries than keys and without any."""
    lengths = ((70, 70), (0, 3), (1, 1), (130, 65), (33, 0), (64, 200))
    values = varlen.arguments(lengths, dtype, **options)
    of_each = varlen.each_sequence(plain)
    assert_op_parity(varlen.op, of_each, of_each, OUTPUTS, values)


def test_sequences_that_do_not_fit_are_cut() -> None:
    """No look at them is worth a wait, and none is read out of bounds or left unwritten."""
    values = varlen.arguments(((3, 4), (5, 6)))
    expected = genkernels.varlen_attn(**values, max_q=5, max_k=6)
    values["cu_seq_q"][2], values["cu_seq_k"][0] = 1000, -7
    assert torch.equal(genkernels.varlen_attn(**values, max_q=5, max_k=6), expected)


@pytest.mark.parametrize("op_name", ["attention", "varlen_attn"])
def test_raw_op_reads_within_bounds(op_name: str) -> None:
    """A raw call has no check in front: each tensor cut short, or of another dtype, must raise."""
    q = torch.zeros(2, 4, 3, 8)
    mask, seed, lengths = torch.zeros(2, 4, 3, 3), torch.zeros(1, dtype=torch.int64), [3, 3]
    settings = [0.5, 0, 1.0]
    rest = [torch.tensor(lengths), torch.zeros(2, 4), -1, -1, 0.0]
    forward = [q, q, q, mask, seed, *settings, *rest]
    saved = [torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 4, 3)]
    backward = [q, torch.zeros(2, 4, 3), q, q, q, mask, seed, *saved, *settings, True, *rest]
    if op_name == "varlen_attn":
        q, begins = torch.zeros(6, 4, 8), torch.tensor([0, 2, 6])
        forward = [q, q, q, begins, begins, -1, -1, 1.0]
        saved = [torch.zeros(6, 4, 8), torch.zeros(2, 4, 6)]
        backward = [q, torch.zeros(4, 6), q, q, q, begins, begins, *saved, -1, -1, 1.0]
    for name, full in ((f"{op_name}_forward", forward), (f"{op_name}_backward", backward)):
        raw = getattr(torch.ops.genkernels, name)
        raw(*full)
        for index, value in enumerate(full):
            if isinstance(value, torch.Tensor):
                is_value = full is forward and index == 2  # whose head size may be another
                for wrong in (value[1:] if is_value else value[..., :-1], value.half()):
                    with pytest.raises(RuntimeError, match="do not fit"):
                        raw(*full[:index], wrong, *full[index + 1 :])


def test_float32_with_a_mask_is_left_to_the_reference_on_sm_100(monkeypatch) -> None:
    from genkernels.triton import attention as kernels

    monkeypatch.setattr(kernels, "architecture_of", lambda _: "sm_100")
    values = arguments(1, 1, 3, 4, 5)
    with_gradients(op, values)  # is not
    values["attn_mask"] = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="nothing is added to float32's scores on this GPU"):
        actual = with_gradients(op, values)
    for tensor, expected in zip(actual, with_gradients(plain, values), strict=True):
        torch.testing.assert_close(tensor, expected)


def test_large_heads_are_left_to_the_reference() -> None:
    values = arguments(1, 1, 3, 4, 129)
    with pytest.warns(UserWarning, match="heads have at most 128 elements, and these 129"):
        actual = with_gradients(op, values)
    for tensor, expected in zip(actual, with_gradients(plain, values), strict=True):
        torch.testing.assert_close(tensor, expected)
