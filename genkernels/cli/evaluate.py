"""`genkernels evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..data import DEFAULT_CORPUS, InputError
from ..training import load_checkpoint, task_of
from . import options
from .report import evaluation_lines
from .train import data_of


def evaluate(
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    data: options.Measured = None,
    which: options.WhichWeights = "best",
    whole: Annotated[
        bool,
        typer.Option(
            "--whole/--held-out",
            help="Measure on the whole text, or on the tail that training on it would hold out.",
        ),
    ] = False,
) -> None:
    """Measure how well a trained model predicts what it was not trained on.

    rnn, gpt, hmm and bayesian-network: bits per byte, cross-entropy, perplexity and token accuracy
    of a text; of sound the bits and the accuracy of its samples. bert: the cross-entropy and
    accuracy of masked tokens, or of labels; t5 and seq2seq: those of the tokens of answers, and how
    many answers are exact. gan and recurrent-gan: how far what they draw is from what was held out.
    On a held-out split also what a simpler model reaches that has learned from the rest.

    Examples:

        genkernels evaluate runs/rnn --data notes.txt --whole
        genkernels evaluate runs/gpt --which last
    """
    loaded = load_checkpoint(checkpoint, which)
    task_class = task_of(loaded)
    if data is None:
        data = data_of(loaded.training)
        digest = loaded.training.get("digest")  # older checkpoints have none
        if not whole and digest not in (None, task_class.of(data).digest_of(data, loaded)):
            raise InputError(
                f"{data or DEFAULT_CORPUS}: has changed since {checkpoint} learned from it, "
                "perhaps what would be held out; expected it as it was, --whole or --data"
            )
    result, baseline = task_class.of(data).measure(loaded, data, whole)
    for line in evaluation_lines(result, baseline):
        print(line)
