"""The small model that many tests use, its inputs, and its parameters and logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from minilora.models.config import TransformerConfig
from minilora.models.transformer import CausalLM

CONFIG = TransformerConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    attention_bias=True,
    initializer_range=0.4,
)
SMALLER = TransformerConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    initializer_range=0.4,
)
LINEAR = {  # name -> (in, out)
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (16, 8),
    "self_attn.v_proj": (16, 8),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (16, 24),
    "mlp.up_proj": (16, 24),
    "mlp.down_proj": (24, 16),
}
IDS = np.random.default_rng(0).integers(0, 16, (2, 10))


def base(dtype: str = "float32", device: Any = "cpu", **changes: Any) -> CausalLM:
    """The model with `changes` made to its config; its biases are not zero."""
    config = dataclasses.replace(CONFIG, **changes)
    model = CausalLM(config, seed=1, dtype=dtype)
    rng = np.random.default_rng(1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = rng.standard_normal(p.shape).astype(p.dtype)
    return model.to(device)  # type: ignore[no-any-return]


def bits(model: Any) -> dict[str, bytes]:
    return {name: p.numpy().tobytes() for name, p in model.named_parameters()}


def logits(model: Any) -> np.ndarray:
    return model(IDS).numpy()  # type: ignore[no-any-return]
