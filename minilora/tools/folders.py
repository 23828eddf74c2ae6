"""A folder that appears whole or not at all, and a checkpoint that is written anew, tensor by tensor.

new_folder   written beside its place, and put there in one step; a killed run is gone on with
rewrite      a checkpoint -> a checkpoint: the same files and keys, each tensor as it is made
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import (
    Checkpoint,
    Entry,
    SafetensorsFile,
    bf16_from,
    bf16_to_float32,
    read_json,
    write_json,
    write_stream,
)
from ..formats.checkpoint import CONFIG_FILE, INDEX_FILE, MAX_INDEX_BYTES
from ..formats.disk import atomic_file, open_regular, quoted, sync_folder
from ..runs import LOCK, locked, open_folder

Array = np.ndarray
Row = dict[str, Any]
Make = Callable[[str], tuple[Array, Row | None]]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by the names of config.json
FLOATS = ("F64", "F32", "F16", "BF16")
STAMP = "inputs.json"  # in an unfinished folder: what it is being made of
# What a model's folder holds besides config.json and weights, and a merged one needs: its tokenizer, how it generates.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
BLOCK = (
    1 << 16
)  # numbers at a time: in float64 they stay in the cache from the product to the rounding


# ---- numbers as they are stored ----


def widened(bits: Array) -> Array:
    """Stored numbers as NumPy can compute with them: bfloat16, which comes as uint16, exactly in float32."""
    return bf16_to_float32(bits) if bits.dtype == np.uint16 else bits


def rounded(exact: Array, dtype: str) -> Array:
    """float64 -> the format's `dtype`, to nearest, ties to even, once: not by way of another format."""
    if dtype == "BF16":
        return bf16_from(exact)
    with np.errstate(over="ignore"):
        return exact.astype(
            {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype], copy=False
        )


def blocks(shape: Sequence[int]) -> list[slice]:
    """The rows of an array, as slices of about BLOCK numbers."""
    rows, step = shape[0], max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


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
    out = flat if target == source else np.empty(flat.shape, rounded(np.zeros(0), target).dtype)
    for at in blocks(flat.shape):
        wide = widened(flat[at])
        if out is not flat:
            out[at] = rounded(wide.astype(np.float64), target)
            wide = widened(out[at])
        if not allow_nonfinite and not np.isfinite(wide).all():
            raise not_finite(file.directory if isinstance(file, Checkpoint) else file.path, key)
    return out.reshape(bits.shape)


def not_finite(where: str, key: str) -> NonFiniteError:
    return NonFiniteError(
        f"the weights in {where!r}, or of its adapter, are broken: {key} is not finite"
    )


# ---- folders ----


def outside(out: str | Path, **sources: str | Path) -> None:
    """ConfigError if `out` is one of the folders `sources`, by the names of their options, or inside one."""
    there = Path(out).resolve()
    for name, source in sources.items():
        if Path(source).resolve() in (there, *there.parents):
            raise ConfigError(f"--out {str(out)!r} is inside --{name}: choose another folder")


@contextmanager
def new_folder(out: str | Path, inputs: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into that becomes `out`, which must be new or empty, when the block ends well.

    What fails, or is interrupted, takes it away. A run that was killed leaves it beside `out`; the next one with the
    same `inputs` finds there what was finished, and another one starts afresh.
    """
    there = Path(out).exists()
    try:
        with locked(out) as held:
            open_folder(held)
            real = held.resolve()
            stage = real.parent / f".{_short(real.name)}.unfinished"
            try:
                _begin(stage, {"out": real.name, **inputs})
                yield stage
                (stage / STAMP).unlink()
                for file in stage.glob(".*"):
                    file.unlink()
                sync_folder(stage)
                (real / LOCK).unlink()
                real.rmdir()  # whoever takes the lock in between makes this fail, and has the folder
                os.rename(stage, real)
                sync_folder(real.parent)
            except BaseException:  # KeyboardInterrupt too
                shutil.rmtree(stage, ignore_errors=True)
                raise
    except BaseException:
        with suppress(OSError):  # there is something in it, then
            if there:
                Path(out).mkdir(exist_ok=True)
            else:
                Path(out).rmdir()
        raise


def _short(name: str) -> str:
    """A name that can be made longer. Two that begin alike differ: runs at once must not share an unfinished folder."""
    return (
        name
        if len(name) <= 40
        else f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    )


def _begin(stage: Path, inputs: Mapping[str, Any]) -> None:
    if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
        raise FormatError(f"{quoted(stage)} is in the way")
    asked = json.loads(json.dumps(inputs))
    with suppress(OSError, FormatError):
        if read_json(stage / STAMP) == asked:
            return
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    write_json(stage / STAMP, asked)


def fingerprint(folder: str | Path) -> dict[str, list[int]]:
    """Sizes and times of the files that a folder's meaning depends on: two that are alike hold the same."""
    found = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix in (".safetensors", ".json") and file.is_file():
            stat = file.stat()
            found[str(file.relative_to(folder))] = [stat.st_size, stat.st_mtime_ns]
    return found


# ---- a checkpoint written anew ----


def rewrite(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    stage: Path,
    make: Make,
    dtype: str | None = None,
    title: str = "",
) -> list[Row]:
    """Write a checkpoint's shards anew into `stage`, each tensor as `make(key)` gives its bits; returns make's rows.

    The files, the index and the keys stay as they are; floats are announced as `dtype`, if one is given. config.json
    says so, and comes last. A shard that is there already is not made again.
    """
    rows: list[Row] = []
    code = None if dtype is None else DTYPES[dtype]

    def announced(key: str) -> str:
        there = checkpoint.dtype(key)
        return code if code is not None and there in FLOATS else there

    total = sum(math.prod(checkpoint.shape(key)) for key in checkpoint.keys())
    with tqdm(
        total=total, desc=title, unit=" weights", unit_scale=True, disable=None, leave=False
    ) as bar:
        for number, (shard, keys) in enumerate(checkpoint.shards.items()):
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
                    [Entry(k, announced(k), checkpoint.shape(k), partial(read, k)) for k in keys],
                )
                write_json(notes, {"rows": found})
            else:
                bar.update(sum(math.prod(checkpoint.shape(key)) for key in keys))
            rows += read_json(notes, limit=MAX_INDEX_BYTES)["rows"]
    where = Path(checkpoint.directory)
    if [*checkpoint.shards] != ["model.safetensors"]:
        index = read_json(where / INDEX_FILE, limit=MAX_INDEX_BYTES)
        size = sum(_bytes(announced(k)) * math.prod(checkpoint.shape(k)) for k in checkpoint.keys())
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
