"""The kernels compile for a GPU and spill nothing; launches take what they say they take."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
from cupy_on_cpu import EmulationError, packages
from cupy_on_cpu.compilers import compile_with_nvcc, compile_with_nvrtc
from cupy_on_cpu.packages import find_nvcc

from minilora.backend import NUMPY, get_backend
from minilora.cuda import launching
from minilora.cuda.launching import kernels_for

SOURCE = Path(launching.__file__).with_name("kernels.cu")
REALS = {"float": np.float32, "double": np.float64}


@pytest.mark.gpu
@pytest.mark.parametrize("real", REALS)
def test_kernels_compile_with_nvrtc(real: str) -> None:
    assert b"add_rows" in compile_with_nvrtc(SOURCE, [f"REAL={real}"])


def test_kernels_have_no_atomic_operation() -> None:
    """Their order, and so the last bits of a sum, would differ from run to run."""
    code = re.sub(r"//.*", "", SOURCE.read_text(encoding="utf-8"))
    assert "atomic" not in code
    assert "extern" in code


@pytest.mark.skipif(find_nvcc() is None, reason="not installed: nvcc")
@pytest.mark.parametrize("real", REALS)
def test_kernels_compile_for_a_gpu_and_spill_nothing(real: str) -> None:
    usages = compile_with_nvcc(SOURCE, [f"REAL={real}"])
    assert len(usages) == SOURCE.read_text().count('extern "C"')
    for name, usage in usages.items():
        assert usage.registers > 0
        assert (usage.stack_bytes, usage.spilled_bytes) == (0, 0), name


@pytest.mark.skipif(find_nvcc() is None, reason="not installed: nvcc")
def test_compile_with_nvcc_reports_spills_and_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cu"
    path.write_text(
        'extern "C" __global__ void __launch_bounds__(1024) crowded(float* x, int n) {'
        "  float y[200];"
        "  for (int i = 0; i < 200; i++) y[i] = x[i * n];"
        "  for (int i = 0; i < 200; i++) x[i] = y[(i * n) % 200];"
        "}"
    )
    assert compile_with_nvcc(path)["crowded"].stack_bytes >= 800
    path.write_text("wrong")
    with pytest.raises(EmulationError, match="nvcc failed"):
        compile_with_nvcc(path)


def test_find_nvcc_finds_that_of_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(packages, "toolkit", lambda: tmp_path)
    assert find_nvcc() is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert find_nvcc() == str(tmp_path / "bin" / "nvcc")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REALS.values())
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (7, 1), (40, 5), (1000, 130)], ids=str)
@pytest.mark.parametrize("count", [1, 4, 300])
def test_add_rows_on_a_gpu_is_numpy_s(shape: tuple[int, int], count: int, dtype: type) -> None:
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    index = rng.integers(0, count, shape[0])
    rows = rng.standard_normal(shape).astype(dtype)
    integers = rng.integers(-100, 100, shape).astype(dtype)  # they add exactly, in any order
    there = gpu.from_numpy(index)

    def sums(rows: Any) -> np.ndarray:
        return gpu.to_numpy(gpu.add_rows(there, rows, count))

    got = sums(gpu.from_numpy(rows))
    assert got.shape == (count, shape[1])
    assert got.dtype == dtype
    expected = NUMPY.add_rows(index, integers, count)
    np.testing.assert_array_equal(sums(gpu.from_numpy(integers)), expected)
    np.testing.assert_array_equal(sums(gpu.from_numpy(rows[:, ::-1].copy())[:, ::-1]), got)
    np.testing.assert_array_equal(sums(gpu.from_numpy(rows)), got)
    expected = NUMPY.add_rows(index, rows.astype(np.float64), count)
    size = NUMPY.add_rows(index, np.abs(rows.astype(np.float64)), count)
    additions = 2 * np.bincount(index, minlength=count)[:, None]  # on either side
    assert (np.abs(got - expected) <= additions * np.finfo(dtype).eps / 2 * size).all()


@pytest.mark.gpu
def test_kernels_for_says_once_why_kernels_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dtype: Any) -> Any:
        raise RuntimeError("nvrtc: error: no headers\nmore")

    monkeypatch.setattr(launching, "Kernels", refuse)
    monkeypatch.setattr(launching, "kernels_for", kernels_for)
    launching.kernels_for.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cuda:0: the kernels .* nvrtc: error: no headers;"):
            assert kernels_for(0, np.dtype(np.float32)) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels_for(0, np.dtype(np.float32)) is None
            gpu = get_backend("cuda")
            rows = np.arange(6, dtype=np.float32).reshape(3, 2)
            index = np.array([1, 0, 1])
            sums = gpu.add_rows(gpu.from_numpy(index), gpu.from_numpy(rows), 2)
            np.testing.assert_array_equal(gpu.to_numpy(sums), [[2, 3], [4, 6]])
    finally:
        launching.kernels_for.cache_clear()


def test_kernels_for_has_none_for_other_dtypes() -> None:
    assert kernels_for(0, np.dtype(np.float16)) is None
    assert kernels_for(0, np.dtype(np.int64)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REALS.values())
@pytest.mark.parametrize("shape", [(700, 3), (5, 1000), (1, 1), (0, 4), (3, 0)], ids=str)
def test_row_dot_on_a_gpu_is_numpy_s(shape: tuple[int, int], dtype: Any) -> None:
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    wide = a.astype(np.float64) * b
    got = gpu.to_numpy(gpu.row_dot(gpu.xp.asarray(a), gpu.xp.asarray(b)))
    assert got.shape == (len(a), 1)
    assert got.dtype == dtype
    bound = shape[1] * np.finfo(dtype).eps * abs(wide).sum(axis=1, keepdims=True)
    assert (abs(got - wide.sum(axis=1, keepdims=True)) <= bound).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_row_dot_is_one_launch_for_more_rows_than_65535() -> None:
    gpu = get_backend("cuda")
    a = gpu.xp.ones((70_000, 3), np.float32)
    gpu.row_dot(a[:1], a[:1])
    with cupy_on_cpu.compute(False), cupy_on_cpu.counted() as device:
        gpu.row_dot(a, a)
    assert (device.launches, device.operations) == (1, 1)
