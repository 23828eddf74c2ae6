"""What sums of adapters promise: the sum itself, or the cross terms. Letters are case.py's.

Measured through `PeftModel.add_weighted_adapter`, which rounds factors to the layer's precision.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from ..backend import Array
from ..lora import get_peft_model
from ..lora.factors import pad_rank
from .case import Case
from .layers import OneLayer
from .measuring import (
    Measured,
    Property,
    compare,
    is_dense,
    is_lora,
    make_registrar,
    set_tensors,
    worst,
)

PROPERTIES: list[Property] = []
# (A, B, c = w s) of each adapter, in a wider precision
Parts = list[tuple[Array, Array, float]]


def is_plain(case: Case) -> bool:
    """A sum does not read the base: one kind of base is enough."""
    return is_lora(case) and is_dense(case)


def has_several(case: Case) -> bool:
    return is_plain(case) and len(case.configs) > 1


holds = make_registrar(PROPERTIES, is_plain)


def add_adapters(
    case: Case, weights: dict[str, float], method: str, r: int | None = None
) -> tuple[Array, Array, Parts]:
    """(dW of the sum, its |B| |A|, its parts); `linear` pads all to one rank."""
    ranks = {name: case.adapters[name].r for name in weights}
    if method == "linear":
        ranks = dict.fromkeys(weights, max(ranks.values()))
    model: Any = None
    for name in weights:
        config = dataclasses.replace(case.configs[name], r=ranks[name])
        if model is None:
            model = get_peft_model(OneLayer(case.layer().base_layer), config, f"of {name}")
        else:
            model.add_adapter(f"of {name}", config)
    layer = model.model.proj
    parts: Parts = []
    for name, w in weights.items():
        adapter = case.adapters[name]
        A, B = pad_rank(adapter.lora_A.data, adapter.lora_B.data, ranks[name])
        layer.active = [f"of {name}"]
        layer.adapters[f"of {name}"].scaling = adapter.scaling
        set_tensors(layer, [(A, B)])
        parts.append((A.astype(case.wide), B.astype(case.wide), w * adapter.scaling))
    names = [f"of {name}" for name in weights]
    model.add_weighted_adapter(names, list(weights.values()), "sum", method, r)
    total = layer.adapters["sum"]
    A = abs(total.lora_A.data.astype(np.float64))
    B = abs(total.lora_B.data.astype(np.float64))
    return layer.delta_weight("sum"), B @ A, parts


def draw_weights(case: Case) -> dict[str, float]:
    rng = case.rng
    return {name: float(rng.choice([-1, 1]) * rng.uniform(0.25, 2)) for name in case.configs}


@holds(
    "weighted sum",
    "cat, svd of full rank, linear of one:  B A = Σ wᵢ sᵢ Bᵢ Aᵢ",
    "peft 0.21, add_weighted_adapter; Ilharco et al. 2023, section 2",
)
def measure_sum(case: Case) -> Measured:
    """cat: A is as it was, and w s B is rounded once to the layer's precision.

    In float64 there are q products, q being the sum of the ranks, and a few roundings before them.
    linear rounds both factors so, with a root in each. svd rounds both, too; and two QR, an SVD and
    their products err by max(I, O, q) eps |A| |B| each (Golub & Van Loan 2013, sections 5.2.1 and
    5.4.1).
    """
    weights = draw_weights(case)
    dW, _, parts = add_adapters(case, weights, "cat")
    exact: Any = 0
    S: Any = 0
    q = 0
    A_square: Any = 0.0  # |A|² and |B|² of the stacked factors
    B_square: Any = 0.0
    for A, B, c in parts:
        exact = exact + c * (B @ A)
        S = S + abs(c) * (abs(B) @ abs(A))
        q += len(A)
        A_square += np.linalg.norm(A.astype(float)) ** 2
        B_square += np.linalg.norm(c * B.astype(float)) ** 2
    cat_bound = case.gamma(1, S) + case.gamma(q + 5, S, np.float64)
    pairs: list[tuple[Any, Any]] = [(dW - exact, cat_bound)]

    alone = {case.first: weights[case.first]}
    dW, _, [(A, B, c)] = add_adapters(case, alone, "linear")
    S = abs(c) * (abs(B) @ abs(A))
    linear_bound = case.gamma(2, S) + case.gamma(len(A) + 9, S, np.float64)
    pairs.append((dW - c * (B @ A), linear_bound))

    dW, S, _ = add_adapters(case, weights, "svd", q)
    eps = max(*dW.shape, q) * np.finfo(np.float64).eps
    decomposed = 4 * eps * math.sqrt(A_square) * math.sqrt(B_square)
    svd_bound = case.gamma(2, S) + case.gamma(q + 2, S, np.float64) + decomposed
    pairs.append((dW - exact, svd_bound))
    return worst(*pairs)


@holds(
    "cross terms",
    "linear:  B A - Σ cᵢ Bᵢ Aᵢ = Σ sgn(cⱼ) √|cᵢ cⱼ| Bᵢ Aⱼ,  i ≠ j",
    "peft 0.21, add_weighted_adapter, multiplied out",
    has_several,
)
def measure_cross_terms(case: Case) -> Measured:
    """What `linear` adds to the sum.

    Factors are rounded once each to the layer's precision; in float64 a root and its product have
    four roundings each, k factors are added up, and r products. The roots here have three more.
    """
    dW, _, parts = add_adapters(case, draw_weights(case), "linear")
    exact: Any = 0
    S: Any = 0
    for (A, _, c), (_, B, d) in itertools.product(parts, repeat=2):
        root = math.sqrt(abs(c) * abs(d))
        exact = exact + math.copysign(1, c) * root * (B @ A)
        S = S + root * (abs(B) @ abs(A))
    r = len(parts[0][0])
    n = r + 2 * len(parts) + 13
    return compare(dW - exact, case.gamma(2, S) + case.gamma(n, S, np.float64))
