"""Measure `minilora merge`: memory, speed, and whether every number is right.

    python benchmarks/merge.py [--size 200m|1b|3b|7b] [--threads K] [--peft] [--scratch DIR]
                               [--write]

It makes a random sharded bfloat16 checkpoint of Llama's shape and an adapter of r = 16 on all
linear layers in a temporary folder. Then it copies the files, merges, and copies them again, each
in a separate process. A copy reads and writes every file once and forces it to the disk; the mean
of both copies is what the disk allows at that time. `--peft` (extra `oracle`) also lets peft merge
the same files on the CPU, with as many threads.

Three conditions are checked; exit code 1 if one does not hold:

    memory   the peak (VmHWM) is below 1.5 GB
    speed    at least a third of the mean speed of the copies
    values   a sample of tensors of every kind equals W + s B A in float64, rounded once to
             bfloat16, by the definition of rounding and not by the code under test

`--write` stores the numbers in benchmarks/results/merge.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats import (
    Entry,
    SafetensorsFile,
    bf16_from,
    write_adapter,
    write_json,
    write_stream,
)

RESULT = Path(__file__).parent / "results" / "merge.json"
# hidden size, intermediate size, layers, vocabulary, rows of k and v, layers per shard
SIZES = {
    "200m": (1024, 2816, 12, 32000, 256, 4),
    "1b": (2048, 5632, 22, 32000, 256, 8),
    "3b": (3072, 8192, 28, 32000, 1024, 7),
    "7b": (4096, 11008, 32, 32000, 4096, 8),
}
R, ALPHA = 16, 32
MAX_MEMORY = 1.5e9  # bytes
LEAST_SPEED = 1 / 3  # of a copy's
COPY = """
import os, sys
from pathlib import Path
buffer = bytearray(8 << 20)
folder, out = map(Path, sys.argv[1:])
for path in sorted(folder.glob("*.safetensors")):
    with (
        open(path, "rb", buffering=0) as source,
        open(out / path.name, "wb", buffering=0) as target,
    ):
        while count := source.readinto(buffer):
            target.write(memoryview(buffer)[:count])
        os.fsync(target.fileno())
"""
PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def shapes(size: str) -> dict[int, dict[str, tuple[int, int]]]:
    """Shard -> its matrices by name, (out, in)."""
    C, M, layers, V, K, layers_per_shard = SIZES[size]
    linear = {
        "self_attn.q_proj": (C, C),
        "self_attn.k_proj": (K, C),
        "self_attn.v_proj": (K, C),
        "self_attn.o_proj": (C, C),
        "mlp.gate_proj": (M, C),
        "mlp.up_proj": (M, C),
        "mlp.down_proj": (C, M),
    }
    shards: dict[int, dict[str, tuple[int, int]]] = {}
    for layer in range(layers):
        shard = shards.setdefault(layer // layers_per_shard, {})
        for name, shape in linear.items():
            shard[f"model.layers.{layer}.{name}.weight"] = shape
    shards[0]["model.embed_tokens.weight"] = (V, C)
    shards[max(shards)]["lm_head.weight"] = (V, C)
    return shards


def norms(size: str) -> dict[int, dict[str, tuple[int]]]:
    """Shard -> its vectors by name."""
    C, _, layers, _, _, layers_per_shard = SIZES[size]
    shards: dict[int, dict[str, tuple[int]]] = {}
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard = shards.setdefault(layer // layers_per_shard, {})
            shard[f"model.layers.{layer}.{name}.weight"] = (C,)
    shards[max(shards)]["model.norm.weight"] = (C,)
    return shards


def make(folder: Path, size: str) -> None:
    """Write the checkpoint folder/base and the adapter folder/adapter, from a fixed seed."""
    rng = np.random.default_rng(0)
    shards = shapes(size)
    # Each tensor takes its numbers from another place of this pool, which is random enough.
    pool = rng.standard_normal(1 << 24, np.float32) * np.float32(0.02)

    def weights(shape: tuple[int, int], offset: int) -> np.ndarray:
        count = shape[0] * shape[1]
        return bf16_from(np.resize(np.roll(pool, offset), count)).reshape(shape)

    base = folder / "base"
    base.mkdir()
    index: dict[str, str] = {}
    adapter = {}
    vectors = norms(size)
    for number, tensors in shards.items():
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        ones = bf16_from(np.ones(SIZES[size][0], np.float32))
        entries = []
        for key, length in vectors[number].items():
            index[key] = name
            entries.append(Entry(key, "BF16", length, lambda ones=ones: ones))
        for i, (key, shape) in enumerate(tensors.items()):
            index[key] = name
            offset = 7919 * (1000 * number + i + 1)
            read = functools.partial(weights, shape, offset)
            entries.append(Entry(key, "BF16", shape, read))
            if "_proj" in key:
                path = f"base_model.model.{key.removesuffix('.weight')}"
                A = rng.standard_normal((R, shape[1]), np.float32) / R
                B = rng.standard_normal((shape[0], R), np.float32) * np.float32(0.01)
                adapter[f"{path}.lora_A.weight"] = A
                adapter[f"{path}.lora_B.weight"] = B
        write_stream(base / name, entries)
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    C, M, layers, V, K, _ = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_size": C,
        "intermediate_size": M,
        "num_hidden_layers": layers,
        "vocab_size": V,
        "num_attention_heads": C // 128,
        "num_key_value_heads": K // 128,
        "rms_norm_eps": 1e-5,
    }
    write_json(base / "config.json", config)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    fields = {"r": R, "lora_alpha": ALPHA, "target_modules": targets}
    write_adapter(folder / "adapter", fields, adapter)


def merge_command(folder: Path, out: Path, threads: int) -> list[str]:
    """The command that merges folder/adapter into folder/base."""
    command = [sys.executable, "-m", "minilora", "merge", "--threads", str(threads)]
    command += ["--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
    return [*command, "--out", str(out)]


def timed(*command: str, environment: dict[str, str] | None = None) -> tuple[float, int]:
    """The seconds that a command takes, and the largest memory of its process in bytes."""
    code = (
        "import os, resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    outer = [sys.executable, "-c", code, *command]
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(outer, check=True, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    return seconds, int(done.stdout.rsplit("PEAK", 1)[1])


def time_copy(folder: Path) -> float:
    """The seconds that copying the base's files takes."""
    (folder / "copy").mkdir()
    seconds, _ = timed(sys.executable, "-c", COPY, str(folder / "base"), str(folder / "copy"))
    shutil.rmtree(folder / "copy")
    return seconds


