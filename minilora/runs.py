"""A run's folder: one writer at a time, logs that only grow, and checkpoints that are there whole or not at all.

    OUT/.lock                        while a run writes; the kernel's lock on it goes with the process
    OUT/log.jsonl, eval.jsonl        one line a step, one an evaluation
    OUT/checkpoints/step-N/          the ecosystem's own files, optimizer.safetensors, and manifest.json

A checkpoint is written into a temporary folder; its manifest, with the size and SHA-256 of every file, comes last;
then one rename makes it real. Whatever happens before that rename leaves the previous checkpoint the newest one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError, FormatError, LockError
from .formats import atomic_file, read_json, write_json
from .formats.disk import quoted, sync_folder

LOCK = ".lock"
MANIFEST = "manifest.json"
KEPT = 2  # checkpoints: the newest, and one to fall back on

# ---- the folder -----------------------------------------------------------------------------------------------------

_held: ContextVar[frozenset[str]] = ContextVar("folders held", default=frozenset())


@contextmanager
def locked(out: str | Path) -> Iterator[Path]:
    """Hold a run's folder, made if need be, for the block. LockError while another thread or process holds it.

    Who holds it in the same context may take it again: a command does so around all that it writes, and `train` for
    itself. The lock is flock's on OUT/.lock, so a killed run leaves a file that is simply taken. Where a file system
    has no locks, that is one warning. A folder that cannot be written to is an OSError, before anything is computed.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    before, key = _held.get(), os.path.realpath(out)
    if key in before:
        yield out
        return
    path = out / LOCK
    descriptor = _lock_file(path)
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b"%d\n" % os.getpid())
        _held.set(before | {key})
        yield out
    finally:
        _held.set(before)
        with suppress(
            OSError
        ):  # the folder may be gone. Removed while it is locked: nobody can be waiting for it
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.unlink(path)
        os.close(descriptor)


def _lock_file(path: Path) -> int:
    """A descriptor that holds the lock on `path`, made if need be."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _flock(descriptor, path)
            # Whoever held it until now has removed it: then this is no longer the file that others will lock.
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, path: Path) -> None:
    content = os.read(descriptor, 30).strip()
    if content and not content.isdigit():
        raise ConfigError(
            f"{quoted(path)} is no lock of a run: choose another folder, or move it away"
        )
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        _warn_unlocked(path, "this system has no flock")
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            who = f"process {int(content)}" if content else "another process"
            raise LockError(
                f"{quoted(path.parent)} is in use: {who} is writing there; choose another folder"
            ) from None
        if error.errno not in (
            errno.ENOLCK,
            errno.ENOTSUP,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
            errno.EINVAL,
        ):
            raise
        _warn_unlocked(path, str(error.strerror))


def _warn_unlocked(path: Path, reason: str) -> None:
    warnings.warn(
        f"{quoted(path.parent)} cannot be locked ({reason}): let no other run write there",
        stacklevel=2,
    )


def open_folder(out: str | Path, resume: bool = False) -> Path:
    """The folder of a run, made if need be. ConfigError if it holds anything and the run is not a resumed one.

    Two that come at once may both find it empty, unless this is called, and everything written, inside `locked(out)`.
    """
    with locked(out) as folder:
        if not resume and any(name != LOCK for name in os.listdir(folder)):
            resumable = ", or go on with --resume auto" if _by_step(folder / "checkpoints") else ""
            raise ConfigError(
                f"--out {str(out)!r} is not empty: choose another folder, or remove it{resumable}"
            )
    return folder


def require_room(out: Path, size: int) -> None:
    """OSError where the disk has less than `size` bytes left for a run: better now than after the training."""
    disk = shutil.disk_usage(out)
    if disk.total and disk.free < size:  # some network file systems report 0 of 0
        raise OSError(
            errno.ENOSPC, f"saving takes {size:,} bytes, the disk has {disk.free:,}", str(out)
        )


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


# ---- logs -----------------------------------------------------------------------------------------------------------


class Log:
    """A file of JSON lines. On resuming at `step`, lines of that step and later are dropped: none is written twice.

    JSON has no NaN and no infinity: they stand as the strings "nan", "inf" and "-inf", which float() reads.
    """

    def __init__(self, path: Path, step: int = 0):
        if step and path.is_file():
            lines = [
                line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
            ]
            try:
                kept = [line for line in lines if json.loads(line)["step"] < step]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{str(path)!r} has a line that is no JSON with a step: {error}"[:500]
                ) from None
            with atomic_file(path) as file:
                file.writelines(kept)
        self._file = open(path, "a" if step else "w", encoding="utf-8")  # noqa: SIM115 - __exit__ closes it

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, **record: Any) -> None:
        strict = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._file.write(json.dumps(strict, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Onto the disk, where a regular file lies: before a checkpoint that says these steps were taken."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (
                errno.EINVAL,
                errno.ENOTSUP,
            ):  # as for a pipe or a device: nothing to force
                raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `Log`, oldest first, but for one that is being written."""
    return [
        json.loads(line)
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(
    out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None]
) -> Path:
    """Make OUT/checkpoints/step-N real in one rename: what `write(folder)` writes, and `state` in the manifest.

    Call it inside `locked(out)`. After an error the same call may be made again.
    """
    parent = out / "checkpoints"
    os.makedirs(parent, exist_ok=True)
    remove_stale(out)
    final, temporary = parent / f"step-{step}", parent / f"step-{step}.tmp-{os.getpid()}"
    replaced = parent / f"{final.name}.old"
    try:
        os.mkdir(temporary)
        write(temporary)
        files = {
            p.relative_to(temporary).as_posix(): p
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        entries = {
            name: {"size": p.stat().st_size, "sha256": _sha256(p)} for name, p in files.items()
        }
        write_json(
            temporary / MANIFEST, {"step": step, "state": state, "files": entries}
        )  # and sync_folder(temporary)
        if final.exists():  # a run that went back to an older step: at no moment is there neither
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync_folder(parent)
        sync_folder(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    others = [folder for folder in _by_step(parent) if folder not in (final, replaced)]
    for old in [replaced, *others[: 1 - KEPT]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def remove_stale(out: Path) -> None:
    """Remove what runs that were killed while saving have left. Call it inside `locked(out)`."""
    for stale in (out / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


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
    raise CheckpointError(
        f"{str(out)!r} has no {'sound ' if found else ''}checkpoint to resume from"
    )


def _by_step(parent: Path) -> list[Path]:
    """The checkpoints, oldest first. step-N.old is one whose run was killed when it had all but replaced it."""
    found = [
        p
        for p in parent.glob("step-*")
        if p.name[5:].removesuffix(".old").isdecimal() and p.is_dir()
    ]
    return sorted(
        found, key=lambda p: (int(p.name[5:].removesuffix(".old")), not p.name.endswith(".old"))
    )


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
            if (
                path is None
                or path.stat().st_size != entry["size"]
                or _sha256(path) != entry["sha256"]
            ):
                raise CheckpointError(
                    f"{str(folder)!r} is damaged: {name!r:.100} is not what {MANIFEST} says"
                )
    except (FormatError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(folder)!r} is damaged: {MANIFEST} cannot be read ({error})"[:500]
        ) from error
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
