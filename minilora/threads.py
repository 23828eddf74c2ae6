"""Cores, BLAS threads, glibc's memory, and threads that work in order."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # from glibc's malloc.h


MAX_THREADS = 256  # more would only meet the system's own limit


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next array, not to return it to the system at once.

    NumPy allocates every temporary anew. Above a threshold glibc maps and unmaps it, and the system clears it page by
    page: some 17,000 page faults a step for a small model, a fifth of its time. A thread's own arena returns what it
    can whatever the thresholds are, so new threads share the main one. Elsewhere than on glibc, nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 1 << 24)
        mallopt(M_ARENA_MAX, 1)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


P = TypeVar("P")
R = TypeVar("R")


class Team:
    """`team(work, parts)` is [work(part) for part in parts], of two parts at once; it owns the second thread."""

    def __enter__(self) -> Team:

        self._pool = ThreadPoolExecutor(1, "minilora")
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def __call__(self, work: Callable[[P], R], parts: Sequence[P]) -> list[R]:
        here = contextvars.copy_context()  # what the caller has switched, its thread sees too
        others = [self._pool.submit(here.run, work, part) for part in parts[1:]]
        return [work(parts[0]), *(other.result() for other in others)]
