"""A run's folder: logs that only grow, and checkpoints that are there whole or not at all.

    OUT/log.jsonl, eval.jsonl        one line a step, one an evaluation
    OUT/checkpoints/step-N/          the ecosystem's own files, optimizer.safetensors, and manifest.json

A checkpoint is written into a temporary folder; its manifest, with the size and SHA-256 of every file, comes last;
then one rename makes it real. Whatever happens before that rename leaves the previous checkpoint the newest one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError, FormatError
from .formats import atomic_file, read_json, write_json
from .formats.disk import sync_folder

MANIFEST = "manifest.json"
KEPT = 2  # checkpoints: the newest, and one to fall back on


def open_folder(out: str | Path, resume: bool = False) -> Path:
    """The folder of a run, made if need be. ConfigError if it holds anything and the run is not a resumed one."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file, not a folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        resumable = ", or go on with --resume auto" if _by_step(out / "checkpoints") else ""
        raise ConfigError(f"--out {str(out)!r} is not empty: choose another folder, or remove it{resumable}")
    out.mkdir(parents=True, exist_ok=True)
    probe = out / f".probe-{os.getpid()}"  # a folder that cannot be written to is known now, not after the training
    probe.touch()
    probe.unlink()
    return out


def numbered_folder(parent: str | Path, stem: str) -> Path:
    """A new folder parent/stem-001, stem-002, ...: the first number that is free."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    for number in range(1, 1_000_000):
        folder = Path(parent) / f"{stem}-{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise ConfigError(f"no number is free for {stem} in {str(parent)!r}")


class Log:
    """A file of JSON lines. On resuming at `step`, lines of that step and later are dropped: none is written twice."""

    def __init__(self, path: Path, step: int = 0):
        if step and path.exists():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            try:
                kept = [line for line in lines if json.loads(line)["step"] < step]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{str(path)!r} has a line that is no JSON with a step: {error}"[:500]) from None
            with atomic_file(path) as file:
                file.writelines(kept)
        self._file = open(path, "a" if step else "w", encoding="utf-8")  # noqa: SIM115 - __exit__ closes it

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Make OUT/checkpoints/step-N real in one rename: what `write(folder)` writes, and `state` in the manifest."""
    parent = out / "checkpoints"
    parent.mkdir(exist_ok=True)
    for stale in parent.glob("step-*.tmp-*"):  # left by a run that was killed while saving
        shutil.rmtree(stale, ignore_errors=True)
    final, temporary = parent / f"step-{step}", parent / f"step-{step}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        write(temporary)
        files = {p.relative_to(temporary).as_posix(): p for p in sorted(temporary.rglob("*")) if p.is_file()}
        entries = {name: {"size": p.stat().st_size, "sha256": _sha256(p)} for name, p in files.items()}
        write_json(temporary / MANIFEST, {"step": step, "state": state, "files": entries})
        sync_folder(temporary)
        if final.exists():  # a run that went back to an older step: at no moment is there neither
            os.rename(final, parent / f"{temporary.name}-old")
        os.rename(temporary, final)
        sync_folder(parent)
        shutil.rmtree(parent / f"{temporary.name}-old", ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    others = [folder for folder in _by_step(parent) if folder != final]  # a run may have gone back to an older step
    for old in others[: 1 - KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def find_checkpoint(resume: str | Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest) of the checkpoint that `resume` names, or for "auto" the newest sound one in `out`.

    CheckpointError if there is none, or if the named one is damaged. "auto" passes over a damaged one with a warning.
    """
    if resume != "auto":
        return Path(resume), _verified(Path(resume))
    found = _by_step(out / "checkpoints")
    for folder in reversed(found):
        try:
            return folder, _verified(folder)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    raise CheckpointError(f"{str(out)!r} has no {'sound ' if found else ''}checkpoint to resume from")


def _by_step(parent: Path) -> list[Path]:
    found = [p for p in parent.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def _verified(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{str(folder)!r} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = read_json(folder / MANIFEST, limit=1 << 30)  # it holds the loss of every step
        present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        step, state, files = manifest["step"], manifest["state"], manifest["files"]
        if type(step) is not int or not isinstance(state, dict):
            raise KeyError("step")
        for name, entry in files.items():
            path = present.get(name)  # so that no name leads out of the folder
            if path is None or path.stat().st_size != entry["size"] or _sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{str(folder)!r} is damaged: {name!r:.100} is not what {MANIFEST} says")
    except (FormatError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(folder)!r} is damaged: {MANIFEST} cannot be read ({error})"[:500]) from error
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
