"""A Bayesian network of discrete variables: learned from data, sampled, and asked."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import check_size
from .sampling import sample_token

_MAX_TABLE = 100_000_000  # numbers, 800 MB
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class BayesianNetworkConfig:
    """The variables of a `BayesianNetwork` and what each depends on.

    Args:
        states: how many values a variable has, by its name; in the order of the columns of data.
        parents: the variables that one depends on, by its name; none of those that are not named.

    Raises:
        ValueError: a number of states that is no int from 1 to 1,000,000, a name that is unknown or
            there twice, a cycle, or a variable with parents of too many values: a table of all of
            theirs and its own has at most 100,000,000 numbers.
    """

    states: dict[str, int]
    parents: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.states:
            raise ValueError("states must name at least 1 variable, got none")
        for name, count in self.states.items():
            check_size(f"states of {name!r}", count)
        check_names(self.states, self.parents)
        for names in self.parents.values():
            check_names(self.states, names)
        # A checkpoint's JSON has lists.
        parents = {name: tuple(self.parents.get(name, ())) for name in self.states}
        object.__setattr__(self, "parents", parents)
        try:
            self.order()
        except CycleError as error:
            cycle = " -> ".join(map(repr, error.args[1]))
            raise ValueError(f"parents must have no cycle, got {cycle}") from error
        for name in self.states:
            size = math.prod(self.table_shape(name))
            if size > _MAX_TABLE:
                raise ValueError(
                    f"{name!r} and its parents must have at most {_MAX_TABLE:,} values together, "
                    f"got {size:,}"
                )

    def order(self) -> list[str]:
        """Return the variables, each after its parents."""
        return list(TopologicalSorter(self.parents).static_order())

    def family(self, name: str) -> tuple[str, ...]:
        """Return the parents of a variable and itself, the dimensions of its table."""
        return *self.parents[name], name

    def table_shape(self, name: str) -> list[int]:
        return [self.states[member] for member in self.family(name)]


def check_names(states: Mapping[str, int], names: Sequence[str] | Mapping[str, object]) -> None:
    """Raise a ValueError for a name that is no variable or stands there twice."""
    for name in names:
        if name not in states:
            raise ValueError(f"no variable {name!r}; expected one of {list(states)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a variable must be named once, got {list(names)}")


class _Factor(NamedTuple):
    """A function of some variables, up to a constant."""

    names: tuple[str, ...]
    table: Tensor  # one dimension for each name

    def times(self, other: _Factor) -> _Factor:
        names = tuple(dict.fromkeys(self.names + other.names))
        ids = {name: i for i, name in enumerate(names)}
        operands = (x for names, table in (self, other) for x in (table, [ids[n] for n in names]))
        table = torch.einsum(*operands, list(ids.values()))
        # Products of hundreds of probabilities would underflow. A table of zeros stays one.
        return _Factor(names, table / table.amax().clamp_min(torch.finfo(table.dtype).tiny))

    def without(self, name: str) -> _Factor:
        names = tuple(other for other in self.names if other != name)
        return _Factor(names, self.table.sum(self.names.index(name)))


class BayesianNetwork(nn.Module):
    """P(variables), the product of P(variable | its parents) over all of them.

    Equivalent to: `pgmpy.models.DiscreteBayesianNetwork`, for variables whose values are numbered
    from 0.

    `tables` are probabilities in float64, [states of the parent, ... , states of the variable], one
    for each variable in the config's order; they are uniform until `fit` counts. Data are int64
    [M, K], a row for each case and a column for each variable. A chain of bytes, whose tables would
    not fit anywhere, is `MarkovModel`; `MarkovModel.network` writes a short one out.

    Source: D. Koller and N. Friedman, "Probabilistic graphical models", 2009; equation 3.17 (the
    product), section 17.4 (counts and Dirichlet priors) and algorithm 9.1 (`query`).
    """

    name = "bayesian-network"

    def __init__(self, config: BayesianNetworkConfig) -> None:
        super().__init__()
        self.config = config
        shapes = map(config.table_shape, config.states)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.full(shape, 1 / shape[-1], dtype=torch.float64), requires_grad=False)
            for shape in shapes
        )

    def fit(self, data: Tensor, pseudo_count: float = 0.0) -> BayesianNetwork:
        """Set the tables to the shares of what is counted in data; returns the network.

        `pseudo_count` is added to each count: the mean under a symmetric Dirichlet prior of it.
        Without one the tables are those of the greatest likelihood, and uniform where no case has
        the values of the parents.

        Raises:
            ValueError: data of other columns or values, without rows, or pseudo_count < 0.
        """
        self._check(data)
        if not len(data):
            raise ValueError("data must have at least 1 row, got none")
        if not pseudo_count >= 0:
            raise ValueError(f"pseudo_count must be >= 0, got {pseudo_count}")
        for name, table in self._named_tables():
            places = self._places(data, self.config.family(name))
            counts = places.bincount(minlength=table.numel()).view_as(table) + pseudo_count
            total = counts.sum(-1, keepdim=True)
            table.copy_(torch.where(total > 0, counts / total, 1 / table.shape[-1]))
        return self

    def log_likelihood(self, data: Tensor) -> Tensor:
        """Return ln P of each row of data, in nats, float64 [M]; -inf where it is impossible.

        Raises:
            ValueError: data of other columns or values.
        """
        self._check(data)
        log_prob = torch.zeros(len(data), dtype=torch.float64, device=data.device)
        for name, table in self._named_tables():
            log_prob += table.flatten()[self._places(data, self.config.family(name))].log()
        return log_prob

    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        evidence: Mapping[str, int] | None = None,
    ) -> Tensor:
        """Draw `count` cases, int64 [count, K]: each variable given its parents.

        With evidence, of P(case | evidence), exactly: what `query` sums out is drawn in the reverse
        order, each variable from the product that it was summed out of. It takes the time and
        memory of a query. The same generator state draws the same.

        Raises:
            ValueError: count < 1, or evidence that `query` refuses.
        """
        if count < 1:
            raise ValueError(f"count must be >= 1, got {count}")
        evidence = evidence or {}
        states, names = self.config.states, list(self.config.states)
        self._check_evidence([], evidence)
        tables = dict(self._named_tables())
        data = self.tables[0].new_zeros((count, len(names)), dtype=torch.int64)
        for name, value in evidence.items():
            data[:, names.index(name)] = value
        if evidence:
            hidden = [name for name in names if name not in evidence]
            products, rest = self._eliminate(hidden, self._factors(names, evidence))
            self._joint(rest, evidence)  # raises where there is no such case
            order = [
                (name, tuple(member for member in product.names if member != name), product)
                for name, product in reversed(products)
            ]
        else:
            order = [
                (name, self.config.parents[name], _Factor(self.config.family(name), tables[name]))
                for name in self.config.order()
            ]
        for name, given, factor in order:
            places = [factor.names.index(member) for member in (*given, name)]
            rows = factor.table.permute(places).reshape(-1, states[name])
            logits = rows[self._places(data, given)].log()  # [count, states]
            data[:, names.index(name)] = sample_token(logits, generator=generator)[:, 0]
        return data

    def query(self, variables: Sequence[str], evidence: Mapping[str, int] | None = None) -> Tensor:
        """Return P(variables | evidence), float64, a dimension for each of the variables.

        Equivalent to: `pgmpy.inference.VariableElimination(model).query(variables, evidence)`.

        Exact, by variable elimination: of what is neither asked nor given, one variable after
        another is summed out, that with the smallest product of the tables it stands in first.
        Time and memory are those of the largest product, which is exponential in how many variables
        it has: in a tree two and those that are asked, in a dense network nearly all.

        Raises:
            ValueError: a name that is unknown or there twice, a value that its variable does not
                have, or evidence that is impossible.
        """
        evidence = evidence or {}
        if not variables:
            raise ValueError("variables must name at least 1, got none")
        self._check_evidence(variables, evidence)
        # What is neither asked nor given nor an ancestor of such sums to one.
        relevant = self._ancestors([*variables, *evidence])
        hidden = [name for name in relevant if name not in variables and name not in evidence]
        _, factors = self._eliminate(hidden, self._factors(relevant, evidence))
        joint = self._joint(factors, evidence)
        table = joint.table / joint.table.sum()
        # A factor's dimensions come in the order in which its names were met.
        return table.permute([joint.names.index(name) for name in variables])

    def _check_evidence(self, variables: Sequence[str], evidence: Mapping[str, int]) -> None:
        states = self.config.states
        check_names(states, [*variables, *evidence])
        for name, value in evidence.items():
            if not 0 <= value < states[name]:
                raise ValueError(f"{name!r} must be from 0 to {states[name] - 1}, got {value}")

    def _factors(self, names: Sequence[str], evidence: Mapping[str, int]) -> list[_Factor]:
        """The tables of some variables, for the values that are given."""
        factors = []
        for name, table in self._named_tables():
            if name in names:
                family = self.config.family(name)
                part = table[tuple(evidence.get(member, slice(None)) for member in family)]
                factors.append(_Factor(tuple(m for m in family if m not in evidence), part))
        return factors

    def _eliminate(
        self, hidden: Sequence[str], factors: list[_Factor]
    ) -> tuple[list[tuple[str, _Factor]], list[_Factor]]:
        """Sum variables out; returns each with the product that it stood in, and what is left."""
        hidden, products = list(hidden), []
        while hidden:
            name = min(hidden, key=lambda name: self._cost(name, factors))
            hidden.remove(name)
            product = functools.reduce(_Factor.times, (f for f in factors if name in f.names))
            factors = [f for f in factors if name not in f.names] + [product.without(name)]
            products.append((name, product))
        return products, factors

    def _joint(self, factors: Sequence[_Factor], evidence: Mapping[str, int]) -> _Factor:
        joint = functools.reduce(_Factor.times, factors, _Factor((), self.tables[0].new_ones(())))
        if not joint.table.any():
            given = ", ".join(f"{name} = {value}" for name, value in evidence.items())
            raise ValueError(f"evidence must be possible, got {given}, whose probability is 0")
        return joint

    def _named_tables(self) -> zip[tuple[str, nn.Parameter]]:
        return zip(self.config.states, self.tables, strict=True)

    def _cost(self, name: str, factors: Sequence[_Factor]) -> int:
        """The size of the product of the factors that `name` stands in."""
        members = {member for factor in factors if name in factor.names for member in factor.names}
        return math.prod(self.config.states[member] for member in members)

    def _ancestors(self, names: Sequence[str]) -> list[str]:
        """The variables `names` and what they depend on, parents first."""
        wanted = set(names)
        for name in reversed(self.config.order()):
            if name in wanted:
                wanted.update(self.config.parents[name])
        return [name for name in self.config.order() if name in wanted]

    def _check(self, data: Tensor) -> None:
        check_data(data, self.config.states)

    def _places(self, data: Tensor, names: Sequence[str]) -> Tensor:
        """Where the values of some variables stand in a table of all of theirs, int64 [M]."""
        columns = dict(zip(self.config.states, data.T, strict=True))
        places = torch.zeros(len(data), dtype=torch.int64, device=data.device)
        for name in names:
            places = places * self.config.states[name] + columns[name]
        return places


def check_data(data: Tensor, states: Mapping[str, int]) -> None:
    """Raise a ValueError for data that are not int64 [M, K] of these variables' values."""
    if data.dim() != 2 or data.shape[1] != len(states) or data.dtype != torch.int64:
        raise ValueError(
            f"data must be int64 [M, {len(states)}], got {data.dtype} {list(data.shape)}"
        )
    if len(data):
        for (name, count), column in zip(states.items(), data.T, strict=True):
            least, most = (int(extreme) for extreme in column.aminmax())
            if least < 0 or most >= count:
                raise ValueError(f"{name!r} must be from 0 to {count - 1}, got {least} to {most}")


