"""Measure how well each method adapts the demo's model: bits per byte of held-out code.

    python benchmarks/family.py [--base DIR] [--seeds 0,1,2] [--threads K] [--write]

The base is the demo's, pretrained once in two minutes; `--base` names a folder that keeps it for
the next run. Then every method trains on the demo's code with the demo's settings for it, half a
minute each. `--write` adds each result to benchmarks/results/family.json as soon as it is measured,
and does not measure again what that file has.

Four conditions are checked on the means over the seeds; exit code 1 if one does not hold:

    nf4       the base in nf4 costs LoRA at most 0.05 bits per byte
    layers    the quantized layers take at most 13.1 % of their bytes in float32
    weights   all frozen weights take at most 20 %
    AdaLoRA   is not worse than LoRA with the same final budget
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

from minilora import CausalLM, get_peft_model, quantize
from minilora.data.texts import prose, python_sources, split
from minilora.data.tokenizer import ByteTokenizer
from minilora.lab.demo import Plan
from minilora.training.loop import bits_per_byte, evaluate, train
from minilora.training.methods import measure_weight_memory

RESULT = Path(__file__).parent / "results" / "family.json"
RUNS = [
    ("lora", "none"),
    ("lora", "nf4"),
    ("adalora", "none"),
    ("dora", "none"),
    ("full", "none"),
    ("lora", "int8"),
]
LARGEST_GAP = 0.05  # bits per byte
LAYERS_PERCENT = 13.1  # of float32
FROZEN_PERCENT = 20.0


def pretrain(folder: Path, threads: int | None) -> None:
    """Write the demo's base with seed 0 into `folder`, unless the folder has it."""
    if (folder / "config.json").exists():
        return
    plan = Plan()
    text = ByteTokenizer().encode(split(prose())[0])
    model = CausalLM(plan.model, seed=0)
    settings = dataclasses.replace(plan.pretrain, threads=threads)
    train(model, text, settings, folder, title="pretrain")
    model.save_pretrained(folder)


def measure(base: Path, method: str, kind: str, seed: int, threads: int | None) -> dict[str, Any]:
    """One run: bits per byte of the demo's held-out code before and after, trained parameters,
    and the memory of a quantized base."""
    train_text, held_out = (ByteTokenizer().encode(text) for text in split(python_sources()))
    plan = Plan().adapted_by(method, kind)
    model = CausalLM.from_pretrained(base)
    if kind != "none":
        quantize(model, kind)

    def bits(some_model: Any) -> float:
        context = plan.pretrain.context
        loss = evaluate(some_model, held_out, context, limit=plan.windows, threads=threads)
        return bits_per_byte(loss)

    before = bits(model)
    memory = measure_weight_memory(model)
    adapted: Any = model
    if plan.adapter is not None:
        adapted = get_peft_model(model, plan.adapter, seed=seed)
    trainable = sum(p.size for p in adapted.parameters() if p.requires_grad)
    settings = dataclasses.replace(plan.adapt, seed=seed, threads=threads, eval_every=None)
    title = f"{method} {kind} {seed}"
    with tempfile.TemporaryDirectory() as folder:
        result = train(adapted, train_text, settings, Path(folder), title=title)
    # AdaLoRA has removed some parameters.
    remaining = sum(p.size for p in adapted.parameters() if p.requires_grad)
    run: dict[str, Any] = {
        "before": round(before, 4),
        "code": round(bits(adapted), 4),
        "trainable": trainable,
        "kept": remaining,
        "seconds": round(result.seconds, 1),
    }
    if kind != "none":
        run["held"] = memory
    return run


def verdicts(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each condition with its measurement, over the seeds that both methods have."""

    def mean_gap(name: str) -> float:
        gaps = []
        for key, run in runs.items():
            method, _, seed = key.rpartition(" ")
            plain = runs.get(f"lora none {seed}")
            if method == name and plain:
                gaps.append(run["code"] - plain["code"])
        return round(statistics.mean(gaps), 4)

    memory = next(run["held"] for key, run in runs.items() if key.startswith("lora nf4 "))
    limits = {
        "nf4 base, bits per byte above LoRA": (mean_gap("lora nf4"), LARGEST_GAP),
        "quantised layers, per cent of float32": (round(memory["percent"], 2), LAYERS_PERCENT),
        "all frozen weights, per cent of float32": (
            round(memory["all_percent"], 2),
            FROZEN_PERCENT,
        ),
        "AdaLoRA, bits per byte above LoRA": (mean_gap("adalora none"), 0.0),
    }
    result = {}
    for name, (measured, limit) in limits.items():
        result[name] = {"measured": measured, "at_most": limit, "ok": measured <= limit}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {"command": "python benchmarks/family.py --write", "runs": {}}
    if args.write and RESULT.exists():
        result = json.loads(RESULT.read_text())
    result |= {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    runs = result["runs"]
    with tempfile.TemporaryDirectory() as scratch:
        base = args.base or Path(scratch, "base")
        pretrain(base, args.threads)
        for seed in map(int, args.seeds.split(",")):
            for method, kind in RUNS:
                key = f"{method} {kind} {seed}"
                if key not in runs:
                    runs[key] = measure(base, method, kind, seed, args.threads)
                    print(key, runs[key], flush=True)
                if args.write:
                    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    by_name: dict[str, list[float]] = {}
    for key, run in runs.items():
        by_name.setdefault(key.rpartition(" ")[0], []).append(run["code"])
    result["mean_bits_per_byte"] = {
        name: round(statistics.mean(values), 4) for name, values in by_name.items()
    }
    result["verdicts"] = verdicts(runs)
    if args.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("mean_bits_per_byte", "verdicts")}, indent=2))
    return 0 if all(v["ok"] for v in result["verdicts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
