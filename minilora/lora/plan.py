"""What a configuration means for a model: found out and checked whole, before the first layer is touched.

Everything that a user can get wrong about targets raises here and names what there is; what is allowed but hardly
meant warns. Names are matched by targets.py; this room knows modules.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..nn import LinearBase, Module
from ..weights import transposed
from .adalora import AdaLoraAdapter, AdaLoraConfig
from .config import DEFAULT_TARGETS, LoraConfig
from .dora import DoraAdapter
from .hydra import HydraAdapter, HydraConfig
from .layer import LoraLinear, SavedModule, Wrapper
from .lora import LoraAdapter
from .targets import in_layers, matches, pattern_value

PREFIX = "base_model.model."  # of every name in PEFT's files
# By peft_type; a relative of LoRA is one line here. DoRA goes by LoRA's name, and use_dora tells: see adapter_class.
ADAPTERS: dict[str, type[LoraAdapter]] = {"LORA": LoraAdapter, "ADALORA": AdaLoraAdapter, "HYDRALORA": HydraAdapter}
CONFIGS: dict[str, type[LoraConfig]] = {"LORA": LoraConfig, "ADALORA": AdaLoraConfig, "HYDRALORA": HydraConfig}
TENSORS = {*AdaLoraAdapter.TENSORS, *DoraAdapter.TENSORS, *HydraAdapter.TENSORS}
BARE = {"lora_magnitude_vector"}  # in files without the ".weight" that it has in PEFT's models
Modules = dict[str, Any]  # by path


class Plan(NamedTuple):
    """Layers to adapt and modules to copy, by path, and the configuration with its targets resolved."""

    targets: dict[str, LinearBase]
    saved: dict[str, Module]
    config: LoraConfig

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """The keys of the adapter's file, and the shapes there."""
        found: dict[str, tuple[int, ...]] = {}
        for path, base in self.targets.items():
            kind = adapter_class(self.config)
            r, more = self.config.rank(path), [self.config.experts] if isinstance(self.config, HydraConfig) else []
            for name, shape in kind.shapes(base, r, *more).items():
                found[f"{PREFIX}{path}.{name}{'' if name in BARE else kind.SUFFIX}"] = shape
            if self.config.bias != "none" and base.bias is not None:
                found[f"{PREFIX}{path}.base_layer.bias"] = base.bias.shape
        for path, module in self.saved.items():
            for name, p in module.named_parameters():
                key = f"{PREFIX}{path}.{name}"
                found[key] = p.shape[::-1] if transposed(model.config.model_type, key) else p.shape
        for path, module in _inside(model).items() if self.config.bias == "all" else ():
            bias = vars(module).get("bias")
            if bias is not None and path not in self.targets:
                found[f"{PREFIX}{path}.bias"] = bias.shape
        return found


def read_config(fields: dict[str, Any], where: str) -> LoraConfig:
    """The configuration that an adapter_config.json holds, of whichever kind it says. ConfigError as from_dict's."""
    kind = fields.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ConfigError(f"{where}: peft_type must be {' or '.join(map(repr, CONFIGS))}, got {kind!r}"[:500])
    return CONFIGS[kind].from_dict(fields, where)


def adapter_class(config: LoraConfig) -> type[LoraAdapter]:
    """What `config` puts on a layer."""
    return DoraAdapter if config.use_dora else ADAPTERS[config.peft_type]


def plan_adapter(model: Any, config: LoraConfig) -> Plan:
    """The layers that `config` means in `model`, which may have adapters already. ConfigError for what does not fit."""
    config = dataclasses.replace(config)
    modules = _inside(model)
    saved = _saved(modules, config)
    for path, module in saved.items():
        if any(p.fixed for p in module.parameters()):
            raise ConfigError(f"modules_to_save: {path} is quantised, and so cannot be trained; skip it in quantize")
    linear = {p: m for p, m in modules.items() if isinstance(m, LinearBase) and not _within(p, saved)}
    found = _targets(model, modules, linear, saved, config)
    for path, module in found.items():
        if path not in linear:
            raise ConfigError(f"target {path} is a {type(module).__name__}, not a linear layer; {_candidates(linear)}")
        if vars(module).get("weight") is _unwrapped(model.get_input_embeddings()).weight:
            raise ConfigError(f"target {path} shares its weight with the embedding: untie them, or leave it out")
    there = {p: type(m) for p, m in wrappers(model)}
    both = {**there, **dict.fromkeys(found, LoraLinear), **dict.fromkeys(saved, SavedModule)}
    for path, kind in both.items():
        if there.get(path, kind) is not kind or any(p.startswith(path + ".") for p in both):
            raise ConfigError(f"{path} cannot be saved whole and also be adapted, or hold what is adapted or saved")
    fan_in_fan_out = transposed(model.config.model_type, f"{list(found)[-1]}.weight")  # PEFT's: of the last layer
    _warn(config, found, fan_in_fan_out)
    config.fan_in_fan_out = fan_in_fan_out
    return Plan(found, saved, config)


