"""Four tasks in one batch beside one task: what a step that trains several adapters at once costs.

    python benchmarks/multitask.py [--rounds 15] [--threads 2] [--write]

The size `tiny` of peers.py, LoRA with r = 8 on every linear layer, one batch of 16 sequences: all of one task, four
of each of four tasks, the same with a shared adapter besides, and as many steps of one task each. They take turns in
one process: a step that does not count (the others have had the caches), then one that does; the figure is the median,
the speed the median of the ratios turn by turn. Claimed is that four tasks in one batch train at no less than 0.7 of
one task's speed. Exit code 1 if not. `--write` keeps the result in benchmarks/results/multitask.json. Half a minute.
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


def make(shared: bool, own: bool) -> MultiTask:
    layers, C, M, heads, V, _, T = SIZES["tiny"]
    config = TransformerConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=T,
    )  # fmt: skip
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    tasks = dict.fromkeys(TASKS, adapter if own else None)
    return get_multitask_model(CausalLM(config), tasks, adapter if shared else None).train()  # type: ignore[no-any-return]


def stepper(sharded: ShardedStep, batches: list[Batch]) -> Callable[[], float]:
    """A training step over these batches, one after another; gives back its seconds."""
    optimizer = AdamW([p for p in sharded.model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        begun = time.perf_counter()
        for batch in batches:
            _, found = sharded.gradients(batch, optimizer.params)
            optimizer.step(found)
        return time.perf_counter() - begun

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

    each = B // len(TASKS)
    work: dict[str, tuple[MultiTask, list[Batch]]] = {
        "one task": (make(False, True), [batch(["prose"] * B)]),
        "four tasks": (make(False, True), [batch(mixed)]),
        "four tasks and a shared adapter": (make(True, True), [batch(mixed)]),
        "four tasks, one adapter for all": (make(True, False), [batch(mixed)]),
        "four tasks, a step each": (
            make(False, True),
            [batch([task] * each, slice(i * each, (i + 1) * each)) for i, task in enumerate(TASKS)],
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    with ExitStack() as stack:
        steps = {
            name: stepper(stack.enter_context(ShardedStep(model, args.threads)), batches)
            for name, (model, batches) in work.items()
        }
        for _ in range(args.rounds + 1):
            for name, step in steps.items():
                step()
                seconds[name].append(step())
    turns = {
        name: measured[1:] for name, measured in seconds.items()
    }  # the first turn has the page faults
    rows: list[dict[str, Any]] = []
    for name, measured in turns.items():
        speeds = [one / this for one, this in zip(turns["one task"], measured, strict=True)]
        rows.append(
            {
                "name": name,
                "milliseconds": round(1e3 * statistics.median(measured), 3),
                "speed": round(statistics.median(speeds), 3),
                "tokens_per_second": round(B * T / statistics.median(measured)),
            }
        )
        print(
            f"{name:34}{rows[-1]['milliseconds']:9.1f} ms   {rows[-1]['speed']:.3f} of one task's speed",
            flush=True,
        )
    speed = rows[1]["speed"]
    result = {
        "command": "python " + " ".join(["benchmarks/multitask.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {args.threads} threads, Python {platform.python_version()}",
        "numpy": np.__version__,
        "size": "tiny",
        "rounds": args.rounds,
        "claim": {"measured": speed, "least": LEAST, "holds": speed >= LEAST},
        "rows": rows,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    verdict = "as it should be" if speed >= LEAST else "NOT AS IT SHOULD BE"
    print(
        f"\nfour tasks in one batch: {speed:g} of one task's speed, at least {LEAST:g}: {verdict}"
    )
    return 0 if speed >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
