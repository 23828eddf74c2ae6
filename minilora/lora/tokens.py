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
from ..nn import Embedding, LinearBase, Module, Parameter, frozen_linear
from .embedding import OneHot
from .layer import Wrapper
from .merging import Merging


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

    def as_linear(self, base: Any) -> LinearBase:
        return OneHot(base) if isinstance(base, Embedding) else base

    def rebuilt(self, weight: Array, base: Any) -> Any:
        return (
            OneHot(base).rebuilt(weight)
            if isinstance(base, Embedding)
            else frozen_linear(weight, base)
        )

    def merged_weight(self, W: Array, names: Sequence[str]) -> Array:
        """W with the rows in their places, which takes no rounding."""
        total = W.copy()
        table = total.T if isinstance(self.base_layer, Embedding) else total  # (V, C)
        for name in names:
            rows = self.adapters[name]
            table[rows.trainable_tokens_delta.backend.from_numpy(rows.indices)] = (
                rows.trainable_tokens_delta.data
            )
        return total

    def result(self, names: Sequence[str]) -> Any:
        """The base layer. ConfigError where two adapters have rows here: only one of them can be active, as in PEFT."""
        found = [n for n in names if n in self.adapters]
        if len(set(found)) > 1:
            raise ConfigError(
                f"adapters {', '.join(found)} each have rows of one embedding: only one can be active"
            )
        return self.base_layer

    def delta_weight(self, name: str) -> np.ndarray:
        """W' - W of one adapter, (V, C) of a head and (C, V) of an embedding, in float64 on the host."""
        base = self.as_linear(self._original or self.base_layer)
        W = base.dense_weight()
        return base.backend.to_numpy(
            self.merged_weight(W, [name]).astype(np.float64) - W.astype(np.float64)
        )
