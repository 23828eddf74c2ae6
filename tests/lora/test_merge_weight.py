"""The one merging function on arrays, what it measures, and the relation of tied weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import small

from minilora import LoraConfig, LoraLinear, QuantizedLinear, get_peft_model, quantize
from minilora.errors import ConfigError
from minilora.formats.dtypes import round_to, widen
from minilora.lora.factors import Dense, Part
from minilora.lora.merging import merge_rows, merge_weight
from minilora.lora.tying import are_transposed, choose

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 5))
PART = Part(RNG.standard_normal((2, 5)), RNG.standard_normal((6, 2)), 0.5)
OTHER = Part(RNG.standard_normal((3, 5)), RNG.standard_normal((6, 3)), -2.0)
MAGNITUDE = np.array([1.0, 2.0, 0.0, 0.5, 3.0, 1.5])


def update(*parts: Part) -> np.ndarray:
    return sum(part.c * part.B @ part.A for part in parts)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("table", [False, True])
def test_merge_weight_rounds_the_sum_once_and_measures_it(dtype, table):
    stored = round_to(W.T if table else W, dtype)
    exact = widen(stored).astype(np.float64).T if table else widen(stored).astype(np.float64)
    exact = exact + update(PART, OTHER)
    merged = merge_weight(stored, [PART, OTHER], dtype, table)
    got = widen(merged.weight).astype(np.float64)
    got = got.T if table else got
    assert np.abs(got - exact).max() <= 2.0**-8 * np.abs(exact).max()
    assert merged.lost == pytest.approx(np.linalg.norm(got - exact), abs=1e-14)
    assert merged.moved is None
    size = np.linalg.norm(update(PART, OTHER))
    assert merged.size([PART, OTHER]) == pytest.approx(size, rel=1e-12)
    assert merged.share_lost([PART, OTHER]) == pytest.approx(merged.lost / size, rel=1e-12)


@pytest.mark.parametrize("table", [False, True])
def test_merge_weight_gives_the_same_bits_for_parts_in_any_order(table):
    """The float64 sums of these parts differ in their last bits if they are added as they come."""
    third = PART._replace(A=OTHER.A[:2], c=1 / 3)
    start = W.T if table else W
    results = set()
    dense = [Dense(update(part), 0.7) for part in (OTHER, third)]
    for parts in itertools.permutations([PART, OTHER, third, *(dense if not table else [])]):
        results.add(merge_weight(start, parts, "F64", table).weight.tobytes())
    assert len(results) == 1


def test_merge_weight_scales_rows_to_the_magnitude_and_keeps_a_row_of_zeros():
    rows = [0, 1, 2, 3, 5]
    start = W.copy()
    start[4] = 0
    B = PART.B.copy()
    B[4] = 0
    part = PART._replace(B=B, m=MAGNITUDE)
    merged = merge_weight(start, [part], "F64")
    V = start + update(part)
    scales = MAGNITUDE[rows] / np.linalg.norm(V[rows], axis=1)
    assert merged.weight[rows] == pytest.approx(scales[:, None] * V[rows])
    assert not merged.weight[4].any()
    moved = np.linalg.norm(merged.weight - start)
    assert merged.moved == pytest.approx(moved, rel=1e-12)
    assert merged.size([]) == merged.moved


def test_merge_weight_writes_into_out_which_may_be_the_weight():
    stored = W.copy()
    merged = merge_weight(stored, [PART], "F64", out=stored)
    assert merged.weight is stored
    assert stored == pytest.approx(W + update(PART), abs=1e-14)


@pytest.mark.parametrize("m", [None, np.ones(0)])
def test_merge_weight_takes_a_weight_without_rows(m):
    merged = merge_weight(W[:0], [Part(PART.A, PART.B[:0], 1.0, m)], "F32")
    assert merged.weight.shape == (0, 5)
    assert merged.lost == 0


def test_merge_weight_gives_nan_for_a_norm_that_overflows():
    huge = Part(np.full((1, 5), 1e160), np.full((6, 1), 1e160), 1.0, MAGNITUDE)
    assert not np.isfinite(merge_weight(W, [huge], "F64").weight).any()


def test_merge_rows_measures_what_rounding_took_and_what_moved():
    stored = round_to(W, "BF16")
    values = RNG.standard_normal((2, 5))
    merged = merge_rows(stored, [4, 1], values, "BF16")
    after = widen(merged.weight)
    assert merged.lost == pytest.approx(np.linalg.norm(after[[4, 1]] - values), rel=1e-12)
    assert merged.moved == pytest.approx(np.linalg.norm(values - widen(stored)[[4, 1]]), rel=1e-12)
    untouched = [0, 2, 3, 5]
    assert np.array_equal(merged.weight[untouched], stored[untouched])


def test_merge_does_nothing_twice_and_codes_again_when_that_changes():
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    made = get_peft_model(quantize(small.base(), "int8"), config)
    layer = next(m for _, m in made.named_modules() if isinstance(m, LoraLinear))
    layer.merge()
    dense = layer.base_layer
    layer.merge()
    layer.merge(["default"])
    assert layer.base_layer is dense
    layer.merge(requantize=True)
    coded = layer.base_layer
    assert isinstance(coded, QuantizedLinear)
    layer.merge(requantize=True)
    assert layer.base_layer is coded
    layer.merge(requantize=False)
    assert np.array_equal(layer.base_layer.weight.data, dense.weight.data)
    layer.unmerge()
    layer.merge([])
    assert not layer.merged


def test_are_transposed_needs_both_factors_the_scale_and_no_magnitude():
    embedding = Part(PART.A, PART.B, PART.c)
    head = Part(PART.B.T, PART.A.T, PART.c)
    assert are_transposed(embedding, head)
    assert not are_transposed(embedding, head._replace(A=head.A + 1))
    assert not are_transposed(embedding, head._replace(B=head.B + 1))
    assert not are_transposed(embedding, head._replace(c=1.0))
    assert not are_transposed(embedding._replace(m=MAGNITUDE), head)
    assert not are_transposed(embedding, head._replace(m=MAGNITUDE))


def test_choose_asks_only_if_one_place_changes_or_each_in_its_own_way():
    assert choose(None, "a", False, False) == "share"
    assert choose(None, "a", True, True, same=True) == "share"
    for choice in ("share", "untie"):
        assert choose(choice, "a", True, False) == choice
        assert choose(choice, "a", False, True) == choice
    assert choose("untie", "a", True, True) == "untie"
    with pytest.raises(ConfigError, match="needs a change of one place"):
        choose("share", "a", True, True)
    for embedding, head, place in ((True, False, "the embedding"), (False, True, "the head")):
        with pytest.raises(ConfigError, match=f"a changes {place}, .*untie.*share"):
            choose(None, "a", embedding, head)
    with pytest.raises(ConfigError, match="must be 'untie' or 'share', got 'both'"):
        choose("both", "a", False, False)
