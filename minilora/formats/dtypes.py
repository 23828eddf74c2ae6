"""Numbers as files store them: dtypes by name, exact widening, and rounding once.

bfloat16 is the upper half of a float32. NumPy lacks it, so its bits travel as uint16.

    widen, bf16_to_float32    stored numbers -> NumPy's floats, exact
    round_to, bf16_from       floats -> stored numbers: rounded once, to nearest, ties to even
    row_blocks                the rows to convert at a time
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, NonFiniteError
from ..threads import blocks

Array = NDArray[Any]

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}  # config.json's name: the format's
FLOATS = ("F64", "F32", "F16", "BF16")  # the format's names
CODES = {"float64": "F64", **DTYPES}  # of everything that NumPy or a base computes in
NUMPY_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}

# The largest number of each.
LARGEST = {"F32": 2.0**128 - 2.0**104, "F16": 65504.0, "BF16": 2.0**128 - 2.0**120}

# Numbers per block: in float64 they stay in the cache from the product to the rounding.
BLOCK = 1 << 16


def empty_as(shape: Sequence[int], dtype: str) -> Array:
    """An uninitialised array for numbers of the format's `dtype`: uint16 for bfloat16."""
    return np.empty(shape, round_to(np.zeros(0), dtype).dtype)


def row_blocks(shape: Sequence[int]) -> list[slice]:
    """The rows of an array as slices of about BLOCK numbers each."""
    return blocks(shape[0], BLOCK // max(1, math.prod(shape[1:])))


def widen(bits: Array) -> Array:
    """The array itself, or float32 with the same values for bfloat16 bits (uint16)."""
    return bf16_to_float32(bits) if bits.dtype == np.uint16 else bits


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 with the values of bfloat16 bits (uint16), exact for all 65,536 patterns."""
    wide = np.asarray(bits).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def round_to(exact: Array, dtype: str) -> Array:
    """The format's `dtype` (one of FLOATS) for float16, float32 or float64, rounded once.

    Rounding is to nearest with ties to even, never through a third format. What lies beyond the
    dtype's range becomes inf. bfloat16 comes as its bits (uint16).
    """
    if dtype == "BF16":
        return bf16_from(exact)
    with np.errstate(over="ignore"):
        if dtype == "F16" and exact.dtype != np.float16:
            exact = _round_small(exact)
        return exact.astype(NUMPY_FLOATS[dtype], copy=False)


def _round_small(array: Array) -> Array:
    """The array with all |x| < 2⁻¹⁴ rounded to multiples of 2⁻²⁴, as float16 has them there.

    NumPy raises a flag for each number that it rounds to a subnormal, 40 times the time of the
    rounding; after this none is rounded again. The sum x + c has the steps wanted in its last bit.
    """
    small = np.abs(array) < 2.0**-14
    if not small.any():
        return array
    x = array[small]
    c = array.dtype.type(1.5 * 2.0**-24 / np.finfo(array.dtype).eps)
    rounded = array.copy()
    rounded[small] = np.copysign((x + c) - c, x)
    return rounded


def too_large(tensor: str, where: str, dtype: str) -> NonFiniteError:
    """The error for a finite number of a tensor that `dtype` (F32, F16 or BF16) would make inf."""
    names = {code: name for name, code in DTYPES.items()}
    wider = " or ".join(name for name, code in DTYPES.items() if LARGEST[code] > LARGEST[dtype])
    return NonFiniteError(
        f"{where}: {tensor} has a number beyond {LARGEST[dtype]:.6g}, the largest of "
        f"{names[dtype]}: choose {wider or 'float64'}, or scale the tensor down"
    )


def bf16_from(array: Array) -> NDArray[np.uint16]:
    """bfloat16 bits (uint16, same shape) for float64, float32 or float16, rounded once.

    Rounding is to nearest with ties to even. Rounding float64 to float32 first goes wrong only
    where that gives a tie: halfway between two bfloat16, from a number that was not. There, one
    step back towards that number leaves the second rounding nothing to decide.
    FormatError for any other dtype.
    """
    array = np.asarray(array)
    if array.dtype.kind != "f" or array.itemsize > 8:
        raise FormatError(
            f"bfloat16 is rounded from float64, float32 or float16, not from {array.dtype}"
        )
    # What lies beyond float32's range lies beyond bfloat16's: inf. A NaN may signal.
    with np.errstate(all="ignore"):
        single = np.atleast_1d(array).astype(np.float32)
    bits = single.view(np.uint32)
    if array.itemsize == 8:
        tie = (bits & np.uint32(0xFFFF)) == np.uint32(0x8000)
        if tie.any():
            rounded = np.abs(single[tie].astype(np.float64))
            exact = np.abs(np.atleast_1d(array)[tie])
            bits[tie] += (exact > rounded).astype(np.uint32)
            bits[tie] -= (exact < rounded).astype(np.uint32)
    nan = np.isnan(single)
    upper = bits >> np.uint32(16)
    bits += np.uint32(0x7FFF)
    bits += upper & np.uint32(1)
    bits >>= np.uint32(16)
    # The quiet bit: a NaN whose payload is cut must not become inf.
    if nan.any():
        bits[nan] = upper[nan] | np.uint32(0x40)
    return bits.astype(np.uint16).reshape(array.shape)
