"""The leading singular triplets of a large matrix, without its whole decomposition, which takes a
minute.

Rayleigh-Ritz on a basis Q that grows: the decomposition of Q^T D gives the best approximations in
span(Q),

    U = Q U',  s,  V   with   D^T U = V diag(s) exactly   and   R = D V - U diag(s)   still missing,

and R, orthogonal to Q, is what Q lacks. With a random first block these are the spaces of a block
Krylov method (Halko, Martinsson & Tropp 2011, section 4.5; Musco & Musco 2015, algorithm 2); a full
basis begins anew with its best vectors, which loses nothing that matters (Wu & Simon 2000). The
iteration ends when R shows that more would change nothing.
"""

from __future__ import annotations

import math

import numpy as np

from ..threads import blocks

Array = np.ndarray
EPS = np.finfo(np.float64).eps
TINY = np.finfo(np.float64).tiny
# Vectors beyond the r wanted ones: these converge faster the smaller the first left-out value is.
SPARE = 8
BLOCKS = 6  # of r + SPARE vectors in a full basis
WORTH = 16  # rounds: below, they save nothing, and the matrix is decomposed whole
PRECISION = 1e-11  # of the square of the error


def leading_triplets(D: Array, r: int) -> tuple[Array, Array, Array]:
    """D (O, I), finite -> U (O, k), values (k or k + 1,), Vt (k, I): the r largest or more; all of
    a small D.

    If there is one value more than triplets, it is the norm of all that they leave, |D - U
    diag(values) Vt|, which is measured. It is the least possible at that rank (Eckart & Young
    1936), to 1e-10 of itself or to what rounding leaves of |D|: where a triplet is known up to R_i,
    its value's true square is larger by at most sigma_i |R_i|, and by no more than that number's
    square over its distance from the first square that is left out (Parlett 1998, sections 11.5 and
    11.7), for which its own approximation is used.

    No residual shows that a larger triplet was missed altogether; the random block excludes that,
    but for a negligible chance. Its seed is fixed: equal D have equal results. If the values are so
    close that rounds run out, D is decomposed whole.
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
    """The r triplets and the norm of the rest; None if the rounds do not suffice."""
    k = r + SPARE
    norm = float(np.linalg.norm(D))
    rounding = max(D.shape) * (EPS * norm) ** 2
    start = np.random.default_rng(0).standard_normal((D.shape[1], k))
    Q = np.linalg.qr(D @ start)[0]
    B = Q.T @ D
    for _ in range(rounds):
        W, s, Vt = np.linalg.svd(B, full_matrices=False)
        if len(s) > k * (BLOCKS - 1):
            # The basis is full: half of the Ritz vectors begin anew.
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
            rest = _distance(D, U * s[:r], Vt)
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
    """A bound of what the first r squares of s (k,) lack, from the residuals R (O, k)."""
    residual = s[:r] * np.linalg.norm(R[:, :r], axis=0)
    gap = np.maximum(s[:r] ** 2 - s[r] ** 2, residual)
    gap = np.maximum(gap, TINY)
    return float((residual * (residual / gap)).sum())


def _distance(D: Array, B: Array, A: Array) -> float:
    """|D - B A|, some rows at a time.    D (O, I), B (O, r), A (r, I)"""
    rows = blocks(len(D), (1 << 20) // D.shape[1])
    return math.hypot(*(float(np.linalg.norm(D[at] - B[at] @ A)) for at in rows))
