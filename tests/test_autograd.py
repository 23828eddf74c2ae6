"""The engine: what every operation leaves behind, what backward promises, and what it refuses to get wrong."""

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
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from operations import TABLE, Operation

from minilora import autograd as ag
from minilora import backend
from minilora import functional as F
from minilora.autograd import Node, Tensor, gradients, no_grad
from minilora.effective import EffectiveWeight, effective_linear
from minilora.errors import DeviceError, GraphError

RNG = np.random.default_rng(8)
EVERY = pytest.mark.parametrize("op", TABLE, ids=lambda op: op.id)
ELEMENTARY = pytest.mark.parametrize(
    "op", [op for op in TABLE if op.reference is not None], ids=lambda op: op.id
)


def some_dy(y: Tensor) -> np.ndarray:
    return np.asarray(np.random.default_rng(3).standard_normal(y.shape)).astype(y.dtype)


def leaf(*shape: int, dtype: Any = np.float64) -> Tensor:
    return Tensor(np.asarray(RNG.standard_normal(shape)).astype(dtype), True)


def captured(function: Any) -> Iterator[Any]:
    """Everything a function's closure holds, inside nested functions, tuples and lists, too."""
    waiting, seen = [function], set()
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
            waiting += [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]


def graph(y: Tensor) -> Iterator[Node]:
    waiting, seen = [y.node], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            yield node
            waiting += node.parents


def held_arrays(y: Tensor) -> dict[int, np.ndarray]:
    """The distinct arrays (views count as what they view) that the graph of y keeps alive."""
    arrays = [
        item for node in graph(y) for item in captured(node.vjp) if isinstance(item, np.ndarray)
    ]
    owners = [a if a.base is None else a.base for a in arrays]
    return {id(a): a for a in owners}


# ---- what every operation does --------------------------------------------------------------------------------------


@ELEMENTARY
def test_forward_is_what_numpy_computes(op: Operation) -> None:
    for dtype in (np.float64, np.float32):
        leaves = op.leaves(dtype)
        got, expected = op.function(*leaves).data, op.reference(*(x.data for x in leaves))
        assert type(got) is np.ndarray
        # mean multiplies by 1 / n and NumPy divides by n; the rest is the same operation.
        ulp = 2 if op.name == "mean" else 0
        assert got.shape == np.shape(expected)
        assert (np.abs(got - expected) <= ulp * np.spacing(np.abs(expected))).all()


@ELEMENTARY
def test_float32_stays_float32(op: Operation) -> None:
    leaves = op.leaves(np.float32)
    y = op.function(*leaves)
    assert y.dtype == np.float32
    for node in graph(y):
        dy = np.ones(y.shape, np.float32) if node is y.node else None
        for g in node.vjp(dy) if dy is not None else ():
            assert g is None or g.dtype == np.float32


@EVERY
def test_gradients_are_fresh_arrays(op: Operation) -> None:
    for dtype in (np.float64, np.float32):
        leaves = op.leaves(dtype)
        y = op.function(*leaves)
        dy = some_dy(y)
        before = [x.data.copy() for x in leaves], y.data.copy(), dy.copy()
        found = gradients(y, leaves, dy, retain_graph=True)
        others = [dy, y.data, *(x.data for x in leaves), *held_arrays(y).values()]
        for x, g in zip(leaves, found, strict=True):
            assert type(g) is np.ndarray
            assert (g.shape, g.dtype) == (x.shape, x.dtype)
            assert g.base is None
            assert g.flags.owndata
            assert g.flags.writeable
            assert not any(
                np.shares_memory(g, other) for other in [*others, *(h for h in found if h is not g)]
            )
        for a, b in zip(
            [*before[0], *before[1:]], [*(x.data for x in leaves), y.data, dy], strict=True
        ):
            np.testing.assert_array_equal(a, b)  # neither pass writes into what it was given


