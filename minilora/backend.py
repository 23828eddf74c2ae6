"""NumPy on the CPU, CuPy on a GPU: the only file that imports cupy, and only when a GPU is used.

Operations are written once, on `xp`, the module that NumPy and CuPy have in common; a `Backend`
adds what differs: how data moves, and the few kernels one of them does better. Each tensor carries
its backend; none is global.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .cuda.blas import load_blas
from .cuda.graphs import Recorder
from .cuda.launching import kernels_for
from .cuda.operations import OPERATIONS
from .errors import DeviceError
from .precision import BFLOAT16, FLOAT32, check_compute, is_bfloat16, narrow_bfloat16, round_operand

Array = Any  # numpy.ndarray or cupy.ndarray
Shape = tuple[int, ...]
_MASK = 2**64 - 1
_SMALLEST = 2.0**-126  # the smallest normal float32; below are the subnormal numbers
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


class BlockSizes(NamedTuple):
    """How much of an operation is computed at once. The defaults are a CPU's.

    On a CPU a block should stay in the cache. A GPU pays for each call, and computes everything at
    once while that fits into its memory.

    queries       of attention: shorter blocks skip more hidden scores, but cost more calls
    kept_scores   of attention; beyond this number backward computes exp(scores) again, so that
                  memory grows with T and not with T^2
    loss_rows     rows (positions) of `linear_cross_entropy`
    loss_logits   logits of these rows: 4 MiB of them stay in the cache
    row_norms     numbers of DoRA's V, from the product to the norms of its rows
    """

    queries: int = 64
    kept_scores: int = 1 << 20
    loss_rows: int = 1024
    loss_logits: int = 1 << 20
    row_norms: int = 1 << 16


class Backend:
    """One device: its array module `xp`, its `name` ("cpu", "cuda:0"), and what modules lack."""

    name: str
    xp: Any
    sizes = BlockSizes()
    recorder: Any = None  # what captures work as graphs (`cuda.graphs.Recorder`), if anything does
    joins = False  # does an optimiser update parameters of any size together?

    def __deepcopy__(self, memo: Any) -> Backend:
        return self  # a copy of a tensor stays on its device

    def select(self) -> None:
        """Make this the device on which the calling thread's new arrays are made."""

    def __reduce__(self) -> Any:
        return get_backend, (self.name,)  # so does a pickled one: there is one object per device

    def from_numpy(self, array: np.ndarray) -> Array:
        """The array on the device. Data moves only through this and `to_numpy`."""
        raise NotImplementedError

    def to_numpy(self, array: Array) -> np.ndarray:
        """The device's array on the host."""
        raise NotImplementedError

    def run(self, body: Callable[..., Any], *inputs: Any) -> Any:
        """body(self, *inputs), or what a kernel of this device computes in its place.

        A body works on arrays, and is what its kernel must equal to rounding.
        """
        return body(self, *inputs)

    def matmul(
        self,
        a: Array,
        b: Array,
        out: Array | None = None,
        scale: float = 1.0,
        compute: str = FLOAT32,
    ) -> Array:
        """(a @ b) * scale    a (..., M, K), b (..., K, N) -> (..., M, N), in `out` if given

        compute   "tf32" and "bfloat16" round the operands, float32, and add up in float32: see
                  precision.py. With "bfloat16" an operand may be bfloat16's bits (uint16)
        """
        if compute != FLOAT32:
            a, b = (round_operand(self, x, compute) for x in (a, b))
        product = a @ b if out is None else self.xp.matmul(a, b, out=out)
        if scale != 1:
            product *= scale
        return product

    def add_matmul(self, out: Array, a: Array, b: Array, scale: float = 1.0) -> None:
        """out += (a @ b) * scale    a (..., M, K), b (..., K, N), out (..., M, N)"""
        out += self.matmul(a, b, scale=scale)

    def transpose_for_products(self, a: Array) -> Array:
        """a^T for several products.    (M, K) -> (K, M)

        BLAS on a CPU reads a contiguous a^T twice as fast where M is small.
        """
        return self.xp.ascontiguousarray(a.T)

    def row_dot(self, a: Array, b: Array) -> Array:
        """sum_c a[n, c] b[n, c]    both (N, C) -> (N, 1)

        On a CPU N products of a row and a column are fastest.
        """
        return self.xp.matmul(a[:, None, :], b[:, :, None])[:, 0]

    def add_rows(self, index: Array, rows: Array, count: int) -> Array:
        """out[i] = sum of rows[n] over index[n] == i, added in a fixed order.

        index (N,), rows (N, C) -> (count, C)
        """
        raise NotImplementedError

    def divide_rows(self, rows: Array, sizes: Array) -> Array:
        """rows[n] * (1 / sizes[n]), each operation rounded to float32; 0 where the size is 0.

        rows (N, C) float32, sizes (N,) float32: 0 or at least 2^-126 -> (N, C)
        """
        xp = self.xp
        inverse = xp.where(sizes == 0, 0, 1 / xp.maximum(sizes, _SMALLEST))
        return rows * inverse[:, None]

    def join(self, arrays: Sequence[Array]) -> Array:
        """Arrays of one dtype end to end, as a vector."""
        return self.xp.concatenate([array.reshape(-1) for array in arrays])

    def read(self, scalars: Sequence[Array]) -> list[float]:
        """Scalars of one dtype as numbers: one transfer, and one wait, for all."""
        return self.to_numpy(self.join(scalars)).tolist()  # type: ignore[no-any-return]

    def sum_keys(self, P: Array) -> Array:
        """The sum over axis 1.    (B, s, n) -> (B, 1, n)

        On a CPU a product is faster than a reduction over rows.
        """
        return self.xp.ones((1, P.shape[1]), P.dtype) @ P

    def random_words(
        self,
        key: int,
        first: int,
        rows: int,
        count: int,
        step: Array | None = None,
        start: int = 0,
    ) -> Array:
        """(rows, count) random uint64.

        step    one uint64 (1,) on the device, or None
        start   how many words of each row come before these

        With key = mix_key(...), row i depends on mix_key(..., first + i) alone, or with a step on
        mix_key(..., step, first + i). SplitMix64 (Steele, Lea & Flood 2014, fig. 13): word j is a
        mix of its row's key + (j + 1) * golden. Any word can be computed without those before it,
        and a GPU receives nothing but two numbers: a dropout mask depends neither on the device,
        nor on threads, nor on where a batch is cut.
        """

        def mix(z: Array) -> Array:
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return z ^ (z >> np.uint64(31))

        golden = np.uint64(_GOLDEN)
        key_of_step: Array = np.uint64(int(key) & _MASK)
        if step is not None:
            key_of_step = mix((step ^ key_of_step) + golden)  # a round of mix_key, on the device
        position = self.xp.arange(first, first + rows, dtype=np.uint64)
        # The last round of mix_key, for every row at once.
        keys = mix((position ^ key_of_step) + golden)
        numbers = self.xp.arange(start + 1, start + count + 1, dtype=np.uint64)
        return mix(keys[:, None] + numbers * golden)

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

    def read(self, scalars: Sequence[Array]) -> list[float]:
        return [float(scalar) for scalar in scalars]

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
    """One GPU. Where CuPy has NumPy's names, operations run as they are.

    CuPy makes results on the thread's current device, wherever the operands are. So that several
    GPUs can be used in one process, and from any thread, asking for `xp` selects this one.
    """

    sizes = BlockSizes(
        queries=2048,
        kept_scores=1 << 30,
        loss_rows=1 << 15,
        loss_logits=1 << 28,
        row_norms=1 << 30,
    )
    joins = True

    def __init__(self, device: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns about libraries that nothing here needs
            import cupy

        self.cupy = cupy
        self.device = device
        self.name = f"cuda:{device}"

    @functools.cached_property
    def _is_one_of_several(self) -> bool:
        return int(self.cupy.cuda.runtime.getDeviceCount()) > 1

    @property
    def xp(self) -> Any:
        """CuPy, with this GPU as its current device."""
        self.select()
        return self.cupy

    def select(self) -> None:
        if self._is_one_of_several:
            self.cupy.cuda.Device(self.device).use()

    def from_numpy(self, array: np.ndarray) -> Array:
        return self.xp.asarray(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(self.xp.asnumpy(array))

    @functools.cached_property
    def recorder(self) -> Recorder:
        return Recorder(self)

    def join(self, arrays: Sequence[Array]) -> Array:
        # Not by concatenate, which uploads a table of pointers.
        whole = self.xp.empty(sum(array.size for array in arrays), arrays[0].dtype)
        start = 0
        for array in arrays:
            end = start + array.size
            whole[start:end] = array.reshape(-1)
            start = end
        return whole

    def run(self, body: Callable[..., Any], *inputs: Any) -> Any:
        kernel = OPERATIONS.get(body.__name__)
        result = None if kernel is None else kernel(self, *inputs)
        return body(self, *inputs) if result is None else result

    @functools.cached_property
    def blas(self) -> Any:
        """cuBLAS (`cuda.blas.Blas`); None if it cannot be loaded."""
        return load_blas(self.cupy, self.device)

    def matmul(
        self,
        a: Array,
        b: Array,
        out: Array | None = None,
        scale: float = 1.0,
        compute: str = FLOAT32,
    ) -> Array:
        if compute != FLOAT32:
            return self._rounded_matmul(a, b, out, scale, compute)
        if not self._can_multiply(a, b, out):
            return super().matmul(a, b, out, scale)
        self.select()
        return self.blas.product(a, b, out, scale)

    def _rounded_matmul(
        self, a: Array, b: Array, out: Array | None, scale: float, compute: str
    ) -> Array:
        """The same where the operands are rounded: cuBLAS rounds float32 itself.

        If one of them is bfloat16's bits already, the other one is rounded to such bits, too.
        """
        if self.blas is None:
            return super().matmul(a, b, out, scale, compute)
        self.select()
        if compute == BFLOAT16 and (is_bfloat16(a) or is_bfloat16(b)):
            a, b = (x if is_bfloat16(x) else self.run(narrow_bfloat16, x) for x in (a, b))
            return self.blas.product(a, b, out, scale)
        for x in (a, b):
            check_compute(compute, x.dtype)
        return self.blas.product(a, b, out, scale, compute=compute)

    def add_matmul(self, out: Array, a: Array, b: Array, scale: float = 1.0) -> None:
        if self._can_multiply(a, b, out):
            self.select()
            self.blas.product(a, b, out, scale, beta=1.0)
        else:
            super().add_matmul(out, a, b, scale)

    def _can_multiply(self, a: Array, b: Array, out: Array | None) -> bool:
        """Whether cuBLAS multiplies these: matrices of one dtype, float32 or float64."""
        ndarray = self.cupy.ndarray
        return (
            isinstance(a, ndarray)
            and isinstance(b, ndarray)
            and a.ndim > 1
            and b.ndim > 1
            and a.dtype == b.dtype
            and a.dtype.char in "fd"
            and (out is None or out.dtype == a.dtype)
            and self.blas is not None
        )

    def transpose_for_products(self, a: Array) -> Array:
        return a.T  # which cuBLAS reads as it is

    def row_dot(self, a: Array, b: Array) -> Array:
        kernels = kernels_for(self.device, a.dtype) if a.dtype == b.dtype else None
        if kernels is None:
            return (a * b).sum(axis=1, keepdims=True)
        xp = self.xp
        rows, columns = a.shape
        out = xp.empty((rows, 1), a.dtype)
        operands = xp.ascontiguousarray(a), xp.ascontiguousarray(b)
        kernels.for_rows("row_dot", rows, columns, *operands, out, columns)
        return out

    def sum_keys(self, P: Array) -> Array:
        return P.sum(axis=1, keepdims=True)  # a broadcast operand of a product takes six launches

    def add_rows(self, index: Array, rows: Array, count: int) -> Array:
        xp = self.xp
        width = rows.shape[1]
        order = xp.argsort(index, kind="stable")
        start = xp.searchsorted(index[order], xp.arange(count + 1))
        out = xp.empty((count, width), rows.dtype)
        arrays = xp.ascontiguousarray(rows), order.astype(np.int64), start.astype(np.int64), out
        kernels = kernels_for(self.device, rows.dtype)
        if kernels is None:  # slower: it waits for the device
            return self.from_numpy(NUMPY.add_rows(self.to_numpy(index), self.to_numpy(rows), count))
        kernels.for_each("add_rows", out.size, *arrays, count, width)
        return out

    def divide_rows(self, rows: Array, sizes: Array) -> Array:
        """As on the CPU, but +-2^-126 in place of every result between 0 and that.

        CuPy has its kernels compiled so that a subnormal number is 0. Here it may be a number in
        rows, 1 / size for a size above 2^126, or a result. Powers of two, which change no other
        bits, keep all three in the normal range: the row is multiplied by c, and 1 / size by
        2^64 / c. So the products are the results times 2^64.
        """
        xp = self.xp
        sizes = sizes.astype(np.float64)
        inverse = xp.where(sizes == 0, 0, 1 / xp.maximum(sizes, _SMALLEST))
        rounded = xp.rint(inverse * 2.0**149) * 2.0**-149  # as float32 rounds a subnormal number
        is_large = inverse < _SMALLEST
        inverse = xp.where(is_large, rounded, inverse)
        is_small = sizes < 2.0**60  # above that, a subnormal number times 1 / size rounds to 0
        c = xp.where(is_small, 2.0**64, xp.where(is_large, 2.0**-4, 1.0))
        bits = rows.view(np.int32)
        mantissas = (bits & 0x7FFFFF).astype(np.float32)  # a subnormal number is this times 2^-149
        subnormals = xp.where(bits < 0, -mantissas, mantissas)
        subnormals *= xp.where(is_small, 2.0 ** (64 - 149), 0.0).astype(np.float32)[:, None]
        z = rows * c.astype(np.float32)[:, None]
        z = xp.where((bits & 0x7F800000) == 0, subnormals, z)
        z *= (inverse * (2.0**64 / c)).astype(np.float32)[:, None]
        smallest = xp.where(xp.abs(z) > 2.0 ** (64 - 150), xp.copysign(_SMALLEST, z), 0)
        return xp.where(xp.abs(z) < _SMALLEST * 2.0**64, smallest, z * 2.0**-64)


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
        raise DeviceError(
            f"expected an array of {known}, got {type(array).__name__}: np.asarray(...) makes one"
        )
    return owner(array)


@functools.cache
def _gpu(device: int) -> CupyBackend:
    """The backend of GPU number `device`, or DeviceError with the reason why it is unusable.

    A tiny kernel decides: a device can be listed and yet be unusable. cuBLAS gives the same sums
    every time without CUBLAS_WORKSPACE_CONFIG, because a process uses one stream at a time (cuBLAS
    documentation, section "Results reproducibility"); a small workspace would only slow it down.
    """
    try:
        backend = CupyBackend(device)
        with backend.cupy.cuda.Device(device):
            backend.cupy.arange(3).sum().item()
    except Exception as error:  # without cupy its own kinds of error cannot be imported
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        cure = "check the driver and CUDA_VISIBLE_DEVICES"
        if isinstance(error, ImportError):
            cure = "pip install -e .[cuda]"
        raise DeviceError(
            f"device 'cuda:{device}' is not usable: {reason} ({cure}, or use 'cpu')"
        ) from error
    register(backend.cupy.ndarray, lambda array: _gpu(array.device.id))
    return backend


def gpus() -> dict[str, str]:
    """{GPU's name: its model, or why it is unusable}; only cuda:0 if GPUs cannot be counted."""
    try:
        runtime = CupyBackend(0).cupy.cuda.runtime
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
        backend.select()
        return backend
    raise DeviceError(f"unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'")
