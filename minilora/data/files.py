"""Data files: what a file holds is decided by its content, not by its name.

    JSON Lines     one record per line, if the first line that is not blank is a record
    a JSON array   of records, if its first value is a record
    a JSON object  that has one such array, as {"data": [...]}; or that is one record
    plain text     anything else

A record is a JSON object of a shape that shapes.py knows. Nothing else makes a text data: a list of
links or a program begins with a bracket too. A file whose name ends in .json, .jsonl or .ndjson is
never taken for plain text: an error says where it is not what its name says.

JSON Lines are read line by line. Other files are in memory as a whole, but parsed one record at a
time. A record has at most MAX_RECORD_BYTES and MAX_VALUES in either case.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..errors import DataError, FormatError
from ..formats.disk import JsonObject, PathLike, open_regular, parse_json, quoted
from .shapes import find_shape, require_shape
from .texts import read_text

MAX_RECORD_BYTES = 16 << 20
MAX_VALUES = 1 << 16  # of JSON in a record: most have four, and a conversation hundreds
BLOCK = 1 << 17  # bytes of a JSON file that are searched for brackets at a time

LINE_NAMES = (".jsonl", ".ndjson")
JSON_NAMES = (".json", *LINE_NAMES)
TABLE_NAMES = (".csv", ".tsv")
BOM = b"\xef\xbb\xbf"
BLANKS = b" \t\r\n"

UNPACK = "decompress it first"
EXPORT = "export it as JSON Lines"
SIGNATURES = {  # how files begin that are no text, what they are, and what to do
    b"\x1f\x8b": ("compressed with gzip", UNPACK),
    b"BZh91AY&SY": ("compressed with bzip2", UNPACK),
    b"\xfd7zXZ\0": ("compressed with xz", UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", UNPACK),
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"PAR1\x15": ("a Parquet file", EXPORT),
    b"PAR1\0": ("a Parquet file", EXPORT),
    b"ARROW1\0": ("an Arrow file", EXPORT),
    b"\xff\xff\xff\xff": ("an Arrow stream", EXPORT),
    b"SQLite format 3\0": ("an SQLite database", EXPORT),
    b"\x93NUMPY": ("a NumPy array", EXPORT),
    b"\x89HDF\r\n": ("an HDF5 file", EXPORT),
    b"%PDF-": ("a PDF document", "extract its text first"),
    b"version https://git-lfs.github.com/spec/": ("a Git LFS pointer", "run: git lfs pull"),
}
ENCODINGS = {  # a model of bytes may train on any text, but records are UTF-8
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True)
class DataFile:
    """A file and what it holds.

    path    the file
    kind    "text", "lines", "array" or "record"
    note    what it was taken for and why, where its name does not say so; else ""
    data    all bytes of an array or a record; b"" for the other kinds, which are read again
    begin, end    where the array or the record is in `data`
    """

    path: PathLike
    kind: str
    note: str = ""
    data: bytes = b""
    begin: int = 0
    end: int = 0

    @property
    def is_records(self) -> bool:
        return self.kind != "text"

    def text(self) -> bytes:
        """The bytes of a plain text. DataError for a file of records."""
        if self.is_records:
            raise DataError(
                f"{quoted(self.path)} has records, expected a plain text: train on records with "
                "finetune or pretrain"
            )
        return read_text(self.path)

    def records(self) -> Iterator[tuple[str, JsonObject]]:
        """(where it is, record) of each record. FormatError for one that is not a JSON object."""
        for where, piece in self._pieces():
            yield where, parse_record(piece, where)

    def _pieces(self) -> Iterator[tuple[str, bytes]]:
        """(where it is, JSON of one record)"""
        if self.kind == "lines":
            for number, line in _lines(self.path):
                yield f"{quoted(self.path)} line {number}", line
        elif self.kind == "array":
            yield from _array(self.data, self.begin, self.end, quoted(self.path))
        else:
            yield quoted(self.path), self.data[self.begin : self.end]


def parse_record(piece: bytes, where: str) -> JsonObject:
    """The JSON object in `piece`, of bounded size. FormatError begins with `where`."""
    if len(piece) > MAX_RECORD_BYTES:
        raise DataError(f"{where}: longer than {MAX_RECORD_BYTES:,} bytes, expected one record")
    if b"\0" in piece:
        at = piece.index(b"\0")
        raise FormatError(f"{where}: not valid JSON: byte {at + 1} is NUL: the file is damaged")
    return parse_json(piece, where, values=MAX_VALUES)


# ---- what a file is ------------------------------------------------------------------------------


def open_data(path: PathLike, must_be_records: bool = False) -> DataFile:
    """What a file holds, judged by its first record.

    With `must_be_records`, or a name that says so, it is never plain text: DataError or FormatError
    say where it is not a record. DataError for a file that is empty, not regular, or of a known
    format that is not text. OSError if it cannot be read.
    """
    head = _read_head(path)
    name = os.fsdecode(path).lower()
    must_be_records = must_be_records or name.endswith(JSON_NAMES)
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            begin = head.removeprefix(mark).strip(BLANKS + b"\0")[:1]
            if must_be_records or begin in (b"[", b"{"):
                where = quoted(path)
                raise DataError(f"{where} is in {encoding}, expected UTF-8: convert it to UTF-8")
            note = f"{quoted(path)} is in {encoding} and is read as plain text, byte by byte"
            return DataFile(path, "text", note)
    number, line = next(_lines(path), (0, b""))
    try:
        return _open_records(path, number, line)
    except (DataError, FormatError) as error:
        if name.endswith(".json") and number:
            raise type(error)(f"{error}; to train on its characters, rename it to .txt") from None
        if must_be_records:
            raise
        reason = str(error).removeprefix(quoted(path)).lstrip(": ")
    note = ""
    if name.endswith(TABLE_NAMES):
        note = f"{quoted(path)} is read as plain text, lines and commas too: {EXPORT} for records"
    elif line.lstrip(BLANKS)[:1] in (b"[", b"{"):
        note = f"{quoted(path)} does not begin with a record and is read as plain text ({reason})"
    return DataFile(path, "text", note)


def read_plain_text(path: PathLike) -> bytes:
    """The bytes of a file that must be a plain text. Errors as from `open_data`."""
    return open_data(path).text()


def _read_head(path: PathLike) -> bytes:
    """The first bytes of a file.

    FormatError if it is not regular, DataError if it is of a known binary format.
    """
    try:
        file = open_regular(path)
    except FormatError as error:
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise FormatError(f"{error} but {kind}: give a file") from None
    with file:
        head = file.read(64)
    for signature, (kind, cure) in SIGNATURES.items():
        if head.startswith(signature):
            raise DataError(f"{quoted(path)} is {kind}, expected text in UTF-8: {cure}")
    return head


def _open_records(path: PathLike, number: int, line: bytes) -> DataFile:
    """A file whose first line that is not blank is `line`. DataError if it has no records."""
    if not number:
        raise DataError(f"{quoted(path)} has no record to train on")
    where = f"{quoted(path)} line {number}"
    is_named = os.fsdecode(path).lower().endswith(LINE_NAMES)
    start = line.lstrip(BLANKS)[:1]
    if start == b"[":
        return _open_array(path)
    if start == b"{" and not is_named and _begins_longer_object(path, line):
        return _open_object(path)
    try:
        _require_record(line, where)
    except FormatError as error:
        if is_named:
            raise FormatError(
                f"{error}; write one record per line, or one array of records"
            ) from None
        raise
    note = "" if is_named else f"{quoted(path)} is read as JSON Lines, one record per line"
    return DataFile(path, "lines", note)


def _begins_longer_object(path: PathLike, line: bytes) -> bool:
    """Whether `line`, the first of a file, is not an object of its own, or the only line and no
    record: then it may have a list of records."""
    try:
        record = parse_record(line, "")
    except (DataError, FormatError):
        return True
    lines = list(islice(_lines(path), 2))
    return find_shape(record) is None and len(lines) == 1


def _require_record(piece: bytes, where: str) -> None:
    """DataError or FormatError unless `piece` is a record of a known shape."""
    record = parse_record(piece, where)
    try:
        require_shape(record)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


# ---- lines ---------------------------------------------------------------------------------------


def _lines(path: PathLike) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not blank, one of them in memory at a time.

    A line that is too long to be a record has one byte more than a record may have.
    """
    with open_regular(path) as raw, io.BufferedReader(raw) as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip(BLANKS):
                yield number, line


