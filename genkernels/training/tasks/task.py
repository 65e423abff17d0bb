"""What the commands need to know of a model: its data, its training, its measure, what it makes."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...data import (
    DATES,
    DEFAULT_CORPUS,
    AudioTokenizer,
    Batches,
    InputError,
    LabelledBatches,
    PairBatches,
    TextStream,
    Tokenizer,
    check_kind,
    clean_text,
    errors_in,
    load_pairs,
    load_text,
    split_text,
    train_tokenizer,
)
from ..checkpoint import Checkpoint
from ..comparison import Comparison, compare_step_time
from ..evaluation import Measures, TokenEvaluation
from ..human import Kind
from ..loop import Training, TrainingConfig
from ..presets import Preset

HELD_OUT = 0.1
_DRY_CHARACTERS = 20_000
_DRY_CHARACTERS_OF_A_TOKEN = 100
_DRY_ROWS = 200
_QUICK_BATCHES = 8
MAX_NEW_TOKENS = 400  # where no number is asked for
TEMPERATURE = 0.8  # the same
MEASURED_ROWS = 32  # at once


class Baseline(NamedTuple):
    """What a simpler model reaches.

    figure: that of its evaluation.
    values: as in the first rows of one.
    """

    name: str
    figure: float
    values: list[str]


class SampleFile(NamedTuple):
    """A sample that a terminal cannot show; `write` makes a file of it, whose name has `suffix`."""

    suffix: str
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Request:
    """What a model is asked to make: the options of `genkernels generate`."""

    prompt: str | None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_samples: int | None = None
    seed: int = 0
    beam_size: int | None = None
    label: str | None = None
    output: Path | None = None

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @property
    def drawing(self) -> tuple[Any, ...]:
        """The arguments of `stream` and `generate` after the prompt."""
        count = self.max_new_tokens or MAX_NEW_TOKENS
        temperature = TEMPERATURE if self.temperature is None else self.temperature
        return count, temperature, self.top_k, self.top_p, self.generator


class Example(NamedTuple):
    """An example of the data, for people to judge what a model makes in its place.

    given: what one goes by who makes such, a text.
    real: what is there in the data: a text, or the content of a file of the task's `medium`.
    """

    given: str
    real: str | bytes


# The fields of a `Request` to a model that draws one token after another.
DRAWING = frozenset(
    {"prompt", "max_new_tokens", "temperature", "top_k", "top_p", "num_samples", "seed"}
)


class Task(abc.ABC):
    """Data made ready for a model to train on.

    Args:
        data: a file; by default what `source` then names.
        sizes: the model's config; its vocab_size is the most that a tokenizer may use.
        config: how to train, a `config_class`.
        seed: of what is drawn from the data.
        tokenizer: that of the run that is continued; by default one is learned from the data.
        is_dry: read the beginning only.

    Raises:
        InputError: the data cannot be read, or are too little.
    """

    model_class: ClassVar[type[Any]]
    config_class: ClassVar[type[Any]] = TrainingConfig
    presets: ClassVar[dict[str, Preset]]
    tiny: ClassVar[dict[str, Any]]  # sizes and settings that take no time
    kernel: str | None = None  # what the names of its main op have in them, if it has one
    plain: str | None = None  # what `compare` times the model against, if there is such
    items: ClassVar[str] = "tokens"  # what a step counts
    unit: ClassVar[str]  # of the figure, and of `scale` times a loss
    options: ClassVar[frozenset[str]]  # the fields of a `Request` that mean something to it
    sample_heading: str
    judged: ClassVar[str | None] = None  # what `made` makes, if people can judge it
    medium: ClassVar[Kind] = "text"  # of that

    source: str
    digest: str  # of what there is to learn from
    record: dict[str, Any]  # what a checkpoint has to know beside its config
    tokenizer: Tokenizer | AudioTokenizer | None = None
    sizes: Any
    scale: float | None = None  # None: losses are not to be compared with the figure
    baseline: Baseline | None = None

    @classmethod
    def of(cls, data: Path | None) -> type[Task]:
        """Return the task that reads such a file."""
        return cls

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> type[Task]:
        """Return the task that such a model was trained on, as far as it tells."""
        return cls

    @abc.abstractmethod
    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        seed: int = 0,
        tokenizer: Tokenizer | AudioTokenizer | None = None,
        is_dry: bool = False,
    ) -> None: ...

    @abc.abstractmethod
    def describe(self) -> str:
        """Say what there is to learn from."""

    def describe_model(self, model: Any) -> str:
        """Say how large it is."""
        sizes = dataclasses.asdict(self.sizes)
        parts = [f"{name.replace('_', ' ')} {size}" for name, size in sizes.items()]
        if self.tokenizer:
            kind = f"{self.tokenizer.vocab_size:,} tokens ({self.tokenizer.name})"
            parts = [kind, *(part for part in parts if not part.startswith("vocab size "))]
        return f"{self.parameters(model):,} parameters: {', '.join(parts)}"

    def parameters(self, model: Any) -> int:
        """Return how many numbers it has learned."""
        return sum(parameter.numel() for parameter in model.parameters())

    @abc.abstractmethod
    def describe_training(self, config: Any) -> str:
        """Say how it is learned."""

    @abc.abstractmethod
    def training(self, model: Any, config: Any) -> Any:
        """Return what trains `model` in place, which iterates, counts and is saved and continued as
        `Training` does."""

    def compare(self, training: Any, seconds: float) -> Comparison:
        """Time a step of `training` against one on what `plain` names, for about so long."""
        raise NotImplementedError

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, quickly: bool = False) -> Measures:
        """Measure `model` on what is held out; quickly gives nearly the same figures."""

    @classmethod
    @abc.abstractmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[Measures, Baseline | None]:
        """Measure a model on all of a file, or on the part of it that training would hold out;
        then beside a simpler one that has learned from the rest."""

    @classmethod
    def digest_of(cls, data: Path | None, checkpoint: Checkpoint) -> str:
        """Return the `digest` of a task that trains such a model."""
        return digest_of(load_text(data))

    @abc.abstractmethod
    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str | SampleFile:
        """Return what shows what `model` can do."""

    @classmethod
    @abc.abstractmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        """Make what was asked for, and yield what is to be printed, as soon as it is known.

        Raises:
            InputError: the request is not one for this model.
        """

    @classmethod
    def examples_of(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool, count: int, seed: int
    ) -> list[Example]:
        """Draw so many examples from all of a file, or from the part of it that training would hold
        out.

        Raises:
            InputError: there are not as many, or the file is none for this model.
        """
        raise NotImplementedError

    @classmethod
    def made(
        cls, checkpoint: Checkpoint, examples: Sequence[Example], seed: int
    ) -> list[str] | list[bytes]:
        """Make one of the kind of each example, by what it gives."""
        raise NotImplementedError


class TokenTask(Task):
    """A task of a model that learns from batches of tokens, by the gradient of `model.loss`."""

    plain = "plain PyTorch"
    unit = "nats/token"
    options = DRAWING

    batches: Batches
    scale: float
    baseline: Baseline

    def describe_training(self, config: TrainingConfig) -> str:
        rows, columns, *_ = self.batches.batch(0)[0].shape
        return f"{config.optimizer}, batches of {rows} x {columns} {self.items}"

    def training(self, model: Any, config: TrainingConfig) -> Training:
        return Training(model, self.batches, config)

    def compare(self, training: Training, seconds: float) -> Comparison:
        with torch.random.fork_rng(devices=[]):  # dropout is the same whether or not it is timed
            twin = self.twin(training.model)
        batch = training.batches.batch(0)
        return compare_step_time(training.model, twin, batch, training.config, seconds)

    def twin(self, model: Any) -> nn.Module:
        """Return the same model in plain PyTorch, with the same weights."""
        return with_weights_of(model, type(model)(model.config, fused=False))

    @classmethod
    @abc.abstractmethod
    def read_prompt(cls, model: Any, tokenizer: Any, text: str | None) -> Tensor:
        """Return what `model` reads of a prompt, int64 [1, N].

        Raises:
            InputError: it cannot read that.
        """


class BatchesTask(TokenTask):
    """A task that measures on batches (input, target, ...) but for targets that are -100."""

    tokenizer: Tokenizer
    held_out: Sequence[tuple[Tensor, ...]]

    def evaluate(self, model: nn.Module, quickly: bool = False) -> TokenEvaluation:
        return self.measured(model, self.held_out[: _QUICK_BATCHES if quickly else None])

    @classmethod
    @abc.abstractmethod
    def measured(cls, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> TokenEvaluation:
        """Measure `model` on all of the batches."""


class TextTask(Task):
    """A task about a text, the tail of which is held out."""

    tokenizer: Tokenizer

    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: Any,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        is_dry: bool = False,
    ) -> None:
        self.source = str(data or DEFAULT_CORPUS)
        length = getattr(sizes, "context_length", getattr(config, "sequence_length", None)) or 0
        text = load_text(data)[: dry_length(length) if is_dry else None]
        self.digest = digest_of(text)
        self.record = {}
        with errors_in(self.source):
            self.corpus = split_text(text)
            self.tokenizer = tokenizer or train_tokenizer(self.corpus.training, sizes.vocab_size)
            self.sizes = sizes
            if sizes.vocab_size != self.tokenizer.vocab_size:
                self.sizes = dataclasses.replace(sizes, vocab_size=self.tokenizer.vocab_size)
            tokens, held_out = map(self.tokenizer.encode, self.corpus)
            self.prepare(tokens, held_out, config, seed)

    @abc.abstractmethod
    def prepare(self, tokens: Tensor, held_out: Tensor, config: Any, seed: int) -> None:
        """Set `scale`, `baseline` and what `training` and `evaluate` need."""

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
    default: ClassVar[Path | None] = None  # what is read where no file is given
    tokenizer: Tokenizer

    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        is_dry: bool = False,
    ) -> None:
        data = data or self.default
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


def dry_length(sequence_length: int) -> int:
    """How many characters, or samples, a dry run reads."""
    # A tenth is held out, and a token stands for several characters.
    return max(_DRY_CHARACTERS, _DRY_CHARACTERS_OF_A_TOKEN * sequence_length)


def texts_of(
    prompt: Tensor, new: Iterable[Tensor], decode: Callable[[Tensor], str]
) -> Iterator[str]:
    """Yield the text of prompt, [B, P], and of new tokens, [B, 1] each: of a single row piece by
    piece. Cleaned: a control sequence that a model made up must not reach the terminal."""
    if len(prompt) == 1:
        stream = TextStream(decode)
        for token in itertools.chain([prompt], new):
            yield stream.add(token[0])
        yield stream.end() + "\n"
        return
    for number, row in enumerate(torch.cat([prompt, *new], dim=1), 1):
        yield f"--- sample {number}\n{clean_text(decode(row))}\n"


def required(prompt: str | None, model: Any) -> str:
    """Return the prompt of a model that cannot do without one."""
    if prompt is None:
        raise InputError(f"--prompt: missing; expected a text for the {model.name} to read")
    return prompt


_BEGINS = {".png": rb"\x89PNG", ".csv": rb"label,", ".wav": rb"RIFF.{4}WAVE"}


def check_output(output: Path, *suffixes: str) -> None:
    """Let a file of one of the kinds be replaced, but by its like alone."""
    if output.suffix not in suffixes:
        raise InputError(
            f"--output: {output} is not of a kind that can be written; "
            f"expected {' or '.join(suffixes)}"
        )
    with errors_in("--output"):
        check_kind(output, _BEGINS[output.suffix], f"a {output.suffix[1:].upper()}")


def drawn(count: int, available: int, seed: int) -> list[int]:
    """Choose so many numbers below `available`, in random order.

    Raises:
        InputError: there are not as many.
    """
    if available < count:
        raise InputError(f"{available} examples to show; expected at least --pairs {count}")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def labels_of(model: Any, training: dict[str, Any]) -> list[str]:
    """Return the names of the classes of `model`, none of a model without, by what its training
    wrote down.

    Raises:
        InputError: it has not as many of them.
    """
    labels, count = training.get("labels"), model.config.num_classes
    if count is None:
        return []
    if not isinstance(labels, list) or len(labels) != count or {*map(type, labels)} != {str}:
        raise InputError(f"the checkpoint's labels are {labels!r}; expected {count} texts")
    return labels


def split_rows(rows: list[tuple[str, str]]) -> Rows:
    """Hold out a tenth of the rows, the same ones each time, from all over the file.

    Those that stand among the others too are dropped: a memorised row measures nothing.

    Raises:
        InputError: no row is left on one of the sides.
    """
    known_places, places = rows_held_out(len(rows))
    training = [rows[i] for i in known_places]
    known = set(training)
    held_out = [rows[i] for i in places if rows[i] not in known]
    if not training or not held_out:
        raise InputError(
            f"nothing to hold out: a tenth of the {len(rows)} lines is empty or a copy of others; "
            "expected more lines"
        )
    return Rows(training, held_out)


def rows_held_out(count: int) -> tuple[list[int], list[int]]:
    """Return which of so many rows to learn from, and which tenth of them, at least one, to hold
    out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    cut = max(int(count * HELD_OUT), 1)
    return sorted(order[cut:]), sorted(order[:cut])


def in_order(batches: LabelledBatches | PairBatches) -> list[tuple[Tensor, ...]]:
    """Return all of the rows that `batches` draws from, to be measured on."""
    return [batches.rows(indices) for indices in torch.arange(len(batches)).split(MEASURED_ROWS)]


def targets_of(batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Return what is to be predicted in all of the batches, int64 [N]."""
    return torch.cat([target[target != -100] for _, target, *_ in batches])


def is_table(data: Path | None) -> bool:
    """Return whether a file has two columns, which its name says."""
    return data is not None and (data.suffix.lower() == ".tsv" or str(data) == DATES)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_tensors(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


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
