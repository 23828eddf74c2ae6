"""How many numbers LoRA trains, what they take in memory and in files, and how tasks switch."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import Bench
from ..costs import llama_costs, measure_files, worked_example
from ..panels import Panel, bar, bars
from ..protocol import Case, Plan, Row
from ..verdicts import Verdict, decide, fact

CLAIM = "LoRA trains 0.1 to 1 % of a model, 8 GB hold one of 7 billion, and tasks switch at once"
SOURCE = "Hu et al. 2021, section 4.2; the worked example is by hand"
CONTROL = "after a switch to another adapter and back, every logit has the same bits"
SECONDS = 5
BASES = ("mid",)


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return [{"what": what} for what in ("example", "llama", "files")]


def measure(bench: Bench, case: Case) -> Row:
    if case["what"] == "llama":
        return llama_costs(bench.base("mid"))
    return worked_example() if case["what"] == "example" else measure_files(bench)


def verdict(rows: Sequence[Row]) -> Verdict:
    example, llama, files = rows
    right = [[3, 1, 6], [4, 5, 6], [5, 9, 6], [14, 9, 18]]
    percent = llama["percent"]
    usual = percent["q, v, r=8"]
    most = percent["all linear, r=64"]
    memory = llama["weights_gb"] + max(llama["state_gb"].values())
    share = 100 * files["adapter"] / files["base"]
    switched = files["same"] and files["is_other"]
    size = memory, "at most 8"
    return decide(
        fact("the worked example's four rows", example["merged"] == right),
        fact("114,688 of 786,432 numbers", example["trained"] == 114688),
        fact("percent trained, q and v, r = 8", 0.1 <= usual <= 1, usual, "0.1 to 1"),
        fact("percent trained, all layers, r = 64", 0.1 <= most <= 1, most, "0.1 to 1"),
        fact("GB of weights in NF4 and of all training state", memory <= 8, *size),
        fact("an adapter's file in percent of the base's", share < 10, share, "below 10"),
        fact("a switch and back gives the same bits", switched),
        note="Memory is a formula, without activations; small ranks stay below 0.1 %.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    llama = rows[1]
    names = list(llama["percent"])
    weights = [llama["weights_gb"]] * len(names)
    state = [llama["state_gb"][name] for name in names]
    labels = [name.replace(", r", "\nr") for name in names]
    share = bar("", list(llama["percent"].values()))
    parts = [bar("weights in NF4", weights), bar("adapter, gradient, moments", state)]
    levels = {"claimed at least": 0.1, "claimed at most": 1.0}
    title = "Trained numbers of Llama-2-7B"
    return [
        bars(title, "percent of all", labels, [share], levels=levels, log="y"),
        bars("Memory by formula", "GB", labels, parts, levels={"claimed": 8.0}),
    ]
