"""The neural operations: each forward is beside its hand-written gradient.

Shapes: B batch, T time (queries), S keys, C channels, H heads, K key/value heads, G = H / K, D head
size, V vocabulary, I in, O out, r rank, N rows (all leading axes flattened). dfoo is the gradient
of foo. The tests compare every operation with its definition in elementary operations.

Contents, by rising complexity:
    linear maps    linear, lora_linear, embedding
    dropout        dropout
    activations    relu, silu, swiglu, gelu
    norms          rms_norm, layer_norm
    softmax        softmax, log_softmax
    losses         mse_loss, cross_entropy, linear_cross_entropy (from losses.py)
    attention      attention (from attention.py)
and a helper on arrays: rows (from arrays.py).

An operation with a kernel of its own on a GPU leaves the arithmetic to a body on arrays, which
`Backend.run` calls or replaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .arguments import as_ids as as_ids
from .arguments import check_ids, check_probability, check_vector, python_number
from .arrays import as_floats
from .arrays import rows as rows
from .attention import attention as attention
from .autograd import Grads as Grads  # other modules write F.Grads
from .autograd import (
    Tensor,
    axis_of,
    namespace,
    operands,
    record,
    where,
)
from .backend import Array, Backend, Shape
from .losses import IGNORE as IGNORE
from .losses import cross_entropy as cross_entropy
from .losses import linear_cross_entropy as linear_cross_entropy
from .losses import mse_loss as mse_loss
from .precision import FLOAT32

# ---- linear maps ---------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, compute: str = FLOAT32) -> Tensor:
    """y = x W^T + b    x (..., I), W (O, I), b (O,) -> (..., O)

    compute   the arithmetic of x W^T and of dx = dy W; dW = dy^T x is not rounded. See precision.py
    """
    inputs = operands(x, weight) if bias is None else operands(x, weight, bias)
    x, weight = inputs[:2]
    backend = x.backend
    X = rows(x.data)
    W = weight.data
    if X.shape[1:] != W.shape[1:]:
        raise ValueError(
            f"linear: x must have {W.shape[-1]} numbers in its last axis, as weight has columns, "
            f"got shape {x.shape}"
        )
    y = backend.matmul(X, W.T, compute=compute)  # (N, I) @ (I, O) -> (N, O)
    if bias is not None:
        check_vector("linear: bias", inputs[2].data, len(W))
        y += inputs[2].data
    shape = x.shape
    W_kept = W if x.requires_grad else None
    X_kept = X if weight.requires_grad else None  # a frozen W needs no X: only dW reads it
    need_db = bias is not None and bias.requires_grad
    count = len(inputs)

    def vjp(dy: Array) -> Grads:
        dY = rows(dy)  # (N, O)
        dx = dW = None
        if W_kept is not None:
            dX = backend.matmul(dY, W_kept, compute=compute)  # (N, O) @ (O, I) -> (N, I)
            dx = dX.reshape(shape)
        if X_kept is not None:
            dW = backend.matmul(dY.T, X_kept)  # (O, N) @ (N, I) -> (O, I)
        db = dY.sum(axis=0) if need_db else None
        return (dx, dW, db)[:count]

    return record(y.reshape(*shape[:-1], len(W)), inputs, vjp)


def lora_linear(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s (x A^T) B^T    x (..., I), y (..., O), A (r, I), B (O, r) -> (..., O)

    Hu et al. 2021, eq. (3). It never forms dW = s B A. With G = dL/dy the gradients are
    dA = s B^T G^T X and dB = s G^T X A^T, the projections of the full gradient.
    """
    x, y, A, B = operands(x, y, A, B)
    backend = x.backend
    X = rows(as_floats(x.data))
    a = A.data
    b = B.data
    shape = x.shape
    scaling = python_number(scaling, "lora_linear: scaling", "y + (x @ A.T @ B.T) * scaling")
    if y.shape != (*shape[:-1], len(b)):
        raise ValueError(
            f"lora_linear: y must have the shape of x B A, {(*shape[:-1], len(b))}, got {y.shape}"
        )
    U = backend.matmul(X, a.T)  # (N, I) @ (I, r) -> (N, r)
    out = backend.matmul(U, b.T, scale=scaling).reshape(y.shape)  # (N, r) @ (r, O) -> (N, O)
    out += y.data
    need_dx = x.requires_grad
    X_kept = X if A.requires_grad else None
    U_kept = U if B.requires_grad else None

    def vjp(dy: Array) -> Grads:
        dx = dA = dB = None
        dY = rows(dy)  # (N, O)
        if need_dx or X_kept is not None:
            dU = backend.matmul(dY, b, scale=scaling)  # (N, O) @ (O, r) -> (N, r)
            if need_dx:
                dx = backend.matmul(dU, a).reshape(shape)  # (N, r) @ (r, I) -> (N, I)
            if X_kept is not None:
                dA = backend.matmul(dU.T, X_kept)  # (r, N) @ (N, I) -> (r, I)
        if U_kept is not None:
            dB = backend.matmul(dY.T, U_kept, scale=scaling)  # (O, N) @ (N, r) -> (O, r)
        return dx, dy, dA, dB

    return record(out, (x, y, A, B), vjp)


