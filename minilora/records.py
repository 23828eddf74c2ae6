"""Fine-tuning data: a file of JSON lines, a record each, read strictly, encoded, and packed into windows.

    {"text": "..."}                           every token of it is to be learned but the first
    {"prompt": "...", "completion": "..."}    only what comes after the prompt is

A conversation ("messages") is refused: to write one as a model expects it, the program in the tokenizer's chat template
has to be run (Jinja). Whoever has run it has a prompt and a completion.

Between a record and the next stands the tokenizer's end-of-text token, where it has one: it is what teaches a model to
stop. With bytes there is none, and records follow each other bare: end them with a line break of your own.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import Packed
from .errors import ConfigError, DataError
from .formats.disk import PathLike, open_regular, parse_json, quoted
from .tokenizer import ByteTokenizer, HubTokenizer

SUFFIX = ".jsonl"
MAX_LINE_BYTES = 16 << 20  # a line is the only part of a file that is held in memory whole
MAX_VALUES = 1 << 16  # of JSON in a line: a record has four, and a conversation, which is refused by name, hundreds
KINDS = {"text": ("text",), "prompt": ("prompt", "completion"), "completion": ("prompt", "completion")}


@dataclass(frozen=True, eq=False)
class Record:
    """ids (n,), of which `first` on are targets, 1 <= first < n; they stand for `size` bytes.

    The first token is no target: nothing of its record stands before it. So what is learned from a record does not
    depend on how it is packed.
    """

    ids: NDArray[np.int32]
    first: int
    size: float


def is_records(path: PathLike) -> bool:
    """Whether a file is read as records: by its name, which ends in .jsonl."""
    return os.fsdecode(path).lower().endswith(SUFFIX)


def read_records(path: PathLike, tokenizer: ByteTokenizer | HubTokenizer, context: int) -> list[Record]:
    """The records of a file of JSON lines in UTF-8, of at most T + 1 = context + 1 tokens each. Empty lines are none.

    What is longer loses its end, and one warning says how much that was of the whole. FormatError for a line that is
    not JSON (`parse_json`); DataError for one with other keys or other types, for one of which no token is left to be
    learned, and for a file without a record. Both name the line. OSError if the file cannot be read.
    """
    if context < 1:
        raise ConfigError(f"context must be 1 or more, got {context!r}")
    records, cut, lost, total = [], 0, 0, 0
    for where, line in _lines(path):
        prompt, text = _texts(parse_json(line, where, values=MAX_VALUES), where)
        try:
            record, whole = _record(tokenizer, prompt, text, context)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        records.append(record)
        total += whole
        lost += whole - len(record.ids)
        cut += whole > len(record.ids)
    if not records:
        raise DataError(f"{quoted(path)} has no record: there is nothing to train on")
    if cut:
        text = f"{quoted(path)}: {cut:,} of {len(records):,} records are longer than {context + 1} tokens"
        warnings.warn(f"{text} and lose their ends, {lost:,} of {total:,} tokens: see --context", stacklevel=2)
    return records


def _lines(path: PathLike) -> Iterator[tuple[str, bytes]]:
    """(file and number, line) of each that is not empty; never more than one of them in memory."""
    with open_regular(path) as raw, io.BufferedReader(raw) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{quoted(path)} line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes, expected a record a line")
            if line.strip(b" \t\r\n"):
                yield where, line


def _texts(record: dict[str, Any], where: str) -> tuple[str, str]:
    """(prompt, what is to be learned), the prompt of a plain text being empty."""
    kinds = "'text', or 'prompt' and 'completion'"
    if "messages" in record:
        raise DataError(f"{where}: 'messages' needs the tokenizer's chat template to be run: expected {kinds}")
    keys = next((KINDS[key] for key in record if key in KINDS), ())
    if not keys or set(record) != set(keys):
        odd = ", ".join(quoted(key, 40) for key in list(record)[:5]) or "nothing"
        raise DataError(f"{where}: expected {kinds} and no other key, found {odd}")
    for key in keys:
        if type(record[key]) is not str:
            raise DataError(f"{where}: expected {key!r} to be a text, found {type(record[key]).__name__}")
    return ("", record["text"]) if keys == ("text",) else (record["prompt"], record["completion"])


def _record(tokenizer: ByteTokenizer | HubTokenizer, prompt: str, text: str, context: int) -> tuple[Record, int]:
    """(record, how many tokens it had before it was cut). DataError if no token is left to be learned."""
    ids, start = _encode(tokenizer, prompt, text)
    own = len(ids)
    share = len(text.encode()) / max(1, own - start)  # bytes a token
    if tokenizer.eos is not None and not (own and ids[-1] == tokenizer.eos):  # some files put one there themselves
        ids = np.append(ids, np.int32(tokenizer.eos))
    kept, first = ids[: context + 1].copy(), max(1, start)  # a view would keep the whole in memory
    if first >= len(kept):
        why = f"no token follows {'the prompt' if prompt else 'its first'}"
        if len(kept) < len(ids):
            why = f"its first {first} of {len(ids)} tokens are prompt, and a context of {context} ends before the rest"
        raise DataError(f"there is nothing to learn: {why}")
    return Record(kept, first, share * max(0, min(len(kept), own) - first)), len(ids)


def _encode(tokenizer: ByteTokenizer | HubTokenizer, prompt: str, text: str) -> tuple[NDArray[np.int32], int]:
    """(ids of both as one text, where what is to be learned begins), with the special tokens that the file asks for.

    That is where the ids part from those of the prompt alone. A token that holds the prompt's end and the text's
    beginning is learned: after the prompt alone, a model has to write it anew.
    """
    whole, alone = (tokenizer.encode(t, add_special_tokens=True) for t in (prompt + text, prompt))
    n = min(len(whole), len(alone))
    parted = np.flatnonzero(whole[:n] != alone[:n])
    return whole, int(parted[0]) if len(parted) else n


def split_records(records: list[Record], fraction: float = 0.1) -> tuple[list[Record], list[Record]]:
    """(train, held_out): the last `fraction` of the records is held out. DataError where a side would be empty."""
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction must lie between 0 and 1, got {fraction!r}")
    cut = len(records) - math.ceil(len(records) * fraction)
    if cut < 1:
        raise DataError(f"expected 2 records or more, one to train on and one to hold out, got {len(records)}")
    return records[:cut], records[cut:]


def pack(records: Sequence[Record], context: int) -> Packed:
    """Records, whole and in their order, in windows of at most T + 1 tokens: first come, first served.

    A record that does not fit into the window that is being filled begins the next one. DataError for a record that
    fits into none, or no record.
    """
    sizes = [len(record.ids) for record in records]
    if not sizes or max(sizes) > context + 1:
        raise DataError(f"expected records of at most {context + 1} tokens, got {max(sizes, default='none')}")
    edges, end, counts = [0], 0, []
    for record, size in zip(records, sizes, strict=True):
        if end + size - edges[-1] > context + 1:
            edges.append(end)
        end += size
        counts.append(np.arange(size) >= record.first)
    ids = np.concatenate([record.ids for record in records])
    return Packed(ids, np.concatenate(counts), np.array([*edges, end], np.int64))


def bytes_per_token(records: Sequence[Record]) -> float:
    """Of the targets, the end-of-text tokens among them: what makes of a loss in nats a token bits a byte.

    A record that was cut has the share of its bytes that its tokens have; with bytes for tokens, that is exact.
    DataError where they stand for no byte.
    """
    size = math.fsum(record.size for record in records)
    if not size:
        raise DataError(f"of {len(records)} records nothing is to be learned but where they end")
    return size / sum(len(record.ids) - record.first for record in records)
