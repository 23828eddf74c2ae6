"""The engine: what operations leave behind, what backward promises, and what it refuses."""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from edges import EDGES, Edge
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from operations import TABLE

from minilora import autograd as ag
from minilora import backend
from minilora import functional as F
from minilora.autograd import Node, Tensor, gradients, no_grad
from minilora.effective import EffectiveWeight, effective_linear
from minilora.errors import DeviceError, GraphError

RNG = np.random.default_rng(8)
equal = np.testing.assert_array_equal
EVERY = pytest.mark.parametrize("op", TABLE, ids=lambda op: op.id)
ELEMENTARY = pytest.mark.parametrize(
    "op", [op for op in TABLE if op.reference is not None], ids=lambda op: op.id
)


def some_dy(y: Tensor) -> np.ndarray:
    return np.asarray(np.random.default_rng(3).standard_normal(y.shape)).astype(y.dtype)


def leaf(*shape: int, dtype: Any = np.float64) -> Tensor:
    return Tensor(np.asarray(RNG.standard_normal(shape)).astype(dtype), True)


def captured(function: Any) -> Iterator[Any]:
    """Everything that a function refers to, inside nested functions, tuples and lists, too."""
    waiting = [function]
    seen = set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, (tuple, list, set)):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, types.FunctionType):
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
            waiting += item.__defaults__ or ()
            waiting += (item.__kwdefaults__ or {}).values()


def graph(y: Tensor) -> Iterator[Node]:
    waiting = [y.node]
    seen = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            yield node
            waiting += node.parents


def kept_arrays(y: Tensor) -> list[np.ndarray]:
    """The distinct arrays (views count as what they view) that the graph of y keeps alive."""
    arrays = {}
    for node in graph(y):
        for item in captured(node.vjp):
            if isinstance(item, np.ndarray):
                owner = item if item.base is None else item.base
                arrays[id(owner)] = owner
    return list(arrays.values())


# ---- what every operation does -------------------------------------------------------------------


@ELEMENTARY
def test_operation_forward_is_what_numpy_computes(op):
    for dtype in (np.float64, np.float32):
        leaves = op.leaves(dtype)
        got = op.function(*leaves).data
        expected = op.reference(*(x.data for x in leaves))
        assert type(got) is np.ndarray
        assert got.shape == np.shape(expected)
        # mean multiplies by 1 / n and NumPy divides by n; the rest is the same operation.
        ulp = 2 if op.name == "mean" else 0
        assert (np.abs(got - expected) <= ulp * np.spacing(np.abs(expected))).all()


@ELEMENTARY
def test_operation_in_float32_stays_float32(op):
    y = op.function(*op.leaves(np.float32))
    assert y.dtype == np.float32
    for g in y.node.vjp(np.ones(y.shape, np.float32)):
        assert g is None or g.dtype == np.float32


@EVERY
def test_gradients_are_new_arrays(op):
    for dtype in (np.float64, np.float32):
        leaves = op.leaves(dtype)
        y = op.function(*leaves)
        dy = some_dy(y)
        given = [dy, y.data, *(x.data for x in leaves)]
        before = [a.copy() for a in given]
        grads = gradients(y, leaves, dy, retain_graph=True)
        others = given + kept_arrays(y)
        for i, (x, g) in enumerate(zip(leaves, grads, strict=True)):
            assert type(g) is np.ndarray
            assert (g.shape, g.dtype) == (x.shape, x.dtype)
            assert g.base is None
            assert g.flags.owndata
            assert g.flags.writeable
            for other in [*others, *grads[:i], *grads[i + 1 :]]:
                assert not np.shares_memory(g, other)
        for a, b in zip(given, before, strict=True):
            equal(a, b)  # neither pass writes into what it was given


@EVERY
def test_operation_vjp_refers_to_no_tensor(op):
    y = op.function(*op.leaves())
    for node in graph(y):
        assert not [item for item in captured(node.vjp) if isinstance(item, (Tensor, Node))]


@EVERY
def test_gradients_do_not_depend_on_which_other_inputs_are_frozen(op):
    leaves = op.leaves()
    y = op.function(*leaves)
    dy = some_dy(y)
    full = gradients(y, leaves, dy)
    varied = min(len(leaves), 4)
    for wanted in itertools.product([False, True], repeat=varied):
        wanted += (True,) * (len(leaves) - varied)
        some = [Tensor(x.data, need) for x, need in zip(leaves, wanted, strict=True)]
        y = op.function(*some)
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            assert y.node is None
            continue
        for need, g, expected in zip(wanted, gradients(y, some, dy), full, strict=True):
            if need:
                equal(g, expected)
            else:
                assert g is None


@EVERY
@pytest.mark.parametrize("view", [False, True], ids=["leaf", "view"])
def test_backward_refuses_a_changed_value_only_if_it_reads_it(op, view):
    for i in range(len(op.inputs)):
        leaves = op.leaves()
        inputs = leaves
        if view:  # a view of a leaf reads the same memory
            inputs = [ag.reshape(x, x.shape) for x in leaves]
        y = op.function(*inputs)
        dy = some_dy(y)
        expected = gradients(y, leaves, dy, retain_graph=True)
        leaves[i].data = leaves[i].data + 1
        if i in op.reads:
            needed = f"backward of '{op.name}' needs was changed .*version 0 then, 1 now"
            with pytest.raises(GraphError, match=needed):
                y.backward(dy)
            assert all(x.grad is None for x in leaves)
        else:
            y.backward(dy)
            for x, g in zip(leaves, expected, strict=True):
                equal(x.grad, g)


