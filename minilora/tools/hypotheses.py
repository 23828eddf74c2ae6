"""What may have been done to a merged tensor, and how far each arithmetic can be from its result.

    M = round(V + c E),   E = B A        V: the base's weight W, or what NF4 makes of it
    M = round(k (V + c E))               for DoRA: k = m / |V + c E|, by output

A `Hypothesis` says which V, which c and which E; it is refuted by one number M further from the
float64 result than `half_step(M)` plus the `radius` of an arithmetic. ARITHMETICS are ordered: each
allows what those before it allow, and more. So a merge that was computed in a listed arithmetic is
never refuted in it. WIDER ones explain a merge in a note; they never make one right.

The bounds are those of Higham 2002, chapters 2 and 3: n roundings of unit u are within a factor of
1 +- ((1 + u)^n - 1), and a result below the normal numbers errs by half the smallest one more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..formats.dtypes import round_to, widen

Array = np.ndarray

# The largest relative error of rounding to a dtype, and half its smallest number.
ROUNDING = {
    "F64": (2.0**-53, 2.0**-1074),
    "F32": (2.0**-24, 2.0**-150),
    "F16": (2.0**-11, 2.0**-25),
    "BF16": (2.0**-8, 2.0**-134),
}
ARITHMETICS = (
    "float64, rounded once",
    "float32",
    "product rounded before the sum",
    "factors rounded before the product",
)
WIDER = ("products in TF32", "sums in bfloat16")
LISTED = len(ARITHMETICS)
DEAD = LISTED + len(WIDER)  # the level of a hypothesis that every arithmetic refutes
FLUSHED = 2.0**-126  # a GPU may take what is smaller as 0
TF32 = 2.0**-10  # the relative error of a factor, whether it is rounded or cut
ONTO = ("", "nf4", "nf4,double")
ONTO_NAMES = {"nf4": "onto NF4", "nf4,double": "onto double-quantized NF4"}

RIGHT = "right"
NOT_MERGED = "not merged"


class Change(NamedTuple):
    """A way to add dW.

    name        as a verdict has it
    c           the factor of E
    transposed  E^T is added in place of E
    again       dW is added twice, and rounded in between; c is that of one time
    magnitude   is DoRA's magnitude applied?
    """

    name: str
    c: float
    transposed: bool = False
    again: bool = False
    magnitude: bool = True


class Hypothesis(NamedTuple):
    """A change of one V.

    onto         what V is: one of ONTO, "" being W itself
    requantized  the sum was encoded in NF4 once more, and M is what the codes decode to
    """

    change: Change
    onto: str = ""
    requantized: bool = False

    @property
    def name(self) -> str:
        parts = [ONTO_NAMES[self.onto]] if self.onto else []
        parts += ["requantized to NF4"] if self.requantized else []
        is_implied = bool(parts) and self.change.name == RIGHT
        return ", ".join(parts if is_implied else [self.change.name, *parts])


class Scales(NamedTuple):
    """The numbers of an adapter's configuration for one layer, and its s."""

    s: float
    alpha: float
    r: int
    overall: float  # lora_alpha / r of the whole configuration, without its patterns


def list_changes(scales: Scales, is_square: bool, is_dora: bool) -> list[Change]:
    """Every change that a merge of this layer may have made, the right one first."""
    s, alpha, r, overall = scales
    by_r, by_root = alpha / r, alpha / math.sqrt(r)
    is_root = abs(s - by_root) < abs(s - by_r)
    changes = [
        Change(RIGHT, s),
        Change("other root of r", by_r if is_root else by_root),
        Change("alpha not divided by r", alpha),
        Change("alpha ignored", 1.0),
        Change("twice", s, again=True),
        Change("subtracted", -s),
        Change(NOT_MERGED, 0.0, magnitude=False),
    ]
    if overall != s:
        changes.append(Change("patterns ignored", overall))
    if is_square:
        changes.append(Change("transposed", s, transposed=True))
    if is_dora:
        changes.append(Change("DoRA without magnitude", s, magnitude=False))
    return changes


UNCHANGED = [Change(NOT_MERGED, 0.0, magnitude=False)]


