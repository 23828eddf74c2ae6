"""Check minilora on this machine's GPU, and time a LoRA step beside PyTorch + peft.

    python3 benchmarks/gpu_check.py --quick --out DIR
        in at most 3 minutes: the machine, the least that a launch costs, the tests marked gpu, a
        LoRA step at two sizes, and whether a captured step's replay has an eager step's bits
    python3 benchmarks/gpu_check.py --out DIR
        in at most 8 minutes, the rest: CPU against GPU over 200 steps; two larger sizes;
        evaluation, generation; DoRA, AdaLoRA, NF4; PyTorch, eager and compiled; TF32, workspaces
    python3 benchmarks/gpu_check.py --only ours:gpt2 variant:tf32 --out DIR
        some parts, by name
    python3 benchmarks/gpu_check.py --count
        what a step asks of the device, by size, as one line of JSON, the last one; without a GPU
        on an emulated device (tests/cupy_on_cpu), for which the numbers are the same
    python3 benchmarks/gpu_check.py --rehearse [--quick] [--out DIR]
        all of it with small sizes on the emulated device; times then mean nothing

Each part is a process of its own with a time limit: if it fails, crashes or hangs, that is recorded
and the others run. As soon as a part has ended, DIR/gpu-check.json is written anew (a temporary
file, then a rename) and a line of JSON is printed; what the parts print is in DIR/parts.log. So
nothing is lost when the time is over or this process is killed (what the part that ran then had
found is in DIR/running-part.json), and no process is left. Both calls may use the same DIR. Without
--out, DIR is benchmarks/results; a rehearsal then only prints.

Exit code 0 if all is well, and without a GPU, when the reason is printed; 1 if a part failed;
2 for wrong usage; 4 if DIR cannot be written. To start it, Python and the packages numpy and cupy
are enough: what a part needs besides is skipped where it is missing, or named.

Timed steps wait for the device before the clock stops. Everything is float32 without TF32, unless
its name says so. The machine is measured as it is: nothing here tunes it. gpu/plan.py has the parts
in order, with their limits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gpu import conducting, part, plan
from gpu.conducting import Facts

BEGUN = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# A process that has been started on an emulated device passes the emulation on to this one.
ASK = """
import sys
from minilora.backend import get_backend
get_backend("cuda")
if "cupy_on_cpu" in sys.modules:
    sys.exit("CuPy is emulated in this environment (PYTHONPATH): use --rehearse")
"""
PATIENCE = 60  # seconds for a driver to say whether there is a GPU


def why_no_gpu() -> str | None:
    """Why this machine's GPU cannot be used, or None. Another process asks: a driver can hang."""
    command = [sys.executable, "-c", ASK]
    environment = {**os.environ, "PYTHONPATH": search_path()}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"the driver did not answer within {PATIENCE} seconds"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return None if done.returncode == 0 else lines[-1].split("DeviceError: ")[-1]


def why_no_emulation() -> str | None:
    """Why CuPy cannot be emulated here, or None."""
    sys.path.insert(0, str(ROOT / "tests"))
    from cupy_on_cpu.packages import why_not

    return why_not()


def search_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def choose_parts(arguments: argparse.Namespace) -> tuple[plan.Plan, int]:
    """The parts to run with their limits, and the seconds for all of them."""
    every = {**plan.QUICK, **plan.REST}
    if arguments.only:
        chosen = {name: every[name] for name in every if name in arguments.only}
        total = max(plan.LONGEST.values())
    elif arguments.quick:
        chosen, total = plan.QUICK, plan.LONGEST["quick"]
    else:
        chosen, total = plan.REST, plan.LONGEST["rest"]
    slower = plan.REHEARSAL_IS_SLOWER if arguments.rehearse else 1
    return {name: slower * limit for name, limit in chosen.items()}, slower * total


def part_command(folder: Path, options: list[str]) -> conducting.Command:
    def command(name: str, notes: Path, seconds: float) -> list[str]:
        values = {"--part": name, "--notes": notes, "--seconds": f"{seconds:.1f}"}
        given = [str(item) for pair in values.items() for item in pair]
        return [sys.executable, __file__, *given, "--folder", str(folder), *options]

    return command


