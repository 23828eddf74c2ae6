"""Which four bits lose least, does LoRA make up for it, and what may an adapter be merged onto?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...quant.codes import KINDS
from ...quant.linear import dequantize, quantize
from ..bench import Bench, Weights, linear_names
from ..panels import Panel, bar, bars
from ..protocol import Case, Plan, Row, lora
from ..tuning import arm_of, at_best, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, interval, judge

CLAIM = "NF4 loses least of the four-bit types, LoRA makes up for it, and the merge costs nothing"
SOURCE = "Dettmers et al. 2023, table 2 (checked)"
CONTROL = "int8, where every merge is level"
SECONDS = 200
BASES = ("micro",)

DENSE = "none"
ARMS = [lora(8, kind, quantize=kind) for kind in (DENSE, *KINDS)]
MADE_UP = 0.01  # bits per byte that count as making up for the codes
LEVEL = 0.003  # bits per byte that a merge may add
MERGES = {
    "onto the decoded codes": "onto_decoded",
    "onto the first weights": "onto_first",
    "decoded, in codes again": "decoded_again",
    "first, in codes again": "first_again",
}


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    """The fit, the codes' error, the coded base, and what the four merges lose."""
    row = measure_fit(bench, ARMS, case)
    if case["arm"] == DENSE or row["report"] is None:
        return row
    kind = case["arm"]
    first = bench.base_weights("micro")
    model = dequantize(quantize(bench.base("micro"), kind))
    decoded = {name: p.numpy() for name, p in model.named_parameters()}
    names = linear_names(first)
    errors = [np.linalg.norm(decoded[n] - first[n]) / np.linalg.norm(first[n]) for n in names]
    merged = bench.trained_weights(
        arm_of(ARMS, case), case["lr"], case["seed"]
    )  # onto the decoded weights
    moved: Weights = {name: first[name] + (merged[name] - decoded[name]) for name in first}
    for name, weights in (("decoded", merged), ("first", moved)):
        row[f"onto_{name}"] = bench.bits(bench.model_with("micro", weights))
        row[f"{name}_again"] = bench.bits(quantize(bench.model_with("micro", weights), kind))
    return row | {"error": mean([float(error) for error in errors])}


def added(rows: Sequence[Row], kind: str, merge: str) -> list[float]:
    """Bits per byte that a merge adds to the loss of the trained model, by seed."""
    return differences(at_best(rows, kind, merge), at_best(rows, kind))


def verdict(rows: Sequence[Row]) -> Verdict:
    error = differences(at_best(rows, "nf4", "error"), at_best(rows, "fp4", "error"))
    gap = differences(at_best(rows, "nf4"), at_best(rows, DENSE))
    control = [max(map(abs, added(rows, "int8", m))) for m in MERGES.values()]
    return decide(
        judge("error of NF4 less that of FP4", error, at_most=0),
        judge("bits that LoRA over NF4 loses", gap, at_most=MADE_UP),
        judge("merged onto the decoded codes", added(rows, "nf4", "onto_decoded"), at_most=LEVEL),
        judge("merged onto the first weights", added(rows, "nf4", "onto_first"), at_most=LEVEL),
        judge("in codes again", added(rows, "nf4", "decoded_again"), at_most=LEVEL),
        note=f"No merge over int8 adds more than {max(control):.4f} bits per byte.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    before = bar("base", [mean(at_best(rows, kind, "before")) for kind in KINDS])
    results = [interval(at_best(rows, kind)) for kind in KINDS]
    after = bar("with LoRA", [m for m, _ in results], spread=[half for _, half in results])
    levels = {"LoRA over float32": mean(at_best(rows, DENSE))}
    content = []
    for kind in KINDS:
        values = [mean(added(rows, kind, merge)) for merge in MERGES.values()]
        content.append(bar(kind, values, control=kind == "int8"))
    labels = [name.replace(" ", "\n") for name in MERGES]
    return [
        bars("Coded bases", "bits per byte", KINDS, [before, after], levels=levels, zoom=True),
        bars("What a merge adds", "bits per byte", labels, content),
    ]
