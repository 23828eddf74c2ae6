"""The neural operations: each forward is beside its hand-written gradient.

Shapes: B batch, T time (queries), S keys, C channels, H heads, K key/value heads, G = H / K, D head
size, V vocabulary, I in, O out, r rank, N rows (all leading axes flattened). dfoo is the gradient
of foo. The tests compare every operation with its definition in elementary operations.

Contents, by rising complexity:
    linear maps    linear, lora_linear, embedding
    dropout        dropout
    activations    silu, swiglu, gelu
    norms          rms_norm, layer_norm
    softmax        softmax, log_softmax
    losses         cross_entropy, linear_cross_entropy (without all logits at once)
    attention      attention (from attention.py)
and helpers on arrays: rows (from arrays.py), prepare_targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .arguments import as_ids as as_ids
from .arguments import check_ids, check_probability, check_vector, python_number
from .arrays import as_floats, row_dot
from .arrays import rows as rows
from .attention import attention as attention
from .autograd import Grads as Grads  # other modules write F.Grads
from .autograd import (
    Tensor,
    axis_of,
    grad_enabled,
    namespace,
    operands,
    record,
    where,
)
from .backend import Array, Backend, Shape
from .errors import DataError
from .threads import blocks

IGNORE = -100  # a target that is not counted: PyTorch's ignore_index


# ---- linear maps ---------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b    x (..., I), W (O, I), b (O,) -> (..., O)"""
    inputs = operands(x, weight) if bias is None else operands(x, weight, bias)
    x, weight = inputs[:2]
    backend = x.backend
    X = rows(x.data)
    W = weight.data
    y = backend.matmul(X, W.T)  # (N, I) @ (I, O) -> (N, O)
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
            dx = backend.matmul(dY, W_kept).reshape(shape)  # (N, O) @ (O, I) -> (N, I)
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


def dropout(x: Tensor, p: float, key: int, first: int = 0) -> Tensor:
    """Zero each element with probability p, scale the others by 1 / (1 - p).    x (B, ...)

    The mask of sequence b is a function of (key, first + b): see `Backend.random_words`. So it does
    not depend on how a batch was cut, and backward makes it again instead of keeping it.
    ConfigError unless 0 <= p <= 1.
    """
    check_probability(p)
    if p == 0:
        return x
    if p == 1:
        return where(False, x, 0)  # nothing is left to scale
    backend = x.backend
    shape = x.shape
    dtype = x.dtype
    scale = 1 / (1 - float(p))
    count = shape[0] if shape else 1
    size = math.prod(shape[1:])
    threshold = np.uint32(min(round(p * 2**32), 2**32 - 1))

    def mask() -> Array:
        words = backend.random_words(key, first, count, (size + 1) // 2)
        bits = words.view(np.uint32)[:, :size]  # 32 random bits per element
        return (bits >= threshold).reshape(shape).astype(dtype) * scale

    return record(x.data * mask(), (x,), lambda dy: (dy * mask(),))


# ---- activations ---------------------------------------------------------------------------------


def _sigmoid(xp: Any, x: Array) -> Array:
    y = xp.negative(x, out=xp.empty_like(x))
    # exp(-x) may overflow to infinity: then sigmoid is 0, exactly what is wanted.
    with np.errstate(over="ignore"):
        xp.exp(y, out=y)
        y += 1
        return xp.divide(1, y, out=y)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)    any shape"""
    X = as_floats(x.data)
    s = _sigmoid(namespace(x), X)
    return record(X * s, (x,), lambda dy: (dy * (s * (1 + X * (1 - s))),))


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up    x = [gate, up] (2, ..., C) -> (..., C)    Shazeer 2020"""
    xp = namespace(x)
    X = as_floats(x.data)
    if X.shape[:1] != (2,):
        raise ValueError(f"swiglu: x is [gate, up], so its first axis must be 2, got {x.shape}")
    g, u = X
    s = _sigmoid(xp, g)
    y = g * s
    y *= u

    def vjp(dy: Array) -> Grads:
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
        return (dX,)

    return record(y, (x,), vjp)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or for approximate="tanh" its tanh form    any shape    Hendrycks & Gimpel 2016"""
    X = as_floats(x.data)
    xp = namespace(x)
    if approximate == "none":
        phi = 0.5 * (1.0 + x.backend.erf(X * math.sqrt(0.5)))  # the normal distribution function

        def vjp(dy: Array) -> Grads:
            with np.errstate(over="ignore"):  # exp(-inf) is 0, which is right
                density = xp.exp(-0.5 * X * X) * (1 / math.sqrt(2 * math.pi))
            return (dy * (phi + X * density),)

        return record(X * phi, (x,), vjp)
    if approximate != "tanh":
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    # (1 + tanh(z)) / 2 = sigmoid(2z), and exp is twice as fast as tanh. 2z = c (x + 0.044715 x^3)
    c = 2 * math.sqrt(2 / math.pi)
    with np.errstate(over="ignore"):  # as in `_sigmoid`
        s = _sigmoid(xp, X * (c + 0.044715 * c * (X * X)))

    def vjp_tanh(dy: Array) -> Grads:
        with np.errstate(over="ignore"):
            # Beyond 100, s (1 - s) is 0: an infinite slope would make that NaN.
            square = xp.minimum(X * X, 1e4)
        slope = c + 3 * 0.044715 * c * square  # of 2z
        return (dy * (s + X * s * (1 - s) * slope),)

    return record(X * s, (x,), vjp_tanh)


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
    rstd = 1.0 / xp.sqrt(row_dot(xp, X, X) / X.shape[1] + eps)  # (N, 1)
    y = X * rstd
    y *= w

    def back(dY: Array) -> Grads:
        xhat = X * rstd
        dw = (dY * xhat).sum(axis=0) if need_dw else None
        if not need_dx:
            return None, dw
        dx = dY * w  # d xhat, which the next lines turn into dx
        xhat *= row_dot(xp, dx, xhat) / X.shape[1]
        dx -= xhat
        dx *= rstd
        return dx, dw

    return y, back


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * w + b    x (..., C), w, b (C,)    Ba et al. 2016, eq. (4)"""
    x, weight, bias = operands(x, weight, bias)
    xp = namespace(x)
    X = x.data
    w = weight.data
    check_vector("layer_norm: weight", w, X.shape[-1])
    check_vector("layer_norm: bias", bias.data, X.shape[-1])
    eps = python_number(eps, "layer_norm: eps", "elementary operations")
    mean = X.mean(axis=-1, keepdims=True)
    centred = X - mean
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    rstd = 1.0 / xp.sqrt(variance + eps)  # (..., 1)
    need_dx = x.requires_grad
    need_dw = weight.requires_grad
    need_db = bias.requires_grad

    def vjp(dy: Array) -> Grads:
        xhat = (X - mean) * rstd
        dw = rows(dy * xhat).sum(axis=0) if need_dw else None
        db = rows(dy).sum(axis=0) if need_db else None
        if not need_dx:
            return None, dw, db
        dxhat = dy * w
        along = xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)
        along = dxhat.mean(axis=-1, keepdims=True) + along
        return rstd * (dxhat - along), dw, db

    return record(centred * rstd * w + bias.data, (x, weight, bias), vjp)


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