def wrappers(model: Module) -> Iterator[tuple[str, Wrapper]]:
    """(path, wrapper) of every module that adapters stand in for."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Wrapper))


def _saved(modules: Modules, config: LoraConfig) -> dict[str, Module]:
    # PEFT's rule for these is another than for targets: "norm" also ends "input_layernorm".
    names = config.modules_to_save or []
    unused = [n for n in names if not any(path.endswith(n) for path in modules)]
    if unused:
        raise ConfigError(f"modules_to_save: {_listed(unused)} match nothing; {_candidates(modules)}"[:500])
    return {p: m for p, m in modules.items() if p.endswith(tuple(names))}


def _targets(model: Any, modules: Modules, linear: Modules, saved: Modules, config: LoraConfig) -> Modules:
    """The modules that target_modules, exclude_modules and layers_to_transform leave; sets config.target_modules."""
    targets = config.target_modules
    if targets is None:
        kind = model.config.model_type
        if kind not in DEFAULT_TARGETS:
            raise ConfigError(f"target_modules must be given for a model of type {kind!r}")
        config.target_modules = targets = list(DEFAULT_TARGETS[kind])
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    whole: list[str] = []  # names given in full stay whatever their layer, as in PEFT
    if everything:
        head = _unwrapped(model.get_output_embeddings())
        found = {p: m for p, m in linear.items() if m is not head}
    else:
        found = {p: m for p, m in modules.items() if p and matches(p, targets) and not _within(p, saved)}
    if isinstance(targets, list):
        whole = targets
        # PEFT's files of "all-linear" name also what is inside a module that is saved whole: that is no mistake.
        unused = [t for t in targets if not any(matches(path, [t]) for path in (modules if found else ()) if path)]
        if unused:  # a name that means nothing is a typing mistake, and says so
            raise ConfigError(f"target_modules: {_listed(unused)} match nothing; {_candidates(linear)}"[:500])
    chosen = config.layers_to_transform, config.layers_pattern
    found = {p: m for p, m in found.items() if p in whole or in_layers(p, *chosen)}
    if config.exclude_modules:
        kept = {p: m for p, m in found.items() if not matches(p, config.exclude_modules)}
        if len(kept) == len(found):
            warnings.warn(f"exclude_modules {config.exclude_modules!r:.200} excludes nothing", stacklevel=6)
        found = kept
    if not found:
        raise ConfigError(
            f"no target is left: target_modules {targets!r:.120} match nothing; {_candidates(linear)}"[:500]
        )
    if everything:
        config.target_modules = sorted(found)  # PEFT's files name them one by one
    return found


def _warn(config: LoraConfig, found: Modules, fan_in_fan_out: bool) -> None:
    """Say what is allowed but hardly meant."""
    notes = []
    if config.fan_in_fan_out and not fan_in_fan_out:
        notes.append("fan_in_fan_out is for layers whose files hold W as (in, out); these do not: set to False")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):  # a pattern; in AdaLoRA's rank_pattern the name of a layer's lora_E
            named = key.removesuffix(".lora_E") in found
            if not named and not any(pattern_value(path, {key: True}, False) for path in found):
                notes.append(f"{name}: {key!r:.200} matches no target")
    above = [p for p, layer in found.items() if config.rank(p) > min(layer.in_features, layer.out_features)]
    if above:
        full = min(found[above[0]].in_features, found[above[0]].out_features)
        notes.append(f"{above[0]}: r = {config.rank(above[0])} is above the full rank {full}")
    for note in notes:
        warnings.warn(note, stacklevel=6)


def _inside(model: Module) -> Modules:
    """The model as it was without adapters: what a wrapper holds stands at the wrapper's own path."""
    inside = {*LoraLinear.ATTRIBUTES, *SavedModule.ATTRIBUTES}
    return {path: _unwrapped(m) for path, m in model.named_modules() if not inside & set(path.split("."))}


def _unwrapped(module: Any) -> Any:
    inner = module.inner if isinstance(module, Wrapper) else module
    return getattr(module, "_original", None) or inner  # DoRA's first magnitudes are norms of what is not merged


def _within(path: str, saved: Modules) -> bool:
    return any(path == p or path.startswith(p + ".") for p in saved)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))[:200]


def _candidates(modules: Modules) -> str:
    return "there is " + ", ".join(sorted({p.rpartition(".")[2] for p in modules if p}))
