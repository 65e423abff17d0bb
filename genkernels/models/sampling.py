"""Drawing the next token, and one after another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .evaluating import evaluating


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits [B, V]; returns int64 [B, 1].

    `temperature` divides the logits; 0 takes the most likely token (greedy). `top_k` keeps only
    the k most likely tokens. Of those that are left, `top_p` keeps the fewest likeliest ones whose
    probabilities add up to it (the nucleus of Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751, section 3.1). The same generator state draws the same tokens.

    Raises:
        ValueError: temperature < 0, top_k < 1, or a top_p outside (0, 1].
        FloatingPointError: a row whose largest logit is not a finite number.
    """
    if not temperature >= 0:  # not a number is no temperature either
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    largest = check_finite(logits)  # [B, 1]
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)  # [B, 1]
    # Float64, from the maximum down: no temperature above 0 is too small to divide by. An infinite
    # one would make a logit of -inf NaN.
    logits = (logits.double() - largest) / min(temperature, sys.float_info.max)  # [B, V]
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    weights = logits.exp()  # [B, V]
    if top_p is not None and top_p < 1:
        ranked, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # [B, V] of those that are likelier
        ranked = ranked.masked_fill(before >= top_p * ranked.sum(-1, keepdim=True), 0)
        weights = torch.zeros_like(weights).scatter_(-1, order, ranked)
    # One uniform number for each row, where torch.multinomial draws V exponential ones. It is below
    # 1, and its product with the sum is below the sum even when rounded. The first token whose
    # partial sum exceeds the product has added to that sum: its probability is not zero.
    sums = weights.cumsum(-1)  # [B, V]
    uniform = torch.rand(
        (len(logits), 1), generator=generator, dtype=torch.float64, device=logits.device
    )
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)  # [B, 1]


def check_finite(logits: Tensor) -> Tensor:
    """Return the largest of each row, [B, 1]; raise a FloatingPointError where it is not a finite
    number."""
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise FloatingPointError("the largest logit is NaN or infinite; expected finite logits")
    return largest


@torch.no_grad()
def draw_tokens(
    model: nn.Module,
    predict: Callable[[Tensor, Any], tuple[Tensor, Any]],
    prompt: Tensor,
    state: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` tokens, int64 [B, 1], that continue `prompt`, int64 [B, P], each as
    soon as it is drawn, with `model` in evaluation mode.

    `predict` maps tokens and the state before them to logits [B, V] of the token after them and the
    state behind them; `state` is that before the prompt. Other arguments are those of
    `CausalModel.generate`.
    """
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be [B, P] with P >= 1, got {list(prompt.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    with evaluating(model):
        tokens, start = prompt, state
        for _ in range(max_new_tokens):
            logits, state = predict(tokens, state)
            token = sample_token(logits, temperature, top_k, top_p, generator)  # [B, 1]
            yield token
            if use_cache:
                tokens = token
            else:
                tokens, state = torch.cat([tokens, token], 1), start


class CausalModel(nn.Module):
    """A model that continues sequences of tokens; `predict` is what one has to define."""

    def predict(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits [B, V] of the token after `tokens`, int64 [B, N], and the state behind them.

        `tokens` follow those that led to `state`, which is used up; None is the beginning.
        """
        raise NotImplementedError

    def stream(
        self, prompt: Tensor, max_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield the tokens of `generate`, int64 [B, 1], each as soon as it is drawn."""
        return draw_tokens(self, self.predict, prompt, None, max_new_tokens, *args, **kwargs)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue each row of `prompt`, int64 [B, P]; returns [B, P + max_new_tokens].

        `temperature`, `top_k`, `top_p` and `generator` are those of `sample_token`. Dropout is off.
        Without the cache, which changes nothing but the time, all tokens are read again for each.

        Raises:
            ValueError: a prompt without tokens, or an argument out of range.
        """
        drawn = self.stream(prompt, max_new_tokens, temperature, top_k, top_p, generator, use_cache)
        return torch.cat([prompt, *drawn], dim=1)
