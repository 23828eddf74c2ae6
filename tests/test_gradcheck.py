"""Every gradient against a fourth-order difference; and the check itself against gradients that are slightly wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from operations import NOT_OPERATIONS, TABLE, Operation, public_operations

from minilora import functional as F
from minilora.autograd import Tensor, record
from minilora.gradcheck import check_gradient, directional_error


def test_the_table_lists_every_public_operation() -> None:
    public = set(public_operations())
    assert public - {op.name for op in TABLE} == set(NOT_OPERATIONS)
    assert {op.name for op in TABLE} <= public
    assert len({op.id for op in TABLE}) == len(TABLE)


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.id)
def test_gradient(op: Operation) -> None:
    check_gradient(op.function, *op.inputs, tolerance=op.tolerance)


# ---- the checker is checked -----------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
X = RNG.standard_normal((4, 8))
W, B = RNG.standard_normal(8), RNG.standard_normal(8)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """x rounded to 8 significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def float32(x: Any) -> Any:
    return np.float64(np.float32(x))


def gelu(x: Tensor, cubic: float = 0.044715, root: float = math.sqrt(2 / math.pi)) -> Tensor:
    """tanh GELU, with constants of its own in the backward."""
    X = x.data

    def vjp(dy: np.ndarray) -> tuple[np.ndarray]:
        t = np.tanh(root * (X + cubic * X**3))
        return (dy * (0.5 * (1 + t) + 0.5 * X * (1 - t * t) * root * (1 + 3 * cubic * X * X)),)

    return record(F.gelu(x.detach(), "tanh").data, (x,), vjp)


def layer_norm(
    x: Tensor, w: Tensor, b: Tensor, forward: float = 1e-5, backward: float = 1e-5
) -> Tensor:
    X, w_ = x.data, w.data

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, ...]:
        rstd = 1 / np.sqrt(X.var(axis=-1, keepdims=True) + backward)
        xhat = (X - X.mean(axis=-1, keepdims=True)) * rstd
        d = dy * w_
        along = d.mean(axis=-1, keepdims=True) + xhat * (d * xhat).mean(axis=-1, keepdims=True)
        return rstd * (d - along), (dy * xhat).sum(axis=0), dy.sum(axis=0)

    return record(F.layer_norm(x.detach(), w.detach(), b.detach(), forward).data, (x, w, b), vjp)


def softmax(x: Tensor, keep: Callable[[np.ndarray], np.ndarray] = np.array) -> Tensor:
    y = F.softmax(x.detach()).data
    kept = keep(y)
    return record(y, (x,), lambda dy: (kept * (dy - (dy * kept).sum(axis=-1, keepdims=True)),))


def rms_norm(x: Tensor, w: Tensor, backward: float = 1e-6) -> Tensor:
    X, w_ = x.data, w.data

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, ...]:
        rstd = 1 / np.sqrt((X * X).mean(axis=-1, keepdims=True) + backward)
        xhat, d = X * rstd, dy * w_
        return rstd * (d - xhat * (d * xhat).mean(axis=-1, keepdims=True)), (dy * xhat).sum(axis=0)

    return record(F.rms_norm(x.detach(), w.detach()).data, (x, w), vjp)


RIGHT: dict[str, tuple[Callable[..., Tensor], tuple[np.ndarray, ...]]] = {
    "gelu": (gelu, (X,)),
    "layer_norm": (layer_norm, (X, W, B)),
    "layer_norm, eps 1e-3": (lambda x, w, b: layer_norm(x, w, b, 1e-3, 1e-3), (X, W, B)),
    "softmax": (softmax, (X,)),
    "rms_norm": (rms_norm, (X, W)),
}
WRONG: dict[str, tuple[Callable[..., Tensor], tuple[np.ndarray, ...]]] = {
    "gelu: 0.0447 for 0.044715": (lambda x: gelu(x, cubic=0.0447), (X,)),
    "gelu: 0.04472 for 0.044715": (lambda x: gelu(x, cubic=0.04472), (X,)),
    "gelu: sqrt(2 / pi) to four digits": (lambda x: gelu(x, root=0.7979), (X,)),
    "gelu: a constant in float32": (lambda x: gelu(x, root=float32(math.sqrt(2 / math.pi))), (X,)),
    "layer_norm: eps 1e-6 for 1e-5": (
        lambda x, w, b: layer_norm(x, w, b, backward=1e-6),
        (X, W, B),
    ),
    "layer_norm: eps 1e-3 for 1e-5": (
        lambda x, w, b: layer_norm(x, w, b, backward=1e-3),
        (X, W, B),
    ),
    "softmax: kept in float32": (lambda x: softmax(x, float32), (X,)),
    "softmax: kept in bfloat16": (lambda x: softmax(x, bfloat16), (X,)),
    "rms_norm: eps forgotten": (lambda x, w: rms_norm(x, w, backward=0.0), (X, W)),
    "square: 2.001 for 2": (
        lambda x: record(x.data**2, (x,), lambda dy, X=x.data: (dy * 2.001 * X,)),
        (X,),
    ),
    "cube plus x: a term missing": (
        lambda x: record(x.data**3 + x.data, (x,), lambda dy, X=x.data: (dy * 3 * X**2,)),
        (X,),
    ),
    "exp: NaN": (lambda x: record(np.exp(x.data), (x,), lambda dy: (dy * np.nan,)), (X,)),
    "exp: one NaN": (
        lambda x: record(
            np.exp(x.data),
            (x,),
            lambda dy, X=x.data: (dy * np.where(X.max() == X, np.nan, np.exp(X)),),
        ),
        (X,),
    ),
    "sub: sign": (lambda a, b: record(a.data - b.data, (a, b), lambda dy: (dy, dy)), (X, X + 1)),
    "add: a broadcast sum dropped": (
        lambda a, b: record(a.data + b.data, (a, b), lambda dy: (dy, dy[0])),
        (X, B),
    ),
    "add: not summed over the rows": (
        lambda a, b: record(a.data + b.data, (a, b), lambda dy: (dy, dy)),
        (X, B),
    ),
    "mul: one gradient missing": (
        lambda a, b: record(a.data * b.data, (a, b), lambda dy, B=b.data: (dy * B, None)),
        (X, X),
    ),
    "exp: cut from the graph": (lambda x: Tensor(np.exp(x.data)), (X,)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_gradient_is_accepted(name: str) -> None:
    function, inputs = RIGHT[name]
    assert check_gradient(function, *inputs, tolerance=1e-9) < 1e-10


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_gradient_is_rejected(name: str, seed: int) -> None:
    function, inputs = WRONG[name]
    with pytest.raises(
        AssertionError,
        match=r"gradient is off by|gradient of input 1 has shape \(4, 8\), the input \(8,\)",
    ):
        check_gradient(function, *inputs, tolerance=1e-9, seed=seed)


def test_a_constant_function_has_no_error_and_a_hidden_dependence_an_infinite_one() -> None:
    assert directional_error(lambda x: Tensor(np.ones(3)), X) == 0.0
    assert directional_error(lambda x: Tensor(x.data.copy()), X) == math.inf
