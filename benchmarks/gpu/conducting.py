"""Runs parts one after another, each in a process of its own, and keeps what each has found.

Before a part's line is printed, the file of results is written whole under another name and
renamed. A part notes what it has found in a file of its own as it goes: if it crashes, hangs or
exceeds its limit, that much is kept, with the reason beside it, and the next part runs. The file
is beside the results while the part runs, where it stays if the run is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from . import guard
from .plan import Plan

Facts = dict[str, Any]
Command = Callable[[str, Path, float], list[str]]  # of a part, its file of notes, its seconds
RESULT = "gpu-check.json"
RUNNING = "running-part.json"
LOG = "parts.log"
LINES = 20  # of a failed part's output that its error shows
PATIENCE = 5  # seconds for a killed process to end: one in a driver's call may never
LEAST = 3  # seconds; with less left a part is not started


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the file whole or not at all: a reader never sees a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(plain(facts), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def plain(facts: Any) -> Any:
    """The facts as JSON has them: NaN and infinities as strings, NumPy's numbers as Python's."""

    def convert(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    return json.loads(json.dumps(facts, default=convert), parse_constant=str)


def relative_difference(a: Any, b: Any) -> float:
    """|a - b| / |a|; infinite where that is not a number, so that NaN is never close."""
    a, b = float(a), float(b)  # "NaN", as a file has it, too
    difference = abs(a - b) / abs(a) if a else abs(b)
    return difference if math.isfinite(difference) else math.inf


def read_json(path: Path) -> Facts:
    """What the file holds; nothing if it is missing or is no JSON object."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def print_line(text: str) -> None:
    """Print a line at once. The run goes on to its end if nobody reads it any more."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Report:
    """The file of results: facts about the call, and what each part has found.

    Parts of an earlier call stay if they are of the same sources and of other names, so that a
    quick call and the longer one may share a folder.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.path = folder / RESULT
        self.unwritten: str | None = None  # why the file could not be written
        before = read_json(self.path)
        same = all(before.get(key) == facts.get(key) for key in ("sources", "rehearsal"))
        kept = before.get("parts") if same else None
        parts = kept if isinstance(kept, dict) else {}
        self.facts: Facts = {**facts, "parts": parts}
        self.names: list[str] = []  # the parts of this call

    @property
    def parts(self) -> dict[str, Facts]:
        return self.facts["parts"]  # type: ignore[no-any-return]

    def begin(self, name: str) -> None:
        self.write(running=name)

    def add(self, name: str, outcome: Facts) -> None:
        outcome = plain(outcome)
        self.parts.pop(name, None)
        self.parts[name] = outcome
        self.names.append(name)
        self.write(running=None)
        print_line(json.dumps({"part": name, **outcome}))

    def write(self, **facts: Any) -> None:
        self.facts |= facts
        try:
            write_json(self.path, self.facts)
            self.unwritten = None
        except OSError as error:  # a full disk: what is printed remains
            self.unwritten = f"{self.path}: {error.strerror or error}"

    def finish(self, **facts: Any) -> bool:
        """Write and print how the call ended; whether all its parts are well."""
        failed = [name for name in self.names if not self.parts[name]["ok"]]
        self.write(finished=True, failed=failed, ok=not failed and not self.unwritten, **facts)
        told = {key: self.facts[key] for key in ("ok", "failed", *facts)}
        if self.unwritten:
            told["not_written"] = self.unwritten
        print_line(json.dumps(plain(told)))
        return bool(self.facts["ok"])


def source_digest(root: Path) -> str:
    """A checksum of minilora's sources, by which two results can be compared without git."""
    digest = hashlib.sha256()
    for path in sorted((root / "minilora").rglob("*")):
        if path.suffix in (".py", ".cu"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def guarded() -> Iterator[tuple[Path, str]]:
    """Inside: a scratch folder, and the mark of processes that end with this one, even if killed.

    At the end, or when this process has gone in whatever way, the guard ends what has the mark and
    removes the folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    mark = new_mark()
    process = subprocess.Popen(
        [sys.executable, guard.__file__, mark, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what ends a group of processes must not end the guard
    )
    try:
        yield folder, mark
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)


def new_mark() -> str:
    return f"GPU_CHECK_{uuid.uuid4().hex}"


def run(plan: Plan, command: Command, report: Report, mark: str, end: float) -> None:
    """Run the parts of the plan in turn, until time.monotonic() is `end`.

    A part has its own limit, and what the parts before it have left over.
    """
    later = sum(plan.values())
    log = report.path.with_name(LOG)
    notes = report.path.with_name(RUNNING)
    for name, limit in plan.items():
        later -= limit
        seconds = end - time.monotonic() - later
        if seconds < LEAST:
            report.add(name, {"ok": False, "error": "not run: no time was left", "seconds": 0})
            continue
        report.begin(name)
        remove(notes)
        environment = {**os.environ, mark: "1", "PYTHONUNBUFFERED": "1"}
        outcome = run_part(command(name, notes, seconds), notes, seconds, log, environment)
        report.add(name, outcome | {"when": time.strftime("%Y-%m-%dT%H:%M:%S")})
        remove(notes)


def run_part(
    command: list[str], notes: Path, seconds: float, log: Path, environment: Mapping[str, str]
) -> Facts:
    """What a part has noted, whether all is well, and if not, why.

    Its output is appended to `log`. When it has ended, or its time is over, every process that it
    has started ends, too.
    """
    begun = time.monotonic()
    mark = new_mark()
    error: str | None
    with open_log(log, f"\n==== {' '.join(command)}\n") as output:
        start = output.tell()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, mark: "1"},
            )
        except OSError as failure:
            return {"ok": False, "error": f"not started: {failure}", "seconds": 0}
        try:
            code = process.wait(timeout=seconds)
            error = None if code == 0 else describe_exit(code)
        except subprocess.TimeoutExpired:
            error = f"more than {seconds:.0f} seconds"
        finally:
            guard.end_processes(mark, PATIENCE)
            process.kill()  # where /proc does not say what a process's environment is
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE)
    noted = read_json(notes)
    if error is None and not noted:
        error = "it ended without a result"
    well = noted.pop("ok", True) and error is None
    outcome = {"ok": well, **noted}
    if error is not None:
        lines = last_lines(log, start)
        # A part that catches an exception notes it; otherwise its output says most.
        outcome["error"] = noted.get("error") or ": ".join([error, *lines[-1:]])
        outcome["output"] = lines
    return {**outcome, "seconds": round(time.monotonic() - begun, 1)}


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def open_log(path: Path, heading: str) -> BinaryIO:
    """The log, to which all of a part's processes append. Nothing is kept if the disk is full."""
    try:
        file = open(path, "ab", buffering=0)  # noqa: SIM115
        file.write(heading.encode())
    except OSError:
        return open(os.devnull, "ab", buffering=0)
    return file


def describe_exit(code: int) -> str:
    """Why a process ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-code).name}"
    return f"ended by signal {-code}"


def last_lines(log: Path, start: int) -> list[str]:
    """The last lines that are not empty of what was written into `log` after the byte `start`."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 20000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line[:300] for line in lines if line.strip()][-LINES:]
