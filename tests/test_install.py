"""From the source tree to an installed package, and what is said when something is missing."""

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest
import torch

import genkernels

ROOT = Path(__file__).resolve().parents[1]


def run(command, *, cwd, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_python(code, *, cwd, python=sys.executable, **variables):
    return run([python, "-c", textwrap.dedent(code)], cwd=cwd, **variables)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder]
    result = run([*build, ROOT], cwd=folder)
    assert result.returncode == 0, result.stdout
    return next(folder.glob("*.tar.gz"))


def pip_wheel(sdist, folder, **variables):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    return run([*pip, "-w", folder, sdist], cwd=folder, **variables)


def install(wheel, environment):
    """A fresh virtual environment with the wheel in it, and torch from the running one."""
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    paths = {"base": str(environment), "platbase": str(environment)}
    site_packages = Path(sysconfig.get_path("purelib", vars=paths))
    # The .pth files of a folder that a .pth file names are not read, so the running environment's
    # own (editable) genkernels stays hidden.
    beside_torch = [str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib")]
    (site_packages / "torch.pth").write_text("\n".join(beside_torch))
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    result = run([*pip, "--no-deps", "--no-index", wheel], cwd=environment)
    assert result.returncode == 0, result.stdout
    return python


@pytest.mark.slow
def test_wheel_from_sdist_runs_the_cpu_kernel(sdist, tmp_path):
    # One SIMD level compiles every file; all four take minutes. Optimising takes as long again.
    settings = "-DGENKERNELS_SIMD_LEVELS=baseline -DCMAKE_BUILD_TYPE=None"
    result = pip_wheel(sdist, tmp_path, CMAKE_ARGS=settings)
    assert result.returncode == 0, result.stdout
    [wheel] = tmp_path.glob("*.whl")
    python = install(wheel, tmp_path / "env")
    code = """
        import torch
        import genkernels

        gru = torch.nn.GRU(3, 5)
        x = torch.randn(7, 2, 3)
        output, h_n = genkernels.gru(x, torch.zeros(2, 5), *gru.parameters())
        torch.testing.assert_close((output, h_n[None]), gru(x))
        assert genkernels.stats()["gru_forward", "cpp"] == 1, genkernels.stats()
        assert genkernels.backend.simd_levels() == ["baseline"]
        print(genkernels.__file__)
    """
    result = run_python(code, python=python, cwd=tmp_path, GENKERNELS_STRICT="1")
    assert result.returncode == 0, result.stdout
    assert Path(result.stdout.strip()).is_relative_to(tmp_path / "env")


@pytest.fixture(scope="module")
def bare_wheel(sdist, tmp_path_factory):
    """A wheel without the extension."""
    folder = tmp_path_factory.mktemp("bare")
    result = pip_wheel(sdist, folder, GENKERNELS_SKIP_BUILD="1")
    assert result.returncode == 0, result.stdout
    [wheel] = folder.glob("*-py3-none-any.whl")
    return wheel


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler was not found"),
        ({"CXX": "", "PATH": "/nonexistent"}, "none was found"),
    ],
)
def test_missing_compiler_is_one_sentence(sdist, tmp_path, variables, reason):
    result = pip_wheel(sdist, tmp_path, **variables)
    assert result.returncode != 0
    assert "Traceback" not in result.stdout
    assert [line.strip() for line in result.stdout.splitlines() if "compiler" in line] == [
        f"error: genkernels needs a C++20 compiler (g++ >= 11 or clang++ >= 14): {reason}; "
        "install one, or set GENKERNELS_SKIP_BUILD=1 to install without the compiled kernels"
    ]


def test_old_torch_is_not_built_against(sdist, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1'\n")
    result = pip_wheel(sdist, tmp_path, GENKERNELS_TORCH_DIR=str(tmp_path))
    assert result.returncode != 0
    assert "Traceback" not in result.stdout
    assert f"genkernels needs torch >= 2.10 to build against: {tmp_path} has 2.9.1" in result.stdout


@pytest.mark.parametrize("extension", ["missing", "broken"])
def test_without_the_extension_the_reference_runs(bare_wheel, tmp_path, extension):
    bare_python = install(bare_wheel, tmp_path / "env")
    if extension == "broken":
        [package] = (tmp_path / "env").glob("**/site-packages/genkernels")
        (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    code = """
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch
            import genkernels

            gru = torch.nn.GRU(3, 5)
            x = torch.randn(7, 2, 3)
            for _ in range(3):
                output, h_n = genkernels.gru(x, torch.zeros(2, 5), *gru.parameters())
            torch.testing.assert_close((output, h_n[None]), gru(x))
        print(genkernels.__file__)
        print(genkernels.stats())
        for warning in caught:
            print("warning:", warning.message)
    """
    result = run_python(code, python=bare_python, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    file, stats, *said = result.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "env")
    assert stats == "{('gru', 'reference'): 3}"
    reason = "the compiled extension genkernels._C could not be loaded"
    assert len(said) == 1, said
    assert said[0].startswith("warning: genkernels.gru runs the plain PyTorch reference: " + reason)

    result = run([bare_python, "-m", "genkernels.info"], cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert reason in result.stdout


def test_info_names_what_runs():
    result = run([sys.executable, "-m", "genkernels.info"], cwd=ROOT)
    assert result.returncode == 0, result.stdout
    assert torch.__version__ in result.stdout
    assert genkernels.backend.simd_level() in result.stdout
