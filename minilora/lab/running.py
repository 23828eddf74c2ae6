"""Experiments run: cases that are missing go to a pool, rows come to a verdict and a picture."""

from __future__ import annotations

import functools
import hashlib
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..display import printable
from ..errors import ConfigError, MiniloraError
from ..formats.disk import JsonObject
from ..progress import progress_bar
from ..training.pool import Pool, completed
from ..training.sweep import describe_failure
from . import plots
from .bench import Bench
from .experiments import EXPERIMENTS
from .protocol import Case, Plan, Row
from .store import Store, describe_machine, expecting, rows_in_order
from .tuning import best_rate, is_at_edge, rates_of
from .verdicts import describe_part


class Work(NamedTuple):
    """A case for a worker: everything that it needs, wherever it runs. No case: a base.

    machine   what `describe_machine` must say there, if the store's numbers are of one machine
    """

    folder: str
    plan: Plan
    machine: JsonObject | None
    name: str
    case: Case | None


class Outcome(NamedTuple):
    """What an experiment came to; `results` is None unless all of its cases were measured."""

    results: JsonObject | None
    failures: dict[str, JsonObject]
    measured: int


def measure(work: Work) -> tuple[Row, float]:
    """(result, seconds) of a case; it depends on the case and the plan alone.

    ConfigError on another machine than the one whose numbers the store has.
    """
    if work.machine not in (None, describe_machine()):
        this, first = (", ".join(m.values()) for m in (describe_machine(), work.machine or {}))
        raise ConfigError(
            f"a worker computes on {this}, but the results are of {first}: "
            "start workers on equal machines"
        )
    begun = time.perf_counter()
    bench = _bench(work.folder, work.plan)
    if work.case is None:
        bench.make_base(work.name)
        return {}, time.perf_counter() - begun
    result = EXPERIMENTS[work.name].measure(bench, work.case)
    return result, time.perf_counter() - begun


@functools.cache
def _bench(folder: str, plan: Plan) -> Bench:
    """One bench per process: it keeps the bases in memory."""
    return Bench(folder, plan)


def run_experiment(
    name: str,
    store: Store,
    plan: Plan,
    pool: Pool,
    stopped: Sequence[int] = (),
    say: Callable[[str], None] = print,
    title: str = "",
) -> Outcome:
    """Measure the cases that the store lacks, and write results and picture once it has all.

    A case that fails is reported, and the others go on: the next run tries it again. As soon as
    `stopped` has an item the running cases are asked to end. `title` is that of the progress bar.
    """
    experiment = EXPERIMENTS[name]
    title = title or name
    failures = _make_bases(experiment.BASES, store, plan, pool, stopped, title)
    measured = 0
    machine = store.surroundings().get("machine")
    with progress_bar(desc=title, unit="case", dynamic_ncols=True) as bar:
        while not failures and not stopped:
            cases = store.folder / name / "cases"
            with expecting(cases, "remove the folder, and its cases are measured again"):
                rows, missing = _look(experiment, store, name, plan)
                results = None if missing else _conclude(experiment, store, name, rows)
            if results is not None:
                place = store.write_results(name, results)
                draw_results(place, results, store.picture_file(name), say)
                return Outcome(results, {}, measured)
            bar.total = len(rows) + len(missing)
            bar.n = len(rows)
            bar.refresh()
            works = [Work(str(store.folder), plan, machine, name, case) for case in missing]
            for work, future in completed(pool, measure, works, stopped):
                case = work.case or {}
                try:
                    store.write_case(name, case, *future.result())
                except Exception as error:
                    failures[str(case)] = _failure(error)
                else:
                    measured += 1
                    bar.update()
    return Outcome(None, failures, measured)


def _make_bases(
    names: Sequence[str],
    store: Store,
    plan: Plan,
    pool: Pool,
    stopped: Sequence[int],
    title: str,
) -> dict[str, JsonObject]:
    """Make the bases that the store lacks; returns the failures."""
    folder = str(store.folder)
    bench = _bench(folder, plan)
    missing = [name for name in names if not bench.has_base(name)]
    machine = store.surroundings().get("machine")
    works = [Work(folder, plan, machine, name, None) for name in missing]
    failures = {}
    with progress_bar(total=len(works), desc=f"{title}, bases", unit="base") as bar:
        for work, future in completed(pool, measure, works, stopped):
            error = future.exception()
            if error is not None:
                failures[f"base {work.name}"] = _failure(error)
            bar.update()
    return failures


def _failure(error: BaseException) -> JsonObject:
    """The failure in short; an error that nobody foresaw is printed whole, with its place."""
    if not isinstance(error, MiniloraError | OSError | MemoryError | BrokenExecutor):
        traceback.print_exception(error)
    return describe_failure(error)


def _look(experiment: Any, store: Store, name: str, plan: Plan) -> tuple[list[Row], list[Case]]:
    """(rows, cases to measure): which cases are wanted may depend on known rows."""
    rows: list[Row] = []
    while True:
        cases = experiment.cases(plan, rows)
        known, missing = rows_in_order(store, name, cases)
        if missing or len(known) == len(rows):
            return known, missing
        rows = known


def _conclude(experiment: Any, store: Store, name: str, rows: Sequence[Row]) -> JsonObject:
    """What an experiment comes to, by the rows of all of its cases."""
    verdict = experiment.verdict(rows)
    return {
        "experiment": name,
        "claim": experiment.CLAIM,
        "source": experiment.SOURCE,
        "control": experiment.CONTROL,
        "made_with": store.surroundings(),
        "rows": list(rows),
        "rates": summarize_rates(rows),
        **verdict,
        "panels": experiment.panels(rows),
    }


def summarize_rates(rows: Sequence[Row]) -> JsonObject:
    """For each tuned arm its best rate, the rates measured, and whether the best is at an edge."""
    arms = dict.fromkeys(row["arm"] for row in rows if "lr" in row and "tune" in row)
    return {
        arm: {
            "best": best_rate(rows, arm),
            "measured": rates_of(rows, arm),
            "is_at_edge": is_at_edge(rows, arm),
        }
        for arm in arms
    }


def draw_results(
    source: Path, results: JsonObject, picture: Path, say: Callable[[str], None]
) -> None:
    """Draw the panels of results into a PNG that names the checksum of its results' file."""
    reason = plots.why_unavailable()
    if reason:
        say(f"(no picture: {reason})")
        return
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    plots.panels(picture, title_of(results), results["panels"], digest)


def title_of(results: JsonObject) -> str:
    """What a picture says first: the claim, and the verdict on it."""
    return f"{results['claim']} \N{EM DASH} {results['verdict']}"


def describe_results(results: JsonObject) -> list[str]:
    """The verdict and its parts, a line each."""
    quick = " (--quick: it means nothing)" if results["made_with"]["quick"] else ""
    lines = [f"{results['experiment']}: {results['verdict']}{quick}"]
    lines += [f"  {printable(describe_part(part))}" for part in results["parts"]]
    if results["note"]:
        lines.append(f"  {printable(results['note'])}")
    return lines
