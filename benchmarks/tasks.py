"""Compare the ways of sharing adapters between four tasks: bits per byte of held-out text.

    python benchmarks/tasks.py [--steps 400] [--seeds 0] [--base DIR] [--write]

The base is the demo's model, pretrained on English prose; `--base` names one that was saved before.
The tasks are the texts of `data.texts.four_tasks`: Python, C, tables of character sets, and JSON.
Every way trains the same number of steps on the same mixed batches, four sequences per task:

    shared              one adapter of rank 16 for all tasks
    per task            one adapter of rank 4 per task
    shared + per task   one shared adapter of rank 4, and one of rank 3 per task
    full                all weights of the base, once for all tasks

The first three train equally many parameters. `--write` stores the table in
benchmarks/results/tasks.json. Six minutes on two cores, one of them for the base.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from minilora import ByteTokenizer, CausalLM, LoraConfig, get_multitask_model
from minilora.data.texts import four_tasks, prose, split
from minilora.lab.demo import ADAPT, MODEL, PRETRAIN
from minilora.training.loop import bits_per_byte, evaluate, train

RESULT = Path(__file__).parent / "results" / "tasks.json"
WINDOWS = 256  # held-out windows of each task


def adapter(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=4 * r, target_modules="all-linear")


def build(way: str, base: CausalLM, tasks: list[str], seed: int) -> Any:
    """The base with the adapters of this way."""
    if way == "full":
        return base
    task_rank = {"per task": 4, "shared + per task": 3}.get(way)
    shared_rank = {"shared": 16, "shared + per task": 4}.get(way)
    task_adapter = adapter(task_rank) if task_rank else None
    shared_adapter = adapter(shared_rank) if shared_rank else None
    return get_multitask_model(base, dict.fromkeys(tasks, task_adapter), shared_adapter, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="0", help="separated by commas; figures are means")
    parser.add_argument("--base", help="folder of a pretrained base; without it one is pretrained")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    tokenizer = ByteTokenizer()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    texts = {task: split(documents) for task, documents in four_tasks().items()}
    training = {task: tokenizer.encode(text) for task, (text, _) in texts.items()}
    held_out = {task: tokenizer.encode(text) for task, (_, text) in texts.items()}
    settings = dataclasses.replace(ADAPT, steps=args.steps, eval_every=None)

    def bits(model: Any, task: str) -> float:
        loss = evaluate(model, held_out[task], settings.context, limit=WINDOWS)
        return bits_per_byte(loss)

    table: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.base or scratch)
        if not args.base:
            model = CausalLM(MODEL, seed=0)
            prose_ids = tokenizer.encode(split(prose())[0])
            train(model, prose_ids, PRETRAIN, Path(scratch) / "run", title="base")
            model.save_pretrained(folder)
        base = CausalLM.from_pretrained(folder)
        table["base"] = {task: [bits(base, task)] for task in texts}
        for way in ("shared", "per task", "shared + per task", "full"):
            table[way] = {task: [] for task in texts}
            for seed in seeds:
                model = build(way, CausalLM.from_pretrained(folder), list(texts), seed)
                counts[way] = sum(p.size for p in model.parameters() if p.requires_grad)
                lr = PRETRAIN.lr / 3 if way == "full" else settings.lr
                run = dataclasses.replace(settings, seed=seed, lr=lr)
                train(model, training, run, Path(scratch) / f"{way} {seed}", title=way)
                for task in texts:
                    with contextlib.ExitStack() as stack:
                        if way != "full":
                            stack.enter_context(model.task(task))
                        table[way][task].append(bits(model, task))
    rows: list[dict[str, Any]] = []
    for way, values_by_task in table.items():
        means = {}
        for task, values in values_by_task.items():
            means[task] = round(statistics.fmean(values), 4)
        mean = round(statistics.fmean(means.values()), 4)
        rows.append({"way": way, "trained": counts.get(way, 0), **means, "mean": mean})
    columns = [*texts, "mean"]
    titles = "".join(f"{column:>10}" for column in columns)
    print(f"\n{'bits per byte':20}{'trained':>10}{titles}")
    for row in rows:
        values = "".join(f"{row[column]:>10.3f}" for column in columns)
        print(f"{row['way']:20}{row['trained']:>10,}{values}")
    python = platform.python_version()
    result = {
        "command": "python " + " ".join(["benchmarks/tasks.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {python}, NumPy {np.__version__}",
        "steps": args.steps,
        "seeds": seeds,
        "bytes": {task: [len(part) for part in both] for task, both in texts.items()},
        "rows": rows,
    }
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
