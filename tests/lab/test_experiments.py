"""Every experiment in its quick form: cases, results that are JSON, a verdict, a picture's data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.lab import experiments as folder
from minilora.lab.experiments import EXPERIMENTS
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
