"""Properties of LoRA-FA and the Riemannian step: how they change dW. The notation is case.py's.

Both are measured over SGD, whose step is -η times the preconditioned gradient. The damping δ is a
sixteenth of the largest eigenvalue to which it is added, so the condition number is at most 17, and
the bounds stay near the rounding errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array
from ..lora import LoraLinear
from ..lora.optimizers import LoraFA, Pair, Riemannian
from ..optim import SGD
from .case import Case, Formula, active_adapters
from .measuring import (
    Measured,
    Property,
    backward,
    compare,
    count_differences,
    expect_zero,
    gradient_errors,
    make_registrar,
    set_tensors,
)
from .sums import is_plain

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, is_plain)
SHARE = 1 / 16  # damping over the largest eigenvalue
LR = 0.5  # η


def layer_gradient(case: Case, layer: LoraLinear, dY: Array) -> Array:
    """dL/dW = dYᵀ X (O, I), in the reference's dtype."""
    return case.wide_rows(dY).T @ case.formula(layer).X


def damping_of(*factors: Array) -> float:
    """δ: SHARE times the largest eigenvalue of F Fᵀ among the factors F (r, n)."""
    return SHARE * max(float(np.linalg.norm(F.astype(np.float64), 2)) ** 2 for F in factors)


def inverse_with_error(case: Case, F: Array, damping: float) -> tuple[Array, Array]:
    """K = (F Fᵀ + damping)⁻¹ (r, r) in the reference's dtype, and a bound of the optimiser's error.

    The optimiser rounds each entry once to the layer's dtype: u |K|. Before that, F Fᵀ errs by
    n + 2 roundings of |F| |F|ᵀ, whose norm is at most r |F|²; the computed eigenvalues and
    eigenvectors are those of a matrix 8 r eps |M| away from M = F Fᵀ + damping (Golub & Van Loan
    2013, section 8.3); and an error E of M changes K by |K|² |E|.
    """
    r, n = F.shape
    M = F @ F.T + case.wide.type(damping) * np.eye(r, dtype=case.wide)
    K = np.linalg.inv(M.astype(np.float64)).astype(case.wide)
    for _ in range(3):  # Newton's iteration, which doubles the digits
        K = K @ (2 * np.eye(r, dtype=case.wide) - M @ K)
    largest, inverse = (float(np.linalg.norm(a.astype(np.float64), 2)) for a in (M, K))
    eps = np.finfo(np.float64).eps
    moved = eps * r * (n + 10) * largest * inverse**2
    return K, case.u * abs(K) + moved


def factor_step(
    case: Case, g: Array, bound_g: Array, K: Array, bound_K: Array
) -> tuple[Array, Array]:
    """g K (n, r), and a bound of its error: those of g and K, and r + 3 roundings of the product.

    Three of these are those of s⁻², by which the inverse is multiplied.
    """
    size = (abs(g) + bound_g) @ (abs(K) + bound_K)
    bound = bound_g @ (abs(K) + bound_K) + abs(g) @ bound_K
    return g @ K, bound + case.gamma(len(K) + 3, size)


@holds(
    "LoRA-FA's step",
    "SGD: Δ(s B A) = -η G Aᵀ (A Aᵀ + δ)⁻¹ A,  from B = 0",
    "Zhang et al. 2023 (LoRA-FA), section 3; peft 0.21, optimizers/lorafa",
)
def measure_lorafa_step(case: Case) -> Measured:
    """B starts at 0 and η is a power of two, so the new B is the step without another rounding; dW
    is formed from it in the reference's precision."""
    layer = case.layer(case.first)
    [adapter] = active_adapters(layer)
    set_tensors(layer, [(adapter.lora_A.data, 0 * adapter.lora_B.data)])
    exact = case.formula(layer)
    A, _, s = exact.factors[0]
    damping = damping_of(A)
    dY = case.draw_dY()
    G = case.wide_rows(dY)
    _, _, [slopes] = backward(case, layer, dY)
    _, (_, bound_g) = gradient_errors(case, layer, exact, G, [slopes])
    take_lorafa_step(adapter, slopes[1], damping)
    K, bound_K = inverse_with_error(case, A, damping)
    step, bound = factor_step(case, exact.dB(G), bound_g, K, bound_K)
    after = adapter.lora_B.data.astype(case.wide)
    error = s * (after @ A) + LR / s * (step @ A)
    return compare(error, LR / s * (bound @ abs(A)) * (1 + 2.0**-20))


def take_lorafa_step(adapter: Any, g_B: Array, damping: float) -> None:
    """Change B by one step of SGD over LoRA-FA's gradient."""
    optimizer = SGD([adapter.lora_B], lr=LR)
    pair = Pair(adapter.lora_A, adapter.lora_B, adapter.scaling)
    optimizer.precondition = LoraFA(optimizer, [pair], damping)
    optimizer.step([g_B])


