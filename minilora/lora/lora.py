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
from ..backend import Array, Backend
from ..nn import Dropout, Module, Parameter, normal, uniform
from .config import LoraConfig


class LoraAdapter(Module):
    """The trainable pair of one layer: lora_A (r, I) and lora_B (O, r), with its scaling s.

    An adapter is: its forward `adapter(x, y)`, its merged weight, its tensors and their shapes. A relative of LoRA
    has the same.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        dtype: Any,
        backend: Backend,
        stream: int,
    ):
        self.scaling = config.scaling(name)
        self.dropout = Dropout(config.lora_dropout, stream)
        shapes = self.shapes(in_features, out_features, config.rank(name))
        r = config.rank(name)
        # Kaiming-uniform with a = sqrt(5), as in PEFT: gain sqrt(2 / (1 + 5)) times sqrt(3 / in) is 1 / sqrt(in).
        A = uniform(rng, 1 / math.sqrt(in_features), shapes["lora_A"], dtype)
        B = np.zeros(shapes["lora_B"], dtype)
        if config.init_lora_weights == "gaussian":
            A = normal(rng, 1 / r, shapes["lora_A"], dtype)
        elif config.init_lora_weights is False:
            B = uniform(rng, 1 / math.sqrt(r), shapes["lora_B"], dtype)
        self.lora_A = Parameter(backend.from_numpy(A))
        self.lora_B = Parameter(backend.from_numpy(B))

    @staticmethod
    def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, int]]:
        """The trainable tensors by name: r (in + out) numbers."""
        return {"lora_A": (r, in_features), "lora_B": (out_features, r)}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """What the layer gives, y = base(x), with this adapter added.    x (..., I), y (..., O) -> (..., O)"""
        return F.lora_linear(self.dropout(x), y, self.lora_A, self.lora_B, self.scaling)

    def merged_weight(self, W: Array) -> Array:
        """W + s B A in the precision of W (O, I), which is left as it is."""
        A, B = self.lora_A.data.astype(W.dtype), self.lora_B.data.astype(W.dtype)
        return W + (B @ A) * self.scaling
