"""A replacement for CuPy that needs no GPU: NumPy underneath, and as strict as a GPU is.

`xp` is the module, `DevArray` its array, `STRICT` a Backend of them. Results have NumPy's bits, so
an engine that runs on it computes the same as on the CPU. The difference is what it refuses:

  names that CuPy lacks, and parameters that it does not take (cupy_names.json)
  host arrays and lists where a GPU needs its arrays, implicit conversion to NumPy, NumPy scalars
  that would widen a dtype
  what CuPy computes otherwise without a word: an index out of range (it wraps), an assignment
  through equal indices (undefined)

`METER` counts what moves or waits: uploads, downloads, synchronisations, and array operations, the
copies that CuPy makes of a product's operands among them. In `no_sync()` whatever would wait
raises. It is stricter than CuPy on purpose: it refuses `np.f(x)`, which CuPy would dispatch; ufuncs
can only be called, without `.reduce` or `.at`; submodules are missing. It is more lenient in one
thing: results may keep NumPy's memory order.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import NUMPY, Backend, register

NAMES_FILE = Path(__file__).with_name("cupy_names.json")
NAMES: dict[str, Any] = json.loads(NAMES_FILE.read_text(encoding="utf-8"))
# What cupy.ufunc.__call__ accepts; anything else is "Wrong arguments".
UFUNC_KEYWORDS = {"out", "dtype", "casting"}
# Keywords that a signature of **kwargs hides, and that raise.
NOT_TAKEN = {"einsum": {"out"}}
# Parameters of integers, which may be lists and tuples.
INTEGERS = {"shape", "newshape", "axis", "axes", "source", "destination", "reps", "shift"}
INTEGERS.add("indices_or_sections")
# Methods and functions that wait for the device.
WAITS = {"item", "tolist", "tobytes", "tofile", "dump", "dumps", "nonzero"}
WAITS |= {"unique", "argwhere", "flatnonzero", "bincount", "repeat", "extract", "compress"}
WAITS.add("asnumpy")
SCALARS = (bool, int, float, complex, np.generic)
MIRRORED = ("shape", "dtype", "ndim", "size", "itemsize", "nbytes", "strides")


class Synchronised(Exception):
    """Something waited for the device inside `no_sync()`."""


class Silent(IndexError):
    """CuPy would have continued here, with another result than NumPy's."""


class Meter:
    """What moved and what waited, each as the name of the call."""

    def __init__(self) -> None:
        self.forbidden = False
        self.reset()

    def reset(self) -> None:
        self.uploads: list[str] = []
        self.downloads: list[str] = []
        self.syncs: list[str] = []  # downloads among them
        self.operations = 0  # calls that return a new array: on a GPU at least one kernel each

    def wait(self, name: str) -> None:
        if self.forbidden:
            raise Synchronised(f"{name} waits for the device")
        self.syncs.append(name)


METER = Meter()


@contextlib.contextmanager
def counted() -> Iterator[Meter]:
    """Inside, METER counts from zero."""
    METER.reset()
    yield METER


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Inside, whatever would wait for the device, also a download, raises Synchronised."""
    METER.forbidden = True
    try:
        yield
    finally:
        METER.forbidden = False


# ---- arguments and results -----------------------------------------------------------------------


def _operand(x: Any) -> Any:
    """An argument of arithmetic on the host: an array of the device or a number."""
    if isinstance(x, DevArray):
        return x._host
    if isinstance(x, SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _argument(name: str, x: Any) -> Any:
    """The argument on the host of a function's parameter `name`."""
    if isinstance(x, DevArray):
        return x._host
    if isinstance(x, (list, tuple)):
        if x and all(isinstance(item, DevArray) for item in x):
            return type(x)(item._host for item in x)
        if name in INTEGERS and all(isinstance(item, (int, np.integer, tuple)) for item in x):
            return x
    elif not isinstance(x, np.ndarray):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _check_scalars(operands: Any) -> None:
    """A NumPy scalar keeps its dtype beside an array (NEP 50): float64 makes float32 float64."""
    dtypes = [a.dtype for a in operands if isinstance(a, np.ndarray)]
    if not dtypes:
        return
    dtype = np.result_type(*dtypes)
    for s in operands:
        if isinstance(s, np.generic) and np.result_type(dtype, s.dtype) != dtype:
            raise TypeError(f"a NumPy scalar of {s.dtype} would widen {dtype}: use a Python number")


