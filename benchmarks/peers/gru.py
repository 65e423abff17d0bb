"""What the contestants of the GRU share: their case, and the layouts of weights.

Arrays: input [T, B, I], hx [B, H], weight_ih [3H, I], weight_hh [3H, H], bias_ih [3H] and
bias_hh [3H] as torch.nn.GRU has them, cotangent [T, B, H], cotangent_h [B, H]. Outputs: output
[T, B, H] and h_n [B, H].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.peers.worker import Array, Case


@dataclass(frozen=True)
class GRUCase(Case):
    T: int
    B: int
    I: int
    H: int


def zrn(array: Array) -> Array:
    """Gates from torch's order r, z, n along the first dimension to z, r, n, or back."""
    r, z, n = np.split(array, 3)
    return np.concatenate([z, r, n])


def merged_bias(case: GRUCase) -> Array:
    """The four rows of libraries that add the two biases where they can: z, r, n of x, n of h."""
    both = case.values["bias_ih"] + case.values["bias_hh"]
    rows = [both[case.H : 2 * case.H], both[: case.H]]
    rows += [case.values[name][2 * case.H :] for name in ("bias_ih", "bias_hh")]
    return np.stack(rows)  # [4, H]
