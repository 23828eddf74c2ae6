"""Every gradient against a fourth-order difference; and the check itself against small mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from operations import NOT_OPERATIONS, TABLE, public_operations

from minilora import functional as F
from minilora.autograd import Grads, Tensor, record
from minilora.gradcheck import check_gradient, directional_error


def test_operations_table_lists_every_public_operation():
    public = set(public_operations())
    listed = {op.name for op in TABLE}
    assert public - listed == set(NOT_OPERATIONS)
    assert listed <= public
    assert len({op.id for op in TABLE}) == len(TABLE)


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.id)
def test_check_gradient_accepts_every_operation(op):
    check_gradient(op.function, *op.inputs, tolerance=op.tolerance)


# ---- the check is checked: functions whose backward is wrong, or written in another way ----------

RNG = np.random.default_rng(5)
X = RNG.standard_normal((4, 8))
W = RNG.standard_normal(8)
B = RNG.standard_normal(8)
ROOT = math.sqrt(2 / math.pi)
RIGHT: dict[str, Callable[[], float]] = {}
WRONG: dict[str, Callable[[int], float]] = {}


def right(name: str, function: Callable[..., Tensor], *inputs: np.ndarray) -> None:
    RIGHT[name] = lambda: check_gradient(function, *inputs, tolerance=1e-9)


def wrong(name: str, function: Callable[..., Tensor], *inputs: np.ndarray) -> None:
    WRONG[name] = lambda seed: check_gradient(function, *inputs, tolerance=1e-9, seed=seed)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """x rounded to 8 significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def float32(x: Any) -> Any:
    return np.float64(np.float32(x))


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(axis=-1, keepdims=True)


def gelu(cubic: float = 0.044715, root: float = ROOT) -> Callable[[Tensor], Tensor]:
    """tanh GELU with other constants in the backward."""

    def function(x: Tensor) -> Tensor:
        X = x.data

        def vjp(dy: np.ndarray) -> Grads:
            t = np.tanh(root * (X + cubic * X**3))
            slope = root * (1 + 3 * cubic * X * X)
            return (dy * (0.5 * (1 + t) + 0.5 * X * (1 - t * t) * slope),)

        return record(F.gelu(x.detach(), "tanh").data, (x,), vjp)

    return function


def layer_norm(forward: float = 1e-5, backward: float = 1e-5) -> Callable[..., Tensor]:
    """layer_norm with another eps in the backward."""

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        X = x.data
        weight = w.data

        def vjp(dy: np.ndarray) -> Grads:
            rstd = 1 / np.sqrt(X.var(axis=-1, keepdims=True) + backward)
            xhat = (X - mean(X)) * rstd
            d = dy * weight
            dx = rstd * (d - mean(d) - xhat * mean(d * xhat))
            return dx, (dy * xhat).sum(axis=0), dy.sum(axis=0)

        y = F.layer_norm(x.detach(), w.detach(), b.detach(), forward)
        return record(y.data, (x, w, b), vjp)

    return function


def softmax(keep: Callable[[np.ndarray], np.ndarray] = np.array) -> Callable[[Tensor], Tensor]:
    """softmax whose backward reads keep(y)."""

    def function(x: Tensor) -> Tensor:
        y = F.softmax(x.detach()).data
        kept = keep(y)

        def vjp(dy: np.ndarray) -> Grads:
            return (kept * (dy - (dy * kept).sum(axis=-1, keepdims=True)),)

        return record(y, (x,), vjp)

    return function


def rms_norm(backward: float = 1e-6) -> Callable[..., Tensor]:
    """rms_norm with another eps in the backward."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        X = x.data
        weight = w.data

        def vjp(dy: np.ndarray) -> Grads:
            rstd = 1 / np.sqrt(mean(X * X) + backward)
            xhat = X * rstd
            d = dy * weight
            return rstd * (d - xhat * mean(d * xhat)), (dy * xhat).sum(axis=0)

        return record(F.rms_norm(x.detach(), w.detach()).data, (x, w), vjp)

    return function


def unary(forward: Callable[..., Any], slope: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """forward(x), with dy * slope(x) for its gradient."""

    def function(x: Tensor) -> Tensor:
        X = x.data
        return record(forward(X), (x,), lambda dy: (dy * slope(X),))

    return function


def binary(forward: Callable[..., Any], vjp: Callable[..., Grads]) -> Callable[..., Tensor]:
    """forward(a, b), with vjp(dy, b) for its gradients."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        second = b.data
        return record(forward(a.data, second), (a, b), lambda dy: vjp(dy, second))

    return function


def one_nan(x: np.ndarray) -> np.ndarray:
    return np.where(x.max() == x, np.nan, np.exp(x))


right("gelu", gelu(), X)
right("layer_norm", layer_norm(), X, W, B)
right("layer_norm, eps 1e-3", layer_norm(1e-3, 1e-3), X, W, B)
right("softmax", softmax(), X)
right("rms_norm", rms_norm(), X, W)
wrong("gelu: 0.0447 for 0.044715", gelu(cubic=0.0447), X)
wrong("gelu: 0.04472 for 0.044715", gelu(cubic=0.04472), X)
wrong("gelu: sqrt(2 / pi) to four digits", gelu(root=0.7979), X)
wrong("gelu: a constant in float32", gelu(root=float32(ROOT)), X)
wrong("layer_norm: eps 1e-6 for 1e-5", layer_norm(backward=1e-6), X, W, B)
wrong("layer_norm: eps 1e-3 for 1e-5", layer_norm(backward=1e-3), X, W, B)
wrong("softmax: kept in float32", softmax(float32), X)
wrong("softmax: kept in bfloat16", softmax(bfloat16), X)
wrong("rms_norm: eps forgotten", rms_norm(0.0), X, W)
wrong("square: 2.001 for 2", unary(lambda x: x**2, lambda x: 2.001 * x), X)
wrong("cube plus x: a term missing", unary(lambda x: x**3 + x, lambda x: 3 * x**2), X)
wrong("exp: NaN", unary(np.exp, lambda x: np.nan), X)
wrong("exp: one NaN", unary(np.exp, one_nan), X)
wrong("sub: sign", binary(np.subtract, lambda dy, b: (dy, dy)), X, X + 1)
wrong("add: a broadcast sum dropped", binary(np.add, lambda dy, b: (dy, dy[0])), X, B)
wrong("add: not summed over the rows", binary(np.add, lambda dy, b: (dy, dy)), X, B)
wrong("mul: one gradient missing", binary(np.multiply, lambda dy, b: (dy * b, None)), X, X)
wrong("exp: cut from the graph", lambda x: Tensor(np.exp(x.data)), X)


@pytest.mark.parametrize("name", RIGHT)
def test_check_gradient_accepts_a_right_gradient(name):
    assert RIGHT[name]() < 1e-10


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("seed", range(3))
def test_check_gradient_rejects_a_wrong_gradient(name, seed):
    is_off = "gradient is off by"
    if name == "add: not summed over the rows":
        is_off = r"gradient of input 1 has shape \(4, 8\), the input \(8,\)"
    with pytest.raises(AssertionError, match=is_off):
        WRONG[name](seed)


def test_directional_error_is_0_for_a_constant_and_infinite_for_a_hidden_dependence():
    assert directional_error(lambda x: Tensor(np.ones(3)), X) == 0.0
    assert directional_error(lambda x: Tensor(x.data.copy()), X) == math.inf
