"""The training loop, evaluation, checkpoints and the timing against torch.nn.GRU."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pickle
import random
import signal
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from safetensors.torch import load, load_file, save, save_file

import genkernels
from genkernels.data import (
    ByteTokenizer,
    InputError,
    load_text,
    sequence_batches,
    split_text,
    train_tokenizer,
)
from genkernels.models import BERT, GPT, BERTConfig, GPTConfig, RNNConfig, RNNLanguageModel
from genkernels.training import (
    Checkpoint,
    RunFolder,
    Training,
    TrainingConfig,
    compare_step_time,
    evaluate,
    evaluate_batches,
    load_checkpoint,
    load_state,
    plot_attention,
    plot_loss,
    replace_folder,
    save_checkpoint,
    train,
)
from genkernels.training import evaluation as evaluation_module
from genkernels.training import plot as plot_module
from genkernels.training.tasks import TASKS
from genkernels.training.tasks.task import frequencies

SMALL = RNNConfig(256, 8, 16)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus():
    return split_text(load_text())


def small_model(config: RNNConfig = SMALL, gru=None) -> RNNLanguageModel:
    torch.manual_seed(0)
    return RNNLanguageModel(config, gru) if gru else RNNLanguageModel(config)


def random_tokens(length: int) -> torch.Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_learns_a_text_by_heart(optimizer, compiled_gru):
    tokens = ByteTokenizer().encode("the quick brown fox jumps over the lazy dog\n" * 40)
    rate = 1.0 if optimizer == "sgd" else 0.01
    config = TrainingConfig(optimizer, rate, batch_size=8, sequence_length=20, steps=150)
    model = small_model(RNNConfig(256, 16, 48))
    losses = [step.loss for step in train(model, sequence_batches(tokens, 8, 20), config)]
    assert losses[0] > 5
    assert losses[-1] < (1.5 if optimizer == "sgd" else 0.3)


def test_full_batch_sgd_is_gradient_descent():
    tokens = random_tokens(100)
    batches = sequence_batches(tokens, "full", 9)
    assert len(batches) == 1
    config = TrainingConfig(
        "sgd", 0.5, schedule="constant", warmup=0, max_grad_norm=0, batch_size="full", steps=4
    )
    model, expected = small_model(), small_model(gru=torch.nn.GRU)
    for _ in range(4):  # theta -= rate * gradient of the mean loss over all of the text
        expected.zero_grad()
        total = torch.zeros(())
        for start in range(0, 99, 9):
            logits, _ = expected(tokens[None, start : start + 9])
            total += F.cross_entropy(logits[0], tokens[start + 1 : start + 10], reduction="sum")
        (total / 99).backward()
        with torch.no_grad():
            for p in expected.parameters():
                p -= 0.5 * p.grad
    assert len(list(train(model, batches, config))) == 4
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Recorder(torch.nn.Module):
    """Answers with its step number as hidden state and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(256))
        self.given: list[float | None] = []

    def loss(self, input, target, state=None):
        assert state is None or not state.requires_grad
        self.given.append(None if state is None else state.item())
        logits = self.weight.expand(target.numel(), 256)
        loss = torch.nn.functional.cross_entropy(logits, target.flatten())
        return loss, self.weight.sum() * 0 + len(self.given)


def test_hidden_state_is_carried_and_starts_over_with_the_text():
    batches = sequence_batches(random_tokens(200), 4, 20)
    assert len(batches) == 3
    recorder = Recorder()
    list(train(recorder, batches, TrainingConfig(steps=7)))
    assert recorder.given == [None, 1, 2, None, 4, 5, None]


def learning_rates(**settings) -> list[float]:
    """The steps of plain SGD on a constant gradient, which are its learning rates."""
    model = Recorder()
    before, rates = model.weight.detach().clone(), []
    batch = sequence_batches(torch.zeros(11, dtype=torch.int64), 1, 10)
    config = TrainingConfig("sgd", 1e-4, max_grad_norm=0, **settings)
    for _ in train(model, batch, config):
        after = model.weight.detach().clone()
        rates.append(((after - before)[0] / (1 - 1 / 256)).item() / 1e-4)
        before = after
    return rates


