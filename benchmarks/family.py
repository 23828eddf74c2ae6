"""How well the family adapts the demo's model: bits per byte of held-out code, by method, base and seed.

    python benchmarks/family.py [--base DIR] [--seeds 0,1,2] [--threads K] [--write]

The base is the demo's, pretrained once (two minutes; `--base` keeps it, or takes it from there); then every method
trains on the demo's code with the demo's settings for it, half a minute each. `--write` adds each result to
benchmarks/results/family.json as it comes, and does not measure again what stands there. Checked against the means over
seeds: a base in nf4 costs LoRA at most 0.05 bits per byte, its quantised layers hold at most 13.1 % of their size in
float32 and all frozen weights at most 20 %, and AdaLoRA ends no worse than LoRA of the same final budget. Exit code 1
if anything is not so.
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
GAP, LAYERS, FROZEN = 0.05, 13.1, 20.0  # bits per byte; per cent of float32


def pretrained(folder: Path, threads: int | None) -> Path:
    """The demo's base with seed 0, made in `folder` if it is not there."""
    if not (folder / "config.json").exists():
        plan, text = Plan(), ByteTokenizer().encode(split(prose())[0])
        model = CausalLM(plan.model, seed=0)
        train(
            model,
            text,
            dataclasses.replace(plan.pretrain, threads=threads),
            folder,
            title="pretrain",
        )
        model.save_pretrained(folder)
    return folder


def measure(base: Path, method: str, kind: str, seed: int, threads: int | None) -> dict[str, Any]:
    """One run: bits per byte of the demo's held-out code before and after, parameters that trained, bytes held."""
    train_text, held_out = (ByteTokenizer().encode(text) for text in split(python_sources()))
    plan = Plan().adapted_by(method, kind)
    model = CausalLM.from_pretrained(base)
    if kind != "none":
        quantize(model, kind)

    def bits(some_model: Any) -> float:
        return bits_per_byte(
            evaluate(
                some_model, held_out, plan.pretrain.context, limit=plan.windows, threads=threads
            )
        )

    before, held = bits(model), measure_weight_memory(model)
    adapted: Any = model if plan.adapter is None else get_peft_model(model, plan.adapter, seed=seed)
    trainable = sum(p.size for p in adapted.parameters() if p.requires_grad)
    settings = dataclasses.replace(plan.adapt, seed=seed, threads=threads, eval_every=None)
    with tempfile.TemporaryDirectory() as folder:
        seconds = train(
            adapted, train_text, settings, Path(folder), title=f"{method} {kind} {seed}"
        ).seconds
    after = sum(p.size for p in adapted.parameters() if p.requires_grad)  # AdaLoRA has cut some
    found = {
        "before": round(before, 4),
        "code": round(bits(adapted), 4),
        "trainable": trainable,
        "kept": after,
    }
    return {**found, "seconds": round(seconds, 1), **({"held": held} if kind != "none" else {})}


def verdicts(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is claimed, beside what was measured, over the seeds that both sides have."""

    def mean_gap(name: str) -> float:
        seeds = [key.rpartition(" ")[2] for key in runs if key.startswith(f"{name} ")]
        pairs = [(runs[f"{name} {s}"], runs.get(f"lora none {s}")) for s in seeds]
        return round(statistics.mean(a["code"] - b["code"] for a, b in pairs if b), 4)

    held = next(run["held"] for key, run in runs.items() if key.startswith("lora nf4 "))
    limits = {
        "nf4 base, bits per byte above LoRA": (mean_gap("lora nf4"), GAP),
        "quantised layers, per cent of float32": (round(held["percent"], 2), LAYERS),
        "all frozen weights, per cent of float32": (round(held["all_percent"], 2), FROZEN),
        "AdaLoRA, bits per byte above LoRA": (mean_gap("adalora none"), 0.0),
    }
    return {
        what: {"measured": got, "at_most": most, "ok": got <= most}
        for what, (got, most) in limits.items()
    }


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
        base = pretrained(args.base or Path(scratch, "base"), args.threads)
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
