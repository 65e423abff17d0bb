"""The tree of commands; one file each."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import (
    attend,
    compare,
    evaluate,
    generate,
    score,
    train_bayesian_network,
    train_bert,
    train_gan,
    train_gpt,
    train_hmm,
    train_recurrent_gan,
    train_rnn,
    train_seq2seq,
    train_t5,
)

app = typer.Typer(
    name="genkernels", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown"
)
train = typer.Typer(no_args_is_help=True)
train.command("rnn")(train_rnn.train_rnn)
train.command("gpt")(train_gpt.train_gpt)
train.command("bert")(train_bert.train_bert)
train.command("t5")(train_t5.train_t5)
train.command("seq2seq")(train_seq2seq.train_seq2seq)
train.command("hmm")(train_hmm.train_hmm)
train.command("bayesian-network")(train_bayesian_network.train_bayesian_network)
train.command("gan")(train_gan.train_gan)
train.command("recurrent-gan")(train_recurrent_gan.train_recurrent_gan)
app.add_typer(train, name="train")
app.command("generate")(generate.generate)
app.command("attend")(attend.attend)
app.command("evaluate")(evaluate.evaluate)
app.command("score")(score.score)
app.command("compare")(compare.compare)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"genkernels {__version__}")
        raise typer.Exit


@app.callback()
def _genkernels(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Train generative models on the fused kernels of genkernels.

    First steps:

    ```
    genkernels train rnn
    genkernels generate --prompt "The class"
    ```
    """


@train.callback()
def _train() -> None:
    """Train a model on text, sound, images, series or a table.

    Examples:

    ```
    genkernels train rnn --data notes.txt --minutes 2
    genkernels train gpt --resume
    genkernels train t5 --data pairs.tsv --dry-run
    ```
    """


@app.command()
def info() -> None:
    """Print versions, CPU features, SIMD levels and which kernels can run.

    Example:

    ```
    GENKERNELS_SIMD=avx2 genkernels info
    ```
    """
    from ..info import main

    main()
