"""The training loop: batch, gradients, update, log; evaluations and checkpoints at intervals.

The same loop pretrains a whole model and fine-tunes an adapter: it trains every parameter that
requires a gradient. A run depends on its settings, its text and the step number alone, never on how
it got there: stopped at any step and resumed, it ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..backend import Array
from ..data.batches import Batch, Ids, PackedRecords, TaskWindows, Windows, evaluation_windows
from ..errors import (
    CheckpointError,
    ConfigError,
    DivergenceError,
    Interrupted,
    NonFiniteError,
    check_fields,
    integer_rules,
    is_flag,
    is_plain_number,
    number_rules,
    optional_rule,
    rules_for,
)
from ..formats import load_file, save_file
from ..formats.disk import JsonObject
from ..formats.folders import locked, require_free_space
from ..lora import AdaLoraConfig, MultiTask, PeftModel, RankAllocator
from ..lora.model import adapter_folder
from ..nn import Parameter
from ..optim import AdamW, clip_by_global_norm, warmup_cosine
from ..quant.half import iterate_pieces
from .nonfinite import explain_non_finite
from .parallel import ShardedStep, shard_size
from .resuming import require_same_run
from .runs import Log, find_checkpoint, read_log, remove_stale, save_checkpoint
from .signals import stop_signals

# Sequences per step. More is a typing mistake, whose array would not fit into memory.
MAX_SEQUENCES = 2**20
PACKING = "records do not see each other"  # how packed records are trained on
PATIENCE = 50  # steps with a high loss after which a run counts as diverged


_LIMIT = 2**63
_COUNTS = ("steps", "batch_size", "context", "accumulate")
_OPTIONAL = ("shard", "threads", "eval_every", "save_every")
_RULES = [
    *integer_rules(*_COUNTS, least=1, limit=_LIMIT),
    *map(optional_rule, integer_rules(*_OPTIONAL, least=1, limit=_LIMIT)),
    *integer_rules("warmup", "seed", least=0, limit=_LIMIT),
    *number_rules("lr", "max_grad_norm", is_kind=is_plain_number, above=0),
    *number_rules("floor", "weight_decay", is_kind=is_plain_number, least=0),
    *rules_for(("abort_on_divergence", "gradient_checkpointing"), is_flag, "True or False"),
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. ConfigError names a value that is out of range.

    batch_size     sequences per step; with `accumulate`, that many times more
    context        positions per sequence (windows of context + 1 tokens)
    warmup         steps of linear warm-up to `lr`, followed by half a cosine down to `floor` x lr
    max_grad_norm  gradients are scaled down to this norm
    shard          sequences that run forward and backward together; None: chosen from the shape
    eval_every     in steps; None: at the start and at the end only
    save_every     in steps, and at the end; None: only when the run is stopped
    gradient_checkpointing  store less for backward and compute it again: see
                   `CausalLM.gradient_checkpointing_enable`
    """

    steps: int = 400
    batch_size: int = 16
    context: int = 128
    lr: float = 1e-3
    warmup: int = 20
    floor: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulate: int = 1
    seed: int = 0
    shard: int | None = None
    threads: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    abort_on_divergence: bool = False
    gradient_checkpointing: bool = False

    # These may change on resuming: they do not change the result.
    FREE = "threads", "eval_every", "save_every", "abort_on_divergence", "gradient_checkpointing"

    def __post_init__(self) -> None:
        check_fields(vars(self), _RULES)
        if self.sequences > MAX_SEQUENCES:
            raise ConfigError(
                f"batch_size x accumulate must be at most {MAX_SEQUENCES} sequences, "
                f"got {self.batch_size} x {self.accumulate}"
            )

    @property
    def sequences(self) -> int:
        """Sequences per step, accumulated ones included."""
        return self.batch_size * self.accumulate


@dataclasses.dataclass
class Result:
    """What a run measured: each step's loss, and (step, mean held-out loss) per evaluation."""

    losses: list[float]
    evaluations: list[tuple[int, float]]
    seconds: float


NamedParameters = list[tuple[str, Parameter]]

# The ids (N,) of a text, or packed records; or one of them per task, by the task's name.
Text = Ids | PackedRecords | Mapping[str, Ids | PackedRecords]


