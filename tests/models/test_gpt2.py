"""GPT-2's decoder: its definition in plain NumPy, its first weights, its gradients in a step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, randomised, shape

from minilora import CausalLM, LoraConfig, PeftModel, TransformerConfig, get_peft_model, gradients
from minilora import functional as F
from minilora.autograd import Tensor
from minilora.data import Batch
from minilora.errors import DataError
from minilora.models.dialects import GPT2_ACTIVATIONS
from minilora.models.gpt2 import ACTIVATIONS
from minilora.training.parallel import ShardedStep

erf = np.vectorize(math.erf, otypes=[float])
FORMULAS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.where(x > 0, x, 0),
}
FORMULAS |= {"gelu_pytorch_tanh": FORMULAS["gelu_new"], "swish": FORMULAS["silu"]}


def logits(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    """GPT-2's definition: one sequence, one head and one position at a time, weights by name."""
    w = {name: p.data for name, p in model.named_parameters()}
    c = model.config

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + c.rms_norm_eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        q, k, v = np.split(linear(x, f"{name}.c_attn"), 3, axis=-1)
        D = c.head_dim
        y = np.zeros_like(x)
        for head in range(c.num_attention_heads):
            at = slice(head * D, (head + 1) * D)
            for t in range(len(x)):
                scores = k[: t + 1, at] @ q[t, at] / math.sqrt(D)
                p = np.exp(scores - scores.max())
                y[t, at] = (p / p.sum()) @ v[: t + 1, at]
        return linear(y, f"{name}.c_proj")

    found = []
    for row in ids:
        x = w["transformer.wte.weight"][row] + w["transformer.wpe.weight"][: len(row)]
        for i in range(c.num_hidden_layers):
            block = f"transformer.h.{i}"
            x = x + attention(norm(x, f"{block}.ln_1"), f"{block}.attn")
            hidden = FORMULAS[c.hidden_act](linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            x = x + linear(hidden, f"{block}.mlp.c_proj")
        head = w["transformer.wte.weight" if c.tie_word_embeddings else "lm_head.weight"]
        found.append(norm(x, "transformer.ln_f") @ head.T)
    return np.array(found)


@given(configs(("gpt2",)), st.integers(1, 9), st.integers(0, 99))
def test_gpt2_computes_what_its_definition_says(
    config: TransformerConfig, T: int, seed: int
) -> None:
    model = randomised(config, seed=seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, T))
    expected = logits(model, ids)
    # Some 30 operations, each of which rounds sums of at most 36 terms: far below this.
    bound = 1e-12 * max(1, np.abs(expected).max())
    assert np.abs(model(ids).data - expected).max() <= bound


@pytest.mark.parametrize("name", GPT2_ACTIVATIONS)
def test_activations_are_those_of_their_names(name: str) -> None:
    x = np.linspace(-6, 6, 301)
    found = ACTIVATIONS[name](Tensor(x)).data
    np.testing.assert_allclose(found, FORMULAS[name](x), rtol=0, atol=1e-14)


def test_gpt2_starts_with_smaller_weights_where_it_adds_to_the_residual_stream() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 200}
    config = shape("gpt2", num_hidden_layers=8, **sizes)
    for name, p in CausalLM(config).named_parameters():
        if name.endswith("bias"):
            assert not p.data.any()
        elif p.ndim == 1:
            assert (p.data == 1).all()
        else:
            expected = 0.02 / (4 if "c_proj" in name else 1)  # sqrt(2 x 8 layers)
            # The standard deviation of n values strays by 1 / sqrt(2 n), at most 0.011.
            assert abs(p.data.std() / expected - 1) <= 5 / math.sqrt(2 * p.size)


def test_gpt2_refuses_more_positions_than_it_has_learnt() -> None:
    model = CausalLM(shape("gpt2"))
    assert model(np.zeros((1, 32), int)).shape == (1, 32, 11)
    message = "33 positions, but the model has max_position_embeddings = 32"
    with pytest.raises(DataError, match=message):
        model(np.zeros((1, 33), int))


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "qwen2", "qwen3"])
def test_sharded_step_and_checkpointing_give_the_gradients_of_every_type(kind: str) -> None:
    """Every type of model has what Llama has: prepared weights, shards, threads, checkpointing."""
    ids = np.random.default_rng(3).integers(0, 11, (5, 9))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    config = dataclasses.replace(config, use_dora=kind == "gpt2")

    def adapted(checkpointing: bool = False) -> tuple[PeftModel, list[Any]]:
        model = randomised(shape(kind))
        model.gradient_checkpointing_enable(checkpointing)
        made = get_peft_model(model, config)
        return made, [p for p in made.parameters() if p.requires_grad]

    def sharded(threads: int, checkpointing: bool = False) -> list[np.ndarray]:
        made, params = adapted(checkpointing)
        with ShardedStep(made, threads=threads, shard=2, keep_memory=False) as step:
            return step.gradients(batch, params)[1]

    made, params = adapted()
    plain = gradients(F.cross_entropy(made(batch.ids), batch.targets), params)
    assert len(plain) >= 16
    largest = max(np.abs(g).max() for g in plain)
    shards = sharded(1)
    for exact, g in zip(plain, shards, strict=True):
        assert np.abs(g - exact).max() <= 1e-13 * largest
    for others in (sharded(2), sharded(1, checkpointing=True)):
        for g, other in zip(shards, others, strict=True):
            assert other.tobytes() == g.tobytes()
