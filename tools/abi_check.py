"""Build one wheel against the oldest supported torch and run the op tests with it on two torches.

Each torch gets a virtual environment under build/abi-check, which a second run uses again. On Linux
the index's torch comes with the CUDA libraries: several gigabytes each. Where a CPU-only torch 2.10
can be had, name it: --old 'torch==2.10.0 --index-url https://download.pytorch.org/whl/cpu'.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "abi-check"


def run(*command, cwd=WORK, **variables):
    print("$", shlex.join(map(str, command)), flush=True)
    subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, check=True)


def make_environment(name: str, torch: str) -> Path:
    environment = WORK / name
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    run(python, "-m", "pip", "install", "--upgrade", *shlex.split(torch))
    run(python, "-m", "pip", "install", "-r", ROOT / "requirements-dev.txt")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--old", default="torch==2.10.0", help="pip arguments (default: %(default)s)"
    )
    parser.add_argument(
        "--new", default="torch", help="pip arguments (default: %(default)s, newest)"
    )
    arguments = parser.parse_args()

    WORK.mkdir(parents=True, exist_ok=True)
    pythons = [make_environment("old", arguments.old), make_environment("new", arguments.new)]

    dist = WORK / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    # Through the source distribution, so that the tree's own build folder stays as it is.
    run(pythons[0], "-m", "build", "--no-isolation", "--outdir", dist, ROOT)
    [wheel] = dist.glob("*.whl")

    # Away from the source tree, which would be imported instead of the wheel.
    tests = WORK / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests)
    shutil.copy2(ROOT / "pyproject.toml", WORK)
    ops = [
        test for op in ROOT.glob("csrc/kernels/*.cpp") for test in tests.glob(f"test_{op.stem}*.py")
    ]
    failures = 0
    for python in pythons:
        run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
        run(python, "-m", "genkernels.info")
        try:
            run(python, "-m", "pytest", *ops, GENKERNELS_STRICT="1")
        except subprocess.CalledProcessError:
            failures += 1  # the other torch still has its turn
    if failures:
        sys.exit(f"abi-check: the op tests failed beside {failures} of {len(pythons)} torches")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"abi-check: this command failed: {shlex.join(map(str, error.cmd))}")
