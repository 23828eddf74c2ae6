"""Where adapters live: a base layer and, by name, what is added to it.

`LoraLinear` wraps a linear base and holds adapters; `SavedModule` wraps any module and holds trained copies of it.
Both keep the base as it is: to disable an adapter is to have the base back, bit for bit.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import fused
from ..autograd import Tensor
from ..backend import Array
from ..errors import ConfigError, NonFiniteError
from ..nn import LinearBase, Module, effective, frozen_linear
from .dora import refuse_company
from .lora import LoraAdapter

# By layer: the adapters that this thread, and the shards it hands to others, runs there in place of the active ones.
_chosen: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("chosen", default=None)


class Wrapper(Module):
    """Stands in a module's place: `inner` is what stood there, `held` what each adapter brings, by its name."""

    ATTRIBUTES: tuple[str, str]  # where these two are, in PEFT's words

    def __init__(self) -> None:
        self.active: tuple[str, ...] | list[str] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.requantized = False  # is what was merged held as codes again?

    @property
    def inner(self) -> Any:
        return getattr(self, self.ATTRIBUTES[0])

    @property
    def held(self) -> dict[str, Any]:
        return getattr(self, self.ATTRIBUTES[1])  # type: ignore[no-any-return]

    # What a linear layer offers, where there is one.
    in_features = property(lambda self: self.current.in_features)
    out_features = property(lambda self: self.current.out_features)
    bias = property(lambda self: self.current.bias)
    backend = property(lambda self: self.current.backend)
    dtype = property(lambda self: self.current.dtype)

    @property
    def current(self) -> Any:
        """The module inside that the next forward runs."""
        raise NotImplementedError

    @property
    def running(self) -> tuple[Any, ...]:
        """What the next forward of this thread applies."""
        names = () if self.merged or not self.enabled else (_chosen.get() or {}).get(self, self.active) or ()
        return tuple(self.held[name] for name in names if name in self.held)

    def merge(self, names: Sequence[str] | None = None, requantize: bool = False) -> None:
        """Put adapters into the inner module's weights, where that means something."""

    def unmerge(self) -> None:
        """Take all of them out again."""

    def result(self, names: Sequence[str]) -> Any:
        """What is left in this place once these adapters are merged and gone. ConfigError if not all can be at once."""
        refuse_company(self.held, names)
        return self.inner


@contextlib.contextmanager
def chosen(layers: Iterable[Wrapper], names: Sequence[str] | None) -> Iterator[None]:
    """Inside, these layers run `names` in place of the active adapters: in this thread, not in one that runs beside it.

    With None they run their inner modules alone, whatever is chosen further inside.
    """
    before = _chosen.get() or {}
    token = _chosen.set({**before, **{layer: names for layer in layers if before.get(layer, ()) is not None}})
    try:
        yield
    finally:
        _chosen.reset(token)


