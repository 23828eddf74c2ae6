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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor, record
from ..backend import Array, Backend, Shape
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
    ALONE = "is DoRA's and scales its whole layer"

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

    def norms(self, W: Array) -> Array:
        """|V| for the rows of V = W + s B A.    W (O, I) -> (O,)

        V is formed, a few rows at a time. |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>, row by row, is
        the same number for the same 2 r I O operations, but wrong by u |W|^2 where dW cancels most
        of a row. All norms are computed in one way, so m / |V| is exactly 1 at the start.
        """
        return self._form_rows(W, None)[0]

    def _form_rows(self, W: Array, m: Array | None) -> tuple[Array, Array | None]:
        """The norms of V's rows; with m (O,) also their scales k, and W becomes k V in place."""
        backend = self.lora_A.backend
        xp = backend.xp
        a = self.lora_A.data
        b = self.lora_B.data * self.scaling
        pieces = []
        size = backend.sizes.row_norms // W.shape[1]
        for rows in blocks(len(W), size):
            V = backend.matmul(b[rows], a)  # (n, r) @ (r, I) -> (n, I)
            V += W[rows]
            if m is None:
                pieces.append((backend.run(_row_norms, V), None))
            else:
                pieces.append(backend.run(_scale_rows, V, m[rows], W[rows], LEAST))
        if len(pieces) == 1:
            return pieces[0]
        norms, ks = zip(*pieces, strict=True)
        return xp.concatenate(norms), None if m is None else xp.concatenate(ks)

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
        norms = backend.run(_row_norms, V)
        m = self.lora_magnitude_vector.data.astype(W.dtype)
        return _scales(xp, m, norms)[:, None] * V - W

    def part(self, W: Array | None = None) -> Part:
        """LoRA's factors with the magnitude, in float64 on the host."""
        return super().part()._replace(m=float64(self.lora_magnitude_vector))

    def write_effective_weight(self, W: Array, base: LinearBase | None = None) -> Formed:
        """Make W (O, I) k V in place; returns the parameters, and the function of their gradients.

        V x is the output without its bias, divided by k, so dm needs no second product.
        """
        backend = self.lora_A.backend
        norms, k = self._form_rows(W, self.lora_magnitude_vector.data)
        assert k is not None
        ks = (k * self.scaling)[:, None]
        b_ks = self.lora_B.data * ks  # (O, r)
        a_t = backend.transpose_for_products(self.lora_A.data)  # (I, r)

        def pull(X: Array, dY: Array, Y: Array) -> F.Grads:
            dU = backend.matmul(dY, b_ks)  # (N, O) @ (O, r) -> (N, r)
            dA = backend.matmul(dU.T, X)  # (r, N) @ (N, I) -> (r, I)
            U = backend.matmul(X, a_t)  # (N, I) @ (I, r) -> (N, r)
            dB = backend.matmul(dY.T, U) * ks  # (O, N) @ (N, r) -> (O, r)
            return dA, dB, backend.run(_magnitude_gradient, dY, Y, k, norms)

        return (self.lora_A, self.lora_B, self.lora_magnitude_vector), Pull(pull, needs_output=True)


def row_scales(m: Tensor, norms: Array) -> Tensor:
    """k = m / norms, 1 where a norm is 0; its gradient takes the norms for constants. All (O,)."""
    k, back = m.backend.run(_row_scales, m.data, norms)
    return record(k, (m,), lambda dk: (back(dk),))


def _scales(xp: Any, m: Array, norms: Array) -> Array:
    """m / norms; NaN for a norm beyond its dtype, because 0 would merge without any error."""
    k = xp.where(norms == 0, 1, m / xp.where(norms == 0, 1, norms))
    return xp.where(xp.isfinite(norms), k, np.nan)


# ---- on arrays -----------------------------------------------------------------------------------


def _row_norms(backend: Backend, V: Array) -> Array:
    """|V| for each row.    V (n, I) -> (n,)"""
    xp = backend.xp
    return xp.sqrt(backend.row_dot(V, V)[:, 0])


def _row_scales(backend: Backend, m: Array, norms: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(k, the function from dk to dm)    m and norms (O,)"""
    xp = backend.xp

    def back(dk: Array) -> Array:
        dm: Array = xp.where(norms == 0, 0, dk / xp.where(norms == 0, 1, norms))
        return dm

    return _scales(xp, m, norms), back


def _scale_rows(
    backend: Backend, V: Array, m: Array, out: Array, least: float
) -> tuple[Array, Array]:
    """(the norms of V's rows, their scales k), both (n,); writes k V into `out`.

    V and out (n, I), m (n,). `least` replaces k = 0.
    """
    xp = backend.xp
    norms = _row_norms(backend, V)
    k = _scales(xp, m, norms)
    k = xp.where(k == 0, least, k)
    xp.multiply(V, k[:, None], out=out)
    return norms, k


def _magnitude_gradient(backend: Backend, dY: Array, Y: Array, k: Array, norms: Array) -> Array:
    """dm from the scaled output.    dY and Y = X W'^T (N, O), k and norms (O,) -> (O,)"""
    xp = backend.xp
    # Where a norm is 0, Y is 0, and so is dm.
    per_m = 1 / (k * xp.where(norms == 0, 1, norms))
    return xp.einsum("no,no->o", dY, Y) * per_m


def require_compatible(adapters: Mapping[str, LoraAdapter], names: Sequence[str]) -> None:
    """ConfigError if an adapter that must be alone would run, or be merged, beside another one.

    It multiplies the layer's weight, so the result would depend on the order of the two.
    """
    present = [name for name in dict.fromkeys(names) if name in adapters]
    for name in present:
        if adapters[name].ALONE and len(present) > 1:
            others = ", ".join(other for other in present if other != name)
            raise ConfigError(
                f"adapter {name!r:.99} {adapters[name].ALONE}, so it must run or merge alone: "
                f"not together with {others}"
            )
