"""Fine-tuning data: one JSON record per line, read strictly, encoded, and packed into windows.

    {"text": "..."}                           all tokens but the first are learned
    {"prompt": "...", "completion": "..."}    only the completion is learned
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
                                              only the assistant's turns are learned

The model's end-of-text token (`special.py`), if it has one, follows each record: it teaches a model
to stop. Bytes have none, so records follow each other bare: end them with a line break of your own.
A conversation is exactly what its chat template writes.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..formats.disk import JsonObject, PathLike, open_regular, parse_json, quoted
from .batches import PackedRecords, require_positive
from .chat import Chat, Example, conversation
from .texts import held_out_size
from .tokenizer import Tokenizer

SUFFIX = ".jsonl"
MAX_LINE_BYTES = 16 << 20  # a line is the only part of a file that is in memory as a whole
MAX_VALUES = 1 << 16  # of JSON in a line: a record has four, and a conversation hundreds
PAIR = ("prompt", "completion")
KINDS = {"text": ("text",), "messages": ("messages",), "prompt": PAIR, "completion": PAIR}


@dataclass(frozen=True, eq=False)
class Record:
    """An example cut to a context.

    ids        (n,) its tokens
    learned    (n,) bool, its targets, at least one; never the first token, which follows nothing of
               its record: so what is learned does not depend on how the record is packed
    size       the bytes that the targets stand for
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    size: float


def is_records(path: PathLike) -> bool:
    """Whether a file is read as records: its name ends in .jsonl."""
    return os.fsdecode(path).lower().endswith(SUFFIX)


def read_records(path: PathLike, tokenizer: Tokenizer, context: int) -> list[Record]:
    """The records of a file of JSON lines in UTF-8, of at most T + 1 = context + 1 tokens each.

    Empty lines are skipped. Longer records lose their ends, and one warning says how many tokens of
    the whole that were. Others say how many turns of the assistant's are not learned (see `Chat`),
    and that the model has no token that ends a text. Errors name the line. FormatError for a line
    that is not JSON (`parse_json`); DataError for a line with other keys or types or without a
    token to learn, for a conversation that no chat template can write, and for a file without
    records. OSError if the file cannot be read.
    """
    require_positive(context=context)
    records = []
    cut = lost = total = skipped = 0
    is_open = False  # whether a record has no template that writes its end
    with contextlib.ExitStack() as stack:
        chat = None
        for where, line in _lines(path):
            fields = _check_fields(parse_json(line, where, values=MAX_VALUES), where)
            try:
                if "messages" in fields:
                    chat = chat or stack.enter_context(Chat(tokenizer))
                    example = chat.encode(conversation(fields["messages"]))
                elif "text" in fields:
                    example = _encode(tokenizer, "", fields["text"])
                else:
                    example = _encode(tokenizer, fields["prompt"], fields["completion"])
                is_open |= "messages" not in fields
                record = _cut(example, context)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            records.append(record)
            total += len(example.ids)
            lost += len(example.ids) - len(record.ids)
            cut += len(example.ids) > len(record.ids)
            skipped += example.skipped
    if not records:
        raise DataError(f"{quoted(path)} has no record to train on")
    if is_open and tokenizer.missing_end:
        warnings.warn(
            f"{tokenizer.missing_end}: a model does not learn where the records of "
            f"{quoted(path)} end",
            stacklevel=2,
        )
    if cut:
        warnings.warn(
            f"{quoted(path)}: {cut:,} of {len(records):,} records are longer than {context + 1} "
            f"tokens and lose their ends, {lost:,} of {total:,} tokens: see --context",
            stacklevel=2,
        )
    if skipped:
        warnings.warn(
            f"{quoted(path)}: {skipped:,} of the assistant's turns are not learned: the chat "
            "template writes them differently once others follow",
            stacklevel=2,
        )
    return records


def _lines(path: PathLike) -> Iterator[tuple[str, bytes]]:
    """(file and number, line) of each line that is not empty, one of them in memory at a time."""
    with open_regular(path) as raw, io.BufferedReader(raw) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{quoted(path)} line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where}: longer than {MAX_LINE_BYTES:,} bytes, expected one record per line"
                )
            if line.strip(b" \t\r\n"):
                yield where, line


