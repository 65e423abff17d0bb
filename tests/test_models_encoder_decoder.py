"""What the models that answer share: their training, their answers, and what is padded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_checks import perturb, training_losses

import genkernels
from genkernels.data import ByteTokenizer, PairBatches, TextToTextTokens, date_pairs
from genkernels.models import T5, Seq2Seq, Seq2SeqConfig, T5Config

PAD, END, _ = TextToTextTokens.above(30)

MODELS = pytest.mark.parametrize("name", ["seq2seq", "t5"])
FUSED = pytest.mark.parametrize("fused", [True, False])

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(
    name: str, fused: bool = True, vocab_size: int = 30, dropout: float = 0.0, deviation: float = 0
) -> Any:
    torch.manual_seed(0)
    if name == "t5":
        model: Any = T5(T5Config(vocab_size, 2, 4, 32, 64, dropout=dropout), fused)
    else:
        config = Seq2SeqConfig(vocab_size, 16, 32, num_layers=2, dropout=dropout)
        model = Seq2Seq(config, fused)
    perturb(model, deviation)
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@MODELS
def test_trains_as_in_plain_pytorch(name):
    tokenizer = ByteTokenizer()
    pairs = [tuple(map(tokenizer.encode, pair)) for pair in date_pairs(200)]
    batches = PairBatches(pairs, 12, 40, 256)
    attentions, layers = {"seq2seq": (1, 2), "t5": (6, 0)}[name]  # a step; of the decoder's GRU
    genkernels.stats(reset=True)
    ours = training_losses(small_model(name, vocab_size=256), batches, 30, 5e-3)
    calls = genkernels.stats(reset=True)
    for direction in ("forward", "backward"):
        assert calls[f"attention_{direction}", "cpp"] == 30 * attentions
        assert calls.get((f"gru_{direction}", "cpp"), 0) == 30 * layers
    theirs = training_losses(small_model(name, fused=False, vocab_size=256), batches, 30, 5e-3)
    assert not genkernels.stats()
    assert ours[0] > 5
    assert ours[-1] < 3, "has to have learned something"
    assert ours == pytest.approx(theirs, rel=1e-3)


@MODELS
def test_learns_to_answer(name):
    torch.manual_seed(0)
    pairs = [
        (torch.randint(30, (n,)), torch.randint(30, (m,))) for n, m in ((5, 3), (2, 6), (7, 1))
    ]
    batches = PairBatches(pairs, 8, 12, 30)
    model = small_model(name, dropout=0.1)
    training_losses(model, batches, 80, 1e-2)
    source, _, lengths = batches.rows(torch.arange(3))
    answers = model.generate(source, 10, temperature=0, lengths=lengths)
    assert torch.equal(model.beam_search(source, 10, 3, lengths=lengths), answers)
    assert model.training, "generate must leave the mode as it was"
    for (_, target), answer in zip(pairs, answers.tolist(), strict=True):
        expected = [*target.tolist(), END]
        assert answer == expected + [PAD] * (7 - len(expected)), "ends with the longest"


@MODELS
@FUSED
def test_cache_changes_no_token(name, fused):
    model = small_model(name, fused, deviation=0.2)
    for batch, size, temperature in itertools.product((1, 3), (1, 9), (0, 1.5)):
        source = torch.randint(30, (batch, size))
        lengths = torch.randint(1, size + 1, (batch,)) if size > 1 else None
        cached, plain = (
            model.generate(
                source,
                25,
                temperature,
                generator=seeded(1),
                use_cache=use_cache,
                lengths=lengths,
            )
            for use_cache in (True, False)
        )
        assert torch.equal(cached, plain), (batch, size, temperature)


@MODELS
def test_greedy_generation_takes_the_likeliest_token_each_time(name):
    model = small_model(name, dropout=0.5, deviation=0.2)
    with torch.no_grad():
        model.output_weight[END] *= 4  # likely now and then
    source = torch.randint(30, (8, 9))
    generated = model.generate(source, 12, temperature=0)
    model.eval()
    expected = torch.zeros(8, 0, dtype=torch.int64)
    for _ in range(12):
        logits = model(source, F.pad(expected, (0, 1)))  # the last one is not read
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    ended = (expected == END).cumsum(1) - (expected == END).long() > 0
    assert ended.any(), "what comes after an end is seen"
    assert torch.equal(generated, expected.masked_fill(ended, PAD))
    assert model.generate(source, 0).shape == (8, 0)


@MODELS
def test_generation_follows_its_generator(name):
    model = small_model(name)
    source = torch.randint(30, (2, 5))
    state = torch.get_rng_state()
    first, again, other = (model.generate(source, 30, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@MODELS
@FUSED
def test_what_is_padded_changes_nothing(name, fused):
    """What a second direction begins with, too."""
    model = small_model(name, fused, deviation=0.2).eval()
    alone, target = torch.randint(30, (1, 6)), torch.randint(30, (1, 5))
    beside = torch.cat([alone, torch.randint(30, (1, 6))], 1)
    lengths = torch.tensor([6])
    torch.testing.assert_close(model(beside, target, lengths), model(alone, target))
    assert not torch.allclose(model(beside, target), model(alone, target), atol=1e-2)


@MODELS
def test_log_prob_is_that_of_the_logits(name):
    model = small_model(name).eval()
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


@MODELS
@pytest.mark.parametrize("shape", [(5,), (2, 0)])
def test_refuses_a_source(name, shape):
    source = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="source must be"):
        small_model(name).loss(source, torch.zeros(2, 3, dtype=torch.int64))
