"""Kernels compiled once and launched by name.

CuPy has NVRTC compile kernels.cu when a kernel is needed for the first time, which takes about a
second per dtype, and keeps the result in its cache on disk.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np

Array = Any  # cupy.ndarray
REALS = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}  # C's types
THREADS = 256  # of a block whose size is free
MOST_BLOCKS = 132 * 16  # enough to fill every multiprocessor of an H200
NULL = np.uintp(0)


class Kernels:
    """The kernels of kernels.cu for numbers of one dtype.

    Launches take arrays (contiguous), None for no array, Python's integers for the kernel's Int,
    Python's floats for its REAL, and NumPy's numbers for what they are.
    """

    def __init__(self, dtype: Any):
        import cupy

        self.real = np.dtype(dtype).type
        source = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
        options = (f"-DREAL={REALS[np.dtype(dtype)]}", "-std=c++17")
        self._module = cupy.RawModule(code=source, options=options)
        self._functions: dict[str, Any] = {}
        self.function("add_rows")  # compiles: an error shows here

    def function(self, name: str) -> Any:
        if name not in self._functions:
            self._functions[name] = self._module.get_function(name)
        return self._functions[name]

    def launch(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        """Launch a kernel on a grid of `blocks` with `threads` each; nothing for no blocks."""
        if blocks:
            self.function(name)((blocks,), (threads,), tuple(map(self._argument, arguments)))

    def for_each(self, name: str, count: int, *arguments: Any) -> None:
        """Launch a kernel that loops over `count` numbers with its whole grid."""
        self.launch(name, min(MOST_BLOCKS, -(-count // THREADS)), THREADS, *arguments)

    def for_rows(self, name: str, rows: int, columns: int, *arguments: Any) -> None:
        """Launch a kernel that gives each of `rows` rows to a block."""
        self.launch(name, rows, max(32, min(512, 32 * -(-columns // 128))), *arguments)

    def for_columns(self, name: str, columns: int, *arguments: Any) -> None:
        """Launch a kernel that gives each 32 of `columns` columns to a block of 32 warps."""
        self.launch(name, -(-columns // 32), 1024, *arguments)

    def for_all(self, name: str, *arguments: Any) -> None:
        """Launch a kernel that is one block."""
        self.launch(name, 1, 1024, *arguments)

    def _argument(self, value: Any) -> Any:
        if type(value) is int:
            return np.int64(value)
        if type(value) is float:
            return self.real(value)
        return NULL if value is None else value


@functools.cache
def kernels_for(device: int, dtype: Any) -> Kernels | None:
    """The kernels for a dtype on the current device, number `device`.

    None for another dtype than float32 and float64, and, with a warning, if they do not compile.
    """
    if np.dtype(dtype) not in REALS:
        return None
    try:
        return Kernels(dtype)
    except Exception as error:  # of the compiler, the driver, or a missing toolkit
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        warnings.warn(
            f"cuda:{device}: the kernels in kernels.cu do not compile for {np.dtype(dtype)}: "
            f"{reason}; NumPy's way of computing is used, which is slower on a GPU "
            "(pip install -e .[cuda] brings CUDA's headers)",
            stacklevel=2,
        )
        return None
