"""A whole training step beside PyTorch's and Keras's: `make bench-models`.

The program of `rnn` is Embedding 10000 x 256, GRU 512, Linear 10000, softmax cross-entropy and
Adam, on batches of 64 sequences of 100 tokens. Each contestant runs in a process of its own, from
the same weights on the same tokens, and they take turns. One whose losses are not those of plain
PyTorch in float64 is not timed. `gan` and `recurrent-gan` are in benchmarks.adversarial.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import adversarial, bench_gru, bench_linear_cross_entropy, command, limits
from benchmarks.bars import machine
from benchmarks.model_worker import CONFIG, OPTIMIZER, SHAPE, TorchProgram, initial_arrays
from benchmarks.peers.peer import PYTHON, missing
from benchmarks.steps import CHECKED_STEPS, TOLERANCES
from benchmarks.workers import Failure, Worker
from genkernels import backend

PARTS = ("forward", "backward", "optimizer")


class Contestant(NamedTuple):
    name: str
    library: str
    dtype: str

    @property
    def command(self) -> list[str]:
        if self.library == "keras":
            return [str(PYTHON), "-E", "-m", "benchmarks.peers.keras_model"]
        return [sys.executable, "-m", "benchmarks.model_worker", self.library]


CONTESTANTS = (
    Contestant("genkernels", "genkernels", "float32"),
    Contestant("torch", "torch", "float32"),
    Contestant("keras", "keras", "float32"),
    Contestant("genkernels bf16", "genkernels", "bfloat16"),
    Contestant("torch bf16", "torch", "bfloat16"),
)


class Bar(NamedTuple):
    """Asks that what is measured of `other` is at least `ratio` times that of `own`."""

    own: str
    other: str
    quantity: str
    ratio: float


BARS = (
    Bar("genkernels", "keras", "seconds", 1.2),
    Bar("genkernels", "torch", "seconds", 2.8),
    Bar("genkernels", "keras", "peak memory", 1 / 0.6),
    Bar("genkernels bf16", "torch bf16", "seconds", 1.8),
)


class Measured(NamedTuple):
    seconds: float
    memory: float
    version: str
    parts: dict[str, float]
    ops: list[tuple[str, float]]


def flops() -> float:
    """Multiply-adds of the products of a step, each two."""
    B, T, V = SHAPE[0], SHAPE[1], CONFIG.vocab_size
    E, H = CONFIG.embedding_dim, CONFIG.hidden_size
    return bench_gru.flops((T, B, E, H), "forward+backward") + bench_linear_cross_entropy.flops(
        (B * T, H, V), "forward+backward"
    )


def expected_losses(arrays: Mapping[str, np.ndarray]) -> list[float]:
    """Those of the first steps in float64, by plain PyTorch."""
    program = TorchProgram("torch", "float64", arrays)
    return [program.step() for _ in range(CHECKED_STEPS)]


def set_up(
    worker: Worker, contestant: Contestant, threads: int, npz: Path, expected: Sequence[float]
) -> str:
    """Start from the weights of `npz`, check the losses of the first steps; returns the version."""
    request = {"npz": str(npz), "threads": threads, "dtype": contestant.dtype}
    answer = worker.ask({"setup": {**request, "steps": CHECKED_STEPS, **OPTIMIZER}})
    if "error" in answer:
        raise Failure(f"{contestant.name}: {answer['error']}")
    for number, (loss, exact) in enumerate(zip(answer["losses"], expected, strict=True), 1):
        if not abs(loss - exact) <= TOLERANCES[contestant.dtype] * abs(exact):  # NaN is wrong too
            got = f"the loss of step {number} is {loss:.6f}, in float64 {exact:.6f}"
            raise Failure(f"{contestant.name}: {got}")
    return answer["version"]


def run_all(
    contestants: Sequence[Contestant], threads: int, rounds: int
) -> tuple[dict[str, Measured], float]:
    """What was measured of each contestant, and the FMA peak of the same turns."""
    arrays = initial_arrays()
    print("the losses in float64", file=sys.stderr, flush=True)
    expected = expected_losses(arrays)
    measured: dict[str, Measured] = {}
    peaks = []
    level = backend.simd_level() or limits.levels()[-1]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genkernels-models-")))
        np.savez(folder / "case.npz", **arrays)  # type: ignore[arg-type]
        environment = {"OMP_NUM_THREADS": str(threads)}
        workers, versions = {}, {}
        for contestant in contestants:
            print(f"setting up {contestant.name}", file=sys.stderr, flush=True)
            worker = Worker(contestant.name, contestant.command, environment)
            stack.callback(worker.close)
            versions[contestant.name] = set_up(
                worker, contestant, threads, folder / "case.npz", expected
            )
            workers[contestant.name] = worker
        times: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(rounds):
            for name, worker in workers.items():
                times[name].append(worker.ask({"time": 1}))
            peaks.append(limits.measure_peak(level, torch.float32, threads, repeats=2))
            print(
                f"[round {number + 1} of {rounds}] "
                + ", ".join(f"{name} {kept[-1]:.2f} s" for name, kept in times.items()),
                file=sys.stderr,
                flush=True,
            )
        for name, worker in workers.items():
            answer = worker.ask({"report": None})
            measured[name] = Measured(
                statistics.median(times[name]),
                answer["memory"],
                versions[name],
                answer["parts"],
                [(op, seconds) for op, seconds in answer["ops"]],
            )
    return measured, statistics.median(peaks)


def bar_lines(measured: Mapping[str, Measured]) -> Iterator[str]:
    for bar in BARS:
        if bar.own not in measured or bar.other not in measured:
            continue
        values = [
            measured[name].seconds if bar.quantity == "seconds" else measured[name].memory
            for name in (bar.other, bar.own)
        ]
        ratio = values[0] / values[1]
        verdict = "met" if ratio >= bar.ratio else "MISSED"
        yield (
            f"- {bar.own}, {bar.quantity}: {ratio:.2f} times less than {bar.other}, "
            f"asked {bar.ratio:.2f}: {verdict}"
        )


def table(measured: Mapping[str, Measured], peak: float) -> Iterator[str]:
    yield (
        "| program | s a step | GFLOP/s | share of peak | peak memory | " + " | ".join(PARTS) + " |"
    )
    yield "|---|---|---|---|---|" + "---|" * len(PARTS)
    for name, row in measured.items():
        rate = flops() / row.seconds
        parts = [f"{row.parts[part]:.3f} s" if part in row.parts else "" for part in PARTS]
        yield (
            f"| {name} | {row.seconds:.3f} | {rate / 1e9:.0f} | {rate / peak:.0%} | "
            f"{row.memory / 1e6:.0f} MB | {' | '.join(parts)} |"
        )


def op_lines(measured: Mapping[str, Measured]) -> Iterator[str]:
    """Where a step's time goes, by op."""
    for name, row in measured.items():
        if row.ops:
            total = sum(seconds for _, seconds in row.ops)
            shown = [f"{op} {s:.3f} s ({s / total:.0%})" for op, s in row.ops if s > 0.005 * total]
            yield f"- {name}: " + ", ".join(shown)


