"""The GRU beside its peers, and the bars it is held to: `make bench-gru`.

Every contestant of a case takes turns with the others and with the machine's own peak, so that a
drift of the machine meets all alike. Speeds are medians of the turns.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import genkernels
from benchmarks import command, limits
from benchmarks.bench_gru import CONTESTANTS, DIRECTIONS, SHAPES, flops, make_step
from benchmarks.peers.check import Wrong
from benchmarks.peers.op import GRU, Op
from benchmarks.peers.peer import Peer, Unsupported, missing
from benchmarks.workers import ROOT, Failure, median_seconds
from genkernels import backend
from genkernels.models.rnn import RNNLanguageModel
from genkernels.training.presets import RNN_PRESETS

Shape = tuple[int, int, int, int]

FORWARD, TRAINING = DIRECTIONS
# The share of the machine's FMA peak that float32 has to reach. Where a ratio to a peer would ask
# for more than CAP_MARGIN above it, or above CAPS where no share is named, that is asked instead.
SHARES: dict[tuple[str, Shape], float] = {
    (FORWARD, (128, 64, 256, 512)): 0.89,
    (FORWARD, (100, 64, 512, 512)): 0.89,
    (FORWARD, (32, 64, 1024, 1024)): 0.84,
    (FORWARD, (128, 16, 256, 256)): 0.84,
    (FORWARD, (128, 128, 128, 128)): 0.82,
    (FORWARD, (512, 8, 64, 64)): 0.36,
    (TRAINING, (128, 64, 256, 512)): 0.78,
    (TRAINING, (100, 64, 512, 512)): 0.78,
    (TRAINING, (32, 64, 1024, 1024)): 0.78,
    (TRAINING, (128, 16, 256, 256)): 0.75,
    (TRAINING, (128, 128, 128, 128)): 0.72,
}
CAP_MARGIN = 0.03
CAPS = {FORWARD: 0.88, TRAINING: 0.80}
AVX2_SHARE = 0.75
GRID = ROOT / "benchmarks" / "gru_grid.csv"
GRID_RATIO = 0.97
BFLOAT16_CAP = 0.80

SEQUENCE_CASES = [
    (shape, direction, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for direction in DIRECTIONS
    for shape in SHAPES
    if dtype == torch.float32 or shape[1] >= 16
]
GENERATION = "RNN generation, preset seed, B=1, float32"
GENERATED = 20  # tokens a call
GENERATION_SHARE = 0.80
CELL_SIZES = [(batch, size) for size in (128, 512, 1024) for batch in (1, 8, 64, 256)]


@dataclasses.dataclass
class Bar:
    """`name` asks for `asked`; `reached` is in the same unit."""

    name: str
    asked: float
    reached: float

    @property
    def is_met(self) -> bool:
        return self.reached >= self.asked


@dataclasses.dataclass
class Row:
    """One case: GFLOP/s of every contestant and of the machine's peak, and the bars."""

    case: str
    gflops: dict[str, float]
    peak: float
    bars: list[Bar]

    @property
    def share(self) -> float:
        return self.gflops["genkernels"] / self.peak

    def ratios(self) -> dict[str, float]:
        own = self.gflops["genkernels"]
        return {name: own / rate for name, rate in self.gflops.items() if name != "genkernels"}


