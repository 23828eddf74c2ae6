"""Parts of sequences, which several threads compute at the same time.

Everything in a decoder but attention works position by position. So positions a to b of some
sequences can be work of their own, a part, and parts meet in attention alone. To the model a part
is a cache: there are positions before its own, and `extend` gives their keys and values, once the
earlier parts have computed them. Backward, `extend_back` adds up the gradients of keys and values,
the last part's first. The order of every sum is fixed, so no number depends on what runs when.

The work of a part is two jobs, forward and backward. `schedule` puts those of some sequences into
the order forward 0, 1, ..., n - 1, backward n - 1, ..., 1, 0, and threads begin jobs in that order.
A job waits only for earlier ones: forward i for forward j < i, backward i for forward i and for
backward j > i. The first job of the order that has not ended therefore has nothing to wait for. So
no number of threads can deadlock, and a single thread never waits.

A job that fails wakes those that wait for it, and they fail too, with PartError. What the first
failed job of the order waited for has not failed: its error is the cause, and is the one raised.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Condition
from typing import Any, NamedTuple, TypeVar

from ..autograd import Tensor
from ..backend import Array
from ..models.cache import Cache, KeyValueCache

# Measured: in parts of fewer positions, the time of one thread grows by more than a tenth.
LEAST_PART = 128
# Positions x width x MLP width: with fewer, Python's share of a part's time grows.
WORK_PER_PART = 1 << 26
POSITIONS_PER_PART = 256
ENOUGH_SHARDS = 16  # with so many, sequences are not cut
GRAIN = 16  # edges are multiples of it

FORWARD, BACKWARD, LOSS = "forward", "backward", "loss"
T = TypeVar("T")
Event = tuple[int, str, int]  # number of a part, what it has done, in which layer


# ---- where sequences are cut ---------------------------------------------------------------------


def choose_part_size(config: Any, shards: int, context: int) -> int:
    """Positions per part, for a batch of `shards` shards of sequences of `context` positions.

    It depends on shapes alone, since a resumed run must cut alike. `context` means that sequences
    stay whole: they are short, or there are shards enough. A batch of one shard is cut in two, so
    that two cores have work.
    """
    work_per_position: int = config.hidden_size * config.intermediate_size
    least = max(POSITIONS_PER_PART, WORK_PER_PART // work_per_position)
    count = min(context // least, -(-ENOUGH_SHARDS // max(shards, 1)))
    if shards == 1 and context >= 2 * LEAST_PART:
        count = max(count, 2)
    if shards >= ENOUGH_SHARDS or count < 2:
        return context
    return -(-context // count)


def part_edges(config: Any, positions: int, size: int) -> list[int]:
    """Where sequences are cut: part i has positions edges[i] to edges[i + 1].

    There are about positions / size parts of equal cost. Position t costs linear + attended t
    multiplications in a layer, the head's share included; those of attention run at half the speed.
    """
    count = max(1, round(positions / max(size, 1)))
    C = config.hidden_size
    linear = C * (
        4 * C + 3 * config.intermediate_size + config.vocab_size / config.num_hidden_layers
    )
    attended = 4.0 * C
    total = linear * positions + attended * positions**2 / 2
    grain = max(1, min(GRAIN, size // 2))
    edges = [0]
    for i in range(1, count):
        # linear t + attended t^2 / 2 = total i / count
        root = math.sqrt(linear**2 + 2 * attended * total * i / count)
        edge = round((root - linear) / attended / grain) * grain
        if edges[-1] < edge < positions:
            edges.append(edge)
    return [*edges, positions]


# ---- what parts share ----------------------------------------------------------------------------


class PartError(RuntimeError):
    """A part cannot go on, because one that it waits for has failed."""


class Progress:
    """What the parts of some sequences have done, for those that wait for it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._done: set[Event] = set()
        self._failed: set[int] = set()

    def announce(self, event: Event) -> None:
        with self._changed:
            self._done.add(event)
            self._changed.notify_all()

    def fail(self, number: int) -> None:
        """Let those fail that wait for part `number`."""
        with self._changed:
            self._failed.add(number)
            self._changed.notify_all()

    def has(self, event: Event) -> bool:
        """Whether an event has happened, for the part whose own it is: no other announces it."""
        return event in self._done

    def wait_for(self, events: Sequence[Event]) -> None:
        """Return when all of them have happened. PartError if one of them never will.

        A part may fail in its backward pass while a later one is still in its forward pass. What
        the part did before counts: the later one goes on, and the error that is raised is the
        part's own.
        """
        missing: list[Event] = []

        def is_over() -> bool:
            missing[:] = [event for event in events if event not in self._done]
            return not missing or any(event[0] in self._failed for event in missing)

        with self._changed:
            self._changed.wait_for(is_over)
            if missing:
                raise PartError("another part of the same sequences has failed")


