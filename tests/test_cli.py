"""The command `genkernels`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open

import genkernels
from genkernels.cli import main
from genkernels.cli.app import app
from genkernels.data import clean_text, encode_source, load_text, spell_answer
from genkernels.models import RNNLanguageModel
from genkernels.training import (
    RunFolder,
    evaluation_gan,
    load_checkpoint,
    replace_folder,
    save_checkpoint,
)
from genkernels.training.tasks import gan as gan_task

TINY = ["--embedding-dim=8", "--hidden-size=16", "--batch-size=8", "--sequence-length=16"]
_BLOCKS = ["--num-layers=1", "--num-heads=2", "--embedding-dim=16", "--batch-size=4"]
SIZES = {
    "rnn": TINY,
    "gpt": [*_BLOCKS, "--context-length=16"],
    "bert": [*_BLOCKS, "--context-length=32", "--vocab-size=300"],
    "t5": [*_BLOCKS, "--feedforward-dim=16", "--sequence-length=24", "--vocab-size=300"],
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def notes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "notes.txt"
    path.write_text(load_text()[:30_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(notes, tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint, and what its training printed."""
    folder = tmp_path_factory.mktemp("runs") / "rnn"
    arguments = ["--data", str(notes), "--output", str(folder), "--steps=20", "--no-compare"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", "rnn", *TINY, *arguments]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def checkpoint(trained) -> Path:
    return trained[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_train_shows_and_writes(notes, tmp_path, capsys):
    output = tmp_path / "new" / "rnn"
    before = genkernels.stats()
    arguments = ["--data", str(notes), "--output", str(output), "--steps=40", "--seed=7"]
    assert main(["train", "rnn", *TINY, *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out, "plain lines where stdout is no terminal"
    assert sorted(p.name for p in output.iterdir()) == [
        "best.safetensors",
        "config.json",
        "last.safetensors",
        "loss.png",
    ]
    assert [p.name for p in output.parent.iterdir()] == ["rnn"]
    training = load_checkpoint(output, "last").training
    rows = [line.split() for line in out.splitlines() if line.endswith("  cpp")]
    assert [int(row[0]) for row in rows] == list(range(2, 41, 2))
    assert all(len(row) == 6 for row in rows)
    assert float(rows[-1][1]) < float(rows[0][1]), "the loss falls"
    assert float(rows[-1][3]) == pytest.approx(training["held_out"], abs=1e-4)
    bits = float(out.split("bits per byte   ")[1].split()[0])
    assert bits == pytest.approx(training["held_out"], rel=0.02)
    calls = training["history"]["calls"]
    for shown in (
        f"  (order-3 Markov model: {training['baseline'][1]:.4f})",
        "x over torch.nn.GRU",
        f"loss curve      {output / 'loss.png'}",
        f"checkpoint      {output}: best of step 40, last of 40",
        "seed 7",
        f"gru_backward cpp x 40, gru_forward cpp x {calls['gru_forward cpp']} (SIMD",
    ):
        assert shown in out
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert calls["gru_backward cpp"] == 40
    assert calls["gru_forward cpp"] > 40, "training and evaluation"
    assert genkernels.stats()["gru_forward", "cpp"] > before.get(("gru_forward", "cpp"), 0)
    sample = out.split("sample ")[1]
    assert len(sample) > 100
    assert sample.splitlines()[1].removeprefix("  | ")[:32] in notes.read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["rnn", "gpt"])
def test_the_kernel_shown_is_the_one_that_ran(model, notes, tmp_path, capsys):
    with genkernels.use_backend("reference"):
        arguments = ["--data", str(notes), "--output", str(tmp_path / model), "--steps=2"]
        assert main(["train", model, *SIZES[model], *arguments, "--no-compare"]) == 0
    out = capsys.readouterr().out
    assert "  reference\n" in out
    assert "cpp" not in out


def test_cell(notes, tmp_path, capsys):
    """A model of tanh cells trains, is compared with torch.nn.RNN, and goes on as what it is."""
    arguments = ["--data", str(notes), "--output", str(tmp_path / "rnn")]
    assert main(["train", "rnn", *TINY, *arguments, "--cell=tanh", "--steps=4"]) == 0
    out = capsys.readouterr().out
    for shown in (", cell tanh", "rnn_backward cpp x 4", "x over torch.nn.RNN"):
        assert shown in out
    assert load_checkpoint(tmp_path / "rnn").model.config.cell == "tanh"
    again = ["train", "rnn", *arguments, "--resume", "--steps=6"]
    assert main([*again, "--cell=gru"]) != 0
    assert "--cell: gru, but the run" in capsys.readouterr().err
    assert main(again) == 0


def test_tied_weights_are_tried_in_their_size(notes, capsys):
    tied = ["train", "rnn", "--preset=deep", f"--data={notes}", "--dry-run"]
    assert main([*tied, "--hidden-size=24"]) == 0
    assert "embedding dim 24, hidden size 24" in capsys.readouterr().out
    assert main([*tied, "--hidden-size=24", "--embedding-dim=16"]) == 2
    assert "embedding_dim must be hidden_size 24" in capsys.readouterr().err


def test_seed_preset_learns_its_vocabulary(notes, tmp_path, capsys):
    output = tmp_path / "seed"
    arguments = ["--data", str(notes), "--output", str(output), "--steps=2", "--no-compare"]
    assert main(["train", "rnn", "--preset=seed", *TINY[:2], *arguments]) == 0
    assert "torch.nn.GRU" not in capsys.readouterr().out
    model, tokenizer, training = load_checkpoint(output)
    assert tokenizer.name == "bpe"
    assert 1000 < tokenizer.vocab_size == model.config.vocab_size <= 10_000
    assert training["settings"]["optimizer"] == "adam"
    assert training["settings"]["sequence_length"] == 100
    assert main(["generate", str(output), "--max-new-tokens=5", "--prompt", "The class"]) == 0
    assert capsys.readouterr().out.startswith("The class")


def test_full_batch_is_one_step_over_the_text(notes, tmp_path, capsys):
    arguments = ["--batch-size=full", "--optimizer=sgd", "--learning-rate=1", "--steps=3"]
    output = ["--data", str(notes), "--output", str(tmp_path / "rnn"), "--no-compare"]
    assert main(["train", "rnn", *TINY, *arguments, *output]) == 0
    settings = load_checkpoint(tmp_path / "rnn").training["settings"]
    assert settings["batch_size"] == "full"
    streams = (len(load_text()[:27_000].encode()) - 1) // 16
    shown = int(capsys.readouterr().out.split("batches of ")[1].split()[0])
    assert shown == pytest.approx(streams, rel=0.05)


def test_a_finished_run_replaces_the_checkpoint(checkpoint, notes, tmp_path, capsys):
    weights = []
    for seed in (0, 0, 1):
        arguments = ["--data", str(notes), "--output", str(tmp_path / "rnn"), f"--seed={seed}"]
        assert main(["train", "rnn", *TINY, *arguments, "--steps=20", "--no-compare"]) == 0
        weights.append((tmp_path / "rnn" / "best.safetensors").read_bytes())
    assert weights[0] == weights[1] == (checkpoint / "best.safetensors").read_bytes()
    assert weights[0] != weights[2]
    assert [p.name for p in tmp_path.iterdir()] == ["rnn"]
    capsys.readouterr()


def files_of(folder: Path) -> dict[str, Any]:
    """The tensors of a run's checkpoints and what stands beside them, but for the time it took."""
    contents: dict[str, Any] = {}
    for which in ("best", "last"):
        with safe_open(folder / f"{which}.safetensors", "pt") as file:
            contents |= {(which, name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(file.metadata()["training"])
        contents.pop((which, "training.seconds"), None)
        record.get("history", {}).pop("seconds", None)
        contents[which, "record"] = record
    return contents


@pytest.mark.parametrize("model", SIZES)
def test_a_run_that_stops_and_goes_on_is_the_same_to_the_last_bit(model, notes, tmp_path, capsys):
    command = ["train", model, *SIZES[model], "--dropout=0.3", "--data", str(notes), "--no-sample"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--steps=25", "--no-compare", "--output", str(whole)]) == 0
    for stop in (7, 12):  # between two rows of the table, and on one
        arguments = [f"--stop-after={stop}", "--output", str(parts)]
        arguments += ["--steps=25"] if stop == 7 else ["--resume"]
        assert main([*command, *arguments]) == 0
        out = capsys.readouterr().out
        assert f"to be continued with --resume: {stop / 25:.0%} of the run is done" in out
    # Without its options too, and with drawing samples on the way.
    assert main(["train", model, "--resume", "--output", str(parts)]) == 0
    assert "resumed         after step 12 of" in capsys.readouterr().out
    expected, actual = files_of(whole), files_of(parts)
    assert expected.keys() == actual.keys()
    assert any("optimizer.exp_avg_sq" in name for _, name in expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[key], value), key
    assert actual["best", "record"] == expected["best", "record"]
    last = expected["last", "record"]
    assert [step for step, _ in last["history"]["held_out"]][-1] == 25 == last["steps"]
    for key in ("training", "held_out", "tokens"):
        assert actual["last", "record"]["history"][key] == last["history"][key]
    assert main(["train", model, "--resume", "--output", str(parts), "--steps=26"]) == 0
    assert load_checkpoint(parts, "last").training["steps"] == 26, "a finished run made longer"


RESUME = {
    "other sizes": (["--hidden-size=32"], "--hidden-size: 32, but the run in {run} has 16"),
    "another rate": (["--learning-rate=1"], "--learning-rate: 1.0, but the run in {run} has 0.003"),
    "another seed": (["--seed=1"], "--seed: 1, but the run in {run} has 0"),
    "another preset": (["--preset=seed"], "--preset: seed, but the run in {run} has bytes"),
    "other data": (["--data", "{tmp}/other.txt"], "other.txt: is not what the run in {run} learns"),
    "no data": (["--data", "{tmp}/none.txt"], "none.txt: No such file"),
    "done": ([], "the run has done 20 steps; expected --steps or --minutes beyond them"),
    "not beyond": (["--steps=20"], "expected --steps or --minutes beyond them"),
    "stops before": (["--steps=30", "--stop-after=20"], "expected --stop-after beyond them"),
    "nothing there": (["--output", "{tmp}/none"], "{tmp}/none/config.json: No such file"),
    "without state": (["--output", "{tmp}/stateless"], "lacks what continues a run"),
    "half a state": (["--output", "{tmp}/half"], "{tmp}/half: cannot be continued (KeyError("),
    "dry": (["--dry-run"], "--dry-run: has nothing to resume"),
}


@pytest.mark.parametrize("case", RESUME)
def test_resume_refuses(case, checkpoint, notes, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(notes.read_text(encoding="utf-8") + "more")
    with replace_folder(tmp_path / "stateless") as folder:
        model, tokenizer, training = load_checkpoint(checkpoint)
        save_checkpoint(folder, model, tokenizer, training)
    with RunFolder(tmp_path / "half", model, tokenizer, training) as run:
        run.save("last", {}, {"number": torch.tensor(1)})
    before = tree(tmp_path) | tree(checkpoint)
    arguments, message = RESUME[case]
    names = {"tmp": tmp_path, "run": checkpoint}
    arguments = [argument.format(**names) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(checkpoint)]
    assert main(["train", "rnn", "--resume", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(**names) in err
    assert tree(tmp_path) | tree(checkpoint) == before


def test_a_byte_order_mark_changes_no_text(trained, notes, tmp_path, capsys):
    """It is neither learned nor measured on, and a run goes on without it."""
    run, data = tmp_path / "rnn", tmp_path / "marked.txt"
    shutil.copytree(trained[0], run)
    data.write_text(notes.read_text(encoding="utf-8"), encoding="utf-8-sig")
    arguments = ["--data", str(data), "--output", str(run), "--steps=21"]
    assert main(["train", "rnn", "--resume", *arguments]) == 0
    capsys.readouterr()
    printed = []
    for path in (notes, data):
        assert main(["evaluate", str(run), "--data", str(path), "--whole"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_resume_refuses_another_model(checkpoint, capsys):
    assert main(["train", "gpt", "--resume", "--output", str(checkpoint)]) == 2
    assert f"{checkpoint}: is a run of rnn; expected one of gpt" in capsys.readouterr().err


def test_best_is_the_lowest_held_out_loss(notes, tmp_path, capsys):
    """A rate that wrecks the model in the end."""
    rates = ["--learning-rate=0.3", "--schedule=constant", "--warmup=1", "--steps=40"]
    arguments = ["--data", str(notes), "--output", str(tmp_path / "rnn"), "--no-compare"]
    assert main(["train", "rnn", *TINY, *rates, *arguments, "--no-sample"]) == 0
    out = capsys.readouterr().out
    best, last = (load_checkpoint(tmp_path / "rnn", which) for which in ("best", "last"))
    curve = dict(last.training["history"]["held_out"])
    step = min(curve, key=curve.__getitem__)
    assert best.training["steps"] == step < 40 == last.training["steps"]
    assert f"best of step {step}, last of 40" in out
    figures = {}
    for which in ("best", "last"):
        options = [str(tmp_path / "rnn"), "--data", str(notes), "--which", which]
        assert main(["evaluate", *options]) == 0
        figures[which] = float(capsys.readouterr().out.split()[3])
        assert generated(capsys, *options[:1], "--which", which, "--max-new-tokens=9")
    assert figures["best"] == pytest.approx(curve[step], rel=0.02)
    assert figures["last"] == pytest.approx(curve[40], rel=0.02)
    assert figures["best"] < figures["last"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Labels that depend on a word, and sources with targets that are one of their words."""
    generator = random.Random(0)
    folder = tmp_path_factory.mktemp("tables")
    words = ["red", "green", "blue", "tree", "river", "stone", "house", "cloud", "sun", "moon"]
    rows = [generator.choices(words, k=generator.randint(3, 6)) for _ in range(300)]
    lines = [f"{'night' if 'moon' in row else 'day'}\t{' '.join(row)}\n" for row in rows]
    (folder / "labels.tsv").write_text("".join(lines))
    (folder / "pairs.tsv").write_text("".join(f"{' '.join(row)}\t{row[0]}\n" for row in rows))
    return folder


@pytest.mark.parametrize("what", ["rnn", "gpt", "bert", "t5", "bert labels", "t5 pairs"])
def test_dry_run_leaves_nothing(what, notes, tables, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, *table = what.split()
    data = tables / f"{table[0]}.tsv" if table else notes
    assert main(["train", model, "--dry-run", "--data", str(data), "--no-compare"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("dry run         all of it works; nothing was left behind\n")
    assert "cross-entropy" in out
    assert "sample " in out
    assert not list(tmp_path.iterdir())
    assert main(["train", model, "--dry-run", "--data", "none.txt"]) == 2
    assert "none.txt: No such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


DRY = {
    "rnn": (
        ["--hidden-size=24", "--batch-size=full", "--steps=2"],
        ["hidden size 24, num layers 1", " x 16 tokens"],
    ),
    "gpt": (
        ["--num-heads=3", "--num-layers=2", "--steps=3"],
        ["context length 16, num layers 2, num heads 3, embedding dim 18", "batches of 4 x 16 "],
    ),
    "bert": (
        ["--embedding-dim=15", "--context-length=1000", "--vocab-size=1000", "--batch-size=2"],
        ["num layers 1, num heads 1, embedding dim 15", "batches of 2 x 1000 tokens"],
    ),
    "t5": (
        ["--embedding-dim=24", "--num-heads=8", "--feedforward-dim=8", "--minutes=5"],
        ["num layers 1, num heads 8, embedding dim 24, feedforward dim 8", "260 tokens (bpe)"],
    ),
}


@pytest.mark.parametrize("model", DRY)
def test_dry_run_keeps_what_is_given(model, capsys):
    """And what goes with it: a width for the heads, heads for the width, enough of the text."""
    arguments, shown = DRY[model]
    assert main(["train", model, "--dry-run", *arguments, "--no-compare", "--no-sample"]) == 0
    out = capsys.readouterr().out
    for text in shown:
        assert text in out
    steps = [int(line.split()[0]) for line in out.splitlines() if line.endswith("  cpp")]
    assert steps[-1] == {"rnn": 2, "gpt": 3}.get(model, 4)
    if model == "rnn":
        assert int(out.split("batches of ")[1].split()[0]) > 1000, "the whole text"


def test_hmm_learns_goes_on_and_continues(notes, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", "hmm", "--num-states=4", "--sequence-length=100", "--data", str(notes)]
    assert main([*command, "--steps=6", "--output", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"EM of 27\d x 100 tokens at once", printed)
    assert main([*command, "--steps=6", "--stop-after=4", "--output", str(parts)]) == 0
    assert main(["train", "hmm", "--resume", "--output", str(parts)]) == 0
    assert "resumed         after step 4" in capsys.readouterr().out
    expected, actual = load_checkpoint(whole), load_checkpoint(parts)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(actual.model.state_dict()[name], tensor)
    losses = load_checkpoint(whole, "last").training["history"]["training"]
    assert losses == sorted(losses, reverse=True), "no step of EM makes it worse"
    assert len(losses) == 6
    assert main(["evaluate", str(whole)]) == 0
    assert capsys.readouterr().out in printed
    assert generated(capsys, str(whole), "--prompt=The ", "--max-new-tokens=9").startswith("The ")


def test_bayesian_network_counts(notes, tmp_path, capsys):
    output = str(tmp_path / "network")
    assert (
        main(["train", "bayesian-network", "--order=2", "--data", str(notes), "--output", output])
        == 0
    )
    printed = capsys.readouterr().out
    assert "each byte depends on the 2 before it" in printed
    figures = [float(x) for x in re.findall(r"\d+\.\d{4}", printed.split("bits per byte")[1])]
    assert figures[0] < figures[1], "than without the bytes before"
    assert main(["evaluate", output]) == 0
    assert capsys.readouterr().out in printed
    first = generated(capsys, output, "--prompt=The ", "--max-new-tokens=40", "--seed=3")
    assert first.startswith("The ")
    assert generated(capsys, output, "--prompt=The ", "--max-new-tokens=40", "--seed=3") == first
    assert load_checkpoint(output).model.config.order == 2


@pytest.mark.parametrize("model", ["hmm", "bayesian-network"])
def test_dry_run_of_what_has_no_gradients(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["train", model, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("nothing was left behind\n")
    assert not list(tmp_path.iterdir())


def test_compare_prints_a_board_and_draws(notes, tmp_path, capsys):
    picture = tmp_path / "board.png"
    arguments = ["--data", str(notes), "--minutes=0.01", "--output", str(picture)]
    assert main(["compare", "bayesian-network", "gpt", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    heading, network, gpt, curves = (line.split() for line in out.splitlines())
    assert heading == ["model", "bits/byte", "accuracy", "parameters", "steps", "tokens/s", "fused"]
    assert network[0] == "bayesian-network"
    assert network[4] == "1"
    assert network[-1] == "0%"
    assert float(network[1]) < 3
    assert gpt[0] == "gpt"
    assert int(gpt[-1].rstrip("%")) > 30, "of a step is in kernels"
    assert curves == ["curves", str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["board.png"]


def test_compare_refuses(notes, tmp_path, capsys):
    for arguments, message in (
        (["lstm"], "'lstm' cannot be compared; expected of rnn, rnn-tanh, gpt"),
        ([f"--output={notes}"], "is a file of another kind; expected a PNG"),
        (["--data=none.txt"], "none.txt: No such file"),
    ):
        output = [] if "output" in arguments[0] else ["--output", str(tmp_path / "board.png")]
        assert main(["compare", *arguments, *output]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


ADVERSARIAL = {
    "gan": ["--latent-dim=8", "--width=4", "--batch-size=16", "--data={photos}", "--image-size=8"],
    "recurrent-gan": ["--length=12", "--latent-dim=4", "--hidden-size=8", "--batch-size=16"],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of two classes, which a glance tells apart."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    folder = tmp_path_factory.mktemp("photos")
    generator = random.Random(0)
    for name, least in (("dark", 0), ("light", 200)):
        (folder / name).mkdir()
        for i in range(30):
            pixels = bytes(least + generator.randrange(55) for _ in range(64))
            image.frombytes("L", (8, 8), pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("model", ADVERSARIAL)
def test_adversarial_models_are_trained_go_on_and_draw(
    model, photos, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("scipy", reason="needs scipy")
    monkeypatch.setattr(gan_task, "_SERIES", 300)
    monkeypatch.setattr(gan_task, "_HELD_OUT_SERIES", 300)
    monkeypatch.setattr(evaluation_gan, "_CLASSIFIER_STEPS", 20)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", model, *(a.format(photos=photos) for a in ADVERSARIAL[model])]
    assert main([*command, "--steps=5", "--output", str(whole)]) == 0
    printed = capsys.readouterr().out
    unit = {"gan": "FID-like", "recurrent-gan": "KS"}[model]
    assert f"loss {unit:>10} " in printed
    assert f"sample          {whole / 'sample.png'} (" in printed
    pictures = [whole / f"sample-{step}.png" for step in range(1, 6)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert pictures[0].read_bytes() != pictures[4].read_bytes(), "of the same noise, trained more"
    assert main([*command, "--steps=5", "--stop-after=3", "--output", str(parts)]) == 0
    assert main(["train", model, "--resume", "--output", str(parts)]) == 0
    expected, actual = (load_checkpoint(run, "last").model.state_dict() for run in (whole, parts))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    capsys.readouterr()
    assert main(["evaluate", str(whole)]) == 0
    assert capsys.readouterr().out in printed
    labels = load_checkpoint(whole).training["labels"]
    drawn = tmp_path / "drawn.png"
    arguments = [str(whole), "--output", str(drawn), "--num-samples=4", "--label", labels[1]]
    assert f"{drawn}: 4\n" in generated(capsys, *arguments)
    first = drawn.read_bytes()
    generated(capsys, *arguments)
    assert drawn.read_bytes() == first, "the same seed"
    generated(capsys, *arguments, "--seed=1")
    assert drawn.read_bytes() != first
    if model == "recurrent-gan":
        generated(capsys, str(whole), "--output", str(tmp_path / "x.csv"), "--num-samples=4")
        rows = [row.split(",") for row in (tmp_path / "x.csv").read_text().splitlines()]
        assert [row[0] for row in rows] == ["label", *labels, labels[0]]
        assert {len(row) for row in rows} == {13}
    before = tree(tmp_path)
    for options, message in (
        (["--label=7th"], f"--label: '7th'; expected one of {labels[0]}"),
        (["--temperature=1"], f"--temperature: means nothing to this {model}; expected --label"),
        (["--output", str(whole / "config.json")], "expected .png"),
    ):
        assert main(["generate", *arguments[:1], *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--steps=5", "--output", str(whole), "--latent-dim=0"]) == 2
    assert "'--latent-dim'" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_gan_of_images_without_classes(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation_gan, "_CLASSIFIER_STEPS", 20)
    whole, parts, drawn = tmp_path / "whole", tmp_path / "parts", tmp_path / "drawn.png"
    command = ["train", "gan", *(a.format(photos=photos / "dark") for a in ADVERSARIAL["gan"])]
    assert main([*command, "--steps=4", "--output", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert f"sample          {whole / 'sample.png'} (64 images)\n" in printed
    assert "FID-like distance " in printed
    assert "(training images: " in printed
    assert "class " not in printed.partition("FID-like distance")[2]
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    with image.open(whole / "sample-1.png") as picture:
        assert picture.size == (73, 73), "eight by eight"
    assert main([*command, "--steps=4", "--stop-after=2", "--output", str(parts)]) == 0
    assert main(["train", "gan", "--resume", "--output", str(parts)]) == 0
    expected, actual = (load_checkpoint(run, "last").model for run in (whole, parts))
    assert expected.config.num_classes is None
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name
    capsys.readouterr()
    assert main(["evaluate", str(whole)]) == 0
    measured = capsys.readouterr().out
    assert measured in printed
    (tmp_path / "one").mkdir()
    shutil.copytree(photos / "dark", tmp_path / "one" / "class")
    assert main(["evaluate", str(whole), "--data", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out == measured, "a single folder is no class"
    assert f"{drawn}: 64\n" in generated(capsys, str(whole), "--output", str(drawn))
    first = drawn.read_bytes()
    assert first == generated_file(capsys, whole, drawn)
    assert first != generated_file(capsys, whole, drawn, "--seed=1")
    for arguments, message in (
        (["generate", str(whole), "--label=dark"], "--label: 'dark', but there are no classes"),
        (
            ["evaluate", str(whole), "--data", str(photos)],
            "has the classes dark, light; expected n",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def generated_file(capsys, checkpoint: Path, output: Path, *arguments: str) -> bytes:
    generated(capsys, str(checkpoint), "--output", str(output), *arguments)
    return output.read_bytes()


def test_a_series_has_two_numbers_at_least(tmp_path, capsys):
    """One alone has no autocorrelation to be measured."""
    arguments = ["train", "recurrent-gan", "--output", str(tmp_path / "run")]
    assert main([*arguments, "--length=1"]) == 2
    assert "genkernels: Invalid value for '--length': " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--length=2", "--dry-run"]) == 0


def test_gan_refuses(photos, notes, tmp_path, capsys):
    for arguments, message in (
        (["--data", str(tmp_path / "none")], "none: No such file"),
        (["--image-size=9"], "image_size must be 4, 5, 6 or 7 times a power of two above one"),
        (["--image-size=16"], "--data: missing; expected a folder of images"),
        (["--width=6"], "width must be a multiple of num_heads 4, got 6"),
    ):
        output = tmp_path / "gan"
        assert main(["train", "gan", *arguments, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()


def test_an_option_that_means_nothing_is_refused(transformers, capsys):
    assert main(["generate", str(transformers / "bert"), "--prompt=[MASK]", "--seed=1"]) == 2
    err = capsys.readouterr().err
    assert err == "genkernels: --seed: means nothing to this bert; expected --prompt, --top-k\n"


def measures(out: str) -> dict[str, list[float]]:
    """The figures of each line of an evaluation."""
    lines = {line[:15].rstrip(): line[15:] for line in out.splitlines()}
    return {
        name: [float(x) for x in re.findall(r"\d+\.\d+", lines[name])]
        for name in ("cross-entropy", "accuracy", "exact match", "bits per sample")
        if name in lines
    }


def test_bert_learns_labels(tables, tmp_path, capsys):
    output, data = str(tmp_path / "bert"), str(tables / "labels.tsv")
    arguments = ["--data", data, "--output", output, "--steps=60", "--learning-rate=0.01"]
    train = ["train", "bert", *SIZES["bert"], *arguments, "--batch-size=32", "--no-compare"]
    assert main(train) == 0
    printed = capsys.readouterr().out
    assert "270 lines to train on, " in printed
    assert main(["evaluate", output]) == 0
    out = capsys.readouterr().out
    assert out in printed, "the held-out lines of the file that it was trained on"
    found = measures(out)
    assert found["accuracy"][0] > 90 > found["accuracy"][1], "beside the most frequent label"
    assert found["cross-entropy"][0] < 0.3 < found["cross-entropy"][1]
    assert main(["evaluate", output, "--data", data, "--whole"]) == 0
    out = capsys.readouterr().out
    assert "of 300 labels" in out
    assert "by frequency" not in out
    for prompt, label in (("red moon tree", "night"), ("red sun tree", "day")):
        lines = generated(capsys, output, "--prompt", prompt).splitlines()
        assert lines[0].split()[1] == label
        assert float(lines[0].split("%")[0]) > 50 > float(lines[1].split("%")[0])
    config = tmp_path / "bert" / "config.json"
    written = config.read_text()
    config.write_text(written.replace('"night"', "7"))
    assert main(["generate", output, "--prompt", "red"]) == 2
    assert "labels are ['day', 7]; expected 2 texts" in capsys.readouterr().err
    config.write_text(written)
    (tmp_path / "other.tsv").write_text("noon\tred\n" * 20)
    for options, message in (
        (
            ["--data", str(tmp_path / "other.tsv"), "--whole"],
            "label 'noon'; expected one of day",
        ),
        (["--data", str(tables / "pairs.txt")], "is a text, and the model classifies"),
    ):
        assert main(["evaluate", output, *options]) == 2
        assert message in capsys.readouterr().err


def test_t5_learns_pairs(tables, tmp_path, capsys):
    output, data = str(tmp_path / "t5"), str(tables / "pairs.tsv")
    arguments = ["--data", data, "--output", output, "--steps=150", "--learning-rate=0.01"]
    train = ["train", "t5", *SIZES["t5"], *arguments, "--batch-size=32", "--no-compare"]
    assert main([*train, "--no-sample"]) == 0
    printed = capsys.readouterr().out
    assert main(["evaluate", output]) == 0
    out = capsys.readouterr().out
    assert out in printed
    found = measures(out)
    assert found["accuracy"][0] > 90 > found["accuracy"][1]
    assert found["exact match"][0] > 80
    assert generated(capsys, output, "--prompt", "moon red tree", "--temperature=0") == "moon\n"
    several = ["--prompt", "moon red tree", "--num-samples=2", "--temperature=0"]
    assert generated(capsys, output, *several) == "--- sample 1\nmoon\n--- sample 2\nmoon\n"
    (tmp_path / "text.txt").write_text(load_text()[:20_000])
    assert main(["evaluate", output, "--data", str(tmp_path / "text.txt")]) == 2
    assert "text.txt: is a text, and the model answers sources" in capsys.readouterr().err
    (tmp_path / "bad.tsv").write_text("a\tb\n\na b\n")
    assert main([*train, "--data", str(tmp_path / "bad.tsv"), "--output", output]) == 2
    err = capsys.readouterr().err
    assert "bad.tsv: line 3: 0 tabs; expected source, one tab, target" in err


@pytest.fixture(scope="module")
def transformers(notes, tmp_path_factory) -> Path:
    """Checkpoints of gpt, bert and t5 that know very little."""
    folder = tmp_path_factory.mktemp("transformers")
    for model in ("gpt", "bert", "t5"):
        arguments = ["--data", str(notes), "--output", str(folder / model), "--steps=2"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["train", model, *SIZES[model], *arguments, "--no-compare"]) == 0
    return folder


def test_bert_fills_in_what_is_masked(transformers, notes, capsys):
    folder = str(transformers / "bert")
    prompt = "The [MASK] of a [MASK]"
    lines = generated(capsys, folder, "--prompt", prompt, "--top-k=3").splitlines()
    assert lines[-2].startswith("[MASK] 1: ")
    assert lines[-1].startswith("[MASK] 2: ")
    assert lines[-1].count("%") == 3
    assert "[MASK]" not in lines[0]
    assert lines[0].startswith("The")
    assert main(["evaluate", folder]) == 0
    found = measures(capsys.readouterr().out)
    assert len(found["cross-entropy"]) == len(found["accuracy"]) == 2, "beside the unigram model"
    assert "exact match" not in found


def test_a_t5_of_spans_is_not_measured_on_pairs(transformers, tables, capsys):
    assert main(["evaluate", str(transformers / "t5"), "--data", str(tables / "pairs.tsv")]) == 2
    err = capsys.readouterr().err
    assert "pairs.tsv: has sources and targets, and the model restores spans; expected a" in err


def test_t5_prints_spans_with_their_names(transformers, capsys):
    arguments = [str(transformers / "t5"), "--prompt", "The <extra_id_0> of <extra_id_1>"]
    arguments += ["--temperature=3", "--max-new-tokens=300"]
    printed = generated(capsys, *arguments)
    model, tokenizer, _ = load_checkpoint(transformers / "t5")
    source = encode_source("The <extra_id_0> of <extra_id_1>", tokenizer)
    answer = model.generate(source[None], 300, 3.0, generator=torch.Generator().manual_seed(0))
    assert printed == clean_text(spell_answer(answer[0], tokenizer)) + "\n"
    assert "<extra_id_" in printed


@pytest.mark.parametrize("model", ["gpt", "bert", "t5"])
def test_attend_draws_a_picture(model, transformers, tmp_path, capsys):
    arguments = ["attend", str(transformers / model), "--prompt", "A [MASK] $x$ \u0639"]
    output = tmp_path / "map.png"
    assert main([*arguments, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    layer = {"t5": "decoder.0.cross_attention"}.get(model, "blocks.0.attention")
    assert f"attention       {output}: {layer}\n" in out
    looks = out.splitlines()[0]
    assert " looks at " in looks
    assert looks.count("%") == 5
    assert looks.startswith("'[MASK]'") == (model == "bert")
    picture = output.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert main([*arguments, "--output", str(output), "--head=1"]) == 0
    assert output.read_bytes() != picture
    if model == "t5":
        for layer in ("encoder.0.attention", "decoder.0.attention"):
            assert main([*arguments, "--output", str(output), "--layer", layer]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


ATTEND = {
    "no attention": (["{rnn}"], "{rnn}: a rnn has no attention; expected gpt, bert, t5 or"),
    "no such layer": (["{gpt}", "--layer=x"], "--layer: 'x'; expected one of blocks.0.attention"),
    "no such head": (["{gpt}", "--head=2"], "--head: 2; expected from 0 to 1"),
    "too long": (["{gpt}", "--prompt", "x" * 17], "--prompt: 17 tokens; expected at most 16"),
    "no prompt": (["{bert}"], "--prompt: missing; expected a text for the bert to read"),
    "no room": (["{gpt}", "--output={tmp}/none/x.png"], ": {tmp}/none/x.png: No such file"),
    "a folder": (["{gpt}", "--output={tmp}"], ": {tmp}: Is a directory; expected a place"),
    "no file name": (["{gpt}", "--output=/"], ": /: "),
    "another file": (["{gpt}", "--output={gpt}/config.json"], "{gpt}/config.json is a file of"),
}


@pytest.mark.parametrize("case", ATTEND)
def test_attend_refuses(case, transformers, checkpoint, tmp_path, capsys):
    arguments, message = ATTEND[case]
    names = {m: str(transformers / m) for m in ("gpt", "bert")}
    names |= {"rnn": str(checkpoint), "tmp": str(tmp_path)}
    arguments = [argument.format(**names) for argument in arguments]
    if not any("--output" in argument for argument in arguments):
        arguments += ["--output", str(tmp_path / "x.png")]
    assert main(["attend", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(**names) in err
    assert not list(tmp_path.iterdir())


GENERATE = {
    "nothing masked": ("bert", ["--prompt", "a"], "--prompt: nothing to fill in; expected [MASK]"),
    "too long": ("bert", ["--prompt", "[MASK]" * 31], "--prompt: 31 tokens; expected at most 30"),
    "tokens beyond count": (
        "t5",
        ["--prompt=a", "--max-new-tokens", "9" * 30],
        "Invalid value for '--max",
    ),
    "no source": ("t5", [], "--prompt: missing; expected a text for the t5 to read"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses(case, transformers, capsys):
    model, arguments, message = GENERATE[case]
    assert main(["generate", str(transformers / model), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"genkernels: {message}")
    assert err.count("\n") == 1


TRANSFORMERS = {
    "heads": ("gpt", ["--num-heads=3"], "embedding_dim must be a multiple of num_heads 3, got 16"),
    "context": (
        "bert",
        ["--context-length=2"],
        "context_length must be >= 3, [CLS] and [SEP] included, got 2",
    ),
    "full batch": ("gpt", ["--batch-size=full"], "'--batch-size'"),
    "batch beyond count": ("gpt", ["--batch-size", "9" * 30], "'--batch-size'"),
    "short text": ("t5", ["--data={tmp}/short.txt"], "short.txt: too short"),
    "one line": ("bert", ["--data={tmp}/one.tsv"], "one.tsv: nothing to hold out"),
    "three columns": ("bert", ["--data={tmp}/three.tsv"], "line 2: 2 tabs; expected label, one"),
    "one label": ("bert", ["--data={tmp}/SAME.TSV"], "SAME.TSV: every label is 'a'; expected at"),
    "long sequence": ("t5", ["--sequence-length=9999"], "expected at least 9999"),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_refuse(case, notes, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a short text is not enough")
    (tmp_path / "one.tsv").write_text("a\tb\n")
    (tmp_path / "three.tsv").write_text("a\tb\na\tb\tc\n")
    (tmp_path / "SAME.TSV").write_text("".join(f"a\t{i}\n" for i in range(20)))
    before = tree(tmp_path)
    model, arguments, message = TRANSFORMERS[case]
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    common = ["--data", str(notes), "--output", str(tmp_path / "run"), "--no-compare"]
    assert main(["train", model, *SIZES[model], *common, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message in err
    assert tree(tmp_path) == before


def test_a_kill_leaves_a_checkpoint(notes, tmp_path):
    """Whenever it comes, while a run replaces its own files."""
    output = tmp_path / "rnn"
    arguments = ["--data", str(notes), "--output", str(output), "--no-compare", "--no-sample"]
    process = start("train", "rnn", *TINY, *arguments, "--steps=4000")
    rows = 0
    for line in process.stdout:
        rows += line.endswith("  cpp\n")
        if rows == 3:
            break
    process.kill()
    process.communicate()
    for which in ("best", "last"):
        assert 600 <= load_checkpoint(output, which).training["steps"] < 4000
    assert main(["train", "rnn", "--resume", "--output", str(output), "--stop-after=801"]) == 0
    assert load_checkpoint(output, "last").training["steps"] == 801
    assert sorted(p.name for p in output.iterdir() if not p.name.startswith(".")) == [
        "best.safetensors",
        "config.json",
        "last.safetensors",
        "loss.png",
    ]


def test_tensorboard_gets_the_curves(notes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["--data", str(notes), "--output", str(tmp_path / "rnn"), "--no-compare"]
    arguments += ["--tensorboard", str(tmp_path / "curves"), "--steps=4"]
    assert main(["train", "rnn", *TINY, *arguments]) == 0
    curves = EventAccumulator(str(tmp_path / "curves")).Reload()
    held_out = curves.Scalars("held-out, bits/byte")
    expected = load_checkpoint(tmp_path / "rnn", "last").training["history"]["held_out"]
    assert [[e.step, pytest.approx(e.value)] for e in held_out] == expected
    assert len(curves.Scalars("training, bits/byte")) == 4


def test_without_tensorboard(notes, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    arguments = ["--data", str(notes), "--output", str(tmp_path / "rnn"), "--steps=4"]
    arguments += ["--tensorboard", str(tmp_path / "curves")]
    assert main(["train", "rnn", *TINY, *arguments]) == 2
    err = capsys.readouterr().err
    assert err == (
        "genkernels: --tensorboard: needs tensorboard: pip install 'genkernels[tensorboard]'\n"
    )
    assert not list(tmp_path.iterdir())


def generated(capsys, *arguments: str) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_generate_is_a_function_of_its_seed(checkpoint, capsys):
    arguments = [str(checkpoint), "--prompt", "The ", "--max-new-tokens=60"]
    first = generated(capsys, *arguments, "--seed=3")
    assert first.startswith("The ")
    assert len(first) > 20
    assert generated(capsys, *arguments, "--seed=3") == first
    assert generated(capsys, *arguments, "--seed=4") != first
    greedy = generated(capsys, *arguments, "--temperature=0", "--seed=3")
    assert generated(capsys, *arguments, "--temperature=0", "--seed=4") == greedy
    assert generated(capsys, *arguments, "--top-k=1") == greedy
    assert generated(capsys, *arguments, "--top-p=0.0001") == greedy


def test_what_is_printed_as_it_comes_is_the_whole_text(checkpoint, capsys):
    """Of an untrained model: bytes that are no UTF-8, control characters and half characters."""
    arguments = [str(checkpoint), "--prompt", "e", "--max-new-tokens=500", "--temperature=2"]
    printed = generated(capsys, *arguments)
    model, tokenizer, _ = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate(tokenizer.encode("e")[None], 500, 2.0, generator=generator)
    text = clean_text(tokenizer.decode(tokens[0]))
    assert printed == text + "\n"
    assert len(text) > 300
    assert "\ufffd" in text


def test_several_samples_at_once(checkpoint, capsys):
    arguments = [str(checkpoint), "--prompt", "The ", "--max-new-tokens=40", "--num-samples=3"]
    texts = generated(capsys, *arguments).split("--- sample ")[1:]
    assert [text[:6] for text in texts] == ["1\nThe ", "2\nThe ", "3\nThe "]
    assert len({text[2:] for text in texts}) == 3


def test_evaluate_repeats_the_figures_of_training(trained, notes, capsys):
    checkpoint, printed = trained
    assert main(["evaluate", str(checkpoint), "--data", str(notes)]) == 0
    out = capsys.readouterr().out
    assert out in printed
    measures = ["bits per byte", "cross-entropy", "perplexity", "token accuracy"]
    assert [line[:14].rstrip() for line in out.splitlines()] == measures
    assert "(order-3 Markov model: " in out
    assert main(["evaluate", str(checkpoint), "--data", str(notes), "--whole"]) == 0
    whole = capsys.readouterr().out
    assert "Markov" not in whole
    assert f"of {len(notes.read_bytes()) - 1:,} tokens" in whole


def test_evaluate_refuses_a_text_that_has_changed(trained, tmp_path, capsys):
    copy, data = tmp_path / "rnn", tmp_path / "notes.txt"
    shutil.copytree(trained[0], copy)
    data.write_text(load_text()[:40_000], encoding="utf-8")
    config = json.loads((copy / "config.json").read_text())
    config["training"]["data"] = str(data)
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(copy)]) == 2
    assert f"{data}: has changed since {copy} learned from it" in capsys.readouterr().err
    assert main(["evaluate", str(copy), "--whole"]) == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"genkernels {genkernels.__version__}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


EXAMPLES = {
    "": ["genkernels train rnn", 'genkernels generate --prompt "The class"'],
    "train": ["genkernels train rnn --data notes.txt --minutes 2"],
    "train bert": ["genkernels train bert --data labels.tsv --output runs/labels"],
    "train t5": ["genkernels train t5 --data pairs.tsv --output runs/pairs"],
    "attend": ['genkernels attend runs/t5 --prompt "The <extra_id_0> of a class" --head 0'],
    "train hmm": ["genkernels train hmm --data notes.txt --num-states 32"],
    "train bayesian-network": [
        "genkernels train bayesian-network --data notes.txt",
        "genkernels train bayesian-network --data table.csv --output runs/table",
    ],
    "compare": ["genkernels compare --data notes.txt --minutes 2"],
    "train gan": ["genkernels train gan --preset mnist --output runs/mnist"],
    "train recurrent-gan": ["genkernels train recurrent-gan --minutes 5"],
    "train gpt": ["genkernels train gpt --preset nanogpt-cpu --output runs/nanogpt"],
    "train rnn": ["genkernels train rnn --preset seed --output runs/seed"],
    "generate": [
        'genkernels generate runs/rnn --prompt "The class" --temperature 0.7 --seed 1',
    ],
    "evaluate": [
        "genkernels evaluate runs/rnn --data notes.txt --whole",
        "genkernels evaluate runs/gpt --human sheet.html --against runs/rnn",
    ],
    "score": ["genkernels score votes.json --key sheet.key.json"],
    "info": ["GENKERNELS_SIMD=avx2 genkernels info"],
}


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_teaches(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: genkernels" in out
    assert "--help" in out
    lines = [line.strip() for line in out.splitlines()]
    for example in EXAMPLES[command]:
        assert example in lines, "to be copied, so on a line of its own"


def test_help_explains_every_option(capsys):
    commands = [typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        assert all(parameter.help for parameter in command.params), command.name
    assert len(commands) == 17
    assert main(["train", "rnn", "--help"]) == 0
    out = capsys.readouterr().out
    for value in ("hidden-size 384", "hidden-size 512", "learning-rate 0.003"):
        assert value in out


def test_without_arguments_it_shows_the_help(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "Usage: genkernels" in out
    assert err == ""


TRAIN = {
    "no such file": (["--data", "{tmp}/none.txt"], "{tmp}/none.txt: No such file"),
    "a folder": (["--data", "{tmp}"], "{tmp}: no such files in it; expected a folder of .wav"),
    "empty file": (["--data", "{tmp}/empty.txt"], "{tmp}/empty.txt: no text"),
    "not UTF-8": (["--data", "{tmp}/latin1.txt"], "{tmp}/latin1.txt: not UTF-8 at byte 3 (0xe9)"),
    "one sequence is longer": (["--data", "{tmp}/short.txt"], "{tmp}/short.txt: too short"),
    "nothing to hold out": (["--data", "{tmp}/word.txt"], "{tmp}/word.txt: nothing to hold out"),
    "unknown preset": (["--preset", "huge"], "'huge'; expected one of bytes, seed, deep, audio"),
    "negative steps": (["--steps", "-1"], "'--steps'"),
    "no steps": (["--steps", "0"], "'--steps'"),
    "steps in words": (["--steps", "many"], "'--steps'"),
    "no minutes": (["--minutes", "0"], "'--minutes'"),
    "batch size zero": (["--batch-size", "0"], "'--batch-size'"),
    "batch size in words": (["--batch-size", "all"], "neither a positive integer nor full"),
    "vocabulary below bytes": (["--vocab-size", "255"], "'--vocab-size'"),
    "dropout of all": (["--dropout", "1"], "'--dropout'"),
    "more than any machine holds": (
        ["--hidden-size=1000000", "--num-layers=1000"],
        "out of memory (tried to allocate 12000000000000 bytes); expected a smaller model",
    ),
    "units beyond count": (["--hidden-size", "9" * 30], "'--hidden-size'"),
    "tokens beyond count": (["--vocab-size", "9" * 30], "'--vocab-size'"),
    "layers beyond count": (["--num-layers", "10000000"], "'--num-layers'"),
    "endless minutes": (["--minutes", "inf"], "'--minutes': inf is not a finite number"),
    "endless rate": (["--learning-rate", "inf"], "'--learning-rate': inf is not a finite number"),
    "unknown optimizer": (
        ["--optimizer", "lion"],
        "'--optimizer': 'lion' is not one of 'sgd', 'adam', 'adamw'",
    ),
    "unknown schedule": (["--schedule", "linear"], "'constant', 'cosine'"),
    "unknown option": (["--frobnicate"], "No such option: --frobnicate"),
    "output below a file": (["--output", "{tmp}/short.txt/rnn"], "{tmp}/short.txt/rnn: cannot"),
    "output is a file": (["--output", "{tmp}/short.txt"], "{tmp}/short.txt: cannot write there"),
    "output holds other things": (["--output", "{tmp}"], "no part of a checkpoint"),
    "diverges": (
        ["--optimizer=sgd", "--learning-rate=1e38", "--max-grad-norm=0", "--steps=50"],
        "expected a finite number",
    ),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, notes, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"un \xe9t\xe9")
    (tmp_path / "short.txt").write_text("a text too short")
    (tmp_path / "word.txt").write_text("word")
    before = tree(tmp_path)
    arguments, message = TRAIN[case]
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    for option, default in (("--data", str(notes)), ("--output", str(tmp_path / "runs" / "rnn"))):
        if option not in arguments:
            arguments += [option, default]
    assert main(["train", "rnn", *TINY, *arguments, "--no-compare"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(tmp=tmp_path) in err
    assert tree(tmp_path) == before, "nothing may be written"


OTHER = {
    "no command": (["trian"], "No such command 'trian'"),
    "no model": (["train", "lstm"], "No such command 'lstm'"),
    "no checkpoint": (["generate", "{tmp}/none"], "{tmp}/none/config.json: No such file"),
    "nothing to evaluate": (["evaluate", "{tmp}/none"], "{tmp}/none/config.json: No such file"),
    "broken checkpoint": (["generate", "{tmp}/broken"], "not a safetensors file"),
    "broken evaluation": (["evaluate", "{tmp}/broken"], "not a safetensors file"),
    "empty prompt": (["generate", "{run}", "--prompt", ""], "--prompt: empty"),
    "prompt of nothing": (["generate", "{run}", "--prompt", "\x00"], "--prompt: empty"),
    "prompt not UTF-8": (["generate", "{run}", "--prompt", "\udcff"], "--prompt: not UTF-8"),
    "below zero": (["generate", "{run}", "--temperature", "-1"], "'--temperature'"),
    "endless temperature": (["generate", "{run}", "--temperature", "inf"], "'--temperature'"),
    "nothing to hold out": (["evaluate", "{run}", "--data", "{tmp}/x"], "{tmp}/x: nothing to hold"),
    "no number": (["generate", "{run}", "--temperature", "nan"], "'--temperature'"),
    "seed below zero": (["generate", "{run}", "--seed", "-1"], "'--seed'"),
    "seed too large": (["generate", "{run}", "--seed", str(2**64)], "'--seed'"),
    "no probability": (["generate", "{run}", "--top-p", "0"], "'--top-p'"),
    "no samples": (["generate", "{run}", "--num-samples", "0"], "'--num-samples'"),
    "neither best nor last": (["generate", "{run}", "--which", "first"], "'best', 'last'"),
    "no candidates": (["generate", "{run}", "--top-k", "0"], "'--top-k'"),
    "no tokens": (["generate", "{run}", "--max-new-tokens", "0"], "'--max-new-tokens'"),
    "no beam": (
        ["generate", "{run}", "--beam-size=2"],
        "--beam-size: means nothing to this rnn; expected",
    ),
    "no text": (["evaluate", "{run}", "--data", "{tmp}/none.txt"], "none.txt: No such file"),
    "one token": (["evaluate", "{run}", "--data", "{tmp}/x", "--whole"], "expected at least 2"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_commands_refuse(case, checkpoint, tmp_path, capsys):
    (tmp_path / "x").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "broken" / "best.safetensors").write_bytes(b"half")
    before = tree(tmp_path) | tree(checkpoint)
    arguments, message = OTHER[case]
    assert main([a.format(tmp=tmp_path, run=checkpoint) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(tmp=tmp_path) in err
    assert tree(tmp_path) | tree(checkpoint) == before


def test_a_failed_run_leaves_the_last_checkpoint(checkpoint, notes, capsys):
    before = tree(checkpoint.parent)
    arguments = ["--data", str(notes), "--output", str(checkpoint), "--no-compare", "--steps=50"]
    bad = ["--optimizer=sgd", "--learning-rate=1e38", "--max-grad-norm=0"]
    assert main(["train", "rnn", *TINY, *arguments, *bad]) == 2
    capsys.readouterr()
    assert tree(checkpoint.parent) == before


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "genkernels.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def signals_end() -> Iterator[None]:
    """A child would inherit that SIGHUP (under nohup) or SIGINT (behind a shell's &) is ignored."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    previous = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_end")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name
)
def test_interrupt_keeps_what_was_learned(number, notes, tmp_path):
    output = tmp_path / "rnn"
    arguments = ["--data", str(notes), "--output", str(output), "--no-compare"]
    process = start("train", "rnn", *TINY, *arguments, "--steps=4000")
    for line in process.stdout:
        if line.endswith("  cpp\n"):  # the first row of figures
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert err.startswith("genkernels: interrupted after step ")
    training = load_checkpoint(output).training
    assert 200 <= training["steps"] < 4000
    assert [p.name for p in tmp_path.iterdir()] == ["rnn"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_says_that_it_was_interrupted(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(RNNLanguageModel, "stream", interrupt)
    assert main(["generate", str(checkpoint)]) == 130
    assert capsys.readouterr().err == "genkernels: interrupted; nothing was written\n"


def test_interrupt_of_the_sample_keeps_the_checkpoint(notes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RNNLanguageModel, "generate", interrupt)
    output = tmp_path / "rnn"
    arguments = ["--data", str(notes), "--output", str(output), "--no-compare", "--steps=2"]
    assert main(["train", "rnn", *TINY, *arguments, "--no-sample"]) == 130
    err = capsys.readouterr().err
    assert err == f"genkernels: interrupted after step 2; {output} has it, for --resume to go on\n"
    assert load_checkpoint(output).training["steps"] == 2


@pytest.mark.usefixtures("signals_end")
def test_a_terminal_that_is_gone_costs_no_checkpoint(notes, tmp_path):
    output = tmp_path / "rnn"
    arguments = ["--data", str(notes), "--output", str(output), "--no-compare", "--steps=4000"]
    child, terminal = pty.fork()
    if not child:
        command = [sys.executable, "-m", "genkernels.cli", "train", "rnn", *TINY, *arguments]
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
    shown = b""
    while b"  cpp" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)  # the kernel sends SIGHUP
    os.waitpid(child, 0)
    assert load_checkpoint(output).training["steps"] < 4000
    assert [p.name for p in tmp_path.iterdir()] == ["rnn"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("command", ["generate", "info"])
def test_says_that_the_output_cannot_be_written(command, checkpoint, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([command] + [str(checkpoint)] * (command == "generate")) == 2
        monkeypatch.undo()
    err = capsys.readouterr().err
    assert err.startswith("genkernels: stdout: No space left on device")
    assert err.count("\n") == 1


def test_says_which_extra_is_missing():
    code = (
        "import sys; sys.modules['typer'] = sys.modules['safetensors'] = None\n"
        "from genkernels.cli import main; sys.exit(main(['train', 'rnn']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "genkernels: needs typer, safetensors: pip install 'genkernels[train]'\n"
    )
