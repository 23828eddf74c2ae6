"""Each neural operation beside its definition, in float64 and float32, and the properties that mathematics promises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from operations import NEURAL, Operation, angles, rotary_tables

from minilora import functional as F
from minilora.autograd import Tensor, gradients, no_grad
from minilora.backend import NUMPY, mix_key
from minilora.effective import costs
from minilora.errors import DataError

U32 = 2.0**-24  # half the distance from 1 to the next float32
RNG = np.random.default_rng(1)


def results(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[np.ndarray]:
    """The output, then the gradient of every leaf under a fixed random dy."""
    y = function(*leaves)
    dy = np.asarray(np.random.default_rng(3).standard_normal(y.shape)).astype(y.dtype)
    found = gradients(y, leaves, dy) if y.requires_grad else [None] * len(leaves)
    return [
        y.numpy(),
        *(np.zeros_like(x.data) if g is None else g for x, g in zip(leaves, found, strict=True)),
    ]


@pytest.mark.parametrize("op", NEURAL, ids=lambda op: op.id)
def test_operation_equals_its_definition(op: Operation) -> None:
    got, expected = results(op.function, op.leaves()), results(op.definition, op.leaves())
    largest = max(np.abs(b).max(initial=0) for b in expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == np.float64
        assert np.abs(a - b).max(initial=0) <= 1e-12 * largest


@pytest.mark.parametrize("op", NEURAL, ids=lambda op: op.id)
def test_float32_stays_float32_and_within_its_rounding(op: Operation) -> None:
    leaves = op.leaves(np.float32)
    exact = results(op.function, [Tensor(x.data.astype(np.float64), True) for x in leaves])
    # From an input to an output or a gradient no number here passes more than 32 roundings, sums of at most 15 terms
    # included, and each is at most U32 of the largest number that occurs on the way.
    largest = max(1.0, *(np.abs(a).max(initial=0) for a in (*exact, *op.inputs)))
    for got, want in zip(results(op.function, leaves), exact, strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - want).max(initial=0) <= 32 * U32 * largest


def test_numpy_scalars_as_options_leave_float32_alone() -> None:
    def f32(*shape: int) -> Tensor:
        return Tensor(np.ones(shape, np.float32), True)

    half = np.float64(0.5)
    x, w = f32(2, 4), f32(4)
    for y in (
        F.lora_linear(x, f32(2, 3), f32(2, 4), f32(3, 2), half),
        F.dropout(x, half, 1),
        F.rms_norm(x, w, half),
        F.layer_norm(x, w, w, half),
    ):
        assert y.dtype == np.float32
        for parent, g in zip(y.node.parents, y.node.vjp(np.ones(y.shape, np.float32)), strict=True):
            assert parent is None or g.dtype == np.float32


@pytest.mark.parametrize(
    ("least", "inputs", "outputs", "r"), [(8, 8, 8, 1), (15, 16, 16, 1), (2, 3, 5, 2), (4, 8, 8, 3)]
)
def test_merging_pays_from_this_number_of_tokens_on(
    least: int, inputs: int, outputs: int, r: int
) -> None:
    # W + dW once: (2 r + 12) in out; the low-rank path, 8 r (in + out) a token. In three of these, least - 1 is a tie.
    pays = [
        merged < apart
        for merged, apart in (costs(least + i, inputs, outputs, r) for i in (-1, 0, 1))
    ]
    assert pays == [False, True, True]


# ---- embedding and cross-entropy ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=9))
def test_embedding_adds_the_gradients_of_repeated_ids(ids: list[int]) -> None:
    weight = Tensor(RNG.standard_normal((5, 3)), True)
    y = F.embedding(np.array(ids, np.int64), weight)
    np.testing.assert_array_equal(y.data, weight.data[ids].reshape(-1, 3))
    dy = np.arange(y.size, dtype=np.float64).reshape(
        y.shape
    )  # integers: sums are exact in any order
    expected = np.zeros((5, 3))
    np.add.at(expected, np.array(ids, np.int64), dy)
    np.testing.assert_array_equal(gradients(y, [weight], dy)[0], expected)


@pytest.mark.parametrize("bad", [-1, 5, 9, -100])
def test_an_id_outside_the_vocabulary_is_named(bad: int) -> None:
    weight = Tensor(np.full((5, 3), np.nan), True)
    with pytest.raises(DataError, match=rf"id {bad} is outside \[0, 5\)"):
        F.embedding(np.array([[1, bad]]), weight)
    with (
        np.errstate(all="raise"),
        pytest.raises(DataError, match=rf"target {bad} is outside \[0, 5\)"),
    ):
        # Infinite logits would be a floating-point error: the targets are checked before anything is computed.
        F.cross_entropy(Tensor(np.full((2, 5), np.inf), True), np.array([1, bad]), ignore_index=-7)


def test_targets_must_have_the_shape_of_the_logits() -> None:
    for shape in ((1,), (6,), (3, 2)):
        with pytest.raises(DataError, match="do not fit logits"):
            F.cross_entropy(Tensor(np.zeros((2, 3, 5))), np.zeros(shape, np.int64))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_nothing_is_zero_with_zero_gradient(reduction: str, dtype: type) -> None:
    for shape in ((2, 3), (0,)):
        x, targets = (
            Tensor(RNG.standard_normal((*shape, 5)).astype(dtype), True),
            np.full(shape, -100),
        )
        loss = F.cross_entropy(x, targets, reduction=reduction)
        assert loss.shape == ()
        assert loss.item() == 0
        loss.backward()
        np.testing.assert_array_equal(x.grad, np.zeros_like(x.data))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_huge_logits_is_right(dtype: type) -> None:
    x = Tensor(np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [-1e4, -1e4, -1e4]], dtype), True)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        each = [
            F.cross_entropy(x[i : i + 1], np.array([t]), reduction="sum").item()
            for i, t in enumerate((0, 1, 2))
        ]
        loss = F.cross_entropy(x, np.array([0, 1, 2]), reduction="sum")
        loss.backward()
    assert each[:2] == [0.0, 2e4]
    # -(-1e4) + log(3 exp(-1e4)): the sum is rounded where numbers are near 1e4.
    assert each[2] == pytest.approx(math.log(3), abs=float(np.spacing(dtype(1e4))))
    third = dtype(1) / dtype(3)
    np.testing.assert_allclose(
        x.grad, [[0, 0, 0], [1, -1, 0], [third, third, third - 1]], rtol=0, atol=4 * U32
    )


def test_an_ignored_target_counts_for_nothing() -> None:
    logits, targets = RNG.standard_normal((6, 5)), np.array([0, -100, 3, 4, -100, 1])
    x, kept = Tensor(logits, True), Tensor(logits[targets >= 0], True)
    for reduction in ("mean", "sum"):
        a = F.cross_entropy(x, targets, reduction=reduction)
        b = F.cross_entropy(kept, targets[targets >= 0], reduction=reduction)
        assert a.item() == pytest.approx(b.item(), rel=1e-15)
        (ga,), (gb,) = gradients(a, [x]), gradients(b, [kept])
        assert not ga[targets < 0].any()
        np.testing.assert_allclose(ga[targets >= 0], gb, rtol=1e-15)


def test_a_vocabulary_of_one_has_nothing_to_lose() -> None:
    x = Tensor(np.array([[3.0], [-2.0]]), True)
    loss = F.cross_entropy(x, np.array([0, -100]), reduction="sum")
    assert loss.item() == 0
    loss.backward()
    np.testing.assert_array_equal(x.grad, np.zeros((2, 1)))


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="'median'"):
        F.cross_entropy(Tensor(np.zeros((1, 2))), np.array([0]), reduction="median")
    for unknown in ("fast", "tanhh"):
        with pytest.raises(ValueError, match=f"'{unknown}'"):
            F.gelu(Tensor(np.zeros(2)), unknown)


def test_an_option_is_known_by_its_letters() -> None:
    x = Tensor(np.array([[0.5, -1.0]]))
    read = "".join  # as a file gives it: equal to the word in the source, and not the same object
    assert (
        F.gelu(x, read(["no", "ne"])).data[0, 0]
        == F.gelu(x).data[0, 0]
        != F.gelu(x, read(["ta", "nh"])).data[0, 0]
    )
    targets = np.array([[0], [1]]).T
    twice = Tensor(np.array([[[0.5, -1.0], [0.5, 2.0]]]))
    mean, total = (
        F.cross_entropy(twice, targets, reduction=read(r)).item()
        for r in (["me", "an"], ["su", "m"])
    )
    assert total == 2 * mean


# ---- softmax and norms ----------------------------------------------------------------------------------------------

ROWS = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.floats(-20, 20)
)


@given(ROWS, st.floats(-1000, 1000))
def test_softmax_does_not_see_a_shift(x: np.ndarray, c: float) -> None:
    # Both arguments of exp are exact to a rounding of x + c, at most 2^-53 * 1020 each: twice that is relative to 1.
    with no_grad():
        np.testing.assert_allclose(
            F.softmax(Tensor(x + c)).data, F.softmax(Tensor(x)).data, rtol=5e-13, atol=0
        )
        np.testing.assert_allclose(
            F.log_softmax(Tensor(x + c)).data, F.log_softmax(Tensor(x)).data, rtol=0, atol=5e-13
        )


def test_softmax_is_over_the_last_axis_unless_another_is_named() -> None:
    x = Tensor(RNG.standard_normal((2, 3, 4)))
    for function in (F.softmax, F.log_softmax):
        np.testing.assert_array_equal(function(x).data, function(x, 2).data)
    np.testing.assert_allclose(F.softmax(x).data.sum(axis=2), 1, rtol=1e-15)


@given(ROWS)
def test_softmax_is_a_distribution_and_log_softmax_its_logarithm(x: np.ndarray) -> None:
    p = F.softmax(Tensor(x)).data
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-15)
    np.testing.assert_allclose(np.exp(F.log_softmax(Tensor(x)).data), p, rtol=1e-14)


def test_layer_norm_does_not_see_an_affine_change_and_rms_norm_not_a_scale() -> None:
    x, w, b = (
        RNG.standard_normal((3, 8)),
        Tensor(RNG.standard_normal(8)),
        Tensor(RNG.standard_normal(8)),
    )
    plain = F.layer_norm(Tensor(x), w, b, 0.0).data
    np.testing.assert_allclose(
        F.layer_norm(Tensor(2.5 * x - 3), w, b, 0.0).data, plain, rtol=1e-13, atol=1e-14
    )
    np.testing.assert_allclose(
        F.rms_norm(Tensor(2.5 * x), w, 0.0).data, F.rms_norm(Tensor(x), w, 0.0).data, rtol=1e-14
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norms_of_constant_rows_are_finite(dtype: type) -> None:
    x = Tensor(np.full((2, 8), 3, dtype), True)
    w, b = (Tensor(RNG.standard_normal(8).astype(dtype), True) for _ in range(2))
    y = F.layer_norm(x, w, b)
    np.testing.assert_array_equal(y.data, np.broadcast_to(b.data, (2, 8)))
    zero = Tensor(np.zeros((2, 8), dtype), True)
    z = F.rms_norm(zero, w)
    assert not z.data.any()
    for out, leaf in ((y, x), (z, zero)):
        out.backward(np.ones((2, 8), dtype))
        assert np.isfinite(leaf.grad).all()


# ---- attention ------------------------------------------------------------------------------------------------------


def qkv(
    B: int, T: int, S: int, H: int, K: int, D: int = 4, dtype: type = np.float32
) -> list[np.ndarray]:
    return [
        RNG.standard_normal(s).astype(dtype) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    ]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v of q (B, T, H, D), k and v (B, S, K, D), not rotated; earlier keys are handed over."""
    (B, T, H, D), K, past = q.shape, k.shape[2], k.shape[1] - q.shape[1]
    packed = np.concatenate([z[:, -T:].reshape(B, T, -1) for z in (q, k, v)], axis=-1)
    tables = (t.astype(q.dtype) for t in rotary_tables(np.zeros((T, D // 2)), H, K, D**-0.5))

    def extend(*late: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(
            np.concatenate([z[:, :past], new], axis=1) for z, new in zip((k, v), late, strict=True)
        )

    return F.attention(Tensor(packed), H, K, *tables, extend if past else None).data.reshape(
        B, T, H, D
    )


@given(st.integers(1, 3), st.integers(1, 9), st.sampled_from([(1, 1), (4, 2), (3, 3)]), st.data())
def test_attention_never_looks_ahead(
    B: int, T: int, heads: tuple[int, int], data: st.DataObject
) -> None:
    arrays = qkv(B, T, T, *heads)
    before = attend(*arrays)
    t = data.draw(st.integers(0, T - 1))
    for a in arrays:
        a[:, t] += 1 + np.abs(a[:, t])
    after = attend(*arrays)
    np.testing.assert_array_equal(after[:, :t], before[:, :t])  # every bit
    assert (after[:, t] != before[:, t]).any()


@given(st.integers(1, 5), st.integers(0, 5), st.sampled_from([(2, 2), (4, 2), (4, 1)]))
def test_fewer_queries_are_the_last_rows(T: int, past: int, heads: tuple[int, int]) -> None:
    q, k, v = qkv(2, T + past, T + past, *heads, dtype=np.float64)
    np.testing.assert_allclose(
        attend(q[:, past:], k, v), attend(q, k, v)[:, past:], rtol=0, atol=1e-14
    )


def test_the_batch_can_be_permuted() -> None:
    arrays, order = qkv(5, 6, 6, 4, 2), RNG.permutation(5)
    np.testing.assert_array_equal(attend(*(a[order] for a in arrays)), attend(*arrays)[order])


def test_attention_to_one_key_returns_its_value_and_to_equal_keys_their_mean() -> None:
    q, k, v = qkv(2, 5, 5, 2, 2, dtype=np.float64)
    out = attend(q, np.broadcast_to(k[:, :1], k.shape), v)
    np.testing.assert_array_equal(out[:, 0], v[:, 0])
    means = np.cumsum(v, axis=1) / np.arange(1, 6)[:, None, None]
    np.testing.assert_allclose(out, means, rtol=0, atol=1e-15)


def test_huge_scores_do_not_overflow() -> None:
    q, k, v = qkv(1, 4, 4, 2, 2)
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(attend(q * 1e8, k * 1e8, v)).all()


@pytest.mark.parametrize(("H", "K", "width"), [(3, 2, 28), (2, 4, 40), (2, 2, 25)])
def test_attention_refuses_heads_that_do_not_fit(H: int, K: int, width: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"heads \({H}\) must be a multiple of kv_heads \({K}\)|channels \({width}\)",
    ):
        F.attention(Tensor(np.ones((1, 2, width))), H, K, np.ones((2, 1)), np.ones((2, 1)))


# ---- rope -----------------------------------------------------------------------------------------------------------


def rotated(x: np.ndarray, start: int) -> np.ndarray:
    a = angles(start + x.shape[1], x.shape[3])[start:]
    return F.apply_rotary(np, x, *rotary_tables(a, x.shape[2], 0, 1.0))


@given(st.integers(0, 50), st.integers(1, 6), st.sampled_from([2, 4, 8]))
def test_rope_preserves_the_norm_of_every_pair(start: int, T: int, D: int) -> None:
    x = RNG.standard_normal((2, T, 3, D))
    pairs, turned = (z.reshape(2, T, 3, 2, D // 2) for z in (x, rotated(x, start)))
    np.testing.assert_allclose(
        np.hypot(*np.moveaxis(turned, 3, 0)), np.hypot(*np.moveaxis(pairs, 3, 0)), rtol=2e-15
    )


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 40))
def test_rope_scores_depend_on_the_distance_alone(m: int, n: int, shift: int) -> None:
    q, k = RNG.standard_normal((2, 1, 1, 1, 8))
    here = (rotated(q, m) * rotated(k, n)).sum()
    there = (rotated(q, m + shift) * rotated(k, n + shift)).sum()
    # An angle of up to 90 is off by up to 2^-47; the score changes by at most |q| |k| for each unit of angle.
    bound = 8 * 2.0**-47 * np.linalg.norm(q) * np.linalg.norm(k)
    assert abs(here - there) <= bound


def test_rope_at_position_zero_changes_nothing() -> None:
    x = RNG.standard_normal((2, 1, 3, 4))
    np.testing.assert_array_equal(rotated(x, 0), x)


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_of_nothing_is_the_tensor_itself() -> None:
    x = Tensor(np.ones((2, 3)), True)
    assert F.dropout(x, 0.0, 1) is x


def test_a_probability_next_to_one_drops_everything() -> None:
    assert not F.dropout(Tensor(np.ones((2, 50))), float(np.nextafter(1, 0)), 1).data.any()


def test_a_sequence_may_be_one_number() -> None:
    assert set(F.dropout(Tensor(np.ones((64, 1))), 0.5, 1).data.ravel()) == {0.0, 2.0}


@given(
    st.floats(0.01, 0.99),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([np.float32, np.float64]),
)
def test_survivors_are_scaled_once_and_backward_has_the_same_mask(
    p: float, B: int, C: int, dtype: type
) -> None:
    x = Tensor(RNG.standard_normal((B, 3, C)).astype(dtype) + 10, True)
    dy = RNG.standard_normal(x.shape).astype(dtype)
    y = F.dropout(x, p, 7)
    scale = dtype(1 / (1 - p))
    kept = y.data != 0
    np.testing.assert_array_equal(y.data, np.where(kept, x.data * scale, 0))
    np.testing.assert_array_equal(gradients(y, [x], dy)[0], np.where(kept, dy * scale, 0))


@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_a_sequence_is_masked_by_the_key_and_its_place_alone(
    B: int, C: int, data: st.DataObject
) -> None:
    x, key, first = (
        RNG.standard_normal((B, 3, C)),
        data.draw(st.integers(0, 2**64 - 1)),
        data.draw(st.integers(0, 99)),
    )
    whole = F.dropout(Tensor(x), 0.5, key, first).data
    cut = data.draw(st.integers(0, B))
    stop = data.draw(st.integers(cut, B))
    np.testing.assert_array_equal(
        F.dropout(Tensor(x[cut:stop]), 0.5, key, first + cut).data, whole[cut:stop]
    )


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_with_its_probability_in_rows_and_columns(p: float) -> None:
    n = 1000
    dropped = F.dropout(Tensor(np.ones((n, n), np.float32)), p, mix_key(3)).data == 0

    def z(count: np.ndarray, of: int) -> np.ndarray:
        return np.abs(count - of * p) / math.sqrt(of * p * (1 - p))

    assert z(dropped.sum(), n * n) < 5
    assert z(dropped.sum(axis=0), n).max() < 5
    assert z(dropped.sum(axis=1), n).max() < 5
    for neighbours in (
        dropped[:, 1:] & dropped[:, :-1],
        dropped[1:] & dropped[:-1],
    ):  # independent of each other
        assert (
            abs(neighbours.mean() - p * p)
            < 5 * math.sqrt(p * p * (1 - p * p) / neighbours.size) * 2
        )


# ---- erf and the activations ----------------------------------------------------------------------------------------


def test_erf_is_within_two_ulp_of_the_c_library() -> None:
    x = np.concatenate([
        np.linspace(-7, 7, 100_001), RNG.standard_normal(20_000), np.geomspace(1e-300, 1, 2_000),
        (np.arange(3000) + 0.5) / 512, [0.0, -0.0, 6.0, -6.0, np.inf, -np.inf, 1e300],
    ])  # fmt: skip
    got, exact = NUMPY.erf(x), np.array([math.erf(v) for v in x])
    error = np.abs(got - exact)
    assert ((error <= 2 * np.spacing(np.abs(exact))) | (error <= 4.5e-16)).all()
    assert (np.signbit(got) == np.signbit(x)).all()
    assert (np.abs(got) <= 1).all()
    assert np.isnan(NUMPY.erf(np.array([np.nan])))
    single = x[np.abs(x) < 1e38].astype(np.float32)
    exact = np.array([math.erf(v) for v in single])
    got = NUMPY.erf(single)
    assert got.dtype == np.float32
    assert (np.abs(got - exact) <= 2 * np.spacing(np.abs(exact).astype(np.float32))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("approximate", ["silu", "none", "tanh"])
def test_activations_of_extreme_values(approximate: str, dtype: type) -> None:
    x = Tensor(
        np.array([-1e10, -1e5, -1e3, -100, -0.0, 0.0, 1e-30, 100, 1e3, 1e5, 1e10], dtype), True
    )
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y = F.silu(x) if approximate == "silu" else F.gelu(x, approximate)
        (g,) = gradients(y, [x], np.ones_like(x.data))
    np.testing.assert_array_equal(y.data[-4:], x.data[-4:])
    np.testing.assert_allclose(y.data[:6], 0, atol=1e-36)
    np.testing.assert_allclose(y.data[6], dtype(5e-31), rtol=4 * U32)
    np.testing.assert_allclose(g, [0, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1], rtol=0, atol=1e-36)
    with np.errstate(over="raise", invalid="raise"):
        both = Tensor(np.stack([x.data, np.ones_like(x.data)]))
        np.testing.assert_array_equal(F.swiglu(both).data, F.silu(x).data)


def test_a_small_loss_is_not_rounded_away() -> None:
    logits = np.array([[20.0, 8.0]], np.float32)
    exact = math.log1p(math.exp(-12))
    assert (
        abs(F.cross_entropy(Tensor(logits), np.array([0])).item() - exact) <= 2 * 2**-24
    )  # of 1 + e^-12, not of 20


def test_scores_are_kept_for_backward_while_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """B H T S of them, exactly: beyond, memory must not grow with T^2."""
    rng = np.random.default_rng(0)
    qkv, tables = (
        Tensor(rng.standard_normal((2, 3, 8 * 4)), True),
        rotary_tables(np.zeros((3, 2)), 4, 2, 0.5),
    )
    for most, are_kept in ((2 * 4 * 3 * 3, True), (2 * 4 * 3 * 3 - 1, False)):
        monkeypatch.setattr(F, "KEPT_SCORES", most)
        held = inspect.getclosurevars(F.attention(qkv, 4, 2, *tables).node.vjp).nonlocals
        kept = inspect.getclosurevars(held["back"]).nonlocals["kept"]
        assert [scores is not None for *_, scores in kept] == [are_kept]


def test_an_id_that_is_outside_is_named() -> None:
    for ids, named in (([0, 9], 9), ([-1, 9], -1), ([-2, 0], -2), ([5, 1], 5)):
        with pytest.raises(DataError, match=rf"id {named} is outside \[0, 5\)"):
            F.check_ids(np.array(ids), 5, "id")


def test_masks_begin_with_the_first_sequence() -> None:
    x = Tensor(np.ones((3, 50)))
    assert np.array_equal(F.dropout(x, 0.5, 7).data, F.dropout(x, 0.5, 7, 0).data)
    assert not np.array_equal(F.dropout(x, 0.5, 7).data, F.dropout(x, 0.5, 7, 1).data)
