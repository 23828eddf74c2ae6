"""The algebra of low-rank factors: matrices s B A, none of them ever formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError

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


class Term(NamedTuple):
    """`weight` times what one adapter, the one at place `number`, adds to a layer."""

    part: Part
    weight: float
    number: int = 0

    def weighted(self) -> Part:
        """The part with the weight in its c."""
        return self.part._replace(c=self.weight * self.part.c)


class Dense(NamedTuple):
    """dW (O, I) in float64: what an adapter without factors adds to a weight, times c."""

    dW: Array
    c: float = 1.0


def float64(p: Any) -> Array:
    """A parameter's values in float64 on the host."""
    return p.numpy().astype(np.float64)  # type: ignore[no-any-return]


def cat(parts: Sequence[Part]) -> tuple[Array, Array]:
    """A (q, I), B (O, q) with B A = sum c_i B_i A_i; q is the sum of the ranks."""
    A = np.concatenate([part.A for part in parts])
    B = np.concatenate([part.c * part.B for part in parts], axis=1)
    return A, B


def svd(parts: Sequence[Part], r: int) -> tuple[Array, Array]:
    """A (r, I), B (O, r) whose product is the nearest of rank r to sum c_i B_i A_i."""
    A, B, _ = truncate_rank(*cat(parts), 1.0, r)
    return A, B


def linear(parts: Sequence[Part]) -> tuple[Array, Array]:
    """A (r, I), B (O, r) as PEFT adds factors of one rank r; for several, B A is not the sum.

    A = sum sgn(c_i) sqrt|c_i| A_i, B = sum sqrt|c_i| B_i
    """
    A: Any = 0
    B: Any = 0
    for part in parts:
        root = math.sqrt(abs(part.c))
        A = A + math.copysign(root, part.c) * part.A
        B = B + root * part.B
    return A, B


def factors_from_svd(U: Array, values: Array, Vt: Array, r: int) -> tuple[Array, Array, Row]:
    """A (r, I), B (O, r) with s = 1 for dW = U diag(values) Vt, and how far B A is from dW.

    U (O, k), values (k,) falling, Vt (k, I). A and B each get the square roots of the values, so
    that neither is far larger; beyond k they are filled up with zeros. Values beyond the first r
    only add to the error: one may represent all of them.
    """
    k = min(r, len(values))
    root = np.sqrt(values[:k])
    A = root[:, None] * Vt[:k]
    B = U[:, :k] * root
    whole = float(np.linalg.norm(values))
    missed = float(np.linalg.norm(values[k:]))
    return *pad_rank(A, B, r), error_row(whole, missed)


def truncate_rank(A: Array, B: Array, s: float, r: int) -> tuple[Array, Array, Row]:
    """A (r, I), B (O, r) whose product is the nearest of rank r to dW = s B A, and how far it is.

    A (q, I), B (O, q). s |B| |A| must be finite: LAPACK's decomposition of an infinite core may
    never end. B = Q R and A^T = P S give s B A = Q (s R S^T) P^T, so only the q x q core is
    decomposed.
    """
    Q, R = np.linalg.qr(B)
    P, S = np.linalg.qr(A.T)
    core = s * (R @ S.T)
    U, values, Vt = np.linalg.svd(core, full_matrices=False)
    return factors_from_svd(Q @ U, values, Vt @ P.T, r)


def clamp_factors(A: Array, B: Array, quantile: float) -> tuple[Array, Array]:
    """V^T and U diag(sigma), both clipped to +-q, of the factors that `factors_from_svd` gives.

    q is the quantile of the entries of both, as in PEFT: not of their absolute values. ConfigError
    if it is not above 0.
    """
    root = np.linalg.norm(A, axis=1)  # of each singular value
    Vt = A / np.where(root, root, 1)[:, None]
    US = B * root
    q = float(np.quantile(np.concatenate([US.ravel(), Vt.ravel()]), quantile))
    if q <= 0:
        raise ConfigError(
            f"svd_clamp {quantile:g}: this quantile of the factors is {q:.3g}, and they are "
            "clipped to +- that: give more than 0.5"
        )
    return np.clip(Vt, -q, q), np.clip(US, -q, q)


def pad_rank(A: Array, B: Array, r: int) -> tuple[Array, Array]:
    """A (q, I), B (O, q) with zeros up to rank r >= q, which do not change B A."""
    more = (0, r - len(A))
    return np.pad(A, (more, (0, 0))), np.pad(B, ((0, 0), more))


def product_norm(A: Array, B: Array) -> float:
    """|B A|, Frobenius; not finite if a factor is not, or if float64 cannot square its entries.

    A (q, I), B (O, q). The orthonormal factors of both change no length, so the core has this norm.
    """
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(_core(A, B)))


def _core(A: Array, B: Array) -> Array:
    """R S^T (min(q, O), min(q, I)), where B = Q R and A^T = P S, so that B A = Q (R S^T) P^T."""
    R = np.linalg.qr(B)[1]
    S = np.linalg.qr(A.T)[1]
    return np.asarray(R @ S.T)


def error_row(whole: float, missed: float) -> Row:
    """|dW| = `whole`, the norm `missed` of the error, and that as a share of |dW|."""
    return {"|dW|": whole, "error": missed, "relative": missed / whole if whole else 0.0}


def rounding_error(A: Array, B: Array) -> float:
    """The largest |B A| that rounding may leave where B A is 0: q products, each an ulp off."""
    eps = np.finfo(np.float64).eps
    return float(len(A) * eps * np.linalg.norm(A) * np.linalg.norm(B))


def singular_values(A: np.ndarray, B: np.ndarray, scaling: float) -> np.ndarray:
    """The singular values of s B A that can differ from zero, falling: (min(r, I, O),).

    A (r, I), B (O, r). They are those of the small core R S^T, where B = Q R and A^T = P S: Q and P
    change no singular value. One NaN if a factor or a product is not finite: LAPACK's decomposition
    of it may never end.
    """
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        return np.array([np.nan])
    with np.errstate(over="ignore", invalid="ignore"):
        core = _core(A.astype(np.float64), B.astype(np.float64))
    if not np.isfinite(core).all():
        return np.array([np.nan])
    return np.asarray(np.linalg.svd(core, compute_uv=False) * abs(scaling))


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the spectrum's energy: how many directions dW really uses.

    0 if dW is zero or not finite. Roy & Vetterli 2007, with the shares s_i^2 / sum s^2 in place of
    their s_i / sum s.
    """
    norm = float(np.linalg.norm(values))
    if not 0 < norm < math.inf:
        return 0.0
    share = (values / norm) ** 2
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
