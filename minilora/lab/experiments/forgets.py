"""Does LoRA forget less than full training when both have learned the same?"""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import Bench, interpolate
from ..geometry import lowest_crossing
from ..panels import Panel, lines, series
from ..protocol import Case, Plan, Row, full, lora
from ..tuning import arm_of, differences, mean, score, whole_grid
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA learns less and forgets less"
SOURCE = "Biderman et al. 2024, figures 1 to 3 (checked); section 4.3: both are on one curve"
CONTROL = "full training of the adapted layers alone; all are scaled back along W + share dW"
SECONDS = 150
BASES = ("micro",)

SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
WHOLE = "full, all weights"
ARMS = [lora(4), lora(16), full(), full(WHOLE, "full")]
LEVEL = 0.75  # of what the weakest arm learns: where forgetting is compared
LESS = 0.01  # bits per byte that count as learning less
MARGIN = 0.02  # bits per byte of prose that count as forgetting less


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return whole_grid(plan, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    arm = arm_of(ARMS, case)
    before = bench.base_weights(arm.base)
    after = bench.trained_weights(arm, case["lr"], case["seed"])
    models = [bench.model_with(arm.base, interpolate(before, after, share)) for share in SHARES]
    row = {part: [bench.bits(model, part) for model in models] for part in ("report", "prose")}
    return row | {"tune": bench.fit(arm, case["lr"], case["seed"])["tune"]}


def front(rows: Sequence[Row], arm: str, seed: int, level: float) -> float:
    """The least loss on prose at which models of the arm, scaled back, have this loss on code."""
    chosen = [row for row in rows if row["arm"] == arm and row["seed"] == seed]
    curves = [list(zip(row["report"], row["prose"], strict=True)) for row in chosen]
    return lowest_crossing(curves, level)


def best_code(rows: Sequence[Row], arm: str) -> list[float]:
    """By seed, the loss on code of the whole dW, at the rate that the tuning half chooses."""
    seeds = sorted({row["seed"] for row in rows})
    chosen = [row for row in rows if row["arm"] == arm]
    best = [min((row for row in chosen if row["seed"] == seed), key=score) for seed in seeds]
    return [row["report"][-1] for row in best]


def verdict(rows: Sequence[Row]) -> Verdict:
    base = rows[0]["report"][0]
    seeds = sorted({row["seed"] for row in rows})
    learned = {arm.name: best_code(rows, arm.name) for arm in ARMS}
    level = base - LEVEL * (base - max(map(max, learned.values())))
    prose = {arm.name: [front(rows, arm.name, seed, level) for seed in seeds] for arm in ARMS}
    parts = []
    for name in ("LoRA r=4", "LoRA r=16"):
        less = differences(learned[name], learned[WHOLE])
        parts.append(judge(f"bits of code that {name} learns less", less, at_least=LESS))
        saved = differences(prose[WHOLE], prose[name])
        parts.append(judge(f"bits of prose that {name} keeps more", saved, at_least=MARGIN))
    control = mean(differences(prose[WHOLE], prose["full"]))
    note = f"Prose is compared where each model has {level:.2f} bits per byte on code; there full"
    return decide(*parts, note=f"{note} training of the adapted layers keeps {control:+.3f} more.")


def panels(rows: Sequence[Row]) -> list[Panel]:
    ends, paths = [], []
    for arm in ARMS:
        first = [row for row in rows if row["arm"] == arm.name and row["seed"] == rows[0]["seed"]]
        code = [row["report"][-1] for row in first]
        others = {"control": arm.method != "lora"}
        ends.append(series(arm.name, code, [row["prose"][-1] for row in first], **others))
        best = min(first, key=score)
        paths.append(series(arm.name, best["report"], best["prose"], **others))
    x, y = "bits per byte of code", "bits per byte of prose"
    return [
        lines("Ends of training, a point per rate", x, y, ends),
        lines("Best ends, scaled back to the base", x, y, paths),
    ]
