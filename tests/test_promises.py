"""What holds for every operation: each promise is a function of an entry of the table, each exemption has a reason."""

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
    dropout_definition,
)
from test_autograd import some_dy

from minilora import CausalLM, TransformerConfig
from minilora import autograd as ag
from minilora import functional as F
from minilora.autograd import Tensor, gradients, no_grad
from minilora.errors import GraphError

U64 = 2.0**-53
BY_ID = {op.id: op for op in TABLE}
PROMISES: dict[str, Callable[[Operation], None]] = {}


def promise(function: Callable[[Operation], None]) -> Callable[[Operation], None]:
    PROMISES[function.__name__] = function
    return function


def run(op: Operation, *leaves: Tensor, dy: Any = None) -> list[np.ndarray]:
    """The output, then the gradient of every leaf; zeros where there is none."""
    y = op.function(*leaves)
    found = gradients(y, leaves, some_dy(y) if dy is None else dy)
    return [
        y.data,
        *(np.zeros_like(x.data) if g is None else g for x, g in zip(leaves, found, strict=True)),
    ]


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.id)
@pytest.mark.parametrize(
    "name", ["complex_step", "layouts", "accumulates", "nan_where_dependent", "repeats", "linear"]
)
def test_promise(name: str, op: Operation) -> None:
    if not {(name, op.name), (name, op.id)} & set(EXEMPT):
        PROMISES[name](op)


def test_every_exemption_is_needed_and_there_are_eleven(capsys: pytest.CaptureFixture[str]) -> None:
    for (name, operation), reason in EXEMPT.items():
        broken = 0
        for op in TABLE:
            if operation in (op.name, op.id):
                try:
                    PROMISES[name](op)
                except (AssertionError, TypeError):
                    broken += 1
        assert broken, f"{operation} keeps the promise {name}: take its exemption out ({reason})"
    counts = Counter(name for name, _ in EXEMPT)
    with capsys.disabled():
        print(f" [{len(EXEMPT)} exemptions: {dict(counts)}] ", end="")
    assert counts == {"complex_step": 4, "nan_where_dependent": 7}  # may fall, never rise


def test_every_promise_is_checked() -> None:
    checked = test_promise.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert set(checked) == set(PROMISES)


# ---- the promises ---------------------------------------------------------------------------------------------------


@promise
def complex_step(op: Operation) -> None:
    """f(x + i h v) = f(x) + i h f'(x) v + O(h^2): with h = 1e-30 it is exact to rounding: nothing cancels."""
    leaves = op.leaves()
    y, *grads = run(op, *leaves)
    dy, rng = some_dy(leaves and op.function(*leaves)), np.random.default_rng(4)
    for _ in range(3):
        direction = [np.asarray(rng.standard_normal(a.shape)) for a in op.inputs]
        with no_grad():
            z = op.function(
                *(Tensor(a + 1e-30j * v) for a, v in zip(op.inputs, direction, strict=True))
            ).data
        terms = [g * v for g, v in zip(grads, direction, strict=True)]
        error = abs((dy * (z.imag / 1e-30)).sum() - sum(t.sum() for t in terms))
        assert error <= 2e-14 * sum(np.abs(t).sum() for t in terms)
        assert np.abs(z.real - y).max(initial=0) <= 32 * U64 * np.abs(y).max(initial=0)


@promise
def accumulates(op: Operation) -> None:
    """Two backwards leave the sum, bit for bit; clearing `.grad` starts again."""
    leaves = op.leaves()
    y = op.function(*leaves)
    dy, other = some_dy(y), some_dy(y)[..., ::-1] if y.ndim else np.asarray(2.5)
    first, second = (
        gradients(y, leaves, dy, retain_graph=True),
        gradients(y, leaves, other, retain_graph=True),
    )
    y.backward(dy, retain_graph=True)
    y.backward(other, retain_graph=True)
    for x, g, h in zip(leaves, first, second, strict=True):
        np.testing.assert_array_equal(x.grad, g + h)
        x.grad = None
    y.backward(dy)
    for x, g in zip(leaves, first, strict=True):
        np.testing.assert_array_equal(x.grad, g)


