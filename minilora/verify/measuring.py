"""A measurement beside its bound, what a claim is, and the few things that most measurements do.

Measured, worst     a number and the most that it may be; of many, the one nearest to its bound or furthest beyond
Property            a claim: its equation, where it comes from, how it is measured, to which cases it applies
differing, run, backward, factors
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import functional as F
from ..autograd import Tensor, gradients
from ..backend import Array
from ..errors import MiniloraError
from ..lora import LoraLinear
from .case import Case


class Measured(NamedTuple):
    """A measurement and its bound; `note` says what went wrong where there is more to say than a number."""

    measured: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.measured <= self.bound < math.inf  # a NaN is never within a bound

    @property
    def ratio(self) -> float:
        """measured / bound: 0 for what is exact, infinite for what should be and is not."""
        if self.bound == 0:
            return 0.0 if self.measured == 0 else math.inf
        return math.inf if math.isnan(self.measured / self.bound) else self.measured / self.bound


@dataclass(frozen=True)
class Property:
    """One claim. `measure` gives a measurement that is at most its bound wherever the claim is true."""

    name: str
    equation: str
    source: str
    measure: Callable[[Case], Measured]
    applies: Callable[[Case], bool]

    def check(self, case: Case) -> Measured:
        """Measure it. What cannot even be computed does not hold: the measurement is then a NaN."""
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.measure(case)
            except (MiniloraError, np.linalg.LinAlgError) as error:
                return Measured(math.nan, 0.0, str(error))


def worst(*pairs: tuple[Any, Any]) -> Measured:
    """Of pairs (error, bound), numbers or arrays of one shape: the entry with the largest error / bound."""
    return max((_worst(error, bound) for error, bound in pairs), key=lambda m: (not m.ok, m.ratio))


def _worst(error: Any, bound: Any) -> Measured:
    error, bound = (np.ravel(a) for a in np.broadcast_arrays(np.abs(error), bound))
    if not error.size:
        return Measured(0.0, 0.0)
    with np.errstate(all="ignore"):
        ratio = np.where((error == 0) & (bound == 0), 0, error / bound)
    hopeless = np.isnan(ratio) | ~np.isfinite(bound)
    at = int(np.argmax(np.where(hopeless, np.inf, ratio)))
    return Measured(float(error[at]), float(bound[at]))


def differing(a: Array, b: Array) -> int:
    """How many entries are not the same bits. A NaN differs from everything."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(int(a.size), int(b.size), 1)
    return int(np.count_nonzero((a != b) | (np.signbit(a) != np.signbit(b))))


def run(layer: Any, x: Array) -> Array:
    """layer(x) as rows (N, O)"""
    return F.rows(layer(Tensor(x)).data)


def backward(layer: LoraLinear, x: Array, G: Array) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    """(y, dX, (dA, dB) of each active adapter) by the autograd engine, as rows."""
    X = Tensor(x, requires_grad=True)
    pairs = [(layer.adapters[name].lora_A, layer.adapters[name].lora_B) for name in layer.active]
    y = layer(X)
    leaves = [X, *(p for pair in pairs for p in pair)]
    found = gradients(y, leaves, G) if y.requires_grad else [None] * len(leaves)
    dX, *rest = (np.full(p.shape, np.nan) if g is None else g for p, g in zip(leaves, found, strict=True))
    return F.rows(y.data), F.rows(dX), list(zip(rest[::2], rest[1::2], strict=True))


def factors(layer: LoraLinear, values: Sequence[tuple[Array, Array]]) -> LoraLinear:
    """The layer, its active adapters holding these (A, B)."""
    for name, (A, B) in zip(layer.active, values, strict=True):
        adapter = layer.adapters[name]
        adapter.lora_A.data, adapter.lora_B.data = A.astype(adapter.lora_A.dtype), B.astype(adapter.lora_B.dtype)
    return layer
