"""The loss curve and attention as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_DPI = 120
_HEADS_ABREAST = 4
_TOKEN = 0.18  # inches
_LONGEST_SIDE = 12_000  # pixels: matplotlib draws up to 65,535, in memory that nobody has


def plot_loss(
    path: str | os.PathLike[str],
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    baseline: tuple[str, float] | None,
    unit: str,
) -> None:
    """Write a PNG of (step, figure) curves, with the named figure of a simpler model as a line.

    `training` is empty where nothing of the training is in that unit.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), label="training", color="tab:blue", linewidth=0.8)
    axes.plot(*zip(*held_out, strict=True), label="held-out", color="tab:orange", marker=".")
    if baseline:
        name, value = baseline
        axes.axhline(value, label=f"{name}, held-out", color="gray", linestyle="--")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def plot_runs(
    path: str | os.PathLike[str],
    runs: Mapping[str, Sequence[tuple[float, float]]],
    unit: str,
) -> None:
    """Write a PNG of the held-out figures of several runs, (seconds, figure), by their names."""
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for name, curve in runs.items():
        axes.plot(*zip(*curve, strict=True), label=f"{name} ({curve[-1][1]:.3f})", marker=".")
    axes.set(xlabel="seconds of training", ylabel=f"held-out {unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def plot_series(path: str | os.PathLike[str], series: Mapping[str, Tensor]) -> None:
    """Write a PNG of series, [N, T, C] by their names, a picture for each name and channel."""
    channels = max(part.shape[2] for part in series.values())
    figure = _figure(8, 2 * len(series) * channels)
    grid = figure.subplots(len(series) * channels, 1, squeeze=False, sharex=True, sharey=True)
    names = [(name, channel) for name in series for channel in range(channels)]
    for axes, (name, channel) in zip(grid.flat, names, strict=True):
        axes.plot(series[name][:, :, channel].T.numpy(), linewidth=0.8)
        axes.set_title(name, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def plot_attention(
    path: str | os.PathLike[str],
    weights: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> None:
    """Write a PNG of attention's weights, [H, L, S], a picture for each head, at most four abreast;
    the names are those of the L rows and S columns. The colours mean the same in all of them."""
    heads = len(weights)
    down = math.ceil(heads / _HEADS_ABREAST)
    abreast = math.ceil(heads / down)
    width = 3 + (0.3 + _TOKEN * len(columns)) * abreast
    height = 2 + (0.4 + _TOKEN * len(rows)) * down
    figure = _figure(width, height)
    figure.suptitle(title)
    grid = figure.subplots(down, abreast, squeeze=False)
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.remove()
            continue
        image = axes.imshow(
            weights[head].float().numpy(), vmin=0, vmax=weights.max().item(), cmap="viridis"
        )
        axes.set_title(f"head {head}" if heads > 1 else "", fontsize=8)
        is_lowest, is_leftmost = head + abreast >= heads, head % abreast == 0
        axes.set_xticks(range(len(columns)), columns if is_lowest else [], rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), rows if is_leftmost else [], fontsize=7)
    bar = figure.colorbar(image, ax=figure.axes, aspect=40, fraction=0.05, pad=0.02)
    bar.set_label("share of the row's attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    # Spaces and accents of other scripts are shown as they are; dollars are no formulas.
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    figure.savefig(path, format="png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Constrained, and close together what keeps its shape.
    dpi = min(_DPI, _LONGEST_SIDE / max(width, height))
    figure = Figure(figsize=(width, height), dpi=dpi, layout="compressed")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's global state alone
    return figure