def draw_chart(path: Path, measured: Mapping[str, Measured]) -> None:
    """Seconds of a step, each part a colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 0.7 * len(measured) + 1.2))
    names = list(measured)[::-1]
    for index, name in enumerate(names):
        row = measured[name]
        # The parts were timed apart from the turns: they share out the median of the turns.
        scale = row.seconds / sum(row.parts.values()) if row.parts else 1.0
        left = 0.0
        for number, part in enumerate(PARTS if row.parts else ("step",)):
            width = scale * row.parts[part] if row.parts else row.seconds
            color = f"C{number}" if row.parts else "0.6"
            axis.barh(index, width, left=left, color=color)
            left += width
        axis.text(left, index, f" {row.seconds:.2f} s, {row.memory / 1e9:.2f} GB", va="center")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.25 * max(row.seconds for row in measured.values()))
    axis.set_xlabel("seconds of a training step; peak memory of the process")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(PARTS))]
    axis.legend(handles, PARTS, loc="upper right")
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    command.replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)


def run_rnn(settings: dict[str, Any], rounds: int, folder: Path | None) -> None:
    reason = missing("keras")
    if reason:
        print(f"models: without keras: {reason}", file=sys.stderr)
    chosen = [c for c in CONTESTANTS if c.library != "keras" or not reason]
    measured, peak = run_all(chosen, settings["threads"], rounds)
    for name, row in measured.items():
        print(f"- {name}: {row.version}")
    print("\n".join(table(measured, peak)))
    print("\n".join(op_lines(measured)))
    print("\n".join(bar_lines(measured)), flush=True)
    if folder:
        rows = {name: row._asdict() for name, row in measured.items()}
        report = {**settings, "peak": peak, "flops": flops(), "rows": rows}
        command.write_json(folder / "models.json", report)
        draw_chart(folder / "models.png", measured)


def run_adversarial(name: str, settings: dict[str, Any], rounds: int, folder: Path | None) -> None:
    measured = adversarial.measure_all(adversarial.CASES[name], rounds)
    print("\n".join(adversarial.table(measured)))
    print("\n".join(adversarial.bar_lines(measured)), flush=True)
    if folder:
        report = {**settings, "rows": adversarial.report(measured)}
        command.write_json(folder / f"{name.replace('-', '_')}.json", report)


PROGRAMS: dict[str, Callable[[dict[str, Any], int, Path | None], None]] = {
    "rnn": run_rnn,
    **{name: functools.partial(run_adversarial, name) for name in adversarial.CASES},
}


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = machine()
    print(", ".join(f"{key} {value}" for key, value in settings.items()), file=sys.stderr)
    for name in [options.model] if options.model else PROGRAMS:
        PROGRAMS[name](settings, options.rounds, Path(options.save) if options.save else None)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description="Time one training step. rnn: Embedding 10000 x 256, GRU 512, Linear 10000 and "
        "Adam on 64 sequences of 100 tokens, by genkernels, plain PyTorch and Keras on TensorFlow "
        "(make peers) in turns, in float32 and under autocast in bfloat16. gan and recurrent-gan: "
        "the presets of genkernels train, with a gradient penalty and without, beside the same in "
        "plain PyTorch. One whose first losses are wrong is not timed. Prints seconds, where the "
        "time goes, and which bars are missed. Takes about six minutes.",
        epilog="Exit code: 0 when everything ran, bars missed or not; 2 when it could not. "
        "Example: python -m benchmarks.models --model gan --rounds 3 --threads 1",
    )
    parser.add_argument("--model", choices=PROGRAMS, help="the only one to train (default: all)")
    command.add_rounds(
        parser, f"turns of rnn; {adversarial.SECONDS:g} s of each case of the others"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of each contestant (default: PyTorch's own)"
    )
    command.add_save(
        parser, "write models.json and models.png (rnn), gan.json and recurrent_gan.json"
    )
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"argument --threads: expected at least 1, got {options.threads}")
    command.check(parser, options)
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    return command.run("models", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
