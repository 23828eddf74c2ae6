"""What training steps do to dW: gradients, projected descent, first steps, the balance of A and B.

Letters are case.py's; η is the learning rate, G the gradient dL/dW (O, I) of a layer, as recorded
in a step of the whole model: G = (dL/dy)ᵀ X.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from ..backend import Array
from ..lora import LoraAdapter, PeftModel
from ..lora.optimizers import freeze_first_factors
from ..optim import SGD, AdamW, Optimizer
from .layers import CHANCE
from .measuring import Measured, Property, count_differences, expect_zero, worst
from .studies import (
    NAME,
    LayerStep,
    MakeOptimizer,
    Pairs,
    Recorder,
    Study,
    adapted_layers,
    loss_gradients,
    make_registrars,
    put_on_grid,
    recorded_steps,
    take_step,
    trained,
)

PROPERTIES: list[Property] = []
holds, fails = make_registrars(PROPERTIES)
ETA = 0.5
MOMENTUM = 0.5
STEPS = 4
DRAWS = 200  # of A, for a mean

# ---- the gradients of A and B, and that of W -----------------------------------------------------


@holds(
    "gradient of full training",
    "dA = s Bᵀ G,  dB = s G Aᵀ,  G = dL/dW of the merged model",
    "Hu et al. 2021, eq. (3), differentiated",
)
def measure_full_gradient(study: Study) -> Measured:
    """W + s B A has no rounding on a grid, so both models compute the same numbers from it.

    G is a sum of N products, and dA and dB have their bounds as if G were exact.
    """
    model = study.model(init_lora_weights=False, use_rslora=False)
    put_on_grid(model)
    merged = copy.deepcopy(model).merge_and_unload()
    modules = dict(merged.named_modules())
    weights = [modules[path].weight for path in adapted_layers(model)]
    for weight in weights:
        weight.requires_grad = True
    [batch] = study.batches(1)
    _, full = loss_gradients(merged, batch, weights)

    recorder = Recorder(model)
    params = trained(model)
    _, grads = loss_gradients(model, batch, params)
    by_parameter = {id(p): g for p, g in zip(params, grads, strict=True)}
    pairs: Pairs = []
    for step, G in zip(recorder.take(), full, strict=True):
        A, B, s = step.formula.factors[0]
        wide_G = G.astype(A.dtype)
        error = step.case.gamma(len(step.G), abs(step.G).T @ abs(step.formula.X))
        dA = by_parameter[id(step.adapter.lora_A)]
        dB = by_parameter[id(step.adapter.lora_B)]
        pairs.append((dA - s * (B.T @ wide_G), step.bound_A + s * (abs(B).T @ error)))
        pairs.append((dB - s * (wide_G @ A.T), step.bound_B + s * (error @ abs(A).T)))
    return worst(*pairs)


# ---- A is frozen: gradient descent in the rows of A ----------------------------------------------


class Projected:
    """V <- μ V + G,  D <- D - η s² V Aᵀ A  for one layer, in the reference's precision.

    V and D (O, I), both from 0; D = s B A if all is well, with B (O, r) <- B - η s V Aᵀ.
    error_B and error_u (O, r): how far the engine's B, and its momentum s V Aᵀ, may be from that.
    """

    def __init__(self, step: LayerStep):
        self.A, B, self.s = step.formula.factors[0]
        self.V = np.zeros_like(step.formula.W)
        self.D = np.zeros_like(step.formula.W)
        self.B = np.zeros_like(B)
        self.error_B = np.zeros_like(B)
        self.error_u = np.zeros_like(B)

    def add(self, step: LayerStep) -> None:
        """One step. The momentum is rounded twice, η times it twice, and B once."""
        gamma = step.case.gamma
        carried = MOMENTUM * self.s * (self.V @ self.A.T)  # (O, r)
        self.V = MOMENTUM * self.V + step.dW
        u = self.s * (self.V @ self.A.T)
        size = abs(carried) + self.error_u + abs(u - carried) + step.bound_B
        self.error_u = MOMENTUM * self.error_u + step.bound_B + gamma(2, size)
        self.D = self.D - ETA * self.s * (u @ self.A)
        self.B = self.B - ETA * u
        self.error_B = self.error_B + ETA * self.error_u + gamma(2, ETA * (abs(u) + self.error_u))
        self.error_B = self.error_B + step.case.u * (abs(self.B) + self.error_B)

    def compare(self, step: LayerStep) -> tuple[Array, Array]:
        """(s B A - D, its bound), with the adapter's B and A after the last step."""
        A = step.adapter.lora_A.data.astype(self.A.dtype)
        B = step.adapter.lora_B.data.astype(self.A.dtype)
        S = abs(B) @ abs(A) + abs(self.D) / self.s
        n = 4 * STEPS + len(A) + sum(S.shape) + len(step.G)
        bound = self.error_B @ abs(self.A) + step.case.gamma(n, S, A.dtype)
        return self.s * (B @ A) - self.D, self.s * bound


