"""Trainable tokens: a few rows of an embedding are trained, and nothing else of it (PEFT's TrainableTokens).

    W' = W, with trainable_tokens_delta (n, C) in place of its rows `indices`

The tensor has the name of a difference, but holds the rows themselves. A head that is tied to the embedding has W'
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, namespace, record
from ..backend import Array
from ..errors import ConfigError
from ..nn import Embedding, Module, Parameter
from .factors import float64
from .layer import Wrapper
from .merging import Merged, Merging, merge_rows


def replace_rows(W: Tensor, indices: np.ndarray, rows: Tensor) -> Tensor:
    """W with other rows.    W (V, C), indices (n,) in [0, V) and distinct, rows (n, C) -> (V, C)

    dW is dy, but zero in these rows; drows is dy there.
    """
    namespace(W, rows)
    at = W.backend.from_numpy(indices)
    out = W.data.copy()
    out[at] = rows.data
    need_dW = W.requires_grad

    def vjp(dy: Array) -> F.Grads:
        dW = dy.copy() if need_dW else None
        if dW is not None:
            dW[at] = 0
        return dW, dy[at]

    return record(out, (W, rows), vjp)


class TokenRows(Module):
    """The rows of one adapter: trainable_tokens_delta (n, C), which start as the base's."""

    TENSORS = ("trainable_tokens_delta",)

    def __init__(self, weight: Parameter, indices: Sequence[int]):
        self.indices = np.array(indices, np.int64)
        self.trainable_tokens_delta = Parameter(
            weight.take(weight.backend.from_numpy(self.indices))
        )


class TrainableTokens(Merging, Wrapper):
    """An embedding, or a head, some of whose rows are an adapter's.    ids (...) -> (..., C), or x (..., C) -> (..., V)

    rows   those of the embedding, for a head that is tied to it: one parameter in two places
    """

    ATTRIBUTES = "base_layer", "adapters"

    def __init__(self, base_layer: Any, rows: dict[str, TokenRows] | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.adapters: dict[str, TokenRows] = {} if rows is None else rows

    @property
    def current(self) -> Any:
        return self.base_layer

    @property
    def weight(self) -> Parameter:
        """The base's weight (V, C), without what is not merged."""
        return self.base_layer.weight  # type: ignore[no-any-return]

    def __call__(self, x: Any) -> Tensor:
        base, running = self.base_layer, self.running
        if not running:
            return base(x)  # type: ignore[no-any-return]
        W: Tensor = base.weight
        for adapter in running:
            W = replace_rows(W, adapter.indices, adapter.trainable_tokens_delta)
        return F.embedding(x, W) if isinstance(base, Embedding) else F.linear(x, W, base.bias)

    def effective(self, out: Array, tokens: int | None) -> None:
        """None: a head runs on its own."""

    def _merge_into(self, W: Array, dtype: str, names: Sequence[str]) -> Merged:
        rows = self.adapters[names[-1]]
        return merge_rows(W, rows.indices, float64(rows.trainable_tokens_delta), dtype)

    def _share_lost(self, merged: Merged, names: Sequence[str]) -> float:
        return merged.share_lost([])  # rows that are replaced have no factors

    def result(self, names: Sequence[str]) -> Any:
        """The base layer. ConfigError where two adapters have rows here: only one of them can be active, as in PEFT."""
        found = [n for n in names if n in self.adapters]
        if len(set(found)) > 1:
            raise ConfigError(
                f"adapters {', '.join(found)} each have rows of one embedding: only one can be active"
            )
        return self.base_layer

    def delta_weight(self, name: str) -> np.ndarray:
        """W' - W of one adapter, (V, C) for a head and (C, V) for an embedding, in float64 on the host."""
        W = float64(self.original.weight)
        rows = self.adapters[name]
        merged = merge_rows(W, rows.indices, float64(rows.trainable_tokens_delta), "F64")
        change = merged.weight - W
        return np.asarray(change.T if isinstance(self.original, Embedding) else change)
