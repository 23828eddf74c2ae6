"""One token after another, on arrays: what a model computes for a single position, with its weights laid out for that.

A product with few rows is nothing but reading the weights, and what is left is the price of calls. So adapters are
merged, layers that share an input stand side by side, norm weights are folded into the weights behind them, every
matrix is transposed (it is read a third faster), and no graph is built. The logits are the model's, to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from .. import nn
from ..backend import Array
from ..threads import Workers
from .cache import KeyValueCache
from .transformer import CausalLM, Decoder

LARGEST = (
    1 << 31
)  # bytes of weights that are copied; of a larger model each token is asked in the ordinary way
P = TypeVar("P")
R = TypeVar("R")


class Product(NamedTuple):
    """y = x W + b    x (B, I), weight (I, O), bias (O,) or None -> (B, O)"""

    weight: Array
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        y = x @ self.weight
        if self.bias is not None:
            y += self.bias
        return y


class Layer(NamedTuple):
    """The products of a block, and what else there is to its attention."""

    qkv: Product  # the two channels that a rotation turns stand side by side
    o: Product
    gate_up: Product  # negated: see `Decoding.__call__`
    down: Product
    norms: Array | None  # weights (H + K, D) of the norms of q's and k's heads
    window: int | None  # how many of the newest positions are seen, where not all are


class Weights:
    """A model's weights as they are now, laid out once for all that is then generated with them."""

    layers: list[Layer]
    head: Product

    @classmethod
    def of(cls, model: Any, workers: Workers) -> Weights | None:
        """None where a layer must run on its own (a quantised weight, dropout), or the copy would be too large.

        None for GPT-2, too, and where an embedding has an adapter: tokens are then asked in the ordinary way.
        """
        if (
            type(model) is not CausalLM
            or sum(p.size * p.dtype.itemsize for p in model.parameters()) > LARGEST
        ):
            return None
        adapted = any(
            hasattr(a, "TENSORS") for a in getattr(model.get_input_embeddings(), "running", ())
        )
        if type(model.decoder) is not Decoder or adapted:
            return None
        norms = [model.decoder.norm]
        for block in model.decoder.layers:
            norms += [block.input_layernorm, block.post_attention_layernorm]
            norms += [
                norm
                for norm in (block.self_attn.q_norm, block.self_attn.k_norm)
                if norm is not None
            ]
        weights = cls(model) if all(type(norm) is nn.RMSNorm for norm in norms) else None
        return weights if weights and weights._lay_out(model, workers) else None

    def __init__(self, model: CausalLM):
        c = model.config
        assert c.head_dim is not None
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.kv_heads, c.head_dim
        self.eps = c.rms_norm_eps
        self.embedding, self.rotary = (
            model.get_input_embeddings().weight,
            model.decoder.layers[0].self_attn.rotary,
        )
        self.xp, self.dtype = self.embedding.backend.xp, self.embedding.dtype
        self.mean = self.xp.full((c.hidden_size, 1), 1 / c.hidden_size, self.dtype)
        # Each channel i of a head, and after it its partner i + D/2.
        self.pairs = self.xp.arange(c.head_dim).reshape(2, -1).T.reshape(-1)

    def _lay_out(self, model: CausalLM, workers: Workers) -> bool:
        """False where a layer must run on its own."""
        turned = self.heads + self.kv_heads
        channels = self.xp.arange((turned + self.kv_heads) * self.head_dim).reshape(
            -1, self.head_dim
        )
        channels[:turned] = channels[:turned, self.pairs]
        jobs: list[tuple[Any, ...]] = []
        for block in model.decoder.layers:
            attn, mlp = block.self_attn, block.mlp
            jobs.append(
                (
                    [attn.q_proj, attn.k_proj, attn.v_proj],
                    block.input_layernorm,
                    channels.reshape(-1),
                )
            )
            jobs.append(([attn.o_proj],))
            jobs.append(([mlp.gate_proj, mlp.up_proj], block.post_attention_layernorm, None, -1))
            jobs.append(([mlp.down_proj],))
        jobs.append(([model.lm_head], model.decoder.norm))
        sizes = (
            sum(layer.in_features * layer.out_features for layer in layers) for layers, *_ in jobs
        )
        ends = [0, *itertools.accumulate(sizes)]
        memory = self.xp.empty(
            ends[-1], self.dtype
        )  # in one piece, which the system maps by large pages

        def work(first: int) -> list[Product | None]:
            return [
                _laid_out(memory[ends[i] : ends[i + 1]], *jobs[i])
                for i in range(first, len(jobs), 2)
            ]

        products: list[Any] = [None] * len(jobs)
        products[0::2], products[1::2] = workers.together(work, [0, 1])
        if None in products:
            return False
        *blocks, self.head = products
        self.layers = []
        for i, block in enumerate(model.decoder.layers):
            qkv, o, gate_up, down = blocks[4 * i : 4 * i + 4]
            norms, window = self._head_norms(block.self_attn), block.self_attn.window
            self.layers.append(Layer(qkv, o, gate_up, down, norms, window))
        return True

    def _head_norms(self, attn: Any) -> Array | None:
        """The weights (H + K, D) of the norms of q's and k's heads, in the order of the laid-out channels."""
        if attn.q_norm is None:
            return None
        each = [attn.q_norm.weight.data] * self.heads + [attn.k_norm.weight.data] * self.kv_heads
        return self.xp.stack(each)[:, self.pairs]


