"""Which kernel runs and why: use_backend, explain, stats and the environment variables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_gru import arguments

import genkernels
from genkernels import backend, reference

PACKAGE = Path(genkernels.__file__).parent
CPP_FORWARD = ("gru_forward", "cpp")
CPP_BACKWARD = ("gru_backward", "cpp")
CALL = """
import torch, genkernels
values = [torch.ones(s) for s in ((3, 4, 5), (4, 6), (18, 5), (18, 6))]
output, _ = genkernels.gru(*values)
"""


@pytest.fixture(autouse=True)
def counts_from_zero() -> Iterator[None]:
    genkernels.stats(reset=True)
    backend._warned.clear()
    yield
    genkernels.stats(reset=True)


def python(
    code: str, path: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that imports the genkernels found in `path`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


class TestStats:
    def test_counts_each_call(self) -> None:
        values = {k: v.requires_grad_() for k, v in arguments(3, 4, 5, 6).items()}
        assert genkernels.stats() == {}
        genkernels.gru(**values)
        output, _ = genkernels.gru(**values)
        assert genkernels.stats() == {CPP_FORWARD: 2}
        output.sum().backward()
        assert genkernels.stats(reset=True) == {CPP_FORWARD: 2, CPP_BACKWARD: 1}
        assert genkernels.stats() == {}

    def test_counts_calls_under_compile(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(genkernels.gru, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            compiled(**arguments(3, 4, 5, 6))
        assert genkernels.stats() == {CPP_FORWARD: 3}

    def test_counts_the_cell(self) -> None:
        values = arguments(1, 4, 5, 6)
        genkernels.gru_cell(values.pop("input")[0], **values)
        assert genkernels.stats() == {("gru_cell_forward", "cpp"): 1}

    def test_counts_the_reference(self) -> None:
        with genkernels.use_backend("reference"):
            genkernels.gru(**arguments(3, 4, 5, 6))
        assert {name for _, name in genkernels.stats()} == {"reference"}


class TestUseBackend:
    def test_reference_is_the_reference(self) -> None:
        values = arguments(3, 4, 5, 6)
        with genkernels.use_backend("reference"):
            actual = genkernels.gru(**values)
        assert all(map(torch.equal, actual, reference.gru(**values)))

    def test_reference_has_all_derivatives(self) -> None:
        """Forward mode too, which the compiled kernel refuses."""
        values = tuple(arguments(3, 4, 5, 6, torch.float64).values())
        with genkernels.use_backend("reference"):
            _, tangent = torch.func.jvp(
                lambda *v: genkernels.gru(*v)[0], values, tuple(map(torch.ones_like, values))
            )
        assert tangent.abs().sum() > 0

    def test_nests_and_restores(self) -> None:
        values = arguments(3, 4, 5, 6)
        with genkernels.use_backend("reference"):
            with genkernels.use_backend("cpp"):
                genkernels.gru(**values)
            assert genkernels.stats(reset=True) == {CPP_FORWARD: 1}
            genkernels.gru(**values)
            assert CPP_FORWARD not in genkernels.stats(reset=True)
        genkernels.gru(**values)
        assert genkernels.stats() == {CPP_FORWARD: 1}

    def test_restores_after_an_exception(self) -> None:
        with pytest.raises(KeyError), genkernels.use_backend("reference"):
            raise KeyError
        genkernels.gru(**arguments(3, 4, 5, 6))
        assert genkernels.stats() == {CPP_FORWARD: 1}

    def test_plain_call_lasts(self) -> None:
        genkernels.use_backend("reference")
        try:
            genkernels.gru(**arguments(3, 4, 5, 6))
            assert CPP_FORWARD not in genkernels.stats(reset=True)
        finally:
            genkernels.use_backend(None)
        genkernels.gru(**arguments(3, 4, 5, 6))
        assert genkernels.stats() == {CPP_FORWARD: 1}

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="nosuch") as caught:
            genkernels.use_backend("nosuch")
        assert "cpp" in str(caught.value)
        genkernels.gru(**arguments(3, 4, 5, 6))
        assert genkernels.stats() == {CPP_FORWARD: 1}

    @pytest.mark.parametrize(
        ("name", "dtype"), [("triton", torch.float32), ("cpp", torch.float16)], ids=str
    )
    def test_what_cannot_run_raises(self, name: str, dtype: torch.dtype) -> None:
        with genkernels.use_backend(name), pytest.raises(RuntimeError, match=name):
            genkernels.gru(**arguments(3, 4, 5, 6, dtype))
        assert genkernels.stats() == {}


class TestFallback:
    def test_warns_once_for_each_reason(self) -> None:
        values = arguments(3, 4, 5, 6, torch.float16)
        with pytest.warns(UserWarning, match=r"gru.*float16"):
            actual = genkernels.gru(**values)
        assert all(map(torch.equal, actual, reference.gru(**values)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            genkernels.gru(**values)
        assert {name for _, name in genkernels.stats()} == {"reference"}

    def test_strict(self) -> None:
        """Lets the kernel run, and raises where it cannot."""
        code = CALL + (
            "print(genkernels.stats())\ngenkernels.gru(*(value.half() for value in values))\n"
        )
        result = python(code, GENKERNELS_STRICT="1")
        assert result.stdout.strip() == str({CPP_FORWARD: 1}), result.stderr
        assert result.returncode != 0
        last = result.stderr.strip().splitlines()[-1]
        assert "GENKERNELS_STRICT" in last
        assert "float16" in last

    def test_meta_device_needs_no_backend(self) -> None:
        values = {name: value.to("meta") for name, value in arguments(3, 4, 5, 6).items()}
        output, h_n = genkernels.gru(**values)
        assert (output.shape, h_n.shape) == ((3, 4, 6), (4, 6))


class TestExplain:
    def test_compiled(self) -> None:
        text = str(genkernels.explain(genkernels.gru, **arguments(3, 4, 5, 6)))
        assert "cpp" in text.splitlines()[0]
        assert backend.simd_level() in text
        assert str(genkernels.explain("gru", *arguments(3, 4, 5, 6).values())) == text
        assert genkernels.stats() == {}

    def test_fallback(self) -> None:
        first, *others = str(
            genkernels.explain("gru", **arguments(3, 4, 5, 6, torch.float16))
        ).splitlines()
        assert "reference" in first
        assert any("cpp" in line and "float16" in line for line in others)

    def test_requested(self) -> None:
        with genkernels.use_backend("reference"):
            text = str(genkernels.explain("gru", **arguments(3, 4, 5, 6)))
        assert "reference" in text.splitlines()[0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("requested", [None, "cpp", "reference"], ids=str)
    def test_says_what_happens(self, dtype: torch.dtype, requested: str | None) -> None:
        """The backend it names is the one that runs; where it names none, the call raises."""
        values = arguments(3, 4, 5, 6, dtype)
        with genkernels.use_backend(requested), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            named = genkernels.explain("gru", **values).backend
            if named is None:
                with pytest.raises(RuntimeError):
                    genkernels.gru(**values)
            else:
                genkernels.gru(**values)
                assert {name for _, name in genkernels.stats()} == {named}

    def test_autocast(self) -> None:
        with torch.autocast("cpu", torch.float16):
            named = genkernels.explain("gru", **arguments(3, 4, 5, 6)).backend
        assert named == "reference"

    def test_autocast_leaves_float64(self) -> None:
        values = {name: value.double() for name, value in arguments(3, 4, 5, 6).items()}
        with torch.autocast("cpu", torch.float16):
            assert genkernels.explain("gru", **values).backend == "cpp"

    @pytest.mark.parametrize("op", ["nosuch", len], ids=str)
    def test_unknown_op(self, op: object) -> None:
        with pytest.raises(ValueError, match="gru"):
            genkernels.explain(op, torch.ones(1))


class TestSimd:
    def test_levels_run_from_low_to_high(self) -> None:
        levels = backend.simd_levels()
        order = ["baseline", "avx2", "avx512", "avx512_bf16"]
        assert levels == [level for level in order if level in levels]
        assert levels[0] == "baseline"
        assert backend.simd_level() in levels

    def test_use_simd(self, simd: str) -> None:
        assert backend.simd_level() == simd

    def test_use_simd_restores(self) -> None:
        before = backend.simd_level()
        with pytest.raises(KeyError), backend.use_simd("baseline"):
            raise KeyError
        assert backend.simd_level() == before

    def test_unknown_level(self) -> None:
        with pytest.raises(ValueError, match="avx9"), backend.use_simd("avx9"):
            pass

    @pytest.mark.parametrize("place", [0, -1], ids=["lowest", "highest"])
    def test_environment(self, place: int) -> None:
        simd = backend.simd_levels()[place]
        code = "import genkernels.backend as b; print(b.simd_level())"
        assert python(code, GENKERNELS_SIMD=simd).stdout.strip() == simd

    def test_default_is_the_fastest(self) -> None:
        """The highest, but for the bf16 dot products of Intel's CPUs."""
        expected = backend.simd_levels()[-1]
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text(encoding="utf-8"):
            expected = [level for level in backend.simd_levels() if level != "avx512_bf16"][-1]
        code = "import genkernels.backend as b; print(b.simd_level())"
        assert python(code, GENKERNELS_SIMD="").stdout.strip() == expected


