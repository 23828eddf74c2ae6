"""Which device, with which words it is refused; the random words; what an import costs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.backend import NUMPY, backend_of, get_backend, mix_key
from minilora.errors import DeviceError

WORD = st.integers(0, 2**64 - 1)


def test_cpu_is_one_backend() -> None:
    assert get_backend("cpu") is NUMPY is get_backend(NUMPY) is backend_of(np.zeros(1))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cuda:-1", "cuda:1:2", "CPU", "cpu:0", "", "gpu\n"])
def test_an_unknown_device_is_named_with_what_would_be_valid(device: str) -> None:
    with pytest.raises(DeviceError) as caught:
        get_backend(device)
    assert str(caught.value) == f"unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'"


@pytest.mark.parametrize(("device", "name"), [("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:3", "cuda:3")])
def test_without_cupy_the_gpu_is_refused_with_a_reason_and_a_cure(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # `import cupy` now raises ImportError, installed or not
    from minilora import backend

    backend._gpu.cache_clear()
    with pytest.raises(DeviceError) as caught:
        get_backend(device)
    message = str(caught.value)
    assert message.startswith(f"device '{name}' is not usable: ")
    assert "cupy" in message
    assert message.endswith("(pip install -e .[cuda], or use 'cpu')")
    assert len(message) <= 500


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


@given(st.lists(WORD, min_size=1, max_size=3), st.integers(0, 2**40), st.integers(0, 4), st.integers(0, 9))
def test_random_words_are_splitmix64_of_each_rows_own_key(before: list[int], first: int, rows: int, count: int) -> None:
    words = NUMPY.random_words(mix_key(*before), first, rows, count)
    assert words.dtype == np.uint64
    assert words.shape == (rows, count)
    assert words.tolist() == [splitmix64(mix_key(*before, first + i), count) for i in range(rows)]


@given(st.integers(-(2**63), 2**64 - 1))
def test_keys_count_modulo_2_to_the_64(key: int) -> None:
    assert NUMPY.random_words(key, 0, 1, 2).tolist() == NUMPY.random_words(key % 2**64, 0, 1, 2).tolist()


@given(st.lists(WORD, min_size=1, max_size=4), st.data())
def test_mix_key_depends_on_every_number_and_on_their_order(numbers: list[int], data: st.DataObject) -> None:
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


def test_import_minilora_imports_no_heavy_module() -> None:
    code = (
        "import sys, minilora, minilora.backend, minilora.autograd, minilora.functional, minilora.gradcheck\n"
        "print(sorted({'cupy', 'matplotlib', 'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
