"""jax.nn.dot_product_attention, compiled by XLA: `python -m benchmarks.peers.jax_attention`, see
worker.py."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.peers.attention import AttentionCase, heads_inside
from benchmarks.peers.libraries import jax_environment
from benchmarks.peers.worker import Contestant, Unsupported, serve

LEAVES = ("query", "key", "value")


def build(case: AttentionCase) -> Contestant:
    if case.bias:
        raise Unsupported("not written for jax with a bias")
    settings = jax_environment(case)
    import jax
    import jax.numpy as jnp

    attention = functools.partial(jax.nn.dot_product_attention, is_causal=case.causal)

    def train(leaves, cotangent):
        output, pullback = jax.vjp(attention, *leaves)
        return output, *pullback(cotangent)

    def given(name: str) -> Any:
        return jnp.asarray(heads_inside(case.values[name]), case.dtype)  # [B, L, H, D]

    leaves = tuple(map(given, LEAVES))
    function, arguments = (
        (jax.jit(train), (leaves, given("cotangent")))
        if case.training
        else (jax.jit(lambda *leaves: (attention(*leaves),)), leaves)
    )
    kept: Any = None

    def step() -> None:
        nonlocal kept
        kept = jax.block_until_ready(function(*arguments))

    def results() -> dict[str, np.ndarray]:
        names = ("output", *(f"grad of {name}" for name in LEAVES))
        arrays = (heads_inside(np.asarray(array, np.float32)) for array in kept)
        return dict(zip(names, arrays, strict=False))

    return Contestant(step, results, settings)


if __name__ == "__main__":
    serve(AttentionCase, build, "jax")
