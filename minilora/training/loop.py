"""The training loop: batch, gradients, update, log; evaluations and checkpoints at intervals.

The same loop pretrains a whole model and fine-tunes an adapter: it trains every parameter that
requires a gradient. A run depends on its settings, its text and the step number alone, never on how
it got there: stopped at any step and resumed, it ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import statistics
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..data.batches import Ids, PackedRecords, evaluation_windows
from ..display import render_result
from ..errors import (
    ConfigError,
    DivergenceError,
    Interrupted,
    NonFiniteError,
)
from ..formats.disk import JsonObject
from ..formats.folders import LOCK, locked, require_free_space
from ..lora import MultiTask
from ..progress import progress_bar
from .checkpoints import Log, read_log, remove_stale
from .parallel import ShardedStep
from .ranks import Alone, Ranks
from .run import Run as Run
from .run import Text, by_task, text_checksums
from .settings import Settings as Settings
from .signals import stop_signals

PATIENCE = 50  # steps with a high loss after which a run counts as diverged
ALIKE = "start all ranks with the same command, options, files and versions"
UNEQUAL = "the ranks round differently; use machines with the same processor, NumPy and BLAS"


@dataclasses.dataclass
class Result:
    """What a run measured: each step's loss, and (step, mean held-out loss) per evaluation.

    step   after which the model had its weights: the last one, or with keep = "best" the best one
    also   the evaluations of a second text, if there is one
    """

    losses: list[float]
    evaluations: list[tuple[int, float]]
    seconds: float
    step: int = 0
    also: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def _repr_html_(self) -> str:
        return render_result(self)

    @property
    def loss(self) -> float:
        """The held-out loss of the weights that the model has; NaN if nothing was held out."""
        return dict(self.evaluations).get(self.step, math.nan)


def train(
    model: Any,
    tokens: Text,
    settings: Settings,
    out: str | Path,
    *,
    held_out: Text | None = None,
    resume: str | Path | None = None,
    bytes_per_token: float = 1.0,
    title: str = "train",
    origin: str | None = None,
    ranks: Ranks | None = None,
    also: Ids | PackedRecords | None = None,
    also_bytes_per_token: float = 1.0,
    changed: Collection[str] = (),
) -> Result:
    """Train every parameter that requires a gradient on `tokens` (N,); returns what was measured.

    The model comes back in eval mode, with AdaLoRA's ranks cut, and with the weights that
    settings.keep asks for.

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
    ranks     the processes that train together: each calls this with the same arguments, and gets
              the same result; all must see `out`, and rank 0 alone writes there (see ranks.py)
    also      a second text, evaluated beside the held-out one: what the run makes of, say, what the
              model knew before. It changes nothing of the training
    changed   fields of the run that may differ from the checkpoint's: it is another run from there

    NonFiniteError for a loss or gradient that is not finite, in the step in which it happens and
    before any weight changes: the last good state is saved, and the log's last line is that step's.
    DivergenceError if `abort_on_divergence` is set. CheckpointError if a checkpoint belongs to
    another run. LockError if another run uses the folder. Interrupted on SIGINT, SIGTERM, SIGHUP or
    SIGUSR1, after the step (not the evaluation) that was running, and saved. ConfigError if ranks
    have different settings, texts or weights to begin with, or come to different weights.
    """
    begun = time.perf_counter()
    out = Path(out)
    ranks = ranks or Alone()
    writes = ranks.rank == 0
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(locked(out))
        _require_shared(out, ranks)
        run = Run(model, tokens, settings, out, origin, ranks, held_out)
        _warn_of_few_evaluations(settings)
        if also is not None:
            _require_evaluable(model, held_out)
            run.also_text = text_checksums(also)
        _begin_alike(run, held_out, resume, changed)
        if writes:
            require_free_space(out, run.saved_bytes())
            remove_stale(out)
        # However the run ends, the model can be used: a notebook goes on after an interruption.
        stack.callback(model.eval)
        base = model.train().get_base_model()
        base.gradient_checkpointing_enable(settings.gradient_checkpointing)
        sharded = stack.enter_context(
            ShardedStep(
                model,
                settings.threads,
                run.settings.shard,
                graph=settings.graph,
                ranks=ranks,
                part=run.settings.part,
            )
        )
        if ranks.size > 1:
            _warn_idle(ranks, sharded.count_shards(run.batch(run.done)))
        log = stack.enter_context(Log(_place_of_log(out / "log.jsonl", ranks), run.done))
        evaluated = run.evaluations[-1][0] if run.evaluations else -1
        evaluation_log = stack.enter_context(
            Log(_place_of_log(out / "eval.jsonl", ranks), evaluated + 1)
        )
        received = stack.enter_context(stop_signals())
        ranks.watch(received)
        steps = settings.steps
        bar = progress_bar(
            total=steps, initial=run.done, desc=title, show=writes, dynamic_ncols=True
        )
        stack.enter_context(bar)
        evaluations = _Evaluations(
            run,
            sharded,
            evaluation_log,
            received,
            bytes_per_token,
            also,
            also_bytes_per_token,
            title,
            prints=writes and bar.disable,  # without a terminal, where no bar is shown
        )

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
                evaluations.measure(held_out)
            is_saved = (settings.save_every and last) or _is_due(run.done, settings.save_every)
            if ranks.size > 1 and (is_saved or last):
                _require_same_weights(run)
            if is_saved:
                save()
            if ranks.signal:
                raise _interruption(run, save())
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
                raise _divergence_error(run, line["step"], reason)
            if reason and not warned:
                warned = True
                warnings.warn(
                    f"step {line['step']}: {reason}; --abort-on-divergence would stop here",
                    stacklevel=2,
                )
    run.take_best()
    if run.allocator is not None:
        run.allocator.prune()
    model.eval()
    step = run.best.step if run.best else run.done
    return Result(run.losses, run.evaluations, time.perf_counter() - begun, step, run.also)


@dataclasses.dataclass(frozen=True)
class _Evaluations:
    """The evaluations of a run: of its held-out text, and perhaps of a second one.

    log      gets a line for each
    stopped  signals that ended the run: an evaluation ends early once it has one
    also     the second text
    prints   whether each evaluation is a line on standard output
    """

    run: Run
    sharded: ShardedStep
    log: Log
    stopped: Sequence[int]
    bytes_per_token: float
    also: Ids | PackedRecords | None
    also_bytes_per_token: float
    title: str
    prints: bool

    def measure(self, held_out: Text) -> None:
        """Evaluate the weights as they are, and note what was measured."""
        run = self.run
        losses = self._losses(held_out)
        also_loss = None if self.also is None else self._losses(self.also)[""]
        if run.ranks.signal:
            return  # the losses may cover a part of the text: a resumed run measures again
        loss = math.fsum(losses.values()) / len(losses)
        bits = bits_per_byte(loss, self.bytes_per_token)
        run.add_evaluation(loss)
        record: JsonObject = {"step": run.done, "loss": loss, "bits_per_byte": bits}
        line = f"{self.title}: step {run.done} of {run.settings.steps}, held out {bits:.3f}"
        line += " bits per byte"
        if "" not in losses:
            record["tasks"] = losses
        if also_loss is not None:
            run.also.append((run.done, also_loss))
            record["also_loss"] = also_loss
            also_bits = bits_per_byte(also_loss, self.also_bytes_per_token)
            record["also_bits_per_byte"] = also_bits
            line += f", second text {also_bits:.3f}"
        self.log.write(**record)
        if self.prints:
            # Whoever read it may have gone (`| head -1`): training goes on.
            with contextlib.suppress(OSError, ValueError):
                print(line, flush=True)

    def _losses(self, text: Text) -> dict[str, float]:
        """The loss of each task's text; of a text without tasks, by the empty name."""
        context = self.run.settings.context
        return evaluate_by_task(
            self.run.model, text, context, sharded=self.sharded, stopped=self.stopped
        )


