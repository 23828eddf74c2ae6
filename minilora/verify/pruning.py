"""Properties of sums of pruned updates and of ranks chosen by energy. The notation is case.py's.

D = s B A (O, I) is the update of one adapter, by default the first, and D' the pruned D.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..lora.factors import Part, Term, truncate_rank
from ..lora.pruning import PRUNED, RANDOM, Pruning, pruned_sum
from ..lora.ranks import factors_spectrum, smallest_rank
from .case import Case
from .measuring import (
    Measured,
    Property,
    compare,
    count_differences,
    count_nonzeros,
    expect_zero,
    make_registrar,
    project,
    svd_error,
    worst,
)
from .sums import draw_weights, has_several, is_plain

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, is_plain)
DENSITY = 0.25
LEAST_ERROR = 1e-4  # the smallest relative error for which a rank is chosen
SIGMAS = 6  # a normal variable is farther from its mean once in half a billion draws


def make_terms(case: Case, weights: dict[str, float]) -> list[Term]:
    return [
        Term(case.adapters[name].part(), weight, number)
        for number, (name, weight) in enumerate(weights.items())
    ]


def draw_terms(case: Case) -> list[Term]:
    return make_terms(case, draw_weights(case))


def first_term(case: Case) -> Term:
    return make_terms(case, {case.first: 1.0})[0]


def prune_first(case: Case, how: str) -> tuple[Array, Array]:
    """(D, D') (O, I) of the first adapter."""
    term = first_term(case)
    whole, _ = pruned_sum([term], Pruning("magnitude_prune", 1.0))
    pruned, _ = pruned_sum([term], Pruning(how, DENSITY, seed=case.seed), case.name)
    return whole, pruned


@holds(
    "pruned sum at density 1",
    "magnitude_prune, dare_linear: Σ wᵢ Dᵢ;  ties, dare_ties of one: w D",
    "peft 0.21, utils/merge_utils; Yadav et al. 2023; Yu et al. 2024",
)
def measure_whole(case: Case) -> Measured:
    """Roundings of one entry: r products, s and w, and the sum over the adapters."""
    terms = draw_terms(case)
    pairs = []
    for how in PRUNED:
        used = terms[:1] if how.endswith("ties") else terms
        total, _ = pruned_sum(used, Pruning(how, 1.0, seed=case.seed))
        exact: Any = 0
        size: Any = 0
        for term in used:
            A, B, c, _ = term.weighted()
            B = B.astype(case.wide)
            exact = exact + c * (B @ A)
            size = size + abs(c) * (abs(B) @ abs(A))
        n = max(len(term.part.A) for term in used) + 5 + len(used)
        pairs.append((total - exact, case.gamma(n, size, np.float64)))
    return worst(*pairs)


@holds(
    "equal adapters",
    "ties of D and D, w = 1: D';  magnitude_prune: 2 D', bit for bit",
    "Yadav et al. 2023, section 3: the mean of those that agree",
)
def measure_equal(case: Case) -> Measured:
    """Exact: twice a number, and half of that, are not rounded."""
    term = first_term(case)
    _, pruned = prune_first(case, "magnitude_prune")
    wrong = 0
    for how, factor in (("ties", 1), ("magnitude_prune", 2)):
        total, _ = pruned_sum([term, term], Pruning(how, DENSITY))
        wrong += count_nonzeros(total != factor * pruned)
    return expect_zero(wrong)


@holds(
    "the largest stay",
    "magnitude_prune: the int(density O I) largest |D|, bit for bit, and zeros",
    "peft 0.21, magnitude_based_pruning; of equal ones the first",
)
def measure_largest(case: Case) -> Measured:
    whole, pruned = prune_first(case, "magnitude_prune")
    order = np.argsort(-abs(whole).ravel(), kind="stable")
    largest = order[: int(DENSITY * whole.size)]
    expected = np.zeros(whole.size)
    expected[largest] = whole.ravel()[largest]
    return expect_zero(count_differences(pruned, expected.reshape(whole.shape)))


@holds(
    "dare is unbiased",
    "E ⟨D' - D, D⟩ = 0,  variance (1 / density - 1) Σ D⁴",
    "Yu et al. 2024, section 3: D' = D m / density, m Bernoulli",
)
def measure_bias(case: Case) -> Measured:
    """Six standard deviations; dare_linear and dare_ties draw the same masks for one adapter."""
    odds = 1 / DENSITY - 1
    return _measure_chance(case, lambda D, change: change * D, 0.0, odds)


@holds(
    "dare's variance",
    "E |D' - D|² = (1 / density - 1) |D|²",
    "Yu et al. 2024, section 3: the variance of m / density",
)
def measure_variance(case: Case) -> Measured:
    """Six standard deviations. With odds q = 1 / density - 1, (D' - D)² is q² D² with probability
    density, and D² otherwise: its variance is q (q - 1)² D⁴."""
    odds = 1 / DENSITY - 1
    return _measure_chance(case, lambda D, change: change**2, odds, odds * (odds - 1) ** 2)


def _measure_chance(case: Case, statistic: Any, mean: float, variance: float) -> Measured:
    """A statistic of (D, D' - D), summed up: its mean is mean |D|², its variance variance Σ D⁴."""
    pairs = []
    for how in RANDOM:
        D, pruned = prune_first(case, how)
        scale = float(abs(D).max()) or 1.0
        D = D / scale
        change = pruned / scale - D
        error = float(statistic(D, change).sum() - mean * (D**2).sum())
        bound = SIGMAS * math.sqrt(variance * float((D**4).sum()))
        pairs.append((error, bound + np.finfo(np.float64).tiny))
    return worst(*pairs)


@holds(
    "elected sign",
    "ties, dare_ties, w > 0: each entry of the sum is 0, or has the sign of Σ D'ᵢ",
    "Yadav et al. 2023, section 3: elect sign",
    has_several,
)
def measure_election(case: Case) -> Measured:
    terms = [term._replace(weight=abs(term.weight)) for term in draw_terms(case)]
    wrong = 0
    for how, linear in (("ties", "magnitude_prune"), ("dare_ties", "dare_linear")):
        total, _ = pruned_sum(terms, Pruning(how, DENSITY, seed=case.seed))
        equal = [term._replace(weight=1.0) for term in terms]
        votes, _ = pruned_sum(equal, Pruning(linear, DENSITY, seed=case.seed))
        elected = np.where(votes >= 0, 1, -1)
        wrong += count_nonzeros(total * elected < 0)
    return expect_zero(wrong)


# ---- ranks by energy -----------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The rank k that is chosen for the error ε |D|.

    D          s B A (O, I) of `part`
    tails      |D - D_j| for j = 0, 1, ..., D_j being the nearest matrix of rank j
    allowed    ε |D|
    rounding   a bound of the rounding error of each of these norms
    """

    part: Part
    D: Array
    k: int
    tails: Array
    allowed: float
    rounding: float


def choose_rank(case: Case) -> Chosen:
    epsilon = float(LEAST_ERROR ** case.rng.uniform(0.02, 1))
    part = first_term(case).part
    A, B, c, _ = part
    D = c * (B @ A)
    _, T = project(D, B)
    values = np.linalg.svd(T, compute_uv=False)
    tails = np.array([np.linalg.norm(values[k:]) for k in range(len(values) + 1)])
    k = smallest_rank(factors_spectrum(part), epsilon**2)
    size = float(abs(c) * np.linalg.norm(A) * np.linalg.norm(B))
    shape = (len(B) + len(A), A.shape[1] + len(A))
    rounding = math.sqrt(len(values)) * svd_error(shape, size, count=8)
    return Chosen(part, D, k, tails, epsilon * float(tails[0]), rounding)


@holds(
    "error of a chosen rank",
    "|D - D_k| ≤ ε |D| for the rank k that is chosen",
    "Eckart & Young 1936: |D - D_k|² = Σ σᵢ², i > k",
)
def measure_error(case: Case) -> Measured:
    chosen = choose_rank(case)
    A, B, c, _ = chosen.part
    A_k, B_k, _ = truncate_rank(A, B, c, chosen.k)
    missed = float(np.linalg.norm(chosen.D - B_k @ A_k))
    return compare(missed, chosen.allowed * (1 + 2.0**-30) + chosen.rounding)


@holds(
    "the smallest rank",
    "ε |D| < |D - D_{k-1}|: no smaller rank is enough",
    "Eckart & Young 1936: no matrix of rank k - 1 is nearer",
)
def measure_smallest(case: Case) -> Measured:
    """A k above the number of singular values is compared with the last tail, which is 0."""
    _, _, k, tails, allowed, rounding = choose_rank(case)
    before = float(tails[max(0, min(k, len(tails)) - 1)])
    return compare(allowed, before + rounding)
