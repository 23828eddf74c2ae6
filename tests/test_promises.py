"""What holds for every operation: each promise is a function of an entry of the table.

Each exemption has a reason.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from operations import (
    EMPTY,
    EXEMPT,
    FROZEN_WEIGHT,
    LAYOUT_ROUNDS,
    NOT_EMPTY,
    TABLE,
    Operation,
    angles,
    by_layer,
    dropout_definition,
)
from test_autograd import some_dy

from minilora import CausalLM, TransformerConfig
from minilora import autograd as ag
from minilora import functional as F
from minilora.autograd import Tensor, gradients, no_grad
from minilora.errors import GraphError

U64 = 2.0**-53
EVERY = pytest.mark.parametrize("op", TABLE, ids=lambda op: op.id)
BY_ID = {op.id: op for op in TABLE}
PROMISES: dict[str, Callable[[Operation], None]] = {}
equal = np.testing.assert_array_equal


def promise(function: Callable[[Operation], None]) -> Callable[[Operation], None]:
    PROMISES[function.__name__] = function
    return function


def gradients_or_zeros(y: Tensor, leaves: Any, dy: Any) -> list[np.ndarray]:
    grads = gradients(y, leaves, dy)
    return [np.zeros_like(x.data) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def run(op: Operation, *leaves: Tensor, dy: Any = None) -> list[np.ndarray]:
    """The output, then the gradient of every leaf; zeros where it has none."""
    y = op.function(*leaves)
    return [y.data, *gradients_or_zeros(y, leaves, some_dy(y) if dy is None else dy)]


def largest(arrays: Any) -> Any:
    return max(np.abs(a).max(initial=0) for a in arrays)


NAMES = ["complex_step", "layouts", "accumulates", "nan_where_dependent", "repeats", "linear"]


@EVERY
@pytest.mark.parametrize("name", NAMES)
def test_promise(name, op):
    if (name, op.name) in EXEMPT or (name, op.id) in EXEMPT:
        return
    PROMISES[name](op)


def test_promise_exemptions_are_needed_and_eleven(capsys):
    for (name, operation), reason in EXEMPT.items():
        broken = 0
        for op in TABLE:
            if operation not in (op.name, op.id):
                continue
            try:
                PROMISES[name](op)
            except (AssertionError, TypeError):
                broken += 1
        assert broken, f"{operation} keeps the promise {name}: take its exemption out ({reason})"
    counts = Counter(name for name, _ in EXEMPT)
    with capsys.disabled():
        print(f" [{len(EXEMPT)} exemptions: {dict(counts)}] ", end="")
    assert counts == {"complex_step": 4, "nan_where_dependent": 7}  # may fall, never rise


def test_promise_is_called_for_every_promise():
    assert set(NAMES) == set(PROMISES)


# ---- the promises --------------------------------------------------------------------------------


@promise
def complex_step(op: Operation) -> None:
    """f(x + i h v) = f(x) + i h f'(x) v + O(h^2), exact to rounding at h = 1e-30.

    Nothing cancels.
    """
    leaves = op.leaves()
    y, *grads = run(op, *leaves)
    dy = some_dy(op.function(*leaves))
    rng = np.random.default_rng(4)
    for _ in range(3):
        points = []
        terms = []
        for a, g in zip(op.inputs, grads, strict=True):
            v = np.asarray(rng.standard_normal(a.shape))
            points.append(Tensor(a + 1e-30j * v))
            terms.append(g * v)
        with no_grad():
            z = op.function(*points).data
        numeric = (dy * (z.imag / 1e-30)).sum()
        error = abs(numeric - sum(t.sum() for t in terms))
        assert error <= 2e-14 * sum(np.abs(t).sum() for t in terms)
        assert largest([z.real - y]) <= 32 * U64 * largest([y])


@promise
def accumulates(op: Operation) -> None:
    """Two backwards leave the sum, bit for bit; clearing `.grad` starts again."""
    leaves = op.leaves()
    y = op.function(*leaves)
    dy = some_dy(y)
    other = dy[..., ::-1] if y.ndim else np.asarray(2.5)
    first = gradients(y, leaves, dy, retain_graph=True)
    second = gradients(y, leaves, other, retain_graph=True)
    y.backward(dy, retain_graph=True)
    y.backward(other, retain_graph=True)
    for x, g, h in zip(leaves, first, second, strict=True):
        equal(x.grad, g + h)
        x.grad = None
    y.backward(dy)
    for x, g in zip(leaves, first, strict=True):
        equal(x.grad, g)


@promise
def repeats(op: Operation) -> None:
    """The same inputs, the same bits."""
    for dtype in (np.float64, np.float32):
        one = run(op, *op.leaves(dtype))
        two = run(op, *op.leaves(dtype))
        assert [a.tobytes() for a in one] == [a.tobytes() for a in two]


@promise
def linear(op: Operation) -> None:
    """Every vjp is linear: exactly for a factor of two and for zero, to rounding for a sum."""
    leaves = op.leaves()
    rng = np.random.default_rng(6)
    y = op.function(*leaves)
    a = np.asarray(rng.standard_normal(y.shape))
    b = np.asarray(rng.standard_normal(y.shape))

    def back(dy: np.ndarray) -> list[Any]:
        return gradients(y, leaves, dy, retain_graph=True)

    first = back(a)
    second = back(b)
    bound = 32 * U64 * largest([*first, *second])
    for g, doubled in zip(first, back(2 * a), strict=True):
        equal(doubled, 2 * g)
    for zero in back(0 * a):
        assert not zero.any()
    for g, h, both in zip(first, second, back(2 * a - 3 * b), strict=True):
        assert largest([both - (2 * g - 3 * h)]) <= bound


def as_it_is(a: np.ndarray) -> np.ndarray:
    return a.copy()


def column_major(a: np.ndarray) -> np.ndarray:
    return a.copy("F")


def transposed(a: np.ndarray) -> np.ndarray:
    if not a.ndim:
        return a
    return np.ascontiguousarray(a.swapaxes(0, -1)).swapaxes(0, -1)


def negative_strides(a: np.ndarray) -> np.ndarray:
    return np.flip(np.flip(a).copy())


def misaligned(a: np.ndarray) -> np.ndarray:
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    out = buffer[1:].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def gaps_of_nan(a: np.ndarray) -> np.ndarray:
    if not a.ndim:
        return a
    wide = np.full([2 * n for n in a.shape], np.nan)
    every_second = tuple(slice(None, None, 2) for _ in a.shape)
    wide[every_second] = a
    return wide[every_second]


def one_row(a: np.ndarray) -> np.ndarray:
    """The first row in place of all, with stride 0."""
    return np.broadcast_to(a[:1], a.shape) if a.ndim and len(a) else a


def stride_zero(a: np.ndarray) -> np.ndarray:
    return np.broadcast_to(a, (2, *a.shape))[1]


@promise
def layouts(op: Operation) -> None:
    """The layout of the inputs and dy in memory changes nothing, or in a sum the last bits."""
    dy = some_dy(op.function(*op.leaves()))
    for lay in (column_major, transposed, negative_strides, gaps_of_nan, misaligned):
        check_layout(op, op.inputs, dy, lay, lay)
    check_layout(op, [one_row(a).copy() for a in op.inputs], dy, one_row, stride_zero)


def check_layout(op: Operation, arrays: Any, dy: np.ndarray, lay: Any, lay_dy: Any) -> None:
    expected = run(op, *(Tensor(as_it_is(a), True) for a in arrays), dy=dy)
    got = run(op, *(Tensor(lay(a), True) for a in arrays), dy=lay_dy(dy))
    bound = 32 * U64 * largest([*expected, *arrays, dy])
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert g.shape == e.shape
        # A gradient that is summed back over a broadcast axis is a sum, too.
        is_sum = op.name in LAYOUT_ROUNDS or (i > 0 and g.shape != expected[0].shape)
        assert largest([g - e]) <= (bound if is_sum else 0), lay.__name__


@promise
def nan_where_dependent(op: Operation) -> None:
    """A NaN reaches exactly the outputs and gradients that depend on the value it replaces."""
    rng = np.random.default_rng(5)

    def changed(i: int, at: int, value: float) -> list[np.ndarray]:
        leaves = op.leaves()
        leaves[i].data.flat[at] = value
        return run(op, *leaves)

    with np.errstate(all="ignore"):
        before = run(op, *op.leaves())
        for i, a in enumerate(op.inputs):
            for at in rng.permutation(a.size)[:4]:
                old = float(a.flat[at])
                depends = [np.zeros(b.shape, bool) for b in before]
                for value in (old + 0.31, old - 0.27, -3 * old, 50.0, -50.0):
                    for d, b, o in zip(depends, before, changed(i, at, value), strict=True):
                        d |= o != b
                for d, now in zip(depends, changed(i, at, np.nan), strict=True):
                    equal(np.isnan(now), d)


# ---- nothing at all: zero-size arrays ------------------------------------------------------------


@pytest.mark.parametrize(("entry", "shapes"), EMPTY, ids=str)
def test_operation_on_nothing(entry, shapes):
    op = BY_ID[entry]
    rng = np.random.default_rng(7)
    leaves = [Tensor(np.asarray(rng.uniform(0.5, 2, shape)), True) for shape in shapes]
    y, *grads = run(op, *leaves)  # a warning would be an error
    if op.reference:
        expected = op.reference(*(x.data for x in leaves))
    else:
        expected = op.definition(*leaves).data
    assert y.shape == np.shape(expected)
    equal(y, expected)
    for x, g in zip(leaves, grads, strict=True):
        assert (g.shape, g.dtype) == (x.shape, x.dtype)
        assert np.isfinite(g).all()
        if not y.size:
            assert not g.any()


def test_operation_on_nothing_is_tried_for_every_operation():
    tried = {BY_ID[entry].name for entry, _ in EMPTY}
    assert tried == {op.name for op in TABLE} - NOT_EMPTY
    x = Tensor(np.ones((1, 3)), True)
    for y in (ag.where(np.zeros((0, 3), bool), x, 1.0), ag.broadcast_to(x, (0, 3))):
        assert y.shape == (0, 3)
        (dx,) = gradients(y, [x], np.ones((0, 3)))
        equal(dx, np.zeros((1, 3)))


# ---- the engine: order, and no second derivative -------------------------------------------------


def test_gradients_do_not_depend_on_the_order_in_which_branches_are_made():
    rng = np.random.default_rng(9)
    data = [rng.standard_normal((4, 5)) for _ in range(6)]
    shared_data = rng.standard_normal(3)

    def step(order: list[int]) -> list[bytes]:
        leaves = [Tensor(a, True) for a in data]
        shared = Tensor(shared_data, True)
        branches = {}
        two = {}  # two paths into one leaf: a + b = b + a
        for i in order:
            branches[i] = ag.tanh(leaves[i] * 1.5) @ leaves[i].T
            if i < 2:
                two[i] = ag.exp(shared * float(i + 1))
        total = functools.reduce(ag.add, [branches[i].sum() for i in range(6)])
        total = total + (two[0] * two[1]).sum()
        return [g.tobytes() for g in gradients(total, [*leaves, shared])]

    expected = step(list(range(6)))
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(6).tolist()
        assert step(order) == expected


def test_gradients_refuses_a_second_derivative():
    x = Tensor(np.array([1.0, 2.0]), True)
    (g,) = gradients((x * x * x).sum(), [x])
    assert type(g) is np.ndarray  # what has no history cannot be differentiated by mistake
    refused = r"not from gradients, which are arrays \(second derivatives are not supported\)"
    with pytest.raises(GraphError, match=refused):
        gradients(Tensor(g).sum(), [x])
    assert gradients(Tensor(g, True).sum(), [x]) == [None]
    with pytest.raises(GraphError, match="dy must be an array"):  # nor by way of dy
        gradients(x * x, [x], Tensor(np.ones(2), True))


# ---- finite answers to infinite questions --------------------------------------------------------


def test_softmax_gives_masked_entries_no_weight_and_no_gradient():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((4, 6))
    mask = rng.random((4, 6)) < 0.4
    mask[:, 0] = False
    x = Tensor(np.where(mask, -np.inf, scores), True)
    dy = rng.standard_normal((4, 6))
    softmax = BY_ID["softmax-axis=-1"]
    p, dx = run(softmax, x, dy=dy)
    assert not p[mask].any()
    assert not dx[mask].any()
    for i, seen in enumerate(~mask):
        y, dz = run(softmax, Tensor(scores[i, seen], True), dy=dy[i, seen])
        np.testing.assert_allclose(p[i, seen], y, rtol=4 * U64)
        np.testing.assert_allclose(dx[i, seen], dz, rtol=0, atol=8 * U64)


def test_log_softmax_gives_masked_entries_no_gradient():
    rng = np.random.default_rng(2)
    mask = rng.random((4, 6)) < 0.4
    mask[:, 0] = False
    x = Tensor(np.where(mask, -np.inf, rng.standard_normal((4, 6))), True)
    dy = np.where(mask, 0.0, rng.standard_normal((4, 6)))
    y, dx = run(BY_ID["log_softmax-axis=-1"], x, dy=dy)
    assert np.isneginf(y[mask]).all()
    assert not dx[mask].any()
    assert np.isfinite(dx).all()


def test_softmax_of_a_row_in_which_everything_is_masked_is_nan_as_in_torch():
    x = Tensor(np.full((1, 3), -np.inf))
    with np.errstate(invalid="ignore"):
        assert np.isnan(F.softmax(x).data).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e308])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_does_not_read_an_ignored_row(value, reduction):
    logits = np.random.default_rng(3).standard_normal((5, 4))
    targets = np.array([1, -100, 3, -100, 0])

    def loss_and_gradient() -> tuple[Any, Any]:
        x = Tensor(logits.copy(), True)
        loss = F.cross_entropy(x, targets, reduction=reduction)
        return loss.data, gradients(loss, [x])[0]

    expected_loss, expected_dx = loss_and_gradient()
    logits[1, 2] = value
    logits[3, :] = value
    loss, dx = loss_and_gradient()
    equal(loss, expected_loss)
    equal(dx, expected_dx)
    assert not dx[[1, 3]].any()


def test_cross_entropy_of_impossible_classes_and_of_an_infinite_logit():
    x = Tensor(np.array([[0.0, -np.inf, 1.0], [-np.inf, 2.0, -np.inf]]), True)
    loss = F.cross_entropy(x, np.array([2, 1]), reduction="sum")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-15)
    loss.backward()
    assert not x.grad[np.isneginf(x.data)].any()
    assert np.isfinite(x.grad).all()
    infinite = Tensor(np.array([[np.inf, 0.0]]))
    assert np.isnan(F.cross_entropy(infinite, np.array([0])).item())
    impossible = Tensor(np.array([[-np.inf, 0.0]]))
    with np.errstate(divide="ignore"):
        assert F.cross_entropy(impossible, np.array([0])).item() == np.inf


def test_where_hides_values_from_the_gradient():
    x = Tensor(np.array([1.0, np.nan, np.inf, -2.0]), True)
    y = ag.where(np.isfinite(x.data), x, 0.0)
    equal(y.data, [1, 0, 0, -2])
    (dx,) = gradients(y, [x], np.ones(4))
    equal(dx, [1, 0, 0, 1])


def test_sqrt_has_an_infinite_slope_at_zero():
    x = Tensor(np.array([0.0, 4.0]), True)
    with np.errstate(divide="ignore"):
        y, dx = run(BY_ID["sqrt-2-d"], x, dy=np.ones(2))
    equal(y, [0, 2])
    equal(dx, [np.inf, 0.25])


# ---- what a model must not notice ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_permutes_with_its_heads(dtype):
    rng = np.random.default_rng(1)

    def draw(H: int) -> np.ndarray:
        return rng.standard_normal((2, 5, H, 4)).astype(dtype)

    q, k, v, dy = draw(6), draw(2), draw(2), draw(6)
    groups = np.array([1, 0])
    # The three queries of each group stay together.
    queries = (3 * groups[:, None] + np.array([1, 2, 0])).reshape(-1)

    def results(q: Any, k: Any, v: Any, dy: Any) -> list[np.ndarray]:
        """The output, dq, dk and dv, each (B, T, heads, D)"""
        packed = Tensor(np.concatenate([q, k, v], axis=2).reshape(2, 5, -1), True)
        y, grad = run(BY_ID["attention-grouped"], packed, dy=dy.reshape(2, 5, -1))
        return [y.reshape(2, 5, 6, 4), *np.split(grad.reshape(2, 5, 10, 4), [6, 8], axis=2)]

    y, dq, dk, dv = results(q, k, v, dy)
    moved = results(q[:, :, queries], k[:, :, groups], v[:, :, groups], dy[:, :, queries])
    equal(moved[0], y[:, :, queries])
    equal(moved[1], dq[:, :, queries])
    # The gradient of a key adds the three queries of its group, in another order.
    bound = 4 * np.finfo(dtype).eps
    assert largest([moved[2] - dk[:, :, groups]]) <= bound * largest([dk])
    assert largest([moved[3] - dv[:, :, groups]]) <= bound * largest([dv])


def test_attention_gives_a_hidden_position_no_gradient():
    rng = np.random.default_rng(1)
    qkv = Tensor(rng.standard_normal((2, 5, 24)), True)
    for t in range(5):
        dy = np.zeros((2, 5, 8))
        dy[:, t] = rng.standard_normal((2, 8))
        _, dqkv = run(BY_ID["attention-plain"], qkv, dy=dy)
        dq, dk, dv = np.split(dqkv, 3, axis=-1)
        assert not dk[:, t + 1 :].any()
        assert not dv[:, t + 1 :].any()
        assert not dq[:, np.arange(5) != t].any()
        assert dv[:, : t + 1].all()


def small_model() -> CausalLM:
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return CausalLM(TransformerConfig(vocab_size=11, **options), seed=0)


def test_causal_lm_logits_do_not_see_the_future():
    model = small_model()
    ids = np.random.default_rng(0).integers(0, 11, (4, 7))
    before = model(ids).data
    for t in range(7):
        other = ids.copy()
        other[:, t] = (other[:, t] + 1) % 11
        after = model(other).data
        equal(after[:, :t], before[:, :t])  # every bit
        assert (after[:, t] != before[:, t]).any(axis=-1).all()


def test_causal_lm_logits_permute_with_the_batch():
    model = small_model()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 11, (4, 7))
    before = model(ids).data
    order = rng.permutation(4)
    after = model(ids[order]).data
    assert largest([after - before[order]]) <= 32 * 2.0**-24 * largest([before])


# ---- torch ---------------------------------------------------------------------------------------


def torch_operations(torch: Any) -> dict[str, Callable[..., Any]]:
    """The same operations in PyTorch, by the name of an operation or of one entry.

    They take the arguments and options of the table.
    """
    tf = torch.nn.functional
    result: dict[str, Callable[..., Any]] = {}

    def by_name(function: Callable[..., Any]) -> Callable[..., Any]:
        result[function.__name__] = function
        return function

    def number(name: str, function: Callable[..., Any]) -> None:
        """Numbers and arrays among the arguments become torch tensors."""
        result[name] = lambda *args, **options: function(
            *map(torch.as_tensor, (*args, *options.values()))
        )

    def reduction(name: str, function: Callable[..., Any]) -> None:
        def reduced(a: Any, axis: Any = None, keepdims: bool = False) -> Any:
            axes = tuple(range(a.ndim)) if axis is None else axis
            return a if axes == () else function(a, dim=axes, keepdim=keepdims)

        result[name] = reduced

    number("add", torch.add)
    number("sub", torch.sub)
    number("mul", torch.mul)
    number("div", torch.div)
    number("power", torch.pow)
    number("maximum", torch.maximum)
    number("minimum", torch.minimum)
    number("where", torch.where)
    result["neg"] = torch.neg
    result["exp"] = torch.exp
    result["log"] = torch.log
    result["tanh"] = torch.tanh
    result["sqrt"] = torch.sqrt
    result["abs"] = torch.abs
    result["matmul"] = torch.matmul
    result["clip"] = lambda a, low, high: torch.clamp(a, low, high)
    reduction("sum", torch.sum)
    reduction("mean", torch.mean)
    reduction("max", torch.amax)
    reduction("min", torch.amin)
    result["reshape-tuple"] = lambda a: a.reshape(3, 4)
    result["reshape-guess"] = lambda a: a.reshape(-1)
    result["reshape-of a transpose"] = lambda a: a.T.reshape(4, 3)
    result["transpose-reverse"] = lambda a: a.permute(2, 1, 0)
    result["transpose-axes"] = lambda a: a.permute(1, 2, 0)
    result["transpose-negative"] = lambda a: a.permute(0, 2, 1)
    result["broadcast_to"] = lambda a, shape: torch.broadcast_to(a, shape)
    result["concat"] = lambda *pieces, axis: torch.cat(pieces, axis)
    result["stack"] = lambda *pieces, axis=0: torch.stack(pieces, axis)
    result["linear"] = tf.linear
    result["silu"] = tf.silu
    result["swiglu"] = lambda x: tf.silu(x[0]) * x[1]
    result["gelu"] = tf.gelu
    result["relu"] = torch.relu
    result["mse_loss"] = tf.mse_loss
    result["softmax"] = torch.softmax
    result["log_softmax"] = torch.log_softmax
    result["rms_norm"] = lambda x, w, eps=1e-6: tf.rms_norm(x, w.shape, w, eps)
    result["layer_norm"] = lambda x, w, b, eps=1e-5: tf.layer_norm(x, w.shape, w, b, eps)

    @by_name
    def index(a: Any, key: Any) -> Any:
        positions = np.arange(a.numel()).reshape(a.shape)[key]
        return a.reshape(-1)[torch.tensor(np.array(positions))]

    @by_name
    def lora_linear(x: Any, y: Any, A: Any, B: Any, scaling: float) -> Any:
        return y + scaling * (x @ A.T) @ B.T

    @by_name
    def effective_linear(
        x: Any, *parameters: Any, sizes: tuple[int, ...] = (5,), stacked: bool = False
    ) -> Any:
        outputs = []
        for at, pair, bias, s in by_layer(parameters, sizes):
            weight = torch.tensor(FROZEN_WEIGHT[at])
            if pair:
                A, B = pair
                weight = weight + s * B @ A
            outputs.append(tf.linear(x, weight, bias))
        return torch.stack(outputs) if stacked else torch.cat(outputs, -1)

    @by_name
    def embedding(ids: np.ndarray, weight: Any) -> Any:
        return tf.embedding(torch.tensor(ids), weight)

    @by_name
    def dropout(x: Any, **options: Any) -> Any:
        ones = Tensor(np.ones(x.shape))
        return x * torch.tensor(dropout_definition(ones, **options).data)

    @by_name
    def cross_entropy(z: Any, targets: np.ndarray, ignore_index: int, reduction: str) -> Any:
        t = torch.tensor(targets).flatten()
        flat = z.reshape(-1, z.shape[-1])
        total = tf.cross_entropy(flat, t, ignore_index=ignore_index, reduction="sum")
        if reduction == "sum":
            return total
        return total / max(1, int((t != ignore_index).sum()))

    @by_name
    def linear_cross_entropy(x: Any, head: Any, cut: Any, **options: Any) -> Any:
        return cross_entropy(x @ head.T, **options)

    def rope(x: Any, places: Any) -> Any:
        """As transformers writes it, x cos + rotate_half(x) sin, at positions (T,) or (B, T)."""
        a = places[..., None] * torch.tensor(np.tile(angles(2, x.shape[3])[1], 2))
        cos = torch.cos(a)[..., None, :]
        sin = torch.sin(a)[..., None, :]
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    @by_name
    def attention(
        qkv: Any,
        heads: int,
        kv_heads: int,
        rotate: bool = True,
        window: Any = None,
        first_key: Any = None,
        **_: Any,
    ) -> Any:
        order = torch.arange(qkv.shape[1])
        first = torch.tensor(first_key or [[0] * len(order)])  # (B or 1, T)
        z = qkv.reshape(*qkv.shape[:2], -1, 4)
        q, k, v = z.split((heads, kv_heads, kv_heads), dim=2)
        if rotate:
            q = rope(q, order - first)
            k = rope(k, order - first)
        age = order[:, None] - order
        seen = (age >= 0) & (age < (window or len(order)))
        seen = seen & (order >= first[:, None, :, None])  # (B or 1, 1, T, T)
        by_head = [z.transpose(1, 2) for z in (q, k, v)]
        y = tf.scaled_dot_product_attention(*by_head, seen, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    return result


@pytest.mark.oracle
@EVERY
def test_operation_is_torch_s(op):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
    functions = torch_operations(torch)
    function = functions.get(op.id) or functions[op.name]
    leaves = op.leaves()
    tensors = [torch.tensor(a, requires_grad=True) for a in op.inputs]
    y = op.function(*leaves)
    z = function(*op.function.args, *tensors, **op.function.keywords)
    dy = some_dy(y)
    z.backward(torch.tensor(dy))
    expected = z.detach().numpy()
    assert y.shape == expected.shape
    assert largest([y.data - expected]) <= 1e-12 * largest([y.data])
    theirs = [np.zeros(t.shape) if t.grad is None else t.grad.numpy() for t in tensors]
    bound = 1e-11 * largest(theirs)
    for got, wanted in zip(gradients_or_zeros(y, leaves, dy), theirs, strict=True):
        assert got.shape == wanted.shape
        assert largest([got - wanted]) <= bound
