"""HydraLoRA: one A and several B's, mixed at every position (Tian et al. 2024, eq. (6)).

                x (I)
             /    |    \\
      W (O, I)    |     A (r, I)          one: what the tasks have in common
      frozen      |    /  |   \\
             \\    |   B_1  B_2 .. B_k     k experts (O, r), zero at the start: what differs
              \\   R (k, I)                router: w = softmax(R x), which adds up to 1
               \\  |    /  * s w_i
                y (O)                     y = W x + s sum_i w_i(x) B_i A x

Training finds out which expert serves what (section 3.2), so no position needs the name of a task.
But a different matrix is added to W at every position, so a single dW does not exist: HydraLoRA can
be neither merged nor exported as plain LoRA. PEFT has no such method. A saved adapter has the
layout of PEFT's files and is read by minilora alone.

lora_B (O, k r) holds the B_i side by side, so that the mixture is one product: with u = A x (r)

    sum_i w_i B_i u = lora_B z,    z = (w_1 u, w_2 u, .. w_k u)  (k r)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, namespace, record
from ..backend import Array, Shape
from ..errors import ConfigError, Rule, check_fields, integer_rules, one_of
from ..nn import LinearBase, Parameter, uniform
from .config import LoraConfig
from .factors import Part
from .lora import LoraAdapter

RULES = [
    *integer_rules("experts", least=1, limit=2**10),
    Rule("use_dora", one_of(False), "False: a mixture has no magnitude"),
    Rule("init_lora_weights", one_of(True, False, "gaussian"), "True, False or 'gaussian'"),
]


@dataclasses.dataclass
class HydraConfig(LoraConfig):
    """One A and `experts` B's, softly mixed at every position (Tian et al. 2024).

    experts   k, the number of B's; with one, the adapter is LoRA's

    The other fields are LoraConfig's; r is the rank of every expert. As in the authors' code,
    dropout applies to the input of A, not to the input of the router. use_dora has no meaning:
    ConfigError.
    """

    experts: int = 3

    peft_type = "HYDRALORA"  # minilora's own name

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(vars(self), RULES)


class HydraAdapter(LoraAdapter):
    """The trainable tensors of one layer: lora_A (r, I), lora_B (O, k r) and lora_route, R (k, I).

    lora_B holds the experts side by side.
    """

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
        k = config.experts
        I = base.in_features
        from_numpy = base.backend.from_numpy
        bound = 1 / math.sqrt(self.r) if config.init_lora_weights is False else 0.0
        experts = [self.lora_B.numpy()]
        for _ in range(k - 1):
            experts.append(uniform(rng, bound, experts[0].shape, base.dtype))
        self.lora_B = Parameter(from_numpy(np.concatenate(experts, axis=1)))
        self.lora_route = Parameter(from_numpy(uniform(rng, 1 / math.sqrt(I), (k, I), base.dtype)))

    @staticmethod
    def shapes(base: Any, r: int, experts: int = 1) -> dict[str, Shape]:
        """The shapes of the trainable tensors over `base`: r in + k (r out + in) numbers."""
        I = base.in_features
        O = base.out_features
        return {"lora_A": (r, I), "lora_B": (O, experts * r), "lora_route": (experts, I)}

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y plus the mixture s sum_i w_i B_i A x.    x (..., I), y (..., O) -> (..., O)"""
        return mixture(self.dropout(x), y, self.weights(x), self.lora_A, self.lora_B, self.scaling)

    def weights(self, x: Tensor) -> Tensor:
        """w = softmax(R x), each expert's share at every position.    x (..., I) -> (..., k)"""
        return F.softmax(F.linear(x, self.lora_route))

    def delta_weight(self, W: Array) -> Array:
        """Always ConfigError: HydraLoRA has no dW."""
        return self.part().A

    def part(self, W: Array | None = None) -> Part:
        """Always ConfigError: HydraLoRA has no dW, so it cannot be merged."""
        raise ConfigError(
            "HydraLoRA cannot be merged, because it mixes its experts at every position and has no "
            "single dW: run it unmerged"
        )


def mixture(x: Tensor, y: Tensor, w: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s sum_i w_i B_i A x    (Tian et al. 2024, eq. (6))

    x (..., I), y (..., O), w (..., k), A (r, I), B (O, k r) -> (..., O)

    B holds the B_i (O, r) side by side. With z_i = w_i u for u = A x, and dz = s B^T dy: du = sum_i
    w_i dz_i and dw_i = dz_i . u; the other gradients are LoRA's.
    """
    namespace(x, y, w, A, B)
    backend = x.backend
    X = F.rows(x.data)  # (N, I)
    V = F.rows(w.data)  # (N, k)
    a = A.data
    b = B.data
    s = float(scaling)
    N = len(X)
    r = len(a)
    k = V.shape[1]
    U = backend.matmul(X, a.T)  # (N, I) @ (I, r) -> (N, r)

    def spread() -> Array:
        """z (N, k r), k times as large as u, and so computed again for the backward pass."""
        return (V[:, :, None] * U[:, None, :]).reshape(N, k * r)

    out = backend.matmul(spread(), b.T, scale=s).reshape(y.shape)  # (N, k r) @ (k r, O) -> (N, O)
    out += y.data
    # What the gradients need, so that the graph keeps nothing else.
    x_shape = x.shape
    w_shape = w.shape
    need_dx = x.requires_grad
    need_dB = B.requires_grad
    X_of_dA = X if A.requires_grad else None

    def vjp(dy: Array) -> F.Grads:
        dY = F.rows(dy)  # (N, O)
        dZ = backend.matmul(dY, b, scale=s).reshape(N, k, r)  # (N, O) @ (O, k r)
        dU = (V[:, :, None] * dZ).sum(axis=1)  # (N, r)
        dw = (dZ * U[:, None, :]).sum(axis=2).reshape(w_shape)
        dx = dA = dB = None
        if need_dx:
            dx = backend.matmul(dU, a).reshape(x_shape)  # (N, r) @ (r, I) -> (N, I)
        if X_of_dA is not None:
            dA = backend.matmul(dU.T, X_of_dA)  # (r, N) @ (N, I) -> (r, I)
        if need_dB:
            dB = backend.matmul(dY.T, spread(), scale=s)  # (O, N) @ (N, k r) -> (O, k r)
        return dx, dy, dw, dA, dB

    return record(out, (x, y, w, A, B), vjp)
