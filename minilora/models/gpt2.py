"""GPT-2's decoder (Radford et al. 2019) for CausalLM, under the names that its files use.

It differs from Llama's: one learnt embedding per position in place of rotation, LayerNorm in place
of RMSNorm, one layer for q, k and v, no gate between c_fc and c_proj, and biases everywhere. Files
store the weights of c_attn, c_fc and c_proj as (in, out); here they are ordinary linear layers, and
formats/checkpoint.py transposes them. Shapes: B batch, T time, C = hidden_size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, maximum
from ..backend import Array
from ..nn import Embedding, LayerNorm, Module, normal, random_linear
from .config import TransformerConfig
from .decoder import BaseDecoder, Generator, Positions

_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Any] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "relu": lambda x: maximum(x, 0.0),
}


class GPT2Attention(Module):
    """Causal self-attention without rotation.    (B, T, C) -> (B, T, C)"""

    def __init__(self, config: TransformerConfig, layer: int, rng: Generator):
        C = config.hidden_size
        self.layer = layer
        self.heads = config.num_attention_heads
        self.c_attn = random_linear(rng, config.initializer_range, C, 3 * C, True)
        self.c_proj = random_linear(rng, _residual_std(config), C, C, True)

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        H = self.heads
        earlier = positions.earlier(self.layer)
        y = F.attention(self.c_attn(x), H, H, first_key=positions.first_key, **earlier)
        return self.c_proj(y)


class GPT2MLP(Module):
    """c_proj(activation(c_fc(x)))    (..., C) -> (..., C)"""

    def __init__(self, config: TransformerConfig, rng: Generator):
        C = config.hidden_size
        M = config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.c_fc = random_linear(rng, config.initializer_range, C, M, True)
        self.c_proj = random_linear(rng, _residual_std(config), M, C, True)

    def __call__(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class GPT2Block(Module):
    """x += attention(norm(x)), x += mlp(norm(x))    (B, T, C) -> (B, T, C)"""

    def __init__(self, config: TransformerConfig, layer: int, rng: Generator):
        self.ln_1 = _new_norm(config)
        self.attn = GPT2Attention(config, layer, rng)
        self.ln_2 = _new_norm(config)
        self.mlp = GPT2MLP(config, rng)

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        x = x + self.attn(self.ln_1(x), positions)
        return x + self.mlp(self.ln_2(x))


class GPT2Decoder(BaseDecoder):
    """Token and position embeddings, blocks, a norm.    ids (B, T) -> (B, T, C)"""

    part_names = ("wte", "h", "ln_f")

    def __init__(self, config: TransformerConfig, rng: Generator):
        C = config.hidden_size
        std = config.initializer_range
        self.wte = Embedding(normal(rng, std, (config.vocab_size, C)))
        self.wpe = Embedding(normal(rng, std, (config.max_position_embeddings, C)))
        self.h = [GPT2Block(config, layer, rng) for layer in range(config.num_hidden_layers)]
        self.ln_f = _new_norm(config)

    def embed(self, ids: Array, places: Array) -> Tensor:
        return self.wte(ids) + self.wpe(places)


def _residual_std(config: TransformerConfig) -> float:
    """The standard deviation of weights whose products are added to the residual stream.

    2 L terms then add up to about one (Radford et al. 2019, section 2.3).
    """
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)


def _new_norm(config: TransformerConfig) -> LayerNorm:
    ones = np.ones(config.hidden_size, np.float32)
    return LayerNorm(ones, np.zeros_like(ones), config.rms_norm_eps)
