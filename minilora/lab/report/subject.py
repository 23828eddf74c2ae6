"""What a report is about: a model before and after training, and what changed in each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, NonFiniteError
from ...lora import HydraConfig, LoraLinear, PeftModel
from ...lora.embedding import LoraEmbedding
from ...lora.factors import Part
from ...lora.layer import SavedModule, Wrapper, use_adapters
from ...lora.lora import LoraAdapter
from ...lora.maps.adapter import MapAdapter
from ...lora.tokens import TrainableTokens
from ...nn import Embedding, LinearBase
from ...tools.windows import require_switchable, wrappers_of

Array = np.ndarray


class Change(NamedTuple):
    """One weight W and its change dW, in float64.

    W          (O, I); (C, V) for an embedding's adapter, which reads one-hot vectors; or a vector
    part       factors of dW, where it is a product of two of low rank
    dW         the change itself where it is not
    is_linear  whether a linear layer computes W x
    """

    W: Array
    part: Part | None
    dW: Array | None
    is_linear: bool

    def dense(self) -> Array:
        """dW, formed if need be."""
        if self.part is not None:
            return np.asarray(self.part.c * (self.part.B @ self.part.A))
        assert self.dW is not None
        return self.dW


class Subject:
    """A model before and after training.

    adapted   a PeftModel with one active adapter, or a model whose weights all trained
    base      that model as it was before; the same object as `adapted` if it is a PeftModel
    resized   whether the adapter changed the number of the base's tokens
    """

    def __init__(self, adapted: Any, base: Any = None, resized: bool = False):
        self.adapted = adapted
        self.base = adapted if isinstance(adapted, PeftModel) else base
        self.resized = resized

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.adapted, PeftModel)

    @property
    def name(self) -> str:
        """The active adapter's. ConfigError unless there is exactly one."""
        names = self.adapted.active_adapters
        if len(names) != 1:
            raise ConfigError(
                f"the model has {len(names)} active adapters, and a report is about one: "
                "activate one of them with set_adapter"
            )
        return str(names[0])

    @property
    def config(self) -> Any:
        """The configuration of the adapter, as PeftModel has it."""
        return self.adapted.peft_config[self.name]

    @property
    def wrappers(self) -> dict[str, Wrapper]:
        """The layers that the adapter changes, by path."""
        layers = wrappers_of(self.adapted)
        return {path: layer for path, layer in layers.items() if self.name in layer.entries}

    def require_comparable(self) -> None:
        """ConfigError if the base alone cannot be measured with this model."""
        if self.base is None:
            raise ConfigError("the base is not at hand, so nothing can be compared with it")
        if not self.has_adapter:
            return
        require_switchable(self.adapted)
        if self.resized:
            raise ConfigError("the adapter changes the number of tokens, on which losses depend")

    def require_adapter(self) -> None:
        """ConfigError if all weights trained: then nothing can be switched layer by layer."""
        if not self.has_adapter:
            raise ConfigError("all weights of the model trained: only an adapter can be switched")
        self.require_comparable()

    @contextlib.contextmanager
    def as_base(self) -> Iterator[Any]:
        """A context with the model before training."""
        if not self.has_adapter:
            yield self.base
            return
        with use_adapters(self.wrappers.values(), None):
            yield self.base.get_base_model()

    @contextlib.contextmanager
    def as_adapted(self) -> Iterator[Any]:
        """A context with the model after training."""
        yield self.adapted.get_base_model()

    # ---- changes -----------------------------------------------------------------------------

    def changes(self) -> dict[str, Callable[[], Change]]:
        """By path, what forms W and dW of each layer that trained. ConfigError for HydraLoRA."""
        if self.has_adapter:
            if isinstance(self.config, HydraConfig):
                raise ConfigError(
                    "HydraLoRA adds another matrix at every position, so no dW exists"
                )
            return {
                path: self._change_of(layer)
                for path, layer in self.wrappers.items()
                if hasattr(layer.inner, "weight")  # a whole block that was saved has several
            }
        if self.base is None:
            raise ConfigError("the base is not at hand, so what training changed is not known")
        before = dict(self.base.named_modules())
        changes = {}
        seen = set()
        for path, module in self.adapted.named_modules():
            if isinstance(module, (LinearBase, Embedding)) and id(module.weight) not in seen:
                seen.add(id(module.weight))
                changes[path] = _difference(before[path], module)
        return changes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By path, the shapes of the weights of `changes`, without reading one."""
        if not self.has_adapter:
            modules = dict(self.adapted.named_modules())
            return {path: tuple(modules[path].weight.shape) for path in self.changes()}
        wrappers = self.wrappers
        return {path: tuple(wrappers[path].inner.weight.shape) for path in self.changes()}

    def _change_of(self, layer: Any) -> Callable[[], Change]:
        name = self.name

        def change() -> Change:
            entry = layer.entries[name]
            if isinstance(layer, SavedModule):
                return _difference(layer.inner, entry)()
            if isinstance(layer, TrainableTokens):
                W = _weight_of(layer.original)
                rows = entry.trainable_tokens_delta.numpy().astype(np.float64)
                return Change(W, None, rows - W[entry.indices], False)
            assert isinstance(layer, (LoraLinear, LoraEmbedding))
            base = layer.as_linear(layer.original)
            W = base.backend.to_numpy(base.dense_weight()).astype(np.float64)
            is_linear = isinstance(layer, LoraLinear)
            if has_factors(entry):
                return Change(W, entry.part(), None, is_linear)
            return Change(W, None, layer.delta_weight(name), is_linear)

        return change


def has_factors(entry: LoraAdapter) -> bool:
    """Is dW of this adapter s B A, with factors of low rank?"""
    return not (isinstance(entry, MapAdapter) or entry.NORMED or entry.MIXED)


def _difference(before: Any, after: Any) -> Callable[[], Change]:
    """The change of a module's weight, of any shape."""

    def change() -> Change:
        W = _weight_of(before)
        return Change(W, None, _weight_of(after) - W, isinstance(before, LinearBase))

    return change


def _weight_of(module: Any) -> Array:
    """The weight of a module, in float64 on the host."""
    if isinstance(module, LinearBase):
        weight = module.backend.to_numpy(module.dense_weight())
    else:
        weight = module.weight.numpy()
    return np.asarray(weight, np.float64)


def require_finite(path: str, change: Change) -> Change:
    """The change. NonFiniteError: LAPACK's decomposition of what is not finite may never end."""
    arrays = [change.W, change.dW]
    if change.part is not None:
        arrays += [change.part.A, change.part.B]
    if not all(np.isfinite(array).all() for array in arrays if array is not None):
        raise NonFiniteError(f"{path}: its weight, or the change of it, is not finite")
    return change
