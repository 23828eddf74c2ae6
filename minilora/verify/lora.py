"""LoRA's properties: its forward, its gradients, the update's rank and gauge.

Letters are case.py's. Some of them hold for AdaLoRA as well, whose A is diag(E) A (`is_additive`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from ..optim import SGD
from .case import Case, active_adapters, unit_roundoff
from .measuring import (
    Measured,
    Property,
    backward,
    compare,
    count_differences,
    count_nonzeros,
    count_parameters,
    expect_zero,
    gradient_errors,
    is_additive,
    is_lora,
    make_registrar,
    project,
    set_tensors,
    svd_error,
    update_error,
    worst,
)

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, is_lora)

# ---- to which cases a property applies -----------------------------------------------------------


def has_several(case: Case) -> bool:
    return is_additive(case) and len(case.adapters) > 1


def is_deficient(case: Case) -> bool:
    """Some adapter's rank is below full rank."""
    if not is_additive(case):
        return False
    full = min(case.base.in_features, case.base.out_features)
    return any(adapter.r < full for adapter in case.adapters.values())


def is_scalable(case: Case) -> bool:
    """A can be divided by 2^8 and nothing underflows, not in a product with x either."""
    if not is_lora(case):
        return False
    A = np.concatenate([adapter.lora_A.data.ravel() for adapter in case.adapters.values()])
    smallest = abs(A[A != 0]).min(initial=1)
    return bool(smallest > np.finfo(case.dtype).tiny * 2.0**40)


# ---- forward -------------------------------------------------------------------------------------


@holds("forward", "y = x Wᵀ + b + Σ s (x Aᵀ) Bᵀ", "Hu et al. 2021, eq. (3)", is_additive)
def measure_forward(case: Case) -> Measured:
    """gamma_n S with n = I + r + k + 2 (`Case.roundings`), the way through the adapter."""
    layer = case.layer(*case.rng.permutation(list(case.adapters)))
    exact = case.formula(layer)
    n = case.roundings(layer)
    S = abs(exact).y()
    return compare(case.run(layer) - exact.y(), case.gamma(n, S))


@holds("start is the base", "B = 0  ⇒  y = x Wᵀ + b", "Hu et al. 2021, section 4.1")
def measure_start(case: Case) -> Measured:
    """Exact: adapters as they are made add s (x Aᵀ) 0 = 0."""
    layer = case.layer()
    rng = case.rng
    for i, (name, config) in enumerate(case.configs.items()):
        init = (True, "gaussian")[rng.integers(2)]
        config = dataclasses.replace(config, init_lora_weights=init)
        kind = type(layer.adapters[name])
        layer.adapters[name] = kind(layer.base_layer, "proj", config, rng, i)
    return expect_zero(count_differences(case.run(layer), case.run(layer.base_layer)))


@holds("sum", "y(a, b) - y(a) = y(b) - y()", "Hu et al. 2021, section 4.1", has_several)
def measure_sum(case: Case) -> Measured:
    """y(a, b) = fl(y(a) + v) and y(b) = fl(y() + v) with the same v: u |y(a, b)| + u |y(b)|.

    This holds whatever the shapes.
    """
    names = list(case.adapters)
    y_none = case.run_wide(case.layer().base_layer)
    y_before = case.run_wide(case.layer(names[0]))
    pairs = []
    for i, name in enumerate(names[1:], 2):
        y_alone = case.run_wide(case.layer(name))
        y_both = case.run_wide(case.layer(*names[:i]))
        error = y_both - y_before - (y_alone - y_none)
        bound = case.u * (abs(y_both) + abs(y_alone)) + case.gamma(0, y_none)
        pairs.append((error, bound))
        y_before = y_both
    return worst(*pairs)