def test_learning_rate_schedules():
    warm_up = [0.0, 0.5]
    actual = learning_rates(steps=8, schedule="constant", warmup=0.25)
    assert actual == pytest.approx([*warm_up, 1, 1, 1, 1, 1, 1], abs=2e-3)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert learning_rates(steps=8, warmup=0) == pytest.approx(cosine, abs=2e-3)
    higher = [0.2 + 0.8 * rate for rate in cosine]
    actual = learning_rates(steps=8, warmup=0, min_learning_rate=0.2)
    assert actual == pytest.approx(higher, abs=2e-3)


def test_gradients_are_clipped():
    def first_update(max_grad_norm: float) -> float:
        model = small_model()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        config = TrainingConfig(
            "sgd", 1.0, schedule="constant", warmup=0, max_grad_norm=max_grad_norm, steps=1
        )
        list(train(model, sequence_batches(random_tokens(500), 4, 20), config))
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        return (after - before).norm().item()

    free = first_update(0)
    assert free > 0.02
    assert first_update(0.01) == pytest.approx(0.01, rel=1e-3)
    assert first_update(100) == pytest.approx(free)


def test_ends_after_steps_or_minutes():
    batches = sequence_batches(random_tokens(500), 4, 20)
    steps = list(train(small_model(), batches, TrainingConfig(steps=5)))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5]
    assert [step.progress for step in steps] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert all(step.tokens == batches[0][0].numel() and step.seconds > 0 for step in steps)
    steps = list(train(small_model(), batches, TrainingConfig(minutes=0.01)))
    assert len(steps) > 5
    assert sum(step.seconds for step in steps[:-1]) < 0.6
    assert steps[-1].progress == 1
    assert len(list(train(small_model(), batches, TrainingConfig(steps=2, minutes=5)))) == 2
    with pytest.raises(ValueError, match="steps and minutes"):
        TrainingConfig()


def test_says_when_the_loss_is_no_number():
    model = small_model()
    torch.nn.init.constant_(model.linear.bias, math.inf)
    config = TrainingConfig(learning_rate=0.125, steps=50)
    with pytest.raises(FloatingPointError, match=r"step 1;.*learning rate below 0.125"):
        list(train(model, sequence_batches(random_tokens(500), 4, 20), config))


def test_same_seed_same_weights():
    def weights():
        model = small_model(RNNConfig(256, 8, 16, dropout=0.3))
        list(train(model, sequence_batches(random_tokens(500), 4, 20), TrainingConfig(steps=5)))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_evaluation_measures(kind, monkeypatch):
    text = "the cat and the hat and the \u00fcbermut of the bat\n" * 4
    tokenizer = train_tokenizer(text, 256 if kind == "bytes" else 280)
    model = small_model(RNNConfig(tokenizer.vocab_size, 8, 16, dropout=0.5))
    tokens = tokenizer.encode(text)
    result = evaluate(model, tokens, tokenizer.byte_lengths)
    assert model.training
    model.eval()
    logits = model(tokens[None, :-1])[0][0]
    logp = torch.log_softmax(logits.double(), -1)[torch.arange(len(tokens) - 1), tokens[1:]]
    nats = -logp.sum().item()
    scored_bytes = len(text.encode()) - len(tokenizer.decode(tokens[:1]).encode())
    assert result.tokens == len(tokens) - 1
    assert result.cross_entropy == pytest.approx(nats / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.cross_entropy))
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / scored_bytes, rel=1e-5)
    accuracy = (logits.argmax(-1) == tokens[1:]).double().mean().item()
    assert result.token_accuracy == pytest.approx(accuracy)
    monkeypatch.setattr(evaluation_module, "_TOKENS_AT_ONCE", 7)
    assert evaluate(model, tokens, tokenizer.byte_lengths) == pytest.approx(result, rel=1e-5)


def test_evaluation_of_pieces_side_by_side():
    tokens, lengths = random_tokens(100), ByteTokenizer.byte_lengths
    model = small_model().eval()
    result = evaluate(model, tokens, lengths, batch_size=3)
    pieces = [evaluate(model, tokens[33 * i : 33 * i + 34], lengths) for i in range(3)]
    mean = sum(piece.cross_entropy for piece in pieces) / 3
    assert result.cross_entropy == pytest.approx(mean, rel=1e-5)
    assert evaluate(model, tokens[:2], lengths, batch_size=16).tokens == 1
    with pytest.raises(ValueError, match="at least 2"):
        evaluate(model, tokens[:1], lengths)


