"""Do the length and the direction of a weight's rows change together in LoRA alone?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bench import Bench
from ..geometry import movement, movement_correlation, random_change
from ..panels import Panel, bar, bars, lines, series
from ..protocol import Arm, Case, Plan, Row, full, lora
from ..tuning import arm_of, at_best, best_rate, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = (
    "LoRA moves length and direction together; full training and DoRA move them against each other"
)
SOURCE = "Liu et al. 2024, figure 2 (checked)"
CONTROL = "random dW of LoRA's norm, of rank 8 and of full rank"
SECONDS = 60
BASES = ("micro",)

R = 8
DORA = Arm("DoRA", "dora", {"r": R, "lora_alpha": 32, "target_modules": "all-linear"})
ARMS = [lora(R, "LoRA"), DORA, full()]
TOGETHER = 0.3  # a correlation that counts as moving together
SHOWN = "model.layers.1.mlp.down_proj.weight"  # whose rows the picture has


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    row = measure_fit(bench, ARMS, case)
    if row["report"] is None:
        return row
    arm = arm_of(ARMS, case)
    changes = bench.changes(arm, case["lr"], case["seed"])
    row["correlation"] = movement_correlation(changes.values())
    rng = np.random.default_rng(case["seed"])
    for name, r in (("random_low", R), ("random_full", 64)):
        control = [(W, random_change(dW, r, rng)) for W, dW in changes.values()]
        row[name] = movement_correlation(control)
    length, direction = movement(*changes[SHOWN])
    row["length"] = np.round(length / length.mean(), 3).tolist()
    row["direction"] = np.round(direction / direction.mean(), 3).tolist()
    return row


def verdict(rows: Sequence[Row]) -> Verdict:
    low, whole = (mean(at_best(rows, "LoRA", f"random_{name}")) for name in ("low", "full"))
    together = {arm.name: at_best(rows, arm.name, "correlation") for arm in ARMS}
    return decide(
        judge("correlation of LoRA", together["LoRA"], at_least=TOGETHER),
        judge("correlation of full training", together["full"], at_most=0),
        judge("correlation of DoRA", together["DoRA"], at_most=0),
        note=f"Random changes have {low:.2f} at rank {R} and {whole:.2f} at full rank.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    dots, labels, measured, random = [], [], [], []
    for arm in ARMS:
        rate = best_rate(rows, arm.name)
        row = next(row for row in rows if row["arm"] == arm.name and row["lr"] == rate)
        is_control = arm.method == "linear"
        dots.append(
            series(arm.name, row["direction"], row["length"], dots=True, control=is_control)
        )
        labels.append(arm.name)
        measured.append(mean(at_best(rows, arm.name, "correlation")))
        field = "random_low" if arm.method == "lora" else "random_full"
        random.append(mean(at_best(rows, arm.name, field)))
    x, y = "change of direction", "change of length"
    content = [bar("trained", measured), bar("random dW", random, control=True)]
    return [
        lines("Rows of a layer, each over their mean", x, y, dots),
        bars("Correlation over the rows, mean of layers", "correlation", labels, content),
    ]
