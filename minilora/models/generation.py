"""Text from a model: one token after another, each drawn from the distribution that the model gives for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import threadpoolctl

from ..autograd import no_grad
from ..backend import Array
from ..errors import ConfigError, DataError, NonFiniteError
from ..threads import Workers
from .cache import KeyValueCache
from .decoding import Decoding, Weights


def generate(
    model: Any,
    ids: Any,
    max_new_tokens: int,
    tasks: str | Sequence[str] | None = None,
    **sampling: Any,
) -> np.ndarray:
    """ids (B, T) -> (B, T + max_new_tokens) integers: the prompts and what `stream` appends to them.

    tasks   of a model that has several: whose adapters go on with each prompt, a name a row or one for all. The prompts
            of a task run together, each task by itself, with the same seed
    """
    prompt = np.asarray(ids)
    if tasks is not None:
        if not hasattr(model, "rows_of"):
            raise ConfigError("tasks were given, but the model has none")
        groups, texts = model.rows_of(tasks, len(prompt)), []
        for task, rows in groups.items():
            with model.task(task):
                texts.append(generate(model, prompt[rows], max_new_tokens, **sampling))
        return (
            np.concatenate(texts)[np.argsort(np.concatenate(list(groups.values())))]
            if texts
            else prompt
        )
    new = list(stream(model, prompt, max_new_tokens, **sampling))
    return np.concatenate([prompt, np.stack(new, axis=1)], axis=1) if new else prompt


def stream(
    model: Any,
    ids: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the next token (B,) of each prompt, `max_new_tokens` times.

    model         a CausalLM, or a PeftModel around one
    ids           (B, T) integers, T >= 1; only the last max_position_embeddings of them are seen
    temperature   divides the logits; 0 takes the likeliest token
    top_k, top_p  keep the k likeliest tokens; keep the likeliest ones up to probability p (Holtzman et al. 2020)
    seed          of NumPy's generator: the same seed gives the same text

    When the context is full, generation goes on from its newer half. Adapters run merged, the weights are those of the
    first call. ConfigError for a setting out of range.
    """
    limit, V = model.config.max_position_embeddings, model.config.vocab_size
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise DataError(
            f"a prompt needs at least one token: ids of shape (batch, time), got {ids.shape}"
        )
    _check(max_new_tokens, temperature, top_k, top_p)
    rng = np.random.default_rng(seed)
    window = pending = ids[
        :, -limit:
    ]  # what the caches will hold; and of it what the model has not seen yet
    plain, backend = (
        model.get_base_model(),
        model.get_base_model().get_input_embeddings().weight.backend,
    )
    halves = np.array_split(np.arange(len(ids)), 2 if backend.name == "cpu" and len(ids) > 1 else 1)
    caches = [
        KeyValueCache(model, len(half), min(limit, ids.shape[1] + max_new_tokens))
        for half in halves
    ]
    going_on: list[Decoding | None] = [None] * len(halves)

    def forward(i: int) -> Array:
        """The logits (B, V) after `pending`, of one half of the prompts."""
        if decoding := going_on[i]:
            return decoding(backend.from_numpy(pending[halves[i], 0]))
        with no_grad():
            logits = model(pending[halves[i]], caches[i]).data[:, -1]
        going_on[i] = Decoding(weights, caches[i]) if weights else None
        return logits

    # BLAS's own threads gain nothing with so few rows, and lose much where the cores have other work.
    with threadpoolctl.threadpool_limits(1, "blas"), Workers(1) as workers:
        weights = Weights.of(plain, workers)
        for _ in range(max_new_tokens):
            if (going_on[0] or caches[0]).length + pending.shape[1] > limit:
                window = pending = window[:, -max(1, limit // 2) :]
                going_on = [None] * len(halves)
                for cache in caches:
                    cache.length = 0
            logits = backend.xp.concatenate(workers.together(forward, range(len(halves))))
            token = sample(
                backend.to_numpy(logits), rng, temperature, min(top_k or V, V), top_p or 1.0
            )
            pending = token[:, None]
            window = np.concatenate([window, pending], axis=1)
            yield token


def sample(
    logits: np.ndarray, rng: np.random.Generator, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """One token a row.    logits (B, V) -> (B,)"""
    z = logits.astype(np.float64)
    if not np.isfinite(z.max(axis=-1)).all():  # a NaN is the largest of whatever it is among
        raise NonFiniteError(
            "the model gives no finite logit for the next token: its weights are broken"
        )
    if temperature == 0:
        return np.asarray(z.argmax(axis=-1))
    z = (z - z.max(axis=-1, keepdims=True)) / temperature
    order = np.argsort(-z, axis=-1, kind="stable")  # likeliest first
    p = np.exp(np.take_along_axis(z, order, axis=-1))
    p[:, top_k:] = 0
    p /= p.sum(axis=-1, keepdims=True)
    before = p.cumsum(axis=-1) - p
    p[before >= top_p] = (
        0  # a token stays if those before it do not yet reach top_p: one always stays
    )
    chosen = (p.cumsum(axis=-1) > rng.random((len(p), 1)) * p.sum(axis=-1, keepdims=True)).argmax(
        axis=-1
    )
    return np.asarray(np.take_along_axis(order, chosen[:, None], axis=-1)[:, 0])


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not (0 <= temperature < math.inf):
        raise ConfigError(f"temperature must be a number >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1], got {top_p}")
