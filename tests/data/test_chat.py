"""Conversations: the text and the ids that transformers makes of them, and of those the assistant's turns alone."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from chat_templates import MARKED, QWEN3, TEMPLATES, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import minilora.data.chat
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
WORD = st.sampled_from(
    [
        "the cat",
        " ",
        "\n",
        "é\U0001f600",
        "<s>",
        "</s>",
        "<|im_end|>",
        "x",
        "</think>",
        "  sat ",
        "",
    ]
)
SAID = st.lists(WORD, max_size=4).map("".join)


@st.composite
def talks(draw):
    pairs = [
        [("user", draw(SAID)), ("assistant", draw(SAID))] for _ in range(draw(st.integers(1, 3)))
    ]
    turns = [("system", draw(SAID))] * draw(st.integers(0, 1)) + [
        turn for pair in pairs for turn in pair
    ]
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name: (its folder, our Chat)"""
    found = {}
    with contextlib.ExitStack() as stack:
        for i, (name, template) in enumerate(ALL.items()):
            folder = write_tokenizer(
                tmp_path_factory.mktemp("chat"), template, trim_offsets=bool(i % 2)
            )
            found[name] = folder, stack.enter_context(Chat(load_tokenizer(folder, 1000)))
        yield found


@pytest.fixture
def chat_of(tmp_path):
    """template, options of Chat: a Chat, which ends with the test"""
    with contextlib.ExitStack() as stack:
        yield lambda template, **options: stack.enter_context(
            Chat(load_tokenizer(write_tokenizer(tmp_path, template), 1000), **options)
        )


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
            text = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert chat.render(messages, prompt) == text
        found = theirs.apply_chat_template(messages, return_dict=True)
        assert chat.encode(messages).ids.tolist() == found["input_ids"]
        compared.append(len(messages))

    same()
    assert len(compared) >= 40


@pytest.mark.parametrize("name", ALL)
def test_chat_encode_learns_the_assistant_s_turns_and_their_ends(models, name):
    _, chat = models[name]
    text, spans = chat.turns(TALK)
    said = [text[start:end] for start, end in spans]
    expected = ["<think>\nhm\n</think>\n\n thé cat\U0001f600", "the  mat"]
    if name == "qwen3":  # the first turn was written with its thought as long as it was the last
        expected = ["<think>\n\n</think>\n\nthe  mat"]
    for found, words in zip(said, expected, strict=True):
        assert found.lstrip().startswith(words)
        assert found.lstrip().removeprefix(words).strip() in (
            "</s>",
            "<|im_end|>",
            "<|eot_id|>",
            "<end_of_turn>",
            "<|end|>",
        )
    lesson = chat.encode(TALK)
    assert lesson.skipped == (name == "qwen3")
    assert chat.tokenizer.decode(lesson.ids[lesson.learned]) == "".join(said)
    assert chat.tokenizer.decode(lesson.ids) == text
    marks = lesson.learned & ~lesson.spoken
    assert np.count_nonzero(marks) == len(expected), "the ends of turns"
    assert lesson.size == sum(len(turn.encode()) for turn in said) - sum(
        len(chat.tokenizer.decode([i])) for i in lesson.ids[marks].tolist()
    )


@given(talks())
def test_chat_turns_are_whole_and_nothing_else(models, messages):
    for name in ("chatml", "zephyr", "phi", "chatml, marked"):
        _, chat = models[name]
        text, spans = chat.turns(messages)
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        ends = {
            "chatml": "<|im_end|>\n\n",
            "zephyr": "</s>\n",
            "phi": "<|end|>\n",
            "chatml, marked": "<|im_end|>\n",
        }
        assert [text[start:stop] for start, stop in spans] == [turn + ends[name] for turn in turns]


def test_chat_encode_learns_a_token_at_the_edge_of_a_turn(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, [("a", "b"), ("b", "c")]))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    pairs = [("user", "ca"), ("assistant", "bc"), ("user", "c"), ("assistant", "a"), ("user", "bb")]
    with Chat(load_tokenizer(tmp_path, 5)) as chat:
        lesson = chat.encode([{"role": role, "content": content} for role, content in pairs])
    assert lesson.ids.tolist() == [2, 3, 2, 2, 3, 1]  # c ab c c ab b
    assert lesson.learned.tolist() == [False, True, True, False, True, False]
    assert lesson.size == 3


