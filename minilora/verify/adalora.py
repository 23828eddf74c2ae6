"""AdaLoRA's properties: triplets, the penalty, importance, budget and pruning. Letters and shapes are those of case.py.

Its forward and its merging are LoRA's, diag(E) A being A: they are measured by LoRA's entries. A case's adapters share
one budget, as those of a model's layers do.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, gradients
from ..backend import Array
from ..lora import AdaLoraAdapter, AdaLoraConfig, LoraLinear, RankAllocator, orthogonality
from .case import WIDE, Case
from .measuring import (
    Measured,
    Property,
    adalora,
    backward,
    counted,
    differing,
    listing,
    ranked,
    run,
    slopes,
    worst,
)

PROPERTIES: list[Property] = []
holds = listing(PROPERTIES, lambda case: adalora(case) and ranked(case))
PAPER = "Zhang et al. 2023"


def allocator(case: Case, layer: LoraLinear, **schedule: Any) -> RankAllocator:
    """Over the layer's adapters, with the case's configuration and another schedule."""
    config = next(iter(case.configs.values()))
    assert isinstance(config, AdaLoraConfig)
    return RankAllocator(_adapters(layer), dataclasses.replace(config, **schedule))


def _adapters(layer: LoraLinear) -> dict[str, AdaLoraAdapter]:
    return {name: a for name, a in layer.adapters.items() if isinstance(a, AdaLoraAdapter)}


def _noise(case: Case, rng: np.random.Generator, ranks: RankAllocator) -> list[Array]:
    """A number at random for each of the adapters' numbers."""
    return [rng.standard_normal(p.shape).astype(case.dtype) for p in ranks.params]


# ---- one layer ------------------------------------------------------------------------------------------------------


@holds(
    "AdaLoRA starts as the base",
    "E = 0  ⇒  y = x Wᵀ + b;  dA = 0, dB = 0, dE ≠ 0",
    f"{PAPER}, section 3.1",
)
def _start(case: Case) -> Measured:
    """Exact, on its own and by the weight of a step: all but dE is a product with 0."""
    layer, G, wrong = case.layer(), case.upstream(), 0
    for i, (name, config) in enumerate(case.configs.items()):
        config = dataclasses.replace(config, init_lora_weights=True)
        layer.adapters[name] = AdaLoraAdapter(layer.base_layer, "proj", config, case.rng, i)
    expected = run(layer.base_layer, case.x)
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        y, _, found = backward(layer.eval(), case.x, G)
        wrong += differing(y, expected)
        wrong += sum(
            np.count_nonzero(dA) + np.count_nonzero(dB) + (not dE.any()) for dA, dE, dB in found
        )
    return worst((wrong, 0))


@holds(
    "AdaLoRA's gradients",
    "dA = diag(E) P,  dE = Σ P A,  dB = s Gᵀ X (diag(E) A)ᵀ;  P = s Bᵀ Gᵀ X",
    f"{PAPER}, eq. (3), differentiated",
    adalora,
)
def _gradients(case: Case) -> Measured:
    """gamma_n S of each: `slopes`."""
    layer, G = case.layer(), case.upstream()
    exact, dY = case.formula(layer), F.rows(G).astype(WIDE[case.dtype])
    return worst(*slopes(case, layer, exact, dY, backward(layer, case.x, G)[2]))


@holds("AdaLoRA's count", "trainable numbers = r (I + O + 1)", f"{PAPER}, section 3.1", adalora)
def _count(case: Case) -> Measured:
    """Exact."""
    return counted(case, lambda r, inputs, outputs: r * (inputs + outputs + 1))


# ---- the penalty ----------------------------------------------------------------------------------------------------


@holds("AdaLoRA's penalty", "R(Q A, B Qᵀ) = R(A, B),  Q orthogonal", f"{PAPER}, eq. (4)")
def _penalty(case: Case) -> Measured:
    """Q = I - 2 v vᵀ / vᵀv, a reflection. R is the mean of |M Mᵀ - I|, M = A and Bᵀ (r, n). Q M is rounded to within
    D = u |Q M| (and r + 6 times in the reference's precision), which moves M Mᵀ by D |M|ᵀ + |M| Dᵀ + D Dᵀ. Both sides
    take n + 1 roundings to |M| |M|ᵀ + I, r² + 2 to its norm, and one for each norm to the mean."""
    layer, rng, wide, u = (
        case.layer(),
        case.rng,
        WIDE[case.dtype],
        float(np.finfo(case.dtype).eps) / 2,
    )
    sides: list[list[Array]] = [[], []]
    error = []
    for adapter in _adapters(layer).values():
        v = rng.standard_normal(adapter.r).astype(wide)
        one, turn = np.eye(len(v), dtype=wide), 2 * np.outer(v, v) / (v @ v)
        for M in (adapter.lora_A.data, adapter.lora_B.data.T):
            turned = ((one - turn) @ M).astype(case.dtype)
            D = u * abs(turned) + case.gamma(len(v) + 6, (one + abs(turn)) @ abs(M), wide)
            moved = D @ abs(turned).T
            error.append(np.linalg.norm(moved + moved.T + D @ D.T))
            for side, form in zip(sides, (M, turned), strict=True):
                side.append(form)
                error[-1] += _of_norm(case, form.astype(wide))
    values = [_of(side) for side in sides]
    bound = sum(error) / len(error) + case.gamma(len(error) + 1, sum(map(abs, values)))
    return worst((values[1] - values[0], bound))


