"""An adapter for all tasks, one for each, or both: which learns more from equally many numbers?"""

from __future__ import annotations

from collections.abc import Sequence

from ...lora import LoraConfig, get_multitask_model
from ..bench import Bench
from ..panels import Panel, bar, bars
from ..protocol import Arm, Case, Plan, Row, full, lora
from ..tuning import arm_of, at_best, differences, mean, measure_fit, tuned
from ..verdicts import Verdict, decide, interval, judge
from .interference import MIXED, TASKS

CLAIM = "An adapter for all tasks and one for each, added up, learn more than either form alone"
SOURCE = "Yang et al. 2024, abstract (checked): in one adapter for all tasks these interfere"
CONTROL = "training of all weights, once for all tasks"
SECONDS = 160
BASES = ("micro",)

EACH, SHARED, BOTH, FULL = "one each, r = 4", "shared, r = 16", "both, r = 4 + 3", "all weights"
ALONE = [lora(4, task, task=task) for task in TASKS]
TOGETHER = [lora(16, SHARED, **MIXED), lora(4, BOTH, **MIXED), full(FULL, "full", **MIXED)]
ARMS = [*ALONE, *TOGETHER]  # equally many numbers for the tasks together, but for all weights
BETTER = 0.02  # bits per byte, the mean over the tasks, that count as learning more


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    return tuned(plan, rows, ARMS)


def measure(bench: Bench, case: Case) -> Row:
    """The fit; of what serves all tasks also the bits per byte of each."""
    arm = arm_of(ARMS, case)
    if case["arm"] == BOTH:
        return _measure_both(bench, arm, case)
    row = measure_fit(bench, ARMS, case)
    if case["arm"] not in TASKS and row["report"] is not None:
        model = bench.trained(arm, case["lr"], case["seed"])
        row["tasks"] = [bench.bits(model, "report", task) for task in TASKS]
    return row


def _measure_both(bench: Bench, arm: Arm, case: Case) -> Row:
    for_each = dict.fromkeys(TASKS, LoraConfig(**{**arm.fields, "r": 3}))
    model = get_multitask_model(
        bench.base(arm.base), for_each, LoraConfig(**arm.fields), seed=case["seed"]
    )
    trained = sum(p.size for p in model.parameters() if p.requires_grad)
    bits = bench.fit_tasks(model, arm, case["lr"], case["seed"])
    both = {part: mean(values) for part, values in bits.items()}
    return {**both, "trained": trained, "tasks": bits["report"]}


def by_task(rows: Sequence[Row], way: str) -> list[list[float]]:
    """By seed, the bits per byte of each task."""
    if way == EACH:
        return [list(bits) for bits in zip(*(at_best(rows, task) for task in TASKS), strict=True)]
    return at_best(rows, way, "tasks")


def means(rows: Sequence[Row], way: str) -> list[float]:
    return [mean(bits) for bits in by_task(rows, way)]


def verdict(rows: Sequence[Row]) -> Verdict:
    parts = []
    for way in (EACH, SHARED):
        won = differences(means(rows, way), means(rows, BOTH))
        parts.append(judge(f"bits that both win over {way}", won, at_least=BETTER))
    above = mean(differences(means(rows, FULL), means(rows, BOTH)))
    return decide(*parts, note=f"Training all weights ends {above:+.3f} bits above both.")


def panels(rows: Sequence[Row]) -> list[Panel]:
    ways = (EACH, SHARED, BOTH)
    results = [interval(means(rows, way)) for way in ways]
    whole = bar("", [m for m, _ in results], spread=[half for _, half in results])
    labels = [way.replace(", ", "\n") for way in ways]
    levels = {FULL: mean(means(rows, FULL))}
    content = []
    for way in (*ways, FULL):
        each = [mean(bits) for bits in zip(*by_task(rows, way), strict=True)]
        content.append(bar(way, each, control=way == FULL))
    y = "bits per byte"
    return [
        bars("Mean of four tasks", y, labels, [whole], levels=levels, zoom=True),
        bars("By task", y, TASKS, content),
    ]
