"""From a model and a configuration to a model with adapters, and back: find targets, freeze, switch, merge, save, load.

`get_peft_model` puts adapters into the model that it is given, as PEFT does; `unload` and `merge_and_unload` take them out
again. Every change is planned and checked whole before the first layer is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Tensor
from ..errors import ConfigError, FormatError, NonFiniteError
from ..formats import read_adapter, write_adapter
from ..nn import Linear, Module, Parameter
from .config import DEFAULT_TARGETS, LoraConfig
from .layer import LoraLinear, SavedModule
from .lora import LoraAdapter
from .targets import in_layers, matches, pattern_value

PREFIX = "base_model.model."  # of every name in PEFT's files


def get_peft_model(model: Any, config: LoraConfig, adapter_name: str = "default", seed: int = 0) -> PeftModel:
    """Freeze `model`, put the adapter that `config` describes into it, and return it wrapped.

    model   offers `config.model_type`, `get_input_embeddings()`, `get_output_embeddings()` and `named_modules()`
    seed    of the adapter's first values; they depend on it and on the layer's name, and on nothing else
    """
    return PeftModel(model, config, adapter_name, seed)


def peft_name(path: str) -> str:
    """An attribute path -> the parameter's name in PEFT: `q_proj.adapters.default.lora_A` is `q_proj.lora_A.default.weight`."""
    layer, inside, rest = path.rpartition(".adapters.")
    if not inside:
        return PREFIX + path
    adapter, tensor = rest.split(".")
    return f"{PREFIX}{layer}.{tensor}.{adapter}.weight"


