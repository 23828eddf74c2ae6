"""Properties of starts: the first output, and the first values. The notation is case.py's.

W is the case's weight; the first adapter gives s, and r as far as the start allows it. Starts and
bounds are computed in float64; only a model's stored weights have another u. An orthonormal factor
by Householder's method has Q^T Q = 1 to at most 10 r^2 u (Higham 2002, theorem 19.4).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..backend import Array
from ..lora import get_peft_model
from ..lora.starts import residual, values
from ..lora.starts.values import Given, StartValues
from ..quant.codes import encode
from .case import Case, unit_roundoff
from .layers import OneLayer
from .measuring import (
    Measured,
    Property,
    compare,
    count_nonzeros,
    is_dense,
    is_lora,
    make_registrar,
    svd_error,
    worst,
)

PROPERTIES: list[Property] = []
U = unit_roundoff(np.float64)


def can_begin(case: Case) -> bool:
    """Is it plain LoRA over a dense weight: finite, not 0, with several rows and columns?"""
    if not (is_lora(case) and is_dense(case)) or case.base.weight.fixed:
        return False
    W = case.base.dense_weight()
    return min(W.shape) > 1 and bool(np.isfinite(W).all() and W.any())


holds = make_registrar(PROPERTIES, can_begin)


def weight_of(case: Case) -> tuple[Array, float]:
    """(W (O, I) in float64, s)"""
    W = case.base.dense_weight().astype(np.float64)
    return W, float(case.adapters[case.first].scaling)


def rank_of(case: Case, most: int) -> int:
    """The first adapter's r, at most `most`."""
    return int(min(case.adapters[case.first].r, most))


def begin(name: str, W: Array, r: int, s: float, given: Given) -> StartValues:
    return values.begin(name, "proj", W, r, s, given)


def gamma(n: int) -> float:
    """gamma_n in float64."""
    return n * U / (1 - n * U)


def measure_identity(M: Array, size: float = 1.0) -> tuple[Array, float]:
    """(error, bound) of M = size 1, where M (r, r) is the Gram matrix of an orthonormal factor."""
    r = len(M)
    return M - size * np.eye(r), size * (10 * r * r + 64 + r) * U


def measure_gram(F: Array, size: float = 1.0) -> tuple[Array, float]:
    """(error, bound) of F^T F = size 1, for F (n, r): inner products of n terms."""
    error, bound = measure_identity(F.T @ F, size)
    return error, bound + size * 2 * gamma(len(F))


# ---- every start that changes the base -----------------------------------------------------------


@holds("changed base", "R + s B A = W", "Meng et al. 2024, eq. (5)")
def measure_changed_base(case: Case) -> Measured:
    """R is rounded once: u |R|. Both sums of r products, with s and W: gamma_(2r+6)."""
    W, s = weight_of(case)
    name = case.rng.choice(["pissa", "pissa_niter_4", "olora"])
    r = rank_of(case, min(W.shape))
    config = case.configs[case.first]
    alpha = s * (r**0.5 if config.use_rslora else r)
    config = dataclasses.replace(config, r=r, lora_alpha=alpha, init_lora_weights=str(name))
    model = get_peft_model(OneLayer(case.layer().base_layer), config)
    layer = model.model.proj
    adapter = layer.adapters["default"]
    R = layer.base_layer.dense_weight().astype(np.float64)
    A = adapter.lora_A.data.astype(np.float64)
    B = adapter.lora_B.data.astype(np.float64)
    S = adapter.scaling * (abs(B) @ abs(A))
    error = R + adapter.scaling * (B @ A) - W
    return compare(error, case.u * abs(R) + gamma(2 * r + 6) * (S + abs(W) + abs(R)))


