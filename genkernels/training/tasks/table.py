"""A Bayesian network of the columns of a table."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data import InputError, load_table, load_text
from ...models import BayesianNetwork, BayesianNetworkConfig, chow_liu_tree
from ..checkpoint import Checkpoint
from ..evaluation import RowEvaluation
from ..fitting import CountingConfig, Fitting
from ..presets import TABLE_PRESETS, Structure
from .language import MarkovTask
from .task import Baseline, Example, Request, Task, digest_of, drawn, rows_held_out

_DRY_ROWS = 200


class TableTask(Task):
    """The rows of a table: which values of its columns go together."""

    model_class = BayesianNetwork
    config_class = CountingConfig
    presets = TABLE_PRESETS
    tiny: ClassVar = {"steps": 1}
    items = judged = "rows"
    unit = "bits/row"
    scale = 1 / math.log(2)
    options = frozenset({"prompt", "num_samples", "seed"})
    sample_heading = "rows that were drawn"

    def __init__(
        self,
        data: Path | None,
        sizes: Structure,
        config: CountingConfig,
        seed: int = 0,
        tokenizer: None = None,
        is_dry: bool = False,
    ) -> None:
        assert data is not None
        self.source = str(data)
        self.digest = digest_of(load_text(data))
        table = load_table(data)
        self.record = {"values": table.values}
        self._training, self._held_out = _split(table.data[: _DRY_ROWS if is_dry else None], data)
        states = {name: len(of) for name, of in table.values.items()}
        self.sizes = (
            chow_liu_tree(self._training, states)
            if sizes.structure is None
            else _structure(sizes.structure, states)
        )
        self.baseline = _independent(states, self._training, self._held_out)

    @classmethod
    def of(cls, data: Path | None) -> type[Task]:
        return cls if data is not None and data.suffix.lower() == ".csv" else MarkovTask

    def describe(self) -> str:
        training, held_out = len(self._training), len(self._held_out)
        return f"{training:,} rows to train on, {held_out:,} held out"

    def describe_model(self, model: BayesianNetwork) -> str:
        edges = (
            f"{' and '.join(parents)} -> {name}"
            for name, parents in self.sizes.parents.items()
            if parents
        )
        count = f"{self.parameters(model):,} parameters"
        return f"{count}, {len(self.sizes.states)} columns: {', '.join(edges) or 'independent'}"

    def describe_training(self, config: CountingConfig) -> str:
        return f"every row is counted, and {config.pseudo_count:g} more of each case"

    def training(self, model: BayesianNetwork, config: CountingConfig) -> Fitting:
        def fit() -> float:
            model.fit(self._training, config.pseudo_count)
            return -model.log_likelihood(self._training).mean().item()

        return Fitting(model, config, fit, len(self._training))

    def evaluate(self, model: Any, quickly: bool = False) -> RowEvaluation:
        return _evaluated(model, self._held_out)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[RowEvaluation, Baseline | None]:
        known, measured = _parts(checkpoint, data, whole)
        states = checkpoint.model.config.states
        baseline = None if whole else _independent(states, known, measured)
        return _evaluated(checkpoint.model, measured), baseline

    def sample(self, model: BayesianNetwork, max_new_tokens: int, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        rows = model.sample(max(max_new_tokens // 60, 1), generator)
        return _csv(_spelled(rows, self.record["values"])).rstrip("\n")

    @classmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        model, _, training = checkpoint
        values = _values_of(model, training)
        evidence = _evidence(request.prompt, values)
        try:
            if request.prompt is not None and request.num_samples is None:
                yield from _posteriors(model, values, evidence)
                return
            rows = model.sample(request.num_samples or 1, request.generator, evidence)
        except ValueError as error:  # of evidence that is impossible
            raise InputError(f"--prompt: {error}") from error
        yield _csv([list(values), *_spelled(rows, values)])

    @classmethod
    def examples_of(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool, count: int, seed: int
    ) -> list[Example]:
        _, measured = _parts(checkpoint, data, whole)
        values = _values_of(checkpoint.model, checkpoint.training)
        chosen = measured[drawn(count, len(measured), seed)]
        return [Example("", text) for text in _shown(chosen, values)]

    @classmethod
    def made(cls, checkpoint: Checkpoint, examples: Sequence[Example], seed: int) -> list[str]:
        model, _, training = checkpoint
        rows = model.sample(len(examples), torch.Generator().manual_seed(seed))
        return _shown(rows, _values_of(model, training))


def _split(data: Tensor, source: Path) -> tuple[Tensor, Tensor]:
    """Return the rows to learn from, and those that are held out."""
    if len(data) < 2:
        raise InputError(f"{source}: 1 row; expected at least 2, one of them to hold out")
    training, held_out = rows_held_out(len(data))
    return data[training], data[held_out]


def _parts(checkpoint: Checkpoint, data: Path | None, whole: bool) -> tuple[Tensor, Tensor]:
    """Return the rows that are known, and those that a model is measured on."""
    assert data is not None
    table = load_table(data, _values_of(checkpoint.model, checkpoint.training))
    return (table.data, table.data) if whole else _split(table.data, data)


def _structure(structure: str, states: dict[str, int]) -> BayesianNetworkConfig:
    """Return the network of edges such as "a->b,b->c"."""
    parents: dict[str, tuple[str, ...]] = {}
    for chain in filter(str.strip, structure.split(",")):
        names = [name.strip() for name in chain.split("->")]
        for name in names:
            if name not in states or len(names) < 2:
                raise InputError(
                    f"--structure: {chain.strip()!r}; expected edges as in a->b,b->c between "
                    f"{', '.join(states)}"
                )
        for parent, child in itertools.pairwise(names):
            parents[child] = (*parents.get(child, ()), parent)
    try:
        return BayesianNetworkConfig(states, parents)
    except ValueError as error:
        raise InputError(f"--structure: {error}") from error


def _independent(states: dict[str, int], known: Tensor, measured: Tensor) -> Baseline:
    """What columns that tell nothing of each other reach; each value counts once more than it is
    there."""
    model = BayesianNetwork(BayesianNetworkConfig(states)).fit(known, 1)
    bits = _evaluated(model, measured).bits_per_row
    return Baseline("independent columns", bits, [f"{bits:.4f}"])


def _evaluated(model: BayesianNetwork, rows: Tensor) -> RowEvaluation:
    return RowEvaluation(-model.log_likelihood(rows).mean().item() / math.log(2), len(rows))


def _values_of(model: BayesianNetwork, training: dict[str, Any]) -> dict[str, list[str]]:
    """Return the values of the columns, by what training wrote down.

    Raises:
        InputError: they are not those of the model.
    """
    values, states = training.get("values"), model.config.states
    if (
        not isinstance(values, dict)
        or list(values) != list(states)
        or not all(isinstance(of, list) and {*map(type, of)} == {str} for of in values.values())
        or [*map(len, values.values())] != [*states.values()]
    ):
        raise InputError(f"the checkpoint's values are {values!r}; expected texts for {states}")
    return values


def _evidence(prompt: str | None, values: dict[str, list[str]]) -> dict[str, int]:
    """Return the places of the values that a prompt such as "rain=yes,wet=no" gives."""
    try:
        parts = next(csv.reader([prompt or ""]))  # a value with a comma is in quotes, as in a file
    except csv.Error as error:
        raise InputError(f"--prompt: {error}; expected NAME=VALUE,NAME=VALUE") from error
    evidence: dict[str, int] = {}
    for part in parts:
        name, _, value = map(str.strip, part.partition("="))
        if name not in values or name in evidence:
            raise InputError(
                f"--prompt: {part!r}; expected NAME=VALUE, once for each of {', '.join(values)}"
            )
        if value not in values[name]:
            raise InputError(
                f"--prompt: {value!r} of {name!r}; expected one of {', '.join(values[name])}"
            )
        evidence[name] = values[name].index(value)
    return evidence


def _posteriors(
    model: BayesianNetwork, values: dict[str, list[str]], evidence: dict[str, int]
) -> Iterator[str]:
    """Yield how likely each value of the other columns is, the likeliest first."""
    for name, of in values.items():
        if name not in evidence:
            shares, order = model.query([name], evidence).sort(descending=True, stable=True)
            pairs = zip(shares.tolist(), order.tolist(), strict=True)
            yield f"{name:<15} {', '.join(f'{of[i]} {share:.2%}' for share, i in pairs)}\n"


def _spelled(rows: Tensor, values: dict[str, list[str]]) -> list[list[str]]:
    return [[of[i] for of, i in zip(values.values(), row, strict=True)] for row in rows.tolist()]


def _csv(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _shown(rows: Tensor, values: dict[str, list[str]]) -> list[str]:
    """A line for each column, as people read it."""
    return [
        "\n".join(f"{name}: {value}" for name, value in zip(values, row, strict=True))
        for row in _spelled(rows, values)
    ]
