"""Batches for truncated backpropagation through time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from .errors import InputError


class SequenceBatches(Sequence[tuple[Tensor, Tensor]]):
    """The batches of one epoch, each of which continues the one before it; then they start over.

    `inputs` and `targets`, [B, L], are cut into `count` parts as `tensor_split(count, dim=1)` cuts
    them, but each when it is asked for: of a mapped file there may be millions. They are int64.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, count: int) -> None:
        self._inputs = inputs
        self._targets = targets
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tensor, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        part = range(len(self))[index]
        length, longer = divmod(self._inputs.shape[1], self._count)
        begin, end = (i * length + min(i, longer) for i in (part, part + 1))
        return self._inputs[:, begin:end].long(), self._targets[:, begin:end].long()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self[step % len(self)]

    def continues(self, step: int) -> bool:
        return step % len(self) > 0


def batchify(tokens: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Cut tokens [N] into `batch_size` contiguous streams read side by side.

    Returns `inputs` and `targets`, both [batch_size, (N - 1) // batch_size]: row b is the b-th
    piece of the text, and targets are the inputs one token later.
    """
    length = (len(tokens) - 1) // batch_size
    used = batch_size * length
    return tokens[:used].view(batch_size, length), tokens[1 : used + 1].view(batch_size, length)


def sequence_batches(
    tokens: Tensor, batch_size: int | Literal["full"], sequence_length: int
) -> SequenceBatches:
    """Cut the streams of `batchify` into pieces of at most `sequence_length` tokens.

    Returns one epoch of (input, target), both [B, T]. Each pair continues the one before it, so the
    hidden state at the end of one is the first hidden state of the next. B is `batch_size`, or as
    many streams as the text holds sequences if that is less or `batch_size` is "full": then the
    whole text is one pair.

    Raises:
        InputError: fewer tokens than one sequence and its next token.
    """
    sequences = (len(tokens) - 1) // sequence_length
    if sequences < 1:
        raise InputError(
            f"too short: {len(tokens)} tokens to train on; expected at least "
            f"{sequence_length + 1} (one sequence of {sequence_length} and its next token)"
        )
    inputs, targets = batchify(
        tokens, sequences if batch_size == "full" else min(batch_size, sequences)
    )
    # Even parts: a short last one would be a noisy step of full size.
    parts = math.ceil(inputs.shape[1] / sequence_length)
    return SequenceBatches(inputs, targets, parts)
