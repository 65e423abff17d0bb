"""A hidden Markov model of tokens: a chain of states, each of which emits one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import check_sizes
from .sampling import CausalModel, sample_token

_TINY = torch.finfo(torch.float64).tiny
# Numbers of one array of all steps, 16 MB: more rows at once take more memory and are no faster.
_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class HMMConfig:
    """Sizes of an `HMM`: at most 1,000,000.

    Raises:
        ValueError: a size that is no int or out of range.
    """

    num_states: int
    vocab_size: int

    def __post_init__(self) -> None:
        check_sizes(self, "num_states", "vocab_size")


@dataclass(frozen=True)
class HMMCounts:
    """What an HMM is expected to have done in some sequences; those of batches add up.

    log_likelihood: ln P of the sequences, in nats.
    initial: [N] how often each state was the first.
    transition: [N, N] how often each state was followed by each.
    emission: [N, V] how often each state emitted each token.
    """

    log_likelihood: float
    initial: Tensor
    transition: Tensor
    emission: Tensor

    def __add__(self, other: HMMCounts) -> HMMCounts:
        return HMMCounts(
            self.log_likelihood + other.log_likelihood,
            self.initial + other.initial,
            self.transition + other.transition,
            self.emission + other.emission,
        )


class _Filtered(NamedTuple):
    """What the tokens so far tell of the states, at every step of a batch."""

    predicted: Tensor  # [T + 1, B, N] P(state | the tokens before it)
    states: Tensor  # [T, B, N] P(state | the tokens up to its own)
    log_prob: Tensor  # [T, B] ln P(token | the tokens before it)


class HMM(CausalModel):
    """Tokens that states emit; each state depends on the one before it alone.

    Equivalent to: `hmmlearn.hmm.CategoricalHMM(num_states)`, with `initial`, `transition` and
    `emission` for its `startprob_`, `transmat_` and `emissionprob_`.

    The parameters are probabilities in float64, whose rows sum to one: `initial` [N], `transition`
    [N, N] and `emission` [N, V]. They begin random, uniform among all distributions, and learn by
    `em_step` instead of gradients. Not their logarithms are kept, since a probability may be zero.

    All that is computed of sequences takes tokens, int64 [B, T], and optionally the `lengths`,
    int64 [B], of the rows; what stands beyond a length is not looked at. Time is O(B T N^2), in
    matrix products [B, N] x [N, N]: each step's probabilities are scaled to sum to one, and the
    sum of the scales' logarithms is the likelihood's. That is as exact as log-sum-exp, which takes
    N^2 exponentials for each token where this takes none, unless a state or a token is less likely
    than 1e-308 given those before it: it then counts as impossible.

    Source: L. R. Rabiner, "A tutorial on hidden Markov models and selected applications in speech
    recognition", 1989, equations 19 to 40, scaled as in section V.A.
    """

    name = "hmm"

    def __init__(self, config: HMMConfig) -> None:
        super().__init__()
        self.config = config
        self.initial = _random_distributions(config.num_states)
        self.transition = _random_distributions(config.num_states, config.num_states)
        self.emission = _random_distributions(config.num_states, config.vocab_size)

    @classmethod
    def from_probabilities(cls, initial: Tensor, transition: Tensor, emission: Tensor) -> HMM:
        """Return the model with these probabilities, [N], [N, N] and [N, V].

        Raises:
            ValueError: shapes that do not fit together, or a row that is no distribution.
        """
        if emission.dim() != 2:
            raise ValueError(f"emission must be [N, V], got {list(emission.shape)}")
        model = cls(HMMConfig(*emission.shape))
        given = {"initial": initial, "transition": transition, "emission": emission}
        for name, parameter in model.named_parameters():
            value = given[name].to(parameter.dtype)
            if value.shape != parameter.shape:
                expected = list(parameter.shape)
                raise ValueError(f"{name} must be {expected}, got {list(value.shape)}")
            if not (value >= 0).all() or not torch.allclose(value.sum(-1), value.new_ones(())):
                raise ValueError(f"{name} must have rows that are >= 0 and sum to 1")
            parameter.copy_(value)
        return model

    def log_likelihood(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return ln P of each token given those before it in its row, in nats, float64 [B, T].

        It is 0 beyond a length: the sum of a row is ln P of its sequence. From a token that is
        impossible onwards it is -inf.

        Raises:
            ValueError: no tokens, tokens outside the vocabulary, or lengths outside 1 to T.
        """
        steps, is_given = self._steps(tokens, lengths)
        return self._filter(steps, is_given).log_prob.T

    def posterior(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return P(state | all tokens of the row), float64 [B, T, N]; 0 beyond a length.

        Raises:
            ValueError: as `log_likelihood`, or a sequence that is impossible.
        """
        steps, is_given = self._steps(tokens, lengths)
        posterior, _ = self._smooth(self._filter(steps, is_given))
        return (posterior * is_given[..., None]).transpose(0, 1)

    def expected_counts(self, tokens: Tensor, lengths: Tensor | None = None) -> HMMCounts:
        """Return the expected counts (the E step), a few rows at a time.

        Raises:
            ValueError: as `log_likelihood`, or a sequence that is impossible.
        """
        steps, is_given = self._steps(tokens, lengths)
        rows = max(_AT_ONCE // (len(steps) * self.config.num_states), 1)
        counts = map(self._counts, steps.split(rows, 1), is_given.split(rows, 1))
        return sum(counts, start=next(counts))

    def maximize(self, counts: HMMCounts, pseudo_count: float = 0.0) -> None:
        """Set the probabilities to the shares of the counts (the M step).

        `pseudo_count` is added to each count: the estimate is then the most likely one under a
        Dirichlet prior of 1 + pseudo_count, and nothing is impossible. A row without any count
        stays as it is.

        Raises:
            ValueError: pseudo_count < 0.
        """
        if not pseudo_count >= 0:
            raise ValueError(f"pseudo_count must be >= 0, got {pseudo_count}")
        for name, parameter in self.named_parameters():
            count = getattr(counts, name) + pseudo_count
            total = count.sum(-1, keepdim=True)
            parameter.copy_(torch.where(total > 0, count / total, parameter))

    def em_step(
        self, tokens: Tensor, lengths: Tensor | None = None, pseudo_count: float = 0.0
    ) -> float:
        """Take one step of Baum-Welch; returns ln P of the sequences before it, in nats.

        Without a `pseudo_count` no step lowers it. More tokens than fit into memory at once are
        learned from by adding up `expected_counts` of batches, for one `maximize`.

        Raises:
            ValueError: as `expected_counts` and `maximize`.
        """
        counts = self.expected_counts(tokens, lengths)
        self.maximize(counts, pseudo_count)
        return counts.log_likelihood

    def viterbi(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the most likely states, int64 [B, T], and ln P of them and the tokens, [B].

        The states are -1 beyond a length. Those of a sequence that is impossible, whose ln P is
        -inf, mean nothing. Takes B N^2 additions for each step, in memory too, a few rows at a
        time.

        Raises:
            ValueError: as `log_likelihood`.
        """
        steps, is_given = self._steps(tokens, lengths)
        rows = max(
            _AT_ONCE // (max(len(steps), self.config.num_states) * self.config.num_states), 1
        )
        parts = map(self._best_path, steps.split(rows, 1), is_given.split(rows, 1))
        paths, log_prob = zip(*parts, strict=True)
        return torch.cat(paths, 1).masked_fill(~is_given, -1).T, torch.cat(log_prob)

    def sample(
        self, count: int, length: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw `count` sequences of `length` tokens; returns them and their states, int64 [B, T].

        The same generator state draws the same.

        Raises:
            ValueError: count or length < 1.
        """
        if count < 1 or length < 1:
            raise ValueError(f"count and length must be >= 1, got {count} and {length}")
        transition, emission = self.transition.log(), self.emission.log()
        logits = self.initial.log().expand(count, -1)  # [B, N]
        tokens, states = [], []
        for _ in range(length):
            state = sample_token(logits, generator=generator)  # [B, 1]
            tokens.append(sample_token(emission[state[:, 0]], generator=generator))
            states.append(state)
            logits = transition[state[:, 0]]
        return torch.cat(tokens, 1), torch.cat(states, 1)

    def forward(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map tokens, int64 [B, T], to ln P of each next one, [B, T, V], and the state behind them.

        `state`, float64 [B, N], is P(hidden state) at the first token, given what came before;
        `initial` by default.

        Raises:
            ValueError: as `log_likelihood`, or tokens that are impossible.
        """
        predicted = self._run(input, state)
        return (predicted @ self.emission).log().transpose(0, 1), predicted[-1]

    def log_prob(
        self, input: Tensor, target: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ln P(target) and the most likely tokens, both [B * T], and the state behind input.

        `target`, int64 [B, T], are the tokens that follow those of input.
        """
        logits, state = self(input, state)
        log_prob = logits.gather(-1, target[..., None])
        return log_prob.flatten(), logits.argmax(-1).flatten(), state

    def predict(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = self._run(tokens, state)[-1]
        return (state @ self.emission).log(), state

    def _run(self, tokens: Tensor, state: Tensor | None) -> Tensor:
        """P(next hidden state | tokens up to each), [T, B, N]."""
        filtered = self._filter(*self._steps(tokens, None), state)
        _check_possible(filtered)
        return filtered.predicted[1:]

    def _steps(self, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens with time first, 0 beyond the lengths, and where they are given, [T, B]."""
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens must be [B, T] with B, T >= 1, got {list(tokens.shape)}")
        rows, length = tokens.shape
        if lengths is None:
            lengths = tokens.new_full((rows,), length)
        elif lengths.shape != (rows,) or not ((lengths >= 1) & (lengths <= length)).all():
            raise ValueError(f"lengths must be {rows} ints from 1 to {length}, got {lengths}")
        is_given = torch.arange(length, device=tokens.device)[:, None] < lengths  # [T, B]
        steps = tokens.T.masked_fill(~is_given, 0)
        least, most = (int(extreme) for extreme in steps.aminmax())
        if least < 0 or most >= self.config.vocab_size:
            raise ValueError(
                f"tokens must be from 0 to {self.config.vocab_size - 1}, got {least} to {most}"
            )
        return steps, is_given

    def _filter(self, steps: Tensor, is_given: Tensor, state: Tensor | None = None) -> _Filtered:
        """The forward pass (Rabiner's equation 20, scaled). Beyond a length every state emits the
        token for sure: nothing is learned from it."""
        length, rows = steps.shape
        states = functional.embedding(steps, self.emission.T)  # [T, B, N]
        states.masked_fill_(~is_given[..., None], 1)
        predicted = states.new_empty(length + 1, *states.shape[1:])
        totals = states.new_empty(length, rows, 1)
        predicted[0] = self.initial if state is None else state
        for at, before, after, total in zip(
            states, predicted[:-1], predicted[1:], totals, strict=True
        ):
            torch.sum(at.mul_(before), -1, keepdim=True, out=total)
            torch.mm(at.div_(total + (total == 0)), self.transition, out=after)
            # What is left of a subnormal number has no digits, and its inverse may overflow.
            after.masked_fill_(after < _TINY, 0)
        return _Filtered(predicted, states, totals[..., 0].log().masked_fill_(~is_given, 0))

    def _smooth(self, filtered: _Filtered) -> tuple[Tensor, Tensor]:
        """P(state | all tokens) and its ratio to P(state | the tokens before it), both [T, B, N].

        The ratio is the scaled backward variable times the emission. From the posterior it is
        bounded, whereas the backward recursion alone overflows for states that are unreachable.
        (S. Särkkä, "Bayesian filtering and smoothing", 2013, theorem 8.1)
        """
        _check_possible(filtered)
        posterior = filtered.states.clone()
        ratio = torch.empty_like(posterior)
        for t in reversed(range(len(posterior))):
            at, before = posterior[t], filtered.predicted[t]  # [B, N]
            if t + 1 < len(posterior):
                at.mul_(ratio[t + 1] @ self.transition.T)
            torch.div(at, before + (before == 0), out=ratio[t])
        return posterior, ratio

    def _counts(self, steps: Tensor, is_given: Tensor) -> HMMCounts:
        filtered = self._filter(steps, is_given)
        posterior, ratio = self._smooth(filtered)
        posterior *= is_given[..., None]
        ratio *= is_given[..., None]
        before, after = filtered.states[:-1].flatten(0, 1), ratio[1:].flatten(0, 1)
        emission = torch.zeros_like(self.emission.T)  # [V, N]
        return HMMCounts(
            filtered.log_prob.sum().item(),
            posterior[0].sum(0),
            self.transition * (before.T @ after),
            emission.index_add_(0, steps.flatten(), posterior.flatten(0, 1)).T,
        )

    def _best_path(self, steps: Tensor, is_given: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely states, [T, B], and ln P of them and the tokens, [B]."""
        transition, emission = self.transition.log(), self.emission.T.log()
        score = self.initial.log() + emission[steps[0]]  # [B, N]
        stay = torch.arange(self.config.num_states, device=steps.device).expand_as(score)
        previous = []
        for step, is_more in zip(steps[1:], is_given[1:, :, None], strict=True):
            best, before = (score[:, :, None] + transition).max(1)  # [B, N]
            score = torch.where(is_more, best + emission[step], score)
            previous.append(torch.where(is_more, before, stay))
        log_prob, state = score.max(1, keepdim=True)  # [B, 1]
        path = [state]
        for before in reversed(previous):
            path.append(before.gather(1, path[-1]))
        return torch.cat(path[::-1], 1).T, log_prob[:, 0]


def _random_distributions(*shape: int) -> nn.Parameter:
    """Rows drawn from the flat Dirichlet distribution, float64."""
    weights = torch.empty(shape, dtype=torch.float64).exponential_()
    return nn.Parameter(weights / weights.sum(-1, keepdim=True), requires_grad=False)


def _check_possible(filtered: _Filtered) -> None:
    is_impossible = filtered.log_prob.isneginf()  # [T, B]
    if is_impossible.any():
        row, step = is_impossible.T.nonzero()[0].tolist()
        raise ValueError(
            f"token {step} of row {row} is impossible after those before it; "
            "expected a sequence that the model can emit"
        )
