"""What CuPy has asked of the emulated device."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .packages import EmulationError

_state: dict[str, Any] = {}
_kept: list[Any] = []  # functions that C++ may call


class Counts(NamedTuple):
    """Numbers of calls, in the order of src/state.h. What a graph holds is counted nowhere."""

    launches: int  # of kernels, sorts among them
    products: int  # cuBLAS calls
    device_copies: int
    fills: int
    uploads: int
    downloads: int
    waits: int  # copies and calls after which the host waits for the device
    replays: int  # launches of a graph
    allocations: int  # of memory that CuPy's pool did not have

    @property
    def operations(self) -> int:
        """What the device is asked to do, without replays of graphs."""
        return sum(self[:6])


def connect(driver: ctypes.CDLL) -> None:
    """Count what this library does."""
    driver.emu_counts.restype = ctypes.POINTER(ctypes.c_longlong * len(Counts._fields))
    driver.emu_nodes.restype = ctypes.c_longlong
    _state["driver"] = driver
    _state["counts"] = driver.emu_counts().contents


def now() -> Counts:
    return Counts(*_state["counts"])


class Counting:
    """The counts since its making; they stop at the end of the `with` block."""

    def __init__(self) -> None:
        self._start = now()
        self._end: Counts | None = None

    @property
    def counts(self) -> Counts:
        end = self._end or now()
        return Counts(*(b - a for a, b in zip(self._start, end, strict=True)))

    def __getattr__(self, name: str) -> int:
        return getattr(self.counts, name)  # type: ignore[no-any-return]


@contextlib.contextmanager
def counted() -> Iterator[Counting]:
    """Inside, count from zero:    with counted() as device: ...; device.launches"""
    counting = Counting()
    try:
        yield counting
    finally:
        counting._end = now()


@contextlib.contextmanager
def compute(yes: bool) -> Iterator[None]:
    """Inside, with False: kernels, products and copies on the device are counted but not done."""
    _state["driver"].emu_compute(int(yes))
    try:
        yield
    finally:
        _state["driver"].emu_compute(1)


@contextlib.contextmanager
def journal(path: Path) -> Iterator[None]:
    """Inside, one line per operation is written into this file."""
    _state["driver"].emu_journal(os.fsencode(path))
    try:
        yield
    finally:
        _state["driver"].emu_journal(None)


def nodes() -> int:
    """How many nodes the graph has that is being captured; -1 if none is."""
    return int(_state["driver"].emu_nodes())


def submit(name: str, stream: int, work: Callable[[], None]) -> None:
    """Let Python do work of the device: now, or whenever the graph that is captured is launched."""
    function = ctypes.CFUNCTYPE(None)(work)
    _kept.append(function)  # a graph may call it later
    driver = _state["driver"]
    if driver.emu_submit(name.encode(), ctypes.c_void_p(stream), function):
        raise EmulationError(f"{name} was refused; stderr says why")
    if nodes() < 0:
        _kept.remove(function)
