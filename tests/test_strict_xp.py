"""The stand-in for CuPy refuses what CuPy refuses, counts what waits, and minilora uses nothing that CuPy has not."""

from __future__ import annotations

import ast
import copy
import importlib.util
import pickle
from collections.abc import Callable, Iterator
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
    _check_keywords,
    counted,
    no_sync,
    xp,
)

from minilora.autograd import Tensor
from minilora.backend import backend_of
from minilora.errors import DeviceError

PACKAGE = Path(__file__).parents[1] / "minilora"


def on_device(*values: Any, dtype: Any = np.float32) -> DevArray:
    return STRICT.from_numpy(np.array(values, dtype))


X = on_device(1.5, -2.0, 3.0)
M = STRICT.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
I = on_device(0, 2, 2, dtype=np.int64)


def assign(key: Any, value: Any) -> None:
    copy.copy(X)[key] = value


# ---- what is refused ----

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "np.asarray": (lambda: np.asarray(X), TypeError, "Implicit conversion"),
    "np.array of several": (lambda: np.array([X, X]), TypeError, "Implicit conversion"),
    "a NumPy ufunc": (lambda: np.exp(X), TypeError, "DevArray"),
    "a NumPy function": (lambda: np.concatenate([X, X]), TypeError, "Implicit conversion"),
    "host on the right": (lambda: X + np.ones(3, np.float32), TypeError, "ndarray"),
    "host on the left": (lambda: np.ones(3, np.float32) * X, TypeError, "ndarray"),
    "host, compared": (lambda: np.ones(3, np.float32) == X, TypeError, "ndarray"),
    "host, in place": (lambda: copy.copy(X).__iadd__(np.ones(3)), TypeError, "ndarray"),
    "host, matmul": (lambda: M @ np.ones(3, np.float32), TypeError, "ndarray"),
    "host in a ufunc": (lambda: xp.maximum(X, np.ones(3)), TypeError, "ndarray"),
    "host in a function": (lambda: xp.where(X > 0, X, np.zeros(3)), TypeError, "ndarray"),
    "host condition": (lambda: xp.where(np.array([True] * 3), X, X), TypeError, "ndarray"),
    "host among others": (lambda: xp.concatenate([X, np.ones(3)]), TypeError, "list"),
    "list operand": (lambda: X - [1.0, 2.0, 3.0], TypeError, "list"),
    "list in a ufunc": (lambda: xp.exp([1.0]), TypeError, "list"),
    "list to take": (lambda: X.take([0, 1]), TypeError, "list"),
    "list as an index": (lambda: X[[0, 1]], TypeError, "list"),
    "NumPy index": (lambda: X[np.array([0, 1])], TypeError, "ndarray"),
    "NumPy index in a tuple": (lambda: M[:, np.array([0, 1])], TypeError, "ndarray"),
    "NumPy mask": (lambda: X[np.array([True, False, True])], TypeError, "ndarray"),
    "assigning host": (lambda: assign(slice(None), np.ones(3)), TypeError, "ndarray"),
    "assigning at host": (lambda: assign(np.array([0, 1]), 0.0), TypeError, "ndarray"),
    "NumPy scalar that widens": (
        lambda: X * np.float64(2),
        TypeError,
        "float64 would widen float32",
    ),
    "the same on the left": (lambda: np.float64(2) * X, TypeError, "float64 would widen float32"),
    "the same in a ufunc": (
        lambda: xp.maximum(X, np.float64(2)),
        TypeError,
        "float64 would widen float32",
    ),
    "ufunc(where=)": (lambda: xp.exp(X, where=X > 0), TypeError, "Wrong arguments"),
    "sum(initial=)": (lambda: X.sum(initial=0), TypeError, "'initial'"),
    "sum(where=)": (lambda: xp.sum(X, where=X > 0), TypeError, "'where'"),
    "max(initial=)": (lambda: xp.max(X, initial=0), TypeError, "'initial'"),
    "mean(where=)": (lambda: X.mean(where=X > 0), TypeError, "'where'"),
    "einsum(out=)": (lambda: xp.einsum("i,i", X, X, out=X), TypeError, "'out'"),
    "zeros(like=)": (lambda: xp.zeros(3, like=X), TypeError, "'like'"),
    "zeros(device=)": (lambda: xp.zeros(3, device="cpu"), TypeError, "'device'"),
    "argsort that is not stable": (lambda: X.argsort(kind="quicksort"), ValueError, "stable"),
    "argsort(stable=)": (lambda: X.argsort(stable=True), TypeError, "'stable'"),
    "one argument too many": (lambda: X.swapaxes(0, 0, 0), TypeError, "takes 2"),
    "an index beyond": (lambda: X[on_device(0, 3, dtype=np.int64)], Silent, "wrap"),
    "take beyond": (lambda: X.take(on_device(3, dtype=np.int64)), Silent, "wrap"),
    "xp.take beyond": (lambda: xp.take(M, on_device(-3, dtype=np.int64), axis=0), Silent, "wrap"),
    "assigning beyond": (lambda: assign(on_device(3, dtype=np.int64), 0.0), Silent, "wrap"),
    "assigning twice": (lambda: assign(I, X), Silent, "equal indices"),
    "assigning to a place by two names": (
        lambda: assign(on_device(2, -1, dtype=np.int64), 0.0),
        Silent,
        "equal",
    ),
    "hash": (lambda: {X}, TypeError, "unhashable"),
    "pickle": (lambda: pickle.dumps(X), TypeError, "pickling"),
    "operator.index": (lambda: range(on_device(3, dtype=np.int64)[0]), TypeError, "integer"),
    "iterating 0-d": (lambda: list(X[0]), TypeError, "0-d"),
    "from_numpy of the device's": (lambda: STRICT.from_numpy(X), TypeError, "DevArray"),
    "from_numpy of a list": (lambda: STRICT.from_numpy([1.0]), TypeError, "list"),
    "to_numpy of the host's": (lambda: STRICT.to_numpy(np.ones(3)), TypeError, "ndarray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_happens(name: str) -> None:
    before = X._host.copy()
    do, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        do()
    np.testing.assert_array_equal(X._host, before)


@pytest.mark.parametrize(
    "name",
    [
        "block",
        "vecdot",
        "unstack",
        "errstate",
        "float128",
        "add_at",
        "busday_count",
        "linalg",
        "random",
        "cuda",
        "_core",
    ],
)
def test_a_name_that_cupy_or_the_stand_in_has_not(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(xp, name)


def test_every_name_outside_the_list_is_refused() -> None:
    listed = {*NAMES["functions"], *NAMES["ufuncs"], *NAMES["others"]}
    absent = [name for name in dir(np) if name not in listed and not hasattr(type(xp), name)]
    assert len(absent) > 50
    assert not [name for name in absent if hasattr(xp, name)]
    members = {*NAMES["methods"], *NAMES["attributes"], *NAMES["operators"], *dir(object)}
    absent = [name for name in dir(np.ndarray) if name not in members]
    assert {"__imatmul__", "__index__", "__contains__", "resize", "to_device"} <= set(absent)
    assert not [name for name in absent if hasattr(X, name)]


def test_ufuncs_are_called_and_nothing_else() -> None:
    for name in ("at", "reduce", "reduceat", "accumulate", "outer"):
        with pytest.raises(AttributeError):
            getattr(xp.add, name)


# ---- what waits, and what moves ----

WAITS: dict[str, Callable[[], Any]] = {
    "float": lambda: float(X[0]),
    "int": lambda: int(X[0]),
    "bool": lambda: bool(X[0] > 0),
    "if": lambda: 1 if X.max() > 0 else 0,
    "in": lambda: 3.0 in X,
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "repr": lambda: repr(X),
    "print": lambda: f"{X}",
    "format": lambda: f"{X[0]:.3f}",
    "mask": lambda: X[X > 0],
    "where": lambda: xp.where(X > 0),
    "nonzero": lambda: X.nonzero(),
    "xp.nonzero": lambda: xp.nonzero(X),
    "flatnonzero": lambda: xp.flatnonzero(X),
    "unique": lambda: xp.unique(I),
    "get": lambda: X.get(),
    "to_numpy": lambda: STRICT.to_numpy(X),
    "asnumpy": lambda: xp.asnumpy(X),
    "Tensor.item": lambda: Tensor(X[0]).item(),
    "Tensor.numpy": lambda: Tensor(X).numpy(),
    "repr of a Tensor": lambda: repr(Tensor(X)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_counted_and_can_be_forbidden(name: str) -> None:
    with counted():
        WAITS[name]()
    assert len(METER.syncs) >= 1
    with no_sync(), pytest.raises(Synchronised):
        WAITS[name]()
    WAITS[name]()  # and only there


def test_what_does_not_wait() -> None:
    with counted(), no_sync():
        first, second = M  # views, one after another
        y = xp.where(X > 0, X, -np.inf) * first.sum() + second @ X
        y[on_device(0, 1, dtype=np.int64)] = 7.0
        y[X > 0] = 0.0
        (
            len(y),
            y.shape,
            y.dtype,
            y.size,
            y.ndim,
            y.T,
            y.base,
            copy.deepcopy(y),
            M.astype(np.float64, copy=False),
        )
        METER.uploads.remove("from_numpy")  # the index above
    assert (METER.uploads, METER.downloads, METER.syncs) == ([], [], [])


def test_uploads_and_downloads_are_counted() -> None:
    with counted():
        (
            xp.asarray(2.5),
            xp.array([1, 2]),
            STRICT.from_numpy(np.ones(2)),
            xp.asarray(X),
            xp.array(X),
            xp.full(3, 2.5),
        )
        assert METER.uploads == ["asarray", "array", "from_numpy"]
        STRICT.to_numpy(X), X.get()
        assert METER.downloads == METER.syncs == ["to_numpy", "to_numpy"]
    with counted():
        assert METER.uploads == METER.downloads == METER.syncs == []


def test_operations_are_counted_and_views_are_not() -> None:
    with counted():
        M.T, M[0], M.reshape(-1), M[:, None], M.swapaxes(0, 1), xp.broadcast_to(X, (2, 3))
        assert METER.operations == 0
        M + M, xp.exp(M), M.sum(), xp.exp(M, out=M.copy()), M.astype(np.float64)
        assert METER.operations == 6


# ---- what comes out ----


def test_reductions_are_0_d_arrays_of_the_device() -> None:
    for y in (X.sum(), X.max(axis=0), xp.mean(X), X[1], M[0, 1], M.sum(axis=(0, 1)), X @ X):
        assert type(y) is DevArray
        assert y.shape == ()


def test_views_know_their_owner() -> None:
    for view in (
        M.T,
        M[0],
        M[0, 1],
        M[:, 1:][..., None],
        M.reshape(3, 2).T,
        xp.moveaxis(M, 0, 1),
        xp.split(M, [1], axis=1)[1],
    ):
        assert view.base is M
    for fresh in (M, M + 0, M.copy(), M.T.reshape(-1), M[I[:1]], M.astype(np.float64)):
        assert fresh.base is None
    assert M.astype(np.float32, copy=False) is M
    assert X.T is X
    y = M.copy()
    row = y[1]
    row += 1
    np.testing.assert_array_equal(STRICT.to_numpy(y), [[0, 1, 2], [4, 5, 6]])
    out = xp.empty_like(M)
    assert xp.exp(M, out=out) is out
    assert xp.matmul(M, M.T, out=xp.empty((2, 2), np.float32)).shape == (2, 2)


def test_a_tensor_knows_its_backend_and_goes_first() -> None:
    t = Tensor(X)
    assert backend_of(X) is t.backend is STRICT
    assert type(X + t) is type(t * X) is Tensor
    with pytest.raises(DeviceError, match=r"'strict'.*'cpu'.*\.to\('strict'\)"):
        t + Tensor(np.ones(3, np.float32))


FLOATS = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-3, 3, width=32)
)
SAME: list[Callable[[Any, Any], Any]] = [
    lambda xp, a: 2.0 - a / 3 + a * a - 1 / (a * a + 1),
    lambda xp, a: xp.exp(xp.minimum(a, 1.0)) + xp.sqrt(xp.abs(a)),
    lambda xp, a: (a.sum(axis=0), a.max(), a.mean(axis=-1, keepdims=True), a.cumsum()),
    lambda xp, a: a.reshape(-1)[::-1].copy(),
    lambda xp, a: xp.where(a > 0, a, 0),
    lambda xp, a: xp.concatenate([a, a], axis=0).astype("float64"),
    lambda xp, a: xp.stack([a, -a]).argsort(axis=0),
    lambda xp, a: a.T @ a.reshape(len(a), -1) if a.ndim == 2 else a,
]


@given(FLOATS, st.sampled_from(SAME))
def test_results_have_the_bits_of_numpy(a: np.ndarray, function: Callable[[Any, Any], Any]) -> None:
    mine, theirs = function(xp, STRICT.from_numpy(a)), function(np, a)
    for one, other in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (mine, theirs)), strict=True
    ):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert STRICT.to_numpy(one).tobytes() == np.asarray(other).tobytes()


