"""The loss curve as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence


def plot_loss(
    path: str | os.PathLike[str],
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    baseline: tuple[str, float],
    unit: str,
) -> None:
    """Write a PNG of (step, figure) curves, with the named figure of a simpler model as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's global state alone
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), label="training", color="tab:blue", linewidth=0.8)
    axes.plot(*zip(*held_out, strict=True), label="held-out", color="tab:orange", marker=".")
    name, value = baseline
    axes.axhline(value, label=f"{name}, held-out", color="gray", linestyle="--")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
