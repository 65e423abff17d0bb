"""What the commands show while they work and when they are done."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..backend import simd_level
from ..training import Baseline, Measures, SampleFile, Step, Task, replace_file

_SAMPLE_WIDTH = 80

Calls = Mapping[tuple[str, str], int]


def evaluation_lines(result: Measures, baseline: Baseline | None) -> Iterator[str]:
    """Yield the measures, a line each, the first ones beside a simpler model's."""
    others = baseline.values if baseline else []
    for (name, value), other in itertools.zip_longest(result.rows(), others):
        yield f"{name:<15} {value}" + (
            f"  ({baseline.name}: {other})" if baseline and other else ""
        )


def calls_between(before: Calls, after: Calls) -> dict[tuple[str, str], int]:
    """Return how often each (op, backend) ran between two answers of `genkernels.stats()`."""
    calls = {key: count - before.get(key, 0) for key, count in after.items()}
    return {key: count for key, count in calls.items() if count > 0}


def kernel_calls(calls: Calls) -> str:
    """Return every (op, backend) that ran with how often, and the SIMD level of the C++ kernels."""
    ran = ", ".join(f"{op} {backend} x {count:,}" for (op, backend), count in calls.items())
    level = f" (SIMD level {simd_level()})" if "cpp" in backend_names(calls) else ""
    return (ran or "none of genkernels") + level


def backend_names(calls: Calls, part: str = "") -> str:
    """Return the backends of the ops with `part` in their names, as in "cpp"; else "none"."""
    return "+".join(sorted({b for op, b in calls if part in op})) or "none"


def plain_console() -> Console:
    """Return a console that shows lines as they are."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """Return a bar that a terminal shows, and nothing else does."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class TrainingDisplay:
    """A table with a row for each evaluation; on a terminal also a progress bar below it."""

    def __init__(self, task: Task) -> None:
        self._kernel = task.kernel
        # Beside the figure its like in training, where the losses are of that kind.
        figures = f"{task.unit:>10}" + ("" if task.scale is None else "   held-out")
        self._heading = f"    step     loss {figures} {task.items + '/s':>11}"
        if self._kernel:
            self._heading += f"  {self._kernel} kernel"
        self.console = plain_console()
        self._bar = progress_bar(self.console)
        self._task = self._bar.add_task("training", total=1.0)

    def __enter__(self) -> TrainingDisplay:
        self._bar.start()
        self.console.print(self._heading)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone must not cost the checkpoint
            self._bar.stop()

    def step(self, step: Step) -> None:
        description = f"step {step.number:,}  loss {step.loss:.4f}"
        self._bar.update(self._task, completed=step.progress, description=description)

    def row(
        self, step: Step, loss: float, figures: Sequence[float], speed: float, calls: Calls
    ) -> None:
        """Show the mean loss, and the `figures` of training, if they are shown, and held-out."""
        shown = "".join(f" {figure:10.4f}" for figure in figures)
        backends = f"  {backend_names(calls, self._kernel)}" if self._kernel else ""
        self.console.print(f"{step.number:8,} {loss:8.4f}{shown} {speed:11,.0f}{backends}")

    def sample(self, text: str) -> None:
        self.console.print(f"         {' '.join(text.split())[:_SAMPLE_WIDTH]}")


def keep_sample(sample: SampleFile, folder: Path, name: str) -> str:
    """Write a sample into the folder of a run, and return the file's name."""
    name += sample.suffix
    with replace_file(folder / name) as path:
        sample.write(path)
    return name
