"""The Bayesian network, against pgmpy's, and against all of its cases written out."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch

from genkernels.models import BayesianNetwork, BayesianNetworkConfig, MarkovModel, chow_liu_tree

CLOSE = {"rtol": 1e-6, "atol": 1e-9}

pytestmark = pytest.mark.usefixtures("one_thread")

# Two roots, an explaining away, a chain, a variable apart from all.
STATES = {"rain": 2, "season": 4, "wet": 3, "slip": 2, "news": 2, "coin": 2}
PARENTS = {
    "rain": ("season",),
    "wet": ("rain", "season"),
    "slip": ("wet",),
    "news": ("slip", "rain"),
}
QUERIES = [
    (["rain"], {}),
    (["slip"], {"season": 2}),
    (["season"], {"slip": 1, "news": 0}),
    (["news", "season"], {"wet": 1}),
    (["season", "rain", "coin"], {"news": 1}),
    (["coin"], {"wet": 0, "slip": 1}),
    (["wet", "rain", "news"], {}),
]


def random_network(seed: int = 0) -> BayesianNetwork:
    torch.manual_seed(seed)
    network = BayesianNetwork(BayesianNetworkConfig(STATES, PARENTS))
    for table in network.tables:
        weights = torch.empty_like(table).exponential_() + 0.05
        table.copy_(weights / weights.sum(-1, keepdim=True))
    return network


def all_cases() -> torch.Tensor:
    return torch.cartesian_prod(*map(torch.arange, STATES.values()))


def draw(network: BayesianNetwork, count: int) -> torch.Tensor:
    return network.sample(count, torch.Generator().manual_seed(0))


def pgmpy_frame(data: torch.Tensor):
    pandas = pytest.importorskip("pandas", reason="pandas: not installed (pgmpy brings it)")
    return pandas.DataFrame(data.numpy(), columns=list(STATES))


def pgmpy_twin(network: BayesianNetwork):
    """pgmpy's network with the same tables."""
    models = pytest.importorskip("pgmpy.models", reason="pgmpy: not installed")
    from pgmpy.factors.discrete import TabularCPD

    config = network.config
    twin = models.DiscreteBayesianNetwork()
    twin.add_nodes_from(config.states)
    twin.add_edges_from((p, name) for name, parents in config.parents.items() for p in parents)
    for (name, count), table in zip(config.states.items(), network.tables, strict=True):
        twin.add_cpds(
            TabularCPD(
                name,
                count,
                table.reshape(-1, count).T.numpy(),
                config.parents[name] or None,
                [config.states[parent] for parent in config.parents[name]] or None,
            )
        )
    assert twin.check_model()
    return twin


def test_queries_are_pgmpys():
    network = random_network()
    twin = pgmpy_twin(network)
    from pgmpy.inference import VariableElimination

    engine = VariableElimination(twin)
    for variables, evidence in QUERIES:
        theirs = engine.query(variables, evidence, show_progress=False)
        order = [theirs.variables.index(name) for name in variables]
        expected = torch.from_numpy(theirs.values.transpose(order))
        torch.testing.assert_close(network.query(variables, evidence), expected, **CLOSE)


@pytest.mark.parametrize(("variables", "evidence"), QUERIES)
def test_queries_are_sums_over_all_cases(variables, evidence):
    network = random_network()
    cases = all_cases()
    p = network.log_likelihood(cases).exp()
    assert p.sum().item() == pytest.approx(1)
    names = list(STATES)
    expected = torch.zeros([STATES[name] for name in variables], dtype=torch.float64)
    for case, probability in zip(cases.tolist(), p.tolist(), strict=True):
        if all(case[names.index(name)] == value for name, value in evidence.items()):
            expected[tuple(case[names.index(name)] for name in variables)] += probability
    torch.testing.assert_close(network.query(variables, evidence), expected / expected.sum())


def test_likelihood_is_pgmpys():
    network = random_network()
    twin = pgmpy_twin(network)
    data = draw(network, 40)
    expected = [
        math.log(twin.get_state_probability(dict(zip(STATES, case, strict=True))))
        for case in data.tolist()
    ]
    assert network.log_likelihood(data).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pseudo_count", [0, 2])
def test_fit_is_pgmpys(pseudo_count):
    network = random_network()
    data = draw(network, 200)
    twin = pgmpy_twin(network)
    from pgmpy.parameter_estimator import DiscreteBayesianEstimator, DiscreteMLE

    names = {name: list(range(count)) for name, count in STATES.items()}
    if pseudo_count:
        estimator = DiscreteBayesianEstimator(names, "dirichlet", pseudo_counts=pseudo_count)
    else:
        estimator = DiscreteMLE(names)
    theirs = estimator.fit(twin, pgmpy_frame(data)).parameters_
    assert network.fit(data, pseudo_count) is network
    found = {cpd.variable: cpd for cpd in theirs}
    for name, table in zip(STATES, network.tables, strict=True):
        cpd = found[name]
        order = [cpd.variables.index(member) for member in network.config.family(name)]
        expected = torch.from_numpy(cpd.values.transpose(order))
        torch.testing.assert_close(table.data, expected, **CLOSE)


