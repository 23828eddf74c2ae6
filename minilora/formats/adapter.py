"""PEFT's folder for one adapter: adapter_config.json and adapter_model.safetensors.

This file reads and writes them as a dict and arrays by key; minilora.lora knows what they mean.
A pickle (adapter_model.bin) is never opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FormatError
from .disk import JsonObject, PathLike, json_after, quoted, read_json, require_folder
from .safetensors import Array, SafetensorsFile, save_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What the folder is if it holds this file instead.
OTHER_FILES = {
    "adapter_model.bin": "; adapter_model.bin is a pickle and is not read",
    "adapters.safetensors": (
        ": an adapter in mlx-lm's files, which `minilora convert --to peft` turns into PEFT's"
    ),
    "multitask.json": ": it holds one adapter per task, each in its own folder: name one of them",
    "config.json": ": it is a model's folder, not an adapter's",
}

# Every key that peft 0.21.2 writes for LoRA, with PEFT's default. Its loader warns about a key that
# it does not know, and other readers look some of these up without a default, so a written file
# always has all of them. inference_mode is not PEFT's default, but what it always writes: a saved
# adapter loads frozen.
PEFT_CONFIG_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "revision": None,
        "target_modules": None,
        "target_parameters": None,
        "task_type": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
)


LORA_TYPES = ("LORA", "ADALORA", "HYDRALORA")  # the peft_types that have these fields


def open_adapter(directory: PathLike) -> tuple[JsonObject, SafetensorsFile]:
    """(config as the file has it, the open tensors) of PEFT's folder: close them, or use `with`.

    FileNotFoundError without the folder; FormatError when a file is missing or damaged.
    """
    require_folder(directory, "adapter")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not os.path.lexists(Path(directory, name)):
            names = (name for name in OTHER_FILES if os.path.lexists(Path(directory, name)))
            hint = OTHER_FILES.get(next(names, ""), "")
            raise FormatError(f"{quoted(directory)} has no {name}{hint}")
    config = read_json(Path(directory, CONFIG_FILE))
    return config, SafetensorsFile(Path(directory, WEIGHTS_FILE))


def read_adapter(directory: PathLike) -> tuple[JsonObject, dict[str, Array]]:
    """`open_adapter`, with all arrays read, by PEFT's keys. BF16 comes as float32."""
    config, file = open_adapter(directory)
    with file:
        return config, {key: file.read(key) for key in file}


def write_adapter(
    directory: PathLike, config: Mapping[str, Any], tensors: Mapping[str, Array]
) -> None:
    """Write PEFT's folder.

    Keys that the `config` of LoRA lacks get PEFT's defaults; that of another method is written as
    it is. Keys that PEFT does not know stay in the file.
    """
    os.makedirs(directory, exist_ok=True)
    is_of_lora = config.get("peft_type", "LORA") in LORA_TYPES
    defaults = PEFT_CONFIG_DEFAULTS if is_of_lora else {}
    with json_after(Path(directory, CONFIG_FILE), {**defaults, **config}):
        save_file(Path(directory, WEIGHTS_FILE), tensors)