def test_evaluation_of_weights_that_are_no_numbers():
    model = small_model()
    torch.nn.init.constant_(model.linear.bias, math.nan)
    with pytest.raises(FloatingPointError, match="cross-entropy is nan"):
        evaluate(model, random_tokens(9), ByteTokenizer.byte_lengths)


def test_is_as_good_as_on_torch_gru_at_equal_steps(corpus):
    """Real text, dropout and two layers: the same held-out bits per byte within 0.5%."""
    tokenizer = ByteTokenizer()
    batches = sequence_batches(tokenizer.encode(corpus.training), 32, 64)
    held_out = tokenizer.encode(corpus.held_out)
    config = TrainingConfig(learning_rate=1e-2, steps=60)
    results = []
    for gru in (None, torch.nn.GRU):
        model = small_model(RNNConfig(256, 32, 64, num_layers=2, dropout=0.1), gru)
        losses = [step.loss for step in train(model, batches, config)]
        results.append(evaluate(model, held_out, tokenizer.byte_lengths, batch_size=16))
    ours, theirs = results
    assert losses[-1] < 3.2, "has to have learned something"
    assert ours.bits_per_byte == pytest.approx(theirs.bits_per_byte, rel=0.005)


def test_comparison_leaves_everything_as_it_was():
    model = small_model(RNNConfig(256, 8, 16, dropout=0.5))
    twin = RNNLanguageModel(model.config, gru=torch.nn.GRU)
    (batch,) = sequence_batches(random_tokens(100), "full", 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    result = compare_step_time(model, twin, batch, TrainingConfig(steps=1), seconds=0)
    assert result.model > 0
    assert result.speed_up == pytest.approx(result.baseline / result.model)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = train_tokenizer("the cat and the hat\n" * 20, 270)
    model = small_model(RNNConfig(tokenizer.vocab_size, 8, 16, num_layers=2, dropout=0.1))
    with replace_folder(tmp_path / "model") as folder:
        save_checkpoint(folder, model, tokenizer, {"steps": 3})
    return tmp_path / "model", model, tokenizer


def test_checkpoint_round_trip(checkpoint):
    folder, model, tokenizer = checkpoint
    loaded = load_checkpoint(folder)
    assert loaded.training == {"steps": 3}
    assert loaded.model.config == model.config
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    text = "the hat"
    assert torch.equal(loaded.tokenizer.encode(text), tokenizer.encode(text))
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "last.safetensors",
        "tokenizer.json",
    ]


def test_checkpoint_of_before_there_were_cells(checkpoint):
    """Its config has none, and its model is a GRU."""
    folder, model, _ = checkpoint
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["config"]["cell"]
    path.write_text(json.dumps(values))
    loaded = load_checkpoint(folder).model
    assert loaded.config == model.config
    assert isinstance(loaded.gru, genkernels.nn.GRU)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def edit_weights(folder, edit):
    path = folder / "last.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


