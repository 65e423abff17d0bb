"""`genkernels` with a seq2seq: pairs of a file, dates where none is given, and beams."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from pathlib import Path

import pytest
import torch
from test_cli import files_of, generated, measures, tree

from genkernels.cli import main
from genkernels.data import DATES, load_pairs
from genkernels.training import load_checkpoint
from genkernels.training.tasks.task import split_rows

TINY = ["--embedding-dim=16", "--hidden-size=64", "--batch-size=32", "--no-compare"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Sources with the first of their words for a target."""
    generator = random.Random(0)
    words = ["red", "green", "blue", "tree", "river", "stone", "house", "cloud", "sun", "moon"]
    rows = [generator.choices(words, k=generator.randint(3, 6)) for _ in range(2_000)]
    path = tmp_path_factory.mktemp("tables") / "pairs.tsv"
    path.write_text("".join(f"{' '.join(row)}\t{row[0]}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory) -> tuple[str, str]:
    """A checkpoint, and what its training printed."""
    folder = str(tmp_path_factory.mktemp("runs") / "seq2seq")
    arguments = ["--data", str(pairs), "--output", folder, "--steps=250", "--learning-rate=0.01"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", "seq2seq", *TINY, *arguments, "--vocab-size=300"]) == 0
    return folder, printed.getvalue()


def test_learns_pairs(trained, capsys):
    folder, printed = trained
    assert "1,800 lines to train on, " in printed
    assert "  cpp\n" in printed
    assert " -> " in printed
    assert main(["evaluate", folder]) == 0
    out = capsys.readouterr().out
    assert out in printed, "the held-out lines of the file that it was trained on"
    found = measures(out)
    assert found["accuracy"][0] > 90 > found["accuracy"][1], "beside the unigram model"
    assert found["exact match"][0] > 80


def test_answers(trained, capsys):
    """Greedily by default, and with a beam."""
    for options in ([], ["--temperature=0"], ["--beam-size=3"]):
        assert generated(capsys, trained[0], "--prompt=moon red tree", *options) == "moon\n"
    several = ["--prompt=moon red tree", "--num-samples=2"]
    assert generated(capsys, trained[0], *several) == "--- sample 1\nmoon\n--- sample 2\nmoon\n"
    drawn = {
        generated(capsys, trained[0], "--prompt=moon", "--temperature=9", f"--seed={seed}")
        for seed in (0, 1)
    }
    assert len(drawn) == 2
    assert "extra_id" not in generated(capsys, trained[0], "--prompt=<extra_id_0>")


def test_attends(trained, tmp_path, capsys):
    output = tmp_path / "map.png"
    arguments = ["attend", trained[0], "--prompt", "moon red tree", "--output", str(output)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"attention       {output}: decoder.cross_attention\n" in out
    assert out.startswith("end looks at ")
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_stops_and_goes_on_is_the_same_to_the_last_bit(pairs, tmp_path, capsys):
    command = ["train", "seq2seq", *TINY, "--data", str(pairs), "--num-layers=2", "--dropout=0.3"]
    command += ["--no-bidirectional", "--no-sample"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--steps=25", "--output", str(whole)]) == 0
    assert main([*command, "--steps=25", "--stop-after=7", "--output", str(parts)]) == 0
    assert main(["train", "seq2seq", "--resume", "--output", str(parts)]) == 0
    assert "bidirectional False" in capsys.readouterr().out
    expected, actual = files_of(whole), files_of(parts)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[key], value), key
    assert actual["best", "record"] == expected["best", "record"]


@pytest.mark.parametrize("model", ["seq2seq", "t5"])
def test_dates_are_there_without_a_file(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = [] if model == "seq2seq" else ["--data=dates"]
    assert main(["train", model, "--dry-run", *data]) == 0
    out = capsys.readouterr().out
    assert "data            dates: 180 lines to train on, 20 held out\n" in out
    assert "speed-up " in out
    assert "exact match" in out
    assert out.endswith("dry run         all of it works; nothing was left behind\n")
    assert not list(tmp_path.iterdir())


def test_a_run_on_dates_knows_its_data(tmp_path, capsys):
    folder = str(tmp_path / "seq2seq")
    train = ["train", "seq2seq", *TINY, "--no-sample", "--output", folder]
    assert main([*train, "--steps=2", "--stop-after=1"]) == 0
    assert main(["train", "seq2seq", "--resume", "--output", folder]) == 0
    assert load_checkpoint(folder).training["data"] == DATES
    printed = capsys.readouterr().out
    assert main(["evaluate", folder]) == 0
    assert capsys.readouterr().out in printed


def test_no_date_is_on_both_sides():
    training, held_out = split_rows(load_pairs(DATES))
    assert len(training) > 13_000
    assert len(held_out) > 1_400
    assert not {date for _, date in training} & {date for _, date in held_out}


REFUSED = {
    "no pairs": (["train", "seq2seq", "--data={tmp}/text.txt"], "line 1: 0 tabs; expected source"),
    "one line": (["train", "seq2seq", "--data={tmp}/one.tsv"], "one.tsv: nothing to hold out"),
    "no file": (["train", "seq2seq", "--data={tmp}/none.tsv"], "none.tsv: No such file"),
    "odd width": (["train", "seq2seq", "--hidden-size=31"], "hidden_size must be even for two"),
    "full batch": (["train", "seq2seq", "--batch-size=full"], "'--batch-size'"),
    "another model": (["train", "t5", "--resume", "--output={run}"], "is a run of seq2seq"),
    "not that way": (
        ["train", "seq2seq", "--resume", "--output={run}", "--no-bidirectional"],
        "--bidirectional: False, but the run in {run} has True",
    ),
    "no source": (["generate", "{run}"], "--prompt: missing; expected a text for the seq2seq"),
    "no beam": (["generate", "{run}", "--prompt=a", "--beam-size=0"], "'--beam-size'"),
    "drawn and not": (
        ["generate", "{run}", "--prompt=a", "--beam-size=2", "--temperature=1"],
        "--beam-size: draws nothing; expected it without --temperature, --top-k",
    ),
    "not measured": (["evaluate", "{run}", "--data={tmp}/text.txt"], "line 1: 0 tabs; expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("no pairs in here\n" * 100)
    (tmp_path / "one.tsv").write_text("a\tb\n")
    before = tree(tmp_path) | tree(Path(trained[0]))
    arguments, message = REFUSED[case]
    names = {"tmp": tmp_path, "run": trained[0]}
    arguments = [argument.format(**names) for argument in arguments]
    if arguments[0] == "train" and not any("--output" in argument for argument in arguments):
        arguments[2:2] = [*TINY, f"--output={tmp_path / 'run'}"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(**names) in err
    assert tree(tmp_path) | tree(Path(trained[0])) == before


def test_help_teaches(capsys):
    assert main(["train", "seq2seq", "--help"]) == 0
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert "genkernels train seq2seq --data pairs.tsv --preset words --output runs/pairs" in lines
    assert "hidden-size 256" in out
