"""LoRA's properties: its forward, its gradients, the update's rank and gauge. Letters and shapes are those of case.py.

Some of them hold of AdaLoRA as well, whose A is diag(E) A (`adds`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import functional as F
from ..optim import SGD
from .case import WIDE, Case
from .measuring import (
    Measured,
    Property,
    adds,
    backward,
    counted,
    differing,
    factors,
    listing,
    lora,
    run,
    slopes,
    worst,
)

PROPERTIES: list[Property] = []
holds = listing(PROPERTIES, lora)

# ---- to which cases a property applies ------------------------------------------------------------------------------


def several(case: Case) -> bool:
    return adds(case) and len(case.subject.adapters) > 1


def deficient(case: Case) -> bool:
    """Some adapter's rank is below full rank."""
    base = case.subject.base_layer
    return adds(case) and min(a.r for a in case.subject.adapters.values()) < min(
        base.in_features, base.out_features
    )


def scalable(case: Case) -> bool:
    """A can be divided by 2^8 and nothing underflows, not in a product with x either."""
    A = np.concatenate([a.lora_A.data.ravel() for a in case.subject.adapters.values()])
    return lora(case) and bool(
        np.abs(A[A != 0]).min(initial=1) > np.finfo(case.dtype).tiny * 2.0**40
    )


# ---- forward ---------------------------------------------------------------------------------------------------------


@holds("forward", "y = x Wᵀ + b + Σ s (x Aᵀ) Bᵀ", "Hu et al. 2021, eq. (3)", adds)
def _forward(case: Case) -> Measured:
    """gamma_n S with n = I + r + k + 2 (`Case.roundings`): the way through the adapter is the longest."""
    layer = case.layer(*case.rng.permutation(list(case.subject.adapters)))
    exact = case.formula(layer)
    return worst(
        (run(layer, case.x) - exact.y(), case.gamma(case.roundings(layer), abs(exact).y()))
    )


@holds("start is the base", "B = 0  ⇒  y = x Wᵀ + b", "Hu et al. 2021, section 4.1")
def _start(case: Case) -> Measured:
    """Exact: adapters as they are made add s (x Aᵀ) 0 = 0."""
    layer, rng = case.layer(), case.rng
    for i, (name, config) in enumerate(case.configs.items()):
        config = dataclasses.replace(config, init_lora_weights=(True, "gaussian")[rng.integers(2)])
        layer.adapters[name] = type(layer.adapters[name])(layer.base_layer, "proj", config, rng, i)
    return worst((differing(run(layer, case.x), run(layer.base_layer, case.x)), 0))


@holds("sum", "y(a, b) - y(a) = y(b) - y()", "Hu et al. 2021, section 4.1", several)
def _sum(case: Case) -> Measured:
    """y(a, b) = fl(y(a) + v) and y(b) = fl(y() + v) with the same v: u |y(a, b)| + u |y(b)|, whatever the shapes."""
    names, u = list(case.subject.adapters), float(np.finfo(case.dtype).eps) / 2
    ys = [
        run(case.layer(*names[: i + 1]), case.x).astype(WIDE[case.dtype]) for i in range(len(names))
    ]
    base = run(case.layer().base_layer, case.x).astype(WIDE[case.dtype])
    pairs = []
    for name, before, both in zip(names[1:], ys, ys[1:], strict=False):
        alone = run(case.layer(name), case.x)
        pairs.append(
            (both - before - (alone - base), u * (abs(both) + abs(alone)) + case.gamma(0, base))
        )
    return worst(*pairs)


@holds("linear in s", "y(t s) - y(0) = t (y(s) - y(0))", "Hu et al. 2021, section 4.1", adds)
def _linear(case: Case) -> Measured:
    """All three have y(0) and v = (x Aᵀ) Bᵀ in common, bit for bit. What is left is two roundings in each of s v and
    t s v, three in t and in t s, and the last sum: u |y|, of y(t s) and t times of y(s). dW(2 s) = 2 dW(s) is exact."""
    name, wide, u = (
        next(iter(case.subject.adapters)),
        WIDE[case.dtype],
        float(np.finfo(case.dtype).eps) / 2,
    )
    layer, t = case.layer(name), float(case.rng.uniform(1.5, 4))
    adapter, delta = layer.adapters[name], layer.delta_weight(name)
    s, y0, y1 = (
        adapter.scaling,
        run(layer.base_layer, case.x).astype(wide),
        run(layer, case.x).astype(wide),
    )
    adapter.scaling = 2 * s
    doubled = differing(layer.delta_weight(name), 2 * delta)
    adapter.scaling = t * s
    yt = run(layer, case.x).astype(wide)
    sv = abs(y1 - y0) + u * abs(y1)
    return worst(
        (yt - y0 - t * (y1 - y0), case.gamma(7, t * sv) + u * (abs(yt) + t * abs(y1))), (doubled, 0)
    )


