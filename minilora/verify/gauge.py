"""The gauge: does a step know how dW is divided into B and A?

(P A, B P⁻¹) are other factors of the same dW. The Riemannian step is the same for all of them
(Zhang & Pilanci 2024, section 3); the steps of SGD and Adam are not. Letters are case.py's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..backend import Array
from ..lora import PeftModel
from ..lora.optimizers import create_riemannian_optimizer
from ..optim import SGD, AdamW, Optimizer
from .measuring import Measured, Property, worst
from .optimizers import LR, riemannian_change
from .studies import (
    NAME,
    LayerStep,
    MakeOptimizer,
    Study,
    adapted_layers,
    expect_same,
    make_registrars,
    on_grid,
    take_step,
    trained,
)

PROPERTIES: list[Property] = []
holds, fails = make_registrars(PROPERTIES)
SOURCE = "Zhang & Pilanci 2024, section 3"
Gauge = Callable[[Study, int], tuple[Array, Array]]


def shear(study: Study, r: int) -> tuple[Array, Array]:
    """P and P⁻¹: D (1 + τ eⱼᵀ) with small integers τ, τⱼ = 0, and powers of two in D."""
    rng = study.rng
    j = int(rng.integers(r))
    tau = rng.choice([-1.0, 1.0], r)
    tau[j] = 0
    D = np.diag(2.0 ** rng.integers(-1, 2, r))
    T = np.outer(tau, np.eye(r)[j])
    return D @ (np.eye(r) + T), (np.eye(r) - T) @ np.linalg.inv(D)


def rotate(study: Study, r: int) -> tuple[Array, Array]:
    """An orthogonal P with entries ±1/2 in its first four rows, and P⁻¹ = Pᵀ."""
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    P = np.eye(r)
    P[:4, :4] = np.kron(two, two) / 2
    return P, P.T


def step_in_gauge(study: Study, make: MakeOptimizer, gauge: Gauge | None) -> list[LayerStep]:
    """One step from (P A, B P⁻¹); s, A and B are short binary numbers, so W + s B A is the same."""
    model = study.model(init_lora_weights=False, use_rslora=False)
    for layer in adapted_layers(model).values():
        adapter = layer.adapters[NAME]
        A = on_grid(adapter.lora_A.data, 6)
        B = on_grid(adapter.lora_B.data, 6)
        if gauge is not None:
            P, inverse = gauge(study, len(A))
            A = (P @ A).astype(A.dtype)
            B = (B @ inverse).astype(B.dtype)
        adapter.lora_A.data = A
        adapter.lora_B.data = B
    return take_step(model, make(model), study.batches(1)[0])


def make_riemannian(reg: float) -> MakeOptimizer:
    def make(model: PeftModel) -> Optimizer:
        optimizer: Optimizer = create_riemannian_optimizer(model, SGD, lr=LR, reg=reg)
        return optimizer

    return make


def compare_gauges(study: Study, reg: float, gauge: Gauge) -> Measured:
    """Δ(s B A) of the Riemannian step in two gauges, beside the bounds of both.

    Those are gamma times the conditions of A Aᵀ and Bᵀ B.
    """
    pairs = []
    one = step_in_gauge(study, make_riemannian(reg), None)
    other = step_in_gauge(study, make_riemannian(reg), gauge)
    for steps in zip(one, other, strict=True):
        changes = []
        for step in steps:
            bounds = step.bound_A, step.bound_B
            change = riemannian_change(step.case, step.formula, step.G, bounds, step.adapter, reg)
            changes.append(change)
        (a, bound_a), (b, bound_b) = changes
        pairs.append((a - b, bound_a + bound_b))
    return worst(*pairs)


def change_of(step: LayerStep) -> Array:
    """Δ(s B A) of a step that was taken."""
    A, B, s = step.formula.factors[0]
    after_A = step.adapter.lora_A.data.astype(A.dtype)
    after_B = step.adapter.lora_B.data.astype(A.dtype)
    change: Array = s * (after_B @ after_A - B @ A)
    return change


def expect_same_steps(study: Study, make: MakeOptimizer, gauge: Gauge) -> Measured:
    one = step_in_gauge(study.in_float64(), make, None)
    other = step_in_gauge(study.in_float64(), make, gauge)
    changes = [(change_of(a), change_of(b)) for a, b in zip(one, other, strict=True)]
    measured = [expect_same(b, a) for a, b in changes]
    return min(measured, key=lambda m: m.badness)


@holds("gauge", "Riemannian step, δ = 0: Δ(B A) is the same for (P A, B P⁻¹)", SOURCE)
def measure_gauge(study: Study) -> Measured:
    return compare_gauges(study, 0.0, shear)


@holds("gauge, damped", "Riemannian step, δ > 0: the same if P is orthogonal", SOURCE)
def measure_damped_gauge(study: Study) -> Measured:
    return compare_gauges(study, 0.25, rotate)


@fails("gauge, damped, any P", "Riemannian step, δ > 0: the same for any P", SOURCE)
def measure_damped_gauge_of_any(study: Study) -> Measured:
    return expect_same_steps(study, make_riemannian(0.25), shear)


@fails("gauge, SGD", "SGD: Δ(B A) is the same for (P A, B P⁻¹)", SOURCE)
def measure_sgd_gauge(study: Study) -> Measured:
    return expect_same_steps(study, lambda model: SGD(trained(model), lr=LR), shear)


@fails("gauge, signs", "Adam: Δ(B A) is the same for (P A, B P⁻¹), P orthogonal", SOURCE)
def measure_adam_gauge(study: Study) -> Measured:
    return expect_same_steps(study, lambda model: AdamW(trained(model), lr=2.0**-5), rotate)
