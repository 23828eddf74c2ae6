"""What the layers of a model with adapters are set to: PEFT's questions, answered with numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from ..errors import ConfigError
from ..nn import Module, Parameter
from .layer import Wrapper
from .names import entry_parameters

IRREGULAR = "irregular"  # said of a value that is not the same everywhere
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LayerStatus:
    """One layer with adapters. Dictionaries have the names of adapters as keys.

    name                  its path in the model
    module_type           the class of the layer
    enabled               does it run adapters at all?
    active_adapters, merged_adapters, available_adapters
    requires_grad         do the adapter's parameters here? "irregular" if some do
    devices               where they are
    quantization_backend  "nf4", "fp4", "int8" or None
    parameters            how many numbers the adapter has here
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None
    parameters: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """The same of a whole model: "irregular" where its layers differ.

    base_model_type, adapter_model_type    the classes of the two
    peft_types                             the method of each adapter
    trainable_params, total_params         numbers, each parameter counted once
    num_adapter_layers                     layers with adapters
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None
    parameters: dict[str, int]


def get_layer_status(model: Module) -> list[LayerStatus]:
    """The state of each layer with adapters, in the order of the model.

    model   a PeftModel, or the model inside; paths begin there

    ConfigError if it has no adapters.
    """
    modules = model.named_modules()
    states = [_layer_status(path, layer) for path, layer in modules if isinstance(layer, Wrapper)]
    if not states:
        raise ConfigError(f"expected a model with adapters, but {type(model).__name__} has none")
    return states


def _layer_status(path: str, layer: Wrapper) -> LayerStatus:
    parameters: dict[str, list[Parameter]] = {name: [] for name in layer.entries}
    for entry in entry_parameters([(path, layer)]):
        parameters[entry.adapter_name].append(entry.parameter)
    codes = getattr(getattr(layer.inner, "weight", None), "quantized", None)
    return LayerStatus(
        name=path,
        module_type=type(layer).__name__,
        enabled=layer.enabled,
        active_adapters=list(layer.active),
        merged_adapters=list(layer.merged),
        requires_grad={
            name: _common(p.requires_grad for p in its if not p.fixed)
            for name, its in parameters.items()
        },
        available_adapters=sorted(layer.entries),
        devices={
            name: sorted({p.backend.name.partition(":")[0] for p in its})
            for name, its in parameters.items()
        },
        quantization_backend=getattr(codes, "kind", None),
        parameters={name: sum(p.size for p in its) for name, its in parameters.items()},
    )


def get_model_status(model: Any) -> ModelStatus:
    """The state of a PeftModel. ConfigError if it has no adapters."""
    layers = get_layer_status(model)
    trainable, total = model.get_nb_trainable_parameters()
    names = sorted({name for layer in layers for name in layer.available_adapters})

    def by_adapter(field: str) -> dict[str, list[Any]]:
        values: dict[str, list[Any]] = {name: [] for name in names}
        for layer in layers:
            for name, value in getattr(layer, field).items():
                values[name].append(value)
        return values

    devices = by_adapter("devices")
    return ModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: config.peft_type for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad={name: _common(v) for name, v in by_adapter("requires_grad").items()},
        available_adapters=names,
        devices={name: sorted({d for one in v for d in one}) for name, v in devices.items()},
        quantization_backend=_common(layer.quantization_backend for layer in layers),
        parameters={name: sum(counts) for name, counts in by_adapter("parameters").items()},
    )


def _merged(layers: list[LayerStatus]) -> list[str] | str:
    """The adapters that are merged in every layer which has them, if no other one is in any."""
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    for layer in layers:
        if {*layer.merged_adapters} != {*merged} & {*layer.available_adapters}:
            return IRREGULAR
    return merged


def _common(values: Iterable[T]) -> T | str:
    """The value that all of them are, or "irregular"."""
    all_values = list(values)
    same = all(value == all_values[0] for value in all_values)
    return all_values[0] if same else IRREGULAR