@EVERY
def test_no_vjp_holds_a_tensor(op: Operation) -> None:
    y = op.function(*op.leaves())
    for node in graph(y):
        assert not [item for item in captured(node.vjp) if isinstance(item, (Tensor, Node))]


@EVERY
def test_freezing_some_inputs_leaves_the_other_gradients_alone(op: Operation) -> None:
    leaves = op.leaves()
    y = op.function(*leaves)
    dy = some_dy(y)
    full = gradients(y, leaves, dy)
    for wanted in itertools.product([False, True], repeat=min(len(leaves), 4)):
        wanted = (*wanted, *[True] * (len(leaves) - len(wanted)))
        some = [Tensor(x.data, need) for x, need in zip(leaves, wanted, strict=True)]
        y = op.function(*some)
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            assert y.node is None
            continue
        for need, g, expected in zip(wanted, gradients(y, some, dy), full, strict=True):
            if need:
                np.testing.assert_array_equal(g, expected)
            else:
                assert g is None


@EVERY
@pytest.mark.parametrize("view", [False, True], ids=["leaf", "view"])
def test_changing_a_value_that_backward_reads_is_an_error_and_another_is_not(
    op: Operation, view: bool
) -> None:
    dy: Any = None
    for i in range(len(op.inputs)):
        leaves = op.leaves()
        # Through a view of the leaf, the memory that is read is the same.
        y = op.function(*(ag.reshape(x, x.shape) if view else x for x in leaves))
        dy = some_dy(y)
        expected = gradients(y, leaves, dy, retain_graph=True)
        leaves[i].data = leaves[i].data + 1
        if i in op.reads:
            with pytest.raises(
                GraphError,
                match=rf"backward of '{op.name}' needs was changed .*version 0 then, 1 now",
            ):
                y.backward(dy)
            assert all(x.grad is None for x in leaves)
        else:
            y.backward(dy)
            for x, g in zip(leaves, expected, strict=True):
                np.testing.assert_array_equal(x.grad, g)


# ---- a device of its own --------------------------------------------------------------------------------------------


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
def test_mixing_devices_names_both_and_the_cure(op: Operation, other: OtherBackend) -> None:
    for i in range(len(op.inputs)):
        mixed = [Tensor(other.from_numpy(a) if i == j else a) for j, a in enumerate(op.inputs)]
        assert mixed[i].backend is other
        with pytest.raises(DeviceError) as caught:
            op.function(*mixed)
        assert "'cpu'" in str(caught.value)
        assert "'other:0'" in str(caught.value)
        assert ".to(" in str(caught.value)


def test_a_tensor_moves_by_to(other: OtherBackend) -> None:
    x = leaf(2, 3)
    assert x.to("cpu") is x
    there = x.to(other)
    assert there.backend is other
    assert there.requires_grad
    assert "device='other:0'" in repr(there)
    with pytest.raises(DeviceError):
        x + there
    with pytest.raises(DeviceError):
        there + x.data  # an array of the host is not moved in secret


# ---- broadcasting, indexing, products: any shape --------------------------------------------------------------------

PAIR = hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_dims=4, max_side=4)
BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": ag.add,
    "sub": ag.sub,
    "mul": ag.mul,
    "div": ag.div,
    "power": ag.power,
    "maximum": ag.maximum,
    "minimum": ag.minimum,
    "where": lambda a, b: ag.where(
        np.arange(4) % 2 == 0 if (a.data + b.data).shape[-1:] == (4,) else True, a, b
    ),
}


