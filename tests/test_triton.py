"""What can be known of the Triton kernels without a GPU: what they take of one, compiled ahead of
time, and what they compute, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import genkernels
from genkernels import triton

pytest.importorskip("triton", reason="triton: not installed (pip install 'genkernels[triton]')")
if triton.IS_INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: set, and what is interpreted is not compiled", True)

from benchmarks import triton_compiled, triton_table
from benchmarks.triton_compiled import ARCHITECTURES, Resources

ROOT = Path(__file__).parents[1]


def table() -> list[str]:
    return triton_table.TABLE.read_text(encoding="utf-8").splitlines()


def test_table_of_sm_90() -> None:
    """The committed figures in bfloat16, compiled again; `make triton-check` compiles for all."""
    lines, faults = zip(*triton_table.rows(["sm_90"], [torch.bfloat16], jobs=None), strict=True)
    assert [line for line in table() if "| bfloat16 | sm_90 |" in line] == list(lines)
    assert not any(faults)


def test_table_has_every_configuration() -> None:
    expected = [
        [config.name, str(config.dtype).removeprefix("torch."), name]
        for name in ARCHITECTURES
        for config in triton_table.configs(name)
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table()]
    assert [row for row in rows if row[2:] and row[2] in ARCHITECTURES] == expected


@pytest.mark.slow
def test_interpreter() -> None:
    """Edge shapes, packed sequences and resets, in a process that interprets."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *sorted(map(str, Path(__file__).parent.glob("test_triton_*.py"))),
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " skipped" not in result.stdout


def test_what_stands_against_it_is_said() -> None:
    input = torch.ones(1, 1, 1)
    reasons = genkernels.explain("gru", input).reasons
    assert reasons["triton"] == "it runs on CUDA tensors, and these are on cpu"
    reasons = genkernels.explain("linear", input).reasons
    assert reasons["triton"] == "this version has no Triton kernel for it"
    cuda = torch.device("cuda")
    assert triton.obstacle("gru", cuda, torch.bfloat16) is None
    assert triton.obstacle("gru", cuda, torch.float64) == "it has no kernel for torch.float64"


def good() -> Resources:
    return Resources(128, 0, 1024, 0, 8, False, [Counter({"HMMA.16816.F32": 4})])


def test_faults_are_found() -> None:
    config = next(c for c in triton_table.configs("sm_90") if c.dtype == torch.float16)
    config = config._replace(constants={"HEAD_SIZE": 128, "BLOCK_L": 64, "BLOCK_S": 64})
    assert triton_table.faults(config, "sm_80", good()) == []
    bad = good()._replace(spills=8, shared=1 << 20, loops=[])
    assert len(triton_table.faults(config, "sm_80", bad)) == 3
    bad = good()._replace(loops=[*good().loops, Counter(FFMA=9)])
    assert triton_table.faults(config, "sm_80", bad) == [
        "has a loop without tensor-core instructions"
    ]
    assert not triton_table.faults(config._replace(has_products=False), "sm_80", bad)
    wide = config._replace(dtype=torch.float32)
    assert triton_table.faults(wide, "sm_80", bad) == []
    assert triton_table.faults(wide, "sm_80", bad._replace(uses_tf32=True))
    small = config._replace(constants={"HEAD_SIZE": 128, "BLOCK_L": 64, "BLOCK_S": 32})
    assert len(triton_table.faults(small, "sm_80", good())) == 1
    assert not triton_table.faults(small._replace(reason="few queries"), "sm_80", good())
    large = config._replace(constants={"HEAD_SIZE": 256, "BLOCK_L": 32, "BLOCK_S": 64})
    assert not triton_table.faults(large, "sm_80", good())


