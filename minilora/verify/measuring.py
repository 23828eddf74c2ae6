"""A measurement beside its bound, what a claim is, and what most measurements have in common.

Measured                  a number and the most that it may be
compare, worst            the entry that comes nearest to its bound, or is furthest beyond it
Property, make_registrar  a claim: its equation, its source, its measurement, its cases
is_lora, is_dora, ...     the kinds of cases
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
from ..errors import MiniloraError, NonFiniteError
from ..lora import AdaLoraAdapter, DoraAdapter, LoraAdapter, LoraLinear
from ..lora.maps.adapter import MapAdapter
from .case import Case, Formula, active_adapters

# ---- a measurement, and a claim ------------------------------------------------------------------


class Measured(NamedTuple):
    """A measurement and its bound; `note` is the message where it could not be computed."""

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
        ratio = self.measured / self.bound
        return math.inf if math.isnan(ratio) else ratio

    @property
    def badness(self) -> tuple[bool, float]:
        """A sort key: the worst measurement has the largest."""
        return not self.ok, self.ratio


Measure = Callable[[Any], Measured]
Applies = Callable[[Any], bool]
Registrar = Callable[..., Callable[[Measure], Measure]]


@dataclass(frozen=True)
class Property:
    """One claim. Wherever it holds, `measure` gives a measurement that is at most its bound.

    is_true   False for a claim that looks like a true one: it has to fail, wherever it applies
    """

    name: str
    equation: str
    source: str
    measure: Measure
    applies: Applies
    is_true: bool = True

    def check(self, case: Any) -> Measured:
        """Measure it on a Case or a Study. What cannot be computed is a NaN, and does not hold."""
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.measure(case)
            except (MiniloraError, np.linalg.LinAlgError) as error:
                return Measured(math.nan, 0.0, str(error))


def make_registrar(properties: list[Property], usual: Applies, is_true: bool = True) -> Registrar:
    """A decorator `holds(name, equation, source, when=usual)`, which appends to `properties`."""

    def holds(
        name: str, equation: str, source: str, when: Applies = usual
    ) -> Callable[[Measure], Measure]:
        def add(measure: Measure) -> Measure:
            properties.append(Property(name, equation, source, measure, when, is_true))
            return measure

        return add

    return holds


def compare(error: Any, bound: Any) -> Measured:
    """The entry with the largest |error| / bound, of numbers or arrays that broadcast."""
    error, bound = np.broadcast_arrays(np.abs(error), bound)
    if not error.size:
        return Measured(0.0, 0.0)
    with np.errstate(all="ignore"):
        ratio = error / bound
    worst_entry = np.argmax(ratio)  # the first NaN, if there is one
    if np.isnan(ratio.flat[worst_entry]) or not bound.max() < np.inf:
        exact = (error == 0) & (bound == 0)
        ratio = np.where(exact, 0, ratio)
        hopeless = np.isnan(ratio) | ~np.isfinite(bound)
        ratio = np.where(hopeless, np.inf, ratio)
        worst_entry = np.argmax(ratio)
    return Measured(float(error.flat[worst_entry]), float(bound.flat[worst_entry]))


def worst(*pairs: tuple[Any, Any]) -> Measured:
    """The worst entry of all pairs (error, bound)."""
    measured = [compare(error, bound) for error, bound in pairs]
    return max(measured, key=lambda m: m.badness)


def expect_zero(wrong: Any) -> Measured:
    """For a claim without rounding: the number of entries that are wrong, which must be 0."""
    return Measured(float(abs(wrong)), 0.0)


# ---- to which cases a property applies -----------------------------------------------------------


def has_only(case: Case, *kinds: type) -> bool:
    return all(type(adapter) in kinds for adapter in case.adapters.values())


def always(case: Any) -> bool:
    return True


def has_factors(case: Case) -> bool:
    """Every adapter has factors A and B: LoRA, DoRA, AdaLoRA."""
    return not any(isinstance(adapter, MapAdapter) for adapter in case.adapters.values())


def is_lora(case: Case) -> bool:
    """All adapters are plain LoRA: dW = s B A, and nothing else."""
    return has_only(case, LoraAdapter)


def is_dora(case: Case) -> bool:
    return has_only(case, DoraAdapter)


def is_adalora(case: Case) -> bool:
    return has_only(case, AdaLoraAdapter)


def is_additive(case: Case) -> bool:
    """What adapters add is s B A x: LoRA's, and AdaLoRA's with diag(E) A for A."""
    return has_only(case, LoraAdapter, AdaLoraAdapter)


def has_rank(case: Case) -> bool:
    """Every adapter has factors, and r > 0: AdaLoRA takes all triplets from some layers."""
    return has_factors(case) and all(adapter.r for adapter in case.adapters.values())


def is_dense(case: Case) -> bool:
    """The base has no codes of a known weight: for a property that does not read the base."""
    return case.w is None


def has_codes(case: Case) -> bool:
    """The base has codes, and the weight that they were made from is known."""
    return case.w is not None


# ---- counts of what is wrong ---------------------------------------------------------------------


def count_nonzeros(a: Array) -> int:
    return int(np.count_nonzero(a))


def count_differences(a: Array, b: Array) -> int:
    """How many entries are not the same bits. A NaN differs from everything."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(int(a.size), int(b.size), 1)
    return count_nonzeros((a != b) | (np.signbit(a) != np.signbit(b)))


