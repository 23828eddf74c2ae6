"""A small reverse-mode autograd: `Tensor`, the graph that its operations record, and the algebra.

One operation is one plain function. It computes the output on arrays, decides what backward will
need, and hands `record` a nested `vjp(dy)`, the vector-Jacobian product: from the gradient of its
output to the gradients of its inputs. Two rules keep memory small: a `vjp` captures arrays, shapes
and scalars but never a Tensor, and a `Node` keeps its parents and its `vjp` but never the output.
An array lives only as long as a backward may read it.

Contents: the graph (Node, record, gradients) - operands - arithmetic - functions - reductions -
shapes - products - Tensor, whose methods these operations are.
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

from .backend import Array, Backend, Shape, backend_of, get_backend
from .errors import DeviceError, GraphError

Grads = tuple[Array | None, ...]  # one for each input of an operation; None where none is wanted
Vjp = Callable[[Array], Grads]
Guard = tuple[list[int], int, int]
Device = str | Backend | None
Axis = int | Shape | None

# ---- the graph -----------------------------------------------------------------------------------

_order = itertools.count()
_thread = threading.local()
# anomaly.py sets a function here that gets every operation's output, inputs and vjp. A thread that
# runs in a copy of the context calls it too.
observer: contextvars.ContextVar[Any] = contextvars.ContextVar("observer", default=None)


class Node:
    """A vertex of the graph: where gradients go next (`parents`) and how (`vjp`).

    parents   for each input its Node, a leaf Tensor, or None where no gradient is wanted
    guards    for each input that can be assigned to: version cell, version then, id of the memory
    order     the order of creation, which is topological
    """

    __slots__ = ("guards", "order", "parents", "vjp")

    def __init__(self, parents: tuple[Node | Tensor | None, ...], vjp: Vjp, guards: list[Guard]):
        self.order = next(_order)
        self.parents = parents
        self.vjp = vjp
        self.guards = guards

    def __lt__(self, other: Node) -> bool:
        return self.order > other.order  # heapq pops the smallest: the youngest node


def record(data: Array, inputs: tuple[Tensor, ...], vjp: Vjp) -> Tensor:
    """The output of an operation as a Tensor, with a Node if a gradient can flow to an input.

    vjp   from dy, the gradient of the output, to the gradients of `inputs`, in their order
    """
    backend = inputs[0].backend
    if not isinstance(data, backend.xp.ndarray):
        data = backend.xp.asarray(data)  # reductions give scalars
    y = Tensor.__new__(Tensor)
    y.backend = backend
    y._data = data
    y.grad = y.node = y.version = None
    y.requires_grad = False
    parents: list[Node | Tensor | None] = []
    guards = []
    is_view = data.base is not None
    for t in inputs:
        parents.append((t.node or t) if t.requires_grad else None)
        y.requires_grad |= t.requires_grad
        if t.version is not None:
            owner = t._data if t._data.base is None else _owner(t._data)
            guards.append((t.version, t.version[0], id(owner)))
            if is_view and _owner(data) is owner:
                y.version = t.version  # a view of a leaf changes when the leaf does
    if y.requires_grad and grad_enabled():
        y.node = Node(tuple(parents), vjp, guards)
    else:
        y.requires_grad = False
    if observe := observer.get():
        observe(y, inputs, vjp)
    return y


def _owner(array: Array) -> Array:
    """The array whose memory `array` is a view of, or `array` itself."""
    while isinstance(array.base, type(array)):
        array = array.base
    return array


def _reads(item: Any, owner: int, array_type: type) -> bool:
    """Whether a vjp's closure, or a value in it, refers to the memory with the id `owner`."""
    if isinstance(item, array_type):
        return id(_owner(item)) == owner
    inner = item if isinstance(item, (tuple, list)) else getattr(item, "__closure__", None) or ()
    return any(_reads(getattr(i, "cell_contents", i), owner, array_type) for i in inner)


