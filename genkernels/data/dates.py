"""Dates as people write them, and as ISO 8601 does: pairs that cost no download."""

from __future__ import annotations

import datetime
import random

from .errors import InputError

# A century to the day, so that two digits of a year name one: POSIX reads 69 to 99 as 19xx.
FIRST_DATE = datetime.date(1969, 1, 1)
LAST_DATE = datetime.date(2068, 12, 31)

# Not calendar's names, which follow the locale.
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = ["January", "February", "March", "April", "May", "June"]
_MONTHS += ["July", "August", "September", "October", "November", "December"]
_UNITS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"]
_TEENS = ["tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth"]
_TEENS += ["seventeenth", "eighteenth", "nineteenth"]
_TWENTIES = ["twentieth", *(f"twenty-{unit}" for unit in _UNITS)]
_ORDINALS = [*_UNITS, *_TEENS, *_TWENTIES, "thirtieth", "thirty-first"]
# Numbers alone only where their order is sure: the year first, or dots, which put the day first.
_FORMS = (
    "{weekday}, {day} {month} {year}",
    "{weekday}, {month} {day}, {year}",
    "{short_weekday} {day} {short_month} {year}",
    "the {day_th} of {month} {year}",
    "the {ordinal} of {month}, {year}",
    "{month} the {ordinal}, {year}",
    "{month} {day_th}, {year}",
    "{day} {month} {year}",
    "{short_month} {day}, {year}",
    "{short_month} {day}, {short_year}",
    "{month} {day}, {short_year}",
    "{day}-{short_month}-{year}",
    "{day}.{number}.{year}",
    "{day:02}.{number:02}.{short_year}",
    "{year}/{number:02}/{day:02}",
)


def date_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return `count` pairs of a date in words and in ISO 8601, the same ones for the same seed.

    As in ("the 3rd of May 1998", "1998-05-03"). Dates are drawn evenly from 1969 to 2068, each in
    one of 15 forms, each of which has one reading: of two digits, 69 to 99 are of the last century,
    as in POSIX's `strptime`. Dates may come again, in another form or the same.
    """
    generator = random.Random(f"dates {seed}")
    days = (LAST_DATE - FIRST_DATE).days + 1
    dates = [FIRST_DATE + datetime.timedelta(days=generator.randrange(days)) for _ in range(count)]
    return [(_in_words(date, generator.choice(_FORMS)), date.isoformat()) for date in dates]


def _in_words(date: datetime.date, form: str) -> str:
    weekday, month = _WEEKDAYS[date.weekday()], _MONTHS[date.month - 1]
    return form.format(
        day=date.day,
        day_th=f"{date.day}{_suffix(date.day)}",
        ordinal=_ORDINALS[date.day - 1],
        weekday=weekday,
        short_weekday=weekday[:3],
        number=date.month,
        month=month,
        short_month=month[:3],
        year=date.year,
        short_year=f"{date.year % 100:02}",
    )


def _suffix(day: int) -> str:
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def split_date_pairs(
    pairs: list[tuple[str, str]], held_out: float = 0.1
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the pairs to learn from, and those of a `held_out` share of the dates.

    No date is on both sides, in whatever form: what is held out cannot be remembered.

    Raises:
        InputError: no date is left on one of the sides.
    """
    dates = list(dict.fromkeys(date for _, date in pairs))
    cut = len(dates) - int(len(dates) * held_out)
    known = set(dates[:cut])
    if not 0 < cut < len(dates):
        raise InputError(
            f"nothing to hold out: {held_out:.0%} of {len(dates)} dates; expected more pairs"
        )
    return (
        [pair for pair in pairs if pair[1] in known],
        [pair for pair in pairs if pair[1] not in known],
    )
