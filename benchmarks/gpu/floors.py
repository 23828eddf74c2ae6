"""The machine, and the least that launches, copies and products cost on it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .bench import Bench
from .conducting import Facts

PACKAGES = (
    "numpy",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "threadpoolctl",
    "tqdm",
    "pytest",
    "hypothesis",
    "torch",
    "transformers",
    "peft",
)
LIBRARIES = re.compile(r"/\S*lib(?:cuda|cudart|cublas|cublasLt|nvrtc)[.-]\S*")
CLOCKS = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"


# ---- the machine ---------------------------------------------------------------------------------


def probe(bench: Bench) -> None:
    """Device, driver, clocks, versions, and the libraries that CuPy has loaded."""
    bench.notes.add(
        executable=sys.executable,
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := find_version(name))},
        emulated=bench.emulated,
    )
    bench.notes.add(clocks=read_clocks())
    bench.notes.measure("device", partial(_describe_device, bench))
    bench.notes.measure("cuda", partial(_describe_cuda, bench))
    bench.notes.measure("libraries", partial(_find_libraries, bench))
    # For a reader of the log. An emulated device does not know all that it asks for.
    with contextlib.suppress(Exception):
        bench.backend.xp.show_config()


def find_version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def read_clocks() -> Facts:
    """What nvidia-smi says of each GPU, one line each."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"skipped": "not installed: nvidia-smi"}
    command = [program, f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"skipped": f"nvidia-smi: {error}"}
    return {"columns": CLOCKS, "gpus": (done.stdout or done.stderr).strip().splitlines()[:16]}


def _describe_device(bench: Bench) -> Facts:
    properties = bench.backend.xp.cuda.runtime.getDeviceProperties(0)
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
    }


def _describe_cuda(bench: Bench) -> Facts:
    runtime = bench.backend.xp.cuda.runtime
    tf32 = os.environ.get("CUPY_TF32", "0") not in ("", "0")
    return {
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "tf32": tf32,
    }


def _find_libraries(bench: Bench) -> list[str]:
    """The paths of CUDA's libraries in this process after a kernel and a product."""
    xp = bench.backend.xp
    a = xp.ones((8, 8), np.float32)
    float((a @ a).sum())
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return sorted(set(LIBRARIES.findall(maps)))


# ---- floors --------------------------------------------------------------------------------------


def floors(bench: Bench) -> None:
    """Microseconds per launch, of the host and with the device; rates of copies and products."""
    for name, make in LAUNCHES.items():
        bench.notes.measure(f"launch:{name}", partial(_time_launches, bench, make))
    bench.notes.measure("launch:node of a graph", partial(_time_nodes, bench))
    bench.notes.measure("copy", partial(_time_copy, bench))
    bench.notes.measure("matmul float32", partial(_time_product, bench))
    bench.notes.measure("matmul tf32", partial(_with_tf32, bench))
    bench.notes.measure("98,304 products 1 x 1", partial(_time_dots, bench))


def _ufunc(xp: Any) -> Callable[[], Any]:
    x = xp.zeros(1, np.float32)
    return lambda: xp.add(x, x, out=x)


def _elementwise(xp: Any) -> Callable[[], Any]:
    x = xp.zeros(1, np.float32)
    kernel = xp.ElementwiseKernel("float32 x", "float32 y", "y = x", "floor_of_elementwise")
    return lambda: kernel(x, x)


def _raw(xp: Any) -> Callable[[], Any]:
    source = 'extern "C" __global__ void floor_of_raw(float* x) { x[0] = 0; }'
    kernel = xp.RawKernel(source, "floor_of_raw")
    arguments = (xp.zeros(1, np.float32),)
    return lambda: kernel((1,), (1,), arguments)


def _matmul(xp: Any) -> Callable[[], Any]:
    a = xp.zeros((8, 8), np.float32)
    out = xp.zeros_like(a)
    return lambda: xp.matmul(a, a, out=out)


def _batched(xp: Any) -> Callable[[], Any]:
    a = xp.zeros((4, 8, 8), np.float32)
    out = xp.zeros_like(a)
    return lambda: xp.matmul(a, a, out=out)


