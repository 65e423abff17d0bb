"""Sound: its next sample."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data import (
    MELODY,
    AudioTokenizer,
    InputError,
    Tokenizer,
    errors_in,
    load_audio,
    load_audio_folder,
    replace_file,
    save_audio,
)
from ..checkpoint import Checkpoint
from ..evaluation import Evaluation, evaluate
from ..loop import TrainingConfig
from .language import RecurrentTask, at_least_two, markov
from .task import (
    DRAWING,
    HELD_OUT,
    TEMPERATURE,
    Baseline,
    Example,
    Request,
    SampleFile,
    check_output,
    digest_of_tensors,
    drawn,
    dry_length,
)

_SECONDS = 4  # that are generated
_JUDGED = 1  # seconds of what people choose between
_GIVEN = 0.1  # seconds
_TOKEN = 0.005  # seconds of a sample where that of a text has a token


class AudioEvaluation(Evaluation):
    """Measures over the predicted samples, each of which is a byte."""

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("bits per sample", f"{self.bits_per_byte:.4f}"),
            ("accuracy", f"{self.token_accuracy:.2%} of {self.tokens:,} samples"),
        ]


class AudioTask(RecurrentTask):
    """The next mu-law level of sound, from all of those before it.

    The sound is that of a file, or of a folder's files one after another; the tail is held out.
    """

    items = "samples"
    unit = "bits"
    sample_heading = f"the first {_GIVEN} s are given"
    options = DRAWING - {"prompt", "num_samples"} | {"output"}
    judged = "sounds"
    medium = "audio"
    order = 6  # the strongest: a wave goes on from several samples before it

    tokenizer: AudioTokenizer

    def __init__(
        self,
        data: Path | None,
        sizes: Any,
        config: TrainingConfig,
        seed: int = 0,
        tokenizer: Tokenizer | AudioTokenizer | None = None,
        is_dry: bool = False,
    ) -> None:
        data = data or Path(MELODY)
        self.source = str(data)
        self.tokenizer = _of_sound(data, tokenizer or AudioTokenizer())
        assert config.sequence_length
        length = dry_length(config.sequence_length) if is_dry else None
        levels = _load(data, self.tokenizer)[:length]
        self.digest = _digest(levels)
        self.record = {}
        self.sizes = dataclasses.replace(sizes, vocab_size=self.tokenizer.vocab_size)
        with errors_in(data):
            self._parts = _split(levels)
            self.prepare(*self._parts, config, seed)

    def prepare(self, tokens: Tensor, held_out: Tensor, config: TrainingConfig, seed: int) -> None:
        super().prepare(tokens, held_out, config, seed)
        self.baseline = markov(tokens, held_out, self.order)

    def describe(self) -> str:
        rate = self.tokenizer.sample_rate
        training, held_out = (len(part) / rate for part in self._parts)
        return (
            f"{training:,.1f} s to train on, {held_out:,.1f} s held out, {rate:,} samples a second"
        )

    def evaluate(self, model: nn.Module, quickly: bool = False) -> AudioEvaluation:
        return AudioEvaluation(*super().evaluate(model, quickly))

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[AudioEvaluation, Baseline | None]:
        data, baseline = data or Path(MELODY), None
        model, tokenizer, _ = checkpoint
        levels = _load(data, _of_sound(data, tokenizer))
        with errors_in(data):
            if not whole:
                known, levels = _split(levels)
                baseline = markov(known, levels, cls.order)
            at_least_two(levels)
        return AudioEvaluation(*evaluate(model, levels, tokenizer.byte_lengths)), baseline

    @classmethod
    def examples_of(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool, count: int, seed: int
    ) -> list[Example]:
        data, tokenizer = data or Path(MELODY), checkpoint.tokenizer
        levels = _load(data, _of_sound(data, tokenizer))
        with errors_in(data):
            levels = levels if whole else _split(levels)[1]
            pieces = levels.split(int(_JUDGED * tokenizer.sample_rate))
            whole_pieces = len(pieces) - (len(pieces[-1]) < len(pieces[0]))
            chosen = drawn(count, whole_pieces, seed)
        return [Example("", _wav(pieces[number], tokenizer)) for number in chosen]

    @classmethod
    def made(cls, checkpoint: Checkpoint, examples: Sequence[Example], seed: int) -> list[bytes]:
        """After silence, as `generate` does, all side by side."""
        model, tokenizer, _ = checkpoint
        silence = cls.read_prompt(model, tokenizer, None).expand(len(examples), -1)  # [N, 1]
        request = Request(None, int(_JUDGED * tokenizer.sample_rate), seed=seed)
        levels = torch.cat([*model.stream(silence, *request.drawing)], dim=1)  # [N, T]
        return [_wav(row, tokenizer) for row in levels]

    @classmethod
    def digest_of(cls, data: Path | None, checkpoint: Checkpoint) -> str:
        return _digest(_load(data or Path(MELODY), checkpoint.tokenizer))

    def sample(self, model: Any, max_new_tokens: int, seed: int) -> SampleFile:
        rate = self.tokenizer.sample_rate
        levels = model.generate(
            self._held_out[None, : int(_GIVEN * rate)],
            int(_TOKEN * rate * max_new_tokens),
            temperature=TEMPERATURE,
            generator=torch.Generator().manual_seed(seed),
        )
        waveform = self.tokenizer.decode(levels[0])
        return SampleFile(".wav", lambda path: save_audio(path, waveform, rate))

    @classmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        model, tokenizer, _ = checkpoint
        output = request.output or Path("sound.wav")
        check_output(output, ".wav")
        rate = tokenizer.sample_rate
        count = request.max_new_tokens or _SECONDS * rate
        request = dataclasses.replace(request, max_new_tokens=count)
        silence = cls.read_prompt(model, tokenizer, None)
        with replace_file(output) as path:
            path.touch()  # a place that cannot be written to is found before the work
            levels = torch.cat([*model.stream(silence, *request.drawing)], dim=1)  # [1, T]
            save_audio(path, tokenizer.decode(levels[0]), rate)
        yield f"{'sound':<15} {output}: {count / rate:,.1f} s\n"

    @classmethod
    def read_prompt(cls, model: Any, tokenizer: AudioTokenizer, text: str | None) -> Tensor:
        assert text is None
        return tokenizer.encode(torch.zeros(1, 1))


def _of_sound(data: Path, tokenizer: Tokenizer | AudioTokenizer) -> AudioTokenizer:
    if not isinstance(tokenizer, AudioTokenizer):
        raise InputError(f"{data}: is sound, and the model continues texts; expected a text")
    return tokenizer


def _load(data: Path, tokenizer: AudioTokenizer) -> Tensor:
    """Return the levels of a file, or of those of a folder, int64 [N]."""
    rate = tokenizer.sample_rate
    sounds = load_audio_folder(data, rate) if data.is_dir() else [load_audio(data, rate)]
    return torch.cat([tokenizer.encode(sound) for sound in sounds])


def _wav(levels: Tensor, tokenizer: AudioTokenizer) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.wav"
        save_audio(path, tokenizer.decode(levels), tokenizer.sample_rate)
        return path.read_bytes()


def _split(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Cut off the tail, which is held out."""
    cut = len(levels) - int(HELD_OUT * len(levels))
    return levels[:cut], levels[cut:]


def _digest(levels: Tensor) -> str:
    return digest_of_tensors(levels.byte())
