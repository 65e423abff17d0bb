"""What the Triton kernels can reach on a GPU, estimated without one, and attention's beside a
textbook's: `python -m benchmarks.triton_roofline`.

The issue share of a loop is the time that tensor cores need for its products, of that time and the
slots in which the loop's other instructions are issued, as if nothing overlapped and nothing
waited. Products that warps do twice are in the time, and not in what is needed. So it is below what
a kernel reaches whose products run beside other instructions, and above where memory or latency is
what it waits for; between two kernels it compares what they have to do.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import triton_textbook as textbook
from benchmarks.triton_compiled import (
    SCHEDULERS,
    Resources,
    is_tensor_core,
    resources,
)
from benchmarks.triton_table import configs, run
from genkernels.triton import Config

TABLE = Path(__file__).with_name("triton_roofline.md")
LEAST_RATIO = 0.95  # of attention's issue share to the textbook's


class Gpu(NamedTuple):
    """Dense products' flops in a cycle of a multiprocessor, its cycles that an instruction of a
    scheduler takes, and the whole GPU's figures in TFLOP/s and TB/s.

    Sources: the data sheets of NVIDIA's A100 (80 GB, SXM), H100 (SXM) and HGX B200, and of AMD's
    Instinct MI300X. Flops in a cycle: those of bfloat16 / (multiprocessors x boost clock), with 108
    at 1.41 GHz (the A100 whitepaper has 1024 multiply-adds), 132 at 1.83, 148 at 1.86 and 304 at
    2.1. AMD's instructions have 64 lanes, on units of 16.
    """

    name: str
    flops: int
    cycles: int
    bfloat16: float
    float32: float
    bandwidth: float


GPUS = {
    "sm_80": Gpu("A100", 2048, 1, 312, 19.5, 2.04),
    "sm_90": Gpu("H100", 4096, 1, 989, 67, 3.35),
    "sm_100": Gpu("B200", 8192, 1, 2250, 75, 8),
    "gfx942": Gpu("MI300X", 2048, 4, 1307, 163, 5.3),
}


class Work(NamedTuple):
    flops: float  # of products
    bytes: float  # of each tensor, once
    of_loop: float  # flops of one run through the innermost loop, by a block


B, HEADS, L, SPLITS = 2, 16, 4096, 8  # of attention, with as many keys; to decode, one query
GRU_B, GRU_H, GRU_T = 64, 512, 128  # of a step; and the steps of a sequence
N, K, V = 8192, 1024, 32768  # rows, features and classes of linear_cross_entropy
RANGES = 8  # of classes, each with statistics of every row
PROBLEMS = f"""attention: B {B}, H {HEADS}, L = S = {L}, and to decode L 1;
GRU: B {GRU_B}, a step of H {GRU_H}, or {GRU_T} steps of the H that is named;
linear_cross_entropy: {N} rows, {K} features, {V} classes"""


def _attention(config: Config) -> Work:
    given, name = config.constants, config.kernel.__name__.lstrip("_")
    Dv = given.get("VALUE_SIZE", given.get("HEAD_SIZE"))
    D = given.get("HEAD_SIZE", Dv)
    keys = B * HEADS * L
    rows = B * HEADS if name in ("decode", "merge") else keys
    elements = {
        **dict.fromkeys(("query", "grad_query"), rows * D),
        **dict.fromkeys(("key", "grad_key"), keys * D),
        **dict.fromkeys(("value", "grad_value"), keys * Dv),
        **dict.fromkeys(("output", "grad_output"), rows * Dv),
        **dict.fromkeys(("near", "rest", "shift", "remainder", "delta"), rows),
        **dict.fromkeys(("logsumexp", "grad_logsumexp"), rows),
        **{"sums": SPLITS * rows * Dv, "most": SPLITS * rows, "total": SPLITS * rows},
        **dict.fromkeys(("attn_mask", "grad_mask"), L * L),
    }
    # Each product is rows of the one matrix of scores by columns of D or Dv.
    columns = {
        "forward": D + Dv,
        "decode": D + Dv,
        "backward_keys": D + (D + Dv) * given.get("OF_KEY", 1) + Dv * given.get("OF_VALUE", 1),
        "backward_queries": 2 * D + Dv,
        "backward_mask": D + Dv,
    }.get(name, 0)
    assert columns > 0 or not config.has_products, f"{name}: no formula"
    seen = 0.5 if given.get("HAS_RIGHT") and name != "decode" else 1.0
    of_loop = 2 * given.get("BLOCK_L", 0) * given.get("BLOCK_S", 0) * columns
    return Work(2 * rows * L * columns * seen, _bytes(config, elements), of_loop)


def _gru(config: Config) -> Work:
    given, name = config.constants, config.kernel.__name__
    is_sequence = name.endswith("_sequence")  # then H is one of its constants
    H, steps = (given["H"], GRU_T) if is_sequence else (GRU_H, 1)
    state = GRU_B * H
    elements = {
        **dict.fromkeys(("gates", "later", "deltas"), 4 * state * steps),
        **{"projected": 3 * state * steps, "weight_hh": 3 * H**2, "bias_hh": 3 * H},
        **dict.fromkeys(("output", "grad_output", "grad_states"), state * steps),
        # A way back reads the states before all steps, a way forth that before the first.
        **{"hx": state * (steps if "backward" in name else 1), "carry": state},
    }
    if is_sequence:
        of_loop = 2 * given["BLOCK_B"] * 3 * H**2
    else:
        gates = 3 if name == "_forward_step" else 1
        of_loop = 2 * gates * given["BLOCK_B"] * given["BLOCK_H"] * given["BLOCK_K"]
    return Work(2 * steps * GRU_B * 3 * H**2, _bytes(config, elements), of_loop)


def _linear_cross_entropy(config: Config) -> Work:
    given = config.constants
    of_ranges = ("most", "total", "of_target", "distance", "best", "nan")
    of_rows = ("target", "losses", "target_weights", "shifts", "ratios", "steps", "prediction")
    elements = {
        **{"input": N * K, "sums": N * K, "linear_weight": V * K, "gradient": N * V},
        **dict.fromkeys(of_ranges, RANGES * N) | dict.fromkeys(of_rows, N),
    }
    if not config.has_products:
        return Work(0, _bytes(config, elements), 0)
    of_loop = 2 * given["BLOCK_N"] * given["BLOCK_V"] * given["BLOCK_K"]
    return Work(2 * N * K * V, _bytes(config, elements), of_loop)


def _bytes(config: Config, elements: dict[str, int]) -> float:
    """Of the tensors that have a row's or a weight's size."""
    return sum(elements.get(name, 0) * dtype.itemsize for name, dtype in config.tensors.items())


WORK = {"attention": _attention, "textbook": _attention, "gru": _gru, "loss": _linear_cross_entropy}


def work(config: Config) -> Work:
    return WORK[config.name.split()[0]](config)


def issue_share(architecture: str, used: Resources, of_loop: float) -> float:
    """That of the loop which has most, such as attention's over tiles that are seen whole."""
    return max(_share(architecture, used.warps, loop, of_loop) for loop in used.loops)


