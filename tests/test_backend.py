"""Which device, with which words it is refused; the random words; adding rows, on CUDA C too; what an import costs."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strict_xp import METER, STRICT, counted, no_sync

from minilora import backend
from minilora.backend import NUMPY, CupyBackend, backend_of, get_backend, gpus, mix_key
from minilora.cli import main
from minilora.errors import DeviceError

WORD = st.integers(0, 2**64 - 1)


def test_cpu_is_one_backend() -> None:
    assert get_backend("cpu") is NUMPY is get_backend(NUMPY) is backend_of(np.zeros(1))


@pytest.mark.parametrize(
    "device",
    ["gpu", "cuda:x", "cuda:", "cuda:-1", "cuda:1:2", "CPU", "cpu:0", "", "gpu\n", 0, None],
)
def test_an_unknown_device_is_named_with_what_would_be_valid(device: Any) -> None:
    with pytest.raises(DeviceError) as caught:
        get_backend(device)
    assert str(caught.value) == f"unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'"


@pytest.mark.parametrize(
    ("device", "name"), [("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:3", "cuda:3")]
)
def test_without_cupy_the_gpu_is_refused_with_a_reason_and_a_cure(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "cupy", None
    )  # `import cupy` now raises ImportError, installed or not
    backend._gpu.cache_clear()
    with pytest.raises(DeviceError) as caught:
        get_backend(device)
    message = str(caught.value)
    assert message.startswith(f"device '{name}' is not usable: ")
    assert "cupy" in message
    assert message.endswith("(pip install -e .[cuda], or use 'cpu')")
    assert len(message) <= 500
    assert gpus() == {"cuda:0": message.replace(name, "cuda:0")}


class FakeCuda:
    """The few names of `cupy` that finding a GPU takes. `working` are the devices that run a kernel."""

    def __init__(
        self,
        count: int,
        working: tuple[int, ...],
        error: str = "no kernel image is available\nfor this",
    ):
        self.current, self.kernels, self.working, self.error = 0, [], working, error

        def number_of_devices() -> int:
            if not count:
                raise RuntimeError("cudaErrorInsufficientDriver: the driver is too old")
            return count

        properties = lambda n: {"name": f"Model {n}".encode()}  # noqa: E731
        runtime = types.SimpleNamespace(
            getDeviceCount=number_of_devices, getDeviceProperties=properties
        )
        self.cuda = types.SimpleNamespace(runtime=runtime, Device=self.device)
        self.ndarray = type("ndarray", (), {})

    @contextlib.contextmanager
    def selected(self, number: int) -> Iterator[None]:
        before, self.current = self.current, number
        try:
            yield
        finally:
            self.current = before

    def device(self, number: int) -> Any:
        chosen = self.selected(number)
        chosen.use = lambda: setattr(self, "current", number)
        return chosen

    def arange(self, n: int) -> Any:
        self.kernels.append(self.current)
        if self.current not in self.working:
            raise RuntimeError(self.error)
        return types.SimpleNamespace(sum=lambda: types.SimpleNamespace(item=lambda: 3))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeCuda]]:
    def install(*args: Any, **kwargs: Any) -> FakeCuda:
        fake = FakeCuda(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(backend, "_owners", dict(backend._owners))
        backend._gpu.cache_clear()
        return fake

    yield install
    backend._gpu.cache_clear()


def test_every_gpu_is_listed_with_what_it_is_or_why_not(fake_cuda: Callable[..., FakeCuda]) -> None:
    fake = fake_cuda(3, working=(0, 2))
    found = gpus()
    assert list(found) == ["cuda:0", "cuda:1", "cuda:2"]
    assert (found["cuda:0"], found["cuda:2"]) == ("usable, Model 0", "usable, Model 2")
    reason = (
        "no kernel image is available (check the driver and CUDA_VISIBLE_DEVICES, or use 'cpu')"
    )
    assert found["cuda:1"] == f"device 'cuda:1' is not usable: {reason}"
    assert fake.kernels == [0, 1, 2]  # each ran, or tried to run, a kernel of its own
    assert fake.current == 0  # looking selects nothing
    assert get_backend("cuda:2").name == "cuda:2"
    assert fake.current == 2  # asking for one does, for this thread
    assert get_backend("cuda") is get_backend("cuda:0")
    assert fake.current == 0
    assert fake.kernels == [0, 1, 2]  # found out once
    with pytest.raises(DeviceError, match=r"cuda:1.*no kernel image"):
        get_backend("cuda:1")


def test_without_a_driver_the_first_gpu_says_why(fake_cuda: Callable[..., FakeCuda]) -> None:
    fake_cuda(0, working=(), error="cudaErrorInsufficientDriver: " + "x" * 999)
    (message,) = gpus().values()
    assert message.startswith("device 'cuda:0' is not usable: cudaErrorInsufficientDriver: xxx")
    assert len(message) <= 500


def test_the_devices_command_lists_cpu_and_gpus(
    fake_cuda: Callable[..., FakeCuda], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cuda(2, working=(1,))
    assert main(["devices"]) == 0
    cpu, first, second = capsys.readouterr().out.splitlines()
    assert cpu.startswith("cpu      usable, ")
    assert " cores, " in cpu
    assert first.startswith("cuda:0   not usable: no kernel image")
    assert second == "cuda:1   usable, Model 1"


@pytest.mark.parametrize("thing", [None, "text", object(), np.ma.zeros(2), [1.0], 2.5])
def test_what_is_no_array_belongs_to_no_backend(thing: object) -> None:
    with pytest.raises(DeviceError, match=f"got {type(thing).__name__}$"):
        backend_of(thing)


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published, on Python's integers: state += golden, then three rounds of mixing."""
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        words.append(z ^ z >> 31)
    return words


