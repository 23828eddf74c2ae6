"""A run's folder: logs that only grow, and checkpoints that appear whole or not at all.

    OUT/.lock                    while a run writes; the kernel releases it when the process ends
    OUT/log.jsonl, eval.jsonl    one line per step, one line per evaluation
    OUT/checkpoints/step-N/      the ecosystem's files, optimizer.safetensors, and manifest.json

A checkpoint is written into a temporary folder; its manifest, with the size and SHA-256 of every
file, comes last; then one rename makes it real. Whatever happens before that rename leaves the
previous checkpoint the newest one. The manifest is also the mark of this program: a folder without
it is never removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FormatError
from ..formats import atomic_file, read_json, write_json
from ..formats.disk import JsonObject, name_errors, sync_folder
from ..formats.folders import (
    begin_stage,
    is_empty_stage,
    locked,
    remove_folder,
    require_empty,
    whole_folder,
)

MANIFEST = "manifest.json"
KEPT = 2  # checkpoints: the newest, and one to fall back to

# ---- the folder ----------------------------------------------------------------------------------


def open_folder(out: str | Path, resume: bool = False) -> Path:
    """The folder of a run, made if need be. ConfigError if it is not empty and nothing is resumed.

    Two runs that start together may both see it empty, unless each calls this, and writes
    everything, inside `locked(out)`.
    """
    with locked(out) as folder:
        if not resume:
            resumable = checkpoints_by_step(folder / "checkpoints")
            require_empty(folder, ", or go on with --resume auto" if resumable else "")
    return folder


# ---- logs ----------------------------------------------------------------------------------------


class Log:
    """A file of JSON lines.

    On resuming at `step`, the lines of that step and later steps are dropped: the run writes them
    again. JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf", which
    float() reads.
    """

    def __init__(self, path: str | Path, step: int = 0):
        path = Path(path)
        if path.is_file():
            try:
                earlier = [line for line in _whole_lines(path) if json.loads(line)["step"] < step]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{str(path)!r} has a line that is not JSON with a step ({error}): "
                    "it is not the log of a run; move it away"
                ) from None
            if step:
                with atomic_file(path) as file:
                    file.writelines(earlier)
        # __exit__ closes it.
        mode = "a" if step else "w"
        self._file = open(path, mode, encoding="utf-8", opener=_open_at_once)  # noqa: SIM115

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, **record: Any) -> None:
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[key] = str(value)
        with name_errors(self._file.name):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force a regular file onto the disk, before a checkpoint says that its steps are done."""
        try:
            with name_errors(self._file.name):
                os.fsync(self._file.fileno())
        except OSError as error:
            # A pipe or a device has nothing to force.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


def _open_at_once(path: str, flags: int) -> int:
    """A descriptor. OSError for a pipe that nobody reads, which would be waited for otherwise."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    os.set_blocking(descriptor, True)
    return descriptor


def read_log(path: str | Path) -> list[JsonObject]:
    """The lines of a `Log`, oldest first, except one that is being written."""
    return [json.loads(line) for line in _whole_lines(Path(path))]


def _whole_lines(path: Path) -> list[bytes]:
    with name_errors(path):
        lines = path.read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n")]


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_place(out: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return out / "checkpoints" / f"step-{step}"


def save_checkpoint(out: Path, step: int, state: JsonObject, write: Callable[[Path], None]) -> Path:
    """Make OUT/checkpoints/step-N real in one rename, and return it.

    It has what `write(folder)` writes, and `state` in the manifest. Call this inside `locked(out)`.
    After an error the same call may be made again.
    """
    final = checkpoint_place(out, step)
    parent = final.parent
    os.makedirs(parent, exist_ok=True)
    remove_stale(out)
    temporary = parent / f"step-{step}.tmp-{os.getpid()}"
    replaced = parent / f"step-{step}.old"

    def make_way() -> None:
        for place in (final, replaced):
            if os.path.lexists(place) and not _is_own(place):
                _set_aside(place)
        if final.exists():  # a run that went back to an older step: at no moment are both missing
            _remove(replaced)
            os.rename(final, replaced)

    begin_stage(temporary, MANIFEST, {"step": step})  # its stamp, until it has the whole manifest
    with whole_folder(temporary, final, make_way, MANIFEST):
        write(temporary)
        entries = {}
        for path in sorted(temporary.rglob("*")):
            if path.is_file() and path != temporary / MANIFEST:
                entry = {"size": path.stat().st_size, "sha256": _sha256(path)}
                entries[path.relative_to(temporary).as_posix()] = entry
        write_json(temporary / MANIFEST, {"step": step, "state": state, "files": entries})
    sync_folder(out)
    written = [folder for folder in checkpoints_by_step(parent) if _is_own(folder)]
    others = [folder for folder in written if folder not in (final, replaced)]
    for old in [replaced, *others[: 1 - KEPT]]:
        _remove(old)
    return final


def checkpoints_by_step(parent: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first.

    step-N.old is a checkpoint whose run was killed when it had almost replaced it.
    """
    steps = {}
    for folder in Path(parent).glob("step-*"):
        number = folder.name.removeprefix("step-").removesuffix(".old")
        if number.isdecimal() and folder.is_dir():
            steps[folder] = (int(number), not folder.name.endswith(".old"))
    return sorted(steps, key=steps.__getitem__)


