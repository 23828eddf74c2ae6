"""What every hostile input must lead to: its error, and nothing else.

    with unharmed(folder, label):  the call, caught        files, times, descriptors, memory
    with refused(Kind, message, folder, label):  the call  the same, and the error itself

Both record the seconds and the bytes that the call took; the end of the run reports the largest
(conftest.py). Times are reported, never asserted.
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

SPARE = 16 << 20  # bytes that a refusal may take besides twice the largest file in the folder
COSTS: list[tuple[float, int, str]] = []  # (seconds, bytes, label) of each input


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int] | None]:
    """Every folder, and every file with its bytes and its time of modification."""
    contents: dict[Path, tuple[bytes, int] | None] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            contents[path] = path.read_bytes(), path.stat().st_mtime_ns
        elif path.exists() or not path.is_symlink():
            contents[path] = None
    return contents


def open_descriptors() -> list[str]:
    folder = Path("/proc/self/fd")
    return sorted(os.listdir(folder)) if folder.exists() else []


@contextmanager
def unharmed(folder: Path, label: str) -> Iterator[None]:
    """Check that the block changes nothing in `folder` and leaves no descriptor open.

    The memory that it takes is bounded by the files in the folder.
    """
    before = snapshot(folder)
    descriptors = open_descriptors()
    sizes = [len(content[0]) for content in before.values() if content]
    largest = max(sizes, default=0)
    already_tracing = tracemalloc.is_tracing()
    if not already_tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    memory, _ = tracemalloc.get_traced_memory()
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - begin
        _, peak = tracemalloc.get_traced_memory()
        if not already_tracing:
            tracemalloc.stop()
    taken = peak - memory
    COSTS.append((seconds, taken, label))
    assert taken <= 2 * largest + SPARE, f"{taken:,} bytes for files of at most {largest:,}"
    assert snapshot(folder) == before
    assert open_descriptors() == descriptors


@contextmanager
def refused(
    kind: type[Exception], message: str, folder: Path, label: str, names: str
) -> Iterator[None]:
    """Check that the block raises exactly `kind`, and that it is `unharmed`.

    The error's text matches `message`, contains `names`, is short and printable.
    """
    with unharmed(folder, label), pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert type(caught.value) is kind
    assert re.search(message, text), text
    assert names in text
    assert len(text) <= 500
    assert text.isprintable()


def summary() -> str:
    """The largest costs of the inputs, as a line for the end of the run."""
    seconds, _, slow = max(COSTS)
    _, memory, large = max(COSTS, key=lambda cost: cost[1])
    return (
        f"{len(COSTS)} hostile inputs: the slowest took {seconds:.2f} s ({slow!r:.60}), "
        f"the largest {memory / 2**20:.1f} MiB ({large!r:.60})"
    )
