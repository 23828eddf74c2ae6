"""The disk: a file appears whole or not at all, and JSON is read as strictly as it is written.

This file knows bytes, files and JSON. The other files of the folder know what they mean.

    atomic_file     write beside the old file, then put the new one in its place in one step
    start_writeback, sync_folder    have the disk begin early; force a folder's names to the disk
    open_regular    open for reading; a folder, a pipe or a device is refused, never waited for
    parse_json      strict JSON from bytes
    read_json, write_json, json_after    the same, from and to a file
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import accumulate
from typing import Any, BinaryIO

from ..errors import ConfigError, FormatError
from .contents import describe_content

PathLike = str | os.PathLike[str]
JsonObject = dict[str, Any]

MAX_JSON_BYTES = 1 << 20  # configs of language models and adapters in use are far smaller
MAX_JSON_VALUES = 4 << 20  # twice the lists, objects and texts of the largest tokenizer in use
MAX_DEPTH = 64  # real configs stay below 10; Python's own limit would end in a RecursionError
MAX_INTEGER_DIGITS = (
    20  # 2^64 has 20; Python takes quadratic time over longer ones, or refuses them
)

BINARY = getattr(os, "O_BINARY", 0)

# The temporary files that this process is writing. In a container, the process before may have had
# the same number.
_being_written: set[str] = set()


def quoted(text: object, limit: int = 120) -> str:
    """`text` for an error message: control characters escaped, a long middle left out."""
    whole = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    half = limit // 2
    if len(whole) > limit:
        whole = whole[:half] + whole[-half:]
    shown = repr(whole)
    if len(shown) <= limit:
        return shown
    return f"{shown[:half]}...{shown[3 - half :]}"


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def name_errors(path: PathLike, *hidden: str) -> Iterator[None]:
    """Let an OSError in the block name `path` if it names no file, or only one that is `hidden`.

    A full disk, or one that fails while it is read, does not say by itself which file that was.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.filename in hidden:
            error.filename = os.fspath(path)
            error.filename2 = None
        raise


class RegularFile(FileIO):
    """An unbuffered file to read whose errors name it."""

    def __init__(self, descriptor: int, path: PathLike) -> None:
        super().__init__(descriptor, "rb")
        self.path = path

    def read(self, size: int | None = -1, /) -> bytes:
        with name_errors(self.path):
            return super().read(size)

    def readall(self) -> bytes:
        with name_errors(self.path):
            return super().readall()

    def readinto(self, buffer: Any, /) -> int:
        with name_errors(self.path):
            return super().readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        with name_errors(self.path):
            return super().seek(offset, whence)

    def size(self) -> int:
        with name_errors(self.path):
            return os.fstat(self.fileno()).st_size


