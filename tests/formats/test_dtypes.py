"""Dtypes: bfloat16 widens exactly, and every stored dtype is rounded once, to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora.errors import FormatError
from minilora.formats import bf16_from, bf16_to_float32
from minilora.formats.dtypes import FLOATS, NUMPY_FLOATS, round_to, widen

FINITE = st.floats(allow_nan=False, allow_infinity=False)
FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_bf16_to_float32_widens_every_pattern_exactly():
    patterns = np.arange(2**16, dtype=np.uint16)
    wide = bf16_to_float32(patterns)
    assert np.array_equal(wide.view(np.uint32), patterns.astype(np.uint32) << 16)
    # A signalling NaN becomes a quiet one of the same sign.
    quiet = np.where(np.isnan(wide), patterns | 0x40, patterns)
    assert np.array_equal(bf16_from(wide), quiet)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(bf16_from(wide.astype(np.float64)), quiet)


def test_bf16_from_rounds_every_float16_to_the_nearest():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    check_nearest(half[np.isfinite(half)])


def check_nearest(values: np.ndarray) -> None:
    """bf16_from against a definition: no neighbour is closer, and of two equally close ones
    the even one is taken."""
    bits = bf16_from(values)
    exact = values.astype(np.float64)
    assert np.array_equal(np.signbit(exact), bits >> 15 == 1)
    magnitude = bits & 0x7FFF

    def distance(pattern: np.ndarray) -> np.ndarray:
        place = bf16_to_float32(np.minimum(pattern, 0x7F7F)).astype(np.float64)
        # For rounding, infinity takes the place of the next larger number: 2^128.
        place[pattern == 0x7F80] = 2.0**128
        return np.abs(np.minimum(np.abs(exact), 2.0**128) - place)

    own = distance(magnitude)
    is_even = magnitude % 2 == 0
    for neighbour in (np.maximum(magnitude, 1) - 1, np.minimum(magnitude + 1, 0x7F80)):
        other = distance(neighbour.astype(np.uint16))
        is_same = neighbour == magnitude
        assert np.all((own < other) | ((own == other) & (is_even | is_same)))


@given(hnp.arrays(np.float64, 8, elements=FINITE))
def test_bf16_from_rounds_a_float64_to_the_nearest(values):
    check_nearest(values)


SIGNS = st.sampled_from([-1, 1])


@given(st.integers(0, 0x7F7E), st.integers(-60, -26), SIGNS, SIGNS)
@example(0x3F80, -40, 1, 1)
def test_bf16_from_rounds_a_float64_beside_a_tie_once(pattern, shift, side, sign):
    low = float(bf16_to_float32(np.uint16(pattern)))
    high = float(bf16_to_float32(np.uint16(pattern + 1)))
    middle = (low + high) / 2
    beside = middle + side * (high - low) * 2.0**shift
    if beside == middle:
        beside = np.nextafter(middle, side * np.inf)
    expected = pattern + (side > 0)
    if sign < 0:
        expected |= 0x8000
    assert int(bf16_from(np.array(sign * beside))) == expected
    assert int(bf16_from(np.array(sign * middle))) & 1 == 0


@given(hnp.arrays(np.float32, 8, elements=FINITE32))
def test_bf16_from_rounds_a_float32_to_the_nearest(values):
    check_nearest(values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bf16_from_rounds_nan_inf_and_the_edges(dtype):
    top = np.uint32(0x7F7F8000).view(np.float32)  # halfway between the largest bfloat16 and 2^128
    below = np.nextafter(top, np.float32(0))
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, top, below], dtype)
    expected = [0x7FC0, 0xFFC0, 0x7F80, 0xFF80, 0x0, 0x8000, 0x7F80, 0x7F7F]
    assert bf16_from(values).tolist() == expected
    assert bf16_from(np.zeros((0, 3), dtype)).shape == (0, 3)
    before = values.copy()
    bf16_from(values[::-2])
    assert np.array_equal(values, before, equal_nan=True)  # the input is only read


def test_bf16_from_keeps_a_nan_whose_payload_is_cut():
    assert int(bf16_from(np.array(0x7F800001, np.uint32).view(np.float32))) == 0x7FC0


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.longdouble, bool])
def test_bf16_from_takes_floats_only(dtype):
    with pytest.raises(FormatError, match="rounded from"):
        bf16_from(np.zeros(2, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_round_to_and_widen_agree_with_numpy(dtype):
    values = np.array([[0.1, -2.5, 1e-30], [3.0, np.inf, 1e300]])
    stored = round_to(values, dtype)
    wide = widen(stored)
    if dtype == "BF16":
        assert stored.dtype == np.uint16
        assert np.array_equal(stored, bf16_from(values))
        assert np.array_equal(wide, bf16_to_float32(stored))
    else:
        with np.errstate(over="ignore"):
            expected = values.astype(NUMPY_FLOATS[dtype])
        assert stored.dtype == expected.dtype
        assert np.array_equal(stored, expected)
        assert wide is stored


@given(hnp.arrays(np.float64, 8, elements=FINITE))
def test_round_to_rounds_once_to_every_dtype(values):
    for dtype in FLOATS:
        wide = widen(round_to(values, dtype)).astype(np.float64)
        again = widen(round_to(wide, dtype)).astype(np.float64)
        assert np.array_equal(again, wide)
        assert np.array_equal(np.signbit(wide), np.signbit(values))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_round_to_float16_has_the_bits_of_a_single_rounding_where_it_is_subnormal(kind):
    """Each float16 below 2^-14, the midpoints between them, and the numbers beside both."""
    steps = np.arange(0, 2**11 + 3, dtype=kind) * kind(2.0**-25)
    beside = [steps, np.nextafter(steps, kind(1)), np.nextafter(steps, kind(-1))]
    exact = np.concatenate([sign * x for sign in (1, -1) for x in beside])
    expected = exact.astype(np.float16)
    assert round_to(exact, "F16").tobytes() == expected.tobytes()