def grad_enabled() -> bool:
    """Whether this thread records: False inside `no_grad`."""
    return getattr(_thread, "grad_enabled", True)


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Record nothing in this thread inside the block: no graph, no activation. Also a decorator."""
    before = grad_enabled()
    _thread.grad_enabled = False
    try:
        yield
    finally:
        _thread.grad_enabled = before


def _freed(dy: Array) -> Grads:
    """The vjp of a node that a backward has freed."""
    raise GraphError(
        "this graph was freed by an earlier backward: "
        "run the forward again, or pass retain_graph=True to the earlier one"
    )


def gradients(
    loss: Tensor, params: Sequence[Tensor], dy: Array | None = None, *, retain_graph: bool = False
) -> list[Array | None]:
    """d loss / d p for every leaf p of `params`, as new arrays; None where the loss is independent.

    dy             the gradient of the loss itself; 1 for a scalar
    retain_graph   keep the graph for another backward; otherwise each node is freed once visited

    Nodes are visited youngest first, by a heap and without recursion. All accumulators are local,
    so several threads may call this at once over the same parameters. GraphError if the graph was
    freed, or if a value that backward needs has changed.
    """
    leaves = _backward(loss, dy, retain_graph)
    return [leaves.get(p) for p in params]


def _backward(loss: Tensor, dy: Array | None, retain_graph: bool) -> dict[Tensor, Array]:
    """The gradient of every leaf that the loss depends on. See `gradients`."""
    if not loss.requires_grad:
        raise GraphError(
            "the loss depends on no tensor that requires a gradient: compute it outside no_grad, "
            "and not from gradients, which are arrays (second derivatives are not supported)"
        )
    loss.backend.select()
    if dy is None:
        if loss.size != 1:
            raise GraphError(
                f"backward from shape {loss.shape} needs dy, an array of that shape: "
                "only for a scalar it is 1 by default"
            )
        dy = loss.backend.xp.ones_like(loss.data)
    elif isinstance(dy, Tensor) or getattr(dy, "shape", None) != loss.shape:
        got = f"{type(dy).__name__} {getattr(dy, 'shape', '')}"
        raise GraphError(f"dy must be an array of shape {loss.shape}, got {got}")
    pending: dict[Node, Array] = {}  # gradients of nodes that are not visited yet
    leaves: dict[Tensor, Array] = {}
    heap: list[Node] = []

    def add_gradient(target: Node | Tensor, g: Array) -> None:
        # Add out of place: another input may have the same array (`add` gives dy to both of its).
        sums: dict[Any, Array] = leaves if isinstance(target, Tensor) else pending
        if target in sums:
            sums[target] = sums[target] + g
            return
        sums[target] = g
        if isinstance(target, Node):
            heapq.heappush(heap, target)

    add_gradient(loss.node or loss, dy)
    while heap:
        node = heapq.heappop(heap)
        for version, before, owner in node.guards:
            if version[0] != before and _reads(node.vjp, owner, type(dy)):
                name = node.vjp.__qualname__.split(".")[0]
                raise GraphError(
                    f"a tensor that the backward of '{name}' needs was changed after the forward "
                    f"(version {before} then, {version[0]} now): "
                    "run backward before the optimiser step, merge or load"
                )
        parents = node.parents
        grads = node.vjp(pending.pop(node))
        if not retain_graph:
            node.vjp = _freed
            node.parents = ()
            node.guards = []
        for parent, g in zip(parents, grads, strict=True):
            if parent is not None and g is not None:
                add_gradient(parent, g)
    returned = {id(dy)}
    for leaf, g in leaves.items():
        # A new array is needed for a NumPy scalar, a view, dy itself or what another leaf has.
        is_array = type(g) is type(leaf.data) and g.base is None
        if not is_array or id(g) in returned or g.dtype != leaf.dtype:
            g = leaf.backend.xp.array(g, dtype=leaf.dtype)
        returned.add(id(g))
        leaves[leaf] = g
    return leaves


# ---- operands ------------------------------------------------------------------------------------

_NUMBERS = (int, float, np.generic)
_BASIC = (int, slice, np.integer, type(None), type(...))  # NumPy's basic indexing: a view


def operands(*values: Any) -> tuple[Tensor, ...]:
    """Tensors, numbers and arrays as Tensors; a number takes the dtype of the first Tensor.

    So a Python or NumPy scalar never turns float32 into float64. DeviceError if two are on
    different devices.
    """
    if all(isinstance(v, Tensor) for v in values):
        namespace(*values)
        return values
    like = next((v for v in values if isinstance(v, Tensor)), None)
    if like is None:
        like = next((Tensor(v) for v in values if not isinstance(v, _NUMBERS)), Tensor(0.0))
    dtype = like.dtype if like.dtype.kind == "f" else None  # 2.5 beside integers stays 2.5
    tensors = []
    for v in values:
        if isinstance(v, Tensor):
            tensors.append(v)
        elif isinstance(v, _NUMBERS) or (isinstance(v, np.ndarray) and v.ndim == 0):
            tensors.append(Tensor(like.backend.xp.full((), v, dtype)))
        else:
            tensors.append(Tensor(v))
    namespace(*tensors)
    return tuple(tensors)


def namespace(*tensors: Tensor) -> Any:
    """The array module that these tensors share. DeviceError if they are on different devices."""
    first = tensors[0].backend
    for t in tensors[1:]:
        if t.backend is not first:
            raise DeviceError(
                f"tensors on {first.name!r} and on {t.backend.name!r}: "
                f"move one with .to({first.name!r})"
            )
    return first.xp


# ---- arithmetic: operations broadcast, so gradients are summed back to the shape of the input ----


def unbroadcast(g: Array, shape: Shape) -> Array:
    """Sum a gradient over the axes along which its input of `shape` was broadcast."""
    if g.shape == shape:
        return g
    if g.ndim > len(shape):
        g = g.sum(axis=tuple(range(g.ndim - len(shape))))
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
    sa = a.shape
    sb = b.shape
    A = a.data if b.requires_grad else None
    B = b.data if a.requires_grad else None

    def vjp(dy: Array) -> Grads:
        da = None if B is None else unbroadcast(dy * B, sa)
        db = None if A is None else unbroadcast(dy * A, sb)
        return da, db

    return record(a.data * b.data, (a, b), vjp)


def div(a: Any, b: Any) -> Tensor:
    a, b = operands(a, b)
    sa = a.shape
    sb = b.shape
    B = b.data
    y = a.data / B
    Y = y if b.requires_grad else None

    def vjp(dy: Array) -> Grads:
        da = dy / B
        db = None if Y is None else unbroadcast(-da * Y, sb)
        return unbroadcast(da, sa), db

    return record(y, (a, b), vjp)


def power(a: Any, b: Any) -> Tensor:
    """a ** b, elementwise. Where a is 0 the gradient of b is 0 (the limit for b > 0)."""
    a, b = operands(a, b)
    xp = namespace(a, b)
    sa = a.shape
    sb = b.shape
    A = a.data
    y = A**b.data
    Y = y if b.requires_grad else None
    B = b.data if a.requires_grad else None

    def vjp(dy: Array) -> Grads:
        da = db = None
        if B is not None:
            # b a^(b-1) is 0 for b = 0, also at a = 0 or infinity: a^0 is 1 everywhere.
            da = unbroadcast(dy * B * A ** xp.where(B == 0, 0, B - 1), sa)
        if Y is not None:
            db = unbroadcast(dy * Y * xp.log(xp.where(A == 0, 1, A)), sb)
        return da, db

    return record(y, (a, b), vjp)


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of two, elementwise; where they are equal, each gets half of the gradient."""
    a, b = operands(a, b)
    sa = a.shape
    sb = b.shape
    share = ((a.data > b.data) + 0.5 * (a.data == b.data)).astype(a.dtype)
    y = namespace(a, b).maximum(a.data, b.data)
    return record(
        y, (a, b), lambda dy: (unbroadcast(dy * share, sa), unbroadcast(dy * (1 - share), sb))
    )


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of two, elementwise; where they are equal, each gets half of the gradient."""
    a, b = operands(a, b)
    return mul(maximum(mul(a, -1), mul(b, -1)), -1)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition, an array or Tensor of booleans, is true; b elsewhere."""
    a, b = operands(a, b)
    xp = namespace(a, b)
    sa, sb = a.shape, b.shape
    if not isinstance(condition, Tensor):
        condition = Tensor(xp.asarray(condition))
    C = condition.data

    def vjp(dy: Array) -> Grads:
        return None, unbroadcast(xp.where(C, dy, 0), sa), unbroadcast(xp.where(C, 0, dy), sb)

    return record(xp.where(C, a.data, b.data), (condition, a, b), vjp)


