"""CuPy on the emulated device: counts, waits, captures, two devices, the threads of a kernel."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupy_on_cpu
import numpy as np
import pytest
import test_strict_xp
from cupy_on_cpu import counted
from cupy_on_cpu.packages import CUPY
from small import CONFIG

from minilora import CausalLM, LoraConfig, get_peft_model
from minilora.backend import get_backend
from minilora.data import Batch
from minilora.data.batches import IGNORE
from minilora.training.loop import Run, Settings
from minilora.training.parallel import ShardedStep

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("emulated")]


@pytest.fixture
def xp() -> Iterator[Any]:
    """CuPy, with cuda:0 as the current device."""
    yield get_backend("cuda").xp
    get_backend("cuda")  # whatever the test selected


def floats(xp: Any, *shape: int) -> Any:
    return xp.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# ---- what is counted -----------------------------------------------------------------------------


def test_counted_tells_launches_products_copies_and_waits_apart(xp: Any) -> None:
    a = floats(xp, 3, 4)
    host = np.ones(3, np.float32)
    b = a + 1
    with counted() as device:
        a + 1
        a @ a.T
        b[...] = a
        xp.asarray(host)
        xp.zeros(3)
        float(a[0, 0])
    assert device.counts._replace(allocations=0) == (1, 1, 1, 1, 1, 1, 1, 0, 0)
    assert device.operations == 6
    a + 1
    assert device.operations == 6  # the block is over


@pytest.mark.parametrize("expression", test_strict_xp.PRODUCTS)
def test_hidden_copies_of_a_product_are_those_that_strict_xp_counts(expression: str) -> None:
    names = test_strict_xp.product_arrays(get_backend("cuda"))
    eval(expression, names)
    with counted() as device:
        eval(expression, names)
    assert device.operations == test_strict_xp.PRODUCTS[expression]


def test_an_assignment_through_a_mask_waits_and_copyto_does_not(xp: Any) -> None:
    a = floats(xp, 5)
    mask = a > 2
    with counted() as device:
        a[mask] = 0
    assert device.waits == 1
    with counted() as device:
        xp.copyto(a, 1, where=mask)
    assert (device.launches, device.waits) == (1, 0)


def test_compute_false_counts_and_does_nothing(xp: Any, tmp_path: Path) -> None:
    a = floats(xp, 4)
    out = xp.zeros_like(a)
    xp.exp(a, out=out)
    out.fill(7)
    with cupy_on_cpu.journal(tmp_path / "journal"), cupy_on_cpu.compute(False):
        with counted() as device:
            xp.exp(a, out=out)
        assert device.launches == 1
    assert out.tolist() == [7] * 4
    assert (tmp_path / "journal").read_text().startswith("kernel cupy_exp__float32_float32 grid")


def test_new_memory_is_nan(xp: Any) -> None:
    memory = xp.cuda.MemoryPointer(xp.cuda.Memory(1200), 0)  # not out of CuPy's pool
    assert xp.isnan(xp.ndarray(300, np.float32, memory)).all()


# ---- captures ------------------------------------------------------------------------------------


@contextlib.contextmanager
def capturing(stream: Any) -> Iterator[list[Any]]:
    """Inside, the stream captures; afterwards the list has the graph."""
    graphs: list[Any] = []
    with stream:
        stream.begin_capture()
        try:
            yield graphs
        finally:
            graphs.append(stream.end_capture())


def test_a_captured_graph_replays_with_what_its_memory_holds_then(xp: Any) -> None:
    a = floats(xp, 4)
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        xp.exp(a)[xp.argsort(-a)]  # compiled before the capture
    with counted() as device, capturing(stream) as graphs:
        y = xp.exp(a)[xp.argsort(-a)]
        nodes = cupy_on_cpu.nodes()
    assert nodes == 5  # argsort copies before it sorts
    assert device.operations == 0
    for values in ([0, 1, 2, 3], [5, 0, 1, 2]):
        a.set(np.array(values, np.float32))
        with counted() as device:
            graphs[0].launch(stream)
        assert (device.operations, device.replays) == (0, 1)
        np.testing.assert_allclose(y.get(), np.exp(sorted(values, reverse=True)), rtol=1e-6)


WORKSPACE = 1024


@pytest.fixture
def handle() -> ctypes.c_void_p:
    """A handle of one's own: CuPy itself refuses cuBLAS in a capture."""
    made = ctypes.c_void_p()
    assert cublas().cublasCreate_v2(ctypes.byref(made)) == 0
    return made


