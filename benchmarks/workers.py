"""Processes that take turns: what drives them and what runs inside them.

Requests and answers are lines of JSON on stdin and stdout. Only the standard library is imported:
a worker's interpreter need not have torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

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


def median_seconds(step: Callable[[], object], calls: int) -> float:
    """Time of one call of `step`, the median of `calls` after one that is not counted."""
    step()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
