"""Sound files, mu-law and the default melody."""

from __future__ import annotations

import math
import sys
import wave

import pytest
import torch

from genkernels.data import (
    AudioTokenizer,
    InputError,
    load_audio,
    load_audio_folder,
    melody,
    mu_law_decode,
    mu_law_encode,
    save_audio,
)


def test_mu_law_levels_begin_where_the_formula_says():
    """Level k begins at a compressed value of (k - 1/2) / 255 * 2 - 1, which the law's inverse,
    sign(y) (256^|y| - 1) / 255, maps to a sample."""
    for level in range(1, 256):
        compressed = (level - 0.5) / 255 * 2 - 1
        edge = math.copysign((256 ** abs(compressed) - 1) / 255, compressed)
        margin = max(abs(edge), 1e-3) * 1e-5
        samples = torch.tensor([edge - margin, edge + margin])
        assert mu_law_encode(samples).tolist() == [level - 1, level]
    ends = torch.tensor([-1.0, 0.0, 1.0, -1.7, 2.0, -0.0])
    assert mu_law_encode(ends).tolist() == [0, 128, 255, 0, 255, 128]


def test_mu_law_decodes_to_the_middle_of_a_level():
    levels = torch.arange(256)
    for level, sample in enumerate(mu_law_decode(levels).tolist()):
        compressed = level / 255 * 2 - 1
        expected = math.copysign((256 ** abs(compressed) - 1) / 255, compressed)
        assert sample == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert torch.equal(mu_law_encode(mu_law_decode(levels)), levels)


def test_a_tokenizer_of_audio(tmp_path):
    tokenizer = AudioTokenizer(16_000)
    waveform = melody(0.5, 16_000)
    tokens = tokenizer.encode(waveform)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() < tokens.max() < tokenizer.vocab_size
    assert tokenizer.byte_lengths.tolist() == [1] * 256
    error = (tokenizer.decode(tokens) - waveform).square().mean()
    assert 10 * math.log10(waveform.square().mean() / error) > 35, "decibels"
    tokenizer.save(tmp_path)
    assert AudioTokenizer.load(tmp_path).sample_rate == 16_000


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"sample_rate": 0}', '{"version": 1}'])
def test_refuses_a_broken_tokenizer_file(tmp_path, content):
    if content is not None:
        (tmp_path / AudioTokenizer.file).write_text(content)
    with pytest.raises(InputError, match=AudioTokenizer.file):
        AudioTokenizer.load(tmp_path)


def test_the_melody():
    sound = melody(3.3, 8000, seed=1)
    assert sound.shape == (26_400,)
    assert sound.dtype == torch.float32
    assert torch.equal(sound, melody(3.3, 8000, seed=1))
    assert not torch.equal(sound, melody(3.3, 8000, seed=2))
    assert torch.equal(sound[:16_000], melody(2.0, 8000, seed=1)), "a longer one goes on"
    assert 0.1 < sound.abs().max() <= 0.6
    # The strongest tone of each quarter of a second is one of the scale, to the width of a bin.
    scale = [
        220 * 2 ** ((12 * octave + step) / 12) for octave in range(2) for step in (0, 2, 4, 7, 9)
    ]
    spectra = torch.fft.rfft(sound[: 13 * 2000].view(13, 2000) * torch.hann_window(2000), 16_000)
    for peak in (spectra.abs().argmax(1) / 2).tolist():
        assert min(abs(peak - tone) for tone in scale) < 3
    assert torch.equal(load_audio()[:8000], melody(1.0)), "the default audio"