def test_what_does_not_compile_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    config = next(iter(triton_table.configs("sm_80")))
    broken = config._replace(options=config.options | {"num_warps": 3})
    monkeypatch.setattr(triton_table, "configs", lambda architecture: [broken])
    [(line, [fault])] = triton_table.rows(["sm_80"])
    assert line.startswith(f"| {config.name} | float32 | sm_80 |")
    assert fault == "does not compile: num_warps must be a power of 2"


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "columns", "expected"),
    [  # of NVIDIA's, those of its occupancy calculator
        ("sm_80", 128, 8, 0, 0, 16),
        ("sm_80", 32, 8, 0, 0, 64),
        ("sm_80", 33, 8, 0, 0, 48),  # as 40
        ("sm_80", 255, 4, 0, 0, 8),
        ("sm_80", 168, 8, 0, 0, 8),  # 12 warps have the registers, one block of 8 is whole
        ("sm_80", 32, 1, 0, 0, 32),  # as many as there are blocks
        ("sm_80", 32, 4, 81 << 10, 0, 8),  # 82 KB with the reserved one: twice in 164 KB
        ("sm_80", 32, 4, (81 << 10) + 1, 0, 4),
        ("sm_90", 32, 4, 113 << 10, 0, 8),
        ("sm_100", 32, 4, 0, 256, 8),
        ("gfx942", 128, 4, 0, 0, 16),
        ("gfx942", 129, 4, 0, 0, 12),
        ("gfx942", 300, 4, 0, 0, 4),
        ("gfx942", 64, 4, 16 << 10, 0, 16),
    ],
)
def test_occupancy(
    architecture: str, registers: int, warps: int, shared: int, columns: int, expected: int
) -> None:
    used = Resources(registers, 0, shared, columns, warps, False, [])
    most = 32 if architecture == "gfx942" else 64
    assert triton_compiled.occupancy(architecture, used) == (expected, most)


# A loop around one that waits, which lies behind the exit; one without numbers; and one around two
# others.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;              /* 0x0000000000007919 */
                                                                   /* 0x000e220000002100 */
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4.reuse, R6, RZ ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR20], R6 ;
        /*0030*/              @!P3 BRA 0x00f0 ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0070*/               @P1 BRA 0x60 ;
        /*0080*/                   MOV R1, RZ ;
        /*0090*/                   HGMMA.64x64x16.F32 R24, gdesc[UR12], RZ, !UPT ;
        /*00a0*/                   BRA.U !UP0, 0x90 ;
        /*00b0*/                   FFMA R1, R1, R2, R3 ;
        /*00c0*/               @P2 BRA 0xb0 ;
        /*00d0*/               @P2 BRA 0x80 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR20], R6 ;
        /*0100*/              @!P3 BRA 0xf0 ;
        /*0110*/                   BRA 0x40 ;
        /*0120*/                   BRA 0x120;
"""


def test_loops_of_sass() -> None:
    loops = triton_compiled.nvidia_loops(SASS)
    waiting = {"SYNCS.PHASECHK.TRANS64.TRYWAIT": 2, "BRA": 4}
    assert loops == [
        Counter({"HMMA.16816.F32.BF16": 1, "FADD": 1, **waiting}),
        Counter({"HGMMA.64x64x16.F32": 1, "BRA.U": 1}),
        Counter({"FFMA": 1, "BRA": 1}),
    ]
    assert good()._replace(loops=loops).tensor_cores == [1, 1, 0]


def test_loops_of_amd() -> None:
    text = """
_kernel:
\ts_load_dword s0, s[0:1], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tv_add_f32_e32 v0, v0, v1
.LBB0_2:
.LBB0_3:                                ;   Parent Loop BB0_1 Depth=1
\tv_mfma_f32_32x32x8_bf16 v[18:33], v[126:127], v[110:111], 0
\ts_cbranch_execz .LBB0_4
\tv_exp_f32_e32 v1, v1
.LBB0_4:
\ts_cbranch_scc1 .LBB0_2               ; the inner loop
\ts_cbranch_scc0 .LBB0_1
.LBB0_5:
\tv_add_u32_e32 v0, v0, v1
\ts_cbranch_scc1 .LBB0_5
\ts_endpgm
"""
    inner = {"v_mfma_f32_32x32x8_bf16": 1, "s_cbranch_execz": 1, "v_exp_f32_e32": 1}
    assert triton_compiled.amd_loops(text) == [Counter({**inner, "s_cbranch_scc1": 1})]
