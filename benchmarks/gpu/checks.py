"""What must hold: the tests pass, the device agrees with the CPU, and a graph with eager steps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from .bench import Bench, Step, can_capture
from .conducting import Facts, relative_difference
from .counting import NO_GRAPH, count_step
from .part import ROOT
from .plan import REHEARSAL_IS_SLOWER

# The reasons for which a test of a GPU may be skipped: it needs two GPUs, or exact counts.
MAY_SKIP = ("there is one GPU only", "this is a real GPU")
# What only the emulation is tested by.
NOT_ON_A_GPU = ("test_cupy_on_cpu.py", "test_gpu_check.py")
BOUND = 1e-5  # on the relative difference of two losses
GRAPH_STEPS = 6


# ---- the tests -----------------------------------------------------------------------------------


def files_of_gpu_tests() -> list[str]:
    """The files with tests marked `gpu`, without those of the emulation that stands for a GPU."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path) for path in marked if path.name not in NOT_ON_A_GPU]


def tests(bench: Bench) -> None:
    """Run the tests marked `gpu`: passed, failed by name with their first lines, skipped.

    Not well unless one passed, all selected ones ended, none failed and none was skipped, but for
    MAY_SKIP.
    """
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        bench.notes.fail(f"not installed: {', '.join(missing)}")
        return
    files = [str(ROOT / "tests" / "test_backend.py")] if bench.rehearse else files_of_gpu_tests()
    outcomes = bench.folder / "outcomes.jsonl"
    outcomes.unlink(missing_ok=True)
    seconds = max(5.0, bench.end - time.monotonic() - 6)
    limit = 60 * (REHEARSAL_IS_SLOWER if bench.rehearse else 1)
    ended = run_pytest(files, outcomes, seconds, limit)
    found = read_outcomes(outcomes)
    bench.notes.add(**found, command="python -m pytest -m gpu")
    for name, failure in found["failed"].items():
        bench.notes.fail(f"{name}: {failure['error']}")
    for reason in found["skipped"]:
        if reason not in MAY_SKIP:
            bench.notes.fail(f"skipped: {reason}")
    if not found["passed"]:
        bench.notes.fail("no test passed")
    if ended is None:
        missing = found["selected"] - found["ended"]
        bench.notes.fail(f"after {seconds:.0f} seconds {missing} tests had not ended")
    elif ended and not found["failed"]:
        bench.notes.fail(f"pytest ended with {ended}: see the log")


def run_pytest(files: list[str], outcomes: Path, seconds: float, limit: int) -> int | None:
    """Pytest's exit code, None if it took too long. Its output is this process's.

    seconds   for all tests
    limit     seconds for each test
    """
    options = ["-c", str(ROOT / "setup.cfg"), "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfE"]
    # A warning of another library, at an import or later, says nothing about this GPU.
    options += ["-W", "default", "--continue-on-collection-errors", "--durations", "10"]
    options += ["-p", "recorder"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", str(limit)]
    # What was on the search path stays there.
    search_path = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
        "GPU_CHECK_OUTCOMES": str(outcomes),
    }
    command = [sys.executable, "-m", "pytest", *options, *files]
    try:
        return subprocess.run(
            command, check=False, cwd=ROOT, env=environment, timeout=seconds
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def read_outcomes(path: Path) -> Facts:
    """selected, ended, passed: how many; failed: {name: error, lines}; skipped: {reason: count}"""
    failed: dict[str, Facts] = {}
    skipped: dict[str, int] = {}
    passed: set[str] = set()
    selected = unfinished = ended = 0
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            fact = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            unfinished += 1
            continue
        name = fact["name"]
        if fact["outcome"] == "selected":
            selected = fact["count"]
        elif fact["outcome"] == "skipped":
            skipped[fact["reason"]] = skipped.get(fact["reason"], 0) + 1
            ended += 1
        elif fact["outcome"] == "failed":
            failed[name] = {"error": fact["error"], "lines": fact["lines"]}
            ended += fact.get("phase") in ("setup", "call")
        else:
            passed.add(name)
            ended += 1
    passed -= failed.keys()  # one that failed when it was over
    return {
        "selected": selected,
        "ended": ended,
        "passed": len(passed),
        "failed": failed,
        "skipped": skipped,
    }


# ---- parity and graphs ---------------------------------------------------------------------------


def parity(bench: Bench) -> None:
    """The same run on the CPU and, twice, on the device: losses by step, and bits.

    The run has dropout, so that the masks must agree.
    """
    results = []
    for name, device in (("cpu", "cpu"), ("device", "cuda"), ("again", "cuda")):
        begun = time.perf_counter()
        step = Step(bench, "micro", device=device, dropout=0.1)
        for _ in range(bench.steps):
            step()
        results.append(step.bits())
        bench.notes.add(**{f"seconds_{name}": round(time.perf_counter() - begun, 2)})
    here, there = results[0][0], results[1][0]
    bench.notes.add(steps=bench.steps, **compare_losses(here, there))
    equal = results[1] == results[2]
    bench.notes.add(two_runs_bitwise_equal=equal)
    if bench.notes.facts["largest_relative_difference"] > BOUND:
        bench.notes.fail(f"losses on the CPU and on the device differ by more than {BOUND}")
    if not equal:
        bench.notes.fail("two runs on the device differ in a bit")


def compare_losses(here: list[float], there: list[float]) -> Facts:
    """How far losses differ, and the first step in which they do by more than given bounds."""
    differences = [relative_difference(a, b) for a, b in zip(here, there, strict=True)]
    first = {
        f"{bound:.0e}": next((i for i, d in enumerate(differences) if d > bound), None)
        for bound in (1e-6, 1e-5, 1e-4)
    }
    return {
        "loss_first": here[0],
        "loss_last": here[-1],
        "largest_relative_difference": max(differences),
        "first_step_that_differs_by_more_than": first,
        "differences_every_20_steps": differences[::20],
    }


def graph(bench: Bench) -> None:
    """Whether a captured step's replay gives the bits of an eager step, and what each costs."""
    if not can_capture():
        bench.notes.add(skipped=NO_GRAPH)
        return
    for size in ("micro", "tiny"):
        bench.notes.measure(size, partial(_compare_graph, bench, size))
        found = bench.notes.facts[size] or {}
        if found.get("replay_equals_eager") is False:
            bench.notes.fail(f"{size}: replayed and eager steps differ in a bit")
        if found.get("captured") is False:
            bench.notes.fail(f"{size}: the step was not replayed")


def _compare_graph(bench: Bench, size: str) -> Facts:
    """Steps with other batches each, with dropout, so that what is baked in would show."""
    runs = {on: bench.step(size, graph=on, dropout=0.1) for on in (False, True)}
    for step in runs.values():
        for _ in range(GRAPH_STEPS):
            step()
    equal = runs[False].bits() == runs[True].bits()
    counts = count_step(bench, runs[True])
    launches = counts["graph_launches"]
    return {
        "replay_equals_eager": equal,
        "captured": None if launches is None else launches > 0,
        "counts": counts,
        "eager_milliseconds": bench.time_steps(runs[False])["milliseconds"],
        "replay_milliseconds": bench.time_steps(runs[True])["milliseconds"],
    }