def test_an_array_of_the_device_is_a_copy_of_the_host() -> None:
    a = np.zeros(3)
    there = STRICT.from_numpy(a)
    a[0] = 1
    back = STRICT.to_numpy(there)
    assert not back.any()
    back[0] = 1
    assert not STRICT.to_numpy(there).any()


# ---- the census: which names minilora uses ----

ROOMS = [
    "backend",
    "autograd",
    "functional",
    "nn",
    "optim",
    "parallel",
    "transformer",
    "lora/layer",
    "lora/lora",
]


def nodes_of(path: Path) -> Iterator[ast.AST]:
    """Every node, but for NumPy's own backend."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.ClassDef) and node.name == "NumpyBackend"):
            yield node
            waiting += ast.iter_child_nodes(node)


def is_module(node: ast.AST) -> bool:
    """`xp`, `backend.xp` or `namespace(x)`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "namespace"
    return (isinstance(node, ast.Name) and node.id == "xp") or (
        isinstance(node, ast.Attribute) and node.attr == "xp"
    )


def complaints(path: Path, arrays: bool) -> tuple[list[str], int]:
    """(names and parameters in a file that CuPy lacks, how many were looked at)."""
    wrong, seen = [], 0
    nodes = list(nodes_of(path))
    calls = {node.func: node for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if not isinstance(node, ast.Attribute):
            continue
        name, call = node.attr, calls.get(node)
        keywords = {k.arg: None for k in call.keywords if k.arg} if call else {}
        if is_module(node.value):
            known = name in NAMES["functions"] or name in NAMES["ufuncs"] or name in NAMES["others"]
            parameters = NAMES["functions"].get(name)
        elif (
            arrays
            and name in dir(np.ndarray)
            and not (isinstance(node.value, ast.Name) and node.value.id == "np")
        ):
            known = name in {
                *NAMES["methods"],
                *NAMES["attributes"],
                *NAMES["operators"],
                *dir(object),
            }
            parameters = NAMES["methods"].get(name)
        else:
            continue
        seen += 1
        if not known:
            wrong.append(f"{path.name}:{node.lineno}: {name}")
        elif is_module(node.value) and name in NAMES["ufuncs"]:
            wrong += [
                f"{path.name}:{node.lineno}: {name}({k}=)" for k in set(keywords) - UFUNC_KEYWORDS
            ]
        elif parameters is not None:
            try:
                _check_keywords(name, parameters, (), keywords)
            except TypeError as error:
                wrong.append(f"{path.name}:{node.lineno}: {error}")
    return wrong, seen


def test_minilora_uses_only_names_and_parameters_that_cupy_has() -> None:
    total = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").as_posix()
        wrong, seen = complaints(path, room in ROOMS)
        assert not wrong
        total += seen
    assert total > 400  # it does look


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("xp.vecdot(a, b)", ["vecdot"]),
        ("x.backend.xp.block([a])", ["block"]),
        ("namespace(x).exp(a, where=b)", ["exp(where=)"]),
        ("xp.exp(a, where=b)", ["exp(where=)"]),
        ("xp.sum(a, initial=0)", ["'initial'"]),
        ("a.sum(axis=0, where=b)", ["'where'"]),
        ("a.resize(3)", ["resize"]),
        ("xp.exp(a, out=a) + a.sum(axis=0, keepdims=True) + np.exp(a, where=b)", []),
        ("class NumpyBackend:\n    x = xp.vecdot", []),
    ],
)
def test_the_census_sees_what_cupy_has_not(code: str, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "room.py"
    path.write_text(code)
    wrong, _ = complaints(path, True)
    assert len(wrong) == len(found)
    assert all(name in line for name, line in zip(found, wrong, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="not installed: cupy")
def test_the_list_is_what_this_cupy_has() -> None:
    survey = cupy_names.survey()
    if survey["cupy"] != NAMES["cupy"]:
        pytest.skip(f"the list is of CuPy {NAMES['cupy']}, installed is {survey['cupy']}")
    assert survey == NAMES
    assert cupy_names.as_text(survey) == cupy_names.FILE.read_text(encoding="utf-8")
