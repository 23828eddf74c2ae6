"""The leading singular triplets of a large matrix, without its whole decomposition.

This is the Rayleigh-Ritz method over a growing orthonormal basis Q. The decomposition of Q^T D
gives the best approximations of D's triplets in span(Q),

    U = Q U', s, V   with   D^T U = V diag(s) exactly   and the residual   R = D V - U diag(s),

and R, which is orthogonal to Q, is added to the basis. From a random first block these are the
spaces of a block Krylov method (Halko, Martinsson & Tropp 2011, section 4.5; Musco & Musco 2015,
algorithm 2). A full basis is restarted from its best vectors (thick restart, Wu & Simon 2000). The
iteration ends when R is so small that another round could not improve the approximation.
"""

from __future__ import annotations

import math

import numpy as np

from ..threads import blocks

Array = np.ndarray
EPS = np.finfo(np.float64).eps
TINY = np.finfo(np.float64).tiny
SPARE = 8  # vectors beyond the r wanted ones, with which these converge faster
BLOCKS = 6  # blocks of r + SPARE vectors in a full basis
WORTH = 16  # rounds; a matrix that allows fewer is decomposed whole, which is as fast
PRECISION = 1e-11  # relative, of the squared error


def leading_triplets(D: Array, r: int) -> tuple[Array, Array, Array]:
    """U (O, k), values (k or k + 1,), Vt (k, I): r or more leading triplets of a finite D (O, I).

    A small D is decomposed whole. With k + 1 values, the last one is the measured norm of the
    rest, |D - U diag(values) Vt|. It is the smallest for rank k (Eckart & Young 1936), to 1e-10
    relative or to the rounding errors of |D|.

    Stopping rule: for a triplet with the residual R_i, the true sigma_i^2 is larger than the
    computed one by at most e = sigma_i |R_i|, and by at most e^2 / gap, where gap is the distance
    of sigma_i^2 from the first square that is left out (Parlett 1998, sections 11.5 and 11.7); the
    computed squares are used for the gap.

    Residuals cannot show that a larger triplet is missing; with a random first block that has a
    negligible probability. Its seed is fixed, so equal D have equal results. If the values are so
    close that the rounds do not suffice, D is decomposed whole.
    """
    largest = max(float(D.max(initial=0)), -float(D.min(initial=0)))
    exponent = math.frexp(largest)[1]
    if abs(exponent) > 200:  # squares would overflow or vanish
        U, values, Vt = leading_triplets(np.ldexp(D, -exponent), r)
        return U, np.ldexp(values, exponent), Vt
    rounds = min(D.shape) // (r + SPARE)  # together they cost about as much as the decomposition
    triplets = None
    if rounds >= WORTH:
        triplets = _iterate(D, r, rounds)
    return triplets or np.linalg.svd(D, full_matrices=False)


def _iterate(D: Array, r: int, rounds: int) -> tuple[Array, Array, Array] | None:
    """The r leading triplets, with the norm of the rest as last value; None if not converged."""
    k = r + SPARE
    norm = float(np.linalg.norm(D))
    rounding = max(D.shape) * (EPS * norm) ** 2
    start = np.random.default_rng(0).standard_normal((D.shape[1], k))
    Q = np.linalg.qr(D @ start)[0]
    B = Q.T @ D
    for _ in range(rounds):
        W, s, Vt = np.linalg.svd(B, full_matrices=False)
        if len(s) > k * (BLOCKS - 1):
            # The basis is full: restart with the first half of the Ritz vectors.
            half = len(s) // 2
            Vt = Vt[:half]
            Q = Q @ W[:, :half]
            B = s[:half, None] * Vt
            W = np.eye(half)
        U = Q @ W[:, :k]
        R = D @ Vt[:k].T - U * s[:k]
        explained = float((s[:r] ** 2).sum())
        missed = _missed_square(R, s, r)
        if missed <= PRECISION * max(norm**2 - explained, 0) + rounding:
            U = U[:, :r]
            Vt = Vt[:r]
            rest = distance(D, U * s[:r], Vt)
            if missed <= PRECISION * rest**2 + rounding:
                if abs(rest**2 + explained - norm**2) > rounding / EPS:
                    return None  # U or V is not orthonormal
                return U, np.append(s[:r], rest), Vt
        R, sizes, _ = np.linalg.svd(R, full_matrices=False)
        R = R[:, sizes > math.sqrt(rounding)]  # a smaller one has no direction
        if not R.shape[1]:
            return None
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            R = np.linalg.qr(R - Q @ (Q.T @ R))[0]
        Q = np.hstack([Q, R])
        B = np.vstack([B, R.T @ D])
    return None


def _missed_square(R: Array, s: Array, r: int) -> float:
    """A bound of the errors of the first r squares of s (k,), added up, from residuals R (O, k)."""
    residual = s[:r] * np.linalg.norm(R[:, :r], axis=0)
    gap = np.maximum(s[:r] ** 2 - s[r] ** 2, residual)
    gap = np.maximum(gap, TINY)
    return float((residual * (residual / gap)).sum())


def distance(D: Array, B: Array, A: Array) -> float:
    """|D - B A|, some rows at a time.    D (O, I), B (O, r), A (r, I)"""
    rows = blocks(len(D), (1 << 20) // D.shape[1])
    return math.hypot(*(float(np.linalg.norm(D[at] - B[at] @ A)) for at in rows))
