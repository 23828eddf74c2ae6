"""The table of all public operations: their inputs, how exact they must be, what they must equal.

Not a test itself. test_gradcheck differentiates each entry, test_functional compares each neural
operation with its definition in elementary operations, test_autograd looks at the graph that each
leaves behind, test_promises at what holds for all of them, and test_anomaly breaks each. A missing
operation is a failure; an exemption has a reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from minilora import attention as attention_operations
from minilora import autograd as ag
from minilora import effective
from minilora import functional as F
from minilora import losses as loss_operations
from minilora.autograd import Tensor
from minilora.backend import NUMPY, Backend, mix_key
from minilora.effective import EffectiveWeight, Pull, effective_linear

NOT_OPERATIONS = {
    "count_operations": "counts operations",
    "record": "makes the output of every operation; no operation itself",
    "operands": "turns arguments into Tensors",
    "namespace": "returns an array module",
    "unbroadcast": "works on arrays, inside vjps",
    "axis_of": "returns an axis",
    "prepare_targets": "prepares targets",
    "apply_rotary": "works on arrays, inside attention",
}

Shape = tuple[int, ...]
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Operation:
    name: str
    variant: str
    function: Callable[..., Tensor]  # takes one Tensor for each input
    inputs: Arrays  # float64
    reads: tuple[int, ...]  # the inputs whose values its backward needs
    tolerance: float
    reference: Callable[..., Any] | None = None  # elementary: the same on NumPy arrays
    definition: Callable[..., Tensor] | None = None  # neural: the same in elementary operations

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}"

    def leaves(self, dtype: Any = np.float64, requires_grad: bool = True) -> list[Tensor]:
        return [Tensor(a.astype(dtype), requires_grad) for a in self.inputs]


TABLE: list[Operation] = []
_rng = np.random.default_rng(2106)


def normal(*shapes: Shape) -> Arrays:
    return tuple(_rng.standard_normal(shape) for shape in shapes)


def positive(*shapes: Shape) -> Arrays:
    return tuple(_rng.uniform(0.5, 2.0, shape) for shape in shapes)


def apart(*shapes: Shape) -> Arrays:
    """Values at least 0.1 from each other and from 0: no kink within a finite difference."""
    sizes = [math.prod(shape) for shape in shapes]
    values = np.arange(sum(sizes)) - sum(sizes) // 2 + 0.5
    values = _rng.permutation(values) * 0.2
    pieces = np.split(values, np.cumsum(sizes)[:-1])
    return tuple(v.reshape(shape) for v, shape in zip(pieces, shapes, strict=True))


def public_operations() -> dict[str, Callable[..., Any]]:
    """Every public function of the modules that define operations."""
    result = {}
    for module in (ag, attention_operations, loss_operations, F, effective):
        for name, function in vars(module).items():
            if not inspect.isfunction(function) or name.startswith("_"):
                continue
            if function.__module__ == module.__name__:
                result[name] = function
    return result


# ---- elementary: arithmetic and functions --------------------------------------------------------

NUMPY_NAMES = {"sub": "subtract", "mul": "multiply", "div": "divide", "neg": "negative"}


def elementary(
    name: str,
    variant: str,
    inputs: Arrays,
    reads: tuple[int, ...] = (),
    *first: Any,
    reference: Any = None,
    function: Any = None,
    **options: Any,
) -> None:
    """Add an entry. The arguments `first` and the options go to the operation.

    reference   the same on NumPy arrays; by default NumPy's function with the same arguments
    """
    function = partial(function or getattr(ag, name), *first, **options)
    if reference is None:
        reference = partial(getattr(np, NUMPY_NAMES.get(name, name)), *first, **options)
    TABLE.append(Operation(name, variant, function, inputs, reads, 1e-10, reference))


def binary(variant: str, *shapes: Shape) -> None:
    """Add an entry for every operation of two tensors that broadcast."""
    elementary("add", variant, normal(*shapes))
    elementary("sub", variant, normal(*shapes))
    elementary("mul", variant, normal(*shapes), (0, 1))
    a, b = shapes
    elementary("div", variant, normal(a) + positive(b), (1,))
    elementary("power", variant, positive(a) + normal(b), (0, 1))
    elementary("maximum", variant, apart(*shapes))
    elementary("minimum", variant, apart(*shapes))
    choice = _rng.random(np.broadcast_shapes(*shapes)) < 0.5
    elementary("where", variant, normal(*shapes), (), choice)


def unary(variant: str, shape: Shape) -> None:
    """Add an entry for every function of one tensor."""
    elementary("neg", variant, normal(shape))
    elementary("exp", variant, normal(shape))
    elementary("log", variant, positive(shape), (0,))
    elementary("tanh", variant, normal(shape))
    elementary("sqrt", variant, positive(shape))
    elementary("abs", variant, apart(shape), (0,))
    clipped = partial(np.clip, a_min=-0.6, a_max=0.6)
    elementary("clip", variant, apart(shape), reference=clipped, low=-0.6, high=0.6)


binary("same", (3, 4), (3, 4))
binary("row", (3, 4), (4,))
binary("column", (3, 1), (3, 4))
binary("outer", (3, 1, 2), (4, 1))
binary("scalar", (), (2, 3))
binary("0-d", (), ())
wide = np.array([[True] * 3, [False] * 3])
elementary("where", "wide condition", normal((3,), ()), (), wide)
elementary("add", "number", normal((2, 3)), (), 2.5)
elementary("sub", "number", normal((2, 3)), (), 2.5)
elementary("mul", "number", normal((2, 3)), reference=lambda a: a * 2.5, b=2.5)
elementary("div", "number", positive((2, 3)), (0,), 2.5)
elementary("power", "square", normal((2, 3)), (0,), reference=lambda a: a**2, b=2)
elementary("power", "number", normal((2, 3)), (), 2.0)
unary("2-d", (3, 4))
unary("0-d", ())

# ---- elementary: reductions and shapes -----------------------------------------------------------

for axis in (None, 0, -1, (0, 2), (-1, 1), ()):
    for keepdims in (False, True):
        options: dict[str, Any] = {"axis": axis, "keepdims": keepdims}
        variant = f"axis={axis},keepdims={keepdims}"
        # The inputs of all four are drawn first.
        summed = normal((2, 3, 4))
        averaged = normal((2, 3, 4))
        largest = apart((2, 3, 4))
        smallest = apart((2, 3, 4))
        elementary("sum", variant, summed, **options)
        elementary("mean", variant, averaged, **options)
        elementary("max", variant, largest, (0,), **options)
        elementary("min", variant, smallest, (0,), **options)
elementary("sum", "0-d", normal(()))
elementary("mean", "0-d", normal(()))
elementary("max", "0-d", normal(()), (0,))
elementary("min", "0-d", normal(()), (0,))


def shaping(name: str, variant: str, shape: Shape, reference: Any, function: Any) -> None:
    """Add an entry for an operation that moves values; both take one array or Tensor."""
    elementary(name, variant, normal(shape), reference=reference, function=function)


def in_order(*axes: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: a.transpose(axes)


def in_rows_of_3(a: Any) -> Any:
    return a.T.reshape(4, 3)  # for a Tensor and for an array


shaping("reshape", "tuple", (2, 6), lambda a: a.reshape(3, 4), lambda a: ag.reshape(a, (3, 4)))
shaping("reshape", "guess", (2, 6), np.ravel, lambda a: ag.reshape(a, -1))
shaping("reshape", "of a transpose", (2, 6), in_rows_of_3, in_rows_of_3)
shaping("transpose", "reverse", (2, 3, 4), np.transpose, ag.transpose)
shaping("transpose", "axes", (2, 3, 4), in_order(1, 2, 0), lambda a: ag.transpose(a, 1, 2, 0))
negative = (0, -1, 1)
shaping("transpose", "negative", (2, 3, 4), in_order(0, 2, 1), lambda a: ag.transpose(a, negative))
elementary("broadcast_to", "new axis", normal((3, 1)), shape=(2, 3, 4))
elementary("broadcast_to", "0-d", normal(()), shape=(2, 2))


def index(variant: str, key: Any) -> None:
    elementary("index", variant, normal((3, 4)), reference=itemgetter(key), key=key)


index("integer", 1)
index("slices", (slice(None, None, -1), slice(1, 4, 2)))
index("ellipsis", (..., 0))
index("None", (slice(None), None, 2))
index("0-d", (1, 2))
index("array", np.array([2, 0, 2, -1, 2]))
index("arrays", (np.array([[0], [2]]), np.array([1, 1, 3])))
index("array and slice", (slice(1, None), np.array([3, 3, 0])))
index("list", [0, 0, 1])
index("mask", np.array([True, False, True]))
index("full mask", np.arange(12).reshape(3, 4) % 5 == 0)
index("empty", slice(0, 0))


def _concat(*pieces: Tensor, axis: int) -> Tensor:
    return ag.concat(pieces, axis)


def _stack(*pieces: Tensor, axis: int = 0) -> Tensor:
    return ag.stack(pieces, axis)


def join(axis: int, *shapes: Shape) -> None:
    """Add entries that concatenate arrays of these shapes, and stack three of shape (2, 3)."""
    variant = f"axis={axis}"
    concatenated = normal(*shapes)
    reference = lambda *a: np.concatenate(a, axis)  # noqa: E731
    elementary("concat", variant, concatenated, reference=reference, function=_concat, axis=axis)
    stacked = normal((2, 3), (2, 3), (2, 3))
    reference = lambda *a: np.stack(a, axis)  # noqa: E731
    elementary("stack", variant, stacked, reference=reference, function=_stack, axis=axis)


join(0, (2, 3, 4), (1, 3, 4), (0, 3, 4))
join(1, (2, 1, 2), (2, 3, 2))
join(-1, (2, 1), (2, 3))
elementary("stack", "0-d", normal((), ()), reference=lambda *a: np.stack(a), function=_stack)


def product(*shapes: Shape) -> None:
    elementary("matmul", f"{shapes[0]}@{shapes[1]}", normal(*shapes), (0, 1))


product((3, 4), (4, 2))
product((4,), (4,))
product((4,), (4, 2))
product((3, 4), (4,))
product((2, 3, 4), (4, 2))
product((3, 4), (2, 4, 5))
product((2, 1, 3, 4), (5, 4, 2))
product((5, 3, 4), (4,))
product((4,), (5, 4, 2))
product((2, 0), (0, 3))


# ---- neural operations, each with its definition -------------------------------------------------


def neural(
    name: str,
    variant: str,
    inputs: Arrays,
    reads: tuple[int, ...],
    function: Any,
    definition: Any,
    **options: Any,
) -> None:
    """Add an entry. The options go to the operation and to its definition."""
    function = partial(function, **options)
    definition = partial(definition, **options)
    TABLE.append(Operation(name, variant, function, inputs, reads, 1e-9, None, definition))


def _linear(x: Tensor, w: Tensor, b: Any = 0.0) -> Tensor:
    return x @ w.T + b


def _lora_linear(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return y + ((x @ A.T) @ B.T) * scaling


for shape in ((2, 3, 4), (5, 4), (4,), (0, 4)):
    neural("linear", f"{shape}", normal(shape, (3, 4)), (0, 1), F.linear, _linear)
    neural("linear", f"{shape},bias", normal(shape, (3, 4), (3,)), (0, 1), F.linear, _linear)
    inputs = normal(shape, (*shape[:-1], 5), (2, 4), (5, 2))
    neural("lora_linear", f"{shape}", inputs, (0, 2, 3), F.lora_linear, _lora_linear, scaling=0.7)

FROZEN_WEIGHT = _rng.standard_normal((5, 4))  # of the layers that effective_linear is tried on


def _pull(A: Any, B: Any, s: float) -> Pull:
    """The gradients of A and B, of which s B A was added to a weight."""
    return Pull(lambda X, dY: (s * (dY @ B).T @ X, s * dY.T @ (X @ A.T)))


def by_layer(parameters: tuple[Any, ...], sizes: Shape) -> Iterator[tuple[slice, Any, Any, float]]:
    """For each layer: its rows of the weight, (A, B) or None, its bias or None, and its s."""
    pairs = [p for p in parameters if p.ndim == 2]
    biases = [p for p in parameters if p.ndim == 1]
    start = 0
    for i, size in enumerate(sizes):
        pair = pairs[2 * i : 2 * i + 2] or None
        bias = biases[i] if biases else None
        yield slice(start, start + size), pair, bias, 0.7 + i
        start += size


def call_effective_linear(
    x: Tensor, *parameters: Tensor, sizes: Shape = (5,), stacked: bool = False
) -> Tensor:
    """effective_linear over W' formed from FROZEN_WEIGHT and the factors, as adapted layers do.

    parameters   A and B of one layer after another, with s = 0.7, 1.7, ...; then for each layer a
                 bias, or none at all
    """
    frozen = FROZEN_WEIGHT[: sum(sizes)].astype(x.dtype)
    weight = x.backend.xp.array(x.backend.from_numpy(frozen))
    layers = []
    for at, pair, bias, s in by_layer(parameters, sizes):
        parts = []
        if pair:
            A, B = pair
            weight[at] += s * (B.data @ A.data)
            parts.append(((A, B), _pull(A.data, B.data, s)))
        layers.append((at.stop - at.start, bias, parts))
    return effective_linear(x, EffectiveWeight(weight, layers, stacked))


def _effective_linear(
    x: Tensor, *parameters: Tensor, sizes: Shape = (5,), stacked: bool = False
) -> Tensor:
    outputs = []
    for at, pair, bias, s in by_layer(parameters, sizes):
        y = x @ FROZEN_WEIGHT[at].T
        if pair:
            A, B = pair
            y = y + (x @ A.T @ B.T) * s
        outputs.append(y if bias is None else y + bias)
    return ag.stack(outputs) if stacked else ag.concat(outputs, -1)


def prepared(variant: str, sizes: Shape, x: Shape, *parameters: Shape) -> None:
    """Add an entry for effective_linear over layers of these sizes."""
    factors = [i + 1 for i, shape in enumerate(parameters) if len(shape) == 2]
    reads = (0, *factors) if factors else ()
    stacked = variant.startswith("stacked")
    inputs = normal(x, *parameters)
    functions = call_effective_linear, _effective_linear
    neural("effective_linear", variant, inputs, reads, *functions, sizes=sizes, stacked=stacked)


_first = (2, 4), (3, 2)
_second = (3, 4), (2, 3)
_equal = (2, 4), (2, 2)
prepared("one pair", (5,), (2, 3, 4), (2, 4), (5, 2))
prepared("no pair,bias", (5,), (2, 4), (5,))
prepared("two layers", (3, 2), (2, 3, 4), *_first, *_second)
prepared("two layers,bias", (3, 2), (2, 3, 4), *_first, *_second, (3,), (2,))
prepared("two layers,the second plain", (3, 2), (2, 3, 4), *_first)
prepared("stacked", (2, 2), (2, 3, 4), *_equal, *_second)
prepared("stacked,bias", (2, 2), (2, 3, 4), *_equal, *_second, (2,), (2,))


def embedding(variant: str, ids: Any) -> None:
    ids = np.array(ids, np.int64)
    neural("embedding", variant, normal((6, 3)), (), partial(F.embedding, ids), itemgetter(ids))


embedding("repeated", [[1, 4, 1], [0, 1, 4]])
embedding("one", 2)
embedding("none", [])

DROP_KEY = mix_key(11, 2**64 - 1)


def dropout_definition(x: Tensor, p: float, key: int = DROP_KEY, first: int = 5) -> Tensor:
    count = x.size // 2
    words = NUMPY.random_words(key, first, 2, (count + 1) // 2).astype("<u8")
    bits = words.view("<u4")[:, :count]
    survives = bits / 2**32 >= p
    return x * (survives / (1 - p)).reshape(x.shape)


def dropout(p: float) -> None:
    options = {"p": p, "key": DROP_KEY, "first": 5}
    neural("dropout", f"p={p}", normal((2, 3, 5)), (), F.dropout, dropout_definition, **options)


dropout(0.0)
dropout(0.1)
dropout(0.5)
dropout(0.9)


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + ag.exp(-x))


def _relu(x: Tensor) -> Tensor:
    return ag.maximum(x, 0.0)


def _mse_loss(x: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    squares = (x - targets) ** 2
    return squares.mean() if reduction == "mean" else squares.sum()


for shape in ((3, 4), (5,), (), (0, 4)):
    neural("relu", f"{shape}", apart(shape), (), F.relu, _relu)
    if math.prod(shape):
        neural("mse_loss", f"{shape}", normal(shape, shape), (), F.mse_loss, _mse_loss)
for shape in ((2, 3, 4), (0, 4)):
    inputs = normal(shape, shape)
    neural("mse_loss", f"{shape},sum", inputs, (), F.mse_loss, _mse_loss, reduction="sum")


def _silu(x: Tensor) -> Tensor:
    return x * _sigmoid(x)


def _swiglu(x: Tensor) -> Tensor:
    return x[0] * _sigmoid(x[0]) * x[1]


_nodes, _weights = np.polynomial.legendre.leggauss(48)  # for integrals from -1 to 1


def _gelu(x: Tensor) -> Tensor:
    """x Phi(x), where Phi(x) = 1/2 + integral from 0 to x of exp(-t^2 / 2) / sqrt(2 pi)."""
    t = ag.reshape(x, *x.shape, 1) * (_nodes / 2 + 0.5)
    integral = x * (ag.exp(t * t * -0.5) @ (_weights / 2))
    return x * (0.5 + integral / math.sqrt(2 * math.pi))


def _gelu_tanh(x: Tensor, approximate: str) -> Tensor:
    z = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1.0 + ag.tanh(z))


neural("silu", "2-d", normal((3, 4)), (0,), F.silu, _silu)
neural("silu", "0-d", normal(()), (0,), F.silu, _silu)
neural("swiglu", "2-d", normal((2, 3, 4)), (0,), F.swiglu, _swiglu)
neural("gelu", "none", normal((3, 4)), (0,), F.gelu, _gelu)
neural("gelu", "none,wide", (np.linspace(-5, 5, 41),), (0,), F.gelu, _gelu)
neural("gelu", "tanh", normal((3, 4)), (0,), F.gelu, _gelu_tanh, approximate="tanh")
neural("gelu", "0-d", normal(()), (0,), F.gelu, _gelu)


def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    e = ag.exp(x - x.max(axis, keepdims=True).detach())
    return e / e.sum(axis, keepdims=True)


def _log_softmax(x: Tensor, axis: int) -> Tensor:
    return ag.log(_softmax(x, axis))


for axis in (-1, 0, 1):
    variant = f"axis={axis}"
    neural("softmax", variant, normal((3, 2, 4)), (), F.softmax, _softmax, axis=axis)
    neural("log_softmax", variant, normal((3, 2, 4)), (), F.log_softmax, _log_softmax, axis=axis)


@contextmanager
def block_sizes(backend: Backend, **sizes: int | None) -> Iterator[None]:
    """Inside, the backend has these `BlockSizes`; None leaves one as it is."""
    before = backend.sizes
    given = {name: size for name, size in sizes.items() if size is not None}
    try:
        backend.sizes = before._replace(**given)
        yield
    finally:
        backend.sizes = before


def _cross_entropy(
    logits: Tensor, targets: np.ndarray, ignore_index: int, reduction: str
) -> Tensor:
    flat = ag.reshape(logits, -1, logits.shape[-1])
    t = targets.reshape(-1)
    counted = np.flatnonzero(t != ignore_index)
    total = -ag.log(_softmax(flat))[counted, t[counted]].sum()
    return total / max(len(counted), 1) if reduction == "mean" else total


def _call_linear_cross_entropy(
    x: Tensor, head: Tensor, cut: tuple[int, int] | None, **options: Any
) -> Tensor:
    """In blocks of at most cut[0] rows and cut[1] logits."""
    rows, logits = cut or (None, None)
    with block_sizes(x.backend, loss_rows=rows, loss_logits=logits):
        return F.linear_cross_entropy(x, head, **options)


def _linear_cross_entropy(x: Tensor, head: Tensor, cut: Any, **options: Any) -> Tensor:
    return _cross_entropy(x @ head.T, **options)


def losses(variant: str, shape: Shape, targets: Any, ignore_index: int = -100) -> None:
    """Add entries for both losses: both reductions, and blocks of several sizes."""
    options: dict[str, Any] = {"targets": np.array(targets, np.int64), "ignore_index": ignore_index}
    for reduction in ("mean", "sum"):
        options["reduction"] = reduction
        named = f"{variant},{reduction}"
        functions = F.cross_entropy, _cross_entropy
        neural("cross_entropy", named, normal(shape), (), *functions, **options)
        functions = _call_linear_cross_entropy, _linear_cross_entropy
        for cut in (None, (2, 4), (3, 1)):
            inputs = normal((*shape[:-1], 4), (shape[-1], 4))
            in_blocks = f"{named},cut={cut}" if cut else named
            neural("linear_cross_entropy", in_blocks, inputs, (), *functions, cut=cut, **options)


losses("2-d", (2, 3, 5), [[0, 4, 2], [-100, 1, 1]])
losses("1-d", (4, 3), [0, 2, 2, 1])
losses("other index", (4, 3), [0, 2, 1, 1], 1)
losses("all ignored", (2, 3), [-100, -100])
losses("no target", (0, 3), [])


def _rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    return x / ag.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def _layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / ag.sqrt(variance + eps) * w + b


def norms(shape: Shape, **options: float) -> None:
    variant = f"{shape},eps={options.get('eps')}"
    inputs = normal(shape, (4,))
    neural("rms_norm", variant, inputs, (0, 1), F.rms_norm, _rms_norm, **options)
    inputs = normal(shape, (4,), (4,))
    neural("layer_norm", variant, inputs, (0, 1), F.layer_norm, _layer_norm, **options)


norms((2, 3, 4))
norms((4,))
norms((2, 3, 4), eps=0.1)
norms((4,), eps=0.1)


Rows = tuple[tuple[int, ...], ...]  # of integers, one per sequence


def angles(T: int, D: int) -> np.ndarray:
    return np.arange(T)[:, None] * 10000.0 ** (-np.arange(D // 2) * 2 / D)


def rotary_tables(angle: np.ndarray, heads: int, kv_heads: int, scale: float) -> Arrays:
    """(cos, sin) of angles (T, D/2) as `attention` reads them: the columns of q times `scale`."""
    factor = np.repeat([scale, 1.0], [heads, kv_heads])[:, None]
    cos = np.tile(np.cos(angle), 2)
    sin = np.concatenate([-np.sin(angle), np.sin(angle)], axis=1)
    return tuple((z[:, None] * factor).reshape(len(angle), -1) for z in (cos, sin))


def _call_attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    block: int | None,
    kept: int | None,
    rotate: bool = True,
    window: int | None = None,
    first_key: Rows | None = None,
) -> Tensor:
    """With heads of size 4, `block` queries at a time, keeping up to `kept` scores for backward.

    With `first_key`, positions are numbered from there, so that each sequence has its own rotation.
    """
    backend = qkv.backend
    options: dict[str, Any] = {"window": window}
    if first_key is not None:
        options["first_key"] = backend.from_numpy(np.array(first_key))
    if rotate:
        a = _places(qkv.shape[1], first_key) * angles(2, 4)[1]
        tables = rotary_tables(a.reshape(-1, 2), heads, kv_heads, 0.5)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            table = table.reshape(*a.shape[:-1], -1).astype(qkv.dtype)
            options[name] = backend.from_numpy(table)
    with block_sizes(backend, queries=block, kept_scores=kept):
        return F.attention(qkv, heads, kv_heads, **options)


def _places(T: int, first_key: Rows | None) -> np.ndarray:
    """Positions (T, 1) or, numbered from `first_key`, (B, T, 1)."""
    places = np.arange(T) if first_key is None else np.arange(T) - np.array(first_key)
    return places[..., None]


def _rotated(x: Tensor, first_key: Rows | None) -> Tensor:
    """Each pair times a rotation matrix: (x1, x2) [[cos, sin], [-sin, cos]]."""
    B, T, H, D = x.shape
    a = _places(T, first_key) * angles(2, D)[1]  # (T, D/2) or (B, T, D/2)
    matrix = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    matrix = np.moveaxis(matrix, (0, 1), (-2, -1))  # (..., T, D/2, 2, 2)
    matrix = matrix.reshape(-1, 1, *matrix.shape[-4:])  # (1 or B, 1, T, D/2, 2, 2)
    pairs = ag.reshape(x, B, T, H, 2, D // 2)
    pairs = ag.transpose(pairs, 0, 2, 1, 4, 3)  # (B, H, T, D/2, 2)
    rotated = ag.reshape(pairs, B, H, T, D // 2, 1, 2) @ matrix
    rotated = ag.reshape(rotated, B, H, T, D // 2, 2)
    return ag.reshape(ag.transpose(rotated, 0, 2, 1, 4, 3), B, T, H, D)


def _by_head(x: Tensor) -> Tensor:
    return ag.transpose(x, 0, 2, 1, 3)  # (B, T, H, D) -> (B, H, T, D) and back


def _attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    rotate: bool = True,
    window: int | None = None,
    first_key: Rows | None = None,
    **_: Any,
) -> Tensor:
    B, T, _ = qkv.shape
    z = ag.reshape(qkv, B, T, heads + 2 * kv_heads, 4)
    keys = heads + np.arange(heads) // (heads // kv_heads)  # the key that each query head reads
    qk = z[:, :, : heads + kv_heads]
    if rotate:
        qk = _rotated(qk, first_key)
    q = _by_head(qk[:, :, :heads])
    k = _by_head(qk[:, :, keys])
    v = _by_head(z[:, :, keys + kv_heads])
    scores = (q @ ag.transpose(k, 0, 1, 3, 2)) / math.sqrt(4)  # (B, H, T, T)
    age = np.arange(T)[:, None] - np.arange(T)  # of each key, for each query
    seen = (age >= 0) & (age < (window or T))
    if first_key is not None:
        seen = seen & (np.arange(T) >= np.array(first_key)[:, None, :, None])  # (B, 1, T, T)
    P = _softmax(ag.where(seen, scores, -np.inf))
    return ag.reshape(_by_head(P @ v), B, T, heads * 4)


def attention(variant: str, T: int, H: int, K: int, **options: Any) -> None:
    """Add entries for attention: in one block, and in blocks whose scores are kept or not."""
    functions = _call_attention, _attention
    options |= {"heads": H, "kv_heads": K}
    shape = (2, T, (H + 2 * K) * 4)
    neural("attention", variant, normal(shape), (), *functions, block=None, kept=None, **options)
    for kept in (0, 1 << 20):
        named = f"{variant},blocks,kept={kept}"
        neural("attention", named, normal(shape), (), *functions, block=2, kept=kept, **options)


attention("plain", 5, 2, 2)
attention("grouped", 4, 6, 2)
attention("one key head", 3, 3, 1)
attention("one token", 1, 2, 1)
attention("not rotated", 5, 4, 2, rotate=False)
attention("a window", 7, 2, 1, window=3)
attention("a window of one", 4, 2, 2, window=1)
attention("a window of all", 4, 2, 2, window=4)
RECORDS = ((0, 0, 0, 3, 3, 5, 5), (0, 1, 1, 1, 1, 5, 5))  # two and more in each of two sequences
attention("records", 7, 2, 1, first_key=RECORDS)
attention("records, not rotated", 7, 2, 2, first_key=RECORDS, rotate=False)
attention("records, a window", 7, 4, 2, first_key=RECORDS, window=2)
attention("records of one token", 3, 2, 2, first_key=((0, 1, 2), (0, 0, 2)))

NEURAL = [op for op in TABLE if op.definition is not None]

# ---- what the promises of test_promises need to know besides -------------------------------------

# (promise, operation or one entry of it): why it does not hold there. A test counts them, and fails
# if one does hold. With NaN all behave as in PyTorch.
EXEMPT: dict[tuple[str, str], str] = {}


def exempt(promise: str, operation: str, reason: str) -> None:
    EXEMPT[promise, operation] = reason


exempt("complex_step", "abs", "|z| of a complex number is not analytic")
exempt("complex_step", "gelu-none", "erf reads a table, whose index is a real number")
exempt("complex_step", "gelu-none,wide", "as above")
exempt("complex_step", "gelu-0-d", "as above")
exempt("nan_where_dependent", "attention", "a hidden key has weight 0, and 0 x NaN is NaN")
exempt("nan_where_dependent", "dropout", "dropping multiplies by 0, and 0 x NaN is NaN")
exempt("nan_where_dependent", "max", "no entry equals a NaN: nothing shares its gradient")
exempt("nan_where_dependent", "min", "as max, which it calls")
exempt(
    "nan_where_dependent", "maximum", "a NaN is neither larger nor smaller: each gets half of dy"
)
exempt("nan_where_dependent", "minimum", "as maximum, which it calls")
exempt("nan_where_dependent", "clip", "a NaN is not within the bounds: its gradient is 0")

# An entry of TABLE, and empty shapes to call it with.
EMPTY: list[tuple[str, tuple[Shape, ...]]] = []
NOT_EMPTY = {"where", "broadcast_to"}  # the condition or the new shape of the entry is not empty


def empty(entry: str, *shapes: Shape) -> None:
    EMPTY.append((entry, shapes))


for name in ("add", "sub", "mul", "div", "power", "maximum", "minimum"):
    empty(f"{name}-same", (0, 3), (0, 3))
    empty(f"{name}-same", (0, 3), ())
    empty(f"{name}-same", (2, 0), (2, 1))
    empty(f"{name}-same", (0,), (4, 1))
    empty(f"{name}-same", (1, 3), (0, 1))
for name in ("neg", "exp", "log", "tanh", "sqrt", "abs", "clip", "silu"):
    empty(f"{name}-2-d", (0,))
    empty(f"{name}-2-d", (2, 0, 3))
for name in ("sum", "mean", "max", "min"):
    for keepdims in (False, True):
        empty(f"{name}-axis=0,keepdims={keepdims}", (2, 0))
        empty(f"{name}-axis=-1,keepdims={keepdims}", (0, 3))
        empty(f"{name}-axis=(0, 2),keepdims={keepdims}", (2, 0, 3))
        empty(f"{name}-axis=(),keepdims={keepdims}", (0, 2))
empty("relu-(3, 4)", (0, 3))
empty("mse_loss-(2, 3, 4),sum", (0, 3), (0, 3))
empty("sum-axis=None,keepdims=False", (0, 3))
empty("sum-axis=0,keepdims=False", (0, 3))
empty("sum-axis=-1,keepdims=False", (2, 0))
empty("transpose-axes", (2, 0, 3))
empty("reshape-guess", (0, 3))
empty("index-None", (0, 3, 3))
empty("index-ellipsis", (0, 3))
empty("index-array", (3, 0))
empty("index-list", (2, 0))
empty("concat-axis=1", (0, 2), (0, 3))
empty("stack-axis=0", (0, 2), (0, 2))
empty("matmul-(3, 4)@(4, 2)", (0,), (0,))
empty("matmul-(3, 4)@(4, 2)", (2, 0), (0, 3))
empty("matmul-(3, 4)@(4, 2)", (0, 4), (4, 2))
empty("matmul-(3, 4)@(4, 2)", (2, 4), (4, 0))
empty("matmul-(3, 4)@(4, 2)", (0, 3, 4), (4, 2))
empty("matmul-(3, 4)@(4, 2)", (3, 0), (2, 0, 5))
empty("matmul-(3, 4)@(4, 2)", (0,), (0, 2))
empty("linear-(5, 4)", (0, 4), (3, 4))
empty("linear-(5, 4),bias", (0, 4), (3, 4), (3,))
empty("linear-(5, 4),bias", (2, 0), (3, 0), (3,))
empty("linear-(5, 4)", (2, 4), (0, 4))
empty("lora_linear-(5, 4)", (2, 3), (2, 5), (0, 3), (5, 0))
empty("lora_linear-(5, 4)", (0, 3), (0, 5), (2, 3), (5, 2))
empty("effective_linear-one pair", (0, 4), (2, 4), (5, 2))
empty("effective_linear-one pair", (2, 4), (0, 4), (5, 0))
empty("embedding-none", (6, 3))
empty("dropout-p=0.5", (2, 0, 3))
empty("swiglu-2-d", (2, 0, 4))
empty("gelu-none", (0, 4))
empty("gelu-tanh", (0, 4))
empty("softmax-axis=-1", (0, 4))
empty("softmax-axis=0", (4, 0))
empty("log_softmax-axis=-1", (0, 4))
empty("cross_entropy-no target,mean", (0, 3))
empty("cross_entropy-no target,sum", (0, 3))
empty("rms_norm-(2, 3, 4),eps=None", (0, 4), (4,))
empty("layer_norm-(2, 3, 4),eps=None", (2, 0, 4), (4,), (4,))
empty("linear_cross_entropy-no target,mean", (0, 4), (3, 4))
empty("attention-plain", (0, 5, 24))

# The last bits may depend on the layout of an array in memory: sums are cut differently, BLAS
# copies, and NumPy's vectorised functions have another path for what is not contiguous.
LAYOUT_ROUNDS = {"sum", "mean", "matmul", "linear", "lora_linear", "effective_linear"}
LAYOUT_ROUNDS |= {"exp", "log", "tanh", "power", "silu", "swiglu", "gelu"}
LAYOUT_ROUNDS |= {"softmax", "log_softmax", "cross_entropy", "linear_cross_entropy"}
LAYOUT_ROUNDS |= {"rms_norm", "layer_norm", "attention", "mse_loss"}