class LoraLinear(Wrapper):
    """y = base(x), and then each active adapter in turn.    x (..., I) -> (..., O)

    The base is any `LinearBase`. Adapters read x, never each other's output, so several active ones add up.
    """

    ATTRIBUTES = "base_layer", "adapters"

    def __init__(self, base_layer: LinearBase):
        super().__init__()
        self.base_layer = base_layer
        self.adapters: dict[str, LoraAdapter] = {}
        self._original: LinearBase | None = None  # the base while adapters are merged into a copy of it
        self._effective: Mapping[Any, fused.Effective | None] = {}  # during a step, by what runs

    @property
    def current(self) -> LinearBase:
        return self.base_layer

    def __call__(self, x: Tensor) -> Tensor:
        running = self.running
        if (ready := self._effective.get(running)) is not None:
            return fused.effective_linear(x, ready)
        y = self.base_layer(x)
        for adapter in running:
            y = adapter(x, y, self.base_layer)
        return y

    # ---- one training step: the merge identity as a way to compute ----

    def merges(self, tokens: int | None) -> bool:
        """Is it right, and cheaper, to form W + dW once for a step over `tokens` positions? Not right with dropout."""
        merged, apart = self.costs(tokens or 1 << 30)
        hindered = any(a.MIXED or a.dropout.active or (a.NORMED and self.base_layer.trainable) for a in self.running)
        return (merged < apart or not self.running) and not hindered

    def costs(self, tokens: int) -> tuple[int, int]:
        """See `fused.costs`."""
        r, normed = sum(a.r for a in self.running), any(a.NORMED for a in self.running)
        return fused.costs(tokens, self.in_features, self.out_features, r, normed)

    def effective(self, out: Array, tokens: int | None) -> fused.Parts | None:
        parts = self.base_layer.effective(out, tokens) if self.merges(tokens) else None
        if parts is not None:
            added = [adapter.effective(out) for adapter in self.running]
            parts += [(params, pull) for params, pull in added if any(p.requires_grad for p in params)]
        return parts

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        def prepare() -> None:
            self._effective = {**self._effective, self.running: effective([self], tokens) if self.running else None}

        yield prepare

    def end_step(self) -> None:
        self._effective = {}

    # ---- merging ----

    def merge(self, names: Sequence[str] | None = None, requantize: bool = False) -> None:
        """Put adapters (the active ones) into a dense copy of the base: one float64 sum, rounded once.

        The base itself is kept, so `unmerge` restores every bit. A NaN or inf raises NonFiniteError; nothing changes.
        With `requantize` all that is merged is held as the base is: over codes it is coded again, which rounds part of
        dW away, and the layer's `lost` says how much. A dense base stays dense.
        """
        names = list(dict.fromkeys(self.active if names is None else names))
        names = [n for n in names if n in self.adapters and n not in self.merged]
        if not names and (not self.merged or requantize == self.requantized):
            return
        self.result((*self.merged, *names))  # raises where they cannot be at once
        base = self._original or self.base_layer
        W = base.dense_weight()
        with np.errstate(all="ignore"):  # a sum that overflows is found below
            deltas = (self.adapters[n].delta_weight(W.astype(np.float64)) for n in (*self.merged, *names))
            total = sum(deltas, start=W.astype(np.float64)).astype(W.dtype)
        if not bool(base.backend.xp.isfinite(total).all()):
            raise NonFiniteError(f"merging {', '.join(names)} gives weights that are not finite: something is broken")
        self.base_layer = base.rebuilt(total) if requantize else frozen_linear(total, base)
        self._original, self.merged, self.requantized = base, (*self.merged, *names), requantize

    def unmerge(self) -> None:
        """Take all merged adapters out again: the original base comes back, bit for bit."""
        if self._original is not None:
            self.base_layer, self._original, self.merged, self.requantized = self._original, None, (), False

    def delta_weight(self, name: str) -> np.ndarray:
        """dW (O, I) of one adapter, in float64 on the host."""
        base = self._original or self.base_layer
        return base.backend.to_numpy(self.adapters[name].delta_weight(base.dense_weight().astype(np.float64)))


class SavedModule(Wrapper):
    """A module that is trained whole: the original, and by adapter's name a copy of it that training may change."""

    ATTRIBUTES = "original_module", "modules_to_save"

    def __init__(self, original_module: Module):
        super().__init__()
        self.original_module = original_module
        self.modules_to_save: dict[str, Module] = {}

    def add(self, name: str) -> None:
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    @property
    def current(self) -> Any:
        return self.running[0] if self.running else self.original_module

    def effective(self, out: Array, tokens: int | None) -> fused.Parts | None:
        return self.current.effective(out, tokens)  # type: ignore[no-any-return]

    def result(self, names: Sequence[str]) -> Any:
        """The copy of the one adapter among `names` that has one. ConfigError where two have."""
        found = [n for n in names if n in self.modules_to_save]
        if len(found) > 1:
            raise ConfigError(f"adapters {', '.join(found)} each replace the same module: only one can be active")
        return self.modules_to_save[found[0]] if found else self.original_module

    weight = property(lambda self: self.current.weight)

    def __call__(self, *inputs: Any) -> Tensor:
        return self.current(*inputs)  # type: ignore[no-any-return]
