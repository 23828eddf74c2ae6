"""CUDA sources compiled for a real GPU, which is not needed for that: by nvcc and by NVRTC."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .packages import EmulationError, find_nvcc, headers

# For H100 and H200, with what CuPy adds for a RawModule.
OPTIONS = ("-arch=sm_90", "-ftz=true")


class Usage(NamedTuple):
    """What a kernel needs of the GPU, per thread; shared memory per block."""

    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int


def compile_with_nvcc(path: Path, defines: Iterable[str] = ()) -> dict[str, Usage]:
    """{kernel: what it needs}, as ptxas reports it. EmulationError with nvcc's words if it fails.

    defines   such as "REAL=float"
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise EmulationError("not installed: nvidia-cuda-nvcc")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *OPTIONS, *(f"-D{define}" for define in defines)]
        command += ["-cubin", "-Xptxas", "-v", "-o", str(Path(folder) / "out.cubin"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"nvcc failed on {path}: {done.stderr[:3000]}")
    usages = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        usages[name] = Usage(
            registers=_number(r"Used (\d+) registers", part),
            stack_bytes=_number(r"(\d+) bytes stack frame", part),
            spilled_bytes=_number(r"(\d+) bytes spill stores", part),
            shared_bytes=_number(r"(\d+) bytes smem", part),
        )
    return usages


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def compile_with_nvrtc(path: Path, defines: Iterable[str] = ()) -> bytes:
    """The compiled image, made as CuPy makes it: NVRTC has no headers of the host."""
    from cupy.cuda import compiler

    options = [*OPTIONS, f"-I{headers()}", *(f"-D{define}" for define in defines)]
    program = compiler._NVRTCProgram(path.read_text(encoding="utf-8"), path.name)
    image, _ = program.compile(tuple(options))
    return bytes(image)
