"""Checkpoints and adapters in files, for the tests of the tools and of what they share with
models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora import CausalLM
from minilora.formats import Entry, bf16_from, load_file, write_adapter, write_json, write_stream
from minilora.lora import PeftModel
from minilora.lora.files.adapter import AdapterFile

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(p.name for p in GOLDEN.iterdir() if (p / "adapter_config.json").exists())
PREFIX = "base_model.model."
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LAYER = "model.layers.0.q_proj"  # the adapted layer of `write_small`
WEIGHTS = "model.safetensors"


def base_of(adapter: str) -> Path:
    """The golden base of a golden adapter."""
    return GOLDEN / adapter.partition("--")[0]


def logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Logits in float64 for seven tokens."""
    model: Any = CausalLM.from_pretrained(base, dtype="float64")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return np.asarray(model(np.arange(7)[None]).numpy())


def deltas(adapter: Path) -> dict[str, np.ndarray]:
    """dW of each layer, by its path."""
    dense = {}
    with AdapterFile(adapter) as file:
        for path in file.layers:
            part = file.part(path)
            dense[path] = part.c * (part.B @ part.A)
    return dense


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of each file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


def as_bytes(tensors: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in tensors.items()}


def write_base(
    folder: Path, tensors: dict[str, np.ndarray], shards: int = 1, dtype: str = "float32", **config
) -> Path:
    """A checkpoint of float64 arrays, rounded to `dtype`."""
    folder.mkdir(parents=True)
    fields = {"model_type": "llama", "tie_word_embeddings": False, "dtype": dtype, **config}
    write_json(folder / "config.json", fields)
    entries = []
    for key, array in tensors.items():
        bits = bf16_from(array) if dtype == "bfloat16" else array.astype(dtype)
        entries.append(Entry(key, CODES[dtype], bits.shape, lambda bits=bits: bits))
    if shards == 1:
        write_stream(folder / WEIGHTS, entries)
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"part-{number}.safetensors"
        own = entries[number::shards]
        write_stream(folder / name, own)
        weight_map |= {entry.name: name for entry in own}
    index = {"metadata": {"of": "us"}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return folder


def lora_tensors(path: str, A: np.ndarray, B: np.ndarray) -> dict[str, np.ndarray]:
    stem = f"{PREFIX}{path}.lora_"
    return {f"{stem}A.weight": np.float32(A), f"{stem}B.weight": np.float32(B)}


def write_small(folder: Path, tied: bool = False, **config: Any) -> tuple[Path, Path]:
    """A base with a linear layer, an embedding and, unless `tied`, a head; and an adapter on the
    layer."""
    rng = np.random.default_rng(0)
    shapes = {LAYER: (4, 4), "model.embed_tokens": (7, 4), "lm_head": (7, 4)}
    if tied:
        del shapes["lm_head"]
    weights = {f"{path}.weight": rng.normal(size=shape) for path, shape in shapes.items()}
    base = write_base(folder / "base", weights, **config)
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    tensors = lora_tensors(LAYER, rng.normal(size=(2, 4)), np.ones((4, 2)))
    write_adapter(folder / "adapter", fields, tensors)
    return base, folder / "adapter"
