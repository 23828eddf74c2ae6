"""bitsandbytes' stored tensors: its codes, read and written byte for byte; and what of a stranger's is refused.

u = 2^-24 is float32's unit roundoff.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bitsandbytes_golden import CASES, FILE, weight
from hypothesis import given
from hypothesis import strategies as st
from small import base
from test_quant import U, linear

from minilora.errors import ConfigError, FormatError
from minilora.formats import load_file
from minilora.quant import BLOCK_SIZES, LEVELS, QuantizedLinear, encode, quantize
from minilora.quant.bitsandbytes import (
    QuantizationScheme,
    quantization_config,
    read_bitsandbytes,
    read_quantization_config,
    write_bitsandbytes,
)


def stored(name: str) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """A case's tensors as bitsandbytes stores them, and what it decodes them to."""
    tensors = {
        k.removeprefix(name + "."): v
        for k, v in load_file(FILE).items()
        if k.startswith(name + ".")
    }
    return tensors, tensors.pop("decoded", None)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_absmax_have_the_bits_of_bitsandbytes(name: str) -> None:
    case, (tensors, decoded) = CASES[name], stored(name)
    own = encode(weight(name), case.kind, case.block_size, case.double_quant)
    assert np.array_equal(own.codes, tensors["weight"].reshape(-1))
    theirs = read_bitsandbytes(tensors).weight.quantized
    if decoded is not None:
        assert np.array_equal(theirs.decode(), decoded)
    if not case.double_quant:
        assert own.absmax.tobytes() == tensors["weight.absmax"].tobytes()
        return
    # The mean is summed in float32 there. And their CPU kernel finds the nearest of 256 levels by a table that is
    # too coarse for one code in a thousand: where codes differ, ours must be the nearer.
    assert abs(own.offset - theirs.offset) <= 4 * U * theirs.offset
    exact = encode(weight(name), case.kind, case.block_size).absmax - np.float32(theirs.offset)
    values = np.concatenate(
        [part / np.abs(part).max() for part in np.split(exact, range(256, exact.size, 256))]
    )
    differ = own.absmax.codes != theirs.absmax.codes
    assert differ.sum() <= 1
    away = [np.abs(values - LEVELS["dynamic"][held.absmax.codes]) for held in (own, theirs)]
    assert (away[0][differ] < away[1][differ]).all()
    assert np.abs(own.absmax.absmax - theirs.absmax.absmax).max() <= 4 * U * theirs.offset


@pytest.mark.parametrize("name", CASES)
def test_what_bitsandbytes_stored_is_written_byte_for_byte(name: str) -> None:
    tensors, _ = stored(name)
    written = write_bitsandbytes(read_bitsandbytes(tensors))
    assert written.keys() == tensors.keys()
    for key, array in written.items():
        assert (array.dtype, array.shape) == (tensors[key].dtype, tensors[key].shape), key
        assert array.tobytes() == tensors[key].tobytes(), key


# ---- stored tensors -------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(BLOCK_SIZES[:3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["float32", "float64", "float16"]),
)
def test_a_layer_is_read_as_it_was_written(
    out: int, inside: int, kind: str, block_size: int, double_quant: bool, bias: bool, dtype: str
) -> None:
    layer = QuantizedLinear.from_linear(
        linear(out, inside, bias=bias, dtype=dtype), kind, block_size, double_quant
    )
    tensors = write_bitsandbytes(layer)
    again = read_bitsandbytes(tensors)
    assert again.dtype == layer.dtype
    assert again.dense_weight().tobytes() == layer.dense_weight().tobytes()
    assert again.nbytes == layer.nbytes
    assert (again.bias is None) == (layer.bias is None)
    assert again.bias is None or np.array_equal(again.bias.data, layer.bias.data)
    assert {k: v.tobytes() for k, v in write_bitsandbytes(again).items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }


def test_bfloat16_is_computed_in_float32() -> None:
    layer = read_bitsandbytes(changed({"state": {"dtype": "bfloat16"}}))
    assert layer.dtype == np.float32


def test_int8_has_no_such_form() -> None:
    with pytest.raises(ConfigError, match="not int8"):
        write_bitsandbytes(QuantizedLinear.from_linear(linear(), "int8"))


STATE = "weight.quant_state.bitsandbytes__nf4"


def changed(changes: dict[str, Any], double_quant: bool = True) -> dict[str, Any]:
    """A good layer's tensors with some replaced, or left out (None); "state" changes fields of the JSON."""
    tensors: dict[str, Any] = write_bitsandbytes(
        QuantizedLinear.from_linear(linear(), double_quant=double_quant)
    )
    for key, value in changes.items():
        if key == "state":
            state = json.loads(tensors[STATE].tobytes())
            state = {k: v for k, v in {**state, **value}.items() if v is not None}
            tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        elif value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key]) if callable(value) else value
    return tensors


