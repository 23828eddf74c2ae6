"""DoRA's properties: W' = k V with V = W + s B A and k = m / |V|, row by row. Letters and shapes are those of case.py.

**What k errs by.** V takes r + 3 roundings: r of B A, two with s, one sum with W. So |V| is off by gamma_(r+3) |S|,
the rows' norms of S = |W| + s |B| |A|, which may be many times |V| where dW takes away most of W. Squares, their sum,
the root and the quotient m / |V| take I + 3 more. With rho for both, as a share of |V|, k is off by at most kappa =
rho / (1 - rho) of itself. A row of V of which nothing is left has no direction, and promises nothing (`steady`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import functional as F
from ..autograd import Tensor, gradients
from ..backend import Array
from ..lora import DoraAdapter, LoraLinear
from ..lora.dora import LEAST
from .case import WIDE, Case, Formula
from .measuring import Measured, Property, backward, counted, differing, dora, listing, run, worst

PROPERTIES: list[Property] = []
holds = listing(PROPERTIES, dora)


class Directed(NamedTuple):
    """What a DoRA layer is to compute: LoRA's formula, V, its rows' norms, k, and how much of k may be wrong."""

    lora: Formula
    V: Array  # (O, I)
    norms: Array  # (O,)
    k: Array  # (O,)
    kappa: Array  # (O,)

    @property
    def off(self) -> Array:
        """What k may be off by (O,); a step takes LEAST where k is 0, so as to find dm."""
        return self.kappa * abs(self.k) + LEAST * (self.k == 0)

    @classmethod
    def of(cls, case: Case, layer: LoraLinear) -> Directed:
        [adapter], lora = [layer.adapters[name] for name in layer.active], case.formula(layer)
        assert isinstance(adapter, DoraAdapter)
        m, absolute = adapter.lora_magnitude_vector.data.astype(WIDE[case.dtype]), abs(lora)
        V, S = lora.W + lora.dW(), absolute.W + absolute.dW()
        norms, I = np.linalg.norm(V, axis=1), V.shape[1]
        with np.errstate(all="ignore"):
            rho = case.gamma(adapter.r + 3, np.linalg.norm(S, axis=1) / norms) + case.gamma(
                I + 3, 1
            )
            kappa = np.where(rho < 1, rho / (1 - rho), np.inf)
        return cls(lora, V, norms, m / norms, kappa)


def steady(case: Case) -> bool:
    """No row of V is nearly cancelled: k is known to a few digits at least."""
    return dora(case) and bool((Directed.of(case, case.layer()).kappa < 0.1).all())


@holds(
    "DoRA starts as the base",
    "B = 0  ⇒  y = x Wᵀ + b;  dA = 0, dB ≠ 0, dm ≠ 0",
    "Liu et al. 2024, section 4.1",
)
def _start(case: Case) -> Measured:
    """Exact, on its own and by the weight of a step: m = |W| gives k = 1. dm is zero only if y or its gradient is."""
    layer, G = case.layer(), case.upstream()
    [(name, config)], wrong = case.configs.items(), 0
    layer.adapters[name] = adapter = DoraAdapter(layer.base_layer, "proj", config, case.rng)
    expected = run(layer.base_layer, case.x)
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        y = layer(Tensor(case.x))
        dA, dB, dm = (
            np.asarray(g)
            for g in gradients(y, [getattr(adapter, name) for name in adapter.TENSORS], G)
        )
        wrong += (
            differing(F.rows(y.data), expected)
            + np.count_nonzero(dA)
            + (not dB.any())
            + (not dm.any())
        )
    return worst((wrong, 0))


def _scale(exact: Directed) -> Array:
    """T = |x| |W|ᵀ + s |x| |A|ᵀ |B|ᵀ + 2 |b|: the bias is taken off and put on again.    (N, O)"""
    return abs(exact.lora).y() + abs(exact.lora.b)


@holds(
    "DoRA's forward", "y = m / |V| (V x) + b,  V = W + s B A", "Liu et al. 2024, eq. (5)", steady
)
def _forward(case: Case) -> Measured:
    """On its own, by the weight of a step, and merged. On its own V x = z + s B A x, z = y - b, has n = I + r + 3
    roundings, and three more follow in k (V x) - z + y, whose terms are at most |k| T, T and T. To form k V takes as
    many as to add B A x, and one; merging takes W away and adds it again. All of them share what k is off by."""
    layer = case.layer()
    exact = Directed.of(case, layer)
    y, T = exact.k * (exact.lora.X @ exact.V.T) + exact.lora.b, _scale(exact)
    bound = case.gamma(case.roundings(layer, 4), (abs(exact.k) + exact.off + 2) * T) + exact.off * T
    found = []
    for prepare in (layer.end_step, layer.prepare_step, layer.merge):
        prepare()
        found.append((run(layer, case.x) - y, bound))
        layer.end_step()
    return worst(*found)


@holds(
    "DoRA's gradients",
    "dA = s Bᵀ (k G)ᵀ X,  dB = s (k G)ᵀ X Aᵀ,  dm = Σ G (V x) / |V|",
    "Liu et al. 2024, section 4.3: |V| is a constant",
    steady,
)
def _gradients(case: Case) -> Measured:
    """On its own and by the weight of a step; dX = (k G) V, too. LoRA's with k G for G, k being off: O + N + 2 and
    I + N + 2 roundings for dA and dB, and one or two with k. dm: those of V x, N in the sum, four with what divides it.
    dX: O + r + 3 by way of A, one with k, and two where W's parts of it, k G, -G and G, meet."""
    layer, G = case.layer(), case.upstream()
    exact, dY = Directed.of(case, layer), F.rows(G).astype(WIDE[case.dtype])
    lora, absolute, (N, O), I = exact.lora, abs(exact.lora), dY.shape, exact.V.shape[1]
    kG, off = exact.k * dY, exact.off * abs(dY)
    T, expected = (
        _scale(exact),
        (lora.dA(kG), lora.dB(kG), (dY * (lora.X @ exact.V.T)).sum(axis=0) / exact.norms),
    )
    of_m = (abs(dY) * T).sum(axis=0) / exact.norms
    size = abs(kG) + off
    bounds = [
        case.gamma(O + N + 4, absolute.dA(size)) + absolute.dA(off),
        case.gamma(I + N + 4, absolute.dB(size)) + absolute.dB(off),
        case.gamma(case.roundings(layer, N + 5), (1 + exact.kappa) * of_m) + exact.kappa * of_m,
    ]
    of_x = case.gamma(
        O + layer.running[0].r + 6, absolute.dX(size) + 2 * abs(dY) @ absolute.W
    ) + absolute.dX(off)
    pairs = []
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        _, dX, [found] = backward(layer, case.x, G)
        pairs += [(g - e, b) for g, e, b in zip(found, expected, bounds, strict=True)]
        pairs.append((dX - kG @ exact.V, of_x))
    return worst(*pairs)


