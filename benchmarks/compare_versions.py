"""Time two checkouts of minilora against each other: training steps, decoding, and a merge.

    python benchmarks/compare_versions.py OLD NEW [--sizes tiny,small]
        [--methods lora,dora,adalora,full,generate] [--merge 1b] [--rounds 5] [--steps N]
        [--threads 2] [--scratch DIR] [--write]

OLD and NEW are folders with a copy of this repository. In every round each checkout takes one turn
in a fresh process, which runs the checkout's benchmarks/peers.py over the checkout's package; OLD
and NEW start the rounds alternately. A turn is one step that does not count and `--steps` steps
that do. Both checkouts read the same base, adapter and batches, and their losses (or tokens) are
compared: "equal" means equal in every bit. `--merge SIZE` times `minilora merge` in the same way on
the checkpoint that benchmarks/merge.py makes, and compares the bytes of the merged files;
`--merge none` leaves it out.

The printed columns are the median seconds of OLD and NEW, and the median and the upper quartile of
the ratios NEW / OLD of each round: below 1, NEW is faster. On a machine that is shared the ratios
say more than the times. `--write` stores them in benchmarks/results/versions.json.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge
import numpy as np
import peers

# Method -> the method of peers.py that prepares its files, the contender.
METHODS = {
    "lora": ("lora", "minilora"),
    "dora": ("family", "minilora-dora"),
    "adalora": ("family", "minilora-adalora"),
    "full": ("full", "minilora"),
    "generate": ("generate", "minilora"),
}
RESULT = Path(__file__).parent / "results" / "versions.json"
Turn = Callable[[Path], tuple[float, Any]]  # checkout -> seconds, the result to compare


def alternate(old: Path, new: Path, rounds: int, turn: Turn) -> tuple[list[list[float]], bool]:
    """[seconds of OLD, seconds of NEW], one value per round, and whether all results are equal."""
    seconds: list[list[float]] = [[], []]
    results = []
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            measured, result = turn((old, new)[side])
            seconds[side].append(measured)
            results.append(result)
    return seconds, all(result == results[0] for result in results)


def compare_steps(size: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    prepared, contender = METHODS[method]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        work = Path(folder)
        peers.prepare(work, peers.SIZES[size], prepared)

        def turn(checkout: Path) -> tuple[float, Any]:
            time.sleep(peers.PAUSE)
            with peers.Process(contender, work, args.threads, args.timeout, checkout) as process:
                process.turn(args.steps or peers.STEPS.get(size, 1))
            return statistics.median(process.turns[0]), process.results

        seconds, equal = alternate(args.old, args.new, args.rounds, turn)
    return show(f"{size} {method}", seconds, equal)


def compare_merges(size: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        merge.make(folder, size)
        reference = folder / "reference"

        def turn(checkout: Path) -> tuple[float, Any]:
            """The result to compare: the files that differ from those of the first merge."""
            out = folder / "merged"
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            command = merge.merge_command(folder, out, args.threads)
            seconds, _ = merge.timed(*command, environment=environment)
            if not reference.exists():
                out.rename(reference)
                return seconds, []
            names = [path.name for path in reference.glob("*.safetensors")]
            _, different, missing = filecmp.cmpfiles(reference, out, names, shallow=False)
            shutil.rmtree(out)
            return seconds, different + missing

        seconds, equal = alternate(args.old, args.new, args.rounds, turn)
    return show(f"merge {size}", seconds, equal)


def show(name: str, seconds: list[list[float]], equal: bool) -> dict[str, Any]:
    """Print and return the medians, and the median and upper quartile of the ratios of a round."""
    old, new = seconds
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    row = {
        "old seconds": round(statistics.median(old), 5),
        "new seconds": round(statistics.median(new), 5),
        "median ratio": round(statistics.median(ratios), 3),
        "upper quartile": round(float(np.quantile(ratios, 0.75)), 3),
        "results": "equal" if equal else "DIFFERENT",
    }
    times = f"{row['old seconds']:11.4f}{row['new seconds']:11.4f}"
    quantiles = f"{row['median ratio']:11.3f}{row['upper quartile']:11.3f}"
    print(f"{name:16}{times}{quantiles}   {row['results']}", flush=True)
    return {"what": name, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--sizes", default="tiny,small")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--merge", choices=["none", *merge.SIZES], default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds that one answer may take"
    )
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    methods = args.methods.split(",") if args.methods else []
    sizes = args.sizes.split(",")
    for name in methods:
        if name not in METHODS:
            parser.error(f"--methods: {name!r} is unknown; choose from {', '.join(METHODS)}")
    for size in sizes:
        if size not in peers.SIZES:
            parser.error(f"--sizes: {size!r} is unknown; choose from {', '.join(peers.SIZES)}")
    args.old = args.old.resolve()
    args.new = args.new.resolve()
    for checkout in (args.old, args.new):
        if not (checkout / "benchmarks" / "peers.py").exists():
            parser.error(f"{checkout} has no benchmarks/peers.py; give a checkout of minilora")
    titles = "".join(f"{title:>11}" for title in ("old s", "new s", "new / old", "quartile"))
    print(f"{'':16}{titles}   results", flush=True)
    rows = [compare_steps(size, method, args) for size in sizes for method in methods]
    if args.merge != "none":
        rows.append(compare_merges(args.merge, args))
    if args.write:
        commits = {"old": commit(args.old), "new": commit(args.new)}
        machine = {"cores": os.cpu_count(), "numpy": np.__version__}
        run = {**commits, **machine, "rounds": args.rounds, "date": time.strftime("%Y-%m-%d")}
        RESULT.write_text(json.dumps({**run, "rows": rows}, indent=2) + "\n")


def commit(checkout: Path) -> str:
    """The checkout's last commit; "+" after it says that its files have changed since."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
