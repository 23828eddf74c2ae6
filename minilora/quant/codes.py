"""Arrays as codes of 4 or 8 bits, block by block: the levels of each kind, encoding and decoding.

    w            0.30   -1.20    0.05  ...    0.66      a block of 64, whose absmax is 1.20
    w / absmax   0.25   -1.00    0.04  ...    0.55
    code           10       0       8  ...      13      the nearest of 16 levels, two codes per byte
    level       0.246  -1.000   0.080  ...   0.563      times absmax: the decoded weight

Dettmers et al. 2023 (QLoRA), sections 2 and 3. The codes are those of bitsandbytes, whose stored
tensors are read and written in bitsandbytes.py; linear.py has the layer that computes with codes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, Backend, Shape, backend_of
from ..errors import ConfigError, NonFiniteError, Rule, check_fields, is_flag, one_of
from ..threads import blocks

# ---- the levels of each kind, in the order of its codes ------------------------------------------


def _dynamic_map() -> list[float]:
    """The signed 8-bit dynamic map: 2^i values in each decade +-10^(i-7) ... 10^(i-6), and 0 and 1.

    i = 0 ... 6; Dettmers 2016. A value is the middle of one of 2^i equal parts of its decade. All
    is rounded to float32 where torch rounds it (whose linspace runs from both ends to the middle),
    so that the map has the bits of bitsandbytes' map.
    """
    f32 = np.float32
    values = [0.0, 1.0]
    low = float(f32(0.1))
    for i in range(7):
        k = np.arange(2**i + 1)
        step = float((f32(1) - f32(0.1)) / f32(2**i))
        ends = np.where(2 * k < 2**i, low + step * k, 1 - step * (2**i - k)).astype(f32)
        middles = f32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / f32(2))
        values += [*map(float, middles), *map(float, -middles)]
    return sorted(values)


# The quantiles of N(0, 1) in sixteen parts, with an exact 0 (QLoRA, section 3 and appendix E).
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# A sign, two bits of exponent, one of mantissa.
_FP4 = [magnitude / 12 for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
_LISTS = {
    "nf4": _NF4,
    "fp4": _FP4 + [0.0 - level for level in _FP4],
    "int8": [k / 127 for k in range(-127, 128)],
    "dynamic": _dynamic_map(),  # for the absmax of the others
}
LEVELS = {kind: np.array(levels, np.float32) for kind, levels in _LISTS.items()}
KINDS = ("nf4", "fp4", "int8")  # of weights
BLOCK_SIZES = tuple(2**k for k in range(5, 13))  # 32 ... 4096
PART = 1 << 16  # numbers that `nearest_codes` encodes at a time: whole blocks
ABSMAX_BLOCK = 256  # how many absmax share one scale when they are quantised, too
_SMALLEST = 2.0**-126  # the smallest normal float32: 1 / absmax of anything below could overflow
OPTIONS = [
    Rule("kind", KINDS.__contains__, f"one of {', '.join(KINDS)}"),
    Rule("block_size", one_of(*BLOCK_SIZES), f"one of {', '.join(map(str, BLOCK_SIZES))}"),
    Rule("double_quant", is_flag, "True or False"),
]


class _Tables(NamedTuple):
    """A kind's levels on one device, as encoding and decoding read them."""

    thresholds: Array  # (levels - 1,) float32, midpoints; a value on one gets the lower level
    order: Array  # (levels,) uint8, the codes by rising level
    values: Array  # (256, codes per byte) float32, what each byte decodes to


@functools.cache
def _tables(kind: str, backend: Backend) -> _Tables:
    levels = LEVELS[kind]
    order = np.argsort(levels, kind="stable")
    rising = levels[order]
    thresholds = (rising[:-1] + rising[1:]) / np.float32(2)
    byte = np.arange(256)
    codes = np.stack([byte >> 4, byte & 15], axis=1) if len(levels) == 16 else byte[:, None]
    values = levels[np.minimum(codes, len(levels) - 1)]
    host = thresholds, order.astype(np.uint8), values
    return _Tables(*map(backend.from_numpy, host))


# ---- decoding -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Quantized:
    """An array as codes, with one absmax per block. It never changes.

    kind         of its levels: "nf4", "fp4", "int8", or "dynamic" if it is the absmax of another
    shape        of the array; blocks follow its elements in row-major order, the last may be short
    block_size   elements per block
    codes        uint8 (ceil(size / codes per byte),); the upper half of a byte is the first of two
                 4-bit codes
    absmax       float32 (blocks,), or (double quantisation) that less `offset`, as a Quantized
    """

    kind: str
    shape: Shape
    block_size: int
    codes: Array
    absmax: Any
    offset: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def double_quant(self) -> bool:
        return isinstance(self.absmax, Quantized)

    @property
    def values(self) -> Array:
        """What each byte decodes to before its absmax applies: (256, codes per byte) float32."""
        values: Array = _tables(self.kind, backend_of(self.codes)).values
        return values

    @property
    def nbytes(self) -> int:
        """The bytes of codes and absmax, and four of the offset if there is double quantisation."""
        return int(self.codes.nbytes) + int(self.absmax.nbytes) + 4 * self.double_quant

    def to(self, backend: Backend) -> Quantized:
        def moved(array: Array) -> Array:
            return backend.from_numpy(backend_of(array).to_numpy(array))

        _tables(self.kind, backend)  # sent now, not in the middle of a step
        absmax = self.absmax.to(backend) if self.double_quant else moved(self.absmax)
        return replace(self, codes=moved(self.codes), absmax=absmax)

    def decode_absmax(self) -> Array:
        """absmax (blocks,) float32, with the error of double quantisation if that was used."""
        return self.absmax.decode() + self.offset if self.double_quant else self.absmax

    def decode(self, dtype: Any = np.float32) -> Array:
        """level x absmax, in float32 and then rounded to `dtype`: a new array of `shape`."""
        values = backend_of(self.codes).run(_decode, self, np.dtype(dtype))
        return values.reshape(self.shape)

    def operand(self, dtype: Any, compute: str) -> Array:
        """The array for a product that `Backend.matmul` computes by this arithmetic."""
        return self.decode(dtype)


