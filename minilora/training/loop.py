"""The loop: batch, gradients, step, log; now and then evaluate and save. It trains whatever requires a gradient.

The same loop pretrains a whole model and fine-tunes an adapter. A run depends on its settings, its text and the step
number alone, never on how it got there: stopped at any step and resumed, it ends with the same bits.
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
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..backend import Array
from ..data.batches import Batch, Ids, PackedRecords, TaskWindows, Windows, evaluation_windows
from ..errors import CheckpointError, ConfigError, DivergenceError, Interrupted, NonFiniteError
from ..formats import load_file, save_file
from ..formats.folders import locked, require_free_space
from ..lora import AdaLoraConfig, MultiTask, PeftModel, RankAllocator
from ..nn import Parameter
from ..optim import AdamW, clip_by_global_norm, warmup_cosine
from ..quant.half import iterate_pieces
from .nonfinite import explain_non_finite
from .parallel import ShardedStep, shard_size
from .runs import Log, find_checkpoint, read_log, remove_stale, save_checkpoint

MAX_SEQUENCES = (
    2**20
)  # a step: more is a mistake of typing, and would only end in an array that has no room
PATIENCE = 50  # steps of a high loss before a run is said to have diverged


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. ConfigError names a value that is out of range.

    batch_size     sequences a step; `accumulate` times as many if gradients are accumulated
    context        positions a sequence (windows of context + 1 tokens)
    warmup         steps of linear warm-up to `lr`, then half a cosine down to `floor` x lr
    max_grad_norm  gradients are scaled down to this norm
    shard          sequences that run forward and backward together; None: chosen from the shape
    eval_every    in steps; None: at the start and at the end only
    save_every    in steps, and at the end; None: only when the run is stopped
    gradient_checkpointing  keep less for backward and compute it again: see `CausalLM.gradient_checkpointing_enable`
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

    # May change on resuming: they do not change the result.
    FREE = "threads", "eval_every", "save_every", "abort_on_divergence", "gradient_checkpointing"

    def __post_init__(self) -> None:
        whole = {"steps": 1, "batch_size": 1, "context": 1, "warmup": 0, "accumulate": 1, "seed": 0}
        for name in ("shard", "threads", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                whole[name] = 1
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise ConfigError(
                    f"{name} must be an integer of at least {least}, got {value!r}"[:300]
                )
        for name in ("lr", "max_grad_norm", "floor", "weight_decay"):
            value = getattr(self, name)
            zero = name in ("floor", "weight_decay")  # may be 0
            if (
                type(value) not in (int, float)
                or not (0 <= value < math.inf)
                or (value == 0 and not zero)
            ):
                bound = "of at least" if zero else "above"
                raise ConfigError(f"{name} must be a number {bound} 0, got {value!r}"[:300])
        for name in ("abort_on_divergence", "gradient_checkpointing"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(
                    f"{name} must be True or False, got {getattr(self, name)!r}"[:300]
                )
        if self.batch_size * self.accumulate > MAX_SEQUENCES:
            got = f"{self.batch_size} x {self.accumulate}"
            raise ConfigError(
                f"batch_size x accumulate must be at most {MAX_SEQUENCES} sequences, got {got}"
            )


@dataclasses.dataclass
class Result:
    """What a run measured: the loss of every step, and (step, mean held-out loss) of every evaluation."""

    losses: list[float]
    evaluations: list[tuple[int, float]]
    seconds: float


Text = (
    Ids | PackedRecords | Mapping[str, Ids | PackedRecords]
)  # ids (N,), or records packed; or of each task, by its name


class Run:
    """One run, and how far it has come: a model, its optimiser, its text, and what was measured so far."""

    def __init__(self, model: Any, tokens: Text, settings: Settings, out: Path):
        if settings.shard is None:
            sequences = settings.batch_size * settings.accumulate
            settings = dataclasses.replace(
                settings, shard=shard_size(model, sequences, settings.context)
            )
        self.model, self.settings, self.out = model, settings, out
        cut = settings.context, settings.batch_size * settings.accumulate, settings.seed
        self.windows = (
            TaskWindows(tokens, *cut) if isinstance(tokens, Mapping) else Windows(tokens, *cut)
        )
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        covered = {id(p) for _, parameters in _files(model) for p in parameters.values()}
        lost = [name for name, p in trained if id(p) not in covered]
        if lost:
            raise ConfigError(
                f"{lost[0]} would train, but belongs to no active adapter: nothing would save it"
            )
        self.allocator = _allocator(model, settings, trained)
        place = {id(p): i for i, (_, p) in enumerate(trained)}
        self.allocated = [place[id(p)] for p in self.allocator.params] if self.allocator else []
        self.identity = _identity(model, settings, tokens, trained)
        self.done = 0  # steps
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.checkpoint: tuple[int, Path] | None = None  # the latest, by its step

    def batch(self, number: int) -> Batch:
        """Of step `number`. To a model without tasks the texts of several are one text."""
        batch = self.windows.batch(number)
        return (
            batch if isinstance(self.model, MultiTask) else dataclasses.replace(batch, tasks=None)
        )

    def step(self, sharded: ShardedStep) -> dict[str, Any]:
        """Take the next step; returns its line of the log. NonFiniteError leaves everything as it was before it."""
        s, number = self.settings, self.done
        batch = self.batch(number)
        tick = time.perf_counter()
        mean, grads = sharded.gradients(batch, self.optimizer.params, s.seed, number)
        penalty: list[Array] = []
        if (
            self.allocator is not None
        ):  # a term of the weights alone: added once, however the batch was cut
            value, more = self.allocator.penalty()
            penalty.append(value)
            for i, g in zip(self.allocated, more, strict=True):
                grads[i] = g if grads[i] is None else grads[i] if g is None else grads[i] + g
        grads, length = clip_by_global_norm(grads, s.max_grad_norm)
        backend = self.optimizer.params[0].backend
        # The one place where a step waits for a GPU: all numbers in one transfer, before any weight changes.
        loss, norm, *penalties = backend.to_numpy(
            backend.xp.stack([mean, length, *penalty])
        ).tolist()
        scale = warmup_cosine(number, s.steps, s.warmup, s.floor)
        line = {
            "step": number,
            "loss": loss,
            "lr": s.lr * scale,
            "grad_norm": norm,
            "tokens": batch.tokens,
        }
        line |= {"penalty": penalties[0]} if penalties else {}
        if not math.isfinite(loss + norm):
            again = f"batch {number} with seed {s.seed}, for the order of the text and for dropout, gives it again"
            raise NonFiniteError(
                f"step {number}: loss {loss}, gradient norm {norm}: the weights are as before it; {again}",
                line,
            )
        self.optimizer.step(grads, scale)
        if self.allocator is not None:
            before = self.allocator.ranks if number else None
            self.allocator.step([grads[i] for i in self.allocated])
            ranks = self.allocator.ranks
            line |= {"ranks": ranks} if ranks != before else {}
        seconds = round(time.perf_counter() - tick, 6)
        self.losses.append(loss)
        self.done += 1
        return {**line, "seconds": seconds}

    def explain(self) -> str:
        """Why the next step is not finite, in a sentence: it is taken once more, in anomaly mode."""
        s, batch = self.settings, self.batch(self.done)
        return explain_non_finite(self.model, batch, s.seed, self.done, shard=s.shard)

    def room(self) -> int:
        """The bytes that saving takes at least: the weights, and with checkpoints two moments of each."""
        size = sum(
            p.size * p.dtype.itemsize
            for _, parameters in _files(self.model)
            for p in parameters.values()
        )
        ranks = 2 * self.allocator.sensitivity.nbytes if self.allocator else 0
        return int(size) * 3 + int(ranks) if self.settings.save_every else int(size)

    def save(self) -> Path:
        """A checkpoint: the ecosystem's files of the model, and the optimiser's state beside them. Once a step."""
        if self.checkpoint and self.checkpoint[0] == self.done:
            return self.checkpoint[1]
        owners = {"optimizer": self.optimizer} | (
            {"allocator": self.allocator} if self.allocator else {}
        )
        states = {name: owner.state_dict() for name, owner in owners.items()}

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            for name, (arrays, _) in states.items():
                save_file(folder / f"{name}.safetensors", arrays)

        state = {"run": self.identity, "losses": self.losses, "evaluations": self.evaluations}
        state |= {name: numbers for name, (_, numbers) in states.items()}
        state["numpy"] = np.__version__
        folder = save_checkpoint(self.out, self.done, state, write)
        self.checkpoint = self.done, folder
        return folder

    def restore(self, resume: str | Path) -> None:
        """Go on from a checkpoint, "auto" for the newest. CheckpointError, with nothing changed, if it does not fit."""
        folder, manifest = find_checkpoint(resume, self.out)
        done, state = manifest["step"], manifest["state"]
        try:
            before, numbers = dict(state["run"]), dict(state["optimizer"])
            steps = dict(state["allocator"]) if self.allocator else {}
            losses = [float(loss) for loss in state["losses"]]
            evaluations = [(int(at), float(loss)) for at, loss in state["evaluations"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{str(folder)!r} is damaged: its state cannot be read ({error!r:.99})"
            ) from None
        now = self.identity
        differing = [
            f"{k} ({before.get(k)!r:.40} there, {v!r:.40} now)"
            for k, v in now.items()
            if before.get(k) != v
        ]
        if differing:
            raise CheckpointError(
                f"{str(folder)!r} belongs to another run: {', '.join(differing)}"[:500]
            )
        if state.get("numpy") != np.__version__:
            text = f"{str(folder)!r} was written with NumPy {state.get('numpy')!r:.40}, this is {np.__version__}"
            warnings.warn(
                f"{text}: the last bits may differ from those of an uninterrupted run", stacklevel=3
            )
        if len(losses) != done:
            raise CheckpointError(
                f"{str(folder)!r} is damaged: it has {len(losses)} losses after {done} steps"
            )
        stored = [(load_file(folder / name), parameters) for name, parameters in _files(self.model)]
        if any(set(arrays) != set(parameters) for arrays, parameters in stored):
            raise CheckpointError(f"{str(folder)!r} holds other parameters than the model has")
        ranks = load_file(folder / "allocator.safetensors") if self.allocator else {}
        self.optimizer.load_state_dict(load_file(folder / "optimizer.safetensors"), numbers)
        if self.allocator:
            self.allocator.load_state_dict(ranks, steps)
        for arrays, parameters in stored:
            for key, parameter in parameters.items():
                parameter.data = parameter.backend.from_numpy(arrays[key])
        self.done, self.losses, self.evaluations, self.checkpoint = (
            done,
            losses,
            evaluations,
            (done, folder),
        )


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
) -> Result:
    """Train every parameter that requires a gradient on `tokens` (N,); returns in eval mode, AdaLoRA's ranks cut.

    tokens    or a `Packed` text, whose targets that do not count are no part of the loss;
              or texts by task: each batch then has sequences of all, and to a `MultiTask` model they are its tasks'
    out       the run's folder, for log.jsonl, eval.jsonl and checkpoints; held by `runs.locked`, made if need be
    held_out  ids to evaluate on at step 0, every `eval_every` steps and at the end; by task: the mean of the tasks
    resume    "auto" or a checkpoint's folder: go on from there

    NonFiniteError, in the step in which it happens and before any weight changes, for a loss or gradient that is not
    finite: the last good state is saved, and the log's last line is that step's. DivergenceError if it is asked for.
    CheckpointError if a checkpoint belongs to another run. LockError if another run is in the folder. Interrupted on
    SIGINT or SIGTERM, after the step (not the evaluation) that was running, and saved.
    """
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(out))
        run = Run(model, tokens, settings, out)
        if resume is not None:
            run.restore(resume)
        require_free_space(out, run.room())
        remove_stale(out)
        model.train().get_base_model().gradient_checkpointing_enable(
            settings.gradient_checkpointing
        )
        sharded = stack.enter_context(ShardedStep(model, settings.threads, run.settings.shard))
        log = stack.enter_context(Log(out / "log.jsonl", run.done))
        evaluated = run.evaluations[-1][0] if run.evaluations else -1
        evaluation_log = stack.enter_context(Log(out / "eval.jsonl", evaluated + 1))
        stopped = stack.enter_context(_stop_signals())
        bar = tqdm(
            total=settings.steps, initial=run.done, desc=title, disable=None, dynamic_ncols=True
        )
        stack.enter_context(bar)

        def measure(tokens: Text) -> None:
            of_task = {}
            texts = tokens if isinstance(tokens, Mapping) else {"": tokens}
            for task, ids in texts.items():
                with (
                    model.task(task)
                    if task and isinstance(model, MultiTask)
                    else contextlib.nullcontext()
                ):
                    of_task[task] = evaluate(
                        model, ids, settings.context, sharded=sharded, stopped=stopped
                    )
            if stopped:
                return  # it may be one of a part: a resumed run measures again
            loss = math.fsum(of_task.values()) / len(of_task)
            bits = bits_per_byte(loss, bytes_per_token)
            run.evaluations.append((run.done, loss))
            evaluation_log.write(
                step=run.done,
                loss=loss,
                bits_per_byte=bits,
                **({} if "" in of_task else {"tasks": of_task}),
            )
            if bar.disable:  # no terminal, no bar: a line now and then
                print(
                    f"{title}: step {run.done} of {settings.steps}, held out {bits:.3f} bits a byte",
                    flush=True,
                )

        def save() -> Path:
            log.sync()
            evaluation_log.sync()
            return run.save()

        warned = False
        while True:
            first, last = run.done == 0, run.done == settings.steps
            measured = run.evaluations and run.evaluations[-1][0] == run.done
            if (
                held_out is not None
                and not measured
                and (first or last or _due(run.done, settings.eval_every))
            ):
                measure(held_out)
            if (settings.save_every and last) or _due(run.done, settings.save_every):
                save()
            if stopped:
                name, folder = signal.Signals(stopped[0]).name, save()
                raise Interrupted(
                    f"{name}: stopped after {run.done} steps, saved in {str(folder)!r:.300}",
                    stopped[0],
                )
            if last:
                break
            try:
                line = run.step(sharded)
            except NonFiniteError as error:
                log.write(**error.line)
                if run.done:
                    save()
                raise NonFiniteError(f"{error}; {run.explain()}"[:500], error.line) from None
            log.write(**line)
            bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
            bar.update()
            sign = divergence(run.losses, model.config.vocab_size, settings.warmup)
            if sign and settings.abort_on_divergence:
                kept = run.checkpoint and str(run.checkpoint[1])
                raise DivergenceError(
                    f"step {line['step']}: {sign}; the latest checkpoint is {kept!r:.250}"
                )
            if sign and not warned:
                warned = True
                warnings.warn(
                    f"step {line['step']}: {sign}; --abort-on-divergence would stop here",
                    stacklevel=2,
                )
    if run.allocator is not None:
        run.allocator.prune()
    model.eval()
    return Result(run.losses, run.evaluations, time.perf_counter() - begun)


def _due(done: int, every: int | None) -> bool:
    return every is not None and done > 0 and done % every == 0


def divergence(losses: Sequence[float], vocabulary: int, warmup: int = 0) -> str | None:
    """What shows that a run has diverged at its last step, if it has; a function of its losses alone.

    Either the loss is far above ln(vocabulary), that of guessing, after the warm-up; or all of the last 50 losses are
    above three times the median of the 50 before them. A single spike is no divergence.
    """
    ceiling = math.log(vocabulary) + 5
    if len(losses) > warmup and losses[-1] > ceiling:
        return f"the loss, {losses[-1]:.4g}, is above {ceiling:.4g}, which is 5 more than guessing gives"
    before, recent = losses[-2 * PATIENCE : -PATIENCE], losses[-PATIENCE:]
    if len(before) == PATIENCE and min(recent) > (bound := 3 * statistics.median(before)):
        return f"for {PATIENCE} steps the loss has been above {bound:.4g}, 3 times the median of the {PATIENCE} before"
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
    """The mean of -log p over every token of a text but the first, in nats; at most `limit` windows of it.

    Of a `Packed` text it is the mean over the tokens that count.

    It ends early, with NaN, when something appears in `stopped`. NonFiniteError if it is not a number otherwise: the
    weights, or what they give, have a NaN or an infinity.
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
    bad = next((loss for loss, _ in totals if not math.isfinite(loss)), None)
    if bad is not None:
        raise NonFiniteError(
            f"the loss of the held-out text is {bad}: the model's weights are broken, or too large"
        )
    return math.fsum(loss for loss, _ in totals) / sum(count for _, count in totals)


