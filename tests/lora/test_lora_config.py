"""LoraConfig: bad values, options that PEFT has and this package has not, reading and writing."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import small

from minilora.errors import ConfigError
from minilora.formats import PEFT_CONFIG_DEFAULTS
from minilora.lora import LoraConfig, get_peft_model
from minilora.lora.starts.values import NAMES

# ---- bad values ----

BAD: list[Any] = []


def add_bad(field: str, *values: Any) -> None:
    for value in values:
        BAD.append(pytest.param(field, value, id=f"{field}-{value!s:.30}"))


def add_bad_table(field: str, *values: Any) -> None:
    """Every one of `values` is wrong for a name, and so are other tables."""
    for value in values:
        add_bad(field, {"q": value})
    add_bad(field, {1: 2}, ["q"], "q", {"(": 2})


NOT_A_COUNT = [0, -1, True, 2.0, "8", None, math.nan, 2**24, [8]]
NOT_POSITIVE = [0, -1, True, "8", None, math.nan, math.inf, 10**400, [8]]
add_bad("r", *NOT_A_COUNT)
add_bad("lora_alpha", *NOT_POSITIVE[1:])  # 0 switches the adapter off
add_bad("target_modules", [], "", 5, [""], ["q_proj", 1], [None], True, ["x"] * 10_001)
add_bad("target_modules", "(", "a{2", "(?<=a)")
add_bad("exclude_modules", 5, [""], [1], "[a", True)
add_bad("lora_dropout", -0.1, 1.0, 1, True, None, math.nan, math.inf, "0", 10**400)
add_bad("bias", "", "some", None, True, [])
add_bad("use_rslora", 1, 0, None, "true")
add_bad("use_dora", 1, 0, None, "true")
add_bad("init_lora_weights", "", "PiSSA", "kasa", None, 1, 0, 1.0, [])
add_bad("init_lora_weights", "pissa_niter_", "pissa_niter_x", "pissa_niter_-1", "lora_ga_")
add_bad_table("rank_pattern", *NOT_A_COUNT)
add_bad_table("alpha_pattern", *NOT_POSITIVE[1:])
add_bad("layers_to_transform", True, "0", 1.0, [True], ["0"], [None])
add_bad("layers_pattern", 5, True, [1])
add_bad("layers_pattern", "layers")  # without layers_to_transform
add_bad("modules_to_save", "lm_head", [""], [1], 5, True)
add_bad("fan_in_fan_out", 1, None, "false")
add_bad("task_type", "NONSENSE", 1, True, [])
add_bad("inference_mode", 1, None, "false")


@pytest.mark.parametrize(("field", "value"), BAD)
def test_lora_config_refuses_a_bad_value_and_names_the_field(field: str, value: Any) -> None:
    has_pattern = isinstance(value, str) or (isinstance(value, dict) and "(" in value)
    names = f"{field}|^pattern" if has_pattern else field
    with pytest.raises(ConfigError, match=names) as error:
        LoraConfig(**{field: value})
    assert len(str(error.value)) <= 500
    with pytest.raises(ConfigError, match=r"^here: "):
        LoraConfig.from_dict({field: value}, "here")


def test_lora_config_refuses_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"layers_to_transform.*target_modules.*list"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=[0])


def test_lora_config_refuses_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="unknown"):
        LoraConfig(unknown=1)  # type: ignore[call-arg]


# ---- PEFT's fields ----

CHANGED = ("pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga")
OF_STARTS: dict[str, dict[str, Any]] = {
    "eva": {"eva_config": {"rho": 2.0}},
    "corda": {"corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"lora_ga_config": {"direction": "ArB2r"}},
    "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [("init_lora_weights", start) for start in ("orthogonal", "eva", "mica", *CHANGED)]
    + [("task_type", task) for task in ("SEQ_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS")],
)
def test_from_dict_keeps_what_only_a_file_may_say(field: str, value: str) -> None:
    """How training began, and for which task, changes nothing of what a file holds."""
    fields = {field: value, **OF_STARTS.get(value, {})}
    config = LoraConfig.from_dict(fields)
    assert getattr(config, field) == getattr(LoraConfig(), field)
    written = dataclasses.replace(config, r=3).to_dict()
    assert written == {**PEFT_CONFIG_DEFAULTS, **fields, "r": 3}
    if value not in NAMES and value != "pissa_niter_4":  # no start that a new adapter can have
        with pytest.raises(ConfigError, match=field):
            LoraConfig(**{field: value})


def test_from_dict_refuses_the_fields_of_another_start() -> None:
    for name, start in (("eva_config", "pissa"), ("lora_ga_config", "eva"), ("loftq_config", True)):
        with pytest.raises(ConfigError, match=name):
            LoraConfig.from_dict({"init_lora_weights": start, name: {"a": 1}})


def test_get_peft_model_refuses_a_configuration_of_a_trained_adapters_file() -> None:
    config = LoraConfig.from_dict({"init_lora_weights": "pissa", "target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match="'pissa' is that of a trained adapter's file"):
        get_peft_model(small.base(), config)


def test_from_dict_reads_the_smallest_file_that_peft_accepts() -> None:
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    config = LoraConfig.from_dict(fields)
    assert config == LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    written = config.to_dict()
    assert written == {**PEFT_CONFIG_DEFAULTS, "r": 4, "target_modules": ["q_proj"]}
    assert LoraConfig.from_dict(written).to_dict() == written


UNSUPPORTED: dict[str, Any] = {}


def add_unsupported(**options: Any) -> None:
    UNSUPPORTED.update(options)


add_unsupported(lora_bias=True)
add_unsupported(layer_replication=[[0, 1], [0, 2]])
add_unsupported(use_qalora=True)
add_unsupported(qalora_group_size=32)
add_unsupported(alora_invocation_tokens=[1, 2])
add_unsupported(target_parameters=["mlp.experts"])
add_unsupported(loftq_config={"loftq_bits": 4})
add_unsupported(eva_config={"rho": 2.0})
add_unsupported(corda_config={"a": 1})
add_unsupported(lora_ga_config={"a": 1})
add_unsupported(arrow_config={"a": 1})
add_unsupported(kasa_config={"a": 1})
add_unsupported(velora_config={"a": 1})
add_unsupported(monteclora_config={"a": 1})
add_unsupported(use_bdlora={"a": 1})
add_unsupported(megatron_config={"a": 1})
add_unsupported(megatron_core="other")
add_unsupported(init_lora_weights="kasa")
add_unsupported(peft_type="ADALORA")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_from_dict_refuses_an_unsupported_option_unless_it_is_unused(name: str) -> None:
    assert name in PEFT_CONFIG_DEFAULTS
    with pytest.raises(ConfigError, match=name):
        LoraConfig.from_dict({name: UNSUPPORTED[name]})
    unused = [PEFT_CONFIG_DEFAULTS[name]]
    if name not in ("init_lora_weights", "peft_type"):
        unused += [None, False, {}, []]
    for value in unused:
        assert LoraConfig.from_dict({name: value}).to_dict()[name] == value


def test_lora_config_covers_every_option_of_peft() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"extra"}
    harmless = {"peft_version", "revision", "auto_mapping"}
    assert fields | set(UNSUPPORTED) | harmless == set(PEFT_CONFIG_DEFAULTS)
    for name in harmless:
        assert LoraConfig.from_dict({name: "anything"}).to_dict()[name] == "anything"


def test_from_dict_keeps_old_fields_that_are_off_in_silence() -> None:
    """PEFT's first versions wrote two fields that it has no more."""
    old = {"enable_lora": None, "merge_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_dict({"r": 4, "target_modules": ["q_proj"], **old})
    assert {name: config.to_dict()[name] for name in old} == old
    with pytest.warns(UserWarning, match="'merge_weights' is not a known field; it is kept"):
        LoraConfig.from_dict({"merge_weights": True})
