"""T5: spans cut out of a text, or answers to sources."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...data import (
    InputError,
    PairBatches,
    SpanBatches,
    Tokenizer,
    clean_text,
    corrupted_windows,
    encode_source,
    errors_in,
    load_pairs,
    load_text,
    spell_answer,
    split_text,
)
from ...models import T5
from ..checkpoint import Checkpoint
from ..evaluation import TokenEvaluation, evaluate_batches
from ..loop import TrainingConfig
from ..presets import T5_PRESETS
from .task import (
    DEFAULT_CORPUS,
    MEASURED_ROWS,
    Baseline,
    BatchesTask,
    Request,
    RowsTask,
    Task,
    TextTask,
    frequencies,
    in_order,
    is_table,
    required,
    split_rows,
    targets_of,
    texts_of,
)

_LENGTH = 64  # where training did not write it down


class T5Task(BatchesTask):
    """What both tasks of a T5 share."""

    model_class = T5
    presets = T5_PRESETS
    tiny: ClassVar = {
        "vocab_size": 260,
        "num_layers": 1,
        "num_heads": 2,
        "embedding_dim": 16,
        "feedforward_dim": 32,
        "batch_size": 4,
        "sequence_length": 16,
    }
    kernel = "attention"
    scale = 1.0

    @classmethod
    def of(cls, data: Path | None) -> type[Task]:
        return PairsTask if is_table(data) else SpansTask

    @classmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        model, tokenizer, _ = checkpoint
        source = cls.read_prompt(model, tokenizer, request.prompt)
        source = source.expand(request.num_samples, -1)  # [B, S]
        decode = functools.partial(spell_answer, tokenizer=tokenizer)
        yield from texts_of(source[:, :0], model.stream(source, *request.drawing), decode)

    @classmethod
    def read_prompt(cls, model: Any, tokenizer: Tokenizer, text: str | None) -> Tensor:
        return encode_source(required(text, model), tokenizer)[None]

    @classmethod
    def measured(cls, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> TokenEvaluation:
        return evaluate_batches(model, batches, "target token", has_rows=True)

    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        sources, targets, *lengths = self.held_out[0]
        row = int(torch.randint(len(sources), (), generator=generator))
        source = sources[row : row + 1, : lengths[0][row] if lengths else None]
        longest = min(max_new_tokens, targets.shape[1])
        answer = model.generate(source, longest, temperature=0)
        parts = (spell_answer(part[0], self.tokenizer) for part in (source, answer))
        return clean_text(" -> ".join(parts))


class SpansTask(T5Task, TextTask):
    """The spans that are cut out of a text, from what is left of it."""

    sample_heading = "what was cut out is restored after the arrow"

    def prepare(self, tokens: Tensor, held_out: Tensor, config: TrainingConfig, seed: int) -> None:
        assert config.batch_size != "full"
        assert config.sequence_length
        sizes = config.sequence_length, self.sizes.vocab_size
        self.record = {"length": config.sequence_length}
        self.batches = SpanBatches(tokens, config.batch_size, *sizes, seed)
        self.held_out = corrupted_windows(held_out, MEASURED_ROWS, *sizes)
        self.baseline = _unigram(corrupted_windows(tokens, MEASURED_ROWS, *sizes), self.held_out)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[TokenEvaluation, Baseline | None]:
        model, tokenizer, training = checkpoint
        if _learned(training) is PairsTask:
            raise InputError(
                f"{data or DEFAULT_CORPUS}: is a text, and the model answers sources; "
                "expected a file PAIRS.tsv"
            )
        sizes = MEASURED_ROWS, training.get("length", _LENGTH), model.config.vocab_size
        text, known = load_text(data), None
        with errors_in(data or DEFAULT_CORPUS):
            if not whole:
                known, text = split_text(text)
            batches = corrupted_windows(tokenizer.encode(text), *sizes)
            seen = known and corrupted_windows(tokenizer.encode(known), *sizes)
        return cls.measured(model, batches), _unigram(seen, batches) if seen else None


class PairsTask(T5Task, RowsTask):
    """The target of a source."""

    columns = ("source", "target")
    sample_heading = "a held-out source and its answer"

    def prepare(self, config: TrainingConfig, seed: int) -> None:
        assert config.batch_size != "full"
        assert config.sequence_length
        self.record = {"length": config.sequence_length}
        sizes = config.sequence_length, self.tokenizer
        self.batches = _pairs(self.rows.training, *sizes, config.batch_size, seed)
        self.held_out = _in_order(self.rows.held_out, *sizes)
        self.baseline = _unigram(_in_order(self.rows.training, *sizes), self.held_out)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[TokenEvaluation, Baseline | None]:
        assert data is not None
        model, tokenizer, training = checkpoint
        if _learned(training) is SpansTask:
            raise InputError(
                f"{data}: has sources and targets, and the model restores spans; expected a text"
            )
        sizes = training.get("length", _LENGTH), tokenizer
        rows, known = load_pairs(data, *cls.columns), None
        with errors_in(data):
            if not whole:
                known, rows = split_rows(rows)
        batches = _in_order(rows, *sizes)
        baseline = known and _unigram(_in_order(known, *sizes), batches)
        return cls.measured(model, batches), baseline or None


def _learned(training: dict[str, Any]) -> type[Task] | None:
    """Return the task that a model was trained on, where that was written down."""
    return T5Task.of(Path(training["data"])) if "data" in training else None


def _pairs(
    rows: list[tuple[str, str]], length: int, tokenizer: Tokenizer, batch_size: int, seed: int = 0
) -> PairBatches:
    pairs = [(tokenizer.encode(source), tokenizer.encode(target)) for source, target in rows]
    return PairBatches(pairs, batch_size, length, tokenizer.vocab_size, seed)


def _in_order(
    rows: list[tuple[str, str]], length: int, tokenizer: Tokenizer
) -> list[tuple[Tensor, ...]]:
    return in_order(_pairs(rows, length, tokenizer, MEASURED_ROWS))


def _unigram(
    known: Sequence[tuple[Tensor, ...]], batches: Sequence[tuple[Tensor, ...]]
) -> Baseline:
    return frequencies("unigram model", targets_of(known), targets_of(batches))
