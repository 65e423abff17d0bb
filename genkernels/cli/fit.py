"""The training loop with its display and its checkpoints; any task."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import genkernels

from ..training import RunFolder, SampleFile, Task, Which
from .report import TrainingDisplay, calls_between, keep_sample

# In a run: often enough to draw a curve, seldom enough to cost about 1% of the time.
_EVALUATIONS = 20
_SAMPLE_TOKENS = 48


@dataclass
class History:
    """What a run did so far.

    training: the loss of each step, in nats per target where the task has a scale for it.
    held_out: (step, the task's figure) of each evaluation.
    calls: how often each (op, backend) ran.
    tokens, seconds: how many of the task's items were read, and in what time.
    """

    training: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"calls": {" ".join(key): n for key, n in self.calls.items()}}

    @classmethod
    def from_json(cls, values: Any) -> History:
        """Raises TypeError, AttributeError or ValueError for what `as_json` did not return."""
        history = cls(**values)
        history.held_out = [(step, figure) for step, figure in history.held_out]
        history.calls = {(op, b): n for (op, b), n in _split_keys(history.calls)}
        return history


def _split_keys(calls: Any) -> Iterator[tuple[tuple[str, str], int]]:
    for key, count in calls.items():
        op, backend = key.split()
        yield (op, backend), count


def fit(
    training: Any,
    task: Task,
    history: History,
    folder: RunFolder,
    seed: int,
    stop_after: int | None = None,
    sample: bool = True,
    tensorboard: Path | None = None,
) -> bool:
    """Train to the end of the run or step `stop_after`, and return whether an interrupt ended it.

    Now and then measures, shows and saves how it does; the last step is always saved. The first
    interrupt (Ctrl-C or SIGTERM) lets the step end, so that the run can be continued to the last
    bit; the second one does not wait, and leaves what was saved last.
    """
    earlier, before = history.calls, genkernels.stats()
    row, row_tokens, row_seconds = _row(training), 0, 0.0
    row_step = history.held_out[-1][0] if history.held_out else 0
    saved = None

    def save(which: Which) -> None:
        record = {
            "steps": training.number,
            "settings": dataclasses.asdict(training.config),
            "held_out": history.held_out[-1][1] if history.held_out else None,
        }
        if which == "best":
            folder.save(which, record, {})
        else:
            folder.save(which, record | {"history": history.as_json()}, training.state_dict())

    with (
        _curves(tensorboard, training.number) as curves,
        TrainingDisplay(task) as display,
        _Interrupts() as interrupts,
    ):
        for step in training:
            history.training.append(step.loss)
            history.tokens += step.tokens
            history.seconds += step.seconds
            row_tokens += step.tokens
            row_seconds += step.seconds
            calls = calls_between(before, genkernels.stats())
            history.calls = {
                key: earlier.get(key, 0) + calls.get(key, 0) for key in earlier | calls
            }
            is_row = _row(training) > row
            if is_row:  # after an interrupt too, or the run that is continued would lack it
                figure = task.evaluate(training.model, quickly=True).figure
                is_best = all(figure < other for _, other in history.held_out)
                history.held_out.append((step.number, figure))
                if is_best:
                    save("best")
                save("last")
                saved = step.number
            if interrupts.count:  # shows nothing more: the terminal may be gone
                break
            display.step(step)
            name = "loss" if task.scale is None else f"training, {task.unit}"
            curves.add_scalar(name, step.loss * (task.scale or 1), step.number)
            curves.add_scalar("learning rate", step.learning_rate, step.number)
            if is_row:
                loss = statistics.fmean(history.training[row_step:])
                speed = row_tokens / row_seconds
                figures = [figure] if task.scale is None else [loss * task.scale, figure]
                display.row(step, loss, figures, speed, history.calls)
                curves.add_scalar(f"held-out, {task.unit}", figure, step.number)
                if sample:
                    made = task.sample(training.model, _SAMPLE_TOKENS, seed + step.number)
                    if isinstance(made, SampleFile):
                        made = keep_sample(made, folder.path, f"sample-{step.number}")
                    display.sample(made)
                row, row_step, row_tokens, row_seconds = _row(training), step.number, 0, 0.0
            if step.number == stop_after:
                break
        if saved != training.number:
            save("last")
        return bool(interrupts.count)


def _row(training: Any) -> int:
    return math.floor(training.progress * _EVALUATIONS + 1e-9)


class _Interrupts:
    """Counts those signals that would raise KeyboardInterrupt, and lets only the second raise."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in signal.valid_signals():
                if signal.getsignal(number) is signal.default_int_handler:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt


class _NoCurves:
    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass


@contextlib.contextmanager
def _curves(folder: Path | None, steps: int) -> Iterator[Any]:
    """Give what takes the curves for TensorBoard, those of a run that has done so many steps."""
    if folder is None:
        yield _NoCurves()
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=steps + 1 if steps else None) as writer:
        yield writer
