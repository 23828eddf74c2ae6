"""Layers: parameters with names, and the few modules a transformer is made of.

A Module is a plain object. Its parameters, sub-modules, and lists or dictionaries of sub-modules are found by looking
at its attributes, in the order in which they were assigned; nothing is registered. Calling a module computes its
output.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import functional as F
from .autograd import Tensor, concat, grad_enabled, gradients, no_grad, record, stack
from .backend import Array, Backend, get_backend, mix_key
from .effective import EffectiveWeight, Parts, Pull, effective_linear

_thread = threading.local()
_recomputed = itertools.count(1)


class Parameter(Tensor):
    """A leaf that training may change. It requires a gradient unless it is frozen, and cannot if it is `fixed`."""

    __slots__ = ()
    fixed = False

    def __init__(self, data: Array, requires_grad: bool = True):
        super().__init__(data, requires_grad=requires_grad)

    def move(self, backend: Backend, dtype: Any) -> None:
        """Give the parameter new storage, on another device or in another dtype."""
        self._data = backend.from_numpy(self.numpy().astype(dtype, copy=False))
        self.backend, self.grad = backend, None
        assert self.version is not None
        self.version[0] += 1


class Module:
    """Something with parameters. `training` switches dropout, and nothing else."""

    training = True

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of what stands directly below; an attribute that begins with _ is no part of the tree."""
        for name, value in vars(self).items():
            if name.startswith("_"):
                continue
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, (list, dict)):
                for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{key}", item

    def __repr__(self) -> str:
        """One line a module: its path, by which an adapter can target it, and the shapes of its own parameters."""
        lines = [type(self).__name__]
        for path, module in self.named_modules():
            shapes = {
                name: list(p.shape) for name, p in vars(module).items() if isinstance(p, Parameter)
            }
            lines += [f"  {path}: {type(module).__name__} {shapes or ''}".rstrip()] if path else []
        return "\n".join(lines)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module (path "") and all below it, parents first."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter), each parameter once: a tied one under its first name."""
        seen = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def parameters(self) -> Iterator[Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def train(self, mode: bool = True) -> Any:
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Any:
        return self.train(False)

    def to(self, device: str | Backend | None = None, dtype: Any = None) -> Any:
        """Move every parameter to a device, or to a float dtype, in place; returns the module."""
        for p in self.parameters():
            backend = p.backend if device is None else get_backend(device)
            if backend is not p.backend or (dtype is not None and p.dtype != np.dtype(dtype)):
                p.move(backend, dtype or p.dtype)
        return self

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        """What is to be done once before a step's shards run forward, over `tokens` positions; in any order, by anyone.

        Many tokens if None. Weights must not change before `end_step`.
        """
        for _, child in self.named_children():
            yield from child.preparations(tokens)

    def prepare_step(self, tokens: int | None = None) -> None:
        """Compute what the shards of a step share."""
        for prepare in self.preparations(tokens):
            prepare()

    def end_step(self) -> None:
        """Called when the step is over; a layer drops what it prepared."""
        for _, child in self.named_children():
            child.end_step()


def replace_module(model: Module, path: str, module: Module) -> None:
    """Put `module` at `path`, a way through attributes and lists."""
    owner: Any = model
    *way, last = path.split(".")
    for name in way:
        owner = owner[int(name)] if isinstance(owner, list) else getattr(owner, name)
    if isinstance(owner, list):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)


class LinearBase(Module):
    """What an adapter can be put on: a linear map whose weight may be stored in any way.

    in_features, out_features    I and O
    bias                         (O,) or None
    dtype, backend               of what it computes in, and where
    trainable                    does the weight itself require a gradient?
    running                      the adapters that the next forward applies: none of its own
    """

    in_features: int
    out_features: int
    bias: Parameter | None
    weight: Parameter
    trainable: bool
    running: Sequence[Any] = ()

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @property
    def backend(self) -> Backend:
        return self.weight.backend

    def dense_weight(self) -> Array:
        """W (O, I) as an array, decoded where it is stored in another way."""
        raise NotImplementedError

    def effective(self, out: Array, tokens: int | None) -> Parts | None:
        """Write the weight that this layer has in a step over `tokens` positions into `out` (O, I).

        Returns the parameters that it was formed of, with their pulls, or None: the layer must run on its own.
        """
        return None

    def rebuilt(self, weight: Array) -> LinearBase:
        """A frozen layer over another weight (O, I), stored as this one stores its own; the bias is shared."""
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

    def effective(self, out: Array, tokens: int | None) -> Parts | None:
        out[...] = self.weight.data
        return [((self.weight,), Pull(lambda X, dY: (dY.T @ X,)))] if self.trainable else []

    def rebuilt(self, weight: Array) -> Linear:
        return frozen_linear(weight, self)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def frozen_linear(weight: Array, like: LinearBase) -> Linear:
    """A dense layer over `weight` (O, I), which is frozen, with the bias and the mode of `like`."""
    dense = Linear(weight)
    dense.weight.requires_grad = False
    dense.bias, dense.training = like.bias, like.training
    return dense


