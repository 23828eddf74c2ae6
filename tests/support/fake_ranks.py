"""Ranks that are threads of this process: a communicator with the methods that `Group` uses.

Every rank must come to the same collective calls in the same order; a rank that waits for one that
never comes fails after a minute.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minilora.training.group import Group

PATIENCE = 60  # seconds


class Aborted(BaseException):
    """MPI_Abort was called: what would end all processes."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class World:
    """What the ranks have given to each collective call, by its number."""

    def __init__(self, size: int):
        self.size = size
        self.changed = threading.Condition()
        self.calls: dict[int, tuple[str, dict[int, Any]]] = {}
        self.aborted: int | None = None

    def put(self, number: int, name: str, rank: int, value: Any) -> None:
        with self.changed:
            known, values = self.calls.setdefault(number, (name, {}))
            assert known == name, f"call {number}: rank {rank} is at {name}, others at {known}"
            values[rank] = value
            self.changed.notify_all()

    def is_complete(self, number: int) -> bool:
        if self.aborted is not None:
            raise Aborted(self.aborted)
        return len(self.calls[number][1]) == self.size

    def take(self, number: int) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: self.is_complete(number), PATIENCE), "a deadlock"
            values = self.calls[number][1]
            return [values[rank] for rank in range(self.size)]


class Comm:
    """One rank's view of the world, with mpi4py's names. `sent` counts the bytes of payloads."""

    def __init__(self, world: World, rank: int):
        self.world = world
        self.rank = rank
        self.number = 0
        self.sent = 0

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.world.size

    def Abort(self, code: int) -> None:
        with self.world.changed:
            self.world.aborted = code
            self.world.changed.notify_all()
        raise Aborted(code)

    def _put(self, name: str, value: Any) -> int:
        self.number += 1
        self.world.put(self.number, name, self.rank, value)
        return self.number

    def Iallgather(self, sent: np.ndarray, received: np.ndarray) -> Any:
        return Request(self.world, self._put("Iallgather", sent.copy()), received)

    def Allgatherv(self, sent: np.ndarray, received: list[Any]) -> None:
        array, counts = received
        parts = self.world.take(self._put("Allgatherv", sent.copy()))
        assert [part.size for part in parts] == counts
        assert all(part.dtype == array.dtype for part in parts)
        array[:] = np.concatenate(parts)
        self.sent += sent.nbytes

    def Alltoallv(self, sent: list[Any], received: list[Any]) -> None:
        array, counts = sent
        parts = np.split(array.copy(), np.cumsum(counts)[:-1])
        assert sum(counts) == array.size
        rows = self.world.take(self._put("Alltoallv", parts))
        out, out_counts = received
        mine = [row[self.rank] for row in rows]
        assert [part.size for part in mine] == out_counts
        out[:] = np.concatenate(mine)
        self.sent += array.nbytes


class Request:
    def __init__(self, world: World, number: int, received: np.ndarray):
        self.world, self.number, self.received = world, number, received

    def Test(self) -> bool:
        with self.world.changed:
            # Woken by the last rank, so that a test need not wait for a sleep to end.
            if not self.world.changed.wait_for(lambda: self.world.is_complete(self.number), 0.1):
                return False
        self.received[:] = self.world.take(self.number)
        return True


class Outcome(NamedTuple):
    """How a rank ended: what its function returned, or what it raised."""

    result: Any
    error: BaseException | None
    group: Group


def run_ranks(size: int, work: Callable[[Group], Any], **options: Any) -> list[Outcome]:
    """What work(group) gives on each of `size` ranks, in a `with group` block."""
    world = World(size)
    outcomes: list[Any] = [None] * size

    def run(rank: int) -> None:
        group = Group(Comm(world, rank), **options)
        result, error = None, None
        code = 0
        try:
            with group:
                result = work(group)
        except BaseException as caught:
            error, code = caught, 1
        try:
            group.close(code)
        except Aborted as aborted:
            error = aborted if error is None else error
        outcomes[rank] = Outcome(result, error, group)

    def start(rank: int) -> threading.Thread:
        thread = threading.Thread(target=contextvars.Context().run, args=(run, rank), daemon=True)
        thread.start()
        return thread

    for thread in [start(rank) for rank in range(size)]:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), "a deadlock"
    return outcomes
