"""Matrix products by cuBLAS, called through ctypes on a handle of our own.

CuPy's products copy operands that cuBLAS can read where they are (transposed, sliced, repeated),
have neither a factor nor a sum, and cannot be captured in a CUDA graph. Here

    out = scale a @ b + beta out        a (..., M, K), b (..., K, N), out (..., M, N)

is one call wherever cuBLAS can address the three arrays. `plan_product` finds the numbers of that
call from shapes and strides alone; `Blas` makes it. cuBLAS reads matrices by columns: an array
(M, N) whose rows are contiguous is a matrix (N, M) to it, so it computes out^T = b^T a^T.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DeviceError

Array = Any  # cupy.ndarray
Ints = tuple[int, ...]
Shape = Ints
View = tuple[Shape, Ints, int]  # of an array: its shape, its strides in bytes, its itemsize
LARGEST = 2**31 - 1  # cuBLAS takes 32-bit integers
WORKSPACE = 32 << 20  # bytes: what cuBLAS recommends for an H200
DEFAULT_ALGORITHM = -1

# ---- how arrays are stored -----------------------------------------------------------------------


class Plan(NamedTuple):
    """One product as cuBLAS is asked for it: op(first) op(second), by columns.

    by_columns   is the result stored by columns? Then the first matrix is a, otherwise b
    operations   1 for each of the two that is transposed
    sizes        (m, n, k): the result is (m, n)
    leading      elements from one column to the next, of first, second and result
    together     how many products each call computes
    steps        elements from one product to the next, of first, second and result
    starts       one call for each: where a, b and out begin, in bytes
    spans        bytes from the first number to the last, of a, b and out
    """

    by_columns: bool
    operations: Ints
    sizes: Ints
    leading: Ints
    together: int
    steps: Ints
    starts: tuple[Ints, ...]
    spans: Ints


ZEROS = (0, 0, 0)
NOTHING = Plan(False, (0, 0), ZEROS, ZEROS, 1, ZEROS, (), ZEROS)  # an array is empty


def product_shape(a: Shape, b: Shape) -> Shape:
    """The shape of a @ b, for two axes or more each. ValueError if they do not fit each other."""
    try:
        batch = np.broadcast_shapes(a[:-2], b[:-2])
    except ValueError:
        batch = None
    if batch is None or a[-1] != b[-2]:
        raise ValueError(f"matmul: expected (..., M, K) and (..., K, N), got {a} and {b}")
    return (*batch, a[-2], b[-1])


@functools.lru_cache(maxsize=4096)
def plan_product(a: View, b: View, out: View) -> Plan | None:
    """The calls for out = a @ b; None if cuBLAS cannot address one of the arrays.

    ValueError for shapes that do not fit, DeviceError for sizes beyond cuBLAS' integers.
    """
    shape = product_shape(a[0], b[0])
    if out[0] != shape:
        raise ValueError(f"matmul: out must have the shape {shape}, got {out[0]}")
    *_, M, N = shape
    K = a[0][-1]
    if 0 in (*shape, K):
        return NOTHING
    layouts = [find_layout(view) for view in (a, b, out)]
    axes = _batch_axes(a, b, out)
    if None in layouts or any(axis.distances[2] == 0 for axis in axes):
        return None
    by_columns = layouts[2].by_columns
    # Of a, b and out: cuBLAS computes out = a b, or of arrays stored by rows out^T = b^T a^T.
    order = (0, 1, 2) if by_columns else (1, 0, 2)
    sizes = (M, N, K) if by_columns else (N, M, K)
    operations = tuple(layouts[i].by_columns ^ by_columns for i in order[:2])
    leading = tuple(layouts[i].leading for i in order)
    # The longest axis is in each call, and the others, which it does not continue, are a loop.
    axes.sort(key=lambda axis: axis.size)
    together, distances = axes.pop() if axes else Axis(1, ZEROS)
    itemsizes = (a[2], b[2], out[2])
    steps = tuple(distances[i] // itemsizes[i] for i in order)
    starts: list[Ints] = [ZEROS]
    for axis in axes:
        starts = [_move(start, axis, i) for start in starts for i in range(axis.size)]
    if max(*sizes, *leading, together) > LARGEST:
        raise DeviceError(
            f"a product of {a[0]} and {b[0]} is too large for cuBLAS, whose sizes are at most "
            f"{LARGEST}: multiply some of the rows at a time"
        )
    spans = (_span(a), _span(b), _span(out))
    return Plan(by_columns, operations, sizes, leading, together, steps, tuple(starts), spans)


class Layout(NamedTuple):
    """How a matrix is stored: are its columns contiguous, or its rows; elements between them."""

    by_columns: bool
    leading: int


def find_layout(view: View) -> Any:
    """The Layout of the last two axes of an array; None if cuBLAS cannot address it."""
    shape, strides, itemsize = view
    for size, stride in zip(shape, strides, strict=True):
        if size > 1 and (stride < 0 or stride % itemsize):
            return None
    for by_columns, outer, inner in ((False, -2, -1), (True, -1, -2)):
        length = shape[inner]
        leading = length if shape[outer] == 1 else strides[outer] // itemsize
        if (length == 1 or strides[inner] == itemsize) and leading >= length:
            return Layout(by_columns, leading)
    return None


class Axis(NamedTuple):
    """A batch axis: its size, and the bytes from one matrix to the next in a, b and out."""

    size: int
    distances: Ints


def _batch_axes(a: View, b: View, out: View) -> list[Axis]:
    """The axes before the last two; those that continue each other in all three arrays are one."""
    axes = []
    for i, size in enumerate(out[0][:-2], start=2 - len(out[0])):
        if size > 1:
            axes.append(Axis(size, tuple(_distance(view, i - 2) for view in (a, b, out))))
    axes.sort(key=lambda axis: -axis.distances[2])
    merged: list[Axis] = []
    for axis in axes:
        if merged and merged[-1].distances == tuple(axis.size * d for d in axis.distances):
            merged[-1] = Axis(merged[-1].size * axis.size, axis.distances)
        else:
            merged.append(axis)
    return merged


def _distance(view: View, axis: int) -> int:
    """Bytes along an axis, counted from the last as -1; 0 where the array has it once for all."""
    shape, strides, _ = view
    return 0 if -axis > len(shape) or shape[axis] == 1 else strides[axis]


def _move(start: Ints, axis: Axis, i: int) -> Ints:
    return tuple(at + i * distance for at, distance in zip(start, axis.distances, strict=True))


def _span(view: View) -> int:
    shape, strides, itemsize = view
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + itemsize


# ---- what is computed with -----------------------------------------------------------------------


class Arithmetic(NamedTuple):
    """cuBLAS' numbers for the types of operands, result and arithmetic; C's type of a factor."""

    operand: int
    result: int
    compute: int
    factor: Any


# cudaDataType. A uint16 has the bits of a bfloat16.
TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint16": 14}
# cublasComputeType_t: float32 throughout; or operands rounded to 10 or 7 bits of mantissa, which
# tensor cores multiply, and sums in float32.
COMPUTE = {"float32": 68, "tf32": 77, "bfloat16": 75, "float64": 70}
RESULTS = {"e": np.float32, "H": np.float32}  # of operands of 16 bits, if nothing else is wanted
# (dtype of operands, of result) -> how cuBLAS can multiply them, the default first.
CHOICES = {
    ("float32", "float32"): ("float32", "tf32", "bfloat16"),
    ("float64", "float64"): ("float64",),
    ("uint16", "float32"): ("float32",),
    ("uint16", "uint16"): ("float32",),
    ("float16", "float32"): ("float32",),
    ("float16", "float16"): ("float32",),
}


def _arithmetic(a: Any, b: Any, out: Any, compute: str | None) -> Arithmetic:
    """For dtypes of the three arrays. TypeError for others, ConfigError for a wrong `compute`."""
    choices = CHOICES.get((str(a), str(out))) if a == b else None
    if choices is None:
        pairs = ", ".join(f"{operand} to {result}" for operand, result in CHOICES)
        raise TypeError(
            f"cuBLAS cannot multiply {a} by {b} with a result of {out}: expected two operands of "
            f"one dtype, {pairs}; convert one of them"
        )
    if compute is not None and compute not in choices:
        raise ConfigError(
            f"compute={compute!r:.40} for operands of {a}: expected {' or '.join(choices)}"
        )
    factor = ctypes.c_double if str(out) == "float64" else ctypes.c_float
    number = COMPUTE[compute or choices[0]]
    return Arithmetic(TYPES[str(a)], TYPES[str(out)], number, factor)


# ---- the library ---------------------------------------------------------------------------------

CURES = {
    1: "the driver may be too old for this cuBLAS, or the device's memory full",
    3: "the device's memory is full: use a smaller batch",
    8: "this GPU lacks that arithmetic: use compute='float32'",
    13: "an earlier operation on the device may have failed: CUDA_LAUNCH_BLOCKING=1 finds it",
    15: "this cuBLAS lacks that arithmetic: use compute='float32'",
}


def _load_library() -> ctypes.CDLL:
    """cuBLAS, found as CuPy finds it."""
    from cuda import pathfinder  # comes with CuPy

    return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)


def _check(library: ctypes.CDLL, status: int, device: int, request: str) -> None:
    """DeviceError for a status that is not success."""
    if not status:
        return
    library.cublasGetStatusName.restype = ctypes.c_char_p
    name = library.cublasGetStatusName(status).decode()
    cure = CURES.get(status, "use device 'cpu', and report this")
    raise DeviceError(f"cuda:{device}: cuBLAS answered {name} to {request}: {cure}")


class Call:
    """A planned product whose arguments are C's values.

    Only addresses and factors are set for each call, because making all values anew takes longer
    than the call. No types are declared to ctypes for the same reason: Python's integers become
    C's int.
    """

    def __init__(self, library: Any, handle: Any, plan: Plan, arithmetic: Arithmetic):
        kind, result_kind, compute, factor = arithmetic
        self.plan = plan
        self.scale = factor()
        self.beta = factor()
        self.a, self.b, self.out = (ctypes.c_void_p() for _ in range(3))
        first, second = (self.a, self.b) if plan.by_columns else (self.b, self.a)
        leading1, leading2, leading3 = plan.leading
        matrix1 = (first, kind, leading1)
        matrix2 = (second, kind, leading2)
        matrix3 = (self.out, result_kind, leading3)
        head = (handle, *plan.operations, *plan.sizes, ctypes.byref(self.scale))
        beta = ctypes.byref(self.beta)
        end = (compute, DEFAULT_ALGORITHM)
        if plan.together == 1:
            self.function = library.cublasGemmEx
            self.arguments = (*head, *matrix1, *matrix2, beta, *matrix3, *end)
        else:
            step1, step2, step3 = map(ctypes.c_longlong, plan.steps)
            batch1, batch2, batch3 = (*matrix1, step1), (*matrix2, step2), (*matrix3, step3)
            self.function = library.cublasGemmStridedBatchedEx
            self.arguments = (*head, *batch1, *batch2, beta, *batch3, plan.together, *end)

    def run(self, a: int, b: int, out: int, scale: float, beta: float) -> int:
        """cuBLAS' status after the product of arrays at three addresses."""
        self.scale.value = scale
        self.beta.value = beta
        for start_a, start_b, start_out in self.plan.starts:
            self.a.value = a + start_a
            self.b.value = b + start_b
            self.out.value = out + start_out
            status: int = self.function(*self.arguments)
            if status:
                return status
        return 0