LAUNCHES = {
    "ufunc": _ufunc,
    "ElementwiseKernel": _elementwise,
    "RawKernel": _raw,
    "matmul": _matmul,
    "batched matmul": _batched,
}


def _time_launches(bench: Bench, make: Callable[[Any], Callable[[], Any]]) -> Facts:
    launch = make(bench.backend.xp)
    count = bench.few(1000)
    launch()  # compiles
    bench.wait()
    begun = time.perf_counter()
    for _ in range(count):
        launch()
    launched = time.perf_counter()
    bench.wait()
    done = time.perf_counter()
    return {
        "host_microseconds": round(1e6 * (launched - begun) / count, 2),
        "microseconds": round(1e6 * (done - begun) / count, 2),
    }


def _time_nodes(bench: Bench) -> Facts:
    """Microseconds per node of a graph of small kernels that depend on each other."""
    xp = bench.backend.xp
    nodes = bench.few(500)
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        launch = _raw(xp)
        launch()
        stream.begin_capture()
        for _ in range(nodes):
            launch()
        graph = stream.end_capture()
    repeats = bench.few(20)
    graph.launch(stream)
    stream.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        graph.launch(stream)
    launched = time.perf_counter()
    stream.synchronize()
    done = time.perf_counter()
    return {
        "host_microseconds_per_graph": round(1e6 * (launched - begun) / repeats, 2),
        "microseconds": round(1e6 * (done - begun) / repeats / nodes, 3),
    }


def _seconds(bench: Bench, work: Callable[[], Any], count: int) -> float:
    """Seconds per call, the device's work included, after one call that does not count."""
    work()
    bench.wait()
    begun = time.perf_counter()
    for _ in range(count):
        work()
    bench.wait()
    return (time.perf_counter() - begun) / count


def _time_copy(bench: Bench) -> Facts:
    """Terabytes per second, those read and those written."""
    xp = bench.backend.xp
    source = xp.zeros(1 << (10 if bench.rehearse else 29), np.float32)  # 2 GiB: beyond any cache
    target = xp.empty_like(source)
    seconds = _seconds(bench, partial(xp.copyto, target, source), bench.few(20))
    return {"terabytes_per_second": round(2 * source.nbytes / seconds / 1e12, 3)}


def _time_product(bench: Bench) -> Facts:
    """TFLOP/s of a square product of random numbers."""
    xp = bench.backend.xp
    n = 32 if bench.rehearse else 4096
    numbers = np.random.default_rng(0).standard_normal((n, n), np.float32)
    a = xp.asarray(numbers)
    out = xp.empty_like(a)
    seconds = _seconds(bench, partial(xp.matmul, a, a, out=out), bench.few(10))
    error = float(xp.abs(out[0] - xp.asarray(numbers[0].astype(np.float64) @ numbers)).max())
    return {
        "n": n,
        "teraflops": round(2 * n**3 / seconds / 1e12, 2),
        "largest_error_of_a_row": error,  # tells float32 from TF32
    }


def _with_tf32(bench: Bench) -> Facts:
    """The same with products in TF32, which CuPy's own setting asks for."""
    linalg = importlib.import_module("cupy._core._routines_linalg")
    before = linalg.get_compute_type(np.dtype(np.float32))
    linalg.set_compute_type(np.dtype(np.float32), linalg.COMPUTE_TYPE_TF32)
    try:
        return _time_product(bench)
    finally:
        linalg.set_compute_type(np.dtype(np.float32), before)


def _time_dots(bench: Bench) -> Facts:
    """A dot product for each row as a batch of products: many, each of next to nothing."""
    xp = bench.backend.xp
    rows = 64 if bench.rehearse else 98304
    a = xp.ones((rows, 1, 64), np.float32)
    b = xp.ones((rows, 64, 1), np.float32)
    seconds = _seconds(bench, partial(xp.matmul, a, b), bench.few(10))
    right = bool((xp.matmul(a, b) == 64).all())
    return {"milliseconds": round(1000 * seconds, 3), "right": right}
