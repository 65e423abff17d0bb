"""A blind comparison by people: a page that shows pairs, and the count of their votes."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

from ..data import InputError, check_kind, replace_file
from ..data.errors import import_library

Kind = Literal["text", "image", "audio"]

SUFFIX = ".html"
_FORMAT = "genkernels-votes-1"
# How each kind of file begins, and how a page shows it. One format a kind: two would tell.
_FILES: dict[str, tuple[bytes, str, str]] = {
    "image": (b"\x89PNG\r\n\x1a\n", "a PNG file", '<img alt="" src="data:image/png;base64,{}">'),
    "audio": (b"RIFF", "a WAV file", '<audio controls src="data:audio/wav;base64,{}"></audio>'),
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which do you prefer?</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
fieldset { margin: 0 0 2rem; border: 1px solid #999 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
blockquote { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 1rem; font-style: italic }
img { width: 100%; image-rendering: pixelated }
audio { width: 100% }
label { display: block; padding: .5rem }
</style>
<h1>Which do you prefer?</h1>
<p>Choose one of each pair, then save your votes. Pairs without a choice do not count. What stands
above a pair was given to both.</p>
<form id="sheet" data-sheet="$sheet">
$pairs
<button type="submit">Save the votes</button> <output>0 of $count</output>
</form>
<script>
const form = document.getElementById("sheet");
const votes = () => Object.fromEntries(new FormData(form));
form.addEventListener("change", () => {
  form.querySelector("output").value = Object.keys(votes()).length + " of $count";
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const answer = { format: "$format", sheet: form.dataset.sheet, votes: votes() };
  const link = document.createElement("a");
  link.download = "votes.json";
  link.href = "data:application/json," + encodeURIComponent(JSON.stringify(answer, null, 2));
  document.body.append(link);
  link.click();
  link.remove();
});
</script>
</html>
""")

_PAIR = Template("""<fieldset>
<legend>Pair $number</legend>
$heading<div class="pair">
<div>$a<label><input type="radio" name="$pair" value="$id_a"> this one</label></div>
<div>$b<label><input type="radio" name="$pair" value="$id_b"> this one</label></div>
</div>
<label><input type="radio" name="$pair" value=""> no preference</label>
</fieldset>""")

# Nothing but a sheet, and its key, begins so.
_PAGE_BEGIN = _PAGE.template[: _PAGE.template.index("<style>")].encode()
_KEY_BEGIN = f'{{\n  "format": "{_FORMAT}",\n  "kind": '.encode()


class Preference(NamedTuple):
    """How often the left one of a pair was preferred.

    share: of the votes that preferred one.
    low, high: the 95% interval of the share.
    left, right, neither: the votes.
    names: what the left ones and the right ones are.
    seed: of the sheet.
    """

    share: float
    low: float
    high: float
    left: int
    right: int
    neither: int
    names: tuple[str, str]
    seed: int


def write_sheet(
    path: str | os.PathLike[str],
    left: Sequence[bytes | str],
    right: Sequence[bytes | str],
    kind: Kind = "text",
    seed: int = 0,
    headings: Sequence[str] | None = None,
    names: tuple[str, str] = ("left", "right"),
) -> Path:
    """Write a page on which people choose between left[i] and right[i], and return its key's path.

    The page is one HTML file that needs nothing else. Pairs come in random order, and each of the
    two stands on the left in half of them; ids are random, so that neither the page nor the votes
    that it saves tell which is which. That, the names and the seed are in the key, NAME.key.json
    beside NAME.html, which those who vote must not get. The same arguments make the same files.

    Args:
        left, right: texts of kind "text", else the content of PNG or WAV files. They should differ
            in nothing that gives them away: size, length, loudness.
        headings: a text above each pair, where it is not empty.
        names: what the left ones and the right ones are.

    Raises:
        ValueError: sequences of different lengths, or empty ones; another kind.
        InputError: an item that is not of that kind (names it), or what `check_sheet` raises.
        OSError: a file cannot be written.
    """
    path, key_path = check_sheet(path)
    if kind != "text" and kind not in _FILES:
        raise ValueError(f"kind must be 'text', 'image' or 'audio', got {kind!r}")
    if len(left) != len(right) or not left:
        raise ValueError(f"left and right must be as many, not none, got {len(left)}, {len(right)}")
    headings = [""] * len(left) if headings is None else headings
    if len(headings) != len(left):
        raise ValueError(f"headings must be as many as pairs, {len(left)}, got {len(headings)}")
    above = [f"<blockquote>{html.escape(text)}</blockquote>\n" if text else "" for text in headings]
    shown = {
        name: [_shown(item, kind, f"{name}[{index}]") for index, item in enumerate(items)]
        for name, items in (("left", left), ("right", right))
    }
    # Ids are of the content too: votes on one sheet are no votes on another of the same seed.
    digest = hashlib.sha256(json.dumps([seed, shown, above]).encode()).hexdigest()
    generator = random.Random(digest)
    sheet = _opaque(generator)
    order = list(range(len(left)))
    generator.shuffle(order)
    is_swapped = [index % 2 == 1 for index in range(len(left))]
    generator.shuffle(is_swapped)
    pairs, key = [], {}
    for number, (index, swap) in enumerate(zip(order, is_swapped, strict=True), start=1):
        pair, *ids = (_opaque(generator) for _ in range(3))
        sides = ["right", "left"] if swap else ["left", "right"]
        a, b = (shown[side][index] for side in sides)
        values = {"heading": above[index], "a": a, "b": b, "id_a": ids[0], "id_b": ids[1]}
        pairs.append(_PAIR.substitute(values, number=number, pair=pair))
        key[pair] = {"index": index, **dict(zip(ids, sides, strict=True))}
    page = _PAGE.substitute(format=_FORMAT, sheet=sheet, pairs="\n".join(pairs), count=len(pairs))
    record = {"format": _FORMAT, "kind": kind, "sheet": sheet, "seed": seed}
    record |= {"names": names, "pairs": key}
    with replace_file(path) as new_page, replace_file(key_path) as new_key:
        new_page.write_text(page, encoding="utf-8")
        new_key.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return key_path