def summed_to(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every element of g added to the one of `shape` that broadcasting copied it from."""
    out = np.zeros(shape)
    np.add.at(
        out.reshape(-1),
        np.broadcast_to(np.arange(out.size).reshape(shape), g.shape).reshape(-1),
        g.reshape(-1),
    )
    return out


@pytest.mark.parametrize("name", BINARY)
@given(PAIR, st.integers(0, 2**32 - 1))
@example(hnp.BroadcastableShapes(((), ()), ()), 0)
@example(hnp.BroadcastableShapes(((1,), (0,)), (0,)), 0)
@example(hnp.BroadcastableShapes(((3, 1), (1, 4)), (3, 4)), 0)
def test_gradient_under_broadcasting_is_that_of_the_copies_summed(
    name: str, shapes: hnp.BroadcastableShapes, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    data = [np.asarray(rng.uniform(0.5, 2, s)) for s in shapes.input_shapes]
    dy = np.asarray(rng.standard_normal(shapes.result_shape))
    leaves = [Tensor(a, True) for a in data]
    copies = [Tensor(np.broadcast_to(a, shapes.result_shape).copy(), True) for a in data]
    y, whole = BINARY[name](*leaves), BINARY[name](*copies)
    np.testing.assert_array_equal(y.data, whole.data)
    for x, g, h in zip(leaves, gradients(y, leaves, dy), gradients(whole, copies, dy), strict=True):
        assert g.shape == x.shape
        assert (np.abs(g - summed_to(h, x.shape)) <= 1e-14 * summed_to(np.abs(h), x.shape)).all()


INDEXED = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4).flatmap(
    lambda s: st.tuples(
        st.just(s),
        hnp.basic_indices(s, allow_newaxis=True)
        | hnp.integer_array_indices(
            s, result_shape=hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=4)
        )
        | hnp.arrays(bool, s),
    )
)


@given(INDEXED)
def test_index_sends_each_gradient_to_where_the_value_came_from(
    case: tuple[tuple[int, ...], Any],
) -> None:
    shape, key = case
    x = leaf(*shape)
    y = ag.index(x, key)
    np.testing.assert_array_equal(y.data, x.data[key])
    dy = np.asarray(np.arange(1.0, y.size + 1)).reshape(y.shape)  # integers: exact in any order
    expected = np.zeros(shape)
    np.add.at(expected, key, dy)
    np.testing.assert_array_equal(gradients(y, [x], dy)[0], expected)


@given(
    hnp.mutually_broadcastable_shapes(
        signature="(m?,k),(k,n?)->(m?,n?)", min_side=0, max_side=4, max_dims=2
    ),
    st.integers(0, 2**32 - 1),
)
def test_matmul_gradients_are_its_adjoints(shapes: hnp.BroadcastableShapes, seed: int) -> None:
    # <dy, v @ b> = <da, v> for every v, and the same for b; small integers, so the two sides are equal to the last bit.
    rng = np.random.default_rng(seed)

    def integers(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.integers(-9, 10, shape).astype(np.float64))

    a, b = (Tensor(integers(s), True) for s in shapes.input_shapes)
    y = a @ b
    np.testing.assert_array_equal(y.data, a.data @ b.data)
    dy = integers(y.shape)
    da, db = gradients(y, [a, b], dy)
    v, w = integers(a.shape), integers(b.shape)
    assert (dy * (v @ b.data)).sum() == (da * v).sum()
    assert (dy * (a.data @ w)).sum() == (db * w).sum()


@given(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4), st.data())
def test_sum_of_any_axes_spreads_its_gradient(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.none() | (hnp.valid_tuple_axes(len(shape)) if shape else st.just(())))
    keepdims = data.draw(st.booleans())
    x = leaf(*shape)
    y = ag.sum(x, axis, keepdims)
    expected = x.data.sum(axis=axis, keepdims=keepdims)
    np.testing.assert_array_equal(y.data, expected)
    dy = some_dy(y)
    kept = dy.reshape(x.data.sum(axis=axis, keepdims=True).shape)
    np.testing.assert_array_equal(gradients(y, [x], dy)[0], np.broadcast_to(kept, shape))


def test_a_reduction_drops_its_axes_unless_told_to_keep_them() -> None:
    x = leaf(2, 3)
    for name in ("sum", "mean", "max", "min"):
        for reduce in (functools.partial(getattr(ag, name), x), getattr(x, name)):
            assert (reduce().shape, reduce(1).shape, reduce(1, True).shape) == ((), (2,), (2, 1))
            assert reduce().item() == pytest.approx(getattr(np, name)(x.data), rel=1e-15)


def test_empty_reductions() -> None:
    assert ag.sum(Tensor(np.zeros((0, 3)))).item() == 0
    for reduction in (ag.mean, ag.max, ag.min):
        with pytest.raises(ValueError, match=r"no values|zero-size"):
            reduction(Tensor(np.zeros((0, 3))))


def test_ties_share_the_gradient() -> None:
    x = Tensor(np.array([[2.0, 5, 5], [7, 7, 7]]), True)
    np.testing.assert_array_equal(gradients(x.max(1).sum(), [x])[0], [[0, 0.5, 0.5], [1 / 3] * 3])
    np.testing.assert_array_equal(gradients(x.min().sum(), [x])[0], [[1, 0, 0], [0, 0, 0]])
    a, b = Tensor(np.array([1.0, 2, 3]), True), Tensor(np.array([3.0, 2, 1]), True)
    for extreme, first in ((ag.maximum, [0, 0.5, 1]), (ag.minimum, [1, 0.5, 0])):
        da, db = gradients(extreme(a, b).sum(), [a, b])
        np.testing.assert_array_equal(da, first)
        np.testing.assert_array_equal(db, 1 - da)


def test_pieces_are_joined_along_the_first_axis_unless_another_is_named() -> None:
    a, b = RNG.standard_normal((2, 3, 3, 3))
    np.testing.assert_array_equal(ag.concat([Tensor(a), b]).data, np.concatenate([a, b]))
    np.testing.assert_array_equal(ag.stack([Tensor(a), b]).data, np.stack([a, b]))


def test_edges_of_domains() -> None:
    x = Tensor(np.array([-2.0, 0, 0, 3]), True)
    np.testing.assert_array_equal(gradients(ag.abs(x).sum(), [x])[0], [-1, 0, 0, 1])
    np.testing.assert_array_equal(gradients(ag.clip(x, 0, 3).sum(), [x])[0], [0, 1, 1, 1])
    zero, power = Tensor(np.zeros(3), True), Tensor(np.array([0.0, 1, 2]), True)
    dz, dp = gradients((zero**power).sum(), [zero, power])  # 0^0 = 1 with slope 0
    np.testing.assert_array_equal(dz, [0, 1, 0])
    np.testing.assert_array_equal(dp, [0, 0, 0])
    x = Tensor(np.array([0.0, np.inf, np.nan]), True)
    np.testing.assert_array_equal(
        gradients((x**0.0).sum(), [x])[0], [0, 0, 0]
    )  # 1 is 1, whatever x is
    base, two = Tensor(np.array([-3.0]), True), Tensor(np.array([2.0]), True)
    with np.errstate(invalid="ignore"):
        db, de = gradients((base**two).sum(), [base, two])
    assert db == -6
    assert np.isnan(de)  # (-3)^e is real at e = 2 and not beside it
    for product in (lambda: base @ Tensor(2.0), lambda: Tensor(2.0) @ base):
        with pytest.raises(ValueError, match="matmul"):
            product()


# ---- dtypes and construction ----------------------------------------------------------------------------------------


NUMBERS = [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2), np.array(2.5)]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_take_the_dtype_of_the_tensor(number: Any) -> None:
    x = Tensor(np.ones(3, np.float32), True)
    results = [
        x + number,
        number + x,
        x - number,
        number - x,
        x * number,
        number * x,
        x / number,
        number / x,
    ]
    results += [
        x**number,
        number**x,
        ag.maximum(x, number),
        ag.minimum(number, x),
        ag.where(True, x, number),
    ]
    results += [ag.clip(x, -number, number), -x, x.mean(), x.min()]
    for y in results:
        assert y.dtype == np.float32
        (g,) = gradients(y, [x], np.ones(y.shape, np.float32))
        assert g.dtype == np.float32
    assert np.all((number - x).data == np.float32(number) - 1)


def test_an_array_beside_a_tensor_keeps_its_dtype() -> None:
    x = Tensor(np.ones(3, np.float32))
    assert (x + np.ones(3)).dtype == (np.ones((1, 3)) * x).dtype == np.float64
    assert (x + np.ones(3, np.float32)).dtype == np.float32


def test_what_a_tensor_is_made_of_decides_its_dtype() -> None:
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


def test_integers_compute_as_integers_and_with_fractions_exactly() -> None:
    x = Tensor([1, 2, 4])
    assert (x * 2.5).numpy().tolist() == [2.5, 5.0, 10.0]
    assert (Tensor([True, False]) + 2.5).numpy().tolist() == [3.5, 2.5]
    assert (
        ag.add(np.ones(2), 0.1).numpy().tolist()
        == ag.add(0.1, np.ones(2)).numpy().tolist()
        == [1.1, 1.1]
    )
    assert x.mean().item() == 7 * (1 / 3)
    assert x.min().item() == 1
    assert x.min().dtype == (-x).dtype == (x + 1).dtype == np.int64


@pytest.mark.parametrize("data", [[1, 2], [True], np.arange(3), 3])
def test_integers_cannot_require_a_gradient(data: Any) -> None:
    with pytest.raises(TypeError, match=r"can require a gradient, not (int64|bool)"):
        Tensor(data, requires_grad=True)


def test_arrays_on_the_left_make_tensors() -> None:
    x, a = leaf(2, 2), RNG.standard_normal((2, 2))
    for combine in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul):
        y = combine(a, x)
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.data, combine(a, x.data))


def test_methods_are_the_functions() -> None:
    x = Tensor(RNG.uniform(0.5, 2, (2, 3)))
    for name in ("exp", "log", "tanh", "sqrt", "abs", "sum", "mean", "max", "min", "transpose"):
        np.testing.assert_array_equal(getattr(x, name)().data, getattr(ag, name)(x).data)
    assert x.reshape(3, 2).shape == x.T.shape == (3, 2)
    assert (len(x), x.ndim, x.size) == (2, 2, 6)
    assert repr(Tensor([1.0, 2.0], True)) == "Tensor([1., 2.], requires_grad=True)"


# ---- the graph ------------------------------------------------------------------------------------------------------


def test_a_tensor_used_twice_gets_both_gradients() -> None:
    x = leaf(3)
    for y, expected in (
        (x + x, [2] * 3),
        (x * x, 2 * x.data),
        (x - x, [0] * 3),
        (ag.stack([x, x]), [2] * 3),
    ):
        np.testing.assert_array_equal(gradients(y, [x], np.ones(y.shape))[0], expected)


def test_a_gradient_handed_to_two_inputs_is_not_added_to_in_place() -> None:
    a, b, dy = leaf(3), leaf(3), RNG.standard_normal(3)
    kept = dy.copy()
    y = ag.mul(a, 2.0) + (a + b)  # dy itself reaches a and b before the other path adds to a
    da, db = gradients(y, [a, b], dy)
    np.testing.assert_array_equal(da, kept + 2 * kept)
    np.testing.assert_array_equal(db, kept)
    np.testing.assert_array_equal(dy, kept)


def test_each_leaf_gets_a_gradient_of_its_own_dtype() -> None:
    a, b = leaf(3, dtype=np.float32), leaf(3)
    assert [g.dtype for g in gradients((a * b).sum(), [a, b])] == [np.float32, np.float64]
    assert gradients(1.0 - b, [b], np.ones(3, np.float32))[0].dtype == np.float64


def test_a_diamond_of_depth_60_is_walked_once() -> None:
    x = leaf(2)
    y, visits = x, []
    for _ in range(60):
        y = y + y  # 2^60 paths
        inner = y.node.vjp
        y.node.vjp = lambda dy, inner=inner: (visits.append(1), inner(dy))[1]
    np.testing.assert_array_equal(gradients(y, [x], np.ones(2))[0], np.full(2, 2.0**60))
    assert len(visits) == 60


def test_independent_leaves_get_none_and_a_leaf_is_its_own_loss() -> None:
    x, z = leaf(), leaf(2)
    assert gradients(x * 2.0, [z, x]) == [None, 2.0]
    assert gradients(x, [x]) == [1.0]
    dy = np.full((2,), 3.0)
    (g,) = gradients(z, [z], dy)
    assert g is not dy
    assert not np.shares_memory(g, dy)


def test_backward_accumulates() -> None:
    x = leaf(4)
    (x * x).sum().backward()
    first = x.grad
    np.testing.assert_array_equal(first, 2 * x.data)
    ag.exp(x).sum().backward()
    np.testing.assert_array_equal(x.grad, 2 * x.data + np.exp(x.data))
    np.testing.assert_array_equal(
        first, 2 * x.data
    )  # a gradient handed out does not change afterwards


@EVERY
def test_backward_twice_needs_the_graph_retained(op: Operation) -> None:
    leaves = op.leaves()
    y = op.function(*leaves)
    if y.node is None:
        return  # dropout of nothing returns its input
    dy = some_dy(y)
    first, second = gradients(y, leaves, dy, retain_graph=True), gradients(y, leaves, dy)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.shares_memory(a, b)
    with pytest.raises(
        GraphError, match=r"freed by an earlier backward: .* or pass retain_graph=True"
    ):
        y.backward(dy)
    assert all(x.grad is None for x in leaves)


def test_options_of_a_backward_go_by_name() -> None:
    x, dy = leaf(3), np.array([1.0, 2, 3])
    y = x * 2.0
    np.testing.assert_array_equal(gradients(y, [x], dy=dy, retain_graph=True)[0], 2 * dy)
    y.backward(dy=dy, retain_graph=True)
    np.testing.assert_array_equal(x.grad, 2 * dy)
    with pytest.raises(TypeError, match="positional"):
        gradients(y, [x], dy, True)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        y.backward(dy, True)  # type: ignore[misc]


def test_an_operation_gives_a_gradient_or_none_for_every_input() -> None:
    x = leaf(3)
    for found in ((), (x.data,), (x.data, x.data, x.data)):
        y = ag.record(x.data * 2, (x, x), lambda dy, found=found: found)
        with pytest.raises(ValueError, match=r"zip\(\) argument"):
            y.backward(np.ones(3))


def test_an_error_in_the_middle_leaves_no_gradient_behind() -> None:
    x, w = leaf(3), leaf(3)
    loss = (ag.tanh(x * w) + x).sum()
    w.data = w.data * 2
    with pytest.raises(GraphError):
        loss.backward()
    assert x.grad is w.grad is None


def test_what_backward_refuses() -> None:
    x = leaf(2, 3)
    with pytest.raises(GraphError, match="depends on no tensor"):
        Tensor([1.0]).backward()
    with pytest.raises(GraphError, match=r"shape \(2, 3\) needs dy"):
        (x * x).backward()
    with pytest.raises(GraphError, match=r"shape \(0,\) needs dy"):
        (leaf(0) * 2.0).backward()
    for dy, got in (
        (np.ones(3), r"ndarray \(3,\)"),
        (Tensor(np.ones((2, 3))), r"Tensor \(2, 3\)"),
        ([1.0], "list"),
    ):
        with pytest.raises(GraphError, match=rf"dy must be an array of shape \(2, 3\), got {got}"):
            (x * x).backward(dy)


# ---- versions -------------------------------------------------------------------------------------------------------


def test_assigning_copies_into_the_same_storage() -> None:
    x = leaf(3)
    array, value = x.data, np.array([1.0, 2, 3])
    x.data = value
    assert x.data is array
    value[0] = 9
    np.testing.assert_array_equal(array, [1, 2, 3])
    for wrong in (np.zeros(2), np.zeros(4), np.zeros((1, 3)), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match="cannot assign"):
            x.data = wrong
    with pytest.raises(ValueError, match="cannot assign"):
        leaf(3, dtype=np.float32).data = np.zeros(3)
    with pytest.raises(GraphError, match="only a leaf"):
        (x * 2.0).data = value
    with pytest.raises(GraphError, match="only a leaf"):
        x.reshape(3).data = value


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T,
        lambda w: w.reshape(3, 3),
        lambda w: w[::-1],
        lambda w: w.T[1:].reshape(2, 3).T.T,
        lambda w: ag.broadcast_to(w, (2, 3, 3)),
        lambda w: w.detach(),
        lambda w: w.detach().T,
        lambda w: w[...],
    ],
)
def test_a_view_of_a_leaf_is_guarded_as_the_leaf_is(view: Callable[[Tensor], Tensor]) -> None:
    x, w = leaf(3), leaf(3, 3)
    loss = (x * view(w)).sum()
    w.data = w.data + 1
    with pytest.raises(GraphError, match="'mul'"):
        loss.backward()


def test_memory_from_a_file_is_guarded_too() -> None:
    w = Tensor(np.frombuffer(bytearray(72), np.float64))
    x = leaf(3)
    loss = (x * w[:3]).sum()
    w.data = w.data + 1
    with pytest.raises(GraphError, match="'mul'"):
        loss.backward()


def test_assigning_to_a_detached_tensor_is_assigning_to_its_source() -> None:
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


def test_versions_are_compared_as_numbers() -> None:
    x = leaf(2)
    for _ in range(300):
        x.data = x.data + 1
    np.testing.assert_array_equal(gradients((x * x).sum(), [x])[0], 2 * x.data)


def test_a_condition_is_guarded() -> None:
    c, x = Tensor(np.array([True, False])), leaf(2)
    loss = ag.where(c, x, 0.0).sum()
    c.data = ~c.data
    with pytest.raises(GraphError, match="'where'"):
        loss.backward()


def test_detach_stops_the_gradient() -> None:
    x = leaf(3)
    np.testing.assert_array_equal(gradients((x * x.detach()).sum(), [x])[0], x.data)


# ---- no_grad --------------------------------------------------------------------------------------------------------


@EVERY
def test_no_grad_records_nothing(op: Operation) -> None:
    leaves = op.leaves()
    with no_grad():
        y = op.function(*leaves)
    assert y.node is None
    assert (
        y.version is None or not y.size or any(np.shares_memory(y.data, x.data) for x in leaves)
    )  # a version of its own storage


def test_no_grad_nests_survives_exceptions_decorates_and_is_per_thread() -> None:
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


def test_no_grad_keeps_no_array_alive() -> None:
    x = leaf(100)
    with no_grad():
        y = ag.exp(x)
        watch = weakref.ref(y.data)
        z = y * y
        del y
    assert watch() is None
    assert z.node is None


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_a_frozen_chain_keeps_no_activation() -> None:
    x = leaf(50, 4)  # activations have 200 numbers, weights 16
    h = x
    for _ in range(5):
        h = F.linear(h, Tensor(RNG.standard_normal((4, 4))), Tensor(np.zeros(4)))
    assert sorted(a.size for a in held_arrays(h).values()) == [16] * 5
    frozen = Tensor(RNG.standard_normal((50, 4)))
    assert F.linear(frozen, Tensor(np.ones((4, 4)))).node is None


def test_lora_on_a_frozen_chain_keeps_its_input_and_nothing_of_the_base() -> None:
    h = Tensor(RNG.standard_normal((50, 4)))
    inputs = set()
    for _ in range(4):
        inputs.add(id(h.data))
        base = F.linear(h, Tensor(RNG.standard_normal((4, 4))))
        h = F.lora_linear(h, base, leaf(2, 4), leaf(4, 2), 0.5)
    held = held_arrays(h)
    # X of each layer for dA, X A^T (50 x 2) for dB, and weights.
    big = [a for a in held.values() if a.size >= 200]
    assert len(big) == 4
    assert {a.size for a in held.values()} <= {200, 100, 16, 8}
    assert sum(a.size == 100 for a in held.values()) == 4


def test_frozen_factors_keep_no_activation() -> None:
    x, W = leaf(50, 4), RNG.standard_normal((4, 4))
    A, B = Tensor(RNG.standard_normal((2, 4))), Tensor(RNG.standard_normal((4, 2)))
    for y in (
        F.lora_linear(x, F.linear(x, Tensor(W)), A, B, 0.5),
        effective_linear(x, EffectiveWeight(W, [(4, None, [])])),
    ):
        assert {a.size for a in held_arrays(y).values()} <= {16, 8}
    for combine in (ag.mul, ag.matmul):  # an operand is kept for the other's gradient alone
        y = combine(x, W[:1].T if combine is ag.matmul else W[0])
        assert {a.size for a in held_arrays(y).values()} <= {16, 4}


def test_backward_frees_as_it_passes() -> None:
    x = leaf(100)
    y = ag.exp(x)
    watch = weakref.ref(y.data)
    loss = y.sum()
    del y
    assert watch() is not None
    loss.backward()
    assert watch() is None


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads_share_parameters_and_get_the_same_bits() -> None:
    params = [
        leaf(16, 8, dtype=np.float32),
        leaf(16, dtype=np.float32),
        leaf(5, 16, dtype=np.float32),
    ]
    batches = [RNG.standard_normal((6, 8)).astype(np.float32) for _ in range(8)]
    targets = RNG.integers(0, 5, 6)

    def step(x: np.ndarray) -> list[np.ndarray]:
        w, b, v = params
        return gradients(
            F.cross_entropy(F.linear(F.gelu(F.linear(Tensor(x), w, b)), v), targets), params
        )

    expected = [step(x) for x in batches]
    barrier = threading.Barrier(4)

    def many(_: int) -> list[list[np.ndarray]]:
        barrier.wait()
        return [step(x) for _ in range(5) for x in batches]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(many, range(4)):
            for got, want in zip(found, expected * 5, strict=True):
                for g, w in zip(got, want, strict=True):
                    np.testing.assert_array_equal(g, w)
    assert all(p.grad is None for p in params)


# ---- depth and leaks: in processes of their own ---------------------------------------------------------------------


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_a_chain_of_a_million_operations() -> None:
    # Without the garbage collector: reference counts alone must free what was built, a million links deep.
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
w, b, v = (Tensor(rng.standard_normal(s).astype(np.float32), True) for s in ((64, 32), (64,), (10, 64)))
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
found = gc.collect()
assert found == 0, f"{found} objects in cycles"
assert grown * (1 if sys.platform == "darwin" else 1024) < 2**20, grown
"""


def test_a_thousand_steps_leak_nothing() -> None:
    pytest.importorskip("resource")
    run(LEAK)


def test_an_error_leaves_no_cycle() -> None:
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


def test_two_tensors_of_one_storage_have_one_version() -> None:
    p = Tensor(np.array([2.0]), requires_grad=True)
    alias = Tensor(p)
    y = (p * alias).sum()
    p.data = np.array([3.0])
    with pytest.raises(GraphError, match="changed after the forward"):
        y.backward()


def test_a_tensor_is_a_number_and_an_array_where_one_is_asked_for() -> None:
    assert float(Tensor([2.5])) == 2.5
    assert np.asarray(Tensor([1.0, 2.0])).dtype == np.float32
