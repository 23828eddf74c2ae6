"""Merging an adapter into a large checkpoint, from files alone: memory, speed, and whether every number is right.

    python benchmarks/merge.py [--size 1b|3b|7b] [--threads K] [--peft] [--scratch DIR] [--write]

Makes a random sharded bfloat16 checkpoint of Llama's shape and an all-linear adapter of r = 16 in a scratch folder,
which goes afterwards. Then, each in a process of its own: copies the files (read and written once, and forced to the
disk), merges, and copies once more, so that the disk's mood is the same for both. `--peft` (extra `oracle`) lets peft
merge the same on the CPU, with as many threads. Checked: peak memory (VmHWM) below 1.5 GB; at least a third of the
copies' mean speed; and a sample of tensors, of every kind, equal bit by bit to W + s B A in float64 rounded once to
bfloat16, by the definition of rounding and not by the code under test. Exit code 1 if anything is not so. `--write`
keeps the numbers in benchmarks/results/merge.json.
"""

from __future__ import annotations

import argparse
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
# hidden, intermediate, layers, vocabulary, rows of k and v, layers a shard
SIZES = {
    "1b": (2048, 5632, 22, 32000, 256, 8),
    "3b": (3072, 8192, 28, 32000, 1024, 7),
    "7b": (4096, 11008, 32, 32000, 4096, 8),
}
R, ALPHA = 16, 32
MAX_MEMORY, LEAST_SPEED = 1.5e9, 1 / 3
COPY = """
import os, sys
from pathlib import Path
buffer = bytearray(8 << 20)
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with open(path, "rb", buffering=0) as source, open(Path(sys.argv[2]) / path.name, "wb", buffering=0) as target:
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
    """Shard -> the tensors there, (out, in)."""
    C, M, layers, V, K, each = SIZES[size]
    linear = {
        f"self_attn.{n}_proj": s
        for n, s in {"q": (C, C), "k": (K, C), "v": (K, C), "o": (C, C)}.items()
    }
    linear |= {"mlp.gate_proj": (M, C), "mlp.up_proj": (M, C), "mlp.down_proj": (C, M)}
    shards: dict[int, dict[str, tuple[int, int]]] = {}
    for layer in range(layers):
        own = {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear.items()}
        shards.setdefault(layer // each, {}).update(own)
    shards[0]["model.embed_tokens.weight"] = shards[max(shards)]["lm_head.weight"] = (V, C)
    return shards


def norms(size: str) -> dict[int, dict[str, tuple[int]]]:
    """Shard -> the vectors there."""
    C, _, layers, _, _, each = SIZES[size]
    shards: dict[int, dict[str, tuple[int]]] = {}
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shards.setdefault(layer // each, {})[f"model.layers.{layer}.{name}.weight"] = (C,)
    shards[max(shards)]["model.norm.weight"] = (C,)
    return shards


def make(folder: Path, size: str) -> None:
    """The checkpoint folder/base and the adapter folder/adapter, from a fixed seed."""
    rng, shards = np.random.default_rng(0), shapes(size)
    pool = rng.standard_normal(1 << 24, np.float32) * np.float32(
        0.02
    )  # cut anew for each tensor: random enough

    def weights(shape: tuple[int, int], offset: int) -> np.ndarray:
        need = shape[0] * shape[1]
        return bf16_from(np.resize(np.roll(pool, offset), need)).reshape(shape)

    base = folder / "base"
    base.mkdir()
    index, adapter, vectors = {}, {}, norms(size)
    for number, tensors in shards.items():
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        ones = bf16_from(np.ones(SIZES[size][0], np.float32))
        entries = [
            Entry(key, "BF16", shape, lambda ones=ones: ones)
            for key, shape in vectors[number].items()
        ]
        index |= dict.fromkeys(vectors[number], name)
        for i, (key, shape) in enumerate(tensors.items()):
            index[key] = name
            offset = 7919 * (1000 * number + i + 1)
            entries.append(Entry(key, "BF16", shape, lambda s=shape, o=offset: weights(s, o)))  # type: ignore[misc]
            if "_proj" in key:
                path = f"base_model.model.{key.removesuffix('.weight')}"
                adapter[f"{path}.lora_A.weight"] = (
                    rng.standard_normal((R, shape[1]), np.float32) / R
                )
                adapter[f"{path}.lora_B.weight"] = rng.standard_normal(
                    (shape[0], R), np.float32
                ) * np.float32(0.01)
        write_stream(base / name, entries)
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    C, M, layers, V, K, _ = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False,
        "hidden_size": C, "intermediate_size": M, "num_hidden_layers": layers, "vocab_size": V,
        "num_attention_heads": C // 128, "num_key_value_heads": K // 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    write_json(base / "config.json", config)
    targets = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    write_adapter(
        folder / "adapter", {"r": R, "lora_alpha": ALPHA, "target_modules": targets}, adapter
    )


def timed(*command: str) -> tuple[float, int]:
    """Run a command; seconds, and the most bytes of memory that it held."""
    code = "import os, resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); " + (
        "print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - start, int(done.stdout.rsplit("PEAK", 1)[1])


def copied(folder: Path) -> float:
    """Seconds to copy the base's files."""
    (folder / "copy").mkdir()
    seconds, _ = timed(sys.executable, "-c", COPY, str(folder / "base"), str(folder / "copy"))
    shutil.rmtree(folder / "copy")
    return seconds


