"""Models that answer: an encoder reads the source, a decoder writes the target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import TextToTextTokens
from .evaluating import evaluating
from .sampling import check_finite, draw_tokens
from .transformer import Functions


class _Generation(NamedTuple):
    """A source that is answered, with what is known of it and of the answer after the first
    token."""

    source: Tensor
    lengths: Tensor | None
    capacity: int
    memory: list[Tensor] | None = None
    state: Any = None


class EncoderDecoder(nn.Module):
    """A model that predicts the tokens of a target from a source and the target's tokens before
    them; `encode`, `decode` and `output_weight` are what one has to define.

    Texts end with `end` of `special_tokens`. `lengths`, int64 [B], counts the tokens of each
    source; None: all.

    Raises:
        ValueError: in every method, a source that is not [B, S] with S >= 1.
    """

    functions: Functions
    special_tokens: TextToTextTokens

    @property
    def output_weight(self) -> Tensor:
        """Which makes logits of the decoder's outputs, [V, E]."""
        raise NotImplementedError

    def encode(self, source: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """What the decoder has to know of `source`, int64 [B, S]; each [B, ..]."""
        raise NotImplementedError

    def decode(
        self, input: Tensor, memory: list[Tensor], lengths: Tensor | None, state: Any = None
    ) -> tuple[Tensor, Any]:
        """The outputs, [B, T, E], of tokens, int64 [B, T], and the state behind them.

        They follow those that led to `state`, which is used up; None is the beginning.
        """
        raise NotImplementedError

    def first_state(self, batch_size: int, capacity: int) -> Any:
        """The state before at most `capacity` tokens that come one by one."""
        return None

    def rows_of(self, state: Any, rows: Tensor) -> Any:
        """The state of these rows, int64 [N]; `state` is used up."""
        return state[rows]

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map source, int64 [B, S], and target, int64 [B, T], to logits [B, T, V] of target's
        tokens, those of `special_tokens` among them."""
        return self.functions.linear(self._run(source, target, lengths), self.output_weight)

    def loss(
        self, source: Tensor, target: Tensor, lengths: Tensor | None = None, state: None = None
    ) -> tuple[Tensor, None]:
        """The mean cross-entropy, in nats, of target, int64 [B, T], but for -100 after the end of
        the shorter ones. The logits are not kept."""
        loss = self.functions.linear_cross_entropy(
            self._run(source, target, lengths).flatten(0, 1), self.output_weight, target.flatten()
        )
        return loss, None

    def log_prob(
        self, source: Tensor, target: Tensor, lengths: Tensor | None = None, state: None = None
    ) -> tuple[Tensor, Tensor, None]:
        """ln P(target), 0 where target is -100, and the most likely tokens, both [B * T]."""
        log_prob, prediction = self.functions.linear_log_prob(
            self._run(source, target, lengths).flatten(0, 1), self.output_weight, target.flatten()
        )
        return log_prob, prediction, None

    def stream(
        self,
        source: Tensor,
        max_new_tokens: int,
        *args: Any,
        lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield the tokens of `generate`, int64 [B, 1], each as soon as it is drawn."""
        pad, end, _ = self.special_tokens
        prompt = source.new_full((len(source), 1), pad)
        state = _Generation(source, lengths, max_new_tokens)
        ended = torch.zeros_like(prompt, dtype=torch.bool)
        for token in draw_tokens(
            self, self._predict, prompt, state, max_new_tokens, *args, **kwargs
        ):
            token = token.masked_fill(ended, pad)
            yield token
            ended |= token == end
            if ended.all():
                return

    def generate(
        self,
        source: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Answer each row of `source`, int64 [B, S]; returns [B, N], N at most `max_new_tokens`.

        A row goes up to its `end`, after which there is `pad`. `temperature`, `top_k`, `top_p` and
        `generator` are those of `sample_token`. Dropout is off. Without the cache, which changes
        nothing but the time, source and answer are read again for each token.

        Raises:
            ValueError: an argument out of range.
        """
        arguments = (temperature, top_k, top_p, generator, use_cache)
        drawn = self.stream(source, max_new_tokens, *arguments, lengths=lengths)
        return torch.cat([source.new_empty(len(source), 0), *drawn], dim=1)

    @torch.no_grad()
    def beam_search(
        self,
        source: Tensor,
        max_new_tokens: int,
        beam_size: int = 4,
        length_penalty: float = 1.0,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Answer each row of `source`, int64 [B, S], with the best answer that a beam finds;
        returns [B, N] as `generate` does.

        The best one has the highest ln P(answer) / n ** `length_penalty`, n its tokens, `end` or
        the cut after `max_new_tokens` included (0: the likeliest one; Wu et al. 2016,
        https://arxiv.org/abs/1609.08144, section 7, with n itself in the place of (5 + n) / 6). The
        `beam_size` likeliest beginnings go on each time, until none of them can become the best.
        The same source has the same answer. Dropout is off.

        Raises:
            ValueError: max_new_tokens or length_penalty < 0, or beam_size < 1.
            FloatingPointError: a row whose largest logit is not a finite number.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
        if beam_size < 1:
            raise ValueError(f"beam_size must be >= 1, got {beam_size}")
        if not 0 <= length_penalty < math.inf:
            raise ValueError(f"length_penalty must be >= 0 and finite, got {length_penalty}")
        B = len(source)
        pad, end, _ = self.special_tokens
        best = torch.full((B,), -math.inf, dtype=torch.float64, device=source.device)
        answer = source.new_full((B, max_new_tokens), pad)
        longest = 0
        begun = source.new_empty(B, 1, 0)  # [B, K, N], as many at first as there are tokens
        total = best.new_zeros(B, 1)  # [B, K], ln P
        token = source.new_full((B, 1), pad)
        known = _Generation(source, lengths, max_new_tokens)
        with evaluating(self):
            for length in range(1, max_new_tokens + 1):
                logits, known = self._predict(token, known)  # [B * K, V]
                check_finite(logits)
                K, V = total.shape[1], logits.shape[1]
                log_prob = logits.double().log_softmax(-1).view(B, K, V)
                candidates = (total[..., None] + log_prob).flatten(1)  # [B, K * V]
                # At most K of them end here, so that K others are among twice as many.
                total, place = candidates.topk(min(2 * beam_size, K * V))  # [B, C]
                row, last = place // V, place % V
                begun = torch.cat([_gathered(begun, row), last[..., None]], 2)  # [B, C, length]
                is_over = (last == end) | (length == max_new_tokens)
                score, which = (total / length**length_penalty).where(is_over, -math.inf).max(1)
                is_better = score > best
                best = torch.where(is_better, score, best)
                answer[is_better, :length] = begun[is_better, which[is_better]]
                longest = length if is_better.any() else longest
                total, order = total.masked_fill(is_over, -math.inf).topk(min(beam_size, K * V))
                # What follows makes them no likelier.
                if (best >= total[:, 0] / max_new_tokens**length_penalty).all():
                    break
                begun, token = _gathered(begun, order), last.gather(1, order).view(-1, 1)
                parents = row.gather(1, order) + torch.arange(0, B * K, K).to(row)[:, None]
                known = self._rows_of(known, parents.flatten())
        return answer[:, :longest]

    def _run(self, source: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
        # The token before each, which counts for nothing after the end.
        pad = self.special_tokens.pad
        input = nn.functional.pad(target[:, :-1], (1, 0), value=pad).clamp_min(0)
        return self.decode(input, self._memory(source, lengths), lengths)[0]

    def _memory(self, source: Tensor, lengths: Tensor | None) -> list[Tensor]:
        if source.dim() != 2 or source.shape[1] < 1:
            raise ValueError(f"source must be [B, S] with S >= 1, got {list(source.shape)}")
        return self.encode(source, lengths)

    def _predict(self, tokens: Tensor, known: _Generation) -> tuple[Tensor, _Generation]:
        memory, state = known.memory, known.state
        if memory is None:
            memory = self._memory(known.source, known.lengths)
            state = self.first_state(len(tokens), known.capacity)
        output, state = self.decode(tokens, memory, known.lengths, state)
        logits = self.functions.linear(output[:, -1], self.output_weight)
        return logits, known._replace(memory=memory, state=state)

    def _rows_of(self, known: _Generation, rows: Tensor) -> _Generation:
        return known._replace(
            lengths=None if known.lengths is None else known.lengths[rows],
            memory=[tensor[rows] for tensor in known.memory or []],
            state=self.rows_of(known.state, rows),
        )


def _gathered(begun: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, N] of each of `begun`, [B, K, T]; [B, N, T]."""
    return begun.gather(1, rows[..., None].expand(-1, -1, begun.shape[2]))
