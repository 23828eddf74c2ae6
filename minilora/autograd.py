"""A tiny reverse-mode autograd: `Tensor`, the graph it leaves behind, and the elementary algebra.

One operation is one plain function. It computes forward on arrays, decides what backward will need, and hands `record`
a nested `vjp(dy)`, the vector-Jacobian product: from the gradient of its output to the gradients of its inputs.
Two rules keep memory small and the code honest: a `vjp` captures arrays, shapes and scalars but never a Tensor, and a
`Node` holds its parents and its `vjp` but never the forward value. An array lives only while a backward will read it.

Contents: the graph (Node, record, gradients) - Tensor - arithmetic - functions - reductions - shapes - products.
"""

from __future__ import annotations

import contextlib
import contextvars
import heapq
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .backend import Array, Backend, backend_of, get_backend
from .errors import DeviceError, GraphError

Vjp = Callable[[Array], "tuple[Array | None, ...]"]
Axis = int | tuple[int, ...] | None

# ---- the graph ------------------------------------------------------------------------------------------------------

_tick = itertools.count()
_thread = threading.local()
# Shown every operation's output, inputs and vjp; only anomaly.py sets it. Threads that copy the context see it, too.
observer: contextvars.ContextVar[Any] = contextvars.ContextVar("observer", default=None)


class Node:
    """A vertex of the graph: where gradients go next (`parents`), and how (`vjp`). Creation order is topological."""

    __slots__ = ("guards", "order", "parents", "vjp")

    def __init__(
        self,
        parents: tuple[Node | Tensor | None, ...],
        vjp: Vjp,
        guards: list[tuple[list[int], int, int]],
    ):
        self.order = next(_tick)
        self.parents = parents  # a Node, a leaf Tensor, or None where no gradient is wanted
        self.vjp = vjp
        self.guards = guards  # (version cell, version then, id of the memory) of every input that can be assigned to

    def __lt__(self, other: Node) -> bool:  # heapq pops the smallest: the youngest node
        return self.order > other.order


def record(data: Array, inputs: tuple[Tensor, ...], vjp: Vjp) -> Tensor:
    """An operation's output. If a gradient can flow to an input, remember how: `vjp(dy)`, aligned with `inputs`."""
    y = Tensor.__new__(Tensor)
    y.backend = backend = inputs[0].backend
    y._data = (
        data if isinstance(data, backend.xp.ndarray) else backend.xp.asarray(data)
    )  # reductions give scalars
    y.grad = y.node = y.version = None
    y.requires_grad = False
    parents, guards, view = [], [], y._data.base is not None
    for t in inputs:
        parents.append((t.node or t) if t.requires_grad else None)
        y.requires_grad |= t.requires_grad
        if t.version is not None:
            owner = t._data if t._data.base is None else _owner(t._data)
            guards.append((t.version, t.version[0], id(owner)))
            if view and _owner(y._data) is owner:  # a view of a leaf changes when the leaf does
                y.version = t.version
    if y.requires_grad:
        y.requires_grad = grad_enabled()
        y.node = Node(tuple(parents), vjp, guards) if y.requires_grad else None
    if watch := observer.get():
        watch(y, inputs, vjp)
    return y


def _owner(array: Array) -> Array:
    while isinstance(array.base, type(array)):
        array = array.base
    return array


def _reads(item: Any, owner: int, array_type: type) -> bool:
    """Does this vjp hold the memory, in its closure or what stands there? Then a change would spoil the gradient."""
    if isinstance(item, array_type):
        return id(_owner(item)) == owner
    inner = item if isinstance(item, (tuple, list)) else getattr(item, "__closure__", None) or ()
    return any(_reads(getattr(i, "cell_contents", i), owner, array_type) for i in inner)