@holds(
    "LoRA-FA knows no s",
    "SGD: Δ(s B A) is the same for s and s / 4, bit for bit",
    "Zhang et al. 2023 (LoRA-FA), section 3: g_B falls by 4, s⁻² grows by 16",
)
def measure_lorafa_scale(case: Case) -> Measured:
    """Exact: a product with a power of two is not rounded."""
    steps = []
    for factor in (1, 0.25):
        layer = case.layer(case.first)
        [adapter] = active_adapters(layer)
        adapter.scaling *= factor
        set_tensors(layer, [(adapter.lora_A.data, 0 * adapter.lora_B.data)])
        _, _, [slopes] = backward(case, layer, case.draw_dY())
        take_lorafa_step(adapter, slopes[1], damping_of(adapter.lora_A.data))
        steps.append(factor * adapter.lora_B.data)
    return expect_zero(count_differences(*steps))


@holds(
    "Riemannian step",
    "SGD: Δ(s B A) = -η s² (B K_B Bᵀ G + G Aᵀ K_A A) + η² s³ G Aᵀ K_A K_B Bᵀ G",
    "Zhang & Pilanci 2024, section 3, multiplied out; K_A = (A Aᵀ + δ)⁻¹, K_B = (Bᵀ B + δ)⁻¹",
)
def measure_riemannian_step(case: Case) -> Measured:
    """The bound is that of `riemannian_change`."""
    layer = case.layer(case.first)
    [adapter] = active_adapters(layer)
    exact = case.formula(layer)
    A, B, s = exact.factors[0]
    damping = damping_of(A, B.T)
    dY = case.draw_dY()
    G = case.wide_rows(dY)
    _, _, [slopes] = backward(case, layer, dY)
    (_, bound_A), (_, bound_B) = gradient_errors(case, layer, exact, G, [slopes])
    take_riemannian_step(adapter, slopes, damping)
    change, bound = riemannian_change(case, exact, G, (bound_A, bound_B), adapter, damping)

    K_A, _ = inverse_with_error(case, A, damping)
    K_B, _ = inverse_with_error(case, B.T, damping)
    W_grad = layer_gradient(case, layer, dY)  # (O, I)
    first = B @ K_B @ (B.T @ W_grad) + (W_grad @ A.T) @ K_A @ A
    second = (W_grad @ A.T) @ K_A @ K_B @ (B.T @ W_grad)
    return compare(change + LR * s**2 * first - LR**2 * s**3 * second, bound)


def riemannian_change(
    case: Case,
    exact: Formula,
    G: Array,
    gradient_bounds: tuple[Array, Array],
    adapter: Any,
    damping: float,
) -> tuple[Array, Array]:
    """s (B' A' - B A) of a step with rate LR, and how far it may be from the exact step's.

    exact   of the weights before the step; `adapter` has those after it. A and B are rounded once
            more where the steps are taken from them.
    """
    A, B, s = exact.factors[0]
    bound_A, bound_B = gradient_bounds
    K_A, bound_K_A = inverse_with_error(case, A, damping)
    K_B, bound_K_B = inverse_with_error(case, B.T, damping)
    step_A, bound_A = factor_step(case, exact.dA(G).T, bound_A.T, K_B, bound_K_B)
    step_B, bound_B = factor_step(case, exact.dB(G), bound_B, K_A, bound_K_A)
    after_A = adapter.lora_A.data.astype(case.wide)
    after_B = adapter.lora_B.data.astype(case.wide)
    E_A = case.u * abs(after_A) + LR * (bound_A.T + case.u * abs(step_A.T))
    E_B = case.u * abs(after_B) + LR * (bound_B + case.u * abs(step_B))
    size = abs(after_B) @ abs(after_A) + abs(B) @ abs(A)
    bound = E_B @ (abs(after_A) + E_A) + abs(after_B) @ E_A
    n = len(A) + len(G) + len(B) + A.shape[1]
    bound = bound + case.gamma(n, size, case.wide)
    return s * (after_B @ after_A - B @ A), s * bound * (1 + 2.0**-20)


def take_riemannian_step(adapter: Any, slopes: Any, damping: float) -> None:
    """Change A and B by one step of SGD over the Riemannian gradients; slopes are dL/dA, dL/dB."""
    optimizer = SGD([adapter.lora_A, adapter.lora_B], lr=LR)
    pair = Pair(adapter.lora_A, adapter.lora_B, adapter.scaling)
    optimizer.precondition = Riemannian(optimizer, [pair], damping)
    optimizer.step(slopes)


@holds(
    "Riemannian gauge",
    "SGD, δ = 0: a step from (c A, B / c) ends at (c A', B' / c), c = 2ᵏ, bit for bit",
    "Zhang & Pilanci 2024, section 3: the step depends on dW alone",
)
def measure_riemannian_gauge(case: Case) -> Measured:
    """Exact: a product with a power of two is not rounded."""
    ends = []
    for c in (1.0, 4.0):
        layer = case.layer(case.first)
        [adapter] = active_adapters(layer)
        set_tensors(layer, [(c * adapter.lora_A.data, adapter.lora_B.data / c)])
        _, _, [slopes] = backward(case, layer, case.draw_dY())
        take_riemannian_step(adapter, slopes, 0.0)
        ends.append((adapter.lora_A.data / c, c * adapter.lora_B.data))
    (A, B), (other_A, other_B) = ends
    return expect_zero(count_differences(A, other_A) + count_differences(B, other_B))
