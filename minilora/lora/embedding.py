"""LoRA on an embedding, and on the head that is tied to it.

An embedding is the linear layer of one-hot vectors: the token's row W[t] is W^T e_t. So an adapter of it is LoRA's, its
inputs the V tokens and its outputs the C channels:

    lora_embedding_A (r, V)    lora_embedding_B (C, r)    y = W[t] + s B A[:, t]        dW^T = s B A (C, V)

A starts at zero here and B at random, for A's columns are met one by one. There is no dropout: no part of a one-hot
vector can go. DoRA's magnitudes (C,) are the lengths of W's columns.

A head of the same weight reads it the other way: y = W x. With `ensure_weight_tying` its adapter is the embedding's,
turned: lora_A = B^T, lora_B = A^T. The two are one parameter, whose gradient is the sum of both uses. (peft has two
parameters over one storage, counts both, and gives each a state of the optimiser of its own.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor
from ..backend import Array
from ..effective import Pull
from ..errors import ConfigError
from ..nn import Dropout, Embedding, LinearBase, Parameter, normal
from ..quant.half import HalfWeight
from .config import LoraConfig
from .dora import DoraAdapter, row_scales
from .layer import Wrapper
from .lora import LoraAdapter
from .merging import Merging


class OneHot(LinearBase):
    """What an embedding (V, C) is to an adapter: a linear layer W^T (C, V), of which only columns are ever read."""

    bias = None
    trainable = property(lambda self: self.embedding.weight.requires_grad)
    weight = property(lambda self: self.embedding.weight)

    def __init__(self, embedding: Embedding):
        self.embedding = embedding
        self.in_features, self.out_features = embedding.weight.shape

    def dense_weight(self) -> Array:
        return self.embedding.weight.data.T

    def rebuilt(self, weight: Array) -> Embedding:  # type: ignore[override]
        """A frozen embedding over another weight (C, V), in sixteen bits if this one's is: rounded once."""
        weight = self.backend.xp.ascontiguousarray(weight.T)
        made = copy.copy(self.embedding)
        made.weight = (
            self.weight.merged(weight)
            if isinstance(self.weight, HalfWeight)
            else Parameter(weight, False)
        )
        return made


class EmbeddingAdapter(LoraAdapter):
    """The trainable pair of one embedding: lora_embedding_A (r, V) and lora_embedding_B (C, r), with its scaling s."""

    TENSORS: tuple[str, ...] = ("lora_embedding_A", "lora_embedding_B")
    SUFFIX = ""  # in PEFT these are bare parameters
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
        self.r = r = config.rank(name)
        self.scaling = config.scaling(name)
        self.dropout = Dropout(0.0)
        shape = {
            tensor: EmbeddingAdapter.shapes(base, r)[tensor] for tensor in EmbeddingAdapter.TENSORS
        }
        zero = config.init_lora_weights is not False  # so the start is the base, bit for bit
        A = (
            np.zeros(shape["lora_embedding_A"])
            if zero
            else normal(rng, 1.0, shape["lora_embedding_A"], np.float64)
        )
        B = normal(rng, 1.0, shape["lora_embedding_B"], np.float64)
        self.lora_embedding_A = Parameter(base.backend.from_numpy(A.astype(base.dtype)))
        self.lora_embedding_B = Parameter(base.backend.from_numpy(B.astype(base.dtype)))

    @staticmethod
    def shapes(base: LinearBase, r: int) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of an embedding, by name: r (V + C) numbers."""
        return {
            "lora_embedding_A": (r, base.in_features),
            "lora_embedding_B": (base.out_features, r),
        }

    def __call__(self, ids: Any, y: Tensor, base: LinearBase) -> Tensor:
        """y with this adapter added.    ids (...) integers, y (..., C) -> (..., C)"""
        columns = F.embedding(ids, self.lora_embedding_A.T)  # (..., r)
        return y + (columns @ self.lora_embedding_B.T) * self.scaling


class DoraEmbeddingAdapter(DoraAdapter, EmbeddingAdapter):
    """The same with lora_magnitude_vector (C,): W' = m (W + dW) / |W + dW|, column by column."""

    TENSORS = (*EmbeddingAdapter.TENSORS, "lora_magnitude_vector")

    @staticmethod
    def shapes(base: LinearBase, r: int) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of an embedding, by name: r (V + C) + C numbers."""
        return {**EmbeddingAdapter.shapes(base, r), "lora_magnitude_vector": (base.out_features,)}

    def __call__(self, ids: Any, y: Tensor, base: LinearBase) -> Tensor:
        """k (y + s B A[:, t]), k = m / |W + dW| being a constant to A and B.    ids (...), y (..., C) -> (..., C)"""
        k = row_scales(self.lora_magnitude_vector, self.norms(base.dense_weight()))
        return k * EmbeddingAdapter.__call__(self, ids, y, base)


class LoraEmbedding(Merging, Wrapper):
    """y = base(ids), and then each active adapter in turn.    ids (...) integers -> (..., C)"""

    ATTRIBUTES = "base_layer", "adapters"

    def __init__(self, base_layer: Embedding):
        super().__init__()
        self.base_layer: Embedding = base_layer
        self.adapters: dict[str, EmbeddingAdapter] = {}

    @property
    def current(self) -> Embedding:
        return self.base_layer

    @property
    def weight(self) -> Parameter:
        """The base's weight (V, C), without what is not merged: what a tied head has, too."""
        return self.base_layer.weight

    def as_linear(self, base: Embedding) -> OneHot:
        return OneHot(base)

    def rebuilt(self, weight: Array, base: Embedding) -> Embedding:
        return OneHot(base).rebuilt(weight)

    def __call__(self, ids: Any) -> Tensor:
        y, base = self.base_layer(ids), OneHot(self.base_layer)
        for adapter in self.running:
            y = adapter(ids, y, base)
        return y


