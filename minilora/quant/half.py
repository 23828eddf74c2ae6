"""Frozen weights in half precision, as files store them: float32's results in half of its memory.

    float32     s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    bfloat16    s eeeeeeee mmmmmmm                     its upper half, widened by a shift
    float16     s eeeee mmmmmmmmmm                     fewer exponents, NumPy's float16

Every value of either is a float32, so widening rounds nothing. A layer's weight is widened whole
for each product, and dropped after it: a product in tiles would save that memory, too, but BLAS may
add up a tile in another order, and so give other bits. (A GPU's product by bfloat16 arithmetic
reads bfloat16 as it is: see precision.py.) An embedding widens the rows that it reads, the loss a
few thousand words of the head at a time.

Contents: Half, an array - HalfWeight and HalfLinear, a parameter and a layer; iterate_pieces -
convert_to_half, half_weight_owners and store_half_weights, for a model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..autograd import Tensor
from ..backend import Array, Backend, Shape, backend_of
from ..errors import ConfigError, NonFiniteError, Rule, check_fields
from ..formats.dtypes import round_to
from ..nn import Embedding, Linear, LinearBase, Module, Parameter, replace_module
from ..precision import BFLOAT16, FLOAT32, widen_bfloat16
from ..threads import blocks
from .linear import QuantizedWeight, quantized_linear

STORED = {"BF16": "bfloat16", "F16": "float16"}  # the kinds, by their names in files
NAMES = {kind: name for name, kind in STORED.items()}
PIECE = 1 << 20  # how many numbers `iterate_pieces` widens at once
KIND_RULE = Rule("kind", NAMES.__contains__, f"one of {', '.join(NAMES)}")

# ---- an array -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Half:
    """An array in half precision. It never changes.

    kind    "bfloat16" or "float16"
    codes   of the array's shape: uint16 with bfloat16's bits, or float16
    """

    kind: str
    codes: Array

    @property
    def shape(self) -> Shape:
        return tuple(self.codes.shape)

    @property
    def size(self) -> int:
        return int(self.codes.size)

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes)

    def to(self, backend: Backend) -> Half:
        return replace(self, codes=backend.from_numpy(backend_of(self.codes).to_numpy(self.codes)))

    def decode(self, dtype: Any = np.float32, rows: Any = slice(None)) -> Array:
        """The array, or some of its rows, in `dtype`: a new array, exact in float32 and float64."""
        bits = self.codes[rows]
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            if self.kind == "float16":
                return bits.astype(dtype)
            return backend_of(bits).run(widen_bfloat16, bits, np.dtype(dtype))

    def operand(self, dtype: Any, compute: str, rows: Any = slice(None)) -> Array:
        """The array, or rows of it, for `Backend.matmul`: bfloat16's bits if it takes those."""
        is_operand = self.kind == compute == BFLOAT16
        return self.codes[rows] if is_operand else self.decode(dtype, rows)


def encode_half(values: Array, kind: str) -> Half:
    """`values`, of any float dtype, rounded once: to nearest, ties to even.

    Beyond the kind's range they become inf. ConfigError for an invalid kind.
    """
    check_fields(locals(), [KIND_RULE])
    backend = backend_of(values)
    codes = round_to(backend.to_numpy(values), NAMES[kind])
    return Half(kind, backend.from_numpy(codes))


# ---- a parameter, a layer -----------------------------------------------------------------------


class HalfWeight(QuantizedWeight):
    """A frozen parameter stored as a Half. Reading it, or rows of it, gives floats, widened anew.

    lost   in a merge: |dW - what rounding left of it| / |dW|; 0 is nothing, 1 is all of dW
    """

    __slots__ = ("lost",)
    quantized: Half  # type: ignore[assignment]

    def __init__(self, half: Half, dtype: Any = np.float32):
        super().__init__(half, dtype)
        self.lost: float | None = None
        self.version = None  # no graph need ask whether it changed, which would widen all of it

    def read_rows(self, at: Any, compute: str = FLOAT32) -> Array:
        return self.quantized.operand(self.dtype, compute, at)

    def merged(self, total: Array) -> HalfWeight:
        """The weight `total` (float64), rounded once. NonFiniteError beyond the kind's range."""
        kind = self.quantized.kind
        merged = HalfWeight(encode_half(total, kind), self.dtype)
        after = merged.numpy().astype(np.float64)
        if not np.isfinite(after).all():
            raise NonFiniteError(
                f"the merged weight is beyond {kind}, in which this weight is stored"
            )
        exact = self.backend.to_numpy(total)
        size = float(np.linalg.norm(exact - self.numpy()))
        merged.lost = float(np.linalg.norm(after - exact)) / size if size else 0.0
        return merged


class HalfLinear(Linear):
    """y = x W^T + b    weight (O, I) frozen and in half precision, bias (O,) in floats or None

    It stays so in a training step: W + dW is not formed for the shards of a step.
    """

    def __init__(self, weight: HalfWeight, like: LinearBase):
        self.weight: HalfWeight = weight
        self.bias = like.bias
        self.compute = like.compute
        self.training = like.training
        self.out_features, self.in_features = weight.shape

    def write_effective_weight(self, out: Array, tokens: int | None) -> None:
        """None: the layer runs on its own."""

    def rebuilt(self, weight: Array) -> HalfLinear:
        """The same kind of layer over another weight (O, I), rounded once; see `weight.lost`."""
        return HalfLinear(self.weight.merged(weight), self)

    def __call__(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.bias, self.compute)


def iterate_pieces(p: Parameter) -> Iterator[Array]:
    """The rows of a parameter in pieces, so that one in half precision is never widened whole."""
    return map(p.read_rows, blocks(len(p), PIECE * len(p) // max(1, p.size)))


# ---- a model ------------------------------------------------------------------------------------


def convert_to_half(model: Any, kind: str = "bfloat16") -> Any:
    """Store the weights of a model's linear layers and embeddings in half precision; in place.

    Returns the model. Layers of codes stay as they are, and a tied head stays tied. Nothing is
    rounded: ConfigError, before anything changes, names a weight that `kind` cannot hold exactly;
    the same for a model with adapters, which come afterwards.
    """
    if not isinstance(model, Module):
        raise ConfigError(f"expected a model, got {model!r:.99}")
    halves = {}
    for path, module in half_weight_owners(model).items():
        W = module.weight
        if path.endswith((".base_layer", ".original_module")):
            raise ConfigError(
                f"{path.rpartition('.')[0]} has adapters: convert the model, then add adapters"
            )
        if W not in halves:
            halves[W] = encode_half(W.data, kind)
        if not bool((halves[W].decode(W.dtype) == W.data).all()):
            raise ConfigError(
                f"{path}: {kind} cannot hold its weights exactly, and rounding changes the model"
            )
    store_half_weights(model, halves)
    return model


def half_weight_owners(model: Module) -> dict[str, Any]:
    """The dense layers and embeddings, by path, whose weights are still floats."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) in (Linear, Embedding) and not vars(module)["weight"].fixed
    }


def store_half_weights(model: Module, halves: Mapping[Parameter, Half]) -> None:
    """Replace parameters of a model by these arrays; modules that shared one share the new one."""
    weights = {p: HalfWeight(half, p.dtype) for p, half in halves.items()}
    for path, module in half_weight_owners(model).items():
        weight = weights.get(module.weight)
        if weight is None:
            continue
        if type(module) is Embedding:
            module.weight = weight
        else:
            replace_module(model, path, HalfLinear(weight, module))
