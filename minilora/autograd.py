"""A small reverse-mode autograd: `Tensor`, the operations that record its graph, and the algebra.

One operation is one plain function. It computes the output on arrays, decides what backward will
need, and hands `record` a nested `vjp(dy)`, the vector-Jacobian product: from the gradient of its
output to the gradients of its inputs. Two rules keep memory small: a `vjp` captures arrays, shapes
and scalars but never a Tensor, and a `Node` keeps its parents and its `vjp` but never the output.
An array lives only as long as a backward may read it.

Contents: record - operands - arithmetic - functions - reductions - shapes - products - Tensor,
whose methods these operations are. The graph and the walk back through it are in graph.py; what
NumPy's functions do with a Tensor is in protocols.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .arguments import REAL, check_kinds, clip_bound
from .backend import Array, Backend, Shape, backend_of, get_backend
from .errors import DeviceError, GraphError
from .graph import Grads as Grads  # other modules import the graph's names from here
from .graph import Node as Node
from .graph import Vjp as Vjp
from .graph import grad_enabled as grad_enabled
from .graph import gradients as gradients
from .graph import leaf_gradients, owner_of
from .graph import no_grad as no_grad
from .graph import observer as observer
from .protocols import TensorBase, numpy_operations

Device = str | Backend | None
Axis = int | Shape | None

# ---- one operation -------------------------------------------------------------------------------


def record(data: Array, inputs: tuple[Tensor, ...], vjp: Vjp) -> Tensor:
    """The output of an operation as a Tensor, with a Node if a gradient can flow to an input.

    vjp   from dy, the gradient of the output, to the gradients of `inputs`, in their order
    """
    backend = inputs[0].backend
    if not isinstance(data, backend.xp.ndarray):
        data = backend.xp.asarray(data)  # reductions give scalars
    y = Tensor.__new__(Tensor)
    y.backend = backend
    y._array = data
    y.grad = y.node = y.version = None
    y.requires_grad = False
    parents: list[Node | Tensor | None] = []
    guards = []
    is_view = data.base is not None
    for t in inputs:
        parents.append((t.node or t) if t.requires_grad else None)
        y.requires_grad |= t.requires_grad
        if t.version is not None:
            owner = t._array if t._array.base is None else owner_of(t._array)
            guards.append((t.version, t.version[0], id(owner)))
            if is_view and owner_of(data) is owner:
                y.version = t.version  # a view of a leaf changes when the leaf does
    if y.requires_grad and grad_enabled():
        y.node = Node(tuple(parents), vjp, guards)
    else:
        y.requires_grad = False
    if observe := observer.get():
        observe(y, inputs, vjp)
    return y


# ---- operands ------------------------------------------------------------------------------------

_BASIC = (int, slice, np.integer, type(None), type(...))  # NumPy's basic indexing: a view


def operands(*values: Any) -> tuple[Tensor, ...]:
    """Tensors, numbers and arrays as Tensors on one device.

    A number, and an array or Tensor of integers or booleans, takes the floating dtype of what is
    beside it: float32 stays float32. DeviceError if two are on different devices.
    """
    first = values[0]
    for v in values:
        same = isinstance(v, Tensor) and v.backend is first.backend and v.dtype is first.dtype
        if not same:
            return _convert_operands(values)
    first.backend.select()
    return values


def _convert_operands(values: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """`operands` of different kinds, dtypes or devices."""
    items = [v if isinstance(v, Tensor) or _is_number(v) else Tensor(v) for v in values]
    tensors = [t for t in items if isinstance(t, Tensor)] or [Tensor(0.0)]
    check_kinds(tensors)
    dtypes = {t.dtype for t in tensors if t.dtype.kind in "fc"}
    dtype = np.result_type(*dtypes) if len(dtypes) > 1 else next(iter(dtypes), None)
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):  # with no floats beside it, 2.5 stays 2.5
            items[i] = Tensor(tensors[0].backend.xp.full((), item, dtype))
        elif dtype is not None and item.dtype.kind in "iub":
            items[i] = Tensor(item.data.astype(dtype))
    namespace(*items)
    return tuple(items)


def _is_number(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return True
    is_scalar = isinstance(value, np.generic) or (type(value) is np.ndarray and value.ndim == 0)
    return is_scalar and value.dtype.kind in REAL


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


def neg(x: Tensor) -> Tensor:
    return record(namespace(x).negative(x.data), (x,), lambda dy: (-dy,))


def div(a: Any, b: Any) -> Tensor:
    a, b = operands(a, b)
    sa = a.shape
    sb = b.shape
    B = b.data
    y = a.data / B
    Y = y if b.requires_grad else None

    def vjp(dy: Array) -> Grads:
        # Not (dy / B) Y, which is 0 times infinity where dy / B underflows and a is infinite.
        db = None if Y is None else unbroadcast(-dy * (Y / B), sb)
        return unbroadcast(dy / B, sa), db

    return record(y, (a, b), vjp)


def power(a: Any, b: Any) -> Tensor:
    """a ** b, elementwise.

    Where a is 0 the gradient of b, a^b log a, is its limit: 0 for b > 0 and -infinity for b < 0.
    For b = 0 it is 0, as in PyTorch: 0^b has no derivative there.
    """
    a, b = operands(a, b)
    xp = namespace(a, b)
    sa = a.shape
    sb = b.shape
    A = a.data
    y = A**b.data
    Y = y if b.requires_grad else None
    B = b.data if a.requires_grad else None
    vanishes = (A == 0) & (b.data >= 0) if b.requires_grad else None

    def vjp(dy: Array) -> Grads:
        da = db = None
        if B is not None:
            # b a^(b-1) is 0 for b = 0, also at a = 0 or infinity: a^0 is 1 everywhere. It comes
            # before dy, because dy b may underflow where a^(b-1) is infinite.
            da = unbroadcast(dy * (B * A ** xp.where(B == 0, 0, B - 1)), sa)
        if Y is not None:
            db = unbroadcast(dy * Y * xp.log(xp.where(vanishes, 1, A)), sb)
        return da, db

    return record(y, (a, b), vjp)


def _split(xp: Any, dy: Array, wins: Array, loses: Array, sa: Shape, sb: Shape) -> Grads:
    """The gradients of two: dy for the first where it `wins`, for the second where that `loses`.

    Half for each where they are equal, or where one is NaN.
    """
    half = dy / 2
    # Not dy times a share: 0 times infinity would be NaN.
    da = xp.where(wins, dy, xp.where(loses, 0, half))
    db = xp.where(loses, dy, xp.where(wins, 0, half))
    return unbroadcast(da, sa), unbroadcast(db, sb)


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of two, elementwise; where they are equal, each gets half of the gradient."""
    a, b = operands(a, b)
    xp = namespace(a, b)
    sa = a.shape
    sb = b.shape
    wins = a.data > b.data
    loses = a.data < b.data
    y = xp.maximum(a.data, b.data)
    return record(y, (a, b), lambda dy: _split(xp, dy, wins, loses, sa, sb))


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of two, elementwise; where they are equal, each gets half of the gradient."""
    a, b = operands(a, b)
    xp = namespace(a, b)
    sa = a.shape
    sb = b.shape
    wins = a.data < b.data
    loses = a.data > b.data
    y = xp.minimum(a.data, b.data)
    return record(y, (a, b), lambda dy: _split(xp, dy, wins, loses, sa, sb))


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition, an array or Tensor of booleans, is true; b elsewhere.

    GraphError for a condition that requires a gradient, because it would get none.
    """
    if isinstance(condition, Tensor) and condition.is_tracked:
        raise GraphError(
            "where: the condition requires a gradient, which would be lost: "
            "give booleans, such as x > 0, or condition.detach()"
        )
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


