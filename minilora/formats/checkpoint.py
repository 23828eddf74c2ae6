"""A base model's folder: config.json beside model.safetensors, whole or in shards <-> a dict and arrays by key.

Tensors are read one by one, when asked for. What the config means and what the keys name is the transformer's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import FormatError
from .disk import PathLike, json_after, quoted, read_json, require_folder
from .safetensors import Array, Entry, SafetensorsFile, save_file, write_stream

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_NAME = 255  # characters of a shard's name; that is what most file systems take
MAX_INDEX_BYTES = 16 << 20  # that of a model of 90,000 tensors in 160 shards takes nine


class Checkpoint:
    """The tensors of a folder by key, over one file or many. Use it in a `with` block; it holds the files open."""

    def __init__(self, directory: PathLike) -> None:
        require_folder(directory, "model")
        self.directory = os.fspath(directory)
        self._files: dict[str, SafetensorsFile] = {}
        self.shards: dict[
            str, list[str]
        ] = {}  # the files' names in the folder, and the keys of each
        with ExitStack() as opened:
            if os.path.lexists(os.path.join(directory, WEIGHTS_FILE)):
                file = opened.enter_context(SafetensorsFile(os.path.join(directory, WEIGHTS_FILE)))
                self._files = dict.fromkeys(file.keys(), file)
                self.shards = {WEIGHTS_FILE: file.keys()}
            elif os.path.lexists(os.path.join(directory, INDEX_FILE)):
                self._open_shards(opened)
            else:
                pickles = sorted(
                    n for n in os.listdir(directory) if n.endswith((".bin", ".pt", ".pth", ".ckpt"))
                )
                hint = (
                    f"; {quoted(pickles[0])} is a pickle, and only safetensors are read"
                    if pickles
                    else ""
                )
                raise FormatError(
                    f"{quoted(directory)} has no {WEIGHTS_FILE} and no {INDEX_FILE}{hint}"
                )
            self._opened = opened.pop_all()

    def _open_shards(self, opened: ExitStack) -> None:
        index = os.path.join(self.directory, INDEX_FILE)
        where = quoted(index)
        weight_map = read_json(index, limit=MAX_INDEX_BYTES).get("weight_map")
        if type(weight_map) is not dict or any(
            type(shard) is not str for shard in weight_map.values()
        ):
            raise FormatError(f"{where}: weight_map must give a file name for each tensor")
        listed: dict[str, set[str]] = {}
        for key, shard in weight_map.items():
            listed.setdefault(shard, set()).add(key)
        root = os.path.realpath(self.directory)
        paths = {}
        for shard in sorted(listed):
            # The index may come from anywhere: no name in it may lead out of the folder, not through a link either.
            # (A path of many parts takes `realpath` quadratic time.)
            if (
                len(shard) > MAX_NAME
                or "\\" in shard
                or "\0" in shard
                or not shard.endswith(".safetensors")
            ):
                raise FormatError(f"{where}: {quoted(shard)} is not the name of a safetensors file")
            paths[shard] = os.path.realpath(os.path.join(root, shard))
            if os.path.isabs(shard) or os.path.commonpath([root, paths[shard]]) != root:
                raise FormatError(f"{where}: shard {quoted(shard)} lies outside the folder")
            if not os.path.lexists(paths[shard]):
                raise FormatError(f"{where}: shard {quoted(shard)} is missing")
        for shard, path in paths.items():
            file = opened.enter_context(SafetensorsFile(path))
            absent, unlisted = listed[shard] - set(file.keys()), set(file.keys()) - listed[shard]
            if absent or unlisted:
                key = min(absent or unlisted)
                state = (
                    "is listed for it but not in it" if absent else "is in it but not listed for it"
                )
                raise FormatError(f"{where}: shard {quoted(shard)}: tensor {quoted(key)} {state}")
            self._files.update(dict.fromkeys(file.keys(), file))
            self.shards[shard] = file.keys()

    def _file(self, key: str) -> SafetensorsFile:
        if key not in self._files:
            raise FormatError(
                f"{quoted(self.directory)}: no tensor {quoted(key)} among its {len(self._files)}"
            )
        return self._files[key]

    def keys(self) -> list[str]:
        return list(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def __len__(self) -> int:
        return len(self._files)

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

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_checkpoint(directory: PathLike) -> tuple[dict[str, Any], Checkpoint]:
    """A model's folder -> (config.json as a dict, its open tensors: close them, or use `with`).

    FileNotFoundError without the folder; FormatError when a file is missing or damaged.
    """
    require_folder(directory, "model")
    path = os.path.join(directory, CONFIG_FILE)
    if not os.path.lexists(path):
        adapter = os.path.lexists(os.path.join(directory, "adapter_config.json"))
        hint = ": it is an adapter's folder, and no model's" if adapter else ""
        raise FormatError(f"{quoted(directory)} has no {CONFIG_FILE}{hint}")
    return read_json(path), Checkpoint(directory)


def write_checkpoint(
    directory: PathLike, config: dict[str, Any], tensors: Mapping[str, Array] | Iterable[Entry]
) -> None:
    """Write model.safetensors, then config.json. `tensors` are arrays, or entries to be written one at a time."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, WEIGHTS_FILE)
    with json_after(os.path.join(directory, CONFIG_FILE), config):
        if isinstance(tensors, Mapping):
            save_file(path, tensors)
        else:
            write_stream(path, tensors)


# Layers whose weight W (O, I) the files of a type of model hold as (in, out), by the last part of their paths.
FAN_IN_FAN_OUT = {"gpt2": ("c_attn", "c_proj", "c_fc")}


# What old files hold besides weights, by the ends of its keys: tables of the rotation, masks of attention.
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def is_stored_transposed(model_type: str, key: str) -> bool:
    """Do the files of this type of model hold a weight's transpose under `key`?"""
    path, _, tensor = key.rpartition(".")
    return tensor == "weight" and path.rpartition(".")[2] in FAN_IN_FAN_OUT.get(model_type, ())


def to_file_layout(model_type: str, key: str, array: np.ndarray) -> np.ndarray:
    """From a parameter to what the files hold under `key`, or back: its transpose, or as good as always itself."""
    return np.ascontiguousarray(array.T) if is_stored_transposed(model_type, key) else array
