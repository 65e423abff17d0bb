"""The GRU encoder-decoder: one model on fused ops and in plain PyTorch, and as its paper has it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from model_checks import assert_same_model, perturb, training_losses
from torch import Tensor

import genkernels
from genkernels.data import ByteTokenizer, PairBatches, TextToTextTokens, date_pairs
from genkernels.models import Seq2Seq, Seq2SeqConfig

SMALL = Seq2SeqConfig(30, embedding_dim=12, hidden_size=16, num_layers=2)
ONE_WAY = dataclasses.replace(SMALL, num_layers=1, bidirectional=False)
PAD, END, _ = TextToTextTokens.above(30)

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(config: Seq2SeqConfig = SMALL, fused: bool = True) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(config, fused)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("embedding_dim", 1.5),
        ("hidden_size", 15),
        ("num_layers", True),
        ("bidirectional", 1),
        ("dropout", 1.0),
    ],
)
def test_config_refuses_sizes_that_are_none(field, value):
    sizes = {"vocab_size": 10, "embedding_dim": 4, "hidden_size": 16, field: value}
    with pytest.raises(ValueError, match=field):
        Seq2SeqConfig(**sizes)


@pytest.mark.parametrize("lengths", [None, [11, 1, 7]])
@pytest.mark.parametrize("config", [SMALL, ONE_WAY], ids=["two layers both ways", "one layer"])
def test_is_the_model_in_plain_pytorch(config, lengths):
    model, twin = small_model(config), small_model(config, fused=False)
    assert type(model.encoder) is genkernels.nn.GRU
    assert type(twin.encoder) is type(twin.decoder.gru) is torch.nn.GRU
    source, target = torch.randint(30, (3, 11)), torch.randint(30, (3, 9))
    target[1, 4:] = -100
    lengths = lengths and torch.tensor(lengths)
    genkernels.stats(reset=True)
    assert_same_model(model, twin, source, target, lengths)
    calls = genkernels.stats(reset=True)
    assert calls["attention_forward", "cpp"] == calls["attention_backward", "cpp"] == 1
    both, one = "bidirectional_gru", "gru"
    ran = [both, one] if config.bidirectional else [one, one]
    for direction in ("forward", "backward"):  # a target is one sequence, not one call a token
        for op in ran:
            count = config.num_layers * ran.count(op)
            assert calls[f"{op}_{direction}", "cpp"] == count, (op, direction)
    logits = model(source, target.clamp_min(0), lengths)
    assert logits.shape == (3, 9, 30 + 2)
    torch.testing.assert_close(logits, twin(source, target.clamp_min(0), lengths))


def naive_seq2seq(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    """One row of a model of one layer and direction, a token at a time, as the paper writes it."""

    def step(gru: torch.nn.Module, x: Tensor, h: Tensor) -> Tensor:
        gates = x @ gru.weight_ih_l0.T + gru.bias_ih_l0, h @ gru.weight_hh_l0.T + gru.bias_hh_l0
        (r, z, n), (hr, hz, hn) = (gate.chunk(3) for gate in gates)
        z = torch.sigmoid(z + hz)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h

    h, states = torch.zeros(16), []
    for token in source:
        h = step(model.encoder, model.source_embedding.weight[token], h)
        states.append(h)
    attention, logits = model.decoder.cross_attention, []
    for token in [PAD, *target[:-1].tolist()]:
        h = step(model.decoder.gru, model.target_embedding.weight[token], h)
        scores = torch.stack([h @ attention.query.weight.T @ state for state in states])
        c = (scores.softmax(0)[:, None] * torch.stack(states)).sum(0)
        h_tilde = torch.tanh(attention.projection.weight @ torch.cat([c, h]))
        logits.append(model.linear.weight @ h_tilde)
    return torch.stack(logits)


def test_is_the_model_as_its_paper_writes_it():
    model = small_model(ONE_WAY)
    perturb(model, 0.5)
    source, target = torch.randint(30, (2, 13)), torch.randint(30, (2, 10))
    lengths = torch.tensor([13, 9])
    logits = model(source, target, lengths)
    for row, length in enumerate(lengths):
        expected = naive_seq2seq(model, source[row, :length], target[row])
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_trains_as_in_plain_pytorch():
    tokenizer = ByteTokenizer()
    pairs = [tuple(map(tokenizer.encode, pair)) for pair in date_pairs(200)]
    batches = PairBatches(pairs, 12, 40, 256)
    config = Seq2SeqConfig(256, 32, 64)
    genkernels.stats(reset=True)
    ours = training_losses(small_model(config), batches, 30, 5e-3)
    calls = genkernels.stats(reset=True)
    assert calls["gru_forward", "cpp"] == calls["gru_backward", "cpp"] == 30
    theirs = training_losses(small_model(config, fused=False), batches, 30, 5e-3)
    assert not genkernels.stats()
    assert ours[0] > 5
    assert ours[-1] < 2.5, "has to have learned something"
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_learns_to_answer():
    torch.manual_seed(0)
    pairs = [
        (torch.randint(30, (n,)), torch.randint(30, (m,))) for n, m in ((5, 3), (2, 6), (7, 1))
    ]
    batches = PairBatches(pairs, 8, 12, 30)
    model = small_model(Seq2SeqConfig(30, 16, 32, dropout=0.1))
    training_losses(model, batches, 80, 1e-2)
    source, _, lengths = batches.rows(torch.arange(3))
    answers = model.generate(source, 10, temperature=0, lengths=lengths)
    assert torch.equal(model.beam_search(source, 10, 3, lengths=lengths), answers)
    assert model.training
    for (_, target), answer in zip(pairs, answers.tolist(), strict=True):
        expected = [*target.tolist(), END]
        assert answer == expected + [PAD] * (7 - len(expected)), "ends with the longest"


@pytest.mark.parametrize("fused", [True, False])
def test_cache_changes_no_token(fused):
    model = small_model(SMALL, fused)
    perturb(model, 0.3)
    for batch, size, temperature in ((1, 1, 0), (1, 9, 1.5), (3, 1, 1.5), (3, 9, 0), (3, 9, 1.5)):
        source = torch.randint(30, (batch, size))
        lengths = torch.randint(1, size + 1, (batch,)) if size > 1 else None
        cached, plain = (
            model.generate(
                source,
                25,
                temperature,
                generator=torch.Generator().manual_seed(1),
                use_cache=use_cache,
                lengths=lengths,
            )
            for use_cache in (True, False)
        )
        assert torch.equal(cached, plain), (batch, size, temperature)


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model = small_model(dataclasses.replace(SMALL, dropout=0.5))
    perturb(model, 0.3)
    source = torch.randint(30, (3, 9))
    generated = model.generate(source, 12, temperature=0)
    model.eval()
    expected = torch.zeros(3, 0, dtype=torch.int64)
    for _ in range(12):
        logits = model(source, F.pad(expected, (0, 1)))  # the last one is not read
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    ended = (expected == END).cumsum(1) - (expected == END).long() > 0
    assert ended.any(), "what comes after an end is seen"
    assert torch.equal(generated, expected.masked_fill(ended, PAD))
    assert model.generate(source, 0).shape == (3, 0)


def test_generation_follows_its_generator():
    model = small_model()
    source = torch.randint(30, (2, 5))
    first, again, other = (
        model.generate(source, 30, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_padded_changes_nothing(fused):
    """What the second direction begins with, too."""
    model = small_model(fused=fused).eval()
    perturb(model, 0.3)
    alone, target = torch.randint(30, (1, 6)), torch.randint(30, (1, 5))
    beside = torch.cat([alone, torch.randint(30, (1, 6))], 1)
    lengths = torch.tensor([6])
    torch.testing.assert_close(model(beside, target, lengths), model(alone, target))
    assert not torch.allclose(model(beside, target), model(alone, target), atol=1e-2)


def test_log_prob_is_that_of_the_logits():
    model = small_model().eval()
    source, target = torch.randint(30, (2, 3, 10))
    target[1, 6:] = -100
    log_prob, prediction, state = model.log_prob(source, target)
    logits = model(source, target).flatten(0, 1)
    torch.testing.assert_close(
        log_prob, -F.cross_entropy(logits, target.flatten(), reduction="none")
    )
    assert torch.equal(prediction, logits.argmax(-1))
    assert state is None
    assert not log_prob.view(3, 10)[1, 6:].any()


@pytest.mark.parametrize("shape", [(5,), (2, 0)])
def test_refuses_a_source(shape):
    source = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="source must be"):
        small_model().loss(source, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("lengths", [[0, 1], [1, 6], [5], [[1, 2]]])
def test_refuses_lengths(lengths):
    source, target = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="lengths must be 2 numbers from 1 to 5"):
        small_model().loss(source, target, torch.tensor(lengths))
