"""The arithmetic of products with frozen weights: operands rounded, sums in float32.

    float32     s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm     nothing is rounded
    tf32        s eeeeeeee mmmmmmmmmm
    bfloat16    s eeeeeeee mmmmmmm

The product of two numbers with so few bits of mantissa is a float32 without rounding, and a GPU's
tensor cores multiply them several times as fast as float32. What trains is not rounded: an update
smaller than half of the last bit would be lost. `Backend.matmul` computes by these rules.

check_compute                       whether an arithmetic can be used
round_operand                       the rounding, to nearest, ties to even
narrow_bfloat16, widen_bfloat16     from float32 to bfloat16's bits, and back
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import ConfigError, Rule, check_fields

Array = Any  # numpy.ndarray or cupy.ndarray
FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
MANTISSA = {FLOAT32: 23, "tf32": 10, BFLOAT16: 7}  # stored bits, by the name of the arithmetic
_RULE = Rule(
    "compute",
    lambda name: isinstance(name, str) and name in MANTISSA,
    f"one of {', '.join(MANTISSA)}",
)


def check_compute(compute: Any, dtype: Any) -> None:
    """ConfigError unless `compute` names an arithmetic that numbers of `dtype` can have."""
    check_fields({"compute": compute}, [_RULE])
    if compute != FLOAT32 and dtype != np.float32:
        raise ConfigError(
            f"compute={compute!r} with {np.dtype(dtype)}: it rounds float32 only; "
            f"use compute={FLOAT32!r}, or a model in float32"
        )


def is_bfloat16(x: Array) -> bool:
    """Whether an operand is bfloat16's bits (uint16)."""
    return bool(x.dtype == np.uint16)


def round_operand(backend: Any, x: Array, compute: str) -> Array:
    """x (float32, or bfloat16's bits) as float32 with the mantissas of `compute`.

    Rounding is to nearest, ties to even; beyond the largest number it gives inf. ConfigError for
    another dtype.
    """
    if is_bfloat16(x):
        return backend.run(widen_bfloat16, x, np.dtype(np.float32))
    check_compute(compute, x.dtype)
    dropped = MANTISSA[FLOAT32] - MANTISSA[compute]
    bits = x.view(np.uint32)
    is_odd = (bits >> np.uint32(dropped)) & np.uint32(1)  # the last bit that stays
    below_half = np.uint32((1 << (dropped - 1)) - 1)
    mask = np.uint32((1 << 32) - (1 << dropped))
    rounded = ((bits + (is_odd + below_half)) & mask).view(np.float32)
    xp = backend.xp
    # The sum may have carried the bits of a NaN into those of a number.
    return xp.where(xp.isnan(x), np.float32(np.nan), rounded)


def narrow_bfloat16(backend: Any, x: Array) -> Array:
    """float32 rounded to bfloat16's bits (uint16), any shape."""
    bits = round_operand(backend, x, BFLOAT16).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16)


def widen_bfloat16(backend: Any, bits: Array, dtype: Any) -> Array:
    """bfloat16's bits as floats, on any device; formats.dtypes does it for files."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32).astype(dtype, copy=False)
