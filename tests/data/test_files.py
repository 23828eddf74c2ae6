"""Data files: what one is taken for, and which errors say where it is not what its name says."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import files
from minilora.data.files import MAX_RECORD_BYTES, open_data, read_plain_text
from minilora.errors import DataError, FormatError

R = b'{"text": "abc"}'
BOM = b"\xef\xbb\xbf"


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---- what a file is ------------------------------------------------------------------------------

KINDS: list[tuple[str, bytes, str, int, str]] = []


def kind(name: str, content: bytes, expected: str, count: int = 0, note: str = "") -> None:
    KINDS.append((name, content, expected, count, note))


LINES = "is read as JSON Lines, one record per line"
ARRAY = "is read as a JSON array of records"
kind("a.jsonl", R + b"\n" + R, "lines", 2)
kind("a.ndjson", R, "lines", 1)
kind("A.JSONL", BOM + b"\r\n \t\r\n" + R + b"\r\n\r\n" + R + b"\r\n", "lines", 2)
kind("a.jsonl", BOM + R, "lines", 1)
kind("a.json", R + b"\n" + R, "lines", 2, LINES)
kind("a.txt", b"\n" + R + b"\n" + R + b"\n\n", "lines", 2, LINES)
kind("no name", R, "lines", 1, LINES)
kind("a.json", b"[" + R + b"," + R + b"]", "array", 2, ARRAY)
kind("a.json", BOM + b"\n[\r\n " + R + b" ,\r\n" + R + b"\n]\n", "array", 2, ARRAY)
kind("a.txt", b"[" + R + b"]", "array", 1, ARRAY)
kind("a.jsonl", b"[\n" + R + b"\n]", "array", 1, ARRAY)
kind("a.json", b'[{"text": "a\\\\"}, {"text": "\\"]}{["}]', "array", 2, ARRAY)
DATA = "is read as the records in its list 'data'"
kind("a.json", b'{"data": [' + R + b"]}", "array", 1, DATA)
kind(
    "a.json",
    b'{"n": {"a": []}, "l": ["x"], "data":\n[' + R + b",\n" + R + b"]\n}",
    "array",
    2,
    DATA,
)
kind("a.json", b'{"columns": [{"a": 1}], "data": [' + R + b'], "z": 1}', "array", 1, DATA)
kind("a.txt", b'{"data": [' + R + b"]}", "array", 1, DATA)
kind("a.json", json.dumps({"text": "abc", "x": [1]}, indent=1).encode(), "record", 1, "as one rec")
kind("a.json", b'{\n"messages": [{"role": "user"}]}', "record", 1, "is read as one record")
# What begins with a bracket and is a text.
IS_TEXT = "does not begin with a record and is read as plain text"
kind("a.md", b"[link](http://a)\n[b](c)\n", "text", note=IS_TEXT)
kind("a.py", b"[{'text': 'a'}, {'text': 'b'}]\n", "text", note=IS_TEXT)
kind("a.py", b"[1, 2]\n", "text", note=IS_TEXT)
kind("a.txt", b"[" * 10**5, "text", note=IS_TEXT)
kind("a.txt", b"[]", "text", note=IS_TEXT)
kind("a.c", b"{ int x; }\n", "text", note=IS_TEXT)
kind("a.tex", b"{\\rm text}\n", "text", note=IS_TEXT)
kind("a.tpl", b'{% for a in b %}{"text": "a"}{% endfor %}\n', "text", note=IS_TEXT)
kind("a.log", b'{"time": 1}\n{"time": 2}\n', "text", note=IS_TEXT)
kind("a.txt", b'[{"a": 1}]', "text", note=IS_TEXT)
kind("a.txt", b'{"a": 1}', "text", note=IS_TEXT)
kind("a.txt", b'{"a": [1, 2]}', "text", note=IS_TEXT)
kind("a.txt", b'{"text": "caf\xe9"}\n', "text", note=IS_TEXT)
# A table, which some would take for records.
IS_TABLE = "is read as plain text, lines and commas too: export it as JSON Lines for records"
kind("a.csv", b"instruction,output\n1 + 1,2\n", "text", note=IS_TABLE)
kind("A.TSV", b"[a]\tb\n", "text", note=IS_TABLE)
# What does not.
kind("a.txt", b"a text\n" + R, "text")
kind("a.txt", b'"text"', "text")
kind("a.txt", BOM + b"text", "text")
kind("a.txt", b"caf\xe9 \0 \xff", "text")
kind("a.txt", b"PAR1 is the first of the pars", "text")


@pytest.mark.parametrize(("name", "content", "expected", "count", "note"), KINDS)
def test_open_data_decides_by_the_content(tmp_path, name, content, expected, count, note):
    path = written(tmp_path / name, content)
    file = open_data(path)
    assert file.kind == expected
    assert (note in file.note) if note else not file.note
    assert file.is_records == (expected != "text")
    if file.is_records:
        assert len(list(file.records())) == count
        with pytest.raises(DataError, match="has records, expected a plain text: train on"):
            read_plain_text(path)
    else:
        assert file.text() == read_plain_text(path) == content


VALUES = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.integers(-9, 9) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\[{', max_size=3), inner)
    ),
    max_leaves=9,
)
RECORDS = st.lists(VALUES.map(lambda value: {"text": "abc", "x": value}), min_size=1, max_size=5)


@given(RECORDS, st.sampled_from([None, 0, 1]), st.booleans(), st.integers(1, 40))
def test_open_data_reads_the_same_records_in_every_form(
    tmp_path_factory, records, indent, is_ascii, block
):
    """Whatever is inside the records, and wherever a block of the search ends."""
    path = tmp_path_factory.getbasetemp() / "data.json"
    form = {"indent": indent, "ensure_ascii": is_ascii}
    lines = "\n".join(json.dumps(record) for record in records)
    array = json.dumps(records, **form)
    wrapped = json.dumps({"a": {"b": 1}, "data": records, "c": [1]}, **form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        for text in (lines, array, wrapped):
            path.write_bytes(text.encode("utf-8"))
            assert [record for _, record in open_data(path).records()] == records


def test_records_of_an_array_say_where_they_are(tmp_path):
    long = R.replace(b" ", b"\n")
    content = b'{"n": 1,\n"data": [\n' + R + b", " + long + b",\n" + R + b"\n]}"
    file = open_data(written(tmp_path / "a.json", content))
    places = [where.removeprefix(f"'{tmp_path}/a.json' ") for where, _ in file.records()]
    assert places == ["record 1 (line 3)", "record 2 (line 3)", "record 3 (line 5)"]


# ---- errors --------------------------------------------------------------------------------------

BAD: list[tuple[str, bytes, type[Exception], str]] = []


def bad(name: str, content: bytes, error: type[Exception], message: str) -> None:
    BAD.append((name, content, error, message))


RENAME = "; to train on its characters, rename it to .txt"
NOT_JSON = "not valid JSON"
# Named as JSON, but it is not.
bad("a.jsonl", b"a text", FormatError, f"line 1: {NOT_JSON}")
bad("a.json", b"a text", FormatError, f"line 1: {NOT_JSON}")
PER_LINE = "; write one record per line, or one array of records"
bad("a.jsonl", json.dumps({"text": "abc"}, indent=1).encode(), FormatError, PER_LINE)
bad("a.jsonl", R + b",\n" + R, FormatError, PER_LINE)
bad("a.jsonl", b'{"text": "a", "n": NaN}', FormatError, "NaN is not JSON: write null where no")
bad("a.json", b"a text", FormatError, RENAME)
bad("a.json", b'"text"', FormatError, "line 1: expected a JSON object, found str" + RENAME)
bad("a.json", b"[1, 2]", FormatError, "line 1: expected a list of objects, found '1, 2]'" + RENAME)
bad("a.json", b'\n["a"]', FormatError, "line 2: expected a list of objects, found '\"a\"]'")
bad("a.json", b"[[" + R + b"]]", FormatError, "(line 1): expected a JSON object, found list")
bad("a.json", b'[{"a": 1}]', DataError, "record 1 (line 1): expected the fields messages")
bad("a.json", b'{"a": 1}', DataError, "expected one record, or one list of records; found 'a'")
bad("a.json", b"{}", DataError, "found nothing")
bad("a.json", b'{"data": {"a": [' + R + b"]}}", DataError, "found 'data'")
LISTS = b'{"train": [' + R + b'], "test": [' + R + b"]}"
bad("a.json", LISTS, DataError, "found 'train', 'test': give each list a file of its own")
bad("a.json", b'{"data": [{"a": 1}]}', DataError, "record 1 (line 1): expected the fields")
bad("a.json", b'{"data": [' + R + b'],\n"data": []}', FormatError, "'data' appears twice")
bad(
    "a.json",
    b'\n{\n"data": [\n' + R + b'\n],\n"x": 1,}',
    FormatError,
    "name enclosed in double quotes: line 6 c",
)
bad("a.jsonl", b'{"data": [' + R + b"]}", DataError, "line 1: expected the fields")
bad("a.json", b'{"data": [' + R + b"]}\n" + R, DataError, "line 1: expected the fields")
for nothing in (b"", b"\n \r\n", BOM, b"[]", b"[ \n]", b'{"data": []}'):
    bad("a.json", nothing, DataError, "has no record to train on")
# Lines that are damaged, whatever the name.
for name in ("a.jsonl", "a.json", "a.txt"):
    bad(name, R + b"\n" + R[:-3], FormatError, f"line 2: {NOT_JSON}: Unterminated string")
    bad(name, R + b"\n\n\0\0\0", FormatError, f"line 3: {NOT_JSON}: byte 1 is NUL")
    bad(name, R + b'\n{"text": "caf\xe9"}', FormatError, f"line 2: {NOT_JSON}: 'utf-8' codec can't")
    bad(name, R + b"\nand so on", FormatError, f"line 2: {NOT_JSON}")
    bad(name, R + b"\n[1]", FormatError, "line 2: expected a JSON object, found list")
# Arrays that are damaged, whatever the name.
for name in ("a.json", "a.jsonl", "a.txt"):
    two = b"[" + R + b",\n" + R
    bad(name, two, FormatError, "line 2: what begins here does not end: the file is cut off")
    bad(name, two[:-4], FormatError, "line 2: what begins here does not end")
    bad(name, two + b",]", FormatError, "line 2: expected ] and the end, found ',]'")
    bad(name, two + b"]\n" + R, FormatError, "line 2: expected ] and the end, found ']\\n{")
    bad(name, two + b", 3]", FormatError, "line 2: expected ] and the end, found ', 3]'")
    bad(name, two + R + b"]", FormatError, "record 3 (line 2): expected objects with commas betw")
    bad(name, two + b",\n,\n" + R + b"]", FormatError, "record 3 (line 4): expected objects with")
    bad(name, two + b',{"text": NaN}]', FormatError, f"record 3 (line 2): {NOT_JSON}")
    bad(name, two + b',{"text": "a", "text": "b"}]', FormatError, "'text' appears twice")
    bad(name, two + b',{"text": "caf\xe9"}]', FormatError, "record 3 (line 2)")
    bad(name, two + b',{"x": ' + b"[" * 99 + b"]" * 99 + b"}]", FormatError, "nested deeper than")
    bad(name, two + b',{"x": 123456789012345678901234567890}]', FormatError, "is not an integer")


@pytest.mark.parametrize(("name", "content", "error", "message"), BAD)
def test_open_data_says_where_a_file_is_not_records(tmp_path, name, content, error, message):
    path = written(tmp_path / name, content)
    with pytest.raises((DataError, FormatError)) as caught:
        list(open_data(path).records())
    assert type(caught.value) is error
    assert f"'{path}'" in str(caught.value)
    assert message in str(caught.value)


def test_open_data_that_must_be_records_is_never_a_text(tmp_path):
    for content in (b"a text", b"[link](a)", b'{"time": 1}', b""):
        path = written(tmp_path / "a.txt", content)
        with pytest.raises((DataError, FormatError)):
            open_data(path, must_be_records=True)
    assert open_data(written(path, R), must_be_records=True).kind == "lines"


BINARY = {
    "compressed with gzip, expected text in UTF-8: decompress it first": gzip.compress(R),
    "compressed with bzip2": b"BZh91AY&SY\0",
    "compressed with xz": b"\xfd7zXZ\0\0",
    "compressed with zstd": b"\x28\xb5\x2f\xfd\0",
    "a zip archive": b"PK\x03\x04\x14",
    "a Parquet file, expected text in UTF-8: export it as JSON Lines": b"PAR1\x15\x04",
    "an Arrow file": b"ARROW1\0\0",
    "an Arrow stream": b"\xff\xff\xff\xff\x10\0\0\0",
    "an SQLite database": b"SQLite format 3\0",
    "a NumPy array": b"\x93NUMPY\x01",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "a PDF document": b"%PDF-1.7\n",
    "a Git LFS pointer, expected text in UTF-8: run: git lfs pull": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    "in UTF-16, expected UTF-8: convert it to UTF-8": '{"text": "a"}'.encode("utf-16"),
    "in UTF-16": b"\xfe\xff\0{",
    "in UTF-32": '{"text": "a"}'.encode("utf-32"),
}


@pytest.mark.parametrize("message", BINARY)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_open_data_names_a_binary_format(tmp_path, name, message):
    with pytest.raises(DataError, match=f"{name}' is {message}"):
        open_data(written(tmp_path / name, BINARY[message]))


def test_open_data_reads_a_plain_text_in_utf_16_as_bytes(tmp_path):
    content = "a text".encode("utf-16")
    file = open_data(written(tmp_path / "a.txt", content))
    assert file.text() == content
    assert "is in UTF-16 and is read as plain text, byte by byte" in file.note
    with pytest.raises(DataError, match="is in UTF-16, expected UTF-8: convert it"):
        open_data(written(tmp_path / "a.json", content))


def test_open_data_refuses_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="is not a regular file but a pipe or a device: give a"):
        open_data(tmp_path / "pipe")
    with pytest.raises(FormatError, match="is not a regular file but a folder: give a file"):
        open_data(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_data(tmp_path / "nothing")
    with pytest.raises(DataError, match="is empty"):
        open_data(written(tmp_path / "a.txt", b"")).text()


# ---- memory --------------------------------------------------------------------------------------


def peak_of(path: Path, message: str) -> int:
    """The most bytes that were allocated until a file was refused."""
    tracemalloc.start()
    try:
        with pytest.raises((DataError, FormatError), match=message):
            list(open_data(path).records())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


TOO_LONG = "longer than 16,777,216 bytes"
HUGE = [("a.jsonl", b'{"text": "', TOO_LONG)]
for name in ("a.jsonl", "a.json"):
    HUGE += [(name, b'[{"text": "', TOO_LONG), (name, b"x", TOO_LONG), (name, b"[", "does not end")]


@pytest.mark.parametrize(("name", "begin", "message"), HUGE)
def test_open_data_reads_little_of_a_huge_line(tmp_path, name, begin, message):
    path = written(tmp_path / name, begin)
    os.truncate(path, 2**31)  # a hole, which takes no space on the disk
    assert peak_of(path, message) < 12 * MAX_RECORD_BYTES


def test_records_parses_one_record_of_lines_or_of_an_array_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 1 << 12)
    record = json.dumps({"text": "abc", "a": [f"{i:05}" for i in range(2000)]}).encode()
    parsed = 2000 * 60  # bytes at least
    count = 25
    lines = written(tmp_path / "a.jsonl", (record + b"\n") * count)
    array = written(tmp_path / "a.json", b"[" + b",".join([record] * count) + b"]")
    for path, held in ((lines, 0), (array, array.stat().st_size)):
        tracemalloc.start()
        try:
            assert sum(1 for _ in open_data(path).records()) == count
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # What is read at once, what its search takes, and a few records.
        assert peak < held + 8 * parsed


def test_records_refuses_a_record_that_is_too_long(tmp_path):
    long = b'{"text": "' + b"x" * MAX_RECORD_BYTES + b'"}'
    message = "longer than 16,777,216 bytes, expected one record"
    with pytest.raises(DataError, match=f"line 2: {message}"):
        list(open_data(written(tmp_path / "a.jsonl", R + b"\n" + long)).records())
    array = b"[" + R + b",\n" + long + b"]"
    with pytest.raises(DataError, match=rf"line 2\)?: {message}"):
        list(open_data(written(tmp_path / "a.json", array)).records())
