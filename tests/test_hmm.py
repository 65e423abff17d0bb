"""The hidden Markov model, against hmmlearn's, and against all of its states written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from genkernels.data import ByteTokenizer
from genkernels.models import HMM, HMMConfig
from genkernels.training import evaluate, load_checkpoint, save_checkpoint

CLOSE = {"rtol": 1e-6, "atol": 1e-9}

pytestmark = pytest.mark.usefixtures("one_thread")


def random_model(num_states: int, vocab_size: int, seed: int = 0) -> HMM:
    torch.manual_seed(seed)
    return HMM(HMMConfig(num_states, vocab_size))


def tensor(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hmmlearn_twin(model: HMM, **kwargs):
    hmm = pytest.importorskip("hmmlearn.hmm", reason="hmmlearn: not installed")
    n, v = model.emission.shape
    twin = hmm.CategoricalHMM(n, n_features=v, init_params="", tol=-math.inf, **kwargs)
    twin.startprob_, twin.transmat_, twin.emissionprob_ = (
        parameter.numpy().copy() for parameter in model.parameters()
    )
    return twin


def ragged(vocab_size: int, lengths: list[int], seed: int = 1):
    """Tokens, int64 [B, T], with some beyond the lengths that are none; and one after another."""
    torch.manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths)), -100)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(vocab_size, (length,))
    flat = torch.cat([row[:length] for row, length in zip(tokens, lengths, strict=True)])
    return tokens, torch.tensor(lengths), flat[:, None].numpy()


LENGTHS = [7, 1, 12, 30, 2]


@pytest.mark.parametrize(("num_states", "vocab_size"), [(1, 3), (4, 6), (7, 2)])
def test_is_hmmlearns(num_states, vocab_size):
    model = random_model(num_states, vocab_size)
    tokens, lengths, flat = ragged(vocab_size, LENGTHS)
    twin = hmmlearn_twin(model)
    log_likelihood, posterior = twin.score_samples(flat, LENGTHS)
    logs = model.log_likelihood(tokens, lengths)
    assert logs.shape == tokens.shape
    assert logs.sum().item() == pytest.approx(log_likelihood, rel=1e-6)
    ours = model.posterior(tokens, lengths)
    assert ours.shape == (*tokens.shape, num_states)
    is_given = tokens >= 0
    torch.testing.assert_close(ours[is_given], torch.from_numpy(posterior), **CLOSE)
    assert not ours[~is_given].any()
    assert not logs[~is_given].any()
    log_prob, states = twin.decode(flat, LENGTHS)
    paths, ours = model.viterbi(tokens, lengths)
    assert ours.sum().item() == pytest.approx(log_prob, rel=1e-6)
    assert paths[is_given].tolist() == states.tolist()
    assert (paths[~is_given] == -1).all()


@pytest.mark.parametrize("pseudo_count", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 6])
def test_em_is_hmmlearns(steps, pseudo_count):
    model = random_model(4, 6)
    tokens, lengths, flat = ragged(6, LENGTHS)
    prior = 1 + pseudo_count
    twin = hmmlearn_twin(
        model, n_iter=steps, startprob_prior=prior, transmat_prior=prior, emissionprob_prior=prior
    )
    log_likelihoods = [model.em_step(tokens, lengths, pseudo_count) for _ in range(steps)]
    twin.fit(flat, LENGTHS)
    for ours, theirs in zip(
        model.parameters(), (twin.startprob_, twin.transmat_, twin.emissionprob_), strict=True
    ):
        torch.testing.assert_close(ours.data, torch.from_numpy(theirs), **CLOSE)
    if not pseudo_count:  # else hmmlearn's has the prior in it
        assert log_likelihoods == pytest.approx(list(twin.monitor_.history)[-steps:], rel=1e-6)
        assert log_likelihoods == sorted(log_likelihoods)


def test_counts_of_batches_add_up(monkeypatch):
    tokens, lengths, _ = ragged(6, LENGTHS)
    whole, parts, rows = random_model(4, 6), random_model(4, 6), random_model(4, 6)
    log_likelihood = whole.em_step(tokens, lengths)
    counts = parts.expected_counts(tokens[:2], lengths[:2])
    counts += parts.expected_counts(tokens[2:], lengths[2:])
    parts.maximize(counts)
    paths, log_prob = rows.viterbi(tokens, lengths)
    monkeypatch.setattr("genkernels.models.hmm._AT_ONCE", 300)  # two rows
    assert rows.em_step(tokens, lengths) == pytest.approx(log_likelihood)
    assert counts.log_likelihood == pytest.approx(log_likelihood)
    assert counts.initial.sum().item() == pytest.approx(len(LENGTHS))
    assert counts.emission.sum().item() == pytest.approx(sum(LENGTHS))
    assert counts.transition.sum().item() == pytest.approx(sum(LENGTHS) - len(LENGTHS))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), parameter)
        torch.testing.assert_close(rows.get_parameter(name), parameter)
    again = random_model(4, 6).viterbi(tokens, lengths)
    torch.testing.assert_close(again, (paths, log_prob))


def enumerated(model: HMM, length: int) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """P(states, tokens) of all there are."""
    initial, transition, emission = (parameter.tolist() for parameter in model.parameters())
    table = {}
    for states in itertools.product(range(len(initial)), repeat=length):
        for tokens in itertools.product(range(len(emission[0])), repeat=length):
            p = initial[states[0]]
            for before, state in itertools.pairwise(states):
                p *= transition[before][state]
            for state, token in zip(states, tokens, strict=True):
                p *= emission[state][token]
            table[states, tokens] = p
    return table


def test_is_the_sum_over_all_states():
    model = random_model(3, 2)
    table = enumerated(model, 4)
    everything = torch.tensor(list(itertools.product(range(2), repeat=4)))
    logs = model.log_likelihood(everything)
    posterior = model.posterior(everything)
    paths, best = model.viterbi(everything)
    logits, _ = model(everything[:, :-1])
    for row, tokens in enumerate(map(tuple, everything.tolist())):
        joint = {states: p for (states, emitted), p in table.items() if emitted == tokens}
        total = sum(joint.values())
        assert logs[row].exp().prod().item() == pytest.approx(total)
        for t, state in itertools.product(range(4), range(3)):
            share = sum(p for states, p in joint.items() if states[t] == state)
            assert posterior[row, t, state].item() == pytest.approx(share / total)
        assert tuple(paths[row].tolist()) == max(joint, key=joint.__getitem__)
        assert best[row].exp().item() == pytest.approx(max(joint.values()))
        # Of the next token, given those before.
        assert logits[row, 2, tokens[3]].item() == pytest.approx(logs[row, 3].item())
    assert logs.sum(1).exp().sum().item() == pytest.approx(1)


def test_samples_have_the_distribution():
    model = random_model(3, 2)
    tokens, states = model.sample(40_000, 3, torch.Generator().manual_seed(0))
    assert tokens.dtype == states.dtype == torch.int64
    table = enumerated(model, 3)
    digits = torch.cat([states * 2 + tokens], 1) @ torch.tensor([36, 6, 1])
    frequency = digits.bincount(minlength=216) / len(digits)
    for (s, x), p in table.items():
        at = sum(weight * (2 * a + b) for weight, a, b in zip((36, 6, 1), s, x, strict=True))
        assert frequency[at].item() == pytest.approx(p, abs=5 * math.sqrt(p / len(digits)) + 1e-9)
    again = model.sample(40_000, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, (tokens, states))


def test_generation_has_the_distribution():
    model = random_model(3, 2)
    prompt = torch.tensor([[1, 0]]).expand(40_000, -1)
    drawn = model.generate(prompt, 2, generator=torch.Generator().manual_seed(0))
    frequency = (drawn[:, 2:] @ torch.tensor([2, 1])).bincount(minlength=4) / len(drawn)
    joint = [0.0] * 4
    for (_, tokens), p in enumerated(model, 4).items():
        if tokens[:2] == (1, 0):
            joint[2 * tokens[2] + tokens[3]] += p
    expected = tensor(*joint) / sum(joint)
    torch.testing.assert_close(frequency.double(), expected, rtol=0, atol=0.012)


def test_generation_is_that_of_the_seed():
    model = random_model(5, 12)
    prompt = torch.randint(12, (2, 6))

    def draw(seed: int, **kwargs) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 20, generator=generator, **kwargs).tolist()

    assert draw(0) == draw(0) != draw(1)
    assert draw(0) == draw(0, use_cache=False)
    streamed = list(model.stream(prompt, 20, generator=torch.Generator().manual_seed(0)))
    assert torch.cat([prompt, *streamed], 1).tolist() == draw(0)
    logits, _ = model.predict(prompt)
    assert [row[6] for row in draw(0, temperature=0)] == logits.argmax(-1).tolist()


def test_recovers_the_model_that_it_samples():
    truth = HMM.from_probabilities(
        tensor(0.7, 0.2, 0.1),
        tensor((0.8, 0.15, 0.05), (0.1, 0.7, 0.2), (0.25, 0.05, 0.7)),
        tensor((0.7, 0.1, 0.1, 0.1), (0.05, 0.8, 0.05, 0.1), (0.05, 0.05, 0.5, 0.4)),
    )
    tokens, _ = truth.sample(1000, 40, torch.Generator().manual_seed(0))

    def learn(model: HMM, steps: int) -> float:
        return [model.em_step(tokens) for _ in range(steps)][-1]

    # From where it begins EM climbs the nearest hill.
    models = [random_model(3, 4, seed) for seed in range(4)]
    model = max(models, key=lambda model: learn(model, 15))
    assert learn(model, 80) > truth.log_likelihood(tokens).sum().item()

    def distance(order: tuple[int, ...]) -> float:
        i = torch.tensor(order)
        pairs = [
            (model.initial[i], truth.initial),
            (model.transition[i][:, i], truth.transition),
            (model.emission[i], truth.emission),
        ]
        return max((ours - theirs).abs().max().item() for ours, theirs in pairs)

    assert min(map(distance, itertools.permutations(range(3)))) < 0.05


def left_to_right() -> HMM:
    """State 0, then 1, then 1 for ever; the third state, which would emit a 2 best, never."""
    return HMM.from_probabilities(
        tensor(1.0, 0.0, 0.0),
        tensor((0.5, 0.5, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        tensor((0.9, 0.1, 0.0, 0.0), (0.0, 0.999, 0.001, 0.0), (0.0, 0.0, 1.0, 0.0)),
    )


def test_zero_probabilities_stay_zero():
    model = left_to_right()
    # The backward variable of the third state grows by 1000 with every token.
    tokens = torch.tensor([[0] + [2] * 500])
    posterior = model.posterior(tokens)
    assert posterior[0, :2].tolist() == [[1, 0, 0], pytest.approx([0, 1, 0])]
    assert model.viterbi(tokens)[0].tolist() == [[0] + [1] * 500]
    expected = math.log(0.9 * 0.5) + 500 * math.log(0.001)
    assert model.log_likelihood(tokens).sum().item() == pytest.approx(expected)
    assert model.em_step(tokens) == pytest.approx(expected)
    assert model.transition.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert model.emission[:2].tolist() == [[1, 0, 0, 0], pytest.approx([0, 0, 1, 0])]
    assert model.emission[2].tolist() == [0, 0, 1, 0], "never seen, and left as it was"


def test_what_is_less_likely_than_float64_can_say_is_impossible():
    model = HMM.from_probabilities(
        tensor(1.0, 0.0), tensor((1.0, 1e-310), (0.0, 1.0)), tensor((1e-10, 1.0), (1.0, 0.0))
    )
    tokens = torch.zeros(1, 40, dtype=torch.int64)
    assert model.posterior(tokens)[0].tolist() == [[1, 0]] * 40
    assert model.log_likelihood(tokens).sum().item() == pytest.approx(40 * math.log(1e-10))
    assert model.expected_counts(tokens).transition.tolist() == [[pytest.approx(39), 0], [0, 0]]


@pytest.mark.parametrize(("tokens", "at"), [([0, 3, 1], 1), ([1, 2, 0], 2), ([2, 1, 1], 0)])
def test_impossible_sequences(tokens, at):
    model = left_to_right()
    batch = torch.tensor([[0, 1, 1], tokens])
    logs = model.log_likelihood(batch)
    assert logs[0].isfinite().all()
    assert logs[1].isneginf().tolist() == [step >= at for step in range(3)]
    _, log_prob = model.viterbi(batch)
    assert log_prob.isneginf().tolist() == [False, True]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for method in (model.posterior, model.expected_counts, model.em_step, model, model.predict):
        with pytest.raises(ValueError, match=f"token {at} of row 1 is impossible"):
            method(batch)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    # Beyond the length it is not there.
    lengths = torch.tensor([3, max(at, 1)])
    is_possible = at > 0
    assert model.log_likelihood(batch, lengths).isfinite().all().item() == is_possible


def test_a_pseudo_count_makes_everything_possible():
    model = left_to_right()
    model.em_step(torch.tensor([[0, 1, 1]]), pseudo_count=0.1)
    assert min(parameter.min().item() for parameter in model.parameters()) > 0
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.sum(-1), torch.ones_like(parameter[..., 0]))
    with pytest.raises(ValueError, match="pseudo_count"):
        model.em_step(torch.tensor([[0]]), pseudo_count=-0.1)


def test_one_token():
    model = random_model(3, 2)
    tokens = torch.tensor([[1]])
    joint = model.initial * model.emission[:, 1]
    assert model.log_likelihood(tokens).item() == pytest.approx(joint.sum().log().item())
    torch.testing.assert_close(model.posterior(tokens)[0, 0], joint / joint.sum())
    assert model.viterbi(tokens)[0].tolist() == [[joint.argmax().item()]]
    transition = model.transition.clone()
    model.em_step(tokens)
    assert torch.equal(model.transition, transition), "no step from state to state was seen"
    torch.testing.assert_close(model.initial.data, joint / joint.sum())


def test_reads_on_from_a_state():
    model = random_model(5, 12)
    tokens = torch.randint(12, (3, 11))
    whole, end = model(tokens)
    first, state = model(tokens[:, :4])
    second, last = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, end)
    logits, state = model.predict(tokens[:, 4:], state)
    torch.testing.assert_close(logits, whole[:, -1])
    torch.testing.assert_close(state, end)
    target = torch.randint(12, (3, 11))
    log_prob, prediction, _ = model.log_prob(tokens, target)
    both = torch.cat([tokens[:, :6], target[:, 5:6]], 1)
    expected = model.log_likelihood(both)[:, -1]
    torch.testing.assert_close(log_prob.view(3, 11)[:, 5], expected)
    assert prediction.tolist() == whole.flatten(0, 1).argmax(-1).tolist()


def test_is_measured_as_the_other_language_models():
    model = random_model(4, 256)
    tokens = torch.randint(256, (5000,))
    measured = evaluate(model, tokens, ByteTokenizer.byte_lengths)
    expected = -model.log_likelihood(tokens[None])[0, 1:].mean().item() / math.log(2)
    assert measured.bits_per_byte == pytest.approx(expected)


def test_checkpoint(tmp_path):
    model = random_model(4, 256)
    model.emission[:, 255] = 0
    save_checkpoint(tmp_path, model, ByteTokenizer(), {})
    loaded = load_checkpoint(tmp_path).model
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[0, 2]], None, "tokens must be from 0 to 1, got 0 to 2"),
        ([[-1, 1]], None, "tokens must be from 0 to 1, got -1 to 1"),
        ([0, 1], None, r"tokens must be \[B, T\]"),
        ([[]], None, r"tokens must be \[B, T\]"),
        ([[0, 1]], [0], "lengths must be 1 ints from 1 to 2"),
        ([[0, 1]], [3], "lengths must be 1 ints from 1 to 2"),
        ([[0, 1]], [1, 1], "lengths must be 1 ints from 1 to 2"),
    ],
)
def test_refuses_sequences_that_are_none(tokens, lengths, message):
    model = random_model(3, 2)
    arguments = [torch.tensor(tokens, dtype=torch.int64)]
    if lengths is not None:
        arguments.append(torch.tensor(lengths))
    for method in (model.log_likelihood, model.posterior, model.viterbi, model.em_step):
        with pytest.raises(ValueError, match=message):
            method(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": tensor(0.5, 0.4)}, "initial must have rows"),
        ({"initial": tensor(1.5, -0.5)}, "initial must have rows"),
        ({"initial": tensor(math.nan, 1.0)}, "initial must have rows"),
        ({"initial": tensor(1.0)}, r"initial must be \[2\], got \[1\]"),
        ({"transition": tensor((0.5, 0.5))}, r"transition must be \[2, 2\]"),
        ({"emission": tensor(0.5, 0.5)}, r"emission must be \[N, V\]"),
    ],
)
def test_refuses_probabilities_that_are_none(change, message):
    given = {
        "initial": tensor(0.5, 0.5),
        "transition": tensor((0.5, 0.5), (0.5, 0.5)),
        "emission": tensor((0.5, 0.5), (0.5, 0.5)),
    }
    HMM.from_probabilities(**given)
    with pytest.raises(ValueError, match=message):
        HMM.from_probabilities(**given | change)


@pytest.mark.parametrize(("field", "value"), [("num_states", 0), ("vocab_size", 2.0)])
def test_config_refuses_sizes_that_are_none(field, value):
    with pytest.raises(ValueError, match=field):
        HMMConfig(**{"num_states": 2, "vocab_size": 2, field: value})


def test_refuses_to_sample_nothing():
    with pytest.raises(ValueError, match="count and length"):
        random_model(2, 2).sample(0, 3)
