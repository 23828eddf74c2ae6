"""Kernels in the place of reference bodies: `OPERATIONS` has them by the name of the body.

Each takes what the body takes and returns what it returns, on arrays of CuPy; or None for a case
that its kernel does not have, which the body then computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import attention, optimizer
from .launching import Array, kernels_for

OPERATIONS: dict[str, Callable[..., Any]] = {
    "_rotate_and_attend": attention.rotate_and_attend,
    "_attend_newest": attention.attend_newest,
    "_clip": optimizer.clip,
    "_adamw": optimizer.adamw,
}


def replaces(body: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function in the place of the body of that name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS[body] = function
        return function

    return register


# ---- norms ---------------------------------------------------------------------------------------


@replaces("_rms_norm")
def rms_norm(
    backend: Any, X: Array, w: Array, eps: float, need_dx: bool, need_dw: bool
) -> tuple[Array, Callable[[Array], tuple[Array | None, Array | None]]] | None:
    kernels = kernels_for(backend.device, X.dtype)
    if kernels is None:
        return None
    xp = backend.xp
    N, C = X.shape
    X = xp.ascontiguousarray(X)
    y = xp.empty_like(X)
    rstd = xp.empty(N, X.dtype)
    kernels.for_rows("rms_norm", N, C, X, w, y, rstd, C, eps)

    def back(dY: Array) -> tuple[Array | None, Array | None]:
        dx = None
        dY = xp.ascontiguousarray(dY)
        dw = (dY * (X * rstd[:, None])).sum(axis=0) if need_dw else None
        if need_dx:
            dx = xp.empty_like(X)
            kernels.for_rows("rms_norm_back", N, C, X, w, rstd, dY, dx, C)
        return dx, dw

    return y, back


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