BROKEN = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], "No such file"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "config is no UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff"), "not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "format is None"),
    "of another program": (lambda f: edit_config(f, format="other"), "format is 'other'"),
    "another model": (lambda f: edit_config(f, model="lstm"), "model is 'lstm'; expected .* rnn"),
    "sizes missing": (lambda f: edit_config(f, config={"vocab_size": 9}), "config of a model rnn"),
    "sizes of nonsense": (
        lambda f: edit_config(f, config={"vocab_size": "x", "embedding_dim": 1, "hidden_size": 1}),
        "vocab_size",
    ),
    "sizes no dictionary": (lambda f: edit_config(f, config=3), "config of a model rnn"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer unknown": (lambda f: edit_config(f, tokenizer="words"), "words"),
    "tokenizer mismatching": (lambda f: edit_config(f, tokenizer="bytes"), "256 tokens; expected"),
    "config nested too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "not JSON",
    ),
    "size beyond any machine": (
        lambda f: edit_config(
            f, config={"vocab_size": 9, "embedding_dim": 1, "hidden_size": 10**30}
        ),
        "hidden_size must be an int from 1 to 1,000,000, got 1000",
    ),
    "seed is a text": (
        lambda f: edit_config(f, training={"seed": "a"}),
        "seed is 'a'; expected int",
    ),
    "training is null": (lambda f: edit_config(f, training=None), "training is None"),
    "weights missing": (
        lambda f: (f / "last.safetensors").unlink(),
        "best.safetensors: No such file or directory; expected the weights",
    ),
    "weights are a folder": (
        lambda f: [(f / "last.safetensors").unlink(), (f / "last.safetensors").mkdir()],
        "last.safetensors: Is a directory; expected the weights",
    ),
    "weights of another dtype": (
        lambda f: edit_weights(f, lambda w: w.update({"linear.bias": w["linear.bias"].half()})),
        "linear.bias is torch.float16; expected torch.float32",
    ),
    "weights are no numbers": (
        lambda f: edit_weights(f, lambda w: w["linear.bias"].fill_(math.nan)),
        "linear.bias holds NaN",
    ),
    "weights cut off": (
        lambda f: (f / "last.safetensors").write_bytes((f / "last.safetensors").read_bytes()[:-9]),
        "not a safetensors file",
    ),
    "tensor missing": (
        lambda f: edit_weights(f, lambda w: w.pop("linear.bias")),
        "lacks tensor 'linear.bias'",
    ),
    "tensor unknown": (
        lambda f: edit_weights(f, lambda w: w.update(more=torch.zeros(1))),
        "unknown tensor 'more'",
    ),
    "tensor of another shape": (
        lambda f: edit_weights(f, lambda w: w.update({"linear.bias": torch.zeros(3)})),
        r"linear.bias has shape \[3\]; expected \[\d+\] by config.json",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_a_broken_checkpoint(checkpoint, case):
    folder = checkpoint[0]
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_absurd_sizes_take_no_memory(checkpoint):
    folder = checkpoint[0]
    config = json.loads((folder / "config.json").read_text())["config"]
    edit_config(folder, config=config | {"hidden_size": 10**6, "embedding_dim": 10**6})
    with pytest.raises(InputError, match="has shape"):
        load_checkpoint(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_no_pickle_is_read(checkpoint):
    folder = checkpoint[0]
    for name in ("last.safetensors", "config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError):
            load_checkpoint(folder)
        (folder / name).write_bytes(content)


def test_replace_folder_replaces_when_done(checkpoint):
    path, model, tokenizer = checkpoint
    with replace_folder(path) as folder:
        save_checkpoint(folder, model, tokenizer, {"steps": 4})
        assert load_checkpoint(path).training == {"steps": 3}
    assert load_checkpoint(path).training == {"steps": 4}
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_replace_folder_leaves_no_trace_of_a_failure(checkpoint):
    path = checkpoint[0]
    with contextlib.suppress(KeyboardInterrupt), replace_folder(path) as folder:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert load_checkpoint(path).training == {"steps": 3}
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_replace_folder_spares_what_is_no_checkpoint(checkpoint, tmp_path):
    path = checkpoint[0]
    (path / "notes.md").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "folders" / "loss.png").mkdir(parents=True)
    file = tmp_path / "file"
    file.write_text("mine")
    for place, message in [
        (path, "notes.md"),
        (other, "format is None"),
        (file, f"File exists: {file}"),
        (file / "below", f"Not a directory: {file}"),
        (tmp_path / "folders", "loss.png"),
    ]:
        with pytest.raises(InputError, match=message), replace_folder(place):
            pytest.fail("the block must not be entered")
    assert (path / "notes.md").read_text() == "mine"
    assert file.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folders", "model", "other"]
    (tmp_path / "empty").mkdir()
    with replace_folder(tmp_path / "empty") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "empty" / "config.json").exists()


def test_replace_folder_fills_the_working_directory_and_links(checkpoint, tmp_path, monkeypatch):
    path, model, tokenizer = checkpoint
    link = tmp_path / "link"
    link.symlink_to(path)
    (path / ".genkernels-of-a-killed-run").mkdir()
    (path / "loss.png").touch()
    monkeypatch.chdir(path)
    before = os.stat(path)
    for place, steps in ((".", 4), (link, 5), (path, 6)):
        with replace_folder(place) as folder:
            save_checkpoint(folder, model, tokenizer, {"steps": steps})
        assert load_checkpoint(".").training == {"steps": steps}
        assert os.path.samestat(os.stat(path), before)
        assert not (path / "loss.png").exists(), "of the checkpoint that was replaced"
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]
    assert len(list(path.iterdir())) == 4


