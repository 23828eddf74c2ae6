"""The skeleton that every decoder shares: an embedding, blocks one after another, a last norm."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from ..autograd import Tensor
from ..backend import Array
from ..nn import Embedding, Module, run_blocks
from .cache import KeyValueCache

# Of first weights; None leaves them zero. As text, because `np.random` takes time to import.
Generator: TypeAlias = "np.random.Generator | None"


class BaseDecoder(Module):
    """A language model without its head.    ids (B, T) -> (B, T, C)

    A subclass assigns its parts under the names that the files use, and lists them in `part_names`.
    """

    part_names: tuple[str, str, str]  # of the embedding, the list of blocks, the last norm
    recompute = False  # keep only each block's input for backward, and run the block again there

    def get_input_embeddings(self) -> Embedding:
        return getattr(self, self.part_names[0])  # type: ignore[no-any-return]

    def embed(self, ids: Array, start: int) -> Tensor:
        """The embeddings (B, T, C) of tokens at positions start, start + 1, ..."""
        return self.get_input_embeddings()(ids)

    def __call__(self, ids: Array, cache: KeyValueCache | None = None) -> Tensor:
        _, blocks, norm = (getattr(self, name) for name in self.part_names)
        x = self.embed(ids, cache.length if cache else 0)
        return norm(run_blocks(blocks, x, cache, self.recompute))  # type: ignore[no-any-return]
