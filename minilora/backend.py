"""NumPy on the CPU, CuPy on a GPU: the only file that imports cupy, and only when a GPU is used.

Operations are written once, on `xp`, the module that NumPy and CuPy have in common; a `Backend`
adds what differs: how data moves, and the few kernels one of them does better. Each tensor carries
its backend; none is global.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DeviceError

Array = Any  # numpy.ndarray or cupy.ndarray
Shape = tuple[int, ...]
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, made odd


def mix_key(*numbers: int) -> int:
    """One 64-bit key out of several integers (seed, layer, step, ...).

    A chain of SplitMix64's mixing, one round per integer.
    """
    z = 0
    for n in numbers:
        z = (z ^ (int(n) & _MASK)) + _GOLDEN & _MASK  # NumPy's integers would overflow
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
        z ^= z >> 31
    return z


class Backend:
    """One device: its array module `xp`, its `name` ("cpu", "cuda:0"), and what modules lack."""

    name: str
    xp: Any

    def __deepcopy__(self, memo: Any) -> Backend:
        return self  # a copy of a tensor stays on its device

    def __reduce__(self) -> Any:
        return get_backend, (self.name,)  # so does a pickled one: there is one object per device

    def from_numpy(self, array: np.ndarray) -> Array:
        """The array on the device. Data moves only through this and `to_numpy`."""
        raise NotImplementedError

    def to_numpy(self, array: Array) -> np.ndarray:
        """The device's array on the host."""
        raise NotImplementedError

    def add_rows(self, index: Array, rows: Array, count: int) -> Array:
        """out[i] = sum of rows[n] over index[n] == i, added in a fixed order.

        index (N,), rows (N, C) -> (count, C)
        """
        raise NotImplementedError

    def random_words(self, key: int, first: int, rows: int, count: int) -> Array:
        """(rows, count) random uint64.

        With key = mix_key(...), row i depends on mix_key(..., first + i) alone. SplitMix64 (Steele,
        Lea & Flood 2014, fig. 13): word j is a mix of its row's key + (j + 1) * golden. Any word
        can be computed without those before it, and a GPU receives nothing but two numbers: a
        dropout mask depends neither on the device, nor on threads, nor on where a batch is cut.
        """

        def mix(z: Array) -> Array:
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return z ^ (z >> np.uint64(31))

        golden = np.uint64(_GOLDEN)
        position = self.xp.arange(first, first + rows, dtype=np.uint64)
        # The last round of mix_key, for every row at once.
        keys = mix((position ^ np.uint64(int(key) & _MASK)) + golden)
        return mix(keys[:, None] + self.xp.arange(1, count + 1, dtype=np.uint64) * golden)

    @functools.cached_property
    def _erf_table(self) -> tuple[Array, Array]:
        """erf and its slope at k / 512 for 0 <= k / 512 <= 6; beyond 6, erf is 1 in float64."""
        grid = [k / 512 for k in range(6 * 512 + 1)]
        value = [math.erf(x) for x in grid]
        slope = [2 / math.sqrt(math.pi) * math.exp(-x * x) for x in grid]
        return self.from_numpy(np.array(value)), self.from_numpy(np.array(slope))

    def erf(self, x: Array) -> Array:
        """The error function to 4e-16, any shape; NumPy lacks it, and math.erf takes one number.

        Around the nearest grid point c, with d = |x| - c: erf(c + d) = erf(c) + erf'(c) (d - c d^2
        + (2c^2 - 1) d^3 / 3 + (c/2 - c^3/3) d^4 + ...). |d| <= 2^-10, so that four terms leave an
        error below 1e-16.
        """
        xp = self.xp
        z = xp.minimum(xp.abs(x), 6.0)
        k = xp.rint(z * 512.0)
        c = k / 512.0
        d = z - c
        value, slope = (
            xp.take(t.astype(x.dtype), xp.nan_to_num(k).astype(np.int64)) for t in self._erf_table
        )
        c2 = c * c
        series = d * (1.0 + d * (-c + d * ((2.0 * c2 - 1.0) / 3.0 + d * (c * (0.5 - c2 / 3.0)))))
        return xp.copysign(value + slope * series, x)


class NumpyBackend(Backend):
    """The CPU."""

    name = "cpu"
    xp = np

    def from_numpy(self, array: np.ndarray) -> Array:
        return array

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array)

    def add_rows(self, index: Array, rows: Array, count: int) -> Array:
        out = np.zeros((count, rows.shape[1]), rows.dtype)
        if index.size:
            order = np.argsort(index, kind="stable")
            ordered = index[order]
            # Where each run of equal indices begins.
            first = np.flatnonzero(np.diff(ordered, prepend=-1))
            out[ordered[first]] = np.add.reduceat(rows[order], first, axis=0)
        return out


