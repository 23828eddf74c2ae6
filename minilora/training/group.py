"""The ranks of a run under MPI: what they exchange, and how all of them end together.

Every exchange begins alike, whatever it is for: each rank tells all others which exchange it is at,
whether it has failed, and which signal it has received. So

- a rank that fails anywhere says so in one last exchange (`Group.__exit__`), and the others raise
  its error in the exchange that they come to next: nobody waits for a rank that has gone;
- all ranks know of a signal from the same exchange on, and stop after the same step;
- ranks that are at different exchanges (other options, another program) stop with an error.

A rank that cannot even say so (a second Ctrl-C, a failure inside an exchange) aborts all of them.
Ranks wait asleep: while rank 0 writes a checkpoint, the others leave the cores alone.

A loss that is not finite needs no message: the sums are the same on all ranks.
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import errors
from ..backend import Array
from ..errors import ConfigError, Interrupted, MiniloraError
from ..nn import Parameter
from ..threads import blocks
from .sums import Node, Partial, add_up, owned, owned_nodes

# Seconds: a rank that waits asks again and again for so long, then sleeps in between.
AWAKE, SHORTEST, LONGEST = 1e-4, 2e-5, 5e-3
NUMBERS = 1 << 24  # of gradients in one exchange: MPI counts with 32 bits
STATUS = 32  # bytes that begin an exchange: its kind, failed, signal, size of the payload (int64)
ROOM = 480  # bytes of a payload that come with them; a larger one is sent after them


class Kind(enum.IntEnum):
    """What an exchange is for."""

    END = 0
    SUM = 1
    GATHER = 2
    SHARE = 3
    COMPARE = 4


class Group:
    """The ranks of one MPI communicator.

    comm       mpi4py's communicator, or what has its methods
    finalize   ends MPI in this process, which waits until all ranks have come to it
    """

    def __init__(
        self,
        comm: Any,
        local_rank: int = 0,
        cores: int = 1,
        finalize: Callable[[], object] = lambda: None,
    ):
        self.comm = comm
        self.rank = int(comm.Get_rank())
        self.size = int(comm.Get_size())
        self.local_rank = local_rank
        self.cores = cores
        self.signal = 0
        self._finalize = finalize
        self._received: Sequence[int] = ()
        self._over: MiniloraError | OSError | MemoryError | None = None  # what all ranks know of
        self._is_exchanging = False
        self.is_lost = False  # this rank has failed, and the others cannot know

    # ---- what the ranks do together --------------------------------------------------------------

    def watch(self, received: Sequence[int]) -> None:
        self._received = received

    def owned(self, count: int) -> range:
        return owned(count, self.size, self.rank)

    def share(self, value: Any) -> Any:
        return self._exchange_json(Kind.SHARE, value)[0]

    def gather(self, losses: Iterable[tuple[float, int]]) -> Iterable[tuple[float, int]]:
        gathered = self._exchange_json(Kind.GATHER, list(losses))
        for turn in range(max(map(len, gathered))):
            for items in gathered:
                if turn < len(items):
                    loss, count = items[turn]
                    yield loss, count

    def require_same(self, values: Mapping[str, Any], advice: str) -> None:
        first, *others = self._exchange_json(Kind.COMPARE, values)
        for rank, other in enumerate(others, 1):
            for name in {**first, **other}:
                mine, its = first.get(name), other.get(name)
                if mine != its:
                    raise ConfigError(
                        f"{name} is {mine!r:.70} on rank 0 and {its!r:.70} on rank {rank}: {advice}"
                    )

    def sum(
        self,
        nodes: Sequence[Node[Partial]],
        count: int,
        tasks: Sequence[str | None],
        params: Sequence[Parameter],
    ) -> Partial:
        """Losses and what there is to add go to everyone at once, gradients in two phases."""
        layout = _Header(len(tasks), len(params))
        tree = _Tree(count, [owned_nodes(count, self.size, rank) for rank in range(self.size)])
        header = b"".join(layout.pack(node.value, tasks) for node in nodes)
        with self._exchange(Kind.SUM, header) as headers:
            losses, flags = layout.unpack(b"".join(headers))
            has_gradient = flags.max(axis=0, initial=0)
            members = np.flatnonzero(has_gradient[:-1]).tolist()
            grads: list[Array | None] = [None] * len(params)
            for dtype in sorted({params[i].dtype.str for i in members}):
                alike = [i for i in members if params[i].dtype.str == dtype]
                sums = self._sum_gradients(tree, nodes, [params[i] for i in alike], alike)
                for i, grad in zip(alike, sums, strict=True):
                    grads[i] = grad
        from_numpy = params[0].backend.from_numpy if params else np.asarray
        sums = [from_numpy(loss) for loss in tree.add_rows(losses)]
        by_task = dict(zip(tasks, sums, strict=True))
        return Partial(by_task, grads, trained=bool(has_gradient[-1]))

    def _sum_gradients(
        self,
        tree: _Tree,
        nodes: Sequence[Node[Partial]],
        params: Sequence[Parameter],
        places: Sequence[int],
    ) -> list[Array]:
        """The sums of the gradients of these parameters, which have one dtype.

        places   of the parameters in `Partial.grads`

        A parameter that takes no part in a node has -0 there: x + -0 is x for every x, zeros too.
        """
        backend = params[0].backend
        ends = np.cumsum([p.size for p in params]).tolist()
        slices = [slice(end - p.size, end) for p, end in zip(params, ends, strict=True)]
        rows = np.full((len(nodes), ends[-1]), -0.0, params[0].dtype)
        for row, node in zip(rows, nodes, strict=True):
            grads = [node.value.grads[i] for i in places]
            present = [grad for grad in grads if grad is not None]
            if not present:
                continue
            joined = backend.to_numpy(backend.join(present))  # one transfer from a GPU
            start = 0
            for grad, its in zip(grads, slices, strict=True):
                if grad is not None:
                    row[its] = joined[start : start + grad.size]
                    start += grad.size
        total = np.empty(ends[-1], rows.dtype)
        for piece in blocks(total.size, NUMBERS):
            total[piece] = self._sum_rows(tree, rows[:, piece])
        on_device = backend.from_numpy(total)
        return [on_device[its].reshape(p.shape) for p, its in zip(params, slices, strict=True)]

    def _sum_rows(self, tree: _Tree, rows: np.ndarray) -> np.ndarray:
        """The sum of the nodes of all ranks.    rows (own nodes, C) -> (C,)

        First each rank gets its share of the columns of all nodes and adds them up, then everyone
        gets all sums: about 2 C numbers come and go, for any number of ranks.
        """
        width = rows.shape[1]
        shares = [owned(width, self.size, rank) for rank in range(self.size)]
        share = len(shares[self.rank])
        sent = np.concatenate([rows[:, s.start : s.stop].reshape(-1) for s in shares])
        sent_counts = [len(rows) * len(s) for s in shares]
        counts = [len(spans) * share for spans in tree.spans]
        received = np.empty(sum(counts), rows.dtype)
        _wait(self.comm.Ialltoallv([sent, sent_counts], [received, counts]))
        own_sum = tree.add_rows(received.reshape(sum(map(len, tree.spans)), share))
        total = np.empty(width, rows.dtype)
        _wait(self.comm.Iallgatherv(own_sum, [total, [len(s) for s in shares]]))
        return total

    # ---- an exchange -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _exchange(
        self, kind: Kind, payload: bytes = b"", error: BaseException | None = None
    ) -> Iterator[list[bytes]]:
        """Every rank's payload, once all have come; inside the block more may be exchanged.

        error   why this rank ends; what it says takes the place of its payload

        The error of the lowest rank that has one is raised on all ranks.
        """
        if self._over is not None:
            raise self._over
        self._is_exchanging = True
        if error is not None:
            payload = json.dumps(_describe(error)).encode()
        signal = self._received[0] if self._received else 0
        head = [kind, error is not None, signal, len(payload)]
        heads, payloads = self._send(head, np.frombuffer(payload, np.uint8))
        kinds, failed, signals, _ = heads.T
        self.signal = self.signal or int(signals.max())
        if failed.any():
            self._is_exchanging = False
            rank = int(failed.argmax())
            self._over = _rebuild(json.loads(payloads[rank].tobytes()), rank)
            if rank == self.rank and error is not None:
                raise error
            raise self._over
        if len(set(kinds.tolist())) > 1:
            self._is_exchanging = False
            at = ", ".join(Kind(number).name.lower() for number in kinds.tolist())
            self._over = MiniloraError(
                f"the ranks are at different exchanges, rank 0 first: {at}; "
                "start all of them with the same command, options and files"
            )
            raise self._over
        yield [part.tobytes() for part in payloads]
        self._is_exchanging = False

    def _send(
        self, head: Sequence[int], payload: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """(heads (ranks, 4), payloads by rank) of all ranks. The last number of a head is a size.

        A small payload comes with its head, which saves a second wait.
        """
        message = np.zeros(STATUS + ROOM, np.uint8)
        message[:STATUS].view(np.int64)[:] = head
        if payload.size <= ROOM:
            message[STATUS : STATUS + payload.size] = payload
        messages = np.empty((self.size, STATUS + ROOM), np.uint8)
        _wait(self.comm.Iallgather(message, messages))
        heads = messages[:, :STATUS].copy().view(np.int64)
        sizes = heads[:, -1].tolist()
        if max(sizes) <= ROOM:
            rows = zip(messages, sizes, strict=True)
            return heads, [row[STATUS : STATUS + size] for row, size in rows]
        received = np.empty(sum(sizes), np.uint8)
        _wait(self.comm.Iallgatherv(payload, [received, sizes]))
        return heads, np.split(received, np.cumsum(sizes)[:-1])

    def _exchange_json(self, kind: Kind, value: Any) -> list[Any]:
        with self._exchange(kind, json.dumps(value).encode()) as payloads:
            return [json.loads(payload) for payload in payloads]

    # ---- the end ---------------------------------------------------------------------------------

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell the others how this rank ends, and learn how they do.

        All ranks raise the error of the lowest rank that has one.
        """
        if isinstance(error, SystemExit) and not error.code:  # after --help
            error = None
        self.is_lost = self._is_exchanging or not (error is None or isinstance(error, Exception))
        if self.is_lost or self._over is not None:
            return
        try:
            with self._exchange(Kind.END, error=error):
                pass
        except BaseException as agreed:
            self.is_lost = self._is_exchanging
            if agreed is not error:
                raise agreed from None

    def close(self, code: int) -> None:
        if self.is_lost:
            if isinstance(sys.exc_info()[1], Exception):  # Abort leaves Python no time to show it
                traceback.print_exc(file=sys.__stderr__)
            self.comm.Abort(code or 1)
        elif code:
            self._finalize()


