"""Does the first gradient keep its size at every rank if B A is divided by the rank's root?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bench import Bench
from ..panels import Panel, Series, lines, series
from ..protocol import Arm, Case, Plan, Row
from ..tuning import mean
from ..verdicts import Verdict, decide, fact, judge

CLAIM = "Divided by the root of the rank, LoRA's gradient has one size at all ranks"
SOURCE = "Kalajdzievski 2023 (not checked)"
CONTROL = "rsLoRA with alpha is LoRA with alpha times the root of r, bit for bit"
SECONDS = 15
BASES = ("micro",)

RANKS = (1, 4, 16, 64)
ALPHA = 16
RATE = 1e-3
MARGIN = 0.1  # by which the norm may differ from its mean over the ranks


def _arm(r: int, rslora: bool, alpha: float = ALPHA) -> Arm:
    fields = {"r": r, "lora_alpha": alpha, "target_modules": "all-linear", "use_rslora": rslora}
    return Arm(f"{'rsLoRA' if rslora else 'LoRA'} r={r}", fields=fields, settings={"steps": 40})


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return [{"r": r, "seed": seed} for r in plan.pick(RANKS, 2) for seed in plan.seeds]


def measure(bench: Bench, case: Case) -> Row:
    r, seed = case["r"], case["seed"]
    root = bench.fit(_arm(r, True), RATE, seed)
    ratio = bench.fit(_arm(r, False), RATE, seed)
    # 64 has the root 8, and so on: both scalings are the same number.
    control = bench.trained_weights(_arm(r, False, ALPHA * r**0.5), RATE, seed)
    weights = bench.trained_weights(_arm(r, True), RATE, seed)
    return {
        "root": root["first_norm"],
        "ratio": ratio["first_norm"],
        "root_report": root["report"],
        "ratio_report": ratio["report"],
        "same_bits": all(np.array_equal(W, control[name]) for name, W in weights.items()),
    }


def norms(rows: Sequence[Row], field: str) -> dict[int, list[float]]:
    """A figure of each rank, by seed."""
    ranks = sorted({row["r"] for row in rows})
    return {r: [row[field] for row in rows if row["r"] == r] for r in ranks}


def deviations(rows: Sequence[Row], field: str) -> list[float]:
    """By seed: the largest difference of a rank's norm from the mean over the ranks, relative."""
    result = []
    for values in zip(*norms(rows, field).values(), strict=True):
        centre = mean(values)
        result.append(max(abs(value - centre) for value in values) / centre)
    return result


def verdict(rows: Sequence[Row]) -> Verdict:
    spread = mean(deviations(rows, "ratio"))
    return decide(
        judge("largest deviation with alpha / root r", deviations(rows, "root"), at_most=MARGIN),
        judge("largest deviation with alpha / r", deviations(rows, "ratio"), at_least=MARGIN),
        fact("the control has the same bits", all(row["same_bits"] for row in rows)),
        note=f"With alpha / r the norm deviates by up to {100 * spread:.0f} % from its mean.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    def line(name: str, field: str) -> Series:
        means = {r: mean(values) for r, values in norms(rows, field).items()}
        is_control = field.startswith("ratio")
        return series(name, list(means), list(means.values()), control=is_control)

    names = {"alpha / root r": "root", "alpha / r": "ratio"}
    first = [line(name, field) for name, field in names.items()]
    after = [line(name, f"{field}_report") for name, field in names.items()]
    return [
        lines("At the first step", "rank r", "norm of the gradient", first, log="xy"),
        lines("After 40 steps at one rate", "rank r", "bits per byte", after, log="x"),
    ]
