"""The mathematics of LoRA as a list: every equation, its paper, a measurement, and the bound that rounding allows.

Each entry of PROPERTIES is one claim and says to which cases it applies; another kind of adapter brings more entries.
Letters and shapes are those of case.py.

**Where bounds come from.** A property that is exact in floating point has the bound 0, and its measurement counts the
entries that differ. For the others no tolerance is chosen. If a result is a sum of products and each of them passes
through at most n roundings on its way, in whatever order a library adds them, then (Higham 2002, section 3.1)

    |computed - exact| <= gamma_n S,    gamma_n = n u / (1 - n u),    S = the same formula over absolute values,

entry by entry. S is literally that: `abs(formula)`. The reference has roundings too, in its own u, and they are added
(`Case.gamma`). Where a single rounding is known by its result, |fl(a) - a| <= u |fl(a)| is sharper, and used. Each
docstring says how its measurement counts. Shown is the entry that comes nearest to its bound, or is furthest beyond it.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, gradients
from ..backend import Array
from ..errors import NonFiniteError
from ..formats import load_file
from ..lora import DoraAdapter, LoraAdapter, PeftModel, get_peft_model
from ..nn import Embedding, LinearBase, Module, dropout_counter
from ..optim import SGD
from .case import WIDE, Case, Formula
from .measuring import Measured, Property, backward, differing, factors, run, worst

PROPERTIES: list[Property] = []
CHANCE = 1e-9  # that a right layer misses a statistical bound, for each measurement

# ---- to which cases a property applies ------------------------------------------------------------------------------


def lora(case: Case) -> bool:
    """All adapters are plain LoRA: dW = s B A, and nothing else."""
    return all(type(a) is LoraAdapter for a in case.subject.adapters.values())


def some(case: Case) -> bool:
    """Every adapter has triplets, or rows and columns: from some layers AdaLoRA takes all."""
    return all(a.r for a in case.subject.adapters.values())


def dora(case: Case) -> bool:
    return all(type(a) is DoraAdapter for a in case.subject.adapters.values())


def several(case: Case) -> bool:
    return lora(case) and len(case.subject.adapters) > 1


def deficient(case: Case) -> bool:
    """Some adapter's rank is below full rank."""
    base = case.subject.base_layer
    return lora(case) and min(a.r for a in case.subject.adapters.values()) < min(base.in_features, base.out_features)


def scalable(case: Case) -> bool:
    """A can be divided by 2^8 and nothing underflows, not in a product with x either."""
    A = np.concatenate([a.lora_A.data.ravel() for a in case.subject.adapters.values()])
    return lora(case) and bool(np.abs(A[A != 0]).min(initial=1) > np.finfo(case.dtype).tiny * 2.0**40)


def holds(
    name: str, equation: str, source: str, when: Callable[[Case], bool] = lora
) -> Callable[[Callable[[Case], Measured]], Callable[[Case], Measured]]:
    """Put a measurement into the list, beside the claim that it measures."""

    def add(measure: Callable[[Case], Measured]) -> Callable[[Case], Measured]:
        PROPERTIES.append(Property(name, equation, source, measure, when))
        return measure

    return add


# -- forward


@holds("forward", "y = x Wᵀ + b + Σ s (x Aᵀ) Bᵀ", "Hu et al. 2021, eq. (3)")
def _forward(case: Case) -> Measured:
    """gamma_n S with n = I + r + k + 2 (`Case.roundings`): the way through the adapter is the longest."""
    layer = case.layer(*case.rng.permutation(list(case.subject.adapters)))
    exact = case.formula(layer)
    return worst((run(layer, case.x) - exact.y(), case.gamma(case.roundings(layer), abs(exact).y())))


@holds("start is the base", "B = 0  ⇒  y = x Wᵀ + b", "Hu et al. 2021, section 4.1")
def _start(case: Case) -> Measured:
    """Exact: adapters as they are made add s (x Aᵀ) 0 = 0."""
    layer, rng = case.layer(), case.rng
    for i, (name, config) in enumerate(case.configs.items()):
        config = dataclasses.replace(config, init_lora_weights=(True, "gaussian")[rng.integers(2)])
        layer.adapters[name] = type(layer.adapters[name])(layer.base_layer, "proj", config, rng, i)
    return worst((differing(run(layer, case.x), run(layer.base_layer, case.x)), 0))


