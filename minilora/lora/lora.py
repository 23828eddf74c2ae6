"""LoRA itself: dW = s B A (Hu et al. 2021, section 4.1).

Lessons that write y = x W have dW = A B with A (I, r) and B (r, O), in the order in which x meets
them. Here y = x W^T, as in the paper, in torch and in files: the same two factors are transposed.

               x (I)
             /       \\
      W (O, I)        A (r, I)      only r numbers pass through, so rank(dW) <= r
      frozen          B (O, r)      starts at zero, so the first output is the base's, bit for bit
             \\       /  * s        s = lora_alpha / r, or lora_alpha / sqrt(r)
              y (O)                     (rsLoRA, Kalajdzievski 2023)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor
from ..backend import Array, Shape
from ..effective import Formed, Pull
from ..nn import (
    Dropout,
    LinearBase,
    Module,
    Parameter,
    describe_parameters,
    normal,
    uniform,
)
from .config import LoraConfig
from .factors import Part


class LoraAdapter(Module):
    """The trainable pair of one layer, lora_A (r, I) and lora_B (O, r), with its scaling s.

    Every adapter offers the same: its forward pass `adapter(x, y, base)`, its dW, its factors, and
    the names and shapes of its tensors.
    """

    # The trainable attributes, in the order of PEFT's files.
    TENSORS: tuple[str, ...] = ("lora_A", "lora_B")
    SUFFIX = ".weight"  # ends their names in PEFT's files, where each is a module's weight
    INSIDE = ""  # follows the layer's path in these names
    NORMED = False  # whether it scales each row of W + dW by the row's norm
    MIXED = False  # whether it adds a different matrix at every position
    # A0 and B0, if its start changed the base: see starts/layers.py.
    initial: tuple[np.ndarray, np.ndarray] | None = None
    FORMED = False  # whether it computes dW in any case, even where a step does not ask for it
    SHARED: tuple[str, ...] = ()  # tensors that all layers of a model share
    ALONE = ""  # why no other adapter can run beside it: completes "adapter 'a' ..."
    reads_W = False  # whether dW depends on the base's weight

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
    ):
        self.r = r = config.rank(name)
        self.lora_alpha = config.layer_alpha(name)
        self.scaling = config.scaling(name)
        self.dropout = Dropout(config.lora_dropout, stream)
        init = config.init_lora_weights
        I = base.in_features
        O = base.out_features
        if init == "gaussian":
            A = normal(rng, 1 / r, (r, I), base.dtype)
        else:
            # The bound of PEFT's kaiming_uniform(a = sqrt 5): sqrt(2 / 6) sqrt(3 / in).
            A = uniform(rng, 1 / math.sqrt(I), (r, I), base.dtype)
        if init is False:
            B = uniform(rng, 1 / math.sqrt(r), (O, r), base.dtype)
        else:
            B = np.zeros((O, r), base.dtype)
        self.lora_A = Parameter(base.backend.from_numpy(A))
        self.lora_B = Parameter(base.backend.from_numpy(B))

    def __repr__(self) -> str:
        """One line: r, lora_alpha, the shapes, dtype and requires_grad."""
        dropout = f", lora_dropout={self.dropout.p}" if self.dropout.p else ""
        numbers = f"r={self.r}, lora_alpha={self.lora_alpha}{dropout}"
        return f"{type(self).__name__}({numbers}, {describe_parameters(self)})"

    @staticmethod
    def shapes(base: Any, r: int) -> dict[str, Shape]:
        """The shapes of the trainable tensors of a layer over `base`: r (in + out) numbers."""
        return {"lora_A": (r, base.in_features), "lora_B": (base.out_features, r)}

    @property
    def first_factor(self) -> Tensor:
        """The matrix (r, I) that multiplies x first: A, or diag(E) A for AdaLoRA."""
        return self.lora_A

    def factors(self, dtype: Any) -> tuple[Array, Array]:
        """(first factor (r, I), B (O, r)) in `dtype`, so that dW = s B @ first factor."""
        return self.lora_A.data.astype(dtype), self.lora_B.data.astype(dtype)

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y, the layer's output so far, plus s B A x.    x (..., I), y (..., O) -> (..., O)"""
        return F.lora_linear(self.dropout(x), y, self.first_factor, self.lora_B, self.scaling)

    def delta_weight(self, W: Array) -> Array:
        """dW = s B A (O, I) for the base's weight W (O, I), in the dtype of W."""
        A, B = self.factors(W.dtype)
        return self.lora_A.backend.matmul(B, A, scale=self.scaling)

    def part(self, W: Array | None = None) -> Part:
        """dW as float64 factors on the host, for merging and adding up.

        W (O, I), the base's weight as stored, is for methods whose dW depends on it.
        """
        A, B = self.factors(np.float64)
        to_numpy = self.lora_A.backend.to_numpy
        return Part(to_numpy(A), to_numpy(B), self.scaling)

    def move_bias(self, bias: Any) -> Any:
        """The bias that the layer has with this adapter: the base's, but for few methods."""
        return bias

    def write_effective_weight(self, W: Array, base: LinearBase | None = None) -> Formed:
        """Add dW to W (O, I) in place; returns (parameters, function of their gradients).

        base   the layer's own, for methods whose dW depends on it: W may be a sum already
        """
        return (self.lora_A, self.lora_B), Pull(self._add_update(W, self.lora_A.data))

    def _add_update(self, W: Array, a: Array) -> Callable[[Array, Array], tuple[Array, Array]]:
        """Add dW = s B a to W (O, I) in place; returns the function (X, dY) -> (da, dB).

        a is the first factor (r, I). With G = dL/dW' = dY^T X the gradients are da = s B^T G and dB
        = s G a^T. They are computed through (N, r); G is never formed.
        """
        backend = self.lora_A.backend
        b = self.lora_B.data
        s = self.scaling
        backend.add_matmul(W, b, a, scale=s)
        a_t = backend.transpose_for_products(a)

        def pull(X: Array, dY: Array) -> tuple[Array, Array]:
            dU = backend.matmul(dY, b, scale=s)  # (N, O) @ (O, r) -> (N, r)
            da = backend.matmul(dU.T, X)  # (r, N) @ (N, I) -> (r, I)
            U = backend.matmul(X, a_t, scale=s)  # (N, I) @ (I, r) -> (N, r)
            return da, backend.matmul(dY.T, U)  # dB (O, r)

        return pull
