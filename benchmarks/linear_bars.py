"""linear and linear_cross_entropy beside PyTorch's, and the bars they are held to: `make
bench-linear`. Turns, medians and the peak are those of benchmarks.bars.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import genkernels
from benchmarks import bench_linear, bench_linear_cross_entropy, command
from benchmarks.bars import (
    CAPS,
    FORWARD,
    GRID_RATIO,
    TRAINING,
    Bar,
    Local,
    Peer,
    Row,
    machine,
    measure,
    print_lines,
    print_rows,
    ratio_bar,
    report,
    run_plan,
)
from benchmarks.workers import ROOT, number_of

Shape = tuple[int, int, int]
Plan = Iterator[tuple[str, Callable[[], Row]]]

# The share of the machine's FMA peak that float32 has to reach.
LINEAR_SHARES = {FORWARD: 0.85, TRAINING: 0.80}
LOSS_SHARES = {FORWARD: 0.80, TRAINING: 0.78}
LOSS_RATIOS = {(6400, 512, 10000): 3.0, (2048, 768, 50257): 2.5}  # of torch, training
BFLOAT16_RATIO = 0.97  # linear, of torch's bfloat16
BFLOAT16_LOSS_RATIO = 1.7  # of its own float32
# Bytes of a training step beyond the gradients that it returns.
LOSS_MEMORY = {(6400, 512, 10000): 64e6, (2048, 768, 50257): 128e6}
GRID = ROOT / "benchmarks" / "linear_grid.csv"


def linear_row(
    shape: Shape, activation: str | None, direction: str, dtype: torch.dtype, rounds: int
) -> Row:
    contestants: dict[str, Local | Peer] = {
        name: Local(bench_linear.make_step(function, shape, direction, dtype))
        for name, function in bench_linear.CONTESTANTS[activation].items()
    }
    gflops, peak = measure(contestants, bench_linear.flops(shape, direction), rounds, dtype)
    own, torch_s = gflops["genkernels"], gflops["torch"]
    bars = [Bar(f"{BFLOAT16_RATIO:g}x torch", BFLOAT16_RATIO * torch_s, own)]
    if dtype == torch.float32:
        bars = [ratio_bar("torch", 1.0, torch_s, CAPS[direction], peak, own)]
        if activation is None:
            share = LINEAR_SHARES[direction]
            bars.append(Bar(f"{share:.0%} of peak", share * peak, own))
    return Row(linear_name(shape, activation, direction, dtype), gflops, peak, bars)


def linear_name(shape: Shape, activation: str | None, direction: str, dtype: torch.dtype) -> str:
    return f"{bench_linear.label(shape, activation)}, {direction}, {_name(dtype)}"


def loss_row(shape: Shape, direction: str, dtype: torch.dtype, rounds: int) -> Row:
    bench = bench_linear_cross_entropy
    contestants: dict[str, Local | Peer] = {
        name: Local(bench.make_step(function, shape, direction, dtype))
        for name, function in bench.CONTESTANTS.items()
    }
    if dtype == torch.bfloat16:
        contestants["own float32"] = Local(
            bench.make_step(bench.CONTESTANTS["genkernels"], shape, direction, torch.float32)
        )
    gflops, peak = measure(contestants, bench.flops(shape, direction), rounds, dtype)
    own = gflops["genkernels"]
    if dtype == torch.bfloat16:
        ratio = BFLOAT16_LOSS_RATIO
        bars = [Bar(f"{ratio:g}x own float32", ratio * gflops["own float32"], own)]
    else:
        share = LOSS_SHARES[direction]
        bars = [Bar(f"{share:.0%} of peak", share * peak, own)]
        if direction == TRAINING:
            bars += [
                ratio_bar(name, LOSS_RATIOS[shape], rate, CAPS[direction], peak, own)
                for name, rate in gflops.items()
                if name.startswith("torch")
            ]
    return Row(loss_name(shape, direction, dtype), gflops, peak, bars)


def loss_name(shape: Shape, direction: str, dtype: torch.dtype) -> str:
    return f"{bench_linear_cross_entropy.label(shape)}, {direction}, {_name(dtype)}"


def grid_row(
    shape: Shape, activation: str | None, direction: str, dtype: torch.dtype, rounds: int
) -> Row:
    """Beside torch alone, which no point of the grid may lose to; 3% are noise. What is handed over
    is torch's own, and has no bar."""
    row = linear_row(shape, activation, direction, dtype, rounds)
    torch_s, own = row.gflops["torch"], row.gflops["genkernels"]
    row.bars = [ratio_bar("torch", GRID_RATIO, torch_s, CAPS[direction], row.peak, own)]
    if is_handed_over(shape, activation, direction, dtype):
        row.case, row.bars = f"{row.case} (handed over)", []
    return row


