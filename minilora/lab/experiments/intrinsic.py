"""How many numbers must train, if they are scattered at random over all weights?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..bench import Bench
from ..panels import Panel, lines, series
from ..protocol import SHUFFLED, Arm, Case, Plan, Row, full
from ..tuning import at_best, differences, mean, measure_fit, shares_of_gain, tuned
from ..verdicts import Verdict, decide, interval, judge

CLAIM = "A few hundred numbers reach 90 % of full training's gain, thanks to pretraining"
SOURCE = "Aghajanyan et al. 2020, abstract (checked): 200 numbers for RoBERTa on MRPC"
CONTROL = "the same, and full training, over linear layers whose entries are shuffled"
SECONDS = 190
BASES = ("micro",)

SIZES = (10, 100, 500, 2_000, 10_000, 50_000)  # d, of 106,496 weights in linear layers
CONTROL_SIZES = (500, 10_000, 50_000)
CONTROL_BASE = f"{SHUFFLED}micro"
FEW, MANY = 500, 10_000
SHARE = 0.9
WORSE = 0.2  # bits per byte by which shuffled weights must be worse


def _arm(d: int, base: str = "micro") -> Arm:
    """The map P theta; an entry of theta is divided by the root of the weights that share it."""
    rate = 1e-3 * 2.0 ** round(math.log2(1430 / math.sqrt(d)))
    grid = [rate / 2, rate, 2 * rate, 4 * rate]
    fields = {"theta_d_length": d, "target_modules": "all-linear"}
    return Arm(f"{base} d={d}", "intrinsic", fields, base=base, rates=grid)


ARMS = [*map(_arm, SIZES), *(_arm(d, CONTROL_BASE) for d in CONTROL_SIZES)]
ARMS += [full(), full(f"{CONTROL_BASE} full", base=CONTROL_BASE)]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def dimension(rows: Sequence[Row]) -> str:
    """Where the mean share passes SHARE: between which sizes."""
    passed = [d for d in SIZES if mean(shares_of_gain(rows, f"micro d={d}")) >= SHARE]
    if not passed:
        return f"more than {SIZES[-1]:,}"
    before = [d for d in SIZES if d < passed[0]]
    return f"{before[-1]:,} to {passed[0]:,}" if before else f"at most {passed[0]:,}"


def verdict(rows: Sequence[Row]) -> Verdict:
    sizes = f"full's gain takes {dimension(rows)} numbers"
    worse = differences(at_best(rows, f"{CONTROL_BASE} d={MANY}"), at_best(rows, f"micro d={MANY}"))
    limit = mean(at_best(rows, f"{CONTROL_BASE} full"))
    shares = shares_of_gain(rows, f"micro d={FEW}")
    return decide(
        judge(f"share of full training's gain, {FEW} numbers", shares, at_least=SHARE),
        judge(f"bits that shuffled weights lose, {MANY:,} numbers", worse, at_least=WORSE),
        note=f"{SHARE:.0%} of {sizes}; shuffled and fully trained it is {limit:.2f} bits.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    results = [interval(at_best(rows, f"micro d={d}")) for d in SIZES]
    means = [centre for centre, _ in results]
    spread = [min(half, 1.0) for _, half in results]
    before, best = (mean(at_best(rows, "full", field)) for field in ("before", "report"))
    levels = {"full training": best, "90 % of its gain": before - SHARE * (before - best)}
    shuffled = [mean(at_best(rows, f"{CONTROL_BASE} d={d}")) for d in CONTROL_SIZES]
    limits = {"shuffled, full training": mean(at_best(rows, f"{CONTROL_BASE} full"))}
    x, y = "trained numbers d", "bits per byte"
    both = [series("the base", SIZES, means)]
    both.append(series("shuffled", CONTROL_SIZES, shuffled, control=True))
    one = [series("", SIZES, means, spread=spread)]
    return [
        lines("Each size at its best rate", x, y, one, log="x", levels=levels),
        lines("Beside shuffled layers", x, y, both, log="x", levels=limits),
    ]
