"""Wrappers: a module of the base with adapters, by name, in its place in the model.

`LoraLinear` wraps a linear layer and has adapters; `SavedModule` wraps any module and has trained
copies of it. Both leave the base as it is: disabling an adapter restores the base bit for bit.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from ..autograd import Tensor
from ..backend import Array
from ..effective import Parts, Pull, count_operations, effective_linear
from ..errors import ConfigError
from ..nn import LinearBase, Module, Parameter, PreparedModule
from ..precision import FLOAT32
from .dora import require_compatible
from .lora import LoraAdapter
from .merging import Merging

# By layer: the adapters that run there in place of the active ones, in this thread and in the
# threads that it hands shards to. Never changed in place.
_chosen = contextvars.ContextVar[dict[Any, Any]]("chosen", default={})  # noqa: B039


class Wrapper(Module):
    """A module in the place of `inner`, with what each adapter adds to it in `entries`.

    What it computes is inner + the sum of the adapters that are active or merged; a merged one is
    in the inner module's weight, and the others run beside it.

    active        the adapters that run, if `enabled`
    merged        the adapters that are merged into the inner module
    requantized   is the merged weight stored as codes again?
    """

    ATTRIBUTES: tuple[str, str]  # where `inner` and `entries` are: PEFT's names for them

    def __init__(self) -> None:
        self.active: Sequence[str] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.requantized = False

    def extra_repr(self) -> str:
        active = ", ".join(self.active) if self.enabled else ""
        merged = f", merged: {', '.join(self.merged)}" if self.merged else ""
        return f"active: {active or 'none'}{merged}"

    @property
    def inner(self) -> Any:
        """The wrapped module."""
        return getattr(self, self.ATTRIBUTES[0])

    @property
    def entries(self) -> dict[str, Any]:
        """Adapters, or copies of the wrapped module, by the adapter's name."""
        return getattr(self, self.ATTRIBUTES[1])  # type: ignore[no-any-return]

    @property
    def current(self) -> Any:
        """The module inside that the next forward runs."""
        raise NotImplementedError

    # What a linear layer offers, if this wraps one.
    in_features = property(lambda self: self.current.in_features)
    out_features = property(lambda self: self.current.out_features)
    bias = property(lambda self: self.current.bias)
    backend = property(lambda self: self.current.backend)
    dtype = property(lambda self: self.current.dtype)
    compute = property(lambda self: self.current.compute)

    @property
    def running(self) -> tuple[Any, ...]:
        """The entries that the next forward of this thread applies to what is merged already."""
        if not self.enabled:
            return ()
        names = _chosen.get().get(self, self.active) or ()
        entries = self.entries
        merged = self.merged
        return tuple(entries[name] for name in names if name in entries and name not in merged)

    def merge(self, names: Sequence[str] | None = None, requantize: bool = False) -> None:
        """Put adapters into the inner module's weights, where that means something."""

    def unmerge(self) -> None:
        """Take all of them out again."""

    def result(self, names: Sequence[str]) -> Any:
        """The module that is left once these adapters are merged and the wrapper is removed.

        ConfigError if they cannot run together.
        """
        require_compatible(self.entries, names)
        return self.inner


@contextlib.contextmanager
def use_adapters(layers: Iterable[Wrapper], names: Sequence[str] | None) -> Iterator[None]:
    """Inside, these layers run `names` in place of the active adapters.

    That holds in this thread and in those that it hands shards to, not in one that runs beside it.
    None runs the inner modules without adapters, whatever a block further inside chooses.
    """
    chosen = dict(_chosen.get())
    for layer in layers:
        if chosen.get(layer, ()) is not None:
            chosen[layer] = names
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


