"""Cases of tuned comparisons: each arm at its best learning rate, paired by seed.

A case is a dictionary of numbers and texts that says what is measured; a row is a case with its
results. Which rates are worth measuring depends on rows that are known: `tuned` is called again
with them until it asks for nothing new. What it asks for in the end depends on the results alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .bench import Bench
from .protocol import Arm, Case, Plan, Row

FACTOR = 2.0  # between neighbouring learning rates


def tuned(plan: Plan, rows: Sequence[Row], arms: Iterable[Arm]) -> list[Case]:
    """The cases that tune the arms.

    The whole grid with the first seed, extended while its best rate is at an edge; then the best
    rate and its neighbours with the other seeds, and further neighbours, beyond the grid too, while
    the best mean over the seeds has one that was not measured with all of them.
    """
    return [case for arm in arms for case in _tuned(plan, rows, arm)]


def whole_grid(plan: Plan, arms: Iterable[Arm]) -> list[Case]:
    """Every rate of each arm's grid with every seed."""
    return [
        {"arm": arm.name, "lr": rate, "seed": seed}
        for arm in arms
        for rate in plan.pick(arm.rates, 2)
        for seed in plan.seeds
    ]


def tuned_then(
    plan: Plan,
    rows: Sequence[Row],
    arms: Sequence[Arm],
    follow: Callable[[Sequence[Row]], list[Case]],
) -> list[Case]:
    """The cases that tune the arms, and once all are measured those that follow from their rows.

    A case that follows has no "lr": that tells them apart.
    """
    wanted = tuned(plan, rows, arms)
    known = [row for row in rows if "lr" in row]
    return wanted + follow(known) if len(known) == len(wanted) else wanted


def _tuned(plan: Plan, rows: Sequence[Row], arm: Arm) -> list[Case]:
    scores = {(row["lr"], row["seed"]): score(row) for row in rows if row["arm"] == arm.name}
    first, *others = plan.seeds
    rates = list(plan.pick(arm.rates))  # one alone if quick
    most = len(rates) + plan.extensions

    def are_known(rates: Iterable[float], seeds: Sequence[int]) -> bool:
        return all((rate, seed) in scores for rate in rates for seed in seeds)

    def best_for(seeds: Sequence[int], rates: Iterable[float]) -> float:
        return min(sorted(rates), key=lambda rate: _mean(scores, rate, seeds))

    confirmed: set[float] = set()  # rates for all seeds
    while are_known(rates, [first]):
        chosen = best_for([first], rates)
        wider = _with_neighbours(rates, chosen, most)
        if wider == rates:
            confirmed.update(_around(rates, chosen))
            break
        rates = wider
    while confirmed and are_known(confirmed, plan.seeds):
        chosen = best_for(plan.seeds, confirmed)
        rates = _with_neighbours(rates, chosen, most)
        if confirmed.issuperset(_around(rates, chosen)):
            break
        confirmed.update(_around(rates, chosen))
    cases = [{"arm": arm.name, "lr": rate, "seed": first} for rate in rates]
    for seed in others:
        cases += [{"arm": arm.name, "lr": rate, "seed": seed} for rate in sorted(confirmed)]
    return cases


def _with_neighbours(rates: list[float], best: float, most: int) -> list[float]:
    """The rates, and one more where the best is at an edge, up to `most` of them."""
    if len(rates) == most:
        return rates
    if best == rates[0]:
        return [rates[0] / FACTOR, *rates]
    if best == rates[-1]:
        return [*rates, rates[-1] * FACTOR]
    return rates


def _around(rates: Sequence[float], best: float) -> Sequence[float]:
    """The rate and its neighbours in the grid."""
    place = rates.index(best)
    return rates[max(0, place - 1) : place + 2]


def _mean(scores: Any, rate: float, seeds: Sequence[int]) -> float:
    return math.fsum(scores[rate, seed] for seed in seeds) / len(seeds)


def score(row: Row) -> float:
    """What a rate is chosen by: bits per byte of the tuning half; inf if training diverged."""
    return math.inf if row["tune"] is None else float(row["tune"])


def arm_of(arms: Iterable[Arm], case: Case) -> Arm:
    """The arm that a case names."""
    return next(arm for arm in arms if arm.name == case["arm"])


def measure_fit(bench: Bench, arms: Iterable[Arm], case: Case) -> Row:
    """The figures of the fit that a case of `tuned` means."""
    result = bench.fit(arm_of(arms, case), case["lr"], case["seed"])
    names = ("before", "tune", "report", "prose", "trained", "first_norm")
    return {name: result[name] for name in names}


# ---- what the rows say ---------------------------------------------------------------------------


def seeds_of(rows: Sequence[Row], arm: str) -> list[int]:
    return sorted({row["seed"] for row in rows if row["arm"] == arm})


def rates_of(rows: Sequence[Row], arm: str) -> list[float]:
    return sorted({row["lr"] for row in rows if row["arm"] == arm})


def complete_rates(rows: Sequence[Row], arm: str) -> list[float]:
    """The rates that were measured with every seed."""
    measured = {(row["lr"], row["seed"]) for row in rows if row["arm"] == arm}
    seeds = seeds_of(rows, arm)
    rates = rates_of(rows, arm)
    return [rate for rate in rates if all((rate, seed) in measured for seed in seeds)]


def best_rate(rows: Sequence[Row], arm: str) -> float:
    """The rate with the lowest mean over the seeds of the tuning half's loss."""
    scores = {(row["lr"], row["seed"]): score(row) for row in rows if row["arm"] == arm}
    seeds = seeds_of(rows, arm)
    return min(complete_rates(rows, arm), key=lambda rate: _mean(scores, rate, seeds))


def best_rates(rows: Sequence[Row], arm: str) -> list[float]:
    """The best rate of each seed by itself, among the rates that all seeds have."""
    rates = complete_rates(rows, arm)
    scores = {(row["lr"], row["seed"]): score(row) for row in rows if row["arm"] == arm}
    return [min(rates, key=lambda rate: scores[rate, seed]) for seed in seeds_of(rows, arm)]


def at_best(rows: Sequence[Row], arm: str, field: str = "report") -> list[Any]:
    """A figure at the arm's best rate, one per seed in their order."""
    rate = best_rate(rows, arm)
    chosen = [row for row in rows if row["arm"] == arm and row["lr"] == rate]
    return [row[field] for row in sorted(chosen, key=lambda row: row["seed"])]


def curve(rows: Sequence[Row], arm: str, field: str = "report") -> tuple[list[float], list[Any]]:
    """(rates, the mean over the seeds that have this rate); a rate that diverged is left out."""
    rates: list[float] = []
    means: list[Any] = []
    for rate in rates_of(rows, arm):
        values = [row[field] for row in rows if row["arm"] == arm and row["lr"] == rate]
        if None not in values:
            rates.append(rate)
            means.append(mean(values))
    return rates, means


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Paired differences: seed by seed."""
    return [a - b for a, b in zip(one, other, strict=True)]


def shares_of_gain(rows: Sequence[Row], arm: str, whole: str = "full") -> list[float]:
    """By seed, the share of the bits per byte gained by `whole` that `arm` gains, each tuned."""
    before = at_best(rows, whole, "before")
    gains = differences(before, at_best(rows, arm))
    gains_of_whole = differences(before, at_best(rows, whole))
    return [gain / most for gain, most in zip(gains, gains_of_whole, strict=True)]


def is_at_edge(rows: Sequence[Row], arm: str) -> bool:
    """Is the best rate the lowest or the highest that was measured?"""
    rates = rates_of(rows, arm)
    return best_rate(rows, arm) in (rates[0], rates[-1])
