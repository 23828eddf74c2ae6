"""Can one adapter serve several tasks, and can the adapters of several be added up?"""

from __future__ import annotations

from collections.abc import Sequence

from ...models.transformer import CausalLM
from ..bench import Bench, interpolate
from ..panels import Panel, bar, bars
from ..protocol import Case, Plan, Row, lora
from ..tuning import arm_of, at_best, best_rate, differences, mean, measure_fit, tuned_then
from ..verdicts import Verdict, decide, judge

CLAIM = "One adapter serves several tasks as well as one adapter for each task"
SOURCE = "said in courses on LoRA; Ilharco et al. 2023 for sums (not checked)"
CONTROL = "the base itself; equal rank beside equal numbers of parameters"
SECONDS = 300
BASES = ("micro",)

TASKS = ("python", "c", "charmap", "json")
RANKS = (1, 4)
SHARES = (0.25, 0.5, 1.0)  # of each task's dW in the sum
EQUAL = 0.05  # bits per byte, the mean over the tasks, that count as equal
MIXED = {"task": "+".join(TASKS), "settings": {"batch_size": 32}}  # as many of each task as alone
ARMS = [lora(r, f"{task} r={r}", task=task) for r in RANKS for task in TASKS]
ARMS += [lora(r, f"shared r={r}", **MIXED) for r in (1, 4, 16)]


def cases(plan: Plan, rows: Sequence[Row]) -> list[Case]:
    """Those of the arms, and then the sums of the best ones."""

    def sums(known: Sequence[Row]) -> list[Case]:
        rates = {r: [best_rate(known, f"{task} r={r}") for task in TASKS] for r in RANKS}
        seeds = plan.seeds
        return [{"arm": f"sum r={r}", "rates": rates[r], "seed": s} for r in RANKS for s in seeds]

    return tuned_then(plan, rows, ARMS, sums)


def measure(bench: Bench, case: Case) -> Row:
    """The fit; of what serves all tasks also the bits per byte of each."""

    def by_task(model: CausalLM, part: str = "report") -> list[float]:
        return [bench.bits(model, part, task) for task in TASKS]

    if "lr" in case:
        row = measure_fit(bench, ARMS, case)
        if case["arm"].startswith("shared"):
            model = bench.trained(arm_of(ARMS, case), case["lr"], case["seed"])
            row["tasks"] = by_task(model)
        return row
    before = total = bench.base_weights("micro")
    for task, rate in zip(TASKS, case["rates"], strict=True):
        arm = lora(int(case["arm"].rpartition("=")[2]), task=task)
        after = bench.trained_weights(arm, rate, case["seed"])
        total = {name: W + after[name] - before[name] for name, W in total.items()}
    models = [bench.model_with("micro", interpolate(before, total, share)) for share in SHARES]
    best = min(models, key=lambda model: mean(by_task(model, "tune")))
    return {"share": SHARES[models.index(best)], "tasks": by_task(best)}


def means(rows: Sequence[Row], way: str, r: int) -> list[float]:
    """By seed, the mean bits per byte over the tasks: one adapter each, a shared one, or a sum."""
    if way == "one each":
        every = [at_best(rows, f"{task} r={r}") for task in TASKS]
        return [mean(bits) for bits in zip(*every, strict=True)]
    if way == "sum":
        return [mean(row["tasks"]) for row in rows if row["arm"] == f"sum r={r}"]
    return [mean(bits) for bits in at_best(rows, f"{way} r={r}", "tasks")]


def verdict(rows: Sequence[Row]) -> Verdict:
    parts = []
    for r, shared in ((4, 4), (4, 16), (1, 4)):  # equal rank, and twice equal parameters
        lost = differences(means(rows, "shared", shared), means(rows, "one each", r))
        what = f"bits that one of r = {shared} loses to four of r = {r}"
        parts.append(judge(what, lost, at_most=EQUAL))
    lost = differences(means(rows, "sum", 4), means(rows, "one each", 4))
    return decide(*parts, judge("bits that the best sum of r = 4 loses", lost, at_most=EQUAL))


def panels(rows: Sequence[Row]) -> list[Panel]:
    content, ranks = [], (1, 4, 16)
    for way in ("one each", "shared", "sum"):
        known = ranks if way == "shared" else RANKS
        content.append(bar(way, [mean(means(rows, way, r)) if r in known else None for r in ranks]))
    base = mean([mean(at_best(rows, f"{task} r=1", "before")) for task in TASKS])
    others = {"levels": {"base": base}, "zoom": True}
    labels = [f"r = {r}" for r in ranks]
    return [bars("Mean of four tasks", "bits per byte", labels, content, **others)]
