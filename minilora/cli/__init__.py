"""The command line: one file per group of commands, each command's options beside its function.

training   demo, pretrain, finetune
sweep      sweep: finetune at each point of a grid of options
grid       the axes of that grid
reporting  what pretrain and finetune show at their end
using      generate, evaluate
chatting   generate --chat: a conversation on standard input
graphing   graph: a layer or a block as it was computed
files      merge, combine, inspect, diff, extract, resize, convert: files in, files out
auditing   audit
explaining compare: how two adapters overlap and interfere
measuring  what a model does to a text by windows: for compare, and for inspect --data
planning   plan: what a run of finetune would take
checking   verify, devices
lab        lab: claims about LoRA measured
reading    models and texts, as several commands read them
preparing  what finetune trains, from its options
rates      lab rates, finetune --lr auto: a learning rate from short runs
replaying  replay: a run once more, with one thing changed
page       report: one page about a run or an adapter
sources    what such a page is made from
continuing finetune --adapter: training goes on from an adapter
fields     options for fields that only some methods have
options    the parser, how a value is read, and options that several commands take
streams    standard output and standard error that may be closed, full, or gone

`main` is what the commands share: a mistake of the user ends in one line on stderr and an exit code
(errors.py), `--debug` shows a traceback, and a signal leaves no temporary file and no lock behind.
Processes that mpiexec has started together end together, and rank 0 alone prints.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..display import printable
from ..errors import ConfigError, Interrupted, MiniloraError, describe_os_error
from ..training.ranks import Alone, Ranks, connect, launched
from ..training.signals import HANGUP, USER
from . import (
    auditing,
    checking,
    explaining,
    files,
    graphing,
    lab,
    page,
    planning,
    replaying,
    sweep,
    training,
    using,
)
from .options import HelpFormatter, Parser, hyphenate, option
from .streams import Stream, open_descriptors

COMMANDS = (
    *training.COMMANDS,
    *planning.COMMANDS,
    *sweep.COMMANDS,
    *replaying.COMMANDS,
    *page.COMMANDS,
    *using.COMMANDS,
    *files.COMMANDS,
    *graphing.COMMANDS,
    *auditing.COMMANDS,
    *explaining.COMMANDS,
    *checking.COMMANDS,
    *lab.COMMANDS,
)
SUCCESS, FAILED, IO = 0, 1, 4  # besides the exit codes in errors.py
# What a rank may have of its own; the other arguments are options, alike on all ranks.
OWN = ("device", "threads", "debug", "parser", "run", "prints", "has_ranks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    open_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without Unicode shows an escape instead of ending in a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    stdout = Stream(sys.stdout, needed=True)  # for --help, too
    stderr = Stream(sys.stderr, needed=False, label="standard error")
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(),
        _terminable(),
    ):
        warnings.showwarning = lambda message, *rest: _print_error("warning", str(message))
        rank, _ = launched()
        if rank == 0:
            return _run(argv, stdout, stderr)
        null = Stream(nowhere, needed=True)
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            return _run(argv, null, stderr)


def build_parser(argv: Sequence[str] | None = None) -> Parser:
    """The parser of all commands; with `argv`, only the commands that it names have their options.

    To add the options of all commands takes longer than to read those that were given.
    """
    text = "LoRA from scratch in NumPy: train, adapt, look inside."
    parser = Parser(prog="minilora", description=text, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        name = command.run.__name__
        launcher = "[mpiexec -n N python -m mpi4py -m] " if command.has_ranks else ""
        its = commands.add_parser(
            name,
            help=command.text,
            description=command.text,
            usage=f"{launcher}minilora {name} [options]",
            epilog=f"example: minilora {name} {command.example}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        its.words = argv or ()
        its.set_defaults(
            parser=its, run=command.run, prints=command.prints, has_ranks=command.has_ranks
        )
        if argv is None or name in argv:
            command.add_options(its)
        option(its, "--debug", "show a traceback when something fails")
    return parser


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGUSR1 end a command as Ctrl-C does, and leave no lock behind."""

    def stop(number: int, frame: Any) -> None:
        if number in (HANGUP, USER):  # a second one may come while temporary files are removed
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        # A Python program that calls `main` may have its own handler, which stays; and `nohup` has
        # SIGHUP ignored.
        ending = [number for number in (signal.SIGTERM, HANGUP, USER) if number is not None]
        numbers = [number for number in ending if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run(argv: Sequence[str], stdout: Stream, stderr: Stream) -> int:
    """Run a command on this rank; returns the exit code.

    stderr   where a rank says why it has failed if the others cannot know
    """
    ranks: Ranks = Alone()
    code = FAILED
    try:
        ranks = connect()
        with ranks:
            _run_command(argv, stdout, ranks)
        code = SUCCESS
    except (MiniloraError, OSError, MemoryError, KeyboardInterrupt) as error:
        is_ours = error is stdout.error or ranks.rank > 0
        if is_ours and isinstance(error, BrokenPipeError):
            code = SUCCESS  # the reader of the output has all that it wanted
        elif "--debug" in argv:
            raise
        else:
            with contextlib.redirect_stderr(stderr if ranks.is_lost else sys.stderr):
                code = _report(error)
    except SystemExit as error:  # after --help
        code = error.code if isinstance(error.code, int) else SUCCESS
        raise
    finally:  # also of --help, and of what was printed before an error
        stdout.needed = False
        stdout.flush()
        ranks.close(code)
    return code


def _run_command(argv: Sequence[str], stdout: Stream, ranks: Ranks) -> None:
    parser = build_parser(argv)
    args = _parse(parser, argv, stdout)
    if args.command is None:
        parser.print_help()
        parser.error("no command was given")
    if ranks.size > 1:
        _require_ranks(args, ranks)
    args.ranks = ranks
    if getattr(args, "device", None) == "cuda:local":
        args.device = f"cuda:{ranks.local_rank}"
    stdout.needed = args.prints
    stdout.require()  # before anything is computed
    args.run(args)
    stdout.flush()


def _require_ranks(args: argparse.Namespace, ranks: Ranks) -> None:
    """ConfigError for a command that one process runs, and for ranks that differ."""
    if not args.has_ranks:
        several = ", ".join(command.run.__name__ for command in COMMANDS if command.has_ranks)
        raise ConfigError(
            f"mpiexec started {args.command} {ranks.size} times, but one process runs it: "
            f"start it without mpiexec, which is for {several}"
        )
    own = {"minilora": __version__, "numpy": np.__version__, "the command": args.command}
    for name, value in vars(args).items():
        if name not in OWN:
            own[f"--{name.replace('_', '-')}"] = str(value)
    ranks.require_same(own, "start all ranks with the same command, options and versions")


def _parse(parser: Parser, argv: Sequence[str], stdout: Stream) -> argparse.Namespace:
    try:
        args, unknown = parser.parse_known_args(hyphenate(argv))
    except SystemExit:  # after --help or --version, whose text argparse has printed
        stdout.flush()
        raise
    if unknown:  # said by the command's own parser, whose help has the options
        named = args.parser if args.command else parser
        named.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _report(error: BaseException) -> int:
    """Print what went wrong; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("\nminilora: interrupted", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    if isinstance(error, MiniloraError):
        kind = "interrupted" if isinstance(error, Interrupted) else "error"
        _print_error(kind, str(error))
        return error.exit_code
    if isinstance(error, OSError):
        if isinstance(error, FileNotFoundError) and not _has_current_folder():
            error.strerror = "the current folder no longer exists: change to another one"
        _print_error("error", describe_os_error(error))
        return IO
    _print_error("error", str(error) or "out of memory")
    return FAILED


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _print_error(kind: str, text: str) -> None:
    """Print an error or a warning to stderr as one line, without its middle if it is long."""
    line = printable(text)
    if len(line) > 480:
        line = f"{line[:240]} ... {line[-230:]}"
    print(f"minilora: {kind}: {line}", file=sys.stderr)
