"""How well a language model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..data import batchify

_TOKENS_AT_ONCE = 4096


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

    def lines(self) -> Iterator[str]:
        """Yield the measures in words, `figure` first."""
        yield f"bits per byte   {self.bits_per_byte:.4f}"
        yield f"cross-entropy   {self.cross_entropy:.4f} nats per token"
        yield f"perplexity      {self.perplexity:.3f}"
        yield f"token accuracy  {self.token_accuracy:.2%} of {self.tokens:,} tokens"


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
    was_training = model.training
    model.eval()
    nats, correct, count, length = 0.0, 0, 0, 0
    state: Any = None
    context_length = getattr(model.config, "context_length", None)
    for input, target in _pieces(tokens, batch_size, context_length):
        log_prob, prediction, state = cast(Any, model).log_prob(input, target, state)
        nats -= log_prob.sum(dtype=torch.float64).item()
        correct += int((prediction == target.flatten()).sum())
        count += target.numel()
        length += int(byte_lengths[target].sum())
    model.train(was_training)
    cross_entropy = nats / count
    if not math.isfinite(cross_entropy):
        raise FloatingPointError(
            f"the cross-entropy is {cross_entropy}; expected a finite number "
            "(in training, a lower learning rate may help)"
        )
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
