"""The language model: its configuration, its files, its mathematics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operations import rotary_tables
from shapes import LLAMA3, ROPES, bits, configs, randomised, shape

from minilora import functional as F
from minilora.autograd import Tensor, no_grad
from minilora.errors import ConfigError, DataError, FormatError, GraphError
from minilora.formats import load_file, save_file
from minilora.gradcheck import directional_error
from minilora.models.config import TransformerConfig
from minilora.models.dialects import DIALECTS, MODEL_TYPES
from minilora.models.transformer import CausalLM, KeyValueCache, RotaryTable

TINY = TransformerConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)


def tiny(**changes: Any) -> TransformerConfig:
    return dataclasses.replace(TINY, **changes)


# ---- configuration ------------------------------------------------------------------------------

NOT_A_SIZE = [0, -1, True, 1.0, 2**31, 10**30, math.nan, math.inf, "4", [4]]
NOT_POSITIVE = [0, -1e-6, True, math.nan, math.inf, 10**400, "1", None]
NOT_A_FLAG = [1, 0, None, "true"]
SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
]
BAD: list[tuple[str, str, Any]] = []  # (the name in the message, a field, its value)


def bad(field: str, values: list[Any]) -> None:
    for value in values:
        BAD.append((field, field, value))


def bad_rotary(name: str, values: list[Any], **others: Any) -> None:
    for value in values:
        BAD.append((name, "rope_parameters", {**others, name: value}))


for size in [*SIZES, "max_position_embeddings"]:
    bad(size, [*NOT_A_SIZE, None])
bad("num_key_value_heads", [*NOT_A_SIZE, 3])
bad("head_dim", [0, -2, 3, True, 4.0, 2**40, math.nan, "4"])
bad("rms_norm_eps", NOT_POSITIVE)
bad("initializer_range", NOT_POSITIVE)
bad("attention_bias", NOT_A_FLAG)
bad("mlp_bias", NOT_A_FLAG)
bad("tie_word_embeddings", NOT_A_FLAG)
bad("hidden_act", ["gelu", "", None, 1])
bad("model_type", ["mamba", "", None, 1, ["llama"]])
bad("rope_parameters", [None, 5, "default", []])
bad_rotary("rope_theta", [*NOT_POSITIVE, 1e-300, [1]])
bad_rotary("rope_type", ["longrope", "", None, 1, ["default"]])
BAD.append(("factor", "rope_parameters", {"rope_type": "linear"}))
bad_rotary("factor", NOT_POSITIVE, **LLAMA3)
bad_rotary("low_freq_factor", NOT_POSITIVE, **LLAMA3)
bad_rotary("high_freq_factor", [*NOT_POSITIVE, 1.0], **LLAMA3)
bad_rotary("original_max_position_embeddings", NOT_POSITIVE, **LLAMA3)


@pytest.mark.parametrize(
    ("named", "field", "value"), BAD, ids=[f"{name}-{str(value)[:40]}" for name, _, value in BAD]
)
def test_transformer_config_refuses_a_bad_value_by_name(named: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        tiny(**{field: value})
    assert len(str(error.value)) <= 500


def test_transformer_config_refuses_sizes_that_do_not_fit_each_other() -> None:
    message = "hidden_size must be a multiple of num_attention_heads = 3"
    with pytest.raises(ConfigError, match=message):
        tiny(num_attention_heads=3, head_dim=None)
    with pytest.raises(ConfigError, match="divisor of num_attention_heads = 2"):
        tiny(num_key_value_heads=4)


def test_causal_lm_refuses_other_dtypes() -> None:
    with pytest.raises(ConfigError, match="dtype must be float32 or float64"):
        CausalLM(TINY, dtype="float16")


def test_transformer_config_fills_in_defaults() -> None:
    config = TransformerConfig(num_key_value_heads=None, head_dim=None)
    assert config.kv_heads == config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


REQUIRED = {name: getattr(TINY, name) for name in SIZES} | {"model_type": "llama"}
SPELLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = []  # (as written, as read)


def spelling(expected: dict[str, Any], **written: Any) -> None:
    SPELLINGS.append((written, expected))


llama3_scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
spelling({"rope_type": "default", "rope_theta": 10000.0})
spelling({"rope_type": "default", "rope_theta": 500}, rope_theta=500)
spelling({"rope_type": "default", "rope_theta": 500.0}, rope_theta=500.0, rope_scaling=None)
linear = ROPES["linear"]
spelling(linear, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.5})
spelling(linear, rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 2.5})
spelling(LLAMA3, rope_theta=1000.0, rope_scaling=llama3_scaling)
spelling(LLAMA3, rope_parameters=LLAMA3)
spelling(LLAMA3, rope_parameters=LLAMA3, rope_theta=7.0)


@pytest.mark.parametrize(("written", "expected"), SPELLINGS)
def test_from_dict_reads_every_spelling_of_rotary_parameters(
    written: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = TransformerConfig.from_dict(REQUIRED | written)
    assert config.rope_parameters == expected
    assert not {"rope_theta", "rope_scaling", "rope_parameters"} & set(config.extra)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_to_dict_writes_dtype_under_one_name(name: str) -> None:
    config = TransformerConfig.from_dict(REQUIRED | {name: "bfloat16"})
    written = config.to_dict("float64")
    assert written["dtype"] == "float64"
    assert "torch_dtype" not in written


extra_names = st.sampled_from(["max_length", "finetuning_task", "prefix"])


@given(configs(), st.dictionaries(extra_names, st.integers() | st.text()))
def test_from_dict_reads_what_to_dict_wrote(
    config: TransformerConfig, extra: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, extra=extra)
    written = json.loads(json.dumps(config.to_dict()))
    again = TransformerConfig.from_dict(written)
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(config, extra={})
    assert written.items() >= extra.items()
    assert again.to_dict() == written
    assert written["architectures"] == [DIALECTS[config.model_type].architecture]


@pytest.mark.parametrize("name", SIZES)
def test_from_dict_names_a_missing_field(name: str) -> None:
    fields = {key: value for key, value in REQUIRED.items() if key != name}
    with pytest.raises(ConfigError, match=f"missing {name}"):
        TransformerConfig.from_dict(fields)


@pytest.mark.parametrize("kind", ["mamba", None])
def test_from_dict_refuses_another_model_type(kind: Any) -> None:
    with pytest.raises(ConfigError, match="model_type must be one of llama"):
        TransformerConfig.from_dict(REQUIRED | {"model_type": kind})


def test_from_dict_refuses_rotary_parameters_that_are_not_an_object() -> None:
    scalar = {"rope_parameters": 5}
    pairs = {"rope_scaling": [["type", "linear"]]}
    for fields in ({"rope_scaling": "linear"}, scalar, pairs):
        with pytest.raises(ConfigError, match="must be an object"):
            TransformerConfig.from_dict(REQUIRED | fields)


@given(configs())
def test_parameter_count_is_that_of_the_model(config: TransformerConfig) -> None:
    assert config.parameter_count() == sum(p.size for p in CausalLM(config).parameters())


# ---- rotary positions ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_rotary_table_is_rounded_once_and_grows(rope: str, dtype: str) -> None:
    config = tiny(rope_parameters=ROPES[rope], max_position_embeddings=1000)
    table = RotaryTable(config)
    heads = (config.num_attention_heads, config.kv_heads)
    scale = config.head_dim**-0.5  # a power of two, so that growth * scale is exact
    growth = 0.1 * math.log(8) + 1 if rope == "yarn" else 1
    angle = np.arange(300)[:, None] * table.frequency
    for start, stop in ((0, 3), (5, 64), (60, 65), (290, 300), (0, 1)):
        found = table(start, stop, Tensor(np.zeros(1, dtype)))
        expected = rotary_tables(angle[start:stop], *heads, scale)
        for ours, exact in zip(found, expected, strict=True):
            assert np.array_equal(ours, (exact * growth).astype(dtype))


# ---- the model ----------------------------------------------------------------------------------


def test_causal_lm_names_its_parameters_as_the_ecosystem_does() -> None:
    model = CausalLM(tiny(attention_bias=True, mlp_bias=True, num_hidden_layers=1))
    expected = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    layer = "model.layers.0"
    for name in "qkvo":
        expected.append(f"{layer}.self_attn.{name}_proj.weight")
        expected.append(f"{layer}.self_attn.{name}_proj.bias")
    for name in ("gate", "up", "down"):
        expected.append(f"{layer}.mlp.{name}_proj.weight")
        expected.append(f"{layer}.mlp.{name}_proj.bias")
    expected.append(f"{layer}.input_layernorm.weight")
    expected.append(f"{layer}.post_attention_layernorm.weight")
    assert sorted(bits(model)) == sorted(expected)
    tied = bits(CausalLM(tiny(tie_word_embeddings=True)))
    assert "lm_head.weight" not in tied
    assert "model.layers.1.mlp.up_proj.weight" in tied


def test_causal_lm_of_a_seed_is_one_model_in_every_dtype() -> None:
    assert bits(CausalLM(TINY, seed=3)) == bits(CausalLM(TINY, seed=3))
    assert bits(CausalLM(TINY, seed=3)) != bits(CausalLM(TINY, seed=4))
    single = CausalLM(TINY)
    double = CausalLM(TINY, dtype="float64")
    for p, q in zip(single.parameters(), double.parameters(), strict=True):
        assert q.dtype == np.float64
        assert np.array_equal(p.data, q.data)
    for name, p in CausalLM(TINY, seed=None).named_parameters():
        assert "norm" in name or not p.data.any()


@pytest.mark.parametrize("seed", range(4))
def test_causal_lm_knows_nothing_before_training(seed: int) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = CausalLM(TransformerConfig(vocab_size=300, **sizes), seed=seed)
    ids = np.random.default_rng(seed).integers(0, 300, (4, 65))
    loss = F.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)


def with_a_token_changed(ids: np.ndarray, at: int, vocab_size: int) -> np.ndarray:
    changed = ids.copy()
    changed[:, at] = (changed[:, at] + 1) % vocab_size
    return changed


@given(configs(), st.integers(0, 9), st.integers(0, 8))
def test_causal_lm_never_changes_what_came_before_a_token(
    config: TransformerConfig, seed: int, at: int
) -> None:
    model = randomised(config, seed=seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 9))
    before = model(ids).data
    after = model(with_a_token_changed(ids, at, config.vocab_size)).data
    assert np.array_equal(before[:, :at], after[:, :at])
    assert not np.array_equal(before[:, at], after[:, at])


@given(configs(), st.integers(0, 9), st.integers(0, 3))
def test_causal_lm_with_windows_hides_what_is_older(
    config: TransformerConfig, seed: int, at: int
) -> None:
    """A layer carries a token's trace no further than its window, so that it ends, bit for bit."""
    model = randomised(config, seed=seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 12))
    reach = at
    for layer in range(config.num_hidden_layers):
        window = config.window(layer)
        reach += 12 if window is None else window - 1
    changed = with_a_token_changed(ids, at, config.vocab_size)
    same = model(ids).data == model(changed).data  # (B, T, V)
    assert same[:, reach + 1 :].all()
    assert not same[:, min(reach, 11)].all()


