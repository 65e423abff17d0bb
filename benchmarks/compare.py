"""Is this tree slower than another revision? `python -m benchmarks.compare --base main`.

Both are built from source into a temporary folder and loaded by two worker processes that live for
the whole comparison. The workers run each case in turns, base, head, base, head, so that a drift of
the machine meets both alike, and what counts is the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import command
from benchmarks.workers import ROOT, Failure, Worker, median_seconds, requests

LIMIT = 0.95
TURN_SECONDS = 0.02  # a turn repeats a short case until it takes about this long


class BuildWorker(Worker):
    """A process that has loaded one build of genkernels and runs cases on request."""

    def __init__(self, name: str, site: Path) -> None:
        super().__init__(
            name,
            [sys.executable, "-m", "benchmarks.compare", "--serve", str(site)],
            # Unbound, a worker's threads can share one core for seconds; and threads that spin long
            # after their work would take the cores from the other worker's turn.
            {"OMP_PROC_BIND": "true", "GOMP_SPINCOUNT": "100000"},
        )
        self.cases: list[str] = self.answer()

    def seconds(self, case: str, calls: int) -> float:
        """Time of one call of a case, the median of `calls` after one that is not counted."""
        return self.ask([case, calls])


def serve(site: str) -> None:
    """The worker's side: cases are this tree's, genkernels is the build in `site`."""
    sys.path.insert(0, site)
    import genkernels

    if not Path(genkernels.__file__).is_relative_to(site):
        sys.exit(f"compare: {genkernels.__file__} was loaded instead of the build in {site}")
    from benchmarks.bench_gru import cases

    steps = cases("genkernels")
    asked, answer = requests()
    answer(list(steps))
    name, step = "", None
    for request, calls in asked:
        if request != name:
            name, step = request, steps[request]()
        assert step is not None
        answer(median_seconds(step, calls))


def git(*arguments: str) -> bytes:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True
        ).stdout
    except FileNotFoundError:
        raise Failure("git was not found on PATH") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode().strip().splitlines() or [f"exit code {error.returncode}"]
        raise Failure(f"git {arguments[0]}: {reason[-1]}") from None


def resolve(option: str, name: str) -> str:
    """The commit that a revision names."""
    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except Failure:
        raise Failure(f"{option} {name}: not a revision of {ROOT}") from None
    return commit.decode().strip()


def check_out(revision: str | None, folder: Path) -> None:
    """Write a revision, or for None the working tree without what git ignores, into a folder."""
    if revision is not None:
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", revision))) as archive:
            archive.extractall(folder, filter="data")
        return
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split(b"\0"):
        source = ROOT / os.fsdecode(name)
        if name and source.is_file():
            target = folder / os.fsdecode(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def build(name: str, revision: str | None, folder: Path) -> Path:
    """Build a revision and return the folder it can be imported from."""
    source, site = folder / "source", folder / "site"
    source.mkdir(parents=True)
    check_out(revision, source)
    print(f"Building {name}", file=sys.stderr, flush=True)
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, str(source)]
    if subprocess.run(command, stdout=sys.stderr.fileno()).returncode != 0:
        raise Failure(f"{name} did not build, see above")
    return site


def compare(
    base: BuildWorker, head: BuildWorker, case: str, rounds: int
) -> tuple[list[float], list[float]]:
    """Median seconds of both, and the quartiles of base / head, above 1 where head is faster."""
    once = min(worker.seconds(case, 3) for worker in (base, head))
    calls = max(1, round(TURN_SECONDS / once))
    turns = [(base.seconds(case, calls), head.seconds(case, calls)) for _ in range(rounds)]
    medians = [statistics.median(times) for times in zip(*turns, strict=True)]
    return medians, statistics.quantiles((b / h for b, h in turns), n=4)


def run(options: argparse.Namespace) -> int:
    # Resolved before anything is built: a wrong name is told at once.
    revisions = {"base": resolve("--base", options.base), "head": None}
    if options.head is not None:
        revisions["head"] = resolve("--head", options.head)
    labels = {
        role: f"{role} ({getattr(options, role) or 'working tree'})" for role in ("base", "head")
    }
    with tempfile.TemporaryDirectory(prefix="genkernels-compare-") as folder:
        sites = {
            role: build(labels[role], revisions[role], Path(folder) / role) for role in revisions
        }
        workers: list[BuildWorker] = []
        try:
            for role, site in sites.items():
                workers.append(BuildWorker(labels[role], site))
            base, head = workers
            cases = [case for case in head.cases if options.only in case]
            if not cases:
                example = head.cases[0]
                raise Failure(f"--only {options.only}: no case is named so; the first is {example}")
            print("| case | base ms | head ms | base / head | quartiles |\n|---|---|---|---|---|")
            slower = []
            for case in cases:
                seconds, (low, ratio, high) = compare(base, head, case, options.rounds)
                cells = [f"{value * 1e3:.3f}" for value in seconds]
                cells += [f"{ratio:.3f}", f"{low:.3f}-{high:.3f}"]
                print(f"| {case} | {' | '.join(cells)} |", flush=True)
                slower += [case] if ratio < LIMIT else []
        finally:
            for worker in workers:
                worker.close()
    if slower:
        print(
            f"compare: slower than {LIMIT} of {labels['base']}: {'; '.join(slower)}",
            file=sys.stderr,
        )
    return 1 if slower else 0


def at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Build two revisions, run their benchmarks in turns in two processes, and "
        "print how the times compare.",
        epilog="Exit code: 0 if base / head is nowhere below 0.95, 1 if it is, 2 if the comparison "
        "could not be made. Example: python -m benchmarks.compare --base HEAD~1 --only T=512",
    )
    parser.add_argument(
        "--base", metavar="REV", help="revision to compare with, as git names it (required)"
    )
    parser.add_argument(
        "--head",
        metavar="REV",
        help="revision that is compared (default: the working tree, uncommitted changes included)",
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help="run the cases whose name contains this (default: all)",
    )
    parser.add_argument(
        "--rounds",
        type=at_least(3),
        default=15,
        metavar="N",
        help="turns that each side takes per case (default: %(default)s)",
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return 0
    if not options.base:
        parser.error("argument --base: expected a revision, such as main or HEAD~1")
    return command.run("compare", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
