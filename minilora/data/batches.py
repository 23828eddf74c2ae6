"""Batches: the two ways to cut a text into sequences, for training by counter and for evaluation in order.

Nothing here remembers how far a run has come: a batch is a function of text, seed and step, so a resumed run needs only
its step number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Backend
from ..errors import ConfigError, DataError
from ..functional import IGNORE, check_ids

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Batch:
    """ids (B, T) and targets (B, T), the ids one position later, or IGNORE where nothing is to be learned.

    Every array is sequence-first, so that a batch can be cut into shards. `first` is the place of this shard's first
    sequence in the whole batch: dropout depends on that place, not on where the batch was cut. `tasks` says for each
    sequence by its name which task it belongs to, where a model has several: ConfigError if they are not B.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    first: int = 0
    tasks: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None and len(self.tasks) != len(self.ids):
            raise ConfigError(
                f"a batch of {len(self.ids)} sequences needs as many tasks, got {len(self.tasks)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """How many targets count."""
        return int(np.count_nonzero(self.targets != IGNORE))

    def to(self, backend: Backend, vocab_size: int) -> Batch:
        """The same batch where a model of `vocab_size` tokens lives: ids and targets move as one array.

        DataError for an id outside [0, vocab_size), or a target that is neither there nor IGNORE.
        """
        check_ids(self.ids, vocab_size, "id")
        check_ids(self.targets[self.targets != IGNORE], vocab_size, "target")
        ids, targets = backend.from_numpy(np.stack([self.ids, self.targets]))
        return Batch(ids, targets, self.first, self.tasks)

    def shard(self, start: int, stop: int) -> Batch:
        """Sequences start to stop, 0 <= start; views, not copies."""
        tasks = None if self.tasks is None else self.tasks[start:stop]
        return Batch(self.ids[start:stop], self.targets[start:stop], self.first + start, tasks)

    def by_task(self) -> list[tuple[str | None, Batch]]:
        """(task, its sequences) of each task, where there are tasks; otherwise None and the batch itself.

        That is the batch sorted by task, stably, and cut between tasks: `first` counts in the sorted one.
        """
        if self.tasks is None:
            return [(None, self)]
        found: list[tuple[str | None, Batch]] = []
        first = self.first
        for task, rows in rows_by_task(self.tasks).items():
            found.append(
                (task, Batch(self.ids[rows], self.targets[rows], first, (task,) * len(rows)))
            )
            first += len(rows)
        return found


def rows_by_task(tasks: Sequence[str]) -> dict[str, NDArray[np.intp]]:
    """Which rows are each task's. Tasks are in the order of their names: it must not depend on that of the rows."""
    return {task: np.flatnonzero([other == task for other in tasks]) for task in sorted(set(tasks))}


@dataclass(frozen=True, eq=False)
class PackedRecords:
    """A text that was cut into windows beforehand, and of which not every token is to be learned.

    ids (N,), integers; counts (N,), bool, where a token is a target; edges (W + 1,): window w is ids[edges[w] :
    edges[w + 1]]. The first token of a window is no target, whatever `counts` says. DataError unless the edges rise
    from 0 to N and something counts in every window.
    """

    ids: Ids
    counts: NDArray[np.bool_]
    edges: NDArray[np.int64]

    def __post_init__(self) -> None:
        n, edges = len(self.ids), self.edges
        if (
            self.counts.dtype != bool
            or self.counts.shape != self.ids.shape
            or edges.ndim != 1
            or len(edges) < 2
        ):
            raise DataError(
                "expected a bool for each of the ids, and the edges of at least one window"
            )
        if edges[0] != 0 or edges[-1] != n or np.diff(edges).min() < 1:
            raise DataError(f"the edges of the windows must rise from 0 to {n}")
        targets = self.counts.copy()
        targets[edges[:-1]] = False
        if not np.logical_or.reduceat(targets, edges[:-1]).all():
            raise DataError("a window in which no token counts cannot be trained on")

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: NDArray[np.int64], context: int) -> Batch:
        """Those that begin at `starts` (B,). Beyond a window's end ids are 0, and targets IGNORE as where none counts.

        Inside a window attention is the ordinary causal one: a record sees those that are packed before it.
        """
        batch = _cut(self.ids, starts, context)
        places = starts[:, None] + np.arange(1, context + 1)  # of the targets
        inside = places < self.edges[np.searchsorted(self.edges, starts, "right")][:, None]
        counted = inside & self.counts[np.minimum(places, len(self) - 1)]
        return Batch(np.where(inside, batch.ids, 0), np.where(counted, batch.targets, IGNORE))


def _cut(text: Ids | PackedRecords, starts: NDArray[np.int64], context: int) -> Batch:
    """The windows of T + 1 tokens from `starts` (B,) on. Positions beyond the text have id 0 and target IGNORE."""
    if isinstance(text, PackedRecords):
        return text.windows(starts, context)
    positions = starts[:, None] + np.arange(context)  # (B, 1) + (T,) -> (B, T)
    last = len(text) - 1  # it is only ever a target
    ids, targets = (text[np.minimum(positions + shift, last)].astype(np.int64) for shift in (0, 1))
    return Batch(np.where(positions < last, ids, 0), np.where(positions < last, targets, IGNORE))