def cublas() -> ctypes.CDLL:
    return ctypes.CDLL("libcublas.so.13")


def set_stream(handle: ctypes.c_void_p, stream: Any, workspace: Any) -> None:
    """Let a handle use a stream, and this memory as its workspace."""
    library = cublas()
    assert library.cublasSetStream_v2(handle, ctypes.c_void_p(stream.ptr)) == 0
    address = ctypes.c_void_p(workspace.ptr)
    assert library.cublasSetWorkspace_v2(handle, address, ctypes.c_size_t(WORKSPACE)) == 0


def test_a_captured_product_of_cublas_replays(xp: Any, handle: ctypes.c_void_p) -> None:
    a, b = floats(xp, 3, 3), floats(xp, 3, 3) + 1
    c = xp.zeros((3, 3), np.float32)
    two, one = ctypes.c_float(2), ctypes.c_float(1)
    workspace = xp.cuda.alloc(WORKSPACE)
    stream = xp.cuda.Stream(non_blocking=True)
    pointers = [ctypes.c_void_p(array.data.ptr) for array in (a, b, c)]
    first, second, result = ((pointer, 0, 3) for pointer in pointers)  # float32, stride 3
    with capturing(stream) as graphs:
        set_stream(handle, stream, workspace)
        # By columns: (c.T) = 2 (b.T) (a.T) + c.T
        scalars = ctypes.byref(two), ctypes.byref(one)
        operands = (*second, *first, scalars[1], *result)
        assert cublas().cublasGemmEx(handle, 0, 0, 3, 3, 3, scalars[0], *operands, 68, -1) == 0
    with counted() as device:
        graphs[0].launch(stream)
        graphs[0].launch(stream)
    assert (device.products, device.replays) == (0, 2)
    assert c.tolist() == (4 * (a @ b)).tolist()


