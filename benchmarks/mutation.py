"""How many small changes of the source do the tests notice? Mutation testing of the engine, optimisers and readers.

    pip install cosmic-ray && nice python benchmarks/mutation.py [--write] [FILE ...]

cosmic-ray (https://cosmic-ray.readthedocs.io) says which changes: another operator, a number one higher or lower, a
condition negated, a loop without a round, a decorator gone. Each is tried in a forked process, in which the import of
that one module gives the changed source, on the fast tests of its room (few Hypothesis examples, stop at the first
failure); no file is touched. Left out is what cannot matter, type annotations, and what would only flatter the score:
operators in the place of + - * / that no formula here has, bit operators above all (a TypeError for floats).
`--write` keeps benchmarks/results/mutation.json, for the files that were tried. A change that no test notices either
means the same, for a reason that is written there by hand and kept by the next run, or a test is missing ("unseen: ..."
says why). All files take some half an hour on two cores.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
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
LIMIT = 60  # seconds a mutant: an endless loop counts as noticed
TESTS = {  # of each file, in the order in which they are tried
    "minilora/optim.py": ["optim"],
    "minilora/functional.py": ["gradcheck", "functional", "promises", "autograd", "nn", "parallel"],
    "minilora/fused.py": ["gradcheck", "functional", "promises", "autograd", "nn", "parallel"],
    "minilora/autograd.py": [
        "gradcheck",
        "autograd",
        "functional",
        "promises",
        "anomaly",
        "backend",
        "parallel",
    ],
    "minilora/formats/disk.py": ["checkpoint", "disk"],
    "minilora/formats/safetensors.py": ["safetensors", "checkpoint", "fuzz"],
    "minilora/formats/checkpoint.py": ["checkpoint", "transformer"],
    "minilora/formats/adapter.py": ["checkpoint", "lora"],
}
SLOW = "million or thousand_steps_leak or oracle"  # these start processes, which would not see the change
WARNINGS = "error\nignore::pytest.PytestAssertRewriteWarning"  # Hypothesis is there before pytest, to be imported once
ARITHMETIC, BITS = (
    {"Add", "Sub", "Mul", "Div"},
    {"BitAnd", "BitOr", "BitXor"},
)  # what a binary operator may become


@dataclass(frozen=True)
class Change:
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()


def annotations(source: str) -> list[ast.expr]:
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        found += [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [node for node in found if node is not None]


def changes(path: Path) -> Iterator[Change]:
    """Every change of the file that cosmic-ray knows and that is not left out, each source once."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text(encoding="utf-8")
    hints = [
        ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in annotations(source)
    ]
    seen = {source}
    for name in sorted(operator_names()):
        before, _, after = name.partition("BinaryOperator_")[2].partition("_")
        if after and after not in (BITS if before in BITS else ARITHMETIC):
            continue
        operator = get_operator(name)
        if operator.arguments():
            continue
        operator = operator()
        places = [
            place
            for node in ast_nodes(get_ast(source))
            for place in operator.mutation_positions(node)
        ]
        for occurrence, (start, _) in enumerate(places):
            if any(begin <= start < end for begin, end in hints):
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is None or changed in seen:
                continue
            with contextlib.suppress(SyntaxError):
                ast.parse(changed)
                seen.add(changed)
                before, after = source.splitlines(), changed.splitlines()
                for end in (-1, 0):  # what is equal below the change, and above it
                    while before and after and before[end] == after[end]:
                        del before[end], after[end]
                yield Change(
                    start[0], *(" ".join(map(str.strip, side)) for side in (before, after)), changed
                )


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a changed source."""

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.source = name, str(path), source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return (
            importlib.util.spec_from_file_location(name, self.path, loader=self)
            if name == self.name
            else None
        )

    def get_filename(self, name: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return self.source.encode()


def noticed(path: Path, source: str, tests: list[str]) -> bool:
    """Run in a process of its own: does one of the test files fail?"""
    import pytest
    from hypothesis import Phase, settings

    sys.meta_path.insert(
        0, Changed(".".join(path.relative_to(ROOT).with_suffix("").parts), path, source)
    )
    phases = (
        Phase.explicit,
        Phase.generate,
    )  # that an example fails is enough: no search for a smaller one
    settings.register_profile(
        "mutation", max_examples=10, derandomize=True, deadline=None, database=None, phases=phases
    )
    os.environ["MINILORA_HYPOTHESIS"] = "mutation"
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if tests[0] == "gradcheck":  # most changes end here, before pytest has begun
        from operations import TABLE

        from minilora.gradcheck import check_gradient

        for op in TABLE:
            check_gradient(op.function, *op.inputs, tolerance=op.tolerance)
    for name in tests:
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            f"not ({SLOW})",
            "-o",
            f"filterwarnings={WARNINGS}",
        ]
        if pytest.main([*options, str(ROOT / "tests" / f"test_{name}.py")]) not in (0, 5):
            return True
    return False


def outcome(path: Path, source: str, tests: list[str]) -> str:
    child = os.fork()
    if child == 0:
        code = 1  # an import that fails is noticed, too
        try:
            code = 1 if noticed(path, source, tests) else 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--write", action="store_true")
    parser.add_argument(
        "--known", type=Path, help="a file that remembers outcomes, to go on after an interruption"
    )
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    import hypothesis.extra.numpy  # noqa: F401 - once, before forking
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import threadpoolctl  # noqa: F401

    known: dict[str, str] = {}
    if args.known and args.known.exists():
        known = dict(line.split() for line in args.known.read_text().splitlines())
    old = json.loads(RESULT.read_text(encoding="utf-8"))["files"] if RESULT.exists() else {}
    reasons = {
        (f, s["change"]): s["reason"] for f, entry in old.items() for s in entry["survivors"]
    }  # given by hand
    result: dict[str, Any] = {
        "command": "python benchmarks/mutation.py --write",
        "tool": f"cosmic-ray {importlib.metadata.version('cosmic-ray')} (the changes), pytest in forks (the outcomes)",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "files": {},
    }
    for name in args.files:
        path, counts, survivors = ROOT / name, {"killed": 0, "timeout": 0, "survived": 0}, []
        tests = TESTS[name]
        if outcome(path, path.read_text(encoding="utf-8"), tests) != "survived":
            raise SystemExit(f"{name}: its tests fail without any change")
        for number, change in enumerate(changes(path)):
            what = known.get(change.key) or outcome(path, change.source, tests)
            if args.known and change.key not in known:
                with open(args.known, "a") as file:
                    file.write(f"{change.key} {what}\n")
            counts[what] += 1
            if what == "survived":
                text = f"{change.before}  ->  {change.after}"
                survivors.append(
                    {"line": change.line, "change": text, "reason": reasons.get((name, text), "")}
                )
                print(
                    f"{name}:{change.line}: {text}\n    {survivors[-1]['reason'] or 'NO REASON YET'}",
                    flush=True,
                )
            if number % 50 == 0:
                print(f"{name}: {number} {counts}", flush=True)
        mutants = sum(counts.values())
        score = round(1 - counts["survived"] / mutants, 4)
        equivalent = sum(
            bool(s["reason"]) and not s["reason"].startswith("unseen") for s in survivors
        )
        print(
            f"{name}: {mutants} mutants, score {score:.2%}, {equivalent} of {len(survivors)} survivors mean the same"
        )
        survivors.sort(key=lambda s: s["line"])
        entry = {"mutants": mutants, **counts, "equivalent": equivalent, "score": score}
        entry["score_without_equivalents"] = round(
            1 - (counts["survived"] - equivalent) / (mutants - equivalent), 4
        )
        result["files"][name] = {**entry, "survivors": survivors}
    if args.write:
        latest = json.loads(RESULT.read_text(encoding="utf-8"))["files"] if RESULT.exists() else {}
        result["files"] = {**latest, **result["files"]}
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
