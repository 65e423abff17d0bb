"""A Triton kernel compiled ahead of time, without a GPU: what the compilers say that it takes of
one, and its loops.

Registers and spills are what ptxas and LLVM report. Loops are those of the machine code (SASS for
NVIDIA's GPUs, whose disassembler comes with Triton; AMD's assembly), found in its graph of
branches, so a loop that merely waits, or one that lies elsewhere, is not taken for another.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from genkernels.triton import Config

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SCHEDULERS = 4  # of a multiprocessor: NVIDIA's partitions, AMD's SIMD units
REGISTERS = 512  # that a scheduler has for each lane, given out by eights


class Architecture(NamedTuple):
    """What a multiprocessor (AMD: a compute unit) has, in bytes where it is memory.

    Sources: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
    and, for how registers and shared memory are given out, cuda_occupancy.h (65536 registers, by
    256 to a warp; by 128 bytes). AMD, LLVM's AMDGPUBaseInfo.cpp: 512 registers of 64 lanes by 8,
    8 waves of a SIMD unit, 16 groups, 512 bytes; "AMD Instinct MI300 Instruction Set Architecture".
    """

    target: GPUTarget
    most_shared: int  # that a block may have
    shared: int
    reserved: int  # of which each block takes this beside its own
    unit: int  # in which it is given out
    warps: int  # of a scheduler
    blocks: int


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 1 << 10, 128, 16, 32),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 1 << 10, 128, 16, 32),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 1 << 10, 128, 16, 32),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 0, 512, 8, 16),
}
TENSOR_MEMORY = 512  # columns, which sm_100 has


class Resources(NamedTuple):
    registers: int  # of a thread; AMD's are those of sums (AGPRs), too
    spills: int  # bytes of a thread's stack; of AMD's, registers
    shared: int  # bytes
    tensor_memory: int  # columns
    warps: int
    uses_tf32: bool
    loops: list[Counter[str]]  # the instructions of each innermost loop that calculates

    @property
    def tensor_cores(self) -> list[int]:
        """Tensor-core instructions of each loop."""
        return [sum(n for name, n in loop.items() if is_tensor_core(name)) for loop in self.loops]


def is_tensor_core(instruction: str) -> bool:
    return re.match(r"(H|HG|UTCH|IMMA|UTC\w)MMA|v_mfma", instruction) is not None


def calculates(instruction: str) -> bool:
    """Whether it is on floating-point numbers."""
    pattern = r"(F|H)(ADD|MUL|FMA|MNMX)|MUFU|v_\w+_b?f(16|32)"
    return is_tensor_core(instruction) or re.match(pattern, instruction) is not None


def compiled(config: Config, architecture: str) -> Any:
    signature = {p.name: p.annotation_type or "i32" for p in config.kernel.params}
    signature |= {name: TYPES[dtype] for name, dtype in config.tensors.items()}
    signature |= dict.fromkeys(config.constants, "constexpr")
    # Tensors start at multiples of 16 bytes, for which the launcher compiles.
    multiples, order = {*config.tensors, *config.divisible}, config.kernel.arg_names
    aligned = {(order.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(config.kernel, signature, config.constants, aligned)
    target = ARCHITECTURES[architecture].target
    return triton.compile(source, target=target, options=config.options)


def resources(config: Config, architecture: str) -> Resources:
    result = compiled(config, architecture)
    if "amdgcn" in result.asm:
        text = result.asm["amdgcn"]
        registers, spills = (
            _number(rf"\.{n}: *(\d+)", text) for n in ("vgpr_count", "vgpr_spill_count")
        )
        uses_tf32, loops = "_xf32" in text, amd_loops(text)
    else:
        text = _disassembled(result.asm["cubin"])
        registers, spills = (_number(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
        uses_tf32, loops = "tf32" in result.asm["ptx"], nvidia_loops(text)
    columns = getattr(result.metadata, "tmem_size", None) or 0
    numbers = (registers, spills, result.metadata.shared, columns, result.metadata.num_warps)
    return Resources(*numbers, uses_tf32, loops)


def occupancy(architecture: str, used: Resources) -> tuple[int, int]:
    """Estimated warps of a multiprocessor at a time, and the most that it may have."""
    gpu = ARCHITECTURES[architecture]
    registers = -(-max(used.registers, 1) // 8) * 8
    warps = SCHEDULERS * min(gpu.warps, REGISTERS // registers)
    shared = -(-(used.shared + gpu.reserved) // gpu.unit) * gpu.unit
    blocks = min(warps // used.warps, gpu.blocks)
    if shared:
        blocks = min(blocks, gpu.shared // shared)
    if used.tensor_memory:
        blocks = min(blocks, TENSOR_MEMORY // used.tensor_memory)
    return blocks * used.warps, SCHEDULERS * gpu.warps


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        arguments = [str(tool), "-sass", "-res-usage", file.name]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"the compiler's output lacks {pattern}"
    return int(found[1])


class Instruction(NamedTuple):
    name: str
    place: str  # its address, or the label before it
    target: str | None  # of a branch
    ends: bool  # whether nothing runs on behind it


def nvidia_loops(sass: str) -> list[Counter[str]]:
    """Of cuobjdump's -sass."""
    found = []
    pattern = r"^ +/\*([0-9a-f]+)\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*);"
    for address, predicate, name, operands in re.findall(pattern, sass, re.MULTILINE):
        operation = name.split(".")[0]
        target = re.search(r"0x([0-9a-f]+)", operands) if operation == "BRA" else None
        always = not predicate and (target is None or operands.startswith("0x"))
        ends = always and operation in ("BRA", "EXIT", "RET")
        place = target and f"{int(target[1], 16):04x}"
        found.append(Instruction(name, address, place, ends))
    return innermost_loops(found)


