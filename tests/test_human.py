"""The page for a blind comparison, and the count of its votes."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from genkernels.cli import main
from genkernels.data import (
    PROCESSES,
    ByteTokenizer,
    InputError,
    load_image_set,
    load_text,
    melody,
    save_audio,
    save_grid,
)
from genkernels.models import (
    BERT,
    GAN,
    T5,
    BERTConfig,
    GANConfig,
    MarkovModel,
    RecurrentGAN,
    RecurrentGANConfig,
    RNNConfig,
    RNNLanguageModel,
    Seq2Seq,
    Seq2SeqConfig,
    T5Config,
)
from genkernels.training import save_checkpoint, score_votes, write_sheet
from genkernels.training.tasks import gan as gan_task

pytestmark = pytest.mark.usefixtures("one_thread")

LEFT = [f"what the model wrote, number {i}" for i in range(6)]
RIGHT = [f"<b>what</b> people &amp; others wrote\n{i} $pair" for i in range(6)]
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]


def pairs_of(page: str) -> dict[str, list[tuple[str, str]]]:
    """(id, text) of the two items of each pair, in the order of the page."""
    items = re.findall(
        r'<pre>\n(.*?)</pre><label><input type="radio" name="(\w+)" value="(\w+)"', page, re.DOTALL
    )
    pairs: dict[str, list[tuple[str, str]]] = {}
    for text, pair, item in items:
        pairs.setdefault(pair, []).append((item, html.unescape(text)))
    return pairs


def test_a_page_shows_each_pair_and_the_key_tells_which_is_which(tmp_path):
    path = tmp_path / "sheet.html"
    key_path = write_sheet(path, LEFT, RIGHT, seed=5)
    assert key_path == tmp_path / "sheet.key.json"
    key = json.loads(key_path.read_text())
    assert key["seed"] == 5
    pairs = pairs_of(path.read_text())
    assert len(pairs) == 6
    left_first = []
    for pair, items in pairs.items():
        names = [key["pairs"][pair][item] for item, _ in items]
        assert sorted(names) == ["left", "right"]
        index = key["pairs"][pair]["index"]
        for name, (_, text) in zip(names, items, strict=True):
            assert text == {"left": LEFT, "right": RIGHT}[name][index]
        left_first.append(names[0] == "left")
    assert sum(left_first) == 3
    assert [key["pairs"][pair]["index"] for pair in pairs] != list(range(6)), "shuffled"


def test_the_page_does_not_tell_which_is_which(tmp_path):
    """With the texts gone, a page is the same whichever side they came from, but for the ids."""
    pages = []
    for name, (left, right) in {"a": (LEFT, RIGHT), "b": (RIGHT, LEFT)}.items():
        path = tmp_path / f"{name}.html"
        write_sheet(path, left, right)
        page = path.read_text()
        assert not re.search(r"\b(left|right|seed)\b", page.lower())
        page = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
        pages.append(re.sub(r"\b[0-9a-f]{16}\b", "", page))
    assert pages[0] == pages[1]
    ids = re.findall(r"\b[0-9a-f]{16}\b", (tmp_path / "a.html").read_text())
    assert not set(ids) & set(re.findall(r"\b[0-9a-f]{16}\b", (tmp_path / "b.html").read_text()))


def test_headings_stand_above_their_pairs(tmp_path):
    headings = [f"given <{i}>" if i % 2 else "" for i in range(6)]
    key = write_sheet(tmp_path / "sheet.html", LEFT, RIGHT, headings=headings, names=("a", "b"))
    record = json.loads(key.read_text())
    assert record["names"] == ["a", "b"]
    parts = (tmp_path / "sheet.html").read_text().split("<fieldset>")[1:]
    for names, part in zip(record["pairs"].values(), parts, strict=True):
        i = names["index"]
        assert html.escape(LEFT[i]) in part
        shown = re.findall(r"<blockquote>(.*?)</blockquote>", part)
        assert shown == ([f"given &lt;{i}&gt;"] if i % 2 else [])
    with pytest.raises(ValueError, match="headings must be as many as pairs, 6, got 1"):
        write_sheet(tmp_path / "sheet.html", LEFT, RIGHT, headings=["a"])


def test_only_a_sheet_is_replaced(tmp_path):
    path, key = tmp_path / "sheet.html", tmp_path / "sheet.key.json"
    write_sheet(path, LEFT, RIGHT)
    write_sheet(path, LEFT, RIGHT, seed=1)
    assert json.loads(key.read_text())["seed"] == 1
    page = path.read_text()
    record = json.loads(key.read_text())
    votes = json.dumps({k: record[k] for k in ("format", "sheet")} | {"votes": {}}, indent=2)
    for file, content in ((path, "<!DOCTYPE html>\n<html>"), (key, "{}"), (key, votes)):
        before = file.read_text()
        file.write_text(content)
        with pytest.raises(InputError, match=f"{file} is a file of another kind; expected a sheet"):
            write_sheet(path, RIGHT, LEFT)
        assert file.read_text() == content
        file.write_text(before)
    assert path.read_text() == page
    key.unlink()
    key.mkdir()
    for name, message in (
        ("sheet.html", "key.json is a folder; expected a sheet's key"),
        ("sheet.txt", "no name of a page; expected one that ends in .html"),
        ("none/sheet.html", "cannot write there"),
    ):
        with pytest.raises(InputError, match=message):
            write_sheet(tmp_path / name, RIGHT, LEFT)
    assert path.read_text() == page


def test_the_same_sheet_for_the_same_seed(tmp_path):
    paths = [tmp_path / name for name in ("a.html", "b.html", "c.html")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write_sheet(path, LEFT, RIGHT, seed=seed)
    a, b, c = (path.read_text() for path in paths)
    assert a == b
    assert list(pairs_of(a)) != list(pairs_of(c))
    assert len(list(tmp_path.iterdir())) == 6, "no temporary file is left"


def png(value: int) -> bytes:
    file = io.BytesIO()
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    image.new("L", (2, 2), value).save(file, "PNG")
    return file.getvalue()


def test_images_and_sounds_are_in_the_page(tmp_path):
    save_audio(tmp_path / "a.wav", melody(0.01))
    save_audio(tmp_path / "b.wav", melody(0.01, seed=1))
    save_grid(tmp_path / "a.png", torch.zeros(1, 1, 2, 2))
    for kind, suffix in (("image", "png"), ("audio", "wav")):
        items = [(tmp_path / f"a.{suffix}").read_bytes(), png(9)]
        if kind == "audio":
            items[1] = (tmp_path / "b.wav").read_bytes()
        write_sheet(tmp_path / "sheet.html", items[:1], items[1:], kind)
        page = (tmp_path / "sheet.html").read_text()
        encoded = re.findall(rf'src="data:{kind}/{suffix};base64,(.*?)"', page)
        assert sorted(map(base64.b64decode, encoded)) == sorted(items)


@pytest.mark.parametrize(
    ("left", "right", "kind", "error", "message"),
    [
        (["a"], ["b", "c"], "text", ValueError, "as many"),
        ([], [], "text", ValueError, "as many"),
        (["a"], ["b"], "video", ValueError, "kind"),
        (["a"], [b"b"], "text", InputError, r"right\[0\]: bytes; expected a text"),
        ([b"GIF89a"], [b"\x89PNG\r\n\x1a\n"], "image", InputError, r"left\[0\]: not a PNG file"),
        ([b"RIFF"], ["RIFF"], "audio", InputError, r"right\[0\]: not a WAV file"),
    ],
)
def test_a_sheet_refuses(tmp_path, left, right, kind, error, message):
    with pytest.raises(error, match=message):
        write_sheet(tmp_path / "sheet.html", left, right, kind)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def sheet(tmp_path):
    """A key, and what writes votes: how many are for the left ones, and how many for neither."""
    key = write_sheet(tmp_path / "sheet.html", [*map(str, range(50))], [*map(str, range(50))])
    record = json.loads(key.read_text())

    def vote(left: int, right: int, neither: int = 0):
        wanted = ["left"] * left + ["right"] * right + [""] * neither
        votes = {}
        for name, (pair, names) in zip(wanted, record["pairs"].items(), strict=False):
            ids = {value: item for item, value in names.items() if item != "index"}
            votes[pair] = ids.get(name, "")
        path = tmp_path / "votes.json"
        path.write_text(json.dumps({k: record[k] for k in ("format", "sheet")} | {"votes": votes}))
        return path

    return key, vote


@pytest.mark.parametrize(
    ("left", "right", "neither"), [(30, 15, 5), (7, 3, 0), (12, 0, 0), (0, 1, 0)]
)
def test_votes_are_counted(sheet, left, right, neither):
    """The interval is the roots p of |left / n - p| = z sqrt(p (1 - p) / n)."""
    pytest.importorskip("scipy.stats", reason="scipy is not installed")
    key, vote = sheet
    result = score_votes(vote(left, right, neither), key)
    assert (result.left, result.right, result.neither) == (left, right, neither)
    n, z = left + right, 1.959963984540054
    assert result.share == left / n
    for p in (result.low, result.high):
        assert (left / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-12)
    assert result.low <= result.share <= result.high
    assert result.low < result.high
    assert result.seed == 0


def test_scoring_refuses(sheet, tmp_path):
    key, vote = sheet
    for counts in ((0, 0), (0, 0, 3)):
        with pytest.raises(InputError, match="no vote that prefers one"):
            score_votes(vote(*counts), key)
    votes = vote(3, 2)
    answer = json.loads(votes.read_text())
    first = next(iter(answer["votes"]))

    def refused(message, **changes):
        votes.write_text(json.dumps(answer | changes))
        with pytest.raises(InputError, match=message) as error:
            score_votes(votes, key)
        assert str(votes) in str(error.value)

    refused("votes on sheet 'x'", sheet="x")
    refused("expected ids", votes={first: "x"})
    refused("expected ids", votes={first: "index"})
    refused("expected ids", votes={"x": ""})
    for changes in ({"format": "x"}, {"sheet": 1}, {"votes": []}, {"votes": {first: []}}):
        refused("expected a file of votes", **changes)
    with pytest.raises(InputError, match="expected a file of votes"):
        score_votes(key, key)
    with pytest.raises(InputError, match="expected a file of pairs"):
        score_votes(votes, votes)
    votes.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        score_votes(votes, key)
    with pytest.raises(InputError, match="No such file"):
        score_votes(tmp_path / "none.json", key)


# Chooses by what is seen: the second pair is left out, of the third neither is preferred, and else
# it is what the model wrote. Then presses the button, and puts what is saved where it can be read.
CLICKS = """
<script>
document.querySelectorAll("fieldset").forEach((pair, number) => {
  const choices = [...pair.querySelectorAll("input")];
  const texts = [...pair.querySelectorAll("pre")].map((text) => text.textContent);
  if (number === 1) return;
  choices[number === 2 ? 2 : texts.findIndex((text) => CHOSEN)].click();
});
document.addEventListener("click", (event) => {
  if (!event.target.download) return;
  event.preventDefault();
  const saved = document.createElement("samp");
  saved.title = event.target.download;
  saved.textContent = decodeURIComponent(event.target.href.split(",").slice(1).join(","));
  document.body.append(saved);
}, true);
document.querySelector("button").click();
</script>
</html>
"""


def vote_in_a_browser(path: Path, chosen: str) -> tuple[str, str]:
    """Vote for the text for which `chosen` holds, in JavaScript; the votes, and the page then."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    clicked = path.with_name("clicked.html")
    clicks = CLICKS.replace("CHOSEN", chosen)
    clicked.write_text(path.read_text().removesuffix("</html>\n") + clicks)
    user = f"--user-data-dir={path.with_name('user')}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", user]
    result = subprocess.run(
        [browser, *flags, "--dump-dom", clicked.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    saved = re.search(r'<samp title="votes.json">(.*?)</samp>', result.stdout, re.DOTALL)
    assert saved, result.stderr[-2000:]
    return html.unescape(saved[1]), result.stdout


def test_people_vote_in_a_browser(tmp_path):
    pytest.importorskip("scipy.stats", reason="scipy is not installed")
    path = tmp_path / "sheet.html"
    key = write_sheet(path, LEFT, RIGHT)
    votes, page = vote_in_a_browser(path, 'text.includes("model")')
    assert not re.search(r"left|right|model", votes)
    (tmp_path / "votes.json").write_text(votes)
    score = score_votes(tmp_path / "votes.json", key)
    assert (score.left, score.right, score.neither) == (4, 0, 1)
    assert math.isclose(score.share, 1.0)
    assert ">5 of 6</output>" in page


def test_a_model_is_trained_voted_on_and_scored(tmp_path, capsys):
    """Voters who know the text: what the model wrote is preferred never."""
    pytest.importorskip("scipy.stats", reason="scipy is not installed")
    data, run, page = tmp_path / "notes.txt", str(tmp_path / "run"), tmp_path / "sheet.html"
    data.write_text(load_text()[:30_000])
    train = ["train", "bayesian-network", "--data", str(data), "--order=1", "--output", run]
    assert main(train) == 0
    assert main(["evaluate", run, "--human", str(page), "--pairs=9"]) == 0
    out = capsys.readouterr().out
    assert f"{page}: 9 pairs of continued texts, {run} and {data}, held out\n" in out
    chosen = f"{json.dumps(data.read_text()).replace('</', '<' + chr(92) + '/')}.includes(text)"
    votes, _ = vote_in_a_browser(page, chosen)
    (tmp_path / "votes.json").write_text(votes)
    key = out.split("genkernels score votes.json --key ")[1].strip()
    assert main(["score", str(tmp_path / "votes.json"), "--key", key]) == 0
    out = capsys.readouterr().out
    assert f"preferred       {run}: 0.0%, 95% interval 0.0% to 35.4%\n" in out
    assert f"0 for {run}, 7 for {data}, held out, 1 for neither\n" in out
    assert f"50% is not in the interval: {data}, held out is preferred\n" in out


def test_votes_are_pooled(sheet, tmp_path, capsys):
    pytest.importorskip("scipy.stats", reason="scipy is not installed")
    key, vote = sheet
    files = []
    for number, counts in enumerate([(30, 15, 5), (20, 5), (0, 4)]):
        files.append(str(vote(*counts).rename(tmp_path / f"votes-{number}.json")))
    result = score_votes(files, key)
    assert (result.left, result.right, result.neither) == (50, 24, 5)
    assert main(["score", *files, "--key", str(key)]) == 0
    assert capsys.readouterr().out == (
        "preferred       left: 67.6%, 95% interval 56.3% to 77.1%\n"
        "votes           50 for left, 24 for right, 5 for neither\n"
        "result          50% is not in the interval: left is preferred\n"
    )
    assert main(["score", files[2], "--key", str(key)]) == 0
    assert "50% is not in the interval: right is preferred\n" in capsys.readouterr().out
    assert main(["score", str(vote(3, 1)), "--key", str(key)]) == 0
    assert "50% is in the interval: it does not tell" in capsys.readouterr().out
    for arguments, message in (
        ([files[0], str(tmp_path / ".." / tmp_path.name / "votes-0.json")], "is there twice"),
        ([files[0], str(tmp_path / "none.json")], "none.json: No such file"),
        ([str(key)], "expected a file of votes"),
    ):
        assert main(["score", *arguments, "--key", str(key)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert main(["score", files[0]]) == 2
    assert "Missing option '--key'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Checkpoints of models that know nothing, and what they would have learned from."""
    folder = tmp_path_factory.mktemp("runs")
    notes, pairs = folder / "notes.txt", folder / "pairs.tsv"
    notes.write_text(load_text()[:30_000])
    pairs.write_text("".join(f"source {i}\ttarget {i}\n" for i in range(100)))
    series, digits = "synthetic series", "digits"
    torch.manual_seed(0)
    for name, model, training in (
        ("rnn", RNNLanguageModel(RNNConfig(256, 8, 16)), {"data": str(notes)}),
        ("markov", MarkovModel(1), {"data": str(notes)}),
        ("bert", BERT(BERTConfig(256, 32, 1, 2, 16)), {"data": str(notes)}),
        ("t5", T5(T5Config(256, 1, 2, 16, 32)), {"data": str(notes), "length": 40}),
        ("t5-pairs", T5(T5Config(256, 1, 2, 16, 32)), {"data": str(pairs), "length": 16}),
        ("seq2seq", Seq2Seq(Seq2SeqConfig(256, 8, 16)), {"data": str(pairs), "length": 16}),
        (
            "gan",
            GAN(GANConfig(image_size=8, width=4, num_heads=2, latent_dim=8, num_classes=10)),
            {"data": digits, "labels": list("0123456789")},
        ),
        (
            "letters",
            GAN(GANConfig(image_size=8, width=4, num_heads=2, latent_dim=8, num_classes=2)),
            {"data": digits, "labels": ["a", "b"]},
        ),
        (
            "recurrent-gan",
            RecurrentGAN(RecurrentGANConfig(length=8, latent_dim=4, hidden_size=8, num_classes=3)),
            {"data": series, "labels": list(PROCESSES)},
        ),
    ):
        (folder / name).mkdir()
        tokenizer = None if "labels" in training else ByteTokenizer()
        save_checkpoint(folder / name, model, tokenizer, training)
    return folder


def sheet_of(runs: Path, page: Path, model: str, *options: str) -> list[tuple[str, str, str]]:
    """(heading, left, right) of each pair of the page that the command wrote."""
    assert main(["evaluate", str(runs / model), "--human", str(page), *options]) == 0
    key = json.loads(page.with_suffix(".key.json").read_text())
    found = []
    for part in page.read_text().split("<fieldset>")[1:]:
        heading = re.search(r"<blockquote>(.*?)</blockquote>", part, re.DOTALL)
        items = re.findall(
            r'(?:<pre>\n(.*?)</pre>|src="data:image/png;base64,(.*?)">)'
            r'<label><input type="radio" name="(\w+)" value="(\w+)"',
            part,
            re.DOTALL,
        )
        sides = {key["pairs"][pair][id]: html.unescape(a or b) for a, b, pair, id in items}
        found.append((html.unescape(heading[1]), sides["left"], sides["right"]))
    return found


def test_a_sheet_of_texts(runs, tmp_path):
    text = (runs / "notes.txt").read_text()
    pairs = sheet_of(runs, tmp_path / "a.html", "rnn", "--pairs=8")
    assert len(pairs) == len(set(pairs)) == 8
    for given, made, real in pairs:
        assert text.index(given + real) > 0.89 * len(text), "held out"
        assert given + made not in text
        assert len(given) <= 100
        assert len(given + real) == 300
        assert 150 < len(made) <= len(real)
    assert sum(real.startswith(" ") for *_, real in pairs) > 4, "words are whole"
    first = (tmp_path / "a.html").read_bytes()
    assert sheet_of(runs, tmp_path / "b.html", "rnn", "--pairs=8") == pairs
    assert (tmp_path / "b.html").read_bytes() == first
    others = sheet_of(runs, tmp_path / "b.html", "rnn", "--pairs=9", "--seed=1")  # all there are
    made_of = {given: made for given, made, _ in others}
    assert all(made_of[given] != made for given, made, _ in pairs)
    whole = sheet_of(runs, tmp_path / "b.html", "rnn", "--pairs=12", "--whole")
    assert min(text.index(given + real) for given, _, real in whole) < 0.5 * len(text)
    against = ["--against", str(runs / "markov"), "--pairs=8"]
    both = {given: rest for given, *rest in sheet_of(runs, tmp_path / "c.html", "rnn", *against)}
    for given, made, real in pairs:
        left, right = both[given]
        assert left == made
        assert right not in (made, real)
    names = json.loads((tmp_path / "c.key.json").read_text())["names"]
    assert names == [str(runs / "rnn"), str(runs / "markov")]


def test_a_sheet_of_answers(runs, tmp_path):
    rows = dict(line.split("\t") for line in (runs / "pairs.tsv").read_text().splitlines())
    pairs = sheet_of(runs, tmp_path / "a.html", "seq2seq", "--pairs=9")
    assert all(rows[source] == target != answer for source, answer, target in pairs)
    against = ["--against", str(runs / "t5-pairs"), "--pairs=9"]
    both = sheet_of(runs, tmp_path / "a.html", "seq2seq", *against)
    assert sorted(pair[:2] for pair in both) == sorted(pair[:2] for pair in pairs)
    text = (runs / "notes.txt").read_text()
    for source, answer, target in sheet_of(runs, tmp_path / "a.html", "t5", "--pairs=9"):
        assert source.count("<extra_id_") == 2
        assert target in text
        assert source not in text
        assert source.split("<extra_id_0>")[0] == answer[: source.index("<extra_id_0>")]


def test_spans_are_put_where_they_were_cut_out():
    from genkernels.training.tasks.t5 import _restored

    source = "a <extra_id_0> c <extra_id_1> e <extra_id_2>"
    assert _restored(source, "x<extra_id_1>d<extra_id_0>b <f>") == "a b <f> c d e <extra_id_2>"
    assert _restored(source, "") == source


def test_a_sheet_of_pictures(runs, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    digits = load_image_set("digits")
    for label, made, real in sheet_of(runs, tmp_path / "a.html", "gan", "--pairs=5"):
        pictures = [image.open(io.BytesIO(base64.b64decode(x))) for x in (made, real)]
        assert {picture.size for picture in pictures} == {(10, 10)}
        shown, drawn = (
            torch.tensor(list(p.crop((1, 1, 9, 9)).tobytes())).view(8, 8) for p in pictures[::-1]
        )
        of_label = digits.images[digits.labels == int(label), 0]
        assert (of_label == shown).flatten(1).all(1).any()
        assert not (of_label == drawn).flatten(1).all(1).any()
    monkeypatch.setattr(gan_task, "_HELD_OUT_SERIES", 300)
    series = sheet_of(runs, tmp_path / "a.html", "recurrent-gan", "--pairs=5")
    assert {label for label, *_ in series} <= set(PROCESSES)
    for _, made, real in series:
        assert made != real
        assert all(base64.b64decode(x).startswith(b"\x89PNG") for x in (made, real))


REFUSED = {
    "bert": ("bert", [], "{runs}/bert: a bert makes nothing that people could judge"),
    "another kind": ("rnn", ["--against={runs}/gan"], "--against: {runs}/gan makes images;"),
    "answers of spans": ("t5", ["--against={runs}/seq2seq"], "makes answers; expected restored"),
    "other classes": ("gan", ["--against={runs}/letters"], "letters: a model of a, b draws no"),
    "no checkpoint": ("rnn", ["--against={runs}/none"], "{runs}/none/config.json: No such file"),
    "few": ("rnn", ["--pairs=99"], "notes.txt: 9 examples to show; expected at least --pairs 99"),
    "no pairs": ("rnn", ["--pairs=0"], "'--pairs'"),
    "other data": ("t5", ["--data={runs}/pairs.tsv"], "pairs.tsv: is not like what {runs}/t5"),
    "no page": ("rnn", ["--human={tmp}/x.png"], "--human: {tmp}/x.png is no name of a page"),
    "another file": ("rnn", ["--human={tmp}/mine.html"], "--human: {tmp}/mine.html is a file of"),
    "pairs of none": ("rnn", None, "--pairs: is of a page; expected it with --human"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_evaluate_refuses(case, runs, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("<!DOCTYPE html><p>mine")
    model, options, message = REFUSED[case]
    names = {"runs": runs, "tmp": tmp_path}
    arguments = [option.format(**names) for option in options or ["--pairs=2"]]
    if options is not None and not any("--human" in option for option in options):
        arguments += ["--human", str(tmp_path / "sheet.html")]
    assert main(["evaluate", str(runs / model), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("genkernels: ")
    assert err.count("\n") == 1
    assert message.format(**names) in err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.html"]
    assert (tmp_path / "mine.html").read_text() == "<!DOCTYPE html><p>mine"
