"""Dates in words and in ISO 8601."""

from __future__ import annotations

import datetime
import re

import pytest

from genkernels.data import InputError, date_pairs, split_date_pairs
from genkernels.data.dates import _FORMS, _in_words

# Written out by hand, one for each form, in its order.
WRITTEN = [
    ((2026, 11, 27), "Friday, 27 November 2026"),
    ((1998, 5, 3), "Sunday, May 3, 1998"),
    ((2001, 9, 11), "Tue 11 Sep 2001"),
    ((1998, 5, 3), "the 3rd of May 1998"),
    ((2012, 2, 29), "the twenty-ninth of February, 2012"),
    ((1999, 12, 31), "December the thirty-first, 1999"),
    ((2022, 4, 22), "April 22nd, 2022"),
    ((1970, 1, 1), "1 January 1970"),
    ((2068, 10, 12), "Oct 12, 2068"),
    ((2005, 6, 7), "Jun 7, 05"),
    ((1998, 5, 3), "May 3, 98"),
    ((1981, 8, 20), "20-Aug-1981"),
    ((2030, 3, 9), "9.3.2030"),
    ((2000, 7, 4), "04.07.00"),
    ((1969, 1, 13), "1969/01/13"),
]


@pytest.mark.parametrize(("form", "written"), list(zip(_FORMS, WRITTEN, strict=True)))
def test_a_form(form, written):
    date, words = written
    assert _in_words(datetime.date(*date), form) == words


def test_ordinals_of_a_month():
    days = [datetime.date(2024, 1, day) for day in range(1, 32)]
    numbers = " ".join(_in_words(day, "{day_th}") for day in days)
    assert numbers == (
        "1st 2nd 3rd 4th 5th 6th 7th 8th 9th 10th 11th 12th 13th 14th 15th 16th 17th 18th 19th "
        "20th 21st 22nd 23rd 24th 25th 26th 27th 28th 29th 30th 31st"
    )
    words = [_in_words(day, "{ordinal}") for day in days]
    assert len(set(words)) == 31
    assert words[11] == "twelfth"
    assert words[19:21] == ["twentieth", "twenty-first"]


def test_each_text_has_one_reading():
    answers: dict[str, str] = {}
    pairs = date_pairs(30_000, seed=1)
    for words, iso in pairs:
        assert datetime.date.fromisoformat(iso)
        assert answers.setdefault(words, iso) == iso
    shapes = {re.sub(r"[A-Z][a-z]+|[a-z-]{5,}", "a", re.sub(r"\d+", "0", w)) for w, _ in pairs}
    assert len(shapes) > 10, "in several forms"
    years = {iso[:4] for _, iso in pairs}
    assert len(years) == 100
    assert len({year[2:] for year in years}) == 100, "two digits are of one year"


def test_the_same_pairs_for_the_same_seed():
    pairs = date_pairs(50, seed=3)
    assert pairs == date_pairs(50, seed=3)
    assert pairs != date_pairs(50, seed=4)


def test_no_date_is_on_both_sides():
    pairs = date_pairs(20_000)
    training, held_out = split_date_pairs(pairs, 0.1)
    assert sorted(training + held_out) == sorted(pairs)
    assert not {iso for _, iso in training} & {iso for _, iso in held_out}
    dates = {iso for _, iso in pairs}
    assert len({iso for _, iso in held_out}) == len(dates) // 10, "however often each comes"


@pytest.mark.parametrize("count", [0, 1, 5])
def test_refuses_to_hold_out_of_too_few(count):
    with pytest.raises(InputError, match="nothing to hold out"):
        split_date_pairs(date_pairs(count))