class Run:
    """One run and its progress: a model, its optimiser, its text, and what was measured so far."""

    def __init__(
        self, model: Any, tokens: Text, settings: Settings, out: Path, origin: str | None = None
    ):
        if settings.shard is None:
            shard = shard_size(model, settings.sequences, settings.context)
            settings = dataclasses.replace(settings, shard=shard)
        self.model = model
        self.settings = settings
        self.out = out
        sizes = settings.context, settings.sequences, settings.seed
        self.windows: Windows | TaskWindows
        if isinstance(tokens, Mapping):
            self.windows = TaskWindows(tokens, *sizes)
        else:
            self.windows = Windows(tokens, *sizes)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        saved = {id(p) for p in _saved_parameters(model)}
        for name, p in trained:
            if id(p) not in saved:
                raise ConfigError(
                    f"{name} would train, but belongs to no active adapter: nothing would save it"
                )
        self.allocator = _allocator(model, settings, trained)
        self.allocated: list[int] = []  # the allocator's parameters, by their place in `trained`
        if self.allocator is not None:
            places = {id(p): i for i, (_, p) in enumerate(trained)}
            self.allocated = [places[id(p)] for p in self.allocator.params]
        self.identity = _identity(model, settings, tokens, trained)
        self.identity["starting weights"] = origin
        self.done = 0  # steps
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.checkpoint: tuple[int, Path] | None = None  # the latest, by its step

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
        mean, grads = sharded.gradients(batch, self.optimizer.params, settings.seed, number)
        penalties = []
        if self.allocator is not None:
            # The penalty depends on the weights alone: it is added once, whatever the shards are.
            penalty, penalty_grads = self.allocator.penalty()
            penalties.append(penalty)
            for i, grad in zip(self.allocated, penalty_grads, strict=True):
                grads[i] = _add(grads[i], grad)
        grads, length = clip_by_global_norm(grads, settings.max_grad_norm)
        backend = self.optimizer.params[0].backend
        # A step waits for a GPU only here: all numbers in one transfer, before any weight changes.
        measured = backend.xp.stack([mean, length, *penalties])
        loss, norm, *rest = backend.to_numpy(measured).tolist()
        scale = warmup_cosine(number, settings.steps, settings.warmup, settings.floor)
        line = {
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
        self.optimizer.step(grads, scale)
        if self.allocator is not None:
            before = self.allocator.ranks if number else None
            self.allocator.step([grads[i] for i in self.allocated])
            ranks = self.allocator.ranks
            if ranks != before:
                line["ranks"] = ranks
        line["seconds"] = round(time.perf_counter() - begun, 6)
        self.losses.append(loss)
        self.done += 1
        return line

    def explain(self) -> str:
        """Why the next step is not finite, in one sentence: the step runs again in anomaly mode."""
        settings = self.settings
        batch = self.batch(self.done)
        return explain_non_finite(self.model, batch, settings.seed, self.done, shard=settings.shard)

    def saved_bytes(self) -> int:
        """The bytes that saving needs: the weights, and with checkpoints their two moments."""
        size = sum(p.size * p.dtype.itemsize for p in _saved_parameters(self.model))
        if not self.settings.save_every:
            return int(size)
        ranks = 2 * self.allocator.sensitivity.nbytes if self.allocator else 0
        return int(size) * 3 + int(ranks)

    def save(self) -> Path:
        """Write a checkpoint, once per step, and return its folder.

        It has the model's files in the ecosystem's formats, and the optimiser's state beside them.
        """
        if self.checkpoint and self.checkpoint[0] == self.done:
            return self.checkpoint[1]
        arrays, numbers = self.optimizer.state_dict()
        files = {"optimizer.safetensors": arrays}
        state = {"run": self.identity, "losses": self.losses, "evaluations": self.evaluations}
        state["optimizer"] = numbers
        if self.allocator is not None:
            arrays, state["allocator"] = self.allocator.state_dict()
            files["allocator.safetensors"] = arrays
        state["numpy"] = np.__version__

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            for name, arrays in files.items():
                save_file(folder / name, arrays)

        folder = save_checkpoint(self.out, self.done, state, write)
        self.checkpoint = self.done, folder
        return folder

    def restore(self, resume: str | Path) -> None:
        """Continue from a checkpoint, "auto" for the newest one.

        CheckpointError, with nothing changed, for a checkpoint that does not fit.
        """
        folder, manifest = find_checkpoint(resume, self.out)
        done = manifest["step"]
        state = manifest["state"]
        try:
            require_same_run(str(folder), dict(state["run"]), self.identity, done)
            numbers = dict(state["optimizer"])
            allocator_numbers = dict(state["allocator"]) if self.allocator else {}
            losses = [_finite(loss) for loss in state["losses"]]
            evaluations = [(int(step), _finite(loss)) for step, loss in state["evaluations"]]
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
        self.checkpoint = done, folder


def _finite(loss: Any) -> float:
    """A loss of a checkpoint: a run with another one could not be saved again. Or ValueError."""
    if type(loss) not in (int, float) or not math.isfinite(loss):
        raise ValueError(f"a loss of {loss!r:.40}")
    return float(loss)


def _add(grad: Array | None, other: Array | None) -> Array | None:
    """The sum of two gradients; None stands for a parameter that takes no part."""
    if grad is None:
        return other
    return grad if other is None else grad + other


def train(
    model: Any,
    tokens: Text,
    settings: Settings,
    out: Path,
    *,
    held_out: Text | None = None,
    resume: str | Path | None = None,
    bytes_per_token: float = 1.0,
    title: str = "train",
    origin: str | None = None,
) -> Result:
    """Train every parameter that requires a gradient on `tokens` (N,); returns what was measured.

    The model comes back in eval mode, with AdaLoRA's ranks cut.

    tokens    or `PackedRecords`, where the loss leaves out targets that do not count;
              or texts by task: each batch then has sequences of all tasks, which a `MultiTask`
              model runs with the adapters of their tasks
    out       the run's folder, for log.jsonl, eval.jsonl and checkpoints; locked for the run, and
              made if need be
    held_out  ids to evaluate on at step 0, every `eval_every` steps and at the end; by task: the
              mean over the tasks
    resume    "auto" or a checkpoint's folder: continue from that checkpoint
    origin    a checksum of the weights that the run begins with, if settings and seed do not say
              it all: a run with another origin is another run

    NonFiniteError for a loss or gradient that is not finite, in the step in which it happens and
    before any weight changes: the last good state is saved, and the log's last line is that step's.
    DivergenceError if `abort_on_divergence` is set. CheckpointError if a checkpoint belongs to
    another run. LockError if another run uses the folder. Interrupted on SIGINT, SIGTERM or SIGHUP,
    after the step (not the evaluation) that was running, and saved.
    """
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(out))
        run = Run(model, tokens, settings, out, origin)
        if resume is not None:
            run.restore(resume)
        require_free_space(out, run.saved_bytes())
        remove_stale(out)
        base = model.train().get_base_model()
        base.gradient_checkpointing_enable(settings.gradient_checkpointing)
        sharded = stack.enter_context(ShardedStep(model, settings.threads, run.settings.shard))
        log = stack.enter_context(Log(out / "log.jsonl", run.done))
        evaluated = run.evaluations[-1][0] if run.evaluations else -1
        evaluation_log = stack.enter_context(Log(out / "eval.jsonl", evaluated + 1))
        stopped = stack.enter_context(stop_signals())
        steps = settings.steps
        # None: only on a terminal. A program without a console has no stderr at all.
        disable = True if sys.stderr is None else None
        bar = tqdm(total=steps, initial=run.done, desc=title, disable=disable, dynamic_ncols=True)
        stack.enter_context(bar)

        def measure(text: Text) -> None:
            losses = {}
            for task, ids in _by_task(text).items():
                with contextlib.ExitStack() as adapters:
                    if task and isinstance(model, MultiTask):
                        adapters.enter_context(model.task(task))
                    losses[task] = evaluate(
                        model, ids, settings.context, sharded=sharded, stopped=stopped
                    )
            if stopped:
                return  # the losses may cover a part of the text: a resumed run measures again
            loss = math.fsum(losses.values()) / len(losses)
            bits = bits_per_byte(loss, bytes_per_token)
            run.evaluations.append((run.done, loss))
            record: JsonObject = {"step": run.done, "loss": loss, "bits_per_byte": bits}
            if "" not in losses:
                record["tasks"] = losses
            evaluation_log.write(**record)
            if bar.disable:  # without a terminal, one line per evaluation replaces the bar
                line = f"{title}: step {run.done} of {steps}, held out {bits:.3f} bits per byte"
                # Whoever read it may have gone (`| head -1`), which is no reason to stop.
                with contextlib.suppress(OSError, ValueError):
                    print(line, flush=True)

        def save() -> Path:
            log.sync()
            evaluation_log.sync()
            return run.save()

        warned = False
        while True:
            last = run.done == steps
            due = run.done == 0 or last or _is_due(run.done, settings.eval_every)
            measured = run.evaluations and run.evaluations[-1][0] == run.done
            if held_out is not None and due and not measured:
                measure(held_out)
            if (settings.save_every and last) or _is_due(run.done, settings.save_every):
                save()
            if stopped:
                folder = str(save())
                name = signal.Signals(stopped[0]).name
                raise Interrupted(
                    f"{name}: stopped after {run.done} steps, saved in {folder!r:.300}", stopped[0]
                )
            if last:
                break
            try:
                line = run.step(sharded)
            except NonFiniteError as error:
                log.write(**error.line)
                if run.done:
                    save()
                raise NonFiniteError(f"{error}; {run.explain()}", error.line) from None
            log.write(**line)
            bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
            bar.update()
            reason = divergence(run.losses, model.config.vocab_size, settings.warmup)
            if reason and settings.abort_on_divergence:
                saved = "no checkpoint was saved"
                if run.checkpoint:
                    saved = f"the latest checkpoint is {str(run.checkpoint[1])!r:.250}"
                raise DivergenceError(
                    f"step {line['step']}: the loss diverged but is still finite: {reason}; {saved}"
                )
            if reason and not warned:
                warned = True
                warnings.warn(
                    f"step {line['step']}: {reason}; --abort-on-divergence would stop here",
                    stacklevel=2,
                )
    if run.allocator is not None:
        run.allocator.prune()
    model.eval()
    return Result(run.losses, run.evaluations, time.perf_counter() - begun)


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done > 0 and done % every == 0


