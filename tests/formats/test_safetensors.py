"""Arrays come back bit for bit, and nothing that is not exactly a safetensors file is taken for one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from harness import open_descriptors, refused
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora.errors import FormatError
from minilora.formats import (
    Entry,
    SafetensorsFile,
    bf16_from,
    bf16_to_float32,
    load_file,
    save_file,
    write_stream,
)
from minilora.formats.safetensors import DTYPES, MAX_HEADER_BYTES, NAMES, SMALLEST_ENTRY

GOLDEN = Path(__file__).parents[1] / "golden"


def raw(header: object, data: bytes = b"", *, pad: bytes = b"") -> bytes:
    """The bytes of a file. A header that is not bytes is written as JSON."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return len(text + pad).to_bytes(8, "little") + text + pad + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def bits(array: np.ndarray) -> bytes:
    """The values as little-endian C-order bytes, made by the slowest and plainest way there is."""
    wide = array.astype(array.dtype.newbyteorder("<"))
    return b"".join(wide[index].tobytes() for index in np.ndindex(wide.shape))


# ---- bfloat16 ----


def test_every_bfloat16_pattern_widens_exactly_and_comes_back():
    patterns = np.arange(2**16, dtype=np.uint16)
    wide = bf16_to_float32(patterns)
    assert np.array_equal(wide.view(np.uint32), patterns.astype(np.uint32) << 16)
    quiet = np.where(
        np.isnan(wide), patterns | 0x40, patterns
    )  # a signalling NaN becomes a quiet one, sign kept
    assert np.array_equal(bf16_from(wide), quiet)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(bf16_from(wide.astype(np.float64)), quiet)


def test_every_float16_pattern_rounds_to_the_nearest_bfloat16():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    check_nearest(half[np.isfinite(half)])


def check_nearest(values: np.ndarray) -> None:
    """bf16_from against a definition: no neighbour is closer, and of two equally close ones the even one is taken."""
    got = bf16_from(values)
    exact = values.astype(np.float64)
    assert np.array_equal(np.signbit(exact), got >> 15 == 1)
    magnitude = got & 0x7FFF

    def distance(pattern: np.ndarray) -> np.ndarray:
        # For rounding, infinity stands where the next larger number would: at 2^128.
        place = np.where(
            pattern == 0x7F80,
            2.0**128,
            bf16_to_float32(np.minimum(pattern, 0x7F7F)).astype(np.float64),
        )
        return np.abs(np.abs(np.clip(exact, -(2.0**128), 2.0**128)) - place)

    for neighbour in (np.maximum(magnitude, 1) - 1, np.minimum(magnitude + 1, 0x7F80)):
        other, own = distance(neighbour.astype(np.uint16)), distance(magnitude)
        assert np.all(
            (own < other) | ((own == other) & ((magnitude % 2 == 0) | (neighbour == magnitude)))
        )


@given(hnp.arrays(np.float64, 8, elements=st.floats(allow_nan=False, allow_infinity=False)))
def test_a_float64_is_rounded_once(values):
    check_nearest(values)


@given(
    st.integers(0, 0x7F7E),
    st.integers(-60, -26),
    st.sampled_from([-1, 1]),
    st.sampled_from([-1, 1]),
)
@example(0x3F80, -40, 1, 1)
def test_a_float64_just_beside_a_tie_is_not_rounded_by_way_of_float32(pattern, shift, side, sign):
    low, high = (float(bf16_to_float32(np.uint16(p))) for p in (pattern, pattern + 1))
    middle = (low + high) / 2
    beside = middle + side * (high - low) * 2.0**shift
    if beside == middle:
        beside = np.nextafter(middle, side * np.inf)
    expected = (pattern + (side > 0)) | (0x8000 if sign < 0 else 0)
    assert int(bf16_from(np.array(sign * beside))) == expected
    assert int(bf16_from(np.array(sign * middle))) & 1 == 0


@given(
    hnp.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)
def test_a_float32_rounds_to_the_nearest(values):
    check_nearest(values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bfloat16_of_nan_inf_and_the_edges(dtype):
    top = np.uint32(0x7F7F8000).view(np.float32)  # halfway between the largest bfloat16 and 2^128
    values = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, top, np.nextafter(top, np.float32(0))], dtype
    )
    assert [hex(b) for b in bf16_from(values)] == [
        "0x7fc0", "0xffc0", "0x7f80", "0xff80", "0x0", "0x8000", "0x7f80", "0x7f7f",
    ]  # fmt: skip
    assert bf16_from(np.zeros((0, 3), dtype)).shape == (0, 3)
    before = values.copy()
    bf16_from(values[::-2])
    assert np.array_equal(values, before, equal_nan=True)  # the input is only read


