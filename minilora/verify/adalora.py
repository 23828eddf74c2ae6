"""AdaLoRA's properties: triplets, the penalty, importance, budget and pruning.

Letters are case.py's. Its forward and its merging are LoRA's, with diag(E) A for A: LoRA's
properties measure them. A case's adapters share one budget, as those of a model's layers do.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from ..autograd import Tensor, gradients
from ..backend import Array
from ..lora import AdaLoraAdapter, AdaLoraConfig, LoraLinear, RankAllocator, orthogonality
from .case import Case
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
    has_rank,
    is_adalora,
    make_registrar,
    worst,
)

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, lambda case: is_adalora(case) and has_rank(case))
PAPER = "Zhang et al. 2023"


def make_allocator(case: Case, layer: LoraLinear, **schedule: Any) -> RankAllocator:
    """An allocator over the layer's adapters; `schedule` replaces fields of their configuration."""
    config = case.configs[case.first]
    assert isinstance(config, AdaLoraConfig)
    adapters = {name: a for name, a in layer.adapters.items() if isinstance(a, AdaLoraAdapter)}
    return RankAllocator(adapters, dataclasses.replace(config, **schedule))


def draw_gradients(case: Case, rng: np.random.Generator, allocator: RankAllocator) -> list[Array]:
    """A random gradient for each tensor of the adapters."""
    return [rng.standard_normal(p.shape).astype(case.dtype) for p in allocator.params]


# ---- one layer -----------------------------------------------------------------------------------


@holds(
    "AdaLoRA starts as the base",
    "E = 0  ⇒  y = x Wᵀ + b;  dA = 0, dB = 0, dE ≠ 0",
    f"{PAPER}, section 3.1",
)
def measure_start(case: Case) -> Measured:
    """Exact, with and without the prepared weight: all but dE is a product with 0."""
    layer = case.layer()
    dY = case.draw_dY()
    for i, (name, config) in enumerate(case.configs.items()):
        config = dataclasses.replace(config, init_lora_weights=True)
        layer.adapters[name] = AdaLoraAdapter(layer.base_layer, "proj", config, case.rng, i)
    expected = case.run(layer.base_layer)
    wrong = 0
    for prepare in (layer.end_step, layer.prepare_step):
        prepare()
        y, _, slopes = backward(case, layer.eval(), dY)
        wrong += count_differences(y, expected)
        for dA, dE, dB in slopes:
            wrong += count_nonzeros(dA) + count_nonzeros(dB) + (not dE.any())
    return expect_zero(wrong)


@holds(
    "AdaLoRA's gradients",
    "dA = diag(E) P,  dE = Σ P A,  dB = s Gᵀ X (diag(E) A)ᵀ;  P = s Bᵀ Gᵀ X",
    f"{PAPER}, eq. (3), differentiated",
    is_adalora,
)
def measure_gradients(case: Case) -> Measured:
    """gamma_n S of each: `gradient_errors`."""
    layer = case.layer()
    dY = case.draw_dY()
    _, _, slopes = backward(case, layer, dY)
    exact = case.formula(layer)
    return worst(*gradient_errors(case, layer, exact, case.wide_rows(dY), slopes))


@holds("AdaLoRA's count", "trainable numbers = r (I + O + 1)", f"{PAPER}, section 3.1", is_adalora)
def measure_count(case: Case) -> Measured:
    """Exact."""
    return count_parameters(case, lambda r, inputs, outputs: r * (inputs + outputs + 1))


# ---- the penalty ---------------------------------------------------------------------------------


@holds("AdaLoRA's penalty", "R(Q A, B Qᵀ) = R(A, B),  Q orthogonal", f"{PAPER}, eq. (4)")
def measure_penalty(case: Case) -> Measured:
    """Q = I - 2 v vᵀ / vᵀv, a reflection. R is the mean of |M Mᵀ - I|, M = A and Bᵀ (r, n).

    Q M is rounded to within D = u |Q M| (and r + 6 times in the reference's precision), which moves
    M Mᵀ by D |M|ᵀ + |M| Dᵀ + D Dᵀ. Both sides take n + 1 roundings to |M| |M|ᵀ + I, r² + 2 to its
    norm, and one for each norm to the mean.
    """
    rng = case.rng
    plain = []
    reflected = []
    errors = []
    for adapter in case.adapters.values():
        r = adapter.r
        v = rng.standard_normal(r).astype(case.wide)
        one = np.eye(r, dtype=case.wide)
        twice = 2 * np.outer(v, v) / (v @ v)
        for M in (adapter.lora_A.data, adapter.lora_B.data.T):
            QM = ((one - twice) @ M).astype(case.dtype)
            S = (one + abs(twice)) @ abs(M)
            D = case.u * abs(QM) + case.gamma(r + 6, S, case.wide)
            DM = D @ abs(QM).T
            error = np.linalg.norm(DM + DM.T + D @ D.T)
            error += norm_error(case, M.astype(case.wide))
            error += norm_error(case, QM.astype(case.wide))
            errors.append(error)
            plain.append(M)
            reflected.append(QM)
    R = penalty(plain)
    R_Q = penalty(reflected)
    mean_error = case.gamma(len(errors) + 1, abs(R) + abs(R_Q))
    return compare(R_Q - R, sum(errors) / len(errors) + mean_error)


