"""Count how many small changes of the source the tests notice (mutation testing).

    pip install cosmic-ray
    nice python benchmarks/mutation.py [--sample N] [--limit SECONDS] [--write] [FILE ...]

cosmic-ray (https://cosmic-ray.readthedocs.io) makes the changes: another operator, a number one
higher or lower, a negated condition, a loop that never runs, a removed decorator. Each change is
tried in a forked process that imports the changed source in place of that module; no file is
touched. The process runs the tests of TESTS with few Hypothesis examples and stops at the first
failure.

Two kinds of changes are left out: those of type annotations, which cannot matter, and those that
would only improve the score: operators in place of + - * / that no formula here uses, above all
operators on bits, which raise a TypeError for floats.

    --sample N       tries N changes per file, those whose source has the smallest SHA-256: the same
                     source gives the same sample
    --limit SECONDS  of a change's tests; a change that takes longer counts as noticed
    --write          stores the results of the tried files in benchmarks/results/mutation.json

A change that no test notices (a survivor) either has no effect, or a test is missing. Its reason is
written into the results file by hand, and the next run keeps it; "unseen: ..." says why the test is
missing. MECHANISMS groups the files, and the results file has one pooled score per mechanism. The
engine, the optimisers and the readers take about half an hour on two cores without --sample.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
LIMIT = 60.0  # seconds per change
ENGINE = "test_gradcheck test_functional test_promises test_autograd test_nn training/test_parallel"

# The tests of each file, in the order in which they run; paths below tests/, without ".py".
PEFT = "lora/test_peft_model lora/files/test_peft_files"
TOOLS = "tools/test_merging tools/test_merge_errors tools/test_rewriting"
PLANNING = (
    f"lora/targets/test_plan lora/targets/test_targets {PEFT} lora/test_embedding lora/test_tokens "
    "tools/test_merge_errors lora/test_combining"
)
FITTING = f"lora/targets/test_plan {PEFT} tools/test_merge_errors lora/test_combining"
TESTS = {
    "minilora/errors.py": f"test_errors test_optim {PEFT}",
    "minilora/threads.py": "test_threads training/test_parallel models/test_decoding",
    "minilora/autograd.py": f"{ENGINE} test_anomaly test_backend",
    "minilora/functional.py": ENGINE,
    "minilora/effective.py": f"{ENGINE} {PEFT}",
    "minilora/optim.py": "test_optim",
    "minilora/formats/disk.py": "formats/test_checkpoint formats/test_disk",
    "minilora/formats/dtypes.py": "formats/test_dtypes formats/test_safetensors quant/test_half",
    "minilora/formats/folders.py": "formats/test_folders training/test_runs tools/test_rewriting",
    "minilora/formats/safetensors.py": (
        "formats/test_safetensors formats/test_checkpoint cli/test_fuzz"
    ),
    "minilora/formats/checkpoint.py": (
        "formats/test_checkpoint formats/test_weights models/test_transformer"
    ),
    "minilora/formats/adapter.py": f"formats/test_checkpoint {PEFT}",
    "minilora/lora/config.py": (
        f"lora/test_lora_config lora/targets/test_targets lora/test_adalora {PEFT}"
    ),
    "minilora/lora/names.py": f"{PEFT} lora/test_embedding lora/test_dora",
    "minilora/lora/targets/base.py": PLANNING,
    "minilora/lora/targets/selection.py": PLANNING,
    "minilora/lora/targets/plan.py": PLANNING,
    "minilora/lora/files/adapter.py": FITTING,
    "minilora/lora/files/fitting.py": FITTING,
    "minilora/lora/files/reading.py": "lora/files/test_reading tools/test_tied",
    "minilora/lora/files/repeats.py": (
        f"lora/files/test_reading {PEFT} lora/test_embedding tools/test_tied"
    ),
    "minilora/lora/vocabulary.py": "lora/files/test_reading",
    "minilora/lora/merging.py": (
        f"lora/test_merge_weight {PEFT} lora/test_embedding lora/test_tokens tools/test_merging"
    ),
    "minilora/lora/tying.py": f"lora/test_merge_weight lora/test_embedding {TOOLS}",
    "minilora/lora/factors.py": "lora/test_combining tools/test_inspecting tools/test_factoring",
    "minilora/lora/combining.py": "lora/test_combining",
    "minilora/tools/merging.py": TOOLS,
    "minilora/tools/rewriting.py": "tools/test_rewriting tools/test_converting tools/test_merging",
    "minilora/training/parallel.py": "training/test_parallel",
    "minilora/training/checkpoints.py": "training/test_runs",
}
MECHANISMS = {
    "autograd and the neural operations": ["autograd", "functional", "effective"],
    "optimisers": ["optim"],
    "readers and writers of files": [
        "formats/disk",
        "formats/safetensors",
        "formats/checkpoint",
        "formats/adapter",
    ],
    "which layers a configuration selects, and whether an adapter fits": [
        "lora/targets/base",
        "lora/targets/selection",
        "lora/targets/plan",
        "lora/files/adapter",
        "lora/files/fitting",
        "lora/files/reading",
        "lora/files/repeats",
        "lora/vocabulary",
    ],
    "names of an adapter's tensors": ["lora/names"],
    "W + dW rounded once": ["lora/merging", "tools/merging"],
    "a head tied to its embedding": ["lora/tying"],
    "algebra on (A, B, s)": ["lora/factors", "lora/combining"],
    "dtypes and blocks of rows": ["formats/dtypes"],
    "a folder exists whole or not at all": [
        "formats/folders",
        "tools/rewriting",
        "training/checkpoints",
    ],
    "threads in a fixed order": ["threads", "training/parallel"],
    "checks of fields": ["errors", "lora/config"],
}
# These tests start processes, which would not import the changed source.
SLOW = "million or thousand_steps_leak or oracle"
# Hypothesis is imported once, before the forks, and so before pytest.
WARNINGS = "error\nignore::pytest.PytestAssertRewriteWarning"
# What a binary operator may become.
ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
BITS = {"BitAnd", "BitOr", "BitXor"}
# Exit codes of a child.
SURVIVED, KILLED, MISUSED = 0, 1, 2


@dataclass(frozen=True)
class Change:
    """A changed source, with the changed lines."""

    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def text(self) -> str:
        return f"{self.before}  ->  {self.after}"


def list_annotations(source: str) -> list[ast.expr]:
    annotations: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            if annotation is not None:
                annotations.append(annotation)
    return annotations


def changes(path: Path) -> Iterator[Change]:
    """Every change of the file that cosmic-ray makes and that is not left out, each source once."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text(encoding="utf-8")
    hints = []
    for node in list_annotations(source):
        hints.append(((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))
    seen = {source}
    for name in sorted(operator_names()):
        before, _, after = name.partition("BinaryOperator_")[2].partition("_")
        if after and after not in (BITS if before in BITS else ARITHMETIC):
            continue
        operator_class = get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        positions = []
        for node in ast_nodes(get_ast(source)):
            positions += operator.mutation_positions(node)
        for occurrence, (start, _) in enumerate(positions):
            if any(begin <= start < end for begin, end in hints):
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is None or changed in seen:
                continue
            with contextlib.suppress(SyntaxError):
                ast.parse(changed)
                seen.add(changed)
                yield Change(start[0], *changed_lines(source, changed), changed)


def changed_lines(source: str, changed: str) -> tuple[str, str]:
    """The lines of both texts without those that are equal at the beginning and at the end."""
    before = source.splitlines()
    after = changed.splitlines()
    for end in (-1, 0):
        while before and after and before[end] == after[end]:
            del before[end], after[end]
    joined = [" ".join(line.strip() for line in lines) for lines in (before, after)]
    return joined[0], joined[1]


class ChangedModule(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a changed source."""

    def __init__(self, name: str, path: Path, source: str):
        self.name = name
        self.path = str(path)
        self.source = source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_filename(self, name: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return self.source.encode()


def run_tests(path: Path, source: str, tests: list[Path], quiet: bool) -> int:
    """Run the tests of a changed source in this process, and return a child's exit code."""
    import pytest
    from hypothesis import Phase, settings

    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    sys.meta_path.insert(0, ChangedModule(module, path, source))
    # One failing example is enough: Hypothesis need not search for a smaller one.
    phases = Phase.explicit, Phase.generate
    settings.register_profile(
        "mutation", max_examples=10, derandomize=True, deadline=None, database=None, phases=phases
    )
    os.environ["MINILORA_HYPOTHESIS"] = "mutation"
    if quiet:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
    # A change that breaks this import is noticed here. In pytest it would give the exit code of a
    # wrong command line.
    importlib.import_module("conftest")
    if tests[0].stem == "test_gradcheck":  # most changes end here, before pytest starts
        from operations import TABLE

        from minilora.gradcheck import check_gradient

        for op in TABLE:
            check_gradient(op.function, *op.inputs, tolerance=op.tolerance)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", f"not ({SLOW})"]
    options += ["-o", f"filterwarnings={WARNINGS}"]
    passed = pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED
    for test in tests:
        code = pytest.main([*options, str(test)])
        if code == pytest.ExitCode.USAGE_ERROR:
            return MISUSED
        if code not in passed:
            return KILLED
    return SURVIVED


def find_outcome(
    path: Path, source: str, tests: list[Path], limit: float, quiet: bool = True
) -> str:
    """One of survived, killed and timeout. SystemExit if pytest refuses its command line."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = KILLED  # also where an import fails
        try:
            os.setsid()  # a signal to the group reaches only this child and what it starts
            code = run_tests(path, source, tests, quiet)
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code == MISUSED:
                raise SystemExit(f"{path}: pytest refuses its command line for {tests}")
            return "survived" if code == SURVIVED else "killed"
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def find_tests(name: str) -> list[Path]:
    """The test files of a source file. SystemExit if one of them or the source does not exist."""
    if name not in TESTS:
        raise SystemExit(f"{name} has no tests in TESTS; choose from {', '.join(TESTS)}")
    tests = [ROOT / "tests" / f"{test}.py" for test in TESTS[name].split()]
    for path in (ROOT / name, *tests):
        if not path.is_file():
            raise SystemExit(f"{name}: {path} does not exist: correct TESTS")
    return tests


class Outcomes:
    """Outcomes by the change's key; with a file they survive an interruption."""

    def __init__(self, file: Path | None):
        self.file = file
        self.known: dict[str, str] = {}
        if file and file.exists():
            lines = file.read_text().splitlines()
            self.known = dict(line.split() for line in lines)

    def of(self, change: Change, path: Path, tests: list[Path], limit: float) -> str:
        if change.key in self.known:
            return self.known[change.key]
        outcome = find_outcome(path, change.source, tests, limit)
        if self.file:
            with open(self.file, "a") as file:
                file.write(f"{change.key} {outcome}\n")
        return outcome


def measure(
    name: str, args: argparse.Namespace, outcomes: Outcomes, reasons: dict[tuple[str, str], str]
) -> dict[str, Any]:
    """The counts, scores and survivors of one file."""
    path = ROOT / name
    tests = find_tests(name)
    source = path.read_text(encoding="utf-8")
    if find_outcome(path, source, tests, args.limit, quiet=False) != "survived":
        raise SystemExit(f"{name}: its tests fail, or take longer than --limit, without any change")
    chosen = list(changes(path))
    total = len(chosen)
    if args.sample:
        chosen.sort(key=lambda change: change.key)
        chosen = chosen[: args.sample]
    counts = {"killed": 0, "timeout": 0, "survived": 0}
    survivors = []
    for number, change in enumerate(chosen):
        outcome = outcomes.of(change, path, tests, args.limit)
        counts[outcome] += 1
        if outcome == "survived":
            reason = reasons.get((name, change.text), "")
            survivors.append({"line": change.line, "change": change.text, "reason": reason})
            print(f"{name}:{change.line}: {change.text}\n    {reason or 'NO REASON YET'}")
        if number % 50 == 0:
            print(f"{name}: {number} {counts}", flush=True)
    survivors.sort(key=lambda survivor: survivor["line"])
    equivalent = 0
    for survivor in survivors:
        reason = survivor["reason"]
        equivalent += bool(reason) and not reason.startswith("unseen")
    entry: dict[str, Any] = {"changes": total, **with_scores(counts, equivalent)}
    print(
        f"{name}: {entry['mutants']} of {total} changes tried, score {entry['score']:.2%}, "
        f"{equivalent} of {len(survivors)} survivors have no effect",
        flush=True,
    )
    return {**entry, "survivors": survivors}


def with_scores(counts: dict[str, int], equivalent: int) -> dict[str, Any]:
    """The counts with the share of noticed changes, of all and of those that have an effect."""
    mutants = sum(counts.values())
    survived = counts["survived"]
    effective = mutants - equivalent
    return {
        "mutants": mutants,
        **counts,
        "equivalent": equivalent,
        "score": round(1 - survived / max(mutants, 1), 4),
        "score_without_equivalents": round(1 - (survived - equivalent) / max(effective, 1), 4),
    }


def pool(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The counts of each mechanism, summed over its measured files, with their scores."""
    pooled = {}
    for mechanism, stems in MECHANISMS.items():
        names = [f"minilora/{stem}.py" for stem in stems]
        measured = [name for name in names if name in files]
        if not measured:
            continue
        counts = {}
        for outcome in ("killed", "timeout", "survived"):
            counts[outcome] = sum(files[name][outcome] for name in measured)
        equivalent = sum(files[name]["equivalent"] for name in measured)
        pooled[mechanism] = {"files": measured, **with_scores(counts, equivalent)}
    return pooled


def read_files() -> dict[str, dict[str, Any]]:
    """The stored results of the files that still exist."""
    if not RESULT.exists():
        return {}
    stored = json.loads(RESULT.read_text(encoding="utf-8"))["files"]
    return {name: entry for name, entry in stored.items() if (ROOT / name).exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="changes per file (all)")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="SECONDS",
        help=f"of one change's tests ({LIMIT:g})",
    )
    parser.add_argument(
        "--known",
        type=Path,
        help="a file that stores each outcome, so that an interrupted run can continue",
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for name in args.files:
        find_tests(name)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]
    # Imported once, before the forks.
    import hypothesis.extra.numpy  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import threadpoolctl  # noqa: F401

    reasons = {}  # written by hand
    for name, entry in read_files().items():
        for survivor in entry["survivors"]:
            reasons[name, survivor["change"]] = survivor["reason"]
    outcomes = Outcomes(args.known)
    files = {name: measure(name, args, outcomes, reasons) for name in args.files}
    pooled = pool(files)
    for mechanism, entry in pooled.items():
        print(f"{entry['score']:8.2%} of {entry['mutants']:5}  {mechanism}")
    if not args.write:
        return
    files = {**read_files(), **files}
    version = importlib.metadata.version("cosmic-ray")
    result = {
        "command": "python " + " ".join(["benchmarks/mutation.py", *sys.argv[1:]]),
        "tool": f"cosmic-ray {version} (the changes), pytest in forks (the outcomes)",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "mechanisms": pool(files),
        "files": files,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
