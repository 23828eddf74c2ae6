"""One run and its progress: what it trains, its next step, its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array
from ..data.batches import Batch, Ids, PackedRecords, TaskBatch, TaskWindows, Windows
from ..errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
)
from ..formats import load_file, save_file
from ..formats.disk import JsonObject
from ..lora import AdaLoraConfig, MultiTask, PeftModel, RankAllocator
from ..lora.model import adapter_folder
from ..lora.optimizers import make_optimizer
from ..nn import LinearBase, Parameter
from ..optim import clip_by_global_norm, warmup_cosine
from ..precision import FLOAT32
from ..quant.half import iterate_pieces
from .best import Best
from .checkpoints import checkpoint_place, find_checkpoint, save_checkpoint
from .graphed import Divisors, GraphedStep, Step
from .nonfinite import explain_non_finite
from .parallel import ShardedStep, part_size, shard_size
from .ranks import Alone, Ranks
from .resuming import finite_loss, read_also, require_same_run
from .settings import Settings
from .sums import FORM

PACKING = "records do not see each other"  # how packed records are trained on

NamedParameters = list[tuple[str, Parameter]]

# The ids (N,) of a text, or packed records; or one of them per task, by the task's name.
Text = Ids | PackedRecords | Mapping[str, Ids | PackedRecords]


def by_task(text: Text) -> Mapping[str, Ids | PackedRecords]:
    """The texts by task; one without tasks under the empty name."""
    return text if isinstance(text, Mapping) else {"": text}


class Run:
    """One run and its progress: a model, its optimiser, its text, and what was measured so far.

    ranks     the processes that take its steps together; rank 0 writes its checkpoints
    held_out  the text to evaluate on, which matters only where settings.keep is "best"
    """

    def __init__(
        self,
        model: Any,
        tokens: Text,
        settings: Settings,
        out: str | Path,
        origin: str | None = None,
        ranks: Ranks | None = None,
        held_out: Text | None = None,
    ):
        sizes = settings.sequences, settings.context
        shard = settings.shard or shard_size(model, *sizes)
        part = settings.part or part_size(model, *sizes, shard)
        settings = dataclasses.replace(settings, shard=shard, part=part)
        self.model = model
        self.settings = settings
        self.out = Path(out)
        self.ranks = ranks or Alone()
        drawn = settings.context, settings.sequences, settings.seed
        self.windows: Windows | TaskWindows
        if isinstance(tokens, Mapping):
            self.windows = TaskWindows(tokens, *drawn)
        else:
            self.windows = Windows(tokens, *drawn)
        self.optimizer = make_optimizer(
            model,
            settings.optimizer,
            settings.lr,
            settings.weight_decay,
            loraplus_lr_ratio=settings.loraplus_lr_ratio,
            loraplus_lr_embedding=settings.loraplus_lr_embedding,
            reg=settings.riemannian_reg,
        )
        trained = [(member.name, member.parameter) for member in self.optimizer.members]
        saved = {id(p) for p in _saved_parameters(model)}
        for name, p in trained:
            if id(p) not in saved:
                raise ConfigError(
                    f"{name} would train, but belongs to no active adapter: nothing would save it"
                )
        _require_frozen_where_rounded(model)
        self.allocator = _allocator(model, settings, trained)
        self.allocated: list[int] = []  # the allocator's parameters, by their place in `trained`
        if self.allocator is not None:
            places = {id(p): i for i, (_, p) in enumerate(trained)}
            self.allocated = [places[id(p)] for p in self.allocator.params]
        self.identity = _identity(model, settings, tokens, trained)
        self.identity["starting weights"] = origin
        if settings.keep == "best":
            self.identity |= _identity_of_best(settings, held_out)
        self.done = 0  # steps
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.best: Best | None = None  # only if settings.keep is "best"
        self.also: list[tuple[int, float]] = []  # evaluations of a second text
        self.also_text: dict[str, str] | None = None  # its checksums
        self.checkpoint: tuple[int, Path] | None = None  # the latest, by its step
        self.graphs: GraphedStep | None = None

    def batch(self, number: int) -> Batch:
        """The batch of step `number`. A model without tasks reads several texts as one."""
        batch = self.windows.batch(number)
        if isinstance(self.model, MultiTask):
            return batch
        return dataclasses.replace(batch, tasks=None)

    def step(self, sharded: ShardedStep) -> JsonObject:
        """Take the next step and return its line of the log.

        NonFiniteError leaves everything as it was before the step.
        """
        settings = self.settings
        number = self.done
        batch = self.batch(number)
        begun = time.perf_counter()
        scale = warmup_cosine(number, settings.steps, settings.warmup, settings.floor)
        measured, complete = self._take(sharded, batch, scale)
        loss, norm, *rest = measured
        line: JsonObject = {
            "step": number,
            "loss": loss,
            "lr": settings.lr * scale,
            "grad_norm": norm,
            "tokens": batch.tokens,
        }
        if rest:
            line["penalty"] = rest[0]
        if not math.isfinite(loss + norm):
            raise NonFiniteError(
                f"step {number}: loss {loss}, gradient norm {norm}; the weights are unchanged; "
                f"batch {number} with seed {settings.seed} (text order and dropout) reproduces it",
                line,
            )
        before = self.allocator.ranks if self.allocator and number else None
        complete()
        if self.allocator is not None and self.allocator.ranks != before:
            line["ranks"] = self.allocator.ranks
        line["seconds"] = round(time.perf_counter() - begun, 6)
        self.losses.append(loss)
        self.done += 1
        return line

    def _take(
        self, sharded: ShardedStep, batch: Batch, scale: float
    ) -> tuple[list[float], Callable[[], None]]:
        """(what the next step measures, the function that completes it if that is finite)

        A step waits for a GPU only here: all numbers come in one transfer.
        """
        task_batches = batch.by_task()
        divisors = sharded.divisors(task_batches)
        graphs = self._graphs(sharded)
        if graphs is not None:
            measured = graphs.take(task_batches, divisors, self.done, scale)
            if measured is not None:
                return measured, graphs.count
        scalars, grads = self._compute(sharded, task_batches, divisors, self.done)

        def complete() -> None:
            self.optimizer.step(grads, scale)
            if self.allocator is not None:
                self.allocator.step([grads[i] for i in self.allocated])

        return self.optimizer.params[0].backend.read(scalars), complete

    def _compute(
        self, sharded: ShardedStep, task_batches: Sequence[TaskBatch], divisors: Divisors, step: Any
    ) -> tuple[list[Array], list[Array | None]]:
        """(loss, norm and any penalty, float64 scalars on the device; the clipped gradients)"""
        params = self.optimizer.params
        seed = self.settings.seed
        mean, grads = sharded.gradients_by_task(task_batches, divisors, params, seed, step)
        penalties = []
        if self.allocator is not None:
            # The penalty depends on the weights alone: it is added once, whatever the shards are.
            penalty, penalty_grads = self.allocator.penalty()
            penalties.append(penalty)
            for i, grad in zip(self.allocated, penalty_grads, strict=True):
                grads[i] = _add(grads[i], grad)
        grads, length = clip_by_global_norm(grads, self.settings.max_grad_norm)
        return [mean, length, *penalties], grads

    def _graphs(self, sharded: ShardedStep) -> GraphedStep | None:
        """What takes steps as graphs: on a GPU only, by one rank, if the settings allow it."""
        backend = self.optimizer.params[0].backend
        is_wanted = self.settings.graph and backend.name != "cpu" and self.ranks.size == 1
        if self.graphs is None and is_wanted:
            compute = functools.partial(self._compute, sharded)
            step = Step(compute, self.optimizer, self.allocator, self.allocated)
            self.graphs = GraphedStep(step, backend, self.model.config.vocab_size)
        return self.graphs

    def explain(self) -> str:
        """Why the next step is not finite, in one sentence: the step runs again in anomaly mode."""
        settings = self.settings
        batch = self.batch(self.done)
        numbers = settings.seed, self.done
        return explain_non_finite(
            self.model, batch, *numbers, shard=settings.shard, part=settings.part
        )

    def saved_bytes(self) -> int:
        """The bytes that saving needs: the weights, and with checkpoints their two moments."""
        size = sum(p.size * p.dtype.itemsize for p in _saved_parameters(self.model))
        if not self.settings.save_every:
            return int(size)
        ranks = 2 * self.allocator.sensitivity.nbytes if self.allocator else 0
        copies = 4 if self.settings.keep == "best" else 3
        return int(size) * copies + int(ranks)

    def add_evaluation(self, loss: float) -> None:
        """Note the held-out loss of the weights as they are; copy them if they are the best."""
        self.evaluations.append((self.done, loss))
        if self.settings.keep != "best":
            return
        if self.allocator is not None and self.allocator.steps < self.allocator.final_step:
            return  # with more ranks than the result may have
        if self.best is None or loss < self.best.loss:
            parameters = _parameters_by_key(self.model)
            self.best = Best.of(self.done, loss, parameters, self.allocator)

    def take_best(self) -> None:
        """Give the model the best weights, in place of those of the last step."""
        if self.best is not None and self.best.step != self.done:
            self.best.restore(_parameters_by_key(self.model), self.allocator)

    def save(self) -> Path:
        """Write a checkpoint, once per step and by rank 0, and return its folder.

        It has the model's files in the ecosystem's formats, and the optimiser's state beside them.
        """
        if self.checkpoint and self.checkpoint[0] == self.done:
            return self.checkpoint[1]
        if self.ranks.rank:
            return checkpoint_place(self.out, self.done)
        arrays, numbers = self.optimizer.state_dict()
        files = {"optimizer.safetensors": arrays}
        state = {"run": self.identity, "losses": self.losses, "evaluations": self.evaluations}
        state["optimizer"] = numbers
        if self.allocator is not None:
            arrays, state["allocator"] = self.allocator.state_dict()
            files["allocator.safetensors"] = arrays
        if self.best is not None:
            files |= self.best.files
            state["best"] = self.best.state
        if self.also_text is not None:
            state["also"] = {"text": self.also_text, "losses": self.also}
        state["numpy"] = np.__version__

        def write(folder: Path) -> None:
            # With A and B as they are, and what they began with, to go on from.
            form = {"as_trained": True} if isinstance(self.model, PeftModel) else {}
            self.model.save_pretrained(folder, **form)
            for name, arrays in files.items():
                save_file(folder / name, arrays)

        folder = save_checkpoint(self.out, self.done, state, write)
        self.checkpoint = self.done, folder
        return folder

    def weights_checksum(self) -> str:
        """A checksum of the parameters that train."""
        return weights_checksum(self.optimizer.params)

    def restore(self, resume: str | Path, changed: Collection[str] = ()) -> None:
        """Continue from a checkpoint, "auto" for the newest one; `changed` fields may be others.

        CheckpointError, with nothing changed, for a checkpoint that does not fit.
        """
        folder, manifest = find_checkpoint(resume, self.out)
        done = manifest["step"]
        state = manifest["state"]
        try:
            require_same_run(str(folder), dict(state["run"]), self.identity, done, changed)
            numbers = dict(state["optimizer"])
            allocator_numbers = dict(state["allocator"]) if self.allocator else {}
            losses = [finite_loss(loss) for loss in state["losses"]]
            evaluations = [(int(step), finite_loss(loss)) for step, loss in state["evaluations"]]
            also = read_also(state.get("also"), self.also_text)
            best = None
            if state.get("best") is not None:
                parameters = _parameters_by_key(self.model)
                has_ranks = self.allocator is not None
                best = Best.read(folder, state["best"], parameters, has_ranks)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{str(folder)!r} is damaged: its state cannot be read ({error!r:.99})"
            ) from None
        version = state.get("numpy")
        if version != np.__version__:
            warnings.warn(
                f"{str(folder)!r} was written with NumPy {version!r:.40}, this is "
                f"{np.__version__}: the last bits may differ from an uninterrupted run's",
                stacklevel=3,
            )
        if len(losses) != done:
            raise CheckpointError(
                f"{str(folder)!r} is damaged: it has {len(losses)} losses after {done} steps"
            )
        stored = []
        for name, parameters in _parameters_by_file(self.model).items():
            arrays = load_file(folder / name)
            if arrays.keys() != parameters.keys():
                raise CheckpointError(f"{str(folder)!r} has other parameters than the model")
            stored.append((arrays, parameters))
        ranks = load_file(folder / "allocator.safetensors") if self.allocator else {}
        moments = load_file(folder / "optimizer.safetensors")
        try:
            self.optimizer.load_state_dict(moments, numbers)
            if self.allocator:
                self.allocator.load_state_dict(ranks, allocator_numbers)
        except CheckpointError as error:
            raise CheckpointError(f"{str(folder)!r:.200} is damaged: {error}") from None
        for arrays, parameters in stored:
            for key, parameter in parameters.items():
                parameter.data = parameter.backend.from_numpy(arrays[key])
        self.done = done
        self.losses = losses
        self.evaluations = evaluations
        self.also = also
        self.best = best
        self.checkpoint = done, folder


def _linear_layers(model: Any) -> Iterator[tuple[str, LinearBase]]:
    for path, module in model.named_modules():
        if isinstance(module, LinearBase):
            yield path, module


def _require_frozen_where_rounded(model: Any) -> None:
    """ConfigError for a weight that would train in a layer whose products are rounded."""
    for path, layer in _linear_layers(model):
        if layer.trainable and layer.compute != FLOAT32:
            raise ConfigError(
                f"{path}.weight would train, but compute={layer.compute!r} is for frozen weights: "
                "add an adapter, or train in float32 after model.set_compute('float32')"
            )


def _add(grad: Array | None, other: Array | None) -> Array | None:
    """The sum of two gradients; None stands for a parameter that takes no part."""
    if grad is None:
        return other
    return grad if other is None else grad + other


# ---- what makes two runs the same, and what a checkpoint has ------------------------------------


def _identity(model: Any, settings: Settings, tokens: Text, trained: NamedParameters) -> JsonObject:
    """What makes two runs the same: settings, text, trained parameters and all they depend on."""
    identity = dataclasses.asdict(model.config)
    if isinstance(model, PeftModel):
        # lora_alpha or the dropout change a run, and no shape shows them.
        for name in model.active_adapters:
            prefix = "" if name == "default" else f"{name}."
            for key, value in dataclasses.asdict(model.peft_config[name]).items():
                identity[prefix + key] = value
    if isinstance(model, MultiTask):
        identity["tasks"] = {task: list(names) for task, names in model.tasks.items()}
    for key in list(identity):
        if key.endswith(("extra", "base_model_name_or_path")):
            del identity[key]
    for key, value in dataclasses.asdict(settings).items():
        if key not in Settings.FREE:
            identity[key] = value
    checksums = text_checksums(tokens)
    identity["sum"] = FORM
    identity["text"] = list(checksums.items()) if isinstance(tokens, Mapping) else checksums[""]
    if any(isinstance(text, PackedRecords) for text in by_task(tokens).values()):
        identity["packing"] = PACKING
    identity["compute"] = ", ".join(sorted({layer.compute for _, layer in _linear_layers(model)}))
    parameters = [(name, p.shape, str(p.dtype)) for name, p in trained]
    identity["parameters"] = hashlib.sha256(repr(parameters).encode()).hexdigest()
    frozen = [p for _, p in model.named_parameters() if not p.requires_grad]
    identity["frozen weights"] = weights_checksum(frozen)
    # A checkpoint gives it back from JSON, where a tuple is a list.
    return dict(json.loads(json.dumps(identity)))


def _identity_of_best(settings: Settings, held_out: Text | None) -> JsonObject:
    """What else the best weights depend on. ConfigError if nothing is held out."""
    if held_out is None:
        raise ConfigError(
            "keep = 'best' chooses the weights by their loss on held-out text, and no text is held "
            "out: give one (held_out), or keep = 'last'"
        )
    return {"eval_every": settings.eval_every, "held-out text": text_checksums(held_out)}


def text_checksums(text: Text) -> dict[str, str]:
    """A checksum of each task's text; of one without tasks under the empty name."""
    return {task: _checksum(ids) for task, ids in by_task(text).items()}


