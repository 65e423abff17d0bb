"""`genkernels` with sound: a file, a folder of them or the melody, and WAV files of what a model
makes up."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import tempfile
import wave
from pathlib import Path

import pytest
import torch
from test_cli import files_of, generated, measures, tree

from genkernels.cli import main
from genkernels.data import (
    AudioTokenizer,
    load_audio,
    melody,
    mu_law_encode,
    save_audio,
)
from genkernels.models import MarkovModel
from genkernels.training import load_checkpoint
from genkernels.training.tasks import audio as audio_task

TINY = ["--embedding-dim=8", "--hidden-size=16", "--batch-size=8", "--no-compare"]
RATE = 8000

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
pytestmark = pytest.mark.usefixtures("one_thread", "short_samples")


@pytest.fixture(scope="module")
def short_samples():
    """Those of a run are not for ears here, and take half of the time if they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio_task, "_TOKEN", 1 / RATE)
        yield


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """A tone of 400 Hz for two seconds, and a folder of two files at other rates."""
    folder = tmp_path_factory.mktemp("sounds")
    time = torch.arange(2 * RATE) / RATE
    save_audio(folder / "tone.WAV", 0.5 * torch.sin(2 * torch.pi * 400 * time))
    (folder / "songs").mkdir()
    save_audio(folder / "songs" / "a.wav", melody(1.5, 16_000), 16_000)
    stereo = melody(1.0, 24_000, seed=1)[:, None].repeat(1, 2)
    soundfile.write(str(folder / "songs" / "b.flac"), stereo.numpy(), 24_000)
    (folder / "songs" / "cover.txt").write_text("no sound")
    return folder


