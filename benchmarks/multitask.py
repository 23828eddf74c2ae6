"""Measure the cost of a step that trains several tasks' adapters in one batch.

    python benchmarks/multitask.py [--rounds 15] [--threads 2] [--write]

It is the size `tiny` of peers.py with LoRA (r = 8) on all linear layers and 16 sequences per batch:
all of one task; four of each of four tasks; the same with a shared adapter; the same with a shared
adapter only; and four steps of one task each. They take turns in one process: one step that does
not count, because the others have used the caches, then one that does. The printed time is the
median; the speed is the median of the ratios of each round.

The condition is that four tasks in one batch train at 0.7 or more of the speed of one task; exit
code 1 if not. `--write` stores the result in benchmarks/results/multitask.json. Half a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from peers import SIZES

from minilora import AdamW, CausalLM, LoraConfig, TransformerConfig, get_multitask_model
from minilora.data import Batch
from minilora.lora import MultiTask
from minilora.training.parallel import ShardedStep

RESULT = Path(__file__).parent / "results" / "multitask.json"
TASKS = ["prose", "python", "json", "c"]
LEAST = 0.7  # of the speed of one task


def make(shared: bool, per_task: bool) -> MultiTask:
    """A model of size `tiny` with a shared adapter, one adapter per task, or both."""
    layers, C, M, heads, V, _, T = SIZES["tiny"]
    config = TransformerConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=M,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=T,
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    tasks = dict.fromkeys(TASKS, adapter if per_task else None)
    model = get_multitask_model(CausalLM(config), tasks, adapter if shared else None)
    model.train()
    return model


def stepper(sharded: ShardedStep, batches: list[Batch]) -> Callable[[], float]:
    """A function that trains one step on each of these batches and returns its seconds."""
    optimizer = AdamW([p for p in sharded.model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        started = time.perf_counter()
        for batch in batches:
            _, grads = sharded.gradients(batch, optimizer.params)
            optimizer.step(grads)
        return time.perf_counter() - started

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    *_, V, B, T = SIZES["tiny"]
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1))
    mixed = [TASKS[i % len(TASKS)] for i in range(B)]

    def batch(tasks: list[str], rows: slice = slice(None)) -> Batch:
        return Batch(tokens[rows, :-1], tokens[rows, 1:], tasks=tasks)

    count = B // len(TASKS)
    separate = []
    for i, task in enumerate(TASKS):
        separate.append(batch([task] * count, slice(i * count, (i + 1) * count)))
    work: dict[str, tuple[MultiTask, list[Batch]]] = {
        "one task": (make(False, True), [batch(["prose"] * B)]),
        "four tasks": (make(False, True), [batch(mixed)]),
        "four tasks and a shared adapter": (make(True, True), [batch(mixed)]),
        "four tasks, one adapter for all": (make(True, False), [batch(mixed)]),
        "four tasks, a step each": (make(False, True), separate),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    with ExitStack() as stack:
        steps = {}
        for name, (model, batches) in work.items():
            sharded = stack.enter_context(ShardedStep(model, args.threads))
            steps[name] = stepper(sharded, batches)
        for _ in range(args.rounds + 1):
            for name, step in steps.items():
                step()
                seconds[name].append(step())
    # The first turn touches new memory.
    turns = {name: measured[1:] for name, measured in seconds.items()}
    rows: list[dict[str, Any]] = []
    for name, measured in turns.items():
        speeds = [one / this for one, this in zip(turns["one task"], measured, strict=True)]
        median = statistics.median(measured)
        speed = statistics.median(speeds)
        rows.append(
            {
                "name": name,
                "milliseconds": round(1e3 * median, 3),
                "speed": round(speed, 3),
                "tokens_per_second": round(B * T / median),
            }
        )
        print(f"{name:34}{1e3 * median:9.1f} ms   {speed:.3f} of one task's speed", flush=True)
    speed = rows[1]["speed"]
    python = platform.python_version()
    result = {
        "command": "python " + " ".join(["benchmarks/multitask.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {args.threads} threads, Python {python}",
        "numpy": np.__version__,
        "size": "tiny",
        "rounds": args.rounds,
        "claim": {"measured": speed, "least": LEAST, "holds": speed >= LEAST},
        "rows": rows,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    verdict = "holds" if speed >= LEAST else "DOES NOT HOLD"
    print(f"four tasks train at {LEAST:g} or more of one task's speed ({speed:g}): {verdict}")
    return 0 if speed >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
