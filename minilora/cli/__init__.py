"""The command line: one file per group of commands, each command's options beside its function.

training   demo, pretrain, finetune
using      generate, evaluate
files      merge, combine, inspect, diff, extract, resize, convert: files in, files out
checking   verify, devices
reading    models and texts, as several commands read them
options    the parser, how a value is read, and options that several commands take

`main` is what the commands share: a mistake of the user ends in one line on stderr and an exit code
(errors.py), `--debug` shows a traceback, and a signal leaves no temporary file and no lock behind.
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

from .. import __version__
from ..display import printable
from ..errors import Interrupted, MiniloraError
from . import checking, files, training, using
from .options import HelpFormatter, Parser, hyphenate, option

COMMANDS = (*training.COMMANDS, *using.COMMANDS, *files.COMMANDS, *checking.COMMANDS)
SUCCESS, FAILED, IO = 0, 1, 4  # besides the exit codes in errors.py


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without Unicode shows an escape instead of ending in a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings(), _terminable():
        warnings.showwarning = lambda message, *rest: _print_error("warning", str(message))
        return _run(argv)


def build_parser() -> argparse.ArgumentParser:
    text = "LoRA from scratch in NumPy: train, adapt, look inside."
    parser = Parser(prog="minilora", description=text, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for run, add_options, text, example in COMMANDS:
        name = run.__name__
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=f"minilora {name} [options]",
            epilog=f"example: minilora {name} {example}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        add_options(command)
        option(command, "--debug", "show a traceback when something fails")
        command.set_defaults(run=run)
    return parser


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: first, temporary files and locks are removed."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    # A Python program that calls `main` may have its own handler, which stays.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: Sequence[str]) -> int:
    try:
        parser = build_parser()
        args = parser.parse_args(hyphenate(argv))
        if args.command is None:
            parser.print_help()
            parser.error("no command was given")
        args.run(args)
        sys.stdout.flush()
        return SUCCESS
    except BrokenPipeError:  # the reader of the output has gone, which is not a failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except (MiniloraError, OSError, MemoryError, KeyboardInterrupt) as error:
        if "--debug" in argv:
            raise
        return _report(error)


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
        text = error.strerror or str(error)
        _print_error("error", f"{text}: {error.filename!r}" if error.filename else text)
        return IO
    _print_error("error", str(error) or "out of memory")
    return FAILED


def _print_error(kind: str, text: str) -> None:
    """Print an error or a warning to stderr as one line, without its middle if it is long."""
    line = printable(text)
    if len(line) > 480:
        line = f"{line[:240]} ... {line[-230:]}"
    with contextlib.suppress(OSError):  # without a stderr, the exit code still tells
        print(f"minilora: {kind}: {line}", file=sys.stderr)
