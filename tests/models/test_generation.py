"""Generation: the cache changes nothing, and tokens follow the distribution that was asked for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import randomised, shape

from minilora.errors import ConfigError, DataError, NonFiniteError
from minilora.lora import LoraConfig, PeftModel, get_peft_model
from minilora.models import decoding, generation
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


def greedy(model: Any, ids: Any, count: int) -> np.ndarray:
    return generate(model, ids, count, temperature=0)


prompts = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 99)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 13, drawn[:2])
)
seeds = st.integers(0, 9)
stop_ids = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@pytest.mark.parametrize("make", [model, adapted])
@given(prompts, seeds, st.integers(0, 12))
def test_generate_with_a_cache_is_greedy_by_whole_passes(
    make: Any, ids: np.ndarray, seed: int, count: int
) -> None:
    m = make(seed)
    expected = ids
    for _ in range(count):
        token = m(expected).data[:, -1].argmax(axis=-1)
        expected = np.concatenate([expected, token[:, None]], axis=1)
    assert np.array_equal(greedy(m, ids, count), expected)


@given(prompts, seeds)
def test_generate_for_prompts_together_is_that_for_each_alone(ids: np.ndarray, seed: int) -> None:
    m = model(seed)
    alone = [greedy(m, row[None], 10) for row in ids]
    assert np.array_equal(greedy(m, ids, 10), np.concatenate(alone))


@given(prompts, seeds)
def test_generate_after_merging_gives_the_same_text(ids: np.ndarray, seed: int) -> None:
    m = adapted(seed)
    unmerged = greedy(m, ids, 15)
    m.merge_adapter()
    assert np.array_equal(greedy(m, ids, 15), unmerged)
    m.unmerge_adapter()
    with m.disable_adapter():
        assert np.array_equal(greedy(m, ids, 15), greedy(model(seed), ids, 15))
    assert np.array_equal(greedy(m.merge_and_unload(), ids, 15), unmerged)


def test_generate_sees_the_adapter() -> None:
    ids = np.array([[1, 2, 3]])
    assert not np.array_equal(greedy(adapted(), ids, 15), greedy(model(), ids, 15))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-300])
def test_generate_at_a_low_temperature_is_greedy(temperature: float) -> None:
    ids = np.array([[1, 2], [3, 4]])
    expected = greedy(model(), ids, 15)
    assert np.array_equal(generate(model(), ids, 15, temperature=temperature), expected)
    assert not np.array_equal(generate(model(), ids, 15, temperature=9), expected)


def test_generate_gives_one_text_per_seed() -> None:
    ids = np.array([[1, 2], [1, 2], [3, 4]])
    text = generate(model(), ids, 12, temperature=2.0, seed=5)
    assert np.array_equal(generate(model(), ids, 12, temperature=2.0, seed=5), text)
    assert not np.array_equal(generate(model(), ids, 12, temperature=2.0, seed=6), text)
    assert not np.array_equal(text[0], text[1])  # equal prompts draw different numbers
    assert np.array_equal(generate(model(), ids, 12, temperature=2.0, top_k=99, seed=5), text)


def test_stream_yields_the_tokens_that_generate_appends() -> None:
    ids = np.array([[1, 2], [1, 2], [3, 4]])
    text = generate(model(), ids, 12, temperature=2.0, seed=5)
    tokens = list(stream(model(), ids, 12, temperature=2.0, seed=5))
    assert np.array_equal(np.stack(tokens, axis=1), text[:, 2:])


def test_generate_with_top_k_of_one_is_greedy_and_of_no_tokens_is_the_prompt() -> None:
    ids = np.array([[1, 2], [1, 2], [3, 4]])
    likeliest = generate(model(), ids, 12, temperature=2.0, top_k=1)
    assert np.array_equal(likeliest, greedy(model(), ids, 12))
    assert np.array_equal(generate(model(), ids.tolist(), 0), ids)


# ---- prompts of several lengths ------------------------------------------------------------------

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
SAMPLED = {"temperature": 1.5, "top_k": 7, "top_p": 0.9}


def prompts_of(lengths: list[int], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 13, length) for length in lengths]


def test_generate_returns_a_list_for_prompts_of_several_lengths_only() -> None:
    texts = generate(model(), [[1, 2, 3], [4]], 5, temperature=0)
    assert [text.shape for text in texts] == [(8,), (6,)]
    assert texts[0][:3].tolist() == [1, 2, 3]
    assert generate(model(), [np.array([1, 2]), (3, 4)], 5).shape == (2, 7)
    untouched = generate(model(), [[1, 2, 3], [4]], 0)
    assert [text.tolist() for text in untouched] == [[1, 2, 3], [4]]


@pytest.mark.parametrize("way", ["laid out", "ordinary", "gpt2"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED])
@given(lengths, seeds, st.integers(1, 20), st.sampled_from([1, 2, 5, 11, 24]))
def test_generate_for_prompts_of_several_lengths_is_that_for_each_alone(
    way: str, sampling: dict[str, Any], lengths: list[int], seed: int, count: int, limit: int
) -> None:
    """Also where some contexts are full before others; the tokens are the same ones."""
    options: dict[str, Any] = {"max_position_embeddings": limit}
    if way == "gpt2":
        m = randomised(shape("gpt2", **options), seed=seed)
    else:
        m = model(seed, **options)
    vocab_size = m.config.vocab_size
    prompts = [prompt % vocab_size for prompt in prompts_of(lengths, seed)]
    with pytest.MonkeyPatch.context() as patch:
        if way == "ordinary":
            patch.setattr(decoding, "LARGEST", 0)
        texts = generate(m.eval(), prompts, count, seed=seed, **sampling)
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            options = sampling | {"seed": seed, "rows": [row]}
            alone = generate(m, prompt[None], count, **options)
            assert np.array_equal(text, alone[0])


@pytest.mark.parametrize("window", [1, 3])
@given(lengths, seeds)
def test_generate_for_prompts_of_several_lengths_sees_each_window(
    window: int, lengths: list[int], seed: int
) -> None:
    m = randomised(shape("mistral", sliding_window=window), seed=seed).eval()
    prompts = [prompt % m.config.vocab_size for prompt in prompts_of(lengths, seed)]
    for prompt, text in zip(prompts, greedy(m, prompts, 8), strict=True):
        likeliest = m(text[None]).data[0, len(prompt) - 1 : -1].argmax(axis=-1)
        assert np.array_equal(text[len(prompt) :], likeliest)


@given(lengths, seeds, stop_ids, st.sampled_from([0.0, 1.5]))
def test_generate_for_prompts_of_several_lengths_ends_each_text(
    lengths: list[int], seed: int, stops: list[int], temperature: float
) -> None:
    prompts = prompts_of(lengths, seed)
    m = model(seed)
    options = {"temperature": temperature, "eos": stops, "pad": 11}
    texts = generate(m, prompts, 12, **options)
    news = []
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        alone = generate(m, prompt[None], 12, **options, rows=[row])[0]
        assert np.array_equal(text[: len(alone)], alone)
        assert (text[len(alone) :] == 11).all()
        news.append(len(text) - len(prompt))
        assert news[-1] >= len(alone) - len(prompt)
    assert len(set(news)) == 1


@given(lengths, seeds, st.integers(0, 4))
def test_stream_gives_a_text_that_its_neighbours_do_not_change(
    lengths: list[int], seed: int, chosen: int
) -> None:
    prompts = prompts_of(lengths, seed)
    m = model(seed)
    texts = generate(m, prompts, 9, seed=seed, temperature=2.0)
    rows = [row for row in range(len(prompts)) if row != chosen] or [0]
    some = generate(m, [prompts[row] for row in rows], 9, seed=seed, temperature=2.0, rows=rows)
    for row, text in zip(rows, some, strict=True):
        assert np.array_equal(text, texts[row])


def test_stream_gives_the_first_row_the_random_numbers_of_the_seed() -> None:
    m = model()
    ids = [1, 2, 3]
    rng = np.random.default_rng(5)
    for token in stream(m, [ids, [4]], 12, temperature=2.0, seed=5):
        logits = m(np.array([ids])).data[:, -1]
        assert token[0] == sample(logits, rng, 2.0, 13, 1.0)[0]
        ids.append(int(token[0]))


def test_generate_in_a_full_context_reads_only_the_texts_that_are_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = model(max_position_embeddings=8)
    read = []
    call = type(m).__call__

    def counting(self: Any, ids: np.ndarray, *rest: Any, **options: Any) -> Any:
        read.append(np.shape(ids))
        return call(self, ids, *rest, **options)

    monkeypatch.setattr(type(m), "__call__", counting)
    greedy(m, [[1], [2, 3, 4], [5, 6, 7]], 7)
    # The prompts, by length; then the longer ones, which one thread has each.
    assert sorted(read) == [(1, 1), (1, 3), (1, 3), (1, 4), (1, 4)]


# ---- the end of a text ---------------------------------------------------------------------------


@given(prompts, seeds, stop_ids, st.sampled_from([None, 0, 12]), st.sampled_from([0.0, 1.0]))
def test_generate_with_eos_is_the_text_without_up_to_its_end(
    ids: np.ndarray, seed: int, stops: list[int], pad: int | None, temperature: float
) -> None:
    settings = {"temperature": temperature, "seed": seed}
    whole = generate(model(seed), ids, 12, **settings)
    ended = generate(model(seed), ids, 12, **settings, eos=stops, pad=pad)
    T = ids.shape[1]
    expected = whole.copy()
    lengths = []
    for row in expected:
        ends = np.flatnonzero(np.isin(row[T:], stops))
        length = int(ends[0]) + 1 if len(ends) else 12
        row[T + length :] = stops[0] if pad is None else pad
        lengths.append(length)
    assert np.array_equal(ended, expected[:, : T + max(lengths)])


def test_stream_ends_with_the_token_that_ends_the_last_text() -> None:
    ids = np.array([[1, 2], [3, 4]])
    tokens = np.stack(list(stream(model(), ids, 12, temperature=0)), axis=1)
    first, second = tokens[0, 2], tokens[1, 5]
    ended = list(stream(model(), ids, 12, temperature=0, eos=(first, second), pad=11))
    assert len(ended) < 12
    assert set(ended[-1]) <= {first, second, 11}
    alone = list(stream(model(), ids[:1], 12, temperature=0, eos=int(first)))
    assert alone[-1] == [first]
    assert len(alone) == tokens[0].tolist().index(first) + 1


@pytest.mark.parametrize("eos", [-1, 13, 1.0, True, None, [2, 13], ["2"]])
def test_stream_refuses_an_eos_that_is_no_id(eos: Any) -> None:
    with pytest.raises(ConfigError, match="eos must be ids from 0 to 12, got"):
        next(stream(model(), [[1]], 3, eos=eos))


@pytest.mark.parametrize("pad", [-1, 13, 1.0, True])
def test_stream_refuses_a_pad_that_is_no_id(pad: Any) -> None:
    with pytest.raises(ConfigError, match="pad must be an id from 0 to 12, got"):
        next(stream(model(), [[1]], 3, eos=2, pad=pad))


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_generate_goes_on_to_the_stretched_context(rope: str) -> None:
    """max_position_embeddings is 24 here, but the positions reach to 48."""
    m = model(rope_parameters={"rope_type": rope, "factor": 2.0})
    ids = np.arange(30)[None] % 13
    expected = ids
    for _ in range(18):
        token = m(expected).data[:, -1].argmax(axis=-1)
        expected = np.concatenate([expected, token[:, None]], axis=1)
    assert np.array_equal(greedy(m, ids, 18), expected)
    message = "49 positions, but the model has max_position_embeddings = 24, stretched to 48"
    with pytest.raises(DataError, match=message):
        m(np.zeros((1, 49), int))


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_generate_in_a_full_context_continues_from_its_newer_half(limit: int, length: int) -> None:
    m = model(max_position_embeddings=limit)
    ids = np.random.default_rng(0).integers(0, 13, (2, length))
    expected = ids
    window = ids[:, -limit:]
    for step in range(20):
        if step and window.shape[1] > limit:
            window = window[:, -max(1, limit // 2) :]
        token = m(window).data[:, -1].argmax(axis=-1)[:, None]
        expected = np.concatenate([expected, token], axis=1)
        window = np.concatenate([window, token], axis=1)
    assert np.array_equal(greedy(m, ids, 20), expected)


# ---- the distribution of one token --------------------------------------------------------------


def chi_square_tail(x: float, k: int) -> float:
    """P(X >= x) for a chi-square of k degrees of freedom: the regularised gamma by its series."""
    if x <= 0:
        return 1.0
    term = total = 1 / (k / 2)
    n = k / 2
    while term > total * 1e-17:
        n += 1
        term *= x / 2 / n
        total += term
    return 1 - total * math.exp(k / 2 * math.log(x / 2) - x / 2 - math.lgamma(k / 2))


def test_chi_square_tail_has_the_values_of_tables() -> None:
    assert chi_square_tail(3.841458820694124, 1) == pytest.approx(0.05, rel=1e-9)
    assert chi_square_tail(18.307038053275146, 10) == pytest.approx(0.05, rel=1e-9)
    assert chi_square_tail(29.58829844507442, 10) == pytest.approx(0.001, rel=1e-9)


P = np.array([0.07, 0.31, 0.02, 0.19, 0.11, 0.3])  # by rank: 1, 5, 3, 4, 0, 2
DISTRIBUTIONS: list[tuple[float, int, float, list[int]]] = []


def supports(*tokens: int, temperature: float = 1.0, top_k: int = 6, top_p: float = 1.0) -> None:
    DISTRIBUTIONS.append((temperature, top_k, top_p, list(tokens)))


supports(0, 1, 2, 3, 4, 5)
supports(0, 1, 2, 3, 4, 5, temperature=0.5)
supports(0, 1, 2, 3, 4, 5, temperature=3.0)
supports(1, top_k=1)
supports(1, 3, 5, top_k=3)
supports(1, top_p=0.3)
supports(1, 5, top_p=0.32)
supports(1, 3, 5, top_p=0.62)
supports(0, 1, 3, 4, 5, top_p=0.97)
supports(1, top_p=1e-9)
supports(1, 5, top_k=3, top_p=0.5)  # the two likeliest of the three that top_k leaves reach half
supports(1, 3, 4, 5, temperature=2.0, top_k=4, top_p=0.9)


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "support"), DISTRIBUTIONS)
def test_sample_follows_the_distribution_and_never_leaves_its_support(
    temperature: float, top_k: int, top_p: float, support: list[int]
) -> None:
    draws = 40_000
    logits = np.tile(np.log(P) + 5.0, (draws, 1))
    tokens = sample(logits, np.random.default_rng(11), temperature, top_k, top_p)
    counts = np.bincount(tokens, minlength=6)
    assert np.flatnonzero(counts).tolist() == support
    weights = P[support] ** (1 / temperature)
    expected = draws * weights / weights.sum()
    statistic = float(((counts[support] - expected) ** 2 / expected).sum())
    assert len(support) == 1 or chi_square_tail(statistic, len(support) - 1) > 1e-6


@given(st.integers(0, 2**32), st.integers(1, 8), st.floats(1e-6, 1.0), st.floats(0.01, 10))
def test_sample_draws_no_token_outside_the_support(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((200, 8)) * 3
    tokens = sample(logits, rng, temperature, top_k, top_p)
    scaled = logits / temperature
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    larger = p > p[np.arange(200), tokens][:, None]
    assert (larger.sum(axis=1) < top_k).all()
    rank = np.argsort(np.argsort(-p, axis=1), axis=1)
    kept = np.where(rank < top_k, p, 0)
    before = (kept * larger).sum(axis=1) / kept.sum(axis=1)
    assert (before < top_p + 1e-12).all()


def sample_by_sorting_all(
    logits: np.ndarray, rng: np.random.Generator, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """`sample` as it is defined: by a stable sort of the whole vocabulary."""
    z = logits / temperature
    order = np.argsort(-z, axis=-1, kind="stable")
    p = np.exp(np.take_along_axis(z, order, axis=-1) - z.max(axis=-1, keepdims=True))
    p[:, top_k:] = 0
    p /= p.sum(axis=-1, keepdims=True)
    p[p.cumsum(axis=-1) - p >= top_p] = 0
    drawn = rng.random((len(p), 1)) * p.sum(axis=-1, keepdims=True)
    rank = (p.cumsum(axis=-1) > drawn).argmax(axis=-1)
    return np.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_sample_with_top_k_draws_what_a_whole_sort_draws(
    seed: int, V: int, top_k: int, has_ties: bool
) -> None:
    """Of equal logits the smaller id comes first, also where only some of them are kept."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((20, V)) * 3
    if has_ties:
        logits = np.rint(logits)
        logits[rng.random(logits.shape) < 0.2] = -np.inf
        logits[:, rng.integers(V)] = 1
    inputs = 0.8, min(top_k, V), 0.95
    expected = sample_by_sorting_all(logits, np.random.default_rng(seed), *inputs)
    for few in (generation.FEW, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "FEW", few)
            tokens = sample(logits, np.random.default_rng(seed), *inputs)
        np.testing.assert_array_equal(tokens, expected)


