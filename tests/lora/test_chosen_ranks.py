"""Ranks by energy, error and budget: beside all singular values, and beside every other choice."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError
from minilora.lora.ranks import (
    RankRule,
    Spectrum,
    check_rank_rule,
    choose_ranks,
    matrix_spectrum,
    smallest_rank,
)


def spectrum_of(values: list[float], shape: tuple[int, int] = (60, 40), **more: Any) -> Spectrum:
    """A spectrum that gives two values more than it was asked for, or all."""
    array = np.array(values)

    def leading(k: int) -> tuple[np.ndarray, float]:
        return array[: k + 2], float(np.linalg.norm(array[k + 2 :]))

    return Spectrum(shape, leading, **more)


falling = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(
    lambda values: sorted(values, reverse=True)
)


@given(falling, st.floats(1e-5, 0.999))
def test_smallest_rank_misses_the_error_and_no_smaller_one_does(
    values: list[float], error: float
) -> None:
    k = smallest_rank(spectrum_of(values), error**2)
    allowed = error * math.hypot(*values)
    assert math.hypot(*values[k:]) <= allowed * (1 + 1e-9)
    assert math.hypot(*values[k - 1 :]) >= allowed * (1 - 1e-9)


def test_smallest_rank_of_equal_values_is_what_their_number_says() -> None:
    """1 - 0.9 is less than 0.1, and the tail of nine of ten equal values is not."""
    for n, energy, k in ((10, 0.9, 9), (10, 0.3, 3), (1000, 0.999, 999), (7, 1.0, 7)):
        rule = check_rank_rule(energy=energy)
        assert smallest_rank(spectrum_of([1.0] * n, (1000, 1000)), rule.missed) == k


def test_smallest_rank_counts_no_value_of_rounding() -> None:
    assert smallest_rank(spectrum_of([1.0, 1e-3, 1e-16, 1e-17]), 0.0) == 2
    assert smallest_rank(spectrum_of([0.0, 0.0]), 0.0) == 0
    assert smallest_rank(spectrum_of([5.0, 3, 2] + [1.0] * 30, noise=1.5), 1e-6) == 3
    assert smallest_rank(spectrum_of([0.0, 0.0], least=1), 0.1) == 1
    assert smallest_rank(spectrum_of([1e200, 1e190]), 1e-30) == 2


def test_smallest_rank_asks_for_more_of_a_large_matrix_until_it_is_enough() -> None:
    rng = np.random.default_rng(0)
    U, _ = np.linalg.qr(rng.normal(size=(500, 60)))
    V, _ = np.linalg.qr(rng.normal(size=(450, 60)))
    values = 0.97 ** np.arange(60)
    calls = []

    def form() -> np.ndarray:
        calls.append(1)
        return np.asarray((U * values) @ V.T)

    spectrum = matrix_spectrum((500, 450), form)
    tails = np.sqrt(np.cumsum((values**2)[::-1])[::-1])
    for error in (0.9, 0.5, 0.2):
        k = smallest_rank(spectrum, error**2)
        assert tails[k] <= error * tails[0] < tails[k - 1]
    assert len(calls) > 3


@given(st.lists(falling, min_size=1, max_size=3), st.integers(1, 400), st.data())
def test_choose_ranks_spends_a_budget_as_well_as_any_choice_but_for_its_rest(
    lists: list[list[float]], budget: int, data: st.DataObject
) -> None:
    """The best choice has no more energy than the greedy one, and a part of its next triplet."""
    sides = st.integers(4, 30)
    spectra = {}
    for i, values in enumerate(lists):
        n = len(values[:4])
        spectra[str(i)] = spectrum_of(values[:n], (data.draw(sides), data.draw(sides)))
    costs = {path: spectrum.cost for path, spectrum in spectra.items()}
    if budget < min(costs.values()):
        with pytest.raises(ConfigError, match=f"--budget {budget} leaves no layer"):
            choose_ranks(spectra, RankRule(budget=budget))
        return
    ranks = choose_ranks(spectra, RankRule(budget=budget))
    used = sum(ranks[path] * costs[path] for path in spectra)
    assert used <= budget
    energies = {
        path: np.array(values[:4]) ** 2 for path, values in zip(spectra, lists, strict=True)
    }

    def energy(choice: dict[str, int]) -> float:
        return sum(float(energies[path][:k].sum()) for path, k in choice.items())

    best = 0.0
    for counts in itertools.product(*(range(len(energies[path]) + 1) for path in spectra)):
        choice = dict(zip(spectra, counts, strict=True))
        if sum(choice[path] * costs[path] for path in spectra) <= budget:
            best = max(best, energy(choice))
    next_ones = [float(energies[p][ranks[p]]) for p in spectra if ranks[p] < len(energies[p])]
    assert energy(ranks) >= (best - max(next_ones, default=0.0)) * (1 - 1e-9)


def test_choose_ranks_takes_the_triplets_with_the_most_energy_for_a_number_first() -> None:
    spectra = {"a": spectrum_of([4.0, 1.0], (6, 4)), "b": spectrum_of([6.0, 5.0], (30, 10))}
    # 16 / 10 and 1 / 10 of a, 36 / 40 and 25 / 40 of b.
    for budget, a, b in ((10, 1, 0), (49, 2, 0), (50, 1, 1), (60, 2, 1), (90, 1, 2), (100, 2, 2)):
        assert choose_ranks(spectra, RankRule(budget=budget)) == {"a": a, "b": b}


def test_choose_ranks_keeps_the_least_rank_and_refuses_a_budget_below_it() -> None:
    spectra = {"a": spectrum_of([4.0], (6, 4)), "b": spectrum_of([1e-3], (5, 5), least=1)}
    assert choose_ranks(spectra, RankRule(error=0.5)) == {"a": 1, "b": 1}
    assert choose_ranks(spectra, RankRule(budget=10)) == {"a": 0, "b": 1}
    with pytest.raises(ConfigError, match="--budget 9 is too small"):
        choose_ranks(spectra, RankRule(budget=9))


def test_choose_ranks_refuses_to_leave_nothing() -> None:
    spectra = {"a": spectrum_of([0.0], (6, 4))}
    with pytest.raises(ConfigError, match=r"--energy 0\.9 leaves no layer with a rank above 0"):
        choose_ranks(spectra, RankRule(energy=0.9))


ONE = "the rank is chosen by one of --r, --energy, --error, --budget, got "
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, ONE + "none of them: give one"),
    ({"r": 4, "energy": 0.9}, ONE + "--r and --energy: give one"),
    ({"error": 0.1, "energy": 0.9, "budget": 5}, ONE + "--energy and --error and --budget"),
    *(
        ({"energy": bad}, r"--energy must be a number in \(0, 1\]")
        for bad in (0, -1, 1.01, math.nan)
    ),
    *(({"energy": bad}, r"--energy must be a number in \(0, 1\]") for bad in (True, "0.9")),
    *(
        ({"error": bad}, "--error must be a number of at least 0 and below 1")
        for bad in (-0.1, 1, math.nan)
    ),
    *(({"budget": bad}, "--budget must be an integer of at least 1") for bad in (0, -5, 1.5, True)),
    *(({"r": bad}, "--r must be an integer from 1 to 65536") for bad in (0, 1.0, 65537, True)),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_check_rank_rule_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rank_rule(**options)


def test_check_rank_rule_needs_none_where_a_rank_has_a_default() -> None:
    assert check_rank_rule(required=False) == RankRule()
    assert not RankRule().is_adaptive
    assert not RankRule(r=3).is_adaptive
    assert check_rank_rule(error=0).is_adaptive
