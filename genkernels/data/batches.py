"""What a training step is given, as a function of the step's number."""

from __future__ import annotations

import random
from typing import Protocol

import torch
from torch import Tensor

from .errors import InputError


class Batches(Protocol):
    """One objective's batches.

    They depend on the source (text, sizes, seed) and the step alone: a run that is resumed at a
    step sees what one that never stopped would see, without any state kept.
    """

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return what `model.loss` takes at this step, the first of which is step 0."""

    def continues(self, step: int) -> bool:
        """Return whether the batch goes on where that of the step before ended.

        The model's state then goes on too.
        """
        return False


class CropBatches(Batches):
    """Random crops of a text for a model that predicts each next token.

    Each is (input, target), both int64 [batch_size, sequence_length], target one token later. Of
    the `tokens` that `load_tokens` maps, only the crops are read.

    Raises:
        InputError: fewer tokens than one sequence and its next token.
    """

    def __init__(
        self, tokens: Tensor, batch_size: int, sequence_length: int, seed: int = 0
    ) -> None:
        self._crops = crops_of(tokens, sequence_length + 1)
        self.batch_size = batch_size
        self.seed = seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        crops = draw(self._crops, self.batch_size, generator_of(self.seed, step))
        return crops[:, :-1], crops[:, 1:]


class RowBatches(Batches):
    """Random rows of tensors that belong together, such as images and their classes: a tuple of as
    many, each [batch_size, ..].

    Raises:
        InputError: no rows.
        ValueError: tensors of different lengths.
    """

    def __init__(self, *tensors: Tensor, batch_size: int, seed: int = 0) -> None:
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) != 1:
            raise ValueError(f"tensors must be of one length, got {lengths}")
        if not lengths[0]:
            raise InputError("no examples to train on; expected at least one")
        self._tensors = tensors
        self.batch_size = batch_size
        self.seed = seed

    def batch(self, step: int) -> tuple[Tensor, ...]:
        generator = generator_of(self.seed, step)
        drawn = torch.randint(len(self._tensors[0]), (self.batch_size,), generator=generator)
        return tuple(tensor[drawn] for tensor in self._tensors)


def crops_of(tokens: Tensor, length: int) -> Tensor:
    """Every crop of `length` tokens of `tokens`, int64 [N]; a view [N - length + 1, length].

    Raises:
        InputError: not even one.
    """
    if len(tokens) < length:
        raise InputError(f"too short: {len(tokens)} tokens; expected at least {length}")
    return tokens.unfold(0, length, 1)


def draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random rows of `rows`, [N, ..], each from all of them; an int64 copy."""
    return rows[torch.randint(len(rows), (count,), generator=generator)].long()


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    # Of a seed torch keeps 32 bits, into which `random` spreads both numbers.
    mixed = random.Random(f"{seed} {step}").getrandbits(32)
    return torch.Generator().manual_seed(mixed)


def windows_of(tokens: Tensor, length: int) -> Tensor:
    """`tokens`, int64 [N], cut into windows one after another; a view [N // length, length].

    Raises:
        InputError: not even one.
    """
    return crops_of(tokens, length)[::length]