def prepare_effective_weight(
    layers: Sequence[Any], tokens: int | None, stacked: bool = False
) -> EffectiveWeight | None:
    """What layers that share an input are in a step over `tokens` positions; None if one must run on its own."""
    first, at = layers[0], 0
    weight = first.backend.xp.empty(
        (sum(layer.out_features for layer in layers), first.in_features), first.dtype
    )
    formed = []
    for layer in layers:
        parts = layer.effective(weight[at : at + layer.out_features], tokens)
        if parts is None:
            return None
        formed.append((layer.out_features, layer.bias, parts))
        at += layer.out_features
    return EffectiveWeight(weight, formed, stacked)


class FusedProjection(Module):
    """A module in which the layers of the attributes `fan` share an input; `project(x)` is their outputs side by side.

    During a step that is one product. The plain model takes the same way as one with adapters, so both give equal bits.
    """

    fan: tuple[str, ...]
    stacked = (
        False  # or in a new first axis, for layers of equal size whose outputs are read one by one
    )
    _effective: Mapping[Any, EffectiveWeight | None] = {}  # during a step, by what runs

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        layers = [getattr(self, name) for name in self.fan]

        def prepare() -> None:
            made = prepare_effective_weight(layers, tokens, self.stacked)
            self._effective = {**self._effective, tuple(layer.running for layer in layers): made}
            for layer in layers if made is None else ():
                layer.prepare_step(tokens)

        yield prepare
        for name, child in self.named_children():
            if name not in self.fan:
                yield from child.preparations(tokens)

    def end_step(self) -> None:
        super().end_step()
        self._effective = {}

    def project(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., sum of O_i), or stacked (n, ..., O)"""
        layers = [getattr(self, name) for name in self.fan]
        if (ready := self._effective.get(tuple(layer.running for layer in layers))) is not None:
            return effective_linear(x, ready)
        outputs = [layer(x) for layer in layers]
        return stack(outputs) if self.stacked else concat(outputs, axis=-1)


class Embedding(Module):
    """One row of weight (V, C) a token."""

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
def dropout_counter(seed: int, step: int, first: int = 0) -> Iterator[None]:
    """Inside, this thread's dropout masks are those of training step `step`, for sequences `first`, `first` + 1, ...

    A mask is then a function of (seed, step, layer, sequence), whichever thread runs whichever part of a batch.
    """
    before = getattr(_thread, "counter", None)
    _thread.counter = (seed, step, first)
    try:
        yield
    finally:
        _thread.counter = before


class Dropout(Module):
    """Zero elements with probability p while training.    `stream` is a number that no other layer has

    Outside a `dropout_counter` each call counts as a step of its own, so that a hand-written loop gets fresh masks.
    """

    def __init__(self, p: float, stream: int = 0):
        self.p = p
        self.stream = stream
        self.calls = 0

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def __call__(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        counter = getattr(_thread, "counter", None)
        if counter is None:
            counter = (0, self.calls, 0)
            self.calls += 1
        seed, step, first = counter
        return F.dropout(x, self.p, mix_key(seed, self.stream, step), first)


def checkpoint(function: Callable[[Tensor], Tensor], x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """function(x), of which nothing but x is kept: backward runs it again (Chen et al. 2016). The same bits, for less.

    params   the leaves inside that require a gradient
    """
    if not grad_enabled() or not (x.requires_grad or params):
        return function(x)
    seed, step, first = getattr(_thread, "counter", None) or (
        0,
        next(_recomputed),
        0,
    )  # dropout must fall alike twice
    X, need_dx, values, here = (
        x.data,
        x.requires_grad,
        [p.data for p in params],
        contextvars.copy_context(),
    )
    with no_grad(), dropout_counter(seed, step, first):
        y = function(x).data

    def vjp(dy: Array) -> F.Grads:
        leaf = Tensor(X, need_dx)
        with dropout_counter(seed, step, first):
            again = here.run(function, leaf)  # with the adapters of that time
        assert len(values) == len(
            params
        )  # named here, so that a change of them is noticed: see `record`'s guards
        return tuple(
            gradients(again, [leaf, *params], dy)
            if again.requires_grad
            else [None] * (1 + len(params))
        )

    return record(y, (x, *params), vjp)


def run_blocks(blocks: Sequence[Any], x: Tensor, cache: Any, recompute: bool) -> Tensor:
    """One block of a decoder after another, `block(x, cache)`; with `recompute` each keeps nothing but its x."""
    for block in blocks:
        if recompute and cache is None:
            x = checkpoint(block, x, [p for p in block.parameters() if p.requires_grad])
        else:
            x = block(x, cache)
    return x


def uniform(
    rng: np.random.Generator, bound: float, shape: tuple[int, ...], dtype: Any = np.float32
) -> np.ndarray:
    """Values from U(-bound, bound); drawn in float64 and rounded, so that every dtype starts from the same numbers."""
    return rng.uniform(-bound, bound, shape).astype(dtype)


def normal(
    rng: np.random.Generator | None, std: float, shape: tuple[int, ...], dtype: Any = np.float32
) -> np.ndarray:
    """Values from N(0, std^2). Without a generator zeros, which cost nothing until a file fills them."""
    return (
        np.zeros(shape, dtype) if rng is None else (rng.standard_normal(shape) * std).astype(dtype)
    )


def random_linear(
    rng: np.random.Generator | None, std: float, inputs: int, outputs: int, bias: bool
) -> Linear:
    """A layer as training begins: weight from N(0, std^2), bias zero."""
    return Linear(
        normal(rng, std, (outputs, inputs)), np.zeros(outputs, np.float32) if bias else None
    )
