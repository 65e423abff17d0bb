"""Checkpoints: a folder of JSON config, a tokenizer and safetensors weights. Never a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..data import (
    AudioTokenizer,
    BPETokenizer,
    InputError,
    Tokenizer,
    load_tokenizer,
    replace_file,
)
from ..data.files import TEMPORARY
from ..models import MODELS

Which = Literal["best", "last"]

CONFIG = "config.json"
WEIGHTS: dict[Which, str] = {"best": "best.safetensors", "last": "last.safetensors"}
ONLY_WEIGHTS = "model.safetensors"  # of a checkpoint that an older version wrote
LOSS_CURVE = "loss.png"
FILES = {CONFIG, *WEIGHTS.values(), ONLY_WEIGHTS, LOSS_CURVE, BPETokenizer.file}
FORMAT = "genkernels-1"
_SAMPLE = re.compile(r"sample(-\d+)?\.(png|wav)")
# Before the names of tensors that continue a run. No weight has it: `training` is a module's mode.
_STATE = "training."
_METADATA = "training"


class Checkpoint(NamedTuple):
    """A trained model, its tokenizer, and what its training wrote down.

    tokenizer: a `Tokenizer`, or of sound an `AudioTokenizer`; None of a model that reads no tokens.
    """

    model: Any
    tokenizer: Any
    training: dict[str, Any]


class RunFolder(contextlib.ExitStack):
    """The folder of a run, in which a reader finds whole checkpoints only, also after a kill.

    The first `save` replaces what stands at `path` as `replace_folder` does, by config.json, the
    tokenizer and the weights; until then nothing but a temporary folder is there, and an error
    leaves no trace. Each later one replaces single files, so that there are whole ones at any
    time. `resume` goes on with the files that are there.

    Raises:
        InputError: the place cannot be written to, or holds something other than a checkpoint.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        tokenizer: Tokenizer | AudioTokenizer | None,
        training: dict[str, Any],
        resume: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.saved: dict[str, Any] | None = None  # the `training` of the last "last"
        self._model = model
        self._config = model, tokenizer, training
        self._folder = path if resume else self.enter_context(replace_folder(path))

    def save(self, which: Which, training: dict[str, Any], state: Mapping[str, Tensor]) -> None:
        """Write the weights; `training` is anything JSON takes, `state` what continues the run.

        Nobody sees what is written before the first "last".
        """
        if self._folder != self.path:  # not before: what a model learns may change its sizes
            save_config(self._folder, *self._config)
        with replace_file(self._folder / WEIGHTS[which]) as path:
            save_weights(path, self._model, training, state)
        if which == "last":
            self.close()
            self._folder = self.path
            self.saved = training


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    tokenizer: Tokenizer | AudioTokenizer | None,
    training: dict[str, Any],
) -> None:
    """Write model, tokenizer and `training` (anything JSON takes) into an existing folder.

    Use it inside `replace_folder`, so that a reader never meets half of a checkpoint.
    """
    save_config(folder, model, tokenizer, training)
    save_weights(folder / WEIGHTS["last"], model, {}, {})


