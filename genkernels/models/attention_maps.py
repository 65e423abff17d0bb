"""Which tokens each token looks at."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .transformer import Functions


@contextlib.contextmanager
def attention_maps(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the weights of every attention that runs in the block, by the name of its module.

    Each is softmax(Q K^T scale + mask), [B, H, L, S], of the last call; rows add up to one. For a
    look, not for training: dropout has to be off, and all weights are in memory.
    """
    maps: dict[str, Tensor] = {}

    def record(name: str, attention: Any, query: Tensor, key: Tensor, *args: Any, **options: Any):
        # What weights do to a value that is the identity is they themselves, whatever the options.
        S = key.shape[-2]
        identity = torch.eye(S, dtype=key.dtype, device=key.device).expand(*key.shape[:-1], S)
        maps[name] = attention(query, key, identity, **options)
        return attention(query, key, *args, **options)

    changed = {
        module: functions
        for module in model.modules()
        if isinstance(functions := getattr(module, "functions", None), Functions)
    }
    names = {module: name for name, module in model.named_modules()}
    try:
        for module, functions in changed.items():
            attention = functools.partial(record, names[module], functions.attention)
            module.functions = functions._replace(attention=attention)  # type: ignore[assignment]
        yield maps
    finally:
        for module, functions in changed.items():
            module.functions = functions  # type: ignore[assignment]
