"""What a command that trains needs to know of a model: its data, its measure and a sample of it."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import (
    DEFAULT_CORPUS,
    Batches,
    ByteTokenizer,
    Corpus,
    CropBatches,
    InputError,
    Tokenizer,
    clean_text,
    errors_in,
    load_text,
    sequence_batches,
    split_text,
    train_tokenizer,
)
from ..models import GPT, MarkovModel, RNNLanguageModel
from .evaluation import Evaluation, evaluate
from .loop import TrainingConfig
from .presets import GPT_PRESETS, RNN_PRESETS, Preset

_EVALUATION_STREAMS = 16
_PROMPT_CHARACTERS = 32


class Task(abc.ABC):
    """A text made ready for a model to train on.

    Args:
        data: UTF-8 text file; Python's documentation by default.
        sizes: the model's config; its vocab_size is the most that a tokenizer may use.
        config: how to train.
        seed: of what is drawn from the text.
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
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        characters: int | None = None,
    ) -> None: ...

    @abc.abstractmethod
    def describe(self) -> str:
        """Say what there is to learn from."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, quickly: bool = False) -> Evaluation:
        """Measure `model` on what is held out; quickly gives nearly the same figures."""

    @classmethod
    @abc.abstractmethod
    def measure(
        cls, model: nn.Module, tokenizer: Tokenizer, data: Path | None, whole: bool
    ) -> tuple[Evaluation, tuple[str, float] | None]:
        """Measure `model` on a file of its own, or the part of it that training would hold out;
        then with the figure of a simpler model that has learned from the rest."""

    @abc.abstractmethod
    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        """Return a text that shows what `model` can do."""

    @abc.abstractmethod
    def twin(self, model: Any) -> nn.Module:
        """Return the same model in plain PyTorch, with the same weights."""


class LanguageTask(Task):
    """The next token of a text, from those before it."""

    sample_heading = f"the first {_PROMPT_CHARACTERS} characters are given"
    unit = "bits/byte"

    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        characters: int | None = None,
    ) -> None:
        self.source = str(data or DEFAULT_CORPUS)
        text = load_text(data)[:characters]
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        with errors_in(self.source):
            corpus = split_text(text)
            self.tokenizer = tokenizer or train_tokenizer(corpus.training, sizes.vocab_size)
            self.sizes = dataclasses.replace(sizes, vocab_size=self.tokenizer.vocab_size)
            self._held_out = _at_least_two(self.tokenizer.encode(corpus.held_out))
            tokens = self.tokenizer.encode(corpus.training)
            self.batches = self.make_batches(tokens, config, seed)
        self._bytes = [len(part.encode()) for part in corpus]
        self._prompt = self.tokenizer.encode(corpus.held_out[:_PROMPT_CHARACTERS])
        # Nats per token to bits per byte by the mean length of a token: exact for bytes, and over
        # the whole text for other tokens.
        lengths = self.tokenizer.byte_lengths[tokens].double()
        self.scale = 1 / math.log(2) / lengths.mean().item()
        self.baseline = _markov(corpus)

    @abc.abstractmethod
    def make_batches(self, tokens: Tensor, config: TrainingConfig, seed: int) -> Batches:
        """Return what a model is given to learn tokens, int64 [N], from."""

    def describe(self) -> str:
        return "{:,} bytes to train on, {:,} held out".format(*self._bytes)

    def evaluate(self, model: nn.Module, quickly: bool = False) -> Evaluation:
        streams = _EVALUATION_STREAMS if quickly else 1
        return evaluate(model, self._held_out, self.tokenizer.byte_lengths, streams)

    @classmethod
    def measure(
        cls, model: nn.Module, tokenizer: Tokenizer, data: Path | None, whole: bool
    ) -> tuple[Evaluation, tuple[str, float] | None]:
        text, baseline = load_text(data), None
        with errors_in(data or DEFAULT_CORPUS):
            if not whole:
                corpus = split_text(text)
                text, baseline = corpus.held_out, _markov(corpus)
            tokens = _at_least_two(tokenizer.encode(text))
        return evaluate(model, tokens, tokenizer.byte_lengths), baseline

    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        tokens = model.generate(
            self._prompt[None],
            max_new_tokens,
            temperature=0.8,
            generator=torch.Generator().manual_seed(seed),
        )
        return clean_text(self.tokenizer.decode(tokens[0]))


def _at_least_two(tokens: Tensor) -> Tensor:
    if len(tokens) < 2:
        raise InputError(f"text too short: {len(tokens)} token to measure on; expected at least 2")
    return tokens


def _markov(corpus: Corpus) -> tuple[str, float]:
    """Return how well a simple model of the training part predicts the other, in bits per byte."""
    training, held_out = map(ByteTokenizer().encode, corpus)
    return "order-3 Markov model", MarkovModel(order=3).fit(training).bits_per_byte(held_out)


class RNNTask(LanguageTask):
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

    def make_batches(self, tokens: Tensor, config: TrainingConfig, seed: int) -> Batches:
        assert config.sequence_length
        return sequence_batches(tokens, config.batch_size, config.sequence_length)

    def twin(self, model: RNNLanguageModel) -> nn.Module:
        return _with_weights(RNNLanguageModel(model.config, gru=torch.nn.GRU), model)


class GPTTask(LanguageTask):
    """The next token of a text, from at most `context_length` before it."""

    model_class = GPT
    presets = GPT_PRESETS
    tiny: ClassVar = {
        "vocab_size": 260,
        "context_length": 16,
        "num_layers": 1,
        "num_heads": 2,
        "embedding_dim": 16,
        "batch_size": 4,
    }
    kernel = "attention"
    plain = "plain PyTorch"

    def make_batches(self, tokens: Tensor, config: TrainingConfig, seed: int) -> Batches:
        assert config.batch_size != "full"
        return CropBatches(tokens, config.batch_size, self.sizes.context_length, seed)

    def twin(self, model: GPT) -> nn.Module:
        return _with_weights(GPT(model.config, fused=False), model)


def _with_weights(twin: nn.Module, model: nn.Module) -> nn.Module:
    twin.load_state_dict(model.state_dict())
    return twin


TASKS: dict[str, type[Task]] = {task.model_class.name: task for task in (RNNTask, GPTTask)}
