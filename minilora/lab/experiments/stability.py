"""Is LoRA easier to train: does it bear a wider range of rates, and higher ones?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..bench import Bench
from ..panels import Panel, lines, series
from ..protocol import Case, Plan, Row, full, lora
from ..tuning import curve, differences, measure_fit, seeds_of, whole_grid
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA is stabler to train than the whole model"
SOURCE = "said in courses on LoRA"
CONTROL = "both without clipping and without warm-up"
SECONDS = 240
BASES = ("micro",)

BARE = {"warmup": 0, "max_grad_norm": 1e9}
RUNGS = [2.0**k for k in range(10)]
GRIDS = {"LoRA": [5e-4 * rung for rung in RUNGS], "full": [1.25e-4 * rung for rung in RUNGS]}
ARMS = [
    replace(arm, name=name, settings=settings, rates=GRIDS[arm.name])
    for arm in (lora(8, "LoRA"), full())
    for name, settings in ((arm.name, {}), (f"{arm.name}, bare", BARE))
]
NEAR = 1.02  # the loss, over the best one, of a rate that will do


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return whole_grid(plan, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def region(rows: Sequence[Row], arm: str, seed: int) -> tuple[int, float]:
    """(rates whose loss is within 2 % of the best, relative loss at the first rate above them)."""
    chosen = [row for row in rows if row["arm"] == arm and row["seed"] == seed]
    losses = {row["lr"]: row["report"] or math.inf for row in chosen}
    best = min(losses.values())
    near = [rate for rate, loss in losses.items() if loss <= NEAR * best]
    above = [loss for rate, loss in losses.items() if rate > max(near)]
    return len(near), (above[0] if above else best) / best


def by_seed(rows: Sequence[Row], arm: str, place: int) -> list[float]:
    """One of the two numbers of `region`, by seed; training that diverged counts as three."""
    return [
        min(region(rows, arm, seed)[place], 3.0 if place else 99) for seed in seeds_of(rows, arm)
    ]


def verdict(rows: Sequence[Row]) -> Verdict:
    wider = differences(by_seed(rows, "LoRA", 0), by_seed(rows, "full", 0))
    bare = differences(by_seed(rows, "LoRA, bare", 0), by_seed(rows, "full, bare", 0))
    edge = differences(by_seed(rows, "full", 1), by_seed(rows, "LoRA", 1))
    return decide(
        judge("factors of two by which LoRA's range is wider", wider, at_least=1),
        judge("the same without clipping and warm-up", bare, at_least=1),
        judge("relative loss above the range, full less LoRA", edge, at_least=0),
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    result = []
    for title, names in (("As usual", ("LoRA", "full")), ("Bare", ("LoRA, bare", "full, bare"))):
        content = []
        for name in names:
            rates, losses = curve(rows, name)
            shown = [min(loss, 5.0) for loss in losses]
            content.append(series(name, rates, shown, control=name.startswith("full")))
        result.append(lines(title, "learning rate", "bits per byte", content, log="x"))
    return result
