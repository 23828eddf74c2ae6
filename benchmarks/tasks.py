"""Four tasks over one frozen base, every way that adapters can be shared: bits per byte of held-out text.

    python benchmarks/tasks.py [--steps 400] [--seeds 0] [--base DIR] [--write]

The base is the demo's model, pretrained on English prose; --base takes one that was saved before. The tasks are the
texts of `texts.four_tasks`: Python, C, tables of character sets, and JSON. Every way takes the same steps over the same
mixed batches, four sequences of each task, and trains as many parameters: one adapter of rank 16 for all tasks, one of
rank 4 for each, or 4 shared and 3 of each task's own; `full` trains all weights of the base, once for all tasks.
--write keeps the table in benchmarks/results/tasks.json. Six minutes on two cores, of which the base takes one.
"""

from __future__ import annotations

import argparse
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


def made(way: str, base: CausalLM, tasks: list[str], seed: int) -> Any:
    """The base, ready to be trained in this way."""
    if way == "full":
        return base
    own = adapter({"per task": 4, "shared + per task": 3}.get(way, 1)) if "task" in way else None
    shared = adapter({"shared": 16, "shared + per task": 4}[way]) if "shared" in way else None
    return get_multitask_model(base, dict.fromkeys(tasks, own), shared, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="0", help="comma-separated; figures are means")
    parser.add_argument(
        "--base", help="a folder with a pretrained base, in place of pretraining one"
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    tokenizer, seeds = ByteTokenizer(), [int(seed) for seed in args.seeds.split(",")]
    texts = {task: split(documents) for task, documents in four_tasks().items()}
    learnt, held_out = (
        {task: tokenizer.encode(both[i]) for task, both in texts.items()} for i in (0, 1)
    )
    settings = dataclasses.replace(ADAPT, steps=args.steps, eval_every=None)

    def bits(model: Any, task: str, own: bool) -> float:
        if own:
            with model.task(task):
                return bits(model, task, False)
        return bits_per_byte(evaluate(model, held_out[task], settings.context, limit=WINDOWS))

    table: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.base or scratch)
        if not args.base:
            model = CausalLM(MODEL, seed=0)
            train(
                model,
                tokenizer.encode(split(prose())[0]),
                PRETRAIN,
                Path(scratch) / "run",
                title="base",
            )
            model.save_pretrained(folder)
        table["base"] = {
            task: [bits(CausalLM.from_pretrained(folder), task, False)] for task in texts
        }
        for way in ("shared", "per task", "shared + per task", "full"):
            for seed in seeds:
                model = made(way, CausalLM.from_pretrained(folder), list(texts), seed)
                counts[way] = sum(p.size for p in model.parameters() if p.requires_grad)
                run = dataclasses.replace(
                    settings, seed=seed, lr=PRETRAIN.lr / 3 if way == "full" else settings.lr
                )
                train(model, learnt, run, Path(scratch) / f"{way} {seed}", title=way)
                for task in texts:
                    table.setdefault(way, {}).setdefault(task, []).append(
                        bits(model, task, way != "full")
                    )
    rows: list[dict[str, Any]] = []
    for way, found in table.items():
        means = {task: round(statistics.fmean(values), 4) for task, values in found.items()}
        rows.append(
            {
                "way": way,
                "trained": counts.get(way, 0),
                **means,
                "mean": round(statistics.fmean(means.values()), 4),
            }
        )
    print(
        f"\n{'bits per byte':20}{'trained':>10}"
        + "".join(f"{task:>10}" for task in [*texts, "mean"])
    )
    for row in rows:
        print(
            f"{row['way']:20}{row['trained']:>10,}"
            + "".join(f"{row[task]:>10.3f}" for task in [*texts, "mean"])
        )
    result = {
        "command": "python " + " ".join(["benchmarks/tasks.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}",
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
