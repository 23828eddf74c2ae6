"""What NumPy's functions and Python's operators do with a Tensor: its operation, values, or an
error; never a plain array in place of a graph."""

from __future__ import annotations

import builtins
import copy
import inspect
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from operations import public_operations

from minilora import Parameter, no_grad
from minilora import autograd as ag
from minilora.autograd import Tensor, gradients
from minilora.errors import DeviceError, GraphError
from minilora.nn import Linear
from minilora.protocols import NUMPY_NAMES, SIGNATURES

equal = np.testing.assert_array_equal
ROW = np.array([1.5, -2.0, 3.0])
MATRIX = np.arange(1.0, 7.0).reshape(2, 3)
MASK = np.array([True, False, True])


def leaf(values: Any = ROW) -> Tensor:
    return Tensor(np.array(values), True)


def named(table: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("call", table.values(), ids=list(table))


# ---- functions that the engine has ---------------------------------------------------------------

# Each takes a Tensor or an array of MATRIX.
KNOWN: dict[str, Callable[[Any], Any]] = {}
for _name in ("exp", "tanh", "sqrt", "log", "negative", "absolute", "abs"):
    KNOWN[_name] = getattr(np, _name)
for _name in ("add", "subtract", "multiply", "divide", "true_divide", "power"):
    _function = getattr(np, _name)
    KNOWN[f"{_name} of an array"] = lambda x, f=_function: f(x, ROW)
    KNOWN[f"{_name} to an array"] = lambda x, f=_function: f(ROW * ROW, x)
    KNOWN[f"{_name} to a number"] = lambda x, f=_function: f(np.float64(2), x)
for _name in ("maximum", "minimum"):
    _function = getattr(np, _name)
    KNOWN[_name] = lambda x, f=_function: f(x, 3.25)
    KNOWN[f"{_name} of an array"] = lambda x, f=_function: f(ROW, x)
for _name in ("sum", "mean", "max", "min", "amax", "amin"):
    _function = getattr(np, _name)
    KNOWN[_name] = _function
    KNOWN[f"{_name} axis"] = lambda x, f=_function: f(x, 1)
    KNOWN[f"{_name} axis="] = lambda x, f=_function: f(x, axis=(0, 1), keepdims=True, out=None)
KNOWN["matmul"] = lambda x: np.matmul(x, ROW)
KNOWN["matmul to an array"] = lambda x: np.matmul(MATRIX.T, x)
KNOWN["where"] = lambda x: np.where(MASK, x, 0)
KNOWN["where not"] = lambda x: np.where(MASK, 1.0, x)
KNOWN["clip"] = lambda x: np.clip(x, 2.5, 4.5)
KNOWN["clip above"] = lambda x: np.clip(x, None, 4.5)
KNOWN["clip min="] = lambda x: np.clip(x, a_min=2.5, a_max=None)
KNOWN["concatenate"] = lambda x: np.concatenate([x, MATRIX])
KNOWN["concatenate axis="] = lambda x: np.concatenate((MATRIX, x, x), axis=1)
KNOWN["stack"] = lambda x: np.stack([x, MATRIX])
KNOWN["stack axis="] = lambda x: np.stack([x, x], axis=-1)
KNOWN["reshape"] = lambda x: np.reshape(x, (3, 2))
KNOWN["reshape -1"] = lambda x: np.reshape(x, -1)
KNOWN["transpose"] = np.transpose
KNOWN["transpose axes"] = lambda x: np.transpose(x, (1, 0))
KNOWN["transpose axes="] = lambda x: np.transpose(x, axes=[-1, 0])
KNOWN["reshape order=C"] = lambda x: np.reshape(x, (3, 2), order="C")
KNOWN["clip of an array"] = lambda x: np.clip(x, np.float64(2.5), np.array(4.5))
KNOWN["broadcast_to"] = lambda x: np.broadcast_to(x, (4, 2, 3))
# Options that ask for what NumPy does without them
KNOWN["add where=True"] = lambda x: np.add(x, 1, where=True)
KNOWN["add casting="] = lambda x: np.add(x, 1, casting="same_kind", order="K", subok=True)
KNOWN["exp out=None"] = lambda x: np.exp(x, out=None, where=True, dtype=None)
KNOWN["sum where=True"] = lambda x: np.sum(x, where=True, dtype=None, initial=np._NoValue)
KNOWN["max keepdims="] = lambda x: np.max(x, axis=1, keepdims=np._NoValue)
KNOWN["concatenate casting="] = lambda x: np.concatenate([x, x], dtype=None, casting="same_kind")
# Operators with an array or a NumPy scalar on the left
KNOWN["array +"] = lambda x: ROW + x
KNOWN["array -"] = lambda x: ROW - x
KNOWN["array *"] = lambda x: ROW * x
KNOWN["array /"] = lambda x: ROW / x
KNOWN["array **"] = lambda x: abs(ROW) ** x
KNOWN["array @"] = lambda x: MATRIX.T @ x
KNOWN["0-d array *"] = lambda x: np.array(2.5) * x
KNOWN["number *"] = lambda x: np.float64(2.5) * x
KNOWN["integer -"] = lambda x: np.int64(2) - x
KNOWN["number **"] = lambda x: np.float64(2) ** x
KNOWN["list +"] = lambda x: ROW.tolist() + x
KNOWN["sum of rows"] = builtins.sum
KNOWN["sum of a list"] = lambda x: builtins.sum([x, x])
KNOWN["-"] = operator.neg
KNOWN["+"] = operator.pos
KNOWN["abs()"] = operator.abs


@named(KNOWN)
def test_numpy_functions_that_the_engine_has_keep_the_graph(call: Any) -> None:
    x = leaf(MATRIX)
    y = call(x)
    expected = call(MATRIX)
    assert isinstance(y, Tensor)
    np.testing.assert_allclose(y.data, expected, rtol=1e-15)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    (g,) = gradients(y, [x], np.asarray(dy))
    step = 1e-6 * np.random.default_rng(1).standard_normal(MATRIX.shape)
    change = (call(MATRIX + step) - call(MATRIX - step)) / 2
    assert np.sum(g * step) == pytest.approx(np.sum(dy * change), rel=1e-6, abs=1e-15)


def test_numpy_functions_of_the_same_name_are_all_known():
    known = set(Tensor.operations)
    for name, operation in public_operations().items():
        function = getattr(np, NUMPY_NAMES.get(name, name), None)
        if function is None or not callable(function) or inspect.isclass(function):
            continue
        assert Tensor.operations[function.__name__] is operation
        known.discard(function.__name__)
    assert not known
    assert set(SIGNATURES) <= set(Tensor.operations)


def test_numpy_functions_without_a_gradient_give_tensors_too():
    x = Tensor(MATRIX)
    for y in (np.tanh(x), np.sum(x), np.concatenate([x, x]), ROW * x):
        assert isinstance(y, Tensor)
        assert not y.requires_grad


# ---- functions that it lacks ---------------------------------------------------------------------

UNKNOWN: dict[str, Callable[[Any], Any]] = {}
for _name in ("sin", "square", "sign", "floor", "positive", "log1p", "cbrt", "fabs", "modf"):
    UNKNOWN[f"np.{_name}"] = getattr(np, _name)
for _name in ("cumsum", "prod", "std", "var", "sort", "median", "ravel", "squeeze", "copy"):
    UNKNOWN[f"np.{_name}"] = getattr(np, _name)
for _name in ("diff", "diag", "trace", "nan_to_num", "atleast_2d", "flip", "real", "ptp"):
    UNKNOWN[f"np.{_name}"] = getattr(np, _name)
UNKNOWN["np.linalg.norm"] = np.linalg.norm
UNKNOWN["np.linalg.svd"] = np.linalg.svd
UNKNOWN["np.fft.fft"] = np.fft.fft
UNKNOWN["np.dot"] = lambda x: np.dot(MATRIX.T, x)
UNKNOWN["np.outer"] = lambda x: np.outer(x, ROW)
UNKNOWN["np.einsum"] = lambda x: np.einsum("ij,ij", x, x)
UNKNOWN["np.vstack"] = lambda x: np.vstack([x, MATRIX])
UNKNOWN["np.split"] = lambda x: np.split(x, 2)
UNKNOWN["np.interp"] = lambda x: np.interp(x, MATRIX[0], MATRIX[0])
UNKNOWN["np.floor_divide"] = lambda x: MATRIX // x
UNKNOWN["np.remainder"] = lambda x: x % 2
UNKNOWN["np.divmod"] = lambda x: divmod(x, 2)
UNKNOWN["np.add.reduce"] = np.add.reduce
UNKNOWN["np.add.accumulate"] = np.add.accumulate
UNKNOWN["np.add.outer"] = lambda x: np.add.outer(x, ROW)
UNKNOWN["np.add.reduceat"] = lambda x: np.add.reduceat(x, [0, 1])
UNKNOWN["np.sin with order="] = lambda x: np.sin(x, order="F", where=True)
UNKNOWN["np.exp with where="] = lambda x: np.exp(x, where=MATRIX > 0, out=np.zeros((2, 3)))
UNKNOWN["np.exp with dtype="] = lambda x: np.exp(x, dtype=np.float64)
UNKNOWN["np.exp with out="] = lambda x: np.exp(x, out=np.zeros((2, 3)))
UNKNOWN["np.sum with dtype="] = lambda x: np.sum(x, dtype=np.float64)
UNKNOWN["np.max with initial="] = lambda x: np.max(x, initial=0.0)
UNKNOWN["np.reshape with order="] = lambda x: np.reshape(x, (3, 2), order="F")


@pytest.mark.parametrize("name", UNKNOWN)
def test_numpy_functions_that_the_engine_lacks_raise_or_work_on_values(name: str) -> None:
    call = UNKNOWN[name]
    x = leaf(MATRIX)
    words = rf"^{name.replace('.', '[.]')}.* has no gradient here.*\.numpy\(\)"
    for tensor in (x, x * 1.0):
        with pytest.raises(GraphError, match=words):
            call(tensor)
    with no_grad():
        results = [call(x)]
    results.append(call(Tensor(MATRIX)))
    expected = call(MATRIX)
    for got in results:
        assert not isinstance(got, Tensor)
        parts = zip(got, expected, strict=True) if isinstance(got, (tuple, list)) else None
        for mine, theirs in parts or [(got, expected)]:
            equal(mine, theirs)


# Where NumPy would make an array of a tensor by itself.
CONVERSIONS: dict[str, Callable[[Any], Any]] = {}
CONVERSIONS["asarray"] = np.asarray
CONVERSIONS["array"] = np.array
CONVERSIONS["array of a list"] = lambda x: np.array([x, x])
CONVERSIONS["array of scalars"] = lambda x: np.array([x[0, 0], x[0, 1]])
CONVERSIONS["Tensor of a list"] = lambda x: Tensor([x, x])
CONVERSIONS["float64"] = np.float64
CONVERSIONS["assignment"] = lambda x: np.zeros((2, 3)).__setitem__(slice(None), x)
CONVERSIONS["method of an array"] = lambda x: MATRIX.T.dot(x)
CONVERSIONS["full"] = lambda x: np.full((2, 3), x)
CONVERSIONS["masked array +"] = lambda x: np.ma.array(MATRIX, mask=MATRIX > 2) + x
CONVERSIONS["masked"] = lambda x: np.ma.masked * x
CONVERSIONS["np.ma.exp"] = np.ma.exp
CONVERSIONS["np.ma.add"] = lambda x: np.ma.add(x, 1)
CONVERSIONS["choice"] = lambda x: np.random.default_rng(0).choice(x)


@named(CONVERSIONS)
def test_tensor_does_not_become_an_array_by_itself(call: Any) -> None:
    x = leaf(MATRIX)
    for tensor in (x, x * 1.0):
        with pytest.raises(GraphError, match=r"requires a gradient: .*\.numpy\(\).*stack\(\)"):
            call(tensor)
    call(Tensor(MATRIX))
    with no_grad():
        call(x)


def test_ufuncs_made_of_python_functions_have_no_gradient():
    # All their types are objects, which says nothing about booleans.
    double = np.frompyfunc(lambda value: value * 2, 1, 1)
    with pytest.raises(GraphError, match="has no gradient here"):
        double(leaf())
    equal(double(Tensor(ROW)), 2 * ROW)


NOT_REAL: dict[str, Callable[[Any], Any]] = {}
NOT_REAL["complex number"] = lambda x: np.complex128(1j) * x
NOT_REAL["complex array"] = lambda x: (ROW * 1j) * x
NOT_REAL["complex list"] = lambda x: x * [1j, 2, 3]
NOT_REAL["array of objects"] = lambda x: x * ROW.astype(object)
NOT_REAL["array of text"] = lambda x: np.array(["a", "b", "c"]) + x
NOT_REAL["date"] = lambda x: x + np.datetime64(1, "s")
NOT_REAL["time"] = lambda x: np.timedelta64(2, "s") * x


@named(NOT_REAL)
def test_operations_take_real_numbers_only_beside_a_gradient(call: Any) -> None:
    # 1j * x gave the array of zeros that is the real part of 1j, times x.
    with pytest.raises(TypeError, match="operations take booleans, integers and floats"):
        call(leaf())


def test_operations_without_a_gradient_take_complex_numbers():
    for y in (np.complex128(2j) * Tensor(ROW), Tensor(ROW * 2j) / 1.0):
        equal(y.data, ROW * 2j)


def test_masked_constant_is_not_a_number():
    with pytest.raises(DeviceError, match="MaskedConstant"):
        leaf() * np.ma.masked


def test_clip_takes_no_tensor_with_a_gradient_as_a_bound():
    for array in (leaf(), ROW):
        with pytest.raises(GraphError, match=r"clip: low and high must be a number.*maximum\(\)"):
            np.clip(array, 0.0, leaf(2.0))
        equal(np.clip(array, 0.0, Tensor(np.array(2.0))).data, np.clip(ROW, 0, 2))
    with pytest.raises(ValueError, match="must be numbers or None"):
        np.clip(ROW, leaf(), None)


def test_where_takes_no_condition_with_a_gradient():
    x = leaf()
    with pytest.raises(GraphError, match=r"the condition requires a gradient.*x > 0"):
        np.where(x, 1.0, 2.0)
    equal(ag.where(x.detach(), 1.0, 2.0).data, [1, 1, 1])


def test_tensor_of_a_result_would_lose_its_graph():
    x = leaf()
    with pytest.raises(GraphError, match=r"would lose the graph.*\.detach\(\)"):
        Tensor(x * 2.0)
    assert Tensor((x * 2.0).detach()).node is None
    assert Tensor(x).data is x.data


READING = {"data", "dtype", "item", "ndim", "shape", "size"}


def test_tensor_has_no_method_of_an_array_that_returns_an_array():
    # `take` was one: its name did not say that the graph ends there.
    x = leaf(MATRIX)
    for name in set(dir(np.ndarray)) & set(dir(Tensor)) - READING:
        if name.startswith("_"):
            continue
        member = getattr(x, name)
        arguments = [(3, 2)] if name == "reshape" else []
        result = member(*arguments) if callable(member) else member
        assert isinstance(result, Tensor), name


def test_tensor_values_are_read_by_those_who_say_so():
    x = leaf([2.25])
    for y in (x, x * 1.0):
        assert y.item() == float(y) == y.numpy()[0] == y.data[0] == 2.25
        assert int(y) == 2
        assert math.sqrt(y) == 1.5
        equal(y.detach(), [2.25])
        assert bool(y)


def test_format_of_a_tensor_is_that_of_its_only_value():
    for x in (leaf(2.25), leaf([2.25]) * 1.0):
        assert f"{x:.1f}|{x:>6}" == "2.2|  2.25"
        assert f"{x}" == str(x) == repr(x)
    with pytest.raises(TypeError, match=r"formats one value, got a tensor of shape \(3,\)"):
        format(leaf(), ".1f")


def test_index_of_a_tensor_is_that_of_its_only_integer():
    one = Tensor(np.array(1))
    assert list(range(3))[one] == 1
    equal(ROW[:one], ROW[:1])
    x = leaf()
    equal(gradients(x[one:], [x], np.ones(2))[0], [0, 1, 1])
    for wrong in (leaf(1.0), Tensor(np.array([1])), Tensor(np.array(True))):
        with pytest.raises(TypeError, match="only a 0-d tensor of integers is an index"):
            operator.index(wrong)


# Booleans, indices and shapes have no gradient to lose.
VALUES: dict[str, Callable[[Any], Any]] = {}
VALUES["isnan"] = np.isnan
VALUES["isfinite"] = np.isfinite
VALUES["equal"] = lambda x: np.equal(x, 2)
VALUES["greater"] = lambda x: np.greater(MATRIX, x)
VALUES["logical_not"] = np.logical_not
VALUES["argmax"] = lambda x: np.argmax(x, axis=1)
VALUES["argsort"] = np.argsort
VALUES["any"] = lambda x: np.any(x > 2)
VALUES["isclose"] = lambda x: np.isclose(x, MATRIX)
VALUES["allclose"] = lambda x: np.allclose(MATRIX, x)
VALUES["array_equal"] = lambda x: np.array_equal(x, MATRIX)
VALUES["shape"] = np.shape
VALUES["ndim"] = np.ndim
VALUES["size"] = np.size
VALUES["zeros_like"] = np.zeros_like
VALUES["=="] = lambda x: x == MATRIX.T[:, :1].T
VALUES["!="] = lambda x: x != 2
VALUES["<"] = lambda x: x < ROW
VALUES["<="] = lambda x: x <= 2
VALUES[">"] = lambda x: x > 2
VALUES[">="] = lambda x: x >= 2
VALUES["array =="] = lambda x: x == ROW
VALUES["array <"] = lambda x: x > ROW
VALUES["number >"] = lambda x: np.float64(2) > x
VALUES["== itself"] = lambda x: x == x
VALUES["== None"] = lambda x: x == None  # noqa: E711
VALUES["in"] = lambda x: 3.0 in x
VALUES["not in"] = lambda x: 9.0 not in x


@named(VALUES)
def test_numpy_functions_without_a_gradient_work_on_values(call: Any) -> None:
    for x in (leaf(MATRIX), leaf(MATRIX) * 1.0, Tensor(MATRIX)):
        got = call(x)
        assert not isinstance(got, Tensor)
        equal(got, call(MATRIX))
        assert type(got) is type(call(MATRIX))


# ---- what writes ---------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], Any]] = {}
WRITES["out"] = lambda x: np.add(ROW, 1, out=x)
WRITES["out of a reduction"] = lambda x: np.sum(MATRIX, axis=0, out=x)
WRITES["out of sin"] = lambda x: np.sin(ROW, x)
WRITES["at"] = lambda x: np.add.at(x, [0], 1.0)
WRITES["copyto"] = lambda x: np.copyto(x, ROW)
WRITES["put"] = lambda x: np.put(x, [0], 1.0)
WRITES["fill_diagonal"] = lambda x: np.fill_diagonal(x, 0)
WRITES["[]"] = lambda x: operator.setitem(x, 0, 1.0)
WRITES["[...]"] = lambda x: operator.setitem(x, ..., ROW)


@named(WRITES)
def test_tensor_is_not_written_into(call: Any) -> None:
    for x in (leaf(), leaf() * 1.0, Tensor(ROW.copy())):
        with pytest.raises((GraphError, TypeError)):
            call(x)
        with no_grad(), pytest.raises((GraphError, TypeError)):
            call(x)
        equal(x.data, ROW)


def test_array_assigned_with_an_operator_takes_values_only():
    array = ROW.copy()
    for assign in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow):
        with pytest.raises(GraphError, match=r"with out= has no gradient"):
            assign(array, leaf())
        equal(array, ROW)
    array -= Tensor(ROW)
    equal(array, np.zeros(3))
    with no_grad():
        array += leaf()
    equal(array, ROW)


