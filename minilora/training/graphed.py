"""Training steps on a GPU in one launch each: captured once per shape of batch, then replayed.

A step of a small model is some hundred operations, and the host needs longer to ask for them than
the GPU to do them. So forward, backward, clipping and the optimiser become one graph. Before a
launch the host copies what changes (the step's number, divisors, the optimiser's rates, ids and
targets) into memory that the graph reads; after it, the host reads loss and norm. The graph checks
itself whether they are finite: a step that is not finite changes nothing.

The operations are those of a step in the ordinary way, and so are the bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..cuda.graphs import Mailbox
from ..data.batches import Batch, TaskBatch
from ..optim import AdamW, Prepared, Update

WARM_UP = 2  # steps of a shape in the ordinary way: they compile kernels and fill tables
MOST_GRAPHS = 8  # captures in a run
RATES = 3  # numbers of an update: see `AdamW.rates`


class Divisor(NamedTuple):
    """What a task's sum of losses is divided by: float64, or scalars on the device.

    share   1 / size, the gradient of the mean loss with respect to one target's
    """

    size: Any
    share: Any

    @classmethod
    def of(cls, size: float) -> Divisor:
        return cls(size, 1 / size)


Divisors = dict[str | None, Divisor]


class Step(NamedTuple):
    """How a run computes a step.

    compute     (batches by task, divisors, number of the step) -> (what is logged, float64 scalars
                on the device, loss and norm first; the clipped gradients)
    optimizer   changes the parameters
    allocator   AdaLoRA's, or None
    allocated   its parameters, by their place among the optimiser's
    """

    compute: Callable[[Sequence[TaskBatch], Divisors, Any], tuple[list[Array], list[Array | None]]]
    optimizer: AdamW
    allocator: Any
    allocated: Sequence[int]


class GraphedStep:
    """Takes the steps of a run, as graphs where that is possible.

    vocab_size   ids and targets are checked against it on the host
    """

    def __init__(self, step: Step, backend: Any, vocab_size: int):
        self.step = step
        self.backend = backend
        self.vocab_size = vocab_size
        self.recorder = backend.recorder
        self.captures = 0
        self.replays = 0
        self.reason = step.optimizer.uncaptured
        if not self.recorder:
            self.reason = f"{backend.name} has no graphs"
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, Captured] = {}
        self._latest: Captured | None = None

    def take(
        self, task_batches: Sequence[TaskBatch], divisors: Divisors, number: int, scale: float
    ) -> list[float] | None:
        """Take a step by a graph; returns what it measured. None: take it in the ordinary way.

        `count` must follow if loss and norm are finite; otherwise nothing has changed.
        """
        allocator = self.step.allocator
        if self.reason or (allocator is not None and allocator.allocates_next):
            return None
        is_observing = allocator is not None and allocator.steps + 1 < allocator.final_step
        shapes = [(task, b.ids.shape, b.first_key is None) for task, b in task_batches]
        key = (*shapes, is_observing)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= WARM_UP:
            return None
        graph = self._graphs.get(key)
        if graph is None or not graph.fits():
            graph = self._graphs[key] = self._capture(task_batches)  # type: ignore[assignment]
            if graph is None:
                return None
        self._latest = graph
        self.replays += 1
        return graph.replay(task_batches, divisors, number, scale)

    def count(self) -> None:
        """Take the latest step as done: it was finite."""
        assert self._latest is not None
        self.step.optimizer.count(self._latest.updates)
        if self.step.allocator is not None:
            self.step.allocator.count_step()

    def explain(self) -> str:
        """How the steps so far ran, in one sentence."""
        if self.reason:
            return f"steps run one operation at a time: {self.reason}"
        return f"{self.replays} steps ran as one launch each, by {self.captures} captured graphs"

    def _capture(self, task_batches: Sequence[TaskBatch]) -> Captured | None:
        """A graph for batches of these shapes; None, with a warning, if there can be none."""
        if self.captures == MOST_GRAPHS:
            self.reason = f"batches differ in more ways than {MOST_GRAPHS} graphs can hold"
        else:
            self.captures += 1
            try:
                return Captured(self.step, self.recorder, task_batches, self.vocab_size)
            except Exception as error:  # of CuPy, the driver or the compiler; without cupy unknown
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.reason = f"a step cannot be captured as a graph ({text:.200})"
        self._graphs.clear()
        self.recorder = None
        warnings.warn(f"{self.backend.name}: {self.explain()}", stacklevel=2)
        return None


class Captured:
    """The graph of a step for batches of one shape, and the memory that it reads."""

    def __init__(
        self, step: Step, recorder: Any, task_batches: Sequence[TaskBatch], vocab_size: int
    ):
        self.step = step
        self.vocab_size = vocab_size
        tasks = [task for task, _ in task_batches]
        most_rates = RATES * len(step.optimizer.members)
        tokens = sum(array.size for array in self._arrays(task_batches))
        ends = np.cumsum([1, 2 * len(tasks), most_rates, tokens]).tolist()
        self.mailbox = Mailbox(recorder.backend, ends[-1])
        self.places = [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]
        number, divisors, rates, ids = (self.mailbox.device[place] for place in self.places)
        numbers = divisors.view(np.float64)
        by_task = {
            task: Divisor(numbers[2 * i], numbers[2 * i + 1]) for i, task in enumerate(tasks)
        }
        on_device = _cut(ids, task_batches)
        rows = rates.view(np.float64).reshape(-1, RATES)

        def work() -> tuple[Array, list[Update]]:
            scalars, grads = step.compute(on_device, by_task, number.view(np.uint64))
            check = scalars[0] + scalars[1]
            updates = step.optimizer.updates(grads)
            step.optimizer.apply(updates, Prepared(rows, check))
            if step.allocator is not None:
                step.allocator.step_on_device([grads[i] for i in step.allocated], check)
                step.allocator.settle()
            return recorder.backend.join(scalars), updates

        self.graph = recorder.capture(work)
        self.measured, self.updates = self.graph.result

    def fits(self) -> bool:
        """Whether the parameters that the graph updates together still have equal step counts."""
        return all(len({member.steps for member in u.members}) == 1 for u in self.updates)

    def replay(
        self, task_batches: Sequence[TaskBatch], divisors: Divisors, number: int, scale: float
    ) -> list[float]:
        """Take a step: two copies, one launch. Returns what it measured."""
        counter, pairs, rates, ids = (self.mailbox.host[place] for place in self.places)
        counter[0] = number
        pairs.view(np.float64)[:] = [n for divisor in divisors.values() for n in divisor]
        prepared = self.step.optimizer.prepare(self.updates, scale).reshape(-1)
        rates.view(np.float64)[: prepared.size] = prepared
        arrays = [array.reshape(-1) for array in self._arrays(task_batches)]
        np.concatenate(arrays, out=ids, casting="same_kind")
        self.mailbox.send()
        self.graph.replay()
        backend = self.step.optimizer.params[0].backend
        return backend.to_numpy(self.measured).tolist()  # type: ignore[no-any-return]

    def _arrays(self, task_batches: Sequence[TaskBatch]) -> list[Array]:
        """The arrays of all batches, in the order in which they move. DataError for a bad id."""
        return [array for _, batch in task_batches for array in batch.checked(self.vocab_size)]


class GraphedLosses:
    """Losses without gradients on a GPU, while the weights stay as they are.

    loss   the loss of a batch, an array on the device

    The third batch of a shape and those after it run as one launch each.
    """

    def __init__(self, loss: Callable[[TaskBatch], Array], backend: Any, vocab_size: int):
        self.loss = loss
        self.backend = backend
        self.vocab_size = vocab_size
        self.recorder = backend.recorder
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[Array, Any]] = {}

    def __call__(self, task_batch: TaskBatch) -> Array:
        """The loss of a batch, in an array of its own."""
        task, batch = task_batch
        key = task, batch.ids.shape, batch.first_key is None
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if self.recorder is None or seen <= WARM_UP:
            return self.loss(task_batch)
        ids = np.stack(batch.checked(self.vocab_size), dtype=np.int64, casting="same_kind")
        if key not in self._graphs:
            memory = self.backend.xp.empty(ids.size, np.int64)
            [on_device] = _cut(memory, [task_batch])
            try:
                graph = self.recorder.capture(lambda: self.loss(on_device))
            except Exception:  # as for a step; there the reason is said
                self.recorder = None
                return self.loss(task_batch)
            self._graphs[key] = memory, graph
        memory, graph = self._graphs[key]
        memory[...] = self.backend.from_numpy(ids.reshape(-1))
        graph.replay()
        return graph.result.copy()


def _cut(ids: Array, task_batches: Sequence[TaskBatch]) -> list[TaskBatch]:
    """Batches like these whose arrays are views of `ids`, a vector on the device."""
    parts: list[TaskBatch] = []
    end = 0
    for task, batch in task_batches:
        arrays = []
        for _ in range(2 + (batch.first_key is not None)):
            start, end = end, end + batch.ids.size
            arrays.append(ids[start:end].reshape(batch.ids.shape))
        parts.append((task, Batch(arrays[0], arrays[1], batch.first, batch.tasks, *arrays[2:])))
    return parts
