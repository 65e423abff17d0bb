"""T5: the same on fused ops and in plain PyTorch, its relative positions, spans and pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from model_checks import assert_same_model, perturb

import genkernels
from genkernels.data import (
    InputError,
    PairBatches,
    SpanBatches,
    TextToTextTokens,
    corrupt_spans,
    corrupted_windows,
    load_pairs,
)
from genkernels.models import T5, T5Config
from genkernels.models.t5 import position_buckets

SMALL = T5Config(30, 2, 4, 32, feedforward_dim=48, num_buckets=8, max_distance=20)
PAD, END, SENTINEL = TextToTextTokens.above(30)

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(config: T5Config = SMALL, fused: bool = True) -> T5:
    torch.manual_seed(0)
    return T5(config, fused)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_heads", 3),
        ("feedforward_dim", 1.5),
        ("num_buckets", 7),
        ("num_buckets", 2),
        ("max_distance", 16),
        ("dropout", -0.1),
    ],
)
def test_config_refuses_sizes_that_are_none(field, value):
    sizes = {"vocab_size": 10, "num_layers": 1, "num_heads": 4, "embedding_dim": 32}
    sizes |= {"feedforward_dim": 64, field: value}
    with pytest.raises(ValueError, match=field):
        T5Config(**sizes)


@pytest.mark.parametrize("lengths", [None, [11, 1, 7]])
def test_is_the_model_in_plain_pytorch(lengths):
    """The gradients of the relative positions' biases, too."""
    model, twin = small_model(), small_model(fused=False)
    source, target = torch.randint(30, (3, 11)), torch.randint(30, (3, 9))
    target[1, 4:] = -100
    lengths = lengths and torch.tensor(lengths)
    genkernels.stats(reset=True)
    assert_same_model(model, twin, source, target, lengths)
    calls = genkernels.stats(reset=True)
    assert calls["attention_forward", "cpp"] == calls["attention_backward", "cpp"] == 6
    for stack in (model.encoder_bias, model.decoder_bias):
        assert stack.embedding.weight.grad.abs().max() > 1e-4
    logits = model(source, target.clamp_min(0), lengths)
    assert logits.shape == (3, 9, 30 + 102)
    torch.testing.assert_close(logits, twin(source, target.clamp_min(0), lengths))


