"""Calls in other processes: one interface in the shape of `concurrent.futures.Executor`.

here        in this process, one call after another
processes   in processes of this machine, each with a ProcessPoolExecutor of its own, so that one
            that is killed (out of memory) takes no other with it
mpi         in the ranks of `mpiexec -n N python -m mpi4py.futures -m minilora ...`; rank 0 is the
            master, which makes no call itself

    with stop_signals() as stopped, open_pool("processes", 4) as pool:
        for item, future in completed(pool, work, items, stopped):
            ...

Every call holds BLAS to one thread. A pool's `stop` asks the running calls to end early: inside
them `stop_signals` receives SIGTERM, as if each were a command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from itertools import islice
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from ..errors import ConfigError
from ..threads import available_cores, one_blas_thread
from .signals import HANGUP, USER, stop_signals

POOLS = ("here", "processes", "mpi")
POLL = 0.1  # seconds after which a waiting master looks whether it is to stop
P = TypeVar("P")


class Pool(Executor):
    """An Executor whose `submit` waits until a worker is free.

    width   how many calls can run at once
    """

    width = 1

    def stop(self) -> None:
        """Ask the calls that run to end early, by a signal: a second time, to end at once."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        if kind is not None:  # nobody waits for the results any more
            self.stop()
            self.stop()
        return super().__exit__(kind, error, trace)


def open_pool(kind: str, jobs: int) -> Pool:
    """A pool of one of the kinds in POOLS, to be used in a `with` block.

    jobs   how many calls may run at once; `here` has one, and `mpi` as many as there are ranks
           beside the master

    ConfigError for another kind, or for `mpi` without what it needs.
    """
    if kind == "here":
        return Here()
    if kind == "processes":
        return Processes(jobs)
    if kind == "mpi":
        return Ranks()
    raise ConfigError(f"pool must be one of {', '.join(POOLS)}, got {kind!r:.60}")


def threads_per_call(kind: str, jobs: int) -> int:
    """How many threads each call may use, so that all calls together use the cores once.

    A rank counts as one: mpiexec starts as many as the machines have cores.
    """
    return 1 if kind == "mpi" else max(1, available_cores() // jobs)


def completed(
    pool: Pool, work: Callable[[P], Any], items: Iterable[P], stopped: Sequence[object] = ()
) -> Iterator[tuple[P, Future[Any]]]:
    """Yield (item, future) as the calls work(item) end, in the order in which they end.

    Each item is submitted when a worker is free for it. As soon as `stopped` has an item the
    running calls are asked to end, and no more are submitted.
    """
    coming = iter(items)
    running: dict[Future[Any], P] = {}
    is_told = False
    while True:
        if not stopped:
            for item in islice(coming, pool.width - len(running)):
                running[pool.submit(work, item)] = item
        if not running:
            return
        done, _ = wait(running, POLL, FIRST_COMPLETED)
        if stopped and not is_told:
            is_told = True
            pool.stop()
        for future in [future for future in running if future in done]:
            yield running.pop(future), future


# ---- in this process -----------------------------------------------------------------------------


class Here(Pool):
    """Makes each call in `submit` itself, and returns a future that is done."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            with one_blas_thread():
                future.set_result(work(*args, **options))
        except Exception as error:  # KeyboardInterrupt is the caller's own
            future.set_exception(error)
        return future


# ---- in other processes --------------------------------------------------------------------------

# Signals that came to a worker between two calls, which are the next call's.
_early: list[int] = []


def _call(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The call in a worker: signals are received for it, and BLAS has one thread."""
    with stop_signals(report=False) as stopped, one_blas_thread():
        stopped.extend(_early)
        return work(*args, **options)


def _begin_rank() -> None:
    """Let no signal end a worker between two calls."""
    for number in _stopping():
        signal.signal(number, lambda number, frame: _early.append(number))


def _begin_process() -> None:
    """Prepare a process: Ctrl-C is the master's, and without a master it ends."""
    if hasattr(os, "setsid"):
        # In a session of its own it gets no signal of the terminal: the master passes one on.
        with contextlib.suppress(PermissionError):
            os.setsid()
    _begin_rank()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _stopping())
    threading.Thread(target=_end_with_master, daemon=True).start()


def _end_with_master() -> None:
    """End this process, whatever it does, when its parent has ended: as if killed with it."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _stopping() -> list[int]:
    numbers = [signal.SIGINT, signal.SIGTERM, HANGUP, USER]
    return [number for number in numbers if number is not None]


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back signals in the block: a process that it starts gets none until it is ready."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _stopping())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One process. It is started by fork and exec: threads and locks of the master stay there."""

    def __init__(self) -> None:
        from multiprocessing import get_context, resource_tracker

        with _signals_wait():
            # multiprocessing starts this process of its own with the first worker, and lets
            # signals come again while it does.
            resource_tracker.ensure_running()
        self.has_ended = False
        spawn = get_context("spawn")
        self.executor = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin_process)
        with _signals_wait():
            self._pid = self.executor.submit(os.getpid)

    def stop(self) -> None:
        """Send SIGTERM, as soon as the process is ready to receive it."""
        if not self.has_ended:
            self._pid.add_done_callback(_terminate)


def _terminate(pid: Future[int]) -> None:
    if not pid.cancelled() and pid.exception() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid.result(), signal.SIGTERM)


class Processes(Pool):
    """Makes up to `jobs` calls at once, each in a process of this machine.

    A process makes one call after another. If it ends abruptly, its call raises BrokenProcessPool,
    and another process takes its place.
    """

    def __init__(self, jobs: int):
        self.width = jobs
        self._workers: list[_Worker] = []
        self._free: SimpleQueue[_Worker | None] = SimpleQueue()  # None: has still to be started
        for _ in range(jobs):
            self._free.put(None)

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        worker = self._free.get()
        if worker is None:
            worker = _Worker()
            self._workers.append(worker)
        future = worker.executor.submit(_call, work, *args, **options)

        def release(future: Future[Any]) -> None:
            if not future.cancelled() and isinstance(future.exception(), BrokenProcessPool):
                worker.has_ended = True
            self._free.put(None if worker.has_ended else worker)

        future.add_done_callback(release)
        return future

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for worker in self._workers:
            worker.executor.shutdown(wait, cancel_futures=cancel_futures)


# ---- in the ranks of MPI -------------------------------------------------------------------------


class Ranks(Pool):
    """Makes a call in each rank but 0. The way to stop is SIGUSR1 to mpiexec, which reaches all.

    (mpiexec kills all ranks half a second after a SIGTERM or Ctrl-C, whatever they do.)
    """

    def __init__(self) -> None:
        start = "mpiexec -n N python -m mpi4py.futures -m minilora ..., with N of at least 2"
        try:
            from mpi4py import MPI
            from mpi4py.futures import MPIPoolExecutor
        except ImportError:
            raise ConfigError(
                "pool mpi needs mpi4py, which is missing: pip install -e .[mpi]"
            ) from None
        if MPI.COMM_WORLD.Get_size() == 1 or "mpi4py.futures" not in sys.orig_argv:
            raise ConfigError(f"pool mpi needs ranks beside the master: start it with {start}")
        self._executor = MPIPoolExecutor(initializer=_begin_rank)
        self.width = int(self._executor.num_workers)

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(_call, work, *args, **options)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait, cancel_futures=cancel_futures)
