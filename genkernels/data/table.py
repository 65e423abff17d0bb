"""Tables of discrete variables."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .text import load_text

# A network learned from them has a square of numbers of theirs, 800 MB.
_MOST_VALUES = 10_000


class Table(NamedTuple):
    """Rows of discrete variables.

    data: int64 [M, K], the place of each value among those of its column.
    values: what there is in each column, by its name.
    """

    data: Tensor
    values: dict[str, list[str]]


def load_table(
    path: str | os.PathLike[str], values: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """Read a CSV file whose first line has the names of the columns, cleaned by `clean_text`.

    Spaces around a value are no part of it, and empty lines are passed over. `values` are those
    that the columns may have, and others are left out; by default all of both, values in
    alphabetical order.

    Raises:
        InputError: what `load_text` raises; less than two columns, or names that are empty, there
            twice or missing; a line of more or less values, an empty one or one that is not in
            `values` (each with the line); no rows, or more than 10,000 values of all columns.
    """
    reader = csv.reader(io.StringIO(load_text(path)), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; expected CSV") from error
    (first, names), *rows = lines or [(1, [])]
    where = f"{path}: line {first}"
    if len(names) < 2:
        raise InputError(f"{where}: {len(names)} column; expected two or more, with commas between")
    if "" in names or len(set(names)) < len(names):
        raise InputError(
            f"{where}: {', '.join(names)}; expected different names, none of them empty"
        )
    for name in values or ():
        if name not in names:
            raise InputError(f"{where}: no column {name!r}; expected {', '.join(values or ())}")
    if not rows:
        raise InputError(f"{path}: no rows in it; expected some below the names of the columns")
    for number, cells in rows:
        if len(cells) != len(names):
            raise InputError(
                f"{path}: line {number}: {len(cells)} values; expected {len(names)}, one for each "
                f"of {', '.join(names)}"
            )
        if "" in cells:
            raise InputError(
                f"{path}: line {number}: no value of {names[cells.index('')]!r}; expected one, "
                "which may be a word for a missing value"
            )
    columns = dict(zip(names, zip(*(cells for _, cells in rows), strict=True), strict=True))
    known = (
        {name: list(of) for name, of in values.items()}
        if values is not None
        else {name: sorted(set(column)) for name, column in columns.items()}
    )
    if sum(map(len, known.values())) > _MOST_VALUES:
        most = max(known, key=lambda name: len(known[name]))
        raise InputError(
            f"{path}: {len(known[most]):,} different values of {most!r}; expected at most "
            f"{_MOST_VALUES:,} of all columns: classes or ranges, and no names or numbers"
        )
    data = torch.empty(len(rows), len(known), dtype=torch.int64)
    for k, (name, of) in enumerate(known.items()):
        places = {value: place for place, value in enumerate(of)}
        for (number, _), value in zip(rows, columns[name], strict=True):
            if value not in places:
                raise InputError(
                    f"{path}: line {number}: {value!r} of {name!r}; expected one of {', '.join(of)}"
                )
        data[:, k] = torch.tensor([places[value] for value in columns[name]])
    return Table(data, known)
