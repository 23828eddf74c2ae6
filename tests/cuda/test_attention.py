"""Attention by kernels beside its reference body in float64, its memory, and what it launches.

Errors are measured in units of the largest number of the array that is right: of O, or of the
gradients of q, k and v, which are parts of one array.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from cupy_on_cpu import counted
from hypothesis import given
from hypothesis import strategies as st
from operations import angles, rotary_tables

from minilora.attention import _attend, _rotate_and_attend
from minilora.backend import NUMPY, Backend, backend_of, get_backend
from minilora.cuda.attention import MOST_CHANNELS, attend, rotate_and_attend
from minilora.cuda.launching import kernels_for

pytestmark = pytest.mark.gpu
ROUNDING = {"float32": 2e-6, "float64": 2e-12}
DTYPES = st.sampled_from(list(ROUNDING))
HEADS = st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)])  # (H, K)
SIZES = st.sampled_from([1, 2, 5, 6, 16, 17, 64, 80, 128, 130, 256])  # D


def move(backend: Backend, array: Any) -> Any:
    return None if array is None else backend.from_numpy(array)


def join(*arrays: Any) -> np.ndarray:
    """Arrays of any device, end to end."""
    return np.concatenate([backend_of(z).to_numpy(z).ravel() for z in arrays])


def assert_near(mine: Any, exact: Any, dtype: str) -> None:
    mine = backend_of(mine).to_numpy(mine)
    assert mine.dtype == dtype
    np.testing.assert_allclose(mine, exact, rtol=0, atol=ROUNDING[dtype] * np.abs(exact).max())


def draw_first_key(rng: np.random.Generator, B: int, T: int, past: int = 0) -> np.ndarray:
    """Any keys up to each query's own, which need not be in order as those of records are."""
    return rng.integers(0, past + np.arange(T) + 1, (B, T))


