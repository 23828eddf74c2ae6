"""Folders: one writer at a time, and a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, LockError
from .disk import quoted, read_json, sync_folder, write_json

_locked: ContextVar[frozenset[str]] = ContextVar("folders locked", default=frozenset())
STAMP = "inputs.json"  # in an unfinished folder: what it is being made of


def require_outside(out: str | Path, **sources: str | Path) -> None:
    """ConfigError if `out` is one of the folders `sources`, by the names of their options, or inside one."""
    there = Path(out).resolve()
    for name, source in sources.items():
        if Path(source).resolve() in (there, *there.parents):
            raise ConfigError(f"--out {str(out)!r} is inside --{name}: choose another folder")


@contextmanager
def new_folder(out: str | Path, inputs: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into that becomes `out`, which must be new or empty, when the block ends well.

    What fails, or is interrupted, takes it away. A run that was killed leaves it beside `out`; the next one with the
    same `inputs` finds there what was finished, and another one starts afresh.
    """
    there = Path(out).exists()
    try:
        with locked(out) as held:
            open_folder(held)
            real = held.resolve()
            stage = real.parent / f".{_short(real.name)}.unfinished"
            try:
                _begin(stage, {"out": real.name, **inputs})
                yield stage
                (stage / STAMP).unlink()
                for file in stage.glob(".*"):
                    file.unlink()
                sync_folder(stage)
                (real / LOCK).unlink()
                real.rmdir()  # whoever takes the lock in between makes this fail, and has the folder
                os.rename(stage, real)
                sync_folder(real.parent)
            except BaseException:  # KeyboardInterrupt too
                shutil.rmtree(stage, ignore_errors=True)
                raise
    except BaseException:
        with suppress(OSError):  # there is something in it, then
            if there:
                Path(out).mkdir(exist_ok=True)
            else:
                Path(out).rmdir()
        raise


def _short(name: str) -> str:
    """A name that can be made longer. Two that begin alike differ: runs at once must not share an unfinished folder."""
    return (
        name
        if len(name) <= 40
        else f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    )


def _begin(stage: Path, inputs: Mapping[str, Any]) -> None:
    if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
        raise FormatError(f"{quoted(stage)} is in the way")
    asked = json.loads(json.dumps(inputs))
    with suppress(OSError, FormatError):
        if read_json(stage / STAMP) == asked:
            return
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    write_json(stage / STAMP, asked)


def fingerprint(folder: str | Path) -> dict[str, list[int]]:
    """Sizes and times of the files that a folder's meaning depends on: two that are alike hold the same."""
    found = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix in (".safetensors", ".json") and file.is_file():
            stat = file.stat()
            found[str(file.relative_to(folder))] = [stat.st_size, stat.st_mtime_ns]
    return found


LOCK = ".lock"


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
    before, key = _locked.get(), os.path.realpath(out)
    if key in before:
        yield out
        return
    path = out / LOCK
    descriptor = _lock_file(path)
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b"%d\n" % os.getpid())
        _locked.set(before | {key})
        yield out
    finally:
        _locked.set(before)
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
            resumable = (
                ", or go on with --resume auto"
                if checkpoints_by_step(folder / "checkpoints")
                else ""
            )
            raise ConfigError(
                f"--out {str(out)!r} is not empty: choose another folder, or remove it{resumable}"
            )
    return folder


def require_free_space(out: Path, size: int) -> None:
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


def checkpoints_by_step(parent: Path) -> list[Path]:
    """The checkpoints, oldest first. step-N.old is one whose run was killed when it had all but replaced it."""
    found = [
        p
        for p in parent.glob("step-*")
        if p.name[5:].removesuffix(".old").isdecimal() and p.is_dir()
    ]
    return sorted(
        found, key=lambda p: (int(p.name[5:].removesuffix(".old")), not p.name.endswith(".old"))
    )
