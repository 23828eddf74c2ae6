"""Properties of maps theta -> dW: their pulls are derivatives, and dW has the method's structure.

All are measured in float64, in which merging computes: on random theta in the shape of a LoRA case,
or on the theta of the user's adapter if it has that method.

**Pulls.** <G, D delta[d]> = <pull(G), d> for every G (O, I) and direction d. The left side is the
derivative by a complex step, Im delta(theta + i h d) / h, which rounds without cancellation.
FourierFT takes real parts and is linear: there it is delta(theta + d) - delta(theta). Where delta
is a sum of products, the bound has the same sum over absolute values, S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backend import Array
from ..lora.maps import (
    FourierFTConfig,
    HiraConfig,
    IA3Config,
    IntrinsicConfig,
    LoHaConfig,
    LoKrConfig,
    Map,
    MapConfig,
    MissConfig,
    OFTConfig,
    UniLoraConfig,
    VeraConfig,
)
from ..lora.maps.adapter import MapAdapter
from .case import Case, unit_roundoff
from .measuring import (
    Applies,
    Measured,
    Property,
    compare,
    count_differences,
    count_nonzeros,
    expect_zero,
    is_dense,
    is_lora,
    svd_error,
    worst,
)

PROPERTIES: list[Property] = []
U = unit_roundoff(np.float64)
STEP = 2.0**-60  # h of the complex step
Fields = dict[str, Any]
Numbers = tuple[Map, list[Array], Array]  # a map, its theta, W


def gamma(n: int) -> float:
    """2 gamma_n in float64: n roundings of the method, and n of the reference."""
    return 2 * n * U / (1 - n * U)


def holds_for(kind: type[MapConfig]) -> Applies:
    """The function case -> whether its adapter has this method, or it is a random LoRA layer."""

    def applies(case: Case) -> bool:
        if has_map(case):
            return isinstance(_first(case).map.config, kind)
        return case.is_random and is_lora(case) and is_dense(case)

    return applies


def has_map(case: Case) -> bool:
    return isinstance(_first(case), MapAdapter)


def _first(case: Case) -> Any:
    return case.adapters[case.first]


def holds(kind: type[MapConfig], what: str, equation: str, source: str) -> Callable[..., Any]:
    """A decorator that lists a property of one method."""

    def add(measure: Callable[[Case], Measured]) -> Callable[[Case], Measured]:
        name = f"{kind.title} {what}"
        PROPERTIES.append(Property(name, equation, source, measure, holds_for(kind)))
        return measure

    return add


def numbers_of(case: Case, kind: type[MapConfig], **fields: Any) -> Numbers:
    """The map, theta and W (O, I) of a case with this method; otherwise a random theta."""
    W = case.base.dense_weight().astype(np.float64)
    if has_map(case) and not fields:
        return _first(case).map, _first(case).wide_theta(), W
    rng = case.rng
    O, I = W.shape
    config = kind(target_modules=["proj"], **fields_for(kind, O, I, rng) | fields)
    map = config.map(config, "proj", {"proj": (O, I)})
    shapes = {**map.shapes(), **map.shared_shapes()}
    return map, [rng.standard_normal(shape) / 4 for shape in shapes.values()], W


def fields_for(kind: type[MapConfig], O: int, I: int, rng: np.random.Generator) -> Fields:
    """Random fields of a configuration that are valid for a layer (O, I)."""
    r = int(rng.integers(1, 4))
    divisors = [b for b in range(1, min(I, 16) + 1) if I % b == 0]
    fields: dict[type[MapConfig], Fields] = {
        LoHaConfig: {"r": r, "alpha": 3.0},
        LoKrConfig: {"r": r, "alpha": 3.0, "decompose_both": bool(rng.integers(2))},
        HiraConfig: {"r": r},
        VeraConfig: {"r": r},
        OFTConfig: {"oft_block_size": int(rng.choice(divisors))},
        IA3Config: {"feedforward_modules": ["proj"] if rng.integers(2) else []},
        FourierFTConfig: {"n_frequency": int(rng.integers(1, min(O * I, 40) + 1))},
        MissConfig: {"r": max(1, I // 2)},
        UniLoraConfig: {"r": r, "theta_d_length": min(20, r * (O + I))},
        IntrinsicConfig: {"theta_d_length": min(20, O * I)},
    }
    return fields[kind]


# ---- pulls ---------------------------------------------------------------------------------------


def adjoint_error(map: Map, theta: Sequence[Array], W: Array, rng: Any) -> tuple[float, float]:
    """(<G, D delta[d]> - <pull(G), d>, its bound) for a random G and direction d."""
    G = rng.standard_normal(W.shape)
    count = len(theta)
    if not map.SHARED_TRAINS:
        count -= len(map.SHARED)
    d = [rng.standard_normal(t.shape) for t in theta[:count]]
    d += [np.zeros(t.shape) for t in theta[count:]]
    right = _inner_product(map.pull(theta, W, G), d)
    sizes = [t.size for t in theta]
    n = W.size + 8 * (sum(W.shape) + sum(sizes)) + 32
    if isinstance(map.config, FourierFTConfig):
        left, S = _fourier_side(map, theta, W, G, d)
        return left - right, gamma(n) * S
    complex_theta = [t + 1j * STEP * x for t, x in zip(theta, d, strict=True)]
    derivative = map.delta(complex_theta, W).imag / STEP
    left = float((G * derivative).sum())
    S = _derivative_size(map, theta, W, G, d)
    return left - right, gamma(n) * S + np.finfo(np.float64).tiny


def _fourier_side(
    map: Map, theta: Sequence[Array], W: Array, G: Array, d: Sequence[Array]
) -> tuple[float, float]:
    """(<G, delta(theta + d) - delta(theta)> of FourierFT, the sum of its terms' sizes)."""
    [coefficients] = theta
    [direction] = d
    difference = map.delta([coefficients + direction], W) - map.delta(theta, W)
    left = float((G * difference).sum())
    sizes = np.abs(direction).sum() + 2 * np.abs(coefficients).sum()
    alpha = abs(map.alpha)  # type: ignore[attr-defined]
    return left, alpha / W.size * np.abs(G).sum() * sizes


def _derivative_size(
    map: Map, theta: Sequence[Array], W: Array, G: Array, d: Sequence[Array]
) -> float:
    """S: the sum over absolute values that <G, D delta[d]> is bounded by."""
    if isinstance(map.config, OFTConfig):
        q = float(np.linalg.norm(theta[0])) * math.sqrt(2)
        slope = 2 + 4 * q + 6 * q**2 + 4 * q**3  # of the polynomial; Cayley's map has at most 2
        norms = [float(np.linalg.norm(array)) for array in (G, W, d[0])]
        return slope * math.prod(norms) * math.sqrt(2 * W.shape[1])
    absolute_theta = [np.abs(t) for t in theta]
    pulls = map.pull(absolute_theta, np.abs(W), np.abs(G))
    absolute_pulls = [np.abs(p) for p in pulls]
    return _inner_product(absolute_pulls, [np.abs(x) for x in d])


def _inner_product(grads: Sequence[Array], d: Sequence[Array]) -> float:
    """The sum of <g, x> over the trained tensors, which come first in d."""
    return math.fsum(float((g * x).sum()) for g, x in zip(grads, d, strict=False))


def _measure_pull(kind: type[MapConfig], variants: Sequence[Fields]) -> Any:
    def measure(case: Case) -> Measured:
        """Both sides are sums of the same products, each with at most n roundings."""
        errors = []
        for fields in [{}] if has_map(case) else variants:
            errors.append(adjoint_error(*numbers_of(case, kind, **fields), case.rng))
        return worst(*errors)

    return measure


OFT_FORMS: list[Fields] = [{"use_cayley_neumann": True}, {"use_cayley_neumann": False}]
PAPERS = {
    LoHaConfig: "Hyeon-Woo et al. 2022",
    LoKrConfig: "Yeh et al. 2024",
    HiraConfig: "Huang et al. 2025",
    VeraConfig: "Kopiczko et al. 2024",
    OFTConfig: "Qiu et al. 2023",
    IA3Config: "Liu et al. 2022",
    FourierFTConfig: "Gao et al. 2024",
    MissConfig: "Kang & Yin 2024",
    UniLoraConfig: "Li et al. 2025",
    IntrinsicConfig: "Aghajanyan et al. 2021",
}
for _kind, _paper in PAPERS.items():
    holds(_kind, "pull", "⟨G, D δ(θ)[d]⟩ = ⟨pull(G), d⟩", _paper)(
        _measure_pull(_kind, OFT_FORMS if _kind is OFTConfig else [{}])
    )


# ---- structure -----------------------------------------------------------------------------------


def rank_excess(map: Map, theta: Sequence[Array], W: Array, rank: int) -> Measured:
    """σ_(rank+1) of dW, at most the rounding errors of forming dW and of its decomposition."""
    dW = map.delta(theta, W)
    sigma = np.linalg.svd(dW, compute_uv=False)
    if rank >= len(sigma):
        return expect_zero(0)
    absolute_theta = [np.abs(t) for t in theta]
    absolute = np.abs(map.delta(absolute_theta, np.abs(W)))
    forming = gamma(sum(W.shape) + 8) * np.linalg.norm(absolute)
    bound = svd_error(W.shape, sigma[0]) + forming
    return compare(sigma[rank], bound)


@holds(LoHaConfig, "rank", "rank(dW) ≤ r²", "Hyeon-Woo et al. 2022, proposition 1")
def measure_loha_rank(case: Case) -> Measured:
    map, theta, W = numbers_of(case, LoHaConfig)
    return rank_excess(map, theta, W, map.r**2)


@holds(LoKrConfig, "spectrum", "σ(dW) = s σ(C) ⊗ σ(E)", "Horn & Johnson 1991, theorem 4.2.15")
def measure_lokr_spectrum(case: Case) -> Measured:
    """Three decompositions, and two roundings of each entry of dW, besides those of C and E."""
    map, theta, W = numbers_of(case, LoKrConfig)
    C, E, _, _ = map.factors(theta)  # type: ignore[attr-defined]
    sigma_C = np.linalg.svd(C, compute_uv=False)
    sigma_E = np.linalg.svd(E, compute_uv=False)
    products = map.s * np.outer(sigma_C, sigma_E)
    expected = np.sort(products.reshape(-1))[::-1]
    sigma = np.linalg.svd(map.delta(theta, W), compute_uv=False)
    expected = np.pad(expected, (0, max(0, len(sigma) - len(expected))))
    norm = map.s * float(np.linalg.norm(C) * np.linalg.norm(E))
    bound = svd_error(W.shape, norm, 3) + gamma(4) * norm
    return compare(sigma - expected[: len(sigma)], bound)


@holds(HiraConfig, "zeros", "W[o, i] = 0  ⇒  dW[o, i] = 0", "Huang et al. 2025, equation 4")
def measure_hira_zeros(case: Case) -> Measured:
    """Exact."""
    map, theta, W = numbers_of(case, HiraConfig)
    W = W.copy()
    W[case.rng.random(W.shape) < 0.3] = 0
    W[0, 0] = 0
    return expect_zero(count_nonzeros(map.delta(theta, W)[W == 0]))


@holds(VeraConfig, "rank", "rank(dW) ≤ r", "Kopiczko et al. 2024, section 3.1")
def measure_vera_rank(case: Case) -> Measured:
    map, theta, W = numbers_of(case, VeraConfig)
    return rank_excess(map, theta, W, map.r)


@holds(OFTConfig, "isometry", "R exact  ⇒  W' W'ᵀ = W Wᵀ", "Qiu et al. 2023, section 3.2")
def measure_oft_isometry(case: Case) -> Measured:
    """Solving for R errs by a few b u times its Frobenius norm, sqrt b."""
    map, theta, W = numbers_of(case, OFTConfig, use_cayley_neumann=False)
    V = W + map.delta(theta, W)
    b = map.b  # type: ignore[attr-defined]
    norms = np.linalg.norm(W, axis=1)
    bound = gamma(W.shape[1] + 16 * b * b + 8) * np.outer(norms, norms)
    return compare(V @ V.T - W @ W.T, bound)


@holds(
    OFTConfig,
    "contraction",
    "R Neumann  ⇒  1 - θ⁴ ≤ σ(W') / σ(W) ≤ 1,  θ = |Q|₂ < 1",
    "Ostrowski's theorem (Horn & Johnson 2013, theorem 4.5.9)",
)
def measure_oft_contraction(case: Case) -> Measured:
    map, theta, W = numbers_of(case, OFTConfig, use_cayley_neumann=True)
    Q = map.skew(theta[0])  # type: ignore[attr-defined]
    size = max(np.linalg.norm(Q, 2, axis=(1, 2)).max(), 1e-9)
    shrink = min(1.0, 0.7 / size)
    largest = float(shrink * size)
    before = np.linalg.svd(W, compute_uv=False)
    after = np.linalg.svd(W + map.delta([shrink * theta[0]], W), compute_uv=False)
    b = map.b  # type: ignore[attr-defined]
    bound = svd_error(W.shape, before[0], 2) + gamma(16 * b * b + 8) * np.linalg.norm(W)
    excess = np.maximum(after - before, (1 - largest**4) * before - after)
    return compare(np.maximum(excess, 0), bound)


@holds(IA3Config, "scaling", "W' = diag(l) W, or W diag(l)", "Liu et al. 2022, section 3.3")
def measure_ia3_scaling(case: Case) -> Measured:
    """l - 1, its product with W, and the sum with W: three roundings."""
    map, theta, W = numbers_of(case, IA3Config)
    (l,) = theta
    error = W + map.delta(theta, W) - l * W
    bound = gamma(4) * (np.abs(l) + 2) * np.abs(W)
    return compare(error, bound)


@holds(
    FourierFTConfig,
    "energy",
    "|dW|² = α² / (O I) Σ ((F(k) + F(-k)) / 2)²",
    "Parseval's theorem",
)
def measure_fourierft_energy(case: Case) -> Measured:
    map, theta, W = numbers_of(case, FourierFTConfig)
    O, I = W.shape
    F = np.zeros(O * I)
    F[map.at] = theta[0]  # type: ignore[attr-defined]
    F = F.reshape(O, I)
    opposite = np.roll(F[::-1, ::-1], (1, 1), (0, 1))
    alpha = abs(map.alpha)  # type: ignore[attr-defined]
    expected = alpha / math.sqrt(O * I) * np.linalg.norm((F + opposite) / 2)
    norm = np.linalg.norm(map.delta(theta, W))
    size = alpha / math.sqrt(O * I) * np.linalg.norm(F)
    stages = 2 + int(math.log2(O * I))  # of the fast Fourier transform
    bound = gamma(16 * stages + O * I) * size
    return compare(norm - expected, bound)


@holds(MissConfig, "repetition", "dW[:, i] = dW[:, i + r]", "Kang & Yin 2024, section 3")
def measure_miss_repetition(case: Case) -> Measured:
    """Exact: column i is row i mod r of D."""
    map, theta, W = numbers_of(case, MissConfig)
    dW = map.delta(theta, W)
    D = np.tile(theta[0], (1, W.shape[0] // theta[0].shape[1]))
    wrong = count_differences(dW[:, map.r :], dW[:, : W.shape[1] - map.r])
    return expect_zero(wrong + count_differences(dW[:, : map.r], D.T))


@holds(UniLoraConfig, "rank", "rank(dW) ≤ r", "Li et al. 2025, section 3")
def measure_unilora_rank(case: Case) -> Measured:
    map, theta, W = numbers_of(case, UniLoraConfig)
    return rank_excess(map, theta, W, map.r)


def length_error(numbers: Array, z: Array) -> Measured:
    """|numbers| - |z|; each norm is the root of a sum of numbers.size squares at most."""
    norm = float(np.linalg.norm(z))
    return compare(np.linalg.norm(numbers) - norm, gamma(numbers.size + 8) * norm)


@holds(UniLoraConfig, "lengths", "|A|² + |B|² = |θ|²", "Li et al. 2025, section 3: isometry")
def measure_unilora_lengths(case: Case) -> Measured:
    """Over a model of this layer alone: in a larger one other layers have the other numbers."""
    map, theta, _ = numbers_of(case, UniLoraConfig, proj_seed=case.seed)
    A, B = map.factors(theta)  # type: ignore[attr-defined]
    return length_error(np.concatenate([A.reshape(-1), B.reshape(-1)]), theta[0])


@holds(IntrinsicConfig, "lengths", "|dW| = |θ|", "Aghajanyan et al. 2021, section 3")
def measure_intrinsic_lengths(case: Case) -> Measured:
    """Over a model of this layer alone."""
    map, theta, W = numbers_of(case, IntrinsicConfig, proj_seed=case.seed)
    return length_error(map.delta(theta, W), theta[0])
