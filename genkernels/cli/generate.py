"""`genkernels generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..data import InputError
from ..models.config import MAX_SIZE
from ..training import MAX_NEW_TOKENS, TEMPERATURE, Request, load_checkpoint, task_of
from . import options


def generate(
    context: typer.Context,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    which: options.WhichWeights = "best",
    prompt: options.Prompt = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_SIZE,
            help="How many tokens to add; of sound how many samples.",
            show_default=f"{MAX_NEW_TOKENS}; of sound those of 4 seconds",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e6,
            help="Below 1 is safer, above 1 bolder; 0 is greedy.",
            show_default=f"{TEMPERATURE}; 0 for seq2seq",
        ),
    ] = None,
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
    beam_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000,
            help="Of t5 or seq2seq the best answer that so many beginnings side by side find, "
            "instead of one that is drawn.",
            show_default="none",
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="How many texts, rows, images or series, drawn side by side.",
            show_default="1 text or row, 64 images or series",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, help="The same seed gives the same again.")
    ] = 0,
    label: Annotated[
        str | None,
        typer.Option(help="Class of the images or series.", show_default="each in turn"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for images (.png), series (.png, a plot, or .csv) or sound (.wav).",
            show_default="images.png, series.png or sound.wav",
        ),
    ] = None,
) -> None:
    """Continue a prompt with a trained model, fill in its gaps, answer it, or draw.

    rnn, gpt, hmm and bayesian-network continue the prompt, and t5 answers it, with <extra_id_0>,
    <extra_id_1>, ... where spans are missing, and seq2seq; a single text is printed as it comes.
    bert fills in each [MASK], and shows the --top-k likeliest tokens of each, or says how likely
    each label is. A bayesian-network of a table prints how likely each value is of the columns that
    the prompt does not name, or, with --num-samples, draws rows with what it gives, as CSV. gan
    draws images and recurrent-gan series, into the file --output; there an rnn that has
    learned sound writes what comes after silence, without a prompt.

    Examples:

        genkernels generate runs/rnn --prompt "The class" --temperature 0.7 --seed 1
        genkernels generate runs/gpt --num-samples 3 --top-p 0.9
        genkernels generate runs/bert --prompt "The [MASK] of a class"
        genkernels generate runs/t5 --prompt "The <extra_id_0> of a class"
        genkernels generate runs/seq2seq --prompt "the 3rd of May 1998" --beam-size 4
        genkernels generate runs/table --prompt "season=winter,rain=no"
        genkernels generate runs/table --prompt "rain=yes" --num-samples 5
        genkernels generate runs/gan --label 7 --num-samples 25 --output sevens.png
        genkernels generate runs/recurrent-gan --output series.csv
        genkernels generate runs/audio --max-new-tokens 80000 --output tune.wav
    """
    request = Request(
        options.cleaned(prompt),
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        num_samples,
        seed,
        beam_size,
        label,
        output,
    )
    loaded = load_checkpoint(checkpoint, which)
    task_class = task_of(loaded)
    for name in options.given(context, vars(request)):
        if name not in task_class.options:
            known = ", ".join(map(options.spelled, sorted(task_class.options)))
            raise InputError(
                f"{options.spelled(name)}: means nothing to this {loaded.model.name}; "
                f"expected {known}"
            )
    for text in task_class.generate(loaded, request):
        print(text, end="", flush=True)
