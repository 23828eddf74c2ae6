"""A sweep: one run for each point of a grid of settings, in a folder that says what it is.

    OUT/sweep.json        the grid, the other options, and checksums of the files that are read
    OUT/POINT/            a run's folder, as finetune makes it
    OUT/POINT/result.json what came of it, once it is finished or can only fail again
    OUT/results.csv, results.json    a row for each point

The results hold no times and no paths: they have the same bytes whatever the number of processes,
and however often the sweep was stopped. Nothing here knows how a point is trained.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import (
    ConfigError,
    DataError,
    FormatError,
    MiniloraError,
    NonFiniteError,
    printable,
    shorten,
)
from ..formats import atomic_file, read_json, write_json
from ..formats.disk import JsonObject, PathLike, open_regular, quoted
from ..formats.folders import LOCK, require_empty

SWEEP = "sweep.json"
RESULT = "result.json"
FINISHED, FAILED = "finished", "failed"
DISK, OTHER = 4, 1  # exit codes of errors that have none of their own
LASTING = NonFiniteError.exit_code  # of a failure that would come again
MEASURED = ("loss", "bits_per_byte", "trainable_parameters")
# What a result has, by its state: texts, and numbers.
NEEDED = {FINISHED: ((), (*MEASURED, "seconds")), FAILED: (("reason",), ("exit_code",))}
WEIGHTS = (".safetensors", ".json", ".jinja")  # the files that give a model's folder its meaning
SEED = "seed"  # the axis over which means are taken
LONGEST_NAME = 80
IN_NAMES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,+=-")


# ---- points --------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One setting of the grid: the name of its folder, and the text of its value on each axis."""

    name: str
    values: dict[str, str]


def count_points(grid: Mapping[str, Sequence[str]]) -> int:
    return math.prod(map(len, grid.values()))


