"""From a plan to modules: an adapter's factors, copies and rows put into a model."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from ..backend import mix_key
from ..nn import Module, get_module, replace_module
from .embedding import HeadAdapter, LoraEmbedding
from .layer import LoraLinear, SavedModule
from .maps.adapter import share
from .names import adapter_class
from .targets.plan import Plan
from .tokens import TokenRows, TrainableTokens
from .tying import unwrap


def inject(model: Module, adapter_name: str, plan: Plan, seed: int) -> None:
    """Put the adapter that `plan` describes into `model`, active nowhere yet.

    First values depend on `seed` and on the layer's name, and on nothing else.
    """
    head, embedding = plan.follows or ("", "")
    of_model = _shared_tensors(model, plan, seed)
    for path, described in plan.targets.items():
        layer = _wrap(model, path, LoraEmbedding if described.kind == "embedding" else LoraLinear)
        place = zlib.crc32(path.encode())
        stream = mix_key(place, zlib.crc32(adapter_name.encode(errors="surrogatepass")))
        base = layer.as_linear(unwrap(layer))
        if path == head:  # after its embedding: see Plan
            source = get_module(model, embedding)
            of_embedding = source.adapters[adapter_name]
            adapter: Any = HeadAdapter(of_embedding, plan.config.lora_dropout, stream)
            layer.follow(source)
        else:
            rng = np.random.default_rng([seed, place])
            kind = adapter_class(plan.config, described.kind)
            adapter = kind(base, path, plan.config, rng, stream, **of_model)
        layer.adapters[adapter_name] = adapter.train(base.training)
    for path in plan.saved:
        _wrap(model, path, SavedModule).add(adapter_name)
    if head in plan.saved:
        copies = [get_module(model, path).entries[adapter_name] for path in (head, embedding)]
        copies[0].weight = copies[1].weight
    for path, rows in plan.tokens.items():
        tokens = _wrap(model, path, TrainableTokens)
        tokens.adapters[adapter_name] = TokenRows(unwrap(tokens).weight, rows)
        if path == embedding:
            _wrap(model, head, TrainableTokens, tokens.adapters).follow(tokens)


def _shared_tensors(model: Module, plan: Plan, seed: int) -> dict[str, Any]:
    """What the adapters of a map need of the whole model; {} for other methods."""
    maps = plan.maps()
    if not maps:
        return {}
    path, first = next(iter(maps.items()))
    base = unwrap(get_module(model, path))
    shared = share(first, base, np.random.default_rng([seed, len(maps)]))
    return {"layers": plan.layer_sizes(), "shared": shared}


def _wrap(model: Module, path: str, kind: Any, *details: Any) -> Any:
    """The wrapper of this kind at `path`; a new one if it has none yet."""
    module = get_module(model, path)
    if not isinstance(module, kind):
        module = kind(module, *details)
        replace_module(model, path, module)
    return module
