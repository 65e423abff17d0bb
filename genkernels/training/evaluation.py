"""How well a model predicts what is held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ..data import batchify
from ..models import evaluating

_TOKENS_AT_ONCE = 4096


class Measures(Protocol):
    """What an evaluation found, whatever the model."""

    @property
    def figure(self) -> float:
        """The one that training goes by; less is better."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the measures in words, `figure` first."""


class Evaluation(NamedTuple):
    """Measures over the predicted tokens.

    cross_entropy: mean -ln P(token), in nats per token.
    perplexity: exp(cross_entropy).
    bits_per_byte: -log2 P(text) over the UTF-8 bytes of the text, whatever the tokenizer.
    token_accuracy: share of the tokens that were the most likely one.
    tokens: how many were predicted.
    """

    cross_entropy: float
    perplexity: float
    bits_per_byte: float
    token_accuracy: float
    tokens: int

    @property
    def figure(self) -> float:
        """The one that training goes by; less is better."""
        return self.bits_per_byte

    def rows(self) -> list[tuple[str, str]]:
        """Return the measures in words, `figure` first."""
        return [
            ("bits per byte", f"{self.bits_per_byte:.4f}"),
            ("cross-entropy", f"{self.cross_entropy:.4f} nats per token"),
            ("perplexity", f"{self.perplexity:.3f}"),
            ("token accuracy", f"{self.token_accuracy:.2%} of {self.tokens:,} tokens"),
        ]


class TokenEvaluation(NamedTuple):
    """Measures over what is to be predicted: tokens that are hidden, those of answers, classes.

    cross_entropy: mean -ln P(target), in nats.
    accuracy: share of the targets that were the most likely one.
    exact: share of the rows all of whose targets were, which are those that a greedy answer would
        match; None where rows mean nothing.
    targets: how many there are.
    kind: what they are.
    """

    cross_entropy: float
    accuracy: float
    exact: float | None
    targets: int
    kind: str

    @property
    def figure(self) -> float:
        """The one that training goes by; less is better."""
        return self.cross_entropy

    def rows(self) -> list[tuple[str, str]]:
        """Return the measures in words, `figure` first."""
        return [
            ("cross-entropy", f"{self.cross_entropy:.4f} nats per {self.kind}"),
            ("accuracy", f"{self.accuracy:.2%} of {self.targets:,} {self.kind}s"),
            *([] if self.exact is None else [("exact match", f"{self.exact:.2%}")]),
        ]


class RowEvaluation(NamedTuple):
    """Measures over the rows of a table.

    bits_per_row: mean -log2 P(row).
    targets: how many there are.
    """

    bits_per_row: float
    targets: int

    @property
    def figure(self) -> float:
        """The one that training goes by; less is better."""
        return self.bits_per_row

    def rows(self) -> list[tuple[str, str]]:
        """Return the measures in words, `figure` first."""
        return [("bits per row", f"{self.bits_per_row:.4f}"), ("rows", f"{self.targets:,}")]


LogProb = Callable[..., tuple[Tensor, ...]]


@torch.no_grad()
def evaluate_batches(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    kind: str,
    log_prob: LogProb | None = None,
    has_rows: bool = False,
) -> TokenEvaluation:
    """Measure `model` on batches (input, target, ...) but for targets that are -100.

    `log_prob(model, *batch)` returns ln P(target) and the most likely ones, flat; the model's own
    by default. `kind` and `has_rows` are for `TokenEvaluation`.

    Raises:
        FloatingPointError: the cross-entropy is not a finite number.
    """
    nats, correct, exact, rows, count = 0.0, 0, 0, 0, 0
    with evaluating(model):
        for batch in batches:
            target = batch[1]
            logs, prediction, *_ = (log_prob or cast(Any, type(model)).log_prob)(model, *batch)
            is_meant = target != -100
            is_right = (prediction.view_as(target) == target) | ~is_meant
            nats -= logs.view_as(target)[is_meant].sum(dtype=torch.float64).item()
            correct += int(is_right[is_meant].sum())
            exact += int(is_right.view(len(target), -1).all(-1).sum())
            rows += len(target)
            count += int(is_meant.sum())
    return TokenEvaluation(
        _finite(nats / count), correct / count, exact / rows if has_rows else None, count, kind
    )


def _finite(cross_entropy: float) -> float:
    if not math.isfinite(cross_entropy):
        raise FloatingPointError(
            f"the cross-entropy is {cross_entropy}; expected a finite number "
            "(in training, a lower learning rate may help)"
        )
    return cross_entropy


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: Tensor, byte_lengths: Tensor, batch_size: int = 1
) -> Evaluation:
    """Measure `model` on tokens, int64 [N]: each but the first is predicted from those before it.

    `byte_lengths`, int64 [vocab_size], is the tokenizer's. With a `batch_size` above one the text
    is read as so many pieces side by side: faster, but each piece starts without its context. A
    model with a context_length reads windows of it, each of which starts without its context.

    Raises:
        ValueError: fewer than two tokens.
        FloatingPointError: the cross-entropy is not a finite number.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens must hold at least 2, got {len(tokens)}")
    nats, correct, count, length = 0.0, 0, 0, 0
    state: Any = None
    context_length = getattr(model.config, "context_length", None)
    with evaluating(model):
        for input, target in _pieces(tokens, batch_size, context_length):
            log_prob, prediction, state = cast(Any, model).log_prob(input, target, state)
            nats -= log_prob.sum(dtype=torch.float64).item()
            correct += int((prediction == target.flatten()).sum())
            count += target.numel()
            length += int(byte_lengths[target].sum())
    cross_entropy = _finite(nats / count)
    return Evaluation(
        cross_entropy,
        # A model worse than e^700 is past a float; say so instead of raising OverflowError.
        math.exp(cross_entropy) if cross_entropy < 700 else math.inf,
        nats / math.log(2) / length,
        correct / count,
        count,
    )


def _pieces(
    tokens: Tensor, batch_size: int, context_length: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input, target), both [B, T], that hold each token but the first as a target once.

    Without a `context_length` each piece continues the one before it.
    """
    if context_length is None:
        batch_size = min(batch_size, len(tokens) - 1)
        inputs, targets = batchify(tokens, batch_size)
        steps = max(_TOKENS_AT_ONCE // batch_size, 1)
        yield from zip(inputs.split(steps, dim=1), targets.split(steps, dim=1), strict=True)
        return
    windows = (len(tokens) - 1) // context_length
    whole = windows * context_length
    if windows:
        inputs, targets = batchify(tokens[: whole + 1], windows)
        rows = max(_TOKENS_AT_ONCE // context_length, 1)
        yield from zip(inputs.split(rows), targets.split(rows), strict=True)
    if whole < len(tokens) - 1:
        yield tokens[None, whole:-1], tokens[None, whole + 1 :]
