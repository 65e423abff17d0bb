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

import pytest
import torch

from genkernels.data import InputError, melody, save_audio, save_grid
from genkernels.training import score_votes, write_sheet

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
        score_votes(key, votes)
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
  choices[number === 2 ? 2 : texts.findIndex((text) => text.includes("model"))].click();
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


def test_people_vote_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    pytest.importorskip("scipy.stats", reason="scipy is not installed")
    path = tmp_path / "sheet.html"
    key = write_sheet(path, LEFT, RIGHT)
    path.write_text(path.read_text().removesuffix("</html>\n") + CLICKS)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    result = subprocess.run(
        [browser, *flags, "--dump-dom", path.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    saved = re.search(r'<samp title="votes.json">(.*?)</samp>', result.stdout, re.DOTALL)
    assert saved, result.stderr[-2000:]
    votes = html.unescape(saved[1])
    assert not re.search(r"left|right|model", votes)
    (tmp_path / "votes.json").write_text(votes)
    score = score_votes(tmp_path / "votes.json", key)
    assert (score.left, score.right, score.neither) == (4, 0, 1)
    assert math.isclose(score.share, 1.0)
    assert ">5 of 6</output>" in result.stdout
