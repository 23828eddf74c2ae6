"""The language model: its configuration, its files, its mathematics."""

from __future__ import annotations

import dataclasses
import json
import math
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
from minilora.models.config import DIALECTS, MODEL_TYPES, TransformerConfig, rotary_frequencies
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


# ---- configuration ----

NOT_A_SIZE = [0, -1, True, 1.0, 2**31, 10**30, math.nan, math.inf, "4", None, [4]]
NOT_POSITIVE = [0, -1e-6, True, math.nan, math.inf, 10**400, "1", None]
SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
]
BAD: dict[str, list[Any]] = {
    **dict.fromkeys([*SIZES, "max_position_embeddings"], NOT_A_SIZE),
    "num_key_value_heads": [bad for bad in NOT_A_SIZE if bad is not None] + [3],
    "head_dim": [0, -2, 3, True, 4.0, 2**40, math.nan, "4"],
    "rms_norm_eps": NOT_POSITIVE,
    "initializer_range": NOT_POSITIVE,
    "attention_bias": [1, 0, None, "true"],
    "mlp_bias": [1, 0, None, "true"],
    "tie_word_embeddings": [1, 0, None, "true"],
    "hidden_act": ["gelu", "", None, 1],
    "model_type": ["mamba", "", None, 1, ["llama"]],
    "rope_parameters": [None, 5, "default", []],
    "rope_theta": [{"rope_theta": bad} for bad in [*NOT_POSITIVE, 1e-300, [1]]],
    "rope_type": [{"rope_type": bad} for bad in ["yarn", "", None, 1, ["default"]]],
    "factor": [{**LLAMA3, "factor": bad} for bad in NOT_POSITIVE] + [{"rope_type": "linear"}],
    "low_freq_factor": [{**LLAMA3, "low_freq_factor": bad} for bad in NOT_POSITIVE],
    "high_freq_factor": [{**LLAMA3, "high_freq_factor": bad} for bad in [*NOT_POSITIVE, 1.0]],
    "original_max_position_embeddings": [
        {**LLAMA3, "original_max_position_embeddings": bad} for bad in NOT_POSITIVE
    ],
}
ROPE_FIELDS = ["rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor"]
ROPE_FIELDS += ["original_max_position_embeddings"]
CASES = [(field, value) for field, values in BAD.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f}-{str(v)[:40]}" for f, v in CASES])
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    changes = {"rope_parameters" if field in ROPE_FIELDS else field: value}
    with pytest.raises(ConfigError, match=field) as error:
        tiny(**changes)
    assert len(str(error.value)) <= 500


def test_sizes_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="hidden_size must be a multiple of num_attention_heads = 3"
    ):
        tiny(num_attention_heads=3, head_dim=None)
    with pytest.raises(ConfigError, match="divisor of num_attention_heads = 2"):
        tiny(num_key_value_heads=4)
    with pytest.raises(ConfigError, match="dtype must be float32 or float64"):
        CausalLM(TINY, dtype="float16")


def test_defaults_are_filled_in() -> None:
    config = TransformerConfig(num_key_value_heads=None, head_dim=None)
    assert config.kv_heads == config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


