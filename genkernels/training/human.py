"""A blind comparison by people: a page that shows pairs, and the count of their votes."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

from ..data import InputError, replace_file
from ..data.errors import import_library

Kind = Literal["text", "image", "audio"]

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
img { width: 100%; image-rendering: pixelated }
audio { width: 100% }
label { display: block; padding: .5rem }
</style>
<h1>Which do you prefer?</h1>
<p>Choose one of each pair, then save your votes. Pairs without a choice do not count.</p>
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
<div class="pair">
<div>$a<label><input type="radio" name="$pair" value="$id_a"> this one</label></div>
<div>$b<label><input type="radio" name="$pair" value="$id_b"> this one</label></div>
</div>
<label><input type="radio" name="$pair" value=""> no preference</label>
</fieldset>""")


class Preference(NamedTuple):
    """How often the left one of a pair was preferred.

    share: of the votes that preferred one.
    low, high: the 95% interval of the share.
    left, right, neither: the votes.
    seed: of the sheet.
    """

    share: float
    low: float
    high: float
    left: int
    right: int
    neither: int
    seed: int


def write_sheet(
    path: str | os.PathLike[str],
    left: Sequence[bytes | str],
    right: Sequence[bytes | str],
    kind: Kind = "text",
    seed: int = 0,
) -> Path:
    """Write a page on which people choose between left[i] and right[i], and return its key's path.

    The page is one HTML file that needs nothing else. Pairs come in random order, and each of the
    two stands on the left in half of them; ids are random, so that neither the page nor the votes
    that it saves tell which is which. That, and the seed, is in the key, PATH.key.json beside it,
    which those who vote must not get. The same arguments make the same files.

    Args:
        left, right: texts of kind "text", else the content of PNG or WAV files. They should differ
            in nothing that gives them away: size, length, loudness.

    Raises:
        ValueError: sequences of different lengths, or empty ones; another kind.
        InputError: an item that is not of that kind (names it).
        OSError: a file cannot be written.
    """
    path = Path(path)
    if kind != "text" and kind not in _FILES:
        raise ValueError(f"kind must be 'text', 'image' or 'audio', got {kind!r}")
    if len(left) != len(right) or not left:
        raise ValueError(f"left and right must be as many, not none, got {len(left)}, {len(right)}")
    shown = {
        name: [_shown(item, kind, f"{name}[{index}]") for index, item in enumerate(items)]
        for name, items in (("left", left), ("right", right))
    }
    # Ids are of the content too: votes on one sheet are no votes on another of the same seed.
    digest = hashlib.sha256(json.dumps([seed, shown]).encode()).hexdigest()
    generator = random.Random(digest)
    sheet = _opaque(generator)
    order = list(range(len(left)))
    generator.shuffle(order)
    is_swapped = [index % 2 == 1 for index in range(len(left))]
    generator.shuffle(is_swapped)
    pairs, key = [], {}
    for number, (index, swap) in enumerate(zip(order, is_swapped, strict=True), start=1):
        pair, *ids = (_opaque(generator) for _ in range(3))
        names = ["right", "left"] if swap else ["left", "right"]
        a, b = (shown[name][index] for name in names)
        pairs.append(_PAIR.substitute(number=number, pair=pair, a=a, b=b, id_a=ids[0], id_b=ids[1]))
        key[pair] = {"index": index, **dict(zip(ids, names, strict=True))}
    page = _PAGE.substitute(format=_FORMAT, sheet=sheet, pairs="\n".join(pairs), count=len(pairs))
    record = {"format": _FORMAT, "sheet": sheet, "kind": kind, "seed": seed, "pairs": key}
    key_path = path.with_suffix(".key.json")
    with replace_file(key_path) as new_key, replace_file(path) as new_page:
        new_page.write_text(page, encoding="utf-8")
        new_key.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return key_path


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


def score_votes(votes: str | os.PathLike[str], key: str | os.PathLike[str]) -> Preference:
    """Count the votes that a page saved, by the key that `write_sheet` wrote.

    The interval is Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209), from
    scipy.

    Raises:
        InputError: a file that cannot be read or is broken, votes on another sheet, or no vote that
            prefers one.
    """
    answer, record = _read(Path(votes), "votes", str), _read(Path(key), "pairs", dict)
    if answer["sheet"] != record["sheet"]:
        raise InputError(
            f"{votes}: votes on sheet {answer['sheet']!r}; expected {record['sheet']!r} by {key}"
        )
    counts = {"left": 0, "right": 0, "": 0}
    for pair, choice in answer["votes"].items():
        names = record["pairs"].get(pair, {})
        chosen = names.get(choice) if choice else ""
        if not names or chosen not in counts:
            raise InputError(f"{votes}: {choice!r} of pair {pair!r}; expected ids of {key}")
        counts[chosen] += 1
    left, right, neither = counts.values()
    if not left + right:
        raise InputError(f"{votes}: no vote that prefers one; expected at least one")
    test = import_library("scipy.stats", "scipy").binomtest(left, left + right)
    low, high = test.proportion_ci(0.95, method="wilson")
    return Preference(
        left / (left + right), float(low), float(high), left, right, neither, record["seed"]
    )


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
        or (kind is dict and type(found.get("seed")) is not int)
    ):
        raise InputError(f"{path}: not what a sheet goes with; expected a file of {field}")
    return found
