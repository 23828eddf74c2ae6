"""The emulation takes effect when cupy is imported, in this process and in those that it starts."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from .packages import EmulationError, why_not

SITE = Path(__file__).parent / "site"  # its sitecustomize.py calls `install`


class Finder(importlib.abc.MetaPathFinder):
    """Finds cupy as Python does, and gives it a Loader."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "cupy":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


class Loader(importlib.abc.Loader):
    """Replaces the libraries before cupy runs, and the compiler after it."""

    def __init__(self, original: Any):
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        from . import building, kernels, libraries

        # CUB's reductions are compiled for a GPU; those of CuPy itself are compiled here.
        os.environ["CUPY_ACCELERATORS"] = ""
        os.environ["CUPY_CACHE_DIR"] = str(building.cache() / "cupy")
        libraries.load()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about libraries that are not installed
            self.original.exec_module(module)
            kernels.replace_compiler()


def is_installed() -> bool:
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def install() -> None:
    """From now on `import cupy` gives the emulation, here and in processes that are started."""
    if is_installed():
        return
    reason = why_not()
    if reason is not None:
        raise EmulationError(reason)
    if "cupy" in sys.modules:
        raise EmulationError("cupy is imported already: call cupy_on_cpu.install() earlier")
    sys.meta_path.insert(0, Finder())
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(SITE) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, paths)])