@given(configs(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_key_value_cache_changes_nothing_but_rounding(
    config: TransformerConfig, parts: list[int]
) -> None:
    model = randomised(config)
    count = sum(parts)
    ends = np.cumsum(parts)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, count))
    cache = KeyValueCache(model, 2, count)
    logits = []
    for part in np.split(ids, ends[:-1], axis=1):
        with no_grad():
            logits.append(model(part, cache).data)
    assert cache.length == count
    expected = model(ids).data[:, ends - 1]  # the last position of each part
    bound = 1e-12 * max(1, np.abs(expected).max())
    assert np.abs(np.concatenate(logits, axis=1) - expected).max() <= bound


GRADCHECKS = {kind: shape(kind) for kind in MODEL_TYPES}
GRADCHECKS["plain"] = TINY
GRADCHECKS["biases, explicit head_dim"] = tiny(attention_bias=True, mlp_bias=True, head_dim=6)
tied_llama3 = tiny(tie_word_embeddings=True, rope_parameters=LLAMA3, num_key_value_heads=2)
GRADCHECKS["tied, llama3"] = tied_llama3


@pytest.mark.parametrize("config", GRADCHECKS.values(), ids=GRADCHECKS)
def test_causal_lm_has_the_gradient_of_differences(config: TransformerConfig) -> None:
    model = randomised(config)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 6))
    names = {id(p): name for name, p in model.named_parameters()}
    places = []  # a tied parameter has two places and one name
    for _, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                places.append((module, attribute, names[id(value)]))

    def loss(*values: Tensor) -> Tensor:
        by_name = dict(zip(names.values(), values, strict=True))
        for module, attribute, name in places:
            setattr(module, attribute, by_name[name])
        return F.cross_entropy(model(ids[:, :-1]), ids[:, 1:])

    # The step is small because a whole model curves more than one operation: its fourth-order
    # error shrinks with h^4.
    params = [p.data for p in model.parameters()]
    assert directional_error(loss, *params, h=5e-5) <= 1e-9


