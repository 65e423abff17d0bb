"""Texts with tokens in them that no tokenizer makes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .masking import SpecialTokens, framed
from .spans import SENTINELS, TextToTextTokens
from .tokenizers import ByteTokenizer, Tokenizer

MASK = "[MASK]"


def encode_masked(text: str, tokenizer: Tokenizer) -> Tensor:
    """Return the tokens of a text with [MASK] in it, framed by [CLS] and [SEP], int64 [N]."""
    special = SpecialTokens.above(tokenizer.vocab_size)
    # A word of BPE begins with its space; so does what takes the place of one.
    mask = re.escape(MASK) if tokenizer.name == ByteTokenizer.name else f" ?{re.escape(MASK)}"
    return framed(_encode(text, mask, lambda _: special.mask, tokenizer), special)


def encode_source(text: str, tokenizer: Tokenizer, has_spans: bool = True) -> Tensor:
    """Return the tokens of a source and its end, int64 [N]; with spans, <extra_id_0>, ... in it are
    sentinels."""
    special = TextToTextTokens.above(tokenizer.vocab_size)
    if not has_spans:
        return torch.cat([tokenizer.encode(text), torch.tensor([special.end])])
    numbers = "|".join(map(str, range(SENTINELS)))
    tokens = _encode(
        text,
        f"<extra_id_(?:{numbers})>",
        lambda spelled: special.sentinel + int(spelled[len("<extra_id_") : -1]),
        tokenizer,
    )
    return torch.cat([tokens, torch.tensor([special.end])])


def _encode(
    text: str, pattern: str, token_of: Callable[[str], int], tokenizer: Tokenizer
) -> Tensor:
    parts = re.split(f"({pattern})", text)  # what matches is every second one
    tokens = [
        torch.tensor([token_of(part)]) if index % 2 else tokenizer.encode(part)
        for index, part in enumerate(parts)
    ]
    return torch.cat(tokens)


def spell(tokens: Tensor, tokenizer: Tokenizer, names: Mapping[int, str]) -> str:
    """Decode tokens, [N], but for those that have names."""
    parts: list[str] = []
    for is_named, group in itertools.groupby(tokens.tolist(), names.__contains__):
        run = list(group)
        parts += [names[i] for i in run] if is_named else [tokenizer.decode(torch.tensor(run))]
    return "".join(parts)


def spell_masked(tokens: Tensor, tokenizer: Tokenizer) -> str:
    """Decode what `encode_masked` made, without its frame."""
    special = SpecialTokens.above(tokenizer.vocab_size)
    return spell(tokens, tokenizer, dict.fromkeys(special, "") | {special.mask: MASK})


def spell_answer(tokens: Tensor, tokenizer: Tokenizer) -> str:
    """Decode a source or a target, int64 [N], without its end."""
    special = TextToTextTokens.above(tokenizer.vocab_size)
    names = {special.sentinel + i: f"<extra_id_{i}>" for i in range(SENTINELS)}
    return spell(tokens, tokenizer, names | {special.pad: "", special.end: ""})