class HeadAdapter(LoraAdapter):
    """An embedding's adapter as its tied head has it: lora_A = B^T (r, C), lora_B = A^T (V, r), and no parameters."""

    lora_A = property(lambda self: self._source.lora_embedding_B.T)
    lora_B = property(lambda self: self._source.lora_embedding_A.T)

    def __init__(self, source: EmbeddingAdapter, dropout: float, stream: int = 0):
        self._source, self.r, self.scaling = source, source.r, source.scaling
        self.dropout = Dropout(dropout, stream)

    def effective(self, W: Array) -> tuple[tuple[Tensor, ...], Pull]:
        """LoRA's, the gradients turned to be those of the embedding's own tensors."""
        _, pull = super().effective(W)
        own = (self._source.lora_embedding_B, self._source.lora_embedding_A)
        return own, Pull(
            lambda X, dY: tuple(None if g is None else g.T for g in pull.gradients(X, dY))
        )


# ---- one weight in two places ---------------------------------------------------------------------------------------

CHOICES = ("untie", "share")


def unwrap(module: Any) -> Any:
    """The module as it was before any adapter: neither a wrapper nor what was merged."""
    while isinstance(module, Wrapper):
        module = getattr(module, "_original", None) or module.inner
    return module


def embedding_and_head(model: Any) -> tuple[Any, Any]:
    """What stands in the places of the embedding and of the head; None for a head that there is not."""
    return model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()


def is_tied(model: Any) -> bool:
    """Have the embedding and the head one weight, but for adapters?"""
    places = embedding_and_head(model)
    embedding, head = map(unwrap, places)
    led = any(
        isinstance(p, Merging) and p.leads(m)
        for p, m in zip(places, (head, embedding), strict=True)
    )
    return led or (head is not None and vars(head).get("weight") is vars(embedding).get("weight"))


def choose(model: Any, names: Sequence[str], choice: str | None) -> None:
    """Let merging do what `choice` says with an embedding and a head of one weight. ConfigError where it must be said.

    That is where merging `names` would change one of the two places, or each in its own way.
    """
    if choice is not None and choice not in CHOICES:
        raise ConfigError(f"tied must be {' or '.join(map(repr, CHOICES))}, got {choice!r:.99}")
    embedding, head = embedding_and_head(model)
    held = [
        [n for n in names if n in e.adapters] if isinstance(e, Merging) else []
        for e in (embedding, head)
    ]
    changed = [e for e, own in zip((embedding, head), held, strict=True) if own]
    if not (changed and is_tied(model)) or (held[0] == held[1] and head.follows(embedding)):
        return
    if choice is None and all(
        {*e.merged} >= {*own} for e, own in zip((embedding, head), held, strict=True) if own
    ):
        return  # they are merged, as was said then
    if choice is None:
        place = (
            "each of them apart"
            if len(changed) == 2
            else "the embedding"
            if embedding in changed
            else "the head"
        )
        raise ConfigError(
            f"the embedding and the head have one weight, and adapter {', '.join(names)} changes {place}: merging it "
            "needs tied='untie', which gives each a weight of its own and keeps the model's output, or tied='share', "
            "which changes the weight in both places, as peft does, and so the output"
        )
    if choice == "share" and len(changed) == 2:
        raise ConfigError(
            "tied='share' is for an adapter of the embedding or of the head, not of each: use 'untie'"
        )
    for end in changed:
        other = unwrap(head if end is embedding else embedding)
        end.lead(other if choice == "share" else None)
