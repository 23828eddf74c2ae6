"""Modules that hold others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .errors import ConfigError
from .modules import Module


class Sequential(Module):
    """Modules one after another, under torch's names "0", "1", ...

    Sequential(Linear(4, 8), ReLU(), Linear(8, 3)); len, iteration, and items by number or slice.
    """

    def __init__(self, *modules: Module):
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> Sequential:
        """Add a module at the end; returns self."""
        if not isinstance(module, Module):
            cure = "write Sequential(*modules) for a list, and a Module for a function, as ReLU()"
            raise ConfigError(
                f"Sequential takes modules, got {type(module).__name__} at {len(self)}: {cure}"
            )
        setattr(self, str(len(self)), module)
        return self

    def __call__(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x

    def __len__(self) -> int:
        return sum(name.isdecimal() for name, _ in self.named_children())

    def __iter__(self) -> Iterator[Module]:
        return (module for name, module in self.named_children() if name.isdecimal())

    def __getitem__(self, at: int | slice) -> Any:
        modules = list(self)
        return Sequential(*modules[at]) if isinstance(at, slice) else modules[at]
