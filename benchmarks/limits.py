"""What this machine can do at most, measured: multiply-add rate and read bandwidth.

Every benchmark figure is given as a share of these. `python -m benchmarks.limits` prints them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import native

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
FLOPS_PER_ITERATION = {  # accumulators x lanes x (multiply, add), as in limits.cpp
    "fma_baseline": 12 * 4 * 2,
    "fma_avx2": 12 * 8 * 2,
    "fma_avx512": 24 * 16 * 2,
    "dot_avx512_bf16": 24 * 32 * 2,
}
SOURCE = Path(__file__).with_name("limits.cpp")


def levels() -> tuple[str, ...]:
    """The SIMD levels of this CPU, lowest first, under the names `genkernels.backend` uses."""
    return LEVELS[: _library().highest_level() + 1]


def measure_peak(level: str, dtype: torch.dtype, threads: int, repeats: int) -> float:
    """FLOP/s of `threads` threads that do nothing but multiply-add in registers.

    bfloat16 below avx512_bf16 is computed in float32, so its limit there is float32's; float64 has
    half the lanes.
    """
    if dtype == torch.bfloat16 and level == "avx512_bf16":
        name = "dot_avx512_bf16"
        arguments: tuple[float, ...] = (0x31803180,)  # the pair (2**-28, 2**-28)
    else:
        name = f"fma_{'avx512' if level == 'avx512_bf16' else level}"
        arguments = (0.999, 0.5)
    run = getattr(_library(), name)
    iterations = 1 << 16
    while _seconds(functools.partial(run, iterations, *arguments), 1) < 0.02:
        iterations *= 2
    work = functools.partial(run, iterations, *arguments)
    seconds = min(_seconds(work, threads) for _ in range(repeats))
    rate = threads * iterations * FLOPS_PER_ITERATION[name] / seconds
    return rate / 2 if dtype == torch.float64 else rate


@functools.cache
def read_bandwidth(size: int, threads: int = 1) -> float:
    """Bytes per second that `threads` threads read, each from `size` bytes of its own."""
    run = _reader()
    count = size // 4 // 128 * 128
    # Written, not just allocated: untouched pages are all one page of zeros, read from L1.
    buffers = [torch.ones(count) for _ in range(threads)]
    repeats = max(1, (1 << 28) // size)

    def read() -> None:
        run(ctypes.c_void_p(queue.pop()), ctypes.c_size_t(count), repeats)

    best = float("inf")
    for _ in range(5):
        queue = [buffer.data_ptr() for buffer in buffers]
        best = min(best, _seconds(read, threads))
    return threads * count * 4 * repeats / best


def read_seconds(tensors: Sequence[Tensor], threads: int) -> float:
    """Wall time in which `threads` threads read contiguous tensors once, each its share of them.

    What is left of a tensor after shares of whole blocks of 512 bytes is not read.
    """
    run = _reader()
    spans = []  # address and floats of a thread's share
    for tensor in tensors:
        size = tensor.nbytes // threads // 512 * 512
        spans.append([(tensor.data_ptr() + i * size, size // 4) for i in range(threads)])
    queue = list(zip(*spans, strict=True))

    def read() -> None:
        for address, count in queue.pop():
            run(ctypes.c_void_p(address), ctypes.c_size_t(count), 1)

    return _seconds(read, threads)


def flush(tensors: Sequence[Tensor]) -> None:
    """Write contiguous tensors back and drop them from every cache."""
    for tensor in tensors:
        _library().flush(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))


def _reader() -> Any:
    level = levels()[-1]
    return getattr(_library(), f"read_{'avx512' if level == 'avx512_bf16' else level}")


def _seconds(work: Callable[[], object], threads: int) -> float:
    """Wall time of `work` in `threads` threads at once; ctypes releases the interpreter's lock."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    barrier = threading.Barrier(threads)

    def pinned(index: int) -> tuple[float, float]:
        # Each thread on its own CPU: a scheduler may leave short-lived threads on one.
        if cpus:
            os.sched_setaffinity(0, {cpus[index % len(cpus)]})
        barrier.wait()
        start = time.perf_counter()
        work()
        return start, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        starts, ends = zip(*pool.map(pinned, range(threads)), strict=True)
    return max(ends) - min(starts)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(SOURCE, "-w")
    for name in FLOPS_PER_ITERATION:
        if hasattr(library, name):
            function = getattr(library, name)
            function.restype = ctypes.c_float
            extra = [ctypes.c_int] if name.startswith("dot") else [ctypes.c_float] * 2
            function.argtypes = [ctypes.c_long, *extra]
    for level in ("baseline", "avx2", "avx512"):
        if hasattr(library, f"read_{level}"):
            function = getattr(library, f"read_{level}")
            function.restype = ctypes.c_float
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    return library


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits",
        description="Measure and print this machine's limits: GFLOP/s of multiply-adds held in "
        "registers, per SIMD level and thread count, and GB/s read from cache and from memory. "
        "Takes a few seconds; limits.cpp is compiled once, into ~/.cache/genkernels.",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, torch.get_num_threads()}),
        metavar="N",
        help="thread counts to measure (default: 1 and torch.get_num_threads(), %(default)s)",
    )
    options = parser.parse_args()
    if min(options.threads) < 1:
        parser.error(f"argument --threads: expected counts of at least 1, got {options.threads}")
    columns = " | ".join(f"{n} thread{'s' if n > 1 else ''}" for n in options.threads)
    print(f"| limit | {columns} |\n|---|{'---|' * len(options.threads)}")
    for level in levels():
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and level != "avx512_bf16":
                continue
            if dtype == torch.float32 and level == "avx512_bf16":
                continue
            row = [
                f"{measure_peak(level, dtype, n, repeats=7) / 1e9:.0f} GFLOP/s"
                for n in options.threads
            ]
            print(f"| {level}, {str(dtype).removeprefix('torch.')} | {' | '.join(row)} |")
    for label, size in (("L2 (512 KiB a thread)", 1 << 19), ("memory (256 MiB a thread)", 1 << 28)):
        row = [f"{read_bandwidth(size, n) / 1e9:.0f} GB/s" for n in options.threads]
        print(f"| read, {label} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
