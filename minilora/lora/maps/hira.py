"""HiRA: dW = W ∘ (B A), of rank up to r rank(W) for r (I + O) numbers (Huang et al. 2025).

A (r, I), B (O, r). With H = G ∘ W in the place of G, the gradients are those of LoRA: dA = B^T H,
dB = H A^T. Where W is 0, so is dW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...backend import Array, Shape
from ...errors import Rule, is_plain_number, number_rules, one_of
from .contract import USUAL, Map, MapConfig, Theta, uniform_fan_in


class HiRA(Map):
    TENSORS = ("hira_A", "hira_B")
    reads_W = True

    def shapes(self) -> dict[str, Shape]:
        return {"hira_A": (self.r, self.I), "hira_B": (self.O, self.r)}

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        how = self.config.init_weights  # type: ignore[attr-defined]
        A, B = (rng.standard_normal(shape) for shape in self.shapes().values())
        if how is False:
            return A, B
        return A / self.r if how == "gaussian" else uniform_fan_in(rng, A.shape), 0 * B

    def delta(self, theta: Theta, W: Array) -> Array:
        A, B = theta
        return W * (B @ A)

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        A, B = theta
        H = G * W
        return B.T @ H, H @ A.T

    def rank_bound(self, W: Array) -> int:
        return min(self.r * int(np.linalg.matrix_rank(W)), self.O, self.I)


@dataclasses.dataclass
class HiraConfig(MapConfig):
    """dW = W ∘ (B A)    Huang et al. 2025

    hira_dropout   probability of dropping an element of the map's input, in training
    init_weights   True: A uniform, B zero; "gaussian": A ~ N(0, 1/r^2), B zero; False: both N(0, 1)
    """

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str = True

    peft_type = "HIRA"
    method = "hira"
    title = "HiRA"
    map = HiRA
    USES = (*USUAL, "r", "rank_pattern", "fan_in_fan_out")
    DROPOUT = "hira_dropout"
    RULES: ClassVar = [
        *number_rules("hira_dropout", is_kind=is_plain_number, least=0, below=1),
        Rule("init_weights", one_of(True, False, "gaussian"), "True, False or 'gaussian'"),
    ]
