"""Every experiment in its quick form: cases, results that are JSON, a verdict, a picture's data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.lab import experiments as folder
from minilora.lab.experiments import EXPERIMENTS, family, intrinsic, loftq, sharing, starts
from minilora.lab.protocol import BASES
from minilora.lab.running import summarize_rates
from minilora.lab.verdicts import FAILS, HOLDS, PARTLY, cannot_tell
from minilora.threads import one_blas_thread

VERDICTS = {HOLDS, FAILS, PARTLY, cannot_tell(2), cannot_tell(1)}
MOST_LINES = 92


def rows_of(experiment, bench):
    """All rows, as the runner comes to them; each has been through JSON."""
    known, rows = {}, []
    while True:
        cases = experiment.cases(bench.plan, rows)
        for case in cases:
            key = json.dumps(case)
            if key not in known:
                row = case | experiment.measure(bench, dict(case))
                known[key] = json.loads(json.dumps(row, allow_nan=False))
        if len(cases) == len(rows):
            return rows
        rows = [known[json.dumps(case)] for case in cases]


def test_experiments_are_all_in_the_table():
    files = {file.stem for file in Path(folder.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(EXPERIMENTS) == files


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_says_what_it_measures(name):
    experiment = EXPERIMENTS[name]
    for text in (experiment.CLAIM, experiment.SOURCE, experiment.CONTROL):
        assert text
        assert not text.endswith(".")
    assert set(experiment.BASES) <= set(BASES)
    assert experiment.SECONDS > 0
    source = Path(experiment.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_quick_comes_to_a_verdict(name, bench, monkeypatch):
    experiment = EXPERIMENTS[name]
    bases = set()
    make = bench.make_base
    monkeypatch.setattr(bench, "make_base", lambda base: bases.add(base) or make(base))
    monkeypatch.setattr(bench, "_bases", {})
    with one_blas_thread():  # as in a pool
        rows = rows_of(experiment, bench)
    assert bases <= set(experiment.BASES)  # which the runner makes before the cases
    verdict = experiment.verdict(rows)
    assert verdict["verdict"] in VERDICTS
    assert len(verdict["parts"]) >= 2
    panels = experiment.panels(rows)
    json.dumps([verdict, panels, summarize_rates(rows)], allow_nan=False)
    is_control_shown = any(
        panel.get("levels") or any(line.get("control") for line in panel.get("series", []))
        for panel in panels
    )
    assert is_control_shown or name in ("dora", "subspaces")  # theirs are in titles and panels
    assert 1 <= len(panels) <= 4


# ---- rules of verdicts ---------------------------------------------------------------------------


def tuned_rows(arm, loss, **others):
    """The rows of an arm whose best rate, 2, has this loss and a little more with each seed."""
    return [
        {"arm": arm, "lr": lr, "seed": seed, "before": 3.0, **others}
        | dict.fromkeys(("tune", "report"), loss + 0.001 * seed + abs(lr - 2.0))
        for lr in (1.0, 2.0, 4.0)
        for seed in (0, 1, 2)
    ]


def verdicts_of(verdict):
    return [part["verdict"] for part in verdict["parts"]]


def rows_of_starts(losses, moved=1e-7):
    rows = []
    for name in starts.STARTS:
        rows += tuned_rows(name, losses.get(name, 2.0), moved=moved)
    return rows


def test_starts_verdict_holds_if_all_are_level():
    assert set(verdicts_of(starts.verdict(rows_of_starts({"EVA": 2.03})))) == {HOLDS}


@pytest.mark.parametrize(
    ("losses", "moved", "expected"),
    [
        ({"normal": 2.06}, 0.0, [FAILS, HOLDS, HOLDS, HOLDS, HOLDS]),
        ({"normal": 1.94}, 0.0, [FAILS, HOLDS, HOLDS, HOLDS, HOLDS]),
        ({"OLoRA": 1.97}, 0.0, [HOLDS, HOLDS, FAILS, HOLDS, HOLDS]),
        ({}, 1e-3, [HOLDS, HOLDS, HOLDS, HOLDS, FAILS]),
    ],
)
def test_starts_verdict_notices_each_part(losses, moved, expected):
    assert verdicts_of(starts.verdict(rows_of_starts(losses, moved))) == expected


def test_starts_measure_notices_a_base_that_was_not_corrected(bench, monkeypatch):
    """PiSSA's B A beside the whole W: the first output is another one."""
    case = {"arm": "PiSSA", "lr": 1e-3, "seed": 0}
    assert starts.measure(bench, case)["moved"] < starts.SAME
    prepare = bench.prepare

    def uncorrected(arm, seed):
        model = prepare(arm, seed)
        weights = bench.base_weights(arm.base)
        for path, module in model.get_base_model().named_modules():
            if f"{path}.weight" in weights and hasattr(module, "adapters"):
                module.base_layer.weight.data = weights[f"{path}.weight"]
        return model

    monkeypatch.setattr(bench, "prepare", uncorrected)
    assert starts.measure(bench, case)["moved"] > 1e-2


