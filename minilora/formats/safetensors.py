"""The safetensors format, read strictly and written exactly: arrays by name in one file.

    8 bytes    N, the length of the header, little-endian
    N bytes    JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, padded with spaces
    the rest   the arrays, little-endian, C order, one after another without gap or overlap

A file is accepted only when every byte of it is accounted for, and only if the reference package
accepts it too. Nothing is mapped: an array is read into memory of its own, so a file that shrinks
later causes an error, not a crash.

    SafetensorsFile, load_file          read
    Entry, write_stream, save_file      write
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import FormatError
from ..threads import Workers
from .contents import HEAD_BYTES, SAFETENSORS, describe_content
from .disk import PathLike, atomic_file, open_regular, parse_json, quoted, start_writeback
from .dtypes import FLOATS, NUMPY_FLOATS, bf16_to_float32, too_large

Array = NDArray[Any]

# The bits of a number of each dtype of the format. The order is the reference writer's: wide types
# first, so that arrays are aligned without gaps.
BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16,
    "F16": 16, "U16": 16, "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip

# Those that are read, with NumPy's code. NumPy lacks bfloat16; its bits travel as uint16. A tensor
# of another dtype is checked, listed and copied, but not read.
CODES = {
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4",
    "BF16": "<u2", "F16": "<f2", "U16": "<u2", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
DTYPES = {name: np.dtype(code) for name, code in CODES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

MAX_HEADER_BYTES = 100_000_000  # the reference's limit
MAX_RANK = 64  # NumPy's limit
MAX_METADATA = 10_000  # texts; the metadata that trainers write hold about a hundred

# The densest entry is "":{"dtype":"U8","shape":[],"data_offsets":[0,0]}: its bytes, and its lists,
# objects and texts.
SMALLEST_ENTRY = 49
ENTRY_VALUES = 8

JSON_SPACE = b" \t\n\r"  # may stand before the header's {, as the reference has it


def count_bytes(dtype: str, shape: Iterable[int]) -> int | None:
    """The bytes of an array in a file; None if its numbers do not fill whole bytes."""
    bits = BITS[dtype] * math.prod(shape)
    return None if bits % 8 else bits // 8


# ---- reading -------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A tensor in a file: the format's name of its dtype, its shape, its place after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Tensors:
    """Open files of tensors by name: iterate over the names, and use it in a `with` block."""

    _entries: Mapping[str, Any]

    def keys(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SafetensorsFile(Tensors):
    """An open safetensors file whose whole header has been checked. Use it in a `with` block.

    FormatError when anything in the file breaks the format, OSError when it cannot be read.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        self._where = quoted(self.path)
        self._overridden: dict[str, Array] = {}
        self._file = open_regular(path)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def rename(self, names: Mapping[str, str]) -> None:
        """Call some tensors by other names from now on; each must be new."""
        self._entries = {names.get(name, name): entry for name, entry in self._entries.items()}
        self._overridden = {names.get(key, key): array for key, array in self._overridden.items()}

    def override(self, tensors: Mapping[str, Array]) -> None:
        """Give some tensors, which may be new, these values from now on; the file stays."""
        for name, array in tensors.items():
            code = next(code for code, kind in NUMPY_FLOATS.items() if kind == array.dtype)
            self._entries[name] = _Stored(code, array.shape, 0, 0)
            self._overridden[name] = array

    def hide(self, names: Iterable[str]) -> None:
        """Leave out these tensors from now on, where they exist; the file stays."""
        for name in names:
            self._entries.pop(name, None)

    def _read_header(self) -> None:
        size = self._file.size()
        length = -1
        if size >= 8:
            length = int.from_bytes(self._bytes(0, 8, "the length of the header"), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            head = bytes(self._bytes(0, min(size, HEAD_BYTES), "the header"))
            content = describe_content(head)
            is_other = content not in (None, SAFETENSORS)
            reason = f"it is {content}" if is_other else f"header of {length} bytes"
            raise FormatError(
                f"{self._where} is not a safetensors file: {reason}, in a file of {size} bytes; "
                "only safetensors are read (no .bin, .pt, .pkl or .npz)"
            )
        text = bytes(self._bytes(8, length, "the header"))
        begins = text.lstrip(JSON_SPACE).startswith(b"{")
        if not begins or not text.rstrip(b" ").endswith(b"}"):
            raise FormatError(
                f"{self._where}: the header must begin with {{ and end with }} and spaces"
            )
        values = MAX_METADATA + ENTRY_VALUES * (length // SMALLEST_ENTRY)
        header = parse_json(text, self._where, depth=3, values=values)
        metadata = header.pop("__metadata__", None)
        if metadata is None:  # mlx writes null for none
            metadata = {}
        if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
            raise FormatError(f"{self._where}: __metadata__ must hold strings only")
        self.metadata: dict[str, str] = metadata
        self._start = 8 + length
        self._entries: dict[str, _Stored] = {}
        for name, entry in header.items():
            self._entries[name] = self._check_entry(name, entry)
        self._check_offsets(size - self._start)

    def _check_entry(self, name: str, entry: Any) -> _Stored:
        where = f"{self._where}: tensor {quoted(name)}"
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"{where}: expected exactly dtype, shape and data_offsets")
        dtype = entry["dtype"]
        if type(dtype) is not str or dtype not in BITS:
            raise FormatError(
                f"{where}: unsupported dtype {quoted(dtype, 40)}; supported are {', '.join(BITS)}"
            )
        for field in ("shape", "data_offsets"):
            value = entry[field]
            # `type(x) is int`, because True and 1.0 would compare like numbers.
            if type(value) is not list or any(type(item) is not int or item < 0 for item in value):
                raise FormatError(
                    f"{where}: {field} must be a list of integers >= 0, found {quoted(value)}"
                )
        shape = tuple(entry["shape"])
        offsets = entry["data_offsets"]
        if len(offsets) != 2 or len(shape) > MAX_RANK:
            raise FormatError(f"{where}: expected 2 offsets and at most {MAX_RANK} dimensions")
        # NumPy refuses (0, 2^62, 2^62), so zeros are left out. Eight bytes, because read() may
        # widen to float64.
        if 8 * math.prod(side for side in shape if side) >= 2**63:
            raise FormatError(f"{where}: no array can have the shape {quoted(entry['shape'])}")
        begin, end = offsets
        expected = count_bytes(dtype, shape)
        if expected is None:
            raise FormatError(
                f"{where}: {math.prod(shape)} numbers of {dtype}, each of {BITS[dtype]} bits, do "
                "not fill whole bytes"
            )
        if end - begin != expected:
            raise FormatError(
                f"{where}: shape and dtype take {expected} bytes, the offsets {quoted(offsets, 60)}"
            )
        return _Stored(dtype, shape, begin, end)

    def _check_offsets(self, size: int) -> None:
        """A walk in the order of the offsets excludes holes, overlaps, extra and missing bytes."""
        place = 0
        for begin, end, name in sorted((e.begin, e.end, name) for name, e in self._entries.items()):
            if begin != place:
                raise FormatError(
                    f"{self._where}: tensor {quoted(name)} begins at byte {begin}, expected {place}"
                )
            place = end
        if place != size:
            raise FormatError(
                f"{self._where}: the tensors take {place} bytes, the file holds {size}"
            )

    def _bytes(self, begin: int, count: int, what: str) -> Array:
        """`count` bytes from `begin`, in new memory: uint8 (count,)."""
        data = np.empty(count, np.uint8)
        filled = 0
        self._file.seek(begin)
        while filled < count:  # one read gives 2 GiB at most
            size = self._file.readinto(data.data[filled:])
            if not size:
                raise FormatError(
                    f"{self._where}: the file ends inside {what}; it was cut while being read"
                )
            filled += size
        return data

    def _entry(self, name: str) -> _Stored:
        if name not in self._entries:
            known = ", ".join(quoted(key, 60) for key in self.keys()[:3])
            raise FormatError(
                f"{self._where}: no tensor {quoted(name)} among its {len(self._entries)} "
                f"({known}, ...)"
            )
        return self._entries[name]

    def dtype(self, name: str) -> str:
        """The dtype under the format's own name, such as "BF16"."""
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read_bytes(self, name: str) -> Array:
        """The bytes of one tensor of any dtype: uint8 (bytes,)."""
        entry = self._entry(name)
        what = f"tensor {quoted(name)}"
        return self._bytes(self._start + entry.begin, entry.end - entry.begin, what)

    def read_bits(self, name: str) -> Array:
        """One tensor as it is stored; BF16 comes as uint16.

        It has memory of its own: aligned, C-contiguous, writable. FormatError for a dtype that
        NumPy has no array for (`read_bytes` has its bytes).
        """
        entry = self._entry(name)
        if name in self._overridden:
            return np.array(self._overridden[name], order="C")
        what = f"tensor {quoted(name)}"
        if entry.dtype not in DTYPES:
            raise FormatError(
                f"{self._where}: {what} of shape {entry.shape} is {entry.dtype}, which is listed "
                f"but not read; read are {', '.join(DTYPES)}: save it again as one of these"
            )
        data = self.read_bytes(name)
        if entry.dtype == "BOOL" and data.size and data.max() > 1:
            raise FormatError(f"{self._where}: {what}: a BOOL byte is neither 0 nor 1")
        stored = data.view(DTYPES[entry.dtype]).reshape(entry.shape)
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)

    def read_rows(self, name: str, rows: slice) -> Array:
        """Some rows of a tensor of one or more dimensions, as `read_bits` gives them."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            return self.read_bits(name)[rows]  # raises
        start, stop, _ = rows.indices(entry.shape[0])
        shape = (max(0, stop - start), *entry.shape[1:])
        kind = DTYPES[entry.dtype]
        size = kind.itemsize * math.prod(entry.shape[1:])
        begin = self._start + entry.begin + start * size
        data = self._bytes(begin, shape[0] * size, f"tensor {quoted(name)}")
        return data.view(kind).reshape(shape).astype(kind.newbyteorder("="), copy=False)

    def read(self, name: str, dtype: DTypeLike | None = None) -> Array:
        """One tensor as `read_bits` gives it, BF16 widened to float32, in `dtype` if given.

        NonFiniteError for a finite number that `dtype` cannot hold.
        """
        array = self.read_bits(name)
        if self.dtype(name) == "BF16":
            array = bf16_to_float32(array)
        if dtype is None:
            return array
        # A signalling NaN becomes a quiet one, which is not an error here.
        try:
            with np.errstate(invalid="ignore", over="raise"):
                return array.astype(dtype, copy=False)
        except FloatingPointError:
            code = next(code for code, kind in NUMPY_FLOATS.items() if kind == np.dtype(dtype))
            raise too_large(quoted(name), self._where, code) from None

    def require_floats(self, names: Iterable[str]) -> None:
        """FormatError for the first of these tensors that does not hold floats."""
        for name in names:
            if self.dtype(name) not in FLOATS:
                raise FormatError(
                    f"{self._where}: tensor {quoted(name)} is {self.dtype(name)}, expected "
                    f"{', '.join(FLOATS)}: a weight must be stored as floats; save it again so"
                )

    def close(self) -> None:
        self._file.close()


def load_file(path: PathLike) -> dict[str, Array]:
    """Every tensor of a file, by name. BF16 comes as float32; see `SafetensorsFile.read`."""
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file}


# ---- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what its header entry says, and `read`, which makes the array.

    `dtype` is the format's name; a "BF16" entry makes uint16 bits, and one of a dtype that is not
    read makes its bytes, uint8 (bytes,).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


def write_stream(
    path: PathLike, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the entries, with one array in memory and the next in the making.

    The bytes depend on names and values alone. `metadata` is {"format": "pt"} unless given:
    transformers refuses a file without it. The file is atomic: if a `read` raises, or makes an
    array of another dtype or shape (FormatError), the old file stays.
    """
    where = quoted(path)
    entries = list(entries)
    for entry in entries:
        if not isinstance(entry.name, str):
            raise FormatError(f"{where}: tensor name {quoted(entry.name)} must be a str")
        if entry.dtype not in BITS or count_bytes(entry.dtype, entry.shape) is None:
            raise FormatError(
                f"{where}: tensor {quoted(entry.name)}: unsupported dtype {quoted(entry.dtype)} "
                f"of shape {entry.shape}"
            )
    order = list(BITS)
    entries.sort(key=lambda entry: (order.index(entry.dtype), entry.name))
    header = _header(where, entries, {"format": "pt"} if metadata is None else metadata)
    with Workers(1) as workers, atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        arrays = workers.map(lambda entry: entry.read(), entries, ahead=1)
        with closing(arrays):  # no `read` goes on when this has failed
            for entry, array in zip(entries, arrays, strict=True):
                expected, shape = _array_of(entry)
                if array.dtype.newbyteorder("<") != expected or array.shape != shape:
                    raise FormatError(
                        f"{where}: tensor {quoted(entry.name)} was announced as {expected} "
                        f"{shape}, but came as {array.dtype} {array.shape}"
                    )
                # In memory a bool may be any byte, in a file it is 0 or 1.
                if entry.dtype == "BOOL":
                    array = array.view(np.uint8) != 0
                file.write(np.ascontiguousarray(array, expected).reshape(-1).view(np.uint8).data)
                start_writeback(file)