def test_replace_folder_never_shows_a_mixture(checkpoint, monkeypatch):
    """Wherever the moving is cut short; after an interrupt it is finished."""
    path, model, tokenizer = checkpoint
    replace, moved = os.replace, []

    def killed(source, target):
        if len(moved) == 1:
            raise SystemExit
        moved.append(target)
        replace(source, target)

    def interrupted(source, target):
        replace(source, target)
        monkeypatch.setattr(os, "replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with replace_folder(path) as folder:
        save_checkpoint(folder, model, tokenizer, {"steps": 4})
    assert load_checkpoint(path).training == {"steps": 4}
    assert len(list(path.iterdir())) == 3
    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(SystemExit), replace_folder(path) as folder:
        save_checkpoint(folder, model, tokenizer, {"steps": 5})
    assert moved
    with pytest.raises(InputError, match=r"config.json: No such file"):
        load_checkpoint(path)


def test_a_run_replaces_single_files(checkpoint):
    """The first save replaces what is there, later ones nothing but a file each."""
    path, model, tokenizer = checkpoint
    with contextlib.suppress(KeyboardInterrupt), RunFolder(path, model, tokenizer, {}) as run:
        run.save("best", {"steps": 1}, {})
        raise KeyboardInterrupt
    assert load_checkpoint(path).training == {"steps": 3}, "nothing is seen before the first last"
    with RunFolder(path, model, tokenizer, {"seed": 1}) as run:
        run.save("last", {"steps": 1}, {"number": torch.tensor(1)})
        assert load_checkpoint(path).training == {"seed": 1, "steps": 1}, "the best one is not yet"
        config = os.stat(path / "config.json")
        for steps in (2, 3):
            run.save("best", {"steps": steps}, {})
            run.save("last", {"steps": steps + 1}, {"number": torch.tensor(steps)})
            assert load_checkpoint(path).training["steps"] == steps
            assert load_checkpoint(path, "last").training["steps"] == steps + 1
            assert load_state(path) == {"number": steps}
        assert os.path.samestat(os.stat(path / "config.json"), config)
    assert len(list(path.iterdir())) == 4
    with RunFolder(path, model, tokenizer, {}, resume=True) as run:
        assert load_checkpoint(path).training["steps"] == 3
        run.save("last", {"steps": 5}, {})
    assert load_checkpoint(path).training == {"seed": 1, "steps": 3}
    with pytest.raises(InputError, match=r"last.safetensors: lacks what continues a run"):
        load_state(path)
    with replace_folder(path) as folder:
        save_checkpoint(folder, model, tokenizer, {})
    assert not (path / "best.safetensors").exists(), "of the run that was replaced"


def test_a_kill_while_writing_leaves_whole_checkpoints(checkpoint):
    path, _, tokenizer = checkpoint
    model = small_model(RNNConfig(tokenizer.vocab_size, 64, 256))
    with RunFolder(path, model, tokenizer, {}) as run:
        run.save("best", {"steps": 0}, {})
        run.save("last", {"steps": 0}, {"number": torch.tensor(0)})
        done = 0
        for _ in range(8):
            readable, writable = os.pipe()
            child = os.fork()
            if not child:
                for steps in itertools.count(done + 1):
                    run.save("best", {"steps": steps}, {})
                    run.save("last", {"steps": steps}, {"number": torch.tensor(steps)})
                    os.write(writable, b".")
            os.read(readable, 1)
            time.sleep(0.01 * random.random())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(readable)
            os.close(writable)
            best, last = (load_checkpoint(path, which) for which in ("best", "last"))
            assert best.training["steps"] - last.training["steps"] in (0, 1)
            done = last.training["steps"]
            assert load_state(path) == {"number": done}
    assert done >= 8


def test_an_older_checkpoint_loads(checkpoint):
    """One without best and last, and its training in config.json."""
    path, model, _ = checkpoint
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "last.safetensors").unlink()
    for which in ("best", "last"):
        loaded = load_checkpoint(path, which)
        assert torch.equal(loaded.model.linear.weight, model.linear.weight)
        assert loaded.training == {"steps": 3}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_run_goes_on_where_it_was_saved(optimizer):
    """To the last bit: dropout, the state of the text, the optimizer and the schedule."""
    batches = sequence_batches(random_tokens(700), 4, 20)
    sizes = RNNConfig(256, 8, 16, num_layers=2, dropout=0.3)
    config = TrainingConfig(optimizer, 0.01, warmup=0.3, steps=20)

    def losses(training: Training, count: int) -> list[float]:
        return [step.loss for step in itertools.islice(training, count)]

    whole = Training(small_model(sizes), batches, config)
    expected = losses(whole, 20)
    first = Training(small_model(sizes), batches, config)
    assert len(batches) > 7, "in the middle of the text"
    actual = losses(first, 7)
    saved = save({k: v.clone() for k, v in first.state_dict().items()})
    weights = {k: v.clone() for k, v in first.model.state_dict().items()}
    losses(first, 5)
    torch.manual_seed(99)
    second = Training(RNNLanguageModel(sizes), batches, config)
    second.model.load_state_dict(weights)
    second.load_state_dict(load(saved))
    assert second.progress == pytest.approx(7 / 20)
    actual += losses(second, 20)
    assert actual == expected
    for p, q in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(KeyError):
        second.load_state_dict({})


