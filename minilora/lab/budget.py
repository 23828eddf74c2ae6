"""What a run would take, before its first step: bytes by kind, the peak, operations and seconds.

What a shard keeps for backward, and the most that it needs while it runs, is measured: one shard
of the run's model, batch and arithmetic runs forward and backward under tracemalloc, and no weight
changes. Where sequences are long, it runs at three short lengths: T positions take a + b T + c T^2
bytes. The rest follows from shapes.

A run has three phases, whose peaks differ:

    loading   all that it takes to read the model and the text
    shards    forward and backward of some shards at a time, and sums of gradients
    update    clipped gradients, and the optimiser's intermediates
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Tensor, gradients
from ..data.batches import Batch, PackedRecords, TaskBatch
from ..lora.layer import LoraLinear
from ..lora.targets.plan import wrappers
from ..nn import Parameter
from ..optim import SMALL
from ..threads import one_blas_thread
from ..training.parallel import ShardedStep, language_modelling_loss
from ..training.parts import Shared, part_edges
from ..training.run import Run
from ..training.sums import Partial

LENGTHS = (128, 256, 512)  # positions of the shards that are measured, where sequences are longer
FLOAT = 4  # bytes
THREAD = 4 << 20  # bytes of a thread that computes: measured, OpenBLAS's buffers above all
LOADING, SHARDS, UPDATE = "loading", "shards", "update"
MIB = 1 << 20


# ---- of this process -----------------------------------------------------------------------------


class Resident(NamedTuple):
    """Bytes of memory that this process has: now, and at its peak until now."""

    now: int
    peak: int


def read_resident() -> Resident:
    """The memory of this process, from Linux's /proc; elsewhere the peak stands for both."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        sizes = [int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")]
        return Resident(*sizes)
    except (OSError, KeyError):
        import resource  # Windows lacks it

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Resident(peak, peak)


@contextlib.contextmanager
def _traced() -> Iterator[Callable[[], tuple[int, int]]]:
    """Inside, the function gives (bytes now, bytes at the peak) beyond those at the beginning."""
    is_outer = not tracemalloc.is_tracing()
    if is_outer:
        tracemalloc.start()
    begin, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()

    def read() -> tuple[int, int]:
        now, peak = tracemalloc.get_traced_memory()
        return now - begin, peak - begin

    try:
        yield read
    finally:
        if is_outer:
            tracemalloc.stop()


# ---- one shard -----------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A shard that has run forward and backward, with sequences of `length` positions.

    kept      bytes that the forward has made and that are held until backward
    peak      bytes at the peak, those included
    seconds   by one thread
    """

    length: int
    kept: float
    peak: float
    seconds: float


def probe_shard(
    model: Any, params: Sequence[Parameter], batch: Batch, edges: Sequence[int]
) -> Probe:
    """Run a shard as a step does, with the adapters that are active. No parameter changes.

    edges   where its sequences are cut: see training/parts.py
    """
    begun = time.perf_counter()
    _backward(_forward(model, batch, edges), params)  # it also fills tables, such as rotary ones
    seconds = time.perf_counter() - begun
    with _traced() as traced:
        losses = _forward(model, batch, edges)
        kept, _ = traced()
        _backward(losses, params)
        _, peak = traced()
    return Probe(edges[-1], kept, peak, seconds)


def _forward(model: Any, batch: Batch, edges: Sequence[int]) -> list[Tensor]:
    """The losses of all parts of a shard."""
    if len(edges) == 2:
        return [language_modelling_loss(model, batch)]
    losses = []
    for part in Shared(model, len(batch), edges).parts():
        positions = batch.positions(part.length, part.stop)
        losses.append(language_modelling_loss(model, positions, part))
    return losses


def _backward(losses: list[Tensor], params: Sequence[Parameter]) -> None:
    """Add up the gradients of all parts, the last part's first."""
    total: Partial | None = None
    while losses:
        loss = losses.pop()
        if loss.requires_grad:
            upstream = loss.backend.xp.ones(loss.shape, loss.dtype)
            partial = Partial({}, gradients(loss, params, upstream), trained=True)
            total = partial if total is None else total.add(partial)