@holds("scaling", "s = α / r;  with rsLoRA √r times that", "Kalajdzievski 2023, section 3")
def _scaling(case: Case) -> Measured:
    """α / r is one rounding, so the bits are equal. (α / √r) / (α / r), and √r beside it, make five: gamma_5."""
    pairs: list[tuple[Any, Any]] = []
    for name, config in case.configs.items():
        plain, stable = (
            dataclasses.replace(config, use_rslora=rs).scaling("proj") for rs in (False, True)
        )
        root, u = math.sqrt(config.r), 2.0**-53
        pairs.append((plain - config.lora_alpha / config.r, 0))
        pairs.append(
            (case.subject.adapters[name].scaling - (stable if config.use_rslora else plain), 0)
        )
        pairs.append((stable / plain - root, 5 * u / (1 - 5 * u) * root))
    return worst(*pairs)


@holds("count", "trainable numbers = r (I + O)", "Hu et al. 2021, section 4.2")
def _count(case: Case) -> Measured:
    """Exact: of the parameters, and of the shapes that are known before there are any."""
    return counted(case, lambda r, inputs, outputs: r * (inputs + outputs))


# ---- the update's rank, and its gauge --------------------------------------------------------------------------------


@holds("rank", "σᵣ₊₁(s B A) = 0", "Hu et al. 2021, section 4.1", deficient)
def _rank(case: Case) -> Measured:
    """Weyl: an error F moves singular values by at most |F|, here the norm of gamma_(r+2) |s| |B| |A|: dW is formed in
    float64. Finding them costs max(I, O) eps σ₁ (Golub & Van Loan 2013, section 5.4.1; also NumPy's matrix_rank)."""
    pairs = []
    for name, adapter in case.subject.adapters.items():
        layer = case.layer(name)
        delta = layer.delta_weight(name)
        values = np.linalg.svd(delta, compute_uv=False)
        if adapter.r < len(values):
            moved = np.linalg.norm(
                case.gamma(adapter.r + 2, abs(case.formula(layer)).dW(), np.float64).astype(float)
            )
            pairs.append(
                (values[adapter.r], moved + max(delta.shape) * np.finfo(np.float64).eps * values[0])
            )
    return worst(*pairs)


@holds(
    "gauge",
    "(B P⁻¹) (P A) = B A,  P invertible",
    "Hu et al. 2021, eq. (3): only the product counts",
)
def _gauge(case: Case) -> Measured:
    """P = c (1 + τ eⱼᵀ) with τⱼ = 0, a Gauss transform (Golub & Van Loan 2013, section 3.2.1): P⁻¹ = (1 - τ eⱼᵀ) / c is
    known. P A and B P⁻¹ are rounded once each: (2 u + u²) |B P⁻¹| |P A|. The rest is float64's."""
    name, rng, wide = next(iter(case.subject.adapters)), case.rng, WIDE[case.dtype]
    layer = case.layer(name)
    before, exact = layer.delta_weight(name), case.formula(layer)
    (A, B, s), u = exact.factors[0], float(np.finfo(case.dtype).eps) / 2
    tau, one, c = (
        rng.uniform(-1, 1, len(A)).astype(wide),
        np.eye(len(A), dtype=wide),
        wide.type(rng.uniform(0.5, 2)),
    )
    j = rng.integers(len(A))
    tau[j] = 0
    P, inverse = c * (one + np.outer(tau, one[j])), (one - np.outer(tau, one[j])) / c
    factors(layer, [(P @ A, B @ inverse)])
    rounded = s * (2 * u + u * u) * (abs(B @ inverse) @ abs(P @ A))
    products = s * (abs(B) @ abs(inverse) @ abs(P) @ abs(A))
    return worst(
        (
            layer.delta_weight(name) - before,
            rounded + case.gamma(3 * len(A) + 3, products, np.float64),
        )
    )


@holds(
    "gauge by powers of two", "P = diag(2ᵏ)  ⇒  the same bits", "Higham 2002, section 2.1", scalable
)
def _powers(case: Case) -> Measured:
    """Exact: a power of two changes exponents alone, and each product a b stays as it was."""
    layer, rng = case.layer(), case.rng
    y, deltas = run(layer, case.x), [layer.delta_weight(name) for name in layer.active]
    scaled = []
    for name in layer.active:
        A, B = layer.adapters[name].lora_A.data, layer.adapters[name].lora_B.data
        P = 2.0 ** -rng.integers(1, 9, len(A))
        scaled.append((P[:, None] * A, B / P))
    factors(layer, scaled)
    changed = sum(
        differing(layer.delta_weight(n), d) for n, d in zip(layer.active, deltas, strict=True)
    )
    return worst((changed + differing(run(layer, case.x), y), 0))


# ---- backward --------------------------------------------------------------------------------------------------------


@holds("gradients", "dA = s Bᵀ Gᵀ X,  dB = s Gᵀ X Aᵀ", "Hu et al. 2021, eq. (3), differentiated")
def _gradients(case: Case) -> Measured:
    """gamma_n S of each: `slopes`."""
    layer, G = case.layer(), case.upstream()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    _, _, found = backward(layer, case.x, G)
    return worst(*slopes(case, layer, exact, dY, found))


