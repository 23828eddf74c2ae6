"""Frozen weights in four or eight bits: block-wise codes, and the linear layer that QLoRA's adapters stand on.

    w            0.30   -1.20    0.05  ...    0.66      a block of 64 weights; absmax, the largest magnitude, is 1.20
    w / absmax   0.25   -1.00    0.04  ...    0.55
    code           10       0       8  ...      13      the nearest of 16 levels, two codes to a byte
    level       0.246  -1.000   0.080  ...   0.563      times absmax: what is read back

Dettmers et al. 2023 (QLoRA), sections 2 and 3. The codes are those of bitsandbytes; bitsandbytes.py has its files.

    encode, Quantized                               arrays
    QuantizedLinear, quantized_linear               a layer
    quantize, dequantize, quantization_report       a model
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .autograd import Tensor, namespace, record
from .backend import Array, Backend, backend_of
from .errors import ConfigError, NonFiniteError
from .functional import Grads, rows
from .nn import Linear, LinearBase, Module, Parameter, frozen_linear, replace_module

# ---- what a code means ----------------------------------------------------------------------------------------------


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


# Each kind's levels in the order of its codes. NF4: the quantiles of N(0, 1) in sixteen parts, with an exact 0 (QLoRA,
# section 3 and appendix E). FP4: a sign, two bits of exponent, one of mantissa. int8: steps of absmax / 127.
_FP4 = [magnitude / 12 for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
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


# ---- arrays ---------------------------------------------------------------------------------------------------------


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


# ---- the layer ------------------------------------------------------------------------------------------------------


class QuantizedWeight(Parameter):
    """A frozen parameter held as codes. Whoever reads it gets the dense weight, decoded anew; nobody can write it.

    So it counts once a weight, is saved as what it computes with, and moves to a device as any parameter does.
    """

    __slots__ = ("_dtype", "quantized")
    fixed = True

    def __init__(self, quantized: Any, dtype: Any = np.float32):
        self.quantized: Quantized = quantized
        self._dtype = np.dtype(dtype)
        self.backend, self.version = backend_of(quantized.codes), [0]
        self.grad = self.node = None

    def __deepcopy__(self, memo: Any) -> QuantizedWeight:
        return type(self)(self.quantized, self.dtype)  # what never changes can be shared

    @property
    def _data(self) -> Array:
        return self.quantized.decode(self.dtype)

    @property
    def data(self) -> Array:
        return self._data

    @data.setter
    def data(self, value: Array) -> None:
        raise ConfigError(
            f"a weight held as {self.quantized.kind} cannot be assigned to: quantise another"
        )

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted:
            raise ConfigError(
                f"a weight held as {self.quantized.kind} cannot be trained: put an adapter over it"
            )

    # fmt: off
    @property
    def shape(self) -> tuple[int, ...]: return self.quantized.shape
    @property
    def dtype(self) -> Any: return self._dtype
    @property
    def ndim(self) -> int: return len(self.shape)
    @property
    def size(self) -> int: return self.quantized.size
    def __len__(self) -> int: return self.shape[0]
    # fmt: on

    def move(self, backend: Backend, dtype: Any) -> None:
        self.quantized, self._dtype, self.backend = (
            self.quantized.to(backend),
            np.dtype(dtype),
            backend,
        )


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b    x (..., I), W (O, I) as codes, b (O,) -> (..., O)    QLoRA, eq. (5) without the adapter

    The graph keeps the codes. W is decoded for the product and again for dx, and dropped after each.
    """
    inputs = (x,) if bias is None else (x, bias)
    namespace(*inputs, weight)
    X, shape, held, dtype = rows(x.data), x.shape, weight.quantized, weight.dtype
    y = X @ held.decode(dtype).T  # (N, I) @ (I, O) -> (N, O)
    if bias is not None:
        y += bias.data
    need_dx, need_db, count = x.requires_grad, bias is not None and bias.requires_grad, len(inputs)

    def vjp(dy: Array) -> Grads:
        dY = rows(dy)  # (N, O)
        dx = (
            (dY @ held.decode(dtype)).reshape(shape) if need_dx else None
        )  # (N, O) @ (O, I) -> (N, I)
        db = dY.sum(axis=0) if need_db else None
        return (dx, db)[:count]

    return record(y.reshape(*shape[:-1], weight.shape[0]), inputs, vjp)


