"""The replacement for CuPy refuses what CuPy refuses and counts what waits; and minilora uses only
names that CuPy has."""

from __future__ import annotations

import ast
import copy
import importlib.util
import pickle  # noqa: F401 (in an expression below)
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupy_names
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strict_xp import (
    METER,
    NAMES,
    STRICT,
    UFUNC_KEYWORDS,
    DevArray,
    Silent,
    Synchronised,
    check_keywords,
    counted,
    no_sync,
    xp,
)

from minilora.autograd import Tensor
from minilora.backend import Backend, backend_of
from minilora.errors import DeviceError

PACKAGE = Path(__file__).parents[1] / "minilora"


def on_device(*values: Any, dtype: Any = np.float32) -> DevArray:
    return STRICT.from_numpy(np.array(values, dtype))


def indices(*values: int) -> DevArray:
    return on_device(*values, dtype=np.int64)


X = on_device(1.5, -2.0, 3.0)
M = STRICT.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
I = indices(0, 2, 2)
HOST = np.ones(3, np.float32)


def assign(key: Any, value: Any) -> None:
    copy.copy(X)[key] = value


# ---- what is refused -----------------------------------------------------------------------------

# Expressions of the names above, with words of the error's message.
TYPE_ERRORS: dict[str, str] = {}
# Implicit conversion
TYPE_ERRORS["np.asarray(X)"] = "Implicit conversion"
TYPE_ERRORS["np.array([X, X])"] = "Implicit conversion"
TYPE_ERRORS["np.concatenate([X, X])"] = "Implicit conversion"
TYPE_ERRORS["np.exp(X)"] = "DevArray"
# Arrays of the host
TYPE_ERRORS["X + HOST"] = "ndarray"
TYPE_ERRORS["HOST * X"] = "ndarray"
TYPE_ERRORS["HOST == X"] = "ndarray"
TYPE_ERRORS["copy.copy(X).__iadd__(np.ones(3))"] = "ndarray"
TYPE_ERRORS["M @ HOST"] = "ndarray"
TYPE_ERRORS["xp.maximum(X, np.ones(3))"] = "ndarray"
TYPE_ERRORS["xp.where(X > 0, X, np.zeros(3))"] = "ndarray"
TYPE_ERRORS["xp.where(np.array([True] * 3), X, X)"] = "ndarray"
TYPE_ERRORS["X[np.array([0, 1])]"] = "ndarray"
TYPE_ERRORS["M[:, np.array([0, 1])]"] = "ndarray"
TYPE_ERRORS["X[np.array([True, False, True])]"] = "ndarray"
TYPE_ERRORS["assign(slice(None), np.ones(3))"] = "ndarray"
TYPE_ERRORS["assign(np.array([0, 1]), 0.0)"] = "ndarray"
TYPE_ERRORS["STRICT.to_numpy(np.ones(3))"] = "ndarray"
# Lists
TYPE_ERRORS["xp.concatenate([X, np.ones(3)])"] = "list"
TYPE_ERRORS["X - [1.0, 2.0, 3.0]"] = "list"
TYPE_ERRORS["xp.exp([1.0])"] = "list"
TYPE_ERRORS["X.take([0, 1])"] = "list"
TYPE_ERRORS["X[[0, 1]]"] = "list"
TYPE_ERRORS["STRICT.from_numpy([1.0])"] = "list"
# NumPy scalars that widen
TYPE_ERRORS["X * np.float64(2)"] = "float64 would widen float32"
TYPE_ERRORS["np.float64(2) * X"] = "float64 would widen float32"
TYPE_ERRORS["xp.maximum(X, np.float64(2))"] = "float64 would widen float32"
# Parameters that CuPy lacks
TYPE_ERRORS["xp.exp(X, where=X > 0)"] = "Wrong arguments"
TYPE_ERRORS["X.sum(initial=0)"] = "'initial'"
TYPE_ERRORS["xp.sum(X, where=X > 0)"] = "'where'"
TYPE_ERRORS["xp.max(X, initial=0)"] = "'initial'"
TYPE_ERRORS["X.mean(where=X > 0)"] = "'where'"
TYPE_ERRORS["xp.einsum('i,i', X, X, out=X)"] = "'out'"
TYPE_ERRORS["xp.zeros(3, like=X)"] = "'like'"
TYPE_ERRORS["xp.zeros(3, device='cpu')"] = "'device'"
TYPE_ERRORS["X.argsort(stable=True)"] = "'stable'"
TYPE_ERRORS["X.swapaxes(0, 0, 0)"] = "takes 2"
# What an array of the device does not support
TYPE_ERRORS["{X}"] = "unhashable"
TYPE_ERRORS["pickle.dumps(X)"] = "pickling"
TYPE_ERRORS["range(indices(3)[0])"] = "integer"
TYPE_ERRORS["list(X[0])"] = "0-d"
TYPE_ERRORS["STRICT.from_numpy(X)"] = "DevArray"

