"""Fine-tuning data: a file of JSON lines, a record each, read strictly, encoded, and packed into windows.

    {"text": "..."}                           every token of it is to be learned but the first
    {"prompt": "...", "completion": "..."}    only what comes after the prompt is
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}    the assistant's turns

Between a record and the next stands the tokenizer's end-of-text token, where it has one: it is what teaches a model to
stop. With bytes there is none, and records follow each other bare: end them with a line break of your own. A
conversation is as its chat template writes it, from the beginning to the end.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError
from ..formats.disk import PathLike, open_regular, parse_json, quoted
from .batches import PackedRecords
from .chat import Chat, Example, conversation
from .tokenizer import ByteTokenizer, HubTokenizer

SUFFIX = ".jsonl"
MAX_LINE_BYTES = 16 << 20  # a line is the only part of a file that is held in memory whole
MAX_VALUES = 1 << 16  # of JSON in a line: a record has four, and a conversation hundreds
PAIR = ("prompt", "completion")
KINDS = {"text": ("text",), "messages": ("messages",), "prompt": PAIR, "completion": PAIR}


@dataclass(frozen=True, eq=False)
class Record:
    """ids (n,), of which those `learned` (n,) are targets, at least one; they stand for `size` bytes.

    The first token is no target: nothing of its record stands before it. So what is learned from a record does not
    depend on how it is packed.
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    size: float


def is_records(path: PathLike) -> bool:
    """Whether a file is read as records: by its name, which ends in .jsonl."""
    return os.fsdecode(path).lower().endswith(SUFFIX)


def read_records(
    path: PathLike, tokenizer: ByteTokenizer | HubTokenizer, context: int
) -> list[Record]:
    """The records of a file of JSON lines in UTF-8, of at most T + 1 = context + 1 tokens each. Empty lines are none.

    What is longer loses its end, and one warning says how much that was of the whole; another, how many turns of the
    assistant's are not learned (see `Chat`). FormatError for a line that is not JSON (`parse_json`); DataError for one
    with other keys or other types, for one of which no token is left to be learned, for a conversation without a chat
    template that can write it, and for a file without a record. Both name the line. OSError if the file cannot be read.
    """
    if context < 1:
        raise ConfigError(f"context must be 1 or more, got {context!r}")
    records, chat = [], None
    cut = lost = total = skipped = 0
    with contextlib.ExitStack() as stack:
        for where, line in _lines(path):
            found = _checked(parse_json(line, where, values=MAX_VALUES), where)
            try:
                if "messages" in found:
                    chat = chat or stack.enter_context(Chat(tokenizer))
                    lesson = chat.encode(conversation(found["messages"]))
                elif "text" in found:
                    lesson = _completion(tokenizer, "", found["text"])
                else:
                    lesson = _completion(tokenizer, found["prompt"], found["completion"])
                record = _record(lesson, context)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            records.append(record)
            total += len(lesson.ids)
            lost += len(lesson.ids) - len(record.ids)
            cut += len(lesson.ids) > len(record.ids)
            skipped += lesson.skipped
    if not records:
        raise DataError(f"{quoted(path)} has no record: there is nothing to train on")
    if cut:
        text = f"{quoted(path)}: {cut:,} of {len(records):,} records are longer than {context + 1} tokens"
        warnings.warn(
            f"{text} and lose their ends, {lost:,} of {total:,} tokens: see --context", stacklevel=2
        )
    if skipped:
        text = f"{quoted(path)}: {skipped:,} of the assistant's turns are not learned"
        warnings.warn(
            f"{text}: the chat template writes them differently once others follow", stacklevel=2
        )
    return records


def _lines(path: PathLike) -> Iterator[tuple[str, bytes]]:
    """(file and number, line) of each that is not empty; never more than one of them in memory."""
    with open_regular(path) as raw, io.BufferedReader(raw) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{quoted(path)} line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where}: longer than {MAX_LINE_BYTES:,} bytes, expected a record a line"
                )
            if line.strip(b" \t\r\n"):
                yield where, line


