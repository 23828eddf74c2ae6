"""Sums of pruned updates: TIES, DARE and magnitude pruning, on dW itself.

First, entries of each update D_i = s_i B_i A_i (O, I), in float64, are set to 0, which gives D'_i:

magnitude_prune, ties     all but the k = int(density O I) largest |D_i|; of equal ones, the first
                          stay
dare_linear, dare_ties    each with probability 1 - density; the others are divided by density

Then the D'_i are added up with their weights w_i:

magnitude_prune, dare_linear    sum of w_i D'_i                        Yu et al. 2024
ties, dare_ties                 the sign of each entry is elected;     Yadav et al. 2023
                                the mean of w_i D'_i over the adapters whose D'_i has that sign

The elected sign is that of the sum of D'_i ("total"), or of the sum of their signs ("frequency"),
both without the weights, and + where the sum is 0: [2, -2] gives 2. These are PEFT's rules for the
names that end in _svd. Without _svd PEFT prunes A and B, and their product is not a pruned sum.
(mergekit elects with the weights, and divides by the sum of the weights that agree.)

Memory holds at most one array as large as dW: |D_i| while the threshold of D_i is found, then the
result, which is formed some rows at a time. D_i is formed in the same blocks both times, so that
the threshold is compared with the bits from which it was taken.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import NUMPY, mix_key
from ..errors import (
    ConfigError,
    Rule,
    check_fields,
    integer_rules,
    is_number,
    one_of,
    optional_rule,
)
from ..formats.dtypes import row_blocks
from ..threads import one_blas_thread
from .factors import Part, Term

Array = np.ndarray
Row = dict[str, Any]
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
ELECTING = ("ties", "dare_ties")
RANDOM = ("dare_linear", "dare_ties")
MAJORITY_SIGNS = ("total", "frequency")
_RULES = (
    Rule("density", is_number(above=0, below=math.nextafter(1, 2)), "a number in (0, 1]"),
    Rule("majority_sign_method", one_of(*MAJORITY_SIGNS), "'total' or 'frequency'"),
    *integer_rules("seed", least=0, limit=2**63),
)


class Pruning(NamedTuple):
    """How updates are pruned and added up.

    how    one of PRUNED
    seed   of dare's random masks
    """

    how: str
    density: float
    majority_sign_method: str = "total"
    seed: int = 0

    @property
    def elects(self) -> bool:
        """Whether only updates of the elected sign are added up."""
        return self.how in ELECTING

    @property
    def is_random(self) -> bool:
        return self.how in RANDOM


def check_pruning(
    how: str, density: Any = None, majority_sign_method: Any = "total", seed: Any = 0
) -> Pruning | None:
    """The pruning that `how` and the options mean; None if `how` is not one of PRUNED.

    ConfigError for a value out of its range, and for an option that `how` does not use.
    """
    rules = [optional_rule(rule) if rule.field == "density" else rule for rule in _RULES]
    check_fields(
        {"density": density, "majority_sign_method": majority_sign_method, "seed": seed}, rules
    )
    for name, is_given, users in (
        ("density", density is not None, PRUNED),
        ("majority_sign_method", majority_sign_method != "total", ELECTING),
        ("seed", seed != 0, RANDOM),
    ):
        if is_given and how not in users:
            raise ConfigError(f"{name} is for {', '.join(users)}, not for {how}: leave it out")
    if how not in PRUNED:
        return None
    if density is None:
        raise ConfigError(f"{how} needs density, the share of dW that stays: a number in (0, 1]")
    return Pruning(how, float(density), majority_sign_method, seed)


# ---- masks ---------------------------------------------------------------------------------------


class Update:
    """D = c B A (O, I), formed some rows at a time, and the mask of the entries that stay.

    keep   (rows, D of these rows) -> a boolean mask of the same shape; None: all entries stay
    """

    def __init__(self, part: Part):
        self.A = part.A
        self.B = part.c * part.B
        self.shape = len(part.B), part.A.shape[1]
        self.keep: Callable[[slice, Array], Array] | None = None

    def rows(self, at: slice) -> Array:
        """D of these rows; the bits are the same each time."""
        return np.asarray(self.B[at] @ self.A)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """(rows, D of these rows), in order."""
        for at in row_blocks(self.shape):
            yield at, self.rows(at)


class Largest:
    """A mask of the k largest |D|; of equal ones those with the lowest index stay.

    It must be called for all blocks, in the order of the rows.
    """

    def __init__(self, update: Update, k: int):
        absolute = np.empty(update.shape)
        for at, D in update.blocks():
            np.abs(D, out=absolute[at])
        flat = absolute.reshape(-1)
        self.least = np.inf
        self.ties = 0  # the number of entries equal to `least` that stay
        if k:
            place = flat.size - k
            flat.partition(place)
            self.least = flat[place]
            self.ties = k - int(np.count_nonzero(flat > self.least))

    def __call__(self, at: slice, D: Array) -> Array:
        absolute = np.abs(D)
        mask = absolute > self.least
        ties = np.flatnonzero(absolute == self.least)[: self.ties]
        self.ties -= len(ties)
        mask.reshape(-1)[ties] = True
        return np.asarray(mask)


class Drawn:
    """A random mask; each entry depends only on the key, its row and its column."""

    def __init__(self, key: int, density: float):
        self.key = key
        self.limit = np.uint64(density * 2**53)

    def __call__(self, at: slice, D: Array) -> Array:
        words = NUMPY.random_words(self.key, at.start, *D.shape)
        return np.asarray((words >> np.uint64(11)) < self.limit)


def prune_updates(terms: Sequence[Term], pruning: Pruning, path: str) -> list[Update]:
    """The update of each term, without the weight, with its mask.

    dare's random numbers depend on the seed, the adapter's number and the layer's path.
    """
    place = zlib.crc32(path.encode(errors="surrogatepass"))
    updates = []
    for term in terms:
        update = Update(term.part)
        if pruning.is_random:
            key = mix_key(pruning.seed, term.number, place)
            update.keep = Drawn(key, pruning.density)
        elif pruning.density < 1:
            update.keep = Largest(update, int(pruning.density * math.prod(update.shape)))
        updates.append(update)
    return updates


# ---- the sum -------------------------------------------------------------------------------------


def pruned_sum(terms: Sequence[Term], pruning: Pruning, path: str = "") -> tuple[Array, Row]:
    """The sum (O, I) of pruned updates in float64, and a row of its report:

    |dW|       the norm of the sum
    kept       |D'|^2 / |D|^2 of each adapter, about 1 / density for dare
    conflict   positions where D' of two adapters have opposite signs, over those where any is not 0
    cosine     the cosine of the sum with the plain sum of w D

    None stands for 0 / 0.
    """
    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        weights = [term.weight for term in terms]
        return _pruned_sum(prune_updates(terms, pruning, path), weights, pruning)


def _pruned_sum(
    updates: Sequence[Update], weights: Sequence[float], pruning: Pruning
) -> tuple[Array, Row]:
    total = np.empty(updates[0].shape)
    before = np.zeros(len(updates))  # |D|^2 of each update
    after = np.zeros(len(updates))  # |D'|^2 of each update
    occupied = conflicts = 0
    products = np.zeros(3)  # <sum, sum>, <plain, plain>, <sum, plain>; plain = sum w D
    for at in row_blocks(total.shape):
        pruned = []
        plain: Any = 0.0
        for i, update in enumerate(updates):
            D = update.rows(at)
            before[i] += np.vdot(D, D)
            plain = plain + weights[i] * D
            if update.keep is not None:
                D *= update.keep(at, D)
            if pruning.is_random:
                D /= pruning.density
            after[i] += np.vdot(D, D)
            pruned.append(D)
        is_positive = np.any([D > 0 for D in pruned], axis=0)
        is_negative = np.any([D < 0 for D in pruned], axis=0)
        occupied += int(np.count_nonzero(is_positive | is_negative))
        conflicts += int(np.count_nonzero(is_positive & is_negative))
        block = add_pruned(pruned, weights, pruning)
        products += np.vdot(block, block), np.vdot(plain, plain), np.vdot(block, plain)
        total[at] = block
    size, plain_size = np.sqrt(products[:2])
    row: Row = {
        "|dW|": float(size),
        "kept": [float(a / b) if b else None for a, b in zip(after, before, strict=True)],
        "conflict": conflicts / occupied if occupied else None,
        "cosine": float(products[2] / size / plain_size) if size and plain_size else None,
    }
    return total, row


def add_pruned(pruned: Sequence[Array], weights: Sequence[float], pruning: Pruning) -> Array:
    """The sum of pruned updates of one shape, for a block of rows: see the module's docstring."""
    weighted = [w * D for w, D in zip(weights, pruned, strict=True)]
    if not pruning.elects:
        return np.asarray(sum(weighted))
    votes = pruned if pruning.majority_sign_method == "total" else map(np.sign, pruned)
    elected = np.where(sum(votes) >= 0, 1.0, -1.0)
    total = np.zeros(elected.shape)
    count = np.zeros(elected.shape)
    for D, term in zip(pruned, weighted, strict=True):
        agrees = np.sign(D) == elected
        total += term * agrees
        count += agrees
    return total / np.maximum(count, 1)