def bits_per_byte(loss: float, bytes_per_token: float = 1.0) -> float:
    """A mean loss in nats a token, as bits a byte of text: comparable across tokenizers, and with a compressor."""
    return loss / math.log(2) / bytes_per_token


def rank_history(out: Path) -> tuple[list[tuple[int, dict[str, int]]], int]:
    """([(step, ranks by layer) of each allocation], the run's steps), from the log of a run of AdaLoRA in `out`.

    The ranks are those that the step left; they stand until the next entry.
    """
    lines = read_log(out / "log.jsonl")
    return [(line["step"], line["ranks"]) for line in lines if "ranks" in line], lines[-1][
        "step"
    ] + 1


# ---- going on where a run stopped -----------------------------------------------------------------------------------


def _identity(
    model: Any, settings: Settings, tokens: Text, trained: list[tuple[str, Parameter]]
) -> dict[str, Any]:
    """What makes two runs the same run: settings, text, the parameters that train, and all that they stand on."""
    numbers = {k: v for k, v in dataclasses.asdict(settings).items() if k not in Settings.FREE}
    shape = dataclasses.asdict(model.config)
    if isinstance(
        model, PeftModel
    ):  # lora_alpha or the dropout change a run, and leave no trace in any shape
        for name in model.active_adapters:
            prefix = "" if name == "default" else f"{name}."
            shape |= {prefix + k: v for k, v in dataclasses.asdict(model.peft_config[name]).items()}
    if isinstance(model, MultiTask):
        shape["tasks"] = {task: list(names) for task, names in model.tasks.items()}
    shape = {k: v for k, v in shape.items() if not k.endswith(("extra", "base_model_name_or_path"))}
    names = hashlib.sha256(
        repr([(n, p.shape, str(p.dtype)) for n, p in trained]).encode()
    ).hexdigest()
    frozen = hashlib.sha256()
    for _, p in model.named_parameters():
        if not p.requires_grad:
            for piece in iterate_pieces(p):
                frozen.update(np.ascontiguousarray(p.backend.to_numpy(piece)).data.cast("B"))
    texts: Mapping[str, Ids | PackedRecords] = (
        tokens if isinstance(tokens, Mapping) else {"": tokens}
    )
    read = {task: _checksum(ids) for task, ids in texts.items()}
    text: Any = [list(item) for item in read.items()] if isinstance(tokens, Mapping) else read[""]
    found = {
        **shape,
        **numbers,
        "text": text,
        "parameters": names,
        "frozen weights": frozen.hexdigest(),
    }
    return dict(
        json.loads(json.dumps(found))
    )  # as a checkpoint gives it back, where a tuple is a list


