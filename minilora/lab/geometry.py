"""What a change dW is like beside its weight W: its directions, lengths and overlaps.

W and dW are (O, I) in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Decomposition(NamedTuple):
    """The parts of U diag(values) Vt, values falling."""

    U: Array
    values: Array
    Vt: Array


def decompose(W: Array) -> Decomposition:
    return Decomposition(*np.linalg.svd(W, full_matrices=False))


def random_directions(size: int, count: int, rng: np.random.Generator) -> Array:
    """`count` orthonormal columns (size, count), drawn uniformly."""
    return np.linalg.qr(rng.normal(size=(size, count)))[0]


def random_change(dW: Array, r: int, rng: np.random.Generator) -> Array:
    """A normal matrix of rank r with the shape and the norm of dW."""
    O, I = dW.shape
    change = rng.normal(size=(O, r)) @ rng.normal(size=(r, I))
    scale = float(np.linalg.norm(dW) / np.linalg.norm(change))
    return np.asarray(scale * change)


# ---- low rank ------------------------------------------------------------------------------------


def project(dW: Array, U: Array) -> Array:
    """dW in the directions U (O, r) of its output, whose columns are orthonormal."""
    return np.asarray(U @ (U.T @ dW))


def energy(dW: Array) -> float:
    return float(np.linalg.norm(dW) ** 2)


# ---- rows ----------------------------------------------------------------------------------------


def movement(W: Array, dW: Array) -> tuple[Array, Array]:
    """(|change of length|, 1 - cosine of the angle) of every row of W: two arrays (O,)."""
    after = W + dW
    before_length = np.linalg.norm(W, axis=1)
    after_length = np.linalg.norm(after, axis=1)
    cosine = (W * after).sum(axis=1) / (before_length * after_length)
    return np.abs(after_length - before_length), 1 - cosine


def movement_correlation(pairs: Iterable[tuple[Array, Array]]) -> float:
    """The mean over layers (W, dW) of the correlation of the two over a layer's rows."""
    return float(np.mean([np.corrcoef(*movement(W, dW))[0, 1] for W, dW in pairs]))


# ---- directions ----------------------------------------------------------------------------------


def amplification(W: Array, values: Array, U: Array, V: Array) -> float:
    """|dW| over |U^T W V|, for as many directions U (O, k) and V (I, k) as singular values of dW.

    values   the k largest of dW: a dW of higher rank has a larger norm by itself
    """
    return float(np.linalg.norm(values) / np.linalg.norm(U.T @ W @ V))


def overlap(U: Array, V: Array) -> float:
    """phi in [0, 1]: |U^T V|^2 over the smaller number of columns, which are orthonormal."""
    return float(np.linalg.norm(U.T @ V) ** 2 / min(U.shape[1], V.shape[1]))


def mean_overlaps(
    one: Sequence[Array], other: Sequence[Array], counts: Sequence[int]
) -> list[list[float]]:
    """phi of the first i columns of one side and the first j of the other, for i and j of `counts`.

    one, other   directions by layer; the result is the mean over the layers
    """
    pairs = list(zip(one, other, strict=True))
    return [
        [float(np.mean([overlap(U[:, :i], V[:, :j]) for U, V in pairs])) for j in counts]
        for i in counts
    ]


def likeness(before: Decomposition, after: Decomposition, top: int) -> Array:
    """(top,): the largest |cosine| of each of the first left directions of `after` with `before`.

    Fewer if `after` has fewer directions.
    """
    return np.asarray(np.abs(before.U.T @ after.U[:, :top]).max(axis=0))


def find_intruders(W: Array, after: Decomposition, top: int, new: float) -> list[int]:
    """Which of the first `top` left directions of `after` are unlike every one of W.

    new   the largest |cosine| of an intruder with a direction of W is below it
    """
    return np.flatnonzero(likeness(decompose(W), after, top) < new).tolist()


def rescale(parts: Decomposition, places: Sequence[int], share: float) -> Array:
    """The matrix with some of its singular values times `share`, in float32."""
    values = parts.values.copy()
    values[list(places)] *= share
    return np.asarray((parts.U * values) @ parts.Vt, np.float32)


# ---- curves --------------------------------------------------------------------------------------


def lowest_crossing(curves: Iterable[Sequence[tuple[float, float]]], level: float) -> float:
    """The lowest y at which one of the curves is at, or comes down to, x = level; inf if none does.

    curves   points (x, y); between two neighbours both numbers are interpolated
    """
    lowest = math.inf
    for points in curves:
        if points[0][0] <= level:
            lowest = min(lowest, points[0][1])
        for (x, y), (next_x, next_y) in pairwise(points):
            if next_x <= level < x:
                share = (x - level) / (x - next_x)
                lowest = min(lowest, y + share * (next_y - y))
    return lowest
