"""The rule of verdicts: intervals of Student's t beside margins, parts that agree or differ."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lab.verdicts import (
    FAILS,
    HOLDS,
    PARTLY,
    cannot_tell,
    decide,
    describe_number,
    describe_part,
    fact,
    interval,
    judge,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=6)


def test_interval_of_three_is_248_spreads_around_the_mean():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(2.484 * np.std([1, 2, 4], ddof=1), rel=1e-3)


def test_interval_of_one_value_is_infinite():
    assert interval([3.0]) == (3.0, math.inf)
    assert judge("x", [3.0], at_least=0)["verdict"] == cannot_tell(1)
    assert judge("x", [3.0], at_least=0)["half_width"] is None  # JSON has no infinity


def test_interval_covers_the_mean_of_normal_values_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        mean, half = interval(rng.normal(1.0, 2.0, 3).tolist())
        covered += abs(mean - 1.0) <= half
    assert abs(covered / 4000 - 0.95) < 0.012  # 3.5 standard deviations


@pytest.mark.parametrize(
    ("values", "at_least", "at_most"),
    [
        ([1.0, 1.1, 0.9], HOLDS, FAILS),
        ([-1.0, -1.1, -0.9], FAILS, HOLDS),
        ([1.0, -1.0, 0.5], cannot_tell(3), cannot_tell(3)),
    ],
)
def test_judge_demands_the_whole_interval_on_one_side(values, at_least, at_most):
    assert judge("x", values, at_least=0)["verdict"] == at_least
    assert judge("x", values, at_most=0)["verdict"] == at_most


@given(VALUES, st.floats(-100, 100))
def test_judge_of_negated_values_swaps_the_sides(values, margin):
    one = judge("x", values, at_least=margin)
    other = judge("x", [-v for v in values], at_most=-margin)
    assert one["verdict"] == other["verdict"]
    assert one["half_width"] == pytest.approx(other["half_width"])


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([FAILS, FAILS], FAILS),
        ([HOLDS, FAILS], PARTLY),
        ([HOLDS, cannot_tell(3)], PARTLY),
        ([FAILS, cannot_tell(3)], FAILS),
        ([cannot_tell(3), cannot_tell(3)], cannot_tell(3)),
    ],
)
def test_decide_joins_the_parts(states, expected):
    parts = [fact("x", True) | {"verdict": state} for state in states]
    assert decide(*parts)["verdict"] == expected


def test_describe_part_has_number_interval_claim_and_verdict():
    part = judge("gain", [0.5, 0.6, 0.7], at_least=0.95)
    assert describe_part(part) == "gain: 0.60 +- 0.25, claimed at least 0.95: does not hold here"
    assert describe_part(fact("the bits are equal", True)) == "the bits are equal: holds"


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (0.12589, 0.0321, "0.126 +- 0.032"),
        (-1.8e-17, 2.5, "0.0 +- 2.5"),
        (-0.33, 1.4, "-0.3 +- 1.4"),
        (1234.5, 120.0, "1230 +- 120"),
        (0.06224, None, "0.06224"),
        (6.4263, 0.0, "6.426"),
    ],
)
def test_describe_number_ends_at_the_second_digit_of_the_half_width(mean, half_width, text):
    assert describe_number({"mean": mean, "half_width": half_width}) == text
