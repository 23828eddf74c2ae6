"""One step at every scale: a batch is cut into shards, and their gradients are added.

Each shard runs forward and backward separately, one after another or in threads (NumPy releases
the interpreter's lock inside its loops). A shard's activations stay in the processor's cache, and
memory falls with the shard. The cut depends on shapes alone, and so does the form of the sum
(sums.py), so the result has the same bits for any number of threads, and of processes (ranks.py)
that have a part of the shards each.

A batch of several tasks is sorted by task first, and cut within each task: a shard runs the
adapters of one task. The effective weights, which the shards of a task share, are formed for all
tasks before the first shard runs, so that no task waits for another one's: the price is one copy of
the adapted weights per task.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
from ..nn import Parameter, dropout_counter
from ..threads import MAX_THREADS, Workers, keep_memory
from .graphed import Divisor, GraphedLosses
from .ranks import Alone, Ranks
from .sums import Node, Partial, add_up

TOKENS_PER_SHARD = 512  # measured: with fewer, Python's share of a small model's step grows
# 2 MiB of the widest activation: with more, those of a wide model no longer fit into the cache.
FLOATS_PER_SHARD = 1 << 19
READ_TOGETHER = 64  # losses of an evaluation on a GPU


def language_modelling_loss(model: Any, batch: Batch) -> Tensor:
    """The sum of -log p(target) over counted targets, a scalar.

    DataError for an id outside the vocabulary.
    """
    batch = batch.to(_backend(model), model.config.vocab_size)
    loss = model(batch.ids, targets=batch.targets, first_key=batch.first_key)
    return loss  # type: ignore[no-any-return]


def _backend(model: Any) -> Backend:
    return next(iter(model.parameters())).backend  # type: ignore[no-any-return]


def _read(backend: Backend, losses: Sequence[tuple[Array, int]]) -> Iterator[tuple[float, int]]:
    """(loss, counted targets) with losses of the device as numbers: one transfer for all."""
    if losses:
        values = backend.to_numpy(backend.join([loss for loss, _ in losses])).tolist()
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


def _is_balance(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value in ("tasks", "tokens")
    return all(map(is_plain_number(above=0), value.values()))


_RULES = [
    *map(optional_rule, integer_rules("threads", "shard", least=1)),
    Rule("balance", _is_balance, "'tasks', 'tokens' or positive numbers by task"),
    Rule("graph", is_flag, "True or False"),
]


class ShardedStep:
    """Gradients and losses of batches, shard by shard. Use it in a `with` block: it has threads.

    threads   shards that run at once; None: one per core of this rank. BLAS uses one thread
              inside, also with threads = 1, because threads of its own would change the bits
    shard     sequences per shard; None: `shard_size`
    loss      (model, Batch) -> scalar Tensor: a sum over the batch's counted targets
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
    ):
        check_fields(locals(), _RULES)
        self.model = model
        self.ranks = ranks or Alone()
        self.loss = loss
        self.shard = shard
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

        def work(task_shard: TaskBatch) -> Partial:
            task, shard = task_shard
            with self._running(task), dropout_counter(seed, step, shard.first):
                loss = self.loss(self.model, shard)
            losses = {task: loss.data.astype(np.float64)}
            if not loss.requires_grad:  # as for sequences that only the base runs
                return Partial(losses, [None] * len(params), trained=False)
            share = divisors[task].share
            if isinstance(share, float):
                upstream = loss.backend.xp.full(loss.shape, share, loss.dtype)
            else:
                upstream = share.astype(loss.dtype)
            return Partial(losses, gradients(loss, params, upstream), trained=True)

        shards = list(self._cut(task_batches))
        own = self.ranks.owned(len(shards))
        own_shards = shards[own.start : own.stop]
        own_tasks = {task for task, _ in own_shards}
        try:
            for task, task_batch in task_batches:
                if task in own_tasks:
                    with self._running(task):
                        self._prepare(task_batch.ids.size)
            partials = enumerate(self._workers.map(work, own_shards), own.start)
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

        def loss_of(task_shard: TaskBatch) -> Array:
            task, shard = task_shard
            with no_grad(), self._running(task):
                return self.loss(self.model, shard).data

        backend = _backend(self.model)
        on_device: Callable[[TaskBatch], Array] = loss_of
        if self.graph and not self._on_cpu and self.loss is language_modelling_loss:
            on_device = GraphedLosses(loss_of, backend, self.model.config.vocab_size)

        def work(task_shard: TaskBatch) -> tuple[Array, int]:
            return on_device(task_shard), task_shard[1].tokens

        def shards() -> Iterator[TaskBatch]:
            prepared = set()
            for batch in batches:
                task_batches = batch.by_task()
                for task, _ in task_batches:
                    if task not in prepared:
                        prepared.add(task)
                        with self._running(task):
                            self._prepare(None)
                yield from self._cut(task_batches)

        try:
            waiting = []  # losses that are still on the device
            own_shards = itertools.islice(shards(), self.ranks.rank, None, self.ranks.size)
            for loss in self._workers.map(work, own_shards):
                waiting.append(loss)
                if self._on_cpu or len(waiting) == READ_TOGETHER:
                    yield from _read(backend, waiting)
                    waiting = []
            yield from _read(backend, waiting)
        finally:
            self.model.end_step()

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

    def _cut(self, task_batches: Sequence[TaskBatch]) -> Iterator[TaskBatch]:
        """Yield (task, shard) in order. The size of a shard depends on the whole batch's."""
        sequences = sum(len(task_batch) for _, task_batch in task_batches)
        for task, task_batch in task_batches:
            size = self.shard or shard_size(self.model, sequences, task_batch.ids.shape[1])
            for start in range(0, len(task_batch), size):
                shard = task_batch.shard(start, start + size)
                # Windows of records have ends of many lengths. A GPU runs fixed shapes faster.
                is_ragged = shard.first_key is not None and self._on_cpu
                yield task, shard.trim() if is_ragged else shard
