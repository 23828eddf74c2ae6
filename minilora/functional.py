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
    attention      apply_rotary, attention
and helpers on arrays: rows, row_dot, as_floats, as_ids, check_ids, prepare_targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .arguments import as_ids, check_ids, check_probability, check_vector, python_number
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


def rows(x: Array) -> Array:
    """(..., C) -> (N, C): one large product is faster than a loop of small ones."""
    # N is computed, because -1 has no meaning beside a 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def row_dot(xp: Any, a: Array, b: Array) -> Array:
    """sum_c a[n, c] b[n, c]    both (N, C) -> (N, 1), as N products of a row and a column."""
    return xp.matmul(a[:, None, :], b[:, :, None])[:, 0]


def as_floats(x: Array) -> Array:
    """x, or integers and booleans as float64: small integers would overflow in a difference."""
    return x.astype(np.float64) if x.dtype.kind in "iub" else x


# ---- linear maps ---------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b    x (..., I), W (O, I), b (O,) -> (..., O)"""
    inputs = operands(x, weight) if bias is None else operands(x, weight, bias)
    x, weight = inputs[:2]
    X = rows(x.data)
    W = weight.data
    y = X @ W.T  # (N, I) @ (I, O) -> (N, O)
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
        dx = None if W_kept is None else (dY @ W_kept).reshape(shape)  # (N, O) @ (O, I) -> (N, I)
        dW = None if X_kept is None else dY.T @ X_kept  # (O, N) @ (N, I) -> (O, I)
        db = dY.sum(axis=0) if need_db else None
        return (dx, dW, db)[:count]

    return record(y.reshape(*shape[:-1], len(W)), inputs, vjp)