class Decoding:
    """Sequences that have seen a prompt, ready to go on: their keys and values, and a model's weights.

    cache   what the model has put there of the prompts: it is copied
    """

    def __init__(self, weights: Weights, cache: KeyValueCache):
        self.weights, self.length = weights, cache.length
        xp, (seen, limit, D) = weights.xp, (cache.length, cache.limit, weights.head_dim)
        kept = cache.data[:, :, :, :seen].transpose(0, 1, 2, 4, 3, 5)
        self.data = xp.empty((*kept.shape[:4], limit, D), weights.dtype)  # (layers, 2, B, K, S, D)
        self.data[:, 0, ..., :seen, :], self.data[:, 1, ..., :seen, :] = (
            kept[:, 0][..., weights.pairs],
            kept[:, 1],
        )
        cos, sin = (
            z.reshape(limit, -1, 2, D // 2)[:, :, 1]
            for z in weights.rotary(0, limit, weights.embedding)
        )
        self.turns = (cos + 1j * sin).reshape(
            limit, -1
        )  # exp(i angle) of each pair in q and k; 1/sqrt(D) is in q's

    def __call__(self, ids: Array) -> Array:
        """ids (B,), the newest token of each sequence -> logits (B, V)"""
        w, xp, B, at, S = self.weights, self.weights.xp, len(ids), self.length, self.length + 1
        H, K, D, turn = w.heads, w.kv_heads, w.head_dim, self.turns[at]
        x = w.embedding.data[ids]  # (B, C)
        for layer, kept in zip(w.layers, self.data, strict=True):
            qkv = layer.qkv(self._normed(x))
            if layer.norms is not None:
                heads = qkv[:, : (H + K) * D].reshape(B, H + K, D)  # a view
                heads /= xp.sqrt((heads * heads).mean(axis=-1, keepdims=True) + w.eps)
                heads *= layer.norms
            turning = qkv[:, : (H + K) * D].view(
                turn.dtype
            )  # as complex numbers: a rotation is one product
            turning *= turn
            kept[:, :, :, at] = qkv[:, H * D :].reshape(B, 2, K, D).swapaxes(0, 1)
            seen = slice(max(0, S - layer.window) if layer.window else 0, S)
            q, (keys, values) = qkv[:, : H * D].reshape(B, K, H // K, D), kept[:, :, :, seen]
            p = q @ keys.swapaxes(-1, -2)  # (B, K, G, S)
            p -= p.max(axis=-1, keepdims=True)
            xp.exp(p, out=p)
            y = p @ values  # (B, K, G, D)
            y /= p.sum(axis=-1, keepdims=True)
            x += layer.o(y.reshape(B, H * D))
            gate, up = layer.gate_up(self._normed(x)).reshape(B, 2, -1).swapaxes(0, 1)
            s = xp.exp(
                gate
            )  # silu(g) u = (-g) (-u) / (1 + exp(-g)), and the weights are those of -g and -u
            s += 1
            xp.divide(gate, s, out=s)
            s *= up
            x += layer.down(s)
        self.length = S
        return w.head(self._normed(x))

    def _normed(self, x: Array) -> Array:
        """x / sqrt(mean(x^2) + eps); the norm's weight is in the product that follows."""
        scale = (x * x) @ self.weights.mean
        scale += self.weights.eps
        return x / self.weights.xp.sqrt(scale, out=scale)


def _laid_out(
    memory: Array,
    layers: Sequence[Any],
    norm: Any = None,
    order: Array | None = None,
    sign: int = 1,
) -> Product | None:
    """sign W'^T (I, sum of O) in `memory`, with a norm's weight in it; None if a layer must run on its own."""
    xp, inputs = layers[0].backend.xp, layers[0].in_features
    ends = list(itertools.accumulate(layer.out_features for layer in layers))
    W = xp.empty((ends[-1], inputs), memory.dtype)
    for layer, end in zip(layers, ends, strict=True):
        if layer.effective(W[end - layer.out_features : end], None) is None:
            return None
    if order is not None:
        W = W[order]
    weight = memory.reshape(inputs, -1)
    xp.multiply(W.T, sign if norm is None else sign * norm.weight.data[:, None], out=weight)
    if all(layer.bias is None for layer in layers):
        return Product(weight, None)
    zeros = [xp.zeros(layer.out_features, memory.dtype) for layer in layers]
    biases = [
        zero if layer.bias is None else layer.bias.data
        for layer, zero in zip(layers, zeros, strict=True)
    ]
    bias = sign * xp.concatenate(biases)
    return Product(weight, bias if order is None else bias[order])
