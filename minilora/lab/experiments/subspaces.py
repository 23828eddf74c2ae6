"""Do adapters of different ranks and seeds learn the same directions?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...lora import PeftModel
from ..bench import Bench, adapter_parts
from ..geometry import decompose, mean_overlaps, random_directions
from ..panels import Panel, heat
from ..protocol import Case, Plan, Row, lora
from ..tuning import best_rate, mean, measure_fit, tuned_then
from ..verdicts import Verdict, decide, judge

CLAIM = "The top directions of a small rank are contained in those of a large one"
SOURCE = "Hu et al. 2021, figures 3 and 4 (checked): phi above 0.5 between r = 8 and r = 64"
CONTROL = "the untrained A of one seed, whose first rows both ranks share; random directions"
SECONDS = 130
BASES = ("mid",)

ARMS = SMALL, LARGE = lora(8, base="mid"), lora(64, base="mid")
SHOWN = (1, 2, 4, 8)  # directions of the small rank, and of the large one
HALF = 0.5


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    """Those that tune both ranks; then pairs of adapters at their best rates."""

    def pairs(known: Sequence[Row]) -> list[Case]:
        rates = [best_rate(known, arm.name) for arm in ARMS]
        seeds = zip(plan.seeds, [*plan.seeds[1:], plan.seeds[0]], strict=True)
        return [{"arm": "pair", "rates": rates, "seed": a, "other": b} for a, b in seeds]

    return tuned_then(plan, rows, ARMS, pairs)


def measure(bench: Bench, case: Case) -> Row:
    """phi(i, j) as means over the layers: of A, of dW's outputs, and of the controls."""
    if "lr" in case:
        return measure_fit(bench, ARMS, case)
    small = bench.trained(SMALL, case["rates"][0], case["seed"])
    other = bench.trained(LARGE, case["rates"][1], case["other"])
    fresh = [inputs(bench.prepare(arm, case["seed"])) for arm in ARMS]
    rng = np.random.default_rng(case["seed"])
    drawn = [[random_directions(len(V), V.shape[1], rng) for V in side] for side in fresh]
    pairs = {
        "other_seed": (inputs(small), inputs(other)),
        "outputs": (outputs(small), outputs(other)),
        "untrained": (fresh[0], fresh[1]),
        "random": (drawn[0], drawn[1]),
    }
    return {name: mean_overlaps(one, two, SHOWN) for name, (one, two) in pairs.items()}


def inputs(model: PeftModel) -> list[np.ndarray]:
    """The right directions (I, r) of A, the largest first, by layer."""
    return [decompose(part.A).Vt.T for part in adapter_parts(model)]


def outputs(model: PeftModel) -> list[np.ndarray]:
    """The left directions (O, r) of dW, the largest first, by layer."""
    return [decompose(part.B @ part.A).U[:, : len(part.A)] for part in adapter_parts(model)]


def first(rows: Sequence[Row], field: str) -> list[float]:
    """phi(1, 8): is the first direction of r = 8 among the first eight of r = 64? By pair."""
    return [row[field][0][-1] for row in rows if row["arm"] == "pair"]


def verdict(rows: Sequence[Row]) -> Verdict:
    chance = mean(first(rows, "random"))
    untrained = mean(first(rows, "untrained"))
    return decide(
        judge("phi(1, 8) of A, seeds apart", first(rows, "other_seed"), at_least=HALF),
        judge("phi(1, 8) of dW's outputs", first(rows, "outputs"), at_least=HALF),
        judge("the same above twice its chance", first(rows, "outputs"), at_least=2 * chance),
        note=f"phi(1, 8) is {chance:.2f} by chance, and {untrained:.2f} untrained at one seed.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    names = {"A, other seed": "other_seed", "dW's outputs": "outputs"}
    names |= {"untrained A, one seed": "untrained", "random": "random"}
    labels = [str(i) for i in SHOWN]
    others = {"x": "of r = 64", "y": "of r = 8", "limits": [0, 1]}
    pairs = [row for row in rows if row["arm"] == "pair"]
    tables = {name: np.mean([row[f] for row in pairs], axis=0) for name, f in names.items()}
    return [
        heat(f"phi: {name}", labels, labels, t.tolist(), **others) for name, t in tables.items()
    ]
