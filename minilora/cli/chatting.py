"""generate --chat: a conversation whose messages are lines of standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ..data.batches import Ids
from ..data.chat import Chat, Messages
from ..data.files import BOM
from ..data.tokenizer import Tokenizer
from ..display import printable
from ..errors import DataError
from ..models.completion import Completion, stream_text
from .options import Args

MAX_MESSAGE = 1 << 20  # bytes; more is a mistake, such as a device that never ends
SIGN = "> "  # before what the user writes, on a terminal


def begin_messages(chat: Chat, system: str | None) -> Messages:
    """The system's message, or none. DataError for a template that leaves it out."""
    if system is None:
        return []
    begun = [{"role": "system", "content": system}]
    question = [{"role": "user", "content": "?"}]
    if chat.render(begun + question) == chat.render(question):
        raise DataError(f"{chat.where} leaves out the system's message: do not give --system")
    return begun


def converse(
    model: Any, tokenizer: Tokenizer, args: Args, eos: Iterable[int], sampling: dict[str, Any]
) -> None:
    """Answer each line of standard input until it ends, or Ctrl-C: both end the command well.

    The model sees the whole conversation. Where its context is too short for that, the oldest
    questions are left out with their answers.
    """
    with Chat(tokenizer) as chat:
        messages = begin_messages(chat, args.system_message)
        first = len(messages)
        try:
            for turn, question in enumerate(_read_questions()):
                messages.append({"role": "user", "content": question})
                ids = _encode(chat, messages, first, model.config)
                completion = Completion(tokenizer, eos=eos, stops=args.stop or ())
                options = {**sampling, "rows": [turn]}  # each answer has its own random numbers
                for text in stream_text(model, ids, args.max_new_tokens, completion, **options):
                    print(printable(text, "\n\t"), end="", flush=True)
                print(flush=True)
                messages.append({"role": "assistant", "content": completion.completion})
        except KeyboardInterrupt as error:
            if error.args:  # another signal than that of Ctrl-C
                raise
            print()


def _encode(chat: Chat, messages: Messages, first: int, config: Any) -> Ids:
    """The ids of a conversation, without the oldest turns if the context is too short for all.

    first   the number of messages before the turns, which stay; the others are removed

    DataError if the last message alone is too long.
    """
    removed = 0
    while True:
        text = chat.render(messages, add_generation_prompt=True)
        ids = chat.tokenizer.encode(text)
        if not len(ids):
            raise DataError(f"{chat.where} writes nothing: the model needs a token to continue")
        if len(ids) <= config.context:
            break
        if len(messages) <= first + 1:
            limit = config.describe_context()
            raise DataError(
                f"the message has {len(ids)} tokens, but the model has {limit}: shorten it"
            )
        del messages[first : first + 2]
        removed += 1
    if removed:
        note = f"the context is full: the {removed} oldest questions and answers are left out"
        print(note, file=sys.stderr)
    return ids


def _read_questions() -> Iterator[str]:
    """Yield the lines of standard input that are not blank.

    DataError for a line that is not UTF-8 or too long, and where nothing is given at all.
    """
    source = sys.stdin
    is_terminal = source is not None and source.isatty()
    buffer = getattr(source, "buffer", None)
    number = 0
    has_asked = False
    while True:
        if is_terminal:
            print(SIGN, end="", flush=True)
        line = buffer.readline(MAX_MESSAGE + 1) if buffer is not None else b""
        if not line:
            break
        number += 1
        question = _decode(line.removeprefix(BOM) if number == 1 else line, number)
        if question.strip():
            has_asked = True
            yield question
    if is_terminal:
        print()
    elif not has_asked:
        raise DataError(
            "standard input is empty: --chat reads a message from each line of it; "
            "write some, or give --prompt TEXT"
        )


def _decode(line: bytes, number: int) -> str:
    where = f"standard input line {number}"
    if len(line) > MAX_MESSAGE:
        raise DataError(f"{where} has more than {MAX_MESSAGE:,} bytes: shorten it")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{where} is not UTF-8 at byte {error.start + 1}"
        raise DataError(f"{place}: convert the text to UTF-8") from None
