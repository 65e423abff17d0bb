"""`genkernels compare`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from ..data import InputError, is_audio
from ..training import TASKS, Evaluation, kernel_share, plot_runs, replace_file
from . import options
from .report import plain_console, progress_bar
from .train import new_run, tiny

_PRESET = "bytes"
_EVALUATIONS = 8
_PROFILED_STEPS = 3


class _Contestant(NamedTuple):
    """A model by its name, and how it differs from its preset."""

    model: str
    given: dict[str, Any]


CONTESTANTS = {
    "rnn": _Contestant("rnn", {}),
    "rnn-tanh": _Contestant("rnn", {"cell": "tanh"}),
    "gpt": _Contestant("gpt", {}),
    "hmm": _Contestant("hmm", {}),
    "bayesian-network": _Contestant("markov", {}),
}


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Which to compare.", show_default=" ".join(CONTESTANTS)),
    ] = None,
    data: options.Data = None,
    minutes: Annotated[
        float,
        typer.Option(min=0.01, callback=options.finite, help="Time of training for each model."),
    ] = 1.0,
    seed: options.Seed = 0,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("comparison.png"),
    dry_run: options.DryRun = False,
) -> None:
    """Train the models of a text side by side, and print one board.

    Each has the same bytes and the same time; one that counts is done when it has counted. The last
    tenth of the text is held out: bits per byte and accuracy are of it. Fused is the share of a
    training step's time that is spent in kernels of genkernels. The picture shows how the held-out
    bits per byte of each fell.

    Examples:

        genkernels compare --data notes.txt --minutes 2
        genkernels compare rnn gpt --output networks.png
    """
    if data and is_audio(data):
        raise InputError(f"{data}: is sound, or a folder; expected a UTF-8 text file")
    names = list(dict.fromkeys(models or CONTESTANTS))
    for name in names:
        if name not in CONTESTANTS:
            raise InputError(f"{name!r} cannot be compared; expected of {', '.join(CONTESTANTS)}")
    if dry_run:
        for _ in _runs(names, {"data": data, "seed": seed, "dry_run": True}, minutes):
            pass
        print("dry run         all of it works; nothing was left behind")
        return
    options.check_picture(output)
    with replace_file(output) as file:
        file.touch()  # a place that cannot be written to is found before the work
        runs = _runs(names, {"data": data, "seed": seed, "dry_run": False}, minutes)
        plot_runs(file, dict(runs), "bits/byte")
    print(f"curves          {output}")


def _runs(
    names: Sequence[str], values: dict[str, Any], minutes: float
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Train one after another, print a row of the board for each, and yield its name with (seconds,
    held-out bits per byte)."""
    console = plain_console()
    columns = f"{'bits/byte':>9} {'accuracy':>9} {'parameters':>12} {'steps':>8} {'tokens/s':>12}"
    console.print(f"{'model':<18}{columns}  fused")
    for name in names:
        model, given = CONTESTANTS[name]
        task_class = TASKS[model]
        if values["dry_run"]:
            given = tiny(task_class, given) | {"vocab_size": 256} | given
        elif task_class.presets[_PRESET].training.minutes:
            given = {"minutes": minutes, **given}
        task, training, history, _ = new_run(task_class, {"preset": _PRESET, **values}, given)
        share = 0.0
        if task.kernel:
            config = dataclasses.replace(training.config, steps=_PROFILED_STEPS, minutes=None)
            share = kernel_share(task.training(copy.deepcopy(training.model), config))
        torch.manual_seed(values["seed"])  # as if nothing had been profiled
        row = 0
        curve: list[tuple[float, float]] = []
        with progress_bar(console) as bar:
            shown = bar.add_task(name, total=1.0)
            for step in training:
                history.tokens += step.tokens
                history.seconds += step.seconds
                bar.update(shown, completed=step.progress)
                if math.floor(step.progress * _EVALUATIONS) > row:
                    row = math.floor(step.progress * _EVALUATIONS)
                    figure = task.evaluate(training.model, quickly=True).figure
                    curve.append((training.seconds, figure))
        result = task.evaluate(training.model)
        assert isinstance(result, Evaluation)
        curve[-1] = training.seconds, result.figure
        console.print(
            f"{name:<18}{result.bits_per_byte:9.4f} {result.token_accuracy:9.2%} "
            f"{task.parameters(training.model):12,} {training.number:8,} "
            f"{history.tokens_per_second:12,.0f} {share:6.0%}"
        )
        yield name, curve
