"""The neural operations: each forward stands beside its hand-written gradient, on one screen.

Shapes: B batch, T time (queries), S keys, C channels, H heads, K key/value heads, G = H / K, D head size, V vocabulary,
I in, O out, r rank, N rows (all leading axes flattened). dfoo is the gradient of foo. Every operation has a definition
in elementary operations, which the tests hold beside it. Ordered by rising complexity.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .autograd import Tensor, namespace, record
from .backend import Array, Backend
from .errors import DataError

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


def within(ids: np.ndarray, count: int, what: str) -> None:
    """DataError, naming one, unless all ids are in [0, count). Only on the host: a GPU takes a wrong row silently."""
    if ids.size and not (ids.min() >= 0 and ids.max() < count):
        raise DataError(
            f"{what} {ids.min() if ids.min() < 0 else ids.max()} is outside [0, {count})"
        )


def embedding(ids: Array, weight: Tensor) -> Tensor:
    """weight[ids]    ids (...) integers in [0, V), weight (V, C) -> (..., C). Rows taken twice get both gradients."""
    count, backend = len(weight), weight.backend
    if isinstance(ids, np.ndarray):
        within(ids, count, "id")
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


def counted(
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
        within(targets[targets != ignore_index], V, "target")
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
    t, ignored, weight = counted(
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