def test_sample_treats_each_row_by_itself() -> None:
    logits = np.full((3, 4), -np.inf)
    logits[[0, 1, 2], [2, 0, 3]] = 0.0
    rng = np.random.default_rng(0)
    assert sample(logits, rng, 1.0, 4, 1.0).tolist() == [2, 0, 3]
    assert sample(np.array([[1.0, 3.0, 3.0]]), rng, 0.0, 3, 1.0).tolist() == [1]


@pytest.mark.parametrize("row", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_refuses_logits_that_are_not_finite(row: list[float], temperature: float) -> None:
    with pytest.raises(NonFiniteError, match="no finite logit"):
        sample(np.array([row]), np.random.default_rng(0), temperature, 2, 1.0)


# ---- what is refused ----------------------------------------------------------------------------

BAD: list[tuple[str, Any]] = []


def bad(setting: str, *values: Any) -> None:
    for value in values:
        BAD.append((setting, value))


bad("max_new_tokens", -1)
bad("temperature", -0.1, math.nan, math.inf)
bad("top_k", 0, -3)
bad("top_p", 0.0, -0.5, 1.5, math.nan)


@pytest.mark.parametrize(("setting", "value"), BAD)
def test_generate_refuses_a_setting_out_of_range_by_name(setting: str, value: Any) -> None:
    settings = {"max_new_tokens": 3, setting: value}
    with pytest.raises(ConfigError, match=f"{setting} must be"):
        generate(model(), np.array([[1]]), **settings)


def test_generate_refuses_tasks_of_a_model_without_tasks() -> None:
    with pytest.raises(ConfigError, match="tasks were given, but the model has none"):
        generate(model(), np.array([[1]]), 3, tasks="a")


@pytest.mark.parametrize("size", [(1, 0), (2,), (1, 1, 1)])
def test_generate_needs_a_token(size: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="at least one token"):
        generate(model(), np.zeros(size, int), 3)


@pytest.mark.parametrize("ids", [[], [[]], [1, 2], [[1], []], [[1, 2], 3], [[1], [[2]]]])
def test_generate_refuses_a_list_with_a_prompt_that_is_none(ids: list[Any]) -> None:
    with pytest.raises(DataError, match="a prompt needs at least one token"):
        generate(model(), ids, 3)


def test_generate_names_the_prompt_that_has_no_token() -> None:
    with pytest.raises(DataError, match=r"got \(0,\) for prompt 1"):
        generate(model(), [[1, 2], [], [3]], 3)


@pytest.mark.parametrize("rows", [[], [0], [0, -1], [0, 1.0], [0, True], [0, 1, 2], ["a", 1]])
def test_stream_refuses_rows_that_are_not_one_number_per_prompt(rows: list[Any]) -> None:
    with pytest.raises(ConfigError, match="rows must be 2 integers of at least 0"):
        next(stream(model(), [[1], [2, 3]], 3, rows=rows))


def test_generate_refuses_a_prompt_outside_the_vocabulary() -> None:
    with pytest.raises(DataError, match="ids must be in"):
        generate(model(), np.array([[13]]), 3)