def divergence(losses: Sequence[float], vocabulary: int, warmup: int = 0) -> str | None:
    """The reason why a run counts as diverged at its last step, or None; from its losses alone.

    Either the loss after the warm-up is more than 5 above ln(vocabulary), the loss of guessing; or
    each of the last 50 losses is above three times the median of the 50 before them. A single spike
    does not count.
    """
    ceiling = math.log(vocabulary) + 5
    if len(losses) > warmup and losses[-1] > ceiling:
        return (
            f"the loss ({losses[-1]:.4g}) is above {ceiling:.4g}, "
            "which is 5 more than guessing gives"
        )
    before = losses[-2 * PATIENCE : -PATIENCE]
    if len(before) == PATIENCE:
        bound = 3 * statistics.median(before)
        if min(losses[-PATIENCE:]) > bound:
            return (
                f"for {PATIENCE} steps the loss has been above {bound:.4g}, "
                f"3 times the median of the {PATIENCE} before"
            )
    return None


def evaluate(
    model: Any,
    tokens: Ids | PackedRecords,
    context: int,
    *,
    limit: int | None = None,
    threads: int | None = None,
    sharded: ShardedStep | None = None,
    stopped: Sequence[object] = (),
) -> float:
    """The mean of -log p over every token of a text but the first, in nats.

    With a `limit` at most that many windows of the text count. For `PackedRecords` it is the mean
    over the tokens that count. As soon as `stopped` has an item the evaluation ends early and
    returns NaN. Otherwise NonFiniteError if the loss is NaN or infinite: the weights, or what they
    compute, have a NaN or an infinity.
    """
    training = model.training
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            sharded = sharded or stack.enter_context(ShardedStep(model, threads))
            windows = evaluation_windows(tokens, context, 16, limit)
            totals = list(sharded.losses(itertools.takewhile(lambda _: not stopped, windows)))
    finally:
        model.train(training)
    if stopped:
        return math.nan
    for loss, _ in totals:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss of the held-out text is {loss}: "
                "the model's weights are not finite, or too large"
            )
    return math.fsum(loss for loss, _ in totals) / sum(count for _, count in totals)


