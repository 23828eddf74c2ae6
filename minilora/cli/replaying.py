"""replay: a run of finetune once more from a checkpoint, with one thing changed beside a twin."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..display import print_table, printable
from ..errors import CheckpointError, ConfigError
from ..formats.disk import JsonObject
from ..formats.folders import locked, numbered_folder, require_empty
from ..training.ranks import Alone
from ..training.replaying import (
    CHANGEABLE,
    choose_checkpoint,
    read_command,
    read_evaluations,
    read_steps,
    require_equal_logs,
    require_replayable,
)
from .files import format_row, print_json
from .options import Args, Command, Parser, add_json, hyphenate, integer_from, option, path
from .preparing import Prepared, prepare_finetune, read_finetune_options
from .training import add_finetune_options

TWIN, CHANGED = "twin", "changed"  # folders in --out


def add_replay_options(parser: Parser) -> None:
    option(parser, "directory RUN", "the folder of a run of finetune", type=path)
    text = "the step to start from, of which the run has a checkpoint, or 0"
    option(parser, "--from N", text, type=integer_from(0), required=True, dest="step")
    text = f"what to change, once: {', '.join(CHANGEABLE)} (default: nothing, the twin alone runs)"
    option(parser, "--set NAME=VALUE", text, action="append", dest="changes")
    option(parser, "--out DIR", "a new or empty folder (default: runs/replay-NNN)")
    option(parser, "--threads K", "threads, at least 1 (default: one per core)")
    add_json(parser)


def replay(args: Args) -> None:
    run = Path(args.directory)
    words = read_command(run)
    name, value = _read_change(args.changes)
    checkpoint = choose_checkpoint(run, args.step)
    read_steps(run, args.step)
    twin_args = parse_command(words, run, checkpoint, args.threads)
    changed_args = None
    if name:
        changing = [*words, f"--{name.replace('_', '-')}={value}"]
        changed_args = parse_command(changing, run, checkpoint, args.threads)
        read_finetune_options(changed_args)  # a value that is out of range is refused here
    # What is refused is refused before a folder is made, and before the twin has trained. Each
    # model is made anew, so that only one is in memory.
    require_replayable(run, checkpoint, _identity(twin_args))
    if changed_args is not None:
        _require_possible(changed_args, run, checkpoint, args.step, name, value)
    twin = prepare_finetune(twin_args)
    with _new_folder(args.out) as out:
        with _quiet(args.json):
            _go_on(twin, out / TWIN, checkpoint, TWIN)
            count = require_equal_logs(run, out / TWIN, args.step)
            if changed_args is not None:
                prepared = prepare_finetune(changed_args)
                _go_on(prepared, out / CHANGED, checkpoint, CHANGED, CHANGEABLE[name])
        report: JsonObject = {"run": args.directory, "out": str(out), "from": args.step}
        report |= {"equal steps": count, "set": {name: value} if name else {}}
        if name:
            report |= _compare(out, args.step)
        if args.json:
            print_json(report)
        else:
            _print_report(report)


def _read_change(given: Sequence[str] | None) -> tuple[str, str]:
    """(name, value) of --set; two empty texts without it. ConfigError."""
    if not given:
        return "", ""
    if len(given) > 1:
        raise ConfigError(
            f"--set must be given once, got {len(given)}: two changes at a time have no cause each"
        )
    name, equals, value = given[0].partition("=")
    name = name.replace("-", "_")
    if not equals or not value or not name:
        raise ConfigError(f"--set must be name=value, such as lr=0.001, got {given[0]!r:.100}")
    if name not in CHANGEABLE:
        raise ConfigError(
            f"--set {name:.60} cannot change between steps: choose among {', '.join(CHANGEABLE)}"
        )
    return name, value


def parse_command(
    words: Sequence[str], run: Path, checkpoint: Path | None, threads: int | None
) -> Args:
    """The options of a run's command, to go on from its checkpoint."""
    parser = Parser(prog="minilora finetune", allow_abbrev=False)
    parser.words = words
    add_finetune_options(parser)
    option(parser, "--debug", "as of every command")
    args, unknown = parser.parse_known_args(hyphenate(words[1:]))
    if unknown:
        raise ConfigError(f"{run}: its command has unknown arguments: {' '.join(unknown):.100}")
    args.resume = None if checkpoint is None else str(checkpoint)
    args.out = str(run)
    args.threads = threads
    args.download = False
    args.ranks = Alone()
    return args


