"""VeRA: dW = diag(b) B diag(d) A, with A and B random, frozen and shared (Kopiczko et al. 2024).

A layer trains d (r,) and b (O,). It takes the first I columns of one A (r, max I) and the first O
rows of one B (max O, r), which torch's random numbers by projection_prng_key give. With K = G A^T
(O, r), dd has the column sums of diag(b) B ∘ K, and db the row sums of B diag(d) ∘ K.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...backend import Array, Shape
from ...errors import Rule, integer_rules, is_flag, is_plain_number, number_rules
from .contract import LARGE, Map, MapConfig, Theta, refuse_unused
from .streams import torch_uniform, torch_words


class VeRA(Map):
    TENSORS = ("vera_lambda_d", "vera_lambda_b")
    SHARED = ("vera_A", "vera_B")

    def shapes(self) -> dict[str, Shape]:
        return {"vera_lambda_d": (self.r,), "vera_lambda_b": (self.O,)}

    def shared_shapes(self) -> dict[str, Shape]:
        most_O, most_I = (max(sizes) for sizes in zip(*self.layers.values(), strict=True))
        return {"vera_A": (self.r, most_I), "vera_B": (most_O, self.r)}

    @property
    def saves_shared(self) -> bool:
        return bool(self.config.save_projection)  # type: ignore[attr-defined]

    def check(self) -> None:
        if not self.config.init_weights:  # type: ignore[attr-defined]
            refuse_unused(self.config, "d_initial", "init_weights = True")

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        if self.config.init_weights:  # type: ignore[attr-defined]
            return np.full(self.r, self.config.d_initial), np.zeros(self.O)  # type: ignore[attr-defined]
        return rng.standard_normal(self.r), np.ones(self.O)

    def init_shared(self, rng: np.random.Generator) -> Sequence[Array]:
        seed = self.config.projection_prng_key  # type: ignore[attr-defined]
        shapes = list(self.shared_shapes().values())
        sizes = [math.prod(shape) for shape in shapes]
        words = torch_words(seed, sum(sizes))
        values = []
        for shape, part in zip(shapes, np.split(words, sizes[:1]), strict=True):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # kaiming_uniform, a = 0
            values.append(torch_uniform(part, bound).reshape(shape))
        return values

    def delta(self, theta: Theta, W: Array) -> Array:
        d, b, A, B = theta
        return (b[:, None] * B[: self.O]) @ (d[:, None] * A[:, : self.I])

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        d, b, A, B = theta
        A = A[:, : self.I]
        B = B[: self.O]
        K = G @ A.T  # (O, r)
        dd = (B * b[:, None] * K).sum(axis=0)
        db = (K * (B * d)).sum(axis=1)
        return dd, db

    def rank_bound(self, W: Array) -> int:
        return min(self.r, self.O, self.I)


@dataclasses.dataclass
class VeraConfig(MapConfig):
    """dW = diag(b) B diag(d) A    Kopiczko et al. 2024

    projection_prng_key   the seed of A and B
    save_projection       are A and B in the file? If not, they follow from the seed
    d_initial             the first value of d
    vera_dropout          probability of dropping an element of the map's input, in training
    init_weights          True: b = 0 and d = d_initial; False: b = 1 and d ~ N(0, 1)
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    peft_type = "VERA"
    method = "vera"
    title = "VeRA"
    map = VeRA
    USES = ("layers_to_transform", "layers_pattern", "r", "fan_in_fan_out")
    FIXED: ClassVar = {"bias": "none"}
    DROPOUT = "vera_dropout"
    RULES: ClassVar = [
        *integer_rules("projection_prng_key", least=0, limit=2**32),
        Rule("save_projection", is_flag, "True or False"),
        *number_rules("vera_dropout", is_kind=is_plain_number, least=0, below=1),
        *number_rules("d_initial", is_kind=is_plain_number, least=-LARGE, below=LARGE),
        Rule("init_weights", is_flag, "True or False"),
    ]
