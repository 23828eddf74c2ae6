"""Generation: the cache changes nothing, and every token comes from the distribution that was asked for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError, DataError, NonFiniteError
from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.models.config import TransformerConfig
from minilora.models.generation import generate, sample, stream
from minilora.models.transformer import CausalLM

CONFIG = TransformerConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=24,
    initializer_range=0.8,  # far from uniform, so that the likeliest token is clear
)


def model(seed: int = 0, **changes: Any) -> CausalLM:
    return CausalLM(dataclasses.replace(CONFIG, **changes), seed=seed, dtype="float64").eval()  # type: ignore[no-any-return]


def adapted(seed: int = 0) -> PeftModel:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model(seed), config, seed=seed).eval()  # type: ignore[no-any-return]


prompts = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 99)).map(
    lambda t: np.random.default_rng(t[2]).integers(0, 13, t[:2])
)


@given(prompts, st.integers(0, 9), st.integers(0, 12))
def test_greedy_with_a_cache_is_greedy_by_whole_passes(
    ids: np.ndarray, seed: int, count: int
) -> None:
    for m in (model(seed), adapted(seed)):
        expected = ids
        for _ in range(count):
            token = m(expected).data[:, -1].argmax(axis=-1)
            expected = np.concatenate([expected, token[:, None]], axis=1)
        got = generate(m, ids, count, temperature=0)
        assert np.array_equal(got, expected)


@given(prompts, st.integers(0, 9))
def test_prompts_together_are_prompts_alone(ids: np.ndarray, seed: int) -> None:
    m = model(seed)
    together = generate(m, ids, 10, temperature=0)
    assert np.array_equal(
        together, np.concatenate([generate(m, row[None], 10, temperature=0) for row in ids])
    )


@given(prompts, st.integers(0, 9))
def test_merging_does_not_change_the_text(ids: np.ndarray, seed: int) -> None:
    m = adapted(seed)
    unmerged = generate(m, ids, 15, temperature=0)
    m.merge_adapter()
    assert np.array_equal(generate(m, ids, 15, temperature=0), unmerged)
    m.unmerge_adapter()
    with m.disable_adapter():
        assert np.array_equal(
            generate(m, ids, 15, temperature=0), generate(model(seed), ids, 15, temperature=0)
        )
    assert np.array_equal(generate(m.merge_and_unload(), ids, 15, temperature=0), unmerged)


def test_the_adapter_is_seen() -> None:
    ids = np.array([[1, 2, 3]])
    assert not np.array_equal(
        generate(adapted(), ids, 15, temperature=0), generate(model(), ids, 15, temperature=0)
    )


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-300])
def test_a_low_temperature_is_greedy_in_the_limit(temperature: float) -> None:
    ids = np.array([[1, 2], [3, 4]])
    greedy = generate(model(), ids, 15, temperature=0)
    assert np.array_equal(generate(model(), ids, 15, temperature=temperature), greedy)
    assert not np.array_equal(generate(model(), ids, 15, temperature=9), greedy)


def test_a_seed_means_one_text() -> None:
    ids = np.array([[1, 2], [1, 2], [3, 4]])
    texts = [generate(model(), ids, 12, temperature=2.0, seed=s) for s in (5, 5, 6)]
    assert np.array_equal(texts[0], texts[1])
    assert not np.array_equal(texts[0], texts[2])
    assert not np.array_equal(texts[0][0], texts[0][1])  # equal prompts do not share their luck
    assert np.array_equal(
        np.stack(list(stream(model(), ids, 12, temperature=2.0, seed=5)), axis=1), texts[0][:, 2:]
    )
    assert np.array_equal(generate(model(), ids, 12, temperature=2.0, top_k=99, seed=5), texts[0])
    greedy = generate(model(), ids, 12, temperature=0)
    assert np.array_equal(generate(model(), ids, 12, temperature=2.0, top_k=1), greedy)
    assert np.array_equal(generate(model(), ids.tolist(), 0), ids)


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_full_context_goes_on_from_its_newer_half(limit: int, length: int) -> None:
    m = model(max_position_embeddings=limit)
    ids = np.random.default_rng(0).integers(0, 13, (2, length))
    expected, window = ids, ids[:, -limit:]
    for step in range(20):
        if step and window.shape[1] > limit:
            window = window[:, -max(1, limit // 2) :]
        token = m(window).data[:, -1].argmax(axis=-1)[:, None]
        expected, window = (
            np.concatenate([expected, token], axis=1),
            np.concatenate([window, token], axis=1),
        )
    assert np.array_equal(generate(m, ids, 20, temperature=0), expected)


# ---- the distribution of one token ----


def chi_square_tail(x: float, k: int) -> float:
    """P(X >= x) for a chi-square of k degrees of freedom: the regularised gamma function by its series."""
    if x <= 0:
        return 1.0
    term = total = 1 / (k / 2)
    n = k / 2
    while term > total * 1e-17:
        n += 1
        term *= x / 2 / n
        total += term
    return 1 - total * math.exp(k / 2 * math.log(x / 2) - x / 2 - math.lgamma(k / 2))


def test_the_chi_square_tail_is_right() -> None:
    for x, k, p in (
        (3.841458820694124, 1, 0.05),
        (18.307038053275146, 10, 0.05),
        (29.58829844507442, 10, 0.001),
    ):
        assert chi_square_tail(x, k) == pytest.approx(p, rel=1e-9)


P = np.array([0.07, 0.31, 0.02, 0.19, 0.11, 0.3])  # by rank: 1, 5, 3, 4, 0, 2


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "support"),
    [
        (1.0, 6, 1.0, [0, 1, 2, 3, 4, 5]),
        (0.5, 6, 1.0, [0, 1, 2, 3, 4, 5]),
        (3.0, 6, 1.0, [0, 1, 2, 3, 4, 5]),
        (1.0, 1, 1.0, [1]),
        (1.0, 3, 1.0, [1, 3, 5]),
        (1.0, 6, 0.3, [1]),
        (1.0, 6, 0.32, [1, 5]),
        (1.0, 6, 0.62, [1, 3, 5]),
        (1.0, 6, 0.97, [0, 1, 3, 4, 5]),
        (1.0, 6, 1e-9, [1]),
        (1.0, 3, 0.5, [1, 5]),  # of the three that top_k leaves, the two likeliest reach half
        (2.0, 4, 0.9, [1, 3, 4, 5]),
    ],
)
def test_tokens_follow_the_distribution_and_never_leave_its_support(
    temperature: float, top_k: int, top_p: float, support: list[int]
) -> None:
    draws = 40_000
    logits = np.tile(np.log(P) + 5.0, (draws, 1))
    chosen = sample(logits, np.random.default_rng(11), temperature, top_k, top_p)
    counts = np.bincount(chosen, minlength=6)
    assert np.flatnonzero(counts).tolist() == support
    kept = np.zeros(6)
    kept[support] = P[support] ** (1 / temperature)
    expected = draws * kept[support] / kept.sum()
    statistic = float(((counts[support] - expected) ** 2 / expected).sum())
    assert len(support) == 1 or chi_square_tail(statistic, len(support) - 1) > 1e-6


@given(st.integers(0, 2**32), st.integers(1, 8), st.floats(1e-6, 1.0), st.floats(0.01, 10))
def test_no_token_outside_the_support(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((200, 8)) * 3
    chosen = sample(logits, rng, temperature, top_k, top_p)
    scaled = logits / temperature
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    larger = p > p[np.arange(200), chosen][:, None]
    assert (larger.sum(axis=1) < top_k).all()
    kept = np.where(np.argsort(np.argsort(-p, axis=1), axis=1) < top_k, p, 0)
    assert ((kept * larger).sum(axis=1) / kept.sum(axis=1) < top_p + 1e-12).all()


def test_each_row_has_its_own_distribution() -> None:
    logits = np.full((3, 4), -np.inf)
    logits[[0, 1, 2], [2, 0, 3]] = 0.0
    assert sample(logits, np.random.default_rng(0), 1.0, 4, 1.0).tolist() == [2, 0, 3]
    assert sample(np.array([[1.0, 3.0, 3.0]]), np.random.default_rng(0), 0.0, 3, 1.0).tolist() == [
        1
    ]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("max_new_tokens", bad) for bad in (-1,)],
        *[("temperature", bad) for bad in (-0.1, math.nan, math.inf)],
        *[("top_k", bad) for bad in (0, -3)],
        *[("top_p", bad) for bad in (0.0, -0.5, 1.5, math.nan)],
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any) -> None:
    settings = {"max_new_tokens": 3} | {setting: value}
    with pytest.raises(ConfigError, match=setting):
        generate(model(), np.array([[1]]), **settings)


@pytest.mark.parametrize(
    "ids", [np.zeros((1, 0), int), np.zeros((2,), int), np.zeros((1, 1, 1), int)]
)
def test_a_prompt_needs_a_token(ids: np.ndarray) -> None:
    with pytest.raises(DataError, match="at least one token"):
        generate(model(), ids, 3)


def test_a_prompt_outside_the_vocabulary() -> None:
    with pytest.raises(DataError, match="ids must be in"):
        generate(model(), np.array([[13]]), 3)


@pytest.mark.parametrize("row", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_say_nothing_are_no_token(row: list[float], temperature: float) -> None:
    with pytest.raises(NonFiniteError, match="no finite logit"):
        sample(np.array([row]), np.random.default_rng(0), temperature, 2, 1.0)
