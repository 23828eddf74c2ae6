"""What is done with trained updates: PiSSA undone, products of adapted layers, sums of adapters.

Letters are case.py's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ..autograd import Tensor
from ..backend import Array
from ..containers import Sequential
from ..lora import LoraConfig, PeftModel, get_peft_model
from ..lora.factors import truncate_rank
from ..nn import Linear
from ..optim import AdamW
from .case import unit_roundoff
from .measuring import (
    Measured,
    Property,
    count_differences,
    expect_zero,
    svd_error,
    worst,
)
from .studies import (
    NAME,
    Pairs,
    Study,
    adapted_layers,
    factors_of,
    gamma_float64,
    make_registrars,
    set_factors,
    train,
    trained,
    weight_of,
)

PROPERTIES: list[Property] = []
holds, _ = make_registrars(PROPERTIES)
STEPS = 4


# ---- PiSSA, and back to the base -----------------------------------------------------------------


class Principal:
    """A model whose adapters started by PiSSA, trained for a few steps.

    starts   A₀ (r, I) and B₀ (O, r) in float64 by layer; the base has W_res = fl(W - s B₀ A₀)
    """

    def __init__(self, study: Study):
        self.study = study
        self.model = study.model(init_lora_weights="pissa")
        self.starts: dict[str, tuple[Array, Array]] = {}
        for path, adapter in self.model.adapters_by_path(NAME).items():
            assert adapter.initial is not None
            A0, B0 = adapter.initial
            self.starts[path] = A0.astype(np.float64), B0.astype(np.float64)
        train(self.model, AdamW(trained(self.model), lr=2.0**-6), study.batches(STEPS))

    def back(self, r: int, s: float) -> PeftModel:
        """An adapter of this rank and scaling over the base as it was, its factors to be set."""
        alpha = s * (math.sqrt(r) if self.study.use_rslora else r)
        return self.study.model(r=r, lora_alpha=alpha)


PISSA = "Meng et al. 2024, appendix on PiSSA as LoRA"


@holds("PiSSA and back", "W_res + s B' A' = W + s [B', -B₀] [A'; A₀], rank 2 r", PISSA)
def measure_pissa_and_back(study: Study) -> Measured:
    """W_res was rounded once; the rest is float64's. α keeps s, by r or by its root."""
    principal = Principal(study)
    layers = adapted_layers(principal.model)
    s = next(iter(layers.values())).adapters[NAME].scaling
    back = adapted_layers(principal.back(2 * study.r, s))
    pairs: Pairs = []
    for path, layer in layers.items():
        A0, B0 = principal.starts[path]
        A, B, _ = factors_of(layer)
        set_factors(back[path], np.concatenate([A, A0]), np.concatenate([B, -B0], axis=1))
        W_res = weight_of(layer)
        one = W_res + layer.delta_weight(NAME)
        other = weight_of(back[path]) + back[path].delta_weight(NAME)
        S = abs(W_res) + abs(weight_of(back[path])) + s * (abs(B) @ abs(A) + abs(B0) @ abs(A0))
        rounded = unit_roundoff(study.dtype) * abs(W_res)
        pairs.append((other - one, rounded + gamma_float64(2 * study.r + 6, S)))
    return worst(*pairs)


@holds("PiSSA and back, rank r", "min |W_res + s B' A' - W - P Q|² = Σ σᵢ², i > r", PISSA)
def measure_pissa_at_rank(study: Study) -> Measured:
    """The least error at rank r is Eckart & Young's; σ of the whole change, by LAPACK.

    Both factors are rounded to the layer's precision, W_res was, and three decompositions err.
    """
    principal = Principal(study)
    back = adapted_layers(principal.back(study.r, 1.0))
    u = unit_roundoff(study.dtype)
    pairs: Pairs = []
    for path, layer in adapted_layers(principal.model).items():
        A0, B0 = principal.starts[path]
        A, B, s = factors_of(layer)
        low_A, low_B, _ = truncate_rank(
            np.concatenate([A, A0]), np.concatenate([B, -B0], axis=1), s, study.r
        )
        set_factors(back[path], low_A, low_B)
        W_res = weight_of(layer)
        change = W_res + layer.delta_weight(NAME) - weight_of(back[path])
        missed = np.linalg.norm(change - back[path].delta_weight(NAME))
        sigma = np.linalg.svd(change, compute_uv=False)
        least = np.linalg.norm(sigma[study.r :])
        rounded = u * abs(W_res) + 2.5 * u * (abs(low_B) @ abs(low_A))
        bound = np.linalg.norm(rounded) + svd_error(change.shape, sigma[0], 3)
        pairs.append((missed - least, bound))
    return worst(*pairs)


# ---- the expressive power of adapters in a product of layers -------------------------------------

LAYERS, WIDTH, RANK = 3, 8, 2


def chain(weights: Sequence[Array]) -> Array:
    """W_L ... W_1 of the weights W_1, ..., W_L."""
    product = np.eye(WIDTH)
    for W in weights:
        product = W @ product
    return product


