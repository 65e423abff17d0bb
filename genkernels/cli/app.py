"""The tree of commands; one file each."""

from __future__ import annotations

from inspect import cleandoc

import typer

from . import evaluate, generate, train_rnn

app = typer.Typer(
    name="genkernels",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help=cleandoc("""
        Train generative models on the fused kernels of genkernels.

        First steps:

            genkernels train rnn
            genkernels generate --prompt "The class"
    """),
)
train = typer.Typer(no_args_is_help=True, help="Train a model on a text file.")
train.command("rnn")(train_rnn.train_rnn)
app.add_typer(train, name="train")
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)


@app.command()
def info() -> None:
    """Print versions, CPU features, SIMD levels and which kernels can run."""
    from ..info import main

    main()