BAD_IDS: list[tuple[Any, str]] = []


def bad_ids(message: str, *arrays: np.ndarray) -> None:
    for ids in arrays:
        BAD_IDS.append((ids, message))


bad_ids(r"in \[0, 11\), got 0 to 11", np.array([[0, 11]]))
bad_ids(r"in \[0, 11\), got -1 to 2", np.array([[-1, 2]]))
bad_ids("integers of shape", np.array([[0.0, 1.0]]), np.array([[True]]), np.array([1, 2]))
bad_ids("integers of shape", np.zeros((1, 2, 1), int))
bad_ids("integers of shape", np.zeros((1, 0), int), np.zeros((0, 2), int))
limit = "33 positions, but the model has max_position_embeddings = 32"
bad_ids(limit, np.zeros((1, 33), int))


@pytest.mark.parametrize(("ids", "message"), BAD_IDS)
def test_causal_lm_refuses_ids(ids: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CausalLM(TINY)(ids)


def test_causal_lm_takes_ids_as_arrays_lists_and_tensors_of_any_integer_kind() -> None:
    model = CausalLM(TINY)
    ids = np.array([[1, 2, 3]])
    expected = model(ids).data
    for same in ([[1, 2, 3]], Tensor(ids), ids.astype(np.uint8), ids.astype(np.uint64)):
        assert np.array_equal(model(same).data, expected)


def test_causal_lm_with_a_cache_needs_no_grad_and_counts_positions() -> None:
    model = CausalLM(TINY)
    cache = KeyValueCache(model, 1, 40)
    first = np.zeros((1, 30), int)
    with pytest.raises(GraphError, match="under no_grad"):
        model(first, cache)
    with no_grad():
        model(first, cache)
    with pytest.raises(DataError, match="33 positions"):
        model(np.array([[1, 2, 3]]), cache)


# ---- files --------------------------------------------------------------------------------------


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(file, tensors)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | changes))


