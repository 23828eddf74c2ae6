"""What every hostile input must leave behind: its error, and nothing else.

    with unharmed(folder, label):  the call, caught        files, times, descriptors, memory
    with refused(Kind, message, folder, label):  the call  the same, and the error itself

The seconds and the bytes that each took are kept, and the largest are told at the end of the run (conftest.py): a time
is not asserted, but it is seen.
"""

from __future__ import annotations

import os
import re
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SPARE = 16 << 20  # bytes that a refusal may take besides twice the largest file that it was given
TAKEN: list[tuple[float, int, str]] = []  # (seconds, bytes, label) of each input


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int] | None]:
    """Every folder, and every file with its bytes and its time."""
    return {
        p: (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None
        for p in folder.rglob("*")
        if not p.is_symlink() or p.exists()
    }


def open_descriptors() -> list[str]:
    folder = Path("/proc/self/fd")
    return sorted(os.listdir(folder)) if folder.exists() else []


@contextmanager
def unharmed(folder: Path, label: str) -> Iterator[None]:
    """Inside, nothing below `folder` changes, no descriptor stays open, and memory is bounded by the files there."""
    before, descriptors = snapshot(folder), open_descriptors()
    largest = max((len(found[0]) for found in before.values() if found), default=0)
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    tracemalloc.reset_peak()
    started, begun = tracemalloc.get_traced_memory()[0], time.perf_counter()
    try:
        yield
    finally:
        seconds, taken = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1] - started
        if not running:
            tracemalloc.stop()
    TAKEN.append((seconds, taken, label))
    assert taken <= 2 * largest + SPARE, f"{taken:,} bytes for files of at most {largest:,}"
    assert snapshot(folder) == before
    assert open_descriptors() == descriptors


@contextmanager
def refused(
    kind: type[Exception], message: str, folder: Path, label: str, names: str
) -> Iterator[None]:
    """Inside, exactly `kind` is raised; its text matches `message`, names `names`, is short, and steers no terminal."""
    with unharmed(folder, label), pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert type(caught.value) is kind
    assert re.search(message, text), text
    assert names in text
    assert len(text) <= 500
    assert text.isprintable()


def told() -> str:
    """What the inputs took at most, in a line for the end of the run."""
    (seconds, _, slow), (_, memory, large) = max(TAKEN), max(TAKEN, key=lambda taken: taken[1])
    return (
        f"{len(TAKEN)} hostile inputs: the slowest took {seconds:.2f} s ({slow!r:.60}), "
        f"the largest {memory / 2**20:.1f} MiB ({large!r:.60})"
    )
