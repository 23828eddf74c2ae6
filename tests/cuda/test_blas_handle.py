"""The handle of cuBLAS: in graphs, on streams, in threads, and when something fails."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
from cupy_on_cpu import counted

from minilora.backend import get_backend
from minilora.cuda import blas
from minilora.cuda.blas import load_blas
from minilora.errors import DeviceError

FLOATS = (np.float32, np.float64)


@pytest.fixture
def xp() -> Any:
    return get_backend("cuda").xp


# ---- graphs, streams, threads --------------------------------------------------------------------


def steps(gpu: Any, arrays: dict[str, Any]) -> list[Any]:
    """Some products, each of which needs the one before."""
    V, X, W = arrays["V"], arrays["X"], arrays["W"]
    gpu.add_matmul(W, V[0].T, V[1], 0.5)
    y = gpu.matmul(X, V.swapaxes(-1, -2), scale=2.0)
    dX = gpu.matmul(y[0], V[0])
    gpu.add_matmul(dX, y[1], V[1])
    return [y, dX, gpu.matmul(dX.T, gpu.matmul(X, W))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_captured_products_replay_the_bits_of_eager_ones(dtype: Any, xp: Any) -> None:
    gpu = get_backend("cuda")
    rng = np.random.default_rng(0)
    shapes = {"V": (2, 6, 8), "X": (9, 8), "W": (8, 8)}
    batches = []
    for _ in range(3):
        batch = {name: rng.standard_normal(s).astype(dtype) for name, s in shapes.items()}
        batches.append(batch)
    arrays = {name: xp.empty(shape, dtype) for name, shape in shapes.items()}

    def fill(batch: dict[str, np.ndarray]) -> None:
        for name, values in batch.items():
            arrays[name].set(values)

    stream = xp.cuda.Stream(non_blocking=True)
    eager = []
    with stream:
        for batch in batches:
            fill(batch)
            eager.append([y.get().tobytes() for y in steps(gpu, arrays)])
        stream.begin_capture()
        results = steps(gpu, arrays)
        graph = stream.end_capture()
        for batch, expected in zip(batches, eager, strict=True):
            fill(batch)
            graph.launch(stream)
            stream.synchronize()
            assert [y.get().tobytes() for y in results] == expected


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_product_has_a_workspace_on_every_stream(xp: Any, tmp_path: Path) -> None:
    gpu = get_backend("cuda")
    M = xp.ones((3, 3))
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(2)]
    with cupy_on_cpu.journal(tmp_path / "journal"):
        for stream in (xp.cuda.Stream.null, *streams, streams[0]):
            with stream:
                gpu.matmul(M, M)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert len(lines) == 4
    assert all(line.endswith(" workspace") for line in lines)
    addresses = {memory.ptr for memory in gpu.blas._workspaces.values()}
    assert len(addresses) == len(gpu.blas._workspaces) >= 3
    with streams[0], counted() as device:
        gpu.matmul(M, M)
    assert device.operations == 1  # the stream has its workspace


@pytest.mark.gpu
@pytest.mark.usefixtures("emulated")
def test_product_runs_on_the_arrays_device(xp: Any) -> None:
    other = get_backend("cuda:1")
    M = other.from_numpy(np.arange(6.0).reshape(2, 3))
    here = get_backend("cuda:0")
    N = here.from_numpy(np.arange(6.0).reshape(2, 3))
    assert other.blas is not here.blas
    y = other.matmul(M, M.T)
    assert here.to_numpy(here.matmul(N, N.T)).tolist() == [[5, 14], [14, 50]]
    other.add_matmul(y, M, M.T)
    assert other.to_numpy(y).tolist() == [[10, 28], [28, 100]]


@pytest.mark.gpu
def test_load_blas_makes_one_for_all_threads(monkeypatch: pytest.MonkeyPatch, xp: Any) -> None:
    made = []
    all_ask = threading.Barrier(4)

    class Slow:
        def __init__(self, cupy: Any, device: int):
            made.append(device)
            threading.Event().wait(0.01)

    monkeypatch.setattr(blas, "Blas", Slow)
    blas._load_blas.cache_clear()
    seen = []

    def ask() -> None:
        all_ask.wait()
        seen.append(load_blas(xp, 0))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blas._load_blas.cache_clear()
    assert made == [0]
    assert len(seen) == 4
    assert len(set(map(id, seen))) == 1


@pytest.mark.gpu
def test_product_by_several_threads_at_once_is_right(xp: Any) -> None:
    gpu = get_backend("cuda")
    M = xp.asarray(np.arange(64.0).reshape(8, 8))
    expected = (M.get() @ M.get()).tolist()
    wrong = []

    def work() -> None:
        gpu.select()
        with xp.cuda.Stream(non_blocking=True) as stream:
            for _ in range(50):
                y = gpu.matmul(M, M)
                stream.synchronize()
                if y.get().tolist() != expected:
                    wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture
def broken(xp: Any) -> Callable[[str, int], Any]:
    """A function that makes a Blas, one of whose calls answers with a status."""

    class Library:
        def __init__(self, real: Any, call: str, status: int):
            self._real = real
            setattr(self, call, lambda *_: status)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    def make(call: str, status: int) -> Any:
        own = blas.Blas(xp, 0)
        own._library = Library(own._library, call, status)
        return own

    return make


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        (
            "cublasGemmEx",
            15,
            "CUBLAS_STATUS_NOT_SUPPORTED to a product of (2, 3) and (3, 4), float64",
        ),
        ("cublasGemmEx", 15, "use compute='float32'"),
        ("cublasGemmEx", 7, "CUBLAS_STATUS_INVALID_VALUE"),
        ("cublasSetStream_v2", 7, "CUBLAS_STATUS_INVALID_VALUE to a stream: use device 'cpu'"),
        ("cublasSetWorkspace_v2", 7, f"to a workspace of {32 << 20} bytes"),
    ],
)
def test_product_names_what_cublas_refused(
    call: str, status: int, message: str, broken: Any, xp: Any
) -> None:
    with pytest.raises(DeviceError) as caught:
        broken(call, status).product(xp.ones((2, 3)), xp.ones((3, 4)))
    assert str(caught.value).startswith("cuda:0: cuBLAS answered CUBLAS_STATUS_")
    assert message in str(caught.value)


@pytest.mark.gpu
def test_product_tries_a_stream_again_after_an_error(broken: Any, xp: Any) -> None:
    own = broken("cublasSetWorkspace_v2", 7)
    M = xp.ones((2, 2))
    for _ in range(2):
        with pytest.raises(DeviceError):
            own.product(M, M)
    own._library = own._library._real
    assert own.product(M, M).tolist() == [[2, 2], [2, 2]]


@pytest.mark.gpu
def test_matmul_without_cublas_warns_once_and_is_cupy_s(
    monkeypatch: pytest.MonkeyPatch, xp: Any
) -> None:
    def refuse() -> Any:
        raise OSError("libcublas.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(blas, "_load_library", refuse)
    blas._load_blas.cache_clear()
    gpu = type(get_backend("cuda"))(0)
    try:
        a = xp.arange(6.0).reshape(2, 3)
        with pytest.warns(UserWarning, match="cuda:0: cuBLAS cannot be .*libcublas.* file; CuPy's"):
            y = gpu.matmul(a, a.T, scale=2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gpu.add_matmul(y, a, a.T)
            gpu = type(gpu)(0)
            out = gpu.matmul(a, a.T, out=xp.empty((2, 2)), scale=3.0)
        assert y.tolist() == out.tolist() == [[15, 42], [42, 150]]
    finally:
        blas._load_blas.cache_clear()