@holds("way back", "R + s B A = W + [s B, -s B₀] [A; A₀]", "Meng et al. 2024, appendix C")
def measure_way_back(case: Case) -> Measured:
    """Each side is a sum of 2 r products, with two factors s, and W: gamma_(2r+6) S."""
    W, s = weight_of(case)
    adapter = case.adapters[case.first]
    A = adapter.lora_A.data.astype(np.float64)
    B = adapter.lora_B.data.astype(np.float64)
    A0, B0 = (case.rng.standard_normal(factor.shape) * abs(factor).max() for factor in (A, B))
    new_A, new_B = residual.difference(A, B, A0, B0, s)
    error = W + new_B @ new_A - (W - s * (B0 @ A0) + s * (B @ A))
    S = abs(W) + s * (abs(B) @ abs(A) + abs(B0) @ abs(A0))
    return compare(error, 2 * gamma(2 * len(A) + 6) * S)


# ---- orthogonal ----------------------------------------------------------------------------------


def begin_orthogonal(case: Case) -> tuple[int, StartValues]:
    W, s = weight_of(case)
    r = 2 * max(1, rank_of(case, 16) // 2)
    return r, begin("orthogonal", W, r, s, Given(case.rng))


@holds("orthogonal start", "B A = 0", "peft 0.21, orthogonal_init")
def measure_orthogonal(case: Case) -> Measured:
    """B A = N' Q_even Q_oddᵀ N / 100: sums of at most r terms; Q_even Q_oddᵀ is 0 to 10 r² u."""
    r, (A, B, *_) = begin_orthogonal(case)
    rng = case.rng
    Q = abs(np.linalg.qr(rng.standard_normal((r, r)))[0])
    N = abs(rng.standard_normal((r // 2, A.shape[1])))
    M = abs(rng.standard_normal((len(B), r // 2)))
    S = M @ Q[1::2] @ Q[0::2].T @ N / 100
    off = np.outer(np.linalg.norm(M, axis=1), np.linalg.norm(N, axis=0)) / 100
    return compare(B @ A, gamma(3 * r + 8) * S + (10 * r * r + 64) * U * off)


@holds("both orthogonal factors move", "rank A = rank B = r / 2", "peft 0.21, orthogonal_init")
def measure_orthogonal_ranks(case: Case) -> Measured:
    """A factor of zeros would freeze the other one; singular values err by svd_error."""
    r, (A, B, *_) = begin_orthogonal(case)
    pairs: list[tuple[Any, Any]] = []
    for factor in (A, B):
        S = np.linalg.svd(factor, compute_uv=False)
        bound = svd_error(factor.shape, S[0], 4 + r)
        pairs.append((S[r // 2 :].max(initial=0), bound))
        pairs.append((float(not factor.any()), 0))
    return worst(*pairs)


# ---- pissa ---------------------------------------------------------------------------------------


@holds("pissa's residual", "|W - s B A|₂ = σᵣ₊₁", "Meng et al. 2024, section 3")
def measure_pissa(case: Case) -> Measured:
    """Singular values err by max(I, O) eps σ₁ each time (Weyl), the product by gamma_(r+4)."""
    W, s = weight_of(case)
    r = rank_of(case, min(W.shape) - 1)
    A, B, *_ = begin("pissa", W, r, s, Given())
    sigma = np.linalg.svd(W, compute_uv=False)
    left = np.linalg.norm(W - s * (B @ A), 2)
    size = s * np.linalg.norm(abs(B) @ abs(A)) + np.linalg.norm(W)
    bound = svd_error(W.shape, sigma[0], 4) + gamma(r + 4) * size
    return compare(left - sigma[r], bound)


@holds("pissa is balanced", "A Aᵀ = Bᵀ B", "Meng et al. 2024, section 3")
def measure_pissa_balance(case: Case) -> Measured:
    """Both are diag(σ) / s, to what the singular vectors' Gram matrices err by."""
    W, s = weight_of(case)
    r = rank_of(case, min(W.shape))
    pairs = []
    for name in ("pissa", "pissa_niter_4"):
        A, B, *_ = begin(name, W, r, s, Given())
        size = float((A * A).sum(axis=1).max())
        n = sum(W.shape) + 10 * r * r + 64
        pairs.append((A @ A.T - B.T @ B, 4 * n * U * size))
    return worst(*pairs)


@holds("leading part", "|W - s B A|² = Σᵢ>ᵣ σᵢ²", "Musco & Musco 2015, theorem 1; Eckart & Young")
def measure_leading(case: Case) -> Measured:
    """To 1e-10 relative, and rounding; for a matrix large enough for the block Krylov method."""
    _, s = weight_of(case)
    r = 1
    V = case.rng.standard_normal((160, 150)) * 0.97 ** np.arange(150)
    A, B, *_ = begin("pissa_niter_4", V, r, s, Given())
    sigma = np.linalg.svd(V, compute_uv=False)
    least = float((sigma[r:] ** 2).sum())
    square = float(np.linalg.norm(V - s * (B @ A)) ** 2)
    whole = float((sigma**2).sum())
    return compare(square - least, 1e-10 * least + V.size * U * whole)


# ---- olora ---------------------------------------------------------------------------------------


def begin_olora(case: Case) -> tuple[Array, int, StartValues]:
    W, _ = weight_of(case)
    r = rank_of(case, min(W.shape))
    return W, r, begin("olora", W, r, 1.0, Given())


@holds("olora's basis", "Bᵀ B = 1", "Büyükakyüz 2024, algorithm 1")
def measure_olora_basis(case: Case) -> Measured:
    """To 10 k² u, k = min(O, I): all k columns of Q are computed (Householder)."""
    W, _, (_, B, *_) = begin_olora(case)
    k = min(W.shape)
    error, bound = measure_gram(B)
    return compare(error, bound + 10 * k * k * U)


@holds("olora's residual", "s = 1:  R's first r columns are 0", "Büyükakyüz 2024, algorithm 1")
def measure_olora_residual(case: Case) -> Measured:
    """Householder's QR is that of W + F, where a column of F is at most 10 O k u of W's."""
    W, r, (A, B, *_) = begin_olora(case)
    left = (W - B @ A)[:, :r]
    columns = np.linalg.norm(W[:, :r], axis=0)
    return compare(left, (10 * len(W) * min(W.shape) + 64) * U * columns[None])


# ---- loftq ---------------------------------------------------------------------------------------


def begin_loftq(
    case: Case, rounds: int, codes: list[Array] | None = None
) -> tuple[Array, int, float, StartValues]:
    """(W, r, s, the first values); Q of each iteration is appended to `codes`."""
    W, s = weight_of(case)
    kind = str(case.rng.choice(["nf4", "fp4", "int8"]))
    r = rank_of(case, min(W.shape))

    def decode(W: Array) -> Array:
        Q = np.asarray(encode(W.astype(np.float32), kind).decode(np.float64))
        if codes is not None:
            codes.append(Q)
        return Q

    return W, r, s, begin("loftq", W, r, s, Given(decode=decode, rounds=rounds))


@holds("loftq's error", "|W - Q - s B A|² = |W - Q|² - Σᵢ≤ᵣ σᵢ²", "Li et al. 2023, eq. (6)")
def measure_loftq(case: Case) -> Measured:
    """Each σᵢ² of W - Q errs by 2 σ₁ svd_error, the sums of squares by gamma_(O I + r)."""
    W, r, s, (A, B, Q, _) = begin_loftq(case, 2)
    D = W - Q
    sigma = np.linalg.svd(D, compute_uv=False)
    square = np.linalg.norm(D - s * (B @ A)) ** 2
    expected = np.linalg.norm(D) ** 2 - (sigma[:r] ** 2).sum()
    error = square - expected
    whole = (sigma**2).sum()
    bound = 8 * len(sigma) * sigma[0] * svd_error(W.shape, sigma[0])
    return compare(error, bound + gamma(W.size + r) * whole)


@holds("loftq keeps the best", "|W - Q - s B A| = min over t of e_t", "Li et al. 2023, algorithm 1")
def measure_loftq_best(case: Case) -> Measured:
    """e_t² of iteration t is the sum of σᵢ² over i > r, for W - Q_t."""
    codes: list[Array] = []
    W, r, s, (A, B, Q, _) = begin_loftq(case, 5, codes)
    errors = []
    for Q_t in codes:
        sigma = np.linalg.svd(W - Q_t, compute_uv=False)
        errors.append(np.linalg.norm(sigma[r:]))
    error = np.linalg.norm(W - Q - s * (B @ A)) - min(errors)
    return compare(error, svd_error(W.shape, float(np.linalg.norm(W)), 4))


# ---- eva -----------------------------------------------------------------------------------------


def begin_eva(case: Case) -> tuple[Array, int, StartValues]:
    W, s = weight_of(case)
    I = W.shape[1]
    X = case.rng.standard_normal((I + 3, I)) * 0.9 ** np.arange(I)
    C = np.cov(X, rowvar=False, bias=True).reshape(I, I)
    r = rank_of(case, I)
    return C, r, begin("eva", W, r, s, Given(covariance=C))


@holds("eva's variance", "tr(A C Aᵀ) = Σᵢ≤ᵣ λᵢ", "Paischer et al. 2024, section 3.2; Ky Fan 1949")
def measure_eva(case: Case) -> Measured:
    """Each eigenvalue errs by I eps λ₁, and so does the variance along each row of A."""
    C, r, (A, *_) = begin_eva(case)
    eigenvalues = np.linalg.eigvalsh(C)[::-1]
    error = np.trace(A @ C @ A.T) - eigenvalues[:r].sum()
    return compare(error, svd_error(C.shape, eigenvalues[0], 4 * r + 4))


@holds("eva's start", "B = 0,  A Aᵀ = 1", "Paischer et al. 2024, section 3.2")
def measure_eva_start(case: Case) -> Measured:
    """B is exactly 0; eigenvectors are orthonormal to 10 I² u, as by Householder's method."""
    C, _, (A, B, *_) = begin_eva(case)
    error, bound = measure_gram(A.T)
    return worst((error, bound + 10 * C.size * U), (count_nonzeros(B), 0))


# ---- lora_ga -------------------------------------------------------------------------------------


def begin_lora_ga(case: Case) -> tuple[Array, int, StartValues]:
    W, s = weight_of(case)
    G = case.rng.standard_normal(W.shape)
    r = rank_of(case, min(W.shape) // 2)
    return G, r, begin("lora_ga", W, r, s, Given(gradient=G))


@holds("lora_ga's first step", "B Bᵀ G + G Aᵀ A ∝ G of rank 2 r", "Wang et al. 2024, thm 3.1")
def measure_lora_ga(case: Case) -> Measured:
    """|G - t step|² = Σᵢ>₂ᵣ σᵢ² for the best t, the least for rank 2 r (Eckart & Young 1936). Each
    σᵢ errs by svd_error, and its square by 2 σᵢ of that."""
    G, r, (A, B, *_) = begin_lora_ga(case)
    step = B @ (B.T @ G) + (G @ A.T) @ A
    t = (step * G).sum() / (step * step).sum()
    sigma = np.linalg.svd(G, compute_uv=False)
    square = np.linalg.norm(G - t * step) ** 2
    error = square - (sigma[2 * r :] ** 2).sum()
    return compare(error, 2 * sigma.sum() * svd_error(G.shape, sigma[0], 4))


@holds("lora_ga's scale", "A Aᵀ = Bᵀ B = (√O / γ) 1", "Wang et al. 2024, section 3.3")
def measure_lora_ga_scale(case: Case) -> Measured:
    """c² times Gram matrices of singular vectors, which are 1 to 10 k² u, k = min(O, I)."""
    G, _, (A, B, *_) = begin_lora_ga(case)
    size = len(G) ** 0.5 / values.GAMMA
    more = size * 10 * min(G.shape) ** 2 * U
    error_A, bound_A = measure_gram(A.T, size)
    error_B, bound_B = measure_gram(B, size)
    return worst((error_A, bound_A + more), (error_B, bound_B + more))
