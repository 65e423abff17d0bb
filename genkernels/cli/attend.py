"""`genkernels attend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..data import MASK, InputError, Tokenizer, spell_answer, spell_masked
from ..models import BERT, EncoderDecoder, attention_maps
from ..training import (
    TokenTask,
    load_checkpoint,
    plot_attention,
    replace_file,
    task_of,
)
from . import options

_MOST_TOKENS = 128  # that a picture shows so that one can read them
_MOST_ANSWERED = 64
_LIKELIEST = 5


def attend(
    checkpoint: options.Checkpoint = Path("runs/gpt"),
    prompt: options.Prompt = None,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("attention.png"),
    layer: Annotated[
        str | None,
        typer.Option(help="Name of an attention in the model.", show_default="the last one"),
    ] = None,
    head: Annotated[
        int | None, typer.Option(min=0, help="One head only.", show_default="all")
    ] = None,
    which: options.WhichWeights = "best",
) -> None:
    """Draw which tokens a gpt, bert, t5 or seq2seq looks at.

    A row of the picture is a token, and the brighter a column, the more of that token it takes in;
    each head has a picture of its own. Of a t5 or seq2seq the rows are the tokens of its answer.
    Prints at which tokens the last row looks most, or that of bert's first [MASK], in the mean of
    the heads.

    Examples:

        genkernels attend runs/gpt --prompt "The class of a class is" --output class.png
        genkernels attend runs/t5 --prompt "The <extra_id_0> of a class" --head 0
    """
    text = options.cleaned(prompt)
    options.check_picture(output)
    loaded = load_checkpoint(checkpoint, which)
    model, tokenizer, _ = loaded
    if not hasattr(model, "functions"):
        raise InputError(
            f"{checkpoint}: a {model.name} has no attention; expected gpt, bert, t5 or seq2seq"
        )
    task_class = task_of(loaded)
    assert issubclass(task_class, TokenTask)
    tokens = task_class.read_prompt(model, tokenizer, text)  # [1, S]
    longest = min(getattr(model.config, "context_length", _MOST_TOKENS), _MOST_TOKENS)
    if tokens.shape[1] > longest:
        raise InputError(f"--prompt: {tokens.shape[1]} tokens; expected at most {longest}")
    with attention_maps(model) as maps, torch.no_grad():
        answer = None
        if isinstance(model, EncoderDecoder):
            answer = model.generate(tokens, _MOST_ANSWERED, temperature=0)  # [1, L]
            model(tokens, answer)
        else:
            model(tokens)
    names = list(maps)
    name = names[-1] if layer is None else layer
    if name not in maps:
        raise InputError(f"--layer: {layer!r}; expected one of {', '.join(names)}")
    weights = maps[name][0]  # [H, L, S]
    if head is not None:
        if head >= len(weights):
            raise InputError(f"--head: {head}; expected from 0 to {len(weights) - 1}")
        weights = weights[head : head + 1]
    rows = columns = [_spelled(model, tokenizer, token) for token in tokens[0]]
    if answer is not None and name.startswith("decoder"):
        rows = [_spelled(model, tokenizer, token) for token in answer[0]]
        columns = columns if name.endswith("cross_attention") else ["start", *rows[:-1]]
    with replace_file(output) as file:
        plot_attention(file, weights, rows, columns, name)
    row = rows.index(repr(MASK)) if repr(MASK) in rows else -1
    shares, places = weights.mean(0)[row].topk(min(_LIKELIEST, len(columns)))
    pairs = zip(shares.tolist(), places.tolist(), strict=True)
    print(f"{rows[row]} looks at {', '.join(f'{columns[i]} {share:.1%}' for share, i in pairs)}")
    print(f"attention       {output}: {name}")


def _spelled(model: Any, tokenizer: Tokenizer, token: Tensor) -> str:
    if isinstance(model, BERT):
        special = model.special_tokens
        names = {special.cls: "[CLS]", special.sep: "[SEP]"}
        return names.get(int(token)) or repr(spell_masked(token[None], tokenizer))
    if isinstance(model, EncoderDecoder):
        is_end = token == model.special_tokens.end
        return "end" if is_end else repr(spell_answer(token[None], tokenizer))
    return repr(tokenizer.decode(token[None]))