def exact_bucket(relative: int, buckets: int, largest: int, bidirectional: bool) -> int:
    """In integers: a distance d has left bucket `exact + j` behind when (d / exact) ** rest is
    above (largest / exact) ** j."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    rest = buckets - exact
    j = 0
    while j + 1 < rest and distance**rest * exact ** (j + 1) >= largest ** (j + 1) * exact**rest:
        j += 1
    return offset + exact + j


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "largest"), [(32, 128), (8, 20), (4, 3), (64, 1000), (6, 8)])
def test_buckets_of_relative_positions(buckets, largest, bidirectional):
    relative = torch.arange(-1100, 1101)
    expected = [exact_bucket(r, buckets, largest, bidirectional) for r in relative.tolist()]
    actual = position_buckets(relative, buckets, largest, bidirectional)
    assert actual.tolist() == expected
    assert len(set(expected)) >= buckets - 1, "all are used, but that of no distance to the right"


@pytest.mark.parametrize(("queries", "keys", "start"), [(5, 5, 0), (1, 7, 6), (3, 9, 2), (1, 1, 0)])
def test_relative_bias_is_looked_up_for_each_pair(queries, keys, start):
    model = small_model()
    bias = model.decoder_bias(queries, keys, start)
    assert bias.shape == (1, 4, queries, keys)
    for i, j in itertools.product(range(queries), range(keys)):
        bucket = exact_bucket(j - (start + i), 8, 20, bidirectional=False)
        assert torch.equal(bias[0, :, i, j], model.decoder_bias.embedding.weight[bucket])


def naive_attention(x, memory, weights, bias):
    """Of one row, x [L, E] and memory [S, E], a head at a time; scores are not scaled."""
    q, k, v, o = weights
    heads = []
    for h in range(4):
        rows = slice(8 * h, 8 * h + 8)
        scores = (x @ q[rows].T) @ (memory @ k[rows].T).T + bias[h]
        heads.append(scores.softmax(-1) @ (memory @ v[rows].T))
    return torch.cat(heads, -1) @ o.T


def naive_t5(model: T5, source, target):
    """One row, as the paper writes it."""

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    def feedforward(x, module):
        gate = F.gelu(x @ module.gate.weight.T, approximate="tanh")
        return (gate * (x @ module.expansion.weight.T)) @ module.projection.weight.T

    def own(attention):
        return (*attention.qkv.weight.chunk(3), attention.projection.weight)

    def bias(module, size, bidirectional):
        near = torch.arange(size)
        near = position_buckets(near - near[:, None], 8, 20, bidirectional)
        return module.embedding.weight[near].permute(2, 0, 1)

    embedding = model.token_embedding.weight
    x = embedding[source]
    both_ways = bias(model.encoder_bias, len(x), True)
    for block in model.encoder:
        y = norm(x, block.norm1)
        x = x + naive_attention(y, y, own(block.attention), both_ways)
        x = x + feedforward(norm(x, block.norm2), block.feedforward)
    memory = norm(x, model.encoder_norm)
    x = embedding[torch.cat([torch.tensor([PAD]), target[:-1]])]
    hidden = torch.full((len(x),) * 2, -math.inf).triu(1)
    causal = bias(model.decoder_bias, len(x), False) + hidden
    for block in model.decoder:
        y, cross = norm(x, block.norm1), block.cross_attention
        x = x + naive_attention(y, y, own(block.attention), causal)
        weights = (cross.query.weight, *cross.key_value.weight.chunk(2), cross.projection.weight)
        x = x + naive_attention(norm(x, block.norm2), memory, weights, torch.zeros(4, 1, 1))
        x = x + feedforward(norm(x, block.norm3), block.feedforward)
    return norm(x, model.decoder_norm) / math.sqrt(32) @ embedding.T


def test_is_t5_as_its_paper_writes_it():
    model = small_model()
    perturb(model, 0.1)
    source, target = torch.randint(30, (2, 13)), torch.randint(30, (2, 40))
    lengths = torch.tensor([13, 9])
    logits = model(source, target, lengths)
    for row, length in enumerate(lengths):
        expected = naive_t5(model, source[row, :length], target[row])
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_initial_values_keep_the_variance():
    model = T5(T5Config(256, 2, 4, 128, 512))
    source, target = torch.randint(256, (4, 60)), torch.randint(256, (4, 20))
    assert model(source, target).std().item() == pytest.approx(1, rel=0.2)
    attention = model.encoder[0].attention
    x = attention.qkv(torch.nn.functional.rms_norm(torch.randn(500, 128), (128,)))
    q, k, v = x.chunk(3, -1)
    scores = torch.einsum("nhd,mhd->hnm", q.unflatten(-1, (4, 32)), k.unflatten(-1, (4, 32)))
    assert scores.std().item() == pytest.approx(1, rel=0.1)
    assert v.std().item() == pytest.approx(1, rel=0.1)


def test_generation_runs_compiled_kernels(compiled_only):
    model = small_model(T5Config(30, 1, 4, 32, 48))
    model.generate(torch.randint(30, (2, 5)), 3, temperature=0)
    assert genkernels.stats()["attention_forward", "cpp"] == 1 + 3 * 2


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text, by putting the target's spans in the place of the source's sentinels."""
    assert source[-1] == target[-1] == 31
    starts = [i for i, token in enumerate(target) if token >= SENTINEL]
    spans = {
        target[a]: target[a + 1 : b] for a, b in itertools.pairwise([*starts, len(target) - 1])
    }
    assert list(spans) == list(range(SENTINEL, SENTINEL + len(starts))), "counted from 0"
    assert all(spans.values()), "no span is empty"
    assert [token for token in source if token >= SENTINEL] == list(spans)
    assert not any(min(pair) >= SENTINEL for pair in itertools.pairwise(source)), "spans touch"
    parts = [spans.pop(token) if token >= SENTINEL else [token] for token in source[:-1]]
    return list(itertools.chain.from_iterable(parts))


