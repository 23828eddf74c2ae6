"""config.json's dialects: one configuration in the words of every type of model, and what a type has not."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, shape

from minilora.errors import ConfigError
from minilora.models.config import DIALECTS, GPT2_ACTIVATIONS, MODEL_TYPES, TransformerConfig
from minilora.models.gpt2 import ACTIVATIONS

NOT_A_SIZE = [0, -1, True, 1.0, 2**31, math.nan, "4", [4]]
Q = ("qwen2", "qwen3")
# (types, a field of config.json, values that it must not have, what the message says)
BAD: list[tuple[tuple[str, ...], str, list[Any], str]] = [
    (("mistral", *Q), "sliding_window", NOT_A_SIZE, "sliding_window must be a positive integer, or null"),
    (Q, "max_window_layers", [-1, True, 1.0, None, "0", 2**31], "max_window_layers must be an integer of at least 0"),
    (Q, "layer_types", [[], ["full_attention"], "full_attention", ["full_attention", "chunked_attention"],
                        ["full_attention"] * 3, [["full_attention"]] * 2, {"full_attention": 1}, 2],
     "layer_types must be 2 of full_attention, sliding_attention, or null"),
    (("gpt2",), "n_inner", [0, -1, True, "4"], "intermediate_size (n_inner) must be a positive integer"),
    (("gpt2",), "n_embd", [0, 7, None], "hidden_size (n_embd) must be"),
    (("gpt2",), "layer_norm_epsilon", [0, math.nan, "1"], "rms_norm_eps (layer_norm_epsilon) must be a pos"),
    (("gpt2",), "activation_function", ["gelu_fast", "tanh", None, ["relu"]],
     "hidden_act (activation_function) must be one of gelu_new, gelu_pytorch_tanh, gelu, silu, swish, relu"),
    (("gpt2",), "scale_attn_weights", [False, None, 1], "scale_attn_weights must be true"),
    (("gpt2",), "scale_attn_by_inverse_layer_idx", [True, None, 0], "scale_attn_by_inverse_layer_idx must be false"),
    (("gpt2",), "add_cross_attention", [True], "add_cross_attention must be false"),
    (("llama", "mistral", *Q), "hidden_act", ["gelu", "relu", None], "hidden_act must be one of silu, swish"),
    (("llama", "mistral", *Q), "head_dim", [3, 0, -2, 2.0, True], "head_dim must be even and positive"),
    (("llama", "mistral", *Q), "rope_parameters",
     [{"partial_rotary_factor": 0.5}, {"partial_rotary_factor": "1"}], "partial_rotary_factor must be 1"),
    (("llama", "mistral", *Q), "rope_parameters", [{"rope_type": kind} for kind in ("yarn", "dynamic", "longrope")],
     "rope_type must be one of default, linear, llama3"),
    (("llama", "mistral", *Q), "rope_parameters", [{"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}],
     "rope_parameters must be those of all layers"),
    (MODEL_TYPES, "model_type", ["gemma", "gpt_neox", "", None, ["llama"], {}, 1],
     "model_type must be one of llama, mistral, qwen2, qwen3, gpt2, got"),
]  # fmt: skip
CASES = [
    (kind, name, value, says)
    for kinds, name, values, says in BAD
    for kind in kinds
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value", "says"), CASES, ids=lambda v: str(v)[:30])
def test_a_value_that_means_nothing_is_refused_by_name(
    kind: str, name: str, value: Any, says: str
) -> None:
    written = shape(kind).to_dict()
    TransformerConfig.from_dict(written)
    with pytest.raises(ConfigError) as error:
        TransformerConfig.from_dict({**written, name: value})
    assert f"config: {says}" in str(error.value) or f"config: rope_parameters.{says}" in str(
        error.value
    )
    assert len(str(error.value)) <= 500


# What a type of model has not, its file could not say; the value that each has instead.
LACKING = {
    "llama": {"sliding_window": 4, "max_window_layers": 1, "layer_types": ["full_attention"] * 2},
    "mistral": {"attention_bias": True, "mlp_bias": True, "max_window_layers": 1},
    "qwen2": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"mlp_bias": True},
    "gpt2": {
        "attention_bias": True,
        "rope_parameters": {"rope_theta": 1e4},
        "num_key_value_heads": 1,
        "head_dim": 2,
        "sliding_window": 4,
    },
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in LACKING.items() for n in names])
def test_a_field_that_a_type_has_not_keeps_its_default(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"config: {name} must be "):
        dataclasses.replace(shape(kind), **{name: LACKING[kind][name]})


def test_a_file_may_hold_fields_of_another_type_which_mean_nothing() -> None:
    for kind, name, value in (("mistral", "attention_bias", True), ("llama", "sliding_window", 2)):
        written = shape(kind).to_dict() | {name: value}
        config = TransformerConfig.from_dict(written)
        assert getattr(config, name) == getattr(
            shape(kind), name
        )  # as in transformers, whose classes ignore them
        assert config.to_dict() == written


def test_gpt2_s_names() -> None:
    config = shape("gpt2", intermediate_size=32, rms_norm_eps=1e-4)
    written = config.to_dict()
    assert written["n_inner"] is None  # four times the width, as its files say it
    expected = {
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "activation_function": "gelu_new",
    }
    assert written.items() >= {**expected, "layer_norm_epsilon": 1e-4, "model_type": "gpt2"}.items()
    assert not {
        "hidden_size",
        "rope_parameters",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
    } & set(written)
    assert dataclasses.replace(TransformerConfig.from_dict(written), extra={}) == config
    assert TransformerConfig.from_dict(written | {"n_inner": 5}).to_dict()["n_inner"] == 5
    for name in ("n_embd", "n_layer", "n_head", "vocab_size"):
        with pytest.raises(ConfigError, match=f"missing {name}"):
            TransformerConfig.from_dict({k: v for k, v in written.items() if k != name})
    assert set(GPT2_ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("kind", Q)
def test_which_layers_of_qwen_have_a_window(kind: str) -> None:
    base = shape(kind, sliding_window=None, layer_types=None, num_hidden_layers=4).to_dict()

    def windows(**fields: Any) -> list[int | None]:
        config = TransformerConfig.from_dict({**base, "sliding_window": 5, **fields})
        again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        found = [config.window(i) for i in range(4)]
        assert found == [again.window(i) for i in range(4)]
        return found

    assert (
        windows()
        == windows(use_sliding_window=False)
        == windows(use_sliding_window=False, max_window_layers=2)
    )
    assert windows() == [None] * 4
    assert windows(use_sliding_window=True, max_window_layers=2) == [None, None, 5, 5]
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(use_sliding_window=True, max_window_layers=2, layer_types=types) == [
        5,
        None,
        None,
        5,
    ]
    with pytest.raises(ConfigError, match="sliding_window must be given for sliding_attention"):
        windows(use_sliding_window=False, layer_types=types)
    del base["max_window_layers"]
    assert windows(use_sliding_window=True) == [None] * 4  # 28, where it is left out


def test_every_layer_of_mistral_has_its_window_and_of_llama_none() -> None:
    for kind, expected in (("mistral", 3), ("llama", None), ("gpt2", None)):
        assert {shape(kind).window(i) for i in range(2)} == {expected}


@given(configs(), st.sampled_from(["float32", "float64"]))
def test_a_file_has_the_fields_of_its_type_and_no_others(
    config: TransformerConfig, dtype: str
) -> None:
    dialect, written = DIALECTS[config.model_type], config.to_dict(dtype)
    expected = {dialect.names.get(name, name) for name in dialect.fields} | {
        "architectures",
        "model_type",
        "dtype",
    }
    if "layer_types" in dialect.fields:
        expected |= {"use_sliding_window"}
        expected -= {"layer_types"} if config.layer_types is None else set()
    if (
        config.model_type == "qwen2"
        and config.head_dim * config.num_attention_heads == config.hidden_size
    ):
        expected -= {"head_dim"}
    assert set(written) - {"head_dim"} == expected - {"head_dim"}
    assert ("head_dim" in written) >= ("head_dim" in expected)