def rows_of_intrinsic(shares, shuffled=2.9):
    """Full training gains one bit; `shares` of it by d, and the loss of shuffled weights."""
    rows = tuned_rows("full", 2.0) + tuned_rows(f"{intrinsic.CONTROL_BASE} full", 2.5)
    for d in intrinsic.SIZES:
        rows += tuned_rows(f"micro d={d}", 3.0 - shares.get(d, 0.0))
    for d in intrinsic.CONTROL_SIZES:
        rows += tuned_rows(f"{intrinsic.CONTROL_BASE} d={d}", shuffled)
    return rows


@pytest.mark.parametrize(
    ("shares", "shuffled", "expected", "dimension"),
    [
        ({500: 0.95, 10_000: 1.0}, 2.9, [HOLDS, HOLDS], "100 to 500"),
        ({500: 0.5, 50_000: 0.95}, 3.9, [FAILS, HOLDS], "10,000 to 50,000"),
        ({500: 0.95, 10_000: 1.0}, 2.1, [HOLDS, FAILS], "100 to 500"),
        ({10: 1.0}, 3.9, [FAILS, HOLDS], "at most 10"),
        ({}, 3.9, [FAILS, HOLDS], "more than 50,000"),
    ],
)
def test_intrinsic_verdict_and_dimension(shares, shuffled, expected, dimension):
    verdict = intrinsic.verdict(rows_of_intrinsic(shares, shuffled))
    assert verdicts_of(verdict) == expected
    assert f"takes {dimension} numbers" in verdict["note"]


def test_family_verdict_says_which_methods_lead_by_the_margin():
    losses = {"HiRA": 1.95, "MiSS": 1.99, "LoRA r=16": 1.9, "LoRA r=1": 2.1}
    rows = []
    for arm in family.ARMS:
        rows += tuned_rows(arm.name, losses.get(arm.name, 2.0), trained=100)
    verdict = family.verdict(rows)
    leading = {part["what"] for part in verdict["parts"] if part["verdict"] == HOLDS}
    assert leading == {"bits by which HiRA is better"}
    assert len(verdict["parts"]) == len(family.OTHERS)
    assert "-0.100 for r = 1 and +0.100 for r = 16" in verdict["note"]
    heat, dots = family.panels(rows)
    assert heat["values"][heat["rows"].index("HiRA")] == pytest.approx([0.05] * 3)
    assert dots["series"][1]["control"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (2.9, 1.99, [HOLDS, HOLDS]),
        (2.9, 2.0, [HOLDS, FAILS]),
        (3.1, 1.99, [FAILS, HOLDS]),
    ],
)
def test_loftq_verdict_compares_before_and_after_training(before, after, expected):
    rows = tuned_rows(loftq.DENSE, 1.98) + tuned_rows(loftq.ZERO, 2.0)
    rows += [row | {"before": before} for row in tuned_rows(loftq.LOFTQ, after)]
    verdict = loftq.verdict(rows)
    assert verdicts_of(verdict) == expected
    assert "+0.020 bits above" in verdict["note"]
    zero, start = loftq.panels(rows)[0]["series"]
    assert zero["y"] == pytest.approx([0.0, 0.02])
    assert start["y"] == pytest.approx([before - 3.0, after - 1.98])


@pytest.mark.parametrize(
    ("shared", "both", "expected"),
    [
        (2.1, 1.9, [HOLDS, HOLDS]),
        (1.9, 1.9, [HOLDS, FAILS]),
        (2.1, 2.05, [FAILS, HOLDS]),
    ],
)
def test_sharing_verdict_compares_both_with_each_form(shared, both, expected):
    """One adapter for each task: 1.7, 1.9, 2.1 and 2.3 bits, and 2 in the mean."""
    rows = []
    for place, task in enumerate(sharing.TASKS):
        rows += tuned_rows(task, 1.7 + 0.2 * place, trained=4)
    for way, loss in ((sharing.SHARED, shared), (sharing.BOTH, both), (sharing.FULL, 1.8)):
        tasks = [loss - 0.3, loss - 0.1, loss + 0.1, loss + 0.3]
        rows += tuned_rows(way, loss, tasks=tasks, trained=16)
    verdict = sharing.verdict(rows)
    assert verdicts_of(verdict) == expected
    assert f"ends {1.8 - both:+.3f} bits" in verdict["note"]
    whole, each = sharing.panels(rows)
    assert whole["series"][0]["y"] == pytest.approx([2.001, shared, both])
    assert each["series"][0]["y"] == pytest.approx([1.701, 1.901, 2.101, 2.301])
    assert each["series"][3]["control"]
