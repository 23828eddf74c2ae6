"""Which hypotheses explain one tensor of a merged checkpoint.

Every hypothesis is tried on the first rows of the tensor, where nearly all wrong ones are refuted;
those that remain are tried on all others. So memory is constant, and the time is that of a merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..threads import Workers
from .hypotheses import DEAD, LISTED, NOT_MERGED, Change, Hypothesis, half_step
from .layers import Block, Layer


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
    numbers     how many the tensor has
    runner_up   (the refuted hypothesis that was nearest on the first rows, the share of numbers
                there outside its bounds), or None
    scaling     None if there is a survivor
    finite      are all numbers of the merged tensor finite?
    is_head     is it a head, which QLoRA leaves as it is where it encodes the linear layers?
    """

    levels: dict[str, int]
    hypotheses: dict[str, Hypothesis]
    differing: dict[str, int]
    size: float
    numbers: int
    runner_up: tuple[str, float] | None
    scaling: Scaling | None
    finite: bool
    is_head: bool = False

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


def join_explanations(explanations: Sequence[Explanation]) -> Explanation:
    """What explains a tensor that was rounded to one of several dtypes, by the explanation of each.

    A hypothesis has the lowest of its levels.
    """
    best = min(explanations, key=lambda explanation: explanation.best)
    if len(explanations) == 1:
        return best
    levels = {name: min(e.levels.get(name, DEAD) for e in explanations) for name in best.levels}
    _settle(best.hypotheses, levels)
    differing: dict[str, int] = {}
    for explanation in (*explanations, best):
        differing |= explanation.differing
    return best._replace(levels=levels, differing=differing)


def _settle(hypotheses: Mapping[str, Hypothesis], levels: dict[str, int]) -> None:
    """Let no hypothesis win only because its bound is wider, or because it needs none.

    - Codes say less than numbers do, so their level is at least that of a sum.
    - dW added twice has one more rounding than a sum, so its level is at least that, too; 2 s dW
      added once, which may be alpha, is the same.
    - Where M is V itself, what dW was is not in the numbers.

    A hypothesis that is not refuted gets the level of the one that would hide it.
    """
    wider = {name for name, one in hypotheses.items() if one.requantized or one.change.again}
    plain = min((levels[name] for name in hypotheses if name not in wider), default=DEAD)
    for name in wider:
        if levels[name] < plain < LISTED:
            levels[name] = plain
    alive = {name: one for name, one in hypotheses.items() if levels[name] < LISTED}
    for name, one in alive.items():
        for other, two in alive.items():
            if two._replace(change=one.change) != one:
                continue
            if (_is_unchanged(one) and not levels[name]) or _are_equal_twice(
                one.change, two.change
            ):
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
        e = layer.bound(Hypothesis(allowed), 2, block, at, block.M).reshape(block.M.shape)
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
