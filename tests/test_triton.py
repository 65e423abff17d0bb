"""What can be known of the Triton kernels without a GPU: what they take of one, compiled ahead of
time, and what they compute, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import genkernels
from genkernels import backend, triton

pytest.importorskip("triton", reason="triton: not installed (pip install 'genkernels[triton]')")
if triton.IS_INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: set, and what is interpreted is not compiled", True)

from benchmarks import triton_compiled, triton_roofline, triton_table
from benchmarks.triton_compiled import ARCHITECTURES, Resources

ROOT = Path(__file__).parents[1]


def lines(table: Path, *cells: str) -> list[str]:
    """The table's lines that have all of these cells."""
    text = table.read_text(encoding="utf-8").splitlines()
    return [line for line in text if all(f"| {cell} |" in line for cell in cells)]


def test_table_has_every_configuration() -> None:
    expected = [
        f"| {config.name} | {str(config.dtype).removeprefix('torch.')} | {architecture} |"
        for architecture in ARCHITECTURES
        for config in triton_table.configs(architecture)
    ]
    found = [line for name in ARCHITECTURES for line in lines(triton_table.TABLE, name)]
    assert [" | ".join(line.split(" | ")[:3]) + " |" for line in found] == expected


def test_what_is_given_is_no_constant() -> None:
    """A configuration that leaves out what it is named after would be compiled without."""
    for architecture in ARCHITECTURES:
        for config in triton_table.configs(architecture):
            assert not config.tensors.keys() & config.constants.keys(), config.name
            has_all = "every feature" in config.name and "backward mask" in config.name
            assert not has_all or "alibi_slopes" in config.tensors, config.name


def test_table_of_sm_90() -> None:
    """The committed figures in bfloat16, of kernels without features, compiled again; `make
    triton-check` compiles all for all."""

    def is_plain(name: str) -> bool:
        return not any(
            word in name for word in ("every", "sequences", "D 32", "D 112", "any K", ", smooth")
        )

    rows = triton_table.rows(
        triton_table.compiled_row,
        ["sm_90"],
        lambda config: config.dtype == torch.bfloat16 and is_plain(config.name),
    )
    found, faults = zip(*rows, strict=True)
    assert list(filter(is_plain, lines(triton_table.TABLE, "bfloat16", "sm_90"))) == list(found)
    assert not any(faults)
    assert len(found) > 20


def test_estimates_of_sm_90() -> None:
    """The committed estimates of attention with heads of 64 in bfloat16, and of what it is compared
    with, made again; `make triton-check` makes all."""

    def is_compared(name: str) -> bool:
        return name.endswith((", D 64", ", D 64, causal"))

    rows = triton_table.rows(
        triton_roofline.estimated_row,
        ["sm_90"],
        lambda config: config.dtype == torch.bfloat16 and is_compared(config.name),
    )
    found, faults = zip(*rows, strict=True)
    committed = lines(triton_roofline.TABLE, "bfloat16", "H100")
    assert [line for line in committed if is_compared(line.split(" | ")[0])] == list(found)
    assert not any(faults)
    assert len([line for line in found if line.split(" | ")[-2]]) == 6  # are compared


@pytest.mark.slow
def test_interpreter() -> None:
    """Edge shapes, packed sequences and resets, in processes that interpret, one for each core."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            str(len(os.sched_getaffinity(0))),
            "--dist",
            "worksteal",
            "-m",
            "not slow",
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


@pytest.mark.parametrize("hip", [None, "6.2"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)], ids=str)
def test_gpu_that_it_cannot_serve(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None
) -> None:
    """What PyTorch says of a GPU is all that is not there."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backend, "_warned", set())
    reason = "the GPU has compute capability 7.5, and its kernels need 8.0"
    is_served = hip is not None or capability != (7, 5)
    cuda = torch.device("cuda", 1)
    assert triton.obstacle("gru", cuda, torch.float32) == (None if is_served else reason)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = [backend.select("gru", cuda, torch.float32) for _ in range(2)]
    assert chosen == ["triton" if is_served else "reference"] * 2
    said = f"genkernels.gru runs the plain PyTorch reference: {reason}"
    assert [str(warning.message) for warning in caught] == ([] if is_served else [said])


