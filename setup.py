"""Builds genkernels._C with CMake and Ninja; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

from build_backend import find_cuda, find_torch

ROOT = Path(__file__).resolve().parent
REMEDY = "or set GENKERNELS_SKIP_BUILD=1 to install without the compiled kernels"
CXX20 = "#include <bit>\n#include <concepts>\n#include <span>\nint main() { return 0; }\n"


def find_compiler() -> str:
    needs = "genkernels needs a C++20 compiler (g++ >= 11 or clang++ >= 14)"
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        where = f"CXX={chosen} was not found" if chosen else "none was found"
        raise SetupError(f"{needs}: {where}; install one, {REMEDY}")
    probe = [found, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(probe, input=CXX20, text=True, capture_output=True).returncode != 0:
        raise SetupError(f"{needs}: {found} cannot compile C++20; install a newer one, {REMEDY}")
    return found


def find_tool(name: str) -> str:
    # Without build isolation the environment's scripts need not be on PATH.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SetupError(f"genkernels needs {name} to build: pip install {name}, {REMEDY}")
    return tool


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        wants_cuda = os.environ.get("GENKERNELS_CUDA") or "auto"
        if wants_cuda not in ("auto", "0", "1"):
            raise SetupError(f"GENKERNELS_CUDA={wants_cuda}: expected auto, 0 or 1")
        compiler = find_compiler()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        try:
            torch_dir, torch_version = find_torch()
        except LookupError as found:
            raise SetupError(
                f"genkernels needs torch >= 2.10 to build against: {found}; "
                f"install one, name its folder in GENKERNELS_TORCH_DIR, {REMEDY}"
            ) from None

        nvcc = None
        if wants_cuda != "0":
            try:
                nvcc = find_cuda(torch_dir, compiler)
            except LookupError as found:
                if wants_cuda == "1":
                    raise SetupError(
                        f"GENKERNELS_CUDA=1 needs nvcc (CUDA >= 12) and a torch for CUDA: {found}"
                    ) from None
                self.announce(f"The CUDA kernels are left out: {found}", level=2)

        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cache = build_dir / "CMakeCache.txt"
        # CMake keeps the first compilers that it saw.
        if cache.exists():
            seen = cache.read_text(encoding="utf-8")
            if any(f"={each}\n" not in seen for each in filter(None, (compiler, nvcc))):
                cache.unlink()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": compiler,
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "GENKERNELS_TORCH_DIR": torch_dir.as_posix(),
            "GENKERNELS_TORCH_VERSION": torch_version,
            "GENKERNELS_VERSION": self.distribution.get_version(),
            "GENKERNELS_CUDA": "OFF",
        }
        if nvcc is not None:
            options |= {
                "GENKERNELS_CUDA": "ON",
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_HOST_COMPILER": compiler,
            }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # What was chosen for one build is not for the next.
        defines += ["-UGENKERNELS_SIMD_LEVELS", "-UCMAKE_CUDA_ARCHITECTURES"]
        defines += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self.run_cmake([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir), *defines])
        self.run_cmake([cmake, "--build", str(build_dir)])

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_dir / target.name, target)

    def run_cmake(self, command: list[str]) -> None:
        sys.stdout.flush()
        if subprocess.run(command).returncode != 0:
            raise SetupError(f"genkernels did not build (see above): fix that, {REMEDY}")


skip = os.environ.get("GENKERNELS_SKIP_BUILD") == "1"
setup(
    ext_modules=[] if skip else [Extension("genkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