def _array_of(entry: Entry) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """(dtype, shape) of the array that an entry makes."""
    if entry.dtype in DTYPES:
        return DTYPES[entry.dtype], entry.shape
    return np.dtype(np.uint8), (_count(entry),)


def _count(entry: Entry) -> int:
    size = count_bytes(entry.dtype, entry.shape)
    assert size is not None  # write_stream has checked
    return size


def _header(where: str, entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these entries in this order, padded to a multiple of 8 bytes."""
    if any(not isinstance(text, str) for pair in metadata.items() for text in pair):
        raise FormatError(f"{where}: metadata must hold strings only")
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for entry in entries:
        if entry.name in header or entry.name == "__metadata__":
            raise FormatError(f"{where}: tensor name {quoted(entry.name)} is taken")
        end = begin + _count(entry)
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeError as error:
        raise FormatError(f"{where}: a name is not valid Unicode: {error}") from None
    return text + b" " * (-len(text) % 8)


def save_file(
    path: PathLike, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of any layout and byte order; see `write_stream`.

    FormatError for a dtype that the format lacks.
    """
    write_stream(path, [array_entry(name, array) for name, array in tensors.items()], metadata)


def array_entry(name: str, array: Array) -> Entry:
    """The entry of an array of any layout and byte order.

    FormatError for a dtype that the format lacks.
    """
    kind: object = type(array).__name__
    dtype = None
    if isinstance(array, (np.ndarray, np.generic)):
        kind = array.dtype
        dtype = NAMES.get(array.dtype.newbyteorder("<"))
    if dtype is None:
        supported = ", ".join(DTYPES)
        raise FormatError(
            f"tensor {quoted(name)}: safetensors has no {kind}, only arrays of {supported}"
        )
    return Entry(name, dtype, array.shape, partial(np.asarray, array))
