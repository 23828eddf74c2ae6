"""bitsandbytes' files: codes read and written byte for byte, and invalid tensors refused by name.

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
    """A case's tensors as bitsandbytes stores them, and the weight that it decodes from them."""
    prefix = f"{name}."
    tensors = {}
    for key, array in load_file(FILE).items():
        if key.startswith(prefix):
            tensors[key.removeprefix(prefix)] = array
    decoded = tensors.pop("decoded", None)
    return tensors, decoded


def as_bytes(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in tensors.items()}


# ---- what bitsandbytes stored -------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_encode_has_the_bits_of_bitsandbytes(name: str) -> None:
    case = CASES[name]
    tensors, decoded = stored(name)
    ours = encode(weight(name), case.kind, case.block_size, case.double_quant)
    assert np.array_equal(ours.codes, tensors["weight"].reshape(-1))
    theirs = read_bitsandbytes(tensors).weight.quantized
    if decoded is not None:
        assert np.array_equal(theirs.decode(), decoded)
    if not case.double_quant:
        assert ours.absmax.tobytes() == tensors["weight.absmax"].tobytes()
        return
    # bitsandbytes adds up the mean in float32, and its CPU kernel finds the nearest of 256 levels
    # by a table that is too coarse for one code in a thousand: where codes differ, ours must be
    # the nearer.
    bound = 4 * U * theirs.offset
    assert abs(ours.offset - theirs.offset) <= bound
    absmax = encode(weight(name), case.kind, case.block_size).absmax
    exact = absmax - np.float32(theirs.offset)
    parts = np.split(exact, range(256, exact.size, 256))
    values = np.concatenate([part / np.abs(part).max() for part in parts])
    differ = ours.absmax.codes != theirs.absmax.codes
    assert differ.sum() <= 1
    our_distance = np.abs(values - LEVELS["dynamic"][ours.absmax.codes])
    their_distance = np.abs(values - LEVELS["dynamic"][theirs.absmax.codes])
    assert (our_distance[differ] < their_distance[differ]).all()
    assert np.abs(ours.absmax.absmax - theirs.absmax.absmax).max() <= bound


@pytest.mark.parametrize("name", CASES)
def test_write_bitsandbytes_repeats_what_bitsandbytes_stored(name: str) -> None:
    tensors, _ = stored(name)
    written = write_bitsandbytes(read_bitsandbytes(tensors))
    assert written.keys() == tensors.keys()
    for key, array in written.items():
        assert array.dtype == tensors[key].dtype, key
        assert array.shape == tensors[key].shape, key
        assert array.tobytes() == tensors[key].tobytes(), key


# ---- one layer ----------------------------------------------------------------------------------

lengths = st.integers(1, 40)
kinds = st.sampled_from(["nf4", "fp4"])
block_sizes = st.sampled_from(BLOCK_SIZES[:3])
dtypes = st.sampled_from(["float32", "float64", "float16"])


@given(lengths, lengths, kinds, block_sizes, st.booleans(), st.booleans(), dtypes)
def test_read_bitsandbytes_gives_the_layer_that_was_written(
    out: int, inside: int, kind: str, block_size: int, double_quant: bool, bias: bool, dtype: str
) -> None:
    dense = linear(out, inside, bias=bias, dtype=dtype)
    layer = QuantizedLinear.from_linear(dense, kind, block_size, double_quant)
    tensors = write_bitsandbytes(layer)
    again = read_bitsandbytes(tensors)
    assert again.dtype == layer.dtype
    assert again.dense_weight().tobytes() == layer.dense_weight().tobytes()
    assert again.nbytes == layer.nbytes
    assert (again.bias is None) == (layer.bias is None)
    assert again.bias is None or np.array_equal(again.bias.data, layer.bias.data)
    assert as_bytes(write_bitsandbytes(again)) == as_bytes(tensors)


