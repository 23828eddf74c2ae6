"""CUDA's runtime, driver and cuBLAS, replaced by the libraries of src/."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import counting
from .building import SOURCES, build, cache, digest, write_source
from .packages import EmulationError, folder_of, headers

DRIVER_PARTS = ("devices.cpp", "memory.cpp", "streams.cpp", "launches.cpp")
REAL = {"cudaGetErrorName", "cudaGetErrorString", "cudaRuntimeGetVersion"}  # they need no device
JUMP = b"\xff\x25\x00\x00\x00\x00"  # jmp *(%rip): to the address in the next eight bytes
NOT_SUPPORTED = 801  # cudaErrorNotSupported
_kept: list[Any] = []  # what C code points to


def load() -> ctypes.CDLL:
    """Compile and load the driver and cuBLAS; let CuPy's runtime and pathfinder find them."""
    driver_path, cublas_path = _build_both()
    driver = ctypes.CDLL(str(driver_path), mode=ctypes.RTLD_GLOBAL)
    cublas = ctypes.CDLL(str(cublas_path), mode=ctypes.RTLD_GLOBAL)
    counting.connect(driver)
    _let_pathfinder_find(cublas_path, cublas)
    _redirect_runtime(driver)
    return driver


# ---- compiling -----------------------------------------------------------------------------------


def _build_both() -> tuple[Path, Path]:
    """The two libraries, under the names by which CuPy asks for them."""
    unsupported = _unsupported_functions()
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    folder = cache() / f"libraries-{digest(*texts, unsupported)}"
    write_source(folder / "unsupported.inc", unsupported)
    includes = [f'#include "{part}"\n' for part in DRIVER_PARTS]
    write_source(folder / "driver.cpp", "".join(includes))
    paths = []
    sources = ("libcuda.so.1", folder / "driver.cpp"), ("libcublas.so.13", SOURCES / "cublas.cpp")
    for name, source in sources:
        options = ["-O2", f"-Wl,-soname,{name}", f"-I{SOURCES}", f"-I{headers()}", f"-I{folder}"]
        paths.append(build(folder / name, options, source))
    return paths[0], paths[1]


def _unsupported_functions() -> str:
    """A line for every function that CuPy looks up in cuBLAS and cublas.cpp does not have."""
    package = folder_of("cupy_backends")
    if package is None:
        raise EmulationError("CuPy's package cupy_backends is missing")
    library = next((package / "cuda" / "libs").glob("cublas.*.so"))
    names = set(re.findall(rb"\0(cublas[A-Z]\w*)(?=\0)", library.read_bytes()))
    source = (SOURCES / "cublas.cpp").read_text(encoding="utf-8")
    ours = set(re.findall(r"API int (cublas\w+)\(", source))
    missing = sorted({name.decode() for name in names} - ours)
    return "".join(f"UNSUPPORTED({name})\n" for name in missing)


# ---- redirecting ---------------------------------------------------------------------------------


def _let_pathfinder_find(path: Path, library: ctypes.CDLL) -> None:
    """CuPy asks the package cuda.pathfinder where cuBLAS is."""
    from cuda import pathfinder

    class Found:
        abs_path = str(path)
        _handle_uint = library._handle
        was_already_loaded_from_elsewhere = False
        found_via = "cupy_on_cpu"

    original = pathfinder.load_nvidia_dynamic_lib

    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        return Found if name == "cublas" else original(name, *args, **kwargs)

    pathfinder.load_nvidia_dynamic_lib = find


def _redirect_runtime(driver: ctypes.CDLL) -> None:
    """Turn each `cuda*` function inside CuPy's runtime module into a jump to our `fk_cuda*`."""
    from cupy_backends.cuda.api import runtime

    path = os.path.realpath(runtime.__file__)
    base = _load_address(path)
    symbols = subprocess.check_output(["nm", path], text=True)
    for offset, name in re.findall(r"^([0-9a-f]+) [tT] (cuda[A-Z]\w*)$", symbols, re.MULTILINE):
        if name not in REAL:
            target = getattr(driver, f"fk_{name}", None) or _refusing(name)
            address = ctypes.cast(target, ctypes.c_void_p).value or 0
            # Functions begin at multiples of 16 bytes, so that these 14 fit.
            _write_code(base + int(offset, 16), JUMP + address.to_bytes(8, "little"))


def _load_address(path: str) -> int:
    """Where the library is in this process's memory."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        line = next(line for line in maps if line.rstrip().endswith(path))
    return int(line.split("-")[0], 16)


def _write_code(address: int, code: bytes) -> None:
    page = os.sysconf("SC_PAGESIZE")
    start = address // page * page
    readable_writable_executable = 7
    length = address + len(code) - start
    mprotect = ctypes.CDLL(None).mprotect
    if mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), readable_writable_executable):
        raise EmulationError("this system does not let a program change its code")
    ctypes.memmove(address, code, len(code))


def _refusing(name: str) -> Any:
    """A function that prints that `name` is not emulated, and fails."""

    def refuse() -> int:
        print(f"cupy_on_cpu: {name} is not emulated", file=sys.stderr, flush=True)
        return NOT_SUPPORTED

    function = ctypes.CFUNCTYPE(ctypes.c_int)(refuse)
    _kept.append(function)
    return function