def test_random_words_begin_as_splitmix64_does() -> None:
    # The first outputs for seed 0, as in the generator's public test vectors.
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(0, 3) == known
    # A round of mixing takes 0 to known[0], so that a row's key is known[0] where key ^ place is 0.
    assert NUMPY.random_words(5, 5, 1, 3).tolist() == [splitmix64(known[0], 3)]


@given(
    st.lists(WORD, min_size=1, max_size=3),
    st.integers(0, 2**40),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_random_words_are_splitmix64_of_each_rows_own_key(
    before: list[int], first: int, rows: int, count: int
) -> None:
    words = NUMPY.random_words(mix_key(*before), first, rows, count)
    assert words.dtype == np.uint64
    assert words.shape == (rows, count)
    assert words.tolist() == [splitmix64(mix_key(*before, first + i), count) for i in range(rows)]


@given(st.integers(-(2**63), 2**64 - 1))
def test_keys_count_modulo_2_to_the_64(key: int) -> None:
    assert (
        NUMPY.random_words(key, 0, 1, 2).tolist()
        == NUMPY.random_words(key % 2**64, 0, 1, 2).tolist()
    )


@given(st.lists(WORD, min_size=1, max_size=4), st.data())
def test_mix_key_depends_on_every_number_and_on_their_order(
    numbers: list[int], data: st.DataObject
) -> None:
    # Mixing is a bijection of each number while the others stay: another number always gives another key.
    key = mix_key(*numbers)
    assert 0 <= key < 2**64
    at = data.draw(st.integers(0, len(numbers) - 1))
    other = data.draw(WORD.filter(lambda n: n != numbers[at]))
    assert mix_key(*numbers[:at], other, *numbers[at + 1 :]) != key
    assert mix_key(*numbers, 0) != key
    if numbers != numbers[::-1]:
        assert mix_key(*numbers[::-1]) != key


def test_mix_key_is_the_first_word_of_splitmix64_chained() -> None:
    assert mix_key(5) == splitmix64(5, 1)[0]
    assert mix_key(5, 7) == splitmix64(mix_key(5) ^ 7, 1)[0]
    assert mix_key(-1) == mix_key(2**64 - 1)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_add_rows_is_np_add_at(index: list[int], width: int, seed: int) -> None:
    # Small integers add exactly in any order; so this is equality, not closeness.
    rows = np.random.default_rng(seed).integers(-100, 100, (len(index), width)).astype(np.float32)
    expected = np.zeros((6, width), np.float32)
    np.add.at(expected, np.array(index, np.int64), rows)
    for kind in (np.int64, np.int32, np.uint8):
        got = NUMPY.add_rows(np.array(index, kind), rows, 6)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


def test_add_rows_adds_in_a_fixed_order() -> None:
    rng = np.random.default_rng(0)
    index, rows = rng.integers(0, 3, 1000), rng.standard_normal((1000, 5)).astype(np.float32)
    got = NUMPY.add_rows(index, rows, 3)
    np.testing.assert_array_equal(got, NUMPY.add_rows(index, rows, 3))
    for i in range(3):
        mine = rows[index == i].astype(np.float64)
        bound = len(mine) * 2.0**-24 * np.abs(mine).sum(axis=0)  # n additions, each rounded once
        assert (np.abs(got[i] - mine.sum(axis=0)) <= bound).all()


# ---- the CUDA kernel, without a GPU ----

KERNEL = Path(backend.__file__).with_name("add_rows.cu")
EMULATED = """
#define __global__
static struct { long long x; } blockIdx, threadIdx, blockDim;
#include KERNEL
extern "C" void launch(long long blocks, long long threads, const REAL* rows, const long long* order,
                       const long long* start, REAL* out, long long count, long long width) {
    blockDim.x = threads;  // threads depend on none before them: here they run last to first
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; blockIdx.x--)
        for (threadIdx.x = threads - 1; threadIdx.x >= 0; threadIdx.x--)
            add_rows(rows, order, start, out, count, width);
}
"""
REALS = {"float": np.float32, "double": np.float64}


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., None]]:
    """The kernel's own file, compiled for the CPU: by its type of numbers, what launches it as CuPy would."""
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "launch.cpp").write_text(EMULATED)

    def launcher(real: str) -> Callable[..., None]:
        macros = [f"-DREAL={real}", f'-DKERNEL="{KERNEL}"']
        options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", f"{real}.so"]
        subprocess.run([compiler, *macros, *options, "launch.cpp"], check=True, cwd=folder)
        function = ctypes.CDLL(str(folder / f"{real}.so")).launch

        def launch(grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
            *arrays, count, width = args
            assert (
                type(count) is type(width) is np.int64
            )  # a C long long; a Python int would be one too, by luck
            for array, dtype in zip(
                arrays, (REALS[real], np.int64, np.int64, REALS[real]), strict=True
            ):
                assert array.dtype == dtype
                assert array._host.flags.c_contiguous  # a kernel sees memory, not strides
            out = arrays[-1]._host
            around = np.full(out.size + 512, 1e30, out.dtype)  # whoever writes past the end is seen
            hosts = [*(array._host for array in arrays[:-1]), around]
            numbers = [ctypes.c_longlong(int(n)) for n in (grid[0], block[0], count, width)]
            function(
                *numbers[:2], *(ctypes.c_void_p(host.ctypes.data) for host in hosts), *numbers[2:]
            )
            assert (around[out.size :] == around.dtype.type(1e30)).all()
            out[...] = around[: out.size].reshape(out.shape)

        return launch

    return {real: launcher(real) for real in REALS}


@pytest.fixture
def cupy_on_the_stand_in(launchers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> CupyBackend:
    """CupyBackend's own code, over the strict array module and the kernel compiled for the CPU."""
    monkeypatch.setattr(backend, "_add_rows_kernel", launchers.__getitem__)
    monkeypatch.setattr(
        STRICT.xp,
        "empty",
        lambda *args: STRICT.xp.full(*args[:1], np.nan, *args[1:]),
        raising=False,
    )
    made = object.__new__(CupyBackend)
    made.xp = STRICT.xp
    return made


@pytest.mark.parametrize("dtype", REALS.values())
@pytest.mark.parametrize(
    "shape", [(0, 3), (3, 0), (1, 1), (7, 1), (40, 5), (300, 3), (1000, 130)], ids=str
)
@pytest.mark.parametrize("count", [1, 4, 300])
def test_the_cuda_kernel_is_add_rows(
    shape: tuple[int, int], count: int, dtype: type, cupy_on_the_stand_in: CupyBackend
) -> None:
    rng = np.random.default_rng(0)
    index, rows = rng.integers(0, count, shape[0]), rng.standard_normal(shape).astype(dtype)
    whole = rng.integers(-100, 100, shape).astype(dtype)  # adds exactly, in any order
    there = [STRICT.from_numpy(a) for a in (index, rows, rows[:, ::-1].T, whole)]
    with counted(), no_sync():
        got, turned, exact = (
            cupy_on_the_stand_in.add_rows(there[0], r, count)
            for r in (there[1], there[2].T[:, ::-1], there[3])
        )
        assert METER.uploads == []
    np.testing.assert_array_equal(STRICT.to_numpy(exact), NUMPY.add_rows(index, whole, count))
    expected, got = NUMPY.add_rows(index, rows.astype(np.float64), count), STRICT.to_numpy(got)
    assert (got.shape, got.dtype) == ((count, shape[1]), dtype)
    n = np.bincount(index, minlength=count)[:, None]
    size = NUMPY.add_rows(index, np.abs(rows.astype(np.float64)), count)
    assert (
        np.abs(got - expected) <= 2 * n * np.finfo(dtype).eps / 2 * size
    ).all()  # n additions on either side
    np.testing.assert_array_equal(STRICT.to_numpy(turned), got)  # strides make no difference


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("real", REALS)
def test_the_cuda_kernel_compiles_for_a_gpu_and_spills_nothing(real: str, tmp_path: Path) -> None:
    command = [
        "nvcc",
        "-arch=sm_90",
        "-cubin",
        "-Xptxas",
        "-v",
        f"-DREAL={real}",
        "-o",
        "add_rows.cubin",
        str(KERNEL),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert (tmp_path / "add_rows.cubin").stat().st_size > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REALS.values())
def test_add_rows_on_a_gpu_is_the_same_every_time(dtype: type) -> None:
    gpu, rng = get_backend("cuda"), np.random.default_rng(0)
    index, rows = rng.integers(0, 7, 5000), rng.standard_normal((5000, 33)).astype(dtype)
    runs = [
        gpu.to_numpy(gpu.add_rows(gpu.from_numpy(index), gpu.from_numpy(rows), 7)) for _ in range(3)
    ]
    assert runs[0].tobytes() == runs[1].tobytes() == runs[2].tobytes()
    expected = NUMPY.add_rows(index, rows.astype(np.float64), 7)
    size = NUMPY.add_rows(index, np.abs(rows).astype(np.float64), 7)
    assert (np.abs(runs[0] - expected) <= 5000 * np.finfo(dtype).eps * size).all()
    empty = gpu.add_rows(gpu.from_numpy(index[:0]), gpu.from_numpy(rows[:0]), 7)
    assert not gpu.to_numpy(empty).any()


def test_import_minilora_imports_no_heavy_module() -> None:
    code = (
        "import sys, minilora, minilora.backend, minilora.autograd, minilora.functional, minilora.gradcheck\n"
        "print(sorted({'cupy', 'matplotlib', 'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
