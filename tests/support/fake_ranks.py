"""Ranks that are threads of this process: a communicator with the methods that `Group` uses.

Every rank must come to the same collective calls in the same order; a rank that waits for one that
never comes fails after a minute.
"""

from __future__ import annotations

import contextvars
import threading
import time
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
        number = self._put("Iallgather", sent.copy())

        def receive(parts: list[np.ndarray]) -> None:
            received[:] = parts

        return Request(self.world, number, receive)

    def Iallgatherv(self, sent: np.ndarray, received: list[Any]) -> Any:
        array, counts = received
        self.sent += sent.nbytes
        number = self._put("Iallgatherv", sent.copy())

        def receive(parts: list[np.ndarray]) -> None:
            assert [part.size for part in parts] == counts
            assert all(part.dtype == array.dtype for part in parts)
            array[:] = np.concatenate(parts)

        return Request(self.world, number, receive)

    def Ialltoallv(self, sent: list[Any], received: list[Any]) -> Any:
        array, counts = sent
        out, out_counts = received
        assert sum(counts) == array.size
        self.sent += array.nbytes
        number = self._put("Ialltoallv", np.split(array.copy(), np.cumsum(counts)[:-1]))

        def receive(rows: list[list[np.ndarray]]) -> None:
            mine = [row[self.rank] for row in rows]
            assert [part.size for part in mine] == out_counts
            out[:] = np.concatenate(mine)

        return Request(self.world, number, receive)


class Request:
    """A collective call that has begun: `receive` gets what all ranks have given to it."""

    def __init__(self, world: World, number: int, receive: Callable[[list[Any]], None]):
        self.world, self.number, self.receive = world, number, receive
        self.begun = time.monotonic()

    def Test(self) -> bool:
        with self.world.changed:
            # Woken by the last rank, so that a test need not wait for a sleep to end.
            if not self.world.changed.wait_for(lambda: self.world.is_complete(self.number), 0.1):
                assert time.monotonic() - self.begun < PATIENCE, "a deadlock"
                return False
            values = self.world.calls[self.number][1]
        self.receive([values[rank] for rank in range(self.world.size)])
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
