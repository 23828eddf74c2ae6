"""bitsandbytes' files: layers of 4-bit codes as tensors, and what config.json says of them.

    q_proj.weight                                uint8 (bytes, 1), two codes per byte
    q_proj.weight.absmax                         float32 (blocks,); uint8 if it is quantised, too
    q_proj.weight.quant_map                      float32 (16,), the levels
    q_proj.weight.nested_absmax                  float32 (ceil(blocks / 256),), of a uint8 absmax
    q_proj.weight.nested_quant_map               float32 (256,), the levels of absmax
    q_proj.weight.quant_state.bitsandbytes__nf4  JSON in uint8: kind, shape, dtype and others

One layer: write_bitsandbytes, read_bitsandbytes.
A model's config.json: read_quantization_config, quantization_config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError, Rule, check_fields, is_integer, one_of
from ..formats.disk import JsonObject, parse_json
from ..nn import Linear, Module, Parameter
from .codes import ABSMAX_BLOCK, BLOCK_SIZES, LEVELS, Quantized
from .linear import QuantizedLinear, quantized_layers

STORED = ("nf4", "fp4")  # the kinds that bitsandbytes stores in this form

# ---- one layer ----------------------------------------------------------------------------------

_STATE = "weight.quant_state.bitsandbytes__"  # the kind follows; JSON as uint8
_DTYPES = {"float32": "float32", "float64": "float64", "float16": "float16"}
_DTYPES["bfloat16"] = "float32"  # which NumPy does not have


def write_bitsandbytes(layer: QuantizedLinear) -> dict[str, np.ndarray]:
    """The layer as the tensors that bitsandbytes stores, by their names after the layer's path.

    `bias` is among them if the layer has one. ConfigError for int8, which has no such form.
    """
    quantized = layer.weight.quantized
    kind = quantized.kind
    absmax = quantized.absmax
    host = layer.backend.to_numpy
    if kind not in STORED:
        raise ConfigError(f"bitsandbytes stores nf4 and fp4 in this form, not {kind}")
    tensors = {
        "weight": host(quantized.codes).reshape(-1, 1),
        "weight.quant_map": LEVELS[kind].copy(),
    }
    state = {"quant_type": kind, "blocksize": quantized.block_size}
    state["dtype"] = str(layer.dtype)
    state["shape"] = list(quantized.shape)
    if quantized.double_quant:
        tensors["weight.absmax"] = host(absmax.codes)
        tensors["weight.nested_absmax"] = host(absmax.absmax)
        tensors["weight.nested_quant_map"] = LEVELS["dynamic"].copy()
        state["nested_blocksize"] = absmax.block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = quantized.offset
    else:
        tensors["weight.absmax"] = host(absmax)
    tensors[_STATE + kind] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    if layer.bias is not None:
        tensors["bias"] = layer.bias.numpy()
    return tensors


def read_bitsandbytes(tensors: Mapping[str, np.ndarray], where: str = "layer") -> QuantizedLinear:
    """The layer that these tensors describe, on the host; bfloat16 becomes float32.

    tensors   by their names after the layer's path

    FormatError, which begins with `where`, for a tensor that is missing, unknown, or not as
    bitsandbytes writes it.
    """

    def fail(what: str) -> FormatError:
        return FormatError(f"{where}: {what}")

    def array(key: str, dtype: type, *shape: int) -> np.ndarray:
        tensor = tensors[key]
        if not isinstance(tensor, np.ndarray) or tensor.dtype != dtype or tensor.shape != shape:
            given = (
                f"{getattr(tensor, 'dtype', type(tensor).__name__)} {getattr(tensor, 'shape', '')}"
            )
            raise fail(f"{key} must be {np.dtype(dtype)} {shape}, it is {given}")
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise fail(f"{key} is not finite")
        return tensor

    def check_map(key: str, kind: str) -> None:
        levels = LEVELS[kind]
        if np.abs(array(key, np.float32, len(levels)) - levels).max() > 2.0**-23:  # one last bit
            raise fail(f"{key} is not the map of {kind}")

    state_key, kind = find_state(tensors, where)
    nested = "weight.nested_absmax" in tensors
    expected = {"weight", "weight.absmax", "weight.quant_map", state_key}
    if nested:
        expected |= {"weight.nested_absmax", "weight.nested_quant_map"}
    missing = expected - set(tensors)
    unknown = set(tensors) - expected - {"bias"}
    if missing or unknown:
        problem = "missing" if missing else "unknown"
        raise fail(f"{problem} {', '.join(sorted(missing or unknown))}")

    raw = tensors[state_key]
    data = array(state_key, np.uint8, raw.size if isinstance(raw, np.ndarray) else 0)
    state = read_state(data.tobytes(), kind, nested, where)
    outputs, inputs = state["shape"]
    size = outputs * inputs
    block_size = state["blocksize"]
    dtype = np.dtype(_DTYPES[state["dtype"]])
    blocks = -(-size // block_size)
    codes = array("weight", np.uint8, -(-size // 2), 1).reshape(-1)
    check_map("weight.quant_map", kind)
    if nested:
        check_map("weight.nested_quant_map", "dynamic")
    scales = "weight.nested_absmax" if nested else "weight.absmax"
    absmax: Any = array(scales, np.float32, -(-blocks // ABSMAX_BLOCK) if nested else blocks)
    if (absmax < 0).any():
        raise fail(f"{scales} is negative")
    if nested:
        absmax_codes = array("weight.absmax", np.uint8, blocks)
        absmax = Quantized("dynamic", (blocks,), ABSMAX_BLOCK, absmax_codes, absmax)
    quantized = Quantized(
        kind, (outputs, inputs), block_size, codes, absmax, state.get("nested_offset", 0.0)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(quantized.decode(dtype)).all():
            raise fail("the weights it describes are not finite")
    if "bias" not in tensors:
        return QuantizedLinear(quantized, None, dtype)
    bias = tensors["bias"]
    if not isinstance(bias, np.ndarray) or bias.dtype.kind != "f":
        raise fail("bias must be an array of floats")
    bias = array("bias", bias.dtype.type, outputs)
    return QuantizedLinear(quantized, Parameter(bias.astype(dtype)), dtype)


def _is_shape(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(map(is_integer(1), value))


def _is_float32(value: Any) -> bool:
    in_range = type(value) is float and abs(value) < 2**128 - 2**103
    return in_range and float(np.float32(value)) == value


def _one_of(field: str, *valid: Any) -> Rule:
    """The rule that a field has one of these values, and its type."""
    return Rule(field, one_of(*valid), " or ".join(map(json.dumps, valid)))


_STATE_RULES = [
    _one_of("blocksize", *BLOCK_SIZES)._replace(wanted="a power of two from 32 to 4096"),
    Rule("dtype", one_of(*_DTYPES), ", ".join(_DTYPES)),
    Rule("shape", _is_shape, "two lengths"),
]
_NESTED_RULES = [
    _one_of("nested_blocksize", ABSMAX_BLOCK),
    _one_of("nested_dtype", "float32"),
    Rule("nested_offset", _is_float32, "a float32"),
]


def find_state(names: Iterable[str], where: str) -> tuple[str, str]:
    """(name, kind) of the JSON object among the tensors of a layer, by their names."""
    states = [name for name in names if name.startswith(_STATE)]
    kind = states[0].removeprefix(_STATE) if len(states) == 1 else ""
    if kind not in STORED:
        raise FormatError(
            f"{where}: expected one {_STATE}nf4 or fp4, found {', '.join(states) or 'none'}"
        )
    return states[0], kind


def read_state(data: bytes, kind: str, nested: bool, where: str) -> JsonObject:
    """The JSON object beside the tensors, its fields and their values checked."""
    rules = [_one_of("quant_type", kind), *_STATE_RULES]
    if nested:
        rules += _NESTED_RULES
    state = parse_json(data, f"{where}: {_STATE + kind}")
    fields = [rule.field for rule in rules]
    if state.keys() != set(fields):
        raise FormatError(
            f"{where}: {_STATE + kind} must hold {', '.join(fields)}, it holds {', '.join(state)}"
        )
    check_fields(state, rules, f"{where}: ", FormatError)
    return state


# ---- a model's config.json ----------------------------------------------------------------------


class QuantizationScheme(NamedTuple):
    """How all quantised layers of a checkpoint are stored."""

    kind: str
    double_quant: bool

    @classmethod
    def of(cls, layer: QuantizedLinear) -> QuantizationScheme:
        return cls(layer.weight.quantized.kind, layer.weight.quantized.double_quant)

    def __str__(self) -> str:
        return f"{self.kind} with double quantisation" if self.double_quant else self.kind


# The fields of quantization_config with their defaults in transformers, and what can be read here.
_DEFAULTS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8",
}
_CONFIG_RULES = [
    _one_of("quant_method", "bitsandbytes"),
    _one_of("load_in_8bit", False),
    _one_of("load_in_4bit", True),
    _one_of("bnb_4bit_quant_type", *STORED),
    _one_of("bnb_4bit_use_double_quant", False, True),
    _one_of("bnb_4bit_quant_storage", "uint8"),
]


def read_quantization_config(fields: Any) -> QuantizationScheme:
    """The scheme that a quantization_config describes.

    Which layers are skipped is not read: their tensors tell. ConfigError for a method other than
    bitsandbytes, a width other than 4 bits, and an invalid value.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"config: quantization_config must be an object, got {fields!r:.99}")
    values = {**_DEFAULTS, **fields}
    for rule in _CONFIG_RULES:
        wanted = f"{rule.wanted} (only bitsandbytes' 4 bits, nf4 and fp4, can be read)"
        check_fields(values, [rule._replace(wanted=wanted)], "config: quantization_config.")
    return QuantizationScheme(values["bnb_4bit_quant_type"], values["bnb_4bit_use_double_quant"])


def quantization_config(model: Module) -> JsonObject | None:
    """The quantization_config that transformers writes for a model; None without quantised layers.

    ConfigError for int8 layers, which have no such form, and for layers of two schemes.
    """
    layers = quantized_layers(model)
    if not layers:
        return None
    schemes: dict[QuantizationScheme, str] = {}  # and the path of the first layer of each
    for path, layer in layers.items():
        schemes.setdefault(QuantizationScheme.of(layer), path)
    for scheme, path in schemes.items():
        if scheme.kind not in STORED:
            raise ConfigError(
                f"{path} is {scheme.kind}: only {' and '.join(STORED)} are stored as codes; "
                "dequantize first"
            )
    if len(schemes) > 1:
        mixture = ", ".join(f"{path} is {scheme}" for scheme, path in schemes.items())
        raise ConfigError(
            f"all quantised layers must have one scheme, but {mixture}; dequantize first"
        )
    (scheme,) = schemes
    dense = [path for path, module in model.named_modules() if isinstance(module, Linear)]
    return {
        **_DEFAULTS,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": scheme.kind,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": str(next(iter(layers.values())).dtype),
        "llm_int8_skip_modules": dense,
    }
