"""What every contestant's process shares: the protocol.

A request is one of

    {"setup": {"npz", "direction", "dtype", "threads", "results", and the sizes of the op's case}}
    {"time": calls}

`npz` holds the float32 arrays of the op's case, which gru.py and attention.py describe. A setup
runs once, writes its outputs and "grad of NAME" for every argument in the same layouts to the file
`results`, and is answered with {"results", "settings", "version"}, {"unsupported": reason} or
{"error": message}. A time is answered with the median in seconds.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.workers import median_seconds, requests

Array = NDArray[np.float32]


class Unsupported(Exception):
    """The library has no such case; the message says what it lacks."""


@dataclass(frozen=True)
class Case:
    """What a contestant is asked to compute; each op adds its sizes."""

    values: Mapping[str, Array]
    direction: str
    dtype: str
    threads: int

    @property
    def training(self) -> bool:
        return self.direction == "forward+backward"


@dataclass(frozen=True)
class Contestant:
    """A library's op, set up.

    `step` is what is timed: one call from the library's own arrays to the library's own arrays,
    finished when it returns. `results` gives what the last step computed in torch's layouts.
    """

    step: Callable[[], object]
    results: Callable[[], dict[str, Array]]
    settings: dict[str, str] = field(default_factory=dict)


C = TypeVar("C", bound=Case)


def serve(case_type: type[C], build: Callable[[C], Contestant], *distributions: str) -> None:
    """Answer requests until stdin ends. The version reported is that of the distributions."""
    asked, answer = requests()
    contestant: Contestant | None = None
    for request in asked:
        if "time" in request:
            assert contestant is not None, "a setup comes first"
            answer(median_seconds(contestant.step, request["time"]))
            continue
        contestant = None  # frees the one before while the next is built
        options = request["setup"]
        results = options.pop("results")
        try:
            with np.load(options.pop("npz")) as archive:
                case = case_type({name: archive[name] for name in archive}, **options)
            contestant = build(case)
            contestant.step()
            np.savez(results, **contestant.results())  # type: ignore[arg-type]
        except Unsupported as reason:
            answer({"unsupported": str(reason)})
        except Exception as error:
            traceback.print_exc()
            answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        else:
            version = ", ".join(f"{name} {metadata.version(name)}" for name in distributions)
            answer({"results": results, "settings": contestant.settings, "version": version})


def environment(**variables: Any) -> dict[str, str]:
    """Set variables that a library reads when it is loaded, and return them as settings."""
    settings = {name: str(value) for name, value in variables.items()}
    os.environ.update(settings)
    return settings
