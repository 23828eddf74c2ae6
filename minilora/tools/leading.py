"""The leading singular triplets of a large matrix, without its whole decomposition, which takes a minute.

Rayleigh-Ritz on a basis Q that grows: the decomposition of Q^T D gives the best approximations there are in span(Q),

    U = Q U',  s,  V   with   D^T U = V diag(s) exactly   and   R = D V - U diag(s)   still missing,

and R, orthogonal to Q, is what Q lacks. With a random first block these are the spaces of a block Krylov method (Halko,
Martinsson & Tropp 2011, section 4.5; Musco & Musco 2015, algorithm 2); a full basis begins anew with its best vectors,
which loses nothing that matters (Wu & Simon 2000). It ends when R says that more would change nothing.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray
EPS, TINY = np.finfo(np.float64).eps, np.finfo(np.float64).tiny
SPARE = (
    8  # vectors more than are wanted: these converge as fast as the first that is left out is small
)
BLOCKS = 6  # of r + SPARE vectors in a full basis
WORTH = 16  # rounds: a matrix for which fewer cost as much as its whole decomposition gets that
PRECISION = 1e-11  # of the square of the error


def leading_triplets(D: Array, r: int) -> tuple[Array, Array, Array]:
    """D (O, I), finite -> U (O, k), values (k or k + 1,), Vt (k, I): the r largest or more, of a small D all.

    A value more than triplets is the norm of all that they leave, |D - U diag(values) Vt|, which is measured. It is the
    least there is at that rank (Eckart & Young 1936), to 1e-10 of itself or to what rounding leaves of |D|: where a
    triplet is found up to R_i, its value's true square is larger by at most sigma_i |R_i|, and by no more than that
    number's square over its distance from the first square that is left out (Parlett 1998, sections 11.5 and 11.7), for
    which its own approximation stands.

    No residual says that a larger triplet was missed altogether; the random block sees to that, but for a negligible
    chance. Its seed is fixed: equal D have equal results. Where the values lie so close that rounds run out, D is
    decomposed whole.
    """
    k, n = r + SPARE, min(D.shape)
    rounds = n // k  # which together cost about what the whole decomposition does
    exponent = math.frexp(max(float(D.max(initial=0)), -float(D.min(initial=0))))[1]
    if abs(exponent) > 200:  # else squares overflow, or vanish
        U, values, Vt = leading_triplets(np.ldexp(D, -exponent), r)
        return U, np.ldexp(values, exponent), Vt
    found = _ritz(D, r, k, rounds) if rounds >= WORTH else None
    return found or np.linalg.svd(D, full_matrices=False)


def _ritz(D: Array, r: int, k: int, rounds: int) -> tuple[Array, Array, Array] | None:
    norm = float(np.linalg.norm(D))
    rounding = max(D.shape) * (EPS * norm) ** 2
    Q = np.linalg.qr(D @ np.random.default_rng(0).standard_normal((D.shape[1], k)))[0]
    B = Q.T @ D
    for _ in range(rounds):
        W, s, Vt = np.linalg.svd(B, full_matrices=False)
        if len(s) > k * (BLOCKS - 1):  # full: half of the Ritz vectors begin anew
            W, Vt = W[:, : len(s) // 2], Vt[: len(s) // 2]
            Q, B, W = Q @ W, s[: len(Vt), None] * Vt, np.eye(len(Vt))
        U, V = Q @ W[:, :k], Vt[:k].T
        R = D @ V - U * s[:k]
        residual = s[:r] * np.linalg.norm(R[:, :r], axis=0)
        gap = np.maximum(np.maximum(s[:r] ** 2 - s[r] ** 2, residual), TINY)
        missed = float((residual * (residual / gap)).sum())
        if missed <= PRECISION * max(norm**2 - float((s[:r] ** 2).sum()), 0) + rounding:
            left = _left(D, U[:, :r] * s[:r], Vt[:r])
            orthonormal = abs(left**2 + float((s[:r] ** 2).sum()) - norm**2) <= rounding / EPS
            if missed <= PRECISION * left**2 + rounding:
                return (U[:, :r], np.append(s[:r], left), Vt[:r]) if orthonormal else None
        R, sizes, _ = np.linalg.svd(R, full_matrices=False)
        R = R[:, sizes > math.sqrt(rounding)]  # less is no direction
        if not R.shape[1]:
            return None
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            R = np.linalg.qr(R - Q @ (Q.T @ R))[0]
        Q, B = np.hstack([Q, R]), np.vstack([B, R.T @ D])
    return None


def _left(D: Array, B: Array, A: Array) -> float:
    """|D - B A|, some rows at a time.    D (O, I), B (O, r), A (r, I)"""
    step = max(1, (1 << 20) // D.shape[1])
    return math.hypot(
        *(
            float(np.linalg.norm(D[i : i + step] - B[i : i + step] @ A))
            for i in range(0, len(D), step)
        )
    )
