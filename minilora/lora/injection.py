"""From a plan to modules: a wrapper in the place of each layer, with a new adapter."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from ..backend import mix_key
from ..nn import Module, replace_module
from .embedding import HeadAdapter, LoraEmbedding
from .layer import LoraLinear, SavedModule
from .names import adapter_class
from .plan import Plan
from .tokens import TokenRows, TrainableTokens
from .tying import unwrap


def inject(model: Module, adapter_name: str, plan: Plan, seed: int) -> None:
    """Put the adapter that `plan` describes into `model`, active nowhere yet.

    First values depend on `seed` and on the layer's name, and on nothing else.
    """
    head, embedding = plan.follows or ("", "")
    for path, described in plan.targets.items():
        layer = _wrap(model, path, LoraEmbedding if described.kind == "embedding" else LoraLinear)
        place = zlib.crc32(path.encode())
        stream = mix_key(place, zlib.crc32(adapter_name.encode(errors="surrogatepass")))
        base = layer.as_linear(unwrap(layer))
        if path == head:  # after its embedding: see Plan
            source = _module_at(model, embedding)
            of_embedding = source.adapters[adapter_name]
            adapter: Any = HeadAdapter(of_embedding, plan.config.lora_dropout, stream)
            layer.follow(source)
        else:
            rng = np.random.default_rng([seed, place])
            kind = adapter_class(plan.config, described.kind)
            adapter = kind(base, path, plan.config, rng, stream)
        layer.adapters[adapter_name] = adapter.train(base.training)
    for path in plan.saved:
        _wrap(model, path, SavedModule).add(adapter_name)
    if head in plan.saved:
        copies = [_module_at(model, path).entries[adapter_name] for path in (head, embedding)]
        copies[0].weight = copies[1].weight
    for path, rows in plan.tokens.items():
        tokens = _wrap(model, path, TrainableTokens)
        tokens.adapters[adapter_name] = TokenRows(unwrap(tokens).weight, rows)
        if path == embedding:
            _wrap(model, head, TrainableTokens, tokens.adapters).follow(tokens)


def _module_at(model: Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
    return found


def _wrap(model: Module, path: str, kind: Any, *details: Any) -> Any:
    """The wrapper of this kind at `path`; a new one if it has none yet."""
    module = _module_at(model, path)
    if not isinstance(module, kind):
        module = kind(module, *details)
        replace_module(model, path, module)
    return module
