"""Text from a model: each next token is drawn from the distribution that the model gives for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import threadpoolctl

from ..backend import Array, Backend, backend_of
from ..errors import ConfigError, NonFiniteError, Rule, check_fields, is_number, optional
from ..threads import Workers
from .decoding import Weights
from .texts import Part, Prompts, check_prompts, join_rows, split_texts

Generators: TypeAlias = "np.random.Generator | Sequence[np.random.Generator]"
FEW = 2000  # so many logits are sorted faster than the largest of them are found


def _is_probability(value: Any) -> bool:
    return is_number(above=0)(value) and value <= 1


SETTINGS = [
    Rule("max_new_tokens", is_number(least=0, kinds=Integral), "an integer of at least 0"),
    Rule("temperature", is_number(least=0), "a finite number of at least 0"),
    Rule("top_k", optional(is_number(least=1, kinds=Integral)), "an integer of at least 1"),
    Rule("top_p", optional(_is_probability), "a number in (0, 1]"),
]


def generate(
    model: Any,
    ids: Any,
    max_new_tokens: int,
    tasks: str | Sequence[str] | None = None,
    **sampling: Any,
) -> Any:
    """The prompts and what `stream` appends to them.    ids (B, T) -> (B, T + N)

    Prompts of several lengths are a list of B arrays (T,), and so are the results (T + N,).
    N is max_new_tokens, or less if each text has ended before that.

    tasks   for a model that has several: the task whose adapters continue each prompt, one name per
            prompt or one for all. The prompts of one task run together and apart from those of
            other tasks
    """
    prompts = check_prompts(ids)
    if tasks is None:
        new = _collect(stream(model, prompts, max_new_tokens, **sampling), len(prompts))
    else:
        new = _generate_by_task(model, prompts, max_new_tokens, tasks, sampling)
    if isinstance(prompts, np.ndarray):
        return np.concatenate([prompts, new], axis=1)
    return [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]


def _collect(tokens: Iterable[np.ndarray], count: int) -> np.ndarray:
    """The new tokens (count, N) of `count` prompts."""
    return np.array(list(tokens), np.int64).reshape(-1, count).T


def _generate_by_task(
    model: Any,
    prompts: Prompts,
    max_new_tokens: int,
    tasks: str | Sequence[str],
    sampling: dict[str, Any],
) -> np.ndarray:
    """The new tokens (B, N) of each prompt, by its own task."""
    if not hasattr(model, "rows_of"):
        raise ConfigError("tasks were given, but the model has none")
    stops, pad = _stop_ids(sampling.get("eos", ()), sampling.get("pad"), model.config.vocab_size)
    sampling = sampling | {"eos": stops, "pad": pad}
    seeded = _check_rows(sampling.pop("rows", None), len(prompts))
    groups = model.rows_of(tasks, len(prompts))
    texts = []
    for task, rows in groups.items():
        mine = [prompts[row] for row in rows]
        options = sampling | {"rows": [seeded[row] for row in rows]}
        with model.task(task):
            tokens = stream(model, mine, max_new_tokens, **options)
            texts.append(_collect(tokens, len(mine)))
    # The texts of a task are shorter if they have all ended.
    width = max(text.shape[1] for text in texts)
    for i, text in enumerate(texts):
        missing = width - text.shape[1]
        texts[i] = np.pad(text, ((0, 0), (0, missing)), constant_values=pad)
    order = np.concatenate(list(groups.values()))
    return np.concatenate(texts)[np.argsort(order)]


def stream(
    model: Any,
    ids: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Iterable[int] = (),
    pad: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the next token (B,) of each prompt, up to `max_new_tokens` times.

    model         a CausalLM, or a PeftModel around one
    ids           (B, T) integers, or a list of B arrays (T,) of several lengths, T >= 1; only the
                  last config.context of them are seen
    temperature   divides the logits; 0 takes the likeliest token
    top_k         keep the k likeliest tokens; None: all
    top_p         keep the likeliest tokens up to probability p (Holtzman et al. 2020); None: all
    seed          of the random numbers: the same seed gives the same text
    eos           the ids at which a text ends. Such an id is its last one, and the stream ends when
                  all texts have. The others are what they would be without an end
    pad           the id that follows a text that has ended; None: the first of `eos`
    rows          the number of each prompt, from which its random numbers follow, with the seed;
                  None: 0, 1, ... Part of a longer list of prompts gives the texts of the whole list
                  if it has the numbers that the prompts have there

    A text is, to the rounding of logits, what its prompt alone would give: nothing is padded, and
    each text has its own random numbers. When its context is full, it continues from the newer
    half. Adapters run merged, except where products are rounded, and the weights are those of the
    first call. ConfigError for a setting out of range.
    """
    V = model.config.vocab_size
    prompts = check_prompts(ids)
    count = len(prompts)
    check_fields(locals(), SETTINGS)
    stops, pad = _stop_ids(eos, pad, V)
    generators = [_generator_of_row(seed, row) for row in _check_rows(rows, count)]
    ended = np.zeros(count, bool)
    base = model.get_base_model()
    backend = base.get_input_embeddings().weight.backend
    threads = 1 if backend.name == "cpu" else 0  # besides this one, which alone uses a GPU
    both = threads > 0 and count > 1  # one half of the prompts per thread

    # BLAS's own threads gain nothing with so few rows, and lose much where other work needs cores.
    with threadpoolctl.threadpool_limits(1, "blas"), Workers(threads) as workers:
        weights = Weights.of(base, workers, -(-count // 2) if both else count)
        parts = split_texts(model, weights, prompts, max_new_tokens, 2 if both else 1)
        order = np.concatenate([part.rows for part in parts])
        generators = [generators[row] for row in order]
        for _ in range(max_new_tokens):
            logits = join_rows(workers.together(Part.next_logits, parts))
            chosen = _choose(logits, generators, temperature, min(top_k or V, V), top_p or 1.0)
            token = np.empty(count, np.int64)
            token[order] = chosen
            token = np.where(ended, pad, token)
            ended |= np.isin(token, stops)
            for part in parts:
                part.append(token[part.rows])
            yield token
            if len(stops) and ended.all():
                return


def _check_rows(rows: Sequence[int] | None, count: int) -> list[int]:
    """`rows`, which must be `count` integers of at least 0; by default 0, 1, ..."""
    if rows is None:
        return list(range(count))
    given = list(rows)
    is_row = is_number(least=0, kinds=Integral)
    if len(given) != count or not all(map(is_row, given)):
        raise ConfigError(
            f"rows must be {count} integers of at least 0, one per prompt, got {given!r:.200}"
        )
    return given


def _generator_of_row(seed: Any, row: int) -> np.random.Generator:
    """The random numbers of one text: for row 0 those of the seed, else of its child `row`."""
    key = (int(row),) if row else ()
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _stop_ids(eos: int | Iterable[int], pad: int | None, vocab_size: int) -> tuple[list[int], int]:
    """(the ids at which a text ends, the id that follows it). ConfigError for what is no id."""
    stops = list(eos) if isinstance(eos, Iterable) else [eos]
    if pad is None:
        pad = stops[0] if stops else 0

    def is_id(value: Any) -> bool:
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        return is_integer and 0 <= value < vocab_size

    wanted = f"from 0 to {vocab_size - 1}"
    ids = {"eos": stops, "pad": pad}
    rules = [
        Rule("eos", lambda ids: all(map(is_id, ids)), f"ids {wanted}"),
        Rule("pad", is_id, f"an id {wanted}"),
    ]
    check_fields(ids, rules)
    return stops, pad


def _choose(
    logits: Array, rng: Generators, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """`sample` of logits on any device: all of them move to the host unless temperature is 0."""
    backend = backend_of(logits)
    if temperature > 0:
        return sample(backend.to_numpy(logits), rng, temperature, top_k, top_p)
    ids = backend.to_numpy(backend.run(_pick_largest, logits))
    if (ids < 0).any():
        raise _not_finite()
    return ids


def _pick_largest(backend: Backend, Z: Array) -> Array:
    """The first of each row's largest numbers; -1 if that is not finite.    (N, V) -> (N,)

    A row with NaN has no largest number.
    """
    xp = backend.xp
    is_finite = xp.isfinite(Z.max(axis=-1))  # NaN if any number is
    return xp.where(is_finite, Z.argmax(axis=-1), -1)


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        "the model gives no finite logit for the next token: its weights are broken"
    )


def sample(
    logits: np.ndarray, rng: Generators, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """One token per row.    logits (B, V) -> (B,)

    rng   one generator for all rows, or a sequence of one per row
    """
    if temperature == 0:
        return _choose(logits, rng, 0, top_k, top_p)
    z = logits.astype(np.float64)
    largest = z.max(axis=-1, keepdims=True)  # NaN if any logit is
    if not np.isfinite(largest).all():
        raise _not_finite()
    z = (z - largest) / temperature
    order = _order_likeliest(z, top_k)
    p = np.exp(np.take_along_axis(z, order, axis=-1))
    p /= p.sum(axis=-1, keepdims=True)
    # A token stays if those before it do not yet reach top_p, so that one always stays.
    before = p.cumsum(axis=-1) - p
    p[before >= top_p] = 0
    if isinstance(rng, np.random.Generator):
        uniform = rng.random(len(p))
    else:
        uniform = np.array([generator.random() for generator in rng])
    drawn = uniform[:, None] * p.sum(axis=-1, keepdims=True)
    rank = (p.cumsum(axis=-1) > drawn).argmax(axis=-1)
    return np.asarray(np.take_along_axis(order, rank[:, None], axis=-1)[:, 0])


def _order_likeliest(z: np.ndarray, k: int) -> np.ndarray:
    """The ids of each row's k largest logits, the largest first; of equal ones the smaller id.

    z (B, V) -> (B, k)    Only these k are sorted.
    """
    V = z.shape[1]
    if k >= V or V <= FEW:
        return np.argsort(-z, axis=-1, kind="stable")[:, :k]
    least = np.partition(z, V - k, axis=-1)[:, V - k, None]  # of the k
    is_larger = z > least
    is_equal = z == least
    wanted = k - is_larger.sum(axis=-1, keepdims=True)  # of the equal ones
    is_wanted = is_larger | (is_equal & (is_equal.cumsum(axis=-1) <= wanted))
    ids = np.nonzero(is_wanted)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(z, ids, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(ids, order, axis=-1)
