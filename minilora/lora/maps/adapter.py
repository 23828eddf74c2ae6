"""A map's tensors in one layer: training, merging and files, the same for every method."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ... import functional as F
from ...autograd import Tensor, record
from ...backend import Array
from ...effective import Formed, Pull
from ...errors import ConfigError
from ...formats.dtypes import widen
from ...modules import describe_parameters
from ...nn import Dropout, LinearBase, Parameter
from ..config import LoraConfig
from ..factors import Dense
from ..lora import LoraAdapter
from .contract import Layers, Map, MapConfig

Shared = Mapping[str, Parameter]  # the tensors that the layers of a model share, by name


class Constant(Parameter):
    """A tensor that a file has, and that is never trained."""

    __slots__ = ()
    fixed = True


def share(map: Map, base: LinearBase, rng: np.random.Generator) -> dict[str, Parameter]:
    """New tensors that all layers share, by name, on the device and in the dtype of `base`."""
    kind = Parameter if map.SHARED_TRAINS else functools.partial(Constant, requires_grad=False)
    values = map.init_shared(rng)
    tensors = {}
    for name, value in zip(map.SHARED, values, strict=True):
        tensors[name] = kind(base.backend.from_numpy(np.asarray(value).astype(base.dtype)))
    return tensors


class MapAdapter(LoraAdapter):
    """The tensors theta of one layer, and its map theta -> dW (O, I)."""

    FORMED = True

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
        layers: Layers | None = None,
        shared: Shared | None = None,
    ):
        """layers and shared are the whole model's; None for a model of this layer alone."""
        assert isinstance(config, MapConfig)
        layers = layers or {name: (base.out_features, base.in_features)}
        self.map = map = config.map(config, name, layers)
        self.r = max(map.r, 1)  # so that a step forms W + dW once
        self.scaling = map.s
        self.dropout = Dropout(config.dropout, stream)
        names = list(map.shapes())
        for tensor, value in zip(names, map.init(rng), strict=True):
            setattr(self, tensor, Parameter(base.backend.from_numpy(value.astype(base.dtype))))
        if shared is None:
            shared = share(map, base, rng)
        for tensor, parameter in shared.items():
            setattr(self, tensor, parameter)
        self.theta_names = (*names, *map.SHARED)
        self.TENSORS = (*names, *(map.SHARED if map.saves_shared else ()))
        self.SUFFIX = map.SUFFIX
        self.SHARED = map.SHARED
        self.ALONE = map.alone

    def __repr__(self) -> str:
        """One line: the method and its tensors, with their shapes, dtypes and requires_grad."""
        return f"{self.map.config.title}({describe_parameters(self)})"

    @property
    def theta(self) -> list[Parameter]:
        """The tensors that the map reads, the shared ones last."""
        return [vars(self)[name] for name in self.theta_names]

    @property
    def reads_W(self) -> bool:  # type: ignore[override]
        return self.map.reads_W

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y + x dW^T, and the change of the bias, where y is the layer's output so far."""
        if self.reads_W and base.trainable:
            raise ConfigError(
                f"{self.map.config.title} reads the base's weight, which trains here: freeze it"
            )
        form, pull, arrays = self._form(base)
        dW = form()
        dropped = self.dropout(x)
        X = F.rows(dropped.data)
        backend = x.backend
        out = backend.matmul(X, dW.T).reshape(y.shape)  # (N, I) @ (I, O) -> (N, O)
        out += y.data
        if self.map.moves_bias and base.bias is not None:
            out += self.map.moved_bias(arrays, base.bias.data) - base.bias.data
        shape = x.shape
        need_dx = dropped.requires_grad

        def vjp(dy: Array) -> F.Grads:
            dY = F.rows(dy)
            dx = backend.matmul(dY, dW).reshape(shape) if need_dx else None
            return dx, dy, *pull(X, dY)

        return record(out, (dropped, y, *self._trained()), vjp)

    def _trained(self) -> list[Parameter]:
        return [p for p in self.theta if not p.fixed]

    def _form(self, base: LinearBase) -> tuple[Any, Any, list[Array]]:
        """(the function that forms dW, the function X, dY -> dL/dtheta, the arrays of theta).

        X (N, I) and dY (N, O) are the layer's inputs and the gradients of its outputs, by rows.
        """
        map = self.map
        backend = base.backend
        arrays = [p.data for p in self.theta]
        W = base.dense_weight() if map.reads_W else None
        b = base.bias.data if map.moves_bias and base.bias is not None else None

        def pull(X: Array, dY: Array) -> F.Grads:
            G = backend.matmul(dY.T, X)  # (O, N) @ (N, I) -> (O, I)
            grads = tuple(map.pull(arrays, W, G))
            if b is not None:
                through_bias = map.pull_bias(arrays, b, dY.sum(axis=0))
                grads = tuple(g + more for g, more in zip(grads, through_bias, strict=True))
            return grads

        return functools.partial(map.delta, arrays, W), pull, arrays

    def write_effective_weight(self, W: Array, base: LinearBase | None = None) -> Formed:
        """Add dW to W (O, I) in place; returns (trained parameters, X, dY -> their gradients)."""
        assert base is not None
        form, pull, _ = self._form(base)
        W += form()
        return tuple(self._trained()), Pull(pull)

    def move_bias(self, bias: Any) -> Any:
        """The layer's bias (O,) with this adapter, as a Tensor without a gradient."""
        if bias is None or not self.map.moves_bias:
            return bias
        return Tensor(self.map.moved_bias([p.data for p in self.theta], bias.data))

    def wide_theta(self) -> list[Array]:
        """The arrays of theta in float64 on the host."""
        return [p.numpy().astype(np.float64) for p in self.theta]

    def delta_weight(self, W: Array) -> Array:
        """dW (O, I) for the base's weight W (O, I), in the dtype of W."""
        return self.map.delta([p.data.astype(W.dtype) for p in self.theta], W)

    def part(self, W: Array | None = None) -> Dense:  # type: ignore[override]
        """dW in float64 on the host, for merging. W (O, I) is the base's weight as stored."""
        return dense_part(self.map, self.wide_theta(), W)


def dense_part(map: Map, theta: list[Array], W: Array | None) -> Dense:
    """dW (O, I) in float64, for theta in float64 and W (O, I) as stored.

    ConfigError if the map reads W and W is None.
    """
    wide = None
    if map.reads_W:
        if W is None:
            raise ConfigError(f"{map.config.title}: dW of {map.path} depends on the base's weight")
        wide = widen(W).astype(np.float64)
    with np.errstate(all="ignore"):
        return Dense(map.delta(theta, wide))
