"""One token after another, on arrays: what a model computes for a single position, with its weights laid out for that.

A product with one row is nothing but reading the weights, and what is left is the price of calls. So adapters are
merged, layers that share an input stand side by side, norm weights are folded into the weights behind them, every
matrix is transposed (it is read a third faster), and no graph is built. The logits are the model's, to rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import nn
from .backend import Array
from .transformer import CausalLM, KeyValueCache

LARGEST = 1 << 31  # bytes of weights that are copied; of a larger model each token is asked in the ordinary way


class Layer(NamedTuple):
    """(weight (I, O), bias (O,) or None) of the four products of a block."""

    qkv: tuple[Array, Array | None]
    o: tuple[Array, Array | None]
    gate_up: tuple[Array, Array | None]
    down: tuple[Array, Array | None]


class Decoding:
    """A model that has seen a prompt, ready to go on: the weights as they are now, and its key/value cache."""

    @classmethod
    def of(cls, model: Any, cache: KeyValueCache) -> Decoding | None:
        """None where a layer must run on its own (a quantised weight, dropout), or the copy would be too large."""
        size = sum(p.size * p.dtype.itemsize for p in model.parameters())
        layers = []
        for block in model.model.layers if type(model) is CausalLM and size <= LARGEST else []:
            attn, mlp = block.self_attn, block.mlp
            if not (type(block.input_layernorm) is type(block.post_attention_layernorm) is nn.RMSNorm):
                return None
            parts = [
                _laid_out([attn.q_proj, attn.k_proj, attn.v_proj], block.input_layernorm.weight.data),
                _laid_out([attn.o_proj]),
                _laid_out([mlp.gate_proj, mlp.up_proj], block.post_attention_layernorm.weight.data),
                _laid_out([mlp.down_proj]),
            ]
            if None in parts:
                return None
            layers.append(Layer(*parts))  # type: ignore[arg-type]
        head = _laid_out([model.lm_head], model.model.norm.weight.data) if layers else None
        return cls(model, cache, layers, head) if head else None

    def __init__(self, model: CausalLM, cache: KeyValueCache, layers: list[Layer], head: tuple[Array, Array | None]):
        c = model.config
        self.cache, self.layers, self.head = cache, layers, head
        self.embedding, self.rotary = model.get_input_embeddings().weight, model.model.layers[0].self_attn.rotary
        self.heads, self.kv_heads, self.eps = c.num_attention_heads, c.kv_heads, c.rms_norm_eps
        self.xp = xp = self.embedding.backend.xp
        self.ones = xp.ones((c.hidden_size, 1), self.embedding.dtype)

    def __call__(self, ids: Array) -> Array:
        """ids (B,), the newest token of each sequence -> logits (B, V); the cache then holds it."""
        xp, cache, H, K = self.xp, self.cache, self.heads, self.kv_heads
        B, at, S = len(ids), cache.length, cache.length + 1
        x = self.embedding.data[ids]  # (B, C)
        cos, sin = self.rotary(at, S, self.embedding)  # (1, (H + K) D)
        turned = cos.shape[1]
        D = turned // (H + K)
        pairs = H + K, 2, D // 2
        sin = sin.reshape(pairs)
        for layer, (keys, values) in zip(self.layers, cache.data, strict=True):
            qkv = _times(self.normed(x), layer.qkv)
            qk = qkv[:, :turned]
            rotated = (qk.reshape(B, *pairs)[:, :, ::-1] * sin).reshape(B, turned)  # as in `fused.turn`
            rotated += qk * cos
            keys[:, at] = rotated[:, H * D :].reshape(B, K, D)
            values[:, at] = qkv[:, turned:].reshape(B, K, D)
            q = rotated[:, : H * D].reshape(B, K, H // K, D)
            p = q @ keys[:, :S].transpose(0, 2, 3, 1)  # (B, K, G, S), the scale is in cos and sin
            p -= p.max(axis=-1, keepdims=True)
            xp.exp(p, out=p)
            y = p @ values[:, :S].transpose(0, 2, 1, 3)  # (B, K, G, D)
            y /= p.sum(axis=-1, keepdims=True)
            x += _times(y.reshape(B, H * D), layer.o)
            both = _times(self.normed(x), layer.gate_up)
            gate, up = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
            s = xp.exp(-gate)
            s += 1
            y = gate / s  # silu
            y *= up
            x += _times(y, layer.down)
        cache.advance(1)
        return _times(self.normed(x), self.head)

    def normed(self, x: Array) -> Array:
        """x / sqrt(mean(x^2) + eps); the norm's weight is in the product that follows."""
        scale = (x * x) @ self.ones
        scale /= x.shape[1]
        scale += self.eps
        return x / self.xp.sqrt(scale, out=scale)


def _laid_out(layers: list[Any], norm: Array | None = None) -> tuple[Array, Array | None] | None:
    """(W'^T (I, sum of O) with a norm's weight as factors of its rows, bias), or None if a layer runs on its own."""
    first, at, xp = layers[0], 0, layers[0].backend.xp
    weight = xp.empty((first.in_features, sum(layer.out_features for layer in layers)), first.dtype)
    for layer in layers:
        if layer.effective(weight[:, at : at + layer.out_features].T, None) is None:
            return None
        at += layer.out_features
    if norm is not None:
        weight *= norm[:, None]
    if all(layer.bias is None for layer in layers):
        return weight, None
    zeros = [xp.zeros(layer.out_features, layer.dtype) for layer in layers]
    biases = [zero if layer.bias is None else layer.bias.data for layer, zero in zip(layers, zeros, strict=True)]
    return weight, xp.concatenate(biases)


def _times(x: Array, layer: tuple[Array, Array | None]) -> Array:
    weight, bias = layer
    y = x @ weight
    if bias is not None:
        y += bias
    return y
