"""A checkpoint written anew, tensor by tensor.

stored    one tensor's bits, rounded once to another dtype
rewrite   a checkpoint -> a checkpoint: the same files and keys, with new tensors
copy_companions   the tokenizer and how to generate, from one checkpoint's folder to another
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import ConfigError, NonFiniteError, Rule
from ..formats import (
    Checkpoint,
    Entry,
    SafetensorsFile,
    read_checkpoint,
    read_json,
    safetensors,
    write_json,
    write_stream,
)
from ..formats.checkpoint import CONFIG_FILE, INDEX_FILE, MAX_INDEX_BYTES, WEIGHTS_FILE
from ..formats.disk import PathLike, atomic_file, open_regular, quoted
from ..formats.dtypes import DTYPES, FLOATS, empty_as, round_to, row_blocks, too_large, widen
from ..progress import progress_bar
from ..quant.bitsandbytes import read_quantization_config
from ..quant.decoded import DecodedCheckpoint

Array = np.ndarray
Row = dict[str, Any]
Make = Callable[[str], tuple[Array, Row | None]]

# The other files that a new checkpoint needs: the tokenizer, and how to generate.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DTYPE_RULE = Rule("--dtype", lambda dtype: dtype is None or dtype in DTYPES, " or ".join(DTYPES))


def progress(parts: Iterable[str], title: str, unit: str = "layers") -> Any:
    """The parts, with a progress bar while they are worked on."""
    return progress_bar(parts, desc=title, unit=f" {unit}", leave=False)


def read_dense(
    folder: str | Path, dtype: str | None = None
) -> tuple[dict[str, Any], Checkpoint, str | None]:
    """(config.json, the open tensors, the dtype to write) of a checkpoint without its quantization.

    The layers that bitsandbytes stores as 4-bit codes are decoded: they were in float32, or in the
    dtype that config.json names, which is then the one to write unless `dtype` is given.
    ConfigError for any other quantization.
    """
    config, checkpoint = read_checkpoint(folder)
    quantization = config.get("quantization_config")
    if quantization is None:
        return config, checkpoint, dtype
    checkpoint.close()
    try:
        scheme = read_quantization_config(quantization)
    except ConfigError as error:
        where = quoted(Path(folder, CONFIG_FILE))
        reason = str(error).removeprefix("config: ")
        advice = "use the checkpoint that it was made from"
        raise ConfigError(f"{where}: it is quantized: {reason}: {advice}") from None
    named = config.get("dtype", config.get("torch_dtype"))
    if dtype is None:
        dtype = named if named in DTYPES else "float32"
    dense = {name: value for name, value in config.items() if name != "quantization_config"}
    return dense, DecodedCheckpoint(folder, str(config.get("model_type")), scheme), dtype


# ---- numbers as they are stored ----


def stored(
    file: Checkpoint | SafetensorsFile,
    key: str,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
) -> Array:
    """A tensor's bits; floats are rounded to `dtype` ("F32", ...) if it is given. NonFiniteError
    names the tensor.

    The bytes of a tensor whose dtype is not read (F8, F6, F4, ...); FormatError to round one.
    """
    source = file.dtype(key)
    if source not in safetensors.DTYPES and dtype is None:
        return file.read_bytes(key)
    bits = file.read_bits(key)
    if source not in FLOATS:
        return bits
    target = dtype or source
    numbers = bits.reshape(-1)
    out = numbers if target == source else empty_as(numbers.shape, target)
    for block in row_blocks(numbers.shape):
        wide = widen(numbers[block])
        folder = file.directory if isinstance(file, Checkpoint) else file.path
        if not allow_nonfinite and not np.isfinite(wide).all():
            raise not_finite(folder, key)
        if target != source:
            out[block] = round_to(wide.astype(np.float64), target)
            if not allow_nonfinite and not np.isfinite(widen(out[block])).all():
                raise too_large(key, quoted(folder), target)
    return out.reshape(bits.shape)


def not_finite(folder: str, key: str) -> NonFiniteError:
    """The error for a NaN or infinity in the new tensor `key`."""
    return NonFiniteError(
        f"{key} is not finite: the weights in {folder!r}, or those of an adapter for them, are "
        "broken; --allow-nonfinite writes them as they are"
    )


# ---- a checkpoint written anew ----


def rewrite(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    stage: Path,
    make: Make,
    dtype: str | None,
    title: str,
    twins: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[Row]:
    """Write a checkpoint's shards again into `stage`, each tensor with the bits that `make(key)`
    returns.

    dtype   of every float; None: each tensor keeps its dtype
    twins   new keys, each with the key whose shard, shape and dtype it gets
    shapes  new shapes, by key

    Returns make's rows. The files, the index and the other keys stay as they are. config.json comes
    last. A shard that exists already is not made again.
    """
    rows: list[Row] = []
    bar = progress_bar(desc=title, unit=" weights", unit_scale=True, leave=False)

    def entry(key: str) -> Entry:
        source = twins.get(key, key)
        code = checkpoint.dtype(source)
        if dtype is not None and code in FLOATS:
            code = DTYPES[dtype]

        def read() -> Array:
            bits, row = make(key)
            if row is not None:
                rows.append(row)
            bar.update(bits.size)
            return bits

        return Entry(key, code, shapes.get(source, checkpoint.shape(source)), read)

    shards = {}
    for shard, keys in checkpoint.shards.items():
        new_keys = [twin for twin, key in twins.items() if key in keys]
        if keys:  # of a shard may be left nothing, once codes are decoded
            shards[shard] = [entry(key) for key in (*keys, *new_keys)]
    with bar:
        bar.reset(sum(_count_weights(entries) for entries in shards.values()))
        for number, (shard, entries) in enumerate(shards.items()):
            path = stage / shard
            notes = stage / f".rows-{number}"
            if path.exists() and notes.exists():
                bar.update(_count_weights(entries))
                rows += read_json(notes, limit=MAX_INDEX_BYTES)["rows"]
                continue
            first = len(rows)
            write_stream(path, entries)
            write_json(notes, {"rows": rows[first:]})
    folder = Path(checkpoint.directory)
    if list(shards) != [WEIGHTS_FILE]:
        _write_index(folder, stage, shards)
    copy_companions(folder, stage)
    if dtype is not None:
        is_old = "torch_dtype" in config and "dtype" not in config
        config = {**config, "torch_dtype" if is_old else "dtype": dtype}
    write_json(stage / CONFIG_FILE, config)
    return rows


def copy_companions(base: PathLike, out: PathLike) -> None:
    """Copy the files of a base's folder that are neither weights nor config.json.

    They say how texts become ids and where generation stops, for the new checkpoint as for the old.
    """
    for name in COMPANIONS:
        if Path(base, name).is_file():
            with open_regular(Path(base, name)) as source, atomic_file(Path(out, name)) as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _count_weights(entries: list[Entry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


def _write_index(folder: Path, stage: Path, shards: dict[str, list[Entry]]) -> None:
    """The index in `folder` written to `stage`, with the keys of now and the new size."""
    index = read_json(folder / INDEX_FILE, limit=MAX_INDEX_BYTES)
    size = 0
    places = {}
    for shard, entries in shards.items():
        for entry in entries:
            places[entry.name] = shard
            size += safetensors.count_bytes(entry.dtype, entry.shape) or 0
    before = [key for key in index["weight_map"] if key in places]
    index["weight_map"] = {key: places[key] for key in (*before, *places)}
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    index["metadata"] = {**metadata, "total_size": size}
    write_json(stage / INDEX_FILE, index)
