"""The properties of a weight in four or eight bits: what a code may cost, and what it does not depend on.

    w weights, ŵ what their codes decode to, absmax a block's largest magnitude, u = 2⁻²⁴: all of it is done in float32

The adapters over such a base are measured by their own properties, in which W is ŵ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..backend import Array
from ..quant.codes import ABSMAX_BLOCK, LEVELS, Quantized, encode
from .case import Case
from .measuring import Measured, Property, coded, differing, listing, worst

PROPERTIES: list[Property] = []
holds = listing(PROPERTIES, coded)
U = 2.0**-24
SMALLEST = 2.0**-126  # the smallest normal float32: a block without one becomes zeros
# How far a value can be from its nearest level, in units of absmax: NF4's is 0.1519, between -1 and -0.696.
HALF_GAP = {
    kind: float(np.diff(np.sort(levels.astype(np.float64))).max()) / 2
    for kind, levels in LEVELS.items()
}
BITS = {"nf4": 4, "fp4": 4, "int8": 8}
PAPER = "Dettmers et al. 2023"


def weights(case: Case) -> tuple[Array, Quantized]:
    """(w, its codes as the case's base has them)    w (O, I)"""
    assert case.weight is not None
    return case.weight, case.subject.base_layer.weight.quantized  # type: ignore[attr-defined]


def blocks(values: Array, block_size: int) -> Iterator[Array]:
    """The blocks one by one, in float64; the last may be short."""
    flat = values.reshape(-1).astype(np.float64)
    return iter(np.split(flat, range(block_size, flat.size, block_size)))


def codes(held: Quantized) -> Array:
    """The codes one by one (size,): of two in a byte the upper half comes first."""
    if held.kind in ("int8", "dynamic"):
        return held.codes
    return np.stack([held.codes >> 4, held.codes & 15], axis=1).reshape(-1)[: held.size]


# ---- what a code costs ----------------------------------------------------------------------------------------------


@holds("half a gap", "|w - ŵ| ≤ (½ widest gap + 4 u) absmax", f"{PAPER}, section 2 and eq. (4)")
def _error(case: Case) -> Measured:
    """u each for 1 / absmax, w (1 / absmax), the midpoint between two levels, and level x absmax; three more where
    1 / absmax is subnormal, one more where w is rounded to float32 first. A block without a normal number is zeros."""
    w, held = weights(case)
    single, pairs = encode(w, held.kind, held.block_size), []
    for exact, back in zip(
        blocks(w, held.block_size), blocks(single.decode(), held.block_size), strict=True
    ):
        top = float(abs(exact.astype(np.float32)).max())
        slack = 4 + 3 * (top > 2.0**126) + (w.dtype == np.float64)
        bound = top * (HALF_GAP[held.kind] + slack * U) if top >= SMALLEST else abs(exact).max()
        pairs.append((abs(exact - back).max(), bound))
    return worst(*pairs)


@holds(
    "absmax stays",
    "|w| = absmax  ⇒  ŵ = w;  absmax < 2⁻¹²⁶  ⇒  ŵ = 0",
    f"{PAPER}, section 3: -1, 0 and 1 are levels",
)
def _absmax(case: Case) -> Measured:
    """Exact: 1 / absmax rounds so that the product is next to 1, whose level it finds."""
    w, held = weights(case)
    single, wrong = encode(w, held.kind, held.block_size), 0
    decoded = (blocks(z, held.block_size) for z in (w.astype(np.float32), single.decode()))
    for exact, back, absmax in zip(*decoded, single.absmax, strict=True):
        top = abs(exact).max()
        wrong += absmax != (top if top >= SMALLEST else 0)
        largest = abs(exact) == top
        wrong += (
            np.count_nonzero(back[largest] != exact[largest])
            if top >= SMALLEST
            else np.count_nonzero(back)
        )
    return worst((wrong, 0))


@holds(
    "coded again",
    "the codes of ŵ are those of w",
    f"{PAPER}, section 2: a level is its own nearest",
)
def _again(case: Case) -> Measured:
    """Exact, but that FP4 has two codes for zero: there what they decode to is compared."""
    w, held = weights(case)
    once = encode(w, held.kind, held.block_size)
    again = encode(once.decode(), held.kind, held.block_size)
    wrong = np.count_nonzero(again.absmax != once.absmax) + np.count_nonzero(
        again.decode() != once.decode()
    )
    return worst((wrong + (held.kind != "fp4") * differing(again.codes, once.codes), 0))


@holds("codes know no scale", "w → 2ᵏ w  ⇒  the same codes, 2ᵏ absmax", f"{PAPER}, section 2")
def _scale(case: Case) -> Measured:
    """Exact, away from the ends of float32's range: what is tiny beside the largest counts as zero here."""
    w, held = weights(case)
    flat, k, wrong = _middling(w), float(case.rng.integers(1, 21)), 0
    one = encode(flat, held.kind, held.block_size)
    for c in (np.float32(2.0**k), np.float32(2.0**-k)):
        other = encode(flat * c, held.kind, held.block_size)
        wrong += differing(one.codes, other.codes) + differing(one.absmax * c, other.absmax)
    return worst((wrong, 0))


@holds("codes know no neighbour", "blocks, and weights within them, in another order  ⇒  so are codes",
       f"{PAPER}, section 2: block by block")  # fmt: skip
def _neighbours(case: Case) -> Measured:
    """Exact. The last block stays where it is, for it may be short."""
    w, held = weights(case)
    size, rng, flat = held.block_size, case.rng, _middling(w)
    count = (flat.size - 1) // size
    order = [*rng.permutation(count), count]
    within = [size * i + rng.permutation(min(size, flat.size - size * i)) for i in order]
    one, other = (encode(z, held.kind, size) for z in (flat, flat[np.concatenate(within)]))
    moved = one.absmax[order]
    return worst(
        (
            differing(codes(one)[np.concatenate(within)], codes(other))
            + differing(moved, other.absmax),
            0,
        )
    )


def _middling(w: Array) -> Array:
    """w in float32, its largest magnitude in [0.5, 1) and nothing in it below 2⁻⁶⁰ but zeros; flat."""
    flat = w.reshape(-1).astype(np.float64)
    top = float(abs(flat).max())
    flat = np.ldexp(flat, -math.frexp(top)[1])
    flat[abs(flat) < 2.0**-60] = 0
    return flat.astype(np.float32)


# ---- absmax in eight bits, and bytes --------------------------------------------------------------------------------


@holds("double quantisation", "|ŵ' - ŵ| ≤ |absmax' - absmax| ≤ ½ gap max |absmax - offset|",
       f"{PAPER}, section 3; Dettmers 2016, the 8-bit map")  # fmt: skip
def _double(case: Case) -> Measured:
    """Of each 256: u for absmax - offset and for the sum with it again, four as for any code. ŵ' and ŵ are products
    of one level, rounded once each; the offset is a mean, rounded once. And the codes are the same."""
    w, held = weights(case)
    single, double = (
        encode(w, held.kind, held.block_size, double_quant=dq) for dq in (False, True)
    )
    a, b = single.absmax.astype(np.float64), double.decode_absmax().astype(np.float64)
    pairs: list[tuple[Array, Array]] = [
        (np.array(differing(single.codes, double.codes)), np.array(0))
    ]
    pairs.append((np.array(double.offset - a.mean()), U * a.mean() + np.float64(2.0**-149)))
    for group, back in zip(blocks(a, ABSMAX_BLOCK), blocks(b, ABSMAX_BLOCK), strict=True):
        far = abs(group - double.offset).max()
        rounding = (4 * far + 2 * (group.max() + double.offset)) * U
        pairs.append(
            (abs(group - back).max(), max(HALF_GAP["dynamic"] * far, min(far, SMALLEST)) + rounding)
        )
    largest, moved = (
        np.repeat(z, held.block_size)[: w.size] for z in (np.maximum(a, abs(b)), abs(a - b))
    )
    apart = single.decode().astype(np.float64).reshape(-1) - double.decode().reshape(-1)
    return worst(*pairs, (apart, moved + 2 * U * largest + 2.0**-149))


@holds("codes in bytes", "two to a byte and apart again, odd lengths too;  ŵ = level x absmax",
       "bitsandbytes 0.50, its 4-bit format")  # fmt: skip
def _bytes(case: Case) -> Measured:
    """Exact, of what the base holds: each byte is its two codes, what is left over is zero's, and each code's level
    times the absmax of its block is the weight that the base computes with."""
    w, held = weights(case)
    each = codes(held)
    packed = each
    if BITS[held.kind] == 4:
        pairs = np.append(each, np.uint8(abs(LEVELS[held.kind]).argmin()))[: 2 * held.codes.size]
        packed = (pairs[0::2] << 4) | pairs[1::2]
    absmax = np.repeat(held.decode_absmax(), held.block_size)[: w.size]
    product = (LEVELS[held.kind][each] * absmax).reshape(w.shape).astype(w.dtype)
    return worst(
        (
            differing(packed, held.codes)
            + differing(product, case.subject.base_layer.dense_weight()),
            0,
        )
    )


@holds(
    "bits",
    "4 or 8 a weight;  32 / block for absmax, or (8 + 32 / 256) / block",
    f"{PAPER}, section 3",
)
def _bits(case: Case) -> Measured:
    """Exact, in whole bytes: in blocks of 64 NF4 takes 4.5 bits, or 4.127."""
    w, held = weights(case)
    count = -(-w.size // held.block_size)
    scales = (
        count + 4 * -(-count // ABSMAX_BLOCK) + 4 if held.double_quant else 4 * count
    )  # 4 of them the offset
    return worst((held.nbytes - -(-w.size * BITS[held.kind] // 8) - scales, 0))
