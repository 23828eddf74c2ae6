"""Time a training step of one long sequence, whole and in parts, with one thread and with more.

    python benchmarks/parts.py [--sizes long,wide,gpt2-one] [--threads 1,2] [--rounds 6] [--write]

`whole` is a step that leaves sequences whole, as steps did before there were parts; `cut` cuts them
where `part_size` says. Both take turns in one process, a step each, after two steps that do not
count; which begins changes from round to round. The ratio is the median of the ratios of each
round, `cut` to `whole` with as many threads; `loss` shows that both compute the same. Run it while
nothing else runs: with other work on the cores, figures say little.

`--write` stores the results in benchmarks/results/parts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from minilora import AdamW, CausalLM, LoraConfig, TransformerConfig, get_peft_model
from minilora.data import Batch
from minilora.training.parallel import ShardedStep, part_size, shard_size
from minilora.training.parts import part_edges

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="long,wide,gpt2-one")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = []
    for size in args.sizes.split(","):
        for threads in map(int, args.threads.split(",")):
            row = measure(size, threads, args.rounds)
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.write:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        machine = {"python": platform.python_version(), "numpy": np.__version__}
        result = {**machine, "cores": os.cpu_count(), "load at the end": load, "steps": rows}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
