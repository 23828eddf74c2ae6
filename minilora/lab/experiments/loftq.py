"""Does a start that makes up for the error of the codes help LoRA over four bits?"""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import Bench
from ..panels import Panel, bar, bars, lines, series
from ..protocol import Case, Plan, Row, lora
from ..tuning import at_best, curve, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, interval, judge

CLAIM = "LoftQ's start makes up for the codes' error, and LoRA over NF4 ends lower for it"
SOURCE = "Li et al. 2023 (not checked)"
CONTROL = "LoRA over the float32 base, which has no error to make up for"
SECONDS = 50
BASES = ("micro",)

R = 8
CODES = "nf4"
DENSE, ZERO, LOFTQ = "float32", "B = 0", "LoftQ"
ARMS = [
    lora(R, DENSE),
    lora(R, ZERO, quantize=CODES),
    lora(R, LOFTQ, quantize=CODES, fields={"init_lora_weights": "loftq"}),
]
BETTER = 0.005  # bits per byte that count as ending lower


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def lead(rows: Sequence[Row], field: str) -> list[float]:
    """Bits per byte by which LoftQ is below B = 0, by seed."""
    return differences(at_best(rows, ZERO, field), at_best(rows, LOFTQ, field))


def verdict(rows: Sequence[Row]) -> Verdict:
    lost = differences(at_best(rows, ZERO), at_best(rows, DENSE))
    return decide(
        judge("bits by which LoftQ is lower before training", lead(rows, "before"), at_least=0),
        judge("bits by which LoftQ is lower after training", lead(rows, "report"), at_least=BETTER),
        note=f"After training, B = 0 is {mean(lost):+.3f} bits above LoRA over float32.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    content = []
    for name in (ZERO, LOFTQ):
        results = []
        for field in ("before", "report"):
            above = differences(at_best(rows, name, field), at_best(rows, DENSE, field))
            results.append(interval(above))
        spread = [half for _, half in results]
        content.append(bar(name, [middle for middle, _ in results], spread=spread))
    curves = []
    for arm in ARMS:
        rates, losses = curve(rows, arm.name)
        curves.append(series(arm.name, rates, losses, control=arm.name == DENSE))
    labels, y = ["before training", "after it"], "bits per byte above float32"
    return [
        bars("At best rates", y, labels, content, levels={"float32": 0.0}),
        lines("Every rate", "learning rate", "bits per byte", curves, log="x"),
    ]
