"""From a plan to modules: wrappers where there are none yet, and in them what an adapter brings."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from ..backend import mix_key
from ..nn import Module, replace_module
from .embedding import HeadAdapter, LoraEmbedding, OneHot
from .layer import LoraLinear, SavedModule
from .plan import Plan, adapter_class
from .tokens import TokenRows, TrainableTokens


def inject(model: Module, adapter_name: str, plan: Plan, seed: int) -> None:
    """Put the adapter that `plan` describes into `model`; it is active nowhere yet.

    First values depend on `seed` and on the layer's name, and on nothing else.
    """
    head, embedding = plan.follows or ("", "")
    for path, base in plan.targets.items():
        layer = _wrap(model, path, LoraEmbedding if isinstance(base, OneHot) else LoraLinear)
        place = zlib.crc32(path.encode())
        rng, stream = (
            np.random.default_rng([seed, place]),
            mix_key(place, zlib.crc32(adapter_name.encode())),
        )
        if path == head:  # after its embedding: see Plan
            source = _at(model, embedding)
            adapter: Any = HeadAdapter(
                source.adapters[adapter_name], plan.config.lora_dropout, stream
            )
            layer.follow(source)
        else:
            adapter = adapter_class(plan.config, base)(base, path, plan.config, rng, stream)
        layer.adapters[adapter_name] = adapter.train(base.training)
    for path in plan.saved:
        _wrap(model, path, SavedModule).add(adapter_name)
    if head in plan.saved:
        copies = [_at(model, path).held[adapter_name] for path in (head, embedding)]
        copies[0].weight = copies[1].weight
    for path, (module, rows) in plan.tokens.items():
        _wrap(model, path, TrainableTokens).adapters[adapter_name] = TokenRows(module.weight, rows)
        if path == embedding:
            source = _at(model, path)
            _wrap(model, head, TrainableTokens, source.adapters).follow(source)


def _at(model: Module, path: str) -> Any:
    return dict(model.named_modules())[path]


def _wrap(model: Module, path: str, kind: Any, *details: Any) -> Any:
    """The wrapper at `path`, put there if need be."""
    module = _at(model, path)
    if not isinstance(module, kind):
        module = kind(module, *details)
        replace_module(model, path, module)
    return module
