"""What a command that trains needs to know of a model: its data, its measure and a sample of it."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...data import (
    DEFAULT_CORPUS,
    Batches,
    InputError,
    LabelledBatches,
    PairBatches,
    Tokenizer,
    errors_in,
    load_pairs,
    load_text,
    split_text,
    train_tokenizer,
)
from ..checkpoint import Checkpoint
from ..evaluation import Evaluation, TokenEvaluation
from ..loop import TrainingConfig
from ..presets import Preset

_HELD_OUT = 0.1
_DRY_CHARACTERS = 20_000
_DRY_CHARACTERS_OF_A_TOKEN = 100
_DRY_ROWS = 200
_QUICK_BATCHES = 8
MEASURED_ROWS = 32  # at once


class Baseline(NamedTuple):
    """What a simpler model reaches.

    figure: that of its evaluation.
    values: as in the first rows of one.
    """

    name: str
    figure: float
    values: list[str]


class Task(abc.ABC):
    """Data made ready for a model to train on.

    Args:
        data: UTF-8 file; Python's documentation by default, where the task is about a text.
        sizes: the model's config; its vocab_size is the most that a tokenizer may use.
        config: how to train.
        seed: of what is drawn from the data.
        tokenizer: that of the run that is continued; by default one is learned from the data.
        is_dry: read the beginning only.

    Raises:
        InputError: the data cannot be read, or are too little.
    """

    model_class: ClassVar[type[Any]]
    presets: ClassVar[dict[str, Preset]]
    tiny: ClassVar[dict[str, Any]]  # sizes and settings that take no time
    kernel: ClassVar[str]  # what the names of its main op have in them
    plain: ClassVar[str] = "plain PyTorch"  # what `twin` runs on
    unit: ClassVar[str] = "nats/token"  # of `scale` times a loss
    sample_heading: ClassVar[str]

    source: str
    digest: str  # of what there is to learn from
    record: dict[str, Any]  # what a checkpoint has to know beside its config
    tokenizer: Tokenizer
    sizes: Any
    batches: Batches
    scale: float
    baseline: Baseline

    @classmethod
    def of(cls, data: Path | None) -> type[Task]:
        """Return the task that reads such a file."""
        return cls

    @abc.abstractmethod
    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        is_dry: bool = False,
    ) -> None: ...

    @abc.abstractmethod
    def describe(self) -> str:
        """Say what there is to learn from."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, quickly: bool = False) -> Evaluation | TokenEvaluation:
        """Measure `model` on what is held out; quickly gives nearly the same figures."""

    @classmethod
    @abc.abstractmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[Evaluation | TokenEvaluation, Baseline | None]:
        """Measure a model on all of a file, or on the part of it that training would hold out;
        then beside a simpler one that has learned from the rest."""

    @abc.abstractmethod
    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        """Return a text that shows what `model` can do."""

    def twin(self, model: Any) -> nn.Module:
        """Return the same model in plain PyTorch, with the same weights."""
        return with_weights_of(model, type(model)(model.config, fused=False))


class BatchesTask(Task):
    """A task that measures on batches (input, target, ...) but for targets that are -100."""

    held_out: Sequence[tuple[Tensor, ...]]

    def evaluate(self, model: nn.Module, quickly: bool = False) -> TokenEvaluation:
        return self.measured(model, self.held_out[: _QUICK_BATCHES if quickly else None])

    @classmethod
    @abc.abstractmethod
    def measured(cls, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> TokenEvaluation:
        """Measure `model` on all of the batches."""


class TextTask(Task):
    """A task about a text, the tail of which is held out."""

    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        is_dry: bool = False,
    ) -> None:
        self.source = str(data or DEFAULT_CORPUS)
        length = getattr(sizes, "context_length", config.sequence_length) or 0
        # A tenth is held out, and a token stands for several characters.
        characters = max(_DRY_CHARACTERS, _DRY_CHARACTERS_OF_A_TOKEN * length)
        text = load_text(data)[: characters if is_dry else None]
        self.digest = digest_of(text)
        self.record = {}
        with errors_in(self.source):
            self.corpus = split_text(text)
            self.tokenizer = tokenizer or train_tokenizer(self.corpus.training, sizes.vocab_size)
            self.sizes = dataclasses.replace(sizes, vocab_size=self.tokenizer.vocab_size)
            tokens, held_out = map(self.tokenizer.encode, self.corpus)
            self.prepare(tokens, held_out, config, seed)

    @abc.abstractmethod
    def prepare(self, tokens: Tensor, held_out: Tensor, config: TrainingConfig, seed: int) -> None:
        """Set `batches`, `scale`, `baseline` and what `evaluate` needs."""

    def describe(self) -> str:
        training, held_out = (len(part.encode()) for part in self.corpus)
        return f"{training:,} bytes to train on, {held_out:,} held out"