@pytest.fixture(scope="module")
def trained(sounds, short_samples, tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint of the tone, and what its training printed."""
    folder = tmp_path_factory.mktemp("runs") / "audio"
    arguments = ["--data", str(sounds / "tone.WAV"), "--output", str(folder), "--steps=60"]
    arguments += ["--sequence-length=32", "--learning-rate=0.05"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", "rnn", *TINY, *arguments]) == 0
    return folder, printed.getvalue()


def frames(path: Path) -> int:
    """How many samples a WAV file has, which has to be one of 8 kHz and 16 bits."""
    with wave.open(str(path)) as sound:
        assert sound.getparams()[:3] == (1, 2, RATE)
        assert len(sound.readframes(sound.getnframes())) == 2 * sound.getnframes()
        return sound.getnframes()


def test_learns_a_tone(trained, sounds, capsys):
    folder, printed = trained
    assert "tone.WAV: 1.8 s to train on, 0.2 s held out, 8,000 samples a second\n" in printed
    assert "256 tokens (mu-law)" in printed
    assert "batches of 8 x 32 samples" in printed
    assert f"sample          {folder / 'sample.wav'} (the first 0.1 s are given)" in printed
    assert main(["evaluate", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out in printed, "the tail of the sound that it was trained on"
    found = measures(out)
    levels = AudioTokenizer().encode(load_audio(sounds / "tone.WAV"))
    known, held_out = levels[:14_400], levels[14_400:]
    baseline = MarkovModel(6).fit(known).bits_per_byte(held_out)
    assert found["bits per sample"] == [
        pytest.approx(x, abs=1e-4) for x in (figure_of(folder), baseline)
    ]
    assert found["bits per sample"][0] < 1.5
    assert found["accuracy"][0] > 75
    assert "of 1,599 samples" in out
    record = load_checkpoint(folder).training
    assert record["preset"] == "audio"
    assert record["settings"]["sequence_length"] == 32


def figure_of(folder: Path) -> float:
    """The held-out bits of the best checkpoint, as of one stream."""
    model, tokenizer, record = load_checkpoint(folder)
    levels = tokenizer.encode(load_audio(record["data"], tokenizer.sample_rate))[14_400:][None]
    with torch.no_grad():
        log_prob, *_ = model.log_prob(levels[:, :-1], levels[:, 1:])
    return -log_prob.double().mean().item() / torch.tensor(2.0).log().item()


def test_samples_of_a_run(trained, sounds):
    folder, _ = trained
    samples = [folder / f"sample-{step}.wav" for step in range(3, 61, 3)]
    assert sorted(folder.glob("sample-*")) == sorted(samples)
    assert [frames(path) for path in samples] == [848] * 20
    assert frames(folder / "sample.wav") == 1100
    assert len({path.read_bytes() for path in samples}) == 20
    tone, last = load_audio(sounds / "tone.WAV"), load_audio(samples[-1])
    error = last[:800] - tone[14_400:15_200]
    assert error.abs().max() < 0.02, "the tail's beginning, but for the levels"
    assert last[800:].abs().max() > 0.1, "and what the model made up"


def test_generate_is_a_function_of_its_seed(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    output = tmp_path / "tune.wav"
    arguments = [str(folder), "--output", str(output), "--max-new-tokens=400"]
    assert generated(capsys, *arguments) == f"sound           {output}: 0.1 s\n"
    assert frames(output) == 400
    first = output.read_bytes()
    model, tokenizer, _ = load_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    levels = model.generate(torch.tensor([[128]]), 400, 0.8, generator=generator)[0, 1:]
    assert torch.equal(tokenizer.encode(load_audio(output)), levels), "from silence, but for it"
    generated(capsys, *arguments)
    assert output.read_bytes() == first
    for options in ("--seed=1", "--temperature=2", "--top-p=0.2"):
        generated(capsys, *arguments, options)
        assert output.read_bytes() != first, options
    generated(capsys, *arguments, "--temperature=0")
    greedy = output.read_bytes()
    generated(capsys, *arguments, "--top-k=1", "--seed=1")
    assert output.read_bytes() == greedy
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audio_task, "_SECONDS", 1)
    assert generated(capsys, str(folder)) == "sound           sound.wav: 1.0 s\n"
    assert frames(tmp_path / "sound.wav") == RATE


def test_a_run_that_stops_and_goes_on_is_the_same_to_the_last_bit(sounds, tmp_path, capsys):
    command = ["train", "rnn", *TINY, "--data", str(sounds / "songs"), "--dropout=0.3"]
    command += ["--sequence-length=64", "--cell=tanh", "--no-sample"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--steps=9", "--output", str(whole)]) == 0
    assert "songs: 2.2 s to train on, 0.2 s held out" in capsys.readouterr().out
    assert main([*command, "--steps=9", "--stop-after=4", "--output", str(parts)]) == 0
    assert main(["train", "rnn", "--resume", "--output", str(parts)]) == 0
    expected, actual = files_of(whole), files_of(parts)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[key], value), key
    assert actual["best", "record"] == expected["best", "record"]


def test_sound_that_has_changed(sounds, tmp_path, capsys):
    """Another rate of the same files is no change, one more file is."""
    songs, run = tmp_path / "songs", tmp_path / "run"
    shutil.copytree(sounds / "songs", songs)
    command = ["train", "rnn", *TINY, "--no-sample", "--output", str(run)]
    assert main([*command, "--data", str(songs), "--steps=1"]) == 0
    printed = capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out in printed
    save_audio(songs / "c.wav", melody(0.1))
    assert main(["evaluate", str(run)]) == 2
    assert "songs: has changed since" in capsys.readouterr().err
    assert main(["train", "rnn", "--resume", "--steps=2", "--output", str(run)]) == 2
    assert "songs: is not what the run in" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--whole"]) == 0
    assert "Markov" not in capsys.readouterr().out
    shutil.rmtree(songs)
    assert main(["evaluate", str(run)]) == 2
    assert "songs: No such file or directory; expected a WAV or FLAC" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--data=melody"], ["--preset=audio"]])
def test_the_melody_is_there_without_a_file(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["train", "rnn", "--dry-run", *options]) == 0
    out = capsys.readouterr().out
    assert "data            melody: 2.2 s to train on, 0.2 s held out" in out
    assert "speed-up " in out
    assert out.endswith("dry run         all of it works; nothing was left behind\n")
    assert not list(tmp_path.iterdir())


def test_what_has_the_melodys_name_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "melody").mkdir()
    assert main(["train", "rnn", "--dry-run", "--data=melody"]) == 2
    assert "melody: no such files in it" in capsys.readouterr().err
    (tmp_path / "melody").rmdir()
    (tmp_path / "melody").write_text("la la la, and so on\n" * 100)
    assert main(["train", "rnn", "--dry-run", "--data=melody", "--no-compare"]) == 0
    assert "melody: 1,800 bytes to train on" in capsys.readouterr().out


REFUSED = {
    "no file": (["train", "rnn", "--data={tmp}/none.wav"], "{tmp}/none.wav: No such file"),
    "no sound": (["train", "rnn", "--data={tmp}/text.wav"], "{tmp}/text.wav: not audio that can"),
    "no sound in it": (["train", "rnn", "--data={tmp}/none"], "{tmp}/none: no such files in it"),
    "a bad one": (["train", "rnn", "--data={tmp}/bad"], "{tmp}/bad/b.wav: not audio that can be"),
    "short": (
        ["train", "rnn", "--data={tmp}/short.wav"],
        "{tmp}/short.wav: too short: 90 tokens to train on; expected at least 257",
    ),
    "nothing held out": (["train", "rnn", "--data={tmp}/one.wav"], "one.wav: too short: 0 token"),
    "others cannot": (["train", "gpt", "--data={tmp}/short.wav"], "short.wav: not UTF-8"),
    "not beside others": (["compare", "--data={tmp}/short.wav"], "short.wav: is sound, or a"),
    "resumed on a text": (
        ["train", "rnn", "--resume", "--steps=200", "--output={run}", "--data={tmp}/text.txt"],
        "{tmp}/text.txt: not audio that can be read",
    ),
    "resumed on sound": (
        ["train", "rnn", "--resume", "--steps=200", "--output={text}", "--data={tmp}/short.wav"],
        "{tmp}/short.wav: is sound, and the model continues texts; expected a text",
    ),
    "a text": (["evaluate", "{run}", "--data={tmp}/text.txt"], "text.txt: not audio that can be"),
    "sound": (["evaluate", "{text}", "--data={tmp}/short.wav"], "short.wav: is sound, and the mod"),
    "prompt": (
        ["generate", "{run}", "--prompt=la"],
        "--prompt: means nothing to this rnn; expected --max-new-tokens, --output, --seed",
    ),
    "several": (["generate", "{run}", "--num-samples=2"], "--num-samples: means nothing to this"),
    "vocabulary": (
        ["train", "rnn", "--data={tmp}/short.wav", "--vocab-size=300"],
        "--vocab-size: means nothing to sound, which has 256 levels; expected it with a text",
    ),
    "no output": (["generate", "{text}", "--output=a.wav"], "--output: means nothing to this rnn"),
    "another kind": (
        ["generate", "{run}", "--output={tmp}/tune.mp3"],
        "--output: {tmp}/tune.mp3 is not of a kind that can be written; expected .wav",
    ),
    "a text's place": (
        ["generate", "{run}", "--output={tmp}/text.wav"],
        "--output: {tmp}/text.wav is a file of another kind; expected a WAV, or none",
    ),
    "a picture's place": (["generate", "{run}", "--output={tmp}/webp.wav"], "of another kind"),
    "no place": (["generate", "{run}", "--output={tmp}/no/a.wav"], "{tmp}/no/a.wav: No such file"),
    "no tokenizer": (["generate", "{broken}"], "tokenizer.json: not a tokenizer of audio"),
    "an unknown one": (["evaluate", "{unknown}"], "'a-law'; expected bytes, bpe or mu-law"),
}


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory) -> dict[str, Path]:
    """Runs by name: of the tone, with broken tokenizers, and of a text."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "notes.txt").write_text("a text to learn from, not too short\n" * 100)
    text = [*TINY, f"--data={folder / 'notes.txt'}", "--sequence-length=16", "--steps=1"]
    assert main(["train", "rnn", *text, f"--output={folder / 'text'}"]) == 0
    for name in ("broken", "unknown"):
        shutil.copytree(trained[0], folder / name)
    (folder / "broken" / "tokenizer.json").write_text("{}")
    config = json.loads((folder / "unknown" / "config.json").read_text())
    (folder / "unknown" / "config.json").write_text(json.dumps(config | {"tokenizer": "a-law"}))
    return {"run": trained[0], **{name: folder / name for name in ("broken", "unknown", "text")}}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, runs, tmp_path, capsys):
    save_audio(tmp_path / "short.wav", melody(100 / RATE))
    save_audio(tmp_path / "one.wav", melody(1 / RATE))
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    save_audio(tmp_path / "bad" / "a.wav", melody(0.1))
    for path in ("text.txt", "text.wav", "bad/b.wav"):
        (tmp_path / path).write_text("no sound in here\n" * 100)
    (tmp_path / "webp.wav").write_bytes(b"RIFF\x00\x01\x00\x00WEBPVP8 ")
    before = tree(tmp_path) | tree(runs["run"]) | tree(runs["text"])
    arguments, message = REFUSED[case]
    arguments = [argument.format(tmp=tmp_path, **runs) for argument in arguments]
    if arguments[0] == "train" and "--resume" not in arguments:
        arguments += [f"--output={tmp_path / 'run'}"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(tmp=tmp_path, **runs) in err
    assert tree(tmp_path) | tree(runs["run"]) | tree(runs["text"]) == before


def test_help_teaches(capsys):
    assert main(["train", "rnn", "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "genkernels train rnn --data songs --output runs/audio" in lines
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "4 seconds" in out


def test_people_choose_between_sounds(trained, sounds, tmp_path, monkeypatch, capsys):
    """Of one length; a page shows what is held out as it is, and another seed makes others."""
    monkeypatch.setattr(audio_task, "_JUDGED", 0.05)
    run, page = str(trained[0]), tmp_path / "sheet.html"
    pages = []
    for seed in ("--seed=0", "--seed=1"):
        assert main(["evaluate", run, f"--human={page}", "--pairs=4", "--whole", seed]) == 0
        assert "4 pairs of sounds" in capsys.readouterr().out
        pages.append(page.read_text())
    first, second = (re.findall('src="data:audio/wav;base64,([^"]*)"', page) for page in pages)
    heard = []
    for source in first:
        (tmp_path / "heard.wav").write_bytes(base64.b64decode(source))
        heard.append(load_audio(tmp_path / "heard.wav"))
    assert [len(sound) for sound in heard] == [400] * 8
    pieces = mu_law_encode(load_audio(sounds / "tone.WAV")).split(400)
    is_real = [any(torch.equal(mu_law_encode(sound), piece) for piece in pieces) for sound in heard]
    assert sum(is_real) == 4
    made = {source for source, real in zip(first, is_real, strict=True) if not real}
    assert len(made) == 4
    assert not made & {*second}
    assert main(["evaluate", run, f"--human={page}", "--pairs=41", "--whole"]) == 2
    assert "40 examples to show; expected at least --pairs 41" in capsys.readouterr().err
