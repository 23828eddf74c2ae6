"""PEFT's spellings: its words for methods, and the names of an adapter's tensors.

in a model here     model.layers.0.self_attn.q_proj.adapters.default.lora_A
in PEFT's models    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
in the file         base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .adalora import AdaLoraAdapter, AdaLoraConfig
from .config import LoraConfig
from .dora import DoraAdapter
from .embedding import DoraEmbeddingAdapter, EmbeddingAdapter
from .hydra import HydraAdapter, HydraConfig
from .lora import LoraAdapter
from .tokens import TokenRows

PREFIX = "base_model.model."  # begins every name in PEFT's models and files
ENDS = ("embed_tokens", "lm_head")  # the last part of the path of an embedding or a head, for PEFT
TOKENS = "token_adapter.trainable_tokens_delta"

# The configuration and the adapter of a linear layer by peft_type: a new method is one line in
# each. DoRA has LoRA's peft_type: see adapter_class.
CONFIGS: dict[str, type[LoraConfig]] = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "HYDRALORA": HydraConfig,
}
ADAPTERS: dict[str, type[LoraAdapter]] = {
    "LORA": LoraAdapter,
    "ADALORA": AdaLoraAdapter,
    "HYDRALORA": HydraAdapter,
}

# The names of parameters in models.
TENSORS = {*AdaLoraAdapter.TENSORS, *DoraEmbeddingAdapter.TENSORS, *HydraAdapter.TENSORS}
TENSORS |= {*TokenRows.TENSORS}
WITHOUT_SUFFIX = {*EmbeddingAdapter.TENSORS, *TokenRows.TENSORS}  # in PEFT's models, in any adapter
BARE = {"lora_magnitude_vector"}  # in files without the ".weight" that it has in PEFT's models

# Keys in a file after the path of the layer: plain LoRA's of a linear layer and of an embedding,
# a tied head's with those of the embedding that are their transposes, and every ending with what
# it means.
LINEAR = {"A": "lora_A.weight", "B": "lora_B.weight"}
EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
TRANSPOSED = {LINEAR["A"]: EMBEDDING["B"], LINEAR["B"]: EMBEDDING["A"]}
ENDINGS = {f".{key}": part for keys in (LINEAR, EMBEDDING) for part, key in keys.items()}
ENDINGS |= {".lora_A": "A", ".lora_B": "B", ".lora_E": "E", ".lora_magnitude_vector": "m"}
ENDINGS |= {".lora_route.weight": "route", ".base_layer.weight": "base"}


def read_config(fields: dict[str, Any], where: str) -> LoraConfig:
    """The configuration in an adapter_config.json, of the class for its peft_type.

    ConfigError as from_dict's.
    """
    kind = fields.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ConfigError(
            f"{where}: peft_type must be {' or '.join(map(repr, CONFIGS))}, got {kind!r:.100}"
        )
    return CONFIGS[kind].from_dict(fields, where)


def adapter_class(config: LoraConfig, kind: str = "linear") -> type[LoraAdapter]:
    """The class of adapter that `config` puts on a layer of this kind: "linear" or "embedding"."""
    if kind == "embedding":
        return DoraEmbeddingAdapter if config.use_dora else EmbeddingAdapter
    return DoraAdapter if config.use_dora else ADAPTERS[config.peft_type]


def peft_name(path: str, configs: Mapping[str, LoraConfig]) -> str:
    """PEFT's name of the parameter at `path`; `configs` are those of the adapters, by name."""
    layer, inside, rest = path.rpartition(".adapters.")
    if not inside:
        return PREFIX + path
    adapter, tensor = rest.split(".")
    if tensor in TokenRows.TENSORS:
        layer += ".token_adapter"
    suffix = "" if tensor in WITHOUT_SUFFIX else adapter_class(configs[adapter]).SUFFIX
    return f"{PREFIX}{layer}.{tensor}.{adapter}{suffix}"


def file_key(name: str, adapter_name: str) -> str:
    """The key in adapter_model.safetensors of PEFT's `name`, without the adapter's name."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if parts[i + 1] != adapter_name:
            continue
        if part == "modules_to_save":
            return ".".join(parts[:i] + parts[i + 2 :])
        if part in BARE:
            return ".".join(parts[: i + 1])
        if part in TENSORS:
            return ".".join(parts[: i + 1] + parts[i + 2 :])
    return name