def remove_stale(out: Path) -> None:
    """Remove what runs left that were killed while saving. Call it inside `locked(out)`."""
    for stale in (out / "checkpoints").glob("step-*.tmp-*"):
        step, _, process = stale.name.removeprefix("step-").partition(".tmp-")
        if step.isdecimal() and process.isdecimal() and _is_own(stale):
            _remove(stale)


def _is_own(folder: Path) -> bool:
    """Whether this program made the folder, or nothing is in it: only then may it be removed.

    The manifest has the step that the name has. It may be the one with which an unfinished
    checkpoint begins; a run that is killed while it makes or removes a folder leaves it empty.
    """
    if is_empty_stage(folder, MANIFEST):
        return True
    if folder.is_symlink() or not (folder / MANIFEST).is_file():
        return False
    try:
        step = read_json(folder / MANIFEST, limit=1 << 30).get("step")
    except (FormatError, OSError):
        return False
    name = folder.name.partition(".")[0]
    return type(step) is int and name == f"step-{step}"


def _remove(folder: Path) -> None:
    """Remove a folder of this program, if it exists and the disk lets us."""
    with contextlib.suppress(OSError):
        remove_folder(folder, MANIFEST)


def _set_aside(folder: Path) -> None:
    """Rename what is in the place of a checkpoint, with a warning: it is not ours to remove.

    To refuse it would lose the run that has come to this step.
    """
    numbers = itertools.count(1)
    places = (folder.with_name(f"{folder.name}.moved-{number}") for number in numbers)
    place = next(place for place in places if not os.path.lexists(place))
    os.rename(folder, place)
    text = f"{str(folder)!r:.200} is not a sound checkpoint of minilora: moved to {place.name!r}"
    warnings.warn(text, stacklevel=2)


def find_checkpoint(resume: str | Path, out: str | Path) -> tuple[Path, JsonObject]:
    """(folder, manifest) of the checkpoint `resume`; for "auto", of the newest sound one in `out`.

    CheckpointError if it does not exist or is damaged. "auto" skips a damaged one with a warning.
    """
    if resume != "auto":
        return Path(resume), _verified_manifest(Path(resume))
    folders = checkpoints_by_step(Path(out, "checkpoints"))
    for folder in reversed(folders):
        try:
            return folder, _verified_manifest(folder)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    sound = "sound " if folders else ""
    raise CheckpointError(
        f"{str(out)!r} has no {sound}checkpoint to resume from: "
        "a run writes one when it is stopped, and with --save-every N"
    )


def _verified_manifest(folder: Path) -> JsonObject:
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{str(folder)!r} is not a checkpoint: {MANIFEST} is missing; give --resume a folder "
            "step-N that a run has in --out/checkpoints, or auto"
        )
    damaged = f"{str(folder)!r} is damaged"
    try:
        manifest = read_json(folder / MANIFEST, limit=1 << 30)  # it has the loss of every step
        if type(manifest["step"]) is not int or not isinstance(manifest["state"], dict):
            raise KeyError("step")
        # Looked up among the files that exist, so that no name leads out of the folder.
        present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        for name, entry in manifest["files"].items():
            path = present.get(name)
            size = path.stat().st_size if path else None
            if not path or size != entry["size"] or _sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{damaged}: {name!r:.100} is not what {MANIFEST} says")
    except (FormatError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{damaged}: {MANIFEST} cannot be read ({error})") from error
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with name_errors(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
