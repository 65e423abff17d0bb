"""The GPT: the same on fused ops and in plain PyTorch, with the cache and without it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from model_checks import as_torch_layer, assert_same_model, perturb, training_losses

import genkernels
from genkernels.data import ByteTokenizer, CropBatches, InputError, load_text
from genkernels.models import GPT, GPTConfig

SMALL = GPTConfig(30, 12, num_layers=2, num_heads=4, embedding_dim=32)

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(config: GPTConfig = SMALL, fused: bool = True) -> GPT:
    torch.manual_seed(0)
    return GPT(config, fused)


@pytest.fixture(scope="module")
def text():
    return ByteTokenizer().encode(load_text()[:50_000])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("context_length", 10**7),
        ("num_layers", True),
        ("num_heads", 2.0),
        ("embedding_dim", 30),
        ("dropout", 1.0),
        ("bias", 1),
    ],
)
def test_config_refuses_sizes_that_are_none(field, value):
    sizes = {"vocab_size": 10, "context_length": 8, "num_layers": 1, "num_heads": 4}
    sizes |= {"embedding_dim": 32, field: value}
    with pytest.raises(ValueError, match=field):
        GPTConfig(**sizes)


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_model_in_plain_pytorch(bias):
    config = GPTConfig(30, 12, 2, 4, 32, bias=bias)
    model, twin = small_model(config), small_model(config, fused=False)
    assert any(name.endswith("bias") for name in model.state_dict()) == bias
    input, target = torch.randint(30, (2, 3, 11))
    target[0, :4] = -100
    assert_same_model(model, twin, input, target)
    assert model(input).shape == (3, 11, 30)
    torch.testing.assert_close(model(input), twin(input))


def test_is_gpt2_as_its_paper_writes_it():
    """With nothing but PyTorch's own modules: norm first, causal, tied embedding."""
    model = small_model()
    perturb(model, 0.3)
    input = torch.randint(30, (3, 12))
    x = model.token_embedding.weight[input] + model.position_embedding.weight
    mask = torch.full((12, 12), -math.inf).triu(1)
    for block in model.blocks:
        x = as_torch_layer(block, 32, 4, norm_first=True)(x, mask)
    expected = model.norm(x) @ model.token_embedding.weight.T
    torch.testing.assert_close(model(input), expected)