@promise
def repeats(op: Operation) -> None:
    """The same inputs, the same bits."""
    for dtype in (np.float64, np.float32):
        one, two = (run(op, *op.leaves(dtype)) for _ in range(2))
        assert [a.tobytes() for a in one] == [a.tobytes() for a in two]


@promise
def linear(op: Operation) -> None:
    """Every vjp is linear: exactly for a factor of two and for zero, to rounding for a sum."""
    leaves, rng = op.leaves(), np.random.default_rng(6)
    y = op.function(*leaves)
    a, b = (np.asarray(rng.standard_normal(y.shape)) for _ in range(2))

    def back(dy: np.ndarray) -> list[np.ndarray]:
        return gradients(y, leaves, dy, retain_graph=True)  # type: ignore[return-value]

    first, second = back(a), back(b)
    largest = max(np.abs(g).max(initial=0) for g in (*first, *second))
    for g, h, double, both, zero in zip(
        first, second, back(2 * a), back(2 * a - 3 * b), back(0 * a), strict=True
    ):
        np.testing.assert_array_equal(double, 2 * g)
        assert not zero.any()
        assert np.abs(both - (2 * g - 3 * h)).max(initial=0) <= 32 * U64 * largest


def _misaligned(a: np.ndarray) -> np.ndarray:
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    out = buffer[1:].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def _gapped(a: np.ndarray) -> np.ndarray:
    wide = np.full([2 * n for n in a.shape], np.nan)
    every_second = tuple(slice(None, None, 2) for _ in a.shape)
    wide[every_second] = a
    return wide[every_second] if a.ndim else a


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F": lambda a: a.copy("F"),
    "transposed": lambda a: (
        np.ascontiguousarray(a.swapaxes(0, -1)).swapaxes(0, -1) if a.ndim else a
    ),
    "negative": lambda a: np.flip(np.flip(a).copy()),
    "gaps of NaN": _gapped,
    "misaligned": _misaligned,
}


@promise
def layouts(op: Operation) -> None:
    """How the inputs and dy lie in memory changes nothing, or in a sum the last bits."""
    dy = some_dy(op.function(*op.leaves()))
    cases = [
        (name, op.inputs, [lay(a) for a in op.inputs], lay(dy)) for name, lay in LAYOUTS.items()
    ]
    rows = [
        np.broadcast_to(a[:1], a.shape) if a.ndim and len(a) else a for a in op.inputs
    ]  # one row, stride 0
    cases.append(
        ("broadcast", [r.copy() for r in rows], rows, np.broadcast_to(dy, (2, *dy.shape))[1])
    )
    for name, plain, laid, dz in cases:
        expected = run(op, *(Tensor(a.copy(), True) for a in plain), dy=dy)
        got = run(op, *(Tensor(a, True) for a in laid), dy=dz)
        largest = max(np.abs(a).max(initial=0) for a in (*expected, *plain, dy))
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert g.shape == e.shape
            # A gradient that is summed back over a broadcast axis is a sum, too.
            summed = op.name in LAYOUT_ROUNDS or (i > 0 and g.shape != expected[0].shape)
            assert np.abs(g - e).max(initial=0) <= (32 * U64 * largest if summed else 0), name


@promise
def nan_where_dependent(op: Operation) -> None:
    """A NaN reaches the outputs and gradients that depend on the value it replaces: all of these, and no other."""
    rng = np.random.default_rng(5)
    with np.errstate(all="ignore"):
        before = run(op, *op.leaves())
        for i, a in enumerate(op.inputs):
            for at in rng.permutation(a.size)[:4]:

                def changed(value: float, i: int = i, at: int = at) -> list[np.ndarray]:
                    leaves = op.leaves()
                    leaves[i].data.flat[at] = value
                    return run(op, *leaves)

                old = float(a.flat[at])
                others = [changed(v) for v in (old + 0.31, old - 0.27, -3 * old, 50.0, -50.0)]
                for b, now, *others_ in zip(before, changed(np.nan), *others, strict=True):
                    depends = np.any([(o != b) for o in others_], axis=0)
                    np.testing.assert_array_equal(np.isnan(now), depends)


