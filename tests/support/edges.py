"""The table of edge cases: for each operation, inputs at the edges of its domain beside the stated
output and gradients.

Not a test itself. test_autograd computes each case, test_devices does so on every backend, and an
oracle test compares the stated values with PyTorch's. Values are stated from the definition: limits
where a formula gives 0 times infinity, 0 where an empty sum is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minilora import autograd as ag
from minilora import functional as F
from minilora.autograd import Tensor

INF = math.inf
NAN = math.nan


@dataclass(frozen=True)
class Edge:
    """One case: `function` of `inputs` must be `value`, with these gradients under `dy`.

    peer   the same in PyTorch, called with the module and one of its tensors per input; None where
           PyTorch has no such function or, for a stated reason, another value
    quiet  whether NumPy must not warn: nothing infinite reaches the output or the gradients
    """

    name: str
    case: str
    function: Callable[..., Tensor]
    inputs: tuple[np.ndarray, ...]
    value: np.ndarray
    gradients: tuple[np.ndarray, ...]
    dy: np.ndarray
    peer: Callable[..., Any] | None
    quiet: bool

    @property
    def id(self) -> str:
        return f"{self.name}-{self.case}"

    def leaves(self) -> list[Tensor]:
        return [Tensor(a.copy(), True) for a in self.inputs]


EDGES: list[Edge] = []


def edge(
    name: str,
    case: str,
    inputs: Any,
    value: Any,
    gradients: Any,
    *,
    function: Any = None,
    peer: Any = None,
    dy: Any = 1.0,
    quiet: bool = False,
    **options: Any,
) -> None:
    """Add a case. Options go to the operation; dy is broadcast to the output's shape."""
    if function is None:
        function = partial(getattr(ag, name, None) or getattr(F, name), **options)
    value = np.asarray(value, np.float64)
    arrays = tuple(np.asarray(a, np.float64) for a in inputs)
    grads = tuple(np.asarray(g, np.float64) for g in gradients)
    dy = np.array(np.broadcast_to(np.asarray(dy, np.float64), value.shape))
    quiet |= not all(a.size for a in arrays)
    EDGES.append(Edge(name, case, function, arrays, value, grads, dy, peer, quiet))


# ---- a 0-d array counts as one value along axis 0 and -1 -----------------------------------------


def _reduced(name: str, axis: Any) -> Callable[..., Any]:
    name = {"max": "amax", "min": "amin"}.get(name, name)
    return lambda torch, x: getattr(torch, name)(x, () if axis is None else axis)


for name in ("sum", "mean", "max", "min"):
    for axis in (0, -1, None, ()):
        for keepdims in (False, True):
            case = f"0-d,axis={axis},keepdims={keepdims}"
            options: dict[str, Any] = {"axis": axis, "keepdims": keepdims}
            edge(name, case, [3.0], 3.0, [1.0], peer=_reduced(name, axis), **options)
for name in ("softmax", "log_softmax"):
    for axis in (0, -1):
        value = float(name == "softmax")
        peer = partial(lambda torch, x, name, axis: getattr(torch, name)(x, axis), name=name)
        edge(name, f"0-d,{axis}", [3.0], value, [0.0], peer=partial(peer, axis=axis), axis=axis)
edge("transpose", "0-d", [3.0], 3.0, [1.0])
edge("swiglu", "(2,)", [[0.0, -2.0]], 0.0, [[-1.0, 0.0]])  # d silu(0) = 1/2, and silu(0) = 0

# ---- no values -----------------------------------------------------------------------------------

none = np.zeros((0, 3))
edge("sum", "no rows", [none], 0.0, [none], peer=lambda torch, x: torch.sum(x))
edge("sum", "no rows,axis=0", [none], np.zeros(3), [none], peer=_reduced("sum", 0), axis=0)
edge("sum", "no rows,axis=-1", [none], np.zeros(0), [none], peer=_reduced("sum", -1), axis=-1)
for name in ("mean", "max", "min"):
    edge(name, "no rows", [none], np.zeros(0), [none], peer=_reduced(name, 1), axis=1)
for name in ("softmax", "log_softmax"):
    for axis in (0, 1, -1):
        peer = partial(lambda torch, x, name, axis: getattr(torch, name)(x, axis), name=name)
        edge(
            name, f"no rows,{axis}", [none], none, [none], peer=partial(peer, axis=axis), axis=axis
        )