def _checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The same record: it has the keys of its kind, and texts under them, but for the messages."""
    keys = next((KINDS[key] for key in record if key in KINDS), ())
    if not keys or set(record) != set(keys):
        odd = ", ".join(quoted(key, 40) for key in list(record)[:5]) or "nothing"
        kinds = "'text', or 'prompt' and 'completion', or 'messages'"
        raise DataError(f"{where}: expected {kinds}, and no other key, found {odd}")
    for key in keys:
        if key != "messages" and type(record[key]) is not str:
            raise DataError(
                f"{where}: expected {key!r} to be a text, found {type(record[key]).__name__}"
            )
    return record


def _completion(tokenizer: ByteTokenizer | HubTokenizer, prompt: str, text: str) -> Example:
    """What of a prompt and its completion is to be learned: all after the prompt, which a plain text has empty."""
    ids, start = _encode(tokenizer, prompt, text)
    own = len(ids)
    if tokenizer.eos is not None and not (
        own and ids[-1] == tokenizer.eos
    ):  # some files put one there themselves
        ids = np.append(ids, np.int32(tokenizer.eos))
    learned, spoken = np.zeros((2, len(ids)), bool)
    learned[start:] = spoken[start:own] = True
    return Example(ids, learned, spoken, len(text.encode()))


def _record(lesson: Example, context: int) -> Record:
    """A lesson cut to T + 1 tokens. DataError if none is left to be learned."""
    n = min(len(lesson.ids), context + 1)
    learned = lesson.learned[:n].copy()  # a view would keep the whole in memory
    learned[:1] = False
    if not learned.any():
        why = f"no token follows {'its first' if lesson.learned[:1].all() else 'the prompt'}"
        if lesson.learned[1:].any():
            prompt = f"its first {1 + lesson.learned[1:].argmax()} of {len(lesson.ids)} tokens are prompt"
            why = f"{prompt}, and a context of {context} ends before the rest"
        raise DataError(f"there is nothing to learn: {why}")
    share = lesson.size / max(1, int(np.count_nonzero(lesson.spoken)))  # bytes a token
    return Record(
        lesson.ids[:n].copy(), learned, share * np.count_nonzero(lesson.spoken[:n] & learned)
    )


def _encode(
    tokenizer: ByteTokenizer | HubTokenizer, prompt: str, text: str
) -> tuple[NDArray[np.int32], int]:
    """(ids of both as one text, where what is to be learned begins), with the special tokens that the file asks for.

    That is where the ids part from those of the prompt alone. A token that holds the prompt's end and the text's
    beginning is learned: after the prompt alone, a model has to write it anew.
    """
    whole, alone = (tokenizer.encode(t, add_special_tokens=True) for t in (prompt + text, prompt))
    n = min(len(whole), len(alone))
    parted = np.flatnonzero(whole[:n] != alone[:n])
    return whole, int(parted[0]) if len(parted) else n


def split_records(
    records: list[Record], fraction: float = 0.1
) -> tuple[list[Record], list[Record]]:
    """(train, held_out): the last `fraction` of the records is held out. DataError where a side would be empty."""
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction must lie between 0 and 1, got {fraction!r}")
    cut = len(records) - math.ceil(len(records) * fraction)
    if cut < 1:
        raise DataError(
            f"expected 2 records or more, one to train on and one to hold out, got {len(records)}"
        )
    return records[:cut], records[cut:]


def pack(records: Sequence[Record], context: int) -> PackedRecords:
    """Records, whole and in their order, in windows of at most T + 1 tokens: first come, first served.

    A record that does not fit into the window that is being filled begins the next one. DataError for a record that
    fits into none, or no record.
    """
    sizes = [len(record.ids) for record in records]
    if not sizes or max(sizes) > context + 1:
        raise DataError(
            f"expected records of at most {context + 1} tokens, got {max(sizes, default='none')}"
        )
    edges, end = [0], 0
    for size in sizes:
        if end + size - edges[-1] > context + 1:
            edges.append(end)
        end += size
    ids, counts = (
        np.concatenate([r.ids for r in records]),
        np.concatenate([r.learned for r in records]),
    )
    return PackedRecords(ids, counts, np.array([*edges, end], np.int64))


def bytes_per_token(records: Sequence[Record]) -> float:
    """Of the targets, the end-of-text tokens among them: what makes of a loss in nats a token bits a byte.

    A record that was cut has the share of its bytes that its tokens have; with bytes for tokens, that is exact.
    DataError where they stand for no byte.
    """
    size = math.fsum(record.size for record in records)
    if not size:
        raise DataError(f"of {len(records)} records nothing is to be learned but where they end")
    return size / sum(int(np.count_nonzero(record.learned)) for record in records)
