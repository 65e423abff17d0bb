"""Sound: files as waveforms, mu-law levels as tokens, and a melody that needs no download."""

from __future__ import annotations

import json
import math
import os
import random
import wave
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, import_library
from .files import Errors, files_in, read_each, replace_file

MELODY = "melody"
SAMPLE_RATE = 8000  # samples a second: what the 8 bits of mu-law were made for

_SUFFIXES = (".wav", ".flac")
# What sound is recorded at; of other rates a resampling filter would take all memory.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
_LEVELS = 256
_PENTATONIC = (0, 2, 4, 7, 9)  # semitones above the key: any two of them go together
_HARMONICS = 6


def mu_law_encode(waveform: Tensor) -> Tensor:
    """Map a floating-point waveform in [-1, 1] to mu-law levels, int64, 0 to 255 and 128 at rest.

    Equivalent to: `torchaudio.functional.mu_law_encoding(waveform.clamp(-1, 1), 256)`

    sign(x) ln(1 + 255 |x|) / ln(256), the continuous form of ITU-T G.711's law with mu = 255, in
    even steps.
    """
    mu = waveform.new_tensor(_LEVELS - 1)
    waveform = waveform.clamp(-1, 1)
    compressed = waveform.sign() * torch.log1p(mu * waveform.abs()) / torch.log1p(mu)
    return ((compressed + 1) / 2 * mu + 0.5).long()


def mu_law_decode(levels: Tensor) -> Tensor:
    """Map mu-law levels, int64, to a float32 waveform.

    Equivalent to: `torchaudio.functional.mu_law_decoding(levels, 256)`
    """
    mu = torch.tensor(_LEVELS - 1.0)
    compressed = levels.float() / mu * 2 - 1
    return compressed.sign() * (torch.exp(compressed.abs() * torch.log1p(mu)) - 1) / mu