edge("softmax", "no columns", [none.T], none.T, [none.T])
edge("dropout", "no rows", [none], none, [none], p=1.0, key=1)
edge("swiglu", "no columns", [np.zeros((2, 0))], np.zeros(0), [np.zeros((2, 0))])
edge("matmul", "nothing to add", [none.T, none], np.zeros((3, 3)), [none.T, none])
edge(
    "concat",
    "one of them empty",
    [none, np.ones((1, 3))],
    np.ones((1, 3)),
    [none, np.ones((1, 3))],
    function=lambda *pieces: ag.concat(pieces),
    peer=lambda torch, *pieces: torch.cat(pieces),
)

# ---- ties and infinities -------------------------------------------------------------------------

first, second = [INF, -INF, 0.0, 1.0, 2.0], [INF, -INF, -0.0, INF, -INF]
edge(
    "maximum",
    "ties and infinities",
    [first, second],
    [INF, -INF, 0, INF, 2],
    [[0.5, 0.5, 0.5, 0, 1], [0.5, 0.5, 0.5, 1, 0]],
    peer=lambda torch, a, b: torch.maximum(a, b),
)
edge(
    "minimum",
    "ties and infinities",
    [first, second],
    [INF, -INF, 0, 1, -INF],
    [[0.5, 0.5, 0.5, 1, 0], [0.5, 0.5, 0.5, 0, 1]],
    peer=lambda torch, a, b: torch.minimum(a, b),
)
ties = [[1, INF, INF]]
edge("max", "ties at infinity", ties, INF, [[0, 0.5, 0.5]], peer=lambda torch, x: torch.amax(x))
edge("max", "all -inf", [[-INF, -INF]], -INF, [[0.5, 0.5]], peer=lambda torch, x: torch.amax(x))
edge(
    "min", "ties at zero", [[0, -0.0, 1]], 0.0, [[0.5, 0.5, 0]], peer=lambda torch, x: torch.amin(x)
)
# An infinite gradient does not reach what was not taken: 0 times infinity would be NaN.
# A NaN is larger and smaller than nothing: both inputs get a part of the gradient.
for name in ("maximum", "minimum"):
    edge(name, "NaN", [[NAN, 1.0], [1.0, NAN]], [NAN, NAN], [[0.5, 0.5], [0.5, 0.5]])
for name in ("max", "min"):
    edge(name, "NaN", [[NAN, 1.0]], NAN, [[NAN, NAN]], quiet=True)
steep = [[-1.0, 0.0, 4.0]]
root = [0, 0, 2]
edge(
    "maximum",
    "dy=inf",
    [*steep, np.zeros(3)],
    root,
    [[0, INF, 0.25], [INF, INF, 0]],
    function=lambda x, z: ag.sqrt(ag.maximum(x, z)),
    peer=lambda torch, x, z: torch.sqrt(torch.maximum(x, z)),
)
edge(
    "minimum",
    "dy=inf",
    [*steep, np.zeros(3)],
    root,
    [[0, INF, 0.25], [INF, INF, 0]],
    function=lambda x, z: ag.sqrt(-ag.minimum(-x, -z)),
    peer=lambda torch, x, z: torch.sqrt(-torch.minimum(-x, -z)),
)
edge(
    "clip",
    "dy=inf",
    steep,
    root,
    [[0, INF, 0.25]],
    function=lambda x: ag.sqrt(ag.clip(x, 0)),
    peer=lambda torch, x: torch.sqrt(torch.clamp(x, 0)),
)
edge(
    "where",
    "dy=inf",
    steep,
    root,
    [[0, 0, 0.25]],
    function=lambda x: ag.sqrt(ag.where(x > 0, x, 0.0)),
    peer=lambda torch, x: torch.sqrt(torch.where(x > 0, x, torch.zeros_like(x))),
)
edge("max", "dy=inf", [[0.0, -1.0]], 0.0, [[INF, 0]], function=lambda x: ag.sqrt(x.max()))
edge("min", "dy=inf", [[0.0, 1.0]], 0.0, [[INF, 0]], function=lambda x: ag.sqrt(x.min()))

