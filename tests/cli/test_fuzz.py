"""Thousands of damaged files, and the fuzzer itself, which must see a reader that fails.

benchmarks/fuzz.py must see that a reader crashes, hangs or takes too much memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from minilora.errors import FormatError
from minilora.formats import SafetensorsFile, load_file
from minilora.formats.safetensors import DTYPES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    before = list(sys.path)
    specification = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_fuzz_crashes_no_reader(script):
    counts = script.fuzz(2500, 1)
    assert sum(sum(found.values()) for found in counts.values()) == 2500
    assert set(counts) == set(script.KINDS)
    unread = {"safetensors"}
    if not script.tokenizers:
        unread.add("tokenizer_config.json")  # not read beside our own tokenizer
    for kind in set(counts) - unread:
        assert counts[kind]["accepted"]  # otherwise the damage is too crude to show much
        assert len(counts[kind]) > 1
    assert len(counts["safetensors"]) >= (2 if script.safetensors is None else 5)


def test_fuzz_accepts_undamaged_files_of_every_kind(script, tmp_path):
    world = script.World(tmp_path, 1)
    assert all(world.valid[kind] for kind in script.KINDS)
    found = script.fuzz(sum(map(len, world.valid.values())), 1)
    for outcomes in found.values():
        (outcome,) = outcomes
        assert "accepted" in outcome


def test_world_inputs_depend_on_the_seed_and_the_block(script, tmp_path):
    def contents(seed, block, kind="records"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        world = script.World(folder, seed, (kind,))
        return [one.content for one, _ in zip(world.inputs(block), range(200), strict=False)]

    first = contents(3, 1)
    assert contents(3, 1) == first
    assert contents(4, 1) != first
    assert contents(3, 2) != first
    assert contents(3, 1, "safetensors") == contents(3, 1, "safetensors")


def test_fuzz_shares_add_up_to_the_whole(script, monkeypatch):
    monkeypatch.setattr(script, "BLOCK", 50)

    def records(share):
        return script.fuzz(175, 2, ("records",), share)["records"]

    whole = records((0, 1))
    first = records((0, 2))
    second = records((1, 2))
    total = {name: first.get(name, 0) + second.get(name, 0) for name in whole}
    assert total == whole


# ---- faults that must be seen --------------------------------------------------------------------


def failure(script, *kinds: str) -> str:
    """The message with which the fuzzer stops."""
    with pytest.raises(SystemExit) as caught:
        script.fuzz(3000, 0, kinds)
    return str(caught.value)


def replace_reader(monkeypatch, script, kind, reader):
    monkeypatch.setitem(script.KINDS, kind, script.KINDS[kind]._replace(readers=(reader,)))


def test_fuzz_sees_a_crash(script, monkeypatch):
    class Careless(SafetensorsFile):
        def _check_entry(self, name, entry):
            return (entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))

    monkeypatch.setattr(script, "SafetensorsFile", Careless)
    assert "Error: " in failure(script, "safetensors")


def test_fuzz_sees_a_reader_that_does_not_end_whatever_it_catches(script, monkeypatch):
    def endless(file):
        while True:
            with contextlib.suppress(Exception):
                sum(range(10**6))

    replace_reader(monkeypatch, script, "records", endless)
    monkeypatch.setattr(script, "LIMIT", 0.05)
    assert "records" in (message := failure(script, "records"))
    assert "more than 0.05 seconds" in message


def test_fuzz_sees_an_error_that_does_not_name_the_file(script, monkeypatch):
    def vague(file):
        raise FormatError("not valid JSON")

    replace_reader(monkeypatch, script, "index", vague)
    assert "an error that does not say which file" in failure(script, "index")


def test_fuzz_sees_a_base_that_changed(script, monkeypatch):
    monkeypatch.setattr(script.PeftModel, "unload", lambda model: model)
    assert "the base is another one" in failure(script, "adapter_config.json")
    script.bases.clear()


@pytest.mark.parametrize(
    ("reader", "says"),
    [
        ("lambda file: os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("lambda file: time.sleep(60)", "ended by signal 14"),
        ("lambda file: bytes(4 << 30)", "MemoryError"),
        ("lambda file: 1 / 0", "ZeroDivisionError"),
    ],
)
def test_fuzz_main_sees_a_process_that_ends_hangs_or_takes_all_memory(
    reader, says, script, monkeypatch, tmp_path
):
    if "bytes" in reader and not Path("/proc/self/statm").exists():
        pytest.skip("the limit is set above what /proc says is used")
    lines = [
        "import os, signal, sys, time",
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})",
        "import fuzz",
        "fuzz.KILLED = 0.5",
        f"fuzz.KINDS['records'] = fuzz.KINDS['records']._replace(readers=({reader},))",
        "fuzz.main()",
    ]
    (tmp_path / "fuzz.py").write_text("\n".join(lines))
    monkeypatch.setattr(script, "SCRIPT", str(tmp_path / "fuzz.py"))
    monkeypatch.setattr(
        sys, "argv", ["fuzz.py", "--kinds", "records", "--inputs", "20", "--jobs", "1"]
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert says in str(caught.value)
    assert "block 0 input 0 of seed 0, records" in str(caught.value)


@pytest.mark.oracle
def test_fuzz_sees_a_reader_that_takes_what_the_reference_refuses(script, monkeypatch):
    class Generous(SafetensorsFile):
        def __init__(self, path):
            try:
                super().__init__(path)
            except ValueError:
                self._entries = {}  # as if it were empty

    monkeypatch.setattr(script, "SafetensorsFile", Generous)
    assert "minilora accepts what the reference refuses" in failure(script, "safetensors")


@pytest.mark.oracle
def test_fuzz_sees_a_reader_that_reads_other_values(script, monkeypatch):
    class Twisted(SafetensorsFile):
        def read_bits(self, name):
            bits = super().read_bits(name)
            return bits[::-1] if len(self.shape(name)) else bits

    monkeypatch.setattr(script, "SafetensorsFile", Twisted)
    assert "the values differ" in failure(script, "safetensors")


@pytest.mark.oracle
def test_load_file_reads_what_the_reference_writes(script, tmp_path):
    """2,000 files of all dtypes that NumPy shares with the format, and all 16-bit patterns."""
    reference = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "file"
    seen = set()
    files = script.valid_files(random.Random(5), 4000)[1::2]
    for content in files:
        path.write_bytes(content)
        ours = load_file(path)
        theirs = reference.load(content)
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            assert array.dtype == theirs[key].dtype
            assert array.shape == theirs[key].shape
            assert array.tobytes() == theirs[key].tobytes()
        seen |= {str(array.dtype) for array in ours.values()}
    assert len(files) == 2000
    assert seen == {str(dtype) for name, dtype in DTYPES.items() if name != "BF16"}
    patterns = np.arange(2**16, dtype=np.uint16)
    path.write_bytes(reference.save({"half": patterns.view(np.float16)}))
    assert load_file(path)["half"].tobytes() == patterns.tobytes()
