"""FourierFT: dW = alpha Re ifft2(F), where n coefficients of F are trained (Gao et al. 2024).

F (O, I) has c_j at n random positions (u_j, v_j) and is zero elsewhere. The map is linear, and its
transpose gives dc = alpha / (O I) Re fft2(G) at these positions.

The real part joins the coefficients of opposite frequencies k and -k, so

    |dW|^2 = alpha^2 / (O I) sum over k of ((F(k) + F(-k)) / 2)^2,    rank(dW) <= 2 n

The positions are the first n of torch.randperm(O I) with the seed random_loc_seed, divided into
rows and columns of F.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ...backend import Array, Shape, backend_of
from ...errors import Rule, integer_rules, is_flag, is_plain_number, number_rules
from ..targets.rules import pattern_value
from .contract import USUAL, Layers, Map, MapConfig, Theta, refuse_shape
from .streams import torch_permutation


class FourierFT(Map):
    TENSORS = ("fourierft_spectrum",)

    def __init__(self, config: MapConfig, path: str, layers: Layers):
        super().__init__(config, path, layers)
        assert isinstance(config, FourierFTConfig)
        self.n = pattern_value(path, config.n_frequency_pattern, config.n_frequency)
        self.starts_as_base = config.init_weights
        size = self.O * self.I
        if self.n > size:
            valid = f"set n_frequency, or n_frequency_pattern for this layer, to at most {size}"
            raise refuse_shape(self, f"has fewer weights than n_frequency = {self.n}", valid)
        self.at = torch_permutation(config.random_loc_seed, size, self.n)
        self.alpha = config.scaling

    def shapes(self) -> dict[str, Shape]:
        return {"fourierft_spectrum": (self.n,)}

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        return [rng.standard_normal(self.n) * (not self.starts_as_base)]

    def delta(self, theta: Theta, W: Array) -> Array:
        (c,) = theta
        xp = backend_of(c).xp
        F = xp.zeros(self.O * self.I, c.dtype)
        F[self.on_device(c, "at")] = c
        return self.alpha * xp.fft.ifft2(F.reshape(self.O, self.I)).real

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        spectrum = backend_of(G).xp.fft.fft2(G).real.reshape(-1)
        return [self.alpha / (self.O * self.I) * spectrum[self.on_device(G, "at")]]

    def rank_bound(self, W: Array) -> int:
        return min(2 * self.n, self.O, self.I)


def _is_table(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(k, str) and type(n) is int and n >= 1 for k, n in value.items())


@dataclasses.dataclass
class FourierFTConfig(MapConfig):
    """dW = scaling Re ifft2(F) with n_frequency coefficients    Gao et al. 2024

    n_frequency           n, the coefficients of a layer
    n_frequency_pattern   n for the layers whose names match a pattern; the first match counts
    scaling               alpha
    random_loc_seed       the seed of the positions
    init_weights          True: c = 0; False, PEFT's default: c ~ N(0, 1), so that a new adapter
                          changes the model's output at once
    """

    n_frequency: int = 1000
    scaling: float = 150.0  # type: ignore[assignment]  # PEFT's name; LoRA has a method of this name
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    init_weights: bool = False

    peft_type = "FOURIERFT"
    method = "fourierft"
    title = "FourierFT"
    map = FourierFT
    USES = (*USUAL, "fan_in_fan_out")
    FIXED: ClassVar = {"bias": "none"}
    RULES: ClassVar = [
        *integer_rules("n_frequency", least=1, limit=2**24),
        *number_rules("scaling", is_kind=is_plain_number),
        *integer_rules("random_loc_seed", least=0, limit=2**32),
        Rule("n_frequency_pattern", _is_table, "a dictionary from names to integers of at least 1"),
        Rule("init_weights", is_flag, "True or False"),
    ]

    def __post_init__(self) -> None:
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        super().__post_init__()