@holds("disabled is the base", "no adapter enabled  ⇒  y = x Wᵀ + b", "Hu et al. 2021, section 4.1", lambda case: True)
def _disabled(case: Case) -> Measured:
    """Exact: the base runs alone."""
    layer = case.layer()
    layer.enabled = False
    return worst((differing(run(layer, case.x), run(layer.base_layer, case.x)), 0))


@holds("sum", "y(a, b) - y(a) = y(b) - y()", "Hu et al. 2021, section 4.1", several)
def _sum(case: Case) -> Measured:
    """y(a, b) = fl(y(a) + v) and y(b) = fl(y() + v) with the same v: u |y(a, b)| + u |y(b)|, whatever the shapes."""
    names, u = list(case.subject.adapters), float(np.finfo(case.dtype).eps) / 2
    ys = [run(case.layer(*names[: i + 1]), case.x).astype(WIDE[case.dtype]) for i in range(len(names))]
    base = run(case.layer().base_layer, case.x).astype(WIDE[case.dtype])
    pairs = []
    for name, before, both in zip(names[1:], ys, ys[1:], strict=False):
        alone = run(case.layer(name), case.x)
        pairs.append((both - before - (alone - base), u * (abs(both) + abs(alone)) + case.gamma(0, base)))
    return worst(*pairs)


@holds("linear in s", "y(t s) - y(0) = t (y(s) - y(0))", "Hu et al. 2021, section 4.1")
def _linear(case: Case) -> Measured:
    """All three have y(0) and v = (x Aᵀ) Bᵀ in common, bit for bit. What is left is two roundings in each of s v and
    t s v, three in t and in t s, and the last sum: u |y|, of y(t s) and t times of y(s). dW(2 s) = 2 dW(s) is exact."""
    name, wide, u = next(iter(case.subject.adapters)), WIDE[case.dtype], float(np.finfo(case.dtype).eps) / 2
    layer, t = case.layer(name), float(case.rng.uniform(1.5, 4))
    adapter, delta = layer.adapters[name], layer.delta_weight(name)
    s, y0, y1 = adapter.scaling, run(layer.base_layer, case.x).astype(wide), run(layer, case.x).astype(wide)
    adapter.scaling = 2 * s
    doubled = differing(layer.delta_weight(name), 2 * delta)
    adapter.scaling = t * s
    yt = run(layer, case.x).astype(wide)
    sv = abs(y1 - y0) + u * abs(y1)
    return worst((yt - y0 - t * (y1 - y0), case.gamma(7, t * sv) + u * (abs(yt) + t * abs(y1))), (doubled, 0))


@holds("scaling", "s = α / r;  with rsLoRA √r times that", "Kalajdzievski 2023, section 3")
def _scaling(case: Case) -> Measured:
    """α / r is one rounding, so the bits are equal. (α / √r) / (α / r), and √r beside it, make five: gamma_5."""
    pairs: list[tuple[Any, Any]] = []
    for name, config in case.configs.items():
        plain, stable = (dataclasses.replace(config, use_rslora=rs).scaling("proj") for rs in (False, True))
        root, u = math.sqrt(config.r), 2.0**-53
        pairs.append((plain - config.lora_alpha / config.r, 0))
        pairs.append((case.subject.adapters[name].scaling - (stable if config.use_rslora else plain), 0))
        pairs.append((stable / plain - root, 5 * u / (1 - 5 * u) * root))
    return worst(*pairs)


@holds("count", "trainable numbers = r (I + O)", "Hu et al. 2021, section 4.2")
def _count(case: Case) -> Measured:
    """Exact, here and by the same formula for c_attn of GPT-2 (r = 8) and q_proj, v_proj of Llama-2-7B (r = 8)."""

    def of(inputs: int, outputs: int, r: int) -> int:
        size = LinearBase()  # a size and nothing else: no memory
        size.in_features, size.out_features = inputs, outputs
        return sum(math.prod(shape) for shape in LoraAdapter.shapes(size, r).values())

    base, adapters = case.subject.base_layer, case.subject.adapters.values()
    own = sum(abs(sum(p.size for p in a.parameters()) - a.r * (base.in_features + base.out_features)) for a in adapters)
    known = abs(12 * of(768, 2304, 8) - 294_912) + abs(32 * 2 * of(4096, 4096, 8) - 4_194_304)
    return worst((own + known, 0))


# -- the update's rank, and its gauge