def wrong(folder: Path, size: str) -> dict[str, int]:
    """Of a sample of tensors, how many numbers are not W + s B A rounded once."""
    found = {}
    with SafetensorsFile(folder / "adapter" / "adapter_model.safetensors") as adapter:
        for number, tensors in shapes(size).items():
            name = next(
                n
                for n in sorted(os.listdir(folder / "base"))
                if n.startswith(f"model-{number + 1:05d}")
            )
            with (
                SafetensorsFile(folder / "base" / name) as base,
                SafetensorsFile(folder / "merged" / name) as merged,
            ):
                for key in list(tensors)[number :: len(tensors) // 3]:
                    rows = slice(0, min(512, tensors[key][0]))
                    W = base.read(key)[rows].astype(np.float64)
                    path = f"base_model.model.{key.removesuffix('.weight')}"
                    if f"{path}.lora_A.weight" in adapter:
                        A, B = (adapter.read(f"{path}.lora_{x}.weight", np.float64) for x in "AB")
                        W += (ALPHA / R) * (B[rows] @ A)
                    got = merged.read(key)[rows].astype(np.float64)
                    found[key] = int((~nearest(got, W)).sum())
    return found


def nearest(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Is `got`, a bfloat16, the nearest to `exact`? Half a step at most, a step being 2^-7 of the power of two below.

    Where products are summed in another order `exact` moves by its last bits, and what was that near to a tie may go
    either way.
    """
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-126))) - 7)
    return np.asarray(np.abs(got - exact) <= step / 2 * (1 + 1e-12) + 1e-16)


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
            print(f"{args.size} needs {6 * weights / 1e9:.0f} GB of disk", file=sys.stderr)
            return 1
        make(folder, args.size)
        copies = [copied(folder)]
        options = [
            "--base",
            str(folder / "base"),
            "--adapter",
            str(folder / "adapter"),
            "--out",
            str(folder / "merged"),
        ]
        command = [
            sys.executable,
            "-m",
            "minilora",
            "merge",
            *options,
            "--threads",
            str(args.threads),
        ]
        merge, peak = timed(*command)
        copies.append(copied(folder))
        mistakes = wrong(folder, args.size)
        shutil.rmtree(folder / "merged")
        names = [str(folder / name) for name in ("base", "adapter", "peft")]
        peft = timed(sys.executable, "-c", PEFT, *names, str(args.threads)) if args.peft else None
    copy = statistics.mean(copies)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/merge.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "numpy": np.__version__,
        "weights": weights, "bytes": 2 * weights,
        "copy_seconds": [round(seconds, 2) for seconds in copies], "merge_seconds": round(merge, 2),
        "copy_share": round(copy / merge, 3), "peak_bytes": peak,
        "tensors_checked": len(mistakes), "numbers_wrong": sum(mistakes.values()),
    }  # fmt: skip
    if peft is not None:
        result |= {"peft_seconds": round(peft[0], 2), "peft_peak_bytes": peft[1]}
    verdicts = {
        "peak memory below 1.5 GB": peak < MAX_MEMORY,
        "at least a third of the copy's speed": copy / merge >= LEAST_SPEED,
        "every number the float64 sum rounded once": not any(mistakes.values()),
    }
    result["verdicts"] = verdicts
    print(json.dumps(result, indent=2))
    if args.write:
        kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**kept, args.size: result}, indent=2) + "\n")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