IN_PLACE = {
    "+=": (operator.iadd, ROW),
    "-=": (operator.isub, ROW),
    "*=": (operator.imul, 2.0),
    "/=": (operator.itruediv, np.float64(2)),
    "**=": (operator.ipow, 2),
    "@=": (operator.imatmul, np.eye(3)),
    "//=": (operator.ifloordiv, 2),
    "%=": (operator.imod, 2),
}


@pytest.mark.parametrize("symbol", IN_PLACE)
def test_parameter_is_assigned_in_place_inside_no_grad_only(symbol: str) -> None:
    assign, other = IN_PLACE[symbol]
    expected = assign(ROW.copy(), other) if symbol != "@=" else ROW @ other
    p = Parameter(ROW.astype(np.float32))
    storage = p.data
    kept = (p * p).sum()
    with pytest.raises(GraphError, match=r"inside no_grad\(\), or write p = p"):
        assign(p, other)
    equal(storage, ROW)
    with no_grad():
        assert assign(p, other) is p
    assert p.data is storage
    assert p.dtype == np.float32
    assert p.requires_grad
    equal(storage, expected.astype(np.float32))
    with pytest.raises(GraphError, match="'mul' needs was changed"):
        kept.backward()


def test_data_of_a_result_says_that_an_operator_has_changed_its_array():
    y = leaf() * 2.0
    with pytest.raises(GraphError, match=r"not an operation's result; result\.detach\(\)"):
        y.data = ROW
    equal(y.data, 2 * ROW)
    with pytest.raises(GraphError, match=r"has changed its array already.*compute the result"):
        y.data -= 1.0


