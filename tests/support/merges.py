"""Merges of one weight as other programs make them: right and wrong, in several arithmetics.

Written from the definitions, with NumPy alone, and not by the code under test.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from minilora.formats.dtypes import round_to, widen
from minilora.lora.factors import Part
from minilora.threads import Workers
from minilora.tools.explaining import Explanation, explain
from minilora.tools.hypotheses import Precision, Scales
from minilora.tools.layers import Layer, Pair

Array = np.ndarray
DTYPES = ("F32", "BF16", "F16")
ARITHMETICS = ("float64", "float32", "product", "factors")
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)  # fmt: skip


class Adapter(NamedTuple):
    """Factors in float32, and the numbers of a configuration."""

    A: Array  # (r, I)
    B: Array  # (O, r)
    alpha: float
    rslora: bool = False

    @property
    def r(self) -> int:
        return len(self.A)

    @property
    def s(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def other_s(self) -> float:
        return self.alpha / (self.r if self.rslora else math.sqrt(self.r))


def rounded(x: Any, dtype: str) -> Array:
    """Rounded once to a stored dtype, as float32 or wider."""
    return np.asarray(widen(round_to(np.asarray(x), dtype)))


def nf4(W: Array) -> Array:
    """What NF4 in blocks of 64 makes of a weight, in float32, with bitsandbytes' arithmetic."""
    flat = W.astype(np.float32).reshape(-1)
    blocks = np.concatenate([flat, np.zeros(-len(flat) % 64, np.float32)]).reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.float32(1) / np.where(absmax < 2.0**-126, np.float32(1), absmax)
    nearest = np.searchsorted((NF4[1:] + NF4[:-1]) / np.float32(2), blocks * inverse)
    decoded = NF4[nearest] * absmax
    return decoded.reshape(-1)[: W.size].reshape(W.shape)


def add(V: Array, A: Array, B: Array, c: float, dtype: str, arithmetic: str) -> Array:
    """V + c B A as a merge in this arithmetic computes it, rounded to `dtype`."""
    if arithmetic == "float64":
        return rounded(V.astype(float) + c * (B.astype(float) @ A.astype(float)), dtype)
    V, A, B = (np.asarray(x, np.float32) for x in (V, A, B))
    if arithmetic == "float32":
        return rounded(V + np.float32(c) * (B @ A), dtype)
    V = rounded(V, dtype)
    if arithmetic == "factors":
        A, B = rounded(A, dtype), rounded(np.float32(c) * rounded(B, dtype), dtype)
        P = rounded(B @ A, dtype)
    else:
        P = rounded(np.float32(c) * rounded(B @ A, dtype), dtype)
    return rounded(V.astype(np.float32) + P.astype(np.float32), dtype)


def add_dora(W: Array, adapter: Adapter, m: Array, dtype: str, arithmetic: str) -> Array:
    """m (W + dW) / |W + dW| as a merge in this arithmetic computes it, rounded to `dtype`."""
    A, B, s = adapter.A, adapter.B, adapter.s
    if arithmetic == "float64":
        V = W.astype(float) + s * (B.astype(float) @ A.astype(float))
        return rounded(V * (m / np.linalg.norm(V, axis=1))[:, None], dtype)
    if arithmetic == "float32":
        V = W + np.float32(s) * (B @ A)
        return rounded(V * (m / np.linalg.norm(V, axis=1))[:, None], dtype)
    V = add(W, A, B, s, dtype, arithmetic).astype(np.float32)
    norms = rounded(np.linalg.norm(V, axis=1), dtype)
    k = rounded(rounded(m, dtype).astype(np.float32) / norms, dtype)
    return rounded(V * k[:, None].astype(np.float32), dtype)


def merge_as(kind: str, W: Array, adapter: Adapter, dtype: str, arithmetic: str) -> Array:
    """The merged weight after what the verdict `kind` names."""
    words = kind.split(", ")
    again = "requantized to NF4" in words
    V = nf4(W) if "onto NF4" in words else W
    kind = words[0] if words[0] in KINDS[:8] else "right"
    A, B, s = adapter.A, adapter.B, adapter.s
    factors = {
        "right": s,
        "other root of r": adapter.other_s,
        "alpha not divided by r": adapter.alpha,
        "alpha ignored": 1.0,
        "twice": s,
        "subtracted": -s,
        "transposed": s,
    }
    if kind == "not merged":
        M = rounded(V, dtype)
    elif kind == "transposed":
        M = add(V, B.T, A.T, s, dtype, arithmetic)
    else:
        M = add(V, A, B, factors[kind], dtype, arithmetic)
    if kind == "twice":
        M = add(M, A, B, s, dtype, arithmetic)
    return rounded(nf4(M), dtype) if again else M


KINDS = (
    "right", "other root of r", "alpha not divided by r", "alpha ignored", "twice", "subtracted",
    "transposed", "not merged", "onto NF4", "requantized to NF4", "onto NF4, requantized to NF4",
    "twice, onto NF4",
)  # fmt: skip


class Drawn(NamedTuple):
    """A random merge of one weight."""

    W: Array
    M: Array
    adapter: Adapter
    dtype: str
    kind: str
    arithmetic: str
    scale: float
    relative: float


def draw(seed: int) -> Drawn:
    """A weight of 64 to 256 rows and columns, |dW| / |W| from 1e-4 to 1e-1, merged in some way."""
    rng = np.random.default_rng(seed)
    I = int(rng.choice([64, 96, 128, 200, 256]))
    O = I if rng.integers(2) else int(rng.choice([64, 100, 256]))
    r = int(rng.choice([1, 2, 3, 4, 8, 16]))
    dtype, arithmetic = str(rng.choice(DTYPES)), str(rng.choice(ARITHMETICS))
    relative = 10 ** rng.uniform(-4, -1)
    kind = str(rng.choice(KINDS))
    if kind == "transposed" and O != I:
        kind = "right"
    # The last two are subnormal in float16.
    scale = float(rng.choice([1.0, 0.02, 1e-4, 1e-6], p=[0.3, 0.5, 0.15, 0.05]))
    W = rounded(scale * rng.standard_normal((O, I)), dtype)
    A = rng.standard_normal((r, I)).astype(np.float32) / np.float32(math.sqrt(I))
    B = rng.standard_normal((O, r))
    adapter = Adapter(A, B, float(rng.choice([1, 3, 8, 16, 32])), bool(rng.integers(2)))
    size = adapter.s * np.linalg.norm(B @ A)
    B = np.float32(B * relative * np.linalg.norm(W.astype(float)) / size)
    adapter = adapter._replace(B=B)
    M = merge_as(kind, W, adapter, dtype, arithmetic)
    return Drawn(W, M, adapter, dtype, kind, arithmetic, scale, relative)


def explain_drawn(drawn: Drawn) -> Explanation:
    """What `explain` makes of it."""
    return explain_merge(drawn.W, drawn.M, drawn.adapter, drawn.dtype)


def explain_merge(
    W: Array, M: Array, adapter: Adapter, dtype: str, m: Array | None = None
) -> Explanation:
    """What `explain` makes of a weight and what was merged from it, both stored as `dtype`."""
    base, merged = round_to(W, dtype), round_to(M, dtype)
    pair = Pair("W", W.shape, dtype, lambda at: base[at], lambda at: merged[at], encodable=True)
    part = Part(adapter.A.astype(float), adapter.B.astype(float), adapter.s, m)
    scales = Scales(adapter.s, adapter.alpha, adapter.r, adapter.s)
    layer = Layer(pair, part, scales, Precision(dtype, (dtype,)))
    with Workers(1) as workers:
        return explain(layer, workers)