class QuantizedLinear(LinearBase):
    """y = x W^T + b    weight (O, I) frozen and held as codes, bias (O,) in floats or None

    error   |W - decoded W| / |W| in Frobenius norms, against the weight it was made from; None if that is not known
    lost    of a merge that quantised again: |dW - what is left of it| / |dW|; 0 is nothing, 1 as if dW had been zero
    """

    weight: QuantizedWeight
    trainable = False

    def __init__(
        self, quantized: Quantized, bias: Parameter | None = None, dtype: Any = np.float32
    ):
        self.weight = QuantizedWeight(quantized, dtype)
        self.bias = bias
        self.out_features, self.in_features = quantized.shape
        self.error: float | None = None
        self.lost: float | None = None

    @classmethod
    def from_linear(
        cls, layer: Any, kind: str = "nf4", block_size: int = 64, double_quant: bool = True
    ) -> QuantizedLinear:
        """A quantised copy of `layer`, which has a `weight`; the bias is shared. Errors as of `encode`."""
        return cls._encoded(layer.weight.data, layer, kind, block_size, double_quant)

    @classmethod
    def _encoded(
        cls, W: Array, like: Any, kind: str, block_size: int, double_quant: bool
    ) -> QuantizedLinear:
        made = cls(encode(W, kind, block_size, double_quant), like.bias, W.dtype)
        made.training = like.training
        with np.errstate(over="ignore", invalid="ignore"):
            made.error = _ratio(made.dense_weight(), W, W)
        if not math.isfinite(
            made.error
        ):  # a rounded absmax can leave the dtype's range at its very end
            raise NonFiniteError(f"the decoded weight is beyond {W.dtype}: use double_quant=False")
        return made

    @property
    def nbytes(self) -> int:
        """What the weight holds, in bytes; the bias is not in it."""
        return self.weight.quantized.nbytes

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / self.weight.size

    def dense_weight(self) -> Array:
        return self.weight.data

    def rebuilt(self, weight: Array) -> QuantizedLinear:
        """The same kind of layer over another weight (O, I); `lost` says how much of the difference did not survive."""
        held, before = self.weight.quantized, self.dense_weight()
        made = self._encoded(weight, self, held.kind, held.block_size, held.double_quant)
        made.lost = _ratio(made.dense_weight(), weight, weight.astype(np.float64) - before)
        return made

    def __call__(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.bias)


def _ratio(a: Array, b: Array, scale: Array) -> float:
    """|a - b| / |scale| in Frobenius norms, formed in float64; 0 where there is nothing to compare with."""
    backend = backend_of(a)

    def norm(z: Array) -> float:
        top = float(backend.to_numpy(backend.xp.abs(z).max()))
        return top and top * math.sqrt(
            float(backend.to_numpy(((z / top) ** 2).sum()))
        )  # no square overflows

    size = norm(scale.astype(np.float64))
    return norm(a.astype(np.float64) - b) / size if size else 0.0


# ---- a model --------------------------------------------------------------------------------------------------------


def quantize(
    model: Any,
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: str | Iterable[str] = ("lm_head",),
) -> Any:
    """Hold every linear layer of `model` as codes, in place, but for those named in `skip`; returns the model.

    skip   names or endings of paths, as in target_modules: the head is left out, as bitsandbytes leaves it

    Adapters come afterwards, by `get_peft_model`. ConfigError, before anything changes, for an option that there is
    not, a name in `skip` that matches nothing, adapters or quantised layers that are there already, and a weight that
    is shared; NonFiniteError names the layer.
    """
    if not isinstance(model, Module):
        raise ConfigError(f"expected a model to quantise, got {model!r:.99}")
    names = (skip,) if isinstance(skip, str) else tuple(skip)
    modules = dict(model.named_modules())
    unused = [n for n in names if not any(_named(path, n) for path in modules)]
    if unused:
        raise ConfigError(f"skip: {unused[0]!r:.99} matches nothing in this model")
    for path, module in modules.items():
        if isinstance(module, QuantizedLinear):
            raise ConfigError(
                f"{path or 'the model'} is quantised already, as {module.weight.quantized.kind}"
            )
        if path.endswith(".base_layer"):
            raise ConfigError(
                f"{path.removesuffix('.base_layer')} has adapters, made for W as it is: quantise first"
            )
    found = {
        p: m
        for p, m in modules.items()
        if isinstance(m, Linear) and not any(_named(p, n) for n in names)
    }
    if not found:
        raise ConfigError("there is no linear layer to quantise")
    if "" in found:
        raise ConfigError("the model is one linear layer: use QuantizedLinear.from_linear")
    for path, layer in found.items():
        for other, module in modules.items():
            if other != path and any(value is layer.weight for value in vars(module).values()):
                raise ConfigError(
                    f"{path} shares its weight with {other}: name it in skip, or untie them"
                )
    made = {}
    for path, layer in found.items():
        try:
            made[path] = QuantizedLinear.from_linear(layer, kind, block_size, double_quant)
        except NonFiniteError as error:
            raise NonFiniteError(f"{path}: {error}") from None
    for path, quantized in made.items():
        replace_module(model, path, quantized)
    return model


def dequantize(model: Module) -> Any:
    """Put a dense layer over the decoded weight in place of every quantised one; returns the model.

    It computes what it did before, bit for bit, and all its weights train. ConfigError, before anything changes, where
    there is none, or adapters stand over one.
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not found:
        raise ConfigError("there is no quantised layer")
    adapted = [path for path in found if path.endswith(".base_layer")]
    if adapted:
        raise ConfigError(
            f"{adapted[0].removesuffix('.base_layer')} has adapters: merge_and_unload or unload first"
        )
    for path, layer in found.items():
        dense = frozen_linear(layer.dense_weight(), layer)
        dense.weight.requires_grad = True
        replace_module(model, path, dense)
    return model


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


class LayerReport(NamedTuple):
    """One quantised layer in numbers; `error` and `lost` as in QuantizedLinear."""

    path: str
    kind: str
    parameters: int
    nbytes: int
    bits_per_parameter: float
    error: float | None
    lost: float | None


def quantization_report(model: Module) -> list[LayerReport]:
    """What each quantised layer of a model holds, and what it lost."""
    return [
        LayerReport(
            path,
            m.weight.quantized.kind,
            m.weight.size,
            m.nbytes,
            m.bits_per_parameter,
            m.error,
            m.lost,
        )
        for path, m in model.named_modules()
        if isinstance(m, QuantizedLinear)
    ]
