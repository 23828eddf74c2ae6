"""Trainable tokens: only some rows of an embedding are trained (PEFT's TrainableTokens).

    W' = W, with trainable_tokens_delta (n, C) in place of its rows `indices`

PEFT's name for the tensor suggests a difference, but its values are the rows themselves. A head
that is tied to the embedding has W' too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, namespace, record
from ..backend import Array, Backend
from ..nn import Embedding, Module, Parameter
from .factors import Part, float64
from .layer import Wrapper, find_owner
from .merging import Merged, Merging, merge_rows


def replace_rows(W: Tensor, at: Array, rows: Tensor) -> Tensor:
    """W with `rows` in place of its rows `at`.

    W (V, C), at (n,) integers in [0, V), distinct, on W's device, rows (n, C) -> (V, C)
    dW is dy with zeros in these rows, drows is dy[at].
    """
    namespace(W, rows)
    out = W.data.copy()
    out[at] = rows.data
    need_dW = W.requires_grad

    def vjp(dy: Array) -> F.Grads:
        if not need_dW:
            return None, dy[at]
        dW = dy.copy()
        dW[at] = 0
        return dW, dy[at]

    return record(out, (W, rows), vjp)


class TokenRows(Module):
    """The rows of one adapter: trainable_tokens_delta (n, C), at first equal to the base's."""

    TENSORS = ("trainable_tokens_delta",)
    SUFFIX = ""  # as of LoraAdapter
    INSIDE = ".token_adapter"
    SHARED = ()

    def __init__(self, weight: Parameter, indices: Sequence[int]):
        self.indices = np.array(indices, np.int64)
        self._moved: dict[Backend, Array] = {}  # the indices on a device, once they were used there
        at = self.indices_on(weight.backend)
        self.trainable_tokens_delta = Parameter(weight.read_rows(at))

    def indices_on(self, backend: Backend) -> Array:
        """The indices as an array of a device: a step must not send them again."""
        if backend not in self._moved:
            self._moved[backend] = backend.from_numpy(self.indices)
        return self._moved[backend]

    def merge_into(self, W: Array, dtype: str) -> Merged:
        """W (V, C), stored as `dtype`, with these rows rounded once."""
        return merge_rows(W, self.indices, float64(self.trainable_tokens_delta), dtype)


class TrainableTokens(Merging, Wrapper):
    """An embedding, or a head, some of whose rows are an adapter's.

    ids (...) -> (..., C), or x (..., C) -> (..., V)
    adapters   those of the embedding, for a head that is tied to it: one parameter in two places
    """

    adapters: dict[str, TokenRows]

    @property
    def weight(self) -> Parameter:
        """The base's weight (V, C), with merged adapters alone."""
        return self.base_layer.weight  # type: ignore[no-any-return]

    def __call__(self, x: Any) -> Tensor:
        base = self.base_layer
        running = self.running
        if not running:
            return self.refuse_gradients(base(x))
        W: Tensor = base.weight
        for adapter in running:
            W = replace_rows(W, adapter.indices_on(W.backend), adapter.trainable_tokens_delta)
        return F.embedding(x, W) if isinstance(base, Embedding) else F.linear(x, W, base.bias)

    def write_effective_weight(self, out: Array, tokens: int | None) -> None:
        """None: a head has no prepared weight."""

    def _merge_into(
        self, W: Array, dtype: str, names: Sequence[str]
    ) -> tuple[Merged, Sequence[Part]]:
        return self.adapters[names[-1]].merge_into(W, dtype), []  # replaced rows have no factors

    def result(self, names: Sequence[str]) -> Any:
        """The base layer. ConfigError if several adapters have rows here; PEFT refuses that too."""
        find_owner(self.adapters, names, "have rows of one embedding")
        return self.base_layer

    def delta_weight(self, name: str) -> np.ndarray:
        """W' - W of one adapter in float64, (V, C) for a head and (C, V) for an embedding."""
        W = float64(self.original.weight)
        change = self.adapters[name].merge_into(W, "F64").weight - W
        return np.asarray(change.T if isinstance(self.original, Embedding) else change)
