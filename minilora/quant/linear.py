"""Frozen linear layers over codes, and models whose linear layers are quantised.

Contents: QuantizedWeight, QuantizedLinear and its operation quantized_linear, a layer -
quantize, dequantize, quantization_report, a model. The codes themselves are in codes.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Tensor, namespace, record
from ..backend import Array, Backend, Shape, backend_of
from ..errors import ConfigError, NonFiniteError
from ..functional import Grads, rows
from ..nn import Linear, LinearBase, Module, Parameter, frozen_linear, replace_module
from ..precision import FLOAT32
from .codes import Quantized, encode

# ---- a layer ------------------------------------------------------------------------------------


class QuantizedWeight(Parameter):
    """A frozen parameter stored as codes. Reading it decodes the weight; it cannot be written.

    It counts once per weight, is saved as what it computes with, and moves to a device as any
    parameter does.
    """

    __slots__ = ("_dtype", "quantized")
    fixed = True
    encoded = True

    def __init__(self, quantized: Any, dtype: Any = np.float32):
        self.quantized: Quantized = quantized
        self._dtype = np.dtype(dtype)
        self.backend = backend_of(quantized.codes)
        self.version = [0]
        self.grad = self.node = None

    def __deepcopy__(self, memo: Any) -> QuantizedWeight:
        return type(self)(self.quantized, self.dtype)  # what never changes can be shared

    @property
    def _array(self) -> Array:
        return self.quantized.decode(self.dtype)

    @property
    def data(self) -> Array:
        return self._array

    @data.setter
    def data(self, value: Array) -> None:
        raise ConfigError(
            f"a weight stored as {self.quantized.kind} cannot be assigned to: quantise another"
        )

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted:
            raise ConfigError(
                f"a weight stored as {self.quantized.kind} cannot be trained: add an adapter to it"
            )

    @property
    def shape(self) -> Shape:
        return self.quantized.shape

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return self.quantized.size

    def __len__(self) -> int:
        return self.shape[0]

    def move(self, backend: Backend, dtype: Any) -> None:
        self.quantized = self.quantized.to(backend)
        self._dtype = np.dtype(dtype)
        self.backend = backend


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, compute: str = FLOAT32
) -> Tensor:
    """y = x W^T + b    x (..., I), W (O, I) as codes, b (O,) -> (..., O)

    QLoRA, eq. (5) without the adapter. The graph keeps the codes: W is decoded for the product and
    again for dx, and dropped after each. `compute` is the arithmetic of both products.
    """
    inputs = (x,) if bias is None else (x, bias)
    namespace(*inputs, weight)
    backend = x.backend
    X = rows(x.data)
    shape = x.shape
    codes = weight.quantized
    dtype = weight.dtype
    W = codes.operand(dtype, compute)
    y = backend.matmul(X, W.T, compute=compute)  # (N, I) @ (I, O) -> (N, O)
    del W
    if bias is not None:
        y += bias.data
    need_dx = x.requires_grad
    need_db = bias is not None and bias.requires_grad
    count = len(inputs)

    def vjp(dy: Array) -> Grads:
        dY = rows(dy)  # (N, O)
        dx = None
        if need_dx:
            W = codes.operand(dtype, compute)
            dx = backend.matmul(dY, W, compute=compute).reshape(shape)  # (N, O) @ (O, I) -> (N, I)
        db = dY.sum(axis=0) if need_db else None
        return (dx, db)[:count]

    return record(y.reshape(*shape[:-1], weight.shape[0]), inputs, vjp)


class QuantizedLinear(LinearBase):
    """y = x W^T + b    weight (O, I) frozen and stored as codes, bias (O,) in floats or None

    error   |W - decoded W| / |W| in Frobenius norms, against the weight that was encoded; None if
            that is not known
    lost    in a merge that quantised again: |dW - what is left of it| / |dW|; 0 is nothing, 1 is
            all of dW
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
        """A quantised copy of `layer`, which has a `weight`; the bias is shared.

        Errors as of `encode`.
        """
        W = layer.weight.data
        made = cls(encode(W, kind, block_size, double_quant), layer.bias, W.dtype)
        made.compute = layer.compute
        made.training = layer.training
        with np.errstate(over="ignore", invalid="ignore"):
            made.error = _relative_distance(made.dense_weight(), W, W)
        # A rounded absmax can leave the dtype's range at its very end.
        if not math.isfinite(made.error):
            raise NonFiniteError(f"the decoded weight is beyond {W.dtype}: use double_quant=False")
        return made

    @property
    def nbytes(self) -> int:
        """The bytes of the weight, without the bias."""
        return self.weight.quantized.nbytes

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / self.weight.size

    def dense_weight(self) -> Array:
        return self.weight.data

    def rebuilt(self, weight: Array) -> QuantizedLinear:
        """The same kind of layer over another weight (O, I); see `lost`."""
        coded = self.weight.quantized
        dense = frozen_linear(weight, self)
        made = self.from_linear(dense, coded.kind, coded.block_size, coded.double_quant)
        dW = weight.astype(np.float64) - self.dense_weight()
        made.lost = _relative_distance(made.dense_weight(), weight, dW)
        return made

    def __call__(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.bias, self.compute)


