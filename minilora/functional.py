"""The neural operations: each forward stands beside its hand-written gradient, on one screen.

Shapes: B batch, T time (queries), S keys, C channels, H heads, K key/value heads, G = H / K, D head size, V vocabulary,
I in, O out, r rank, N rows (all leading axes flattened). dfoo is the gradient of foo. Every operation has a definition
in elementary operations, which the tests hold beside it. Ordered by rising complexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .autograd import Tensor, namespace, record
from .backend import Array
from .errors import DataError

Grads = tuple[Array | None, ...]
IGNORE = -100  # a target that is not counted: PyTorch's ignore_index


def rows(x: Array) -> Array:
    """(..., C) -> (N, C): one large product is faster than a loop of small ones."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not -1, which has no meaning beside a 0


def row_dot(xp: Any, a: Array, b: Array) -> Array:
    """sum_c a[n, c] b[n, c]    both (N, C) -> (N, 1). A product with ones sums faster than a reduction does."""
    return (a * b) @ xp.ones((a.shape[1], 1), a.dtype)


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
    X_kept = X if weight.requires_grad else None  # a frozen W's gradient is not wanted, and only that would read X
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
        dU = (dY @ b) * scaling if need_dx or X_kept is not None else None  # (N, O) @ (O, r) -> (N, r)
        dx = (dU @ a).reshape(shape) if need_dx else None  # (N, r) @ (r, I) -> (N, I)
        dA = None if X_kept is None or dU is None else dU.T @ X_kept  # (r, N) @ (N, I) -> (r, I)
        dB = None if U_kept is None else (dY.T @ U_kept) * scaling  # (O, N) @ (N, r) -> (O, r)
        return dx, dy, dA, dB

    return record(out, (x, y, A, B), vjp)


