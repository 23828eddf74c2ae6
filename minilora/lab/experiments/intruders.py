"""Does LoRA make directions that W does not have, and do these cause the forgetting?"""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import Bench, interpolate
from ..geometry import Decomposition, decompose, find_intruders, rescale
from ..panels import Panel, lines, series
from ..protocol import Case, Plan, Row, full, lora
from ..tuning import arm_of, at_best, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = "LoRA makes intruder directions, full training makes none, and they cause the forgetting"
SOURCE = "Shuttleworth et al. 2024 (not checked); figure 8 scales them"
CONTROL = "as many other directions scaled, and all of dW scaled"
SECONDS = 250
BASES = ("mid",)

TOP = 10  # directions of W + dW that are looked at
NEW = 0.5  # an intruder's largest |cosine| with the directions of W is below this
RANKS = (1, 4, 16, 64)
ARMS = [*(lora(r, base="mid") for r in RANKS), full(base="mid")]
SCALED = "LoRA r=4"
SHARES = (1.0, 0.9, 0.8, 0.6)
WAYS = {"intruders": "intruders", "other directions": "others", "all of dW": "whole"}
MARGIN = 0.01  # bits of prose that scaling intruders must win over the controls


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    """The fit, the number of intruders, and at rank 4 both losses for each way of scaling."""
    row = measure_fit(bench, ARMS, case)
    if row["report"] is None:
        return row
    fit = arm_of(ARMS, case), case["lr"], case["seed"]
    layers: dict[str, tuple[Decomposition, list[int]]] = {}
    for name, (W, dW) in bench.changes(*fit).items():
        parts = decompose(W + dW)
        layers[name] = parts, find_intruders(W, parts, TOP, NEW)
    row["count"] = sum(len(places) for _, places in layers.values())
    if case["arm"] != SCALED:
        return row
    before, after = bench.base_weights("mid"), bench.trained_weights(*fit)
    for way in WAYS.values():
        row[way] = []
        for share in SHARES:
            weights = interpolate(before, after, share) if way == "whole" else dict(after)
            for name, (parts, places) in layers.items() if way != "whole" else ():
                others = [place for place in range(TOP) if place not in places][: len(places)]
                weights[name] = rescale(parts, places if way == "intruders" else others, share)
            model = bench.model_with("mid", weights)
            row[way].append([bench.bits(model), bench.bits(model, "prose")])
    return row


def least_prose(rows: Sequence[Row], way: str) -> list[float]:
    """By seed: the least loss on prose among the shares that cost at most 0.01 bits of code."""
    return [
        min(prose for code, prose in points if code <= points[0][0] + 0.01)
        for points in at_best(rows, SCALED, way)
    ]


def verdict(rows: Sequence[Row]) -> Verdict:
    counts = {arm.name: at_best(rows, arm.name, "count") for arm in ARMS}
    intruders = least_prose(rows, "intruders")
    others = differences(least_prose(rows, "others"), intruders)
    whole = differences(least_prose(rows, "whole"), intruders)
    return decide(
        judge("intruders at r = 4", counts[SCALED], at_least=5),
        judge("intruders of full training", counts["full"], at_most=1),
        judge("prose: intruders scaled, over other directions", others, at_least=MARGIN),
        judge("prose: intruders scaled, over all of dW", whole, at_least=MARGIN),
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    counts = [mean(at_best(rows, f"LoRA r={r}", "count")) for r in RANKS]
    levels = {"full training": mean(at_best(rows, "full", "count"))}
    paths = []
    for name, way in WAYS.items():
        code, prose = zip(*at_best(rows, SCALED, way)[0], strict=True)
        paths.append(series(name, code, prose, control=way != "intruders"))
    line = series("LoRA", RANKS, counts)
    return [
        lines("Intruders", "rank r", "number", [line], log="x", levels=levels),
        lines("Scaled by 1 to 0.6 at r = 4", "bits per byte of code", "of prose", paths),
    ]