# What CuPy would do without a word, with another result than NumPy's.
SILENT: dict[str, str] = {}
SILENT["X[indices(0, 3)]"] = "wrap"
SILENT["X.take(indices(3))"] = "wrap"
SILENT["xp.take(M, indices(-3), axis=0)"] = "wrap"
SILENT["assign(indices(3), 0.0)"] = "wrap"
SILENT["assign(I, X)"] = "equal indices"
SILENT["assign(indices(2, -1), 0.0)"] = "equal indices"


def assert_refused(expression: str, kind: type[Exception], words: str) -> None:
    before = X._host.copy()
    with pytest.raises(kind, match=words):
        eval(expression)
    np.testing.assert_array_equal(X._host, before)


@pytest.mark.parametrize("expression", TYPE_ERRORS)
def test_dev_array_raises_type_error(expression: str) -> None:
    assert_refused(expression, TypeError, TYPE_ERRORS[expression])


@pytest.mark.parametrize("expression", SILENT)
def test_dev_array_raises_where_cupy_is_silent(expression: str) -> None:
    assert_refused(expression, Silent, SILENT[expression])


def test_dev_array_argsort_is_stable_or_raises_value_error() -> None:
    assert_refused("X.argsort(kind='quicksort')", ValueError, "stable")


ABSENT = ["block", "vecdot", "unstack", "errstate", "float128", "add_at", "busday_count"]
ABSENT += ["linalg", "random", "cuda", "_core"]


