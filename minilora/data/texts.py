"""Texts: a file's bytes, the texts that come with Python, and what of a text is held out."""

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
from ..formats.disk import PathLike, name_errors, open_regular, quoted

Document = tuple[str, bytes]  # (name, text)
Documents = list[Document]

# Folders of the standard library that hold tests, packages of others, or tables of data.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
SKIPPED |= {"encodings", "pydoc_data"}

# ---- texts ---------------------------------------------------------------------------------------


def read_text(path: PathLike, use: str = "train on") -> bytes:
    """The bytes of a text file.

    use   what the text is for, as an error says it

    DataError if it is empty, too large or not a regular file, OSError if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            text = file.read()
    except FormatError as error:
        raise DataError(str(error)) from None
    except MemoryError:
        size = os.path.getsize(path)
        raise DataError(
            f"{quoted(path)} has {size:,} bytes, more than the memory takes: cut a part out of it"
        ) from None
    if not text:
        raise DataError(f"{quoted(path)} is empty: give a text to {use}")
    return text


def prose() -> Documents:
    """Python's language reference by topic: half a megabyte of English that comes with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python comes without pydoc_data, the demo's prose: give --pretrain-data FILE"
        ) from None
    return [(topic, text.encode()) for topic, text in sorted(topics.items())]


def python_sources(limit: int = 3_000_000) -> Documents:
    """The standard library's own sources by path, up to `limit` bytes, without tests and tables.

    Files are taken in the order of a checksum of their path: a fair sample, much the same on every
    version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, names in os.walk(root):
        # config-3.x-... and _sysconfigdata... hold one machine's settings.
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED and not name.startswith(("config-", "__"))
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                paths.append(Path(folder, name).relative_to(root).as_posix())
    paths.sort(key=lambda path: (zlib.crc32(os.fsencode(path)), path))
    sources = []
    for path in paths:
        with name_errors(root / path):
            text = (root / path).read_bytes()
        if 0 < len(text) <= limit and text.decode("utf-8", "ignore").encode() == text:
            sources.append((path, text))
            limit -= len(text)
    if not sources:
        raise DataError(
            f"this Python comes without its sources in {quoted(root)}: give --data FILE"
        )
    return sorted(sources)


def four_tasks(limit: int = 400_000) -> dict[str, Documents]:
    """Four kinds of text that every Python with NumPy has, up to `limit` bytes each, by name.

    python   sources of the standard library          c       NumPy's headers
    charmap  the tables of Python's text encodings    json    Unicode's characters, one object each
    """
    headers = Path(np.get_include()).rglob("*.h")
    tables = Path(sysconfig.get_paths()["stdlib"], "encodings").glob("*.py")
    tasks = {
        "python": python_sources(limit),
        "c": _that_fit(map(_read, sorted(headers)), limit),
        "charmap": _that_fit(map(_read, sorted(tables)), limit),
        "json": _that_fit(_unicode(), limit),
    }
    for task, documents in tasks.items():
        if not documents:
            raise DataError(
                f"this Python comes without the texts of task {task!r}: give files of your own"
            )
    return tasks


def _read(path: Path) -> Document:
    with name_errors(path):
        return path.name, path.read_bytes()


def _unicode() -> Iterator[Document]:
    """Blocks of 256 characters, with one line of JSON for each that has a name."""
    for block in range(0, 0x3000, 256):
        lines = []
        for code in range(block, block + 256):
            name = unicodedata.name(chr(code), "")
            category = unicodedata.category(chr(code))
            row = {"code": f"U+{code:04X}", "name": name, "category": category, "char": chr(code)}
            if name:
                lines.append(json.dumps(row) + "\n")
        yield f"plane {block:x}", "".join(lines).encode()


def _that_fit(documents: Iterable[Document], limit: int) -> Documents:
    """The documents that are not empty, in turn, as long as they fit into `limit` bytes."""
    taken = []
    for name, text in documents:
        if 0 < len(text) <= limit:
            taken.append((name, text))
            limit -= len(text)
    return taken


# ---- what is held out ----------------------------------------------------------------------------


def held_out_size(size: int, fraction: float) -> float:
    """`fraction` of `size`. ConfigError unless it is between 0 and 1."""
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction must lie between 0 and 1, got {fraction!r}")
    return size * fraction


def split(documents: Documents, fraction: float = 0.1, seed: int = 0) -> tuple[bytes, bytes]:
    """(train, held_out): the texts of `split_documents`, with a newline between documents."""
    train, held_out = split_documents(documents, fraction, seed)
    return join(train), join(held_out)


def join(documents: Documents) -> bytes:
    """The texts of the documents with a newline between them."""
    return b"\n".join(text for _, text in documents)


def split_documents(
    documents: Documents, fraction: float = 0.1, seed: int = 0
) -> tuple[Documents, Documents]:
    """(train, held_out): `fraction` of the bytes in whole documents drawn by `seed`, at least one.

    Never a part of one: who has seen half a file guesses the other half too well. Documents keep
    their order; empty ones are left out. DataError for fewer than two that are not empty.
    """
    documents = [(name, text) for name, text in documents if text]
    texts = [text for _, text in documents]
    if len(texts) < 2:
        raise DataError(
            f"expected 2 documents or more, one to train on and one to hold out, got {len(texts)}"
        )
    space = held_out_size(sum(map(len, texts)), fraction)
    chosen = set()
    for i in np.random.default_rng(seed).permutation(len(texts)).tolist():
        if len(texts[i]) <= space:
            chosen.add(i)
            space -= len(texts[i])
    if not chosen:
        chosen.add(min(range(len(texts)), key=lambda i: len(texts[i])))
    train = [document for i, document in enumerate(documents) if i not in chosen]
    held_out = [document for i, document in enumerate(documents) if i in chosen]
    return train, held_out


def split_text(text: bytes, fraction: float = 0.1) -> tuple[bytes, bytes]:
    """(train, held_out): the last `fraction` of one text. DataError where a side would be empty."""
    cut = len(text) - math.ceil(held_out_size(len(text), fraction))
    for _ in range(3):  # never inside a character, which in UTF-8 has at most 4 bytes
        cut -= cut > 0 and text[cut] & 0xC0 == 0x80
    if not 0 < cut < len(text):
        raise DataError(f"a text of {len(text)} bytes is too short to hold out {fraction:g} of it")
    return text[:cut], text[cut:]
