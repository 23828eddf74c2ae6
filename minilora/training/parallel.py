"""One step at every scale: a batch is cut into shards, each runs forward and backward on its own, the sums are added.

Shards run one after another or by threads (NumPy releases the interpreter's lock inside its loops). A shard's
activations stay in the processor's cache, and memory falls with the shard. The cut depends on shapes alone and
gradients are added in the order of the shards, so the result has the same bits for any number of threads.

A batch of several tasks is sorted by task first, and cut within each: a shard runs one task's adapters. What a task's
shards share, its effective weights, is formed for all tasks before the first shard runs, so that none waits for another
task's: the price is a copy of the adapted weights for each.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import threadpoolctl

from ..autograd import Tensor, gradients, no_grad
from ..backend import Array
from ..data.batches import Batch
from ..errors import ConfigError
from ..nn import Parameter, dropout_counter
from ..threads import MAX_THREADS, Workers, available_cores, keep_memory

P = TypeVar("P")
R = TypeVar("R")
TOKENS_PER_SHARD = 512  # measured: with fewer, Python's share of a small model's step grows
FLOATS_PER_SHARD = (
    1 << 19
)  # 2 MiB of the widest activation: with more, a wide model's leave the cache


def language_modelling_loss(model: Any, batch: Batch) -> Tensor:
    """The sum over counted targets of -log p(target), a scalar. DataError for an id outside the vocabulary."""
    batch = batch.to(next(iter(model.parameters())).backend, model.config.vocab_size)
    return model(batch.ids, targets=batch.targets)  # type: ignore[no-any-return]


def shard_size(model: Any, sequences: int, context: int) -> int:
    """Sequences a shard for batches of `sequences` x `context`, from shapes alone: a resumed run must cut alike.

    At least two shards, so that two cores have work. A GPU takes the batch whole.
    """
    if next(iter(model.parameters())).backend.name != "cpu":
        return sequences
    tokens = min(TOKENS_PER_SHARD, FLOATS_PER_SHARD // model.config.intermediate_size)
    return max(1, min(int(tokens) // context, (sequences + 1) // 2))


class ShardedStep:
    """Gradients and losses of whole batches, shard by shard. Use it in a `with` block: it owns threads.

    threads   shards that run at once; None: one a core. BLAS is held to one thread inside, also with one thread,
              because its own threads would change the bits
    shard     sequences a shard; None: `shard_size`
    loss      (model, Batch) -> scalar Tensor: a sum over the batch's counted targets
    keep_memory   see the function of that name: for this process, and for good
    balance   how a batch's tasks share its loss. "tasks": it is the mean of each one's own mean, so that the size of a
              task does not set its weight; numbers by task weigh that mean, 1 for a task without one; "tokens": it is
              the mean over all counted targets alike
    """

    def __init__(
        self,
        model: Any,
        threads: int | None = None,
        shard: int | None = None,
        loss: Callable[[Any, Batch], Tensor] = language_modelling_loss,
        keep_memory: bool = True,
        balance: str | Mapping[str, float] = "tasks",
    ):
        for name, value in (("threads", threads), ("shard size", shard)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r:.100}")
        weights = balance.values() if isinstance(balance, Mapping) else ()
        fit = all(type(w) in (int, float) and 0 < w < math.inf for w in weights)
        if not fit or not (isinstance(balance, Mapping) or balance in ("tasks", "tokens")):
            raise ConfigError(
                f"balance must be 'tasks', 'tokens' or positive numbers by task, got {balance!r:.200}"
            )
        self.model, self.loss, self.shard, self.keep_memory = model, loss, shard, keep_memory
        self.balance = balance
        on_host = (
            next(iter(model.parameters())).backend.name == "cpu"
        )  # a GPU is kept busy by one thread
        self.threads = min(threads or available_cores(), MAX_THREADS) if on_host else 1
        self._workers = Workers(self.threads)
        self._stack = ExitStack()

    def __enter__(self) -> ShardedStep:
        limits = self._stack.enter_context(threadpoolctl.threadpool_limits(1, "blas"))
        if not limits.get_original_num_threads().get("blas"):
            warnings.warn(
                "no BLAS that threadpoolctl can hold: results may depend on its number of threads",
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
        """(mean loss, its gradients) over the counted targets of the whole batch; None where a parameter takes no part.

        The loss is a float64 scalar where the model is: nothing here waits for a GPU; float(loss) does. `seed` and
        `step` number the dropout masks. An exception in a shard surfaces here, with nothing half added. Of several
        tasks the mean is as `balance` has it, and what belongs to tasks that are not in the batch takes no part.
        """
        params, parts = list(params), batch.by_task()
        counted = self._counted(
            parts
        )  # known before the cut: each shard's sum is divided by its whole task's count

        def work(
            part: tuple[str | None, Batch],
        ) -> tuple[str | None, Array, list[Array | None] | None]:
            task, shard = part
            with self._running(task), dropout_counter(seed, step, shard.first):
                loss = self.loss(self.model, shard)
            if not loss.requires_grad:  # as for rows of the base alone
                return task, loss.data.astype(np.float64), None
            found = gradients(
                loss, params, loss.backend.xp.full(loss.shape, 1 / counted[task], loss.dtype)
            )
            return task, loss.data.astype(np.float64), found

        totals: dict[str | None, Array] = dict.fromkeys(counted, 0.0)
        summed: list[Array | None] = [None] * len(params)
        trained = False
        try:
            for task, part in parts:
                with self._running(task):
                    self._prepare(part.ids.size)
            for task, loss, found in self._workers.map(work, self._cut(batch.ids.shape, parts)):
                totals[task] = totals[task] + loss
                trained |= found is not None
                for i, g in enumerate(found or ()):
                    if summed[i] is None:
                        summed[i] = g
                    elif g is not None:
                        summed[i] += g
        finally:
            self.model.end_step()
        if not trained and parts:
            raise ConfigError(
                "no parameter of the model requires a gradient: there is nothing to train"
            )
        return sum(total / counted[task] for task, total in totals.items()), summed

    def _counted(self, parts: list[tuple[str | None, Batch]]) -> dict[str | None, float]:
        """What each task's sum of losses is divided by, so that together they are the batch's mean."""
        counts = {task: part.tokens for task, part in parts}
        if self.balance == "tokens":
            return dict.fromkeys(counts, max(sum(counts.values()), 1))
        given = self.balance if isinstance(self.balance, Mapping) else {}
        weights = {task: given.get(task or "", 1.0) for task, count in counts.items() if count}
        total = sum(weights.values())
        return {
            task: count * (total / weights[task]) if count else 1 for task, count in counts.items()
        }

    def _running(self, task: str | None) -> contextlib.AbstractContextManager[None]:
        """Inside, the model runs the adapters of this task."""
        if task is None:
            return contextlib.nullcontext()
        if not hasattr(self.model, "task"):
            raise ConfigError(
                f"the batch has sequences of task {task!r:.99}, but the model has no tasks"
            )
        return self.model.task(task)  # type: ignore[no-any-return]

    def losses(self, batches: Iterable[Batch]) -> Iterator[tuple[float, int]]:
        """(summed loss, counted targets) of each shard of the batches, without gradients."""

        def work(part: tuple[str | None, Batch]) -> tuple[float, int]:
            task, shard = part
            with no_grad(), self._running(task):
                return self.loss(self.model, shard).item(), shard.tokens

        def shards() -> Iterator[tuple[str | None, Batch]]:
            prepared = set()
            for batch in batches:
                parts = batch.by_task()
                for task in [task for task, _ in parts if task not in prepared]:
                    prepared.add(task)
                    with self._running(task):
                        self._prepare(None)
                yield from self._cut(batch.ids.shape, parts)

        try:
            yield from self._workers.map(work, shards())
        finally:
            self.model.end_step()

    def _prepare(self, tokens: int | None) -> None:
        jobs = list(self.model.preparations(tokens))

        def work(first: int) -> None:
            for job in jobs[first :: self.threads]:
                job()

        for _ in self._workers.map(work, range(self.threads)):
            pass

    def _cut(
        self, shape: tuple[int, ...], parts: list[tuple[str | None, Batch]]
    ) -> Iterator[tuple[str | None, Batch]]:
        size = self.shard or shard_size(self.model, *shape)
        return (
            (task, part.shard(i, i + size))
            for task, part in parts
            for i in range(0, len(part), size)
        )