@holds("linear in s", "y(t s) - y(0) = t (y(s) - y(0))", "Hu et al. 2021, section 4.1", is_additive)
def measure_linear(case: Case) -> Measured:
    """All three have y(0) and v = (x Aᵀ) Bᵀ in common, bit for bit.

    What is left is two roundings in each of s v and t s v, three in t and in t s, and the last sum:
    u |y|, of y(t s) and t times of y(s). dW(2 s) = 2 dW(s) is exact.
    """
    layer = case.layer(case.first)
    t = float(case.rng.uniform(1.5, 4))
    adapter = layer.adapters[case.first]
    s = adapter.scaling
    dW = layer.delta_weight(case.first)
    y_0 = case.run_wide(layer.base_layer)
    y_s = case.run_wide(layer)
    adapter.scaling = 2 * s
    doubled = count_differences(layer.delta_weight(case.first), 2 * dW)
    adapter.scaling = t * s
    y_ts = case.run_wide(layer)
    error = y_ts - y_0 - t * (y_s - y_0)
    sv = abs(y_s - y_0) + case.u * abs(y_s)
    bound = case.gamma(7, t * sv) + case.u * (abs(y_ts) + t * abs(y_s))
    return worst((error, bound), (doubled, 0))


@holds("scaling", "s = α / r;  with rsLoRA √r times that", "Kalajdzievski 2023, section 3")
def measure_scaling(case: Case) -> Measured:
    """α / r is one rounding, so the bits are equal.

    (α / √r) / (α / r), and √r beside it, make five roundings: gamma_5.
    """
    u = unit_roundoff(np.float64)
    gamma_5 = 5 * u / (1 - 5 * u)
    pairs: list[tuple[Any, Any]] = []
    for name, config in case.configs.items():
        plain = dataclasses.replace(config, use_rslora=False).scaling("proj")
        stable = dataclasses.replace(config, use_rslora=True).scaling("proj")
        s = stable if config.use_rslora else plain
        root = math.sqrt(config.r)
        pairs.append((plain - config.lora_alpha / config.r, 0))
        pairs.append((case.adapters[name].scaling - s, 0))
        pairs.append((stable / plain - root, gamma_5 * root))
    return worst(*pairs)


@holds("count", "trainable numbers = r (I + O)", "Hu et al. 2021, section 4.2")
def measure_count(case: Case) -> Measured:
    """Exact: of the parameters, and of the shapes that are known before them."""
    return count_parameters(case, lambda r, inputs, outputs: r * (inputs + outputs))


# ---- the update's rank, and its gauge ------------------------------------------------------------


@holds("rank", "σᵣ₊₁(s B A) = 0", "Hu et al. 2021, section 4.1", is_deficient)
def measure_rank(case: Case) -> Measured:
    """σᵣ₊₁(dW) ≤ |dW - X| for each X of rank r (Eckart & Young 1936); X = Q T is dW on B's columns.

    If dW = s B A + F, then |dW - Q T| ≤ |F|, here `update_error`. Q and T err by `svd_error`.
    """
    pairs = []
    for name, adapter in case.adapters.items():
        layer = case.layer(name)
        dW = layer.delta_weight(name)
        if adapter.r < min(dW.shape):
            Q, T = project(dW, adapter.lora_B.data)
            largest = np.linalg.svd(T, compute_uv=False).max(initial=0)
            bound = update_error(case, layer) + svd_error(dW.shape, largest)
            pairs.append((np.linalg.norm(dW - Q @ T), bound))
    return worst(*pairs)