def grad_enabled() -> bool:
    return getattr(_thread, "grad_enabled", True)


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Inside, this thread records nothing: no graph, no activation kept. Also a decorator."""
    before = grad_enabled()
    _thread.grad_enabled = False
    try:
        yield
    finally:
        _thread.grad_enabled = before


def _freed(dy: Array) -> tuple[Array | None, ...]:
    raise GraphError(
        "this graph was freed by an earlier backward: run the forward again, or pass retain_graph=True"
    )


def gradients(
    loss: Tensor, params: Sequence[Tensor], dy: Array | None = None, *, retain_graph: bool = False
) -> list[Array | None]:
    """d loss / d p for every leaf p of `params`, as fresh arrays; None where the loss does not depend on p.

    `dy` is the gradient of the loss itself (1 for a scalar). The accumulators are local to the call, so several threads
    can run it at once over the same parameters. Nodes are visited youngest first, by a heap, without recursion; each is
    freed as it is passed unless `retain_graph`. GraphError if the graph was freed, or a value it needs has changed.
    """
    found = _backward(loss, dy, retain_graph)
    return [found.get(p) for p in params]


def _backward(loss: Tensor, dy: Array | None, retain_graph: bool) -> dict[Tensor, Array]:
    if not loss.requires_grad:
        why = "was it computed under no_grad, or from gradients, which are arrays (there is no second derivative)?"
        raise GraphError(f"the loss depends on no tensor that requires a gradient: {why}")
    if dy is None:
        if loss.size != 1:
            raise GraphError(
                f"backward of a tensor of shape {loss.shape} needs dy of that shape: only a scalar has 1"
            )
        dy = loss.backend.xp.ones_like(loss.data)
    elif isinstance(dy, Tensor) or getattr(dy, "shape", None) != loss.shape:
        raise GraphError(
            f"dy must be an array {loss.shape}, got {type(dy).__name__} {getattr(dy, 'shape', '')}"
        )
    waiting: dict[Node, Array] = {}  # gradients of nodes not visited yet
    leaves: dict[Tensor, Array] = {}
    heap: list[Node] = []

    def arrive(at: Node | Tensor, g: Array) -> None:
        # Add out of place: the first gradient to arrive may be shared with another input (add hands dy to both).
        where: dict[Any, Array] = leaves if isinstance(at, Tensor) else waiting
        if at in where:
            where[at] = where[at] + g
        else:
            where[at] = g
            if isinstance(at, Node):
                heapq.heappush(heap, at)

    arrive(loss.node or loss, dy)
    while heap:
        node = heapq.heappop(heap)
        for version, then, owner in node.guards:
            if version[0] != then and _reads(node.vjp, owner, type(dy)):
                name = node.vjp.__qualname__.split(".")[0]
                raise GraphError(
                    f"a tensor that the backward of '{name}' needs was changed after the forward (version {then} then, "
                    f"{version[0]} now): run backward before the optimiser step, merge or load"
                )
        parents, grads = node.parents, node.vjp(waiting.pop(node))
        if not retain_graph:
            node.vjp, node.parents, node.guards = _freed, (), []
        for parent, g in zip(parents, grads, strict=True) if parents else ():
            if parent is not None and g is not None:
                arrive(parent, g)
    seen = {id(dy)}
    for leaf, g in leaves.items():
        if (
            type(g) is not type(leaf.data)
            or g.base is not None
            or id(g) in seen
            or g.dtype != leaf.dtype
        ):
            g = leaf.backend.xp.array(
                g, dtype=leaf.dtype
            )  # a NumPy scalar, a view, or shared with another leaf
        seen.add(id(g))
        leaves[leaf] = g
    return leaves


# ---- Tensor ---------------------------------------------------------------------------------------------------------


class Tensor:
    """An array that can remember where it came from.

    data            array or nested list; Python floats become float32, an array keeps its dtype
    requires_grad   True makes a leaf: `backward` leaves its gradient in `.grad`
    """

    __slots__ = ("__weakref__", "_data", "backend", "grad", "node", "requires_grad", "version")
    __array_priority__ = 1000  # NumPy hands `array + tensor` to Tensor.__radd__
    backend: Backend
    grad: Array | None
    node: Node | None
    version: (
        list[int] | None
    )  # a cell shared with the graph: how often a leaf's data was changed through minilora

    def __init__(
        self,
        data: Any,
        requires_grad: bool = False,
        dtype: Any = None,
        device: str | Backend | None = None,
    ):
        version = (
            data.version if isinstance(data, Tensor) else None
        )  # the same storage has the same version
        if isinstance(data, Tensor):
            data = data.data
        if isinstance(data, np.generic):  # what NumPy makes of a 0-d array
            data = np.asarray(data)
        elif isinstance(data, (int, float, list, tuple)):
            data = np.asarray(data)
            if dtype is None and data.dtype == np.float64:
                dtype = np.float32
        self.backend = backend_of(data)
        if device is not None and get_backend(device) is not self.backend:
            data = get_backend(device).from_numpy(self.backend.to_numpy(data))
            self.backend = get_backend(device)
        self._data = data if dtype is None else data.astype(dtype, copy=False)
        if requires_grad and self._data.dtype.kind != "f":
            raise TypeError(
                f"only floating tensors can require a gradient, this one is {self._data.dtype}"
            )
        self.requires_grad = requires_grad
        self.grad = self.node = None
        self.version = version or [0]

    @property
    def data(self) -> Array:
        return self._data

    @data.setter
    def data(self, value: Array) -> None:
        """Copy into this tensor's own storage: views of it, and the optimiser's, stay valid. Same shape and dtype."""
        if self.version is None or self.node is not None:
            raise GraphError(
                "only a leaf's data can be assigned; this tensor is the result of an operation"
            )
        if value.shape != self._data.shape or value.dtype != self._data.dtype:
            raise ValueError(
                f"cannot assign {value.shape} {value.dtype} to data of {self.shape} {self.dtype}"
            )
        self._data[...] = value
        self.version[0] += 1

    def take(self, at: Any) -> Array:
        """Rows of the data, by a slice or by their numbers; of a parameter held in another way these rows alone."""
        return (
            self._data[at]
            if isinstance(at, slice)
            else self.backend.xp.take(self._data, at, axis=0)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._data.shape)

    @property
    def dtype(self) -> Any:
        return self._data.dtype

    @property
    def ndim(self) -> int:
        return int(self._data.ndim)

    @property
    def size(self) -> int:
        return int(self._data.size)

    def __repr__(self) -> str:
        where = "" if self.backend.name == "cpu" else f", device={self.backend.name!r}"
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({np.array2string(self.numpy(), separator=', ', prefix='Tensor(')}{grad}{where})"

    def numpy(self) -> np.ndarray:
        """The values on the host: the array itself on a CPU, a copy from a GPU."""
        return self.backend.to_numpy(self._data)

    def item(self) -> float:
        return self.numpy().item()  # type: ignore[no-any-return]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(
            self._data, dtype=dtype, copy=copy
        )  # a GPU's array refuses: .numpy() says it aloud

    def detach(self) -> Tensor:
        """The same array, without its history. Assigning to it is assigning to this tensor."""
        tensor = Tensor(self)
        tensor.version = self.version
        return tensor

    def to(self, device: str | Backend) -> Tensor:
        """A leaf's copy on another device; itself where it is there already. GraphError for an operation's result."""
        if get_backend(device) is self.backend:
            return self
        if self.node is not None:
            raise GraphError(
                "gradients do not flow between devices: move the leaves, or .detach() first"
            )
        return Tensor(self._data, self.requires_grad, device=device)

    def backward(self, dy: Array | None = None, *, retain_graph: bool = False) -> None:
        """Add d self / d leaf to `.grad` of every leaf that requires a gradient. See `gradients`."""
        for leaf, g in _backward(self, dy, retain_graph).items():
            leaf.grad = g if leaf.grad is None else leaf.grad + g

    # fmt: off
    def __len__(self) -> int: return len(self._data)
    def __float__(self) -> float: return float(self.item())
    def __add__(self, other: Any) -> Tensor: return add(self, other)
    def __radd__(self, other: Any) -> Tensor: return add(other, self)
    def __sub__(self, other: Any) -> Tensor: return sub(self, other)
    def __rsub__(self, other: Any) -> Tensor: return sub(other, self)
    def __mul__(self, other: Any) -> Tensor: return mul(self, other)
    def __rmul__(self, other: Any) -> Tensor: return mul(other, self)
    def __truediv__(self, other: Any) -> Tensor: return div(self, other)
    def __rtruediv__(self, other: Any) -> Tensor: return div(other, self)
    def __pow__(self, other: Any) -> Tensor: return power(self, other)
    def __rpow__(self, other: Any) -> Tensor: return power(other, self)
    def __matmul__(self, other: Any) -> Tensor: return matmul(self, other)
    def __rmatmul__(self, other: Any) -> Tensor: return matmul(other, self)
    def __neg__(self) -> Tensor: return mul(self, -1)
    def __getitem__(self, key: Any) -> Tensor: return index(self, key)
    def exp(self) -> Tensor: return exp(self)
    def log(self) -> Tensor: return log(self)
    def tanh(self) -> Tensor: return tanh(self)
    def sqrt(self) -> Tensor: return sqrt(self)
    def abs(self) -> Tensor: return abs(self)
    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor: return sum(self, axis, keepdims)
    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor: return mean(self, axis, keepdims)
    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor: return max(self, axis, keepdims)
    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor: return min(self, axis, keepdims)
    def reshape(self, *shape: Any) -> Tensor: return reshape(self, *shape)
    def transpose(self, *axes: Any) -> Tensor: return transpose(self, *axes)
    # fmt: on

    @property
    def T(self) -> Tensor:
        return transpose(self)


def operands(*values: Any) -> tuple[Tensor, ...]:
    """Numbers and arrays as Tensors beside the Tensors among them: a number takes the dtype of the first Tensor.

    So a Python or NumPy scalar never turns float32 into float64. DeviceError where two Tensors live on two devices.
    """
    if all(isinstance(v, Tensor) for v in values):
        namespace(*values)
        return values
    like = next((v for v in values if isinstance(v, Tensor)), None)
    if like is None:
        like = next(
            (Tensor(v) for v in values if not isinstance(v, (int, float, np.generic))), Tensor(0.0)
        )
    made = []
    for v in values:
        if not isinstance(v, Tensor):
            scalar = isinstance(v, (int, float, np.generic)) or (
                isinstance(v, np.ndarray) and v.ndim == 0
            )
            dtype = like.dtype if like.dtype.kind == "f" else None  # 2.5 beside integers stays 2.5
            v = Tensor(like.backend.xp.full((), v, dtype)) if scalar else Tensor(v)
        made.append(v)
    namespace(*made)
    return tuple(made)


def namespace(*tensors: Tensor) -> Any:
    """The array module that these tensors share. DeviceError, naming both sides and the cure, where they do not."""
    first = tensors[0].backend
    for t in tensors[1:]:
        if t.backend is not first:
            raise DeviceError(
                f"tensors on {first.name!r} and on {t.backend.name!r}: move one with .to({first.name!r})"
            )
    return first.xp


# ---- arithmetic: every operation broadcasts, so every gradient is summed back to its input's shape -------------------


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which its input of `shape` was broadcast."""
    if g.shape == shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape)))) if g.ndim > len(shape) else g
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True) if stretched else g


