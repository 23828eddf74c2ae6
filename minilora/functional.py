"""The neural operations: each forward stands beside its hand-written gradient, on one screen.

Shapes: B batch, T time (queries), S keys, C channels, H heads, K key/value heads, G = H / K, D head size, V vocabulary,
I in, O out, r rank, N rows (all leading axes flattened). dfoo is the gradient of foo. Every operation has a definition
in elementary operations, which the tests hold beside it. Ordered by rising complexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .autograd import Tensor, grad_enabled, namespace, record
from .backend import Array, Backend
from .errors import DataError
from .threads import blocks

Grads = tuple[Array | None, ...]
IGNORE = -100  # a target that is not counted: PyTorch's ignore_index


def rows(x: Array) -> Array:
    """(..., C) -> (N, C): one large product is faster than a loop of small ones."""
    return x.reshape(
        math.prod(x.shape[:-1]), x.shape[-1]
    )  # not -1, which has no meaning beside a 0


def row_dot(xp: Any, a: Array, b: Array) -> Array:
    """sum_c a[n, c] b[n, c]    both (N, C) -> (N, 1). N products of a row and a column: one call."""
    return xp.matmul(a[:, None, :], b[:, :, None])[:, 0]


# ---- linear maps ----------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b    x (..., I), W (O, I), b (O,) -> (..., O)"""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    namespace(*inputs)
    X, W = rows(x.data), weight.data
    y = X @ W.T  # (N, I) @ (I, O) -> (N, O)
    if bias is not None:
        y += bias.data
    shape = x.shape
    W_kept = W if x.requires_grad else None
    X_kept = (
        X if weight.requires_grad else None
    )  # a frozen W's gradient is not wanted, and only that would read X
    need_db, count = bias is not None and bias.requires_grad, len(inputs)

    def vjp(dy: Array) -> Grads:
        dY = rows(dy)  # (N, O)
        dx = None if W_kept is None else (dY @ W_kept).reshape(shape)  # (N, O) @ (O, I) -> (N, I)
        dW = None if X_kept is None else dY.T @ X_kept  # (O, N) @ (N, I) -> (O, I)
        db = dY.sum(axis=0) if need_db else None
        return (dx, dW, db)[:count]

    return record(y.reshape(*shape[:-1], len(W)), inputs, vjp)