def extrapolate(lengths: Sequence[int], values: Sequence[float], length: int) -> float:
    """a + b T + c T^2 at T = `length`, through values at three lengths.

    A value that was measured at `length` is returned as it is.
    """
    if length in lengths:
        return float(values[list(lengths).index(length)])
    scaled = np.asarray(lengths) / length  # so that the value is a sum of the terms
    terms = np.vander(scaled, len(lengths), increasing=True)
    return float(np.linalg.solve(terms, np.asarray(values, np.float64)).sum())


@contextlib.contextmanager
def _scaled_attention(backend: Any, ratio: float) -> Iterator[None]:
    """Let attention cut a shorter sequence into as many blocks as it would cut the whole one into.

    ratio   of the lengths. Scores are kept in both or in neither: their number grows with the
            square of a length
    """
    whole = backend.sizes
    queries = max(1, round(whole.queries * ratio))
    kept_scores = int(whole.kept_scores * ratio**2)
    backend.sizes = whole._replace(queries=queries, kept_scores=kept_scores)
    try:
        yield
    finally:
        backend.sizes = whole


class Work(NamedTuple):
    """The shards of one step, and its largest one at one length or several.

    threads     that the step uses
    together    how many shards' activations exist at the same time: see `count_together`
    sequences   of the largest shard, of `length` positions
    effective   bytes of the weights that all shards share
    """

    shards: int
    threads: int
    together: float
    sequences: int
    length: int
    probes: list[Probe]
    effective: int

    def at_length(self, field: str) -> float:
        """A number of the probes at the length of the run."""
        lengths = [probe.length for probe in self.probes]
        return extrapolate(lengths, [getattr(probe, field) for probe in self.probes], self.length)


def measure_work(run: Run) -> Work:
    """Form the effective weights of a step as `ShardedStep` does, and run its largest shard."""
    settings, model = run.settings, run.model
    batch = run.batch(0)
    sharded = ShardedStep(model, settings.threads, settings.shard, part=settings.part)
    task_batches = batch.by_task()
    size = settings.shard or len(batch)
    task, largest = max(task_batches, key=lambda pair: min(len(pair[1]), size))
    shard = largest.shard(0, size)
    if shard.first_key is not None:
        shard = shard.trim()
    length = shard.ids.shape[1]
    edges = part_edges(model.config, length, settings.part or length)
    shards = sharded.count_shards(batch)
    params = run.optimizer.params
    probes = []
    try:
        effective = _prepare(model, task_batches)
        for shorter in [length] if length <= LENGTHS[-1] else LENGTHS:
            ratio = shorter / length
            cut = [round(edge * ratio) for edge in edges]
            attention = _scaled_attention(params[0].backend, ratio)
            with one_blas_thread(), _running(model, task), attention:
                probes.append(probe_shard(model, params, shard.positions(0, shorter), cut))
    finally:
        model.end_step()
    parts = len(edges) - 1
    threads = min(sharded.threads, shards * parts)
    together = count_together(shards, parts, threads)
    return Work(shards, threads, together, len(shard), length, probes, effective)