@pytest.mark.parametrize("name", ABSENT)
def test_xp_lacks_a_name_that_cupy_or_the_replacement_lacks(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(xp, name)


def test_xp_and_dev_array_lack_every_name_outside_the_list() -> None:
    listed = {*NAMES["functions"], *NAMES["ufuncs"], *NAMES["others"], *dir(type(xp))}
    absent = set(dir(np)) - listed
    assert len(absent) > 50
    for name in absent:
        assert not hasattr(xp, name)
    members = {*NAMES["methods"], *NAMES["attributes"], *NAMES["operators"], *dir(object)}
    absent = set(dir(np.ndarray)) - members
    assert {"__imatmul__", "__index__", "__contains__", "resize", "to_device"} <= absent
    for name in absent:
        assert not hasattr(X, name)


@pytest.mark.parametrize("name", ["at", "reduce", "reduceat", "accumulate", "outer"])
def test_xp_ufuncs_can_only_be_called(name: str) -> None:
    with pytest.raises(AttributeError):
        getattr(xp.add, name)


# ---- what waits, and what moves ------------------------------------------------------------------

WAITS = ["float(X[0])", "int(X[0])", "bool(X[0] > 0)", "1 if X.max() > 0 else 0", "3.0 in X"]
WAITS += ["X[0].item()", "X.tolist()", "repr(X)", "f'{X}'", "f'{X[0]:.3f}'"]
WAITS += [
    "assign(X > 0, 0.0)",
    "X[X > 0]",
    "xp.where(X > 0)",
    "X.nonzero()",
    "xp.nonzero(X)",
    "xp.flatnonzero(X)",
]
WAITS += ["xp.unique(I)", "X.get()", "STRICT.to_numpy(X)", "xp.asnumpy(X)"]
WAITS += ["Tensor(X[0]).item()", "Tensor(X).numpy()", "repr(Tensor(X))"]


@pytest.mark.parametrize("expression", WAITS)
def test_no_sync_forbids_what_waits_and_meter_counts_it(expression: str) -> None:
    with counted():
        eval(expression)
    assert len(METER.syncs) >= 1
    with no_sync(), pytest.raises(Synchronised):
        eval(expression)
    eval(expression)  # allowed again


def test_no_sync_allows_what_does_not_wait() -> None:
    with counted(), no_sync():
        first, second = M  # views, one after another
        y = xp.where(X > 0, X, -np.inf) * first.sum() + second @ X
        y[indices(0, 1)] = 7.0
        xp.copyto(y, 0.0, where=X > 0)
        len(y)
        for name in ("shape", "dtype", "size", "ndim", "T", "base"):
            getattr(y, name)
        copy.deepcopy(y)
        M.astype(np.float64, copy=False)
        METER.uploads.remove("from_numpy")  # the index above
    assert METER.uploads == []
    assert METER.downloads == []
    assert METER.syncs == []


def test_meter_counts_uploads_and_downloads() -> None:
    with counted():
        xp.asarray(2.5)
        xp.array([1, 2])
        STRICT.from_numpy(np.ones(2))
        xp.asarray(X)
        xp.array(X)
        xp.full(3, 2.5)
        assert METER.uploads == ["asarray", "array", "from_numpy"]
        STRICT.to_numpy(X)
        X.get()
        assert METER.downloads == METER.syncs == ["to_numpy", "to_numpy"]
    with counted():
        assert METER.uploads == METER.downloads == METER.syncs == []


VIEWS = ["M.T", "M[0]", "M.reshape(-1)", "M[:, None]", "M.swapaxes(0, 1)"]
VIEWS += ["xp.broadcast_to(X, (2, 3))"]
OPERATIONS = {"M + M": 1, "xp.exp(M)": 1, "M.sum()": 1, "M.astype(np.float64)": 1}
OPERATIONS["xp.exp(M, out=M.copy())"] = 2


def test_meter_counts_operations_but_not_views() -> None:
    for expression, operations in {**dict.fromkeys(VIEWS, 0), **OPERATIONS}.items():
        with counted():
            eval(expression)
            assert METER.operations == operations, expression


# Matrix products of the arrays below, with the operations that CuPy takes for each.
PRODUCTS: dict[str, int] = {}
PRODUCTS["xp.matmul(a, b)"] = 1
PRODUCTS["a @ b[0]"] = 4  # three tables of pointers, because the batch is broadcast
PRODUCTS["a[0] @ b"] = 4
PRODUCTS["a[:, None] @ b[None]"] = 7  # three tables for each of two batch axes
PRODUCTS["a[:1] @ b[:1]"] = 1
PRODUCTS["a @ c.swapaxes(1, 2)"] = 2  # a transposed operand is copied,
PRODUCTS["a.swapaxes(1, 2) @ c.swapaxes(1, 2)[:, :3]"] = 3
PRODUCTS["a[:, :2] @ b"] = 2  # and every other one with gaps,
PRODUCTS["a[0].T @ c[0, :3]"] = 1  # but not among two axes,
PRODUCTS["a[0] @ c[0].T"] = 1
PRODUCTS["a[0, :, :2] @ c[0, :2]"] = 2  # where only gaps matter
PRODUCTS["a[0] @ b[0, :, 0]"] = 2
PRODUCTS["xp.matmul(a, b, out=out)"] = 1
PRODUCTS["xp.matmul(a, b, out=out.swapaxes(1, 2))"] = 2
PRODUCTS["xp.matmul(a[0], b[0], out=out[0].T)"] = 2
PRODUCT_ARRAYS = {"a": (2, 3, 4), "b": (2, 4, 3), "c": (2, 5, 4), "out": (2, 3, 3)}


def product_arrays(backend: Backend) -> dict[str, Any]:
    names = {"xp": backend.xp}
    for name, shape in PRODUCT_ARRAYS.items():
        names[name] = backend.from_numpy(np.ones(shape, np.float32))
    return names


@pytest.mark.parametrize("expression", PRODUCTS)
def test_meter_counts_the_hidden_copies_of_a_product(expression: str) -> None:
    names = product_arrays(STRICT)
    with counted():
        eval(expression, names)
        assert METER.operations == PRODUCTS[expression]


# ---- what comes out ------------------------------------------------------------------------------

SCALARS = ["X.sum()", "X.max(axis=0)", "xp.mean(X)", "X[1]", "M[0, 1]", "M.sum(axis=(0, 1))"]
SCALARS += ["X @ X"]


@pytest.mark.parametrize("expression", SCALARS)
def test_dev_array_reductions_and_elements_are_0_d_arrays(expression: str) -> None:
    y = eval(expression)
    assert type(y) is DevArray
    assert y.shape == ()


OF_M = ["M.T", "M[0]", "M[0, 1]", "M[:, 1:][..., None]", "M.reshape(3, 2).T"]
OF_M += ["xp.moveaxis(M, 0, 1)", "xp.split(M, [1], axis=1)[1]"]
FRESH = ["M", "M + 0", "M.copy()", "M.T.reshape(-1)", "M[I[:1]]", "M.astype(np.float64)"]


def test_dev_array_views_know_their_base() -> None:
    for expression in OF_M:
        assert eval(expression).base is M
    for expression in FRESH:
        assert eval(expression).base is None
    assert M.astype(np.float32, copy=False) is M
    assert X.T is X
    y = M.copy()
    row = y[1]
    row += 1
    np.testing.assert_array_equal(STRICT.to_numpy(y), [[0, 1, 2], [4, 5, 6]])


def test_xp_writes_into_out_and_returns_it() -> None:
    out = xp.empty_like(M)
    assert xp.exp(M, out=out) is out
    square = xp.empty((2, 2), np.float32)
    assert xp.matmul(M, M.T, out=square).shape == (2, 2)


def test_tensor_knows_its_backend_and_its_operators_take_precedence() -> None:
    t = Tensor(X)
    assert backend_of(X) is STRICT
    assert t.backend is STRICT
    assert type(X + t) is Tensor
    assert type(t * X) is Tensor
    with pytest.raises(TypeError, match="Unsupported type"):
        X.__iadd__(t)
    with pytest.raises(DeviceError, match=r"'strict'.*'cpu'.*\.to\('strict'\)"):
        t + Tensor(HOST)


class Override:
    """An operand with the given protocols, each of which says that it was asked."""

    def __init__(self, **protocols: Any):
        self.__dict__.update(protocols)


def test_dev_array_operators_ask_array_ufunc_and_ignore_the_priority_beside_it() -> None:
    calls = []

    def array_ufunc(*arguments: Any) -> str:
        calls.append(arguments)
        return "asked"

    both = Override(__array_ufunc__=array_ufunc, __array_priority__=-1)
    assert X * both == "asked"
    assert calls == [(np.multiply, "__call__", X, both)]
    priority = Override(__array_priority__=1000)
    with pytest.raises(TypeError, match="unsupported operand"):
        X * priority


SHAPES = hnp.array_shapes(max_dims=3, max_side=4)
FLOATS = hnp.arrays(np.float32, SHAPES, elements=st.floats(-3, 3, width=32))
SAME = ["2.0 - a / 3 + a * a - 1 / (a * a + 1)"]
SAME += ["xp.exp(xp.minimum(a, 1.0)) + xp.sqrt(xp.abs(a))"]
SAME += ["a.sum(axis=0)", "a.max()", "a.mean(axis=-1, keepdims=True)", "a.cumsum()"]
SAME += ["a.reshape(-1)[::-1].copy()"]
SAME += ["xp.where(a > 0, a, 0)"]
SAME += ["xp.concatenate([a, a], axis=0).astype('float64')"]
SAME += ["xp.stack([a, -a]).argsort(axis=0)"]
SAME += ["a.T @ a.reshape(len(a), -1) if a.ndim == 2 else a"]


@given(FLOATS)
def test_xp_results_have_the_bits_of_numpy(a: np.ndarray) -> None:
    for expression in SAME:
        mine = eval(expression, {"xp": xp, "a": STRICT.from_numpy(a)})
        reference = eval(expression, {"xp": np, "a": a})
        assert mine.shape == reference.shape
        assert mine.dtype == reference.dtype
        assert STRICT.to_numpy(mine).tobytes() == np.asarray(reference).tobytes()


def test_from_numpy_and_to_numpy_copy() -> None:
    a = np.zeros(3)
    on_device = STRICT.from_numpy(a)
    a[0] = 1
    back = STRICT.to_numpy(on_device)
    assert not back.any()
    back[0] = 1
    assert not STRICT.to_numpy(on_device).any()


# ---- the census: which names minilora uses -------------------------------------------------------

# In these files the methods of arrays are looked at, too.
WITH_ARRAYS = ["backend", "autograd", "functional", "effective", "nn", "optim"]
WITH_ARRAYS += ["training/parallel", "models/transformer", "lora/layer", "lora/lora"]
FUNCTIONS = {*NAMES["functions"], *NAMES["ufuncs"], *NAMES["others"]}
MEMBERS = {*NAMES["methods"], *NAMES["attributes"], *NAMES["operators"], *dir(object)}


def nodes_of(path: Path) -> Iterator[ast.AST]:
    """Every node of a file's syntax tree, except inside NumPy's backend."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.ClassDef) and node.name == "NumpyBackend"):
            yield node
            waiting += ast.iter_child_nodes(node)


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def is_module(node: ast.AST) -> bool:
    """`xp`, `backend.xp` or `namespace(x)`."""
    if isinstance(node, ast.Call):
        return is_name(node.func, "namespace")
    return is_name(node, "xp") or (isinstance(node, ast.Attribute) and node.attr == "xp")


def complaint(name: str, of_module: bool, keywords: list[str]) -> str | None:
    """Why CuPy would refuse a function, or an array's method, with these keywords."""
    if name not in (FUNCTIONS if of_module else MEMBERS):
        return name
    if of_module and name in NAMES["ufuncs"]:
        wrong = set(keywords) - UFUNC_KEYWORDS
        return f"{name}({wrong}=)" if wrong else None
    signatures = NAMES["functions"] if of_module else NAMES["methods"]
    if name in signatures:
        try:
            check_keywords(name, signatures[name], (), dict.fromkeys(keywords))
        except TypeError as error:
            return str(error)
    return None


def complaints(path: Path, arrays: bool) -> tuple[list[str], int]:
    """(names and parameters in a file that CuPy lacks, how many were looked at).

    arrays   look at the methods of arrays, too
    """
    wrong = []
    seen = 0
    nodes = list(nodes_of(path))
    calls = {node.func: node for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if not isinstance(node, ast.Attribute):
            continue
        of_module = is_module(node.value)
        of_array = arrays and node.attr in dir(np.ndarray) and not is_name(node.value, "np")
        if of_module or of_array:
            seen += 1
            keywords = [k.arg for k in calls[node].keywords if k.arg] if node in calls else []
            text = complaint(node.attr, of_module, keywords)
            if text is not None:
                wrong.append(f"{path.name}:{node.lineno}: {text}")
    return wrong, seen


def test_minilora_uses_only_names_and_parameters_that_cupy_has() -> None:
    total = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        wrong, seen = complaints(path, name in WITH_ARRAYS)
        assert not wrong
        total += seen
    assert total > 400
    for name in WITH_ARRAYS:
        assert (PACKAGE / f"{name}.py").exists()


CENSUS: dict[str, str] = {}
CENSUS["xp.vecdot(a, b)"] = "vecdot"
CENSUS["x.backend.xp.block([a])"] = "block"
CENSUS["namespace(x).exp(a, where=b)"] = "exp({'where'}=)"
CENSUS["xp.exp(a, where=b)"] = "exp({'where'}=)"
CENSUS["xp.sum(a, initial=0)"] = "'initial'"
CENSUS["a.sum(axis=0, where=b)"] = "'where'"
CENSUS["a.resize(3)"] = "resize"
CENSUS["xp.exp(a, out=a) + a.sum(axis=0, keepdims=True) + np.exp(a, where=b)"] = ""
CENSUS["class NumpyBackend:\n    x = xp.vecdot"] = ""


@pytest.mark.parametrize("code", CENSUS)
def test_complaints_name_what_cupy_lacks(code: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    wrong, _ = complaints(path, True)
    if not CENSUS[code]:
        assert wrong == []
        return
    (text,) = wrong
    assert CENSUS[code] in text


def test_operators_do_not_depend_on_the_versions_of_numpy_and_python() -> None:
    named = {"__add__", "__buffer__", "__release_buffer__", "sum"}
    assert cupy_names.operators(named, named) == sorted({"__add__"} | cupy_names.COMPARISONS)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="not installed: cupy")
def test_cupy_names_are_those_of_the_installed_cupy() -> None:
    survey = cupy_names.survey()
    if survey["cupy"] != NAMES["cupy"]:
        pytest.skip(f"the list is of CuPy {NAMES['cupy']}, installed is {survey['cupy']}")
    assert survey == NAMES
    assert cupy_names.as_text(survey) == cupy_names.FILE.read_text(encoding="utf-8")