def check(arguments: argparse.Namespace) -> int:
    """Run the parts; 0 if all are well."""
    parts, total = choose_parts(arguments)
    with conducting.guarded() as (scratch, mark):
        out = arguments.out or (scratch / "out" if arguments.rehearse else RESULTS)
        try:
            out.mkdir(parents=True, exist_ok=True)
            open(out / conducting.LOG, "ab").close()
        except OSError as error:
            print(f"--out {out}: {error.strerror or error}; name a folder that can be written")
            return 4
        facts: Facts = {
            "command": " ".join(["python3", "benchmarks/gpu_check.py", *sys.argv[1:]]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "rehearsal": arguments.rehearse,
            "sources": conducting.source_digest(ROOT),
            "finished": False,
        }
        report = conducting.Report(out, facts)
        command = part_command(scratch, ["--rehearse"] * arguments.rehearse)
        try:
            conducting.run(parts, command, report, mark, BEGUN + total)
        except KeyboardInterrupt:
            return 130  # all that ended is written
        well = report.finish(
            seconds=round(time.monotonic() - BEGUN, 1),
            losses_differ_from_ours_by=compare_with_pytorch(report.parts),
        )
    return 0 if well else 1


def compare_with_pytorch(parts: Mapping[str, Facts]) -> dict[str, float]:
    """The largest relative difference of PyTorch's first losses from ours, by part.

    Times can be compared only where both sides computed the same thing.
    """
    found = {}
    for name, theirs in parts.items():
        kind, _, size = name.partition(":")
        mine = parts.get(f"ours:{size}", {}).get("losses")
        if kind in ("eager", "compiled", "reduce-overhead") and mine and theirs.get("losses"):
            pairs = zip(mine, theirs["losses"], strict=False)
            found[name] = max(conducting.relative_difference(a, b) for a, b in pairs)
    return found


def count(emulate: bool) -> int:
    """Print the counts of a step by size, as the last line; 0 if all could be counted."""
    with conducting.guarded() as (scratch, mark):
        notes = scratch / "notes.json"
        log = scratch / conducting.LOG
        (seconds,) = plan.COUNT.values()
        command = part_command(scratch, ["--emulate"] * emulate)("count", notes, seconds)
        environment = {**os.environ, mark: "1"}
        outcome = conducting.run_part(command, notes, seconds, log, environment)
    for line in outcome.get("output", []):
        print(line, file=sys.stderr)
    if outcome.get("error"):
        print(outcome["error"], file=sys.stderr)
    print(json.dumps({size: outcome.get(size) for size in plan.SIZE_NAMES}), flush=True)
    return 0 if outcome["ok"] else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="the first three minutes")
    parser.add_argument("--count", action="store_true", help="count a step's operations; no times")
    parser.add_argument("--rehearse", action="store_true", help="small, on an emulated device")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are written")
    names = sorted({*plan.QUICK, *plan.REST})
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    for name, kind in (("part", str), ("notes", Path), ("folder", Path), ("seconds", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--emulate", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.count and (given.quick or given.only or given.out or given.rehearse):
        parser.error("--count goes with no other option")
    if given.quick and given.only:
        parser.error("--quick and --only name parts both: give one of them")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse(sys.argv[1:] if arguments is None else arguments)
    if given.part:
        notes = part.Notes(given.notes)
        return part.main(
            given.part, notes, given.folder, given.seconds, given.rehearse, given.emulate
        )
    if given.rehearse:
        reason = why_no_emulation()
        if reason is not None:
            print(f"nothing rehearsed: {reason}")
            return 0
        return check(given)
    reason = why_no_gpu()
    if reason is None:
        return count(emulate=False) if given.count else check(given)
    if given.count:
        why_not = why_no_emulation()
        if why_not is None:
            return count(emulate=True)
        reason += f"; none can be emulated: {why_not}"
    print(f"nothing {'counted' if given.count else 'checked'}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
