"""Spans to be restored: what T5 is pretrained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batches import Batches, crops_of, draw, generator_of, windows_of

CORRUPTED_SHARE = 0.15
MEAN_SPAN = 3
SENTINELS = 100


class TextToTextTokens(NamedTuple):
    """Ids of what no tokenizer makes of a text; sentinel i is `sentinel` + i, of 100.

    `pad` stands before the first token of a target too.
    """

    pad: int
    end: int
    sentinel: int

    @classmethod
    def above(cls, vocab_size: int) -> TextToTextTokens:
        """Return the ids that follow a tokenizer's."""
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)

    @property
    def size(self) -> int:
        """How many ids there are, the tokenizer's included."""
        return self.sentinel + SENTINELS


def corrupt_spans(
    tokens: Tensor, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut spans out of each row, int64 [B, T]: 15% of the tokens, 3 to a span in the mean.

    In the source each span is replaced by a sentinel of its own, counted from 0; the target is each
    sentinel followed by its span. Both end with `end`. (Raffel et al. 2020,
    https://arxiv.org/abs/1910.10683, sections 3.1.4 and 3.3.4.) The lengths of the spans, and of
    what is between them, are any that add up, all equally likely. All rows have as many spans.

    Returns:
        source and target.

    Raises:
        ValueError: rows without tokens, or so long that there are more than 100 spans.
    """
    special = TextToTextTokens.above(vocab_size)
    B, T = tokens.shape
    noise = max(round(CORRUPTED_SHARE * T), 1)
    spans = max(round(noise / MEAN_SPAN), 1)
    if T < 1 or spans > SENTINELS:
        raise ValueError(
            f"a sequence of {T} tokens has {spans} spans; expected a length of 1 or more, "
            f"and at most {SENTINELS} spans"
        )
    # What is kept has a part before, between and after the spans, the first and the last of which
    # may be empty.
    kept = _parts(B, T - noise + 2, spans + 1, generator)
    kept[:, [0, -1]] -= 1
    cut = torch.nn.functional.pad(_parts(B, noise, spans, generator), (0, 1))
    lengths = torch.stack([kept, cut], -1).flatten()  # [B * (spans + 1) * 2]
    part = torch.arange(2 * (spans + 1)).repeat(B).repeat_interleave(lengths).view(B, T)
    is_cut = part % 2 == 1  # [B, T]
    is_first = part.diff(dim=1, prepend=part.new_zeros(B, 1)) != 0
    sentinel = special.sentinel + part // 2
    source = torch.where(is_cut, sentinel, tokens)[~is_cut | is_first].view(B, -1)
    target = torch.stack([sentinel, tokens], -1)[torch.stack([is_cut & is_first, is_cut], -1)]
    end = tokens.new_full((B, 1), special.end)
    return torch.cat([source, end], 1), torch.cat([target.view(B, -1), end], 1)


def _parts(rows: int, total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` lengths of at least 1 that add up to `total`, for each row; int64 [rows, count]."""
    cuts = torch.rand(rows, total - 1, generator=generator).topk(count - 1).indices + 1
    ends = torch.nn.functional.pad(cuts.sort(1).values, (0, 1), value=total)  # [rows, count]
    return ends.diff(dim=1, prepend=ends.new_zeros(rows, 1))


class SpanBatches(Batches):
    """Random crops of `sequence_length` tokens of a text, corrupted: (source, target) of
    `corrupt_spans`.

    Raises:
        InputError: fewer tokens than one sequence has.
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_size: int,
        sequence_length: int,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        self._crops = crops_of(tokens, sequence_length)
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.seed = seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(self.seed, step)
        crops = draw(self._crops, self.batch_size, generator)
        return corrupt_spans(crops, self.vocab_size, generator)


def corrupted_windows(
    tokens: Tensor, batch_size: int, sequence_length: int, vocab_size: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """All of a held-out text in batches of `corrupt_spans`, the same ones for the same seed.

    Raises:
        InputError: fewer tokens than one sequence has.
    """
    return [
        corrupt_spans(rows.long(), vocab_size, generator_of(seed, index))
        for index, rows in enumerate(windows_of(tokens, sequence_length).split(batch_size))
    ]
