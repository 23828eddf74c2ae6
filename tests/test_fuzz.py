"""Damaged files by the thousand, and the fuzzer itself: it must see a reader that crashes or takes too much."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from minilora.formats import SafetensorsFile, load_file
from minilora.formats.safetensors import DTYPES


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[1] / "benchmarks" / "fuzz.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [1, 2])
def test_no_damage_crashes_a_reader(seed, script):
    counts = script.fuzz(3000, seed)
    assert sum(sum(found.values()) for found in counts.values()) == 3000
    for kind in script.READERS:
        assert counts[kind]["loads"] > 3  # some damage does no harm, or the damage would be too crude to say much
        assert sum(counts[kind].values()) > 5 * counts[kind]["loads"] > 0
    assert len(counts["safetensors"]) >= (2 if script.safetensors is None else 5)


def test_the_same_seed_gives_the_same_inputs(script, tmp_path):
    first, again, other = ([c for c, _ in zip(script.inputs(s, tmp_path), range(200), strict=False)] for s in (3, 3, 4))
    assert first == again != other


def spoil(monkeypatch, script, changed):
    monkeypatch.setattr(script, "SafetensorsFile", changed)
    with pytest.raises(SystemExit) as caught:
        script.fuzz(3000, 0)
    return str(caught.value)


def test_a_crash_is_seen(script, monkeypatch):
    class Careless(SafetensorsFile):
        def _check_entry(self, name, entry):
            return (entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))

    assert "Error: " in spoil(monkeypatch, script, Careless)


@pytest.mark.oracle
def test_a_reader_that_takes_what_the_reference_refuses_is_seen(script, monkeypatch):
    class Generous(SafetensorsFile):
        def __init__(self, path):
            try:
                super().__init__(path)
            except ValueError:
                self._entries = {}  # as if there were nothing in it

    assert "minilora accepts what the reference refuses" in spoil(monkeypatch, script, Generous)


@pytest.mark.oracle
def test_a_reader_that_reads_other_values_is_seen(script, monkeypatch):
    class Twisted(SafetensorsFile):
        def read_bits(self, name):
            return super().read_bits(name)[::-1] if len(self.shape(name)) else super().read_bits(name)

    assert "the values differ" in spoil(monkeypatch, script, Twisted)


@pytest.mark.oracle
def test_what_the_reference_writes_is_read_with_equal_values(script, tmp_path):
    """2,000 files of every dtype that NumPy shares with the format, and every pattern of both 16-bit floats."""
    reference = pytest.importorskip("safetensors.numpy")
    path, seen = tmp_path / "file", set()
    files = script.valid_files(random.Random(5), 4000)[1::2]
    for content in files:
        path.write_bytes(content)
        ours, theirs = load_file(path), reference.load(content)
        assert {k: (a.dtype, a.shape, a.tobytes()) for k, a in ours.items()} == {
            k: (a.dtype, a.shape, a.tobytes()) for k, a in theirs.items()
        }
        seen |= {str(a.dtype) for a in ours.values()}
    assert len(files) == 2000
    assert seen == {str(dtype) for name, dtype in DTYPES.items() if name != "BF16"}
    patterns = np.arange(2**16, dtype=np.uint16)
    path.write_bytes(reference.save({"half": patterns.view(np.float16)}))
    assert load_file(path)["half"].tobytes() == patterns.tobytes()
