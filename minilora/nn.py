"""Layers: linear maps, what prepares their weights for a step, and the others of a network.

A layer is made from its arrays, as files have them, or from its sizes, as in torch: Linear(4, 3).
Then its first values are random: see `manual_seed`. Modules and parameters are in modules.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import functional as F
from .arguments import check_probability
from .autograd import Tensor, concat, grad_enabled, no_grad, record, stack
from .backend import Array, Backend, Shape, mix_key
from .containers import Sequential as Sequential
from .effective import EffectiveWeight, Parts, Pull, effective_linear
from .errors import ConfigError, GraphError, check_fields, integer_rules
from .functional import mse_loss as mse_loss
from .functional import relu as relu
from .graph import leaf_gradients
from .modules import Module as Module
from .modules import Parameter as Parameter
from .modules import describe_parameters as describe_parameters
from .modules import get_module as get_module
from .modules import replace_module as replace_module
from .precision import FLOAT32, check_compute

_thread = threading.local()
_recomputed = itertools.count(1)


# ---- first values --------------------------------------------------------------------------------

_first_values = np.random.default_rng(0)


def manual_seed(seed: int) -> None:
    """Let the first values of layers made from sizes begin again, from `seed`.

    They come from one generator of the process, layer after layer; it starts with seed 0. So a
    program has the same values in each run, and equal layers have different values.
    """
    global _first_values
    _first_values = np.random.default_rng(seed)


def _generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    """The generator that was given, one that begins with a given seed, or that of `manual_seed`."""
    return _first_values if rng is None else np.random.default_rng(rng)


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_sizes(**sizes: Any) -> None:
    """ConfigError unless all are integers of at least 1."""
    check_fields(sizes, integer_rules(*sizes, least=1))


def _parameter(name: str, values: Any, shape: str) -> Parameter:
    """The parameter with these values. ConfigError unless they have as many axes as `shape`."""
    parameter = Parameter(values)
    if parameter.ndim != shape.count(",") + (not shape.endswith(",)")):
        raise ConfigError(f"{name} must have shape {shape}, got {parameter.shape}")
    return parameter


class LinearBase(Module):
    """What an adapter can be put on: a linear map, however its weight is stored.

    in_features, out_features    I and O
    bias                         (O,) or None
    dtype, backend               of its computations
    trainable                    whether the weight itself requires a gradient
    running                      the adapters that the next forward applies: none here
    compute                      the arithmetic of its products: see `Module.set_compute`
    """

    in_features: int
    out_features: int
    bias: Parameter | None
    weight: Parameter
    trainable: bool
    running: Sequence[Any] = ()
    compute = FLOAT32

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @property
    def backend(self) -> Backend:
        return self.weight.backend

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        rounded = "" if self.compute == FLOAT32 else f", compute={self.compute}"
        details = describe_parameters(self, shapes=False)
        return f"{sizes}, bias={self.bias is not None}{rounded}, {details}"

    def _check_dtype(self, dtype: Any) -> None:
        check_compute(self.compute, dtype)

    def set_compute(self, compute: str) -> None:
        check_compute(compute, self.dtype)
        self.compute = compute

    def dense_weight(self) -> Array:
        """W (O, I) as an array, decoded if it is stored in another way."""
        raise NotImplementedError

    def write_effective_weight(self, out: Array, tokens: int | None) -> Parts | None:
        """Write this layer's effective weight W' for a step over `tokens` positions into `out`.

        out (O, I). Returns the parameters that W' was formed from, with their pulls; None if the
        layer has to run by itself, as it does where products are rounded: much of dW is smaller
        than the last bit of W.
        """
        return None

    def rebuilt(self, weight: Array) -> LinearBase:
        """A frozen layer of another weight (O, I), stored in the same way; the bias is shared."""
        raise NotImplementedError


class Linear(LinearBase):
    """y = x W^T + b    weight (O, I), bias (O,) or None

    Linear(weight, bias=None)
    Linear(in_features, out_features, bias=True, rng=None, dtype=np.float32)

    From sizes, weight and bias begin uniform within 1/sqrt(I), as in torch; drawn from `rng`, or
    from the generator of `manual_seed`.
    """

    def __init__(self, *values: Any, **options: Any):
        by_size = "in_features" in options or (values and _is_size(values[0]))
        make = _random_layer if by_size else _given_layer
        try:
            weight, bias = make(*values, **options)
        except TypeError as error:
            got = str(error).partition("() ")[2]
            raise ConfigError(
                f"Linear: {got}: give its sizes, as in Linear(4, 3, bias=True), or its arrays, "
                "as in Linear(weight, bias)"
            ) from None
        self.weight = _parameter("Linear: weight", weight, "(out_features, in_features)")
        self.out_features, self.in_features = self.weight.shape
        self.bias = None if bias is None else Parameter(bias)
        if self.bias is not None and self.bias.shape != (self.out_features,):
            raise ConfigError(
                f"Linear: bias must have shape {(self.out_features,)}, as weight has "
                f"{self.out_features} rows, got {self.bias.shape}"
            )

    @property
    def trainable(self) -> bool:  # type: ignore[override]
        return self.weight.requires_grad

    def dense_weight(self) -> Array:
        return self.weight.data

    def write_effective_weight(self, out: Array, tokens: int | None) -> Parts | None:
        if self.compute != FLOAT32 or not _computes_as(self, Linear):
            return None
        out[...] = self.weight.data
        matmul = self.backend.matmul
        return [((self.weight,), Pull(lambda X, dY: (matmul(dY.T, X),)))] if self.trainable else []

    def rebuilt(self, weight: Array) -> Linear:
        return frozen_linear(weight, self)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias, self.compute)


def _given_layer(weight: Any, bias: Any = None) -> tuple[Any, Any]:
    return weight, bias


def _random_layer(
    in_features: int,
    out_features: int,
    bias: bool = True,
    rng: np.random.Generator | int | None = None,
    dtype: Any = np.float32,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The first values of a layer of these sizes: weight (O, I) and bias (O,) or None."""
    _check_sizes(in_features=in_features, out_features=out_features)
    rng = _generator(rng)
    bound = 1 / math.sqrt(in_features)
    weight = uniform(rng, bound, (out_features, in_features), dtype)
    return weight, uniform(rng, bound, (out_features,), dtype) if bias else None


