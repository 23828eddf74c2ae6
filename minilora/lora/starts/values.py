"""First values of A and B by name, for one weight W (O, I), rank r and scaling s.

A start either leaves the base as it is, with B A = 0, or moves a part of W from the base into the
adapter. The first output is the base's in both cases (with loftq approximately):

    R + s B A = W        R = W - s B A takes W's place for as long as this adapter trains

                  A (r, I)              B (O, r)               the base becomes     source
    orthogonal    Q_odd^T N / 10        N' Q_even / 10         W                    PEFT
    pissa         sqrt(S_r / s) V_r^T   U_r sqrt(S_r / s)      W - U_r S_r V_r^T    arXiv 2404.02948
    olora         R_r                   Q_r                    W - s Q_r R_r        arXiv 2406.01775
    loftq         as pissa, of W - Q                           Q, decoded codes     arXiv 2310.08659
    eva           directions of x       0                      W                    arXiv 2410.07170
    lora_ga       c V_r^T               c U_(r+1..2r)          W - s B A            arXiv 2407.05000

U S V^T is the singular value decomposition of W, of W - Q (loftq) or of the gradient G (lora_ga),
and olora's Q R is the QR decomposition of W. orthogonal takes the odd and the even rows of a random
orthogonal Q (r, r), and normal N (r/2, I), N' (O, r/2). A new start is one function and one line of
STARTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, NonFiniteError
from ...threads import one_blas_thread
from ..singular import leading_triplets

Array = np.ndarray
GAMMA = 16  # LoRA-GA: A and B are in proportion to 1 / sqrt(GAMMA)
RHO = 2.0  # EVA: a layer's new rank is at most RHO times its rank
ROUNDS = 5  # LoftQ's iterations


class Given(NamedTuple):
    """What a start may read besides W, r and s.

    rng          random numbers
    covariance   (I, I), of the layer's inputs
    gradient     G (O, I), of the loss by W
    decode       W (O, I) -> Q (O, I), the values to which the codes of W decode
    rounds       number of LoftQ's iterations
    """

    rng: Any = None
    covariance: Array | None = None
    gradient: Array | None = None
    decode: Callable[[Array], Array] | None = None
    rounds: int = ROUNDS


class StartValues(NamedTuple):
    """First values in float64: A (r, I) and B (O, r).

    Q        (O, I), the new base, if that is neither W nor W - s B A
    rounds   the iteration of LoftQ that gave Q
    """

    A: Array
    B: Array
    Q: Array | None = None
    rounds: int = 0


Begin = Callable[[Array, int, float, Given], StartValues]


class Start(NamedTuple):
    """One line of the table STARTS.

    begin          the function (W, r, s, given) -> StartValues, all in float64
    word           PEFT's value of init_lora_weights
    needs          the field of Given that the user's data or options must fill; "" for none
    changes_base   whether another base takes the place of W
    fits           the largest r for W (O, I), as a function of min(O, I), or of I for eva
    divides        whether it divides by the scaling s
    """

    begin: Begin
    word: str
    needs: str = ""
    changes_base: bool = True
    fits: Callable[[int], int] = int
    divides: bool = False


# ---- the starts ----------------------------------------------------------------------------------


def orthogonal(W: Array, r: int, s: float, given: Given) -> StartValues:
    """Random A and B with B A = 0: A is built on the odd rows of an orthogonal Q, B on the even."""
    O, I = W.shape
    Q, _ = np.linalg.qr(given.rng.standard_normal((r, r)))
    A = Q[0::2].T @ given.rng.standard_normal((r // 2, I)) / 10
    B = given.rng.standard_normal((O, r // 2)) @ Q[1::2] / 10
    return StartValues(A, B)


def pissa(W: Array, r: int, s: float, given: Given) -> StartValues:
    """The r leading singular triplets of W (Meng et al. 2024, section 3)."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return StartValues(*_balance(U, S, Vt, r, s))


def leading_pissa(W: Array, r: int, s: float, given: Given) -> StartValues:
    """The r leading triplets by a block Krylov method: |W - s B A| is minimal to 1e-10 relative."""
    U, S, Vt = leading_triplets(W, r)
    return StartValues(*_balance(U, S, Vt, r, s))


def olora(W: Array, r: int, s: float, given: Given) -> StartValues:
    """An orthonormal basis of W's first r columns, and W's coordinates in it."""
    Q, R = np.linalg.qr(W)
    return StartValues(R[:r], Q[:, :r])


def loftq(W: Array, r: int, s: float, given: Given) -> StartValues:
    """Q + s B A near W, Q being decoded codes (Li et al. 2023, algorithm 1).

    Each iteration computes Q from the codes of W - s B A, then A and B from the decomposition of
    W - Q. The error |W - Q - s B A| may rise from one iteration to the next, so the best one is
    returned; the paper returns the last.
    """
    assert given.decode is not None
    best = StartValues(np.zeros((r, W.shape[1])), np.zeros((len(W), r)))
    least = math.inf
    A, B, *_ = best
    for number in range(1, given.rounds + 1):
        Q = given.decode(W - s * (B @ A))
        U, S, Vt = np.linalg.svd(W - Q, full_matrices=False)
        A, B = _balance(U, S, Vt, r, s)
        error = float(np.linalg.norm(S[r:]))
        if error < least:
            best = StartValues(A, B, Q, number)
            least = error
    return best


def eva(W: Array, r: int, s: float, given: Given) -> StartValues:
    """A: the r principal components of the layer's inputs; B = 0 (Paischer et al. 2024)."""
    assert given.covariance is not None
    _, vectors = np.linalg.eigh(given.covariance)  # eigenvalues rise
    return StartValues(vectors[:, ::-1][:, :r].T, np.zeros((len(W), r)))