def count_wrong(folder: Path, size: str) -> dict[str, int]:
    """Sampled tensor -> how many of its numbers are not W + s B A rounded once."""
    counts = {}
    with SafetensorsFile(folder / "adapter" / "adapter_model.safetensors") as adapter:
        for number, tensors in shapes(size).items():
            (shard,) = (folder / "base").glob(f"model-{number + 1:05d}-*.safetensors")
            with (
                SafetensorsFile(shard) as base,
                SafetensorsFile(folder / "merged" / shard.name) as merged,
            ):
                for key in list(tensors)[number :: len(tensors) // 3]:
                    rows = slice(0, min(512, tensors[key][0]))
                    W = base.read(key)[rows].astype(np.float64)
                    path = f"base_model.model.{key.removesuffix('.weight')}"
                    if f"{path}.lora_A.weight" in adapter:
                        A = adapter.read(f"{path}.lora_A.weight", np.float64)
                        B = adapter.read(f"{path}.lora_B.weight", np.float64)
                        W += (ALPHA / R) * (B[rows] @ A)
                    values = merged.read(key)[rows].astype(np.float64)
                    counts[key] = int((~is_nearest(values, W)).sum())
    return counts


def is_nearest(values: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Whether each value is the bfloat16 nearest to `exact`: at most half a step away.

    A step is 2^-7 of the largest power of two that is not above |exact|. The tolerance covers sums
    in another order: they change the last bits of `exact`, and a value that close to a tie may
    round either way.
    """
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-126))) - 7)
    return np.asarray(np.abs(values - exact) <= step / 2 * (1 + 1e-12) + 1e-16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        weights = sum(o * i for tensors in shapes(args.size).values() for o, i in tensors.values())
        if shutil.disk_usage(folder).free < 6 * weights:
            print(
                f"{scratch} has too little free space: size {args.size} needs "
                f"{6 * weights / 1e9:.0f} GB; choose another folder with --scratch",
                file=sys.stderr,
            )
            return 1
        make(folder, args.size)
        copies = [time_copy(folder)]
        seconds, peak = timed(*merge_command(folder, folder / "merged", args.threads))
        copies.append(time_copy(folder))
        mistakes = count_wrong(folder, args.size)
        shutil.rmtree(folder / "merged")
        peft = None
        if args.peft:
            names = [str(folder / name) for name in ("base", "adapter", "peft")]
            peft = timed(sys.executable, "-c", PEFT, *names, str(args.threads))
    copy_share = statistics.mean(copies) / seconds
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/merge.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "weights": weights,
        "bytes": 2 * weights,
        "copy_seconds": [round(copy, 2) for copy in copies],
        "merge_seconds": round(seconds, 2),
        "copy_share": round(copy_share, 3),
        "peak_bytes": peak,
        "tensors_checked": len(mistakes),
        "numbers_wrong": sum(mistakes.values()),
    }
    if peft is not None:
        result |= {"peft_seconds": round(peft[0], 2), "peft_peak_bytes": peft[1]}
    verdicts = {
        "peak memory below 1.5 GB": peak < MAX_MEMORY,
        "at least a third of the copy's speed": copy_share >= LEAST_SPEED,
        "every number the float64 sum rounded once": not any(mistakes.values()),
    }
    result["verdicts"] = verdicts
    print(json.dumps(result, indent=2))
    if args.write:
        stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        stored[args.size] = result
        RESULT.write_text(json.dumps(stored, indent=2) + "\n")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
