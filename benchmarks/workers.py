"""Processes that take turns: what drives them and what runs inside them.

Requests and answers are lines of JSON on stdin and stdout. Only the standard library is imported:
a worker's interpreter need not have torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

ROOT = Path(__file__).resolve().parents[1]


class Failure(Exception):
    """What stops a comparison, in one line."""


class Worker:
    """A process that answers requests, one at a time."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Failure(f"the worker that runs {self.name} ended early, see its message above")
        return json.loads(line)

    def ask(self, request: Any) -> Any:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # answer() says that it ended
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before it read the last request
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def requests() -> tuple[Iterator[Any], Callable[[Any], None]]:
    """A worker's own end: the requests as they come, and the function that answers one.

    From here on file descriptor 1 is stderr: libraries print to it, and one such line among the
    answers would end the conversation.
    """
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    return map(json.loads, sys.stdin), answer


class Program(Protocol):
    """What is trained: `step` does one step and returns its loss."""

    version: str

    def step(self) -> float: ...

    def report(self) -> dict[str, Any]: ...


def serve_program(build: Callable[[dict[str, Any]], Program]) -> None:
    """Answer requests until stdin ends:

    {"setup": options} with {"losses", "version"} of options["steps"] steps, or with {"error"},
    {"time": calls} with the median seconds of a step,
    {"report": null} with what the program reports and "memory", the process's peak in bytes.
    """
    asked, answer = requests()
    program: Program | None = None
    for request in asked:
        if "setup" in request:
            try:
                program = build(request["setup"])
                losses = [program.step() for _ in range(request["setup"]["steps"])]
            except Exception as error:
                traceback.print_exc()
                answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})
            else:
                answer({"losses": losses, "version": program.version})
            continue
        assert program is not None, "a setup comes first"
        if "time" in request:
            answer(median_seconds(program.step, request["time"]))
        else:
            memory = peak_memory()  # before the report, which may take memory of its own
            answer({**program.report(), "memory": memory})


def peak_memory() -> int:
    """Bytes. getrusage() would begin at the peak of the process that this one was forked from."""
    return _memory("VmHWM")


def resident_memory() -> int:
    return _memory("VmRSS")


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{name}:\s*(\d+)", status)
    assert found is not None
    return 1024 * int(found[1])


def number_of(what: str, program: str, *arguments: Any) -> float:
    """What a Python program prints in a process of its own; `arguments` are a list in sys.argv[1].

    `what` names the number where it fails.
    """
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        reason = (run.stderr.splitlines() or [f"exit code {run.returncode}"])[-1]
        raise Failure(f"{what} could not be measured: {reason}")
    return float(run.stdout)


def median_seconds(
    step: Callable[[], object], calls: int, prepare: Callable[[], object] = lambda: None
) -> float:
    """Time of one call of `step`, the median of `calls` after one that is not counted.

    `prepare` is called before each, and not timed.
    """
    step()
    times = []
    for _ in range(calls):
        prepare()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
