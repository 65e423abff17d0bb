"""benchmarks/gpu.py where there is no GPU: the whole of it, at tiny sizes on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_linear_cross_entropy, gpu
from benchmarks.workers import ROOT

DRY = ["--device", "cpu", "--rounds", "1"]

pytestmark = pytest.mark.filterwarnings("ignore:genkernels")


def test_everything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(DRY) == 0
    output, progress = capsys.readouterr()
    lines = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| ")]
    names = [cell.strip() for cell in lines[0]]
    rows = [dict(zip(names, map(str.strip, line), strict=True)) for line in lines[1:]]
    cases = list(gpu.plan(gpu.SIZES["cpu"], "cpu", True))
    assert [row[names[0]] for row in rows] == [case.name for case in cases]
    reported = [line for line in progress.splitlines() if line.startswith("[")]
    for case, row, line in zip(cases, rows, reported, strict=True):
        missing = {name for name in case.make if not row[name]}
        # PyTorch has its attention of cuDNN on GPUs alone.
        assert missing == ({"cuDNN"} if case.name.startswith("attention") else set())
        assert f" s] {case.name}, " in line
        assert f": genkernels {row['genkernels']}" in line
        assert ("without cuDNN: No viable backend" in line) == bool(missing)
    assert "these figures mean nothing" in output


def test_plan_of_a_gpu_has_every_case() -> None:
    names = [case.name for case in gpu.plan(gpu.SIZES["cuda"], "cuda", True)]
    assert len(set(names)) == len(names) - 1  # a GRU is compiled in the end
    attention = [name for name in names if name.startswith("attention")]
    assert len(attention) == 2 * 3 * 2 * 2 * 3  # head sizes, lengths, causal, directions, dtypes


def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine without a GPU: this one has one")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "gpu: no CUDA device: PyTorch sees none here\n"


def test_names_what_the_time_does_not_do_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*DRY, "--only", "GRU", "--minutes", "0"]) == 0
    output = capsys.readouterr().out
    assert "Not run within 0 minutes: GRU T=3 B=2 I=5 H=7, forward+backward, bfloat16;" in output


def test_keeps_what_it_had_when_it_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, times = gpu.timed, []

    def until_the_third(case: gpu.Case, *args: Any) -> gpu.Row:
        times.append(case.name)
        if len(times) == 3:
            raise KeyboardInterrupt
        return timed(case, *args)

    monkeypatch.setattr(gpu, "timed", until_the_third)
    settings = {"device": "cpu", "only": "GRU", "compile": False, "minutes": 9.0, "rounds": 1}
    with pytest.raises(KeyboardInterrupt):
        gpu.run(Namespace(save=tmp_path, **settings))
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in report["rows"]] == times[:2]
    assert report["not_run"][0] == times[2]


def test_what_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: torch.Tensor) -> torch.Tensor:
        return 1.1 * bench_linear_cross_entropy.plain(*args)

    monkeypatch.setitem(bench_linear_cross_entropy.CONTESTANTS, "genkernels", wrong)
    assert gpu.main([*DRY, "--only", "linear_cross_entropy", "--no-compile"]) == 1
    output, errors = capsys.readouterr()
    assert "| linear_cross_entropy N=40 K=33 V=65, forward, bfloat16 |  |" in output
    assert "bfloat16: genkernels, loss: largest error" in errors


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--save", "."]], ids=str)
def test_refuses(options: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main([*DRY, *options])
    assert end.value.code == 2


def test_report_of_a_test_run(tmp_path: Path) -> None:
    """What `make test-gpu` writes: here of tests that need no GPU."""
    file = tmp_path / "report.json"
    tests = [f"{__file__}::test_refuses", f"{__file__}::test_says_that_there_is_no_gpu"]
    options = ["-q", "-p", "no:cacheprovider", "--report", str(file)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["passed"] + len(report["skipped"]) == 3
    assert report["failed"] == report["error"] == []
    assert report["torch"] == torch.__version__
    assert {"device", "revision", "triton"} < report.keys()
