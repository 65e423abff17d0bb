"""`genkernels train bayesian-network`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..data import InputError
from ..training import MARKOV_PRESETS, TABLE_PRESETS, TASKS
from . import options
from .train import train_model

_MODEL = "bayesian-network"
_OF_A_TEXT, _OF_A_TABLE = {"order"}, {"structure", "pseudo_count"}


def train_bayesian_network(
    context: typer.Context,
    data: options.TableData = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=options.presets_help(MARKOV_PRESETS | TABLE_PRESETS),
            show_default="bytes, or table for one",
        ),
    ] = None,
    output: options.Output = Path("runs/bayesian-network"),
    seed: options.Seed = 0,
    order: options.Order = None,
    structure: options.TableStructure = None,
    pseudo_count: options.PseudoCount = None,
    sample: options.Sample = True,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train a Bayesian network of the columns of a table or of the bytes of a text, by counting.

    Of a table, a file that ends in .csv, every value of a column is a state. Each column depends on
    at most one other, by the tree of the greatest likelihood (Chow and Liu), or as --structure
    says. A random tenth of the rows is held out and only measured on, in bits per row, beside
    columns that are independent. `genkernels generate` draws rows and answers what is likely.

    Of a text each byte depends on the ones before it, --order of them: a Markov chain, whose one
    table is smoothed by modified Kneser-Ney. The last tenth is held out. Counting takes seconds, so
    that there is nothing to resume.

    Examples:

        genkernels train bayesian-network --data notes.txt
        genkernels train bayesian-network --order 2 --output runs/order-2
        genkernels train bayesian-network --data table.csv --output runs/table
        genkernels train bayesian-network --data table.csv --structure "season->rain,rain->wet"
    """
    values = locals()
    is_text = TASKS[_MODEL].of(data) is not TASKS[_MODEL]
    meaningless = _OF_A_TABLE if is_text else _OF_A_TEXT
    for name in meaningless & options.given(context, values).keys():
        raise InputError(
            f"{options.spelled(name)}: means nothing to a {'text' if is_text else 'table'}; "
            f"expected it with {'a file TABLE.csv' if is_text else 'a text'}"
        )
    train_model(_MODEL, **values)
