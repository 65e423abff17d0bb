"""`genkernels` with a Bayesian network of a table: its tree, its rows, and what it answers."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import generated, tree

from genkernels.cli import main
from genkernels.data import InputError, load_table
from genkernels.models import BayesianNetwork, BayesianNetworkConfig
from genkernels.training import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS = ["rain", "season", "wet", "coin"]


def cases(count: int) -> list[list[str]]:
    """Rain by the season, wetness by the rain, and a coin."""
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        season = generator.choice(["dry", "rainy", "mild"])
        share = {"dry": 0.1, "mild": 0.4, "rainy": 0.9}[season]
        rain = "yes" if generator.random() < share else "no"
        wet = "very, very" if rain == "yes" and generator.random() < 0.9 else "no"
        rows.append([rain, season, wet, generator.choice(["heads", "tails"])])
    return rows


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tables") / "table.csv", [COLUMNS, *cases(3_000)])


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory) -> tuple[str, str]:
    """A checkpoint, and what its training printed."""
    folder = str(tmp_path_factory.mktemp("runs") / "table")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", "bayesian-network", "--data", str(table), "--output", folder]) == 0
    return folder, printed.getvalue()


def bits(out: str) -> list[float]:
    """Those of the rows, and of independent columns."""
    line = next(line for line in out.splitlines() if line.startswith("bits per row"))
    return [float(figure) for figure in re.findall(r"\d+\.\d{4}", line)]


def test_learns_the_tree(trained, table, capsys):
    folder, printed = trained
    assert "2,700 rows to train on, 300 held out\n" in printed
    assert "4 columns: rain -> season, rain -> wet, " in printed
    model, tokenizer, training = load_checkpoint(folder)
    assert model.name == "bayesian-network"
    assert tokenizer is None
    assert training["values"]["wet"] == ["no", "very, very"]
    assert model.config.parents["season"] == model.config.parents["wet"] == ("rain",)
    assert main(["evaluate", folder]) == 0
    out = capsys.readouterr().out
    assert out in printed
    found, independent = bits(out)
    assert found < independent - 0.5
    assert main(["evaluate", folder, "--data", str(table), "--whole"]) == 0
    data = load_table(table).data
    expected = -model.log_likelihood(data).mean().item() / torch.tensor(2.0).log().item()
    out = capsys.readouterr().out
    assert bits(out) == [pytest.approx(expected, abs=1e-4)]
    assert "rows            3,000\n" in out


def test_answers_what_is_likely(trained, capsys):
    model, _, training = load_checkpoint(trained[0])
    values = training["values"]
    lines = generated(capsys, trained[0], '--prompt="wet=very, very", coin = tails').splitlines()
    assert [line.split()[0] for line in lines] == ["rain", "season"]
    evidence = {"wet": 1, "coin": values["coin"].index("tails")}
    for line in lines:
        name, *shown = line.replace(",", "").split()
        shares = model.query([name], evidence).tolist()
        ranked = sorted(zip(shares, values[name], strict=True), reverse=True)
        assert shown == [word for share, value in ranked for word in (value, f"{share:.2%}")]


def test_draws_rows(trained, table, tmp_path, capsys):
    folder = trained[0]
    drawn = tmp_path / "drawn.csv"
    drawn.write_text(generated(capsys, folder, "--num-samples=2000"))
    data, values = load_table(drawn)
    assert (list(values), len(data)) == (COLUMNS, 2_000)
    assert main(["evaluate", folder, "--data", str(drawn), "--whole"]) == 0
    assert bits(capsys.readouterr().out)[0] == pytest.approx(bits(trained[1])[0], abs=0.15)
    again = generated(capsys, folder, "--num-samples=2000")
    assert again == drawn.read_text()
    assert generated(capsys, folder, "--num-samples=2000", "--seed=1") != again
    assert len(generated(capsys, folder).splitlines()) == 2
    given = generated(capsys, folder, "--num-samples=9", "--prompt=rain=yes")
    assert {row["rain"] for row in csv.DictReader(io.StringIO(given))} == {"yes"}


def test_draws_from_the_posterior():
    """Of an explaining away, against all cases written out."""
    states = {"a": 2, "b": 3, "c": 2, "d": 2, "e": 2}
    parents = {"c": ("a", "b"), "d": ("c",), "e": ("b",)}
    network = BayesianNetwork(BayesianNetworkConfig(states, parents))
    torch.manual_seed(0)
    for entries in network.tables:
        weights = torch.empty_like(entries).exponential_() + 0.05
        entries.copy_(weights / weights.sum(-1, keepdim=True))
    evidence = {"d": 1, "e": 0}
    rows = network.sample(50_000, torch.Generator().manual_seed(0), evidence)
    every = torch.cartesian_prod(*map(torch.arange, states.values()))
    p = network.log_likelihood(every).exp() * (every[:, 3] == 1) * (every[:, 4] == 0)
    p /= p.sum()
    weights = torch.tensor([24, 8, 4, 2, 1])
    frequency = (rows @ weights).bincount(minlength=len(p)) / len(rows)
    assert ((frequency - p).abs() < 5 * (p / len(rows)).sqrt() + 1e-9).all()
    assert torch.equal(network.sample(3, None, dict.fromkeys(states, 1)), torch.ones(3, 5).long())
    network.tables[3][:, 1] = 0
    with pytest.raises(ValueError, match="evidence must be possible, got d = 1, whose"):
        network.sample(3, None, {"d": 1})
    for wrong, message in (({"x": 0}, "no variable 'x'"), ({"a": 2}, "from 0 to 1, got 2")):
        with pytest.raises(ValueError, match=message):
            network.sample(3, None, wrong)


def test_a_structure_that_is_given(table, tmp_path, capsys):
    folder = str(tmp_path / "table")
    train = ["train", "bayesian-network", "--data", str(table), "--output", folder]
    assert main([*train, "--structure=season->rain -> wet, coin->wet", "--pseudo-count=2"]) == 0
    assert "season -> rain, rain and coin -> wet\n" in capsys.readouterr().out
    config = load_checkpoint(folder).model.config
    assert config.parents["wet"] == ("rain", "coin")
    assert main([*train, "--structure="]) == 0
    out = capsys.readouterr().out
    assert "4 columns: independent\n" in out
    found, independent = bits(out)
    assert found == pytest.approx(independent, abs=1e-4)
    assert main([*train[:4], "--dry-run"]) == 0
    assert "180 rows to train on, 20 held out" in capsys.readouterr().out


def test_a_sheet_of_rows(trained, table, tmp_path):
    page = tmp_path / "sheet.html"
    assert main(["evaluate", trained[0], "--human", str(page), "--pairs=4"]) == 0
    items = re.findall(r"<pre>\n(.*?)</pre>", page.read_text(), re.DOTALL)
    assert len(items) == 8
    assert all([line.split(":")[0] for line in item.split("\n")] == COLUMNS for item in items)


def test_columns_are_found_by_their_names(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\ufeff b ,a,other\r\nx, y z,1\r\n\r\nw,y z,2\r\n", encoding="utf-8")
    data, values = load_table(path)
    assert values == {"b": ["w", "x"], "a": ["y z"], "other": ["1", "2"]}
    assert data.tolist() == [[1, 0, 0], [0, 0, 1]]
    data, values = load_table(path, {"a": ["q", "y z"], "b": ["x", "w"]})
    assert data.tolist() == [[1, 0], [1, 1]]
    path.write_text("id,a\n" + "".join(f"{i},x\n" for i in range(10_000)))
    with pytest.raises(InputError, match="10,000 different values of 'id'; expected at most"):
        load_table(path)


TABLES = {
    "ragged": ("a,b\nx,y\nx\n", "line 3: 1 values; expected 2, one for each of a, b"),
    "long": ("a,b\n\nx,y,z\n", "line 3: 3 values; expected 2"),
    "empty": ("a,b\nx,\n", "line 2: no value of 'b'; expected one"),
    "one column": ("a;b\nx;y\n", "line 1: 1 column; expected two or more"),
    "twice": ("a,a\nx,y\n", "line 1: a, a; expected different names"),
    "no name": ("a,\nx,y\n", "line 1: a, ; expected different names"),
    "no rows": ("a,b\n", "no rows in it"),
    "one row": ("a,b\nx,y\n", "1 row; expected at least 2"),
    "quotes": ('a,b\nx,"y\n', "expected CSV"),
    "nothing": ("", "no text in it"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_are_refused(case, tmp_path, capsys):
    content, message = TABLES[case]
    path = tmp_path / "table.csv"
    path.write_text(content)
    train = ["train", "bayesian-network", "--data", str(path), "--output", str(tmp_path / "run")]
    assert main(train) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"genkernels: {path}: ")
    assert message in err
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


TRAIN = ["train", "bayesian-network", "--data={table}", "--output={tmp}/run"]
REFUSED = {
    "order": ([*TRAIN, "--order=2"], "--order: means nothing to a table; expected it with a text"),
    "structure of a text": (
        [*TRAIN[:2], "--structure=a->b"],
        "--structure: means nothing to a text; expected it with a file TABLE.csv",
    ),
    "cycle": ([*TRAIN, "--structure=rain->wet->rain"], "--structure: parents must have no cycle"),
    "unknown": ([*TRAIN, "--structure=rain->fog"], "--structure: 'rain->fog'; expected edges as"),
    "no edge": ([*TRAIN, "--structure=rain"], "--structure: 'rain'; expected edges as"),
    "no preset": ([*TRAIN, "--preset=bytes"], "--preset: unknown 'bytes'; expected one of table"),
    "no column": (["evaluate", "{run}", "--data={tmp}/less.csv"], "less.csv: line 1: no column 'w"),
    "no state": (
        ["evaluate", "{run}", "--data={tmp}/more.csv"],
        "more.csv: line 3: 'maybe' of 'rain'; expected one of no, yes",
    ),
    "a text": (["evaluate", "{run}", "--data={tmp}/x.txt"], "x.txt: is not like what {run} lear"),
    "no name": (
        ["generate", "{run}", "--prompt=fog=no"],
        "--prompt: 'fog=no'; expected NAME=VALUE",
    ),
    "two lines": (["generate", "{run}", "--prompt=rain=no\nwet=no"], "expected NAME=VALUE,NAME"),
    "no value": (["generate", "{run}", "--prompt=rain"], "--prompt: '' of 'rain'; expected one of"),
    "twice": (
        ["generate", "{run}", "--prompt=rain=no,rain=no"],
        "--prompt: 'rain=no'; expected NAME=VALUE, once for each of rain, season",
    ),
    "temperature": (
        ["generate", "{run}", "--temperature=1"],
        "--temperature: means nothing to this",
    ),
    "broken": (["generate", "{tmp}/broken"], "the checkpoint's values are ['rain']; expected"),
    "short": (["generate", "{tmp}/short"], "the checkpoint's values are {{'rain': ['no'], "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, trained, table, tmp_path, capsys):
    rows = cases(20)
    write(tmp_path / "less.csv", [COLUMNS[:2], *(row[:2] for row in rows)])
    write(tmp_path / "more.csv", [COLUMNS, rows[0], ["maybe", *rows[1][1:]], *rows])
    (tmp_path / "x.txt").write_text("a text\n" * 100)
    known = load_checkpoint(trained[0]).training["values"]
    for name, values in (("broken", ["rain"]), ("short", known | {"rain": ["no"]})):
        shutil.copytree(trained[0], tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["training"]["values"] = values
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    before = tree(tmp_path)
    arguments, message = REFUSED[case]
    names = {"tmp": tmp_path, "run": trained[0], "table": table}
    assert main([argument.format(**names) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(**names) in err
    assert tree(tmp_path) == before