class Blas:
    """cuBLAS on one device, which is the current one whenever a method is called.

    A workspace belongs to each stream, because a captured product without one would put an
    allocation into its graph. A graph goes on using the workspace of the stream that captured it,
    so all of them live as long as the process. Two threads may multiply: one call at a time is
    made on the handle.
    """

    def __init__(self, cupy: Any, device: int):
        self._cupy = cupy
        self._device = device
        self._library = _load_library()
        self._handle = ctypes.c_void_p()
        self._lock = threading.Lock()
        self._stream: int | None = None
        self._workspaces: dict[int, Any] = {}
        self._prepare = functools.lru_cache(maxsize=4096)(self._prepare_call)
        self._prepare_new = functools.lru_cache(maxsize=4096)(self._prepare_result)
        with cupy.cuda.Device(device):
            status = self._library.cublasCreate_v2(ctypes.byref(self._handle))
        _check(self._library, status, device, "a new handle")

    def product(
        self,
        a: Array,
        b: Array,
        out: Array | None = None,
        scale: float = 1.0,
        beta: float = 0.0,
        compute: str | None = None,
    ) -> Array:
        """out = scale a @ b + beta out    a (..., M, K), b (..., K, N) -> out (..., M, N)

        Batch axes broadcast. With beta = 0 `out` is not read, and may be None. Dtypes as in
        CHOICES, in which a uint16 is a bfloat16; `compute` is one of the choices there. An operand
        is copied only if neither its rows nor its columns are contiguous, or if `out` may overlap
        it.
        """
        operands = (a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype)
        if out is None:
            shape, dtype, call = self._prepare_new(*operands, compute)
            out = self._cupy.ndarray(shape, dtype)
        else:
            call = self._prepare(*operands, out.shape, out.strides, out.dtype, compute)
            if call is not None and call.plan.starts:
                places = (a.data.ptr, b.data.ptr, out.data.ptr)
                if _overlaps(places, call.plan.spans, 0):
                    return self.product(a.copy(), b, out, scale, beta, compute)
                if _overlaps(places, call.plan.spans, 1):
                    return self.product(a, b.copy(), out, scale, beta, compute)
        if call is None:
            self._product_of_copies(a, b, out, scale, beta, compute)
        elif not call.plan.starts:
            self._product_of_nothing(out, beta)
        else:
            with self._lock:
                self._use_current_stream()
                status = call.run(a.data.ptr, b.data.ptr, out.data.ptr, scale, beta)
            if status:
                request = f"a product of {a.shape} and {b.shape}, {a.dtype}"
                _check(self._library, status, self._device, request)
        return out

    def _prepare_call(
        self,
        a: Shape, a_strides: Ints, a_dtype: Any,
        b: Shape, b_strides: Ints, b_dtype: Any,
        out: Shape, out_strides: Ints, out_dtype: Any,
        compute: str | None,
    ) -> Call | None:  # fmt: skip
        """The call for arrays like these; None if one of them must be copied."""
        arithmetic = _arithmetic(a_dtype, b_dtype, out_dtype, compute)
        plan = plan_product(
            (a, a_strides, a_dtype.itemsize),
            (b, b_strides, b_dtype.itemsize),
            (out, out_strides, out_dtype.itemsize),
        )
        return None if plan is None else Call(self._library, self._handle, plan, arithmetic)

    def _prepare_result(
        self,
        a: Shape, a_strides: Ints, a_dtype: Any,
        b: Shape, b_strides: Ints, b_dtype: Any,
        compute: str | None,
    ) -> tuple[Shape, Any, Call | None]:  # fmt: skip
        """(shape, dtype) of a new result, and the call for it."""
        shape = product_shape(a, b)
        dtype = np.dtype(RESULTS.get(a_dtype.char, a_dtype))
        strides = [dtype.itemsize]
        for size in reversed(shape[1:]):
            strides.insert(0, size * strides[0])
        operands = (a, a_strides, a_dtype, b, b_strides, b_dtype)
        return shape, dtype, self._prepare(*operands, shape, tuple(strides), dtype, compute)

    def _product_of_nothing(self, out: Array, beta: float) -> None:
        """out = beta out, the sum of no products; 0, whatever is in `out`, for beta = 0."""
        if not out.size:
            return
        if beta == 0:
            out.fill(0)
        elif beta != 1:
            *batch, M, N = out.shape
            zeros = functools.partial(self._cupy.zeros, dtype=out.dtype)
            self.product(zeros((*batch, M, 1)), zeros((*batch, 1, N)), out, beta=beta)

    def _product_of_copies(
        self, a: Array, b: Array, out: Array, scale: float, beta: float, compute: str | None
    ) -> None:
        """The same, where an array's layout is not cuBLAS'."""
        a, b = (x if find_layout(_view(x)) else self._cupy.ascontiguousarray(x) for x in (a, b))
        if _plan(a, b, out) is not None:
            self.product(a, b, out, scale, beta, compute)
            return
        result = (
            self._cupy.array(out, order="C") if beta else self._cupy.empty(out.shape, out.dtype)
        )
        self.product(a, b, result, scale, beta, compute)
        out[...] = result

    def _use_current_stream(self) -> None:
        """Let the handle work on CuPy's current stream, with this stream's workspace."""
        stream = self._cupy.cuda.get_current_stream().ptr
        if stream == self._stream:
            return
        if stream not in self._workspaces:
            # Not by the current allocator, which may be that of a graph.
            pool = self._cupy.get_default_memory_pool()
            self._workspaces[stream] = pool.malloc(WORKSPACE)
        self._stream = None  # until both calls have succeeded
        library = self._library
        status = library.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream))
        _check(library, status, self._device, "a stream")
        # After each change of the stream, which resets it.
        workspace = ctypes.c_void_p(self._workspaces[stream].ptr)
        size = ctypes.c_size_t(WORKSPACE)
        status = library.cublasSetWorkspace_v2(self._handle, workspace, size)
        _check(library, status, self._device, f"a workspace of {WORKSPACE} bytes")
        self._stream = stream


def _view(x: Array) -> View:
    return x.shape, x.strides, x.itemsize


def _plan(a: Array, b: Array, out: Array) -> Plan | None:
    return plan_product(_view(a), _view(b), _view(out))


def _overlaps(places: Ints, spans: Ints, i: int) -> bool:
    """Whether the memory of operand i, and that between its numbers, overlaps the result's."""
    return places[i] < places[2] + spans[2] and places[2] < places[i] + spans[i]


_loading = threading.Lock()


@functools.cache
def _load_blas(cupy: Any, device: int) -> Blas | None:
    try:
        return Blas(cupy, device)
    except Exception as error:  # of the loader, the library, or the driver
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        warnings.warn(
            f"cuda:{device}: cuBLAS cannot be used directly: {reason}; CuPy's products are used, "
            "which are slower and cannot be captured in a graph (pip install -e .[cuda] brings it)",
            stacklevel=3,
        )
        return None


def load_blas(cupy: Any, device: int) -> Blas | None:
    """cuBLAS on GPU number `device`, one for all threads; None, with one warning, without it."""
    with _loading:  # a cache alone would let two threads make two
        return _load_blas(cupy, device)