def _decode(backend: Backend, quantized: Quantized, dtype: Any) -> Array:
    """`Quantized.decode` as a vector."""
    size = quantized.size
    block_size = quantized.block_size
    decoded = backend.xp.take(quantized.values, quantized.codes, axis=0).reshape(-1)[:size]
    absmax = quantized.decode_absmax()
    count = size // block_size
    end = count * block_size
    blocks = decoded[:end].reshape(count, block_size)  # a view
    blocks *= absmax[:count, None]
    short_block = decoded[end:]  # a view
    short_block *= absmax[count:]
    return decoded.astype(dtype, copy=False)


# ---- encoding -----------------------------------------------------------------------------------


def encode(
    values: Array, kind: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> Quantized:
    """Each block's absmax, and for each value / absmax the code of the nearest level.

    values   of any shape and float dtype

    All is done in float32, as bitsandbytes does: v = w * (1 / absmax), and a v halfway between two
    levels takes the lower. A block without a normal number (absmax < 2^-126) becomes zeros. With
    `double_quant` (QLoRA, section 3) the absmax, less their mean, are encoded themselves: 8 bits
    each, and one scale for 256 of them. ConfigError for an invalid kind or block size,
    NonFiniteError for a NaN or what float32 cannot hold.
    """
    check_fields(locals(), OPTIONS)
    if not values.size:
        raise ConfigError(f"nothing to quantise: an array of shape {tuple(values.shape)}")
    backend = backend_of(values)
    with np.errstate(over="ignore"):  # a value beyond float32 becomes inf, which is refused below
        flat = values.reshape(-1).astype(np.float32)
    if not bool(backend.xp.isfinite(flat).all()):
        raise NonFiniteError("a weight is NaN, infinite or beyond float32: it has no code")
    quantized = _encode(flat, kind, block_size)
    if double_quant:
        coded, offset = encode_absmax(quantized.absmax)
        quantized = replace(quantized, absmax=coded, offset=offset)
    return replace(quantized, shape=tuple(values.shape))


def encode_absmax(absmax: Array) -> tuple[Quantized, float]:
    """Double quantization of an array's absmax: (the codes of absmax - offset, offset)."""
    mean = backend_of(absmax).to_numpy(absmax.mean(dtype=np.float64))
    offset = float(np.float32(mean))
    return _encode(absmax - offset, "dynamic", ABSMAX_BLOCK), offset


def double_absmax(absmax: Array) -> Array:
    """An array's absmax (blocks,) with the error of double quantization."""
    coded, offset = encode_absmax(absmax)
    return coded.decode() + np.float32(offset)


def nearest_codes(values: Array, double_quant: bool = False) -> Array:
    """What NF4 in blocks of 64 makes of an array: `encode(...).decode()` in little memory.

    float32, of the shape of `values`. NonFiniteError as for `encode`.
    """
    flat = values.reshape(-1)
    decoded = np.empty(flat.shape, np.float32)
    parts = blocks(len(flat), PART)
    coded = [encode(flat[part]) for part in parts] if double_quant else []
    absmax = double_absmax(np.concatenate([part.absmax for part in coded])) if coded else None
    for number, part in enumerate(parts):
        if absmax is None:
            quantized = encode(flat[part])
        else:
            quantized = replace(
                coded[number], absmax=absmax[part.start // 64 : -(-part.stop // 64)]
            )
        decoded[part] = quantized.decode()
    return decoded.reshape(values.shape)


def block_absmax(blocks: Array) -> Array:
    """The absmax of each row of `blocks` (count, block_size): 0 without a normal number."""
    xp = backend_of(blocks).xp
    absmax = xp.abs(blocks).max(axis=1)
    return xp.where(absmax < _SMALLEST, 0, absmax)


def _encode(flat: Array, kind: str, block_size: int) -> Quantized:
    backend = backend_of(flat)
    xp = backend.xp
    tables = _tables(kind, backend)
    size = len(flat)
    count = -(-size // block_size)
    padded = xp.zeros((count * block_size,), np.float32)
    padded[:size] = flat
    blocks = padded.reshape(count, block_size)
    absmax = block_absmax(blocks)
    scaled = backend.divide_rows(blocks, absmax).reshape(-1)
    codes = xp.take(tables.order, xp.searchsorted(tables.thresholds, scaled, side="left"))
    per_byte = tables.values.shape[1]
    if per_byte == 2:
        codes = (codes[0::2] << 4) | codes[1::2]
    codes = codes[: -(-size // per_byte)].copy()
    return Quantized(kind, (size,), block_size, codes, absmax)