def descend(study: Study, model: PeftModel, optimizer: Optimizer, count: int = STEPS) -> Measured:
    """dW after `count` steps from B = 0, beside projected gradient descent with the same G."""
    expected: dict[str, Projected] = {}
    last: list[LayerStep] = []
    for layer_steps in recorded_steps(model, optimizer, study.batches(count)):
        for step in layer_steps:
            expected.setdefault(step.path, Projected(step)).add(step)
        last = layer_steps
    return worst(*(expected[step.path].compare(step) for step in last))


def frozen_model(study: Study) -> PeftModel:
    model = study.model()
    freeze_first_factors(model)
    return model


PROJECTED = "Zhang et al. 2023 (LoRA-FA); Hao et al. 2024 (Flora)"


@holds("A frozen, SGD", "W ← W - η s² V Aᵀ A,  V ← μ V + G", PROJECTED)
def measure_projected(study: Study) -> Measured:
    """The bounds of all steps, added up: the gradient's, and the roundings of u and of B."""
    model = frozen_model(study)
    return descend(study, model, SGD(trained(model), lr=ETA, momentum=MOMENTUM))


@fails("A frozen, Adam", "the same with Adam's steps", PROJECTED)
def measure_projected_adam(study: Study) -> Measured:
    model = frozen_model(study)
    return descend(study, model, AdamW(trained(model), lr=2.0**-5, weight_decay=0.0))


@fails("A frozen, decay", "the same with weight decay, which is B's and not W's", PROJECTED)
def measure_projected_decay(study: Study) -> Measured:
    model = frozen_model(study)
    optimizer = SGD(trained(model), lr=ETA, momentum=MOMENTUM, weight_decay=0.125)
    return descend(study, model, optimizer)


# ---- the first step ------------------------------------------------------------------------------


@holds("first step, SGD", "B = 0:  dW = -η s² G A₀ᵀ A₀, A stays", "Hu et al. 2021, section 4.1")
def measure_first_sgd(study: Study) -> Measured:
    """As with a frozen A, after one step; A itself has the same bits."""
    model = study.model()
    adapters = [layer.adapters[NAME] for layer in adapted_layers(model).values()]
    before = [adapter.lora_A.data for adapter in adapters]
    m = descend(study, model, SGD(trained(model), lr=ETA), 1)
    moved = 0
    for adapter, A in zip(adapters, before, strict=True):
        moved += count_differences(adapter.lora_A.data, A)
    return max(m, expect_zero(moved), key=lambda m: m.badness)


@holds("first step, Adam", "B = 0:  |B₁| ≤ η, entry by entry", "Kingma & Ba 2015, section 2.1")
def measure_first_adam(study: Study) -> Measured:
    """m' / √v' is g / |g|: with the casts of the rates, 12 roundings."""
    model = study.model()
    eta = 2.0**-5
    pairs: Pairs = []
    optimizer = AdamW(trained(model), lr=eta, eps=1e-12)
    for step in take_step(model, optimizer, study.batches(1)[0]):
        bound = eta + step.case.gamma(12, eta * np.ones(()))
        pairs.append((step.adapter.lora_B.data, bound))
    return worst(*pairs)


