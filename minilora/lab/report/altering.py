"""A model whose adapter is altered for a measurement: scaled, left out, or joined by a product.

Nothing is merged, so that a base in codes or in 16 bits stays as it is: each layer computes

    y + share (what its adapter adds to y) + B A x
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ... import functional as F
from ...autograd import Tensor
from ...errors import ConfigError
from ...lora.embedding import LoraEmbedding
from ...lora.lora import LoraAdapter
from ...nn import Parameter
from .subject import Subject

Array = np.ndarray


class Altered:
    """What runs in a layer in the place of its adapter.

    share      a factor of what the adapter adds
    A, B       (r, I), (O, r): factors of a matrix that is added to W besides; None for no matrix
    with_bias  whether the change that the adapter makes to a bias is added, too, for share = 0
    """

    ALONE = ""  # as LoraAdapter has them
    NORMED = False

    def __init__(
        self,
        layer: Any,
        adapter: LoraAdapter,
        share: float,
        factors: tuple[Array, Array] | None = None,
        with_bias: bool = False,
    ):
        self.adapter = adapter
        self.share = share
        self.with_bias = with_bias
        self.embeds = isinstance(layer, LoraEmbedding)
        self.A = self.B = None
        if factors is not None:
            base = layer.as_linear(layer.original)
            self.A, self.B = (_parameter(factor, base) for factor in factors)

    def __call__(self, x: Any, y: Tensor, base: Any) -> Tensor:
        """x (..., I), or ids (...) of an embedding; y (..., O), the layer's output so far."""
        result = y
        if self.share == 1:
            result = self.adapter(x, y, base)
        elif self.share:
            result = y + (self.adapter(x, y, base) - y) * self.share
        if self.with_bias and base.bias is not None:
            result = result + (self.adapter.move_bias(base.bias) - base.bias)
        if self.A is not None and self.B is not None:
            inner = F.embedding(x, self.A.T) if self.embeds else F.linear(x, self.A)
            result = result + F.linear(inner, self.B)
        return result

    def move_bias(self, bias: Any) -> Any:
        return bias


def _parameter(factor: Array, base: Any) -> Parameter:
    """A frozen parameter on the device and in the dtype of the base's."""
    values = base.weight.backend.from_numpy(np.ascontiguousarray(factor, base.weight.dtype))
    return Parameter(values, False)


@contextlib.contextmanager
def altered(subject: Subject, entries: Mapping[str, Altered]) -> Iterator[None]:
    """A context in which these layers, by path, run `entries` in the place of their adapter."""
    name = subject.name
    wrappers = subject.wrappers
    before = {path: wrappers[path].entries[name] for path in entries}
    try:
        for path, entry in entries.items():
            wrappers[path].entries[name] = entry
        yield
    finally:
        for path, adapter in before.items():
            wrappers[path].entries[name] = adapter


def find_whole(subject: Subject) -> list[str]:
    """The paths of what trained as a copy, or by rows: it has no rank, and cannot be scaled."""
    wrappers = subject.wrappers.items()
    return [
        path for path, one in wrappers if not isinstance(one.entries[subject.name], LoraAdapter)
    ]


def require_alterable(subject: Subject) -> None:
    """ConfigError if something that trained has no adapter that could be scaled."""
    whole = find_whole(subject)
    if whole:
        raise ConfigError(
            f"{', '.join(whole):.150} trained as a copy or by rows, which cannot be scaled with dW "
            "of the other layers"
        )