def file_key(name: str, adapter_name: str) -> str:
    """A parameter's name in PEFT -> its key in adapter_model.safetensors, which does not know the adapter's name."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in ("lora_A", "lora_B") and parts[i + 1] == adapter_name:
            return ".".join(parts[: i + 1] + parts[i + 2 :])
        if part == "modules_to_save" and parts[i + 1] == adapter_name:
            return ".".join(parts[:i] + parts[i + 2 :])
    return name


class Plan(NamedTuple):
    """What a configuration means for a model, before anything is done: layers to adapt, modules to copy, by path."""

    targets: dict[str, Linear]
    saved: dict[str, Module]
    config: LoraConfig


class PeftModel(Module):
    """A model with adapters, by name. The active ones add up; only their parameters require a gradient."""

    def __init__(self, model: Any, config: LoraConfig, adapter_name: str = "default", seed: int = 0):
        if isinstance(model, PeftModel) or any(isinstance(m, (LoraLinear, SavedModule)) for _, m in model.named_modules()):
            raise ConfigError("the model has adapters already: use add_adapter, or unload it first")
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = []
        plan = self._plan(adapter_name, config)
        self._inject(adapter_name, plan, seed)
        self.set_adapter(adapter_name)

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return self.model(*inputs, **options)  # type: ignore[no-any-return]

    def get_base_model(self) -> Any:
        """The model inside, adapters and all."""
        return self.model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def active_adapter(self) -> str:
        return self.active_adapters[0]

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) under PEFT's names."""
        for path, parameter in self.model.named_parameters():
            yield peft_name(path), parameter

    def _wrappers(self) -> list[tuple[str, LoraLinear | SavedModule]]:
        return [(path, m) for path, m in self.model.named_modules() if isinstance(m, (LoraLinear, SavedModule))]

    # ---- adding -----------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: LoraConfig, seed: int = 0) -> None:
        """Add another adapter; it stays inactive until `set_adapter`."""
        plan = self._plan(adapter_name, config)
        self._inject(adapter_name, plan, seed)

    def _plan(self, adapter_name: str, config: LoraConfig) -> Plan:
        """Which layers `config` means in this model. ConfigError for whatever does not fit; nothing has changed then."""
        if adapter_name in self.peft_config:
            raise ConfigError(f"there is an adapter {adapter_name!r} already: {', '.join(self.peft_config)}")
        if not adapter_name or "." in adapter_name or adapter_name in "lora_":
            raise ConfigError(f"{adapter_name!r} cannot name an adapter: it needs letters, no dot, and not a part of 'lora_'")
        biased = [n for n, c in self.peft_config.items() if c.bias != "none"]
        if biased and config.bias != "none":
            raise ConfigError(f"adapter {biased[0]!r} trains the base's biases already: a second one needs bias='none'")
        config = dataclasses.replace(config)
        modules = dict(_inside(self.model))
        saved = {p: m for p, m in modules.items() if config.modules_to_save and matches(p, config.modules_to_save)}
        _all_used("modules_to_save", config.modules_to_save, saved, modules)
        linear = {p: m for p, m in modules.items() if isinstance(m, Linear) and not _within(p, saved)}
        head = self.model.get_output_embeddings()
        targets = config.target_modules
        if targets is None:
            kind = self.model.config.model_type
            if kind not in DEFAULT_TARGETS:
                raise ConfigError(f"target_modules must be given for a model of type {kind!r}")
            config.target_modules = targets = list(DEFAULT_TARGETS[kind])
        if isinstance(targets, str) and targets.lower() == "all-linear":
            found: dict[str, Any] = {p: m for p, m in linear.items() if _base(m) is not _base(head)}
        else:
            found = {p: m for p, m in modules.items() if p and matches(p, targets) and not _within(p, saved)}
            _all_used("target_modules", targets, found, linear)
        found = {p: m for p, m in found.items() if in_layers(p, config.layers_to_transform, config.layers_pattern)}
        if config.exclude_modules:
            kept = {p: m for p, m in found.items() if not matches(p, config.exclude_modules)}
            if len(kept) == len(found):
                warnings.warn(f"exclude_modules {config.exclude_modules!r:.200} excludes nothing", stacklevel=4)
            found = kept
        if not found:
            raise ConfigError(f"no target is left: target_modules {targets!r:.120} match nothing; {_candidates(linear)}")
        for path, module in found.items():
            if path not in linear:
                raise ConfigError(f"target {path} is a {type(module).__name__}, not a linear layer; {_candidates(linear)}")
            if _base(module).weight is _base(self.model.get_input_embeddings()).weight:
                raise ConfigError(f"target {path} shares its weight with the embedding: untie them, or leave it out")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            config.target_modules = sorted(found)
        there = {p: type(m) for p, m in self._wrappers()}
        both = {**there, **dict.fromkeys(found, LoraLinear), **dict.fromkeys(saved, SavedModule)}
        for path in both:
            if there.get(path, both[path]) is not both[path] or any(p.startswith(path + ".") for p in both):
                raise ConfigError(f"{path} cannot be saved whole and also be adapted, or hold what is adapted or saved")
        self._review(config, found)
        return Plan(found, saved, config)

    @staticmethod
    def _review(config: LoraConfig, found: dict[str, Linear]) -> None:
        """Warn of what is allowed but hardly meant."""
        if config.fan_in_fan_out:
            warnings.warn("fan_in_fan_out is for layers that store W as (in, out); these do not: set to False", stacklevel=5)
            config.fan_in_fan_out = False
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, name):
                if not any(pattern_value(path, {key: True}, False) for path in found):
                    warnings.warn(f"{name}: {key!r:.200} matches no target", stacklevel=5)
        for path, layer in found.items():
            if config.rank(path) > min(layer.weight.shape):
                warnings.warn(f"{path}: r = {config.rank(path)} is above the full rank {min(layer.weight.shape)}", stacklevel=5)
                break

    def _inject(self, adapter_name: str, plan: Plan, seed: int) -> None:
        for path, base in plan.targets.items():
            layer = self._wrap(path, LoraLinear)
            stream = zlib.crc32(path.encode())
            layer.adapters[adapter_name] = LoraAdapter(
                base.in_features, base.out_features, path, plan.config, np.random.default_rng([seed, stream]),
                base.weight.dtype, base.weight.backend, stream,
            ).train(base.training)  # fmt: skip
        for path in plan.saved:
            self._wrap(path, SavedModule).add(adapter_name)
        self.peft_config[adapter_name] = plan.config
        for parameter in self.adapter_parameters(adapter_name).values():
            parameter.requires_grad = False  # until set_adapter makes it the active one

    def _wrap(self, path: str, wrapper: Any) -> Any:
        """The wrapper at `path`, put there if need be."""
        module = dict(self.model.named_modules())[path]
        if not isinstance(module, wrapper):
            module = wrapper(module)
            _put(self.model, path, module)
        return module

    # ---- switching --------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool | None = None) -> None:
        """Make these adapters the active ones. Only they require a gradient, and not if `inference_mode`.

        `inference_mode` None means what each adapter's configuration says: True for one that was loaded to be used.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self._known(names)
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for _, layer in self._wrappers():
            layer.active = names
        for name in names:
            frozen = self.peft_config[name].inference_mode if inference_mode is None else inference_mode
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad = not frozen
        self.active_adapters = names

    def adapter_parameters(self, adapter_name: str) -> dict[str, Parameter]:
        """The parameters of one adapter by their keys in its file: factors, copied modules, biases if it trains them."""
        keys = ((file_key(name, adapter_name), name, p) for name, p in self.named_parameters())
        return {**self._biases(adapter_name), **{key: p for key, name, p in keys if key != name}}

    def _biases(self, adapter_name: str) -> dict[str, Parameter]:
        """The base's biases that this adapter trains, by their keys in its file: other adapters leave no trace there."""
        mode = self.peft_config[adapter_name].bias
        layers = {p for p, m in self._wrappers() if isinstance(m, LoraLinear) and adapter_name in m.adapters}
        found = {}
        for path, parameter in self.model.named_parameters():
            owner = path.removesuffix(".bias").removesuffix(".base_layer").replace(".original_module", "")
            wanted = mode == "all" or (mode == "lora_only" and owner in layers)
            if path.endswith(".bias") and wanted and ".modules_to_save." not in path:
                found[PREFIX + owner + (".base_layer.bias" if owner in layers else ".bias")] = parameter
        return found

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit (but for trained biases); merged adapters are taken out meanwhile."""
        if any(self.peft_config[n].bias != "none" for n in self.active_adapters):
            warnings.warn("the adapter trained the base's biases: disabling it does not bring them back", stacklevel=3)
        state = [(m, m.enabled, list(m.merged) if isinstance(m, LoraLinear) else []) for _, m in self._wrappers()]
        try:
            for layer, _, _ in state:
                layer.enabled = False
                if isinstance(layer, LoraLinear):
                    layer.unmerge()
            yield
        finally:
            for layer, enabled, merged in state:
                layer.enabled = enabled
                if isinstance(layer, LoraLinear) and merged:
                    layer.merge(merged)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others takes its place."""
        self._known([adapter_name])
        if any(adapter_name in m.merged for _, m in self._wrappers() if isinstance(m, LoraLinear)):
            raise ConfigError(f"adapter {adapter_name!r} is merged: unmerge_adapter first")
        if len(self.peft_config) == 1:
            raise ConfigError(f"{adapter_name!r} is the only adapter: unload() gives the base back")
        del self.peft_config[adapter_name]
        for path, layer in self._wrappers():
            held: dict[str, Any] = layer.adapters if isinstance(layer, LoraLinear) else layer.modules_to_save
            held.pop(adapter_name, None)
            if not held:
                _put(self.model, path, layer.base_layer if isinstance(layer, LoraLinear) else layer.original_module)
        left = [n for n in self.active_adapters if n != adapter_name]
        self.set_adapter(left or [next(iter(self.peft_config))])

    def _known(self, names: Sequence[str]) -> None:
        unknown = [n for n in names if n not in self.peft_config]
        if unknown or not names:
            raise ConfigError(f"no adapter {', '.join(map(repr, unknown)) or '(none named)'}; there is {', '.join(self.peft_config)}")

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Put adapters (the active ones) into the base's weights; see `LoraLinear.merge`.

        All layers or none: NonFiniteError names the layer and leaves the model as it was. (PEFT checks only if `safe_merge`;
        here it is always done.)
        """
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        done: list[tuple[LoraLinear, list[str]]] = []
        for path, layer in self._wrappers():
            if isinstance(layer, LoraLinear):
                before = list(layer.merged)
                try:
                    layer.merge(names)
                except NonFiniteError as error:
                    for changed, merged in done:
                        changed.unmerge()
                        changed.merge(merged)
                    raise NonFiniteError(f"{path}: {error}") from error
                done.append((layer, before))

    def unmerge_adapter(self) -> None:
        """Take every merged adapter out again; the base comes back bit for bit."""
        for _, layer in self._wrappers():
            if isinstance(layer, LoraLinear):
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """Merge, take the adapters out, and return the plain model. (`progressbar` is PEFT's; merging is quick here.)"""
        self.merge_adapter(adapter_names, safe_merge)
        return self._unwrap(merge=True)

    def unload(self) -> Any:
        """Take the adapters out and return the base as it was."""
        self.unmerge_adapter()
        return self._unwrap(merge=False)

    def _unwrap(self, merge: bool) -> Any:
        for path, layer in self._wrappers():
            if isinstance(layer, LoraLinear):
                _put(self.model, path, layer.base_layer)
            else:
                _put(self.model, path, layer.current if merge else layer.original_module)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if self.model.config.tie_word_embeddings and head.weight is not embedding.weight:
            self.model.config = dataclasses.replace(self.model.config, tie_word_embeddings=False)
        for parameter in self.model.parameters():
            parameter.requires_grad = True
        self.peft_config, self.active_adapters = {}, []
        return self.model

    # ---- counting ---------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all), each parameter counted once."""
        sizes = [(p.size, p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # ---- files ------------------------------------------------------------------------------------------------------

    def state_dict(self, adapter_name: str = "default") -> dict[str, np.ndarray]:
        """What one adapter's file holds, by its keys there."""
        return {key: parameter.numpy() for key, parameter in self.adapter_parameters(adapter_name).items()}

    def save_pretrained(self, directory: str | Path, selected_adapters: Sequence[str] | None = None) -> None:
        """Write PEFT's files: the adapter "default" into `directory`, any other into a folder of its name there."""
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._known(names)
        for name in names:
            where = Path(directory) if name == "default" else Path(directory) / name
            write_adapter(where, self.peft_config[name].to_dict(), self.state_dict(name))

    @classmethod
    def from_pretrained(
        cls, model: Any, directory: str | Path, adapter_name: str = "default", is_trainable: bool = False
    ) -> PeftModel:
        """`model` with the adapter that a folder holds. Frozen and in eval mode unless `is_trainable`.

        An adapter for another base raises one FormatError that lists every mismatch, and leaves `model` as it was.
        """
        config, tensors = _read(directory, is_trainable)
        blank = cls.__new__(cls)
        blank.model, blank.peft_config, blank.active_adapters = model, {}, []
        if any(isinstance(m, (LoraLinear, SavedModule)) for _, m in model.named_modules()):
            raise ConfigError("the model has adapters already: use load_adapter, or unload it first")
        blank._load(directory, adapter_name, config, tensors)
        blank.set_adapter(adapter_name)
        return blank.train(is_trainable)  # type: ignore[no-any-return]

    def load_adapter(self, directory: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
        """Add the adapter that a folder holds; it stays inactive until `set_adapter`."""
        self._load(directory, adapter_name, *_read(directory, is_trainable))

    def _load(self, where: Any, adapter_name: str, config: LoraConfig, tensors: dict[str, np.ndarray]) -> None:
        try:
            plan = self._plan(adapter_name, config)
        except ConfigError as error:
            raise FormatError(f"{where}: the adapter does not fit this base: {error}"[:500]) from error
        expected = self._expected(plan)
        wrong = [f"missing {k}" for k in expected if k not in tensors]
        wrong += [f"unknown {k}" for k in tensors if k not in expected]
        wrong += [
            f"{k} is {tensors[k].shape}, the base needs {shape}"
            for k, shape in expected.items()
            if k in tensors and tensors[k].shape != shape
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise FormatError(f"{where}: the adapter does not fit this base: {'; '.join(wrong[:3])}{more}"[:500])
        self._inject(adapter_name, plan, seed=0)
        own = self.adapter_parameters(adapter_name)
        for key, array in tensors.items():
            own[key].data = own[key].backend.from_numpy(array.astype(own[key].dtype))

    def _expected(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """The keys and shapes of the file of an adapter that is planned."""
        config = plan.config
        expected: dict[str, tuple[int, ...]] = {}
        for path, base in plan.targets.items():
            shapes = LoraAdapter.shapes(base.in_features, base.out_features, config.rank(path))
            expected.update({f"{PREFIX}{path}.{t}.weight": shape for t, shape in shapes.items()})
            if config.bias != "none" and base.bias is not None:
                expected[f"{PREFIX}{path}.base_layer.bias"] = base.bias.shape
        for path, module in plan.saved.items():
            expected.update({f"{PREFIX}{path}.{n}": p.shape for n, p in module.named_parameters()})
        for path, module in _inside(self.model) if config.bias == "all" else ():
            bias = vars(module).get("bias")
            if bias is not None and path not in plan.targets:
                expected[f"{PREFIX}{path}.bias"] = bias.shape
        return expected


# ---- a model's modules by path -----------------------------------------------------------------------------------------


def _inside(model: Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of the model as it was without adapters: what a wrapper holds stands at the wrapper's own path."""
    for path, module in model.named_modules():
        if any(part in ("base_layer", "adapters", "original_module", "modules_to_save") for part in path.split(".")):
            continue
        yield path, _base(module)


def _base(module: Any) -> Any:
    if isinstance(module, LoraLinear):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def _put(model: Module, path: str, module: Module) -> None:
    """Replace the module at `path`, a way through attributes and lists."""
    owner: Any = model
    *way, last = path.split(".")
    for name in way:
        owner = owner[int(name)] if isinstance(owner, list) else getattr(owner, name)
    if isinstance(owner, list):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)


def _within(path: str, saved: dict[str, Module]) -> bool:
    return any(path == p or path.startswith(p + ".") for p in saved)


def _candidates(modules: dict[str, Any]) -> str:
    return "there is " + ", ".join(sorted({p.rpartition(".")[2] for p in modules if p}))


def _all_used(field: str, names: Any, found: dict[str, Any], candidates: dict[str, Any]) -> None:
    """A name in a list that means nothing is a typing mistake, and says so."""
    unused = [n for n in names or () if isinstance(names, list) and not any(matches(p, [n]) for p in found)]
    if unused:
        raise ConfigError(f"{field}: {', '.join(map(repr, unused))} match nothing; {_candidates(candidates)}"[:500])


def _read(directory: str | Path, is_trainable: bool) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    raw, tensors = read_adapter(directory)
    config = LoraConfig.from_dict(raw, f"{directory}/adapter_config.json")
    return dataclasses.replace(config, inference_mode=not is_trainable), tensors
