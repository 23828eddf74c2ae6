"""The process that runs what files bring along: chat templates and tokenizers of unknown origin.

`sandboxed.py` is the program of that process, and says what it may do. This file is our side:
questions out, answers in, and an end to what takes too long. A tokenizer.json needs the same
limits as a template: its rules of replacement can double a text a thousand times, and its patterns
can take years. No check of the file could tell, since what such a rule costs depends on the text.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..formats.disk import name_errors

PROGRAM = Path(__file__).with_name("sandboxed.py")
WAITS = 6  # an answer may take this many times its processor time by the clock
ENVIRONMENT = {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}


class Sandbox:
    """A process of limited rights: it starts with the first question, and again after it was ended.

    where     what it runs, for the beginning of messages
    program   what it runs: {"template": text, "given": variables} or {"tokenizer": bytes}
    seconds   processor time that it may take, besides what each question allows
    memory    bytes of address space, likewise

    It ends with `close`, with this object, or with the whole program.
    """

    def __init__(self, where: str, program: dict[str, Any], seconds: float, memory: int):
        self.where = where
        self.program = program
        self.limits = {"seconds": seconds, "memory": memory}
        self.patience = WAITS * seconds
        self.process: Any = None
        self._end: Any = None
        self._one_at_a_time = threading.Lock()

    def ask(self, question: dict[str, Any], seconds: float, memory: int = 0) -> Any:
        """The answer to a question, which may take so many seconds and bytes more than the start.

        A field of the question may be bytes.
        DataError if the process reports an error, or if it has ended because of its limits.
        """
        with self._one_at_a_time:
            try:
                line = self._answer({**question, "seconds": seconds, "memory": memory})
                if not line.endswith(b"\n"):
                    raise DataError(f"{self.where} takes too much time or memory: {self._reason()}")
            except BaseException:
                self.close()  # or a late answer would be taken for that to the next question
                raise
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise DataError(self.where + answer["error"])
        return answer

    def _answer(self, question: dict[str, Any]) -> bytes:
        """The line of an answer; empty or cut if the process has ended."""
        if self.process is None:
            self._start()
        timer = threading.Timer(self.patience + WAITS * question["seconds"], self.process.kill)
        try:
            timer.start()
            self._write(question)
            line: bytes = self.process.stdout.readline()
        finally:
            timer.cancel()
        return line

    def _reason(self) -> str:
        status = self.process.wait()
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"its process ended with {name}"

    def _start(self) -> None:
        pipe = subprocess.PIPE
        with name_errors(PROGRAM):  # too many open files, or processes
            self.process = subprocess.Popen(
                [sys.executable, "-IS", str(PROGRAM)],
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
            )
        self._end = weakref.finalize(self, _end_process, self.process)
        self._write({"path": sys.path, **self.limits, **self.program})

    def _write(self, fields: dict[str, Any]) -> None:
        """Write a line of JSON, then the bytes of the fields for which it gives their number."""
        payloads = {name: value for name, value in fields.items() if isinstance(value, bytes)}
        sizes = {name: len(data) for name, data in payloads.items()}
        line = json.dumps({**fields, **sizes, "payloads": [*payloads]}).encode() + b"\n"
        # A process that has ended reads nothing: then its answer is missing, which is reported.
        with contextlib.suppress(OSError):
            for data in (line, *payloads.values()):
                self.process.stdin.write(data)
            self.process.stdin.flush()

    def close(self) -> None:
        """End the process. The next question starts another."""
        if self.process is not None:
            self._end()
            self.process = None


def _end_process(process: Any) -> None:
    process.kill()
    process.communicate()  # closes the pipes, and waits for its end