def _with(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[place] = value
        return array

    return put


HOSTILE: dict[str, tuple[dict[str, Any], bool, str]] = {
    **{f"no {key}": ({key: None}, True, f"missing {key}") for key in (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_quant_map")},
    "no state": ({STATE: None}, True, "found none"),
    "no nested absmax": ({"weight.nested_absmax": None}, True, "unknown weight.nested_quant_map"),
    "nested beside plain": ({"weight.nested_absmax": np.ones(1, np.float32)}, False, "missing weight.nested_quant_map"),
    "another": ({"weight.offset": np.zeros(1)}, True, "unknown weight.offset"),
    "two states": ({"weight.quant_state.bitsandbytes__fp4": np.zeros(2, np.uint8)}, True, "expected one"),
    "another kind's state": ({STATE: None, STATE + "x": np.zeros(2, np.uint8)}, True, "expected one"),
    "state of floats": ({STATE: np.zeros(9)}, True, "must be uint8"),
    "state of two axes": ({STATE: lambda a: a[None]}, True, "must be uint8"),
    "state no array": ({STATE: b"{}"}, True, "must be uint8 .* it is bytes"),
    "state no JSON": ({STATE: lambda a: a[:-1]}, True, "not valid JSON"),
    "state no object": ({STATE: np.frombuffer(b"[]", np.uint8)}, True, "expected a JSON object"),
    "field missing": ({"state": {"dtype": None}}, True, "must hold quant_type, .* it holds"),
    "field unknown": ({"state": {"extra": 1}}, True, "it holds"),
    "nested fields alone": ({"state": {"nested_offset": 1.0}}, False, "it holds"),
    "kind": ({"state": {"quant_type": "fp4"}}, True, "quant_type must be nf4"),
    "block": ({"state": {"blocksize": 48}}, True, "blocksize must be a power of two"),
    "block True": ({"state": {"blocksize": True}}, True, "blocksize must be"),
    "block text": ({"state": {"blocksize": "64"}}, True, "blocksize must be"),
    "block list": ({"state": {"blocksize": [64]}}, True, "blocksize must be"),
    "other block": ({"state": {"blocksize": 128}}, True, "weight.absmax must be uint8"),
    "dtype": ({"state": {"dtype": "int8"}}, True, "dtype must be float32, float64, float16, bfloat16"),
    "dtype list": ({"state": {"dtype": []}}, True, "dtype must be"),
    "shape short": ({"state": {"shape": [480]}}, True, "shape must be two lengths"),
    "shape zero": ({"state": {"shape": [0, 480]}}, True, "shape must be"),
    "shape negative": ({"state": {"shape": [-24, -20]}}, True, "shape must be"),
    "shape True": ({"state": {"shape": [True, 480]}}, True, "shape must be"),
    "shape float": ({"state": {"shape": [24.0, 20]}}, True, "shape must be"),
    "shape no list": ({"state": {"shape": "ab"}}, True, "shape must be"),
    "shape huge": ({"state": {"shape": [10**15, 10**15]}}, True, "weight must be uint8"),
    "shape other": ({"state": {"shape": [24, 22]}}, True, "weight must be uint8"),
    "nested block": ({"state": {"nested_blocksize": 128}}, True, "nested_blocksize must be 256"),
    "nested block float": ({"state": {"nested_blocksize": 256.0}}, True, "nested_blocksize"),
    "nested dtype": ({"state": {"nested_dtype": "float16"}}, True, "nested_dtype must be float32"),
    "offset int": ({"state": {"nested_offset": 1}}, True, "nested_offset must be a float32"),
    "offset wide": ({"state": {"nested_offset": 0.1}}, True, "nested_offset must be a float32"),
    "offset huge": ({"state": {"nested_offset": 1e300}}, True, "nested_offset must be a float32"),
    "offset near": ({"state": {"nested_offset": 2.0**128 - 2.0**103}}, True, "nested_offset must be a float32"),
    "weight flat": ({"weight": lambda a: a.reshape(-1)}, True, r"weight must be uint8 \(240, 1\)"),
    "weight signed": ({"weight": lambda a: a.view(np.int8)}, True, "it is int8"),
    "weight short": ({"weight": lambda a: a[:-1]}, True, r"it is uint8 \(239, 1\)"),
    "weight no array": ({"weight": "codes"}, True, "it is str"),
    "absmax float64": ({"weight.absmax": lambda a: a.astype(float)}, False, "weight.absmax must be float32"),
    "absmax long": ({"weight.absmax": lambda a: np.resize(a, 9)}, False, r"must be float32 \(8,\)"),
    "absmax NaN": ({"weight.absmax": _with(2, np.nan)}, False, "weight.absmax is not finite"),
    "absmax negative": ({"weight.absmax": _with(2, -1)}, False, "weight.absmax is negative"),
    "absmax codes": ({"weight.absmax": lambda a: a.astype(np.float32)}, True, "weight.absmax must be uint8"),
    "scale inf": ({"weight.nested_absmax": _with(0, np.inf)}, True, "weight.nested_absmax is not finite"),
    "scale negative": ({"weight.nested_absmax": _with(0, -1)}, True, "weight.nested_absmax is negative"),
    "scale long": ({"weight.nested_absmax": np.ones(2, np.float32)}, True, "weight.nested_absmax must be"),
    "map": ({"weight.quant_map": _with(3, 0.5)}, True, "weight.quant_map is not the map of nf4"),
    "map of another": ({"weight.quant_map": LEVELS["fp4"]}, True, "is not the map of nf4"),
    "map NaN": ({"weight.quant_map": _with(3, np.nan)}, True, "weight.quant_map is not finite"),
    "map short": ({"weight.quant_map": lambda a: a[:15]}, True, "weight.quant_map must be"),
    "nested map": ({"weight.nested_quant_map": lambda a: a[::-1].copy()}, True, "is not the map of dynamic"),
    "overflow": ({"weight.nested_absmax": np.array([3e38], np.float32), "weight.absmax": np.full(8, 255, np.uint8),
                  "state": {"nested_offset": 2.0**127}}, True, "weights it describes are not finite"),
    "bias long": ({"bias": np.zeros(25, np.float32)}, True, r"bias must be float32 \(24,\)"),
    "bias integers": ({"bias": np.zeros(24, int)}, True, "bias must be an array of floats"),
    "bias text": ({"bias": "none"}, True, "bias must be an array of floats"),
    "bias NaN": ({"bias": np.full(24, np.nan)}, True, "bias is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_field_that_is_not_as_it_must_be_is_named(case: str) -> None:
    changes, double_quant, message = HOSTILE[case]
    with pytest.raises(FormatError, match=f"^model.q_proj: .*{message}"):
        read_bitsandbytes(changed(changes, double_quant), where="model.q_proj")


def test_a_map_may_differ_in_its_last_bit() -> None:
    moved = changed({"weight.nested_quant_map": lambda a: np.nextafter(a, np.float32(2))})
    assert (
        read_bitsandbytes(moved).dense_weight().tobytes()
        == read_bitsandbytes(changed({})).dense_weight().tobytes()
    )


@given(st.data())
def test_bytes_at_random_are_a_layer_or_an_error(data: st.DataObject) -> None:
    tensors = changed({}, data.draw(st.booleans()))
    key = data.draw(st.sampled_from(sorted(tensors)))
    raw = bytearray(tensors[key].tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    tensors[key] = np.frombuffer(bytes(raw), tensors[key].dtype).reshape(tensors[key].shape)
    try:
        layer = read_bitsandbytes(tensors)
    except FormatError:
        return
    assert np.isfinite(layer.dense_weight()).all()


# ---- a model's config.json ------------------------------------------------------------------------------------------

GOOD = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("fields", "way"),
    [
        (GOOD, QuantizationScheme("nf4", False)),
        ({**GOOD, "bnb_4bit_use_double_quant": True}, QuantizationScheme("nf4", True)),
        (
            {
                **GOOD,
                "llm_int8_threshold": 6.0,
                "bnb_4bit_compute_dtype": "bfloat16",
                "unknown": [1],
            },
            QuantizationScheme("nf4", False),
        ),
        ({"load_in_4bit": True}, QuantizationScheme("fp4", False)),  # BitsAndBytesConfig's defaults
    ],
)
def test_what_a_quantization_config_says(fields: dict[str, Any], way: QuantizationScheme) -> None:
    assert read_quantization_config(fields) == way


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "gptq"},
            "got 'gptq'; only the 4 bits of bitsandbytes are read",
        ),
        ({"quant_method": "awq"}, "got 'awq'"),
        ({"quant_method": ["bitsandbytes"]}, "quant_method must be"),
        (
            {"load_in_8bit": True, "load_in_4bit": False},
            "load_in_8bit must be false, got True; .* nf4 and fp4",
        ),
        ({"load_in_4bit": False}, "load_in_4bit must be true"),
        ({"load_in_4bit": 1}, "load_in_4bit must be true, got 1"),
        (
            {"bnb_4bit_quant_type": "int4"},
            'bnb_4bit_quant_type must be "nf4" or "fp4", got \'int4\'',
        ),
        ({"bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant must be false or true"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, 'bnb_4bit_quant_storage must be "uint8"'),
    ],
)
def test_another_quantisation_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config: quantization_config.*{message}"):
        read_quantization_config({**GOOD, **changes})
    with pytest.raises(ConfigError, match="quantization_config must be an object"):
        read_quantization_config(["bitsandbytes"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_says_how_it_is_held(kind: str, double_quant: bool) -> None:
    skip = ["lm_head", "layers.1.mlp.up_proj"]
    said = quantization_config(quantize(base(), kind, double_quant=double_quant, skip=skip))
    assert said is not None
    assert read_quantization_config(said) == QuantizationScheme(kind, double_quant)
    assert said["llm_int8_skip_modules"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    assert quantization_config(base()) is None


def test_what_has_no_such_form_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"layers\.0\.self_attn\.q_proj is int8: only nf4 and fp4 .* dequantize"
    ):
        quantization_config(quantize(base(), "int8"))
    mixed = quantize(base())
    mlp = mixed.model.layers[1].mlp
    mlp.up_proj = QuantizedLinear.from_linear(
        base().model.layers[1].mlp.up_proj, "fp4", double_quant=False
    )
    with pytest.raises(
        ConfigError, match=r"q_proj is nf4 with double quantisation, .*up_proj is fp4; dequantize"
    ):
        quantization_config(mixed)
