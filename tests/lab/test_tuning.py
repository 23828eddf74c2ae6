"""Tuned comparisons: which cases are asked for, and which rate counts as the best."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lab.protocol import Arm, Plan
from minilora.lab.tuning import (
    FACTOR,
    at_best,
    best_rate,
    curve,
    differences,
    is_at_edge,
    rates_of,
    tuned,
)

ARM = Arm("arm", rates=(1.0, 2.0, 4.0))
PLAN = Plan()


def measured(loss, plan=PLAN, arm=ARM, limit=50):
    """All rows that `tuned` asks for in the end: loss(rate, seed) is what a fit would measure."""
    rows = []
    for _ in range(limit):
        cases = tuned(plan, rows, [arm])
        before, rows = rows, []
        for case in cases:
            bits = loss(case["lr"], case["seed"])
            rows.append(case | {"tune": bits, "report": bits})
        if len(rows) == len(before):
            return rows
    raise AssertionError("it never ends")


def valley(centre, tilt=0.0):
    """A loss whose lowest rate is `centre`, shifted to higher rates by `tilt` a seed."""

    def loss(rate, seed):
        return abs(rate / (centre * (1 + tilt * seed)) - 1) + 0.01 * seed

    return loss


def test_tuned_begins_with_the_grid_of_the_first_seed():
    cases = tuned(PLAN, [], [ARM])
    assert cases == [{"arm": "arm", "lr": rate, "seed": 0} for rate in ARM.rates]


@pytest.mark.parametrize("centre", [1 / 8, 0.5, 2.0, 16.0, 64.0])
def test_tuned_extends_the_grid_until_its_best_rate_has_neighbours(centre):
    rows = measured(valley(centre))
    assert best_rate(rows, "arm") == centre
    assert not is_at_edge(rows, "arm")
    confirmed = [row["lr"] for row in rows if row["seed"] == 2]
    assert confirmed == [centre / FACTOR, centre, centre * FACTOR]


def test_tuned_follows_the_mean_of_the_seeds_to_further_neighbours():
    def loss(rate, seed):
        return abs(rate - (2.0 if seed == 0 else 8.0))  # the first seed misleads

    rows = measured(loss, arm=Arm("arm", rates=(1.0, 2.0, 4.0, 8.0, 16.0)))
    best = best_rate(rows, "arm")
    assert best > 2.0
    for seed in (1, 2):
        confirmed = {row["lr"] for row in rows if row["seed"] == seed}
        assert {best / FACTOR, best, best * FACTOR} <= confirmed


@pytest.mark.parametrize("sign", [-1, 1])
def test_tuned_extends_the_grid_where_the_mean_of_the_seeds_has_its_best_rate_at_an_edge(sign):
    """The first seed is best in the middle of the grid, the others are beyond its edge."""

    def loss(rate, seed):
        return abs(math.log2(rate) - (1 if seed == 0 else 1 + 4 * sign))

    rows = measured(loss)
    assert not is_at_edge(rows, "arm")
    assert best_rate(rows, "arm") not in ARM.rates


def test_tuned_takes_a_fit_that_diverged_for_the_worst():
    def loss(rate, seed):
        return None if rate > 2.0 else 1 / rate

    rows = measured(loss)
    assert best_rate(rows, "arm") == 2.0
    assert curve(rows, "arm")[0] == [1.0, 2.0]


def test_tuned_ends_where_every_rate_diverges():
    rows = measured(lambda rate, seed: None)
    assert len(rates_of(rows, "arm")) == len(ARM.rates) + PLAN.extensions


@given(st.floats(0.2, 30), st.floats(-0.3, 0.3), st.randoms(use_true_random=False))
def test_tuned_asks_for_the_same_cases_whatever_the_order_of_the_rows(centre, tilt, random):
    rows = measured(valley(centre, tilt))
    shuffled = rows[:]
    random.shuffle(shuffled)
    assert tuned(PLAN, rows, [ARM]) == tuned(PLAN, shuffled, [ARM])
    names = [(row["lr"], row["seed"]) for row in rows]
    assert len(set(names)) == len(names)


@given(st.floats(0.2, 30), st.data())
def test_tuned_goes_on_from_any_part_of_the_rows(centre, data):
    rows = measured(valley(centre))
    some = data.draw(st.lists(st.sampled_from(rows), unique_by=id))
    wanted = {(case["lr"], case["seed"]) for case in tuned(PLAN, some, [ARM])}
    assert wanted <= {(row["lr"], row["seed"]) for row in rows}


def test_tuned_of_a_quick_plan_has_one_rate_and_two_seeds():
    rows = measured(valley(64.0), plan=Plan(quick=True))
    assert [(row["lr"], row["seed"]) for row in rows] == [(1.0, 0), (1.0, 1)]


def test_at_best_has_one_number_per_seed_at_the_rate_with_the_best_mean():
    rows = [
        {"arm": "a", "lr": lr, "seed": seed, "tune": tune, "report": 10 * tune}
        for lr, seed, tune in [(1, 0, 3.0), (1, 1, 1.0), (2, 1, 1.5), (2, 0, 1.5), (4, 0, 0.0)]
    ]
    assert best_rate(rows, "a") == 2  # 4 was not measured with seed 1
    assert at_best(rows, "a") == [15.0, 15.0]


def test_differences_are_paired():
    assert differences([3.0, 5.0], [1.0, 1.0]) == [2.0, 4.0]
    with pytest.raises(ValueError, match="zip"):
        differences([1.0], [1.0, 2.0])
