"""What can be known of the Triton kernels without a GPU: what they take of one, compiled ahead of
time, and what they compute, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genkernels
from genkernels import triton

pytest.importorskip("triton", reason="triton: not installed (pip install 'genkernels[triton]')")
if triton.IS_INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: set, and what is interpreted is not compiled", True)

from benchmarks import triton_table

ROOT = Path(__file__).parents[1]


def table() -> list[str]:
    return triton_table.TABLE.read_text(encoding="utf-8").splitlines()


def test_table_of_sm_90() -> None:
    """The committed figures, compiled again; `make triton-check` compiles for all."""
    lines, faults = zip(*triton_table.rows(["sm_90"]), strict=True)
    assert [line for line in table() if "| sm_90 |" in line] == list(lines)
    assert not any(faults)


def test_table_has_every_configuration() -> None:
    count = sum(len(list(triton_table.configs(name))) for name in triton_table.TARGETS)
    assert (
        len([line for line in table() if any(f"| {t} |" in line for t in triton_table.TARGETS)])
        == count
    )


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


def test_faults_are_found() -> None:
    config = next(c for c in triton_table.configs("sm_90") if c.dtype == torch.float16)
    good = triton_table.Resources(100, 0, 1024, {"mma.sync": 4}, False)
    assert triton_table.faults(config, "sm_80", good) == []
    bad = good._replace(spills=8, shared=1 << 20, tensor_cores={})
    assert len(triton_table.faults(config, "sm_80", bad)) == 3
    wide = config._replace(dtype=torch.float32)
    assert triton_table.faults(wide, "sm_80", good._replace(uses_tf32=True))
