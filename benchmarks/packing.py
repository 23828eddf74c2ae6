"""Time LoRA steps over packed records in two checkouts of minilora against each other.

    python benchmarks/packing.py OLD NEW [--rounds 9] [--write]

OLD and NEW are folders with a copy of this repository. In every round each checkout takes a turn in
a fresh process with one thread, and they start the rounds alternately. A turn is the median
processor time of some steps (forward and backward, r = 8, all linear layers) over the same records
of random ids, packed at a context. The printed columns are the median milliseconds of both, and the
median and the upper quartile of the ratios NEW / OLD of each round: below 1, NEW is faster. --write
stores them in benchmarks/results/packing.json. Three minutes on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULT = Path(__file__).parent / "results" / "packing.json"


class Shape(NamedTuple):
    """Records of `shortest` to `longest` tokens at a context, a model's sizes, steps per turn."""

    context: int
    shortest: int
    longest: int
    batch: int
    width: int
    layers: int
    heads: int
    steps: int


SHAPES = {
    "four short records in a window": Shape(64, 8, 20, 16, 64, 2, 2, 40),
    "two records in a window": Shape(128, 20, 100, 16, 128, 4, 4, 12),
    "one record in a window": Shape(128, 100, 129, 16, 256, 4, 8, 4),
    "many records in a long window": Shape(512, 40, 200, 8, 128, 4, 4, 6),
}


def median_step(shape: Shape) -> float:
    """The median processor time of a step, in seconds, in the checkout that Python imports."""
    from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model
    from minilora.data import Windows
    from minilora.data.records import Record, pack
    from minilora.training.parallel import ShardedStep

    rng = np.random.default_rng(0)
    records = []
    for size in rng.integers(shape.shortest, shape.longest + 1, 200).tolist():
        learned = np.arange(size) > 0
        records.append(Record(rng.integers(0, 256, size).astype(np.int32), learned, float(size)))
    config = TransformerConfig(
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
    )
    adapter = LoraConfig(r=8, target_modules="all-linear")
    model = get_peft_model(CausalLM(config, seed=1), adapter)
    params = [p for p in model.parameters() if p.requires_grad]
    windows = Windows(pack(records, shape.context), shape.context, shape.batch)
    seconds = []
    with ShardedStep(model, 1) as sharded:
        for step in range(shape.steps + 2):
            batch = windows.batch(step)
            begun = time.process_time()
            sharded.gradients(batch, params, 0, step)
            seconds.append(time.process_time() - begun)
    return statistics.median(seconds[2:])


def turn(checkout: Path, name: str) -> float:
    """`median_step` in a process of its own that imports this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, "--turn", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help=f"store the figures in {RESULT.name}")
    parser.add_argument("--turn", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(median_step(SHAPES[args.turn]))
        return
    if args.old is None or args.new is None:
        parser.error("give two checkouts, OLD and NEW")
    print(f"{'':32}{'old ms':>9}{'new ms':>9}{'new / old':>11}{'quartile':>10}")
    figures = {}
    for name in SHAPES:
        sides: list[list[float]] = [[], []]
        for number in range(args.rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                checkout = (args.old, args.new)[side].resolve()
                sides[side].append(turn(checkout, name))
        ratios = [new / old for old, new in zip(*sides, strict=True)]
        old, new = (1000 * statistics.median(side) for side in sides)
        middle = statistics.median(ratios)
        upper = float(np.quantile(ratios, 0.75))
        print(f"{name:32}{old:9.2f}{new:9.2f}{middle:11.3f}{upper:10.3f}", flush=True)
        figures[name] = {"old ms": old, "new ms": new, "new / old": middle, "quartile": upper}
    if args.write:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"rounds": args.rounds, "machine": machine, "steps": figures}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
