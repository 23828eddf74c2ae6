"""From text to batches: tokenizers, the texts of the demo, and the two ways to cut a text into sequences.

Nothing here remembers how far a run has come: a batch is a function of text, seed and step, so a resumed run needs only
its step number. Whether the ids fit a model's vocabulary is checked by whoever knows the model.
"""

from __future__ import annotations

import json
import math
import os
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .backend import Backend
from .errors import ConfigError, DataError, FormatError
from .formats.disk import PathLike, atomic_file, open_regular, quoted, read_json, write_json
from .functional import IGNORE, within

MAX_TOKENIZER_BYTES = 128 << 20  # the largest in use, of 256,000 tokens, take about 35 MB

Ids = NDArray[np.integer[Any]]
Documents = list[tuple[str, bytes]]  # (name, text)

# ---- tokenizers -----------------------------------------------------------------------------------------------------


def _utf8(text: str | bytes) -> bytes:
    """A text's bytes. What the command line could not decode (U+DC80 to U+DCFF in a str) is the byte that it was."""
    try:
        return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} of the text is half of a surrogate pair: it has no bytes") from None


def _byte_level() -> dict[str, Any]:
    """Our tokenizer.json: byte-level BPE without merges. Its pieces are bytes, and a byte's id is its value.

    Byte-level BPE (Radford et al. 2019) writes each byte as one visible character: a printable Latin-1 character is
    itself, the other 68 bytes are U+0100, U+0101, ... in order. So the space, byte 32, is U+0120.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(byte if byte in visible else next(others)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    model |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **absent, "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}


@dataclass(frozen=True)
class ByteTokenizer:
    """Ids 0 to 255 are the bytes. Any text, in any encoding or none, has ids, and nothing needs to be installed."""

    note: str = ""  # why bytes were chosen, where the model's own files do not say so
    vocab_size: ClassVar[int] = 256
    eos: ClassVar[int | None] = None  # all 256 bytes may stand in a text

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> NDArray[np.int32]:
        """The bytes of the text, a str as UTF-8. There are no special tokens to add."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes again. An id that is no byte (a model may have a larger vocabulary) becomes U+FFFD."""
        return b"".join(bytes([i]) if 0 <= i < 256 else b"\xef\xbf\xbd" for i in ids)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """As UTF-8. errors="surrogateescape" gives back what the command line gave, be it UTF-8 or not."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def save(self, directory: PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json: `transformers.AutoTokenizer` then gives the same ids."""
        write_json(os.path.join(directory, "tokenizer.json"), _byte_level())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(os.path.join(directory, "tokenizer_config.json"), config)


