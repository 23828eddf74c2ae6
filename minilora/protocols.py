"""What NumPy's functions and Python's own operators do with a Tensor. No graph is lost in silence.

One rule. A function that the engine has (`np.tanh`, `np.where`, `array @ tensor`) is the engine's
operation. Any other function works on the values and returns arrays, but raises GraphError if a
gradient would have to flow through it. A function that returns booleans, indices or shapes has no
gradient to lose: it always works.

Reading a value says what it does and is always allowed: `.numpy()`, `.item()`, `float(t)`. A
conversion that NumPy makes by itself, such as `np.asarray(t)`, is not.

`Tensor` inherits these methods from `TensorBase`.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .backend import Array, Backend
from .display import render_tensor
from .errors import GraphError

CURE = "use the engine's operations, or .numpy() to compute with its values alone"

# ---- which of NumPy's functions the engine has ---------------------------------------------------

# Operations that have another name in NumPy, and functions that NumPy has under two names.
NUMPY_NAMES = {"sub": "subtract", "mul": "multiply", "div": "divide", "neg": "negative"}
ALIASES = {"amax": "max", "amin": "min"}

# The signatures of the functions that are no ufuncs, as far as the engine has their parameters: the
# arguments are passed to the operation in this order.
SIGNATURES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "sum": lambda a, axis=None, *, keepdims=False: (a, axis, keepdims),
    "mean": lambda a, axis=None, *, keepdims=False: (a, axis, keepdims),
    "max": lambda a, axis=None, *, keepdims=False: (a, axis, keepdims),
    "min": lambda a, axis=None, *, keepdims=False: (a, axis, keepdims),
    "clip": lambda a, a_min=None, a_max=None, *, min=None, max=None: (
        a,
        min if a_min is None else a_min,
        max if a_max is None else a_max,
    ),
    "where": lambda condition, x, y, /: (condition, x, y),
    "reshape": lambda a, /, shape: (a, shape),
    "transpose": lambda a, axes=None: (a,) if axes is None else (a, tuple(axes)),
    "broadcast_to": lambda array, shape: (array, shape),
    "concatenate": lambda arrays, /, axis=0: (arrays, axis),
    "stack": lambda arrays, axis=0: (arrays, axis),
}

# Array functions that return booleans, indices, shapes or text. (A ufunc says so in its types.)
WITHOUT_GRADIENT = {"all", "any", "allclose", "array_equal", "array_equiv", "can_cast", "isclose"}
WITHOUT_GRADIENT |= {"iscomplexobj", "isin", "isneginf", "isposinf", "isrealobj"}
WITHOUT_GRADIENT |= {"may_share_memory", "shares_memory"}
WITHOUT_GRADIENT |= {"argmax", "argmin", "argpartition", "argsort", "argwhere", "count_nonzero"}
WITHOUT_GRADIENT |= {"flatnonzero", "nonzero", "searchsorted"}
WITHOUT_GRADIENT |= {"empty_like", "ones_like", "zeros_like", "ndim", "shape", "size"}
WITHOUT_GRADIENT |= {"min_scalar_type", "result_type"}
WITHOUT_GRADIENT |= {"array2string", "array_repr", "array_str"}
# Values of options that ask for nothing else than a call without them.
DEFAULTS: dict[str, tuple[Any, ...]] = {}
DEFAULTS |= {"where": (True,), "subok": (True,), "keepdims": (False,)}
DEFAULTS |= {"casting": ("same_kind",), "order": ("C", "K")}
WRITING = {"copyto", "fill_diagonal", "place", "put", "put_along_axis", "putmask"}  # into the first


def numpy_operations(functions: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Those of the engine's `functions`, given by name, that NumPy has: by NumPy's name."""
    found: dict[str, Callable[..., Any]] = {}
    for name, operation in functions.items():
        if not inspect.isfunction(operation):
            continue
        function = getattr(np, NUMPY_NAMES.get(name, name), None)
        if isinstance(function, np.ufunc) or _numpy_name(function) in SIGNATURES:
            found[_numpy_name(function)] = operation
    return found