def test_a_capture_refuses_a_product_without_a_workspace(
    xp: Any, handle: ctypes.c_void_p, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real cuBLAS would put an allocation into the graph."""
    one = ctypes.byref(ctypes.c_float(1))
    x = xp.ones(1, np.float32)
    matrix = (ctypes.c_void_p(x.data.ptr), 0, 1)
    call = (handle, 0, 0, 1, 1, 1, one, *matrix, *matrix, one, *matrix, 68, -1)
    workspace = xp.cuda.alloc(WORKSPACE)
    stream = xp.cuda.Stream(non_blocking=True)
    set_stream(handle, stream, workspace)
    with capturing(stream):
        assert cublas().cublasGemmEx(*call) == 0
        cublas().cublasSetStream_v2(handle, ctypes.c_void_p(stream.ptr))  # resets the workspace
        assert cublas().cublasGemmEx(*call) == 15
        assert cublas().cublasCreate_v2(ctypes.byref(ctypes.c_void_p())) == 15
    assert cublas().cublasGemmEx(*call) == 0
    errors = capfd.readouterr().err
    assert "without a workspace" in errors
    assert "a handle is made while a stream captures" in errors


def test_cublas_refuses_memory_that_cannot_be_a_workspace(xp: Any, handle: ctypes.c_void_p) -> None:
    memory = xp.cuda.alloc(1024)
    with xp.cuda.Device(1):
        elsewhere = xp.cuda.alloc(1024)
    for address in (memory.ptr + 8, elsewhere.ptr, 256):
        set_workspace = cublas().cublasSetWorkspace_v2
        assert set_workspace(handle, ctypes.c_void_p(address), ctypes.c_size_t(512)) == 7


TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
DOCUMENTED = {(0, 0, c) for c in (68, 69, 75, 77)} | {(1, 1, 70), (1, 1, 71)}
DOCUMENTED |= {(x, y, c) for x in (2, 14) for y in (x, 0) for c in (68, 69)}


def test_cublas_multiplies_the_types_that_it_documents(xp: Any, handle: ctypes.c_void_p) -> None:
    x = ctypes.c_void_p(xp.zeros(8).data.ptr)
    one = ctypes.byref(ctypes.c_double(1))
    done = set()
    for operand in TYPES.values():
        for result in TYPES.values():
            for compute in (64, 68, 69, 70, 71, 74, 75, 77):
                matrix = (x, operand, 1)
                head = (handle, 0, 0, 1, 1, 1, one, *matrix, *matrix, one, x, result, 1)
                if cublas().cublasGemmEx(*head, compute, -1) == 0:
                    done.add((operand, result, compute))
    assert done == DOCUMENTED


REFUSED = ["a.get()", "float(a[0])", "a[mask]", "a.__setitem__(mask, 0)", "stream.synchronize()"]


@pytest.mark.parametrize("expression", REFUSED)
def test_a_capture_refuses_what_waits(xp: Any, expression: str) -> None:
    a = floats(xp, 4)
    mask = a > 2
    stream = xp.cuda.Stream(non_blocking=True)
    names = {"a": a, "mask": mask, "stream": stream}
    with stream:
        eval(expression, names)
    with capturing(stream), pytest.raises(Exception, match=r"(?i)captur"):
        eval(expression, names)


def test_a_capture_refuses_the_default_stream(xp: Any) -> None:
    a = floats(xp, 4)
    a + 1
    refused = pytest.raises(xp.cuda.driver.CUDADriverError)
    with capturing(xp.cuda.Stream(non_blocking=True)), xp.cuda.Stream.null, refused:
        a + 1


# ---- devices -------------------------------------------------------------------------------------


def test_arrays_of_two_devices_do_not_mix(xp: Any) -> None:
    here = floats(xp, 3)
    with xp.cuda.Device(1):
        there = floats(xp, 3)
        assert there.device.id == 1
    with pytest.raises(ValueError, match="device"):
        here + there
    with pytest.raises(ValueError, match="device"):
        there + 1  # the current device is 0


def test_the_current_device_belongs_to_a_thread(xp: Any) -> None:
    xp.cuda.Device(1).use()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(xp.cuda.Device().id))
    thread.start()
    thread.join()
    assert seen == [0]
    assert xp.cuda.Device().id == 1


# ---- kernels -------------------------------------------------------------------------------------

SUM_OF_A_BLOCK = """
extern "C" __global__ void sum_of_block(const float* x, float* y) {
    __shared__ float part[64];
    int t = threadIdx.x;
    part[t] = x[blockIdx.x * 64 + t];
    BARRIER;
    for (int half = 32; half; half /= 2) {
        if (t < half) part[t] += part[t + half];
        BARRIER;
    }
    if (!t) y[blockIdx.x] = part[0];
}
extern "C" __global__ void sum_of_warp(const float* x, float* y) {
    float sum = x[blockIdx.x * 32 + threadIdx.x];
    for (int by = 16; by; by /= 2) sum += __shfl_down_sync(~0u, sum, by);
    if (!threadIdx.x) y[blockIdx.x] = sum;
}
"""


def test_a_kernel_with_barriers_and_shuffles_adds_up(xp: Any) -> None:
    x = floats(xp, 3, 64)
    y = xp.zeros(6, np.float32)
    module = xp.RawModule(code=SUM_OF_A_BLOCK.replace("BARRIER", "__syncthreads()"))
    module.get_function("sum_of_block")((3,), (64,), (x, y))
    assert y[:3].tolist() == x.sum(axis=1).tolist()
    module.get_function("sum_of_warp")((6,), (32,), (x, y))
    assert y.tolist() == x.reshape(6, 32).sum(axis=1).tolist()


@pytest.mark.parametrize("which", [0, 1])
def test_a_kernel_without_one_of_its_barriers_computes_something_else(xp: Any, which: int) -> None:
    x = floats(xp, 4, 64) + 1
    y = xp.zeros(4, np.float32)
    first, middle, last = SUM_OF_A_BLOCK.split("BARRIER")
    barriers = ["", "__syncthreads()"] if which == 0 else ["__syncthreads()", ""]
    source = first + barriers[0] + middle + barriers[1] + last
    xp.RawModule(code=source).get_function("sum_of_block")((4,), (64,), (x, y))
    assert y.tolist() != x.sum(axis=1).tolist()


def test_a_kernel_whose_macro_returns_does_all_of_its_numbers(xp: Any) -> None:
    """CuPy's searchsorted ends a thread's work early."""
    edges = np.arange(5.0)
    values = np.array([9.0, 0.5, 3.5, 9.0, -1.0, 2.0])
    found = xp.searchsorted(xp.asarray(edges), xp.asarray(values))
    np.testing.assert_array_equal(found.get(), np.searchsorted(edges, values))


@pytest.mark.parametrize(("grid", "block"), [((1,), (2048,)), ((1, 70000), (1,))])
def test_a_launch_that_cuda_refuses_is_refused(xp: Any, grid: Any, block: Any) -> None:
    x = floats(xp, 64)
    kernel = xp.RawKernel('extern "C" __global__ void nothing(float* x) {}', "nothing")
    with pytest.raises(xp.cuda.driver.CUDADriverError):
        kernel(grid, block, (x,))


def test_a_source_that_does_not_compile_names_the_error(xp: Any) -> None:
    kernel = xp.RawKernel('extern "C" __global__ void broken(float* x) { x = ; }', "broken")
    with pytest.raises(cupy_on_cpu.EmulationError, match="expected primary-expression"):
        kernel((1,), (1,), (floats(xp, 1),))


@pytest.mark.parametrize(
    ("flag", "expected"), [({}, "[1e-40, 1e-39]"), ({"CUPY_ON_CPU_FLUSH": "1"}, "[0.0, 0.0]")]
)
def test_kernels_keep_or_flush_subnormal_numbers(
    flag: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import cupy; x = cupy.array([1e-40, 1e-39], 'f4') * 1; "
    code += "print([float(f'{v:.0e}') for v in x.tolist()])"
    monkeypatch.delenv("CUPY_ON_CPU_FLUSH", raising=False)
    for name, value in flag.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cupy_on_cpu.why_not() is None
    monkeypatch.setenv("PATH", "")
    assert cupy_on_cpu.why_not() == "not installed: g++, nm (apt-get install g++)"
    packages = cupy_on_cpu.packages
    monkeypatch.setattr(packages, "headers", lambda: Path("nowhere"))
    assert "nvidia-cuda-runtime" in (cupy_on_cpu.why_not() or "")
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: "1.0")
    assert CUPY in (cupy_on_cpu.why_not() or "")
    monkeypatch.setattr(packages.platform, "machine", lambda: "arm64")
    assert "x86-64" in (cupy_on_cpu.why_not() or "")


# ---- a training step -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_a_training_step_waits_only_where_its_loss_is_read(
    options: dict[str, Any], xp: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", **options)
    model = get_peft_model(CausalLM(CONFIG, seed=1, device="cuda"), config, seed=2).train()
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 600).astype(np.int32)
    settings = Settings(steps=9, batch_size=3, context=8, eval_every=100, max_grad_norm=0.05)
    run = Run(model, tokens, settings, tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = tokens[:24].reshape(2, 12)
    with ShardedStep(model) as sharded:
        for _ in range(2):
            run.step(sharded)
        with counted() as device:
            run.step(sharded)
        assert (device.waits, device.downloads) == (1, 1)
        assert device.operations > 100
        batch = Batch(ids[:, :-1], np.where(ids[:, 1:] == 3, IGNORE, ids[:, 1:]))
        sharded.gradients(batch, parameters)
        with counted() as device:
            sharded.gradients(batch, parameters)
        assert (device.waits, device.downloads) == (0, 0)
