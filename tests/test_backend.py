"""Devices and the words that refuse them; random words; adding rows; imports."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strict_xp import STRICT

from minilora import backend
from minilora.backend import NUMPY, Backend, CupyBackend, backend_of, get_backend, gpus, mix_key
from minilora.cli import main
from minilora.errors import DeviceError

WORD = st.integers(0, 2**64 - 1)
CURE = "(check the driver and CUDA_VISIBLE_DEVICES, or use 'cpu')"


def refusal(device: Any) -> str:
    """The message of `get_backend`, which refuses the device."""
    with pytest.raises(DeviceError) as caught:
        get_backend(device)
    return str(caught.value)


def test_get_backend_cpu_is_one_backend() -> None:
    assert get_backend("cpu") is NUMPY
    assert get_backend(NUMPY) is NUMPY
    assert backend_of(np.zeros(1)) is NUMPY


UNKNOWN = ["gpu", "cuda:x", "cuda:", "cuda:-1", "cuda:1:2", "CPU", "cpu:0", "", "gpu\n", 0, None]


@pytest.mark.parametrize("device", UNKNOWN)
def test_get_backend_names_an_unknown_device_and_valid_ones(device: Any) -> None:
    assert refusal(device) == f"unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'"


GPUS = [("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:3", "cuda:3")]


@pytest.mark.parametrize(("device", "name"), GPUS)
def test_get_backend_without_cupy_gives_a_reason_and_a_cure(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `import cupy` now raises ImportError, whether it is installed or not.
    monkeypatch.setitem(sys.modules, "cupy", None)
    backend._gpu.cache_clear()
    message = refusal(device)
    assert message.startswith(f"device '{name}' is not usable: ")
    assert "cupy" in message
    assert message.endswith("(pip install -e .[cuda], or use 'cpu')")
    assert len(message) <= 500
    assert gpus() == {"cuda:0": message.replace(name, "cuda:0")}


class FakeCuda:
    """The few names of `cupy` that `gpus` needs. `working` are the devices that run a kernel."""

    def __init__(
        self, count: int, working: tuple[int, ...], error: str = "no kernel image\nfor this"
    ):
        self.current = 0
        self.kernels: list[int] = []
        self.count = count
        self.working = working
        self.error = error
        self.cuda = types.SimpleNamespace(runtime=self, Device=self.device)
        self.ndarray = type("ndarray", (), {})

    def getDeviceCount(self) -> int:
        if not self.count:
            raise RuntimeError("cudaErrorInsufficientDriver: the driver is too old")
        return self.count

    def getDeviceProperties(self, number: int) -> dict[str, bytes]:
        return {"name": f"Model {number}".encode()}

    @contextlib.contextmanager
    def selected(self, number: int) -> Iterator[None]:
        before = self.current
        self.current = number
        try:
            yield
        finally:
            self.current = before

    def device(self, number: int) -> Any:
        chosen: Any = self.selected(number)
        chosen.use = lambda: setattr(self, "current", number)
        return chosen

    def arange(self, n: int) -> Any:
        self.kernels.append(self.current)
        if self.current not in self.working:
            raise RuntimeError(self.error)
        total = types.SimpleNamespace(item=lambda: 3)
        return types.SimpleNamespace(sum=lambda: total)


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


def test_gpus_lists_each_with_its_model_or_why_it_is_unusable(
    fake_cuda: Callable[..., FakeCuda],
) -> None:
    fake = fake_cuda(3, working=(0, 2))
    states = gpus()
    assert list(states) == ["cuda:0", "cuda:1", "cuda:2"]
    assert states["cuda:0"] == "usable, Model 0"
    assert states["cuda:2"] == "usable, Model 2"
    assert states["cuda:1"] == f"device 'cuda:1' is not usable: no kernel image {CURE}"
    assert fake.kernels == [0, 1, 2]  # each ran, or tried to run, a kernel
    assert fake.current == 0  # listing selects nothing


def test_get_backend_selects_the_gpu_and_tries_it_once(
    fake_cuda: Callable[..., FakeCuda],
) -> None:
    fake = fake_cuda(3, working=(0, 2))
    gpus()
    assert get_backend("cuda:2").name == "cuda:2"
    assert fake.current == 2
    assert get_backend("cuda") is get_backend("cuda:0")
    assert fake.current == 0
    assert fake.kernels == [0, 1, 2]
    message = refusal("cuda:1")
    assert "cuda:1" in message
    assert "no kernel image" in message


def test_get_backend_changes_no_environment_variable(fake_cuda: Callable[..., FakeCuda]) -> None:
    fake_cuda(1, working=(0,))
    before = dict(os.environ)
    get_backend("cuda")
    assert dict(os.environ) == before


def test_gpus_without_a_driver_says_why_for_the_first(fake_cuda: Callable[..., FakeCuda]) -> None:
    fake_cuda(0, working=(), error="cudaErrorInsufficientDriver: " + "x" * 999)
    (message,) = gpus().values()
    assert message.startswith("device 'cuda:0' is not usable: cudaErrorInsufficientDriver: xxx")
    assert message.endswith(CURE)
    assert len(message) <= 500


def test_devices_command_lists_cpu_and_gpus(
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
def test_backend_of_refuses_what_is_not_an_array(thing: object) -> None:
    with pytest.raises(DeviceError, match=f"got {type(thing).__name__}: np.asarray"):
        backend_of(thing)


# ---- random words --------------------------------------------------------------------------------


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, on Python's integers: state += golden, then three mixing rounds."""
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
    # A round of mixing takes 0 to known[0], so a row's key is known[0] where key ^ index is 0.
    assert NUMPY.random_words(5, 5, 1, 3).tolist() == [splitmix64(known[0], 3)]