# ---- at the edges of the domains -----------------------------------------------------------------

AT_EDGES = pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.id)


@AT_EDGES
def test_operation_at_its_edges_has_the_stated_value_and_gradients(edge: Edge) -> None:
    leaves = edge.leaves()
    with np.errstate(all="ignore"):  # NumPy warns of an infinity, which is the value here
        y = edge.function(*leaves)
        grads = gradients(y, leaves, edge.dy)
    assert y.shape == edge.value.shape
    equal(y.data, edge.value)
    for x, g, expected in zip(leaves, grads, edge.gradients, strict=True):
        assert (g.shape, g.dtype) == (x.shape, x.dtype)
        np.testing.assert_allclose(g, expected, rtol=1e-15, atol=0)


@AT_EDGES
def test_operation_whose_results_are_sound_makes_no_warning(edge: Edge) -> None:
    if not edge.quiet:
        return
    leaves = edge.leaves()
    gradients(edge.function(*leaves), leaves, edge.dy)  # a warning would be an error


@pytest.mark.oracle
@pytest.mark.parametrize("edge", [e for e in EDGES if e.peer], ids=lambda edge: edge.id)
def test_operation_at_its_edges_is_stated_as_in_pytorch(edge: Edge) -> None:
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(a, requires_grad=True) for a in edge.inputs]
    y = edge.peer(torch, *leaves)
    shape = edge.value.shape
    equal(y.detach().numpy().reshape(shape), edge.value)
    y.backward(torch.tensor(edge.dy).reshape(y.shape))
    for x, expected in zip(leaves, edge.gradients, strict=True):
        np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-15, atol=0)


INTEGERS = st.sampled_from([np.bool_, np.uint8, np.int8, np.uint16, np.int64])


@given(INTEGERS.flatmap(lambda kind: hnp.arrays(kind, (2, 3))))
def test_min_max_minimum_maximum_of_integers_are_exact(values):
    x = Tensor(values)
    for name in ("min", "max"):
        for axis in (None, 0, 1):
            y = getattr(ag, name)(x, axis)
            expected = getattr(np, name)(values, axis)
            assert y.dtype == values.dtype
            equal(y.data, expected)
    for name in ("minimum", "maximum"):
        y = getattr(ag, name)(x[0], x[1])
        assert y.dtype == values.dtype
        equal(y.data, getattr(np, name)(*values))


def test_neg_of_booleans_is_refused_and_of_integers_is_that_of_numpy():
    with pytest.raises(TypeError, match="boolean negative"):
        -Tensor([True])
    for values in ([1, -2], np.array([1, 2], np.uint8)):
        equal((-Tensor(values)).data, -np.asarray(values))


