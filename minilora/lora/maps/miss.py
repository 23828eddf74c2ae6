"""MiSS: dW = D^T E, where E adds up every r-th input: E[j, i] = 1 if i mod r = j (Kang & Yin 2024).

It is LoRA with B = D^T and a frozen A = E (r, I): column i of dW is row i mod r of D (r, O).
dD = E G^T. With init_weights = "mini", D repeats one block (r, mini_r) along the outputs, and the
block is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...backend import Array, Shape, backend_of
from ...errors import Rule, integer_rules, is_plain_number, number_rules, one_of
from .contract import (
    USUAL,
    Layers,
    Map,
    MapConfig,
    Theta,
    refuse_shape,
    refuse_unused,
    uniform_fan_in,
)


class MiSS(Map):
    TENSORS = ("miss_block",)

    def __init__(self, config: MapConfig, path: str, layers: Layers):
        super().__init__(config, path, layers)
        assert isinstance(config, MissConfig)
        self.width = config.mini_r if config.init_weights == "mini" else self.O
        if self.r > self.I:
            raise refuse_shape(self, f"r = {self.r} is above I", f"set r to at most {self.I}")
        if self.O % self.width:
            valid = f"set mini_r to a divisor of {self.O}"
            raise refuse_shape(self, f"mini_r = {self.width} does not divide O", valid)
        self.row_of_input = np.arange(self.I) % self.r

    def check(self) -> None:
        if self.config.init_weights != "mini":  # type: ignore[attr-defined]
            refuse_unused(self.config, "mini_r", "init_weights = 'mini'")

    def shapes(self) -> dict[str, Shape]:
        return {"miss_block": (self.r, self.width)}

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        (shape,) = self.shapes().values()
        is_random = self.config.init_weights is False  # type: ignore[attr-defined]
        return [uniform_fan_in(rng, shape) if is_random else np.zeros(shape)]

    def delta(self, theta: Theta, W: Array) -> Array:
        D = backend_of(theta[0]).xp.tile(theta[0], (1, self.O // self.width))
        return D[self.on_device(D, "row_of_input")].T

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        groups = -(-self.I // self.r)
        padded = backend_of(G).xp.zeros((groups * self.r, self.O), G.dtype)
        padded[: self.I] = G.T
        dD = padded.reshape(groups, self.r, self.O).sum(axis=0)
        return [dD.reshape(self.r, -1, self.width).sum(axis=1)]

    def rank_bound(self, W: Array) -> int:
        return min(self.r, self.O, self.I)


@dataclasses.dataclass
class MissConfig(MapConfig):
    """dW = D^T E    Kang & Yin 2024

    r              rows of D
    mini_r         columns of the block that D repeats, for init_weights="mini"
    miss_dropout   probability of dropping an element of the map's input, in training
    init_weights   True: D is zero; "mini": D repeats a block of zeros; False: D is random
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True

    peft_type = "MISS"
    method = "miss"
    title = "MiSS"
    map = MiSS
    USES = (*USUAL, "r")
    FIXED: ClassVar = {"bias": "none"}
    DROPOUT = "miss_dropout"
    RULES: ClassVar = [
        *number_rules("miss_dropout", is_kind=is_plain_number, least=0, below=1),
        *integer_rules("mini_r", least=1, limit=2**24),
        Rule("init_weights", one_of(True, False, "mini"), "True, False or 'mini'"),
    ]
