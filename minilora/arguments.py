"""What operations ask of their arguments: numbers, ids, vectors and dtypes that keep a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .backend import Array
from .errors import ConfigError, DataError, GraphError, is_number
from .protocols import TensorBase

REAL = "biuf"  # the kinds of dtype that can be beside a gradient: booleans, integers, floats


def clip_bound(value: Any) -> Any:
    """A bound of clip as Python's number, because NumPy's would widen float32; or None."""
    if value is None:
        return None
    if np.ndim(value):
        raise ValueError(
            f"clip: low and high must be numbers or None, got shape {np.shape(value)}: "
            "maximum() and minimum() take arrays"
        )
    return python_number(value, "clip: low and high", "maximum() and minimum()")


def python_number(value: Any, name: str, cure: str) -> Any:
    """The only value of an option as Python's number.

    GraphError for a tensor that requires a gradient, which an option has not; `cure` has one.
    """
    if isinstance(value, TensorBase) and value.is_tracked:
        raise GraphError(
            f"{name} must be a number, which has no gradient, got a tensor that requires one: "
            f"use {cure}, or float(tensor) for its value"
        )
    if hasattr(value, "item"):  # NumPy's scalars, arrays of any device, tensors
        return value.item()
    return value if isinstance(value, (int, float)) else float(value)


def check_kinds(tensors: Sequence[TensorBase]) -> None:
    """TypeError for operands that are not numbers, or complex beside a real one with a gradient.

    The imaginary part of its gradient would be lost.
    """
    allowed = REAL if any(t.requires_grad for t in tensors) else f"{REAL}c"
    for t in tensors:
        if t.dtype.kind not in allowed:
            raise TypeError(
                "operations take booleans, integers and floats, and complex numbers where nothing "
                f"requires a gradient, got {t.dtype}: convert it first, or compute with .numpy()"
            )


def as_ids(ids: Any, what: str) -> Array:
    """ids as an array of integers. DataError for anything else."""
    if isinstance(ids, TensorBase):
        ids = ids.data
    elif isinstance(ids, (int, list, tuple, np.integer)):
        ids = np.asarray(ids, None if np.size(ids) else np.int64)  # [] would be floats
    if getattr(ids, "dtype", np.dtype("O")).kind not in "iu":
        raise DataError(f"{what} must be integers, got {getattr(ids, 'dtype', type(ids).__name__)}")
    return ids


def check_vector(name: str, vector: Array, size: int) -> None:
    """ValueError unless `vector` is (size,): the gradient would have another shape than it."""
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape {(size,)}, got {vector.shape}")


def check_ids(ids: np.ndarray, count: int, what: str) -> None:
    """DataError, naming one, unless all ids are in [0, count).

    Only ids on the host are checked: a GPU silently takes a wrong row.
    """
    if not ids.size:
        return
    low = ids.min()
    high = ids.max()
    if not (low >= 0 and high < count):
        raise DataError(f"{what} {low if low < 0 else high} is outside [0, {count})")


def check_probability(p: Any) -> None:
    """ConfigError unless p is a probability of dropout."""
    if not (is_number(least=0)(p) and p <= 1):
        raise ConfigError(f"dropout: p must be a number in [0, 1], got {p!r:.100}")
