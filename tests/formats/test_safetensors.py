"""Safetensors: arrays come back bit for bit, and only exact files are accepted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import open_descriptors, refused
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora.errors import FormatError
from minilora.formats import (
    Entry,
    SafetensorsFile,
    bf16_from,
    load_file,
    save_file,
    write_stream,
)
from minilora.formats.dtypes import round_to
from minilora.formats.safetensors import (
    BITS,
    DTYPES,
    JSON_SPACE,
    MAX_HEADER_BYTES,
    NAMES,
    SMALLEST_ENTRY,
    count_bytes,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def raw(header: object, data: bytes = b"", *, pad: bytes = b"") -> bytes:
    """The bytes of a file. A header that is not bytes is written as JSON."""
    text = header
    if not isinstance(text, bytes):
        text = json.dumps(header, separators=(",", ":")).encode()
    return len(text + pad).to_bytes(8, "little") + text + pad + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def bits(array: np.ndarray) -> bytes:
    """The values as little-endian C-order bytes, made one by one."""
    wide = array.astype(array.dtype.newbyteorder("<"))
    return b"".join(wide[index].tobytes() for index in np.ndindex(wide.shape))


# ---- round trips ----


def transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T).T


def backwards(array: np.ndarray) -> np.ndarray:
    return array[..., ::-1].copy()[..., ::-1] if array.ndim else array


def every_second(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array


def broadcast(array: np.ndarray) -> np.ndarray:
    return np.broadcast_to(array, (2, *array.shape))


def big_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder(">"))


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


LAYOUTS = [np.array, np.asfortranarray, transposed, backwards, every_second]
LAYOUTS += [broadcast, big_endian, read_only]
SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (3, 4), (2, 3, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in DTYPES if name != "BF16"])
def test_save_file_and_read_return_the_same_bits(tmp_path, name, layout):
    rng = np.random.default_rng(0)
    tensors = {}
    for shape in SHAPES:
        data = rng.bytes(math.prod(shape) * DTYPES[name].itemsize)
        array = np.frombuffer(data, DTYPES[name]).reshape(shape)
        if name == "BOOL":
            array = array.view(np.uint8) % 2 == 1
        tensors[f"t{shape}"] = layout(array.copy())
    save_file(tmp_path / "a.safetensors", tensors)
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert sorted(file) == sorted(file.keys()) == sorted(tensors)
        for key, array in tensors.items():
            result = file.read(key)
            assert (file.dtype(key), file.shape(key)) == (name, array.shape)
            assert result.shape == array.shape
            assert result.dtype == array.dtype.newbyteorder("=")
            assert result.dtype.isnative
            assert bits(result) == bits(array)
            owner = result
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            assert owner.flags.owndata
            assert result.flags.carray  # aligned, C-contiguous, writable
            assert not any(np.shares_memory(result, other) for other in tensors.values())
            assert bits(file.read_bits(key)) == bits(array)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # halves of surrogate pairs are not text


SIDES = hnp.array_shapes(min_dims=0, min_side=0, max_side=4)
ARRAYS = st.sampled_from(sorted(NAMES, key=str)).flatmap(lambda dtype: hnp.arrays(dtype, SIDES))
KEYS = TEXT.filter(lambda name: name != "__metadata__")


@given(st.dictionaries(KEYS, ARRAYS), st.dictionaries(TEXT, TEXT))
def test_save_file_takes_any_names_arrays_and_metadata(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    save_file(path, tensors, metadata)
    with SafetensorsFile(path) as file:
        assert file.metadata == metadata
        assert set(file) == set(tensors)
        for key, array in tensors.items():
            result = file.read(key)
            assert (result.dtype, bits(result)) == (array.dtype, bits(array))
    first = path.read_bytes()
    assert first.index(b"{") == 8
    assert int.from_bytes(first[:8], "little") % 8 == 0
    save_file(path, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == first, "the bytes do not depend on the order of the input"


def test_read_converts_and_widens_bfloat16(tmp_path):
    stored = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / "a.safetensors"
    ints = np.arange(3, dtype=np.int32)
    entries = [Entry("b", "BF16", (256, 256), lambda: stored.T)]
    entries.append(Entry("i", "I32", (3,), lambda: ints))
    write_stream(path, entries)
    with SafetensorsFile(path) as file:
        assert np.array_equal(file.read_bits("b"), stored.T)
        wide = file.read("b")
        assert wide.dtype == np.float32
        assert np.array_equal(wide.view(np.uint32), stored.T.astype(np.uint32) << 16)
        finite = np.isfinite(wide)
        assert np.array_equal(file.read("b", "float64")[finite], wide[finite].astype(np.float64))
        assert file.read("i", np.float32).dtype == np.float32
        assert "i" in file
        assert "x" not in file
        with pytest.raises(FormatError, match=r"no tensor 'x' among its 2 \('i', 'b'"):
            file.read("x")
    assert load_file(path)["b"].dtype == np.float32


def test_save_file_stores_a_bool_as_zero_or_one(tmp_path):
    """In NumPy a bool may be any byte, in a file it may not: what is written can be read."""
    odd = np.array([0, 1, 2, 255], np.uint8).view(bool)
    save_file(tmp_path / "a", {"x": odd})
    assert load_file(tmp_path / "a")["x"].tolist() == [False, True, True, True]


def test_save_file_rewrites_golden_files_byte_for_byte(tmp_path):
    paths = sorted(GOLDEN.glob("*/*model.safetensors"))
    assert len(paths) >= 7
    for path in paths:
        save_file(tmp_path / "copy", load_file(path))
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()


# ---- what cannot be written ----


UNWRITABLE: list[tuple[object, ...]] = []


def unwritable(tensors: object, message: str, metadata: object = None) -> None:
    UNWRITABLE.append((tensors, metadata, message))


unwritable({"x": np.zeros(2, np.complex64)}, "complex64")
unwritable({"x": np.array(["a"])}, "has no <U1")
unwritable({"x": np.array([None])}, "has no object")
unwritable({"x": np.zeros(2, np.longdouble)}, "safetensors has no")
unwritable({"x": [1.0]}, "list")
unwritable({"__metadata__": np.zeros(2)}, "taken")
unwritable({"__metadata__": np.zeros(2)}, "taken", metadata={})
unwritable({"\ud800": np.zeros(2)}, "Unicode")
unwritable({3: np.zeros(2)}, "must be a str")
unwritable({"x": np.zeros(2)}, "metadata", metadata={"a": 1})


@pytest.mark.parametrize(("tensors", "metadata", "message"), UNWRITABLE)
def test_save_file_refuses_what_the_format_lacks_and_leaves_the_old_file(
    tmp_path, tensors, metadata, message
):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FormatError, match=message):
        save_file(tmp_path / "a", tensors, metadata)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_load_file_reads_as_many_tensors_as_a_large_model_has(tmp_path):
    tensors = {f"{i}": np.full((), i, np.int16) for i in range(5_000)}
    save_file(tmp_path / "a", tensors)
    assert load_file(tmp_path / "a") == tensors


@pytest.mark.parametrize(
    ("shape", "dtype"), [(3, "f4"), (1, "f4"), ((2, 1), "f4"), (2, "f8"), (2, "i4")]
)
def test_write_stream_refuses_an_array_that_differs_from_its_entry(tmp_path, shape, dtype):
    array = np.zeros(shape, dtype)
    with pytest.raises(FormatError, match="announced as"):
        write_stream(tmp_path / "a", [Entry("x", "F32", (2,), lambda: array)])
    assert list(tmp_path.iterdir()) == []


def test_write_stream_awaits_a_read_in_progress_when_it_fails(tmp_path):
    """Otherwise it would use a file that its caller closes, or reads from again."""
    started = []
    done = []

    def slow() -> np.ndarray:
        started.append(True)
        time.sleep(0.1)
        done.append(True)
        return np.zeros(2, np.float32)

    wrong = Entry("a", "F32", (2,), lambda: np.zeros(3, np.float32))
    entries = [wrong, Entry("b", "F32", (2,), slow)]
    with pytest.raises(FormatError, match="announced as") as caught:
        write_stream(tmp_path / "m.safetensors", entries)
    assert done == started, caught  # its traceback refers to the arrays in work
    assert not any(tmp_path.iterdir())


def test_write_stream_refuses_equal_names_and_unknown_dtypes(tmp_path):
    one = Entry("x", "F32", (2,), lambda: np.zeros(2, np.float32))
    with pytest.raises(FormatError, match="taken"):
        write_stream(tmp_path / "a", [one, one])
    for dtype, shape in (("F8", (2,)), ("F4", (3,))):
        unknown = Entry("x", dtype, shape, lambda: np.zeros(2, np.uint8))
        with pytest.raises(FormatError, match=f"unsupported dtype '{dtype}'"):
            write_stream(tmp_path / "a", [unknown])


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_write_stream_leaves_the_old_file_after_an_exception(tmp_path, problem):
    path = tmp_path / "a.safetensors"
    save_file(path, {"x": np.arange(4)})
    before = path.read_bytes()
    made = []

    def read(name: str) -> np.ndarray:
        made.append(name)
        if name == "c":
            raise problem
        # More than any buffer: the first arrays have reached the disk.
        return np.zeros(100_000, np.float32)

    entries = [Entry(name, "F32", (100_000,), partial(read, name)) for name in "dbca"]
    with pytest.raises(problem):
        write_stream(path, entries)
    assert made == ["a", "b", "c"]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_write_stream_has_at_most_two_arrays_in_memory(tmp_path):
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []

    def read() -> np.ndarray:
        # The last array is being written, and the one before may not be freed yet.
        assert all(ref() is None for ref in alive[:-2])
        array = np.zeros(1000, np.float32)
        alive.append(weakref.ref(array))
        return array

    write_stream(tmp_path / "a", [Entry(f"{i}", "F32", (1000,), read) for i in range(5)])
    assert len(alive) == 5


# ---- hostile files: one table, one harness ----

F32 = entry()
TEXT_F32 = json.dumps(F32).encode()
EIGHT = entry("F64", [1], [0, 8])
FOUR = b"\0" * 4
BIG = 2**62
HOSTILE: dict[str, tuple[bytes, str]] = {}


def hostile(case: str, message: str, content: bytes) -> None:
    """A file that is refused with this message."""
    HOSTILE[case] = content, message


def bad_file(case: str, message: str, header: object, data: bytes = b"", pad: bytes = b"") -> None:
    hostile(case, message, raw(header, data, pad=pad))


def bad_entry(case: str, message: str, *fields: Any, data: bytes = FOUR, **more: Any) -> None:
    hostile(case, message, raw({"a": entry(*fields, **more)}, data))


hostile("empty", "not a safetensors file", b"")
hostile("7 bytes", "not a safetensors file", b"\0" * 7)
hostile("N = 0", "not a safetensors file", b"\0" * 8)
bad_file("N = 1", "not a safetensors file", b"{")
hostile("N = 2^64 - 1", "not a safetensors file", b"\xff" * 8 + b"{}")
hostile("N = 2^63", "not a safetensors file", (2**63).to_bytes(8, "little") + b"{}")
hostile("N one beyond the file", "not a safetensors file", (3).to_bytes(8, "little") + b"{}")
hostile("pickle", r"no \.bin, \.pt", b"\x80\x02}q\x00X\x01\x00\x00\x00x" * 20)
hostile("zip", "begin with|not a safetensors", b"PK\x03\x04" + b"\0" * 400)
bad_file("not UTF-8", "utf-8", b'{"\xff":1}')
bad_file("byte order mark", "must begin", b"\xef\xbb\xbf{}")
bad_file("lone surrogate", "surrogate", b'{"\\ud800":%b}' % TEXT_F32, FOUR)
bad_file("truncated JSON", "not valid JSON", b'{"a":}')
bad_file("top level list", "must begin", b"[]")
bad_file("top level null", "must begin", b"null")
bad_file("NaN", "not valid JSON", b'{"__metadata__":{"a":NaN}}')
bad_file(
    "Infinity",
    "not valid JSON",
    b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
    FOUR,
)
bad_entry("size 1.0", "integers", shape=[1.0])
bad_file("size 1e0", "integers", b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', FOUR)
bad_entry("size true", "integers", shape=[True])
bad_entry("offset false", "integers", offsets=[False, 4])
bad_file("offset -0", "-0 is not", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', FOUR)
bad_file("nesting 200", "nested deeper than 3", b'{"a":' + b"[" * 200 + b"]" * 200 + b"}")
bad_file(
    "nesting 100,000", "nested deeper than 3", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
)
bad_file("nesting unclosed", "nested deeper than 3", b"{" + b"[" * 100_000 + b"}")
bad_file(
    "nesting behind a quote", "nested deeper", b'{"\\\\":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
)
bad_file(
    "5,000 digits",
    "integer",
    b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
)
bad_file("4 MB of brackets", "lists, objects and texts", b'{"a":[' + b"[]," * 1_400_000 + b"[]]}")
bad_file("duplicate name", "'a' appears twice", b'{"a":%b,"a":%b}' % (TEXT_F32, TEXT_F32), FOUR)
bad_file(
    "duplicate field",
    "twice",
    b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    FOUR,
)
bad_file("duplicate metadata", "twice", b'{"__metadata__":{},"__metadata__":{}}')
bad_file("duplicate metadata key", "twice", b'{"__metadata__":{"a":"1","a":"2"}}')
for odd_space in (b"\x0b", b"\x0c", b"\0", b"\xc2\xa0", b"\xe2\x80\xa8", b" \x0c\n"):
    bad_file(f"leading {odd_space!r}", "must begin", odd_space + b"{}")
bad_file("spaces alone", "must begin", b"    ")
bad_file("trailing tab", "end with", b"{}", pad=b"\t")
bad_file("trailing newline", "end with", b"{}", pad=b" \n")
bad_file("trailing NUL", "end with", b"{}", pad=b"\0")
bad_file("two objects", "not valid JSON", b"{}{}")
bad_entry("unknown field", "exactly dtype", extra=1)
bad_file("metadata list", "strings only", {"__metadata__": []})
bad_file("metadata integer", "strings only", {"__metadata__": {"a": 1}})
bad_file("metadata nested", "strings only", {"__metadata__": {"a": {}}})
bad_file("metadata like a tensor", "strings only", {"__metadata__": entry()}, FOUR)
bad_entry("negative size", "integers >= 0", shape=[-1])
bad_entry("two negative sizes", "integers >= 0", shape=[-1, -1])
bad_entry("negative offset", "integers >= 0", offsets=[-4, 0])
bad_entry("end before begin", "bytes, the offsets", offsets=[4, 0])
bad_entry("3 offsets", "2 offsets", offsets=[0, 4, 4])
bad_entry("1 offset", "2 offsets", offsets=[0])
bad_entry("offsets as text", "integers", offsets="04")
bad_entry("shape as object", "integers", shape={})
bad_file("entry is a list", "exactly dtype", {"a": [1, 2]}, FOUR)
bad_file("entry is null", "exactly dtype", {"a": None})
bad_entry("hole at the front", "begins at byte 4, expected 0", offsets=[4, 8], data=FOUR * 2)
bad_file(
    "hole in the middle",
    "begins at byte 8, expected 4",
    {"a": F32, "b": entry(offsets=[8, 12])},
    FOUR * 3,
)
bad_file("trailing byte", "take 4 bytes, the file holds 5", {"a": F32}, FOUR + b"\0")
bad_file("trailing zip", "take 4 bytes", {"a": F32}, FOUR + b"PK\x05\x06" + b"\0" * 18)
bad_file("missing byte", "take 4 bytes, the file holds 3", {"a": F32}, b"\0" * 3)
bad_file("data without tensors", "take 0 bytes, the file holds 1", {}, b"\0")
bad_file("full overlap", "begins at byte 0, expected 4", {"a": F32, "b": F32}, FOUR)
bad_file("partial overlap", "expected 8", {"a": EIGHT, "b": entry(offsets=[4, 8])}, FOUR * 2)
bad_file(
    "empty tensor in another", "expected 4", {"a": F32, "b": entry(shape=[0], offsets=[2, 2])}, FOUR
)
bad_entry(
    "shape (0, 2^62, 2^62)", "no array can have", shape=[0, BIG, BIG], offsets=[0, 0], data=b""
)
bad_entry(
    "shape (0, 2^63 - 1)", "no array can have", shape=[0, 2**63 - 1], offsets=[0, 0], data=b""
)
bad_entry("2^33 x 2^33", "no array can have", shape=[2**33, 2**33])
bad_entry("2^62 floats", "no array can have", shape=[BIG])
bad_entry("one side of 2^64", "no array can have", shape=[2**64])
bad_entry("product wraps around to 4 bytes", "no array can have", shape=[2**32 + 1, 2**32 - 1])
bad_entry("2^60 values, 8 bytes each", "no array can have", "F16", [2**60])
bad_entry("2^60 - 1 values", "take 2305843009213693950 bytes", "F16", [2**60 - 1])
bad_entry("rank 65", "at most 64 dimensions", shape=[1] * 65)
bad_entry("rank 1000", "at most 64 dimensions", shape=[1] * 1000)
bad_entry("dtype f32", "unsupported dtype 'f32'", "f32")
bad_entry("dtype O", "unsupported dtype", "O")
bad_entry("dtype F8_E4M3", "of shape .* is F8_E4M3, which is listed but not read", "F8_E4M3", [4])
bad_entry("dtype F4", "is F4, which is listed but not read", "F4", [8])
bad_entry("dtype C64", "is C64, which is listed", "C64", [1], [0, 8], data=FOUR * 2)
bad_entry("dtype F6", "unsupported dtype 'F6'", "F6", [4], [0, 3], data=FOUR[:3])
bad_entry("half a byte", "1 numbers of F4, each of 4 bits, do not fill", "F4", [1], [0, 1])
bad_entry("three quarters", "2 numbers of F6_E2M3", "F6_E2M3", [2], [0, 1])
bad_entry("size of F8", "take 3 bytes", "F8_E5M2", [3])
bad_entry("size of F6", "take 3 bytes", "F6_E3M2", [2, 2])
bad_entry("dtype null", "unsupported dtype", None)
bad_entry("dtype list", "unsupported dtype", ["F32"])
bad_entry("size is not shape x dtype", "take 2 bytes", "F16")
bad_file("no dtype", "exactly dtype", {"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR)
bad_file("no shape", "exactly dtype", {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR)
bad_file("no offsets", "exactly dtype", {"a": {"dtype": "F32", "shape": [1]}}, FOUR)
bad_file("BOOL byte 2", "neither 0 nor 1", {"a": entry("BOOL", [4])}, b"\0\1\2\1")
bad_file("terminal escape in a bad entry", r"\\x1b", {"\x1b[31m" * 100: entry("f32")}, FOUR)
bad_file(
    "1 MB name of a bad entry", "unsupported dtype", {"n" * 2**20: entry("f32", [9] * 9)}, FOUR
)
bad_entry("1 MB dtype", "unsupported dtype", "\n" * 2**20)
bad_file("duplicate 1 MB name", "appears twice", b'{"%b":1,"%b":1}' % ((b"n" * 2**20,) * 2))


@pytest.mark.parametrize("case", HOSTILE)
def test_load_file_refuses_a_hostile_file(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with refused(FormatError, message, tmp_path, case, path.name):
        load_file(path)


def test_safetensors_file_refuses_a_header_above_the_limit_unread(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(FormatError, match="header of 100000001 bytes"):
        SafetensorsFile(path)


def test_smallest_entry_is_the_length_of_the_shortest_entry():
    smallest = json.dumps({"": entry("U8", [], [0, 0])}, separators=(",", ":"))[1:-1]
    assert len(smallest) == SMALLEST_ENTRY
    assert sum(map(smallest.count, "{[")) == 3


ODD_BUT_GOOD: dict[str, tuple[bytes, dict[str, Any]]] = {}


def odd_but_good(case: str, content: bytes, values: dict[str, Any]) -> None:
    ODD_BUT_GOOD[case] = content, values


odd_but_good("no tensors", raw({}), {})
odd_but_good("leading space", raw(b" {}"), {})
odd_but_good("leading newlines", raw(b"\r\n\n\t {}", pad=b"  "), {})
ZERO_SIZES = {"b": entry("U8", [1], [0, 1]), "a": entry("I8", [0, 2], [1, 1])}
ZERO_SIZES["c"] = entry("U8", [0], [0, 0])
EMPTY = {"a": [], "b": [7], "c": []}
odd_but_good("zero-size tensors share an offset", raw(ZERO_SIZES, b"\7"), EMPTY)
MISALIGNED = {"u": entry("U8", [1], [0, 1]), "f": entry("I32", [1], [1, 5])}
MISALIGNED_FILE = raw(MISALIGNED, b"\1\2\0\0\0", pad=b" ")
odd_but_good("misaligned, odd header", MISALIGNED_FILE, {"u": [1], "f": [2]})
BYTE = entry("U8", [], [0, 1])
odd_but_good("0-d", raw({"a": BYTE}, b"\5"), {"a": 5})
NULL = {"__metadata__": None, "a": BYTE}
odd_but_good("metadata null, as mlx writes none", raw(NULL, b"\5"), {"a": 5})
odd_but_good("rank 64", raw({"a": entry("U8", [1] * 63 + [0], [0, 0])}), {"a": []})
ODD_NAMES = ["", "\0", "../../etc/passwd", "\x1b[2J"]
ODD_HEADER = {name: entry("U8", [], [i, i + 1]) for i, name in enumerate(ODD_NAMES)}
ZEROS = dict.fromkeys(ODD_NAMES, 0)
odd_but_good("names that mean something elsewhere", raw(ODD_HEADER, FOUR), ZEROS)
ACCENTS = {"\u00e9": BYTE, "e\u0301": entry("U8", [], [1, 2])}
odd_but_good("two spellings of one letter", raw(ACCENTS, b"\1\2"), {"\u00e9": 1, "e\u0301": 2})
MARKS = '[[[[{{{"\\"\\\\"[[[[' * 50
odd_but_good("brackets, quotes and backslashes in names", raw({MARKS: BYTE}, b"\1"), {MARKS: 1})
PAIR = b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
odd_but_good("an escaped pair of surrogates", raw(PAIR, b"\1"), {"\U0001f600": 1})


@pytest.mark.parametrize("case", ODD_BUT_GOOD)
def test_load_file_reads_odd_but_good_files(tmp_path, case):
    content, values = ODD_BUT_GOOD[case]
    (tmp_path / "a").write_bytes(content)
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == values.keys()
    for key, array in loaded.items():
        assert array.flags.carray
        if values[key] == []:
            assert array.size == 0
        else:
            assert array.tolist() == values[key]


def test_load_file_refuses_a_changed_byte_or_changes_one_value(tmp_path):
    """Either the file is refused, or only the values of data bytes differ."""
    path = tmp_path / "a"
    tensors = {"weight": np.arange(3, dtype=np.float32)}
    tensors["flags"] = np.array([True, False])
    tensors["n"] = np.array(7, np.int16)
    save_file(path, tensors, {"format": "pt"})
    good = path.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    expected = {key: bits(array) for key, array in tensors.items()}
    shapes = {key: (array.dtype, array.shape) for key, array in tensors.items()}
    renamed = refused = 0
    for place, byte in enumerate(good):
        before = good[:place]
        after = good[place + 1 :]
        for changed in (bytes([byte ^ 1]), bytes([byte ^ 0x80]), b" ", b"", b"0" + bytes([byte])):
            content = before + changed + after
            if content == good:
                continue
            path.write_bytes(content)
            try:
                loaded = load_file(path)
            except FormatError:
                refused += 1
                continue
            assert len(content) == len(good), "a length that changed is always seen"
            if place < data:
                # Inside the header only a letter of a name, a letter of the metadata, or one dtype
                # for another of its width can change unseen; the data are complete.
                assert [array.nbytes for array in loaded.values()] == [12, 2, 2]
                renamed += 1
            else:
                assert {key: (array.dtype, array.shape) for key, array in loaded.items()} == shapes
                assert sum(bits(loaded[key]) != expected[key] for key in expected) == 1
    assert renamed < 100 < refused


def test_safetensors_file_reports_a_file_cut_after_opening(tmp_path):
    path = tmp_path / "a"
    save_file(path, {"x": np.arange(100_000.0)})
    with SafetensorsFile(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(FormatError, match="ends inside tensor 'x'"):
            file.read("x")


def test_safetensors_file_reads_the_old_file_after_a_replacement(tmp_path):
    path = tmp_path / "a"
    save_file(path, {"x": np.arange(1000.0)})
    with SafetensorsFile(path) as file:
        save_file(path, {"y": np.zeros(3)})
        assert np.array_equal(file.read("x"), np.arange(1000.0))


def test_safetensors_file_refuses_what_is_not_a_file_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = open_descriptors()
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(FormatError, match="not a regular file"):
            SafetensorsFile(path)
    with pytest.raises(OSError, match="loop"):
        SafetensorsFile(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="nothing"):
        SafetensorsFile(tmp_path / "nothing")
    assert open_descriptors() == before


# ---- dtypes that are listed, but not read ----

UNREAD = sorted(BITS.keys() - DTYPES.keys())


def test_safetensors_file_lists_and_copies_dtypes_that_it_does_not_read(tmp_path):
    """They spoil nothing beside them, and keep their bytes in a copy."""
    header: dict[str, object] = {}
    begin = 0
    for number, dtype in enumerate(UNREAD):
        end = begin + (count_bytes(dtype, (2, 4)) or 0)
        header[f"t{number}"] = entry(dtype, [2, 4], [begin, end])
        begin = end
    header["w"] = entry("F32", [2], [begin, begin + 8])
    data = np.random.default_rng(0).bytes(begin) + np.array([1, 2], "<f4").tobytes()
    (tmp_path / "a").write_bytes(raw(header, data))
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.read("w").tolist() == [1, 2]
        copies = []
        for number, dtype in enumerate(UNREAD):
            key = f"t{number}"
            assert (file.dtype(key), file.shape(key)) == (dtype, (2, 4))
            for read in (file.read, file.read_bits):
                with pytest.raises(FormatError, match=f"{key}' of shape .2, 4. is {dtype}, which"):
                    read(key)
            with pytest.raises(FormatError, match=f"{key}' is {dtype}, expected F64, F32"):
                file.require_floats([key])
            copies.append(Entry(key, dtype, (2, 4), partial(file.read_bytes, key)))
        write_stream(tmp_path / "b", copies)
        with SafetensorsFile(tmp_path / "b") as copy:
            assert set(copy) == set(file) - {"w"}
            for key in copy:
                assert copy.dtype(key) == file.dtype(key)
                assert copy.read_bytes(key).tobytes() == file.read_bytes(key).tobytes()


@pytest.mark.oracle
def test_count_bytes_has_the_dtypes_and_sizes_of_the_reference(tmp_path):
    reference = pytest.importorskip("safetensors")
    for dtype in (*BITS, "F6", "F8", "I4", "C128"):
        for count in range(9):
            size = count_bytes(dtype, (count,)) if dtype in BITS else count
            data = b"\0" * (size or 0)
            content = raw({"a": entry(dtype, [count], [0, len(data)])}, data)
            try:
                ((_, theirs),) = reference.deserialize(content)
                assert (theirs["dtype"], theirs["shape"]) == (dtype, [count])
            except reference.SafetensorError:
                assert dtype not in BITS or size is None
            else:
                assert size is not None


@pytest.mark.oracle
def test_write_stream_orders_all_dtypes_as_the_reference_does(tmp_path):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors.torch")
    names = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    names += ["complex64", "uint8", "int8", "bool", "int16", "uint64", "float64", "bfloat16"]
    tensors = {f"t{i}": torch.zeros(2).to(getattr(torch, name)) for i, name in enumerate(names)}
    reference.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert len({file.dtype(key) for key in file}) == len(names)
        entries = []
        for key in file:
            read = file.read_bits if file.dtype(key) in DTYPES else file.read_bytes
            entries.append(Entry(key, file.dtype(key), file.shape(key), partial(read, key)))
        write_stream(tmp_path / "ours", reversed(entries))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.oracle
def test_safetensors_file_takes_the_leading_space_that_the_reference_takes(tmp_path):
    reference = pytest.importorskip("safetensors")
    path = tmp_path / "a"
    for byte in range(256):
        path.write_bytes(raw(bytes([byte]) + b"{}"))
        accepted = {"ours": True, "theirs": True}
        try:
            SafetensorsFile(path).close()
        except FormatError:
            accepted["ours"] = False
        try:
            reference.deserialize(path.read_bytes())
        except reference.SafetensorError:
            accepted["theirs"] = False
        assert accepted["ours"] == accepted["theirs"] == (byte in JSON_SPACE), byte


# ---- against the reference package ----

JUNK = st.none() | st.booleans() | st.integers(-3, 2**66) | st.floats() | st.text(max_size=3)
JUNK |= st.lists(st.integers(0, 9), max_size=3)
JUNK |= st.sampled_from(["F32", "F8_E4M3", "BOOL", [], {}, {"a": "b"}, [0, 4], [4, 0], [0, 0]])
SHORT_NAMES = st.text(st.characters(max_codepoint=0x200), max_size=3)
LEADING = st.sampled_from([b"", b"", b"", b" ", b"\n\t\r ", b"\x0c", b"\xef\xbb\xbf", b"\x0b"])
METADATA = st.dictionaries(st.text("ab", max_size=2), st.text(max_size=3), max_size=2)
CHANGES = st.sampled_from(["field", "entry", "order", "pad", "data", "byte"])


@st.composite
def nearly_good(draw: st.DrawFn) -> bytes:
    """A valid file with up to two changes: a field of the header, a byte, the tail, the padding."""
    header: dict[str, object] = {}
    begin = 0
    for name in draw(st.lists(SHORT_NAMES, max_size=3, unique=True)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = begin + (count_bytes(dtype, shape) or 0)
        header[name] = entry(dtype, shape, [begin, end])
        begin = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(METADATA)
    data = draw(st.binary(min_size=begin, max_size=begin))
    pad = b" " * draw(st.integers(0, 9))
    extra = b""
    for change in draw(st.lists(CHANGES, max_size=2)):
        if change == "field":
            good = [fields for fields in header.values() if isinstance(fields, dict) and fields]
            if good:
                chosen = draw(st.sampled_from(good))
                chosen[draw(st.sampled_from([*chosen, "more"]))] = draw(JUNK)
        elif change == "entry":
            header[draw(st.sampled_from([*header, "z", "__metadata__"]))] = draw(JUNK)
        elif change == "order":
            header = dict(reversed(header.items()))
        elif change == "pad":
            pad = draw(st.sampled_from([b"", b"\n", b"\t ", b"\0", b"}", b" {}"]))
        elif change == "data":
            extra = draw(st.binary(max_size=2))
    text = json.dumps(header, separators=(",", ":")).encode()
    content = raw(draw(LEADING) + text, data + extra, pad=pad)
    for _ in range(draw(st.integers(0, 1))):
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(max_size=2)) + content[place + 1 :]
    return content


@pytest.mark.oracle
@given(nearly_good())
def test_safetensors_file_accepts_only_what_the_reference_accepts(tmp_path_factory, content):
    reference = pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("differential") / "a.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except FormatError:
        return
    with file:
        try:
            for key in file:
                if file.dtype(key) == "BOOL":
                    file.read_bits(key)
        except FormatError:  # a BOOL that is neither 0 nor 1
            return
        ours = {key: file.read_bytes(key) for key in file}
        theirs = dict(reference.deserialize(content))
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            assert theirs[key]["dtype"] == file.dtype(key)
            assert tuple(theirs[key]["shape"]) == file.shape(key)
            assert bytes(theirs[key]["data"]) == array.tobytes()


@pytest.mark.oracle
@given(st.dictionaries(st.text(max_size=5), ARRAYS, min_size=1))
def test_save_file_writes_the_bytes_of_the_reference(tmp_path_factory, tensors):
    reference = pytest.importorskip("safetensors.numpy")
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    save_file(path, tensors)
    assert path.read_bytes() == reference.save(tensors, {"format": "pt"})
    path.write_bytes(reference.save(tensors))  # without metadata
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(bits(loaded[key]) == bits(tensors[key]) for key in tensors)
    save_file(path, tensors, {})
    assert path.read_bytes() == reference.save(tensors)


@pytest.mark.oracle
def test_read_bits_and_bf16_from_agree_with_torch(tmp_path):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors.torch")
    patterns = np.arange(2**16, dtype=np.uint16)
    tensors = {"h": torch.ones(2, dtype=torch.half), "f": torch.ones(3)}
    tensors["b"] = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)
    reference.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert np.array_equal(file.read_bits("b"), patterns)
        entries = []
        for key in file:
            read = partial(file.read_bits, key)
            entries.append(Entry(key, file.dtype(key), file.shape(key), read))
        write_stream(tmp_path / "ours", entries)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bf16_from(values), theirs)


# The hostile files that the reference takes.
TAKEN = {"trailing tab", "trailing newline", "offset -0"}
TAKEN |= {"duplicate name", "duplicate metadata key", "metadata null", "unknown field"}
TAKEN |= {"BOOL byte 2", "dtype F8_E4M3", "dtype F4", "dtype C64", "rank 65", "rank 1000"}
TAKEN |= {"shape (0, 2^62, 2^62)", "shape (0, 2^63 - 1)"}


@pytest.mark.oracle
def test_load_file_is_stricter_than_the_reference_in_these_cases():
    """A record of where minilora is stricter; it refuses all that the reference refuses."""
    reference = pytest.importorskip("safetensors")
    taken = set()
    for case, (content, _) in HOSTILE.items():
        with contextlib.suppress(reference.SafetensorError):
            reference.deserialize(content)
            taken.add(case)
    assert taken <= TAKEN


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_read_rows_has_the_rows_of_read_bits(dtype, tmp_path):
    bits = round_to(np.random.default_rng(0).standard_normal((7, 2, 3)), dtype)
    entries = [Entry(name, dtype, bits.shape, lambda: bits) for name in "ab"]
    write_stream(tmp_path / "rows.safetensors", entries)
    with SafetensorsFile(tmp_path / "rows.safetensors") as file:
        for rows in (slice(0, 7), slice(2, 4), slice(6, 9), slice(3, 3)):
            part = file.read_rows("b", rows)
            assert part.dtype == bits.dtype
            assert np.array_equal(part, bits[rows])
