"""What the CUDA kernels take of a GPU, compiled without one, and that the command says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cuda_table

ROOT = Path(__file__).parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.cuda_table", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_sm_90(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No kernel spills, and the command fails where one does."""
    for needed in ("nvcc", "c++filt"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed}: not on PATH")
    report = cuda_table.report(["sm_90"])
    monkeypatch.setattr(cuda_table, "report", lambda architectures: report)
    assert cuda_table.main(["--only", "sm_90"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == cuda_table.HEAD.splitlines()[0]
    ways = {(way, dtype) for way in ("backward", "forward") for dtype in cuda_table.DTYPES.values()}
    assert {(row.kernel.split()[-1], row.dtype) for row in cuda_table.rows(report)} == ways
    assert len(lines) == 2 * len(ways)
    assert all(0 < row.registers <= 128 and row.shared == 0 for row in cuda_table.rows(report))
    report = report.replace("0 bytes spill stores", "8 bytes spill stores", 1)
    assert cuda_table.main(["--only", "sm_90"]) == 1
    assert "spills 8 bytes" in capsys.readouterr().err


def test_wrong_architecture_is_said() -> None:
    result = run("--only", "sm_10")
    assert result.returncode == 2
    assert "sm_10" in result.stderr.splitlines()[-1]


def test_missing_nvcc_is_said() -> None:
    result = run(CUDACXX="no-such-nvcc")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "cuda_table: nvcc and torch >= 2.10 are needed: CUDACXX=no-such-nvcc was not found"
    ]
