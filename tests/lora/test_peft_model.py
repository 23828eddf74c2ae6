"""PeftModel: which layers get an adapter, what trains, switching, merging, counting, explaining.

What holds for every method, over every base and backend, is in test_method_table.py.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from methods import layers, move
from peft_models import (
    NAMES,
    PATHS,
    PREFIX,
    adapted,
    base,
    configs,
    is_close,
    lora,
    owned,
    trainable,
    with_two_adapters,
)
from small import CONFIG, IDS, bits, logits

import minilora.lora
from minilora import functional as F
from minilora.autograd import gradients
from minilora.errors import ConfigError, MiniloraError
from minilora.lora import LoraConfig, PeftModel, SavedModule, get_layer_status, get_peft_model
from minilora.models.transformer import CausalLM
from minilora.optim import SGD

# ---- which layers get an adapter ----

TARGETS: list[Any] = []


def expect_layers(expected: str, **options: Any) -> None:
    """These options mean the layers in whose paths the pattern `expected` occurs."""
    TARGETS.append((options, expected))


expect_layers(r"self_attn\.[qv]_proj", target_modules=None)
expect_layers(r"self_attn\.q_proj", target_modules=["q_proj"])
expect_layers(r"self_attn\.q_proj", target_modules=("q_proj",))
expect_layers(r"(q|up)_proj", target_modules={"q_proj", "up_proj"})
expect_layers(r"q_proj", target_modules=["self_attn.q_proj"])
expect_layers(r"layers\.0.*q_proj", target_modules=["0.self_attn.q_proj"])
expect_layers(r"1.*up_proj", target_modules=["model.layers.1.mlp.up_proj"])
expect_layers(r"lm_head", target_modules=["lm_head"])
expect_layers(r"[kv]_proj", target_modules=r".*\.self_attn\.[kv]_proj")
expect_layers(r"layers\.1", target_modules=r"model\.layers\.1\..*_proj")
expect_layers(r"layers", target_modules="all-linear")
expect_layers(r"layers", target_modules="ALL-Linear")
expect_layers(r"layers(?!.*down)", target_modules="all-linear", exclude_modules=["down_proj"])
expect_layers(r"layers\.1", target_modules="all-linear", exclude_modules=r".*\.0\..*")
NOT_0_K = ["0.self_attn.k_proj"]
expect_layers(r"q_proj|1.*k_proj", target_modules=["q_proj", "k_proj"], exclude_modules=NOT_0_K)
expect_layers(r"1.*q_proj", target_modules=["q_proj"], layers_to_transform=1)
expect_layers(r"0.*q_proj", target_modules=["q_proj"], layers_to_transform=[0])
BELOW_LAYERS = {"target_modules": ["q_proj"], "layers_pattern": "layers"}
expect_layers(r"0.*q_proj", **BELOW_LAYERS, layers_to_transform=[0])
BELOW_H_OR_LAYERS = {"target_modules": ["q_proj"], "layers_pattern": ["h", "layers"]}
expect_layers(r"q_proj", **BELOW_H_OR_LAYERS, layers_to_transform=[0, 1])
expect_layers(r"layers\.1", target_modules="all-linear", layers_to_transform=[1])
expect_layers(r"self_attn", target_modules="all-linear", modules_to_save=["mlp"])
expect_layers(
    r"self_attn|1\.mlp", target_modules="all-linear", modules_to_save=["0.mlp", "lm_head"]
)
expect_layers(r"(?<!k)_proj", target_modules=r".*_proj", modules_to_save=["k_proj"])


@pytest.mark.parametrize(("options", "expected"), TARGETS)
def test_get_peft_model_adapts_the_layers_that_the_options_mean(
    options: dict[str, Any], expected: str
) -> None:
    model = adapted(**options)
    paths = {path for path in [*PATHS, "lm_head"] if re.search(expected, path)}
    assert set(layers(model)) == paths
    for path in paths:
        assert factors(path) <= trainable(model)


def factors(path: str) -> set[str]:
    return {f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight"}


def test_get_peft_model_writes_out_which_layers_are_meant() -> None:
    config = lora(target_modules="all-linear")
    model = get_peft_model(base(), config)
    assert model.peft_config["default"].target_modules == sorted(PATHS)
    assert config.target_modules == "all-linear"  # the caller's own object does not change
    by_type = adapted(target_modules=None).peft_config["default"]
    assert by_type.target_modules == ["q_proj", "v_proj"]


MISTAKES: list[Any] = []


def expect_error(message: str, **options: Any) -> None:
    MISTAKES.append((options, message))


expect_error(r"target_modules.*'qproj'.*down_proj, gate_proj", target_modules=["q_proj", "qproj"])
expect_error(r"target_modules.*'proj'", target_modules=["proj"])
expect_error(r"modules_to_save.*'heads'", modules_to_save=["heads"])
# A pattern is for the whole name.
expect_error("target_modules.*'q_proj'", target_modules="q_proj")
expect_error(r"exclude_modules.*'v_proj'", exclude_modules=["self_attn.q_proj", "v_proj"])
expect_error(r"layers_to_transform.*7", layers_to_transform=7)
expect_error(r"model\.layers\.0\.mlp\b.*MLP", target_modules=["mlp"])
expect_error(r"model\.norm\b.*RMSNorm", target_modules=["model.norm"])
expect_error(r"target_modules.*'q_proj'", target_modules=["q_proj"], modules_to_save=["q_proj"])
expect_error(r"mlp\b.*saved", modules_to_save=["mlp", "up_proj"])
expect_error(r"\(\.\*", target_modules=r"(.*")


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_get_peft_model_refuses_what_does_not_fit_and_changes_nothing(
    options: dict[str, Any], message: str
) -> None:
    plain = base()
    before = bits(plain)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(plain, lora(**options))
    assert bits(plain) == before  # names and values: nothing was wrapped
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("wrong", [{"r": 4}, None, "lora"])
def test_get_peft_model_refuses_what_is_not_a_configuration(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="LoraConfig"):
        get_peft_model(base(), wrong)


def test_get_peft_model_refuses_what_is_not_a_model() -> None:
    with pytest.raises(ConfigError, match="'base'"):
        get_peft_model("base", lora())


@pytest.mark.parametrize("name", ["", ".", "..", "a.b", "a.", 3, None])
def test_get_peft_model_refuses_a_name_with_a_dot_or_without_a_character(name: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        get_peft_model(base(), lora(), name)


@pytest.mark.parametrize("name", ["a.b", "default"])
def test_add_adapter_refuses_a_name_and_changes_nothing(name: str) -> None:
    model = with_two_adapters()
    before = bits(model)
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        model.add_adapter(name, lora())
    assert bits(model) == before


WARNINGS: list[Any] = []


def expect_warning(message: str, **options: Any) -> None:
    WARNINGS.append((options, message))


expect_warning("exclude_modules.*up_proj", exclude_modules=["up_proj"])
expect_warning("rank_pattern.*'up_proj'", rank_pattern={"up_proj": 3})
expect_warning("alpha_pattern.*'proj'", alpha_pattern={"proj": 3})
expect_warning("v_proj.*9.*8", r=9)
expect_warning("fan_in_fan_out.*False", fan_in_fan_out=True)


@pytest.mark.parametrize(("options", "message"), WARNINGS)
def test_get_peft_model_warns_once_about_what_is_hardly_meant(
    options: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        model = get_peft_model(base(), lora(**options))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert model.peft_config["default"].fan_in_fan_out is False


PATTERNS: list[Any] = []


def expect_ranks(ranks: list[int], **patterns: int) -> None:
    """The ranks of q_proj and v_proj, in layer 0 and in layer 1."""
    PATTERNS.append((patterns, ranks))


expect_ranks([2, 2, 2, 2])
expect_ranks([3, 2, 3, 2], q_proj=3)
expect_ranks([2, 2, 1, 2], **{"layers.1.self_attn.q_proj": 1})
expect_ranks([3, 2, 1, 2], **{"layers.1.self_attn.q_proj": 1, "q_proj": 3})
# The first match counts.
expect_ranks([3, 2, 3, 2], **{"q_proj": 3, "layers.1.self_attn.q_proj": 1})
expect_ranks([4, 4, 2, 2], **{r"layers\.0\..*": 4})
expect_ranks([2, 2, 2, 1], **{r"^model\.layers\.1.*v_proj": 1})
expect_ranks([1, 1, 1, 1], **{"[qv]_proj": 1})


@pytest.mark.parametrize(("patterns", "ranks"), PATTERNS)
def test_get_peft_model_takes_ranks_and_scales_from_patterns(
    patterns: dict[str, int], ranks: list[int]
) -> None:
    model = adapted(rank_pattern=patterns, alpha_pattern=patterns, lora_alpha=2)
    adapters = [layer.adapters["default"] for layer in layers(model).values()]
    assert [len(adapter.lora_A) for adapter in adapters] == ranks
    # alpha / r, both from their patterns
    assert [adapter.scaling for adapter in adapters] == [1] * 4


# ---- first values ----


def test_get_peft_model_of_the_lesson() -> None:
    assert {"LoraConfig", "get_peft_model"} <= set(minilora.lora.__all__)
    config = dataclasses.replace(CONFIG, hidden_size=128, num_key_value_heads=2, head_dim=64)
    model = CausalLM(config)
    lora_config = LoraConfig(
        r=64,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.1,
        bias="none",
        task_type="CAUSAL_LM",
    )
    before = logits(model)
    model = get_peft_model(model, lora_config)
    assert np.array_equal(logits(model), before)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 64 * (128 + 128)
    assert {layer.adapters["default"].scaling for layer in layers(model).values()} == {0.25}


@given(
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sampled_from(["default", "other"]),
    st.integers(0, 99),
)
def test_get_peft_model_takes_first_values_from_the_seed_and_the_layer_alone(
    names: set[str], adapter: str, seed: int
) -> None:
    all_layers = lora(target_modules="all-linear")
    some_layers = lora(target_modules=sorted(names))
    whole = get_peft_model(base(), all_layers, seed=seed).state_dict()
    some = get_peft_model(base(), some_layers, adapter, seed=seed).state_dict(adapter)
    other = get_peft_model(base(), some_layers, seed=seed + 1).state_dict()
    assert len(some) == 4 * len(names)
    for key, array in some.items():
        assert np.array_equal(array, whole[key])
        assert not np.array_equal(other[key], array)
    assert len({array.tobytes() for array in whole.values()}) == len(whole)


@pytest.mark.parametrize("training", [True, False])
def test_add_adapter_puts_the_adapter_into_the_mode_of_its_model(training: bool) -> None:
    config = lora(lora_dropout=0.5)
    model = get_peft_model(base().train(training), config)
    model.add_adapter("b", config)
    for name in ("default", "b"):
        model.set_adapter(name)
        assert np.array_equal(logits(model), logits(model)) is not training


def test_add_adapter_gives_each_adapter_of_a_layer_its_own_masks() -> None:
    model = adapted(lora_dropout=0.5)
    model.add_adapter("b", lora(lora_dropout=0.5))
    for layer in layers(model).values():
        assert layer.adapters["default"].dropout.stream != layer.adapters["b"].dropout.stream


# ---- counts ----


def find_targets(config: LoraConfig) -> dict[str, tuple[int, int]]:
    """The layers that a configuration of `configs` means, by path, with (in, out)."""
    names = config.target_modules
    numbers = [0, 1]
    if isinstance(names, str):
        numbers = [1]
        names = names.partition("(")[2].rstrip(")").split("|")
    elif isinstance(config.layers_to_transform, int):
        numbers = [config.layers_to_transform]
    elif config.layers_to_transform is not None:
        numbers = config.layers_to_transform
    assert names is not None
    targets = {}
    for path, size in PATHS.items():
        parts = path.split(".")
        if parts[-1] in names and int(parts[2]) in numbers:
            targets[path] = size
    return targets


# "norm" also ends the names of the layers' norms.
SAVED = {"lm_head": 16 * 16, "norm": 5 * 16, "embed_tokens": 16 * 16}


@given(configs())
def test_get_nb_trainable_parameters_follows_the_formula(config: LoraConfig) -> None:
    plain = base()
    total = sum(p.size for p in plain.parameters())
    model = get_peft_model(plain, config)
    targets = find_targets(config)
    assert set(layers(model)) == set(targets)
    added = sum(SAVED[name] for name in config.modules_to_save or [])
    biases = 0
    for path, (n, m) in PATHS.items():
        if path in targets:
            r = config.rank_pattern.get(path.rpartition(".")[2], config.r)
            added += r * (n + m)
        trains = config.bias == "all" or (config.bias == "lora_only" and path in targets)
        if trains and "self_attn" in path:  # only these layers have a bias
            biases += m
    assert model.get_nb_trainable_parameters() == (added + biases, total + added)


def test_print_trainable_parameters_prints_as_peft(capsys: pytest.CaptureFixture[str]) -> None:
    plain = base(tie_word_embeddings=True)
    total = sum(p.size for p in plain.parameters()) + 224
    get_peft_model(plain, lora()).print_trainable_parameters()
    share = f"{22400 / total:.4f}"
    expected = f"trainable params: 224 || all params: {total:,} || trainable%: {share}\n"
    assert capsys.readouterr().out == expected


# ---- what trains ----


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_get_peft_model_trains_the_adapter_its_saved_modules_and_biases_alone(bias: str) -> None:
    plain = base()
    original = bits(plain)
    model = get_peft_model(plain, lora(bias=bias, modules_to_save=["lm_head"]))
    biases = set()
    expected = {"lm_head.modules_to_save.default.weight"}
    for i in (0, 1):
        attention = f"model.layers.{i}.self_attn"
        for name in "qv":
            expected |= factors(f"{attention}.{name}_proj")
            if bias != "none":
                biases.add(f"{attention}.{name}_proj.base_layer.bias")
        if bias == "all":
            biases |= {f"{attention}.k_proj.bias", f"{attention}.o_proj.bias"}
    expected |= biases
    assert trainable(model) == expected
    keys = {name.replace(".default", "").replace(".modules_to_save", "") for name in expected}
    assert set(model.state_dict()) == {PREFIX + key for key in keys}

    before = bits(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(params, lr=0.1)
    for _ in range(3):
        loss = F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])
        optimizer.step(gradients(loss, params))
    assert find_changes(before, bits(model)) == {PREFIX + name for name in expected}
    model.unload()
    of_base = {name.replace(".base_layer", "") for name in biases}
    assert find_changes(original, bits(plain)) == of_base


def find_changes(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name, data in after.items() if data != before[name]}


# ---- the base without adapters ----


@given(configs(), st.sampled_from(["float32", "float64"]))
def test_disable_adapter_and_unload_give_the_base_bit_for_bit(
    config: LoraConfig, dtype: str
) -> None:
    plain = base(dtype)
    original = bits(plain)
    before = logits(plain).tobytes()
    model = get_peft_model(plain, dataclasses.replace(config, bias="none"))
    if config.init_lora_weights is not False:
        assert logits(model).tobytes() == before
    move(model, "default")
    changed = logits(model.eval()).tobytes()
    assert changed != before
    with model.disable_adapter():
        assert logits(model).tobytes() == before
    assert logits(model).tobytes() == changed
    assert {p.dtype for p in model.parameters()} == {np.dtype(dtype)}
    assert model.unload() is plain
    assert logits(plain).tobytes() == before
    assert bits(plain) == original
    assert all(p.requires_grad for p in plain.parameters())


def test_disable_adapter_warns_if_the_base_s_biases_were_trained() -> None:
    model = adapted(bias="all")
    with pytest.warns(UserWarning, match="bias"), model.disable_adapter():
        pass


def test_disable_adapter_does_not_concern_other_threads() -> None:
    model = adapted().eval()
    expected = logits(model)
    results = []
    with model.disable_adapter():
        disabled = logits(model)
        thread = threading.Thread(target=lambda: results.append(logits(model)))
        thread.start()
        thread.join()
    assert np.array_equal(results[0], expected)
    assert not np.array_equal(disabled, expected)


def test_modules_to_save_replace_the_original() -> None:
    plain = base(tie_word_embeddings=True)
    before = logits(plain)
    model = get_peft_model(plain, lora(init_lora_weights=True, modules_to_save=["lm_head"]))
    assert np.array_equal(logits(model), before)
    head = model.get_base_model().lm_head
    assert isinstance(head, SavedModule)
    weight = head.current.weight
    assert weight is not head.original_module.weight
    weight.data = weight.data * 2
    assert np.array_equal(logits(model), before * 2)
    with model.disable_adapter():
        assert np.array_equal(logits(model), before)
    merged = model.merge_and_unload()
    assert np.array_equal(logits(merged), before * 2)
    # The head is not the embedding any more, and the files must say so.
    assert not merged.config.tie_word_embeddings


# ---- switching ----


def test_set_adapter_decides_what_trains() -> None:
    model = with_two_adapters()
    first = owned(model, "default")
    second = owned(model, "b")
    assert len(first) == 8
    assert len(second) == 8 + 5
    assert trainable(model) == first
    model.set_adapter("b")
    assert trainable(model) == second
    assert model.active_adapters == ["b"]
    model.set_adapter(["default"])
    assert trainable(model) == first
    model.set_adapter(["default", "b"])
    assert trainable(model) == first | second
    assert model.active_adapters == ["default", "b"]
    assert model.active_adapter == "default"


def test_set_adapter_counts_a_name_once() -> None:
    model = with_two_adapters()
    model.set_adapter("b")
    once = logits(model)
    model.set_adapter(["b", "b"])
    assert model.active_adapters == ["b"]
    assert np.array_equal(logits(model), once)


def test_set_adapter_in_inference_mode_trains_nothing() -> None:
    model = with_two_adapters()
    model.set_adapter("b")
    before = logits(model)
    model.set_adapter("b", inference_mode=True)
    assert trainable(model) == set()
    assert np.array_equal(logits(model), before)
    model.set_adapter("default")
    assert trainable(model) == owned(model, "default")


@pytest.mark.parametrize("names", [["b", "c"], "c", []])
def test_set_adapter_refuses_unknown_names_and_changes_nothing(names: Any) -> None:
    model = with_two_adapters()
    with pytest.raises(ConfigError, match="default, b") as error:
        model.set_adapter(names)
    assert ("'c'" in str(error.value)) == bool(names)
    assert model.active_adapters == ["default"]
    assert trainable(model) == owned(model, "default")


def test_delete_adapter_activates_the_first_of_the_others() -> None:
    model = with_two_adapters()
    model.add_adapter("c", lora())
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert trainable(model) == owned(model, "b")


def test_delete_adapter_takes_its_wrappers_out() -> None:
    model = with_two_adapters()
    model.delete_adapter("default")
    assert {path.rpartition(".")[2] for path in layers(model)} == {"q_proj", "up_proj"}


def test_delete_adapter_of_an_inactive_adapter_leaves_the_active_one_unchanged() -> None:
    model = adapted()
    model.add_adapter("b", lora())
    model.set_adapter("default", inference_mode=True)
    model.delete_adapter("b")
    assert trainable(model) == set()


def test_delete_adapter_of_the_only_one_leaves_the_base() -> None:
    plain = base()
    before = logits(plain).tobytes()
    model = get_peft_model(plain, lora(bias="all"))
    model.delete_adapter("default")
    assert not layers(model)
    assert model.active_adapter is None
    assert trainable(model) == set()
    assert logits(model).tobytes() == before
    with pytest.raises(ConfigError, match=r"no adapter \(none named\); the model has none: add_ad"):
        model.merge_adapter()
    model.add_adapter("b", lora())
    model.set_adapter("b")
    assert trainable(model) == owned(model, "b")


def test_disable_adapter_layers_holds_for_adapters_that_are_added_later() -> None:
    model = adapted()
    model.merge_adapter()
    model.disable_adapter_layers()
    before = logits(model).tobytes()
    assert not model.merged_adapters
    assert trainable(model) == set()
    model.add_adapter("b", lora(target_modules=["up_proj"], init_lora_weights=False))
    model.set_adapter("b")
    assert logits(model).tobytes() == before
    with pytest.raises(ConfigError, match=r"disabled, .*enable_adapter_layers\(\) first"):
        model.merge_adapter()
    model.enable_adapter_layers()
    assert logits(model).tobytes() != before
    assert trainable(model) == owned(model, "b")


def test_load_adapter_under_a_taken_name_replaces_it_or_changes_nothing(tmp_path: Path) -> None:
    other = get_peft_model(base(), lora(r=3, target_modules=["up_proj"], init_lora_weights=False))
    other.save_pretrained(tmp_path / "other")
    model = adapted()
    before = logits(model).tobytes()
    (tmp_path / "broken").mkdir()
    with pytest.raises(MiniloraError):
        model.load_adapter(tmp_path / "broken", "default")
    assert logits(model).tobytes() == before
    with pytest.warns(UserWarning, match="adapter 'default' is replaced"):
        model.load_adapter(tmp_path / "other", "default")
    assert model.peft_config["default"].r == 3
    assert trainable(model) == owned(model, "default")
    assert logits(model).tobytes() == logits(other).tobytes()
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"'default' is merged: call unmerge_adapter\(\)"):
        model.load_adapter(tmp_path / "other", "default")


def test_load_state_dict_takes_one_adapter_s_tensors_all_or_none() -> None:
    model, other = with_two_adapters(), with_two_adapters()
    move(other, "b", 3)
    state = other.state_dict("b")
    before = model.state_dict("b")
    name = next(iter(state))
    for wrong in ({**state, "x": state[name]}, {**state, name: state[name][:1]}, {}):
        with pytest.raises(ConfigError, match="adapter 'b'"):
            model.load_state_dict(wrong, "b")
        for key, tensor in model.state_dict("b").items():
            np.testing.assert_array_equal(tensor, before[key])
    model.load_state_dict(state, "b")
    for key, tensor in model.state_dict("b").items():
        np.testing.assert_array_equal(tensor, state[key])


def test_get_model_status_counts_parameters_by_adapter() -> None:
    model = with_two_adapters()
    status = model.get_model_status()
    for name, count in status.parameters.items():
        parameters = model.adapter_parameters(name).values()
        assert count == sum(parameter.size for parameter in parameters)
    assert status.trainable_params == status.parameters["default"]
    assert sum(sum(layer.parameters.values()) for layer in model.get_layer_status()) == sum(
        status.parameters.values()
    )
    with pytest.raises(ConfigError, match="expected a model with adapters, but CausalLM has none"):
        get_layer_status(model.unload())


# ---- adapters that cannot be together ----


def with_biases_and_head() -> PeftModel:
    return adapted(bias="all", modules_to_save=["lm_head"])


CLASHES: list[Any] = []


def add_clash(message: str, **options: Any) -> None:
    CLASHES.append((options, message))


add_clash("'default'.*bias", bias="lora_only")
add_clash("q_proj.*saved", modules_to_save=["q_proj"], target_modules=["k_proj"])
add_clash("self_attn.*saved", modules_to_save=["self_attn"], target_modules=["up_proj"])
add_clash("lm_head.*saved", target_modules=["lm_head"])


@pytest.mark.parametrize(("options", "message"), CLASHES)
def test_add_adapter_refuses_what_another_adapter_excludes(
    options: dict[str, Any], message: str
) -> None:
    model = with_biases_and_head()
    before = bits(model)
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("b", lora(**options))
    assert bits(model) == before
    assert list(model.peft_config) == ["default"]


def test_set_adapter_refuses_two_copies_of_one_module() -> None:
    model = with_biases_and_head()
    model.add_adapter("c", lora(modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="default, c"):
        model.set_adapter(["default", "c"])
    assert model.active_adapters == ["default"]


def test_get_peft_model_refuses_a_model_with_adapters() -> None:
    model = adapted()
    for wrapped in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match="adapters"):
            get_peft_model(wrapped, lora())


def test_merge_adapter_keeps_merged_adapters_from_being_deleted() -> None:
    model = with_biases_and_head()
    model.add_adapter("c", lora(modules_to_save=["lm_head"]))
    model.set_adapter("c")
    model.merge_adapter(["c"])
    with pytest.raises(ConfigError, match="merged"):
        model.delete_adapter("c")
    with pytest.warns(UserWarning, match="unmerged, to be inactive: c"):
        model.set_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("c")
    assert list(model.peft_config) == ["default"]


def test_merge_and_unload_keeps_the_copy_that_its_own_adapter_saved() -> None:
    config = lora(modules_to_save=["lm_head"])
    model = get_peft_model(base(), config)
    model.add_adapter("b", config)
    heads = model.get_base_model().lm_head.modules_to_save
    merged = model.merge_and_unload(adapter_names=["b"])
    assert merged.lm_head is heads["b"]


class Adapters(RuleBasedStateMachine):
    """Adapters are added, switched, merged and removed in any order.

    The model's output and its trainable parameters are known at every moment.
    """

    POOL = ("x", "y", "z")
    CHOICES = st.sampled_from(
        (["q_proj"], ["q_proj", "v_proj"], "all-linear", ["lm_head", "up_proj"])
    )

    @initialize(modules=CHOICES)
    def start(self, modules: Any) -> None:
        plain = base(num_hidden_layers=1)
        self.original = bits(plain)
        self.before = logits(plain).tobytes()
        self.model = get_peft_model(plain, lora(target_modules=modules), "x")
        self.adapters = ["x"]
        self.active = ["x"]
        self.merged: list[str] = []

    def refuses(self, message: str, call: Any, *inputs: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            call(*inputs)

    @precondition(lambda self: len(self.adapters) < 3)
    @rule(modules=CHOICES, r=st.integers(1, 4), seed=st.integers(0, 9))
    def add(self, modules: Any, r: int, seed: int) -> None:
        name = next(name for name in self.POOL if name not in self.adapters)
        self.model.add_adapter(name, lora(target_modules=modules, r=r), seed=seed)
        self.adapters.append(name)

    @rule(names=st.lists(st.sampled_from(POOL), min_size=1, unique=True))
    def switch(self, names: list[str]) -> None:
        if not set(names) <= set(self.adapters):
            self.refuses("no adapter", self.model.set_adapter, names)
            return
        if set(self.merged) <= set(names):
            self.model.set_adapter(names)
        else:
            with pytest.warns(UserWarning, match="unmerged"):
                self.model.set_adapter(names)
            self.merged = []
        self.active = names

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(name=st.sampled_from(POOL))
    def delete(self, name: str) -> None:
        if name not in self.adapters or name in self.merged:
            self.refuses("adapter", self.model.delete_adapter, name)
            return
        self.model.delete_adapter(name)
        self.adapters.remove(name)
        if name in self.active:
            others = [other for other in self.active if other != name]
            self.active = others or self.adapters[:1]

    def note_merged(self, names: list[str]) -> None:
        for name in names:
            if name not in self.merged:
                self.merged.append(name)

    @rule()
    def merge_active(self) -> None:
        self.model.merge_adapter()
        self.note_merged(self.active)

    @rule(names=st.lists(st.sampled_from(POOL), min_size=1))
    def merge(self, names: list[str]) -> None:
        known = [name for name in names if name in self.adapters]
        if not set(known) <= set(self.active):
            self.refuses("not active", self.model.merge_adapter, known)
        elif known:
            self.model.merge_adapter(known)
            self.note_merged(known)

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @rule(modules=CHOICES)
    def unload(self, modules: Any) -> None:
        plain = self.model.unload()
        assert bits(plain) == self.original
        assert logits(plain).tobytes() == self.before
        self.start(modules)

    @rule(modules=CHOICES)
    def merge_and_unload(self, modules: Any) -> None:
        self.note_merged(self.active)
        expected = self.expected()
        plain = self.model.merge_and_unload()
        assert set(bits(plain)) == set(self.original)
        assert is_close(logits(plain), expected, 1e-11)
        self.start(modules)

    def expected(self) -> np.ndarray:
        """The logits of a plain model to whose weights the adapters in use are added here."""
        plain = base(num_hidden_layers=1)
        weights = dict(plain.named_parameters())
        for path, layer in layers(self.model).items():
            weight = weights[f"{path}.weight"]
            for name in self.active:  # the merged ones are among them
                if name in layer.adapters:
                    adapter = layer.adapters[name]
                    dW = adapter.scaling * adapter.lora_B.data @ adapter.lora_A.data
                    weight.data = weight.data + dW
        return logits(plain)

    @invariant()
    def output_and_parameters_are_as_expected(self) -> None:
        if not hasattr(self, "model"):
            return
        model = self.model
        assert is_close(logits(model), self.expected(), 1e-11)
        before = bits(model)
        with model.disable_adapter():
            assert logits(model).tobytes() == self.before
            disabled = bits(model)
        assert bits(model) == before
        for name, data in self.original.items():
            path, _, last = name.rpartition(".")
            inside = f"{PREFIX}{path}.base_layer.{last}"
            assert disabled.get(inside, disabled.get(PREFIX + name)) == data
        assert trainable(model) == set().union(*(owned(model, name) for name in self.active))
        assert list(model.peft_config) == self.adapters
        assert model.active_adapters == self.active


TestAdapters = Adapters.TestCase


# ---- what a model shows ----


def test_repr_shows_where_adapters_can_go_and_where_they_are() -> None:
    sizes = "in_features=16, out_features=16, bias=True, float64"
    model = base()
    assert f"(q_proj): Linear({sizes}, requires_grad=True)\n" in repr(model)
    config = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj"])
    lines = [line.strip() for line in repr(get_peft_model(model, config)).splitlines()]
    start = lines.index("(q_proj): LoraLinear(")
    numbers = "r=2, lora_alpha=6, lora_dropout=0.1, lora_A=(2, 16), lora_B=(16, 2)"
    assert lines[start + 1 : start + 5] == [
        "active: default",
        f"(base_layer): Linear({sizes}, requires_grad=False)",
        f"(adapters.default): LoraAdapter({numbers}, float64, requires_grad=True)",
        ")",
    ]


FEW = 1
MANY = 10_000


@pytest.mark.parametrize(("tokens", "joint"), [(FEW, False), (MANY, True)])
def test_prepare_step_joins_projections_if_the_step_has_many_tokens(
    tokens: int, joint: bool
) -> None:
    attention = adapted().get_base_model().model.layers[0].self_attn
    attention.prepare_step(tokens)
    assert any(attention._effective.values()) == joint
    # q_proj is a part of the joint weight, or computes W x + s B A x.
    assert not any(attention.q_proj._effective.values())


def test_explain_shows_how_each_layer_computes_a_step() -> None:
    model = adapted(target_modules=["q_proj", "down_proj"]).train()
    few = model.explain(FEW).splitlines()
    many = model.explain(MANY).splitlines()
    assert len(few) == len(many) == 4
    assert all(": W, then A and B " in line for line in few)
    assert all(": W + dW " in line for line in many)
    for line in few:
        layer = layers(model)[line.partition(":")[0]]
        merged, apart = layer.count_operations(FEW)
        assert f"{merged:,} operations" in line
        assert f"{apart:,}" in line


def test_explain_shows_no_merged_weight_with_dropout() -> None:
    model = adapted(lora_dropout=0.5).train()
    assert ": W + dW " not in model.explain(MANY)
