"""A disk that fails: every change is counted and may go wrong, and the power may be cut.

    Disk          counts and records every change made through `os`; one of them goes wrong
    in_child      a function in its own process, which may end without any except or finally
    start, wait   the two halves of `in_child`
    power_cuts    every state in which a power cut during the recorded changes may leave a folder
    naive_save    a checkpoint written without care, which these tools must be able to detect

The model of a power cut is stricter than most file systems: the bytes of a file are those of its
last fsync, and the names in a folder are those of its last fsync or the present ones, for each
folder independently.
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
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

NO_ROOM = OSError(errno.ENOSPC, "No space left on device")
NO_DISK = OSError(errno.EIO, "Input/output error")
TAKES_ROOM = ("create", "write", "mkdir")


def no_room(disk: Disk, kind: str) -> None:
    """A full disk, once: the next change may succeed."""
    raise OSError(NO_ROOM.errno, NO_ROOM.strerror)


def no_disk(disk: Disk, kind: str) -> None:
    raise OSError(NO_DISK.errno, NO_DISK.strerror)


def stay_full(disk: Disk, kind: str) -> None:
    """A full disk from now on; files can still be renamed and removed."""
    disk.at = disk.changes + 1
    if kind in TAKES_ROOM:
        raise OSError(NO_ROOM.errno, NO_ROOM.strerror)


def power_off(disk: Disk, kind: str) -> None:
    os._exit(9)


class Disk:
    """In its block, changes number 1, 2, ... to the disk are recorded.

    `wrong(disk, kind)` is called before number `at`. A write that goes wrong has written its first
    half by then.
    """

    def __init__(self, at: int | None = None, wrong: Callable[[Disk, str], None] = no_room):
        self.at = at
        self.wrong = wrong
        self.changes = 0
        self.events: list[tuple[Any, ...]] = []
        self._paths: dict[int, str] = {}  # of open descriptors

    def __enter__(self) -> Disk:
        self._patch = pytest.MonkeyPatch()
        plain = {name: getattr(os, name) for name in ("open", "fdopen", "mkdir", "rmdir", "unlink")}

        def path_of(path: Any, dir_fd: int | None = None) -> str:
            folder = "" if dir_fd is None else self._paths[dir_fd]
            return os.path.abspath(os.path.join(folder, os.fspath(path)))

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT:
                self._change("create")
            descriptor: int = plain["open"](path, flags, mode, dir_fd=dir_fd)
            whole = path_of(path, dir_fd)
            self._paths[descriptor] = whole
            self.events.append(("open", whole, descriptor, bool(flags & os.O_TRUNC)))
            return descriptor

        def fdopen(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if mode != "wb":
                return plain["fdopen"](descriptor, mode, *rest, **options)
            return io.BufferedWriter(_Raw(descriptor, self))

        def fsync(descriptor: int) -> None:
            # Its effect is only visible after a power cut: no need to wait for the disk.
            self._change("fsync")
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

        self._patch.setattr(os, "open", open_)
        self._patch.setattr(os, "fdopen", fdopen)
        self._patch.setattr(os, "fsync", fsync)
        changes = {kind: named(kind) for kind in ("mkdir", "rmdir", "unlink")}
        changes |= {kind: renaming(kind) for kind in ("rename", "replace")}
        for name, change in changes.items():
            self._patch.setattr(os, name, change)
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
    """The number of a new copy of this process, which does `work` and ends.

    Its exit code is 0, or 1 after an exception.
    """
    with warnings.catch_warnings():
        # BLAS has threads; it makes new ones in the child.
        warnings.simplefilter("ignore", DeprecationWarning)
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


# ---- power cuts ----------------------------------------------------------------------------------


class _File:
    def __init__(self, content: bytes = b"", durable: bytes = b""):
        self.content = content
        self.durable = durable


class _Folder:
    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.durable: dict[str, Any] = {}

    @classmethod
    def of(cls, path: Path) -> _Folder:
        """A folder whose files and names are all on the disk."""
        folder = cls()
        for p in path.iterdir():
            if p.is_dir():
                folder.names[p.name] = cls.of(p)
            else:
                folder.names[p.name] = _File(p.read_bytes(), p.read_bytes())
        folder.durable = dict(folder.names)
        return folder

    def below(self) -> Iterator[_Folder]:
        yield self
        for node in {id(n): n for n in (*self.names.values(), *self.durable.values())}.values():
            if isinstance(node, _Folder):
                yield from node.below()


def power_cuts(out: Path, work: Callable[[], object]) -> list[tuple[int, Any]]:
    """[(events before the cut, what is left)] for every state in which a cut may leave `out`.

    `work` is done and changes the folder `out`. What is left is a tree {name: bytes or tree}. The
    largest number is that of all events.
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

    states: dict[Any, tuple[int, Any]] = {}
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
        unsure = {id(folder) for folder in root.below() if folder.names != folder.durable}
        assert len(unsure) <= 6
        for size in range(len(unsure) + 1):
            for present in itertools.combinations(unsure, size):
                tree = _after_cut(root, present)
                states[_frozen(tree)] = number, tree  # the latest moment of this state
    return list(states.values())


def _after_cut(folder: _Folder, present: Collection[int]) -> dict[str, Any]:
    """What a cut leaves if the folders `present` (by id) have their present names."""
    tree = {}
    names = folder.names if id(folder) in present else folder.durable
    for name, node in names.items():
        tree[name] = node.durable if isinstance(node, _File) else _after_cut(node, present)
    return tree


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


# ---- how not to save -----------------------------------------------------------------------------


def naive_save(out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """runs.save_checkpoint without care: file by file under the final name, nothing synced."""
    folder = out / "checkpoints" / f"step-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    # `write` is careful by itself: only its bytes are wanted.
    source = out.with_name(f"{out.name}.source")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    write(source)
    contents = {}
    entries = {}
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source)
        content = path.read_bytes()
        contents[name] = content
        digest = hashlib.sha256(content).hexdigest()
        entries[name.as_posix()] = {"size": len(content), "sha256": digest}
    shutil.rmtree(source)
    manifest = {"step": step, "state": state, "files": entries}
    contents[Path("manifest.json")] = json.dumps(manifest).encode()
    for name, content in contents.items():
        os.makedirs((folder / name).parent, exist_ok=True)
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    for old in sorted((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))[:-2]:
        shutil.rmtree(old)
    return folder