@contextmanager
def atomic_file(path: PathLike) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `path` when the block ends well; else the old one stays.

    The bytes go to a temporary file in the same folder, are forced to the disk, and are renamed
    over `path`, which a file system does in one step. A crash at any moment leaves the old file or
    the new one; the temporary file that a killed process leaves is removed by the next writer. A
    symbolic link stays a link (its target is replaced), and an existing file keeps its mode.
    OSError when the disk refuses.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    mode = None
    with suppress(FileNotFoundError), name_errors(path, target):
        mode = os.stat(target).st_mode
    # Renaming over /dev/null would destroy the device.
    if mode is not None and not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "exists and is not a regular file", os.fspath(path))
    stem = f".{name[:40]}.tmp-"
    _remove_stale(folder, stem)
    temporary = os.path.join(folder, f"{stem}{os.getpid()}-{os.urandom(4).hex()}")
    _being_written.add(temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY
    try:
        with name_errors(path, temporary):
            # The kernel cuts mode 0666 by the umask; to read the umask in Python would race with
            # other threads.
            descriptor = os.open(temporary, flags, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                if mode is not None:
                    os.chmod(temporary, stat.S_IMODE(mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(folder)
    except BaseException:  # KeyboardInterrupt too: nothing half-written may stay behind
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        _being_written.discard(temporary)


def start_writeback(file: BinaryIO) -> None:
    """Have the disk begin with what was written so far, so that the wait at the end is short.

    Only Linux is asked; other systems begin when they like.
    """
    if sys.platform == "linux":
        file.flush()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remove_stale(folder: str, stem: str) -> None:
    """Remove `atomic_file`'s temporary files of this stem whose process has ended."""
    with suppress(OSError):  # a folder that may not be listed can still be written to
        for name in os.listdir(folder):
            number, _, rest = name.removeprefix(stem).partition("-")
            # Exactly the names that atomic_file makes: any other is somebody else's file.
            is_random = len(rest) == 8 and set(rest) <= set("0123456789abcdef")
            if name.startswith(stem) and number.isdecimal() and is_random:
                path = os.path.join(folder, name)
                is_file = stat.S_ISREG(os.lstat(path).st_mode)
                if is_file and path not in _being_written and not _is_another(int(number)):
                    os.unlink(path)


def _is_another(number: int) -> bool:
    """Whether a process of this number runs, other than this one."""
    if number == os.getpid():
        return False
    if os.name == "nt":  # where os.kill(number, 0) is not a question but a Ctrl-C
        return True
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def sync_folder(folder: PathLike) -> None:
    """Force a folder's names to the disk: until then a power cut may undo a rename in it."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder, and need not
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with name_errors(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: PathLike) -> RegularFile:
    """A regular file, opened for unbuffered reading. FormatError for anything else.

    OSError when it cannot be opened.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | BINARY | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        if os.path.islink(path):
            error.strerror = f"a symbolic link to {quoted(os.readlink(path))}, which is missing"
        raise
    try:
        with name_errors(path):
            is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not is_regular:
            raise FormatError(f"{quoted(path)} is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return RegularFile(descriptor, path)


def require_folder(path: PathLike, what: str) -> None:
    """FileNotFoundError or NotADirectoryError unless `path` is a folder."""
    name = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(
            errno.ENOENT, f"no such {what} folder (nothing is downloaded)", name
        )
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, f"the {what} must be a folder", name)


# ---- JSON ----------------------------------------------------------------------------------------


def parse_json(
    data: bytes, where: str, depth: int = MAX_DEPTH, values: int = MAX_JSON_VALUES
) -> JsonObject:
    """The JSON object in `data`, or a FormatError that begins with `where`.

    Stricter than Python's parser, which takes NaN, repeated keys, 1e400, half of a surrogate pair
    and integers of any length. `depth` and `values` bound the nesting and the number of lists,
    objects and texts before anything is built: one byte of JSON can take thirty in memory.
    """
    _check_bounds(data, where, depth, values)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=_refuse,
        )
        # Only what can be written again was JSON: this refuses 1e400 and half of a surrogate pair.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except ValueError as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    if type(value) is not dict:
        raise FormatError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_bounds(data: bytes, where: str, depth: int, values: int) -> None:
    # What is outside texts: drop escaped backslashes, then escaped quotes; then every second piece
    # is outside.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    texts = plain.count(b'"') // 2
    outside = b""
    if texts <= values:
        outside = b"".join(plain.split(b'"')[::2])
    brackets = outside.translate(None, delete=bytes(set(range(256)) - set(b"{}[]")))
    depths = accumulate(1 if byte in b"{[" else -1 for byte in brackets)
    if max(depths, default=0) > depth:
        raise FormatError(f"{where}: JSON nested deeper than {depth}")
    if texts + len(brackets) // 2 > values:
        raise FormatError(f"{where}: JSON of more than {values} lists, objects and texts")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON: write null where no number is known")


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS or digits == "-0":
        raise ValueError(f"{digits[:30]} is not an integer that can be meant")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{quoted(counts.most_common(1)[0][0])} appears twice")
    return result


def read_json(path: PathLike, limit: int = MAX_JSON_BYTES) -> JsonObject:
    """The JSON object in a file of at most `limit` bytes.

    FormatError names the file; OSError if it cannot be read.
    """
    with open_regular(path) as file:
        size = file.size()
        if size > limit:
            raise FormatError(f"{quoted(path)}: {size} bytes of JSON, expected at most {limit}")
        data = file.read()
    try:
        return parse_json(data, quoted(path))
    except FormatError:
        content = describe_content(data)
        if content is None:
            raise
        raise FormatError(f"{quoted(path)}: not valid JSON: it is {content}") from None


def write_json(path: PathLike, value: JsonObject) -> None:
    """Write `value` as JSON, atomically, its keys sorted. ConfigError if `read_json` refused it."""
    with json_after(path, value):
        pass


@contextmanager
def json_after(path: PathLike, value: JsonObject) -> Iterator[None]:
    """`write_json`, whose file becomes real after the block, so that two files change together.

    Objects inside keep their order, which can matter: in a rank_pattern the first match counts.
    """
    try:
        text = json.dumps(dict(sorted(value.items())), indent=2, allow_nan=False) + "\n"
        parse_json(text.encode(), "read back")
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{quoted(path)}: cannot be written as JSON: {error}") from None
    with atomic_file(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())  # its space on the disk is taken before the block begins
        yield
