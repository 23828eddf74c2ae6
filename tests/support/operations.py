"""The table of all public operations: what they are called with, how exact they must be, and what they must equal.

Not a test itself. test_gradcheck differentiates each entry, test_functional holds each neural operation beside its
definition in elementary operations, test_autograd looks at what each leaves behind, test_promises at what holds for
any of them, test_anomaly breaks each. A missing operation is a failure, an exemption has a reason.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora import autograd as ag
from minilora import effective
from minilora import functional as F
from minilora.autograd import Tensor
from minilora.backend import NUMPY, mix_key
from minilora.effective import EffectiveWeight, Pull, effective_linear

ELEMENTARY, COMPOSITE = 1e-10, 1e-9

NOT_OPERATIONS = {
    "costs": "counts operations",
    "record": "makes the output of every operation; no operation itself",
    "grad_enabled": "returns a flag",
    "no_grad": "a context manager",
    "gradients": "the backward pass",
    "operands": "turns arguments into Tensors",
    "namespace": "returns an array module",
    "unbroadcast": "works on arrays, inside vjps",
    "rows": "works on arrays, inside operations",
    "check_ids": "checks ids on the host",
    "prepare_targets": "prepares targets",
    "row_dot": "works on arrays, inside operations",
    "apply_rotary": "works on arrays, inside attention",
}


@dataclass(frozen=True)
class Operation:
    name: str
    variant: str
    function: Callable[..., Tensor]  # takes one Tensor for each input
    inputs: tuple[np.ndarray, ...]  # float64
    reads: tuple[int, ...]  # the inputs whose values its backward needs
    tolerance: float = ELEMENTARY
    reference: Callable[..., Any] | None = None  # elementary: the same on NumPy arrays
    definition: Callable[..., Tensor] | None = None  # neural: the same in elementary operations

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}"

    def leaves(self, dtype: Any = np.float64, requires_grad: bool = True) -> list[Tensor]:
        return [Tensor(a.astype(dtype), requires_grad) for a in self.inputs]


TABLE: list[Operation] = []
_rng = np.random.default_rng(2106)


def normal(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(_rng.standard_normal(shape) for shape in shapes)


def positive(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(_rng.uniform(0.5, 2.0, shape) for shape in shapes)


def apart(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Values at least 0.1 from each other, and from 0: no kink within reach of a finite difference."""
    sizes = [math.prod(shape) for shape in shapes]
    values = _rng.permutation(np.arange(sum(sizes)) - sum(sizes) // 2 + 0.5) * 0.2
    return tuple(
        v.reshape(s) for v, s in zip(np.split(values, np.cumsum(sizes)[:-1]), shapes, strict=True)
    )


def public_operations() -> dict[str, Callable[..., Any]]:
    """Every public function that autograd.py, functional.py and effective.py define."""
    return {
        name: function
        for room in (ag, F, effective)
        for name, function in vars(room).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == room.__name__
    }


# ---- elementary: arithmetic and functions ---------------------------------------------------------------------------


def elementary(
    name: str,
    variant: str,
    inputs: Any,
    reads: tuple[int, ...],
    reference: Any,
    function: Any = None,
) -> None:
    TABLE.append(
        Operation(
            name, variant, function or getattr(ag, name), inputs, reads, ELEMENTARY, reference
        )
    )


SHAPES = {
    "same": ((3, 4), (3, 4)),
    "row": ((3, 4), (4,)),
    "column": ((3, 1), (3, 4)),
    "outer": ((3, 1, 2), (4, 1)),
    "scalar": ((), (2, 3)),
    "0-d": ((), ()),
}
for variant, shapes in SHAPES.items():
    elementary("add", variant, normal(*shapes), (), np.add)
    elementary("sub", variant, normal(*shapes), (), np.subtract)
    elementary("mul", variant, normal(*shapes), (0, 1), np.multiply)
    elementary("div", variant, (*normal(shapes[0]), *positive(shapes[1])), (1,), np.divide)
    elementary("power", variant, (*positive(shapes[0]), *normal(shapes[1])), (0, 1), np.power)
    elementary("maximum", variant, apart(*shapes), (), np.maximum)
    elementary("minimum", variant, apart(*shapes), (), np.minimum)
    choice = _rng.random(np.broadcast_shapes(*shapes)) < 0.5
    elementary(
        "where",
        variant,
        normal(*shapes),
        (),
        *(functools.partial(room.where, choice) for room in (np, ag)),
    )
wide = np.array([[True] * 3, [False] * 3])
elementary(
    "where",
    "wide condition",
    normal((3,), ()),
    (),
    *(functools.partial(r.where, wide) for r in (np, ag)),
)
elementary("add", "number", normal((2, 3)), (), lambda a: 2.5 + a, functools.partial(ag.add, 2.5))
elementary("sub", "number", normal((2, 3)), (), lambda a: 2.5 - a, functools.partial(ag.sub, 2.5))
elementary("mul", "number", normal((2, 3)), (), lambda a: a * 2.5, functools.partial(ag.mul, b=2.5))
elementary(
    "div", "number", positive((2, 3)), (0,), lambda a: 2.5 / a, functools.partial(ag.div, 2.5)
)
elementary(
    "power", "square", normal((2, 3)), (0,), lambda a: a**2, functools.partial(ag.power, b=2)
)
elementary(
    "power", "number", normal((2, 3)), (), lambda a: 2.0**a, functools.partial(ag.power, 2.0)
)
for shape in ((3, 4), ()):
    variant = "0-d" if shape == () else "2-d"
    elementary("exp", variant, normal(shape), (), np.exp)
    elementary("log", variant, positive(shape), (0,), np.log)
    elementary("tanh", variant, normal(shape), (), np.tanh)
    elementary("sqrt", variant, positive(shape), (), np.sqrt)
    elementary("abs", variant, apart(shape), (0,), np.abs)
    elementary("clip", variant, apart(shape), (), lambda a: np.clip(a, -0.6, 0.6),
               functools.partial(ag.clip, low=-0.6, high=0.6))  # fmt: skip

# ---- elementary: reductions and shapes ------------------------------------------------------------------------------

for axis in (None, 0, -1, (0, 2), (-1, 1), ()):
    for keepdims in (False, True):
        options: dict[str, Any] = {"axis": axis, "keepdims": keepdims}
        variant = f"axis={axis},keepdims={keepdims}"
        for name, inputs, reads in (
            ("sum", normal((2, 3, 4)), ()),
            ("mean", normal((2, 3, 4)), ()),
            ("max", apart((2, 3, 4)), (0,)),
            ("min", apart((2, 3, 4)), ()),
        ):
            function, reference = (
                functools.partial(getattr(room, name), **options) for room in (ag, np)
            )
            elementary(name, variant, inputs, reads, reference, function)
for name in ("sum", "mean", "max", "min"):
    elementary(name, "0-d", normal(()), (0,) if name == "max" else (), getattr(np, name))

elementary(
    "reshape",
    "tuple",
    normal((2, 6)),
    (),
    lambda a: a.reshape(3, 4),
    lambda a: ag.reshape(a, (3, 4)),
)
elementary(
    "reshape", "guess", normal((2, 6)), (), lambda a: a.reshape(-1), lambda a: ag.reshape(a, -1)
)
elementary("reshape", "of a transpose", normal((2, 6)), (), lambda a: a.T.reshape(4, 3),
           lambda a: ag.reshape(a.T, 4, 3))  # fmt: skip
elementary("transpose", "reverse", normal((2, 3, 4)), (), np.transpose)
elementary("transpose", "axes", normal((2, 3, 4)), (), lambda a: a.transpose(1, 2, 0),
           lambda a: ag.transpose(a, 1, 2, 0))  # fmt: skip
elementary("transpose", "negative", normal((2, 3, 4)), (), lambda a: a.transpose(0, -1, 1),
           lambda a: ag.transpose(a, (0, -1, 1)))  # fmt: skip
for variant, before, after in (("new axis", (3, 1), (2, 3, 4)), ("0-d", (), (2, 2))):
    elementary("broadcast_to", variant, normal(before), (),
               *(functools.partial(room.broadcast_to, shape=after) for room in (np, ag)))  # fmt: skip
KEYS: dict[str, Any] = {
    "integer": 1,
    "slices": (slice(None, None, -1), slice(1, 4, 2)),
    "ellipsis": (..., 0),
    "None": (slice(None), None, 2),
    "0-d": (1, 2),
    "array": np.array([2, 0, 2, -1, 2]),
    "arrays": (np.array([[0], [2]]), np.array([1, 1, 3])),
    "array and slice": (slice(1, None), np.array([3, 3, 0])),
    "list": [0, 0, 1],
    "mask": np.array([True, False, True]),
    "full mask": np.arange(12).reshape(3, 4) % 5 == 0,
    "empty": slice(0, 0),
}
for variant, key in KEYS.items():
    elementary(
        "index",
        variant,
        normal((3, 4)),
        (),
        lambda a, k=key: a[k],
        functools.partial(ag.index, key=key),
    )


def _concat(*pieces: Tensor, axis: int) -> Tensor:
    return ag.concat(pieces, axis)


def _stack(*pieces: Tensor, axis: int = 0) -> Tensor:
    return ag.stack(pieces, axis)


for axis in (0, 1, -1):
    pieces = {
        0: ((2, 3, 4), (1, 3, 4), (0, 3, 4)),
        1: ((2, 1, 2), (2, 3, 2)),
        -1: ((2, 1), (2, 3)),
    }[axis]
    elementary("concat", f"axis={axis}", normal(*pieces), (), lambda *a, x=axis: np.concatenate(a, x),
               functools.partial(_concat, axis=axis))  # fmt: skip
    elementary("stack", f"axis={axis}", normal((2, 3), (2, 3), (2, 3)), (), lambda *a, x=axis: np.stack(a, x),
               functools.partial(_stack, axis=axis))  # fmt: skip
elementary("stack", "0-d", normal((), ()), (), lambda *a: np.stack(a), _stack)
for shapes in (
    ((3, 4), (4, 2)),
    ((4,), (4,)),
    ((4,), (4, 2)),
    ((3, 4), (4,)),
    ((2, 3, 4), (4, 2)),
    ((3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (5, 4, 2)),
    ((5, 3, 4), (4,)),
    ((4,), (5, 4, 2)),
    ((2, 0), (0, 3)),
):
    elementary("matmul", f"{shapes[0]}@{shapes[1]}", normal(*shapes), (0, 1), np.matmul)


# ---- neural operations, each with its definition --------------------------------------------------------------------


def neural(
    name: str, variant: str, function: Any, definition: Any, inputs: Any, reads: tuple[int, ...]
) -> None:
    TABLE.append(Operation(name, variant, function, inputs, reads, COMPOSITE, None, definition))


def _linear(x: Tensor, w: Tensor, b: Any = 0.0) -> Tensor:
    return x @ w.T + b


for shape in ((2, 3, 4), (5, 4), (4,), (0, 4)):
    neural("linear", f"{shape}", F.linear, _linear, normal(shape, (3, 4)), (0, 1))
    neural("linear", f"{shape},bias", F.linear, _linear, normal(shape, (3, 4), (3,)), (0, 1))
    neural(
        "lora_linear",
        f"{shape}",
        functools.partial(F.lora_linear, scaling=0.7),
        lambda x, y, A, B: y + ((x @ A.T) @ B.T) * 0.7,
        normal(shape, (*shape[:-1], 5), (2, 4), (5, 2)),
        (0, 2, 3),
    )

_weight = _rng.standard_normal((5, 4))


def _pull(a: Any, b: Any, s: float) -> Callable[..., Any]:
    return lambda X, dY: (s * (dY @ b).T @ X, s * dY.T @ (X @ a.T))


def call_effective_linear(
    x: Tensor, *rest: Tensor, sizes: tuple[int, ...] = (5,), stacked: bool = False
) -> Tensor:
    """effective_linear over W' formed of `_weight` and the factors' values, as the layers that call it do.

    rest    A and B of one layer after the other, with s = 0.7, 1.7, ...; then of each layer a bias, or none at all
    """
    xp, pairs = x.backend.xp, [p for p in rest if p.ndim == 2]
    weight = xp.array(x.backend.from_numpy(_weight[: sum(sizes)].astype(x.dtype)))
    layers, biases, end = [], [p for p in rest if p.ndim == 1], 0
    for i, size in enumerate(sizes):
        parts, at, end = [], slice(end, end + size), end + size
        for A, B in [(pairs[2 * i], pairs[2 * i + 1])] if len(pairs) > 2 * i else []:
            weight[at] += (0.7 + i) * (B.data @ A.data)
            parts.append(((A, B), Pull(_pull(A.data, B.data, 0.7 + i))))
        layers.append((size, biases[i] if biases else None, parts))
    return effective_linear(x, EffectiveWeight(weight, layers, stacked))


def _effective_definition(
    x: Tensor, *rest: Tensor, sizes: tuple[int, ...] = (5,), stacked: bool = False
) -> Tensor:
    pairs, biases = [p for p in rest if p.ndim == 2], [p for p in rest if p.ndim == 1]
    outputs = []
    for i, weight in enumerate(np.split(_weight[: sum(sizes)], np.cumsum(sizes)[:-1])):
        y = x @ weight.T
        y = y + (x @ pairs[2 * i].T @ pairs[2 * i + 1].T) * (0.7 + i) if len(pairs) > 2 * i else y
        outputs.append(y + biases[i] if biases else y)
    return ag.stack(outputs) if stacked else ag.concat(outputs, -1)


_x, _first, _second = (2, 3, 4), ((2, 4), (3, 2)), ((3, 4), (2, 3))
for variant, sizes, stacked, shapes, reads in (
    ("one pair", (5,), False, (_x, (2, 4), (5, 2)), (0, 1, 2)),
    ("no pair,bias", (5,), False, ((2, 4), (5,)), ()),
    ("two layers", (3, 2), False, (_x, *_first, *_second), (0, 1, 2, 3, 4)),
    ("two layers,bias", (3, 2), False, (_x, *_first, *_second, (3,), (2,)), (0, 1, 2, 3, 4)),
    ("two layers,the second plain", (3, 2), False, (_x, *_first), (0, 1, 2)),
    ("stacked", (2, 2), True, (_x, (2, 4), (2, 2), *_second), (0, 1, 2, 3, 4)),
    ("stacked,bias", (2, 2), True, (_x, (2, 4), (2, 2), *_second, (2,), (2,)), (0, 1, 2, 3, 4)),
):
    options = {"sizes": sizes, "stacked": stacked}
    neural("effective_linear", variant, functools.partial(call_effective_linear, **options),
           functools.partial(_effective_definition, **options), normal(*shapes), reads)  # fmt: skip

_ids = np.array([[1, 4, 1], [0, 1, 4]])
for variant, ids in (("repeated", _ids), ("one", np.array(2)), ("none", np.zeros((0,), np.int64))):
    neural(
        "embedding",
        variant,
        functools.partial(F.embedding, ids),
        lambda w, i=ids: w[i],
        normal((6, 3)),
        (),
    )

DROP_KEY = mix_key(11, 2**64 - 1)


def _dropout_definition(x: Tensor, p: float) -> Tensor:
    each = x.size // 2
    bits = NUMPY.random_words(DROP_KEY, 5, 2, (each + 1) // 2).astype("<u8").view("<u4")[:, :each]
    return x * ((bits / 2**32 >= p) / (1 - p)).reshape(x.shape)


for p in (0.0, 0.1, 0.5, 0.9):
    neural(
        "dropout",
        f"p={p}",
        functools.partial(F.dropout, p=p, key=DROP_KEY, first=5),
        functools.partial(_dropout_definition, p=p),
        normal((2, 3, 5)),
        (),
    )


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + ag.exp(-x))


_nodes, _weights = (
    np.polynomial.legendre.leggauss(48)[i] / 2 for i in range(2)
)  # for integrals from 0 to 1


def _gelu_definition(x: Tensor) -> Tensor:
    """x Phi(x), where Phi(x) = 1/2 + integral from 0 to x of exp(-t^2 / 2) / sqrt(2 pi), by quadrature."""
    t = ag.reshape(x, *x.shape, 1) * (_nodes + 0.5)
    integral = x * (ag.exp(t * t * -0.5) @ _weights)
    return x * (0.5 + integral / math.sqrt(2 * math.pi))


def _gelu_tanh_definition(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + ag.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


neural("silu", "2-d", F.silu, lambda x: x * _sigmoid(x), normal((3, 4)), (0,))
neural("silu", "0-d", F.silu, lambda x: x * _sigmoid(x), normal(()), (0,))
neural("swiglu", "2-d", F.swiglu, lambda x: x[0] * _sigmoid(x[0]) * x[1], normal((2, 3, 4)), (0,))
neural("gelu", "none", F.gelu, _gelu_definition, normal((3, 4)), (0,))
neural("gelu", "none,wide", F.gelu, _gelu_definition, (np.linspace(-5, 5, 41),), (0,))
neural(
    "gelu",
    "tanh",
    functools.partial(F.gelu, approximate="tanh"),
    _gelu_tanh_definition,
    normal((3, 4)),
    (0,),
)
neural("gelu", "0-d", F.gelu, _gelu_definition, normal(()), (0,))


def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    e = ag.exp(x - x.max(axis, keepdims=True).detach())
    return e / e.sum(axis, keepdims=True)


for axis in (-1, 0, 1):
    neural("softmax", f"axis={axis}", functools.partial(F.softmax, axis=axis), functools.partial(_softmax, axis=axis),
           normal((3, 2, 4)), ())  # fmt: skip
    neural("log_softmax", f"axis={axis}", functools.partial(F.log_softmax, axis=axis),
           lambda x, a=axis: ag.log(_softmax(x, a)), normal((3, 2, 4)), ())  # fmt: skip


def _cross_entropy(
    logits: Tensor, targets: np.ndarray, ignore_index: int, reduction: str
) -> Tensor:
    flat, t = ag.reshape(logits, -1, logits.shape[-1]), targets.reshape(-1)
    counted = np.flatnonzero(t != ignore_index)
    total = -ag.log(_softmax(flat))[counted, t[counted]].sum()
    return total / max(len(counted), 1) if reduction == "mean" else total


def _linear_cross_entropy(
    x: Tensor, head: Tensor, cut: tuple[int, int] | None, **options: Any
) -> Tensor:
    """In blocks of so many rows and logits."""
    before = F.ROWS, F.LOGITS
    F.ROWS, F.LOGITS = cut or before
    try:
        return F.linear_cross_entropy(x, head, **options)
    finally:
        F.ROWS, F.LOGITS = before


_targets = {
    "2-d": ((2, 3, 5), np.array([[0, 4, 2], [-100, 1, 1]]), -100),
    "1-d": ((4, 3), np.array([0, 2, 2, 1]), -100),
    "other index": ((4, 3), np.array([0, 2, 1, 1]), 1),
    "all ignored": ((2, 3), np.array([-100, -100]), -100),
    "no target": ((0, 3), np.zeros(0, np.int64), -100),
}
for variant, (shape, targets, ignore) in _targets.items():
    for reduction in ("mean", "sum"):
        ce = {"targets": targets, "ignore_index": ignore, "reduction": reduction}
        neural("cross_entropy", f"{variant},{reduction}", functools.partial(F.cross_entropy, **ce),
               functools.partial(_cross_entropy, **ce), normal(shape), ())  # fmt: skip
        for cut in (None, (2, 4), (3, 1)):
            neural(
                "linear_cross_entropy",
                f"{variant},{reduction}" + (f",cut={cut}" if cut else ""),
                functools.partial(_linear_cross_entropy, cut=cut, **ce),
                lambda x, head, ce=ce: _cross_entropy(x @ head.T, **ce),
                normal((*shape[:-1], 4), (shape[-1], 4)),
                (),
            )


def _rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    return x / ag.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def _layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdims=True)
    return centred / ag.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * w + b


for eps in (None, 0.1):
    options = {} if eps is None else {"eps": eps}
    for shape in ((2, 3, 4), (4,)):
        variant = f"{shape},eps={eps}"
        for name, norm, definition, count in (
            ("rms_norm", F.rms_norm, _rms_norm, 1),
            ("layer_norm", F.layer_norm, _layer_norm, 2),
        ):
            norm, definition = (
                functools.partial(norm, **options),
                functools.partial(definition, **options),
            )
            neural(name, variant, norm, definition, normal(shape, *[(4,)] * count), (0, 1))


def angles(T: int, D: int) -> np.ndarray:
    return np.arange(T)[:, None] * 10000.0 ** (-np.arange(D // 2) * 2 / D)


def rotary_tables(
    angle: np.ndarray, heads: int, kv_heads: int, scale: float
) -> tuple[np.ndarray, ...]:
    """(cos, sin) of angles (T, D/2) as `attention` reads them: for all heads of q, times `scale`, and of k."""
    factor = np.repeat([scale, 1.0], [heads, kv_heads])[:, None]
    halves = np.tile(np.cos(angle), 2), np.concatenate([-np.sin(angle), np.sin(angle)], axis=1)
    return tuple((half[:, None] * factor).reshape(len(angle), -1) for half in halves)


def _attention(
    qkv: Tensor, heads: int, kv_heads: int, block: int | None = None, kept: int | None = None, rotate: bool = True,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """With heads of size 4; in blocks of so many queries, keeping up to so many scores for backward."""
    tables = rotary_tables(angles(qkv.shape[1], 4), heads, kv_heads, 0.5) if rotate else ()
    before = F.QUERY_BLOCK, F.KEPT_SCORES
    F.QUERY_BLOCK, F.KEPT_SCORES = block or before[0], before[1] if kept is None else kept
    try:
        on_device = [qkv.backend.from_numpy(t.astype(qkv.dtype)) for t in tables]
        return F.attention(qkv, heads, kv_heads, *on_device, window=window)
    finally:
        F.QUERY_BLOCK, F.KEPT_SCORES = before


def _rotated(x: Tensor) -> Tensor:
    """Each pair times a rotation matrix: (x1, x2) [[cos, sin], [-sin, cos]]."""
    B, T, H, D = x.shape
    a = angles(T, D)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]).transpose(
        2, 3, 0, 1
    )  # (T, D/2, 2, 2)
    pairs = ag.transpose(ag.reshape(x, B, T, H, 2, D // 2), 0, 2, 1, 4, 3)  # (B, H, T, D/2, 2)
    turned = ag.reshape(pairs, B, H, T, D // 2, 1, 2) @ turn
    return ag.reshape(
        ag.transpose(ag.reshape(turned, B, H, T, D // 2, 2), 0, 2, 1, 4, 3), B, T, H, D
    )


def _attention_definition(
    qkv: Tensor, heads: int, kv_heads: int, rotate: bool = True, window: int | None = None, **_: Any
) -> Tensor:
    B, T, _ = qkv.shape
    z = ag.reshape(qkv, B, T, heads + 2 * kv_heads, 4)
    read = heads + np.arange(heads) // (heads // kv_heads)  # which key each query head reads
    turned = z[:, :, : heads + kv_heads]
    turned = _rotated(turned) if rotate else turned
    q, k, v = (
        ag.transpose(a, 0, 2, 1, 3)
        for a in (turned[:, :, :heads], turned[:, :, read], z[:, :, read + kv_heads])
    )
    scores = (q @ ag.transpose(k, 0, 1, 3, 2)) / math.sqrt(4)  # (B, H, T, T)
    age = np.arange(T)[:, None] - np.arange(T)  # of each key, for each query
    seen = (age >= 0) & (age < (window or T))
    return ag.reshape(
        ag.transpose(_softmax(ag.where(seen, scores, -np.inf)) @ v, 0, 2, 1, 3), B, T, heads * 4
    )


for variant, (T, H, K, special) in {
    "plain": (5, 2, 2, {}), "grouped": (4, 6, 2, {}), "one key head": (3, 3, 1, {}), "one token": (1, 2, 1, {}),
    "not rotated": (5, 4, 2, {"rotate": False}), "a window": (7, 2, 1, {"window": 3}),
    "a window of one": (4, 2, 2, {"window": 1}), "a window of all": (4, 2, 2, {"window": 4}),
}.items():  # fmt: skip
    for block, kept in ((None, None), (2, 0), (2, 1 << 20)):
        options = {"heads": H, "kv_heads": K, "block": block, "kept": kept, **special}
        function, definition = (
            functools.partial(f, **options) for f in (_attention, _attention_definition)
        )
        named = variant + (f",blocks,kept={kept}" if block else "")
        neural("attention", named, function, definition, normal((2, T, (H + 2 * K) * 4)), ())

NEURAL = [op for op in TABLE if op.definition is not None]

# ---- what the promises of test_promises need to know besides --------------------------------------------------------

# (promise, operation or one entry of it): why it does not hold there. A test counts them, and fails if one does hold.
EXEMPT: dict[tuple[str, str], str] = {
    ("complex_step", "abs"): "|z| of a complex number is not analytic",
    ("complex_step", "gelu-none"): "erf reads a table, whose index is a real number",
    ("complex_step", "gelu-none,wide"): "as above",
    ("complex_step", "gelu-0-d"): "as above",
    (
        "nan_where_dependent",
        "attention",
    ): "a hidden key's value has the weight 0, and 0 x NaN is NaN, as in torch",
    (
        "nan_where_dependent",
        "dropout",
    ): "a dropped value is multiplied by 0, and 0 x NaN is NaN, as in torch",
    (
        "nan_where_dependent",
        "max",
    ): "no entry equals a NaN: its whole slice has no gradient to share, as in torch",
    ("nan_where_dependent", "min"): "as max, of which it is made",
    (
        "nan_where_dependent",
        "maximum",
    ): "a NaN is neither larger nor equal: the gradient goes to the other",
    ("nan_where_dependent", "minimum"): "as maximum, of which it is made",
    (
        "nan_where_dependent",
        "clip",
    ): "a NaN is not within the bounds: its gradient is 0, as in torch",
}

# Shapes with nothing in them, for the entry of TABLE that is named.
EMPTY: list[tuple[str, tuple[tuple[int, ...], ...]]] = [
    *((f"{name}-same", shapes) for name in ("add", "sub", "mul", "div", "power", "maximum", "minimum")
      for shapes in (((0, 3), (0, 3)), ((0, 3), ()), ((2, 0), (2, 1)), ((0,), (4, 1)), ((1, 3), (0, 1)))),
    *((f"{name}-2-d", (shape,)) for name in ("exp", "log", "tanh", "sqrt", "abs", "clip", "silu")
      for shape in ((0,), (2, 0, 3))),
    *((f"{name}-axis={axis},keepdims={keep}", (shape,)) for name in ("sum", "mean", "max", "min")
      for keep in (False, True) for axis, shape in ((0, (2, 0)), (-1, (0, 3)), ((0, 2), (2, 0, 3)), ((), (0, 2)))),
    *((f"sum-axis={axis},keepdims=False", (shape,)) for axis, shape in ((None, (0, 3)), (0, (0, 3)), (-1, (2, 0)))),
    ("transpose-axes", ((2, 0, 3),)), ("reshape-guess", ((0, 3),)),
    ("index-None", ((0, 3, 3),)), ("index-ellipsis", ((0, 3),)), ("index-array", ((3, 0),)), ("index-list", ((2, 0),)),
    ("concat-axis=1", ((0, 2), (0, 3))), ("stack-axis=0", ((0, 2), (0, 2))),
    *(("matmul-(3, 4)@(4, 2)", shapes) for shapes in (
        ((0,), (0,)), ((2, 0), (0, 3)), ((0, 4), (4, 2)), ((2, 4), (4, 0)), ((0, 3, 4), (4, 2)), ((3, 0), (2, 0, 5)),
        ((0,), (0, 2)))),
    *((f"linear-(5, 4){bias}", ((0, 4), (3, 4), (3,))[: 3 if bias else 2]) for bias in ("", ",bias")),
    ("linear-(5, 4),bias", ((2, 0), (3, 0), (3,))), ("linear-(5, 4)", ((2, 4), (0, 4))),
    ("lora_linear-(5, 4)", ((2, 3), (2, 5), (0, 3), (5, 0))), ("lora_linear-(5, 4)", ((0, 3), (0, 5), (2, 3), (5, 2))),
    ("effective_linear-one pair", ((0, 4), (2, 4), (5, 2))), ("effective_linear-one pair", ((2, 4), (0, 4), (5, 0))),
    ("embedding-none", ((6, 3),)), ("dropout-p=0.5", ((2, 0, 3),)), ("swiglu-2-d", ((2, 0, 4),)),
    ("gelu-none", ((0, 4),)), ("gelu-tanh", ((0, 4),)),
    ("softmax-axis=-1", ((0, 4),)), ("softmax-axis=0", ((4, 0),)), ("log_softmax-axis=-1", ((0, 4),)),
    ("cross_entropy-no target,mean", ((0, 3),)), ("cross_entropy-no target,sum", ((0, 3),)),
    ("rms_norm-(2, 3, 4),eps=None", ((0, 4), (4,))), ("layer_norm-(2, 3, 4),eps=None", ((2, 0, 4), (4,), (4,))),
    ("linear_cross_entropy-no target,mean", ((0, 4), (3, 4))), ("attention-plain", ((0, 5, 24),)),
]  # fmt: skip
NOT_EMPTY = {"where", "broadcast_to"}  # a part of the entry, the condition or the new shape, is not

# The last bits may depend on how an array lies in memory: sums are cut differently, BLAS copies, and NumPy's vectorised
# functions have another path for what is not contiguous.
LAYOUT_ROUNDS = {
    "exp", "log", "tanh", "power", "silu", "swiglu", "gelu", "sum", "mean", "matmul", "linear", "lora_linear",
    "effective_linear", "softmax", "log_softmax", "cross_entropy", "linear_cross_entropy", "rms_norm", "layer_norm",
    "attention",
}  # fmt: skip