def test_minutes_go_on_counting():
    config = TrainingConfig(minutes=0.01)
    training = Training(small_model(), sequence_batches(random_tokens(500), 4, 20), config)
    next(iter(training))
    training.load_state_dict(training.state_dict() | {"seconds": torch.tensor(0.59)})
    assert training.progress > 0.98
    assert sum(step.seconds for step in list(training)[:-1]) < 0.1


def test_windows_of_a_context_are_measured():
    config = GPTConfig(256, 8, num_layers=1, num_heads=2, embedding_dim=16)
    torch.manual_seed(0)
    model = GPT(config).eval()
    for length in (2, 9, 10, 45):
        tokens = random_tokens(length)
        result = evaluate(model, tokens, ByteTokenizer.byte_lengths)
        assert result.tokens == length - 1
        nats = 0.0
        for start in range(0, length - 1, 8):
            piece = tokens[start : start + 9]
            logits = model(piece[None, :-1])[0]
            nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
        assert result.cross_entropy == pytest.approx(nats / (length - 1), rel=1e-5)


def test_batches_are_measured_where_there_are_targets():
    def log_prob(model, input, target):
        assert not model.training
        return torch.full((target.numel(),), -2.0), input.flatten()

    model = torch.nn.Linear(1, 1)
    target = torch.tensor([[1, 2, 3], [4, -100, -100], [5, 6, -100]])
    guess = torch.tensor([[1, 2, 3], [4, 9, 9], [5, 9, 9]])
    result = evaluate_batches(
        model, [(guess[:1], target[:1]), (guess[1:], target[1:])], "token", log_prob, has_rows=True
    )
    assert result == (2.0, 5 / 6, 2 / 3, 6, "token")
    assert model.training
    assert evaluate_batches(model, [(guess, target)], "token", log_prob).exact is None


MEASURED = {
    "evaluate": (GPT, lambda m: evaluate(m, random_tokens(9), ByteTokenizer.byte_lengths)),
    "evaluate_batches": (BERT, lambda m: evaluate_batches(m, [(random_tokens(9)[None],) * 2], "")),
    "fill_mask": (BERT, lambda m: m.fill_mask(random_tokens(9)[None])),
    "generate": (GPT, lambda m: m.generate(random_tokens(3)[None], 2)),
}


@pytest.mark.parametrize("is_broken", [False, True])
@pytest.mark.parametrize("name", MEASURED)
def test_modules_get_their_modes_back(name, is_broken):
    """After an error too, and those back into evaluation mode that were in it."""
    model_class, measure = MEASURED[name]
    config = BERTConfig if model_class is BERT else GPTConfig
    model = model_class(config(256, 12, num_layers=2, num_heads=2, embedding_dim=16))
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]

    def look(*args: object) -> None:
        assert not any(module.training for module in model.modules())
        if is_broken:
            raise KeyboardInterrupt

    model.blocks[1].register_forward_hook(look)
    with pytest.raises(KeyboardInterrupt) if is_broken else contextlib.nullcontext():
        measure(model)
    assert [module.training for module in model.modules()] == modes


