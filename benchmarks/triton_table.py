"""What the Triton kernels take of a GPU, compiled ahead of time, without one:
`python -m benchmarks.triton_table`.

Registers, spills and shared memory are what the compilers report for each architecture (ptxas for
NVIDIA's, LLVM for AMD's), and tensor-core instructions are counted in the PTX or the assembly.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from genkernels.triton import MODULES, Config

TABLE = Path(__file__).with_name("triton.md")
# Shared memory that a block may have, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")


class Resources(NamedTuple):
    registers: int
    spills: int  # bytes of a thread's stack; of AMD's, registers
    shared: int  # bytes
    tensor_cores: dict[str, int]  # instructions
    uses_tf32: bool


def compiled(config: Config, architecture: str) -> Any:
    target, _ = TARGETS[architecture]
    signature = {p.name: p.annotation_type or "i32" for p in config.kernel.params}
    signature |= {name: TYPES[dtype] for name, dtype in config.tensors.items()}
    signature |= dict.fromkeys(config.constants, "constexpr")
    # Tensors start at multiples of 16 bytes, for which the launcher compiles.
    multiples, order = {*config.tensors, *config.divisible}, config.kernel.arg_names
    aligned = {(order.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(config.kernel, signature, config.constants, aligned)
    return triton.compile(source, target=target, options=config.options)


def resources(config: Config, architecture: str) -> Resources:
    result = compiled(config, architecture)
    shared = result.metadata.shared
    if "amdgcn" in result.asm:
        text = result.asm["amdgcn"]
        registers, spills = (
            _number(rf"{n}: *(\d+)", text) for n in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        text = result.asm["ptx"]
        usage = _usage(result.asm["cubin"])
        registers, spills = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    counts = {name: text.count(name) for name in TENSOR_CORES if name in text}
    return Resources(registers, spills, shared, counts, "tf32" in text)


def _usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        arguments = [str(tool), "-res-usage", file.name]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"the compiler's output lacks {pattern}"
    return int(found[1])


def faults(config: Config, architecture: str, used: Resources) -> list[str]:
    """What a shipped configuration must not do."""
    _, most_shared = TARGETS[architecture]
    is_wide = config.dtype == torch.float32
    found = {
        f"spills {used.spills}": used.spills > 0,
        f"takes {used.shared} bytes of shared memory, of {most_shared}": used.shared > most_shared,
        "has no tensor-core instruction": not is_wide and not used.tensor_cores,
        "multiplies float32 in TF32": is_wide and used.uses_tf32,
    }
    return [fault for fault, is_found in found.items() if is_found]


def configs(architecture: str) -> Iterator[Config]:
    for module in MODULES:
        yield from importlib.import_module(f"genkernels.triton.{module}").configs(architecture)


def rows(architectures: list[str]) -> Iterator[tuple[str, list[str]]]:
    for architecture in architectures:
        for config in configs(architecture):
            used = resources(config, architecture)
            dtype = str(config.dtype).removeprefix("torch.")
            blocks = " x ".join(str(v) for n, v in config.constants.items() if "BLOCK" in n)
            cores = ", ".join(f"{count} {name}" for name, count in used.tensor_cores.items())
            cells = (
                config.name, dtype, architecture, blocks, config.options["num_warps"],
                used.registers, used.spills, used.shared, cores,
            )  # fmt: skip
            yield f"| {' | '.join(map(str, cells))} |", faults(config, architecture, used)


HEAD = (
    "| kernel | dtype | architecture | blocks | warps | registers | spills | shared bytes | "
    "tensor-core instructions |\n|---|---|---|---|---|---|---|---|---|"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_table",
        description="Compile every Triton kernel for every architecture and print what it takes.",
    )
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/triton.md (default: print only)"
    )
    parser.add_argument(
        "--only", choices=TARGETS, action="append", help="an architecture (default: all)"
    )
    arguments = parser.parse_args(argv)
    if arguments.save and arguments.only:
        parser.error("--save: expected without --only, which leaves rows out")
    lines, wrong = [], []
    for line, found in rows(arguments.only or list(TARGETS)):
        print(line, flush=True)
        lines.append(line)
        wrong += [f"{line}: {fault}" for fault in found]
    if arguments.save:
        title = f"Compiled ahead of time by Triton {triton.__version__}; not run on a GPU.\n"
        TABLE.write_text("\n".join([title, HEAD, *lines, ""]), encoding="utf-8")
    for fault in wrong:
        print(fault, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
