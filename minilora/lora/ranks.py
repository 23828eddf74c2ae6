"""Ranks by what they keep of dW: an energy, an error, or a budget of numbers for all layers.

With the singular values sigma_1 >= sigma_2 >= ... of a layer's dW, a rank k keeps the energy
sum_{i<=k} sigma_i^2 and misses the rest (Eckart & Young 1936).

energy   per layer the smallest k that keeps this share of the energy
error    per layer the smallest k with |dW - dW_k| <= error |dW|: the energy is 1 - error^2
budget   k (O + I) numbers in each layer, in all at most `budget`: the triplet with the largest
         sigma^2 / (O + I) is taken first, the best choice but for what the last triplet leaves over

A singular value at the level of rounding says nothing about dW, and no rank counts it.
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
from .leading import leading_triplets

Array = np.ndarray
EPS = np.finfo(np.float64).eps
MAX_RANK = 2**16
FIRST = 8  # singular values that are asked for at first
_RULES = [
    Rule("--r", is_integer(1, MAX_RANK), f"an integer from 1 to {MAX_RANK}"),
    Rule("--energy", is_number(above=0, below=1 + EPS), "a number in (0, 1]"),
    *number_rules("--error", is_kind=is_number, least=0, below=1),
    *integer_rules("--budget", least=1, limit=2**63),
]


class RankRule(NamedTuple):
    """How the ranks of layers are chosen: by one of these, or by none."""

    r: int | None = None
    energy: float | None = None
    error: float | None = None
    budget: int | None = None

    @property
    def is_adaptive(self) -> bool:
        """Whether a layer's rank depends on its dW."""
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
    """The rule that the options mean. ConfigError for two of them, for none if one is required, or
    for a value out of its range."""
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
    """The singular values of one layer's dW (O, I), as many as are asked for.

    shape    (O, I)
    leading  k -> the k largest values or more, falling, and the norm of all others
    least    the rank that the layer has in any case
    noise    values up to this one are rounding's
    """

    shape: tuple[int, int]
    leading: Callable[[int], tuple[Array, float]]
    least: int = 0
    noise: float = 0.0

    @property
    def cost(self) -> int:
        """The numbers that a rank takes."""
        return sum(self.shape)

    def count_significant(self, values: Array) -> int:
        """How many of the largest values are above rounding."""
        floor = max(self.noise, max(self.shape) * EPS * float(values.max(initial=0.0)))
        return int(np.count_nonzero(values > floor))


def factors_spectrum(part: Part, least: int = 0) -> Spectrum:
    """The spectrum of c B A, which is known at once."""
    values = singular_values(part.A, part.B, part.c)
    noise = abs(part.c) * rounding_error(part.A, part.B)
    return Spectrum((len(part.B), part.A.shape[1]), lambda k: (values, 0.0), least, noise)


def matrix_spectrum(
    shape: tuple[int, int], form: Callable[[], Array], least: int = 0, noise: float = 0.0
) -> Spectrum:
    """The spectrum of a large matrix, which `form` makes each time that more of it is asked for."""

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
    """The smallest k that misses at most this share of the energy, as far as rounding can tell."""
    wanted = FIRST
    while True:
        values, rest = spectrum.leading(wanted)
        significant = spectrum.count_significant(values)
        largest = max(float(values.max(initial=0.0)), rest) or 1.0
        squares = np.append(values, rest) / largest
        squares *= squares
        # tails[k] is the energy beyond the first k values, added up from the smallest one.
        tails = np.cumsum(squares[::-1])[::-1]
        # Of ten equal values nine have the energy 0.9, although 1 - 0.9 is not quite 0.1.
        enough = np.flatnonzero(tails <= missed * (1 + 1e-12) * tails[0])
        k = int(enough[0]) if len(enough) else len(values) + (rest > 0)
        if significant < len(values) or k <= len(values):
            return max(min(k, significant), spectrum.least)
        wanted *= 2


def spend_budget(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """The ranks that together keep the most energy in k (O + I) numbers per layer, greedily."""
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
        """Offer the layer's next triplet, if it has one that fits."""
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
