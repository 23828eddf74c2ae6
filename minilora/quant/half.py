"""Frozen weights in sixteen bits, as checkpoints store them: half of float32's memory, and every bit of its results.

    float32     s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    bfloat16    s eeeeeeee mmmmmmm                     its upper half, widened by a shift
    float16     s eeeee mmmmmmmmmm                     fewer exponents, NumPy's own

Each is a part of float32, so widening rounds nothing. A layer's weight is widened whole for each product, and dropped
after it: a product in tiles would save that memory, too, but BLAS may add up a tile in another order, and so give other
bits. An embedding widens the rows that it reads, the loss a few thousand words of the head at a time.

    Half                        an array
    HalfWeight, HalfLinear      a parameter, a layer; pieces
    halve, hold                 a model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..autograd import Tensor
from ..backend import Array, Backend, backend_of
from ..errors import ConfigError, NonFiniteError
from ..formats import bf16_from
from ..nn import Embedding, Linear, LinearBase, Module, Parameter, replace_module
from .linear import QuantizedWeight, quantized_linear

STORED = {"BF16": "bfloat16", "F16": "float16"}  # the kinds, by their names in files
NAMES = {kind: name for name, kind in STORED.items()}
PIECE = 1 << 20  # numbers that `pieces` widens at once

# ---- an array -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Half:
    """An array in sixteen bits. It never changes.

    kind    "bfloat16" or "float16"
    codes   of the array's shape: uint16, bfloat16's bits, or float16
    """

    kind: str
    codes: Array

    @property
    def shape(self) -> tuple[int, ...]:
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
        """The array, or these rows of it, in `dtype`: exact in float32 and float64. Memory of its own."""
        bits = self.codes[rows]
        with np.errstate(
            invalid="ignore"
        ):  # a signalling NaN becomes a quiet one, which is no news
            if self.kind == "float16":
                return bits.astype(dtype)
            wide = bits.astype(np.uint32)
            wide <<= np.uint32(16)
            return wide.view(np.float32).astype(dtype, copy=False)


def encode_half(values: Array, kind: str) -> Half:
    """`values`, of any float dtype, rounded once: to nearest, ties to even. ConfigError for a kind there is not."""
    if kind not in NAMES:
        raise ConfigError(f"cannot hold weights as {kind!r:.99}: the kinds are {', '.join(NAMES)}")
    backend = backend_of(values)
    host = backend.to_numpy(values)
    with np.errstate(
        over="ignore"
    ):  # beyond the kind's range is inf, and whoever asks looks for that
        codes = bf16_from(host) if kind == "bfloat16" else host.astype(np.float16)
    return Half(kind, backend.from_numpy(codes))


# ---- a parameter, a layer -------------------------------------------------------------------------------------------


class HalfWeight(QuantizedWeight):
    """A frozen parameter held as a Half. Whoever reads it, or rows of it, gets floats, widened anew.

    lost   of a merge: |dW - what rounding left of it| / |dW|; 0 is nothing, 1 as if dW had been zero
    """

    __slots__ = ("lost",)
    quantized: Half  # type: ignore[assignment]

    def __init__(self, half: Half, dtype: Any = np.float32):
        super().__init__(half, dtype)
        self.lost: float | None = None
        self.version = None  # no graph need ask whether it changed, which would widen all of it

    def take(self, at: Any) -> Array:
        return self.quantized.decode(self.dtype, at)

    def merged(self, total: Array) -> HalfWeight:
        """Another weight in its place, `total` in float64 being rounded once. NonFiniteError beyond the kind's end."""
        made = HalfWeight(encode_half(total, self.quantized.kind), self.dtype)
        after, exact, before = (
            made.numpy().astype(np.float64),
            self.backend.to_numpy(total),
            self.numpy(),
        )
        if not np.isfinite(after).all():
            raise NonFiniteError(
                f"the merged weight is beyond {self.quantized.kind}, which it is held as"
            )
        size = float(np.linalg.norm(exact - before))
        made.lost = float(np.linalg.norm(after - exact)) / size if size else 0.0
        return made


class HalfLinear(Linear):
    """y = x W^T + b    weight (O, I) frozen and held in sixteen bits, bias (O,) in floats or None

    In a step, too, it stays so: no W + dW is formed of it for all of a step's shards.
    """

    def __init__(self, weight: HalfWeight, like: LinearBase):
        self.weight: HalfWeight = weight
        self.bias, self.training = like.bias, like.training
        self.out_features, self.in_features = weight.shape

    def effective(self, out: Array, tokens: int | None) -> None:
        """None: it runs on its own."""

    def rebuilt(self, weight: Array) -> HalfLinear:
        """A layer of the same kind over another weight (O, I), rounded once; `weight.lost` says what that took."""
        return HalfLinear(self.weight.merged(weight), self)

    def __call__(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.bias)


def iterate_pieces(p: Parameter) -> Iterator[Array]:
    """A parameter's rows, some at a time: of one that is held in sixteen bits all of them are never floats at once."""
    step = max(1, PIECE * len(p) // max(1, p.size))
    return (p.take(slice(start, start + step)) for start in range(0, len(p), step))


# ---- a model --------------------------------------------------------------------------------------------------------


def convert_to_half(model: Any, kind: str = "bfloat16") -> Any:
    """Hold the weights of a model's linear layers and embeddings in sixteen bits, in place; returns the model.

    Nothing is rounded: ConfigError, before anything changes, names a weight that `kind` cannot hold exactly; the same
    for a model with adapters, which come afterwards. What is held as codes stays so, and a tied head stays tied.
    """
    if not isinstance(model, Module):
        raise ConfigError(f"expected a model, got {model!r:.99}")
    made: dict[Parameter, Half] = {}
    for path, module in half_weight_owners(model).items():
        W = module.weight
        if path.endswith((".base_layer", ".original_module")):
            raise ConfigError(f"{path.rpartition('.')[0]} has adapters: they come afterwards")
        half = made[W] = made.get(W) or encode_half(W.data, kind)
        if not bool((half.decode(W.dtype) == W.data).all()):
            raise ConfigError(
                f"{path}: {kind} cannot hold its weights exactly, and to round them changes the model"
            )
    store_half_weights(model, made)
    return model


def half_weight_owners(model: Module) -> dict[str, Any]:
    """The modules whose weights can be held in sixteen bits, by path: dense layers and embeddings, in floats as yet."""
    return {
        p: m
        for p, m in model.named_modules()
        if type(m) in (Linear, Embedding) and not vars(m)["weight"].fixed
    }


def store_half_weights(model: Module, found: Mapping[Parameter, Half]) -> None:
    """Put these arrays in the places of a model's parameters, one for all modules that share one."""
    weights = {p: HalfWeight(half, p.dtype) for p, half in found.items()}
    for path, module in half_weight_owners(model).items():
        weight = weights.get(module.weight)
        if weight is not None and type(module) is Embedding:
            module.weight = weight
        elif weight is not None:
            replace_module(model, path, HalfLinear(weight, module))
