"""The program: `python -m minilora`, and the command `minilora`.

Nothing is imported before `main` runs but what Python has imported anyway: NumPy alone takes longer
than a user who has made a mistake needs to press Ctrl-C. (While Python itself starts, before this
file, Ctrl-C still shows a traceback.)
"""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130  # 128 + SIGINT
FAILED = 1


def _exit(*_: object) -> None:
    """End at once: there is nothing to save, and a traceback would say nothing."""
    try:
        os.write(2, b"\nminilora: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


try:
    import signal
except KeyboardInterrupt:  # even this import takes some milliseconds
    _exit()


def _refuse(error: BaseException) -> int:
    """Say why the program cannot be imported: NumPy's own message has forty lines."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    reason = ascii(f"{type(error).__name__}: {' '.join(str(error).split())}")
    advice = "look at the installed packages and the environment; --debug shows a traceback"
    import contextlib

    with contextlib.suppress(OSError):  # it may be closed: then the exit code says it
        os.write(2, f"minilora: error: cannot start: {reason:.300}: {advice}\n".encode())
    return FAILED


def main() -> int:
    """Run the command line; returns the exit code."""
    # SIGINT is ignored in the background of a script: that stays.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _exit)
    try:
        from .cli import main as run
    except Exception as error:  # whatever is missing or broken on this machine
        if "--debug" in sys.argv:
            raise
        return _refuse(error)
    try:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:  # just before the command or just after it
        if "--debug" in sys.argv:
            raise
        _exit()
        return INTERRUPTED
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, _exit)


if __name__ == "__main__":
    sys.exit(main())