@holds("rank", "σᵣ₊₁(s B A) = 0", "Hu et al. 2021, section 4.1", deficient)
def _rank(case: Case) -> Measured:
    """Weyl: an error E moves singular values by at most |E|, here the norm of gamma_(r+1) |s| |B| |A|: dW is formed in
    float64. Finding them costs max(I, O) eps σ₁ (Golub & Van Loan 2013, section 5.4.1; also NumPy's matrix_rank)."""
    pairs = []
    for name, adapter in case.subject.adapters.items():
        layer = case.layer(name)
        delta = layer.delta_weight(name)
        values = np.linalg.svd(delta, compute_uv=False)
        if adapter.r < len(values):
            moved = np.linalg.norm(case.gamma(adapter.r + 1, abs(case.formula(layer)).dW(), np.float64).astype(float))
            pairs.append((values[adapter.r], moved + max(delta.shape) * np.finfo(np.float64).eps * values[0]))
    return worst(*pairs)


@holds("gauge", "(B P⁻¹) (P A) = B A,  P invertible", "Hu et al. 2021, eq. (3): only the product counts")
def _gauge(case: Case) -> Measured:
    """P = c (1 + τ eⱼᵀ) with τⱼ = 0, a Gauss transform (Golub & Van Loan 2013, section 3.2.1): P⁻¹ = (1 - τ eⱼᵀ) / c is
    known. P A and B P⁻¹ are rounded once each: (2 u + u²) |B P⁻¹| |P A|. The rest is float64's."""
    name, rng, wide = next(iter(case.subject.adapters)), case.rng, WIDE[case.dtype]
    layer = case.layer(name)
    before, exact = layer.delta_weight(name), case.formula(layer)
    (A, B, s), u = exact.factors[0], float(np.finfo(case.dtype).eps) / 2
    tau, one, c = rng.uniform(-1, 1, len(A)).astype(wide), np.eye(len(A), dtype=wide), wide.type(rng.uniform(0.5, 2))
    j = rng.integers(len(A))
    tau[j] = 0
    P, inverse = c * (one + np.outer(tau, one[j])), (one - np.outer(tau, one[j])) / c
    factors(layer, [(P @ A, B @ inverse)])
    rounded = s * (2 * u + u * u) * (abs(B @ inverse) @ abs(P @ A))
    products = s * (abs(B) @ abs(inverse) @ abs(P) @ abs(A))
    return worst((layer.delta_weight(name) - before, rounded + case.gamma(3 * len(A) + 3, products, np.float64)))


@holds("gauge by powers of two", "P = diag(2ᵏ)  ⇒  the same bits", "Higham 2002, section 2.1", scalable)
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
    changed = sum(differing(layer.delta_weight(n), d) for n, d in zip(layer.active, deltas, strict=True))
    return worst((changed + differing(run(layer, case.x), y), 0))


# -- backward


@holds("gradients", "dA = s Bᵀ Gᵀ X,  dB = s Gᵀ X Aᵀ", "Hu et al. 2021, eq. (3), differentiated")
def _gradients(case: Case) -> Measured:
    """dA: O in G B, two with s, N in (.)ᵀ X. dB: I in X Aᵀ, N in Gᵀ (.), two with s. gamma_n S of each."""
    layer, G = case.layer(), case.upstream()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    _, _, found = backward(layer, case.x, G)
    return worst(*_of_factors(case, exact, dY, found))


def _of_factors(
    case: Case, exact: Formula, G: Array, found: list[tuple[Array, Array]]
) -> Iterator[tuple[Array, Array]]:
    """(error, bound) of the factors' gradients; see `_gradients`."""
    (N, I), O = exact.X.shape, G.shape[1]
    for i, (dA, dB) in enumerate(found):
        yield dA - exact.dA(G, i), case.gamma(O + N + 2, abs(exact).dA(abs(G), i))
        yield dB - exact.dB(G, i), case.gamma(I + N + 2, abs(exact).dB(abs(G), i))


@holds("input gradient", "dX = G (W + Σ s B A)", "Hu et al. 2021, eq. (3), differentiated")
def _input_gradient(case: Case) -> Measured:
    """The longest way has O roundings in G B, two with s, r in (.) A, and k where the gradients of x meet."""
    layer, G = case.layer(), case.upstream()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    n = case.roundings(layer) - exact.X.shape[1] + dY.shape[1]
    return worst((backward(layer, case.x, G)[1] - exact.dX(dY), case.gamma(n, abs(exact).dX(abs(dY)))))