FLOATS = [np.float16, np.float32, np.float64]
BESIDE = [np.arange(1, 4), np.array([True, True, True]), np.arange(1, 4, dtype=np.uint8)]
BESIDE += [Tensor([1, 2, 3]), [1, 2, 3]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("other", BESIDE, ids=lambda other: f"{type(other).__name__}")
def test_operands_give_integers_the_dtype_of_the_floats_beside_them(dtype, other):
    x = Tensor(np.ones(3, dtype), True)
    for name in BINARY:
        function = functools.partial(ag.where, True) if name == "where" else getattr(ag, name)
        for pair in ((x, other), (other, x)):
            y = function(*pair)
            assert y.dtype == dtype
            (g,) = gradients(y, [x], np.ones(3, dtype))
            assert g.dtype == dtype
    for y in (ag.matmul(x, other), ag.concat([other, x]), ag.stack([x, other])):
        assert y.dtype == dtype
    y = F.linear(x, Tensor(np.arange(6).reshape(2, 3)))
    assert y.dtype == dtype


def test_operands_of_integers_alone_stay_integers():
    x = Tensor(np.array([1, 2], np.int8))
    assert (x + x).dtype == np.int8
    assert (x * np.array([1, 2])).dtype == np.int64
    assert (x * np.ones(2, np.float32)).dtype == np.float32


def test_sum_max_of_repeated_or_missing_axes_are_refused():
    x = leaf(2, 3)
    for reduce in (ag.sum, ag.mean, ag.max, ag.min):
        for axes in ((0, 0), (0, -2), 2, -3, (0, 2)):
            with pytest.raises(ValueError, match=r"duplicate|out of bounds"):
                reduce(x, axes)
        with pytest.raises(ValueError, match="out of bounds"):
            reduce(leaf(), 1)
        y = reduce(x, np.int64(1))
        (g,) = gradients(y, [x], np.ones(2))
        assert g.shape == x.shape


def test_concat_and_stack_refuse_no_tensors_and_no_axis():
    for join in (ag.concat, ag.stack):
        for nothing in ([], (), iter([])):
            with pytest.raises(ValueError, match="got no tensors: give at least one"):
                join(nothing)
        with pytest.raises(ValueError, match="axis must be an integer, got None"):
            join([leaf(2), leaf(2)], None)
        with pytest.raises(ValueError, match="out of bounds"):
            join([leaf(2), leaf(2)], 5)
    with pytest.raises(ValueError, match="zero-dimensional"):
        ag.concat([leaf(), leaf()])


def test_clip_takes_numbers_and_none():
    x = Tensor(np.array([-2.0, 0.5, 3.0], np.float32))
    equal(ag.clip(x, None, 1).data, [-2, 0.5, 1])
    equal(ag.clip(x, np.float64(0)).data, [0, 0.5, 3])
    assert ag.clip(x, np.float64(0), np.array(1)).dtype == np.float32
    integers = ag.clip(Tensor([1, 5]), None, 2)
    assert integers.dtype == np.int64
    equal(integers.data, [1, 2])
    with pytest.raises(ValueError, match="no bounds"):
        ag.clip(x)
    with pytest.raises(ValueError, match=r"numbers or None, got shape \(3,\)"):
        ag.clip(x, np.zeros(3), 1)


# ---- another device ------------------------------------------------------------------------------


class OtherArray(np.ndarray):
    """Stands in for the arrays of a GPU."""


class OtherBackend(backend.NumpyBackend):
    name = "other:0"

    def from_numpy(self, array: np.ndarray) -> Any:
        return array.view(OtherArray)


@pytest.fixture
def other() -> Iterator[OtherBackend]:
    device = OtherBackend()
    backend.register(OtherArray, lambda array: device)
    yield device
    del backend._owners[OtherArray]


@pytest.mark.parametrize("op", [op for op in TABLE if len(op.inputs) > 1], ids=lambda op: op.id)
def test_operation_on_two_devices_names_both_and_the_cure(op, other):
    for i in range(len(op.inputs)):
        mixed = [Tensor(a) for a in op.inputs]
        mixed[i] = Tensor(other.from_numpy(op.inputs[i]))
        assert mixed[i].backend is other
        with pytest.raises(DeviceError) as caught:
            op.function(*mixed)
        for part in ("'cpu'", "'other:0'", ".to("):
            assert part in str(caught.value)


def test_tensor_to_moves_a_leaf(other):
    x = leaf(2, 3)
    assert x.to("cpu") is x
    moved = x.to(other)
    assert moved.backend is other
    assert moved.requires_grad
    assert "device='other:0'" in repr(moved)
    with pytest.raises(DeviceError):
        x + moved
    with pytest.raises(DeviceError):
        moved + x.data  # an array of the host is not moved in secret


# ---- broadcasting, indexing, products: any shape -------------------------------------------------

PAIR = hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_dims=4, max_side=4)
BINARY = ("add", "sub", "mul", "div", "power", "maximum", "minimum", "where")


def call_binary(name: str, a: Tensor, b: Tensor) -> Tensor:
    if name != "where":
        return getattr(ag, name)(a, b)
    last = np.broadcast_shapes(a.shape, b.shape)[-1:]
    return ag.where(np.arange(4) % 2 == 0 if last == (4,) else True, a, b)