def norm_error(case: Case, M: Array) -> float:
    """What |M Mᵀ - I| may err by.    M (r, n)"""
    r, n = M.shape
    one = np.eye(r, dtype=M.dtype)
    norm = np.linalg.norm(M @ M.T - one)
    formed = np.linalg.norm(case.gamma(n + 1, abs(M) @ abs(M).T + one))
    return float(formed + case.gamma(r**2 + 2, norm + formed))


def penalty(matrices: list[Array]) -> float:
    """R of A and Bᵀ in turn, all (r, n)."""
    A = [Tensor(M) for M in matrices[::2]]
    B = [Tensor(M.T) for M in matrices[1::2]]
    return orthogonality(list(zip(A, B, strict=True))).item()


@holds(
    "AdaLoRA's penalty at rest",
    "A Aᵀ = Bᵀ B = I  ⇒  R = 0, dR = 0;  else R > 0",
    f"{PAPER}, eq. (4)",
)
def measure_minimum(case: Case) -> Measured:
    """Exact, for as many rows and columns of the identity as fit.

    A zero A has a finite gradient too: all directions are alike there.
    """
    wrong = 0
    for adapter in case.adapters.values():
        I = adapter.lora_A.shape[1]
        O = len(adapter.lora_B)
        r = min(adapter.r, I, O)
        one_A = np.eye(r, I, dtype=case.dtype)
        one_B = np.eye(O, r, dtype=case.dtype)
        for size, at_rest in ((1.0, True), (1 + 2.0**-8, False), (0.0, True)):
            A = Tensor(one_A * case.dtype.type(size), True)
            B = Tensor(one_B, True)
            R = orthogonality([(A, B)])
            wrong += (R.item() == 0) != (size == 1)
            for dR in map(np.asarray, gradients(R, [A, B])):
                wrong += count_nonzeros(~np.isfinite(dR))
                if at_rest:
                    wrong += count_nonzeros(dR)
    return expect_zero(wrong)


# ---- importance, budget, pruning -----------------------------------------------------------------


@holds(
    "AdaLoRA's smoothing",
    "I = |w dL/dw| stays  ⇒  I' = (1 - β₁ᵗ) I,  U' = (1 - β₂) Σ β₂ᵗ⁻ᵏ β₁ᵏ I",
    f"{PAPER}, section 3.2",
)
def measure_smoothing(case: Case) -> Measured:
    """Each step of an average rounds a term at most four times: gamma_(4t+2) I.

    They are β, 1 - β, product and sum. U' is an average of |I - I'|, which err by as much of I, and
    rounds by another gamma_(4t+2) of itself.
    """
    rng = case.rng
    t = 12
    beta1 = float(rng.uniform(0.1, 0.95))
    beta2 = float(rng.uniform(0.1, 0.95))
    allocator = make_allocator(
        case, case.layer(), beta1=beta1, beta2=beta2, total_step=2 * t, tinit=2 * t - 1, tfinal=0
    )
    slopes = draw_gradients(case, rng, allocator)
    importances = []
    for p, slope in zip(allocator.params, slopes, strict=True):
        product = p.data.astype(case.wide) * slope
        importances.append(abs(product).ravel())
    I = np.concatenate(importances)
    for _ in range(t):
        allocator.step(slopes)
    b1 = case.wide.type(beta1)
    b2 = case.wide.type(beta2)
    weight = sum(b2 ** (t - k) * b1**k for k in range(1, t + 1))
    smoothed = (1 - b1**t) * I
    uncertainty = (1 - b2) * weight * I
    n = 4 * t + 2
    bound = case.gamma(n, I)
    U_bound = bound + case.gamma(n, uncertainty + bound)
    return worst(
        (allocator.sensitivity - smoothed, bound), (allocator.uncertainty - uncertainty, U_bound)
    )