class HubTokenizer:
    """Any other tokenizer.json, run by the `tokenizers` package. DataError where it cannot be, or for repeated ids."""

    FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    note = ""

    def __init__(self, directory: PathLike):
        self._path = path = os.path.join(directory, "tokenizer.json")
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"{quoted(path)} needs the package 'tokenizers': pip install -e .[hf]") from None
        with self._usable():
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        self._tokenizer.no_truncation()  # a file may ask for both, but a corpus is one long text
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if len(set(ids)) < max(1, len(ids)):
            raise DataError(f"{quoted(path)}: expected at least one token and an id of its own for each of {len(ids)}")
        self.vocab_size = max(ids) + 1
        self._files = {}
        for name in self.FILES:
            if os.path.isfile(beside := os.path.join(directory, name)):
                with open_regular(beside) as file:
                    if os.fstat(file.fileno()).st_size > MAX_TOKENIZER_BYTES:
                        raise DataError(f"{quoted(beside)}: expected at most {MAX_TOKENIZER_BYTES} bytes")
                    self._files[name] = file.read()

    @cached_property
    def eos(self) -> int | None:
        """The id of the token that ends a text: tokenizer_config.json's eos_token. None where it names none."""
        try:  # by Python's own parser: what is there besides is not ours, and has integers of 31 digits
            config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        except (ValueError, RecursionError):
            raise DataError(f"the tokenizer_config.json beside {quoted(self._path)} is not JSON") from None
        token = config.get("eos_token") if isinstance(config, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        with self._usable():
            return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """What the package cannot do with this file is a DataError.

        It raises plain Exceptions, and panics (BaseExceptions) for a file that it did not check: with a pattern that
        does not end, say, which it gives up after ten million steps.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise DataError(f"{quoted(self._path)} is not a usable tokenizer: {str(error)[:200]!r}") from None
            raise

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> NDArray[np.int32]:
        """The ids of a text in UTF-8; `add_special_tokens` puts what the file asks for around it (a BOS, say)."""
        try:
            decoded = _utf8(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"the text is not UTF-8 at byte {error.start}; this model's tokenizer needs that") from None
        with self._usable():
            return np.array(self._tokenizer.encode(decoded, add_special_tokens=add_special_tokens).ids, np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8")

    def decode(self, ids: Iterable[int]) -> str:
        with self._usable():
            return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def save(self, directory: PathLike) -> None:
        """Write the files again as they were read."""
        for name, content in self._files.items():
            with atomic_file(os.path.join(directory, name)) as file:
                file.write(content)


def load_tokenizer(directory: PathLike, vocab_size: int) -> ByteTokenizer | HubTokenizer:
    """The tokenizer in a model's directory: bytes, with a `note` that says so, where it has no tokenizer.json.

    DataError for a tokenizer that gives ids of `vocab_size` or more.
    """
    path = os.path.join(directory, "tokenizer.json")
    if os.path.lexists(path):
        found, ours = read_json(path, limit=MAX_TOKENIZER_BYTES), _byte_level()
        template = found.get("post_processor")
        if isinstance(template, dict) and template.get("special_tokens") == {}:
            found["post_processor"] = None  # transformers writes ours again with a template that adds nothing
        same = all(found.get(key) == ours[key] for key in ours.keys() - {"version", "decoder", "truncation", "padding"})
        tokenizer: ByteTokenizer | HubTokenizer = ByteTokenizer() if same else HubTokenizer(directory)
    else:
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if Path(directory, name).exists()]
        note = f"{quoted(directory)} has no tokenizer.json: texts are read as bytes, ids 0 to 255"
        tokenizer = ByteTokenizer(note + (f" ({', '.join(others)} cannot be used)" if others else ""))
    if tokenizer.vocab_size > vocab_size:
        source = tokenizer.note or quoted(path)
        raise DataError(f"{source}: {tokenizer.vocab_size} ids, more than the model's vocab_size of {vocab_size}")
    return tokenizer


# ---- texts ----------------------------------------------------------------------------------------------------------


def read_text(path: PathLike) -> bytes:
    """The bytes of a text file. DataError if it is empty, not a regular file or too large, OSError if it fails."""
    try:
        with open_regular(path) as file:
            text = file.read()
    except FormatError as error:
        raise DataError(str(error)) from None
    except MemoryError:
        size = os.path.getsize(path)
        raise DataError(f"{quoted(path)} has {size:,} bytes, more than there is memory: cut a part out of it") from None
    if not text:
        raise DataError(f"{quoted(path)} is empty: there is nothing to train on")
    return text


def prose() -> Documents:
    """Python's language reference, (topic, text) by name: half a megabyte of English that comes with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without pydoc_data, the demo's prose: give --pretrain-data FILE") from None
    return [(name, text.encode()) for name, text in sorted(topics.items())]


def python_sources(limit: int = 3_000_000) -> Documents:
    """The standard library's own sources, (path, text) by path, up to `limit` bytes, without tests and tables of data.

    Files are taken in the order of a checksum of their path: a fair sample, much the same on every version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}
    paths: list[str] = []
    for folder, folders, names in os.walk(root):
        # config-3.x-... and _sysconfigdata... hold one machine's settings.
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(("config-", "__"))]
        sources = [name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
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
    found = {"python": python_sources(limit), "c": _files(headers, limit), "charmap": _files(tables, limit)}
    found["json"] = [(f"plane {at:x}", text) for at, text in _unicode(limit)]
    for task, documents in found.items():
        if not documents:
            raise DataError(f"this Python comes without the texts of task {task!r}: give files of your own")
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
            {"code": f"U+{ord(c):04X}", "name": unicodedata.name(c), "category": unicodedata.category(c), "char": c}
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
        raise DataError(f"expected 2 documents or more, one to train on and one to hold out, got {len(texts)}")
    room, held = _share(sum(map(len, texts)), fraction), set()
    for i in np.random.default_rng(seed).permutation(len(texts)).tolist():
        if len(texts[i]) <= room:
            held.add(i)
            room -= len(texts[i])
    held = held or {min(range(len(texts)), key=lambda i: len(texts[i]))}
    train, held_out = (b"\n".join(t for i, t in enumerate(texts) if (i in held) == side) for side in (False, True))
    return train, held_out


def split_text(text: bytes, fraction: float = 0.1) -> tuple[bytes, bytes]:
    """(train, held_out): the last `fraction` of one text is held out. DataError where a side would be empty."""
    cut = len(text) - math.ceil(_share(len(text), fraction))
    for _ in range(3):  # never inside a character, which in UTF-8 has at most 4 bytes
        cut -= cut > 0 and text[cut] & 0xC0 == 0x80
    if not 0 < cut < len(text):
        raise DataError(f"a text of {len(text)} bytes is too short to hold out {fraction:g} of it")
    return text[:cut], text[cut:]


# ---- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """ids (B, T) and targets (B, T), the ids one position later, or IGNORE where nothing is to be learned.

    Every array is sequence-first, so that a batch can be cut into shards. `first` is the place of this shard's first
    sequence in the whole batch: dropout depends on that place, not on where the batch was cut. `tasks` says for each
    sequence by its name which task it belongs to, where a model has several: ConfigError if they are not B.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    first: int = 0
    tasks: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None and len(self.tasks) != len(self.ids):
            raise ConfigError(f"a batch of {len(self.ids)} sequences needs as many tasks, got {len(self.tasks)}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """How many targets count."""
        return int(np.count_nonzero(self.targets != IGNORE))

    def to(self, backend: Backend, vocab_size: int) -> Batch:
        """The same batch where a model of `vocab_size` tokens lives: ids and targets move as one array.

        DataError for an id outside [0, vocab_size), or a target that is neither there nor IGNORE.
        """
        within(self.ids, vocab_size, "id")
        within(self.targets[self.targets != IGNORE], vocab_size, "target")
        ids, targets = backend.from_numpy(np.stack([self.ids, self.targets]))
        return Batch(ids, targets, self.first, self.tasks)

    def shard(self, start: int, stop: int) -> Batch:
        """Sequences start to stop, 0 <= start; views, not copies."""
        tasks = None if self.tasks is None else self.tasks[start:stop]
        return Batch(self.ids[start:stop], self.targets[start:stop], self.first + start, tasks)

    def by_task(self) -> list[tuple[str | None, Batch]]:
        """(task, its sequences) of each task, where there are tasks; otherwise None and the batch itself.

        That is the batch sorted by task, stably, and cut between tasks: `first` counts in the sorted one.
        """
        if self.tasks is None:
            return [(None, self)]
        found: list[tuple[str | None, Batch]] = []
        first = self.first
        for task, rows in rows_by_task(self.tasks).items():
            found.append((task, Batch(self.ids[rows], self.targets[rows], first, (task,) * len(rows))))
            first += len(rows)
        return found


def rows_by_task(tasks: Sequence[str]) -> dict[str, NDArray[np.intp]]:
    """Which rows are each task's. Tasks are in the order of their names: it must not depend on that of the rows."""
    return {task: np.flatnonzero([other == task for other in tasks]) for task in sorted(set(tasks))}


@dataclass(frozen=True, eq=False)
class Packed:
    """A text that was cut into windows beforehand, and of which not every token is to be learned.

    ids (N,), integers; counts (N,), bool, where a token is a target; edges (W + 1,): window w is ids[edges[w] :
    edges[w + 1]]. The first token of a window is no target, whatever `counts` says. DataError unless the edges rise
    from 0 to N and something counts in every window.
    """

    ids: Ids
    counts: NDArray[np.bool_]
    edges: NDArray[np.int64]

    def __post_init__(self) -> None:
        n, edges = len(self.ids), self.edges
        if self.counts.dtype != bool or self.counts.shape != self.ids.shape or edges.ndim != 1 or len(edges) < 2:
            raise DataError("expected a bool for each of the ids, and the edges of at least one window")
        if edges[0] != 0 or edges[-1] != n or np.diff(edges).min() < 1:
            raise DataError(f"the edges of the windows must rise from 0 to {n}")
        targets = self.counts.copy()
        targets[edges[:-1]] = False
        if not np.logical_or.reduceat(targets, edges[:-1]).all():
            raise DataError("a window in which no token counts cannot be trained on")

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: NDArray[np.int64], context: int) -> Batch:
        """Those that begin at `starts` (B,). Beyond a window's end ids are 0, and targets IGNORE as where none counts.

        Inside a window attention is the ordinary causal one: a record sees those that are packed before it.
        """
        batch = _cut(self.ids, starts, context)
        places = starts[:, None] + np.arange(1, context + 1)  # of the targets
        inside = places < self.edges[np.searchsorted(self.edges, starts, "right")][:, None]
        counted = inside & self.counts[np.minimum(places, len(self) - 1)]
        return Batch(np.where(inside, batch.ids, 0), np.where(counted, batch.targets, IGNORE))


def _cut(text: Ids | Packed, starts: NDArray[np.int64], context: int) -> Batch:
    """The windows of T + 1 tokens from `starts` (B,) on. Positions beyond the text have id 0 and target IGNORE."""
    if isinstance(text, Packed):
        return text.windows(starts, context)
    positions = starts[:, None] + np.arange(context)  # (B, 1) + (T,) -> (B, T)
    last = len(text) - 1  # it is only ever a target
    ids, targets = (text[np.minimum(positions + shift, last)].astype(np.int64) for shift in (0, 1))
    return Batch(np.where(positions < last, ids, 0), np.where(positions < last, targets, IGNORE))


def _check_text(text: Ids | Packed, needed: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be 1 or more, got {count!r}")
    if isinstance(text, Packed):
        longest = int(np.diff(text.edges).max())
        if longest > counts["context"] + 1:
            raise DataError(f"packed into windows of up to {longest} tokens: a context of {longest - 1} is needed")
    tokens, needed = (text.ids, 2) if isinstance(text, Packed) else (text, needed)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"expected the ids of one text, integers (N,), got {tokens.dtype} {tokens.shape}")
    if len(tokens) < needed:
        raise DataError(f"the text needs at least {needed} tokens, has {len(tokens)}")


class Windows:
    """Training batches of a text, by counter: `batch(step)` depends on the text, the numbers below and `step` alone.

    An epoch visits n = len(self) windows of T + 1 tokens at stride T, each once, in an order and from an offset drawn
    from (seed, epoch): other tokens meet in every epoch. Sequence b of a batch is number g = step * batch_size + b of
    the run: window g mod n of epoch g div n. The text is integers (N,), N > T = context, or else DataError; or it is
    packed, and its windows are its own, of T + 1 tokens at most, without an offset.
    """

    def __init__(self, tokens: Ids | Packed, context: int, batch_size: int, seed: int = 0):
        _check_text(tokens, context + 1, context=context, batch_size=batch_size)
        if seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {seed!r}")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        # One window less than would fit, where there is more than one: this leaves a whole stride for the offset.
        self._count = max(1, (len(tokens) - context) // context)
        if isinstance(tokens, Packed):
            self._count = len(tokens.edges) - 1
        self._latest: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self._count

    def epoch(self, step: int) -> int:
        """The epoch in which the first sequence of batch `step` lies."""
        return step * self.batch_size // len(self)

    def _starts(self, epoch: int) -> NDArray[np.int64]:
        """Where the windows of an epoch begin, in the order of their visit."""
        if self._latest[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            if isinstance(self.tokens, Packed):
                self._latest = epoch, self.tokens.edges[rng.permutation(len(self))]
            else:
                offset = rng.integers(len(self.tokens) - len(self) * self.context)
                self._latest = epoch, offset + self.context * rng.permutation(len(self))
        return self._latest[1]

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0: B = batch_size sequences of T = context."""
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = numbers // len(self), numbers % len(self)
        starts = [self._starts(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
        return _cut(self.tokens, np.concatenate(starts), self.context)


class TaskWindows:
    """Training batches of several texts, one a task: sequence b of a batch is of task number b modulo their count.

    Each task has windows of its own, visited as `Windows` visits them, so that a small text is seen more often. The
    number of sequences a batch must reach every task: ConfigError if it does not.
    """

    def __init__(self, texts: Mapping[str, Ids | Packed], context: int, batch_size: int, seed: int = 0):
        if not texts or batch_size < len(texts):
            raise ConfigError(f"a batch of {batch_size} sequences cannot hold one of each of {len(texts)} tasks")
        self.tasks = [list(texts)[b % len(texts)] for b in range(batch_size)]
        self._windows = {}
        for task, tokens in texts.items():
            try:
                self._windows[task] = Windows(tokens, context, self.tasks.count(task), seed)
            except DataError as error:
                raise DataError(f"task {task!r:.99}: {error}") from None

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0: B = batch_size sequences of T = context, and their tasks."""
        parts = {task: windows.batch(step) for task, windows in self._windows.items()}
        place = dict.fromkeys(parts, 0)
        rows = []
        for task in self.tasks:
            rows.append((parts[task].ids[place[task]], parts[task].targets[place[task]]))
            place[task] += 1
        ids, targets = zip(*rows, strict=True)
        return Batch(np.stack(ids), np.stack(targets), tasks=self.tasks)


def evaluation_windows(
    tokens: Ids | Packed, context: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Consecutive windows, in which every token but the first is a target exactly once. The last may be padded.

    With a `limit`, so many of these windows at most, spread evenly over the text. DataError for fewer than 2 tokens.
    A packed text has its own windows, in their order.
    """
    _check_text(tokens, 2, context=context, batch_size=batch_size, limit=1 if limit is None else limit)
    packed = tokens.edges[:-1] if isinstance(tokens, Packed) else None
    count = math.ceil((len(tokens) - 1) / context) if packed is None else len(packed)
    kept = min(count, limit or count)
    places = np.arange(kept, dtype=np.int64) * count // kept
    starts = places * context if packed is None else packed[places]
    return (_cut(tokens, starts[i : i + batch_size], context) for i in range(0, kept, batch_size))
