"""Running an experiment: rows in order for any number of workers, resumed, and failing in part."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from minilora.errors import FormatError
from minilora.formats import write_json
from minilora.lab import running
from minilora.lab.panels import lines, series
from minilora.lab.protocol import Plan
from minilora.lab.running import describe_results, run_experiment
from minilora.lab.store import Store
from minilora.lab.verdicts import decide, judge
from minilora.training.pool import Here, Pool

PLAN = Plan(quick=True)


class Threads(Pool):
    """Workers that end in any order."""

    def __init__(self, width):
        self.width = width
        self.executor = ThreadPoolExecutor(width)

    def submit(self, work, /, *args, **options) -> Future:
        return self.executor.submit(work, *args, **options)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.executor.shutdown(wait, cancel_futures=cancel_futures)


def make_experiment(measure):
    """Six cases at first, and two more that depend on the first results."""

    def cases(plan, rows):
        first = [{"n": n} for n in range(6)]
        if len(rows) < 6:
            return first
        best = max(rows[:6], key=lambda row: row["value"])["n"]
        return [*first, {"n": 100 + best}, {"n": 200 + best}]

    return SimpleNamespace(
        CLAIM="numbers grow",
        SOURCE="arithmetic",
        CONTROL="none",
        SECONDS=1,
        BASES=(),
        cases=cases,
        measure=measure,
        verdict=lambda rows: decide(judge("value", [row["value"] for row in rows], at_least=0)),
        panels=lambda rows: [
            lines("t", "n", "value", [series("", range(len(rows)), [r["value"] for r in rows])])
        ],
    )


def square(bench, case):
    time.sleep(0.002 * (6 - case["n"] % 7))  # the first ones take longest
    return {"value": float(case["n"] ** 2)}


@pytest.fixture
def claimed(monkeypatch):
    """A function that gives a store in which the experiment `toy` measures by a function."""

    def make(folder, measure=square):
        folder.mkdir(exist_ok=True)
        monkeypatch.setitem(running.EXPERIMENTS, "toy", make_experiment(measure))
        store = Store(folder)
        store.claim({"quick": True})
        return store

    return make


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Stores that need no texts, and no pictures, which take most of the time."""
    monkeypatch.setattr("minilora.lab.store.WORDS", {"quick": "the size"})
    monkeypatch.setattr(running.plots, "why_unavailable", lambda: "not in this test")


def content(store):
    return {
        file.relative_to(store.folder): file.read_bytes()
        for file in store.folder.rglob("*")
        if file.is_file() and file.name != "seconds.json"
    }


def test_run_experiment_asks_again_with_the_rows(tmp_path, claimed):
    outcome = run_experiment("toy", claimed(tmp_path), PLAN, Here())
    assert [row["n"] for row in outcome.results["rows"]] == [0, 1, 2, 3, 4, 5, 105, 205]
    assert outcome.measured == 8
    assert outcome.results["verdict"]
    assert "numbers grow" in outcome.results["claim"]


def test_run_experiment_writes_the_same_bytes_for_any_number_of_workers(tmp_path, claimed):
    written = []
    for width in (1, 3, 8):
        store = claimed(tmp_path / str(width))
        with Threads(width) as pool:
            run_experiment("toy", store, PLAN, pool)
        written.append(content(store))
    assert written[0] == written[1] == written[2]


def test_run_experiment_does_not_repeat_what_is_there(tmp_path, claimed):
    store = claimed(tmp_path)
    run_experiment("toy", store, PLAN, Here())
    before = content(store)
    store = claimed(tmp_path, None)  # calling it would fail
    assert run_experiment("toy", store, PLAN, Here()).measured == 0
    assert content(store) == before


@pytest.mark.parametrize("result", [{}, {"value": "x"}])
@pytest.mark.parametrize("case", [{"n": 2}, {"n": 205}])
def test_run_experiment_refuses_results_that_it_did_not_write(tmp_path, claimed, case, result):
    """As a version has them whose cases had other results: the folder to remove is named."""
    store = claimed(tmp_path)
    run_experiment("toy", store, PLAN, Here())
    store.write_case("toy", case, result, 1.0)
    before = content(store)
    with pytest.raises(FormatError, match=r"toy/cases' is not as .* measured again"):
        run_experiment("toy", store, PLAN, Here())
    assert content(store) == before


