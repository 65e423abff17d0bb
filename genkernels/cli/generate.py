"""`genkernels generate`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from ..data import InputError, TextStream, clean_text
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
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            max=1,
            callback=options.finite,
            help="Draw among the likeliest tokens only that together have this probability.",
        ),
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, max=10_000, help="How many texts, drawn side by side.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, help="The same seed gives the same text.")
    ] = 0,
) -> None:
    """Continue a prompt with a trained model.

    A single text is printed as it comes.

    Examples:

        genkernels generate runs/rnn --prompt "The class" --temperature 0.7 --seed 1
        genkernels generate runs/gpt --num-samples 3 --top-p 0.9
    """
    try:
        text = clean_text(prompt)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("--prompt: not UTF-8; expected text") from error
    if not text:
        raise InputError("--prompt: empty; expected at least one character to continue")
    model, tokenizer, _ = load_checkpoint(checkpoint, which)
    tokens = tokenizer.encode(text).expand(num_samples, -1)  # [B, P]
    generator = torch.Generator().manual_seed(seed)
    new = model.stream(tokens, max_new_tokens, temperature, top_k, top_p, generator)
    # Cleaned: a control sequence that the model made up must not reach the terminal.
    if num_samples == 1:
        stream = TextStream(tokenizer.decode)
        print(stream.add(tokens[0]), end="", flush=True)
        for token in new:  # [1, 1]
            print(stream.add(token[0]), end="", flush=True)
        print(stream.end())
        return
    for number, row in enumerate(torch.cat([tokens, *new], dim=1), 1):
        print(f"--- sample {number}\n{clean_text(tokenizer.decode(row))}")