@pytest.mark.parametrize("length", [1, 2, 3, 13, 40, 128])
def test_spans_can_be_put_back(length):
    tokens = torch.randint(30, (20, length))
    source, target = corrupt_spans(tokens, 30, torch.Generator().manual_seed(0))
    noise = max(round(0.15 * length), 1)
    spans = max(round(noise / 3), 1)
    assert source.shape == (20, length - noise + spans + 1)
    assert target.shape == (20, noise + spans + 1)
    for row in range(20):
        assert restored(source[row].tolist(), target[row].tolist()) == tokens[row].tolist()


def test_spans_are_anywhere():
    tokens = torch.arange(40).repeat(4000, 1)
    special = TextToTextTokens.above(40)
    source, target = corrupt_spans(tokens, 40, torch.Generator().manual_seed(0))
    cut = torch.bincount(target[target < 40], minlength=40)
    assert cut.sum() == 6 * 4000
    cut = cut / 4000
    assert cut.min() > 0.03
    assert cut[4:-4].min() > 0.12
    assert cut[4:-4].max() < 0.2
    torch.testing.assert_close(cut, cut.flip(0), atol=0.03, rtol=0)
    second = (target == special.sentinel + 1).int().argmax(1) - 1  # tokens of the first span
    lengths = torch.bincount(second, minlength=6)[1:] / 4000
    torch.testing.assert_close(lengths, torch.full((5,), 0.2), atol=0.03, rtol=0)
    assert source.unique(dim=0).shape[0] > 1000


@pytest.mark.parametrize("length", [0, 2100])
def test_refuses_rows_without_spans(length):
    with pytest.raises(ValueError, match="a length of 1 or more, and at most 100 spans"):
        corrupt_spans(torch.zeros(1, length, dtype=torch.int64), 30, torch.Generator())


def test_span_batches_are_a_function_of_seed_and_step():
    tokens = torch.arange(1000)
    batches = SpanBatches(tokens, 6, 40, 1000, seed=3)
    batch = batches.batch(5)
    for seed, is_same in ((3, True), (4, False)):
        again = SpanBatches(tokens, 6, 40, 1000, seed).batch(5)
        assert all(torch.equal(a, b) for a, b in zip(again, batch, strict=True)) == is_same
    assert not torch.equal(batches.batch(6)[0], batch[0])
    windows = corrupted_windows(torch.arange(29).repeat(3), 2, 29, 30)
    assert [len(source) for source, _ in windows] == [2, 1]
    rows = [row for pair in windows for row in zip(*map(torch.Tensor.tolist, pair), strict=True)]
    assert [restored(*row) for row in rows] == [list(range(29))] * 3
    assert len({str(row) for row in rows}) == 3


def test_reads_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffgr\u00fcn\tgreen\r\n\r\nrot  \t red\n".encode())
    assert load_pairs(path) == [("gr\u00fcn", "green"), ("rot  ", " red")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nc", "line 2: 0 tabs; expected label, one tab, text"),
        (b"\na\tb\tc\n", "line 2: 2 tabs"),
        (b"a\tb\n\n \tb\n", "line 3: an empty text"),
        (b"a\t\n", "line 1: an empty text"),
        (b"a\tb\n\xff\tc\n", "not UTF-8 at byte 4"),
        (b"\n\n", "no text"),
        (None, "No such file"),
    ],
)
def test_refuses_pairs(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_pairs(path, "label", "text")
    assert str(path) in str(error.value)


def test_pair_batches_end_and_are_padded():
    pairs = [
        (torch.tensor([1, 2, 3]), torch.tensor([4])),
        (torch.tensor([5]), torch.tensor([6, 7])),
        (torch.arange(20), torch.arange(20)),
    ]
    batches = PairBatches(pairs, 8, 6, 30)
    source, target, lengths = batches.rows(torch.tensor([0, 1]))
    assert source.tolist() == [[1, 2, 3, END], [5, END, PAD, PAD]]
    assert target.tolist() == [[4, END, -100], [6, 7, END]]
    assert lengths.tolist() == [4, 2]
    assert batches.rows(torch.tensor([2]))[0].tolist() == [[0, 1, 2, 3, 4, END]]
    drawn = batches.batch(3)
    assert len(drawn[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(drawn, batches.batch(3), strict=True))
    with pytest.raises(InputError, match="no pairs"):
        PairBatches([], 8, 6, 30)
