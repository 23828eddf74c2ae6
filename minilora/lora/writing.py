"""An adapter of a model as PEFT's folder, over the base as it was before its start changed that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..formats import write_adapter
from .config import NO_START, LoraConfig
from .initial import FOLDER, plain_form, start_of
from .names import base_weight_key, factor_keys
from .starts import find_start

Array = np.ndarray


def write_started(model: Any, adapter_name: str, folder: Path, as_trained: bool) -> None:
    """Write an adapter of a PeftModel to its folder: see `PeftModel.save_pretrained`."""
    config = model.peft_config[adapter_name]
    tensors = model.state_dict(adapter_name)
    fields = config.to_dict()
    started = {path: layer.adapters[adapter_name] for path, layer in model.changed_layers.items()}
    is_loftq = _word(config) == "loftq"
    if as_trained or is_loftq:
        fields["init_lora_weights"] = _word(config)
    elif find_start(config.init_lora_weights) or start_of(config):
        fields |= NO_START
    if started and not (as_trained or is_loftq):
        ranks = {path: adapter.r for path, adapter in model.adapters_by_path(adapter_name).items()}
        initial = {path: adapter.initial for path, adapter in started.items()}
        factors, changed = plain_form(
            tensors.__contains__,
            lambda key: tensors[key].astype(np.float64),
            config,
            ranks,
            initial,
        )
        for key, factor in factors.items():
            tensors[key] = factor.astype(tensors[key].dtype)
        for path, layer in model.changed_layers.items():
            key = base_weight_key(path)
            if key in tensors:  # of a head, which no file stores transposed
                tensors[key] = layer.unchanged_base.weight.numpy()
        fields |= changed
    if started and as_trained and not is_loftq:
        before: dict[str, Array] = {}
        for path, adapter in started.items():
            before |= dict(zip(factor_keys(path), adapter.initial, strict=True))
        write_adapter(folder / FOLDER, {**config.to_dict(), **NO_START, "use_dora": False}, before)
    write_adapter(folder, fields, tensors)


def _word(config: LoraConfig) -> Any:
    """PEFT's value of init_lora_weights."""
    start = find_start(config.init_lora_weights)
    if start is not None:
        return start.word
    return config.extra.get("init_lora_weights", config.init_lora_weights)
