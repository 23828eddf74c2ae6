"""Losses of outputs against targets, beside their hand-written gradients.

Shapes: C channels, V vocabulary, N rows (all leading axes flattened), n rows of a block, v words of
a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arguments import as_ids, check_ids
from .arrays import as_floats, rows
from .autograd import Grads, Tensor, grad_enabled, operands, record
from .backend import Array, Backend, Shape
from .errors import DataError
from .precision import FLOAT32
from .threads import blocks

IGNORE = -100  # a target that is not counted: PyTorch's ignore_index


# ---- of numbers ----------------------------------------------------------------------------------


def mse_loss(x: Tensor, targets: Array | Tensor, reduction: str = "mean") -> Tensor:
    """The mean of (x - targets)^2, or the sum    x and targets of one shape -> scalar

    ValueError for shapes that differ: broadcast, (N, 1) and (N,) would give N^2 differences.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"mse_loss: reduction must be 'mean' or 'sum', got {reduction!r}")
    x, targets = operands(x, targets)
    if x.shape != targets.shape:
        raise ValueError(
            f"mse_loss: x and targets must have the same shape, got {x.shape} and "
            f"{targets.shape}: reshape one of them"
        )
    if not x.size and reduction == "mean":
        raise ValueError(f"mse_loss: the mean of no values: shape {x.shape}")
    difference = as_floats(x.data - targets.data)
    count = x.size if reduction == "mean" else 1
    need_dx, need_dt = x.requires_grad, targets.requires_grad

    def vjp(dy: Array) -> Grads:
        dx = difference * (dy * (2 / count))
        return dx if need_dx else None, -dx if need_dt else None

    return record((difference * difference).sum() / count, (x, targets), vjp)


# ---- targets -------------------------------------------------------------------------------------


