"""`genkernels evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..training import TASKS, load_checkpoint
from . import options
from .report import evaluation_lines


def evaluate(
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    data: options.Data = None,
    which: options.WhichWeights = "best",
    whole: Annotated[
        bool,
        typer.Option(
            "--whole/--held-out",
            help="Measure on the whole text, or on the tail that training on it would hold out.",
        ),
    ] = False,
) -> None:
    """Measure how well a trained model predicts a text.

    Prints bits per byte, cross-entropy, perplexity and token accuracy; on a held-out split also
    the bits per byte of an order-3 Markov model fitted to the rest of the text.

    Examples:

        genkernels evaluate runs/rnn --data notes.txt --whole
        genkernels evaluate runs/gpt --which last
    """
    model, tokenizer, _ = load_checkpoint(checkpoint, which)
    result, baseline = TASKS[model.name].measure(model, tokenizer, data, whole)
    for line in evaluation_lines(result, baseline):
        print(line)