class CupyBackend(Backend):
    """One GPU. Where CuPy has NumPy's names, operations run as they are."""

    def __init__(self, device: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns about libraries that nothing here needs
            import cupy

        self.xp = cupy
        self.device = device
        self.name = f"cuda:{device}"

    def from_numpy(self, array: np.ndarray) -> Array:
        return self.xp.asarray(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(self.xp.asnumpy(array))

    def add_rows(self, index: Array, rows: Array, count: int) -> Array:
        xp = self.xp
        width = rows.shape[1]
        order = xp.argsort(index, kind="stable")
        start = xp.searchsorted(index[order], xp.arange(count + 1))
        out = xp.empty((count, width), rows.dtype)
        kernel = _add_rows_kernel({"float32": "float", "float64": "double"}[str(rows.dtype)])
        blocks = (out.size + 255) // 256
        arrays = xp.ascontiguousarray(rows), order.astype(np.int64), start.astype(np.int64), out
        if blocks:
            kernel((blocks,), (256,), (*arrays, np.int64(count), np.int64(width)))
        return out


@functools.cache
def _add_rows_kernel(real: str) -> Any:
    """The kernel in add_rows.cu for numbers of C's type `real`, compiled at the first call."""
    import cupy

    source = Path(__file__).with_name("add_rows.cu").read_text(encoding="utf-8")
    return cupy.RawKernel(source, "add_rows", options=(f"-DREAL={real}",))


# ---- which backend -------------------------------------------------------------------------------

NUMPY = NumpyBackend()
_owners: dict[type, Callable[[Array], Backend]] = {np.ndarray: lambda array: NUMPY}


def register(array_type: type, owner: Callable[[Array], Backend]) -> None:
    """Let arrays of `array_type` belong to the backend that `owner(array)` returns.

    For CuPy, and for a test's replacement of it.
    """
    _owners[array_type] = owner


def backend_of(array: Array) -> Backend:
    """The backend of an array. DeviceError for anything but an array of a registered module."""
    owner = _owners.get(type(array))
    if owner is None:
        known = sorted(t.__module__ for t in _owners)
        raise DeviceError(f"expected an array of {known}, got {type(array).__name__}")
    return owner(array)


@functools.cache
def _gpu(device: int) -> CupyBackend:
    """The backend of GPU number `device`, or DeviceError with the reason why it is unusable.

    A tiny kernel decides: a device can be listed and yet be unusable.
    """
    # Only with this setting does cuBLAS give the same sums every time; it is read when its handle
    # is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        backend = CupyBackend(device)
        with backend.xp.cuda.Device(device):
            backend.xp.arange(3).sum().item()
    except Exception as error:  # without cupy its own kinds of error cannot be imported
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        cure = "check the driver and CUDA_VISIBLE_DEVICES"
        if isinstance(error, ImportError):
            cure = "pip install -e .[cuda]"
        raise DeviceError(
            f"device 'cuda:{device}' is not usable: {reason} ({cure}, or use 'cpu')"
        ) from error
    register(backend.xp.ndarray, lambda array: _gpu(array.device.id))
    return backend


def gpus() -> dict[str, str]:
    """{GPU's name: its model, or why it is unusable}; only cuda:0 if GPUs cannot be counted."""
    try:
        runtime = CupyBackend(0).xp.cuda.runtime
        numbers = range(runtime.getDeviceCount())
        models = [runtime.getDeviceProperties(n)["name"].decode() for n in numbers]
    except Exception:  # each reason has its own kind
        models = []
    states = {}
    for number, model in enumerate(models or [""]):
        try:
            states[_gpu(number).name] = f"usable, {model}"
        except DeviceError as error:
            states[f"cuda:{number}"] = str(error)
    return states


def get_backend(device: str | Backend) -> Backend:
    """The backend for 'cpu', 'cuda' or 'cuda:N'. DeviceError with the reason if it is unusable."""
    if isinstance(device, Backend):
        return device
    kind, _, number = str(device).partition(":")
    if device == "cpu":
        return NUMPY
    if kind == "cuda" and (number.isdecimal() or device == "cuda"):
        backend = _gpu(int(number or 0))
        # CuPy's current device belongs to the thread; training on a GPU stays in this one.
        backend.xp.cuda.Device(backend.device).use()
        return backend
    raise DeviceError(f"unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'")