def lora_linear(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s (x A^T) B^T    x (..., I), y (..., O), A (r, I), B (O, r) -> (..., O)

    Hu et al. 2021, eq. (3). It never forms dW = s B A. With G = dL/dy the gradients are
    dA = s B^T G^T X and dB = s G^T X A^T, the projections of the full gradient.
    """
    x, y, A, B = operands(x, y, A, B)
    X = rows(as_floats(x.data))
    a = A.data
    b = B.data
    shape = x.shape
    scaling = python_number(scaling, "lora_linear: scaling", "y + (x @ A.T @ B.T) * scaling")
    if y.shape != (*shape[:-1], len(b)):
        raise ValueError(
            f"lora_linear: y must have the shape of x B A, {(*shape[:-1], len(b))}, got {y.shape}"
        )
    U = X @ a.T  # (N, I) @ (I, r) -> (N, r)
    out = (U @ b.T).reshape(y.shape)  # (N, r) @ (r, O) -> (N, O)
    out *= scaling
    out += y.data
    need_dx = x.requires_grad
    X_kept = X if A.requires_grad else None
    U_kept = U if B.requires_grad else None

    def vjp(dy: Array) -> Grads:
        dx = dA = dB = None
        dY = rows(dy)  # (N, O)
        if need_dx or X_kept is not None:
            dU = dY @ b * scaling  # (N, O) @ (O, r) -> (N, r)
            if need_dx:
                dx = (dU @ a).reshape(shape)  # (N, r) @ (r, I) -> (N, I)
            if X_kept is not None:
                dA = dU.T @ X_kept  # (r, N) @ (N, I) -> (r, I)
        if U_kept is not None:
            dB = dY.T @ U_kept * scaling  # (O, N) @ (N, r) -> (O, r)
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
    xp = namespace(x)
    X = rows(as_floats(x.data))
    w = weight.data
    shape = x.shape
    check_vector("rms_norm: weight", w, X.shape[1])
    eps = python_number(eps, "rms_norm: eps", "elementary operations")
    rstd = 1.0 / xp.sqrt(row_dot(xp, X, X) / X.shape[1] + eps)  # (N, 1)
    y = X * rstd
    y *= w
    need_dx = x.requires_grad
    need_dw = weight.requires_grad

    def vjp(dy: Array) -> Grads:
        dY = rows(dy)
        xhat = X * rstd
        dw = (dY * xhat).sum(axis=0) if need_dw else None
        if not need_dx:
            return None, dw
        dx = dY * w  # d xhat, which the next lines turn into dx
        xhat *= row_dot(xp, dx, xhat) / X.shape[1]
        dx -= xhat
        dx *= rstd
        return dx.reshape(shape), dw

    return record(y.reshape(shape), (x, weight), vjp)


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


# ---- attention -----------------------------------------------------------------------------------


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
    kept = z.reshape(B, T, h * D) * cos
    (xp.subtract if back else xp.add)(kept, whole, out=whole)
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
) -> Tensor:
    """Causal self-attention, softmax(q k^T) v.    qkv (B, T, (H + 2 K) D) -> (B, T, H D)

    qkv       q of H heads, k and v of K heads, side by side. Query head h reads key/value head
              h // G (grouped queries: Ainslie et al. 2023; K = H is the ordinary case)
    cos, sin  (T, (H + K) D) or (B, T, (H + K) D) rotate q and k, see `apply_rotary`; the columns of
              q include the scale 1/sqrt(D) of the scores. Without them nothing is rotated
    extend    extend(k, v), each (B, T, K, D), may return (B, S, K, D) with earlier positions in
              front: the T queries are the last of S. Use it without gradients only
    window    a query sees only the newest `window` keys (Beltagy et al. 2020, section 3.1)
    first_key (B, T) integers: a query sees no key before this one of the S. Not above the query's
              own key, or its output is NaN. None: all earlier keys
    """
    xp = namespace(qkv)
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
    QK = Z[:, :, :rotated].copy() if cos is None else apply_rotary(xp, Z[:, :, :rotated], cos, sin)
    q = QK[:, :, :heads]
    k = QK[:, :, heads:]
    v = Z[:, :, rotated:].copy()  # qkv itself is not kept
    if cos is None:
        q *= D**-0.5
    if extend:
        k, v = extend(k, v)
    O, back = _attend(qkv.backend, q, k, v, window, first_key)

    def vjp(dy: Array) -> Grads:
        dZ = xp.empty((B, T, count, D), dy.dtype)
        dQK = dZ[:, :, :rotated] if cos is None else xp.empty_like(QK)
        back(dy.reshape(B, T, heads, D), dQK[:, :, :heads], dQK[:, :, heads:], dZ[:, :, rotated:])
        if cos is None or sin is None:
            dQK[:, :, :heads] *= D**-0.5
        else:
            apply_rotary(xp, dQK, cos, sin, dZ[:, :, :rotated], back=True)
        return (dZ.reshape(B, T, width),)

    return record(O.reshape(B, T, heads * D), (qkv,), vjp)


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
        xp.matmul(keys, queries.swapaxes(-1, -2), out=view)
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
        xp.matmul(view.swapaxes(-1, -2), vh[..., keys, :], out=Oh[..., at, :])  # (t, s) @ (s, D)
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
        along = row_dot(xp, rows(d), rows(O)).reshape(B, T, H).swapaxes(1, 2)

        def add(total: Array, a: Array, b: Array) -> None:
            # Add a @ b, summed over G, to the rows `keys`. The block that sees every key writes.
            if a.shape[3] < S:
                total[..., keys, :] += a @ b if G == 1 else (a @ b).sum(axis=2, keepdims=True)
            elif G == 1:
                xp.matmul(a, b, out=total)
            else:
                total[...] = (a @ b).sum(axis=2, keepdims=True)

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
            xp.matmul(
                dview.swapaxes(-1, -2), kh[..., keys, :], out=dqh[..., at, :]
            )  # (t, s) @ (s, D)
            add(dkh, dview, qh[..., at, :])  # (s, t) @ (t, D)

    return O, back
