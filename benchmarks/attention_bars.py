"""Fused attention beside its peers, and the bars it is held to: `make bench-attention`.

Turns, medians and the peak are those of benchmarks.bars. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks import bench_attention, command, limits
from benchmarks.bars import (
    FORWARD,
    GRID_RATIO,
    TRAINING,
    Bar,
    Local,
    Peer,
    Row,
    admitted,
    described,
    machine,
    measure,
    peer_lines,
    print_lines,
    print_rows,
    ratio_bar,
    run_plan,
    save,
    start_peers,
)
from benchmarks.bench_attention import CONTESTANTS, FLEX, SHAPES, Shape, flops, make_step
from benchmarks.peers.check import Verdict, Wrong, check, largest_error
from benchmarks.peers.op import ATTENTION, Expected
from benchmarks.steps import Step
from benchmarks.workers import (
    ROOT,
    median_seconds,
    number_of,
    peak_memory,
    resident_memory,
)
from genkernels import backend

Plan = Iterator[tuple[str, Callable[[], Row]]]
Function = Callable[..., Any]

# The share of the machine's FMA peak that float32 has to reach forward. A ratio asks for no more
# than CAP_MARGIN above the share of its row, or than CAPS where the row has none.
SHARES = {
    Shape(1, 8, 512, 512, 64): 0.77,
    Shape(4, 8, 1024, 1024, 64): 0.81,
    Shape(2, 8, 1024, 1024, 128): 0.81,
    Shape(1, 8, 2048, 2048, 64, causal=True): 0.80,
    Shape(4, 8, 1024, 1024, 64, causal=True): 0.72,
    Shape(2, 8, 1024, 1024, 128, causal=True): 0.72,
    Shape(1, 8, 512, 512, 64, causal=True): 0.63,
}
CAP_MARGIN = 0.03
CAPS = {FORWARD: 0.85, TRAINING: 0.75}
AVX2_SHARE = 0.70
LONG = 512  # from this length on, shares of a peak are asked for

DROPOUT = 0.1
DROPOUT_RATIOS = {
    Shape(4, 8, 1024, 1024, 64, causal=True): 8.0,
    Shape(16, 8, 256, 256, 64, causal=True): 4.0,
}
BIAS = Shape(4, 8, 1024, 1024, 64, bias=True)
BIAS_RATIO = 3.5
DECODE = tuple(Shape(1, 32, 1, S, 128) for S in (2048, 8192))
DECODE_SHARE = 0.80  # of what a plain loop reads
READ_LOOP = "C read loop"
PENALTY = Shape(8, 8, 256, 256, 64)
PENALTY_RATIO = 3.0
# Forward, backward, and the backward pass of both: 2, 5 and 10 products of the forward's size. The
# gradient of the cotangent, another 2, nobody asks for.
PENALTY_PRODUCTS = 17
MEMORY_LENGTH = 16384
MEMORY = 64e6  # bytes
GRID = ROOT / "benchmarks" / "attention_grid.csv"

functions = {name: CONTESTANTS[name] for name in ("genkernels", "torch")}


def asked_share(shape: Shape, direction: str, dtype: torch.dtype) -> float | None:
    """Of the peak."""
    if shape.L < LONG:
        return None
    if direction == FORWARD and dtype == torch.float32:
        return SHARES[shape]
    if direction == FORWARD:
        return (0.45 if shape.L > LONG else None) if shape.causal else 0.55
    if dtype == torch.float32:
        return 0.58 if shape.L == LONG else 0.62 if shape.causal else 0.68
    return None


def asked_ratios(
    shape: Shape, direction: str, dtype: torch.dtype, gflops: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """Names of contestants, and how many times their speed is asked for."""
    if direction == TRAINING:
        yield "torch", 2.3 if dtype == torch.float32 else 2.5
        return
    if dtype == torch.bfloat16:
        yield "torch", 3.5
        if "openvino" in gflops:
            yield "openvino", 1.8 if shape.causal else 1.1
        return
    others = {name: rate for name, rate in gflops.items() if name != "genkernels"}
    best = max(others, key=others.__getitem__)
    if shape.L < LONG:
        yield "torch", 2.5
        yield best, 1.5
    else:
        yield best, 2.2 if shape.causal else 1.1


def bars_of(
    shape: Shape, direction: str, dtype: torch.dtype, gflops: Mapping[str, float], peak: float
) -> list[Bar]:
    own, share = gflops["genkernels"], asked_share(shape, direction, dtype)
    cap = CAPS[direction] if share is None else share + CAP_MARGIN
    bars = [] if share is None else [Bar(f"{share:.0%} of peak", share * peak, own)]
    return bars + [
        ratio_bar(name, ratio, gflops[name], cap, peak, own)
        for name, ratio in asked_ratios(shape, direction, dtype, gflops)
    ]


def held(
    name: str, step: Step, expected: Expected, dtype: torch.dtype, parity: bool | None = None
) -> Verdict:
    """Check what a step of this process returns; raises Wrong. `parity` asks for the rule of
    tests/parity.py too, as by default of genkernels."""
    results = {key: t.detach().float() for key, t in zip(expected, step(), strict=True)}
    verdict = check(name, results, expected, dtype)
    parity = name == "genkernels" if parity is None else parity
    if parity and not verdict.parity:
        raise Wrong(f"{name}: its errors break the rule of tests/parity.py: {verdict.errors}")
    return verdict


def error_bar(own: Verdict, expected: Expected) -> Bar:
    """No gradient's largest error exceeds PyTorch's own."""
    torch_s = {
        name: largest_error(plain, exact) / exact.abs().max().item()
        for name, (plain, exact) in expected.items()
        if name.startswith("grad of")
    }
    least = min(error / own.errors[name] for name, error in torch_s.items())
    return Bar("gradient errors, at most torch's", 1.0, least)


def sequence_row(
    shape: Shape, direction: str, dtype: torch.dtype, peers: Mapping[str, Peer], rounds: int
) -> Row:
    expected = ATTENTION.expected(shape, direction, dtype)
    contestants: dict[str, Local | Peer] = {}
    bars = []
    for name, function in CONTESTANTS.items():
        if direction == TRAINING and name == FLEX:
            continue
        step = make_step(function, shape, direction, dtype)
        try:
            verdict = held(name, step, expected, dtype) if name != "torch" else None
        except Wrong as error:
            if name == "genkernels":
                raise
            print(f"attention_bars: {error}", file=sys.stderr)
            continue
        if name == "genkernels" and (direction, dtype) == (TRAINING, torch.bfloat16):
            assert verdict is not None
            bars.append(error_bar(verdict, expected))
        contestants[name] = Local(step)
    contestants |= admitted(peers, shape, direction, dtype)
    gflops, peak = measure(contestants, flops(shape, direction), rounds, dtype)
    bars = bars_of(shape, direction, dtype, gflops, peak) + bars
    return Row(sequence_name(shape, direction, dtype), gflops, peak, bars)


def sequence_name(shape: Shape, direction: str, dtype: torch.dtype) -> str:
    return f"{sizes(shape)}, {direction}, {_name(dtype)}"


def sizes(shape: Shape) -> str:
    return bench_attention.label(shape).removeprefix("attention ")


def avx2_row(shape: Shape, direction: str, rounds: int) -> Row:
    dtype = torch.float32
    step = make_step(CONTESTANTS["genkernels"], shape, direction, dtype)
    with backend.use_simd("avx2"):
        held("genkernels", step, ATTENTION.expected(shape, direction, dtype), dtype)
        work = flops(shape, direction)
        gflops, peak = measure({"genkernels": Local(step)}, work, rounds, dtype, "avx2")
    bar = Bar(f"{AVX2_SHARE:.0%} of AVX2 peak", AVX2_SHARE * peak, gflops["genkernels"])
    return Row(f"{sequence_name(shape, direction, dtype)}, AVX2", gflops, peak, [bar])


def beside_torch_row(
    name: str,
    steps: Mapping[str, Step],
    work: float,
    direction: str,
    dtype: torch.dtype,
    ratio: float,
    rounds: int,
) -> Row:
    """`steps` are genkernels' and PyTorch's, whose name says how it computes."""
    contestants = {key: Local(step) for key, step in steps.items()}
    gflops, peak = measure(contestants, work, rounds, dtype)
    own = gflops["genkernels"]
    bars = [
        ratio_bar(other, ratio, rate, CAPS[direction], peak, own)
        for other, rate in gflops.items()
        if other != "genkernels"
    ]
    return Row(name, gflops, peak, bars)


def bias_row(shape: Shape, rounds: int) -> Row:
    case = shape, TRAINING, torch.float32
    steps = {name: make_step(function, *case) for name, function in functions.items()}
    held("genkernels", steps["genkernels"], ATTENTION.expected(*case), torch.float32)
    return beside_torch_row(
        sequence_name(*case), steps, flops(shape, TRAINING), *case[1:], BIAS_RATIO, rounds
    )


def dropout_row(shape: Shape, rounds: int) -> Row:
    case = shape, TRAINING, torch.float32
    dropping = {
        name: functools.partial(function, dropout_p=DROPOUT) for name, function in functions.items()
    }

    def seeded(compute_dtype: torch.dtype) -> Sequence[Tensor]:
        # Of the first of the batch: the reference computes every element's random number.
        function, first = dropping["genkernels"], shape._replace(B=1)
        torch.manual_seed(0)
        return make_step(function, first, *case[1:], compute_dtype)()

    with backend.use_backend("reference"):
        pairs = zip(seeded(torch.float32), seeded(torch.float64), strict=True)
    expected = dict(zip(bench_attention.result_names(shape, TRAINING), pairs, strict=True))
    held("genkernels", lambda: seeded(torch.float32), expected, torch.float32)
    steps = {name: make_step(function, *case) for name, function in dropping.items()}
    return beside_torch_row(
        dropout_name(shape), steps, flops(shape, TRAINING), *case[1:], DROPOUT_RATIOS[shape], rounds
    )


def dropout_name(shape: Shape) -> str:
    return f"{sequence_name(shape, TRAINING, torch.float32)}, dropout {DROPOUT}"


def penalty_step(function: Function, shape: Shape, compute_dtype: torch.dtype) -> Step:
    """The gradients of the squared norm of the gradients, as a gradient penalty takes them."""
    values = {k: v.to(compute_dtype) for k, v in bench_attention.draw(shape, torch.float32).items()}
    cotangent = values.pop("cotangent")
    leaves = [value.requires_grad_() for value in values.values()]

    def step() -> Sequence[Tensor]:
        output = function(*leaves)
        first = torch.autograd.grad(output, leaves, cotangent, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    return step


def math_path(*arguments: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments)


def penalty_row(rounds: int) -> Row:
    plain, exact = (
        penalty_step(math_path, PENALTY, dtype) for dtype in (torch.float32, torch.float64)
    )
    own = penalty_step(CONTESTANTS["genkernels"], PENALTY, torch.float32)
    names = bench_attention.result_names(PENALTY, TRAINING)[1:]
    expected = dict(zip(names, zip(plain(), exact(), strict=True), strict=True))
    held("genkernels", own, expected, torch.float32)
    return beside_torch_row(
        penalty_name(),
        {"genkernels": own, "torch (math)": plain},
        flops(PENALTY, FORWARD) / 2 * PENALTY_PRODUCTS,
        TRAINING,
        torch.float32,
        PENALTY_RATIO,
        rounds,
    )


def penalty_name() -> str:
    return f"gradient penalty {sizes(PENALTY)}, float32"


class Flushed:
    """A contestant whose every call finds `tensors` in no cache."""

    def __init__(self, step: Callable[[], object], tensors: Sequence[Tensor]) -> None:
        self.step, self.tensors = step, tensors
        self.small = torch.ones(1 << 16)

    def prepare(self) -> None:
        limits.flush(self.tensors)
        self.small.neg_()  # wakes the threads, which fell asleep meanwhile

    def seconds(self, calls: int) -> float:
        return median_seconds(self.step, calls, self.prepare)


class ReadLoop(Flushed):
    """Threads that do nothing but read `tensors`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(lambda: None, tensors)

    def seconds(self, calls: int) -> float:
        times = []
        for _ in range(calls):
            self.prepare()
            times.append(limits.read_seconds(self.tensors, torch.get_num_threads()))
        return sorted(times)[len(times) // 2]


def decode_row(shape: Shape, dtype: torch.dtype, rounds: int) -> Row:
    """Rates are GB/s, of keys and values, and the peak is what the loop reads."""
    values = bench_attention.draw(shape, dtype)
    query, key, value = (values[name] for name in ("query", "key", "value"))
    expected = ATTENTION.expected(shape, FORWARD, dtype)
    contestants: dict[str, Any] = {READ_LOOP: ReadLoop([key, value])}
    for name, function in functions.items():
        step = torch.no_grad()(functools.partial(function, query, key, value))
        if name != "torch":
            held(name, lambda step=step: (step(),), expected, dtype)
        contestants[name] = Flushed(step, [query, key, value])
    rates, _ = measure(contestants, key.nbytes + value.nbytes, rounds)
    loop = rates.pop(READ_LOOP)
    bar = Bar(f"{DECODE_SHARE:.0%} of a {READ_LOOP}", DECODE_SHARE * loop, rates["genkernels"])
    return Row(decode_name(shape, dtype), rates, loop, [bar])


def decode_name(shape: Shape, dtype: torch.dtype) -> str:
    return f"decode {sizes(shape)}, {_name(dtype)}, GB/s"


def grid_row(shape: Shape, direction: str, dtype: torch.dtype, rounds: int) -> Row:
    """Beside torch alone, which no point of the grid may lose to; 3% are noise."""
    case = shape, direction, dtype
    steps = {name: make_step(function, *case) for name, function in functions.items()}
    # Of a few elements PyTorch's own error may be none by luck, which leaves parity no room.
    held("genkernels", steps["genkernels"], ATTENTION.expected(*case), dtype, parity=False)
    contestants = {name: Local(step) for name, step in steps.items()}
    gflops, peak = measure(contestants, flops(shape, direction), rounds, dtype)
    bar = Bar(f"{GRID_RATIO:g}x torch", GRID_RATIO * gflops["torch"], gflops["genkernels"])
    return Row(sequence_name(*case), gflops, peak, [bar])


def read_grid() -> Iterator[tuple[Shape, str, torch.dtype]]:
    with open(GRID, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            shape = Shape(*(int(line[name]) for name in "BHLSD"), causal=line["causal"] == "yes")
            yield shape, line["direction"], getattr(torch, line["dtype"])


# What attention is called with where memory is measured, beside query, key and value [1, 1, L, 64].
FEATURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "full": lambda L: {},
    "causal": lambda L: {"is_causal": True},
    "causal from the lower right": lambda L: {"attn_mask": causal_lower_right(L, L)},
    "boolean mask": lambda L: {"attn_mask": torch.ones(L, L, dtype=torch.bool).tril_()},
    "additive bias and its gradient": lambda L: {"attn_mask": torch.randn(L, L).requires_grad_()},
    "dropout": lambda L: {"dropout_p": DROPOUT},
    "log-sum-exp": lambda L: {"return_lse": True},
    "two query heads": lambda L: {"query": torch.randn(1, 2, L, 64), "enable_gqa": True},
    "value head size 32": lambda L: {"value": torch.randn(1, 1, L, 32)},
    "bfloat16": lambda L: {
        name: torch.randn(1, 1, L, 64, dtype=torch.bfloat16) for name in ("query", "key", "value")
    },
    "double backward": lambda L: {},
}


def memory_name(feature: str) -> str:
    return f"memory L=S={MEMORY_LENGTH} D=64, {feature}"


def memory_lines(features: Sequence[str]) -> Iterator[str]:
    """What forward and backward take at their peak, each feature in a process of its own."""
    program = (
        "import json, sys\n"
        "from benchmarks.attention_bars import extra_memory\n"
        "print(extra_memory(*json.loads(sys.argv[1])))\n"
    )
    for feature in features:
        name = memory_name(feature)
        extra = number_of(name, program, feature, MEMORY_LENGTH)
        verdict = "met" if extra <= MEMORY else "MISSED"
        yield f"- {name}: {extra / 1e6:.0f} MB, {verdict}: at most {MEMORY / 1e6:g} MB"


def extra_memory(feature: str, length: int) -> int:
    """Bytes that a step takes at its peak, beyond its arguments and the gradient of a bias."""
    memory_step(feature, 256)[0]()
    step, excluded = memory_step(feature, length)
    # The peak so far may be higher than what is resident: then this errs on the side of too much.
    before = resident_memory()
    step()
    return peak_memory() - before - excluded


def memory_step(feature: str, L: int) -> tuple[Callable[[], object], int]:
    """Forward and backward, and the bytes of a bias's gradient."""
    arguments = {name: torch.randn(1, 1, L, 64) for name in ("query", "key", "value")}
    arguments |= FEATURES[feature](L)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    mask = arguments.get("attn_mask")
    excluded = 0
    if isinstance(mask, Tensor) and mask.requires_grad:
        leaves.append(mask)
        excluded = mask.nbytes

    def step() -> object:
        outputs = functions["genkernels"](**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        first = torch.autograd.grad(
            outputs, leaves, [*map(torch.ones_like, outputs)], create_graph="double" in feature
        )
        if "double" not in feature:
            return first
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    return step, excluded


def bars_plan(peers: Mapping[str, Peer], rounds: int) -> Plan:
    for dtype in (torch.float32, torch.bfloat16):
        for direction in (FORWARD, TRAINING):
            for shape in SHAPES:
                case = shape, direction, dtype
                yield sequence_name(*case), functools.partial(sequence_row, *case, peers, rounds)
    for shape in DROPOUT_RATIOS:
        yield dropout_name(shape), functools.partial(dropout_row, shape, rounds)
    name = sequence_name(BIAS, TRAINING, torch.float32)
    yield name, functools.partial(bias_row, BIAS, rounds)
    for shape in DECODE:
        for dtype in (torch.float32, torch.bfloat16):
            decode = functools.partial(decode_row, shape, dtype, rounds)
            yield decode_name(shape, dtype), decode
    yield penalty_name(), functools.partial(penalty_row, rounds)
    if "avx2" in backend.simd_levels() and backend.simd_level() != "avx2":
        for direction in (FORWARD, TRAINING):
            for shape in SHARES:
                name = f"{sequence_name(shape, direction, torch.float32)}, AVX2"
                yield name, functools.partial(avx2_row, shape, direction, rounds)


def grid_plan(rounds: int) -> Plan:
    for case in read_grid():
        yield sequence_name(*case), functools.partial(grid_row, *case, rounds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(options: argparse.Namespace) -> int:
    settings = machine()
    print(", ".join(f"{key} {value}" for key, value in settings.items()), file=sys.stderr)
    features = [] if options.grid else [f for f in FEATURES if options.only in memory_name(f)]
    with contextlib.ExitStack() as stack:
        peers = {} if options.grid else start_peers(ATTENTION, settings["threads"], stack)
        plan = list(grid_plan(options.rounds) if options.grid else bars_plan(peers, options.rounds))
        # Where only memory is asked for, there are no rows.
        named = not features or any(options.only in name for name, _ in plan)
        rows = run_plan(plan, options.only) if named else []
        settings["peers"] = described(peers)
    if rows:
        print_lines(peer_lines(settings))
        print_rows(rows)
    settings["memory"] = print_lines(memory_lines(features))
    if options.save:
        save(Path(options.save), "attention", rows, settings, "B=")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_bars",
        description="Time scaled_dot_product_attention in turns with PyTorch's, FlexAttention and "
        "the libraries of .venv-peers (make peers), and print GFLOP/s, the share of the machine's "
        "measured FMA peak, and which bars are missed. What is wrong is not timed.",
        epilog="Exit code: 0 when everything ran, bars missed or not; 2 when it could not. "
        "Example: python -m benchmarks.attention_bars --only 'D=64 causal, forward, float32'",
    )
    command.add_only(parser)
    command.add_rounds(parser, "turns per case")
    parser.add_argument(
        "--grid",
        action="store_true",
        help="the points of benchmarks/attention_grid.csv beside PyTorch alone: small, odd and "
        "large sizes, of which none may lose",
    )
    command.add_save(
        parser, "write attention.json and attention.png and add a line to history.jsonl"
    )
    options = parser.parse_args(arguments)
    if options.save and (options.grid or options.only):
        parser.error("argument --save: not with --grid or --only")
    command.check(parser, options)
    return command.run("attention_bars", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
