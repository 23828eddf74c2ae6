"""What a step asks of the device: operations, waits, launches of graphs.

On the emulated device its own counters say it. On a real one, PyTorch's profiler does if PyTorch
is installed: it records what every library of the process asks of CUDA. Otherwise the counts are
None, with the reason: CuPy launches out of compiled code, which nothing in Python sees.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from minilora.backend import CupyBackend

from .bench import SIZES, Bench, can_capture
from .conducting import Facts
from .part import last_line

NO_PROFILER = "real devices are counted by PyTorch's profiler, which is not installed"
NOTHING_SEEN = "PyTorch's profiler saw nothing on the device: it may not use CUPTI here"
NAMES = ("operations", "waits", "waits_unread", "copies", "graph_launches")
NO_GRAPH = "this minilora captures no steps: Settings has no field `graph`"
LONGEST_KERNELS = 10
WARM_UP = 4  # steps: a graph is captured after some eager ones


@contextlib.contextmanager
def reading(read: Callable[[CupyBackend, Any], np.ndarray]) -> Iterator[None]:
    """Inside, `read` takes the place of the method by which values are read from the device."""
    original = CupyBackend.to_numpy
    CupyBackend.to_numpy = read  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        CupyBackend.to_numpy = original  # type: ignore[method-assign]


def count(bench: Bench) -> None:
    """For each size: what a LoRA step asks of the device, eager and replayed."""
    for size in SIZES:
        bench.notes.measure(size, partial(_count_size, bench, size))


def _count_size(bench: Bench, size: str) -> Facts:
    def counted_step(graph: bool) -> Facts:
        step = bench.step(size, graph=graph)
        for _ in range(WARM_UP):
            step()
        return count_step(bench, step)

    bench.backend.select()  # imports cupy, and with it the emulation
    with without_results() if bench.emulated else contextlib.nullcontext():
        eager = counted_step(False)
        replayed = counted_step(True) if can_capture() else {}
    facts = {
        "eager": eager["operations"],
        "waits": eager["waits"],
        "waits_unread": eager["waits_unread"],
        "graph_launches": replayed.get("graph_launches"),
        "graph_copies": replayed.get("copies"),
        "graph_waits": replayed.get("waits"),
    }
    reason = eager.get("reason") or (None if replayed else NO_GRAPH)
    return facts | ({"reason": reason} if reason else {})


def count_step(bench: Bench, step: Callable[[], float]) -> Facts:
    """The counts of one step, which must have been taken before.

    operations       kernels, products, copies and fills
    waits            of the host for the device; unread: those that are not for a value that is read
    graph_launches   of captured graphs
    """
    if bench.emulated:
        return _count_emulated(step)
    reason = NO_PROFILER
    if importlib.util.find_spec("torch") is not None:
        try:
            facts = profile(step)
            if facts["operations"]:
                return facts
            reason = NOTHING_SEEN
        except Exception as error:  # without leave to use CUPTI, say: all else is known
            reason = f"PyTorch's profiler failed: {last_line(error)}"
    return {**dict.fromkeys(NAMES), "reason": reason}


def _count_emulated(step: Callable[[], float]) -> Facts:
    counted = importlib.import_module("cupy_on_cpu").counted
    original = CupyBackend.to_numpy
    read = []

    def counting(backend: CupyBackend, array: Any) -> np.ndarray:
        with counted() as device:
            values = original(backend, array)
        read.append(device.waits)
        return values

    with counted() as device, reading(counting):
        step()
    counts = device.counts
    return {
        "operations": counts.operations,
        "kernels": counts.launches,
        "products": counts.products,
        "copies": counts.device_copies + counts.uploads + counts.downloads,
        "fills": counts.fills,
        "uploads": counts.uploads,
        "waits": counts.waits,
        "waits_unread": counts.waits - sum(read),
        "graph_launches": counts.replays,
    }


@contextlib.contextmanager
def without_results() -> Iterator[None]:
    """Inside, the emulated device counts and computes nothing, and every value read is 1.

    So the counts of large models take seconds. What is in memory then says nothing: a loss would
    be NaN by chance.
    """
    original = CupyBackend.to_numpy

    def ones(backend: CupyBackend, array: Any) -> np.ndarray:
        return np.ones_like(original(backend, array))

    with importlib.import_module("cupy_on_cpu").compute(False), reading(ones):
        yield


# ---- on a real device, by PyTorch's profiler -----------------------------------------------------


def profile(step: Callable[[], float]) -> Facts:
    """The counts of a step, the milliseconds in which the device was busy, its longest kernels."""
    torch = importlib.import_module("torch")
    torch.cuda.init()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU]) as recorded:
        step()
        torch.cuda.synchronize()  # a wait of the whole device, which minilora never asks for
    events = recorded.events()
    on_device = torch.autograd.DeviceType.CUDA
    work = [event for event in events if event.device_type == on_device]
    calls = collections.Counter(event.name for event in events if event.device_type != on_device)
    return summarize(
        [(e.name, e.time_range.start, e.time_range.end) for e in work],  # microseconds
        calls,
    )


def summarize(work: list[tuple[str, float, float]], calls: collections.Counter[str]) -> Facts:
    """The counts from (name, start, end) of what a device did, and how often CUDA was called."""
    copies = [name for name, _, _ in work if name.startswith("Memcpy")]
    downloads = sum("DtoH" in name for name in copies)
    fills = sum(name.startswith("Memset") for name, _, _ in work)
    waits = calls["cudaStreamSynchronize"] + calls["cudaEventSynchronize"] + calls["cudaMemcpy"]
    times: dict[str, list[float]] = collections.defaultdict(list)
    for name, start, end in work:
        times[name].append(end - start)
    longest = sorted(times, key=lambda name: -sum(times[name]))[:LONGEST_KERNELS]
    return {
        "operations": len(work),
        "kernels": len(work) - len(copies) - fills,
        "copies": len(copies),
        "fills": fills,
        "uploads": sum("HtoD" in name for name in copies),
        "waits": waits,
        "waits_unread": max(0, waits - downloads),
        "graph_launches": calls["cudaGraphLaunch"],
        "busy_milliseconds": round(busy(work) / 1000, 3),
        "longest_kernels": {
            name[:120]: {"count": len(times[name]), "microseconds": round(sum(times[name]), 1)}
            for name in longest
        },
    }


def busy(work: list[tuple[str, float, float]]) -> float:
    """For how long at least one of these was running."""
    total = 0.0
    until = float("-inf")
    for _, start, end in sorted(work, key=lambda item: item[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


# ---- with CuPy alone -----------------------------------------------------------------------------


def queued_milliseconds(bench: Bench, step: Callable[[], float]) -> float:
    """The device's milliseconds for a step: its work waits in the queue behind long copies.

    So the device never waits for the host, as long as the queue has room: about a thousand
    operations. For steps with more it is an upper bound. The loss is not read meanwhile.
    """
    xp = bench.backend.xp
    source = xp.zeros(1 << (10 if bench.rehearse else 28), np.float32)
    target = xp.empty_like(source)
    begun = time.perf_counter()
    step()
    host = 1000 * (time.perf_counter() - begun)
    copy = _between_events(xp, lambda: target.__setitem__(..., source))
    repeats = min(400, 2 + int(2 * host / max(copy, 0.01)))

    def unread(backend: CupyBackend, array: Any) -> np.ndarray:
        return np.ones(array.shape, array.dtype)

    times = []
    with reading(unread):
        for _ in range(bench.few(5)):
            for _ in range(repeats):
                target[...] = source
            times.append(_between_events(xp, step))
    return round(statistics.median(times), 3)


def _between_events(xp: Any, work: Callable[[], Any]) -> float:
    start, end = xp.cuda.Event(), xp.cuda.Event()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(xp.cuda.get_elapsed_time(start, end))