def test_chat_template_comes_from_where_transformers_takes_it(tmp_path):
    def written(template, jinja=None):
        write_tokenizer(tmp_path, template)
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_bytes(jinja)
        with Chat(load_tokenizer(tmp_path, 1000)) as chat:
            return chat.render(TALK)

    several = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ bos_token }}one"},
    ]
    assert written("{{ eos_token }}") == "</s>"
    assert written(several) == "<s>one"
    assert written(several, b"file {{ pad_token }}") == "file "
    assert written(None, "é".encode()) == "é"
    for template, jinja, named in [
        (None, None, "needs a tokenizer.json and its chat template"),
        (
            [{"name": "tool_use", "template": "tools"}],
            None,
            "needs a tokenizer.json and its chat template",
        ),
        ([3, {"name": "default"}], None, "needs a tokenizer.json and its chat template"),
        (
            {"default": "x"},
            None,
            "the chat_template in tokenizer_config.json beside .* expected a text, found dict",
        ),
        ([{"name": "default", "template": 3}], None, "expected a text, found int"),
        (None, b"a\xff", "chat_template.jinja beside .* is not UTF-8 at byte 1"),
        (
            "{% if %}",
            None,
            "the chat_template in tokenizer_config.json beside .* line 1: Expected an expression",
        ),
    ]:
        with pytest.raises(DataError, match=named):
            written(template, jinja)
    with pytest.raises(DataError, match="this model has none"):
        Chat(ByteTokenizer())


THINKS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
THINKS += "{% if add_generation_prompt %}[assistant]<plan>{% endif %}"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            THINKS,
            "no turn can be told",
        ),  # the prompt makes the model plan, and what is learned has no plan
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "no turn can be told",
        ),
        ("{{ messages[0].role }}", "no turn can be told"),
        (
            "{% if messages[0].role != 'user' %}{{ raise_exception('no system') }}{% endif %}",
            "itself refuses these messages: 'no system'",
        ),
    ],
)
def test_chat_encode_refuses_a_template_that_separates_no_turn(chat_of, template, named):
    with pytest.raises(DataError, match=named) as caught:
        chat_of(template).encode(TALK)
    assert "the chat_template in tokenizer_config.json" in str(caught.value)