def chow_liu_tree(
    data: Tensor, states: dict[str, int], root: str | None = None
) -> BayesianNetworkConfig:
    """Return the tree of the greatest likelihood of data, int64 [M, K] as for a `BayesianNetwork`.

    Equivalent to: `pgmpy.estimators.TreeSearch(data, root_node=root).estimate("chow-liu")`.

    It is the spanning tree whose edges have the most mutual information; each variable has the
    neighbour towards `root`, the first variable by default, as its parent. Which root it is does
    not change the likelihood. Takes one product of one-hot rows, O(M S^2) for S states of all
    variables together.

    Source: C. K. Chow and C. N. Liu, "Approximating discrete probability distributions with
    dependence trees", 1968, section III.

    Raises:
        ValueError: data of other columns or values, without rows, or an unknown root.
    """
    import networkx

    check_data(data, states)
    if not len(data):
        raise ValueError("data must have at least 1 row, got none")
    names = list(states)
    root = names[0] if root is None else root
    check_names(states, [root])
    information = _mutual_information(data, list(states.values())).tolist()
    graph = networkx.Graph()
    graph.add_nodes_from(names)
    graph.add_weighted_edges_from(
        (names[i], names[j], information[i][j]) for i in range(len(names)) for j in range(i)
    )
    tree = networkx.maximum_spanning_tree(graph)
    edges = networkx.bfs_edges(tree, root)
    return BayesianNetworkConfig(states, {child: (parent,) for parent, child in edges})


def _mutual_information(data: Tensor, states: Sequence[int]) -> Tensor:
    """That of each two columns, in nats, float64 [K, K]."""
    counts = torch.tensor(states, device=data.device)
    owner = torch.arange(len(states), device=data.device).repeat_interleave(counts)  # [S]
    first = counts.cumsum(0) - counts  # [K]
    joint = torch.zeros(len(owner), len(owner), dtype=torch.float64, device=data.device)
    for rows in (data + first).split(_ROWS_AT_ONCE):
        one_hot = torch.zeros(len(rows), len(owner), dtype=torch.float64, device=data.device)
        one_hot.scatter_(1, rows, 1)
        joint += one_hot.T @ one_hot
    joint /= len(data)
    marginal = joint.diagonal()  # [S]
    independent = marginal[:, None] * marginal
    terms = torch.xlogy(joint, joint / independent.masked_fill(joint == 0, 1))  # [S, S]
    member = nn.functional.one_hot(owner, len(states)).double()  # [S, K]
    return member.T @ terms @ member
