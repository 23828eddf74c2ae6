"""The bounds of an audit: half a step of each stored dtype, zero and subnormal numbers too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.formats.dtypes import round_to, widen
from minilora.tools.hypotheses import ROUNDING, half_step


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_half_step_of_zero_is_half_the_smallest_number(dtype):
    assert half_step(np.zeros(1), dtype).tolist() == [ROUNDING[dtype][1]]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@given(
    x=st.floats(-1, 1),
    exponent=st.integers(-160, 14),
)
def test_half_step_is_reached_by_rounding_and_not_exceeded(dtype, x, exponent):
    exact = np.ldexp(np.array([x]), exponent)
    stored = widen(round_to(exact, dtype)).astype(float)
    (step,) = half_step(stored, dtype)
    assert abs(exact - stored) <= step
    # A bit more than that is stored as another number.
    further = stored + np.copysign(step * (1 + 2.0**-20), stored)
    assert widen(round_to(further, dtype)) != stored