# ---- arrays --------------------------------------------------------------------------------------


def _open_array(path: PathLike) -> DataFile:
    """A file that begins with a list, whose first value must be a record."""
    _require_array_in_head(path)
    data = read_text(path)
    note = f"{quoted(path)} is read as a JSON array of records"
    return DataFile(path, "array", note, data, data.index(b"["), len(data))


def _require_array_in_head(path: PathLike) -> None:
    """`_require_array`, from enough of a file to see whether a large one is an array."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(min(2 * MAX_RECORD_BYTES, size))  # which allocates all at once
    _require_array(head, head.index(b"["), len(head), quoted(path))


def _require_array(data: bytes, begin: int, end: int, where: str) -> None:
    """DataError or FormatError unless the list that begins at data[begin] begins with a record."""
    first = next(_array(data, begin, end, where), None)
    if first is None:
        raise DataError(f"{where} has no record to train on")
    place, piece = first
    _require_record(piece, place)


def _is_array(data: bytes, begin: int, end: int) -> bool:
    try:
        _require_array(data, begin, end, "")
    except (DataError, FormatError):
        return False
    return True


def _array(data: bytes, begin: int, end: int, where: str) -> Iterator[tuple[str, bytes]]:
    """(where it is, JSON of one value) of the list in data[begin:end].

    FormatError unless it is a list of objects, one of which is in memory at a time.
    """
    edge = begin + 1
    line = 1 + data.count(b"\n", 0, edge)
    number = 0
    for number, (start, stop) in enumerate(_children(data, begin, where, MAX_RECORD_BYTES), 1):
        line += data.count(b"\n", edge, start)
        place = f"{where} record {number} (line {line})"
        between = data[edge:start].strip(BLANKS)
        if between != (b"," if number > 1 else b""):
            shown = _quoted_bytes(between)
            raise FormatError(f"{place}: expected objects with commas between, found {shown}")
        yield place, data[start:stop]
        line += data.count(b"\n", start, stop)
        edge = stop
    rest = data[edge:end].lstrip(BLANKS)
    if rest.rstrip(BLANKS) != b"]":
        line += data.count(b"\n", edge, end - len(rest))
        wanted = "] and the end" if number else "a list of objects"
        raise FormatError(f"{where} line {line}: expected {wanted}, found {_quoted_bytes(rest)}")


def _quoted_bytes(data: bytes) -> str:
    return quoted(data[:40].decode("utf-8", "replace")) if data else "nothing"


QUOTE = ord('"')
IS_MARK = np.zeros(256, bool)
IS_MARK[list(b'"[]{}')] = True
STEP = np.zeros(256, np.int64)  # what a bracket adds to the depth
STEP[list(b"[{")] = 1
STEP[list(b"]}")] = -1


def _children(
    data: bytes, start: int, where: str, most: int | None = None
) -> Iterator[tuple[int, int]]:
    """(begin, end) of each list and object directly inside the one that begins at data[start].

    Only quotes and brackets are looked at: what they enclose need not be JSON. FormatError where
    the data end before the last bracket; DataError for more than `most` bytes.
    """
    depth = 0
    in_text = False
    begin = start
    at = start
    while at < len(data):
        stop = at + BLOCK
        while data[stop - 1 : stop] == b"\\":  # a block ends with a whole escape
            stop += 1
        # Escapes become spaces: places stay, and the quotes that are left are around texts.
        plain = data[at:stop].replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        codes = np.frombuffer(plain, np.uint8)
        places = np.flatnonzero(IS_MARK[codes])
        marks = codes[places]
        is_inside = (np.cumsum(marks == QUOTE) + in_text) % 2 == 1
        steps = np.where(is_inside, 0, STEP[marks])
        depths = depth + np.cumsum(steps)
        begins = (steps == 1) & (depths == 2)
        ends = (steps == -1) & (depths < 2)
        for edge in np.flatnonzero(begins | ends).tolist():
            place = at + int(places[edge])
            if begins[edge]:
                begin = place
            elif depths[edge] == 0:
                return
            else:
                yield begin, place + 1
        if len(marks):
            depth = int(depths[-1])
            in_text = bool(is_inside[-1])
        at = stop
        if most is not None and depth > 1 and at - begin > most:
            break
    line = 1 + data.count(b"\n", 0, begin)
    if at < len(data):
        raise DataError(f"{where} line {line}: longer than {most:,} bytes, expected one record")
    raise FormatError(
        f"{where} line {line}: what begins here does not end: the file is cut off, or a bracket or "
        "quote is missing"
    )


# ---- objects -------------------------------------------------------------------------------------


def _open_object(path: PathLike) -> DataFile:
    """A file that is one object: a record, or with one list of records.

    What its lists and objects hold is parsed later, record by record.
    """
    where = quoted(path)
    data = read_text(path)
    start = data.index(b"{")
    spans = list(_children(data, start, where))
    fields = parse_record(_outline(data, start, spans), where)
    if find_shape(fields) is not None:
        note = f"{where} is read as one record"
        return DataFile(path, "record", note, data, start, len(data))
    nested = {key: spans[value[0]] for key, value in fields.items() if type(value) is list}
    lists = {key: span for key, span in nested.items() if data[span[0]] == ord("[")}
    if len(lists) > 1:
        lists = {key: span for key, span in lists.items() if _is_array(data, *span)}
    if len(lists) != 1:
        keys = ", ".join(quoted(key, 40) for key in list(lists or fields)[:5]) or "nothing"
        cure = ": give each list a file of its own" if lists else ""
        raise DataError(f"{where}: expected one record, or one list of records; found {keys}{cure}")
    ((key, (begin, end)),) = lists.items()
    _require_array(data, begin, end, where)
    note = f"{where} is read as the records in its list {quoted(key, 40)}"
    return DataFile(path, "array", note, data, begin, end)


def _outline(data: bytes, start: int, spans: list[tuple[int, int]]) -> bytes:
    """The object that begins at data[start], with [i] in place of the i-th of `spans`.

    It has as many line breaks, so that an error in it names the right line.
    """
    pieces = [b"\n" * data.count(b"\n", 0, start)]
    edge = start
    for i, (begin, end) in enumerate(spans):
        pieces += [data[edge:begin], b"[%d]" % i, b"\n" * data.count(b"\n", begin, end)]
        edge = end
    return b"".join([*pieces, data[edge:]])