def test_fit_without_a_case():
    network = BayesianNetwork(BayesianNetworkConfig({"a": 2, "b": 4}, {"b": ("a",)}))
    network.fit(torch.tensor([[0, 1], [0, 1], [0, 3]]))
    assert network.tables[0].tolist() == [1, 0]
    seen = [0, pytest.approx(2 / 3), 0, pytest.approx(1 / 3)]
    assert network.tables[1].tolist() == [seen, [0.25] * 4]
    assert network.log_likelihood(torch.tensor([[1, 0], [0, 0]])).tolist() == [-math.inf] * 2


@pytest.mark.parametrize("root", [None, "wet", "coin"])
def test_chow_liu_is_pgmpys(root):
    estimators = pytest.importorskip("pgmpy.estimators", reason="pgmpy: not installed")
    data = draw(random_network(), 2000)
    config = chow_liu_tree(data, STATES, root)
    search = estimators.TreeSearch(pgmpy_frame(data), root or "rain", n_jobs=1)
    theirs = search.estimate("chow-liu", show_progress=False)
    ours = {(parent, name) for name, parents in config.parents.items() for parent in parents}
    assert ours == set(theirs.edges())
    assert list(config.states) == list(STATES)


def test_chow_liu_finds_the_tree_that_data_come_from():
    parents = {"season": ("rain",), "wet": ("rain",), "slip": ("wet",), "news": ("wet",)}
    parents["coin"] = ("news",)
    network = random_network(seed=2)
    truth = BayesianNetwork(BayesianNetworkConfig(STATES, parents))
    for table in truth.tables:  # each value has one that mostly follows it
        table.fill_(0.1)
        for i, row in enumerate(table.view(-1, table.shape[-1])):
            row[i % len(row)] += 1
        table /= table.sum(-1, keepdim=True)
    data = truth.sample(20_000, torch.Generator().manual_seed(0))
    assert chow_liu_tree(data, STATES) == truth.config
    # Of all trees none is likelier, whatever the root.
    best = BayesianNetwork(truth.config).fit(data).log_likelihood(data).sum()
    turned = BayesianNetwork(chow_liu_tree(data, STATES, "coin")).fit(data)
    assert turned.config != truth.config
    torch.testing.assert_close(turned.log_likelihood(data).sum(), best)
    chain = dict(itertools.pairwise(reversed(STATES)))
    other = BayesianNetworkConfig(STATES, {name: (parent,) for name, parent in chain.items()})
    assert BayesianNetwork(other).fit(data).log_likelihood(data).sum() < best
    assert network.config != truth.config


def test_samples_have_the_marginals():
    network = random_network()
    data = draw(network, 50_000)
    assert data.dtype == torch.int64
    p = network.log_likelihood(all_cases()).exp()
    weights = [math.prod(list(STATES.values())[i + 1 :]) for i in range(len(STATES))]
    frequency = (data @ torch.tensor(weights)).bincount(minlength=len(p)) / len(data)
    error = (frequency - p).abs()
    assert (error < 5 * (p / len(data)).sqrt() + 1e-9).all()
    assert torch.equal(data, draw(network, 50_000))
    assert not torch.equal(data, network.sample(50_000, torch.Generator().manual_seed(1)))


def test_a_network_that_never_fits_into_a_table():
    # 2^61 cases; evidence of 600 leaves is less likely than float64 can say.
    leaves = [f"leaf{i}" for i in range(600)]
    states = {f"chain{i}": 2 for i in range(60)} | dict.fromkeys(leaves, 3)
    parents = {f"chain{i}": (f"chain{i - 1}",) for i in range(1, 60)}
    parents |= dict.fromkeys(leaves, ("chain0",))
    network = BayesianNetwork(BayesianNetworkConfig(states, parents))
    stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    for i, table in enumerate(network.tables):
        if 0 < i < 60:
            table.copy_(stay)
        elif i:
            table[:, 1] = torch.tensor([0.01, 0.0101], dtype=torch.float64)
            table[:, 2] = 1 - table[:, 0] - table[:, 1]
    end = torch.linalg.matrix_power(stay, 59)
    torch.testing.assert_close(network.query(["chain59"], {"chain0": 1}), end[1])
    odds = 1.01**600
    expected = torch.tensor([1 / (1 + odds), odds / (1 + odds)], dtype=torch.float64)
    given = dict.fromkeys(leaves, 1)
    torch.testing.assert_close(network.query(["chain0"], given), expected, **CLOSE)
    torch.testing.assert_close(network.query(["chain59"], given), expected @ end, **CLOSE)


