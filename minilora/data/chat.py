"""Conversations: the text that a model's own chat template makes of them, and what to learn of it.

    messages   [{"role": "system" | "user" | "assistant", "content": "..."}, ...]

A message may have what the template takes besides: a role of developer or tool, tool calls, content
in parts of text, and other keys. A template that leaves one of the first four out is refused; a key
that it does not write is noted once.

Only the assistant's turns are learned, except those of "weight": 0, as OpenAI's fine-tuning format
and ShareGPT's have it. A turn is what the template adds to the text of the messages
before it, from the end of their generation prompt to the end of the turn, with the mark that ends
it. Two texts must therefore be beginnings of the whole text: that of the messages before the turn
with the generation prompt, and that of the messages up to the turn. Some templates write a turn
differently once others follow: Qwen3's drops the thoughts. Such a turn is not what the model would
have been asked to write, and is not learned.

A template is a program of unknown origin: it runs in a process of its own (sandbox.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, NothingToLearnError
from ..formats.disk import quoted
from .sandbox import Sandbox
from .tokenizer import ByteTokenizer, Tokenizer

Messages = list[dict[str, Any]]
Tools = list[Any] | None  # the tools that a template is given, as JSON
Given = tuple[Messages, Tools]

ROLES = ("system", "user", "assistant", "developer", "tool")
RARE_ROLES = ROLES[3:]  # some templates leave these out
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, the first counts
# Keys of messages that are written, or whose absence from the text surprises nobody.
KNOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight"}

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
    skipped    the number of the assistant's turns that should be learned and are not
    is_open    whether no token ends it
    notes      what the user should know of how the chat template writes it
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    spoken: NDArray[np.bool_]
    size: int
    skipped: int = 0
    is_open: bool = False
    notes: tuple[str, ...] = ()


# ---- checking messages ---------------------------------------------------------------------------


def conversation(value: Any, name: str = "messages") -> Messages:
    """The field `name` of a record, checked to be a conversation with something to learn.

    DataError as from `check_messages`; NothingToLearnError where no message is the assistant's, or
    all that are have the weight 0.
    """
    messages = check_messages(value, name)
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns:
        raise NothingToLearnError("no message is the assistant's, so nothing can be learned")
    if not any(map(is_learned, turns)):
        raise NothingToLearnError("nothing to learn: each of the assistant's messages has weight 0")
    return messages


def is_learned(message: dict[str, Any]) -> bool:
    """Whether a checked message is a turn to learn."""
    return bool(message["role"] == "assistant" and message.get("weight", 1) != 0)


def check_messages(value: Any, name: str = "messages") -> Messages:
    """A list of messages, without their keys whose value is null or an empty list of tool calls.

    Data sets with a column per key write such values where a message has no such key, but a
    template that asks whether the key exists takes them for one. A null content beside tool calls
    stays. DataError names the message that is wrong; NothingToLearnError for an empty list, and
    where a content is null.
    """
    if type(value) is not list:
        kind = type(value).__name__
        raise DataError(f"expected {name!r} to be a list of messages, found {kind}")
    if not value:
        raise NothingToLearnError(f"expected {name!r} to be a list of messages, found an empty one")
    return [_check_message(f"message {number}: expected", m) for number, m in enumerate(value, 1)]


def _check_message(expected: str, message: Any) -> dict[str, Any]:
    if type(message) is not dict or "role" not in message:
        keys = type(message).__name__
        if type(message) is dict:
            keys = ", ".join(sorted(message)) or "nothing"
        raise DataError(f"{expected} 'role' and 'content', found {keys:.100}")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{expected} a role of {', '.join(ROLES)}, found {quoted(role, 40)}")
    checked = {}
    for key, value in message.items():
        is_empty = value is None or (key == "tool_calls" and value == [])
        if key == "content" or not is_empty:
            checked[key] = value
    if "function_call" in checked:
        raise DataError(f"{expected} 'tool_calls', found 'function_call', its older form")
    if role == "assistant" and checked.get("weight", 1) not in (0, 1):
        raise DataError(f"{expected} a weight of 0 or 1, found {quoted(checked['weight'], 40)}")
    if "tool_calls" in checked:
        _check_tool_calls(expected, role, checked["tool_calls"])
        if checked.get("content") is None:
            return checked
    if "content" not in checked:
        keys = ", ".join(sorted(message))
        raise DataError(f"{expected} 'role' and 'content', found {keys:.100}")
    content = checked["content"]
    if type(content) is list and content:
        parts = enumerate(content, 1)
        checked["content"] = [_check_part(f"{expected} part {i}", part) for i, part in parts]
    elif content is None:
        raise NothingToLearnError(f"{expected} 'content' to be a text, found NoneType")
    elif type(content) is not str:
        kind = "an empty list" if content == [] else type(content).__name__
        raise DataError(f"{expected} 'content' to be a text, found {kind}")
    return checked


def _check_tool_calls(expected: str, role: str, calls: Any) -> None:
    if role != "assistant":
        raise DataError(f"{expected} 'tool_calls' only in the assistant's messages, found {role}")
    if type(calls) is not list or any(type(call) is not dict for call in calls):
        shown = quoted(calls, 60)
        raise DataError(f"{expected} 'tool_calls' to be a list of objects, found {shown}")


def _check_part(expected: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if type(part) is dict else type(part).__name__
    if kind != "text":
        shown = quoted(kind, 40)
        raise DataError(
            f"{expected} of 'content' to be of type text, found {shown}: only text is learned, "
            "not images, sound or video"
        )
    if type(part.get("text")) is not str:
        text_type = type(part.get("text")).__name__
        raise DataError(f"{expected} of 'content' to have a 'text', found {text_type}")
    return {key: value for key, value in part.items() if value is not None}


# ---- rendering -----------------------------------------------------------------------------------


class Chat:
    """A tokenizer and the process that runs its chat template: `with Chat(tokenizer) as chat`.

    for_tools   whether to run the template that the tokenizer may have for conversations with tools

    The process ends with the block. DataError for a tokenizer without a template, and from the
    methods, for a template that cannot be parsed or run, does what it may not, or takes more than
    `seconds` or other limits allow.
    """

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS, for_tools: bool = False):
        if isinstance(tokenizer, ByteTokenizer) or tokenizer.chat_template is None:
            raise DataError(
                "a list of messages needs a tokenizer.json and its chat template "
                "(chat_template.jinja, or chat_template in tokenizer_config.json): this model has "
                "none"
            )
        self.tokenizer = tokenizer
        template, self.where = tokenizer.chat_template
        if for_tools and tokenizer.tool_template:
            template, self.where = tokenizer.tool_template
        given = {"tools": None, "documents": None, **tokenizer.special.texts}
        self.sandbox = Sandbox(self.where, {"template": template, "given": given}, seconds, MEMORY)
        self._supported: set[str] = set()  # what the template was seen not to leave out
        self._tried: set[str] = set()  # keys of messages that the template was tried without

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.sandbox.close()

    def _rendered(
        self, messages: Messages, parts: list[tuple[int, bool]], tools: Tools = None
    ) -> tuple[str, list[int | None]]:
        """(text of the first part, the length of each part that begins it, else None).

        A part is (number of messages, whether the generation prompt follows).
        """
        given = [_as_given(message) for message in messages]
        question = {"messages": given, "parts": parts, "tools": tools}
        size = len(json.dumps(question))
        seconds = SECONDS_PER_PART * len(parts) + SECONDS_PER_BYTE * size
        text, lengths = self.sandbox.ask(question, seconds, MEMORY_PER_BYTE * size)
        return text, lengths

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """The conversation as a text, with a BOS token if the template writes one."""
        return self._rendered(messages, [(len(messages), add_generation_prompt)], tools)[0]

    def _require_support(self, messages: Messages, tools: Tools) -> None:
        """DataError for a template that does not take what only some templates take.

        It must write something else without the tools, tool calls or messages of a rare role, and
        the same for a content of one part as for the text of this part. Each kind is tried with the
        first conversation that has it.
        """
        for kind, whole, without in _left_out(messages, tools):
            if kind not in self._supported and self._writes_same(whole, without):
                raise DataError(f"{self.where} leaves out {kind}: take them out of the record")
            self._supported.add(kind)
        for kind, in_parts, as_text in _in_parts(messages, tools):
            if kind not in self._supported and not self._writes_same(in_parts, as_text):
                raise DataError(f"{self.where} does not take {kind}: give 'content' as one text")
            self._supported.add(kind)

    def _notes(self, messages: Messages, tools: Tools, text: str) -> Iterator[str]:
        """What a template does with the messages that their author may not expect, each once.

        It does not write a key; or it writes the arguments of a tool call, given as a text as in
        OpenAI's format, as a text in quotes and not as an object.
        """
        keys = {key for message in messages for key in message}
        for key in sorted(keys - KNOWN_KEYS - self._tried):
            self._tried.add(key)
            dropped = REASONING if key in REASONING else (key,)
            without = []
            for message in messages:
                without.append({k: message[k] for k in message if k not in dropped})
            if self._writes_same((messages, tools), (without, tools)):
                yield f"the chat template does not write {quoted(key, 40)} of messages"
        if "arguments" not in self._tried and any(
            isinstance(arguments, str) and '"' in arguments and json.dumps(arguments)[1:-1] in text
            for arguments in _arguments(messages)
        ):
            self._tried.add("arguments")
            yield (
                "the chat template writes the arguments of tool calls with escaped quotes, because "
                "they are a text: give an object if the model should write one"
            )

    def _writes_same(self, one: Given, other: Given) -> bool:
        """Whether the template writes one text for both, and refuses neither."""
        try:
            return self.render(one[0], tools=one[1]) == self.render(other[0], tools=other[1])
        except DataError:
            return False

    def turns(
        self, messages: Messages, tools: Tools = None, first: int = 0
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, [(start, end)] of the turns to learn, in characters of the text).

        Messages before number `first` are not learned. If no turn can be told from the rest of what
        the template writes, the messages after the last turn are left out: some templates write all
        turns differently once a question follows.

        DataError if the template does not take what the messages have; NothingToLearnError if no
        turn can be told apart even so: another conversation may have one that can.
        """
        self._require_support(messages, tools)
        places = [i for i, m in enumerate(messages) if i >= first and is_learned(m)]
        end = places[-1] + 1 if places else 0
        text, spans = self._spans(messages, places, tools)
        if not spans and end < len(messages):
            text, spans = self._spans(messages[:end], places, tools)
        if not spans:
            raise NothingToLearnError(
                f"{self.where}: no turn can be told apart from the rest: what it writes up to an "
                "assistant's turn, with its generation prompt, is not a beginning of the whole"
            )
        return text, spans

    def _spans(
        self, messages: Messages, places: list[int], tools: Tools
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, [(start, end)] of those turns at `places` that can be told apart)"""
        parts = [(len(messages), False)]
        for place in places:
            parts += [(place, True), (place + 1, False)]
        text, (_, *edges) = self._rendered(messages, parts, tools)
        spans = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if start is not None and end is not None and start < end:
                spans.append((start, end))
        return text, spans

    def encode(self, messages: Messages, tools: Tools = None, first: int = 0) -> Example:
        """The conversation in tokens, the assistant's turns from message `first` on to be learned.

        The ids are those of the whole text, no special tokens added: the template has written them.
        A token across the edge of a turn is learned, as one at the edge of a prompt is.
        """
        text, spans = self.turns(messages, tools, first)
        ids, starts, ends = self.tokenizer.encode_with_edges(text)
        learned = np.zeros(len(ids), bool)
        size = 0
        for start, end in spans:
            learned |= (starts < end) & (ends > start)
            size += len(text[start:end].encode())
        marks = learned & np.isin(ids, self.tokenizer.added)
        for start, end in zip(starts[marks].tolist(), ends[marks].tolist(), strict=True):
            size -= len(text[start:end].encode())
        turns = sum(map(is_learned, messages[first:]))
        notes = tuple(self._notes(messages, tools, text))
        return Example(
            ids, learned, learned & ~marks, max(0, size), turns - len(spans), notes=notes
        )


def _as_given(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template.

    It has no nulls, which some templates would write, and its reasoning has each name in use.
    """
    given = {key: value for key, value in message.items() if value is not None}
    for name in REASONING:
        if name in given:
            return {"thinking": given[name], **given, "reasoning_content": given[name]}
    return given


