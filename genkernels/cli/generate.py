"""`genkernels generate`."""

from __future__ import annotations

import functools
import itertools
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..data import (
    MASK,
    InputError,
    TextStream,
    Tokenizer,
    clean_text,
    encode_masked,
    encode_source,
    spell_answer,
    spell_masked,
)
from ..models import BERT, T5, CausalModel
from ..models.config import MAX_SIZE
from ..training import labels_of, load_checkpoint
from . import options

_CANDIDATES = 5


def generate(
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    which: options.WhichWeights = "best",
    prompt: options.Prompt = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_SIZE, help="How many tokens to add.")
    ] = 400,
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
    """Continue a prompt with a trained model, fill in its gaps, or answer it.

    rnn and gpt continue the prompt, and t5 answers it, with <extra_id_0>, <extra_id_1>, ... where
    spans are missing; a single text is printed as it comes. bert fills in each [MASK], and shows
    the --top-k likeliest tokens of each, or says how likely each label is.

    Examples:

        genkernels generate runs/rnn --prompt "The class" --temperature 0.7 --seed 1
        genkernels generate runs/gpt --num-samples 3 --top-p 0.9
        genkernels generate runs/bert --prompt "The [MASK] of a class"
        genkernels generate runs/t5 --prompt "The <extra_id_0> of a class"
    """
    text = options.cleaned(prompt)
    model, tokenizer, training = load_checkpoint(checkpoint, which)
    tokens = prompt_tokens(model, tokenizer, text)  # [1, P]
    if isinstance(model, BERT):
        if model.config.num_classes is None:
            _print_filled(model, tokenizer, tokens, top_k or _CANDIDATES)
        else:
            _print_classes(model, tokens, labels_of(model, training))
        return
    tokens = tokens.expand(num_samples, -1)  # [B, P]
    generator = torch.Generator().manual_seed(seed)
    new = model.stream(tokens, max_new_tokens, temperature, top_k, top_p, generator)
    decode = tokenizer.decode
    if isinstance(model, T5):
        tokens, decode = tokens[:, :0], functools.partial(spell_answer, tokenizer=tokenizer)
    # Cleaned: a control sequence that the model made up must not reach the terminal.
    if num_samples == 1:
        stream = TextStream(decode)
        for token in itertools.chain([tokens], new):  # [1, P], then [1, 1]
            print(stream.add(token[0]), end="", flush=True)
        print(stream.end())
        return
    for number, row in enumerate(torch.cat([tokens, *new], dim=1), 1):
        print(f"--- sample {number}\n{clean_text(decode(row))}")


def prompt_tokens(model: Any, tokenizer: Tokenizer, text: str | None) -> Tensor:
    """Return what `model` reads of a prompt, int64 [1, N]."""
    if isinstance(model, CausalModel):
        return tokenizer.encode(text or "\n")[None]
    if text is None:
        raise InputError(f"--prompt: missing; expected a text for the {model.name} to read")
    if isinstance(model, T5):
        return encode_source(text, tokenizer)[None]
    input = encode_masked(text, tokenizer)[None]
    longest = model.config.context_length
    if input.shape[1] > longest:
        raise InputError(f"--prompt: {input.shape[1] - 2} tokens; expected at most {longest - 2}")
    if model.config.num_classes is None and MASK not in text:
        raise InputError(f"--prompt: nothing to fill in; expected {MASK} in it")
    return input


@torch.no_grad()
def _print_filled(model: BERT, tokenizer: Tokenizer, input: Tensor, k: int) -> None:
    """Print the text with the likeliest tokens in it, and all candidates of each gap."""
    fillings = model.fill_mask(input, min(k, tokenizer.vocab_size))
    filled = input.masked_scatter(input == model.special_tokens.mask, fillings.token[:, 0])
    print(clean_text(spell_masked(filled[0], tokenizer)))
    for number, (shares, tokens) in enumerate(zip(*fillings, strict=True), 1):
        candidates = (
            f"{clean_text(tokenizer.decode(token[None]))!r} {share:.1%}"
            for share, token in zip(shares.tolist(), tokens, strict=True)
        )
        print(f"{MASK} {number}: {', '.join(candidates)}")


@torch.no_grad()
def _print_classes(model: BERT, input: Tensor, labels: list[str]) -> None:
    """Print the labels and how likely they are, the likeliest first."""
    shares, order = model.classify(input)[0].softmax(-1).sort(descending=True)
    for share, index in zip(shares.tolist(), order.tolist(), strict=True):
        print(f"{share:7.2%}  {labels[index]}")
