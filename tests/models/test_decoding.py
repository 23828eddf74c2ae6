"""One token at a time on arrays: the model's own logits to rounding, and where it must stand aside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, randomised, shape

from minilora import (
    CausalLM,
    LoraConfig,
    TransformerConfig,
    generate,
    get_peft_model,
    no_grad,
    quantize,
)
from minilora.models import decoding as room
from minilora.models.decoding import Decoding, Weights
from minilora.models.transformer import KeyValueCache
from minilora.threads import Workers


def laid_out(model: Any) -> Weights | None:
    with Workers(1) as workers:
        return Weights.of(model.get_base_model(), workers)


def model_of(seed: int, adapter: str, **options: Any) -> Any:
    config = TransformerConfig(
        vocab_size=11, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, **options,
    )  # fmt: skip
    model: Any = CausalLM(config, seed=seed, dtype="float64")
    if adapter != "none":
        saved = ["lm_head"] if adapter == "a saved head" else None
        options = {
            "target_modules": "all-linear",
            "init_lora_weights": False,
            "modules_to_save": saved,
        }
        model = get_peft_model(model, LoraConfig(r=2, **options), seed=seed)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data = rng.standard_normal(p.shape) * (
            0.4 if p.ndim == 2 else 1.0
        )  # norms and biases, too
    return model.eval()


@given(
    seed=st.integers(0, 99),
    adapter=st.sampled_from(["none", "all-linear", "a saved head"]),
    kv=st.sampled_from([1, 2, 4]),
    biases=st.tuples(st.booleans(), st.booleans()),
    tied=st.booleans(),
    parts=st.tuples(st.integers(1, 4), st.integers(1, 5)),
)
def test_the_logits_are_the_model_s(seed, adapter, kv, biases, tied, parts) -> None:
    options = {
        "num_key_value_heads": kv,
        "attention_bias": biases[0],
        "mlp_bias": biases[1],
        "tie_word_embeddings": tied,
    }
    model = model_of(seed, adapter, **options)
    prompt, steps = parts
    ids = np.random.default_rng(seed).integers(0, 11, (3, prompt + steps))
    with no_grad():
        expected = model(ids).data
        cache = KeyValueCache(model, 3, prompt + steps)
        model(ids[:, :prompt], cache)
    weights = laid_out(model)
    assert weights is not None
    decoding = Decoding(weights, cache)
    for t in range(prompt, prompt + steps):
        got = decoding(ids[:, t])
        assert decoding.length == t + 1
        # Each of some 20 operations on the way rounds sums of at most 16 terms: a bound of 1e-12 is far above.
        assert np.abs(got - expected[:, t]).max() <= 1e-12 * np.abs(expected).max()


@given(configs(), st.integers(0, 99), st.integers(1, 6), st.integers(1, 8))
def test_every_type_writes_on_as_a_whole_pass_would(
    config: Any, seed: int, prompt: int, steps: int
) -> None:
    """With the laid out weights, or (GPT-2) with the model's own: windows, norms of heads and biases among them."""
    model = randomised(config, seed=seed).eval()
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, prompt + steps))
    with no_grad():
        expected, cache = model(ids).data, KeyValueCache(model, 2, prompt + steps)
        model(ids[:, :prompt], cache)
        weights = laid_out(model)
        assert (weights is None) == (config.model_type == "gpt2")
        decoding = Decoding(weights, cache) if weights else None
        for t in range(prompt, prompt + steps):
            got = decoding(ids[:, t]) if decoding else model(ids[:, t : t + 1], cache).data[:, -1]
            assert np.abs(got - expected[:, t]).max() <= 1e-12 * max(1, np.abs(expected).max())


@given(configs(), st.integers(0, 99), st.integers(1, 4), st.integers(1, 9))
def test_greedy_text_is_that_of_whole_passes(
    config: Any, seed: int, prompt: int, count: int
) -> None:
    model = randomised(config, seed=seed).eval()
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, prompt))
    expected = ids
    for _ in range(count):
        token = model(expected).data[:, -1].argmax(axis=-1)
        expected = np.concatenate([expected, token[:, None]], axis=1)
    np.testing.assert_array_equal(generate(model, ids, count, temperature=0), expected)


def test_float32_stays_float32() -> None:
    model = CausalLM(
        TransformerConfig(vocab_size=11, hidden_size=16, intermediate_size=12, num_hidden_layers=1),
        seed=0,
    )
    weights = laid_out(model)
    assert weights is not None
    assert Decoding(weights, KeyValueCache(model, 2, 4))(np.array([1, 2])).dtype == np.float32


def test_it_stands_aside_where_a_layer_must_run_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(
        vocab_size=11, hidden_size=64, intermediate_size=64, num_hidden_layers=1
    )
    dropped = get_peft_model(
        CausalLM(config), LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear")
    )
    quantised = get_peft_model(
        quantize(CausalLM(config)), LoraConfig(r=2, target_modules="all-linear")
    ).eval()
    saved = get_peft_model(
        CausalLM(config), LoraConfig(r=2, modules_to_save=["input_layernorm"])
    ).eval()
    heads = get_peft_model(
        CausalLM(shape("qwen3")), LoraConfig(r=2, modules_to_save=["k_norm"])
    ).eval()
    cases = {
        "dropout": dropped.train(),
        "quantised": quantised,
        "a saved norm": saved,
        "a head's norm": heads,
    }
    for name, model in cases.items():
        assert laid_out(model) is None, name
        assert generate(model, [[1, 2]], 4).shape == (1, 6)
    plain = CausalLM(config)
    size = sum(p.data.nbytes for p in plain.parameters())
    for largest, copied in ((size, True), (size - 1, False)):
        monkeypatch.setattr(room, "LARGEST", largest)
        assert (laid_out(plain) is not None) == copied


def test_generation_takes_it_and_gives_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the context, too: there generation goes on from the newer half."""
    model, found, calls = model_of(3, "all-linear"), [], []
    real = Decoding.__call__
    monkeypatch.setattr(
        Decoding, "__call__", lambda self, ids: (calls.append(len(ids)), real(self, ids))[1]
    )
    for largest in (1 << 31, 0):
        monkeypatch.setattr(room, "LARGEST", largest)
        found.append(generate(model, np.arange(6).reshape(2, 3), 50, temperature=0.0))
    np.testing.assert_array_equal(*found)
    # Two prompts, a half each. The prompt gives one of the 50 tokens, and so does each fresh start in a full context.
    assert calls == [1] * 2 * 47
