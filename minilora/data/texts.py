"""Texts: a file's bytes, those that come with Python for the demo and the examples, and what of a text is held out."""

from __future__ import annotations

import json
import math
import os
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError, FormatError
from ..formats.disk import PathLike, open_regular, quoted

Documents = list[tuple[str, bytes]]  # (name, text)


def read_text(path: PathLike) -> bytes:
    """The bytes of a text file. DataError if it is empty, not a regular file or too large, OSError if it fails."""
    try:
        with open_regular(path) as file:
            text = file.read()
    except FormatError as error:
        raise DataError(str(error)) from None
    except MemoryError:
        size = os.path.getsize(path)
        raise DataError(
            f"{quoted(path)} has {size:,} bytes, more than there is memory: cut a part out of it"
        ) from None
    if not text:
        raise DataError(f"{quoted(path)} is empty: there is nothing to train on")
    return text


def prose() -> Documents:
    """Python's language reference, (topic, text) by name: half a megabyte of English that comes with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python comes without pydoc_data, the demo's prose: give --pretrain-data FILE"
        ) from None
    return [(name, text.encode()) for name, text in sorted(topics.items())]


def python_sources(limit: int = 3_000_000) -> Documents:
    """The standard library's own sources, (path, text) by path, up to `limit` bytes, without tests and tables of data.

    Files are taken in the order of a checksum of their path: a fair sample, much the same on every version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib2to3",
        "encodings",
        "pydoc_data",
    }
    paths: list[str] = []
    for folder, folders, names in os.walk(root):
        # config-3.x-... and _sysconfigdata... hold one machine's settings.
        folders[:] = [
            name
            for name in folders
            if name not in skipped and not name.startswith(("config-", "__"))
        ]
        sources = [
            name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
        paths += [Path(folder, name).relative_to(root).as_posix() for name in sources]
    found: Documents = []
    for path in sorted(paths, key=lambda path: (zlib.crc32(os.fsencode(path)), path)):
        text = (root / path).read_bytes()
        if 0 < len(text) <= limit and text.decode("utf-8", "ignore").encode() == text:
            found.append((path, text))
            limit -= len(text)
    if found:
        return sorted(found)
    raise DataError(f"this Python comes without its sources in {quoted(root)}: give --data FILE")


def four_tasks(limit: int = 400_000) -> dict[str, Documents]:
    """Four kinds of text that every Python with NumPy carries, up to `limit` bytes each, by name.

    python   sources of the standard library          c       NumPy's headers
    charmap  the tables of Python's text encodings    json    the Unicode database, an object a character
    """
    headers = sorted(Path(np.get_include()).rglob("*.h"))
    tables = sorted((Path(sysconfig.get_paths()["stdlib"]) / "encodings").glob("*.py"))
    found = {
        "python": python_sources(limit),
        "c": _files(headers, limit),
        "charmap": _files(tables, limit),
    }
    found["json"] = [(f"plane {at:x}", text) for at, text in _unicode(limit)]
    for task, documents in found.items():
        if not documents:
            raise DataError(
                f"this Python comes without the texts of task {task!r}: give files of your own"
            )
    return found


def _files(paths: Iterable[Path], limit: int) -> Documents:
    """(name, text) of files in turn, as long as they fit."""
    found: Documents = []
    for path in paths:
        text = path.read_bytes()
        if 0 < len(text) <= limit:
            found.append((path.name, text))
            limit -= len(text)
    return found


def _unicode(limit: int) -> Iterator[tuple[int, bytes]]:
    """Blocks of 256 characters, a line of JSON for each that has a name."""
    for block in range(0, 0x3000, 256):
        characters = [chr(c) for c in range(block, block + 256) if unicodedata.name(chr(c), "")]
        rows = [
            {
                "code": f"U+{ord(c):04X}",
                "name": unicodedata.name(c),
                "category": unicodedata.category(c),
                "char": c,
            }
            for c in characters
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if 0 < len(text) <= limit:
            limit -= len(text)
            yield block, text


def _share(size: int, fraction: float) -> float:
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction must lie between 0 and 1, got {fraction!r}")
    return size * fraction


def split(documents: Documents, fraction: float = 0.1, seed: int = 0) -> tuple[bytes, bytes]:
    """(train, held_out): `fraction` of the bytes is held out, in whole documents drawn by `seed`, at least one.

    Never a part of one: who has seen half a file guesses the other half too well. Documents keep their order, with a
    newline between them. DataError for fewer than two that are not empty.
    """
    texts = [text for _, text in documents if text]
    if len(texts) < 2:
        raise DataError(
            f"expected 2 documents or more, one to train on and one to hold out, got {len(texts)}"
        )
    room, held = _share(sum(map(len, texts)), fraction), set()
    for i in np.random.default_rng(seed).permutation(len(texts)).tolist():
        if len(texts[i]) <= room:
            held.add(i)
            room -= len(texts[i])
    held = held or {min(range(len(texts)), key=lambda i: len(texts[i]))}
    train, held_out = (
        b"\n".join(t for i, t in enumerate(texts) if (i in held) == side) for side in (False, True)
    )
    return train, held_out


def split_text(text: bytes, fraction: float = 0.1) -> tuple[bytes, bytes]:
    """(train, held_out): the last `fraction` of one text is held out. DataError where a side would be empty."""
    cut = len(text) - math.ceil(_share(len(text), fraction))
    for _ in range(3):  # never inside a character, which in UTF-8 has at most 4 bytes
        cut -= cut > 0 and text[cut] & 0xC0 == 0x80
    if not 0 < cut < len(text):
        raise DataError(f"a text of {len(text)} bytes is too short to hold out {fraction:g} of it")
    return text[:cut], text[cut:]
