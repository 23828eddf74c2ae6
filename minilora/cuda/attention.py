"""Attention by kernels, forward and backward; no array has one number per query and key.

Shapes: B sequences, T queries, S keys, H heads, K key/value heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .launching import Array, Kernels, kernels_for

MOST_CHANNELS = 256  # of a head, for the kernels
THREADS = 128  # of a block: ATTENTION_BLOCK in kernels.cu
NEWEST_THREADS = 256  # NEWEST_BLOCK in kernels.cu
CHANNELS = 16  # of a thread: OWNED in kernels.cu


def rotate_and_attend(
    backend: Any,
    Z: Array,
    heads: int,
    kv_heads: int,
    cos: Array | None,
    sin: Array | None,
    extend: Callable[[Array, Array], tuple[Array, Array]] | None,
    window: int | None,
    first_key: Array | None,
    extend_back: Any = None,
) -> tuple[Array, Callable[[Array], Array]] | None:
    """`_rotate_and_attend` in two launches forward and three backward; None if D > MOST_CHANNELS.

    One copy of Z is kept for backward, with q and k rotated; or Z itself if nothing rotates.
    """
    kernels = kernels_for(backend.device, Z.dtype)
    B, T, _, D = shape = Z.shape
    rotated = heads + kv_heads
    if kernels is None or D > MOST_CHANNELS or not _is_rotation(cos, sin, Z, rotated):
        return None
    if first_key is not None and first_key.shape != (B, T):
        return None
    if extend_back is not None:  # dk and dv of S keys would need an array of their own
        return None
    xp = backend.xp
    Z = xp.ascontiguousarray(Z)
    scale = D**-0.5  # of the scores
    tables = None
    if cos is not None:
        scale = 1.0  # it is in the tables
        tables = xp.ascontiguousarray(cos), xp.ascontiguousarray(sin)
        given, Z = Z, xp.empty_like(Z)
        _rotate(kernels, given, Z, tables, rotated)
    q, k, v = _split(Z, heads, kv_heads)
    if extend:
        k, v = extend(k, v)
    O, attend_back = attend(kernels, xp, q, k, v, scale, window, first_key)

    def back(dO: Array) -> Array:
        if extend:
            raise ValueError(
                "attention: there is no gradient with `extend`: use it under no_grad()"
            )
        dZ = xp.empty(shape, O.dtype)
        attend_back(dO, *_split(dZ, heads, kv_heads))
        if tables:
            _rotate(kernels, dZ, dZ, tables, rotated, sign=-1.0)
        return dZ

    return O, back


def attend(
    kernels: Kernels,
    xp: Any,
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int | None,
    first_key: Array | None,
) -> tuple[Array, Callable[[Array, Array, Array, Array], None]]:
    """(O, back) of softmax(scale q k^T) v, causal.    q (B, T, H, D), k, v (B, S, K, D) -> O as q

    `back(dO, dq, dk, dv)` writes into its last three arguments, slices of one array if T = S. For
    backward O is kept, and two numbers of softmax per query and head.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    q, q_strides = _with_strides(xp, q)
    k, k_strides = _with_strides(xp, k)
    v, v_strides = _with_strides(xp, v)
    if k_strides != v_strides:
        k, v = k.copy(), v.copy()
        k_strides = S * K * D, K * D
    if first_key is not None:
        first_key = xp.ascontiguousarray(first_key, np.int64)
    parts = _threads_per_row(D)
    rows = THREADS // parts  # queries or keys per block
    query_blocks = B * H * -(-T // rows)
    key_blocks = B * K * -(-S // rows)
    sizes = T, S, H, K, D, parts, window or 0, *q_strides, *k_strides
    O = xp.empty((B, T, H, D), q.dtype)
    softmax = xp.empty((B, H, T, 2), q.dtype)
    inputs = q, k, v, first_key, O, softmax
    kernels.launch("attention", query_blocks, THREADS, *inputs, *sizes, scale)

    def back(dO: Array, dq: Array, dk: Array, dv: Array) -> None:
        dO = xp.ascontiguousarray(dO, O.dtype)
        means = xp.empty((B, H, T), q.dtype)
        arrays = q, k, v, first_key, O, softmax, dO, dq, means
        more = *sizes, *_strides(dq), scale
        kernels.launch("attention_dq", query_blocks, THREADS, *arrays, *more)
        arrays = q, k, v, first_key, softmax, means, dO, dk, dv
        more = *sizes, *_strides(dk), scale
        kernels.launch("attention_dkv", key_blocks, THREADS, *arrays, *more)

    return O, back


def attend_newest(
    backend: Any,
    qkv: Array,
    cache: Array,
    rotations: Array,
    head_norms: Array | None,
    lengths: Array,
    heads: int,
    window: int | None,
    eps: float,
) -> Array | None:
    """`_attend_newest` in one launch; None if D > MOST_CHANNELS."""
    kernels = kernels_for(backend.device, qkv.dtype)
    _, B, K, limit, D = cache.shape
    if kernels is None or D > MOST_CHANNELS:
        return None
    y = backend.xp.empty((B, heads * D), qkv.dtype)
    arrays = qkv, cache, rotations, head_norms, lengths, y
    sizes = B, heads, K, limit, D, _threads_per_row(D), window or 0
    kernels.launch("attend_newest", B * heads, NEWEST_THREADS, *arrays, *sizes, eps)
    return y


def _threads_per_row(D: int) -> int:
    """The least power of two that gives each thread at most CHANNELS channels."""
    parts = 1
    while CHANNELS * parts < D:
        parts *= 2
    return parts


def _is_rotation(cos: Array | None, sin: Array | None, Z: Array, rotated: int) -> bool:
    """Whether the kernel can read the tables: of Z's dtype, (T, rotated D) or (B, T, rotated D)."""
    if cos is None or sin is None:
        return cos is None
    B, T, _, D = Z.shape
    shapes = (T, rotated * D), (B, T, rotated * D)
    return D % 2 == 0 and all(z.dtype == Z.dtype and z.shape in shapes for z in (cos, sin))


def _rotate(
    kernels: Kernels,
    Z: Array,
    out: Array,
    tables: tuple[Array, Array],
    rotated: int,
    sign: float = 1.0,
) -> None:
    """out = Z with its first `rotated` heads rotated; they may be one. Sign -1 rotates back."""
    B, T, count, D = Z.shape
    sizes = tables[0].size // (rotated * D), count, rotated, D
    kernels.for_rows("rotate", B * T, count * D // 2, Z, out, *tables, *sizes, sign)


def _split(Z: Array, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
    """Views of q (B, T, H, D), k and v (B, T, K, D) in Z (B, T, H + 2 K, D)."""
    rotated = heads + kv_heads
    return Z[:, :, :heads], Z[:, :, heads:rotated], Z[:, :, rotated:]


def _with_strides(xp: Any, z: Array) -> tuple[Array, tuple[int, int]]:
    """(z, its strides over sequences and rows), copied if the heads of a row are not in one piece.

    z (B, T, H, D)
    """
    if z.strides[2:] != (z.shape[3] * z.itemsize, z.itemsize):
        z = xp.ascontiguousarray(z)
    return z, _strides(z)


def _strides(z: Array) -> tuple[int, int]:
    return z.strides[0] // z.itemsize, z.strides[1] // z.itemsize