def adapt_chain(
    weights: Sequence[Array], target: Array, u: float
) -> tuple[list[tuple[Array, Array]], float]:
    """The factors (A, B) of each layer, and the norm of what rounding may add to their product.

    With E = target - W_L ... W_1, and E_l the l-th R triplets of its SVD, they make dW_l = B A =
    (W_L ... W_(l+1))⁻¹ E_l (W'_(l-1) ... W'_1)⁻¹. So W'_L ... W'_1 - W_L ... W_1 is the sum of the
    E_l, because the differences of the partial products telescope.

    u   the unit roundoff of the factors' dtype; solutions err by n eps times a condition (Higham
        2002, section 7.1)
    """
    U, sigma, Vt = np.linalg.svd(target - chain(weights))
    eps = np.finfo(np.float64).eps
    changed: list[Array] = []
    factors = []
    error = 0.0
    for l, W in enumerate(weights):
        at = slice(RANK * l, RANK * (l + 1))
        above = chain(weights[l + 1 :])
        below = chain(changed)
        B = np.linalg.solve(above, U[:, at] * sigma[at])  # (n, R)
        A = np.linalg.solve(below.T, Vt[at].T).T  # (R, n)
        factors.append((A, B))
        changed.append(W + B @ A)
        norms = [float(np.linalg.norm(M, 2)) for M in (above, abs(B) @ abs(A), below)]
        condition = float(np.linalg.cond(above) + np.linalg.cond(below))
        error += math.prod(norms) * (2.5 * u + WIDTH * eps * condition)
    return factors, error


@holds(
    "expressive power",
    "min |T - Π (W_l + s B_l A_l)|₂ = σ_(RL+1)(T - Π W_l),  L layers of rank R",
    "Zeng & Lee 2024, linear models",
)
def measure_expressive_power(study: Study) -> Measured:
    """The product is what the engine computes of the identity, with the adapters put in.

    Attained: all that is left are the triplets after the first R L, but for `adapt_chain`'s error,
    the SVD's, and n + R + 4 roundings in each layer, in norms. No other factors come nearer: the
    adapted product minus the frozen one has rank R L at most (Eckart & Young).
    """
    rng = study.rng
    dtype = study.dtype
    near_one = [np.eye(WIDTH) + rng.uniform(-0.125, 0.125, (WIDTH, WIDTH)) for _ in range(LAYERS)]
    weights = [W.astype(dtype).astype(np.float64) for W in near_one]
    target = chain(weights) + rng.uniform(-0.125, 0.125, (WIDTH, WIDTH))
    U, sigma, Vt = np.linalg.svd(target - chain(weights))
    left = slice(RANK * LAYERS, None)
    nearest = target - (U[:, left] * sigma[left]) @ Vt[left]
    least = sigma[RANK * LAYERS]
    u = unit_roundoff(dtype)
    factors, rounded = adapt_chain(weights, target, u)

    names = [str(i) for i in range(LAYERS)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
    network = Sequential(*(Linear(W.astype(dtype)) for W in weights))
    model = get_peft_model(network, config)
    layers = list(adapted_layers(model).values())
    n = LAYERS * (WIDTH + RANK + 4)
    pairs: Pairs = []
    for noise in (0.0, 0.5):
        size = np.eye(WIDTH)
        for layer, (A, B) in zip(layers, factors, strict=True):
            more = noise * rng.standard_normal(A.shape)
            set_factors(layer, A + more, B)
            A, B, _ = factors_of(layer)
            size = (abs(weight_of(layer)) + abs(B) @ abs(A)) @ size
        product = model(Tensor(np.eye(WIDTH, dtype=dtype))).data.T.astype(np.float64)
        bound = rounded + n * u * np.linalg.norm(size, 2) + svd_error(size.shape, sigma[0], 3)
        pairs.append((min(np.linalg.norm(target - product, 2) - least, 0.0), bound))
        if not noise:
            pairs.append((np.linalg.norm(product - nearest, 2), bound))
    return worst(*pairs)


# ---- sums ----------------------------------------------------------------------------------------


@holds("adapters commute", "W + dW₁ + dW₂ + dW₃: the same bits in any order", "one float64 sum")
def measure_commuting(study: Study) -> Measured:
    """Exact: merged at once in every order, and one by one in the last."""
    names = ["one", "two", "three"]
    model = get_peft_model(study.base(), study.config(init_lora_weights=False), names[0])
    for seed, name in enumerate(names[1:], 1):
        model.add_adapter(name, study.config(r=study.r - seed, init_lora_weights=False), seed)
    model.set_adapter(names)
    ways = [[list(order)] for order in itertools.permutations(names)]
    ways.append([[name] for name in reversed(names)])  # one by one
    results = []
    for portions in ways:
        for portion in portions:
            model.merge_adapter(portion)
        results.append([layer.base_layer.weight.data for layer in adapted_layers(model).values()])
        model.unmerge_adapter()
    first, *others = results
    wrong = 0
    for merged in others:
        for W, expected in zip(merged, first, strict=True):
            wrong += count_differences(W, expected)
    return expect_zero(wrong)
