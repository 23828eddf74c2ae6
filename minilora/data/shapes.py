"""The shapes of a record: which fields it has, and what they say about text, prompt and turns.

    {"messages": [...]}                          turns of {"role": ..., "content": ...}
    {"conversations": [...]}                     the same, or turns of {"from": ..., "value": ...}
    {"prompt": ..., "completion": ...}           two texts, or two lists of messages
    {"instruction": ..., "output": ...}          with or without "input"
    {"instruction": ..., "response": ...}        with or without "context"
    {"question": ..., "answer": ...}
    {"input": ..., "output": ...}
    {"text": ...}

A record with the fields of several shapes has the first of them in this order: data sets keep the
text that they made from an instruction, or the prompt that begins a conversation, beside it. Other
columns are ignored, and so is a column whose value is null. "tools" belongs to a conversation. One
file may have records of several shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import DataError, FormatError, NothingToLearnError
from ..formats.disk import JsonObject, parse_json, quoted
from .chat import Messages, check_messages, conversation

# The names of speakers in conversations of {"from": ..., "value": ...}, in lower case.
SPEAKERS = {
    "system": ("system",),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model"),
    "tool": ("tool",),
}
ROLE_OF = {name: role for role, names in SPEAKERS.items() for name in names}

# The prompt of Alpaca (Taori et al. 2023), for a model without a chat template.
PREAMBLE = "Below is an instruction that describes a task"
PREAMBLE_WITH_INPUT = f"{PREAMBLE}, paired with an input that provides further context"
REQUEST = "Write a response that appropriately completes the request."
ALPACA = f"{PREAMBLE}. {REQUEST}\n\n### Instruction:\n{{}}\n\n### Response:\n"
ALPACA_WITH_INPUT = (
    f"{PREAMBLE_WITH_INPUT}. {REQUEST}\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)


# ---- what a record says --------------------------------------------------------------------------


class Completion(NamedTuple):
    """A text to learn after a prompt, which may be empty."""

    prompt: str
    text: str


class Conversation(NamedTuple):
    """Messages, of which the assistant's are learned from number `first` on, and their tools."""

    messages: Messages
    tools: list[Any] | None = None
    first: int = 0


class Instruction(NamedTuple):
    """An instruction, what it is about ("" for nothing), and the answer to learn."""

    instruction: str
    context: str
    answer: str

    def as_conversation(self) -> Conversation:
        """A user's turn, the context below the instruction, and the assistant's."""
        asked = f"{self.instruction}\n\n{self.context}" if self.context else self.instruction
        user = {"role": "user", "content": asked}
        return Conversation([user, {"role": "assistant", "content": self.answer}])

    def as_completion(self) -> Completion:
        """The answer after Alpaca's prompt."""
        if self.context:
            prompt = ALPACA_WITH_INPUT.format(self.instruction, self.context)
        else:
            prompt = ALPACA.format(self.instruction)
        return Completion(prompt, self.answer)


Content = Completion | Conversation | Instruction


# ---- the shapes ----------------------------------------------------------------------------------


class Shape(NamedTuple):
    """The fields that a record must have, what reads them, and a field that it may have."""

    fields: tuple[str, ...]
    read: Callable[[JsonObject, Shape], Content]
    optional: str = ""


def _read_messages(record: JsonObject, shape: Shape) -> Content:
    return Conversation(conversation(record["messages"]), _read_tools(record))


def _read_turns(record: JsonObject, shape: Shape) -> Content:
    turns = record["conversations"]
    if type(turns) is list:
        turns = [_as_message(number, turn) for number, turn in enumerate(turns, 1)]
    return Conversation(conversation(turns, "conversations"), _read_tools(record))


def _as_message(number: int, turn: Any) -> Any:
    """A turn of {"from": ..., "value": ...} as a message; anything else as it is."""
    if type(turn) is not dict or "from" not in turn or "value" not in turn:
        return turn
    speaker = turn["from"]
    role = ROLE_OF.get(speaker.lower()) if type(speaker) is str else None
    if role is None:
        known = ", ".join(ROLE_OF)
        raise DataError(f"message {number}: 'from' is {quoted(speaker, 40)}, expected {known}")
    message = {"role": role, "content": turn["value"]}
    if role == "assistant" and "weight" in turn:
        message["weight"] = turn["weight"]
    return message