def list_points(grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """The points of the grid; the last axis changes fastest.

    grid   the values of each axis, as texts
    """
    settings = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    names = [",".join(f"{axis}={value}" for axis, value in point.items()) for point in settings]
    # Some file systems take r=A and r=a for the same name.
    folded = [name.casefold() for name in names]
    are_distinct = len(set(folded)) == len(folded)
    return [
        Point(name if are_distinct and _is_plain(name) else plain_name(name), values)
        for name, values in zip(names, settings, strict=True)
    ]


def _is_plain(name: str) -> bool:
    return len(name) <= LONGEST_NAME and IN_NAMES.issuperset(name)


def plain_name(name: str) -> str:
    """A name for a file in plain characters; two different names stay different."""
    plain = "".join(c if c in IN_NAMES else "-" for c in name[: LONGEST_NAME - 9])
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{plain}-{digest[:8]}"


# ---- the folder ----------------------------------------------------------------------------------


class Identity(NamedTuple):
    """What makes two sweeps the same.

    grid      the values of each axis
    options   the options that all points have, without paths
    files     the checksum of each file or folder that is read, by the option that names it
    """

    grid: dict[str, list[str]]
    options: JsonObject
    files: dict[str, str]


def claim_folder(out: Path, identity: Identity, places: Mapping[str, str]) -> None:
    """Write what the sweep is into its folder, or check that the folder holds the same sweep.

    places   the path of each of the identity's files

    Call it inside `locked(out)`. ConfigError for a folder that holds something else, or a sweep
    with other settings; DataError for files that have changed.
    """
    path = out / SWEEP
    if not path.exists():
        # A sweep that was killed at its first breath leaves the beginning of this file.
        stale = [file for file in out.glob(f".{SWEEP}.tmp-*") if file.is_file()]
        if {file.name for file in out.iterdir()} - {LOCK} != {file.name for file in stale}:
            require_empty(out)
        write_json(path, identity._asdict())
        return
    content = read_json(path)
    try:
        before = Identity(dict(content["grid"]), dict(content["options"]), dict(content["files"]))
    except (KeyError, TypeError, ValueError):
        raise FormatError(
            f"{quoted(path)} does not describe a sweep: choose another --out, or move it away"
        ) from None
    differences = _differences(before, identity)
    if differences:
        raise ConfigError(
            f"--out {quoted(out)} holds another sweep: {', '.join(differences)}; "
            "give what it had, or choose another folder"
        )
    for option, checksum in identity.files.items():
        if before.files.get(option) != checksum:
            raise DataError(
                f"{option} {quoted(places[option])} has changed since the sweep in "
                f"{quoted(out)} began: put back what it was, or choose another --out"
            )


def _differences(before: Identity, now: Identity) -> list[str]:
    """What was given differently, as texts."""
    result = []
    if list(before.grid) != list(now.grid):
        result.append(f"its axes were {_quote(before.grid)}, now {_quote(now.grid)}")
    for axis, values in now.grid.items():
        was = before.grid.get(axis, values)
        if was != values:
            result.append(f"{axis} was {_quote(was)}, now {_quote(values)}")
    for option in sorted({*now.options, *before.options}):
        # An option that one of them lacks may be an axis of the other.
        is_axis = bool(result) and (option in now.options) != (option in before.options)
        known, value = before.options.get(option), now.options.get(option)
        if known != value and not is_axis:
            result.append(f"--{option.replace('_', '-')} was {known!r:.40}, now {value!r:.40}")
    for option in sorted(now.files.keys() ^ before.files.keys()):
        given = "given" if option in now.files else "not given"
        result.append(f"{option} is {given}")
    return result


def _quote(values: Iterable[str]) -> str:
    return repr(",".join(values))[:80]


def checksum(path: PathLike) -> str:
    """SHA-256 of a file, or of the files that give a model's folder its meaning."""
    place = Path(path)
    if not place.is_dir():
        return _sha256(place)
    files = sorted(file for file in place.iterdir() if file.suffix in WEIGHTS and file.is_file())
    return hashlib.sha256(
        "".join(f"{file.name} {_sha256(file)}\n" for file in files).encode("utf-8", "replace")
    ).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- results -------------------------------------------------------------------------------------


def read_result(folder: Path) -> JsonObject | None:
    """What came of the point in this folder, or None if it has still to be done."""
    with suppress(OSError, FormatError):
        result = read_json(folder / RESULT)
        texts, numbers = NEEDED.get(result.get("state", ""), ((), ("state",)))
        are_texts = all(type(result.get(name)) is str for name in texts)
        if are_texts and all(type(result.get(name)) in (int, float) for name in numbers):
            return result
    return None


def write_result(folder: Path, result: JsonObject) -> None:
    write_json(folder / RESULT, result)


def describe_failure(error: BaseException) -> JsonObject:
    """The result of a point that failed: its reason in short, and the exit code for it."""
    code = OTHER
    reason = str(error) or type(error).__name__
    if isinstance(error, MiniloraError) and error.exit_code == LASTING:
        # What follows names files and batches, and may depend on where the run was stopped.
        reason = reason.partition("; ")[0]
    if isinstance(error, MiniloraError):
        code = error.exit_code
    elif isinstance(error, OSError):
        code = DISK
        reason = f"{error.strerror or error}: {error.filename!r}" if error.filename else reason
    elif isinstance(error, MemoryError):
        reason = "out of memory"
    elif isinstance(error, BrokenExecutor):
        reason = "its process ended abruptly: it was killed, perhaps because memory ran out"
    elif isinstance(error, KeyboardInterrupt):  # a second signal
        reason = "it was stopped by a signal"
    else:
        reason = f"{type(error).__name__}: {reason}"
    return {"state": FAILED, "reason": shorten(printable(reason)), "exit_code": code}


def result_rows(points: Sequence[Point], results: Mapping[str, JsonObject]) -> list[JsonObject]:
    """A row for each point, in the order of the grid: its axes, what was measured, its state.

    results   by the name of the point
    """
    rows = []
    for point in points:
        result = results[point.name]
        row: JsonObject = dict(point.values)
        for name in MEASURED:
            row[name] = result.get(name)
        row["state"] = result["state"]
        row["reason"] = result.get("reason", "")
        rows.append(row)
    return rows


def seed_rows(grid: Mapping[str, Sequence[str]], rows: Sequence[JsonObject]) -> list[JsonObject]:
    """A row for each setting: mean and spread (sample standard deviation) over its seeds.

    Points that failed do not count. Without several seeds there are no rows.
    """
    if len(grid.get(SEED, ())) < 2:
        return []
    others = [axis for axis in grid if axis != SEED]
    losses: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        of_setting = losses.setdefault(tuple(row[axis] for axis in others), [])
        if row["state"] == FINISHED:
            of_setting.append(row["loss"])
    result = []
    for setting, values in losses.items():
        row = dict(zip(others, setting, strict=True))
        mean = statistics.fmean(values) if values else None
        spread = statistics.stdev(values) if len(values) > 1 else None
        result.append({**row, "seeds": len(values), "mean_loss": mean, "spread": spread})
    return result


def write_results(out: Path, rows: Sequence[JsonObject], means: Sequence[JsonObject]) -> None:
    """Write results.csv and results.json, each whole or not at all.

    rows    of `result_rows`
    means   of `seed_rows`: they are in results.json
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(out / "results.csv") as file:
        file.write(table.getvalue().encode("utf-8", "replace"))
    content: JsonObject = {"points": list(rows)}
    if means:
        content["over_seeds"] = list(means)
    write_json(out / "results.json", content)


def describe_settings(
    grid: Mapping[str, Sequence[str]], rows: Iterable[JsonObject]
) -> dict[str, list[float]]:
    """The losses of each setting, by what distinguishes it: all axes but the seed."""
    several = [axis for axis in grid if axis != SEED] or list(grid)
    losses: dict[str, list[float]] = {}
    for row in rows:
        label = ", ".join(f"{axis} {row[axis]}" for axis in several)
        of_setting = losses.setdefault(label, [])
        if row["state"] == FINISHED:
            of_setting.append(row["loss"])
    return losses
