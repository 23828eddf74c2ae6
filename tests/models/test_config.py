"""config.json's dialects: one configuration in the words of every type of model."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, shape
from variations import VARIATIONS, Variation

from minilora.errors import ConfigError
from minilora.models.config import TransformerConfig
from minilora.models.dialects import DIALECTS, GPT2_ACTIVATIONS, MODEL_TYPES
from minilora.models.gpt2 import ACTIVATIONS

NOT_A_SIZE = [0, -1, True, 1.0, 2**31, math.nan, "4", [4]]
QWEN = ("qwen2", "qwen3")
WINDOWED = ("mistral", *QWEN)
ROTARY = ("llama", *WINDOWED)
GPT2 = ("gpt2",)
CASES: list[tuple[str, str, Any, str]] = []  # (type, field of config.json, value, message)


def bad(kinds: tuple[str, ...], field: str, message: str, values: list[Any]) -> None:
    """These types of model refuse these values of a field of config.json."""
    for kind in kinds:
        for value in values:
            CASES.append((kind, field, value, message))


FULL = "full_attention"
size = "must be a positive integer below 2^31"
bad(WINDOWED, "sliding_window", f"sliding_window {size}, or null", NOT_A_SIZE)
count = "max_window_layers must be an integer of at least 0"
bad(QWEN, "max_window_layers", count, [-1, True, False, 1.0, 0.0, None, "0", 2**31])
types = "layer_types must be 2 of full_attention, sliding_attention, or null"
bad(QWEN, "layer_types", types, [[], [FULL], FULL, [FULL, "chunked_attention"], [FULL] * 3])
bad(QWEN, "layer_types", types, [[[FULL]] * 2, {FULL: 1}, 2])
bad(GPT2, "n_inner", f"intermediate_size (n_inner) {size}", [0, -1, True, "4"])
bad(GPT2, "n_embd", "hidden_size (n_embd) must be", [0, 7, None])
eps = "rms_norm_eps (layer_norm_epsilon) must be a pos"
bad(GPT2, "layer_norm_epsilon", eps, [0, math.nan, "1"])
activation = "hidden_act (activation_function) must be one of gelu_new, gelu_pytorch_tanh, gelu, "
activation += "silu, swish, relu"
bad(GPT2, "activation_function", activation, ["gelu_fast", "tanh", None, ["relu"]])
bad(GPT2, "scale_attn_weights", "scale_attn_weights must be true", [False, None, 1])
by_layer = "scale_attn_by_inverse_layer_idx"
bad(GPT2, by_layer, f"{by_layer} must be false", [True, None, 0])
bad(GPT2, "add_cross_attention", "add_cross_attention must be false", [True])
bad(ROTARY, "hidden_act", "hidden_act must be one of silu, swish", ["gelu", "relu", None])
bad(ROTARY, "head_dim", "head_dim must be even and positive", [3, 0, -2, 2.0, True, 2**16])
ROPE = "rope_parameters"
partial = f"{ROPE}.partial_rotary_factor must be 1"
bad(ROTARY, ROPE, partial, [{"partial_rotary_factor": 0.5}, {"partial_rotary_factor": "1"}])
rope_type = f"{ROPE}.rope_type must be one of default, linear, llama3, yarn, proportional"
bad(ROTARY, ROPE, rope_type, [{"rope_type": kind} for kind in ("su", "ntk", "longrope")])
by_type = {FULL: {"rope_theta": 1e6}, "sliding_attention": {}}
bad(ROTARY, ROPE, "rope_parameters must be those of all layers", [by_type])
listed = "model_type must be one of llama, mistral, qwen2, qwen3, gpt2, got"
bad(MODEL_TYPES, "model_type", listed, ["gemma", "gpt_neox", "", None, ["llama"], {}, 1])


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"), CASES, ids=lambda value: str(value)[:30]
)
def test_from_dict_refuses_a_bad_value_by_name(
    kind: str, field: str, value: Any, message: str
) -> None:
    written = shape(kind).to_dict()
    TransformerConfig.from_dict(written)
    with pytest.raises(ConfigError) as error:
        TransformerConfig.from_dict({**written, field: value})
    assert f"config: {message}" in str(error.value)
    assert len(str(error.value)) <= 500


# Values of fields that a type of model does not have, and that its file could not express.
ABSENT: list[tuple[str, str, Any]] = []


def absent(kind: str, **fields: Any) -> None:
    for name, value in fields.items():
        ABSENT.append((kind, name, value))


absent("llama", sliding_window=4, max_window_layers=1, layer_types=["full_attention"] * 2)
absent("mistral", attention_bias=True, mlp_bias=True, max_window_layers=1)
absent("qwen2", attention_bias=True, mlp_bias=True)
absent("qwen3", mlp_bias=True)
absent("gpt2", attention_bias=True, rope_parameters={"rope_theta": 1e4})
absent("gpt2", num_key_value_heads=1, head_dim=2, sliding_window=4)


@pytest.mark.parametrize(("kind", "name", "value"), ABSENT)
def test_transformer_config_refuses_a_field_that_the_type_does_not_have(
    kind: str, name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"config: {name} must be "):
        dataclasses.replace(shape(kind), **{name: value})


@pytest.mark.parametrize("variation", [row for row in VARIATIONS if row.refused], ids=str)
def test_from_dict_refuses_what_would_change_the_model(variation: Variation) -> None:
    """tests/parity/test_parity_config.py holds those that are read against transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TransformerConfig.from_dict(Variation(variation.kind, {}).config)
        with pytest.raises(ConfigError, match=rf"\b{variation.refused}\b") as error:
            TransformerConfig.from_dict(variation.config)
    assert str(error.value).startswith("config: ")
    assert len(str(error.value)) <= 500


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("mistral", "attention_bias", True), ("gpt2", "rope_theta", 1.0), ("llama", "foo", [{}])],
)
def test_from_dict_warns_of_an_unknown_field_and_keeps_it(kind: str, name: str, value: Any) -> None:
    """As in transformers, whose classes ignore them."""
    written = shape(kind).to_dict() | {name: value}
    message = f"config: fields without effect in a model of type {kind}: {name}$"
    with pytest.warns(UserWarning, match=message) as caught:
        config = TransformerConfig.from_dict(written)
    assert len(caught) == 1
    assert getattr(config, name, None) == getattr(shape(kind), name, None)
    assert config.to_dict() == written


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_from_dict_keeps_knadded_fields_without_effect_in_silence(kind: str) -> None:
    extra = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "use_cache": False}
    extra |= {"architectures": ["FooForBar"], "max_length": 20, "_name_or_path": "a"}
    written = shape(kind).to_dict() | extra
    assert TransformerConfig.from_dict(written).to_dict() == written


