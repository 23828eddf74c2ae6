"""Merging: adapters summed into a copy of a weight, for models and for checkpoints on disk alike.

    W' = round(W + sum_i c_i B_i A_i + sum_j c_j dW_j)    dW_j of a method without factors
    W' = round(k (W + c B A)),  k = m / |W + c B A| by row        for DoRA

The sum is float64, k included, and is rounded once, to the dtype in which the weight is stored. It
is formed a few rows at a time. The blocks depend on the shape alone, the order of the terms on
their numbers, and BLAS has one thread: a model and a tool that merge the same adapters, in whatever
order, get the same bits.

merge_weight   the sum, on arrays
Merging        what a wrapper around a layer can do: merge, and unmerge bit for bit
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..autograd import Tensor, record
from ..backend import Array
from ..errors import GraphError, NonFiniteError
from ..formats.dtypes import CODES, empty_as, round_to, row_blocks, widen
from ..nn import Embedding, LinearBase, Parameter, frozen_linear
from ..quant.half import Half, HalfLinear, HalfWeight
from ..threads import one_blas_thread
from .factors import Dense, Part, cat, singular_values

P = TypeVar("P", Part, Dense)
Map = Callable[[Callable[[slice], Any], Iterable[slice]], Iterator[Any]]


class Merged(NamedTuple):
    """A weight W' as it is stored, and two Frobenius norms.

    lost    |W' - V|, what rounding took from the float64 sum V
    moved   |V - W|; None where it is the norm of the factors' product
    """

    weight: Array
    lost: float
    moved: float | None

    def size(self, parts: Sequence[Part]) -> float:
        """|V - W|, the norm of the change by `parts`; infinite if a factor's square overflows."""
        if self.moved is not None:
            return self.moved
        with np.errstate(over="ignore"):
            return float(np.linalg.norm(singular_values(*cat(parts), 1)))

    def share_lost(self, parts: Sequence[Part]) -> float:
        """|W' - V| / |V - W|: 0 if rounding took nothing, 1 as if dW had been zero."""
        size = self.size(parts)
        return self.lost / size if size else 0.0


def merge_weight(
    W: Array,
    parts: Sequence[Part | Dense],
    dtype: str,
    table: bool = False,
    out: Array | None = None,
    over: Map = map,
) -> Merged:
    """W + sum of `parts` in float64, rounded once to `dtype`; NaN or inf where the sum is.

    W       (O, I) as it is stored: floats, or uint16 for bfloat16
    parts   one or more; only one if it is DoRA's
    dtype   "F64", "F32", "F16" or "BF16"
    table   W is an embedding's table (V, C): the transpose of the matrix that the parts add to
    out     where the result is written; it may be W itself. None: a new array
    over    maps a function over blocks of rows, in their order; perhaps in threads
    """
    m = getattr(parts[0], "m", None)
    dense = sort_parts([part for part in parts if isinstance(part, Dense)])
    factors = [part for part in parts if isinstance(part, Part)]
    is_measured = m is not None or bool(dense)  # is |V - W| to be added up here?
    if factors:
        A, B = cat(sort_parts(factors))
        left, right = (A.T, B.T) if table else (B, A)
        left = np.ascontiguousarray(left)
        right = np.ascontiguousarray(right)
    if out is None:
        out = empty_as(W.shape, dtype)

    @np.errstate(all="ignore")  # here, because each thread has its own error state
    def squared_norms(at: slice) -> Array:
        V = left[at] @ right
        V += widen(W[at])
        return np.asarray(np.einsum("io,io->o" if table else "oi,oi->o", V, V))

    def change_rows(at: slice) -> Array:
        """The rows `at` of what the parts add, in float64."""
        V = left[at] @ right if factors else np.zeros(W[at].shape)
        for part in dense:
            V += part.c * part.dW[at]
        return V

    @np.errstate(all="ignore")
    def merge_block(at: slice) -> tuple[float, float]:
        V = change_rows(at)
        before = widen(W[at])
        V += before
        moved = 0.0
        if m is not None:
            V *= k if table else k[at, None]
        if is_measured:
            change = V - before
            moved = float(np.vdot(change, change))
        out[at] = round_to(V, dtype)
        V -= widen(out[at])
        return float(np.vdot(V, V)), moved

    with one_blas_thread():
        blocks = row_blocks(W.shape)
        if m is not None:
            squares = list(over(squared_norms, blocks))
            k = _scale(m, np.sum(squares, axis=0) if table else np.hstack([[], *squares]))
        sums = list(over(merge_block, blocks))
    lost = math.sqrt(math.fsum(lost for lost, _ in sums))
    moved = math.sqrt(math.fsum(moved for _, moved in sums))
    return Merged(out, lost, moved if is_measured else None)


