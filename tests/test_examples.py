"""The examples, run as a reader runs them."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# The one line by which a script differs from the same in plain PyTorch.
IMPORTS = {
    "word_language_model.py": ("from genkernels.nn import GRU\n", "from torch.nn import GRU\n"),
    "gpt.py": (
        "from genkernels import scaled_dot_product_attention\n",
        "from torch.nn.functional import scaled_dot_product_attention\n",
    ),
}


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )


def losses(output: str) -> list[float]:
    lines = [line.split() for line in output.splitlines()]
    return [float(line[line.index("loss") + 1]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def seed_rnn():
    spec = importlib.util.spec_from_file_location("seed_rnn", EXAMPLES / "seed_rnn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "sizes"),
    [
        (
            "word_language_model.py",
            ["--embedding-dim=32", "--hidden-size=64", "--vocab-size=500"],
        ),
        ("gpt.py", ["--layers=2", "--width=32", "--context=64", "--batch-size=8", "--length=20"]),
    ],
)
def test_script_and_its_torch_twin(script, sizes, tmp_path):
    source = (EXAMPLES / script).read_text(encoding="utf-8")
    of_genkernels, of_torch = IMPORTS[script]
    assert source.count(of_genkernels) == 1
    twin = tmp_path / "twin.py"
    twin.write_text(source.replace(of_genkernels, of_torch), encoding="utf-8")
    arguments = ["--steps=40", "--log-interval=4", *sizes]
    ours, theirs = (run(path, *arguments) for path in (EXAMPLES / script, twin))
    assert ours.returncode == 0, ours.stderr
    assert theirs.returncode == 0, theirs.stderr
    curve = losses(ours.stdout)
    assert len(curve) == 11, "ten of training, one held out"
    assert curve[-2] < curve[0] - 0.5
    assert curve == pytest.approx(losses(theirs.stdout), rel=1e-3)


@pytest.mark.parametrize("script", ["gpt.py", "seed_rnn.py", "word_language_model.py"])
def test_bad_input_gets_one_clear_answer(script, tmp_path):
    done = run(EXAMPLES / script, "--data", str(tmp_path / "none.txt"))
    assert done.returncode == 2
    assert "none.txt" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_seed_rnn_runs_as_a_script():
    arguments = ["--steps=20", "--rnn-units=32", "--embedding-dim=16", "--length=40"]
    done = run(EXAMPLES / "seed_rnn.py", *arguments, "--prompt", "The class")
    assert done.returncode == 0, done.stderr
    curve = losses(done.stdout)
    assert len(curve) == 10
    assert curve[-1] < curve[0] - 0.5
    assert "The class" in done.stdout


def test_seed_rnn_hands_the_state_on(seed_rnn, monkeypatch):
    torch.manual_seed(0)
    model = seed_rnn.RNN(vocab_size=20, embedding_dim=8, rnn_units=16, batch_size=4)
    assert model.initialize_hidden_state().tolist() == torch.zeros(1, 4, 16).tolist()
    text = torch.randint(20, (4 * 30 + 1,))
    given, returned = [], []

    def spy(model, optimizer, x, y, hidden):
        given.append(hidden)
        loss, state = train_step(model, optimizer, x, y, hidden)
        returned.append(state)
        return loss, state

    train_step = seed_rnn.train_step
    monkeypatch.setattr(seed_rnn, "train_step", spy)
    seed_rnn.train_rnn(model, text, sequence_length=10, steps=4)
    assert not given[0].any()
    assert given[1] is returned[0]
    assert given[2] is returned[1]
    assert returned[0].any()
    assert not given[3].any(), "a new pass over the text starts from zeros"


@pytest.mark.parametrize("length", [5, 50])
def test_seed_rnn_loss_is_a_mean(seed_rnn, length):
    torch.manual_seed(0)
    model = seed_rnn.RNN(vocab_size=20, embedding_dim=8, rnn_units=16, batch_size=4)
    (loss,) = seed_rnn.train_rnn(model, torch.randint(20, (1000,)), length, steps=1)
    assert loss == pytest.approx(math.log(20), rel=0.1), "nats per token, whatever the length"


def test_seed_rnn_predicts_with_the_state(seed_rnn):
    torch.manual_seed(0)
    model = seed_rnn.RNN(vocab_size=5, embedding_dim=8, rnn_units=32, batch_size=4)
    text = torch.tensor([0, 1, 0, 2]).repeat(200)  # after 0: what it was not last time
    seed_rnn.train_rnn(model, text, sequence_length=20, steps=80, learning_rate=2e-2)
    assert seed_rnn.predict(model, text[:5], 8, temperature=0.1).tolist() == text[:13].tolist()
