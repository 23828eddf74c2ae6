"""Should B learn faster than A, by a ratio that grows with the width?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..bench import Bench
from ..panels import Panel, lines, series
from ..protocol import BASES as MODELS
from ..protocol import Arm, Case, Plan, Row, lora
from ..tuning import at_best, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA+: B should learn faster than A, by a ratio that grows with the width"
SOURCE = "Hayou et al. 2024 (not checked)"
CONTROL = "equal rates of A and B, which are plain LoRA"
SECONDS = 420
BASES = ("narrow", "micro", "wide")

RATIOS = (0.25, 1, 4, 16)  # rate of B over that of A
BETTER = 0.005  # bits per byte that the ratio 16 must win over equal rates
SLOPE = 0.5  # of log best ratio in log width: the claim is 1


def _arm(base: str, ratio: float) -> Arm:
    settings = {"optimizer": "loraplus", "loraplus_lr_ratio": ratio}
    rates = [2.0**k * 4e-3 / math.sqrt(ratio) for k in (-1, 0, 1, 2)]
    return lora(8, f"{base}, ratio {ratio:g}", base=base, settings=settings, rates=rates)


ARMS = [_arm(base, ratio) for base in BASES for ratio in RATIOS]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    return measure_fit(bench, ARMS, case)


def losses(rows: Sequence[Row], base: str) -> list[list[float]]:
    """By ratio: the loss of each seed at the best rate."""
    return [at_best(rows, f"{base}, ratio {ratio:g}") for ratio in RATIOS]


def widths() -> list[int]:
    return [MODELS[base].model.hidden_size for base in BASES]


def slopes(rows: Sequence[Row]) -> list[float]:
    """By seed: the slope of log best ratio in log width."""
    best: list[list[float]] = []
    for base in BASES:
        by_seed = zip(*losses(rows, base), strict=True)
        best.append([math.log2(RATIOS[values.index(min(values))]) for values in by_seed])
    octaves = np.log2(widths())
    return [float(np.polyfit(octaves, ratios, 1)[0]) for ratios in zip(*best, strict=True)]


def verdict(rows: Sequence[Row]) -> Verdict:
    wins = []
    for base in BASES:
        equal, fast = (at_best(rows, f"{base}, ratio {ratio}") for ratio in (1, 16))
        wins.append(differences(equal, fast))
    parts = [
        judge(f"bits won by a ratio of 16 at width {width}", win, at_least=BETTER)
        for width, win in zip(widths(), wins, strict=True)
    ]
    slope = judge("slope of log best ratio in log width", slopes(rows), at_least=SLOPE)
    return decide(*parts, slope)


def panels(rows: Sequence[Row]) -> list[Panel]:
    content = []
    for base, width in zip(BASES, widths(), strict=True):
        means = [mean(values) for values in losses(rows, base)]
        relative = [value - means[RATIOS.index(1)] for value in means]
        content.append(series(f"width {width}", RATIOS, relative))
    y = "bits per byte above equal rates"
    title = "Each ratio at its best rate of A"
    return [lines(title, "rate of B / rate of A", y, content, log="x", levels={"equal rates": 0.0})]
