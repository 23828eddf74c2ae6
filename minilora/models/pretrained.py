"""Loading and saving a base model's folder: config.json and tensors, checked before any is used.

A folder may store linear layers as bitsandbytes' codes, which its quantization_config announces:
they are read as `QuantizedLinear`, and written as they were. Weights in 16 bits become float32, or
stay as they are stored (quant/half.py). This file does not know what a model computes, only its
configuration and its parameters by name.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..formats import Checkpoint, array_entry, read_checkpoint, write_checkpoint
from ..formats.checkpoint import (
    BUFFERS,
    CONFIG_FILE,
    are_equal,
    describe_prefix,
    is_stored_transposed,
    to_file_layout,
)
from ..formats.disk import JsonObject, quoted
from ..nn import Linear, Parameter, replace_module
from ..quant.bitsandbytes import (
    QuantizationScheme,
    quantization_config,
    read_bitsandbytes,
    read_quantization_config,
    write_bitsandbytes,
)
from ..quant.half import (
    NAMES,
    STORED,
    Half,
    HalfWeight,
    encode_half,
    half_weight_owners,
    store_half_weights,
)
from ..quant.linear import quantized_layers
from .config import TransformerConfig

HEAD = "lm_head.weight"

# ---- loading ------------------------------------------------------------------------------------


def load_model(
    make: Callable[..., Any], directory: str | Path, dtype: Any, stored: bool = False
) -> Any:
    """make(config, seed=None, dtype=dtype), filled with the tensors of a folder, on the host.

    stored   keep the weights of linear layers and embeddings in 16 bits where the files do

    FormatError lists every tensor that is missing, unknown, or of another shape than config.json
    says; it names a layer of codes that is damaged, or of another kind than quantization_config
    says. ConfigError for a configuration or a quantization that is not supported.
    """
    fields, checkpoint = read_checkpoint(directory)
    with checkpoint:
        config, scheme = _read_config(fields, Path(directory, CONFIG_FILE))
        # Seen before memory is allocated. A byte of codes holds two weights.
        count = config.parameter_count()
        available = sum(math.prod(checkpoint.shape(key)) for key in checkpoint.keys())
        if count > 2 * available:
            raise FormatError(
                f"{directory}: config.json describes {count:,} parameters, "
                f"the file holds {available:,}"
            )
        model = make(config, seed=None, dtype=dtype)
        names = _model_names(model, checkpoint)
        if config.tie_word_embeddings and not _settle_tie(model, names, checkpoint):
            untied = dataclasses.replace(config, tie_word_embeddings=False)
            model = make(untied, seed=None, dtype=dtype)
        coded = {} if scheme is None else _coded_layers(model, names)
        if scheme is not None and not coded:
            raise FormatError(
                f"{directory}: quantization_config says {scheme}, but no linear layer is stored so"
            )
        dense = dict(names)
        for tensor_names in coded.values():
            for name in tensor_names:
                del dense[name]
        _fill(model, checkpoint, dense, coded, directory, stored)
        modules = dict(model.named_modules())
        for path, tensor_names in coded.items():
            tensors = {
                name.removeprefix(f"{path}."): checkpoint.read(names[name]) for name in tensor_names
            }
            where = f"{directory}: {path}"
            layer = read_bitsandbytes(tensors, where)
            plain = modules[path]
            if layer.weight.shape != plain.weight.shape:
                raise FormatError(
                    f"{where} is {layer.weight.shape}, config.json says {plain.weight.shape}"
                )
            if QuantizationScheme.of(layer) != scheme:
                raise FormatError(
                    f"{where} is {QuantizationScheme.of(layer)}, quantization_config says {scheme}"
                )
            layer.bias = plain.bias
            replace_module(model, path, layer.to(dtype=dtype))
    return model


def _read_config(
    fields: JsonObject, path: Path
) -> tuple[TransformerConfig, QuantizationScheme | None]:
    """(configuration, how the weights are stored) of a config.json, which a ConfigError names."""
    quantization = fields.get("quantization_config")
    try:
        config = TransformerConfig.from_dict(fields)
        scheme = None if quantization is None else read_quantization_config(quantization)
    except ConfigError as error:
        reason = str(error).removeprefix("config: ")
        raise ConfigError(f"{quoted(path)}: {reason}") from None
    return config, scheme


def _model_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The keys of the files by their names in the model.

    The keys of files that were saved without a head lack the decoder's name.
    """
    keys = checkpoint.keys()
    prefix = f"{model.decoder_name}."
    if any(key.startswith(prefix) for key in keys):
        prefix = ""
    return {key if key.startswith("lm_head.") else prefix + key: key for key in keys}


