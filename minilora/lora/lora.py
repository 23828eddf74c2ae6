"""LoRA itself: dW = s B A (Hu et al. 2021, section 4.1).

               x (I)
             /       \\
      W (O, I)        A (r, I)      r numbers are all that passes: rank(dW) <= r
      frozen          B (O, r)      starts at zero, so the start is the base, bit for bit
             \\       /  * s        s = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)
              y (O)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor
from ..backend import Array
from ..effective import Pull
from ..nn import Dropout, LinearBase, Module, Parameter, normal, uniform
from .config import LoraConfig
from .factors import Part, float64


class LoraAdapter(Module):
    """The trainable pair of one layer: lora_A (r, I) and lora_B (O, r), with its scaling s.

    What every adapter offers: its forward `adapter(x, y, base)`, its dW, and its tensors' names and shapes.
    """

    TENSORS: tuple[str, ...] = (
        "lora_A",
        "lora_B",
    )  # the trainable attributes, in the order of PEFT's files
    SUFFIX = ".weight"  # of their names there, where each is a module's weight
    NORMED = False  # does it scale the rows of W + dW by their norms?
    MIXED = False  # is what it adds another matrix for every position?

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
    ):
        self.r = r = config.rank(name)
        self.scaling = config.scaling(name)
        self.dropout = Dropout(config.lora_dropout, stream)
        init, I, O, dtype = (
            config.init_lora_weights,
            base.in_features,
            base.out_features,
            base.dtype,
        )
        # PEFT's kaiming_uniform(a = sqrt 5) has the bound sqrt(2 / 6) sqrt(3 / in) = 1 / sqrt(in).
        A = (
            normal(rng, 1 / r, (r, I), dtype)
            if init == "gaussian"
            else uniform(rng, 1 / math.sqrt(I), (r, I), dtype)
        )
        B = (
            np.zeros((O, r), dtype)
            if init is not False
            else uniform(rng, 1 / math.sqrt(r), (O, r), dtype)
        )
        self.lora_A = Parameter(base.backend.from_numpy(A))
        self.lora_B = Parameter(base.backend.from_numpy(B))

    @staticmethod
    def shapes(base: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of a layer over `base`, by name: r (in + out) numbers."""
        return {"lora_A": (r, base.in_features), "lora_B": (base.out_features, r)}

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y, what the layer gives so far, with this adapter added.    x (..., I), y (..., O) -> (..., O)"""
        return F.lora_linear(self.dropout(x), y, self.lora_A, self.lora_B, self.scaling)

    def delta_weight(self, W: Array) -> Array:
        """dW = s B A (O, I), over the base's weight W (O, I) and in its precision."""
        A, B = self.lora_A.data.astype(W.dtype), self.lora_B.data.astype(W.dtype)
        return (B @ A) * self.scaling

    def part(self) -> Part:
        """dW as float64 factors on the host."""
        return Part(float64(self.lora_A), float64(self.lora_B), self.scaling)

    def effective(self, W: Array) -> tuple[tuple[Tensor, ...], Pull]:
        """Add dW to W (O, I) in place; returns the parameters, and how their gradients are found.

        With G = dL/dW' = dY^T X they are dA = s B^T G and dB = s G A^T, by way of (N, r) and never of G.
        """
        xp, a, b, s = self.lora_A.backend.xp, self.lora_A.data, self.lora_B.data, self.scaling
        delta = b @ a
        delta *= s
        W += delta
        a_t = xp.ascontiguousarray(a.T)  # BLAS reads it twice as fast where r is small

        def pull(X: Array, dY: Array) -> F.Grads:
            dU = (dY @ b) * s  # (N, O) @ (O, r) -> (N, r)
            return dU.T @ X, dY.T @ ((X @ a_t) * s)  # dA (r, I), dB (O, r)

        return (self.lora_A, self.lora_B), Pull(pull)
