"""Damaged files by the thousand, and the fuzzer itself: it must see a reader that crashes, hangs or takes too much."""

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


def test_no_damage_crashes_a_reader(script):
    counts = script.fuzz(2500, 1)
    assert sum(sum(found.values()) for found in counts.values()) == 2500
    assert set(counts) == set(script.KINDS)
    unread = (
        set() if script.tokenizers else {"tokenizer_config.json"}
    )  # beside our own tokenizer nobody asks for it
    for kind in set(counts) - {"safetensors"} - unread:
        assert counts[kind][
            "accepted"
        ]  # some damage does no harm, or the damage would be too crude to say much
        assert len(counts[kind]) > 1
    assert len(counts["safetensors"]) >= (2 if script.safetensors is None else 5)


def test_undamaged_files_of_every_kind_are_accepted(script, tmp_path):
    world = script.World(tmp_path, 1)
    assert all(world.valid[kind] for kind in script.KINDS)
    found = script.fuzz(sum(map(len, world.valid.values())), 1)
    assert all(
        len(outcomes) == 1 and "accepted" in next(iter(outcomes)) for outcomes in found.values()
    )


def test_the_same_seed_gives_the_same_inputs_and_every_block_has_its_own(script, tmp_path):
    def contents(seed, block, kind="records"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        world = script.World(folder, seed, (kind,))
        return [one.content for one, _ in zip(world.inputs(block), range(200), strict=False)]

    first, again, other, later = contents(3, 1), contents(3, 1), contents(4, 1), contents(3, 2)
    assert first == again
    assert first != other
    assert first != later
    assert contents(3, 1, "safetensors") == contents(3, 1, "safetensors")


def test_a_share_of_the_blocks_is_what_it_would_be_in_the_whole(script, monkeypatch):
    monkeypatch.setattr(script, "BLOCK", 50)
    whole, *shares = (
        script.fuzz(175, 2, ("records",), share)["records"] for share in ((0, 1), (0, 2), (1, 2))
    )
    assert {name: sum(share.get(name, 0) for share in shares) for name in whole} == whole


# ---- faults that must be seen ---------------------------------------------------------------------------------------


def seen(script, *kinds: str) -> str:
    with pytest.raises(SystemExit) as caught:
        script.fuzz(3000, 0, kinds)
    return str(caught.value)


def put(monkeypatch, script, kind, reader):
    monkeypatch.setitem(script.KINDS, kind, script.KINDS[kind]._replace(readers=(reader,)))


def test_a_crash_is_seen(script, monkeypatch):
    class Careless(SafetensorsFile):
        def _check_entry(self, name, entry):
            return (entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))

    monkeypatch.setattr(script, "SafetensorsFile", Careless)
    assert "Error: " in seen(script, "safetensors")


def test_a_reader_that_does_not_end_is_seen_whatever_it_catches(script, monkeypatch):
    def endless(file):
        while True:
            with contextlib.suppress(Exception):
                sum(range(10**6))

    put(monkeypatch, script, "records", endless)
    monkeypatch.setattr(script, "LIMIT", 0.05)
    assert "records" in (said := seen(script, "records"))
    assert "more than 0.05 seconds" in said


def test_an_error_that_does_not_say_which_file_is_seen(script, monkeypatch):
    def vague(file):
        raise FormatError("not valid JSON")

    put(monkeypatch, script, "index", vague)
    assert "an error that does not say which file" in seen(script, "index")


def test_a_base_that_is_not_as_it_was_is_seen(script, monkeypatch):
    monkeypatch.setattr(script.PeftModel, "unload", lambda model: model)
    assert "the base is another one" in seen(script, "adapter_config.json")
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
def test_a_process_that_ends_hangs_or_takes_all_memory_is_seen(
    reader, says, script, monkeypatch, tmp_path
):
    if "bytes" in reader and not Path("/proc/self/statm").exists():
        pytest.skip("the limit is set above what /proc says is used")
    (tmp_path / "fuzz.py").write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport fuzz\nfuzz.KILLED = 0.5\n"
        f"fuzz.KINDS['records'] = fuzz.KINDS['records']._replace(readers=({reader},))\nfuzz.main()\n"
    )
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
def test_a_reader_that_takes_what_the_reference_refuses_is_seen(script, monkeypatch):
    class Generous(SafetensorsFile):
        def __init__(self, path):
            try:
                super().__init__(path)
            except ValueError:
                self._entries = {}  # as if there were nothing in it

    monkeypatch.setattr(script, "SafetensorsFile", Generous)
    assert "minilora accepts what the reference refuses" in seen(script, "safetensors")


@pytest.mark.oracle
def test_a_reader_that_reads_other_values_is_seen(script, monkeypatch):
    class Twisted(SafetensorsFile):
        def read_bits(self, name):
            return (
                super().read_bits(name)[::-1] if len(self.shape(name)) else super().read_bits(name)
            )

    monkeypatch.setattr(script, "SafetensorsFile", Twisted)
    assert "the values differ" in seen(script, "safetensors")


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
