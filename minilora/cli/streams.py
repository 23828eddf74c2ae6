"""Standard output and standard error that may be closed, full, or gone.

A command that writes files (finetune, merge) prints a report: if that cannot be written, the
command goes on to its end. A command whose output is what it is for (inspect, generate) ends: with
exit code 0 if the reader has what it wanted (`minilora inspect base | head -1`), otherwise with
exit code 4.
"""

from __future__ import annotations

import errno
import os
import warnings
from contextlib import suppress
from typing import Any

CLOSED = "standard output is closed: give the command a file, a pipe or a terminal"


class Stream:
    """A text stream of this process; after a failure, what is written to it goes nowhere.

    stream   sys.stdout or sys.stderr, None if it was closed when Python started
    label    for messages: "standard output" or "standard error"
    needed   whether a failure is raised, or ignored
    error    the failure, if there was one
    """

    def __init__(self, stream: Any, needed: bool, label: str = "standard output"):
        self.stream = stream
        self.label = label
        self.needed = needed
        self.error: OSError | None = None
        if stream is None or stream.closed:
            self.error = OSError(errno.EBADF, CLOSED)

    def __getattr__(self, name: str) -> Any:  # encoding, fileno, ...
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return self.error is None and bool(self.stream.isatty())

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def require(self) -> None:
        """Raise the failure, if there was one, of a stream that is needed."""
        if self.needed and self.error is not None:
            raise self.error

    def _try(self, method: str, *arguments: str) -> None:
        if self.error is None:
            try:
                getattr(self.stream, method)(*arguments)
            except OSError as error:
                self.error = error
                if error.filename is None:
                    error.filename = self.label
                _discard(self.stream)
                if not self.needed and not isinstance(error, BrokenPipeError):
                    text = f"{error.strerror}: the rest of the output is lost, the command goes on"
                    warnings.warn(text, stacklevel=3)
        self.require()


def _discard(stream: Any) -> None:
    """Let what the stream has in its buffer go nowhere, or Python would complain at its end."""
    with suppress(OSError, ValueError):  # it may have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_descriptors() -> None:
    """Open the descriptors 0, 1 and 2 that are closed, on the null device.

    Otherwise the next file that is opened gets the number, and whatever C code prints goes into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
