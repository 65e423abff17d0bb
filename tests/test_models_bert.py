"""BERT: the same on fused ops and in plain PyTorch, its masks, and what it fills in."""

from __future__ import annotations

import math

import pytest
import torch
from model_checks import as_torch_layer, assert_same_model, perturb, training_losses

import genkernels
from genkernels.data import (
    ByteTokenizer,
    InputError,
    LabelledBatches,
    MaskedBatches,
    SpecialTokens,
    framed,
    load_text,
    mask_tokens,
    masked_windows,
)
from genkernels.models import BERT, BERTConfig

SMALL = BERTConfig(30, 12, num_layers=2, num_heads=4, embedding_dim=32, num_classes=3)
SPECIAL = SpecialTokens.above(30)

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(config: BERTConfig = SMALL, fused: bool = True) -> BERT:
    torch.manual_seed(0)
    return BERT(config, fused)


@pytest.mark.parametrize(("field", "value"), [("num_heads", 3), ("num_classes", 0)])
def test_config_refuses_sizes_that_are_none(field, value):
    sizes = {"vocab_size": 10, "context_length": 8, "num_layers": 1, "num_heads": 4}
    sizes |= {"embedding_dim": 32, field: value}
    with pytest.raises(ValueError, match=field):
        BERTConfig(**sizes)


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_model_in_plain_pytorch(bias):
    config = BERTConfig(30, 12, 2, 4, 32, bias=bias)
    model, twin = small_model(config), small_model(config, fused=False)
    input, target = mask_tokens(torch.randint(30, (3, 10)), 30, torch.Generator().manual_seed(0))
    assert any(name.endswith("bias") for name in model.state_dict()) == bias
    assert_same_model(model, twin, input, target, lengths=torch.tensor([12, 12, 12]))
    assert model(input).shape == (3, 12, 30)
    torch.testing.assert_close(model(input), twin(input))


def test_classes_are_the_same_in_plain_pytorch():
    model, twin = small_model(), small_model(fused=False)
    for m in (model, twin):  # what a sentence's class does not depend on
        m.transform.requires_grad_(False)
        m.transform_norm.requires_grad_(False)
        m.output_bias.requires_grad_(False)
    input, lengths = torch.randint(30, (5, 9)), torch.tensor([9, 1, 4, 9, 2])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for m in (model, twin):
        m.loss(input, torch.tensor([0, 2, 1, 1, 0]), lengths)[0].backward()
    for name, p in model.named_parameters():
        if name in trained:
            torch.testing.assert_close(p.grad, twin.get_parameter(name).grad)
    assert model.classify(input, lengths).shape == (5, 3)


def test_is_bert_as_its_paper_writes_it():
    """With nothing but PyTorch's own modules: norm last, padding hidden, tied embedding."""
    model = small_model().eval()
    perturb(model, 0.3)
    input, lengths = torch.randint(34, (3, 12)), torch.tensor([12, 5, 8])
    hidden = torch.arange(12) >= lengths[:, None]
    x = model.norm(model.token_embedding(input) + model.position_embedding.weight)
    for block in model.blocks:
        layer = as_torch_layer(block, 32, 4, norm_first=False)  # in training mode: no fast path
        x = layer(x, src_key_padding_mask=hidden)
    y = model.transform_norm(torch.nn.functional.gelu(model.transform(x)))
    expected = y @ model.token_embedding.weight[:30].T + model.output_bias
    actual = model(input, lengths)
    torch.testing.assert_close(actual[~hidden], expected[~hidden])
    torch.testing.assert_close(
        model.classify(input, lengths), model.classifier(model.pooler(x[:, 0]).tanh())
    )


def test_what_is_padded_changes_nothing():
    model = small_model().eval()
    alone = torch.randint(30, (1, 6))
    beside = torch.cat([alone, torch.randint(34, (1, 6))], 1)
    lengths = torch.tensor([6])
    torch.testing.assert_close(model(beside, lengths)[:, :6], model(alone))
    torch.testing.assert_close(model.classify(beside, lengths), model.classify(alone))
    assert not torch.allclose(model(beside)[:, :6], model(alone))


