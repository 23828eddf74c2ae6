"""Texts that are continued together, whatever their lengths: each as if it were alone.

No text is padded. Texts of one length form a group, which the model reads in one forward; after
that all of them continue in one decoding, which knows the length of each. A model without one (see
`Weights.of`) continues one group after another. Shapes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..autograd import no_grad
from ..backend import Array, backend_of
from ..errors import DataError
from .cache import KeyValueCache
from .captured import start_decoding
from .decoding import Weights

Prompts = np.ndarray | list[np.ndarray]


def check_prompts(ids: Any) -> Prompts:
    """The prompts as one array (B, T), or a list of arrays (T,) if their lengths differ.

    DataError for a prompt without tokens.
    """
    if isinstance(ids, Sequence):
        rows = [np.asarray(row) for row in ids]
        if len({row.shape for row in rows}) > 1:
            for i, row in enumerate(rows):
                if row.ndim != 1 or not len(row):
                    raise DataError(
                        "a prompt needs at least one token: a list of prompts has ids of shape "
                        f"(time,), got {row.shape} for prompt {i}"
                    )
            return rows
    prompts = np.asarray(ids)
    if prompts.ndim != 2 or prompts.shape[1] == 0:
        raise DataError(
            f"a prompt needs at least one token: ids of shape (batch, time), got {prompts.shape}"
        )
    return prompts


def join_rows(logits: list[Array]) -> Array:
    """(n, V) of several groups or parts -> (B, V)"""
    return logits[0] if len(logits) == 1 else backend_of(logits[0]).xp.concatenate(logits)


class Group:
    """Texts of one length, which stay of one length.

    places    where they are in their part
    cache     their keys and values
    window    (n, W), the newest tokens of each, at most as many as the model's context
    pending   those of them that the model has not seen
    """

    def __init__(self, model: Any, places: slice, window: np.ndarray, cache: KeyValueCache):
        self.model = model
        self.places = places
        self.window = self.pending = window
        self.cache = cache

    @property
    def is_unread(self) -> bool:
        """Whether the model must read the whole window."""
        return self.pending is self.window

    def read(self) -> Array:
        """The logits (n, V) after the pending tokens."""
        with no_grad():
            return self.model(self.pending, self.cache).data[:, -1]

    def append(self, tokens: np.ndarray) -> None:
        """Append a token to each text. A full context is continued from its newer half."""
        self.pending = tokens[:, None]
        self.window = np.concatenate([self.window, self.pending], axis=1)
        limit = self.model.config.context
        if self.window.shape[1] > limit:
            self.window = self.pending = self.window[:, -max(1, limit // 2) :]
            self.cache.length = 0


class Part:
    """The texts that one thread continues.

    weights   None if the model computes each token in the ordinary way
    rows      (n,), the rows of the texts in the batch, those of equal length one after another
    """

    def __init__(
        self,
        model: Any,
        weights: Weights | None,
        prompts: Prompts,
        rows: np.ndarray,
        max_new_tokens: int,
    ):
        self.weights = weights
        self.rows = rows
        limit = model.config.context
        lengths = np.array([min(limit, len(prompts[row])) for row in rows])
        cache = KeyValueCache(model, len(rows), min(limit, int(lengths.max()) + max_new_tokens))
        self.decoding: Any = None
        self.cache = cache
        edges = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(rows)]
        self.groups = []
        for start, stop in itertools.pairwise(edges):
            places = slice(start, stop)
            window = np.stack([prompts[row][-limit:] for row in rows[places]])
            self.groups.append(Group(model, places, window, cache.part(places)))

    def next_logits(self) -> Array:
        """The logits (n, V) of each text's next token."""
        if self.weights is None:
            return join_rows([group.read() for group in self.groups])
        unread = [group for group in self.groups if group.is_unread]
        if len(unread) == len(self.groups):
            logits = join_rows([group.read() for group in unread])
        else:
            logits = self._decode(unread)
            for group in unread:
                logits[group.places] = group.read()
        if self.decoding is None:
            self.decoding = start_decoding(self.weights, self.cache)
        for group in unread:
            self.decoding.start(group.cache, group.places)
        return logits

    def append(self, tokens: np.ndarray) -> None:
        """Append a token (n,) to each text."""
        for group in self.groups:
            group.append(tokens[group.places])

    def _decode(self, unread: list[Group]) -> Array:
        """The logits (n, V) after one more token; those of unread groups mean nothing."""
        for group in unread:
            self.decoding.lengths[group.places] = 0  # their keys have no place for one more
        newest = [group.window[:, -1] for group in self.groups]
        return self.decoding(np.concatenate(newest))


def split_texts(
    model: Any, weights: Weights | None, prompts: Prompts, max_new_tokens: int, count: int
) -> list[Part]:
    """Parts of nearly equal numbers of texts: the shortest prompts in the first one."""
    lengths = [len(prompt) for prompt in prompts]
    order = np.argsort(lengths, kind="stable")
    return [
        Part(model, weights, prompts, rows, max_new_tokens) for rows in np.array_split(order, count)
    ]
