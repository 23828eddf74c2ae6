"""Clipping and AdamW of many arrays in a few launches, beside their bodies in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.backend import NUMPY, get_backend
from minilora.cuda import optimizer
from minilora.nn import Parameter
from minilora.optim import AdamW, Prepared, Rates, _adamw, clip_by_global_norm

pytestmark = pytest.mark.gpu
BOUNDS = {"float64": 2e-12, "float32": 2e-6}
SIZES = st.lists(
    st.sampled_from([0, 1, 2, 31, 257, 4095, 4096, 4097, 9000]), min_size=1, max_size=6
)
GROUP = {"betas": (0.9, 0.999), "eps": 1e-8}


def draw(rng: np.random.Generator, sizes: Sequence[int], dtype: str) -> list[np.ndarray]:
    return [rng.standard_normal((size, 1)).astype(dtype) for size in sizes]


def move(arrays: Sequence[np.ndarray]) -> list[Any]:
    return [get_backend("cuda").from_numpy(array) for array in arrays]


def assert_near(got: Any, expected: np.ndarray, dtype: str) -> None:
    got = get_backend("cuda").to_numpy(got)
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    assert np.abs(got - expected).max(initial=0) <= BOUNDS[dtype] * scale


@given(SIZES, st.sampled_from([0.1, 5.0, 1e9]), st.sampled_from(["float32", "float64", "both"]))
def test_clip_by_global_norm_on_a_gpu_is_the_body_s(
    sizes: list[int], max_norm: float, kind: str
) -> None:
    rng = np.random.default_rng(0)
    dtypes = ["float32", "float64"] * 3 if kind == "both" else [kind] * 6
    grads = [draw(rng, [n], dtype)[0] for n, dtype in zip(sizes, dtypes, strict=False)]
    there = move(grads)
    got, norm = clip_by_global_norm([None, *there], max_norm)
    wide = [g.astype(np.float64) for g in grads]
    expected, expected_norm = clip_by_global_norm([None, *wide], max_norm)
    assert got[0] is None
    np.testing.assert_allclose(float(norm), float(expected_norm), rtol=1e-13)
    for a, b, dtype in zip(got[1:], expected[1:], dtypes, strict=False):
        assert a.dtype == dtype
        assert a.shape == b.shape
        assert_near(a, b, dtype)
    again, _ = clip_by_global_norm([None, *there], max_norm)
    assert [a.get().tobytes() for a in again[1:]] == [a.get().tobytes() for a in got[1:]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clip_by_global_norm_on_a_gpu_leaves_what_is_not_finite(value: float) -> None:
    grads = [np.ones(5), np.array([1.0, value, 3.0])]
    got, norm = clip_by_global_norm(move(grads), 1.0)
    assert not np.isfinite(float(norm))
    for a, b in zip(got, grads, strict=True):
        np.testing.assert_array_equal(a.get(), b)


def test_clip_by_global_norm_of_no_gradients_is_0() -> None:
    clipped, norm = clip_by_global_norm([None, None], 1.0)
    assert clipped == [None, None]
    assert float(norm) == 0


@given(SIZES, st.sampled_from(list(BOUNDS)), st.integers(1, 100))
def test_adamw_on_a_gpu_is_the_body_s(sizes: list[int], dtype: str, steps: int) -> None:
    rng = np.random.default_rng(1)
    params = draw(rng, sizes, dtype)
    grads = draw(rng, sizes, dtype)
    # One vector for all, but the moments of a single parameter have its shape.
    shape = params[0].shape if len(sizes) == 1 else (sum(sizes),)
    m = rng.standard_normal(shape).astype(dtype)
    v = rng.random(shape).astype(dtype)
    numbers = AdamW([Parameter(np.ones(1))]).rates({**GROUP, "weight_decay": 0.1}, steps, 1e-2)
    backend = get_backend("cuda")
    there, again = ([move(params), move(grads), *move([m, v])] for _ in range(2))
    wide = [[x.astype(np.float64) for x in arrays] for arrays in (params, grads, [m, v])]
    expected = _adamw(NUMPY, *wide[:2], *wide[2], Rates(GROUP, numbers))
    got = backend.run(_adamw, *there, Rates(GROUP, numbers))
    check = backend.xp.ones(())
    device_numbers = backend.from_numpy(np.array(numbers))
    captured = backend.run(_adamw, *again, Rates(GROUP, device_numbers, check))
    for a, b, c in zip(got, expected, captured, strict=True):
        assert_near(a, b, dtype)
        assert a.get().tobytes() == c.get().tobytes()
    assert_near(there[2], wide[2][0], dtype)
    assert_near(there[3], wide[2][1], dtype)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_adamw_on_a_gpu_changes_nothing_unless_the_check_is_finite(value: float) -> None:
    backend = get_backend("cuda")
    p = Parameter(backend.from_numpy(np.arange(5000, dtype=np.float32)))
    adamw = AdamW([p])
    adamw.step([backend.xp.ones_like(p.data)])
    before = p.numpy(), *(moment.get() for moment in adamw.members[0].moments.values())
    numbers = backend.from_numpy(adamw.prepare(adamw.updates([p.data]), 1.0))
    bad = Prepared(numbers, backend.xp.full((), value))
    adamw.apply(adamw.updates([p.data * np.nan]), bad)
    after = p.numpy(), *(moment.get() for moment in adamw.members[0].moments.values())
    assert adamw.members[0].steps == 1
    assert [a.tobytes() for a in after] == [b.tobytes() for b in before]


def test_adamw_and_clipping_on_a_gpu_take_few_launches(emulated: None) -> None:
    backend = get_backend("cuda")
    count = 2 * optimizer.MOST + 1
    params = [Parameter(backend.from_numpy(np.ones((3, 5), np.float32))) for _ in range(count)]
    adamw = AdamW(params)
    grads = [backend.xp.ones_like(p.data) for p in params]
    adamw.step(clip_by_global_norm(grads, 1.0)[0])
    with cupy_on_cpu.counted() as counts:
        adamw.step(clip_by_global_norm(grads, 1.0)[0])
    assert counts.launches == 3 + 1 + 3 + 3
    assert counts.operations == counts.launches
    assert counts.waits == 0
    values = {p.numpy().tobytes() for p in params}
    assert len(values) == 1