def _arguments(messages: Messages) -> Iterator[Any]:
    """The arguments of each tool call."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            if isinstance(function, dict):
                yield function.get("arguments")


def _left_out(messages: Messages, tools: Tools) -> Iterator[tuple[str, Given, Given]]:
    """(kind, a conversation with it, the same without it) for each kind that the messages have.

    The kinds are those that a template may leave out: tools, tool calls, and rare roles.
    """
    if tools:
        yield "'tools'", (messages, tools), (messages, None)
    if any("tool_calls" in message for message in messages):
        # Many of the templates that leave tool calls out cannot write a null content.
        whole = [{**message, "content": message.get("content") or ""} for message in messages]
        without = []
        for message in whole:
            without.append({key: message[key] for key in message if key != "tool_calls"})
        yield "'tool_calls'", (whole, tools), (without, tools)
    for role in RARE_ROLES:
        others = [message for message in messages if message["role"] != role]
        if len(others) < len(messages):
            yield f"messages of role {role}", (messages, tools), (others, tools)


def _in_parts(messages: Messages, tools: Tools) -> Iterator[tuple[str, Given, Given]]:
    """(kind, a conversation with one part in each content of parts, the same with its text as the
    content) for each role that has content in parts."""
    has_parts = [type(message.get("content")) is list for message in messages]
    one_part = []
    for message, in_parts in zip(messages, has_parts, strict=True):
        one_part.append({**message, "content": message["content"][:1]} if in_parts else message)
    for role in ROLES:
        as_text = list(one_part)
        for place, message in enumerate(one_part):
            if has_parts[place] and message["role"] == role:
                as_text[place] = {**message, "content": message["content"][0]["text"]}
        if as_text != one_part:
            yield f"content in parts for role {role}", (one_part, tools), (as_text, tools)