def test_a_nan_whose_payload_lies_in_the_lower_half_stays_nan():
    assert int(bf16_from(np.array(0x7F800001, np.uint32).view(np.float32))) == 0x7FC0


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.longdouble, bool])
def test_bfloat16_is_made_of_floats_only(dtype):
    with pytest.raises(FormatError, match="rounded from"):
        bf16_from(np.zeros(2, dtype))


# ---- round trips ----

LAYOUTS = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "negative": lambda a: a[..., ::-1].copy()[..., ::-1] if a.ndim else a,
    "step2": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape)),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: (a.setflags(write=False), a)[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in DTYPES if name != "BF16"])
def test_round_trip(tmp_path, name, layout):
    rng = np.random.default_rng(0)
    tensors = {}
    for shape in [(), (1,), (0,), (3, 0, 2), (5,), (3, 4), (2, 3, 4)]:
        random = np.frombuffer(
            rng.bytes(math.prod(shape) * DTYPES[name].itemsize), DTYPES[name]
        ).reshape(shape)
        array = random.view(np.uint8) % 2 == 1 if name == "BOOL" else random
        tensors[f"t{shape}"] = LAYOUTS[layout](array.copy())
    save_file(tmp_path / "a.safetensors", tensors)
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
        for key, array in tensors.items():
            got = file.read(key)
            assert (file.dtype(key), file.shape(key)) == (name, array.shape)
            assert got.shape == array.shape
            assert got.dtype == array.dtype.newbyteorder("=")
            assert got.dtype.isnative
            assert bits(got) == bits(array)
            owner = got
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            assert owner.flags.owndata
            assert got.flags.carray  # aligned, C-contiguous, writable
            assert not any(np.shares_memory(got, other) for other in tensors.values())
            assert bits(file.read_bits(key)) == bits(array)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # halves of surrogate pairs are not text


@given(
    st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(NAMES, key=str)).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
        ),
    ),
    st.dictionaries(TEXT, TEXT),
)
def test_any_names_any_arrays_any_metadata(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    save_file(path, tensors, metadata)
    with SafetensorsFile(path) as file:
        assert file.metadata == metadata
        assert {key: (file.read(key).dtype, bits(file.read(key))) for key in file.keys()} == {
            key: (array.dtype, bits(array)) for key, array in tensors.items()
        }
    first = path.read_bytes()
    assert first.index(b"{") == 8
    assert int.from_bytes(first[:8], "little") % 8 == 0
    shuffled = dict(reversed(tensors.items()))
    save_file(path, shuffled, dict(reversed(metadata.items())))
    assert path.read_bytes() == first  # the bytes do not depend on the order in which things came


def test_reading_converts_and_bfloat16_is_widened_or_left(tmp_path):
    stored = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / "a.safetensors"
    ints = np.arange(3, dtype=np.int32)
    write_stream(
        path,
        [Entry("b", "BF16", (256, 256), lambda: stored.T), Entry("i", "I32", (3,), lambda: ints)],
    )
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


def test_a_bool_is_stored_as_zero_or_one(tmp_path):
    """NumPy lets a bool hold any byte, a file does not: what is written can be read."""
    odd = np.array([0, 1, 2, 255], np.uint8).view(bool)
    save_file(tmp_path / "a", {"x": odd})
    assert load_file(tmp_path / "a")["x"].tolist() == [False, True, True, True]


def test_golden_files_are_rewritten_byte_for_byte(tmp_path):
    paths = sorted(GOLDEN.glob("*/*model.safetensors"))
    assert len(paths) >= 7
    for path in paths:
        save_file(tmp_path / "copy", load_file(path))
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()


# ---- what cannot be written ----


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"x": np.zeros(2, np.complex64)}, None, "complex64"),
        ({"x": np.array(["a"])}, None, "has no <U1"),
        ({"x": np.array([None])}, None, "has no object"),
        ({"x": np.zeros(2, np.longdouble)}, None, "safetensors has no"),
        ({"x": [1.0]}, None, "list"),
        ({"__metadata__": np.zeros(2)}, None, "taken"),
        ({"__metadata__": np.zeros(2)}, {}, "taken"),
        ({"\ud800": np.zeros(2)}, None, "Unicode"),
        ({3: np.zeros(2)}, None, "must be a str"),
        ({"x": np.zeros(2)}, {"a": 1}, "metadata"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_the_old_file_stays(
    tmp_path, tensors, metadata, message
):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FormatError, match=message):
        save_file(tmp_path / "a", tensors, metadata)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_a_file_may_hold_as_many_tensors_as_a_large_model(tmp_path):
    tensors = {f"{i}": np.full((), i, np.int16) for i in range(5_000)}
    save_file(tmp_path / "a", tensors)
    assert load_file(tmp_path / "a") == tensors