@functools.cache
def _numpy_name(function: Any) -> str:
    """The name under which NumPy has this very function; "" if it is not one of NumPy's own."""
    name = getattr(function, "__name__", "")
    return name if getattr(np, name, None) is function else ""


def _full_name(function: Any) -> str:
    """The function's name as a user writes it: "np.sin", "np.linalg.norm"."""
    module = "numpy" if _numpy_name(function) else getattr(function, "__module__", "")
    name = getattr(function, "__name__", repr(function))
    return f"{module}.{name}".removeprefix(".").replace("numpy.", "np.", 1)


@functools.cache
def _returns_booleans(ufunc: np.ufunc) -> bool:
    results = [types[-1] for types in ufunc.types if "O" not in types]
    return set(results) == {"?"}  # np.frompyfunc's has objects alone, which may be anything


def _is_default(name: str, value: Any) -> bool:
    """Whether an option of a call asks for what NumPy does without it."""
    if isinstance(value, (bool, np.bool_, str)):
        return value in DEFAULTS.get(name, ())
    return (value is None and name != "axis") or value is np._NoValue


def _without_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not _is_default(name, value)}


@functools.cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(SIGNATURES[name])


def _arguments(name: str, args: Any, options: Any) -> tuple[Any, ...] | None:
    """The operation's arguments in a call of NumPy's function; None if it lacks a parameter."""
    try:
        _signature(name).bind(*args, **options)
    except TypeError:
        return None
    return SIGNATURES[name](*args, **options)


# ---- tensors among arguments ---------------------------------------------------------------------


def _tensors(item: Any) -> Iterator[Any]:
    """Every tensor in an argument, also in lists, tuples and dictionaries."""
    if isinstance(item, TensorBase):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _tensors(part)
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))


def _values(item: Any) -> Any:
    """The argument with arrays in place of tensors."""
    if isinstance(item, TensorBase):
        return item.data
    if isinstance(item, (list, tuple)):
        parts = list(map(_values, item))
        return parts if isinstance(item, list) else tuple(parts)
    if isinstance(item, dict):
        return {key: _values(value) for key, value in item.items()}
    return item


def _holds_tensors(item: Any) -> bool:
    return next(_tensors(item), None) is not None


def _refuse_lost_graph(name: str, arguments: Any) -> None:
    """GraphError if one of the arguments is a tensor whose gradient `name` would lose."""
    if any(tensor.is_tracked for tensor in _tensors(arguments)):
        raise GraphError(f"{name} has no gradient here, but got a tensor that requires one: {CURE}")


def _refuse_writing(name: str, target: Any) -> None:
    if _holds_tensors(target):
        raise GraphError(
            f"{name} would write into a tensor: give an array, or assign a leaf's new values "
            "with tensor.data = values"
        )


# ---- the methods of a Tensor ---------------------------------------------------------------------


def _comparison(name: str) -> Any:
    """The comparison `name` of arrays: an array of booleans, which have no gradient."""
    compare = getattr(operator, name)

    def method(self: TensorBase, other: Any) -> Array:
        return compare(self.data, _values(other))

    return method


def _rounding(ufunc: np.ufunc) -> tuple[Any, Any]:
    """An operator that the engine lacks and its reflection: NumPy's function and its rule."""
    return lambda self, other: ufunc(self, other), lambda self, other: ufunc(other, self)