def _checksum(text: Ids | PackedRecords) -> str:
    """Of the ids; of a packed text, of what counts and of its windows too."""
    found = hashlib.sha256()
    for array in (
        (text.ids, text.counts, text.edges) if isinstance(text, PackedRecords) else (text,)
    ):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _allocator(
    model: Any, settings: Settings, trained: list[tuple[str, Parameter]]
) -> RankAllocator | None:
    """What cuts the ranks of the adapter that trains, if it is AdaLoRA's. ConfigError for two, or another schedule."""
    owners = model.active_adapters if isinstance(model, PeftModel) else []
    kinds = [name for name in owners if isinstance(model.peft_config[name], AdaLoraConfig)]
    own, training = {n: RankAllocator.of(model, n) for n in kinds}, {id(p) for _, p in trained}
    found = {n: a for n, a in own.items() if any(id(p) in training for p in a.params)}
    if len(found) > 1:
        raise ConfigError(
            f"adapters {', '.join(found)} share no budget: train one AdaLoRA adapter at a time"
        )
    for name, allocator in found.items():
        total = allocator.config.total_step
        if total != settings.steps:
            text = (
                f"adapter {name!r} has its ranks planned for total_step = {total}, but the run has"
            )
            raise ConfigError(f"{text} steps = {settings.steps}: let them be equal")
    return next(iter(found.values()), None)


def _files(model: Any) -> list[tuple[str, dict[str, Parameter]]]:
    """(file in a checkpoint's folder, what it holds by key) of everything that such a model can train."""
    if not isinstance(model, PeftModel):
        return [("model.safetensors", dict(model.named_parameters()))]
    folders = {name: "" if name == "default" else f"{name}/" for name in model.active_adapters}
    return [
        (f"{f}adapter_model.safetensors", model.adapter_parameters(name))
        for name, f in folders.items()
    ]


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are put into, so that the running step can end first; a second stops at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        with contextlib.suppress(
            OSError, RuntimeError
        ):  # no terminal any more, or the signal came while it wrote
            print(
                f"\n{signal.Signals(number).name}: finishing this step, then saving",
                file=sys.stderr,
            )

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python lets only the main thread set handlers
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
