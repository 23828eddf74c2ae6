"""Work on a GPU captured as a graph, which one launch repeats.

Each operation costs the host some ten microseconds, which is more than most of them take on the
device. A graph has all of a step's operations with their arguments; what differs between steps is
in memory that was there before the capture, and a `Mailbox` is what the host writes it into.

While work is captured nothing runs, so it may neither wait for the device nor read a value, and
what it needs (compiled kernels, tables) must exist: run it twice in the ordinary way first.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from .launching import Array

T = TypeVar("T")


class Graph(Generic[T]):
    """Captured work. `result` is what the work returned: arrays that each `replay` writes again."""

    def __init__(self, graph: Any, result: T):
        self._graph = graph
        self.result = result

    def replay(self) -> None:
        """Run the work once more, behind what the current stream has to do."""
        self._graph.launch()


class Recorder:
    """Captures work on a device, which has one of these: its stream has memory for cuBLAS.

    A graph keeps no array alive, so the memory of intermediate results belongs to the recorder. All
    graphs share it, since they run one after another; it is given back when none of them is left.
    """

    def __init__(self, backend: Any):
        self.backend = backend
        self._stream = backend.xp.cuda.Stream(non_blocking=True)
        self._pool = backend.xp.cuda.MemoryPool()
        self._graphs: weakref.WeakSet[Graph[Any]] = weakref.WeakSet()
        self._lock = threading.Lock()

    def capture(self, work: Callable[[], T]) -> Graph[T]:
        """The graph of all that work() asks of the device; nothing of it runs yet.

        Raises what the work raises, also if it does what a capture does not allow.
        """
        xp = self.backend.xp
        with self._lock:
            xp.get_default_memory_pool().free_all_blocks()  # what eager steps held
            gc.collect()
            if not self._graphs:
                self._pool = xp.cuda.MemoryPool()
            was_enabled = gc.isenabled()
            gc.disable()  # to free an array of another owner is not a part of this work
            try:
                graph = Graph(*self._record(work))
            finally:
                if was_enabled:
                    gc.enable()
            self._graphs.add(graph)
            return graph

    def _record(self, work: Callable[[], T]) -> tuple[Any, T]:
        xp = self.backend.xp
        with self._stream:
            self._stream.begin_capture()
            try:
                with xp.cuda.using_allocator(self._pool.malloc):
                    result = work()
            except BaseException:
                with contextlib.suppress(Exception):  # the capture is invalid: that is said
                    self._stream.end_capture()
                self._stream = xp.cuda.Stream(non_blocking=True)
                raise
            return self._stream.end_capture(), result


class Mailbox:
    """Memory that the host writes and the device reads: one copy per `send`.

    host     (count,) int64, in memory from which a copy does not wait
    device   the same numbers on the device, as of the last `send`
    """

    def __init__(self, backend: Any, count: int):
        xp = backend.xp
        self._pinned = xp.cuda.alloc_pinned_memory(8 * count)
        self.host = np.frombuffer(self._pinned, np.int64, count)
        self.host[...] = 0
        self.device: Array = xp.zeros(count, np.int64)

    def send(self) -> None:
        """Copy. The device must have read the numbers that were sent before."""
        self.device.set(self.host)
