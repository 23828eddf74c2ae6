"""Files of the ecosystem as arrays and JSON: strict in, exact out. This folder knows no model.

disk         a file appears whole or not at all; strict JSON
folders      one writer at a time; a folder appears whole or not at all
dtypes       numbers as files store them: widened exactly, rounded once
safetensors  arrays in one file
checkpoint   a base model's folder: config.json and model.safetensors, in one piece or in shards
hub          a base model by its name: from the Hugging Face hub's cache, or by a download
adapter      PEFT's folder: adapter_config.json and adapter_model.safetensors
"""

from .adapter import PEFT_CONFIG_DEFAULTS, read_adapter, write_adapter
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .disk import atomic_file, read_json, write_json
from .dtypes import bf16_from, bf16_to_float32
from .hub import find_model
from .safetensors import Entry, SafetensorsFile, array_entry, load_file, save_file, write_stream

__all__ = [
    "PEFT_CONFIG_DEFAULTS",
    "Checkpoint",
    "Entry",
    "SafetensorsFile",
    "array_entry",
    "atomic_file",
    "bf16_from",
    "bf16_to_float32",
    "find_model",
    "load_file",
    "read_adapter",
    "read_checkpoint",
    "read_json",
    "save_file",
    "write_adapter",
    "write_checkpoint",
    "write_json",
    "write_stream",
]