# ---- nothing at all: zero-size arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "shapes"), EMPTY, ids=str)
def test_an_operation_on_nothing(entry: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    op, rng = BY_ID[entry], np.random.default_rng(7)
    leaves = [Tensor(np.asarray(rng.uniform(0.5, 2, shape)), True) for shape in shapes]
    y, *grads = run(op, *leaves)  # a warning would be an error
    expected = (
        op.reference(*(x.data for x in leaves)) if op.reference else op.definition(*leaves).data
    )
    assert y.shape == np.shape(expected)
    np.testing.assert_array_equal(y, expected)
    for x, g in zip(leaves, grads, strict=True):
        assert (g.shape, g.dtype) == (x.shape, x.dtype)
        assert np.isfinite(g).all()
        if not y.size:
            assert not g.any()


def test_every_operation_is_tried_on_nothing() -> None:
    assert {BY_ID[entry].name for entry, _ in EMPTY} == {op.name for op in TABLE} - NOT_EMPTY
    x = Tensor(np.ones((1, 3)), True)
    for y in (ag.where(np.zeros((0, 3), bool), x, 1.0), ag.broadcast_to(x, (0, 3))):
        assert y.shape == (0, 3)
        np.testing.assert_array_equal(gradients(y, [x], np.ones((0, 3)))[0], np.zeros((1, 3)))


# ---- the engine: order, and no second derivative --------------------------------------------------------------------


def test_the_order_in_which_branches_are_made_changes_no_bit() -> None:
    rng = np.random.default_rng(9)
    data = [rng.standard_normal((4, 5)) for _ in range(6)]

    def step(order: list[int]) -> list[np.ndarray]:
        leaves = [Tensor(a, True) for a in data]
        shared = Tensor(rng_shared, True)
        branches: dict[int, Tensor] = {}
        for i in order:
            branches[i] = ag.tanh(leaves[i] * 1.5) @ leaves[i].T
        two = {
            i: ag.exp(shared * float(i + 1)) for i in order if i < 2
        }  # two paths into one leaf: a + b = b + a
        total = (
            functools.reduce(ag.add, (branches[i].sum() for i in range(6)))
            + (two[0] * two[1]).sum()
        )
        return gradients(total, [*leaves, shared])  # type: ignore[return-value]

    rng_shared = rng.standard_normal(3)
    expected = step(list(range(6)))
    for seed in range(6):
        got = step(np.random.default_rng(seed).permutation(6).tolist())
        assert [g.tobytes() for g in got] == [e.tobytes() for e in expected]


def test_a_second_derivative_is_refused_and_never_zero() -> None:
    x = Tensor(np.array([1.0, 2.0]), True)
    (g,) = gradients((x * x * x).sum(), [x])
    assert type(g) is np.ndarray  # what has no history cannot be differentiated by mistake
    with pytest.raises(
        GraphError,
        match=r"from gradients, which are arrays \(second derivatives are not supported\)",
    ):
        gradients(Tensor(g).sum(), [x])
    assert gradients(Tensor(g, True).sum(), [x]) == [None]
    y = x * x
    with pytest.raises(GraphError, match="dy must be an array"):  # nor by way of dy
        gradients(y, [x], Tensor(np.ones(2), True))


# ---- finite answers to infinite questions ---------------------------------------------------------------------------


def test_masked_entries_of_a_softmax_have_no_weight_and_no_gradient() -> None:
    rng = np.random.default_rng(2)
    scores, mask = rng.standard_normal((4, 6)), rng.random((4, 6)) < 0.4
    mask[:, 0] = False
    x, kept = Tensor(np.where(mask, -np.inf, scores), True), rng.standard_normal((4, 6))
    p, dx = run(BY_ID["softmax-axis=-1"], x, dy=kept)
    assert not p[mask].any()
    assert not dx[mask].any()
    for row, m, y, d, dy in zip(scores, mask, p, dx, kept, strict=True):
        alone = Tensor(row[~m], True)
        z, dz = run(BY_ID["softmax-axis=-1"], alone, dy=dy[~m])
        np.testing.assert_allclose(y[~m], z, rtol=4 * U64)
        np.testing.assert_allclose(d[~m], dz, rtol=0, atol=8 * U64)
    y, dx = run(BY_ID["log_softmax-axis=-1"], x, dy=np.where(mask, 0.0, kept))
    assert np.isneginf(y[mask]).all()
    assert not dx[mask].any()
    assert np.isfinite(dx).all()
    with np.errstate(invalid="ignore"):  # a row in which everything is masked: NaN, as in torch
        assert np.isnan(F.softmax(Tensor(np.full((1, 3), -np.inf))).data).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e308])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_whatever_an_ignored_row_holds_does_not_count(value: float, reduction: str) -> None:
    rng = np.random.default_rng(3)
    logits, targets = rng.standard_normal((5, 4)), np.array([1, -100, 3, -100, 0])
    expected = run(BY_ID["exp-2-d"], Tensor(np.zeros(1), True))  # a list to be filled
    for bad in (None, value):
        if bad is not None:
            logits[1, 2], logits[3, :] = bad, bad
        x = Tensor(logits.copy(), True)
        loss = F.cross_entropy(x, targets, reduction=reduction)
        got = [loss.data, gradients(loss, [x])[0]]
        if bad is None:
            expected = got
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(g, e)
    assert not got[1][[1, 3]].any()