def test_survives_a_checkpoint(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors: not installed")
    network = random_network()
    safetensors.save_file(network.state_dict(), tmp_path / "weights")
    config = BayesianNetworkConfig(**json.loads(json.dumps(asdict(network.config))))
    assert config == network.config
    with torch.device("meta"):
        assert BayesianNetwork(config).state_dict().keys() == network.state_dict().keys()
    loaded = BayesianNetwork(config)
    loaded.load_state_dict(safetensors.load_file(tmp_path / "weights"))
    data = draw(network, 100)
    assert torch.equal(loaded.log_likelihood(data), network.log_likelihood(data))


def test_a_chain_of_bytes_written_out():
    text = torch.tensor(list(b"the cat and the hat, the bat and that other cat"))
    chain = MarkovModel(order=1).fit(text)
    network = chain.network(4)
    assert network.config.parents["0"] == ()
    assert network.config.parents["3"] == ("2",)
    words = torch.tensor([list(b"that"), list(b"zoo,"), list(b"he, ")])
    torch.testing.assert_close(
        network.log_likelihood(words), chain.probabilities(words).log().sum(1)
    )
    # A byte from those on both of its sides, which is Bayes' rule.
    given = {"0": ord("t"), "1": ord("h"), "3": ord(" ")}
    gap = network.query(["2"], given)
    words = torch.tensor([[*b"th", byte, *b" "] for byte in range(256)])
    joint = chain.probabilities(words).prod(1)
    torch.testing.assert_close(gap, joint / joint.sum())
    assert chr(int(gap.argmax())) == "e"
    with pytest.raises(ValueError, match="100,000,000 values together"):
        MarkovModel(order=3).network(5)
    with pytest.raises(ValueError, match="at least 1 variable"):
        chain.network(0)


@pytest.mark.parametrize(
    ("states", "parents", "message"),
    [
        (
            {"a": 2, "b": 2},
            {"a": ("b",), "b": ("a",)},
            "cycle, got '(a' -> 'b' -> 'a|b' -> 'a' -> 'b)'",
        ),
        ({"a": 2}, {"a": ("a",)}, "cycle"),
        ({"a": 2}, {"a": ("b",)}, "no variable 'b'"),
        ({"a": 2}, {"b": ("a",)}, "no variable 'b'"),
        ({"a": 2, "b": 2}, {"a": ("b", "b")}, "named once"),
        ({"a": 0}, {}, "states of 'a' must be an int from 1"),
        ({"a": 2.0}, {}, "states of 'a' must be an int from 1"),
        ({}, {}, "at least 1 variable"),
        ({"a": 10**6, "b": 10**6}, {"a": ("b",)}, "100,000,000 values together"),
    ],
)
def test_config_refuses(states, parents, message):
    with pytest.raises(ValueError, match=message):
        BayesianNetworkConfig(states, parents)


@pytest.mark.parametrize(
    ("variables", "evidence", "message"),
    [
        (["c"], {"b": 1, "a": 0}, "evidence must be possible, got b = 1, a = 0, whose"),
        (["b"], {"a": 1, "c": 0}, "evidence must be possible, got a = 1, c = 0, whose"),
        (["x"], {}, "no variable 'x'"),
        (["a"], {"x": 0}, "no variable 'x'"),
        (["a", "a"], {}, "named once"),
        (["a"], {"a": 0}, "named once"),
        (["a"], {"b": 2}, "'b' must be from 0 to 1, got 2"),
        (["a"], {"b": -1}, "'b' must be from 0 to 1, got -1"),
        ([], {"b": 0}, "at least 1"),
    ],
)
def test_query_refuses(variables, evidence, message):
    config = BayesianNetworkConfig({"a": 2, "b": 2, "c": 2}, {"b": ("a",), "c": ("b",)})
    network = BayesianNetwork(config).fit(torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1]]))
    with pytest.raises(ValueError, match=message):
        network.query(variables, evidence)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.tensor([[0, 2]]), "'b' must be from 0 to 1, got 2 to 2"),
        (torch.tensor([[-1, 0]]), "'a' must be from 0 to 1, got -1 to -1"),
        (torch.tensor([[0]]), r"data must be int64 \[M, 2\]"),
        (torch.tensor([[0.0, 1.0]]), r"data must be int64 \[M, 2\], got torch.float32"),
        (torch.zeros(0, 2, dtype=torch.int64), "at least 1 row"),
    ],
)
def test_fit_refuses(data, message):
    network = BayesianNetwork(BayesianNetworkConfig({"a": 2, "b": 2}))
    with pytest.raises(ValueError, match=message):
        network.fit(data)
    with pytest.raises(ValueError, match=message):
        chow_liu_tree(data, network.config.states)


def test_refuses_other_arguments():
    network = BayesianNetwork(BayesianNetworkConfig({"a": 2}))
    with pytest.raises(ValueError, match="pseudo_count must be >= 0"):
        network.fit(torch.tensor([[0]]), -1)
    with pytest.raises(ValueError, match="count must be >= 1"):
        network.sample(0)
    with pytest.raises(ValueError, match="no variable 'x'"):
        chow_liu_tree(torch.tensor([[0]]), {"a": 2}, "x")
