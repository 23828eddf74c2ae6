"""Helpers on arrays that several operations need. N rows, C numbers in each."""

from __future__ import annotations

import math

import numpy as np

from .backend import Array


def rows(x: Array) -> Array:
    """(..., C) -> (N, C): one large product is faster than a loop of small ones."""
    # N is computed, because -1 has no meaning beside a 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def as_floats(x: Array) -> Array:
    """x, or integers and booleans as float64: small integers would overflow in a difference."""
    return x.astype(np.float64) if x.dtype.kind in "iub" else x
