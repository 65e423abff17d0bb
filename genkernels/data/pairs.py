"""Two texts a line: sources and their targets, or labels and what they are of."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .batches import Batches, generator_of
from .errors import InputError
from .masking import padded
from .spans import TextToTextTokens
from .text import load_text


def load_pairs(
    path: str | os.PathLike[str], first: str = "source", second: str = "target"
) -> list[tuple[str, str]]:
    """Read a UTF-8 file with two texts a line, a tab between them, cleaned by `clean_text`.

    Empty lines are passed over. `first` and `second` name the texts in messages.

    Raises:
        InputError: what `load_text` raises, or a line without one tab between two texts (names the
            line).
    """
    pairs = []
    for number, line in enumerate(load_text(path).split("\n"), start=1):
        if not line:
            continue
        columns = line.split("\t")
        if len(columns) != 2 or not columns[0].strip() or not columns[1].strip():
            found = f"{len(columns) - 1} tabs" if len(columns) != 2 else "an empty text"
            raise InputError(f"{path}: line {number}: {found}; expected {first}, one tab, {second}")
        pairs.append((columns[0], columns[1]))
    return pairs


class PairBatches(Batches):
    """Pairs drawn at random: (source, target, lengths).

    source is int64 [batch_size, S], padded to the longest, and lengths its rows' lengths; target is
    int64 [batch_size, T], with -100 after the end. Both end with `end`, and longer texts are cut to
    `sequence_length`, `end` included.

    Args:
        pairs: tokens of each source and target, int64 [N].

    Raises:
        InputError: no pairs.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        batch_size: int,
        sequence_length: int,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        if not len(pairs):
            raise InputError("no pairs to train on; expected at least one")
        self._special = TextToTextTokens.above(vocab_size)
        end = torch.tensor([self._special.end])
        self._pairs = [
            [torch.cat([tokens[: sequence_length - 1], end]) for tokens in pair] for pair in pairs
        ]
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = generator_of(self.seed, step)
        return self.rows(torch.randint(len(self), (self.batch_size,), generator=generator))

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch of these pairs, int64 [B]."""
        sources, targets = zip(*(self._pairs[i] for i in indices), strict=True)
        source, lengths = padded(sources, self._special.pad)
        return source, padded(targets, -100)[0], lengths