def draw_tables(T: int, D: int, H: int, K: int, places: np.ndarray | None) -> list[np.ndarray]:
    """cos and sin (T, (H + K) D), or (B, T, (H + K) D) for places (B, T)."""
    angle = angles(T, D) if places is None else places[..., None] * angles(2, D)[1]
    tables = rotary_tables(angle.reshape(-1, D // 2), H, K, D**-0.5)
    return [table.reshape(*angle.shape[:-1], -1) for table in tables]


@functools.cache
def qkv(B: int, T: int, H: int, K: int, D: int, dtype: str) -> Any:
    """(Z (B, T, H + 2 K, D), dO (B, T, H, D))"""
    rng = np.random.default_rng([B, T, H, K, D])
    shapes = (B, T, H + 2 * K, D), (B, T, H, D)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# ---- the numbers ---------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.integers(1, 40),
    HEADS,
    SIZES,
    st.sampled_from([None, 1, 3, 16, 100]),
    st.booleans(),
    st.sampled_from(["none", "by position", "by sequence"]),
    DTYPES,
)
def test_attention_kernels_equal_the_reference_body(
    B: int,
    T: int,
    heads: tuple[int, int],
    D: int,
    window: int | None,
    has_records: bool,
    rotation: str,
    dtype: str,
) -> None:
    rng = np.random.default_rng(T)
    first_key = draw_first_key(rng, B, T) if has_records else None
    Z, dO = qkv(B, T, *heads, D, dtype)
    tables: Any = [None, None]
    if rotation != "none" and D % 2 == 0:
        places = rng.integers(0, 50, (B, T)) if rotation == "by sequence" else None
        tables = [table.astype(dtype) for table in draw_tables(T, D, *heads, places)]
    gpu = get_backend("cuda")
    given = move(gpu, Z)
    there = [move(gpu, table) for table in tables]
    result = rotate_and_attend(gpu, given, *heads, *there, None, window, move(gpu, first_key))
    assert result is not None
    O, back = result
    dZ = back(move(gpu, dO))
    exactly = [None if table is None else table.astype(float) for table in tables]
    exact, exact_back = _rotate_and_attend(
        NUMPY, Z.astype(float), *heads, *exactly, None, window, first_key
    )
    assert_near(O, exact, dtype)
    assert_near(dZ, exact_back(dO.astype(float)), dtype)
    np.testing.assert_array_equal(gpu.to_numpy(given), Z)  # others may read it


@given(
    st.integers(1, 2),
    st.integers(1, 20),
    st.integers(0, 40),
    HEADS,
    SIZES,
    st.sampled_from([None, 2, 20]),
    st.booleans(),
    DTYPES,
)
def test_attend_with_more_keys_than_queries_equals_the_reference_body(
    B: int,
    T: int,
    past: int,
    heads: tuple[int, int],
    D: int,
    window: int | None,
    has_records: bool,
    dtype: str,
) -> None:
    """k and v are slices of a cache."""
    H, K = heads
    S = past + T
    rng = np.random.default_rng(S)
    first_key = draw_first_key(rng, B, T, past) if has_records else None
    gpu = get_backend("cuda")
    kernels = kernels_for(0, np.dtype(dtype))
    assert kernels is not None
    q = rng.standard_normal((B, T, H, D)).astype(dtype)
    cache = rng.standard_normal((2, B, S + 3, K, D)).astype(dtype)
    dO = rng.standard_normal(q.shape).astype(dtype)
    k, v = move(gpu, cache)[:, :, :S]
    O, back = attend(kernels, gpu.xp, move(gpu, q), k, v, 0.5, window, move(gpu, first_key))
    gradients = [gpu.xp.empty(z.shape, dtype) for z in (q, k, v)]
    back(move(gpu, dO), *gradients)

    scaled = q.astype(float) * 0.5
    k, v = cache[:, :, :S].astype(float)
    exact, exact_back = _attend(NUMPY, scaled, k, v, window, first_key)
    exactly = [np.empty(z.shape) for z in (q, k, v)]
    exact_back(dO.astype(float), *exactly)
    exactly[0] *= 0.5
    assert_near(O, exact, dtype)
    assert_near(join(*gradients), join(*exactly), dtype)


def test_attend_takes_arrays_of_any_layout() -> None:
    """A kernel knows the strides of sequences and rows, and k and v have the same ones."""
    gpu = get_backend("cuda")
    kernels = kernels_for(0, np.dtype(float))
    assert kernels is not None
    q, k, v = (move(gpu, z) for z in np.random.default_rng(0).standard_normal((3, 2, 7, 2, 6)))
    expected, _ = attend(kernels, gpu.xp, q, k, v, 1.0, None, None)
    padded = gpu.xp.zeros((2, 9, 2, 6))
    padded[:, :7] = v
    by_head = gpu.xp.ascontiguousarray(k.swapaxes(1, 2)).swapaxes(1, 2)
    by_channel = gpu.xp.asfortranarray(q)
    for inputs in ((q, k, padded[:, :7]), (q, by_head, v), (by_channel, k, v)):
        O, _ = attend(kernels, gpu.xp, *inputs, 1.0, None, None)
        np.testing.assert_array_equal(gpu.to_numpy(O), gpu.to_numpy(expected))
    first_key = np.tile(np.array([0, 0, 2, 2, 2, 5, 6], np.int32), (2, 1))
    expected, _ = attend(kernels, gpu.xp, q, k, v, 1.0, None, move(gpu, first_key.astype(int)))
    for same in (move(gpu, first_key), move(gpu, first_key.T.copy()).T):
        O, _ = attend(kernels, gpu.xp, q, k, v, 1.0, None, same)
        np.testing.assert_array_equal(gpu.to_numpy(O), gpu.to_numpy(expected))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_attention_kernels_take_scores_of_any_size(dtype: str, sign: int) -> None:
    """exp(score) would overflow, or be 0 for all keys: the largest score is subtracted first."""
    gpu = get_backend("cuda")
    Z, _ = qkv(2, 30, 1, 1, 4, dtype)
    scores = sign * np.linspace(1500, 2000, 30)
    Z = Z.copy()
    Z[:, :, :2] = 2.0  # k and q, and scores are q k / 2
    Z[:, :, 1, :] = scores[:, None] / 4
    O, _ = rotate_and_attend(gpu, move(gpu, Z), 1, 1, *[None] * 5)
    exact, _ = _rotate_and_attend(NUMPY, Z.astype(float), 1, 1, *[None] * 5)
    size = 2000 * np.finfo(dtype).eps  # the rounding of a score, and of exp(score)
    np.testing.assert_allclose(gpu.to_numpy(O), exact, rtol=0, atol=4 * size * np.abs(exact).max())


@pytest.mark.parametrize("D", [4, 80])
def test_attention_kernels_give_nan_to_a_query_that_sees_no_key(D: int) -> None:
    gpu = get_backend("cuda")
    Z, _ = qkv(2, 20, 2, 1, D, "float32")
    first_key = np.zeros((2, 20), int)
    exact, _ = rotate_and_attend(gpu, move(gpu, Z), 2, 1, *[None] * 4, move(gpu, first_key))
    first_key[0, 7] = 8
    first_key[1, 19] = 1000
    O, _ = rotate_and_attend(gpu, move(gpu, Z), 2, 1, *[None] * 4, move(gpu, first_key))
    O, exact = gpu.to_numpy(O), gpu.to_numpy(exact)
    assert np.isnan(O[0, 7]).all()
    assert np.isnan(O[1, 19]).all()
    O[0, 7] = exact[0, 7]
    O[1, 19] = exact[1, 19]
    np.testing.assert_array_equal(O, exact)


def test_attention_kernels_have_the_same_bits_twice() -> None:
    gpu = get_backend("cuda")
    Z, dO = qkv(3, 45, 4, 2, 40, "float32")
    bits = set()
    for _ in range(2):
        O, back = rotate_and_attend(gpu, move(gpu, Z), 4, 2, *[None] * 3, 9, None)
        bits.add(gpu.to_numpy(O).tobytes() + gpu.to_numpy(back(move(gpu, dO))).tobytes())
    assert len(bits) == 1


# ---- what is launched and what is kept -----------------------------------------------------------


def run(T: int, D: int, rotate: bool = True) -> tuple[Any, Any]:
    gpu = get_backend("cuda")
    Z, dO = (move(gpu, z) for z in qkv(2, T, 2, 1, D, "float32"))
    tables: Any = [None, None]
    if rotate:
        tables = [move(gpu, z.astype(np.float32)) for z in draw_tables(T, D, 2, 1, None)]
    first_key = move(gpu, np.zeros((2, T), int))
    with counted() as forward:
        _, back = gpu.run(_rotate_and_attend, Z, 2, 1, *tables, None, 3, first_key)
    with counted() as backward:
        back(dO)
    return forward, backward


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("rotate", "launches"), [(True, (2, 3)), (False, (1, 2))])
def test_attention_on_a_gpu_takes_five_launches(rotate: bool, launches: tuple[int, int]) -> None:
    forward, backward = run(9, 16, rotate)
    assert (forward.operations, backward.operations) == launches
    assert (forward.waits, backward.waits) == (0, 0)


