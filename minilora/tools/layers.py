"""One tensor of a base and of a merged checkpoint, and what each hypothesis makes of it.

Everything has the layout of the file: rows are outputs, or inputs where it stores W transposed (an
embedding's table, GPT-2's linear layers). All is computed for a few rows at a time.

Pair     the two tensors, to be read by rows
Factors  E = B A in that layout, with what bounds need
Layer    `judge`: is a hypothesis refuted by some rows, and in which arithmetic?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError
from ..formats.dtypes import BLOCK, round_to, widen
from ..lora.factors import Part
from ..quant.codes import LEVELS, block_absmax, double_absmax, encode
from ..threads import blocks
from .hypotheses import (
    DEAD,
    LISTED,
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
    """Some rows: W and M in float64, and what has been computed for them."""

    rows: slice
    W: Array
    M: Array
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
        return int(self.left.shape[1])

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
        with np.errstate(invalid="ignore"):  # a signalling NaN
            M = widen(self.pair.merged(rows)).astype(np.float64)
        flat = (len(W), self.pair.columns)
        return Block(rows, W.reshape(flat), M.reshape(flat))

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
        """Sums over the rows of the block if rows are outputs; otherwise over all outputs."""
        if not self.pair.by_columns:
            return _sum_lengths(self.V(block, onto), self.E(block, transposed), 1)
        key = onto, transposed
        if key not in self._lengths:
            sums = [np.zeros(self.pair.columns)] * 3
            for rows in self.pair.row_slices():
                part = self.read(rows)
                more = _sum_lengths(self.V(part, onto), self.E(part, transposed), 0)
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
        the rounded sum, about which share of all is outside the widest bound)."""
        with np.errstate(all="ignore"):
            if hypothesis.requantized and self._codes(block) is None:
                return DEAD, block.M.size, 1.0
            if self._no_absmax_explains(hypothesis, block):
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
        """(level, the share outside the widest bound) for the numbers at these places."""
        distance = np.abs(S.reshape(-1)[at] - block.M.reshape(-1)[at])
        distance -= half_step(block.M.reshape(-1)[at], self.pair.dtype)

        def outside(level: int) -> Array:
            return np.asarray(~(distance <= self.bound(hypothesis, level, block, at, S)))

        if level == 0 or outside(level).any():
            beyond = outside(DEAD - 1)
            if beyond.any():
                return DEAD, float(beyond.mean())
            while outside(level).any():
                level += 1
        return level, 0.0

    def bound(self, hypothesis: Hypothesis, level: int, block: Block, at: Array, S: Array) -> Array:
        """The bound of an arithmetic for the numbers at these places of the block."""
        change = hypothesis.change
        i, j = np.divmod(at, self.pair.columns)
        V = self.V(block, hypothesis.onto).reshape(-1)[at]
        lost = np.zeros(len(at))
        if level >= 2 and (self.factors or hypothesis.onto):
            lost = rounding_loss(V, (self.pair.dtype,))
        if not self.factors:  # M must be V, rounded
            unit, tiny = self.precision.second if level >= 2 else (0.0, 0.0)
            return np.asarray(lost + unit * np.abs(V) + tiny)
        factors = self.factors[change.transposed]
        E = self.E(block, change.transposed).reshape(-1)[at]
        sizes = Sizes(np.abs(V), np.abs(E), *factors.sizes(i + block.rows.start, j), lost)
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
        if change.again:  # the first k is in c
            e = e + np.abs(c - change.c)[output] * rho * sizes.G
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
        if change.again:
            rho = rho * (2 + np.abs(c - change.c) * sizes.G / length)
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

    def _no_absmax_explains(self, hypothesis: Hypothesis, block: Block) -> bool:
        """Can double quantization be refuted without the absmax of the whole tensor?

        M = level a + c E for each block of NF4, whatever a is: each number allows an interval of a,
        and for a wrong hypothesis these have nothing in common.
        """
        is_simple = hypothesis.onto == "nf4,double" and not hypothesis.requantized
        if not is_simple or self._absmax is not None or self.m is not None or not self.factors:
            return False
        change = hypothesis.change
        V = self.V(block, "nf4")
        M = block.M
        if change.c:
            M = M - change.c * (1 + change.again) * self.E(block, change.transposed)
        at = np.arange(V.size)
        plain = hypothesis._replace(onto="nf4")
        error = self.bound(plain, DEAD - 1, block, at, V).reshape(V.shape)
        error = 2 * error + half_step(block.M, self.pair.dtype)  # twice: a may be larger by far
        M, error, V = (_in_blocks(self.oriented(x)) for x in (M, error, V))
        levels = V / np.abs(V).max(axis=1, keepdims=True)
        ends = (M - error) / levels, (M + error) / levels
        known = levels != 0
        low = np.where(known, np.minimum(*ends), -np.inf).max(axis=1)
        high = np.where(known, np.maximum(*ends), np.inf).min(axis=1)
        return bool((low > high).any())

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
        return block.codes  # type: ignore[no-any-return]

    def _radius_of_codes(self, hypothesis: Hypothesis, level: int, block: Block, X: Array) -> Array:
        """How far the encoded numbers may be from X, which may have been rounded first."""
        at = np.arange(X.size)
        e = self.bound(hypothesis, level, block, at, X).reshape(X.shape)
        steps = [half_step(X, dtype) for dtype in self.precision.types + self.precision.coded]
        return np.asarray(e + np.max(steps, axis=0))


def _once(change: Change, c: Any) -> Any:
    """The larger of the two factors of a change that is made twice; else c."""
    return np.maximum(np.abs(change.c), np.abs(c - change.c)) if change.again else c


def _middles() -> Array:
    levels = LEVELS["nf4"].astype(np.float64)
    return np.asarray((levels[1:] + levels[:-1]) / 2)


def _absmax(W: Array) -> Array:
    return np.asarray(block_absmax(_in_blocks(W.astype(np.float32, copy=False))))


def _in_blocks(array: Array) -> Array:
    """The numbers in rows of NF4_BLOCK, the last of them filled up with zeros."""
    flat = array.reshape(-1)
    missing = -len(flat) % NF4_BLOCK
    if missing:
        flat = np.concatenate([flat, np.zeros(missing, flat.dtype)])
    return flat.reshape(-1, NF4_BLOCK)


def _sum_lengths(V: Array, E: Array, axis: int) -> Lengths:
    return Lengths((V * V).sum(axis), (V * E).sum(axis), (E * E).sum(axis))


def _length(lengths: Lengths, c: Any) -> Array:
    """|V + c E| by output."""
    squares = lengths.VV + 2 * c * lengths.VE + c**2 * lengths.EE
    return np.asarray(np.sqrt(np.maximum(squares, 0)))