def test_impossible_classes_cost_nothing_and_an_infinite_logit_is_not_hidden() -> None:
    x = Tensor(np.array([[0.0, -np.inf, 1.0], [-np.inf, 2.0, -np.inf]]), True)
    loss = F.cross_entropy(x, np.array([2, 1]), reduction="sum")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-15)
    loss.backward()
    assert not x.grad[np.isneginf(x.data)].any()
    assert np.isfinite(x.grad).all()
    assert np.isnan(F.cross_entropy(Tensor(np.array([[np.inf, 0.0]])), np.array([0])).item())
    with np.errstate(divide="ignore"):
        assert F.cross_entropy(Tensor(np.array([[-np.inf, 0.0]])), np.array([0])).item() == np.inf


def test_what_where_hides_is_not_in_the_gradient() -> None:
    x = Tensor(np.array([1.0, np.nan, np.inf, -2.0]), True)
    y = ag.where(np.isfinite(x.data), x, 0.0)
    np.testing.assert_array_equal(y.data, [1, 0, 0, -2])
    np.testing.assert_array_equal(gradients(y, [x], np.ones(4))[0], [1, 0, 0, 1])


def test_the_slope_of_a_root_at_zero_is_infinite() -> None:
    x = Tensor(np.array([0.0, 4.0]), True)
    with np.errstate(divide="ignore"):
        y, dx = run(BY_ID["sqrt-2-d"], x, dy=np.ones(2))
    np.testing.assert_array_equal(y, [0, 2])
    np.testing.assert_array_equal(dx, [np.inf, 0.25])