def _computes_as(layer: Module, kind: Any) -> bool:
    """Does the layer compute what `kind` does, and not what a subclass of it defines?"""
    return getattr(type(layer), "__call__") is kind.__call__  # noqa: B004, B009


def frozen_linear(weight: Array, like: LinearBase) -> Linear:
    """A dense layer of the frozen `weight` (O, I), with the bias and the mode of `like`.

    It computes what `like` does, also if that is a subclass of Linear with a forward of its own.
    """
    dense = Linear(weight)
    if isinstance(like, Linear):
        dense, arrays = copy.copy(like), dense
        dense.weight = arrays.weight
    dense.weight.requires_grad = False
    dense.bias = like.bias
    dense.compute = like.compute
    dense.training = like.training
    return dense


class PreparedModule(Module):
    """A module that runs with an effective weight during a step.

    stacked      the layers' outputs in a new first axis, for layers of equal size that are read
                 one by one; otherwise side by side
    _effective   during a step, the weight for each combination of adapters that may run
    """

    stacked = False
    _effective: Mapping[Any, EffectiveWeight] = {}

    def prepare_weight(self, running: Any, layers: Sequence[Any], tokens: int | None) -> bool:
        """Form the weight of `layers`, which share an input, while the adapters `running` apply.

        It serves a step over `tokens` positions. False if a layer has to run by itself: then the
        module runs without an effective weight.
        """
        first = layers[0]
        rows = sum(layer.out_features for layer in layers)
        weight = first.backend.xp.empty((rows, first.in_features), first.dtype)
        formed = []
        start = 0
        for layer in layers:
            end = start + layer.out_features
            parts = layer.write_effective_weight(weight[start:end], tokens)
            if parts is None:
                return False
            formed.append((layer.out_features, layer.bias, parts))
            start = end
        effective = EffectiveWeight(weight, formed, self.stacked)
        self._effective = {**self._effective, running: effective}
        return True

    def end_step(self) -> None:
        self._effective = {}


