"""Drawing the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits [B, V]; returns int64 [B, 1].

    `temperature` divides the logits; 0 takes the most likely token (greedy). `top_k` keeps only
    the k most likely tokens. The same generator state draws the same tokens.

    Raises:
        ValueError: temperature < 0 or top_k < 1.
        FloatingPointError: a row whose largest logit is not a finite number.
    """
    if not temperature >= 0:  # not a number is no temperature either
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    largest = logits.amax(-1, keepdim=True)  # [B, 1]
    if not largest.isfinite().all():
        raise FloatingPointError("the largest logit is NaN or infinite; expected finite logits")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)  # [B, 1]
    # Float64, from the maximum down: no temperature above 0 is too small to divide by.
    logits = (logits.double() - largest) / temperature  # [B, V]
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