# ---- what a model must not notice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_heads_can_be_permuted(dtype: type) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 5, H, 4)).astype(dtype) for H in (6, 2, 2))
    dy = rng.standard_normal(q.shape).astype(dtype)
    groups = np.array([1, 0])
    queries = (3 * groups[:, None] + np.array([1, 2, 0])).reshape(
        -1
    )  # the three of each group stay together
    op = BY_ID["attention-grouped"]

    def apart(q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        """The output, dq, dk, dv, each (B, T, heads, D)"""
        packed = Tensor(np.concatenate([q, k, v], axis=2).reshape(2, 5, -1), True)
        y, grad = (z.reshape(2, 5, -1, 4) for z in run(op, packed, dy=dy.reshape(2, 5, -1)))
        return [y, *np.split(grad, [6, 8], axis=2)]

    plain = apart(q, k, v, dy)
    moved = apart(q[:, :, queries], k[:, :, groups], v[:, :, groups], dy[:, :, queries])
    u = np.finfo(dtype).eps
    for i, (got, expected) in enumerate(zip(moved, plain, strict=True)):
        expected = expected[:, :, queries if i < 2 else groups]
        # Every head is a product of its own; a key's gradient adds its group's three queries, in another order.
        bound = 0 if i < 2 else 4 * u * np.abs(expected).max()
        assert np.abs(got - expected).max() <= bound


def test_a_hidden_position_gets_no_gradient() -> None:
    rng = np.random.default_rng(1)
    qkv = Tensor(rng.standard_normal((2, 5, 24)), True)
    for t in range(5):
        dy = np.zeros((2, 5, 8))
        dy[:, t] = rng.standard_normal((2, 8))
        dq, dk, dv = np.split(run(BY_ID["attention-plain"], qkv, dy=dy)[1], 3, axis=-1)
        assert not dk[:, t + 1 :].any()
        assert not dv[:, t + 1 :].any()
        assert not dq[:, np.arange(5) != t].any()
        assert dv[:, : t + 1].all()


def test_a_model_s_logits_do_not_see_the_future_and_the_batch_can_be_permuted() -> None:
    config = TransformerConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2
    )
    model, rng = CausalLM(config, seed=0), np.random.default_rng(0)
    ids = rng.integers(0, 11, (4, 7))
    before = model(ids).data
    for t in range(7):
        other = ids.copy()
        other[:, t] = (other[:, t] + 1) % 11
        after = model(other).data
        np.testing.assert_array_equal(after[:, :t], before[:, :t])  # every bit
        assert (after[:, t] != before[:, t]).any(axis=-1).all()
    order = rng.permutation(4)
    largest = np.abs(before).max()
    assert np.abs(model(ids[order]).data - before[order]).max() <= 32 * 2.0**-24 * largest


# ---- torch ----------------------------------------------------------------------------------------------------------


