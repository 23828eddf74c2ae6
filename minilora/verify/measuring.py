"""A measurement beside its bound, what a claim is, and the few things that most measurements do.

Measured, worst     a number and the most that it may be; of many, the one nearest to its bound or furthest beyond
Property, listing   a claim: its equation, where it comes from, how it is measured, to which cases it applies
lora, dora, ...     the kinds of cases
differing, run, backward, slopes, factors, counted
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import functional as F
from ..autograd import Tensor, gradients
from ..backend import Array
from ..errors import MiniloraError
from ..lora import AdaLoraAdapter, DoraAdapter, LoraAdapter, LoraLinear
from .case import Case, Formula

# ---- a measurement, and a claim -------------------------------------------------------------------------------------


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


Measure = Callable[[Case], Measured]
Applies = Callable[[Case], bool]


def listing(into: list[Property], usual: Applies) -> Callable[..., Callable[[Measure], Measure]]:
    """`holds(name, equation, source, when=usual)`: put a measurement into the list, beside what it is a measure of."""

    def holds(
        name: str, equation: str, source: str, when: Applies = usual
    ) -> Callable[[Measure], Measure]:
        def add(measure: Measure) -> Measure:
            into.append(Property(name, equation, source, measure, when))
            return measure

        return add

    return holds


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


# ---- to which cases a property applies ------------------------------------------------------------------------------


def _all(case: Case, *kinds: type) -> bool:
    return all(type(a) in kinds for a in case.subject.adapters.values())


def always(case: Case) -> bool:
    return True


def lora(case: Case) -> bool:
    """All adapters are plain LoRA: dW = s B A, and nothing else."""
    return _all(case, LoraAdapter)


def dora(case: Case) -> bool:
    return _all(case, DoraAdapter)


def adalora(case: Case) -> bool:
    return _all(case, AdaLoraAdapter)


def adds(case: Case) -> bool:
    """What adapters add is s B A x: LoRA's, and AdaLoRA's with diag(E) A for A."""
    return _all(case, LoraAdapter, AdaLoraAdapter)


def ranked(case: Case) -> bool:
    """Every adapter has triplets, or rows and columns: from some layers AdaLoRA takes all."""
    return all(a.r for a in case.subject.adapters.values())


def coded(case: Case) -> bool:
    """The base holds codes, and what they were made of is known."""
    return case.weight is not None


# ---- what most measurements do --------------------------------------------------------------------------------------


def differing(a: Array, b: Array) -> int:
    """How many entries are not the same bits. A NaN differs from everything."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(int(a.size), int(b.size), 1)
    return int(np.count_nonzero((a != b) | (np.signbit(a) != np.signbit(b))))


def run(layer: Any, x: Array) -> Array:
    """layer(x) as rows (N, O)"""
    return F.rows(layer(Tensor(x)).data)


def backward(layer: LoraLinear, x: Array, G: Array) -> tuple[Array, Array, list[tuple[Array, ...]]]:
    """(y, dX, the gradients of each active adapter in the order of its TENSORS) by the autograd engine, as rows."""
    X = Tensor(x, requires_grad=True)
    held = [
        [getattr(a, name) for name in a.TENSORS]
        for a in (layer.adapters[name] for name in layer.active)
    ]
    y = layer(X)
    leaves = [X, *(p for parameters in held for p in parameters)]
    found = gradients(y, leaves, G) if y.requires_grad else [None] * len(leaves)
    dX, *rest = (
        np.full(p.shape, np.nan) if g is None else g for p, g in zip(leaves, found, strict=True)
    )
    each = iter(rest)
    return (
        F.rows(y.data),
        F.rows(dX),
        [tuple(next(each) for _ in parameters) for parameters in held],
    )


def slopes(
    case: Case, layer: LoraLinear, exact: Formula, G: Array, found: Sequence[tuple[Array, ...]]
) -> Iterator[tuple[Array, Array]]:
    """(error, bound) of the gradients of LoRA's and AdaLoRA's tensors, in their order.    G = dL/dy (N, O)

    dA: O roundings in G B, two with s, N in (.)^T X. dB: I in X A^T, N in G^T (.), two with s. gamma_n S of each.
    AdaLoRA's first is that of diag(E) A: dA is E times it, dE its sum along A, one and I + 1 more.
    """
    (N, I), O, absolute = exact.X.shape, G.shape[1], abs(exact)
    for i, (name, (dA, *dE, dB)) in enumerate(zip(layer.active, found, strict=True)):
        P, S, ada = exact.dA(G, i), absolute.dA(abs(G), i), len(dE)
        if dE:
            adapter = layer.adapters[name]
            A, E = (getattr(adapter, name).data.astype(P.dtype) for name in ("lora_A", "lora_E"))
            along, size = ((z * a).sum(axis=1, keepdims=True) for z, a in ((P, A), (S, abs(A))))
            yield dE[0] - along, case.gamma(O + N + I + 3, size)
            P, S = E * P, abs(E) * S
        yield dA - P, case.gamma(O + N + 2 + ada, S)
        yield dB - exact.dB(G, i), case.gamma(I + N + 2 + ada, absolute.dB(abs(G), i))


def factors(layer: LoraLinear, values: Sequence[tuple[Array, ...]]) -> LoraLinear:
    """The layer, the tensors of its active adapters holding these values, in the order of their TENSORS."""
    for name, arrays in zip(layer.active, values, strict=True):
        adapter = layer.adapters[name]
        for tensor, array in zip(adapter.TENSORS, arrays, strict=True):
            p = getattr(adapter, tensor)
            p.data = array.astype(p.dtype)
    return layer


def counted(case: Case, numbers: Callable[[int, int, int], int]) -> Measured:
    """Is each adapter as large as numbers(r, I, O) says: its parameters, and its shapes, known before there are any?"""
    base, wrong = case.subject.base_layer, 0
    for a in case.subject.adapters.values():
        expected = numbers(a.r, base.in_features, base.out_features)
        planned = sum(math.prod(shape) for shape in a.shapes(base, a.r).values())
        wrong += abs(sum(p.size for p in a.parameters()) - expected) + abs(planned - expected)
    return worst((wrong, 0))
