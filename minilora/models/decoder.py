"""The skeleton that every decoder shares: an embedding, blocks one after another, a last norm."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..autograd import Tensor
from ..backend import Array
from ..nn import Embedding, Module, run_blocks
from .cache import Cache

# Of first weights; None leaves them zero. As text, because `np.random` takes time to import.
Generator: TypeAlias = "np.random.Generator | None"


class Positions(NamedTuple):
    """Where the T tokens of one forward are and what they may see: the same for every block.

    first_key   (B, T) integers, the first key that each token sees, counted over the cache and the
                T tokens; None: all earlier ones
    cos, sin    the rotation of q and k, as `functional.attention` reads them; None: no rotation
    cache       the tokens before these; None: there are none
    """

    first_key: Array | None = None
    cos: Array | None = None
    sin: Array | None = None
    cache: Cache | None = None

    def earlier(self, layer: int) -> dict[str, Any]:
        """What `functional.attention` needs of the cache in this layer; nothing without one."""
        if self.cache is None:
            return {}
        options = {"extend": functools.partial(self.cache.extend, layer)}
        if self.cache.passes_gradients:
            options["extend_back"] = functools.partial(self.cache.extend_back, layer)
        return options


class BaseDecoder(Module):
    """A language model without its head.    ids (B, T) -> (B, T, C)

    A subclass assigns its parts under the names that the files use, and lists them in `part_names`.
    """

    part_names: tuple[str, str, str]  # of the embedding, the list of blocks, the last norm
    recompute = False  # keep only each block's input for backward, and run the block again there

    def get_input_embeddings(self) -> Embedding:
        return getattr(self, self.part_names[0])  # type: ignore[no-any-return]

    def embed(self, ids: Array, places: Array) -> Tensor:
        """The embeddings (B, T, C) of tokens; `places` (T,) or (B, T) are their positions."""
        return self.get_input_embeddings()(ids)

    def rotation(self, places: Array, end: int, like: Tensor) -> tuple[Array | None, Array | None]:
        """(cos, sin) at positions `places` (T,) or (B, T), all below `end`; (None, None) if none.

        They have the dtype and the device of `like`.
        """
        return None, None

    def __call__(
        self, ids: Array, cache: Cache | None = None, first_key: Array | None = None
    ) -> Tensor:
        """The last norm's output.

        cache       the keys and values of the tokens before `ids`, which is extended
        first_key   (B, T): the first key that each token sees (see `Positions`). A token's position
                    is counted from there
        """
        _, blocks, norm = (getattr(self, name) for name in self.part_names)
        x, positions = self.begin(ids, cache, first_key)
        return norm(run_blocks(blocks, x, positions, self.recompute))  # type: ignore[no-any-return]

    def begin(
        self, ids: Array, cache: Cache | None = None, first_key: Array | None = None
    ) -> tuple[Tensor, Positions]:
        """(the input of the first block, what all blocks know of the positions): see `__call__`."""
        start = cache.length if cache else 0
        end = start + ids.shape[1]
        places = self.get_input_embeddings().weight.backend.xp.arange(start, end)
        if first_key is not None:
            places = places - first_key
        x = self.embed(ids, places)
        return x, Positions(first_key, *self.rotation(places, end, x), cache)
