"""inspect --data: parts of an adapter out and alone. Identities hold to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from minilora import AdaLoraConfig, HydraConfig, LoraConfig, TransformerConfig, get_peft_model
from minilora.autograd import no_grad
from minilora.data.batches import PackedRecords
from minilora.errors import ConfigError, NonFiniteError
from minilora.lora.layer import use_adapters
from minilora.lora.maps import IA3Config, LoHaConfig
from minilora.models.transformer import CausalLM
from minilora.tools import effects as module
from minilora.tools.effects import measure_effects, run_from, run_prefix
from minilora.tools.windows import estimate, token_counts, windows_of, wrappers_of
from minilora.training.loop import evaluate

CONTEXT = 8
TEXT = np.random.default_rng(3).integers(0, 16, 60)
PACKED = PackedRecords(
    TEXT[:24], np.ones(24, bool), np.array([0, 8, 15, 24]), np.array([0, 4, 8, 15, 19])
)
GPT2 = TransformerConfig(
    model_type="gpt2",
    vocab_size=16,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    initializer_range=0.4,
    tie_word_embeddings=True,
)
KINDS: dict[str, Any] = {
    "lora": LoraConfig(r=3, target_modules="all-linear"),
    "some": LoraConfig(r=2, target_modules=["v_proj", "down_proj"], layers_to_transform=[1]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"]),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "hydra": HydraConfig(r=2, experts=2, target_modules=["up_proj"]),
    "ends": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "saved": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "tied": LoraConfig(
        r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True
    ),
    "tied copies": LoraConfig(
        r=2, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3]),
}


def adapted(kind: str, seed: int = 0) -> Any:
    """A small model with an adapter whose tensors all differ from their start."""
    if kind == "gpt2":
        model = get_peft_model(CausalLM(GPT2, seed=1), LoraConfig(r=2, target_modules="all-linear"))
    else:
        model = get_peft_model(small.base(tie_word_embeddings="tied" in kind), KINDS[kind])
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + rng.normal(0, 0.2, p.shape).astype(p.dtype)
    return model.eval()


def windows_losses(model: Any, text: Any = TEXT) -> np.ndarray:
    """The model's own losses, by its own forward."""
    base = model.get_base_model()
    with no_grad():
        return np.array(
            [
                float(base(w.ids, targets=w.targets, first_key=w.first_key).data)
                for w in windows_of(text, CONTEXT, None)
            ]
        )


ALL = [*KINDS, "gpt2"]


@pytest.mark.parametrize("kind", [*ALL, "lora of records", "gpt2 of records"])
def test_measure_effects_has_the_adapter_and_the_base_to_the_bit(kind):
    """All layers in are the adapter, all out the base; each layer alone or out is what the model
    computes with that layer switched, without a prefix."""
    kind, _, records = kind.partition(" of ")
    text = PACKED if records else TEXT
    model = adapted(kind)
    tokens = token_counts(windows_of(text, CONTEXT, None))
    wrappers = wrappers_of(model)
    effects = measure_effects(model, text, CONTEXT, threads=2)
    whole = windows_losses(model, text)
    with model.disable_adapter():
        base = windows_losses(model, text)
    assert effects.adapter == estimate(whole, tokens)
    assert effects.base == estimate(base, tokens)
    assert effects.gain == estimate(base - whole, tokens)
    assert effects.tokens == tokens.sum()
    assert effects.base.mean != effects.adapter.mean
    assert [*effects.out] == [*effects.alone] == [*wrappers, ""]
    for path, wrapper in wrappers.items():
        with use_adapters([wrapper], None):
            out = windows_losses(model, text)
        with use_adapters([w for w in wrappers.values() if w is not wrapper], None):
            alone = windows_losses(model, text)
        assert effects.out[path] == estimate(out - whole, tokens)
        assert effects.alone[path] == estimate(base - alone, tokens)
    if effects.scaled:
        assert kind in ("lora", "some", "adalora", "ends", "tied", "gpt2")
        assert [factor for factor, _, _ in effects.scaled] == list(module.LAMBDAS)
        assert effects.scaled[0][1] == effects.base
        assert effects.scaled[-1][1] == effects.adapter
        assert (windows_losses(model, text) == whole).all()
    else:
        assert kind in ("dora", "hydra", "saved", "tied copies", "tokens", "loha", "ia3")


def test_measure_effects_agrees_with_evaluate():
    model = adapted("lora")
    effects = measure_effects(model, TEXT, CONTEXT)
    assert effects.adapter.mean == pytest.approx(evaluate(model, TEXT, CONTEXT), rel=1e-6)


