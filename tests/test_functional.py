"""Each neural operation against its definition, and the properties that mathematics promises."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from operations import NEURAL, angles, block_sizes, rotary_tables

from minilora import functional as F
from minilora.arguments import check_ids
from minilora.attention import apply_rotary
from minilora.autograd import Tensor, gradients, no_grad
from minilora.backend import NUMPY, mix_key
from minilora.effective import count_operations
from minilora.errors import ConfigError, DataError, GraphError
from minilora.nn import Dropout

U32 = 2.0**-24  # half the distance from 1 to the next float32
RNG = np.random.default_rng(1)
NEURAL_OPERATIONS = pytest.mark.parametrize("op", NEURAL, ids=lambda op: op.id)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])
equal = np.testing.assert_array_equal


def close(got: Any, expected: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def leaf(values: Any) -> Tensor:
    return Tensor(np.array(values), True)


def results(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[np.ndarray]:
    """The output, then the gradient of every leaf under a fixed random dy."""
    y = function(*leaves)
    dy = np.asarray(np.random.default_rng(3).standard_normal(y.shape)).astype(y.dtype)
    grads = gradients(y, leaves, dy) if y.requires_grad else [None] * len(leaves)
    arrays = [y.numpy()]
    for x, g in zip(leaves, grads, strict=True):
        arrays.append(np.zeros_like(x.data) if g is None else g)
    return arrays


def largest(arrays: Any) -> float:
    return max(float(np.abs(a).max(initial=0)) for a in arrays)


@NEURAL_OPERATIONS
def test_operation_equals_its_definition(op):
    got = results(op.function, op.leaves())
    expected = results(op.definition, op.leaves())
    bound = 1e-12 * largest(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == np.float64
        assert largest([a - b]) <= bound


@NEURAL_OPERATIONS
def test_operation_in_float32_stays_float32_and_within_its_rounding(op):
    leaves = op.leaves(np.float32)
    exact = results(op.function, [leaf(x.data.astype(np.float64)) for x in leaves])
    # From an input to an output or a gradient no number here passes more than 32 roundings, sums of
    # at most 15 terms included, and each is at most U32 of the largest number on the way.
    bound = 32 * U32 * max(1.0, largest([*exact, *op.inputs]))
    for got, want in zip(results(op.function, leaves), exact, strict=True):
        assert got.dtype == np.float32
        assert largest([got - want]) <= bound


def f32(*shape: int) -> Tensor:
    return Tensor(np.ones(shape, np.float32), True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, s: F.lora_linear(x, f32(2, 3), f32(2, 4), f32(3, 2), s),
        lambda x, s: F.dropout(x, s, 1),
        lambda x, s: F.rms_norm(x, f32(4), s),
        lambda x, s: F.layer_norm(x, f32(4), f32(4), s),
    ],
)
def test_numpy_scalars_as_options_leave_float32_alone(function):
    y = function(f32(2, 4), np.float64(0.5))
    assert y.dtype == np.float32
    grads = y.node.vjp(np.ones(y.shape, np.float32))
    for parent, g in zip(y.node.parents, grads, strict=True):
        assert parent is None or g.dtype == np.float32


@pytest.mark.parametrize(
    ("least", "inputs", "outputs", "r"), [(8, 8, 8, 1), (15, 16, 16, 1), (2, 3, 5, 2), (4, 8, 8, 3)]
)
def test_costs_favour_forming_the_weight_from_this_number_of_tokens_on(least, inputs, outputs, r):
    # W + dW once: (2 r + 12) in out; the low-rank path: 8 r (in + out) per token. In three of these
    # cases least - 1 is a tie.
    pays = []
    for tokens in (least - 1, least, least + 1):
        formed, low_rank = count_operations(tokens, inputs, outputs, r)
        pays.append(formed < low_rank)
    assert pays == [False, True, True]


# ---- dropout, activations and integers -----------------------------------------------------------


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan, math.inf, True, None, "0.5"])
def test_dropout_refuses_what_is_no_probability(p):
    for drop in (lambda: F.dropout(leaf([1.0]), p, 1), lambda: Dropout(p)):
        with pytest.raises(ConfigError, match=r"p must be a number in \[0, 1\], got "):
            drop()


def test_dropout_of_everything_is_zero_for_the_module_too():
    x = leaf(np.ones((2, 3), np.float32))
    y = Dropout(1.0)(x)
    assert y.dtype == np.float32
    equal(y.data, np.zeros((2, 3)))
    equal(gradients(y, [x], np.ones((2, 3), np.float32))[0], np.zeros((2, 3)))


def test_dropout_of_a_number_keeps_or_drops_it():
    x = leaf(3.0)
    kept = {F.dropout(x, 0.5, key).item() for key in range(20)}
    assert kept == {0.0, 6.0}
    y = F.dropout(x, 0.5, 1)
    equal(gradients(y, [x])[0], y.data / 3)


def test_swiglu_of_two_numbers_is_that_of_a_row():
    x = leaf([0.5, -2.0])
    row = leaf([[0.5], [-2.0]])
    y = F.swiglu(x)
    assert y.shape == ()
    equal(y.data, F.swiglu(row).data[0])
    equal(gradients(y, [x])[0], gradients(F.swiglu(row), [row], np.ones(1))[0][:, 0])
    for wrong in (leaf(1.0), leaf([1.0, 2, 3]), leaf(np.zeros((0, 2)))):
        with pytest.raises(ValueError, match="first axis must be 2, got"):
            F.swiglu(wrong)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int8, np.int64])
def test_functions_of_integers_are_those_of_the_same_floats(dtype):
    values = np.array([[0, 1, 100], [127, 3, 2]]).astype(dtype)
    functions = [F.softmax, F.log_softmax, F.silu, F.gelu, F.swiglu]
    functions.append(lambda x: F.gelu(x, "tanh"))
    functions.append(lambda x: F.cross_entropy(x, np.array([0, 1])))
    for function in functions:
        y = function(Tensor(values))
        assert y.dtype == np.float64
        equal(y.data, function(Tensor(values.astype(np.float64))).data)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_linear_maps_and_norms_of_integers_keep_the_dtype_of_the_weights(dtype):
    x = Tensor(np.arange(8).reshape(2, 4))
    W = leaf(np.ones((3, 4), dtype))
    w = leaf(np.ones(4, dtype))
    A = leaf(np.ones((2, 4), dtype))
    results = [F.linear(x, W), F.rms_norm(x, w), F.layer_norm(x, w, w)]
    results.append(F.linear(x, W, Tensor(np.arange(3))))
    results.append(F.lora_linear(x, F.linear(x, W), A, leaf(np.ones((3, 2), dtype)), 0.5))
    for y in results:
        assert y.dtype == dtype
        y.backward(np.ones(y.shape, dtype))
    assert W.grad.dtype == dtype


# ---- embedding and cross-entropy -----------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=9))
def test_embedding_adds_the_gradients_of_repeated_ids(drawn):
    ids = np.array(drawn, np.int64)
    weight = leaf(RNG.standard_normal((5, 3)))
    y = F.embedding(ids, weight)
    equal(y.data, weight.data[drawn].reshape(-1, 3))
    dy = np.arange(float(y.size)).reshape(y.shape)  # integers: sums are exact in any order
    expected = np.zeros((5, 3))
    np.add.at(expected, ids, dy)
    equal(gradients(y, [weight], dy)[0], expected)


@pytest.mark.parametrize("bad", [-1, 5, 9, -100])
def test_embedding_and_cross_entropy_name_an_id_outside_the_vocabulary(bad):
    weight = leaf(np.full((5, 3), np.nan))
    with pytest.raises(DataError, match=rf"id {bad} is outside \[0, 5\)"):
        F.embedding(np.array([[1, bad]]), weight)
    # Infinite logits would be a floating-point error: targets are checked before any computation.
    logits = leaf(np.full((2, 5), np.inf))
    with np.errstate(all="raise"), pytest.raises(DataError, match=rf"target {bad} is outside"):
        F.cross_entropy(logits, np.array([1, bad]), ignore_index=-7)


@pytest.mark.parametrize(
    ("ids", "named"), [([0, 9], 9), ([-1, 9], -1), ([-2, 0], -2), ([5, 1], 5), ([0, 5], 5)]
)
def test_check_ids_names_an_id_that_is_outside(ids, named):
    with pytest.raises(DataError, match=rf"id {named} is outside \[0, 5\)"):
        check_ids(np.array(ids), 5, "id")


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 2)])
def test_cross_entropy_refuses_targets_of_another_shape(shape):
    logits = Tensor(np.zeros((2, 3, 5)))
    with pytest.raises(DataError, match="do not fit logits"):
        F.cross_entropy(logits, np.zeros(shape, np.int64))


@REDUCTIONS
@DTYPES
@pytest.mark.parametrize("shape", [(2, 3), (0,)])
def test_cross_entropy_of_nothing_is_zero_with_zero_gradient(reduction, dtype, shape):
    x = leaf(RNG.standard_normal((*shape, 5)).astype(dtype))
    loss = F.cross_entropy(x, np.full(shape, -100), reduction=reduction)
    assert loss.shape == ()
    assert loss.item() == 0
    loss.backward()
    equal(x.grad, np.zeros_like(x.data))


@DTYPES
def test_linear_cross_entropy_of_an_infinite_row_is_nan_without_a_warning(dtype):
    x = leaf(np.array([[np.inf, 1], [1, 2]], dtype))
    head = leaf(np.array([[1, 2], [2, 1], [3, 1]], dtype))
    loss = F.linear_cross_entropy(x, head, np.array([0, 2]))
    loss.backward()
    assert np.isnan(loss.item())
    assert np.isnan(x.grad[0]).any()
    assert np.isfinite(x.grad[1]).all()


@DTYPES
def test_cross_entropy_of_huge_logits_is_right(dtype):
    logits = [[1e4, -1e4, 0], [1e4, -1e4, 0], [-1e4, -1e4, -1e4]]
    x = leaf(np.array(logits, dtype))
    each = []
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for i in range(3):
            one = F.cross_entropy(x[i : i + 1], np.array([i]), reduction="sum")
            each.append(one.item())
        loss = F.cross_entropy(x, np.array([0, 1, 2]), reduction="sum")
        loss.backward()
    assert each[:2] == [0.0, 2e4]
    # -(-1e4) + log(3 exp(-1e4)): the sum is rounded where numbers are near 1e4.
    assert each[2] == pytest.approx(math.log(3), abs=float(np.spacing(dtype(1e4))))
    third = dtype(1) / dtype(3)
    close(x.grad, [[0, 0, 0], [1, -1, 0], [third, third, third - 1]], atol=4 * U32)


@REDUCTIONS
def test_cross_entropy_does_not_count_an_ignored_target(reduction):
    targets = np.array([0, -100, 3, 4, -100, 1])
    counted = targets >= 0
    x = leaf(RNG.standard_normal((6, 5)))
    x_counted = leaf(x.data[counted])
    a = F.cross_entropy(x, targets, reduction=reduction)
    b = F.cross_entropy(x_counted, targets[counted], reduction=reduction)
    assert a.item() == pytest.approx(b.item(), rel=1e-15)
    (da,) = gradients(a, [x])
    (db,) = gradients(b, [x_counted])
    assert not da[~counted].any()
    close(da[counted], db, rtol=1e-15)


def test_cross_entropy_over_a_vocabulary_of_one_is_zero():
    x = leaf([[3.0], [-2.0]])
    loss = F.cross_entropy(x, np.array([0, -100]), reduction="sum")
    assert loss.item() == 0
    loss.backward()
    equal(x.grad, np.zeros((2, 1)))


def test_cross_entropy_and_gelu_name_an_unknown_option():
    with pytest.raises(ValueError, match="'median'"):
        F.cross_entropy(Tensor(np.zeros((1, 2))), np.array([0]), reduction="median")
    for unknown in ("fast", "tanhh"):
        with pytest.raises(ValueError, match=f"'{unknown}'"):
            F.gelu(Tensor(np.zeros(2)), unknown)


def test_cross_entropy_and_gelu_compare_options_by_their_letters():
    def read(word: str) -> str:
        return "".join(list(word))  # equal to the word in the source, and another object

    x = Tensor(np.array([[0.5, -1.0]]))
    exact = F.gelu(x).data[0, 0]
    assert F.gelu(x, read("none")).data[0, 0] == exact
    assert F.gelu(x, read("tanh")).data[0, 0] != exact
    targets = np.array([[0], [1]]).T
    logits = Tensor(np.array([[[0.5, -1.0], [0.5, 2.0]]]))
    mean = F.cross_entropy(logits, targets, reduction=read("mean"))
    total = F.cross_entropy(logits, targets, reduction=read("sum"))
    assert total.item() == 2 * mean.item()


def test_cross_entropy_does_not_round_a_small_loss_away():
    logits = Tensor(np.array([[20.0, 8.0]], np.float32))
    loss = F.cross_entropy(logits, np.array([0])).item()
    exact = math.log1p(math.exp(-12))
    assert abs(loss - exact) <= 2 * U32  # a rounding of 1 + e^-12, not of 20


# ---- softmax and norms ---------------------------------------------------------------------------

ROWS = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.floats(-20, 20)
)


@given(ROWS, st.floats(-1000, 1000))
def test_softmax_does_not_see_a_shift(x, c):
    # Both arguments of exp are exact to a rounding of x + c, at most 2^-53 * 1020 each: twice that
    # is relative to 1.
    shifted = Tensor(x + c)
    with no_grad():
        close(F.softmax(shifted).data, F.softmax(Tensor(x)).data, rtol=5e-13)
        close(F.log_softmax(shifted).data, F.log_softmax(Tensor(x)).data, atol=5e-13)


def test_softmax_is_over_the_last_axis_by_default():
    x = Tensor(RNG.standard_normal((2, 3, 4)))
    equal(F.softmax(x).data, F.softmax(x, 2).data)
    equal(F.log_softmax(x).data, F.log_softmax(x, 2).data)
    close(F.softmax(x).data.sum(axis=2), 1, rtol=1e-15)


@given(ROWS)
def test_softmax_is_a_distribution_and_log_softmax_its_logarithm(x):
    p = F.softmax(Tensor(x)).data
    assert (p > 0).all()
    close(p.sum(axis=-1), 1, rtol=1e-15)
    close(np.exp(F.log_softmax(Tensor(x)).data), p, rtol=1e-14)


def test_layer_norm_does_not_see_an_affine_change_and_rms_norm_not_a_scale():
    x = RNG.standard_normal((3, 8))
    w = Tensor(RNG.standard_normal(8))
    b = Tensor(RNG.standard_normal(8))
    plain = F.layer_norm(Tensor(x), w, b, 0.0).data
    changed = F.layer_norm(Tensor(2.5 * x - 3), w, b, 0.0).data
    close(changed, plain, rtol=1e-13, atol=1e-14)
    plain = F.rms_norm(Tensor(x), w, 0.0).data
    close(F.rms_norm(Tensor(2.5 * x), w, 0.0).data, plain, rtol=1e-14)


@DTYPES
def test_layer_norm_and_rms_norm_of_constant_rows_are_finite(dtype):
    ones = np.ones((2, 8), dtype)
    w = leaf(RNG.standard_normal(8).astype(dtype))
    b = leaf(RNG.standard_normal(8).astype(dtype))
    threes = leaf(3 * ones)
    y = F.layer_norm(threes, w, b)
    equal(y.data, np.broadcast_to(b.data, (2, 8)))
    y.backward(ones)
    assert np.isfinite(threes.grad).all()
    zeros = leaf(0 * ones)
    z = F.rms_norm(zeros, w)
    assert not z.data.any()
    z.backward(ones)
    assert np.isfinite(zeros.grad).all()


# ---- attention -----------------------------------------------------------------------------------


def draw_qkv(
    B: int, T: int, H: int, K: int, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = RNG.standard_normal((B, T, H, 4)).astype(dtype)
    k = RNG.standard_normal((B, T, K, 4)).astype(dtype)
    v = RNG.standard_normal((B, T, K, 4)).astype(dtype)
    return q, k, v


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v of q (B, T, H, D), k and v (B, S, K, D), rotated by 0.

    Earlier keys and values reach `attention` through `extend`.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    past = k.shape[1] - T
    packed = np.concatenate([z[:, -T:].reshape(B, T, -1) for z in (q, k, v)], axis=-1)
    cos, sin = rotary_tables(np.zeros((T, D // 2)), H, K, D**-0.5)

    def extend(new_k: np.ndarray, new_v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        all_k = np.concatenate([k[:, :past], new_k], axis=1)
        return all_k, np.concatenate([v[:, :past], new_v], axis=1)

    tables = cos.astype(q.dtype), sin.astype(q.dtype)
    y = F.attention(Tensor(packed), H, K, *tables, extend if past else None)
    return y.data.reshape(B, T, H, D)


@given(st.integers(1, 3), st.integers(1, 9), st.sampled_from([(1, 1), (4, 2), (3, 3)]), st.data())
def test_attention_never_looks_ahead(B, T, heads, data):
    arrays = draw_qkv(B, T, *heads)
    before = attend(*arrays)
    t = data.draw(st.integers(0, T - 1))
    for a in arrays:
        a[:, t] += 1 + np.abs(a[:, t])
    after = attend(*arrays)
    equal(after[:, :t], before[:, :t])  # every bit
    assert (after[:, t] != before[:, t]).any()


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    st.none() | st.integers(1, 6),
)
def test_attention_passes_gradients_back_through_extend(T, past, heads, window):
    arrays = draw_qkv(2, T + past, *heads, np.float64)
    B, S, K, D = arrays[1].shape
    count = heads[0] + 2 * K
    angles = RNG.standard_normal((S, D // 2))
    cos, sin = rotary_tables(angles, *heads, D**-0.5)
    qkv = leaf(np.concatenate([z.reshape(B, S, -1) for z in arrays], axis=-1))
    whole = F.attention(qkv, *heads, cos, sin, window=window)
    dy = RNG.standard_normal((B, T, whole.shape[2]))
    upstream = np.concatenate([np.zeros((B, past, whole.shape[2])), dy], axis=1)
    [expected] = gradients(whole, [qkv], upstream)
    earlier = {}

    def extend(k, v):
        rotated = apply_rotary(np, arrays[1], *(t[:, heads[0] * D :] for t in (cos, sin)))
        return (
            np.concatenate([rotated[:, :past], k], axis=1),
            np.concatenate([arrays[2][:, :past], v], axis=1),
        )

    def extend_back(dk, dv):
        earlier["dv"] = dv[:, :past]
        return dk[:, past:], dv[:, past:]

    newest = leaf(qkv.data[:, past:].copy())
    tables = cos[past:], sin[past:]
    y = F.attention(newest, *heads, *tables, extend, window, extend_back=extend_back)
    close(y.data, whole.data[:, past:], 1e-13)
    [grad] = gradients(y, [newest], dy)
    close(grad, expected[:, past:], 1e-12)
    close(earlier["dv"], expected.reshape(B, S, count, D)[:, :past, -K:], 1e-12)


@given(st.integers(1, 5), st.integers(0, 5), st.sampled_from([(2, 2), (4, 2), (4, 1)]))
def test_attention_of_fewer_queries_gives_the_last_rows(T, past, heads):
    q, k, v = draw_qkv(2, T + past, *heads, dtype=np.float64)
    close(attend(q[:, past:], k, v), attend(q, k, v)[:, past:], atol=1e-14)


def test_attention_permutes_with_the_batch():
    q, k, v = draw_qkv(5, 6, 4, 2)
    order = RNG.permutation(5)
    equal(attend(q[order], k[order], v[order]), attend(q, k, v)[order])


def test_attention_to_one_key_returns_its_value_and_to_equal_keys_their_mean():
    q, k, v = draw_qkv(2, 5, 2, 2, dtype=np.float64)
    y = attend(q, np.broadcast_to(k[:, :1], k.shape), v)
    equal(y[:, 0], v[:, 0])
    means = np.cumsum(v, axis=1) / np.arange(1, 6)[:, None, None]
    close(y, means, atol=1e-15)


def test_attention_with_huge_scores_does_not_overflow():
    q, k, v = draw_qkv(1, 4, 2, 2)
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(attend(q * 1e8, k * 1e8, v)).all()


ONE = Tensor(np.array(0.5), True)
OPTIONS = {
    "lora_linear: scaling": lambda x, o: F.lora_linear(
        x, leaf(np.ones((2, 3))), leaf(np.ones((2, 4))), leaf(np.ones((3, 2))), o
    ),
    "rms_norm: eps": lambda x, o: F.rms_norm(x, leaf(np.ones(4)), o),
    "layer_norm: eps": lambda x, o: F.layer_norm(x, leaf(np.ones(4)), leaf(np.ones(4)), o),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_that_requires_a_gradient_is_refused(name):
    x = Tensor(np.arange(8.0).reshape(2, 4), True)
    call = functools.partial(OPTIONS[name], x)
    with pytest.raises(GraphError, match=f"^{name} must be a number.*float"):
        call(ONE)
    expected = call(0.5).data
    for value in (ONE.detach(), np.float32(0.5), np.array(0.5)):
        equal(call(value).data, expected)


VECTORS = {
    "linear: bias": lambda x, w: F.linear(x, leaf(np.ones((4, 4))), w),
    "rms_norm: weight": lambda x, w: F.rms_norm(x, w),
    "layer_norm: weight": lambda x, w: F.layer_norm(x, w, leaf(np.ones(4))),
    "layer_norm: bias": lambda x, w: F.layer_norm(x, leaf(np.ones(4)), w),
}


@pytest.mark.parametrize("shape", [(), (1,), (2, 4), (3,)])
@pytest.mark.parametrize("name", VECTORS)
def test_vector_of_another_shape_is_refused(name, shape):
    # It was broadcast, and got a gradient of shape (4,).
    expected = rf"{name} must have shape \(4,\), got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=expected):
        VECTORS[name](Tensor(np.ones((2, 4))), leaf(np.ones(shape)))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (6,), (3, 2)])
def test_lora_linear_refuses_y_of_another_shape(shape):
    x, A, B = (leaf(np.ones(s)) for s in [(2, 4), (2, 4), (3, 2)])
    with pytest.raises(ValueError, match=r"y must have the shape of x B A, \(2, 3\), got"):
        F.lora_linear(x, leaf(np.ones(shape)), A, B, 1.0)


IDS = {
    "embedding": lambda ids: F.embedding(ids, leaf(np.arange(20.0).reshape(5, 4))),
    "cross_entropy": lambda ids: F.cross_entropy(leaf(np.ones((2, 4))), ids),
    "linear_cross_entropy": lambda ids: F.linear_cross_entropy(
        leaf(np.ones((2, 4))), leaf(np.ones((5, 4))), ids
    ),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_and_targets_are_integers_in_any_container(name):
    expected = IDS[name](np.array([1, 3])).data
    for ids in ([1, 3], (1, 3), Tensor(np.array([1, 3])), np.array([1, 3], np.uint8)):
        equal(IDS[name](ids).data, expected)
    for wrong in ([1.0, 3.0], np.array([True, False]), leaf([1.0, 3.0]), None, "13"):
        with pytest.raises(DataError, match=r"^(ids|targets) must be integers, got"):
            IDS[name](wrong)


def test_linear_cross_entropy_takes_integers_as_floats_of_the_head():
    x = np.arange(8).reshape(2, 4)
    head = leaf(np.arange(20.0).reshape(5, 4) / 10)
    targets = np.array([0, 3])
    loss = F.linear_cross_entropy(Tensor(x), head, targets)
    expected = F.cross_entropy(F.linear(Tensor(x), head), targets)
    np.testing.assert_allclose(loss.data, expected.data, rtol=1e-14)


@pytest.mark.parametrize("first_key", [None, np.zeros((0, 3), int)])
def test_attention_of_no_sequences_has_the_shapes_of_none(first_key):
    qkv = Tensor(np.zeros((0, 3, 16)), True)
    y = F.attention(qkv, 4, 2, window=2, first_key=first_key)
    assert y.shape == (0, 3, 8)
    assert gradients(y, [qkv], np.zeros((0, 3, 8)))[0].shape == (0, 3, 16)


def test_attention_of_a_query_that_sees_no_key_is_nan():
    qkv = np.random.default_rng(0).standard_normal((1, 70, 6))
    first_key = np.zeros((1, 70), int)
    expected = F.attention(Tensor(qkv), 1, 1, first_key=first_key).data
    first_key[0, [3, 69]] = [9, 100]
    with np.errstate(invalid="ignore"):
        y = F.attention(Tensor(qkv), 1, 1, first_key=first_key).data
        later = F.attention(Tensor(qkv), 1, 1, first_key=first_key + 100).data
    assert np.isnan(y[0, [3, 69]]).all()
    assert np.isnan(later).all()
    seen = np.delete(np.arange(70), [3, 69])
    equal(y[0, seen], expected[0, seen])


def test_rms_norm_and_lora_linear_take_integers_as_floats():
    x = np.full((1, 3), 100, np.int8)  # its square is no int8
    ones = Tensor(np.ones(3, np.int8))
    close(F.rms_norm(Tensor(x), ones).data, np.ones((1, 3)), rtol=1e-9)
    A = Tensor(np.ones((1, 3), np.int8))
    y = F.lora_linear(Tensor(x), Tensor(x), A, Tensor(np.ones((3, 1), np.int8)), 0.5)
    equal(y.data, np.full((1, 3), 250.0))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_dropout_of_later_positions_has_their_part_of_the_mask(B, before, T, C):
    ones = np.ones((B, before + T, C))
    whole = F.dropout(Tensor(ones), 0.5, 3, first=7).data
    x = leaf(ones[:, before:])
    y = F.dropout(x, 0.5, 3, first=7, start=before * C)
    equal(y.data, whole[:, before:])
    equal(gradients(y, [x], x.data)[0], whole[:, before:])


def test_dropout_takes_numpy_s_integers_as_keys():
    x = Tensor(np.ones((2, 8)))
    for key in (3, -3):
        expected = F.dropout(x, 0.5, key).data
        equal(F.dropout(x, 0.5, np.int64(key)).data, expected)
    for integer in (np.int64(-1), np.uint64(7), np.int8(5)):
        assert mix_key(integer, integer) == mix_key(int(integer), int(integer))


def test_attention_takes_integers_as_floats():
    values = np.arange(24).reshape(1, 4, 6)
    y = F.attention(Tensor(values), 1, 1).data
    equal(y, F.attention(Tensor(values.astype(float)), 1, 1).data)


ATTENTION = {
    r"shape \(B, T, channels\), got \(2, 6\)": ((2, 6), {}),
    r"kv_heads \(0\), both 1 or more": ((1, 2, 6), {"kv_heads": 0}),
    r"heads \(0\) must .*, both 1 or more": ((1, 2, 6), {"heads": 0}),
    r"channels \(0\)": ((1, 2, 0), {}),
    r"window must be None or 1 or more, got -1": ((1, 2, 6), {"window": -1}),
    r"window must be None or 1 or more, got 0": ((1, 2, 6), {"window": 0}),
}


@pytest.mark.parametrize("expected", ATTENTION)
def test_attention_says_what_is_wrong(expected):
    shape, options = ATTENTION[expected]
    with pytest.raises(ValueError, match=expected):
        F.attention(Tensor(np.ones(shape)), **{"heads": 1, "kv_heads": 1, **options})


@pytest.mark.parametrize(("H", "K", "width"), [(3, 2, 28), (2, 4, 40)])
def test_attention_refuses_heads_that_are_no_multiple_of_kv_heads(H, K, width):
    expected = rf"heads \({H}\) must be a multiple of kv_heads \({K}\)"
    with pytest.raises(ValueError, match=expected):
        F.attention(Tensor(np.ones((1, 2, width))), H, K)


@pytest.mark.parametrize(("H", "K", "width"), [(2, 2, 25), (4, 1, 26)])
def test_attention_refuses_channels_that_heads_cannot_share(H, K, width):
    expected = rf"channels \({width}\) must be a multiple of heads \+ 2 kv_heads \(6\)"
    with pytest.raises(ValueError, match=expected):
        F.attention(Tensor(np.ones((1, 2, width))), H, K)


def test_attention_keeps_scores_for_backward_only_up_to_kept_scores():
    """B H T S of them, exactly: beyond that memory must not grow with T^2."""
    qkv = leaf(np.random.default_rng(0).standard_normal((2, 3, 8 * 4)))
    tables = rotary_tables(np.zeros((3, 2)), 4, 2, 0.5)
    count = 2 * 4 * 3 * 3
    for most in (count, count - 1):
        with block_sizes(qkv.backend, kept_scores=most):
            y = F.attention(qkv, 4, 2, *tables)
        back = inspect.getclosurevars(y.node.vjp).nonlocals["back"]
        back = inspect.getclosurevars(back).nonlocals["attend_back"]
        blocks = inspect.getclosurevars(back).nonlocals["saved_blocks"]
        assert [scores is not None for *_, scores in blocks] == [most == count]


# ---- rotary position embedding -------------------------------------------------------------------


def rotate(x: np.ndarray, start: int) -> np.ndarray:
    """apply_rotary of x (B, T, h, D) at the positions from `start` on."""
    a = angles(start + x.shape[1], x.shape[3])[start:]
    return apply_rotary(np, x, *rotary_tables(a, x.shape[2], 0, 1.0))


@given(st.integers(0, 50), st.integers(1, 6), st.sampled_from([2, 4, 8]))
def test_apply_rotary_preserves_the_norm_of_every_pair(start, T, D):
    x = RNG.standard_normal((2, T, 3, D))

    def norms(z: np.ndarray) -> np.ndarray:
        first, second = np.split(z, 2, axis=-1)
        return np.hypot(first, second)

    close(norms(rotate(x, start)), norms(x), rtol=2e-15)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 40))
def test_apply_rotary_makes_scores_depend_on_the_distance_alone(m, n, shift):
    q, k = RNG.standard_normal((2, 1, 1, 1, 8))
    score = (rotate(q, m) * rotate(k, n)).sum()
    shifted = (rotate(q, m + shift) * rotate(k, n + shift)).sum()
    # An angle of up to 90 is off by up to 2^-47; the score changes by at most |q| |k| for each unit
    # of angle.
    bound = 8 * 2.0**-47 * np.linalg.norm(q) * np.linalg.norm(k)
    assert abs(score - shifted) <= bound


def test_apply_rotary_at_position_zero_changes_nothing():
    x = RNG.standard_normal((2, 1, 3, 4))
    equal(rotate(x, 0), x)


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_of_nothing_is_the_tensor_itself():
    x = leaf(np.ones((2, 3)))
    assert F.dropout(x, 0.0, 1) is x


def test_dropout_with_a_probability_next_to_one_drops_everything():
    p = float(np.nextafter(1, 0))
    assert not F.dropout(Tensor(np.ones((2, 50))), p, 1).data.any()


def test_dropout_of_sequences_of_one_number():
    y = F.dropout(Tensor(np.ones((64, 1))), 0.5, 1)
    assert set(y.data.ravel()) == {0.0, 2.0}


@DTYPES
@given(st.floats(0.01, 0.99), st.integers(1, 4), st.integers(1, 9))
def test_dropout_scales_survivors_once_and_has_the_same_mask_backward(dtype, p, B, C):
    x = leaf(RNG.standard_normal((B, 3, C)).astype(dtype) + 10)
    dy = RNG.standard_normal(x.shape).astype(dtype)
    y = F.dropout(x, p, 7)
    scale = dtype(1 / (1 - p))
    survives = y.data != 0
    equal(y.data, np.where(survives, x.data * scale, 0))
    equal(gradients(y, [x], dy)[0], np.where(survives, dy * scale, 0))


@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_dropout_masks_a_sequence_by_the_key_and_its_place_alone(B, C, data):
    x = RNG.standard_normal((B, 3, C))
    key = data.draw(st.integers(0, 2**64 - 1))
    first = data.draw(st.integers(0, 99))
    whole = F.dropout(Tensor(x), 0.5, key, first).data
    start = data.draw(st.integers(0, B))
    stop = data.draw(st.integers(start, B))
    part = F.dropout(Tensor(x[start:stop]), 0.5, key, first + start).data
    equal(part, whole[start:stop])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_with_its_probability_in_rows_and_columns(p):
    n = 1000
    dropped = F.dropout(Tensor(np.ones((n, n), np.float32)), p, mix_key(3)).data == 0

    def z(count: np.ndarray, trials: int) -> Any:
        """How many standard deviations the counts are from their mean, at most."""
        return (np.abs(count - trials * p) / math.sqrt(trials * p * (1 - p))).max()

    assert z(dropped.sum(), n * n) < 5
    assert z(dropped.sum(axis=0), n) < 5
    assert z(dropped.sum(axis=1), n) < 5
    in_rows = dropped[:, 1:] & dropped[:, :-1]
    in_columns = dropped[1:] & dropped[:-1]
    for both in (in_rows, in_columns):  # neighbours are independent of each other
        deviation = math.sqrt(p * p * (1 - p * p) / both.size)
        assert abs(both.mean() - p * p) < 5 * deviation * 2


def test_dropout_begins_with_the_first_sequence():
    x = Tensor(np.ones((3, 50)))
    default = F.dropout(x, 0.5, 7).data
    assert np.array_equal(default, F.dropout(x, 0.5, 7, 0).data)
    assert not np.array_equal(default, F.dropout(x, 0.5, 7, 1).data)


# ---- erf and the activations ---------------------------------------------------------------------


def erf_of_c(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in x])


def erf_inputs() -> np.ndarray:
    pieces = [np.linspace(-7, 7, 100_001), RNG.standard_normal(20_000)]
    pieces.append(np.geomspace(1e-300, 1, 2_000))
    pieces.append((np.arange(3000) + 0.5) / 512)
    pieces.append(np.array([0.0, -0.0, 6.0, -6.0, np.inf, -np.inf, 1e300]))
    return np.concatenate(pieces)


def test_erf_is_within_two_ulp_of_the_c_library():
    x = erf_inputs()
    got = NUMPY.erf(x)
    exact = erf_of_c(x)
    error = np.abs(got - exact)
    assert ((error <= 2 * np.spacing(np.abs(exact))) | (error <= 4.5e-16)).all()
    assert (np.signbit(got) == np.signbit(x)).all()
    assert (np.abs(got) <= 1).all()
    assert np.isnan(NUMPY.erf(np.array([np.nan])))


def test_erf_in_float32_is_within_two_ulp_of_the_c_library():
    x = erf_inputs()
    single = x[np.abs(x) < 1e38].astype(np.float32)
    exact = erf_of_c(single)
    got = NUMPY.erf(single)
    assert got.dtype == np.float32
    ulp = np.spacing(np.abs(exact).astype(np.float32))
    assert (np.abs(got - exact) <= 2 * ulp).all()


@DTYPES
@pytest.mark.parametrize("name", ["silu", "none", "tanh"])
def test_silu_and_gelu_of_extreme_values(name, dtype):
    values = [-1e10, -1e5, -1e3, -100, -0.0, 0.0, 1e-30, 100, 1e3, 1e5, 1e10]
    x = leaf(np.array(values, dtype))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y = F.silu(x) if name == "silu" else F.gelu(x, name)
        (dx,) = gradients(y, [x], np.ones_like(x.data))
    equal(y.data[-4:], x.data[-4:])
    close(y.data[:6], 0, atol=1e-36)
    close(y.data[6], dtype(5e-31), rtol=4 * U32)
    close(dx, [0, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1], atol=1e-36)
    gate_and_one = Tensor(np.stack([x.data, np.ones_like(x.data)]))
    with np.errstate(over="raise", invalid="raise"):
        equal(F.swiglu(gate_and_one).data, F.silu(x).data)


def test_swiglu_refuses_a_first_axis_that_is_not_2():
    with pytest.raises(ValueError, match=r"first axis must be 2, got \(3, 4\)"):
        F.swiglu(Tensor(np.ones((3, 4))))
