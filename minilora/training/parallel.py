"""One step at every scale: a batch is cut into shards, and their gradients are added.

Each shard runs forward and backward separately, one after another or in threads (NumPy releases
the interpreter's lock inside its loops). A shard's activations stay in the processor's cache, and
memory falls with the shard. Where shards are few, long sequences are cut by position as well, into
parts that run at the same time and add up to the gradient of their shard (parts.py). The cut
depends on shapes alone, and so does the form of the sum (sums.py), so the result has the same bits
for any number of threads, and of processes (ranks.py) that have some of the shards each.

A batch of several tasks is sorted by task first, and cut within each task: a shard runs the
adapters of one task. The effective weights, which the shards of a task share, are formed for all
tasks before the first shard runs, so that no task waits for another one's: the price is one copy of
the adapted weights per task.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import threadpoolctl

from ..autograd import Tensor, gradients, no_grad
from ..backend import Array, Backend
from ..data.batches import Batch, TaskBatch
from ..errors import (
    ConfigError,
    Rule,
    check_fields,
    integer_rules,
    is_flag,
    is_plain_number,
    optional_rule,
)
from ..models.cache import Cache
from ..nn import Parameter, dropout_counter
from ..threads import MAX_THREADS, Workers, keep_memory
from .graphed import Divisor, GraphedLosses
from .parts import Job, Jobs, Part, Shared, choose_part_size, jobs_of_parts, part_edges, schedule
from .ranks import Alone, Ranks
from .sums import Node, Partial, add_up

TOKENS_PER_SHARD = 512  # measured: with fewer, Python's share of a small model's step grows
# 2 MiB of the widest activation: with more, those of a wide model no longer fit into the cache.
FLOATS_PER_SHARD = 1 << 19
READ_TOGETHER = 64  # losses of an evaluation on a GPU

T = TypeVar("T")
Loss = tuple[Array, int]  # a sum over targets, and how many they are


def language_modelling_loss(model: Any, batch: Batch, cache: Cache | None = None) -> Tensor:
    """The sum of -log p(target) over counted targets, a scalar.

    cache   the positions before those of the batch; None: there are none

    DataError for an id outside the vocabulary.
    """
    batch = batch.to(_backend(model), model.config.vocab_size)
    loss = model(batch.ids, cache, targets=batch.targets, first_key=batch.first_key)
    return loss  # type: ignore[no-any-return]


def _backend(model: Any) -> Backend:
    return next(iter(model.parameters())).backend  # type: ignore[no-any-return]


def _read(backend: Backend, losses: Sequence[tuple[Array, int]]) -> Iterator[tuple[float, int]]:
    """(loss, counted targets) with losses of the device as numbers."""
    if losses:
        values = backend.read([loss for loss, _ in losses])
        yield from zip(values, (count for _, count in losses), strict=True)


def shard_size(model: Any, sequences: int, context: int) -> int:
    """Sequences per shard for batches of `sequences` x `context`.

    It depends on shapes alone, since a resumed run must cut alike. It gives at least two shards, so
    that two cores have work. A GPU takes the batch whole.
    """
    if _backend(model).name != "cpu":
        return sequences
    tokens = min(TOKENS_PER_SHARD, FLOATS_PER_SHARD // model.config.intermediate_size)
    return max(1, min(int(tokens) // context, (sequences + 1) // 2))


def part_size(model: Any, sequences: int, context: int, shard: int) -> int:
    """Positions per part for batches of `sequences` x `context` in shards of `shard` sequences.

    It depends on shapes alone. `context`: sequences stay whole, as they always do on a GPU.
    """
    if _backend(model).name != "cpu":
        return context
    return choose_part_size(model.config, -(-sequences // shard), context)


class Shard(NamedTuple):
    """Sequences of one task that run together, with the gradient that they add to the sum.

    edges   where they are cut by position: part i has positions edges[i] to edges[i + 1]
    """

    task: str | None
    batch: Batch
    edges: list[int]

    @property
    def is_whole(self) -> bool:
        return len(self.edges) == 2


class Result(NamedTuple, Generic[T]):
    """What a part of a shard gives, or the whole of it; `is_last` completes the shard."""

    value: T
    is_last: bool


def _is_balance(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value in ("tasks", "tokens")
    return all(map(is_plain_number(above=0), value.values()))


_RULES = [
    *map(optional_rule, integer_rules("threads", "shard", "part", least=1)),
    Rule("balance", _is_balance, "'tasks', 'tokens' or positive numbers by task"),
    Rule("graph", is_flag, "True or False"),
]


class ShardedStep:
    """Gradients and losses of batches, shard by shard. Use it in a `with` block: it has threads.

    threads   shards that run at once; None: one per core of this rank. BLAS uses one thread
              inside, also with threads = 1, because threads of its own would change the bits
    shard     sequences per shard; None: `shard_size`
    part      positions per part of a sequence, as near as parts of equal cost come to it; None:
              `part_size`. A GPU takes sequences whole
    loss      (model, Batch) -> scalar Tensor: a sum over the batch's counted targets. Only for the
              default one sequences are cut
    keep_memory   see the function of that name: it holds for this process until its end
    balance   how the tasks of a batch share its loss. "tasks": the loss is the mean of the tasks'
              means, so that the size of a task does not set its weight; numbers by task weight
              these means, 1 for a task without a number; "tokens": the loss is the mean over all
              counted targets alike
    graph     on a GPU, evaluate batches of one shape by one launch each: see graphed.py
    ranks     the processes that share the shards; each calls the same methods with the same
              arguments, and gets the same results
    """

    def __init__(
        self,
        model: Any,
        threads: int | None = None,
        shard: int | None = None,
        loss: Callable[[Any, Batch], Tensor] = language_modelling_loss,
        keep_memory: bool = True,
        balance: str | Mapping[str, float] = "tasks",
        graph: bool = True,
        ranks: Ranks | None = None,
        part: int | None = None,
    ):
        check_fields(locals(), _RULES)
        if part is not None and loss is not language_modelling_loss:
            raise ConfigError(
                f"part ({part}) needs the loss language_modelling_loss, because a loss of another "
                "kind may not be a sum over parts: leave out part, or this loss"
            )
        self.model = model
        self.ranks = ranks or Alone()
        self.loss = loss
        self.shard = shard
        self.part = part
        self.keep_memory = keep_memory
        self.balance = balance
        self.graph = graph
        self.threads = 1  # one thread keeps a GPU busy
        self._on_cpu = _backend(model).name == "cpu"
        if self._on_cpu:
            self.threads = min(threads or self.ranks.cores, MAX_THREADS)
        self._workers = Workers(self.threads)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardedStep:
        limits = self._stack.enter_context(threadpoolctl.threadpool_limits(1, "blas"))
        if not limits.get_original_num_threads().get("blas"):
            warnings.warn(
                "threadpoolctl can limit no BLAS: results may depend on its number of threads",
                stacklevel=2,
            )
        if self.keep_memory:
            keep_memory()
        self._stack.enter_context(self._workers)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def gradients(
        self, batch: Batch, params: Sequence[Parameter], seed: int = 0, step: int = 0
    ) -> tuple[Array, list[Array | None]]:
        """(mean loss, its gradients) over the counted targets of the whole batch.

        The gradient of a parameter that takes no part is None. The loss is a float64 scalar on the
        model's device: nothing here waits for a GPU; float(loss) does. `seed` and `step` number the
        dropout masks. An exception in a shard surfaces here, before anything is half added. With
        several tasks the mean follows `balance`, and parameters of tasks that are not in the batch
        take no part.
        """
        task_batches = batch.by_task()
        return self.gradients_by_task(
            task_batches, self.divisors(task_batches), list(params), seed, step
        )

    def gradients_by_task(
        self,
        task_batches: Sequence[TaskBatch],
        divisors: Mapping[str | None, Any],
        params: Sequence[Parameter],
        seed: int,
        step: Any,
    ) -> tuple[Array, list[Array | None]]:
        """`gradients` of a batch by task, from what is known before a step.

        In a captured step arrays of the device stand for the numbers that change: two of each task
        for its divisor, 1 / divisor and the divisor, and one for the step.
        """

        def forward(shard: Shard, part: Part | None = None) -> Tensor:
            start = part.length if part else 0
            counter = dropout_counter(seed, step, shard.batch.first, start)
            with self._running(shard.task), counter:
                return self._loss_of(shard.batch, part)

        def backward(shard: Shard, part: Part | None, loss: Tensor) -> Result[Partial]:
            losses = {shard.task: loss.data.astype(np.float64)}
            is_last = part is None or part.is_first  # backward begins with the last part
            if not loss.requires_grad:  # as for sequences that only the base runs
                return Result(Partial(losses, [None] * len(params), trained=False), is_last)
            share = divisors[shard.task].share
            if isinstance(share, float):
                upstream = loss.backend.xp.full(loss.shape, share, loss.dtype)
            else:
                upstream = share.astype(loss.dtype)
            grads = gradients(loss, params, upstream)
            return Result(Partial(losses, grads, trained=True), is_last)

        def whole(shard: Shard) -> Result[Partial]:
            return backward(shard, None, forward(shard))

        def jobs_of(shard: Shard) -> Jobs:
            if shard.is_whole:
                return Jobs([], [functools.partial(whole, shard)])
            of_shard = functools.partial(forward, shard), functools.partial(backward, shard)
            return jobs_of_parts(self._parts(shard), *of_shard)

        shards = list(self._cut(task_batches))
        indices = self.ranks.owned(len(shards))
        own_shards = shards[indices.start : indices.stop]
        own_tasks = {shard.task for shard in own_shards}
        try:
            for task, task_batch in task_batches:
                if task in own_tasks:
                    with self._running(task):
                        self._prepare(task_batch.ids.size)
            jobs = schedule(map(jobs_of, own_shards), self.threads)
            partials = enumerate(
                _add_parts(self._workers.map(_run, jobs), Partial.add), indices.start
            )
            leaves = (Node(i, i + 1, partial) for i, partial in partials)
            nodes = add_up(leaves, len(shards), Partial.add)
        finally:
            self.model.end_step()
        tasks = [task for task, _ in task_batches]
        total = self.ranks.sum(nodes, len(shards), tasks, params)
        if not total.trained and task_batches:
            raise ConfigError("no parameter of the model requires a gradient: nothing to train")
        losses = total.losses.items()
        return sum(loss / divisors[task].size for task, loss in losses), total.grads

    def divisors(self, task_batches: Sequence[TaskBatch]) -> dict[str | None, Divisor]:
        """What divides each task's sum of losses, so that the results add up to the mean loss."""
        counts = {task: task_batch.tokens for task, task_batch in task_batches}
        if self.balance == "tokens":
            return dict.fromkeys(counts, Divisor.of(max(sum(counts.values()), 1)))
        given = self.balance if isinstance(self.balance, Mapping) else {}
        weights = {task: given.get(task or "", 1.0) for task, count in counts.items() if count}
        total = sum(weights.values())
        divisors = dict.fromkeys(counts, Divisor.of(1))
        for task, weight in weights.items():
            divisors[task] = Divisor.of(counts[task] * (total / weight))
        return divisors

    def _running(self, task: str | None) -> contextlib.AbstractContextManager[None]:
        """A context in which the model runs the adapters of this task."""
        if task is None:
            return contextlib.nullcontext()
        if not hasattr(self.model, "task"):
            raise ConfigError(
                f"the batch has sequences of task {task!r:.99}, but the model has no tasks"
            )
        return self.model.task(task)  # type: ignore[no-any-return]

    def losses(self, batches: Iterable[Batch]) -> Iterator[tuple[float, int]]:
        """(summed loss, counted targets) of each shard of the batches in order, without gradients.

        With several ranks each computes every size-th shard, and all get all of them at the end.
        """
        return iter(self.ranks.gather(self._own_losses(batches)))

    def _own_losses(self, batches: Iterable[Batch]) -> Iterator[tuple[float, int]]:
        """Yield what `losses` has of the shards that this rank computes."""

        def loss_of(task_batch: TaskBatch, part: Part | None = None) -> Array:
            task, batch = task_batch
            with no_grad(), self._running(task):
                return self._loss_of(batch, part).data

        backend = _backend(self.model)
        loss_of_whole: Callable[[TaskBatch], Array] = loss_of
        if self.graph and not self._on_cpu and self.loss is language_modelling_loss:
            loss_of_whole = GraphedLosses(loss_of, backend, self.model.config.vocab_size)

        def whole(shard: Shard) -> Result[Loss]:
            return Result((loss_of_whole((shard.task, shard.batch)), shard.batch.tokens), True)

        def of_part(shard: Shard, part: Part) -> Result[Loss]:
            loss = loss_of((shard.task, shard.batch), part).astype(np.float64)
            tokens = shard.batch.positions(part.length, part.stop).tokens
            return Result((loss, tokens), part.is_last)

        def shards() -> Iterator[Shard]:
            prepared = set()
            for batch in batches:
                task_batches = batch.by_task()
                for task, _ in task_batches:
                    if task not in prepared:
                        prepared.add(task)
                        with self._running(task):
                            self._prepare(None)
                yield from self._cut(task_batches)

        def jobs() -> Iterator[Job]:
            own_shards = itertools.islice(shards(), self.ranks.rank, None, self.ranks.size)
            for shard in own_shards:
                if shard.is_whole:
                    yield functools.partial(whole, shard)
                    continue
                for part in self._parts(shard):
                    yield functools.partial(part.run, functools.partial(of_part, shard, part))

        try:
            waiting = []  # losses that are still on the device
            for loss, count in _add_parts(self._workers.map(_run, jobs()), _add_loss):
                if self._on_cpu:
                    yield loss.item(), count
                    continue
                waiting.append((loss, count))
                if len(waiting) == READ_TOGETHER:
                    yield from _read(backend, waiting)
                    waiting = []
            yield from _read(backend, waiting)
        finally:
            self.model.end_step()

    def _loss_of(self, batch: Batch, part: Part | None) -> Tensor:
        """The loss of the positions of a part, or of all."""
        if part is None:
            return self.loss(self.model, batch)
        return language_modelling_loss(self.model, batch.positions(part.length, part.stop), part)

    def _parts(self, shard: Shard) -> list[Part]:
        return Shared(self.model, len(shard.batch), shard.edges).parts()

    def count_shards(self, batch: Batch) -> int:
        """The number of shards that a batch is cut into."""
        return sum(1 for _ in self._cut(batch.by_task()))

    def _prepare(self, tokens: int | None) -> None:
        """Form what all shards of a batch of `tokens` share, in threads."""
        jobs = list(self.model.preparations(tokens))

        def work(first: int) -> None:
            for job in jobs[first :: self.threads]:
                job()

        for _ in self._workers.map(work, range(self.threads)):
            pass

    def _cut(self, task_batches: Sequence[TaskBatch]) -> Iterator[Shard]:
        """Yield the shards in order. Their size and their parts' depend on the whole batch's."""
        sequences = sum(len(task_batch) for _, task_batch in task_batches)
        for task, task_batch in task_batches:
            context = task_batch.ids.shape[1]
            size = self.shard or shard_size(self.model, sequences, context)
            for start in range(0, len(task_batch), size):
                batch = task_batch.shard(start, start + size)
                # Windows of records have ends of many lengths. A GPU runs fixed shapes faster.
                if batch.first_key is not None and self._on_cpu:
                    batch = batch.trim()
                positions = batch.ids.shape[1]
                edges = [0, positions]
                if self._on_cpu and self.loss is language_modelling_loss:
                    part = self.part or part_size(self.model, sequences, context, size)
                    edges = part_edges(self.model.config, positions, part)
                yield Shard(task, batch, edges)


def _run(job: Job) -> Any:
    return job()


def _add_parts(results: Iterable[Result[T] | None], add: Callable[[T, T], T]) -> Iterator[T]:
    """The sum of each shard's results, which come one after another; None is left out."""
    total: T | None = None
    for result in results:
        if result is None:
            continue
        total = result.value if total is None else add(total, result.value)
        if result.is_last:
            yield total
            total = None


def _add_loss(one: Loss, other: Loss) -> Loss:
    return one[0] + other[0], one[1] + other[1]
