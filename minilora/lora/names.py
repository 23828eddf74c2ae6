"""PEFT's spellings: its words for methods, and the names of an adapter's tensors.

in a model here     model.layers.0.self_attn.q_proj.adapters.default.lora_A
in PEFT's models    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
in the file         base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..nn import Parameter
from .adalora import AdaLoraAdapter, AdaLoraConfig
from .config import LoraConfig
from .dora import DoraAdapter
from .embedding import DoraEmbeddingAdapter, EmbeddingAdapter
from .hydra import HydraAdapter, HydraConfig
from .layer import SavedModule, Wrapper
from .lora import LoraAdapter
from .maps import MAPS, MapConfig
from .maps.adapter import MapAdapter

PREFIX = "base_model.model."  # begins the names of layers' tensors in PEFT's models and files
MODEL_PREFIX = "base_model."  # begins those of tensors that all layers share
ENDS = ("embed_tokens", "lm_head")  # the last part of the path of an embedding or a head, for PEFT
TOKENS = "token_adapter.trainable_tokens_delta"

# The configuration and the adapter of a linear layer by peft_type: a new method is one line in
# each, or for a map theta -> dW one line in maps/__init__.py. DoRA has LoRA's peft_type: see
# adapter_class.
_FACTORED: dict[str, type[LoraConfig]] = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "HYDRALORA": HydraConfig,
}
CONFIGS: Mapping[str, type[LoraConfig]] = ChainMap(MAPS, _FACTORED)  # type: ignore[arg-type]
ADAPTERS: dict[str, type[LoraAdapter]] = {
    "LORA": LoraAdapter,
    "ADALORA": AdaLoraAdapter,
    "HYDRALORA": HydraAdapter,
}

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
    if isinstance(config, MapConfig):
        return MapAdapter
    return DoraAdapter if config.use_dora else ADAPTERS[config.peft_type]


def find_ending(name: str) -> tuple[str, str] | None:
    """(the ending of a key, what it means) if `name` ends as a tensor of a known method does."""
    for ending, part in ENDINGS.items():
        if name.endswith(ending):
            return ending, part
    for config in MAPS.values():
        for tensor in config.map.TENSORS:
            ending = f".{tensor}{config.map.SUFFIX}"
            if name.endswith(ending):
                return ending, tensor
    return None


def has_tensor(config: LoraConfig, part: str) -> bool:
    """Can a layer of this method have the tensor that `find_ending` calls `part`?"""
    if isinstance(config, MapConfig):
        return config.has_tensor(part)
    return part in ENDINGS.values()


def describe_tensors(config: LoraConfig) -> str:
    """The names of the tensors that a method has in each layer, for messages."""
    if isinstance(config, MapConfig):
        return ", ".join(config.map.TENSORS) or "none in a layer"
    return "lora_A and lora_B"


def map_tensors() -> set[str]:
    """The names of all tensors of maps."""
    return {name for config in MAPS.values() for name in (*config.map.TENSORS, *config.map.SHARED)}


TENSORS = ("lora_A", "lora_B", "lora_E", "lora_route", "lora_embedding_A", "lora_embedding_B")


def keys_without_name(keys: Iterable[str]) -> dict[str, str]:
    """The keys of a file that has the adapter's name in them, each with the key without it.

    Some programs save an adapter's tensors as models call them: lora_A.default.weight. Empty if no
    key has a name, if there are several names, or if two keys without it would be one.
    """
    shorter: dict[str, str] = {}
    names = set()
    keys = list(keys)
    tensors = {*TENSORS, *BARE, *map_tensors()}
    for key in keys:
        path, _, name = key.removesuffix(".weight").rpartition(".")
        tensor = path.rpartition(".")[2]
        if tensor in tensors:
            end = ".weight" if key.endswith(".weight") and tensor not in BARE else ""
            shorter[key] = path + end
            names.add(name)
    if len(names) != 1:
        return {}
    copied = f".modules_to_save.{names.pop()}."
    shorter |= {key: key.replace(copied, ".", 1) for key in keys if copied in key}
    all_keys = {shorter.get(key, key) for key in keys}
    return shorter if len(all_keys) == len(keys) else {}


def factor_keys(path: str, embeds: bool = False) -> tuple[str, str]:
    """The keys of A and B of a layer in PEFT's file."""
    names = EMBEDDING if embeds else LINEAR
    return f"{PREFIX}{path}.{names['A']}", f"{PREFIX}{path}.{names['B']}"


def base_weight_key(path: str) -> str:
    """The key in PEFT's file of the weight under the adapter of a layer, where the file has it."""
    return f"{PREFIX}{path}.base_layer.weight"


# A name is made from its parts, here alone, and never taken apart: adapters have any names.


def file_key(path: str, adapter: Any, tensor: str) -> str:
    """The key in the file of one tensor of an adapter (the object or its class) of layer `path`."""
    if tensor in adapter.SHARED:
        return MODEL_PREFIX + tensor
    suffix = "" if tensor in BARE else adapter.SUFFIX
    return f"{PREFIX}{path}{adapter.INSIDE}.{tensor}{suffix}"


def peft_name(path: str, adapter: Any, tensor: str, adapter_name: str) -> str:
    """The name of the same tensor in PEFT's models."""
    if tensor in adapter.SHARED:
        return f"{MODEL_PREFIX}{tensor}.{adapter_name}"
    suffix = ".weight" if tensor in BARE else adapter.SUFFIX
    return f"{PREFIX}{path}{adapter.INSIDE}.{tensor}.{adapter_name}{suffix}"


class EntryParameter(NamedTuple):
    """A parameter of one adapter in a model: of its factors, of its tokens or of a copied module.

    key    in the adapter's file
    name   in PEFT's models
    """

    adapter_name: str
    key: str
    name: str
    parameter: Parameter


def entry_parameters(wrappers: Iterable[tuple[str, Wrapper]]) -> Iterator[EntryParameter]:
    """The parameters of the adapters in `wrappers`, (path, wrapper), each once."""
    seen = set()  # a tied head has the parameters of its embedding
    for path, wrapper in wrappers:
        for adapter_name, entry in wrapper.entries.items():
            for tensor, parameter in _parameters(wrapper, entry):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if isinstance(wrapper, SavedModule):
                    key = f"{PREFIX}{path}.{tensor}"
                    name = f"{PREFIX}{path}.modules_to_save.{adapter_name}.{tensor}"
                else:
                    key = file_key(path, entry, tensor)
                    name = peft_name(path, entry, tensor, adapter_name)
                yield EntryParameter(adapter_name, key, name, parameter)


def _parameters(wrapper: Wrapper, entry: Any) -> Iterator[tuple[str, Parameter]]:
    """(name inside the entry, parameter)"""
    if isinstance(wrapper, SavedModule):
        yield from entry.named_parameters()
        return
    for tensor in entry.TENSORS:
        parameter = vars(entry).get(tensor)  # None for a tied head, which reads its embedding's
        if parameter is not None:
            yield tensor, parameter
