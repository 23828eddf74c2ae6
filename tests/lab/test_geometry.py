"""The geometry of dW beside W: exact cases, invariance under rotations, chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lab.geometry import (
    amplification,
    decompose,
    energy,
    find_intruders,
    lowest_crossing,
    mean_overlaps,
    movement,
    movement_correlation,
    overlap,
    project,
    random_change,
    random_directions,
    rescale,
)

SEEDS = st.integers(0, 1000)


def matrix(seed, O=12, I=9):
    return np.random.default_rng(seed).normal(size=(O, I))


def test_movement_of_a_longer_row_is_its_length_alone():
    length, direction = movement(np.array([[3.0, 4.0]]), np.array([[0.6, 0.8]]))
    assert length == pytest.approx([1.0])
    assert direction == pytest.approx([0.0], abs=1e-15)


def test_movement_of_a_turned_row_is_its_direction_alone():
    length, direction = movement(np.array([[1.0, 0.0]]), np.array([[-1.0, 1.0]]))
    assert length == pytest.approx([0.0])
    assert direction == pytest.approx([1.0])


def test_movement_correlation_is_one_where_both_grow_together():
    W = np.tile([1.0, 0.0], (20, 1))
    turns = np.linspace(0.01, 0.5, 20)
    lengths = 1 + (1 - np.cos(turns))  # longer by what the direction moves
    after = lengths[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    assert movement_correlation([(W, after - W)]) == pytest.approx(1.0)


@given(SEEDS)
def test_project_keeps_all_or_the_largest_part(seed):
    dW = matrix(seed)
    parts = decompose(dW)
    assert project(dW, parts.U) == pytest.approx(dW)
    cut = project(dW, parts.U[:, :3])
    assert np.linalg.matrix_rank(cut) == 3
    assert energy(cut) == pytest.approx((parts.values[:3] ** 2).sum())
    rng = np.random.default_rng(seed)
    assert energy(project(dW, random_directions(12, 3, rng))) <= energy(cut) + 1e-9


@given(SEEDS)
def test_random_change_has_the_rank_and_the_norm(seed):
    dW = matrix(seed)
    change = random_change(dW, 2, np.random.default_rng(seed))
    assert np.linalg.matrix_rank(change) == 2
    assert energy(change) == pytest.approx(energy(dW))


@given(SEEDS, st.floats(0.1, 10))
def test_amplification_of_a_multiple_of_w_is_that_multiple(seed, factor):
    W = matrix(seed)
    parts = decompose(factor * W)
    measured = amplification(W, parts.values[:3], parts.U[:, :3], parts.Vt[:3].T)
    assert measured == pytest.approx(factor)


@given(SEEDS)
def test_overlap_lies_between_chance_and_one(seed):
    rng = np.random.default_rng(seed)
    U, V = random_directions(10, 4, rng), random_directions(10, 6, rng)
    assert 0 <= overlap(U, V) <= 1 + 1e-12
    assert overlap(U, U[:, :2]) == pytest.approx(1.0)
    turn = random_directions(10, 10, rng)
    assert overlap(turn @ U, turn @ V) == pytest.approx(overlap(U, V))


def test_overlap_of_random_directions_is_the_share_of_the_space():
    rng = np.random.default_rng(0)
    measured = [
        overlap(random_directions(20, 1, rng), random_directions(20, 5, rng)) for _ in range(400)
    ]
    assert np.mean(measured) == pytest.approx(5 / 20, abs=0.03)


def test_mean_overlaps_of_the_same_directions():
    U = np.eye(5)
    table = mean_overlaps([U, U], [U, U[:, ::-1]], (1, 5))
    assert np.array(table) == pytest.approx(np.array([[0.5, 1.0], [1.0, 1.0]]))


@given(SEEDS)
def test_find_intruders_finds_the_planted_one(seed):
    rng = np.random.default_rng(seed)
    W = matrix(seed, 20, 8)
    outside = random_directions(20, 1, rng)
    U = decompose(W).U
    outside -= U @ (U.T @ outside)
    outside /= np.linalg.norm(outside)
    dW = 100 * outside @ random_directions(8, 1, rng).T
    assert find_intruders(W, decompose(W + dW), 5, 0.5) == [0]
    assert find_intruders(W, decompose(W), 8, 0.999) == []


@given(SEEDS)
def test_rescale_changes_the_chosen_values_alone(seed):
    W = matrix(seed)
    parts = decompose(W)
    assert rescale(parts, [0, 2], 1.0) == pytest.approx(W, abs=1e-5)
    values = decompose(rescale(parts, [0], 0.0).astype(float)).values
    assert values[:8] == pytest.approx(parts.values[1:], rel=1e-4)


def test_lowest_crossing_interpolates_and_takes_the_lowest():
    falling = [(3.0, 1.0), (2.0, 2.0), (1.0, 5.0)]
    assert lowest_crossing([falling], 2.5) == 1.5
    assert lowest_crossing([falling, [(3.0, 0.0), (2.0, 1.0)]], 2.5) == 0.5
    assert lowest_crossing([falling], 1.0) == 5.0
    assert lowest_crossing([falling], 0.5) == math.inf
    assert lowest_crossing([falling], 3.5) == 1.0  # it begins below the level
