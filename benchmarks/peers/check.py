"""Is a contestant right? A wrong one is never timed, for it could be fast.

The rule of tests/parity.py comes first: at most twice plain PyTorch's own error. A contestant that
breaks it may still take part, since other libraries promise less (quicker exponentials, sums in
another order), unless its largest error exceeds WRONG * max|reference|. A mixed-up gate or a
missing bias is far beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.op import Expected
from benchmarks.workers import Failure
from tests.parity import assert_parity

WRONG = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Wrong(Failure):
    """A contestant's result is not the reference's."""


@dataclass(frozen=True)
class Verdict:
    """How right a contestant is: its largest errors as shares of max|reference|, by result."""

    errors: dict[str, float]
    parity: bool  # all within the rule of tests/parity.py


def check(
    name: str, results: Mapping[str, Tensor], expected: Expected, dtype: torch.dtype
) -> Verdict:
    """Hold a contestant's results, computed in `dtype`, to the float64 reference; raises Wrong."""
    if sorted(results) != sorted(expected):
        raise Wrong(f"{name}: gave {sorted(results)}, expected {sorted(expected)}")
    errors, parity = {}, True
    for result, (plain, reference) in expected.items():
        actual, plain, reference = (t.detach() for t in (results[result], plain, reference))
        if actual.shape != reference.shape:
            raise Wrong(
                f"{name}, {result}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
            )
        # All zeros, as the gradients of a softmax over one score, count as what is drawn does.
        largest = reference.abs().max().item() or 1.0
        error = largest_error(actual, reference)
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


def largest_error(actual: Tensor, reference: Tensor) -> float:
    return (actual.double() - reference).abs().max().item()
