"""The Triton kernels on a GPU beside PyTorch's own and torch.compile: `make bench-gpu`.

Contestants take turns, as do those of benchmarks.bars, and so does a large matrix product, of whose
speed a case's is a share. A turn is the time between two events of the GPU around calls that follow
one another, so what a call costs the CPU is seen where the GPU waits for it, and only there.
Results are held to plain PyTorch's in float32 before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import genkernels
from benchmarks import bench_attention, bench_gru, bench_linear_cross_entropy, command
from benchmarks.bars import machine
from benchmarks.bench_attention import Shape
from benchmarks.peers.check import Wrong, check
from benchmarks.workers import Failure
from genkernels.info import _version

DIRECTIONS = bench_gru.DIRECTIONS
SECONDS = 0.03  # of a turn
MINUTES = 9.0


class Case(NamedTuple):
    """`make` gives the step of a contestant, `expected` that of what results are held to."""

    name: str
    dtype: torch.dtype
    flops: float
    results: Sequence[str]
    make: Mapping[str, Callable[[], Callable[[], Sequence[Tensor]]]]
    expected: Callable[[], Sequence[Tensor]]


@dataclasses.dataclass
class Row:
    """A case: TFLOP/s of each contestant and of a large product of matrices in its dtype, the bytes
    that a step takes beyond what lives before it, and why a contestant has neither. `backends` are
    those that genkernels ran on."""

    case: str
    tflops: dict[str, float]
    product: float
    memory: dict[str, int]
    left_out: dict[str, str]
    backends: list[str]


@dataclasses.dataclass
class Sizes:
    attention: Sequence[tuple[int, Sequence[Shape]]]  # head size first
    gru: Sequence[tuple[int, int, int, int]]  # T, B, I, H
    loss: Sequence[tuple[int, int, int]]  # N, K, V
    product: int


def attention_shapes(D: int) -> Sequence[Shape]:
    """16384 tokens of width 1024."""
    return [
        Shape(16384 // S, 1024 // D, S, S, D, causal)
        for S in (2048, 512, 8192)
        for causal in (True, False)
    ]


SIZES = {
    "cuda": Sizes(
        attention=[(D, attention_shapes(D)) for D in (64, 128)],
        gru=[(128, 64, 512, 512), (128, 64, 1024, 1024), (512, 16, 256, 256), (128, 1, 512, 512)],
        loss=[(8192, 768, 50257), (8192, 4096, 128256)],
        product=8192,
    ),
    # To see that everything runs.
    "cpu": Sizes(
        attention=[(8, [Shape(1, 2, 17, 17, 8, True)])],
        gru=[(3, 2, 5, 7)],
        loss=[(40, 33, 65)],
        product=64,
    ),
}


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False
) -> Tensor:
    scores = query @ key.mT * query.size(-1) ** -0.5
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def sdpa_of(*backends: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention with one of these kernels; raises where there is none."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(*args, **kwargs)

    return call


def compiled(function: Any, device: str) -> Any:
    """Anew for each case: torch.compile gives up after eight shapes."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "eager"
    return torch.compile(function, dynamic=False, backend=backend)


