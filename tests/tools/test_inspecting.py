"""The spectrum of an update from its small factors, beside the dense one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import FormatError
from minilora.formats import load_file, write_adapter
from minilora.lora.factors import effective_rank, singular_values
from minilora.tools.inspecting import inspect_adapter
from minilora.verify import random_case


@given(st.integers(0, 10**6))
def test_the_small_factors_have_the_spectrum_of_the_update(seed: int) -> None:
    case = random_case(seed)
    name = next(iter(case.configs))
    A, B, s = (case.formula(case.layer(name)).factors[0][i] for i in range(3))
    found = singular_values(A, B, s)
    delta = (s * (B @ A)).astype(float)
    assert len(found) == min(len(A), *delta.shape)
    # Each way errs by a modest multiple of its products' norms: Weyl, and Householder's QR (Higham 2002, section 19.3).
    bound = (
        8
        * max(*delta.shape, len(A))
        * np.finfo(float).eps
        * s
        * np.linalg.norm(A)
        * np.linalg.norm(B)
    )
    assert abs(found - np.linalg.svd(delta, compute_uv=False)[: len(found)]).max() <= bound
    assert 1 <= effective_rank(found) <= len(found) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("values", "rank"), [([], 0), ([0, 0], 0), ([3], 1), ([2, 2, 2], 3), ([5, 0, 0], 1)]
)
def test_effective_ranks_that_are_known(values: list[float], rank: float) -> None:
    assert math.isclose(effective_rank(np.array(values, float)), rank, rel_tol=1e-14)


def test_factors_with_a_product_beyond_float64_have_no_spectrum() -> None:
    """Of an infinite core LAPACK's decomposition may fail, warn or never end."""
    A, B = np.full((4, 5), 1e160), np.repeat([[1e160, 1e160, -1e160, -1e160]], 4, axis=0)
    assert np.isnan(singular_values(A, B, 1.0)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_rank(value: float) -> None:
    values = singular_values(np.array([[1.0, value]]), np.ones((3, 1)), 2.0)
    assert np.isnan(values).all()
    assert effective_rank(values) == effective_rank(np.array([1.0, value])) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_product_that_is_too_large_has_no_singular_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert np.isnan(
        singular_values(rng.normal(size=(2, 64)), rng.uniform(size=(64, 2)) * 1e308, 1.0)
    ).all()


def test_the_rank_does_not_depend_on_the_scale() -> None:
    values = np.array([3.0, 2.0, 0.5])
    assert (
        effective_rank(values)
        == effective_rank(values * 2.0**40)
        == effective_rank(values * 2.0**-40)
    )


def test_beside_its_base_an_adapter_has_relative_sizes_and_mismatches(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    report = inspect_adapter(golden / "llama--lora", golden / "llama")
    assert report["mismatches"] == []
    weights = load_file(golden / "llama" / "model.safetensors")
    for row in report["tensors"]:
        W, values = weights[f"{row['layer']}.weight"], report["spectra"][row["layer"]]
        assert float(row["|dW| / |W|"]) == pytest.approx(
            np.linalg.norm(values) / np.linalg.norm(W), rel=1e-3
        )
    report = inspect_adapter(golden / "gpt2--lora", golden / "llama")
    assert "unknown transformer.h.0.attn.c_attn" in report["mismatches"]
    assert report["tensors"][0]["|dW| / |W|"] == "-"


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    A = np.array([[1, math.nan, math.inf]], np.float32)
    names = [f"base_model.model.q.lora_{x}.weight" for x in "AB"]
    write_adapter(
        tmp_path, {"r": 1}, dict(zip(names, (A, np.ones((2, 1), np.float32)), strict=True))
    )
    report = inspect_adapter(tmp_path)
    assert report["not finite"] == [f"{names[0]}: 1 NaN, 1 infinite"]
    assert report["spectra"] == {"q": None}


def test_a_factor_alone_is_refused(tmp_path: Path) -> None:
    write_adapter(
        tmp_path, {"r": 2}, {"base_model.model.q.lora_A.weight": np.ones((2, 3), np.float32)}
    )
    with pytest.raises(FormatError, match=r"q: lora_A \(2, 3\) has no lora_B"):
        inspect_adapter(tmp_path)
