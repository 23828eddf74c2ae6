"""LoKr: dW = s C ⊗ E, a Kronecker product (Edalati et al. 2022; Yeh et al. 2024).

O = a b and I = c d, C (a, c), E (b, d): block (p, q) of dW is s C[p, q] E. C or E may itself be a
product of rank r. rank(dW) = rank(C) rank(E), |dW| = s |C| |E|, and the singular values of dW are
s times the products of those of C and E. With the blocks of G as the rows of K (a c, b d),
vec(dC) = s K vec(E) and vec(dE) = s K^T vec(C), where vec joins the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ...backend import Array, Shape
from ...errors import Rule, is_flag, is_plain_number, number_rules, one_of
from .contract import USUAL, Layers, Map, MapConfig, Theta, refuse_shape, uniform_fan_in


class LoKr(Map):
    TENSORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

    def __init__(self, config: MapConfig, path: str, layers: Layers):
        super().__init__(config, path, layers)
        factor = config.decompose_factor  # type: ignore[attr-defined]
        self.a, self.b = split(self.O, factor)
        self.c, self.d = split(self.I, factor)
        both = config.decompose_both  # type: ignore[attr-defined]
        self.C_has_rank = both and self.r < max(self.a, self.c) / 2
        self.E_has_rank = self.r < max(self.b, self.d) / 2

    def check(self) -> None:
        factor = self.config.decompose_factor  # type: ignore[attr-defined]
        for name, size, small in (("O", self.O, self.a), ("I", self.I, self.c)):
            if small != 1 or size == 1 or factor == 1:
                continue
            reason = f"decompose_factor = {factor} leaves no factor of {name} = {size} above 1"
            divisors = [n for n in range(2, size) if size % n == 0][:8]
            valid = f"set decompose_factor to one of {divisors}" if divisors else "it is a prime"
            raise refuse_shape(self, reason, valid)

    def shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        r = self.r
        factors = (("1", self.a, self.c, self.C_has_rank), ("2", self.b, self.d, self.E_has_rank))
        for name, rows, columns, has_rank in factors:
            if has_rank:
                shapes |= {f"lokr_w{name}_a": (rows, r), f"lokr_w{name}_b": (r, columns)}
            else:
                shapes[f"lokr_w{name}"] = (rows, columns)
        return shapes

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        how = self.config.init_weights  # type: ignore[attr-defined]
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b")}.get(how, ())
        values = []
        for name, shape in self.shapes().items():
            values.append(uniform_fan_in(rng, shape) * (name not in zero))
        return values

    def factors(self, theta: Theta) -> tuple[Array, Array, Sequence[Array], Sequence[Array]]:
        """(C (a, c), E (b, d), the tensors of C, the tensors of E): one tensor or two factors."""
        count = 1 + self.C_has_rank
        C_theta, E_theta = theta[:count], theta[count:]
        C = C_theta[0] @ C_theta[1] if self.C_has_rank else C_theta[0]
        E = E_theta[0] @ E_theta[1] if self.E_has_rank else E_theta[0]
        return C, E, C_theta, E_theta

    def delta(self, theta: Theta, W: Array) -> Array:
        C, E, _, _ = self.factors(theta)
        blocks = (self.s * C)[:, None, :, None] * E[None, :, None, :]  # (a, b, c, d)
        return blocks.reshape(self.O, self.I)

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        C, E, C_theta, E_theta = self.factors(theta)
        blocks = G.reshape(self.a, self.b, self.c, self.d).transpose(0, 2, 1, 3)
        K = blocks.reshape(self.a * self.c, self.b * self.d)
        dC = self.s * (K @ E.reshape(-1)).reshape(C.shape)
        dE = self.s * (C.reshape(-1) @ K).reshape(E.shape)
        return *chain(dC, C_theta), *chain(dE, E_theta)

    def rank_bound(self, W: Array) -> int:
        C_rank = min(self.a, self.c, self.r if self.C_has_rank else self.a)
        E_rank = min(self.b, self.d, self.r if self.E_has_rank else self.b)
        return C_rank * E_rank


def chain(d: Array, factors: Sequence[Array]) -> tuple[Array, ...]:
    """The gradients of one tensor, or of two factors, whose product has the gradient d."""
    if len(factors) == 1:
        return (d,)
    left, right = factors
    return d @ right.T, left.T @ d


def split(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m n = size: m = factor if that divides size.

    Otherwise m is the largest divisor with m <= n and m <= factor; factor = -1 sets no limit.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    m = max((m for m in range(1, int(size**0.5) + 1) if size % m == 0 and m <= limit), default=1)
    return m, size // m


def _is_factor(value: Any) -> bool:
    return type(value) is int and (value == -1 or 1 <= value < 2**24)


@dataclasses.dataclass
class LoKrConfig(MapConfig):
    """dW = (alpha / r) C ⊗ E    Yeh et al. 2024

    alpha              scaling is alpha / r
    decompose_factor   rows and columns of C, where it divides O and I; -1: the divisor nearest to
                       the square root
    decompose_both     C is a product of rank r, too, where r < max(a, c) / 2; otherwise only E
    init_weights       True: C is zero; "lycoris": E is zero; False: both random
    """

    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    init_weights: bool | str = True

    peft_type = "LOKR"
    method = "lokr"
    title = "LoKr"
    map = LoKr
    USES = (*USUAL, "r", "rank_pattern", "alpha_pattern")
    FIXED: ClassVar = {"use_effective_conv2d": False}
    IN_TRAINING: ClassVar = {
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "rank_dropout_scale": False,
    }
    RULES: ClassVar = [
        *number_rules("alpha", is_kind=is_plain_number, above=0, below=1e300),
        Rule("decompose_both", is_flag, "True or False"),
        Rule("decompose_factor", _is_factor, "-1, or an integer that is at least 1 and below 2^24"),
        Rule("init_weights", one_of(True, False, "lycoris"), "True, False or 'lycoris'"),
    ]
