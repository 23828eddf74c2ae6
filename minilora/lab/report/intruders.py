"""Directions of W + dW that W does not have, and what scaling them does to both texts.

    intruder   one of the leading left directions of W + dW whose |cos| with every left direction
               of W is below a limit (Shuttleworth et al. 2024)

Scaled by lambda, a direction's term sigma u v^T of W + dW becomes lambda sigma u v^T. The controls
scale as many other leading directions, and all of dW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ...errors import ConfigError
from .altering import Altered, altered, require_alterable
from .content import Intruders, Scaling
from .layers import Layer
from .measuring import Losses, MeasuredText, measure_states
from .subject import Subject

LIMITS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LIMIT = 0.5  # as in lab/experiments/intruders.py
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)
INTRUDERS, OTHERS, WHOLE = "intruders", "as many other directions", "all of dW"
Places = dict[str, list[int]]  # of directions among the leading ones, by path


def count_intruders(layers: Mapping[str, Layer]) -> Intruders:
    """How many there are for several limits. ConfigError if no layer was decomposed."""
    nearest = [layer.likeness for layer in layers.values() if layer.likeness is not None]
    if not nearest:
        raise ConfigError(
            "no linear layer was decomposed: none trained, or they are too large together"
        )
    every = np.concatenate(nearest)
    counts = [int((every < limit).sum()) for limit in LIMITS]
    return Intruders(len(every), list(LIMITS), counts, LIMIT)


def scale_intruders(
    subject: Subject,
    layers: Mapping[str, Layer],
    text: MeasuredText,
    also: MeasuredText | None,
    threads: int | None,
) -> list[Scaling]:
    """The losses with parts of W + dW scaled. ConfigError; NonFiniteError.

    also   the second text; None: losses of it are missing
    """
    subject.require_adapter()
    require_alterable(subject)
    intruders, others = choose_places(layers)
    states: dict[Any, Callable[[], AbstractContextManager[Any]]] = {}
    for factor in FACTORS[:-1]:
        if intruders:
            states[INTRUDERS, factor] = functools.partial(
                _scaled, subject, layers, intruders, factor
            )
        if others:
            states[OTHERS, factor] = functools.partial(_scaled, subject, layers, others, factor)
        states[WHOLE, factor] = functools.partial(_scaled_whole, subject, factor)
    states[WHOLE, 0.0] = subject.as_base
    states[WHOLE, 1.0] = subject.as_adapted
    new = measure_states(subject.adapted, text, states, threads, "scaling")
    old = None
    if also is not None:
        old = measure_states(subject.adapted, also, states, threads, "scaling, second text")
    names = [name for name in (INTRUDERS, OTHERS, WHOLE) if (name, 0.0) in states]
    return [Scaling(name, list(FACTORS), _line(name, new), _line(name, old)) for name in names]


def choose_places(layers: Mapping[str, Layer]) -> tuple[Places, Places]:
    """(the intruders, as many of the other leading directions), by path."""
    intruders: Places = {}
    others: Places = {}
    for path, layer in layers.items():
        if layer.likeness is None:
            continue
        is_new = layer.likeness < LIMIT
        count = int(is_new.sum())
        if count:
            intruders[path] = np.flatnonzero(is_new).tolist()
            rest = np.flatnonzero(~is_new)[:count].tolist()
            if rest:
                others[path] = rest
    return intruders, others


def _line(name: str, losses: Losses | None) -> Any:
    """The losses for all factors; with the factor 1 every part is the adapter itself."""
    if losses is None:
        return []
    return [losses.mean((name if factor < 1 else WHOLE, factor)) for factor in FACTORS]


def _scaled(
    subject: Subject, layers: Mapping[str, Layer], places: Places, factor: float
) -> AbstractContextManager[None]:
    """A context in which the terms at `places` of each W + dW are multiplied by `factor`."""
    wrappers = subject.wrappers
    entries = {}
    for path, chosen in places.items():
        leading = layers[path].leading
        assert leading is not None
        missing = (factor - 1) * leading.values[chosen]
        factors = leading.Vt[chosen], leading.U[:, chosen] * missing
        adapter = wrappers[path].entries[subject.name]
        entries[path] = Altered(wrappers[path], adapter, 1.0, factors)
    return altered(subject, entries)


def _scaled_whole(subject: Subject, factor: float) -> AbstractContextManager[None]:
    """A context in which all that the adapter adds is multiplied by `factor`."""
    wrappers = subject.wrappers.items()
    entries = {
        path: Altered(layer, layer.entries[subject.name], factor) for path, layer in wrappers
    }
    return altered(subject, entries)
