"""Numbers as files store them: which dtypes there are, exact widening, and rounding once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..threads import blocks

Array = NDArray[Any]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by the names of config.json


CODES = {"float64": "F64", **DTYPES}
FLOATS = ("F64", "F32", "F16", "BF16")


BLOCK = (
    1 << 16
)  # numbers at a time: in float64 they stay in the cache from the product to the rounding


def widen(bits: Array) -> Array:
    """Stored numbers as NumPy can compute with them: bfloat16, which comes as uint16, exactly in float32."""
    return bf16_to_float32(bits) if bits.dtype == np.uint16 else bits


def round_to(exact: Array, dtype: str) -> Array:
    """float64 -> the format's `dtype`, to nearest, ties to even, once: not by way of another format."""
    if dtype == "BF16":
        return bf16_from(exact)
    with np.errstate(over="ignore"):
        return exact.astype(
            {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype], copy=False
        )


def empty_as(shape: Sequence[int], dtype: str) -> Array:
    """An uninitialised array for numbers of the format's `dtype`: uint16 for bfloat16."""
    return np.empty(shape, round_to(np.zeros(0), dtype).dtype)


def row_blocks(shape: Sequence[int]) -> list[slice]:
    """The rows of an array, as slices of about BLOCK numbers."""
    return blocks(shape[0], BLOCK // max(1, math.prod(shape[1:])))


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bits uint16 -> float32 of the same shape, exact for all 65,536 patterns."""
    wide = np.asarray(bits).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def bf16_from(array: Array) -> NDArray[np.uint16]:
    """float64, float32 or float16 -> bfloat16 bits (uint16, same shape), rounded once, to nearest with ties to even.

    Rounding float64 first to float32 goes wrong only where that lands on a tie: halfway between two bfloat16, from a
    number that was not. There one step back, towards that number, leaves the second rounding nothing to decide.
    """
    array = np.asarray(array)
    if array.dtype.kind != "f" or array.itemsize > 8:
        raise FormatError(
            f"bfloat16 is rounded from float64, float32 or float16, not from {array.dtype}"
        )
    with np.errstate(
        all="ignore"
    ):  # beyond float32's range is inf, and so it is beyond bfloat16's; NaN may signal
        single = np.atleast_1d(array).astype(np.float32)
    bits = single.view(np.uint32)
    if array.itemsize == 8:
        tie = (bits & np.uint32(0xFFFF)) == np.uint32(0x8000)
        if tie.any():
            wide, exact = np.abs(single[tie].astype(np.float64)), np.abs(np.atleast_1d(array)[tie])
            bits[tie] += (exact > wide).astype(np.uint32) - (exact < wide).astype(np.uint32)
    nan = np.isnan(single)
    upper = bits >> np.uint32(16)
    bits += np.uint32(0x7FFF)
    bits += upper & np.uint32(1)
    bits >>= np.uint32(16)
    if nan.any():  # the quiet bit: a NaN whose payload is cut must not become inf
        bits[nan] = upper[nan] | np.uint32(0x40)
    return bits.astype(np.uint16).reshape(array.shape)
