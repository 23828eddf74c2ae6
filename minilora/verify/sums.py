"""What adapters that are added up promise: the sum itself, or what is between. Letters and shapes are those of case.py.

Measured through `PeftModel.add_weighted_adapter`, so factors are rounded to the layer's precision as they are there.
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
from .case import WIDE, Case
from .layers import OneLayer, dense
from .measuring import Measured, Property, factors, listing, lora, worst

PROPERTIES: list[Property] = []
Parts = list[tuple[Array, Array, float]]  # (A, B, w s) of each adapter, in a wider precision


def plain(case: Case) -> bool:
    """A sum has nothing to do with the base: one kind of base is enough."""
    return lora(case) and dense(case)


def several(case: Case) -> bool:
    return plain(case) and len(case.configs) > 1


holds = listing(PROPERTIES, plain)


def _added(
    case: Case, weights: dict[str, float], way: str, r: int | None = None
) -> tuple[Array, Array, Parts]:
    """(dW of the adapter that others are added up to, its |B| |A|, what they are); with linear they get equal ranks."""
    own, base = case.subject.adapters, case.layer().base_layer
    first, *others = weights
    most = max(own[name].r for name in weights) if way == "linear" else 0
    configs = {
        name: dataclasses.replace(case.configs[name], r=max(most, own[name].r)) for name in weights
    }
    made = get_peft_model(OneLayer(base), configs[first], f"of {first}")
    for name in others:
        made.add_adapter(f"of {name}", configs[name])
    layer, wide = made.model.proj, WIDE[case.dtype]
    parts: Parts = []
    for name, w in weights.items():
        A, B = pad_rank(own[name].lora_A.data, own[name].lora_B.data, configs[name].r)
        layer.active = [f"of {name}"]
        layer.adapters[f"of {name}"].scaling = own[name].scaling
        factors(layer, [(A, B)])
        parts.append((A.astype(wide), B.astype(wide), w * own[name].scaling))
    made.add_weighted_adapter(
        [f"of {name}" for name in weights], [*weights.values()], "sum", way, r
    )
    A, B = (
        abs(p.data.astype(np.float64))
        for p in (layer.adapters["sum"].lora_A, layer.adapters["sum"].lora_B)
    )
    return layer.delta_weight("sum"), B @ A, parts


def _weights(case: Case) -> dict[str, float]:
    rng = case.rng
    return {name: float(rng.choice([-1, 1]) * rng.uniform(0.25, 2)) for name in case.configs}


@holds(
    "weighted sum",
    "cat, svd of full rank, linear of one:  B A = Σ wᵢ sᵢ Bᵢ Aᵢ",
    "peft 0.21, add_weighted_adapter; Ilharco et al. 2023, section 2",
)
def _sum(case: Case) -> Measured:
    """Of cat, A is as it was, and w s B is rounded once to the layer's precision; in float64 there are q products, q
    being the sum of the ranks, and a few roundings on the way to them. Of linear both factors are rounded so, with a
    root in each. Of svd both are, too; and two QR, an SVD and their products err by max(I, O, q) eps |A| |B| each
    (Golub & Van Loan 2013, sections 5.2.1 and 5.4.1)."""
    weights = _weights(case)
    first = dict(itertools.islice(weights.items(), 1))
    got, _, parts = _added(case, weights, "cat")
    exact: Any = sum(c * (B @ A) for A, B, c in parts)
    S: Any = sum(abs(c) * (abs(B) @ abs(A)) for A, B, c in parts)
    q = sum(len(A) for A, *_ in parts)
    pairs: list[tuple[Any, Any]] = [
        (got - exact, case.gamma(1, S) + case.gamma(q + 5, S, np.float64))
    ]
    alone, _, [(A, B, c)] = _added(case, first, "linear")
    S = abs(c) * (abs(B) @ abs(A))
    pairs.append((alone - c * (B @ A), case.gamma(2, S) + case.gamma(len(A) + 9, S, np.float64)))
    got, S, _ = _added(case, weights, "svd", q)
    sizes = [
        math.sqrt(sum(np.linalg.norm(c**i * p[i].astype(float)) ** 2 for *p, c in parts))
        for i in (0, 1)
    ]
    apart = 4 * max(*got.shape, q) * np.finfo(np.float64).eps * sizes[0] * sizes[1]
    pairs.append((got - exact, case.gamma(2, S) + case.gamma(q + 2, S, np.float64) + apart))
    return worst(*pairs)


@holds(
    "cross terms",
    "linear:  B A - Σ cᵢ Bᵢ Aᵢ = Σ sgn(cⱼ) √|cᵢ cⱼ| Bᵢ Aⱼ,  i ≠ j",
    "peft 0.21, add_weighted_adapter, multiplied out",
    several,
)
def _cross_terms(case: Case) -> Measured:
    """What `linear` adds to the sum. Factors are rounded once each to the layer's precision; in float64 a root and its
    product have four roundings each, k factors are added up, and r products."""
    got, _, parts = _added(case, _weights(case), "linear")
    expected: Any = 0
    S: Any = 0
    for (A, _, c), (_, B, d) in itertools.product(parts, repeat=2):
        root = math.sqrt(abs(c) * abs(d))  # of float64 itself: three roundings, which are in n
        expected = expected + math.copysign(1, c) * root * (B @ A)
        S = S + root * (abs(B) @ abs(A))
    n = len(parts[0][0]) + 2 * len(parts) + 13
    return worst((got - expected, case.gamma(2, S) + case.gamma(n, S, np.float64)))
