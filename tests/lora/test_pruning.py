"""Sums of pruned dW: beside definitions entry by entry, their reports, their memory."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError
from minilora.lora.combining import combine_terms
from minilora.lora.factors import Part, Term
from minilora.lora.pruning import (
    ELECTING,
    PRUNED,
    RANDOM,
    Drawn,
    Largest,
    Pruning,
    Update,
    add_pruned,
    check_pruning,
    prune_updates,
    pruned_sum,
)


def random_terms(rng: np.random.Generator, O: int, I: int, count: int) -> list[Term]:
    terms = []
    for number in range(count):
        r = int(rng.integers(1, 4))
        part = Part(rng.normal(size=(r, I)), rng.normal(size=(O, r)), float(rng.normal()))
        terms.append(Term(part, float(rng.normal()), number))
    return terms


def dense(term: Term) -> np.ndarray:
    return term.part.c * (term.part.B @ term.part.A)


def sum_by_entries(pruned: list[np.ndarray], weights: list[float], pruning: Pruning) -> np.ndarray:
    """The definition of a pruned sum, one entry at a time."""
    total = np.zeros(pruned[0].shape)
    for at in itertools.product(*map(range, total.shape)):
        entries = [float(D[at]) for D in pruned]
        terms = [w * x for w, x in zip(weights, entries, strict=True)]
        if pruning.how not in ELECTING:
            total[at] = sum(terms)
            continue
        votes = entries if pruning.majority_sign_method == "total" else list(map(np.sign, entries))
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [term for term, x in zip(terms, entries, strict=True) if np.sign(x) == sign]
        total[at] = sum(agreeing) / max(1, len(agreeing))
    return total


@given(st.data())
def test_pruned_sum_is_its_definition_entry_by_entry(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sides = st.integers(1, 7)
    O, I, count = data.draw(sides), data.draw(sides), data.draw(st.integers(1, 4))
    density = data.draw(st.sampled_from([0.01, 0.3, 0.5, 0.99, 1.0]))
    majority = data.draw(st.sampled_from(["total", "frequency"]))
    pruning = Pruning(data.draw(st.sampled_from(PRUNED)), density, majority, seed=5)
    terms = random_terms(rng, O, I, count)
    total, row = pruned_sum(terms, pruning, "q_proj")
    pruned = []
    masks = prune_updates(terms, pruning, "q_proj")
    for term, update in zip(terms, masks, strict=True):
        D = dense(term)
        if pruning.how in RANDOM:
            assert update.keep is not None
            mask = update.keep(slice(0, O), D)
            pruned.append(D * mask / density)
        else:
            k = int(density * D.size)
            kept = np.argsort(-np.abs(D), axis=None, kind="stable")[:k]
            mask = np.isin(np.arange(D.size), kept).reshape(D.shape)
            pruned.append(D * mask)
    weights = [term.weight for term in terms]
    expected = sum_by_entries(pruned, weights, pruning)
    assert np.allclose(total, expected, rtol=1e-12, atol=1e-14)
    plain = sum(w * dense(term) for w, term in zip(weights, terms, strict=True))
    assert row["|dW|"] == pytest.approx(np.linalg.norm(expected), rel=1e-12, abs=1e-14)
    shares = [np.vdot(P, P) / np.vdot(D, D) for P, D in zip(pruned, map(dense, terms), strict=True)]
    assert row["kept"] == pytest.approx(shares, rel=1e-12)
    positive = np.any([P > 0 for P in pruned], axis=0)
    negative = np.any([P < 0 for P in pruned], axis=0)
    occupied = np.count_nonzero(positive | negative)
    if occupied:
        assert row["conflict"] == np.count_nonzero(positive & negative) / occupied
    else:
        assert row["conflict"] is None
    size = np.linalg.norm(expected) * np.linalg.norm(plain)
    if row["cosine"] is None:
        assert size == 0
    else:
        assert row["cosine"] == pytest.approx(np.vdot(expected, plain) / size, abs=1e-12)


def of_rows(*rows: list[float]) -> list[np.ndarray]:
    return [np.array([row]) for row in rows]


def test_add_pruned_elects_before_it_weighs_and_counts_zero_as_positive() -> None:
    ties = Pruning("ties", 1.0)
    votes = of_rows([2.0, 1, -3, 0], [-2.0, 1, 1, 0])
    assert add_pruned(votes, [1, 1], ties).tolist() == [[2, 1, -3, 0]]
    assert add_pruned(votes, [-1, 4], ties).tolist() == [[-2, 1.5, 3, 0]]
    frequency = Pruning("ties", 1.0, "frequency")
    votes = of_rows([-9.0], [1.0], [2.0])
    assert add_pruned(votes, [1, 1, 1], ties).tolist() == [[-9]]
    assert add_pruned(votes, [1, 1, 1], frequency).tolist() == [[1.5]]


def test_largest_keeps_the_first_of_equal_ones_over_all_blocks() -> None:
    """dW is constant over more rows than a block has, so that all of its entries are equal."""
    O, I = 700, 300
    part = Part(np.ones((1, I)), np.ones((O, 1)), -2.0)
    update = Update(part)
    k = 3 * O * I // 4 + 7
    largest = Largest(update, k)
    masks = [largest(at, D) for at, D in update.blocks()]
    assert len(masks) > 2
    kept = np.concatenate(masks).ravel()
    assert kept[:k].all()
    assert not kept[k:].any()
    nothing = Largest(update, 0)
    assert not any(nothing(at, D).any() for at, D in update.blocks())


def test_drawn_depends_on_the_key_the_row_and_the_column_alone() -> None:
    whole = Drawn(7, 0.3)(slice(0, 50), np.zeros((50, 40)))
    rows = Drawn(7, 0.3)(slice(20, 30), np.zeros((10, 40)))
    columns = Drawn(7, 0.3)(slice(0, 50), np.zeros((50, 9)))
    assert np.array_equal(whole[20:30], rows)
    assert np.array_equal(whole[:, :9], columns)
    assert not np.array_equal(whole, Drawn(8, 0.3)(slice(0, 50), np.zeros((50, 40))))
    assert abs(whole.mean() - 0.3) < 6 * math.sqrt(0.21 / whole.size)
    assert Drawn(7, 1.0)(slice(0, 50), np.zeros((50, 40))).all()


def test_pruned_sum_draws_for_each_seed_adapter_and_layer() -> None:
    rng = np.random.default_rng(0)
    part = random_terms(rng, 8, 9, 1)[0].part
    pruning = Pruning("dare_linear", 0.5)

    def draw(number: int = 0, path: str = "q", seed: int = 0) -> bytes:
        total, _ = pruned_sum([Term(part, 1.0, number)], pruning._replace(seed=seed), path)
        return total.tobytes()

    assert draw() == draw()
    assert len({draw(), draw(number=1), draw(path="k"), draw(seed=1)}) == 4


def test_pruned_sum_of_large_numbers_is_not_finite_and_warns_of_nothing() -> None:
    part = Part(np.full((1, 3), 1e200), np.full((2, 1), 1e200), 1.0)
    for how in PRUNED:
        _, row = pruned_sum([Term(part, 1.0), Term(part, -1.0, 1)], Pruning(how, 0.5))
        assert not math.isfinite(row["|dW|"])


@pytest.mark.parametrize("how", ["ties", "dare_linear"])
def test_combine_terms_of_a_pruned_sum_has_one_dW_in_memory(how: str) -> None:
    """At its peak: one array as large as dW, 32 MB; blocks of rows; and a basis of some vectors."""
    rng = np.random.default_rng(0)
    O, I, r = 2000, 2000, 2
    terms = []
    for number in range(3):
        part = Part(rng.normal(size=(r, I)), rng.normal(size=(O, r)), 1.0)
        terms.append(Term(part, 1.0, number))
    whole = O * I * 8
    pruning = Pruning(how, 0.5)
    tracemalloc.start()
    try:
        pruned_sum(terms, pruning)
        _, peak_of_sum = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        combine_terms("q", terms, how, 3 * r, pruning)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert whole < peak_of_sum < whole + 8e6
    assert whole < peak < whole + 24e6


# ---- what is refused -----------------------------------------------------------------------------

SHARE = r"density must be a number in \(0, 1\], or None"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("ties", {}, "ties needs density, the share of dW that stays"),
    *(("ties", {"density": bad}, SHARE) for bad in (0, 0.0, -0.5, 1.0001, math.nan, math.inf)),
    *(("dare_ties", {"density": bad}, SHARE) for bad in (True, "0.5", [0.5])),
    ("cat", {"density": 0.5}, "density is for ties, .*magnitude_prune, not for cat: leave it out"),
    ("dare_linear", {"majority_sign_method": "frequency", "density": 0.5}, "not for dare_linear"),
    (
        "ties",
        {"majority_sign_method": "mean", "density": 0.5},
        "'total' or 'frequency', got 'mean'",
    ),
    ("magnitude_prune", {"seed": 3, "density": 0.5}, "seed is for dare_linear, dare_ties, not for"),
    ("dare_ties", {"seed": -1, "density": 0.5}, "seed must be an integer of at least 0"),
    ("dare_ties", {"seed": 1.0, "density": 0.5}, "seed must be an integer of at least 0"),
]


@pytest.mark.parametrize(("how", "options", "message"), WRONG)
def test_check_pruning_refuses(how: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_pruning(how, **options)


def test_check_pruning_gives_the_pruning_or_none() -> None:
    assert check_pruning("svd") is None
    assert check_pruning("ties", 1) == Pruning("ties", 1.0)
    assert check_pruning("dare_ties", np.float32(0.5), "frequency", 4) == Pruning(
        "dare_ties", 0.5, "frequency", 4
    )