def count_together(shards: int, parts: int, threads: int) -> float:
    """How many shards' activations exist at the same time: see `training.parts.schedule`.

    Whole shards run one in each thread. Of shards in parts as many run as have parts for all
    threads, and the first part of the next one begins while the last backward ends.
    """
    if parts == 1:
        return min(threads, shards)
    groups = max(1, threads // parts)
    next_part = 1 / parts if threads > 1 and shards > groups else 0
    return min(groups, shards) + next_part


def _prepare(model: Any, task_batches: Sequence[TaskBatch]) -> int:
    """Form what all shards share; returns its bytes."""
    with _traced() as traced:
        for task, batch in task_batches:
            with _running(model, task):
                model.prepare_step(batch.ids.size)
        size, _ = traced()
    return size


def _running(model: Any, task: str | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if task is None else model.task(task)


# ---- bytes ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes by kind, in each phase of a run."""

    phases: dict[str, dict[str, int]]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.largest)

    def rows(self) -> list[dict[str, str]]:
        """For a table: a row per kind, in MiB."""
        kinds = dict.fromkeys(kind for phase in self.phases.values() for kind in phase)
        rows = []
        for kind in kinds:
            sizes = [phase.get(kind, 0) for phase in self.phases.values()]
            shown = [f"{size / MIB:,.1f}" if size else "-" for size in sizes]
            rows.append({"MiB": kind} | dict(zip(self.phases, shown, strict=True)))
        totals = {phase: f"{self.total(phase) / MIB:,.1f}" for phase in self.phases}
        return [*rows, {"MiB": "all"} | totals]


def predict_memory(run: Run, work: Work, process: int, text: int, loading: int) -> Memory:
    """Bytes by kind in each phase.

    process   of the interpreter and what it has imported
    text      of the tokens
    loading   of all that reading the model and the text took beyond `process`, at its peak
    """
    settings = run.settings
    sizes = [p.size for p in run.optimizer.params]
    trained = FLOAT * sum(sizes)
    model = {"process": process, "text": text} | weight_bytes(run)
    model["moments"] = trained * len(run.optimizer.slots)
    model["best weights"] = trained if settings.keep == "best" else 0
    kept, peak = round(work.at_length("kept")), round(work.at_length("peak"))
    shards = {
        "gradients": trained * count_sums(work.shards, int(work.together)),
        "effective weights": work.effective,
        "activations": round(work.together * kept),
        "working arrays": round(work.together * max(0, peak - kept)),
        "threads": work.threads * THREAD,
    }
    update = {
        "gradients": trained,
        "working arrays": _update_bytes(sizes),
        "threads": work.threads * THREAD,
    }
    phases = {
        LOADING: {"process": process, "model and text as read": loading},
        SHARDS: model | shards,
        UPDATE: model | update,
    }
    return Memory({phase: {k: n for k, n in kinds.items() if n} for phase, kinds in phases.items()})


def count_sums(shards: int, together: int) -> int:
    """How many sums of gradients exist at most while `together` of some shards still run.

    Those of a binary tree (training/sums.py), and one more that waits to be added.
    """
    done = range(1, shards - together + 1)
    return max((shards_done.bit_count() for shards_done in done), default=-1) + 1


def weight_bytes(run: Run) -> dict[str, int]:
    """Bytes of the model's parameters: frozen ones by how they are stored, and those that train."""
    trained = {id(p) for p in run.optimizer.params}
    result: dict[str, int] = {}
    for p in run.model.parameters():
        stored = getattr(p, "quantized", None)
        if stored is not None:
            kind, size = f"weights in {stored.kind}", stored.nbytes
        else:
            kind = "trained parameters" if id(p) in trained else f"weights in {p.dtype}"
            size = p.size * p.dtype.itemsize
        result[kind] = result.get(kind, 0) + int(size)
    for _, wrapper in wrappers(run.model.get_base_model()):
        if isinstance(wrapper, LoraLinear) and wrapper.has_changed_base:
            size = sum(p.size * p.dtype.itemsize for p in wrapper.unchanged_base.parameters())
            kind = "weights before the start"
            result[kind] = result.get(kind, 0) + int(size)
    return result


def text_bytes(*texts: Any) -> int:
    """Bytes of the arrays of texts: ids, packed records, or either of them by task."""
    size = 0
    for text in texts:
        if isinstance(text, Mapping):
            size += text_bytes(*text.values())
        elif isinstance(text, PackedRecords):
            size += text_bytes(*(vars(text)[field.name] for field in dataclasses.fields(text)))
        else:
            size += int(text.nbytes)
    return size


def _update_bytes(sizes: Sequence[int]) -> int:
    """What clipping and AdamW need besides gradients: the larger of the two.

    Clipping makes a second gradient of each parameter, and two copies in float64 of one. AdamW has
    two copies of a large parameter, and four of all small ones, which are updated together.
    """
    clipping = FLOAT * sum(sizes) + 2 * 8 * max(sizes)
    small = sum(size for size in sizes if size <= SMALL)
    large = max((size for size in sizes if size > SMALL), default=0)
    return max(clipping, FLOAT * max(4 * small, 2 * large))