def lora_linear(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s (x A^T) B^T    x (..., I), y (..., O), A (r, I), B (O, r) -> (..., O)    Hu et al. 2021, eq. (3)

    Never forms dW = s B A. With G = dL/dy: dA = s B^T G^T X and dB = s G^T X A^T, the projections of the full gradient.
    """
    namespace(x, y, A, B)
    X, a, b, shape, scaling = rows(x.data), A.data, B.data, x.shape, float(scaling)
    U = X @ a.T  # (N, I) @ (I, r) -> (N, r)
    out = (U @ b.T).reshape(y.shape)  # (N, r) @ (r, O) -> (N, O)
    out *= scaling
    out += y.data
    need_dx = x.requires_grad
    X_kept = X if A.requires_grad else None
    U_kept = U if B.requires_grad else None

    def vjp(dy: Array) -> Grads:
        dY = rows(dy)  # (N, O)
        dU = (
            (dY @ b) * scaling if need_dx or X_kept is not None else None
        )  # (N, O) @ (O, r) -> (N, r)
        dx = (dU @ a).reshape(shape) if need_dx else None  # (N, r) @ (r, I) -> (N, I)
        dA = None if X_kept is None or dU is None else dU.T @ X_kept  # (r, N) @ (N, I) -> (r, I)
        dB = None if U_kept is None else (dY.T @ U_kept) * scaling  # (O, N) @ (N, r) -> (O, r)
        return dx, dy, dA, dB

    return record(out, (x, y, A, B), vjp)


def check_ids(ids: np.ndarray, count: int, what: str) -> None:
    """DataError, naming one, unless all ids are in [0, count). Only on the host: a GPU takes a wrong row silently."""
    if ids.size and not (ids.min() >= 0 and ids.max() < count):
        raise DataError(
            f"{what} {ids.min() if ids.min() < 0 else ids.max()} is outside [0, {count})"
        )


def embedding(ids: Array, weight: Tensor) -> Tensor:
    """weight[ids]    ids (...) integers in [0, V), weight (V, C) -> (..., C). Rows taken twice get both gradients."""
    count, backend = len(weight), weight.backend
    if isinstance(ids, np.ndarray):
        check_ids(ids, count, "id")
        ids = backend.from_numpy(ids)
    flat = ids.reshape(-1)
    y = weight.take(flat).reshape(*ids.shape, weight.shape[1])
    return record(y, (weight,), lambda dy: (backend.add_rows(flat, rows(dy), count),))


# ---- dropout --------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, key: int, first: int = 0) -> Tensor:
    """Zero each element with probability p, scale the others by 1 / (1 - p).    x (B, ...)

    The mask of sequence b is a function of (key, first + b): see `Backend.random_words`. So it does not depend on where
    a batch was cut, and backward makes it again rather than keep it.
    """
    if p == 0:
        return x
    backend, shape, dtype, scale = x.backend, x.shape, x.dtype, 1 / (1 - float(p))
    each = math.prod(shape[1:])

    def mask() -> Array:
        words = backend.random_words(key, first, shape[0], (each + 1) // 2)
        words = words.view(np.uint32)[:, :each]  # 32 random bits an element
        return (words >= np.uint32(min(round(p * 2**32), 2**32 - 1))).reshape(shape).astype(
            dtype
        ) * scale

    return record(x.data * mask(), (x,), lambda dy: (dy * mask(),))


# ---- activations ----------------------------------------------------------------------------------------------------


def _sigmoid(xp: Any, x: Array) -> Array:
    y = xp.negative(x, out=xp.empty_like(x))
    with np.errstate(
        over="ignore"
    ):  # exp(-x) may be infinite: then sigmoid is 0, exactly what is wanted
        xp.exp(y, out=y)
        y += 1
        return xp.divide(1, y, out=y)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)    any shape"""
    X, s = x.data, _sigmoid(namespace(x), x.data)
    return record(X * s, (x,), lambda dy: (dy * (s * (1 + X * (1 - s))),))


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up    x = [gate, up] (2, ..., C) -> (..., C)    Shazeer 2020"""
    xp, X = namespace(x), x.data
    if len(X) != 2:
        raise ValueError(
            f"swiglu: the first axis holds gate and up, so it must be 2, got {x.shape}"
        )
    g, u = X
    s = _sigmoid(xp, g)
    y = g * s
    y *= u

    def vjp(dy: Array) -> Grads:
        dX = xp.empty_like(X)
        dgate, dup = dX
        xp.multiply(g, s, out=dup)
        xp.subtract(1, s, out=dgate)  # d silu = s + g s (1 - s)
        dgate *= dup
        dgate += s
        dgate *= u
        dgate *= dy
        dup *= dy
        return (dX,)

    return record(y, (x,), vjp)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or for approximate="tanh" its tanh form    any shape    Hendrycks & Gimpel 2016"""
    X, xp = x.data, namespace(x)
    if approximate == "none":
        phi = 0.5 * (1.0 + x.backend.erf(X * math.sqrt(0.5)))  # the normal distribution function

        def vjp(dy: Array) -> Grads:
            return (dy * (phi + X * (xp.exp(-0.5 * X * X) * (1 / math.sqrt(2 * math.pi)))),)

        return record(X * phi, (x,), vjp)
    if approximate != "tanh":
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    # (1 + tanh(z)) / 2 = sigmoid(2z), and exp is twice as fast as tanh. 2z = c (x + 0.044715 x^3)
    c = 2 * math.sqrt(2 / math.pi)
    s = _sigmoid(xp, X * (c + (0.044715 * c) * (X * X)))

    def vjp_tanh(dy: Array) -> Grads:
        return (dy * (s + X * s * (1 - s) * (c + (3 * 0.044715 * c) * (X * X))),)

    return record(X * s, (x,), vjp_tanh)


# ---- softmax and the loss -------------------------------------------------------------------------------------------


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) / sum exp(x) along `axis`    any shape"""
    y = namespace(x).exp(x.data - x.data.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return record(y, (x,), lambda dy: (y * (dy - (dy * y).sum(axis=axis, keepdims=True)),))


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """x - log sum exp(x) along `axis`    any shape"""
    xp = namespace(x)
    y = x.data - x.data.max(axis=axis, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return record(y, (x,), lambda dy: (dy - xp.exp(y) * dy.sum(axis=axis, keepdims=True),))


def prepare_targets(
    backend: Backend,
    shape: tuple[int, ...],
    V: int,
    targets: Array,
    ignore_index: int,
    reduction: str,
) -> tuple[Array, Array, Array]:
    """(targets, with 0 for ignored ones; which are ignored; how much each one's loss weighs), all (N,)."""
    if targets.shape != shape:
        raise DataError(
            f"targets of shape {targets.shape} do not fit logits of shape {(*shape, V)}"
        )
    if isinstance(targets, np.ndarray):
        check_ids(targets[targets != ignore_index], V, "target")
        targets = backend.from_numpy(targets)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}")
    xp, t = backend.xp, targets.reshape(-1)
    ignored = t == ignore_index
    keep = (~ignored).astype(np.float64)
    return (
        xp.where(ignored, 0, t),
        ignored,
        keep / xp.maximum(keep.sum(), 1) if reduction == "mean" else keep,
    )