def test_a_file_is_what_was_saved(tmp_path):
    waveform = melody(0.1)
    waveform[:2] = torch.tensor([-1.5, 1.5])
    save_audio(tmp_path / "notes.wav", waveform)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.wav"]
    with wave.open(str(tmp_path / "notes.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 800)
        samples = torch.frombuffer(bytearray(file.readframes(800)), dtype=torch.int16)
    assert samples[:2].tolist() == [-32768, 32767]
    assert (samples / 2**15 - waveform.clamp(-1, 1)).abs().max() <= 2**-15


def test_saving_refuses(tmp_path):
    for waveform in (torch.zeros(2, 3), torch.tensor([0.0, math.nan])):
        with pytest.raises(ValueError, match="waveform"):
            save_audio(tmp_path / "notes.wav", waveform)
    with pytest.raises(ValueError, match="sample_rate"):
        save_audio(tmp_path / "notes.wav", torch.zeros(3), 0)
    with pytest.raises(ValueError, match="seconds"):
        melody(0.0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def soundfile():
    pytest.importorskip("scipy.signal", reason="scipy is not installed")
    return pytest.importorskip("soundfile", reason="soundfile is not installed")


@pytest.mark.parametrize(
    ("format", "subtype", "bits"),
    [("WAV", "PCM_16", 15), ("WAV", "PCM_24", 23), ("WAV", "FLOAT", 23), ("FLAC", "PCM_16", 15)],
)
def test_reads_a_file_and_averages_its_channels(tmp_path, soundfile, format, subtype, bits):
    path = tmp_path / f"notes.{format.lower()}"
    left = melody(0.1)
    right = -0.5 * left.flip(0)
    soundfile.write(path, torch.stack([left, right], 1).numpy(), 8000, subtype, format=format)
    waveform = load_audio(path)
    assert waveform.dtype == torch.float32
    torch.testing.assert_close(waveform, (left + right) / 2, rtol=0, atol=2.0 ** (1 - bits))


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 11_025])
def test_resampling_keeps_a_tone_and_lets_no_other_in(tmp_path, soundfile, rate):
    """1 kHz stays; 5 kHz, more than half the rate, would be heard as 3 kHz."""
    time = torch.arange(2 * rate, dtype=torch.float64) / rate
    sound = 0.5 * (2 * math.pi * 1000 * time).sin()
    if rate > 10_000:
        sound += 0.4 * (2 * math.pi * 5000 * time).sin()
    soundfile.write(tmp_path / "tone.wav", sound.numpy(), rate, "FLOAT")
    waveform = load_audio(tmp_path / "tone.wav", 8000)
    assert len(waveform) == 16_000
    time = torch.arange(16_000, dtype=torch.float64) / 8000
    expected = 0.5 * (2 * math.pi * 1000 * time).sin()
    assert (waveform - expected)[400:-400].abs().max() < 5e-3


def test_what_is_too_loud_is_cut_off(tmp_path, soundfile):
    soundfile.write(tmp_path / "loud.wav", torch.tensor([0.5, 3.0, -2.0]).numpy(), 8000, "FLOAT")
    assert load_audio(tmp_path / "loud.wav").tolist() == [0.5, 1.0, -1.0]


def save_floats(path, values, rate=8000):
    import soundfile

    soundfile.write(path, torch.tensor(values).numpy(), rate, "FLOAT")


def cut_header(path):
    save_audio(path, melody(0.1))
    path.write_bytes(path.read_bytes()[:20])


BAD = {
    "no samples": (lambda path: save_audio(path, torch.zeros(0)), "0 samples"),
    "NaN": (
        lambda path: save_floats(path, [0.0, 0.5, math.nan, 0.1]),
        "NaN or infinity at sample 2",
    ),
    "infinity": (lambda path: save_floats(path, [math.inf, 0.0]), "NaN or infinity at sample 0"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "text": (lambda path: path.write_text("some text " * 99), "not audio that can be read"),
    "cut": (cut_header, "not audio that can be read"),
    "rate": (lambda path: save_floats(path, [0.0, 0.5], 3), "3 samples a second"),
}


@pytest.mark.parametrize("bad", list(BAD))
def test_a_bad_file_is_named_or_passed_over(tmp_path, soundfile, bad):
    make, message = BAD[bad]
    path = tmp_path / "bad.wav"
    make(path)
    with pytest.raises(InputError, match=message) as error:
        load_audio(path)
    assert str(error.value).count(str(path)) == 1
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(InputError, match="none of 1 files can be used"),
    ):
        load_audio_folder(tmp_path, errors="skip")
    save_audio(tmp_path / "a.WAV", melody(0.1))
    save_audio(tmp_path / "z.wav", melody(0.2))
    with pytest.raises(InputError, match=message):
        load_audio_folder(tmp_path)
    with pytest.warns(UserWarning, match=f"skipped {path}") as warned:
        sounds = load_audio_folder(tmp_path, errors="skip")
    assert len(warned) == 1
    assert [len(sound) for sound in sounds] == [800, 1600]


def test_refuses_what_is_not_there(tmp_path, soundfile):
    with pytest.raises(InputError, match=r"none\.wav: No such file"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(InputError, match="Is a directory"):
        load_audio(tmp_path)
    with pytest.raises(InputError, match=r"no such files in it; .* \.wav, \.flac"):
        load_audio_folder(tmp_path)
    with pytest.raises(ValueError, match="sample_rate"):
        load_audio(tmp_path / "none.wav", 12)


def test_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(InputError, match="expected the package soundfile"):
        load_audio(tmp_path / "notes.wav")
