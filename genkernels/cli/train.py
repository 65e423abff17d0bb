"""What every `genkernels train MODEL` does."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer

from ..data import DEFAULT_CORPUS, InputError
from ..training import (
    LOSS_CURVE,
    TASKS,
    Comparison,
    RunFolder,
    SampleFile,
    Task,
    load_checkpoint,
    load_state,
    plot_loss,
    replace_file,
    task_of,
)
from . import options
from .fit import History, fit
from .report import evaluation_lines, keep_sample, kernel_calls

_SAMPLE_TOKENS = 300
_DRY_STEPS = 4
_ABSENT = {"data": None, "resume": False, "stop_after": None, "compare": False}


class Run(NamedTuple):
    """A run that is about to begin, or to go on."""

    task: Task
    training: Any  # what the task returned of that name
    history: History
    seed: int


def train_model(model: str, context: typer.Context, **values: Any) -> None:
    """Train as the options say, those of a command named as in `options`, by `_ABSENT` where it has
    none of them."""
    values = _ABSENT | values
    task_class = TASKS[model].of(values["data"])
    values["preset"] = values["preset"] or next(iter(task_class.presets))
    given = options.given(context, values)
    if not values["dry_run"]:
        _train(task_class, values, given, values["output"])
        return
    if values["resume"]:
        raise InputError("--dry-run: has nothing to resume; expected it without --resume")
    values |= {"tensorboard": None, "stop_after": None}
    given = tiny(task_class, given) | given
    with tempfile.TemporaryDirectory(prefix="genkernels-") as folder:
        try:
            _train(task_class, values, given, Path(folder) / model)
        except typer.Abort:  # whose words are about a folder that is gone
            raise KeyboardInterrupt from None
    print("dry run         all of it works; nothing was left behind")


def tiny(task_class: type[Task], given: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes and settings of a dry run, such that they go with those that were given."""
    tiny = {"steps": _DRY_STEPS} | task_class.tiny
    width = "width" if "width" in tiny else "embedding_dim"
    if "num_heads" in given:  # which have to divide the width
        tiny[width] += -tiny[width] % given["num_heads"]
    elif "num_heads" in tiny and width in given:
        tiny["num_heads"] = math.gcd(tiny["num_heads"], given[width])
    for one, other in itertools.permutations(("embedding_dim", "hidden_size")):
        if one in given and other in tiny:  # tied weights take two of one size
            tiny[other] = given[one]
    return tiny


def _train(
    task_class: type[Task], values: dict[str, Any], given: dict[str, Any], output: Path
) -> None:
    is_dry, stop_after = values["dry_run"], values["stop_after"]
    run = (
        _continued(task_class, given, output)
        if values["resume"]
        else new_run(task_class, values, given)
    )
    task, training, history, seed = run
    model, config = training.model, training.config
    if training.progress == 1 or (stop_after and stop_after <= training.number):
        raise InputError(
            f"{output}: the run has done {training.number:,} steps; "
            f"expected {'--stop-after' if stop_after else '--steps or --minutes'} beyond them"
        )
    record = {
        "data": task.source,
        "digest": task.digest,
        "preset": values["preset"],
        "seed": seed,
        "baseline": task.baseline and [task.baseline.name, task.baseline.figure],
        **task.record,
    }
    with RunFolder(output, model, task.tokenizer, record, values["resume"]) as folder:
        print(
            f"data            {task.source}: {task.describe()}\n"
            f"model           {task.describe_model(model)}\n"
            f"training        {task.describe_training(config)}, seed {seed}, "
            f"threads {torch.get_num_threads()}"
        )
        comparison = None
        if values["resume"]:
            print(f"resumed         after step {training.number:,} of {output}")
        elif task.plain and values["compare"]:
            comparison = task.compare(training, seconds=0.5 if is_dry else 8.0)
            print(
                f"step time       {1e3 * comparison.model:.1f} ms, on {task.plain} "
                f"{1e3 * comparison.baseline:.1f} ms (medians, steps in turn)"
            )
        try:
            is_interrupted = fit(
                training,
                task,
                history,
                folder,
                seed,
                stop_after,
                values["sample"],
                values["tensorboard"],
            )
        except KeyboardInterrupt:
            if not folder.saved:
                raise
            raise typer.Abort(_interrupted(folder.saved["steps"], output)) from None
    try:
        _report(run, output, comparison, is_dry)
    except KeyboardInterrupt:  # the checkpoint stands, so that the word on it must not be lost
        is_interrupted = True
    if is_interrupted:
        raise typer.Abort(_interrupted(training.number, output))


def _interrupted(steps: int, output: Path) -> str:
    return f"interrupted after step {steps}; {output} has it, for --resume to go on"


