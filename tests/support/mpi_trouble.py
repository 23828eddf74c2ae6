"""The command line with trouble on one rank: `python -m mpi4py mpi_trouble.py KIND RANK ARGUMENTS`.

KIND   kill, raise, error, exit, _exit: at step 3, before its gradients; wait: at step 3 all ranks
       write the numbers of their processes into files, wait for the file `go`, and take a while for
       each further step; version: another version of minilora; weights: another weight after the
       first step
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import minilora.cli
import minilora.training.run
from minilora.errors import DataError
from minilora.training.ranks import launched

AT = 3
plain = minilora.training.run.Run.step


def trouble(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise ZeroDivisionError("a mistake")
    elif kind == "error":
        raise DataError("a bad batch")
    elif kind == "exit":
        sys.exit(3)
    elif kind == "_exit":
        os._exit(3)


def main(kind: str, rank: int, argv: list[str]) -> int:
    here, _ = launched()

    def step(self, sharded):
        if kind == "wait" and self.done == AT:
            Path(f"process-{here}").write_text(str(os.getpid()))
            while not Path("go").exists():
                time.sleep(0.02)
        elif kind == "wait" and self.done > AT:
            time.sleep(0.05)
        elif here == rank and self.done == AT:
            trouble(kind)
        line = plain(self, sharded)
        if kind == "weights" and here == rank and self.done == 1:
            self.optimizer.params[0].data = self.optimizer.params[0].data + 1e-3
        return line

    minilora.training.run.Run.step = step
    if kind == "version" and here == rank:
        minilora.cli.__version__ = "0.0.1"
    return minilora.cli.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
