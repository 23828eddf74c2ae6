"""Every order in which threads can run the jobs of parts, one synchronisation at a time.

`explore(make_work, threads)` runs the jobs in real threads, of which one runs at a time: after each
use of a `Condition` it stops, and this file chooses who goes on. Orders that lead to the same
state (what each thread has done, and the numbers that it has read) are followed once, so that all
orders are covered by few runs.
The threads take jobs as `Workers.map` gives them out: in order, at most threads + 1 ahead of the
first that has not ended, and none once the first that has not ended well is known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Work(NamedTuple):
    """Jobs in their order, and what gives all numbers that they have read and written so far."""

    jobs: Sequence[Callable[[], Any]]
    numbers: Callable[[], Any] = tuple


class Deadlock(Exception):
    """Jobs are left, and no thread can go on."""


class Outcome(NamedTuple):
    """What came of the jobs: a result or an error each, None for one that was not begun."""

    results: list[Any]

    @property
    def first_error(self) -> BaseException | None:
        errors = [value for value in self.results if isinstance(value, BaseException)]
        return errors[0] if errors else None


class _Stopped(BaseException):
    """Ends a thread whose run is over."""


class Run:
    """One run: threads, each at a stop, and the jobs that they work on."""

    current: Run

    def __init__(self, work: Work, threads: int):
        Run.current = self
        self.jobs, self.numbers = jobs, _ = work
        self.results: list[Any] = [None] * len(jobs)
        self.ended = [False] * len(jobs)
        self.taken = 0
        self.over = False
        self.turns = [threading.Semaphore(0) for _ in range(threads)]
        self.stopped = threading.Semaphore(0)  # raised when the running thread stops
        self.job: list[int | None] = [None] * threads
        self.stops = [0] * threads  # in the thread's present job
        self.asleep = [False] * threads  # in a Condition, until a notification
        self.here = threading.local()
        self.threads = [
            threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def state(self) -> Any:
        threads = tuple(self.job), tuple(self.stops), tuple(self.asleep)
        return *threads, self.taken, self.numbers()

    def runnable(self) -> list[int]:
        """The threads that can go on: in a job and awake, or free while a job is given out."""
        return [
            i
            for i, job in enumerate(self.job)
            if (self._is_given_out() if job is None else not self.asleep[i])
        ]

    def is_complete(self) -> bool:
        return all(job is None for job in self.job) and not self._is_given_out()

    def _consumed(self) -> int:
        """How many jobs have ended before the first that has not, or that has failed."""
        for i, ended in enumerate(self.ended):
            if not ended or isinstance(self.results[i], BaseException):
                return i
        return len(self.jobs)

    def _is_given_out(self) -> bool:
        first = self._consumed()
        if first < len(self.jobs) and self.ended[first]:  # it has failed: the others are dropped
            return False
        return self.taken < min(len(self.jobs), first + len(self.turns) + 1)

    def advance(self, thread: int) -> None:
        """Let a thread run until it stops again."""
        self.turns[thread].release()
        self.stopped.acquire()

    def close(self) -> None:
        self.over = True
        for turn in self.turns:
            turn.release()
        for thread in self.threads:
            thread.join()

    # ---- in the threads ----

    def _work(self, i: int) -> None:
        self.here.number = i
        try:
            self._wait_for_turn(i)
            while True:
                number = self.job[i] = self.taken
                self.taken += 1
                self.stops[i] = 0
                try:
                    self.results[number] = self.jobs[number]()
                except Exception as error:
                    self.results[number] = error
                self.ended[number] = True
                self.job[i] = None
                self.stops[i] = 0
                self.stopped.release()
                self._wait_for_turn(i)
        except _Stopped:
            pass

    def _wait_for_turn(self, i: int) -> None:
        self.turns[i].acquire()
        if self.over:
            raise _Stopped

    def stop(self) -> None:
        if self.over:  # the thread ends, and says so to the other parts
            return
        i = self.here.number
        self.stops[i] += 1
        self.stopped.release()
        self._wait_for_turn(i)

    def sleep(self, condition: Condition) -> None:
        i = self.here.number
        self.asleep[i] = True
        condition.sleepers.append(i)
        self.stopped.release()
        self._wait_for_turn(i)

    def wake(self, condition: Condition) -> None:
        for i in condition.sleepers:
            self.asleep[i] = False
        condition.sleepers.clear()


class Condition:
    """In the place of threading.Condition: the thread stops after each use, and where it waits."""

    def __init__(self) -> None:
        self.sleepers: list[int] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        Run.current.stop()

    def wait_for(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            Run.current.sleep(self)

    def notify_all(self) -> None:
        Run.current.wake(self)


def explore(make_work: Callable[[], Work], threads: int) -> tuple[list[Outcome], int]:
    """(the outcomes of all orders, one per end that was reached; how many states there were).

    `make_work` makes the jobs anew for each run. Deadlock for an order in which no thread can go
    on before the jobs are done.
    """
    seen: set[Any] = set()
    outcomes = []
    prefixes: list[list[int]] = [[]]
    while prefixes:
        path = prefixes.pop()
        run = Run(make_work(), threads)
        try:
            for thread in path:
                run.advance(thread)
            while run.state() not in seen:
                seen.add(run.state())
                first, *others = run.runnable() or [None]
                prefixes += [[*path, other] for other in others]
                if first is None:
                    if not run.is_complete():
                        raise Deadlock(f"after the turns {path}: {run.state()}")
                    outcomes.append(Outcome(run.results))
                    break
                path = [*path, first]
                run.advance(first)
        finally:
            run.close()
    return outcomes, len(seen)