def _relative_distance(a: Array, b: Array, scale: Array) -> float:
    """|a - b| / |scale| in Frobenius norms, computed in float64; 0 if the scale is 0."""
    backend = backend_of(a)

    def norm(z: Array) -> float:
        largest = float(backend.to_numpy(backend.xp.abs(z).max()))
        if not largest:
            return largest
        squares = ((z / largest) ** 2).sum()  # which cannot overflow
        return largest * math.sqrt(float(backend.to_numpy(squares)))

    size = norm(scale.astype(np.float64))
    return norm(a.astype(np.float64) - b) / size if size else 0.0


# ---- a model ------------------------------------------------------------------------------------


def quantize(
    model: Any,
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: str | Iterable[str] | None = None,
) -> Any:
    """Store the weights of `model`'s linear layers as codes, in place; returns the model.

    skip   the layers to leave out, by path or its ending, as in target_modules. By default the
           head, as in bitsandbytes

    Adapters come afterwards, by `get_peft_model`. ConfigError, before anything changes, for an
    invalid option, a name in `skip` that matches nothing, a model that has adapters or quantised
    layers, and a weight that is shared; NonFiniteError names the layer.
    """
    if not isinstance(model, Module):
        raise ConfigError(f"expected a model to quantise, got {model!r:.99}")
    given = ("lm_head",) if skip is None else skip
    names = (given,) if isinstance(given, str) else tuple(given)
    modules = dict(model.named_modules())
    for name in names:
        if skip is not None and not any(_is_named(path, name) for path in modules):
            raise ConfigError(f"skip: {name!r:.99} matches nothing in this model")
    for path, module in modules.items():
        if isinstance(module, QuantizedLinear):
            raise ConfigError(
                f"{path or 'the model'} is quantised already, as {module.weight.quantized.kind}"
            )
        if path.endswith(".base_layer"):
            raise ConfigError(
                f"{path.removesuffix('.base_layer')} has adapters, made for its weight as it is: "
                "quantise first, then add adapters"
            )
    layers = {}
    for path, module in modules.items():
        if isinstance(module, Linear) and not any(_is_named(path, name) for name in names):
            layers[path] = module
    if not layers:
        raise ConfigError("the model has no linear layer to quantise")
    if "" in layers:
        raise ConfigError("the model is one linear layer: use QuantizedLinear.from_linear")
    for path, layer in layers.items():
        for other, module in modules.items():
            if other != path and any(value is layer.weight for value in vars(module).values()):
                raise ConfigError(
                    f"{path} shares its weight with {other}: name it in skip, or untie them"
                )
    coded_layers = {}
    for path, layer in layers.items():
        try:
            coded_layers[path] = QuantizedLinear.from_linear(layer, kind, block_size, double_quant)
        except NonFiniteError as error:
            raise NonFiniteError(f"{path}: {error}") from None
    for path, coded_layer in coded_layers.items():
        replace_module(model, path, coded_layer)
    return model


def dequantize(model: Module) -> Any:
    """Replace every quantised layer by a dense one over its decoded weight; returns the model.

    It computes what it did before, bit for bit, and all its weights train. ConfigError, before
    anything changes, if no layer is quantised, or one has adapters.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ConfigError("the model has no quantised layer")
    for path in layers:
        if path.endswith(".base_layer"):
            raise ConfigError(
                f"{path.removesuffix('.base_layer')} has adapters: merge_and_unload or unload first"
            )
    for path, layer in layers.items():
        dense = frozen_linear(layer.dense_weight(), layer)
        dense.weight.requires_grad = True
        replace_module(model, path, dense)
    return model


def quantized_layers(model: Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def _is_named(path: str, name: str) -> bool:
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
    """The size of each quantised layer of a model, and what encoding lost of its weight."""
    reports = []
    for path, m in quantized_layers(model).items():
        kind = m.weight.quantized.kind
        bits = m.bits_per_parameter
        reports.append(LayerReport(path, kind, m.weight.size, m.nbytes, bits, m.error, m.lost))
    return reports