def summed_to(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every element of g added to the one of `shape` that broadcasting copied it from."""
    out = np.zeros(shape)
    source = np.broadcast_to(np.arange(out.size).reshape(shape), g.shape)
    np.add.at(out.reshape(-1), source.reshape(-1), g.reshape(-1))
    return out


@pytest.mark.parametrize("name", BINARY)
@given(PAIR, st.integers(0, 2**32 - 1))
@example(hnp.BroadcastableShapes(((), ()), ()), 0)
@example(hnp.BroadcastableShapes(((1,), (0,)), (0,)), 0)
@example(hnp.BroadcastableShapes(((3, 1), (1, 4)), (3, 4)), 0)
def test_unbroadcast_sums_the_gradients_of_the_copies(name, shapes, seed):
    rng = np.random.default_rng(seed)
    data = [np.asarray(rng.uniform(0.5, 2, s)) for s in shapes.input_shapes]
    dy = np.asarray(rng.standard_normal(shapes.result_shape))
    leaves = [Tensor(a, True) for a in data]
    copies = [Tensor(np.broadcast_to(a, shapes.result_shape).copy(), True) for a in data]
    y = call_binary(name, *leaves)
    whole = call_binary(name, *copies)
    equal(y.data, whole.data)
    grads = gradients(y, leaves, dy)
    of_copies = gradients(whole, copies, dy)
    for x, g, h in zip(leaves, grads, of_copies, strict=True):
        assert g.shape == x.shape
        bound = 1e-14 * summed_to(np.abs(h), x.shape)
        assert (np.abs(g - summed_to(h, x.shape)) <= bound).all()


SMALL = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=4)


def keys_of(shape: tuple[int, ...]) -> Any:
    """A shape and a key for it: slices and integers, integer arrays, or a mask."""
    keys = hnp.basic_indices(shape, allow_newaxis=True)
    keys |= hnp.integer_array_indices(shape, result_shape=SMALL)
    keys |= hnp.arrays(bool, shape)
    return st.tuples(st.just(shape), keys)


INDEXED = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4).flatmap(keys_of)


@given(INDEXED)
def test_index_sends_each_gradient_to_where_the_value_came_from(case):
    shape, key = case
    x = leaf(*shape)
    y = ag.index(x, key)
    equal(y.data, x.data[key])
    dy = np.asarray(np.arange(1.0, y.size + 1)).reshape(y.shape)  # integers: exact in any order
    expected = np.zeros(shape)
    np.add.at(expected, key, dy)
    equal(gradients(y, [x], dy)[0], expected)


@given(
    hnp.mutually_broadcastable_shapes(
        signature="(m?,k),(k,n?)->(m?,n?)", min_side=0, max_side=4, max_dims=2
    ),
    st.integers(0, 2**32 - 1),
)
def test_matmul_gradients_are_its_adjoints(shapes, seed):
    # <dy, v @ b> = <da, v> for every v, and the same for b; with small integers both sides are
    # equal to the last bit.
    rng = np.random.default_rng(seed)

    def integers(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.integers(-9, 10, shape).astype(np.float64))

    a, b = (Tensor(integers(s), True) for s in shapes.input_shapes)
    y = a @ b
    equal(y.data, a.data @ b.data)
    dy = integers(y.shape)
    da, db = gradients(y, [a, b], dy)
    v, w = integers(a.shape), integers(b.shape)
    assert (dy * (v @ b.data)).sum() == (da * v).sum()
    assert (dy * (a.data @ w)).sum() == (db * w).sum()


@given(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4), st.data())
def test_sum_of_any_axes_spreads_its_gradient(shape, data):
    axis = data.draw(st.none() | (hnp.valid_tuple_axes(len(shape)) if shape else st.just(())))
    keepdims = data.draw(st.booleans())
    x = leaf(*shape)
    y = ag.sum(x, axis, keepdims)
    expected = x.data.sum(axis=axis, keepdims=keepdims)
    equal(y.data, expected)
    dy = some_dy(y)
    broadcastable = dy.reshape(x.data.sum(axis=axis, keepdims=True).shape)
    equal(gradients(y, [x], dy)[0], np.broadcast_to(broadcastable, shape))


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_sum_mean_max_min_drop_axes_unless_keepdims(name):
    x = leaf(2, 3)
    expected = pytest.approx(getattr(np, name)(x.data), rel=1e-15)
    for reduce in (functools.partial(getattr(ag, name), x), getattr(x, name)):
        assert reduce().shape == ()
        assert reduce(1).shape == (2,)
        assert reduce(1, True).shape == (2, 1)
        assert reduce().item() == expected


def test_mean_max_min_refuse_no_values():
    assert ag.sum(Tensor(np.zeros((0, 3)))).item() == 0
    for reduction in (ag.mean, ag.max, ag.min):
        with pytest.raises(ValueError, match=r"no values|zero-size"):
            reduction(Tensor(np.zeros((0, 3))))


def test_max_min_maximum_minimum_share_the_gradient_of_ties():
    x = Tensor(np.array([[2.0, 5, 5], [7, 7, 7]]), True)
    (dx,) = gradients(x.max(1).sum(), [x])
    equal(dx, [[0, 0.5, 0.5], [1 / 3] * 3])
    (dx,) = gradients(x.min().sum(), [x])
    equal(dx, [[1, 0, 0], [0, 0, 0]])
    a = Tensor(np.array([1.0, 2, 3]), True)
    b = Tensor(np.array([3.0, 2, 1]), True)
    for extreme, first in ((ag.maximum, [0, 0.5, 1]), (ag.minimum, [1, 0.5, 0])):
        da, db = gradients(extreme(a, b).sum(), [a, b])
        equal(da, first)
        equal(db, 1 - da)


def test_concat_and_stack_join_along_the_first_axis_by_default():
    a, b = RNG.standard_normal((2, 3, 3, 3))
    equal(ag.concat([Tensor(a), b]).data, np.concatenate([a, b]))
    equal(ag.stack([Tensor(a), b]).data, np.stack([a, b]))


def test_abs_and_clip_at_their_edges():
    x = Tensor(np.array([-2.0, 0, 0, 3]), True)
    (dx,) = gradients(ag.abs(x).sum(), [x])
    equal(dx, [-1, 0, 0, 1])
    (dx,) = gradients(ag.clip(x, 0, 3).sum(), [x])
    equal(dx, [0, 1, 1, 1])


def test_power_at_the_edges_of_its_domain():
    zero = Tensor(np.zeros(3), True)
    exponent = Tensor(np.array([0.0, 1, 2]), True)
    dz, de = gradients((zero**exponent).sum(), [zero, exponent])  # 0^0 = 1 with slope 0
    equal(dz, [0, 1, 0])
    equal(de, [0, 0, 0])
    x = Tensor(np.array([0.0, np.inf, np.nan]), True)
    (dx,) = gradients((x**0.0).sum(), [x])
    equal(dx, [0, 0, 0])  # x^0 is 1, whatever x is
    base = Tensor(np.array([-3.0]), True)
    two = Tensor(np.array([2.0]), True)
    with np.errstate(invalid="ignore"):
        db, de = gradients((base**two).sum(), [base, two])
    assert db == -6
    assert np.isnan(de)  # (-3)^e is real at e = 2 and not beside it


def test_matmul_refuses_scalars():
    x = leaf(1)
    with pytest.raises(ValueError, match="matmul"):
        x @ Tensor(2.0)
    with pytest.raises(ValueError, match="matmul"):
        Tensor(2.0) @ x


# ---- dtypes and construction ---------------------------------------------------------------------


NUMBERS = [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2), np.array(2.5)]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_operands_give_numbers_the_dtype_of_the_tensor(number):
    x = Tensor(np.ones(3, np.float32), True)
    results = [-x, x.mean(), x.min()]
    results += [x + number, number + x]
    results += [x - number, number - x]
    results += [x * number, number * x]
    results += [x / number, number / x]
    results += [x**number, number**x]
    results += [ag.maximum(x, number), ag.minimum(number, x)]
    results += [ag.where(True, x, number), ag.clip(x, -number, number)]
    for y in results:
        assert y.dtype == np.float32
        (g,) = gradients(y, [x], np.ones(y.shape, np.float32))
        assert g.dtype == np.float32
    equal((number - x).data, np.float32(number) - 1)


def test_operands_keep_the_dtype_of_an_array():
    x = Tensor(np.ones(3, np.float32))
    assert (x + np.ones(3)).dtype == (np.ones((1, 3)) * x).dtype == np.float64
    assert (x + np.ones(3, np.float32)).dtype == np.float32


def test_tensor_takes_its_dtype_from_its_data():
    for data in (1.5, [1.5], [[1.0], [2.0]]):
        assert Tensor(data).dtype == np.float32
    for scalar in (np.float64(1.5), np.float32(1.5)):
        assert Tensor(scalar).dtype == scalar.dtype
        assert type(Tensor(scalar).data) is np.ndarray
    assert Tensor(np.ones(2)).dtype == np.float64
    assert Tensor([1, 2]).dtype == Tensor(3).dtype == np.int64
    assert Tensor([1, 2], dtype=np.float32, requires_grad=True).dtype == np.float32
    array = np.ones(2)
    assert Tensor(array, dtype=np.float64).data is array


def test_tensor_of_integers_computes_as_integers_and_with_fractions_exactly():
    x = Tensor([1, 2, 4])
    assert (x * 2.5).numpy().tolist() == [2.5, 5.0, 10.0]
    assert (Tensor([True, False]) + 2.5).numpy().tolist() == [3.5, 2.5]
    assert ag.add(np.ones(2), 0.1).numpy().tolist() == [1.1, 1.1]
    assert ag.add(0.1, np.ones(2)).numpy().tolist() == [1.1, 1.1]
    assert x.mean().item() == 7 * (1 / 3)
    assert x.min().item() == 1
    for y in (x.min(), -x, x + 1):
        assert y.dtype == np.int64


@pytest.mark.parametrize("data", [[1, 2], [True], np.arange(3), 3])
def test_tensor_of_integers_cannot_require_a_gradient(data):
    with pytest.raises(TypeError, match=r"got (int64|bool): give 1\.0 in place of 1"):
        Tensor(data, requires_grad=True)


def test_tensor_operators_accept_an_array_on_the_left():
    x, a = leaf(2, 2), RNG.standard_normal((2, 2))
    for combine in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul):
        y = combine(a, x)
        assert isinstance(y, Tensor)
        equal(y.data, combine(a, x.data))


def test_tensor_methods_are_the_functions():
    x = Tensor(RNG.uniform(0.5, 2, (2, 3)))
    for name in ("exp", "log", "tanh", "sqrt", "abs", "sum", "mean", "max", "min", "transpose"):
        equal(getattr(x, name)().data, getattr(ag, name)(x).data)
    assert x.reshape(3, 2).shape == x.T.shape == (3, 2)
    assert (len(x), x.ndim, x.size) == (2, 2, 6)
    assert repr(Tensor([1.0, 2.0], True)) == "Tensor([1., 2.], requires_grad=True)"


# ---- the graph -----------------------------------------------------------------------------------


def test_gradients_of_a_tensor_used_twice_add_up():
    x = leaf(3)

    def check(y: Tensor, expected: Any) -> None:
        (dx,) = gradients(y, [x], np.ones(y.shape))
        equal(dx, expected)

    check(x + x, [2] * 3)
    check(x * x, 2 * x.data)
    check(x - x, [0] * 3)
    check(ag.stack([x, x]), [2] * 3)


def test_gradients_are_not_added_in_place_where_two_inputs_share_one():
    a = leaf(3)
    b = leaf(3)
    dy = RNG.standard_normal(3)
    before = dy.copy()
    y = ag.mul(a, 2.0) + (a + b)  # dy itself reaches a and b before the other path adds to a
    da, db = gradients(y, [a, b], dy)
    equal(da, before + 2 * before)
    equal(db, before)
    equal(dy, before)


def test_gradients_have_the_dtype_of_their_leaves():
    a, b = leaf(3, dtype=np.float32), leaf(3)
    assert [g.dtype for g in gradients((a * b).sum(), [a, b])] == [np.float32, np.float64]
    assert gradients(1.0 - b, [b], np.ones(3, np.float32))[0].dtype == np.float64


def test_gradients_visit_each_node_of_60_diamonds_once():
    x = leaf(2)
    y = x
    visits = []

    def counted(vjp: Any) -> Any:
        def call(dy: np.ndarray) -> Any:
            visits.append(vjp)
            return vjp(dy)

        return call

    for _ in range(60):
        y = y + y  # 2^60 paths
        y.node.vjp = counted(y.node.vjp)
    (dx,) = gradients(y, [x], np.ones(2))
    equal(dx, np.full(2, 2.0**60))
    assert len(visits) == 60


def test_gradients_of_an_independent_leaf_and_of_the_loss_itself():
    x, z = leaf(), leaf(2)
    assert gradients(x * 2.0, [z, x]) == [None, 2.0]
    assert gradients(x, [x]) == [1.0]
    dy = np.full((2,), 3.0)
    (g,) = gradients(z, [z], dy)
    assert g is not dy
    assert not np.shares_memory(g, dy)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda x: [x * 2.0], "an operation's result"),
        (lambda x: [x, x.T], "an operation's result"),
        (lambda x: [x.data], "ndarray"),
        (lambda x: [None], "NoneType"),
    ],
)
def test_gradients_refuse_what_is_no_leaf(make, got):
    x = leaf(2, 2)
    params = make(x)
    expected = rf"params\[{len(params) - 1}\] is {got}, but only leaves .* requires_grad=True"
    with pytest.raises(GraphError, match=expected):
        gradients((x * 2.0).sum(), params)


def test_gradients_refuse_a_single_tensor_and_a_loss_that_is_none():
    x = leaf(2, 2)
    with pytest.raises(GraphError, match=r"list of leaves, got one Tensor: pass \[tensor\]"):
        gradients((x * 2.0).sum(), x)
    with pytest.raises(GraphError, match="loss must be a Tensor, got float64"):
        gradients(x.data.sum(), [x])
    (g,) = gradients((x * 2.0).sum(), (p for p in [x]))
    equal(g, np.full((2, 2), 2.0))


def test_backward_accumulates():
    x = leaf(4)
    (x * x).sum().backward()
    first = x.grad
    equal(first, 2 * x.data)
    ag.exp(x).sum().backward()
    equal(x.grad, 2 * x.data + np.exp(x.data))
    equal(first, 2 * x.data)  # a gradient that was returned does not change afterwards


@EVERY
def test_backward_twice_needs_retain_graph(op):
    leaves = op.leaves()
    y = op.function(*leaves)
    if y.node is None:
        return  # dropout of nothing returns its input
    dy = some_dy(y)
    first = gradients(y, leaves, dy, retain_graph=True)
    second = gradients(y, leaves, dy)
    for a, b in zip(first, second, strict=True):
        equal(a, b)
        assert not np.shares_memory(a, b)
    freed = "freed by an earlier backward: .* or pass retain_graph=True"
    with pytest.raises(GraphError, match=freed):
        y.backward(dy)
    assert all(x.grad is None for x in leaves)


def test_backward_takes_retain_graph_by_keyword_only():
    x, dy = leaf(3), np.array([1.0, 2, 3])
    y = x * 2.0
    equal(gradients(y, [x], dy=dy, retain_graph=True)[0], 2 * dy)
    y.backward(dy=dy, retain_graph=True)
    equal(x.grad, 2 * dy)
    with pytest.raises(TypeError, match="positional"):
        gradients(y, [x], dy, True)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        y.backward(dy, True)  # type: ignore[misc]


def test_record_needs_a_gradient_or_none_for_every_input():
    x = leaf(3)
    for count in (0, 1, 3):
        y = ag.record(x.data * 2, (x, x), lambda dy, count=count: (x.data,) * count)
        with pytest.raises(ValueError, match=r"zip\(\) argument"):
            y.backward(np.ones(3))


def test_backward_that_fails_halfway_leaves_no_gradient():
    x, w = leaf(3), leaf(3)
    loss = (ag.tanh(x * w) + x).sum()
    w.data = w.data * 2
    with pytest.raises(GraphError):
        loss.backward()
    assert x.grad is w.grad is None


def test_backward_refuses_what_has_no_gradient_or_a_wrong_dy():
    x = leaf(2, 3)

    def refuse(y: Tensor, message: str, dy: Any = None) -> None:
        with pytest.raises(GraphError, match=message):
            y.backward(dy)

    refuse(Tensor([1.0]), "depends on no tensor")
    refuse(x * x, r"shape \(2, 3\) needs dy")
    refuse(leaf(0) * 2.0, r"shape \(0,\) needs dy")
    wanted = r"dy must be an array of shape \(2, 3\), got"
    refuse(x * x, rf"{wanted} ndarray \(3,\)", np.ones(3))
    refuse(x * x, rf"{wanted} Tensor \(2, 3\)", Tensor(np.ones((2, 3))))
    refuse(x * x, f"{wanted} list", [1.0])
    refuse(x * x, rf"{wanted} MaskedArray \(2, 3\)", np.ma.ones((2, 3)))
    refuse(x * x, rf"{wanted} ndarray \(2, 3\) complex128", np.ones((2, 3)) * 1j)


def test_backward_with_a_number_as_dy_notices_a_change_of_a_leaf():
    # The guards looked for arrays of dy's type, which a NumPy scalar is not.
    x = leaf(3)
    loss = (x * x).sum()
    unchanged = (x * 2.0).sum()
    x.data = np.ones(3)
    with pytest.raises(GraphError, match="'mul' needs was changed"):
        loss.backward(np.float64(1))
    unchanged.backward(np.float64(3))
    equal(x.grad, [6, 6, 6])


# ---- versions ------------------------------------------------------------------------------------


def test_tensor_data_assignment_copies_into_the_same_storage():
    x = leaf(3)
    array = x.data
    value = np.array([1.0, 2, 3])
    x.data = value
    assert x.data is array
    value[0] = 9
    equal(array, [1, 2, 3])
    for wrong in (np.zeros(2), np.zeros(4), np.zeros((1, 3)), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match="cannot assign"):
            x.data = wrong
    with pytest.raises(ValueError, match="cannot assign"):
        leaf(3, dtype=np.float32).data = np.zeros(3)
    for result in (x * 2.0, x.reshape(3)):
        with pytest.raises(GraphError, match="only a leaf"):
            result.data = value


VIEWS: list[Callable[[Tensor], Tensor]] = []
VIEWS.append(lambda w: w.T)
VIEWS.append(lambda w: w.reshape(3, 3))
VIEWS.append(lambda w: w[::-1])
VIEWS.append(lambda w: w.T[1:].reshape(2, 3).T.T)
VIEWS.append(lambda w: ag.broadcast_to(w, (2, 3, 3)))
VIEWS.append(lambda w: w.detach())
VIEWS.append(lambda w: w.detach().T)
VIEWS.append(lambda w: w[...])


@pytest.mark.parametrize("view", VIEWS)
def test_backward_refuses_a_changed_leaf_behind_a_view(view):
    x, w = leaf(3), leaf(3, 3)
    loss = (x * view(w)).sum()
    w.data = w.data + 1
    with pytest.raises(GraphError, match="'mul'"):
        loss.backward()


def test_backward_refuses_changed_memory_from_a_file():
    w = Tensor(np.frombuffer(bytearray(72), np.float64))
    x = leaf(3)
    loss = (x * w[:3]).sum()
    w.data = w.data + 1
    with pytest.raises(GraphError, match="'mul'"):
        loss.backward()


def test_detach_shares_storage_and_version():
    x, w = leaf(3), leaf(3)
    loss = (x * w).sum()
    d = w.detach()
    assert not d.requires_grad
    assert d.node is None
    assert d.data is w.data
    d.data = np.zeros(3)
    with pytest.raises(GraphError):
        loss.backward()
    y = ag.exp(x)
    with pytest.raises(GraphError):
        y.detach().data = np.zeros(3)  # exp's backward reads y


def test_tensor_versions_are_compared_as_numbers():
    x = leaf(2)
    for _ in range(300):
        x.data = x.data + 1
    equal(gradients((x * x).sum(), [x])[0], 2 * x.data)


def test_where_refuses_a_changed_condition():
    c, x = Tensor(np.array([True, False])), leaf(2)
    loss = ag.where(c, x, 0.0).sum()
    c.data = ~c.data
    with pytest.raises(GraphError, match="'where'"):
        loss.backward()


def test_detach_stops_the_gradient():
    x = leaf(3)
    equal(gradients((x * x.detach()).sum(), [x])[0], x.data)


# ---- no_grad -------------------------------------------------------------------------------------


@EVERY
def test_no_grad_records_nothing(op):
    leaves = op.leaves()
    with no_grad():
        y = op.function(*leaves)
    assert y.node is None
    if y.version is not None and y.size:  # the version of a leaf whose storage it shares
        assert any(np.shares_memory(y.data, x.data) for x in leaves)


def test_no_grad_nests_survives_exceptions_decorates_and_is_per_thread():
    with no_grad():
        with no_grad():
            assert not ag.grad_enabled()
        assert not ag.grad_enabled()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(ag.grad_enabled).result()
    assert ag.grad_enabled()
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert ag.grad_enabled()

    @no_grad()
    def inside(depth: int = 2) -> bool:
        return ag.grad_enabled() or (depth > 0 and inside(depth - 1))

    assert not inside()
    assert not inside()
    assert ag.grad_enabled()


def test_no_grad_keeps_no_array_alive():
    x = leaf(100)
    with no_grad():
        y = ag.exp(x)
        watch = weakref.ref(y.data)
        z = y * y
        del y
    assert watch() is None
    assert z.node is None


# ---- what is kept --------------------------------------------------------------------------------


def test_linear_with_frozen_weights_keeps_no_activation():
    x = leaf(50, 4)  # activations have 200 numbers, weights 16
    h = x
    for _ in range(5):
        h = F.linear(h, Tensor(RNG.standard_normal((4, 4))), Tensor(np.zeros(4)))
    assert sorted(a.size for a in kept_arrays(h)) == [16] * 5
    frozen = Tensor(RNG.standard_normal((50, 4)))
    assert F.linear(frozen, Tensor(np.ones((4, 4)))).node is None


def test_lora_linear_keeps_its_input_and_nothing_of_the_base():
    h = Tensor(RNG.standard_normal((50, 4)))
    for _ in range(4):
        base = F.linear(h, Tensor(RNG.standard_normal((4, 4))))
        h = F.lora_linear(h, base, leaf(2, 4), leaf(4, 2), 0.5)
    sizes = [a.size for a in kept_arrays(h)]
    # X of each layer for dA, X A^T (50 x 2) for dB, and weights.
    assert sizes.count(200) == 4
    assert sizes.count(100) == 4
    assert set(sizes) <= {200, 100, 16, 8}


def kept_sizes(y: Tensor) -> set[int]:
    return {a.size for a in kept_arrays(y)}


def test_lora_linear_and_effective_linear_with_frozen_factors_keep_no_activation():
    x = leaf(50, 4)
    W = RNG.standard_normal((4, 4))
    A = Tensor(RNG.standard_normal((2, 4)))
    B = Tensor(RNG.standard_normal((4, 2)))
    y = F.lora_linear(x, F.linear(x, Tensor(W)), A, B, 0.5)
    assert kept_sizes(y) <= {16, 8}
    y = effective_linear(x, EffectiveWeight(W, [(4, None, [])]))
    assert kept_sizes(y) <= {16, 8}


def test_mul_and_matmul_keep_an_operand_for_the_gradient_of_the_other_alone():
    x = leaf(50, 4)
    W = RNG.standard_normal((4, 4))
    assert kept_sizes(ag.mul(x, W[0])) <= {16, 4}
    assert kept_sizes(ag.matmul(x, W[:1].T)) <= {16, 4}


def test_backward_frees_the_nodes_it_has_visited():
    x = leaf(100)
    y = ag.exp(x)
    watch = weakref.ref(y.data)
    loss = y.sum()
    del y
    assert watch() is not None
    loss.backward()
    assert watch() is None


# ---- threads -------------------------------------------------------------------------------------


def test_gradients_in_threads_have_the_same_bits():
    w = leaf(16, 8, dtype=np.float32)
    b = leaf(16, dtype=np.float32)
    v = leaf(5, 16, dtype=np.float32)
    batches = [RNG.standard_normal((6, 8)).astype(np.float32) for _ in range(8)]
    targets = RNG.integers(0, 5, 6)

    def step(x: np.ndarray) -> list[bytes]:
        hidden = F.gelu(F.linear(Tensor(x), w, b))
        loss = F.cross_entropy(F.linear(hidden, v), targets)
        return [g.tobytes() for g in gradients(loss, [w, b, v])]

    expected = [step(x) for x in batches]
    barrier = threading.Barrier(4)

    def run_all(_: int) -> list[list[bytes]]:
        barrier.wait()
        return [step(x) for _ in range(5) for x in batches]

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run_all, range(4)):
            assert got == expected * 5
    for p in (w, b, v):
        assert p.grad is None


# ---- depth and leaks, in separate processes ------------------------------------------------------


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_backward_through_a_chain_of_a_million_operations():
    # Without the garbage collector: reference counts alone must free a chain of a million links.
    code = """
import gc, sys, threading
import numpy as np
from minilora.autograd import Node, Tensor, gradients, reshape
errors = []
threading.excepthook = errors.append
sys.setrecursionlimit(200)
gc.disable()

def chain(x, length):
    for _ in range(length):
        x = reshape(x, 1)
    return x

def nodes():
    return sum(type(thing) is Node for thing in gc.get_objects())

x = Tensor(np.array([0.5]), requires_grad=True)
y = chain(x, 1_000_000)
y.backward(retain_graph=True)
assert x.grad == 1 and nodes() == 1_000_000
del y
assert nodes() == 0
y = chain(x, 10_000)
y.backward()
assert x.grad == 2 and nodes() == 1
del y

def skips():  # every node is used by the next two, in a thread that has hardly a stack
    a = b = x
    for _ in range(10_000):
        a, b = b, (a + b) * 0.5
    (g,) = gradients(b, [x])
    assert abs(g - 1) < 1e-9

threading.stack_size(256 * 1024)
thread = threading.Thread(target=skips)
thread.start()
thread.join()
assert nodes() == 0 and errors == []
"""
    run(code)


LEAK = """
import gc, resource, sys
import numpy as np
from minilora import functional as F
from minilora.autograd import Tensor
rng = np.random.default_rng(0)

def leaf(*shape):
    return Tensor(rng.standard_normal(shape).astype(np.float32), True)

w, b, v = leaf(64, 32), leaf(64), leaf(10, 64)
x, t = rng.standard_normal((16, 32)).astype(np.float32), rng.integers(0, 10, 16)

def steps(n):
    for _ in range(n):
        F.cross_entropy(F.linear(F.gelu(F.linear(Tensor(x), w, b)), v), t).backward()
        for p in (w, b, v):
            p.data = p.data - np.float32(0.1) * p.grad
            p.grad = None

steps(100)
gc.collect()
gc.disable()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
steps(1000)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
count = gc.collect()
assert count == 0, f"{count} objects in cycles"
assert grown * (1 if sys.platform == "darwin" else 1024) < 2**20, grown
"""


def test_backward_in_a_thousand_steps_leaks_nothing():
    pytest.importorskip("resource")
    run(LEAK)


def test_backward_leaves_no_reference_cycle():
    x = leaf(3)
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            y = x * x
            y.backward(np.ones(3))
        del y
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_tensor_of_a_tensor_shares_its_version():
    p = Tensor(np.array([2.0]), requires_grad=True)
    alias = Tensor(p)
    y = (p * alias).sum()
    p.data = np.array([3.0])
    with pytest.raises(GraphError, match="changed after the forward"):
        y.backward()


def test_tensor_converts_to_float_and_array():
    assert float(Tensor([2.5])) == 2.5
    assert np.asarray(Tensor([1.0, 2.0])).dtype == np.float32
