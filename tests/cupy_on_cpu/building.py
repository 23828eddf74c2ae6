"""Shared libraries out of C++, compiled once and kept in a folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from .packages import EmulationError

SOURCES = Path(__file__).parent / "src"


def cache() -> Path:
    """The folder for compiled files: CUPY_ON_CPU_CACHE, or one in the temporary directory."""
    named = os.environ.get("CUPY_ON_CPU_CACHE")
    default = Path(tempfile.gettempdir()) / f"cupy-on-cpu-{os.getuid()}"
    folder = Path(named) if named else default
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Libraries are loaded from it, so nobody else may write there.
    if folder.stat().st_uid != os.getuid():
        raise EmulationError(f"{folder} belongs to another user: set CUPY_ON_CPU_CACHE")
    return folder.resolve()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def write_source(path: Path, text: str) -> None:
    """Write the file unless it exists; another process never sees a part of it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def build(target: Path, options: list[str], source: Path) -> Path:
    """`target`, compiled from `source` unless it exists; by one process, for which others wait."""
    if target.exists():
        return target
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not target.exists():
            temporary = target.with_suffix(".new")
            _compile(temporary, options, source)
            temporary.replace(target)
    return target


def _compile(target: Path, options: list[str], source: Path) -> None:
    command = ["g++", "-w", "-fPIC", "-shared", "-std=c++17", *options, str(source)]
    command += ["-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"g++ failed on {source}: {done.stderr[:3000]}")
