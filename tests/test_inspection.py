"""The spectrum of an update from its small factors, beside the dense one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import FormatError
from minilora.inspection import effective_rank, inspect_adapter, singular_values
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
    bound = 8 * max(*delta.shape, len(A)) * np.finfo(float).eps * s * np.linalg.norm(A) * np.linalg.norm(B)
    assert abs(found - np.linalg.svd(delta, compute_uv=False)[: len(found)]).max() <= bound
    assert 1 <= effective_rank(found) <= len(found) * (1 + 1e-12)


@pytest.mark.parametrize(("values", "rank"), [([], 0), ([0, 0], 0), ([3], 1), ([2, 2, 2], 3), ([5, 0, 0], 1)])
def test_effective_ranks_that_are_known(values: list[float], rank: float) -> None:
    assert math.isclose(effective_rank(np.array(values, float)), rank, rel_tol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_rank(value: float) -> None:
    values = singular_values(np.array([[1.0, value]]), np.ones((3, 1)), 2.0)
    assert np.isnan(values).all()
    assert effective_rank(values) == effective_rank(np.array([1.0, value])) == 0


def test_the_rank_does_not_depend_on_the_scale() -> None:
    values = np.array([3.0, 2.0, 0.5])
    assert effective_rank(values) == effective_rank(values * 2.0**40) == effective_rank(values * 2.0**-40)


def test_a_factor_alone_is_refused(tmp_path: Path) -> None:
    from minilora.formats import write_adapter

    write_adapter(tmp_path, {"r": 2}, {"base_model.model.q.lora_A.weight": np.ones((2, 3), np.float32)})
    with pytest.raises(FormatError, match=r"q: lora_A \(2, 3\) has no lora_B"):
        inspect_adapter(tmp_path)