@holds(
    "gauge",
    "(B P⁻¹) (P A) = B A,  P invertible",
    "Hu et al. 2021, eq. (3): only the product counts",
)
def measure_gauge(case: Case) -> Measured:
    """P = c (1 + τ eⱼᵀ) with τⱼ = 0, a Gauss transform (Golub & Van Loan 2013, section 3.2.1).

    So P⁻¹ = (1 - τ eⱼᵀ) / c is known. P A and B P⁻¹ are rounded once each: (2 u + u²) |B P⁻¹|
    |P A|. The rest is float64's.
    """
    rng = case.rng
    layer = case.layer(case.first)
    before = layer.delta_weight(case.first)
    A, B, s = case.formula(layer).factors[0]
    r = len(A)
    tau = rng.uniform(-1, 1, r).astype(case.wide)
    c = case.wide.type(rng.uniform(0.5, 2))
    j = rng.integers(r)
    tau[j] = 0
    one = np.eye(r, dtype=case.wide)
    shear = np.outer(tau, one[j])  # τ eⱼᵀ (r, r)
    P = c * (one + shear)
    inverse = (one - shear) / c
    PA = P @ A
    BP = B @ inverse
    set_tensors(layer, [(PA, BP)])
    error = layer.delta_weight(case.first) - before
    rounded = s * (2 * case.u + case.u * case.u) * (abs(BP) @ abs(PA))
    S = s * (abs(B) @ abs(inverse) @ abs(P) @ abs(A))
    return compare(error, rounded + case.gamma(3 * r + 3, S, np.float64))


@holds(
    "gauge by powers of two",
    "P = diag(2ᵏ)  ⇒  the same bits",
    "Higham 2002, section 2.1",
    is_scalable,
)
def measure_powers(case: Case) -> Measured:
    """Exact: a power of two changes exponents alone, and each product a b stays as it was."""
    layer = case.layer()
    rng = case.rng
    y = case.run(layer)
    updates = [layer.delta_weight(name) for name in layer.active]
    scaled = []
    for adapter in active_adapters(layer):
        P = 2.0 ** -rng.integers(1, 9, adapter.r)
        scaled.append((P[:, None] * adapter.lora_A.data, adapter.lora_B.data / P))
    set_tensors(layer, scaled)
    wrong = count_differences(case.run(layer), y)
    for name, dW in zip(layer.active, updates, strict=True):
        wrong += count_differences(layer.delta_weight(name), dW)
    return expect_zero(wrong)


# ---- backward ------------------------------------------------------------------------------------


@holds("gradients", "dA = s Bᵀ Gᵀ X,  dB = s Gᵀ X Aᵀ", "Hu et al. 2021, eq. (3), differentiated")
def measure_gradients(case: Case) -> Measured:
    """gamma_n S of each: `gradient_errors`."""
    layer = case.layer()
    dY = case.draw_dY()
    _, _, slopes = backward(case, layer, dY)
    exact = case.formula(layer)
    return worst(*gradient_errors(case, layer, exact, case.wide_rows(dY), slopes))


@holds(
    "input gradient", "dX = G (W + Σ s B A)", "Hu et al. 2021, eq. (3), differentiated", is_additive
)
def measure_input_gradient(case: Case) -> Measured:
    """The longest way has O roundings in G B, two with s, r in (.) A, and k in the sums."""
    layer = case.layer()
    dY = case.draw_dY()
    G = case.wide_rows(dY)
    exact = case.formula(layer)
    _, dX, _ = backward(case, layer, dY)
    n = case.roundings(layer) - layer.in_features + layer.out_features
    S = abs(exact).dX(abs(G))
    return compare(dX - exact.dX(G), case.gamma(n, S))


