"""The laboratory's folder: one file per case, and what all of them were made with.

    OUT/lab.json                   protocol, versions, texts and machine of every number in here
    OUT/bases, OUT/fits            what several experiments share (protocol.py)
    OUT/NAME/cases/CASE.json       a case and its result, written whole; an existing one is not
                                   measured again
    OUT/NAME/seconds.json          how long each case took
    OUT/NAME/results.json          claim, rows in the order of the cases, verdict
    OUT/NAME/NAME.png              the picture

Only seconds.json holds times, so that the other files have the same bytes for any number of
workers, and however often the laboratory was stopped. Numbers of another version, of another
Python's texts or of another machine are refused, not mixed.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from .. import __version__
from ..errors import ConfigError, FormatError, MiniloraError, is_plain_number
from ..formats import read_json, write_json
from ..formats.disk import JsonObject, quoted
from ..formats.folders import LOCK, require_empty
from ..training.sweep import plain_name
from .protocol import VERSION, Case, Plan, Row, texts_checksum

LAB = "lab.json"
is_duration = is_plain_number(least=0)
# What lab.json says, and the words for it in an error.
WORDS = {
    "quick": "--quick",
    "protocol": "the protocol's version",
    "minilora": "minilora's version",
    "python": "Python's version, whose files are the texts",
    "texts": "the checksum of the texts",
    "machine": "the machine",
}


def describe_surroundings(plan: Plan) -> JsonObject:
    """What the numbers of this process depend on, beside the experiment."""
    return {
        "quick": plan.quick,
        "protocol": VERSION,
        "minilora": __version__,
        "python": platform.python_version(),
        "texts": texts_checksum(),
        "machine": describe_machine(),
    }


@functools.cache
def describe_machine() -> JsonObject:
    """The processor, BLAS and NumPy, which decide about the last bits of a sum."""
    libraries = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    names = (pool.get("architecture") or "" for pool in libraries)
    blas = [f"{pool['internal_api']} {pool['version']}" for pool in libraries]
    return {
        "processor": _processor(),
        "blas": ", ".join(sorted({*blas})),
        "kernels": ", ".join(sorted({*names})),
        "numpy": np.__version__,
        "system": f"{sys.platform} {platform.machine()}",
    }


def _processor() -> str:
    """The processor's name; Linux alone has it in a file."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Store:
    """The folder of a laboratory whose numbers all belong together."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def claim(self, surroundings: JsonObject) -> None:
        """Note in the folder what its numbers are made with, or check that it is the same.

        ConfigError says what differs, or that the folder holds something else. Call it inside
        `locked(folder)`.
        """
        path = self.folder / LAB
        if not path.exists():
            stale = {file.name for file in self.folder.glob(f".{LAB}.tmp-*")}
            if {file.name for file in self.folder.iterdir()} - {LOCK} != stale:
                require_empty(self.folder)
            write_json(path, surroundings)
            return
        before = self.surroundings()
        for name, words in WORDS.items():
            was, now = before.get(name), surroundings[name]
            if was != now:
                raise ConfigError(
                    f"--out {quoted(self.folder)} holds results in which {words} was "
                    f"{_short(was)}, and now it is {_short(now)}: such numbers are not mixed; "
                    "choose another folder"
                )

    def surroundings(self) -> JsonObject:
        """What the numbers in the folder were made with."""
        path = self.folder / LAB
        if not path.exists():
            raise ConfigError(
                f"--out {quoted(self.folder)} is not a laboratory's folder, because it has no "
                f"{LAB}: give the folder of `minilora lab`, or run an experiment first"
            )
        return read_json(path)

    # ---- cases ----

    def read_case(self, experiment: str, case: Case) -> Row | None:
        """The row of a case, or None if it has still to be measured."""
        with suppress(OSError, FormatError):
            content = read_json(self._place(experiment, case))
            if content.get("case") == case and type(content.get("result")) is dict:
                return {**case, **content["result"]}
        return None

    def write_case(self, experiment: str, case: Case, result: Row, seconds: float) -> None:
        """Write the seconds first: a case that has its file counts as measured."""
        place = self._place(experiment, case)
        place.parent.mkdir(parents=True, exist_ok=True)
        times = self.seconds(experiment) | {place.stem: round(seconds, 3)}
        write_json(self.folder / experiment / "seconds.json", times)
        write_json(place, {"case": case, "result": result})

    def seconds(self, experiment: str) -> JsonObject:
        """Seconds by the name of the case; what is damaged in the file is left out."""
        with suppress(OSError, FormatError):
            content = read_json(self.folder / experiment / "seconds.json")
            return {name: value for name, value in content.items() if is_duration(value)}
        return {}

    def _place(self, experiment: str, case: Case) -> Path:
        name = plain_name(",".join(f"{key}={value}" for key, value in case.items()))
        return self.folder / experiment / "cases" / f"{name}.json"

    # ---- results ----

    def results_file(self, experiment: str) -> Path:
        return self.folder / experiment / "results.json"

    def read_results(self, experiment: str) -> JsonObject | None:
        """What an experiment came to; None if it has not been run to its end."""
        with suppress(FileNotFoundError):
            return read_json(self.results_file(experiment))
        return None

    def write_results(self, experiment: str, results: JsonObject) -> Path:
        path = self.results_file(experiment)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
        return path

    def picture_file(self, experiment: str) -> Path:
        return self.folder / experiment / f"{experiment}.png"


@contextmanager
def expecting(path: Path, cure: str) -> Iterator[None]:
    """FormatError if the block misses in a file what the laboratory writes there.

    It is JSON, but an older version or an editor wrote it. `cure` says what to do.
    """
    try:
        yield
    except MiniloraError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{quoted(path)} is not as this version of the laboratory writes it "
            f"({error!r:.99}): {cure}"
        ) from error


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        value = ", ".join(str(part) for part in value.values())
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def rows_in_order(
    store: Store, experiment: str, cases: Sequence[Case]
) -> tuple[list[Row], list[Case]]:
    """(rows that are known, cases that have still to be measured), both in the cases' order."""
    rows, missing = [], []
    for case in cases:
        row = store.read_case(experiment, case)
        if row is None:
            missing.append(case)
        else:
            rows.append(row)
    return rows, missing
