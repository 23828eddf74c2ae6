"""A base model <-> its folder: config.json and what the tensors beside it are, checked whole before any is used.

A folder may hold linear layers as bitsandbytes' codes, which its quantization_config announces: they are read as
`QuantizedLinear`, and written as they were. Nothing here knows what a model computes: it has a config, and parameters
with names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .architecture import TransformerConfig
from .bitsandbytes import Way, quantization_config, read_bitsandbytes, read_quantization_config, write_bitsandbytes
from .errors import FormatError
from .formats import Checkpoint, read_checkpoint, write_checkpoint
from .nn import Linear, Module, replace_module
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
        coded = {} if way is None else _coded(model, checkpoint.keys())
        if way is not None and not coded:
            raise FormatError(f"{directory}: quantization_config says {way}, but no linear layer is stored so")
        keys = {k for k in checkpoint.keys() if k.partition(".weight")[0] not in coded}  # noqa: SIM118
        _fill(model, checkpoint, keys, {f"{path}.weight" for path in coded}, str(directory))
        for path, dense in coded.items():
            layer = _read_layer(checkpoint, path, f"{directory}: {path}")
            if layer.weight.shape != dense.weight.shape:
                shapes = f"{layer.weight.shape}, config.json says {dense.weight.shape}"
                raise FormatError(f"{directory}: {path}.weight is {shapes}")
            if Way.of(layer) != way:
                raise FormatError(f"{directory}: {path} is {Way.of(layer)}, quantization_config says {way}")
            layer.bias = dense.bias
            replace_module(model, path, layer.to(dtype=dtype))
    return model


def _coded(model: Module, keys: Iterable[str]) -> dict[str, Linear]:
    """The linear layers, by path, beside whose weight the file has something of it: `....weight.absmax`."""
    beside = {key.partition(".weight.")[0] for key in keys if ".weight." in key}
    embedding = model.get_input_embeddings().weight  # type: ignore[attr-defined]
    linear = ((path, m) for path, m in model.named_modules() if isinstance(m, Linear) and m.weight is not embedding)
    return {path: m for path, m in linear if path in beside}


def _read_layer(checkpoint: Checkpoint, path: str, where: str) -> QuantizedLinear:
    keys = (key for key in checkpoint.keys() if key.startswith(f"{path}.weight"))  # noqa: SIM118
    return read_bitsandbytes({key.removeprefix(f"{path}."): checkpoint.read(key) for key in keys}, where)


def _fill(model: Any, checkpoint: Checkpoint, keys: set[str], coded: set[str], where: str) -> None:
    """Give each parameter of `model`, but for those in `coded`, the tensor of its name among `keys`."""
    own = {name: p for name, p in model.named_parameters() if name not in coded}
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