def test_parameter_keeps_its_shape_in_place():
    p = Parameter(ROW.copy())
    with no_grad(), pytest.raises(ValueError, match="cannot assign"):
        p -= MATRIX
    equal(p.data, ROW)


def test_parameter_that_is_frozen_stays_its_module_s_in_place():
    layer = Linear(MATRIX.copy())
    layer.weight.requires_grad = False
    x = leaf()
    kept = (x * layer.weight).sum()
    layer.weight *= 0.5
    assert [type(p) for p in layer.parameters()] == [Parameter]
    equal(layer.weight.data, MATRIX / 2)
    with pytest.raises(GraphError, match="'mul' needs was changed"):
        kept.backward()
    with pytest.raises(GraphError, match="lose a gradient"):
        layer.weight += x
    equal(layer.weight.data, MATRIX / 2)


def test_tensor_that_is_no_trainable_leaf_is_replaced_by_a_new_one():
    x = leaf()
    before = y = x * 2.0
    y -= 1.0
    equal(before.data, 2 * ROW)
    (g,) = gradients(y.sum(), [x])
    equal(g, [2, 2, 2])
    before = frozen = Tensor(ROW.copy())
    frozen *= x
    equal(before.data, ROW)
    assert frozen.requires_grad


def test_sgd_written_by_hand_is_that_of_the_optimiser():
    p = Parameter(ROW.copy())
    for _ in range(3):
        (p * p).sum().backward()
        with no_grad():
            p -= 0.1 * p.grad
        p.grad = None
    np.testing.assert_allclose(p.data, ROW * 0.8**3, rtol=1e-15)


