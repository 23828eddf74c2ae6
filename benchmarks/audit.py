"""Measure `minilora audit`: memory, speed beside `minilora merge`, and 1,000 random merges.

    python benchmarks/audit.py [--size 200m|1b|3b|7b] [--threads K] [--random N] [--scratch DIR]
                               [--write]

It makes the checkpoint and the adapter of benchmarks/merge.py, merges them with `minilora merge`,
and audits the result, each in a process of its own. Then it explains N random merges of one weight
(tests/support/merges.py): 64 to 256 rows and columns, three dtypes, four arithmetics, |dW| / |W|
from 1e-4 to 1e-1, weights that are subnormal among them.

Four conditions are checked; exit code 1 if one does not hold:

    verdict  the merge is right, and after one number is changed it is not
    memory   the peak (VmHWM) is below 0.4 GB
    speed    an audit takes at most 1.5 times as long as the merge
    random   what was done is among the hypotheses of the verdict, in each of the N merges

`--write` stores the numbers in benchmarks/results/audit.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from merge import SIZES, make, merge_command, timed

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "audit.json"
MAX_MEMORY = 0.4e9  # bytes
MOST_TIME = 1.5  # of a merge's


def audit_command(folder: Path, threads: int) -> list[str]:
    """The command that audits folder/merged."""
    command = [sys.executable, "-m", "minilora", "audit", "--threads", str(threads)]
    for name in ("base", "adapter", "merged"):
        command += [f"--{name}", str(folder / name)]
    return [*command, "--json"]


def change_one_number(folder: Path) -> None:
    """Flip a bit of the last number of the last shard of folder/merged."""
    shard = max((folder / "merged").glob("*.safetensors"))
    with open(shard, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def measure_files(size: str, threads: int, scratch: Path | None) -> dict[str, Any]:
    """Seconds and peaks of a merge and of its audit, and whether a changed number is seen."""
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        folder = Path(temporary)
        make(folder, size)
        merge_seconds, merge_peak = timed(*merge_command(folder, folder / "merged", threads))
        audit_seconds, audit_peak = timed(*audit_command(folder, threads))
        change_one_number(folder)
        changed = subprocess.run(audit_command(folder, threads), capture_output=True, check=False)
    return {
        "size": size,
        "threads": threads,
        "merge": {"seconds": merge_seconds, "bytes": merge_peak},
        "audit": {"seconds": audit_seconds, "bytes": audit_peak},
        "sees a changed number": changed.returncode == 1,
    }


def measure_random(count: int) -> dict[str, Any]:
    """How many random merges have a false verdict, and how many have one hypothesis only."""
    sys.path[:0] = [str(ROOT / "tests" / "support")]
    import merges

    false, unique = [], Counter[str]()
    for seed in range(count):
        drawn = merges.draw(seed)
        names = merges.explain_drawn(drawn).survivors()
        if drawn.kind not in names:
            false.append(seed)
        unique[drawn.dtype] += len(names) == 1
    return {"merges": count, "false verdicts": false, "one hypothesis": dict(unique)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--random", type=int, default=1000)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    files = measure_files(args.size, args.threads, args.scratch)
    result = {**files, "random": measure_random(args.random)}
    ratio = files["audit"]["seconds"] / files["merge"]["seconds"]
    conditions = {
        "verdict": files["sees a changed number"],
        "memory": files["audit"]["bytes"] < MAX_MEMORY,
        "speed": ratio <= MOST_TIME,
        "random": not result["random"]["false verdicts"],
    }
    print(json.dumps(result, indent=2))
    for name, holds in conditions.items():
        print(f"{name:8} {'holds' if holds else 'DOES NOT HOLD'}")
    if args.write:
        RESULT.write_text(json.dumps({**result, "conditions": conditions}, indent=2) + "\n")
    return 0 if all(conditions.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