def prepare_targets(
    backend: Backend,
    shape: Shape,
    V: int,
    targets: Array,
    ignore_index: int,
    reduction: str,
) -> Array:
    """The targets on the device, (N,).

    DataError unless targets have `shape` and are in [0, V) or ignored.
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
    return targets.reshape(-1)


def _weigh_targets(
    xp: Any, targets: Array, ignore_index: int, reduction: str, dtype: Any
) -> tuple[Array, Array, Array]:
    """(targets, 0 for ignored ones; which are ignored; the weight of each loss), all (N,)"""
    ignored = targets == ignore_index
    weight = (~ignored).astype(np.float64)
    if reduction == "mean":
        weight = weight / xp.maximum(weight.sum(), 1)
    return xp.where(ignored, 0, targets), ignored, weight.astype(dtype)


# ---- of given logits -----------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor, targets: Array, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """-log softmax(logits)[target]    logits (..., V), targets (...) integers -> scalar

    `reduction` is "mean" over the counted targets (0 if none is counted) or "sum". DataError for a
    target outside [0, V).
    """
    backend = logits.backend
    shape = logits.shape
    t = prepare_targets(backend, shape[:-1], shape[-1], targets, ignore_index, reduction)
    Z = rows(as_floats(logits.data))
    needed = logits.requires_grad
    loss, back = backend.run(_cross_entropy, Z, t, ignore_index, reduction, needed)
    return record(loss, (logits,), lambda dy: (back(dy).reshape(shape),))


def _cross_entropy(
    backend: Backend, Z: Array, t: Array, ignore_index: int, reduction: str, need_dz: bool
) -> tuple[Array, Callable[[Array], Array]]:
    """(the loss (), the function from dy to dz (N, V))    Z (N, V), t (N,)"""
    xp = backend.xp
    t, ignored, weight = _weigh_targets(xp, t, ignore_index, reduction, Z.dtype)
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
    E_kept = E if need_dz else None

    def back(dy: Array) -> Array:
        # d nll / d logits = softmax - onehot(target), each row times its weight
        scale = (weight * dy)[:, None]  # (N, 1)
        dZ = E_kept * (scale / total)
        dZ[each, t] -= scale[:, 0]
        return dZ

    return (nll * weight).sum(), back


# ---- of the logits of a head ---------------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor,
    head: Tensor,
    targets: Array,
    ignore_index: int = IGNORE,
    reduction: str = "mean",
    compute: str = FLOAT32,
) -> Tensor:
    """cross_entropy(x head^T, targets)    x (..., C), head (V, C), targets (...) integers -> scalar

    The logits of a block exist at a time, never all of them. So the forward computes the gradients
    too, up to the factor dy. `compute` is the arithmetic of the logits and of dx, as in `linear`.
    """
    x, head = operands(x, head)
    backend = x.backend
    shape = x.shape
    t = prepare_targets(backend, shape[:-1], len(head), targets, ignore_index, reduction)
    need_dx = grad_enabled() and x.requires_grad
    need_dw = grad_enabled() and head.requires_grad
    X = rows(x.data)
    loss, dX, dW = backend.run(
        _linear_cross_entropy, X, head, t, ignore_index, reduction, need_dx, need_dw, compute
    )

    def vjp(dy: Array) -> Grads:
        dx = None if dX is None else (dX * dy).reshape(shape)
        return dx, None if dW is None else dW * dy

    return record(loss, (x, head), vjp)


def _linear_cross_entropy(
    backend: Backend,
    X: Array,
    head: Tensor,
    t: Array,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    compute: str = FLOAT32,
) -> tuple[Array, Array | None, Array | None]:
    """(the loss (), dX (N, C), dW (V, C)) for dy = 1    X (N, C), head (V, C), t (N,)

    A block has some rows and some words. The maximum of a row's logits and their sum of
    exponentials are corrected from block to block (Milakov & Gimelshein 2018, algorithm 3). With
    E = exp(logits - max) and p = E / sum E the gradients are (p - onehot) head and
    (p - onehot)^T X. The rows of a head that is stored in other numbers are decoded as they are
    read.
    """
    if compute != FLOAT32:
        options = ignore_index, reduction, need_dx, need_dw, compute
        return _rounded_linear_cross_entropy(backend, X, head, t, *options)
    xp = backend.xp
    V = len(head)
    t, ignored, weight = _weigh_targets(xp, t, ignore_index, reduction, X.dtype)
    # An ignored row is not read any further, whatever it contains.
    X = xp.where(ignored[:, None], 0, X)
    dX = xp.empty_like(X) if need_dx else None
    dW = xp.zeros(head.shape, head.dtype) if need_dw else None
    loss = xp.zeros((), X.dtype)

    def logits(W: Array, at: slice) -> Array:
        Z = W @ X[at].T  # (v, C) @ (C, n) -> (v, n): NumPy reduces over rows with whole vectors
        xp.copyto(Z, 0, where=ignored[at])  # unlike Z[:, mask] = 0 it does not wait for a GPU
        return Z

    sizes = backend.sizes
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
        dW -= backend.add_rows(t, X * weight[:, None], V)
    return loss, dX, dW


def _rounded_linear_cross_entropy(
    backend: Backend,
    X: Array,
    head: Tensor,
    t: Array,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    compute: str,
) -> tuple[Array, Array | None, Array | None]:
    """The same by an arithmetic that rounds, which would round exp(logits - max) in its blocks.

    So a block has all words, and the gradient of its logits is rounded where it is multiplied.
    """
    xp = backend.xp
    W = head.read_rows(slice(None), compute)
    ignored = t == ignore_index
    X = xp.where(ignored[:, None], 0, X)
    counted = 1 if reduction == "sum" else xp.maximum((~ignored).sum(), 1)
    share = xp.asarray(1 / counted, X.dtype)  # of one target in the loss
    dX = xp.empty_like(X) if need_dx else None
    dW = xp.zeros(head.shape, head.dtype) if need_dw else None
    loss = xp.zeros((), X.dtype)
    for at in blocks(len(X), backend.sizes.loss_logits // len(W)):
        Z = backend.matmul(X[at], W.T, compute=compute)  # (n, C) @ (C, V)
        options = ignore_index, "sum", need_dx or need_dw
        part, back = backend.run(_cross_entropy, Z, t[at], *options)
        loss = loss + part * share
        if need_dx or need_dw:
            dZ = back(share)
        if dX is not None:
            dX[at] = backend.matmul(dZ, W, compute=compute)  # (n, V) @ (V, C)
        if dW is not None:
            backend.add_matmul(dW, dZ.T, X[at])  # (V, n) @ (n, C)
    return loss, dX, dW