# ---- functions of one tensor: the derivative is written in y where that is shorter ---------------


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
    xp = namespace(x)
    X = x.data
    return record(xp.abs(X), (x,), lambda dy: (dy * xp.sign(X),))


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """x limited to [low, high]; the gradient passes where low <= x <= high."""
    inside = (x.data >= low) & (x.data <= high)
    y = namespace(x).clip(x.data, float(low), float(high))
    return record(y, (x,), lambda dy: (dy * inside,))


# ---- reductions ----------------------------------------------------------------------------------


def _unreduce(g: Array, shape: Shape, axis: Axis, keepdims: bool) -> Array:
    """A reduction's result or gradient with the reduced axes put back with size 1."""
    if keepdims:
        return g
    if axis is None:
        axis = tuple(range(len(shape)))
    elif isinstance(axis, int):
        axis = (axis,)
    reduced = [i % len(shape) for i in axis]
    return g.reshape([1 if i in reduced else n for i, n in enumerate(shape)])


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    expand, shape = namespace(x).broadcast_to, x.shape
    y = x.data.sum(axis=axis, keepdims=keepdims)
    return record(y, (x,), lambda dy: (expand(_unreduce(dy, shape, axis, keepdims), shape),))


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean along `axis`. ValueError for the mean of no values."""
    y = sum(x, axis, keepdims)
    if y.size > x.size:
        raise ValueError(f"the mean of no values: shape {x.shape}, axis {axis}")
    return mul(y, y.size / x.size) if x.size else y


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest along `axis`; equal ones share the gradient evenly."""
    X = x.data
    shape = x.shape
    y = X.max(axis=axis, keepdims=keepdims)

    def vjp(dy: Array) -> Grads:
        is_largest = _unreduce(y, shape, axis, keepdims) == X
        count = is_largest.sum(axis=axis, keepdims=True).astype(X.dtype)
        return (is_largest * (_unreduce(dy, shape, axis, keepdims) / count),)

    return record(y, (x,), vjp)