def captured(step: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """The step as a CUDA graph, which launches all its kernels at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return results

    return replay


def attention_case(
    shape: Shape, direction: str, dtype: torch.dtype, device: str, compiles: bool
) -> Case:
    functions: dict[str, Callable[[], Any]] = {
        "genkernels": lambda: genkernels.scaled_dot_product_attention,
        "flash": lambda: sdpa_of(SDPBackend.FLASH_ATTENTION),
        "cuDNN": lambda: sdpa_of(SDPBackend.CUDNN_ATTENTION),
    }
    if dtype == torch.float32:  # which the other two do not take
        functions["efficient"] = lambda: sdpa_of(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    if compiles:
        functions["torch.compile"] = lambda: compiled(plain_attention, device)
    return _case(
        bench_attention, functions, F.scaled_dot_product_attention, shape, direction, dtype, device,
        bench_attention.result_names(shape, direction),
    )  # fmt: skip


def gru_case(
    shape: tuple[int, int, int, int],
    direction: str,
    dtype: torch.dtype,
    device: str,
    compiles: bool,
) -> Case:
    gradients = () if direction == "forward" else bench_gru.GRADIENTS
    modules: dict[str, Callable[[], Any]] = {
        "genkernels": lambda: genkernels.nn.GRU,
        "cuDNN": lambda: torch.nn.GRU,
    }
    if compiles:
        modules["torch.compile"] = lambda: (
            lambda *sizes, **options: compiled(torch.nn.GRU(*sizes, **options), device)
        )
    case = _case(
        bench_gru, modules, torch.nn.GRU, shape, direction, dtype, device,
        (*bench_gru.OUTPUTS, *(f"grad of {name}" for name in gradients)),
    )  # fmt: skip
    if device == "cuda":
        own = case.make["genkernels"]
        case = case._replace(make={**case.make, "genkernels, CUDA graph": lambda: captured(own())})
    return case


def loss_case(
    shape: tuple[int, int, int], direction: str, dtype: torch.dtype, device: str, compiles: bool
) -> Case:
    bench = bench_linear_cross_entropy
    functions: dict[str, Callable[[], Any]] = {
        name: functools.partial(lambda function: function, function)
        for name, function in bench.CONTESTANTS.items()
    }
    if compiles:
        functions["torch.compile"] = lambda: compiled(bench.plain, device)
    gradients = () if direction == "forward" else bench.GRADIENTS
    names = ("loss", *(f"grad of {name}" for name in gradients))
    return _case(bench, functions, bench.plain, shape, direction, dtype, device, names)


def _case(
    bench: Any,
    functions: Mapping[str, Callable[[], Any]],
    plain: Any,
    shape: Any,
    direction: str,
    dtype: torch.dtype,
    device: str,
    results: Sequence[str],
) -> Case:
    def step(function: Callable[[], Any]) -> Callable[[], Sequence[Tensor]]:
        return bench.make_step(function(), shape, direction, dtype, device=device)

    def expected() -> Sequence[Tensor]:
        return bench.make_step(plain, shape, direction, dtype, torch.float32, device)()

    name = f"{bench.label(shape)}, {direction}, {str(dtype).removeprefix('torch.')}"
    make = {name: functools.partial(step, function) for name, function in functions.items()}
    return Case(name, dtype, bench.flops(shape, direction), results, make, expected)


def plan(sizes: Sizes, device: str, compiles: bool) -> Iterator[Case]:
    """What matters most comes first: the time may not do for all."""
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, direction in itertools.product((bfloat16, float32), DIRECTIONS[::-1]):
        for shape in sizes.gru:
            yield gru_case(shape, direction, dtype, device, False)
    for shape, direction in itertools.product(sizes.loss, DIRECTIONS[::-1]):
        yield loss_case(shape, direction, bfloat16, device, compiles)
    for dtype in (bfloat16, float32, float16):
        for (D, shapes), direction in itertools.product(sizes.attention, DIRECTIONS[::-1]):
            for shape in shapes:
                # The scores of long sequences, which it holds, are gigabytes.
                is_compiled = compiles and dtype == bfloat16 and D <= 64 and shape.S <= 2048
                yield attention_case(shape, direction, dtype, device, is_compiled)
    yield gru_case(sizes.gru[0], DIRECTIONS[1], float16, device, False)
    yield gru_case(sizes.gru[-1], DIRECTIONS[0], bfloat16, device, compiles)


def seconds(step: Callable[[], object], calls: int, device: str) -> float:
    """Of one call of `calls` that follow one another."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def memory_of(step: Callable[[], object], device: str) -> int | None:
    """Bytes that a call takes at most beyond what lives before it, its results with them."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def timed(case: Case, device: str, rounds: int, product: int) -> Row:
    result = Row(case.name, {}, 0.0, {}, {}, [])
    expected = dict(zip(case.results, ((t, t) for t in case.expected()), strict=True))
    steps: dict[str, Callable[[], object]] = {}
    for name, make in case.make.items():
        try:
            step = make()
            genkernels.stats(reset=True)
            check(name, dict(zip(case.results, step(), strict=True)), expected, case.dtype)
            taken = memory_of(step, device)
        except Exception as error:  # wrong, no kernel for it, no memory, or a kernel not compiled
            what = str(error).strip().partition("\n")[0]
            is_said = isinstance(error, (Wrong, RuntimeError))
            result.left_out[name] = what if is_said else f"{type(error).__name__} {what}"
            continue
        if name == "genkernels":
            result.backends = sorted({backend for _, backend in genkernels.stats()})
        steps[name] = step
        if taken is not None:
            result.memory[name] = taken
    del expected
    a, b = (torch.randn(product, product, device=device).to(case.dtype) for _ in range(2))
    steps["product"] = lambda: a @ b
    calls = {}
    for name, step in steps.items():
        step()
        calls[name] = max(1, round(SECONDS / seconds(step, 1, device))) if device == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, calls[name], device))
    work = dict.fromkeys(steps, case.flops) | {"product": 2.0 * product**3}
    result.tflops = {name: work[name] / statistics.median(t) / 1e12 for name, t in times.items()}
    result.product = result.tflops.pop("product")
    return result


def machine_with(device: str) -> dict[str, Any]:
    """The machine, with its GPU: the device, its driver, the versions, and the commit."""
    settings = {**machine(), "device": device, "triton": _version("triton")}
    if device == "cpu":
        return settings
    properties = torch.cuda.get_device_properties(0)
    return settings | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError):
        run = subprocess.run(query, capture_output=True, text=True)
        if run.returncode == 0:
            return run.stdout.strip()
    return f"unknown (nvidia-smi does not tell), {platform.release()}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    ran = (name for row in rows for name in (*row.tflops, *row.left_out))
    names = list(dict.fromkeys(("genkernels", *ran)))
    yield f"| case, TFLOP/s (MB) | {' | '.join(names)} | genkernels / product |"
    yield "|---|" + "---|" * (len(names) + 1)
    for row in rows:
        cells = []
        for name in names:
            speed, memory = row.tflops.get(name), row.memory.get(name)
            taken = "" if memory is None else f" ({memory / 1e6:.0f})"
            cells.append("" if speed is None else f"{speed:.3g}{taken}")
        share = row.tflops.get("genkernels", 0.0) / row.product
        yield f"| {row.case} | {' | '.join(cells)} | {share:.0%} |"


def run(options: argparse.Namespace) -> int:
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise Failure("no CUDA device: PyTorch sees none here")
    settings = {**machine_with(device), "tf32": False}
    print(", ".join(f"{key} {value}" for key, value in settings.items()), file=sys.stderr)
    cases = [
        case for case in plan(SIZES[device], device, options.compile) if options.only in case.name
    ]
    if not cases:
        raise Failure(f"--only {options.only}: no case is named so")
    rows: list[Row] = []

    def save(not_run: Sequence[str]) -> None:
        if options.save:
            report = {"rows": [dataclasses.asdict(row) for row in rows], "not_run": not_run}
            command.write_json(Path(options.save) / "gpu.json", {**settings, **report})

    start = time.perf_counter()
    for number, case in enumerate(cases, 1):
        if time.perf_counter() - start > 60 * options.minutes:
            break
        row = timed(case, device, options.rounds, SIZES[device].product)
        rows.append(row)
        save([case.name for case in cases[number:]])  # whoever ends this early keeps what there is
        speeds = ", ".join(f"{name} {speed:.3g}" for name, speed in row.tflops.items())
        left_out = "".join(f", without {name}: {why}" for name, why in row.left_out.items())
        print(
            f"[{number}/{len(cases)}, {time.perf_counter() - start:.0f} s] {case.name}, "
            f"{' '.join(row.backends)}: {speeds} TFLOP/s{left_out}",
            file=sys.stderr,
            flush=True,
        )
    not_run = [case.name for case in cases[len(rows) :]]
    print("\n".join(table(rows)))
    print(f"\n{settings['device']}: {len(rows)} of {len(cases)} cases")
    if device == "cpu":
        print("Tiny sizes, to see that everything runs: these figures mean nothing.")
    if not_run:
        print(f"Not run within {options.minutes:g} minutes: {'; '.join(not_run)}")
    save(not_run)
    wrong = [
        f"{row.case}: {row.left_out['genkernels']}" for row in rows if "genkernels" in row.left_out
    ]
    print("".join(f"gpu: {line}\n" for line in wrong), end="", file=sys.stderr)
    return bool(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Time attention, the GRU and linear_cross_entropy on a GPU in turns with "
        "PyTorch's own kernels (FlashAttention, cuDNN) and torch.compile, and print TFLOP/s and "
        "the memory of a step. One whose results are wrong is not timed.",
        epilog="Exit code: 0 when everything ran; 1 when a result of genkernels was wrong or did "
        "not come; 2 without a GPU. Example: python -m benchmarks.gpu --only 'GRU T=128'",
    )
    command.add_only(parser)
    command.add_rounds(parser, "turns per case")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="after which no case begins; those left are named (default: %(default)g)",
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="without torch.compile"
    )
    parser.add_argument(
        "--device",
        choices=SIZES,
        default="cuda",
        help="cpu: at tiny sizes, to see that this runs; its figures mean nothing "
        "(default: %(default)s)",
    )
    command.add_save(parser, "write gpu.json")
    options = parser.parse_args(arguments)
    if options.save and (options.only or options.device == "cpu"):
        parser.error("argument --save: not with --only or --device cpu")
    command.check(parser, options)
    # As float32 products are by default, its GRU's too.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return command.run("gpu", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
