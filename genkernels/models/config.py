"""Which sizes a model may have."""

from __future__ import annotations

from typing import Any

# Far above what fits into a machine, far below where sizes overflow or building takes forever.
MAX_SIZE = 1_000_000
MAX_LAYERS = 1_000


def check_size(name: str, value: object, most: int = MAX_SIZE) -> None:
    """Raise a ValueError for a `value` that is no int from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} must be an int from 1 to {most:,}, got {value!r}")


def check_sizes(config: object, *names: str) -> None:
    """Raise a ValueError for a field of `config` that is no int from 1 to its maximum."""
    for name in names:
        check_size(name, getattr(config, name), MAX_LAYERS if name == "num_layers" else MAX_SIZE)


def check_heads(config: Any) -> None:
    """Raise a ValueError for an `embedding_dim` that `num_heads` does not divide."""
    check_sizes(config, "num_heads", "embedding_dim")
    if config.embedding_dim % config.num_heads:
        raise ValueError(
            f"embedding_dim must be a multiple of num_heads {config.num_heads}, "
            f"got {config.embedding_dim}"
        )


def check_dropout(dropout: object) -> None:
    """Raise a ValueError for a `dropout` that is no number in [0, 1)."""
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:  # type: ignore[operator]
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
