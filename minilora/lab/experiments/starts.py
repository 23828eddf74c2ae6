"""Does it matter how A and B start, once each start has its best learning rate?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...autograd import no_grad
from ..bench import Bench
from ..panels import Panel, bar, bars, lines, series
from ..protocol import Case, Plan, Row, lora
from ..tuning import arm_of, at_best, curve, differences, measure_fit, tuned
from ..verdicts import Verdict, decide, fact, interval, judge

CLAIM = "At tuned rates, all starts of LoRA end within 2 % of the plain one"
SOURCE = "Lee et al. 2026, abstract (checked); against it PiSSA, table 4 (checked), OLoRA, LoRA-GA"
CONTROL = "before the first step, every start computes what the base computes"
SECONDS = 150
BASES = ("micro",)

R = 8
PLAIN = "plain"
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
STARTS = {PLAIN: True, "normal": "gaussian", "orthogonal": "orthogonal", "PiSSA": "pissa"}
STARTS |= {"OLoRA": "olora", "EVA": "eva", "LoRA GA": "lora_ga", "stable GA": "lora_ga_stable"}
WITHIN = 2  # percent of the plain start's loss
LEAD = 1  # percent by which a start must be better for its paper's claim
SAME = 1e-5  # of the largest logit, by which a start may change one: float32
CLAIMED = ("PiSSA", "OLoRA", "LoRA GA")  # better than the plain start, their papers say
ARMS = [
    lora(R, name, fields={"init_lora_weights": value}, rates=RATES)
    for name, value in STARTS.items()
]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    """The fit, and the largest change of a logit by the start, relative to the largest logit."""
    arm = arm_of(ARMS, case)
    ids = bench.held_out(arm.task)["report"][None, :48]
    started = bench.prepare(arm, case["seed"]).eval()
    with no_grad():
        before, after = bench.base(arm.base)(ids).numpy(), started(ids).numpy()
    moved = float(np.abs(after - before).max() / np.abs(before).max())
    return measure_fit(bench, ARMS, case) | {"moved": moved}


def percent_above(rows: Sequence[Row], name: str) -> list[float]:
    """By seed: the loss of a start above the plain one's, each at its best rate, in percent."""
    plain = at_best(rows, PLAIN)
    above = differences(at_best(rows, name), plain)
    return [100 * bits / whole for bits, whole in zip(above, plain, strict=True)]


def verdict(rows: Sequence[Row]) -> Verdict:
    others = [percent_above(rows, name) for name in STARTS if name != PLAIN]
    farthest = [max(map(abs, values)) for values in zip(*others, strict=True)]
    moved = max(row["moved"] for row in rows)
    parts = [judge("percent between plain and the farthest start", farthest, at_most=WITHIN)]
    for name in CLAIMED:
        better = [-percent for percent in percent_above(rows, name)]
        parts.append(judge(f"percent by which {name} is better", better, at_most=LEAD))
    is_same, limit = moved <= SAME, f"at most {SAME:g}"
    parts.append(fact("largest change of a logit by a start", is_same, moved, limit))
    return decide(*parts, note=f"At one rate for all, PiSSA is better by {untuned(rows, 'PiSSA')}.")


def untuned(rows: Sequence[Row], name: str) -> str:
    """By how many percent a start is better than the plain one at the ends of the grid."""
    plain, other = (dict(zip(*curve(rows, arm), strict=True)) for arm in (PLAIN, name))
    both = [rate for rate in (RATES[0], RATES[-1]) if rate in plain and rate in other]
    return " and ".join(f"{100 * (1 - other[r] / plain[r]):+.1f} % at {r:g}" for r in both)


def panels(rows: Sequence[Row]) -> list[Panel]:
    curves = []
    for name in STARTS:
        rates, losses = curve(rows, name)
        curves.append(series(name, rates, losses, control=name == PLAIN))
    others = [name for name in STARTS if name != PLAIN]
    results = [interval(percent_above(rows, name)) for name in others]
    content = bar("", [middle for middle, _ in results], spread=[half for _, half in results])
    labels = [name.replace("ogo", "-\nogo").replace(" ", "\n") for name in others]
    limits = {"levels": {"claimed at most": float(WITHIN)}}
    return [
        lines("Every rate", "learning rate", "bits per byte", curves, log="x"),
        bars("At best rates", "percent above the plain start", labels, [content], **limits),
    ]
