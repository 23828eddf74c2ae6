"""Time a training step of one long sequence, whole and in parts, with one thread and with more.

    python benchmarks/parts.py [--sizes long,wide,gpt2-one] [--threads 1,2] [--rounds 6]
                               [--simulate 2,4,8,16] [--write]

`whole` is a step that leaves sequences whole, as steps did before there were parts; `cut` cuts them
where `part_size` says. Both take turns in one process, a step each, after two steps that do not
count; which begins changes from round to round. The ratio is the median of the ratios of each
round, `cut` to `whole` with as many threads; `loss` shows that both compute the same. Run it while
nothing else runs: with other work on the cores, figures say little.

`--simulate` says what more cores would give: one thread computes the jobs of a step, the processor
time between what they tell each other is measured, and the jobs are laid out over so many threads
as `Workers` would. What is not a job, such as forming W + dW, counts as it is, on one core. Given
is the time of the whole step on one core divided by that, for the size of parts that is best. The
cores' memory and caches, which they share, are not in it.

`--write` stores the results in benchmarks/results/parts.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora import AdamW, CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.data import Batch
from minilora.training import parallel
from minilora.training.parallel import ShardedStep, part_size, shard_size
from minilora.training.parts import Progress, part_edges

RESULT = Path(__file__).parent / "results" / "parts.json"
SIZES = {  # layers, width, MLP width, heads, vocabulary, sequences, context
    "long": (4, 768, 2048, 12, 256, 1, 1024),
    "wide": (4, 1024, 2736, 16, 256, 1, 2048),
    "gpt2-one": (4, 768, 2048, 12, 50257, 1, 256),
}
SKIPPED = 2  # steps of each kind


def make_model(size: str) -> Any:
    layers, width, mlp, heads, vocabulary, _, context = SIZES[size]
    config = TransformerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(CausalLM(config, seed=0), adapter, seed=1).train()


def measure(size: str, threads: int, rounds: int) -> dict[str, Any]:
    model = make_model(size)
    *_, vocabulary, sequences, context = SIZES[size]
    shape = sequences, context + 1
    tokens = np.random.default_rng(0).integers(0, vocabulary, (SKIPPED + rounds, *shape))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds: dict[str, list[float]] = {"whole": [], "cut": []}
    losses = {}
    whole = ShardedStep(model, threads, part=context)
    with whole, ShardedStep(model, threads) as cut:
        kinds = {"whole": whole, "cut": cut}
        for number, ids in enumerate(tokens):
            batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy())
            for kind in sorted(kinds, reverse=number % 2 == 0):
                begun = time.perf_counter()
                loss, grads = kinds[kind].gradients(batch, optimizer.params, step=number)
                seconds[kind].append(time.perf_counter() - begun)
                losses[kind] = float(loss)
            optimizer.step(grads)
    assert abs(losses["cut"] - losses["whole"]) < 1e-4
    part = part_size(model, sequences, context, shard_size(model, sequences, context))
    times = {kind: values[SKIPPED:] for kind, values in seconds.items()}
    ratios = [c / w for c, w in zip(times["cut"], times["whole"], strict=True)]
    return {
        "size": size,
        "threads": threads,
        "parts": len(part_edges(model.config, context, part)) - 1,
        **{f"{kind} ms": round(1e3 * statistics.median(times[kind]), 1) for kind in times},
        "ratio": round(statistics.median(ratios), 3),
        "ratio of minima": round(min(times["cut"]) / min(times["whole"]), 3),
        "loss": losses["cut"],
    }


# ---- more cores than there are -------------------------------------------------------------------

Operation = tuple[str, Any]  # ("work", seconds), ("announce", event) or ("wait", events)
PARTS = (512, 256, 128, 64)  # positions


class Recorder:
    """The operations of each job of a step, in the order of the jobs."""

    def __init__(self) -> None:
        self.jobs: list[list[Operation]] = []
        self.since = 0.0

    def note(self, *operation: Any) -> None:
        now = time.thread_time()
        self.jobs[-1] += [("work", now - self.since), operation]
        self.since = time.thread_time()

    def run(self, job: Any) -> Any:
        self.jobs.append([])
        self.since = time.thread_time()
        result = job()
        self.note("announce", None)
        return result


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Inside, steps of one thread record what their jobs do."""
    recorder = Recorder()
    plain = Progress.announce, Progress.wait_for, parallel._run

    def announce(progress: Progress, event: Any) -> None:
        plain[0](progress, event)
        recorder.note("announce", event)

    def wait_for(progress: Progress, events: Any) -> None:
        recorder.note("wait", events)
        plain[1](progress, events)

    Progress.announce, Progress.wait_for = announce, wait_for  # type: ignore[method-assign]
    parallel._run = recorder.run
    try:
        yield recorder
    finally:
        Progress.announce, Progress.wait_for = plain[:2]  # type: ignore[method-assign]
        parallel._run = plain[2]


def lay_out(jobs: list[list[Operation]], threads: int) -> float:
    """Seconds until the jobs of one group of parts have ended on so many threads."""
    free = [0.0] * threads
    happened: dict[Any, float] = {}
    ends: list[float] = []
    for number, job in enumerate(jobs):
        thread = free.index(min(free))
        # A job is given out once the one threads + 1 before it, and all before that, have ended.
        now = max([free[thread], *ends[: max(0, number - threads)]])
        for kind, value in job:
            if kind == "work":
                now += value
            elif kind == "announce":
                happened[value] = now
            else:
                now = max([now, *(happened[event] for event in value)])
        free[thread] = now
        ends.append(now)
    return max(ends)


def simulate(size: str, cores: list[int], rounds: int) -> dict[str, Any]:
    """How many times as fast as the whole step on one core, by the number of cores."""
    model = make_model(size)
    *_, vocabulary, sequences, context = SIZES[size]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (sequences, context + 1))
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy())
    params = [p for p in model.parameters() if p.requires_grad]
    whole = []
    steps: dict[int, list[tuple[float, list[list[Operation]]]]] = {part: [] for part in PARTS}
    for number in range(rounds + 1):
        for part in (context, *PARTS):
            with ShardedStep(model, 1, part=part) as sharded, recording() as recorder:
                begun = time.thread_time()
                sharded.gradients(batch, params)
                seconds = time.thread_time() - begun
            if number and part == context:
                whole.append(seconds)
            elif number:
                steps[part].append((seconds, recorder.jobs))
    faster = {}
    for count in cores:
        times = {}
        for part, measured in steps.items():
            seconds, jobs = min(measured, key=lambda step: step[0])
            busy = sum(value for job in jobs for kind, value in job if kind == "work")
            times[part] = seconds - busy + lay_out(jobs, count)
        best = min(times, key=lambda part: times[part])
        faster[count] = {"faster": round(min(whole) / times[best], 2), "part": best}
    return {"size": size, "whole ms": round(1e3 * min(whole), 1), "cores": faster}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="long,wide,gpt2-one")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--simulate", metavar="CORES", help="such as 2,4,8,16")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = []
    for size in args.sizes.split(","):
        for threads in map(int, args.threads.split(",")):
            row = measure(size, threads, args.rounds)
            print(json.dumps(row), flush=True)
            rows.append(row)
    simulated = []
    for size in args.sizes.split(",") if args.simulate else ():
        row = simulate(size, [int(count) for count in args.simulate.split(",")], args.rounds)
        print(json.dumps(row), flush=True)
        simulated.append(row)
    if args.write:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        machine = {"python": platform.python_version(), "numpy": np.__version__}
        result = {**machine, "cores": os.cpu_count(), "load at the end": load, "steps": rows}
        result["simulated"] = simulated
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
