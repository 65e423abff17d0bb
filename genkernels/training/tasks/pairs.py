"""Answers to sources, of any model that encodes and decodes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...data import (
    InputError,
    PairBatches,
    Tokenizer,
    clean_text,
    encode_source,
    errors_in,
    load_pairs,
    spell_answer,
)
from ..checkpoint import Checkpoint
from ..evaluation import TokenEvaluation, evaluate_batches
from ..loop import TrainingConfig
from .task import (
    DRAWING,
    MAX_NEW_TOKENS,
    MEASURED_ROWS,
    Baseline,
    BatchesTask,
    Example,
    Request,
    RowsTask,
    drawn,
    frequencies,
    in_order,
    required,
    split_rows,
    targets_of,
    texts_of,
)

LENGTH = 64  # where training did not write it down


class AnswersTask(BatchesTask):
    """The target of a source."""

    scale = 1.0
    options = DRAWING | {"beam_size"}
    has_spans: ClassVar[bool] = False  # whether <extra_id_0>, .. of a source are tokens
    temperature: ClassVar[float | None] = None  # where none is asked for, another than usual

    @classmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        model, tokenizer, _ = checkpoint
        source = cls.read_prompt(model, tokenizer, request.prompt)  # [1, S]
        if request.beam_size is None:
            source = source.expand(request.num_samples or 1, -1)  # [B, S]
            if request.temperature is None:
                request = dataclasses.replace(request, temperature=cls.temperature)
            answers: Iterable[Tensor] = model.stream(source, *request.drawing)
        else:
            drawing = request.temperature, request.top_k, request.top_p, request.num_samples
            if drawing != (None, None, None, None):
                raise InputError(
                    "--beam-size: draws nothing; expected it without --temperature, --top-k, "
                    "--top-p and --num-samples"
                )
            length = request.max_new_tokens or MAX_NEW_TOKENS
            answers = [model.beam_search(source, length, request.beam_size)]
        decode = functools.partial(spell_answer, tokenizer=tokenizer)
        yield from texts_of(source[:, :0], answers, decode)

    @classmethod
    def read_prompt(cls, model: Any, tokenizer: Tokenizer, text: str | None) -> Tensor:
        return encode_source(required(text, model), tokenizer, has_spans=cls.has_spans)[None]

    @classmethod
    def made(cls, checkpoint: Checkpoint, examples: Sequence[Example], seed: int) -> list[str]:
        length = checkpoint.training.get("length", LENGTH)
        requests = (Request(given, length, seed=seed + i) for i, (given, _) in enumerate(examples))
        return [
            "".join(cls.generate(checkpoint, request)).removesuffix("\n") for request in requests
        ]

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


class PairsTask(AnswersTask, RowsTask):
    """The target of a source, both lines of a file."""

    columns = ("source", "target")
    sample_heading = "a held-out source and its answer"
    judged = "answers"

    def prepare(self, config: TrainingConfig, seed: int) -> None:
        assert config.batch_size != "full"
        assert config.sequence_length
        self.record = {"length": config.sequence_length}
        sizes = config.sequence_length, self.tokenizer
        self.batches = _pairs(self.rows.training, *sizes, config.batch_size, seed)
        self.held_out = _in_order(self.rows.held_out, *sizes)
        self.baseline = unigram(_in_order(self.rows.training, *sizes), self.held_out)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[TokenEvaluation, Baseline | None]:
        data = data or cls.default
        assert data is not None
        model, tokenizer, training = checkpoint
        sizes = training.get("length", LENGTH), tokenizer
        rows, known = load_pairs(data, *cls.columns), None
        with errors_in(data):
            if not whole:
                known, rows = split_rows(rows)
        batches = _in_order(rows, *sizes)
        baseline = known and unigram(_in_order(known, *sizes), batches)
        return cls.measured(model, batches), baseline or None

    @classmethod
    def examples_of(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool, count: int, seed: int
    ) -> list[Example]:
        data = data or cls.default
        assert data is not None
        rows = load_pairs(data, *cls.columns)
        with errors_in(data):
            rows = rows if whole else split_rows(rows).held_out
            return [Example(*rows[i]) for i in drawn(count, len(rows), seed)]


def unigram(known: Sequence[tuple[Tensor, ...]], batches: Sequence[tuple[Tensor, ...]]) -> Baseline:
    return frequencies("unigram model", targets_of(known), targets_of(batches))


def _pairs(
    rows: list[tuple[str, str]], length: int, tokenizer: Tokenizer, batch_size: int, seed: int = 0
) -> PairBatches:
    pairs = [(tokenizer.encode(source), tokenizer.encode(target)) for source, target in rows]
    return PairBatches(pairs, batch_size, length, tokenizer.vocab_size, seed)


def _in_order(
    rows: list[tuple[str, str]], length: int, tokenizer: Tokenizer
) -> list[tuple[Tensor, ...]]:
    return in_order(_pairs(rows, length, tokenizer, MEASURED_ROWS))
