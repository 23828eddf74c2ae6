"""Conversations: text and ids are transformers'; only the assistant's turns are learned."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from chat_templates import MARKED, QWEN3, TEMPLATES, TOOLS, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.chat import Chat, conversation
from minilora.data.records import read_records
from minilora.data.tokenizer import ByteTokenizer, load_tokenizer
from minilora.errors import DataError

jinja2 = pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

ALL = TEMPLATES | {f"{name}, marked": template for name, template in MARKED.items()}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    SYSTEM,
    {"role": "user", "content": "What is <|im_end|>? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n thé cat\U0001f600 "},
    {"role": "user", "content": "\nand"},
    {"role": "assistant", "content": "the  mat\n"},
]
WORDS = ["the cat", " ", "\n", "é\U0001f600", "<s>", "</s>", "<|im_end|>", "x", "</think>"]
WORD = st.sampled_from([*WORDS, "  sat ", ""])
CONTENT = st.lists(WORD, max_size=4).map("".join)


@st.composite
def talks(draw):
    roles = ["user", "assistant"] * draw(st.integers(1, 3))
    if draw(st.booleans()):
        roles.insert(0, "system")
    return [{"role": role, "content": draw(CONTENT)} for role in roles]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name of a template: (its folder, our Chat)}"""
    models = {}
    trim_offsets = False
    with contextlib.ExitStack() as stack:
        for name, template in ALL.items():
            folder = write_tokenizer(tmp_path_factory.mktemp("chat"), template, trim_offsets)
            models[name] = folder, stack.enter_context(Chat(load_tokenizer(folder, 1000)))
            trim_offsets = not trim_offsets
        yield models


@pytest.fixture
def chat_of(tmp_path):
    """A function of a template and Chat's options: a Chat, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(template, **options):
            tokenizer = load_tokenizer(write_tokenizer(tmp_path, template), 1000)
            return stack.enter_context(Chat(tokenizer, **options))

        yield start


@pytest.fixture
def that_day(monkeypatch):
    """transformers' clock shows the day that ours always shows."""
    import transformers.utils.chat_template_utils as theirs

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    monkeypatch.setattr(theirs, "datetime", Clock)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ALL)
def test_chat_render_and_encode_agree_with_transformers(models, that_day, name):
    import transformers

    folder, chat = models[name]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    compared = []

    @given(talks())
    def same(messages):
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            assert chat.render(messages, prompt) == theirs.apply_chat_template(messages, **options)
        expected = theirs.apply_chat_template(messages, return_dict=True)
        assert chat.encode(messages).ids.tolist() == expected["input_ids"]
        compared.append(len(messages))

    same()
    assert len(compared) >= 40


ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


@pytest.mark.parametrize("name", ALL)
def test_chat_encode_learns_the_assistant_s_turns_and_their_ends(models, name):
    _, chat = models[name]
    text, spans = chat.turns(TALK)
    turns = [text[start:end] for start, end in spans]
    expected = ["<think>\nhm\n</think>\n\n thé cat\U0001f600", "the  mat"]
    if name == "qwen3":  # it wrote the first turn with its thought as long as it was the last
        expected = ["<think>\n\n</think>\n\nthe  mat"]
    for turn, words in zip(turns, expected, strict=True):
        assert turn.lstrip().startswith(words)
        assert turn.lstrip().removeprefix(words).strip() in ENDS
    example = chat.encode(TALK)
    decode = chat.tokenizer.decode
    assert example.skipped == (name == "qwen3")
    assert decode(example.ids[example.learned]) == "".join(turns)
    assert decode(example.ids) == text
    marks = example.ids[example.learned & ~example.spoken].tolist()
    assert len(marks) == len(expected), "the ends of turns"
    size = sum(len(turn.encode()) for turn in turns)
    assert example.size == size - sum(len(decode([mark])) for mark in marks)


TURN_ENDS = {"chatml": "<|im_end|>\n\n", "zephyr": "</s>\n"}
TURN_ENDS |= {"phi": "<|end|>\n", "chatml, marked": "<|im_end|>\n"}