beyond = [[-INF, -1.0, 0.0, 1.0, INF]]
edge(
    "clip",
    "at its bounds",
    beyond,
    [-1, -1, 0, 1, 1],
    [[0, 1, 1, 1, 0]],
    peer=lambda torch, x: torch.clamp(x, -1, 1),
    low=-1,
    high=1,
)
edge(
    "clip",
    "bounds crossed",
    [[-2.0, 0.0, 2.0]],
    [-1, -1, -1],
    [[0, 0, 0]],
    peer=lambda torch, x: torch.clamp(x, 1, -1),
    low=1,
    high=-1,
)
edge(
    "clip",
    "below only",
    beyond,
    [0, 0, 0, 1, INF],
    [[0, 0, 1, 1, 1]],
    peer=lambda torch, x: torch.clamp(x, 0),
    low=0,
)

# ---- where a factor of the derivative is 0 and another infinite ----------------------------------

edge(
    "div",
    "by zero and by infinity",
    [[1.0, 1.0, 1.0], [0.0, INF, -INF]],
    [INF, 0, -0.0],
    [[INF, 0, -0.0], [-INF, -0.0, 0.0]],
    peer=lambda torch, a, b: a / b,
)
edge(
    "div",
    "dy / b underflows",
    [[INF, 1e300], [1e200, 1e200]],
    [INF, 1e100],
    [[0, 0], [-INF, -1e-300]],
    peer=lambda torch, a, b: a / b,
    dy=[1e-200, 1e-200],
)
# d/db a^b = a^b log a: for a -> 0 the limit is 0 for b > 0 and -infinity for b < 0. 0^b jumps at
# b = 0, where PyTorch and this engine say 0.
edge(
    "power",
    "of zero",
    [[0.0, 0, 0, 0, -0.0], [-1.0, 0, 0.5, 2, -2]],
    [INF, 1, 0, 0, INF],
    [[-INF, 0, INF, 0, INF], [-INF, 0, 0, 0, -INF]],
    peer=lambda torch, a, b: a**b,
)
edge(
    "power",
    "of infinity",
    [[INF, INF], [0.0, 2.0]],
    [1, INF],
    [[0, INF], [INF, INF]],
    peer=lambda torch, a, b: a**b,
)
tiny = 2.0**-1022  # the smallest normal number: a GPU may take smaller ones as 0
edge(
    "power",
    "dy b underflows",
    [[0.0, 0.0], [tiny, -tiny]],
    [0, INF],
    [[INF, -INF], [0, -INF]],
    peer=lambda torch, a, b: a**b,
    dy=[2.0**-60, 2.0**-60],
)
edge("sqrt", "0 and infinity", [[0.0, INF]], [0, INF], [[INF, 0]], peer=lambda torch, x: x.sqrt())
edge("log", "0 and infinity", [[0.0, INF]], [-INF, INF], [[INF, 0]], peer=lambda torch, x: x.log())
edge("exp", "infinities", [[-INF, INF]], [0, INF], [[0, INF]], peer=lambda torch, x: x.exp())
edge("tanh", "infinities", [[-INF, INF]], [-1, 1], [[0, 0]], peer=lambda torch, x: x.tanh())
edge("abs", "0", [[0.0, -0.0, -INF]], [0, 0, INF], [[0, 0, -1]], peer=lambda torch, x: x.abs())
edge("silu", "far below 0", [[-1000.0, -750.0]], [0, 0], [[0, 0]])
# x^2 is infinite, but not what follows from it.
for approximate in ("none", "tanh"):
    edge(
        "gelu",
        f"far from 0,{approximate}",
        [[1e200, -1e200, 1e4, -1e4]],
        [1e200, 0, 1e4, 0],
        [[1, 0, 1, 0]],
        quiet=True,
        approximate=approximate,
    )
edge("silu", "far from 0", [[1e300, -1e300]], [1e300, 0], [[1, 0]], quiet=True)
edge(
    "softmax",
    "one hidden",
    [[-INF, 1.0]],
    [0, 1],
    [[0, 0]],
    peer=lambda torch, x: torch.softmax(x, -1),
)
edge(
    "softmax",
    "all hidden",
    [[-INF, -INF]],
    [NAN, NAN],
    [[NAN, NAN]],
    peer=lambda torch, x: torch.softmax(x, -1),
)
edge(
    "log_softmax",
    "one hidden",
    [[-INF, 1.0]],
    [-INF, 0],
    [[1, -1]],
    peer=lambda torch, x: torch.log_softmax(x, -1),
)
# PyTorch multiplies by 0, so that there an infinity becomes NaN: nothing is kept of it here.
edge("dropout", "p=1", [[1.0, -INF, NAN]], [0, 0, 0], [[0, 0, 0]], p=1, key=1)
