"""Shared libraries out of C++, compiled once and kept in a folder."""

from __future__ import annotations

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


def build(target: Path, options: list[str], source: Path) -> Path:
    """`target`, compiled from `source` unless it exists.

    Two processes may compile it at once: each writes a file of its own and renames it.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    command = ["g++", "-w", "-fPIC", "-shared", "-std=c++17", *options, str(source)]
    command += ["-o", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"g++ failed on {source}: {done.stderr[:3000]}")
    temporary.replace(target)
    return target