def clip(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """x limited to [low, high], two numbers or None; gradients pass where low <= x <= high."""
    (x,) = operands(x)  # np.clip may have a Tensor among its bounds alone
    xp = namespace(x)
    X = x.data
    # Python's numbers, because NumPy's would widen float32.
    low = clip_bound(low)
    high = clip_bound(high)
    if low is None and high is None:
        raise ValueError("clip got no bounds: give low, high or both")
    inside = xp.ones(X.shape, bool)
    if low is not None:
        inside &= low <= X
    if high is not None:
        inside &= high >= X
    return record(xp.clip(X, low, high), (x,), lambda dy: (xp.where(inside, dy, 0),))


# ---- reductions ----------------------------------------------------------------------------------


def axis_of(x: Tensor, axis: Axis) -> Axis:
    """The axis for a reduction of x: a 0-d array is one value along axis 0 or -1, as in NumPy.

    CuPy takes only None there.
    """
    return axis if axis is None or x.ndim or axis not in (0, -1) else None


def _unreduce(g: Array, shape: Shape, axis: Axis, keepdims: bool) -> Array:
    """A reduction's result or gradient with the reduced axes put back with size 1."""
    if keepdims:
        return g
    if axis is None:
        axis = tuple(range(len(shape)))
    elif not isinstance(axis, tuple):
        axis = (axis,)
    reduced = [i % len(shape) for i in axis]
    return g.reshape([1 if i in reduced else n for i, n in enumerate(shape)])


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    expand, shape = namespace(x).broadcast_to, x.shape
    axis = axis_of(x, axis)
    y = x.data.sum(axis=axis, keepdims=keepdims)
    return record(y, (x,), lambda dy: (expand(_unreduce(dy, shape, axis, keepdims), shape),))


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean along `axis`. ValueError for the mean of no values."""
    y = sum(x, axis, keepdims)
    if y.size > x.size:
        raise ValueError(f"the mean of no values: shape {x.shape}, axis {axis}")
    return mul(y, y.size / x.size if x.size else 1.0)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest along `axis`; equal ones share the gradient evenly."""
    axis = axis_of(x, axis)
    xp = namespace(x)
    X = x.data
    y = X.max(axis=axis, keepdims=keepdims)
    return record(y, (x,), lambda dy: (_share(xp, dy, X, y, axis, keepdims),))


def min(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest along `axis`; equal ones share the gradient evenly."""
    axis = axis_of(x, axis)
    xp = namespace(x)
    X = x.data
    y = X.min(axis=axis, keepdims=keepdims)
    return record(y, (x,), lambda dy: (_share(xp, dy, X, y, axis, keepdims),))


def _share(xp: Any, dy: Array, X: Array, y: Array, axis: Axis, keepdims: bool) -> Array:
    """dy shared evenly among the entries of X that equal the reduction's result y."""
    equal = _unreduce(y, X.shape, axis, keepdims) == X
    count = equal.sum(axis=axis, keepdims=True).astype(dy.dtype)
    # 0 / count is NaN where y is: no entry equals it.
    with np.errstate(divide="ignore", invalid="ignore"):
        return xp.where(equal, _unreduce(dy, X.shape, axis, keepdims) / count, 0 / count)


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
    y = x.data.transpose(order)
    back = tuple(int(i) for i in np.argsort([i % x.ndim for i in order]))
    return record(y, (x,), lambda dy: (dy.transpose(back),))


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
    """A list, Tensor or NumPy array in a key as an array of `backend`; other parts as they are."""
    if isinstance(part, Tensor):
        return part.data.copy()  # assigning to the tensor must not change what backward reads
    if isinstance(part, list):
        part = np.asarray(part, None if np.size(part) else np.intp)  # [] would be floats
    return backend.from_numpy(part) if isinstance(part, np.ndarray) else part


def _to_join(name: str, values: Any, axis: Any) -> tuple[Tensor, ...]:
    values = tuple(values)
    if not values:
        raise ValueError(f"{name} got no tensors: give at least one")
    if axis is None:
        raise ValueError(f"{name}: axis must be an integer, got None: reshape the tensors first")
    return operands(*values)


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors joined along an axis that they have. ValueError for no tensors."""
    tensors = _to_join("concat", tensors, axis)
    xp = namespace(*tensors)
    y = xp.concatenate([t.data for t in tensors], axis=axis)
    cuts = list(itertools.accumulate(t.shape[axis] for t in tensors[:-1]))
    return record(y, tensors, lambda dy: tuple(xp.split(dy, cuts, axis=axis)))


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors joined along a new axis. ValueError for no tensors."""
    tensors = _to_join("stack", tensors, axis)
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
    backend = a.backend
    y = backend.matmul(a.data, b.data)
    leading = y.shape[: y.ndim - (len(sa) > 1) - (len(sb) > 1)]
    full = (*leading, shape_A[-2], shape_B[-1])
    A_kept = A if b.requires_grad else None
    B_kept = B if a.requires_grad else None

    def vjp(dy: Array) -> Grads:
        dY = dy.reshape(full)
        da = db = None
        if B_kept is not None:
            da = unbroadcast(backend.matmul(dY, B_kept.swapaxes(-1, -2)), shape_A).reshape(sa)
        if A_kept is not None:
            db = unbroadcast(backend.matmul(A_kept.swapaxes(-1, -2), dY), shape_B).reshape(sb)
        return da, db

    return record(y, (a, b), vjp)


# ---- Tensor --------------------------------------------------------------------------------------


def _in_place(operation: Callable[[Any, Any], Tensor], symbol: str) -> Any:
    """The operator `symbol`: it assigns to a leaf that requires a gradient, under `no_grad` only.

    It assigns to a frozen parameter too, which its module would lose otherwise. For any other
    tensor it makes a new one, to which Python gives the name on the left.
    """

    def method(self: Tensor, other: Any) -> Tensor:
        if self.node is not None or not (self.requires_grad or self.is_parameter):
            return operation(self, other)
        if self.is_tracked or (isinstance(other, Tensor) and other.is_tracked):
            raise GraphError(
                f"p {symbol} ... would change a leaf in place, and lose a gradient: "
                f"do it inside no_grad(), or write p = p {symbol[:-1]} ... for a new tensor"
            )
        result: Any = operation(self, other)
        values = result.data if isinstance(result, Tensor) else result
        self.data = values.astype(self.dtype, copy=False)
        return self

    return method


class Tensor(TensorBase):
    """An array that can remember the operation it came from.

    data            array or nested list; Python floats become float32, an array keeps its dtype
    requires_grad   True makes a leaf whose gradient `backward` adds to `.grad`
    dtype, device   to convert and move the data to; TypeError if integers shall require a gradient

    A Tensor made of a leaf shares its storage. GraphError for an operation's result.
    """

    __slots__ = ("__weakref__", "_array", "backend", "grad", "node", "requires_grad", "version")
    operations = numpy_operations(globals())
    is_parameter = False  # whether a module knows it by its name
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
            if data.node is not None:
                raise GraphError(
                    "Tensor(result) would lose the graph of an operation's result: "
                    "use the result itself, or result.detach() for its value"
                )
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
        self._array = data if dtype is None else data.astype(dtype, copy=False)
        if requires_grad and self._array.dtype.kind != "f":
            raise TypeError(
                f"only floats can require a gradient or be a weight, got {self._array.dtype}: "
                "give 1.0 in place of 1, or array.astype(np.float32)"
            )
        self.requires_grad = requires_grad
        self.grad = self.node = None

    @property
    def data(self) -> Array:
        return self._array

    @data.setter
    def data(self, value: Array) -> None:
        """Copy into this leaf's storage, so views of it stay valid. Same shape and dtype only."""
        if self.version is None or self.node is not None:
            cure = "result.detach() is a leaf with the same array"
            if value is self._array:  # NumPy's operator has done its work by now
                cure = (
                    "`result.data += ...` has changed its array already, and with it what backward "
                    "may read: compute the result again, or write result = result + ..."
                )
            raise GraphError(
                f"only a leaf's data can be assigned, not an operation's result; {cure}"
            )
        if value.shape != self._array.shape or value.dtype != self._array.dtype:
            raise ValueError(
                f"cannot assign {value.shape} {value.dtype} to data of {self.shape} {self.dtype}"
            )
        if value is not self._array:
            self._array[...] = value
        self.version[0] += 1

    def read_rows(self, at: Any, compute: str = "float32") -> Array:
        """The rows `at` (a slice or integers) as an array: values, of which no graph knows.

        Only these are decoded from codes, and none that a product by `compute` takes as codes.
        """
        take = self.backend.xp.take
        return self._array[at] if isinstance(at, slice) else take(self._array, at, axis=0)

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", prefix="Tensor(")
        grad = ", requires_grad=True" if self.requires_grad else ""
        device = "" if self.backend.name == "cpu" else f", device={self.backend.name!r}"
        return f"Tensor({values}{grad}{device})"

    def numpy(self) -> np.ndarray:
        """The values on the host: the array itself on a CPU, a copy from a GPU."""
        return self.backend.to_numpy(self._array)

    def item(self) -> float:
        """The only value, as a Python number."""
        return self.numpy().item()  # type: ignore[no-any-return]

    def detach(self) -> Tensor:
        """The same array without its history. Assigning to it assigns to this tensor."""
        tensor = Tensor(self.data)
        tensor.version = self.version
        return tensor

    def to(self, device: str | Backend) -> Tensor:
        """This leaf copied to another device, or itself. GraphError for an operation's result."""
        if get_backend(device) is self.backend:
            return self
        if self.node is not None:
            raise GraphError("gradients cannot cross devices: move the leaves, or .detach() first")
        return Tensor(self._array, self.requires_grad, device=device)

    def backward(self, dy: Array | None = None, *, retain_graph: bool = False) -> None:
        """Add d self / d leaf to the `.grad` of every leaf. See `gradients`."""
        for leaf, g in leaf_gradients(self, dy, retain_graph):
            leaf.grad = g if leaf.grad is None else leaf.grad + g

    # fmt: off
    def __radd__(self, other: Any) -> Tensor: return add(other, self)
    def __rsub__(self, other: Any) -> Tensor: return sub(other, self)
    def __rmul__(self, other: Any) -> Tensor: return mul(other, self)
    def __rtruediv__(self, other: Any) -> Tensor: return div(other, self)
    def __rpow__(self, other: Any) -> Tensor: return power(other, self)
    def __rmatmul__(self, other: Any) -> Tensor: return matmul(other, self)
    def __pos__(self) -> Tensor: return self
    # The others are the operations themselves, whose first argument is the Tensor.
    __add__ = add
    __sub__ = sub
    __mul__ = mul
    __truediv__ = div
    __pow__ = power
    __matmul__ = matmul
    __neg__ = neg
    __abs__ = abs
    __iadd__ = _in_place(add, "+=")
    __isub__ = _in_place(sub, "-=")
    __imul__ = _in_place(mul, "*=")
    __itruediv__ = _in_place(div, "/=")
    __ipow__ = _in_place(power, "**=")
    __imatmul__ = _in_place(matmul, "@=")
    __ifloordiv__ = _in_place(np.floor_divide, "//=")
    __imod__ = _in_place(np.remainder, "%=")
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
    def is_tracked(self) -> bool: return self.requires_grad and grad_enabled()
    @property
    def T(self) -> Tensor: return transpose(self)
    @property
    def shape(self) -> Shape: return tuple(self._array.shape)
    @property
    def dtype(self) -> Any: return self._array.dtype
    @property
    def ndim(self) -> int: return int(self._array.ndim)
    @property
    def size(self) -> int: return int(self._array.size)
    # fmt: on