def check_sheet(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the paths of a sheet and its key, where both can be written or replaced.

    Raises:
        InputError: a name that does not end in .html, no folder that can be written to, or another
            file in the place of one of them.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"{path} is no name of a page; expected one that ends in {SUFFIX}")
    key_path = path.with_suffix(".key.json")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot write there; expected it in a folder that can be written")
    for file, begin, expected in (
        (path, _PAGE_BEGIN, "a sheet"),
        (key_path, _KEY_BEGIN, "a sheet's key"),
    ):
        if file.is_dir():
            raise InputError(f"{file} is a folder; expected {expected}, or none")
        check_kind(file, re.escape(begin), expected)
    return path, key_path


def _opaque(generator: random.Random) -> str:
    return f"{generator.getrandbits(64):016x}"


def _shown(item: bytes | str, kind: Kind, name: str) -> str:
    if kind == "text":
        if not isinstance(item, str):
            raise InputError(f"{name}: {type(item).__name__}; expected a text")
        return f"<pre>\n{html.escape(item)}</pre>"  # a first line end is not shown
    begin, expected, element = _FILES[kind]
    if not isinstance(item, bytes) or not item.startswith(begin):
        raise InputError(f"{name}: not {expected}; expected the content of {expected}")
    return element.format(base64.b64encode(item).decode())


def score_votes(
    votes: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], key: str | os.PathLike[str]
) -> Preference:
    """Count the votes that a page saved, by the key that `write_sheet` wrote; those of several
    files together.

    The interval is Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209), from
    scipy. It takes each vote for one of its own, those of several people on one pair too.

    Raises:
        ValueError: no files.
        InputError: a file that cannot be read or is broken, or is there twice, votes on another
            sheet, or no vote that prefers one.
    """
    files = [Path(file) for file in ([votes] if isinstance(votes, (str, os.PathLike)) else votes)]
    if not files:
        raise ValueError("votes must be at least one file, got none")
    record = _read(Path(key), "pairs", dict)
    counts = {"left": 0, "right": 0, "": 0}
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise InputError(f"{file}: is there twice; expected the votes of each once")
        answer = _read(file, "votes", str)
        if answer["sheet"] != record["sheet"]:
            raise InputError(
                f"{file}: votes on sheet {answer['sheet']!r}; expected {record['sheet']!r} by {key}"
            )
        for pair, choice in answer["votes"].items():
            sides = record["pairs"].get(pair, {})
            chosen = sides.get(choice) if choice else ""
            if not sides or chosen not in [*counts]:  # a broken key may hold anything
                raise InputError(f"{file}: {choice!r} of pair {pair!r}; expected ids of {key}")
            counts[chosen] += 1
    left, right, neither = counts.values()
    if not left + right:
        where = ", ".join(map(str, files))
        raise InputError(f"{where}: no vote that prefers one; expected at least one")
    test = import_library("scipy.stats", "scipy").binomtest(left, left + right)
    low, high = map(float, test.proportion_ci(0.95, method="wilson"))
    first, second = record["names"]
    share = left / (left + right)
    return Preference(share, low, high, left, right, neither, (first, second), record["seed"])


def _read(path: Path, field: str, kind: type) -> dict[str, Any]:
    """Read votes or a key, whose `field` holds values of one kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a file of {field}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not JSON ({error})") from error
    if (
        not isinstance(found, dict)
        or found.get("format") != _FORMAT
        or not isinstance(found.get("sheet"), str)
        or not isinstance(found.get(field), dict)
        or not all(isinstance(value, kind) for value in found[field].values())
        or (kind is dict and not _is_key(found))
    ):
        raise InputError(f"{path}: not what a sheet goes with; expected a file of {field}")
    return found


def _is_key(found: dict[str, Any]) -> bool:
    names = found.get("names")
    is_named = isinstance(names, list) and list(map(type, names)) == [str, str]
    return is_named and type(found.get("seed")) is int
