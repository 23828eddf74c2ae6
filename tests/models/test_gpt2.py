"""GPT-2's decoder: beside its definition in plain NumPy, its first values, and what a step makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import configs, randomised, shape

from minilora import CausalLM, LoraConfig, TransformerConfig, get_peft_model, gradients
from minilora import functional as F
from minilora.autograd import Tensor
from minilora.data import Batch
from minilora.errors import DataError
from minilora.models.config import GPT2_ACTIVATIONS
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
    """What GPT-2 computes, one sequence, one head and one position at a time, from the weights by their names."""
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
        D, y = c.head_dim, np.zeros_like(x)
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
def test_it_computes_what_its_definition_says(config: TransformerConfig, T: int, seed: int) -> None:
    model, ids = (
        randomised(config, seed=seed),
        np.random.default_rng(seed).integers(0, config.vocab_size, (2, T)),
    )
    expected = logits(model, ids)
    # Some 30 operations, each of which rounds sums of at most 36 terms: far below this.
    assert np.abs(model(ids).data - expected).max() <= 1e-12 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", GPT2_ACTIVATIONS)
def test_activations_by_their_names(name: str) -> None:
    x = np.linspace(-6, 6, 301)
    np.testing.assert_allclose(
        ACTIVATIONS[name](Tensor(x)).data, FORMULAS[name](x), rtol=0, atol=1e-14
    )


def test_the_first_values_of_what_adds_to_the_residual_stream_are_smaller() -> None:
    config = shape(
        "gpt2", hidden_size=64, intermediate_size=256, num_hidden_layers=8, vocab_size=200
    )
    for name, p in CausalLM(config).named_parameters():
        if name.endswith("bias"):
            assert not p.data.any()
        elif p.ndim == 1:
            assert (p.data == 1).all()
        else:
            expected = 0.02 / (4 if "c_proj" in name else 1)  # sqrt(2 x 8 layers)
            # The standard deviation of n values strays by 1 / sqrt(2 n): 0.011 for 64 x 64, and less for all others.
            assert abs(p.data.std() / expected - 1) <= 5 / math.sqrt(2 * p.size)


def test_positions_end_where_the_learnt_rows_end() -> None:
    model = CausalLM(shape("gpt2"))
    assert model(np.zeros((1, 32), int)).shape == (1, 32, 11)
    with pytest.raises(
        DataError, match="33 positions, but the model has max_position_embeddings = 32"
    ):
        model(np.zeros((1, 33), int))


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "qwen2", "qwen3"])
def test_a_step_in_shards_and_recomputed_is_the_step(kind: str) -> None:
    """Every type of model goes the ways that Llama goes: prepared weights, shards, threads, recomputed blocks."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 11, (5, 9))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    found = {}
    for way in ("plain", "shards", "threads", "recomputed"):
        model = randomised(shape(kind))
        options = {
            "target_modules": "all-linear",
            "init_lora_weights": False,
            "use_dora": kind == "gpt2",
        }
        peft = get_peft_model(model, LoraConfig(r=2, **options))
        params = [p for p in peft.parameters() if p.requires_grad]
        model.gradient_checkpointing_enable(way == "recomputed")
        if way == "plain":
            found[way] = gradients(F.cross_entropy(peft(batch.ids), batch.targets), params)
            continue
        with ShardedStep(
            peft, threads=2 if way == "threads" else 1, shard=2, keep_memory=False
        ) as step:
            found[way] = step.gradients(batch, params)[1]
    assert len(found["plain"]) >= 16
    largest = max(np.abs(g).max() for g in found["plain"])
    for plain, shards, threads, recomputed in zip(*found.values(), strict=True):
        assert np.abs(shards - plain).max() <= 1e-13 * largest
        assert shards.tobytes() == threads.tobytes() == recomputed.tobytes()