def test_read_bitsandbytes_computes_bfloat16_in_float32() -> None:
    layer = read_bitsandbytes(changed({"state": {"dtype": "bfloat16"}}))
    assert layer.dtype == np.float32


def test_write_bitsandbytes_refuses_int8() -> None:
    layer = QuantizedLinear.from_linear(linear(), "int8")
    with pytest.raises(ConfigError, match="not int8"):
        write_bitsandbytes(layer)


STATE = "weight.quant_state.bitsandbytes__nf4"


def changed(changes: dict[str, Any], double_quant: bool = True) -> dict[str, Any]:
    """A valid layer's tensors, some of them replaced, changed by a function, or left out (None).

    "state" stands for changes to fields of the JSON.
    """
    layer = QuantizedLinear.from_linear(linear(), double_quant=double_quant)
    tensors: dict[str, Any] = write_bitsandbytes(layer)
    for key, value in changes.items():
        if key == "state":
            state = json.loads(tensors[STATE].tobytes()) | value
            state = {k: v for k, v in state.items() if v is not None}
            tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        elif value is None:
            del tensors[key]
        elif callable(value):
            tensors[key] = value(tensors[key])
        else:
            tensors[key] = value
    return tensors


def put(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    """A function that copies an array with one value replaced."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[place] = value
        return array

    return change


# Case -> (changes, double_quant, what the message says).
INVALID: dict[str, tuple[dict[str, Any], bool, str]] = {}


def tensor(case: str, key: str, value: Any, message: str, double_quant: bool = True) -> None:
    INVALID[case] = ({key: value}, double_quant, message)


def field(case: str, name: str, value: Any, message: str, double_quant: bool = True) -> None:
    INVALID[case] = ({"state": {name: value}}, double_quant, message)


ABSMAX = "weight.absmax"
NESTED = "weight.nested_absmax"
MAP = "weight.quant_map"
NESTED_MAP = "weight.nested_quant_map"
FP4_STATE = "weight.quant_state.bitsandbytes__fp4"
ones = np.ones(1, np.float32)
empty_state = np.zeros(2, np.uint8)
for name in ("weight", ABSMAX, MAP, NESTED_MAP):
    tensor(f"no {name}", name, None, f"missing {name}")
tensor("no state", STATE, None, "found none")
tensor("no nested absmax", NESTED, None, "unknown weight.nested_quant_map")
tensor("nested beside plain", NESTED, ones, "missing weight.nested_quant_map", False)
tensor("another", "weight.offset", np.zeros(1), "unknown weight.offset")
tensor("two states", FP4_STATE, empty_state, "expected one")
INVALID["another kind's state"] = ({STATE: None, STATE + "x": empty_state}, True, "expected one")
tensor("state of floats", STATE, np.zeros(9), "must be uint8")
tensor("state of two axes", STATE, lambda a: a[None], "must be uint8")
tensor("state no array", STATE, b"{}", "must be uint8 .* it is bytes")
tensor("state no JSON", STATE, lambda a: a[:-1], "not valid JSON")
tensor("state no object", STATE, np.frombuffer(b"[]", np.uint8), "expected a JSON object")
field("field missing", "dtype", None, "must hold quant_type, .* it holds")
field("field unknown", "extra", 1, "it holds")
field("nested fields alone", "nested_offset", 1.0, "it holds", False)
field("kind", "quant_type", "fp4", 'quant_type must be "nf4"')
field("block", "blocksize", 48, "blocksize must be a power of two")
field("block True", "blocksize", True, "blocksize must be")
field("block text", "blocksize", "64", "blocksize must be")
field("block list", "blocksize", [64], "blocksize must be")
field("other block", "blocksize", 128, "weight.absmax must be uint8")
field("dtype", "dtype", "int8", "dtype must be float32, float64, float16, bfloat16")
field("dtype list", "dtype", [], "dtype must be")
field("shape short", "shape", [480], "shape must be two lengths")
field("shape zero", "shape", [0, 480], "shape must be")
field("shape negative", "shape", [-24, -20], "shape must be")
field("shape True", "shape", [True, 480], "shape must be")
field("shape float", "shape", [24.0, 20], "shape must be")
field("shape no list", "shape", "ab", "shape must be")
field("shape huge", "shape", [10**15, 10**15], "weight must be uint8")
field("shape other", "shape", [24, 22], "weight must be uint8")
field("nested block", "nested_blocksize", 128, "nested_blocksize must be 256")
field("nested block float", "nested_blocksize", 256.0, "nested_blocksize")
field("nested dtype", "nested_dtype", "float16", 'nested_dtype must be "float32"')
field("offset int", "nested_offset", 1, "nested_offset must be a float32")
field("offset wide", "nested_offset", 0.1, "nested_offset must be a float32")
field("offset huge", "nested_offset", 1e300, "nested_offset must be a float32")
field("offset near", "nested_offset", 2.0**128 - 2.0**103, "nested_offset must be a float32")
tensor("weight flat", "weight", lambda a: a.reshape(-1), r"weight must be uint8 \(240, 1\)")
tensor("weight signed", "weight", lambda a: a.view(np.int8), "it is int8")
tensor("weight short", "weight", lambda a: a[:-1], r"it is uint8 \(239, 1\)")
tensor("weight no array", "weight", "codes", "it is str")
tensor("absmax float64", ABSMAX, lambda a: a.astype(float), "absmax must be float32", False)
tensor("absmax long", ABSMAX, lambda a: np.resize(a, 9), r"must be float32 \(8,\)", False)
tensor("absmax NaN", ABSMAX, put(2, np.nan), "weight.absmax is not finite", False)
tensor("absmax negative", ABSMAX, put(2, -1), "weight.absmax is negative", False)
tensor("absmax codes", ABSMAX, lambda a: a.astype(np.float32), "weight.absmax must be uint8")
tensor("scale inf", NESTED, put(0, np.inf), "weight.nested_absmax is not finite")
tensor("scale negative", NESTED, put(0, -1), "weight.nested_absmax is negative")
tensor("scale long", NESTED, np.ones(2, np.float32), "weight.nested_absmax must be")
tensor("map", MAP, put(3, 0.5), "weight.quant_map is not the map of nf4")
tensor("map of another", MAP, LEVELS["fp4"], "is not the map of nf4")
tensor("map NaN", MAP, put(3, np.nan), "weight.quant_map is not finite")
tensor("map short", MAP, lambda a: a[:15], "weight.quant_map must be")
tensor("nested map", NESTED_MAP, lambda a: a[::-1].copy(), "is not the map of dynamic")
overflow: dict[str, Any] = {NESTED: np.array([3e38], np.float32)}
overflow[ABSMAX] = np.full(8, 255, np.uint8)
overflow["state"] = {"nested_offset": 2.0**127}
INVALID["overflow"] = (overflow, True, "weights it describes are not finite")
tensor("bias long", "bias", np.zeros(25, np.float32), r"bias must be float32 \(24,\)")
tensor("bias integers", "bias", np.zeros(24, int), "bias must be an array of floats")
tensor("bias text", "bias", "none", "bias must be an array of floats")
tensor("bias NaN", "bias", np.full(24, np.nan), "bias is not finite")


@pytest.mark.parametrize("case", INVALID)
def test_read_bitsandbytes_names_what_is_invalid(case: str) -> None:
    changes, double_quant, message = INVALID[case]
    tensors = changed(changes, double_quant)
    with pytest.raises(FormatError, match=f"^model.q_proj: .*{message}"):
        read_bitsandbytes(tensors, where="model.q_proj")


def test_read_bitsandbytes_accepts_a_map_that_differs_in_its_last_bit() -> None:
    moved = changed({NESTED_MAP: lambda a: np.nextafter(a, np.float32(2))})
    found = read_bitsandbytes(moved).dense_weight()
    expected = read_bitsandbytes(changed({})).dense_weight()
    assert found.tobytes() == expected.tobytes()


@given(st.data())
def test_read_bitsandbytes_of_random_bytes_gives_a_layer_or_an_error(data: st.DataObject) -> None:
    tensors = changed({}, data.draw(st.booleans()))
    key = data.draw(st.sampled_from(sorted(tensors)))
    array = tensors[key]
    raw = bytearray(array.tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    tensors[key] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    try:
        layer = read_bitsandbytes(tensors)
    except FormatError:
        return
    assert np.isfinite(layer.dense_weight()).all()


# ---- a model's config.json ----------------------------------------------------------------------

GOOD: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GOOD["bnb_4bit_quant_type"] = "nf4"


def test_read_quantization_config_gives_the_scheme() -> None:
    plain = QuantizationScheme("nf4", False)
    assert read_quantization_config(GOOD) == plain
    nested = {**GOOD, "bnb_4bit_use_double_quant": True}
    assert read_quantization_config(nested) == QuantizationScheme("nf4", True)
    more = {"llm_int8_threshold": 6.0, "bnb_4bit_compute_dtype": "bfloat16", "unknown": [1]}
    assert read_quantization_config({**GOOD, **more}) == plain
    # The defaults of BitsAndBytesConfig.
    assert read_quantization_config({"load_in_4bit": True}) == QuantizationScheme("fp4", False)


OTHERS: list[tuple[dict[str, Any], str]] = []


def other(message: str, **changes: Any) -> None:
    OTHERS.append((changes, message))


other("only bitsandbytes' 4 bits.*, got 'gptq'", quant_method="gptq")
other("got 'awq'", quant_method="awq")
other("quant_method must be", quant_method=["bitsandbytes"])
false = "load_in_8bit must be false .*nf4 and fp4.*, got True"
other(false, load_in_8bit=True, load_in_4bit=False)
other("load_in_4bit must be true", load_in_4bit=False)
other("load_in_4bit must be true .*, got 1", load_in_4bit=1)
kind = 'bnb_4bit_quant_type must be "nf4" or "fp4" .*, got \'int4\''
other(kind, bnb_4bit_quant_type="int4")
other("bnb_4bit_use_double_quant must be false or true", bnb_4bit_use_double_quant="yes")
other('bnb_4bit_quant_storage must be "uint8"', bnb_4bit_quant_storage="bfloat16")


@pytest.mark.parametrize(("changes", "message"), OTHERS)
def test_read_quantization_config_refuses_others(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config: quantization_config.*{message}"):
        read_quantization_config({**GOOD, **changes})


def test_read_quantization_config_refuses_what_is_not_an_object() -> None:
    with pytest.raises(ConfigError, match="quantization_config must be an object"):
        read_quantization_config(["bitsandbytes"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantization_config_describes_a_model(kind: str, double_quant: bool) -> None:
    skip = ["lm_head", "layers.1.mlp.up_proj"]
    model = quantize(base(), kind, double_quant=double_quant, skip=skip)
    fields = quantization_config(model)
    assert fields is not None
    assert read_quantization_config(fields) == QuantizationScheme(kind, double_quant)
    assert fields["llm_int8_skip_modules"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    assert quantization_config(base()) is None


def test_quantization_config_refuses_int8_and_two_schemes() -> None:
    int8 = r"layers\.0\.self_attn\.q_proj is int8: only nf4 and fp4 .* dequantize"
    with pytest.raises(ConfigError, match=int8):
        quantization_config(quantize(base(), "int8"))
    mixed = quantize(base())
    dense = base().model.layers[1].mlp.up_proj
    fp4 = QuantizedLinear.from_linear(dense, "fp4", double_quant=False)
    mixed.model.layers[1].mlp.up_proj = fp4
    both = r"q_proj is nf4 with double quantisation, .*up_proj is fp4; dequantize"
    with pytest.raises(ConfigError, match=both):
        quantization_config(mixed)
