"""What contestants are asked for: an op of the benchmarks, and what it has to give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_attention, bench_gru
from benchmarks.steps import expected

# What a result is held to: plain PyTorch's in the case's dtype, and the same in float64.
Expected = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Op:
    """`sizes`, `draw` and `expected` are of a shape of the op's benchmark."""

    name: str
    peers: tuple[str, ...]
    sizes: Callable[[Any], dict[str, Any]]
    draw: Callable[[Any, torch.dtype], dict[str, Tensor]]
    expected: Callable[[Any, str, torch.dtype], Expected]


def _expected_gru(shape: tuple[int, int, int, int], direction: str, dtype: torch.dtype) -> Expected:
    baseline, exact = expected(bench_gru.make_step, torch.nn.GRU, shape, direction, dtype)
    gradients = () if direction == "forward" else bench_gru.GRADIENTS
    names = *bench_gru.OUTPUTS, *(f"grad of {name}" for name in gradients)
    pairs = dict(zip(names, zip(baseline(), exact, strict=True), strict=True))
    for name in pairs.keys() & {"h_n", "grad of hx"}:
        plain, reference = pairs[name]
        pairs[name] = plain.squeeze(0), reference.squeeze(0)  # [B, H]
    return pairs


def _draw_gru(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    values = bench_gru.draw(shape, dtype)
    return values | {name: values[name].squeeze(0) for name in ("hx", "cotangent_h")}


def _expected_attention(
    shape: bench_attention.Shape, direction: str, dtype: torch.dtype
) -> Expected:
    baseline, exact = expected(
        bench_attention.make_step, F.scaled_dot_product_attention, shape, direction, dtype
    )
    names = bench_attention.result_names(shape, direction)
    return dict(zip(names, zip(baseline(), exact, strict=True), strict=True))


GRU = Op(
    "gru",
    ("onednn", "onnxruntime", "openvino", "jax", "keras"),
    sizes=lambda shape: dict(zip("TBIH", shape, strict=True)),
    draw=_draw_gru,
    expected=_expected_gru,
)
ATTENTION = Op(
    "attention",
    ("onnxruntime", "openvino", "jax"),
    sizes=bench_attention.Shape._asdict,
    draw=bench_attention.draw,
    expected=_expected_attention,
)
