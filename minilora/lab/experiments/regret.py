"""Does LoRA need ten times full training's rate, at any rank, and match it while the data fit?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..bench import Bench
from ..panels import Panel, bar, bars, lines, series
from ..protocol import MEMORY, Arm, Case, Plan, Row, full, lora
from ..tuning import at_best, best_rates, curve, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA's best rate is ten times that of full training at any rank, and it learns what fits"
SOURCE = "Schulman 2025, LoRA Without Regret (not checked)"
CONTROL = "full training of the same layers"
SECONDS = 400
BASES = ("micro",)

RANKS = (1, 4, 16)
SIZES = (1, 4, 16)  # kB to learn by heart
STEPS = 300
RATIO = 10 / math.sqrt(2)  # "ten" is nearer than five
EQUAL = 0.05  # bits per byte that count as equal
SMALL, LARGE = f"{MEMORY}{SIZES[0]}", f"{MEMORY}{SIZES[-1]}"


def _memory(arm: Arm, size: int) -> Arm:
    content = vars(arm) | {"task": f"{MEMORY}{size}", "settings": {"steps": STEPS}}
    return Arm(**content | {"name": f"{arm.name}, {MEMORY}{size}"})


METHODS = [*map(lora, RANKS), full()]
ARMS = [*METHODS, *(_memory(arm, size) for size in SIZES for arm in METHODS)]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def gaps(rows: Sequence[Row], r: int, task: str) -> list[float]:
    """Bits per byte of a memorised text that LoRA leaves more than full training does, by seed."""
    return differences(at_best(rows, f"LoRA r={r}, {task}"), at_best(rows, f"full, {task}"))


def verdict(rows: Sequence[Row]) -> Verdict:
    rates = {arm.name: best_rates(rows, arm.name) for arm in METHODS}
    pairs = zip(rates["LoRA r=16"], rates["full"], strict=True)
    octaves = [
        abs(math.log2(one / other))
        for one, other in zip(rates["LoRA r=1"], rates["LoRA r=16"], strict=True)
    ]
    falls = differences(gaps(rows, 1, LARGE), gaps(rows, 16, LARGE))
    return decide(
        judge("best rate of r = 16 over full's", [a / b for a, b in pairs], at_least=RATIO),
        judge("factors of two between the best rates of r = 1 and 16", octaves, at_most=1),
        judge("bits more than full, 1 kB by heart, r = 16", gaps(rows, 16, SMALL), at_most=EQUAL),
        judge("bits by which the gap falls from r = 1 to 16, 16 kB", falls, at_least=EQUAL),
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    curves = []
    for arm in METHODS:
        rates, losses = curve(rows, arm.name)
        curves.append(series(arm.name, rates, losses, control=arm.name == "full"))
    content = []
    for arm in METHODS:
        names = [f"{arm.name}, {MEMORY}{size}" for size in SIZES]
        means = [mean(at_best(rows, name)) for name in names]
        content.append(bar(arm.name, means, control=arm.name == "full"))
    title = f"Learned by heart in {STEPS} steps"
    return [
        lines("Code, at every rate", "learning rate", "bits per byte", curves, log="x"),
        bars(title, "bits per byte", [f"{size} kB" for size in SIZES], content),
    ]
