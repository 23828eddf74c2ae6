"""Fine-tuning data: JSON records, read strictly, encoded, and packed into windows.

    a text                      all tokens but the first are learned
    a prompt and completion     only the completion is learned
    a conversation              only the assistant's turns are learned
    an instruction and answer   only the answer is learned: with a chat template as a conversation,
                                without one after Alpaca's prompt

shapes.py has the fields of each, files.py the files.

The model's end-of-text token (`special.py`), if it has one, follows each record: it teaches a model
to stop. Bytes have none, so records follow each other bare: end them with a line break of your own.
A conversation is exactly what its chat template writes.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, NothingToLearnError
from ..formats.disk import PathLike, quoted
from .batches import PackedRecords, require_positive
from .chat import Chat, Example
from .files import DataFile, open_data
from .shapes import Completion, Content, Instruction, read_shape
from .texts import held_out_size
from .tokenizer import ByteTokenizer, Tokenizer

MAX_COLUMNS = 100  # unused columns that are counted


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
    """Whether a file is read as records, which its content decides (`open_data`)."""
    return open_data(path).is_records


@dataclass
class _Tally:
    """What is counted while records are read, and is reported once per file.

    kept       records
    cut        those of them that lost their ends: `lost` of `total` tokens
    turns      of the assistant that are not learned
    open       records that no token ends
    skipped    records without a token to learn; `first` says where the first is, and why
    columns    {name of a column that is not used: the records that have it}
    notes      those of the examples
    """

    kept: int = 0
    cut: int = 0
    lost: int = 0
    total: int = 0
    turns: int = 0
    open: int = 0
    skipped: int = 0
    first: str = ""
    columns: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def count(self, example: Example, record: Record) -> None:
        lost = len(example.ids) - len(record.ids)
        self.kept += 1
        self.cut += lost > 0
        self.lost += lost
        self.total += len(example.ids)
        self.turns += example.skipped
        self.open += example.is_open
        self.notes.extend(example.notes)

    def skip(self, place: str, reason: str) -> None:
        self.skipped += 1
        self.first = self.first or f"{place} ({reason})"

    def count_columns(self, names: list[str]) -> None:
        for name in names:
            if name in self.columns or len(self.columns) < MAX_COLUMNS:
                self.columns[name] += 1

    def reports(self, path: PathLike, context: int) -> Iterator[str]:
        """One sentence for each thing that a user should know."""
        if self.cut:
            yield (
                f"{quoted(path)}: {self.cut:,} of {self.kept:,} records are longer than "
                f"{context + 1} tokens and lose their ends, {self.lost:,} of {self.total:,} "
                "tokens: see --context"
            )
        if self.turns:
            yield (
                f"{quoted(path)}: {self.turns:,} of the assistant's turns are not learned: the "
                "chat template writes them differently once others follow"
            )
        if self.skipped:
            yield (
                f"{quoted(path)}: {self.skipped:,} of {self.kept + self.skipped:,} records are "
                f"skipped, the first at {self.first}"
            )
        for note in self.notes:
            yield f"{quoted(path)}: {note}"
        if self.columns:
            counts = [f"{quoted(k, 40)} ({n:,})" for k, n in self.columns.most_common(5)]
            more = ["..."] if len(self.columns) > 5 else []
            yield (
                f"{quoted(path)}: columns that are not used (number of records that have them): "
                f"{', '.join(counts + more)}"
            )


def read_records(
    path: PathLike | DataFile, tokenizer: Tokenizer, context: int, strict: bool = False
) -> list[Record]:
    """The records of a file, of at most T + 1 = context + 1 tokens each.

    Longer records lose their ends. A record of which nothing can be learned is skipped: it is
    empty, or its prompt fills the context. One warning each says how many, as for the turns of the
    assistant's that are not learned (see `Chat`), and which columns are not used. With `strict`, a
    record that is cut or skipped is a DataError.

    Errors name the line or the record. FormatError for what is not JSON (`parse_json`); DataError
    for a record of no known shape, for a conversation that no chat template can write, and for a
    file without a record to learn. OSError if the file cannot be read.
    """
    require_positive(context=context)
    file = path if isinstance(path, DataFile) else open_data(path, must_be_records=True)
    records = []
    tally = _Tally()
    with _encoder(tokenizer) as encode:
        for where, fields in file.records():
            try:
                content, columns = read_shape(fields)
                tally.count_columns(columns)
                example = encode(content)
                record = _cut(example, context)
            except NothingToLearnError as error:
                if strict:
                    raise DataError(f"{where}: {error}") from None
                tally.skip(where.removeprefix(quoted(file.path)).strip(), str(error))
                continue
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if strict and len(record.ids) < len(example.ids):
                raise DataError(
                    f"{where}: {len(example.ids):,} tokens, at most {context + 1:,} fit into a "
                    f"context of {context}: shorten it or give a larger --context"
                )
            tally.count(example, record)
            records.append(record)
    if not records:
        reason = f": all {tally.skipped:,} are skipped, the first at {tally.first}"
        raise DataError(
            f"{quoted(file.path)} has no record to train on{reason if tally.skipped else ''}"
        )
    if tally.open:
        warnings.warn(
            f"{tokenizer.missing_end}: a model does not learn where the records of "
            f"{quoted(file.path)} end",
            stacklevel=2,
        )
    for report in tally.reports(file.path, context):
        warnings.warn(report, stacklevel=2)
    return records


@contextlib.contextmanager
def _encoder(tokenizer: Tokenizer) -> Iterator[Callable[[Content], Example]]:
    """A function that gives the tokens of a record's content.

    The process of a chat template starts with the first conversation, and ends with the block. A
    template for conversations with tools has a process of its own.
    """
    with contextlib.ExitStack() as stack:
        chats: dict[bool, Chat] = {}

        def encode(content: Content) -> Example:
            if isinstance(content, Instruction):
                has_template = _has_template(tokenizer)
                content = content.as_conversation() if has_template else content.as_completion()
            if isinstance(content, Completion):
                if not content.prompt and not content.text:
                    raise NothingToLearnError("nothing to learn: it is empty")
                return _encode(tokenizer, content.prompt, content.text)
            has_tools = bool(content.tools) and _has_tool_template(tokenizer)
            if has_tools not in chats:
                chats[has_tools] = stack.enter_context(Chat(tokenizer, for_tools=has_tools))
            return chats[has_tools].encode(*content)

        yield encode


def _has_template(tokenizer: Tokenizer) -> bool:
    return not isinstance(tokenizer, ByteTokenizer) and tokenizer.chat_template is not None


def _has_tool_template(tokenizer: Tokenizer) -> bool:
    return not isinstance(tokenizer, ByteTokenizer) and tokenizer.tool_template is not None


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
        ids = tokenizer.require_known(np.append(ids, np.array(closing, np.int32)))
    learned, spoken = np.zeros((2, len(ids)), bool)
    learned[start:] = True
    spoken[start:end] = True
    is_open = bool(tokenizer.missing_end)
    return Example(ids, learned, spoken, len(text.encode()), is_open=is_open)


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
        raise NothingToLearnError(f"nothing to learn: {reason}")
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
            f"expected 2 records or more, one to train on and one to hold out, got {len(records)}: "
            "add records, or give others to evaluate on"
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
        raise DataError(
            f"{len(records)} records have nothing to learn but where they end: give some with "
            "a text to learn"
        )
    return size / sum(int(np.count_nonzero(record.learned)) for record in records)
