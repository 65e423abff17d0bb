"""`genkernels score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import score_votes


def score(
    votes: Annotated[
        list[Path], typer.Argument(help="What the page saved, a file for each who voted.")
    ],
    key: Annotated[
        Path, typer.Option(help="NAME.key.json, which stands beside the page NAME.html.")
    ],
) -> None:
    """Count the votes of people on a page that `genkernels evaluate --human` wrote.

    Prints how often the checkpoint was preferred, of the votes that preferred one, and between
    which shares it would be, with 95% confidence, if all people voted (Wilson's interval). An
    interval with 50% in it does not tell which of the two they like better: more votes narrow it.
    All files count together.

    Examples:

        genkernels score votes.json --key sheet.key.json
        genkernels score votes-*.json --key sheet.key.json
    """
    result = score_votes(votes, key)
    first, second = result.names
    print(
        f"preferred       {first}: {result.share:.1%}, "
        f"95% interval {result.low:.1%} to {result.high:.1%}"
    )
    print(
        f"votes           {result.left:,} for {first}, {result.right:,} for {second}, "
        f"{result.neither:,} for neither"
    )
    if result.low <= 0.5 <= result.high:
        print("result          50% is in the interval: it does not tell which is preferred")
    else:
        preferred = first if result.low > 0.5 else second
        print(f"result          50% is not in the interval: {preferred} is preferred")
