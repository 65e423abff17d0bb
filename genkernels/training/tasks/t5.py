"""T5: spans cut out of a text, or answers to sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...data import (
    InputError,
    SpanBatches,
    clean_text,
    corrupted_windows,
    errors_in,
    load_text,
    spell_answer,
    split_text,
)
from ...models import T5
from ..checkpoint import Checkpoint
from ..evaluation import TokenEvaluation
from ..loop import TrainingConfig
from ..presets import T5_PRESETS
from .pairs import LENGTH, AnswersTask, PairsTask, unigram
from .task import (
    DEFAULT_CORPUS,
    MEASURED_ROWS,
    Baseline,
    Example,
    Task,
    TextTask,
    drawn,
    is_table,
)

_SENTINEL = r"(<extra_id_\d+>)"


class T5Task(AnswersTask):
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
    has_spans = True

    @classmethod
    def of(cls, data: Path | None) -> type[Task]:
        return T5PairsTask if is_table(data) else SpansTask


class SpansTask(T5Task, TextTask):
    """The spans that are cut out of a text, from what is left of it."""

    sample_heading = "what was cut out is restored after the arrow"
    judged = "restored texts"

    def prepare(self, tokens: Tensor, held_out: Tensor, config: TrainingConfig, seed: int) -> None:
        assert config.batch_size != "full"
        assert config.sequence_length
        sizes = config.sequence_length, self.sizes.vocab_size
        self.record = {"length": config.sequence_length}
        self.batches = SpanBatches(tokens, config.batch_size, *sizes, seed)
        self.held_out = corrupted_windows(held_out, MEASURED_ROWS, *sizes)
        self.baseline = unigram(corrupted_windows(tokens, MEASURED_ROWS, *sizes), self.held_out)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[TokenEvaluation, Baseline | None]:
        model, tokenizer, training = checkpoint
        if _learned(training) is T5PairsTask:
            raise InputError(
                f"{data or DEFAULT_CORPUS}: is a text, and the model answers sources; "
                "expected a file PAIRS.tsv"
            )
        sizes = MEASURED_ROWS, training.get("length", LENGTH), model.config.vocab_size
        text, known = load_text(data), None
        with errors_in(data or DEFAULT_CORPUS):
            if not whole:
                known, text = split_text(text)
            batches = corrupted_windows(tokenizer.encode(text), *sizes)
            seen = known and corrupted_windows(tokenizer.encode(known), *sizes)
        return cls.measured(model, batches), unigram(seen, batches) if seen else None

    @classmethod
    def examples_of(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool, count: int, seed: int
    ) -> list[Example]:
        model, tokenizer, training = checkpoint
        text, examples = load_text(data), []
        with errors_in(data or DEFAULT_CORPUS):
            text = text if whole else split_text(text).held_out
            sizes = 1, training.get("length", LENGTH), model.config.vocab_size
            windows = corrupted_windows(tokenizer.encode(text), *sizes)
            for i in drawn(count, len(windows), seed):
                source, target = (
                    clean_text(spell_answer(part[0], tokenizer)) for part in windows[i]
                )
                examples.append(Example(source, _restored(source, target)))
        return examples

    @classmethod
    def made(cls, checkpoint: Checkpoint, examples: Sequence[Example], seed: int) -> list[str]:
        answers = super().made(checkpoint, examples, seed)
        return [
            _restored(given, answer) for (given, _), answer in zip(examples, answers, strict=True)
        ]


class T5PairsTask(T5Task, PairsTask):
    """The target of a source."""

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[TokenEvaluation, Baseline | None]:
        if _learned(checkpoint.training) is SpansTask:
            raise InputError(
                f"{data}: has sources and targets, and the model restores spans; expected a text"
            )
        return super().measure(checkpoint, data, whole)


def _learned(training: dict[str, Any]) -> type[Task] | None:
    """Return the task that a model was trained on, where that was written down."""
    return T5Task.of(Path(training["data"])) if "data" in training else None


def _restored(source: str, answer: str) -> str:
    """Return the source with the spans of an answer in it; those that it lacks stay as they are."""
    _, *parts = re.split(_SENTINEL, answer)
    spans = dict(zip(parts[::2], parts[1::2], strict=True))
    return re.sub(_SENTINEL, lambda found: spans.get(found[0], found[0]), source)
