"""The safetensors format, read strictly and written exactly. This room knows arrays and bytes, no model.

    8 bytes           N, the length of the header, little-endian
    N bytes           JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, padded with spaces at its end
    all the rest      the arrays, little-endian, C order, one after another without gap or overlap

A file is accepted only when every byte of it is accounted for, and only if the reference package accepts it too.
Nothing is mapped: an array is read into memory of its own, so a file that shrinks later is an error, not a crash.

    dtypes: the table, and bfloat16      SafetensorsFile, load_file      Entry, write_stream, save_file
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import FormatError
from ..threads import Workers
from .disk import (
    PathLike,
    atomic_file,
    open_regular,
    parse_json,
    quoted,
    start_writeback,
)
from .dtypes import bf16_to_float32

Array = NDArray[Any]

# The order is the reference writer's: wide types first, so that every array is aligned without gaps.
# NumPy has no bfloat16; its bits travel as uint16.
DTYPES = {
    name: np.dtype(code)
    for name, code in {
        "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4", "BF16": "<u2",
        "F16": "<f2", "U16": "<u2", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

MAX_HEADER_BYTES = 100_000_000  # the reference's limit
MAX_RANK = 64  # NumPy's limit
SMALLEST_ENTRY, ENTRY_VALUES = (
    49,
    8,
)  # bytes, and lists, objects and texts, of the entry that is the densest there is:
# "":{"dtype":"U8","shape":[],"data_offsets":[0,0]}
MAX_METADATA = 10_000  # texts; the metadata that trainers write hold some hundred


# ---- bfloat16: the upper half of a float32 ----


# ---- reading ----


class SafetensorsFile:
    """An open safetensors file whose whole header has been checked. Use it in a `with` block.

    FormatError when anything in the file is not as the format demands, OSError when it cannot be read.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        self._where = quoted(self.path)
        self._file = open_regular(path)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = (
            int.from_bytes(self._bytes(0, 8, "the length of the header"), "little")
            if size >= 8
            else -1
        )
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(
                f"{self._where} is not a safetensors file: header of {length} bytes in a file of {size}; "
                "only safetensors are read (no .bin, .pt, .pkl or .npz)"
            )
        text = bytes(self._bytes(8, length, "the header"))
        if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
            raise FormatError(
                f"{self._where}: the header must begin with {{ and end with }} and spaces"
            )
        values = MAX_METADATA + ENTRY_VALUES * (length // SMALLEST_ENTRY)
        header = parse_json(text, self._where, depth=3, values=values)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # null is what mlx writes for none
        if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
            raise FormatError(f"{self._where}: __metadata__ must hold strings only")
        self.metadata: dict[str, str] = metadata
        self._start = 8 + length
        self._entries = {name: self._check_entry(name, entry) for name, entry in header.items()}

        # One walk in the order of the offsets excludes every hole, every overlap and every byte too many or too few.
        end = 0
        for (begin, stop), name in sorted(
            (entry[2], name) for name, entry in self._entries.items()
        ):
            if begin != end:
                raise FormatError(
                    f"{self._where}: tensor {quoted(name)} begins at byte {begin}, expected {end}"
                )
            end = stop
        if end != size - self._start:
            raise FormatError(
                f"{self._where}: the tensors take {end} bytes, the file holds {size - self._start}"
            )

    def _check_entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        where = f"{self._where}: tensor {quoted(name)}"
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"{where}: expected exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(dtype) is not str or dtype not in DTYPES:
            raise FormatError(
                f"{where}: unsupported dtype {quoted(dtype, 40)}; supported are {', '.join(DTYPES)}"
            )
        for field, value in ("shape", shape), ("data_offsets", offsets):
            # `type(x) is int`, because True and 1.0 would compare like numbers.
            if type(value) is not list or any(type(item) is not int or item < 0 for item in value):
                raise FormatError(
                    f"{where}: {field} must be a list of integers >= 0, found {quoted(value)}"
                )
        if len(offsets) != 2 or len(shape) > MAX_RANK:
            raise FormatError(f"{where}: expected 2 offsets and at most {MAX_RANK} dimensions")
        # NumPy refuses (0, 2^62, 2^62), so zeros are left out. Eight bytes, because read() may widen to float64.
        if 8 * math.prod(side for side in shape if side) >= 2**63:
            raise FormatError(f"{where}: no array can have the shape {quoted(shape)}")
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != expected:
            raise FormatError(
                f"{where}: shape and dtype take {expected} bytes, the offsets {quoted(offsets, 60)}"
            )
        return dtype, tuple(shape), (offsets[0], offsets[1])

    def _bytes(self, begin: int, count: int, what: str) -> Array:
        """`count` bytes from `begin`, in new memory: uint8 (count,)."""
        data = np.empty(count, np.uint8)
        filled = 0
        self._file.seek(begin)
        while filled < count:  # one read gives 2 GiB at most
            got = self._file.readinto(data.data[filled:])
            if not got:
                raise FormatError(
                    f"{self._where}: the file ends inside {what}; it was cut while being read"
                )
            filled += got
        return data

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        if name not in self._entries:
            known = ", ".join(quoted(key, 60) for key in list(self._entries)[:3])
            raise FormatError(
                f"{self._where}: no tensor {quoted(name)} among its {len(self._entries)} ({known}, ...)"
            )
        return self._entries[name]

    def keys(self) -> list[str]:
        """The names of all tensors, in the header's order."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def dtype(self, name: str) -> str:
        """The dtype under the format's own name, such as "BF16"."""
        return self._entry(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def read_bits(self, name: str) -> Array:
        """One tensor as it is stored, in memory of its own: aligned, C-contiguous, writable. BF16 comes as uint16."""
        dtype, shape, (begin, end) = self._entry(name)
        data = self._bytes(self._start + begin, end - begin, f"tensor {quoted(name)}")
        if dtype == "BOOL" and data.size and data.max() > 1:
            raise FormatError(
                f"{self._where}: tensor {quoted(name)}: a BOOL byte is neither 0 nor 1"
            )
        stored = data.view(DTYPES[dtype]).reshape(shape)
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)

    def read(self, name: str, dtype: DTypeLike | None = None) -> Array:
        """One tensor as `read_bits` gives it, with BF16 widened exactly to float32, then converted to `dtype`."""
        array = self.read_bits(name)
        if self.dtype(name) == "BF16":
            array = bf16_to_float32(array)
        with np.errstate(
            invalid="ignore"
        ):  # a signalling NaN becomes a quiet one, which is no news
            return array if dtype is None else array.astype(dtype, copy=False)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load_file(path: PathLike) -> dict[str, Array]:
    """Every tensor of a file, by name. BF16 comes as float32; see `SafetensorsFile.read`."""
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.keys()}