# ---- truth, iteration, identity ------------------------------------------------------------------


def test_bool_of_a_tensor_is_that_of_its_only_value():
    assert Tensor([[2.0]])
    assert not Tensor(0.0)
    for ambiguous in (leaf(), Tensor(np.zeros((0, 3)))):
        with pytest.raises(ValueError, match=r"neither true nor false.*\.any\(\)"):
            bool(ambiguous)
        with pytest.raises(ValueError, match="neither true nor false"):
            operator.not_(ambiguous)


def test_iteration_keeps_the_graph_and_needs_an_axis():
    x = leaf(MATRIX)
    first, second = x
    (g,) = gradients((first * second).sum(), [x])
    equal(g, MATRIX[::-1])
    assert max(leaf()).item() == 3
    assert max(leaf()).requires_grad
    assert [row.shape for row in reversed(x)] == [(3,), (3,)]
    for number in (leaf(2.0), Tensor(2.0)):
        for read in (list, iter, len, tuple):
            with pytest.raises(TypeError, match=r"0-d tensor.*\.item\(\)"):
                read(number)


def test_comparing_a_tensor_with_another_shape_is_refused_as_in_numpy():
    with pytest.raises(ValueError, match="broadcast"):
        leaf(ROW) == leaf(ROW[:2])  # noqa: B015