def amd_loops(assembly: str) -> list[Counter[str]]:
    found = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            found.append(Instruction("", label[1], None, False))
        elif code := re.match(r"\s+([a-z]\w+)\s*([^;]*)", line):
            name, operands = code[1], code[2].strip()
            target = operands if name.startswith(("s_branch", "s_cbranch")) else None
            ends = name in ("s_branch", "s_endpgm", "s_setpc_b64")
            found.append(Instruction(name, "", target, ends))
    return innermost_loops(found)


def innermost_loops(code: list[Instruction]) -> list[Counter[str]]:
    """The instructions of each loop that calculates, but for those around another such loop, in
    the order of the code."""
    targets = {i.target for i in code if i.target}
    starts = {0, len(code)} | {n for n, i in enumerate(code) if i.place in targets}
    starts |= {n + 1 for n, i in enumerate(code) if i.target or i.ends}
    blocks = [code[a:b] for a, b in itertools.pairwise(sorted(starts))]
    at = {block[0].place: n for n, block in enumerate(blocks)}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(blocks)))
    for n, block in enumerate(blocks):
        if target := block[-1].target:
            graph.add_edge(n, at[target])
        if not block[-1].ends and n + 1 < len(blocks):
            graph.add_edge(n, n + 1)
    working = {n for n, block in enumerate(blocks) if any(calculates(i.name) for i in block)}
    found = sorted(sorted(loop) for loop in _innermost(graph, graph, working))
    return [Counter(i.name for n in loop for i in blocks[n] if i.name) for loop in found]


def _innermost(whole: nx.DiGraph, part: nx.DiGraph, working: set[int]) -> Iterator[set[int]]:
    for loop in nx.strongly_connected_components(part):
        if not loop & working or not part.subgraph(loop).edges:
            continue
        entries = {b for a, b in whole.in_edges(loop) if a not in loop}
        inside = nx.DiGraph((a, b) for a, b in part.subgraph(loop).edges if b not in entries)
        yield from list(_innermost(whole, inside, working)) or [loop]
