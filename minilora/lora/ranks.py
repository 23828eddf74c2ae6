"""Ranks of layers by the share of dW that they keep, or by a budget of parameters for all layers.

Let sigma_1 >= sigma_2 >= ... be the singular values of a layer's dW (O, I), and dW_k the nearest
matrix of rank k. It keeps the energy sum_{i<=k} sigma_i^2 of |dW|^2 = sum sigma_i^2, and
|dW - dW_k|^2 is the rest (Eckart & Young 1936).

energy   each layer has the smallest k that keeps this share of its energy
error    each layer has the smallest k with |dW - dW_k| <= error |dW|: energy = 1 - error^2
budget   rank k takes k (O + I) parameters of the layer, all layers together at most `budget`; the
         singular triplets with the largest sigma^2 / (O + I) come first, which is the best choice
         but for what is left of the budget at the end

Singular values at the level of rounding errors do not count for any rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import (
    ConfigError,
    Rule,
    check_fields,
    integer_rules,
    is_integer,
    is_number,
    number_rules,
    optional_rule,
)
from .factors import Part, rounding_error, singular_values
from .singular import leading_triplets

Array = np.ndarray
EPS = np.finfo(np.float64).eps
MAX_RANK = 2**16
FIRST = 8  # singular values that are computed at first
_RULES = [
    Rule("--r", is_integer(1, MAX_RANK), f"an integer from 1 to {MAX_RANK}"),
    Rule("--energy", is_number(above=0, below=1 + EPS), "a number in (0, 1]"),
    *number_rules("--error", is_kind=is_number, least=0, below=1),
    *integer_rules("--budget", least=1, limit=2**63),
]


class RankRule(NamedTuple):
    """How the ranks of layers are chosen: at most one of these is not None."""

    r: int | None = None
    energy: float | None = None
    error: float | None = None
    budget: int | None = None

    @property
    def is_adaptive(self) -> bool:
        """Whether the rank of a layer depends on its dW."""
        return self.r is None and self != RankRule()

    @property
    def missed(self) -> float:
        """The share of the energy that a layer may miss."""
        if self.energy is not None:
            return 1 - self.energy
        assert self.error is not None
        return self.error**2


def check_rank_rule(
    r: Any = None, energy: Any = None, error: Any = None, budget: Any = None, required: bool = True
) -> RankRule:
    """The rule that the options mean.

    ConfigError for two of them, for none if one is required, or for a value out of its range.
    """
    values = {"--r": r, "--energy": energy, "--error": error, "--budget": budget}
    check_fields(values, [optional_rule(rule) for rule in _RULES])
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1 or (required and not given):
        raise ConfigError(
            f"the rank is chosen by one of {', '.join(values)}, got "
            f"{' and '.join(given) or 'none of them'}: give one"
        )
    return RankRule(r, energy, error, budget)


class Spectrum(NamedTuple):
    """The singular values of one layer's dW (O, I).

    shape    (O, I)
    leading  k -> (the k largest values or more, falling; the norm of all others)
    least    the lowest rank that the layer may have
    noise    values up to this one may be rounding errors
    """

    shape: tuple[int, int]
    leading: Callable[[int], tuple[Array, float]]
    least: int = 0
    noise: float = 0.0

    @property
    def cost(self) -> int:
        """O + I, the parameters of rank 1."""
        return sum(self.shape)

    def count_significant(self, values: Array) -> int:
        """The number of these values, the largest first, that are above rounding errors."""
        floor = max(self.noise, max(self.shape) * EPS * float(values.max(initial=0.0)))
        return int(np.count_nonzero(values > floor))


def factors_spectrum(part: Part, least: int = 0) -> Spectrum:
    """The spectrum of c B A, all of it from the factors."""
    values = singular_values(part.A, part.B, part.c)
    noise = abs(part.c) * rounding_error(part.A, part.B)
    return Spectrum((len(part.B), part.A.shape[1]), lambda k: (values, 0.0), least, noise)


def matrix_spectrum(
    shape: tuple[int, int], form: Callable[[], Array], least: int = 0, noise: float = 0.0
) -> Spectrum:
    """The spectrum of a large matrix, which `form` computes anew each time it is needed."""

    def leading(k: int) -> tuple[Array, float]:
        U, values, _ = leading_triplets(form(), k)
        count = U.shape[1]
        return values[:count], float(values[count]) if len(values) > count else 0.0

    return Spectrum(shape, leading, least, noise)


def choose_ranks(spectra: Mapping[str, Spectrum], rule: RankRule) -> dict[str, int]:
    """The rank of each layer. ConfigError if none has a rank, or if a budget is too small."""
    if rule.r is not None:
        return dict.fromkeys(spectra, rule.r)
    if rule.budget is not None:
        ranks = spend_budget(spectra, rule.budget)
    else:
        ranks = {path: smallest_rank(one, rule.missed) for path, one in spectra.items()}
    if not any(ranks.values()):
        raise ConfigError(
            f"{rule_text(rule)} leaves no layer with a rank above 0, and an adapter needs one: "
            "allow a smaller error or more numbers, unless all of dW is 0"
        )
    return ranks


def rule_text(rule: RankRule) -> str:
    """The option that was given, with its value: "--energy 0.9"."""
    [(name, value)] = [(name, value) for name, value in rule._asdict().items() if value is not None]
    return f"--{name} {value}"


def smallest_rank(spectrum: Spectrum, missed: float) -> int:
    """The smallest rank that misses at most this share of the energy, to rounding errors."""
    wanted = FIRST
    while True:
        values, rest = spectrum.leading(wanted)
        significant = spectrum.count_significant(values)
        largest = max(float(values.max(initial=0.0)), rest) or 1.0
        squares = np.append(values, rest) / largest
        squares *= squares
        # tails[k] is the energy that rank k misses, added up from the smallest value.
        tails = np.cumsum(squares[::-1])[::-1]
        # Nine of ten equal values keep the energy 0.9, although 1 - 0.9 is not quite 0.1.
        enough = np.flatnonzero(tails <= missed * (1 + 1e-12) * tails[0])
        k = int(enough[0]) if len(enough) else len(values) + (rest > 0)
        if significant < len(values) or k <= len(values):
            return max(min(k, significant), spectrum.least)
        wanted *= 2


def spend_budget(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """The ranks that a budget of parameters buys, greedily by sigma^2 / (O + I).

    ConfigError if the budget is below what the lowest ranks take.
    """
    ranks = {path: spectrum.least for path, spectrum in spectra.items()}
    left = budget - sum(ranks[path] * spectrum.cost for path, spectrum in spectra.items())
    if left < 0:
        raise ConfigError(
            f"--budget {budget} is too small: the layers that cannot have rank 0 take "
            f"{budget - left} numbers"
        )
    values: dict[str, Array] = {}
    heap: list[tuple[float, int, str]] = []

    def push(path: str, place: int) -> None:
        """Add the layer's next triplet to the heap, if there is one and the budget allows it."""
        spectrum = spectra[path]
        k = ranks[path]
        known = values.get(path, np.zeros(0))
        if spectrum.cost > left:
            return
        if k >= len(known):
            known, _ = spectrum.leading(max(FIRST, 2 * k))
            values[path] = known
        if k < spectrum.count_significant(known):
            heapq.heappush(heap, (-float(known[k]) / spectrum.cost**0.5, place, path))

    for place, path in enumerate(spectra):
        push(path, place)
    while heap:
        _, place, path = heapq.heappop(heap)
        if spectra[path].cost <= left:
            ranks[path] += 1
            left -= spectra[path].cost
            push(path, place)
    return ranks