def test_without_triton(tmp_path: Path) -> None:
    """All packages of this environment but that one."""
    # torch's may be those of another environment, which this one sees by a .pth file.
    for packages in {Path(sysconfig.get_path("purelib")), Path(torch.__file__).parents[1]}:
        for entry in packages.iterdir():
            link = tmp_path / entry.name
            if not entry.name.startswith("triton") and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    code = "import runpy, genkernels; runpy.run_module('genkernels.info', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("  triton  "))
    assert line.endswith("Triton is not installed (pip install 'genkernels[triton]')")


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
    [(line, [fault])] = triton_table.rows(triton_table.compiled_row, ["sm_80"], jobs=1)
    assert line == f"| {config.name} | float32 | sm_80 |"
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


def test_issue_share() -> None:
    # A tile of 128 x 64 with heads of 64 is 2 x 2 x 128 x 64 x 64 flops, 512 cycles of an H100's
    # multiprocessor; 8 warps are 2 of each scheduler.
    of_loop = 2 * 2 * 128 * 64 * 64
    loop = Counter({"HGMMA.64x64x16.F32.BF16": 8, "FFMA": 100, "MUFU.EX2": 28})
    used = Resources(128, 0, 0, 0, 8, False, [Counter(loop, FFMA=200), loop])
    share = triton_roofline.issue_share
    assert share("sm_90", used, of_loop) == 512 / (512 + 2 * 128)
    twice = used._replace(loops=[Counter(loop) + Counter({"HGMMA.64x64x16.F32.BF16": 8})])
    assert share("sm_90", twice, of_loop) == 512 / (1024 + 2 * 128)
    loop = Counter({"HMMA.16816.F32": 64, "FFMA": 128})
    assert share("sm_80", used._replace(loops=[loop]), of_loop) == 1024 / (1024 + 2 * 128)
    loop = Counter({"UTCHMMA": 8, "FFMA": 128})
    assert share("sm_100", used._replace(loops=[loop]), of_loop) == 256 / (256 + 2 * 128)
    loop = Counter({"v_mfma_f32_32x32x8_bf16": 32, "v_exp_f32_e32": 128})
    used = used._replace(warps=4, loops=[loop])
    assert share("gfx942", used, of_loop) == 1024 / (1024 + 4 * 128)


def test_work_of_attention() -> None:
    """Against FLOPs and bytes counted by hand: B 2, 16 heads, 4096 queries and keys."""
    each = {
        (c.name, c.dtype): triton_roofline.work(c)
        for c in triton_table.configs("sm_90")
        if c.name.startswith("attention") and "D 64" in c.name
    }
    rows = 2 * 16 * 4096
    forward = each["attention forward, D 64", torch.bfloat16]
    assert forward.flops == 4 * rows * 4096 * 64
    assert forward.bytes == 4 * rows * 64 * 2 + 2 * rows * 4
    assert each["attention forward, D 64, causal", torch.bfloat16].flops == forward.flops / 2
    backward = [
        each[f"attention backward {kernel}, D 64", torch.bfloat16] for kernel in ("keys", "queries")
    ]
    assert sum(work.flops for work in backward) == 3.5 * forward.flops
    of_rows = each["attention backward rows, D 64", torch.float16]
    assert of_rows.bytes == 2 * rows * 64 * 2 + 5 * rows * 4


def test_work_of_a_gru() -> None:
    """Bytes counted by hand, of a state of 64 rows and units: the way back reads one for each of
    128 steps."""
    each = {
        c.name: triton_roofline.work(c)
        for c in triton_table.configs("sm_90")
        if c.name in ("gru forward, H 64", "gru backward, H 64") and c.dtype == torch.bfloat16
    }
    state, weight = 64 * 64 * 2, 3 * 64 * 64 * 2
    forward = (3 + 1 + 4) * 128 * state + state + weight + 3 * 64 * 2
    assert each["gru forward, H 64"].bytes == forward
    backward = (1 + 1 + 4 + 4 + 1) * 128 * state + 2 * state + weight
    assert each["gru backward, H 64"].bytes == backward


@pytest.mark.parametrize("fault", ["spills 8", "does not compile: no"])
@pytest.mark.parametrize("options", [[], ["--compiles"]], ids=str)
def test_what_an_older_triton_may_do(
    monkeypatch: pytest.MonkeyPatch, fault: str, options: list[str]
) -> None:
    monkeypatch.setattr(triton_table, "rows", lambda *_, **__: iter([("| a row |", [fault])]))
    is_wrong = not options or fault != "spills 8"
    assert triton_table.main(["--only", "sm_90", *options]) == is_wrong
