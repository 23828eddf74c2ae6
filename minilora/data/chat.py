"""Conversations: the text that a model's own chat template makes of them, and what to learn of it.

    messages   [{"role": "system" | "user" | "assistant", "content": "..."}, ...]

Only the assistant's turns are learned. A turn is what the template adds to the text of the messages
before it, from the end of their generation prompt to the end of the turn, with the mark that ends
it. Two texts must therefore be beginnings of the whole text: that of the messages before the turn
with the generation prompt, and that of the messages up to the turn. Some templates write a turn
differently once others follow: Qwen3's drops the thoughts. Such a turn is not what the model would
have been asked to write, and is not learned.

A template is a program of unknown origin: it runs in a process of its own (sandbox.py).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..formats.disk import quoted
from .sandbox import Sandbox
from .tokenizer import ByteTokenizer, Tokenizer

Messages = list[dict[str, str]]

ROLES = ("system", "user", "assistant")

# Processor time for a template, and for each part and byte that it renders: some twenty times what
# Qwen3's template takes. Memory likewise.
SECONDS = 2.0
MEMORY = 1 << 28
MEMORY_PER_BYTE = 256
SECONDS_PER_PART = 0.02
SECONDS_PER_BYTE = 1e-6


class Example(NamedTuple):
    """Tokens to train on.

    ids        (n,) all of them
    learned    (n,) bool, those whose prediction is learned
    spoken     (n,) bool, the learned ones that are text; the others are marks: an end of text or of
               turn
    size       the bytes of text that the spoken tokens stand for
    skipped    the number of the assistant's turns that are not learned
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    spoken: NDArray[np.bool_]
    size: int
    skipped: int = 0


def conversation(value: Any) -> Messages:
    """A JSON value, checked to be a conversation with something to learn.

    DataError names the message that is wrong.
    """
    if type(value) is not list or not value:
        kind = "an empty one" if value == [] else type(value).__name__
        raise DataError(f"expected 'messages' to be a list of messages, found {kind}")
    for number, message in enumerate(value, 1):
        _check_message(f"message {number}: expected", message)
    if all(message["role"] != "assistant" for message in value):
        raise DataError("no message is the assistant's, so nothing can be learned")
    return value


def _check_message(expected: str, message: Any) -> None:
    if type(message) is not dict or set(message) != {"role", "content"}:
        keys = type(message).__name__
        if type(message) is dict:
            keys = ", ".join(sorted(message)) or "nothing"
        raise DataError(f"{expected} 'role' and 'content' and no other key, found {keys:.100}")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{expected} a role of {', '.join(ROLES)}, found {quoted(role, 40)}")
    content = message["content"]
    if type(content) is not str:
        raise DataError(f"{expected} 'content' to be a text, found {type(content).__name__}")


class Chat:
    """A tokenizer and the process that runs its chat template: `with Chat(tokenizer) as chat`.

    The process ends with the block. DataError for a tokenizer without a template, and from the
    methods, for a template that cannot be parsed or run, does what it may not, or takes more than
    `seconds` or other limits allow.
    """

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS):
        if isinstance(tokenizer, ByteTokenizer) or tokenizer.chat_template is None:
            raise DataError(
                "'messages' needs a tokenizer.json and its chat template (chat_template.jinja, or "
                "chat_template in tokenizer_config.json): this model has none"
            )
        self.tokenizer = tokenizer
        template, self.where = tokenizer.chat_template
        given = {"tools": None, "documents": None, **tokenizer.special_tokens}
        self.sandbox = Sandbox(self.where, {"template": template, "given": given}, seconds, MEMORY)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.sandbox.close()

    def _rendered(
        self, messages: Messages, parts: list[tuple[int, bool]]
    ) -> tuple[str, list[int | None]]:
        """(text of the first part, the length of each part that begins it, else None).

        A part is (number of messages, whether the generation prompt follows).
        """
        size = len(json.dumps(messages)) + len(json.dumps(parts))
        seconds = SECONDS_PER_PART * len(parts) + SECONDS_PER_BYTE * size
        text, lengths = self.sandbox.ask(
            {"messages": messages, "parts": parts}, seconds, MEMORY_PER_BYTE * size
        )
        return text, lengths

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation as a text, with a BOS token if the template writes one."""
        return self._rendered(messages, [(len(messages), add_generation_prompt)])[0]

    def turns(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """(text, [(start, end)] of the turns to learn, in characters of the text).

        DataError if no turn can be told from the rest of what the template writes.
        """
        parts = [(len(messages), False)]
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                parts += [(place, True), (place + 1, False)]
        text, (_, *edges) = self._rendered(messages, parts)
        spans = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if start is not None and end is not None and start < end:
                spans.append((start, end))
        if not spans:
            raise DataError(
                f"{self.where}: no turn can be told apart from the rest: what it writes up to an "
                "assistant's turn, with its generation prompt, is not a beginning of the whole"
            )
        return text, spans

    def encode(self, messages: Messages) -> Example:
        """The conversation in tokens, the assistant's turns to be learned.

        The ids are those of the whole text, no special tokens added: the template has written them.
        A token across the edge of a turn is learned, as one at the edge of a prompt is.
        """
        text, spans = self.turns(messages)
        ids, starts, ends = self.tokenizer.encode_with_edges(text)
        learned = np.zeros(len(ids), bool)
        size = 0
        for start, end in spans:
            learned |= (starts < end) & (ends > start)
            size += len(text[start:end].encode())
        marks = learned & np.isin(ids, self.tokenizer.added)
        for start, end in zip(starts[marks].tolist(), ends[marks].tolist(), strict=True):
            size -= len(text[start:end].encode())
        turns = sum(message["role"] == "assistant" for message in messages)
        return Example(ids, learned, learned & ~marks, max(0, size), turns - len(spans))