@holds(
    "derivative", "⟨dA, U⟩ + ⟨dB, V⟩ = (L(A+U, B+V) - L(A-U, B-V)) / 2", "L = ⟨G, y⟩ is quadratic: no h → 0 is needed"
)
def _derivative(case: Case) -> Measured:
    """A central difference of a quadratic is its derivative, at any distance. U = ± A and V = ± B, entry by entry, so
    that A ± U, B ± V are exact. L errs by |G| times the bound of y, the left side by |U|, |V| times those of dA, dB."""
    name, rng, wide, G = next(iter(case.subject.adapters)), case.rng, WIDE[case.dtype], case.upstream()
    layer, dY = case.layer(name), F.rows(G).astype(wide)
    exact = case.formula(layer)
    (A, B, _), (U, V) = exact.factors[0], (f * rng.choice([-1, 1], f.shape) for f in exact.factors[0][:2])
    _, _, [(dA, dB)] = backward(layer, case.x, G)
    (_, bound_A), (_, bound_B) = _of_factors(case, exact, dY, [(dA, dB)])
    bound = (abs(U) * bound_A).sum() + (abs(V) * bound_B).sum()
    bound += case.gamma(A.size + B.size, (abs(dA) * abs(U)).sum() + (abs(dB) * abs(V)).sum(), wide)
    left, right = (dA.astype(wide) * U).sum() + (dB.astype(wide) * V).sum(), 0.0
    for sign in (1, -1):
        factors(layer, [(A + sign * U, B + sign * V)])
        right += sign * (dY * run(layer, case.x)).sum() / 2
        scale = abs(case.formula(layer)).y()
        of_y = case.gamma(case.roundings(layer), scale) + case.gamma(dY.size + 1, scale, wide)  # and of the sum over dY
        bound += (abs(dY) * of_y).sum() / 2
    return worst((left - right, bound))


@holds("start moves B alone", "B = 0  ⇒  dA = 0, dB ≠ 0", "Hu et al. 2021, section 4.1")
def _first_step(case: Case) -> Measured:
    """Exact: dA is a product with 0. dB = s Gᵀ X Aᵀ is zero only if A is, and the adapter could then never learn."""
    layer = case.layer()
    factors(layer, [(layer.adapters[n].lora_A.data, 0 * layer.adapters[n].lora_B.data) for n in layer.active])
    _, _, found = backward(layer, case.x, case.upstream())
    layer.prepare_step()
    found += backward(layer, case.x, case.upstream())[2]
    return worst((sum(np.count_nonzero(dA) + (not np.any(dB)) for dA, dB in found), 0))


@holds("balance", "SGD: Δ(A Aᵀ - Bᵀ B) = η² (dA dAᵀ - dBᵀ dB)", "Du, Hu & Lee 2018, section 2: A dAᵀ = dBᵀ B")
def _balance(case: Case) -> Measured:
    """Nothing of first order in η. If a step misses A' = A - η dA by E (u of the result, two roundings of η dA, and η
    times the bound of dA), A' A'ᵀ is missed by |E| |A'|ᵀ + |A'| |E|ᵀ + |E| |E|ᵀ; Bᵀ B alike."""
    name, eta, u = next(iter(case.subject.adapters)), 2.0**-6, float(np.finfo(case.dtype).eps) / 2
    layer, G = case.layer(name), case.upstream()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    _, _, [found] = backward(layer, case.x, G)
    bounds = [bound for _, bound in _of_factors(case, exact, dY, [found])]
    own = [layer.adapters[name].lora_A, layer.adapters[name].lora_B]
    SGD(own, lr=eta).step(found)
    change, bound = 0, 0
    slopes = exact.dA(dY), exact.dB(dY)
    for sign, p, start, slope, e in zip((1, -1), own, exact.factors[0][:2], slopes, bounds, strict=False):
        # For B everything is transposed, so that both are (r, .) and A Aᵀ stands for Bᵀ B.
        turn = (lambda a: a) if sign == 1 else np.transpose
        now, start, slope, e = turn(p.data.astype(start.dtype)), turn(start), turn(slope), turn(e)
        E = u * abs(now) + case.gamma(2, eta * abs(slope)) + eta * e
        change = change + sign * (now @ now.T - start @ start.T - eta**2 * (slope @ slope.T))
        size = abs(start) + eta * abs(slope)
        reference = case.gamma(now.shape[1] + len(dY) + 4, size @ size.T, WIDE[case.dtype])
        bound = bound + E @ (size.T + E.T) + size @ E.T + reference
    return worst((change, bound))