def _of_norm(case: Case, M: Array) -> float:
    """What |M Mᵀ - I| may err by.    M (r, n)"""
    one = np.eye(len(M), dtype=M.dtype)
    gap = np.linalg.norm(M @ M.T - one)
    formed = np.linalg.norm(case.gamma(M.shape[1] + 1, abs(M) @ abs(M).T + one))
    return float(formed + case.gamma(len(M) ** 2 + 2, gap + formed))


def _of(rows: list[Array]) -> float:
    """R of A and Bᵀ in turn, all (r, n)."""
    return orthogonality(
        [(Tensor(A), Tensor(Bt.T)) for A, Bt in zip(rows[::2], rows[1::2], strict=True)]
    ).item()


@holds(
    "AdaLoRA's penalty at rest",
    "A Aᵀ = Bᵀ B = I  ⇒  R = 0, dR = 0;  else R > 0",
    f"{PAPER}, eq. (4)",
)
def _at_rest(case: Case) -> Measured:
    """Exact, of as many rows and columns of the identity as there can be. And a zero A has a finite gradient, too."""
    wrong = 0
    for r, inputs, outputs in (
        (a.r, a.lora_A.shape[1], len(a.lora_B)) for a in _adapters(case.layer()).values()
    ):
        r = min(r, inputs, outputs)
        for size, rests in (
            (1.0, True),
            (1 + 2.0**-8, False),
            (0.0, True),
        ):  # at 0 all directions are alike
            A, B = np.eye(r, inputs, dtype=case.dtype), np.eye(outputs, r, dtype=case.dtype)
            leaves = [Tensor(A * case.dtype.type(size), True), Tensor(B, True)]
            R = orthogonality([(leaves[0], leaves[1])])
            wrong += (R.item() == 0) != (size == 1)
            for g in map(np.asarray, gradients(R, leaves)):
                wrong += np.count_nonzero(~np.isfinite(g)) + rests * np.count_nonzero(g)
    return worst((wrong, 0))


# ---- importance, budget, pruning ------------------------------------------------------------------------------------


@holds(
    "AdaLoRA's smoothing",
    "I = |w dL/dw| stays  ⇒  I' = (1 - β₁ᵗ) I,  U' = (1 - β₂) Σ β₂ᵗ⁻ᵏ β₁ᵏ I",
    f"{PAPER}, section 3.2",
)
def _smoothing(case: Case) -> Measured:
    """Each step of an average rounds a term at most four times (β, 1 - β, product, sum): gamma_(4t+2) I. U' is an
    average of |I - I'|, which err by as much of I, and rounds by another gamma_(4t+2) of itself."""
    layer, rng, t, wide = case.layer(), case.rng, 12, WIDE[case.dtype]
    b1, b2 = (float(rng.uniform(0.1, 0.95)) for _ in range(2))
    ranks = allocator(case, layer, beta1=b1, beta2=b2, total_step=2 * t, tinit=2 * t - 1, tfinal=0)
    grads = _noise(case, rng, ranks)
    now = np.concatenate(
        [abs(p.data.astype(wide) * g).ravel() for p, g in zip(ranks.params, grads, strict=True)]
    )
    for _ in range(t):
        ranks.step(grads)
    b1, b2 = wide.type(b1), wide.type(b2)
    strayed = (1 - b2) * sum(b2 ** (t - k) * b1**k for k in range(1, t + 1)) * now
    bound = case.gamma(4 * t + 2, now)
    return worst(
        (ranks.sensitivity - (1 - b1**t) * now, bound),
        (ranks.uncertainty - strayed, bound + case.gamma(4 * t + 2, strayed + bound)),
    )