def _check_text(text: Ids | PackedRecords, needed: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be 1 or more, got {count!r}")
    if isinstance(text, PackedRecords):
        longest = int(np.diff(text.edges).max())
        if longest > counts["context"] + 1:
            raise DataError(
                f"packed into windows of up to {longest} tokens: a context of {longest - 1} is needed"
            )
    tokens, needed = (text.ids, 2) if isinstance(text, PackedRecords) else (text, needed)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"expected the ids of one text, integers (N,), got {tokens.dtype} {tokens.shape}"
        )
    if len(tokens) < needed:
        raise DataError(f"the text needs at least {needed} tokens, has {len(tokens)}")


class Windows:
    """Training batches of a text, by counter: `batch(step)` depends on the text, the numbers below and `step` alone.

    An epoch visits n = len(self) windows of T + 1 tokens at stride T, each once, in an order and from an offset drawn
    from (seed, epoch): other tokens meet in every epoch. Sequence b of a batch is number g = step * batch_size + b of
    the run: window g mod n of epoch g div n. The text is integers (N,), N > T = context, or else DataError; or it is
    packed, and its windows are its own, of T + 1 tokens at most, without an offset.
    """

    def __init__(self, tokens: Ids | PackedRecords, context: int, batch_size: int, seed: int = 0):
        _check_text(tokens, context + 1, context=context, batch_size=batch_size)
        if seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {seed!r}")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        # One window less than would fit, where there is more than one: this leaves a whole stride for the offset.
        self._count = max(1, (len(tokens) - context) // context)
        if isinstance(tokens, PackedRecords):
            self._count = len(tokens.edges) - 1
        self._latest: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self._count

    def epoch(self, step: int) -> int:
        """The epoch in which the first sequence of batch `step` lies."""
        return step * self.batch_size // len(self)

    def _starts(self, epoch: int) -> NDArray[np.int64]:
        """Where the windows of an epoch begin, in the order of their visit."""
        if self._latest[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            if isinstance(self.tokens, PackedRecords):
                self._latest = epoch, self.tokens.edges[rng.permutation(len(self))]
            else:
                offset = rng.integers(len(self.tokens) - len(self) * self.context)
                self._latest = epoch, offset + self.context * rng.permutation(len(self))
        return self._latest[1]

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0: B = batch_size sequences of T = context."""
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = numbers // len(self), numbers % len(self)
        starts = [
            self._starts(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()
        ]
        return _cut(self.tokens, np.concatenate(starts), self.context)


class TaskWindows:
    """Training batches of several texts, one a task: sequence b of a batch is of task number b modulo their count.

    Each task has windows of its own, visited as `Windows` visits them, so that a small text is seen more often. The
    number of sequences a batch must reach every task: ConfigError if it does not.
    """

    def __init__(
        self, texts: Mapping[str, Ids | PackedRecords], context: int, batch_size: int, seed: int = 0
    ):
        if not texts or batch_size < len(texts):
            raise ConfigError(
                f"a batch of {batch_size} sequences cannot hold one of each of {len(texts)} tasks"
            )
        self.tasks = [list(texts)[b % len(texts)] for b in range(batch_size)]
        self._windows = {}
        for task, tokens in texts.items():
            try:
                self._windows[task] = Windows(tokens, context, self.tasks.count(task), seed)
            except DataError as error:
                raise DataError(f"task {task!r:.99}: {error}") from None

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0: B = batch_size sequences of T = context, and their tasks."""
        parts = {task: windows.batch(step) for task, windows in self._windows.items()}
        place = dict.fromkeys(parts, 0)
        rows = []
        for task in self.tasks:
            rows.append((parts[task].ids[place[task]], parts[task].targets[place[task]]))
            place[task] += 1
        ids, targets = zip(*rows, strict=True)
        return Batch(np.stack(ids), np.stack(targets), tasks=self.tasks)


def evaluation_windows(
    tokens: Ids | PackedRecords, context: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Consecutive windows, in which every token but the first is a target exactly once. The last may be padded.

    With a `limit`, so many of these windows at most, spread evenly over the text. DataError for fewer than 2 tokens.
    A packed text has its own windows, in their order.
    """
    _check_text(
        tokens, 2, context=context, batch_size=batch_size, limit=1 if limit is None else limit
    )
    packed = tokens.edges[:-1] if isinstance(tokens, PackedRecords) else None
    count = math.ceil((len(tokens) - 1) / context) if packed is None else len(packed)
    kept = min(count, limit or count)
    places = np.arange(kept, dtype=np.int64) * count // kept
    starts = places * context if packed is None else packed[places]
    return (_cut(tokens, starts[i : i + batch_size], context) for i in range(0, kept, batch_size))