def cross_entropy(
    logits: Tensor, targets: Array, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """-log softmax(logits)[target]    logits (..., V), targets (...) integers -> scalar

    `reduction` "mean" over the counted targets (0 if there is none) or "sum". DataError for a target outside [0, V).
    """
    xp, shape = namespace(logits), logits.shape
    t, ignored, weight = prepare_targets(
        logits.backend, shape[:-1], shape[-1], targets, ignore_index, reduction
    )
    Z, weight = rows(logits.data), weight.astype(logits.dtype)  # (N, V), (N,)
    top, each = Z.max(axis=-1, keepdims=True), xp.arange(len(t))
    with np.errstate(invalid="ignore"):  # an infinite logit makes its row NaN
        E, down = xp.exp(Z - top), Z[each, t] - top[:, 0]  # (N, V), (N,)
    E[ignored] = 1  # a row that does not count is read no further, whatever it holds
    total = E.sum(axis=-1, keepdims=True)  # (N, 1)
    nll = xp.where(
        ignored, 0, xp.log(total)[:, 0] - down
    )  # not log + top - Z: near 0 that would round it away
    kept = E if logits.requires_grad else None

    def vjp(dy: Array) -> Grads:
        # d nll / d logits = softmax - onehot(target), row by row times its weight
        scale = (weight * dy)[:, None]  # (N, 1)
        dZ = kept * (scale / total)
        dZ[each, t] -= scale[:, 0]
        return (dZ.reshape(shape),)

    return record((nll * weight).sum(), (logits,), vjp)


# ---- norms: rstd (..., 1) is kept, the normalised x is made again ----------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w    x (..., C), w (C,)    Zhang & Sennrich 2019, eq. (4)"""
    xp = namespace(x, weight)
    X, w, shape = rows(x.data), weight.data, x.shape
    rstd = 1.0 / xp.sqrt(row_dot(xp, X, X) / X.shape[1] + float(eps))  # (N, 1)
    y = X * rstd
    y *= w
    need_dx, need_dw = x.requires_grad, weight.requires_grad

    def vjp(dy: Array) -> Grads:
        dY, xhat = rows(dy), X * rstd
        dw = (dY * xhat).sum(axis=0) if need_dw else None
        if not need_dx:
            return None, dw
        dx = dY * w  # to begin with, d xhat
        xhat *= row_dot(xp, dx, xhat) / X.shape[1]
        dx -= xhat
        dx *= rstd
        return dx.reshape(shape), dw

    return record(y.reshape(shape), (x, weight), vjp)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * w + b    x (..., C), w and b (C,)    Ba, Kiros & Hinton 2016, eq. (4)"""
    xp = namespace(x, weight, bias)
    X, w = x.data, weight.data
    mean = X.mean(axis=-1, keepdims=True)
    centred = X - mean
    rstd = 1.0 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + float(eps))  # (..., 1)
    need_dx, need_dw, need_db = x.requires_grad, weight.requires_grad, bias.requires_grad

    def vjp(dy: Array) -> Grads:
        xhat = (X - mean) * rstd
        dw = rows(dy * xhat).sum(axis=0) if need_dw else None
        db = rows(dy).sum(axis=0) if need_db else None
        if not need_dx:
            return None, dw, db
        dxhat = dy * w
        along = dxhat.mean(axis=-1, keepdims=True) + xhat * (dxhat * xhat).mean(
            axis=-1, keepdims=True
        )
        return rstd * (dxhat - along), dw, db

    return record(centred * rstd * w + bias.data, (x, weight, bias), vjp)


ROWS, LOGITS = (
    1024,
    1 << 20,
)  # at once in `linear_cross_entropy`; with 4 MiB of logits these stay in the cache


def linear_cross_entropy(
    x: Tensor, head: Tensor, targets: Array, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """cross_entropy(x head^T, targets)    x (..., C), head (V, C), targets (...) integers -> scalar

    The logits exist for a few words at a time and never all at once, whose maximum and sum are corrected as they go on
    (Milakov & Gimelshein 2018, algorithm 3). So the gradients are taken on the way, up to the factor dy: with
    E = exp(logits - max) and p = E / sum E they are (p - onehot) head and (p - onehot)^T x.
    """
    xp, V, shape = namespace(x, head), len(head), x.shape
    t, ignored, weight = prepare_targets(x.backend, shape[:-1], V, targets, ignore_index, reduction)
    weight = weight.astype(x.dtype)
    X = xp.where(
        ignored[:, None], 0, rows(x.data)
    )  # a row that does not count is read no further, whatever it holds
    dX = xp.empty_like(X) if grad_enabled() and x.requires_grad else None
    dW = xp.zeros(head.shape, head.dtype) if grad_enabled() and head.requires_grad else None
    loss = xp.zeros((), X.dtype)
    for at in blocks(len(X), ROWS):
        Xn, tn, w, skip = X[at], t[at], weight[at], ignored[at]  # (n, C), (n,), (n,), (n,)
        top, total, hit = (xp.full(w.shape, start, X.dtype) for start in (-np.inf, 0, 0))
        words = blocks(V, max(1, LOGITS // len(Xn)))

        def logits(W: Array, Xn: Array = Xn, skip: Array = skip) -> Array:
            Z = W @ Xn.T  # (v, C) @ (C, n) -> (v, n): NumPy reduces over rows with whole vectors
            Z[:, skip] = 0
            return Z

        for v in words:
            W = head.take(v)
            E = logits(W)
            logit = xp.take_along_axis(
                E, xp.clip(tn - v.start, 0, v.stop - v.start - 1)[None], axis=0
            )[0]
            hit = xp.where((tn >= v.start) & (tn < v.stop), logit, hit)
            before, top = top, xp.maximum(top, E.max(axis=0))
            with np.errstate(invalid="ignore"):  # an infinite logit makes its row NaN
                E -= top
                xp.exp(E, out=E)
                shrink = xp.exp(before - top)
            total = total * shrink + E.sum(axis=0)
            if dX is not None:
                part = E.T @ W  # (n, v) @ (v, C)
                dX[at] = part if v.start == 0 else dX[at] * shrink[:, None] + part
        with np.errstate(invalid="ignore"):
            each = xp.log(total) - (
                hit - top
            )  # not log + top - hit: near 0 that would round it away
        loss = loss + (xp.where(skip, 0, each) * w).sum()
        share = (w / total)[:, None]  # (n, 1)
        if dX is not None:
            dX[at] = xp.where(skip[:, None], 0, dX[at] * share - head.take(tn) * w[:, None])
        if dW is not None:
            for v in words:
                E = E if len(words) == 1 else xp.exp(logits(head.take(v)) - top)
                dW[v] += E @ (Xn * share)  # (v, n) @ (n, C)
    if dW is not None:
        dW -= x.backend.add_rows(t, X * weight[:, None], V)

    def vjp(dy: Array) -> Grads:
        return None if dX is None else (dX * dy).reshape(shape), None if dW is None else dW * dy

    return record(loss, (x, head), vjp)


QUERY_BLOCK = 64  # queries a block: shorter blocks skip more hidden scores, and cost more calls


KEPT_SCORES = (
    1 << 20
)  # with more of them, backward computes exp(scores) again: memory then grows with T, not T^2


def apply_rotary(xp: Any, z: Array, cos: Array, sin: Array, out: Array | None = None) -> Array:
    """Rotate pairs (z_i, z_{i + D/2}) by position-dependent angles, on arrays.    z (B, T, h, D) -> (B, T, h, D)

    Su et al. 2021, eq. (34), in the layout of Llama's checkpoints: the pair of i is i + D/2, not i + 1. cos and sin
    (T, h D) have a row of factors for all heads of a position, because arithmetic over whole rows is fast; sin's sign
    is minus in the first half of each D. -sin turns back, which is the transpose.
    """
    B, T, h, D = z.shape
    pairs = (B, T, h, 2, D // 2)
    y = xp.empty(z.shape, z.dtype) if out is None else out
    xp.multiply(z.reshape(pairs)[..., ::-1, :], sin.reshape(pairs[1:]), out=y.reshape(pairs))
    whole = y.reshape(B, T, h * D)
    whole += z.reshape(B, T, h * D) * cos
    return y


def attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Array | None = None,
    sin: Array | None = None,
    extend: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention, softmax(q k^T) v, with q and k rotated.    qkv (B, T, (H + 2 K) D) -> (B, T, H D)

    Side by side in qkv: q of H heads, k and v of K heads; query head h reads key/value head h // G (grouped queries:
    Ainslie et al. 2023; K = H is the ordinary case). cos and sin (T, (H + K) D) as `turn` reads them; the scale
    1/sqrt(D) of the scores is a factor of theirs in the rows of q; without them nothing is rotated. `extend(k, v)`,
    each (B, T, K, D), may return (B, S, K, D) with earlier positions in front: the T queries are the last of S, and no
    gradient flows then. A query sees the newest `window` keys only (Beltagy et al. 2020, section 3.1), or all of them.
    """
    xp, (B, T, width), turned = namespace(qkv), qkv.shape, heads + kv_heads
    if heads % kv_heads or width % (turned + kv_heads):
        raise ValueError(
            f"attention: {heads} heads and {kv_heads} of keys do not fit each other, or {width} channels"
        )
    D = width // (turned + kv_heads)
    Z = qkv.data.reshape(B, T, heads + 2 * kv_heads, D)
    QK = Z[:, :, :turned].copy() if cos is None else apply_rotary(xp, Z[:, :, :turned], cos, sin)
    q, k, v = QK[:, :, :heads], QK[:, :, heads:], Z[:, :, turned:].copy()  # qkv itself is not kept
    if cos is None:
        q *= D**-0.5
    O, back = _attend(xp, q, *(extend(k, v) if extend else (k, v)), window)

    def vjp(dy: Array) -> Grads:
        dZ = xp.empty((B, T, heads + 2 * kv_heads, D), dy.dtype)
        dQK = dZ[:, :, :turned] if cos is None else xp.empty_like(QK)
        back(dy.reshape(B, T, heads, D), dQK[:, :, :heads], dQK[:, :, heads:], dZ[:, :, turned:])
        if cos is None or sin is None:
            dQK[:, :, :heads] *= D**-0.5
        else:
            apply_rotary(xp, dQK, cos, -sin, out=dZ[:, :, :turned])
        return (dZ.reshape(B, T, width),)

    return record(O.reshape(B, T, heads * D), (qkv,), vjp)


def _attend(
    xp: Any, q: Array, k: Array, v: Array, window: int | None
) -> tuple[Array, Callable[[Array, Array, Array, Array], None]]:
    """softmax(q k^T) v, causal, on arrays.    q (B, T, H, D), k and v (B, S, K, D) -> O (B, T, H, D) and `back`

    `back(dO, dq, dk, dv)` fills the last three. Queries go in blocks of t, each with the s keys that any of them may
    see. Scores are transposed, (s, H t): softmax then reduces over rows, which NumPy does with whole vectors.
    """
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    G = H // K
    order = xp.arange(min(QUERY_BLOCK, T))
    future = xp.where(order[:, None] > order, -np.inf, 0).astype(q.dtype)  # (key, query)

    def by_head(
        z: Array,
    ) -> Array:  # (B, T, H, D) -> (B, K, G, T, D): no copy, and products with k broadcast over G
        return z.reshape(B, z.shape[1], K, z.shape[2] // K, D).transpose(0, 2, 3, 1, 4)

    def scores(
        keys: Array, queries: Array
    ) -> tuple[Array, Array]:  # in memory (B, s, H t); as a view (B, K, G, s, t)
        s, t = keys.shape[3], queries.shape[3]
        P = xp.empty((B, s, H * t), q.dtype)
        view = P.reshape(B, s, K, G, t).transpose(0, 2, 3, 1, 4)
        xp.matmul(keys, queries.swapaxes(-1, -2), out=view)
        return P, view

    def seen(at: slice) -> tuple[slice, Array, Array]:
        t, last = at.stop - at.start, S - T + at.stop
        keys = slice(max(0, last - t + 1 - window) if window else 0, last)
        P, view = scores(kh[..., keys, :], qh[..., at, :])
        P[:, -t:].reshape(B, t, H, t)[...] += future[
            :t, None, :t
        ]  # only the newest t keys can be too new
        old = (
            last - window - keys.start if window else 0
        )  # < t: so many keys are too old for the newest query
        if old > 0:
            past = xp.where(order[:, None] - old <= order - t, -np.inf, 0).astype(
                q.dtype
            )  # (key, query)
            P[:, :old].reshape(B, old, H, t)[...] += past[:old, None, :t]
        return keys, P, view

    O, inv, kept = xp.empty((B, T, H, D), q.dtype), xp.empty((B, T, H, 1), q.dtype), []
    qh, kh, vh, Oh = by_head(q), by_head(k), by_head(v), by_head(O)
    for at in blocks(T, QUERY_BLOCK):
        keys, P, view = seen(at)
        top = P.max(axis=1, keepdims=True)  # (B, 1, H t)
        P -= top
        xp.exp(P, out=P)
        total = (
            xp.ones((1, P.shape[1]), P.dtype) @ P
        )  # (B, 1, H t): a product sums faster than a reduction
        inv[:, at, :, 0] = 1.0 / total.reshape(B, H, at.stop - at.start).swapaxes(1, 2)
        xp.matmul(view.swapaxes(-1, -2), vh[..., keys, :], out=Oh[..., at, :])  # (t, s) @ (s, D)
        kept.append((at, keys, top, (P, view) if B * H * T * S <= KEPT_SCORES else None))
    O *= inv  # T x D numbers: dividing the scores would be T x S

    def back(dO: Array, dq: Array, dk: Array, dv: Array) -> None:
        d = dO * inv  # (B, T, H, D): softmax's division is here, so P stays exp(scores - top)
        dh, dqh, dkh, dvh = (by_head(z) for z in (d, dq, dk, dv))
        # softmax's gradient p (dp - sum p dp): the sum is rowsum(dO * O), T numbers (Dao et al. 2022, app. B)
        along = row_dot(xp, rows(d), rows(O)).reshape(B, T, H).swapaxes(1, 2)

        def add(total: Array, a: Array, b: Array) -> None:
            if G == 1 and a.shape[3] == S:
                xp.matmul(a, b, out=total)
            elif a.shape[3] == S:
                total[...] = (a @ b).sum(axis=2, keepdims=True)
            else:
                total[..., keys, :] += a @ b if G == 1 else (a @ b).sum(axis=2, keepdims=True)

        if (
            kept[-1][1].start > 0
        ):  # otherwise the latest block sees every key: what it brings is first
            dk[...], dv[...] = 0, 0
        for at, keys, top, exps in reversed(kept):
            if exps is None:
                exps = seen(at)[1:]
                exps[0][...] = xp.exp(exps[0] - top)
            P, view = exps
            add(dvh, view, dh[..., at, :])  # (s, t) @ (t, D)
            dS, dview = scores(vh[..., keys, :], dh[..., at, :])
            dS -= along[..., at].reshape(top.shape)
            dS *= P
            xp.matmul(
                dview.swapaxes(-1, -2), kh[..., keys, :], out=dqh[..., at, :]
            )  # (t, s) @ (s, D)
            add(dkh, dview, qh[..., at, :])  # (s, t) @ (t, D)

    return O, back