def torch_operations(torch: Any) -> dict[str, Callable[..., Any]]:
    """The same operations in PyTorch, by the name of an operation or of one entry; options as in the table."""
    tf = torch.nn.functional

    def number(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: f(*map(torch.as_tensor, (*args, *options.values())))

    def reduction(f: Callable[..., Any]) -> Callable[..., Any]:
        def reduced(a: Any, axis: Any = None, keepdims: bool = False) -> Any:
            axes = tuple(range(a.ndim)) if axis is None else axis
            return a if axes == () else f(a, dim=axes, keepdim=keepdims)

        return reduced

    def gather(a: Any, key: Any) -> Any:
        return a.reshape(-1)[torch.tensor(np.array(np.arange(a.numel()).reshape(a.shape)[key]))]

    def effective(x: Any, *rest: Any, sizes: tuple[int, ...] = (5,), stacked: bool = False) -> Any:
        pairs, biases, outputs = (
            [p for p in rest if p.ndim == 2],
            [p for p in rest if p.ndim == 1],
            [],
        )
        for i, weight in enumerate(torch.tensor(FROZEN_WEIGHT[: sum(sizes)]).split(sizes)):
            A, B = pairs[2 * i : 2 * i + 2] or (torch.zeros(1, 4), torch.zeros(sizes[i], 1))
            outputs.append(tf.linear(x, weight + (0.7 + i) * B @ A, biases[i] if biases else None))
        return torch.stack(outputs) if stacked else torch.cat(outputs, -1)

    def cross_entropy(z: Any, targets: np.ndarray, ignore_index: int, reduction: str) -> Any:
        t = torch.tensor(targets).flatten()
        total = tf.cross_entropy(
            z.reshape(-1, z.shape[-1]), t, ignore_index=ignore_index, reduction="sum"
        )
        return total / max(1, int((t != ignore_index).sum())) if reduction == "mean" else total

    def rope(x: Any) -> Any:
        """As transformers writes it: x cos + rotate_half(x) sin."""
        cos, sin = (
            torch.tensor(np.tile(f(angles(x.shape[1], x.shape[3])), 2))[:, None]
            for f in (np.cos, np.sin)
        )
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def attention(
        qkv: Any,
        heads: int,
        kv_heads: int,
        rotate: bool = True,
        window: int | None = None,
        **_: Any,
    ) -> Any:
        q, k, v = qkv.reshape(*qkv.shape[:2], -1, 4).split((heads, kv_heads, kv_heads), dim=2)
        q, k, v = (z.transpose(1, 2) for z in ((rope(q), rope(k), v) if rotate else (q, k, v)))
        order = torch.arange(qkv.shape[1])
        age = order[:, None] - order
        seen = (age >= 0) & (age < (window or len(order)))
        return (
            tf.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )

    return {
        **{
            name: number(getattr(torch, name))
            for name in ("add", "sub", "mul", "div", "maximum", "minimum")
        },
        "power": number(torch.pow),
        "where": lambda c, *ab: torch.where(torch.tensor(c), *ab),
        **{name: getattr(torch, name) for name in ("exp", "log", "tanh", "sqrt", "abs", "matmul")},
        "clip": lambda a, low, high: torch.clamp(a, low, high),
        "sum": reduction(torch.sum),
        "mean": reduction(torch.mean),
        "max": reduction(torch.amax),
        "min": reduction(torch.amin),
        "reshape-tuple": lambda a: a.reshape(3, 4),
        "reshape-guess": lambda a: a.reshape(-1),
        "reshape-of a transpose": lambda a: a.T.reshape(4, 3),
        "transpose-reverse": lambda a: a.permute(2, 1, 0),
        "transpose-axes": lambda a: a.permute(1, 2, 0),
        "transpose-negative": lambda a: a.permute(0, 2, 1),
        "broadcast_to": lambda a, shape: torch.broadcast_to(a, shape),
        "index": gather,
        "concat": lambda *pieces, axis: torch.cat(pieces, axis),
        "stack": lambda *pieces, axis=0: torch.stack(pieces, axis),
        "linear": tf.linear,
        "lora_linear": lambda x, y, A, B, scaling: y + scaling * (x @ A.T) @ B.T,
        "effective_linear": effective,
        "embedding": lambda ids, w: tf.embedding(torch.tensor(ids), w),
        "dropout": lambda x, p, key, first: (
            x * torch.tensor(dropout_definition(Tensor(np.ones(x.shape)), p).data)
        ),
        "silu": tf.silu,
        "swiglu": lambda x: tf.silu(x[0]) * x[1],
        "gelu": tf.gelu,
        "softmax": lambda x, axis: torch.softmax(x, axis),
        "log_softmax": lambda x, axis: torch.log_softmax(x, axis),
        "cross_entropy": cross_entropy,
        "linear_cross_entropy": lambda x, head, cut, **ce: cross_entropy(x @ head.T, **ce),
        "rms_norm": lambda x, w, eps=1e-6: tf.rms_norm(x, w.shape, w, eps),
        "layer_norm": lambda x, w, b, eps=1e-5: tf.layer_norm(x, w.shape, w, b, eps),
        "attention": attention,
    }


@pytest.mark.oracle
@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.id)
def test_an_operation_is_torch_s(op: Operation) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
    functions = torch_operations(torch)
    function = functions.get(op.id) or functions[op.name]
    partial = isinstance(op.function, functools.partial)
    args, options = (op.function.args, op.function.keywords) if partial else ((), {})
    leaves, tensors = op.leaves(), [torch.tensor(a, requires_grad=True) for a in op.inputs]
    y, z = op.function(*leaves), function(*args, *tensors, **options)
    dy = some_dy(y)
    z.backward(torch.tensor(dy))
    theirs = [np.zeros(t.shape) if t.grad is None else t.grad.numpy() for t in tensors]
    ours = [
        np.zeros(x.shape) if g is None else g
        for x, g in zip(leaves, gradients(y, leaves, dy), strict=True)
    ]
    largest = max(np.abs(g).max(initial=0) for g in theirs)
    for got, expected, bound in [(y.data, z.detach().numpy(), 1e-12 * np.abs(y.data).max(initial=0)),
                                 *((g, t, 1e-11 * largest) for g, t in zip(ours, theirs, strict=True))]:  # fmt: skip
        assert got.shape == expected.shape
        assert np.abs(got - expected).max(initial=0) <= bound