class FusedProjection(PreparedModule):
    """A module in which several layers, the attributes named by `projections`, share an input.

    `project(x)` computes their outputs side by side. During a step that is one product, in the
    plain model as in one with adapters, so both give equal bits.
    """

    projections: tuple[str, ...]

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        layers = [getattr(self, name) for name in self.projections]

        def prepare() -> None:
            running = tuple(layer.running for layer in layers)
            if not self.prepare_weight(running, layers, tokens):
                for layer in layers:
                    layer.prepare_step(tokens)

        yield prepare
        for name, child in self.named_children():
            if name not in self.projections:
                yield from child.preparations(tokens)

    def end_step(self) -> None:
        super().end_step()
        for _, child in self.named_children():
            child.end_step()

    def project(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., sum of O_i), or (n, ..., O) if stacked"""
        layers = [getattr(self, name) for name in self.projections]
        weight = self._effective.get(tuple(layer.running for layer in layers))
        if weight is not None:
            return effective_linear(x, weight)
        outputs = [layer(x) for layer in layers]
        return stack(outputs) if self.stacked else concat(outputs, axis=-1)


class Embedding(Module):
    """One row of weight (V, C) per token.

    Embedding(weight), or Embedding(V, C): then from N(0, 1), as in torch; see `manual_seed`.
    """

    def __init__(
        self,
        weight: Array | int,
        embedding_dim: int | None = None,
        rng: np.random.Generator | int | None = None,
    ):
        if _is_size(weight):
            _check_sizes(num_embeddings=weight, embedding_dim=embedding_dim)
            weight = normal(_generator(rng), 1.0, (int(weight), embedding_dim or 0))
        self.weight = _parameter("Embedding: weight", weight, "(num_embeddings, embedding_dim)")

    def __call__(self, ids: Array) -> Tensor:
        return F.embedding(ids, self.weight)


def _or_ones(weight: Any) -> Any:
    """The weight itself, or ones if a size is given."""
    if not _is_size(weight):
        return weight
    _check_sizes(size=weight)
    return np.ones(weight, np.float32)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight    x (..., C), weight (C,), or C for a weight of ones"""

    def __init__(self, weight: Array | int, eps: float = 1e-6):
        self.weight = _parameter("RMSNorm: weight", _or_ones(weight), "(size,)")
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias    x (..., C), weight and bias (C,)

    LayerNorm(C) begins with a weight of ones. Without a bias it begins with zeros.
    """

    def __init__(self, weight: Array | int, bias: Array | None = None, eps: float = 1e-5):
        self.weight = _parameter("LayerNorm: weight", _or_ones(weight), "(size,)")
        bias = self.weight.backend.xp.zeros_like(self.weight.data) if bias is None else bias
        self.bias = _parameter("LayerNorm: bias", bias, "(size,)")
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)


@contextlib.contextmanager
def dropout_counter(seed: int, step: int | Array, first: int = 0, start: int = 0) -> Iterator[None]:
    """Inside, this thread's dropout masks are those of training step `step`.

    They are for sequences `first`, `first` + 1, ... and their positions from `start` on. A mask is
    then a function of (seed, step, layer, sequence, position), whichever thread runs whichever part
    of a batch.

    step   a number, or an array (1,) of uint64 on the model's device, which is read when a mask is
           made, forward and backward. A step that was captured as a CUDA graph can be replayed with
           another number in it, with the masks of that number
    """
    before = getattr(_thread, "counter", None)
    _thread.counter = (seed, step, first, start)
    try:
        yield
    finally:
        _thread.counter = before


class Dropout(Module):
    """Zero elements with probability p while training. `stream` is a number unique to the layer.

    Outside a `dropout_counter` each call counts as another step, so that a hand-written loop gets
    new masks. ConfigError unless 0 <= p <= 1.
    """

    def __init__(self, p: float, stream: int = 0):
        check_probability(p)
        self.p = p
        self.stream = stream
        self.calls = 0

    def extra_repr(self) -> str:
        return f"p={self.p}"

    @property
    def active(self) -> bool:
        """Whether a call changes anything."""
        return self.training and self.p > 0

    def __call__(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        counter = getattr(_thread, "counter", None)
        if counter is None:
            counter = (0, self.calls, 0, 0)
            self.calls += 1
        seed, step, first, start = counter
        before = start * math.prod(x.shape[2:])  # elements of a sequence
        if isinstance(step, x.backend.xp.ndarray):
            return F.dropout(x, self.p, mix_key(seed, self.stream), first, step, before)
        return F.dropout(x, self.p, mix_key(seed, self.stream, step), first, start=before)


class ReLU(Module):
    """max(x, 0)"""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


def checkpoint(function: Callable[[Tensor], Tensor], x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """function(x), of which only x is kept: backward runs it again (Chen et al. 2016). Same bits.

    params   the leaves that the function reads and that require a gradient. In backward,
             GraphError for one that is missing
    """
    if not grad_enabled() or not (x.requires_grad or params):
        return function(x)
    # Both runs must draw the same dropout masks.
    counter = getattr(_thread, "counter", None) or (0, next(_recomputed))
    X = x.data
    need_dx = x.requires_grad
    # The vjp names these arrays, so that a change of them is noticed: see `record`'s guards.
    values = [p.data for p in params]
    context = contextvars.copy_context()
    with no_grad(), dropout_counter(*counter):
        y = function(x).data

    def vjp(dy: Array) -> F.Grads:
        leaf = Tensor(X, need_dx)
        with dropout_counter(*counter):
            again = context.run(function, leaf)  # with the adapters of the first run
        assert len(values) == len(params)
        if not again.requires_grad:
            return (None,) * (1 + len(params))
        rest = {id(p): g for p, g in leaf_gradients(again, dy, retain_graph=False)}
        grads = tuple(rest.pop(id(p), None) for p in (leaf, *params))
        if rest:
            raise GraphError(
                f"the function of checkpoint reads {len(rest)} leaves that require a gradient and "
                "are not among params: their gradients would be lost"
            )
        return grads

    return record(y, (x, *params), vjp)


def run_blocks(blocks: Sequence[Any], x: Tensor, positions: Any, recompute: bool) -> Tensor:
    """The output of a decoder's blocks, one after another: `block(x, positions)`.

    With `recompute` each block keeps nothing but its input.
    """
    for block in blocks:
        if recompute:
            run = functools.partial(block, positions=positions)
            x = checkpoint(run, x, [p for p in block.parameters() if p.requires_grad])
        else:
            x = block(x, positions)
    return x


def uniform(
    rng: np.random.Generator, bound: float, shape: Shape, dtype: Any = np.float32
) -> np.ndarray:
    """Values from U(-bound, bound).

    Drawn in float64 and rounded, so that every dtype starts from the same numbers.
    """
    return rng.uniform(-bound, bound, shape).astype(dtype)


def normal(
    rng: np.random.Generator | None, std: float, shape: Shape, dtype: Any = np.float32
) -> np.ndarray:
    """Values from N(0, std^2).

    Without a generator zeros, which cost nothing until a file fills them.
    """
    if rng is None:
        return np.zeros(shape, dtype)
    return (rng.standard_normal(shape) * std).astype(dtype)


def random_linear(
    rng: np.random.Generator | None, std: float, inputs: int, outputs: int, bias: bool
) -> Linear:
    """A layer for the beginning of training: weight from N(0, std^2), bias zero or None."""
    weight = normal(rng, std, (outputs, inputs))
    return Linear(weight, np.zeros(outputs, np.float32) if bias else None)
