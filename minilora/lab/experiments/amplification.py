"""Does dW amplify directions that are in W but not emphasised?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bench import Bench
from ..geometry import amplification, decompose, random_directions
from ..panels import Panel, lines, series
from ..protocol import Case, Plan, Row, full, lora
from ..tuning import arm_of, at_best, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA amplifies directions that W has and does not emphasise, by more at a low rank"
SOURCE = "Hu et al. 2021, table 7 (checked): at r = 4 a factor of 21.5, at r = 64 of 1.9"
CONTROL = "the same measure with random directions, and with W's largest"
SECONDS = 300
BASES = ("mid",)

K = 4  # directions, the same for all ranks: a longer dW has more of them by itself
RANKS = (4, 8, 16, 64)
ARMS = [*(lora(r, base="mid") for r in RANKS), full(base="mid")]
OVERLAP = 4  # how many times more of W its directions must hold than random ones do
FIELDS = {"its own directions": "factor", "random": "random", "W's largest": "largest"}


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def factors(W: np.ndarray, dW: np.ndarray, rng: np.random.Generator) -> list[float]:
    """The factors with K directions of dW, K random ones, and the K largest of W."""
    change, weight = decompose(dW), decompose(W)
    pairs = [
        (change.U[:, :K], change.Vt[:K].T),
        (random_directions(W.shape[0], K, rng), random_directions(W.shape[1], K, rng)),
        (weight.U[:, :K], weight.Vt[:K].T),
    ]
    return [amplification(W, change.values[:K], U, V) for U, V in pairs]


def measure(bench: Bench, case: Case) -> Row:
    """The fit, and the three factors as means over the layers."""
    row = measure_fit(bench, ARMS, case)
    if row["report"] is None:
        return row
    arm = arm_of(ARMS, case)
    changes = bench.changes(arm, case["lr"], case["seed"]).values()
    rng = np.random.default_rng(case["seed"])
    table = [factors(W, dW, rng) for W, dW in changes]
    row["layers"] = [round(factor, 3) for factor, *_ in table]
    for field, column in zip(FIELDS.values(), zip(*table, strict=True), strict=True):
        row[field] = mean(column)
    return row


def verdict(rows: Sequence[Row]) -> Verdict:
    low, high = at_best(rows, "LoRA r=4", "factor"), at_best(rows, "LoRA r=64", "factor")
    largest = at_best(rows, "LoRA r=4", "largest")
    random = at_best(rows, "LoRA r=4", "random")
    overlap = [a / b for a, b in zip(random, low, strict=True)]
    return decide(
        judge("factor at r = 4 above W's largest", differences(low, largest), at_least=0),
        judge("factor at r = 4 above r = 64", differences(low, high), at_least=0),
        judge("W in these directions, over random ones", overlap, at_least=OVERLAP),
        note=f"A random choice of directions has a factor of {mean(random):.1f}.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    content = []
    for name, field in FIELDS.items():
        means = [mean(at_best(rows, f"LoRA r={r}", field)) for r in RANKS]
        content.append(series(name, RANKS, means, control=field != "factor"))
    levels = {"full training": mean(at_best(rows, "full", "factor"))}
    dots = []
    for r in RANKS:
        layers = at_best(rows, f"LoRA r={r}", "layers")[0]
        dots.append(series(f"r = {r}", range(len(layers)), layers, dots=True))
    y = f"|dW| / |U'WV|, {K} directions"
    return [
        lines("Mean over the layers", "rank r", y, content, log="xy", levels=levels),
        lines("Layer by layer", "layer", y, dots, log="y"),
    ]
