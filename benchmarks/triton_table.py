"""What the Triton kernels take of a GPU, compiled ahead of time, without one:
`python -m benchmarks.triton_table`.

Registers, spills and shared memory are what the compilers report for each architecture (ptxas for
NVIDIA's, LLVM for AMD's); the occupancy that these leave is an estimate. Tensor-core instructions
are those of each innermost loop of the machine code (`benchmarks.triton_compiled`).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from benchmarks.triton_compiled import (
    ARCHITECTURES,
    Resources,
    is_tensor_core,
    occupancy,
    resources,
)
from genkernels.triton import MODULES, Config

TABLE = Path(__file__).with_name("triton.md")
NOT_COMPILED = "does not compile"
SMALLEST = 64  # of attention's tiles, unless a reason is given
Row = Callable[[str, int], tuple[str, list[str]]]  # of an architecture's config by its position


@cache
def configs(architecture: str) -> list[Config]:
    modules = [importlib.import_module(f"genkernels.triton.{module}") for module in MODULES]
    return [config for module in modules for config in module.configs(architecture)]


def faults(config: Config, architecture: str, used: Resources) -> list[str]:
    """What a shipped configuration must not do."""
    most_shared = ARCHITECTURES[architecture].most_shared
    is_wide, per_loop = config.dtype == torch.float32, used.tensor_cores
    needs_tensor_cores = config.has_products and not is_wide
    tile = [config.constants.get(name, SMALLEST) for name in ("BLOCK_L", "BLOCK_S")]
    is_small = config.has_products and min(tile) < SMALLEST and config.constants["HEAD_SIZE"] <= 128
    found = {
        f"spills {used.spills}": used.spills > 0,
        f"takes {used.shared} bytes of shared memory, of {most_shared}": used.shared > most_shared,
        "has a loop without tensor-core instructions": needs_tensor_cores and 0 in per_loop,
        "has no tensor-core instruction in a loop": needs_tensor_cores and not any(per_loop),
        "multiplies float32 in TF32": is_wide and used.uses_tf32,
        f"has a tile {tile}, and no reason for one so small": is_small and not config.reason,
    }
    return [fault for fault, is_found in found.items() if is_found]


def compiled_row(architecture: str, position: int) -> tuple[str, list[str]]:
    config = configs(architecture)[position]
    used = resources(config, architecture)
    warps, most = occupancy(architecture, used)
    cores = [name for loop in used.loops for name in loop if is_tensor_core(name)]
    kinds = sorted({re.split(r"\.|_f32_", name)[0] for name in cores})
    per_loop = " + ".join(map(str, used.tensor_cores)) if cores else ""
    numbers = (used.registers, used.spills, used.shared, f"{warps}/{most}")
    blocks = " x ".join(str(v) for n, v in config.constants.items() if "BLOCK" in n)
    cells = (
        config.name,
        str(config.dtype).removeprefix("torch."),
        architecture,
        f"{blocks} ({config.reason})" if config.reason else blocks,
        used.warps,
        *numbers,
        " ".join([per_loop, *kinds]),
    )
    return f"| {' | '.join(map(str, cells))} |", faults(config, architecture, used)


def _row_or_fault(row: Row, architecture: str, position: int) -> tuple[str, list[str]]:
    """A row whose kernel does not compile is wrong, and the others go on."""
    try:
        return row(architecture, position)
    except Exception as error:
        config = configs(architecture)[position]
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]
        dtype = str(config.dtype).removeprefix("torch.")
        return f"| {config.name} | {dtype} | {architecture} |", [f"{NOT_COMPILED}: {message}"]


def rows(
    row: Row,
    architectures: list[str],
    is_wanted: Callable[[Config], bool] = lambda config: True,
    jobs: int | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Lines of a table, with their faults, in its order. Compilers take one core each: there are
    as many processes as cores, or `jobs`."""
    work = [
        (architecture, position)
        for architecture in architectures
        for position, config in enumerate(configs(architecture))
        if is_wanted(config)
    ]
    jobs = jobs or len(os.sched_getaffinity(0))
    if jobs == 1:
        yield from itertools.starmap(partial(_row_or_fault, row), work)
        return
    # Not forked: PyTorch's threads do not come along.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(partial(_row_or_fault, row), *zip(*work, strict=True))


TOP = f"""Compiled ahead of time by Triton {triton.__version__}; not run on a GPU.

Registers are a thread's, shared bytes a block's. Occupancy is how many warps a multiprocessor has
at a time, of the most that it may have, estimated of registers, shared and tensor memory.
Tensor-core instructions are those of each innermost loop of the machine code, which calls mma.sync
HMMA, wgmma HGMMA and tcgen05.mma UTCHMMA.

| kernel | dtype | architecture | blocks | warps | registers | spills | shared bytes | \
occupancy (estimate) | tensor-core instructions |
|---|---|---|---|---|---|---|---|---|---|
"""


def run(
    module: str, row: Row, table: Path, top: str, description: str, argv: list[str] | None
) -> int:
    """A command that prints a table and says what is wrong with its rows."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    parser.add_argument(
        "--save", action="store_true", help=f"write benchmarks/{table.name} (default: print only)"
    )
    parser.add_argument(
        "--only", choices=ARCHITECTURES, action="append", help="an architecture (default: all)"
    )
    parser.add_argument(
        "--compiles",
        action="store_true",
        help="fail only for kernels that do not compile: an older Triton may spill registers",
    )
    parser.add_argument("--jobs", type=int, help="processes (default: one for each core)")
    arguments = parser.parse_args(argv)
    if arguments.save and arguments.only:
        parser.error("--save: expected without --only, which leaves rows out")
    lines, wrong = [], []
    for line, found in rows(row, arguments.only or list(ARCHITECTURES), jobs=arguments.jobs):
        print(line, flush=True)
        lines.append(line)
        if arguments.compiles:
            found = [fault for fault in found if fault.startswith(NOT_COMPILED)]
        wrong += [f"{line}: {fault}" for fault in found]
    if arguments.save:
        table.write_text("\n".join([top + lines[0], *lines[1:], ""]), encoding="utf-8")
    for fault in wrong:
        print(fault, file=sys.stderr)
    return bool(wrong)


def main(argv: list[str] | None = None) -> int:
    description = "Compile every Triton kernel for every architecture and print what it takes."
    return run("triton_table", compiled_row, TABLE, TOP, description, argv)


if __name__ == "__main__":
    sys.exit(main())
