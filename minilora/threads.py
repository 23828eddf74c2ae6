"""Cores, glibc's memory, arrays cut into blocks, and threads that return results in order."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h
MAX_THREADS = 256  # beyond that the system's limits decide
P = TypeVar("P")
R = TypeVar("R")


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next array instead of returning it to the system.

    NumPy allocates every temporary anew. Above a threshold glibc maps and unmaps it, and the system
    clears it page by page: some 17,000 page faults per step for a small model, a fifth of its time.
    A thread's own arena returns memory whatever the thresholds are, so new threads share the main
    arena. Without glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 1 << 24)
        mallopt(M_ARENA_MAX, 1)


def available_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_blas_thread() -> Any:
    """A context manager that holds BLAS to one thread; more threads change a product's bits."""
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> Any:
    """threadpoolctl's controller, made once: finding the BLAS libraries takes milliseconds."""
    import numpy  # noqa: F401  (its BLAS must be loaded to be found)
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()


def blocks(count: int, size: int) -> list[slice]:
    """0 ... count as slices of `size`, the last one shorter; `size` below 1 counts as 1."""
    step = max(1, size)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class Workers:
    """Threads that work on parts and return results in the order of the parts.

    Use it in a `with` block. Each part runs in a copy of the caller's context, so context variables
    that the caller set apply to the part too. With one thread `map` runs in the calling thread,
    unless it is to work ahead. With none, all is done in the calling thread: a GPU is kept busy by
    one thread, and CuPy's current device and stream belong to a thread.
    """

    def __init__(self, threads: int):
        self.threads = threads

    def __enter__(self) -> Workers:
        # Imported here: it takes 10 ms, which `import minilora` need not pay.
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(max(1, self.threads), "minilora")
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def _submit(self, work: Callable[[P], R], part: P) -> Future[R]:
        return self._pool.submit(contextvars.copy_context().run, work, part)

    def map(
        self, work: Callable[[P], R], parts: Iterable[P], ahead: int | None = None
    ) -> Generator[R, None, None]:
        """Yield work(part) for each part, in order.

        ahead   how many parts may be in work while a result is in use. None: one more than the
                number of threads; with one thread, none, and the calling thread does the work

        An exception is raised at its part; parts that wait are then dropped and running ones
        awaited. The same happens when the generator is closed early.
        """
        if self.threads == 0 or (ahead is None and self.threads == 1):
            yield from map(work, parts)
            return
        coming = iter(parts)
        most = self.threads + 1 if ahead is None else ahead
        waiting = deque(self._submit(work, part) for part in islice(coming, most))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(self._submit(work, part) for part in islice(coming, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    future.exception()

    def together(self, work: Callable[[P], R], parts: Sequence[P]) -> list[R]:
        """[work(part) for part in parts]: the calling thread does the first, others the rest."""
        if self.threads == 0:
            return [work(part) for part in parts]
        others = [self._submit(work, part) for part in parts[1:]]
        return [work(parts[0]), *(other.result() for other in others)]