def merged_linear(
    x: Tensor, weight: Array, bias: Tensor | None, factors: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """y = x W'^T + b    x (..., I), weight [W' B_1 B_2 ...] (O, I + sum r_i), factors (A_i, B_i, s_i) -> (..., O)

    W' = W + sum_i s_i B_i A_i was formed beforehand, once for many calls: by the merge identity this equals `linear`
    followed by `lora_linear` for each pair, with one product a direction. W' is no parameter; A_i and B_i are. That the
    B_i stand beside W' gives dx and dy B_i in one product, too: alone they are too thin to be fast.
    """
    inputs = (x, *(() if bias is None else (bias,)), *(f for A, B, _ in factors for f in (A, B)))
    namespace(*inputs)
    X, shape, I = rows(x.data), x.shape, x.shape[-1]
    y = X @ weight[:, :I].T  # (N, I) @ (I, O) -> (N, O)
    if bias is not None:
        y += bias.data
    need_dx, has_bias, need_db = x.requires_grad, bias is not None, bias is not None and bias.requires_grad
    X_kept = X if any(f.requires_grad for A, B, _ in factors for f in (A, B)) else None
    pairs = [(A.data, len(A), float(s)) for A, _, s in factors]

    def vjp(dy: Array) -> Grads:
        dY = rows(dy)  # (N, O)
        back = dY @ (weight if need_dx else weight[:, I:])  # [dx, dY B_1, ...] (N, O) @ (O, I + r) -> (N, I + r)
        found = [back[:, :I].reshape(shape) if need_dx else None]
        if has_bias:
            found.append(dY.sum(axis=0) if need_db else None)
        at = I if need_dx else 0
        for a, r, s in pairs:
            found.append(None if X_kept is None else (back[:, at : at + r] * s).T @ X_kept)  # dA (r, N) @ (N, I)
            found.append(None if X_kept is None else dY.T @ (X_kept @ a.T * s))  # dB (O, N) @ (N, r) -> (O, r)
            at += r
        return tuple(found)

    return record(y.reshape(*shape[:-1], len(weight)), inputs, vjp)


def worth_merging(tokens: int, inputs: int, outputs: int, r: int) -> bool:
    """Is it cheaper to form W + dW once than to take the low-rank path at every one of `tokens` positions?

    Counted from shapes alone, so that a resumed run chooses alike: 2 r I O operations and three passes over W, against
    4 r (I + O) a position, forward and for dx. Skinny products run at half the speed of square ones.
    """
    return inputs * outputs * (2 * r + 12) < tokens * 2 * 4 * r * (inputs + outputs)


def within(ids: np.ndarray, count: int, what: str) -> None:
    """DataError, naming one, unless all ids are in [0, count). Only on the host: a GPU takes a wrong row silently."""
    if ids.size and not (ids.min() >= 0 and ids.max() < count):
        raise DataError(f"{what} {ids.min() if ids.min() < 0 else ids.max()} is outside [0, {count})")


def embedding(ids: Array, weight: Tensor) -> Tensor:
    """weight[ids]    ids (...) integers in [0, V), weight (V, C) -> (..., C). Rows taken twice get both gradients."""
    count, backend = len(weight), weight.backend
    if isinstance(ids, np.ndarray):
        within(ids, count, "id")
        ids = backend.from_numpy(ids)
    flat = ids.reshape(-1)
    y = backend.xp.take(weight.data, flat, axis=0).reshape(*ids.shape, weight.shape[1])
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
        return (words >= np.uint32(min(round(p * 2**32), 2**32 - 1))).reshape(shape).astype(dtype) * scale

    return record(x.data * mask(), (x,), lambda dy: (dy * mask(),))


# ---- activations ----------------------------------------------------------------------------------------------------


def _sigmoid(xp: Any, x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite: then sigmoid is 0, exactly what is wanted
        y = xp.exp(-x)
        y += 1
        return 1 / y


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)    any shape"""
    X, s = x.data, _sigmoid(namespace(x), x.data)
    return record(X * s, (x,), lambda dy: (dy * (s * (1 + X * (1 - s))),))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up    both (..., C) -> (..., C)    Shazeer 2020"""
    g, u = gate.data, up.data
    s = _sigmoid(namespace(gate, up), g)
    y = g * s
    y *= u

    def vjp(dy: Array) -> Grads:
        dup = g * s
        dgate = 1 - s  # d silu = s + g s (1 - s)
        dgate *= dup
        dgate += s
        dgate *= u
        dgate *= dy
        dup *= dy
        return dgate, dup

    return record(y, (gate, up), vjp)


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


def cross_entropy(logits: Tensor, targets: Array, ignore_index: int = IGNORE, reduction: str = "mean") -> Tensor:
    """-log softmax(logits)[target]    logits (..., V), targets (...) integers -> scalar

    `reduction` "mean" over the counted targets (0 if there is none) or "sum". DataError for a target outside [0, V).
    """
    xp, V = namespace(logits), logits.shape[-1]
    if targets.shape != logits.shape[:-1]:
        raise DataError(f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}")
    if isinstance(targets, np.ndarray):
        within(targets[targets != ignore_index], V, "target")
        targets = logits.backend.from_numpy(targets)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}")
    Z, shape = rows(logits.data), logits.shape  # (N, V)
    t = targets.reshape(-1)
    ignored = t == ignore_index  # (N,)
    keep = (~ignored).astype(Z.dtype)  # (N,) 1 where the target counts
    t = xp.where(ignored, 0, t)
    each = xp.arange(len(t))
    top = Z.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # an infinite logit makes its row NaN
        E, down = xp.exp(Z - top), Z[each, t] - top[:, 0]  # (N, V), (N,)
    E[ignored] = 1  # a row that does not count is read no further, whatever it holds
    total = E.sum(axis=-1, keepdims=True)  # (N, 1)
    nll = xp.where(ignored, 0, xp.log(total)[:, 0] - down)  # not log + top - Z: near 0 that would round it away
    weight = keep / xp.maximum(keep.sum(), 1) if reduction == "mean" else keep
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
        along = dxhat.mean(axis=-1, keepdims=True) + xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)
        return rstd * (dxhat - along), dw, db

    return record(centred * rstd * w + bias.data, (x, weight, bias), vjp)


# ---- attention ------------------------------------------------------------------------------------------------------

QUERY_BLOCK = 64  # queries a block: shorter blocks skip more hidden scores, and cost more calls
KEPT_SCORES = 1 << 20  # with more of them, backward computes exp(scores) again: memory then grows with T, not T^2


