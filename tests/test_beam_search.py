"""Beam search of the models that answer: against all answers there are, and a search by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from model_checks import perturb
from torch import Tensor

from genkernels.models import T5, EncoderDecoder, Seq2Seq, Seq2SeqConfig, T5Config
from genkernels.models.transformer import KeyValueCache

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(name: str, seed: int = 0) -> EncoderDecoder:
    torch.manual_seed(seed)
    if name == "t5":
        model: Any = T5(T5Config(2, 1, 2, 8, 16))
    else:
        model = Seq2Seq(Seq2SeqConfig(2, 4, 8, num_layers=2, dropout=0.5))
    perturb(model, 0.5)
    return model


def sources(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(2, (count, 5)), torch.randint(1, 6, (count,))


@torch.no_grad()
def log_probs(model: Any, source: Tensor, answers: list[list[int]], length: Tensor) -> list[float]:
    """ln P of each answer to one source, int64 [S], without a cache."""
    size = max(map(len, answers))
    target = torch.tensor([answer + [-100] * (size - len(answer)) for answer in answers])
    many = source.expand(len(answers), -1), target, length.expand(len(answers))
    model.eval()
    log_prob = model.log_prob(*many)[0]
    model.train()
    return log_prob.view(target.shape).double().sum(1).tolist()


def unpadded(answer: Tensor, model: Any) -> list[int]:
    tokens = answer.tolist()
    end = model.special_tokens.end
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def assert_best(answer: Tensor, model: Any, candidates: dict[tuple[int, ...], float], case: Any):
    """That no candidate is better, but for rounding."""
    found = tuple(unpadded(answer, model))
    assert answer[len(found) :].eq(model.special_tokens.pad).all(), case
    assert found in candidates, case
    assert candidates[found] == pytest.approx(max(candidates.values()), rel=1e-5), case


@pytest.mark.parametrize(("name", "size"), [("seq2seq", 4), ("t5", 2)])
def test_a_beam_that_holds_everything_finds_the_best_answer(name, size):
    model = model_of(name)
    ids = len(model.output_weight)
    end = model.special_tokens.end
    source, lengths = sources(4)
    answers = [
        [*begun, *last]
        for n in range(1, size + 1)
        for begun in itertools.product([i for i in range(ids) if i != end], repeat=n - 1)
        for last in ([[end]] if n < size else [[i] for i in range(ids)])
    ]
    values = [log_probs(model, source[row], answers, lengths[row]) for row in range(4)]
    counts = set()
    for penalty in (0.0, 1.0, 2.5):
        found = model.beam_search(source, size, ids ** (size - 1), penalty, lengths)
        for row in range(4):
            candidates = {
                tuple(a): value / len(a) ** penalty
                for a, value in zip(answers, values[row], strict=True)
            }
            assert_best(found[row], model, candidates, (penalty, row))
            counts.add(len(unpadded(found[row], model)))
    assert model.training
    assert {1, size} <= counts, "answers that end at once, and some that are cut"


def by_hand(
    model: Any, source: Tensor, length: Tensor, size: int, beam: int, penalty: float
) -> dict[tuple[int, ...], float]:
    """All answers that a beam meets, to the last token."""
    ids, end = len(model.output_weight), model.special_tokens.end
    begun: list[list[int]] = [[]]
    met: dict[tuple[int, ...], float] = {}
    for n in range(1, size + 1):
        longer = [[*tokens, i] for tokens in begun for i in range(ids)]
        values = log_probs(model, source, longer, length)
        ranked = sorted(zip(values, longer, strict=True), reverse=True)
        for value, tokens in ranked[: 2 * beam]:
            if tokens[-1] == end or n == size:
                met[tuple(tokens)] = value / n**penalty
        begun = [tokens for _, tokens in ranked if tokens[-1] != end][:beam]
    return met


@pytest.mark.parametrize("name", ["seq2seq", "t5"])
def test_is_the_search_by_hand(name):
    """Stopping early and putting the cache in order change nothing."""
    model = model_of(name, seed=1)
    source, lengths = sources(3)
    for beam, penalty in ((1, 0.0), (2, 1.0), (3, 0.0), (3, 1.5)):
        found = model.beam_search(source, 7, beam, penalty, lengths)
        for row in range(3):
            met = by_hand(model, source[row], lengths[row], 7, beam, penalty)
            assert_best(found[row], model, met, (beam, penalty, row))


def test_a_cache_keeps_the_rows_that_go_on():
    cache = KeyValueCache(2, 3, 1, 4, 1, torch.empty(0))
    for new, _ in cache.extend(1):
        new.copy_(torch.arange(3.0).view(3, 1, 1, 1).expand_as(new))
    for _, known in cache.rows_of(torch.tensor([2, 0, 2, 1])).extend(1):
        assert known.shape == (2, 4, 1, 2, 1)
        assert known[:, :, 0, 0, 0].tolist() == [[2, 0, 2, 1]] * 2


@pytest.mark.parametrize("name", ["seq2seq", "t5"])
def test_is_no_less_likely_than_the_greedy_answer(name):
    model = model_of(name, seed=2)
    source, lengths = sources(30)
    greedy = model.generate(source, 9, temperature=0, lengths=lengths)
    gains = []
    for beam in (1, 4):
        found = model.beam_search(source, 9, beam, 0.0, lengths)
        for row in range(30):
            both = [unpadded(answers[row], model) for answers in (found, greedy)]
            better, worse = log_probs(model, source[row], both, lengths[row])
            assert better >= worse - 1e-5, (beam, row)
            gains.append(better - worse)
    assert max(gains) > 0.01, "or nothing was searched for"


def test_depends_on_the_source_alone():
    model = model_of("seq2seq", seed=3)
    source, lengths = sources(5)
    found = model.beam_search(source, 8, 3, lengths=lengths)
    assert torch.equal(model.beam_search(source, 8, 3, lengths=lengths), found)
    for row, length in enumerate(lengths):
        alone = model.beam_search(source[row : row + 1, :length], 8, 3)
        assert unpadded(alone[0], model) == unpadded(found[row], model)
    assert model.beam_search(source, 0, 3).shape == (5, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"beam_size": 0}, "beam_size"),
        ({"length_penalty": -1.0}, "length_penalty"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": math.inf}, "length_penalty"),
        ({"source": torch.zeros(2, 0, dtype=torch.int64)}, "source must be"),
    ],
)
def test_refuses(change, message):
    arguments = {"source": torch.zeros(2, 3, dtype=torch.int64), "max_new_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        model_of("seq2seq").beam_search(**arguments)


def test_says_that_logits_are_not_finite():
    model = model_of("seq2seq")
    with torch.no_grad():
        model.output_weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="expected finite logits"):
        model.beam_search(torch.zeros(1, 3, dtype=torch.int64), 3)
