"""The properties of a weight in four or eight bits: what a code may cost, and what it ignores.

    w        the weights
    ŵ        what their codes decode to
    absmax   a block's largest magnitude
    u        2⁻²⁴: all of it is done in float32

The adapters over such a base are measured by their own properties, in which W is ŵ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..backend import Array
from ..quant.codes import ABSMAX_BLOCK, LEVELS, Quantized, encode
from .case import Case
from .measuring import (
    Measured,
    Property,
    count_differences,
    count_nonzeros,
    expect_zero,
    has_codes,
    make_registrar,
    worst,
)

PROPERTIES: list[Property] = []
holds = make_registrar(PROPERTIES, has_codes)
U = 2.0**-24
SMALLEST = 2.0**-126  # the smallest normal float32: a block without one becomes zeros
LEAST = 2.0**-149  # the smallest subnormal float32
BITS = {"nf4": 4, "fp4": 4, "int8": 8}
PAPER = "Dettmers et al. 2023"


def half_gap(levels: Array) -> float:
    """Half the widest gap between neighbouring levels."""
    rising = np.sort(levels.astype(np.float64))
    return float(np.diff(rising).max()) / 2


# How far a value can be from its nearest level, in units of absmax: NF4's is 0.1519, between -1 and
# -0.696.
HALF_GAP = {kind: half_gap(levels) for kind, levels in LEVELS.items()}


def weight_and_codes(case: Case) -> tuple[Array, Quantized]:
    """(w, its codes as the case's base has them)    w (O, I)"""
    assert case.w is not None
    return case.w, case.base.weight.quantized


def encode_like(q: Quantized, w: Array, double_quant: bool = False) -> Quantized:
    """The codes of w, of the kind and in the blocks of q."""
    return encode(w, q.kind, q.block_size, double_quant)


def split_blocks(values: Array, block_size: int) -> Iterator[Array]:
    """The blocks one by one, in float64; the last may be short."""
    flat = values.reshape(-1).astype(np.float64)
    return iter(np.split(flat, range(block_size, flat.size, block_size)))


def unpack_codes(q: Quantized) -> Array:
    """The codes one by one (size,): of two in a byte the upper half comes first."""
    if q.kind in ("int8", "dynamic"):
        return q.codes
    pairs = np.stack([q.codes >> 4, q.codes & 15], axis=1)
    return pairs.reshape(-1)[: q.size]


def repeat_absmax(q: Quantized, absmax: Array) -> Array:
    """The absmax of each weight's block (size,)."""
    return np.repeat(absmax, q.block_size)[: q.size]


# ---- what a code costs ---------------------------------------------------------------------------


@holds("half a gap", "|w - ŵ| ≤ (½ widest gap + 4 u) absmax", f"{PAPER}, section 2 and eq. (4)")
def measure_code_error(case: Case) -> Measured:
    """u each for 1 / absmax, w (1 / absmax), the midpoint between two levels, and level x absmax.

    Three more where 1 / absmax is subnormal, one more where w is rounded to float32 first. A block
    without a normal number is zeros.
    """
    w, q = weight_and_codes(case)
    decoded = encode_like(q, w).decode()
    w_blocks = split_blocks(w, q.block_size)
    decoded_blocks = split_blocks(decoded, q.block_size)
    pairs = []
    for block, decoded_block in zip(w_blocks, decoded_blocks, strict=True):
        absmax = float(abs(block.astype(np.float32)).max())
        bound = abs(block).max()
        if absmax >= SMALLEST:
            n = 4 + 3 * (absmax > 2.0**126) + (w.dtype == np.float64)
            bound = absmax * (HALF_GAP[q.kind] + n * U)
        pairs.append((abs(block - decoded_block).max(), bound))
    return worst(*pairs)


@holds(
    "absmax stays",
    "|w| = absmax  ⇒  ŵ = w;  absmax < 2⁻¹²⁶  ⇒  ŵ = 0",
    f"{PAPER}, section 3: -1, 0 and 1 are levels",
)
def measure_absmax(case: Case) -> Measured:
    """Exact: 1 / absmax rounds so that the product is next to 1, whose level it finds."""
    w, q = weight_and_codes(case)
    encoded = encode_like(q, w)
    w_blocks = split_blocks(w.astype(np.float32), q.block_size)
    decoded_blocks = split_blocks(encoded.decode(), q.block_size)
    wrong = 0
    for block, decoded, absmax in zip(w_blocks, decoded_blocks, encoded.absmax, strict=True):
        top = abs(block).max()
        if top < SMALLEST:
            wrong += int(absmax != 0)
            wrong += count_nonzeros(decoded)
            continue
        largest = abs(block) == top
        wrong += int(absmax != top)
        wrong += count_nonzeros(decoded[largest] != block[largest])
    return expect_zero(wrong)


@holds(
    "encoding twice",
    "the codes of ŵ are those of w",
    f"{PAPER}, section 2: a level is its own nearest",
)
def measure_second_encoding(case: Case) -> Measured:
    """Exact, but FP4 has two codes for zero: there what they decode to is compared."""
    w, q = weight_and_codes(case)
    once = encode_like(q, w)
    again = encode_like(q, once.decode())
    wrong = count_nonzeros(again.absmax != once.absmax)
    wrong += count_nonzeros(again.decode() != once.decode())
    if q.kind != "fp4":
        wrong += count_differences(again.codes, once.codes)
    return expect_zero(wrong)


@holds("codes ignore scale", "w → 2ᵏ w  ⇒  the same codes, 2ᵏ absmax", f"{PAPER}, section 2")
def measure_scale(case: Case) -> Measured:
    """Exact within float32's range: numbers that are tiny beside the largest become zero."""
    w, q = weight_and_codes(case)
    flat = normalize(w)
    plain = encode_like(q, flat)
    k = float(case.rng.integers(1, 21))
    wrong = 0
    for c in (np.float32(2.0**k), np.float32(2.0**-k)):
        scaled = encode_like(q, flat * c)
        wrong += count_differences(plain.codes, scaled.codes)
        wrong += count_differences(plain.absmax * c, scaled.absmax)
    return expect_zero(wrong)


@holds(
    "codes ignore neighbours",
    "blocks, and weights within them, in another order  ⇒  so are codes",
    f"{PAPER}, section 2: block by block",
)
def measure_neighbours(case: Case) -> Measured:
    """Exact. The last block stays where it is, for it may be short."""
    w, q = weight_and_codes(case)
    rng = case.rng
    size = q.block_size
    flat = normalize(w)
    last = (flat.size - 1) // size
    blocks = [*rng.permutation(last), last]
    indices = []
    for block in blocks:
        start = size * block
        indices.append(start + rng.permutation(min(size, flat.size - start)))
    order = np.concatenate(indices)
    plain = encode_like(q, flat)
    moved = encode_like(q, flat[order])
    wrong = count_differences(unpack_codes(plain)[order], unpack_codes(moved))
    wrong += count_differences(plain.absmax[blocks], moved.absmax)
    return expect_zero(wrong)


def normalize(w: Array) -> Array:
    """w in float32, flat: its largest magnitude in [0.5, 1), the others zero or at least 2⁻⁶⁰."""
    flat = w.reshape(-1).astype(np.float64)
    _, exponent = math.frexp(float(abs(flat).max()))
    flat = np.ldexp(flat, -exponent)
    flat[abs(flat) < 2.0**-60] = 0
    return flat.astype(np.float32)


# ---- absmax in eight bits, and bytes -------------------------------------------------------------


@holds(
    "double quantisation",
    "|ŵ' - ŵ| ≤ |absmax' - absmax| ≤ ½ gap max |absmax - offset|",
    f"{PAPER}, section 3; Dettmers 2016, the 8-bit map",
)
def measure_double_quantisation(case: Case) -> Measured:
    """For each 256: u for absmax - offset and for the sum with it again, four as for any code.

    ŵ' and ŵ are products of one level, rounded once each; the offset is a mean, rounded once. And
    the codes are the same.
    """
    w, q = weight_and_codes(case)
    single = encode_like(q, w)
    double = encode_like(q, w, double_quant=True)
    a = single.absmax.astype(np.float64)
    b = double.decode_absmax().astype(np.float64)
    pairs: list[tuple[Any, Any]] = [(count_differences(single.codes, double.codes), 0)]
    pairs.append((double.offset - a.mean(), U * a.mean() + LEAST))
    a_blocks = split_blocks(a, ABSMAX_BLOCK)
    b_blocks = split_blocks(b, ABSMAX_BLOCK)
    for group, decoded in zip(a_blocks, b_blocks, strict=True):
        far = abs(group - double.offset).max()
        rounding = (4 * far + 2 * (group.max() + double.offset)) * U
        code_error = max(HALF_GAP["dynamic"] * far, min(far, SMALLEST))
        pairs.append((abs(group - decoded).max(), code_error + rounding))
    largest = repeat_absmax(q, np.maximum(a, abs(b)))
    moved = repeat_absmax(q, abs(a - b))
    error = single.decode().astype(np.float64) - double.decode()
    pairs.append((error.reshape(-1), moved + 2 * U * largest + LEAST))
    return worst(*pairs)


@holds(
    "codes in bytes",
    "two to a byte and apart again, odd lengths too;  ŵ = level x absmax",
    "bitsandbytes 0.50, its 4-bit format",
)
def measure_bytes(case: Case) -> Measured:
    """Exact, for what the base stores.

    Each byte is its two codes, what is left over is zero's, and each code's level times the absmax
    of its block is the weight that the base computes with.
    """
    w, q = weight_and_codes(case)
    levels = LEVELS[q.kind]
    codes = unpack_codes(q)
    packed = codes
    if BITS[q.kind] == 4:
        zero = np.uint8(abs(levels).argmin())
        padded = np.append(codes, zero)[: 2 * q.codes.size]
        packed = (padded[0::2] << 4) | padded[1::2]
    product = levels[codes] * repeat_absmax(q, q.decode_absmax())
    decoded = product.reshape(w.shape).astype(w.dtype)
    wrong = count_differences(packed, q.codes)
    wrong += count_differences(decoded, case.base.dense_weight())
    return expect_zero(wrong)


@holds(
    "bits",
    "4 or 8 a weight;  32 / block for absmax, or (8 + 32 / 256) / block",
    f"{PAPER}, section 3",
)
def measure_bits(case: Case) -> Measured:
    """Exact, in whole bytes: in blocks of 64 NF4 takes 4.5 bits, or 4.127."""
    w, q = weight_and_codes(case)
    count = math.ceil(w.size / q.block_size)
    absmax_bytes = 4 * count
    if q.double_quant:
        # one byte each, the float32 scales of their blocks, and the float32 offset
        absmax_bytes = count + 4 * math.ceil(count / ABSMAX_BLOCK) + 4
    code_bytes = math.ceil(w.size * BITS[q.kind] / 8)
    return expect_zero(q.nbytes - code_bytes - absmax_bytes)