def test_initial_values_are_those_of_gpt2():
    model = GPT(GPTConfig(256, 64, num_layers=8, num_heads=4, embedding_dim=128))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            expected = 0.02 / 4 if name.endswith("projection.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.2 * expected
        else:
            assert torch.equal(p, torch.full_like(p, name.endswith("weight"))), name


def test_trains_as_in_plain_pytorch(text):
    config = GPTConfig(256, 128, num_layers=2, num_heads=4, embedding_dim=64)
    batches = CropBatches(text, 8, 128)
    curves = []
    genkernels.stats(reset=True)
    for fused in (True, False):
        model = small_model(config, fused)
        curves.append(training_losses(model, batches, 30, 2e-3))
        calls = genkernels.stats(reset=True)
        if fused:
            assert calls["attention_forward", "cpp"] == calls["attention_backward", "cpp"] == 60
            assert calls["linear_cross_entropy_pass", "cpp"] == 30
        else:
            assert not calls
    ours, theirs = curves
    assert ours[0] == pytest.approx(math.log(256), rel=0.01)
    assert ours[-1] < 3.5, "has to have learned something"
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_generation_runs_compiled_kernels(compiled_only):
    small_model().generate(torch.randint(30, (2, 5)), 3)
    calls = genkernels.stats()
    assert calls["attention_forward", "cpp"] == 3 * 2
    assert calls["linear_forward", "cpp"] == 3 * (4 * 2 + 1)


@pytest.mark.parametrize("fused", [True, False])
def test_cache_changes_no_token(fused):
    """Nor does it past the context, where the last tokens count as if they were the first."""
    model = small_model(fused=fused)
    with torch.no_grad():
        model.position_embedding.weight.mul_(20)  # what moves has to be seen
    torch.manual_seed(1)
    for batch, length, temperature in itertools.product((1, 3), (1, 5, 12, 17), (0, 2.0)):
        prompt = torch.randint(30, (batch, length))
        cached, plain = (
            model.generate(
                prompt, 20, temperature, generator=torch.Generator().manual_seed(1), use_cache=c
            )
            for c in (True, False)
        )
        assert cached.shape == (batch, length + 20)
        assert torch.equal(cached, plain), (batch, length, temperature)


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model = small_model(GPTConfig(30, 12, 2, 4, 32, dropout=0.5))
    prompt = torch.randint(30, (3, 5))
    generated = model.generate(prompt, 15, temperature=0)
    assert model.training, "generate must leave the mode as it was"
    model.eval()
    expected = prompt
    for _ in range(15):
        expected = torch.cat([expected, model(expected[:, -12:])[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_several_tokens_may_follow_a_state():
    model = small_model().eval()
    tokens = torch.randint(30, (2, 11))
    _, state = model.predict(tokens[:, :4])
    for end in (5, 8, 11):
        known = state.tokens.shape[1]
        logits, state = model.predict(tokens[:, known:end], state)
        torch.testing.assert_close(logits, model(tokens[:, :end])[:, -1])


def test_streams_what_it_generates():
    model = small_model()
    prompt = torch.randint(30, (2, 3))
    stream = model.stream(prompt, 6, 1.5, top_k=9, generator=torch.Generator().manual_seed(3))
    first = next(stream)
    assert first.shape == (2, 1)
    assert not model.training
    tokens = torch.cat([prompt, first, *stream], 1)
    assert model.training
    arguments = {"temperature": 1.5, "top_k": 9, "generator": torch.Generator().manual_seed(3)}
    assert torch.equal(model.generate(prompt, 6, **arguments), tokens)
    stream = model.stream(prompt, 6)
    next(stream)
    stream.close()
    assert model.training, "also where nobody listens to the end"


def test_dropout_is_for_training_only():
    model = small_model(GPTConfig(30, 12, 2, 4, 32, dropout=0.5))
    input = torch.randint(30, (2, 10))
    assert not torch.equal(model(input), model(input))
    model.eval()
    assert torch.equal(model(input), model(input))


def test_dropout_is_that_of_plain_pytorch_in_the_mean():
    """And in the variance; for the same seed it drops others."""
    config = GPTConfig(30, 12, 2, 4, 32, dropout=0.2)
    model, twin = small_model(config), small_model(config, fused=False)
    perturb(model, 0.1)
    twin.load_state_dict(model.state_dict())
    input = torch.randint(30, (16, 12))
    genkernels.stats(reset=True)
    with torch.no_grad():
        ours, theirs = (torch.stack([m(input) for _ in range(100)]) for m in (model, twin))
    assert genkernels.stats()["dropout", "cpp"] == 100 * (1 + 2 * 2)
    variance = theirs.var(0).mean().item()
    assert ours.var(0).mean().item() == pytest.approx(variance, rel=0.03)
    noise = (ours.mean(0) - theirs.mean(0)).square().mean().item()
    assert noise == pytest.approx(2 * variance / 100, rel=0.2)


def test_log_prob_is_that_of_the_logits():
    model = small_model().eval()
    input, target = torch.randint(30, (2, 3, 12))
    target[1, 3:5] = -100
    log_prob, prediction, state = model.log_prob(input, target)
    logits = model(input).flatten(0, 1)
    torch.testing.assert_close(
        log_prob, -F.cross_entropy(logits, target.flatten(), reduction="none")
    )
    assert torch.equal(prediction, logits.argmax(-1))
    assert state is None
    assert log_prob.view(3, 12)[1, 3:5].tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(2, 13), (2, 0), (5,)])
def test_refuses_an_input(shape):
    model = small_model()
    input = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="from 1 to context_length 12"):
        model(input)
    with pytest.raises(ValueError, match="context_length 12"):
        model.loss(input, input)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "prompt"),
    ],
)
def test_generate_refuses(change, message):
    arguments = {"prompt": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        small_model().generate(**arguments)


def test_crops_are_a_function_of_seed_and_step():
    tokens = torch.arange(1000)
    batches = CropBatches(tokens, 64, 10, seed=3)
    input, target = batches.batch(7)
    assert input.shape == target.shape == (64, 10)
    assert torch.equal(target, input + 1)
    assert torch.equal(input, input[:, :1] + torch.arange(10))
    assert torch.equal(CropBatches(tokens, 64, 10, seed=3).batch(7)[0], input)
    assert not torch.equal(batches.batch(8)[0], input)
    assert not torch.equal(CropBatches(tokens, 64, 10, seed=2**32 + 3).batch(7)[0], input)
    assert not batches.continues(1)
    starts = torch.cat([batches.batch(step)[0][:, 0] for step in range(500)])
    assert starts.min() == 0
    assert starts.max() == 989
    assert starts.double().mean().item() == pytest.approx(989 / 2, rel=0.02)
    input.zero_()
    assert torch.equal(tokens, torch.arange(1000)), "a copy"


def test_refuses_a_text_shorter_than_one_crop():
    assert CropBatches(torch.arange(17), 2, 16).batch(0)[0].shape == (2, 16)
    with pytest.raises(InputError, match="16 tokens; expected at least 17"):
        CropBatches(torch.arange(16), 2, 16)