@pytest.mark.parametrize(
    "made",
    [np.zeros(3, "f4"), np.zeros(1, "f4"), np.zeros((2, 1), "f4"), np.zeros(2), np.zeros(2, "i4")],
)
def test_an_entry_must_keep_its_word(tmp_path, made):
    with pytest.raises(FormatError, match="announced as"):
        write_stream(tmp_path / "a", [Entry("x", "F32", (2,), lambda: made)])
    assert list(tmp_path.iterdir()) == []


def test_when_writing_has_failed_no_read_is_going_on(tmp_path):
    """Else it would use a file that its caller closes, or reads from anew."""
    started, done = [], []

    def slow() -> np.ndarray:
        started.append(True)
        time.sleep(0.1)
        done.append(True)
        return np.zeros(2, np.float32)

    entries = [
        Entry("a", "F32", (2,), lambda: np.zeros(3, np.float32)),
        Entry("b", "F32", (2,), slow),
    ]
    with pytest.raises(
        FormatError, match="announced as"
    ) as caught:  # its traceback holds whatever was going on
        write_stream(tmp_path / "m.safetensors", entries)
    assert done == started, caught
    assert not any(tmp_path.iterdir())


def test_entries_must_differ_in_name_and_have_a_known_dtype(tmp_path):
    one = Entry("x", "F32", (2,), lambda: np.zeros(2, np.float32))
    with pytest.raises(FormatError, match="taken"):
        write_stream(tmp_path / "a", [one, one])
    with pytest.raises(FormatError, match="unsupported dtype 'F8_E4M3'"):
        write_stream(tmp_path / "a", [Entry("x", "F8_E4M3", (2,), lambda: np.zeros(2))])


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_exception_in_the_middle_of_a_stream_leaves_the_old_file(tmp_path, problem):
    path = tmp_path / "a.safetensors"
    save_file(path, {"x": np.arange(4)})
    before, made = path.read_bytes(), []

    def read(name: str) -> np.ndarray:
        made.append(name)
        if name == "c":
            raise problem
        return np.zeros(
            100_000, np.float32
        )  # more than any buffer: the first ones have reached the disk

    with pytest.raises(problem):
        write_stream(
            path, [Entry(name, "F32", (100_000,), lambda name=name: read(name)) for name in "dbca"]
        )
    assert made == ["a", "b", "c"]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_stream_holds_one_array_and_the_next(tmp_path):
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []

    def read() -> np.ndarray:
        assert all(
            ref() is None for ref in alive[:-2]
        )  # the last is being written, the one before being let go
        array = np.zeros(1000, np.float32)
        alive.append(weakref.ref(array))
        return array

    write_stream(tmp_path / "a", [Entry(f"{i}", "F32", (1000,), read) for i in range(5)])
    assert len(alive) == 5


# ---- hostile files: one table, one harness ----