def test_hash_of_a_tensor_is_its_identity():
    a, b = leaf(), leaf()
    table = {a: "a", b: "b"}
    assert (table[a], table[b], len({a, b, a})) == ("a", "b", 2)
    assert hash(a) == object.__hash__(a)
    assert a in [a]


class Collision(Tensor):
    """A leaf whose hash is that of all others: a dictionary then asks for equality."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 1


def test_gradients_tell_leaves_apart_by_identity_not_by_hash():
    a, b = (Collision(np.array(ROW), True) for _ in range(2))
    loss = (a * 2.0 + b * 3.0).sum()
    da, db = gradients(loss, [a, b], retain_graph=True)
    equal(da, [2, 2, 2])
    equal(db, [3, 3, 3])
    loss.backward()
    equal(a.grad, da)
    equal(b.grad, db)


def test_index_takes_tensors_of_integers_and_booleans():
    x = leaf()
    at = Tensor([2, 0, 2])
    y = x[at]
    at.data = np.array([0, 0, 0])  # backward sends each gradient to where the value came from
    equal(gradients(y, [x], np.ones(3))[0], [1, 0, 2])
    equal(x[Tensor(MASK)].data, ROW[MASK])
    equal(x[x > 0].data, ROW[ROW > 0])
    with pytest.raises(IndexError):
        x[leaf()]


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deepcopy_and_pickle_give_a_leaf_of_its_own(duplicate: Any) -> None:
    x = Parameter(ROW.copy())
    y = duplicate(x)
    assert type(y) is Parameter
    assert y.requires_grad
    assert y.backend is x.backend
    y.data = np.zeros(3)
    equal(x.data, ROW)
    equal(gradients((x + y).sum(), [y])[0], np.ones(3))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copy_deepcopy_and_pickle_refuse_a_result(duplicate: Any) -> None:
    # A copied graph would lead to copies of the leaves, whose gradients nobody asks for.
    with pytest.raises(GraphError, match=r"cannot be copied or pickled.*detach\(\)"):
        duplicate(leaf() * 2.0)
    with no_grad():
        duplicate(leaf() * 2.0)


def test_where_with_a_tensor_as_condition_is_numpys_too():
    condition = Tensor(MASK)
    x = leaf()
    y = np.where(condition, x, 0.0)
    equal(gradients(y, [x], np.ones(3))[0], MASK)
    assert isinstance(ag.where(x > 0, x, 0.0), Tensor)