def test_chat_encode_learns_only_turns_that_stay_as_they_were(chat_of):
    chat = chat_of(QWEN3)
    again = [*TALK, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    lesson = chat.encode(again)
    assert lesson.skipped == 2
    assert (
        chat.tokenizer.decode(lesson.ids[lesson.learned]) == "<think>\n\n</think>\n\ny<|im_end|>\n"
    )
    two = [
        *TALK,
        {"role": "assistant", "content": "<think>a</think>y"},
    ]  # nobody asked in between: both stand
    text, spans = chat.turns(
        [SYSTEM, TALK[1], {"role": "assistant", "content": "<think>b</think>x"}, two[-1]]
    )
    assert [text[a:b] for a, b in spans] == [
        "<think>\nb\n</think>\n\nx<|im_end|>\n",
        "<think>\na\n</think>\n\ny<|im_end|>\n",
    ]


USER, TURN = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


BAD: list[tuple[object, str]] = []


def bad(messages: object, message: str) -> None:
    BAD.append((messages, message))


bad([], "a list of messages, found an empty one")
bad(None, "a list of messages, found NoneType")
bad("text", "a list of messages, found str")
bad({"role": "user"}, "a list of messages, found dict")
bad([USER], "no message is the assistant's")
bad([USER, "b"], "message 2: expected 'role' and 'content' and no other key, found str")
bad(
    [USER, {"role": "assistant"}],
    "message 2: expected 'role' and 'content' and no other key, found role",
)
bad([USER, {}], "message 2: expected 'role' and 'content' and no other key, found nothing")
bad([USER, {**TURN, "tool_calls": []}], "no other key, found content, role, tool_calls")
bad(
    [USER, {**TURN, "role": "tool"}],
    "message 2: expected a role of system, user, assistant, found 'tool'",
)
bad([USER, {**TURN, "role": None}], "found 'None'")
bad([USER, {**TURN, "role": ["user"]}], "expected a role of")
bad(
    [{**USER, "content": [{"type": "text", "text": "a"}]}, TURN],
    "message 1: expected 'content' to be a text, found list",
)
bad([{**USER, "content": None}, TURN], "message 1: expected 'content' to be a text, found NoneType")


@pytest.mark.parametrize(("messages", "named"), BAD)
def test_conversation_names_what_is_wrong(messages, named):
    with pytest.raises(DataError) as caught:
        conversation(messages)
    assert named in str(caught.value)
    assert conversation([USER, TURN]) == [USER, TURN]


def test_encode_with_edges_gives_places_in_the_text(tmp_path):
    found = [
        load_tokenizer(write_tokenizer(tmp_path, None, trim_offsets=trim), 1000)
        for trim in (False, True)
    ]

    @given(SAID)
    def tiled(text):
        for tokenizer in found:
            ids, starts, ends = tokenizer.encode_with_edges(text)
            assert ids.tolist() == tokenizer.encode(text).tolist()
            assert ids.dtype == np.int32
            assert (starts < ends).all()
            covered = [
                i
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
                for i in range(start, end)
            ]
            assert sorted(set(covered)) == list(range(len(text)))

    tiled()
    with pytest.raises(DataError, match="half of a surrogate pair"):
        found[0].encode_with_edges("a\ud83d")


# ---- what a template may do -----------------------------------------------------------------------------------------

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
writes(
    "{% for i in [1, 2, 3] %}{{ i }}{% if i == 1 %}{% continue %}{% endif %}{% break %}{% endfor %}",
    "12",
)
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
        ((found,), _) = render_jinja_template([TALK], chat_template=template, bos_token="<s>")
        assert found == text


# ---- what no template can do ----------------------------------------------------------------------------------------

HANGS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
TOO_MUCH = "takes too much time or memory: its process ended with SIG"
HOSTILE: dict[str, str] = {}


def hostile(template: str, message: str) -> None:
    HOSTILE[template] = message


hostile("{{ 9 ** (9 ** 9) }}", TOO_MUCH)
hostile(HANGS, TOO_MUCH)
hostile("{{ 'a' * 9999999999 }}", "MemoryError")
hostile(
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "MemoryError",
)
hostile(
    "{% for i in range(99999) %}{{ messages[0].content }}{{ 'x' * 999 }}{% endfor %}",
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
    chat = chat_of(template, seconds=0.8 if named == TOO_MUCH else 5)
    with pytest.raises(DataError) as caught:
        chat.encode(TALK)
    assert type(caught.value) is DataError
    assert str(caught.value).startswith("the chat_template in tokenizer_config.json beside ")
    assert named in str(caught.value)
    assert str(caught.value).isprintable()


WHILE_IT_RUNS = 0.3  # seconds after which an interruption comes; it hangs far longer


def test_chat_encode_ends_a_template_that_hangs_without_limits(chat_of):
    chat = chat_of(HANGS, seconds=100)
    chat.patience = WHILE_IT_RUNS
    with pytest.raises(DataError, match="too much time or memory"):
        chat.encode(TALK)
    with pytest.raises(DataError, match="too much time or memory"):
        chat.encode(TALK)


@pytest.mark.skipif(os.name != "posix", reason="interrupts itself with a signal")
def test_chat_leaves_no_process_behind_after_an_interruption(tmp_path):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # it is ignored in what runs in the background
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, HANGS), 1000), seconds=8)
    chat.patience = 4  # a signal may come just before the reading that it is to interrupt

    def interrupted():
        with chat:
            threading.Timer(WHILE_IT_RUNS, os.kill, (os.getpid(), signal.SIGINT)).start()
            chat.encode(TALK)

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert chat.process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):  # not even as a zombie
        os.kill(chat.process.pid, 0)


def test_read_records_has_one_process_per_file_and_ends_it(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, TEMPLATES["llama2"]), 1000)
    started, popen = [], minilora.data.chat.subprocess.Popen
    monkeypatch.setattr(
        minilora.data.chat.subprocess,
        "Popen",
        lambda *a, **b: started.append(popen(*a, **b)) or started[-1],
    )
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "the cat"}\n' + (json.dumps({"messages": TALK}) + "\n") * 20)
    assert len(read_records(path, tokenizer, 1000)) == 21
    path.write_text(
        (json.dumps({"messages": TALK}) + "\n") * 20 + json.dumps({"messages": TALK[2:]})
    )
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
        lines = Path(f"/proc/{chat.process.pid}/limits").read_text().splitlines()[1:]
        return {line[:26].strip(): line[26:].split()[0] for line in lines}

    chat.render(TALK)
    found = limits()
    assert found["Max open files"] == found["Max file size"] == found["Max processes"] == "0"
    assert found["Max address space"] == str(1 << 30)
    assert found["Max cpu time"] == "4"
    for _ in range(100):
        chat.render(TALK)
    assert limits()["Max cpu time"] == "6"
    chat.render([{"role": "user", "content": "a" * 5_000_000}])
    assert limits()["Max cpu time"] == "11"


def test_chat_without_jinja2_says_how_to_install_it(chat_of, monkeypatch):
    place = str(Path(jinja2.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != place])
    with pytest.raises(
        DataError, match=r"tokenizer.json' needs the package 'jinja2': pip install -e \.\[hf\]"
    ):
        chat_of("").encode(TALK)
