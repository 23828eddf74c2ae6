"""One weight for a whole step: W' = W + dW formed once, and a linear map by it.

Layers with the same input are one product over their stacked weights. Shapes: I in, O out (of all
layers), O_i out of layer i, r rank, N rows (all leading axes flattened).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .autograd import Grads, Tensor, namespace, record
from .backend import Array
from .functional import rows


class Pull(NamedTuple):
    """How the gradients of the parameters that formed a layer's W' follow from its X and dY.

    gradients     gradients(X, dY), with X (N, I) and dY (N, O_i), returns one array per parameter
    needs_output  call gradients(X, dY, Y) with the output Y = X W'^T (N, O_i), without the bias;
                  y is then kept until backward
    """

    gradients: Callable[..., Grads]
    needs_output: bool = False


# Parameters that formed a part of W', with the pull that gives their gradients; then all parts.
Formed = tuple[tuple[Tensor, ...], Pull]
Parts = list[Formed]


class EffectiveWeight:
    """The weight W' (O, I) in a step of layers with one input, formed once for many calls.

    weight   W', the rows of the layers one after another
    layers   for each layer: its size O_i, its bias, and the parts that formed its rows
    stacked  give the outputs in a new first axis (n, ..., O / n), for layers of equal size;
             otherwise side by side
    """

    def __init__(
        self,
        weight: Array,
        layers: Sequence[tuple[int, Tensor | None, Parts]],
        stacked: bool = False,
    ):
        self.weight = weight.reshape(len(layers), -1, weight.shape[1]) if stacked else weight
        self.stacked = stacked
        ends = itertools.accumulate(size for size, _, _ in layers)
        self.rows = [slice(end - size, end) for end, (size, _, _) in zip(ends, layers, strict=True)]
        self.biases: list[tuple[int, Tensor]] = []
        self.pulls: list[tuple[int, Pull]] = []
        params: list[Tensor] = []
        for i, (_, bias, parts) in enumerate(layers):
            if bias is not None:
                self.biases.append((i, bias))
            for formed_from, pull in parts:
                self.pulls.append((i, pull))
                params += formed_from
        self.needs_output = any(pull.needs_output for _, pull in self.pulls)
        self.inputs = (*(bias for _, bias in self.biases), *params)


def effective_linear(x: Tensor, effective: EffectiveWeight) -> Tensor:
    """y = x W'^T + b    x (..., I), W' (O, I) -> (..., O), or (n, ..., O / n) if it is stacked

    For LoRA W' is W + s B A. By the merge identity this equals `linear` followed by `lora_linear`,
    with one product in each direction instead of three; the pulls compute the gradients of A and B
    through (N, r) and never form dL/dW'.
    """
    namespace(x, *effective.inputs)
    backend = x.backend
    W = effective.weight
    pulls = effective.pulls
    stacked = effective.stacked
    slices = effective.rows
    X = rows(x.data)
    shape = x.shape
    y = backend.matmul(X, W.swapaxes(-1, -2))  # (N, I) @ (I, O) -> (N, O)

    def layer(z: Array, i: int) -> Array:
        return z[i] if stacked else z[:, slices[i]]  # a view (N, O_i)

    y_kept = y if effective.needs_output else None
    if effective.needs_output and effective.biases:
        y = y.copy()  # Y + b - b would not be Y
    for i, bias in effective.biases:
        layer(y, i)[...] += bias.data
    need_dx = x.requires_grad
    need_db = [i if bias.requires_grad else None for i, bias in effective.biases]
    X_kept = X if pulls else None
    flat = y.shape

    def vjp(dy: Array) -> Grads:
        dY = dy.reshape(flat)
        grads: list[Any] = [None]
        if need_dx and stacked:
            dX = backend.matmul(dY[0], W[0])
            for i in range(1, len(W)):
                backend.add_matmul(dX, dY[i], W[i])
            grads = [dX.reshape(shape)]
        elif need_dx:
            grads = [backend.matmul(dY, W).reshape(shape)]  # (N, O) @ (O, I) -> (N, I)
        for bias_of in need_db:
            grads.append(None if bias_of is None else layer(dY, bias_of).sum(axis=0))
        for i, pull in pulls:
            if pull.needs_output:
                grads += pull.gradients(X_kept, layer(dY, i), layer(y_kept, i))
            else:
                grads += pull.gradients(X_kept, layer(dY, i))
        return tuple(grads)

    return record(y.reshape(*flat[:-2], *shape[:-1], flat[-1]), (x, *effective.inputs), vjp)


def count_operations(
    tokens: int, inputs: int, outputs: int, r: int, normed: bool = False
) -> tuple[int, int]:
    """Operations that LoRA adds to a step over `tokens` positions: (with W + dW formed, without).

    Counted from shapes alone, so that a resumed run makes the same choice. Forming W + dW takes
    2 r I O operations and three passes over W, which weigh as much as 12 per element. The low-rank
    path takes 4 r (I + O) per position, forward and for dx, counted twice because skinny products
    run at half the speed of square ones. `normed`: that path has to form W + dW as well, to know
    its norms.
    """
    formed = inputs * outputs * (2 * r + 12)
    low_rank = tokens * 2 * 4 * r * (inputs + outputs)
    return formed, low_rank + formed * normed