def _require_possible(
    changed_args: Args, run: Path, checkpoint: Path | None, step: int, name: str, value: str
) -> None:
    """ConfigError unless the changed run can go on from the checkpoint, with a step to take."""
    if changed_args.steps <= step:
        raise ConfigError(
            f"--set {name}={value:.60} leaves no step to take after --from {step}: give at least "
            f"steps={step + 1}, or an earlier step to start from"
        )
    identity = _identity(changed_args)
    try:
        require_replayable(run, checkpoint, identity, CHANGEABLE[name])
    except CheckpointError as error:
        raise ConfigError(
            f"--set {name}={value:.60} changes what step {step} has behind it: {error}; here, "
            "change something else, or start from an earlier step"
        ) from None


def _identity(args: Args) -> JsonObject:
    """What makes a run with these options the run that it is."""
    from ..training.run import Run

    with contextlib.redirect_stderr(io.StringIO()):  # notes that come again when it trains
        ready = prepare_finetune(args)
    beginning = ready.model, ready.tokens, ready.settings, os.devnull
    return Run(*beginning, ready.origin, held_out=ready.options["held_out"]).identity


def _go_on(
    prepared: Prepared,
    out: Path,
    checkpoint: Path | None,
    title: str,
    changed: Sequence[str] = (),
) -> None:
    """Train from a checkpoint to the end, without new checkpoints."""
    from ..training.loop import train

    settings = dataclasses.replace(prepared.settings, save_every=None)
    options = {**prepared.options, "resume": checkpoint, "title": title, "changed": changed}
    train(prepared.model, prepared.tokens, settings, out, **options)


@contextlib.contextmanager
def _new_folder(given: str | None) -> Iterator[Path]:
    with locked(given or numbered_folder("runs", "replay")) as out:
        require_empty(Path(out))
        yield Path(out)


@contextlib.contextmanager
def _quiet(is_json: bool) -> Iterator[None]:
    """With --json, standard output has the JSON alone."""
    with contextlib.redirect_stdout(io.StringIO()) if is_json else contextlib.nullcontext():
        yield


def _compare(out: Path, step: int) -> JsonObject:
    """The losses of both from a step on, and how far the changed one is from the twin."""
    report: JsonObject = {}
    for name, read in (("training", read_steps), ("held out", read_evaluations)):
        twin = {line["step"]: float(line["loss"]) for line in read(out / TWIN, step)}
        changed = {line["step"]: float(line["loss"]) for line in read(out / CHANGED, step)}
        report[name] = [
            {"step": at, TWIN: twin[at], CHANGED: changed[at], "difference": changed[at] - twin[at]}
            for at in sorted(twin.keys() & changed.keys())
        ]
    return report


def _print_report(report: JsonObject) -> None:
    count = report["equal steps"]
    steps = f"{count} {'step' if count == 1 else 'steps'} from step {report['from']}"
    print(f"the unchanged twin has the bits of the log: {steps}")
    for name, value in report["set"].items():
        print(printable(f"changed: {name} = {value}\n", "\n"))
        training, held_out = report["training"], report["held out"]
        shown = [training[0], training[-1]] if len(training) > 1 else training
        rows = [{"loss": "training", **row} for row in shown]
        rows += [{"loss": "held out", **row} for row in held_out]
        print_table([format_row(row) for row in rows])
        print("\nnats per token; the difference is what the change causes")
    print(printable(f"logs: {report['out']}"))


COMMANDS = (
    Command(
        replay,
        add_replay_options,
        "Repeat a run from a checkpoint with one thing changed, beside an unchanged twin.",
        "runs/finetune-001 --from 200 --set lr=0.0005",
    ),
)
