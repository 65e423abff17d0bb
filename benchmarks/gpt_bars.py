"""A GPT's training step and its generation beside plain PyTorch's, and the bars they are held to:
`make bench-gpt`. Turns, medians and the peak are those of benchmarks.bars.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.bars import (
    CAPS,
    TRAINING,
    Bar,
    Local,
    Peer,
    Row,
    machine,
    measure,
    print_rows,
    ratio_bar,
    report,
    run_plan,
)
from benchmarks.bench_gpt import (
    CONTESTANTS,
    MIDDLE,
    MIDDLE_DROPOUT,
    NANO,
    Recipe,
    flops,
    make_step,
)
from genkernels.models.gpt import GPT, GPTConfig

# Of a training step's speed, that of each contestant. Where a ratio would ask for a larger share of
# the peak than products alone are held to, that share is asked instead.
RATIOS: dict[tuple[Recipe, torch.dtype], dict[str, float]] = {
    (NANO, torch.float32): {"torch": 1.5, "torch.compile": 1.3},
    (MIDDLE, torch.float32): {"torch": 1.7, "torch.compile": 1.4},
    (MIDDLE_DROPOUT, torch.float32): {"torch": 2.2, "torch.compile": 1.4},
    (MIDDLE, torch.bfloat16): {"torch": 1.3},
}
GENERATOR = GPTConfig(256, 1024, 6, 6, 384)
GENERATED = 512  # tokens
GENERATION = "GPT generation, 6 layers, width 384, B=1, 512 tokens"
GENERATION_RATIO, CACHE_RATIO = 1.5, 5.0


def step_row(
    recipe: Recipe, dtype: torch.dtype, ratios: Mapping[str, float], compiles: bool, rounds: int
) -> Row:
    contestants: dict[str, Local | Peer] = {
        name: Local(make_step(make_model, recipe, dtype))
        for name, make_model in CONTESTANTS.items()
        if name == "genkernels" or (name in ratios and (compiles or name != "torch.compile"))
    }
    gflops, peak = measure(contestants, flops(recipe), rounds, dtype)
    own = gflops["genkernels"]
    bars = [
        ratio_bar(name, ratios[name], rate, CAPS[TRAINING], peak, own)
        for name, rate in gflops.items()
        if name in ratios
    ]
    return Row(step_name(recipe, dtype), gflops, peak, bars)


def step_name(recipe: Recipe, dtype: torch.dtype) -> str:
    autocast = "bfloat16 autocast" if dtype == torch.bfloat16 else "float32"
    return f"{recipe.name}, training step, {autocast}"


def generator(fused: bool, use_cache: bool = True) -> Local:
    """Draws GENERATED tokens after the first, as `genkernels generate` does."""
    torch.manual_seed(0)
    model = GPT(GENERATOR, fused=fused)
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    return Local(functools.partial(model.generate, prompt, GENERATED, use_cache=use_cache))


def generation_row(rounds: int) -> Row:
    contestants: dict[str, Local | Peer] = {
        "genkernels": generator(fused=True),
        "torch": generator(fused=False),
    }
    gflops, peak = measure(contestants, generation_flops(), rounds)
    own = gflops["genkernels"]
    ratio = GENERATION_RATIO
    return Row(GENERATION, gflops, peak, [Bar(f"{ratio:g}x torch", ratio * gflops["torch"], own)])


def cache_row() -> Row:
    """Beside itself without a cache, which takes so long that one turn has to do."""
    contestants: dict[str, Local | Peer] = {
        "genkernels": generator(fused=True),
        "no cache": generator(fused=True, use_cache=False),
    }
    gflops, peak = measure(contestants, generation_flops(), 1)
    own, ratio = gflops["genkernels"], CACHE_RATIO
    bars = [Bar(f"{ratio:g}x no cache", ratio * gflops["no cache"], own)]
    return Row(f"{GENERATION}, with and without its cache", gflops, peak, bars)


def generation_flops() -> float:
    C = GENERATOR
    weights = C.num_layers * 12 * C.embedding_dim**2 + C.vocab_size * C.embedding_dim
    attention = C.num_layers * 4 * C.embedding_dim * GENERATED**2 / 2
    return 2.0 * weights * GENERATED + attention


def plan(compiles: bool, rounds: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    for (recipe, dtype), ratios in RATIOS.items():
        yield (
            step_name(recipe, dtype),
            functools.partial(step_row, recipe, dtype, ratios, compiles, rounds),
        )
    yield GENERATION, functools.partial(generation_row, rounds)
    yield f"{GENERATION}, with and without its cache", cache_row


def run(options: argparse.Namespace) -> int:
    settings = machine()
    print(", ".join(f"{key} {value}" for key, value in settings.items()), file=sys.stderr)
    rows = run_plan(list(plan(options.compile, options.rounds)), options.only)
    print_rows(rows)
    if options.save:
        command.write_json(Path(options.save) / "gpt.json", report(rows, settings))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpt_bars",
        description="Time a GPT's training step and its generation in turns with the same model in "
        "plain PyTorch, eager and under torch.compile, and print GFLOP/s, the share of the "
        "machine's measured FMA peak, and which bars are missed. Takes about five minutes.",
        epilog="Exit code: 0 when everything ran, bars missed or not; 2 when it could not. "
        "Example: python -m benchmarks.gpt_bars --only 'dropout 0.2'",
    )
    command.add_only(parser)
    command.add_rounds(parser, "turns per case")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="without torch.compile, which needs a C++ compiler and a minute for each case",
    )
    command.add_save(parser, "write gpt.json")
    options = parser.parse_args(arguments)
    if options.save and (options.only or not options.compile):
        parser.error("argument --save: not with --only or --no-compile")
    command.check(parser, options)
    return command.run("gpt_bars", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