class LoraLinear(Merging, PreparedModule, Wrapper):
    """y = base(x), then each active adapter adds to it.    x (..., I) -> (..., O)

    The base is any `LinearBase`. Adapters read x, never each other's output, so several add up.
    """

    base_layer: LinearBase
    adapters: dict[str, LoraAdapter]
    # The base layer over W, while an adapter trains over another one: see starts/layers.py.
    _unchanged: LinearBase | None = None

    @property
    def has_changed_base(self) -> bool:
        return self._unchanged is not None

    @property
    def unchanged_base(self) -> LinearBase:
        """The base layer over W."""
        return self._unchanged or self.base_layer

    def change_base(self, base: LinearBase) -> None:
        """Run over `base` until `restore_base`."""
        self._unchanged = self.base_layer
        self.base_layer = base

    def move_unchanged(self, device: Any, dtype: Any) -> None:
        """Move the layer that has W, as `Module.to` does: it is not a child module."""
        if self._unchanged is not None:
            self._unchanged.to(device, dtype)

    def restore_base(self) -> LinearBase:
        """Run over W again; returns the other base."""
        changed = self.base_layer
        self.base_layer = self.unchanged_base
        self._unchanged = None
        return changed

    def __call__(self, x: Tensor) -> Tensor:
        running = self.running
        prepared = self._effective.get(running)
        if prepared is not None:
            return effective_linear(x, prepared)
        y = self.refuse_gradients(self.base_layer(x))
        for adapter in running:
            y = adapter(x, y, self.original)
        return y

    @property
    def bias(self) -> Any:
        """The base's bias, as the adapters that run move it."""
        bias = self.current.bias
        for adapter in self.running:
            bias = adapter.move_bias(bias)
        return bias

    def _move_bias(self, made: Any, names: Sequence[str]) -> Any:
        bias = made.bias
        for name in names:
            bias = self.adapters[name].move_bias(bias)
        if bias is not made.bias:
            made.bias = Parameter(bias.data, False)
        return made

    # ---- one training step: W + dW formed once ----

    def merges(self, tokens: int | None) -> bool:
        """Is it right, and cheaper, to form W + dW once for a step over `tokens` positions?

        It is not right with dropout, nor where products with the base's weight are rounded.
        """
        if self.base_layer.compute != FLOAT32:
            return False
        running = self.running
        for adapter in running:
            if adapter.MIXED or adapter.dropout.active:
                return False
            if (adapter.NORMED or adapter.reads_W) and self.base_layer.trainable:
                return False
        merged, apart = self.count_operations(tokens or 1 << 30)
        return merged < apart or not running

    def count_operations(self, tokens: int) -> tuple[int, int]:
        """See `effective.count_operations`."""
        running = self.running
        r = sum(adapter.r for adapter in running)
        normed = any(adapter.NORMED or adapter.FORMED for adapter in running)
        return count_operations(tokens, self.in_features, self.out_features, r, normed)

    def write_effective_weight(self, out: Array, tokens: int | None) -> Parts | None:
        """See `LinearBase.write_effective_weight`."""
        parts = self.base_layer.write_effective_weight(out, tokens) if self.merges(tokens) else None
        if parts is None:
            return None
        missed = self.missed_parameters
        if missed:
            parts.append((missed, Pull(self.raise_merged)))
        for adapter in self.running:
            params, pull = adapter.write_effective_weight(out, self.original)
            if any(p.requires_grad for p in params):
                parts.append((params, pull))
        return parts

    def preparations(self, tokens: int | None) -> Iterator[Callable[[], None]]:
        def prepare() -> None:
            running = self.running
            if running:
                self.prepare_weight(running, [self], tokens)

        yield prepare


class SavedModule(Wrapper):
    """A module that is trained whole: the original and, by adapter, a trainable copy of it."""

    ATTRIBUTES = "original_module", "modules_to_save"

    def __init__(self, original_module: Module):
        super().__init__()
        self.original_module = original_module
        self.modules_to_save: dict[str, Module] = {}

    def add(self, name: str) -> None:
        """Add a copy for the adapter `name`. It is to train, so its products are not rounded."""
        made = copy.deepcopy(self.original_module)
        made.set_compute(FLOAT32)
        self.modules_to_save[name] = made

    def set_compute(self, compute: str) -> None:
        self.original_module.set_compute(compute)

    @property
    def current(self) -> Any:
        running = self.running
        return running[0] if running else self.original_module

    weight = property(lambda self: self.current.weight)

    def __call__(self, *inputs: Any) -> Tensor:
        return self.current(*inputs)  # type: ignore[no-any-return]

    def write_effective_weight(self, out: Array, tokens: int | None) -> Parts | None:
        return self.current.write_effective_weight(out, tokens)  # type: ignore[no-any-return]

    def result(self, names: Sequence[str]) -> Any:
        """The copy of the one adapter among `names` that has one, or the original.

        ConfigError if several have one.
        """
        owner = find_owner(self.modules_to_save, names, "replace the same module")
        return self.original_module if owner is None else self.modules_to_save[owner]


def find_owner(entries: Collection[str], names: Sequence[str], what: str) -> str | None:
    """The one name with an entry, or None. ConfigError if several have one: `what` they each do."""
    owners = [name for name in dict.fromkeys(names) if name in entries]
    if len(owners) > 1:
        raise ConfigError(f"adapters {', '.join(owners)} each {what}: only one can be active")
    return owners[0] if owners else None
