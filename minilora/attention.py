"""Attention and the rotation of its queries and keys, beside their hand-written gradients.

Shapes: B batch, T time (queries), S keys, H heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import as_floats, rows
from .autograd import Grads, Tensor, record
from .backend import Array, Backend
from .threads import blocks


def apply_rotary(
    xp: Any, z: Array, cos: Array, sin: Array, out: Array | None = None, back: bool = False
) -> Array:
    """Rotate pairs (z_i, z_{i + D/2}) by angles that depend on the position, on arrays.

    z (B, T, h, D) -> (B, T, h, D)    Su et al. 2021, eq. (34), in the layout of Llama's
    checkpoints: the pair of i is i + D/2, not i + 1. A row of cos and sin (T, h D) has the factors
    for all heads at one position, because arithmetic on whole rows is fast; sin is negated in the
    first half of each D. They may be (B, T, h D) where positions differ between sequences.
    `back` rotates by the negative angles, which is the transpose.
    """
    B, T, h, D = z.shape
    pairs = (h, 2, D // 2)
    y = xp.empty(z.shape, z.dtype) if out is None else out
    swapped = z.reshape(B, T, *pairs)[..., ::-1, :]
    xp.multiply(swapped, sin.reshape(*sin.shape[:-1], *pairs), out=y.reshape(B, T, *pairs))
    whole = y.reshape(B, T, h * D)
    by_cos = z.reshape(B, T, h * D) * cos
    (xp.subtract if back else xp.add)(by_cos, whole, out=whole)
    return y


def attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Array | None = None,
    sin: Array | None = None,
    extend: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    window: int | None = None,
    first_key: Array | None = None,
    extend_back: Callable[[Array, Array], tuple[Array, Array]] | None = None,
) -> Tensor:
    """Causal self-attention, softmax(q k^T) v.    qkv (B, T, (H + 2 K) D) -> (B, T, H D)

    qkv       q of H heads, k and v of K heads, side by side. Query head h reads key/value head
              h // G (grouped queries: Ainslie et al. 2023; K = H is the ordinary case)
    cos, sin  (T, (H + K) D) or (B, T, (H + K) D) rotate q and k, see `apply_rotary`; the columns of
              q include the scale 1/sqrt(D) of the scores. Without them nothing is rotated
    extend    extend(k, v), each (B, T, K, D), may return (B, S, K, D) with earlier positions in
              front: the T queries are the last of S. Without `extend_back` no gradient flows
    window    a query sees only the newest `window` keys (Beltagy et al. 2020, section 3.1)
    first_key (B, T) integers: a query sees no key before this one of the S. Not above the query's
              own key, or its output is NaN. None: all earlier keys
    extend_back   the gradient of `extend`: from dk and dv (B, S, K, D) of what that returned to
              those of its arguments (B, T, K, D)
    """
    if qkv.ndim != 3:
        raise ValueError(f"attention: qkv must have shape (B, T, channels), got {qkv.shape}")
    B, T, width = qkv.shape
    rotated = heads + kv_heads
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"attention: heads ({heads}) must be a multiple of kv_heads ({kv_heads}), "
            "both 1 or more"
        )
    count = rotated + kv_heads
    if width % count or not width:
        raise ValueError(
            f"attention: the channels ({width}) must be a multiple of heads + 2 kv_heads ({count})"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be None or 1 or more, got {window}")
    D = width // count
    Z = as_floats(qkv.data).reshape(B, T, count, D)
    options = extend, window, first_key, extend_back
    O, back = qkv.backend.run(_rotate_and_attend, Z, heads, kv_heads, cos, sin, *options)

    def vjp(dy: Array) -> Grads:
        dZ = back(dy.reshape(B, T, heads, D))
        return (dZ.reshape(B, T, width),)

    return record(O.reshape(B, T, heads * D), (qkv,), vjp)


def _rotate_and_attend(
    backend: Backend,
    Z: Array,
    heads: int,
    kv_heads: int,
    cos: Array | None,
    sin: Array | None,
    extend: Callable[[Array, Array], tuple[Array, Array]] | None,
    window: int | None,
    first_key: Array | None,
    extend_back: Callable[[Array, Array], tuple[Array, Array]] | None = None,
) -> tuple[Array, Callable[[Array], Array]]:
    """(O, the function from dO to dZ) of arrays.    Z (B, T, H + 2 K, D) -> O (B, T, H, D)"""
    xp = backend.xp
    D = Z.shape[3]
    rotated = heads + kv_heads
    QK = Z[:, :, :rotated].copy() if cos is None else apply_rotary(xp, Z[:, :, :rotated], cos, sin)
    q = QK[:, :, :heads]
    k = QK[:, :, heads:]
    v = Z[:, :, rotated:].copy()  # Z itself is not kept
    if cos is None:
        q *= D**-0.5
    if extend:
        k, v = extend(k, v)
    O, attend_back = _attend(backend, q, k, v, window, first_key)
    shape = Z.shape
    extended = k.shape

    def back(dO: Array) -> Array:
        dZ = xp.empty(shape, dO.dtype)
        dQK = dZ[:, :, :rotated] if cos is None else xp.empty_like(QK)
        if extend_back is None:
            attend_back(dO, dQK[:, :, :heads], dQK[:, :, heads:], dZ[:, :, rotated:])
        else:
            dk, dv = xp.empty((2, *extended), dO.dtype)
            attend_back(dO, dQK[:, :, :heads], dk, dv)
            dQK[:, :, heads:], dZ[:, :, rotated:] = extend_back(dk, dv)
        if cos is None or sin is None:
            dQK[:, :, :heads] *= D**-0.5
        else:
            apply_rotary(xp, dQK, cos, sin, dZ[:, :, :rotated], back=True)
        return dZ

    return O, back


def _attend(
    backend: Backend,
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    first_key: Array | None,
) -> tuple[Array, Callable[[Array, Array, Array, Array], None]]:
    """softmax(q k^T) v, causal, on arrays.    q (B, T, H, D), k and v (B, S, K, D) -> O and `back`

    O is (B, T, H, D); `back(dO, dq, dk, dv)` writes into its last three arguments. Queries are
    processed in blocks of t, each with the s keys that any of them may see. Scores are transposed,
    (s, H t): softmax then reduces over rows, which NumPy does with whole vectors.
    """
    xp = backend.xp
    sizes = backend.sizes
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    G = H // K
    order = xp.arange(min(sizes.queries, T))
    future = xp.where(order[:, None] > order, -np.inf, 0).astype(q.dtype)  # (key, query)
    # Keys that no query of a block sees are left out, but not on a GPU: to look at `first_key`
    # there would wait for the device.
    on_host = first_key if isinstance(first_key, np.ndarray) and B else None

    def by_head(z: Array) -> Array:
        # (B, T, H, D) -> (B, K, G, T, D) without a copy: products with k broadcast over G
        return z.reshape(B, z.shape[1], K, z.shape[2] // K, D).transpose(0, 2, 3, 1, 4)

    def products(keys: Array, queries: Array) -> tuple[Array, Array]:
        # keys queries^T: in memory (B, s, H t), and as a view (B, K, G, s, t)
        s = keys.shape[3]
        t = queries.shape[3]
        P = xp.empty((B, s, H * t), q.dtype)
        view = P.reshape(B, s, K, G, t).transpose(0, 2, 3, 1, 4)
        backend.matmul(keys, queries.swapaxes(-1, -2), out=view)
        return P, view

    def masked_scores(at: slice) -> tuple[slice, Array, Array]:
        t = at.stop - at.start
        last = S - T + at.stop
        first = max(0, last - t + 1 - window) if window else 0
        if on_host is not None:
            first = max(first, min(int(on_host[:, at].min()), last - t))
        keys = slice(first, last)
        P, view = products(kh[..., keys, :], qh[..., at, :])
        # Only the newest t keys can be later than a query.
        P[:, -t:].reshape(B, t, H, t)[...] += future[:t, None, :t]
        # So many keys, fewer than t, are too old for the newest query.
        old = last - window - first if window else 0
        if old > 0:
            past = xp.where(order[:, None] - old <= order - t, -np.inf, 0)  # (key, query)
            P[:, :old].reshape(B, old, H, t)[...] += past.astype(q.dtype)[:old, None, :t]
        if first_key is not None:
            # Only keys before the largest first_key can be hidden from a query.
            end = last if on_host is None else int(np.clip(on_host[:, at].max(), first, last))
            is_hidden = xp.arange(first, end)[:, None] < first_key[:, None, at]  # (B, key, query)
            earlier = P[:, : end - first].reshape(B, end - first, H, t)
            xp.copyto(earlier, -np.inf, where=is_hidden[:, :, None])
        return keys, P, view

    O = xp.empty(q.shape, q.dtype)
    inv = xp.empty((B, T, H, 1), q.dtype)
    saved_blocks = []
    qh = by_head(q)
    kh = by_head(k)
    vh = by_head(v)
    Oh = by_head(O)
    keep_scores = sizes.kept_scores >= B * H * T * S
    for at in blocks(T, sizes.queries):
        keys, P, view = masked_scores(at)
        top = P.max(axis=1, keepdims=True)  # (B, 1, H t)
        P -= top
        xp.exp(P, out=P)
        total = backend.sum_keys(P)  # (B, 1, H t)
        inv[:, at, :, 0] = 1.0 / total.reshape(B, H, at.stop - at.start).swapaxes(1, 2)
        # (t, s) @ (s, D)
        backend.matmul(view.swapaxes(-1, -2), vh[..., keys, :], out=Oh[..., at, :])
        saved_blocks.append((at, keys, top, (P, view) if keep_scores else None))
    O *= inv  # T x D numbers: dividing the scores would be T x S

    def back(dO: Array, dq: Array, dk: Array, dv: Array) -> None:
        d = dO * inv  # (B, T, H, D): softmax's division is here, so P stays exp(scores - top)
        dh = by_head(d)
        dqh = by_head(dq)
        dkh = by_head(dk)
        dvh = by_head(dv)
        # softmax's gradient is p (dp - sum p dp); the sum is rowsum(dO * O), T numbers
        # (Dao et al. 2022, app. B).
        along = backend.row_dot(rows(d), rows(O)).reshape(B, T, H).swapaxes(1, 2)

        def add(total: Array, a: Array, b: Array) -> None:
            # Add a @ b, summed over G, to the rows `keys`. The block that sees every key writes.
            if a.shape[3] < S:
                product = backend.matmul(a, b)
                total[..., keys, :] += product if G == 1 else product.sum(axis=2, keepdims=True)
            elif G == 1:
                backend.matmul(a, b, out=total)
            else:
                total[...] = backend.matmul(a, b).sum(axis=2, keepdims=True)

        # If the last block, which comes first, sees every key, it overwrites dk and dv.
        if saved_blocks[-1][1].start > 0:
            dk[...] = 0
            dv[...] = 0
        for at, keys, top, exps in reversed(saved_blocks):
            if exps is None:
                _, P, view = masked_scores(at)
                P[...] = xp.exp(P - top)
            else:
                P, view = exps
            add(dvh, view, dh[..., at, :])  # (s, t) @ (t, D)
            dS, dview = products(vh[..., keys, :], dh[..., at, :])
            dS -= along[..., at].reshape(top.shape)
            dS *= P
            # (t, s) @ (s, D)
            backend.matmul(dview.swapaxes(-1, -2), kh[..., keys, :], out=dqh[..., at, :])
            add(dkh, dview, qh[..., at, :])  # (s, t) @ (t, D)

    return O, back