def min(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest along `axis`; equal ones share the gradient evenly."""
    return mul(max(mul(x, -1), axis, keepdims), -1)


# ---- shapes --------------------------------------------------------------------------------------


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """The same values in another shape, given as a tuple or number by number."""
    before = x.shape
    return record(x.data.reshape(*shape), (x,), lambda dy: (dy.reshape(before),))


def transpose(x: Tensor, *axes: Any) -> Tensor:
    """Permute the axes, given one by one or as a tuple; reverse them if none are given."""
    order: Any = axes or tuple(reversed(range(x.ndim)))
    if axes and isinstance(axes[0], (tuple, list)):
        order = axes[0]
    back = tuple(int(i) for i in np.argsort([i % x.ndim for i in order]))
    return record(x.data.transpose(order), (x,), lambda dy: (dy.transpose(back),))


def broadcast_to(x: Tensor, shape: Shape) -> Tensor:
    before = x.shape
    y = namespace(x).broadcast_to(x.data, shape)
    return record(y, (x,), lambda dy: (unbroadcast(dy, before),))


def index(x: Tensor, key: Any) -> Tensor:
    """x[key] for slices, integers, integer arrays and masks. Gradients of repetitions add up."""
    xp = namespace(x)
    backend = x.backend
    shape = x.shape
    size = x.size
    parts = key if isinstance(key, tuple) else (key,)
    is_basic = all(isinstance(k, _BASIC) for k in parts)
    if not is_basic:
        key = tuple(_move_key(backend, part) for part in parts)  # once for both directions

    def vjp(dy: Array) -> Grads:
        if is_basic:
            dx = xp.zeros(shape, dy.dtype)
            dx[key] = dy
            return (dx,)
        taken = xp.arange(size).reshape(shape)[key]  # flat positions in x
        sums = backend.add_rows(taken.reshape(-1), dy.reshape(-1, 1), size)
        return (sums.reshape(shape),)

    return record(x.data[key], (x,), vjp)


def _move_key(backend: Backend, part: Any) -> Any:
    """A list or NumPy array in a key as an array of `backend`; other parts as they are."""
    if isinstance(part, list):
        part = np.asarray(part, None if np.size(part) else np.intp)  # [] would be floats
    return backend.from_numpy(part) if isinstance(part, np.ndarray) else part


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors joined along an axis that they have."""
    tensors = operands(*tensors)
    xp = namespace(*tensors)
    cuts = list(itertools.accumulate(t.shape[axis] for t in tensors[:-1]))
    y = xp.concatenate([t.data for t in tensors], axis=axis)
    return record(y, tensors, lambda dy: tuple(xp.split(dy, cuts, axis=axis)))


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors joined along a new axis."""
    tensors = operands(*tensors)
    xp = namespace(*tensors)
    y = xp.stack([t.data for t in tensors], axis=axis)
    return record(y, tensors, lambda dy: tuple(xp.moveaxis(dy, axis, 0)))


# ---- products ------------------------------------------------------------------------------------


def matmul(a: Any, b: Any) -> Tensor:
    """a @ b    (..., M, K) @ (..., K, N) -> (..., M, N), broadcasting over the leading axes

    A 1-d operand is a row on the left and a column on the right.
    """
    a, b = operands(a, b)
    sa = a.shape
    sb = b.shape
    A = a.data[None, :] if a.ndim == 1 else a.data  # (..., M, K)
    B = b.data[:, None] if b.ndim == 1 else b.data  # (..., K, N)
    shape_A = A.shape
    shape_B = B.shape
    y = a.data @ b.data
    leading = y.shape[: y.ndim - (len(sa) > 1) - (len(sb) > 1)]
    full = (*leading, shape_A[-2], shape_B[-1])
    A_kept = A if b.requires_grad else None
    B_kept = B if a.requires_grad else None

    def vjp(dy: Array) -> Grads:
        dY = dy.reshape(full)
        da = db = None
        if B_kept is not None:
            da = unbroadcast(dY @ B_kept.swapaxes(-1, -2), shape_A).reshape(sa)
        if A_kept is not None:
            db = unbroadcast(A_kept.swapaxes(-1, -2) @ dY, shape_B).reshape(sb)
        return da, db

    return record(y, (a, b), vjp)


# ---- Tensor --------------------------------------------------------------------------------------


class Tensor:
    """An array that can remember the operation it came from.

    data            array or nested list; Python floats become float32, an array keeps its dtype
    requires_grad   True makes a leaf whose gradient `backward` adds to `.grad`
    dtype, device   to convert and move the data to; TypeError if integers shall require a gradient
    """

    __slots__ = ("__weakref__", "_data", "backend", "grad", "node", "requires_grad", "version")
    __array_priority__ = 1000  # NumPy hands `array + tensor` to Tensor.__radd__
    backend: Backend
    grad: Array | None
    node: Node | None
    # How often a leaf's data was assigned: a list of one number that the graph shares.
    version: list[int] | None

    def __init__(
        self, data: Any, requires_grad: bool = False, dtype: Any = None, device: Device = None
    ):
        self.version = [0]
        if isinstance(data, Tensor):
            if data.version is not None:
                self.version = data.version  # the same storage has the same version
            data = data.data
        elif isinstance(data, np.generic):
            data = np.asarray(data)  # NumPy makes these of 0-d arrays
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
            raise TypeError(f"only floating tensors can require a gradient, not {self._data.dtype}")
        self.requires_grad = requires_grad
        self.grad = self.node = None

    @property
    def data(self) -> Array:
        return self._data

    @data.setter
    def data(self, value: Array) -> None:
        """Copy into this leaf's storage, so views of it stay valid. Same shape and dtype only."""
        if self.version is None or self.node is not None:
            raise GraphError("only a leaf's data can be assigned, not an operation's result")
        if value.shape != self._data.shape or value.dtype != self._data.dtype:
            raise ValueError(
                f"cannot assign {value.shape} {value.dtype} to data of {self.shape} {self.dtype}"
            )
        self._data[...] = value
        self.version[0] += 1

    def take(self, at: Any) -> Array:
        """The rows `at` (a slice or integers); a parameter stored as codes decodes only these."""
        if isinstance(at, slice):
            return self._data[at]
        return self.backend.xp.take(self._data, at, axis=0)

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", prefix="Tensor(")
        grad = ", requires_grad=True" if self.requires_grad else ""
        device = "" if self.backend.name == "cpu" else f", device={self.backend.name!r}"
        return f"Tensor({values}{grad}{device})"

    def numpy(self) -> np.ndarray:
        """The values on the host: the array itself on a CPU, a copy from a GPU."""
        return self.backend.to_numpy(self._data)

    def item(self) -> float:
        """The only value, as a Python number."""
        return self.numpy().item()  # type: ignore[no-any-return]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # CuPy refuses to do so: a copy from a GPU has to be asked for, by .numpy().
        return np.array(self._data, dtype=dtype, copy=copy)

    def detach(self) -> Tensor:
        """The same array without its history. Assigning to it assigns to this tensor."""
        tensor = Tensor(self)
        tensor.version = self.version
        return tensor

    def to(self, device: str | Backend) -> Tensor:
        """This leaf copied to another device, or itself. GraphError for an operation's result."""
        if get_backend(device) is self.backend:
            return self
        if self.node is not None:
            raise GraphError("gradients cannot cross devices: move the leaves, or .detach() first")
        return Tensor(self._data, self.requires_grad, device=device)

    def backward(self, dy: Array | None = None, *, retain_graph: bool = False) -> None:
        """Add d self / d leaf to the `.grad` of every leaf. See `gradients`."""
        for leaf, g in _backward(self, dy, retain_graph).items():
            leaf.grad = g if leaf.grad is None else leaf.grad + g

    # fmt: off
    def __len__(self) -> int: return len(self._data)
    def __float__(self) -> float: return float(self.item())
    def __radd__(self, other: Any) -> Tensor: return add(other, self)
    def __rsub__(self, other: Any) -> Tensor: return sub(other, self)
    def __rmul__(self, other: Any) -> Tensor: return mul(other, self)
    def __rtruediv__(self, other: Any) -> Tensor: return div(other, self)
    def __rpow__(self, other: Any) -> Tensor: return power(other, self)
    def __rmatmul__(self, other: Any) -> Tensor: return matmul(other, self)
    def __neg__(self) -> Tensor: return mul(self, -1)
    # The others are the operations themselves, whose first argument is the Tensor.
    __add__ = add
    __sub__ = sub
    __mul__ = mul
    __truediv__ = div
    __pow__ = power
    __matmul__ = matmul
    __getitem__ = index
    exp = exp
    log = log
    tanh = tanh
    sqrt = sqrt
    abs = abs
    sum = sum
    mean = mean
    max = max
    min = min
    reshape = reshape
    transpose = transpose
    @property
    def T(self) -> Tensor: return transpose(self)
    @property
    def shape(self) -> Shape: return tuple(self._data.shape)
    @property
    def dtype(self) -> Any: return self._data.dtype
    @property
    def ndim(self) -> int: return int(self._data.ndim)
    @property
    def size(self) -> int: return int(self._data.size)
    # fmt: on