KEYS = st.lists(WORD, min_size=1, max_size=3)


@given(KEYS, st.integers(0, 2**40), st.integers(0, 4), st.integers(0, 9))
def test_random_words_are_splitmix64_of_each_row_s_key(
    before: list[int], first: int, rows: int, count: int
) -> None:
    words = NUMPY.random_words(mix_key(*before), first, rows, count)
    assert words.dtype == np.uint64
    assert words.shape == (rows, count)
    for i, row in enumerate(words.tolist()):
        assert row == splitmix64(mix_key(*before, first + i), count)


@given(WORD, WORD, st.integers(0, 2**40))
def test_random_words_mix_a_step_into_the_key_as_mix_key_does(
    key: int, step: int, first: int
) -> None:
    number = np.array([step], np.uint64)
    words = NUMPY.random_words(mix_key(key), first, 3, 4, number)
    np.testing.assert_array_equal(words, NUMPY.random_words(mix_key(key, step), first, 3, 4))
    assert number.tolist() == [step]


@given(WORD, st.integers(0, 2**40), st.integers(0, 5), st.integers(0, 5))
def test_random_words_begin_at_any_word_of_a_row(
    key: int, first: int, start: int, count: int
) -> None:
    words = NUMPY.random_words(key, first, 3, start + count)
    rest = NUMPY.random_words(key, first, 3, count, start=start)
    np.testing.assert_array_equal(rest, words[:, start:])


@given(st.integers(-(2**63), 2**64 - 1))
def test_random_words_take_keys_modulo_2_to_the_64(key: int) -> None:
    words = NUMPY.random_words(key, 0, 1, 2)
    np.testing.assert_array_equal(words, NUMPY.random_words(key % 2**64, 0, 1, 2))


@given(st.lists(WORD, min_size=1, max_size=4), st.data())
def test_mix_key_depends_on_every_number_and_on_their_order(
    numbers: list[int], data: st.DataObject
) -> None:
    # Mixing is a bijection of each number while the others stay: another number always gives
    # another key.
    key = mix_key(*numbers)
    assert 0 <= key < 2**64
    at = data.draw(st.integers(0, len(numbers) - 1))
    changed = list(numbers)
    changed[at] = data.draw(WORD.filter(lambda n: n != numbers[at]))
    assert mix_key(*changed) != key
    assert mix_key(*numbers, 0) != key
    if numbers != numbers[::-1]:
        assert mix_key(*numbers[::-1]) != key