class Rows(NamedTuple):
    """The lines of a file of two columns; `training` to learn from, `held_out` to measure on."""

    training: list[tuple[str, str]]
    held_out: list[tuple[str, str]]


class RowsTask(Task):
    """A task about a file of two columns, of which some rows are held out."""

    columns: ClassVar[tuple[str, str]]

    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        is_dry: bool = False,
    ) -> None:
        assert data is not None
        self.source = str(data)
        self.digest = digest_of(load_text(data))
        rows = load_pairs(data, *self.columns)[: _DRY_ROWS if is_dry else None]
        with errors_in(data):
            self.rows = split_rows(rows)
            text = "\n".join("\n".join(row) for row in self.rows.training)
            self.tokenizer = tokenizer or train_tokenizer(text, sizes.vocab_size)
            self.sizes = dataclasses.replace(sizes, vocab_size=self.tokenizer.vocab_size)
            self.prepare(config, seed)

    @abc.abstractmethod
    def prepare(self, config: TrainingConfig, seed: int) -> None:
        """Set `batches`, `record`, `baseline` and what `evaluate` needs."""

    def describe(self) -> str:
        return "{:,} lines to train on, {:,} held out".format(*map(len, self.rows))


def split_rows(rows: list[tuple[str, str]]) -> Rows:
    """Hold out a tenth of the rows, the same ones each time, from all over the file.

    Those that stand among the others too are dropped: a memorised row measures nothing.

    Raises:
        InputError: no row is left on one of the sides.
    """
    count = max(int(len(rows) * _HELD_OUT), 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    training = [rows[i] for i in sorted(order[count:])]
    known = set(training)
    held_out = [rows[i] for i in sorted(order[:count]) if rows[i] not in known]
    if not training or not held_out:
        raise InputError(
            f"nothing to hold out: a tenth of the {len(rows)} lines is empty or a copy of others; "
            "expected more lines"
        )
    return Rows(training, held_out)


def in_order(batches: LabelledBatches | PairBatches) -> list[tuple[Tensor, ...]]:
    """Return all of the rows that `batches` draws from, to be measured on."""
    return [batches.rows(indices) for indices in torch.arange(len(batches)).split(MEASURED_ROWS)]


def targets_of(batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Return what is to be predicted in all of the batches, int64 [N]."""
    return torch.cat([target[target != -100] for _, target, *_ in batches])


def is_table(data: Path | None) -> bool:
    """Return whether a file has two columns, which its name says."""
    return data is not None and data.suffix.lower() == ".tsv"


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def with_weights_of(model: nn.Module, twin: nn.Module) -> nn.Module:
    twin.load_state_dict(model.state_dict())
    return twin


def frequencies(name: str, known: Tensor, targets: Tensor) -> Baseline:
    """Return what one reaches on the targets, int64 [N], who knows how often each id is among the
    known, int64 [M], and guesses each time alike. Each id counts once more than it is there."""
    counts = known.bincount(minlength=int(targets.max()) + 1).double() + 1
    cross_entropy = -(counts[targets] / counts.sum()).log().mean().item()
    accuracy = (targets == counts.argmax()).double().mean().item()
    return Baseline(name, cross_entropy, [f"{cross_entropy:.4f}", f"{accuracy:.2%}"])
