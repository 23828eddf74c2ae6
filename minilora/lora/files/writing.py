"""An adapter of a model as PEFT's folder, for the base as it was before the adapter's start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...formats import write_adapter
from ...formats.disk import JsonObject
from ..config import NO_START, LoraConfig
from ..names import base_weight_key, factor_keys
from ..starts.residual import FOLDER, plain_form, start_of
from ..starts.values import find_start

Array = np.ndarray


def write_started(model: Any, adapter_name: str, folder: Path, as_trained: bool) -> None:
    """Write an adapter of a PeftModel to its folder: see `PeftModel.save_pretrained`."""
    config = model.peft_config[adapter_name]
    tensors = model.state_dict(adapter_name)
    fields = config.to_dict()
    is_loftq = _word(config) == "loftq"
    if as_trained or is_loftq:
        fields["init_lora_weights"] = _word(config)
    elif find_start(config.init_lora_weights) or start_of(config):
        fields |= NO_START
    initial = {
        path: layer.adapters[adapter_name].initial for path, layer in model.changed_layers.items()
    }
    if initial and not is_loftq:
        if as_trained:
            _write_initial(folder / FOLDER, config, initial)
        else:
            ranks = {path: a.r for path, a in model.adapters_by_path(adapter_name).items()}
            fields |= _make_plain(tensors, config, ranks, initial)
            for path, layer in model.changed_layers.items():
                key = base_weight_key(path)
                if key in tensors:  # of a head, which no file stores transposed
                    tensors[key] = layer.unchanged_base.weight.numpy()
    write_adapter(folder, fields, tensors)


def _make_plain(
    tensors: dict[str, Array],
    config: LoraConfig,
    ranks: Mapping[str, int],
    initial: Mapping[str, tuple[Array, Array]],
) -> JsonObject:
    """Replace A and B in `tensors` by factors over the base as it was; returns the changed fields.

    initial   (A0, B0) by path
    """

    def read(key: str) -> Array:
        return tensors[key].astype(np.float64)

    factors, fields = plain_form(tensors.__contains__, read, config, ranks, initial)
    for key, factor in factors.items():
        tensors[key] = factor.astype(tensors[key].dtype)
    return fields


def _write_initial(
    folder: Path, config: LoraConfig, initial: Mapping[str, tuple[Array, Array]]
) -> None:
    """Write A0 and B0 as an adapter's folder, from which a start can be read again."""
    tensors: dict[str, Array] = {}
    for path, factors in initial.items():
        tensors |= dict(zip(factor_keys(path), factors, strict=True))
    write_adapter(folder, {**config.to_dict(), **NO_START, "use_dora": False}, tensors)


def _word(config: LoraConfig) -> Any:
    """PEFT's value of init_lora_weights for this configuration."""
    start = find_start(config.init_lora_weights)
    if start is not None:
        return start.word
    return config.extra.get("init_lora_weights", config.init_lora_weights)
