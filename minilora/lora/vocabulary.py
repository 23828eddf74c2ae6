"""A model whose vocabulary grows or shrinks to that of an adapter.

A tokenizer with more tokens needs an embedding and a head with more rows. PEFT puts both into the
adapter's file, and expects that the base is resized before the file is loaded. Here the base is
resized while it is loaded, with the rows of the file (reading.settle_vocabulary).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..nn import Embedding, Linear, Parameter
from ..quant.half import HalfWeight, encode_half
from .targets.plan import Plan
from .tying import embedding_and_head, is_tied


def check_resizable(model: Any, plan: Plan) -> None:
    """ConfigError if the plan changes the vocabulary of a model that cannot be resized."""
    embedding, head = embedding_and_head(model)
    is_plain = isinstance(embedding, Embedding) and isinstance(head, Linear | None)
    if plan.vocabulary and not is_plain:
        raise ConfigError(
            f"the file has {_size(plan)} tokens, and the embedding and head of the model cannot be "
            "resized: they are quantised or have adapters already; load this adapter first, over "
            "a base that is not quantised"
        )


def resize_vocabulary(model: Any, plan: Plan) -> None:
    """Give the model's embedding and head the weights of `plan.vocabulary`."""
    embedding, head = embedding_and_head(model)
    tied = is_tied(model)
    base = plan.base
    embedding.weight = _like(embedding.weight, plan.vocabulary[f"{base.embedding}.weight"])
    if head is not None:
        weight = embedding.weight
        if not tied:
            weight = _like(head.weight, plan.vocabulary[f"{base.head}.weight"])
        head.weight = weight
        head.out_features = _size(plan)
    model.config = dataclasses.replace(model.config, vocab_size=_size(plan))


def _size(plan: Plan) -> int:
    return int(plan.base.layers[plan.base.embedding].shape[0])


def _like(weight: Parameter, W: np.ndarray) -> Parameter:
    """A frozen parameter with the values W, stored as `weight` is."""
    values = weight.backend.from_numpy(np.ascontiguousarray(W, weight.dtype))
    if isinstance(weight, HalfWeight):
        return HalfWeight(encode_half(values, weight.quantized.kind), weight.dtype)
    return Parameter(values, requires_grad=False)
