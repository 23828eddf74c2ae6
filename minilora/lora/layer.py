"""Where adapters live: a base layer and, by name, what is added to it.

`LoraLinear` wraps a linear base and holds adapters; `SavedModule` wraps any module and holds trained copies of it.
Both keep the base as it is: to disable an adapter is to have the base back, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from .. import functional as F
from ..autograd import Tensor
from ..backend import Array
from ..errors import ConfigError, NonFiniteError
from ..nn import Linear, Module, Parameter
from .lora import LoraAdapter


class Wrapper(Module):
    """Stands in a module's place: `inner` is what stood there, `held` what each adapter brings, by its name."""

    names: tuple[str, str]  # the attributes that these are, in PEFT's words

    def __init__(self) -> None:
        self.active: list[str] = []
        self.enabled = True
        self.merged: list[str] = []

    @property
    def inner(self) -> Any:
        return getattr(self, self.names[0])

    @property
    def held(self) -> dict[str, Any]:
        return getattr(self, self.names[1])  # type: ignore[no-any-return]

    def merge(self, names: list[str] | None = None) -> None:
        """Put adapters into the inner module's weights, where that means something."""

    def unmerge(self) -> None:
        """Take all of them out again."""

    def result(self) -> Any:
        """What is left in this place once adapters are merged and gone."""
        return self.inner


class LoraLinear(Wrapper):
    """y = base(x), and then each active adapter in turn.    x (..., I) -> (..., O)

    A base offers `in_features`, `out_features`, `bias` and `dense_weight()`. Adapters read x, never each other's
    output, so several active ones add up.
    """

    names = "base_layer", "adapters"

    def __init__(self, base_layer: Linear):
        super().__init__()
        self.base_layer = base_layer
        self.adapters: dict[str, LoraAdapter] = {}
        self._original: np.ndarray | None = None  # the base's weight while adapters are merged into it
        self._effective: Array | None = None  # W + sum of s B A, while a training step goes on

    @property
    def running(self) -> list[LoraAdapter]:
        """The adapters that the next forward applies."""
        if self.merged or not self.enabled:
            return []
        return [self.adapters[name] for name in self.active if name in self.adapters]

    def __call__(self, x: Tensor) -> Tensor:
        running = self.running
        if running and self._effective is not None:
            factors = [(a.lora_A, a.lora_B, a.scaling) for a in running]
            return F.merged_linear(x, self._effective, self.base_layer.bias, factors)
        y = self.base_layer(x)
        for adapter in running:
            y = adapter(x, y)
        return y

    # ---- one training step: the merge identity as a way to compute ----

    def prepare_step(self) -> None:
        """Form W + sum s B A once for all shards of a step, unless dropout sits between x and A."""
        running = self.running
        frozen = not self.base_layer.weight.requires_grad
        if running and frozen and not any(a.dropout.active for a in running):
            W = self.base_layer.dense_weight()
            for adapter in running:
                W = adapter.merged_weight(W)
            self._effective = W

    def end_step(self) -> None:
        self._effective = None

    # ---- merging ----

    def merge(self, names: list[str] | None = None) -> None:
        """Put adapters (the active ones) into the base's weight: one float64 sum from the original, rounded once.

        The original is kept, so that `unmerge` restores every bit. A NaN or inf raises NonFiniteError; nothing changes.
        """
        names = list(dict.fromkeys(self.active if names is None else names))
        names = [n for n in names if n in self.adapters and n not in self.merged]
        if not names:
            return
        weight = self.base_layer.weight
        original = weight.backend.to_numpy(weight.data).copy() if self._original is None else self._original
        W = weight.backend.from_numpy(original).astype(np.float64)
        with np.errstate(all="ignore"):  # a sum that overflows is found below
            for name in (*self.merged, *names):
                W = self.adapters[name].merged_weight(W)
            W = W.astype(weight.dtype)
        if not bool(weight.backend.xp.isfinite(W).all()):
            raise NonFiniteError(
                f"merging {', '.join(names)} gives weights that are not finite: the adapter or base is broken"
            )
        self._original, self.merged = original, [*self.merged, *names]
        weight.data = W

    def unmerge(self) -> None:
        """Take all merged adapters out again: the original weight comes back, bit for bit."""
        if self._original is not None:
            weight = self.base_layer.weight
            weight.data = weight.backend.from_numpy(self._original.astype(weight.dtype, copy=False))
            self._original, self.merged = None, []

    def delta_weight(self, name: str) -> np.ndarray:
        """dW (O, I) of one adapter, in float64 on the host."""
        weight = self.base_layer.weight
        zero = weight.backend.xp.zeros(weight.shape, np.float64)
        return weight.backend.to_numpy(self.adapters[name].merged_weight(zero))


class SavedModule(Wrapper):
    """A module that is trained whole: the original, and by adapter's name a copy of it that training may change."""

    names = "original_module", "modules_to_save"

    def __init__(self, original_module: Module):
        super().__init__()
        self.original_module = original_module
        self.modules_to_save: dict[str, Module] = {}

    def add(self, name: str) -> None:
        # Copies live where the original does: a backend is not a thing to copy.
        backends = {id(p.backend): p.backend for p in self.original_module.parameters()}
        self.modules_to_save[name] = copy.deepcopy(self.original_module, backends)

    def result(self) -> Any:
        return self.current

    @property
    def current(self) -> Any:
        """The module that the next forward runs. ConfigError where two active adapters would both replace it."""
        names = [n for n in self.active if n in self.modules_to_save] if self.enabled else []
        if len(names) > 1:
            raise ConfigError(f"adapters {', '.join(names)} each replace this module: only one of them can be active")
        return self.modules_to_save[names[0]] if names else self.original_module

    @property
    def weight(self) -> Parameter:
        return self.current.weight  # type: ignore[no-any-return]

    def __call__(self, *inputs: Any) -> Tensor:
        return self.current(*inputs)  # type: ignore[no-any-return]
