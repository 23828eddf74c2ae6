"""What a model is told of the positions before those that it computes: their keys and values."""

from __future__ import annotations

import copy
from typing import Any

from ..backend import Array


class Cache:
    """The positions before those that a model is given.

    length              how many they are
    passes_gradients    whether `extend_back` can be called
    """

    length: int = 0
    passes_gradients = False

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k and v (B, T, K, D) of one layer; return its k and v (B, S, K, D) so far."""
        raise NotImplementedError

    def extend_back(self, layer: int, dk: Array, dv: Array) -> tuple[Array, Array]:
        """The gradient of `extend`: from dk, dv (B, S, K, D) of its results to (B, T, K, D)."""
        raise NotImplementedError

    def advance(self, count: int) -> None:
        """Take note that every layer has been extended by `count` positions."""


class KeyValueCache(Cache):
    """The keys and values of at most `limit` positions, which make generation incremental.

    data     (layers, 2, B, limit, K, D): of each layer its keys, then its values
    length   how many positions have been seen
    """

    def __init__(self, model: Any, batch: int, limit: int):
        c = model.config
        parameter = next(iter(model.parameters()))
        shape = (c.num_hidden_layers, 2, batch, limit, c.kv_heads, c.head_dim)
        self.data = parameter.backend.xp.empty(shape, parameter.dtype)
        self.length = 0
        self.limit = limit

    def part(self, rows: slice) -> KeyValueCache:
        """The cache of some of the sequences: in the same memory, with a length of its own."""
        part = copy.copy(self)
        part.data = self.data[:, :, rows]
        return part

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k and v (B, T, K, D) of one layer; return its k and v (B, S, K, D) so far.

        The length stays as it is until `advance`, which follows when every layer has been extended.
        """
        stop = self.length + k.shape[1]
        keys, values = self.data[layer]
        keys[:, self.length : stop] = k
        values[:, self.length : stop] = v
        return keys[:, :stop], values[:, :stop]

    def advance(self, count: int) -> None:
        self.length += count