def save_config(
    folder: Path,
    model: nn.Module,
    tokenizer: Tokenizer | AudioTokenizer | None,
    training: dict[str, Any],
) -> None:
    if tokenizer:
        tokenizer.save(folder)
    config = {
        "format": FORMAT,
        "model": model.name,
        "config": dataclasses.asdict(model.config),  # type: ignore[call-overload]
        "tokenizer": tokenizer and tokenizer.name,
        "training": training,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_weights(
    path: Path, model: nn.Module, training: dict[str, Any], state: Mapping[str, Tensor]
) -> None:
    from safetensors.torch import save

    tensors = model.state_dict() | {_STATE + name: tensor for name, tensor in state.items()}
    # Not save_file: it lets nobody but this user read the file.
    path.write_bytes(save(tensors, {_METADATA: json.dumps(training)}))


def load_checkpoint(folder: str | os.PathLike[str], which: Which = "best") -> Checkpoint:
    """Load what `RunFolder` or `save_checkpoint` wrote.

    "best" are the weights with the lowest held-out loss; before the first was measured, the last.

    Raises:
        InputError: no checkpoint there, a broken file, or files that do not fit together.
    """
    folder = Path(folder)
    config = _read_config(folder)
    config_class, model_class = MODELS[config["model"]]
    try:
        model_config = config_class(**config["config"])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{folder / CONFIG}: not the config of a model {config['model']} ({error})"
        ) from error
    vocab_size = getattr(model_config, "vocab_size", None)
    has_tokens = vocab_size is not None or config["tokenizer"] is not None
    tokenizer = load_tokenizer(config["tokenizer"], folder) if has_tokens else None
    if tokenizer and tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens; "
            f"expected {vocab_size} by {CONFIG}"
        )
    # On meta: a config with absurd sizes fails here before any memory is taken.
    with torch.device("meta"):
        expected = model_class(model_config).state_dict()
    path = _weights_path(folder, which)
    weights, training = _read_tensors(path, is_state=False)
    _check_weights(path, weights, expected)
    training = config["training"] | training
    _check_training(folder, training)
    model = model_class(model_config)
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), tokenizer, training)


def load_state(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load the `state` that continues the run in `folder`.

    Raises:
        InputError: the last checkpoint there has none, or cannot be read.
    """
    path = Path(folder) / WEIGHTS["last"]
    state, _ = _read_tensors(path, is_state=True)
    if not state:
        raise InputError(f"{path}: lacks what continues a run; expected that of `genkernels train`")
    return state


def _weights_path(folder: Path, which: Which) -> Path:
    names = [WEIGHTS[which], WEIGHTS["last"], ONLY_WEIGHTS]
    paths = [folder / name for name in names]
    return next((path for path in paths if path.exists()), paths[0])


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
    for key, expected in (("format", [FORMAT]), ("model", list(MODELS))):
        found = config.get(key) if isinstance(config, dict) else None
        if found not in expected:
            raise InputError(f"{path}: {key} is {found!r}; expected {' or '.join(expected)}")
    for key in ("config", "tokenizer", "training"):
        if key not in config:
            raise InputError(f"{path}: lacks {key!r}")
    if not isinstance(config["training"], dict):
        raise InputError(f"{path}: training is {config['training']!r}; expected an object")
    return config


def _read_tensors(path: Path, is_state: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights, or what continues a run, with what training wrote down beside them."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb"):  # names the fault of a file that cannot be read; safe_open does not
            pass
        with safe_open(path, "pt") as file:
            tensors = {
                name.removeprefix(_STATE): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 (not a mapping)
                if name.startswith(_STATE) == is_state
            }
            training = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; expected the weights of a checkpoint"
        ) from error
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: what training wrote down is not JSON ({error})") from error
    if not isinstance(training, dict):
        raise InputError(f"{path}: training is {training!r}; expected an object")
    return tensors, training


def _check_training(folder: Path, training: dict[str, Any]) -> None:
    for key, kind in {"data": str, "seed": int, "length": int}.items():
        if key in training and type(training[key]) is not kind:
            raise InputError(f"{folder}: {key} is {training[key]!r}; expected {kind.__name__}")


def _check_weights(path: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
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
        temporary = tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write there ({error.strerror}: {error.filename}); "
            "expected a folder in a writable place"
        ) from error
    try:
        with temporary as name:
            folder = Path(name)
            yield folder
            stale = set(filter(_is_own, os.listdir(path))).difference(os.listdir(folder))
            try:
                for file in stale | {CONFIG}:
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


def _is_own(name: str) -> bool:
    """Return whether a run may have written a file of that name."""
    return name in FILES or _SAMPLE.fullmatch(name) is not None


def _check_replaceable(path: Path) -> None:
    """Let only an empty folder or one of our own checkpoints be replaced, never a user's files."""
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(TEMPORARY)]
    foreign = sorted(entry.name for entry in entries if not _is_own(entry.name) or entry.is_dir())
    if foreign:
        raise InputError(
            f"{path}: holds {foreign[0]!r}, which is no part of a checkpoint; "
            "expected a new or empty folder, or a checkpoint to replace"
        )
    if entries:
        _read_config(path)