def _settle_tie(model: Any, names: dict[str, str], checkpoint: Checkpoint) -> bool:
    """Whether the model's embedding and head are one weight in the files, as config.json says.

    Two weights that differ count, and not config.json; a head alone is the embedding, too. Both as
    in transformers 5. `names` is that of `_model_names`, and gets the embedding.
    """
    weight = model.get_input_embeddings().weight
    embedding = next(name for name, p in model.named_parameters() if p is weight)
    if HEAD not in names:
        return True
    if embedding not in names:
        names[embedding] = names.pop(HEAD)
        return True
    if are_equal(checkpoint, names[HEAD], checkpoint, names[embedding]):
        return True
    warnings.warn(
        f"{quoted(checkpoint.directory)}: tie_word_embeddings is true in config.json, but "
        f"{names[HEAD]} differs from {names[embedding]}: both are used, as transformers does; set "
        "tie_word_embeddings to false to say so",
        stacklevel=4,
    )
    return False


def _coded_layers(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """The linear layers that are stored as codes: the names of their tensors, by path.

    The tensors beside the codes tell: `....weight.absmax` and others.
    """
    by_path: dict[str, list[str]] = {}
    for name in names:
        by_path.setdefault(name.partition(".weight")[0], []).append(name)
    embedding = model.get_input_embeddings().weight
    coded = {}
    for path, module in model.named_modules():
        # A tied head is not a layer with a weight of its own.
        if isinstance(module, Linear) and module.weight is not embedding:
            tensors = by_path.get(path, [])
            if any(name.startswith(f"{path}.weight.") for name in tensors):
                coded[path] = tensors
    return coded


def _fill(
    model: Any,
    checkpoint: Checkpoint,
    keys: dict[str, str],
    coded: Iterable[str],
    where: str | Path,
    stored: bool,
) -> None:
    """Give each parameter its tensor, except for the weights of the layers `coded`.

    keys   the keys of the dense tensors by their names in the model
    """
    kind = model.config.model_type
    weights = {f"{path}.weight" for path in coded}
    params = {name: p for name, p in model.named_parameters() if name not in weights}
    head = keys.get(HEAD) if model.config.tie_word_embeddings else None  # the embedding again
    problems = [f"missing {name}" for name in params if name not in keys]
    unknown = sorted(key for name, key in keys.items() if name not in params and key != head)
    problems += [f"unknown {key}" for key in unknown if not key.endswith(BUFFERS)]
    for name, p in params.items():
        shape = p.shape[::-1] if is_stored_transposed(kind, name) else p.shape
        if name in keys and checkpoint.shape(keys[name]) != shape:
            problems.append(
                f"{keys[name]} is {checkpoint.shape(keys[name])}, config.json says {shape}"
            )
    if problems:
        prefix = describe_prefix(checkpoint.keys(), params)
        problems = [prefix, *problems] if prefix else problems
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FormatError(f"{where}: {'; '.join(problems[:5])}{more}")
    stored_keys = [keys[name] for name in params]
    checkpoint.require_floats(stored_keys if head is None else [*stored_keys, head])
    owners = half_weight_owners(model).values() if stored else ()
    can_be_half = {module.weight for module in owners}
    halves = {}
    for name, p in params.items():
        key = keys[name]
        half_kind = STORED.get(checkpoint.dtype(key))
        if half_kind is not None and p in can_be_half:
            codes = to_file_layout(kind, name, checkpoint.read_bits(key))
            halves[p] = Half(half_kind, codes)
        else:
            p.data = to_file_layout(kind, name, checkpoint.read(key, dtype=p.dtype))
    store_half_weights(model, halves)


# ---- saving -------------------------------------------------------------------------------------


def save_model(model: Any, directory: str | Path) -> None:
    """Write model.safetensors and config.json, each whole or not at all.

    Layers of codes are written as bitsandbytes' tensors, weights in 16 bits as they are. Beside an
    embedding in 16 bits, vectors (norms and biases) are written in its format if that holds them
    exactly, as it does for those that came from such a file. ConfigError, before anything is
    written, for quantised layers that bitsandbytes cannot store.
    """
    table = model.get_input_embeddings().weight
    half_kind = table.quantized.kind if isinstance(table, HalfWeight) else None
    config = model.config.to_dict(half_kind or str(table.dtype))
    quantization = quantization_config(model)
    if quantization is not None:
        config["quantization_config"] = quantization
    layers = quantized_layers(model)
    entries = {}
    for name, p in model.named_parameters():
        path = name.removesuffix(".weight")
        if path in layers:
            for key, array in write_bitsandbytes(layers[path]).items():  # the bias, too
                entries[f"{path}.{key}"] = array_entry(f"{path}.{key}", array)
            continue
        half = _as_half(p, half_kind)
        array = p.numpy() if half is None else p.backend.to_numpy(half.codes)
        entry = array_entry(name, to_file_layout(model.config.model_type, name, array))
        if half is not None:
            entry = dataclasses.replace(entry, dtype=NAMES[half.kind])
        entries[name] = entry
    write_checkpoint(directory, config, entries.values())


def _as_half(p: Parameter, kind: str | None) -> Half | None:
    """The parameter in 16 bits; None if it is stored in floats.

    A vector becomes `kind` only if that rounds none of its values.
    """
    if isinstance(p, HalfWeight):
        return p.quantized
    if kind is None or p.ndim != 1:
        return None
    values = p.numpy()
    half = encode_half(values, kind)
    return half if np.array_equal(half.decode(values.dtype), values) else None
