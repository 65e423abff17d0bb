"""The loss curve as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence


def plot_loss(
    path: str | os.PathLike[str],
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    baseline: float,
) -> None:
    """Write a PNG of (step, bits per byte) curves, with the Markov model's figure as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's global state alone
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), label="training", color="tab:blue", linewidth=0.8)
    axes.plot(*zip(*held_out, strict=True), label="held-out", color="tab:orange", marker=".")
    axes.axhline(baseline, label="order-3 Markov model, held-out", color="gray", linestyle="--")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