def test_baseline_of_frequencies():
    known, targets = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 1, 0])
    baseline = frequencies("frequent", known, targets)  # counts, and one more, are 4, 1 and 2 of 7
    cross_entropy = -(2 * math.log(4 / 7) + math.log(1 / 7)) / 3
    assert baseline.figure == pytest.approx(cross_entropy)
    assert baseline.values == [f"{cross_entropy:.4f}", "66.67%"]
    rare = frequencies("frequent", torch.tensor([0]), torch.tensor([3]))  # 2, 1, 1 and 1 of 5
    assert rare.figure == pytest.approx(math.log(5))


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_baseline_of_bert_counts_the_training_part(kind, tmp_path):
    """All of it and nothing else, in training and when a checkpoint is evaluated."""
    if kind == "text":
        lines = [f"Paragraph {i}, which no other one repeats.\n\n" for i in range(200)]
    else:
        lines = [f"{'odd' if i % 3 else 'even'}\tline {i}\n" for i in range(50)]
    data = tmp_path / {"text": "notes.txt", "labels": "labels.tsv"}[kind]
    data.write_text("".join(lines), encoding="utf-8")
    sizes = BERTConfig(256, 16, num_layers=1, num_heads=1, embedding_dim=4)
    task_class = TASKS["bert"].of(data)
    task = task_class(data, sizes, TrainingConfig(batch_size=4, steps=1))
    if kind == "text":
        known = [*task.corpus.training.encode()]
    else:
        known = [task.record["labels"].index(label) for label, _ in task.rows.training]
    targets = torch.cat([target.flatten() for _, target, *_ in task.held_out]).tolist()
    targets = [target for target in targets if target != -100]
    counts = Counter([*known, *range(max(*known, *targets) + 1)])
    expected = [math.log(counts.total() / counts[target]) for target in targets]
    assert task.baseline.figure == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    checkpoint = Checkpoint(BERT(task.sizes), task.tokenizer, task.record)
    assert task_class.measure(checkpoint, data, whole=False)[1] == task.baseline
    assert task_class.measure(checkpoint, data, whole=True)[1] is None


def test_replace_folder_makes_no_folder_in_vain(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), replace_folder(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"^/: (holds|cannot)"), replace_folder("/"):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize(
    ("heads", "rows", "columns", "grid"),
    [(1, 3, 3, (1, 1)), (6, 40, 40, (2, 3)), (7, 5, 3, (2, 4)), (9, 3, 5, (3, 3))],
)
def test_heads_are_drawn_in_a_grid_that_can_be_read(
    heads, rows, columns, grid, tmp_path, monkeypatch
):
    figures, make = [], plot_module._figure
    monkeypatch.setattr(plot_module, "_figure", lambda *a: figures.append(make(*a)) or figures[-1])
    weights = torch.randn(heads, rows, columns).softmax(-1)
    names = [[f"' documentation{i}$x$'" for i in range(n)] for n in (rows, columns)]
    plot_attention(tmp_path / "a.png", weights, *names, "blocks.0.attention")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    *pictures, bar = figures[0].axes
    assert len(pictures) == heads
    assert bar.get_ylabel()
    images = [picture.images[0] for picture in pictures]
    assert {image.get_clim() for image in images} == {(0, weights.max().item())}, "one colour bar"
    for head, image in enumerate(images):
        assert torch.equal(torch.tensor(image.get_array().data), weights[head])
    places = [picture.get_position() for picture in pictures]
    for side, count in zip(("y0", "x0"), grid, strict=True):
        assert len({round(getattr(place, side), 3) for place in places}) == count
    for picture in pictures:
        for axis, texts in ((picture.yaxis, names[0]), (picture.xaxis, names[1])):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            assert [label.get_text() for label in labels] in ([], texts)
            boxes = [label.get_window_extent() for label in labels]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
            assert all(figures[0].bbox.fully_containsx(x) for b in boxes for x in (b.x0, b.x1))
            assert all(figures[0].bbox.fully_containsy(y) for b in boxes for y in (b.y0, b.y1))
    assert pictures[0].get_yticklabels()[0].get_text()
    assert pictures[-1].get_xticklabels()[0].get_text()
    assert pictures[grid[1] - 1].get_xticklabels()[0].get_text() or heads == grid[0] * grid[1]


def test_a_picture_of_many_heads_is_not_too_large_to_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_module, "_LONGEST_SIDE", 150)
    plot_attention(tmp_path / "a.png", torch.ones(30, 1, 1), ["a"], ["a"], "")
    height, width, _ = imread(tmp_path / "a.png").shape
    assert 145 < height <= 150 > width


def test_loss_curve_is_a_png(tmp_path):
    path = tmp_path / "loss.png"
    markov = "order-3 Markov model", 2.0
    plot_loss(path, [(1, 8.0), (2, 7.0)], [], markov, "bits/byte")
    assert path.read_bytes().startswith(b"\x89PNG")
    empty = path.read_bytes()
    plot_loss(path, [(1, 8.0), (2, 7.0)], [(1, 7.9), (2, 7.2)], markov, "bits/byte")
    assert path.read_bytes() != empty
