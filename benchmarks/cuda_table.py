"""What the CUDA kernels take of a GPU, compiled without one: `python -m benchmarks.cuda_table`.

Registers, spills and shared memory are what ptxas reports for each architecture. The headers are
those of the torch that is installed; one without CUDA does.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import command
from benchmarks.workers import Failure
from build_backend import find_nvcc, find_torch

SOURCE = Path(__file__).resolve().parents[1] / "csrc/cuda/gru_cell.cu"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = {"float": "float32", "double": "float64", "Half": "float16", "BFloat16": "bfloat16"}
# As the kernels' names and the compiler's report have them.
KERNEL = r"gru_gates<(?:\(int\))?(\d+), .*?Gates(Forward|Backward)<(?:[\w:]*::)?(\w+)>"
REPORT = (
    r"entry function '([^']+)' for '(sm_\d+)'(?s:.*?)"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


class Row(NamedTuple):
    kernel: str
    dtype: str
    architecture: str
    width: int  # units that a thread reads at once
    registers: int
    spills: int  # bytes of a thread's stack
    shared: int  # bytes

    def __str__(self) -> str:
        return f"| {' | '.join(map(str, self))} |"


HEAD = (
    "| kernel | dtype | architecture | units at once | registers | spills | shared bytes |\n"
    "|---|---|---|---|---|---|---|"
)


def report(architectures: list[str], source: Path = SOURCE) -> str:
    """What ptxas says of the kernels, their names as in C++."""
    try:
        nvcc, (torch_dir, _) = find_nvcc(), find_torch()
    except LookupError as missing:
        raise Failure(f"nvcc and torch >= 2.10 are needed: {missing}") from None
    demangle = shutil.which("c++filt")
    if demangle is None:
        raise Failure("c++filt, of binutils, is needed: it was not found")
    codes = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    options = ["-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-Xptxas=-v", *codes]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_dir / "include")]
    with tempfile.TemporaryDirectory() as folder:
        to = str(Path(folder, "kernels.o"))
        compiled = subprocess.run(
            [nvcc, *options, "-c", str(source), "-o", to], capture_output=True, text=True
        )
    if compiled.returncode != 0:
        raise Failure(f"nvcc cannot compile {source}:\n{compiled.stderr}")
    told = subprocess.run([demangle], input=compiled.stderr, capture_output=True, text=True)
    return told.stdout


def rows(text: str) -> Iterator[Row]:
    for name, architecture, stack, stored, loaded, registers, shared in re.findall(REPORT, text):
        found = re.search(KERNEL, name)
        assert found is not None, f"a kernel that is not known: {name}"
        width, way, dtype = found.groups()
        spills = max(map(int, (stack, stored, loaded)))
        numbers = (int(width), int(registers), spills, int(shared or 0))
        yield Row(f"gru gates {way.lower()}", DTYPES[dtype], architecture, *numbers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_table",
        description="Compile every CUDA kernel for every architecture and print what it takes. "
        "The exit code is 1 where one spills registers.",
    )
    parser.add_argument(
        "--only", choices=ARCHITECTURES, action="append", help="an architecture (default: all)"
    )
    architectures = parser.parse_args(argv).only or list(ARCHITECTURES)
    found = sorted(rows(report(architectures)), key=lambda row: architectures.index(row[2]))
    if len(found) != len(architectures) * 2 * 2 * len(DTYPES):
        raise Failure(f"expected each kernel for each architecture, got {len(found)} in all")
    print(HEAD, *found, sep="\n")
    spilling = [row for row in found if row.spills > 0]
    for row in spilling:
        print(f"{row}: spills {row.spills} bytes", file=sys.stderr)
    return bool(spilling)


if __name__ == "__main__":
    sys.exit(command.run("cuda_table", main))
