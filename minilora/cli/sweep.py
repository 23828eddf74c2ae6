"""sweep: fine-tuning runs for each point of a grid of options, and a table of what came of them.

A point is what `finetune` does, in a folder of its own. A sweep that was stopped or killed goes on
with the same command: finished points stay, and others continue from their checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..backend import get_backend
from ..display import print_table, printable
from ..errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    LockError,
    MiniloraError,
    SweepError,
)
from ..formats import find_model, read_checkpoint
from ..formats.disk import JsonObject
from ..formats.folders import LOCK, locked
from ..lora.targets.base import Base, describe_checkpoint
from ..lora.targets.plan import plan_adapter
from ..models.config import TransformerConfig
from ..progress import progress_bar
from ..training.checkpoints import find_checkpoint, read_log
from ..training.pool import POOLS, Pool, completed, open_pool, threads_per_call
from ..training.ranks import Alone
from ..training.signals import stop_signals
from ..training.sweep import (
    FAILED,
    FINISHED,
    LASTING,
    Identity,
    Point,
    checksum,
    claim_folder,
    count_points,
    describe_failure,
    describe_settings,
    list_points,
    read_result,
    result_rows,
    seed_rows,
    write_result,
    write_results,
)
from .grid import Axis, read_grid
from .options import Args, Command, Parser, option
from .preparing import read_finetune_options
from .reading import read_tokenizer, read_training_text, require_context
from .training import add_finetune_options, add_tuning_options, run_finetune

OUTPUT = "output.txt"  # in a point's folder: what finetune would have printed
MOST_POINTS = 256
TRIES = 50  # to lock a point's folder, ten per second
OWN = ("grid", "out", "jobs", "pool", "max_points", "debug")  # options of sweep, not of its points
PATHS = ("DIR", "FILE", "auto|DIR")
FROM_MAIN = ("command", "parser", "run", "prints", "has_ranks", "ranks")


def add_sweep_options(parser: Parser) -> None:
    text = "options of finetune, each with values, such as r=4,8 target=q_proj,q_proj+v_proj"
    option(parser, "--grid AXIS=V,V", text, nargs="+", action="extend", required=True)
    text = "the sweep's folder: new, or of the same sweep, which goes on"
    option(parser, "--out DIR", text, required=True)
    option(
        parser,
        "--jobs K",
        "points at a time, each in a process with its share of the cores (default: 1)",
    )
    text = f"where points run: {', '.join(POOLS)} (default: by --jobs)"
    option(parser, "--pool HOW", text, choices=POOLS)
    text = "refuse a grid of more points, at least 1"
    option(parser, "--max-points K", text, default=MOST_POINTS)
    add_tuning_options(parser)
    # The values that are left out are finetune's business, and the others count as given.
    own = {f"--{name.replace('_', '-')}" for name in OWN}
    for action in parser._actions:
        if not own.intersection(action.option_strings):
            action.default = argparse.SUPPRESS


# ---- what is to be done --------------------------------------------------------------------------


class Work(NamedTuple):
    """A point with its folder and the options with which finetune makes it."""

    point: Point
    folder: str
    options: dict[str, Any]


class Plan(NamedTuple):
    """A sweep of which nothing has been refused.

    places   the path of each of the identity's files
    """

    grid: dict[str, list[str]]
    works: list[Work]
    identity: Identity
    places: dict[str, str]
    pool: str
    jobs: int


def plan_sweep(args: Args) -> Plan:
    """What the options mean. Errors for all that can be refused before a point is trained."""
    pool, jobs = choose_pool(args)
    given = {key: value for key, value in vars(args).items() if key not in (*OWN, *FROM_MAIN)}
    parser = Parser(prog="minilora sweep", allow_abbrev=False)
    add_finetune_options(parser)
    axes = read_grid(args.grid, parser, argparse.Namespace(**given))
    grid = {axis.name: axis.texts for axis in axes}
    count = count_points(grid)
    if count > args.max_points:
        raise ConfigError(
            f"--grid has {count:,} points, more than {args.max_points:,}: give fewer values, "
            f"or --max-points {count}"
        )
    jobs = min(jobs, count)
    given["base"] = find_model(args.base, given.get("download", False))
    given.setdefault("threads", threads_per_call(pool, jobs))
    works = []
    for point in list_points(grid):
        folder = os.path.join(args.out, point.name)
        options = _point_options(parser, axes, point, given)
        works.append(Work(point, folder, options))
    _check_points(works)
    places = _read_places(works[0].options)
    files = {name: checksum(place) for name, place in places.items()}
    identity = Identity(grid, _common_options(parser, axes, works[0].options), files)
    return Plan(grid, works, identity, places, pool, jobs)


def choose_pool(args: Args, default: int = 1) -> tuple[str, int]:
    """(kind of pool, calls at a time); `default` is how many without --jobs."""
    jobs = args.jobs or default
    pool = args.pool or ("processes" if jobs > 1 else "here")
    if pool == "here" and jobs > 1:
        raise ConfigError(f"--pool here has one point at a time, not --jobs {jobs}: drop either")
    if pool == "mpi" and args.jobs is not None:
        raise ConfigError("--pool mpi has as many points at a time as ranks: leave out --jobs")
    return pool, jobs


def _point_options(
    parser: Parser, axes: Sequence[Axis], point: Point, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of finetune for a point, those that were not given included."""
    words = [axis.word(point.values[axis.name]) for axis in axes]
    base = f"--base={given['base']}"  # required by the parser
    given_words = [base, *(word for word in words if word is not None)]
    return vars(parser.parse_args(given_words, argparse.Namespace(**given)))


