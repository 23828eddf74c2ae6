"""The loss that is left with fewer ranks: every layer's dW cut to its leading directions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ...errors import ConfigError
from .altering import Altered, altered, find_whole
from .content import RankCurve
from .layers import Layer, choose_ranks
from .measuring import UNIT, MeasuredText, finite, measure_states
from .subject import Subject


def draw_rank_curve(
    subject: Subject, layers: Mapping[str, Layer], text: MeasuredText, threads: int | None
) -> RankCurve:
    """The losses of a text with each layer's dW cut to few ranks. ConfigError; NonFiniteError.

    At rank 0 the model is its base, and at the whole rank the adapter itself, to the bit. What
    trained as a copy or by rows stays as it is at every other rank.
    """
    subject.require_adapter()
    whole = find_whole(subject)
    layers = {path: layer for path, layer in layers.items() if path not in whole}
    if not layers:
        raise ConfigError("only copies or rows of weights trained, which have no rank")
    for path, layer in layers.items():
        if layer.update is None:
            raise ConfigError(f"dW of {path} has no factors, and is too large to decompose")
    ranks = choose_ranks(max((len(_values(layer)) for layer in layers.values()), default=0))
    states: dict[Any, Callable[[], AbstractContextManager[Any]]] = {}
    for rank in ranks:
        states[rank] = functools.partial(_cut, subject, layers, rank)
    states[0] = subject.as_base
    states[ranks[-1]] = contextlib.nullcontext if ranks[-1] else subject.as_base
    losses = measure_states(subject.adapted, text, states, threads, "ranks")
    errors = [finite(losses.difference(rank, ranks[-1]).error) for rank in ranks]
    means = [losses.mean(rank) for rank in ranks]
    return RankCurve(UNIT, text.name, ranks, means, errors, share_energy(layers, ranks))


def share_energy(layers: Mapping[str, Layer], ranks: Sequence[int]) -> list[float]:
    """The share of sum sigma^2, over all layers, that is left at each rank; 1 for a dW of zero."""
    whole = sum(float(np.square(_values(layer)).sum()) for layer in layers.values())
    left = []
    for rank in ranks:
        part = sum(float(np.square(_values(layer)[:rank]).sum()) for layer in layers.values())
        left.append(part / whole if whole else 1.0)
    return left


def _values(layer: Layer) -> Any:
    assert layer.values is not None
    return layer.values


@contextlib.contextmanager
def _cut(subject: Subject, layers: Mapping[str, Layer], rank: int) -> Any:
    """A context in which every layer's dW has its `rank` leading directions alone."""
    wrappers = subject.wrappers
    entries = {}
    for path, layer in layers.items():
        assert layer.update is not None
        update = layer.update.first(rank)
        factors = update.Vt, update.U * update.values
        adapter = wrappers[path].entries[subject.name]
        entries[path] = Altered(wrappers[path], adapter, 0.0, factors, with_bias=True)
    with altered(subject, entries):
        yield
