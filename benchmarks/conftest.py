"""What every benchmark shares: how a row is measured, and the table printed at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

import genkernels
from benchmarks import limits
from benchmarks.steps import Step, expected, medians_of_turns
from genkernels import backend
from tests.parity import assert_parity


@pytest.fixture
def contest(benchmark: Any) -> Callable[..., None]:
    """Check one contestant's results, then measure it and record what its row needs."""

    def run(
        make_step: Callable[..., Step],
        contestants: Mapping[str, Callable[..., Any]],
        contestant: str,
        shape: tuple[int, ...],
        direction: str,
        dtype: torch.dtype,
        *,
        label: str,
        flops: float,
        names: Sequence[str],
    ) -> None:
        """Measure a contestant's step, which returns the tensors `names`, beside plain PyTorch's,
        which the contestants call "torch".

        A step that breaks the parity rule fails the test before it is timed, so that a wrong result
        has no row.
        """
        baseline, exact = expected(make_step, contestants["torch"], shape, direction, dtype)
        step = make_step(contestants[contestant], shape, direction, dtype)
        genkernels.stats(reset=True)
        results = step()
        backends = {name for _, name in genkernels.stats(reset=True)} or {contestant}
        errors = {
            name: assert_parity(f"{contestant}, {name}", *tensors)
            for name, *tensors in zip(names, results, baseline(), exact, strict=True)
        }
        threads = torch.get_num_threads()
        dtype_name = str(dtype).removeprefix("torch.")
        benchmark.group = f"{label}, {direction}, {dtype_name}"
        benchmark.extra_info.update(
            contestant=contestant,
            shape=label,
            direction=direction,
            dtype=dtype_name,
            threads=threads,
            simd_level=backend.simd_level() if "cpp" in backends else None,
            backend=", ".join(sorted(backends)),
            max_error=errors,
        )
        before = 0.0 if benchmark.disabled else measure_peak(dtype, threads)
        benchmark(step)
        if benchmark.stats is None:  # --benchmark-disable: the step ran once, nothing was measured
            return
        rate = flops / benchmark.stats.stats.median
        # The larger of two: while one is measured, something else may have taken a core.
        peak = max(before, measure_peak(dtype, threads))
        benchmark.extra_info.update(
            gflops=rate / 1e9,
            peak_gflops=peak / 1e9,
            share_of_peak=rate / peak,
            ratio=1.0 if contestant == "torch" else interleaved_ratio(baseline, step),
        )

    return run


def measure_peak(dtype: torch.dtype, threads: int) -> float:
    return limits.measure_peak(level(), dtype, threads, repeats=3)


def level() -> str:
    """The SIMD level in use, or the CPU's highest where no compiled kernel runs."""
    return backend.simd_level() or limits.levels()[-1]


def interleaved_ratio(baseline: Step, step: Step, seconds: float = 2.0) -> float:
    """How many times as fast `step` is."""
    medians = medians_of_turns({"baseline": baseline, "step": step}, seconds)
    return medians["baseline"] / medians["step"]


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print every measured row as one markdown table."""
    session = getattr(config, "_benchmarksession", None)
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for result in session.benchmarks if session else ():
        info = result.extra_info
        if "gflops" in info:
            key = info["shape"], info["direction"], info["dtype"]
            rows.setdefault(key, {})[info["contestant"]] = info
    if not rows:
        return
    others = sorted({name for row in rows.values() for name in row} - {"genkernels"})
    terminalreporter.write_line("")
    for line in _table(rows, others):
        terminalreporter.write_line(line)


def _table(
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]], others: list[str]
) -> Iterator[str]:
    peaks: dict[tuple[str, int], list[float]] = {}
    for (_, _, dtype), row in rows.items():
        for info in row.values():
            peaks.setdefault((dtype, info["threads"]), []).append(info["peak_gflops"])
    for (dtype, threads), measured in sorted(peaks.items()):
        peak = statistics.median(measured)
        yield f"Measured peak, {dtype}, {level()}, {threads} threads: {peak:.0f} GFLOP/s"
    yield ""
    yield (
        "| shape | direction | dtype | genkernels GFLOP/s | share of peak | "
        + "".join(f"{name} GFLOP/s | " for name in others)
        + "times as fast as torch |"
    )
    yield "|---|---|---|---|---|" + "---|" * (len(others) + 1)
    for (shape, direction, dtype), row in rows.items():
        own = row.get("genkernels")
        cells = [
            f"{own['gflops']:.0f}" if own else "",
            f"{own['share_of_peak']:.0%}" if own else "",
            *(f"{row[name]['gflops']:.0f}" if name in row else "" for name in others),
            f"{own['ratio']:.2f}" if own else "",
        ]
        yield f"| {shape} | {direction} | {dtype} | {' | '.join(cells)} |"
