"""inspect: the spectrum of an update from its small factors, beside the dense one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_files import GOLDEN, read_weights

from minilora.errors import FormatError
from minilora.formats import write_adapter
from minilora.lora.factors import effective_rank, singular_values
from minilora.tools.inspecting import inspect_adapter, norm
from minilora.verify import random_case

EPS = np.finfo(float).eps


@given(st.integers(0, 10**6))
def test_singular_values_of_small_factors_are_those_of_the_update(seed):
    case = random_case(seed)
    name = next(iter(case.configs))
    A, B, s = case.formula(case.layer(name)).factors[0][:3]
    got = singular_values(A, B, s)
    dW = (s * (B @ A)).astype(float)
    exact = np.linalg.svd(dW, compute_uv=False)[: len(got)]
    assert len(got) == min(len(A), *dW.shape)
    # Each way errs by a modest multiple of its products' norms: Weyl, and Householder's QR
    # (Higham 2002, section 19.3).
    size = s * np.linalg.norm(A) * np.linalg.norm(B)
    bound = 8 * max(*dW.shape, len(A)) * EPS * size
    assert abs(got - exact).max() <= bound
    assert 1 <= effective_rank(got) <= len(got) * (1 + 1e-12)


KNOWN_RANKS = [([], 0), ([0, 0], 0), ([3], 1), ([2, 2, 2], 3), ([5, 0, 0], 1)]


@pytest.mark.parametrize(("values", "rank"), KNOWN_RANKS)
def test_effective_rank_of_known_spectra(values, rank):
    assert math.isclose(effective_rank(np.array(values, float)), rank, rel_tol=1e-14)


def test_singular_values_of_a_product_beyond_float64_are_nan():
    """LAPACK's decomposition of an infinite core may fail, warn or never end."""
    A = np.full((4, 5), 1e160)
    B = np.repeat([[1e160, 1e160, -1e160, -1e160]], 4, axis=0)
    assert np.isnan(singular_values(A, B, 1.0)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_singular_values_of_nonfinite_factors_are_nan_and_have_rank_0(value):
    values = singular_values(np.array([[1.0, value]]), np.ones((3, 1)), 2.0)
    assert np.isnan(values).all()
    assert effective_rank(values) == effective_rank(np.array([1.0, value])) == 0


@pytest.mark.parametrize("seed", range(5))
def test_singular_values_of_a_large_random_product_are_nan(seed):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(2, 64))
    B = rng.uniform(size=(64, 2)) * 1e308
    assert np.isnan(singular_values(A, B, 1.0)).all()


def test_effective_rank_does_not_depend_on_the_scale():
    values = np.array([3.0, 2.0, 0.5])
    rank = effective_rank(values)
    assert rank == effective_rank(values * 2.0**40)
    assert rank == effective_rank(values * 2.0**-40)


@pytest.mark.parametrize("shape", [(0,), (7,), (300, 300), (1 << 16,), (3, 50000)])
def test_norm_is_summed_in_float64(shape):
    W = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert norm(W) == pytest.approx(np.linalg.norm(W.astype(float)), rel=1e-14)


def test_inspect_adapter_beside_its_base_has_relative_sizes_and_mismatches():
    report = inspect_adapter(GOLDEN / "llama--lora", GOLDEN / "llama")
    assert report["mismatches"] == []
    weights = read_weights(GOLDEN / "llama")
    for row in report["tensors"]:
        W = weights[f"{row['layer']}.weight"]
        relative = np.linalg.norm(report["spectra"][row["layer"]]) / np.linalg.norm(W)
        assert float(row["|dW| / |W|"]) == pytest.approx(relative, rel=1e-3)
    report = inspect_adapter(GOLDEN / "gpt2--lora", GOLDEN / "llama")
    assert "unknown transformer.h.0.attn.c_attn" in report["mismatches"]
    assert report["tensors"][0]["|dW| / |W|"] == "-"


def test_inspect_adapter_counts_numbers_that_are_not_finite(tmp_path):
    key_A, key_B = (f"base_model.model.q.lora_{name}.weight" for name in "AB")
    A = np.array([[1, math.nan, math.inf]], np.float32)
    write_adapter(tmp_path, {"r": 1}, {key_A: A, key_B: np.ones((2, 1), np.float32)})
    report = inspect_adapter(tmp_path)
    assert report["not finite"] == [f"{key_A}: 1 NaN, 1 infinite"]
    assert report["spectra"] == {"q": None}


def test_inspect_adapter_refuses_a_factor_alone(tmp_path):
    tensors = {"base_model.model.q.lora_A.weight": np.ones((2, 3), np.float32)}
    write_adapter(tmp_path, {"r": 2}, tensors)
    with pytest.raises(FormatError, match=r"q: lora_A \(2, 3\) has no lora_B"):
        inspect_adapter(tmp_path)
