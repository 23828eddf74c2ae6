"""DoRA: a weight's direction and magnitude apart, W' = m (W + dW) / |W + dW| (Liu et al. 2024, eq. (5)).

               x (I)
             /       \\
      W (O, I)        A (r, I)      dW = s B A, as in LoRA: the direction, V = W + dW
      frozen          B (O, r)
             \\       /  * s
             V x (O)                k = m / |V|, row by row: how long each row of V becomes
                |    * k            m (O,) starts as the rows' norms, so k = 1: the start is the base, bit for bit
              y (O) + bias          which is never scaled

|V| is the norm over the inputs. It follows V at every forward, and is a constant to the gradient (section 4.3); so

    dA, dB = LoRA's with k dY for dY        dm = sum over rows of dY * (V x) / |V|

k is 1 where a row of V is zero: it has no direction to be scaled. (peft divides 0 by 0 there.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, namespace, record
from ..backend import Array
from ..effective import Pull
from ..errors import ConfigError
from ..nn import LinearBase, Parameter
from .config import LoraConfig
from .factors import Part, float64
from .lora import LoraAdapter

BLOCK = 1 << 16  # numbers of V at a time: from the product to the norm they stay in the cache
LEAST = (
    2.0**-80
)  # in place of k = 0, in a weight whose output is read again: far below rounding, and V x is not lost


class DoraAdapter(LoraAdapter):
    """LoRA's pair of one layer, lora_A (r, I) and lora_B (O, r), and its rows' lengths, lora_magnitude_vector (O,)."""

    TENSORS = (*LoraAdapter.TENSORS, "lora_magnitude_vector")
    NORMED = True

    def __init__(
        self,
        base: LinearBase,
        name: str,
        config: LoraConfig,
        rng: np.random.Generator,
        stream: int = 0,
    ):
        super().__init__(base, name, config, rng, stream)
        self.lora_magnitude_vector = Parameter(self.norms(base.dense_weight()))

    @staticmethod
    def shapes(base: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The trainable tensors of a layer over `base`, by name: r (in + out) + out numbers."""
        return {**LoraAdapter.shapes(base, r), "lora_magnitude_vector": (base.out_features,)}

    def norms(self, W: Array, scaled: bool = False) -> Array:
        """|V| of the rows of V = W + s B A.    W (O, I) -> (O,). With `scaled` W becomes k V in place.

        V is formed, a few rows at a time. |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>, row by row, is the same number for
        the same 2 r I O operations, but wrong by u |W|^2 where dW takes away most of a row. And since whoever asks goes
        this one way, m / |V| is exactly 1 at the start.
        """
        xp, a, b = self.lora_A.backend.xp, self.lora_A.data, self.lora_B.data * self.scaling
        norms, step = xp.empty(len(W), W.dtype), max(1, BLOCK // W.shape[1])
        for start in range(0, len(W), step):
            at = slice(start, start + step)
            V = b[at] @ a  # (n, r) @ (r, I) -> (n, I)
            V += W[at]
            norms[at] = xp.sqrt(F.row_dot(xp, V, V)[:, 0])
            if scaled:
                m = self.lora_magnitude_vector.data[at]
                xp.multiply(V, _kept(xp, _ratio(xp, m, norms[at]))[:, None], out=W[at])
        return norms

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """y = W x + b, become k V x + b.    x (..., I), y (..., O) -> (..., O)

        With dropout y + (k - 1) W x' + k s B A x', x' being what is left of x: as in PEFT, the base's own part too.
        """
        k, kept = (
            row_scales(self.lora_magnitude_vector, self.norms(base.dense_weight())),
            self.dropout(x),
        )
        z = base(kept) if self.dropout.active else y
        z = z if base.bias is None else z - base.bias
        return y + (
            k * F.lora_linear(kept, z, self.lora_A, self.lora_B, self.scaling) - z
        )  # at k = 1, B = 0: y + 0

    def delta_weight(self, W: Array) -> Array:
        """dW' = k V - W (O, I), k included, over the base's weight W (O, I) and in its precision."""
        xp, m = self.lora_A.backend.xp, self.lora_magnitude_vector.data.astype(W.dtype)
        V = W + super().delta_weight(W)
        norms = xp.sqrt(F.row_dot(xp, V, V)[:, 0])
        return _ratio(xp, m, norms)[:, None] * V - W

    def part(self) -> Part:
        """LoRA's factors with the magnitude, in float64 on the host."""
        return super().part()._replace(m=float64(self.lora_magnitude_vector))

    def effective(self, W: Array) -> tuple[tuple[Tensor, ...], Pull]:
        """W (O, I) becomes k V in place; returns the parameters, and how their gradients are found.

        V x is the output without its bias, over k: it need not be computed again for dm.
        """
        xp, a, s, m = (
            self.lora_A.backend.xp,
            self.lora_A.data,
            self.scaling,
            self.lora_magnitude_vector.data,
        )
        norms = self.norms(W, scaled=True)
        k = _kept(xp, _ratio(xp, m, norms))
        ks = (k * s)[:, None]
        b_ks, a_t = self.lora_B.data * ks, xp.ascontiguousarray(a.T)  # (O, r), (I, r)
        per_m = 1 / (k * xp.where(norms == 0, 1, norms))  # where a norm is 0, Y is, and dm with it

        def pull(X: Array, dY: Array, Y: Array) -> F.Grads:
            dA = (dY @ b_ks).T @ X  # (r, N) @ (N, I) -> (r, I)
            dB = (dY.T @ (X @ a_t)) * ks  # (O, N) @ (N, r) -> (O, r)
            return dA, dB, xp.einsum("no,no->o", dY, Y) * per_m

        params = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        return params, Pull(pull, needs_output=True)


def row_scales(m: Tensor, norms: Array) -> Tensor:
    """k = m / norms, whose gradient takes the norms for constants; 1 where one is 0.    m (O,), norms (O,) -> (O,)"""
    xp = namespace(m)

    def vjp(dk: Array) -> F.Grads:
        return (xp.where(norms == 0, 0, dk / xp.where(norms == 0, 1, norms)),)

    return record(_ratio(xp, m.data, norms), (m,), vjp)


def _ratio(xp: Any, m: Array, norms: Array) -> Array:
    """m / norms, and NaN for a norm beyond its dtype: 0 would merge in silence."""
    k = xp.where(norms == 0, 1, m / xp.where(norms == 0, 1, norms))
    return xp.where(xp.isfinite(norms), k, np.nan)


def _kept(xp: Any, k: Array) -> Array:
    return xp.where(k == 0, LEAST, k)


def require_compatible(adapters: Mapping[str, LoraAdapter], names: Sequence[str]) -> None:
    """ConfigError if a DoRA adapter is to run, or to be merged, beside another one of the same layer.

    It scales what the layer gives, so that the result would depend on the order of the two.
    """
    there = [n for n in dict.fromkeys(names) if n in adapters]
    dora = [n for n in there if isinstance(adapters[n], DoraAdapter)]
    if dora and len(there) > 1:
        others = ", ".join(n for n in there if n != dora[0])
        raise ConfigError(
            f"adapter {dora[0]!r:.99} is DoRA's and scales all of its layer: not together with {others}"
        )
