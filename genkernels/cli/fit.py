"""The training loop with its display; any language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import genkernels

from ..training import Step, TrainingConfig, evaluate, train
from .report import TrainingDisplay, backend_names, calls_between

# In a run: often enough to draw a curve, seldom enough to cost about 1% of the time.
_EVALUATIONS = 20
_EVALUATION_STREAMS = 16


@dataclass
class History:
    """What a run did. Curves are (step, bits per byte); `calls` counts (op, backend)."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def fit(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    held_out: Tensor,
    byte_lengths: Tensor,
    config: TrainingConfig,
) -> History:
    """Train `model` on `batches`, and show how it does on held_out, int64 [N], now and then.

    An interrupt (Ctrl-C or SIGTERM) after the first step ends it and keeps the weights so far.
    """
    # Nats per token to bits per byte by the mean length of a token: exact for bytes, and over whole
    # epochs for other tokens.
    lengths = torch.cat([byte_lengths[target].flatten() for _, target in batches])
    bits = 1 / math.log(2) / lengths.double().mean().item()
    history = History()
    before = genkernels.stats()
    since_row: list[Step] = []
    last_row = 0
    with TrainingDisplay() as display:
        try:
            for step in train(model, batches, config):
                display.step(step)
                since_row.append(step)
                history.training.append((step.number, step.loss * bits))
                history.tokens += step.tokens
                history.seconds += step.seconds
                history.calls = calls_between(before, genkernels.stats())
                row = math.floor(step.progress * _EVALUATIONS + 1e-9)
                if row == last_row:
                    continue
                last_row = row
                loss = sum(s.loss for s in since_row) / len(since_row)
                seconds = sum(s.seconds for s in since_row)
                result = evaluate(model, held_out, byte_lengths, _EVALUATION_STREAMS)
                history.held_out.append((step.number, result.bits_per_byte))
                display.row(
                    step,
                    loss,
                    loss * bits,
                    result.bits_per_byte,
                    sum(s.tokens for s in since_row) / seconds,
                    backend_names(history.calls, "gru"),
                )
                since_row.clear()
        except KeyboardInterrupt:
            if not history.training:
                raise
            history.interrupted = True
    return history
