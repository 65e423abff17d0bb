"""A GRU as jax.lax.scan, compiled by XLA: `python -m benchmarks.peers.jax_gru`, see worker.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers.gru import GRUCase
from benchmarks.peers.libraries import jax_environment
from benchmarks.peers.worker import Contestant, Unsupported, serve

LEAVES = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


def build(case: GRUCase) -> Contestant:
    if case.dtype != "float32":
        raise Unsupported(f"not written for jax in {case.dtype}")
    settings = jax_environment(case)
    import jax
    import jax.numpy as jnp

    def gru(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
        projected = x @ weight_ih + bias_ih

        def cell(h, given):
            given_r, given_z, given_n = jnp.split(given, 3, axis=-1)
            own_r, own_z, own_n = jnp.split(h @ weight_hh + bias_hh, 3, axis=-1)
            r = jax.nn.sigmoid(given_r + own_r)
            z = jax.nn.sigmoid(given_z + own_z)
            n = jnp.tanh(given_n + r * own_n)
            h = (1 - z) * n + z * h
            return h, h

        h_n, output = jax.lax.scan(cell, h, projected)
        return output, h_n

    def train(leaves, cotangents):
        outputs, pullback = jax.vjp(gru, *leaves)
        return outputs, pullback(cotangents)

    def transposed(name: str, array: np.ndarray) -> np.ndarray:
        """Between torch's [3H, I] and the [I, 3H] that multiplies rows as it lies."""
        return np.ascontiguousarray(array.T) if name.startswith("weight") else array

    leaves = tuple(jnp.asarray(transposed(name, case.values[name])) for name in LEAVES)
    cotangents = tuple(jnp.asarray(case.values[name]) for name in ("cotangent", "cotangent_h"))
    function, arguments = (
        (jax.jit(train), (leaves, cotangents)) if case.training else (jax.jit(gru), leaves)
    )
    kept: Any = None

    def step() -> None:
        nonlocal kept
        kept = jax.block_until_ready(function(*arguments))

    def results() -> dict[str, np.ndarray]:
        outputs, gradients = kept if case.training else (kept, ())
        named = dict(zip(("output", "h_n"), outputs, strict=True))
        if case.training:
            named |= {
                f"grad of {name}": transposed(name, np.asarray(gradient))
                for name, gradient in zip(LEAVES, gradients, strict=True)
            }
        return {name: np.asarray(array) for name, array in named.items()}

    return Contestant(step, results, settings)


if __name__ == "__main__":
    serve(GRUCase, build, "jax")
