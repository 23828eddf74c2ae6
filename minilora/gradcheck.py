"""Numerical proof of a gradient: a directional derivative, computed twice.

Along a random direction v, backward gives sum_i g_i v_i; a fourth-order central difference of the
function itself gives the same number independently. In float64 with h = 3e-4 the two agree to about
1e-11, so a wrong eps or a constant with one digit too few is noticed. (The usual second-order check
at a tolerance of 1e-3 lets most such mistakes pass.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .autograd import Tensor, gradients, no_grad


def directional_error(
    f: Callable[..., Tensor],
    *inputs: np.ndarray,
    directions: int = 8,
    h: float = 3e-4,
    seed: int = 0,
) -> float:
    """The largest relative difference between backward and a finite difference.

    f           takes one Tensor per input and returns a Tensor of any shape; it must be smooth
                within 2h of the inputs
    inputs      float64 arrays, all differentiated at once
    directions  how many random directions are tried
    returns     max over directions of |difference - sum g v| / sum |g v|; 0 where both are 0

    AssertionError if a gradient has another shape than its input. The output is contracted with
    fixed random weights, so every entry of the Jacobian takes part. Fourth order:
    f' = (8 (f(+h) - f(-h)) - (f(+2h) - f(-2h))) / 12h + O(h^4).
    """
    rng = np.random.default_rng(seed)
    arrays = [np.array(a, dtype=np.float64) for a in inputs]
    with no_grad():
        weights = rng.standard_normal(f(*[Tensor(a) for a in arrays]).shape)
    leaves = [Tensor(a.copy(), requires_grad=True) for a in arrays]
    y = f(*leaves)
    grads = gradients(y, leaves, weights) if y.requires_grad else [None] * len(leaves)
    for i, (g, a) in enumerate(zip(grads, arrays, strict=True)):
        # A gradient that was not summed over broadcast axes would still have the right sum.
        if g is not None and g.shape != a.shape:
            raise AssertionError(
                f"the gradient of input {i} has shape {g.shape}, the input {a.shape}"
            )

    def value(t: float, direction: Sequence[np.ndarray]) -> float:
        with no_grad():
            y = f(*[Tensor(a + t * v) for a, v in zip(arrays, direction, strict=True)])
        return float(np.sum(weights * y.data))

    worst = 0.0
    for _ in range(directions):
        direction = [rng.standard_normal(a.shape) for a in arrays]
        near = value(h, direction) - value(-h, direction)
        far = value(2 * h, direction) - value(-2 * h, direction)
        difference = (8 * near - far) / (12 * h)
        derivative = scale = 0.0
        for g, v in zip(grads, direction, strict=True):
            if g is not None:
                terms = g * v
                derivative += float(terms.sum())
                scale += float(np.abs(terms).sum())
        error = abs(difference - derivative)
        if scale:
            error /= scale
        elif error != 0:
            error = np.inf
        worst = float(np.maximum(worst, error))  # keeps a NaN, unlike max
    return worst


def check_gradient(
    f: Callable[..., Tensor], *inputs: np.ndarray, tolerance: float = 1e-9, seed: int = 0
) -> float:
    """The `directional_error` of f. AssertionError if it exceeds `tolerance`."""
    error = directional_error(f, *inputs, seed=seed)
    if not error <= tolerance:  # a NaN must fail too
        raise AssertionError(
            f"gradient is off by {error:.2e} of its scale, tolerance {tolerance:.0e}"
        )
    return error