def _root(host: np.ndarray) -> np.ndarray:
    """The array whose memory `host` is a view of."""
    while isinstance(host.base, np.ndarray):
        host = host.base
    return host


def _result(value: Any, *owners: Any) -> Any:
    """NumPy's result as the device returns it: a number is a 0-d array, a view knows its base.

    owners   the arrays that the result may be a view of
    """
    if isinstance(value, (tuple, list)) and any(isinstance(item, np.ndarray) for item in value):
        return type(value)(_result(item, *owners) for item in value)
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        return value  # a dtype, a shape, a flag
    for owner in owners:
        if isinstance(owner, DevArray) and _root(value) is _root(owner._host):
            if value is owner._host:
                return owner
            return DevArray(value, owner if owner.base is None else owner.base)
    METER.operations += 1
    return DevArray(value)


def hidden_matmul_operations(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> int:
    """How many kernels CuPy launches for a matrix product besides the product itself.

    Up to two axes: a copy for each operand that is contiguous in neither order. With more axes: a
    copy for each operand that is not C-contiguous, a transposed one too, and one table of pointers
    per batch axis and array if a batch axis is broadcast. A copy back if `out` is not C-contiguous.
    """
    copies = out is not None and not out.flags.c_contiguous
    ndim = max(a.ndim, b.ndim)
    if ndim <= 2:
        return copies + sum(not z.flags.forc for z in (a, b))
    copies += sum(not z.flags.c_contiguous for z in (a, b))
    batches = [(1,) * (ndim - max(z.ndim, 2)) + z.shape[:-2] for z in (a, b)]
    broadcast = batches[0] != batches[1]
    return copies + 3 * (ndim - 2) * broadcast


def check_keywords(
    name: str, parameters: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[str]:
    """The names of the parameters of `args`. TypeError if CuPy's signature does not take a call."""
    known = parameters.split()
    places = [p for p in known if not p.startswith("*")]
    rest = None
    any_keyword = False
    for parameter in known:
        if parameter.startswith("**"):
            any_keyword = True
        elif parameter.startswith("*"):
            rest = parameter[1:]
    wrong = set(kwargs) & NOT_TAKEN.get(name, set())
    if not any_keyword:
        wrong |= set(kwargs) - set(places)
    if wrong:
        raise TypeError(
            f"{name}() got an unexpected keyword {sorted(wrong)[0]!r}: CuPy takes {parameters}"
        )
    if rest is not None:
        return [rest] * len(args)
    if len(args) > len(places):
        raise TypeError(
            f"{name}() takes {len(places)} arguments, got {len(args)}: CuPy takes {parameters}"
        )
    return places


def _call(
    name: str,
    function: Callable[..., Any],
    parameters: str,
    args: Any,
    kwargs: Any,
    owner: Any = None,
) -> Any:
    """What `function`, NumPy's of CuPy's `name`, returns, after all checks."""
    places = check_keywords(name, parameters, args, kwargs)
    given = [_argument(place, x) for place, x in zip(places, args, strict=False)]
    named = {key: _argument(key, x) for key, x in kwargs.items()}
    if name in ("sort", "argsort"):
        if (named.pop("kind", None) or "stable") != "stable":
            raise ValueError(f"{name}: CuPy's sorts are stable, and take no other kind")
        named["kind"] = "stable"
    if name in WAITS or (name == "where" and len(args) == 1):
        METER.wait(name)
    try:
        value = function(*given, **named)
    except IndexError as error:
        raise Silent(f"{error}: CuPy would wrap it") from error
    if name == "matmul":
        METER.operations += hidden_matmul_operations(*given, named.get("out"))
    if kwargs.get("out") is not None:
        METER.operations += 1
        return kwargs["out"]
    owners = [owner, *args]
    for x in args:
        if isinstance(x, (list, tuple)):
            owners += x
    return _result(value, *owners)


# ---- the array -----------------------------------------------------------------------------------


class DevArray:
    """An array of the device. It is not an ndarray: NumPy may not touch it by itself."""

    __slots__ = ("__weakref__", "_host", "base")
    __array_priority__ = 100
    __array_ufunc__ = None  # NumPy's operators defer to ours, and its functions refuse
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: np.ndarray, base: DevArray | None = None):
        self._host = host
        self.base = base

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed: use `.get()` for a transfer"
        )

    def __reduce__(self) -> Any:
        raise TypeError("pickling an array of the device transfers it")

    shape, dtype, ndim, size, itemsize, nbytes, strides = (
        property(lambda self, name=name: getattr(self._host, name)) for name in MIRRORED
    )

    @property
    def T(self) -> DevArray:
        # Below two dimensions CuPy returns the array itself, not a view.
        return self if self.ndim < 2 else _result(self._host.T, self)

    def __getattr__(self, name: str) -> Any:
        if name == "get":
            return lambda: STRICT.to_numpy(self)
        if name in NAMES["methods"] and hasattr(np.ndarray, name):
            parameters = NAMES["methods"][name]
            method = getattr(self._host, name)
            return lambda *args, **kwargs: _call(name, method, parameters, args, kwargs, self)
        raise AttributeError(f"cupy.ndarray, or this replacement, lacks {name!r}")

    # ---- what waits ----

    def _wait(self, function: Callable[[Any], Any]) -> Any:
        METER.wait(function.__name__)
        return function(self._host)

    # fmt: off
    def __bool__(self) -> bool: return self._wait(bool)
    def __int__(self) -> int: return self._wait(int)
    def __float__(self) -> float: return self._wait(float)
    def __complex__(self) -> complex: return self._wait(complex)
    def __repr__(self) -> str: return self._wait(repr)
    def __str__(self) -> str: return self._wait(str)
    # fmt: on

    def __format__(self, specification: str) -> str:
        value = self._wait(np.asarray)
        return format(value.item() if value.ndim == 0 else value, specification)

    # ---- indices ----

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[DevArray]:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def _key(self, key: Any) -> tuple[Any, ...]:
        """The parts of an index, on the host."""
        parts = key if isinstance(key, tuple) else (key,)
        for part in parts:
            if isinstance(part, (list, np.ndarray)):
                raise TypeError(f"Unsupported type {type(part)}: an index that needs an upload")
        return tuple(part._host if isinstance(part, DevArray) else part for part in parts)

    def __getitem__(self, key: Any) -> DevArray:
        parts = self._key(key)
        arrays = [part for part in parts if isinstance(part, np.ndarray)]
        if any(part.dtype == bool for part in arrays):
            METER.wait("a mask as an index")  # the number of True decides the result's shape
        if not arrays and Ellipsis not in parts:
            parts = (*parts, Ellipsis)  # an element is a 0-d view, not a number
        try:
            return _result(self._host[parts], self)
        except IndexError as error:
            raise Silent(f"{error}: CuPy would wrap it") if arrays else error from error

    def __setitem__(self, key: Any, value: Any) -> None:
        parts = self._key(key)
        value = _operand(value)
        arrays = [part for part in parts if isinstance(part, np.ndarray)]
        if any(part.dtype == bool for part in arrays):
            METER.wait("an assignment through a mask")  # CuPy counts the True ones; copyto does not
        if any(part.dtype != bool for part in arrays):
            try:
                places = np.arange(self.size).reshape(self.shape)[parts]
            except IndexError as error:
                raise Silent(f"{error}: CuPy would wrap it") from error
            if len(np.unique(places)) < places.size:
                raise Silent("an assignment through equal indices: a GPU keeps any of the values")
        METER.operations += 1
        self._host[parts] = value

    def __copy__(self) -> DevArray:
        return _result(self._host.copy())

    def __deepcopy__(self, memo: Any) -> DevArray:
        return _result(self._host.copy())


UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide}
UFUNCS |= {"pow": np.power, "matmul": np.matmul, "floordiv": np.floor_divide}
UFUNCS |= {"mod": np.remainder, "divmod": np.divmod, "eq": np.equal, "ne": np.not_equal}
UFUNCS |= {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def _operator(name: str) -> Callable[..., Any]:
    """The operator `name` of NumPy's arrays, for arrays of the device.

    As in CuPy, an operand that has __array_ufunc__ gets the call by that, whatever its priority; an
    assignment such as += refuses it.
    """
    ufunc = UFUNCS.get(name.strip("_"))

    def apply(self: DevArray, *others: Any) -> Any:
        for other in others:
            if not isinstance(other, (DevArray, np.ndarray, np.generic)):
                override = getattr(other, "__array_ufunc__", None)
                if override is not None:
                    return override(ufunc, "__call__", self, other) if ufunc else _operand(other)
            priority = getattr(other, "__array_priority__", 0)
            if not isinstance(other, DevArray) and priority > self.__array_priority__:
                return NotImplemented  # as CuPy does: a Tensor has its own operators
        operands = [_operand(other) for other in others]
        _check_scalars([self._host, *operands])
        value = getattr(self._host, name)(*operands)
        if name == "__matmul__":
            METER.operations += hidden_matmul_operations(self._host, *operands)
        if name.startswith("__i") and name != "__invert__":
            METER.operations += 1
            return self
        return value if value is NotImplemented else _result(value)

    return apply


_OTHERS = ("__array", "__dlpack", "__class", "__delitem__")  # these are not arithmetic
for _name in NAMES["operators"]:
    _arithmetic = hasattr(np.ndarray, _name) and not _name.startswith(_OTHERS)
    if _arithmetic and _name not in vars(DevArray):
        setattr(DevArray, _name, _operator(_name))


# ---- the module ----------------------------------------------------------------------------------


class Module:
    """The replacement of `cupy`; each name is looked up once."""

    ndarray = DevArray

    def __getattr__(self, name: str) -> Any:
        made = self._make(name)
        setattr(self, name, made)
        return made

    def _make(self, name: str) -> Any:
        if name in ("array", "asarray"):
            return functools.partial(self._array, name)
        if name == "asnumpy":
            return STRICT.to_numpy
        if name in NAMES["ufuncs"] and hasattr(np, name):
            return functools.partial(self._ufunc, name)
        if name in NAMES["functions"] and hasattr(np, name):
            parameters, function = NAMES["functions"][name], getattr(np, name)
            return lambda *args, **kwargs: _call(name, function, parameters, args, kwargs)
        if name in NAMES["others"] and name != "cuda":
            value = getattr(np, name, None)
            if isinstance(value, (type, float, type(None))):
                return getattr(np, name)
        raise AttributeError(f"module 'cupy', or this replacement, lacks {name!r}")

    def _array(self, name: str, x: Any, *args: Any, **kwargs: Any) -> DevArray:
        """The two functions that take a value of the host, also a number: an upload."""
        check_keywords(name, NAMES["functions"][name], (x, *args), kwargs)
        function = getattr(np, name)
        if isinstance(x, DevArray):
            return _result(function(x._host, *args, **kwargs), x)
        METER.uploads.append(name)
        return DevArray(np.array(function(x, *args, **kwargs)))

    def _ufunc(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if set(kwargs) - UFUNC_KEYWORDS:
            allowed = ", ".join(sorted(UFUNC_KEYWORDS))
            raise TypeError(f"Wrong arguments {kwargs}: a ufunc of CuPy takes {allowed}")
        operands = [_operand(x) for x in args]
        _check_scalars(operands)
        out = kwargs.get("out")
        if out is None:
            return _result(getattr(np, name)(*operands, **kwargs))
        getattr(np, name)(*operands, **{**kwargs, "out": _operand(out)})
        METER.operations += 1
        return out


xp: Any = Module()


class StrictBackend(Backend):
    """The device of `xp`. Its kernel `add_rows` is NumPy's."""

    name = "strict"
    xp = xp

    def from_numpy(self, array: np.ndarray) -> DevArray:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"from_numpy moves a NumPy array, got {type(array)}")
        METER.uploads.append("from_numpy")
        return DevArray(np.array(array))

    def to_numpy(self, array: DevArray) -> np.ndarray:
        if not isinstance(array, DevArray):
            raise TypeError(f"to_numpy moves an array of the device, got {type(array)}")
        METER.wait("to_numpy")
        METER.downloads.append("to_numpy")
        return array._host.copy()

    def add_rows(self, index: DevArray, rows: DevArray, count: int) -> DevArray:
        return _result(NUMPY.add_rows(index._host, rows._host, count))


STRICT = StrictBackend()
register(DevArray, lambda array: STRICT)