@pytest.mark.usefixtures("emulated")
def test_attention_without_a_kernel_waits_for_nothing() -> None:
    for counts in run(5, MOST_CHANNELS + 2):
        assert counts.launches > 5  # the reference body
        assert counts.waits == 0


def test_attention_kernels_do_not_keep_scores() -> None:
    gpu = get_backend("cuda")
    pool = gpu.xp.cuda.MemoryPool()
    Z, dO = (move(gpu, z) for z in qkv(1, 400, 2, 1, 2, "float32"))
    with gpu.xp.cuda.using_allocator(pool.malloc):
        O, back = gpu.run(_rotate_and_attend, Z, 2, 1, *[None] * 5)
        dZ = back(dO)
    used = pool.total_bytes()  # all that was allocated at one time or another
    assert O.nbytes + dZ.nbytes <= used
    assert used < 400 * 400 * 4 / 10  # a tenth of one head's scores


def test_attention_kernels_leave_other_cases_to_the_reference_body() -> None:
    gpu = get_backend("cuda")

    def runs(D: int = 4, **changed: Any) -> bool:
        Z, _ = (move(gpu, z) for z in qkv(2, 3, 1, 1, D, "float32"))
        tables = [move(gpu, z.astype(np.float32)) for z in draw_tables(3, D, 1, 1, None)]
        inputs = {"cos": tables[0], "sin": tables[1], "first_key": None, "extend_back": None}
        inputs |= changed
        cos, sin, first_key, extend_back = inputs.values()
        result = rotate_and_attend(gpu, Z, 1, 1, cos, sin, None, None, first_key, extend_back)
        return result is not None

    assert runs()
    assert runs(MOST_CHANNELS)
    assert not runs(MOST_CHANNELS + 2)
    assert not runs(cos=gpu.xp.ones((3, 8)))  # float64
    assert not runs(sin=gpu.xp.ones((1, 8), np.float32))  # to be broadcast
    assert not runs(first_key=gpu.xp.zeros((1, 3), int))
    assert not runs(extend_back=lambda dk, dv: (dk, dv))


def test_attention_on_a_gpu_has_no_gradient_with_extend() -> None:
    gpu = get_backend("cuda")
    Z, dO = (move(gpu, z) for z in qkv(1, 3, 1, 1, 4, "float32"))

    def extend(k: Any, v: Any) -> Any:
        return gpu.xp.repeat(k, 2, axis=1), gpu.xp.repeat(v, 2, axis=1)

    _, back = rotate_and_attend(gpu, Z, 1, 1, None, None, extend, None, None)
    with pytest.raises(ValueError, match="no gradient with `extend`"):
        back(dO)