def embedding(ids: Array, weight: Tensor) -> Tensor:
    """weight[ids]    ids (...) integers in [0, V), weight (V, C) -> (..., C)

    Gradients of a row that is taken twice add up. DataError for an id outside [0, V).
    """
    count = len(weight)
    backend = weight.backend
    ids = as_ids(ids, "ids")
    if isinstance(ids, np.ndarray):
        check_ids(ids, count, "id")
        ids = backend.from_numpy(ids)
    flat = ids.reshape(-1)
    y = weight.read_rows(flat).reshape(*ids.shape, weight.shape[1])
    return record(y, (weight,), lambda dy: (backend.add_rows(flat, rows(dy), count),))


# ---- dropout -------------------------------------------------------------------------------------


def dropout(
    x: Tensor, p: float, key: int, first: int = 0, step: Array | None = None, start: int = 0
) -> Tensor:
    """Zero each element with probability p, scale the others by 1 / (1 - p).    x (B, ...)

    The mask of sequence b is a function of (key, step, first + b): see `Backend.random_words`. So
    it does not depend on how a batch was cut, and backward makes it again instead of keeping it;
    until then `step` must not change. ConfigError unless 0 <= p <= 1.

    start   how many elements of each sequence come before those of x, and have the mask before
    """
    check_probability(p)
    if p == 0:
        return x
    if p == 1:
        return where(False, x, 0)  # nothing is left to scale
    y, back = x.backend.run(_dropout, x.data, float(p), key, first, step, start)
    return record(y, (x,), lambda dy: (back(dy),))


