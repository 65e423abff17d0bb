"""Is a contestant right? A wrong one is never timed, for it could be fast.

The rule of tests/parity.py comes first: at most twice plain PyTorch's own error. A contestant that
breaks it may still take part, since other libraries promise less (quicker sigmoids and tanhs, sums
in another order), unless its largest error exceeds WRONG * max|reference|. A mixed-up gate or a
missing bias is far beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.bench_gru import GRADIENTS, OUTPUTS, make_step
from benchmarks.steps import expected
from benchmarks.workers import Failure
from tests.parity import assert_parity

WRONG = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
STATES = ("h_n", "grad of hx")  # [B, H] of a contestant, [1, B, H] of torch


class Wrong(Failure):
    """A contestant's result is not the reference's."""


@dataclass(frozen=True)
class Verdict:
    """How right a contestant is: its largest errors as shares of max|reference|, by result."""

    errors: dict[str, float]
    parity: bool  # all within the rule of tests/parity.py


def check(
    name: str,
    results: Mapping[str, Tensor],
    shape: tuple[int, int, int, int],
    direction: str,
    dtype: torch.dtype,
) -> Verdict:
    """Hold the float32 results of a contestant to the float64 reference; raises Wrong."""
    baseline, exact = expected(make_step, torch.nn.GRU, shape, direction, dtype)
    names = list(OUTPUTS)
    if direction != "forward":
        names += [f"grad of {argument}" for argument in GRADIENTS]
    if sorted(results) != sorted(names):
        raise Wrong(f"{name}: gave {sorted(results)}, expected {sorted(names)}")
    errors, parity = {}, True
    for result, plain, reference in zip(names, baseline(), exact, strict=True):
        actual, plain, reference = results[result], plain.detach(), reference.detach()
        if result in STATES:
            plain, reference = plain.squeeze(0), reference.squeeze(0)
        if actual.shape != reference.shape:
            raise Wrong(
                f"{name}, {result}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
            )
        largest = reference.abs().max().item()
        error = (actual.double() - reference).abs().max().item()
        if not error <= WRONG[dtype] * largest:  # NaN is wrong too
            raise Wrong(
                f"{name}, {result}: largest error {error:.3e}, allowed "
                f"{WRONG[dtype]:.0e} * {largest:.3e}, the largest value of the reference"
            )
        errors[result] = error / largest
        try:
            assert_parity(f"{name}, {result}", actual.to(dtype), plain, reference)
        except AssertionError:
            parity = False
    return Verdict(errors, parity)
