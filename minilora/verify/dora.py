"""DoRA's properties: W' = k V with V = W + s B A and k = m / |V|, row by row.

Letters are case.py's.

**What k errs by.** V takes r + 3 roundings: r of B A, two with s, one sum with W. So |V| is off by
gamma_(r+3) |S|, the rows' norms of S = |W| + s |B| |A|, which may be many times |V| where dW takes
away most of W. Squares, their sum, the root and the quotient m / |V| take I + 3 more. With rho for
both, as a share of |V|, k is off by at most kappa = rho / (1 - rho) of itself. A row of V of which
nothing is left has no direction, and promises nothing (`is_steady`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from .. import functional as F
from ..autograd import Tensor, gradients
from ..backend import Array
from ..lora import DoraAdapter
from ..lora.dora import LEAST
from .case import Case, Formula, active_adapters
from .measuring import (
    Measured,
    Property,
    backward,
    compare,
    count_differences,
    count_nonzeros,
    count_parameters,
    expect_zero,
    is_dora,
    make_registrar,
    tensors_of,
    worst,
)

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, is_dora)


class DoraFormula(NamedTuple):
    """What a DoRA layer should compute: y = k (X V^T) + b, with k = m / |V|.

    V             W + s B A (O, I)
    norms         of the rows of V (O,)
    k             m / |V| (O,)
    kappa         how much of k may be wrong (O,)
    """

    lora: Formula
    V: Array
    norms: Array
    k: Array
    kappa: Array

    @property
    def k_error(self) -> Array:
        """What k may be off by (O,); a step takes LEAST where k is 0, so that it can compute dm."""
        return self.kappa * abs(self.k) + LEAST * (self.k == 0)

    def y(self) -> Array:
        """k (X V^T) + b (N, O)"""
        return self.k * (self.lora.X @ self.V.T) + self.lora.b

    def T(self) -> Array:
        """|x| |W|ᵀ + s |x| |A|ᵀ |B|ᵀ + 2 |b|: the bias is subtracted and added again.    (N, O)"""
        return abs(self.lora).y() + abs(self.lora.b)


@functools.lru_cache(maxsize=1)
def dora_formula(case: Case) -> DoraFormula:
    """What the case's layer should compute. Kept for the next property of the same case."""
    layer = case.layer()
    [adapter] = active_adapters(layer)
    m = adapter.lora_magnitude_vector.data.astype(case.wide)
    lora = case.formula(layer)
    V = lora.merged()
    I = V.shape[1]
    norms = np.linalg.norm(V, axis=1)
    S_norms = np.linalg.norm(abs(lora).merged(), axis=1)
    with np.errstate(all="ignore"):
        rho = case.gamma(adapter.r + 3, S_norms / norms) + case.gamma(I + 3, 1)
        kappa = np.where(rho < 1, rho / (1 - rho), np.inf)
    return DoraFormula(lora, V, norms, m / norms, kappa)


def is_steady(case: Case) -> bool:
    """No row of V nearly cancels: k is known to a few digits at least."""
    if not is_dora(case):
        return False
    return bool((dora_formula(case).kappa < 0.1).all())


@holds(
    "DoRA starts as the base",
    "B = 0  ⇒  y = x Wᵀ + b;  dA = 0, dB ≠ 0, dm ≠ 0",
    "Liu et al. 2024, section 4.1",
)
def measure_start(case: Case) -> Measured:
    """Exact, with and without the prepared weight: m = |W| gives k = 1.

    dm is zero only if y or its gradient is.
    """
    layer = case.layer()
    dY = case.draw_dY()
    config = case.configs[case.first]
    adapter = DoraAdapter(layer.base_layer, "proj", config, case.rng)
    layer.adapters[case.first] = adapter
    expected = case.run(layer.base_layer)
    wrong = 0
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        y = layer(Tensor(case.x))
        slopes = gradients(y, tensors_of(adapter), dY)
        dA, dB, dm = map(np.asarray, slopes)
        wrong += count_differences(F.rows(y.data), expected)
        wrong += count_nonzeros(dA) + (not dB.any()) + (not dm.any())
    return expect_zero(wrong)


@holds(
    "DoRA's forward", "y = m / |V| (V x) + b,  V = W + s B A", "Liu et al. 2024, eq. (5)", is_steady
)
def measure_forward(case: Case) -> Measured:
    """Without and with the prepared weight, and merged.

    Without it V x = z + s B A x, z = y - b, has n = I + r + 3 roundings, and three more follow in
    k (V x) - z + y, whose terms are at most |k| T, T and T. To form k V takes as many as to add
    B A x, and one; merging takes W away and adds it again. All of them share what k is off by.
    """
    layer = case.layer()
    exact = dora_formula(case)
    y = exact.y()
    T = exact.T()
    n = case.roundings(layer, 4)
    terms = (abs(exact.k) + exact.k_error + 2) * T
    bound = case.gamma(n, terms) + exact.k_error * T
    pairs = []
    for prepare in (layer.end_step, layer.prepare_step, layer.merge):
        prepare()
        pairs.append((case.run(layer) - y, bound))
        layer.end_step()
    return worst(*pairs)