@given(talks())
def test_chat_turns_are_whole_and_nothing_else(models, messages):
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    for name, end in TURN_ENDS.items():
        _, chat = models[name]
        text, spans = chat.turns(messages)
        turns = [text[start:stop] for start, stop in spans]
        assert turns == [content + end for content in contents]


def test_chat_encode_learns_a_token_at_the_edge_of_a_turn(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, [("a", "b"), ("b", "c")]))
    made.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    messages = []
    for role, content in zip(["user", "assistant"] * 3, ["ca", "bc", "c", "a", "bb"], strict=False):
        messages.append({"role": role, "content": content})
    with Chat(load_tokenizer(tmp_path, 5)) as chat:
        example = chat.encode(messages)
    assert example.ids.tolist() == [2, 3, 2, 2, 3, 1]  # c ab c c ab b
    assert example.learned.tolist() == [False, True, True, False, True, False]
    assert example.size == 3


def test_chat_template_comes_from_where_transformers_takes_it(tmp_path):
    def written(template, jinja=None):
        write_tokenizer(tmp_path, template)
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_bytes(jinja)
        with Chat(load_tokenizer(tmp_path, 1000)) as chat:
            return chat.render(TALK)

    tools = {"name": "tool_use", "template": "tools"}
    several = [tools, {"name": "default", "template": "{{ bos_token }}one"}]
    assert written("{{ eos_token }}") == "</s>"
    assert written(several) == "<s>one"
    assert written(several, b"file {{ pad_token }}") == "file "
    assert written(None, "é".encode()) == "é"
    absent = "needs a tokenizer.json and its chat template"
    in_config = "the chat_template in tokenizer_config.json beside .*"
    refused = [(None, None, absent)]
    refused.append(([tools], None, absent))
    refused.append(([3, {"name": "default"}], None, absent))
    refused.append(({"default": "x"}, None, f"{in_config} expected a text, found dict"))
    number = [{"name": "default", "template": 3}]
    refused.append((number, None, "expected a text, found int"))
    refused.append((None, b"a\xff", "chat_template.jinja beside .* is not UTF-8 at byte 1"))
    refused.append(("{% if %}", None, f"{in_config} line 1: Expected an expression"))
    for template, jinja, message in refused:
        with pytest.raises(DataError, match=message):
            written(template, jinja)
    with pytest.raises(DataError, match="this model has none"):
        Chat(ByteTokenizer())


# The generation prompt makes the model plan, and what is learned has no plan.
THINKS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
THINKS += "{% if add_generation_prompt %}[assistant]<plan>{% endif %}"
COUNTS = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role != 'user' %}{{ raise_exception('no system') }}{% endif %}"
NO_TURN = [
    (template, "no turn can be told") for template in (THINKS, COUNTS, "{{ messages[0].role }}")
]
NO_TURN.append((REFUSES, "itself refuses these messages: 'no system'"))


@pytest.mark.parametrize(("template", "named"), NO_TURN)
def test_chat_encode_refuses_a_template_that_separates_no_turn(chat_of, template, named):
    with pytest.raises(DataError, match=named) as caught:
        chat_of(template).encode(TALK)
    assert "the chat_template in tokenizer_config.json" in str(caught.value)


