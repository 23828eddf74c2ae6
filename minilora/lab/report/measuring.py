"""Losses of a text for a report: by windows, in bits per byte, with paired errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from ...data.batches import Batch, Text
from ...progress import progress_bar
from ...tools.windows import (
    Estimate,
    estimate,
    evaluating,
    token_counts,
    window_losses,
    windows_of,
)

Array = np.ndarray
UNIT = "bits per byte"
MOST_WINDOWS, LEAST_WINDOWS = 32, 4  # of each text, unless the user says how many
WORK = 3e13  # multiplications and additions over which fewer windows are measured: minutes
STATES = 32  # of a model with other ranks and scales, besides each layer out and alone


class MeasuredText(NamedTuple):
    """A text to measure.

    name             what the page calls it
    tokens           its ids, or records
    bytes_per_token  of the tokens that count
    context          tokens per window
    limit            the most windows to measure, spread over the text
    """

    name: str
    tokens: Text
    bytes_per_token: float
    context: int
    limit: int | None = None

    def windows(self) -> list[Batch]:
        return windows_of(self.tokens, self.context, self.limit)

    def bits(self, nats: float) -> float:
        """A loss, or a difference of losses, in bits per byte."""
        return nats / math.log(2) / self.bytes_per_token


def choose_windows(parameters: int, layers: int, context: int) -> int:
    """How many windows of a text are measured: fewer for a large model with many layers.

    A layer out, and alone, take half a forward pass each: what is below the layer is known.
    """
    work = 2.0 * parameters * context * (layers + STATES)
    return round(min(MOST_WINDOWS, max(LEAST_WINDOWS, WORK / work)))


class Losses:
    """The summed loss of each window of a text, for each state of a model by a name of it."""

    def __init__(self, text: MeasuredText, by_state: Mapping[Any, Array]):
        self.text = text
        self.by_state = by_state
        self.tokens = token_counts(text.windows())

    def mean(self, state: Any) -> float:
        """In bits per byte."""
        return self.text.bits(estimate(self.by_state[state], self.tokens).mean)

    def difference(self, state: Any, other: Any) -> Estimate:
        """How much larger the first is, in bits per byte, with its paired standard error."""
        differences = self.by_state[state] - self.by_state[other]
        both = estimate(differences, self.tokens)
        return Estimate(self.text.bits(both.mean), self.text.bits(both.error))


def measure_states(
    model: Any,
    text: MeasuredText,
    states: Mapping[Any, Callable[[], AbstractContextManager[Any]]],
    threads: int | None,
    title: str,
) -> Losses:
    """The losses of a text in each state of the model; each `states` makes a context with one.

    NonFiniteError.
    """
    windows = text.windows()
    losses = {}
    with evaluating(model, threads) as workers:
        for state in progress_bar(list(states), desc=title, unit=" models", leave=False):
            with states[state]():
                losses[state] = window_losses(model, windows, workers)
    return Losses(text, losses)


def finite(value: float) -> float | None:
    """The number, or None for one that JSON does not have."""
    return value if math.isfinite(value) else None