def is_handed_over(
    shape: Shape, activation: str | None, direction: str, dtype: torch.dtype
) -> bool:
    M, K, N = shape
    input, weight = torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype)
    weight.requires_grad_(direction == TRAINING)
    explanation = genkernels.explain("linear", input, weight, activation=activation)
    return explanation.backend == "reference"


def read_grid() -> Iterator[tuple[Shape, str | None, str, torch.dtype]]:
    with open(GRID, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            M, K, N = (int(line[name]) for name in "MKN")
            dtype = getattr(torch, line["dtype"])
            yield (M, K, N), line["activation"] or None, line["direction"], dtype


def memory_lines() -> Iterator[str]:
    """What a training step takes at its peak beyond its gradients, each in a process of its own."""
    for shape, allowed in LOSS_MEMORY.items():
        for name in bench_linear_cross_entropy.CONTESTANTS:
            extra = extra_memory(shape, name)
            verdict = ""
            if name == "genkernels":
                verdict = (
                    f", {'met' if extra <= allowed else 'MISSED'}: at most {allowed / 1e6:g} MB"
                )
            label = bench_linear_cross_entropy.label(shape)
            yield f"- memory, {label}, {name}: {extra / 1e6:.0f} MB{verdict}"


def extra_memory(shape: Shape, contestant: str) -> float:
    """Bytes, from the peak of the process's resident memory before the step to that after it."""
    program = (
        "import json, sys, torch\n"
        "from benchmarks.workers import peak_memory\n"
        "from benchmarks import bench_linear_cross_entropy as bench\n"
        "name, *shape = json.loads(sys.argv[1])\n"
        "warm = bench.make_step(bench.CONTESTANTS[name], (512, 64, 1000), 'forward+backward',"
        " torch.float32)\n"
        "warm()\n"
        "step = bench.make_step(bench.CONTESTANTS[name], tuple(shape), 'forward+backward',"
        " torch.float32)\n"
        "before = peak_memory()\n"
        "_, *gradients = step()\n"
        "print(peak_memory() - before - sum(4 * g.numel() for g in gradients))\n"
    )
    return number_of(f"the memory of {contestant} at {shape}", program, contestant, *shape)


def bars_plan(rounds: int) -> Plan:
    dtypes = (torch.float32, torch.bfloat16)
    shapes = bench_linear.SHAPES
    activations = bench_linear.CONTESTANTS
    for case in itertools.product(shapes, activations, (FORWARD, TRAINING), dtypes):
        yield linear_name(*case), functools.partial(linear_row, *case, rounds)
    for loss_case in itertools.product(
        bench_linear_cross_entropy.SHAPES, (FORWARD, TRAINING), dtypes
    ):
        yield loss_name(*loss_case), functools.partial(loss_row, *loss_case, rounds)


def grid_plan(rounds: int) -> Plan:
    for case in read_grid():
        yield linear_name(*case), functools.partial(grid_row, *case, rounds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(options: argparse.Namespace) -> int:
    settings = machine()
    print(", ".join(f"{key} {value}" for key, value in settings.items()), file=sys.stderr)
    plan = list((grid_plan if options.grid else bars_plan)(options.rounds))
    rows = run_plan(plan, options.only)
    print_rows(rows)
    memory = print_lines(() if options.grid or options.only else memory_lines())
    if options.save:
        command.write_json(
            Path(options.save) / "linear.json", report(rows, {**settings, "memory": memory})
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear_bars",
        description="Time linear and linear_cross_entropy in turns with PyTorch's and print "
        "GFLOP/s, the share of the machine's measured FMA peak, and which bars are missed.",
        epilog="Exit code: 0 when everything ran, bars missed or not; 2 when it could not. "
        "Example: python -m benchmarks.linear_bars --only 'V=10000, forward+backward'",
    )
    command.add_only(parser)
    command.add_rounds(parser, "turns per case")
    parser.add_argument(
        "--grid",
        action="store_true",
        help="the points of benchmarks/linear_grid.csv: small, odd and large sizes, of which none "
        "may lose to PyTorch",
    )
    command.add_save(parser, "write linear.json")
    options = parser.parse_args(arguments)
    if options.save and (options.grid or options.only):
        parser.error("argument --save: not with --grid or --only")
    command.check(parser, options)
    return command.run("linear_bars", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