OFF = {"use_mrope": False, "rope_interleaved": False, "foo": None, "bars": [], "bar": {}, "baz": 0}
OTHER_PROGRAMS = {
    "max_sequence_length": 16384,
    "pretraining_tp": 1,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "unsloth_fixed": True,
    "unsloth_version": "2024.9",
}


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_from_dict_keeps_fields_that_are_off_and_notes_of_other_programs_in_silence(
    kind: str,
) -> None:
    written = shape(kind).to_dict() | OFF | OTHER_PROGRAMS
    assert TransformerConfig.from_dict(written).to_dict() == written


# ---- files of the hub, with the numbers of their models -----------------------------------------

LLAMA_NUMBERS: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2_NUMBERS = LLAMA_NUMBERS | {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_mrope": False,
    "use_sliding_window": False,
}
YARN4 = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
LONG_YARN = {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn"}
LLAMA31 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}

# What a file says, and for how many positions its model is.
STRETCHED: list[tuple[dict[str, Any], int]] = [
    (LLAMA_NUMBERS, 4096),
    (LLAMA_NUMBERS | {"rope_scaling": None, "rope_theta": 10000}, 4096),
    (LLAMA_NUMBERS | {"rope_scaling": {"factor": 4.0, "type": "linear"}}, 16384),
    (LLAMA_NUMBERS | {"rope_scaling": {"factor": 2, "type": "dynamic"}}, 4096),
    (
        LLAMA_NUMBERS
        | {"max_position_embeddings": 65536, "rope_scaling": LONG_YARN | {"finetuned": True}},
        65536,
    ),
    (LLAMA_NUMBERS | {"max_position_embeddings": 131072, "rope_scaling": LLAMA31}, 131072),
    (QWEN2_NUMBERS, 32768),
    (QWEN2_NUMBERS | {"rope_scaling": YARN4}, 131072),
    (QWEN2_NUMBERS | {"rope_scaling": YARN4 | {"factor": 1e9}}, 2**31 - 1),
    (QWEN2_NUMBERS | {"rope_scaling": YARN4 | {"factor": 0.5}}, 32768),
    (QWEN2_NUMBERS | {"rope_scaling": YARN4 | {"factor": None}}, 32768),
]