F32 = entry()
FOUR = b"\0" * 4
BIG = 2**62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "7 bytes": (b"\0" * 7, "not a safetensors file"),
    "N = 0": (b"\0" * 8, "not a safetensors file"),
    "N = 1": (raw(b"{"), "not a safetensors file"),
    "N = 2^64 - 1": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "N = 2^63": ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "N one beyond the file": ((3).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00x" * 20, r"no \.bin, \.pt"),
    "zip": (b"PK\x03\x04" + b"\0" * 400, "begin with|not a safetensors"),
    "not UTF-8": (raw(b'{"\xff":1}'), "utf-8"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "must begin"),
    "lone surrogate": (raw(b'{"\\ud800":' + json.dumps(F32).encode() + b"}", FOUR), "surrogate"),
    "truncated JSON": (raw(b'{"a":}'), "not valid JSON"),
    "top level list": (raw(b"[]"), "must begin"),
    "top level null": (raw(b"null"), "must begin"),
    "NaN": (raw(b'{"__metadata__":{"a":NaN}}'), "not valid JSON"),
    "Infinity": (
        raw(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', FOUR),
        "not valid JSON",
    ),
    "size 1.0": (raw({"a": entry(shape=[1.0])}, FOUR), "integers"),
    "size 1e0": (
        raw(b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', FOUR),
        "integers",
    ),
    "size true": (raw({"a": entry(shape=[True])}, FOUR), "integers"),
    "offset false": (raw({"a": entry(offsets=[False, 4])}, FOUR), "integers"),
    "offset -0": (
        raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', FOUR),
        "-0 is not",
    ),
    "nesting 200": (raw(b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"), "nested deeper than 3"),
    "nesting 100,000": (
        raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "nested deeper than 3",
    ),
    "nesting unclosed": (raw(b"{" + b"[" * 100_000 + b"}"), "nested deeper than 3"),
    "nesting behind a quote": (
        raw(b'{"\\\\":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "nested deeper",
    ),
    "5,000 digits": (
        raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "integer",
    ),
    "4 MB of brackets": (raw(b'{"a":[' + b"[]," * 1_400_000 + b"[]]}"), "lists, objects and texts"),
    "duplicate name": (
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), FOUR),
        "'a' appears twice",
    ),
    "duplicate field": (
        raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "twice",
    ),
    "duplicate metadata": (raw(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "duplicate metadata key": (raw(b'{"__metadata__":{"a":"1","a":"2"}}'), "twice"),
    "leading space": (raw(b" {}"), "must begin"),
    "leading newline": (raw(b"\n{}"), "must begin"),
    "trailing tab": (raw(b"{}", pad=b"\t"), "end with"),
    "trailing newline": (raw(b"{}", pad=b" \n"), "end with"),
    "trailing NUL": (raw(b"{}", pad=b"\0"), "end with"),
    "two objects": (raw(b"{}{}"), "not valid JSON"),
    "unknown field": (raw({"a": entry(extra=1)}, FOUR), "exactly dtype"),
    "metadata list": (raw({"__metadata__": []}), "strings only"),
    "metadata integer": (raw({"__metadata__": {"a": 1}}), "strings only"),
    "metadata nested": (raw({"__metadata__": {"a": {}}}), "strings only"),
    "metadata like a tensor": (raw({"__metadata__": entry()}, FOUR), "strings only"),
    "negative size": (raw({"a": entry(shape=[-1])}, FOUR), "integers >= 0"),
    "two negative sizes": (raw({"a": entry(shape=[-1, -1])}, FOUR), "integers >= 0"),
    "negative offset": (raw({"a": entry(offsets=[-4, 0])}, FOUR), "integers >= 0"),
    "end before begin": (raw({"a": entry(offsets=[4, 0])}, FOUR), "bytes, the offsets"),
    "3 offsets": (raw({"a": entry(offsets=[0, 4, 4])}, FOUR), "2 offsets"),
    "1 offset": (raw({"a": entry(offsets=[0])}, FOUR), "2 offsets"),
    "offsets as text": (raw({"a": entry(offsets="04")}, FOUR), "integers"),
    "shape as object": (raw({"a": entry(shape={})}, FOUR), "integers"),
    "entry is a list": (raw({"a": [1, 2]}, FOUR), "exactly dtype"),
    "entry is null": (raw({"a": None}), "exactly dtype"),
    "hole at the front": (
        raw({"a": entry(offsets=[4, 8])}, FOUR * 2),
        "begins at byte 4, expected 0",
    ),
    "hole in the middle": (
        raw({"a": F32, "b": entry(offsets=[8, 12])}, FOUR * 3),
        "begins at byte 8, expected 4",
    ),
    "trailing byte": (raw({"a": F32}, FOUR + b"\0"), "take 4 bytes, the file holds 5"),
    "trailing zip": (raw({"a": F32}, FOUR + b"PK\x05\x06" + b"\0" * 18), "take 4 bytes"),
    "missing byte": (raw({"a": F32}, b"\0" * 3), "take 4 bytes, the file holds 3"),
    "data without tensors": (raw({}, b"\0"), "take 0 bytes, the file holds 1"),
    "full overlap": (raw({"a": F32, "b": F32}, FOUR), "begins at byte 0, expected 4"),
    "partial overlap": (
        raw({"a": entry("F64", [1], [0, 8]), "b": entry(offsets=[4, 8])}, FOUR * 2),
        "expected 8",
    ),
    "empty tensor inside another": (
        raw({"a": F32, "b": entry(shape=[0], offsets=[2, 2])}, FOUR),
        "expected 4",
    ),
    "shape (0, 2^62, 2^62)": (
        raw({"a": entry(shape=[0, BIG, BIG], offsets=[0, 0])}),
        "no array can have",
    ),
    "shape (0, 2^63 - 1)": (
        raw({"a": entry(shape=[0, 2**63 - 1], offsets=[0, 0])}),
        "no array can have",
    ),
    "2^33 x 2^33": (raw({"a": entry(shape=[2**33, 2**33])}, FOUR), "no array can have"),
    "2^62 floats": (raw({"a": entry(shape=[BIG])}, FOUR), "no array can have"),
    "one side of 2^64": (raw({"a": entry(shape=[2**64])}, FOUR), "no array can have"),
    "product wraps around to 4 bytes": (
        raw({"a": entry(shape=[2**32 + 1, 2**32 - 1])}, FOUR),
        "no array can have",
    ),
    "2^60 values, 8 bytes each": (raw({"a": entry("F16", [2**60])}, FOUR), "no array can have"),
    "2^60 - 1 values": (
        raw({"a": entry("F16", [2**60 - 1])}, FOUR),
        "take 2305843009213693950 bytes",
    ),
    "rank 65": (raw({"a": entry(shape=[1] * 65)}, FOUR), "at most 64 dimensions"),
    "rank 1000": (raw({"a": entry(shape=[1] * 1000)}, FOUR), "at most 64 dimensions"),
    "dtype f32": (raw({"a": entry("f32")}, FOUR), "unsupported dtype 'f32'"),
    "dtype O": (raw({"a": entry("O")}, FOUR), "unsupported dtype"),
    "dtype F8_E4M3": (raw({"a": entry("F8_E4M3", [4])}, FOUR), "unsupported dtype"),
    "dtype F4": (raw({"a": entry("F4", [8])}, FOUR), "unsupported dtype"),
    "dtype C64": (raw({"a": entry("C64", [1], [0, 8])}, FOUR * 2), "unsupported dtype"),
    "dtype null": (raw({"a": entry(None)}, FOUR), "unsupported dtype"),
    "dtype list": (raw({"a": entry(["F32"])}, FOUR), "unsupported dtype"),
    "size is not shape x dtype": (raw({"a": entry("F16")}, FOUR), "take 2 bytes"),
    "no dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), "exactly dtype"),
    "no shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), "exactly dtype"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "exactly dtype"),
    "BOOL byte 2": (raw({"a": entry("BOOL", [4])}, b"\0\1\2\1"), "neither 0 nor 1"),
    "terminal escape in a bad entry": (raw({"\x1b[31m" * 100: entry("f32")}, FOUR), r"\\x1b"),
    "1 MB name of a bad entry": (
        raw({"n" * 2**20: entry("f32", [9] * 9)}, FOUR),
        "unsupported dtype",
    ),
    "1 MB dtype": (raw({"a": entry("\n" * 2**20)}, FOUR), "unsupported dtype"),
    "duplicate 1 MB name": (raw(b'{"%b":1,"%b":1}' % ((b"n" * 2**20,) * 2)), "appears twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with refused(FormatError, message, tmp_path, case, path.name):
        load_file(path)


def test_a_header_above_the_limit_is_refused_unread(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(FormatError, match="header of 100000001 bytes"):
        SafetensorsFile(path)


def test_the_smallest_entry_is_as_small_as_the_reader_believes():
    smallest = json.dumps({"": entry("U8", [], [0, 0])}, separators=(",", ":"))[1:-1]
    assert len(smallest) == SMALLEST_ENTRY
    assert sum(map(smallest.count, "{[")) == 3


ODD_NAMES = ["", "\0", "../../etc/passwd", "\x1b[2J"]
ODD_BUT_GOOD: dict[str, tuple[bytes, dict[str, list[int]]]] = {
    "no tensors": (raw({}), {}),
    "zero-size tensors share an offset": (
        raw(
            {
                "b": entry("U8", [1], [0, 1]),
                "a": entry("I8", [0, 2], [1, 1]),
                "c": entry("U8", [0], [0, 0]),
            },
            b"\7",
        ),
        {"a": [], "b": [7], "c": []},
    ),
    "misaligned, odd header": (
        raw(
            {"u": entry("U8", [1], [0, 1]), "f": entry("I32", [1], [1, 5])}, b"\1\2\0\0\0", pad=b" "
        ),
        {"u": [1], "f": [2]},
    ),
    "0-d": (raw({"a": entry("U8", [], [0, 1])}, b"\5"), {"a": 5}),
    "metadata null, as mlx writes none": (
        raw({"__metadata__": None, "a": entry("U8", [], [0, 1])}, b"\5"),
        {"a": 5},
    ),
    "rank 64": (raw({"a": entry("U8", [1] * 63 + [0], [0, 0])}), {"a": []}),
    "names that mean something elsewhere": (
        raw({name: entry("U8", [], [i, i + 1]) for i, name in enumerate(ODD_NAMES)}, FOUR),
        dict.fromkeys(ODD_NAMES, 0),
    ),
    "two spellings of one letter": (
        raw({"\u00e9": entry("U8", [], [0, 1]), "e\u0301": entry("U8", [], [1, 2])}, b"\1\2"),
        {"\u00e9": 1, "e\u0301": 2},
    ),
    "brackets, quotes and backslashes in names": (
        raw({'[[[[{{{"\\"\\\\"[[[[' * 50: entry("U8", [], [0, 1])}, b"\1"),
        {'[[[[{{{"\\"\\\\"[[[[' * 50: 1},
    ),
    "an escaped pair of surrogates": (
        raw(b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"\1"),
        {"\U0001f600": 1},
    ),
}


@pytest.mark.parametrize("case", ODD_BUT_GOOD)
def test_odd_but_good(tmp_path, case):
    content, values = ODD_BUT_GOOD[case]
    (tmp_path / "a").write_bytes(content)
    loaded = load_file(tmp_path / "a")
    assert {key: array.tolist() for key, array in loaded.items()} == {
        key: np.zeros(loaded[key].shape).tolist() if value == [] else value
        for key, value in values.items()
    }
    assert all(array.flags.carray for array in loaded.values())


def test_one_flipped_deleted_or_inserted_byte_anywhere(tmp_path):
    """Either the file is refused, or only the values of data bytes differ."""
    path = tmp_path / "a"
    tensors = {
        "weight": np.arange(3, dtype=np.float32),
        "flags": np.array([True, False]),
        "n": np.array(7, np.int16),
    }
    save_file(path, tensors, {"format": "pt"})
    good = path.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    shapes = {key: (array.dtype, array.shape) for key, array in tensors.items()}
    renamed = refused = 0
    for at in range(len(good)):
        changed = {
            "flip": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
            "high": good[:at] + bytes([good[at] ^ 0x80]) + good[at + 1 :],
            "blank": good[:at] + b" " + good[at + 1 :],
            "delete": good[:at] + good[at + 1 :],
            "insert": good[:at] + b"0" + good[at:],
        }
        for kind, content in changed.items():
            if content == good:
                continue
            path.write_bytes(content)
            try:
                loaded = load_file(path)
            except FormatError:
                refused += 1
                continue
            assert kind in ("flip", "high", "blank")  # a length that changed is always seen
            if at < data:
                # Inside the header only a letter of a name, a letter of the metadata, or one dtype for another of its
                # width can change unseen; the data are still all there.
                assert [array.nbytes for array in loaded.values()] == [12, 2, 2]
                renamed += 1
            else:
                assert {key: (array.dtype, array.shape) for key, array in loaded.items()} == shapes
                assert sum(bits(loaded[key]) != bits(tensors[key]) for key in tensors) == 1
    assert renamed < 100 < refused


def test_a_file_cut_after_opening_is_an_error_and_not_a_crash(tmp_path):
    path = tmp_path / "a"
    save_file(path, {"x": np.arange(100_000.0)})
    with SafetensorsFile(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(FormatError, match="ends inside tensor 'x'"):
            file.read("x")


def test_a_file_replaced_after_opening_is_still_the_old_one(tmp_path):
    path = tmp_path / "a"
    save_file(path, {"x": np.arange(1000.0)})
    with SafetensorsFile(path) as file:
        save_file(path, {"y": np.zeros(3)})
        assert np.array_equal(file.read("x"), np.arange(1000.0))


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path):
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


# ---- against the reference package ----

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**66), st.floats(), st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(["F32", "F8_E4M3", "BOOL", [], {}, {"a": "b"}, [0, 4], [4, 0], [0, 0]]),
)  # fmt: skip


@st.composite
def nearly_good(draw: st.DrawFn) -> bytes:
    """A valid file, then up to two changes: a field of the header, a byte, the tail, the padding."""
    header: dict[str, object] = {}
    at = 0
    for name in draw(
        st.lists(st.text(st.characters(max_codepoint=0x200), max_size=3), max_size=3, unique=True)
    ):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = entry(dtype, shape, [at, end])
        at = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(st.text("ab", max_size=2), st.text(max_size=3), max_size=2)
        )
    data = draw(st.binary(min_size=at, max_size=at))
    pad, extra = b" " * draw(st.integers(0, 9)), b""
    for change in draw(
        st.lists(st.sampled_from(["field", "entry", "order", "pad", "data", "byte"]), max_size=2)
    ):
        if change == "field" and (
            good := [e for e in header.values() if isinstance(e, dict) and e]
        ):
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
    content = raw(header, data + extra, pad=pad)
    for _ in range(draw(st.integers(0, 1))):
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(max_size=2)) + content[place + 1 :]
    return content


@pytest.mark.oracle
@given(nearly_good())
def test_what_minilora_accepts_the_reference_accepts_with_the_same_bits(tmp_path_factory, content):
    reference = pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("differential") / "a.safetensors"
    path.write_bytes(content)
    try:
        with SafetensorsFile(path) as file:
            ours = {
                key: (file.dtype(key), file.shape(key), file.read_bits(key)) for key in file.keys()
            }
    except FormatError:
        return
    theirs = dict(reference.deserialize(content))
    assert ours.keys() == theirs.keys()
    for key, (dtype, shape, array) in ours.items():
        assert (theirs[key]["dtype"], tuple(theirs[key]["shape"])) == (dtype, shape)
        assert bytes(theirs[key]["data"]) == array.tobytes()


@pytest.mark.oracle
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.sampled_from(sorted(NAMES, key=str)).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
        ),
        min_size=1,
    )
)
def test_the_bytes_are_those_of_the_reference(tmp_path_factory, tensors):
    reference = pytest.importorskip("safetensors.numpy")
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    save_file(path, tensors)
    assert path.read_bytes() == reference.save(tensors, {"format": "pt"})
    path.write_bytes(reference.save(tensors))  # and without metadata
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(bits(loaded[key]) == bits(tensors[key]) for key in tensors)
    save_file(path, tensors, {})
    assert path.read_bytes() == reference.save(tensors)


@pytest.mark.oracle
def test_bfloat16_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors.torch")
    patterns = np.arange(2**16, dtype=np.uint16)
    half, brain = (
        torch.ones(2, dtype=torch.half),
        torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16),
    )
    reference.save_file(
        {"h": half, "b": brain, "f": torch.ones(3)}, tmp_path / "theirs", {"format": "pt"}
    )
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert np.array_equal(file.read_bits("b"), patterns)
        order = [
            Entry(k, file.dtype(k), file.shape(k), lambda k=k: file.read_bits(k))
            for k in list(file.keys())
        ]
        write_stream(tmp_path / "ours", order)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bf16_from(values), theirs)


@pytest.mark.oracle
def test_of_the_hostile_files_the_reference_takes_these():
    """A record of where minilora is stricter; all that the reference refuses, minilora refuses too."""
    reference = pytest.importorskip("safetensors")
    taken = set()
    for case, (content, _) in HOSTILE.items():
        with contextlib.suppress(reference.SafetensorError):
            reference.deserialize(content)
            taken.add(case)
    assert taken <= {
        "leading space", "leading newline", "trailing tab", "trailing newline", "unknown field", "metadata null",
        "duplicate name", "duplicate metadata key", "BOOL byte 2", "dtype F8_E4M3", "dtype F4", "dtype C64",
        "rank 65", "rank 1000", "shape (0, 2^62, 2^62)", "shape (0, 2^63 - 1)", "offset -0",
    }  # fmt: skip
