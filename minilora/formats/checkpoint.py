"""A base model's folder: config.json beside model.safetensors, in one piece or in shards.

This file reads and writes them as a dict and arrays by key, one tensor at a time, when asked for.
minilora.models knows what the config means and which parameter a key names. What is known here is
how the files of a type of model hold a weight (O, I): as it is, or transposed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from ..errors import FormatError
from .disk import JsonObject, PathLike, json_after, quoted, read_json, require_folder
from .safetensors import (
    DTYPES,
    Array,
    Entry,
    SafetensorsFile,
    Tensors,
    save_file,
    write_stream,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_NAME = 255  # characters of a shard's name: what most file systems take
MAX_INDEX_BYTES = 16 << 20  # the index of a model of 90,000 tensors in 160 shards takes nine
HEAD = ".lm_head.weight"
TRIES = 10  # unknown keys of which one must show how the others begin
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# By type of model: the layers whose files hold W (O, I) as (in, out), by the last part of a path.
FAN_IN_FAN_OUT = {"gpt2": ("c_attn", "c_proj", "c_fc")}

# What old files hold besides weights, by the ends of its keys: tables of the rotation, masks of
# attention.
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def is_stored_transposed(model_type: str, key: str) -> bool:
    """Whether the files of this type of model hold the transpose of the weight under `key`."""
    path, _, tensor = key.rpartition(".")
    layer = path.rpartition(".")[2]
    return tensor == "weight" and layer in FAN_IN_FAN_OUT.get(model_type, ())


def to_file_layout(model_type: str, key: str, array: np.ndarray) -> np.ndarray:
    """A parameter as the files hold it under `key`, or back: transposed if they store it so."""
    return np.ascontiguousarray(array.T) if is_stored_transposed(model_type, key) else array


class Checkpoint(Tensors):
    """The tensors of a folder by key, over one file or many, which it keeps open: use `with`.

    shards    {file name in the folder: its keys}
    """

    def __init__(self, directory: PathLike) -> None:
        require_folder(directory, "model")
        self.directory = os.fspath(directory)
        self.shards: dict[str, list[str]] = {}
        self._entries: dict[str, SafetensorsFile] = {}
        with ExitStack() as opened:
            self._open(opened)
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack) -> None:
        whole = Path(self.directory, WEIGHTS_FILE)
        index = Path(self.directory, INDEX_FILE)
        if os.path.lexists(whole):
            self._add(WEIGHTS_FILE, opened.enter_context(SafetensorsFile(whole)))
        elif os.path.lexists(index):
            self._open_shards(index, opened)
        else:
            hint = ""
            pickles = [name for name in os.listdir(self.directory) if name.endswith(PICKLES)]
            if pickles:
                hint = f"; {quoted(min(pickles))} is a pickle, and only safetensors are read"
            raise FormatError(
                f"{quoted(self.directory)} has no {WEIGHTS_FILE} and no {INDEX_FILE}{hint}"
            )

    def _add(self, shard: str, file: SafetensorsFile) -> None:
        self.shards[shard] = file.keys()
        self._entries.update(dict.fromkeys(file, file))

    def _open_shards(self, index: Path, opened: ExitStack) -> None:
        where = quoted(index)
        listed = read_index(index)
        paths = {shard: self._path_of(shard, where) for shard in sorted(listed)}
        for shard, path in paths.items():
            file = opened.enter_context(SafetensorsFile(path))
            absent = listed[shard] - set(file)
            unlisted = set(file) - listed[shard]
            if absent or unlisted:
                key = quoted(min(absent or unlisted))
                state = "listed for it but not in it" if absent else "in it but not listed for it"
                raise FormatError(f"{where}: shard {quoted(shard)}: tensor {key} is {state}")
            self._add(shard, file)

    def _path_of(self, shard: str, where: str) -> str:
        """The path of a shard that the index names.

        The index may come from anywhere, so a name in it is that of a file in the folder, and no
        path. What the folder has under this name is its owner's business: the hub's cache has
        symbolic links to files elsewhere.
        """
        is_name = len(shard) <= MAX_NAME and shard.endswith(".safetensors")
        # Windows' rules know every separator, and a drive's letter.
        is_plain = is_name and PureWindowsPath(shard).name == shard and "\0" not in shard
        if not is_plain or shard.startswith("."):  # a hidden file is not a model's
            raise FormatError(
                f"{where}: {quoted(shard)} is not the name of a safetensors file in the folder: "
                "only plain names are read, without a path"
            )
        path = os.path.join(self.directory, shard)
        if not os.path.lexists(path):
            raise FormatError(
                f"{where}: shard {quoted(shard)} is missing: download the model again"
            )
        return path

    def _file(self, key: str) -> SafetensorsFile:
        if key not in self._entries:
            raise FormatError(
                f"{quoted(self.directory)}: no tensor {quoted(key)} among its {len(self)}"
            )
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._file(key).shape(key)

    def dtype(self, key: str) -> str:
        """The stored dtype under the format's name, such as "BF16"."""
        return self._file(key).dtype(key)

    def read(self, key: str, dtype: DTypeLike | None = None) -> Array:
        """One tensor in memory of its own; BF16 comes as float32. See `SafetensorsFile.read`."""
        return self._file(key).read(key, dtype)

    def read_bits(self, key: str) -> Array:
        """One tensor as it is stored; BF16 comes as uint16."""
        return self._file(key).read_bits(key)

    def read_rows(self, key: str, rows: slice) -> Array:
        """Some rows of one tensor, as `read_bits` gives them."""
        return self._file(key).read_rows(key, rows)

    def read_bytes(self, key: str) -> Array:
        """The bytes of one tensor of any dtype: uint8 (bytes,)."""
        return self._file(key).read_bytes(key)

    def require_floats(self, keys: Iterable[str]) -> None:
        """FormatError for the first of these tensors that does not hold floats."""
        for key in keys:
            self._file(key).require_floats([key])

    def close(self) -> None:
        self._opened.close()