def add(a: Any, b: Any) -> Tensor:
    a, b = operands(a, b)
    sa, sb = a.shape, b.shape
    return record(a.data + b.data, (a, b), lambda dy: (unbroadcast(dy, sa), unbroadcast(dy, sb)))


def sub(a: Any, b: Any) -> Tensor:
    a, b = operands(a, b)
    sa, sb = a.shape, b.shape
    return record(a.data - b.data, (a, b), lambda dy: (unbroadcast(dy, sa), unbroadcast(-dy, sb)))


def mul(a: Any, b: Any) -> Tensor:
    a, b = operands(a, b)
    sa, sb = a.shape, b.shape
    A = a.data if b.requires_grad else None
    B = b.data if a.requires_grad else None

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        return None if B is None else unbroadcast(dy * B, sa), None if A is None else unbroadcast(
            dy * A, sb
        )

    return record(a.data * b.data, (a, b), vjp)


def div(a: Any, b: Any) -> Tensor:
    a, b = operands(a, b)
    sa, sb, B = a.shape, b.shape, b.data
    y = a.data / B
    Y = y if b.requires_grad else None

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        da = dy / B
        return unbroadcast(da, sa), None if Y is None else unbroadcast(-da * Y, sb)

    return record(y, (a, b), vjp)


def power(a: Any, b: Any) -> Tensor:
    """a ** b. Where a is 0 the gradient of b is 0 (the limit for b > 0)."""
    a, b = operands(a, b)
    xp, sa, sb, A, B = namespace(a, b), a.shape, b.shape, a.data, b.data
    y = A**B
    Y, B = (y if b.requires_grad else None), (B if a.requires_grad else None)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        # b a^(b-1) is 0 for b = 0, also at a = 0 or infinity: a^0 is 1 everywhere.
        da = unbroadcast(dy * B * A ** xp.where(B == 0, 0, B - 1), sa) if B is not None else None
        db = None if Y is None else unbroadcast(dy * Y * xp.log(xp.where(A == 0, 1, A)), sb)
        return da, db

    return record(y, (a, b), vjp)


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of two, elementwise; where they are equal, each gets half of the gradient."""
    a, b = operands(a, b)
    xp, sa, sb = namespace(a, b), a.shape, b.shape
    share = ((a.data > b.data) + 0.5 * (a.data == b.data)).astype(a.dtype)
    y = xp.maximum(a.data, b.data)
    return record(
        y, (a, b), lambda dy: (unbroadcast(dy * share, sa), unbroadcast(dy * (1 - share), sb))
    )


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of two, elementwise; where they are equal, each gets half of the gradient."""
    a, b = operands(a, b)
    return mul(maximum(mul(a, -1), mul(b, -1)), -1)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition holds, b elsewhere. The condition, an array or Tensor of booleans, has no gradient."""
    a, b = operands(a, b)
    xp, sa, sb = namespace(a, b), a.shape, b.shape
    condition = condition if isinstance(condition, Tensor) else Tensor(xp.asarray(condition))
    C = condition.data
    return record(
        xp.where(C, a.data, b.data),
        (condition, a, b),
        lambda dy: (None, unbroadcast(xp.where(C, dy, 0), sa), unbroadcast(xp.where(C, 0, dy), sb)),
    )


# ---- functions of one tensor: the derivative is written in y where that is shorter -----------------------------------


def exp(x: Tensor) -> Tensor:
    y = namespace(x).exp(x.data)
    return record(y, (x,), lambda dy: (dy * y,))


def log(x: Tensor) -> Tensor:
    X = x.data
    return record(namespace(x).log(X), (x,), lambda dy: (dy / X,))


def tanh(x: Tensor) -> Tensor:
    y = namespace(x).tanh(x.data)
    return record(y, (x,), lambda dy: (dy * (1 - y * y),))


def sqrt(x: Tensor) -> Tensor:
    y = namespace(x).sqrt(x.data)
    return record(y, (x,), lambda dy: (dy / (2 * y),))


def abs(x: Tensor) -> Tensor:
    """|x|, with gradient 0 at 0."""
    xp, X = namespace(x), x.data
    return record(xp.abs(X), (x,), lambda dy: (dy * xp.sign(X),))


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """x held within [low, high]; the gradient passes where low <= x <= high."""
    inside = (x.data >= low) & (x.data <= high)
    return record(
        namespace(x).clip(x.data, float(low), float(high)), (x,), lambda dy: (dy * inside,)
    )


# ---- reductions -----------------------------------------------------------------------------------------------------


def _spread(g: Array, shape: tuple[int, ...], axis: Axis, keepdims: bool) -> Array:
    """The gradient (or result) of a reduction over `axis`, with the reduced axes put back as 1: ready to broadcast."""
    axes = (
        range(len(shape))
        if axis is None
        else [i % len(shape) for i in ((axis,) if isinstance(axis, int) else axis)]
    )
    return g if keepdims else g.reshape([1 if i in axes else n for i, n in enumerate(shape)])


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    xp, shape = namespace(x), x.shape
    y = x.data.sum(axis=axis, keepdims=keepdims)
    return record(y, (x,), lambda dy: (xp.broadcast_to(_spread(dy, shape, axis, keepdims), shape),))


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    y = sum(x, axis, keepdims)
    if y.size > x.size:
        raise ValueError(f"the mean of no values: shape {x.shape}, axis {axis}")
    return mul(y, y.size / x.size) if x.size else y


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest along `axis`; equal ones share the gradient evenly."""
    X, shape = x.data, x.shape
    y = X.max(axis=axis, keepdims=keepdims)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        hit = _spread(y, shape, axis, keepdims) == X
        return (
            hit
            * (
                _spread(dy, shape, axis, keepdims)
                / hit.sum(axis=axis, keepdims=True).astype(X.dtype)
            ),
        )

    return record(y, (x,), vjp)