@holds(
    "DoRA's gradients",
    "dA = s Bᵀ (k G)ᵀ X,  dB = s (k G)ᵀ X Aᵀ,  dm = Σ G (V x) / |V|",
    "Liu et al. 2024, section 4.3: |V| is a constant",
    is_steady,
)
def measure_gradients(case: Case) -> Measured:
    """With and without the prepared weight; dX = (k G) V, too.

    LoRA's with k G for G, k being off: O + N + 2 and I + N + 2 roundings for dA and dB, and one or
    two with k. dm: those of V x, N in the sum, four with what divides it. dX: O + r + 3 by way of
    A, one with k, and two where W's parts of it, k G, -G and G, meet.
    """
    layer = case.layer()
    [adapter] = active_adapters(layer)
    dY = case.draw_dY()
    G = case.wide_rows(dY)
    N, O = G.shape
    I = layer.in_features
    exact = dora_formula(case)
    lora = exact.lora
    absolute = abs(lora)
    kG = exact.k * G
    kG_error = exact.k_error * abs(G)
    kG_size = abs(kG) + kG_error
    Vx = lora.X @ exact.V.T  # (N, O)
    dA = lora.dA(kG)
    dB = lora.dB(kG)
    dm = (G * Vx).sum(axis=0) / exact.norms
    dX = kG @ exact.V
    S_m = (abs(G) * exact.T()).sum(axis=0) / exact.norms
    S_X = absolute.dX(kG_size) + 2 * abs(G) @ absolute.W
    bound_A = case.gamma(O + N + 4, absolute.dA(kG_size)) + absolute.dA(kG_error)
    bound_B = case.gamma(I + N + 4, absolute.dB(kG_size)) + absolute.dB(kG_error)
    n_m = case.roundings(layer, N + 5)
    bound_m = case.gamma(n_m, (1 + exact.kappa) * S_m) + exact.kappa * S_m
    bound_X = case.gamma(O + adapter.r + 6, S_X) + absolute.dX(kG_error)
    pairs = []
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        _, found_X, [(found_A, found_B, found_m)] = backward(case, layer, dY)
        pairs.append((found_A - dA, bound_A))
        pairs.append((found_B - dB, bound_B))
        pairs.append((found_m - dm, bound_m))
        pairs.append((found_X - dX, bound_X))
    return worst(*pairs)


@holds(
    "DoRA's rows",
    "W' = m V / |V|  ⇒  |W'| = |m|, row by row",
    "Liu et al. 2024, eq. (5)",
    is_steady,
)
def measure_rows(case: Case) -> Measured:
    """k is off by kappa, W' by one rounding.

    Before it are r + 5 in float64, of k S and of W, which is subtracted and added again.
    """
    layer = case.layer()
    [adapter] = active_adapters(layer)
    exact = dora_formula(case)
    absolute = abs(exact.lora)
    k = abs(exact.k)
    m = k * exact.norms
    layer.merge()
    merged = layer.base_layer.dense_weight().astype(case.wide)
    S_norms = np.linalg.norm(absolute.merged(), axis=1)
    W_norms = np.linalg.norm(absolute.W, axis=1)
    bound = exact.kappa * m
    bound = bound + case.gamma(1, (1 + exact.kappa) * m)
    bound = bound + case.gamma(adapter.r + 5, k * S_norms + W_norms, np.float64)
    return compare(np.linalg.norm(merged, axis=1) - m, bound)


@holds(
    "DoRA's scale",
    "W, B → c W, c B,  c = 2ᵏ  ⇒  W' = m V / |V| is the same bits",
    "Liu et al. 2024, eq. (5)",
)
def measure_scale(case: Case) -> Measured:
    """Exact: a power of two changes exponents alone, and |V| cancels it.

    W' is what a step computes with.
    """
    layer = case.layer()
    [adapter] = active_adapters(layer)
    W = layer.base_layer.dense_weight()
    k = case.rng.choice([-3, -2, -1, 1, 2, 3])
    c = W.dtype.type(2.0**k)
    plain = W.copy()
    adapter.write_effective_weight(plain)
    scaled = W * c
    adapter.lora_B.data = adapter.lora_B.data * c
    adapter.write_effective_weight(scaled)
    return expect_zero(count_differences(plain, scaled))


@holds("DoRA's count", "trainable numbers = r (I + O) + O", "Liu et al. 2024, section 4.1")
def measure_count(case: Case) -> Measured:
    """Exact."""
    return count_parameters(case, lambda r, inputs, outputs: r * (inputs + outputs) + outputs)
