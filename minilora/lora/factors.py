"""The algebra of low-rank factors: matrices s B A, none of them ever formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Row = dict[str, Any]


class Part(NamedTuple):
    """c B A in float64, with A (r, I) and B (O, r): what one adapter adds to a weight W (O, I).

    m   DoRA's magnitude (O,), the lengths of the rows of W + c B A; None for every other method
    """

    A: Array
    B: Array
    c: float
    m: Array | None = None


def float64(p: Any) -> Array:
    """A parameter's values in float64 on the host."""
    return p.numpy().astype(np.float64)  # type: ignore[no-any-return]


def cat(parts: Sequence[Part]) -> tuple[Array, Array]:
    """A (q, I), B (O, q) with B A = sum c_i B_i A_i; q is the sum of the ranks."""
    return np.concatenate([p.A for p in parts]), np.concatenate([p.c * p.B for p in parts], axis=1)


def svd(parts: Sequence[Part], r: int) -> tuple[Array, Array]:
    """A (r, I), B (O, r): of all matrices of rank r the nearest to sum c_i B_i A_i."""
    return truncate_rank(*cat(parts), 1.0, r)[:2]


def linear(parts: Sequence[Part]) -> tuple[Array, Array]:
    """A (r, I), B (O, r) as PEFT adds factors that all have the rank r. Of several parts it is not the sum."""
    A = sum(math.copysign(math.sqrt(abs(p.c)), p.c) * p.A for p in parts)
    return np.asarray(A), np.asarray(sum(math.sqrt(abs(p.c)) * p.B for p in parts))


def factors_from_svd(U: Array, values: Array, Vt: Array, r: int) -> tuple[Array, Array, Row]:
    """U (O, k), values (k,), Vt (k, I) of a dW -> A (r, I), B (O, r) with s = 1, and what they miss of it.

    Each gets the square roots of the values, so that neither is far larger. Beyond k they are filled up with zeros.
    Values beyond the first r are only what is missed: one may stand for all of them.
    """
    k = min(r, len(values))
    root = np.sqrt(values[:k])
    A, B = pad_rank(root[:, None] * Vt[:k], U[:, :k] * root, r)
    return A, B, error_row(float(np.linalg.norm(values)), float(np.linalg.norm(values[k:])))


def truncate_rank(A: Array, B: Array, s: float, r: int) -> tuple[Array, Array, Row]:
    """The nearest dW of rank r to s B A: A (r, I), B (O, r) with s = 1.    A (q, I), B (O, q)

    s times their `size` must be finite: of an infinite core LAPACK's decomposition may never end.
    B = Q R and A^T = P S give s B A = Q (s R S^T) P^T, so it is the q x q core whose decomposition is computed.
    """
    Q, R = np.linalg.qr(B)
    P, S = np.linalg.qr(A.T)
    U, values, Vt = np.linalg.svd(s * (R @ S.T), full_matrices=False)
    return factors_from_svd(Q @ U, values, Vt @ P.T, r)


def pad_rank(A: Array, B: Array, r: int) -> tuple[Array, Array]:
    """A (q, I), B (O, q) with zeros up to rank r >= q, which change nothing."""
    return np.pad(A, ((0, r - len(A)), (0, 0))), np.pad(B, ((0, 0), (0, r - len(A))))


def product_norm(A: Array, B: Array) -> float:
    """|B A|, Frobenius: orthonormal factors of both change no length. Of what is not finite it is not, either, nor of
    what float64's squares are too short for.    A (q, I), B (O, q)"""
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(np.linalg.qr(B)[1] @ np.linalg.qr(A.T)[1].T))


def error_row(whole: float, missed: float) -> Row:
    return {"|dW|": whole, "error": missed, "relative": missed / whole if whole else 0.0}


def rounding_error(A: Array, B: Array) -> float:
    """What rounding may leave of a sum B A that is 0: a number is q products, each an ulp off."""
    return float(len(A) * np.finfo(np.float64).eps * np.linalg.norm(A) * np.linalg.norm(B))


def singular_values(A: np.ndarray, B: np.ndarray, scaling: float) -> np.ndarray:
    """The singular values of s B A that can differ from zero, falling: (min(r, I, O),). A (r, I), B (O, r).

    From the small factors: B = Q R and Aᵀ = P S give B A = Q (R Sᵀ) Pᵀ, and Q, P change no singular value. One NaN is
    what a factor or a product gives that is not finite: LAPACK's decomposition of it may never end.
    """
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        return np.array([np.nan])
    with np.errstate(over="ignore", invalid="ignore"):
        core = (
            np.linalg.qr(B.astype(np.float64))[1] @ np.linalg.qr(A.T.astype(np.float64))[1].T
        )  # at most (r, r)
    if not np.isfinite(core).all():
        return np.array([np.nan])
    return np.asarray(np.linalg.svd(core, compute_uv=False) * abs(scaling))


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the spectrum's energy: how many directions dW really uses, 0 if it is zero or not finite.

    Roy & Vetterli 2007, with the shares σᵢ² / Σ σ² for their σᵢ / Σ σ.
    """
    norm = float(np.linalg.norm(values))
    if not 0 < norm < math.inf:
        return 0.0
    share = (values / norm) ** 2
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