class Local:
    """A contestant of this process."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.step = step

    def seconds(self, calls: int) -> float:
        self.step()
        return median_seconds(self.step, calls)


def measure(
    contestants: Mapping[str, Local | Peer],
    work: float,
    rounds: int,
    dtype: torch.dtype = torch.float32,
    level: str | None = None,
) -> tuple[dict[str, float], float]:
    """GFLOP/s of each contestant, for `work` operations, and the peak of the same turns."""
    level = level or backend.simd_level() or limits.levels()[-1]
    threads = torch.get_num_threads()
    calls = {name: max(1, round(0.04 / each.seconds(1))) for name, each in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = []
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times[name].append(contestant.seconds(calls[name]))
        peaks.append(limits.measure_peak(level, dtype, threads, repeats=2))
    gflops = {name: work / statistics.median(t) / 1e9 for name, t in times.items()}
    return gflops, statistics.median(peaks) / 1e9


def admitted(
    peers: Mapping[str, Peer], shape: Any, direction: str, dtype: torch.dtype
) -> dict[str, Peer]:
    """The peers that have such a case, set up with it."""
    taking_part = {}
    for name, peer in peers.items():
        try:
            peer.setup(shape, direction, dtype)
        except Unsupported:
            continue
        except Wrong as error:  # never timed
            print(f"bars: {error}", file=sys.stderr)
            continue
        taking_part[name] = peer
    return taking_part


def ratio_bar(name: str, ratio: float, rate: float, cap: float, peak: float, own: float) -> Bar:
    """`ratio` times another's rate, or the share `cap` of the peak where that is less."""
    if ratio * rate <= cap * peak:
        return Bar(f"{ratio:g}x {name}", ratio * rate, own)
    return Bar(f"{ratio:g}x {name}, within {cap:.0%} of peak", cap * peak, own)


def sequence_name(shape: Shape, direction: str, dtype: torch.dtype) -> str:
    return "T={} B={} I={} H={}, {}, {}".format(*shape, direction, _name(dtype))


def sequence_bars(
    shape: Shape, direction: str, dtype: torch.dtype, gflops: dict[str, float], peak: float
) -> list[Bar]:
    own = gflops["genkernels"]
    peers = {k: v for k, v in gflops.items() if k not in ("genkernels", "torch", "own float32")}
    bars = []
    if dtype == torch.float32:
        share = SHARES.get((direction, shape))
        if share is not None:
            bars.append(Bar(f"{share:.0%} of peak", share * peak, own))
        cap = peak * (CAPS[direction] if share is None else share + CAP_MARGIN)
        asked = [("torch", 3.0)]
        if peers:
            asked.append((max(peers, key=peers.__getitem__), 1.2 if direction == FORWARD else 1.15))
    else:
        cap = BFLOAT16_CAP * peak
        asked = [("torch", 1.0 if direction == FORWARD else 1.8)]
        if direction == FORWARD:
            asked.append(("own float32", 1.5))
            asked += [("openvino", 0.9)] if "openvino" in peers else []
    return bars + [
        Bar(f"{ratio:g}x {name}", min(ratio * gflops[name], cap), own) for name, ratio in asked
    ]


def sequence_row(
    shape: Shape, direction: str, dtype: torch.dtype, peers: dict[str, Peer], options: Any
) -> Row:
    contestants: dict[str, Local | Peer] = {
        name: Local(make_step(CONTESTANTS[name], shape, direction, dtype))
        for name in ("genkernels", "torch", *(["torch.compile"] if options.compile else []))
    }
    if dtype == torch.bfloat16 and direction == FORWARD:
        contestants["own float32"] = Local(
            make_step(CONTESTANTS["genkernels"], shape, direction, torch.float32)
        )
    contestants |= admitted(peers, shape, direction, dtype)
    gflops, peak = measure(contestants, flops(shape, direction), options.rounds, dtype)
    bars = sequence_bars(shape, direction, dtype, gflops, peak)
    return Row(sequence_name(shape, direction, dtype), gflops, peak, bars)


def avx2_row(shape: Shape, direction: str, options: Any) -> Row:
    step = make_step(CONTESTANTS["genkernels"], shape, direction, torch.float32)
    with backend.use_simd("avx2"):
        gflops, peak = measure(
            {"genkernels": Local(step)}, flops(shape, direction), options.rounds, level="avx2"
        )
    bar = Bar(f"{AVX2_SHARE:.0%} of AVX2 peak", AVX2_SHARE * peak, gflops["genkernels"])
    return Row(avx2_name(shape, direction), gflops, peak, [bar])


