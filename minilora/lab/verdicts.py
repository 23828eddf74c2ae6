"""Verdicts on claims: the rule is fixed before the run, and the numbers are always beside it.

A claim has one part or several. A part compares a mean with a margin that was stated before: over
n seeds the mean has the 95 % interval d +- t s / sqrt(n), with the spread s of the n values and t
of n - 1 degrees of freedom (2.48 s for three seeds). If the whole interval is on the claim's side
of the margin the part holds; if it is wholly on the other side it does not hold here; otherwise n
seeds cannot tell. A part without an interval is a fact: true or false.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

HOLDS, FAILS, PARTLY = "holds", "does not hold here", "in part"
# The 97.5 % points of Student's t, by the degrees of freedom.
STUDENT = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646}

Part = dict[str, Any]
Verdict = dict[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval); the half is inf for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    t = STUDENT.get(len(values) - 1, STUDENT[7])  # above 8 values: wider than need be
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def judge(
    what: str,
    values: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Part:
    """The part "the mean of `what` is at least (or at most) a margin".

    values   one per seed
    """
    mean, half = interval(values)
    low, high = mean - half, mean + half
    margin = at_least if at_most is None else at_most
    assert margin is not None
    above, below = low >= margin, high < margin
    if at_most is not None:
        above, below = high <= margin, low > margin
    state = HOLDS if above else FAILS if below else cannot_tell(len(values))
    return {
        "what": what,
        "claimed": f"{'at least' if at_most is None else 'at most'} {margin:g}",
        "mean": mean,
        "half_width": half if math.isfinite(half) else None,
        "seeds": len(values),
        "verdict": state,
    }


def fact(what: str, is_true: bool, number: float | None = None, claimed: str = "") -> Part:
    """A part that is true or false, with the number that says so."""
    return {
        "what": what,
        "claimed": claimed,
        "mean": number,
        "half_width": None,
        "seeds": 1,
        "verdict": HOLDS if is_true else FAILS,
    }


def cannot_tell(seeds: int) -> str:
    return f"cannot tell at {seeds} seeds"


def decide(*parts: Part, note: str = "") -> Verdict:
    """The verdict on a claim: that of its parts where they agree, and otherwise `in part`.

    If no part holds and one fails, the claim does not hold, whatever the others would tell.

    note   what the numbers mean, in a sentence
    """
    states = {part["verdict"] for part in parts}
    state = PARTLY
    if len(states) == 1:
        (state,) = states
    elif HOLDS not in states:
        state = FAILS
    return {"verdict": state, "parts": list(parts), "note": note}


def describe_part(part: Part) -> str:
    """The part in one line: what, its number with the interval, what was claimed, the verdict."""
    claimed = part["claimed"] and f"claimed {part['claimed']}"
    numbers = ", ".join(filter(None, [describe_number(part), claimed]))
    return ": ".join(filter(None, [part["what"], numbers, part["verdict"]]))


def describe_number(part: Part) -> str:
    """Its mean in four digits, or with its interval to the second digit of the half-width."""
    mean, half_width = part["mean"], part["half_width"]
    if mean is None:
        return ""
    if not half_width:
        return f"{mean:.4g}"
    decimals = 1 - math.floor(math.log10(half_width))
    pair = [round(x, decimals) + 0.0 for x in (mean, half_width)]  # so that -0.0 is 0.0
    return " +- ".join(f"{x:.{max(0, decimals)}f}" for x in pair)