@holds(
    "AdaLoRA's order", "triplets in another order  ⇒  the same S and dW", f"{PAPER}, section 3.2"
)
def _order(case: Case) -> Measured:
    """S = s(E) + mean s(A) + mean s(B) of the same numbers: max(I, O) + 3 roundings of each, all of one sign. dW: those
    of s are the same, E A is one and B (.) are r. Twice, for both may err."""
    layers, rng, pairs = (case.layer(), case.layer()), case.rng, []
    one, other = (allocator(case, layer, total_step=9, tinit=7, tfinal=0) for layer in layers)
    orders = [rng.permutation(a.r) for a in one.adapters.values()]

    def permuted(arrays: list[Array]) -> list[Array]:
        return [a.take(orders[i // 3], axis=(0, 0, 1)[i % 3]) for i, a in enumerate(arrays)]

    for p, a in zip(other.params, permuted([p.data for p in one.params]), strict=True):
        p.data = a
    for _ in range(3):
        grads = _noise(case, rng, one)
        one.step(grads)
        other.step(permuted(grads))
    ends = np.cumsum([len(order) for order in orders])[:-1]
    S = np.concatenate(
        [s[order] for s, order in zip(np.split(one.importance(), ends), orders, strict=True)]
    )
    base = case.subject.base_layer
    pairs.append(
        (other.importance() - S, 2 * case.gamma(max(base.in_features, base.out_features) + 3, S))
    )
    W = np.zeros((base.out_features, base.in_features), case.dtype)
    for a, b in zip(one.adapters.values(), other.adapters.values(), strict=True):
        pairs.append((b.delta_weight(W) - a.delta_weight(W), _of_delta(case, a)))
    return worst(*pairs)


def _of_delta(case: Case, adapter: AdaLoraAdapter) -> Array:
    """2 gamma_(r+2) s |B| |E| |A|: what two sums of the same triplets may differ by.    (O, I)"""
    A, E, B = (
        abs(p.data.astype(WIDE[case.dtype]))
        for p in (adapter.lora_A, adapter.lora_E, adapter.lora_B)
    )
    return 2 * case.gamma(adapter.r + 2, adapter.scaling * (B @ (E * A)))


@holds(
    "AdaLoRA's budget",
    "#{E ≠ 0} = b(t), those of the largest S;  b falls from Σ r to target_r",
    f"{PAPER}, section 3.3 and algorithm 1",
)
def _budget(case: Case) -> Measured:
    """Exact, for a schedule at random: b(t) is all up to tinit, never rises, is target_r a layer from T - tfinal on.
    As many are left, after each allocation and at every step from the last on, however weights move in between."""
    layer, rng, wrong = case.layer(), case.rng, 0
    total = int(rng.integers(2, 13))
    tfinal = int(rng.integers(0, total))
    tinit, deltaT = int(rng.integers(0, total - tfinal)), int(rng.integers(1, 5))
    most = max(a.r for a in _adapters(layer).values())
    target = int(rng.integers(1, most + 1))
    ranks = allocator(
        case, layer, total_step=total, tinit=tinit, tfinal=tfinal, deltaT=deltaT, target_r=target
    )
    b0, end = sum(a.r for a in ranks.adapters.values()), total - tfinal
    b = [ranks.budget(t) for t in range(total + 1)]
    wrong += (b[: tinit + 1] != [b0] * (tinit + 1)) + (b != sorted(b, reverse=True))
    wrong += b[end:] != [min(b0, target * len(ranks.adapters))] * (tfinal + 1)
    for t in range(1, total + 1):
        for p, change in zip(
            ranks.params, _noise(case, rng, ranks), strict=True
        ):  # what was cut grows again
            p.data = p.data + change
        ranks.step(_noise(case, rng, ranks))
        if t >= end or (t > tinit and t % deltaT == 0):
            E = np.concatenate([a.lora_E.data.ravel() for a in ranks.adapters.values()])
            S = ranks.importance()
            wrong += (np.count_nonzero(E) != b[t]) + (
                S[E != 0].min(initial=math.inf) < S[E == 0].max(initial=0)
            )
    return worst((wrong, 0))


@holds("AdaLoRA's pruning", "triplets with E = 0 cut out  ⇒  dW stays", f"{PAPER}, section 3.3")
def _pruning(case: Case) -> Measured:
    """dW is added up anew, without the zeros: `_of_delta`."""
    layer, rng, pairs = case.layer(), case.rng, []
    base = case.subject.base_layer
    W = np.zeros((base.out_features, base.in_features), case.dtype)
    for adapter in _adapters(layer).values():
        kept = rng.random(adapter.r) < 0.6
        adapter.lora_E.data = adapter.lora_E.data * kept[:, None].astype(case.dtype)
        before, bound = adapter.delta_weight(W), _of_delta(case, adapter)
        adapter.keep(kept)
        pairs += [(adapter.delta_weight(W) - before, bound), (adapter.r - math.fsum(kept), 0)]
    return worst(*pairs)