@pytest.mark.parametrize("lost", [0, 3, 6, 7])
def test_run_experiment_resumes_after_any_case_with_the_same_bytes(tmp_path, claimed, lost):
    whole = claimed(tmp_path / "whole")
    run_experiment("toy", whole, PLAN, Here())
    calls = []

    def dies(bench, case):
        if len(calls) == lost:
            raise KeyboardInterrupt
        calls.append(case)
        return square(bench, case)

    store = claimed(tmp_path / "killed", dies)
    with pytest.raises(KeyboardInterrupt):
        run_experiment("toy", store, PLAN, Here())
    assert store.read_results("toy") is None
    store = claimed(tmp_path / "killed")
    assert run_experiment("toy", store, PLAN, Here()).measured == 8 - lost
    assert content(store) == content(whole)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_run_experiment_loses_one_case_and_not_the_run(tmp_path, claimed, error):
    def fails(bench, case):
        if case["n"] == 2:
            raise error
        return square(bench, case)

    store = claimed(tmp_path, fails)
    outcome = run_experiment("toy", store, PLAN, Here())
    assert outcome.results is None
    assert list(outcome.failures) == ["{'n': 2}"]
    assert outcome.measured == 5  # what depends on the rows waits for the next run
    outcome = run_experiment("toy", claimed(tmp_path), PLAN, Here())
    assert outcome.measured == 3
    assert not outcome.failures


def test_run_experiment_loses_one_case_when_the_disk_is_full(tmp_path, claimed, monkeypatch):
    store = claimed(tmp_path)
    write = Store.write_case

    def full(self, experiment, case, result, seconds):
        if case["n"] == 3:
            raise OSError(28, "No space left on device")
        write(self, experiment, case, result, seconds)

    monkeypatch.setattr(Store, "write_case", full)
    outcome = run_experiment("toy", store, PLAN, Here())
    assert list(outcome.failures) == ["{'n': 3}"]
    assert outcome.failures["{'n': 3}"]["exit_code"] == 4
    assert outcome.measured == 5


def test_run_experiment_prints_where_an_unforeseen_error_came_from(tmp_path, claimed, capsys):
    def wrong(bench, case):
        return {"value": 1 / (case["n"] - 4)}

    outcome = run_experiment("toy", claimed(tmp_path, wrong), PLAN, Here())
    assert list(outcome.failures) == ["{'n': 4}"]
    assert "in wrong" in capsys.readouterr().err


def test_run_experiment_refuses_a_worker_on_another_machine(tmp_path, claimed, monkeypatch):
    store = claimed(tmp_path)
    write_json(tmp_path / "lab.json", {"machine": running.describe_machine()})
    other = running.describe_machine() | {"processor": "another"}
    monkeypatch.setattr(running, "describe_machine", lambda: other)
    outcome = run_experiment("toy", store, PLAN, Here())
    assert outcome.measured == 0
    reason = outcome.failures["{'n': 0}"]["reason"]
    assert "another" in reason
    assert "start workers on equal machines" in reason


def test_run_experiment_stops_when_a_signal_came(tmp_path, claimed):
    stopped = []

    def measure(bench, case):
        if case["n"] == 2:
            stopped.append(15)
        return square(bench, case)

    store = claimed(tmp_path, measure)
    outcome = run_experiment("toy", store, PLAN, Here(), stopped)
    assert outcome.results is None
    assert outcome.measured == 3


def test_run_experiment_draws_a_picture_that_names_its_results(tmp_path, claimed, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    monkeypatch.setattr("minilora.lab.store.WORDS", {"quick": "the size"})
    store = claimed(tmp_path)
    run_experiment("toy", store, PLAN, Here())
    digest = hashlib.sha256(store.results_file("toy").read_bytes()).hexdigest()
    picture = store.picture_file("toy").read_bytes()
    assert digest.encode() in picture
    assert len(picture) < 40_000


def test_describe_results_begins_with_the_verdict(tmp_path, claimed):
    outcome = run_experiment("toy", claimed(tmp_path), PLAN, Here())
    first, second, *_ = describe_results(outcome.results)
    assert first.startswith("toy: ")
    assert "value" in second
    assert "claimed at least 0" in second
