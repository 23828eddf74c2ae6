"""Ends every process of a run that has been killed, and removes its scratch folder.

    python guard.py MARK FOLDER    with standard input from a pipe whose other end the run holds

Every process of a run has an environment variable of a name that no other run has, its mark: so
they are found whatever process started them, and whatever process group or session they are in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def find_processes(mark: str) -> list[int]:
    """The processes that began with an environment variable of this name."""
    wanted = f"{mark}=".encode()
    found: list[int] = []
    proc = Path("/proc")
    for entry in proc.iterdir() if proc.exists() else ():
        # Processes end meanwhile, and those of others may not be read.
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                variables = (entry / "environ").read_bytes().split(b"\0")
                if any(variable.startswith(wanted) for variable in variables):
                    found.append(int(entry.name))
    return found


def end_processes(mark: str, patience: float = 10.0) -> None:
    """Kill them until none is left, since one may start another before it ends."""
    last = time.monotonic() + patience
    while (processes := find_processes(mark)) and time.monotonic() < last:
        for process in processes:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def main() -> None:
    mark, folder = sys.argv[1:]
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.stdin.buffer.read()  # until the run closes the pipe, or has ended in whatever way
    end_processes(mark)
    time.sleep(0.1)  # a process that the run was about to start when it was killed
    end_processes(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
