"""Where the packages of CUDA and CuPy are, and what is missing for the emulation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path

CUPY = "14.2.0"  # the replaced names are private to CuPy: another version may have others


class EmulationError(RuntimeError):
    """Something that the emulation does not support, or that this machine lacks."""


def why_not() -> str | None:
    """Why CuPy cannot be emulated here, or None."""
    if (platform.machine(), sys.platform) != ("x86_64", "linux"):
        return "CuPy is emulated on x86-64 Linux only"
    try:
        version = importlib.metadata.version("cupy-cuda13x")
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: cupy-cuda13x=={CUPY}"
    if version != CUPY:
        return f"CuPy {CUPY} can be emulated, but cupy-cuda13x {version} is installed"
    if not headers().joinpath("cuda_runtime_api.h").exists():
        return "not installed: nvidia-cuda-runtime, the headers of CUDA 13"
    missing = [program for program in ("g++", "nm") if not shutil.which(program)]
    return f"not installed: {', '.join(missing)} (apt-get install g++)" if missing else None


def folder_of(package: str) -> Path | None:
    """The folder of an installed package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def toolkit() -> Path:
    """Where the nvidia-cuda-* wheels put include/, bin/ and lib/; it may not exist."""
    return (folder_of("nvidia") or Path("nvidia")) / "cu13"


def headers() -> Path:
    return toolkit() / "include"


def find_nvcc() -> str | None:
    """nvcc on PATH, or that of the wheel nvidia-cuda-nvcc; None if there is none."""
    from_wheel = toolkit() / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(from_wheel) if from_wheel.exists() else None)


def cupy_headers() -> list[Path]:
    """The folders of headers that CuPy's kernels include."""
    cupy = folder_of("cupy")
    if cupy is None:
        raise EmulationError(f"not installed: cupy-cuda13x=={CUPY}")
    include = cupy / "_core" / "include"
    cccl = include / "cupy" / "_cccl"
    return [include, cccl / "thrust", cccl / "libcudacxx", cccl / "cub"]
