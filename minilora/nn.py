"""Layers: parameters with names, and the few modules that make up a transformer.

A Module is a plain object. Its parameters, sub-modules, and lists or dictionaries of sub-modules
are its attributes, in the order of assignment; nothing is registered. Calling a module computes its
output.
"""

from __future__ import annotations

import contextlib
import contextvars
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
from .backend import Array, Backend, Shape, get_backend, mix_key
from .effective import EffectiveWeight, Parts, Pull, effective_linear
from .errors import GraphError
from .graph import leaf_gradients
from .precision import FLOAT32, check_compute

_thread = threading.local()
_recomputed = itertools.count(1)


class Parameter(Tensor):
    """A leaf that training may change.

    It requires a gradient unless it is frozen, and cannot require one if it is `fixed`.
    """

    __slots__ = ()
    fixed = False
    is_parameter = True

    def __init__(self, data: Array, requires_grad: bool = True):
        super().__init__(data, requires_grad=requires_grad)

    def move(self, backend: Backend, dtype: Any) -> None:
        """Give the parameter new storage, on another device or in another dtype."""
        self._array = backend.from_numpy(self.numpy().astype(dtype, copy=False))
        self.backend = backend
        self.grad = None
        assert self.version is not None
        self.version[0] += 1


class Module:
    """Anything with parameters. `training` switches dropout, and nothing else."""

    training = True

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of each direct child. Attributes that begin with _ are not children."""
        for name, value in vars(self).items():
            if name.startswith("_"):
                continue
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, (list, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    if isinstance(item, Module):
                        yield f"{name}.{key}", item

    def __repr__(self) -> str:
        """One line per module: its path, which adapters can target, and its parameters' shapes."""
        lines = [type(self).__name__]
        for path, module in self.named_modules():
            parameters = vars(module).items()
            shapes = {name: list(p.shape) for name, p in parameters if isinstance(p, Parameter)}
            if path:
                lines.append(f"  {path}: {type(module).__name__} {shapes or ''}".rstrip())
        return "\n".join(lines)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module (path "") and all below it, parents first."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter), each parameter once: a tied one under its first path."""
        seen = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def parameters(self) -> Iterator[Parameter]:
        """The parameters of `named_parameters`."""
        for _, parameter in self.named_parameters():
            yield parameter

    def train(self, mode: bool = True) -> Any:
        """Set `training` of this module and all below it; returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Any:
        """`train(False)`."""
        return self.train(False)

    def to(self, device: str | Backend | None = None, dtype: Any = None) -> Any:
        """Move every parameter to a device, or to a float dtype, in place; returns the module."""
        if dtype is not None:
            for _, module in self.named_modules():
                if isinstance(module, LinearBase):
                    check_compute(module.compute, np.dtype(dtype))
        for p in self.parameters():
            backend = p.backend if device is None else get_backend(device)
            new_dtype = np.dtype(dtype or p.dtype)
            if backend is not p.backend or p.dtype != new_dtype:
                p.move(backend, new_dtype)
        return self

    def set_compute(self, compute: str) -> None:
        """Set the arithmetic of the products with the weights of all linear layers.

        "float32" rounds nothing; "tf32" and "bfloat16" round x and W in y = x W^T, and dy and W in
        dx = dy W, and add up in float32 (precision.py). It is for weights that are frozen: what
        belongs to an adapter is computed in float32, so keep adapters unmerged, whose dW rounding
        W + dW would mostly lose. ConfigError, before anything changes, for another name, and for
        one that rounds in a model in float64.
        """
        for _, child in self.named_children():
            child.set_compute(compute)

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        """The functions to call once before a step's shards run forward over `tokens` positions.

        Any thread may call them, in any order. None means many tokens. Weights must not change
        before `end_step`.
        """
        for _, child in self.named_children():
            yield from child.preparations(tokens)

    def prepare_step(self, tokens: int | None = None) -> None:
        """Compute what the shards of a step share."""
        for prepare in self.preparations(tokens):
            prepare()

    def end_step(self) -> None:
        """Drop what was prepared: the step is over."""
        for _, child in self.named_children():
            child.end_step()


def replace_module(model: Module, path: str, module: Module) -> None:
    """Put `module` at `path`, which leads through attributes and lists."""
    parent: Any = model
    *names, last = path.split(".")
    for name in names:
        parent = parent[int(name)] if isinstance(parent, list) else getattr(parent, name)
    if isinstance(parent, list):
        parent[int(last)] = module
    else:
        setattr(parent, last, module)


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

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Linear(LinearBase):
    """y = x W^T + b    weight (O, I), bias (O,) or None"""

    def __init__(self, weight: Array, bias: Array | None = None):
        self.weight = Parameter(weight)
        self.bias = None if bias is None else Parameter(bias)
        self.out_features, self.in_features = self.weight.shape

    @property
    def trainable(self) -> bool:  # type: ignore[override]
        return self.weight.requires_grad

    def dense_weight(self) -> Array:
        return self.weight.data

    def write_effective_weight(self, out: Array, tokens: int | None) -> Parts | None:
        if self.compute != FLOAT32:
            return None
        out[...] = self.weight.data
        matmul = self.backend.matmul
        return [((self.weight,), Pull(lambda X, dY: (matmul(dY.T, X),)))] if self.trainable else []

    def rebuilt(self, weight: Array) -> Linear:
        return frozen_linear(weight, self)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias, self.compute)


def frozen_linear(weight: Array, like: LinearBase) -> Linear:
    """A dense layer of the frozen `weight` (O, I), with the bias and the mode of `like`."""
    dense = Linear(weight)
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
    """One row of weight (V, C) per token."""

    def __init__(self, weight: Array):
        self.weight = Parameter(weight)

    def __call__(self, ids: Array) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight    x (..., C), weight (C,)"""

    def __init__(self, weight: Array, eps: float = 1e-6):
        self.weight = Parameter(weight)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias    x (..., C), weight and bias (C,)"""

    def __init__(self, weight: Array, bias: Array, eps: float = 1e-5):
        self.weight = Parameter(weight)
        self.bias = Parameter(bias)
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
        found = {id(p): g for p, g in leaf_gradients(again, dy, retain_graph=False)}
        grads = tuple(found.pop(id(p), None) for p in (leaf, *params))
        if found:
            raise GraphError(
                f"the function of checkpoint reads {len(found)} leaves that require a gradient and "
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
