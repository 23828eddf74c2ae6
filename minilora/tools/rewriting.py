"""A folder that appears whole or not at all, and a checkpoint that is written anew, tensor by tensor.

new_folder   written beside its place, and put there in one step; a killed run is gone on with
rewrite      a checkpoint -> a checkpoint: the same files and keys, each tensor as it is made
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import NonFiniteError
from ..formats import (
    Checkpoint,
    Entry,
    SafetensorsFile,
    read_json,
    write_json,
    write_stream,
)
from ..formats.checkpoint import CONFIG_FILE, INDEX_FILE, MAX_INDEX_BYTES
from ..formats.disk import atomic_file, open_regular
from ..formats.dtypes import DTYPES, FLOATS, round_to, row_blocks, widen

Array = np.ndarray
Row = dict[str, Any]
Make = Callable[[str], tuple[Array, Row | None]]

# What a model's folder holds besides config.json and weights, and a merged one needs: its tokenizer, how it generates.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


# ---- numbers as they are stored ----


def stored(
    file: Checkpoint | SafetensorsFile,
    key: str,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
) -> Array:
    """A tensor's bits, rounded to `dtype` if it is a float and one is given. NonFiniteError names it."""
    bits, source = file.read_bits(key), file.dtype(key)
    if source not in FLOATS:
        return bits
    target = dtype or source
    flat = bits.reshape(-1)
    out = flat if target == source else np.empty(flat.shape, round_to(np.zeros(0), target).dtype)
    for at in row_blocks(flat.shape):
        wide = widen(flat[at])
        if out is not flat:
            out[at] = round_to(wide.astype(np.float64), target)
            wide = widen(out[at])
        if not allow_nonfinite and not np.isfinite(wide).all():
            raise not_finite(file.directory if isinstance(file, Checkpoint) else file.path, key)
    return out.reshape(bits.shape)


def not_finite(where: str, key: str) -> NonFiniteError:
    return NonFiniteError(
        f"the weights in {where!r}, or of its adapter, are broken: {key} is not finite"
    )


# ---- a checkpoint written anew ----


def rewrite(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    stage: Path,
    make: Make,
    dtype: str | None = None,
    title: str = "",
    twins: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Write a checkpoint's shards again into `stage`, each tensor as `make(key)` gives its bits.

    dtype   of every float; None: each tensor's own
    twins   new keys, each with the key whose shard, shape and dtype it gets

    Returns make's rows. The files, the index and the other keys stay as they are. config.json comes
    last. A shard that exists already is not made again.
    """
    rows: list[Row] = []
    code = None if dtype is None else DTYPES[dtype]

    def dtype_of(key: str) -> str:
        own = checkpoint.dtype(twins.get(key, key))
        return code if code is not None and own in FLOATS else own

    def shape_of(key: str) -> tuple[int, ...]:
        return checkpoint.shape(twins.get(key, key))

    shards = {
        shard: [*keys, *(twin for twin, key in twins.items() if key in keys)]
        for shard, keys in checkpoint.shards.items()
    }
    every = [key for keys in shards.values() for key in keys]
    total = sum(math.prod(shape_of(key)) for key in every)
    with tqdm(
        total=total, desc=title, unit=" weights", unit_scale=True, disable=None, leave=False
    ) as bar:
        for number, (shard, keys) in enumerate(shards.items()):
            path, notes = stage / shard, stage / f".rows-{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (path.exists() and notes.exists()):
                found: list[Row] = []

                def read(key: str, found: list[Row] = found) -> Array:
                    array, row = make(key)
                    found += [] if row is None else [row]
                    bar.update(array.size)
                    return array

                write_stream(
                    path,
                    [Entry(k, dtype_of(k), shape_of(k), partial(read, k)) for k in keys],
                )
                write_json(notes, {"rows": found})
            else:
                bar.update(sum(math.prod(shape_of(key)) for key in keys))
            rows += read_json(notes, limit=MAX_INDEX_BYTES)["rows"]
    where = Path(checkpoint.directory)
    if [*checkpoint.shards] != ["model.safetensors"]:
        index = read_json(where / INDEX_FILE, limit=MAX_INDEX_BYTES)
        size = sum(_bytes(dtype_of(key)) * math.prod(shape_of(key)) for key in every)
        files = {key: shard for shard, keys in shards.items() for key in keys if key in twins}
        index["weight_map"] |= files
        about = index.get("metadata")
        about = {**(about if isinstance(about, dict) else {}), "total_size": size}
        write_json(stage / INDEX_FILE, {**index, "metadata": about})
    for name in COMPANIONS:
        if (where / name).is_file():
            _copy(where / name, stage / name)
    write_json(stage / CONFIG_FILE, config if dtype is None else _of_dtype(config, dtype))
    return rows


def _bytes(code: str) -> int:
    return {
        "F64": 8,
        "I64": 8,
        "U64": 8,
        "F32": 4,
        "I32": 4,
        "U32": 4,
        "BOOL": 1,
        "I8": 1,
        "U8": 1,
    }.get(code, 2)


def _of_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for weights of `dtype`; it has the field under the name that it has there, new or old."""
    old = "torch_dtype" in config and "dtype" not in config
    return {**config, ("torch_dtype" if old else "dtype"): dtype}


def _copy(source: Path, target: Path) -> None:
    with open_regular(source) as read, atomic_file(target) as write:
        shutil.copyfileobj(read, write, 1 << 20)
