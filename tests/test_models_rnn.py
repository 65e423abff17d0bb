"""The recurrent language model, its sampling, and the Markov model that it is measured against."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
import torch

import genkernels
from genkernels.data import ByteTokenizer, load_text, sequence_batches
from genkernels.models import (
    MarkovConfig,
    MarkovModel,
    RNNConfig,
    RNNLanguageModel,
    sample_token,
)
from genkernels.training import TrainingConfig, evaluate, load_checkpoint, save_checkpoint, train

TORCH = {"gru": torch.nn.GRU, "tanh": torch.nn.RNN}
CELLS = pytest.mark.parametrize("cell", list(TORCH))


def small_model(num_layers: int = 1, dropout: float = 0.0, cell="gru") -> RNNLanguageModel:
    torch.manual_seed(0)
    return RNNLanguageModel(RNNConfig(30, 8, 16, num_layers, dropout, cell))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", 2.0),
        ("hidden_size", 10**30),
        ("num_layers", True),
        ("num_layers", 10**7),
        ("dropout", 1.0),
        ("cell", "lstm"),
        ("tie_weights", 1),
    ],
)
def test_config_refuses_sizes_that_are_none(field, value):
    sizes = {"vocab_size": 10, "embedding_dim": 4, "hidden_size": 4, field: value}
    with pytest.raises(ValueError, match=field):
        RNNConfig(**sizes)


@pytest.mark.parametrize("num_layers", [1, 2])
@CELLS
def test_is_the_model_on_torch(cell, num_layers):
    module = TORCH[cell]
    genkernels.stats(reset=True)
    model = small_model(num_layers, cell=cell)
    twin = RNNLanguageModel(model.config, gru=module)
    assert type(model.gru) is getattr(genkernels.nn, module.__name__)
    assert type(model.linear) is genkernels.nn.Linear
    assert type(twin.gru) is module
    assert type(twin.linear) is torch.nn.Linear
    assert model.state_dict().keys() == twin.state_dict().keys()
    twin.load_state_dict(model.state_dict())
    input = torch.randint(30, (3, 11))
    hx = torch.randn(num_layers, 3, 16)
    grads = []
    for m in (model, twin):
        logits, h_n = m(input, hx)
        assert logits.shape == (3, 11, 30)
        assert h_n.shape == (num_layers, 3, 16)
        logits.square().mean().backward()
        grads.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(model(input, hx), twin(input, hx))
    torch.testing.assert_close(*grads)
    calls = genkernels.stats(reset=True)  # linear leaves what records gradients to PyTorch
    assert {backend for op, backend in calls if op != "linear"} == {"cpp"}


def test_tied_weights_are_one_parameter(tmp_path):
    """Which learns from both ends what the same model in plain PyTorch does."""
    with pytest.raises(ValueError, match="embedding_dim must be hidden_size 16"):
        RNNConfig(30, 8, 16, tie_weights=True)
    torch.manual_seed(0)
    model = RNNLanguageModel(RNNConfig(256, 16, 16, tie_weights=True))
    torch.nn.init.normal_(model.bias)
    input, target = torch.randint(30, (2, 3, 11)).unbind()
    twins = []
    for twin in (model, RNNLanguageModel(model.config, gru=torch.nn.GRU)):
        twin.load_state_dict(model.state_dict())
        loss, _ = twin.loss(input, target)
        expected = torch.nn.functional.cross_entropy(twin(input)[0].flatten(0, 1), target.flatten())
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, [*twin.parameters()])
        torch.testing.assert_close(grads, torch.autograd.grad(expected, [*twin.parameters()]))
        twins.append(grads)
    torch.testing.assert_close(*twins)
    log_prob, prediction, _ = model.log_prob(input, target)
    torch.testing.assert_close(-log_prob.mean(), loss)
    assert torch.equal(prediction, model(input)[0].flatten(0, 1).argmax(1))
    rows = torch.full((16,), 7.0)
    with torch.no_grad():
        model.embedding.weight[3] = rows
    output, _ = model.gru(model.embedding(input))
    torch.testing.assert_close(model(input)[0][..., 3], output @ rows + model.bias[3])
    save_checkpoint(tmp_path, model, ByteTokenizer(), {})
    loaded = load_checkpoint(tmp_path).model
    assert torch.equal(loaded(input)[0], model(input)[0])


@CELLS
@pytest.mark.usefixtures("one_thread")
def test_trains_as_in_plain_pytorch(cell):
    text = ByteTokenizer().encode(load_text()[:50_000])
    batches = sequence_batches(text, 16, 32)
    config = TrainingConfig(learning_rate=1e-2, steps=30)
    sizes = RNNConfig(256, 32, 64, num_layers=2, cell=cell)
    curves = []
    genkernels.stats(reset=True)
    for module in (None, TORCH[cell]):
        torch.manual_seed(0)
        model = RNNLanguageModel(sizes, module)
        curves.append([step.loss for step in train(model, batches, config)])
        calls = genkernels.stats(reset=True)
        if module is None:
            op = {"gru": "gru", "tanh": "rnn"}[cell]
            assert calls[f"{op}_forward", "cpp"] == calls[f"{op}_backward", "cpp"] == 60
        else:
            assert not calls
    ours, theirs = curves
    assert ours[0] > 5
    assert ours[-1] < 3.7, "has to have learned something"
    assert ours == pytest.approx(theirs, rel=1e-3)


@CELLS
@pytest.mark.usefixtures("one_thread")
def test_recites_a_text_that_it_learned(cell):
    text = "the quick brown fox jumps over the lazy dog\n"
    tokens = ByteTokenizer().encode(text * 40)
    torch.manual_seed(0)
    model = RNNLanguageModel(RNNConfig(256, 16, 64, cell=cell))
    config = TrainingConfig(learning_rate=1e-2, steps=150)
    losses = [step.loss for step in train(model, sequence_batches(tokens, 8, 22), config)]
    assert losses[-1] < 0.2
    recited = model.generate(tokens[None, :10], 2 * len(text), temperature=0)
    assert torch.equal(recited[0], tokens[: recited.shape[1]])


@CELLS
def test_generation_runs_compiled_kernels(cell, compiled_only):
    model = small_model(cell=cell)
    model.generate(torch.randint(30, (2, 5)), 4)
    assert genkernels.stats()["linear_forward", "cpp"] == 4


@CELLS
def test_hidden_state_continues_the_text(cell):
    model = small_model(num_layers=2, cell=cell)
    input = torch.randint(30, (2, 10))
    whole, h_n = model(input)
    first, hx = model(input[:, :4])
    second, hx = model(input[:, 4:], hx)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(hx, h_n)


def test_dropout_is_for_training_only():
    model = small_model(dropout=0.5)
    input = torch.randint(30, (2, 10))
    assert not torch.equal(model(input)[0], model(input)[0])
    model.eval()
    assert torch.equal(model(input)[0], model(input)[0])


@CELLS
def test_greedy_generation_takes_the_likeliest_token_each_time(cell):
    model = small_model(num_layers=2, dropout=0.5, cell=cell)
    prompt = torch.randint(30, (3, 5))
    generated = model.generate(prompt, 7, temperature=0)
    assert model.training, "generate must leave the mode as it was"
    model.eval()
    expected = prompt
    for _ in range(7):  # from the first token each time, without a carried state
        expected = torch.cat([expected, model(expected)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)
    assert torch.equal(model.generate(prompt, 7, temperature=0.9, top_k=1), expected)
    assert torch.equal(model.generate(prompt, 7, temperature=0, use_cache=False), expected)
    assert torch.equal(model.generate(prompt, 0), prompt)


@CELLS
def test_generation_follows_its_generator(cell):
    model = small_model(cell=cell)
    prompt = torch.randint(30, (2, 1))
    first, again, other = (
        model.generate(prompt, 50, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": math.nan}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "prompt"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, "prompt"),
    ],
)
def test_generate_refuses(change, message):
    arguments = {"prompt": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        small_model().generate(**arguments)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_sampling_frequencies(temperature, top_k):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    expected = torch.softmax(logits[:top_k] / temperature, 0)
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(logits.expand(20_000, 5), temperature, top_k, generator=generator)
    frequencies = torch.bincount(drawn[:, 0], minlength=5) / 20_000
    torch.testing.assert_close(frequencies[: len(expected)], expected, atol=0.02, rtol=0)
    assert frequencies[len(expected) :].sum() == 0


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(None, 1.0, 4), (None, 0.85, 3), (None, 0.61, 2), (None, 1e-9, 1), (3, 0.95, 3), (3, 0.75, 2)],
)
def test_nucleus(top_k, top_p, kept):
    """The fewest likeliest tokens that add up to top_p; of [0.4, 0.3, 0.2, 0.1], or of the first
    three of them, 0.44, 0.33 and 0.22."""
    order = torch.tensor([2, 0, 3, 1])
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = torch.empty(4).index_copy_(0, order, p.log())
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(logits.expand(20_000, 4), 1.0, top_k, top_p, generator)
    frequencies = torch.bincount(drawn[:, 0], minlength=4)[order] / 20_000
    torch.testing.assert_close(frequencies[:kept], p[:kept] / p[:kept].sum(), atol=0.02, rtol=0)
    assert frequencies[kept:].sum() == 0


def test_rows_have_a_nucleus_each():
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1]])
    drawn = torch.cat([sample_token(logits, top_p=0.9) for _ in range(300)], 1)
    assert drawn[0].tolist() == [0] * 300
    assert drawn[1].unique().tolist() == [0, 1, 2, 3]


def test_sampling_follows_its_generator():
    logits = torch.randn(64, 1000)
    first, again, other = (
        sample_token(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (3.0, 2), (math.inf, None)])
def test_sampling_draws_no_token_of_probability_zero(monkeypatch, uniform, temperature, top_k):
    """Not at either end of what torch.rand draws, where sums are rounded."""
    monkeypatch.setattr(
        torch, "rand", lambda size, **_: torch.full(size, uniform, dtype=torch.float64)
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((200, 300), -math.inf)
    logits[:, 100:200] = torch.randn(200, 100, generator=generator)
    drawn = sample_token(logits, temperature, top_k)
    likeliest = logits >= logits.topk(top_k or 100).values[:, -1:]
    assert likeliest.gather(1, drawn).all()


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_sampling_refuses_logits_that_are_no_numbers(logit, temperature):
    with pytest.raises(FloatingPointError, match="largest logit"):
        sample_token(torch.tensor([[0.0, logit]]), temperature)


def test_every_temperature_can_be_divided_by():
    logits = torch.tensor([[1e4, 3.0, -1e4], [0.0, 1.0, 0.5]])
    for temperature in (5e-324, 1e-30, 1e-3):
        assert sample_token(logits, temperature).tolist() == [[0], [1]]
    assert sample_token(logits, math.inf, top_k=1).tolist() == [[0], [1]]


def bytes_of(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def kneser_ney(text: str, order: int):
    """Modified Kneser-Ney with dictionaries, as Chen and Goodman write it down."""
    counts = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(order + 3)]
    tables = []
    for n in range(1, order + 2):
        count = counts[n]
        if n <= order:
            count = Counter(gram[1:] for gram in counts[n + 1])  # different bytes in front
        n1, n2, n3, n4 = (sum(c == k for c in count.values()) for k in (1, 2, 3, 4))
        discount = [0, 0.5, 0.5, 0.5]
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            estimates = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            discount = [0, *(max(d, 0.1) for d in estimates)]
        followers = defaultdict(dict)
        for gram, c in count.items():
            followers[gram[:-1]][gram[-1]] = c
        tables.append((followers, discount))

    def probability(context: str, symbol: str) -> float:
        p = 1 / 256
        for n, (followers, discount) in enumerate(tables):
            known = followers.get(context[len(context) - n :]) if n <= len(context) else None
            if known:
                c = known.get(symbol, 0)
                freed = sum(discount[min(k, 3)] for k in known.values())
                p = (c - discount[min(c, 3)] + freed * p) / sum(known.values())
        return p

    return probability


@pytest.mark.parametrize("order", [0, 1, 3])
def test_markov_model_is_kneser_ney(order):
    text = load_text()[:8000].encode("ascii", "ignore").decode()
    test = "the class of objects; zip {that} quartz"
    probability = kneser_ney(text, order)
    expected = [probability(test[max(i - order, 0) : i], test[i]) for i in range(len(test))]
    model = MarkovModel(order).fit(bytes_of(text))
    actual = model.probabilities(bytes_of(test))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    bits = -sum(math.log2(p) for p in expected[1:]) / (len(test) - 1)
    assert model.bits_per_byte(bytes_of(test)) == pytest.approx(bits)


@pytest.mark.parametrize("text", ["the cat and the hat, the bat", "ab", "aaaa", "a"])
@pytest.mark.parametrize("context", ["the", "t", "zzz", "a"])
def test_markov_probabilities_sum_to_one(text, context):
    model = MarkovModel(order=3).fit(bytes_of(text))
    p = [model.probabilities(torch.tensor([*context.encode(), b]))[-1].item() for b in range(256)]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1)


@pytest.mark.parametrize("order", [-1, 7])
def test_markov_refuses_an_order(order):
    with pytest.raises(ValueError, match="order"):
        MarkovModel(order)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_markov_model_is_a_language_model(order):
    training, test = map(bytes_of, (load_text()[:8000], "the class of objects; zip {that} quartz"))
    model = MarkovModel(order).fit(training)
    p = model.probabilities(test)
    input, target = test[None, :-1], test[None, 1:]
    logits, state = model(input)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(input.shape, dtype=torch.float64))
    log_prob, prediction, _ = model.log_prob(input, target)
    torch.testing.assert_close(log_prob, p[1:].log())
    assert prediction.tolist() == logits[0].argmax(-1).tolist()
    _, before = model(input[:, :2])
    rest, after = model(input[:, 2:], before)
    torch.testing.assert_close(rest, logits[:, 2:])
    assert torch.equal(after, state)
    assert state.shape == (1, order)
    torch.testing.assert_close(model.predict(input)[0], logits[:, -1])
    rows = torch.stack([test, test.flip(0)])
    expected = torch.stack([model.probabilities(row) for row in rows])
    torch.testing.assert_close(model.probabilities(rows), expected)
    bits = evaluate(model, test, ByteTokenizer.byte_lengths).bits_per_byte
    assert bits == pytest.approx(model.bits_per_byte(test))


@pytest.mark.usefixtures("one_thread")
def test_markov_model_continues_a_prompt():
    model = MarkovModel(order=2).fit(bytes_of(load_text()[:8000]))
    prompt = bytes_of("the")[None].expand(1000, -1)

    def draw(seed: int, count: int, rows: int = 1000, **kwargs) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt[:rows], count, generator=generator, **kwargs)

    drawn = draw(0, 2)
    frequency = drawn[:, 3].bincount(minlength=256).double() / len(drawn)
    expected = model.predict(prompt[:1])[0][0].exp()
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.06)
    # The second byte, over all of the first.
    after = torch.cat([prompt[:1].expand(256, -1), torch.arange(256)[:, None]], 1)
    expected = expected @ model.predict(after)[0].exp()
    frequency = drawn[:, 4].bincount(minlength=256).double() / len(drawn)
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.06)
    text = draw(0, 40, rows=2)
    assert torch.equal(text, draw(0, 40, rows=2, use_cache=False))
    assert not torch.equal(text, draw(1, 40, rows=2))


def test_markov_checkpoint(tmp_path):
    model = MarkovModel(order=2).fit(bytes_of(load_text()[:3000]))
    save_checkpoint(tmp_path, model, ByteTokenizer(), {})
    loaded = load_checkpoint(tmp_path).model
    assert loaded.config == model.config
    test = bytes_of("the class of objects")
    assert torch.equal(loaded.probabilities(test), model.probabilities(test))


@pytest.mark.parametrize("sizes", [{"ngrams": [1, 2]}, {"contexts": [1, 1, -1, 1]}])
def test_markov_config_refuses_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        MarkovConfig(3, **sizes)