def are_equal(one: Checkpoint, key: str, other: Checkpoint, other_key: str) -> bool:
    """Whether two tensors have the same numbers, NaN being NaN. Where they are not read: bytes."""
    if one.shape(key) != other.shape(other_key):
        return False
    dtypes = {one.dtype(key), other.dtype(other_key)}
    if dtypes <= DTYPES.keys():
        return np.array_equal(one.read(key), other.read(other_key), equal_nan=True)
    same_dtype = len(dtypes) == 1
    return same_dtype and np.array_equal(one.read_bytes(key), other.read_bytes(other_key))


def describe_prefix(keys: Iterable[str], expected: Collection[str]) -> str:
    """How the unknown ones of `keys` differ from the expected ones, if only their beginnings do."""
    prefixes = differing_prefixes(keys, expected)
    return describe_prefixes("its", *prefixes) if prefixes else ""


def describe_prefixes(whose: str, given: str, wanted: str) -> str:
    """In words: `whose` keys begin with `given` in place of `wanted`."""
    beginning = f"begin with {quoted(given)}" if given else "have no prefix"
    valid = f"{quoted(wanted)} is expected" if wanted else "none is expected"
    return f"{whose} keys {beginning} where {valid}: rename them"


def differing_prefixes(keys: Iterable[str], expected: Collection[str]) -> tuple[str, str] | None:
    """(the beginning of the unknown ones of `keys`, the expected one), if nothing else differs.

    None if nothing is unknown, or if one new beginning does not make all of them expected.
    """
    names = set(expected)
    unknown = _unknown(keys, names)
    prefixes = _prefixes_of(unknown[0], names) if unknown and names else None
    if prefixes is None or len(_renamed(unknown, names, *prefixes)) < len(unknown):
        return None
    return prefixes


class Alignment(NamedTuple):
    """Keys that differ from expected ones in their beginning alone, which is `old`, not `new`."""

    names: dict[str, str]  # the expected key, by the key
    old: str = ""
    new: str = ""

    def describe(self, whose: str, others: str) -> str:
        """In words: the keys of `whose` begin in another way than those of `others`."""
        prefixes = (self.old, self.new)
        these, those = (f"begin with {quoted(p)}" if p else "have no prefix" for p in prefixes)
        return f"the keys of {whose} {these}, those of {others} {those}: taken for the same"


