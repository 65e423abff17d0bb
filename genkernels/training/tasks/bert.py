"""BERT: hidden tokens of a text, or the classes of sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...data import (
    MASK,
    InputError,
    LabelledBatches,
    MaskedBatches,
    Tokenizer,
    clean_text,
    encode_masked,
    errors_in,
    load_pairs,
    load_text,
    masked_windows,
    spell,
    spell_masked,
    split_text,
)
from ...models import BERT, BERTConfig, evaluating
from ..checkpoint import Checkpoint
from ..evaluation import TokenEvaluation, evaluate_batches
from ..loop import TrainingConfig
from ..presets import BERT_PRESETS
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
    labels_of,
    required,
    split_rows,
    targets_of,
)

_OPEN, _CLOSE = -1, -2  # no tokens
_CANDIDATES = 5


class BERTTask(BatchesTask):
    """What both tasks of a BERT share."""

    model_class = BERT
    presets = BERT_PRESETS
    tiny: ClassVar = {
        "vocab_size": 260,
        "context_length": 16,
        "num_layers": 1,
        "num_heads": 2,
        "embedding_dim": 16,
        "batch_size": 4,
    }
    kernel = "attention"
    options = frozenset({"prompt", "top_k"})
    scale = 1.0

    @classmethod
    def of(cls, data: Path | None) -> type[Task]:
        return ClassesTask if is_table(data) else MaskedTask

    @classmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        model, tokenizer, training = checkpoint
        input = cls.read_prompt(model, tokenizer, request.prompt)  # [1, N]
        if model.config.num_classes is None:
            return _filled(model, tokenizer, input, request.top_k or _CANDIDATES)
        return _classified(model, input, labels_of(model, training))

    @classmethod
    def read_prompt(cls, model: Any, tokenizer: Tokenizer, text: str | None) -> Tensor:
        text = required(text, model)
        input = encode_masked(text, tokenizer)[None]
        longest = model.config.context_length
        if input.shape[1] > longest:
            raise InputError(
                f"--prompt: {input.shape[1] - 2} tokens; expected at most {longest - 2}"
            )
        if model.config.num_classes is None and MASK not in text:
            raise InputError(f"--prompt: nothing to fill in; expected {MASK} in it")
        return input


class MaskedTask(BERTTask, TextTask):
    """The hidden tokens of a text, from all around them."""

    sample_heading = "hidden tokens are in brackets, as they were filled in"

    def prepare(self, tokens: Tensor, held_out: Tensor, config: TrainingConfig, seed: int) -> None:
        assert config.batch_size != "full"
        length, vocab_size = self.sizes.context_length, self.sizes.vocab_size
        self.batches = MaskedBatches(tokens, config.batch_size, length, vocab_size, seed)
        self.held_out = masked_windows(held_out, MEASURED_ROWS, length, vocab_size)
        self.baseline = frequencies("unigram model", tokens, targets_of(self.held_out))

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[TokenEvaluation, Baseline | None]:
        model, tokenizer, _ = checkpoint
        if model.config.num_classes is not None:
            raise InputError(
                f"{data or DEFAULT_CORPUS}: is a text, and the model classifies; "
                "expected a file LABELS.tsv"
            )
        text, known = load_text(data), None
        with errors_in(data or DEFAULT_CORPUS):
            if not whole:
                training, text = split_text(text)
                known = tokenizer.encode(training)
            length, vocab_size = model.config.context_length, model.config.vocab_size
            tokens = tokenizer.encode(text)
            batches = masked_windows(tokens, MEASURED_ROWS, length, vocab_size)
        result = cls.measured(model, batches)
        if known is None:
            return result, None
        return result, frequencies("unigram model", known, targets_of(batches))

    @classmethod
    def measured(cls, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> TokenEvaluation:
        return evaluate_batches(model, batches, "masked token")

    @torch.no_grad()
    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = self.held_out[0]
        row = int(torch.randint(len(inputs), (), generator=generator))
        input, target = inputs[row : row + 1], targets[row : row + 1]
        with evaluating(model):
            _, prediction, _ = model.log_prob(input, target)
        special = model.special_tokens
        names = {special.cls: "", special.sep: "", _OPEN: "[", _CLOSE: "]"}
        shown: list[int] = []
        for token, hidden, filled in zip(
            *map(Tensor.tolist, (input[0], target[0], prediction)), strict=True
        ):
            shown += [token] if hidden == -100 else [_OPEN, filled, _CLOSE]
        return clean_text(spell(torch.tensor(shown[:max_new_tokens]), self.tokenizer, names))


class ClassesTask(BERTTask, RowsTask):
    """The class of a sentence."""

    columns = ("label", "text")
    unit = "nats"
    sample_heading = "held-out sentences after what they were taken for"

    def prepare(self, config: TrainingConfig, seed: int) -> None:
        assert config.batch_size != "full"
        labels = sorted({label for rows in self.rows for label, _ in rows})
        if len(labels) < 2:
            raise InputError(f"every label is {labels[0]!r}; expected at least two labels")
        self.record = {"labels": labels}
        self.sizes = dataclasses.replace(self.sizes, num_classes=len(labels))
        self.batches = _labelled(
            self.rows.training, labels, self.tokenizer, self.sizes, config.batch_size, seed
        )
        self.held_out = _in_order(self.rows.held_out, labels, self.tokenizer, self.sizes)
        self.baseline = _by_frequency(self.rows.training, labels, self.held_out)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[TokenEvaluation, Baseline | None]:
        assert data is not None
        model, tokenizer, training = checkpoint
        if model.config.num_classes is None:
            raise InputError(f"{data}: has labels, and the model fills in tokens; expected a text")
        labels = labels_of(model, training)
        rows = load_pairs(data, *cls.columns)
        with errors_in(data):
            for label, _ in rows:
                if label not in labels:
                    raise InputError(f"label {label!r}; expected one of {', '.join(labels)}")
            known, measured = ([], rows) if whole else split_rows(rows)
        batches = _in_order(measured, labels, tokenizer, model.config)
        baseline = _by_frequency(known, labels, batches) if known else None
        return cls.measured(model, batches), baseline

    @classmethod
    def measured(cls, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> TokenEvaluation:
        return evaluate_batches(model, batches, "label", _class_log_prob)

    @torch.no_grad()
    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        input, _, lengths = self.held_out[0]
        rows = torch.randint(len(input), (max(max_new_tokens // 60, 1),), generator=generator)
        with evaluating(model):
            classes = model.classify(input[rows], lengths[rows]).argmax(-1)
        labels, texts = self.record["labels"], [text for _, text in self.rows.held_out]
        return "\n".join(
            f"{labels[c]}: {texts[row]}" for c, row in zip(classes, rows.tolist(), strict=True)
        )


@torch.no_grad()
def _filled(model: BERT, tokenizer: Tokenizer, input: Tensor, k: int) -> Iterator[str]:
    """Yield the text with the likeliest tokens in it, and all candidates of each gap."""
    fillings = model.fill_mask(input, min(k, tokenizer.vocab_size))
    filled = input.masked_scatter(input == model.special_tokens.mask, fillings.token[:, 0])
    yield f"{clean_text(spell_masked(filled[0], tokenizer))}\n"
    for number, (shares, tokens) in enumerate(zip(*fillings, strict=True), 1):
        candidates = (
            f"{clean_text(tokenizer.decode(token[None]))!r} {share:.1%}"
            for share, token in zip(shares.tolist(), tokens, strict=True)
        )
        yield f"{MASK} {number}: {', '.join(candidates)}\n"


@torch.no_grad()
def _classified(model: BERT, input: Tensor, labels: list[str]) -> Iterator[str]:
    """Yield the labels and how likely they are, the likeliest first."""
    shares, order = model.classify(input)[0].softmax(-1).sort(descending=True)
    for share, index in zip(shares.tolist(), order.tolist(), strict=True):
        yield f"{share:7.2%}  {labels[index]}\n"


def _labelled(
    rows: list[tuple[str, str]],
    labels: list[str],
    tokenizer: Tokenizer,
    sizes: BERTConfig,
    batch_size: int,
    seed: int = 0,
) -> LabelledBatches:
    sentences = [tokenizer.encode(text) for _, text in rows]
    classes = torch.tensor([labels.index(label) for label, _ in rows])
    length, vocab_size = sizes.context_length, sizes.vocab_size
    return LabelledBatches(sentences, classes, batch_size, length, vocab_size, seed)


def _in_order(
    rows: list[tuple[str, str]], labels: list[str], tokenizer: Tokenizer, sizes: BERTConfig
) -> list[tuple[Tensor, ...]]:
    return in_order(_labelled(rows, labels, tokenizer, sizes, MEASURED_ROWS))


def _by_frequency(
    rows: list[tuple[str, str]], labels: list[str], batches: list[tuple[Tensor, ...]]
) -> Baseline:
    known = torch.tensor([labels.index(label) for label, _ in rows])
    return frequencies("by frequency", known, targets_of(batches))


def _class_log_prob(
    model: Any, input: Tensor, classes: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    logits = model.classify(input, lengths)
    log_prob = logits.log_softmax(-1).gather(1, classes[:, None]).squeeze(1)
    return log_prob, logits.argmax(-1)
