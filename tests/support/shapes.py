"""Small models of every type, for tests of what holds for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from minilora import CausalLM, TransformerConfig
from minilora.models.dialects import DIALECTS, GPT2_ACTIVATIONS, MODEL_TYPES

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": {**LLAMA3, "rope_type": "yarn", "original_max_position_embeddings": 8},
}
for unused in ("low_freq_factor", "high_freq_factor"):
    del ROPES["yarn"][unused]
WINDOWS = {"qwen2", "qwen3", "mistral"}  # the types that may have one


def shape(kind: str, **changes: Any) -> TransformerConfig:
    """A tiny configuration of each type, with a window if the type can have one."""
    options: dict[str, Any] = {"num_key_value_heads": 1}
    options["head_dim"] = 6 if kind in ("llama", "qwen3") else None
    if kind in WINDOWS:
        options["sliding_window"] = 3
    if kind in ("qwen2", "qwen3"):
        options["layer_types"] = ["full_attention", "sliding_attention"]
    if kind == "gpt2":
        options = {"hidden_act": "gelu_new", "tie_word_embeddings": True}
    common = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 2, "max_position_embeddings": 32, "model_type": kind}
    return TransformerConfig(**{**common, **options, **changes})


@st.composite
def configs(draw: st.DrawFn, kinds: tuple[str, ...] = MODEL_TYPES) -> TransformerConfig:
    """Any configuration of these types, small."""
    kind = draw(st.sampled_from(kinds))
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    layers = draw(st.integers(1, 3))
    explicit = kind != "gpt2" and draw(st.booleans())
    options: dict[str, Any] = {"model_type": kind, "max_position_embeddings": 16}
    options["num_hidden_layers"] = layers
    options["num_attention_heads"] = heads
    if kind == "gpt2":
        options["hidden_act"] = draw(st.sampled_from(GPT2_ACTIVATIONS))
    else:
        options["num_key_value_heads"] = draw(st.sampled_from([kv, heads]))
        options["head_dim"] = head_dim if explicit else None
        options["rope_parameters"] = ROPES[draw(st.sampled_from(sorted(ROPES)))]
    for name in ("attention_bias", "mlp_bias"):
        if name in DIALECTS[kind].fields:
            options[name] = draw(st.booleans())
    if kind in WINDOWS:
        options["sliding_window"] = draw(st.sampled_from([None, 1, 2, 3, 5, 16]))
    if kind in ("qwen2", "qwen3"):
        options["max_window_layers"] = draw(st.integers(0, 3))
    if kind in ("qwen2", "qwen3") or options.get("sliding_window") is not None:
        types = ["full_attention"]
        if options["sliding_window"] is not None:
            types.append("sliding_attention")
        mixed = st.lists(st.sampled_from(types), min_size=layers, max_size=layers)
        options["layer_types"] = draw(st.none() | mixed)
    options["vocab_size"] = draw(st.integers(2, 20))
    options["hidden_size"] = draw(st.integers(1, 9)) if explicit else heads * head_dim
    if explicit and kind == "llama":  # whose width is a multiple of the heads in any case
        options["hidden_size"] = heads * draw(st.integers(1, 3))
    options["intermediate_size"] = draw(st.integers(1, 9))
    options["rms_norm_eps"] = draw(st.sampled_from([1e-6, 1e-5, 1]))
    options["tie_word_embeddings"] = draw(st.booleans())
    return TransformerConfig(**options)


def randomised(config: TransformerConfig, dtype: str = "float64", seed: int = 0) -> CausalLM:
    """A model in which nothing has its first value: norms and biases are random, too."""
    model = CausalLM(config, dtype=dtype)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        mean = 1 if p.ndim == 1 else 0
        p.data = (0.4 * rng.standard_normal(p.shape) + mean).astype(p.dtype)
    return model


def bits(model: CausalLM) -> dict[str, bytes]:
    return {name: p.numpy().tobytes() for name, p in model.named_parameters()}
