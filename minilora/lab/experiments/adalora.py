"""Which layers does AdaLoRA give its rank to?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..bench import Bench
from ..panels import Panel, heat, lines, series
from ..protocol import Arm, Case, Plan, Row, lora
from ..tuning import at_best, best_rate, curve, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, judge

CLAIM = "AdaLoRA gives its rank to the MLP and to the upper layers"
SOURCE = "Zhang et al. 2023, figure 3 (checked)"
CONTROL = "the same ranks shuffled among the layers"
SECONDS = 60
BASES = ("micro",)

RANK, MOST = 4, 6
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIELDS = {"r": RANK, "init_r": MOST, "lora_alpha": 64, "target_modules": "all-linear"}
ARM = Arm("AdaLoRA", "adalora", FIELDS)
ARMS = [ARM, lora(RANK)]
MARGIN = 0.5  # ranks by which a group of layers must exceed the other


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    row = measure_fit(bench, ARMS, case)
    if case["arm"] == ARM.name and row["report"] is not None:
        fit = bench.fit(ARM, case["lr"], case["seed"])
        # A run of three steps allocates nothing.
        row["ranks"] = fit.get("ranks") or {f"layers.0.mlp.{kind}": MOST for kind in KINDS}
        row["shuffled"] = lead(shuffled(row["ranks"], case["seed"]), "mlp")
    return row


def lead(ranks: Mapping[str, int], part: str) -> float:
    """The mean rank of the layers with this part in their names, less that of the others."""
    inside = [rank for name, rank in ranks.items() if f".{part}." in f".{name}."]
    outside = [rank for name, rank in ranks.items() if f".{part}." not in f".{name}."]
    return mean(inside) - (mean(outside) if outside else 0.0) if inside else 0.0


def shuffled(ranks: Mapping[str, int], seed: int) -> dict[str, int]:
    values = np.random.default_rng(seed).permutation(list(ranks.values())).tolist()
    return dict(zip(ranks, values, strict=True))


def verdict(rows: Sequence[Row]) -> Verdict:
    ranks = at_best(rows, ARM.name, "ranks")
    control = mean(at_best(rows, ARM.name, "shuffled"))
    return decide(
        judge(
            "rank of the MLP above attention's", [lead(r, "mlp") for r in ranks], at_least=MARGIN
        ),
        judge(
            "rank of the upper layer above the lower's", [lead(r, "1") for r in ranks], at_least=0
        ),
        note=f"Shuffled, the MLP's rank is {control:+.2f} above attention's.",
    )


def panels(rows: Sequence[Row]) -> list[Panel]:
    ranks = at_best(rows, ARM.name, "ranks")
    table = []
    for block in ("0", "1"):
        line = []
        for kind in KINDS:
            values = [r[name] for r in ranks for name in r if f".{block}." in name and kind in name]
            line.append(mean(values) if values else None)
        table.append(line)
    columns = [kind.removesuffix("_proj") for kind in KINDS]
    curves = []
    for arm in ARMS:
        rates, losses = curve(rows, arm.name)
        curves.append(series(arm.name, rates, losses, control=arm is not ARM))
    title = f"Mean rank at the end, {RANK} on average; rate {best_rate(rows, ARM.name):g}"
    return [
        heat(title, ["layer 0", "layer 1"], columns, table, digits=1),
        lines("Every rate", "learning rate", "bits per byte", curves, log="x"),
    ]