def _by_task(text: Text) -> Mapping[str, Ids | PackedRecords]:
    return text if isinstance(text, Mapping) else {"": text}


def bits_per_byte(loss: float, bytes_per_token: float = 1.0) -> float:
    """A mean loss in nats per token, converted into bits per byte of text.

    That can be compared across tokenizers, and with a compressor.
    """
    return loss / math.log(2) / bytes_per_token


def rank_history(out: Path) -> tuple[list[tuple[int, dict[str, int]]], int]:
    """([(step, ranks by layer) of each allocation], the run's steps), from AdaLoRA's log in `out`.

    The ranks are those after the step; they stay until the next entry.
    """
    lines = read_log(out / "log.jsonl")
    history = [(line["step"], line["ranks"]) for line in lines if "ranks" in line]
    return history, lines[-1]["step"] + 1


# ---- continuing a run that stopped ---------------------------------------------------------------


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
    checksums = {task: _checksum(text) for task, text in _by_task(tokens).items()}
    identity["text"] = list(checksums.items()) if isinstance(tokens, Mapping) else checksums[""]
    if any(isinstance(text, PackedRecords) for text in _by_task(tokens).values()):
        identity["packing"] = PACKING
    parameters = [(name, p.shape, str(p.dtype)) for name, p in trained]
    identity["parameters"] = hashlib.sha256(repr(parameters).encode()).hexdigest()
    frozen = hashlib.sha256()
    for _, p in model.named_parameters():
        if not p.requires_grad:
            for piece in iterate_pieces(p):
                frozen.update(np.ascontiguousarray(p.backend.to_numpy(piece)).data.cast("B"))
    identity["frozen weights"] = frozen.hexdigest()
    # A checkpoint gives it back from JSON, where a tuple is a list.
    return dict(json.loads(json.dumps(identity)))


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


def _saved_parameters(model: Any) -> list[Parameter]:
    return [p for file in _parameters_by_file(model).values() for p in file.values()]