@holds(
    "derivative",
    "⟨dA, U⟩ + ⟨dB, V⟩ = (L(A+U, B+V) - L(A-U, B-V)) / 2",
    "L = ⟨G, y⟩ is quadratic: no h → 0 is needed",
)
def measure_derivative(case: Case) -> Measured:
    """A central difference of a quadratic is its derivative, at any distance.

    U = ± A and V = ± B, entry by entry, so that A ± U, B ± V are exact. L errs by |G| times the
    bound of y, the left side by |U|, |V| times those of dA, dB.
    """
    rng = case.rng
    wide = case.wide
    dY = case.draw_dY()
    G = case.wide_rows(dY)
    layer = case.layer(case.first)
    exact = case.formula(layer)
    A, B, _ = exact.factors[0]
    U = A * rng.choice([-1, 1], A.shape)
    V = B * rng.choice([-1, 1], B.shape)
    _, _, slopes = backward(case, layer, dY)
    (dA, dB) = slopes[0]
    (_, bound_A), (_, bound_B) = gradient_errors(case, layer, exact, G, slopes)
    left = (dA.astype(wide) * U).sum() + (dB.astype(wide) * V).sum()
    S = (abs(dA) * abs(U)).sum() + (abs(dB) * abs(V)).sum()
    bound = (abs(U) * bound_A).sum() + (abs(V) * bound_B).sum()
    bound += case.gamma(A.size + B.size, S, wide)
    right = 0.0
    for sign in (1, -1):
        set_tensors(layer, [(A + sign * U, B + sign * V)])
        L = (G * case.run(layer)).sum()
        right += sign * L / 2
        S = abs(case.formula(layer)).y()
        y_error = case.gamma(case.roundings(layer), S)
        sum_error = case.gamma(G.size + 1, S, wide)  # of the sum over G
        bound += (abs(G) * (y_error + sum_error)).sum() / 2
    return compare(left - right, bound)


@holds("start moves B alone", "B = 0  ⇒  dA = 0, dB ≠ 0", "Hu et al. 2021, section 4.1")
def measure_first_step(case: Case) -> Measured:
    """Exact: dA is a product with 0, with and without the prepared weight.

    dB = s Gᵀ X Aᵀ is zero only if A is, and the adapter could then never learn.
    """
    layer = case.layer()
    dY = case.draw_dY()
    zero_B = [(a.lora_A.data, 0 * a.lora_B.data) for a in active_adapters(layer)]
    set_tensors(layer, zero_B)
    wrong = 0
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        _, _, slopes = backward(case, layer, dY)
        for dA, dB in slopes:
            wrong += count_nonzeros(dA) + (not dB.any())
    return expect_zero(wrong)


@holds(
    "balance",
    "SGD: Δ(A Aᵀ - Bᵀ B) = η² (dA dAᵀ - dBᵀ dB)",
    "Du, Hu & Lee 2018, section 2: A dAᵀ = dBᵀ B",
)
def measure_balance(case: Case) -> Measured:
    """Nothing of first order in η.

    If a step misses A' = A - η dA by E (u of the result, two roundings of η dA, and η times the
    bound of dA), A' A'ᵀ is missed by |E| |A'|ᵀ + |A'| |E|ᵀ + |E| |E|ᵀ; Bᵀ B alike.
    """
    eta = 2.0**-6
    layer = case.layer(case.first)
    adapter = layer.adapters[case.first]
    dY = case.draw_dY()
    G = case.wide_rows(dY)
    exact = case.formula(layer)
    A, B, _ = exact.factors[0]
    _, _, slopes = backward(case, layer, dY)
    (_, bound_A), (_, bound_B) = gradient_errors(case, layer, exact, G, slopes)
    SGD([adapter.lora_A, adapter.lora_B], lr=eta).step(slopes[0])
    # B is transposed, so that all are (r, .) and M Mᵀ is A Aᵀ, then Bᵀ B.
    sides = [
        (1, adapter.lora_A.data, A, exact.dA(G), bound_A),
        (-1, adapter.lora_B.data.T, B.T, exact.dB(G).T, bound_B.T),
    ]
    change: Any = 0
    bound: Any = 0
    for sign, after, M, dM, bound_dM in sides:
        after = after.astype(case.wide)
        change = change + sign * (after @ after.T - M @ M.T - eta**2 * (dM @ dM.T))
        E = case.u * abs(after) + case.gamma(2, eta * abs(dM)) + eta * bound_dM
        size = abs(M) + eta * abs(dM)
        n = after.shape[1] + len(G) + 4
        bound = bound + E @ (size.T + E.T) + size @ E.T
        bound = bound + case.gamma(n, size @ size.T, case.wide)
    return compare(change, bound)