def weights_checksum(parameters: Iterable[Parameter]) -> str:
    """SHA-256 of the values of parameters."""
    digest = hashlib.sha256()
    for p in parameters:
        for piece in iterate_pieces(p):
            digest.update(np.ascontiguousarray(p.backend.to_numpy(piece)).data.cast("B"))
    return digest.hexdigest()


def _checksum(text: Ids | PackedRecords) -> str:
    """SHA-256 of the ids; for packed records, of what counts, the windows and the records too."""
    digest = hashlib.sha256()
    arrays: list[np.ndarray]
    if isinstance(text, PackedRecords):
        arrays = [text.ids, text.counts, text.edges, text.starts]
    else:
        arrays = [text]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _allocator(model: Any, settings: Settings, trained: NamedParameters) -> RankAllocator | None:
    """What cuts the ranks of the adapter that trains; None unless that adapter is AdaLoRA's.

    ConfigError for two such adapters, or for a schedule of another length.
    """
    if not isinstance(model, PeftModel):
        return None
    trained_ids = {id(p) for _, p in trained}
    allocators = {}
    for name in model.active_adapters:
        if isinstance(model.peft_config[name], AdaLoraConfig):
            allocator = RankAllocator.of(model, name)
            if any(id(p) in trained_ids for p in allocator.params):
                allocators[name] = allocator
    if not allocators:
        return None
    if len(allocators) > 1:
        raise ConfigError(
            f"adapters {', '.join(allocators)} cannot share a rank budget: "
            "train one AdaLoRA adapter at a time"
        )
    [(name, allocator)] = allocators.items()
    total = allocator.config.total_step
    if total != settings.steps:
        raise ConfigError(
            f"adapter {name!r} plans its ranks for total_step = {total}, "
            f"but the run has steps = {settings.steps}: set both to the same number"
        )
    return allocator


def _parameters_by_file(model: Any) -> dict[str, dict[str, Parameter]]:
    """The trainable parameters that a checkpoint has, by file and by key."""
    if not isinstance(model, PeftModel):
        return {"model.safetensors": dict(model.named_parameters())}
    files = {}
    for name in model.active_adapters:
        folder = "" if name == "default" else f"{adapter_folder('', name)}/"
        files[f"{folder}adapter_model.safetensors"] = model.adapter_parameters(name)
    return files


def _parameters_by_key(model: Any) -> dict[str, Parameter]:
    """The same parameters in one table: `file/key` -> parameter."""
    files = _parameters_by_file(model)
    return {f"{name}/{key}": p for name, file in files.items() for key, p in file.items()}


def _saved_parameters(model: Any) -> list[Parameter]:
    return [p for file in _parameters_by_file(model).values() for p in file.values()]
