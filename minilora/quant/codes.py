"""Frozen weights in four or eight bits: block-wise codes (NF4, FP4, int8).

    w            0.30   -1.20    0.05  ...    0.66      a block of 64 weights; absmax, the largest magnitude, is 1.20
    w / absmax   0.25   -1.00    0.04  ...    0.55
    code           10       0       8  ...      13      the nearest of 16 levels, two codes to a byte
    level       0.246  -1.000   0.080  ...   0.563      times absmax: what is read back

Dettmers et al. 2023 (QLoRA), sections 2 and 3. The codes are those of bitsandbytes; bitsandbytes.py has its files.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, Backend, backend_of
from ..errors import ConfigError, NonFiniteError

# Each kind's levels in the order of its codes. NF4: the quantiles of N(0, 1) in sixteen parts, with an exact 0 (QLoRA,
# section 3 and appendix E). FP4: a sign, two bits of exponent, one of mantissa. int8: steps of absmax / 127.
_FP4 = [magnitude / 12 for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]


def _dynamic_map() -> list[float]:
    """The 8-bit dynamic map, signed: 2^i values in each decade +-10^(i-7) ... 10^(i-6), i = 0 ... 6; and 0 and 1.

    Dettmers 2016. A value is the middle of one of 2^i equal parts. All is rounded to float32 where torch rounds it
    (whose linspace runs from both ends to the middle), so that the map has the bits of bitsandbytes' own.
    """
    f32, found = np.float32, [0.0, 1.0]
    for i in range(7):
        k = np.arange(2**i + 1)
        low, step = float(f32(0.1)), float((f32(1) - f32(0.1)) / f32(2**i))
        ends = np.where(2 * k < 2**i, low + step * k, 1 - step * (2**i - k)).astype(f32)
        middles = f32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / f32(2))
        found += [*map(float, middles), *map(float, -middles)]
    return sorted(found)


LEVELS: dict[str, np.ndarray] = {
    kind: np.array(levels, np.float32)
    for kind, levels in {
        "nf4": [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        "fp4": [*_FP4, *(0.0 - level for level in _FP4)],
        "int8": [k / 127 for k in range(-127, 128)],
        "dynamic": _dynamic_map(),  # of the absmax of others
    }.items()
}  # fmt: skip
KINDS = ("nf4", "fp4", "int8")  # of weights
BLOCK_SIZES = tuple(2**k for k in range(5, 13))  # 32 ... 4096
ABSMAX_BLOCK = 256  # absmax values that share one scale where they are quantised, too
_SMALLEST = 2.0**-126  # the smallest normal float32: 1 / absmax of anything below could overflow


class _Tables(NamedTuple):
    """A kind's levels as encoding and decoding read them, on one device."""

    thresholds: Array  # (levels - 1,) float32, the midpoints of neighbours: a value on one belongs to the lower level
    order: Array  # (levels,) uint8, the codes by rising level
    values: Array  # (256, codes a byte) float32, what each byte stands for


@functools.cache
def _tables(kind: str, backend: Backend) -> _Tables:
    levels = LEVELS[kind]
    order = np.argsort(levels, kind="stable")
    rising = levels[order]
    byte = np.arange(256)
    codes = np.stack([byte >> 4, byte & 15], axis=1) if len(levels) == 16 else byte[:, None]
    values = levels[np.minimum(codes, len(levels) - 1)]
    host = (rising[:-1] + rising[1:]) / np.float32(2), order.astype(np.uint8), values
    return _Tables(*map(backend.from_numpy, host))


