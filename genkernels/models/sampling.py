"""Drawing the next token."""

from __future__ import annotations

import sys

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
    # Float64, from the maximum down: no temperature above 0 is too small to divide by. An infinite
    # one would make a logit of -inf NaN.
    logits = (logits.double() - largest) / min(temperature, sys.float_info.max)  # [B, V]
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    # One uniform number for each row, where torch.multinomial draws V exponential ones. It is below
    # 1, and its product with the sum is below the sum even when rounded. The first token whose
    # partial sum exceeds the product has added to that sum: its probability is not zero.
    sums = logits.exp().cumsum(-1)  # [B, V]
    uniform = torch.rand(
        (len(logits), 1), generator=generator, dtype=torch.float64, device=logits.device
    )
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)  # [B, 1]