REQUIRED = {name: getattr(TINY, name) for name in SIZES} | {"model_type": "llama"}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 500}, {"rope_type": "default", "rope_theta": 500}),
        (
            {"rope_theta": 500.0, "rope_scaling": None},
            {"rope_type": "default", "rope_theta": 500.0},
        ),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.5}}, ROPES["linear"]),
        (
            {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
            ROPES["linear"],
        ),
        (
            {
                "rope_theta": 1000.0,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            },
            LLAMA3,
        ),
        ({"rope_parameters": LLAMA3}, LLAMA3),
        ({"rope_parameters": LLAMA3, "rope_theta": 7.0}, LLAMA3),
    ],
)
def test_both_generations_of_config_json_mean_the_same(
    written: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = TransformerConfig.from_dict(REQUIRED | written)
    assert config.rope_parameters == expected
    assert not {"rope_theta", "rope_scaling", "rope_parameters"} & set(config.extra)


def test_dtype_has_one_name_when_written() -> None:
    for name in ("torch_dtype", "dtype"):
        written = TransformerConfig.from_dict(REQUIRED | {name: "bfloat16"}).to_dict("float64")
        assert written["dtype"] == "float64"
        assert "torch_dtype" not in written


@given(
    configs(),
    st.dictionaries(
        st.sampled_from(["bos_token_id", "use_cache", "a_name"]), st.integers() | st.text()
    ),
)
def test_a_configuration_survives_its_file(
    config: TransformerConfig, extra: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, extra=extra)
    written = json.loads(json.dumps(config.to_dict()))
    again = TransformerConfig.from_dict(written)
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(config, extra={})
    assert written.items() >= extra.items()
    assert again.to_dict() == written
    assert written["architectures"] == [DIALECTS[config.model_type].architecture]


def test_a_config_json_that_is_no_model_s() -> None:
    for name in SIZES:
        with pytest.raises(ConfigError, match=f"missing {name}"):
            TransformerConfig.from_dict({k: v for k, v in REQUIRED.items() if k != name})
    for kind in ({"model_type": "mamba"}, {"model_type": None}):
        with pytest.raises(ConfigError, match="model_type must be one of llama"):
            TransformerConfig.from_dict(REQUIRED | kind)
    for bad in (
        {"rope_scaling": "linear"},
        {"rope_parameters": 5},
        {"rope_scaling": [["type", "linear"]]},
    ):
        with pytest.raises(ConfigError, match="must be an object"):
            TransformerConfig.from_dict(REQUIRED | bad)


# ---- rotary positions ----


@given(
    st.sampled_from([2, 4, 16, 64]),
    st.sampled_from([100.0, 1e4, 5e5]),
    st.sampled_from([2.0, 8.0, 32.0]),
)
def test_rotary_frequencies_against_a_scalar_derivation(
    dim: int, theta: float, factor: float
) -> None:
    low, high, old = 1.0, 4.0, 256

    def derived(i: int, kind: str) -> float:
        frequency = 1.0 / math.pow(theta, 2 * i / dim)
        if kind == "linear":
            return frequency / factor
        wavelength = 2 * math.pi / frequency
        if kind == "default" or wavelength < old / high:
            return frequency
        if wavelength > old / low:
            return frequency / factor
        smooth = (old / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    for kind in ROPES:
        rope = LLAMA3 | {"rope_type": kind, "rope_theta": theta, "factor": factor}
        rope["original_max_position_embeddings"] = old
        config = tiny(head_dim=dim, rope_parameters=rope)
        expected = [derived(i, kind) for i in range(dim // 2)]
        np.testing.assert_allclose(rotary_frequencies(config), expected, rtol=1e-13)


def test_llama3_has_all_three_kinds_of_waves() -> None:
    config = tiny(head_dim=16, rope_parameters=LLAMA3)
    plain = rotary_frequencies(tiny(head_dim=16, rope_parameters={"rope_theta": 1000.0}))
    ratio = rotary_frequencies(config) / plain
    assert ratio[0] == 1
    assert ratio[-1] == 1 / 8
    assert ((ratio > 1 / 8) & (ratio < 1)).any()


def test_the_rotary_table_is_rounded_once_and_grows() -> None:
    config = tiny(rope_parameters=ROPES["linear"], max_position_embeddings=1000)
    table, angle = RotaryTable(config), np.arange(300)[:, None] * rotary_frequencies(config)
    for start, stop in ((0, 3), (5, 64), (60, 65), (290, 300), (0, 1)):
        for dtype in ("float32", "float64"):
            found = table(start, stop, Tensor(np.zeros(1, dtype)))
            scale = config.head_dim**-0.5
            expected = rotary_tables(
                angle[start:stop], config.num_attention_heads, config.kv_heads, scale
            )
            assert all(
                np.array_equal(a, b.astype(dtype)) for a, b in zip(found, expected, strict=True)
            )


# ---- the model ----


def test_parameter_names_are_those_of_the_ecosystem() -> None:
    names = [
        n
        for n, _ in CausalLM(
            tiny(attention_bias=True, mlp_bias=True, num_hidden_layers=1)
        ).named_parameters()
    ]
    linear = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    layer = [f"{name}.{tensor}" for name in linear for tensor in ("weight", "bias")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    whole = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert sorted(names) == sorted([*whole, *(f"model.layers.0.{name}" for name in layer)])
    tied = [n for n, _ in CausalLM(tiny(tie_word_embeddings=True)).named_parameters()]
    assert "lm_head.weight" not in tied
    assert "model.layers.1.mlp.up_proj.weight" in tied


def test_a_seed_means_one_model_in_every_dtype() -> None:
    assert bits(CausalLM(TINY, seed=3)) == bits(CausalLM(TINY, seed=3))
    assert bits(CausalLM(TINY, seed=3)) != bits(CausalLM(TINY, seed=4))
    single, double = CausalLM(TINY), CausalLM(TINY, dtype="float64")
    for p, q in zip(single.parameters(), double.parameters(), strict=True):
        assert q.dtype == np.float64
        assert np.array_equal(p.data, q.data)
    blank = CausalLM(TINY, seed=None)
    assert not any(p.data.any() for n, p in blank.named_parameters() if "norm" not in n)


@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_model_knows_nothing(seed: int) -> None:
    config = TransformerConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2
    )
    ids = np.random.default_rng(seed).integers(0, 300, (4, 65))
    loss = F.cross_entropy(CausalLM(config, seed=seed)(ids[:, :-1]), ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)


@given(configs(), st.integers(0, 9), st.data())
def test_a_token_never_changes_what_came_before_it(
    config: TransformerConfig, seed: int, data: st.DataObject
) -> None:
    model, rng = randomised(config, seed=seed), np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (2, 9))
    at = data.draw(st.integers(0, 8))
    changed = ids.copy()
    changed[:, at] = (changed[:, at] + 1) % config.vocab_size
    before, after = model(ids).data, model(changed).data
    assert np.array_equal(before[:, :at], after[:, :at])
    assert not np.array_equal(before[:, at], after[:, at])


@given(configs(), st.integers(0, 9), st.data())
def test_a_window_hides_what_is_older(
    config: TransformerConfig, seed: int, data: st.DataObject
) -> None:
    """A layer carries a token's trace no further than its window: after all of them it ends somewhere, bit for bit."""
    model, ids = (
        randomised(config, seed=seed),
        np.random.default_rng(seed).integers(0, config.vocab_size, (2, 12)),
    )
    at, windows = (
        data.draw(st.integers(0, 3)),
        [config.window(i) for i in range(config.num_hidden_layers)],
    )
    reach = at + sum(12 if window is None else window - 1 for window in windows)
    changed = ids.copy()
    changed[:, at] = (changed[:, at] + 1) % config.vocab_size
    same = model(ids).data == model(changed).data  # (B, T, V)
    assert same[:, reach + 1 :].all()
    assert not same[:, min(reach, 11)].all()


@given(configs(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_cache_changes_nothing_but_rounding(config: TransformerConfig, parts: list[int]) -> None:
    model = randomised(config)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, sum(parts)))
    cache, got = KeyValueCache(model, 2, sum(parts)), []
    for piece in np.split(ids, np.cumsum(parts)[:-1], axis=1):
        with no_grad():
            got.append(model(piece, cache).data)
    assert cache.length == sum(parts)
    expected = model(ids).data[:, np.cumsum(parts) - 1]  # the last position of each piece
    assert np.abs(np.concatenate(got, axis=1) - expected).max() <= 1e-12 * max(
        1, np.abs(expected).max()
    )


GRADCHECKS = {
    **{kind: shape(kind) for kind in MODEL_TYPES},
    "plain": TINY,
    "biases, explicit head_dim": tiny(attention_bias=True, mlp_bias=True, head_dim=6),
    "tied, llama3": tiny(tie_word_embeddings=True, rope_parameters=LLAMA3, num_key_value_heads=2),
}


@pytest.mark.parametrize("config", GRADCHECKS.values(), ids=GRADCHECKS)
def test_the_gradient_of_the_whole_model(config: TransformerConfig) -> None:
    model = randomised(config)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 6))
    places = [
        (m, n)
        for _, m in model.named_modules()
        for n, p in vars(m).items()
        if isinstance(p, Tensor)
    ]
    names = {id(p): n for n, p in model.named_parameters()}
    keys = [names[id(getattr(m, n))] for m, n in places]  # a tied one has two places and one key

    def loss(*values: Tensor) -> Tensor:
        given_ = dict(zip(names.values(), values, strict=True))
        for (module, attribute), key in zip(places, keys, strict=True):
            setattr(module, attribute, given_[key])
        return F.cross_entropy(model(ids[:, :-1]), ids[:, 1:])

    # The step is small because a whole model curves more than one operation: its fourth-order error shrinks with h^4.
    assert directional_error(loss, *[p.data for p in model.parameters()], h=5e-5) <= 1e-9


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[0, 11]]), r"in \[0, 11\), got 0 to 11"),
        (np.array([[-1, 2]]), r"in \[0, 11\), got -1 to 2"),
        (np.array([[0.0, 1.0]]), "integers of shape"),
        (np.array([[True]]), "integers of shape"),
        (np.array([1, 2]), "integers of shape"),
        (np.zeros((1, 2, 1), int), "integers of shape"),
        (np.zeros((1, 0), int), "integers of shape"),
        (np.zeros((0, 2), int), "integers of shape"),
        (np.zeros((1, 33), int), "33 positions, but the model has max_position_embeddings = 32"),
    ],
)
def test_ids_that_the_model_cannot_take(ids: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CausalLM(TINY)(ids)


def test_ids_come_as_arrays_lists_and_tensors_and_of_any_integer_kind() -> None:
    model, ids = CausalLM(TINY), np.array([[1, 2, 3]])
    expected = model(ids).data
    for same in ([[1, 2, 3]], Tensor(ids), ids.astype(np.uint8), ids.astype(np.uint64)):
        assert np.array_equal(model(same).data, expected)
    cache = KeyValueCache(model, 1, 40)
    with pytest.raises(GraphError, match="under no_grad"):
        model(np.zeros((1, 30), int), cache)
    with no_grad():
        model(np.zeros((1, 30), int), cache)
    with pytest.raises(DataError, match="33 positions"):
        model(ids, cache)


# ---- files ----


@given(configs(), st.sampled_from(["float32", "float64"]))
def test_a_saved_model_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, config: TransformerConfig, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("model")
    model = randomised(config, dtype)
    model.save_pretrained(folder)
    again = CausalLM.from_pretrained(folder, dtype=dtype)
    assert bits(again) == bits(model)
    assert again.config.to_dict(dtype) == model.config.to_dict(dtype)
    assert not again.training
    assert (
        again.lm_head.weight is again.get_input_embeddings().weight
    ) == config.tie_word_embeddings
    ids = np.arange(6).reshape(2, 3) % config.vocab_size
    assert np.array_equal(again(ids).data, model(ids).data)


def test_every_mismatch_is_listed_in_one_error(tmp_path: Path) -> None:
    CausalLM(TINY).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["a.stranger"] = np.zeros(1, np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((11, 9), np.float32)
    save_file(file, tensors)
    with pytest.raises(FormatError) as error:
        CausalLM.from_pretrained(tmp_path)
    for part in (
        "missing model.norm.weight",
        "unknown a.stranger",
        "model.embed_tokens.weight is (11, 9), config.json says (11, 8)",
    ):
        assert part in str(error.value)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**30}))
    with pytest.raises(FormatError, match="the file holds"):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(FormatError, match=r"and 1\d more"):
        CausalLM.from_pretrained(tmp_path)


def test_a_tied_head_may_be_stored_but_must_be_the_embedding(tmp_path: Path) -> None:
    model = CausalLM(tiny(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(file, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    assert bits(CausalLM.from_pretrained(tmp_path)) == bits(model)
    save_file(file, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(
        FormatError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"
    ):
        CausalLM.from_pretrained(tmp_path)


def test_old_buffers_in_a_file_are_passed_over(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    save_file(file, load_file(file) | buffer)
    assert bits(CausalLM.from_pretrained(tmp_path)) == bits(model)


@given(configs())
def test_the_parameter_count_is_a_formula(config: TransformerConfig) -> None:
    assert config.parameter_count() == sum(p.size for p in CausalLM(config).parameters())


def test_a_configuration_far_larger_than_its_file_is_refused_before_memory_is_asked_for(
    tmp_path: Path,
) -> None:
    CausalLM(
        TransformerConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"intermediate_size": 2**31 - 1, "vocab_size": 2**31 - 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="the file holds"):
        CausalLM.from_pretrained(tmp_path)
