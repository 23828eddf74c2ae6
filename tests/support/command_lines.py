"""Command lines run in this process: their exit code and what they print."""

from __future__ import annotations

import contextlib
import io
import shlex

from minilora.cli import main


def run(line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    return run_words(shlex.split(line))


def run_words(words: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of words that a shell need not split."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def ok(line: str) -> str:
    """stdout of a command that succeeds."""
    code, out, err = run(line)
    assert code == 0, err
    return out


def refused(line: str, code: int, *words: str) -> None:
    """The line ends with this code and one message that has the words."""
    result, _, err = run(line)
    assert result == code, err
    last = err.splitlines()[-1]
    assert "Traceback" not in err
    assert all(word in last for word in words), last
