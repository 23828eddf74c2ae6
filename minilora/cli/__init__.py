"""The command line: demo, pretrain, finetune, generate, evaluate, merge, combine, inspect, diff, extract, ...

options    the options of every command, and how each is read
commands   a function each, which turns options into calls of the rooms below
files      both, for the commands that need files alone
shown      tables, and text that cannot steer a terminal

Here is what they share: a user's mistake ends in one line on stderr and an exit code (errors.py), `--debug` shows where
it came from, and a signal leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import Interrupted, MiniloraError
from .commands import COMMANDS
from .options import build_parser, hyphens

PATHS = (
    "base",
    "adapter",
    "data",
    "eval_data",
    "out",
    "resume",
    "pretrain_data",
    "adapt_data",
    "directory",
    "other",
    "tuned",
    "plot",
)
SUCCESS, FAILED, IO = 0, 1, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a terminal without Unicode shows an escape, and no traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: _tell("warning", str(message))
        with _terminable():
            return _run(argv, debug)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: temporary files and the lock of a folder are removed first."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if ours:  # whoever calls us from Python may have plans of their own
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: Sequence[str], debug: bool) -> int:
    try:
        parser = build_parser()
        args = parser.parse_args(hyphens(argv))
        if args.command is None:
            parser.print_help()
            parser.error("no command was given")
        given = [(name, getattr(args, name, None)) for name in PATHS]
        given += [("tasks", path) for path in getattr(args, "tasks", None) or ()]
        given += [("adapter", path) for path in getattr(args, "adapters", None) or ()]
        for name, path in given:
            if path is not None and (
                not path or "\0" in path
            ):  # "" is what a shell makes of an unset variable
                flag = "DIR" if name in ("directory", "other") else f"--{name.replace('_', '-')}"
                parser.error(f"argument {flag}: {path!r} is no path")
        COMMANDS[args.command](args)
        sys.stdout.flush()
        return SUCCESS
    except BrokenPipeError:  # the reader of our output has gone: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except (MiniloraError, OSError, MemoryError, KeyboardInterrupt) as error:
        if debug:
            raise
        if isinstance(error, KeyboardInterrupt):
            print("\nminilora: interrupted", file=sys.stderr)
            return 128 + (error.args[0] if error.args else signal.SIGINT)
        text = str(error) if isinstance(error, MiniloraError) else _os_message(error)
        _tell("interrupted" if isinstance(error, Interrupted) else "error", text)
        return (
            error.exit_code
            if isinstance(error, MiniloraError)
            else IO
            if isinstance(error, OSError)
            else FAILED
        )


def _os_message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    return str(error) or "out of memory"


def _tell(kind: str, text: str) -> None:
    """An error or a warning: one line on stderr, its middle left out if it is long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    line = line if len(line) <= 480 else f"{line[:240]} ... {line[-230:]}"
    with contextlib.suppress(OSError):  # there is nobody left to tell; the exit code still does
        print(f"minilora: {kind}: {line}", file=sys.stderr)
