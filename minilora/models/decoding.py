"""Decoding on arrays: the logits after one more token, from weights that are laid out for that.

A product with few rows takes as long as reading its weights, and the rest of the time goes into
calls. So adapters are merged, layers that share an input become one product, the weights of norms
are folded into the weights behind them, every matrix is transposed (which reads a third faster),
and no graph is built. The logits are the model's, to rounding.
Shapes: B batch, S positions seen, C = hidden_size, H query heads, K key/value heads, G = H / K,
D = head_dim, V vocabulary, I in, O out.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..nn import RMSNorm
from ..threads import Workers
from .cache import KeyValueCache

LARGEST = 1 << 31  # bytes of weights that are copied; a larger model computes each token itself
# A product of a few rows takes up to twice as long if OpenBLAS first copies its weight, which it
# does beyond this many multiplications. So the columns of the weight are cut into blocks.
SMALL = 1_000_000
FEW_ROWS = range(3, 17)
LEAST_COLUMNS = 32  # of a block: narrower ones gain nothing


# ---- the weights of a model, laid out -----------------------------------------------------------


class Product(NamedTuple):
    """y = x W + b    x (B, I), weight (I, O), bias (O,) or None -> (B, O)

    On a CPU the weight may be in blocks of n columns, (O / n, I, n).
    """

    weight: Array
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        if self.weight.ndim == 2:
            y = x @ self.weight
        else:
            blocks, _, n = self.weight.shape
            y = np.empty((len(x), blocks * n), x.dtype)
            np.matmul(x, self.weight, out=y.reshape(-1, blocks, n).swapaxes(0, 1))
        if self.bias is not None:
            y += self.bias
        return y


class Layer(NamedTuple):
    """The products of one block, and what its attention needs besides."""

    qkv: Product  # the two channels that a rotation turns are neighbours
    o: Product
    gate_up: Product  # negated: see `Decoding.__call__`
    down: Product
    head_norms: Array | None  # (H + K, D), the weights of the norms of q's and k's heads
    window: int | None  # how many of the newest positions are seen; None: all


class Source(NamedTuple):
    """What one product is made from."""

    layers: list[Any]  # they share an input; their outputs follow each other
    norm: Any = None  # of that input, whose weight is folded in
    order: Array | None = None  # of the output channels
    sign: int = 1


class Weights:
    """A model's weights as they are now, laid out once for all tokens that are then generated."""

    layers: list[Layer]
    head: Product

    @classmethod
    def of(cls, model: Any, workers: Workers, rows: int = 1) -> Weights | None:
        """The weights of `model`; None if it must compute each token in the ordinary way.

        rows   how many sequences will continue together; any other number is right, but slower

        That is so for GPT-2, for adapters of an embedding, for a layer that must run on its own
        (a quantised weight, dropout, rounded products), and for weights of more than LARGEST bytes.
        """
        if not getattr(model, "is_llama_shaped", False):
            return None
        if sum(p.size * p.dtype.itemsize for p in model.parameters()) > LARGEST:
            return None
        adapters = getattr(model.get_input_embeddings(), "running", ())
        if any(hasattr(adapter, "TENSORS") for adapter in adapters):
            return None
        norms: list[Any] = [model.decoder.norm]
        for block in model.decoder.layers:
            norms += [block.input_layernorm, block.post_attention_layernorm]
            if block.self_attn.q_norm is not None:
                norms += [block.self_attn.q_norm, block.self_attn.k_norm]
        if any(type(norm) is not RMSNorm for norm in norms):
            return None
        weights = cls(model)
        return weights if weights._lay_out(model, workers, rows) else None

    def __init__(self, model: Any):
        c = model.config
        self.heads = c.num_attention_heads
        self.kv_heads = c.kv_heads
        self.head_dim: Any = c.head_dim
        self.eps = c.rms_norm_eps
        self.embedding = model.get_input_embeddings().weight
        self.rotary = model.decoder.rotary
        self.backend = self.embedding.backend
        self.xp = self.backend.xp
        self.recorder = self.backend.recorder  # of graphs; None on a CPU
        self.dtype = self.embedding.dtype
        self.mean = self.xp.full((c.hidden_size, 1), 1 / c.hidden_size, self.dtype)
        # Each channel i of a head, followed by its partner i + D/2.
        self.pairs = self.xp.arange(c.head_dim).reshape(2, -1).T.reshape(-1)

    @property
    def gate_up_sign(self) -> int:
        """-1 where `Decoding.__call__` computes silu, 1 for a GPU's kernel."""
        return -1 if self.recorder is None else 1

    def rotations(self, limit: int) -> Array:
        """exp(i angle) of each pair in q and k, with 1/sqrt(D) in q's part.

        (limit, (H + K) D/2) complex numbers
        """
        cos, sin = (
            table.reshape(limit, -1, 2, self.head_dim // 2)[:, :, 1]
            for table in self.rotary(0, limit, self.embedding)
        )
        return (cos + 1j * sin).reshape(limit, -1)

    def copy_cache(self, cache: KeyValueCache, out: Array) -> None:
        """Copy what a cache has seen into `out`, with the channels of k in pairs.

        out (layers, 2, B, K, limit, D)
        """
        seen = cache.length
        known = cache.data[:, :, :, :seen].transpose(0, 1, 2, 4, 3, 5)  # (layers, 2, B, K, seen, D)
        out[:, 0, ..., :seen, :] = known[:, 0][..., self.pairs]
        out[:, 1, ..., :seen, :] = known[:, 1]

    def _lay_out(self, model: Any, workers: Workers, rows: int) -> bool:
        """Build all products; False if a layer must run on its own."""
        sources = self._sources(model)
        sizes = [sum(p.in_features * p.out_features for p in source.layers) for source in sources]
        ends = [0, *itertools.accumulate(sizes)]
        memory = self.xp.empty(
            ends[-1], self.dtype
        )  # one piece, which the system maps by large pages

        def build_every_other(first: int) -> list[Product | None]:
            return [
                _build_product(sources[i], memory[ends[i] : ends[i + 1]], rows)
                for i in range(first, len(sources), 2)
            ]

        products: list[Any] = [None] * len(sources)
        products[0::2], products[1::2] = workers.together(build_every_other, [0, 1])
        if None in products:
            return False
        *blocks, self.head = products
        self.layers = []
        for i, block in enumerate(model.decoder.layers):
            qkv, o, gate_up, down = blocks[4 * i : 4 * i + 4]
            norms = self._head_norms(block.self_attn)
            self.layers.append(Layer(qkv, o, gate_up, down, norms, block.self_attn.window))
        return True

    def _sources(self, model: Any) -> list[Source]:
        """The sources of four products per block, and of the head."""
        rotated = self.heads + self.kv_heads
        channels = self.xp.arange((rotated + self.kv_heads) * self.head_dim)
        channels = channels.reshape(-1, self.head_dim)  # (H + 2 K, D)
        channels[:rotated] = channels[:rotated, self.pairs]
        order = channels.reshape(-1)
        sources = []
        for block in model.decoder.layers:
            attention = block.self_attn
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            gate_up = [block.mlp.gate_proj, block.mlp.up_proj]
            sources.append(Source(qkv, block.input_layernorm, order))
            sources.append(Source([attention.o_proj]))
            sources.append(Source(gate_up, block.post_attention_layernorm, sign=self.gate_up_sign))
            sources.append(Source([block.mlp.down_proj]))
        sources.append(Source([model.lm_head], model.decoder.norm))
        return sources

    def _head_norms(self, attention: Any) -> Array | None:
        """The weights (H + K, D) of the norms of q's and k's heads, their channels in pairs."""
        if attention.q_norm is None:
            return None
        q = [attention.q_norm.weight.data] * self.heads
        k = [attention.k_norm.weight.data] * self.kv_heads
        return self.xp.stack(q + k)[:, self.pairs]


def _build_product(source: Source, memory: Array, rows: int) -> Product | None:
    """sign W'^T (I, sum of O) in `memory`, with a norm's weight in it, for `rows` rows at a time.

    None if a layer must run on its own.
    """
    layers, norm, order, sign = source
    xp = layers[0].backend.xp
    inputs = layers[0].in_features
    W = xp.empty((len(memory) // inputs, inputs), memory.dtype)
    end = 0
    for layer in layers:
        start, end = end, end + layer.out_features
        if layer.write_effective_weight(W[start:end], None) is None:
            return None
    if order is not None:
        W = W[order]
    is_cpu = layers[0].backend.name == "cpu"
    columns = _columns_per_block(inputs, len(W), rows) if is_cpu else len(W)
    weight = memory.reshape(-1, inputs, columns)
    blocks = W.reshape(-1, columns, inputs).swapaxes(1, 2)
    xp.multiply(blocks, sign if norm is None else sign * norm.weight.data[:, None], out=weight)
    if len(weight) == 1:
        weight = weight[0]
    if all(layer.bias is None for layer in layers):
        return Product(weight, None)
    biases = []
    for layer in layers:
        zeros = xp.zeros(layer.out_features, memory.dtype)
        biases.append(zeros if layer.bias is None else layer.bias.data)
    bias = sign * xp.concatenate(biases)
    return Product(weight, bias if order is None else bias[order])


def _columns_per_block(inputs: int, outputs: int, rows: int) -> int:
    """How many columns of a weight (inputs, outputs) are one product of `rows` rows."""
    if rows not in FEW_ROWS:
        return outputs
    most = min(outputs, SMALL // (rows * inputs))
    for columns in range(most - most % 16, LEAST_COLUMNS - 1, -16):
        if outputs % columns == 0:
            return columns
    return outputs


# ---- one token after another --------------------------------------------------------------------


class Decoding:
    """Sequences that have seen a prompt and can continue: their keys and values, a model's weights.

    For a CPU; a GPU's is in captured.py.

    cache     the model's keys and values of the prompts, which are copied
    lengths   (B,), how many positions each sequence has seen: also its newest token's position
    """

    def __init__(self, weights: Weights, cache: KeyValueCache):
        assert weights.recorder is None, "the weights of gate and up are not negated for a GPU"
        self.weights = weights
        layers, _, B, limit, K, D = cache.data.shape
        self.lengths = np.zeros(B, np.int64)
        # Zeros, because keys and values that a sequence does not see must be finite.
        self.data = weights.xp.zeros((layers, 2, B, K, limit, D), weights.dtype)
        self.rotations = weights.rotations(limit)
        self.windows = {layer.window for layer in weights.layers}
        self.start(cache)

    def start(self, cache: KeyValueCache, rows: slice = slice(None)) -> None:
        """Let the sequences `rows` continue from what `cache` has seen, which is copied."""
        self.weights.copy_cache(cache, self.data[:, :, rows])
        self.lengths[rows] = cache.length

    def __call__(self, ids: np.ndarray) -> Array:
        """ids (B,), the newest token of each sequence -> logits (B, V)"""
        w = self.weights
        xp = w.xp
        B = len(ids)
        H = w.heads
        K = w.kv_heads
        D = w.head_dim
        lengths = self.lengths.tolist()
        S = max(lengths) + 1
        is_uniform = min(lengths) + 1 == S
        newest: Any = (slice(None), S - 1)  # (sequences, their positions)
        if not is_uniform:
            newest = tuple(map(w.backend.from_numpy, (np.arange(B), self.lengths)))
        rotation = self.rotations[newest[1]]
        visible = {
            window: (max(0, S - window) if window else 0, None)
            if is_uniform
            else self._visible_keys(window)
            for window in self.windows
        }
        x = w.embedding.data[w.backend.from_numpy(ids)]  # (B, C)
        for layer, key_values in zip(w.layers, self.data, strict=True):
            qkv = layer.qkv(self._normed(x))
            if layer.head_norms is not None:
                heads = qkv[:, : (H + K) * D].reshape(B, H + K, D)  # a view
                heads /= xp.sqrt((heads * heads).mean(axis=-1, keepdims=True) + w.eps)
                heads *= layer.head_norms
            # As complex numbers, so that a rotation is one product.
            pairs = qkv[:, : (H + K) * D].view(rotation.dtype)
            pairs *= rotation
            by_position = key_values.transpose(1, 3, 0, 2, 4)  # (B, limit, 2, K, D)
            by_position[newest] = qkv[:, H * D :].reshape(B, 2, K, D)
            first, mask = visible[layer.window]
            keys, values = key_values[:, :, :, first:S]
            q = qkv[:, : H * D].reshape(B, K, H // K, D)
            p = q @ keys.swapaxes(-1, -2)  # (B, K, G, S - first)
            if mask is not None:
                p += mask
            p -= p.max(axis=-1, keepdims=True)
            xp.exp(p, out=p)
            y = p @ values  # (B, K, G, D)
            y /= p.sum(axis=-1, keepdims=True)
            x += layer.o(y.reshape(B, H * D))
            # silu(g) u = (-g) (-u) / (1 + exp(-g)), and the weights give -g and -u.
            gate, up = layer.gate_up(self._normed(x)).reshape(B, 2, -1).swapaxes(0, 1)
            s = xp.exp(gate)
            s += 1
            xp.divide(gate, s, out=s)
            s *= up
            x += layer.down(s)
        self.lengths += 1
        return w.head(self._normed(x))

    def _visible_keys(self, window: int | None) -> tuple[int, Array]:
        """The first key that any newest token sees, and what to add to the scores from there on.

        That is 0 for the keys that a sequence sees and -inf for the others, (B, 1, 1, S - first).
        """
        newest = self.lengths[:, None]
        oldest = np.maximum(newest + 1 - window, 0) if window else np.zeros_like(newest)
        first = int(oldest.min())
        places = np.arange(first, newest.max() + 1)
        is_seen = (oldest <= places) & (places <= newest)
        mask = np.where(is_seen, 0, -np.inf).astype(self.weights.dtype)
        return first, self.weights.backend.from_numpy(mask[:, None, None])

    def _normed(self, x: Array) -> Array:
        """x / sqrt(mean(x^2) + eps); the norm's weight is in the product that follows."""
        scale = (x * x) @ self.weights.mean
        scale += self.weights.eps
        return x / self.weights.xp.sqrt(scale, out=scale)