def min(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest along `axis`; equal ones share the gradient evenly."""
    return mul(max(mul(x, -1), axis, keepdims), -1)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def reshape(x: Tensor, *shape: Any) -> Tensor:
    before = x.shape
    return record(x.data.reshape(*shape), (x,), lambda dy: (dy.reshape(before),))


def transpose(x: Tensor, *axes: Any) -> Tensor:
    """Permute the axes, given one by one or as a tuple; without axes, reverse them."""
    order = (
        axes[0]
        if axes and isinstance(axes[0], (tuple, list))
        else axes or tuple(reversed(range(x.ndim)))
    )
    back = tuple(int(i) for i in np.argsort([i % x.ndim for i in order]))
    return record(x.data.transpose(order), (x,), lambda dy: (dy.transpose(back),))


def broadcast_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    before = x.shape
    return record(
        namespace(x).broadcast_to(x.data, shape), (x,), lambda dy: (unbroadcast(dy, before),)
    )


def index(x: Tensor, key: Any) -> Tensor:
    """x[key] for slices, integers, integer arrays and masks. An element taken twice gets both gradients."""
    xp, backend, shape, size = namespace(x), x.backend, x.shape, x.size
    parts = key if isinstance(key, tuple) else (key,)
    basic = all(
        k is None or k is Ellipsis or isinstance(k, (int, slice, np.integer)) for k in parts
    )
    if not basic:  # lists and NumPy arrays go where x is, once for both directions; an empty list holds integers
        there = (
            np.asarray(k, None if np.size(k) else np.intp) if isinstance(k, list) else k
            for k in parts
        )
        key = tuple(backend.from_numpy(k) if isinstance(k, np.ndarray) else k for k in there)

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        if basic:
            dx = xp.zeros(shape, dy.dtype)
            dx[key] = dy
            return (dx,)
        taken = (
            xp.arange(size).reshape(shape)[key].reshape(-1)
        )  # which elements of x, by flat position
        return (backend.add_rows(taken, dy.reshape(-1, 1), size).reshape(shape),)

    return record(x.data[key], (x,), vjp)


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    tensors = operands(*tensors)
    xp = namespace(*tensors)
    cuts = list(itertools.accumulate(t.shape[axis] for t in tensors[:-1]))
    y = xp.concatenate([t.data for t in tensors], axis=axis)
    return record(y, tensors, lambda dy: tuple(xp.split(dy, cuts, axis=axis)))


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    tensors = operands(*tensors)
    xp = namespace(*tensors)
    y = xp.stack([t.data for t in tensors], axis=axis)
    return record(y, tensors, lambda dy: tuple(xp.moveaxis(dy, axis, 0)))


# ---- products -------------------------------------------------------------------------------------------------------


def matmul(a: Any, b: Any) -> Tensor:
    """a @ b    (..., M, K) @ (..., K, N) -> (..., M, N), broadcasting in front; a 1-d operand is a row, or a column."""
    a, b = operands(a, b)
    sa, sb = a.shape, b.shape
    A = a.data[None, :] if a.ndim == 1 else a.data  # (..., M, K)
    B = b.data[:, None] if b.ndim == 1 else b.data  # (..., K, N)
    y = a.data @ b.data
    full = (*y.shape[: y.ndim - (len(sa) > 1) - (len(sb) > 1)], A.shape[-2], B.shape[-1])
    kept_A, kept_B = (A if b.requires_grad else None), (B if a.requires_grad else None)
    shape_A, shape_B = A.shape, B.shape

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        dY = dy.reshape(full)
        da = (
            None
            if kept_B is None
            else unbroadcast(dY @ kept_B.swapaxes(-1, -2), shape_A).reshape(sa)
        )
        db = (
            None
            if kept_A is None
            else unbroadcast(kept_A.swapaxes(-1, -2) @ dY, shape_B).reshape(sb)
        )
        return da, db

    return record(y, (a, b), vjp)
