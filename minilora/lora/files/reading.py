"""What an adapter's file means where its configuration says too little, or more than can be run.

PEFT finds layers by the configuration, loads whatever tensors it then has a place for, and says
little about the rest. Here everything in a file must have a meaning. The keys of a file say which
layers it adapts and what it replaces, so they decide wherever the configuration leaves it open:

    read_fields        patterns that cannot be run, and modules that are whole in the file
    decoder_of         keys of a decoder alone, for a base that has it as a part
    settle_saved       whole modules that only repeat the base's, and a tied embedding and head
    settle_vocabulary  an embedding and a head with more or fewer rows than the base's

All commands read an adapter through these: the first is called where a file is opened, the others
where its base is known (see fitting.py). Each tells what it decided, in a note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, FormatError
from ...formats import SafetensorsFile
from ...formats.disk import JsonObject
from ..config import MAX_PATTERNS, LoraConfig, is_pattern
from ..names import ENDINGS, PREFIX, map_tensors
from ..targets.base import DECODERS, HEAD, Base
from ..targets.endings import plain_text
from ..targets.patterns import MAX_STATES, UnsupportedPattern, compile_pattern
from ..targets.rules import Layers, Targets
from .repeats import Read, is_weight_of_base

Array = np.ndarray

# The parts of a key that say whose tensor it is; a tensor without one is a parameter of the base.
MARKS = {"base_layer", "original_module", "modules_to_save", "token_adapter"}

# Where the weight of an embedding or a head is in a file: the base's, or else a trained one.
WEIGHTS = (
    "base_layer.weight",
    "original_module.weight",
    "token_adapter.base_layer.weight",
    "weight",
)


class Reading(NamedTuple):
    """The fields of adapter_config.json, without patterns that cannot be run.

    whole   the modules that are whole in the file, although modules_to_save does not name them
    notes   what was decided, for the user
    """

    fields: JsonObject
    whole: tuple[str, ...]
    notes: tuple[str, ...]


def read_fields(fields: JsonObject, file: SafetensorsFile, where: str) -> Reading:
    """The configuration of a file. FormatError if the keys cannot say what it leaves open.

    fields   as the file has them, still unchecked
    where    the folder, quoted for messages
    """
    fields = dict(fields)
    notes = []
    ranks = adapted_ranks(file)
    why = _why_not_run(_patterns_for_names(fields), fields.get("layers_pattern"))
    if why and ranks:
        fields |= targets_from(ranks)
        notes.append(f"{where}: {why}: the layers are those that have tensors in the file")
    why = _why_not_run(_keys_of(fields, "rank_pattern"))
    if why and ranks:
        fields["rank_pattern"] = ranks
        notes.append(f"{where}: rank_pattern: {why}: the ranks are those of the file's tensors")
    why = _why_not_run(_keys_of(fields, "alpha_pattern"))
    if why:
        raise FormatError(
            f"{where}: alpha_pattern in adapter_config.json: {why}, and no tensor says which "
            "layers it means: name them in full, each with its lora_alpha"
        )
    return Reading(fields, tuple(_whole_modules(fields, file, ranks)), tuple(notes))


def targets_from(paths: Iterable[str]) -> JsonObject:
    """The fields that mean exactly these layers."""
    none = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {"target_modules": sorted(paths), **none}


def adapted_ranks(file: SafetensorsFile) -> dict[str, int]:
    """The rank of each layer that has an A in the file, by its path."""
    ranks = {}
    for key in file.keys():
        name = key.removeprefix(PREFIX)
        ending = next((e for e, part in ENDINGS.items() if part == "A" and name.endswith(e)), None)
        shape = file.shape(key)
        if name != key and ending is not None and len(shape) == 2:
            ranks[name.removesuffix(ending)] = shape[0]
    return ranks


# ---- patterns that cannot be run -----------------------------------------------------------------


def _patterns_for_names(fields: Mapping[str, Any]) -> list[str]:
    """The patterns for whole names that choose layers."""
    texts = [fields.get(name) for name in ("target_modules", "exclude_modules")]
    return [text for text in texts if is_pattern(text)]


def _keys_of(fields: Mapping[str, Any], name: str) -> list[str]:
    table = fields.get(name)
    return [key for key in table if isinstance(key, str)] if isinstance(table, dict) else []


def _why_not_run(patterns: Iterable[str], layers_pattern: Any = None) -> str:
    """Why one of some patterns cannot be run, though `re` may know it; "" if all can.

    What is wrong in another way, or too much, is left to LoraConfig, which raises for it.
    """
    size = 0
    try:
        for text in patterns:
            if size <= MAX_STATES and plain_text(text) is None:
                size += compile_pattern(text).size
        layers = layers_pattern if isinstance(layers_pattern, list) else [layers_pattern]
        if len(layers) <= MAX_PATTERNS and all(isinstance(text, str) for text in layers):
            Layers(None, layers)
    except UnsupportedPattern as error:
        return str(error).partition("; supported")[0]
    except ConfigError:
        return ""
    return ""


# ---- modules that are whole in the file ----------------------------------------------------------


def _whole_modules(
    fields: Mapping[str, Any], file: SafetensorsFile, adapted: Container[str]
) -> list[str]:
    """The modules whose weight is in the file by its plain name, and not in modules_to_save."""
    named = fields.get("modules_to_save") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return []  # which LoraConfig refuses
    if fields.get("ensure_weight_tying") is True:
        named = [*named, HEAD]  # it repeats the embedding
    saved = Targets([name for name in named if name], anywhere=True)
    whole = []
    of_adapters = map_tensors()
    for key in file.keys():
        path = key.removeprefix(PREFIX).removesuffix(".weight")
        parts = path.split(".")
        is_plain = key == f"{PREFIX}{path}.weight" and not MARKS & {*parts}
        is_of_adapter = any(part.startswith("lora_") or part in of_adapters for part in parts)
        if not is_plain or path in adapted or is_of_adapter:
            continue
        around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        if not any(map(saved.mean, around)):
            whole.append(path)
    return whole


def settle_saved(
    file: SafetensorsFile, config: LoraConfig, whole: Collection[str], base: Base, read: Read
) -> tuple[LoraConfig, list[str]]:
    """(the configuration that also saves those of `whole` that differ from the base's, notes).

    whole   modules, as of `Reading`

    What PEFT calls save_embedding_layers puts an embedding and a head into a file that were not
    trained. If they share one weight in the base, they do so in the adapter.
    """
    trained = []
    for path in whole:
        keys = [f"{PREFIX}{name}" for name, _ in base.below(path) if f"{PREFIX}{name}" in file]
        equal = [is_weight_of_base(file, key, read(key.removeprefix(PREFIX))) for key in keys]
        if not all(equal):
            trained.append(path)
    notes = []
    if trained:
        shown = ", ".join(trained)
        notes.append(f"{shown:.200}: whole in the file, and read as if in modules_to_save")
    ends = {base.embedding, base.head}
    named = Targets(config.modules_to_save or [], anywhere=True)
    # A module that modules_to_save names is a copy of its own, though the base's weight is tied.
    if base.tied and ends & {*trained} and not any(map(named.mean, ends)):
        trained = [path for path in trained if path != base.head]
        trained = list(dict.fromkeys([*trained, base.embedding]))
        config = dataclasses.replace(config, ensure_weight_tying=True)
        head, embedding = (f"{PREFIX}{path}.weight" for path in (base.head, base.embedding))
        if embedding not in file:
            file.rename({head: embedding})
    saved = [*(config.modules_to_save or []), *trained]
    return dataclasses.replace(config, modules_to_save=saved or None), notes


# ---- keys of a decoder alone ---------------------------------------------------------------------


def decoder_of(keys: Iterable[str], names: Iterable[str] | None = None) -> str:
    """The decoder, "model" or "transformer", that an adapter was made for alone, or "".

    names   the base's parameters, of which a decoder must be a part; None: not known

    The adapter's names are those of AutoModel, in which the decoder is all there is:
    base_model.model.layers.0 in place of base_model.model.model.layers.0.
    """
    paths = [key.removeprefix(PREFIX) for key in keys]
    for decoder, parts in DECODERS.items():
        is_part = names is None or any(name.startswith(f"{decoder}.") for name in names)
        if is_part and paths and all(path.partition(".")[0] in parts for path in paths):
            return decoder
    return ""


# ---- another vocabulary --------------------------------------------------------------------------


def settle_vocabulary(file: SafetensorsFile, base: Base, read: Read) -> dict[str, Array]:
    """The weights of the base's embedding and head, by name, with as many rows as the file's.

    Empty if they have as many. New rows are the file's, the others stay the base's. ConfigError if
    the file has them for one of the two places alone.
    """
    ends = [path for path in (base.embedding, base.head) if path]
    key_of = {}
    for path in ends:
        C = base.layers[path].shape[1]
        keys = [f"{PREFIX}{path}.{ending}" for ending in WEIGHTS]
        shapes = {key: file.shape(key) for key in keys if key in file}
        fitting = [key for key, shape in shapes.items() if shape[1:] == (C,) and shape[0] > 0]
        if fitting:
            key_of[path] = fitting[0]
    sizes = {file.shape(key)[0] for key in key_of.values()}
    V = base.layers[base.embedding].shape[0] if base.embedding else 0
    if len(sizes) != 1 or sizes == {V} or not V:
        return {}
    (size,) = sizes
    if base.tied:
        key_of = dict.fromkeys(ends, next(iter(key_of.values())))
    missing = [path for path in ends if path not in key_of]
    if missing:
        raise ConfigError(
            f"{next(iter(key_of.values()))} has {size} tokens, the base has {V}, and the file has "
            f"no rows of {missing[0]} for the others: give the base after its vocabulary was "
            f"resized to {size}"
        )
    vocabulary: dict[str, Array] = {}
    for path, key in key_of.items():
        W = read(f"{path}.weight")
        vocabulary[f"{path}.weight"] = np.concatenate([W[:size], file.read(key)[V:]])
    return vocabulary


def with_vocabulary(base: Base, vocabulary: Mapping[str, Array]) -> Base:
    """The base with these weights in place of its own."""
    layers = dict(base.layers)
    parameters = dict(base.parameters)
    for name, W in vocabulary.items():
        path = name.removesuffix(".weight")
        layers[path] = layers[path]._replace(shape=W.shape)
        parameters[name] = W.shape
    return dataclasses.replace(base, layers=layers, parameters=parameters)
