"""Where adapters live: a base layer and, by name, what is added to it.

`LoraLinear` wraps a linear base and holds adapters; `SavedModule` wraps any module and holds trained copies of it.
Both keep the base as it is: to disable an adapter is to have the base back, bit for bit.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..autograd import Tensor
from ..backend import Array
from ..effective import Parts, costs, effective_linear
from ..errors import ConfigError
from ..nn import LinearBase, Module, PreparedModule
from .dora import require_compatible
from .lora import LoraAdapter
from .merging import Merging

# By layer: the adapters that this thread, and the shards it hands to others, runs there in place of the active ones.
_chosen: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
    "chosen", default=None
)


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
        names = (
            ()
            if self.merged or not self.enabled
            else (_chosen.get() or {}).get(self, self.active) or ()
        )
        return tuple(self.held[name] for name in names if name in self.held)

    def merge(self, names: Sequence[str] | None = None, requantize: bool = False) -> None:
        """Put adapters into the inner module's weights, where that means something."""

    def unmerge(self) -> None:
        """Take all of them out again."""

    def result(self, names: Sequence[str]) -> Any:
        """What is left in this place once these adapters are merged and gone. ConfigError if not all can be at once."""
        require_compatible(self.held, names)
        return self.inner


@contextlib.contextmanager
def use_adapters(layers: Iterable[Wrapper], names: Sequence[str] | None) -> Iterator[None]:
    """Inside, these layers run `names` in place of the active adapters: in this thread, not in one that runs beside it.

    With None they run their inner modules alone, whatever is chosen further inside.
    """
    before = _chosen.get() or {}
    token = _chosen.set(
        {**before, **{layer: names for layer in layers if before.get(layer, ()) is not None}}
    )
    try:
        yield
    finally:
        _chosen.reset(token)


class LoraLinear(Merging, PreparedModule, Wrapper):
    """y = base(x), and then each active adapter in turn.    x (..., I) -> (..., O)

    The base is any `LinearBase`. Adapters read x, never each other's output, so several active ones add up.
    """

    ATTRIBUTES = "base_layer", "adapters"

    def __init__(self, base_layer: LinearBase):
        super().__init__()
        self.base_layer: LinearBase = base_layer
        self.adapters: dict[str, LoraAdapter] = {}

    @property
    def current(self) -> LinearBase:
        return self.base_layer

    def __call__(self, x: Tensor) -> Tensor:
        running = self.running
        if (ready := self._effective.get(running)) is not None:
            return effective_linear(x, ready)
        y = self.base_layer(x)
        for adapter in running:
            y = adapter(x, y, self.base_layer)
        return y

    # ---- one training step: the merge identity as a way to compute ----

    def merges(self, tokens: int | None) -> bool:
        """Is it right, and cheaper, to form W + dW once for a step over `tokens` positions? Not right with dropout."""
        merged, apart = self.costs(tokens or 1 << 30)
        hindered = any(
            a.MIXED or a.dropout.active or (a.NORMED and self.base_layer.trainable)
            for a in self.running
        )
        return (merged < apart or not self.running) and not hindered

    def costs(self, tokens: int) -> tuple[int, int]:
        """See `effective.costs`."""
        r, normed = sum(a.r for a in self.running), any(a.NORMED for a in self.running)
        return costs(tokens, self.in_features, self.out_features, r, normed)

    def effective(self, out: Array, tokens: int | None) -> Parts | None:
        parts = self.base_layer.effective(out, tokens) if self.merges(tokens) else None
        if parts is not None:
            added = [adapter.effective(out) for adapter in self.running]
            parts += [
                (params, pull) for params, pull in added if any(p.requires_grad for p in params)
            ]
        return parts

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        def prepare() -> None:
            running = self.running
            if running:
                self.prepare_weight(running, [self], tokens)

        yield prepare


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

    def effective(self, out: Array, tokens: int | None) -> Parts | None:
        return self.current.effective(out, tokens)  # type: ignore[no-any-return]

    def result(self, names: Sequence[str]) -> Any:
        """The copy of the one adapter among `names` that has one. ConfigError where two have."""
        found = [n for n in names if n in self.modules_to_save]
        if len(found) > 1:
            raise ConfigError(
                f"adapters {', '.join(found)} each replace the same module: only one can be active"
            )
        return self.modules_to_save[found[0]] if found else self.original_module

    weight = property(lambda self: self.current.weight)

    def __call__(self, *inputs: Any) -> Tensor:
        return self.current(*inputs)  # type: ignore[no-any-return]
