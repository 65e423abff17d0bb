"""Checkpoints: a folder of safetensors weights, JSON config and the tokenizer. Never a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data import BPETokenizer, InputError, Tokenizer, load_tokenizer
from ..models import RNNConfig, RNNLanguageModel

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
LOSS_CURVE = "loss.png"
FILES = {CONFIG, WEIGHTS, LOSS_CURVE, BPETokenizer.file}
FORMAT = "genkernels-1"
_TEMPORARY = ".genkernels-"


class Checkpoint(NamedTuple):
    """A trained model, its tokenizer, and what its training wrote down."""

    model: RNNLanguageModel
    tokenizer: Tokenizer
    training: dict[str, Any]


def save_checkpoint(
    folder: Path, model: RNNLanguageModel, tokenizer: Tokenizer, training: dict[str, Any]
) -> None:
    """Write model, tokenizer and `training` (anything JSON takes) into an existing folder.

    Use it inside `replace_folder`, so that a reader never meets half of a checkpoint.
    """
    from safetensors.torch import save

    # Not save_file: it lets nobody but this user read the file.
    (folder / WEIGHTS).write_bytes(save(model.state_dict()))
    tokenizer.save(folder)
    config = {
        "format": FORMAT,
        "model": model.name,
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer.name,
        "training": training,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Load what `save_checkpoint` wrote.

    Raises:
        InputError: no checkpoint there, a broken file, or files that do not fit together.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        model_config = RNNConfig(**config["config"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: not the config of an rnn ({error})") from error
    tokenizer = load_tokenizer(config["tokenizer"], folder)
    if tokenizer.vocab_size != model_config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens; "
            f"expected {model_config.vocab_size} by {CONFIG}"
        )
    weights = _read_weights(folder / WEIGHTS, model_config)
    model = RNNLanguageModel(model_config)
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), tokenizer, config["training"])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; expected the folder of a checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not JSON ({error})") from error
    expected = {"format": FORMAT, "model": RNNLanguageModel.name}
    for key, value in expected.items():
        found = config.get(key) if isinstance(config, dict) else None
        if found != value:
            raise InputError(f"{path}: {key} is {found!r}; expected {value!r}")
    for key in ("config", "tokenizer", "training"):
        if key not in config:
            raise InputError(f"{path}: lacks {key!r}")
    if not isinstance(config["training"], dict):
        raise InputError(f"{path}: training is {config['training']!r}; expected an object")
    return config


def _read_weights(path: Path, config: RNNConfig) -> dict[str, torch.Tensor]:
    """Read the weights and compare them with what `config` asks for."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb"):  # names the fault of a file that cannot be read; load_file does not
            weights = load_file(path)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; expected the weights of a checkpoint"
        ) from error
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    # On meta: a config with absurd sizes fails here before any memory is taken.
    with torch.device("meta"):
        expected = RNNLanguageModel(config).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            kind = "lacks" if name in expected else "has an unknown"
            raise InputError(f"{path}: {kind} tensor {name!r}; expected those of {CONFIG}")
        found, wanted = list(weights[name].shape), list(expected[name].shape)
        if found != wanted:
            raise InputError(f"{path}: {name} has shape {found}; expected {wanted} by {CONFIG}")
        if weights[name].dtype != expected[name].dtype:
            raise InputError(
                f"{path}: {name} is {weights[name].dtype}; expected {expected[name].dtype}"
            )
        if not weights[name].isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinity; expected finite numbers")
    return weights


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to write into, and move its files to `path` when the block ends well.

    The empty folder is made inside `path` at once, so that a place that cannot be written to is
    found before the work; if the block raises, it is removed and what stands at `path` stays as it
    was. `path` itself is filled in place, since it may be a link, a mount point or the working
    directory. The old config.json goes first and the new one comes last: a reader meets a whole
    checkpoint or none, even after a kill between the two, which leaves the rest in `.genkernels-*`.

    Raises:
        InputError: the place cannot be written to, or holds something other than a checkpoint.
    """
    path = Path(path).absolute()
    try:
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        _check_replaceable(path)
        temporary = tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write there ({error.strerror}: {error.filename}); "
            "expected a folder in a writable place"
        ) from error
    try:
        with temporary as name:
            folder = Path(name)
            yield folder
            stale = FILES.difference(os.listdir(folder)) | {CONFIG}
            try:
                for file in stale:
                    (path / file).unlink(missing_ok=True)
                _move_files(folder, path)
            except KeyboardInterrupt:  # too late to stop: the old checkpoint is gone
                _move_files(folder, path)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: all went well
                path.rmdir()


def _move_files(source: Path, target: Path) -> None:
    for file in sorted(os.listdir(source), key=CONFIG.__eq__):  # config.json last
        os.replace(source / file, target / file)


def _check_replaceable(path: Path) -> None:
    """Let only an empty folder or one of our own checkpoints be replaced, never a user's files."""
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(_TEMPORARY)]
    foreign = sorted(entry.name for entry in entries if entry.name not in FILES or entry.is_dir())
    if foreign:
        raise InputError(
            f"{path}: holds {foreign[0]!r}, which is no part of a checkpoint; "
            "expected a new or empty folder, or a checkpoint to replace"
        )
    if entries:
        _read_config(path)