def avx2_name(shape: Shape, direction: str) -> str:
    return sequence_name(shape, direction, torch.float32) + ", AVX2"


def cell_step(make_module: Callable[..., Any], batch: int, size: int, direction: str) -> Local:
    torch.manual_seed(0)
    module = make_module(size, size)
    input, hx, cotangent = (torch.randn(batch, size) for _ in range(3))
    if direction == FORWARD:
        return Local(torch.no_grad()(lambda: module(input, hx)))
    leaves = (input.requires_grad_(), hx.requires_grad_(), *module.parameters())

    def step() -> Sequence[Tensor]:
        return torch.autograd.grad(module(input, hx), leaves, cotangent)

    return Local(step)


def cell_row(batch: int, size: int, direction: str, options: Any) -> Row:
    modules = {"genkernels": genkernels.nn.GRUCell, "torch": torch.nn.GRUCell}
    gflops, peak = measure(
        {name: cell_step(module, batch, size, direction) for name, module in modules.items()},
        flops((1, batch, size, size), direction),
        options.rounds,
    )
    # Forward reads the weights. Training reads them twice and writes as much, of which each line is
    # fetched before it is written.
    weights = 4 * 3 * size * (size + size)
    passes, footprint = (1, weights) if direction == FORWARD else (4, 2 * weights)
    bandwidth = read_bandwidth(footprint)
    within = flops((1, batch, size, size), direction) / (passes * weights / bandwidth) / 1e9
    limits_of_machine = {
        f"2x torch, within {CAPS[direction]:.0%} of peak": CAPS[direction] * peak,
        f"2x torch, within {bandwidth / 1e9:.0f} GB/s of reading {footprint / 1e6:.1f} MB": within,
    }
    name, asked = min(
        {"2x torch": 2 * gflops["torch"], **limits_of_machine}.items(), key=itemgetter(1)
    )
    bar = Bar(name, asked, gflops["genkernels"])
    return Row(cell_name(batch, size, direction), gflops, peak, [bar])


