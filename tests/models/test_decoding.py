"""Decoding on arrays: the model's logits to rounding, and the models that it leaves alone."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, randomised, shape
from strict_xp import STRICT

from minilora import (
    CausalLM,
    LoraConfig,
    TransformerConfig,
    generate,
    get_peft_model,
    no_grad,
    quantize,
)
from minilora.models import decoding as decoding_module
from minilora.models.decoding import Decoding, Weights
from minilora.models.transformer import KeyValueCache
from minilora.threads import Workers


def laid_out(model: Any) -> Weights | None:
    with Workers(1) as workers:
        return Weights.of(model.get_base_model(), workers)


def model_of(seed: int, adapter: str, **options: Any) -> Any:
    """A model in float64 with random norms and biases, and an adapter or none."""
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 12}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    model: Any = CausalLM(TransformerConfig(**sizes, **options), seed=seed, dtype="float64")
    if adapter != "none":
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        if adapter == "a saved head":
            config = dataclasses.replace(config, modules_to_save=["lm_head"])
        model = get_peft_model(model, config, seed=seed)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data = rng.standard_normal(p.shape) * (0.4 if p.ndim == 2 else 1.0)
    return model.eval()


def prefilled(model: Any, prompt: np.ndarray, limit: int) -> KeyValueCache:
    """The keys and values of a prompt."""
    cache = KeyValueCache(model, len(prompt), limit)
    with no_grad():
        model(prompt, cache)
    return cache


@given(
    seed=st.integers(0, 99),
    adapter=st.sampled_from(["none", "all-linear", "a saved head"]),
    kv=st.sampled_from([1, 2, 4]),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    tied=st.booleans(),
    prompt=st.integers(1, 4),
    steps=st.integers(1, 5),
)
def test_decoding_gives_the_logits_of_the_model(
    seed, adapter, kv, attention_bias, mlp_bias, tied, prompt, steps
) -> None:
    options = {"num_key_value_heads": kv, "tie_word_embeddings": tied}
    options |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
    model = model_of(seed, adapter, **options)
    count = prompt + steps
    ids = np.random.default_rng(seed).integers(0, 11, (3, count))
    with no_grad():
        expected = model(ids).data
    cache = prefilled(model, ids[:, :prompt], count)
    weights = laid_out(model)
    assert weights is not None
    decoding = Decoding(weights, cache)
    # Each of some 20 operations on the way rounds sums of at most 16 terms: far below this.
    bound = 1e-12 * np.abs(expected).max()
    for t in range(prompt, count):
        logits = decoding(ids[:, t])
        assert (decoding.lengths == t + 1).all()
        assert np.abs(logits - expected[:, t]).max() <= bound


@given(configs(), st.integers(0, 99), st.integers(1, 6), st.integers(1, 8))
def test_decoding_continues_every_type_as_a_whole_pass_would(
    config: Any, seed: int, prompt: int, steps: int
) -> None:
    """With windows, norms of heads and biases; GPT-2 computes each token itself."""
    model = randomised(config, seed=seed).eval()
    count = prompt + steps
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, count))
    cache = prefilled(model, ids[:, :prompt], count)
    weights = laid_out(model)
    assert (weights is None) == (config.model_type == "gpt2")
    decoding = Decoding(weights, cache) if weights else None
    with no_grad():
        expected = model(ids).data
        bound = 1e-12 * max(1, np.abs(expected).max())
        for t in range(prompt, count):
            if decoding:
                logits = decoding(ids[:, t])
            else:
                logits = model(ids[:, t : t + 1], cache).data[:, -1]
            assert np.abs(logits - expected[:, t]).max() <= bound


@given(configs(), st.integers(0, 99), st.integers(1, 4), st.integers(1, 9))
def test_generate_is_greedy_by_whole_passes_for_every_type(
    config: Any, seed: int, prompt: int, count: int
) -> None:
    model = randomised(config, seed=seed).eval()
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, prompt))
    expected = ids
    for _ in range(count):
        token = model(expected).data[:, -1].argmax(axis=-1)
        expected = np.concatenate([expected, token[:, None]], axis=1)
    np.testing.assert_array_equal(generate(model, ids, count, temperature=0), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(seed=st.integers(0, 99), rows=st.integers(1, 18), small=st.integers(1, 40))
def test_decoding_in_blocks_of_columns_gives_the_logits_of_the_model(
    dtype: str, seed: int, rows: int, small: int
) -> None:
    """Each row has `small` columns to multiply with 32 inputs before a product is cut."""
    config = shape("llama", hidden_size=32, intermediate_size=96, vocab_size=80, head_dim=16)
    model = randomised(config, dtype, seed).eval()
    ids = np.random.default_rng(seed).integers(0, 80, (rows, 4))
    cache = prefilled(model, ids[:, :3], 4)
    with pytest.MonkeyPatch.context() as patch, Workers(1) as workers:
        patch.setattr(decoding_module, "SMALL", rows * 32 * small * 8)
        weights = Weights.of(model, workers, rows)
    assert weights is not None
    is_cut = 3 <= rows <= 16 and 4 <= small < 24  # gate and up have 192 columns
    assert (weights.layers[0].gate_up.weight.ndim == 3) == is_cut
    with no_grad():
        expected = model(ids).data[:, -1]
    bound = 100 * np.finfo(dtype).eps * np.abs(expected).max()
    assert np.abs(Decoding(weights, cache)(ids[:, 3]) - expected).max() <= bound


def test_generate_with_blocks_of_columns_gives_the_same_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = CausalLM(shape("llama", hidden_size=32, head_dim=16), seed=3).eval()
    ids = np.random.default_rng(3).integers(0, 11, (20, 3))
    monkeypatch.setattr(decoding_module, "FEW_ROWS", ())
    text = generate(model, ids, 20, temperature=0)
    monkeypatch.undo()
    monkeypatch.setattr(decoding_module, "SMALL", 10 * 32 * 32)
    np.testing.assert_array_equal(generate(model, ids, 20, temperature=0), text)


def small(size: int) -> CausalLM:
    sizes = {"hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1}
    return CausalLM(TransformerConfig(vocab_size=11, **sizes), seed=0)


def test_decoding_of_float32_stays_float32() -> None:
    model = small(16)
    weights = laid_out(model)
    assert weights is not None
    decoding = Decoding(weights, KeyValueCache(model, 2, 4))
    assert decoding(np.array([1, 2])).dtype == np.float32


def test_weights_of_is_none_where_a_layer_must_run_on_its_own() -> None:
    def adapted(model: CausalLM, **options: Any) -> Any:
        return get_peft_model(model, LoraConfig(r=2, **options)).eval()

    every = {"target_modules": "all-linear"}
    cases = {"quantised": adapted(quantize(small(64)), **every)}
    cases["dropout"] = adapted(small(64), lora_dropout=0.5, **every).train()
    cases["a saved norm"] = adapted(small(64), modules_to_save=["input_layernorm"])
    cases["a head's norm"] = adapted(CausalLM(shape("qwen3")), modules_to_save=["k_norm"])
    for name, model in cases.items():
        assert laid_out(model) is None, name
        assert generate(model, [[1, 2]], 4).shape == (1, 6)


def test_weights_of_is_none_for_a_model_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(64)
    size = sum(p.data.nbytes for p in model.parameters())
    monkeypatch.setattr(decoding_module, "LARGEST", size)
    assert laid_out(model) is not None
    monkeypatch.setattr(decoding_module, "LARGEST", size - 1)
    assert laid_out(model) is None


def test_generate_with_decoding_gives_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the context, too: generation then continues from the newer half."""
    model = model_of(3, "all-linear")
    real = Decoding.__call__
    calls = []

    def call(self: Decoding, ids: np.ndarray) -> np.ndarray:
        calls.append(len(ids))
        return real(self, ids)

    monkeypatch.setattr(Decoding, "__call__", call)
    prompt = np.arange(6).reshape(2, 3)
    text = generate(model, prompt, 50, temperature=0.0)
    # Each half of the prompts is one of the two. The prompt gives one of the 50 tokens, and so does
    # each fresh start in a full context.
    assert calls == [1] * 2 * 47
    monkeypatch.setattr(decoding_module, "LARGEST", 0)
    np.testing.assert_array_equal(generate(model, prompt, 50, temperature=0.0), text)
    assert len(calls) == 2 * 47


@pytest.mark.parametrize("device", ["cpu", "strict"])
def test_generate_uses_a_gpu_in_the_calling_thread_only(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy's current device belongs to a thread: in another one it would be cuda:0."""
    build = decoding_module._build_product
    threads = set()

    def recording(*args: Any) -> Any:
        threads.add(threading.get_ident())
        return build(*args)

    monkeypatch.setattr(decoding_module, "_build_product", recording)
    model = CausalLM(shape("llama"), seed=1, device=STRICT if device == "strict" else device)
    generate(model, np.zeros((2, 3), np.int64), 2, temperature=0)
    if device == "cpu":
        assert len(threads) == 2
    else:
        assert threads == {threading.get_ident()}