@pytest.mark.parametrize(
    ("variable", "value"), [("GENKERNELS_SIMD", "avx9"), ("GENKERNELS_BACKEND", "nosuch")]
)
def test_wrong_variable(variable: str, value: str) -> None:
    """It says which variable, what it holds and what it may hold."""
    result = python("import genkernels", **{variable: value})
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert variable in last
    assert value in last
    assert "baseline" in last or "cpp" in last


def test_backend_variable() -> None:
    code = CALL + "print({backend for _, backend in genkernels.stats()})"
    assert python(code, GENKERNELS_BACKEND="reference").stdout.strip() == "{'reference'}"


@pytest.fixture(params=["missing", "unloadable"])
def without_extension(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the package whose extension was not built, or cannot be loaded."""
    ignore = shutil.ignore_patterns("_C.*so", "_C.*pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "genkernels", ignore=ignore)
    if request.param == "unloadable":
        name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
        (tmp_path / "genkernels" / name).write_bytes(b"not a library")
    return tmp_path


class TestWithoutExtension:
    def test_reference_runs_and_warns_once(self, without_extension: Path) -> None:
        """Compiled too; and explain says why."""
        code = CALL + (
            "assert {b for _, b in genkernels.stats()} == {'reference'}\n"
            f"assert genkernels.__file__.startswith({str(without_extension)!r})\n"
            "genkernels.gru(*values)\n"
            "genkernels.nn.GRU(5, 6)(values[0])[0].sum().backward()\n"
            "assert genkernels.backend.simd_levels() == []\n"
            "compiled = torch.compile(genkernels.gru, backend='aot_eager', fullgraph=True)\n"
            "assert torch.equal(compiled(*values)[0], output)\n"
            "print(genkernels.explain('gru', *values))\n"
        )
        result = python(code, without_extension)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("Warning") == 1
        assert "genkernels._C" in result.stderr
        assert "cpp: the compiled extension genkernels._C could not be loaded" in result.stdout

    @pytest.mark.parametrize(
        ("without_extension", "environment"),
        [("missing", {"GENKERNELS_STRICT": "1"}), ("unloadable", {"GENKERNELS_BACKEND": "cpp"})],
        ids=["strict", "backend"],
        indirect=["without_extension"],
    )
    def test_strict_raises(self, without_extension: Path, environment: dict[str, str]) -> None:
        result = python(CALL, without_extension, **environment)
        assert result.returncode != 0
        assert "genkernels._C" in result.stderr.strip().splitlines()[-1]
