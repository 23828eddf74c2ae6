"""The tree of a model's modules with the numbers of their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...display import equal_neighbours
from ...formats import SafetensorsFile
from ...lora.layer import Wrapper
from ...lora.maps.adapter import MapAdapter
from .content import ModuleCount
from .subject import Subject


def draw_architecture(subject: Subject, title: str) -> ModuleCount:
    """The modules of the model with the parameters that training changed, equal blocks as one."""
    model = subject.adapted.get_base_model()
    names = subject.adapted.active_adapters if subject.has_adapter else []
    trained = set() if names else {id(p) for p in model.parameters()}
    for name in names:
        parameters = subject.adapted.adapter_parameters(name).values()
        trained |= {id(p) for p in parameters if not p.fixed}
    return _count(model, title, names, trained)


def _count(module: Any, label: str, adapters: Sequence[str], trained: set[int]) -> ModuleCount:
    parameters = list(module.parameters())
    total = sum(p.size for p in parameters)
    changed = sum(p.size for p in parameters if id(p) in trained)
    if isinstance(module, Wrapper):
        entries = [module.entries[name] for name in adapters if name in module.entries]
        note = "; ".join(map(_describe, entries))
        return ModuleCount(label, type(module.inner).__name__, total, changed, note)
    inside = []
    for names, _, child in equal_neighbours(module.named_children()):
        size = "" if len(names) == 1 else f" ... {names[-1].rpartition('.')[2]}"
        inside.append(_multiply(_count(child, names[0] + size, adapters, trained), len(names)))
    return ModuleCount(label, type(module).__name__, total, changed, "", inside)


def _multiply(one: ModuleCount, count: int) -> ModuleCount:
    """The entry of `count` equal modules: the parameters of all, and inside those of one."""
    if count == 1:
        return one
    note = f"{count} alike, {one.parameters:,} each"
    total, trained = count * one.parameters, count * one.trained
    return ModuleCount(one.name, one.kind, total, trained, note, one.inside)


def _describe(entry: Any) -> str:
    """An adapter of one layer in a few words."""
    if isinstance(entry, MapAdapter):
        return str(entry.map.config.title)
    if hasattr(entry, "indices"):
        return f"{len(entry.indices)} rows of it trained"
    r = getattr(entry, "r", None)
    if r is None:
        return "trained as a copy"
    title = type(entry).__name__.removesuffix("Adapter")
    names = {"Lora": "LoRA", "Dora": "DoRA", "AdaLora": "AdaLoRA", "Hydra": "HydraLoRA"}
    names |= {"Embedding": "LoRA", "DoraEmbedding": "DoRA", "Head": "LoRA, tied to the embedding"}
    return f"{names.get(title, title)}, r = {r}"


def draw_file(file: SafetensorsFile, title: str) -> ModuleCount:
    """The tensors of an adapter's file, where its base is not at hand."""
    inside = []
    for key in file.keys():
        shape = file.shape(key)
        size = math.prod(shape)
        form = " x ".join(map(str, shape))
        inside.append(ModuleCount(key, f"tensor of {form}", size, size))
    total = sum(one.parameters for one in inside)
    return ModuleCount(title, "adapter alone", total, total, "the base is not at hand", inside)
