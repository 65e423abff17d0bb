"""`genkernels train bayesian-network`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import MARKOV_PRESETS
from . import options
from .train import train_model


def train_bayesian_network(
    context: typer.Context,
    data: options.Data = None,
    preset: Annotated[str, typer.Option(help=options.presets_help(MARKOV_PRESETS))] = "bytes",
    output: options.Output = Path("runs/bayesian-network"),
    seed: options.Seed = 0,
    order: options.Order = None,
    sample: options.Sample = True,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train a Bayesian network of the bytes of a text file, by counting.

    Each byte depends on the ones before it, --order of them: a Markov chain, whose one table is
    smoothed by modified Kneser-Ney. The last tenth of the text is held out and only measured on.
    Counting takes seconds, so that there is nothing to resume.

    Examples:

        genkernels train bayesian-network --data notes.txt
        genkernels train bayesian-network --order 2 --output runs/order-2
    """
    train_model("markov", **locals())
