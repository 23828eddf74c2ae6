"""Weights of four bits as bitsandbytes stores them, and what transformers says of them in config.json.

    q_proj.weight                                  uint8 (bytes, 1), two codes to a byte
    q_proj.weight.absmax                           float32 (blocks,), or uint8 with double quantisation
    q_proj.weight.quant_map                        float32 (16,), the levels
    q_proj.weight.nested_absmax, nested_quant_map  float32 (ceil(blocks / 256),) and (256,), of a quantised absmax
    q_proj.weight.quant_state.bitsandbytes__nf4    JSON in uint8: kind, shape, block size, dtype, offset

One layer: read_bitsandbytes, write_bitsandbytes. A model's config.json: read_quantization_config, quantization_config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError
from ..formats.disk import parse_json
from ..nn import Linear, Module, Parameter
from .codes import ABSMAX_BLOCK, BLOCK_SIZES, LEVELS, Quantized
from .linear import QuantizedLinear

STORED = ("nf4", "fp4")  # the kinds that have such a form

# ---- one layer -------------------------------------------------------------------------------------------------------

_STATE = "weight.quant_state.bitsandbytes__"  # and the kind: JSON as uint8
_DTYPES = {
    "float32": "float32",
    "float64": "float64",
    "float16": "float16",
    "bfloat16": "float32",
}  # NumPy has no last


def write_bitsandbytes(layer: QuantizedLinear) -> dict[str, np.ndarray]:
    """The layer as the tensors that bitsandbytes keeps of it, by their keys after the layer's path; `bias` if any.

    ConfigError for a kind that has no such form: int8.
    """
    held, host = layer.weight.quantized, layer.backend.to_numpy
    if held.kind not in STORED:
        raise ConfigError(f"bitsandbytes stores nf4 and fp4 in this form, not {held.kind}")
    tensors = {
        "weight": host(held.codes).reshape(-1, 1),
        "weight.quant_map": LEVELS[held.kind].copy(),
    }
    state: dict[str, Any] = {
        "quant_type": held.kind,
        "blocksize": held.block_size,
        "dtype": str(layer.dtype),
    }
    state["shape"] = list(held.shape)
    if held.double_quant:
        nested = held.absmax
        tensors["weight.absmax"] = host(nested.codes)
        tensors["weight.nested_absmax"] = host(nested.absmax)
        tensors["weight.nested_quant_map"] = LEVELS["dynamic"].copy()
        state |= {
            "nested_blocksize": nested.block_size,
            "nested_dtype": "float32",
            "nested_offset": held.offset,
        }
    else:
        tensors["weight.absmax"] = host(held.absmax)
    tensors[_STATE + held.kind] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    if layer.bias is not None:
        tensors["bias"] = layer.bias.numpy()
    return tensors


def read_bitsandbytes(tensors: Mapping[str, np.ndarray], where: str = "layer") -> QuantizedLinear:
    """The layer that these tensors describe, by their keys after its path, on the host; bfloat16 becomes float32.

    FormatError, which begins with `where`, for anything that is missing, left over, or not as bitsandbytes writes it.
    """

    def fail(what: str) -> FormatError:
        return FormatError(f"{where}: {what}")

    keys = [key for key in tensors if key.startswith(_STATE)]
    kind = keys[0].removeprefix(_STATE) if len(keys) == 1 else ""
    if kind not in STORED:
        raise fail(f"expected one {_STATE}nf4 or fp4, found {', '.join(keys) or 'none'}")
    nested = "weight.nested_absmax" in tensors
    expected = {"weight", "weight.absmax", "weight.quant_map", keys[0]}
    expected |= {"weight.nested_absmax", "weight.nested_quant_map"} if nested else set()
    for problem, some in (
        ("missing", expected - set(tensors)),
        ("unknown", set(tensors) - expected - {"bias"}),
    ):
        if some:
            raise fail(f"{problem} {', '.join(sorted(some))}")

    def array(key: str, dtype: type, *shape: int) -> np.ndarray:
        found = tensors[key]
        if not isinstance(found, np.ndarray) or found.dtype != dtype or found.shape != shape:
            there = f"{getattr(found, 'dtype', type(found).__name__)} {getattr(found, 'shape', '')}"
            raise fail(f"{key} must be {np.dtype(dtype)} {shape}, it is {there}")
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise fail(f"{key} is not finite")
        return found

    raw = tensors[keys[0]]
    data = array(keys[0], np.uint8, raw.size if isinstance(raw, np.ndarray) else 0)
    state = _read_state(data.tobytes(), kind, nested, where)
    (out, inside), block_size = state["shape"], state["blocksize"]
    count = -(-out * inside // block_size)
    codes = array("weight", np.uint8, -(-out * inside // 2), 1).reshape(-1)
    for key, name in (
        ("weight.quant_map", kind),
        *([("weight.nested_quant_map", "dynamic")] if nested else []),
    ):
        if (
            np.abs(array(key, np.float32, len(LEVELS[name])) - LEVELS[name]).max() > 2.0**-23
        ):  # its last bit may differ
            raise fail(f"{key} is not the map of {name}")
    scales = "weight.nested_absmax" if nested else "weight.absmax"
    absmax = array(scales, np.float32, -(-count // ABSMAX_BLOCK) if nested else count)
    if (absmax < 0).any():
        raise fail(f"{scales} is negative")
    held: Any = absmax
    if nested:
        held = Quantized(
            "dynamic", (count,), ABSMAX_BLOCK, array("weight.absmax", np.uint8, count), absmax
        )
    quantized = Quantized(
        kind, (out, inside), block_size, codes, held, state.get("nested_offset", 0.0)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(quantized.decode(_DTYPES[state["dtype"]])).all():
            raise fail("the weights it describes are not finite")
    bias = tensors.get("bias")
    if bias is not None and (not isinstance(bias, np.ndarray) or bias.dtype.kind != "f"):
        raise fail("bias must be an array of floats")
    bias = None if bias is None else array("bias", bias.dtype.type, out)
    dtype = np.dtype(_DTYPES[state["dtype"]])
    return QuantizedLinear(
        quantized, None if bias is None else Parameter(bias.astype(dtype)), dtype
    )


def _read_state(data: bytes, kind: str, nested: bool, where: str) -> dict[str, Any]:
    """The JSON beside the tensors: what it must hold, and what each value may be."""

    def length(value: Any) -> bool:
        return type(value) is int and value > 0  # True would compare like 1

    may_be: dict[str, tuple[Callable[[Any], bool], str]] = {
        "quant_type": (lambda v: v == kind, kind),
        "blocksize": (
            lambda v: type(v) is int and v in BLOCK_SIZES,
            "a power of two from 32 to 4096",
        ),
        "dtype": (lambda v: type(v) is str and v in _DTYPES, ", ".join(_DTYPES)),
        "shape": (lambda v: type(v) is list and len(v) == 2 and all(map(length, v)), "two lengths"),
    }
    if nested:
        may_be["nested_blocksize"] = (
            lambda v: type(v) is int and v == ABSMAX_BLOCK,
            str(ABSMAX_BLOCK),
        )
        may_be["nested_dtype"] = (lambda v: v == "float32", "float32")
        may_be["nested_offset"] = (
            lambda v: type(v) is float and abs(v) < 2**128 - 2**103 and float(np.float32(v)) == v,
            "a float32",
        )
    state = parse_json(data, f"{where}: {_STATE + kind}")
    if state.keys() != may_be.keys():
        raise FormatError(
            f"{where}: {_STATE + kind} must hold {', '.join(may_be)}, it holds {', '.join(state)}"
        )
    for name, (good, valid) in may_be.items():
        if not good(state[name]):
            raise FormatError(f"{where}: {name} must be {valid}, it is {state[name]!r:.99}")
    return state


# ---- a model's config.json ------------------------------------------------------------------------------------------


class QuantizationScheme(NamedTuple):
    """How every quantised layer of a checkpoint is held."""

    kind: str
    double_quant: bool

    @classmethod
    def of(cls, layer: QuantizedLinear) -> QuantizationScheme:
        return cls(layer.weight.quantized.kind, layer.weight.quantized.double_quant)

    def __str__(self) -> str:
        return f"{self.kind} with double quantisation" if self.double_quant else self.kind


def read_quantization_config(fields: Any) -> QuantizationScheme:
    """What a quantization_config says, whose defaults are transformers'.

    Which layers are skipped is not asked for here: their own tensors say it. ConfigError for another method than
    bitsandbytes, another width than four bits, and values that this one cannot have.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"config: quantization_config must be an object, got {fields!r:.99}")
    may_be = {
        "quant_method": ("bitsandbytes", ("bitsandbytes",)),
        "load_in_8bit": (False, (False,)),
        "load_in_4bit": (False, (True,)),
        "bnb_4bit_quant_type": ("fp4", STORED),
        "bnb_4bit_use_double_quant": (False, (False, True)),
        "bnb_4bit_quant_storage": ("uint8", ("uint8",)),
    }
    found = {name: fields.get(name, default) for name, (default, _) in may_be.items()}
    for name, (_, valid) in may_be.items():
        if not any(
            type(found[name]) is type(v) and found[name] == v for v in valid
        ):  # 1 would compare like True
            wanted = " or ".join(json.dumps(v) for v in valid)
            only = "only the 4 bits of bitsandbytes are read, nf4 and fp4"
            raise ConfigError(
                f"config: quantization_config.{name} must be {wanted}, got {found[name]!r:.99}; {only}"
            )
    return QuantizationScheme(found["bnb_4bit_quant_type"], found["bnb_4bit_use_double_quant"])


def quantization_config(model: Module) -> dict[str, Any] | None:
    """What transformers writes of a model's quantised layers; None where there are none.

    ConfigError for layers that have no such form, int8, and for layers of two kinds, which it cannot say.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        return None
    ways: dict[QuantizationScheme, str] = {}  # and the first layer that is held so
    for path, layer in layers.items():
        ways.setdefault(QuantizationScheme.of(layer), path)
    for way, path in ways.items():
        if way.kind not in STORED:
            raise ConfigError(
                f"{path} is {way.kind}: only {' and '.join(STORED)} are stored as codes; dequantize first"
            )
    if len(ways) > 1:
        told = ", ".join(f"{path} is {way}" for way, path in ways.items())
        raise ConfigError(f"a model is stored in one way, and here {told}; dequantize first")
    (way,) = ways
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": way.kind,
        "bnb_4bit_use_double_quant": way.double_quant,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(next(iter(layers.values())).dtype),
        "llm_int8_skip_modules": [
            path for path, m in model.named_modules() if isinstance(m, Linear)
        ],
    }