# ---- writing ----


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its header entry, known now, and `read`, which makes the array when its turn comes.

    `dtype` is the format's name; a "BF16" entry makes uint16 bits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


def write_stream(
    path: PathLike, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the entries, one array in memory and the next in the making. The bytes depend on names and values alone.

    `metadata` is {"format": "pt"} unless given: transformers refuses a file without it. The file is atomic: if a
    `read` raises, or makes an array of another dtype or shape (FormatError), the old file stays.
    """
    metadata = {"format": "pt"} if metadata is None else dict(sorted(metadata.items()))
    if any(not isinstance(text, str) for text in (*metadata, *metadata.values())):
        raise FormatError(f"{quoted(path)}: metadata must hold strings only")
    entries = list(entries)
    for entry in entries:
        if not isinstance(entry.name, str):
            raise FormatError(f"{quoted(path)}: tensor name {quoted(entry.name)} must be a str")
        if entry.dtype not in DTYPES:
            raise FormatError(
                f"{quoted(path)}: tensor {quoted(entry.name)}: unsupported dtype {quoted(entry.dtype)}"
            )
    place = {dtype: index for index, dtype in enumerate(DTYPES)}
    entries.sort(key=lambda entry: (place[entry.dtype], entry.name))

    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for entry in entries:
        if entry.name in header or entry.name == "__metadata__":
            raise FormatError(f"{quoted(path)}: tensor name {quoted(entry.name)} is taken")
        end = begin + math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeError as error:
        raise FormatError(
            f"{quoted(path)}: a name is not valid Unicode: {str(error)[:200]}"
        ) from None
    text += b" " * (-len(text) % 8)
    with Workers(1) as workers, atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        arrays = workers.map(lambda entry: entry.read(), entries, ahead=1)
        with closing(arrays):  # no `read` goes on when this has failed
            for entry, array in zip(entries, arrays, strict=True):
                expected = DTYPES[entry.dtype]
                if array.dtype.newbyteorder("<") != expected or array.shape != entry.shape:
                    raise FormatError(
                        f"{quoted(path)}: tensor {quoted(entry.name)} was announced as {expected} {entry.shape}, "
                        f"but came as {array.dtype} {array.shape}"
                    )
                if entry.dtype == "BOOL":
                    array = (
                        array.view(np.uint8) != 0
                    )  # in memory a bool may be any byte, in a file it is 0 or 1
                file.write(np.ascontiguousarray(array, expected).reshape(-1).view(np.uint8).data)
                start_writeback(file)


def save_file(
    path: PathLike, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of any layout and byte order; see `write_stream`. FormatError for a dtype that the format lacks."""
    write_stream(path, [array_entry(name, array) for name, array in tensors.items()], metadata)


def array_entry(name: str, array: Array) -> Entry:
    """The entry of an array of any layout and byte order. FormatError for a dtype that the format lacks."""
    is_array = isinstance(array, (np.ndarray, np.generic))
    if not is_array or array.dtype.newbyteorder("<") not in NAMES:
        kind = array.dtype if is_array else type(array).__name__
        raise FormatError(
            f"tensor {quoted(name)}: safetensors has no {kind}, only arrays of {', '.join(DTYPES)}"
        )
    return Entry(
        name, NAMES[array.dtype.newbyteorder("<")], array.shape, partial(np.asarray, array)
    )
