"""DoRA: direction and magnitude apart, W' = m (W + dW) / |W + dW| (Liu et al. 2024, eq. (5)).

               x (I)
             /       \\
      W (O, I)        A (r, I)      dW = s B A, as in LoRA, gives the direction V = W + dW
      frozen          B (O, r)
             \\       /  * s
             V x (O)                k = m / |V|, row by row, scales the rows of V to the lengths m
                |    * k            m (O,) starts as the norms of the rows, so k = 1 and the first
              y (O) + bias          output is the base's, bit for bit; the bias is never scaled

|V| is the norm over the inputs. It is computed from V at every forward pass, and the gradient takes
it for a constant (section 4.3), so

    dA, dB = LoRA's with k dY for dY        dm = sum over rows of dY * (V x) / |V|

k is 1 where a row of V is zero, because such a row has no direction to scale. (peft divides 0 by 0
there.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, namespace, record
from ..backend import Array, Shape
from ..effective import Formed, Pull
from ..errors import ConfigError
from ..nn import LinearBase, Parameter
from ..threads import blocks
from .config import LoraConfig
from .factors import Part, float64
from .lora import LoraAdapter

# Replaces k = 0 in a weight whose output is read again: far below rounding, and V x is not lost.
LEAST = 2.0**-80


class DoraAdapter(LoraAdapter):
    """LoRA's pair of one layer, lora_A (r, I) and lora_B (O, r), and lora_magnitude_vector (O,).

    The magnitudes are the lengths that the rows of the weight get.
    """

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
    def shapes(base: Any, r: int) -> dict[str, Shape]:
        """The shapes of the trainable tensors over `base`: r (in + out) + out numbers."""
        return {**LoraAdapter.shapes(base, r), "lora_magnitude_vector": (base.out_features,)}

    def norms(self, W: Array, scaled: bool = False) -> Array:
        """|V| for the rows of V = W + s B A.    W (O, I) -> (O,)

        With `scaled` W becomes k V in place. V is formed, a few rows at a time. |W|^2 +
        2 s <W A^T, B> + s^2 <B A A^T, B>, row by row, is the same number for the same 2 r I O
        operations, but wrong by u |W|^2 where dW cancels most of a row. All callers use this one
        function, so m / |V| is exactly 1 at the start.
        """
        backend = self.lora_A.backend
        xp = backend.xp
        a = self.lora_A.data
        b = self.lora_B.data * self.scaling
        norms = xp.empty(len(W), W.dtype)
        size = backend.sizes.row_norms // W.shape[1]
        for rows in blocks(len(W), size):
            V = backend.matmul(b[rows], a)  # (n, r) @ (r, I) -> (n, I)
            V += W[rows]
            norms[rows] = xp.sqrt(backend.row_dot(V, V)[:, 0])
            if scaled:
                m = self.lora_magnitude_vector.data[rows]
                k = _nonzero_scales(xp, m, norms[rows])
                xp.multiply(V, k[:, None], out=W[rows])
        return norms

    def __call__(self, x: Tensor, y: Tensor, base: LinearBase) -> Tensor:
        """k V x + b, where y is W x + b.    x (..., I), y (..., O) -> (..., O)

        With dropout it is y + (k - 1) W x' + k s B A x', where x' is what dropout leaves of x. As
        in PEFT, dropout acts on the base's own part too.
        """
        k = row_scales(self.lora_magnitude_vector, self.norms(base.dense_weight()))
        dropped = self.dropout(x)
        z = base(dropped) if self.dropout.active else y
        if base.bias is not None:
            z = z - base.bias
        Vx = F.lora_linear(dropped, z, self.lora_A, self.lora_B, self.scaling)
        return y + (k * Vx - z)  # y + 0 at k = 1, B = 0

    def delta_weight(self, W: Array) -> Array:
        """dW' = k V - W (O, I), k included, for the base's weight W (O, I) and in its dtype."""
        backend = self.lora_A.backend
        xp = backend.xp
        V = W + super().delta_weight(W)
        norms = xp.sqrt(backend.row_dot(V, V)[:, 0])
        m = self.lora_magnitude_vector.data.astype(W.dtype)
        return _scales(xp, m, norms)[:, None] * V - W

    def part(self) -> Part:
        """LoRA's factors with the magnitude, in float64 on the host."""
        return super().part()._replace(m=float64(self.lora_magnitude_vector))

    def write_effective_weight(self, W: Array) -> Formed:
        """Make W (O, I) k V in place; returns the parameters, and the function of their gradients.

        V x is the output without its bias, divided by k, so dm needs no second product.
        """
        backend = self.lora_A.backend
        xp = backend.xp
        norms = self.norms(W, scaled=True)
        k = _nonzero_scales(xp, self.lora_magnitude_vector.data, norms)
        ks = (k * self.scaling)[:, None]
        b_ks = self.lora_B.data * ks  # (O, r)
        a_t = backend.transpose_for_products(self.lora_A.data)  # (I, r)
        # Where a norm is 0, Y is 0, and so is dm.
        per_m = 1 / (k * xp.where(norms == 0, 1, norms))

        def pull(X: Array, dY: Array, Y: Array) -> F.Grads:
            dU = backend.matmul(dY, b_ks)  # (N, O) @ (O, r) -> (N, r)
            dA = backend.matmul(dU.T, X)  # (r, N) @ (N, I) -> (r, I)
            U = backend.matmul(X, a_t)  # (N, I) @ (I, r) -> (N, r)
            dB = backend.matmul(dY.T, U) * ks  # (O, N) @ (N, r) -> (O, r)
            return dA, dB, backend.column_dot(dY, Y) * per_m

        return (self.lora_A, self.lora_B, self.lora_magnitude_vector), Pull(pull, needs_output=True)


def row_scales(m: Tensor, norms: Array) -> Tensor:
    """k = m / norms, 1 where a norm is 0; its gradient takes the norms for constants. All (O,)."""
    xp = namespace(m)

    def vjp(dk: Array) -> F.Grads:
        return (xp.where(norms == 0, 0, dk / xp.where(norms == 0, 1, norms)),)

    return record(_scales(xp, m.data, norms), (m,), vjp)


def _scales(xp: Any, m: Array, norms: Array) -> Array:
    """m / norms; NaN for a norm beyond its dtype, because 0 would merge without any error."""
    k = xp.where(norms == 0, 1, m / xp.where(norms == 0, 1, norms))
    return xp.where(xp.isfinite(norms), k, np.nan)


def _nonzero_scales(xp: Any, m: Array, norms: Array) -> Array:
    """`_scales` with LEAST in place of 0."""
    k = _scales(xp, m, norms)
    return xp.where(k == 0, LEAST, k)


def require_compatible(adapters: Mapping[str, LoraAdapter], names: Sequence[str]) -> None:
    """ConfigError if a DoRA adapter would run, or be merged, beside another one in a layer.

    It scales the layer's output, so the result would depend on the order of the two.
    """
    present = [name for name in dict.fromkeys(names) if name in adapters]
    for name in present:
        if isinstance(adapters[name], DoraAdapter) and len(present) > 1:
            others = ", ".join(other for other in present if other != name)
            raise ConfigError(
                f"adapter {name!r:.99} is DoRA's and scales its whole layer, so it must run or "
                f"merge alone: not together with {others}"
            )
