"""What every contestant's process shares: the protocol, and the layouts of weights.

A request is one of

    {"setup": {"npz", "T", "B", "I", "H", "direction", "dtype", "threads", "results"}}
    {"time": calls}

`npz` holds float32 arrays: input [T, B, I], hx [B, H], weight_ih [3H, I], weight_hh [3H, H],
bias_ih [3H] and bias_hh [3H] as torch.nn.GRU has them, cotangent [T, B, H], cotangent_h [B, H].
A setup runs once, writes its output, h_n and "grad of NAME" for every argument in the same layouts
to the file `results`, and is answered with {"results", "settings", "version"},
{"unsupported": reason} or {"error": message}. A time is answered with the median in seconds.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.workers import median_seconds, requests

Array = NDArray[np.float32]


class Unsupported(Exception):
    """The library has no such case; the message says what it lacks."""


@dataclass(frozen=True)
class Case:
    """What a contestant is asked to compute."""

    values: Mapping[str, Array]
    T: int
    B: int
    I: int
    H: int
    direction: str
    dtype: str
    threads: int

    @property
    def training(self) -> bool:
        return self.direction == "forward+backward"


@dataclass(frozen=True)
class Contestant:
    """A library's GRU, set up.

    `step` is what is timed: one call from the library's own arrays to the library's own arrays,
    finished when it returns. `results` gives what the last step computed in torch's layouts.
    """

    step: Callable[[], object]
    results: Callable[[], dict[str, Array]]
    settings: dict[str, str] = field(default_factory=dict)


def serve(build: Callable[[Case], Contestant], *distributions: str) -> None:
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
                case = Case({name: archive[name] for name in archive}, **options)
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


def zrn(array: Array) -> Array:
    """Gates from torch's order r, z, n along the first dimension to z, r, n, or back."""
    r, z, n = np.split(array, 3)
    return np.concatenate([z, r, n])


def merged_bias(case: Case) -> Array:
    """The four rows of libraries that add the two biases where they can: z, r, n of x, n of h."""
    both = case.values["bias_ih"] + case.values["bias_hh"]
    rows = [both[case.H : 2 * case.H], both[: case.H]]
    rows += [case.values[name][2 * case.H :] for name in ("bias_ih", "bias_hh")]
    return np.stack(rows)  # [4, H]