def test_mix_key_is_the_first_word_of_splitmix64_chained() -> None:
    assert mix_key(5) == splitmix64(5, 1)[0]
    assert mix_key(5, 7) == splitmix64(mix_key(5) ^ 7, 1)[0]
    assert mix_key(-1) == mix_key(2**64 - 1)


# ---- adding rows ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_add_rows_is_np_add_at(index: list[int], width: int, seed: int) -> None:
    # Small integers add exactly in any order; so the results are equal, not only close.
    rows = np.random.default_rng(seed).integers(-100, 100, (len(index), width)).astype(np.float32)
    expected = np.zeros((6, width), np.float32)
    np.add.at(expected, np.array(index, np.int64), rows)
    for dtype in (np.int64, np.int32, np.uint8):
        got = NUMPY.add_rows(np.array(index, dtype), rows, 6)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


def test_add_rows_adds_in_a_fixed_order() -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 3, 1000)
    rows = rng.standard_normal((1000, 5)).astype(np.float32)
    got = NUMPY.add_rows(index, rows, 3)
    np.testing.assert_array_equal(got, NUMPY.add_rows(index, rows, 3))
    for i in range(3):
        terms = rows[index == i].astype(np.float64)
        # n additions, each rounded once
        bound = len(terms) * 2.0**-24 * np.abs(terms).sum(axis=0)
        assert (np.abs(got[i] - terms.sum(axis=0)) <= bound).all()


# Numbers and sizes at the ends of float32's range, where 1 / size or a product is subnormal.
POWERS = st.integers(-149, 127)
NUMBERS = st.builds(lambda m, e: m * 2.0 ** (e - 23), st.integers(2**23, 2**24 - 1), POWERS)
NUMBERS = NUMBERS.map(np.float32) | st.just(np.float32(0))


def assert_divide_rows_is_numpy_s(
    gpu: Backend, size: np.float32, parts: list[np.float32], other: np.float32
) -> None:
    size = np.float32(0) if size < 2.0**-126 else size
    row = np.minimum(np.array([size, *parts], np.float32), size)
    rows = np.stack([row, -row, np.minimum(row, np.float32(2.0**-120))])
    sizes = np.array([size, size, other if other >= 2.0**-126 else 0], np.float32)
    expected = NUMPY.divide_rows(rows, sizes)
    is_subnormal = (expected != 0) & (np.abs(expected) < 2.0**-126)
    expected[is_subnormal] = np.copysign(np.float32(2.0**-126), expected[is_subnormal])
    result = gpu.divide_rows(gpu.from_numpy(rows), gpu.from_numpy(sizes))
    got = result._host if gpu.xp is STRICT.xp else gpu.to_numpy(result)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@given(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5), NUMBERS)
def test_divide_rows_of_cupy_has_numpy_s_results(
    size: np.float32, parts: list[np.float32], other: np.float32
) -> None:
    gpu = object.__new__(CupyBackend)
    gpu.cupy = STRICT.xp
    gpu._is_one_of_several = False
    gpu.from_numpy = STRICT.from_numpy  # type: ignore[method-assign]
    assert_divide_rows_is_numpy_s(gpu, size, parts, other)


@pytest.mark.gpu
@given(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5), NUMBERS)
def test_divide_rows_on_a_gpu_has_numpy_s_results(
    size: np.float32, parts: list[np.float32], other: np.float32
) -> None:
    assert_divide_rows_is_numpy_s(get_backend("cuda"), size, parts, other)


IMPORTS = """
import sys, minilora, minilora.backend, minilora.autograd, minilora.functional, minilora.gradcheck
heavy = {'cupy', 'matplotlib', 'torch', 'transformers', 'peft', 'numpy.random'}
print(sorted(heavy & set(sys.modules)))
"""


def test_import_minilora_imports_no_heavy_module() -> None:
    command = [sys.executable, "-c", IMPORTS]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