def _begin_alike(
    run: Run, held_out: Text | None, resume: str | Path | None, changed: Collection[str]
) -> None:
    """Restore the checkpoint `resume`, if any. ConfigError if ranks would begin differently."""
    ranks = run.ranks
    held_out_checksums = None if held_out is None else text_checksums(held_out)
    checksums = {"held-out text": held_out_checksums, "second text": run.also_text}
    ranks.require_same({**run.identity, **checksums}, ALIKE)
    if resume is not None:
        run.restore(resume, changed)
    if ranks.size > 1:
        ranks.require_same({"the steps done": run.done}, ALIKE)
        _require_same_weights(run, ALIKE)


def _interruption(run: Run, folder: Path) -> Interrupted:
    """The error that ends a run after a signal, once it is saved."""
    number = run.ranks.signal
    name = signal.Signals(number).name
    return Interrupted(
        f"{name}: stopped after {run.done} steps, saved in {str(folder)!r:.300}", number
    )


def _divergence_error(run: Run, step: int, reason: str) -> DivergenceError:
    saved = "no checkpoint was saved"
    if run.checkpoint:
        saved = f"the latest checkpoint is {str(run.checkpoint[1])!r:.250}"
    return DivergenceError(f"step {step}: the loss diverged but is still finite: {reason}; {saved}")