@pytest.mark.parametrize(("written", "positions"), STRETCHED)
def test_context_is_what_linear_and_yarn_stretch_the_old_context_to(
    written: dict[str, Any], positions: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = TransformerConfig.from_dict(written)
    assert config.context == positions
    assert TransformerConfig.from_dict(config.to_dict()).context == positions
    words = f"max_position_embeddings = {config.max_position_embeddings}"
    if positions != config.max_position_embeddings:
        words += f", stretched to {positions} by rope_parameters"
    assert config.describe_context() == words


def test_from_dict_of_gpt2_reads_the_general_names() -> None:
    config = shape("gpt2", intermediate_size=12)
    written = config.to_dict()
    for name, alias in DIALECTS["gpt2"].aliases.items():
        written[alias] = written.pop(name)
    again = TransformerConfig.from_dict(written)
    assert dataclasses.replace(again, extra={}) == config
    written["n_embd"] = 4
    message = "n_embd is 4, but hidden_size, another name for it, is 8: keep one of the two"
    with pytest.raises(ConfigError, match=message):
        TransformerConfig.from_dict(written)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_to_dict_writes_a_point_into_every_real_number(kind: str) -> None:
    """transformers refuses an integer for a float."""
    written = shape(kind, rms_norm_eps=1, initializer_range=1).to_dict()
    assert TransformerConfig.from_dict(json.loads(json.dumps(written))).to_dict() == written


def test_from_dict_does_not_build_what_an_absurd_size_asks_for() -> None:
    written = shape("llama").to_dict() | {"num_hidden_layers": 2**31 - 1, "layer_types": ["a"]}
    with pytest.raises(ConfigError, match="layer_types must be null, or full_attention for each"):
        TransformerConfig.from_dict(written)


def test_window_of_mistral_depends_on_layer_types() -> None:
    config = shape("mistral", layer_types=["full_attention", "sliding_attention"])
    again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert [again.window(layer) for layer in range(2)] == [None, 3]


def test_to_dict_of_gpt2_uses_its_names() -> None:
    config = shape("gpt2", intermediate_size=32, rms_norm_eps=1e-4)
    written = config.to_dict()
    assert written["n_inner"] is None  # four times the width, as its files express it
    expected = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
    expected |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-4}
    assert written.items() >= {**expected, "model_type": "gpt2"}.items()
    for name in ("hidden_size", ROPE, "num_key_value_heads", "head_dim", "rms_norm_eps"):
        assert name not in written
    assert dataclasses.replace(TransformerConfig.from_dict(written), extra={}) == config
    assert TransformerConfig.from_dict(written | {"n_inner": 5}).to_dict()["n_inner"] == 5


@pytest.mark.parametrize("name", ["n_embd", "n_layer", "n_head", "vocab_size"])
def test_from_dict_of_gpt2_names_a_missing_field(name: str) -> None:
    written = shape("gpt2").to_dict()
    del written[name]
    with pytest.raises(ConfigError, match=f"missing {name}"):
        TransformerConfig.from_dict(written)


def test_gpt2_activations_are_those_that_its_decoder_has() -> None:
    assert set(GPT2_ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("kind", QWEN)
def test_window_of_qwen_depends_on_the_layer(kind: str) -> None:
    base = shape(kind, sliding_window=None, layer_types=None, num_hidden_layers=4).to_dict()

    def windows(**fields: Any) -> list[int | None]:
        config = TransformerConfig.from_dict({**base, "sliding_window": 5, **fields})
        again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        found = [config.window(layer) for layer in range(4)]
        assert found == [again.window(layer) for layer in range(4)]
        return found

    assert windows() == [None] * 4
    assert windows(use_sliding_window=False) == [None] * 4
    assert windows(use_sliding_window=False, max_window_layers=2) == [None] * 4
    assert windows(use_sliding_window=True, max_window_layers=2) == [None, None, 5, 5]
    types = ["sliding_attention", FULL, FULL, "sliding_attention"]
    found = windows(use_sliding_window=True, max_window_layers=2, layer_types=types)
    assert found == [5, None, None, 5]
    with pytest.raises(ConfigError, match="sliding_window must be given for sliding_attention"):
        windows(use_sliding_window=False, layer_types=types)
    del base["max_window_layers"]
    assert windows(use_sliding_window=True) == [None] * 4  # 28 if it is left out


@pytest.mark.parametrize(("kind", "window"), [("mistral", 3), ("llama", None), ("gpt2", None)])
def test_window_of_other_types_is_that_of_every_layer(kind: str, window: int | None) -> None:
    config = shape(kind)
    assert [config.window(layer) for layer in range(2)] == [window] * 2


@given(configs(), st.sampled_from(["float32", "float64"]))
def test_to_dict_has_the_fields_of_the_type_and_no_others(
    config: TransformerConfig, dtype: str
) -> None:
    dialect = DIALECTS[config.model_type]
    written = set(config.to_dict(dtype))
    expected = {dialect.names.get(name, name) for name in dialect.fields}
    expected |= {"architectures", "model_type", "dtype"}
    if "max_window_layers" in dialect.fields:
        expected.add("use_sliding_window")
    if config.layer_types is None:
        expected.discard("layer_types")
    plain_heads = config.head_dim * config.num_attention_heads == config.hidden_size
    if config.model_type == "qwen2" and plain_heads:
        expected.remove("head_dim")
    assert written - {"head_dim"} == expected - {"head_dim"}
    assert ("head_dim" in written) >= ("head_dim" in expected)
