"""The GRU encoder-decoder: one model on fused ops and in plain PyTorch, and as its paper has it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_checks import assert_same_model, perturb
from torch import Tensor

import genkernels
from genkernels.data import TextToTextTokens
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


@pytest.mark.parametrize("lengths", [[0, 1], [1, 6], [5], [[1, 2]]])
def test_refuses_lengths(lengths):
    source, target = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="lengths must be 2 numbers from 1 to 5"):
        small_model().loss(source, target, torch.tensor(lengths))