class AudioTokenizer:
    """One token a sample, its mu-law level: what `Tokenizer` is for text.

    `sample_rate` is that of the waveforms, in samples a second. Bits per byte are bits a sample.
    """

    name = "mu-law"
    vocab_size = _LEVELS
    byte_lengths = torch.ones(_LEVELS, dtype=torch.int64)
    file = "tokenizer.json"

    def __init__(self, sample_rate: int = SAMPLE_RATE) -> None:
        self.sample_rate = _checked_rate(sample_rate)

    def encode(self, waveform: Tensor) -> Tensor:
        """Return the levels of a waveform [T], int64 [T]."""
        return mu_law_encode(waveform)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the waveform of levels [T], float32 [T]."""
        return mu_law_decode(tokens)

    def save(self, folder: Path) -> None:
        """Write what `load` needs into `folder`."""
        (folder / self.file).write_text(json.dumps({"sample_rate": self.sample_rate}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> AudioTokenizer:
        """Return the tokenizer that `save` left in `folder`.

        Raises:
            InputError: there is none, or a broken file.
        """
        path = folder / cls.file
        try:
            return cls(json.loads(path.read_text(encoding="utf-8"))["sample_rate"])
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a sample_rate") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: not a tokenizer of audio ({error})") from error


def _checked_rate(sample_rate: int) -> int:
    if type(sample_rate) is not int or not _LOWEST_RATE <= sample_rate <= _HIGHEST_RATE:
        raise ValueError(
            f"sample_rate must be an int from {_LOWEST_RATE:,} to {_HIGHEST_RATE:,}, "
            f"got {sample_rate!r}"
        )
    return sample_rate


def load_audio(
    path: str | os.PathLike[str] | None = None, sample_rate: int = SAMPLE_RATE
) -> Tensor:
    """Read a WAV or FLAC file as a float32 waveform [T] at `sample_rate`, in [-1, 1].

    Channels are averaged; another rate is resampled (`scipy.signal.resample_poly`), whose
    overshoot, as what is louder than 1 in a file of floats, is cut off. Without a path, or of the
    path "melody", if no such file is there: `melody()`.

    Raises:
        InputError: no such file, not audio, no samples in it, or NaN or infinity among them (names
            the first).
        ValueError: a sample_rate outside 1,000 to 768,000.
    """
    if path is None or _is_melody(Path(path)):
        return melody(sample_rate=sample_rate)
    return _reader(sample_rate)(Path(path))


def is_audio(path: Path) -> bool:
    """Return whether `load_audio` reads what is there, or `load_audio_folder`, by its name."""
    return path.suffix.lower() in _SUFFIXES or path.is_dir() or _is_melody(path)


def _is_melody(path: Path) -> bool:
    return str(path) == MELODY and not path.exists()


def load_audio_folder(
    root: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE, errors: Errors = "raise"
) -> list[Tensor]:
    """Read the WAV and FLAC files of a folder, by name, each as `load_audio` does.

    `errors` "skip" warns of a file that cannot be used, and goes on.

    Raises:
        InputError: no such folder, no audio in it, or what `load_audio` raises.
        ValueError: a sample_rate outside 1,000 to 768,000, or errors neither of the two.
    """
    paths = files_in(root, _SUFFIXES)
    return [sound for _, sound in read_each(paths, _reader(sample_rate), errors, root)]


def _reader(sample_rate: int) -> Callable[[Path], Tensor]:
    """Return what reads a file, as float32 [T]."""
    _checked_rate(sample_rate)
    soundfile = import_library("soundfile", "soundfile")
    signal = import_library("scipy.signal", "scipy")

    def read(path: Path) -> Tensor:
        try:
            with path.open("rb") as file:
                samples, rate = soundfile.read(file, always_2d=True)  # float64 [T, channels]
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a WAV or FLAC file") from error
        except RuntimeError as error:  # soundfile's own
            reason = "an empty file" if not path.stat().st_size else "not audio that can be read"
            raise InputError(f"{path}: {reason}; expected a WAV or FLAC file") from error
        if not len(samples):
            raise InputError(f"{path}: 0 samples; expected at least one")
        waveform = torch.from_numpy(samples)
        is_bad = ~waveform.isfinite().all(1)
        if is_bad.any():
            raise InputError(
                f"{path}: NaN or infinity at sample {int(is_bad.int().argmax())}; "
                "expected finite numbers"
            )
        if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
            raise InputError(
                f"{path}: {rate:,} samples a second; expected {_LOWEST_RATE:,} to {_HIGHEST_RATE:,}"
            )
        waveform = waveform.mean(1)
        if rate != sample_rate:
            common = math.gcd(rate, sample_rate)
            up, down = sample_rate // common, rate // common
            waveform = torch.from_numpy(signal.resample_poly(waveform.numpy(), up, down))
        return waveform.clamp(-1, 1).float()

    return read


def save_audio(
    path: str | os.PathLike[str], waveform: Tensor, sample_rate: int = SAMPLE_RATE
) -> None:
    """Write a waveform, floating-point [T] in [-1, 1], as a WAV file of 16 bits a sample.

    What is beyond is cut off.

    Raises:
        ValueError: a waveform of more dimensions, or with NaN or infinity in it, or a sample_rate
            outside 1,000 to 768,000.
        OSError: the file cannot be written.
    """
    _checked_rate(sample_rate)
    if waveform.ndim != 1 or not waveform.isfinite().all():
        raise ValueError(f"waveform must be [T] and finite, got {list(waveform.shape)}")
    samples = (waveform.cpu().double() * 2**15).round().clamp(-(2**15), 2**15 - 1).short()
    with replace_file(Path(path)) as file, wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(sample_rate)
        sound.writeframes(bytes(samples.view(torch.uint8).tolist()))


def melody(seconds: float = 60.0, sample_rate: int = SAMPLE_RATE, seed: int = 0) -> Tensor:
    """Return notes of a pentatonic scale, one after another, float32 [T]: the default audio.

    A walk over two octaves from A3 (220 Hz) in steps of at most two notes, each a quarter of a
    second to a second long: six harmonics, the n-th 1 / n^2 as strong, as far as the rate carries
    them, that set in within 10 ms and die away, the higher the sooner. The same one for the same
    seed.

    Raises:
        ValueError: no samples, or a sample_rate outside 1,000 to 768,000.
    """
    length = int(seconds * _checked_rate(sample_rate))
    if length < 1:
        raise ValueError(f"seconds must make at least one sample, got {seconds}")
    generator = random.Random(f"melody {seed}")
    scale = [12 * octave + step for octave in range(2) for step in _PENTATONIC]
    place, start = generator.randrange(len(scale)), 0
    sound = torch.zeros(length, dtype=torch.float64)
    while start < length:
        duration = int(generator.choice([0.25, 0.25, 0.5, 1.0]) * sample_rate)
        note = _note(220 * 2 ** (scale[place] / 12), duration, sample_rate)
        part = sound[start : start + duration]
        part += note[: len(part)]
        start += duration
        place = min(max(place + generator.randint(-2, 2), 0), len(scale) - 1)
    return sound.float()


def _note(frequency: float, duration: int, sample_rate: int) -> Tensor:
    """One tone, float64 [duration]; at most 0.6 loud, and silent at both ends."""
    time = torch.arange(duration, dtype=torch.float64) / sample_rate
    number = torch.arange(1, _HARMONICS + 1, dtype=torch.float64)[:, None]
    number = number[number[:, 0] * frequency < sample_rate / 2]  # [harmonics, 1]
    waves = (2 * math.pi * frequency * number * time).sin()
    tone = (waves * (-3 * number * time).exp() / number.square()).sum(0)
    attack = (time / 0.01).clamp(max=1)
    release = ((duration / sample_rate - time) / 0.02).clamp(max=1)
    # The strengths add up to at most 1.5.
    return 0.4 * tone * attack * release
