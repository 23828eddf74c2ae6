"""Folders to write into: one writer at a time, and a folder that appears whole or not at all.

locked                 one writer at a time                        OUT/.lock, while it writes
require_empty          refuse a folder that holds something
numbered_folder        the first free name of runs/demo-001, demo-002, ...
require_free_space     refuse a disk that is too full
require_outside        refuse to write into a folder that is read
begin_stage            a folder to fill, with a stamp in it that says whose it is
whole_folder           rename a finished stage to its place, remove an unfinished one
new_folder             a stage that a killed run leaves, and the next run continues
remove_folder          remove a folder, its stamp last

Only what this program made is ever removed: a lock file with its mark, a folder with its stamp.
Anything else under such a name belongs to somebody, and is named in an error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, LockError
from .disk import JsonObject, name_errors, quoted, read_json, sync_folder, write_json

LOCK = ".lock"
MARK = b"minilora "  # begins a lock file of this program; the number of the process follows
STAMP = ".minilora-unfinished.json"  # in an unfinished folder: what it is made from

# The folders that this context has locked, by their real paths.
_locked: ContextVar[frozenset[str]] = ContextVar("folders locked", default=frozenset())

# What flock says where the file system has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# ---- one writer at a time ------------------------------------------------------------------------


@contextmanager
def locked(out: str | Path) -> Iterator[Path]:
    """Lock a run's folder for the block; the folder is made if need be.

    The same context may lock it again: a command does so around all that it writes, and `train`
    for itself. The lock is flock's on OUT/.lock, so the file that a killed run leaves is simply
    taken. A file system without locks causes one warning. LockError while another thread or
    process has the lock; ConfigError if OUT/.lock is not a lock of this program; OSError, before
    anything is computed, for a folder that cannot be written.
    """
    out = Path(out)
    if os.path.lexists(out) and not out.is_dir():
        what = "a file" if out.exists() else "a symbolic link that leads nowhere"
        raise ConfigError(f"--out {str(out)!r} is {what}, not a folder: choose another")
    out.mkdir(parents=True, exist_ok=True)
    before = _locked.get()
    key = os.path.realpath(out)
    if key in before:
        yield out
        return
    path = out / LOCK
    descriptor = _open_locked(path)
    try:
        with name_errors(path):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, b"%s%d\n" % (MARK, os.getpid()))
        _locked.set(before | {key})
        yield out
    finally:
        _locked.set(before)
        # The file goes while it is locked, so that nobody can be waiting for it. The folder may be
        # gone already.
        with suppress(OSError):
            if _is_same_file(path, descriptor):
                os.unlink(path)
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """A descriptor of the file `path`, made if need be, with the lock on it."""
    flags = os.O_RDWR | os.O_CREAT
    # Neither follow a link to another file, nor wait for the other end of a pipe.
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        # Before it is opened: to open a device can have effects of its own.
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise _not_a_lock(path)
        descriptor = os.open(path, flags, 0o666)
        try:
            with name_errors(path):
                _lock(descriptor, path)
            # The writer before may have removed the file: then others will lock a new one.
            if _is_same_file(path, descriptor):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    return os.path.samestat(os.stat(path), os.fstat(descriptor))


def _lock(descriptor: int, path: Path) -> None:
    content = os.read(descriptor, 40)
    number = content.removeprefix(MARK).strip()
    # A run that was killed between making the file and writing to it leaves it empty.
    if content and not (content.startswith(MARK) and number.isdigit()):
        raise _not_a_lock(path)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        _warn_unlocked(path, "this system has no flock")
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            writer = f"process {int(number)}" if number else "another process"
            raise LockError(
                f"{quoted(path.parent)} is in use: {writer} is writing there; choose another folder"
            ) from None
        if error.errno not in NO_LOCKS:
            raise
        _warn_unlocked(path, str(error.strerror))


def _not_a_lock(path: Path) -> ConfigError:
    return ConfigError(
        f"{quoted(path)} is not the lock of a run: choose another folder, or move it away"
    )


def _warn_unlocked(path: Path, reason: str) -> None:
    text = f"{quoted(path.parent)} cannot be locked ({reason}): let no other run write there"
    warnings.warn(text, stacklevel=2)


# ---- which folder --------------------------------------------------------------------------------


def require_empty(folder: Path, advice: str = "") -> None:
    """ConfigError if the folder holds anything but its lock; `advice` ends the message."""
    if set(os.listdir(folder)) - {LOCK}:
        raise ConfigError(
            f"--out {str(folder)!r} is not empty: choose another folder, or remove it{advice}"
        )


def numbered_folder(parent: str | Path, stem: str) -> Path:
    """A new folder parent/stem-001, stem-002, ...: the first number that is free."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    for number in range(1, 1_000_000):
        folder = Path(parent, f"{stem}-{number:03d}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise ConfigError(f"{str(parent)!r} has no free number for {stem}: remove some of its folders")


def require_free_space(out: Path, size: int) -> None:
    """OSError if the disk has less than `size` bytes left: better now than after the training."""
    disk = shutil.disk_usage(out)
    if disk.total and disk.free < size:  # some network file systems report 0 of 0
        raise OSError(
            errno.ENOSPC, f"saving takes {size:,} bytes, the disk has {disk.free:,}", str(out)
        )


def require_outside(out: str | Path, **sources: str | Path) -> None:
    """ConfigError if `out` is one of the folders `sources` (by option name), or inside one."""
    place = Path(out).resolve()
    for option, source in sources.items():
        if Path(source).resolve() in (place, *place.parents):
            raise ConfigError(f"--out {str(out)!r} is inside --{option}: choose another folder")


def fingerprint(folder: str | Path) -> dict[str, list[int]]:
    """{file: [size, time]} for the files that give a folder its meaning: a change shows in it."""
    result = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix in (".safetensors", ".json") and file.is_file():
            stat = file.stat()
            result[str(file.relative_to(folder))] = [stat.st_size, stat.st_mtime_ns]
    return result


# ---- whole or not at all -------------------------------------------------------------------------


def begin_stage(stage: Path, stamp: str, content: JsonObject) -> None:
    """Make the folder `stage`, which must be new, with the file `stamp` that says whose it is."""
    stage.mkdir()
    try:
        write_json(stage / stamp, content)
    except BaseException:
        remove_folder(stage, stamp)
        raise


def remove_folder(folder: Path, stamp: str) -> None:
    """Remove a folder with its stamp last: what a kill leaves of it is still known as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != stamp:
            path.unlink()
    shutil.rmtree(folder)


def is_empty_stage(stage: Path, stamp: str) -> bool:
    """Whether the folder has nothing in it: its run was killed before it had written the stamp."""
    if stage.is_symlink() or not stage.is_dir():
        return False
    return all(name.startswith(f".{stamp[:40]}.tmp-") for name in os.listdir(stage))


@contextmanager
def whole_folder(
    stage: Path, place: Path, make_way: Callable[[], object], stamp: str = STAMP
) -> Iterator[None]:
    """Rename `stage`, a folder that the block fills, to `place`; remove it if anything fails.

    The stage is this program's (see `begin_stage`) and beside its place: a rename is one step for
    the file system. Before it, the stage's names are forced to the disk (the files in it are the
    block's business), and `make_way` frees the place. A crash leaves the stage or the whole folder,
    never a part under the final name.
    """
    try:
        yield
        sync_folder(stage)
        make_way()
        os.rename(stage, place)
        sync_folder(place.parent)
    except BaseException:  # KeyboardInterrupt too
        with suppress(OSError):
            remove_folder(stage, stamp)
        raise


@contextmanager
def new_folder(out: str | Path, inputs: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into that becomes `out`, which must be new or empty, when the block ends.

    A failure or an interrupt removes it. A killed run leaves it beside `out`; the next run with the
    same `inputs` finds the finished files in it, and a run with other inputs starts afresh.
    FormatError if something that this program did not make has the name of the unfinished folder.
    """
    existed = Path(out).exists()
    try:
        with locked(out) as folder:
            require_empty(folder)
            place = folder.resolve()
            stage = place.parent / f".{_short(place.name)}.unfinished"

            def make_way() -> None:
                (place / LOCK).unlink()
                place.rmdir()  # fails if another run takes the lock in between, and has the folder
                (stage / STAMP).unlink()  # at the last moment: a stage without it is not ours

            _begin(stage, {"out": place.name, **inputs})
            with whole_folder(stage, place, make_way):
                yield stage
                for file in stage.glob(".*"):
                    if file.name != STAMP:
                        file.unlink()
    except BaseException:
        with suppress(OSError):  # the folder holds something
            if existed:
                Path(out).mkdir(exist_ok=True)
            else:
                Path(out).rmdir()
        raise


def _short(name: str) -> str:
    """A name that leaves space for a suffix; two long names that begin alike stay different.

    Runs at the same time must not share an unfinished folder.
    """
    if len(name) <= 40:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f"{name[:40]}-{digest[:12]}"


def _begin(stage: Path, inputs: Mapping[str, Any]) -> None:
    """Keep a stage that was made from the same inputs, or make an empty one."""
    content = {"unfinished folder of": "minilora", "inputs": json.loads(json.dumps(inputs))}
    if os.path.lexists(stage):
        before = _read_stamp(stage)
        if before == content:
            return
        if before is None and not is_empty_stage(stage, STAMP):
            raise FormatError(
                f"{quoted(stage)} is in the way: it is not an unfinished folder of minilora; "
                "move it away, or choose another --out"
            )
        remove_folder(stage, STAMP)
    begin_stage(stage, STAMP, content)


def _read_stamp(stage: Path) -> JsonObject | None:
    """The stamp of an unfinished folder; None for anything else."""
    path = stage / STAMP
    if stage.is_symlink() or path.is_symlink():
        return None
    with suppress(OSError, FormatError):
        content = read_json(path)
        if content.keys() == {"unfinished folder of", "inputs"}:
            return content
    return None