def test_chat_encode_learns_only_turns_that_stay_as_they_were(chat_of):
    chat = chat_of(QWEN3)
    again = [*TALK, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    example = chat.encode(again)
    assert example.skipped == 2
    learned = chat.tokenizer.decode(example.ids[example.learned])
    assert learned == "<think>\n\n</think>\n\ny<|im_end|>\n"
    # Two turns without a question between them keep their thoughts.
    one = {"role": "assistant", "content": "<think>b</think>x"}
    two = {"role": "assistant", "content": "<think>a</think>y"}
    text, spans = chat.turns([SYSTEM, TALK[1], one, two])
    first, second = (text[start:end] for start, end in spans)
    assert first == "<think>\nb\n</think>\n\nx<|im_end|>\n"
    assert second == "<think>\na\n</think>\n\ny<|im_end|>\n"


USER, TURN = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


BAD: list[tuple[object, str]] = []


def bad(messages: object, message: str) -> None:
    BAD.append((messages, message))


bad([], "a list of messages, found an empty one")
bad(None, "a list of messages, found NoneType")
bad("text", "a list of messages, found str")
bad({"role": "user"}, "a list of messages, found dict")
bad([USER], "no message is the assistant's")
KEYS = "message 2: expected 'role' and 'content'"
bad([USER, "b"], f"{KEYS}, found str")
bad([USER, {"role": "assistant"}], f"{KEYS}, found role")
bad([USER, {}], f"{KEYS}, found nothing")
bad([USER, {"role": "assistant", "tool_calls": []}], f"{KEYS}, found role, tool_calls")
CALLS = "message 2: expected 'tool_calls' to be a list of objects"
OLDER = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
bad([USER, OLDER], "message 2: expected 'tool_calls', found 'function_call', its older form")
for weight in (0.5, -1, "0", [0]):
    found = f"message 2: expected a weight of 0 or 1, found '{weight}'"
    bad([USER, {**TURN, "weight": weight}], found)
bad([USER, {**TURN, "weight": 0}], "each of the assistant's messages has weight 0")
bad([USER, {**TURN, "tool_calls": "f()"}], f"{CALLS}, found 'f()'")
bad([USER, {**TURN, "tool_calls": ["f()"]}], CALLS)
bad([{**USER, "tool_calls": [{}]}, TURN], "only in the assistant's messages, found user")
ROLES = "message 2: expected a role of system, user, assistant, developer, tool"
bad([USER, {**TURN, "role": "bot"}], f"{ROLES}, found 'bot'")
bad([USER, {**TURN, "role": None}], "found 'None'")
bad([USER, {**TURN, "role": ["user"]}], "expected a role of")
CONTENTS = "message 1: expected 'content' to be a text"
bad([{**USER, "content": []}, TURN], f"{CONTENTS}, found an empty list")
bad([{**USER, "content": 3}, TURN], f"{CONTENTS}, found int")
bad([{**USER, "content": None}, TURN], f"{CONTENTS}, found NoneType")
bad([USER, {**TURN, "content": None}], "message 2: expected 'content' to be a text, found NoneTy")
PART = "message 1: expected part 2 of 'content' to"
PARTS = [{"type": "text", "text": "a"}]
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
NOT_IMAGES = "found 'image_url': only text is learned, not images"
bad([{**USER, "content": [*PARTS, IMAGE]}, TURN], f"{PART} be of type text, {NOT_IMAGES}")
bad([{**USER, "content": [*PARTS, "a"]}, TURN], f"{PART} be of type text, found 'str'")
bad([{**USER, "content": [*PARTS, {"text": "a"}]}, TURN], "found 'None'")
bad(
    [{**USER, "content": [*PARTS, {"type": "text"}]}, TURN], f"{PART} have a 'text', found NoneType"
)


@pytest.mark.parametrize(("messages", "named"), BAD)
def test_conversation_names_what_is_wrong(messages, named):
    with pytest.raises(DataError) as caught:
        conversation(messages)
    assert named in str(caught.value)
    assert conversation([USER, TURN]) == [USER, TURN]


def test_conversation_drops_keys_that_say_nothing():
    """A template that asks `'tool_calls' in message` must not find a null one."""
    nulls = {"tool_calls": None, "name": None}
    part = {"type": "text", "text": "a", "image": None}
    talk = [{**USER, **nulls, "content": [part]}, {**TURN, "tool_calls": [], "weight": 1}]
    assert conversation(talk) == [{**USER, "content": PARTS}, {**TURN, "weight": 1}]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert conversation([USER, calls]) == [USER, calls]
    assert talk[1]["tool_calls"] == [], "what is given is only read"


# ---- tools, tool calls, rare roles, content in parts ---------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": None}
CALL["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
RESULT = {"role": "tool", "content": "2", "name": "add"}
RULES = {"role": "developer", "content": "Add."}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": t} for t in ("1 + ", "1?")]}
WITH_TOOLS = [RULES, IN_PARTS, CALL, RESULT, {"role": "assistant", "content": "2!"}]


def test_chat_encode_learns_tool_calls_and_answers(chat_of):
    chat = chat_of(TOOLS)
    example = chat.encode(conversation(WITH_TOOLS), [TOOL])
    text = chat.tokenizer.decode(example.ids)
    assert text.startswith('<|im_start|>system\nTools: [{"type": "function", ')
    assert "<|im_start|>developer\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n" in text
    assert "<|im_start|>tool\n2<|im_end|>\n" in text
    called = '[call]{"name": "add", "arguments": {"a": 1}}<|im_end|>\n'
    assert chat.tokenizer.decode(example.ids[example.learned]) == f"{called}2!<|im_end|>\n"
    assert example.skipped == 0
    last = chat.encode(conversation(WITH_TOOLS), [TOOL], first=3)
    assert last.ids.tolist() == example.ids.tolist()
    assert chat.tokenizer.decode(last.ids[last.learned]) == "2!<|im_end|>\n"
    assert last.skipped == 0


def test_chat_encode_does_not_learn_turns_of_weight_0(chat_of):
    """As in OpenAI's format: the text is the same, and no turn counts as missing."""
    bad_turn = {"role": "assistant", "content": "the rat"}
    talk = [USER, bad_turn, USER, TURN]
    chat = chat_of(TOOLS)
    whole = chat.encode(conversation(talk))
    for zero, one in ((0, 1), (0.0, 1.0), (0, None)):
        weighted = [USER, {**bad_turn, "weight": zero}, USER, {**TURN, "weight": one}]
        example = chat.encode(conversation(weighted))
        assert example.ids.tolist() == whole.ids.tolist()
        assert chat.tokenizer.decode(example.ids[example.learned]) == "b<|im_end|>\n"
        assert (example.skipped, example.notes) == (0, ())
    assert chat.tokenizer.decode(whole.ids[whole.learned]) == "the rat<|im_end|>\nb<|im_end|>\n"


def test_chat_encode_notes_once_what_the_template_does_not_write(chat_of):
    thought = {**TURN, "reasoning_content": "hm"}
    chat = chat_of(TOOLS)
    assert chat.encode(TALK).notes == ()
    (note,) = chat.encode([USER, thought]).notes
    assert note == "the chat template does not write 'reasoning_content' of messages"
    assert chat.encode([USER, thought]).notes == ()
    writes = chat_of(TOOLS.replace("write(message.content)", "message.reasoning_content"))
    assert writes.encode([USER, thought]).notes == ()


def test_chat_render_gives_reasoning_under_each_name_and_no_nulls(chat_of):
    """As transformers does: gpt-oss's template reads `thinking`, others `reasoning_content`."""
    both = "{% for m in messages %}{{ m.reasoning_content }}+{{ m.thinking }};{% endfor %}"
    chat = chat_of(both)
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert chat.render([{**TURN, name: "hm"}]) == "hm+hm;"
    assert chat.render([{**TURN, "thinking": "a", "reasoning_content": "b"}]) == "b+a;"
    null = chat_of("{% for m in messages %}{{ m.content }}{{ 'content' in m }}{% endfor %}")
    assert null.render(conversation([USER, CALL])) == "aTrueFalse"


@pytest.mark.oracle
def test_chat_render_of_reasoning_and_nulls_agrees_with_transformers(chat_of, tmp_path):
    import transformers

    writes_all = "{% for m in messages %}{{ m|tojson(sort_keys=true) }}{% endfor %}"
    chat = chat_of(writes_all)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for more in ({"thinking": "a"}, {"reasoning": "a"}, {"reasoning": "a", "thinking": "b"}):
        for talk in ([USER, {**TURN, **more}], [USER, {**CALL, **more}]):
            assert chat.render(talk) == theirs.apply_chat_template(talk, tokenize=False)


def test_chat_encode_notes_arguments_that_the_template_quotes_again(chat_of):
    """In OpenAI's format they are a text, and most templates write any value as JSON."""
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat = chat_of(TOOLS)
    (note,) = chat.encode(talk).notes
    assert "the arguments of tool calls with escaped quotes" in note
    assert chat.encode(talk).notes == ()
    as_they_are = chat_of(TOOLS.replace("call.function|tojson", "call.function.arguments"))
    assert as_they_are.encode(talk).notes == ()
    assert chat_of(TOOLS).encode([USER, CALL]).notes == ()


def test_read_records_uses_the_template_for_tools_where_a_conversation_has_them(tmp_path):
    """A folder may have several templates; transformers takes the one of name tool_use, too."""
    named = [{"name": "default", "template": TEMPLATES["chatml"]}]
    named.append({"name": "tool_use", "template": TOOLS})
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, named), 1000)
    lines = [{"messages": WITH_TOOLS, "tools": [TOOL]}, {"messages": [USER, TURN]}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [tokenizer.decode(record.ids) for record in read_records(path, tokenizer, 2000)]
    assert texts[0].startswith("<|im_start|>system\nTools: [")
    assert texts[1].startswith("<|im_start|>system\nBe brief.")
    path.write_text(json.dumps({"messages": WITH_TOOLS}))
    with pytest.raises(DataError, match="does not take content in parts for role user"):
        read_records(path, tokenizer, 2000)


@pytest.mark.oracle
def test_chat_render_for_tools_takes_the_template_that_transformers_takes(tmp_path):
    import transformers

    named = [{"name": "default", "template": TEMPLATES["chatml"]}]
    for templates in (named, [*named, {"name": "tool_use", "template": TOOLS}]):
        write_tokenizer(tmp_path, templates)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for tools in (None, [TOOL]):
            expected = theirs.apply_chat_template([USER, TURN], tools=tools, tokenize=False)
            with Chat(load_tokenizer(tmp_path, 1000), for_tools=bool(tools)) as chat:
                assert chat.render([USER, TURN], tools=tools) == expected


@pytest.mark.oracle
def test_chat_encode_with_tools_agrees_with_transformers(chat_of, tmp_path):
    import transformers

    chat = chat_of(TOOLS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tools in (None, [TOOL]):
        for messages in (WITH_TOOLS, TALK, [IN_PARTS, TURN]):
            expected = theirs.apply_chat_template(messages, tools=tools, return_dict=True)
            ours = chat.encode(conversation(messages), tools)
            assert ours.ids.tolist() == expected["input_ids"]


# Each template leaves one thing out that TOOLS has, or writes it as Python would.
LEFT_OUT: list[tuple[str, str, object, str]] = []


def left_out(old: str, new: str, given: object, message: str) -> None:
    assert old in TOOLS
    LEFT_OUT.append((old, new, given, message))


left_out("if tools", "if false", ([USER, TURN], [TOOL]), "leaves out 'tools'")
left_out("message.tool_calls", "message.calls", ([USER, CALL], None), "leaves out 'tool_calls'")
NULL = "message.content if message.content is string else 'None'"
left_out(
    "write(message.content) -}}\n    {%- for call in message.tool_calls",
    NULL + " -}}\n    {%- for call in message.calls",
    ([USER, CALL], None),
    "leaves out 'tool_calls'",
)
for rare in (RULES, RESULT):
    role = rare["role"]
    left_out(
        "in messages -",
        f"in messages if message.role != '{role}' -",
        ([USER, rare, TURN], None),
        f"leaves out messages of role {role}",
    )
CONTENT_IN_PARTS = "does not take content in parts for role"
left_out("write(message.content)", "message.content", ([IN_PARTS, TURN], None), CONTENT_IN_PARTS)
left_out("part.text", "'?'", ([IN_PARTS, TURN], None), f"{CONTENT_IN_PARTS} user: give 'content'")
AS_PARTS = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
left_out("part.text", "'?'", ([USER, AS_PARTS], None), f"{CONTENT_IN_PARTS} assistant")


def test_chat_encode_refuses_tool_calls_before_a_null_content_fails(chat_of):
    with pytest.raises(DataError, match="leaves out 'tool_calls': take them out of the record"):
        chat_of(TEMPLATES["chatml"]).encode(conversation([USER, CALL]))


@pytest.mark.parametrize(("old", "new", "given", "message"), LEFT_OUT)
def test_chat_encode_refuses_a_template_that_leaves_something_out(
    chat_of, old, new, given, message
):
    chat = chat_of(TOOLS.replace(old, new))
    messages, tools = given
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            chat.encode(conversation(messages), tools)
    assert chat.encode(TALK).learned.any(), "what has none of it is still learned"


def test_chat_encode_tries_each_rare_thing_once(chat_of, monkeypatch):
    chat = chat_of(TOOLS)
    chat.encode(conversation(WITH_TOOLS), [TOOL])
    rendered = []
    monkeypatch.setattr(chat, "render", lambda *given, **named: rendered.append(given))
    chat.encode(conversation(WITH_TOOLS), [TOOL])
    chat.encode(TALK)
    assert not rendered


def test_chat_encode_with_rare_things_names_the_template_s_own_refusal(chat_of):
    chat = chat_of("{{ raise_exception('no tools here') }}")
    with pytest.raises(DataError, match="itself refuses these messages: 'no tools here'"):
        chat.encode(conversation([USER, CALL]), [TOOL])


def test_read_records_gives_the_chat_template_what_each_shape_says(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, TOOLS), 1000)
    shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "the cat"}]
    lines = [
        {"messages": WITH_TOOLS, "tools": [TOOL]},
        {"messages": WITH_TOOLS, "tools": json.dumps([TOOL])},
        {"prompt": [*TALK, USER], "completion": [TURN]},
        {"instruction": "the cat", "input": "on", "output": "the mat"},
        {"question": "the cat", "answer": "the mat"},
        {"conversations": [*shared, {"from": "gpt", "value": "the mat"}]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(lines))
    records = read_records(path, tokenizer, 2000)
    learned = [tokenizer.decode(record.ids[record.learned]) for record in records]
    assert learned[0] == learned[1]
    assert learned[0].startswith('[call]{"name": "add"')
    assert learned[2:] == ["b<|im_end|>\n", *["the mat<|im_end|>\n"] * 3]
    texts = [tokenizer.decode(record.ids) for record in records]
    assert texts[0] == texts[1]
    turn = "<|im_start|>assistant\nthe mat<|im_end|>\n"
    assert texts[3] == f"<|im_start|>user\nthe cat\n\non<|im_end|>\n{turn}"
    assert texts[4] == f"<|im_start|>user\nthe cat<|im_end|>\n{turn}"
    assert texts[5] == f"<|im_start|>system\ns<|im_end|>\n{texts[4]}"


def test_encode_with_edges_gives_places_in_the_text(tmp_path):
    loaded = []
    for trim_offsets in (False, True):
        folder = write_tokenizer(tmp_path, None, trim_offsets)
        loaded.append(load_tokenizer(folder, 1000))

    @given(CONTENT)
    def tiled(text):
        for tokenizer in loaded:
            ids, starts, ends = tokenizer.encode_with_edges(text)
            assert ids.tolist() == tokenizer.encode(text).tolist()
            assert ids.dtype == np.int32
            assert (starts < ends).all()
            covered = set()
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                covered |= set(range(start, end))
            assert covered == set(range(len(text)))

    tiled()
    with pytest.raises(DataError, match="half of a surrogate pair"):
        loaded[0].encode_with_edges("a\ud83d")


# ---- what a template may do ----------------------------------------------------------------------

WRITES: dict[str, str] = {}


def writes(template: str, text: str) -> None:
    WRITES[template] = text


writes("{{ {'b': ['<é>', none], 'a': 1}|tojson }}", '{"b": ["<é>", null], "a": 1}')
writes("{{ [1, {}]|tojson(indent=2) }}{{ 'é'|tojson(true) }}", '[\n  1,\n  {}\n]"\\u00e9"')
writes(
    "{{ {'b': 1, 'a': 'é'}|tojson(ensure_ascii=true, sort_keys=true, separators=('', '')) }}",
    '{"a""\\u00e9""b"1}',
)
writes("{{ strftime_now('%d %b %Y, 100%%') }}", "26 Jul 2024, 100%")
writes("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc")
LOOP = "{{ i }}{% if i == 1 %}{% continue %}{% endif %}{% break %}"
writes("{% for i in [1, 2, 3] %}" + LOOP + "{% endfor %}", "12")
writes("{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}", "11")
writes(
    "{{ tools }}{{ documents }}{{ bos_token }}{{ nowhere }}{{ dict(a=1).a }}{{ '<b>' }}",
    "NoneNone<s>1<b>",
)
writes("{% set n = namespace({'a': 1}, b=2) %}{% set n.c = 3 %}{{ n.a }}{{ n.b }}{{ n.c }}", "123")


@pytest.mark.parametrize("template", WRITES)
def test_chat_render_gives_a_template_what_transformers_gives_it(chat_of, template):
    chat = chat_of(template)
    assert [chat.render(TALK), chat.render(TALK)] == [WRITES[template]] * 2


@pytest.mark.oracle
def test_chat_render_expectations_are_those_of_transformers(that_day):
    from transformers.utils.chat_template_utils import render_jinja_template

    for template, text in WRITES.items():
        options = {"chat_template": template, "bos_token": "<s>"}
        ((rendered,), _) = render_jinja_template([TALK], **options)
        assert rendered == text


# ---- what no template may do ---------------------------------------------------------------------

# Few steps of much work each, so that only the limit of time or memory can end it.
SLOW = "{% for a in range(999) %}{{ ('%099999999d' % a)|length and '' }}{% endfor %}"
NESTED = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
TOO_MUCH_MEMORY = "MemoryError"
TOO_MUCH = "takes too much time or memory: its process ended with SIG"
HOSTILE: dict[str, str] = {}


def hostile(template: str, message: str) -> None:
    HOSTILE[template] = message


hostile("{{ 9 ** (9 ** 9) }}", "line 1: a product of more than 4,096 bits")
hostile("{{ 2 ** 4000 * 2 ** 4000 }}", "line 1: a product of more than 4,096 bits")
hostile(SLOW, TOO_MUCH)
hostile("{{ 'x'|center(999999999)|center(999999999) }}", TOO_MUCH_MEMORY)
hostile(NESTED, "line 1: it takes more than 100,000 steps")
hostile(NESTED.replace("99999", "300"), "line 1: it takes more than 100,000 steps")
hostile(
    "{% for a in messages[0].content * 999 %}" * 3 + "{% endfor %}" * 3,
    "line 1: it takes more than 100,000 steps",
)
hostile(
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "line 1: it takes more than 100,000 steps",
)
hostile(
    "{% for a in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "maximum recursion depth",
)
hostile("{{ 'a' * 9999999999 }}", "line 1: a product of more than 1,048,576 characters or entries")
hostile("{{ 9999999999 * [1] }}", "line 1: a product of more than 1,048,576 characters or entries")
hostile(
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "MemoryError",
)
hostile(
    "{% for i in range(9999) %}{{ messages[0].content }}{{ 'x' * 999 }}{% endfor %}",
    "it writes more than 1,0",
)
hostile("{{ range(10000000000) }}", "Range too big")
hostile("{% macro m() %}{{ m() }}{% endmacro %}\n{{ m() }}", "line 1: maximum recursion depth")
hostile(
    "\n{{ ''.__class__.__mro__ }}",
    "line 2: access to attribute '__class__' of 'str' object is unsafe",
)
hostile("{{ raise_exception.__globals__.x }}", "'__globals__' of 'function' object is unsafe")
hostile("{{ (''|attr('__class__')).x }}", "is unsafe")
hostile("{% set f = '{0.__class__.x}'.format %}{{ f(1) }}", "is unsafe")
hostile("{{ namespace(__html__='{0.__class__}'.format) }}", "a namespace may not have '__html__'")
hostile("{% set n = namespace() %}{% set n.__html__ = 1 %}", "a namespace may not have '__html__'")
hostile("{{ messages.append(1) }}", "'append' of 'list' object is unsafe")
hostile("{% include '/etc/passwd' %}", "no loader for this environment")
hostile("{{ '\\ud800' }}", "surrogates not allowed")
hostile(
    "{{ raise_exception('\x1b[2J no' * 99999) }}",
    "the template itself refuses these messages: '\\x1b[2J no",
)
hostile("{{ " + "(" * 99999 + " }}", "recursion depth")
hostile("\n\n{% for %}", "line 3: Expected an expression")
hostile("{{ 1 / 0 }}", "line 1: division by zero")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits, or none")
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_chat_encode_refuses_a_hostile_template(chat_of, number):
    template, named = list(HOSTILE.items())[number]
    chat = chat_of(template, seconds=0.8 if named == TOO_MUCH else 2)
    with pytest.raises(DataError) as caught:
        chat.encode(TALK)
    assert type(caught.value) is DataError
    assert str(caught.value).startswith("the chat_template in tokenizer_config.json beside ")
    assert named in str(caught.value)
    assert str(caught.value).isprintable()


WHILE_IT_RUNS = 0.3  # seconds after which an interruption comes; it hangs far longer


def test_chat_encode_ends_a_template_that_hangs_without_limits(chat_of):
    chat = chat_of(SLOW, seconds=100)
    chat.sandbox.patience = WHILE_IT_RUNS
    with pytest.raises(DataError, match="too much time or memory"):
        chat.encode(TALK)
    with pytest.raises(DataError, match="too much time or memory"):
        chat.encode(TALK)


@pytest.mark.skipif(os.name != "posix", reason="interrupts itself with a signal")
def test_chat_leaves_no_process_behind_after_an_interruption(tmp_path, started):
    # A background process ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, SLOW), 1000), seconds=8)
    started.clear()  # the tokenizer's
    chat.sandbox.patience = 4  # a signal may come just before the reading that it is to interrupt

    def interrupted():
        with chat:
            threading.Timer(WHILE_IT_RUNS, os.kill, (os.getpid(), signal.SIGINT)).start()
            chat.encode(TALK)

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    (process,) = started
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):  # not even as a zombie
        os.kill(process.pid, 0)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started, in order."""
    processes = []
    popen = subprocess.Popen

    def watched(*arguments, **options):
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", watched)
    return processes


def test_read_records_has_one_process_per_file_and_ends_it(tmp_path, started):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, TEMPLATES["llama2"]), 1000)
    started.clear()  # the tokenizer's
    path = tmp_path / "data.jsonl"
    talks = (json.dumps({"messages": TALK}) + "\n") * 20
    path.write_text('{"text": "the cat"}\n' + talks)
    assert len(read_records(path, tokenizer, 1000)) == 21
    path.write_text(talks + json.dumps({"messages": TALK[2:]}))
    with pytest.raises(DataError, match=r"line 21: .*user and assistant must take turns"):
        read_records(path, tokenizer, 1000)
    path.write_text('{"text": "the cat"}\n')
    read_records(path, tokenizer, 1000)
    assert len(started) == 2
    assert None not in [process.returncode for process in started]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads them in /proc")
def test_chat_process_has_limits_and_time_in_proportion_to_its_work(chat_of):
    chat = chat_of(TEMPLATES["zephyr"], seconds=3)

    def limits():
        lines = Path(f"/proc/{chat.sandbox.process.pid}/limits").read_text().splitlines()[1:]
        return {line[:26].strip(): line[26:].split()[0] for line in lines}

    chat.render(TALK)
    values = limits()
    assert values["Max open files"] == values["Max file size"] == values["Max processes"] == "0"
    assert 1 << 28 < int(values["Max address space"]) < (1 << 28) + (1 << 18)
    assert values["Max cpu time"] == "4"
    for _ in range(100):
        chat.render(TALK)
    assert limits()["Max cpu time"] == "6"
    chat.render([{"role": "user", "content": "a" * 5_000_000}])
    assert limits()["Max cpu time"] == "11"


def test_chat_without_jinja2_says_how_to_install_it(chat_of, monkeypatch):
    chat = chat_of("")
    place = str(Path(jinja2.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != place])
    message = r"tokenizer.json' needs the package 'jinja2': pip install -e \.\[hf\]"
    with pytest.raises(DataError, match=message):
        chat.encode(TALK)