def rope(x: Tensor, cos: Array, sin: Array) -> Tensor:
    """Rotate pairs (x_i, x_{i + D/2}) by position-dependent angles.    x (B, T, H, D), cos and sin (T, D/2)

    Su et al. 2021, eq. (34), in the layout of Llama's checkpoints: the pair of i is i + D/2, not i + 1.
    """
    xp = namespace(x)
    B, T, H, D = x.shape
    # One row of factors for all heads of a position: arithmetic then runs over whole rows, not over pieces of D/2.
    c, s = xp.tile(cos, 2 * H), xp.tile(xp.concatenate([-sin, sin], axis=-1), H)  # (T, H D)

    def turn(z: Array, s: Array) -> Array:
        halves, y = z.reshape(B, T, H, 2, D // 2), xp.empty((B, T, H, 2, D // 2), z.dtype)
        y[..., 0, :], y[..., 1, :] = halves[..., 1, :], halves[..., 0, :]
        y = y.reshape(B, T, H * D)
        y *= s
        y += z.reshape(B, T, H * D) * c
        return y.reshape(B, T, H, D)

    return record(turn(x.data, s), (x,), lambda dy: (turn(dy, -s),))  # the transpose of a rotation turns it back


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention, softmax(scale q k^T) v.    q (B, T, H, D), k and v (B, S, K, D), S >= T -> (B, T, H, D)

    The T queries are the last of the S positions: query t sees the keys up to t + S - T. Head h reads key/value head
    h // G (grouped queries: Ainslie et al. 2023; K = H is the ordinary case). `scale` is 1/sqrt(D) unless given.

    Queries go in blocks of t, each with the s keys that any of them may see; a group's G heads stand side by side, as
    G t queries. Scores are transposed, (s, G t): softmax then reduces over rows, which NumPy does with whole vectors.
    """
    xp = namespace(q, k, v)
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if H % K or T > S:
        raise ValueError(f"attention: q {q.shape} does not fit k {k.shape}: H must be a multiple of K, and S >= T")
    G, scale = H // K, 1 / math.sqrt(D) if scale is None else float(scale)
    blocks = [slice(start, min(start + QUERY_BLOCK, T)) for start in range(0, T, QUERY_BLOCK)]
    Q, Kt, Vt = q.data * scale, k.data.transpose(0, 2, 1, 3), v.data.transpose(0, 2, 1, 3)  # Kt, Vt (B, K, S, D)
    future = xp.tril(xp.full((QUERY_BLOCK, QUERY_BLOCK), -np.inf, Q.dtype), -1)  # (key, query)

    def grouped(z: Array, at: slice) -> Array:  # (B, T, H, D) -> (B, K, G t, D)
        t = at.stop - at.start
        return z[:, at].reshape(B, t, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B, K, G * t, D)

    def by_time(z: Array) -> Array:  # (B, K, G t, D) -> (B, t, H, D)
        t = z.shape[2] // G
        return z.reshape(B, K, G, t, D).transpose(0, 3, 1, 2, 4).reshape(B, t, H, D)

    def by_head(P: Array) -> Array:  # (B, s, H t) -> (B, K, s, G t), the same memory
        return P.reshape(B, P.shape[1], K, P.shape[2] // K).transpose(0, 2, 1, 3)

    def products(keys: Array, queries: Array) -> Array:  # (.., s, D) @ (.., D, G t), laid out as (B, s, H t)
        P = xp.empty((B, keys.shape[2], K * queries.shape[2]), Q.dtype)
        xp.matmul(keys, queries.swapaxes(-1, -2), out=by_head(P))
        return P

    def scores(at: slice) -> Array:  # (B, s, H t)
        P, t = products(Kt[:, :, : S - T + at.stop], grouped(Q, at)), at.stop - at.start
        P[:, -t:].reshape(B, t, H, t)[...] += future[:t, None, :t]  # only the newest t keys can be too new
        return P

    O, kept = xp.empty_like(Q), []
    for at in blocks:
        P = scores(at)
        top = P.max(axis=1, keepdims=True)  # (B, 1, H t)
        P -= top
        xp.exp(P, out=P)
        inv = 1.0 / P.sum(axis=1).reshape(
            B, K, P.shape[2] // K, 1
        )  # for the t x D output: fewer divisions than s x t scores
        O[:, at] = by_time((by_head(P).swapaxes(-1, -2) @ Vt[:, :, : P.shape[1]]) * inv)  # (.., G t, s) @ (.., s, D)
        kept.append((at, top, inv, P if B * H * T * S <= KEPT_SCORES else None))

    def vjp(dy: Array) -> Grads:
        dQ, dK, dV = xp.empty_like(Q), xp.zeros((B, K, S, D), Q.dtype), xp.zeros((B, K, S, D), Q.dtype)
        for at, top, inv, P in kept:
            P = xp.exp(scores(at) - top) if P is None else P
            s, dO = P.shape[1], grouped(dy, at) * inv  # (B, K, G t, D), softmax's division included
            dV[:, :, :s] += by_head(P) @ dO  # (.., s, G t) @ (.., G t, D)
            # softmax's gradient p (dp - sum p dp): the sum is rowsum(dO * O), T numbers (Dao et al. 2022, app. B)
            dS = products(Vt[:, :, :s], dO)  # (B, s, H t)
            dS -= (dO * grouped(O, at)).sum(axis=-1).reshape(top.shape)
            dS *= P
            dQ[:, at] = by_time((by_head(dS).swapaxes(-1, -2) @ Kt[:, :, :s]) * scale)  # (.., G t, s) @ (.., s, D)
            dK[:, :, :s] += by_head(dS) @ grouped(Q, at)  # Q carries the scale: (.., s, G t) @ (.., G t, D)
        return dQ, dK.transpose(0, 2, 1, 3), dV.transpose(0, 2, 1, 3)

    return record(O, (q, k, v), vjp)
