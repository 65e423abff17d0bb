"""`genkernels generate`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from ..data import InputError, clean_text
from ..training import load_checkpoint
from . import options


def generate(
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    which: options.WhichWeights = "best",
    prompt: Annotated[
        str, typer.Option(help="Text to continue.", show_default="a new line")
    ] = "\n",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add.")] = 400,
    temperature: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Below 1 is safer, above 1 bolder; 0 is greedy."),
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among the k likeliest tokens only.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, help="The same seed gives the same text.")
    ] = 0,
) -> None:
    """Continue a prompt with a trained model.

    Example:

        genkernels generate runs/rnn --prompt "The class" --temperature 0.7 --seed 1
    """
    try:
        text = clean_text(prompt)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("--prompt: not UTF-8; expected text") from error
    if not text:
        raise InputError("--prompt: empty; expected at least one character to continue")
    model, tokenizer, _ = load_checkpoint(checkpoint, which)
    tokens = model.generate(
        tokenizer.encode(text)[None],
        max_new_tokens,
        temperature,
        top_k,
        generator=torch.Generator().manual_seed(seed),
    )
    # Cleaned: a control sequence that the model made up must not reach the terminal.
    print(clean_text(tokenizer.decode(tokens[0])))
