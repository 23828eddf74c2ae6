"""Which hypotheses explain one tensor of a merged checkpoint.

The tensor is read a few rows at a time. Every hypothesis is tried on the first rows, where nearly
all wrong ones are refuted; those that remain are tried on all others. So memory is constant, and
the time is that of a merge.

Everything has the layout of the file: rows are outputs, or inputs where it stores W transposed (an
embedding's table, GPT-2's linear layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError
from ..formats.dtypes import BLOCK, round_to, widen
from ..lora.factors import Part
from ..quant.codes import LEVELS, block_absmax, double_absmax, encode
from ..threads import Workers, blocks
from .hypotheses import (
    DEAD,
    LISTED,
    NOT_MERGED,
    ROUNDING,
    UNCHANGED,
    Change,
    Hypothesis,
    Precision,
    Scales,
    Sizes,
    combine,
    compound,
    half_step,
    list_changes,
    radius,
    rounding_loss,
)

Array = np.ndarray
NF4_BLOCK = 64
SCOUT = 1 << 10  # numbers on which every hypothesis is tried
PICKS = 1 << 13  # numbers whose bounds are computed at a time
FEW = 1 << 8  # of them at first


class Pair(NamedTuple):
    """A tensor of the base and the merged one, to be read by rows.

    name          for messages
    shape         of both
    dtype         of the merged one
    base, merged  rows -> bits
    by_columns    are the columns the outputs?
    encodable     may it be in NF4? True for linear layers
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: Callable[[slice], Array]
    merged: Callable[[slice], Array]
    by_columns: bool = False
    encodable: bool = False

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def runs_down(self) -> bool:
        """Does each block of NF4 run down one column?"""
        return self.by_columns and self.shape[0] % NF4_BLOCK == 0

    def row_slices(self) -> list[slice]:
        """The rows in parts, the first of them small; no block of NF4 is in two of them."""
        unit = 1
        if self.encodable:
            unit = NF4_BLOCK // math.gcd(self.columns, NF4_BLOCK)
            if self.by_columns:
                unit = NF4_BLOCK if self.runs_down else self.shape[0]
        group = unit * self.columns
        first = min(self.shape[0], unit * max(1, SCOUT // group))
        parts = [slice(0, first)]
        for rows in blocks(self.shape[0] - first, unit * max(1, BLOCK // group)):
            parts.append(slice(rows.start + first, rows.stop + first))
        return parts


@dataclass
class Block:
    """Some rows: W and M in float64, M's bits, and what has been computed for them."""

    rows: slice
    W: Array
    M: Array
    bits: Array
    V: dict[str, Array] = field(default_factory=dict)
    E: dict[bool, Array] = field(default_factory=dict)
    codes: Any = ...  # of M in NF4; None if it has none, ... if that is not known


class Factors:
    """E = left @ right, with what bounds need. left (R, r), right (r, C)."""

    def __init__(self, left: Array, right: Array, types: tuple[str, ...]) -> None:
        self.left = np.ascontiguousarray(left)
        self.right = np.ascontiguousarray(right)
        self.sides = np.abs(self.left), np.ascontiguousarray(np.abs(self.right.T))
        losses = [rounding_loss(side, types) for side in (self.left, self.right.T)]
        self.losses = losses[0], np.ascontiguousarray(losses[1])

    @property
    def r(self) -> int:
        return self.left.shape[1]

    def product(self, rows: slice) -> Array:
        return np.asarray(self.left[rows] @ self.right)

    def sizes(self, i: Array, j: Array) -> tuple[Array, Array, Array]:
        """G, H and sums of `Sizes` for the numbers in rows i and columns j."""
        left, right = self.sides[0][i], self.sides[1][j]
        left_lost, right_lost = self.losses[0][i], self.losses[1][j]
        G = np.einsum("nr,nr->n", left, right)
        H = np.einsum("nr,nr->n", left_lost, right + right_lost)
        H += np.einsum("nr,nr->n", left, right_lost)
        return G, H, left.sum(axis=1) + right.sum(axis=1)

    def norms(self, by_columns: bool) -> tuple[Array, Array, Array]:
        """The same for the norms of all numbers of each output."""
        first = int(by_columns)
        output, other = self.sides[first], np.linalg.norm(self.sides[1 - first], axis=0)
        output_lost = self.losses[first]
        other_lost = np.linalg.norm(self.losses[1 - first], axis=0)
        count = len(self.sides[1 - first])
        total = self.sides[1 - first].sum(axis=1).max(initial=0)
        G = output @ other
        H = output_lost @ (other + other_lost) + output @ other_lost
        return G, H, math.sqrt(count) * (output.sum(axis=1) + total)


class Lengths(NamedTuple):
    """Sums over the numbers of each output: of V^2, of V E and of E^2."""

    VV: Array
    VE: Array
    EE: Array


class Layer:
    """A tensor of a merge, with all that hypotheses make of it.

    part   what the adapter adds; None for a tensor without an adapter
    """

    def __init__(
        self, pair: Pair, part: Part | None, scales: Scales | None, precision: Precision
    ) -> None:
        self.pair = pair
        self.precision = precision
        self.m = None if part is None else part.m
        self.factors: dict[bool, Factors] = {}
        self.changes = UNCHANGED
        if part is not None and scales is not None:
            square = len(pair.shape) == 2 and pair.shape[0] == pair.shape[1]
            left, right = (part.A.T, part.B.T) if pair.by_columns else (part.B, part.A)
            self.factors[False] = Factors(left, right, precision.types)
            if square:
                self.factors[True] = Factors(right.T, left.T, precision.types)
            self.changes = list_changes(scales, square, self.m is not None)
        self._absmax: Array | None = None
        self._lengths: dict[tuple[str, bool], Lengths] = {}

    def hypotheses(self, with_codes: bool) -> Iterator[Hypothesis]:
        for hypothesis in combine(self.changes):
            is_plain = not (hypothesis.onto or hypothesis.requantized)
            if is_plain or (with_codes and self.pair.encodable):
                yield hypothesis

    def read(self, rows: slice) -> Block:
        W = widen(self.pair.base(rows)).astype(np.float64)
        if not np.isfinite(W).all():
            raise FormatError(f"{self.pair.name} of the base is NaN or infinite: use another base")
        bits = self.pair.merged(rows)
        with np.errstate(invalid="ignore"):  # a signalling NaN
            M = widen(bits).astype(np.float64)
        flat = (len(W), self.pair.columns)
        return Block(rows, W.reshape(flat), M.reshape(flat), bits.reshape(flat))

    # ---- V, E and k ----

    def V(self, block: Block, onto: str) -> Array:
        """What the update is added to, in float64."""
        if not onto:
            return block.W
        if onto not in block.V:
            block.V[onto] = self._decoded(block, onto == "nf4,double")
        return block.V[onto]

    def oriented(self, rows: Array) -> Array:
        """Rows of the file as rows of W (O, I), along which blocks of NF4 run; or back."""
        return np.ascontiguousarray(rows.T) if self.pair.by_columns else rows

    def _decoded(self, block: Block, double: bool) -> Array:
        quantized = encode(self.oriented(block.W))
        if double:
            absmax = self._double_absmax()[self._places(block.rows)].reshape(-1)
            quantized = with_fields(quantized, absmax=absmax)
        return self.oriented(quantized.decode(np.float64))

    def _places(self, rows: slice) -> Any:
        """Where the absmax of some rows are in the array that has all of them."""
        if self.pair.runs_down:
            return slice(None), slice(rows.start // NF4_BLOCK, -(-rows.stop // NF4_BLOCK))
        if self.pair.by_columns:  # blocks run from one column to the next, and all rows are read
            return slice(None)
        start, stop = rows.start * self.pair.columns, rows.stop * self.pair.columns
        return slice(start // NF4_BLOCK, -(-stop // NF4_BLOCK))

    def _double_absmax(self) -> Array:
        """The absmax of all blocks, decoded from their codes: (blocks,), or (O, blocks / O)."""
        if self._absmax is None:
            parts = []
            for rows in self.pair.row_slices():
                W = widen(self.pair.base(rows)).reshape(-1, self.pair.columns)
                absmax = _absmax(self.oriented(W))
                parts.append(absmax.reshape(W.shape[1], -1) if self.pair.runs_down else absmax)
            whole = np.concatenate(parts, axis=-1)
            self._absmax = double_absmax(whole.reshape(-1)).reshape(whole.shape)
        return self._absmax

    def E(self, block: Block, transposed: bool) -> Array:
        if transposed not in block.E:
            block.E[transposed] = self.factors[transposed].product(block.rows)
        return block.E[transposed]

    def lengths(self, block: Block, onto: str, transposed: bool) -> Lengths:
        """Of the outputs of the block's rows; of all outputs if columns are outputs."""
        if not self.pair.by_columns:
            return _lengths(self.V(block, onto), self.E(block, transposed), 1)
        key = onto, transposed
        if key not in self._lengths:
            sums = [np.zeros(self.pair.columns)] * 3
            for rows in self.pair.row_slices():
                part = self.read(rows)
                more = _lengths(self.V(part, onto), self.E(part, transposed), 0)
                sums = [a + b for a, b in zip(sums, more, strict=True)]
            self._lengths[key] = Lengths(*sums)
        return self._lengths[key]

    def along(self, values: Any) -> Any:
        """Values by output, to be multiplied with a block."""
        return values if np.ndim(values) == 0 or self.pair.by_columns else values[:, None]

    def scale(self, block: Block, hypothesis: Hypothesis) -> tuple[Any, Any, Any]:
        """(c, k, |V + c E|) by output: k = 1 and no length but for DoRA's magnitude."""
        change = hypothesis.change
        c: Any = 2 * change.c if change.again else change.c
        if self.m is None or not change.magnitude:
            return c, 1.0, None
        m = self.m if self.pair.by_columns else self.m[block.rows]
        lengths = self.lengths(block, hypothesis.onto, change.transposed)
        if change.again:  # k' (k (V + c E) + c E) has the direction of V + c (1 + 1/k) E
            first = m / _length(lengths, change.c)
            c = change.c * (1 + 1 / first)
        length = _length(lengths, c)
        return c, np.where(length == 0, 1, m / length), length

    # ---- does a hypothesis explain the numbers? ----

    def judge(self, hypothesis: Hypothesis, level: int, block: Block) -> tuple[int, int, float]:
        """(the first level from `level` on that explains the block, how many numbers differ from
        the rounded sum, about which share of all is outside every listed bound)."""
        with np.errstate(all="ignore"):
            if hypothesis.requantized and self._codes(block) is None:
                return DEAD, block.M.size, 1.0
            c, k, length = self.scale(block, hypothesis)
            S = self.V(block, hypothesis.onto)
            if np.any(c):
                S = S + self.along(c) * self.E(block, hypothesis.change.transposed)
            if length is not None:
                S = S * self.along(k)
            if hypothesis.requantized:
                return self._judge_codes(hypothesis, level, block, S)
            rounded = widen(round_to(S, self.pair.dtype))
            at = np.flatnonzero(~(rounded == block.M))
            outside = 0.0
            few = at[:FEW], *(at[parts] for parts in blocks(len(at), PICKS))
            for some in few:  # most wrong hypotheses are refuted by the first few
                if not len(some):
                    continue
                level, share = self._judge_numbers(hypothesis, level, block, S, some)
                outside = max(outside, share)
                if level == DEAD:
                    break
            return level, len(at), outside * len(at) / max(1, block.M.size)

    def _judge_numbers(
        self, hypothesis: Hypothesis, level: int, block: Block, S: Array, at: Array
    ) -> tuple[int, float]:
        """(level, the share outside the last listed bound) for the numbers at these places."""
        distance = np.abs(S.reshape(-1)[at] - block.M.reshape(-1)[at])
        distance -= half_step(block.M.reshape(-1)[at], self.pair.dtype)
        last = self.radius(hypothesis, LISTED - 1, block, at, S)
        outside = ~(distance <= last)
        share = float(outside.mean())
        if outside.any():
            widest = self.radius(hypothesis, DEAD - 1, block, at, S)
            if not (distance <= widest).all():
                return DEAD, share
        while not (distance <= self.radius(hypothesis, level, block, at, S)).all():
            level += 1
        return level, share

    def radius(
        self, hypothesis: Hypothesis, level: int, block: Block, at: Array, S: Array
    ) -> Array:
        """The bound of an arithmetic for the numbers at these places of the block."""
        change = hypothesis.change
        i, j = np.divmod(at, self.pair.columns)
        V = self.V(block, hypothesis.onto).reshape(-1)[at]
        if not self.factors:
            lost = rounding_loss(V, (self.pair.dtype,)) if level >= 2 else np.zeros(len(at))
            return lost if hypothesis.onto else np.zeros(len(at))
        factors = self.factors[change.transposed]
        E = self.E(block, change.transposed).reshape(-1)[at]
        lost = rounding_loss(V, (self.pair.dtype,)) if level >= 2 else 0
        sizes = Sizes(
            np.abs(V), np.abs(E), *factors.sizes(i + block.rows.start, j), lost
        )
        c, k, length = self.scale(block, hypothesis)
        output = j if self.pair.by_columns else i
        once = _once(change, c)
        chosen = once[output] if np.ndim(once) else once
        e = radius(level, sizes, chosen, factors.r, self.precision, change.again)
        if length is None:
            return np.asarray(e)
        unit, tiny = self.precision.unit, self.precision.tiny
        sums = np.abs(S.reshape(-1)[at])
        if level >= 2:
            e = e + unit * sums / np.abs(k[output]) + tiny
        rho = self._error_of_k(hypothesis, level, block, c, length)[output]
        return np.asarray((1 + rho) * (np.abs(k[output]) * e + rho * sums) + tiny)

    def _error_of_k(
        self, hypothesis: Hypothesis, level: int, block: Block, c: Any, length: Array
    ) -> Array:
        """The relative error of k = m / |V + c E|, by output."""
        change = hypothesis.change
        factors = self.factors[change.transposed]
        norms = factors.norms(self.pair.by_columns)
        if not self.pair.by_columns:
            norms = norms[0][block.rows], norms[1][block.rows], norms[2][block.rows]
        lengths = self.lengths(block, hypothesis.onto, change.transposed)
        inputs = self.pair.shape[0] if self.pair.by_columns else self.pair.columns
        V, one = np.sqrt(lengths.VV), math.sqrt(inputs)
        u, smallest = ROUNDING[self.pair.dtype]
        sizes = Sizes(V, norms[0], *norms, u * V + smallest * one, one)
        e = radius(level, sizes, _once(change, c), factors.r, self.precision, change.again)
        a = np.abs(c)
        squares = lengths.VV + 2 * a * np.abs(lengths.VE) + a**2 * lengths.EE
        double = compound(inputs + factors.r + 10, ROUNDING["F64"][0])
        rho = e / length + double * (2 + squares / length**2)
        if level >= 1:
            rho = rho + compound(inputs + 10, ROUNDING["F32"][0])
        if level >= 2:
            rho = rho + compound(7, self.precision.unit)
        return np.asarray(np.where(length == 0, 0, rho))

    # ---- NF4 ----

    def _judge_codes(
        self, hypothesis: Hypothesis, level: int, block: Block, X: Array
    ) -> tuple[int, int, float]:
        """`judge` where X was encoded: M's codes must be those of X.

        M's absmax must be those of X as well, or double quantization has changed them: then the
        level is the last listed one, because they say little about X.
        """
        lowest, highest, a = block.codes
        edges = np.concatenate([[-np.inf], _middles(), [np.inf]])
        low, high = edges[lowest], edges[highest + 1]
        sums = _in_blocks(self.oriented(X))
        top = np.abs(sums).max(axis=1, keepdims=True)
        unit, tiny = ROUNDING[self.pair.dtype]
        share = 1.0
        for number in range(level, LISTED):
            e = _in_blocks(self.oriented(self._radius_of_codes(hypothesis, number, block, X)))
            error = e.max(axis=1, keepdims=True) + 8 * ROUNDING["F32"][0] * top
            outside = sums + e < np.minimum(low * (top + error), low * (top - error))
            outside |= sums - e > np.maximum(high * (top + error), high * (top - error))
            is_plain = (np.abs(a - top) <= error + unit * a + tiny).all()
            share = float(outside.mean())
            if not outside.any() and (is_plain or number == LISTED - 1):
                return number, 0, 0.0
        return DEAD, X.size, share

    def _codes(self, block: Block) -> tuple[Array, Array, Array] | None:
        """(lowest, highest code that M may be, absmax) by blocks of NF4; None if M is not of codes.

        The codes differ only among subnormal numbers, which are further apart than levels.
        """
        if block.codes is ...:
            M = _in_blocks(self.oriented(block.M))
            a = np.abs(M).max(axis=1, keepdims=True)
            unit, tiny = ROUNDING[self.pair.dtype]
            slack = compound(3, max(unit, ROUNDING["F32"][0])) * np.abs(M) + 3 * tiny
            scale = np.where(a == 0, 1, a)
            nearest = np.searchsorted(_middles(), M / scale)
            on_grid = np.abs(M - LEVELS["nf4"].astype(np.float64)[nearest] * a) <= slack
            codes = (np.searchsorted(_middles(), (M + e) / scale) for e in (-slack, slack))
            block.codes = (*codes, a) if on_grid.all() else None
        return block.codes

    def _radius_of_codes(
        self, hypothesis: Hypothesis, level: int, block: Block, X: Array
    ) -> Array:
        """How far the encoded numbers may be from X, which may have been rounded first."""
        at = np.arange(X.size)
        e = self.radius(hypothesis, level, block, at, X).reshape(X.shape)
        steps = [half_step(X, dtype) for dtype in self.precision.types + self.precision.coded]
        return np.asarray(e + np.max(steps, axis=0))


def _once(change: Change, c: Any) -> Any:
    """The larger of the two factors of a change that is made twice; else c."""
    return np.maximum(np.abs(change.c), np.abs(c - change.c)) if change.again else c


def _middles() -> Array:
    levels = LEVELS["nf4"].astype(np.float64)
    return np.asarray((levels[1:] + levels[:-1]) / 2)


def _absmax(W: Array) -> Array:
    return block_absmax(_in_blocks(W.astype(np.float32, copy=False)))


def _in_blocks(array: Array) -> Array:
    """The numbers in rows of NF4_BLOCK, the last of them filled up with zeros."""
    flat = array.reshape(-1)
    missing = -len(flat) % NF4_BLOCK
    if missing:
        flat = np.concatenate([flat, np.zeros(missing, flat.dtype)])
    return flat.reshape(-1, NF4_BLOCK)


def _lengths(V: Array, E: Array, axis: int) -> Lengths:
    return Lengths((V * V).sum(axis), (V * E).sum(axis), (E * E).sum(axis))


def _length(lengths: Lengths, c: Any) -> Array:
    """|V + c E| by output."""
    squares = lengths.VV + 2 * c * lengths.VE + c**2 * lengths.EE
    return np.sqrt(np.maximum(squares, 0))


# ---- a whole tensor ------------------------------------------------------------------------------


class Scaling(NamedTuple):
    """What is left when no hypothesis explains a tensor.

    c          the factor of E by least squares
    fits       is some c within all numbers' bounds?
    residual   of least squares, in units of rounding's error: 1 if rounding explains it
    """

    c: float
    fits: bool
    residual: float


class Explanation(NamedTuple):
    """What explains a tensor.

    levels      of each hypothesis by its name, DEAD if it is refuted
    hypotheses  by their names
    differing   how many numbers differ from the rounded sum, by name; of the surviving ones
    size        |W|
    count       of the numbers
    runner_up   (the refuted hypothesis that was nearest on the first rows, the share of numbers
                there outside its bounds), or None
    scaling     None if there is a survivor
    finite      are all numbers of the merged tensor finite?
    """

    levels: dict[str, int]
    hypotheses: dict[str, Hypothesis]
    differing: dict[str, int]
    size: float
    count: int
    runner_up: tuple[str, float] | None
    scaling: Scaling | None
    finite: bool

    @property
    def best(self) -> int:
        """The level of the tightest arithmetic in which a hypothesis survives."""
        return min(self.levels.values())

    def survivors(self) -> list[str]:
        """The hypotheses of that level, if it is listed."""
        best = self.best
        return [name for name, level in self.levels.items() if level == best < LISTED]


def explain(layer: Layer, workers: Workers, with_codes: bool = True) -> Explanation:
    """Try every hypothesis on a tensor; without codes, only those without NF4."""
    hypotheses = {one.name: one for one in layer.hypotheses(with_codes)}
    levels = dict.fromkeys(hypotheses, 0)
    differing = dict.fromkeys(hypotheses, 0)
    first, *others = layer.pair.row_slices()
    block = layer.read(first)
    shares: dict[str, float] = {}
    for name, hypothesis in hypotheses.items():
        levels[name], differing[name], outside = layer.judge(hypothesis, 0, block)
        shares[name] = outside
    squares = float(np.vdot(block.W, block.W))
    finite = bool(np.isfinite(block.M).all())

    def alive() -> list[str]:
        return [name for name, level in levels.items() if level < DEAD]

    def judge(block: Block) -> tuple[dict[str, tuple[int, int, float]], float]:
        judged = {name: layer.judge(hypotheses[name], levels[name], block) for name in alive()}
        return judged, float(np.vdot(block.W, block.W))

    coming = map(layer.read, _while_any(others, alive))
    for judged, more in workers.map(judge, coming):
        squares += more
        for name, (level, different, _) in judged.items():
            levels[name] = max(levels[name], level)
            differing[name] += different
    _settle(hypotheses, levels)
    scaling = None
    if min(levels.values()) >= LISTED:
        finite = finite and _is_finite(layer)
        squares = sum(float(np.vdot(b.W, b.W)) for b in _blocks_of(layer))
        scaling = fit_scaling(layer, hypotheses) if layer.factors and finite else None
    refuted = [name for name, level in levels.items() if level >= LISTED]
    runner_up = min(refuted, key=shares.__getitem__, default=None)
    return Explanation(
        levels,
        hypotheses,
        {name: differing[name] for name in alive()},
        math.sqrt(squares),
        math.prod(layer.pair.shape),
        None if runner_up is None else (runner_up, shares[runner_up]),
        scaling,
        finite,
    )


def _settle(hypotheses: Mapping[str, Hypothesis], levels: dict[str, int]) -> None:
    """Let no hypothesis win only because its bound is wider, or because it needs none.

    - Codes say less than numbers do, so they are no tighter an explanation than a sum is.
    - dW added twice has one more rounding than 2 s dW added once, which may be alpha.
    - Where M is V itself, what dW was is not in the numbers.

    A hypothesis that is not refuted gets the level of the one that would hide it.
    """
    plain = min(levels[name] for name, one in hypotheses.items() if not one.requantized)
    for name, one in hypotheses.items():
        if one.requantized and levels[name] < plain < LISTED:
            levels[name] = plain
    alive = {name: one for name, one in hypotheses.items() if levels[name] < LISTED}
    for name, one in alive.items():
        for other, two in alive.items():
            if two._replace(change=one.change) != one:
                continue
            if (_is_unchanged(one) and not levels[name]) or _are_equal_twice(one.change, two.change):
                levels[other] = min(levels[other], levels[name])


def _is_unchanged(hypothesis: Hypothesis) -> bool:
    return hypothesis.change.name == NOT_MERGED


def _are_equal_twice(twice: Change, once: Change) -> bool:
    """Do both add the same multiple of E, the first in two steps?"""
    plain = once._replace(name=twice.name, c=twice.c, again=True)
    return twice.again and plain == twice and math.isclose(once.c, 2 * twice.c)


def _while_any(parts: Iterable[slice], alive: Callable[[], list[str]]) -> Iterator[slice]:
    """The parts, until no hypothesis is left to be tried."""
    for part in parts:
        if not alive():
            return
        yield part


def _blocks_of(layer: Layer) -> Iterator[Block]:
    return map(layer.read, layer.pair.row_slices())


def _is_finite(layer: Layer) -> bool:
    return all(bool(np.isfinite(block.M).all()) for block in _blocks_of(layer))


@np.errstate(all="ignore")
def fit_scaling(layer: Layer, hypotheses: Mapping[str, Hypothesis]) -> Scaling | None:
    """The c with which W + c E is nearest to M, and whether one c explains every number.

    None if E is zero or DoRA's k depends on c. Each number allows an interval of c; the bounds are
    those of a product rounded before the sum.
    """
    right = next(iter(hypotheses.values()))
    if layer.m is not None:
        return None
    sums = np.zeros(4)
    for block in _blocks_of(layer):
        D, E = block.M - block.W, layer.E(block, False)
        steps = half_step(block.M, layer.pair.dtype)
        sums += [np.vdot(E, D), np.vdot(E, E), np.vdot(D, D), np.vdot(steps, steps) / 3]
    DE, EE, DD, noise = map(float, sums)
    if not EE:
        return None
    c = DE / EE
    residual = math.sqrt(max(0.0, DD - c * DE) / noise)
    largest = 2 * max(abs(c), abs(right.change.c))
    allowed = Change(right.change.name, largest)
    low, high = -math.inf, math.inf
    for block in _blocks_of(layer):
        at = np.arange(block.M.size)
        e = layer.radius(Hypothesis(allowed), 2, block, at, block.M).reshape(block.M.shape)
        e += half_step(block.M, layer.pair.dtype)
        D, E = block.M - block.W, layer.E(block, False)
        if (np.abs(D)[E == 0] > e[E == 0]).any():
            return Scaling(c, False, residual)
        ends = (D - e) / E, (D + e) / E
        low = max(low, float(np.nanmax(np.minimum(*ends), initial=low)))
        high = min(high, float(np.nanmin(np.maximum(*ends), initial=high)))
        if low > high:
            return Scaling(c, False, residual)
    return Scaling(min(max(c, low), high), True, residual)
