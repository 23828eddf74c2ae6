"""A base model <-> its folder: config.json and what the tensors beside it are, checked whole before any is used.

A folder may hold linear layers as bitsandbytes' codes, which its quantization_config announces: they are read as
`QuantizedLinear`, and written as they were. Weights in sixteen bits become float32, or are held as they are stored
(halves.py). Nothing here knows what a model computes: it has a config, and parameters with names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..formats import Checkpoint, Entry, array_entry, read_checkpoint, write_checkpoint
from ..formats.checkpoint import BUFFERS, is_stored_transposed, to_file_layout
from ..nn import Linear, replace_module
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
from ..quant.linear import QuantizedLinear
from .config import TransformerConfig


def load_model(
    make: Callable[..., Any], directory: str | Path, dtype: Any, stored: bool = False
) -> Any:
    """make(config, seed=None, dtype=dtype), with the tensors of a folder put in, one by one, on the host.

    stored   hold the weights of linear layers and embeddings in sixteen bits where the files do

    FormatError lists every tensor that is missing, unknown, or of another shape than config.json says; it names a layer
    of codes that is damaged, or of another kind than quantization_config says. ConfigError where that is not supported.
    """
    raw, checkpoint = read_checkpoint(directory)
    with checkpoint:
        config = TransformerConfig.from_dict(raw)
        said = raw.get("quantization_config")
        way = None if said is None else read_quantization_config(said)
        there = sum(math.prod(checkpoint.shape(key)) for key in checkpoint.keys())
        if (
            config.parameter_count() > 2 * there
        ):  # seen before memory is asked for; a byte of codes is two weights
            described = f"{config.parameter_count():,} parameters"
            raise FormatError(
                f"{directory}: config.json describes {described}, the file holds {there:,}"
            )
        model = make(config, seed=None, dtype=dtype)
        names = _names(model, checkpoint)
        coded = {} if way is None else _coded(model, names)
        if way is not None and not coded:
            raise FormatError(
                f"{directory}: quantization_config says {way}, but no linear layer is stored so"
            )
        held = {name for of_layer in coded.values() for name in of_layer}
        dense = {name: key for name, key in names.items() if name not in held}
        _fill(model, checkpoint, dense, set(coded), str(directory), stored)
        modules: dict[str, Any] = dict(model.named_modules())
        for path, of_layer in coded.items():
            where, plain = f"{directory}: {path}", modules[path]
            tensors = {
                name.removeprefix(f"{path}."): checkpoint.read(names[name]) for name in of_layer
            }
            layer = read_bitsandbytes(tensors, where)
            if layer.weight.shape != plain.weight.shape:
                raise FormatError(
                    f"{where} is {layer.weight.shape}, config.json says {plain.weight.shape}"
                )
            if QuantizationScheme.of(layer) != way:
                raise FormatError(
                    f"{where} is {QuantizationScheme.of(layer)}, quantization_config says {way}"
                )
            layer.bias = plain.bias
            replace_module(model, path, layer.to(dtype=dtype))
    return model


def _names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The files' keys by their names in the model. Files that were saved without a head have no name of the decoder."""
    keys, prefix = checkpoint.keys(), f"{model.decoder_name}."
    bare = not any(key.startswith(prefix) for key in keys)
    return {prefix + key if bare and not key.startswith("lm_head.") else key: key for key in keys}


def _coded(model: Any, names: dict[str, str]) -> dict[str, list[str]]:
    """The linear layers that the file has more of than a weight, `....weight.absmax`: all their names, by path."""
    keys: dict[str, list[str]] = {}
    for name in names:
        keys.setdefault(name.partition(".weight")[0], []).append(name)
    embedding = model.get_input_embeddings().weight  # a tied head is no layer of its own
    linear = [
        path
        for path, m in model.named_modules()
        if isinstance(m, Linear) and m.weight is not embedding
    ]
    return {
        path: keys[path]
        for path in linear
        if any(key.startswith(f"{path}.weight.") for key in keys.get(path, ()))
    }


def _fill(
    model: Any,
    checkpoint: Checkpoint,
    names: dict[str, str],
    coded: set[str],
    where: str,
    stored: bool,
) -> None:
    """Give each parameter the tensor of its name among `names`, but for the weights of the layers `coded`."""
    kind = model.config.model_type
    own = {
        name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in coded
    }
    tied = {"lm_head.weight"} & set(names) if model.config.tie_word_embeddings else set()
    wrong = [f"missing {name}" for name in own if name not in names]
    unknown = sorted(key for name, key in names.items() if name not in own and name not in tied)
    wrong += [f"unknown {key}" for key in unknown if not key.endswith(BUFFERS)]
    for name, p in own.items():
        said = p.shape[::-1] if is_stored_transposed(kind, name) else p.shape
        if name in names and checkpoint.shape(names[name]) != said:
            wrong.append(
                f"{names[name]} is {checkpoint.shape(names[name])}, config.json says {said}"
            )
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise FormatError(f"{where}: {'; '.join(wrong[:5])}{more}"[:500])
    can_be, halves = {m.weight for m in half_weight_owners(model).values()} if stored else (), {}
    for name, p in own.items():
        key = names[name]
        if p in can_be and checkpoint.dtype(key) in STORED:
            halves[p] = Half(
                STORED[checkpoint.dtype(key)], to_file_layout(kind, name, checkpoint.read_bits(key))
            )
        else:
            p.data = to_file_layout(kind, name, checkpoint.read(key, dtype=p.dtype))
    store_half_weights(model, halves)
    for name in tied:
        embedding = model.get_input_embeddings().weight
        if not np.array_equal(
            checkpoint.read(names[name], dtype=embedding.dtype), embedding.data, equal_nan=True
        ):
            raise FormatError(
                f"{where}: tie_word_embeddings is true, but {names[name]} differs from the embedding"
            )


def save_model(model: Any, directory: str | Path) -> None:
    """Write model.safetensors and config.json, each whole or not at all; layers of codes as bitsandbytes' tensors.

    What is held in sixteen bits is written so. The vectors beside an embedding that is held so, its norms and biases,
    are written in its format where that holds them exactly, as it does those that came from such a file.
    ConfigError, before anything is written, for quantised layers that have no such form.
    """
    table = model.get_input_embeddings().weight
    kind = table.quantized.kind if isinstance(table, HalfWeight) else None
    config = model.config.to_dict(kind or str(table.dtype))
    said = quantization_config(model)
    if said is not None:
        config["quantization_config"] = said
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    entries: dict[str, Entry] = {}
    for name, p in model.named_parameters():
        path = name.removesuffix(".weight")
        if path in layers:
            for key, array in write_bitsandbytes(layers[path]).items():  # the bias, too
                entries[f"{path}.{key}"] = array_entry(f"{path}.{key}", array)
            continue
        if isinstance(p, HalfWeight):
            half: Half | None = p.quantized
        else:
            half = _exactly(p.numpy(), kind) if kind is not None and p.ndim == 1 else None
        array = p.numpy() if half is None else p.backend.to_numpy(half.codes)
        entry = array_entry(name, to_file_layout(model.config.model_type, name, array))
        entries[name] = (
            entry if half is None else dataclasses.replace(entry, dtype=NAMES[half.kind])
        )
    write_checkpoint(directory, config, entries.values())


def _exactly(values: np.ndarray, kind: str) -> Half | None:
    """The values in sixteen bits; None if that would round one."""
    half = encode_half(values, kind)
    return half if np.array_equal(half.decode(values.dtype), values) else None
