"""HydraLoRA: one A, several B's, mixed anew at every position (Tian et al. 2024, section 3.2 and eq. (6)).

                x (I)
             /    |    \\
      W (O, I)    |     A (r, I)          one: what tasks have in common
      frozen      |    /  |   \\
             \\    |   B_1  B_2 .. B_k     k experts (O, r), all zero at the start: what is a task's own
              \\   R (k, I)                router: w = softmax(R x), which adds up to 1
               \\  |    /  * s w_i
                y (O)                     y = W x + s sum_i w_i(x) B_i A x

Which expert is for what is found out in training: no position needs a task's name. But the matrix that is added to W
is another one at every position, so there is no dW: nothing to merge, and no plain LoRA to export. PEFT has no such
method either. A saved adapter has the layout of PEFT's files and is read by minilora alone.

The B_i stand side by side in lora_B (O, k r), so that the mixture is one product: with u = A x (r)

    sum_i w_i B_i u = lora_B z,    z = (w_1 u, w_2 u, .. w_k u)  (k r)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, namespace, record
from ..backend import Array
from ..errors import ConfigError
from ..nn import LinearBase, Parameter, uniform
from .config import LoraConfig
from .factors import Part
from .lora import LoraAdapter


@dataclasses.dataclass
class HydraConfig(LoraConfig):
    """One A and `experts` B's, softly mixed at every position (Tian et al. 2024).

    experts   k, how many B's; with one, the adapter is LoRA's

    The other fields are LoraConfig's; r is the rank of every expert. As in the authors' code dropout falls on what A
    reads, not on what the router reads. use_dora means nothing here: ConfigError.
    """

    experts: int = 3

    peft_type = "HYDRALORA"  # a word of our own

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(
            type(self.experts) is int and 0 < self.experts < 2**10,
            "experts",
            "an integer of at least 1",
        )
        self._need(self.use_dora is False, "use_dora", "False: a mixture has no magnitude")


class HydraAdapter(LoraAdapter):
    """What one layer trains: lora_A (r, I), the experts side by side in lora_B (O, k r), and lora_route, R (k, I)."""

    TENSORS = (*LoraAdapter.TENSORS, "lora_route")
    MIXED = True

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
    ):
        assert isinstance(config, HydraConfig)
        super().__init__(base, name, config, rng, stream)  # A, as in LoRA, and the first expert
        k, from_numpy, I, first = (
            config.experts,
            base.backend.from_numpy,
            base.in_features,
            self.lora_B.numpy(),
        )
        bound = 1 / math.sqrt(self.r) if config.init_lora_weights is False else 0.0
        others = [uniform(rng, bound, first.shape, base.dtype) for _ in range(k - 1)]
        self.lora_B = Parameter(from_numpy(np.concatenate([first, *others], axis=1)))
        self.lora_route = Parameter(from_numpy(uniform(rng, 1 / math.sqrt(I), (k, I), base.dtype)))

    @staticmethod
    def shapes(base: Any, r: int, experts: int = 1) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of a layer over `base`, by name: r in + k (r out + in) numbers."""
        I, O = base.in_features, base.out_features
        return {"lora_A": (r, I), "lora_B": (O, experts * r), "lora_route": (experts, I)}

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y with the mixture added.    x (..., I), y (..., O) -> (..., O)"""
        return mixture(self.dropout(x), y, self.weights(x), self.lora_A, self.lora_B, self.scaling)

    def weights(self, x: Tensor) -> Tensor:
        """w = softmax(R x), how much of each expert every position gets.    x (..., I) -> (..., k)"""
        return F.softmax(F.linear(x, self.lora_route))

    def delta_weight(self, W: Array) -> Array:
        """ConfigError: HydraLoRA has no dW."""
        return self.part().A

    def part(self) -> Part:
        """ConfigError: HydraLoRA cannot be merged."""
        raise ConfigError(
            "HydraLoRA cannot be merged: it mixes its experts anew at every position, so there is no dW"
        )


def mixture(x: Tensor, y: Tensor, w: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s sum_i w_i B_i A x    x (..., I), y (..., O), w (..., k), A (r, I), B (O, k r) -> (..., O)    eq. (6)

    B holds the B_i (O, r) side by side. With z_i = w_i u for u = A x, and dz = s B^T dy: du = sum_i w_i dz_i and
    dw_i = dz_i . u; the rest is as in LoRA.
    """
    namespace(x, y, w, A, B)
    X, V, a, b, shape, scaling = (
        F.rows(x.data),
        F.rows(w.data),
        A.data,
        B.data,
        x.shape,
        float(scaling),
    )
    N, k, r = len(X), V.shape[1], len(a)
    U = X @ a.T  # (N, I) @ (I, r) -> (N, r)

    def spread() -> Array:
        return (V[:, :, None] * U[:, None, :]).reshape(
            N, k * r
        )  # z: k times as much as u, so it is not kept

    out = (spread() @ b.T).reshape(y.shape)  # (N, k r) @ (k r, O) -> (N, O)
    out *= scaling
    out += y.data
    like, need_dx, need_dB, X_kept = (
        w.shape,
        x.requires_grad,
        B.requires_grad,
        X if A.requires_grad else None,
    )

    def vjp(dy: Array) -> F.Grads:
        dY = F.rows(dy)  # (N, O)
        dZ = ((dY @ b) * scaling).reshape(N, k, r)  # (N, O) @ (O, k r)
        dU = (V[:, :, None] * dZ).sum(axis=1)  # (N, r)
        dw = (dZ * U[:, None, :]).sum(axis=2).reshape(like)
        dx = (dU @ a).reshape(shape) if need_dx else None  # (N, r) @ (r, I) -> (N, I)
        dA = None if X_kept is None else dU.T @ X_kept  # (r, N) @ (N, I) -> (r, I)
        dB = (dY.T @ spread()) * scaling if need_dB else None  # (O, N) @ (N, k r) -> (O, k r)
        return dx, dy, dw, dA, dB

    return record(out, (x, y, w, A, B), vjp)
