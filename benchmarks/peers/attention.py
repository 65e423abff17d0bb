"""What the contestants of attention share: their case.

Arrays: query and cotangent [B, H, L, D], key and value [B, H, S, D]. Output: output [B, H, L, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.peers.worker import Array, Case


@dataclass(frozen=True)
class AttentionCase(Case):
    B: int
    H: int
    L: int
    S: int
    D: int
    causal: bool
    bias: bool


def heads_inside(array: Array) -> Array:
    """Between torch's [B, H, L, D] and [B, L, H, D], as projections lie."""
    return np.ascontiguousarray(array.swapaxes(1, 2))