@holds("input gradient", "dX = G (W + Σ s B A)", "Hu et al. 2021, eq. (3), differentiated", adds)
def _input_gradient(case: Case) -> Measured:
    """The longest way has O roundings in G B, two with s, r in (.) A, and k where the gradients of x meet."""
    layer, G = case.layer(), case.upstream()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    n = case.roundings(layer) - exact.X.shape[1] + dY.shape[1]
    return worst(
        (backward(layer, case.x, G)[1] - exact.dX(dY), case.gamma(n, abs(exact).dX(abs(dY))))
    )


@holds(
    "derivative",
    "⟨dA, U⟩ + ⟨dB, V⟩ = (L(A+U, B+V) - L(A-U, B-V)) / 2",
    "L = ⟨G, y⟩ is quadratic: no h → 0 is needed",
)
def _derivative(case: Case) -> Measured:
    """A central difference of a quadratic is its derivative, at any distance. U = ± A and V = ± B, entry by entry, so
    that A ± U, B ± V are exact. L errs by |G| times the bound of y, the left side by |U|, |V| times those of dA, dB."""
    name, rng, wide, G = (
        next(iter(case.subject.adapters)),
        case.rng,
        WIDE[case.dtype],
        case.upstream(),
    )
    layer, dY = case.layer(name), F.rows(G).astype(wide)
    exact = case.formula(layer)
    (A, B, _), (U, V) = (
        exact.factors[0],
        (f * rng.choice([-1, 1], f.shape) for f in exact.factors[0][:2]),
    )
    _, _, [(dA, dB)] = backward(layer, case.x, G)
    (_, bound_A), (_, bound_B) = slopes(case, layer, exact, dY, [(dA, dB)])
    bound = (abs(U) * bound_A).sum() + (abs(V) * bound_B).sum()
    bound += case.gamma(A.size + B.size, (abs(dA) * abs(U)).sum() + (abs(dB) * abs(V)).sum(), wide)
    left, right = (dA.astype(wide) * U).sum() + (dB.astype(wide) * V).sum(), 0.0
    for sign in (1, -1):
        factors(layer, [(A + sign * U, B + sign * V)])
        right += sign * (dY * run(layer, case.x)).sum() / 2
        scale = abs(case.formula(layer)).y()
        of_y = case.gamma(case.roundings(layer), scale) + case.gamma(
            dY.size + 1, scale, wide
        )  # and of the sum over dY
        bound += (abs(dY) * of_y).sum() / 2
    return worst((left - right, bound))


@holds("start moves B alone", "B = 0  ⇒  dA = 0, dB ≠ 0", "Hu et al. 2021, section 4.1")
def _first_step(case: Case) -> Measured:
    """Exact: dA is a product with 0. dB = s Gᵀ X Aᵀ is zero only if A is, and the adapter could then never learn."""
    layer = case.layer()
    factors(
        layer,
        [(layer.adapters[n].lora_A.data, 0 * layer.adapters[n].lora_B.data) for n in layer.active],
    )
    _, _, found = backward(layer, case.x, case.upstream())
    layer.prepare_step()
    found += backward(layer, case.x, case.upstream())[2]
    return worst((sum(np.count_nonzero(dA) + (not np.any(dB)) for dA, dB in found), 0))


@holds(
    "balance",
    "SGD: Δ(A Aᵀ - Bᵀ B) = η² (dA dAᵀ - dBᵀ dB)",
    "Du, Hu & Lee 2018, section 2: A dAᵀ = dBᵀ B",
)
def _balance(case: Case) -> Measured:
    """Nothing of first order in η. If a step misses A' = A - η dA by E (u of the result, two roundings of η dA, and η
    times the bound of dA), A' A'ᵀ is missed by |E| |A'|ᵀ + |A'| |E|ᵀ + |E| |E|ᵀ; Bᵀ B alike."""
    name, eta, u = next(iter(case.subject.adapters)), 2.0**-6, float(np.finfo(case.dtype).eps) / 2
    layer, G = case.layer(name), case.upstream()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    _, _, [found] = backward(layer, case.x, G)
    bounds = [bound for _, bound in slopes(case, layer, exact, dY, [found])]
    own = [layer.adapters[name].lora_A, layer.adapters[name].lora_B]
    SGD(own, lr=eta).step(found)
    change, bound = 0, 0
    exact_slopes = exact.dA(dY), exact.dB(dY)
    for sign, p, start, slope, e in zip(
        (1, -1), own, exact.factors[0][:2], exact_slopes, bounds, strict=False
    ):
        # For B everything is transposed, so that both are (r, .) and A Aᵀ stands for Bᵀ B.
        turn = (lambda a: a) if sign == 1 else np.transpose
        now, start, slope, e = turn(p.data.astype(start.dtype)), turn(start), turn(slope), turn(e)
        E = u * abs(now) + case.gamma(2, eta * abs(slope)) + eta * e
        change = change + sign * (now @ now.T - start @ start.T - eta**2 * (slope @ slope.T))
        size = abs(start) + eta * abs(slope)
        reference = case.gamma(now.shape[1] + len(dY) + 4, size @ size.T, WIDE[case.dtype])
        bound = bound + E @ (size.T + E.T) + size @ E.T + reference
    return worst((change, bound))
