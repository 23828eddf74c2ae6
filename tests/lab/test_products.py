"""Which layers a run adapts, and what a step costs in operations."""

from __future__ import annotations

from typing import Any

import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from minilora import LoraConfig, get_peft_model
from minilora.lab.products import (
    Adapted,
    adapted_layers,
    count_operations,
    layers_left_out,
    measure_products,
    table_of_layers,
)
from minilora.lora.maps import MAPS

LINEAR = sum(I * O for I, O in small.LINEAR.values())  # of a layer of the model
HEAD = 16 * 16


def adapted(**fields: Any) -> tuple[Any, LoraConfig]:
    config = LoraConfig(**{"r": 2} | fields)
    return get_peft_model(small.base(), config), config


def test_adapted_layers_have_r_times_i_plus_o_numbers():
    model, config = adapted(target_modules="all-linear", rank_pattern={"up_proj": 3})
    layers = adapted_layers(model, config)
    assert len(layers) == 14
    for layer in layers:
        name = layer.name.partition("layers.")[2][2:]
        assert (layer.inputs, layer.outputs) == small.LINEAR[name]
        assert layer.r == (3 if name == "mlp.up_proj" else 2)
        assert layer.numbers == layer.r * (layer.inputs + layer.outputs)
    assert adapted_layers(small.base(), None) == []


def test_adapted_layers_of_a_map_have_no_rank():
    config = next(iter(MAPS.values()))()
    model = get_peft_model(small.base(), config)
    trained = sum(p.size for p in model.parameters() if p.requires_grad)
    layers = adapted_layers(model, config)
    assert {layer.r for layer in layers} == {None}
    assert sum(layer.numbers for layer in layers) == trained
    assert table_of_layers(layers)[0]["r"] == "-"


def test_table_of_layers_has_a_row_for_equal_layers():
    layers = [Adapted(f"layers.{i}.q_proj", 160, 80, 2, 480) for i in range(3)]
    rows = table_of_layers([*layers, layers[0]._replace(r=4, numbers=960)])
    assert rows[0] == {
        "layers": "3 x q_proj",
        "I -> O": "160 -> 80",
        "r": "2",
        "trained in each": "480",
        "in all": "1,440",
    }
    assert [row["layers"] for row in rows] == ["3 x q_proj", "1 x q_proj"]


def test_layers_left_out_name_near_misses_first():
    model, config = adapted(target_modules=["q_proj"], layers_to_transform=[1])
    left_out = layers_left_out(model, adapted_layers(model, config), ["q_proj"])
    counts = {layer.name: layer.number for layer in left_out}
    assert counts.pop("q_proj") == 1
    assert counts.pop("lm_head") == 1
    assert set(counts.values()) == {2}
    assert left_out[0].name == "q_proj"
    assert left_out[0].near == "other layers of this name have an adapter"
    near = {layer.name: layer.near for layer in left_out}
    assert near["k_proj"] == "the name is close to the target q_proj"
    assert near["up_proj"] == near["lm_head"] == ""


@given(st.integers(1, 100))
def test_count_operations_of_all_weights(positions):
    """2 N I O forward, for dX and for dW: the six operations per weight and position."""
    base = small.base()
    counts = count_operations(base, positions, 7, recompute=False)
    assert counts["products with weights"] == 6 * positions * (2 * LINEAR + HEAD)
    assert counts["adapters"] == 0
    assert counts["attention"] == 7 * positions * 7 * 16 * 2


@pytest.mark.parametrize("recompute", [False, True])
def test_count_operations_of_an_adapter(recompute):
    model, config = adapted(target_modules="all-linear")
    counts = count_operations(model, 10, 5, recompute)
    again = int(recompute)
    assert counts["products with weights"] == 20 * ((2 + again) * 2 * LINEAR + 2 * HEAD)
    numbers = sum(layer.numbers for layer in adapted_layers(model, config))
    assert counts["adapters"] == (6 + 2 * again) * 10 * numbers


def test_measure_products_counts_each_layer_forward():
    operations, seconds = measure_products(small.base(), 10)
    assert operations == 20 * (2 * LINEAR + HEAD)
    assert seconds > 0