def _warn_of_few_evaluations(settings: Settings) -> None:
    if settings.keep == "best" and settings.eval_every is None:
        warnings.warn(
            "keep = 'best' without eval_every chooses between the weights before training and "
            "those of the last step: set eval_every (--eval-every N)",
            stacklevel=3,
        )


def _require_evaluable(model: Any, held_out: Text | None) -> None:
    """ConfigError unless a second text can be evaluated whenever the held-out one is."""
    if held_out is None:
        raise ConfigError(
            "also, a second text, is evaluated together with held_out: give that, too"
        )
    if isinstance(model, MultiTask):
        raise ConfigError(
            "also, a second text, has no task whose adapter could run: leave it out, or train one "
            "adapter"
        )


def _require_shared(out: Path, ranks: Ranks) -> None:
    """ConfigError if a rank does not see the folder that rank 0 has locked."""
    if ranks.size == 1:
        return
    token = ranks.share((out / LOCK).read_text() if ranks.rank == 0 else None)
    if ranks.rank:
        with contextlib.suppress(OSError):
            # A network file system may show the file before its content.
            if (out / LOCK).read_text() in ("", token):
                return
        raise ConfigError(
            f"--out {str(out)!r:.200} is not the folder that rank 0 writes to: "
            "give a folder on a disk that all machines share"
        )


def _require_same_weights(run: Run, advice: str = UNEQUAL) -> None:
    """ConfigError on all ranks, which `advice` ends, if their weights differ."""
    what = f"the checksum of the weights after {run.done} steps"
    run.ranks.require_same({what: run.weights_checksum()}, advice)


def _warn_idle(ranks: Ranks, shards: int) -> None:
    if ranks.size > shards and ranks.rank == 0:
        warnings.warn(
            f"{ranks.size - shards} of {ranks.size} ranks have no part in the steps, which have "
            f"{shards} shards: start fewer, or give a larger --batch-size or a smaller --shard",
            stacklevel=3,
        )


def _place_of_log(path: Path, ranks: Ranks) -> Path:
    """Where this rank writes a log: rank 0 to its file, the others nowhere."""
    return Path(os.devnull) if ranks.rank else path


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
    stopped: Sequence[int] = (),
    ranks: Ranks | None = None,
) -> float:
    """The mean of -log p over every token of a text but the first, in nats.

    With a `limit` at most that many windows of the text count. For `PackedRecords` it is the mean
    over the tokens that count. As soon as `stopped` has an item the evaluation ends early and
    returns NaN. Otherwise NonFiniteError if the loss is NaN or infinite: the weights, or what they
    compute, have a NaN or an infinity. `ranks`, where no `sharded` step has them, share the
    windows: each calls this with the same arguments, and gets the same result.
    """
    training = model.training
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            sharded = sharded or stack.enter_context(ShardedStep(model, threads, ranks=ranks))
            windows = evaluation_windows(tokens, context, 16, limit)
            totals = list(sharded.losses(itertools.takewhile(lambda _: not stopped, windows)))
    finally:
        model.train(training)
    if stopped or sharded.ranks.signal:
        return math.nan
    for loss, _ in totals:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss of the held-out text is {loss}: "
                "the model's weights are not finite, or too large"
            )
    return math.fsum(loss for loss, _ in totals) / sum(count for _, count in totals)


def evaluate_by_task(model: Any, text: Text, context: int, **options: Any) -> dict[str, float]:
    """The loss of each task's text, with the adapters of that task; options as of `evaluate`.

    The loss of a text without tasks has the empty name.
    """
    losses = {}
    for task, ids in by_task(text).items():
        with contextlib.ExitStack() as adapters:
            if task and isinstance(model, MultiTask):
                adapters.enter_context(model.task(task))
            losses[task] = evaluate(model, ids, context, **options)
    return losses


def bits_per_byte(loss: float, bytes_per_token: float = 1.0) -> float:
    """A mean loss in nats per token, converted into bits per byte of text.

    That can be compared across tokenizers, and with a compressor.
    """
    return loss / math.log(2) / bytes_per_token


def rank_history(out: str | Path) -> tuple[list[tuple[int, dict[str, int]]], int]:
    """([(step, ranks by layer) of each allocation], the run's steps), from AdaLoRA's log in `out`.

    The ranks are those after the step; they stay until the next entry.
    """
    lines = read_log(Path(out, "log.jsonl"))
    history = [(line["step"], line["ranks"]) for line in lines if "ranks" in line]
    return history, lines[-1]["step"] + 1
