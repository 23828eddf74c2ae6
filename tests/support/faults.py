"""A disk that fails: what changes it is counted, may go wrong at any one point, and can be cut off from its power.

    Disk          counts and records every change that Python code makes through `os`; number `at` goes wrong
    in_child      a function in a process of its own, which may end without any except or finally; start, wait
    power_cuts    every state in which a power cut during the recorded changes may leave a folder
    naive_save    a checkpoint written as one would without a thought: what all this must be able to see

The model of a power cut is stricter than most file systems: the bytes of a file are those of its last fsync, and the
names in a folder are those of its last fsync or the present ones, for each folder by itself.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NO_ROOM, NO_DISK = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
)
TAKES_ROOM = ("create", "write", "mkdir")


def no_room(disk: Disk, kind: str) -> None:
    """Once: there may be room again the next moment."""
    raise OSError(NO_ROOM.errno, NO_ROOM.strerror)


def no_disk(disk: Disk, kind: str) -> None:
    raise OSError(NO_DISK.errno, NO_DISK.strerror)


def stay_full(disk: Disk, kind: str) -> None:
    """From now on there is no room, but what is there can still be renamed and removed."""
    disk.at = disk.changes + 1
    if kind in TAKES_ROOM:
        raise OSError(NO_ROOM.errno, NO_ROOM.strerror)


def power_off(disk: Disk, kind: str) -> None:
    os._exit(9)


class Disk:
    """In its block, changes number 1, 2, ... to the disk are recorded; `wrong(disk, kind)` comes before number `at`.

    A write that goes wrong has by then written its first half.
    """

    def __init__(self, at: int | None = None, wrong: Callable[[Disk, str], None] = no_room):
        self.at, self.wrong, self.changes = at, wrong, 0
        self.events: list[tuple[Any, ...]] = []
        self._paths: dict[int, str] = {}  # of open descriptors

    def __enter__(self) -> Disk:
        self._patch = pytest.MonkeyPatch()
        plain = {name: getattr(os, name) for name in ("open", "fdopen", "mkdir", "rmdir", "unlink")}

        def path_of(path: Any, dir_fd: int | None = None) -> str:
            return os.path.abspath(
                os.path.join(self._paths[dir_fd] if dir_fd is not None else "", os.fspath(path))
            )

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT:
                self._change("create")
            descriptor: int = plain["open"](path, flags, mode, dir_fd=dir_fd)
            self._paths[descriptor] = path_of(path, dir_fd)
            self.events.append(
                ("open", self._paths[descriptor], descriptor, bool(flags & os.O_TRUNC))
            )
            return descriptor

        def fdopen(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if mode != "wb":
                return plain["fdopen"](descriptor, mode, *rest, **options)
            return io.BufferedWriter(_Raw(descriptor, self))

        def fsync(descriptor: int) -> None:
            self._change(
                "fsync"
            )  # what it gives is only seen after a power cut: no need to wait for the disk
            self.events.append(("fsync", descriptor))

        def named(kind: str) -> Callable[..., None]:
            def change(path: Any, *rest: Any, dir_fd: int | None = None) -> None:
                self._change(kind)
                plain[kind](path, *rest, dir_fd=dir_fd)
                self.events.append((kind, path_of(path, dir_fd)))

            return change

        def renaming(kind: str) -> Callable[..., None]:
            original = getattr(os, kind)

            def change(source: Any, target: Any) -> None:
                self._change("rename")
                original(source, target)
                self.events.append(("rename", path_of(source), path_of(target)))

            return change

        hooks = {"open": open_, "fdopen": fdopen, "fsync": fsync}
        hooks |= {kind: named(kind) for kind in ("mkdir", "rmdir", "unlink")}
        hooks |= {kind: renaming(kind) for kind in ("rename", "replace")}
        for name, hook in hooks.items():
            self._patch.setattr(os, name, hook)
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.undo()

    def _change(self, kind: str, before_it_fails: Callable[[], object] = lambda: None) -> None:
        self.changes += 1
        if self.changes == self.at:
            before_it_fails()
            self.wrong(self, kind)


class _Raw(io.FileIO):
    """A file whose every write to the system goes through a Disk."""

    def __init__(self, descriptor: int, disk: Disk):
        super().__init__(descriptor, "wb")
        self._disk = disk

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._disk._change("write", lambda: io.FileIO.write(self, content[: len(content) // 2]))
        written = super().write(content)
        self._disk.events.append(("write", self.fileno(), content[:written]))
        return written


def start(work: Callable[[], object]) -> int:
    """The number of a new copy of this process, which does `work` and ends: with 0, or with 1 after an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # BLAS has threads; it makes new ones in the child
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    """The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], object]) -> int:
    return wait(start(work))


# ---- power cuts -----------------------------------------------------------------------------------------------------


class _File:
    def __init__(self, content: bytes = b"", durable: bytes = b""):
        self.content, self.durable = content, durable


class _Folder:
    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.durable: dict[str, Any] = {}

    @classmethod
    def of(cls, path: Path) -> _Folder:
        """A folder that has been on the disk for long."""
        folder = cls()
        for p in path.iterdir():
            folder.names[p.name] = (
                cls.of(p) if p.is_dir() else _File(p.read_bytes(), p.read_bytes())
            )
        folder.durable = dict(folder.names)
        return folder

    def below(self) -> Iterator[_Folder]:
        yield self
        for node in {id(n): n for n in (*self.names.values(), *self.durable.values())}.values():
            if isinstance(node, _Folder):
                yield from node.below()


def power_cuts(out: Path, work: Callable[[], object]) -> list[tuple[int, Any]]:
    """Do `work`, which changes the folder `out`. (changes before the cut, what is left) for every way it may be left.

    What is left is a tree {name: bytes or tree}. The number is that of events; the last is that of all of them.
    """
    root = _Folder.of(out)
    with Disk() as disk:
        work()
    opened: dict[int, Any] = {}
    outside = _Folder()

    def place(path: str) -> tuple[_Folder, str]:
        if not Path(path).is_relative_to(out.absolute()):
            return outside, path
        *parents, name = Path(path).relative_to(out.absolute()).parts or (None,)
        folder = root
        for parent in parents:
            folder = folder.names[parent]
        return folder, name

    found: dict[Any, tuple[int, Any]] = {}
    for number, (kind, *rest) in enumerate([("start",), *disk.events]):
        if kind == "open":
            path, descriptor, truncated = rest
            folder, name = place(path)
            node = root if name is None else folder.names.setdefault(name, _File())
            if truncated:
                node.content = b""
            opened[descriptor] = node
        elif kind == "write":
            opened[rest[0]].content += rest[1]
        elif kind == "fsync":
            node = opened[rest[0]]
            node.durable = node.content if isinstance(node, _File) else dict(node.names)
        elif kind == "mkdir":
            folder, name = place(rest[0])
            folder.names[name] = _Folder()
        elif kind in ("unlink", "rmdir"):
            folder, name = place(rest[0])
            folder.names.pop(name)
        elif kind == "rename":
            (source, old), (target, new) = place(rest[0]), place(rest[1])
            target.names[new] = source.names.pop(old)
        unsure = [
            folder
            for folder in {id(f): f for f in root.below()}.values()
            if folder.names != folder.durable
        ]
        assert len(unsure) <= 6
        for choice in itertools.product([False, True], repeat=len(unsure)):
            tree = _left(
                root, {id(folder) for folder, kept in zip(unsure, choice, strict=True) if kept}
            )
            key = _frozen(tree)
            found[key] = number, tree  # the latest moment at which it may be left so
    return list(found.values())


def _left(folder: _Folder, present: set[int]) -> dict[str, Any]:
    names = folder.names if id(folder) in present else folder.durable
    return {k: v.durable if isinstance(v, _File) else _left(v, present) for k, v in names.items()}


def _frozen(tree: dict[str, Any]) -> Any:
    return tuple(sorted((k, v if isinstance(v, bytes) else _frozen(v)) for k, v in tree.items()))


def write_tree(folder: Path, tree: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_tree(folder / name, content)


def read_tree(folder: Path) -> dict[str, Any]:
    return {p.name: read_tree(p) if p.is_dir() else p.read_bytes() for p in folder.iterdir()}


# ---- how not to do it -----------------------------------------------------------------------------------------------


def naive_save(out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """runs.save_checkpoint without its care: file by file into the folder's final name, nothing forced to the disk."""
    folder = out / "checkpoints" / f"step-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    elsewhere = out.with_name(
        f"{out.name}.source"
    )  # `write` is careful by itself: only its bytes are wanted
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir()
    write(elsewhere)
    names = sorted(p.relative_to(elsewhere) for p in elsewhere.rglob("*") if p.is_file())
    contents = {name: (elsewhere / name).read_bytes() for name in names}
    shutil.rmtree(elsewhere)
    entries = {
        k.as_posix(): {"size": len(v), "sha256": hashlib.sha256(v).hexdigest()}
        for k, v in contents.items()
    }
    manifest = {"step": step, "state": state, "files": entries}
    for name, content in {**contents, Path("manifest.json"): json.dumps(manifest).encode()}.items():
        os.makedirs((folder / name).parent, exist_ok=True)
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    for old in sorted((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))[:-2]:
        shutil.rmtree(old)
    return folder
