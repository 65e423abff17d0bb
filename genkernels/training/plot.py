"""The loss curve and attention as pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def plot_loss(
    path: str | os.PathLike[str],
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    baseline: tuple[str, float],
    unit: str,
) -> None:
    """Write a PNG of (step, figure) curves, with the named figure of a simpler model as a line."""
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), label="training", color="tab:blue", linewidth=0.8)
    axes.plot(*zip(*held_out, strict=True), label="held-out", color="tab:orange", marker=".")
    name, value = baseline
    axes.axhline(value, label=f"{name}, held-out", color="gray", linestyle="--")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def plot_attention(
    path: str | os.PathLike[str],
    weights: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> None:
    """Write a PNG of attention's weights, [H, L, S], a picture for each head; the names are those
    of the L rows and S columns."""
    heads = len(weights)
    width, height = 2 + 0.18 * len(columns), 2 + 0.18 * len(rows)
    figure = _figure(width * heads, height)
    figure.suptitle(title)
    for head, axes in enumerate(figure.subplots(1, heads, squeeze=False)[0]):
        axes.imshow(weights[head].float().numpy(), vmin=0, cmap="viridis")
        axes.set_title(f"head {head}" if heads > 1 else "", fontsize=8)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
    # Spaces and accents of other scripts are shown as they are; dollars are no formulas.
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    figure.savefig(path, format="png", dpi=120)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's global state alone
    return figure