def sort_parts(parts: Sequence[P]) -> Sequence[P]:
    """The parts in an order that depends on their numbers alone: so do the bits of their sum."""

    def numbers(part: P) -> list[Any]:
        return [value.tobytes() if isinstance(value, np.ndarray) else value for value in part]

    return parts if len(parts) == 1 else sorted(parts, key=numbers)


@np.errstate(all="ignore")
def _scale(m: Array, squares: Array) -> Array:
    """k = m / |V| for each row of V: 1 where the norm is 0, NaN where its square overflows."""
    norms = np.sqrt(squares)
    k = np.where(norms == 0, 1, m / norms)
    return np.where(np.isfinite(norms), k, np.nan)


def merge_rows(W: Array, rows: Sequence[int] | np.ndarray, values: Array, dtype: str) -> Merged:
    """W (V, C), stored as `dtype`, with float64 `values` (n, C) rounded once as its `rows`."""
    at = list(rows)
    out = W.copy()
    with np.errstate(all="ignore"):
        out[at] = round_to(values, dtype)
        lost = float(np.linalg.norm(widen(out[at]) - values))
        moved = float(np.linalg.norm(values - widen(W[at])))
    return Merged(out, lost, moved)


class Merging:
    """The part of a wrapper that merges its adapters into a copy of its base layer.

    A merged adapter's parameters have no gradient: the forward pass reads the merged weight. So a
    backward pass that would need one raises, and never leaves it out in silence.

    leader     for a head whose adapters are its embedding's: the embedding's wrapper, merged first
    follower   a plain module that shares the base's weight, and gets the merged one too
    original   the base layer as it was before anything was merged
    """

    ATTRIBUTES = "base_layer", "adapters"
    active: Sequence[str]  # this and the next two are the wrapper's
    merged: tuple[str, ...]
    requantized: bool
    # With an underscore, because named_children() must leave these out.
    _leader: Merging | None = None
    _follower: Any = None
    _original: Any = None  # the base while adapters are merged into a copy of it

    def __init__(self, base_layer: Any, adapters: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = {} if adapters is None else adapters

    current = property(lambda self: self.base_layer)
    leader = property(lambda self: self._leader)
    follower = property(lambda self: self._follower)
    original = property(lambda self: self._original or self.base_layer)

    def follow(self, leader: Merging) -> None:
        """Have the weight of `leader` whenever both have the same adapters merged."""
        self._leader = leader

    def lead(self, follower: Any) -> None:
        """Give `follower`, a plain module, what is merged here from now on; None: no module."""
        self._follower = follower

    def merge(self, names: Sequence[str] | None = None, requantize: bool = False) -> None:
        """Put adapters (the active ones) into a copy of the base: one float64 sum, rounded once.

        The base itself stays, so `unmerge` restores every bit. NonFiniteError for a NaN or inf in
        the sum; nothing changes then. A dense base stays dense; one in 16 bits stays in 16 bits,
        and its weight's `lost` says what part of dW rounding took. A base of codes becomes dense,
        unless `requantize`: then the sum is coded again, and the layer's `lost` says what that
        took.
        """
        wanted = self.active if names is None else names
        every = dict.fromkeys([*self.merged, *(n for n in wanted if n in self.adapters)])
        if len(every) == len(self.merged) and (not every or requantize == self.requantized):
            return
        names = tuple(every)
        self.result(names)  # type: ignore[attr-defined]  # raises if they cannot be merged together
        base = self.original
        self.base_layer = self._merged_layer(base, names, requantize)
        self._original = base
        self.merged = names
        self.requantized = requantize
        self._share_weight()

    def unmerge(self) -> None:
        """Take all merged adapters out again: the original base comes back, bit for bit."""
        if self._original is None:
            return
        self.base_layer = self._original
        self._original = None
        self.merged = ()
        self.requantized = False
        self._share_weight()

    def set_compute(self, compute: str) -> None:
        for layer in (self.original, self.base_layer):
            layer.set_compute(compute)

    # ---- no training while merged ----

    @property
    def missed_parameters(self) -> tuple[Parameter, ...]:
        """The parameters of merged adapters that require a gradient and would get none."""
        missed: list[Parameter] = []
        for name in self.merged:
            missed += (p for p in self.adapters[name].parameters() if p.requires_grad)
        return tuple(missed)

    def refuse_gradients(self, y: Tensor) -> Tensor:
        """y, whose backward raises GraphError if a merged adapter would miss its gradient there."""
        missed = self.missed_parameters
        return record(y.data, (y, *missed), self.raise_merged) if missed else y

    def raise_merged(self, *_: Array) -> Any:
        """Always GraphError: what takes the place of the gradient of merged adapters."""
        names = ", ".join(map(repr, self.merged))
        raise GraphError(
            f"adapter {names} is merged, so its parameters have no gradient: call "
            "unmerge_adapter() before training"
        )

    def _share_weight(self) -> None:
        """Make a weight that embedding and head share one parameter again; see tying.py."""
        if self.leader is not None and self.leader.merged == self.merged:
            self.base_layer.weight = self.leader.base_layer.weight
        if self.follower is not None:
            self.follower.weight = self.base_layer.weight

    def _merged_layer(self, base: Any, names: Sequence[str], requantize: bool) -> Any:
        """A frozen layer like `base` over its weight with these adapters in it."""
        half = base.weight.quantized if isinstance(base.weight, HalfWeight) else None
        backend = base.weight.backend
        if half is not None:
            stored = half.codes
            kind = half.kind
        else:
            stored = base.weight.data if isinstance(base, Embedding) else base.dense_weight()
            kind = str(stored.dtype)
        merged, parts = self._merge_into(backend.to_numpy(stored), CODES[kind], names)
        if not np.isfinite(widen(merged.weight)).all():
            raise NonFiniteError(
                f"merging {', '.join(names)} gives weights that are not finite in {kind}: "
                "`minilora inspect` names broken values of an adapter's folder"
            )
        weight = backend.from_numpy(merged.weight)
        if half is not None:
            made = HalfWeight(Half(kind, weight), base.weight.dtype)
            made.lost = merged.share_lost(parts)
            return self._move_bias(_with_weight(base, made), names)
        if requantize and isinstance(base, LinearBase):
            return self._move_bias(base.rebuilt(weight), names)
        return self._move_bias(_with_weight(base, Parameter(weight, False)), names)

    def _move_bias(self, made: Any, names: Sequence[str]) -> Any:
        """`made`, a layer like the base, with what the adapters `names` make of the base's bias."""
        return made

    def _merge_into(
        self, W: Array, dtype: str, names: Sequence[str]
    ) -> tuple[Merged, Sequence[Part]]:
        """W, stored as `dtype`, with these adapters in it, and the parts that were summed."""
        parts = [self.adapters[name].part(W) for name in names]
        return merge_weight(W, parts, dtype, isinstance(self.original, Embedding)), parts

    def delta_weight(self, name: str) -> np.ndarray:
        """dW (O, I) of one adapter, in float64 on the host."""
        base = self.as_linear(self.original)
        W = base.dense_weight().astype(np.float64)
        return base.backend.to_numpy(self.adapters[name].delta_weight(W))

    def as_linear(self, base: Any) -> LinearBase:
        """The base as the linear layer that its adapters add to."""
        return base  # type: ignore[no-any-return]


def _with_weight(base: Any, weight: Parameter) -> Any:
    """A frozen layer like `base` over another weight, in 16 bits if `weight` is."""
    if isinstance(base, Embedding):
        made = copy.copy(base)
        made.weight = weight
        return made
    if isinstance(weight, HalfWeight):
        return HalfLinear(weight, base)
    return frozen_linear(weight.data, base)