def _read_pair(record: JsonObject, shape: Shape) -> Content:
    """Two texts; or two lists of messages, of which the second is learned."""
    prompt, completion = record["prompt"], record["completion"]
    if type(prompt) is not list and type(completion) is not list:
        return Completion(*_texts(record, shape.fields))
    before = check_messages(prompt, "prompt") if prompt != [] else []
    after = conversation(completion, "completion")
    return Conversation([*before, *after], _read_tools(record), len(before))


def _read_instruction(record: JsonObject, shape: Shape) -> Content:
    instruction, answer = _texts(record, shape.fields)
    context = ""
    if record.get(shape.optional) is not None:
        (context,) = _texts(record, (shape.optional,))
    return Instruction(instruction, context, answer)


def _read_text(record: JsonObject, shape: Shape) -> Content:
    return Completion("", *_texts(record, shape.fields))


def _texts(record: JsonObject, fields: tuple[str, ...]) -> list[str]:
    for field in fields:
        value = record[field]
        if type(value) is not str:
            raise DataError(f"expected {field!r} to be a text, found {type(value).__name__}")
    return [record[field] for field in fields]


def _read_tools(record: JsonObject) -> list[Any] | None:
    """The tools of a conversation: a list of objects, or a text that is one in JSON."""
    tools = record.get("tools")
    if type(tools) is str and not tools.strip():
        return None
    if type(tools) is str:
        try:
            tools = parse_json(b'{"tools": %b}' % tools.encode(), "'tools'")
        except FormatError as error:
            raise DataError(str(error)) from None
        tools = tools["tools"] if len(tools) == 1 else tools
    if not tools:
        return None
    if type(tools) is not list or any(type(tool) is not dict for tool in tools):
        raise DataError(
            f"expected 'tools' to be a list of objects, or its JSON, found {quoted(tools, 60)}"
        )
    return tools


SHAPES = (
    Shape(("messages",), _read_messages),
    Shape(("conversations",), _read_turns),
    Shape(("prompt", "completion"), _read_pair),
    Shape(("instruction", "output"), _read_instruction, "input"),
    Shape(("instruction", "response"), _read_instruction, "context"),
    Shape(("question", "answer"), _read_instruction),
    Shape(("input", "output"), _read_instruction),
    Shape(("text",), _read_text),
)
EXPECTED = "expected the fields " + ", or ".join(" + ".join(shape.fields) for shape in SHAPES)


def find_shape(record: JsonObject) -> Shape | None:
    """The first shape whose fields the record has, one without a null among them if there is."""
    shapes = [shape for shape in SHAPES if record.keys() >= set(shape.fields)]
    filled = [shape for shape in shapes if all(record[key] is not None for key in shape.fields)]
    return next(iter([*filled, *shapes]), None)


def require_shape(record: JsonObject) -> Shape:
    """The shape of a record. DataError, with all shapes, for none."""
    shape = find_shape(record)
    if shape is None:
        keys = ", ".join(quoted(key, 40) for key in list(record)[:5])
        raise DataError(f"{EXPECTED}; found {keys or 'nothing'}")
    return shape


def read_shape(record: JsonObject) -> tuple[Content, list[str]]:
    """(what a record says, the columns that it does not use)

    DataError for a record of no shape, or with a value of another type. NothingToLearnError where
    a field or a content is null, or no message of the assistant's is to be learned.
    """
    shape = require_shape(record)
    for field in shape.fields:
        if record[field] is None:
            raise NothingToLearnError(f"nothing to learn: {field!r} is null")
    content = shape.read(record, shape)
    used = {*shape.fields, shape.optional}
    if isinstance(content, Conversation):
        used.add("tools")
    return content, [key for key in record if key not in used and record[key] is not None]