@given(configs(), st.sampled_from(["float32", "float64"]))
def test_from_pretrained_gives_the_saved_model_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, config: TransformerConfig, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("model")
    model = randomised(config, dtype)
    model.save_pretrained(folder)
    again = CausalLM.from_pretrained(folder, dtype=dtype)
    assert bits(again) == bits(model)
    assert again.config.to_dict(dtype) == model.config.to_dict(dtype)
    assert not again.training
    is_tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert is_tied == config.tie_word_embeddings
    ids = np.arange(6).reshape(2, 3) % config.vocab_size
    assert np.array_equal(again(ids).data, model(ids).data)


def test_from_pretrained_lists_every_mismatch_in_one_error(tmp_path: Path) -> None:
    CausalLM(TINY).save_pretrained(tmp_path)

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["a.stranger"] = np.zeros(1, np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((11, 9), np.float32)

    edit_tensors(tmp_path, change)
    with pytest.raises(FormatError) as error:
        CausalLM.from_pretrained(tmp_path)
    message = str(error.value)
    assert "missing model.norm.weight" in message
    assert "unknown a.stranger" in message
    assert "model.embed_tokens.weight is (11, 9), config.json says (11, 8)" in message
    edit_config(tmp_path, num_hidden_layers=2**30)
    with pytest.raises(FormatError, match="the file holds"):
        CausalLM.from_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(FormatError, match=r"and 1\d more"):
        CausalLM.from_pretrained(tmp_path)


def test_from_pretrained_ties_a_stored_head_only_if_it_is_the_embedding(
    tmp_path: Path,
) -> None:
    model = CausalLM(tiny(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.copy()}))
    assert bits(CausalLM.from_pretrained(tmp_path)) == bits(model)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    message = r"tie_word_embeddings is true in config\.json, but lm_head\.weight differs"
    with pytest.warns(UserWarning, match=message):
        untied = CausalLM.from_pretrained(tmp_path)
    assert np.array_equal(untied.lm_head.weight.numpy(), embedding + 1)


def test_from_pretrained_ignores_old_buffers(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    model.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: np.ones(2, np.float32)}))
    assert bits(CausalLM.from_pretrained(tmp_path)) == bits(model)


def test_from_pretrained_refuses_a_model_far_larger_than_its_file_before_it_takes_memory(
    tmp_path: Path,
) -> None:
    config = TransformerConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    CausalLM(config).save_pretrained(tmp_path)
    edit_config(tmp_path, intermediate_size=2**31 - 1, vocab_size=2**31 - 1)
    with pytest.raises(FormatError, match="the file holds"):
        CausalLM.from_pretrained(tmp_path)