def test_trains_as_in_plain_pytorch():
    text = ByteTokenizer().encode(load_text()[:50_000])
    config = BERTConfig(256, 128, num_layers=2, num_heads=4, embedding_dim=64)
    batches = MaskedBatches(text, 20, 128, 256)
    genkernels.stats(reset=True)
    ours = training_losses(small_model(config), batches, 30, 2e-3)
    calls = genkernels.stats(reset=True)
    assert calls["attention_forward", "cpp"] == calls["attention_backward", "cpp"] == 60
    assert not any("attention" in op for op, backend in calls if backend == "reference")
    theirs = training_losses(small_model(config, fused=False), batches, 30, 2e-3)
    assert not genkernels.stats()
    assert ours[0] == pytest.approx(math.log(256), rel=0.03)
    assert ours[-1] < 3.7, "has to have learned something"
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_learns_classes():
    torch.manual_seed(0)
    sentences = [torch.randint(29, (n,)) for n in (3, 9, 5, 10, 7, 4) for _ in range(8)]
    classes = torch.arange(48) % 2
    for sentence, label in zip(sentences, classes, strict=True):
        sentence[len(sentence) // 2] = 29 if label else 28  # by which it is told
        sentence[sentence == 29 - label.item()] = 0
    batches = LabelledBatches(sentences, classes, 16, 12, 30)
    model = small_model(BERTConfig(30, 12, 1, 4, 32, num_classes=2))
    losses = training_losses(model, batches, 60, 3e-3)
    assert losses[0] == pytest.approx(math.log(2), rel=0.1)
    input, target, lengths = batches.rows(torch.arange(48))
    assert (model.classify(input, lengths).argmax(-1) == target).float().mean() > 0.9
    with pytest.raises(ValueError, match="num_classes is None"):
        small_model(BERTConfig(30, 12, 1, 4, 32)).classify(input, lengths)


def test_fills_masks():
    model = small_model(BERTConfig(30, 12, 2, 4, 32, dropout=0.5))
    input = torch.randint(30, (2, 10))
    input[0, 3] = input[1, 0] = input[1, 7] = SPECIAL.mask
    filled = model.fill_mask(input, k=4)
    assert model.training
    model.eval()
    p = model(input)[input == SPECIAL.mask].softmax(-1)
    assert filled.probability.shape == filled.token.shape == (3, 4)
    torch.testing.assert_close(filled.probability, p.topk(4).values)
    assert torch.equal(filled.token, p.topk(4).indices)
    positions = torch.zeros(2, 10, dtype=torch.bool)
    positions[0, 5] = True
    assert model.fill_mask(input, 1, positions).token.shape == (4, 1)
    lengths = torch.tensor([10, 8])
    torch.testing.assert_close(
        model.fill_mask(input, 30, lengths=lengths).probability[2].sort().values,
        model(input, lengths)[1, 7].softmax(-1).sort().values,
    )
    for k in (0, 31):
        with pytest.raises(ValueError, match="k must be from 1 to vocab_size 30"):
            model.fill_mask(input, k)


def test_log_prob_is_that_of_the_logits():
    model = small_model().eval()
    input, target = mask_tokens(torch.randint(30, (3, 10)), 30, torch.Generator().manual_seed(0))
    log_prob, prediction, state = model.log_prob(input, target)
    logits = model(input).flatten(0, 1)
    assert torch.equal(prediction, logits.argmax(-1))
    assert state is None
    hidden = target.flatten() != -100
    assert not log_prob[~hidden].any()
    torch.testing.assert_close(-log_prob.sum() / hidden.sum(), model.loss(input, target)[0])


@pytest.mark.parametrize("shape", [(2, 13), (5,)])
def test_refuses_an_input(shape):
    with pytest.raises(ValueError, match="from 1 to context_length 12"):
        small_model()(torch.zeros(shape, dtype=torch.int64))


def test_masks_15_percent_80_10_10():
    tokens = torch.randint(30, (500, 100))
    input, target = mask_tokens(tokens, 30, torch.Generator().manual_seed(0))
    assert input[:, 0].unique().tolist() == [SPECIAL.cls]
    assert input[:, -1].unique().tolist() == [SPECIAL.sep]
    assert (target[:, [0, -1]] == -100).all()
    input, target = input[:, 1:-1], target[:, 1:-1]
    hidden = target != -100
    assert (hidden.sum(1) == 15).all()
    assert torch.equal(target[hidden], tokens[hidden])
    assert torch.equal(input[~hidden], tokens[~hidden])
    masked = input[hidden] == SPECIAL.mask
    kept = input[hidden] == tokens[hidden]
    other = input[hidden][~masked & ~kept]
    assert masked.double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.double().mean().item() == pytest.approx(0.1 + 0.1 / 30, abs=0.015)
    assert torch.equal(other.unique(), torch.arange(30))
    places = hidden.double().mean(0)
    assert places.min() > 0.09
    assert places.max() < 0.22
    assert (mask_tokens(tokens[:, :2], 30, torch.Generator())[1] != -100).sum(1).eq(1).all()


def test_masked_batches_are_a_function_of_seed_and_step():
    tokens = torch.arange(1000)
    batches = MaskedBatches(tokens, 6, 12, 1000, seed=3)
    input, target = batches.batch(5)
    assert input.shape == target.shape == (6, 12)
    for other, is_same in ((3, True), (4, False)):
        again = MaskedBatches(tokens, 6, 12, 1000, other).batch(5)
        assert (
            all(torch.equal(a, b) for a, b in zip(again, (input, target), strict=True)) == is_same
        )
    assert not torch.equal(batches.batch(6)[0], input)


def test_windows_read_the_whole_text():
    windows = masked_windows(torch.arange(107), 4, 12, 200)
    assert [len(input) for input, _ in windows] == [4, 4, 2]
    tokens = torch.cat([torch.where(target == -100, input, target) for input, target in windows])
    assert torch.equal(tokens[:, 1:-1].flatten(), torch.arange(100))
    again = masked_windows(torch.arange(107), 4, 12, 200)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(windows, again, strict=True))
    assert not torch.equal(windows[0][1] == -100, windows[1][1] == -100)
    for refuse in (masked_windows, MaskedBatches):
        with pytest.raises(InputError, match="9 tokens; expected at least 10"):
            refuse(torch.arange(9), 4, 12, 200)
        with pytest.raises(ValueError, match="sequence_length must be >= 3"):
            refuse(torch.arange(9), 4, 2, 200)


def test_labelled_batches_are_framed_and_padded():
    sentences = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.arange(20)]
    batches = LabelledBatches(sentences, torch.tensor([0, 1, 2]), 8, 12, 30)
    input, target, lengths = batches.rows(torch.tensor([1, 0]))
    pad, _, cls, sep = SPECIAL
    assert input.tolist() == [[cls, 4, sep, pad, pad], [cls, 1, 2, 3, sep]]
    assert target.tolist() == [1, 0]
    assert lengths.tolist() == [3, 5]
    assert torch.equal(batches.rows(torch.tensor([2]))[0], framed(torch.arange(10), SPECIAL)[None])
    drawn = batches.batch(3)
    assert len(drawn[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(drawn, batches.batch(3), strict=True))
    with pytest.raises(InputError, match="no sentences"):
        LabelledBatches([], torch.tensor([]), 8, 12, 30)
