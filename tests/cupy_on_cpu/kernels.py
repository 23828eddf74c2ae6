"""Kernels compiled by g++ in place of NVRTC, and thrust's sorts done by NumPy."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import counting
from .building import SOURCES, build, cache, digest, write_source
from .packages import EmulationError, cupy_headers, headers

BOUNDS = r"(?:__launch_bounds__\([^)]*\)\s*)?"
KERNEL = re.compile(rf'extern\s+"C"\s+__global__\s+void\s+{BOUNDS}(\w+)\s*\(')
CUPY_INCLUDE = re.compile(r"#include <cupy/\w+\.(?:cuh|h)>\n")
COMPLEX = "#include <cupy/complex.cuh>\n"
PARTS = ("language.h", "threads.h", "launch.h")
COMMON = ("carray.cuh", "atomics.cuh", "math_constants.h")  # CuPy's headers in nearly all kernels
LATE = ("complex", "float16")  # they need other headers before these
GRID_LOOPS = ("CUPY_FOR", "FOR_EACH(")  # CuPy's, and that of minilora/cuda/kernels.cu
RETURN = re.compile(r"\breturn\s*;")
BARRIERS = ("__syncthreads", "__syncwarp", "__shfl")


def replace_compiler() -> None:
    """Let CuPy, which is imported, compile and sort with what this file has."""
    import cupy
    import cupy._core._routines_sorting as sorting
    from cupy.cuda import compiler

    compiler._compile_module_with_cache = compile_module
    cupy.cuda.thrust = sorting.thrust = Sorts()


def compile_module(source: str, options: tuple[str, ...] = (), **more: Any) -> Any:
    """The module of a CUDA source. Its kernels are `extern "C" __global__ void name(...)`."""
    from cupy.cuda import function

    if more.get("name_expressions"):
        raise EmulationError("templates by name_expressions are not emulated")
    module = function.Module()
    module.load(b"EMU:" + os.fsencode(_library(source, options)) + b"\0")
    return module


def _library(source: str, options: tuple[str, ...]) -> Path:
    """The shared library of a CUDA source, compiled unless that has been done before."""
    wanted = [option for option in options if option.startswith(("-D", "-I"))]
    prelude = _prelude(source)
    text = as_cpp(source)
    path = cache() / "kernels" / f"{digest(prelude.name, text, repr(wanted))}.cpp"
    write_source(path, text)
    return build(path.with_suffix(".so"), [f"-I{prelude}", *_options(), *wanted], path)


def _options() -> list[str]:
    search = [f"-I{folder}" for folder in (SOURCES, *cupy_headers(), headers())]
    return ["-O1", "-fpermissive", *search]


def _own(source: str) -> str:
    """The source without the lines that include CuPy's headers."""
    return CUPY_INCLUDE.sub("", source)


def _has_barriers(source: str) -> bool:
    return any(word in _own(source) for word in BARRIERS)


def _prelude(source: str) -> Path:
    """The folder of prelude.h, what a source needs before it; compiled once for many kernels.

    That halves the time for a kernel: most of it goes into reading headers.
    """
    lines = []
    if _has_barriers(source):
        lines.append("#define EMU_BARRIERS")
    if "float16" in _own(source):
        lines.append("#define EMU_HALF")
    lines += ['#include "language.h"', '#include "threads.h"', '#include "launch.h"']
    if "<cupy/carray.cuh>" in source and not any(word in _own(source) for word in LATE):
        lines += [f"#include <cupy/{name}>" for name in COMMON]
    text = "\n".join(lines) + "\n"
    parts = [(SOURCES / name).read_text(encoding="utf-8") for name in PARTS]
    folder = cache() / f"prelude-{digest(text, *parts)}"
    write_source(folder / "prelude.h", text)
    options = [*_options(), "-x", "c++-header"]
    build(folder / "prelude.h.gch", options, folder / "prelude.h")
    return folder


def as_cpp(source: str) -> str:
    """The C++ file for a CUDA source: what CUDA has and C++ lacks, the source, its launches."""
    own = _own(source)
    stopping = _functions_with_barriers(own) | _macros_with_return(own)
    lines = ['#include "prelude.h"']
    lines.append(source if "complex" in own else source.replace(COMPLEX, ""))  # slow to compile
    for name, body in _bodies(own).items():
        lines.append(f"EMU_KERNEL({name}, {int(_is_one_loop(body, stopping))})")
    return "\n".join(lines) + "\n"


def _bodies(source: str) -> dict[str, str]:
    """The text of each kernel, by its name: up to the next one."""
    found = list(KERNEL.finditer(source))
    ends = [match.start() for match in found[1:]] + [len(source)]
    return {match[1]: source[match.start() : end] for match, end in zip(found, ends, strict=True)}


def _functions_with_barriers(source: str) -> set[str]:
    """The words after which the threads of a block wait for each other."""
    words = set(BARRIERS)
    for function in re.split(r"(?=__device__|extern)", source):
        match = re.match(r"__device__[^;{]*?(\w+)\(", function)
        if match and any(word in function for word in words):
            words.add(match[1])
    return words


def _macros_with_return(source: str) -> set[str]:
    """The macros that may end a thread; CuPy's searchsorted has one."""
    macros = re.finditer(r"#define (\w+)(?:.*\\\n)*.*", source)
    return {macro[1] for macro in macros if RETURN.search(macro[0])}


def _is_one_loop(body: str, stopping: set[str]) -> bool:
    """Whether one thread can do all of a kernel's work, which is much faster here.

    It can if the kernel is a loop with a stride of the whole grid. `return` would then end the loop
    and not one thread's part.
    """
    is_loop = any(loop in body for loop in GRID_LOOPS)
    stops = any(re.search(rf"\b{word}", body) for word in stopping)
    return is_loop and not stops and not RETURN.search(body)


class Sorts:
    """In place of cupy.cuda.thrust, which is compiled for a GPU. Stable, and waits for nothing."""

    available = True

    def sort(self, dtype: Any, data: int, keys: int, shape: Any) -> None:
        def work() -> None:
            _array_at(data, dtype, shape).sort(axis=-1)

        _submit("sort", work)

    def argsort(self, dtype: Any, index: int, data: int, keys: int, shape: Any) -> None:
        """Write the order into `index`, and sort `data`."""
        import numpy as np

        def work() -> None:
            values = _array_at(data, dtype, shape)
            order = np.argsort(values, axis=-1, kind="stable")
            _array_at(index, np.intp, shape)[...] = order
            values[...] = np.take_along_axis(values, order, -1)

        _submit("argsort", work)


def _submit(name: str, work: Callable[[], None]) -> None:
    import cupy

    counting.submit(name, cupy.cuda.get_current_stream().ptr, work)


def _array_at(address: int, dtype: Any, shape: Any) -> Any:
    """The memory of an emulated device as an array of NumPy."""
    import numpy as np

    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(tuple(shape))