def combine(changes: list[Change]) -> Iterator[Hypothesis]:
    """Each change of each V, stored as a number or encoded again."""
    for onto in ONTO:
        for change in changes:
            yield Hypothesis(change, onto)
    for onto in ONTO:
        for change in changes:
            yield Hypothesis(change, onto, True)


# ---- bounds --------------------------------------------------------------------------------------


class Precision(NamedTuple):
    """How a merge may have rounded.

    dtype   of M
    types   the dtypes that a product or a factor may have been rounded to
    coded   dtypes that a sum may have been rounded to before it was encoded, besides these
    """

    dtype: str
    types: tuple[str, ...]
    coded: tuple[str, ...] = ()

    @property
    def unit(self) -> float:
        return max(ROUNDING[dtype][0] for dtype in self.types)

    @property
    def tiny(self) -> float:
        return max(ROUNDING[dtype][1] for dtype in self.types)

    @property
    def second(self) -> tuple[float, float]:
        """The rounding to float16 before or after that to bfloat16; zeros if nothing was in it."""
        return ROUNDING["F16"] if self.dtype == "BF16" and "F16" in self.types else (0.0, 0.0)


class Sizes(NamedTuple):
    """What a bound is made of: absolute values of some numbers, or the norms of rows.

    V, E     |V|, |E|
    G        |B| |A|, which is at least |E|
    H        how far E can move if the factors are rounded first
    sums     of the absolute values of both factors over the rank
    lost     |V - round(V)|, rounding to the dtype of M
    one      1; for the norms of rows of n numbers, sqrt(n)
    """

    V: Any
    E: Any
    G: Any
    H: Any
    sums: Any
    lost: Any
    one: float = 1.0


def compound(n: int, unit: float) -> float:
    """(1 + unit)^n - 1, the largest relative error of n roundings."""
    return math.expm1(n * math.log1p(unit))


def rounding_loss(X: Array, types: tuple[str, ...]) -> Array:
    """|X - round(X)|, the largest over the types; 0 where a type overflows."""
    lost = np.zeros(X.shape)
    for dtype in types:
        error = np.abs(widen(round_to(X, dtype)) - X)
        lost = np.maximum(lost, np.where(np.isfinite(error), error, 0))
    return lost


def half_step(M: Array, dtype: str) -> Array:
    """Half the distance from |M| to the next larger number of the dtype: all that rounding adds."""
    unit, tiny = ROUNDING[dtype]
    _, exponents = np.frexp(M)  # |M| is in [2^(e-1), 2^e); of 0 it is 0, as of numbers near 1
    steps = np.where(M == 0, tiny, np.ldexp(unit, exponents - 1))
    return np.asarray(np.maximum(steps, tiny))


def radius(
    level: int, sizes: Sizes, c: Any, r: int, precision: Precision, again: bool = False
) -> Any:
    """How far an arithmetic's V + c E may be from the float64 one, before the last rounding.

    level   an index of ARITHMETICS + WIDER
    again   the sum is rounded to M's dtype, and c E added once more: the whole is V + 2 c E
    """
    a = np.abs(c)
    size = sizes.V + a * sizes.G
    unit, tiny = precision.unit, precision.tiny
    n = r + 6  # the products and sums of E, c and its factors, the sum
    e = 2 * compound(n, ROUNDING["F64"][0]) * size  # theirs and ours
    if level >= 1:
        single = compound(n, ROUNDING["F32"][0])
        e = e + single * size + FLUSHED * (1 + a) * ((r + 2) * sizes.one + sizes.sums)
    if level >= 2:  # B A, c B A and c are rounded, and V may be
        product = a * (sizes.E + single * sizes.G)
        e = e + compound(3, unit) * product + tiny * (2 + a) * sizes.one + sizes.lost
    if level >= 3:  # A, B and c B are rounded
        factors = a * (sizes.H + unit * (sizes.G + sizes.H)) + tiny * sizes.sums
        e = e + (1 + 8 * unit) * factors
    if level >= 4:
        e = e + compound(2, TF32) * a * sizes.G
    if level >= 5:
        e = e + compound(n, ROUNDING["BF16"][0]) * a * sizes.G
    if level >= 2:
        u, smallest = precision.second
        e = e + u * (size + e) + smallest * sizes.one
    if again:
        u, smallest = ROUNDING[precision.dtype]
        e = 3 * e + 2 * u * (size + e) + smallest * sizes.one
    return e
