"""A base model <-> its folder: config.json and what the tensors beside it are, checked whole before any is used.

A folder may hold linear layers as bitsandbytes' codes, which its quantization_config announces: they are read as
`QuantizedLinear`, and written as they were. Nothing here knows what a model computes: it has a config, and parameters
with names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .architecture import TransformerConfig
from .bitsandbytes import Way, quantization_config, read_bitsandbytes, read_quantization_config, write_bitsandbytes
from .errors import FormatError
from .formats import Checkpoint, read_checkpoint, write_checkpoint
from .nn import Linear, replace_module
from .quant import QuantizedLinear


def load_model(make: Callable[..., Any], directory: str | Path, dtype: Any) -> Any:
    """make(config, seed=None, dtype=dtype), with the tensors of a folder put in, one by one, on the host.

    FormatError lists every tensor that is missing, unknown, or of another shape than config.json says; it names a layer
    of codes that is damaged, or of another kind than quantization_config says. ConfigError where that is not supported.
    """
    raw, checkpoint = read_checkpoint(directory)
    with checkpoint:
        config = TransformerConfig.from_dict(raw)
        said = raw.get("quantization_config")
        way = None if said is None else read_quantization_config(said)
        stored = sum(math.prod(checkpoint.shape(key)) for key in checkpoint.keys())  # noqa: SIM118
        if config.parameter_count() > 2 * stored:  # seen before memory is asked for; a byte of codes is two weights
            described = f"{config.parameter_count():,} parameters"
            raise FormatError(f"{directory}: config.json describes {described}, the file holds {stored:,}")
        model = make(config, seed=None, dtype=dtype)
        coded = {} if way is None else _coded(model, checkpoint)
        if way is not None and not coded:
            raise FormatError(f"{directory}: quantization_config says {way}, but no linear layer is stored so")
        _fill(model, checkpoint, set(checkpoint.keys()).difference(*coded.values()), set(coded), str(directory))
        modules: dict[str, Any] = dict(model.named_modules())
        for path, keys in coded.items():
            where, dense = f"{directory}: {path}", modules[path]
            layer = read_bitsandbytes({key.removeprefix(f"{path}."): checkpoint.read(key) for key in keys}, where)
            if layer.weight.shape != dense.weight.shape:
                raise FormatError(f"{where} is {layer.weight.shape}, config.json says {dense.weight.shape}")
            if Way.of(layer) != way:
                raise FormatError(f"{where} is {Way.of(layer)}, quantization_config says {way}")
            layer.bias = dense.bias
            replace_module(model, path, layer.to(dtype=dtype))
    return model


def _coded(model: Any, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The linear layers that the file has more of than a weight, `....weight.absmax`: their keys there, by path."""
    keys: dict[str, list[str]] = {}
    for key in checkpoint.keys():  # noqa: SIM118
        keys.setdefault(key.partition(".weight")[0], []).append(key)
    embedding = model.get_input_embeddings().weight  # a tied head is no layer of its own
    linear = [path for path, m in model.named_modules() if isinstance(m, Linear) and m.weight is not embedding]
    return {path: keys[path] for path in linear if any(key.startswith(f"{path}.weight.") for key in keys.get(path, ()))}


def _fill(model: Any, checkpoint: Checkpoint, keys: set[str], coded: set[str], where: str) -> None:
    """Give each parameter of `model` the tensor of its name among `keys`, but for the weights of the layers `coded`."""
    own = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in coded}
    tied = {"lm_head.weight"} & keys if model.config.tie_word_embeddings else set()
    wrong = [f"missing {k}" for k in own if k not in keys]
    wrong += [f"unknown {k}" for k in sorted(keys - set(own) - tied) if not k.endswith("rotary_emb.inv_freq")]
    wrong += [
        f"{k} is {checkpoint.shape(k)}, config.json says {p.shape}"
        for k, p in own.items()
        if k in keys and checkpoint.shape(k) != p.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise FormatError(f"{where}: {'; '.join(wrong[:5])}{more}"[:500])
    for key, p in own.items():
        p.data = checkpoint.read(key, dtype=p.dtype)
    for key in tied:
        embedding = model.get_input_embeddings().weight
        if not np.array_equal(checkpoint.read(key, dtype=embedding.dtype), embedding.data, equal_nan=True):
            raise FormatError(f"{where}: tie_word_embeddings is true, but {key} differs from the embedding")


def save_model(model: Any, directory: str | Path) -> None:
    """Write model.safetensors and config.json, each whole or not at all; layers of codes as bitsandbytes' tensors.

    ConfigError, before anything is written, for quantised layers that have no such form.
    """
    config = model.config.to_dict(str(model.get_input_embeddings().weight.dtype))
    said = quantization_config(model)
    if said is not None:
        config["quantization_config"] = said
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    tensors = {}
    for name, p in model.named_parameters():
        path = name.removesuffix(".weight")
        own = write_bitsandbytes(layers[path]) if path in layers else None
        tensors.update({name: p.numpy()} if own is None else {f"{path}.{key}": array for key, array in own.items()})
    write_checkpoint(directory, config, tensors)