@holds(
    "DoRA's rows", "W' = m V / |V|  ⇒  |W'| = |m|, row by row", "Liu et al. 2024, eq. (5)", steady
)
def _rows(case: Case) -> Measured:
    """k is off by kappa, W' by one rounding; before it are r + 5 in float64, of k S and of W, which is taken away and
    added again."""
    layer = case.layer()
    exact, absolute = Directed.of(case, layer), abs(case.formula(layer))
    k, r = abs(exact.k), layer.running[0].r
    layer.merge()
    merged, m = layer.base_layer.dense_weight().astype(WIDE[case.dtype]), k * exact.norms
    S, W = (np.linalg.norm(M, axis=1) for M in (absolute.W + absolute.dW(), absolute.W))
    bound = (
        exact.kappa * m
        + case.gamma(1, (1 + exact.kappa) * m)
        + case.gamma(r + 5, k * S + W, np.float64)
    )
    return worst((np.linalg.norm(merged, axis=1) - m, bound))


@holds(
    "DoRA's scale",
    "W, B → c W, c B,  c = 2ᵏ  ⇒  W' = m V / |V| is the same bits",
    "Liu et al. 2024, eq. (5)",
)
def _scaled(case: Case) -> Measured:
    """Exact: a power of two changes exponents alone, and |V| takes it out again. W' is what a step computes with."""
    layer = case.layer()
    [adapter], W, found = layer.running, layer.base_layer.dense_weight(), []
    for c in (1.0, 2.0 ** case.rng.choice([-3, -2, -1, 1, 2, 3])):
        weight = W * W.dtype.type(c)
        adapter.lora_B.data = adapter.lora_B.data * W.dtype.type(c)
        adapter.effective(weight)
        found.append(weight)
    return worst((differing(*found), 0))


@holds("DoRA's count", "trainable numbers = r (I + O) + O", "Liu et al. 2024, section 4.1")
def _count(case: Case) -> Measured:
    """Exact."""
    return counted(case, lambda r, inputs, outputs: r * (inputs + outputs) + outputs)