def _check_fields(record: JsonObject, where: str) -> JsonObject:
    """The record itself, if it has the keys of its kind, and texts under all but 'messages'."""
    keys = next((KINDS[key] for key in record if key in KINDS), ())
    if not keys or set(record) != set(keys):
        names = ", ".join(quoted(key, 40) for key in list(record)[:5])
        raise DataError(
            f"{where}: expected 'text', or 'prompt' and 'completion', or 'messages', and no other "
            f"key, found {names or 'nothing'}"
        )
    for key in keys:
        kind = type(record[key])
        if key != "messages" and kind is not str:
            raise DataError(f"{where}: expected {key!r} to be a text, found {kind.__name__}")
    return record


def _encode(tokenizer: Tokenizer, prompt: str, text: str) -> Example:
    """A prompt and its completion in tokens, the completion to be learned.

    The ids are those of both as one text, with the special tokens that the tokenizer's file asks
    for (`special.py`), the end of the text among them. What is learned begins where they differ
    from the ids of the prompt alone: a token that has the prompt's end and the completion's
    beginning is learned, because after the prompt alone a model has to write it anew.
    """
    ids = tokenizer.encode_prompt(prompt + text)
    alone = tokenizer.encode_prompt(prompt)
    start = size = min(len(ids), len(alone))
    different = np.flatnonzero(ids[:size] != alone[:size])
    if len(different):
        start = int(different[0])
    end = len(ids)
    if closing := tokenizer.special.closing(int(ids[-1]) if end else None):
        ids = np.append(ids, np.array(closing, np.int32))
    learned, spoken = np.zeros((2, len(ids)), bool)
    learned[start:] = True
    spoken[start:end] = True
    return Example(ids, learned, spoken, len(text.encode()))


def _cut(example: Example, context: int) -> Record:
    """An example cut to T + 1 tokens. DataError if none is left to be learned."""
    n = min(len(example.ids), context + 1)
    learned = example.learned[:n].copy()  # a view would keep the whole in memory
    learned[:1] = False
    if not learned.any():
        later = example.learned[1:]
        reason = "no token follows the prompt"
        if later.any():
            reason = (
                f"its first {1 + later.argmax()} of {len(example.ids)} tokens are prompt, and a "
                f"context of {context} ends before the rest"
            )
        elif example.learned[:1].all():
            reason = "no token follows its first"
        raise DataError(f"nothing to learn: {reason}")
    bytes_per_spoken = example.size / max(1, int(np.count_nonzero(example.spoken)))
    size = bytes_per_spoken * np.count_nonzero(example.spoken[:n] & learned)
    return Record(example.ids[:n].copy(), learned, size)


def split_records(
    records: list[Record], fraction: float = 0.1
) -> tuple[list[Record], list[Record]]:
    """(train, held_out): the last `fraction` of the records is held out.

    DataError where a side would be empty.
    """
    cut = len(records) - math.ceil(held_out_size(len(records), fraction))
    if cut < 1:
        raise DataError(
            f"expected 2 records or more, one to train on and one to hold out, got {len(records)}"
        )
    return records[:cut], records[cut:]


def pack(records: Sequence[Record], context: int) -> PackedRecords:
    """Whole records in their order, in windows of at most T + 1 tokens: first come, first served.

    A record that does not fit into the window that is being filled begins the next one. DataError
    for a record that fits into none, or no records.
    """
    sizes = [len(record.ids) for record in records]
    if not sizes or max(sizes) > context + 1:
        raise DataError(
            f"expected records of at most {context + 1} tokens, got {max(sizes, default='none')}"
        )
    edges = [0]
    end = 0
    for size in sizes:
        if end + size - edges[-1] > context + 1:
            edges.append(end)
        end += size
    edges.append(end)
    ids = np.concatenate([record.ids for record in records])
    counts = np.concatenate([record.learned for record in records])
    starts = np.cumsum([0, *sizes[:-1]])
    return PackedRecords(ids, counts, np.array(edges, np.int64), starts)


def bytes_per_token(records: Sequence[Record]) -> float:
    """Bytes per target, end-of-text tokens included: turns nats per token into bits per byte.

    A record that was cut has the share of its bytes that its tokens have; with bytes for tokens,
    that is exact. DataError where the targets stand for no byte.
    """
    size = math.fsum(record.size for record in records)
    if not size:
        raise DataError(f"{len(records)} records have nothing to learn but where they end")
    return size / sum(int(np.count_nonzero(record.learned)) for record in records)
