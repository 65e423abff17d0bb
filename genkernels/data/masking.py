"""Masked tokens to be filled in, and sentences to be classified: what BERT trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batches import Batches, crops_of, draw, generator_of, windows_of
from .errors import InputError

MASKED_SHARE = 0.15


class SpecialTokens(NamedTuple):
    """Ids of what no tokenizer makes of a text."""

    pad: int
    mask: int
    cls: int
    sep: int

    @classmethod
    def above(cls, vocab_size: int) -> SpecialTokens:
        """Return the ids that follow a tokenizer's."""
        return cls(*range(vocab_size, vocab_size + 4))


def framed(tokens: Tensor, special: SpecialTokens) -> Tensor:
    """Put [CLS] before and [SEP] after tokens, [.., T]; returns [.., T + 2]."""
    return torch.nn.functional.pad(
        torch.nn.functional.pad(tokens, (1, 0), value=special.cls), (0, 1), value=special.sep
    )


def _unframed(sequence_length: int) -> int:
    """The length without [CLS] and [SEP]."""
    if sequence_length < 3:
        raise ValueError(
            f"sequence_length must be >= 3, [CLS] and [SEP] included, got {sequence_length}"
        )
    return sequence_length - 2


def mask_tokens(
    tokens: Tensor, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hide 15% of the tokens of each row, int64 [B, T], at least one.

    Of those 80% become [MASK], 10% any token, and 10% stay as they are (Devlin et al. 2018,
    https://arxiv.org/abs/1810.04805, section 3.1). Rows are framed by [CLS] and [SEP].

    Returns:
        input, and target, the hidden tokens and elsewhere -100; both [B, T + 2].
    """
    special = SpecialTokens.above(vocab_size)
    B, T = tokens.shape
    count = max(round(MASKED_SHARE * T), 1)
    places = torch.rand(B, T, generator=generator).topk(count).indices  # [B, count]
    hidden = tokens.gather(1, places)
    fate = torch.rand(B, count, generator=generator)
    random = torch.randint(vocab_size, (B, count), generator=generator)
    shown = torch.where(fate < 0.8, special.mask, torch.where(fate < 0.9, random, hidden))
    input = framed(tokens.scatter(1, places, shown), special)
    target = torch.full_like(input, -100).scatter_(1, places + 1, hidden)
    return input, target


class MaskedBatches(Batches):
    """Random crops of a text with hidden tokens: (input, target) of `mask_tokens`, both int64
    [batch_size, sequence_length], [CLS] and [SEP] included.

    Raises:
        InputError: fewer tokens than one sequence has.
        ValueError: a sequence_length below 3.
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_size: int,
        sequence_length: int,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        self._crops = crops_of(tokens, _unframed(sequence_length))
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.seed = seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(self.seed, step)
        crops = draw(self._crops, self.batch_size, generator)
        return mask_tokens(crops, self.vocab_size, generator)


def masked_windows(
    tokens: Tensor, batch_size: int, sequence_length: int, vocab_size: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """All of a held-out text in batches of `mask_tokens`, the same ones for the same seed.

    Raises:
        InputError: fewer tokens than one sequence has.
        ValueError: a sequence_length below 3.
    """
    return [
        mask_tokens(rows.long(), vocab_size, generator_of(seed, index))
        for index, rows in enumerate(
            windows_of(tokens, _unframed(sequence_length)).split(batch_size)
        )
    ]


class LabelledBatches(Batches):
    """Sentences drawn at random with their classes: (input, target, lengths).

    input is int64 [batch_size, T], framed by [CLS] and [SEP] and padded to the longest with [PAD];
    target, int64 [batch_size], are the classes and lengths what comes before [PAD]. A sentence is
    cut to `sequence_length` tokens, [CLS] and [SEP] included.

    Args:
        sentences: tokens of each, int64 [N].
        classes: int64 [len(sentences)].

    Raises:
        InputError: no sentences.
        ValueError: a sequence_length below 3.
    """

    def __init__(
        self,
        sentences: Sequence[Tensor],
        classes: Tensor,
        batch_size: int,
        sequence_length: int,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        if not len(sentences):
            raise InputError("no sentences to train on; expected at least one")
        self._special = SpecialTokens.above(vocab_size)
        self._sentences = [
            framed(sentence[: _unframed(sequence_length)], self._special) for sentence in sentences
        ]
        self._classes = classes
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self._sentences)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = generator_of(self.seed, step)
        return self.rows(torch.randint(len(self), (self.batch_size,), generator=generator))

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch of these sentences, int64 [B]."""
        input, lengths = padded([self._sentences[i] for i in indices], self._special.pad)
        return input, self._classes[indices], lengths


def padded(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one, [B, T], filled up with `value`; and their lengths, [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(list(rows), batch_first=True, padding_value=value), lengths
