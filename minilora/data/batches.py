"""Batches: a text cut into sequences, drawn by step for training and in order for evaluation.

Nothing here remembers how far a run has come: a batch is a function of text, seed and step, so a
resumed run needs only its step number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import check_ids
from ..backend import Backend
from ..errors import ConfigError, DataError
from ..functional import IGNORE
from ..threads import blocks

Ids = NDArray[np.integer[Any]]
Integers = NDArray[np.int64]  # ids and positions of a batch


def require_positive(**counts: int) -> None:
    """ConfigError, naming it, for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be 1 or more, got {count!r}")


@dataclass(frozen=True, eq=False)
class Batch:
    """ids (B, T) and targets (B, T): the ids one position later, or IGNORE where none counts.

    first    the number of this shard's first sequence in the whole batch: dropout depends on that
             number, not on where the batch was cut
    tasks    for a model with several tasks: the name of each sequence's task. ConfigError unless
             there are B names
    first_key   (B, T), the first position of its sequence that each position may see, and from
             which positions are numbered; None: a position sees all before it

    Every array has B first, so that a batch can be cut into shards.
    """

    ids: Integers
    targets: Integers
    first: int = 0
    tasks: Sequence[str] | None = None
    first_key: Integers | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None and len(self.tasks) != len(self.ids):
            raise ConfigError(
                f"a batch of {len(self.ids)} sequences needs as many tasks, got {len(self.tasks)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """The number of targets that are not IGNORE."""
        return int(np.count_nonzero(self.targets != IGNORE))

    def to(self, backend: Backend, vocab_size: int) -> Batch:
        """The same batch on a model's device; its arrays move as one.

        A batch of arrays of a device is taken as it is.

        DataError for an id outside [0, vocab_size), a target that is neither inside nor IGNORE, or
        arrays that are not integers of one shape.
        """
        if not isinstance(self.ids, np.ndarray):
            return self  # it has moved: to look at its values would wait for the device
        arrays = self.checked(vocab_size)
        moved = np.stack(arrays, dtype=np.int64, casting="same_kind")
        ids, targets, *first_key = backend.from_numpy(moved)
        return Batch(ids, targets, self.first, self.tasks, *first_key)

    def checked(self, vocab_size: int) -> list[Integers]:
        """The ids, the targets and first_key, if there is one. DataError as for `to`."""
        arrays = {"ids": self.ids, "targets": self.targets}
        if self.first_key is not None:
            arrays["first_key"] = self.first_key
        for name, array in arrays.items():
            if array.shape != self.ids.shape or array.dtype.kind not in "iu":
                raise DataError(
                    f"a batch's {name} must be integers of the ids' shape {self.ids.shape}, "
                    f"got {array.dtype} {array.shape}"
                )
        check_ids(self.ids, vocab_size, "id")
        check_ids(self.targets[self.targets != IGNORE], vocab_size, "target")
        return list(arrays.values())

    def shard(self, start: int, stop: int) -> Batch:
        """Sequences start to stop, 0 <= start; views, not copies."""
        tasks = None if self.tasks is None else self.tasks[start:stop]
        return self._take(slice(start, stop), self.first + start, tasks)

    def _take(self, rows: Any, first: int, tasks: Sequence[str] | None) -> Batch:
        first_key = None if self.first_key is None else self.first_key[rows]
        return Batch(self.ids[rows], self.targets[rows], first, tasks, first_key)

    def trim(self) -> Batch:
        """The batch without the positions behind the last target of all sequences.

        No loss depends on them: attention is causal.
        """
        counted = np.flatnonzero((self.targets != IGNORE).any(axis=0))
        return self.positions(0, int(counted[-1]) + 1 if len(counted) else 1)

    def positions(self, start: int, stop: int) -> Batch:
        """Positions start to stop of all sequences; views. `first_key` still counts from the first.

        For a model that has seen the positions before `start`.
        """
        at = np.s_[:, start:stop]
        first_key = None if self.first_key is None else self.first_key[at]
        return Batch(self.ids[at], self.targets[at], self.first, self.tasks, first_key)

    def by_task(self) -> list[TaskBatch]:
        """[(task, its sequences)], or [(None, the batch)] without tasks.

        This is the batch sorted by task, stably, and cut between tasks: `first` counts in the
        sorted one.
        """
        if self.tasks is None:
            return [(None, self)]
        parts: list[TaskBatch] = []
        first = self.first
        for task, rows in rows_by_task(self.tasks).items():
            parts.append((task, self._take(rows, first, (task,) * len(rows))))
            first += len(rows)
        return parts


TaskBatch = tuple[str | None, Batch]  # a task, or None in a batch without tasks; its sequences


def rows_by_task(tasks: Sequence[str]) -> dict[str, NDArray[np.intp]]:
    """{task: its rows}, sorted by task: the order must not depend on that of the rows."""
    return {task: np.flatnonzero([other == task for other in tasks]) for task in sorted(set(tasks))}


@dataclass(frozen=True, eq=False)
class PackedRecords:
    """Records in windows of one or more, with the tokens to learn marked.

    A record sees no other one, and its positions are numbered from its own first token: so its loss
    does not depend on what shares its window.

    ids       (N,) integers
    counts    (N,) bool, where a token is a target; the first token of a record never is one
    edges     (W + 1,): window w is ids[edges[w] : edges[w + 1]]
    starts    (R,): where each record begins

    DataError unless the edges rise from 0 to N, every window has a target, and the starts rise and
    include the start of every window.
    """

    ids: Ids
    counts: NDArray[np.bool_]
    edges: Integers
    starts: Integers

    def __post_init__(self) -> None:
        for name in ("edges", "starts"):
            positions = getattr(self, name)
            if positions.dtype.kind not in "iu":
                raise DataError(f"{name} must be integers, got {positions.dtype}")
            # Differences of unsigned integers are never negative.
            object.__setattr__(self, name, positions.astype(np.int64, copy=False))
        edges = self.edges
        is_marked = self.counts.dtype == bool and self.counts.shape == self.ids.shape
        if not is_marked or edges.ndim != 1 or len(edges) < 2:
            raise DataError(
                "expected a bool for each of the ids, and the edges of at least one window"
            )
        if edges[0] != 0 or edges[-1] != len(self) or np.diff(edges).min() < 1:
            raise DataError(f"the edges of the windows must rise from 0 to {len(self)}")
        starts = self.starts
        rises = starts.ndim == 1 and (np.diff(starts) > 0).all()
        if not rises or not np.isin(edges[:-1], starts).all() or starts[-1] >= len(self):
            raise DataError(
                "the starts of the records must rise, begin each window, and be below the number "
                f"of ids, {len(self)}"
            )
        if not np.logical_or.reduceat(self._targets, edges[:-1]).all():
            raise DataError("a window in which no token counts cannot be trained on")

    @cached_property
    def _targets(self) -> NDArray[np.bool_]:
        """(N,), `counts` without the first token of each record, which follows nothing of it."""
        targets = self.counts.copy()
        targets[self.starts] = False
        return targets

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: Integers, context: int) -> Batch:
        """The windows that begin at `starts` (B,). Beyond a window's end, ids are 0.

        Targets are IGNORE there and where a token does not count. A position sees its own record
        from `first_key` on; one beyond the end sees the window's last record.
        """
        batch = _cut(self.ids, starts, context)
        places = starts[:, None] + np.arange(context)  # of the inputs; targets are one place later
        ends = self.edges[np.searchsorted(self.edges, starts, "right")][:, None]
        inside = places + 1 < ends
        counted = inside & self._targets[np.minimum(places + 1, len(self) - 1)]
        record = np.searchsorted(self.starts, np.minimum(places, ends - 1), "right") - 1
        first_key = self.starts[record] - starts[:, None]
        return Batch(
            np.where(inside, batch.ids, 0),
            np.where(counted, batch.targets, IGNORE),
            first_key=first_key,
        )


Text = Ids | PackedRecords


def _cut(text: Text, starts: Integers, context: int) -> Batch:
    """The windows of T + 1 tokens from `starts` (B,) on.

    Positions beyond the text have id 0 and target IGNORE.
    """
    if isinstance(text, PackedRecords):
        return text.windows(starts, context)
    positions = starts[:, None] + np.arange(context)  # (B, 1) + (T,) -> (B, T)
    last = len(text) - 1  # only ever a target
    inside = positions < last
    ids = text[np.minimum(positions, last)].astype(np.int64)
    targets = text[np.minimum(positions + 1, last)].astype(np.int64)
    return Batch(np.where(inside, ids, 0), np.where(inside, targets, IGNORE))


def _check_text(text: Text, context: int, needed: int) -> None:
    """DataError unless a text is integers (N,), N >= `needed`, or is packed for this context."""
    if isinstance(text, PackedRecords):
        longest = int(np.diff(text.edges).max())
        if longest > context + 1:
            raise DataError(
                f"packed windows have up to {longest} tokens: context must be {longest - 1} or more"
            )
        text = text.ids
        needed = 2
    if text.ndim != 1 or text.dtype.kind not in "iu":
        raise DataError(
            f"expected the ids of one text, integers (N,), got {text.dtype} {text.shape}"
        )
    if len(text) < needed:
        raise DataError(f"the text needs at least {needed} tokens, has {len(text)}")


class Windows:
    """Training batches of a text: `batch(step)` depends on the text, the numbers below and `step`.

    An epoch visits n = len(self) windows of T + 1 tokens at stride T, each once, in an order and
    from an offset drawn from (seed, epoch): other tokens meet in every epoch. Sequence b of a batch
    is number g = step * batch_size + b of the run: window g mod n of epoch g div n.

    The text is integers (N,), N > T = context, or else DataError; or it is packed, and has windows
    already, of T + 1 tokens at most, without an offset.
    """

    def __init__(self, tokens: Text, context: int, batch_size: int, seed: int = 0):
        require_positive(context=context, batch_size=batch_size)
        if seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {seed!r}")
        _check_text(tokens, context, context + 1)
        self.tokens = tokens
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        if isinstance(tokens, PackedRecords):
            self._count = len(tokens.edges) - 1
        else:
            # One window less than would fit, if several fit: this leaves a whole stride for the
            # offset.
            self._count = max(1, (len(tokens) - context) // context)
        self._latest: dict[int, Integers] = {}

    def __len__(self) -> int:
        return self._count

    def epoch(self, step: int) -> int:
        """The epoch of the first sequence of batch `step`."""
        return step * self.batch_size // len(self)

    def _starts(self, epoch: int) -> Integers:
        """Where the windows of an epoch begin, in the order of their visit."""
        if epoch not in self._latest:
            rng = np.random.default_rng([self.seed, epoch])
            if isinstance(self.tokens, PackedRecords):
                starts = self.tokens.edges[rng.permutation(len(self))]
            else:
                offset = rng.integers(len(self.tokens) - len(self) * self.context)
                starts = offset + self.context * rng.permutation(len(self))
            self._latest = {epoch: starts}
        return self._latest[epoch]

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0: B = batch_size sequences of T = context."""
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = divmod(numbers, len(self))
        starts = []
        for epoch in np.unique(epochs).tolist():
            starts.append(self._starts(epoch)[places[epochs == epoch]])
        return _cut(self.tokens, np.concatenate(starts), self.context)


class TaskWindows:
    """Training batches of several texts, one per task: sequence b is of task b modulo their count.

    Each task has its own windows, visited as `Windows` visits them, so a small text is seen more
    often. ConfigError unless a batch has at least one sequence per task.
    """

    def __init__(self, texts: Mapping[str, Text], context: int, batch_size: int, seed: int = 0):
        if not texts or batch_size < len(texts):
            raise ConfigError(
                f"a batch of {batch_size} sequences cannot hold one of each of {len(texts)} tasks"
            )
        names = list(texts)
        self.context = context
        self.tasks = [names[b % len(names)] for b in range(batch_size)]
        self._rows = rows_by_task(self.tasks)
        self._windows = {}
        for task, tokens in texts.items():
            try:
                self._windows[task] = Windows(tokens, context, len(self._rows[task]), seed)
            except DataError as error:
                raise DataError(f"task {task!r:.99}: {error}") from None

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0: B = batch_size sequences of T = context, and their tasks."""
        ids, targets, first_key = np.zeros((3, len(self.tasks), self.context), np.int64)
        is_packed = False
        for task, windows in self._windows.items():
            part = windows.batch(step)
            rows = self._rows[task]
            ids[rows] = part.ids
            targets[rows] = part.targets
            if part.first_key is not None:
                first_key[rows] = part.first_key
                is_packed = True
        return Batch(ids, targets, tasks=self.tasks, first_key=first_key if is_packed else None)


def evaluation_windows(
    tokens: Text, context: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Consecutive windows in which every token but the first is a target exactly once.

    The last may be padded. With a `limit`, at most so many of these windows, spread evenly over the
    text. A packed text has its own windows, in their order. DataError for fewer than 2 tokens.
    """
    require_positive(context=context, batch_size=batch_size, limit=1 if limit is None else limit)
    _check_text(tokens, context, 2)
    if isinstance(tokens, PackedRecords):
        starts = tokens.edges[:-1]
    else:
        starts = np.arange(0, len(tokens) - 1, context)
    count = len(starts)
    size = min(count, limit or count)
    starts = starts[np.arange(size) * count // size]
    return (_cut(tokens, starts[rows], context) for rows in blocks(size, batch_size))
