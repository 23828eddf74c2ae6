"""Does LoRA forget less than full training when both have learned the same?"""

from __future__ import annotations

from collections.abc import Sequence

from ..geometry import lowest_crossing
from ..panels import Panel, lines, series
from ..protocol import Bench, Plan, full, interpolate, lora
from ..tuning import Case, Row, arm_of, differences
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA learns less and forgets less"
SOURCE = "Biderman et al. 2024, figures 1 to 3 (checked); section 4.3: both are on one curve"
CONTROL = "full training of the adapted layers, scaled back along W + share dW like LoRA"
SECONDS = 150
BASES = ("micro",)

SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
ARMS = [lora(4), lora(16), full(), full("full, all weights", "full")]
LEVEL = 0.75  # of what the weakest arm learns: where forgetting is compared
LESS = 0.01  # bits per byte that count as learning less
MARGIN = 0.02  # bits per byte of prose that count as forgetting less


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return [
        {"arm": arm.name, "lr": rate, "seed": seed}
        for arm in ARMS
        for rate in plan.pick(arm.rates)
        for seed in plan.seeds
    ]


def measure(bench: Bench, case: Case) -> Row:
    arm = arm_of(ARMS, case)
    before = bench.base_weights(arm.base)
    after = bench.trained_weights(arm, case["lr"], case["seed"])
    models = [bench.model_with(arm.base, interpolate(before, after, share)) for share in SHARES]
    return {part: [bench.bits(model, part) for model in models] for part in ("report", "prose")}


def front(rows: Sequence[Row], arm: str, seed: int, level: float) -> float:
    """The least loss on prose at which models of the arm, scaled back, have this loss on code."""
    chosen = [row for row in rows if row["arm"] == arm and row["seed"] == seed]
    curves = [list(zip(row["report"], row["prose"], strict=True)) for row in chosen]
    return lowest_crossing(curves, level)


def best_code(rows: Sequence[Row], arm: str) -> list[float]:
    """By seed, the least loss on code at any rate, at the whole dW."""
    seeds = sorted({row["seed"] for row in rows})
    chosen = [row for row in rows if row["arm"] == arm]
    return [min(row["report"][-1] for row in chosen if row["seed"] == seed) for seed in seeds]


def verdict(rows: Sequence[Row]) -> Verdict:
    base = rows[0]["report"][0]
    seeds = sorted({row["seed"] for row in rows})
    learned = {arm.name: best_code(rows, arm.name) for arm in ARMS}
    level = base - LEVEL * (base - max(map(max, learned.values())))
    prose = {arm.name: [front(rows, arm.name, seed, level) for seed in seeds] for arm in ARMS}
    saved = {name: differences(prose["full"], prose[name]) for name in ("LoRA r=4", "LoRA r=16")}
    less = differences(learned["LoRA r=16"], learned["full"])
    return decide(
        judge("bits of code that r = 16 learns less", less, at_least=LESS),
        judge("bits of prose that r = 16 keeps more", saved["LoRA r=16"], at_least=MARGIN),
        judge("bits of prose that r = 4 keeps more", saved["LoRA r=4"], at_least=MARGIN),
        note=f"Prose is compared where each model has {level:.2f} bits per byte on code.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    ends, paths = [], []
    for arm in ARMS:
        first = [row for row in rows if row["arm"] == arm.name and row["seed"] == rows[0]["seed"]]
        code = [row["report"][-1] for row in first]
        others = {"control": arm.method != "lora"}
        ends.append(series(arm.name, code, [row["prose"][-1] for row in first], **others))
        best = min(first, key=lambda row: row["report"][-1])
        paths.append(series(arm.name, best["report"], best["prose"], **others))
    x, y = "bits per byte of code", "bits per byte of prose"
    return [
        lines("Ends of training, a point per rate", x, y, ends),
        lines("Best ends, scaled back to the base", x, y, paths),
    ]
