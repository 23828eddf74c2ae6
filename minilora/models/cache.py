"""What a decoder remembers between the tokens that it writes: the keys and values of every position so far."""

from __future__ import annotations

from typing import Any

from ..backend import Array


class KeyValueCache:
    """The keys and values of the positions seen so far, up to `limit`: what makes generation incremental."""

    def __init__(self, model: Any, batch: int, limit: int):
        c, like = model.config, next(iter(model.parameters()))
        shape = (c.num_hidden_layers, 2, batch, limit, c.kv_heads, c.head_dim)
        self.data = like.backend.xp.empty(shape, like.dtype)
        self.length = 0
        self.limit = limit

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k and v (B, T, K, D) of one layer; returns all (B, S, K, D) so far. `advance` when every layer has."""
        stop = self.length + k.shape[1]
        keys, values = self.data[layer]
        keys[:, self.length : stop], values[:, self.length : stop] = k, v
        return keys[:, :stop], values[:, :stop]

    def advance(self, count: int) -> None:
        self.length += count
