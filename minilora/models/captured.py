"""Decoding on a GPU, where one token's work is captured as a graph and repeated by one launch.

One operation costs the host more time than most of them take on the device, and a token takes
hundreds. Here they are always the same: the newest ids and the numbers of positions seen are read
from memory, into which the host copies them before each launch. The products are those of
`Weights`, and shapes are as in decoding.py.
"""

from __future__ import annotations

import warnings

import numpy as np

from .. import functional as F
from ..autograd import Tensor, no_grad
from ..backend import Array, Backend
from ..cuda.graphs import Graph, Mailbox
from .cache import KeyValueCache
from .decoding import Decoding, Product, Weights

WARM_UP = 2  # tokens before the capture, in which kernels are compiled


def start_decoding(weights: Weights, cache: KeyValueCache) -> Decoding | CapturedDecoding:
    """What continues after the positions that a cache has seen, as fast as the device can."""
    kind = Decoding if weights.recorder is None else CapturedDecoding
    return kind(weights, cache)


class CapturedDecoding:
    """Sequences that have seen a prompt and can continue, as `Decoding`.

    The logits that it returns are overwritten by its next call.
    """

    def __init__(self, weights: Weights, cache: KeyValueCache):
        self.weights = weights
        xp = weights.xp
        layers, _, B, limit, K, D = cache.data.shape
        self.lengths = np.zeros(B, np.int64)
        self.embeddings = weights.embedding.data  # kept, as all that the graph reads
        self.data = xp.zeros((layers, 2, B, K, limit, D), weights.dtype)
        rotations = weights.rotations(limit)
        self.rotations = rotations.view(weights.dtype)  # (limit, (H + K) D): real, imaginary parts
        C, V = weights.head.weight.shape
        self.ones = Tensor(xp.ones(C, weights.dtype))
        self.logits = xp.empty((B, V), weights.dtype)  # not in the memory that graphs share
        self.mailbox = Mailbox(weights.backend, 2 * B)
        self.ids, self.seen = self.mailbox.device.reshape(2, B)  # `seen` are the lengths
        self.calls = 0
        self.graph: Graph[None] | None = None
        self.start(cache)

    def start(self, cache: KeyValueCache, rows: slice = slice(None)) -> None:
        """Let the sequences `rows` continue from what `cache` has seen, which is copied."""
        self.weights.copy_cache(cache, self.data[:, :, rows])
        self.lengths[rows] = cache.length

    def __call__(self, ids: np.ndarray) -> Array:
        """ids (B,), the newest token of each sequence -> logits (B, V)"""
        self.weights.backend.select()
        self.mailbox.host[:] = np.concatenate([ids, self.lengths])
        self.mailbox.send()
        self.lengths += 1
        self.calls += 1
        if self.calls == WARM_UP + 1:
            self._capture()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        return self.logits

    def _capture(self) -> None:
        try:
            self.graph = self.weights.recorder.capture(self.step)
        except Exception as error:  # of CuPy, the driver or cuBLAS
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"{self.weights.backend.name}: a token's work cannot be captured as a graph "
                f"({reason:.200}); it runs one operation at a time",
                stacklevel=4,
            )

    def step(self) -> None:
        """Compute the logits after `ids`, each time by the same work on the same memory."""
        w = self.weights
        backend = w.backend
        x = w.xp.take(self.embeddings, self.ids, axis=0)  # (B, C)
        for layer, cache in zip(w.layers, self.data, strict=True):
            qkv = self._multiply(self._normed(x), layer.qkv)
            options = layer.head_norms, self.seen, w.heads, layer.window, w.eps
            y = backend.run(_attend_newest, qkv, cache, self.rotations, *options)
            self._add_product(x, y, layer.o)
            y = self._swiglu(self._normed(x), layer.gate_up)
            self._add_product(x, y, layer.down)
        self._multiply(self._normed(x), w.head, out=self.logits)

    def _multiply(self, x: Array, product: Product, out: Array | None = None) -> Array:
        """x W + b"""
        y = self.weights.backend.matmul(x, product.weight, out)
        if product.bias is not None:
            y += product.bias
        return y

    def _add_product(self, x: Array, y: Array, product: Product) -> None:
        """x += y W + b"""
        self.weights.backend.add_matmul(x, y, product.weight)
        if product.bias is not None:
            x += product.bias

    def _normed(self, x: Array) -> Array:
        """x / sqrt(mean(x^2) + eps); the norm's weight is in the product that follows."""
        with no_grad():
            return F.rms_norm(Tensor(x), self.ones, self.weights.eps).data

    def _swiglu(self, x: Array, product: Product) -> Array:
        """silu(gate) up, whose gate and up, (2, B, M), are two products in one call."""
        C = x.shape[1]
        weight = product.weight.reshape(C, 2, -1).swapaxes(0, 1)  # (2, C, M), a view
        gate_up = self.weights.backend.matmul(x, weight)
        if product.bias is not None:
            gate_up += product.bias.reshape(2, 1, -1)
        with no_grad():
            return F.swiglu(Tensor(gate_up)).data


def _attend_newest(
    backend: Backend,
    qkv: Array,
    cache: Array,
    rotations: Array,
    head_norms: Array | None,
    lengths: Array,
    heads: int,
    window: int | None,
    eps: float,
) -> Array:
    """Attention of one token per sequence, at position `lengths` (B,); its k and v are cached.

    qkv (B, (H + 2 K) D), q and k not rotated yet, their channels in pairs
    cache (2, B, K, limit, D), keys and values; beyond `lengths` any finite numbers
    rotations (limit, (H + K) D), cos and sin of each pair, with 1/sqrt(D) in q's part
    head_norms (H + K, D) or None -> (B, H D)
    """
    xp = backend.xp
    _, B, K, limit, D = cache.shape
    rotated = heads + K
    channels = qkv.reshape(B, rotated + K, D)
    z = channels[:, :rotated]
    if head_norms is not None:
        z = z / xp.sqrt((z * z).mean(axis=-1, keepdims=True) + eps) * head_norms
    a, b = (z[..., i::2] for i in (0, 1))  # (B, H + K, D / 2)
    factors = xp.take(rotations, lengths, axis=0).reshape(B, rotated, D)
    cos, sin = (factors[..., i::2] for i in (0, 1))
    z = xp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(B, rotated, D)
    places = xp.arange(limit)
    newest = lengths[:, None]
    is_newest = (places == newest)[:, None, :, None]  # (B, 1, limit, 1)
    for old, new in zip(cache, (z[:, heads:], channels[:, rotated:]), strict=True):
        xp.copyto(old, new[:, :, None], where=is_newest)
    q = z[:, :heads].reshape(B, K, heads // K, D)
    is_seen = places <= newest  # (B, limit)
    if window:
        is_seen &= places > newest - window
    scores = backend.matmul(q, cache[0].swapaxes(-1, -2))  # (B, K, G, limit)
    scores = xp.where(is_seen[:, None, None], scores, -np.inf)
    p = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    y = backend.matmul(p, cache[1]) / p.sum(axis=-1, keepdims=True)
    return y.reshape(B, heads * D)
