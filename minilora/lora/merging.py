"""Merging: what adapters add, put into a copy of the base's weight, and taken out again without a trace.

The base is kept as it is, so unmerging restores every bit. The copy is one float64 sum, rounded once. An embedding and
a head that share one weight are two places of one model: what is merged in one of them may have to stand in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import Array
from ..errors import ConfigError, NonFiniteError
from ..nn import LinearBase
from ..quant.half import HalfWeight


class Merging:
    """What a wrapper is besides that can merge the adapters that it holds into its base layer."""

    base_layer: Any
    adapters: dict[str, Any]
    active: tuple[str, ...] | list[str]
    merged: tuple[str, ...]  # this and the next are the wrapper's
    requantized: bool
    _original: Any = None  # the base while adapters are merged into a copy of it
    _follows: Merging | None = (
        None  # of a head: what stands in the place of the embedding whose weight it has
    )
    _leads: Any = None  # a module that has the base's weight too, and is to have what is merged

    def as_linear(self, base: Any) -> LinearBase:
        """The base as the linear layer that adapters take it for."""
        return base  # type: ignore[no-any-return]

    def rebuilt(self, weight: Array, base: Any) -> Any:
        """A frozen, dense layer like the base, over another weight (O, I)."""
        raise NotImplementedError

    def merged_weight(self, W: Array, names: Sequence[str]) -> Array:
        """W with these adapters in it (O, I): one float64 sum, rounded once."""
        deltas = (self.adapters[n].delta_weight(W.astype(np.float64)) for n in names)
        return sum(deltas, start=W.astype(np.float64)).astype(W.dtype)

    def merge(self, names: Sequence[str] | None = None, requantize: bool = False) -> None:
        """Put adapters (the active ones) into a dense copy of the base: one float64 sum, rounded once.

        The base itself is kept, so `unmerge` restores every bit. A NaN or inf raises NonFiniteError; nothing changes.
        With `requantize` all that is merged is held as the base is: over codes it is coded again, which rounds part of
        dW away, and the layer's `lost` says how much. A dense base stays dense, and in sixteen bits if it is held so.
        """
        names = list(dict.fromkeys(self.active if names is None else names))
        names = [n for n in names if n in self.adapters and n not in self.merged]
        if not names and (not self.merged or requantize == self.requantized):
            return
        self.result((*self.merged, *names))  # type: ignore[attr-defined]  # raises where they cannot be at once
        base = self._original or self.base_layer
        linear = self.as_linear(base)
        half = isinstance(
            linear.weight, HalfWeight
        )  # which rounds the sum itself: not to float32 first
        W = linear.dense_weight()
        with np.errstate(all="ignore"):  # a sum that overflows is found below
            total = self.merged_weight(W.astype(np.float64) if half else W, (*self.merged, *names))
        if not bool(linear.backend.xp.isfinite(total).all()):
            raise NonFiniteError(
                f"merging {', '.join(names)} gives weights that are not finite: something is broken"
            )
        self.base_layer = linear.rebuilt(total) if requantize or half else self.rebuilt(total, base)
        self._original, self.merged, self.requantized = base, (*self.merged, *names), requantize
        if self._follows is not None and self._follows.merged == self.merged:
            self.base_layer.weight = (
                self._follows.base_layer.weight
            )  # one parameter before, and one now
        if self._leads is not None:
            self._leads.weight = self.base_layer.weight

    def unmerge(self) -> None:
        """Take all merged adapters out again: the original base comes back, bit for bit."""
        if self._original is not None:
            self.base_layer, self._original, self.merged, self.requantized = (
                self._original,
                None,
                (),
                False,
            )
            if self._leads is not None:
                self._leads.weight = self.base_layer.weight

    def follow(self, embedding: Any) -> None:
        """Be the head of `embedding`, which is merged before this: then both have one weight again."""
        self._follows = embedding

    def follows(self, embedding: Any) -> bool:
        """Is this the head of `embedding`, with the same adapters?"""
        return self._follows is embedding

    def leads(self, other: Any) -> bool:
        """Does `other` have what is merged here?"""
        return other is not None and self._leads is other

    def lead(self, other: Any) -> None:
        """Give `other`, a module that shares the base's weight, what is merged, too; None: not.

        ConfigError where adapters are merged already, and otherwise.
        """
        if self.merged and self._leads is not other:
            before, now = ("untie", "share") if self._leads is None else ("share", "untie")
            raise ConfigError(
                f"{', '.join(self.merged)} is merged with tied={before!r}: unmerge_adapter before {now!r}"
            )
        self._leads = other

    def delta_weight(self, name: str) -> np.ndarray:
        """dW (O, I) of one adapter, in float64 on the host."""
        base = self.as_linear(self._original or self.base_layer)
        return base.backend.to_numpy(
            self.adapters[name].delta_weight(base.dense_weight().astype(np.float64))
        )
