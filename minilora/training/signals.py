"""Signals that stop a run after the running step, so that it can be saved."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

# Batch systems send it some time before they end a job, and mpiexec passes it on to its processes
# (at SIGTERM it kills them). Windows has no such signal.
USER = getattr(signal, "SIGUSR1", None)
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal

# The list of the block that this context is in.
_receiving: ContextVar[list[int] | None] = ContextVar("signals received", default=None)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT, SIGTERM, SIGHUP and SIGUSR1: the running step can end first.

    A second signal stops the run at once, but for SIGHUP and SIGUSR1: the system and the shell may
    both send one when a terminal is closed, and so may mpiexec and a batch system. SIGHUP stays
    ignored if it is: `nohup` asks for that.

    A block inside another gets the same list: a command that trains and then saves receives the
    signals of both, and those in between.
    """
    outer = _receiving.get()
    if outer is not None:
        yield outer
        return
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            if number in (HANGUP, USER):
                return
            raise KeyboardInterrupt(number)
        received.append(number)
        name = signal.Signals(number).name
        # The terminal may be gone, or the signal came while something was being printed.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            print(f"\n{name}: finishing this step, then saving", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets only the main thread set handlers
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    for number in (HANGUP, USER):
        # None: a handler that is not Python's, such as faulthandler's, which could not be put back.
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            numbers.append(number)
    before = {number: signal.signal(number, receive) for number in numbers}
    _receiving.set(received)
    try:
        yield received
    finally:
        _receiving.set(None)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