def align_keys(keys: Iterable[str], expected: Collection[str]) -> Alignment:
    """Which of `keys` are expected ones with another beginning: "" for "model.", or "module.".

    More than half of the unknown keys must be. The head is never inside the decoder, so it may have
    another beginning than they. The others, such as a head that only one of two tied checkpoints
    stores, stay as they are.
    """
    keys = list(keys)
    unknown = _unknown(keys, set(expected))
    missing = set(expected) - set(keys)
    for key in unknown[:TRIES]:
        prefixes = _prefixes_of(key, missing) if missing else None
        names = _renamed(unknown, missing, *prefixes) if prefixes else {}
        if prefixes and 2 * len(names) > len(unknown):
            heads = zip(_heads(unknown), _heads(missing), strict=False)
            return Alignment({**dict(heads), **names}, *prefixes)
    return Alignment({})


def _heads(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if f".{key}".endswith(HEAD)]


def _unknown(keys: Iterable[str], names: Collection[str]) -> list[str]:
    return [key for key in keys if key not in names and not key.endswith(BUFFERS)]


def _prefixes_of(key: str, names: Collection[str]) -> tuple[str, str] | None:
    """(the beginning of a key, that of the name whose end is most like its end), or None."""
    parts = key.split(".")
    nearest = max(names, key=lambda name: (_common_end(parts, name.split(".")), -len(name), name))
    common = _common_end(parts, nearest.split("."))
    end = "".join(f".{part}" for part in parts[len(parts) - common :])
    old = f".{key}".removesuffix(end).removeprefix(".")
    new = f".{nearest}".removesuffix(end).removeprefix(".")
    old, new = (f"{prefix}." if prefix else "" for prefix in (old, new))
    of_another_layer = any(part.isdecimal() for part in (old + new).split("."))
    return None if common < 2 or of_another_layer else (old, new)


def _renamed(keys: Iterable[str], names: Collection[str], old: str, new: str) -> dict[str, str]:
    """Those of `keys` that are among `names` with the beginning `new` in the place of `old`."""
    renamed = {key: new + key[len(old) :] for key in keys if key.startswith(old)}
    return {key: name for key, name in renamed.items() if name in names}


def _common_end(one: list[str], other: list[str]) -> int:
    """The number of parts at the end in which two names agree."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def read_index(path: Path) -> dict[str, set[str]]:
    """{shard: its keys}, as the index lists them."""
    weight_map = read_json(path, limit=MAX_INDEX_BYTES).get("weight_map")
    if type(weight_map) is not dict or any(type(name) is not str for name in weight_map.values()):
        raise FormatError(f"{quoted(path)}: weight_map must give a file name for each tensor")
    listed: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        listed.setdefault(shard, set()).add(key)
    return listed


def read_checkpoint(directory: PathLike) -> tuple[JsonObject, Checkpoint]:
    """(config.json as a dict, the open tensors) of a model's folder: close them, or use `with`.

    FileNotFoundError without the folder; FormatError when a file is missing or damaged.
    """
    require_folder(directory, "model")
    path = Path(directory, CONFIG_FILE)
    if not os.path.lexists(path):
        hint = ""
        if os.path.lexists(Path(directory, "adapter_config.json")):
            hint = ": it is an adapter's folder, not a model's"
        raise FormatError(f"{quoted(directory)} has no {CONFIG_FILE}{hint}")
    return read_json(path), Checkpoint(directory)


def write_checkpoint(
    directory: PathLike, config: JsonObject, tensors: Mapping[str, Array] | Iterable[Entry]
) -> None:
    """Write model.safetensors, then config.json.

    `tensors` are arrays by key, or entries to be written one at a time.
    """
    os.makedirs(directory, exist_ok=True)
    path = Path(directory, WEIGHTS_FILE)
    with json_after(Path(directory, CONFIG_FILE), config):
        if isinstance(tensors, Mapping):
            save_file(path, tensors)
        else:
            write_stream(path, tensors)
