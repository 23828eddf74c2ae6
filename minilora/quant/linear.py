"""QuantizedLinear: a frozen layer over codes, and models whose linear layers are quantized.

QuantizedLinear, quantized_linear               a layer
quantize, dequantize, quantization_report       a model
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Tensor, namespace, record
from ..backend import Array, Backend, backend_of
from ..errors import ConfigError, NonFiniteError
from ..functional import Grads, rows
from ..nn import Linear, LinearBase, Module, Parameter, frozen_linear, replace_module
from .codes import Quantized, encode

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