# -- the effective weight, and merging


@holds("effective weight", "y, dX, dA, dB by one product with W + Σ s B A", "Hu et al. 2021, section 4.1: no latency")
def _effective(case: Case) -> Measured:
    """W + dW is formed in the layer's own precision: r + 1 + k roundings, then I (O in backward) and the bias."""
    layer, G = case.layer(), case.upstream()
    layer.prepare_step()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    y, dX, found = backward(layer, case.x, G)
    n = case.roundings(layer, 1)
    into_x = n - exact.X.shape[1] + dY.shape[1]
    pairs = [
        (y - exact.y(), case.gamma(n, abs(exact).y())),
        (dX - exact.dX(dY), case.gamma(into_x, abs(exact).dX(abs(dY)))),
    ]
    return worst(*pairs, *_of_factors(case, exact, dY, found))


@holds("merged forward", "x (W + Σ s B A)ᵀ = x Wᵀ + Σ s (x Aᵀ) Bᵀ", "Hu et al. 2021, section 4.1")
def _merged_forward(case: Case) -> Measured:
    """Both sides err by at most gamma_(n+1) S, n as for `forward`: the merged one needs only the I of a product, the
    bias, and what making W + dW takes."""
    layer = case.layer()
    scale, before = abs(case.formula(layer)).y(), run(layer, case.x).astype(WIDE[case.dtype])
    n = case.roundings(layer, 1)
    layer.merge()
    return worst((run(layer, case.x) - before, 2 * case.gamma(n, scale)))


@holds("merge rounds once", "W' = fl(W + Σ s B A)", "IEEE 754-2019, section 4.3.1")
def _merge(case: Case) -> Measured:
    """Half an ulp of W' (Higham 2002, section 2.1), and the float64 sum's own gamma_(r+1+k) S."""
    layer = case.layer()
    exact, n = case.formula(layer), case.roundings(layer) - layer.base_layer.in_features
    layer.merge()
    W = layer.base_layer.dense_weight()
    half = np.spacing(abs(W)).astype(WIDE[case.dtype]) / 2
    absolute = abs(exact)
    return worst((W - (exact.W + exact.dW()), half + case.gamma(n, absolute.W + absolute.dW(), np.float64)))


@holds("merge in any portions", "twice, or one by one  ⇒  the same bits", "one sum from the kept W", lambda case: True)
def _portions(case: Case) -> Measured:
    """Exact: the order of the sum is that of the names, however they come."""
    names = [str(name) for name in case.rng.permutation(list(case.subject.adapters))]
    once = case.layer()
    once.merge(names)
    W, wrong = once.base_layer.dense_weight(), int(once.merged != tuple(names))
    for portions in ([names, names], [names + names], [[name] for name in names], [names[:1], names]):
        layer = case.layer()
        for portion in portions:
            layer.merge(portion)
        wrong += differing(layer.base_layer.dense_weight(), W) + (layer.merged != once.merged)
    return worst((wrong, 0))


@holds("merge refuses", "W + dW not finite  ⇒  an error, W as it was", "nothing is merged half", some)
def _refuses(case: Case) -> Measured:
    """Exact: a NaN or inf in one entry of a factor, or finite factors whose product overflows."""
    wrong = 0
    for value in (math.nan, math.inf, -math.inf, float(np.finfo(case.dtype).max)):
        layer = case.layer()
        tensors = [getattr(a, name) for a in layer.adapters.values() for name in a.TENSORS]
        for p in tensors if math.isfinite(value) else [tensors[case.rng.integers(len(tensors))]]:
            spoilt = np.full_like(p.data, value) if math.isfinite(value) else p.data.copy()
            spoilt.flat[case.rng.integers(p.size)] = value
            p.data = spoilt
        base, before = layer.base_layer, layer.base_layer.dense_weight().copy()
        try:
            layer.merge()
            wrong += 1
        except NonFiniteError:
            wrong += differing(layer.base_layer.dense_weight(), before) + (layer.base_layer is not base)
            wrong += len(layer.merged)
    return worst((wrong, 0))


