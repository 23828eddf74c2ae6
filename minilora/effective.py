"""Operations that make a step fast, each equal to what it says in elementary operations: the tests hold it to that.

A linear map whose weight was formed once for many calls, attention as one operation, and a loss without all its logits.
Shapes as in functional.py: B batch, T time (queries), S keys, H heads, K key/value heads, G = H / K, D head size, V
vocabulary, I in, O out, r rank, N rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .autograd import Tensor, namespace, record
from .backend import Array
from .functional import Grads, rows

# ---- one weight for a whole step ------------------------------------------------------------------------------------

Pull = Callable[
    [Array, Array], Grads
]  # from X (N, I) and dY (N, O) to the gradients of some parameters


class OfOutput(NamedTuple):
    """A pull that also reads the output Y = X W'^T (N, O), without the bias: y is then kept until backward."""

    pull: Callable[[Array, Array, Array], Grads]


Parts = list[tuple[tuple[Tensor, ...], Pull | OfOutput]]  # these parameters, and how


class EffectiveWeight:
    """The weight W' (O, I) that layers with one input have in a step, formed beforehand, once for many calls.

    weight   W', the layers' rows below each other
    layers   of each: its size O_i, its bias, and the parameters that its rows were formed of, with their pulls
    stacked  the outputs stand in a new first axis (n, ..., O / n), for layers of equal size; otherwise side by side
    """

    def __init__(
        self,
        weight: Array,
        layers: Sequence[tuple[int, Tensor | None, Parts]],
        stacked: bool = False,
    ):
        ends = list(itertools.accumulate(size for size, _, _ in layers))
        self.weight = weight.reshape(len(layers), -1, weight.shape[1]) if stacked else weight
        self.stacked = stacked
        self.rows = [slice(end - size, end) for end, (size, _, _) in zip(ends, layers, strict=True)]
        self.biases = [(i, bias) for i, (_, bias, _) in enumerate(layers) if bias is not None]
        self.pulls = [(i, pull) for i, (_, _, parts) in enumerate(layers) for _, pull in parts]
        params = (p for _, _, parts in layers for formed_of, _ in parts for p in formed_of)
        self.inputs = (*(bias for _, bias in self.biases), *params)


def effective_linear(x: Tensor, effective: EffectiveWeight) -> Tensor:
    """y = x W'^T + b    x (..., I), W' (O, I) -> (..., O), or (n, ..., O / n) if it is stacked

    For LoRA W' is W + s B A. By the merge identity this equals `linear` followed by `lora_linear`, with one product a
    direction in place of three; the pulls bring A and B their gradients by way of (N, r), never of dL/dW'.
    """
    xp, W, pulls = namespace(x, *effective.inputs), effective.weight, effective.pulls
    stacked, at, X, shape = effective.stacked, effective.rows, rows(x.data), x.shape
    y = xp.matmul(X, W.swapaxes(-1, -2))  # (N, I) @ (I, O) -> (N, O)

    def layer(z: Array, i: int) -> Array:  # its (N, O_i), a view
        return z[i] if stacked else z[:, at[i]]

    y_kept = y if any(isinstance(pull, OfOutput) for _, pull in pulls) else None
    if y_kept is not None and effective.biases:
        y = y.copy()  # Y + b - b would not be Y
    for i, bias in effective.biases:
        layer(y, i)[...] += bias.data
    need_dx, need_db = (
        x.requires_grad,
        [i if bias.requires_grad else None for i, bias in effective.biases],
    )
    X_kept, flat = X if pulls else None, y.shape

    def vjp(dy: Array) -> Grads:
        dY, dX = dy.reshape(flat), None
        if need_dx and stacked:
            dX = dY[0] @ W[0]
            for i in range(1, len(W)):
                dX += dY[i] @ W[i]
        elif need_dx:
            dX = dY @ W  # (N, O) @ (O, I) -> (N, I)
        found = [None if dX is None else dX.reshape(shape)]
        found += [None if i is None else layer(dY, i).sum(axis=0) for i in need_db]
        for i, pull in pulls:
            if isinstance(pull, OfOutput):
                found += pull.pull(X_kept, layer(dY, i), layer(y_kept, i))
            else:
                found += pull(X_kept, layer(dY, i))
        return tuple(found)

    return record(y.reshape(*flat[:-2], *shape[:-1], flat[-1]), (x, *effective.inputs), vjp)


def costs(tokens: int, inputs: int, outputs: int, r: int, normed: bool = False) -> tuple[int, int]:
    """Operations that LoRA adds to a step over `tokens` positions: (W + dW formed once, the low-rank path at each one).

    Counted from shapes alone, so that a resumed run chooses alike: 2 r I O operations and three passes over W, which
    weigh as much as 12 each element; against 4 r (I + O) a position, forward and for dx, and twice that because skinny
    products run at half the speed of square ones. `normed`: that path has to form W + dW as well, to know its norms.
    """
    formed, apart = inputs * outputs * (2 * r + 12), tokens * 2 * 4 * r * (inputs + outputs)
    return formed, apart + formed * normed


# ---- the head and its loss ------------------------------------------------------------------------------------------


# ---- attention ------------------------------------------------------------------------------------------------------
