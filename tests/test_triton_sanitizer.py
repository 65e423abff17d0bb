"""The sanitizer of benchmarks/sanitizer.py, under which all tests in Triton's interpreter run: it
finds what is broken on purpose, and so does `make triton-sanitize`."""

from __future__ import annotations

import pytest
import torch

from genkernels import triton

if not triton.IS_INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: not set (make triton-check sets it)", True)

from benchmarks import triton_sanitize
from benchmarks.sanitizer import Sanitizer
from benchmarks.triton_sanitize import CASES, broken, found, gru, main, missed


@pytest.mark.parametrize("name", broken())
def test_finds(name: str) -> None:
    """In any test: nothing here has turned the sanitizer on."""
    said, launch = broken()[name]
    line = found(launch)
    assert line is not None
    assert said in line
    assert "benchmarks/triton_sanitize.py:" in line


def test_finds_nothing_where_nothing_is_wrong() -> None:
    source, target = torch.randn(20), torch.zeros(20)
    triton_sanitize._copy[(2,)](source, target, 20, 0, False, False)
    assert torch.equal(source, target)
    assert not list(missed())


@pytest.mark.slow
def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(CASES, "gru", [*CASES["gru"][:4], *CASES["gru"][5:]])
    assert main(["--only", "gru"]) == 0
    assert "| gru._backward_step |" in capsys.readouterr().out


def test_command_names_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a kernel that is given a bias cut short."""

    def cut(draw: triton_sanitize.Draw) -> torch.Tensor:
        kernel = gru_module._forward_step
        t = [draw(2, 9), draw(2, 3), draw(9, 3), draw(8), draw(2), draw(2, 3), draw(2, 12)]
        flags = {"HAS_BIAS": True, "HAS_RESETS": False, "SAVE_GATES": True}
        kernel[(1, 1)](*t, 2, 3, **flags, BLOCK_B=16, BLOCK_H=16, BLOCK_K=16)
        return t[0]

    from genkernels.triton import gru as gru_module

    monkeypatch.setitem(CASES, "gru", [cut])
    assert main(["--only", "gru"]) == 1
    output = capsys.readouterr().out
    assert "gru._forward_step (genkernels/triton/gru.py:" in output
    assert "a load of bias_hh outside of it: 1 elements from 8 to 8" in output


def test_command_says_what_cases_leave_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "gru", [gru(1, 32, 3, 32)])
    assert main(["--only", "gru"]) == 1
    assert "its mask keeps no access of any case out of bounds" in capsys.readouterr().out
    monkeypatch.setitem(CASES, "gru", [])
    assert main(["--only", "gru"]) == 1
    assert "gru._forward_step: launched by no case" in capsys.readouterr().out


def test_command_does_not_trust_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sanitizer, "_note", lambda *args: None)
    assert main([]) == 2
    assert "does not find what is broken on purpose: two programs" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["--only", "none of that name"]) == 2
    monkeypatch.setattr(triton_sanitize, "IS_INTERPRETED", False)
    assert main([]) == 2
    assert "TRITON_INTERPRET=1: not set" in capsys.readouterr().err
