"""A method's name means one configuration; defaults fit any run; contradictions are refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import (
    AdaLoraConfig,
    CausalLM,
    LoraConfig,
    TransformerConfig,
    get_peft_model,
    quantize,
)
from minilora.errors import ConfigError
from minilora.lab.demo import MODEL
from minilora.lora import RankAllocator
from minilora.quant import KINDS
from minilora.training.methods import (
    ADALORA_FIELDS,
    MAPS_BY_METHOD,
    METHODS,
    NAMES,
    QUANTIZE,
    adapter_config,
    format_weight_memory,
    measure_weight_memory,
    method_of,
)

SHAPE = TransformerConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", QUANTIZE)
def test_adapter_config_and_method_of_agree(method, kind):
    if method == "full" and kind != "none":
        return  # refused below
    config = adapter_config(method, kind, {}, 100)
    assert method_of(config) == method
    assert method in NAMES
    if method == "full":
        assert config is None
        return
    kinds = {"adalora": AdaLoraConfig, **MAPS_BY_METHOD}
    assert type(config) is kinds.get(method, LoraConfig)
    assert config.use_dora is (method == "dora")


def test_adapter_config_takes_the_given_fields():
    config = adapter_config("lora", "none", {"r": 3, "bias": "all"}, 9)
    assert config == LoraConfig(r=3, bias="all")
    config = adapter_config("dora", "none", {"r": 3}, 9)
    assert config == LoraConfig(r=3, use_dora=True)
    assert config == adapter_config("lora", "none", {"r": 3, "use_dora": True}, 9)
    fields = {"target_r": 2, "init_r": 7, "tinit": 5, "tfinal": 6, "deltaT": 3}
    fields |= {"beta1": 0.5, "beta2": 0.25, "orth_reg_weight": 0.75}
    assert set(fields) == set(ADALORA_FIELDS)
    config = adapter_config("adalora", "none", {**fields, "bias": "all"}, 99)
    assert config == AdaLoraConfig(**fields, bias="all", total_step=99)


@given(steps=st.integers(1, 2**24 - 1), r=st.none() | st.integers(1, 2**20))
def test_adalora_defaults_fit_every_length_of_run(steps, r):
    fields = {} if r is None else {"r": r}
    config = adapter_config("adalora", "nf4", fields, steps)
    final = r or 8
    assert config.target_r == final
    assert config.init_r == math.ceil(1.5 * final)
    assert config.total_step == steps
    assert config.tinit < steps - config.tfinal
    assert 10 * config.tinit <= steps
    assert 4 * config.tfinal <= steps
    assert 1 <= config.deltaT <= max(1, steps / 100)


def test_adalora_defaults_meet_the_budget():
    config = adapter_config("adalora", "none", {"r": 4}, 200)
    allocator = RankAllocator.of(get_peft_model(CausalLM(SHAPE), config))
    layers = len(allocator.adapters)
    budgets = [allocator.budget(t) for t in range(201)]
    assert budgets[:21] == [6 * layers] * 21
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[150:] == [4 * layers] * 51
    assert 6 * layers > budgets[50] > 4 * layers


REFUSED = []


def refuse(named, method, fields, kind="none"):
    REFUSED.append((named, method, fields, kind))


refuse("'lohi'", "lohi", {})
refuse("lora_alpha = 8: LoHa has no such field; its fields are alpha, ", "loha", {"lora_alpha": 8})
refuse(
    "n_frequency: method lora has no such field; methods with it: fourierft",
    "lora",
    {"n_frequency": 8},
)
refuse("deltaT = 1: OFT has no such field", "oft", {"deltaT": 1})
refuse("'nf5'", "lora", {}, "nf5")
refuse("r, bias", "full", {"r": 4, "bias": "all"})
refuse("quantize = nf4", "full", {}, "nf4")
for field in ADALORA_FIELDS:
    refuse(field, "lora", {field: 1})
refuse("tinit, beta1", "dora", {"tinit": 1, "beta1": 0.5}, "int8")
refuse("r and target_r", "adalora", {"r": 4, "target_r": 4})
refuse("use_dora", "adalora", {"use_dora": True})
refuse("use_rslora", "adalora", {"use_rslora": True})
refuse("alpha_pattern", "adalora", {"alpha_pattern": {"q_proj": 3}})
refuse("tinit must be below total_step - tfinal = 75", "adalora", {"tinit": 75})
refuse("tinit must be below", "adalora", {"tfinal": 100})
refuse("target_r", "adalora", {"r": 0})
refuse("got '4'", "adalora", {"r": "4"})
refuse("init_r = 4", "adalora", {"target_r": 9, "init_r": 4})
refuse("r must be", "lora", {"r": 0})
refuse("init_lora_weights", "dora", {"init_lora_weights": "magic"})


@pytest.mark.parametrize(("named", "method", "fields", "kind"), REFUSED)
def test_adapter_config_error_names_what_does_not_go_together(named, method, fields, kind):
    with pytest.raises(ConfigError) as caught:
        adapter_config(method, kind, fields, 100)
    assert named in str(caught.value)


def test_measure_weight_memory_of_the_demo_in_nf4_is_an_eighth():
    """In per cent of float32: 4.13 bits per weight of a layer; the embedding stays in float32."""
    report = measure_weight_memory(quantize(CausalLM(MODEL), "nf4"))
    assert report["percent"] <= 13.1
    assert report["all_percent"] <= 20.0


@pytest.mark.parametrize("kind", KINDS)
def test_measure_weight_memory_counts_every_byte(kind):
    plain = CausalLM(SHAPE)
    assert measure_weight_memory(plain)["kind"] == "none"
    model = quantize(CausalLM(SHAPE), kind)
    report = measure_weight_memory(model)
    code = 1 if kind == "int8" else 0.5

    def size(n):
        # Codes; one byte for the absmax of each 64 codes; one float for each 256 of those, counted
        # anew in each layer; and the float of their mean.
        return n * code + n // 64 + 4 * math.ceil(n / 64 / 256) + 4

    square, wide = 64 * 64, 64 * 96  # 4 and 3 layers in each of the 2 blocks
    weights = 2 * (4 * square + 3 * wide)
    others = model.config.parameter_count() - weights
    assert report["kind"] == kind
    assert report["layers"] == 14
    assert report["weights"] == weights
    assert report["bytes"] == 2 * (4 * size(square) + 3 * size(wide))
    assert report["all_weights"] == weights + others
    assert report["all_bytes"] == report["bytes"] + 4 * others
    assert report["percent"] == pytest.approx(100 * report["bytes"] / (4 * weights))
    percent = 100 * report["all_bytes"] / (4 * (weights + others))
    assert report["all_percent"] == pytest.approx(percent)
    text = format_weight_memory(report)
    assert f"{weights:,} weights of 14 layers in {report['bytes']:,} bytes of {kind}" in text
    assert f"all {report['all_weights']:,} in {report['all_bytes']:,}, {percent:.1f} %" in text