class TensorBase:
    """What a Tensor does for NumPy and Python, by the rule at the top of this file.

    operations   the engine's operations that NumPy has, by NumPy's name
    """

    __slots__ = ()
    __array_priority__ = 1000  # for arrays that know no __array_ufunc__
    operations: Mapping[str, Callable[..., Any]]
    backend: Backend
    data: Any
    dtype: Any
    grad: Any
    item: Any
    ndim: Any
    node: Any
    requires_grad: bool
    shape: Any
    size: Any
    __getitem__: Any

    @property
    def is_tracked(self) -> bool:
        """Whether an operation on this tensor would be recorded."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return render_tensor(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        called = method == "__call__"
        asked = _without_defaults(options)
        if called and not asked:
            operation = self.operations.get(_numpy_name(ufunc))
            if operation is not None:
                return operation(*inputs)
        name = _full_name(ufunc) + ("" if called else f".{method}") + _with(asked)
        _refuse_writing(name, inputs[0] if method == "at" else options.get("out"))
        if not _returns_booleans(ufunc):
            _refuse_lost_graph(name, (inputs, options))
        function = getattr(self._native(ufunc), method)
        return function(*_values(inputs), **_values(options))

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        known = _numpy_name(function)
        known = ALIASES.get(known, known)
        asked = _without_defaults(options)
        if known in SIGNATURES:
            arguments = _arguments(known, args, asked)
            if arguments is not None:
                return self.operations[known](*arguments)
        name = _full_name(function) + _with(asked)
        _refuse_writing(name, args[0] if known in WRITING else options.get("out"))
        if known not in WITHOUT_GRADIENT:
            _refuse_lost_graph(name, (args, options))
        return self._native(function)(*_values(args), **_values(options))

    def _native(self, function: Any) -> Any:
        """The function for this tensor's arrays: NumPy's, or that of its device's module."""
        xp = self.backend.xp
        return function if xp is np else getattr(xp, _numpy_name(function), function)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.is_tracked:
            raise GraphError(
                "NumPy would make a plain array of a tensor that requires a gradient: "
                f"{CURE}; stack() joins several tensors"
            )
        # CuPy refuses to do so: a copy from a GPU has to be asked for, by .numpy().
        return np.array(self.data, dtype=dtype, copy=copy)

    # ---- comparing ----

    __eq__ = _comparison("eq")
    __ne__ = _comparison("ne")
    __lt__ = _comparison("lt")
    __le__ = _comparison("le")
    __gt__ = _comparison("gt")
    __ge__ = _comparison("ge")
    __hash__ = object.__hash__  # tensors are told apart by identity, never by their values

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"a tensor of shape {self.shape} is neither true nor false: compare one value, "
                "or use .numpy().any() or .numpy().all()"
            )
        return bool(self.item())

    def __contains__(self, value: Any) -> bool:
        return bool((self == value).any())

    # ---- values and parts ----

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.dtype.kind not in "iu" or self.ndim:
            raise TypeError(
                f"only a 0-d tensor of integers is an index, got {self.dtype} of shape {self.shape}"
            )
        return int(self.item())

    def __format__(self, specification: str) -> str:
        if not specification:
            return str(self)
        if self.size != 1:
            raise TypeError(
                f"{specification!r} formats one value, got a tensor of shape {self.shape}: "
                "format its values one by one"
            )
        return format(self.item(), specification)

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("a 0-d tensor has no length: .item() is its value")
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        if not self.ndim:
            raise TypeError("a 0-d tensor cannot be iterated over: .item() is its value")
        return (self[i] for i in range(len(self)))

    def __setitem__(self, key: Any, value: Any) -> None:
        raise GraphError(
            "parts of a tensor cannot be assigned to: make a new tensor with where() or concat(), "
            "or assign all of a leaf's values with tensor.data = values"
        )

    def __reduce_ex__(self, version: Any) -> Any:
        """How copy.copy, copy.deepcopy and pickle read a leaf. GraphError for a result."""
        if self.node is not None:
            raise GraphError(
                "the graph of an operation's result cannot be copied or pickled: "
                "copy result.detach(), or the leaves"
            )
        return super().__reduce_ex__(version)

    # ---- operators that the engine lacks ----

    __floordiv__, __rfloordiv__ = _rounding(np.floor_divide)
    __mod__, __rmod__ = _rounding(np.remainder)
    __divmod__, __rdivmod__ = _rounding(np.divmod)


def _with(options: Any) -> str:
    """The options of a call as part of its name: " with out=, where="; "" if there are none."""
    return f" with {', '.join(f'{key}=' for key in options)}" if options else ""
