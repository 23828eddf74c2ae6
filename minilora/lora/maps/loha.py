"""LoHa: dW = s (A1 B1) ∘ (A2 B2), of rank r^2 for 2 r (I + O) numbers (Hyeon-Woo et al. 2022).

A1, A2 (O, r), B1, B2 (r, I). The entrywise product of two matrices of rank r has rank at most r^2,
and reaches it. With P = A1 B1 and Q = A2 B2, dP = s G ∘ Q and dQ = s G ∘ P. So dA1 = dP B1^T,
dB1 = A1^T dP, dA2 = dQ B2^T and dB2 = A2^T dQ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...backend import Array, Shape
from ...errors import Rule, is_flag, is_plain_number, number_rules
from .contract import USUAL, Map, MapConfig, Theta, uniform_fan_in


class LoHa(Map):
    TENSORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def shapes(self) -> dict[str, Shape]:
        a = self.O, self.r
        b = self.r, self.I
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        a1, b1, a2, b2 = (uniform_fan_in(rng, shape) for shape in self.shapes().values())
        return a1, b1, a2, b2 * (not self.config.init_weights)  # type: ignore[attr-defined]

    def delta(self, theta: Theta, W: Array) -> Array:
        a1, b1, a2, b2 = theta
        return self.s * (a1 @ b1) * (a2 @ b2)

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        a1, b1, a2, b2 = theta
        dP = self.s * G * (a2 @ b2)
        dQ = self.s * G * (a1 @ b1)
        return dP @ b1.T, a1.T @ dP, dQ @ b2.T, a2.T @ dQ

    def rank_bound(self, W: Array) -> int:
        return min(self.r**2, self.O, self.I)


@dataclasses.dataclass
class LoHaConfig(MapConfig):
    """dW = (alpha / r) (A1 B1) ∘ (A2 B2)    Hyeon-Woo et al. 2022

    alpha          scaling is alpha / r
    init_weights   True: A2 B2 is zero; False: all four factors random
    """

    alpha: float = 8
    init_weights: bool = True

    peft_type = "LOHA"
    method = "loha"
    title = "LoHa"
    map = LoHa
    USES = (*USUAL, "r", "rank_pattern", "alpha_pattern")
    FIXED: ClassVar = {"use_effective_conv2d": False}
    IN_TRAINING: ClassVar = {"rank_dropout": 0.0, "module_dropout": 0.0}
    RULES: ClassVar = [
        *number_rules("alpha", is_kind=is_plain_number, above=0, below=1e300),
        Rule("init_weights", is_flag, "True or False"),
    ]
