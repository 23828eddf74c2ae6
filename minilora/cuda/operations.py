"""Kernels in the place of reference bodies: `OPERATIONS` has them by the name of the body.

Each takes what the body takes and returns what it returns, on arrays of CuPy; or None for a case
that its kernel does not have, which the body then computes. Shapes are in kernels.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import attention, optimizer
from .launching import Array, Kernels, kernels_for

OPERATIONS: dict[str, Callable[..., Any]] = {
    "_rotate_and_attend": attention.rotate_and_attend,
    "_attend_newest": attention.attend_newest,
    "_clip": optimizer.clip,
    "_adamw": optimizer.adamw,
}

Pull = Callable[[Array], Array]  # from the gradient of an output to that of an input


def replaces(body: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function in the place of the body of that name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS[body] = function
        return function

    return register


def kernels_of(backend: Any, *arrays: Array) -> Kernels | None:
    """The kernels for the dtype that all the arrays have, or None if they have several."""
    dtypes = {array.dtype for array in arrays}
    return kernels_for_dtype(backend, *dtypes) if len(dtypes) == 1 else None


def kernels_for_dtype(backend: Any, dtype: Any) -> Kernels | None:
    backend.select()  # a kernel is loaded on the current device
    return kernels_for(backend.device, dtype)


# ---- norms ---------------------------------------------------------------------------------------


@replaces("_rms_norm")
def rms_norm(
    backend: Any, X: Array, w: Array, eps: float, need_dx: bool, need_dw: bool
) -> tuple[Array, Callable[[Array], tuple[Array | None, Array | None]]] | None:
    kernels = kernels_of(backend, X, w)
    if kernels is None:
        return None
    xp = backend.xp
    N, C = X.shape
    X = xp.ascontiguousarray(X)
    w = xp.ascontiguousarray(w)
    y = xp.empty_like(X)
    rstd = xp.empty(N, X.dtype)
    kernels.for_rows("rms_norm", N, C, X, w, y, rstd, C, float(eps))

    def back(dY: Array) -> tuple[Array | None, Array | None]:
        dX = dw = None
        dY = xp.ascontiguousarray(dY, X.dtype)
        if need_dw:
            dw = xp.empty(C, X.dtype)
            kernels.for_columns("norm_weights_back", C, X, None, rstd, dY, dw, None, N, C)
        if need_dx:
            dX = xp.empty_like(X)
            kernels.for_rows("rms_norm_back", N, C, X, w, rstd, dY, dX, C)
        return dX, dw

    return y, back


@replaces("_layer_norm")
def layer_norm(
    backend: Any,
    X: Array,
    w: Array,
    b: Array,
    eps: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Array, Callable[[Array], tuple[Array | None, Array | None, Array | None]]] | None:
    kernels = kernels_of(backend, X, w, b)
    if kernels is None:
        return None
    xp = backend.xp
    C = X.shape[-1]
    N = math.prod(X.shape[:-1])
    shape = X.shape
    X = xp.ascontiguousarray(X)
    w = xp.ascontiguousarray(w)
    b = xp.ascontiguousarray(b)
    y = xp.empty(shape, X.dtype)
    mean = xp.empty(N, X.dtype)
    rstd = xp.empty(N, X.dtype)
    kernels.for_rows("layer_norm", N, C, X, w, b, y, mean, rstd, C, float(eps))

    def back(dY: Array) -> tuple[Array | None, Array | None, Array | None]:
        dX = dw = db = None
        dY = xp.ascontiguousarray(dY, X.dtype)
        if need_dw:
            dw = xp.empty(C, X.dtype)
        if need_db:
            db = xp.empty(C, X.dtype)
        if need_dw or need_db:
            kernels.for_columns("norm_weights_back", C, X, mean, rstd, dY, dw, db, N, C)
        if need_dx:
            dX = xp.empty(shape, X.dtype)
            kernels.for_rows("layer_norm_back", N, C, X, w, mean, rstd, dY, dX, C)
        return dX, dw, db

    return y, back


# ---- activations and dropout ---------------------------------------------------------------------


def _elementwise(backend: Any, name: str, X: Array, shape: Any) -> tuple[Array, Pull] | None:
    """The kernels `name`(x, y) and `name`_back(x, dy, dx) for y of this shape."""
    kernels = kernels_of(backend, X)
    if kernels is None:
        return None
    xp = backend.xp
    shape_of_x = X.shape
    count = math.prod(shape)
    X = xp.ascontiguousarray(X)
    y = xp.empty(shape, X.dtype)
    kernels.for_each(name, count, X, y, count)

    def back(dY: Array) -> Array:
        dX = xp.empty(shape_of_x, X.dtype)
        dY = xp.ascontiguousarray(dY, X.dtype)
        kernels.for_each(f"{name}_back", count, X, dY, dX, count)
        return dX

    return y, back


@replaces("_silu")
def silu(backend: Any, X: Array) -> tuple[Array, Pull] | None:
    return _elementwise(backend, "silu", X, X.shape)


@replaces("_swiglu")
def swiglu(backend: Any, X: Array) -> tuple[Array, Pull] | None:
    return _elementwise(backend, "swiglu", X, X.shape[1:])


@replaces("_gelu")
def gelu(backend: Any, X: Array) -> tuple[Array, Pull] | None:
    return _elementwise(backend, "gelu", X, X.shape)


@replaces("_gelu_tanh")
def gelu_tanh(backend: Any, X: Array) -> tuple[Array, Pull] | None:
    return _elementwise(backend, "gelu_tanh", X, X.shape)


@replaces("_dropout")
def dropout(
    backend: Any, X: Array, p: float, key: int, first: int, step: Array | None, start: int
) -> tuple[Array, Pull] | None:
    kernels = kernels_of(backend, X)
    if kernels is None or start % 2:  # a word has the bits of two elements
        return None
    xp = backend.xp
    shape = X.shape
    rows = shape[0] if shape else 1
    C = math.prod(shape[1:])
    words = np.uint64(int(key) % 2**64), step, np.uint64(int(first) % 2**64)
    threshold = np.uint32(min(round(p * 2**32), 2**32 - 1))

    def dropped(x: Array) -> Array:
        y = xp.empty(shape, X_dtype)
        x = xp.ascontiguousarray(x, X_dtype)
        size = rows, C, start // 2, threshold, 1 / (1 - p)
        kernels.for_each("dropout", rows * ((C + 1) // 2), x, y, *words, *size)
        return y

    X_dtype = X.dtype
    return dropped(X), dropped


# ---- losses --------------------------------------------------------------------------------------


class _Loss:
    """The loss of logits, some rows at a time."""

    def __init__(
        self, backend: Any, kernels: Kernels, targets: Array, ignored: int, reduction: str
    ):
        xp = backend.xp
        self.xp = xp
        self.kernels = kernels
        self.ignored = int(ignored)
        self.targets = xp.ascontiguousarray(targets, np.int64)
        self.each = xp.empty(len(targets), kernels.real)  # the loss of each row
        self.weight = None
        if reduction == "mean":
            self.weight = xp.empty((), kernels.real)
            kernels.for_all(
                "mean_weight", self.targets, self.ignored, self.weight, len(self.targets)
            )

    def add(self, rows: slice, Z: Array, dZ: Array | None) -> None:
        """Compute the losses of these rows, and their gradient dZ, from their logits Z (n, V)."""
        V = Z.shape[1]
        arrays = Z, self.targets[rows], self.ignored, self.weight, self.each[rows], dZ
        self.kernels.for_rows("cross_entropy", len(Z), V, *arrays, V)

    def sum(self) -> Array:
        total = self.xp.empty((), self.kernels.real)
        self.kernels.for_all("add_up", self.each, total, len(self.each))
        return total


@replaces("_cross_entropy")
def cross_entropy(
    backend: Any, Z: Array, t: Array, ignore_index: int, reduction: str, need_dz: bool
) -> tuple[Array, Pull] | None:
    kernels = kernels_of(backend, Z)
    if kernels is None or not Z.shape[1]:
        return None
    xp = backend.xp
    Z = xp.ascontiguousarray(Z)
    dZ = xp.empty_like(Z) if need_dz else None
    loss = _Loss(backend, kernels, t, ignore_index, reduction)
    loss.add(slice(None), Z, dZ)
    return loss.sum(), lambda dy: dZ * dy


@replaces("_linear_cross_entropy")
def linear_cross_entropy(
    backend: Any,
    X: Array,
    head: Any,
    t: Array,
    ignore_index: int,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    compute: str = "float32",
) -> tuple[Array, Array | None, Array | None] | None:
    """Blocks of rows with all words: the logits of a block become their gradient in place."""
    kernels = kernels_of(backend, X, head)
    if kernels is None or not len(head):
        return None
    xp = backend.xp
    W = head.read_rows(slice(None), compute)  # (V, C), decoded if it is stored as codes
    N = len(X)
    dX = xp.empty(X.shape, X.dtype) if need_dx else None
    dW = xp.zeros(head.shape, head.dtype) if need_dw else None
    if need_dw:  # the gradient of an ignored row's logits is 0, and 0 times NaN is not
        X = xp.where((t == ignore_index)[:, None], 0, X)
    loss = _Loss(backend, kernels, t, ignore_index, reduction)
    rows = max(1, min(backend.sizes.loss_rows, backend.sizes.loss_logits // len(W)))
    for start in range(0, N, rows):
        at = slice(start, start + rows)
        Z = backend.matmul(X[at], W.T, compute=compute)  # (n, C) @ (C, V)
        loss.add(at, Z, Z if need_dx or need_dw else None)
        if dX is not None:
            backend.matmul(Z, W, out=dX[at], compute=compute)  # (n, V) @ (V, C)
        if dW is not None:
            backend.add_matmul(dW, Z.T, X[at])  # (V, n) @ (n, C)
    return loss.sum(), dX, dW


# ---- DoRA ----------------------------------------------------------------------------------------


@replaces("_row_scales")
def row_scales(backend: Any, m: Array, norms: Array) -> tuple[Array, Pull] | None:
    kernels = kernels_of(backend, m, norms)
    if kernels is None:
        return None
    xp = backend.xp
    m = xp.ascontiguousarray(m)
    norms = xp.ascontiguousarray(norms)
    k = xp.empty_like(m)
    kernels.for_each("row_scales", m.size, m, norms, k, m.size)

    def back(dk: Array) -> Array:
        dm = xp.empty_like(norms)
        dk = xp.ascontiguousarray(dk, norms.dtype)
        kernels.for_each("row_scales_back", dm.size, norms, dk, dm, dm.size)
        return dm

    return k, back


@replaces("_row_norms")
def row_norms(backend: Any, V: Array) -> Array | None:
    scaled = scale_rows(backend, V, None, None, 0.0)
    return None if scaled is None else scaled[0]


@replaces("_scale_rows")
def scale_rows(
    backend: Any, V: Array, m: Array | None, out: Array | None, least: float
) -> tuple[Array, Array | None] | None:
    kernels = kernels_of(backend, *(a for a in (V, m, out) if a is not None))
    if kernels is None or (out is not None and not out.flags.c_contiguous):
        return None
    xp = backend.xp
    n, I = V.shape
    norms = xp.empty(n, V.dtype)
    k = None
    if m is not None:
        k = xp.empty(n, V.dtype)
        m = xp.ascontiguousarray(m)
    arrays = xp.ascontiguousarray(V), m, least, norms, k, out
    kernels.for_rows("scale_rows", n, I, *arrays, I)
    return norms, k


@replaces("_magnitude_gradient")
def magnitude_gradient(backend: Any, dY: Array, Y: Array, k: Array, norms: Array) -> Array | None:
    kernels = kernels_of(backend, dY, Y, k, norms)
    if kernels is None:
        return None
    xp = backend.xp
    N, O = Y.shape
    dY, Y = (_with_whole_rows(xp, array) for array in (dY, Y))
    k, norms = (xp.ascontiguousarray(array) for array in (k, norms))
    dY_stride, Y_stride = (array.strides[0] // array.itemsize for array in (dY, Y))
    dm = xp.empty(O, Y.dtype)
    kernels.for_columns("magnitudes_back", O, dY, dY_stride, Y, Y_stride, k, norms, dm, N, O)
    return dm


def _with_whole_rows(xp: Any, array: Array) -> Array:
    """A matrix whose rows are contiguous: the array if it is that, or a slice of columns of one."""
    return array if array.strides[1] == array.itemsize else xp.ascontiguousarray(array)


# ---- weights in fewer bits -----------------------------------------------------------------------


@replaces("_decode")
def decode(backend: Any, quantized: Any, dtype: Any) -> Array | None:
    kernels = kernels_for_dtype(backend, dtype)
    sizes = [quantized.block_size]
    absmax = quantized.absmax
    codes_of_absmax: tuple[Array | None, Array | None] = None, None
    if quantized.double_quant:
        sizes.append(absmax.block_size)
        codes_of_absmax = absmax.codes, absmax.values
        absmax = absmax.absmax
    if kernels is None or any(size & (size - 1) for size in sizes):
        return None
    shift, absmax_shift = (size.bit_length() - 1 for size in (*sizes, 1)[:2])
    values = quantized.values
    per_byte = values.shape[1]
    out = backend.xp.empty(quantized.size, dtype)
    scales = absmax, *codes_of_absmax, absmax_shift, np.float32(quantized.offset)
    arrays = quantized.codes, values, per_byte, shift, *scales, out
    kernels.for_each("decode", quantized.codes.size, *arrays, out.size)
    return out


@replaces("narrow_bfloat16")
def narrow_bfloat16(backend: Any, x: Array) -> Array | None:
    kernels = kernels_of(backend, x)
    if kernels is None or x.dtype != np.float32:
        return None
    xp = backend.xp
    out = xp.empty(x.shape, np.uint16)
    kernels.for_each("narrow_bfloat16", x.size, xp.ascontiguousarray(x), out, x.size)
    return out


@replaces("widen_bfloat16")
def widen_bfloat16(backend: Any, bits: Array, dtype: Any) -> Array | None:
    kernels = kernels_for_dtype(backend, dtype)
    if kernels is None:
        return None
    xp = backend.xp
    out = xp.empty(bits.shape, dtype)
    kernels.for_each("widen_bfloat16", bits.size, xp.ascontiguousarray(bits), out, bits.size)
    return out


# ---- generation ----------------------------------------------------------------------------------


@replaces("_pick_largest")
def pick_largest(backend: Any, Z: Array) -> Array | None:
    kernels = kernels_for(backend.device, Z.dtype)
    if kernels is None:
        return None
    N, V = Z.shape
    ids = backend.xp.empty(N, np.int64)
    kernels.for_rows("pick_largest", N, V, backend.xp.ascontiguousarray(Z), ids, V)
    return ids