def read_bandwidth(footprint: int) -> float:
    """Bytes per second that all threads read together out of whatever holds so many bytes."""
    threads = torch.get_num_threads()
    return limits.read_bandwidth(footprint // threads, threads)


def generation_row(options: Any) -> Row:
    """One token after the other, as `genkernels generate` draws them."""
    config = RNN_PRESETS["seed"].model
    contestants: dict[str, Local | Peer] = {}
    for name, gru in (("genkernels", genkernels.nn.GRU), ("torch", torch.nn.GRU)):
        torch.manual_seed(0)
        model = RNNLanguageModel(config, gru=gru)
        prompt = torch.zeros(1, 1, dtype=torch.int64)
        contestants[name] = Local(functools.partial(model.generate, prompt, GENERATED))
    E, H, V = config.embedding_dim, config.hidden_size, config.vocab_size
    weights = 3 * H * (E + H) + V * H
    gflops, peak = measure(contestants, 2.0 * weights * GENERATED, options.rounds)
    bandwidth = read_bandwidth(4 * weights)
    within = GENERATION_SHARE * bandwidth / 4 * 2 / 1e9
    asked = min(2 * gflops["torch"], within)
    name = "2x torch"
    if asked == within:
        name = f"{GENERATION_SHARE:.0%} of {bandwidth / 1e9:.0f} GB/s of reading"
    return Row(GENERATION, gflops, peak, [Bar(name, asked, gflops["genkernels"])])


def cell_name(batch: int, size: int, direction: str) -> str:
    return f"cell B={batch} I=H={size}, {direction}, float32"


def grid_row(shape: Shape, direction: str, dtype: torch.dtype, options: Any) -> Row:
    """Beside torch alone, which no point of the grid may lose to; 3% are noise."""
    contestants = {
        name: Local(make_step(CONTESTANTS[name], shape, direction, dtype))
        for name in ("genkernels", "torch")
    }
    gflops, peak = measure(contestants, flops(shape, direction), options.rounds, dtype)
    bar = Bar(f"{GRID_RATIO:g}x torch", GRID_RATIO * gflops["torch"], gflops["genkernels"])
    return Row(sequence_name(shape, direction, dtype), gflops, peak, [bar])


def read_grid() -> Iterator[tuple[Shape, str, torch.dtype]]:
    with open(GRID, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            T, B, I, H = (int(line[name]) for name in "TBIH")
            yield (T, B, I, H), line["direction"], getattr(torch, line["dtype"])


def table(rows: Sequence[Row]) -> Iterator[str]:
    names = sorted({name for row in rows for name in row.gflops} - {"genkernels"})
    yield f"| case | genkernels | share of peak | {' | '.join(names)} | bars |"
    yield "|---|---|---|" + "---|" * (len(names) + 1)
    for row in rows:
        cells = [f"{row.gflops[name]:.0f}" if name in row.gflops else "" for name in names]
        bars = [f"{'' if b.is_met else 'MISSED '}{b.name} ({b.asked:.0f})" for b in row.bars]
        own = f"{row.gflops['genkernels']:.0f}"
        yield f"| {row.case} | {own} | {row.share:.0%} | {' | '.join(cells)} | {'; '.join(bars)} |"


def draw_chart(path: Path, rows: Sequence[Row], prefix: str) -> None:
    """Share of the measured peak, each contestant a colour: float32 cases named `prefix`.."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.case.startswith(prefix) and row.case.endswith("float32")]
    names = ["genkernels", *sorted({n for row in shown for n in row.gflops} - {"genkernels"})]
    figure, axes = pyplot.subplots(1, len(DIRECTIONS), figsize=(13, 5), sharey=True)
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        cases = [row for row in shown if f", {direction}," in row.case]
        for index, name in enumerate(names):
            places = [i + (index + 0.5) * 0.8 / len(names) - 0.4 for i in range(len(cases))]
            shares = [100 * row.gflops.get(name, 0) / row.peak for row in cases]
            axis.bar(places, shares, 0.8 / len(names), label=name)
        labels = [row.case.split(",")[0].replace(" ", "\n") for row in cases]
        axis.set_xticks(range(len(cases)), labels, fontsize=8)
        axis.set_title(direction)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("% of the measured FMA peak")
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="upper center", ncols=len(texts), fontsize=9)
    command.replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)


def save(
    folder: Path, name: str, rows: Sequence[Row], settings: dict[str, Any], prefix: str
) -> None:
    """Write NAME.json and NAME.png, see draw_chart, and add a line to history.jsonl."""
    command.write_json(folder / f"{name}.json", report(rows, settings))
    draw_chart(folder / f"{name}.png", rows, prefix)
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(history_line(rows, settings) + "\n")


def report(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        **settings,
        "rows": [
            {**dataclasses.asdict(row), "share": row.share, "ratios": row.ratios()} for row in rows
        ],
    }


def history_line(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Ratios only: GFLOP/s of two days or two machines do not compare."""
    ratios = {
        row.case: {
            "share": round(row.share, 3),
            **{n: round(r, 2) for n, r in row.ratios().items()},
        }
        for row in rows
    }
    kept = ("date", "revision", "cpu", "simd_level", "threads")
    return json.dumps({**{key: settings[key] for key in kept}, "ratios": ratios})


def machine() -> dict[str, Any]:
    revision = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "revision": revision,
        "cpu": _cpu(),
        "simd_level": backend.simd_level(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        facts: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        if "model name" in facts:
            return "{model name}, family {cpu family}, model {model}".format(**facts)
    return platform.processor() or platform.machine()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bars_plan(
    peers: dict[str, Peer], options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Row]]]:
    for case in SEQUENCE_CASES:
        yield sequence_name(*case), functools.partial(sequence_row, *case, peers, options)
    if "avx2" in backend.simd_levels() and backend.simd_level() != "avx2":
        for case in itertools.product((s for s in SHAPES if s[1] >= 16), DIRECTIONS):
            yield avx2_name(*case), functools.partial(avx2_row, *case, options)
    yield GENERATION, functools.partial(generation_row, options)
    for direction, sizes in itertools.product(DIRECTIONS, CELL_SIZES):
        yield cell_name(*sizes, direction), functools.partial(cell_row, *sizes, direction, options)


def grid_plan(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    for case in read_grid():
        yield sequence_name(*case), functools.partial(grid_row, *case, options)


def run_plan(plan: Sequence[tuple[str, Callable[[], Row]]], only: str) -> list[Row]:
    """The rows of the cases whose name contains `only`, each reported when it is done."""
    chosen = [(name, make) for name, make in plan if only in name]
    if not chosen:
        raise Failure(f"--only {only}: no case is named so; the first is {plan[0][0]}")
    rows = []
    start = time.perf_counter()
    for index, (name, make) in enumerate(chosen, 1):
        rows.append(make())
        missed = [bar.name for bar in rows[-1].bars if not bar.is_met]
        print(
            f"[{index}/{len(chosen)}, {time.perf_counter() - start:.0f} s] {name}: "
            f"{rows[-1].share:.0%} of peak{', missed: ' if missed else ''}{', '.join(missed)}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    print("\n".join(table(rows)))
    count = sum(not bar.is_met for row in rows for bar in row.bars)
    print(f"\n{count} of {sum(len(row.bars) for row in rows)} bars missed")


def print_lines(lines: Iterable[str]) -> list[str]:
    """Print each line when it is there."""
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    return printed


def start_peers(op: Op, threads: int, stack: contextlib.ExitStack) -> dict[str, Peer]:
    """The peers of an op that are installed; those that are not are named."""
    peers = {}
    for name in op.peers:
        reason = missing(name)
        if reason:
            print(f"bars: without {name}: {reason}", file=sys.stderr)
        else:
            peers[name] = stack.enter_context(Peer(name, threads, op))
    return peers


def described(peers: Mapping[str, Peer]) -> dict[str, dict[str, str]]:
    return {name: {"version": peer.version, **peer.settings} for name, peer in peers.items()}


def peer_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, facts in settings["peers"].items():
        yield f"- {name}: " + ", ".join(f"{key} {value}" for key, value in facts.items())


def run(options: argparse.Namespace) -> int:
    settings = machine()
    print(", ".join(f"{key} {value}" for key, value in settings.items()), file=sys.stderr)
    with contextlib.ExitStack() as stack:
        peers = {} if options.grid else start_peers(GRU, settings["threads"], stack)
        plan = list(grid_plan(options) if options.grid else bars_plan(peers, options))
        rows = run_plan(plan, options.only)
        settings["peers"] = described(peers)
    print_lines(peer_lines(settings))
    print_rows(rows)
    if options.save:
        save(Path(options.save), "gru", rows, settings, "T=")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bars",
        description="Time the GRU in turns with its peers and print GFLOP/s, the share of the "
        "machine's measured FMA peak, and which bars are missed. Peers are those of .venv-peers "
        "(make peers); one whose results are wrong is not timed.",
        epilog="Exit code: 0 when everything ran, bars missed or not; 2 when it could not. "
        "Example: python -m benchmarks.bars --only 'B=16 I=256'",
    )
    command.add_only(parser)
    command.add_rounds(parser, "turns per case")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile(torch.nn.GRU) too; takes minutes"
    )
    parser.add_argument(
        "--grid",
        action="store_true",
        help="the points of benchmarks/gru_grid.csv beside torch.nn.GRU alone: small, odd and "
        "large sizes, of which none may lose",
    )
    command.add_save(parser, "write gru.json and gru.png and add a line to history.jsonl")
    options = parser.parse_args()
    if options.save and options.grid:
        parser.error("argument --save: not with --grid")
    command.check(parser, options)
    return command.run("bars", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