def _dropout(
    backend: Backend, X: Array, p: float, key: int, first: int, step: Array | None, start: int
) -> tuple[Array, Callable[[Array], Array]]:
    """(y, the function from dy to dx)    X (B, ...)"""
    shape = X.shape
    dtype = X.dtype
    scale = 1 / (1 - p)
    count = shape[0] if shape else 1
    size = math.prod(shape[1:])
    threshold = np.uint32(min(round(p * 2**32), 2**32 - 1))

    def mask() -> Array:
        # 32 random bits per element: two elements share a word.
        skipped, odd = divmod(start, 2)
        words = backend.random_words(key, first, count, (odd + size + 1) // 2, step, skipped)
        bits = words.view(np.uint32)[:, odd : odd + size]
        return (bits >= threshold).reshape(shape).astype(dtype) * scale

    return X * mask(), lambda dy: dy * mask()


# ---- activations ---------------------------------------------------------------------------------


def relu(x: Tensor) -> Tensor:
    """max(x, 0), with gradient 0 at 0    any shape    Nair & Hinton 2010"""
    (x,) = operands(x)
    xp = namespace(x)
    y = xp.maximum(x.data, 0)
    # Where y is not above 0 it is 0, or NaN, and so is the gradient.
    return record(y, (x,), lambda dy: (xp.where(y > 0, dy, y),))


def _sigmoid(xp: Any, x: Array) -> Array:
    y = xp.negative(x, out=xp.empty_like(x))
    # exp(-x) may overflow to infinity: then sigmoid is 0, exactly what is wanted.
    with np.errstate(over="ignore"):
        xp.exp(y, out=y)
        y += 1
        return xp.divide(1, y, out=y)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)    any shape"""
    y, back = x.backend.run(_silu, as_floats(x.data))
    return record(y, (x,), lambda dy: (back(dy),))


def _silu(backend: Backend, X: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(y, the function from dy to dx)"""
    s = _sigmoid(backend.xp, X)
    return X * s, lambda dy: dy * (s * (1 + X * (1 - s)))


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up    x = [gate, up] (2, ..., C) -> (..., C)    Shazeer 2020"""
    X = as_floats(x.data)
    if X.shape[:1] != (2,):
        raise ValueError(f"swiglu: x is [gate, up], so its first axis must be 2, got {x.shape}")
    y, back = x.backend.run(_swiglu, X)
    return record(y, (x,), lambda dy: (back(dy),))


def _swiglu(backend: Backend, X: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(y (..., C), the function from dy to dx)    X (2, ..., C)"""
    xp = backend.xp
    g, u = X
    s = _sigmoid(xp, g)
    y = g * s
    y *= u

    def back(dy: Array) -> Array:
        dX = xp.empty_like(X)
        dgate = dX[0, ...]  # a view even for x (2,), where dX[0] is a number
        dup = dX[1, ...]
        xp.multiply(g, s, out=dup)
        xp.subtract(1, s, out=dgate)  # d silu = s + g s (1 - s)
        dgate *= dup
        dgate += s
        dgate *= u
        dgate *= dy
        dup *= dy
        return dX

    return y, back


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or for approximate="tanh" its tanh form    any shape    Hendrycks & Gimpel 2016"""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    body = _gelu if approximate == "none" else _gelu_tanh
    y, back = x.backend.run(body, as_floats(x.data))
    return record(y, (x,), lambda dy: (back(dy),))


def _gelu(backend: Backend, X: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(y, the function from dy to dx)"""
    xp = backend.xp
    phi = 0.5 * (1.0 + backend.erf(X * math.sqrt(0.5)))  # the normal distribution function

    def back(dy: Array) -> Array:
        with np.errstate(over="ignore"):  # exp(-inf) is 0, which is right
            density = xp.exp(-0.5 * X * X) * (1 / math.sqrt(2 * math.pi))
        return dy * (phi + X * density)

    return X * phi, back