def _share(architecture: str, warps: int, loop: Counter[str], of_loop: float) -> float:
    gpu = GPUS[architecture]
    others = sum(count for name, count in loop.items() if not is_tensor_core(name))
    done = sum(count * _flops(name, warps) for name, count in loop.items()) or of_loop
    slots = others * warps / SCHEDULERS * gpu.cycles
    return of_loop / gpu.flops / (done / gpu.flops + slots)


def _flops(instruction: str, warps: int) -> float:
    """That all warps' instructions do, by their shape. A tcgen05.mma's is not in its name: such are
    run by one thread for all warps, so none is done twice."""
    shapes = {
        r"HMMA\.(\d\d)(\d)(\d+)": warps,
        r"HGMMA\.(\d+)x(\d+)x(\d+)": warps / 4,
        r"v_mfma_f32_(\d+)x(\d+)x(\d+)": warps,
    }
    for shape, times in shapes.items():
        if found := re.match(shape, instruction):
            m, n, k = map(int, found.groups())
            return 2 * m * n * k * times
    return 0


FEATURES = {"attn_mask", "seed", "key_lengths", "alibi_slopes", "cu_seq_q"}


def peer(config: Config, architecture: str) -> Config | None:
    """The textbook's kernel, if it does what this one does."""
    given, name = config.constants, config.kernel.__name__.lstrip("_")
    extras = {n for n, value in given.items() if n.startswith("HAS_") and value} - {"HAS_RIGHT"}
    if extras or FEATURES & {*config.tensors}:
        return None
    for other in textbook.configs(architecture, config.dtype, given.get("HAS_RIGHT", False)):
        is_same = other.kernel.__name__.lstrip("_") == name
        if is_same and other.constants["HEAD_SIZE"] == given.get("HEAD_SIZE"):
            return other
    return None


def estimated_row(architecture: str, position: int) -> tuple[str, list[str]]:
    config = configs(architecture)[position]
    gpu, does = GPUS[architecture], work(config)
    is_wide = config.dtype == torch.float32
    peak = gpu.float32 if is_wide else gpu.bfloat16
    intensity = does.flops / does.bytes
    is_bound = intensity < peak / gpu.bandwidth
    bound = "memory" if is_bound else "float32" if is_wide else "tensor cores"
    shares, faults = ["", "", ""], []
    if config.has_products and not is_wide:
        ours = issue_share(architecture, resources(config, architecture), does.of_loop)
        shares[0] = f"{ours:.3f}"
        if other := peer(config, architecture):
            used = resources(other, architecture)
            theirs = issue_share(architecture, used, work(other).of_loop)
            tile = (
                f"{other.constants['BLOCK_L']} x {other.constants['BLOCK_S']}, {used.warps} warps"
            )
            shares = [shares[0], f"{theirs:.3f} ({tile})", f"{ours / theirs:.2f}"]
            if used.spills:
                faults.append(f"is compared with a kernel that spills {used.spills}")
            if ours / theirs < LEAST_RATIO:
                faults.append(
                    f"has {shares[2]} of the textbook's issue share: {LEAST_RATIO} expected"
                )
    dtype = str(config.dtype).removeprefix("torch.")
    cells = (
        config.name, dtype, gpu.name, f"{does.flops / 1e9:.2f}", f"{does.bytes / 1e6:.2f}",
        f"{intensity:.0f}", bound, *shares,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |", faults


TOP = f"""Estimates, all of them, of what Triton {triton.__version__} compiled; not run on a GPU.

{PROBLEMS}.
Bytes are those of each tensor once. {(__doc__ or "").partition(chr(10) * 2)[2]}
| kernel | dtype | GPU | GFLOP | MB | flops/byte | bound | issue share | textbook's | ratio |
|---|---|---|---|---|---|---|---|---|---|
"""


def main(argv: list[str] | None = None) -> int:
    description = (
        "Estimate what bounds every Triton kernel on every GPU, and compare attention's "
        "instructions with a textbook's."
    )
    return run("triton_roofline", estimated_row, TABLE, TOP, description, argv)


if __name__ == "__main__":
    sys.exit(main())