def _check_points(works: Sequence[Work]) -> None:
    """Errors for a device, options, targets and texts that finetune would refuse."""
    options = argparse.Namespace(**works[0].options)
    get_backend(options.device)
    config, base = _read_base(options.base)
    tokenizer = read_tokenizer(options.base, config.vocab_size, options.adapter)
    contexts = set()
    plans = []
    for work in works:
        args = argparse.Namespace(**work.options)
        try:
            settings, adapter, tasks = read_finetune_options(args)
            require_context(settings.context, config)
            is_new = args.adapter is None and adapter not in plans
            if base is not None and adapter is not None and is_new:
                plan_adapter(base, adapter, warn=False)
                plans.append(adapter)
        except ConfigError as error:
            raise ConfigError(f"{work.point.name}: {error}") from None
        if settings.context not in contexts:
            contexts.add(settings.context)
            for file in tasks.values() or [args.data]:
                kind = "--tasks" if tasks else "--data"
                read_training_text(
                    file, args.eval_data, tokenizer, settings.context, kind, args.strict
                )


def _read_base(folder: str) -> tuple[TransformerConfig, Base | None]:
    """(configuration, modules) of the base, from its header; None where its weights are codes."""
    fields, checkpoint = read_checkpoint(folder)
    with checkpoint:
        try:
            config = TransformerConfig.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"--base {folder!r:.100}: {error}") from None
        is_coded = fields.get("quantization_config") is not None
        return config, None if is_coded else describe_checkpoint(checkpoint, fields)


def _read_places(options: Mapping[str, Any]) -> dict[str, str]:
    """The files and folders that a point reads, by the option that names them."""
    names = ("base", "adapter", "data", "eval_data")
    places = {f"--{name.replace('_', '-')}": options[name] for name in names}
    for file in options["tasks"] or []:
        places[f"--tasks {Path(file).stem}"] = file
    return {name: place for name, place in places.items() if place is not None}