def new_run(task_class: type[Task], values: dict[str, Any], given: dict[str, Any]) -> Run:
    """Return a run of what a preset names, but for what is given on the command line."""
    presets = task_class.presets
    if values["preset"] not in presets:
        raise InputError(
            f"--preset: unknown {values['preset']!r}; expected one of {', '.join(presets)}"
        )
    preset = presets[values["preset"]]
    data, seed = values["data"], values["seed"]
    try:
        sizes = _override(preset.model, given)
        config = _with_length(_override(preset.training, given), given)
        task = task_class.of(data)(data, sizes, config, seed, is_dry=values["dry_run"])
    except ValueError as error:  # of sizes that do not fit together
        raise InputError(str(error)) from error
    torch.manual_seed(seed)
    model = task.model_class(task.sizes)
    return Run(task, task.training(model, config), History(), seed)


def _continued(task_class: type[Task], given: dict[str, Any], output: Path) -> Run:
    """Return the run in `output`; what is `given` on the command line has to agree with it."""
    name = task_class.model_class.name
    checkpoint = load_checkpoint(output, "last")
    model, tokenizer, record = checkpoint
    if model.name != name:
        raise InputError(f"{output}: is a run of {model.name}; expected one of {name}")
    state = load_state(output)
    try:
        digest, seed = record["digest"], record["seed"]
        config = task_class.config_class(**record["settings"])
        history = History.from_json(record["history"])
        known = dataclasses.asdict(model.config) | record["settings"] | record
        for option, value in given.items():
            if option in known.keys() - {"data", "steps", "minutes"} and value != known[option]:
                raise InputError(
                    f"{options.spelled(option)}: {value}, but the run in {output} has "
                    f"{known[option]}; expected the same, or a new run without --resume"
                )
        data = given.get("data") or data_of(record)
        config = _with_length(config, given)
        task = task_of(checkpoint).of(data)(data, model.config, config, seed, tokenizer)
        if task.digest != digest:
            raise InputError(
                f"{task.source}: is not what the run in {output} learns from; "
                f"expected {record['data']} as it was, or a new run without --resume"
            )
        training = task.training(model, config)
        training.load_state_dict(state)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"{output}: cannot be continued ({error!r})") from error
    return Run(task, training, history, seed)


def data_of(record: dict[str, Any]) -> Path | None:
    """Return the file that a run learned from, by what it wrote down; None: the default corpus."""
    data = record.get("data", DEFAULT_CORPUS)
    return None if data == DEFAULT_CORPUS else Path(data)


def _override(config: Any, given: dict[str, Any]) -> Any:
    """Return `config` with those of its fields that were given on the command line."""
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in given.items() if k in names})


def _with_length(config: Any, given: dict[str, Any]) -> Any:
    """Return `config` with the length that was given: either kind replaces both."""
    steps, minutes = given.get("steps"), given.get("minutes")
    if steps is None and minutes is None:
        return config
    return dataclasses.replace(config, steps=steps, minutes=minutes)


def _report(run: Run, output: Path, comparison: Comparison | None, is_dry: bool) -> None:
    """Draw the curve, and print how good the best checkpoint is."""
    task, training, history, seed = run
    best, _, record = load_checkpoint(output)
    result = task.evaluate(best)
    curve, scale, baseline = output / LOSS_CURVE, task.scale, task.baseline
    losses = [] if scale is None else [loss * scale for loss in history.training]
    with replace_file(curve) as file:
        plot_loss(
            file,
            [*enumerate(losses, 1)],
            history.held_out,
            baseline and (baseline.name, baseline.figure),
            task.unit,
        )
    print("\n".join(["", *evaluation_lines(result, baseline)]))
    print(f"{task.items + '/s':<15} {history.tokens_per_second:,.0f}")
    print(f"kernels         {kernel_calls(history.calls)}")
    if comparison:
        print(f"speed-up        {comparison.speed_up:.2f}x over {task.plain}")
    if not is_dry:
        print(f"loss curve      {curve}")
        steps = f"best of step {record['steps']:,}, last of {training.number:,}"
        print(f"checkpoint      {output}: {steps}")
    if training.progress < 1:
        print(f"to be continued with --resume: {training.progress:.0%} of the run is done")
    sample = task.sample(best, _SAMPLE_TOKENS, seed)
    if isinstance(sample, SampleFile):
        name = keep_sample(sample, output, "sample")
        print(f"sample          {name if is_dry else output / name} ({task.sample_heading})")
    else:
        print(f"sample          ({task.sample_heading})")
        print(textwrap.indent(sample, "  | ", lambda line: True))
