"""LoraAdapter and LoraLinear: first values, shapes, one weight for a whole step, merging.

The identities that hold for every layer are measured in test_verify.py.
Shapes: W (m, n), A (r, n), B (m, r).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.autograd import Tensor, gradients
from minilora.effective import count_operations
from minilora.lora import LoraAdapter, LoraConfig, LoraLinear
from minilora.nn import Linear, LinearBase
from minilora.verify import make_case

# ---- one weight for a whole step ----


def make_adapter(base: Linear, seed: int = 0, **options: Any) -> LoraAdapter:
    rng = np.random.default_rng(seed)
    return LoraAdapter(base, "x", LoraConfig(**options), rng)


def make_layer(W: np.ndarray, **options: Any) -> tuple[LoraLinear, LoraAdapter]:
    """A layer over W with one active adapter, and this adapter."""
    layer = LoraLinear(Linear(W))
    adapter = make_adapter(layer.base_layer, **options)
    layer.adapters["default"] = adapter
    layer.active = ["default"]
    return layer, adapter


def make_random_layer(
    seed: int, inputs: int, outputs: int, active: int, bias: bool
) -> tuple[LoraLinear, Tensor]:
    """A layer with two adapters, the first `active` of them active, and an input."""
    case = make_case(seed, inputs, outputs, [3, 2], [4, 1], bias=bias)
    layer = case.layer()
    layer.active = list(layer.adapters)[:active]
    return layer, Tensor(case.x)


SIZES = st.integers(1, 24)
SHAPES = (SIZES, SIZES, st.integers(0, 2), st.booleans())
LAYERS = st.builds(make_random_layer, st.integers(0, 99), *SHAPES)
X = Tensor(np.ones((1, 4)))


def output(layer: Any, x: Tensor) -> bytes:
    return layer(x).data.tobytes()  # type: ignore[no-any-return]


@given(LAYERS)
def test_prepare_step_can_be_disabled_and_ended(drawn: tuple[LoraLinear, Tensor]) -> None:
    layer, x = drawn
    before = output(layer, x)
    layer.prepare_step()
    layer.enabled = False  # a reference model may be needed in the middle of a step
    assert output(layer, x) == output(layer.base_layer, x)
    layer.enabled = True
    layer.end_step()
    assert output(layer, x) == before


@given(LAYERS)
def test_prepare_step_of_a_zero_update_computes_as_the_base(
    drawn: tuple[LoraLinear, Tensor],
) -> None:
    layer, x = drawn
    for adapter in layer.adapters.values():
        adapter.lora_B.data = 0 * adapter.lora_B.data
    layer.prepare_step()
    assert output(layer, x) == output(layer.base_layer, x)


@given(LAYERS)
def test_prepare_step_lets_the_bias_train(drawn: tuple[LoraLinear, Tensor]) -> None:
    layer, x = drawn
    layer.prepare_step()
    bias = layer.base_layer.bias
    if bias is not None:
        bias.requires_grad = True
        y = layer(x)
        (db,) = gradients(y, [bias], np.ones(y.shape, y.dtype))
        assert np.array_equal(db, np.full(len(bias), x.shape[0] * x.shape[1]))


def test_prepare_step_lets_the_base_s_weight_train() -> None:
    layer, _ = make_layer(np.ones((3, 4)), init_lora_weights=False)
    layer.prepare_step()
    (dW,) = gradients(layer(X), [layer.base_layer.weight], np.ones((1, 3)))
    assert dW is not None


def test_prepare_step_forms_the_weight_once_and_end_step_drops_it() -> None:
    layer, adapter = make_layer(np.ones((3, 4)), init_lora_weights=False)
    layer.base_layer.weight.requires_grad = False
    layer.prepare_step()
    before = output(layer, X)
    adapter.lora_B.data = adapter.lora_B.data + 1
    assert output(layer, X) == before
    layer.end_step()
    assert output(layer, X) != before


@pytest.mark.parametrize("shape", [(128, 128), (512, 128), (4096, 4096)])
def test_costs_of_the_merged_weight_are_lower_for_many_tokens_only(shape: tuple[int, int]) -> None:
    merged, apart = count_operations(1, *shape, 8)
    assert merged >= apart
    merged, apart = count_operations(10_000, *shape, 8)
    assert merged < apart


# ---- merging ----


def test_merge_adds_the_product_of_the_factors() -> None:
    layer, adapter = make_layer(np.arange(1.0, 13.0).reshape(4, 3), r=1, lora_alpha=1)
    adapter.lora_B.data = np.array([[1.0], [0], [-1], [2]])
    adapter.lora_A.data = np.array([[2.0, -1, 3]])
    layer.merge()
    assert layer.base_layer.weight.data.tolist() == [[3, 1, 6], [4, 5, 6], [5, 9, 6], [14, 9, 18]]


# ---- shapes ----


def test_lora_adapter_shapes_follow_from_the_layer_s_sizes() -> None:
    sizes = LinearBase()  # it has sizes and nothing else: no memory
    sizes.in_features = 768
    sizes.out_features = 1024
    assert LoraAdapter.shapes(sizes, 64) == {"lora_A": (64, 768), "lora_B": (1024, 64)}
    adapter = make_adapter(Linear(np.zeros((1024, 768))), r=64)
    assert sum(p.size for p in adapter.parameters()) == 114_688


# ---- first values ----


def kolmogorov_p(values: np.ndarray, cdf: Callable[[float], float]) -> float:
    """The chance that a sample differs from `cdf` at least as much as `values` do.

    This is Kolmogorov's limit with Stephens' correction.
    """
    n = values.size
    expected = np.array([cdf(float(value)) for value in np.sort(values, axis=None)])
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    z = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    series = 0.0
    for k in range(1, 101):
        series += (-1) ** (k - 1) * math.exp(-2 * k * k * z * z)
    return float(min(1, 2 * series))


def first_values(seed: int, init: bool | str) -> tuple[np.ndarray, np.ndarray]:
    """A (80, 100) and B (50, 80)."""
    adapter = make_adapter(Linear(np.zeros((50, 100))), seed, r=80, init_lora_weights=init)
    assert adapter.lora_A.shape == (80, 100)
    assert adapter.lora_B.shape == (50, 80)
    return adapter.lora_A.data, adapter.lora_B.data


def assert_uniform(values: np.ndarray, bound: float) -> None:
    assert np.abs(values).max() <= bound
    assert kolmogorov_p(values, lambda x: (x / bound + 1) / 2) > 1e-4 / 20


SEEDS = pytest.mark.parametrize("seed", range(20))


@SEEDS
def test_lora_adapter_starts_with_a_uniform_a_and_b_zero(seed: int) -> None:
    A, B = first_values(seed, True)
    bound = 1 / math.sqrt(100)
    assert not B.any()
    assert_uniform(A, bound)
    assert np.abs(A).max() > bound * (1 - 50 / A.size)  # fails with probability e^-50


@SEEDS
def test_lora_adapter_starts_with_a_gaussian_a_and_b_zero(seed: int) -> None:
    A, B = first_values(seed, "gaussian")
    assert not B.any()
    assert kolmogorov_p(A, lambda x: (1 + math.erf(x * 80 / math.sqrt(2))) / 2) > 1e-4 / 20
    assert abs(A.std() * 80 - 1) < 5 / math.sqrt(2 * A.size)  # five standard deviations


@SEEDS
def test_lora_adapter_starts_with_both_factors_uniform(seed: int) -> None:
    A, B = first_values(seed, False)
    assert_uniform(A, 1 / math.sqrt(100))
    assert_uniform(B, 1 / math.sqrt(80))