def _common_options(
    parser: Parser, axes: Sequence[Axis], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that make the sweep what it is, beside its axes and its files."""
    from ..training.loop import Settings

    own = {axis.action.dest for axis in axes}
    # Whether a point fails depends on abort_on_divergence, and which step is best on eval_every.
    counted = {"abort_on_divergence"} | ({"eval_every"} if options["keep"] == "best" else set())
    free = {*Settings.FREE, "download"} - counted
    paths = {action.dest for action in parser._actions if action.metavar in PATHS}
    excluded = own | free | paths
    return {name: options[name] for name in sorted(options) if name not in excluded}


# ---- one point -----------------------------------------------------------------------------------


def run_point(work: Work) -> JsonObject:
    """Train the point, or what is left of it; returns its result (see training/sweep.py).

    A failure is a result, too. One that would come again (a loss that is not finite, or diverged)
    is written down; any other is tried again by the next sweep.
    """
    folder = Path(work.folder)
    try:
        with contextlib.ExitStack() as stack:
            _lock(folder, stack)
            result = read_result(folder)
            if result is None:
                stack.enter_context(_output_to(folder / OUTPUT))
                result = _train_point(folder, work.options)
            return result
    except (MiniloraError, OSError, MemoryError) as error:
        return describe_failure(error)


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Lock the folder. Processes of a sweep that was killed may need a moment to end, too."""
    for _ in range(TRIES):
        with contextlib.suppress(LockError):
            stack.enter_context(locked(folder))
            return
        time.sleep(0.1)
    stack.enter_context(locked(folder))


def _train_point(folder: Path, options: Mapping[str, Any]) -> JsonObject:
    from ..training.loop import bits_per_byte

    args = argparse.Namespace(**options)
    args.out = str(folder)
    args.ranks = Alone()
    try:
        args.resume = str(find_checkpoint("auto", folder)[0])
    except CheckpointError:
        args.resume = None  # killed before its first checkpoint: the logs begin anew
    try:
        trained, ratio, count = run_finetune(
            args, contextlib.nullcontext(folder), lambda _: contextlib.nullcontext()
        )
    except Exception as error:
        failure = describe_failure(error)
        _print_error(error)
        if failure["exit_code"] == LASTING:
            write_result(folder, failure)
        return failure
    loss = trained.loss
    result = {
        "state": FINISHED,
        "loss": loss,
        "bits_per_byte": bits_per_byte(loss, ratio),
        "trainable_parameters": count,
        "seconds": _count_seconds(folder),
    }
    write_result(folder, result)
    return result


def _print_error(error: Exception) -> None:
    """Print the whole message to the point's output, and where a mistake of ours came from."""
    if isinstance(error, MiniloraError | OSError | MemoryError):
        kind = "interrupted" if isinstance(error, Interrupted) else "error"
        print(f"minilora: {kind}: {printable(str(error) or 'out of memory')}", file=sys.stderr)
    else:
        traceback.print_exception(error)


def _count_seconds(folder: Path) -> float:
    """The seconds of all steps, from the log: a run that was stopped counts each step once."""
    log = folder / "log.jsonl"
    lines = read_log(log) if log.is_file() else []
    seconds = [float(line.get("seconds", 0.0)) for line in lines]
    return round(math.fsum(seconds), 3)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append what the block prints to a file."""
    with (
        open(path, "a", encoding="utf-8", errors="backslashreplace") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


# ---- all points ----------------------------------------------------------------------------------


def sweep(args: Args) -> None:
    plan = plan_sweep(args)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(open_pool(plan.pool, plan.jobs))
        out = stack.enter_context(locked(args.out))
        claim_folder(out, plan.identity, plan.places)
        stopped = stack.enter_context(stop_signals())
        results = _run_points(plan, pool, stopped)
        if stopped:
            name = signal.Signals(stopped[0]).name
            done = f"stopped with {len(results)} of {len(plan.works)} points done"
            raise Interrupted(f"{name}: {done}; the same command goes on", stopped[0])
        _report(plan, out, results)
    failed = {name: result for name, result in results.items() if result["state"] == FAILED}
    if failed:
        name, first = next(iter(failed.items()))
        raise SweepError(
            f"{len(failed)} of {len(results)} points failed; {name}: {first['reason']}",
            first["exit_code"],
        )


def _run_points(plan: Plan, pool: Pool, stopped: Sequence[int]) -> dict[str, JsonObject]:
    """The results by the points' names, in the order of the grid; fewer if a signal came."""
    results: dict[str, JsonObject] = {}
    for work in plan.works:
        folder = Path(work.folder)
        result = read_result(folder)
        # A process that was killed after its result left its lock, which run_point takes away.
        if result is not None and not os.path.lexists(folder / LOCK):
            results[work.point.name] = result
    left = [work for work in plan.works if work.point.name not in results]
    total = len(plan.works)
    progress: dict[str, Any] = {
        "total": total,
        "initial": len(results),
        "desc": "sweep",
        "unit": "point",
    }
    with progress_bar(**progress, dynamic_ncols=True) as bar:
        for work, future in completed(pool, run_point, left, stopped):
            error = future.exception()
            result = future.result() if error is None else describe_failure(error)
            if stopped and result["state"] == FAILED and result["exit_code"] != LASTING:
                continue  # the signal may be the reason
            results[work.point.name] = result
            bar.update()
            if bar.disable:
                print(f"{len(results)} of {total}: {printable(_describe(work.point, result))}")
    return {
        work.point.name: results[work.point.name]
        for work in plan.works
        if work.point.name in results
    }


def _describe(point: Point, result: JsonObject) -> str:
    if result["state"] == FAILED:
        return f"{point.name} failed: {result['reason']}"
    return f"{point.name} held out {result['bits_per_byte']:.3f} bits per byte"


def _report(plan: Plan, out: Path, results: Mapping[str, JsonObject]) -> None:
    """Write the results, draw them and print them as tables."""
    rows = result_rows([work.point for work in plan.works], results)
    means = seed_rows(plan.grid, rows)
    write_results(out, rows, means)
    _draw(out / "results.png", describe_settings(plan.grid, rows))
    shown = []
    for row, result in zip(rows, results.values(), strict=True):
        state, reason = row["state"], row["reason"]
        row = {key: _rounded(value) for key, value in row.items() if key != "reason"}
        row["seconds"] = _rounded(result.get("seconds"))
        row["state"] = row.pop("state")  # behind the seconds
        if reason:
            row["state"] = f"{state}: {reason if len(reason) <= 60 else reason[:57] + '...'}"
        shown.append(row)
    print_table(shown)
    if means:
        print()
        print_table([{key: _rounded(value) for key, value in row.items()} for row in means])
    print(printable(f"{len(rows)} points -> {out / 'results.csv'}"))


def _rounded(value: Any) -> Any:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else value


def _draw(file: Path, losses: Mapping[str, Sequence[float]]) -> None:
    from ..lab import plots  # matplotlib is optional, and slow to import

    reason = plots.why_unavailable()
    if reason:
        print(printable(f"(no pictures: {reason})"))
    else:
        plots.losses_by_setting(file, losses)


COMMANDS = (
    Command(
        sweep,
        add_sweep_options,
        "Fine-tune at each point of a grid of options, and compare what comes of them.",
        "--base base --data notes.txt --grid r=4,8 lr=1e-3,3e-3 seed=0,1 --out swept --jobs 2",
    ),
)
