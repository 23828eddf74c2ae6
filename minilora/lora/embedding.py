"""LoRA on an embedding, and on the head that is tied to it.

An embedding is the linear layer of one-hot vectors: the token's row W[t] is W^T e_t. So its adapter
is LoRA's, with the V tokens as inputs and the C channels as outputs:

    lora_embedding_A (r, V)    lora_embedding_B (C, r)
    y = W[t] + s B A[:, t]     dW^T = s B A (C, V)

A starts at zero here and B at random, because a step reads only some columns of A. It has no
dropout: no part of a one-hot vector can be left out. DoRA's magnitudes (C,) are the lengths of W's
columns.

A head of the same weight reads it the other way: y = W x. With `ensure_weight_tying` its adapter is
the embedding's, transposed: lora_A = B^T, lora_B = A^T. The two are one parameter, whose gradient
is the sum of both uses. (peft has two parameters over one storage, counts both, and gives each its
own state in the optimiser.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor
from ..backend import Array
from ..effective import Pull
from ..nn import Dropout, Embedding, LinearBase, Parameter, normal
from .config import LoraConfig
from .dora import DoraAdapter, row_scales
from .layer import Wrapper
from .lora import LoraAdapter
from .merging import Merging


class OneHot(LinearBase):
    """An embedding (V, C) as its adapter sees it: a linear layer W^T (C, V) with one-hot inputs."""

    bias = None
    trainable = property(lambda self: self.embedding.weight.requires_grad)
    weight = property(lambda self: self.embedding.weight)

    def __init__(self, embedding: Embedding):
        self.embedding = embedding
        self.in_features, self.out_features = embedding.weight.shape

    def dense_weight(self) -> Array:
        return self.embedding.weight.data.T


class EmbeddingAdapter(LoraAdapter):
    """The trainable pair of one embedding, with its scaling s.

    lora_embedding_A (r, V), lora_embedding_B (C, r)
    """

    TENSORS: tuple[str, ...] = ("lora_embedding_A", "lora_embedding_B")
    SUFFIX = ""  # in PEFT these are bare parameters
    lora_embedding_A: Parameter
    lora_embedding_B: Parameter
    lora_A = property(lambda self: self.lora_embedding_A)
    lora_B = property(lambda self: self.lora_embedding_B)

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
    ):
        self.r = config.rank(name)
        self.lora_alpha = config.layer_alpha(name)
        self.scaling = config.scaling(name)
        self.dropout = Dropout(0.0)
        for tensor, shape in EmbeddingAdapter.shapes(base, self.r).items():
            if tensor == EmbeddingAdapter.TENSORS[0] and config.init_lora_weights is not False:
                values = np.zeros(shape)  # so the start is the base, bit for bit
            else:
                values = normal(rng, 1.0, shape, np.float64)
            setattr(self, tensor, Parameter(base.backend.from_numpy(values.astype(base.dtype))))

    @staticmethod
    def shapes(base: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of an embedding, by name: r (V + C) numbers."""
        A, B = EmbeddingAdapter.TENSORS
        return {A: (r, base.in_features), B: (base.out_features, r)}

    def __call__(self, ids: Any, y: Tensor, base: LinearBase) -> Tensor:
        """y with this adapter added.    ids (...) integers, y (..., C) -> (..., C)"""
        columns = F.embedding(ids, self.lora_embedding_A.T)  # (..., r)
        return y + (columns @ self.lora_embedding_B.T) * self.scaling


class DoraEmbeddingAdapter(DoraAdapter, EmbeddingAdapter):
    """The same with lora_magnitude_vector (C,): W' = m (W + dW) / |W + dW| by column."""

    TENSORS = (*EmbeddingAdapter.TENSORS, "lora_magnitude_vector")

    @staticmethod
    def shapes(base: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of an embedding, by name: r (V + C) + C numbers."""
        return {**EmbeddingAdapter.shapes(base, r), "lora_magnitude_vector": (base.out_features,)}

    def __call__(self, ids: Any, y: Tensor, base: LinearBase) -> Tensor:
        """k (y + s B A[:, t]), with k = m / |W + dW| a constant to A and B.

        ids (...), y (..., C) -> (..., C)
        """
        k = row_scales(self.lora_magnitude_vector, self.norms(base.dense_weight()))
        return k * EmbeddingAdapter.__call__(self, ids, y, base)


class LoraEmbedding(Merging, Wrapper):
    """y = base(ids), then each active adapter adds to it.    ids (...) integers -> (..., C)"""

    base_layer: Embedding
    adapters: dict[str, EmbeddingAdapter]

    @property
    def weight(self) -> Parameter:
        """The base's weight (V, C), with merged adapters alone: a tied head shares it."""
        return self.base_layer.weight

    def as_linear(self, base: Embedding) -> OneHot:
        return OneHot(base)

    def __call__(self, ids: Any) -> Tensor:
        y = self.refuse_gradients(self.base_layer(ids))
        base = OneHot(self.base_layer)
        for adapter in self.running:
            y = adapter(ids, y, base)
        return y


class HeadAdapter(LoraAdapter):
    """An embedding's adapter for its tied head: lora_A = B^T (r, C), lora_B = A^T (V, r).

    It has no parameters: they are the embedding's.
    """

    lora_A = property(lambda self: self._source.lora_embedding_B.T)
    lora_B = property(lambda self: self._source.lora_embedding_A.T)

    def __init__(self, source: EmbeddingAdapter, dropout: float, stream: int = 0):
        self._source = source
        self.r = source.r
        self.lora_alpha = source.lora_alpha
        self.scaling = source.scaling
        self.dropout = Dropout(dropout, stream)

    def write_effective_weight(
        self, W: Array, base: LinearBase | None = None
    ) -> tuple[tuple[Tensor, ...], Pull]:
        """As LoRA's, with the embedding's parameters and their gradients: LoRA's, transposed."""
        _, pull = super().write_effective_weight(W)
        params = self._source.lora_embedding_B, self._source.lora_embedding_A

        def pull_transposed(X: Array, dY: Array) -> F.Grads:
            return tuple(None if g is None else g.T for g in pull.gradients(X, dY))

        return params, Pull(pull_transposed)