class Shared:
    """The keys and values of some sequences, and the gradients of both, which parts share.

    edges   part i has positions edges[i] to edges[i + 1]
    data    (layers, 2, B, S, K, D): of each layer its keys, then its values
    grads   by layer, those of keys and values (B, S, K, D), until the first part takes its own
    """

    def __init__(self, model: Any, batch: int, edges: Sequence[int]):
        self.edges = edges
        self.data = KeyValueCache(model, batch, edges[-1]).data
        self.grads: dict[int, tuple[Array, Array]] = {}
        self.progress = Progress()

    def parts(self) -> list[Part]:
        return [Part(self, number) for number in range(len(self.edges) - 1)]


class Part(Cache):
    """Positions edges[number] to edges[number + 1], as a cache of the positions before them."""

    passes_gradients = True

    def __init__(self, shared: Shared, number: int):
        self.shared = shared
        self.number = number
        self.length, self.stop = shared.edges[number : number + 2]
        self.is_first = number == 0
        self.is_last = self.stop == shared.edges[-1]

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        progress = self.shared.progress
        keys, values = self.shared.data[layer]
        work = self.number, FORWARD, layer
        # With gradient checkpointing a block runs again: the same keys are there already.
        if not progress.has(work):
            keys[:, self.length : self.stop] = k
            values[:, self.length : self.stop] = v
            progress.announce(work)
        progress.wait_for([(earlier, FORWARD, layer) for earlier in range(self.number)])
        return keys[:, : self.stop], values[:, : self.stop]

    def extend_back(self, layer: int, dk: Array, dv: Array) -> tuple[Array, Array]:
        """This part's rows of the sum of its own and the later parts' dk and dv."""
        shared = self.shared
        if self.is_last:
            shared.grads[layer] = dk, dv
        else:
            shared.progress.wait_for([(self.number + 1, BACKWARD, layer)])
            for total, grad in zip(shared.grads[layer], (dk, dv), strict=True):
                total[:, : self.stop] += grad
        total_dk, total_dv = shared.grads[layer]
        if self.is_first:
            del shared.grads[layer]
        # From now on the earlier parts add to the rows before this part's.
        shared.progress.announce((self.number, BACKWARD, layer))
        rows = slice(self.length, self.stop)
        return total_dk[:, rows], total_dv[:, rows]

    def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, of whose failure those are told that wait for this part."""
        try:
            return work()
        except BaseException:
            self.shared.progress.fail(self.number)
            raise


# ---- jobs, and their order -----------------------------------------------------------------------

Job = Callable[[], Any]


class Jobs(NamedTuple):
    """The work on some sequences, each list in the order in which its jobs must begin."""

    forward: list[Job]
    backward: list[Job]


class PartJobs:
    """The two jobs of a part. Its loss, with the graph, lives from one to the end of the other."""

    def __init__(
        self,
        part: Part,
        forward: Callable[[Part], Tensor],
        backward: Callable[[Part, Tensor], Any],
    ):
        self.part = part
        self._forward = forward
        self._backward = backward
        self._loss: list[Tensor] = []
        self._has_loss = part.number, LOSS, 0

    def forward(self) -> None:
        self._loss.append(self.part.run(functools.partial(self._forward, self.part)))
        self.part.shared.progress.announce(self._has_loss)

    def backward(self) -> Any:
        def work() -> Any:
            self.part.shared.progress.wait_for([self._has_loss])
            return self._backward(self.part, self._loss.pop())

        return self.part.run(work)


def jobs_of_parts(
    parts: Sequence[Part],
    forward: Callable[[Part], Tensor],
    backward: Callable[[Part, Tensor], Any],
) -> Jobs:
    """forward(part) -> loss, and backward(part, loss), for all parts of some sequences."""
    jobs = [PartJobs(part, forward, backward) for part in parts]
    return Jobs([job.forward for job in jobs], [job.backward for job in reversed(jobs)])


def schedule(groups: Iterable[Jobs], threads: int) -> Iterator[Job]:
    """All jobs of some groups of sequences, in the order in which threads must begin them.

    A thread that has begun a backward job may wait in it for the later parts'. So that the others
    have work meanwhile, as many groups as can keep all threads busy run forward before that.
    """
    waiting: deque[Jobs] = deque()
    for jobs in groups:
        yield from jobs.forward
        waiting.append(jobs)
        if len(waiting) >= max(1, threads // len(jobs.backward)):
            yield from waiting.popleft().backward
    for jobs in waiting:
        yield from jobs.backward