@holds(
    "what A sees of G", "mean over A of |G Qᵀ|² / |G|² = r / I", "E Qᵀ Q = (r / I) 1, by symmetry"
)
def measure_share(study: Study) -> Measured:
    """Q has A's rows, orthonormalised; A is normal, so Qᵀ Q is a random projector.

    The share of one row of G is Beta(r / 2, (I - r) / 2), whose variance is 2 r (I - r) / (I² (I +
    2)), and that of G a mean of such. By Bernstein's inequality the mean of n draws misses by more
    than t with a chance of at most 2 exp(-n t² / (2 v + 2 t / 3)), here CHANCE. One layer of each
    shape is measured.
    """
    model = study.model()
    pairs: Pairs = []
    config = study.config(init_lora_weights="gaussian")
    layer_steps = take_step(model, SGD(trained(model), lr=ETA), study.batches(1)[0])
    for step in {step.dW.shape: step for step in layer_steps}.values():
        G = step.dW.astype(np.float64)
        rng = study.rng
        shares = []
        for _ in range(DRAWS):
            drawn = LoraAdapter(step.layer.base_layer, step.path, config, rng)
            Q, _ = np.linalg.qr(drawn.lora_A.data.astype(np.float64).T)  # (I, r)
            shares.append((np.linalg.norm(G @ Q) / np.linalg.norm(G)) ** 2)
        r, I = drawn.lora_A.shape
        v = 2 * r * (I - r) / (I**2 * (I + 2))
        pairs.append((np.mean(shares) - r / I, bernstein(v, DRAWS)))
    return worst(*pairs)


def bernstein(v: float, n: int) -> float:
    """t with 2 exp(-n t² / (2 v + 2 t / 3)) = CHANCE: a root of n t² - (2/3) c t - 2 c v."""
    c = math.log(2 / CHANCE)
    return (c / 3 + math.sqrt(c * c / 9 + 2 * n * c * v)) / n


# ---- balance over a run --------------------------------------------------------------------------

BALANCE = "Du, Hu & Lee 2018, section 2"


class Balance:
    """A Aᵀ - Bᵀ B (r, r) of one layer before a run, and what its steps should add to it."""

    def __init__(self, step: LayerStep):
        self.expected: Any = difference(*step.formula.factors[0][:2])
        self.bound: Any = 0.0

    def add(self, step: LayerStep, eta: float) -> None:
        """η² (dA dAᵀ - dBᵀ dB). The bound is `balance`'s in lora.py, for factors before the step.

        A' = A - η dA is missed by E: u of the result, two roundings of η dA, η times dA's bound.
        """
        A, B, _ = step.formula.factors[0]
        case = step.case
        # B is transposed, so that all are (r, .) and M Mᵀ is A Aᵀ, then Bᵀ B.
        sides = [(1, A, step.dA, step.bound_A), (-1, B.T, step.dB.T, step.bound_B.T)]
        for sign, M, dM, bound_dM in sides:
            self.expected = self.expected + sign * eta**2 * (dM @ dM.T)
            size = abs(M) + eta * abs(dM)
            E = case.u * size + case.gamma(2, eta * abs(dM)) + eta * bound_dM
            E = E * (1 + 2 * case.u)
            n = M.shape[1] + len(step.G) + STEPS + 4
            self.bound = self.bound + E @ (size.T + E.T) + size @ E.T
            self.bound = self.bound + case.gamma(n, size @ size.T, case.wide)

    def compare(self, step: LayerStep) -> tuple[Array, Array]:
        wide = step.case.wide
        A = step.adapter.lora_A.data.astype(wide)
        B = step.adapter.lora_B.data.astype(wide)
        return difference(A, B) - self.expected, self.bound


def difference(A: Array, B: Array) -> Array:
    """A Aᵀ - Bᵀ B (r, r)"""
    M: Array = A @ A.T - B.T @ B
    return M


def follow_balance(study: Study, make: MakeOptimizer, eta: float) -> Measured:
    model = study.model(init_lora_weights=False)
    balances: dict[str, Balance] = {}
    last: list[LayerStep] = []
    for layer_steps in recorded_steps(model, make(model), study.batches(STEPS)):
        for step in layer_steps:
            balances.setdefault(step.path, Balance(step)).add(step, eta)
        last = layer_steps
    return worst(*(balances[step.path].compare(step) for step in last))


@holds("balance of a run", "SGD: Δ(A Aᵀ - Bᵀ B) = η² Σ (dA dAᵀ - dBᵀ dB)", BALANCE)
def measure_balance(study: Study) -> Measured:
    """The bounds of all steps, added up."""
    eta = 2.0**-6
    return follow_balance(study, lambda model: SGD(trained(model), lr=eta), eta)


@fails("balance, Adam", "Adam: A Aᵀ - Bᵀ B moves by η² Σ (dA dAᵀ - dBᵀ dB)", BALANCE)
def measure_adam_balance(study: Study) -> Measured:
    eta = 2.0**-6
    return follow_balance(study, lambda model: AdamW(trained(model), lr=eta, weight_decay=0.0), eta)