@holds("unmerge", "W comes back, every bit", "the base itself is kept", lambda case: True)
def _unmerge(case: Case) -> Measured:
    """Exact, and it is the same array, however often."""
    layer = case.layer()
    base, before = layer.base_layer, layer.base_layer.dense_weight().copy()
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    wrong = (layer.base_layer is not base) + len(layer.merged)
    return worst((differing(layer.base_layer.dense_weight(), before) + wrong, 0))


@holds("round trip", "|fl(W' - dW) - W| ≤ u (|W'| + |W|): why W is kept", "Higham 2002, eq. (2.5)")
def _round_trip(case: Case) -> Measured:
    """What subtracting dW, asked for while it is merged, would restore. The two sums round once each, to W' and to the
    result R: u |W'| + u |R|, and gamma_(r+1+k) S for dW in float64, twice. Nearly all of that is really lost."""
    layer, wide, u = case.layer(), WIDE[case.dtype], float(np.finfo(case.dtype).eps) / 2
    exact, n = case.formula(layer), case.roundings(layer) - layer.base_layer.in_features
    layer.merge()
    merged = layer.base_layer.dense_weight().astype(wide)
    R = (merged - sum(layer.delta_weight(name) for name in layer.active)).astype(case.dtype).astype(wide)
    absolute = abs(exact)
    float64 = case.gamma(2 * n, absolute.W + absolute.dW(), np.float64)
    return worst((R - exact.W, u * (abs(merged) + abs(R)) + float64))


# -- DoRA


@holds(
    "DoRA starts as the base", "B = 0  ⇒  y = x Wᵀ + b;  dA = 0, dB ≠ 0, dm ≠ 0", "Liu et al. 2024, section 4.1", dora
)
def _dora_start(case: Case) -> Measured:
    """Exact, on its own and by the weight of a step: m = |W| gives k = 1. dm is zero only if y or its gradient is."""
    layer, G = case.layer(), case.upstream()
    [(name, config)], wrong = case.configs.items(), 0
    layer.adapters[name] = adapter = DoraAdapter(layer.base_layer, "proj", config, case.rng)
    expected = run(layer.base_layer, case.x)
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        y = layer(Tensor(case.x))
        dA, dB, dm = (np.asarray(g) for g in gradients(y, [getattr(adapter, name) for name in adapter.TENSORS], G))
        wrong += differing(F.rows(y.data), expected) + np.count_nonzero(dA) + (not dB.any()) + (not dm.any())
    return worst((wrong, 0))


@holds("DoRA's rows", "W' = m (W + s B A) / |W + s B A|  ⇒  |W'| = |m|, row by row", "Liu et al. 2024, eq. (5)", dora)
def _dora_rows(case: Case) -> Measured:
    """V = W + s B A takes r + 2 roundings in the layer's precision: gamma_(r+2) S, times k. Its norm and k
    take I + 4 of |m|, W' one; before it are r + 5 in float64, of k S and of W, which is taken away and added again."""
    layer = case.layer()
    [adapter], exact = layer.running, case.formula(layer)
    m, r = adapter.lora_magnitude_vector.data.astype(WIDE[case.dtype]), adapter.r
    absolute = abs(exact)
    V, S, W = (np.linalg.norm(M, axis=1) for M in (exact.W + exact.dW(), absolute.W + absolute.dW(), exact.W))
    k = abs(m) / V
    layer.merge()
    found = np.linalg.norm(layer.base_layer.dense_weight().astype(WIDE[case.dtype]), axis=1)
    bound = case.gamma(r + 2, k * S) + case.gamma(exact.W.shape[1] + 5, abs(m))
    return worst((found - abs(m), bound + case.gamma(r + 5, k * S + W, np.float64)))


@holds("DoRA's count", "trainable numbers = r (I + O) + O", "Liu et al. 2024, section 4.1", dora)
def _dora_count(case: Case) -> Measured:
    """Exact."""
    base, adapters = case.subject.base_layer, case.subject.adapters.values()
    wanted = sum(a.r * (base.in_features + base.out_features) + base.out_features for a in adapters)
    return worst((sum(p.size for a in adapters for p in a.parameters()) - wanted, 0))


# -- files


class _Model(Module):
    """The smallest model that an adapter can be put into: one layer."""

    def __init__(self, layer: Any):
        self.proj = layer

    def get_input_embeddings(self) -> Embedding:
        return Embedding(np.zeros((1, 1), np.float32))


