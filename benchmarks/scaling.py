"""Measure how a LoRA step's time and memory grow with tokens, context, width, depth, rank, threads.

    python benchmarks/scaling.py [--axes tokens,context,width,depth,rank,threads,long] [--rounds 3]
                                 [--steps 2] [--write]

Along each axis one property of the size `tiny` varies; the axis `long` has one sequence of 1,024
tokens, cut into parts, and varies the threads. Both axes of threads go up to the cores of the
machine, by powers of two. Beside `long` stands what parts.py computes for 4, 8 and 16 cores from
the times of the jobs of one thread. Every point is a separate process, so that
its peak memory is measured alone, and the points of an axis take turns as in peers.py: one step
that does not count, then `--steps` that do. Three conditions are checked; exit code 1 if one does
not hold:

    time     is linear in the tokens: from 1,024 to 65,536 tokens per step, the microseconds per
             token, compared round by round, differ by at most 15 %
    memory   is bounded by the shard: with 64 times the tokens the peak is at most 10 % higher, a
             part of which are the ids of the batch
    faults   after the first turn a step has few page faults, at every point

`--write` stores the result in benchmarks/results/scaling.json. Five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import parts
from peers import SIZES, Process, prepare

from minilora.threads import available_cores

RESULT = Path(__file__).parent / "results" / "scaling.json"
LINEAR = 0.15  # largest relative difference of the microseconds per token
GROWTH = 0.10  # of peak memory, from the fewest tokens to the most
FAULTS = 50  # per step, at most; it is thousands where memory is returned to the system


class Point(NamedTuple):
    """A size of peers.py with rank and threads."""

    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    batch: int
    context: int
    r: int = 8
    threads: int = 2

    @property
    def tokens(self) -> int:
        return self.batch * self.context


TINY = Point(*SIZES["tiny"])
LONG = Point(*parts.SIZES["long"])
THREADS = [1 << n for n in range(available_cores().bit_length())]
SIMULATED = [4, 8, 16]  # cores
AXES: dict[str, dict[int, Point]] = {
    "tokens": {
        n << 10: TINY._replace(batch=(n << 10) // TINY.context) for n in (1, 2, 4, 8, 16, 32, 64)
    },
    "context": {
        n: TINY._replace(context=n, batch=4096 // n) for n in (64, 128, 256, 512, 1024, 2048)
    },
    "width": {n: TINY._replace(width=n, mlp=3 * n, heads=n // 32) for n in (64, 128, 256, 512)},
    "depth": {n: TINY._replace(layers=n) for n in (2, 4, 8, 16)},
    "rank": {n: TINY._replace(r=n) for n in (2, 8, 32, 64)},
    "threads": {n: TINY._replace(threads=n) for n in THREADS},
    "long": {n: LONG._replace(threads=n) for n in THREADS},
}


def measure_axis(points: dict[int, Point], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per point of an axis; `over_last` is relative to the last point, per token."""
    running = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for value, point in points.items():
            work = Path(folder) / str(value)
            work.mkdir()
            # One batch only: more would count as memory.
            prepare(work, point[:7], "lora", point.r, count=1)
            process = Process("minilora", work, point.threads, args.timeout)
            running.append(stack.enter_context(process))
        for _ in range(args.rounds):
            for process in running:
                process.turn(args.steps)
    rows = []
    last_point = list(points.values())[-1]
    last = per_token(running[-1], last_point)
    for (value, point), process in zip(points.items(), running, strict=True):
        median = statistics.median(s for turn in process.turns for s in turn)
        ratios = [a / b for a, b in zip(per_token(process, point), last, strict=True)]
        faults = process.faults[args.steps :] or process.faults
        rows.append(
            {
                "value": value,
                "milliseconds": round(1e3 * median, 3),
                "microseconds_per_token": round(1e6 * median / point.tokens, 3),
                "over_last": round(statistics.median(ratios), 3),
                "peak_megabytes": round(process.peak / 2**20, 1),
                "faults_per_step": statistics.median(faults),
            }
        )
    return rows


def per_token(process: Process, point: Point) -> list[float]:
    """Seconds per token of each turn."""
    return [statistics.median(turn) / point.tokens for turn in process.turns]


def claims(axes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each condition with its measurement: {condition: {"measured", "limit", "holds"}}."""
    limits: dict[str, tuple[float, float]] = {}
    if rows := axes.get("tokens"):
        ratios = [row["over_last"] for row in rows]
        difference = max(ratios) / min(ratios) - 1
        limits["time linear in tokens: microseconds a token differ by"] = difference, LINEAR
        growth = rows[-1]["peak_megabytes"] / rows[0]["peak_megabytes"] - 1
        limits["memory bound by the shard: with 64 times the tokens it grows by"] = growth, GROWTH
    faults = max(row["faults_per_step"] for rows in axes.values() for row in rows)
    limits["page faults a step, at the worst point"] = faults, FAULTS
    result = {}
    for condition, (measured, limit) in limits.items():
        holds = measured <= limit
        result[condition] = {"measured": round(measured, 3), "limit": limit, "holds": holds}
    return result


def show(axis: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{axis:10}{'ms':>10}{'us/token':>10}{'/ last':>8}{'peak MB':>9}{'faults':>8}")
    for row in rows:
        print(
            f"{row['value']:<10}{row['milliseconds']:10.1f}{row['microseconds_per_token']:10.2f}"
            f"{row['over_last']:8.2f}{row['peak_megabytes']:9.1f}{row['faults_per_step']:8.0f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds that one answer may take"
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    names = args.axes.split(",")
    for name in names:
        if name not in AXES:
            parser.error(f"--axes: {name!r} is unknown; choose from {', '.join(AXES)}")
    begun = time.perf_counter()
    axes = {}
    for axis in names:
        axes[axis] = measure_axis(AXES[axis], args)
        show(axis, axes[axis])
    simulated = {}
    if "long" in names:
        simulated = parts.simulate("long", SIMULATED, args.rounds)
        for cores, row in simulated["cores"].items():
            print(
                f"{cores} cores, computed: {row['faster']:g} times as fast as the whole sequence "
                f"on one core, with --part {row['part']}"
            )
    checked = claims(axes)
    result = {
        "command": "python " + " ".join(["benchmarks/scaling.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "numpy": np.__version__,
        "seconds": round(time.perf_counter() - begun, 1),
        "size": dict(zip(TINY._fields, TINY, strict=True)),
        "claims": checked,
        "axes": axes,
        "simulated": simulated,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print()
    for condition, outcome in checked.items():
        verdict = "holds" if outcome["holds"] else "DOES NOT HOLD"
        print(f"{condition}: {outcome['measured']:g}, at most {outcome['limit']:g}: {verdict}")
    return 0 if all(outcome["holds"] for outcome in checked.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