@holds(
    "AdaLoRA's order", "triplets in another order  ⇒  the same S and dW", f"{PAPER}, section 3.2"
)
def measure_order(case: Case) -> Measured:
    """S = s(E) + mean s(A) + mean s(B) of the same numbers, all of one sign.

    Each takes max(I, O) + 3 roundings. dW: those of s are the same, E A is one and B (.) are r.
    Twice, for both may err.
    """
    rng = case.rng
    plain = make_allocator(case, case.layer(), total_step=9, tinit=7, tfinal=0)
    mixed = make_allocator(case, case.layer(), total_step=9, tinit=7, tfinal=0)
    orders = [rng.permutation(adapter.r) for adapter in plain.adapters.values()]

    def reorder(arrays: list[Array]) -> list[Array]:
        """The triplets of each A (r, I), E (r, 1) and B (O, r) in the new order."""
        return [a.take(orders[i // 3], axis=(0, 0, 1)[i % 3]) for i, a in enumerate(arrays)]

    values = reorder([p.data for p in plain.params])
    for p, value in zip(mixed.params, values, strict=True):
        p.data = value
    for _ in range(3):
        slopes = draw_gradients(case, rng, plain)
        plain.step(slopes)
        mixed.step(reorder(slopes))
    S_plain = plain.importance()
    S = []
    start = 0
    for order in orders:
        S.append(S_plain[start + order])
        start += len(order)
    expected = np.concatenate(S)
    O, I = case.base.weight.shape
    pairs = [(mixed.importance() - expected, 2 * case.gamma(max(I, O) + 3, expected))]
    W = np.zeros((O, I), case.dtype)
    for a, b in zip(plain.adapters.values(), mixed.adapters.values(), strict=True):
        pairs.append((b.delta_weight(W) - a.delta_weight(W), reordered_update_error(case, a)))
    return worst(*pairs)


def reordered_update_error(case: Case, adapter: AdaLoraAdapter) -> Array:
    """2 gamma_(r+2) s |B| |E| |A|: what two sums of the same triplets may differ by.    (O, I)"""
    A = abs(adapter.lora_A.data.astype(case.wide))
    E = abs(adapter.lora_E.data.astype(case.wide))
    B = abs(adapter.lora_B.data.astype(case.wide))
    return 2 * case.gamma(adapter.r + 2, adapter.scaling * (B @ (E * A)))


@holds(
    "AdaLoRA's budget",
    "#{E ≠ 0} = b(t), those of the largest S;  b falls from Σ r to target_r",
    f"{PAPER}, section 3.3 and algorithm 1",
)
def measure_budget(case: Case) -> Measured:
    """Exact, for a random schedule.

    b(t) is all up to tinit, never rises, and is target_r per layer from T - tfinal on. As many
    triplets are left after each allocation and at every step from the last on, however weights move
    in between.
    """
    rng = case.rng
    T = int(rng.integers(2, 13))
    tfinal = int(rng.integers(0, T))
    tinit = int(rng.integers(0, T - tfinal))
    deltaT = int(rng.integers(1, 5))
    largest = max(adapter.r for adapter in case.adapters.values())
    target = int(rng.integers(1, largest + 1))
    allocator = make_allocator(
        case,
        case.layer(),
        total_step=T,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=deltaT,
        target_r=target,
    )
    adapters = allocator.adapters.values()
    b = [allocator.budget(t) for t in range(T + 1)]
    b_start = sum(adapter.r for adapter in adapters)
    b_end = min(b_start, target * len(adapters))
    end = T - tfinal
    wrong = int(b != sorted(b, reverse=True))
    wrong += b[: tinit + 1] != [b_start] * (tinit + 1)
    wrong += b[end:] != [b_end] * (tfinal + 1)
    for t in range(1, T + 1):
        changes = draw_gradients(case, rng, allocator)
        for p, change in zip(allocator.params, changes, strict=True):
            p.data = p.data + change  # what was cut grows again
        allocator.step(draw_gradients(case, rng, allocator))
        if t >= end or (t > tinit and t % deltaT == 0):
            E = np.concatenate([adapter.lora_E.data.ravel() for adapter in adapters])
            S = allocator.importance()
            least = S[E != 0].min(initial=math.inf)
            wrong += count_nonzeros(E) != b[t]
            wrong += bool(least < S[E == 0].max(initial=0))
    return expect_zero(wrong)


@holds("AdaLoRA's pruning", "triplets with E = 0 cut out  ⇒  dW stays", f"{PAPER}, section 3.3")
def measure_pruning(case: Case) -> Measured:
    """dW is added up anew, without the zeros: `reordered_update_error`."""
    rng = case.rng
    layer = case.layer()
    W = np.zeros(case.base.weight.shape, case.dtype)
    pairs: list[tuple[Any, Any]] = []
    for adapter in layer.adapters.values():
        assert isinstance(adapter, AdaLoraAdapter)
        left = rng.random(adapter.r) < 0.6
        adapter.lora_E.data = adapter.lora_E.data * left[:, None].astype(case.dtype)
        before = adapter.delta_weight(W)
        bound = reordered_update_error(case, adapter)
        adapter.keep(left)
        pairs.append((adapter.delta_weight(W) - before, bound))
        pairs.append((adapter.r - count_nonzeros(left), 0))
    return worst(*pairs)
