"""Conversations: written as the model's own chat template writes them, of which the assistant's turns are learned.

    messages   [{"role": "system" | "user" | "assistant", "content": "..."}, ...]

A turn is what the template adds to all that stands before it, the generation prompt included; what ends the turn
belongs to it. So both must be beginnings of the whole text: what the template makes of the messages before the turn
with the generation prompt, and of those up to the turn. Some templates write a turn differently once others follow:
Qwen3's drops what was thought. Such a turn is not what the model would have been asked to write, and is not learned.

A template is a stranger's program. `rendering.py` runs it, in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..formats.disk import quoted
from .tokenizer import ByteTokenizer, HubTokenizer

Messages = list[dict[str, str]]

ROLES = ("system", "user", "assistant")
RENDERING = Path(__file__).with_name("rendering.py")
SECONDS, WAITS = (
    10,
    6,
)  # of processor time for a template; of the clock's, so many times that for an answer


class Example(NamedTuple):
    """ids (n,); learned (n,), which of them are to be; spoken (n,), which of those stand for the `size` bytes of text.

    The others are marks: an end of text, an end of turn. `skipped` turns are the assistant's, and yet not learned.
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    spoken: NDArray[np.bool_]
    size: int
    skipped: int = 0


def conversation(found: Any) -> Messages:
    """What JSON held, if it is a conversation that can be learned from. DataError names the message that is not."""
    if type(found) is not list or not found:
        kind = "an empty one" if found == [] else type(found).__name__
        raise DataError(f"expected 'messages' to be a list of messages, found {kind}")
    for number, message in enumerate(found, 1):
        expected = f"message {number}: expected"
        if type(message) is not dict or set(message) != {"role", "content"}:
            keys = (
                type(message).__name__
                if type(message) is not dict
                else ", ".join(sorted(message)) or "nothing"
            )
            raise DataError(f"{expected} 'role' and 'content' and no other key, found {keys[:100]}")
        if message["role"] not in ROLES:
            raise DataError(
                f"{expected} a role of {', '.join(ROLES)}, found {quoted(message['role'], 40)}"
            )
        if type(message["content"]) is not str:
            raise DataError(
                f"{expected} 'content' to be a text, found {type(message['content']).__name__}"
            )
    if not any(message["role"] == "assistant" for message in found):
        raise DataError("no message is the assistant's: there is nothing to learn")
    return found


class Chat:
    """A tokenizer and the process that runs its chat template: `with Chat(tokenizer) as chat`.

    That process ends with the block, whatever ends it. DataError where there is no template, and from the methods, for
    one that cannot be parsed or run, does what it may not, or takes more than `seconds` or other limits allow.
    """

    def __init__(self, tokenizer: ByteTokenizer | HubTokenizer, seconds: float = SECONDS):
        if isinstance(tokenizer, ByteTokenizer) or (found := tokenizer.chat_template) is None:
            where = "chat_template.jinja, or chat_template in tokenizer_config.json"
            raise DataError(
                f"'messages' needs a tokenizer.json and its chat template ({where}): this model has none"
            )
        self.tokenizer, self.patience = tokenizer, WAITS * seconds
        template, self.where = found
        given = {"tools": None, "documents": None, **tokenizer.special_tokens}
        self.order = {"path": sys.path, "template": template, "given": given, "seconds": seconds}

    def __enter__(self) -> Chat:
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-I", str(RENDERING)]
        self.process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
        self._write(self.order)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()  # closes the pipes, and waits for its end

    def _write(self, line: object) -> None:
        with contextlib.suppress(
            OSError
        ):  # it has ended: then there is no answer, and that is told
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()

    def _rendered(
        self, messages: Messages, parts: list[tuple[int, bool]]
    ) -> tuple[str, list[int | None]]:
        timer = threading.Timer(self.patience, self.process.kill)
        try:
            timer.start()
            self._write({"messages": messages, "parts": parts})
            line = self.process.stdout.readline()
            ended = None if line.endswith(b"\n") else self.process.wait()
        finally:
            timer.cancel()
        if ended is not None:
            how = signal.Signals(-ended).name if ended < 0 else f"status {ended}"
            raise DataError(
                f"{self.where} takes too much time or memory: its process ended with {how}"
            )
        found = json.loads(line)
        if isinstance(found, dict):
            raise DataError(self.where + found["error"])
        text, lengths = found
        return text, lengths

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation as a text, what the tokenizer calls BOS included if the template writes one."""
        return self._rendered(messages, [(len(messages), add_generation_prompt)])[0]

    def turns(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """(text, the (start, end) in it of each turn that is to be learned), in characters.

        DataError if the template does not let any be told apart.
        """
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        edges = [edge for place in places for edge in ((place, True), (place + 1, False))]
        text, (_, *found) = self._rendered(messages, [(len(messages), False), *edges])
        spans = [
            (a, b)
            for a, b in zip(found[::2], found[1::2], strict=True)
            if a is not None and b and a < b
        ]
        if not spans:
            why = "what it writes up to an assistant's turn, with its generation prompt, is no beginning of the whole"
            raise DataError(f"{self.where}: no turn can be told apart from the rest: {why}")
        return text, spans

    def encode(self, messages: Messages) -> Example:
        """What of a conversation is to be learned, in tokens.

        The ids are those of the whole text, no special tokens added: the template has written them. A token that holds
        the edge of a turn is learned, as one at the edge of a prompt is.
        """
        text, spans = self.turns(messages)
        ids, starts, ends = self.tokenizer.encode_with_edges(text)
        learned = np.zeros(len(ids), bool)
        for start, end in spans:
            learned |= (starts < end) & (ends > start)
        marks = learned & np.isin(ids, self.tokenizer.added)
        size = sum(len(text[start:end].encode()) for start, end in spans)
        size -= sum(
            len(text[a:b].encode())
            for a, b in zip(starts[marks].tolist(), ends[marks].tolist(), strict=True)
        )
        turns = sum(message["role"] == "assistant" for message in messages)
        return Example(ids, learned, learned & ~marks, max(0, size), turns - len(spans))