# ---- losses --------------------------------------------------------------------------------------


def prepare_targets(
    backend: Backend,
    shape: Shape,
    V: int,
    targets: Array,
    ignore_index: int,
    reduction: str,
) -> tuple[Array, Array, Array]:
    """(targets, 0 for ignored ones; which are ignored; the weight of each loss), all (N,)

    The weights are float64. DataError unless targets have `shape` and are in [0, V) or ignored.
    """
    targets = as_ids(targets, "targets")
    if targets.shape != shape:
        logits = (*shape, V)
        raise DataError(f"targets of shape {targets.shape} do not fit logits of shape {logits}")
    if isinstance(targets, np.ndarray):
        check_ids(targets[targets != ignore_index], V, "target")
        targets = backend.from_numpy(targets)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}")
    xp = backend.xp
    t = targets.reshape(-1)
    ignored = t == ignore_index
    weight = (~ignored).astype(np.float64)
    if reduction == "mean":
        weight = weight / xp.maximum(weight.sum(), 1)
    return xp.where(ignored, 0, t), ignored, weight


def cross_entropy(
    logits: Tensor, targets: Array, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """-log softmax(logits)[target]    logits (..., V), targets (...) integers -> scalar

    `reduction` is "mean" over the counted targets (0 if none is counted) or "sum". DataError for a
    target outside [0, V).
    """
    xp = namespace(logits)
    shape = logits.shape
    t, ignored, weight = prepare_targets(
        logits.backend, shape[:-1], shape[-1], targets, ignore_index, reduction
    )
    Z = rows(as_floats(logits.data))  # (N, V)
    weight = weight.astype(Z.dtype)  # (N,)
    top = Z.max(axis=-1, keepdims=True)
    each = xp.arange(len(t))
    with np.errstate(invalid="ignore"):  # an infinite logit makes its row NaN
        E = xp.exp(Z - top)  # (N, V)
        down = Z[each, t] - top[:, 0]  # (N,)
    # An ignored row is not read any further, whatever it contains. (An assignment through a mask
    # would wait for a GPU, which counts the mask.)
    xp.copyto(E, 1, where=ignored[:, None])
    total = E.sum(axis=-1, keepdims=True)  # (N, 1)
    # Not log + top - Z, which would round away a loss near 0.
    nll = xp.where(ignored, 0, xp.log(total)[:, 0] - down)
    E_kept = E if logits.requires_grad else None

    def vjp(dy: Array) -> Grads:
        # d nll / d logits = softmax - onehot(target), each row times its weight
        scale = (weight * dy)[:, None]  # (N, 1)
        dZ = E_kept * (scale / total)
        dZ[each, t] -= scale[:, 0]
        return (dZ.reshape(shape),)

    return record((nll * weight).sum(), (logits,), vjp)


def linear_cross_entropy(
    x: Tensor, head: Tensor, targets: Array, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """cross_entropy(x head^T, targets)    x (..., C), head (V, C), targets (...) integers -> scalar

    The logits of a block of words exist at a time, never all of them; their maximum and their sum
    of exponentials are corrected from block to block (Milakov & Gimelshein 2018, algorithm 3). So
    the forward computes the gradients too, up to the factor dy: with E = exp(logits - max) and
    p = E / sum E they are (p - onehot) head and (p - onehot)^T x.
    """
    x, head = operands(x, head)
    xp = namespace(x, head)
    V = len(head)
    shape = x.shape
    t, ignored, weight = prepare_targets(x.backend, shape[:-1], V, targets, ignore_index, reduction)
    weight = weight.astype(x.dtype)
    # An ignored row is not read any further, whatever it contains.
    X = xp.where(ignored[:, None], 0, rows(x.data))
    dX = xp.empty_like(X) if grad_enabled() and x.requires_grad else None
    dW = xp.zeros(head.shape, head.dtype) if grad_enabled() and head.requires_grad else None
    loss = xp.zeros((), X.dtype)

    def logits(W: Array, at: slice) -> Array:
        Z = W @ X[at].T  # (v, C) @ (C, n) -> (v, n): NumPy reduces over rows with whole vectors
        xp.copyto(Z, 0, where=ignored[at])  # unlike Z[:, mask] = 0 it does not wait for a GPU
        return Z

    sizes = x.backend.sizes
    for at in blocks(len(X), sizes.loss_rows):
        tn = t[at]  # (n,)
        w = weight[at]  # (n,)
        top = xp.full(w.shape, -np.inf, X.dtype)
        total = xp.zeros(w.shape, X.dtype)
        hit = xp.zeros(w.shape, X.dtype)  # the logit of the target
        words = blocks(V, sizes.loss_logits // len(w))
        for v in words:
            W = head.read_rows(v)
            E = logits(W, at)
            nearest = xp.clip(tn - v.start, 0, v.stop - v.start - 1)
            logit = xp.take_along_axis(E, nearest[None], axis=0)[0]
            hit = xp.where((tn >= v.start) & (tn < v.stop), logit, hit)
            before = top
            top = xp.maximum(top, E.max(axis=0))
            with np.errstate(invalid="ignore"):  # an infinite logit makes its row NaN
                E -= top
                xp.exp(E, out=E)
                shrink = xp.exp(before - top)
            total = total * shrink + E.sum(axis=0)
            if dX is not None:
                part = E.T @ W  # (n, v) @ (v, C)
                dX[at] = part if v.start == 0 else dX[at] * shrink[:, None] + part
        with np.errstate(invalid="ignore"):
            # Not log + top - hit, which would round away a loss near 0.
            nll = xp.log(total) - (hit - top)
        loss = loss + (xp.where(ignored[at], 0, nll) * w).sum()
        share = (w / total)[:, None]  # (n, 1)
        if dX is not None:
            with np.errstate(invalid="ignore"):
                dx = dX[at] * share - head.read_rows(tn) * w[:, None]
            dX[at] = xp.where(ignored[at, None], 0, dx)
        if dW is not None:
            for v in words:
                if len(words) > 1:
                    E = xp.exp(logits(head.read_rows(v), at) - top)
                dW[v] += E @ (X[at] * share)  # (v, n) @ (n, C)
    if dW is not None:
        dW -= x.backend.add_rows(t, X * weight[:, None], V)

    def vjp(dy: Array) -> Grads:
        dx = None if dX is None else (dX * dy).reshape(shape)
        return dx, None if dW is None else dW * dy

    return record(loss, (x, head), vjp)
