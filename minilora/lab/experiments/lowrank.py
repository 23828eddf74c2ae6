"""Has the change that full training makes a low rank?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..bench import Bench
from ..geometry import decompose, energy, project, random_directions
from ..panels import Panel, Series, lines, series
from ..protocol import Case, Plan, Row, full, lora
from ..tuning import arm_of, at_best, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = "The change that full training makes has a low rank"
SOURCE = "said in courses; Biderman et al. 2024, section 4.5, figure 6 (checked), denies it"
CONTROL = "dW in as many directions drawn at random; LoRA trained at the rank that dW is cut to"
SECONDS = 200
BASES = ("mid",)

RANKS = (4, 8, 12, 24, 48)  # that dW is cut to; a layer has 96 or more
ARMS = [full(base="mid"), lora(8, base="mid")]
CUT = 12  # an eighth of the width
SHARE = 0.9  # of the gain, and of the energy |dW|^2, that the cut change must have


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    """The fit; of full training the loss and the energy at each rank."""
    row = measure_fit(bench, ARMS, case)
    arm = arm_of(ARMS, case)
    if arm.method == "lora" or row["report"] is None:
        return row
    changes = bench.changes(arm, case["lr"], case["seed"])
    base = bench.base_weights("mid")

    def bits(cut: Mapping[str, np.ndarray]) -> float:
        moved = {name: (base[name] + dW).astype(np.float32) for name, dW in cut.items()}
        return bench.bits(bench.model_with("mid", base | moved))

    rng = np.random.default_rng(case["seed"])
    largest = {name: decompose(dW).U for name, (_, dW) in changes.items()}
    drawn = {name: random_directions(len(dW), 96, rng) for name, (_, dW) in changes.items()}
    row |= {"cut": [], "random": [], "energy": []}
    for r in RANKS:
        cut = {name: project(dW, largest[name][:, :r]) for name, (_, dW) in changes.items()}
        others = {name: project(dW, drawn[name][:, :r]) for name, (_, dW) in changes.items()}
        row["cut"].append(bits(cut))
        row["random"].append(bits(others))
        row["energy"].append(mean([energy(cut[n]) / energy(dW) for n, (_, dW) in changes.items()]))
    return row


def shares(rows: Sequence[Row], field: str) -> list[list[float]]:
    """By seed, the share of full training's gain at each rank."""
    result = []
    numbers = [at_best(rows, "full", name) for name in ("before", "report", field)]
    for before, after, values in zip(*numbers, strict=True):
        result.append([(before - value) / (before - after) for value in values])
    return result


def verdict(rows: Sequence[Row]) -> Verdict:
    place = RANKS.index(CUT)
    gain = [values[place] for values in shares(rows, "cut")]
    energy = [values[place] for values in at_best(rows, "full", "energy")]
    lead = differences(at_best(rows, "LoRA r=8"), at_best(rows, "full"))
    return decide(
        judge(f"share of the gain at rank {CUT} of 96", gain, at_least=SHARE),
        judge(f"share of the energy at rank {CUT} of 96", energy, at_least=SHARE),
        note=f"LoRA trained at rank 8 is {mean(lead):.3f} bits per byte from full training.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    def line(name: str, values: Sequence[Sequence[float]], **others: bool) -> Series:
        return series(name, RANKS, [mean(column) for column in zip(*values, strict=True)], **others)

    content = [
        line("gain", shares(rows, "cut")),
        line("energy of dW", at_best(rows, "full", "energy")),
        line("gain, random directions", shares(rows, "random"), control=True),
    ]
    title = "Full training's dW, cut to a rank"
    return [lines(title, "rank", "share", content, log="x", levels={"claimed": SHARE})]
