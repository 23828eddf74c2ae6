"""Models with adapters of every kind, for the tests of a report."""

from __future__ import annotations

from typing import Any

import maps
import numpy as np
import small
from test_effects import GPT2, KINDS

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model, quantize
from minilora.lab.report.measuring import MeasuredText
from minilora.lora import LoraConfig as Config

CONTEXT = 8
TEXT = np.random.default_rng(3).integers(0, 16, 60)
ALSO = np.random.default_rng(4).integers(0, 16, 40)
MAPS = {f"map {name}": row.make() for name, row in maps.ROWS.items() if "-" not in name}
CODES = {f"{kind} base": LoraConfig(r=2, target_modules=["q_proj"]) for kind in ("nf4", "int8")}
ADAPTERS: dict[str, Config] = {
    **KINDS,
    **MAPS,
    **CODES,
    "gpt2": LoraConfig(r=2, target_modules="all-linear"),
    "gpt2 dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "biases": LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
}


def make_base(kind: str) -> CausalLM:
    if kind.startswith("gpt2"):
        return CausalLM(GPT2, seed=1)
    model = small.base(tie_word_embeddings="tied" in kind)
    return quantize(model, kind.split()[0]) if kind in CODES else model


def make_adapted(kind: str, dtype: str = "float32") -> Any:
    """A model with an adapter of this kind, all of whose tensors differ from their start."""
    model = get_peft_model(make_base(kind), ADAPTERS[kind])
    rng = np.random.default_rng(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + rng.normal(0, 0.2, p.shape).astype(p.dtype)
    return model.to(dtype=np.dtype(dtype)).eval() if dtype != "float32" else model.eval()


def measured(tokens: Any = TEXT, name: str = "text", **fields: Any) -> MeasuredText:
    return MeasuredText(name, tokens, fields.pop("bytes_per_token", 2.0), CONTEXT, **fields)


BYTES = TransformerConfig(  # whose ids are bytes
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
)