class _Header(NamedTuple):
    """The small part of a sum: per node a float64 loss of each task, and flags.

    A flag says of each parameter whether it has a gradient, the last one whether anything trains.
    """

    tasks: int
    params: int

    def pack(self, partial: Partial, tasks: Sequence[str | None]) -> bytes:
        losses = [float(partial.losses.get(task, -0.0)) for task in tasks]
        flags = [grad is not None for grad in partial.grads]
        return np.array(losses).tobytes() + bytes([*flags, partial.trained])

    def unpack(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """(losses (nodes, tasks), flags (nodes, params + 1))"""
        rows = np.frombuffer(data, np.uint8).reshape(-1, 8 * self.tasks + self.params + 1)
        losses = rows[:, : 8 * self.tasks].copy().view(np.float64)
        return losses, rows[:, 8 * self.tasks :]


class _Tree(NamedTuple):
    """The nodes that the ranks have of a sum: (first, stop) of each, by rank."""

    shards: int
    spans: list[list[tuple[int, int]]]

    def add_rows(self, rows: np.ndarray) -> np.ndarray:
        """The values of all nodes, a row each, added up in their memory.    (nodes, C) -> (C,)"""
        spans = [span for spans in self.spans for span in spans]
        if not spans:  # a batch without sequences
            return np.zeros(rows.shape[1], rows.dtype)
        leaves = [Node(*span, row) for span, row in zip(spans, rows, strict=True)]
        [root] = add_up(leaves, self.shards, _add_in_place)
        total: np.ndarray = root.value
        return total


def _add_in_place(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left += right
    return left


def _wait(request: Any) -> None:
    """Wait for the other ranks, and leave them the core: MPI's own waiting would use it all.

    A rank sleeps for a sixteenth of the time that it has waited, so that it is late by no more.
    """
    begun = time.monotonic()
    while not request.Test():
        waited = time.monotonic() - begun
        if waited > AWAKE:
            time.sleep(min(max(waited / 16, SHORTEST), LONGEST))


# ---- errors that travel --------------------------------------------------------------------------


def _describe(error: BaseException) -> dict[str, Any]:
    """What `_rebuild` makes the error from on another rank."""
    report: dict[str, Any] = {"kind": type(error).__name__, "text": str(error)}
    if isinstance(error, OSError):
        report["errno"] = error.errno
        report["text"] = error.strerror or str(error)
        report["filename"] = None if error.filename is None else str(error.filename)
    if isinstance(error, MiniloraError):
        report["code"] = error.exit_code
    return report


def _rebuild(report: Mapping[str, Any], rank: int) -> MiniloraError | OSError | MemoryError:
    """The error of `rank`, which the message names unless it is rank 0: that writes the files."""
    kind, text = report["kind"], report["text"]
    where = f"rank {rank}: " if rank else ""
    if "errno" in report:
        if report["errno"] is None:
            return OSError(where + text)
        return OSError(report["errno"], where + text, report["filename"])
    if kind == "MemoryError":
        return MemoryError(where + (text or "out of memory"))
    if kind == "Interrupted":
        return Interrupted(where + text, report["code"] - 128)
    known = getattr(errors, kind, None)
    if "code" in report and isinstance(known, type) and issubclass(known, MiniloraError):
        return known(where + text)
    return MiniloraError(f"rank {rank}: {kind}: {text}")
