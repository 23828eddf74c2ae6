"""A checkpoint of bitsandbytes' 4-bit codes with floats in their place, to write it anew.

A layer's codes `X.weight` (bytes, 1), with the tensors `X.weight.absmax` and others beside them,
are here one tensor `X.weight` (O, I) in float32, exactly the numbers that the layer computes with;
in the files of GPT-2 it is transposed. It is decoded when it is read, one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike

from ..errors import FormatError
from ..formats import Checkpoint
from ..formats.checkpoint import is_stored_transposed, to_file_layout
from ..formats.disk import PathLike, quoted
from .bitsandbytes import QuantizationScheme, find_state, read_bitsandbytes, read_state

Array = np.ndarray
CODES = ".weight"  # ends the key of a layer's codes; the keys beside them have more parts


class DecodedCheckpoint(Checkpoint):
    """The tensors of a folder whose config.json announces codes of `scheme`: use `with`.

    FormatError if no layer is stored so, or for a layer that is damaged.
    """

    def __init__(self, directory: PathLike, model_type: str, scheme: QuantizationScheme) -> None:
        super().__init__(directory)
        self._model_type = model_type
        self._scheme = scheme
        self._coded: dict[str, list[str]] = {}
        self._decoded: dict[str, Array] = {}
        try:
            self._find_layers()
            self._shapes = {key: self._shape_of(key) for key in self._coded}
        except BaseException:
            self.close()
            raise
        beside = {name for names in self._coded.values() for name in names} - self._coded.keys()
        self._files = dict(self._entries)
        self._entries = {key: file for key, file in self._files.items() if key not in beside}
        for shard, keys in self.shards.items():
            self.shards[shard] = [key for key in keys if key not in beside]

    def _find_layers(self) -> None:
        """Fill `_coded`: the keys of each coded layer's tensors, by the key of its codes."""
        for key in self.keys():
            path, codes, more = key.partition(f"{CODES}.")
            if codes and more:
                self._coded.setdefault(path + CODES, [path + CODES]).append(key)
        if not self._coded:
            raise FormatError(
                f"{quoted(self.directory)}: quantization_config says {self._scheme}, but no layer "
                "is stored so"
            )

    def _where(self, key: str) -> str:
        return f"{quoted(self.directory)}: {key.removesuffix(CODES)}"

    def _names(self, key: str) -> dict[str, str]:
        """The keys of a coded layer's tensors by their names after the layer's path."""
        path = key.removesuffix(CODES)
        return {name.removeprefix(f"{path}."): name for name in self._coded[key]}

    def _shape_of(self, key: str) -> tuple[int, ...]:
        """(O, I) of a coded layer, from the JSON object beside its codes."""
        names = self._names(key)
        where = self._where(key)
        name, kind = find_state(names, where)
        nested = "weight.nested_absmax" in names
        state = read_state(super().read_bytes(names[name]).tobytes(), kind, nested, where)
        shape = tuple(state["shape"])
        codes = super().shape(key)
        if codes != (-(-math.prod(shape) // 2), 1):
            raise FormatError(f"{where}: the codes are {codes}, too many or too few for {shape}")
        return shape[::-1] if is_stored_transposed(self._model_type, key) else shape

    def _decode(self, key: str) -> Array:
        """The float32 weight of a coded layer, as the files of its type of model hold it."""
        where = self._where(key)
        tensors = {name: self._files[k].read(k) for name, k in self._names(key).items()}
        layer = read_bitsandbytes(tensors, where)
        if QuantizationScheme.of(layer) != self._scheme:
            raise FormatError(
                f"{where} is {QuantizationScheme.of(layer)}, quantization_config says "
                f"{self._scheme}"
            )
        weight = layer.weight.quantized.decode(np.dtype(np.float32))
        return to_file_layout(self._model_type, key, weight)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key] if key in self._coded else super().shape(key)

    def dtype(self, key: str) -> str:
        return "F32" if key in self._coded else super().dtype(key)

    def read(self, key: str, dtype: DTypeLike | None = None) -> Array:
        if key not in self._coded:
            return super().read(key, dtype)
        weight = self._decode(key)
        return weight if dtype is None else weight.astype(dtype, copy=False)

    def read_bits(self, key: str) -> Array:
        return self._decode(key) if key in self._coded else super().read_bits(key)

    def read_rows(self, key: str, rows: slice) -> Array:
        """Some rows of one tensor. The last coded layer stays decoded for the next rows."""
        if key not in self._coded:
            return super().read_rows(key, rows)
        if key not in self._decoded:
            self._decoded = {key: self._decode(key)}
        return self._decoded[key][rows]

    def read_bytes(self, key: str) -> Array:
        if key in self._coded:
            return self._decode(key).reshape(-1).view(np.uint8)
        return super().read_bytes(key)

    def require_floats(self, keys: Iterable[str]) -> None:
        super().require_floats(key for key in keys if key not in self._coded)
