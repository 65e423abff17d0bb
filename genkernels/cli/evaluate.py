"""`genkernels evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..data import DEFAULT_CORPUS, ByteTokenizer, InputError, errors_in, load_text, split_text
from ..models import MarkovModel
from ..training import evaluate as evaluate_model
from ..training import load_checkpoint
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

    Example:

        genkernels evaluate runs/rnn --data notes.txt --whole
    """
    model, tokenizer, _ = load_checkpoint(checkpoint, which)
    text = load_text(data)
    bytes_of = ByteTokenizer().encode
    baseline = None
    if not whole:
        with errors_in(data or DEFAULT_CORPUS):
            training, text = split_text(text)
        markov = MarkovModel(order=3).fit(bytes_of(training)).bits_per_byte(bytes_of(text))
        baseline = "order-3 Markov model", markov
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise InputError(f"{data or DEFAULT_CORPUS}: {len(tokens)} token; expected at least 2")
    result = evaluate_model(model, tokens, tokenizer.byte_lengths)
    for line in evaluation_lines(result, baseline):
        print(line)