def lora_ga(W: Array, r: int, s: float, given: Given) -> StartValues:
    """A and B whose first step of SGD follows the best approximation of G of rank 2 r.

    To first order in lr, dW changes by -lr s^2 (G A^T A + B B^T G). Here G A^T A is c^2 times the
    first r terms of G's decomposition, and B B^T G is c^2 times the next r (Wang et al. 2024,
    theorem 3.1).
    """
    U, _, Vt = _decompose(given.gradient)
    c = _ga_scale(W)
    return StartValues(c * Vt[:r], c * U[:, r : 2 * r])


def stable_lora_ga(W: Array, r: int, s: float, given: Given) -> StartValues:
    """PEFT's lora_ga with scale "stable": A = V_r^T, B = c U_(r+1..2r) S_(r+1..2r)."""
    U, S, Vt = _decompose(given.gradient)
    return StartValues(Vt[:r], _ga_scale(W) * U[:, r : 2 * r] * S[r : 2 * r])


def _balance(U: Array, S: Array, Vt: Array, r: int, s: float) -> tuple[Array, Array]:
    """A (r, I), B (O, r) with s B A = U_r S_r Vt_r and A A^T = B^T B = S_r / s."""
    root = np.sqrt(S[:r] / s)
    return root[:, None] * Vt[:r], U[:, :r] * root


def _decompose(G: Array | None) -> tuple[Array, Array, Array]:
    """U (O, k), S (k,), Vt (k, I) of G (O, I), with k = min(O, I)."""
    assert G is not None
    return np.linalg.svd(G, full_matrices=False)


def _ga_scale(W: Array) -> float:
    """c = O^(1/4) / sqrt(gamma), for W (O, I)."""
    return float(len(W) ** 0.25 / math.sqrt(GAMMA))


# ---- the table -----------------------------------------------------------------------------------

PISSA_NITER = "pissa_niter_"
STARTS = {
    "orthogonal": Start(orthogonal, "orthogonal", changes_base=False, fits=lambda side: 1 << 24),
    "pissa": Start(pissa, "pissa", divides=True),
    "olora": Start(olora, "olora"),
    "loftq": Start(loftq, "loftq", needs="decode", divides=True),
    "eva": Start(eva, "eva", needs="covariance", changes_base=False),
    "lora_ga": Start(lora_ga, "lora_ga", needs="gradient", fits=lambda side: side // 2),
    "lora_ga_stable": Start(
        stable_lora_ga, "lora_ga", needs="gradient", fits=lambda side: side // 2
    ),
}
NAMES = (*STARTS, f"{PISSA_NITER}N")


def find_start(name: Any) -> Start | None:
    """The start of this name, or None; in "pissa_niter_N", N is any number."""
    if not isinstance(name, str):
        return None
    number = name.removeprefix(PISSA_NITER)
    if number != name and number.isascii() and number.isdecimal() and len(number) < 10:
        return Start(leading_pissa, name, divides=True)
    return STARTS.get(name)


def check_rank(name: str, path: str, shape: Sequence[int], r: int) -> None:
    """ConfigError if the layer `path` of this shape (O, I) cannot have this start with rank r."""
    start = find_start(name)
    assert start is not None
    if name == "orthogonal" and r % 2:
        raise ConfigError(
            f"init_lora_weights='orthogonal' needs an even r, and {path} has r = {r}: "
            f"choose {r + 1} or another even number"
        )
    most = start.fits(shape[1] if name == "eva" else min(shape))
    if r > most:
        raise ConfigError(
            f"init_lora_weights={name!r}: {path} is {shape[0]} x {shape[1]}, which allows r up to "
            f"{most}, got {r}: choose a smaller r, or give this layer one in rank_pattern"
        )


def begin(name: str, path: str, W: Array, r: int, s: float, given: Given) -> StartValues:
    """First values of the layer `path` by the start `name`.    W (O, I) in float64

    ConfigError for a rank or a scaling that the start cannot have, NonFiniteError for a weight that
    is not finite.
    """
    check_rank(name, path, W.shape, r)
    start = find_start(name)
    assert start is not None
    if start.divides and s == 0:
        raise ConfigError(
            f"init_lora_weights={name!r} divides by the scaling lora_alpha / r, which is 0 for "
            f"{path}: set lora_alpha, and alpha_pattern, above 0"
        )
    read = [W, getattr(given, start.needs)] if start.needs in ("covariance", "gradient") else [W]
    if not all(np.isfinite(array).all() for array in read):
        what = {"covariance": " or its inputs", "gradient": " or its gradient"}.get(start.needs, "")
        raise NonFiniteError(f"{path}: its weight{what} is not finite, so it has no {name} start")
    with one_blas_thread():  # the bits must not depend on the number of cores
        return start.begin(W, r, s, given)


# ---- EVA's ranks ---------------------------------------------------------------------------------


def redistribute(
    ratios: dict[str, Array], ranks: dict[str, int], rho: float = RHO
) -> dict[str, int]:
    """The new rank of each layer, perhaps 0; their sum stays (Paischer et al. 2024, section 3.3).

    ratios   by layer, the eigenvalues of its inputs' covariance over their sum, falling
    ranks    by layer, before; a new rank is at most rho times that, rounded

    The largest ratios of all layers count, one rank each. Where ratios are equal, as in layers that
    share an input, the first layer's comes first.
    """
    candidates = []
    for number, (path, values) in enumerate(ratios.items()):
        most = round(rho * ranks[path])
        candidates += [(-float(value), number, path) for value in values[:most]]
    counts = dict.fromkeys(ratios, 0)
    for _, _, path in sorted(candidates)[: sum(ranks.values())]:
        counts[path] += 1
    return counts