def _gelu_tanh(backend: Backend, X: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(y, the function from dy to dx)

    (1 + tanh(z)) / 2 = sigmoid(2z), and exp is twice as fast as tanh. 2z = c (x + 0.044715 x^3)
    """
    xp = backend.xp
    c = 2 * math.sqrt(2 / math.pi)
    with np.errstate(over="ignore"):  # as in `_sigmoid`
        s = _sigmoid(xp, X * (c + 0.044715 * c * (X * X)))

    def back(dy: Array) -> Array:
        with np.errstate(over="ignore"):
            # Beyond 100, s (1 - s) is 0: an infinite slope would make that NaN.
            square = xp.minimum(X * X, 1e4)
        slope = c + 3 * 0.044715 * c * square  # of 2z
        return dy * (s + X * s * (1 - s) * slope)

    return X * s, back


# ---- norms: rstd (..., 1) is kept, the normalised x is computed again ----------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w    x (..., C), w (C,)    Zhang & Sennrich 2019, eq. (4)"""
    x, weight = operands(x, weight)
    X = rows(as_floats(x.data))
    w = weight.data
    shape = x.shape
    check_vector("rms_norm: weight", w, X.shape[1])
    eps = python_number(eps, "rms_norm: eps", "elementary operations")
    y, back = x.backend.run(_rms_norm, X, w, eps, x.requires_grad, weight.requires_grad)

    def vjp(dy: Array) -> Grads:
        dx, dw = back(rows(dy))
        return None if dx is None else dx.reshape(shape), dw

    return record(y.reshape(shape), (x, weight), vjp)


def _rms_norm(
    backend: Backend, X: Array, w: Array, eps: float, need_dx: bool, need_dw: bool
) -> tuple[Array, Callable[[Array], Grads]]:
    """(y, the function from dY to (dx, dw)) of rows.    X (N, C), w (C,) -> y (N, C)"""
    xp = backend.xp
    rstd = 1.0 / xp.sqrt(backend.row_dot(X, X) / X.shape[1] + eps)  # (N, 1)
    y = X * rstd
    y *= w

    def back(dY: Array) -> Grads:
        xhat = X * rstd
        dw = (dY * xhat).sum(axis=0) if need_dw else None
        if not need_dx:
            return None, dw
        dx = dY * w  # d xhat, which the next lines turn into dx
        xhat *= backend.row_dot(dx, xhat) / X.shape[1]
        dx -= xhat
        dx *= rstd
        return dx, dw

    return y, back


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * w + b    x (..., C), w, b (C,)    Ba et al. 2016, eq. (4)"""
    x, weight, bias = operands(x, weight, bias)
    X = x.data
    w = weight.data
    check_vector("layer_norm: weight", w, X.shape[-1])
    check_vector("layer_norm: bias", bias.data, X.shape[-1])
    eps = python_number(eps, "layer_norm: eps", "elementary operations")
    needed = x.requires_grad, weight.requires_grad, bias.requires_grad
    y, back = x.backend.run(_layer_norm, X, w, bias.data, eps, *needed)

    def vjp(dy: Array) -> Grads:
        return back(dy)  # type: ignore[no-any-return]

    return record(y, (x, weight, bias), vjp)


def _layer_norm(
    backend: Backend,
    X: Array,
    w: Array,
    b: Array,
    eps: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Array, Callable[[Array], Grads]]:
    """(y, the function from dy to (dx, dw, db))    X (..., C), w and b (C,)"""
    mean = X.mean(axis=-1, keepdims=True)
    centred = X - mean
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    rstd = 1.0 / backend.xp.sqrt(variance + eps)  # (..., 1)

    def back(dy: Array) -> Grads:
        xhat = (X - mean) * rstd
        dw = rows(dy * xhat).sum(axis=0) if need_dw else None
        db = rows(dy).sum(axis=0) if need_db else None
        if not need_dx:
            return None, dw, db
        dxhat = dy * w
        along = xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)
        along = dxhat.mean(axis=-1, keepdims=True) + along
        return rstd * (dxhat - along), dw, db

    return centred * rstd * w + b, back


# ---- softmax -------------------------------------------------------------------------------------


def _below_zero(x: Tensor, axis: int | Shape | None) -> Array:
    """x - max x along `axis`, as an array; empty where x is, for no values have no maximum."""
    X = as_floats(x.data)
    top = X.max(axis=axis, keepdims=True) if X.size else X.sum(axis=axis, keepdims=True)
    return X - top


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) / sum exp(x) along `axis`    any shape"""
    along = axis_of(x, axis)
    y = namespace(x).exp(_below_zero(x, along))
    y /= y.sum(axis=along, keepdims=True)
    return record(y, (x,), lambda dy: (y * (dy - (dy * y).sum(axis=along, keepdims=True)),))


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """x - log sum exp(x) along `axis`    any shape"""
    xp = namespace(x)
    along = axis_of(x, axis)
    y = _below_zero(x, along)
    if y.size:
        y -= xp.log(xp.exp(y).sum(axis=along, keepdims=True))
    return record(y, (x,), lambda dy: (dy - xp.exp(y) * dy.sum(axis=along, keepdims=True),))