@dataclass(frozen=True, eq=False)
class Quantized:
    """An array as codes, one absmax a block. It never changes.

    kind         whose levels: "nf4", "fp4", "int8", or "dynamic" where it is the absmax of another
    shape        of the array; blocks follow its elements in row-major order, the last one may be short
    block_size   elements a block
    codes        uint8 (ceil(size / codes a byte),); of two 4-bit codes the first is the upper half of the byte
    absmax       float32 (blocks,), or that as Quantized itself, less `offset` (double quantisation)
    """

    kind: str
    shape: tuple[int, ...]
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
    def nbytes(self) -> int:
        """Bytes held: codes, absmax, and four for the offset where there is one."""
        return int(self.codes.nbytes) + int(self.absmax.nbytes) + 4 * self.double_quant

    def to(self, backend: Backend) -> Quantized:
        def moved(array: Array) -> Array:
            return backend.from_numpy(backend_of(array).to_numpy(array))

        _tables(self.kind, backend)  # sent now, not in the middle of a step
        absmax = self.absmax.to(backend) if self.double_quant else moved(self.absmax)
        return replace(self, codes=moved(self.codes), absmax=absmax)

    def decode_absmax(self) -> Array:
        """absmax (blocks,) float32, with the error of double quantisation where there is one."""
        return self.absmax.decode() + self.offset if self.double_quant else self.absmax

    def decode(self, dtype: Any = np.float32) -> Array:
        """level x absmax, in float32 and then rounded to `dtype`; an array of its own, of `shape`."""
        backend = backend_of(self.codes)
        values = backend.xp.take(_tables(self.kind, backend).values, self.codes, axis=0).reshape(
            -1
        )[: self.size]
        absmax, count = self.decode_absmax(), self.size // self.block_size
        whole = count * self.block_size
        blocks, rest = values[:whole].reshape(count, self.block_size), values[whole:]  # views
        blocks *= absmax[:count, None]
        rest *= absmax[count:]
        return values.reshape(self.shape).astype(dtype, copy=False)


def encode(
    values: Array, kind: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> Quantized:
    """Each block's absmax, and each value's nearest level in units of it.    values of any shape and float dtype

    All is done in float32, as bitsandbytes does: v = w * (1 / absmax), and a v halfway between two levels takes the
    lower. A block without a normal number (absmax < 2^-126) becomes zeros. With `double_quant` (QLoRA, section 3) the
    absmax, less their mean, are encoded themselves: 8 bits each and a scale for 256 of them.
    ConfigError for a kind or block size that there is not, NonFiniteError for a NaN or what float32 cannot hold.
    """
    _check_options(kind, block_size, double_quant)
    if not values.size:
        raise ConfigError(f"nothing to quantise: an array of shape {tuple(values.shape)}")
    backend = backend_of(values)
    with np.errstate(over="ignore"):  # beyond float32 is inf, and is found here
        flat = values.reshape(-1).astype(np.float32)
    if not bool(backend.xp.isfinite(flat).all()):
        raise NonFiniteError("a weight is NaN, infinite or beyond float32: it has no code")
    held = _encode(flat, kind, block_size)
    if double_quant:
        offset = float(np.float32(backend.to_numpy(held.absmax.mean(dtype=np.float64))))
        held = replace(
            held, absmax=_encode(held.absmax - offset, "dynamic", ABSMAX_BLOCK), offset=offset
        )
    return replace(held, shape=tuple(values.shape))


def _encode(flat: Array, kind: str, block_size: int) -> Quantized:
    xp, tables, size = backend_of(flat).xp, _tables(kind, backend_of(flat)), len(flat)
    count, per_byte = -(-size // block_size), tables.values.shape[1]
    blocks = xp.zeros((count * block_size,), np.float32)
    blocks[:size] = flat
    blocks = blocks.reshape(count, block_size)
    absmax = xp.abs(blocks).max(axis=1)
    absmax = xp.where(absmax < _SMALLEST, 0, absmax)
    inverse = xp.where(absmax == 0, 0, 1 / xp.maximum(absmax, _SMALLEST))
    nearest = xp.searchsorted(
        tables.thresholds, (blocks * inverse[:, None]).reshape(-1), side="left"
    )
    codes = xp.take(tables.order, nearest)
    if per_byte == 2:
        codes = (codes[0::2] << 4) | codes[1::2]
    return Quantized(kind, (size,), block_size, codes[: -(-size // per_byte)].copy(), absmax)


def _check_options(kind: Any, block_size: Any, double_quant: Any) -> None:
    if kind not in KINDS:
        raise ConfigError(f"cannot quantise to {kind!r:.99}: the kinds are {', '.join(KINDS)}")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r:.99}"
        )
    if type(double_quant) is not bool:
        raise ConfigError(f"double_quant must be True or False, got {double_quant!r:.99}")