@holds("files", "save, load  ⇒  the same bits under PEFT's keys, whatever the name", "peft 0.21, save_pretrained")
def _files(case: Case) -> Measured:
    """Exact: tensors, outputs, the two keys, and the bytes of a file that was saved under another adapter's name."""
    name, config = next(iter(case.configs.items()))
    layer = case.layer(name)
    keys = {f"base_model.model.proj.lora_{x}.weight" for x in "AB"}
    with tempfile.TemporaryDirectory() as folder:
        made = get_peft_model(_Model(case.layer().base_layer), config)
        adapter = layer.adapters[name]
        factors(made.model.proj, [(adapter.lora_A.data, adapter.lora_B.data)])
        made.save_pretrained(folder)
        again = PeftModel.from_pretrained(_Model(case.layer().base_layer), folder, "another")
        again.save_pretrained(folder)
        first, second = (path / "adapter_model.safetensors" for path in (Path(folder), Path(folder, "another")))
        wrong = len(set(load_file(first)) ^ keys) + (first.read_bytes() != second.read_bytes())
    loaded = again.model.proj.adapters["another"]
    for own, other in zip(adapter.parameters(), loaded.parameters(), strict=True):
        wrong += differing(own.data, other.data)
    return worst((wrong + differing(run(layer, case.x), run(again.model.proj, case.x)), 0))


# -- dropout


@holds("dropout off", "evaluating, or p = 0  ⇒  x is untouched", "Srivastava et al. 2014", lambda case: True)
def _dropout_off(case: Case) -> Measured:
    """Exact: dropout is then the identity."""
    layer = case.layer()
    for adapter in layer.adapters.values():
        adapter.dropout.p = 0.0
    y = run(layer, case.x)
    wrong = differing(run(layer.train(), case.x), y)
    for adapter in layer.adapters.values():
        adapter.dropout.p = 0.5
    return worst((wrong + differing(run(layer.eval(), case.x), y), 0))


@holds("dropout spares the base", "y = x Wᵀ + b + Σ s (drop(x) Aᵀ) Bᵀ", "peft 0.21, forward of its LoRA layer")
def _dropout_base(case: Case) -> Measured:
    """Exact: with the same masks, the same operations give the same bits. The base reads x itself."""
    layer, x = case.layer().train(), Tensor(case.x)
    adapters = [layer.adapters[name] for name in layer.active]
    for adapter in adapters:
        adapter.dropout.p = 0.5
    with dropout_counter(case.seed, 0):
        y, expected = run(layer, case.x), layer.base_layer(x)
        for a in adapters:
            expected = F.lora_linear(a.dropout(x), expected, a.lora_A, a.lora_B, a.scaling)
    return worst((differing(y, F.rows(expected.data)), 0))


@holds("dropout is unbiased", "E[s (drop(x) Aᵀ) Bᵀ] = s (x Aᵀ) Bᵀ", "Srivastava et al. 2014; Hoeffding 1963, theorem 2")
def _dropout_mean(case: Case) -> Measured:
    """The mean over M masks of a sum of independent terms, each 0 or cⱼ / (1 - p), is further than R from Σ cⱼ with a
    chance of at most 2 exp(-2 M R² (1-p)² / Σ cⱼ²). R makes that 1e-9 for all outputs together. As many elements as
    p says must be dropped, by the same inequality."""
    name, p, M = next(iter(case.subject.adapters)), 0.25, 512
    layer = case.layer(name).train()
    adapter, (X, *_, [(A, B, s)]) = layer.adapters[name], case.formula(layer)
    adapter.dropout.p = p
    x = np.repeat(case.x[:1, :1], M, axis=0)  # (M, 1, I): a mask for each sequence
    with dropout_counter(case.seed, 1):
        dropped = adapter.dropout(Tensor(np.ones_like(x))).data == 0
        y = adapter(Tensor(x), Tensor(np.zeros((M, 1, len(B)), case.dtype)), layer.base_layer).data
    c = s * (B @ A) * X[0]  # (O, I): what each element of x adds to each output
    log = math.log(2 * (len(c) + 1) / CHANCE)
    radius = np.sqrt((c * c).sum(axis=1) * log / (2 * M)) / (1 - p)
    rounding = case.gamma(case.roundings(layer, 1), abs(s) * (abs(B) @ abs(A)) @ abs(X[0]) / (1 - p))
    mean = y[:, 0].astype(c.dtype).mean(axis=0)
    share = dropped.mean() - p, math.sqrt(log / (2 * dropped.size))
    return worst((mean - c.sum(axis=1), radius + rounding), share)
