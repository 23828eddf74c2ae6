"""A method's name means one configuration, its defaults fit any length of run, and contradictions are refused."""

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
from minilora.lora import RankAllocator
from minilora.quant import KINDS
from minilora.training.methods import (
    ADALORA_FIELDS,
    METHODS,
    NAMES,
    QUANTIZE,
    adapter_config,
    format_weight_memory,
    measure_weight_memory,
    method_of,
)

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", QUANTIZE)
def test_a_name_means_its_method(method, kind):
    if method == "full" and kind != "none":
        return  # refused below
    config = adapter_config(method, kind, {}, 100)
    assert method_of(config) == method
    assert method in NAMES
    if method == "full":
        assert config is None
    else:
        assert type(config) is (AdaLoraConfig if method == "adalora" else LoraConfig)
        assert config.use_dora is (method == "dora")


def test_the_fields_that_are_given_are_the_configurations():
    assert adapter_config("lora", "none", {"r": 3, "bias": "all"}, 9) == LoraConfig(r=3, bias="all")
    assert adapter_config("lora", "none", {"r": 3, "use_dora": True}, 9) == adapter_config(
        "dora", "none", {"r": 3}, 9
    )
    given = {
        "target_r": 2,
        "init_r": 7,
        "tinit": 5,
        "tfinal": 6,
        "deltaT": 3,
        "beta1": 0.5,
        "beta2": 0.25,
    }
    given["orth_reg_weight"] = 0.75
    assert set(given) == set(ADALORA_FIELDS)
    assert adapter_config("adalora", "none", {**given, "bias": "all"}, 99) == AdaLoraConfig(
        **given, bias="all", total_step=99
    )


@given(steps=st.integers(1, 2**24 - 1), r=st.none() | st.integers(1, 2**20))
def test_adalora_has_a_schedule_for_every_length(steps, r):
    config = adapter_config("adalora", "nf4", {} if r is None else {"r": r}, steps)
    assert (config.target_r, config.init_r) == (r or 8, math.ceil(1.5 * (r or 8)))
    assert config.total_step == steps
    assert config.tinit < steps - config.tfinal
    assert 10 * config.tinit <= steps
    assert 4 * config.tfinal <= steps
    assert 1 <= config.deltaT <= max(1, steps / 100)


def test_the_defaults_meet_the_budget():
    model = CausalLM(TransformerConfig(**SHAPE))
    peft_model = get_peft_model(model, adapter_config("adalora", "none", {"r": 4}, 200))
    allocator = RankAllocator.of(peft_model)
    layers = len(allocator.adapters)
    budgets = [allocator.budget(t) for t in range(201)]
    assert budgets[:21] == [6 * layers] * 21
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[150:] == [4 * layers] * 51
    assert 6 * layers > budgets[50] > 4 * layers


REFUSED = [
    ("loha", "none", {}, "'loha'"),
    ("lora", "nf5", {}, "'nf5'"),
    ("full", "none", {"r": 4, "bias": "all"}, "r, bias"),
    ("full", "nf4", {}, "quantize = nf4"),
    *[("lora", "none", {name: 1}, name) for name in ADALORA_FIELDS],
    ("dora", "int8", {"tinit": 1, "beta1": 0.5}, "tinit, beta1"),
    ("adalora", "none", {"r": 4, "target_r": 4}, "r and target_r"),
    ("adalora", "none", {"use_dora": True}, "use_dora"),
    ("adalora", "none", {"use_rslora": True}, "use_rslora"),
    ("adalora", "none", {"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    ("adalora", "none", {"tinit": 75}, "tinit must be below total_step - tfinal = 75"),
    ("adalora", "none", {"tfinal": 100}, "tinit must be below"),
    ("adalora", "none", {"r": 0}, "target_r"),
    ("adalora", "none", {"r": "4"}, "got '4'"),
    ("adalora", "none", {"target_r": 9, "init_r": 4}, "init_r = 4"),
    ("lora", "none", {"r": 0}, "r must be"),
    ("dora", "none", {"init_lora_weights": "magic"}, "init_lora_weights"),
]


@pytest.mark.parametrize(("method", "kind", "fields", "named"), REFUSED)
def test_what_does_not_go_together_is_refused_by_name(method, kind, fields, named):
    with pytest.raises(ConfigError) as caught:
        adapter_config(method, kind, fields, 100)
    assert named in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_base_holds_is_counted(kind):
    model = quantize(CausalLM(TransformerConfig(**SHAPE)), kind)
    held = measure_weight_memory(model)
    layers = [layer for layer in range(2) for _ in range(7)]
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert held["kind"] == kind
    assert measure_weight_memory(CausalLM(TransformerConfig(**SHAPE)))["kind"] == "none"
    assert (held["layers"], held["weights"]) == (len(layers), weights)
    per_layer = {64 * 64: 4, 64 * 96: 3}
    code = 1 if kind == "int8" else 0.5
    # codes; a byte for the absmax of each 64; a float for 256 of those, begun anew in each layer; the mean's float
    each = {n: n * code + n // 64 + 4 * math.ceil(n / 64 / 256) + 4 for n in per_layer}
    assert held["bytes"] == 2 * sum(count * each[n] for n, count in per_layer.items())
    others = model.config.parameter_count() - weights
    assert held["all_weights"] == weights + others
    assert held["all_bytes"] == held["bytes"] + 4 * others
    assert held["percent"] == pytest.approx(100 * held["bytes"] / (4 * weights))
    assert held["all_percent"] == pytest.approx(100 * held["all_bytes"] / (4 * (weights + others)))
    assert (
        f"{weights:,} weights of 14 layers in {held['bytes']:,} bytes of {kind}"
        in format_weight_memory(held)
    )
