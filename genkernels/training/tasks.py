"""What a command that trains needs to know of a model: its data, its measure and a sample of it."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..data import (
    DEFAULT_CORPUS,
    Batches,
    ByteTokenizer,
    InputError,
    Tokenizer,
    clean_text,
    errors_in,
    load_text,
    sequence_batches,
    split_text,
    train_tokenizer,
)
from ..models import MarkovModel, RNNConfig, RNNLanguageModel
from .evaluation import Evaluation, evaluate
from .loop import TrainingConfig
from .presets import RNN_PRESETS, Preset

_EVALUATION_STREAMS = 16
_PROMPT_CHARACTERS = 32


class Task(abc.ABC):
    """A text made ready for a model to train on.

    Args:
        data: UTF-8 text file; Python's documentation by default.
        sizes: the model's config; its vocab_size is the most that a tokenizer may use.
        config: how to train.
        tokenizer: that of the run that is continued; by default one is learned from the text.
        characters: read only so many.

    Raises:
        InputError: the text cannot be read, or is too short.
    """

    model_class: ClassVar[type[Any]]
    presets: ClassVar[dict[str, Preset]]
    tiny: ClassVar[dict[str, Any]]  # sizes and settings that take no time
    kernel: ClassVar[str]  # how the names of its main op begin
    plain: ClassVar[str]  # what `twin` runs on
    sample_heading: ClassVar[str]
    unit: ClassVar[str]  # of a loss in nats per token times `scale`

    source: str
    digest: str  # of what there is to learn from
    tokenizer: Tokenizer
    sizes: Any
    batches: Batches
    scale: float
    baseline: tuple[str, float]  # a simpler model's name, and its figure in `unit`

    @abc.abstractmethod
    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        tokenizer: Tokenizer | None = None,
        characters: int | None = None,
    ) -> None: ...

    @abc.abstractmethod
    def describe(self) -> str:
        """Say what there is to learn from."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, quickly: bool = False) -> Evaluation:
        """Measure `model` on what is held out; quickly gives nearly the same figures."""

    @abc.abstractmethod
    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        """Return a text that shows what `model` can do."""

    @abc.abstractmethod
    def twin(self, model: Any) -> nn.Module:
        """Return the same model in plain PyTorch, with the same weights."""


class RNNTask(Task):
    """The next token of a text, from all of those before it."""

    model_class = RNNLanguageModel
    presets = RNN_PRESETS
    tiny: ClassVar = {
        "vocab_size": 260,
        "embedding_dim": 8,
        "hidden_size": 16,
        "num_layers": 1,
        "batch_size": 4,
        "sequence_length": 16,
    }
    kernel = "gru"
    plain = "torch.nn.GRU"
    sample_heading = f"the first {_PROMPT_CHARACTERS} characters are given"
    unit = "bits/byte"

    def __init__(
        self,
        data: Path | None,
        sizes: RNNConfig,
        config: TrainingConfig,
        tokenizer: Tokenizer | None = None,
        characters: int | None = None,
    ) -> None:
        self.source = str(data or DEFAULT_CORPUS)
        text = load_text(data)[:characters]
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        bytes_of = ByteTokenizer().encode
        with errors_in(self.source):
            training, held_out = split_text(text)
            self.tokenizer = tokenizer or train_tokenizer(training, sizes.vocab_size)
            self.sizes = dataclasses.replace(sizes, vocab_size=self.tokenizer.vocab_size)
            self._held_out = self.tokenizer.encode(held_out)
            if len(self._held_out) < 2:
                raise InputError(
                    f"text too short: {len(self._held_out)} token to hold out; expected at least 2"
                )
            tokens = self.tokenizer.encode(training)
            self.batches = sequence_batches(tokens, config.batch_size, config.sequence_length)
        self._prompt = self.tokenizer.encode(held_out[:_PROMPT_CHARACTERS])
        training_bytes, held_out_bytes = bytes_of(training), bytes_of(held_out)
        self._bytes = len(training_bytes), len(held_out_bytes)
        # Nats per token to bits per byte by the mean length of a token: exact for bytes, and over
        # the whole text for other tokens.
        lengths = self.tokenizer.byte_lengths[tokens].double()
        self.scale = 1 / math.log(2) / lengths.mean().item()
        markov = MarkovModel(order=3).fit(training_bytes)
        self.baseline = "order-3 Markov model", markov.bits_per_byte(held_out_bytes)

    def describe(self) -> str:
        return "{:,} bytes to train on, {:,} held out".format(*self._bytes)

    def evaluate(self, model: nn.Module, quickly: bool = False) -> Evaluation:
        streams = _EVALUATION_STREAMS if quickly else 1
        return evaluate(model, self._held_out, self.tokenizer.byte_lengths, streams)

    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        tokens = model.generate(
            self._prompt[None],
            max_new_tokens,
            temperature=0.8,
            generator=torch.Generator().manual_seed(seed),
        )
        return clean_text(self.tokenizer.decode(tokens[0]))

    def twin(self, model: RNNLanguageModel) -> nn.Module:
        twin = RNNLanguageModel(model.config, gru=torch.nn.GRU)
        twin.load_state_dict(model.state_dict())
        return twin
