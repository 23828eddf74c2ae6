"""OFT: W' = W R^T, R with orthogonal blocks: W's rows keep lengths and angles (Qiu et al. 2023).

I = k b. The k blocks of R (b, b) follow from skew matrices Q, whose upper triangles are trained:

    exact      R = (I - Q) (I + Q)^-1, Cayley's map: orthogonal
    Neumann    R = I + 2Q + 2Q^2 + 2Q^3 + Q^4 = (I + Q^2) (I + Q)^2, near the *inverse* rotation;
               R^T R = (I - Q^4)^2, so it is nearly orthogonal if Q is small

Q = 0 gives W. With W = [W_1 .. W_k] by columns, dW_j = W_j (R_j - I)^T and dL/dR_j = G_j^T W_j,
which the code calls dR. With N = dL/dQ as if all entries of Q were free, the gradient of Q's upper
triangle is the upper triangle of N - N^T:

    exact      N = -(I + R)^T dR (I + Q)^-T
    Neumann    N = sum over n of c_n sum over j < n of (Q^j)^T dR (Q^(n-1-j))^T,  R = sum c_n Q^n
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ...backend import Array, Shape, backend_of
from ...errors import ConfigError, check_fields, integer_rules, is_flag, rules_for
from .contract import USUAL, Layers, Map, MapConfig, Theta, refuse_shape

COEFFICIENTS = (1, 2, 2, 2, 1)  # of PEFT's polynomial in Q, since 0.18
MIN_VERSION = (0, 18)


class OFT(Map):
    TENSORS = ("oft_R",)
    SUFFIX = ".weight"
    reads_W = True
    alone = "is OFT's and multiplies the layer's whole weight"

    def __init__(self, config: MapConfig, path: str, layers: Layers):
        super().__init__(config, path, layers)
        assert isinstance(config, OFTConfig)
        size = config.oft_block_size
        if size:
            self.b = nearest_divisor(self.I, size)
            self.k = self.I // self.b
        else:
            self.k = nearest_divisor(self.I, config.r)
            self.b = self.I // self.k
        self.is_exact = not config.use_cayley_neumann
        self.is_shared = config.block_share
        self.rows, self.columns = np.triu_indices(self.b, 1)

    def check(self) -> None:
        config = self.config
        assert isinstance(config, OFTConfig)
        for field, wanted, got in (
            ("oft_block_size", config.oft_block_size, self.b),
            ("r", config.r, self.k),
        ):
            if wanted and wanted != got:
                divisors = [n for n in range(1, self.I + 1) if self.I % n == 0]
                reason = f"{field} = {wanted} does not divide I = {self.I}"
                raise refuse_shape(self, reason, f"set {field} to one of {divisors!r:.120}")

    def shapes(self) -> dict[str, Shape]:
        return {"oft_R": (1 if self.is_shared else self.k, self.b * (self.b - 1) // 2)}

    def init(self, rng: np.random.Generator) -> Sequence[Array]:
        (shape,) = self.shapes().values()
        is_zero = self.config.init_weights  # type: ignore[attr-defined]
        return [np.zeros(shape) if is_zero else 0.1 * rng.standard_normal(shape)]

    def skew(self, q: Array) -> Array:
        """Q (blocks, b, b) from its upper triangles q (blocks, b (b - 1) / 2)."""
        rows, columns = (self.on_device(q, name) for name in ("rows", "columns"))
        Q = backend_of(q).xp.zeros((len(q), self.b, self.b), q.dtype)
        Q[:, rows, columns] = q
        return Q - Q.transpose(0, 2, 1)

    def turn(self, Q: Array) -> Array:
        """R (blocks, b, b) from Q (blocks, b, b)."""
        xp = backend_of(Q).xp
        one = xp.eye(self.b, dtype=Q.dtype)
        if self.is_exact:  # the two factors commute
            return xp.linalg.solve(one + Q, one - Q)
        Q2 = Q @ Q
        return one + 2 * Q + 2 * Q2 + 2 * (Q2 @ Q) + Q2 @ Q2

    def delta(self, theta: Theta, W: Array) -> Array:
        xp = backend_of(W).xp
        R = self.turn(self.skew(theta[0]))
        columns = W.reshape(self.O, self.k, self.b).transpose(1, 0, 2)  # (k, O, b)
        dW = columns @ (R - xp.eye(self.b, dtype=R.dtype)).transpose(0, 2, 1)
        return dW.transpose(1, 0, 2).reshape(self.O, self.I)

    def pull(self, theta: Theta, W: Array, G: Array) -> Sequence[Array]:
        Q = self.skew(theta[0])
        blocks = (self.O, self.k, self.b)
        dR = G.reshape(blocks).transpose(1, 2, 0) @ W.reshape(blocks).transpose(1, 0, 2)
        if self.is_shared:
            dR = dR.sum(axis=0, keepdims=True)
        N = self._pull_exact(Q, dR) if self.is_exact else self._pull_neumann(Q, dR)
        rows, columns = (self.on_device(N, name) for name in ("rows", "columns"))
        return [N[:, rows, columns] - N[:, columns, rows]]

    def _pull_exact(self, Q: Array, dR: Array) -> Array:
        """N (blocks, b, b) = -(I + R)^T dR (I + Q)^-T, where (I + Q)^T = I - Q."""
        xp = backend_of(Q).xp
        one = xp.eye(self.b, dtype=Q.dtype)
        left = -(one + self.turn(Q)).transpose(0, 2, 1) @ dR
        # left (I - Q)^-1, from the transposed system (I + Q) X = left^T
        return xp.linalg.solve(one + Q, left.transpose(0, 2, 1)).transpose(0, 2, 1)

    def _pull_neumann(self, Q: Array, dR: Array) -> Array:
        """N (blocks, b, b) = sum_n c_n sum_(j < n) (Q^j)^T dR (Q^(n-1-j))^T, where Q^T = -Q."""
        N = 0
        inner = dR  # the sum over j < n, for n = 1
        left = dR  # (Q^(n-1))^T dR
        for c in COEFFICIENTS[1:]:
            N = N + c * inner
            left = -Q @ left
            inner = inner @ -Q + left
        return N


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`; of two, the smaller one, as in PEFT."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


@dataclasses.dataclass
class OFTConfig(MapConfig):
    """W' = W R^T, R orthogonal by blocks    Qiu et al. 2023, 2025

    oft_block_size       b, a divisor of I; 0: it follows from r
    r                    k, the number of blocks; 0: it follows from oft_block_size
    use_cayley_neumann   True: R by PEFT's polynomial; False: by Cayley's map
    block_share          all blocks have one R
    init_weights         True: Q is zero; False: Q ~ N(0, 0.01)
    """

    r: int = 0
    oft_block_size: int = 32
    block_share: bool = False
    use_cayley_neumann: bool = True
    init_weights: bool = True

    peft_type = "OFT"
    method = "oft"
    title = "OFT"
    map = OFT
    USES = (*USUAL, "r", "fan_in_fan_out")
    FIXED: ClassVar = {"bias": "none", "coft": False, "num_cayley_neumann_terms": 5}
    IN_TRAINING: ClassVar = {"module_dropout": 0.0, "eps": 6e-5}  # eps is coft's
    RULES: ClassVar = [
        *integer_rules("oft_block_size", least=0, limit=2**24),
        *rules_for(("block_share", "use_cayley_neumann", "init_weights"), is_flag, "True or False"),
    ]

    def __post_init__(self) -> None:
        blocks = self.r
        check_fields({"r": blocks}, integer_rules("r", least=0, limit=2**24))
        self.r = 1  # LoRA's rule refuses 0
        super().__post_init__()
        self.r = blocks
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"r = {self.r!r:.60} and oft_block_size = {self.oft_block_size!r:.60}: one of "
                "the two must be at least 1 and the other 0, because r oft_block_size = I"
            )

    @classmethod
    def check_file(cls, config: Mapping[str, Any], where: str) -> None:
        if "oft_block_size" not in config:
            raise ConfigError(
                f"{where}: oft_block_size is missing, as in files of peft before 0.14, whose "
                "tensors mean other rotations: train the adapter again with peft 0.18 or later"
            )
        version = config.get("peft_version")
        if config.get("use_cayley_neumann", False) and _parse_version(version) < MIN_VERSION:
            raise ConfigError(
                f"{where}: use_cayley_neumann = True with peft_version = {version!r:.60}: before "
                "0.18 the polynomial had other coefficients; train the adapter again with peft "
                "0.18 or later"
            )


def _parse_version(version: Any) -> tuple[int, ...]:
    """The first two numbers of a version: (0, 18) for "0.18.1.dev0"; (0, 0) if it has none."""
    parts = version.split(".") if isinstance(version, str) else []
    numbers = [int(part) for part in parts[:2] if part.isascii() and part.isdecimal()]
    return tuple(numbers) if len(numbers) == 2 else (0, 0)
