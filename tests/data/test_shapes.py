"""Shapes: what the fields of a record say, and which shape a record with several has."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from minilora.data.shapes import (
    ROLE_OF,
    SHAPES,
    Completion,
    Conversation,
    Instruction,
    find_shape,
    read_shape,
)
from minilora.errors import DataError, NothingToLearnError

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
TURN = {"role": "assistant", "content": "a"}
TALK = [USER, TURN]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
READ: list[tuple[Any, Any, list[str]]] = []


def read(record: Any, content: Any, *unused: str) -> None:
    READ.append((record, content, list(unused)))


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


read({"text": "t"}, Completion("", "t"))
read({"prompt": "p", "completion": "c"}, Completion("p", "c"))
read({"messages": TALK}, Conversation(TALK))
read({"messages": TALK, "tools": [TOOL]}, Conversation(TALK, [TOOL]))
read(
    {"messages": TALK, "tools": '[{"type": "function"}]'},
    Conversation(TALK, [{"type": "function"}]),
)
for no_tools in (None, [], "", " ", "[]", "null"):
    read({"messages": TALK, "tools": no_tools}, Conversation(TALK))
# As trl has them: only the completion is learned.
read({"prompt": TALK, "completion": [TURN]}, Conversation([*TALK, TURN], None, 2))
read({"prompt": [], "completion": [TURN]}, Conversation([TURN]))
read({"prompt": [USER], "completion": [TURN], "tools": [TOOL]}, Conversation(TALK, [TOOL], 1))
# Alpaca and its relatives.
read({"instruction": "i", "input": "x", "output": "o"}, Instruction("i", "x", "o"))
read({"instruction": "i", "input": "", "output": "o"}, Instruction("i", "", "o"))
read({"instruction": "i", "input": None, "output": "o"}, Instruction("i", "", "o"))
read({"instruction": "i", "output": "o"}, Instruction("i", "", "o"))
DOLLY = {"instruction": "i", "context": "x", "response": "o", "category": "c"}
read(DOLLY, Instruction("i", "x", "o"), "category")
read({"question": "q", "answer": "a"}, Instruction("q", "", "a"))
read({"input": "q", "output": "a"}, Instruction("q", "", "a"))
# ShareGPT.
SHARED = [turn("system", "s"), turn("human", "q"), turn("gpt", "a")]
read({"conversations": SHARED}, Conversation([SYSTEM, *TALK]))
read({"conversations": [turn("User", "q"), turn("ChatGPT", "a")]}, Conversation(TALK))
read({"conversations": [{**turn("user", "q"), "weight": 1}, TURN]}, Conversation(TALK))
read({"conversations": TALK, "tools": [TOOL]}, Conversation(TALK, [TOOL]))
HAS_TOOL = [turn("human", "q"), turn("tool", "t"), turn("gpt", "a")]
read({"conversations": HAS_TOOL}, Conversation([USER, {"role": "tool", "content": "t"}, TURN]))
WEIGHTED = [turn("human", "q"), {**turn("gpt", "a"), "weight": 0.0}, USER, {**TURN, "weight": 1}]
NOT_LEARNED = {**TURN, "weight": 0.0}
read({"conversations": WEIGHTED}, Conversation([USER, NOT_LEARNED, USER, {**TURN, "weight": 1}]))
# Several shapes: the first of the list; what is left is unused, unless it is null.
read({"text": "t", "messages": TALK}, Conversation(TALK), "text")
read({"text": "t", "messages": None}, Completion("", "t"))
read({"id": 1, "n": None, "prompt": "p", "messages": TALK}, Conversation(TALK), "id", "prompt")
ALPACA = {"instruction": "i", "input": "x", "output": "o", "text": "t"}
read(ALPACA, Instruction("i", "x", "o"), "text")
read({"prompt": "p", "completion": "c", "tools": [TOOL]}, Completion("p", "c"), "tools")
read({"text": "t", "tools": []}, Completion("", "t"), "tools")
read({"prompt": None, "completion": None, "text": "t"}, Completion("", "t"))


@pytest.mark.parametrize(("record", "content", "unused"), READ)
def test_read_shape_says_what_is_learned_and_what_is_unused(record, content, unused):
    assert read_shape(record) == (content, unused)
    assert type(read_shape(record)[0]) is type(content)


def test_find_shape_takes_the_first_of_several():
    for first, second in combinations(range(len(SHAPES)), 2):
        record = dict.fromkeys([*SHAPES[second].fields, *SHAPES[first].fields], "x")
        assert SHAPES.index(find_shape(record)) <= first
        null = {**record, SHAPES[first].fields[0]: None}
        assert find_shape(null) is not None
    assert find_shape({"text": "x", "messages": None}) is SHAPES[-1]
    assert find_shape({"messages": None}) is SHAPES[0]
    for record in ({}, {"prompt": "x"}, {"instruction": "x"}, {"output": "x"}, {"Text": "x"}):
        assert find_shape(record) is None


def test_instruction_is_a_user_s_turn_and_the_assistant_s():
    (user, turn), tools, first = Instruction("i", "x", "o").as_conversation()
    assert user == {"role": "user", "content": "i\n\nx"}
    assert turn == {"role": "assistant", "content": "o"}
    assert (tools, first) == (None, 0)
    assert Instruction("i", "", "o").as_conversation().messages[0]["content"] == "i"
    braces = Instruction("{0}", "{x}", "{}").as_completion()
    assert "### Instruction:\n{0}\n\n### Input:\n{x}\n" in braces.prompt
    assert braces.text == "{}"


BAD: list[tuple[Any, str]] = []


def bad(record: Any, message: str) -> None:
    BAD.append((record, message))


bad(
    {},
    "expected the fields messages, or conversations, or prompt + completion, or instruction + out",
)
bad({"chosen": "a", "rejected": "b", "prompt": "c"}, "found 'chosen', 'rejected', 'prompt'")
bad({"prompt": "a", "completion": [TURN]}, "expected 'prompt' to be a list of messages, found str")
bad({"prompt": [USER], "completion": "a"}, "'completion' to be a list of messages, found str")
bad(
    {"prompt": [{"role": "user"}], "completion": [TURN]}, "message 1: expected 'role' and 'content'"
)
bad({"instruction": "a", "input": 3, "output": "b"}, "expected 'input' to be a text, found int")
bad({"question": "2 + 2", "answer": 4}, "expected 'answer' to be a text, found int")
bad({"conversations": "a"}, "expected 'conversations' to be a list of messages, found str")
bad({"conversations": [turn("alien", "a")]}, "message 1: 'from' is 'alien', expected system, human")
bad({"conversations": [{"from": 3, "value": "a"}]}, "message 1: 'from' is '3'")
bad(
    {"conversations": [TURN, {"from": "gpt"}]}, "message 2: expected 'role' and 'content', found fr"
)
bad(
    {"conversations": [turn("human", 3), TURN]},
    "message 1: expected 'content' to be a text, found in",
)  # type: ignore[arg-type]
bad({"messages": TALK, "tools": "no JSON"}, "'tools': not valid JSON")
bad({"messages": TALK, "tools": '[], "x": 1'}, "expected 'tools' to be a list of objects")
bad({"messages": TALK, "tools": {"a": 1}}, "expected 'tools' to be a list of objects, or its JSON")
bad({"messages": TALK, "tools": ["f"]}, "expected 'tools' to be a list of objects")


@pytest.mark.parametrize(("record", "message"), BAD)
def test_read_shape_names_what_is_wrong(record, message):
    with pytest.raises(DataError) as caught:
        read_shape(record)
    assert type(caught.value) is DataError
    assert message in str(caught.value)


def test_read_shape_of_a_record_that_is_empty():
    user = [turn("human", "q")]
    for record in (
        {"text": None},
        {"prompt": "p", "completion": None},
        {"instruction": None, "output": "o"},
        {"conversations": []},
        {"conversations": user},
        {"conversations": [*user, turn("gpt", None)]},
        {"conversations": [*user, {**turn("gpt", "a"), "weight": 0}]},
        {"prompt": [USER], "completion": [USER]},
        {"prompt": [USER], "completion": []},
    ):
        with pytest.raises(NothingToLearnError):
            read_shape(record)


def test_role_of_knows_the_speakers_in_use():
    roles = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
    roles |= {"user": "user", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant"}
    assert ROLE_OF.items() >= roles.items()