def test_measure_effects_of_a_single_layer_out_is_the_gain():
    """With one layer, out and alone are both the whole gain, and so are the sums."""
    config = LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1])
    model = get_peft_model(small.base(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = p.data + np.float32(0.3)
    effects = measure_effects(model, TEXT, CONTEXT)
    [path, _] = effects.out
    assert effects.out[path] == effects.alone[path] == effects.gain == effects.out[""]


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_measure_effects_takes_directions_out(kind):
    """Each term out is the model with dW - sigma u v^T, and the model comes back to the bit."""
    model = adapted(kind)
    before = small.bits(model)
    path = "model.layers.1.self_attn.q_proj"
    effects = measure_effects(model, TEXT, CONTEXT, directions=["layers.1.self_attn.q_proj"])
    assert small.bits(model) == before
    wrapper = wrappers_of(model)[path]
    adapter = wrapper.entries["default"]
    A, B, s, _ = adapter.part()
    U, values, Vt = np.linalg.svd(s * (B @ A))
    whole = windows_losses(model)
    tokens = token_counts(windows_of(TEXT, CONTEXT, None))
    assert [one.number for one in effects.directions] == list(range(1, len(A) + 1))
    for i, one in enumerate(effects.directions):
        assert one.path == path
        assert one.value == pytest.approx(values[i], rel=1e-6)
        W = wrapper.base_layer.weight
        before_W = W.data.copy()
        dW = s * (B @ A) - values[i] * np.outer(U[:, i], Vt[i])
        W.data = (before_W + dW).astype(np.float32)
        with use_adapters([wrapper], None):
            out = windows_losses(model)
        W.data = before_W
        assert one.out.mean == pytest.approx(estimate(out - whole, tokens).mean, abs=2e-6)


def test_measure_effects_starts_at_the_layer_that_is_switched(monkeypatch):
    """The number of blocks that run: L for each prefix, and L - b for each layer of block b."""
    model = adapted("lora")
    windows = windows_of(TEXT, CONTEXT, None)
    stages: list[int] = []

    def counted(base: Any, prefix: Any, stage: int) -> float:
        stages.append(stage)
        return run_from(base, prefix, stage)

    monkeypatch.setattr(module, "run_from", counted)
    measure_effects(model, TEXT, CONTEXT, threads=1)
    per_window = np.bincount(np.array(stages) + 1) / len(windows)
    # Before the blocks: five lambdas; 2 x 7 layers in each block; behind them: adapter and base.
    assert per_window.tolist() == [5, 14, 14, 2]


@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2]))
def test_run_from_any_stage_is_the_whole_forward_to_the_bit(seed, stage):
    model = MODEL
    window = windows_of(np.random.default_rng(seed).integers(0, 16, 9), CONTEXT, None)[0]
    base = model.get_base_model()
    with no_grad():
        whole = float(base(window.ids, targets=window.targets).data)
    assert run_from(base, run_prefix(base, window), stage) == whole


MODEL = adapted("lora")


@given(st.integers(0, 10**6), st.integers(2, 40))
def test_estimate_has_the_mean_per_token_and_its_standard_error(seed, count):
    """With equal windows it is the error of a mean; windows alike have no error."""
    rng = np.random.default_rng(seed)
    sums = rng.normal(size=count)
    tokens = np.full(count, 4.0)
    mean, error = estimate(sums, tokens)
    assert mean == pytest.approx(np.mean(sums / 4), abs=1e-12)
    assert error == pytest.approx(np.std(sums / 4, ddof=1) / math.sqrt(count), rel=1e-9)
    uneven = rng.integers(1, 9, count).astype(float)
    assert estimate(0.5 * uneven, uneven).mean == pytest.approx(0.5)
    assert estimate(0.5 * uneven, uneven).error < 1e-12


def test_estimate_of_ratios_covers_the_truth():
    """Windows of many lengths: the error is that of repeated draws."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        tokens = rng.integers(1, 9, 60).astype(float)
        sums = tokens * 0.3 + rng.normal(size=60) * np.sqrt(tokens)
        mean, error = estimate(sums, tokens)
        means.append(mean)
        errors.append(error)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.1)


def test_estimate_of_one_window_has_no_error():
    assert math.isnan(estimate(np.ones(1), np.ones(1)).error)


@pytest.mark.parametrize(
    ("kind", "names", "words"),
    [
        ("lora", ["nothing"], "'nothing' is not the name"),
        ("lora", ["proj"], "'proj' is not the name"),
        ("dora", ["q_proj"], "not s B A of a linear layer"),
        ("hydra", ["up_proj"], "not s B A of a linear layer"),
        ("loha", ["q_proj"], "not s B A of a linear layer"),
        ("ends", ["embed_tokens"], "not s B A of a linear layer"),
        ("saved", ["lm_head"], "not s B A of a linear layer"),
    ],
)
def test_measure_effects_refuses_directions(kind, names, words):
    with pytest.raises(ConfigError, match=words):
        measure_effects(adapted(kind), TEXT, CONTEXT, directions=names)


def test_measure_effects_refuses_trained_biases_and_nan():
    model = get_peft_model(small.base(), LoraConfig(r=2, bias="all"))
    with pytest.raises(ConfigError, match="bias = 'all'"):
        measure_effects(model, TEXT, CONTEXT)
    model = adapted("lora")
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[:] = np.nan
    with pytest.raises(NonFiniteError, match="window 0"):
        measure_effects(model, TEXT, CONTEXT)
