"""Is a rank of one enough, and is nothing gained by a higher one?"""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import Bench
from ..panels import Panel, lines, series
from ..protocol import Case, Plan, Row, full, lora
from ..tuning import at_best, curve, differences, mean, measure_fit, shares_of_gain, tuned
from ..verdicts import Verdict, decide, interval, judge

CLAIM = "LoRA of rank 1 learns nearly as much as full training"
SOURCE = "Hu et al. 2021, table 6 (checked): flat from r = 1; footnote 6 excepts another language"
CONTROL = "full training of the same layers"
SECONDS = 90
BASES = ("micro",)

RANKS = (1, 4, 16, 64)
SHARE = 0.95  # of full training's gain that a rank must keep
FLAT = 0.02  # bits per byte that rank 16 may gain over rank 1 if the curve is flat
ARMS = [*map(lora, RANKS), full()]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def verdict(rows: Sequence[Row]) -> Verdict:
    shares = shares_of_gain(rows, "LoRA r=1")
    rise = differences(at_best(rows, "LoRA r=1"), at_best(rows, "LoRA r=16"))
    return decide(
        judge("share of full training's gain at r = 1", shares, at_least=SHARE),
        judge("bits per byte that r = 16 gains over r = 1", rise, at_most=FLAT),
        note="The task is another language than the base's, which footnote 6 excepts.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    results = [interval(at_best(rows, f"LoRA r={r}")) for r in RANKS]
    means = [centre for centre, _ in results]
    spread = [min(half, 1.0) for _, half in results]
    by_rank = lines(
        "At each rank's best learning rate",
        "rank r",
        "bits per byte of held-out code",
        [series("LoRA", RANKS, means, spread=spread)],
        log="x",
        levels={"full training": mean(at_best(rows, "full"))},
    )
    curves = []
    for arm in ARMS:
        rates, losses = curve(rows, arm.name)
        curves.append(series(arm.name, rates, losses, control=arm.name == "full"))
    by_rate = lines("Every rate", "learning rate", "bits per byte", curves, log="x")
    return [by_rank, by_rate]
