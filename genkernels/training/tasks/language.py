"""The next token: of a text, or of what else is cut into tokens."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...data import (
    AudioTokenizer,
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
    windows_of,
)
from ...models import GPT, HMM, MarkovModel, RNNLanguageModel
from ...models.rnn import CELLS
from ..checkpoint import Checkpoint
from ..evaluation import Evaluation, evaluate
from ..fitting import EMConfig, Fitting, FittingConfig
from ..loop import TrainingConfig
from ..presets import GPT_PRESETS, HMM_PRESETS, MARKOV_PRESETS, RNN_PRESETS
from .task import (
    DEFAULT_CORPUS,
    DRAWING,
    TEMPERATURE,
    Baseline,
    Example,
    Request,
    Task,
    TextTask,
    TokenTask,
    drawn,
    texts_of,
    with_weights_of,
)

_EVALUATION_STREAMS = 16
_PROMPT_CHARACTERS = 32
_JUDGED_CHARACTERS = 300  # of which the first ones are given
_GIVEN_CHARACTERS = 100


class CausalTask(Task):
    """The next token, from those before it."""

    order: ClassVar[int] = 3  # of the Markov model that it is measured against
    tokenizer: Tokenizer | AudioTokenizer

    def prepare(self, tokens: Tensor, held_out: Tensor, config: Any, seed: int) -> None:
        self._held_out = at_least_two(held_out)
        self.learn_from(tokens, config, seed)
        # Nats per token to bits per byte by the mean length of a token: exact for bytes, and over
        # the whole text for other tokens.
        lengths = self.tokenizer.byte_lengths[tokens].double()
        self.scale = 1 / math.log(2) / lengths.mean().item()

    @abc.abstractmethod
    def learn_from(self, tokens: Tensor, config: Any, seed: int) -> None:
        """Make ready what `training` gives a model to learn tokens, int64 [N], from."""

    def evaluate(self, model: nn.Module, quickly: bool = False) -> Evaluation:
        streams = _EVALUATION_STREAMS if quickly else 1
        return evaluate(model, self._held_out, self.tokenizer.byte_lengths, streams)


class CausalTextTask(CausalTask, TextTask):
    """The next token of a text, from those before it."""

    unit = "bits/byte"
    sample_heading = f"the first {_PROMPT_CHARACTERS} characters are given"
    options = DRAWING
    judged = "continued texts"
    tokenizer: Tokenizer

    def prepare(self, tokens: Tensor, held_out: Tensor, config: Any, seed: int) -> None:
        super().prepare(tokens, held_out, config, seed)
        self.baseline = _of_bytes(self.corpus, self.order)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[Evaluation, Baseline | None]:
        model, tokenizer, _ = checkpoint
        text, baseline = load_text(data), None
        with errors_in(data or DEFAULT_CORPUS):
            if not whole:
                corpus = split_text(text)
                text, baseline = corpus.held_out, _of_bytes(corpus, cls.order)
            tokens = at_least_two(tokenizer.encode(text))
        return evaluate(model, tokens, tokenizer.byte_lengths), baseline

    def sample(self, model: Any, max_new_tokens: int, seed: int) -> str:
        tokens = model.generate(
            self.tokenizer.encode(self.corpus.held_out[:_PROMPT_CHARACTERS])[None],
            max_new_tokens,
            temperature=TEMPERATURE,
            generator=torch.Generator().manual_seed(seed),
        )
        return clean_text(self.tokenizer.decode(tokens[0]))

    @classmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        model, tokenizer, _ = checkpoint
        prompt = cls.read_prompt(model, tokenizer, request.prompt)
        prompt = prompt.expand(request.num_samples or 1, -1)  # [B, P]
        yield from texts_of(prompt, model.stream(prompt, *request.drawing), tokenizer.decode)

    @classmethod
    def read_prompt(cls, model: Any, tokenizer: Tokenizer, text: str | None) -> Tensor:
        return tokenizer.encode(text or "\n")[None]

    @classmethod
    def examples_of(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool, count: int, seed: int
    ) -> list[Example]:
        """What is given ends with a word where it can."""
        text = load_text(data)
        with errors_in(data or DEFAULT_CORPUS):
            text = text if whole else split_text(text).held_out
            pieces = drawn(count, len(text) // _JUDGED_CHARACTERS, seed)
        examples = []
        for number in pieces:
            piece = text[number * _JUDGED_CHARACTERS :][:_JUDGED_CHARACTERS]
            cut = max(piece.rfind(" ", 0, _GIVEN_CHARACTERS + 1), 0) or _GIVEN_CHARACTERS
            examples.append(Example(piece[:cut], piece[cut:]))
        return examples

    @classmethod
    def made(cls, checkpoint: Checkpoint, examples: Sequence[Example], seed: int) -> list[str]:
        made = []
        for number, (given, real) in enumerate(examples):
            text, end = "", len(given) + len(real)
            # A character has at most four bytes, and a token at least one.
            request = Request(given, 4 * len(real), seed=seed + number)
            for piece in cls.generate(checkpoint, request):
                text += piece
                if len(text) >= end:
                    break
            made.append(text[len(given) : end])
        return made


class NetworkTask(CausalTask, TokenTask):
    """The next token, by a network."""

    def learn_from(self, tokens: Tensor, config: TrainingConfig, seed: int) -> None:
        self.batches = self.make_batches(tokens, config, seed)

    @abc.abstractmethod
    def make_batches(self, tokens: Tensor, config: TrainingConfig, seed: int) -> Batches:
        """Return what a model is given to learn tokens, int64 [N], from."""


class RecurrentTask(NetworkTask):
    """The next token, from all of those before it."""

    model_class = RNNLanguageModel
    presets = RNN_PRESETS
    tiny: ClassVar = {
        "vocab_size": 260,
        "embedding_dim": 16,
        "hidden_size": 16,
        "num_layers": 1,
        "batch_size": 4,
        "sequence_length": 16,
    }

    def prepare(self, tokens: Tensor, held_out: Tensor, config: TrainingConfig, seed: int) -> None:
        super().prepare(tokens, held_out, config, seed)
        _, plain = CELLS[self.sizes.cell]
        self.kernel = plain.__name__.lower()
        self.plain = f"torch.nn.{plain.__name__}"

    def make_batches(self, tokens: Tensor, config: TrainingConfig, seed: int) -> Batches:
        assert config.sequence_length
        return sequence_batches(tokens, config.batch_size, config.sequence_length)

    def twin(self, model: RNNLanguageModel) -> nn.Module:
        _, plain = CELLS[model.config.cell]
        return with_weights_of(model, RNNLanguageModel(model.config, gru=plain))


def at_least_two(tokens: Tensor) -> Tensor:
    if len(tokens) < 2:
        raise InputError(f"too short: {len(tokens)} token to measure on; expected at least 2")
    return tokens


def markov(known: Tensor, held_out: Tensor, order: int) -> Baseline:
    """Return what a Markov model reaches that has learned from known, both of int64 [N] and of
    bytes."""
    bits = MarkovModel(order).fit(known).bits_per_byte(held_out)
    return Baseline(f"order-{order} Markov model", bits, [f"{bits:.4f}"])


def _of_bytes(corpus: Corpus, order: int) -> Baseline:
    training, held_out = map(ByteTokenizer().encode, corpus)
    return markov(training, held_out, order)


class GPTTask(CausalTextTask, NetworkTask):
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

    def make_batches(self, tokens: Tensor, config: TrainingConfig, seed: int) -> Batches:
        assert config.batch_size != "full"
        return CropBatches(tokens, config.batch_size, self.sizes.context_length, seed)


class HMMTask(CausalTextTask):
    """The next byte of a text, from what hidden states those before it tell of."""

    model_class = HMM
    config_class = EMConfig
    presets = HMM_PRESETS
    tiny: ClassVar = {"num_states": 4, "sequence_length": 16}

    def learn_from(self, tokens: Tensor, config: EMConfig, seed: int) -> None:
        self._rows = windows_of(tokens, config.sequence_length).contiguous()

    def describe_training(self, config: EMConfig) -> str:
        rows, columns = self._rows.shape
        return f"EM of {rows:,} x {columns} tokens at once"

    def training(self, model: HMM, config: EMConfig) -> Fitting:
        def fit() -> float:
            log_likelihood = model.em_step(self._rows, pseudo_count=config.pseudo_count)
            return -log_likelihood / self._rows.numel()

        return Fitting(model, config, fit, self._rows.numel())


class MarkovTask(CausalTextTask):
    """The next byte of a text, from the `order` bytes before it."""

    model_class = MarkovModel
    config_class = FittingConfig
    presets = MARKOV_PRESETS
    tiny: ClassVar = {"order": 2, "steps": 1}
    order = 0

    def learn_from(self, tokens: Tensor, config: FittingConfig, seed: int) -> None:
        self._tokens = tokens

    def describe_model(self, model: MarkovModel) -> str:
        return f"each byte depends on the {model.order} before it"

    def parameters(self, model: MarkovModel) -> int:
        return sum(model.config.ngrams)

    def describe_training(self, config: FittingConfig) -> str:
        return "every n-gram is counted"

    def training(self, model: MarkovModel, config: FittingConfig) -> Fitting:
        def fit() -> float:
            model.fit(self._tokens)
            return model.bits_per_byte(self._tokens) * math.log(2)

        return Fitting(model, config, fit, len(self._tokens))
