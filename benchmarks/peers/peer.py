"""The parent's side of the contestants: start one, set it up, time it in turns with others.

with Peer("onednn", 2, GRU) as one, Peer("openvino", 2, GRU) as other:
    for peer in (one, other):
        peer.setup((128, 16, 256, 256), "forward", torch.float32)  # T, B, I, H; checks too
    turns = [(one.seconds(calls=10), other.seconds(calls=10)) for _ in range(15)]
"""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from benchmarks import native
from benchmarks.peers.check import Verdict, check
from benchmarks.peers.op import GRU, Op
from benchmarks.workers import ROOT, Failure, Worker

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
DISTRIBUTIONS = {  # what each contestant needs in .venv-peers
    "onednn": ("onednn-cpu-gomp", "onednn-devel-cpu-gomp"),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "jax": ("jax",),
    "keras": ("keras", "tensorflow-cpu"),
}


class Unsupported(Failure):
    """A contestant has no such case: a gap in the table, not a fault."""


def missing(name: str) -> str | None:
    """Why a contestant cannot take part, in plain words; None if it can."""
    absent = [package for package in DISTRIBUTIONS[name] if package not in _installed()]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        return f"{' and '.join(absent)} {verb} not installed in .venv-peers: make peers"
    if name == "onednn" and native.compiler() is None:
        return "onednn needs a C++ compiler: none of c++, g++, clang++ was found"
    return None


@functools.cache
def _installed() -> frozenset[str]:
    if not PYTHON.exists():
        return frozenset()
    program = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps([d.name.lower().replace('_', '-') for d in m.distributions()]))"
    )
    run = subprocess.run([PYTHON, "-c", program], check=True, capture_output=True, text=True)
    return frozenset(json.loads(run.stdout))


class Peer(Worker):
    """One library in one process, which computes an op with `threads` threads.

    After `setup`, `settings` and `version` say what was measured and `verdict` how right it is.
    """

    def __init__(self, name: str, threads: int, op: Op = GRU) -> None:
        reason = missing(name)
        if reason:
            raise Failure(reason)
        self.threads = threads
        self.op = op
        self.settings: dict[str, str] = {}
        self.version = ""
        self.verdict: Verdict | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="genkernels-peer-")
        super().__init__(name, [str(PYTHON), "-E", "-m", f"benchmarks.peers.{name}_{op.name}"])

    def setup(self, shape: Any, direction: str, dtype: torch.dtype) -> Verdict:
        """Build a case of the op's benchmark, run it once and check what it computed.

        Raises Unsupported if the library has no such case, check.Wrong if its results are wrong,
        and Failure if it fails; there is then nothing to time.
        """
        self.verdict = None
        drawn = self.op.draw(shape, dtype)
        values = {name: value.float().numpy() for name, value in drawn.items()}
        case, results = (Path(self.folder.name, f"{part}.npz") for part in ("case", "results"))
        np.savez(case, **values)  # type: ignore[arg-type]
        request = {
            "npz": str(case),
            **self.op.sizes(shape),
            "direction": direction,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": self.threads,
            "results": str(results),
        }
        answer = self.ask({"setup": request})
        if "unsupported" in answer:
            raise Unsupported(answer["unsupported"])
        if "error" in answer:
            raise Failure(f"{self.name}: {answer['error']}")
        self.settings, self.version = answer["settings"], answer["version"]
        with np.load(answer["results"]) as archive:
            tensors = {name: torch.from_numpy(archive[name]) for name in archive}
        expected = self.op.expected(shape, direction, dtype)
        self.verdict = check(self.name, tensors, expected, dtype)
        return self.verdict

    def seconds(self, calls: int) -> float:
        """Time of one call of the case, the median of `calls` after one that is not counted."""
        if self.verdict is None:
            raise Failure(f"{self.name} is not timed before its results were found right")
        return self.ask({"time": calls})

    def close(self) -> None:
        super().close()
        self.folder.cleanup()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
