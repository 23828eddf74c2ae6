"""Clipping and AdamW over all arrays in a few launches, whose tables of pointers are arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .launching import Array, kernels_for

MOST = 96  # arrays in a launch: the constants of kernels.cu
CHUNK = 4096  # numbers in a block
THREADS = 256
# struct Arrays of kernels.cu
ARRAYS = np.dtype(
    [
        ("at", np.uint64, (3, MOST)),
        ("size", np.int64, MOST),
        ("start", np.int64, MOST),
        ("first", np.int32, MOST + 1),
        ("count", np.int32),
    ],
    align=True,
)
RATES = np.dtype([(name, np.float64) for name in ("step", "root", "keep")])


def tables(*kinds: Sequence[Array]) -> Iterator[tuple[Any, int]]:
    """Yield (struct Arrays, its number of blocks) of up to MOST arrays at a time.

    The arrays of a kind have the sizes of those of the others, in the same order.
    """
    sizes = np.array([array.size for array in kinds[0]], np.int64)
    starts = np.cumsum(sizes) - sizes
    for begin in range(0, len(sizes), MOST):
        part = slice(begin, begin + MOST)
        count = len(sizes[part])
        table = np.zeros((), ARRAYS)
        for i, arrays in enumerate(kinds):
            table["at"][i, :count] = [array.data.ptr for array in arrays[part]]
        table["size"][:count] = sizes[part]
        table["start"][:count] = starts[part]
        table["first"][1 : count + 1] = np.cumsum(-(-sizes[part] // CHUNK))
        table["count"] = count
        yield table, int(table["first"][count])


def clip(
    backend: Any, grads: Sequence[Array], max_norm: float
) -> tuple[Sequence[Array], Array] | None:
    """See `optim._clip`."""
    xp = backend.xp
    by_dtype: dict[Any, list[int]] = {}
    for i, g in enumerate(grads):
        by_dtype.setdefault(g.dtype, []).append(i)
    grads = [xp.ascontiguousarray(g) for g in grads]
    launches = []
    scaled: list[Any] = [None] * len(grads)
    for dtype, places in by_dtype.items():
        kernels = kernels_for(backend.device, dtype)
        if kernels is None:
            return None
        inputs = [grads[i] for i in places]
        outputs = cut(xp.empty(sum(g.size for g in inputs), dtype), inputs)
        for i, out in zip(places, outputs, strict=True):
            scaled[i] = out
        launches += [(kernels, *table) for table in tables(inputs, outputs)]
    if not launches:
        return None
    squares = xp.empty(sum(blocks for _, _, blocks in launches))
    end = 0
    for kernel, table, blocks in launches:
        kernel.launch("sum_squares", blocks, THREADS, table, squares[end:])
        end += blocks
    result = xp.empty(2)  # the norm and the factor
    limit = np.float64(max_norm)
    launches[0][0].launch("clip_factor", 1, THREADS, squares, result, squares.size, limit)
    for kernel, table, blocks in launches:
        kernel.launch("scale_all", blocks, THREADS, table, result)
    return scaled, result[0]


def adamw(
    backend: Any,
    params: Sequence[Array],
    grads: Sequence[Array],
    first: Array,
    second: Array,
    rates: Any,
) -> Sequence[Array] | None:
    """See `optim._adamw`. The parameters themselves change, and are returned."""
    kernels = kernels_for(backend.device, params[0].dtype)
    if kernels is None or not all(p.flags.c_contiguous for p in params):
        return None
    grads = [backend.xp.ascontiguousarray(g) for g in grads]
    by_value = np.zeros((), RATES)
    on_device = None
    if isinstance(rates.numbers, tuple):
        by_value[...] = rates.numbers
    else:
        on_device = rates.numbers
    group = rates.group
    constants = [np.float64(number) for number in (*group["betas"], group["eps"])]
    more = *constants, by_value, on_device, rates.check
    for table, blocks in tables(params, grads):
        kernels.launch("adamw", blocks, THREADS, table, first, second, *more)
    return params


def cut(whole: Array, like: Sequence[Array]) -> list[Array]:
    """Views of a vector in the shapes of other arrays, one behind the other."""
    parts = []
    start = 0
    for array in like:
        parts.append(whole[start : start + array.size].reshape(array.shape))
        start += array.size
    return parts
