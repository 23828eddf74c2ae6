"""α, the start of A and the two learning rates are four dials with two degrees of freedom.

(α, A, η_A, η_B) and (α / (p q), p A, p η_A, q η_B) give the same run with AdamW; with SGD the rates
are p² η_A and q² η_B. At every step A is p times as large, B is q times as large, and their
gradients are divided by p and by q (Schulman et al. 2025, "LoRA Without Regret"). Powers of two
change exponents alone: then all losses have the same bits. Other numbers of a step have to be
scaled as well: the ε of Adam by 1 / p, AdamW's decay by 1 / p, SGD's by 1 / p².
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..lora import PeftModel
from ..optim import SGD, AdamW, Group, Optimizer
from .measuring import Measured, Property, count_differences, expect_zero
from .studies import Study, expect_same, make_registrars, train

PROPERTIES: list[Property] = []
holds, fails = make_registrars(PROPERTIES)
P = 4.0
Q = 0.5
STEPS = 3
SOURCE = "Schulman et al. 2025, LoRA Without Regret: invariances of the parametrization"
TENSORS = ("lora_A", "lora_B", "lora_magnitude_vector")

# The optimiser of a model whose A is p times, and whose B is q times as large.
MakeScaled = Callable[[PeftModel, float, float], Optimizer]


class Outcome(NamedTuple):
    """The losses of a run, and its tensors at the end as if p and q had been 1."""

    losses: list[float]
    tensors: list[Array]


def tensor_of(name: str) -> str:
    """Which of TENSORS a parameter's name means."""
    return next(tensor for tensor in TENSORS if tensor in name)


def scales(p: float, q: float) -> dict[str, float]:
    """What each tensor is multiplied by; DoRA's magnitudes stay."""
    return dict(zip(TENSORS, (p, q, 1.0), strict=True))


def run_scaled(
    study: Study,
    make: MakeScaled,
    p: float = 1.0,
    q: float = 1.0,
    max_norm: float = math.inf,
    **fields: Any,
) -> Outcome:
    """A run from α / (p q) and p A with the optimiser that `make` makes of p and q."""
    alpha = study.config().lora_alpha
    model = study.model(lora_alpha=alpha / (p * q), **fields)
    named = [(name, t) for name, t in model.named_parameters() if t.requires_grad]
    scale = scales(p, q)
    for name, t in named:
        t.data = t.data * t.dtype.type(scale[tensor_of(name)])
    losses = train(model, make(model, p, q), study.batches(STEPS), max_norm, schedule=True)
    return Outcome(losses, [t.data / t.dtype.type(scale[tensor_of(name)]) for name, t in named])


def make_groups(model: PeftModel, rows: dict[str, Group]) -> list[Group]:
    """The groups of an optimiser: the trained tensors of each kind with their numbers."""
    groups = []
    for tensor, numbers in rows.items():
        params = [
            (name, p) for name, p in model.named_parameters() if p.requires_grad and tensor in name
        ]
        if params:
            groups.append({"params": params, **numbers})
    return groups


def make_sgd(model: PeftModel, p: float, q: float) -> Optimizer:
    """SGD with momentum and decay."""
    rows = {}
    for tensor, scale in scales(p, q).items():
        rows[tensor] = {"lr": 0.25 * scale**2, "weight_decay": 0.125 / scale**2}
    return SGD(make_groups(model, rows), lr=1.0, momentum=0.5)


def make_adamw(
    model: PeftModel,
    p: float,
    q: float,
    eps: float = 1e-3,
    decay: float = 0.5,
    scaled_eps: bool = True,
    scaled_decay: bool = True,
) -> Optimizer:
    """AdamW with decay, and with an ε that is not small beside the gradients."""
    rows = {}
    for tensor, scale in scales(p, q).items():
        rows[tensor] = {
            "lr": 2.0**-5 * scale,
            "eps": eps / scale if scaled_eps else eps,
            "weight_decay": decay / scale if scaled_decay else decay,
        }
    return AdamW(make_groups(model, rows))


def count_unlike(study: Study, make: MakeScaled, **fields: Any) -> Measured:
    """How many losses, and numbers of the tensors after the run, differ between the two runs."""
    one = run_scaled(study, make, **fields)
    other = run_scaled(study, make, P, Q, **fields)
    wrong = count_differences(np.array(one.losses), np.array(other.losses))
    for a, b in zip(one.tensors, other.tensors, strict=True):
        wrong += count_differences(a, b)
    return expect_zero(wrong)


@holds("four dials, SGD", "(α, A, η_A, η_B) = (α / pq, p A, p² η_A, q² η_B): same bits", SOURCE)
def measure_sgd(study: Study) -> Measured:
    """Exact: with momentum, decay, dropout, warm-up and a falling rate."""
    return count_unlike(study, make_sgd, lora_dropout=0.25)


@holds("four dials, AdamW", "(α, A, η_A, η_B) = (α / pq, p A, p η_A, q η_B): same bits", SOURCE)
def measure_adamw(study: Study) -> Measured:
    """Exact: ε and decay divided by p and by q, warm-up and a falling rate."""
    return count_unlike(study, make_adamw)


@holds("four dials, DoRA", "the same with magnitudes, which stay as they are", SOURCE)
def measure_dora(study: Study) -> Measured:
    """Exact: |W + s B A| reads the product alone. An ε of 1e-30 is as good as none."""

    def make(model: PeftModel, p: float, q: float) -> Optimizer:
        return make_adamw(model, p, q, eps=1e-30, decay=0.0, scaled_eps=False)

    return count_unlike(study, make, use_dora=True)


# ---- what breaks it ------------------------------------------------------------------------------


def compare_losses(study: Study, make: MakeScaled, max_norm: float = math.inf) -> Measured:
    """The losses of both runs in float64, which no rounding could take so far apart."""
    one = run_scaled(study.in_float64(), make, max_norm=max_norm)
    other = run_scaled(study.in_float64(), make, P, Q, max_norm)
    return expect_same(np.array(other.losses), np.array(one.losses))


@fails("four dials, one ε", "the same with one ε for A and B", SOURCE)
def measure_one_eps(study: Study) -> Measured:
    """Adam's usual ε, 1e-8."""

    def make(model: PeftModel, p: float, q: float) -> Optimizer:
        return make_adamw(model, p, q, eps=1e-8, scaled_eps=False)

    return compare_losses(study, make)


@fails("four dials, one decay", "the same with one weight decay for A and B", SOURCE)
def measure_one_decay(study: Study) -> Measured:
    """AdamW's, multiplied by the rates as they are: p and q times as much."""

    def make(model: PeftModel, p: float, q: float) -> Optimizer:
        return make_adamw(model, p, q, scaled_decay=False)

    return compare_losses(study, make)


@fails("four dials, clipping", "the same with gradients clipped to one norm", SOURCE)
def measure_clipping(study: Study) -> Measured:
    """The norm is that of dA and dB together, and p and q change their shares of it."""
    return compare_losses(study, make_sgd, max_norm=0.125)