def count_parameters(case: Case, formula: Callable[[int, int, int], int]) -> Measured:
    """How far the size of each adapter is from formula(r, I, O).

    Its size is that of its parameters, and that of its shapes, which are known before them.
    """
    base = case.base
    wrong = 0
    for adapter in case.adapters.values():
        expected = formula(adapter.r, base.in_features, base.out_features)
        shapes = adapter.shapes(base, adapter.r).values()
        planned = sum(math.prod(shape) for shape in shapes)
        actual = sum(p.size for p in adapter.parameters())
        wrong += abs(actual - expected) + abs(planned - expected)
    return expect_zero(wrong)


# ---- tensors of adapters, and their gradients ----------------------------------------------------


def tensors_of(adapter: Any) -> list[Any]:
    """The parameters of an adapter in the order of its TENSORS."""
    return [getattr(adapter, name) for name in adapter.TENSORS]


def set_tensors(layer: LoraLinear, values: Sequence[Sequence[Array]]) -> None:
    """Give the tensors of each active adapter these values, in the order of its TENSORS."""
    for adapter, arrays in zip(active_adapters(layer), values, strict=True):
        for p, array in zip(tensors_of(adapter), arrays, strict=True):
            p.data = array.astype(p.dtype)


def backward(
    case: Case, layer: LoraLinear, dY: Array
) -> tuple[Array, Array, list[tuple[Array, ...]]]:
    """(y, dX, the gradients of each active adapter in the order of its TENSORS), y and dX as rows.

    The autograd engine computes them. A gradient that it does not give is a NaN.
    """
    X = Tensor(case.x, requires_grad=True)
    groups = [tensors_of(adapter) for adapter in active_adapters(layer)]
    leaves = [X]
    for group in groups:
        leaves += group
    y = layer(X)
    slopes = gradients(y, leaves, dY) if y.requires_grad else [None] * len(leaves)
    arrays = []
    for leaf, slope in zip(leaves, slopes, strict=True):
        arrays.append(np.full(leaf.shape, np.nan) if slope is None else slope)
    dX, *rest = arrays
    remaining = iter(rest)
    by_adapter = [tuple(next(remaining) for _ in group) for group in groups]
    return F.rows(y.data), F.rows(dX), by_adapter


