"""A model with adapters: add them, switch between them, unmerge them, count parameters.

Every change is planned and checked before the first layer changes. `PeftModel` in model.py adds
merging and files.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..autograd import Tensor
from ..backend import Backend
from ..display import render_adapted_model
from ..errors import ConfigError, is_integer
from ..nn import Module, Parameter, replace_module
from .config import LoraConfig, name_of_changed_start
from .embedding import HeadAdapter
from .injecting import inject
from .layer import LoraLinear, Wrapper, use_adapters
from .lora import LoraAdapter
from .names import PREFIX, EntryParameter, entry_parameters
from .starts.layers import LayerStart, begin_model, put_start, quantize_with_starts, restore_starts
from .starts.values import find_start
from .status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from .targets.base import describe_model, modules_inside
from .targets.plan import Plan, check_wrapped, plan_adapter, wrappers


class AdaptedModel(Module):
    """A model with named adapters. The updates of the active ones are added to the base.

    Only the parameters of active adapters require a gradient.
    """

    def __init__(
        self,
        model: Any,
        config: LoraConfig,
        adapter_name: str = "default",
        seed: int = 0,
        data: Iterable[Any] | None = None,
        quantize: str | None = None,
        resumed: str | Path | None = None,
    ):
        self._wrap_model(model)
        self.add_adapter(adapter_name, config, seed, data, quantize, resumed)
        self.set_adapter(adapter_name, config.inference_mode)

    def _wrap_model(self, model: Any) -> None:
        if not isinstance(model, Module):
            raise ConfigError(
                f"expected a model to put an adapter into, got {model!r:.99}: "
                "give a Module, such as CausalLM.from_pretrained(...) or Sequential(...)"
            )
        if isinstance(model, AdaptedModel) or any(wrappers(model)):
            raise ConfigError(
                "the model has adapters already: use add_adapter or load_adapter, "
                "or unload it first"
            )
        if next(model.named_children(), None) is None:
            raise ConfigError(
                f"{type(model).__name__} has no modules inside, and adapters go into these by "
                "name: give Sequential(model), whose first module has the name '0'"
            )
        self.model: Any = model
        self.peft_config: dict[str, LoraConfig] = {}
        self._plans: dict[str, Plan] = {}
        self.active_adapters: list[str] = []
        self._is_enabled = True

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return self.model(*inputs, **options)  # type: ignore[no-any-return]

    def _repr_html_(self) -> str:
        return render_adapted_model(self)

    def get_base_model(self) -> Any:
        """The model inside, with its adapters."""
        return self.model

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """Ids that the model generates with the active adapters: see `CausalLM.generate`."""
        kind = type(self.model)
        if not hasattr(kind, "generate"):
            raise ConfigError(f"{kind.__name__} generates no text: it has no method generate()")
        return kind.generate(self, *inputs, **options)

    @property
    def base_model(self) -> AdaptedModel:
        """This object. (PEFT has two with the same methods, `model` and `model.base_model`.)"""
        return self

    @property
    def active_adapter(self) -> str | None:
        """The first of the active adapters; None if none is active."""
        return next(iter(self.active_adapters), None)

    config = property(lambda self: self.model.config)
    device = property(lambda self: self.model.device)
    dtype = property(lambda self: self.model.dtype)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) under PEFT's names."""
        names = {id(entry.parameter): entry.name for entry in self._entry_parameters()}
        for path, parameter in self.model.named_parameters():
            yield names.get(id(parameter), PREFIX + path), parameter

    def parameters(self) -> Iterator[Parameter]:
        """The parameters of `named_parameters`, faster, because no names are made."""
        return self.model.parameters()  # type: ignore[no-any-return]

    def to(self, device: str | Backend | None = None, dtype: Any = None) -> Any:
        """See `Module.to`. Merged adapters are unmerged before, and merged again after the move."""
        with self._unmerged():
            for layer in self._wrappers().values():
                if isinstance(layer, LoraLinear):
                    layer.move_unchanged(device, dtype)
            return super().to(device, dtype)

    def _wrappers(self) -> dict[str, Wrapper]:
        return dict(wrappers(self.model))

    def _entry_parameters(self) -> Iterator[EntryParameter]:
        return entry_parameters(wrappers(self.model))

    # ---- adding ----------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config: LoraConfig,
        seed: int = 0,
        data: Iterable[Any] | None = None,
        quantize: str | None = None,
        resumed: str | Path | None = None,
    ) -> None:
        """Add another adapter; it stays inactive and frozen until `set_adapter`.

        See `get_peft_model` for data, quantize and resumed. An adapter whose start changes the base
        must be the only one.
        """
        self._check_name(adapter_name, config)
        start = find_start(config.init_lora_weights)
        word = config.extra.get("init_lora_weights")
        if name_of_changed_start(word):
            raise ConfigError(
                f"init_lora_weights={word!r:.40} is that of a trained adapter's file: load it with "
                "load_adapter, or set init_lora_weights for a new one"
            )
        if start is not None and start.changes_base:
            self._require_alone(f"init_lora_weights={config.init_lora_weights!r} changes the base")
        if quantize is not None and self.peft_config:
            raise ConfigError("quantize is for the first adapter: the others share its base")
        with self._unmerged():
            plan = plan_adapter(describe_model(self.model), config)
            check_wrapped(self.model, plan)
            layer_starts: dict[str, LayerStart] = {}
            if start is not None and resumed is not None and start.needs != "decode":
                plan, layer_starts = restore_starts(self.model, plan, resumed)
            elif start is not None:
                plan, layer_starts = begin_model(self.model, plan, seed, data, quantize)
            if quantize is not None:
                layer_starts = quantize_with_starts(
                    self.model, layer_starts, quantize, config.init_lora_weights
                )
            self._inject(adapter_name, plan, seed)
            self._put_starts(adapter_name, layer_starts)

    def _put_starts(self, adapter_name: str, layer_starts: Mapping[str, LayerStart]) -> None:
        wrapped = self._wrappers()
        for path, start in layer_starts.items():
            put_start(wrapped[path], adapter_name, start)

    def _require_alone(self, why: str) -> None:
        if self.peft_config:
            raise ConfigError(
                f"{why}, which the adapters {', '.join(self.peft_config)} share: put it into a "
                "model without adapters"
            )

    def adapters_by_path(self, adapter_name: str) -> dict[str, LoraAdapter]:
        """The adapters of this name by the path of their layer, without those of tied heads.

        A tied head's factors are the embedding's, and not in the file.
        """
        adapters = {}
        for path, layer in self._wrappers().items():
            entry = layer.entries.get(adapter_name)
            if isinstance(entry, LoraAdapter) and not isinstance(entry, HeadAdapter):
                adapters[path] = entry
        return adapters

    @property
    def changed_layers(self) -> dict[str, LoraLinear]:
        """The layers whose base was changed by an adapter's start, by path."""
        wrapped = self._wrappers().items()
        return {
            path: layer
            for path, layer in wrapped
            if isinstance(layer, LoraLinear) and layer.has_changed_base
        }

    def _check_name(self, adapter_name: str, config: LoraConfig, replaces: bool = False) -> None:
        """ConfigError if an adapter of this name and configuration cannot be added to the others.

        replaces   whether it may replace an adapter of the same name
        """
        if not isinstance(config, LoraConfig):
            raise ConfigError(f"expected a LoraConfig, got {config!r:.99}")
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ConfigError(
                f"{adapter_name!r:.99} cannot name an adapter: choose a text without dots "
                "that is not empty"
            )
        if adapter_name in self.peft_config and not replaces:
            raise ConfigError(
                f"an adapter {adapter_name!r} exists already; "
                f"choose a name other than {', '.join(self.peft_config)}"
            )
        others = {name: c for name, c in self.peft_config.items() if name != adapter_name}
        if self.changed_layers and others:
            raise ConfigError(
                f"adapter {next(iter(others))!r} trains over a base that its start changed: unload "
                "it before another is added, or load it as plain LoRA"
            )
        biased = [name for name, other in others.items() if other.bias != "none"]
        if biased and config.bias != "none":
            raise ConfigError(
                f"adapter {biased[0]!r} trains the base's biases already: "
                "a second one needs bias='none'"
            )

    def _inject(self, adapter_name: str, plan: Plan, seed: int) -> None:
        inject(self.model, adapter_name, plan, seed)
        self.peft_config[adapter_name] = plan.config
        self._plans[adapter_name] = plan
        self.set_requires_grad(adapter_name, False)  # until set_adapter makes it the active one
        for layer in self._wrappers().values():  # some of them may be new
            layer.active = tuple(self.active_adapters)
            layer.enabled = self._is_enabled

    # ---- switching -------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones. Only they require a gradient.

        With `inference_mode` they require none either. Other adapters that are merged are unmerged
        first, with a warning.
        """
        names = list_names(adapter_name)
        self._require_known(names)
        layers = self._wrappers().values()
        for layer in layers:
            layer.result(names)  # raises if two of them cannot be active at once
        merged = [name for name in self.merged_adapters if name not in names]
        if merged:
            warnings.warn(f"unmerged, to be inactive: {', '.join(merged)}", stacklevel=2)
            self.unmerge_adapter()
        self._train_only(names, inference_mode)
        for layer in layers:
            layer.active = tuple(names)

    def _train_only(self, names: list[str], inference_mode: bool) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for name in names:
            self.set_requires_grad(name, not inference_mode)
        self.active_adapters = names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Make the parameters of these adapters trainable, or freeze them, active or not."""
        names = list_names(adapter_names)
        self._require_known(names)
        for name in names:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad = requires_grad and not parameter.fixed

    def adapter_parameters(self, adapter_name: str) -> dict[str, Parameter]:
        """The parameters of one adapter by their keys in its file.

        These are its factors, copied modules, and the base's biases if it trains them.
        """
        parameters = self._biases(adapter_name)
        for entry in self._entry_parameters():
            if entry.adapter_name == adapter_name:
                parameters[entry.key] = entry.parameter
        return parameters

    def _biases(self, adapter_name: str) -> dict[str, Parameter]:
        """The base's biases that this adapter trains, by their keys in its file."""
        plan = self._plans[adapter_name]
        mode = plan.config.bias
        biases: dict[str, Parameter] = {}
        if mode == "none":
            return biases
        for path, module in modules_inside(self.model).items():
            bias = vars(module).get("bias")
            if not isinstance(bias, Parameter):
                continue
            if path in plan.targets:
                biases[f"{PREFIX}{path}.base_layer.bias"] = bias
            elif mode == "all":
                biases[f"{PREFIX}{path}.bias"] = bias
        return biases

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model is its base, bit for bit, apart from trained biases.

        Merged adapters are unmerged, and merged again at the end.
        """
        if any(self.peft_config[n].bias != "none" for n in self.active_adapters):
            warnings.warn(
                "the adapter trained the base's biases: disabling it does not bring them back",
                stacklevel=3,
            )
        with use_adapters(self._wrappers().values(), None), self._unmerged(), self._unchanged():
            yield

    def disable_adapter_layers(self) -> None:
        """Run the base alone, and train nothing, until `enable_adapter_layers`.

        Merged adapters are unmerged, and stay so afterwards.
        """
        self.unmerge_adapter()
        self._enable(False)
        for name in self.peft_config:
            self.set_requires_grad(name, False)

    def enable_adapter_layers(self) -> None:
        """Run the active adapters again, and train them."""
        self._enable(True)
        if self.active_adapters:
            self.set_adapter(self.active_adapters)

    def _enable(self, enabled: bool) -> None:
        self._is_enabled = enabled
        for layer in self._wrappers().values():
            layer.enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If no active one is left, the first of the others becomes active.

        Without any adapter the model is its base. `add_adapter` or `load_adapter`, and
        `set_adapter`, give it a new one.
        """
        self._require_known([adapter_name])
        self._require_unmerged(adapter_name)
        self._take_out(adapter_name)
        if adapter_name in self.active_adapters:
            others = [name for name in self.active_adapters if name != adapter_name]
            others = others or list(self.peft_config)[:1]
            if others:
                self.set_adapter(others)
            else:
                self._train_only([], inference_mode=True)

    def _require_unmerged(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ConfigError(
                f"adapter {adapter_name!r} is merged: call unmerge_adapter() before it is deleted "
                "or replaced"
            )

    def _take_out(self, adapter_name: str) -> None:
        del self.peft_config[adapter_name]
        del self._plans[adapter_name]
        for path, layer in self._wrappers().items():
            layer.entries.pop(adapter_name, None)
            if not layer.entries:
                replace_module(self.model, path, layer.inner)

    def _require_known(self, names: Sequence[str]) -> None:
        known = list(self.peft_config)
        unknown = [name for name in names if name not in known]  # also one that cannot be hashed
        if unknown or not names:
            shown = ", ".join(map(repr, unknown)) or "(none named)"
            choice = f"choose from {', '.join(known)}"
            if not known:
                choice = "the model has none: add_adapter or load_adapter comes first"
            raise ConfigError(f"no adapter {shown}; {choice}")

    def _known_or_active(self, names: Sequence[str] | None) -> list[str]:
        chosen = list(self.active_adapters if names is None else names)
        self._require_known(chosen)
        return chosen

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged in any layer."""
        merged: dict[str, None] = {}
        for layer in self._wrappers().values():
            merged |= dict.fromkeys(layer.merged)
        return list(merged)

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        """A context without merged adapters; at the end they are merged again, to the same bits."""
        layers = self._wrappers().values()
        merged = [(layer, layer.merged, layer.requantized) for layer in layers if layer.merged]
        try:
            self.unmerge_adapter()
            yield
        finally:
            for layer, names, requantized in merged:
                layer.merge(names, requantized)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base's weights, which have their old bits again."""
        for layer in self._wrappers().values():
            if layer.merged:
                layer.unmerge()

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """A context in which each layer has its base as it was before an adapter's start."""
        changed = {layer: layer.restore_base() for layer in self.changed_layers.values()}
        try:
            yield
        finally:
            for layer, base in changed.items():
                layer.change_base(base)

    # ---- counting --------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(the number of trainable parameters, that of all); shared ones are counted once."""
        trainable = total = 0
        for parameter in self.model.parameters():
            total += parameter.size
            if parameter.requires_grad:
                trainable += parameter.size
        return trainable, total

    def get_layer_status(self) -> list[LayerStatus]:
        """The status of each layer with adapters: see `status.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """The status of the whole model: see `status.get_model_status`."""
        return get_model_status(self)

    def explain(self, tokens: int) -> str:
        """How a step over `tokens` positions computes each layer, in one line per layer.

        A line has the way that is chosen, and the operations that each of the two ways adds.
        """
        if not is_integer(least=1)(tokens):
            got = f"shape {tokens.shape}" if hasattr(tokens, "shape") else f"{tokens!r:.99}"
            raise ConfigError(
                f"explain takes the number of positions in a step, got {got}: give ids.size"
            )
        lines = []
        for path, layer in self._wrappers().items():
            if isinstance(layer, LoraLinear) and layer.running:
                way = "W + dW" if layer.merges(tokens) else "W, then A and B"
                merged, apart = layer.count_operations(tokens)
                lines.append(
                    f"{path}: {way}   (W + dW once {merged:,} operations, "
                    f"A and B at each position {apart:,})"
                )
        return "\n".join(lines)

    def print_trainable_parameters(self) -> None:
        """Print "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"."""
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percent:.4f}"
        )


def list_names(names: str | Sequence[str]) -> list[str]:
    """A list of the names, each once, from one name or several."""
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))