def gradient_errors(
    case: Case, layer: LoraLinear, exact: Formula, G: Array, slopes: Sequence[tuple[Array, ...]]
) -> Iterator[tuple[Array, Array]]:
    """(error, bound) of the gradients of LoRA's and AdaLoRA's tensors, in their order.

    G = dL/dy (N, O). The bound is gamma_n S of each: dA has O roundings in G B, two with s, N in
    (.)^T X; dB has I in X A^T, N in G^T (.), two with s. AdaLoRA's first is the gradient of
    diag(E) A: dA is E times it, dE its sum along A, with one and I + 1 more.
    """
    N, I = exact.X.shape
    O = G.shape[1]
    absolute = abs(exact)
    for i, (adapter, (dA, *dE, dB)) in enumerate(zip(active_adapters(layer), slopes, strict=True)):
        P = exact.dA(G, i)
        S = absolute.dA(abs(G), i)
        if dE:
            A = adapter.lora_A.data.astype(P.dtype)
            E = adapter.lora_E.data.astype(P.dtype)
            exact_dE = (P * A).sum(axis=1, keepdims=True)
            S_E = (S * abs(A)).sum(axis=1, keepdims=True)
            yield dE[0] - exact_dE, case.gamma(O + N + I + 3, S_E)
            P = E * P
            S = abs(E) * S
        yield dA - P, case.gamma(O + N + 2 + len(dE), S)
        S_B = absolute.dB(abs(G), i)
        yield dB - exact.dB(G, i), case.gamma(I + N + 2 + len(dE), S_B)


# ---- decompositions, and bounds in float64 -------------------------------------------------------


def update_error(case: Case, layer: LoraLinear) -> float:
    """The norm of what dW = s B A, formed in float64, may err by: gamma_(r+2) |s| |B| |A|."""
    [adapter] = active_adapters(layer)
    S = abs(case.formula(layer)).dW()
    error = case.gamma(adapter.r + 2, S, np.float64)
    return float(np.linalg.norm(error.astype(float)))


def project(dW: Array, B: Array) -> tuple[Array, Array]:
    """(Q, T): an orthonormal basis Q (O, k) of B's columns, T = Qᵀ dW (k, I);  k = min(r, O).

    If dW = s B A, then Q Qᵀ dW = dW: Q T is dW with its factors in sight, and dW's singular values
    are those of the small T. Whatever dW is, Q T has rank r at most, and dW - Q T shows what it
    lacks.
    """
    require_finite(dW)
    Q, _ = np.linalg.qr(B.astype(np.float64))
    return Q, Q.T @ dW


def leading_terms(W: Array, k: int) -> tuple[Array, Array, Array]:
    """U (O, k), σ (k,), Vt (k, I) in float64: the first k terms of W's SVD, or all if fewer.

    The singular vectors of a float32's W are eigenvectors of WᵀW in float64, which has twice the
    digits, and σ = |W v|: the same as by LAPACK's SVD, in a third of the time. A σₖ so small beside
    σ₁ that its square is lost needs the SVD itself, and so does float64.
    """
    require_finite(W)
    wide = W.astype(np.float64)
    if W.dtype == np.float32:
        O, I = W.shape
        tall = wide if O >= I else wide.T
        _, V = np.linalg.eigh(tall.T @ tall)  # rising
        V = V[:, ::-1][:, :k]
        WV = tall @ V
        sigma = np.linalg.norm(WV, axis=0)
        if sigma[-1] > 2.0**-16 * sigma[0]:
            U = WV / sigma
            return (U, sigma, V.T) if O >= I else (V, sigma, U.T)
    U, sigma, Vt = np.linalg.svd(wide, full_matrices=False)
    return U[:, :k], sigma[:k], Vt[:k]


def spectral_norm(M: Array) -> float:
    """|M|₂, which is σ₁; for float32 the root of MᵀM's largest eigenvalue, in float64."""
    require_finite(M)
    if M.dtype != np.float32:
        return float(np.linalg.norm(M, 2))
    wide = M.astype(np.float64)
    O, I = M.shape
    squares = np.linalg.eigvalsh(wide.T @ wide if O >= I else wide @ wide.T)
    return math.sqrt(max(squares[-1], 0.0))


def require_finite(M: Array) -> None:
    """LAPACK's decomposition of a matrix that is not finite may never end."""
    if not np.isfinite(M).all():
        raise NonFiniteError("a matrix to decompose is not finite")


def svd_error(shape: Sequence[int], largest: float, count: int = 1) -> Any:
    """What singular values may err by in `count` decompositions: max(I, O) eps sigma_1 for each.

    The matrices are float64's. Golub & Van Loan 2013, section 5.4.1; also NumPy's matrix_rank.
    """
    return count * max(shape) * np.finfo(np.float64).eps * largest
